"""Trials that are trained in one process on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import digits_values
from support.samples.training import MEASURED

from lorvp.data.loader import epoch_order
from lorvp.errors import TrialFailed
from lorvp.result import EpochResult
from lorvp.training import loop
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import Finished, Left, train, train_together
from lorvp.training.trainer import Trainer

DIVERGES = {"prompt": {"lr": 1e30, "optimizer": "sgd"}, "optimizer": {"lr": 1e30}}


def figures(results: list[EpochResult]) -> list[dict]:
    return [{key: value for key, value in asdict(r).items() if key not in MEASURED | {"packed"}} for r in results]


def together(members: list[Trainer], join=lambda count: []) -> dict[Trainer, list]:
    """The events of each trial, of those that joined too."""
    waiting, events = list(members), {}
    for member, event in train_together(lambda count: [waiting.pop(0) for _ in list(waiting)] or join(count)):
        events.setdefault(member, []).append(event)
    return events


@pytest.mark.slow
def test_packed_is_what_each_is_by_itself(digits):
    """To the bit: one after another on the same batch; ranks, mappings and optimizers as they come."""
    configs = [
        digits(head={"kind": "lp"}, prompt={"rank": 1}),
        digits(head={"kind": "fm"}, prompt={"rank": 8}),
        digits(head={"kind": "ilm"}, prompt={"optimizer": "sgd", "lr": 0.3}),
        digits(head={"kind": "ilm", "counting": "streamed"}, init_seed=3),
        digits(head={"kind": "lp", "init": "fitted"}, prompt={"kind": "border"}),
        digits(method="acavp"),
        digits(method="linear_probe"),
    ]
    loaded = loop.load(configs[0])
    events = together([Trainer(config, loaded) for config in configs])
    for member, of_member in events.items():
        *results, last = of_member
        assert last == Finished()
        assert figures(results) == figures(list(train(member.config)))
    assert [r.packed for r in next(iter(events.values()))[:-1]] == [6] * 3


def test_one_that_diverges_leaves_the_others_bits_alone(digits):
    good, bad = digits(), digits(**DIVERGES)
    loaded = loop.load(good)
    first, second = Trainer(good, loaded), Trainer(bad, loaded)
    events = together([first, second])
    assert isinstance(events[second][-1].error, TrialFailed)
    assert figures(events[first][:-1]) == figures(list(train(good)))


@pytest.mark.parametrize(
    "where",
    [
        "train_step",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("start_epoch", "end_epoch", "save_bundle")),
    ],
)
def test_one_that_breaks_leaves_the_others_alone(digits, monkeypatch, where):
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    loaded = loop.load(digits())
    stays, breaks = Trainer(digits(), loaded), Trainer(digits(head={"kind": "fm"}), loaded)
    monkeypatch.setattr(breaks, where, full)
    events = together([breaks, stays])
    assert isinstance(events[breaks][-1].error, OSError)
    assert figures(events[stays][:-1]) == figures(list(train(stays.config)))


@pytest.mark.slow
def test_one_leaves_another_joins_at_the_next_epoch(digits, tmp_path):
    loaded = loop.load(digits())
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 8

    stays = Trainer(digits(epochs=4), loaded)
    leaves = Trainer(digits(head={"kind": "fm"}), loaded, tmp_path, should_stop=stop)
    joins = Trainer(digits(head={"kind": "ilm"}, epochs=2), loaded)
    waiting = [joins]
    events = together([stays, leaves], lambda count: [waiting.pop()] if count == 1 and waiting else [])
    assert [r.order for r in events[stays][:-1]] == [1, 2, 3, 4]
    assert figures(events[stays][:-1]) == figures(list(train(stays.config)))
    assert [r.packed for r in events[stays][:-1]] == [2, 2, 2, 2]  # at the epoch's beginning
    assert [type(event) for event in events[leaves]] == [EpochResult, Left]  # within the second epoch
    assert [r.order for r in events[joins][:-1]] == [3, 4]
    continued = list(train(leaves.config, resume_from=tmp_path / CHECKPOINT))
    assert figures(continued) == figures(list(train(leaves.config)))


def test_a_joiner_is_what_it_is_by_itself_on_the_same_orders(digits, monkeypatch):
    config = digits(epochs=2)
    loaded = loop.load(config)
    joins = Trainer(config, loaded)
    waiting = [joins]
    events = together([Trainer(digits(epochs=3), loaded)], lambda count: [waiting.pop()] if waiting and count else [])
    orders = [r.order for r in events[joins][:-1]]
    monkeypatch.setattr("lorvp.data.loader.epoch_order", lambda n, seed, epoch: epoch_order(n, seed, orders[epoch - 1]))
    by_itself = list(train(config))
    assert [r.train_loss for r in events[joins][:-1]] == [r.train_loss for r in by_itself]
    assert [r.val_loss for r in events[joins][:-1]] == [r.val_loss for r in by_itself]


@pytest.mark.slow
def test_one_that_left_within_an_epoch_finishes_it_before_it_joins(digits, tmp_path):
    config = digits(head={"kind": "ilm"})
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    assert not list(train(config, folder=tmp_path, should_stop=stop))
    loaded = loop.load(config)
    other = Trainer(digits(), loaded)
    back = Trainer(config, loaded, resume_from=tmp_path / CHECKPOINT)
    events = together([other, back])
    assert figures(events[back][:-1]) == figures(list(train(config)))
    assert [r.packed for r in events[back][:-1]] == [1, 2, 2]
    assert [r.order for r in events[other][:-1]] == [2, 3, 4]


PEAK = f"""
import re, sys
import torch
from lorvp.training import loop
from lorvp.config import TrialConfig

def resident(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)  # several would wait for each other where they have to share a core
backbone = {{"name": "resnet18", "pretrained": False, "image_size": 64}}
dataset = {{"name": "digits", "max_per_class": 2, "val_fraction": 0.2}}
values = {digits_values(epochs=1, batch_size=32, speed={"keep_memory": False}, read_test=False)!r}
values |= {{"backbone": backbone, "dataset": dataset}}
configs = [TrialConfig.model_validate(values | {{"init_seed": seed}}) for seed in range(int(sys.argv[1]))]
loaded = loop.load(configs[0])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = resident("VmRSS")
waiting = [loop.Trainer(config, loaded) for config in configs]
for _ in loop.train_together(lambda count: [waiting.pop() for _ in list(waiting)]):
    pass
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_32_trials_take_less_than_twice_the_memory_of_one():
    def peak(trials: int) -> float:
        # what is freed goes back at once: else the holes that glibc leaves are measured
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", PEAK, str(trials)]
        return float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)

    assert peak(32) < 2 * peak(1)
