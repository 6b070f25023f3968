"""The training loop: `train` adapts a frozen backbone and yields one result per epoch; trials may share its batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lorvp.config import TrialConfig
from lorvp.result import EpochResult
from lorvp.training.shared import SharedResources, load
from lorvp.training.trainer import Stopped, Trainer, evaluate


@dataclass(frozen=True)
class Finished:
    """A trial has ended its last epoch; its bundle is saved."""


@dataclass(frozen=True)
class Left:
    """A trial was stopped; its checkpoint holds where."""


@dataclass(frozen=True)
class Failed:
    """A trial can't go on."""

    error: Exception


Event = EpochResult | Finished | Left | Failed
"""What becomes of a trial: an epoch's result; or how it ends, after which nothing comes."""


def train(
    config: TrialConfig,
    folder: Path | None = None,
    resume_from: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    shared: SharedResources | None = None,
) -> Iterator[EpochResult]:
    """Train as `config` says, and yield each epoch's result, those of a checkpoint too; see `Trainer`.

    `shared` saves loading backbone and data again; the results are the same.

    Within a process group (`lorvp.utils.distributed`) its processes train the one trial together: each has its share
    of every batch and yields the results; the first is the one that has a `folder`, and whose `should_stop` counts.

    Raises UserError for input that can't work, and TrialFailed when the loss is no longer a number.
    """
    trainer = Trainer(config, shared or load(config), folder, resume_from, should_stop)
    yield from trainer.results
    waiting = [trainer]
    for _, event in train_together(lambda _: [waiting.pop()] if waiting else []):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, EpochResult):
            yield event


def train_together(join: Callable[[int], list[Trainer]]) -> Iterator[tuple[Trainer, Event]]:
    """Train trials on the same batches, one after the other on each, and yield what becomes of them.

    They have the same `SharedResources` and batch sizes. `join` is asked before every epoch, with how many are being
    trained, for those that shall join them; when there are none left this ends. The results of a trial are those that
    it has by itself on the same orders of the data (`EpochResult.order`): nothing goes from one to another, and one
    that fails leaves the others alone.
    """
    trainers: list[Trainer] = []
    while True:
        for trainer in join(len(trainers)):
            trainers.append(trainer)
            if trainer.in_epoch or trainer.done:  # it left within an epoch, or after the last
                yield from _train_epoch([trainer], trainer.epoch.shuffle_epoch, trainers)
        if not trainers:
            return
        pack = [trainer for trainer in trainers if not trainer.stage.reads_features]
        alone = [[trainer] for trainer in trainers if trainer.stage.reads_features]
        for group in [pack, *alone] if pack else alone:
            yield from _train_epoch(group, max(trainer.next_shuffle_epoch for trainer in group), trainers)


def _train_epoch(
    group: list[Trainer], shuffle_epoch: int | None, trainers: list[Trainer]
) -> Iterator[tuple[Trainer, Event]]:
    """Train one epoch of trials that share their batches; those that end are taken out of `trainers`."""
    pack = _Pack(list(group))
    pack.each_done()
    pack.each(lambda trainer: trainer.start_epoch(shuffle_epoch))
    packed = len(pack.running)
    for batch in pack.batches():
        pack.each(lambda trainer: trainer.train_step(*batch))  # noqa: B023  called at once
    for trainer in pack.running:
        trainer.end_training()
    pack.each(lambda trainer: trainer.refit_head())
    metrics = evaluate(pack.running, "val")

    def end_epoch(trainer: Trainer) -> None:
        if trainer not in metrics:
            raise Stopped
        pack.events.append((trainer, trainer.end_epoch(metrics[trainer], packed)))

    pack.each(end_epoch)
    pack.each_done()
    for trainer, event in pack.events:
        if not isinstance(event, EpochResult):
            trainers.remove(trainer)
    yield from pack.events


@dataclass
class _Pack:
    """Trials that share an epoch's batches, and what has become of them in it."""

    running: list[Trainer]
    events: list[tuple[Trainer, Event]] = field(default_factory=list)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield the batches of what is trained, for as long as anything is."""
        if self.running and self.running[0].stage.optimizers:
            for batch in self.running[0].batches():
                yield batch
                if not self.running:
                    return

    def each(self, work: Callable[[Trainer], object]) -> None:
        """Do `work` on each trial; one that stops or fails is out, after a stop with a checkpoint and a bundle."""
        for trainer in list(self.running):
            try:
                try:
                    work(trainer)
                except Stopped:
                    if trainer.unsaved:
                        trainer.save()
                    self._end(trainer, Left())
            except Exception as error:
                self._out(trainer, Failed(error))

    def each_done(self) -> None:
        """End each trial that has no epoch left."""
        for trainer in list(self.running):
            if trainer.done:
                self._end(trainer, Finished())

    def _end(self, trainer: Trainer, event: Event) -> None:
        """Save the best epoch's bundle: of a trial that was stopped, too, the best so far."""
        try:
            trainer.save_bundle()
        except Exception as error:
            event = Failed(error)
        self._out(trainer, event)

    def _out(self, trainer: Trainer, event: Event) -> None:
        self.running.remove(trainer)
        self.events.append((trainer, event))


def best_pack(config: TrialConfig, shared: SharedResources, steps: int = 20, most: int = 16) -> int:
    """Return how many trials like this one to train together, found by `steps` steps of 1, 2, 4 ... of them.

    Twice as many pay if they get a tenth more done in the same time.
    """

    def seconds(count: int) -> float:
        pack = [Trainer(config, shared) for _ in range(count)]
        for trainer in pack:
            trainer.start_epoch(shuffle_epoch=1)
        batch = next(pack[0].batches())
        for step in range(steps + 2):
            if step == 2:  # the first are slower
                start = _now(pack[0].device)
            for trainer in pack:
                trainer.train_step(*batch)
        return _now(pack[0].device) - start

    pack, once = 1, seconds(1)
    while pack < most:
        twice = seconds(2 * pack)
        if twice * 1.1 > 2 * once:
            break
        pack, once = 2 * pack, twice
    return pack


def _now(device: torch.device) -> float:
    """Return seconds, once all is done that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
