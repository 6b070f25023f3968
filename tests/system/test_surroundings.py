"""What the user's machine may be like: MLflow refuses, a password in its URI, ignored signals."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from support.samples.specs import GOOD
from typer.testing import CliRunner, Result

from cluster import snapshot
from lorvp.errors import UserError
from lorvp.features import cache as feature_cache
from lorvp.training import loop
from lorvp.utils import files
from sweeps import launch
from sweeps.folder import Command, read_record
from sweeps.run.driver import one_line
from sweeps.run.signals import SignalHandler
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec
from sweeps.tracking import store
from sweeps.tracking.retry import first_line
from sweeps.tracking.tracker import Tracker, make_tables

SECRET = "pa55:word"


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Iterator[Spec]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("sweep.yaml").write_text(GOOD)
    before = {signum: signal.getsignal(signum) for signum in SignalHandler.SIGNALS}
    yield spec_file.load(Path("sweep.yaml"))
    for signum, handler in before.items():
        signal.signal(signum, handler)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(launch.app, ["sweep.yaml", *arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: str) -> str:
    """The one line that it said; nothing of the sweep is left."""
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    (line,) = result.output.splitlines()
    assert not Path("runs/good").exists()
    return line


def test_an_experiment_in_the_trash(sweep):
    uri = store.tracking_uri(sweep)
    Path("runs").mkdir()
    make_tables(uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("lorvp")
    assert store.is_sure_to_open(uri, "lorvp")
    client.delete_experiment(experiment)
    line = refused()
    assert f"mlflow experiments restore --experiment-id {experiment}" in line
    assert "--set tracking.experiment=NAME takes another" in line
    assert store.is_sure_to_open(uri, "another")


def test_an_experiment_that_another_sweep_makes_meanwhile(sweep, monkeypatch):
    first = Tracker(sweep, "1", GOOD)
    found, answers = mlflow.MlflowClient.get_experiment_by_name, iter([True, False])

    def late(self: mlflow.MlflowClient, name: str) -> object:
        return None if next(answers) else found(self, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", late)
    assert Tracker(sweep, "2", GOOD).experiment == first.experiment


def test_a_store_that_takes_no_files_leaves_no_run(sweep, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow.MlflowClient, "log_dict", full)
    with pytest.raises(UserError, match=r"can't be used: .*No space left on device"):
        Tracker(sweep, "1", GOOD)
    client = mlflow.MlflowClient(store.tracking_uri(sweep))
    assert client.search_runs([client.get_experiment_by_name("lorvp").experiment_id]) == []


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "http://me:{}@127.0.0.1:1", "htp://x", "postgresql://me:{}@h/d"])
def test_stores_that_can_not_be_had(sweep, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(SECRET))
    line = refused()
    assert "can't be used: " in line
    assert SECRET not in line


def test_a_password_is_not_shown(sweep, capsys):
    uri = f"https://me:{SECRET}@host/mlflow"
    error = OSError(f"API request to {uri}/api failed")
    for text in (store.ui_command(uri), first_line(error), one_line(error), store.without_passwords(uri)):
        assert SECRET not in text
        assert "https://me:***@host/mlflow" in text
    for plain in ("https://host:5000/a@b", "sqlite:////tmp/mlflow.db", "https://me@host"):
        assert store.without_passwords(plain) == plain


def test_a_password_has_no_place_in_a_spec(sweep):
    line = refused(f"--set=tracking.uri=http://me:{SECRET}@host")
    assert "tracking.uri: leave the password out" in line
    assert SECRET not in line


def test_an_error_before_the_first_job_is_one_line(sweep, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("no such column")

    monkeypatch.setattr(launch, "snapshot", broken)
    assert "KeyError: 'no such column' (" in refused()
    Path("runs/good").mkdir(parents=True)
    Path("runs/good/notes.txt").write_text("the user's own")
    assert run().exit_code == 1
    assert [path.name for path in Path("runs/good").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("begun", ["driver.json", "trials/0123"])
def test_a_sweep_that_has_begun_is_not_taken_back(sweep, begun):
    """As when the screen is gone after the driver was submitted as a job."""

    def broken() -> None:
        with launch.sweep_folder(sweep, False, Command("good.yaml", [])):
            path = sweep.folder / begun
            path.parent.mkdir(exist_ok=True)
            path.touch()
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        broken()
    assert read_record(sweep.folder)["spec"]["name"] == "good"


def test_a_signal_that_was_ignored_stays_ignored(sweep):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    SignalHandler()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)


def test_what_setup_puts_into_pythonpath_reaches_a_job_after_the_sweeps_code(tmp_path):
    """As `module load` in a profile's `setup` does, in the shell that then starts the job."""
    start = f"{snapshot.python(tmp_path / 'the code')} -c 'import sys; print(sys.path)'"
    lines = ["export PYTHONPATH=/of/modules:/more", start]
    said = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(said)[:3] == [str(tmp_path / "the code"), "/of/modules", "/more"]


@pytest.fixture
def no_home(tmp_path, monkeypatch) -> Iterator[None]:
    """A home folder in which no folder can be made, whoever runs the tests: it is a file."""
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("LORVP_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that it is as it was at the end
        monkeypatch.delenv(name)
    files._writable_folder.cache_clear()
    yield
    files._writable_folder.cache_clear()


def test_a_home_that_can_not_be_written_costs_the_cache_alone(no_home, digits, capsys):
    loaded = loop.load(digits())
    said = feature_cache.get(loaded.backbone, loaded.splits.train, "top", 50)
    assert len(said.pixels) == len(loaded.splits.train)
    files.give_libraries_caches()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the cache ~/.cache/lorvp can't be written (Not a directory): a temporary one")
    for name in ("HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"):
        assert Path(os.environ[name]).parent == files.cache_folder()


def test_caches_that_are_there_are_left_to_their_libraries(no_home, tmp_path, monkeypatch, capsys):
    """Read-only ones, too: they may hold the weights."""
    (tmp_path / "user" / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("TORCH_HOME", "/somewhere")
    files.give_libraries_caches()
    assert "HF_HOME" not in os.environ
    assert os.environ["TORCH_HOME"] == "/somewhere"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://nowhere", "nonsense", ""])
def test_a_backend_of_matplotlibs_that_is_not_there(backend):
    draw = "from sweeps.report import drawing as d, page; import os; print(len(d.png(d.one_plot(1, 1)[0])) > 99"
    script = f"{draw}, os.environ['MPLBACKEND'])"
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", *backend.split()], done.stderr
