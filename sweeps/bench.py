"""python -m sweeps.bench: what finding the gain of a prompt costs, by our recipe and by the published way.

The published way is the full grid, 5 learning rates x 4 ranks x 5 label mappings, each cell by the public code's loop
(`lorvp/bench/published.py`), which has one rate for prompt and head. Ours is a sweep over the same ranks and mappings,
with our recipe's rates, starts of the head, early stopping, cache and loop.

Both choose on val. The gain is the test top-1 of what is chosen, less that of the control, a linear probe fitted with
the C that is best on val. Ours is through when the trial that is best on val so far has `SHARE` of the grid's gain, or
`LEAST` points where the grid has no such gain.
Counted is the CPU time of the trials; in ours, that of the control, too. The starts of jobs, the search itself and the
reading of the test set are in neither.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import optuna
import torch
import typer
from torch.utils.data import DataLoader

from lorvp.bench import published
from lorvp.config import SpeedConfig, TrialConfig
from lorvp.features import cache as feature_cache
from lorvp.models.backbone import Backbone
from lorvp.result import EpochResult
from lorvp.training import loop
from lorvp.training.shared import SharedResources, load
from lorvp.utils import cli
from lorvp.utils.yaml_file import parse_value
from sweeps.search.controller import Failure, SweepController
from sweeps.search.stopping import make_scheduler
from sweeps.search.suggest import SpecSearch
from sweeps.spec.model import Spec

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
RANKS = (1, 4, 8, 16)
MAPPINGS = ("rlm", "flm", "ilm", "fm", "lp")
SHARE = 0.9
"""Of the grid's gain."""
LEAST = 1.0
"""Points over the control that ours has to reach where the grid has less."""
FIRST = {"head.kind": "lp", "prompt.rank": 16, "prompt.lr": 0.02, "head.lr": 0.02, "head.init": "random"}
"""What our recipe tries first."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


def make_spec(backbone: dict[str, Any], dataset: dict[str, Any], epochs: int, batch_size: int, seed: int) -> Spec:
    """Return our sweep over the grid's ranks and mappings."""
    learned = {"head.kind": ["fm", "lp"]}
    return Spec.model_validate(
        {
            "name": "bench",
            "trial": {
                "backbone": backbone,
                "dataset": dataset,
                "prompt": {"optimizer": "adam"},
                "epochs": epochs,
                "batch_size": batch_size,
                "precision": "fp32",
                "init_seed": seed,
                "order_seed": seed,
            },
            "space": {
                "head.kind": {"choice": list(MAPPINGS)},
                "prompt.rank": {"choice": list(RANKS)},
                "prompt.lr": {"recommended": True},
                "head.init": {"recommended": True, "when": learned},
                "head.fit": {"recommended": True},
                "head.lr": {"recommended": True, "when": learned},
            },
            "search": {
                "algorithm": "tpe",
                "trials": len(RATES) * len(RANKS) * len(MAPPINGS),
                "seed": seed,
                "concurrent": 1,
                "try_first": [FIRST],
            },
            "early_stopping": {"rule": "asha"},
        }
    )


@dataclass
class SearchCost:
    """What a search has found and what it took: top-1 in percent, and CPU-seconds by what they went to."""

    val: float = 0.0
    """The best so far."""
    test: float = 0.0
    """Of what is best on val."""
    seconds: Counter[str] = field(default_factory=Counter)

    def note(self, val: float, read_test: Callable[[], float]) -> None:
        """Take over what is better on val than all before."""
        if val > self.val:
            self.val, self.test = val, read_test()

    @property
    def total(self) -> float:
        """CPU-seconds of all parts."""
        return self.seconds.total()


class Clock:
    """Adds the CPU time of a block to one of the parts of a search."""

    def __init__(self, found: SearchCost, part: str) -> None:
        self.cost, self.part = found, part

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.cost.seconds[self.part] += time.process_time() - self.start  # type: ignore[assignment]  # not an int


def run_grid(spec: Spec, loaded: SharedResources, seed: int) -> SearchCost:
    """Train every cell of the grid by the published loop."""
    found = SearchCost()
    config = spec.trial_config(spec.example())
    plain = Backbone(config.backbone, "fp32", SpeedConfig(**dict.fromkeys(SpeedConfig.model_fields, False)))
    splits = loaded.splits
    train, val, test = (
        published.Photos(images.read(range(len(images))).permute(0, 2, 3, 1).numpy(), images.labels, plain.image_size)
        for images in (splits.train, splits.val, splits.test)
    )
    shuffled = DataLoader(train, config.batch_size, shuffle=True)
    in_order, held_out, unseen = (DataLoader(images, config.eval_batch_size) for images in (train, val, test))
    torch.manual_seed(seed)
    for number, (mapping, rank, rate) in enumerate(itertools.product(MAPPINGS, RANKS, RATES), start=1):
        trial = published.Trial(plain, len(splits.class_names), mapping, rank, rate, rate)
        for epoch in range(config.epochs):
            if mapping == "ilm" or (mapping == "flm" and epoch == 0):
                with Clock(found, "label mapping"):
                    trial.map_labels(in_order, prompted=mapping == "ilm")
            with Clock(found, "training"):
                trial.epoch(shuffled, 0.5 * (1 + math.cos(math.pi * epoch / config.epochs)))
            with Clock(found, "validation"):
                accuracy = trial.accuracy(held_out)
            found.note(accuracy, partial(trial.accuracy, unseen))
        progress(f"seed {seed}: cell {number} of the grid, best {found.val:.2f} %, {found.total:.0f} s")
    return found


def run_control(spec: Spec, loaded: SharedResources) -> SearchCost:
    """Fit the linear probe that a prompt is held against."""
    found = SearchCost()
    config = next(config for config in spec.control_configs() if config.head.kind == "lp")
    with Clock(found, "control"):
        (result,) = loop.train(config, shared=loaded)
    found.note(result.val_top1, lambda: result.test_top1 or 0.0)
    return found


class GoalReached(Exception):
    """A trial is as good as was asked for."""


@dataclass(eq=False)
class InterleavedTrial:
    """A trial that has its turn now and then."""

    config: TrialConfig
    name: str
    epochs: Iterator[EpochResult]
    recorded: list[dict[str, Any]] = field(default_factory=list)

    def results(self) -> list[dict[str, Any]]:
        """Return the epochs recorded so far."""
        return self.recorded

    def ended(self) -> None:
        """None: what the search gives up gets no further turn, and it is through with what had its last epoch."""


class InterleavedTrials:
    """Trains the trials that a search asks for in this process, an epoch of each in turns, until one reaches `goal`.

    That is by the test top-1, in percent, of the trial that is best on val of those that have ended.
    """

    def __init__(self, loaded: SharedResources, goal: float, cost: SearchCost) -> None:
        self.cost = cost
        self._loaded, self._goal = loaded, goal
        self._live: deque[InterleavedTrial] = deque()
        self._asked = 0

    def request(self, config: TrialConfig) -> InterleavedTrial:
        """Add a trial of `config` to those that take turns."""
        self._asked += 1
        self._live.append(InterleavedTrial(config, config.content_hash(), loop.train(config, shared=self._loaded)))
        return self._live[-1]

    def give_up(self, trial: InterleavedTrial) -> None:
        """Give the trial no further turn."""
        self._live.remove(trial)

    def wait(self) -> list[str]:
        """Train one epoch. Raises GoalReached when its trial has ended, and is as good as was asked for."""
        trial = self._live.popleft()
        with Clock(self.cost, "training and validation" if trial.recorded else "first epochs, with the cache"):
            result = next(trial.epochs)
        trial.recorded.append(asdict(result))
        best = self.cost
        if result.epoch < trial.config.epochs:
            self._live.append(trial)
        else:
            best.note(max(each["val_top1"] for each in trial.recorded), lambda: result.test_top1 or 0.0)
        progress(f"ours: trial {self._asked}, test {best.test:.2f} % of {self._goal:.2f} %, {best.total:.0f} s")
        if best.test >= self._goal:
            raise GoalReached
        return [trial.name]


def run_ours(spec: Spec, loaded: SharedResources, goal: float, cost: SearchCost) -> None:
    """Run the sweep until its best trial has reached `goal`, a test top-1 in percent; `cost` holds what it took."""
    trials, failure = InterleavedTrials(loaded, goal, cost), Failure()
    with suppress(GoalReached):
        SweepController(spec, SpecSearch(spec), make_scheduler(spec), trials, failure).run()
    if failure.error:
        raise failure.error


def progress(line: str) -> None:
    """Show a line of progress, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)


@app.command()
def main(
    photos: Annotated[
        Path | None,
        typer.Option(exists=True, help="a folder of train/CLASS/* and test/CLASS/*; default: scikit-learn's digits"),
    ] = None,
    backbone: Annotated[
        str, typer.Option(metavar="YAML", help="the spec's trial.backbone")
    ] = "{name: lorvp_tiny_32.cifar10}",
    per_class: Annotated[int, typer.Option(min=2, help="images of a class, to train on and to choose by")] = 60,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Prints the CPU-seconds of both, their ratio, and where the time went."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", module="optuna|ray")
    source = {"name": "image_folder", "root": photos} if photos else {"name": "digits"}
    dataset = source | {"max_per_class": per_class, "val_fraction": 0.3}
    options = parse_value(backbone)
    ratios: list[float] = []
    parts: dict[str, Counter[str]] = {"published": Counter(), "ours": Counter()}
    for seed in range(seeds):
        spec = make_spec(options, dataset, epochs, batch_size, seed)
        loaded = load(spec.trial_config(spec.example()))
        with feature_cache.temporary_cache():  # so that the cache is empty, and filling it is counted
            ours = run_control(spec, loaded)
            control = ours.test
            grid = run_grid(spec, loaded, seed)
            ours.val = ours.test = 0.0  # the control is no trial of the search
            goal = control + max(SHARE * (grid.test - control), LEAST)
            run_ours(spec, loaded, goal, ours)
        parts["published"] += grid.seconds
        parts["ours"] += ours.seconds
        console.print(
            f"seed {seed}: control {control:.2f} %; grid {grid.total:.0f} s, {grid.test:.2f} %; ours "
            f"{ours.total:.1f} s, {ours.test:.2f} %",
            highlight=False,
            end="; ",
        )
        if ours.test < goal:
            console.print(f"{goal:.2f} % NOT reached", highlight=False)
            continue
        ratios.append(grid.total / ours.total)
        has_gain = SHARE * (grid.test - control) >= LEAST
        least = "" if has_gain else f", to {LEAST:g} point over the control, as the grid has no such gain"
        console.print(f"ratio {ratios[-1]:.1f}{least}", highlight=False)
    if ratios:
        console.print(
            f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}), of {len(ratios)} seeds",
            highlight=False,
        )
    for name, seconds in parts.items():
        fractions = ", ".join(
            f"{part} {100 * part_seconds / seconds.total():.0f} %" for part, part_seconds in seconds.most_common()
        )
        console.print(f"{name}: {fractions}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
