"""Which class a trial gives each validation and test image: those behind its figures, however it was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import stops

import lorvp
from lorvp.bundle.predictions import PREDICTIONS, Predictions, read, write
from lorvp.data import datasets
from lorvp.result import EpochResult
from lorvp.training import launch, loop
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train, train_together
from lorvp.training.trainer import Trainer


def top1(predictions: Predictions) -> float:
    return 100 * predictions.right.mean()


def best(results: list[EpochResult], select: str = "val") -> EpochResult:
    return max(results, key=lambda result: result.test_top1 if select == "test_best_epoch" else result.val_top1)


def same(one: Path, other: Path) -> bool:
    first, second = read(one / PREDICTIONS), read(other / PREDICTIONS)
    return first.keys() == second.keys() and all(
        np.array_equal(first[split].labels, second[split].labels)
        and np.array_equal(first[split].predicted, second[split].predicted)
        for split in first
    )


WORSENS = {"head": {"init": "fitted", "freeze_epochs": 1, "lr": 50.0}, "prompt": {"lr": 1e-4}}
"""A fitted head that is kept for one epoch, and then ruined: the first epoch is the best."""


@pytest.mark.parametrize(
    "changes",
    [
        WORSENS,
        WORSENS | {"eval_batch_size": 7},
        WORSENS | {"select": "test_best_epoch"},
        {"head": {"kind": "ilm"}},
        {"rungs": [{"epochs": 1, "image_size": 16, "train_share": 0.5}]},
        {"method": "linear_probe"},
        {"method": "linear_probe", "head": {"init": "fitted", "fit": "best"}, "epochs": 1},
    ],
    ids=["late", "small batches", "published", "ilm", "rungs", "cached features", "fitted control"],
)
def test_they_give_the_figures_of_the_best_epoch(digits, tmp_path, changes):
    config = digits(**changes)
    results = list(train(config, folder=tmp_path))
    found = read(tmp_path / PREDICTIONS)
    assert list(found) == ["val", "test"]
    chosen = best([result for result in results if result.whole], config.select)
    test_top1 = chosen.test_top1 if config.select == "test_best_epoch" else results[-1].test_top1
    assert top1(found["val"]) == pytest.approx(chosen.val_top1)
    assert top1(found["test"]) == pytest.approx(test_top1)
    if changes is WORSENS:
        assert chosen.epoch == 1
        assert chosen.val_top1 > results[-1].val_top1 + 10
    splits, model = datasets.load(config.dataset, 32), lorvp.load(tmp_path / "bundle")
    for name, of_split in found.items():
        images = getattr(splits, name)
        assert np.array_equal(of_split.labels, images.labels)
        assert np.array_equal(of_split.predicted, model(images.read(range(len(images)))).argmax(1).numpy())


def test_the_test_set_is_not_in_them_unless_it_was_read(digits, tmp_path):
    list(train(digits(read_test=False), folder=tmp_path))
    assert list(read(tmp_path / PREDICTIONS)) == ["val"]


def test_where_nothing_is_held_back_both_are_the_test_sets(digits, tmp_path):
    dataset = {"name": "digits", "max_per_class": 20, "val_fraction": 0}
    results = list(train(digits(select="test_best_epoch", dataset=dataset), folder=tmp_path))
    found = read(tmp_path / PREDICTIONS)
    assert np.array_equal(found["val"].predicted, found["test"].predicted)
    assert top1(found["test"]) == pytest.approx(max(result.test_top1 for result in results))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Gives the folder of a trial that was trained in one go, once for each config."""
    folders: dict[str, Path] = {}

    def trained(config) -> Path:
        name = config.content_hash()
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("whole")
            list(train(config, folder=folders[name]))
        return folders[name]

    return trained


@pytest.mark.parametrize("changes", [WORSENS, WORSENS | {"select": "test_best_epoch"}], ids=["val", "published"])
@pytest.mark.parametrize("calls", [1, 3, 6, 7, 8, 13, 14, 15, 20, 21, 22, 23, 28, 33, 34, 46, 57])
def test_stopped_and_continued_they_are_those_of_an_uninterrupted_trial(
    digits, tmp_path, uninterrupted, changes, calls
):
    """Before a batch of training, of validation or of the test set: these are 5, 2 and 12 batches."""
    config = digits(**changes, eval_batch_size=30)
    whole, parts = uninterrupted(config), tmp_path / "parts"
    parts.mkdir()
    stop = stops.from_call(calls)
    list(train(config, folder=parts, should_stop=stop))
    checkpoint = parts / CHECKPOINT
    list(train(config, folder=parts, resume_from=checkpoint if checkpoint.exists() else None))
    assert same(parts, whole)


def test_a_trial_that_is_given_up_leaves_those_of_its_best_epoch(digits, tmp_path):
    config, results = digits(**WORSENS), []
    for result in train(config, folder=tmp_path, should_stop=lambda: len(results) == 2):
        results.append(result)
    found = read(tmp_path / PREDICTIONS)
    assert list(found) == ["val"]
    assert top1(found["val"]) == pytest.approx(best(results).val_top1)


def test_packed_they_are_those_of_each_by_itself(digits, tmp_path):
    configs = [digits(**WORSENS), digits(head={"kind": "ilm"}), digits(method="linear_probe")]
    loaded = loop.load(configs[0])
    folders = [tmp_path / name for name in ("packed0", "packed1", "packed2", "alone0", "alone1", "alone2")]
    for folder in folders:
        folder.mkdir()
    waiting = [Trainer(config, loaded, folder) for config, folder in zip(configs, folders, strict=False)]
    for _ in train_together(lambda _: [waiting.pop() for _ in list(waiting)]):
        pass
    for config, packed, alone in zip(configs, folders, folders[3:], strict=False):
        list(train(config, folder=alone))
        assert same(packed, alone)


@pytest.mark.slow
def test_two_processes_gather_them_in_the_order_of_the_set(digits, tmp_path):
    """With an odd last batch, of which one process has no image; stopped within an evaluation and continued, too."""
    dataset = {"name": "digits", "train_images": 161, "val_images": 41}
    config = digits(dataset=dataset, method="linear_probe", batch_size=32, eval_batch_size=8, epochs=2)
    folders = {name: tmp_path / name for name in ("alone", "two", "parts")}
    for folder in folders.values():
        folder.mkdir()
    alone = list(train(config, folder=folders["alone"]))
    together = list(launch.train(config, 2, folder=folders["two"]))
    assert [result.val_top1 for result in together] == pytest.approx([result.val_top1 for result in alone])
    assert same(folders["two"], folders["alone"])
    stop = stops.from_call(6 + 6 + 6 + 3)  # steps, batches of val, and steps again; then within an evaluation
    checkpoint = folders["parts"] / CHECKPOINT
    assert len(list(launch.train(config, 2, folder=folders["parts"], should_stop=stop))) == 1
    assert torch.load(checkpoint, weights_only=True)["epoch"]["phase"] == "evaluate"
    list(launch.train(config, 2, folder=folders["parts"], resume_from=checkpoint))
    assert same(folders["parts"], folders["alone"])


def test_the_file_is_small_and_what_is_damaged_counts_as_missing(tmp_path):
    path, rng = tmp_path / PREDICTIONS, np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 1000, 50_000))
    predicted = np.where(rng.random(50_000) < 0.8, labels, rng.integers(0, 1000, 50_000))
    write(path, {"val": Predictions(labels[:9], predicted[:9]), "test": Predictions(labels, predicted)})
    found = read(path)
    assert np.array_equal(found["test"].predicted, predicted)
    assert (found["val"].labels.dtype, len(found["val"].labels)) == (np.int32, 9)
    assert path.stat().st_size < 200_000
    assert [each.name for each in tmp_path.iterdir()] == [PREDICTIONS]
    path.write_bytes(path.read_bytes()[:1000])
    assert read(path) == {}
    assert read(tmp_path / "none") == {}
