"""What the frozen backbone says, computed once: the cache, the head fitted on it, and trials that start from it."""

from __future__ import annotations

import math
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import count_forwards, make
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

import lorvp
from lorvp import evaluate
from lorvp.config import DatasetConfig, TrialConfig
from lorvp.data import datasets
from lorvp.errors import TrialFailed
from lorvp.estimate.calibrate import calibrate
from lorvp.features import cache as feature_cache
from lorvp.features import probe
from lorvp.methods.base import Method
from lorvp.models.backbone import Backbone
from lorvp.training import loop
from lorvp.training.checkpoint import CHECKPOINT
from lorvp.training.loop import train


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORVP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    return count_forwards(monkeypatch)


@pytest.mark.parametrize("output", ["features", "logits", "top"])
def test_it_is_what_the_backbone_says_and_is_computed_once(digits, cache, forwards, output):
    loaded = loop.load(digits())
    images = loaded.splits.train
    said = feature_cache.get(loaded.backbone, images, output, 50)
    assert sum(forwards) == len(images)
    again = feature_cache.get(loaded.backbone, images, output, 50)
    assert sum(forwards) == len(images)
    assert torch.equal(said.pixels, again.pixels)
    assert (said.digest, list(said.labels)) == (again.digest, list(images.labels))
    with torch.inference_mode():
        kind = "features" if output == "features" else "logits"
        plain = loaded.backbone(loaded.backbone.prepare(images.read(range(len(images)))), kind)
    torch.testing.assert_close(said.pixels, plain.argmax(1) if output == "top" else plain, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_other_weights_images_sizes_and_statistics_are_other_files(digits, cache):
    def names(config: TrialConfig, change=lambda images: images) -> set[str]:
        loaded = loop.load(config)
        feature_cache.get(loaded.backbone, change(loaded.splits.train), "features", 64)
        return {path.name for path in cache.glob("*.npy")}

    name = "lorvp_tiny_32.cifar10"
    changed = [
        digits(),
        digits(backbone={"name": name, "pretrained": False}),
        digits(backbone={"name": name, "image_size": 40}),
        digits(backbone={"name": name, "mean": (0.4, 0.5, 0.5)}),
        digits(precision="bf16"),
    ]
    assert [len(names(config)) for config in changed] == [1, 2, 3, 4, 5]
    assert len(names(digits(), lambda images: images.subset(np.arange(1, 9)))) == 6
    assert len(names(digits(optimizer={"lr": 7.0}))) == 6


def test_images_are_told_apart_by_their_content(image_root, tmp_path):
    def digests() -> list[str]:
        kept = make("image_folder", image_root, tmp_path / f"{len(list(tmp_path.iterdir()))}", size=32)
        by_store = datasets.load(DatasetConfig(name="store", root=kept.folder, val_fraction=0.25), 32)
        in_memory = datasets.load(DatasetConfig(name="image_folder", root=image_root, val_fraction=0.25), 32)
        by_file = datasets.image_folder(image_root / "train", 32)
        return [by_store.train.digest, in_memory.train.digest, by_file.digest, by_store.val.digest]

    first = digests()
    assert digests() == first
    assert len(set(first)) == 4
    changed = image_root / "train" / "n01" / "0.JPEG"
    changed.write_bytes((image_root / "train" / "n02" / "0.JPEG").read_bytes())
    assert not set(digests()[:3]) & set(first)


@pytest.mark.parametrize("output", ["features", "top"])
def test_a_computation_that_is_broken_off_is_gone_on_with(digits, cache, forwards, output):
    """Nothing but the batch before which it was ended is computed again, and the result is the same."""
    loaded = loop.load(digits())
    expected = feature_cache.get(loaded.backbone, loaded.splits.train, output, 32).pixels.clone()
    shutil.rmtree(cache)
    forwards.clear()
    for ends in (1, 2):
        calls = iter(range(ends))
        with pytest.raises(StopIteration):
            feature_cache.get(
                loaded.backbone, loaded.splits.train, output, 32, lambda calls=calls: next(calls) and None
            )
    found = feature_cache.get(loaded.backbone, loaded.splits.train, output, 32).pixels
    assert torch.equal(found, expected)
    assert sum(forwards) == len(loaded.splits.train)
    assert not [path for path in cache.iterdir() if path.suffix not in (".npy", ".lock")]


def test_of_several_that_need_it_one_computes(digits, cache, forwards):
    loaded = loop.load(digits())

    def ask() -> None:
        feature_cache.get(loaded.backbone, loaded.splits.train, "features", 32)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(forwards) == len(loaded.splits.train)


def blobs(classes: int = 3, each: int = 60, width: int = 8) -> datasets.ArrayImages:
    """Overlapping clouds of points."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 1, (classes, width))
    labels = np.arange(classes * each) % classes
    points = centres[labels] + random.normal(0, 1.5, (classes * each, width)) + 5
    return datasets.ArrayImages(torch.from_numpy(points).float(), labels, tuple("abc"[:classes]))


@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_the_head_is_scikit_learns(c):
    points = blobs()
    weight, bias = probe.fit(points.pixels, torch.from_numpy(points.labels), 3, c)
    theirs = LogisticRegression(C=c, max_iter=10_000, tol=1e-8).fit(points.pixels.numpy(), points.labels)
    expected = theirs.predict_proba(points.pixels.numpy())
    ours = F.linear(points.pixels, weight, bias).softmax(1)
    torch.testing.assert_close(ours, torch.from_numpy(expected).float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", ["usual", "more features than images", "own axes"])
def test_the_heads_of_a_path_are_scikit_learns(shape, monkeypatch):
    """At five values of C, each reached from those before it."""
    images, labels = (values[:200] for values in load_digits(n_class=4, return_X_y=True))
    if shape == "more features than images":
        images, labels = np.tile(images[:50], 2)[:, :120] / 2, labels[:50]
    if shape == "own axes":
        monkeypatch.setattr(probe, "WIDEST", 32)
    x = torch.from_numpy(images / 16).float()
    path = probe.HeadPath(x, torch.from_numpy(labels), 4)
    heads: list[tuple[float, probe.Head]] = []
    for c in probe.CS[:46]:
        heads.append((float(c), path.fit(float(c), heads)))
    for c, head in heads[5::10]:
        theirs = LogisticRegression(C=c, max_iter=10_000, tol=1e-8).fit(x.numpy().astype(float), labels)
        expected = torch.from_numpy(theirs.predict_proba(x.numpy())).float()
        torch.testing.assert_close(F.linear(x, *head).softmax(1), expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("each", [1, 20], ids=["more features than images", "usual"])
def test_outputs_that_are_no_numbers_are_said_in_a_line(cache, value, each):
    points = blobs(each=each)
    points.pixels[0, 0] = value
    with pytest.raises(TrialFailed, match="not all finite"):
        probe.head(points, blobs(), "best", torch.device("cpu"))


def noisy_digits(images: int, wrong: float) -> datasets.ArrayImages:
    """Pixels of scikit-learn's digits, some of which have another's label, which a head fits at large values of C."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(0)
    changed = np.where(random.random(len(labels)) < wrong, random.permutation(labels), labels)
    names = tuple("0123456789")
    return datasets.ArrayImages(torch.from_numpy(pixels / 16).float(), changed, names).subset(np.arange(images))


def heads_tried(monkeypatch) -> list[float]:
    tried: list[float] = []
    fit = probe.HeadPath.fit
    monkeypatch.setattr(probe.HeadPath, "fit", lambda path, c, before: (tried.append(c), fit(path, c, before))[1])
    return tried


@pytest.mark.parametrize("cs", [probe.CS, probe.CS[::3]])
@pytest.mark.parametrize(("wrong", "ends"), [(0.4, True), (0.0, False)])
def test_a_scan_ends_where_val_has_fallen_and_chooses_as_the_whole_one(cache, monkeypatch, wrong, ends, cs):
    points = noisy_digits(1_797, wrong)
    train, val = points.subset(np.arange(500)), points.subset(np.arange(500, 1_797))
    tried = heads_tried(monkeypatch)
    found = {fit: probe.head(train, val, fit, torch.device("cpu"), cs) for fit in ("best", "90%")}
    assert (len(tried) < len(cs)) == ends
    monkeypatch.setattr(probe.Scan, "has_fallen", lambda *_: False)
    for fit, head in found.items():
        assert all(map(torch.equal, head, probe.head(train, val, fit, torch.device("cpu"), cs)))
    assert tried == list(cs)


@pytest.mark.parametrize(
    ("right", "losses", "ends"),
    [
        ([50, 90, 70, 69], [2.0, 1.0, 1.5, 2.0], True),
        ([50, 90, 86, 86], [2.0, 1.0, 1.5, 2.0], False),  # a plateau, within the error of 100 images
        ([50, 90, 70, 88], [2.0, 1.0, 1.5, 2.0], False),  # a dip
        ([90, 50, 51, 50], [3.0, 2.5, 2.0, 1.0], False),  # a dip at small C: the loss still sinks
    ],
)
def test_val_has_fallen_for_good(right, losses, ends):
    """Heads of which so many of 100 images are right: those of the first rows, by a margin that gives the loss."""
    labels = torch.zeros(100, dtype=torch.long)
    scan = probe.Scan(torch.eye(100), labels)
    for count, loss in zip(right, losses, strict=True):
        # the wrong ones have what the loss needs: log(1 + e^m) = 100 · loss / wrong, the right ones next to none
        margin = math.log(math.expm1(100 * loss / (100 - count)))
        scan.add(
            (
                torch.stack(
                    [20 * (torch.arange(100) < count) - margin * (torch.arange(100) >= count), torch.zeros(100)]
                ),
                torch.zeros(2),
            )
        )
    assert scan.accuracies == right
    assert scan.has_fallen([1e-3, 1e-2, 0.1, 0.5]) == ends
    assert not scan.has_fallen([0.1, 0.2, 0.3, 0.5])  # not over a factor of 10 yet


def test_a_device_without_room_leaves_all_fits_to_the_cpu(cache, monkeypatch, capsys):
    points, cs = blobs(), np.array([1e-3, 1e-2, 0.1])
    expected = probe.head(points, points, "best", torch.device("cpu"), cs)
    shutil.rmtree(cache)
    make = probe.HeadPath.__init__

    def full(path, x, *rest):
        if x.device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        make(path, x, *rest)

    monkeypatch.setattr(probe.HeadPath, "__init__", full)
    monkeypatch.setattr(probe, "load_file", lambda path, device: load_file(path))
    monkeypatch.setattr(
        probe.Scan,
        "__init__",
        lambda scan, *_, init=probe.Scan.__init__: init(scan, points.pixels, torch.from_numpy(points.labels)),
    )
    found = probe.head(points, points, "best", torch.device("meta"), cs)
    assert all(map(torch.equal, found, expected))
    assert capsys.readouterr().out.count("out of device memory: the head is fitted on the CPU") == 1


def test_a_fit_can_be_ended_within_a_pass(monkeypatch):
    points, calls = blobs(), []
    x, labels = points.pixels, torch.from_numpy(points.labels)
    for name in ("ROWS_AT_ONCE", "PATH_ROWS_AT_ONCE"):
        monkeypatch.setattr(probe, name, 50)  # of 180 rows
    for ends in (2, 3):

        def check(ends=ends):
            calls.append(ends)
            if calls.count(ends) == ends:
                raise StopIteration

        with pytest.raises(StopIteration):
            probe.fit(x, labels, 3, 0.1, check)
        calls.clear()
        with pytest.raises(StopIteration):
            probe.HeadPath(x, labels, 3, check)
        calls.clear()


@pytest.mark.slow
def test_how_far_it_is_fitted(cache):
    points = blobs()
    train, val = points.subset(np.arange(90)), points.subset(np.arange(90, 180))
    labels = torch.from_numpy(val.labels)

    def reached(head_fit: float | str) -> tuple[float, float]:
        head = probe.head(train, val, head_fit, torch.device("cpu"))
        return probe.accuracy(head, val.pixels, labels), head[0].norm().item()

    best, norm = reached("best")
    assert best == max(reached(float(c))[0] for c in probe.CS)
    share, less = reached("80%")
    assert 0.8 * best <= share
    assert less < norm


def test_a_head_for_all_images_has_the_c_that_was_best_on_val(cache):
    points, cpu = blobs(), torch.device("cpu")
    train, val = points.subset(np.arange(60)), points.subset(np.arange(60, 180))
    cs = np.array([1e-5, 1e-2, 10.0])
    apart = [probe.head(train, val, "best", cpu, cs[:count]) for count in (1, 2, 3)]
    reached = [probe.accuracy(head, val.pixels, torch.from_numpy(val.labels)) for head in apart]
    chosen = cs[int(np.argmax(reached))]
    for head_fit, c in (("best", chosen), (0.1, 0.1)):
        found = probe.head(train, val, head_fit, cpu, cs, points)
        torch.testing.assert_close(found, probe.fit(points.pixels, torch.from_numpy(points.labels), 3, c))


def test_a_fit_that_is_ended_goes_on_with_the_c_that_was_under_way(cache):
    points, cpu = blobs(), torch.device("cpu")
    train, val = points.subset(np.arange(60)), points.subset(np.arange(60, 180))
    cs = np.array([1e-5, 1e-2, 10.0])
    calls = 0

    def check(ends: float) -> None:
        nonlocal calls
        calls += 1
        if calls == ends:
            raise StopIteration

    expected = probe.head(train, val, "best", cpu, cs, check=lambda: check(math.inf))
    iterations, calls = calls, 0
    shutil.rmtree(cache)
    with pytest.raises(StopIteration):
        probe.head(train, val, "best", cpu, cs, check=lambda: check(iterations))  # in the last one
    calls = 0
    found = probe.head(train, val, "best", cpu, cs, check=lambda: check(math.inf))
    assert calls < iterations
    assert all(map(torch.equal, found, expected))


def test_the_last_training_fits_its_head_to_all_images(digits, cache, monkeypatch):
    """With C as it is without them."""
    asked = []
    head = probe.head

    def watched(train, val, head_fit, device, cs, all_images, check):
        asked.append((len(train), len(val), all_images and len(all_images)))
        return head(train, val, head_fit, device, cs, all_images, check)

    monkeypatch.setattr(probe, "head", watched)
    for on in (False, True):
        dataset = {"name": "digits", "max_per_class": 20, "val_fraction": 0.2, "train_on_val": on}
        (result,) = train(digits(method="linear_probe", head={"init": "fitted"}, epochs=1, dataset=dataset))
    assert asked == [(160, 40, None), (160, 40, 200)]
    assert result.test_top1 > 60


@pytest.mark.parametrize("mapping", ["lp", "fm"])
def test_a_probe_fitted_to_the_end_is_one_epoch_and_beats_one_by_steps(digits, cache, tmp_path, mapping):
    fitted = {"kind": mapping, "init": "fitted", "fit": "best"}
    (result,) = train(digits(method="linear_probe", head=fitted, epochs=1), folder=tmp_path)
    stepped = list(train(digits(method="linear_probe", head={"kind": mapping}, epochs=3)))
    assert result.val_top1 >= max(r.val_top1 for r in stepped)
    assert result.lr == {}
    assert result.test_top1 is not None
    assert (tmp_path / "bundle").is_dir()


def test_a_probe_never_runs_the_backbone_twice_on_an_image(digits, cache, forwards):
    config = digits(method="linear_probe", epochs=4)
    results = list(train(config))
    splits = loop.load(config).splits
    assert sum(forwards) == len(splits.train) + len(splits.val) + len(splits.test)
    forwards.clear()
    assert [r.val_loss for r in train(config)] == [r.val_loss for r in results]
    assert not forwards


def test_a_probe_by_steps_is_what_it_was_without_the_cache(digits, cache, monkeypatch):
    config = digits(method="linear_probe")
    cached = list(train(config))
    monkeypatch.setattr("lorvp.methods.base.Method.trains_head_only", False)
    for ours, plain in zip(cached, train(config), strict=True):
        assert ours.train_loss == pytest.approx(plain.train_loss, abs=1e-5)
        assert ours.val_top1 == plain.val_top1


def test_a_warm_start_is_the_fitted_heads_function_at_step_0(digits, cache):
    """A learning rate too small to change anything leaves the probe's own figures."""
    still = {"prompt": {"optimizer": "sgd", "lr": 1e-12}, "optimizer": {"lr": 1e-12}}
    for mapping in ("lp", "fm"):
        fit = {"head": {"kind": mapping, "init": "fitted", "fit": 0.01}, "epochs": 1}
        (warm,) = train(digits(**fit, **still))
        (fitted,) = train(digits(**fit, method="linear_probe"))
        assert warm.val_top1 == fitted.val_top1
        assert warm.val_loss == pytest.approx(fitted.val_loss, abs=1e-5)


@pytest.mark.slow
def test_a_warm_start_is_kept_over_an_interruption(digits, cache, tmp_path):
    config = digits(head={"init": "fitted", "fit": "90%"}, epochs=2)
    expected = [r.val_loss for r in train(config)]
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 4

    assert not list(train(config, folder=tmp_path, should_stop=stop))
    assert [r.val_loss for r in train(config, resume_from=tmp_path / CHECKPOINT)] == expected


@pytest.mark.parametrize("mapping", ["flm", "ilm"])
def test_the_first_mapping_comes_from_the_cache(digits, cache, forwards, monkeypatch, mapping):
    """No pass of their own over the data, and the same mapping."""
    config = digits(head={"kind": mapping}, epochs=1)
    list(train(config))
    (first,) = train(config)
    splits = loop.load(config).splits
    last_eval = len(splits.val) + len(splits.test)
    assert sum(forwards) == 3 * len(splits.train) + 2 * last_eval  # one pass for the cache, two epochs

    def by_a_pass(self: Method, epoch: int, batches, plain_predictions) -> None:
        counts = torch.zeros(self.backbone.source_classes, self.classes, dtype=torch.int32)
        with torch.inference_mode():
            for images, labels in batches():
                top = self.backbone(self.backbone.prepare(images), "logits").argmax(1)
                counts.index_put_((top, labels), torch.ones(len(labels), dtype=torch.int32), accumulate=True)
        self.mapping.index.copy_(training_matching(counts))

    from lorvp.mappings.base import greedy_matching as training_matching

    monkeypatch.setattr(Method, "start_epoch", by_a_pass)
    (passed,) = train(config)
    assert (first.val_loss, first.train_loss) == (passed.val_loss, passed.train_loss)


@pytest.mark.slow
def test_streamed_counts_are_those_of_the_training_passes(digits, cache, forwards, tmp_path):
    """The same first epoch, no other pass over the data, and the same result after an interruption."""
    plain = digits(head={"kind": "ilm"}, epochs=3)
    streamed = digits(head={"kind": "ilm", "counting": "streamed"}, epochs=3)
    by_pass = list(train(plain))
    passes = sum(forwards)
    forwards.clear()
    results = list(train(streamed))
    images = len(loop.load(plain).splits.train)
    assert passes - sum(forwards) == 3 * images  # two recounts, and the cache, which was there the second time
    assert results[0].val_loss == by_pass[0].val_loss
    assert results[-1].train_loss < results[0].train_loss
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 9

    first = list(train(streamed, folder=tmp_path, should_stop=stop))
    assert len(first) == 1
    continued = list(train(streamed, resume_from=tmp_path / CHECKPOINT))
    assert [r.val_loss for r in continued] == [r.val_loss for r in results]


@pytest.mark.slow
@pytest.mark.parametrize("ilm", ["streamed", "pass"])
def test_a_batch_that_the_device_cannot_hold_is_taken_in_parts(digits, cache, tmp_path, monkeypatch, capsys, ilm):
    """The result is that of the whole batch; in training, evaluation, a recount and the computation of features."""
    config = digits(head={"kind": "ilm", "counting": ilm}, epochs=2, eval_batch_size=64)
    expected = list(train(config, folder=tmp_path))
    method = lorvp.load(tmp_path / "bundle")
    images = datasets.load(config.dataset, 32).test
    hits = evaluate.hits(method, images, tmp_path)
    shutil.rmtree(cache)
    forward = Backbone.forward

    def small(self: Backbone, images: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(images) > 10:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return forward(self, images, *rest)

    prepare = Backbone.prepare

    def few(self: Backbone, images: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(images) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(self, images, *rest)

    monkeypatch.setattr(Backbone, "forward", small)
    monkeypatch.setattr(Backbone, "prepare", few)
    for ours, whole in zip(train(config), expected, strict=True):
        assert ours.train_loss == pytest.approx(whole.train_loss, abs=1e-5)
        assert ours.val_loss == pytest.approx(whole.val_loss, abs=1e-5)
    said = capsys.readouterr().out
    assert "out of device memory: batches of 64 are taken 8 at a time" in said  # of the first pass
    assert np.array_equal(evaluate.hits(method, images, tmp_path), hits)
    monkeypatch.setattr(Backbone, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("all full")))
    with pytest.raises(torch.OutOfMemoryError):
        list(train(config))


def test_what_is_computed_for_a_calibration_is_not_kept(digits, cache):
    calibrate(digits(head={"kind": "flm"}, epochs=1), threads=1)
    assert not cache.exists()
