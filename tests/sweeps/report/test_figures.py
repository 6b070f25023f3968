"""The figures of a sweep's report show what the trials' folders hold."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import digits_values
from matplotlib.axes import Axes
from PIL import Image
from support.samples import synthetic

from cluster.trial_folder import State, TrialFolder
from lorvp.bundle.format import DESCRIPTION, EXAMPLE, FORMAT_VERSION, PICTURE, PROMPTED
from lorvp.config import TrialConfig
from lorvp.utils.files import write_json
from sweeps.report.drawing import DARKER_IS_BETTER, lightness, png
from sweeps.report.figures import SECTIONS
from sweeps.report.space_figures import BINS, importances
from sweeps.results.comparison import val_top1
from sweeps.results.leaderboard import Entry
from sweeps.results.outcome import Outcome
from sweeps.simulate.curves import Curve
from sweeps.spec.model import Spec

CONTROL, HIGH = 75.0, 85.0
STEP = 1.5


class Stated:
    """Two points for each step of rank, two for fm, half a point an epoch; an epoch takes 1.5 s."""

    def curve(self, config: TrialConfig, control: bool) -> Curve:
        end = CONTROL if control else 70 + 2 * config.prompt.rank + 2 * (config.head.kind == "fm")
        values = [end - 0.5 * (config.epochs - epoch) for epoch in range(1, config.epochs + 1)]
        return Curve(values, [STEP] * config.epochs, config.epochs)

    def describe(self) -> str:
        return "stated"


def make_spec(folder: Path, **changes: Any) -> Spec:
    values = {
        "name": "done",
        "trial": digits_values(epochs=4),
        "space": {
            "head.kind": {"choice": ["lp", "fm", "ilm"]},
            "prompt.rank": {"choice": [1, 2, 4]},
            "prompt.lr": {"log_uniform": [0.01, 1]},
            "head.lr": {"log_uniform": [0.1, 1], "when": {"head.kind": ["lp", "fm"]}},
        },
        "search": {"algorithm": "tpe", "trials": 20},
        "output": folder,
    }
    return Spec.model_validate(values | changes)


@pytest.fixture
def sweep(tmp_path: Path) -> Spec:
    """20 trials: 14 finished, 4 stopped and 2 failed, which had been better than all others."""
    spec = make_spec(tmp_path)
    for trial in synthetic.make(spec, 20, stopped=4, failed=2, curves=Stated())[14:]:
        path = trial.newest().path / "results.jsonl"
        first, *later = map(json.loads, path.read_text().splitlines())
        path.write_text("".join(json.dumps(each) + "\n" for each in [first | {"val_top1": HIGH}, *later]))
    return spec


@pytest.fixture
def outcome(sweep: Spec) -> Outcome:
    return Outcome.read(sweep.folder)


def folders(spec: Spec) -> list[TrialFolder]:
    """Those of the search, without the control."""
    return [each for each in TrialFolder.requested(spec.trials) if each.name not in spec.control_names()]


def plots(outcome: Outcome, name: str) -> list[Axes]:
    return SECTIONS[name].make(outcome).axes


def texts(plot: Axes) -> list[str]:
    return [text.get_text() for text in plot.texts]


def columns(outcome: Outcome, name: str) -> dict[str, list[str]]:
    return {column.header: list(column.cells) for column in SECTIONS[name].make(outcome).columns}


def test_heat_map(sweep: Spec, outcome: Outcome):
    cells = defaultdict(list)
    for trial in folders(sweep):
        config = trial.config
        place = int(math.log10(config.prompt.lr / 0.01) / 2 * BINS)
        cells[config.head.kind, [1, 2, 4].index(config.prompt.rank), place].append(trial)
    passed_over = 0
    *panels, bar = plots(outcome, "heat_map")
    assert [panel.get_title() for panel in panels] == ["fm", "ilm", "lp"]
    assert bar.get_ylabel() == "best val top-1 (%)"
    for panel in panels:
        drawn = panel.images[0].get_array().filled(np.nan)
        written = {tuple(map(int, text.get_position())): text.get_text() for text in panel.texts}
        for (row, column), value in np.ndenumerate(drawn):
            trials = cells.pop((panel.get_title(), row, column), [])
            finished = [trial for trial in trials if trial.ended().state == State.FINISHED]
            if not trials:
                assert math.isnan(value)
                assert (column, row) not in written
                continue
            best = max(result["val_top1"] for trial in finished or trials for result in trial.results())
            passed_over += 0 < len(finished) < len(trials)
            assert value == best
            assert written[column, row] == f"{best:.1f}{'' if finished else '*'}\n({len(trials)})"
    assert not cells
    assert passed_over
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["1", "2", "4"]
    assert panels[0].get_xticklabels()[0].get_text() == "0.01\nto 0.022"


def test_a_heat_map_needs_one_of_its_axes(tmp_path):
    def made(name: str, space: dict[str, Any]) -> Any:
        spec = make_spec(tmp_path, name=name, space=space)
        synthetic.make(spec, 3, curves=Stated())
        return SECTIONS["heat_map"].make(Outcome.read(spec.folder))

    assert made("rank", {"prompt.rank": {"choice": [1, 2, 4]}}).axes[0].images[0].get_array().shape == (3, 1)
    assert made("rate", {"optimizer.lr": {"choice": [0.1, 0.2, 0.4]}}).axes[0].images[0].get_array().shape == (1, 3)
    assert made("neither", {"optimizer.momentum": {"uniform": [0.1, 0.9]}}) is None


def test_a_heat_map_of_one_trial_that_is_always_right(tmp_path):
    class Right(Stated):
        def curve(self, config: TrialConfig, control: bool) -> Curve:
            return Curve([100.0] * config.epochs, [STEP] * config.epochs, config.epochs)

    spec = make_spec(tmp_path)
    synthetic.make(spec, 1, curves=Right())
    figure = SECTIONS["heat_map"].make(Outcome.read(spec.folder))
    assert [text.get_text() for plot in figure.axes for text in plot.texts] == ["100.0\n(1)"]


def test_learning_curves(sweep: Spec, outcome: Outcome):
    (plot,) = plots(outcome, "curves")
    lines = {line.get_gid(): line for line in plot.lines if line.get_gid()}
    trials = folders(sweep)
    assert set(lines) == {trial.name for trial in trials}
    for trial in trials:
        line, results = lines[trial.name], trial.results()
        assert list(line.get_xdata()) == [result["epoch"] for result in results]
        assert list(line.get_ydata()) == [result["val_top1"] for result in results]
        styles = {State.FINISHED: ("-", "None"), State.STOPPED: ("--", "None"), State.FAILED: (":", "x")}
        assert (line.get_linestyle(), line.get_marker()) == styles[trial.ended().state]
    stopped, finished = (
        next(lines[trial.name].get_alpha() for trial in trials if trial.ended().state == state)
        for state in (State.STOPPED, State.FINISHED)
    )
    assert stopped < finished
    labels = {line.get_label(): line for line in plot.lines if not line.get_label().startswith("_")}
    assert set(labels) == {
        "finished (14)",
        "stopped (4)",
        "failed (2)",
        f"best, {outcome.best().trial.name}",
        f"control, {CONTROL:.2f} %",
    }
    assert set(labels[f"control, {CONTROL:.2f} %"].get_ydata()) == {CONTROL}
    best = labels[f"best, {outcome.best().trial.name}"]
    assert list(best.get_ydata()) == list(lines[outcome.best().trial.name].get_ydata())
    assert best.get_linewidth() > 2 * lines[outcome.best().trial.name].get_linewidth()


def test_near_the_top_each_half_of_the_error_takes_as_much_room(tmp_path):
    class High(Stated):
        def curve(self, config: TrialConfig, control: bool) -> Curve:
            return Curve([20.0, 90.0, 95.0, 97.5][-config.epochs :], [STEP] * config.epochs, config.epochs)

    spec = make_spec(tmp_path)
    synthetic.make(spec, 3, curves=High())
    outcome = Outcome.read(spec.folder)
    (plot,) = plots(outcome, "curves")
    y = [plot.transData.transform((1, value))[1] for value in (20.0, 90.0, 95.0, 97.5)]
    low, high = (plot.transData.transform((1, end))[1] for end in plot.get_ylim())
    assert low < y[0] < y[-1] < high
    assert (y[2] - y[1]) / (y[3] - y[2]) == pytest.approx(1, abs=0.2)
    assert [tick for tick in plot.get_yticks() if 20 <= tick <= 97.5] == [20, 40, 60, 70, 80, 90, 95]
    assert plot.get_ylim()[1] < 100


def test_parallel_coordinates(sweep: Spec, outcome: Outcome):
    (plot,) = plots(outcome, "parallel")
    others, lines = plot.collections
    assert len(others.get_segments()) == 6
    finished = [entry for entry in outcome.board.search_entries() if entry.finished]
    assert len(lines.get_segments()) == len(finished) == 14
    tops = [val_top1(entry) for entry in finished]
    for entry, segment in zip(reversed(finished), lines.get_segments(), strict=True):
        config = entry.trial.config
        rank, rate = [1, 2, 4].index(config.prompt.rank) / 2, math.log10(config.prompt.lr / 0.01) / 2
        assert segment[:3, 1] == pytest.approx([["lp", "fm", "ilm"].index(config.head.kind) / 2, rank, rate])
        without = config.head.kind == "ilm"
        assert (segment[3, 1] < 0) == without
        assert without or segment[3, 1] == pytest.approx(math.log10(config.head.lr / 0.1))
        assert segment[4, 1] == pytest.approx((val_top1(entry) - min(tops)) / (max(tops) - min(tops)))
    shades = [lightness(colour) for colour in lines.get_colors()]
    assert shades == sorted(shades, reverse=True)
    assert shades[0] > shades[-1]
    assert [label.get_text() for label in plot.get_xticklabels()][-1] == "val_top1"
    assert {"lp", "fm", "ilm", "none", "0.01"} <= set(texts(plot))


def test_importance(sweep: Spec, outcome: Outcome):
    entries = [entry for entry in outcome.board.search_entries() if entry.finished]
    found = importances(sweep, entries)
    assert next(iter(found)) == "prompt.rank"  # 6 points between its ends, 2 by the label mapping
    assert found["prompt.rank"] > 0.6
    assert set(found) == set(sweep.space)  # the one that exists under a condition among them
    assert 0 <= min(found.values()) <= sum(found.values()) - found["head.lr"] <= 1
    assert importances(sweep, entries) == found
    (plot,) = plots(outcome, "importance")
    assert [bar.get_width() for bar in plot.patches] == list(found.values())
    labels = [label.get_text() for label in plot.get_yticklabels()]
    having = sum(entry.trial.config.head.kind != "ilm" for entry in entries)
    assert labels[0] == "rank (14 trials)"
    assert f"head.lr ({having} trials)" in labels
    assert importances(sweep, entries[:3]) == {}
    assert importances(sweep, entries[:1] * 5) == {}


def test_accuracy_against_seconds(sweep: Spec, outcome: Outcome):
    (plot,) = plots(outcome, "budget")
    line = plot.lines[0]
    epochs = sorted((r["time"], r, trial) for trial in folders(sweep) for r in trial.results())
    assert line.get_xdata()[-1] == pytest.approx(STEP * len(epochs)) == STEP * (14 * 4 + 6 * 2)
    best = [r["val_top1"] if trial.ended().state == State.FINISHED else 0 for _, r, trial in epochs]
    assert list(line.get_ydata()) == [max(best[: i + 1]) for i in range(len(best))]
    assert plot.get_xlabel().startswith("seconds")  # the profile says nothing of a GPU


def test_packed_trials_share_their_seconds_and_shares_have_a_line_each(tmp_path):
    spec = make_spec(tmp_path, search={"algorithm": "tpe", "trials": 6, "equal": "prompt.rank"}, cluster="rtx8000")
    synthetic.make(spec, 6, curves=Stated())
    for path in spec.folder.glob("trials/*/attempts/*/results.jsonl"):
        path.write_text(path.read_text().replace('"packed": 1', '"packed": 2'))
    (plot,) = plots(Outcome.read(spec.folder), "budget")
    ranks = [trial.config.prompt.rank for trial in folders(spec)]
    lines = {line.get_label(): line for line in plot.lines[:-1]}
    assert set(lines) == {f"rank {rank}" for rank in ranks}
    for name, line in lines.items():
        assert line.get_xdata()[-1] == pytest.approx(STEP / 2 * 4 * ranks.count(int(name[5:])))
    assert len({line.get_linestyle() for line in lines.values()}) == len(lines) == 3
    assert plot.get_xlabel().startswith("GPU-seconds")


def test_gain_over_the_control(sweep: Spec, outcome: Outcome):
    (plot,) = plots(outcome, "gain")
    ends = [trial.results()[-1]["val_top1"] for trial in folders(sweep) if trial.ended().state == State.FINISHED]
    assert [bar.get_height() for bar in plot.patches] == sorted((end - CONTROL for end in ends), reverse=True)
    assert texts(plot) == [f"{bar.get_height():+.1f}" for bar in plot.patches]
    names = [label.get_text() for label in plot.get_xticklabels()]
    assert names[0] in [entry.trial.name for entry in outcome.board.search_entries() if val_top1(entry) == max(ends)]


def test_gain_in_a_confirmation(tmp_path):
    class Lucky(Stated):
        def curve(self, config: TrialConfig, control: bool) -> Curve:
            curve = super().curve(config, control)
            return Curve([value + config.init_seed**2 / 10 for value in curve.values], curve.seconds, curve.known)

    spec = make_spec(tmp_path, confirm={"top": 2, "seeds": [1, 2, 3]})
    synthetic.make(spec, 5, curves=Lucky())
    outcome = Outcome.read(spec.folder)
    (plot,) = plots(outcome, "gain")
    control = outcome.comparison.control
    differences = [row.difference(control, val_top1) for row in outcome.comparison.rows if row is not control]
    val = plot.containers[:2]
    assert [each.lines[0].get_ydata()[0] for each in val] == pytest.approx([found.mean for found in differences])
    ends = [each.lines[2][0].get_segments()[0][:, 1].tolist() for each in val]
    assert ends == [pytest.approx([found.low, found.high]) for found in differences]
    shown = columns(outcome, "confirmation")
    assert shown["trial"] == [row["trial"] for row in outcome.comparison.cells()]
    assert shown["val top-1"] == [row["val top-1"] for row in outcome.comparison.cells()]


def bundle(entry: Entry, **values: Any) -> Path:
    """What a trial left, as far as a report looks."""
    entry.bundle.mkdir()
    source = {"digest": "", "precision": "fp32"}
    needed = {"config": entry.trial.config.model_dump(mode="json"), "class_names": ["0"], "source": source}
    write_json(entry.bundle / DESCRIPTION, {"format_version": FORMAT_VERSION} | needed | values)
    return entry.bundle


def test_prompts(outcome: Outcome):
    assert SECTIONS["prompts"].make(outcome) is None  # no bundle says anything
    values = [[3.0, 2.0, 1.0], [2.5, 2.0, 0.5], [1.0, 0.5, 0.0]]
    entries = outcome.board.search_entries()[:3]
    first = bundle(entries[0], prompt={"largest": 0.25, "singular_values": values})
    for shade, name in enumerate((PICTURE, EXAMPLE, PROMPTED)):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(first / name)
    bundle(entries[1])
    bundle(entries[2], format_version=FORMAT_VERSION - 2)
    figure = SECTIONS["prompts"].make(outcome)
    picture, spectrum, example, prompted = figure.axes
    assert [plot.images[0].get_array()[0, 0, 0] for plot in (picture, example, prompted)] == [0, 1, 2]
    assert [list(line.get_ydata()) for line in spectrum.lines] == values
    assert len({(line.get_linestyle(), line.get_marker()) for line in spectrum.lines}) == 3
    assert "0.25" in picture.get_title()
    _, said, older = [row.texts[-1].get_text() for row in figure.subfigs]
    assert said == "no prompt to show: the method has none on the image"
    assert f"bundle format {FORMAT_VERSION - 2}" in older.replace("\n", " ")
    assert outcome.best().trial.name in figure.subfigs[0].get_suptitle()


def test_tables(sweep: Spec, outcome: Outcome):
    shown = columns(outcome, "leaderboard")
    assert shown["trial"][:-1] == [entry.trial.name for entry in outcome.board.search_entries()]
    assert shown["trial"][-1] == outcome.control().trial.name
    failed = [trial for trial in folders(sweep) if trial.ended().state == State.FAILED]
    shown = columns(outcome, "failures")
    assert dict(zip(shown["trial"], shown["cause"], strict=True)) == {t.name: t.ended().cause for t in failed}
    assert shown["reason"] == [f"as if: {cause}" for cause in shown["cause"]]
    assert SECTIONS["confirmation"].make(outcome) is None


def test_lightness_falls_evenly():
    shades = [lightness(DARKER_IS_BETTER(i)) for i in range(DARKER_IS_BETTER.N)]
    falls = [before - after for before, after in pairwise(shades)]
    assert min(falls) > 0
    assert shades[0] - shades[-1] > 0.6
    assert max(falls) < 5 * sum(falls) / len(falls)


def test_pictures_are_whole(outcome: Outcome):
    """Nothing is drawn beyond the picture: a margin without ink is all around."""
    for name in ("heat_map", "gain", "parallel"):
        path = Path(outcome.spec.folder / f"{name}.png")
        path.write_bytes(png(SECTIONS[name].make(outcome)))
        pixels = np.asarray(Image.open(path).convert("L"))
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edges.min() == 255, name
