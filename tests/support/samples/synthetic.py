"""Sweeps that nobody trained: folders as jobs leave them, with learning curves of a stated family."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from itertools import cycle

import numpy as np
from pydantic import ValidationError

from cluster.trial_folder import Cause, State, TrialFolder
from lorvp.config import TrialConfig
from lorvp.result import EpochResult
from lorvp.utils.files import write_json
from sweeps.folder import RECORD
from sweeps.results import confirm
from sweeps.simulate.curves import AssumedCurves, Curve, Curves
from sweeps.spec.model import Axis, Scalar, Spec, active

EPOCH_SECONDS = 2.0
FIRST_EPOCH = 1.7e9
"""Unix time."""


def make(spec: Spec, trials: int, stopped: int = 0, failed: int = 0, curves: Curves | None = None) -> list[TrialFolder]:
    """The folder of a sweep that has ended: the controls, then `trials` of the search, one after the other, of which so
    many were stopped early and so many failed, each cause in turn; then the confirmation, if the spec asks for one.

    The search's trials lie at random points, the same for the same spec. Returns them, those that finished first.
    """
    curves = curves or AssumedCurves(spec, EPOCH_SECONDS, seed=0)
    spec.folder.mkdir(parents=True)
    write_json(spec.folder / RECORD, {"id": "synthetic", "spec": spec.model_dump(mode="json", by_alias=True)})
    clock = _Clock()
    for config in spec.control_configs():
        _train(spec, config, curves.curve(config, control=True), clock)
    causes, made = cycle(Cause), []
    for i, config in enumerate(_points(spec, trials)):
        state = (
            State.FINISHED if i < trials - stopped - failed else State.STOPPED if i < trials - failed else State.FAILED
        )
        cause = next(causes) if state == State.FAILED else None
        made.append(_train(spec, config, curves.curve(config, control=False), clock, state, cause))
    if spec.confirm:
        for choice in confirm.choose(spec):
            for seed in choice.seeds:
                config = spec.confirmed(TrialFolder(spec.trials / choice.trial).config, seed)
                _train(spec, config, curves.curve(config, choice.control), clock)
    return made


class _Clock:
    """Unix time, which goes on by the seconds that it is told of."""

    def __init__(self) -> None:
        self.now = FIRST_EPOCH

    def after(self, seconds: float) -> float:
        self.now += seconds
        return self.now


def _points(spec: Spec, count: int) -> list[TrialConfig]:
    """So many different configs of the space."""
    random = np.random.default_rng(0)
    found: dict[str, TrialConfig] = {}
    for _ in range(100 * count):
        point: dict[str, Scalar] = {}
        for name, axis in spec.ordered_axes().items():
            if active(axis, point):
                point[name] = _drawn(axis, random)
        with suppress(ValidationError):  # values that don't go together
            config = spec.trial_config(point)
            found.setdefault(config.content_hash(), config)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"the space of {spec.name} has hardly {count} different trials, only {len(found)} were found")


def _drawn(axis: Axis, random: np.random.Generator) -> Scalar:
    if values := axis.values():
        return values[random.integers(len(values))]
    if axis.log_uniform:
        return float(np.exp(random.uniform(*np.log(axis.bounds))))
    return float(random.uniform(*axis.bounds))


def _train(
    spec: Spec,
    config: TrialConfig,
    curve: Curve,
    clock: _Clock,
    state: State = State.FINISHED,
    cause: Cause | None = None,
) -> TrialFolder:
    """One trial's folder; one that didn't finish has half of its epochs. Equal configs are one trial."""
    trial = TrialFolder.request(spec.trials, config)
    if trial.ended():
        return trial
    attempt = trial.claim()
    epochs = config.epochs if state == State.FINISHED else config.epochs // 2
    rungs = sum(rung.epochs for rung in config.rungs)
    for epoch, (value, seconds) in enumerate(list(zip(curve.values, curve.seconds, strict=True))[:epochs], start=1):
        tested = config.read_test and (epoch == config.epochs or config.select != "val")
        result = _result(config, epoch, value, spec.objective, tested)
        attempt.append(asdict(result) | {"seconds": seconds, "time": clock.after(seconds), "whole": epoch > rungs})
    attempt.end(state, f"as if: {cause}" if cause else "", cause)
    return trial


def _result(config: TrialConfig, epoch: int, value: float, objective: str, tested: bool) -> EpochResult:
    """Of an epoch whose objective has this value; the other figures follow from it, the test set's are a point less."""
    top1 = 100 * float(np.exp(-value)) if objective == "val_loss" else value
    loss = -float(np.log(top1 / 100))
    test = (loss, max(top1 - 1, 0.0), top1) if tested else (None, None, None)
    return EpochResult(
        epoch=epoch,
        train_loss=loss,
        val_loss=loss,
        val_top1=top1,
        val_top5=top1,
        lr={"prompt": 0.1, "head": 0.1},
        images_per_second=1000.0,
        peak_memory_mib=100.0,
        seconds=0.0,
        time=0.0,
        parameters={"prompt": 1000, "head": 100},
        optimizer_state_mib=0.1,
        order=epoch,
        test_loss=test[0],
        test_top1=test[1],
        test_top5=test[2],
    )
