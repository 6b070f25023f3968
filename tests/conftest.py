from __future__ import annotations

import copy
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from support import debian, warm
from support.ports import reserve
from support.waiting import LIMIT, answers, wait_for

if TYPE_CHECKING:  # xdist's first process loads this file, and runs no test
    from lorvp.config import TrialConfig
    from lorvp.data.store import Store

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


# A suite that nohup or a script's `&` starts has them ignored, and so would have the drivers that it starts.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take the cores from the tests beside them

LONGEST = (
    *("test_slurm_faults.py", "test_docs.py", "test_speed.py", "test_sweep.py", "test_slurm.py"),
    *("test_sweep_faults.py", "test_spec_fuzz.py", "test_slurm_drivers.py", "test_browser.py", "test_driver.py"),
    *("test_methods.py", "test_pipeline.py", "test_training.py", "test_packed.py", "test_backbone.py"),
    *("test_export.py", "test_job_manager.py", "test_store.py", "test_adding.py", "test_report.py", "test_registry.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that none of them is left when the others are through."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--by-file", action="store_true", help="at the end, say how long each file's tests took")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--by-file"):
        return
    seconds: Counter[str] = Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            seconds[report.location[0]] += report.duration
    terminalreporter.section("seconds by file")
    for name, took in seconds.most_common():
        terminalreporter.line(f"{took:7.1f}  {name}")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LORVP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _same_each_time() -> None:
    """One thread adds up in one order, and images that a test draws are the same on each day."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    """What a failed test has started does not disturb the next ones; what several tests share was there before."""
    before = set(psutil.Process().children())
    yield
    warm.end_all()
    for process in set(psutil.Process().children()) - before:
        if process.pid in warm.started:
            continue
        with suppress(psutil.NoSuchProcess):
            for each in [*process.children(recursive=True), process]:
                each.kill()


def digits_values(**changes: Any) -> dict[str, Any]:
    """A trial of a second or two: the quickstart's backbone on 200 digits.

    The keys of a part in `changes` are put into the part, and what then has no effect is left out, as in a sweep.
    """
    values: dict[str, Any] = {
        "backbone": {"name": "lorvp_tiny_32.cifar10"},
        "dataset": {"name": "digits", "max_per_class": 20, "val_fraction": 0.2},
        "prompt": {"rank": 2, "optimizer": "adam", "lr": 0.05},
        "optimizer": {"lr": 0.1},
        "epochs": 3,
        "batch_size": 32,
        "precision": "fp32",
    }
    return effective(values, changes)


def effective(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, those of a part put into the part, and without what then has no effect."""
    from pydantic import ValidationError

    from sweeps.spec.model import leave_out_idle

    parts = {part: values.get(part, {}) | changes[part] for part in ("prompt", "adapter", "head") if part in changes}
    values = copy.deepcopy(values | changes | parts)
    with suppress(ValidationError):  # what is wrong with them is for the test to see
        leave_out_idle(values)
    return values


@pytest.fixture
def digits():
    """Makes a config of `digits_values`."""

    from lorvp.config import TrialConfig

    def make(**changes: Any) -> TrialConfig:
        return TrialConfig.model_validate(digits_values(**changes))

    return make


def make(dataset: str, source: Path, out: Path, **options: Any) -> Store:
    """A store of a part of a dataset."""
    from lorvp.data import prepare, store

    return store.Store.open(prepare.prepare(dataset, source, out, partial=True, **options))


def count_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward of a backbone has, from now on."""
    from lorvp.models.backbone import Backbone

    seen: list[int] = []
    forward = Backbone.forward

    def counted(self: Backbone, images: Any, *rest: object) -> Any:
        seen.append(len(images))
        return forward(self, images, *rest)

    monkeypatch.setattr(Backbone, "forward", counted)
    return seen


def photo(path: Path, size: int = 64, value: int = 100) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 50, 200)).save(path)


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """A folder in ImageNet's layout: three classes, 8 images each to train on and 4 to test on."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("n01", "n02", "n03")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{i}.JPEG", "JPEG")
    return tmp_path / "images"


@pytest.fixture
def imagenette(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Real photos of ten ImageNet classes and MobileNetV2's weights, where this workplace has them."""
    archive, weights = SHARED / "imagenette.zip", SHARED / "weights" / "mobilenetv2_100.safetensors"
    if not (archive.exists() and weights.exists()):
        pytest.skip(f"no real photos: {SHARED} has no imagenette.zip and mobilenetv2_100.safetensors")
    import zipfile

    folder = tmp_path_factory.mktemp("imagenette")
    with zipfile.ZipFile(archive) as photos:
        photos.extractall(folder)
    return folder, weights


class Server:
    """A real MLflow server on loopback, that can go away and come back."""

    def __init__(self, folder: Path, store: str = "") -> None:
        self.folder = folder
        self.store = store or f"sqlite:///{folder}/mlflow.db"
        self.port = reserve()
        self.uri = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # its ten processes for jobs, which nothing here gives it, would take longer to start than the server itself
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.wait()

    def wait(self) -> None:
        """Until it answers."""
        said = (self.folder / "log").read_text
        wait_for("MLflow's server", lambda: answers(f"{self.uri}/health") or self.process.poll() is not None, said=said)
        assert self.process.poll() is None, said()

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        os.killpg(self.process.pid, signum)
        self.process.wait(LIMIT)


@pytest.fixture
def server(tmp_path_factory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def postgres() -> Iterator[str]:
    """The address of an empty database, by a PostgreSQL of this test's own, on loopback."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    debian.need([str(programs[-1]) if programs else "initdb"], ["postgresql"])
    tools = max(Path("/usr/lib/postgresql").glob("*/bin"))
    user = None if os.geteuid() else "postgres"  # it does not run as root
    folder = Path(tempfile.mkdtemp(prefix="lorvp-postgres-"))  # pytest's own are closed to others
    if user:
        shutil.chown(folder, user)
    data, port = folder / "data", reserve()
    create = [tools / "initdb", "--no-sync", "--auth=trust", "--username=lorvp", data]
    subprocess.run(create, cwd=folder, user=user, check=True, capture_output=True)
    command = [tools / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, user=user, stdout=log, stderr=log)
    ready = [tools / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
    try:
        said = (folder / "log").read_text
        wait_for(
            "PostgreSQL", lambda: not subprocess.call(ready, stdout=DEVNULL) or process.poll() is not None, said=said
        )
        assert process.poll() is None, said()
        yield f"postgresql+psycopg2://lorvp@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # ends its connections
        process.wait(LIMIT)
        shutil.rmtree(folder)
