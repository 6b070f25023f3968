"""The loop: `train(config)` adapts a frozen backbone and yields one result per epoch; trials may share its batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from lorvp.config import TrialConfig
from lorvp.result import EpochResult
from lorvp.training.trainer import Figures, Loaded, Stopped, Training, evaluate, load

Said = EpochResult | Exception | None
"""Of a trial: an epoch's result; or its last word, what failed, or None when it is through or has left."""


def train(
    config: TrialConfig,
    folder: Path | None = None,
    resume_from: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    loaded: Loaded | None = None,
) -> Iterator[EpochResult]:
    """Trains as `config` says and yields each epoch's result, those of a checkpoint too; see `Training`.

    `loaded` saves loading backbone and data again; the results are the same.

    Within a process group (`lorvp.utils.distributed`) its processes train the one trial together: each has its share
    of every batch and yields the results; the first is the one that has a `folder`, and whose `should_stop` counts.

    Raises UserError for input that can't work, and TrialFailed when the loss is no longer a number.
    """
    training = Training(config, loaded or load(config), folder, resume_from, should_stop)
    yield from training.results
    waiting = [training]
    for _, said in train_together(lambda _: [waiting.pop()] if waiting else []):
        if isinstance(said, Exception):
            raise said
        if said is not None:
            yield said


def train_together(join: Callable[[int], list[Training]]) -> Iterator[tuple[Training, Said]]:
    """Trains trials on the same batches, one after the other on each; they have the same `Loaded` and batch sizes.

    `join` is asked before every epoch, with how many are being trained, for those that shall join them; when there are
    none left this ends. The results of a trial are those that it has by itself on the same orders of the data
    (`EpochResult.order`): nothing goes from one to another, and one that fails leaves the others alone.
    """
    members: list[Training] = []
    while True:
        for new in join(len(members)):
            members.append(new)
            if new.order is not None or new.through:  # it left within an epoch, or after the last
                yield from _epoch([new], new.order, members)
        if not members:
            return
        pack = [training for training in members if not training.cached]
        for group in [pack, *([training] for training in members if training.cached)]:
            if group:
                yield from _epoch(group, max(each.next_order for each in group), members)


def _epoch(group: list[Training], order: int | None, members: list[Training]) -> list[tuple[Training, Said]]:
    """One epoch of trials that share their batches, and what it gave; those that end are taken out of `members`."""
    said: list[tuple[Training, Said]] = []
    running = list(group)

    def end(training: Training, last_word: Exception | None) -> None:
        if last_word is None:
            try:
                training.close()
            except Exception as error:
                last_word = error
        running.remove(training)
        members.remove(training)
        said.append((training, last_word))

    def attempt(training: Training, work: Callable[[], None]) -> None:
        try:
            try:
                work()
            except Stopped:
                if training.unsaved:
                    training.save()
                raise
        except Stopped:
            end(training, None)
        except Exception as error:
            end(training, error)

    def finish(training: Training, val: Figures | None) -> None:
        if val is None:
            raise Stopped
        said.append((training, training.finish(val, packed)))

    for training in group:
        if training.through:
            end(training, None)
        else:
            attempt(training, partial(training.begin, order))
    packed = len(running)
    if running and running[0].optimizers:
        for images, labels, whole in running[0].batches():
            for training in list(running):
                attempt(training, partial(training.step, images, labels, whole))
            if not running:
                break
    for training in running:
        training.trained_for = training.before = time.perf_counter() - training.training_start
    found = evaluate(running, "val") if running else {}
    for training in list(running):
        attempt(training, partial(finish, training, found.get(training)))
        if training in running and training.through:
            end(training, None)
    return said


def best_pack(config: TrialConfig, loaded: Loaded, steps: int = 20, most: int = 16) -> int:
    """How many trials like this one to train together, found by `steps` steps of 1, 2, 4 ... of them.

    Twice as many pay if they get a tenth more done in the same time.
    """

    def seconds(count: int) -> float:
        pack = [Training(config, loaded) for _ in range(count)]
        for training in pack:
            training.begin(order=1)
        images, labels, whole = next(pack[0].batches())
        for step in range(steps + 2):
            if step == 2:  # the first are slower
                start = _now(pack[0].device)
            for training in pack:
                training.step(images, labels, whole)
        return _now(pack[0].device) - start

    pack, alone = 1, seconds(1)
    while pack < most:
        twice = seconds(2 * pack)
        if twice * 1.1 > 2 * alone:
            break
        pack, alone = 2 * pack, twice
    return pack


def _now(device: torch.device) -> float:
    """Seconds, once all is done that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
