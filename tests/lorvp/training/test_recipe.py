"""How a prompt and its head learn: the gradient's norm, a head that waits, a head that is refitted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count

import pytest
import torch
from pydantic import ValidationError

import lorvp
from lorvp.config import TrialConfig
from lorvp.training import loop
from lorvp.training.loop import train
from lorvp.training.trainer import Trainer

PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.05}


def one_step(config: TrialConfig) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """A trial after its first step, and what its parameters were before it."""
    trainer = Trainer(config, loop.load(config))
    trainer.start_epoch(1)
    before = {name: p.detach().clone() for name, p in trainer.stage.method.named_parameters() if p.requires_grad}
    trainer.train_step(*next(iter(trainer.batches())))
    return trainer, before


def moved(trainer: Trainer, before: dict[str, torch.Tensor], part: str) -> float:
    after = dict(trainer.stage.method.named_parameters())
    steps = [(after[name] - tensor).double().norm() for name, tensor in before.items() if name.startswith(part)]
    return torch.stack(steps).norm().item()


@pytest.mark.parametrize("kind", ["low_rank", "evp", "acavp"])
def test_a_normalized_gradient_makes_a_step_of_the_learning_rate(digits, kind):
    """EVP: whatever the gradient, the prompt's step has the length lr; the head's is its gradient times its lr."""
    plain, start = one_step(digits(prompt=PLAIN | {"kind": kind}))
    normalized, before = one_step(digits(prompt=PLAIN | {"kind": kind, "normalize_grad": True}))
    assert moved(normalized, before, "prompt") == pytest.approx(0.05, rel=1e-5)
    assert moved(plain, start, "prompt") != pytest.approx(0.05, rel=0.01)
    assert moved(normalized, before, "mapping") == moved(plain, start, "mapping")


def test_a_clipped_prompt_leaves_the_head_alone(digits):
    plain, start = one_step(digits(prompt=PLAIN))
    clipped, before = one_step(digits(prompt=PLAIN | {"clip_grad_norm": 1e-3}))
    assert moved(clipped, before, "prompt") == pytest.approx(0.05 * 1e-3, rel=1e-3)
    assert moved(clipped, before, "mapping") == moved(plain, start, "mapping")


def test_a_gradient_of_zero_stays_zero(digits):
    """B and A are zero, so that neither has a gradient: 0 is divided by no norm."""
    zeros = {"init_a": "zero", "init_b": "zero", "normalize_grad": True}
    trainer, before = one_step(digits(prompt=PLAIN | zeros))
    assert moved(trainer, before, "prompt") == 0


def test_a_frozen_head_waits(digits):
    config = digits(epochs=3, head={"freeze_epochs": 2})
    trainer = Trainer(config, loop.load(config))
    start = trainer.stage.method.mapping.head.weight.detach().clone()
    frozen = []
    for _ in loop.train_together(lambda running: [trainer] if not (running or trainer.results) else []):
        frozen.append(torch.equal(trainer.stage.method.mapping.head.weight, start))
    assert frozen[:3] == [True, True, False]
    assert trainer.results[0].train_loss > trainer.results[1].train_loss  # the prompt has learned


def test_a_refitted_head_is_no_worse_on_val_and_is_the_bundles(digits, tmp_path):
    plain = list(train(digits()))
    (tmp_path / "refit").mkdir()
    refitted = list(train(digits(head={"refit": True}), tmp_path / "refit"))
    assert [r.val_loss for r in refitted[:-1]] == [r.val_loss for r in plain[:-1]]
    assert refitted[-1].train_loss == plain[-1].train_loss
    assert refitted[-1].val_top1 > plain[-1].val_top1 + 20  # three epochs by steps are few for a head
    assert refitted[-1].test_top1 > plain[-1].test_top1 + 20
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert lorvp.load(tmp_path / "refit" / "bundle")(images).shape == (2, 10)


def reached(calls: Iterator[int], last: int) -> bool:
    return next(calls) == last


@pytest.mark.parametrize("changes", [{}, {"dataset": {"train_on_val": True}}])
def test_a_stop_while_the_head_is_refitted_goes_on_there(digits, tmp_path, changes):
    dataset = {"name": "digits", "max_per_class": 20, "val_fraction": 0.2} | changes.get("dataset", {})
    config = digits(epochs=2, head={"refit": True}, dataset=dataset)
    expected = list(train(config))
    calls = count()
    list(train(config, should_stop=lambda: next(calls) < 0))
    in_all = next(calls)
    for stop_at in range(in_all - 12, in_all, 3):
        folder, calls = tmp_path / str(stop_at), count(1)
        folder.mkdir()
        first = list(train(config, folder, should_stop=partial(reached, calls, stop_at)))
        assert len(first) < 2
        again = list(train(config, folder, resume_from=folder / "checkpoint.pt"))
        assert [r.val_loss for r in again] == [r.val_loss for r in expected]
        assert again[-1].test_top1 == expected[-1].test_top1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"freeze_epochs": 3}}, "head.freeze_epochs (3) must be below epochs (3)"),
        ({"prompt": {"normalize_grad": True, "clip_grad_norm": 1}}, "prompt.clip_grad_norm must be null"),
    ],
)
def test_what_cannot_work_together(digits, changes, message):
    with pytest.raises(ValidationError) as raised:
        digits(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize("option", [{"refit": True}, {"freeze_epochs": 1}])
def test_a_head_alone_has_no_such_option(option):
    values = {"backbone": {"name": "resnet18"}, "dataset": {"name": "digits"}, "method": "linear_probe"}
    with pytest.raises(ValidationError, match="neither a prompt nor an adapter: leave it out"):
        TrialConfig.model_validate(values | {"head": option})
