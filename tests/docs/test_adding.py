"""docs/adding.md does what it says: each part of it, copied into a copy of the project, is found and works."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import digits_values
from ruamel.yaml import YAML
from support import warm
from support.waiting import wait_for

from cluster.snapshot import CHECKOUT, PACKAGES
from cluster.trial_folder import State, TrialFolder

pytestmark = pytest.mark.slow
PAGE = CHECKOUT / "docs" / "adding.md"
BLOCKS, CHANNELS = 4, 96
"""Of the vision transformer that the adapter is tried on."""
RATES = "{prompt.lr: {log_uniform: [0.001, 1]}}"
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))

TRAIN = """
import json
from pathlib import Path
from lorvp.bundle.format import describe
from lorvp.training.loop import train
from sweeps.spec import file as spec_file

spec = spec_file.load(Path("sweep.yaml"))
Path("out").mkdir()
points = [spec.example({"prompt.lr": value}) for value in (0.01, 0.1)]
(result,) = train(spec.trial_config(points[0]), Path("out"))
names = describe(Path("out/bundle"))["class_names"]
hashes = {spec.trial_config(point).content_hash() for point in points}
print(json.dumps({"parameters": result.parameters, "class_names": names, "configs": len(hashes)}))
"""
RELAY = """
from pathlib import Path
from cluster import profile
from cluster.base import make_cluster
from cluster.job_manager import JobManager
from sweeps.spec import file as spec_file

spec = spec_file.load(Path("sweep.yaml"))
manager = JobManager(spec.trials, make_cluster(profile.load(spec.cluster), spec.folder, "", concurrent=1))
trial = manager.scan.request(spec.trial_config(spec.example()))
manager.poll()
print(trial.path.absolute())
"""
SUBMIT = """
from pathlib import Path
from sweeps import launch
from sweeps.spec import file as spec_file

spec = spec_file.load(Path("sweep.yaml"))
manager = launch.make_job_manager(spec, "")
Path("mine.py").write_text("raise RuntimeError")
trial = manager.scan.request(spec.trial_config(spec.example()))
manager.poll()
print(trial.path.absolute())
"""
CONFIG = """
import sys
from pathlib import Path
from lorvp.errors import UserError
from sweeps.spec import file as spec_file

try:
    spec = spec_file.load(Path("sweep.yaml"), sys.argv[1:])
    print(spec.trial_config(spec.example()).canonical_json())
except UserError as error:
    print("refused:", error)
"""
HOW_NICE = """
import os
with open({!r}, "a") as said:
    print(os.nice(0), file=said)
"""


class Copy:
    """The project in another folder, with parts of the page put in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for package in PACKAGES:
            shutil.copytree(CHECKOUT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "docs").mkdir()
        self.spec: dict[str, Any] = {
            "name": "added",
            "trial": digits_values(epochs=1, optimizer={}, head={"lr": 0.1}),
            "space": {"prompt.lr": {"choice": [0.01, 0.1]}},
            "search": {"trials": 2},
        }

    def put_in(self, part: str) -> None:
        """The files, the changes and what asks for them in a spec."""
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
            named = re.match(r"# (\S+\.\w+)\n", block)
            if kind == "diff":
                for path, lines in re.findall(r"^--- (\S+)\n((?:[ +-](?!-- ).*\n)+)", block, re.MULTILINE):
                    self.change(self.folder / path, lines.splitlines(keepends=True))
            elif named:
                (self.folder / named[1]).parent.mkdir(exist_ok=True)
                (self.folder / named[1]).write_text(block)
            else:
                for key, value in YAML(typ="safe").load(block).items():
                    self.spec[key] = self.spec[key] | value if key == "trial" else value
        YAML().dump(json.loads(json.dumps(self.spec)), self.folder / "sweep.yaml")

    def change(self, path: Path, lines: list[str]) -> None:
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert path.read_text().count(before) == 1, f"{path} has not this once:\n{before}"
        path.write_text(path.read_text().replace(before, after))

    def python(self, *arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "COLUMNS": "160"}
        done = warm.run(arguments, self.folder, environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def trained(self) -> dict[str, Any]:
        return json.loads(self.python("-c", TRAIN).splitlines()[-1])

    def config(self, *overrides: str) -> dict[str, Any]:
        """The config of a trial of the spec with these overrides."""
        said = self.python("-c", CONFIG, *overrides)
        assert not said.startswith("refused: "), said
        return json.loads(said)

    def refusal(self, *overrides: str) -> str:
        """The error about the spec with these overrides."""
        said = self.python("-c", CONFIG, *overrides)
        assert said.startswith("refused: ")
        return said


def commands(part: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^    (python .+)$", part, re.MULTILINE)]


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_counts_what_it_touches(part):
    count = r"^\*New files: (\d+)(?:, and (\d+) of .+?)?\. Lines .+?: (\d+)\b.*\.\*$"
    said = re.search(count, PARTS[part], re.MULTILINE)
    files = re.findall(r"^```\w+\n# (\S+\.\w+)\n", PARTS[part], re.MULTILINE)
    diffs = re.findall(r"^```diff\n(.*?)^```", PARTS[part], re.MULTILINE | re.DOTALL)
    own = [file for file in files if "/" not in file]
    lines = sum(len(re.findall(r"^\+.", diff, re.MULTILINE)) for diff in diffs)
    assert tuple(int(number or 0) for number in said.groups()) == (len(files) - len(own), len(own), lines)


@pytest.mark.parametrize(
    ("part", "parameters"),
    [
        ("A prompt", {"prompt": 3 * 32}),
        ("A label mapping", {"prompt": 6 * 32 * 2}),
        ("An adapter", {"prompt": 6 * 32 * 2, "adapter": BLOCKS * CHANNELS}),
    ],
)
def test_what_a_trial_can_be(copy, part, parameters):
    copy.put_in(PARTS[part])
    said = copy.trained()
    assert said["parameters"] | parameters == said["parameters"]
    assert ("head" in said["parameters"]) == (part != "A label mapping")
    assert said["configs"] == 2  # the prompt's learning rate tells two trials apart


def test_a_prompt_has_options_and_conditions_of_its_own(copy):
    copy.put_in(PARTS["A prompt"])
    without = "trial.prompt={kind: stripes, init: normal}"
    assert copy.config(without)["prompt"].items() >= {"kind": "stripes", "init": "normal", "init_std": 0.01}.items()
    assert "init_std" not in copy.config("trial.prompt={kind: stripes}")["prompt"]
    assert "only normal values have a deviation" in copy.refusal("trial.prompt.init=zero")
    assert "sweep.yaml:" in copy.refusal("trial.prompt.init=zero", "trial.prompt.init_std=0.1")
    assert "it belongs to kind border, not stripes" in copy.refusal("trial.prompt.pad=1")
    assert copy.config("trial.method=stripes") == copy.config()
    with_tokens = copy.config("trial.method=stripes+vpt", "trial.backbone.name=lorvp_tiny_vit_32.cifar10")
    assert (with_tokens["prompt"]["kind"], with_tokens["adapter"]["kind"]) == ("stripes", "vpt")


def test_an_adapter_is_a_preset_and_says_what_it_goes_with(copy):
    copy.put_in(PARTS["An adapter"])
    alone = copy.config("trial.method=gain", "trial.prompt={}", "space={adapter.lr: {choice: [0.01, 0.1]}}")
    assert (alone["prompt"], alone["adapter"]["kind"]) == ({"kind": "none"}, "gain")
    assert copy.config("trial.method=null", "trial.adapter.kind=gain") == copy.config()
    message = "gain needs a vision transformer (vit_*, deit_*), not lorvp_tiny_32.cifar10"
    assert message in copy.refusal("trial.backbone.name=lorvp_tiny_32.cifar10")
    assert "head.kind must be lp or fm, not flm" in copy.refusal("trial.head.kind=flm")


def test_a_dataset(copy, image_root):
    copy.spec["trial"]["backbone"]["image_size"] = 224  # what stores have by default
    copy.put_in(PARTS["A dataset"])
    shutil.copytree(image_root, copy.folder / "BIRDS")
    shutil.copytree(image_root, copy.folder / "LISTED")
    with open(copy.folder / "LISTED" / "labels.csv", "w", newline="") as file:
        write = csv.writer(file)
        write.writerow(["split", "file", "class"])
        for path in sorted(image_root.glob("*/*/*.JPEG")):
            split = "train" if path.parts[-3] == "train" else "test"
            write.writerow([split, path.relative_to(image_root), f"bird {path.parts[-2]}"])
    said = [copy.python(*command) for command in commands(PARTS["A dataset"])]
    assert [text.count("24 train, 12 test, 3 classes") for text in said] == [1, 1]
    assert copy.trained()["class_names"] == ["bird n01", "bird n02", "bird n03"]


def test_a_backbone(copy):
    copy.put_in(PARTS["A backbone"])
    said = copy.trained()
    assert said["parameters"] == {"prompt": 6 * 32 * 2, "head": 48 * 10 + 10}
    # a job runs it as it was when the sweep was started
    trial = TrialFolder(Path(copy.python("-c", SUBMIT).splitlines()[-1]))
    assert wait_for("the trial's end", trial.ended).state == State.FINISHED
    assert (copy.folder / "mine.py").read_text() == "raise RuntimeError"


def test_a_search_algorithm(copy):
    copy.put_in(PARTS["A search algorithm"])
    said = copy.python("-m", "sweeps.simulate", "sweep.yaml", "--gpus", "2")
    assert "sobol, early stopping none" in said
    assert re.search(r"trials: +9 with the control: 9 finished", said)
    assert "sobol can't take" in copy.refusal("space={prompt.rank: {choice: [1, 2]}}")


def test_a_stopping_rule(copy):
    copy.put_in(PARTS["A stopping rule"])
    more = ("--set", "search={algorithm: random, trials: 20}", "--set", "trial.epochs=10", "--epoch-seconds", "1")
    said = copy.python("-m", "sweeps.simulate", "sweep.yaml", "--gpus", "2", "--set", f"space={RATES}", *more)
    assert "early stopping late_median" in said
    finished, stopped = re.search(r"(\d+) finished, (\d+) stopped early", said).groups()
    assert int(finished) + int(stopped) == 21
    assert int(stopped) > 0


def test_a_profile(copy):
    copy.put_in(PARTS["A profile"])
    (command,) = commands(PARTS["A profile"])
    said = copy.python(*command)
    assert "fits the 48 GB of profile mine.yaml" in said
    assert "#SBATCH --gres=gpu:rtx8000:1" in said
    assert "module load cuda" in said


def test_a_place_to_run(copy):
    copy.put_in(PARTS["A place to run"])
    said = copy.folder / "said"
    with open(copy.folder / "cluster" / "__init__.py", "a") as code:  # which a job imports, too
        code.write(HOW_NICE.format(str(said)))
    trial = TrialFolder(Path(copy.python("-c", RELAY).strip()))
    assert wait_for("the trial's end", trial.ended).state == State.FINISHED
    assert said.read_text().split() == [str(os.nice(0)), "19"]


def test_editors_learn_the_new_names(copy):
    for part in PARTS.values():
        copy.put_in(part)
    copy.python("-m", "sweeps.schema")
    page = (copy.folder / "docs" / "spec.md").read_text()
    for row in (
        r"^\| `method` \| .*`gain`.*`stripes`|^\| `method` \| .*`stripes`.*`gain`",
        r"^\| `prompt.kind` \| `stripes` \|",
        r"^\| `prompt.init_std` \| number above 0 \| 0.01 \| deviation of normal initial values \|",
        r"^\| `adapter.kind` \| `gain` \|",
        r"^\| `adapter.start` \| number above 0 \| `1.0` \| initial gain \|",
        r"^\| `head.kind` \| `identity` \|",
        r"^\| `search.algorithm` \| .*`sobol`",
        r"^\| `early_stopping.rule` \| .*`late_median`",
        r"^\| `kind` \| .*`polite`",
    ):
        assert re.search(row, page, re.MULTILINE), row
