"""The report of a sweep: one page, in seconds, or one line that says why there is none."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from support.samples import synthetic
from test_figures import Stated, folders, make_spec

import sweeps
from cluster.trial_folder import State, TrialFolder
from lorvp.utils import cli
from lorvp.utils.files import write_json
from sweeps import lock
from sweeps.folder import RECORD
from sweeps.report import __main__ as command
from sweeps.report import page as report
from sweeps.report.figures import SECTIONS
from sweeps.results.outcome import Outcome
from sweeps.spec import file as spec_file
from sweeps.spec.model import Spec


@pytest.fixture
def sweep(tmp_path: Path) -> Spec:
    """20 trials: 14 finished, 4 stopped, 2 failed."""
    spec = make_spec(tmp_path)
    synthetic.make(spec, 20, stopped=4, failed=2, curves=Stated())
    return spec


class Page(HTMLParser):
    """What a page says, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.said.append(data)
        if self.lasttag in ("td", "th") and data.strip():
            self.rows[-1].append(data)


@pytest.mark.slow
def test_one_page_without_links(sweep: Spec):
    nasty = next(trial for trial in folders(sweep) if trial.ended().state == State.FAILED)
    end = nasty.newest().path / "end.json"
    end.write_text(end.read_text().replace("as if", "<script src='http://a.b/c.js'>[/red]$x_"))
    path = report.write(Outcome.read(sweep.folder))
    assert path == sweep.folder / "report.html"
    page = Page(path.read_text())
    assert "script" not in page.tags
    assert "url(" not in path.read_text()
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    pictures = {each.stem: each.read_bytes() for each in (sweep.folder / "report").iterdir()}
    assert set(pictures) == set(SECTIONS) - {"confirmation", "prompts"}
    inlined = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    assert inlined == [pictures[name] for name in SECTIONS if name in set(pictures) - {"leaderboard", "failures"}]
    for name in pictures:
        with Image.open(sweep.folder / "report" / f"{name}.png") as picture:
            picture.load()
            assert picture.width > 300, name
    outcome = Outcome.read(sweep.folder)
    names = [entry.trial.name for entry in outcome.board.search_entries()]
    assert [row[1] for row in page.rows if len(row) > 3 and row[1] in names] == names
    said = " ".join(page.said)
    assert all(line in said for line in [*outcome.verdict(), *outcome.board.rung_correlation()])
    assert "22 trials: 16 finished, 4 stopped early, 2 failed" in said
    assert "<script src='http://a.b/c.js'>[/red]$x_" in said
    assert SECTIONS["confirmation"].otherwise in said
    stale = sweep.folder / "report" / "stale.png"
    stale.touch()
    report.write(outcome)
    assert not stale.exists()
    assert not list(sweep.folder.glob(".*"))


SHIPPED = sorted(path for path in Path(sweeps.__file__).parent.glob("*.yaml") if "\nspace:" in path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_report_of_every_sweep_that_comes_with_the_project(path: Path, tmp_path):
    spec = spec_file.load(path, [f"output={tmp_path}"])
    synthetic.make(spec, min(9, spec.number_of_trials()), stopped=2)
    page = Page(report.write(Outcome.read(spec.folder)).read_text())
    assert len(page.links) >= 3


@pytest.mark.slow
@pytest.mark.alone
def test_of_500_trials_in_seconds(tmp_path):
    spec = make_spec(tmp_path)
    synthetic.make(spec, 500, stopped=250, failed=20)
    outcome = Outcome.read(spec.folder)
    start = time.process_time()
    path = report.write(outcome)
    assert time.process_time() - start < 12
    assert path.stat().st_size < 3e6
    for picture in (spec.folder / "report").iterdir():
        assert max(Image.open(picture).size) < 2200, picture.name


@pytest.mark.slow
def test_the_driver_needs_no_torch_for_it(sweep: Spec):
    code = "import sys; from sweeps.report import __main__ as report; report.app([sys.argv[1]], standalone_mode=False)"
    code += "; sys.exit(', '.join({'torch', 'mlflow', 'ray', 'matplotlib.pyplot'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code, str(sweep.folder)], check=True)
    assert (sweep.folder / "report.html").exists()


def only_failures(spec: Spec) -> None:
    for trial in TrialFolder.requested(spec.trials):
        end = trial.newest().path / "end.json"
        end.write_text(json.dumps(json.loads(end.read_text()) | {"state": "failed", "cause": "diverged"}))


def of_another_version(spec: Spec) -> None:
    path = spec.folder / RECORD
    values = json.loads(path.read_text())
    values["spec"]["searcher"] = values["spec"].pop("search")
    write_json(path, values)


def of_the_earlier_form(spec: Spec) -> None:
    """Trials as they were written before prompt, adapter and head were parts."""
    for path in spec.trials.glob("*/config.json"):
        values = json.loads(path.read_text())
        values |= {"label_mapping": values.pop("head")["kind"]}
        path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (of_the_earlier_form, "its label_mapping is not this version's; read it with the one it is of"),
        (only_failures, "no trial finished (failed: "),
        (of_another_version, "another version of this project wrote it"),
        (lambda spec: (spec.folder / RECORD).unlink(), "no such sweep; "),
        (lambda spec: (spec.folder / RECORD).write_text("{"), "not a sweep's record"),
        (lambda spec: [path.unlink() for path in spec.trials.glob("*/config.json")], "no trial finished ("),
    ],
    ids=["earlier", "failures", "version", "nothing", "torn", "empty"],
)
def test_what_there_is_no_report_of(spoil, said, sweep: Spec, capsys, monkeypatch):
    spoil(sweep)
    refused(sweep.folder, said, capsys, monkeypatch)


def test_a_sweep_that_still_runs(sweep: Spec, capsys, monkeypatch):
    with lock.held(sweep.folder):
        said = f"still running, by process {os.getpid()} on {socket.gethostname()}"
        refused(sweep.folder, said, capsys, monkeypatch)


def test_a_folder_that_is_not_there(tmp_path, capsys, monkeypatch):
    refused(tmp_path / "none", "no such sweep; ", capsys, monkeypatch)


def refused(folder: Path, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line on stderr, exit code 2, and nothing written."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files()
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    with pytest.raises(SystemExit) as ended:
        cli.run(command.app)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith(f"error: {folder}")
    assert said in err
    assert files() == before
