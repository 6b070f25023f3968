from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorvp.errors import UserError
from lorvp.mappings.base import LabelMapping, count, greedy_matching, make_mapping
from lorvp.parts import kinds


def mapping(kind: str, source_classes: int, features: int, classes: int, **options: int) -> LabelMapping:
    return make_mapping(kinds("head")[kind](kind=kind, **options), source_classes, features, classes)


def published_matching(counts: torch.Tensor, steps: int | None = None) -> torch.Tensor:
    """The algorithm as its definition reads: argmax of the whole matrix, strike, repeat; or the first steps of it."""
    counts = counts.clone().long()
    index = torch.full((counts.shape[1],), -1)
    for _ in range(steps or counts.shape[1]):
        row, column = divmod(counts.flatten().argmax().item(), counts.shape[1])
        index[column] = row
        counts[row], counts[:, column] = -1, -1
    return index


@pytest.mark.parametrize("seed", range(40))
def test_matching_is_the_published_one(seed):
    random = np.random.default_rng(seed)
    classes = random.integers(1, 25)
    sources = classes + random.integers(0, 40)
    counts = random.integers(0, random.integers(1, 6), (sources, classes))  # many ties, many zeros
    counts[:, random.random(classes) < 0.3] = 0  # classes without an image
    counts = torch.from_numpy(counts)
    assert torch.equal(greedy_matching(counts), published_matching(counts))


def published_matching_of_several(counts: torch.Tensor, wanted: int) -> list[list[int]]:
    """IBM/AutoVP: the largest count is taken out; it binds if the source is free and the class has not enough."""
    counts = counts.clone().long()
    sources, classes = counts.shape
    bound: list[list[int]] = [[] for _ in range(classes)]
    free = set(range(sources))
    for _ in range(counts.numel()):
        source, label = divmod(counts.flatten().argmax().item(), classes)
        counts[source, label] = -1
        if source in free and len(bound[label]) < wanted:
            bound[label].append(source)
            free.discard(source)
    return bound


@pytest.mark.parametrize("seed", range(20))
def test_matching_of_several_is_the_published_one(seed):
    random = np.random.default_rng(seed)
    classes, wanted = random.integers(1, 9), int(random.integers(1, 5))
    sources = classes * wanted + random.integers(0, 20)
    counts = random.integers(0, random.integers(1, 6), (sources, classes))
    counts[:, random.random(classes) < 0.3] = 0
    counts = torch.from_numpy(counts)
    matched = greedy_matching(counts, wanted)
    assert matched.view(classes, wanted).tolist() == published_matching_of_several(counts, wanted)
    assert matched.shape == ((classes,) if wanted == 1 else (classes, wanted))
    assert len(matched.unique()) == classes * wanted


def test_matching_of_nothing_is_in_order():
    assert greedy_matching(torch.zeros(5, 3, dtype=torch.int32)).tolist() == [0, 1, 2]
    assert greedy_matching(torch.zeros(7, 3, dtype=torch.int32), 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="2 source classes can't be matched one to one"):
        greedy_matching(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="5 source classes can't be matched 2 to one with 3"):
        greedy_matching(torch.zeros(5, 3), 2)


@pytest.fixture(scope="module")
def full_size() -> torch.Tensor:
    """The counts of ImageNet-1K's 1.28 M images among 21,841 source classes."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(1000).repeat_interleave(1280)
    # each class mostly in a few source classes of its own, the rest anywhere
    own = labels * 21 + (torch.randn(len(labels), generator=random) * 3).long().abs()
    anywhere = torch.randint(21841, (len(labels),), generator=random)
    source = torch.where(torch.rand(len(labels), generator=random) < 0.5, own, anywhere).clamp(max=21840)
    return torch.bincount(source * 1000 + labels, minlength=21841 * 1000).view(21841, 1000).int()


class Work(TorchDispatchMode):
    """Counts what is done within: passes of torch over all cells of a matrix, and lines of `greedy_matching`."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.passes = 0
        self.lines = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = func not in (torch.ops.aten.view.default, torch.ops.aten.alias.default)
        self.passes += reads and any(isinstance(each, torch.Tensor) and each.numel() == self.cells for each in args)
        return func(*args, **(kwargs or {}))

    def trace(self, frame, event, argument):
        self.lines += event == "line"
        return self.trace if frame.f_code is greedy_matching.__code__ else None


def test_matching_at_full_size_is_little_work(full_size):
    """Not a pass over the matrix for each class, nor a line of Python for each count: fewer than there are classes."""
    before = sys.gettrace()
    with Work(full_size.numel()) as work:
        sys.settrace(work.trace)
        index = greedy_matching(full_size)
        sys.settrace(before)
    assert len(set(index.tolist())) == 1000
    assert 1 <= work.passes <= 3
    assert 1000 < work.lines < 20_000


@pytest.mark.alone
def test_matching_at_full_size_is_fast(full_size):
    """All of it in less than 20 of the 1,000 steps of the published way, which takes turns with it."""
    ours, steps = [], []
    for _ in range(5):
        start = time.perf_counter()
        greedy_matching(full_size)
        middle = time.perf_counter()
        published_matching(full_size, steps=5)
        ours.append(middle - start)
        steps.append((time.perf_counter() - middle) / 5)
    print(f"matching at full size: {min(ours):.2f} s, a step of the published way {min(steps):.3f} s")
    assert min(ours) < 20 * min(steps)


def test_counts_are_streamed_into_one_matrix():
    random = torch.Generator().manual_seed(0)
    batches = [(torch.randn(n, 7, generator=random), torch.randint(4, (n,), generator=random)) for n in (5, 9, 1)]
    counts = torch.zeros(7, 4, dtype=torch.int32)
    for logits, labels in batches:
        count(counts, logits.argmax(1), labels)
    expected = torch.zeros(7, 4, dtype=torch.int32)
    for logits, labels in batches:
        for source, label in zip(logits.argmax(1), labels, strict=True):
            expected[source, label] += 1
    assert torch.equal(counts, expected)
    assert counts.element_size() * 21841 * 1000 < 200 * 2**20


def test_random_mapping_is_injective_and_seeded():
    torch.manual_seed(3)
    first = mapping("rlm", 50, 8, 40).index
    torch.manual_seed(3)
    assert torch.equal(first, mapping("rlm", 50, 8, 40).index)
    assert len(set(first.tolist())) == 40


@pytest.mark.parametrize("kind", ["rlm", "flm", "ilm"])
def test_several_source_classes_are_averaged(kind):
    """In float64: the logit of a class is the mean of those of its source classes, which no other class reads."""
    torch.manual_seed(3)
    several = mapping(kind, 20, 8, 4, sources_per_class=5)
    assert several.index.shape == (4, 5)
    assert len(several.index.unique()) == 20
    source = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    logits = several(source)
    for image in range(6):
        for label in range(4):
            picked = [source[image, place].item() for place in several.index[label].tolist()]
            assert logits[image, label].item() == pytest.approx(sum(picked) / 5, abs=1e-12)
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), [source])
    expected = torch.zeros(6, 20, dtype=torch.float64)
    expected[:, several.index[2]] = 0.2
    torch.testing.assert_close(gradient, expected)


def test_one_source_class_is_read_as_it_is():
    torch.manual_seed(3)
    one = mapping("rlm", 20, 8, 4)
    torch.manual_seed(3)
    assert torch.equal(one.index, torch.randperm(20)[:4])
    source = torch.randn(6, 20)
    assert torch.equal(one(source), source[:, one.index])


def test_a_mapping_needs_enough_source_classes():
    with pytest.raises(UserError, match=r"head\.kind must be lp or fm"):
        mapping("ilm", 10, 8, 11)
    message = r"head\.sources_per_class 3 needs 12 source classes for the 4 classes, and the backbone has 11: .* most 2"
    with pytest.raises(UserError, match=message):
        mapping("flm", 11, 8, 4, sources_per_class=3)


@pytest.mark.slow
def test_frequency_mapping_finds_the_classes_of_real_photos(imagenette):
    from lorvp.config import BackboneConfig, DatasetConfig
    from lorvp.data.datasets import load
    from lorvp.data.loader import batches
    from lorvp.models.backbone import Backbone

    folder, weights = imagenette
    backbone = Backbone(
        BackboneConfig(
            name="mobilenetv2_100",
            checkpoint=weights,
            kwargs={"pad_type": "same"},
            image_size=224,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        "fp32",
    )
    splits = load(DatasetConfig(name="image_folder", root=folder, max_per_class=40), backbone.image_size)
    with torch.inference_mode():
        counts = torch.zeros(1000, 10, dtype=torch.int32)
        for pixels, labels in batches(splits.train, 64):
            count(counts, backbone(backbone.prepare(pixels), "logits").argmax(1), labels)
    assert greedy_matching(counts).tolist() == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
