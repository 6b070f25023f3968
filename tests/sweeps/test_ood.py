"""The best bundle of a sweep beside its control's: on OOD sets and on corrupted images, from a sweep's folder."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import digits_values, make
from typer.testing import CliRunner

from cluster.trial_folder import State, TrialFolder
from lorvp import evaluate
from lorvp.bundle import format as bundle_format
from lorvp.bundle import io as bundle
from lorvp.config import TrialConfig
from lorvp.data.corruptions import CORRUPTIONS
from lorvp.data.store import Store
from lorvp.errors import UserError
from lorvp.training.loop import train
from lorvp.utils.files import write_json
from sweeps import ood
from sweeps.folder import RECORD
from sweeps.results.outcome import Outcome
from sweeps.results.rows import OOD
from sweeps.spec.model import Spec

pytestmark = pytest.mark.slow


def carried_out(**values: object) -> Outcome:
    """A sweep of two trials and their control, trained in this process."""
    space = {"prompt.rank": {"choice": [1, 2]}}
    spec = Spec.model_validate({"name": "done", "space": space, "search": {"algorithm": "grid"}} | values)
    spec.folder.mkdir()
    write_json(spec.folder / RECORD, {"id": "1", "spec": spec.model_dump(mode="json", by_alias=True)})
    for config in [*spec.control_configs(), *map(spec.trial_config, spec.cells())]:
        attempt = TrialFolder.request(spec.trials, config).claim()
        for result in train(TrialConfig.model_validate(config.model_dump()), attempt.path):
            attempt.append(asdict(result))
        attempt.end(State.FINISHED)
    return Outcome.read(spec.folder)


def rows_of(outcome: Outcome) -> list[dict]:
    return pq.read_table(outcome.spec.folder / OOD).to_pylist()


@pytest.fixture
def on_stores(image_root: Path, tmp_path: Path) -> Outcome:
    """Of a sweep on a store of `imagenet`, beside which lie: two of its OOD sets, one of another size, a dataset of
    its own, and one whose name only begins alike.
    """
    data = tmp_path / "data"
    own = make("imagenet", image_root, data, size=32).folder
    shutil.copytree(image_root / "val", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "n02")
    make("imagenet-r", tmp_path / "part", data, size=32)
    make("imagenet-sketch", image_root / "val", data, size=32)
    make("imagenet-a", tmp_path / "part", data, size=48)
    make("image_folder", image_root, data, size=32, name="imagenette")
    return carried_out(
        output=tmp_path,
        trial=digits_values(dataset={"name": "store", "root": own, "val_fraction": 0.25}, epochs=2, batch_size=9),
    )


def test_sets_beside_a_store(on_stores: Outcome):
    """Its family alone; what does not fit is said and left out; the figures are those of lorvp.evaluate."""
    folder = on_stores.spec.folder
    shown = CliRunner().invoke(ood.app, [str(folder), "--batch-size", "5"])
    assert shown.exit_code == 0
    assert shown.output.count("imagenet-a-48: stored at 48 px, and the backbone takes 32") == 1
    rows = rows_of(on_stores)
    for model, entry in (("best", on_stores.best()), ("control", on_stores.control())):
        found = [row for row in rows if row["model"] == model]
        assert [row["data"] for row in found] == ["imagenet-32"] * 13 + ["imagenet-r-32", "imagenet-sketch-32"]
        assert [(row["corruption"], row["strength"]) for row in found if row["corruption"]] == [
            (corruption.kind, corruption.strength) for corruption in CORRUPTIONS
        ]
        bundled = entry.trial.newest().bundle
        assert {row["trial"] for row in found} == {entry.trial.name}
        assert {row["bundle"] for row in found} == {bundle_format.describe(bundled)["sha256"]}
        method, sets = bundle.load(bundled), Path(on_stores.spec.trial["dataset"]["root"]).parent
        for row in (found[0], *found[-2:]):
            expected = asdict(evaluate.evaluate(method, Store.open(sets / row["data"])))
            assert {key: row[key] for key in expected} == expected
        assert found[0]["top1"] == pytest.approx(entry.test_top1())
        assert [row["classes"] for row in found[-2:]] == [2, 3]
    for best, control in zip(rows[:15], rows[15:], strict=True):
        assert best["difference"] == pytest.approx(best["top1"] - control["top1"])
        assert best["difference_low"] <= best["difference"] <= best["difference_high"]
        assert control["difference"] is None


def test_sets_that_are_named(on_stores: Outcome, tmp_path: Path):
    """They alone, and an error for what does not fit; nothing is written then."""
    data, folder = tmp_path / "data", on_stores.spec.folder
    with pytest.raises(UserError, match="stored at 48 px, and the backbone takes 32"):
        ood.command(folder, [data / "imagenet-r-32", data / "imagenet-a-48"])
    (tmp_path / "part" / "n01").rename(tmp_path / "part" / "n09")
    unknown = make("imagenet-a", tmp_path / "part", data, size=32).folder
    with pytest.raises(UserError, match=f"{unknown}: 1 of its classes are not the bundle's: n09"):
        ood.command(folder, [unknown])
    with pytest.raises(UserError, match="nothing: no prepared dataset"):
        ood.command(folder, [data / "nothing"])
    assert not (folder / OOD).exists()
    ood.command(folder, [data / "imagenet-r-32"], corruptions=False)
    assert [row["data"] for row in rows_of(on_stores)] == ["imagenet-32", "imagenet-r-32"] * 2


def test_a_sweep_without_a_store(tmp_path: Path):
    """On its own test images; without a control alone; and not with a bundle that was altered."""
    outcome = carried_out(output=tmp_path, trial=digits_values(epochs=1), control=None)
    folder = outcome.spec.folder
    shown = CliRunner().invoke(ood.app, [str(folder)])
    assert shown.exit_code == 0, shown.output
    rows = rows_of(outcome)
    assert {(row["model"], row["difference"]) for row in rows} == {("best", None)}
    assert [row["data"] for row in rows] == ["digits"] * 13
    assert rows[0]["top1"] == pytest.approx(outcome.best().test_top1())
    tensors = next(path for path in outcome.best().trial.newest().bundle.iterdir() if path.suffix == ".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match="altered since the bundle was written"):
        ood.command(folder)
    tensors.unlink()
    with pytest.raises(UserError, match="missing from the bundle"):
        ood.command(folder)
    with pytest.raises(UserError, match="no such sweep"):
        ood.command(tmp_path / "elsewhere")
