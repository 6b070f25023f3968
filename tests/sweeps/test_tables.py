"""The tables over several sweeps, from folders as their drivers leave them; and what other tools read of them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import digits_values
from support.samples.confirmed import confirmed, make_confirmed, ran, searched
from typer.testing import CliRunner

from lorvp.config import BackboneConfig, DatasetConfig
from lorvp.errors import UserError
from lorvp.utils.files import write_json
from sweeps import tables
from sweeps.folder import RECORD
from sweeps.results import confirm
from sweeps.results import rows as results
from sweeps.results.leaderboard import Leaderboard
from sweeps.results.outcome import Outcome
from sweeps.spec.model import Spec

MINE, THEIRS = ([79, 82, 81], [70, 75, 74]), ([76, 77, 75], [73, 74.5, 72.5])


def record(spec: Spec) -> Path:
    write_json(spec.folder / RECORD, {"id": "1", "spec": spec.model_dump(mode="json", by_alias=True)})
    return spec.folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Confirmed under three seeds: two shares and their control."""
    spec = make_confirmed(tmp_path)
    searched(spec)
    low_rank, border, control = confirm.choose(spec)
    confirmed(spec, low_rank, *MINE)
    confirmed(spec, border, [50, 51, 52], [60, 60, 60])
    confirmed(spec, control, *THEIRS)
    return record(spec)


def unconfirmed(folder: Path, **trial: object) -> Path:
    """A search of two trials and its control, on the whole of CIFAR-100."""
    folder.mkdir()
    dataset = {"name": "store", "root": str(folder / "cifar100-32")}
    values = digits_values(
        dataset=dataset, backbone={"name": "resnet18.tv_in1k"}, method="ilm_vp", head={"kind": "ilm"}
    )
    spec = Spec.model_validate(
        {
            "name": "search_only",
            "trial": values | trial,
            "space": {"prompt.inner": {"choice": [100, 128]}},
            "search": {"algorithm": "grid"},
            "output": folder,
        }
    )
    for config, val in zip(map(spec.trial_config, spec.cells()), (20, 30), strict=True):
        ran(spec, config, val, val - 5)
    for config in spec.control_configs():
        ran(spec, config, 40, 41)
    return record(spec)


def rewrite(folder: Path, before: str, after: str) -> None:
    for path in folder.glob("trials/*/attempts/*/results.jsonl"):
        path.write_text(path.read_text().replace(before, after))


def ood_rows(trial: str, control: str) -> list[dict]:
    """As sweeps.ood writes them: the plain test images, an OOD set, and two corruptions."""
    rows = []
    for model, name, shift in (("best", trial, 0.0), ("control", control, -10.0)):
        for data, corruption, top1 in (
            ("digits", None, 90.0),
            ("imagenet-r-224", None, 40.0),
            ("digits", "blur", 80.0),
            ("digits", "noise", 70.0),
        ):
            rows.append({"model": model, "data": data, "corruption": corruption, "top1": top1 + shift, "trial": name})
    return rows


def test_rows(sweep: Path, tmp_path: Path):
    """A confirmed sweep has a row for each share, another one row that says that nothing confirmed it."""
    low_rank = next(row for row in Outcome.read(sweep).comparison.rows if row.value == "low_rank")
    control = Outcome.read(sweep).comparison.control
    rows = ood_rows(low_rank.entries[1].trial.name, control.entries[0].trial.name)
    pq.write_table(pa.Table.from_pylist(rows), sweep / results.OOD)
    other = unconfirmed(tmp_path / "other")
    shown = CliRunner().invoke(tables.app, [str(sweep), str(other), "--out", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    second, first, third = pq.read_table(tmp_path / "out" / "tables.parquet").to_pylist()  # by the method's name
    assert [second["method"], third["method"]] == ["border", "ilm_vp"]
    assert (first["network"], first["pretraining"], first["dataset"]) == ("lorvp_tiny_32", "cifar10", "digits (part)")
    assert (first["method"], first["rank"], first["epochs"], first["batch_size"]) == ("lorvp", 2, 3, 32)
    assert (first["n"], first["confirmed"], first["select"]) == (3, True, "val")
    assert (first["top1"], first["top1_sd"]) == pytest.approx((73, math.sqrt(7)))
    assert first["control_top1"] == pytest.approx(sum(THEIRS[1]) / 3)
    # by hand: differences -3, 0.5, 1.5: mean -1/3, sd sqrt(67/12); t of 2 degrees of freedom at 97.5 % is 4.302653
    half = 4.302653 * math.sqrt(67 / 12 / 3)
    found = first["difference_mean"], first["difference_low"], first["difference_high"]
    assert found == pytest.approx((-1 / 3, -1 / 3 - half, -1 / 3 + half))
    assert (first["ood.imagenet-r.best"], first["ood.imagenet-r.control"]) == (40, 30)
    assert (first["ood.corrupted.best"], first["ood.corrupted.control"]) == (75, 65)
    assert (second["rank"], second["ood.corrupted.best"], second["published_top1"]) == (None, None, None)
    assert (third["network"], third["dataset"], third["label_mapping"]) == ("resnet18", "cifar100", "ilm")
    assert (third["top1"], third["top1_sd"], third["n"], third["confirmed"]) == (25, None, 1, False)
    assert (third["control_top1"], third["difference_mean"], third["difference_low"]) == (41, -16, None)
    cited = results.published()["resnet18", "in1k", "cifar100", "ilm_vp", "ilm"]
    assert (third["published_top1"], third["published_source"]) == (cited.top1, cited.source)
    text = (tmp_path / "out" / "tables.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert lines[3].endswith("| 40.00 (30.00) | 75.00 (65.00) | unknown | val |")
    assert third["published_differs"] == f"200 epochs; {cited.note}"
    assert lines[4].endswith(f"| - | - | {cited.top1} (200 epochs; {cited.note}) | val, {tables.NOT_CONFIRMED} |")
    assert cited.source in text


def test_ood_figures_of_another_trial_are_left_out(sweep: Path):
    """A sweep that was made longer may have another best config than when it was evaluated."""
    pq.write_table(pa.Table.from_pylist(ood_rows("000000000000", "1")), sweep / results.OOD)
    assert [result.ood for result in results.results(sweep)] == [{}, {}]
    (sweep / results.OOD).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"ood.parquet: damaged .*python -m sweeps.ood writes it anew"):
        list(results.results(sweep))


def test_the_published_protocol_is_marked(tmp_path: Path):
    folder = unconfirmed(tmp_path / "other", select="test_best_epoch")
    rewrite(folder, '"test_top1": null', '"test_top1": 70')
    (result,) = results.results(folder)
    assert (result.top1.mean, tables.protocol(result)) == (70, f"{tables.BIASED}, {tables.NOT_CONFIRMED}")
    tables.command([folder], tmp_path)
    assert "docs/protocol.md" in (tmp_path / "tables.md").read_text()


def test_latex_is_escaped(sweep: Path, tmp_path: Path):
    """Every row has as many cells as the head, and no character that LaTeX would take for its own."""
    CliRunner().invoke(tables.app, [str(sweep), "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out" / "tables.tex").read_text().splitlines()
    assert [line for line in lines if line.startswith("\\") and "&" not in line] == [
        lines[0],
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 1 + 2
    assert len({line.count("&") for line in rows}) == 1
    assert lines[0] == f"\\begin{{tabular}}{{{'l' * (rows[0].count('&') + 1)}}}"
    assert r"lorvp\_tiny\_32" in rows[2]
    assert r"73.00 $\pm$ 2.65" in rows[2]
    assert not any(character in line.replace(r"\_", "") for line in rows for character in "_%#±")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18.tv_in1k", ("resnet18", "in1k")),
        ("vit_base_patch32_224.augreg_in21k_ft_in1k", ("vit_base_patch32_224", "in21k_ft_in1k")),
        ("vit_base_patch16_224_miil.in21k", ("vit_base_patch16_224", "in21k_p")),
        ("mixer_b16_224.miil_in21k_ft_in1k", ("mixer_b16_224", "in21k_p_ft_in1k")),
        ("swin_base_patch4_window7_224.ms_in22k", ("swin_base_patch4_window7_224", "in22k")),
        ("vit_base_patch32_clip_224.openai", ("vit_base_patch32_clip_224", "openai")),
        ("resnet50", ("resnet50", "unknown")),
    ],
)
def test_networks_by_timms_names(name: str, expected: tuple[str, str]):
    assert results.network(BackboneConfig(name=name)) == expected


def test_networks_without_a_tag():
    assert results.network(BackboneConfig(name="resnet50", pretrained=False)) == ("resnet50", "none")
    own = BackboneConfig(name="resnet50", checkpoint="weights/resnet50_21k.safetensors")
    assert results.network(own) == ("resnet50", "resnet50_21k")


@pytest.mark.parametrize(
    ("trial", "key"),
    [
        ({}, ("resnet18", "in1k", "cifar100", "ilm_vp", "ilm")),
        ({"head": {"kind": "flm"}}, None),
        ({"method": "full_image"}, ("resnet18", "in1k", "cifar100", "full_image", "ilm")),
        ({"method": "border"}, None),
        ({"method": "lorvp"}, None),
        ({"backbone": {"name": "resnet50.tv2_in1k"}}, ("resnet50", "in1k", "cifar100", "ilm_vp", "ilm")),
        (
            {"method": "autovp", "backbone": {"name": "vit_base_patch32_clip_224.openai"}, "head": {"kind": "lp"}},
            ("clip", "openai", "cifar100", "autovp", None),
        ),
    ],
)
def test_a_published_figure_is_of_the_same_method_prompt_and_mapping(trial: dict, key: tuple | None, tmp_path: Path):
    """A trial of another mapping or prompt has none beside it."""
    folder = unconfirmed(tmp_path / "other", **trial)
    rewrite(folder, '"test_top1": null', '"test_top1": 70')
    (result,) = results.results(folder)
    figures = results.published()
    assert result.published(figures) is (None if key is None else figures[key])


def test_learning_rates_are_those_of_the_parts_that_steps_train(tmp_path: Path):
    """Of a head that was fitted to the end there is none, though its config has one."""
    backbone = {"name": "vit_base_patch16_224.orig_in21k"}
    parts = {"prompt": {"lr": 0.5}, "adapter": {"lr": 0.25}, "head": {"kind": "lp", "lr": 0.1}}
    folder = unconfirmed(tmp_path / "other", method="ilm_vp+vpt", backbone=backbone, **parts)
    rewrite(folder, '"lr": {}', '"lr": {"adapter": 0.2, "head": 0.1, "prompt": 0.3}')
    (result,) = results.results(folder)
    row = result.record(None)
    assert [row[f"lr_{part}"] for part in ("prompt", "adapter", "head")] == [0.5, 0.25, 0.1]
    assert tables.cells(result, None, [])["LR"] == "prompt 0.5, adapter 0.25, head 0.1"
    rewrite(folder, '"head": 0.1, ', "")
    (result,) = results.results(folder)
    assert result.lrs() == {"prompt": 0.5, "adapter": 0.25}


def test_datasets_by_their_stores():
    store = DatasetConfig(name="store", root="/data/tiny-imagenet-64")
    assert results.dataset(store) == "tiny-imagenet"
    assert results.dataset(store.model_copy(update={"max_per_class": 9})) == "tiny-imagenet (part)"
    assert results.dataset(DatasetConfig(name="image_folder", root="/data/flowers-17")) == "flowers-17"


def test_published_figures_are_checked(tmp_path: Path):
    """Unknown keys, figures without a source, two for one cell."""
    path = tmp_path / "published.yaml"
    figure = "{network: n, pretraining: p, dataset: d, method: m, top1: 50, source: Table 1}"
    for text, message in (
        (
            f"figures: [{figure.replace('top1', 'top_1')}]",
            "published.yaml:1: figures[0].top_1: no such key",
        ),
        (f"figures: [{figure.replace('Table 1', '')}]", "published.yaml:1: figures[0].source"),
        (f"figures: [{figure}, {figure}]", "figures names n, p, d, m twice"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as error:
            results.published(path)
        assert message in str(error.value)


def test_sweeps_that_have_nothing_for_a_table(tmp_path: Path):
    with pytest.raises(UserError, match="no such sweep"):
        tables.command([tmp_path], tmp_path / "out")
    folder = unconfirmed(tmp_path / "other", read_test=False)
    rewrite(folder, '"test_top1": 25', '"test_top1": null')
    with pytest.raises(UserError, match="its trials never read the test set"):
        tables.command([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pandas_and_polars_read_the_results_as_they_are(sweep: Path, tmp_path: Path):
    outcome = Outcome.read(sweep)
    outcome.board.write_parquet(sweep / "results.parquet")
    outcome.comparison.write()
    CliRunner().invoke(tables.app, [str(sweep), "--out", str(tmp_path)])
    files = (
        (sweep / "results.parquet", "trial"),
        (sweep / "comparison.parquet", "n"),
        (tmp_path / "tables.parquet", "n"),
    )
    for path, column in files:
        rows = pq.read_table(path).to_pylist()
        assert polars.read_parquet(path).to_dicts() == rows
        frame = pandas.read_parquet(path)
        assert list(frame.columns) == list(rows[0])
        assert frame[column].tolist() == [row[column] for row in rows]
    best = polars.read_parquet(sweep / "results.parquet").filter(
        ~polars.col("control"), stage="search", state="finished"
    )
    assert best.sort("val_top1").row(-1, named=True)["trial"] == Leaderboard.read(outcome.spec).best().trial.name
    frame = pandas.read_parquet(sweep / "results.parquet")
    assert frame.query("stage == 'search' and not control and state == 'finished'").val_top1.max() == 80
