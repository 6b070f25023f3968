"""The folder of a sweep whose best configs were confirmed, as its jobs leave it."""

from __future__ import annotations

from pathlib import Path

from conftest import digits_values

from cluster.trial_folder import State, TrialFolder
from lorvp.config import TrialConfig
from sweeps.results import confirm
from sweeps.spec.model import Spec

SEEDS = [7, 8, 9]


def make_confirmed(folder: Path, **changes: object) -> Spec:
    """A sweep whose control may be fitted (fm), or trained (lp)."""
    values = {
        "name": "confirmed",
        "trial": digits_values(),
        "space": {
            "prompt.kind": {"choice": ["low_rank", "border"]},
            "head.kind": {"choice": ["lp", "fm"]},
            "prompt.rank": {"int": [1, 8], "when": {"prompt.kind": "low_rank"}},
        },
        "search": {"algorithm": "tpe", "trials": 6, "equal": "prompt.kind"},
        "confirm": {"seeds": SEEDS},
        "control": {"method": "linear_probe", "optimizer.lr": [0.1, 0.2]},
        "output": folder,
    }
    return Spec.model_validate(values | changes)


def ran(spec: Spec, config: TrialConfig, val: float, test: float | None = None, state: State = State.FINISHED, **more):
    """A trial of two epochs of 1.5 s, the first of them worse."""
    trial = TrialFolder.request(spec.trials, config)
    attempt = trial.claim()
    values = {"whole": True, "parameters": {"prompt": 30, "adapter": 4, "head": 5}, "optimizer_state_mib": 0.5}
    values |= {"seconds": 1.5, "peak_memory_mib": 100.0, "lr": {}, "time": 0.0, "test_loss": None, "test_top5": None}
    values |= more
    attempt.append(values | {"epoch": 1, "val_top1": val - 1, "test_top1": None})
    attempt.append(values | {"epoch": 2, "val_top1": val, "test_top1": test})
    attempt.end(state)
    return trial


def searched(spec: Spec, **by_point: float) -> None:
    """The trials of a search: of two values, and the controls, of which the trained one with lr 0.2 is best."""
    for rank, val in ((1, 60), (2, 80), (3, 70)):
        ran(spec, spec.trial_config({"prompt.kind": "low_rank", "prompt.rank": rank}), val)
    ran(spec, spec.trial_config({"prompt.kind": "low_rank", "prompt.rank": 4}), 99, state=State.STOPPED)
    ran(spec, spec.trial_config({"prompt.kind": "border"}), 40)
    ran(spec, spec.trial_config({"prompt.kind": "border", "head.kind": "fm"}), 50)
    for config, val in zip(spec.control_configs(), (70, 71, 72, 77), strict=True):
        ran(spec, config, val)


def confirmed(spec: Spec, choice: confirm.Choice, vals: list[float], tests: list[float], **more: object) -> None:
    config = TrialFolder(spec.trials / choice.trial).config
    for seed, val, test in zip(SEEDS, vals, tests, strict=True):
        trial = ran(spec, spec.confirmed(config, seed), val, test, **more)
        assert trial.name == choice.seeds[seed]
