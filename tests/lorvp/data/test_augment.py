"""TrivialAugment and colour jitter: torchvision's results on the same draws, and trials that train on them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import count_forwards
from pydantic import ValidationError
from support import stops
from support.samples.training import figures
from torch.nn import functional as F
from torchvision.transforms.v2 import ColorJitter, TrivialAugmentWide

from lorvp.config import DatasetConfig, TrialConfig
from lorvp.data import shuffle
from lorvp.data.augment import COLOR_JITTER, TRIVIAL_AUGMENT, TRIVIAL_AUGMENTS, augment, color_jitter, crop_and_flip
from lorvp.data.augment import trivial_augment as ours
from lorvp.data.datasets import crop_size
from lorvp.training import loop
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train, train_together
from lorvp.training.trainer import Trainer

BOTH = {"trivial_augment": True, "color_jitter": 0.4}
DIGITS = {"name": "digits", "max_per_class": 20, "val_fraction": 0.2}


@functools.cache
def photos(count: int, side: int) -> torch.Tensor:
    """Smooth images, every third of them with noise, and one of a single colour."""
    random = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(count, 3, 6, 6, generator=random), (side, side), mode="bicubic")
    smooth[::3] += torch.randn(smooth[::3].shape, generator=random) / 8
    smooth[1] = torch.tensor([0.2, 0.2, 0.7])[:, None, None]
    return (255 * smooth.clamp(0, 1)).round().byte()


def torchvisions(image: torch.Tensor, operation: int, level: int, negative: bool) -> torch.Tensor:
    """torchvision's TrivialAugmentWide, whose three draws are these."""
    integers = iter([torch.tensor(operation), torch.tensor(level)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_: next(integers))
        patch.setattr(torch, "rand", lambda *_: torch.tensor(0.25 if negative else 0.75))
        return TrivialAugmentWide()(image)


def between_two_pixels(operation: str, strengths: np.ndarray, side: int) -> torch.Tensor:
    """Where a shear takes a pixel from the middle between two, and rounding says which: broadcast to (n, 1, H, W)."""
    if not operation.startswith("Shear"):
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    moved = torch.from_numpy(strengths)[:, None] * (torch.arange(side) + 0.5)
    tie = ((moved.abs() % 1) - 0.5).abs() < 1e-4
    return tie[:, None, :, None] if operation == "ShearX" else tie[:, None, None, :]


@pytest.mark.parametrize("side", [33, 64])
@pytest.mark.parametrize("operation", TRIVIAL_AUGMENTS)
def test_each_operation_at_each_strength_is_torchvisions(operation, side):
    number = list(TRIVIAL_AUGMENTS).index(operation)
    cells = [(level, negative) for level in range(31) for negative in (False, True)]
    images = photos(len(cells), side)
    draws = np.array([((number + 0.5) / 14, (level + 0.5) / 31, 0.75 - 0.5 * negative) for level, negative in cells])
    expected = [torchvisions(image, number, *cell) for image, cell in zip(images, cells, strict=True)]
    different = ours(images, draws) != torch.stack(expected)
    _, strengths, signed = TRIVIAL_AUGMENTS[operation]
    signs = np.array([-1 if signed and negative else 1 for _, negative in cells])
    open_to_rounding = between_two_pixels(operation, strengths[[level for level, _ in cells]] * signs, side)
    assert not (different & ~open_to_rounding).any()
    assert different.float().mean() < 1e-3
    changed = (ours(images, draws) != images).flatten(1).any(1)
    assert changed.any() == (operation != "Identity")
    if signed and operation != "Identity":  # the first strength is none
        assert changed.tolist()[:2] == [False, False]


def test_each_operation_strength_and_sign_is_drawn_equally_often():
    places = np.arange(20_000)
    draws = shuffle.uniform(places, 3, 0, 1, TRIVIAL_AUGMENT)
    for column, count in ((0, 14), (1, 31), (2, 2)):
        seen = np.bincount((count * draws[:, column]).astype(int), minlength=count) / len(places)
        assert np.abs(seen - 1 / count).max() < 4.5 * np.sqrt((1 / count) * (1 - 1 / count) / len(places))


@pytest.mark.parametrize("strength", [0.1, 0.4, 1.0])
def test_colour_jitter_is_torchvisions(strength):
    images = photos(60, 48)
    draws = shuffle.uniform(np.arange(60), 8, 5)
    jitter = ColorJitter(strength, strength, strength, strength / 4)
    ranges = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
    expected = []
    for image, draw in zip(images, draws, strict=True):
        factors = [low + (high - low) * each for (low, high), each in zip(ranges, draw, strict=False)]
        named = dict(
            zip(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor"), factors, strict=True)
        )
        expected.append(jitter.transform(image, named | {"fn_idx": torch.from_numpy(np.argsort(draw[4:]))}))
    result = color_jitter(images, strength, draws)
    difference = (result.int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 1  # where a factor's last bit, and no more, is another
    assert difference.float().mean() < 1e-3
    assert len({tuple(np.argsort(draw[4:])) for draw in draws}) > 18  # of 24 orders


@pytest.mark.parametrize("options", [{"trivial_augment": True}, {"color_jitter": 0.5}, BOTH | {"crop_flip": True}])
def test_an_image_is_the_same_in_any_batch_and_memory_format(options):
    config = DatasetConfig(name="digits", **options)
    images, places = photos(61, 33), np.arange(100, 161)
    whole = augment(images, 32, config, places, 3, 7)
    assert whole.shape == (61, 3, 32, 32)
    assert whole.dtype == torch.uint8
    for part in (np.arange(1), np.arange(7, 19), np.arange(0, 61, 2), np.random.default_rng(0).permutation(61)):
        assert torch.equal(augment(images[part], 32, config, places[part], 3, 7), whole[part])
    assert torch.equal(augment(images.to(memory_format=torch.channels_last), 32, config, places, 3, 7), whole)
    for seeds in ((4, 7), (3, 8)):
        assert not torch.equal(augment(images, 32, config, places, *seeds), whole)


def test_the_images_that_were_given_stay_as_they_are():
    images = photos(40, 32)
    before = images.clone()
    augment(images, 32, DatasetConfig(name="digits", **BOTH), np.arange(40), 0, 1)
    assert torch.equal(images, before)
    assert augment(images, 16, DatasetConfig(name="digits"), np.arange(40), 0, 1) is images


def test_each_augmentation_has_draws_of_its_own():
    places, size = np.arange(50), 32
    images = photos(50, crop_size(size))

    def of(**options: object) -> torch.Tensor:
        return augment(images, size, DatasetConfig(name="digits", **options), places, 3, 7)

    crops = crop_and_flip(images, size, shuffle.uniform(places, 3, 3, 7))  # as before there were others
    assert torch.equal(of(crop_flip=True), crops)
    changed = ours(crops, shuffle.uniform(places, 3, 3, 7, TRIVIAL_AUGMENT))
    assert torch.equal(of(crop_flip=True, trivial_augment=True), changed)
    jittered = color_jitter(changed, 0.4, shuffle.uniform(places, 8, 3, 7, COLOR_JITTER))
    assert torch.equal(of(crop_flip=True, **BOTH), jittered)
    many = np.arange(10_000)
    columns = [
        shuffle.uniform(many, 3, 3, 7),
        shuffle.uniform(many, 3, 3, 7, TRIVIAL_AUGMENT),
        shuffle.uniform(many, 8, 3, 7, COLOR_JITTER),
    ]
    correlation = np.corrcoef(np.concatenate(columns, axis=1).T) - np.eye(14)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(many))


@pytest.mark.parametrize("options", [{"trivial_augment": True}, {"color_jitter": 0.4}])
def test_a_trial_trains_on_them_and_goes_on_within_an_epoch(digits, tmp_path, options):
    config = digits(dataset=DIGITS | options, epochs=2)
    expected = list(train(config))
    assert [r.train_loss for r in expected] != [r.train_loss for r in train(digits(epochs=2))]
    stop = stops.from_call(3)
    assert not list(train(config, folder=tmp_path, should_stop=stop))
    assert figures(train(config, resume_from=tmp_path / CHECKPOINT)) == figures(expected)


def test_each_of_several_processes_has_its_share_of_the_same_images(digits):
    trainer = Trainer(digits(dataset=DIGITS | BOTH), loop.load(digits()))
    trainer.start_epoch(1)
    whole = [images for images, *_ in trainer.batches()]
    for trainer.rank in range(3):
        trainer.world_size = 3
        for batch, (images, *_) in zip(whole, trainer.batches(), strict=True):
            assert torch.equal(images, batch[trainer.rank :: 3])


def test_a_rung_augments_at_its_own_size(digits, monkeypatch):
    sizes = []
    step = Trainer.train_step

    def noted(self: Trainer, images: torch.Tensor, *rest: object) -> None:
        sizes.append(images.shape[-1])
        step(self, images, *rest)

    monkeypatch.setattr(Trainer, "train_step", noted)
    list(train(digits(dataset=DIGITS | BOTH, rungs=[{"epochs": 1, "image_size": 16}], epochs=2)))
    assert set(sizes) == {16, 32}


def test_a_head_alone_trains_on_images_then_and_not_on_cached_features(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("LORVP_CACHE", str(tmp_path))
    plain, augmented = (digits(method="linear_probe", dataset=DIGITS | options, epochs=2) for options in ({}, BOTH))
    loaded = loop.load(augmented)
    assert Trainer(plain, loaded).stage.reads_features
    assert not Trainer(augmented, loaded).stage.reads_features
    seen = count_forwards(monkeypatch)
    results = list(train(augmented, shared=loaded))
    splits = loaded.splits
    assert sum(seen) == 2 * (len(splits.train) + len(splits.val)) + len(splits.test)
    assert [r.train_loss for r in results] != [r.train_loss for r in train(plain, shared=loaded)]


def test_a_fitted_head_is_fitted_to_plain_images(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("LORVP_CACHE", str(tmp_path))
    plain, augmented = (digits(head={"init": "fitted"}, dataset=DIGITS | options) for options in ({}, BOTH))
    loaded = loop.load(plain)
    heads = []
    for config in (plain, augmented):
        trainer = Trainer(config, loaded)
        before = [p.clone() for p in trainer.stage.method.mapping.parameters()]
        trainer.start_epoch(1)
        heads.append(list(trainer.stage.method.mapping.parameters()))
        assert not torch.equal(before[0], heads[-1][0])
    assert all(torch.equal(one, other) for one, other in zip(*heads, strict=True))


def test_packed_trials_share_the_augmented_batch(digits, monkeypatch):
    configs = [
        digits(dataset=DIGITS | BOTH, prompt={"rank": 1}, epochs=2),
        digits(dataset=DIGITS | BOTH, prompt={"rank": 8}, epochs=2),
        digits(dataset=DIGITS | BOTH, method="linear_probe", epochs=2),
    ]
    assert configs[0].packs_with(configs[1])
    assert configs[0].packs_with(configs[2])
    alone = [figures(train(config)) for config in configs]
    loaded = loop.load(configs[0])
    batches = []
    prepare = Trainer.prepare
    monkeypatch.setattr(Trainer, "prepare", lambda self, images: batches.append(self) or prepare(self, images))
    trainers = [Trainer(config, loaded) for config in configs]
    waiting, results = list(trainers), {trainer: [] for trainer in trainers}
    for trainer, event in train_together(lambda _: [waiting.pop(0) for _ in list(waiting)]):
        results[trainer].append(event)
    for trainer, expected in zip(trainers, alone, strict=True):
        together = figures(results[trainer][:-1])
        assert [e | {"packed": 3} for e in expected] == together
    assert batches


def test_trials_with_other_augmentations_share_the_data_and_not_the_batches(digits):
    plain, augmented, cropped = (digits(dataset=DIGITS | options) for options in ({}, BOTH, {"crop_flip": True}))
    assert plain.shares_with(augmented)
    assert not plain.packs_with(augmented)
    assert not plain.shares_with(cropped)  # crops may come from larger images
    assert not digits(dataset=DIGITS | {"color_jitter": 0.2}).packs_with(augmented)


def test_a_config_that_augments_nothing_has_the_hash_that_it_had(digits):
    plain = digits()
    assert "trivial_augment" not in plain.canonical_json()
    assert "color_jitter" not in plain.canonical_json()
    same = digits(dataset=DIGITS | {"trivial_augment": False, "color_jitter": None})
    assert same.content_hash() == plain.content_hash()
    hashes = {
        digits(dataset=DIGITS | options).content_hash()
        for options in ({}, {"trivial_augment": True}, {"color_jitter": 0.4}, {"color_jitter": 0.2}, BOTH)
    }
    assert len(hashes) == 5


@pytest.mark.parametrize("strength", [0, 1.1, -0.2, float("nan"), "strong"])
def test_a_strength_is_above_0_and_at_most_1(strength):
    with pytest.raises(ValidationError, match=r"dataset\.color_jitter") as raised:
        TrialConfig.model_validate(
            {"backbone": {"name": "resnet18"}, "dataset": {"name": "digits", "color_jitter": strength}}
        )
    assert len(raised.value.errors()) == 1
