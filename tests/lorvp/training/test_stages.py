"""Cheaper first epochs: on smaller images, on a part of them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from support import stops
from support.samples.training import figures

from lorvp.parts import kinds
from lorvp.prompts.base import make_prompt
from lorvp.training import loop, stage
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train
from lorvp.training.trainer import Trainer

SMALL = {"epochs": 2, "image_size": 16}
FEW = {"epochs": 1, "train_share": 0.25}


@pytest.mark.parametrize("kind", ["low_rank", "border", "full_image", "evp"])
def test_a_prompt_grows_by_interpolation(kind):
    """B's rows and A's columns: the product grows as an image would, a constant stays one."""
    small, large = (make_prompt(kinds("prompt")[kind](kind=kind), size) for size in (16, 32))
    for parameter in small.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    shapes = {name: tensor.shape for name, tensor in large.state_dict().items()}
    large.load_state_dict({name: stage.resized(t, shapes[name]) for name, t in small.state_dict().items()})
    middle = small.pattern()[:, 0, 0]
    torch.testing.assert_close(large.pattern()[:, 0, 0], middle)
    assert large.pattern().shape == (3, 32, 32)


def test_a_prompt_that_moves_the_image_grows_with_it():
    """ACAVP's numbers are shares of the image's side: a flat image comes out the same, but for a pixel at its edges."""
    small, large = (make_prompt(kinds("prompt")["acavp"](kind="acavp"), size) for size in (32, 64))
    for name, parameter in small.named_parameters():
        torch.nn.init.constant_(parameter, 0.4 if name == "padding" else 0.3)
    shapes = {name: tensor.shape for name, tensor in large.state_dict().items()}
    kept = {name for name, tensor in small.state_dict().items() if tensor.shape == shapes[name]}
    assert kept == {"scale", "angle", "shear", "shift"}
    large.load_state_dict(
        {name: t if name in kept else stage.resized(t, shapes[name]) for name, t in small.state_dict().items()}
    )
    flat = [each.transform_input(torch.ones(1, 3, each.side, each.side)) + each.pattern() for each in (small, large)]
    apart = (torch.nn.functional.avg_pool2d(flat[1], 2) - flat[0]).abs()
    assert (apart < 1e-5).float().mean() > 0.85
    padded = (flat[0] - 0.4).abs() < 1e-6
    assert 0.2 < padded.float().mean() < 0.6


def test_rungs_are_what_they_say(digits, monkeypatch):
    seen = []
    step = Trainer.train_step

    def noted(self: Trainer, images: torch.Tensor, labels: torch.Tensor, whole: int) -> None:
        seen.append((len(self.results) + 1, images.shape[-1], whole))
        step(self, images, labels, whole)

    monkeypatch.setattr(Trainer, "train_step", noted)
    config = digits(epochs=5, rungs=[SMALL, FEW], batch_size=32)
    results = list(train(config))
    images = len(loop.load(config).splits.train)
    totals = {epoch: sum(whole for e, _, whole in seen if e == epoch) for epoch in range(1, 6)}
    assert totals == {1: images, 2: images, 3: round(images / 4), 4: images, 5: images}
    assert {epoch: size for epoch, size, _ in seen} == {1: 16, 2: 16, 3: 32, 4: 32, 5: 32}
    assert [r.whole for r in results] == [False, False, False, True, True]
    lr = [r.lr["prompt"] for r in results]
    assert lr == [r.lr["prompt"] for r in train(digits(epochs=5))]  # the schedule is the trial's own


@pytest.mark.parametrize("changes", [{}, {"method": "acavp", "precision": "bf16"}], ids=["lorvp", "acavp"])
def test_the_bundle_is_of_a_whole_epoch(digits, tmp_path, changes):
    results = list(train(digits(epochs=3, rungs=[SMALL], **changes), folder=tmp_path))
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["best"]["epoch"] == 3
    assert results[-1].test_top1 is not None
    assert (tmp_path / "bundle").is_dir()


@pytest.mark.parametrize("mapping", ["ilm", "lp"])
@pytest.mark.parametrize("calls", [3, *(pytest.param(c, marks=pytest.mark.slow) for c in (12, 17))])
def test_an_interruption_at_any_rung_changes_nothing(digits, tmp_path, mapping, calls):
    config = digits(
        epochs=4, rungs=[{"epochs": 1, "image_size": 16}, FEW], head={"kind": mapping, "counting": "streamed"}
    )
    expected = figures(list(train(config)))
    stop = stops.from_call(calls)
    list(train(config, folder=tmp_path, should_stop=stop))
    checkpoint = tmp_path / CHECKPOINT
    assert figures(list(train(config, resume_from=checkpoint if checkpoint.exists() else None))) == expected


def test_the_last_epochs_are_whole(digits):
    with pytest.raises(ValidationError, match="the last ones are whole"):
        digits(epochs=3, rungs=[SMALL, FEW])
