"""What is said of near-duplicates in val before a sweep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lorvp.errors import UserError
from sweeps import launch
from sweeps.plan import duplicates
from sweeps.spec import file

SPEC = """
name: signs
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: image_folder, root: signs, val_fraction: 0.25}
space:
  prompt.rank: {choice: [1, 4]}
search: {algorithm: grid}
"""
SAID = "near-duplicates of training images"
GROUPS = ["--set", "trial.dataset.groups={pattern: '(.+)_'}"]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep over twelve tracks of each of two signs; a track's five frames are the same."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "signs" / name).mkdir(parents=True)
        for track in range(12):
            image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32))
            for frame in range(5):
                image.save(tmp_path / "signs" / name / f"{track:03}_{frame}.png")
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path / "spec.yaml"


@pytest.mark.slow
def test_it_is_said_in_the_plan_and_before_the_sweep(spec, monkeypatch):
    plan = CliRunner().invoke(launch.app, [str(spec), "--dry-run", "--no-estimate"])
    assert plan.exit_code == 0
    assert SAID in plan.output
    assert not Path("runs").exists()

    def refuse(*_: object) -> None:
        raise UserError("as far as here")

    monkeypatch.setattr(launch, "sweep_folder", refuse)
    begun = CliRunner().invoke(launch.app, [str(spec)])
    assert SAID in begun.output
    assert "as far as here" in begun.stderr
    assert SAID not in CliRunner().invoke(launch.app, [str(spec), "--resume"]).output  # it was said


def test_nothing_is_said_where_there_are_none(spec):
    assert duplicates.duplicates_line(file.load(spec, GROUPS[1:])) is None
    assert duplicates.duplicates_line(file.load(spec, ["trial.dataset={name: digits}"])) is None
    assert duplicates.duplicates_line(file.load(spec, ["trial.dataset.root=missing"])) is None


@pytest.mark.slow
def test_what_keeps_it_from_being_told_is_a_line(spec, monkeypatch):
    Path("signs/a/000_0.png").write_bytes(b"no image")
    (line,) = duplicates.duplicates_line(file.load(spec, [])).splitlines()
    assert line.startswith("near-duplicates in val: can't be looked for: ")
    assert "000_0.png" in line
    monkeypatch.setattr(duplicates, "PATIENCE", 0.0)
    (line,) = duplicates.duplicates_line(file.load(spec, [])).splitlines()
    assert line == "near-duplicates in val: not looked for any longer after 0 s"
    wrong = CliRunner().invoke(launch.app, [str(spec), "--dry-run", "--set", "trial.dataset.groups={pattern: '('}"])
    assert "trial.dataset.groups.pattern: '(' is no regular expression" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--dry-run", "--no-estimate"]])
def test_groups_that_no_trial_could_split_by_are_refused(spec, more):
    refused = CliRunner().invoke(launch.app, [str(spec), *more, "--set", "trial.dataset.groups={pattern: scene}"])
    assert isinstance(refused.exception, SystemExit | UserError)
    assert "trial.dataset.groups.pattern: scene matches no image" in f"{refused.stderr}{refused.exception}"
    assert not Path("runs").exists()
