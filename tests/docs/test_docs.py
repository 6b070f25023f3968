"""Everything that the documentation has a reader type is run by a test, and what it quotes is said by the code.

`WAYS` says how each command is run. A new line in the README, in `docs/` or at the head of a sweep needs one, too.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import photo
from support import warm
from support.doc_commands import PAGES, commands, is_python
from support.ports import reserve
from support.samples.archives import cifar_archive
from support.slurm import installed  # noqa: F401  a fixture
from support.slurm_sim import Simulation
from support.waiting import LIMIT, answers, wait_for

from cluster.snapshot import CHECKOUT, PACKAGES
from cluster.trial_folder import TrialFolder

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class By:
    """Another test runs it, or what it stands for; `file.py::function`."""

    test: str


@dataclass(frozen=True)
class Here:
    """`test_shortened` runs it, with words replaced by regular expressions and others added; it has to say `said`."""

    said: str
    more: str = ""
    words: tuple[tuple[str, str], ...] = ()
    edits: tuple[tuple[str, str], ...] = ()
    """Of the script that it runs: numbers that take minutes or gigabytes."""
    slurm: bool = False


class Options:
    """No command but its form: it must be a program's, and all its options, too."""


SESSION = By("test_docs.py::test_the_session_on_slurm")
SHORT = "--set search.trials=2 --set trial.epochs=2 --set early_stopping.rule=none --set trial.dataset.max_per_class=20"
SMALL = (
    ("--batch-size [0-9]+", ""),
    (r"resnet18|vit_small_patch16_224", "lorvp_tiny_vit_32"),
    ("vit_tiny_patch16_224", "lorvp_tiny_32"),
)
NAMED = ((r"runs/NAME( \.\.\.)?", "runs/quickstart"),)
LITTLE = (
    ("20_000, 256, 224, 10_000, 3", "64, 4, 32, 40, 1"),
    ("1_281_167", "1_000"),
    ("psutil.virtual_memory().free - (2 << 30)", "0"),
)
FEW_TRIALS = (
    ("SEEDS = (0, 1, 2)", "SEEDS = (0, 1)"),
    ('(1e-4, 1e-3, 1e-2, "80%", "90%", "best")', '(1e-2, "90%")'),
)
FEW_CELLS = (
    ("RATES = (0.01, 0.03, 0.1, 0.3, 1.0)", "RATES = (0.1, 1.0)"),
    ("RANKS = (1, 4, 8, 16)", "RANKS = (1, 4)"),
    ('"prompt.rank": 16', '"prompt.rank": 4'),
)
WAYS = {
    # the form of a command, and commands that are named in passing
    r"python sweeps/launch\.py SPEC.*|python -m sweeps\.simulate SPEC.*": Options(),
    r"python -m lorvp\.data prepare|python -m lorvp\.evaluate|python -m sweeps\.ood": Options(),
    r".*pytest .*-m alone": By("test_browser.py::test_500_trials_are_there_in_five_seconds"),
    r"(\.venv/bin/pytest|python -m pytest) .*": Here("passed", "tests/lorvp/mappings/test_mappings.py -k order -n 0"),
    r"make: .*|touch \S+": By("test_habits.py::test_contributing_names_targets_that_exist"),  # of `make install`
    "lint-imports": By("test_habits.py::test_a_commit_is_checked_by_the_tools_of_make_check"),
    "coverage report .*": By("test_coverage.py::test_lines_that_drivers_and_jobs_run_are_counted"),
    "mkdocs build .*": By("test_site.py::test_the_site_builds_without_a_warning"),
    # data; a few images stand in for the datasets
    r"python -m lorvp\.data prepare cifar\d+ .*": Here("32 px", "--partial", ((" --download", ""),)),
    r"python -m lorvp\.data prepare imagenet .*": Here(
        "3 classes", "--partial --size 32", (("/data/ILSVRC2012", "IMAGENET"),)
    ),
    r"python -m lorvp\.data prepare tiny-imagenet .*": By("test_sources.py::test_tiny_imagenet"),
    r"python -m lorvp\.data prepare image_folder .*IMAGENETTE.*": By("test_docs.py::place"),
    r"python -m lorvp\.data prepare (image_folder|csv_list) .*": By("test_adding.py::test_a_dataset"),
    r"python -m lorvp\.data list data": Here("GiB"),
    r"python -m lorvp\.data duplicates .*": By("test_duplicates.py::test_the_command_prints_the_line_alone"),
    # sweeps
    r"python sweeps/launch\.py sweeps/quickstart\.yaml( --resume)?": By("test_docs.py::place"),
    r"python sweeps/launch\.py .* --set cluster=mine\.yaml .*": By("test_adding.py::test_a_profile"),
    r"python sweeps/launch\.py .*(\.\.\. --\w+|on_slurm.*)": SESSION,
    r"python sweeps/launch\.py sweeps/quickstart\.yaml .*name=bias.*": Here(
        "confirmation: up to", "--dry-run --no-estimate"
    ),
    r"python sweeps/launch\.py sweeps/compare\.yaml .*imagenette.*": Here("GPU-hours", "--dry-run"),
    r"python sweeps/launch\.py sweeps/lorvp_imagenet\.yaml": By("test_sweep.py::test_imagenet_sweep_on_a_small_folder"),
    r"python sweeps/launch\.py sweeps/\w+\.yaml": By("test_spec.py::test_sweeps_that_come_with_the_project"),
    r"python -m sweeps\.simulate sweeps/quickstart\.yaml .*": Here("GPU-hours", "--set search.trials=20"),
    r"python -m sweeps\.schema": By("test_adding.py::test_editors_learn_the_new_names"),
    # what was found
    r"python -m lorvp\.predict .*": Here("probability", "", ((r"runs/\S+/bundle", "BUNDLE"),)),
    r"python -m sweeps\.report .*": Here("report.html", words=NAMED),
    r"python -m sweeps\.ood .*": Here("digits", words=NAMED),
    r"python -m sweeps\.tables .*": Here("| network |", words=NAMED),
    r"python -m lorvp\.export .*": By("test_export.py::test_the_command"),
    r"mlflow models serve .*": By("test_registry.py::test_a_served_model_takes_a_jpeg"),
    r"python -m lorvp\.evaluate .*": By("test_evaluate.py::test_evaluation_of_a_bundle"),
    r"mlflow ui.*": By("test_docs.py::test_mlflow_on_another_port"),
    # a session on SLURM
    r"export SLURM_CONF=.*|squeue|kill -9.*|python -c .*mlflow.*|python tests/support/slurm_sim\.py .*": SESSION,
    # benchmarks and what was made once
    r"python -m lorvp\.bench (step|pack|augment).*": By("test_speed.py::test_the_benchmarks_print_their_tables"),
    r"python -m lorvp\.bench memory .*": Here("predicted", "--batch-size 4", SMALL),
    r"python -m sweeps\.bench.*": Here("published: ", "--per-class 10 --epochs 1 --seeds 1", edits=FEW_CELLS),
    r"python tests/benchmarks/bench_store\.py": Here("opening a store of", edits=LITTLE),
    r"python tests/benchmarks/bench_trial\.py .*": Here(
        "| digits, tiny", "--images 80 --epochs 2 --row tiny --table warm", edits=FEW_TRIALS
    ),
    r"python tests/benchmarks/bench_gain\.py .*--table head": Options(),
    r"python tests/benchmarks/bench_gain\.py .*": Here(
        "| tiny | digits | published |",
        "--net tiny --set digits",
        ((" (DATA|WEIGHTS)", " data"), (" OUT", " out")),
        (('"tiny": 40', '"tiny": 1'), ('"tiny": 24', '"tiny": 1')),
    ),
    r"python -m sweeps\.simulate\.survival .*": By("test_simulate.py::test_which_early_stopping_keeps_the_best"),
    r"python tests/benchmarks/bench_probe\.py.*": Here("| old |", "--images 300 --features 8 --classes 3 --rounds 1"),
    r"python tests/benchmarks/bench_slurm\.py": Here(
        "first training step", "start", edits=(("= 7)", "= 1)"),), slurm=True
    ),
    r"python tests/benchmarks/bench_driver\.py": Here(
        "CPU a trial, 3 trivial trials", "cpu", edits=(("int = 200", "int = 3"),)
    ),
    r"python -m lorvp\.tiny .*": Here("test top-1", "--epochs 1", edits=((" // batch_size", " // 8"),)),
    r"python -m lorvp\.clip": By("test_clip.py::test_the_command_says_what_is_missing_or_writes_unit_vectors"),
}
"""By regular expression, the first that fits all of a command."""
PYTHON = """
import mlflow, numpy as np
mlflow.set_tracking_uri("sqlite:///runs/mlflow.db")
images = np.zeros((2, 20, 24, 3), np.uint8)
jpeg_bytes = open("photo.jpg", "rb").read()
"""
"""What a page's Python may count on."""


def recipe(command: str) -> str:
    """The last line of what make would do, as a user would type it; another command as it is."""
    if not command.startswith("make "):
        return command
    done = subprocess.run(
        [*shlex.split(command), "--dry-run", "--no-print-directory"],
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},  # this may be make's
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].removeprefix(".venv/bin/").strip()


COMMANDS = list(dict.fromkeys(recipe(command) for page in PAGES for command in commands(page)))


def way(command: str) -> By | Here | Options | None:
    if is_python(command):
        return By("test_docs.py::test_the_python_of_a_page")
    return next((each for pattern, each in WAYS.items() if re.fullmatch(pattern, command)), None)


def program(command: str) -> Path | None:
    """The file of a python command's module or script; None for other commands."""
    name = re.match(r"python (?:-m (\S+)|(\S+\.py))", command)
    if name is None or name[2]:
        return CHECKOUT / name[2] if name else None
    module = CHECKOUT / name[1].replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


def title(program: Path) -> str:
    """What a program is called: its module, or the package whose command it is."""
    return program.parent.name if program.stem == "__main__" else program.stem


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run(command):
    found = way(command)
    assert found, "no test runs it: see WAYS"
    if isinstance(found, By):
        file, _, function = found.test.partition("::")
        source = next(TESTS.rglob(file)).read_text()
        assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        read = [page for page in PAGES if page.name in source and command in map(recipe, commands(page))]
        assert read or program(command) is None or title(program(command)) in source


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if re.match("python (-m (lorvp|sweeps)|sweeps/)", command)]
)
def test_every_option_exists(command):
    assert program(command).exists()
    source = program(command).read_text()
    for option in re.findall(r"--([a-z-]+)", command):
        assert f'"--{option}"' in source or f"    {option.replace('-', '_')}: " in source


class Place:
    """A copy of the project, with what commands find beside it."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self.said: dict[str, str] = {}
        """What commands have said."""
        for part in (*PACKAGES, "tests", "docs"):
            shutil.copytree(CHECKOUT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(CHECKOUT / "pyproject.toml", folder)
        self.environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "160"}
        self.environment |= warm.for_jobs(self.environment)
        self.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # ten processes, as in conftest's Server
        for name in ("IMAGENET", "IMAGENETTE", "CIFAR10"):
            shutil.copytree(images, folder / name)
        shutil.copytree(images / "train", folder / "CIFAR10_FOLDER" / "train")
        shutil.copytree(images / "val", folder / "CIFAR10_FOLDER" / "test")
        for name in ("cifar10", "cifar100"):
            cifar_archive(folder / "data" / "raw", name)
        photo(folder / "photo.jpg")
        (folder / "mobilenetv2_100.safetensors").touch()

    def start(self, command: str) -> subprocess.Popen[str]:
        first, *rest = shlex.split(command)
        return subprocess.Popen(
            [sys.executable if first == "python" else first, *rest],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> str:
        first, *rest = shlex.split(command)
        if first == "python":
            done = warm.run(rest, self.folder, self.environment)
        else:
            options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True}
            done = subprocess.run([first, *rest], timeout=LIMIT, **options)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of images to train on and to test on, in ImageNet's layout."""
    folder = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("n01", "n02", "n03")):
            for i in range(count):
                photo(folder / split / name / f"{i}.JPEG", value=80 * label + i)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Place:
    """Where the quickstart, shortened, has been, and the photos of docs/comparison.md are prepared."""
    place = Place(tmp_path_factory.mktemp("place") / "project", images)
    for prepare in (command for command in COMMANDS if "--source IMAGENETTE" in command):
        assert "3 classes" in place.run(prepare)
    said = place.run(f"python sweeps/launch.py sweeps/quickstart.yaml {SHORT}")
    place.bundle = re.search(r"best prompt: (\S+)", said)[1]
    return place


SHORTENED = [
    pytest.param(command, found, marks=pytest.mark.slurm if found.slurm else ())
    for command in COMMANDS
    if isinstance(found := way(command), Here)
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "found"), SHORTENED)
def test_shortened(command, found, request, images, tmp_path):
    if found.slurm:
        request.getfixturevalue("installed")
    place = Place(tmp_path / "project", images) if found.edits else request.getfixturevalue("place")
    for old, new in found.edits:
        script = place.folder / program(command).relative_to(CHECKOUT)
        assert old in script.read_text()
        script.write_text(script.read_text().replace(old, new))
    for old, new in found.words:
        command = re.sub(old, place.bundle if new == "BUNDLE" else new, command)
    command = command.replace(".venv/bin/pytest", "python -m pytest")
    command = f"{command} {found.more}".strip()
    if command not in place.said:  # some pages have the same one but for a name
        place.said[command] = place.run(command)
    assert found.said in place.said[command]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(is_python, commands(page)))], ids=lambda page: page.stem
)
def test_the_python_of_a_page(page, place):
    """All of it as one program, from top to bottom; what it may count on is in PYTHON."""
    lines = [line for line in commands(page) if is_python(line)]
    program = "\n".join([PYTHON, *lines, "print('through')"])
    program = re.sub(r"runs/[^\"']*/bundle", place.bundle, program)
    assert "through" in place.run(shlex.join(["python", "-c", program]))


def has_begun(trials: Path) -> bool:
    return any(trial.newest() for trial in TrialFolder.requested(trials))


@pytest.mark.slow
@pytest.mark.slurm
def test_the_session_on_slurm(installed, tmp_path, images):  # noqa: F811
    """docs/cluster.md's, as it stands there but for a shorter sweep and where SLURM lies."""
    typed = commands(CHECKOUT / "docs" / "cluster.md")
    typed = typed[typed.index("make slurm-up") : typed.index("make slurm-down") + 1]
    place = Place(tmp_path / "project", images)
    slurm = Path(tempfile.mkdtemp(prefix="lorvp-slurm-"))
    slurm.chmod(0o755)  # munge trusts no folder that is closed to others, as pytest's are
    said = []
    try:
        for command in typed:
            command = recipe(command).replace("/tmp/lorvp-slurm", str(slurm))
            if command.startswith("export"):
                place.environment |= dict([command.removeprefix("export ").split("=", 1)])
            elif "name=on_slurm" in command:
                sweep = f"{command} {SHORT}"
                driver = place.start(sweep)
                trials = place.folder / "runs" / "on_slurm" / "trials"
                wait_for("a trial to begin", lambda: has_begun(trials) or driver.poll() is not None)  # noqa: B023
                assert driver.poll() is None, driver.communicate()[0]
            elif command == "kill -9 %1":
                driver.kill()
                driver.communicate()
            else:
                if " ... " in command:
                    command = sweep + command.partition(" ...")[2]
                said.append(place.run(command.replace("search_runs(...)", "search_runs(search_all_experiments=True)")))
        assert not slurm.exists()
    finally:
        Simulation(slurm).down()  # if a command failed
    everything = "\n".join(said)
    for words in (
        "export SLURM_CONF=",
        "lorvp-",
        "no driver runs; --resume starts one",
        "as a model:",
        "FINISHED",
    ):
        assert words in everything


@pytest.mark.slow
def test_mlflow_on_another_port(place):
    (command,) = (command for command in COMMANDS if command.startswith("mlflow ui --port"))
    port = reserve()
    process = place.start("python -m " + re.sub(r"--port \d+", f"--port {port} --workers 1", command))
    try:
        health = f"http://127.0.0.1:{port}/health"
        assert wait_for("MLflow's page", lambda: answers(health) or process.poll() is not None) == b"OK"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=LIMIT)


def literals() -> list[str]:
    """Every text in the code; where a value is put in, there is a zero byte."""
    found = []
    for package in PACKAGES:
        for path in (CHECKOUT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_quoted_messages_are_said_by_the_code():
    said = literals()
    text = (CHECKOUT / "docs" / "troubleshooting.md").read_text()
    quoted = [
        message for bold in re.findall(r"\*\*(.+?)\*\*", text, re.DOTALL) for message in re.findall(r"`([^`]+)`", bold)
    ]
    assert len(quoted) > 20
    for message in quoted:
        if message == "mlflow ui":  # which is another's
            continue
        fixed = ".*".join(re.escape(part) for part in " ".join(message.split()).split("..."))
        assert any(re.search(fixed, each, re.DOTALL) for each in said), f"nobody says {message!r}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
