"""python -m sweeps.bench: what finding the best config costs, by our defaults and by the published way.

The published way is the full grid, 5 learning rates of the prompt x 4 ranks x 5 label mappings, each cell by the public
code's loop (`lorvp/bench/published.py`). Ours is a sweep of as many trials over the same ranks, mappings and rates:
fitted heads, TPE, ASHA, one cache, our loop. Counted is the CPU time of the trials, until one of ours has the val
accuracy of the grid's best within 0.2 points; the starts of jobs and the search itself are in neither.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
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
from sweeps.search.controller import Failure, SweepController
from sweeps.search.stopping import make_scheduler
from sweeps.search.suggest import SpecSearch
from sweeps.spec.model import Spec

RATES = (0.02, 0.1, 0.3, 1.0, 3.0)
RANKS = (1, 4, 8, 16)
MAPPINGS = ("rlm", "flm", "ilm", "fm", "lp")
HEAD_RATE = 0.1
TOLERANCE = 0.2
"""Points of val accuracy."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = cli.make_console()


def make_spec(dataset: dict[str, Any], epochs: int, batch_size: int, seed: int) -> Spec:
    """Return our sweep over the grid's space."""
    return Spec.model_validate(
        {
            "name": "bench",
            "trial": {
                "backbone": {"name": "lorvp_tiny_32.cifar10"},
                "dataset": dataset,
                "prompt": {"optimizer": "adam"},
                "head": {"init": "fitted", "lr": HEAD_RATE},
                "epochs": epochs,
                "batch_size": batch_size,
                "precision": "fp32",
                "init_seed": seed,
                "order_seed": seed,
            },
            "space": {
                "head.kind": {"choice": list(MAPPINGS)},
                "prompt.rank": {"choice": list(RANKS)},
                "prompt.lr": {"log_uniform": [0.002, 0.3]},
            },
            "search": {"algorithm": "tpe", "trials": len(RATES) * len(RANKS) * len(MAPPINGS), "seed": seed},
            "early_stopping": {"rule": "asha"},
        }
    )


@dataclass
class SearchCost:
    """How far a search had come: CPU-seconds and the best val accuracy at each improvement, and where the time went."""

    curve: list[tuple[float, float]] = field(default_factory=list)
    seconds: Counter[str] = field(default_factory=Counter)

    def note(self, val_top1: float) -> None:
        """Record the accuracy (percent) if it is the best so far."""
        if not self.curve or val_top1 > self.curve[-1][1]:
            self.curve.append((self.total, val_top1))

    @property
    def total(self) -> float:
        """CPU-seconds of all parts."""
        return self.seconds.total()

    @property
    def best(self) -> float:
        """The best val accuracy so far, in percent."""
        return self.curve[-1][1] if self.curve else 0.0


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
    train, val = (
        published.Photos(images.read(range(len(images))).permute(0, 2, 3, 1).numpy(), images.labels, plain.image_size)
        for images in (loaded.splits.train, loaded.splits.val)
    )
    shuffled = DataLoader(train, config.batch_size, shuffle=True)
    in_order, held_out = DataLoader(train, config.eval_batch_size), DataLoader(val, config.eval_batch_size)
    torch.manual_seed(seed)
    for number, (mapping, rank, rate) in enumerate(itertools.product(MAPPINGS, RANKS, RATES), start=1):
        trial = published.Trial(plain, len(loaded.splits.class_names), mapping, rank, rate, HEAD_RATE)
        for epoch in range(config.epochs):
            if mapping == "ilm" or (mapping == "flm" and epoch == 0):
                with Clock(found, "label mapping"):
                    trial.map_labels(in_order, prompted=mapping == "ilm")
            with Clock(found, "training"):
                trial.epoch(shuffled, 0.5 * (1 + math.cos(math.pi * epoch / config.epochs)))
            with Clock(found, "validation"):
                found.note(trial.accuracy(held_out))
        progress(f"seed {seed}: cell {number} of the grid, best {found.best:.2f} %, {found.total:.0f} s")
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
    """Trains the trials that a search asks for in this process, an epoch of each in turns, until one reaches `goal`."""

    def __init__(self, loaded: SharedResources, goal: float) -> None:
        self.cost = SearchCost()
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
        """Train one epoch. Raises Reached when that is as good as was asked for."""
        trial = self._live.popleft()
        with Clock(self.cost, "training and validation" if trial.recorded else "first epochs, with the cache"):
            result = next(trial.epochs)
        trial.recorded.append(asdict(result))
        if result.epoch < trial.config.epochs:
            self._live.append(trial)
        best = self.cost
        best.note(result.val_top1)
        progress(f"ours: trial {self._asked}, best {best.best:.2f} % of {self._goal:.2f} %, {best.total:.0f} s")
        if best.best >= self._goal:
            raise GoalReached
        return [trial.name]


def run_ours(spec: Spec, loaded: SharedResources, goal: float) -> SearchCost:
    """Run the sweep, `search.concurrent` trials in turns, until one has reached `goal` (percent)."""
    trials, failure = InterleavedTrials(loaded, goal), Failure()
    with suppress(GoalReached):
        SweepController(spec, SpecSearch(spec), make_scheduler(spec), trials, failure).run()
    if failure.error:
        raise failure.error
    return trials.cost


def progress(line: str) -> None:
    """Show a line of progress, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)


@app.command()
def main(
    photos: Annotated[
        Path | None, typer.Option(exists=True, help="a folder of train/CLASS/*; default: scikit-learn's digits")
    ] = None,
    per_class: Annotated[int, typer.Option(min=2, help="images of a class, to train on and to choose by")] = 80,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Prints CPU-seconds of both, their ratio, and where the time went."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", module="optuna|ray")
    source = {"name": "image_folder", "root": photos} if photos else {"name": "digits"}
    dataset = source | {"max_per_class": per_class, "val_fraction": 0.2}
    ratios: list[float] = []
    parts: dict[str, Counter[str]] = {"published": Counter(), "ours": Counter()}
    for seed in range(seeds):
        spec = make_spec(dataset, epochs, batch_size, seed)
        loaded = load(spec.trial_config(spec.example()))
        with feature_cache.temporary_cache():  # so that the cache is empty, and filling it is counted
            grid_cost = run_grid(spec, loaded, seed)
            goal = grid_cost.best - TOLERANCE
            our_cost = run_ours(spec, loaded, goal)
        ratios.append(grid_cost.total / our_cost.total)
        parts["published"] += grid_cost.seconds
        parts["ours"] += our_cost.seconds
        reached = "" if our_cost.best >= goal else ", NOT reached"
        console.print(
            f"seed {seed}: grid {grid_cost.total:.0f} s, best {grid_cost.best:.2f} %; ours {our_cost.total:.1f} s to "
            f"{our_cost.best:.2f} %{reached}; ratio {ratios[-1]:.1f}",
            highlight=False,
        )
    console.print(f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})", highlight=False)
    for name, seconds in parts.items():
        fractions = ", ".join(
            f"{part} {100 * part_seconds / seconds.total():.0f} %" for part, part_seconds in seconds.most_common()
        )
        console.print(f"{name}: {fractions}", highlight=False)


if __name__ == "__main__":
    cli.run(app)
