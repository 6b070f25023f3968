"""Optuna behind Ray Tune: the space as a define-by-run function, an explicit sampler and seed for each algorithm."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from sweeps.search.start_points import start_points
from sweeps.search.tune_trial import SCORE, RecordedTrial
from sweeps.spec.choices import algorithm
from sweeps.spec.model import Scalar, Spec, Stage


class Suggestions:
    """The points of the space in the order in which they were suggested, a JSON line each.

    It is what a sweep is resumed from: they are suggested again, and the trials' folders answer for what was done.
    """

    def __init__(self, sweep: Path) -> None:
        self.path = sweep / "suggestions.jsonl"

    def read(self) -> list[dict[str, Scalar]]:
        """Read the suggested points; a torn last line is left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append(self, params: dict[str, Scalar]) -> None:
        """Write down the next point, after whatever a full disk or a killed driver has torn. Raises OSError."""
        with open(self.path, "ab+") as file:
            file.seek(0)
            complete = file.read().rfind(b"\n") + 1
            file.truncate(complete)
            file.write((json.dumps(params) + "\n").encode())


class ArmSeconds:
    """Seconds that the search's epochs have taken until now, by the arms of the spec; the control's are left out."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._controls = spec.control_names()
        self._seconds: defaultdict[Scalar, float] = defaultdict(float)
        self._counted: dict[str, int] = {}  # epochs of each open trial

    def note(self, trial: RecordedTrial) -> None:
        """Count what a trial has recorded since it was last noted."""
        config = trial.config
        if trial.name in self._controls or self._spec.stage(config) != Stage.SEARCH:
            return
        results = trial.results()
        new = results[self._counted.get(trial.name, 0) :]
        self._seconds[self._spec.arm(config)] += sum(result["seconds"] for result in new)
        self._counted[trial.name] = len(results)
        if trial.ended():
            del self._counted[trial.name]

    def __call__(self) -> Mapping[Scalar, float]:
        """Return the seconds by arm."""
        return self._seconds


class SpecSearch(Searcher):
    """OptunaSearch over the spec's space, by its algorithm; the points `again` are suggested first.

    With `search.equal` each value of that axis has one of its own, which learns from its own trials alone: what is
    good for one value says little of another, and those of a weak one would all count as bad. All begin with the same
    seed. They take turns; one that has had `search.seconds`, by what `spent` gives for its value, is passed over, and
    the search is through when all have.
    """

    def __init__(
        self,
        spec: Spec,
        points: Sequence[dict[str, Scalar]] = (),
        spent: Callable[[], Mapping[Scalar, float]] = dict,
    ) -> None:
        super().__init__(SCORE, spec.mode)
        self._spec = spec
        equal = spec.search.equal
        self._seconds, self._spent = spec.search.seconds, spent
        self._repeated = deque(point[equal] if equal else None for point in points)
        self._suggested: Counter[Scalar] = Counter()
        self._arm_of_trial: dict[str, OptunaSearch] = {}
        self._arms = {
            value: _optuna_search(arm, [point for point in points if not equal or point[equal] == value])
            for value, arm in spec.arms().items()
        }

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Tune's FINISHED is a text
        """Suggest the next point, of the arm with the fewest; FINISHED when every arm's time is used up."""
        if self._repeated:
            value = self._repeated.popleft()
        else:
            spent = self._spent() if self._seconds else {}
            open_values = [value for value in self._arms if spent.get(value, 0.0) < (self._seconds or math.inf)]
            if not open_values:
                return Searcher.FINISHED
            value = min(open_values, key=self._suggested.__getitem__)
        self._suggested[value] += 1
        self._arm_of_trial[trial_id] = self._arms[value]
        params = self._arms[value].suggest(trial_id)
        return params and {name: chosen for name, chosen in params.items() if name in self._spec.space}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a sampler learns from what a trial came to. Epochs are for a pruner, and Optuna has none here."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the arm's sampler the trial's final score."""
        arm = self._arm_of_trial.pop(trial_id)
        arm.on_trial_complete(trial_id, result, error)
        del arm._ot_trials[trial_id]  # the study has what it learns from; this is 2 KiB more
        arm._completed_trials.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is resumed from its own files."""


def _optuna_search(spec: Spec, points: list[dict[str, Scalar]]) -> OptunaSearch:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # a sampler that starts over would suggest its first points a second time
        sampler = algorithm(spec.search).make_sampler(spec, spec.search.seed + len(points))
    first = [*points, *start_points(spec)[len(points) :]]  # those that were suggested before were the first of them
    renamed = [_in_optunas_names(spec, point) for point in first]
    return OptunaSearch(partial(suggest, spec), SCORE, spec.mode, points_to_evaluate=renamed, sampler=sampler)


class RecordingSearch(SpecSearch):
    """Writes down what it suggests, before anything comes of it."""

    def __init__(self, spec: Spec, suggestions: Suggestions, spent: Callable[[], Mapping[Scalar, float]]) -> None:
        points = suggestions.read()
        self._suggestions = suggestions
        self._to_repeat = len(points)
        super().__init__(spec, points, spent)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Suggest the next point, and record it if it is new."""
        params = super().suggest(trial_id)
        if self._to_repeat:
            self._to_repeat -= 1
        elif isinstance(params, dict):
            self._suggestions.append(params)
        return params


def suggest(spec: Spec, trial: Trial) -> dict[str, Scalar]:
    """Return one point of the space, axes whose condition is not met left out."""
    params: dict[str, Scalar] = {}
    for name, axis in spec.ordered_axes().items():
        in_use = axis.at(params)
        if in_use is None:
            continue
        number, one = in_use
        parameter = optuna_name(name, number)
        if one.choice is not None:
            params[name] = trial.suggest_categorical(parameter, one.choice)
        elif one.integers is not None:
            low, high, *step = one.integers
            params[name] = trial.suggest_int(parameter, low, high, step=step[0] if step else 1)
        else:
            params[name] = trial.suggest_float(parameter, *one.bounds, log=one.log_uniform is not None)
    return params


def optuna_name(name: str, number: int) -> str:
    """Return what Optuna calls an axis: each range of its own name, as what is good in one says nothing of another."""
    return f"{name} [{number}]" if number else name


def _in_optunas_names(spec: Spec, point: dict[str, Scalar]) -> dict[str, Scalar]:
    """Return a point with the parameters' names that `suggest` gives them."""
    numbers = {name: in_use[0] for name, axis in spec.space.items() if (in_use := axis.at(point))}
    return {optuna_name(name, numbers.get(name, 0)): value for name, value in point.items()}
