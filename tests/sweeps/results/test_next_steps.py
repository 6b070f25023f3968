"""What a sweep says is to be done next: commands that its own spec takes."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.samples.confirmed import ran
from support.samples.predicted import predicted

from cluster.trial_folder import State, TrialFolder
from lorvp.utils.files import write_json
from lorvp.utils.yaml_file import format_value, parse_value
from sweeps.folder import RECORD, read_command
from sweeps.results.next_steps import MOST, next_steps
from sweeps.results.outcome import Outcome
from sweeps.spec import file as spec_file
from sweeps.spec.model import Axis, Spec

TEXT = """\
name: small
trial:
  backbone: {name: lorvp_tiny_32.cifar10}
  dataset: {name: digits}
  optimizer: {name: sgd}
  epochs: 2
space:
  prompt.lr: {log_uniform: [0.01, 1]}
  prompt.momentum: {uniform: [0, 0.8]}
search: {algorithm: tpe, trials: 4}
"""
MIDDLE = {"prompt.lr": 0.1, "prompt.momentum": 0.4}


class Made:
    """A sweep in a folder, started by a command, with the trials that a test puts there."""

    def __init__(self, folder: Path, text: str = TEXT, overrides: list[str] | None = None) -> None:
        self.file = folder / "sweep.yaml"
        self.file.write_text(text)
        self.overrides = [f"output={folder}", *(overrides or [])]
        self.spec: Spec = spec_file.load(self.file, self.overrides)
        self.spec.folder.mkdir(parents=True)
        command = {"file": str(self.file), "overrides": self.overrides}
        values = self.spec.model_dump(mode="json", by_alias=True)
        write_json(self.spec.folder / RECORD, {"id": "made", "spec": values, "command": command})

    def trial(self, val: float, state: State = State.FINISHED, **params: Any) -> TrialFolder:
        """One at these values, and in the middle of the other axes."""
        middle = {name: value for name, value in MIDDLE.items() if name in self.spec.space}
        config = self.spec.trial_config(middle | {name.replace("_", ".", 1): value for name, value in params.items()})
        return ran(self.spec, config, val, val, state)

    def steps(self) -> list[str]:
        return next_steps(Outcome.read(self.spec.folder))

    def follow(self, step: str) -> Spec:
        """The spec that the step's command gives, as a shell would read it."""
        words = shlex.split(step[step.index("python sweeps/launch.py") :])
        assert words[2] == str(self.file)
        overrides = [value for option, value in pairwise(words) if option == "--set"]
        return spec_file.load(self.file, overrides)


def only(steps: list[str], words: str) -> str:
    (found,) = [step for step in steps if words in step]
    return found


def test_a_search_without_a_confirmation_is_to_be_confirmed(tmp_path):
    made = Made(tmp_path, overrides=["search.trials=9"])
    made.trial(80)
    first = made.steps()[0]
    assert first.startswith("confirm it under 5 new seeds: python sweeps/launch.py")
    assert "--resume" in first
    found = made.follow(first)
    assert found.confirm is not None
    assert (found.folder, found.search.trials, len(found.seeds)) == (made.spec.folder, 9, 5)
    (tmp_path / "confirmed").mkdir()
    confirmed = Made(tmp_path / "confirmed", TEXT + "confirm: {top: 1}\n")
    confirmed.trial(80)
    assert not any("confirm it" in step for step in confirmed.steps())


@pytest.mark.parametrize(
    ("params", "end", "axis"),
    [
        ({"prompt_lr": 0.9}, "upper", Axis(log_uniform=(0.1, 10))),
        ({"prompt_lr": 0.011}, "lower", Axis(log_uniform=(0.001, 0.1))),
        ({"prompt_momentum": 0.02}, None, None),  # below 0 no momentum is valid
        ({"prompt_momentum": 0.79}, None, None),  # nor is one above 1, which the range would reach
        ({"prompt_lr": 0.7}, None, None),
        ({}, None, None),
    ],
)
def test_the_best_at_the_edge_of_a_range(tmp_path, params, end, axis):
    made = Made(tmp_path)
    made.trial(80, **params)
    steps = [step for step in made.steps() if "end of its values" in step]
    if end is None:
        assert steps == []
        return
    (step,) = steps
    ((name, value),) = params.items()
    assert step.startswith(f"{name.replace('_', '.', 1)} {value} is at the {end} end of its values: python")
    found = made.follow(step)
    assert found.space == made.spec.space | {name.replace("_", ".", 1): axis}
    assert found.name == "small-lr"
    assert "--resume" not in step


@pytest.mark.parametrize(
    ("axis", "best", "beyond"),
    [
        ("{choice: [1, 4, 16]}", 16, [4, 16, 32]),  # an image of 32 pixels has no larger rank
        ("{choice: [2, 4, 8]}", 8, [4, 8, 16]),
        ("{choice: [16, 4, 8]}", 4, [2, 4, 8]),
        ("{choice: [1, 4, 16]}", 1, None),  # no rank is below 1
        ("{choice: [8, 16, 32]}", 32, None),
        ("{choice: [1, 4]}", 4, None),
        ("{choice: [1, 4, 16]}", 4, None),
        ("{int: [2, 8, 2]}", 8, [6, 12, 2]),
        ("{int: [2, 30, 2]}", 30, [16, 32, 2]),
        ("{int: [2, 8]}", 2, None),
        ("{int: [10, 20]}", 10, [5, 15]),
    ],
)
def test_the_best_at_the_edge_of_a_list(tmp_path, axis, best, beyond):
    made = Made(tmp_path, TEXT.replace("space:\n", f"space:\n  prompt.rank: {axis}\n"))
    trial = made.trial(80, prompt_rank=best)
    (trial.newest().bundle).mkdir()
    description = {"format_version": 4, "config": trial.config.model_dump(mode="json"), "class_names": ["0"]}
    source = {"digest": "", "precision": "fp32", "image_size": 32}
    write_json(trial.newest().bundle / "config.json", description | {"source": source})
    steps = [step for step in made.steps() if "end of its values" in step]
    if beyond is None:
        assert steps == []
        return
    found = made.follow(only(steps, f"prompt.rank {best} is at the")).space["prompt.rank"]
    assert (found.choice or found.integers) == beyond
    assert all(isinstance(value, int) for value in beyond)


def test_one_of_several_ranges_is_moved(tmp_path):
    ranges = """\
  prompt.optimizer: {choice: [adam, sgd]}
  prompt.lr:
    - {log_uniform: [0.01, 0.1], when: {prompt.optimizer: adam}}
    - {log_uniform: [0.1, 10], when: {prompt.optimizer: sgd}}
"""
    text = re.sub(r"space:\n(  .*\n)+", f"space:\n{ranges}", TEXT)
    made = Made(tmp_path, text)
    made.trial(80, prompt_optimizer="sgd", prompt_lr=9.9)
    found = made.follow(only(made.steps(), "prompt.lr 9.9 is at the upper end")).space["prompt.lr"]
    adam, sgd = found.ranges
    assert (adam, sgd.log_uniform) == (made.spec.space["prompt.lr"].ranges[0], (1, 100))
    assert sgd.when == {"prompt.optimizer": ["sgd"]}


def test_a_half_without_a_trial_that_came_to_its_end(tmp_path):
    made = Made(tmp_path)
    for momentum, state in ((0.1, State.FINISHED), (0.2, State.FINISHED), (0.7, State.STOPPED), (0.75, State.FAILED)):
        made.trial(50 + 100 * momentum, state, prompt_momentum=momentum)
    steps = made.steps()
    step = only(steps, "no trial with prompt.momentum from 0.4 to 0.8 came to its end")
    assert only(steps, "no trial with prompt.lr from 0.01 to 0.1 came to its end")  # 0.1 is in the upper half
    found = made.follow(step)
    assert (found.search.trials, found.name) == (1, "small-momentum-untried")
    assert found.search.try_first == [{"prompt.lr": 0.1, "prompt.momentum": 0.6}]
    made.trial(60, prompt_momentum=0.5)
    made.trial(60, prompt_lr=0.02)
    assert not any("came to its end" in step for step in made.steps())


def test_values_of_a_choice_that_no_trial_came_to_its_end_with(tmp_path):
    text = TEXT.replace("space:\n", "space:\n  head.kind: {choice: [lp, fm, flm]}\n  head.lr: {uniform: [0.1, 1], ")
    text = text.replace("{uniform: [0.1, 1], ", "{uniform: [0.1, 1], when: {head.kind: [lp, fm]}}\n")
    made = Made(tmp_path, text.replace("search: {algorithm: tpe", "search: {algorithm: random"))
    for lr in (0.3, 0.123456):
        made.trial(100 * lr, head_kind="lp", head_lr=lr, prompt_lr=0.5)
    made.trial(90, State.STOPPED, head_kind="fm", head_lr=0.5)
    found = made.follow(only(made.steps(), "no trial with head.kind fm or flm came to its end"))
    assert found.search.trials == 2
    fm, flm = found.search.try_first
    assert fm == {"head.kind": "fm", "head.lr": 0.3, "prompt.lr": 0.5, "prompt.momentum": 0.4}
    assert flm == {key: value for key, value in fm.items() if key != "head.lr"} | {"head.kind": "flm"}


def test_a_grid_tries_what_failed_by_itself(tmp_path):
    text = re.sub(r"space:\n(  .*\n)+", "space:\n  prompt.rank: {choice: [1, 4, 16]}\n", TEXT)
    made = Made(tmp_path, text.replace("{algorithm: tpe, trials: 4}", "{algorithm: grid}"))
    made.trial(80, prompt_rank=4)
    made.trial(70, State.FAILED, prompt_rank=1)
    made.trial(70, prompt_rank=16)
    found = made.follow(only(made.steps(), "no trial with prompt.rank 1 came to its end"))
    assert (found.search.algorithm, found.search.try_first) == ("random", [{"prompt.rank": 1}])


def test_seeds_have_no_edge_and_no_half(tmp_path):
    made = Made(tmp_path, TEXT.replace("space:\n", "space:\n  init_seed: {choice: [0, 1, 2]}\n"))
    ran(made.spec, made.spec.trial_config(MIDDLE | {"init_seed": 2}), 80, 80)
    assert not any("init_seed" in step.partition(": python")[0] for step in made.steps())


def test_at_most_three_and_the_confirmation_first(tmp_path):
    made = Made(tmp_path, TEXT.replace("space:\n", "space:\n  head.lr: {log_uniform: [0.01, 1]}\n"))
    made.trial(80, prompt_lr=0.99, head_lr=0.99)
    steps = made.steps()
    assert [step.split(" ")[0] for step in steps] == ["confirm", "head.lr", "prompt.lr"]
    assert len(steps) == MOST


def test_where_there_is_no_gain_the_confirmation_comes_last(tmp_path):
    made = Made(tmp_path)
    best = made.trial(80, prompt_lr=0.99)
    made.trial(50, prompt_lr=0.02)
    made.trial(50, prompt_momentum=0.2)
    (config,) = made.spec.control_configs()
    control = ran(made.spec, config, 90, 90)
    for wrong, order in ((range(9), ["confirm", "prompt.lr"]), (range(50), ["prompt.lr", "confirm"])):
        predicted(best, val=list(wrong), test=list(wrong))
        predicted(control, val=[0], test=list(range(8)))
        assert [step.split(" ")[0] for step in made.steps()] == order


def test_what_the_specs_file_refuses_is_left_out(tmp_path):
    """Points to try first would lie outside of a range that has moved; a file that is gone is called SPEC."""
    made = Made(tmp_path, TEXT.replace("trials: 4", "trials: 4, try_first: [{prompt.lr: 0.02}]"))
    made.trial(80, prompt_lr=0.99)
    assert not any("end of its values" in step for step in made.steps())
    made.file.unlink()
    assert "python sweeps/launch.py SPEC --set output=" in only(made.steps(), "end of its values")


def test_a_sweep_of_an_earlier_version_has_no_command(tmp_path):
    made = Made(tmp_path)
    made.trial(80)
    record = made.spec.folder / RECORD
    values = json.loads(record.read_text())
    del values["command"]
    write_json(record, values)
    assert read_command(made.spec.folder) is None
    assert made.steps()[0].endswith("python sweeps/launch.py SPEC --resume --set confirm.added_later=true")


@pytest.mark.parametrize(
    "value",
    [
        {"choice": [4, 16, 64]},
        [{"log_uniform": [1e-05, 0.2], "when": {"head.kind": ["fm", "lp"]}}],
        *(1e-7, 1e30, 3, True, None, "no", "a: b", "...", "", {"a": "x" * 300}),
    ],
)
def test_values_in_a_line_are_read_back(value):
    text = format_value(value)
    assert parse_value(text) == value
    assert "\n" not in text
