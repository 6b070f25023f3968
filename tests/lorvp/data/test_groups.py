"""Groups of images that stay on one side of a split: tracks of traffic signs, patients."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make
from PIL import Image
from pydantic import ValidationError

from lorvp.config import DatasetConfig, GroupsConfig
from lorvp.data import datasets, groups
from lorvp.errors import UserError

TRACKS = {"pattern": "(.+)_"}


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """CLASS/TRACK_FRAME.png as in GTSRB: three signs of eight tracks each, whose five frames have one grey level."""
    for sign in range(3):
        folder = tmp_path / "signs" / f"{sign:05}"
        folder.mkdir(parents=True)
        for track in range(8):
            for frame in range(5):
                level = 80 * sign + 8 * track
                Image.new("L", (16, 16), level).save(folder / f"{track:05}_{frame:05}.png")
    return tmp_path / "signs"


def load(root: Path, name: str = "image_folder", size: int = 16, **options) -> datasets.Splits:
    return datasets.load(DatasetConfig(**{"name": name, "root": root, "val_fraction": 0.25} | options), size)


def levels(images: datasets.Images) -> set[int]:
    return set(images.read(range(len(images)))[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("kind", ["decoded", "by batch", "store", "encoded"])
def test_the_frames_of_a_track_are_on_one_side(signs, tmp_path, monkeypatch, kind):
    options = {"root": signs}
    if kind == "by batch":
        monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    if kind in ("store", "encoded"):
        made = make("image_folder", signs, tmp_path, size=None if kind == "encoded" else 16, encoded=kind == "encoded")
        options = {"root": made.folder, "name": "store"}
    apart, mixed = load(**options, groups=TRACKS), load(**options)
    sides = [levels(side) for side in (apart.train, apart.val, apart.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 24
    assert [len(side) for side in (apart.train, apart.val, apart.test)] == [75, 15, 30]
    assert [np.bincount(side.labels).tolist() for side in (apart.val, apart.test)] == [[5] * 3, [10] * 3]
    assert levels(mixed.train) & levels(mixed.val)
    again = load(**options, groups=TRACKS)
    assert again.val.digest == apart.val.digest
    seeds = {load(**options, groups=TRACKS, split_seed=seed).val.digest for seed in range(4)}
    assert len(seeds) > 1
    assert load(**options, groups=TRACKS, split_seed=3).test.digest == apart.test.digest


def test_limits_keep_groups_apart(signs):
    for options in ({"max_per_class": 12}, {"val_images": 20}, {"train_images": 30}, {"max_classes": 2}):
        fraction = {"val_fraction": None} if "val_images" in options else {}
        splits = load(signs, groups=TRACKS, **options, **fraction)
        assert len(splits.val)
        assert not levels(splits.train) & (levels(splits.val) | levels(splits.test)), options
    assert len(load(signs, groups=TRACKS, train_images=30).train) == 30


def test_a_level_of_folders(tmp_path):
    """CLASS/PATIENT/IMAGE, where a patient may have images of both classes."""
    for name, patients in (("ill", "abcdefgh"), ("well", "ghijklmn")):
        for number, patient in enumerate(patients):
            folder = tmp_path / "scans" / name / patient
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("L", (16, 16), 8 * "abcdefghijklmn".index(patient)).save(folder / f"{number}-{i}.png")
    made = make("image_folder", tmp_path / "scans", tmp_path, size=16, nested=True)
    splits = load(made.folder, "store", groups={"folder": 2})
    sides = [levels(side) for side in (splits.train, splits.val, splits.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 14
    assert all(len(np.unique(side.labels)) == 2 for side in (splits.train, splits.val, splits.test))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_of_a_table(tmp_path, kind):
    features = {"img": {"_type": "Image"}, "label": {"names": ["ill", "well"], "_type": "ClassLabel"}}
    cells = []
    for image in range(72):
        stream = io.BytesIO()
        Image.new("L", (16, 16), 8 * (image // 3)).save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    columns = {"img": cells, "label": [image // 36 for image in range(72)], "patient": [i // 3 for i in range(72)]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    source = tmp_path / "source"
    source.mkdir()
    if kind == "parquet":
        pq.write_table(table, source / "train-00000-of-00001.parquet", row_group_size=7)
    else:
        (source / "state.json").write_text("{}")
        with pa.ipc.new_stream(source / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
    made = make("huggingface", source, tmp_path, size=16, column="patient", name="scans")
    splits = load(made.folder, "store", groups={"column": "patient"})
    sides = [levels(side) for side in (splits.train, splits.val, splits.test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 24
    assert make("huggingface", source, tmp_path, size=16, column="patient", name="scans").folder == made.folder
    bare = make("huggingface", source, tmp_path, size=16, name="bare")
    for refused in (
        lambda: load(bare.folder, "store", groups={"column": "patient"}),
        lambda: make("huggingface", source, tmp_path, size=16, column="patient", name="bare"),
    ):
        with pytest.raises(UserError, match=r"bare-16: has no column patient: .* --column patient"):
            refused()
    with pytest.raises(UserError, match="has no column ward; it has img, label, patient"):
        make("huggingface", source, tmp_path, size=16, column="ward", name="other")
    with pytest.raises(UserError, match="a store's own columns are label and name"):
        make("huggingface", source, tmp_path, size=16, column="label", name="other")
    assert not (tmp_path / "other-16").exists()


def test_image_files_have_no_columns(signs, tmp_path):
    with pytest.raises(UserError, match="--column is about tables of huggingface"):
        make("image_folder", signs, tmp_path, column="patient")
    with pytest.raises(ValidationError, match=r"groups\.column is one of a store"):
        load(signs, groups={"column": "patient"})


def test_a_dataset_without_groups_is_what_it_was():
    config = DatasetConfig(name="digits")
    assert "groups" not in config.model_dump()
    signs = DatasetConfig(name="store", root=Path("/data"), groups=TRACKS)
    assert DatasetConfig.model_validate(signs.model_dump(mode="json")) == signs


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_split_by_groups_is_as_stratified_as_it_can_be(fraction, seed):
    """The number held back of each class is within a group of the fraction, and each class is on both sides."""
    random = np.random.default_rng(seed)
    of_group = np.repeat(np.arange(20), random.integers(2, 40, 20))  # groups of one class each
    sizes = random.integers(1, 30, len(of_group))
    ids, labels = np.repeat(np.arange(len(of_group)), sizes), np.repeat(of_group, sizes)
    rest, held = groups.split(labels, ids, fraction, seed)
    assert sorted([*rest, *held]) == list(range(len(labels)))
    assert not set(ids[rest]) & set(ids[held])
    for label in range(20):
        back, count = int((labels[held] == label).sum()), int((labels == label).sum())
        assert abs(back - fraction * count) <= sizes[of_group == label].max()
        assert 0 < back < count


def test_groups_of_several_classes_are_split_as_well():
    random = np.random.default_rng(0)
    ids = np.unique(random.integers(0, 400, 3_000), return_inverse=True)[1]
    labels = random.integers(0, 10, 3_000)
    _, held = groups.split(labels, ids, 0.2, 0)
    shares = np.bincount(labels[held]) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.01  # as scikit-learn's StratifiedGroupKFold
    tied = np.zeros(8, dtype=np.int64)  # one of two groups has all images of class 1, the other all of class 0
    tied[4:] = 1
    assert len(groups.split(tied, tied, 0.5, 0)[1]) == 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"pattern": "track(.)"}, "dataset.groups.pattern: track(.) matches no image of signs; it is missing for 0"),
        ({"pattern": "([01]/.+)_"}, "dataset.groups.pattern: ([01]/.+)_ matches 80 of 120 images of signs; it is"),
        ({"pattern": "png"}, "dataset.groups: all images of signs are one group"),
        ({"pattern": ".+"}, "dataset.groups: each image of signs is a group of its own"),
        ({"folder": 2}, "dataset.groups.folder: 2 is there for no image of signs; it is missing for 0"),
        ({"folder": 1}, "dataset image_folder: no class has the two groups"),
    ],
)  # fmt: skip
def test_groups_that_are_none(signs, wrong, error):
    with pytest.raises(UserError) as raised:
        load(signs, groups=wrong)
    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)


def test_groups_where_nothing_is_drawn(signs, image_root):
    (image_root / "val").rename(image_root / "test")
    (signs / ".." / "val").mkdir()
    for name in ("n01", "n02", "n03"):
        (image_root / "val" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(image_root / "val" / name / "a.png")
    with pytest.raises(UserError, match="has validation and test images of its own"):
        load(image_root, groups={"pattern": "n"}, val_fraction=None)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"groups": {}}, "give one of pattern"),
        ({"groups": {"pattern": "a", "folder": 1}}, "give one of pattern"),
        ({"groups": {"pattern": "(a"}}, "'(a' is no regular expression: missing ), unterminated subpattern"),
        ({"groups": TRACKS, "name": "digits", "root": None}, "have no names"),
        ({"groups": TRACKS, "val_from": 9, "train_images": 5, "val_images": 2}, "with val_from nothing is drawn"),
    ],
)
def test_groups_that_a_config_refuses(options, error):
    with pytest.raises(ValidationError) as raised:
        DatasetConfig.model_validate({"name": "store", "root": Path("/data")} | options)
    assert error in str(raised.value)
    assert GroupsConfig(pattern="(.+)_").folder is None
