"""What a sweep found, read from its trials' folders: the order of the trials, the gain over the control, a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from cluster.trial_folder import End, State, TrialFolder
from lorvp.utils.files import replacing
from sweeps.results.paired import Gain, Paired, compare, in_words
from sweeps.spec.choices import milestones
from sweeps.spec.model import Spec, Stage

MARKS = {State.FINISHED: "", State.STOPPED: "stopped early", State.FAILED: "failed"}


@dataclass(frozen=True)
class Entry:
    """One trial, with the epochs that it recorded."""

    trial: TrialFolder
    params: dict[str, Any]
    """Its values on the axes of the space, those that it has."""
    control: bool
    stage: Stage
    results: list[dict[str, Any]]
    end: End | None

    @property
    def finished(self) -> bool:
        """Whether the trial trained to its last epoch."""
        return self.end is not None and self.end.state == State.FINISHED

    @property
    def full_fidelity(self) -> list[dict[str, Any]]:
        """The epochs at full size on all images; of a trial that never got there, those of its rungs."""
        return [result for result in self.results if result["whole"]] or self.results

    def best(self) -> dict[str, Any]:
        """Return the epoch whose prompt the bundle holds: best on the validation set, or as published on the test set.

        Where the validation set was trained on it is the last.
        """
        protocol = self.trial.config.select
        if protocol == "val" and self.trial.config.dataset.train_on_val:
            return self.full_fidelity[-1]
        return max(self.full_fidelity, key=lambda r: r["val_top1"] if protocol == "val" else r["test_top1"])

    def score(self, spec: Spec, epoch: int | None = None) -> float:
        """Return the objective's best value, larger is better; with `epoch`, as the search saw it then."""
        seen = self.results[:epoch]
        values = [result[spec.objective] for result in seen if result["whole"] == seen[-1]["whole"]]
        return float(max(values) if spec.mode == "max" else -min(values))

    @property
    def bundle(self) -> Path:
        """Of a trial that has ended."""
        attempt = self.trial.newest()
        assert attempt is not None  # only an attempt ends
        return attempt.bundle

    def test_at_best_val(self) -> float | None:
        """With the prompt of the epoch that is best on the validation set, whatever the trial's protocol.

        None where there is no such set.
        """
        if not self.trial.config.dataset.holds_back:
            return None
        if self.trial.config.select == "val":
            return self.test_top1()
        top1: float | None = max(self.full_fidelity, key=lambda result: result["val_top1"])["test_top1"]
        return top1

    def test_top1(self) -> float | None:
        """With the best epoch's prompt; None for a trial that never read the test set."""
        result = self.best() if self.trial.config.select != "val" else self.results[-1]
        top1: float | None = result["test_top1"]
        return top1


NO_VAL = "the val figures are the test set's (dataset.val_fraction 0): epochs and trials were chosen on it"
NOT_RECORDED = "which images each gets right is not recorded: no interval"
OTHER_IMAGES = "the two were measured on other images: no interval"


@dataclass(frozen=True)
class Bias:
    """What the published protocol (`select: test_best_epoch`) adds to trials' test top-1, in points.

    It is each trial's test top-1 less that of its epoch that is best on val.
    """

    mean: float
    low: float
    """The smallest among the trials."""
    high: float
    trials: int

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Bias | None:
        """Of those that finished under that protocol and had several epochs to choose from; None if there are none."""
        pairs = [
            (entry.test_top1(), entry.test_at_best_val())
            for entry in entries
            if entry.finished and entry.trial.config.select == "test_best_epoch" and len(entry.full_fidelity) > 1
        ]
        differences = [best - honest for best, honest in pairs if best is not None and honest is not None]
        return cls(fmean(differences), min(differences), max(differences), len(differences)) if differences else None

    def __str__(self) -> str:
        return (
            f"bias of the published protocol, against the epoch that is best on val: {self.mean:+.2f} points "
            f"(mean of {self.trials} trials, {self.low:+.2f} to {self.high:+.2f})"
        )


@dataclass(frozen=True)
class Leaderboard:
    """A sweep's trials, best first: finished ones, then those stopped early, then those without a result.

    A trial that was stopped early never wins: it was given up, and has not read the test set.
    """

    spec: Spec
    entries: list[Entry]

    @classmethod
    def read(cls, spec: Spec) -> Leaderboard:
        """Read all trials of the sweep from their folders."""
        controls = spec.control_names()
        entries = []
        for trial in TrialFolder.requested(spec.trials):
            params = spec.params(trial.config)
            end = trial.ended()
            stage = spec.stage(trial.config)
            entries.append(Entry(trial, params, trial.name in controls, stage, trial.results(), end))

        def order(entry: Entry) -> tuple[int, float]:
            return (0 if entry.finished else 1, -entry.score(spec)) if entry.results else (2, 0.0)

        return cls(spec, sorted(entries, key=order))

    def search_entries(self, control: bool = False) -> list[Entry]:
        """Return the trials of the search itself, or of its control; not those that confirm them."""
        return [entry for entry in self.entries if entry.stage == Stage.SEARCH and entry.control == control]

    def best(self, control: bool = False) -> Entry | None:
        """Return the best finished trial of the search, or of the control."""
        return next((entry for entry in self.search_entries(control) if entry.finished), None)

    def table(self, rows: int = 10) -> Table:
        """Return the first `rows` trials, and the control."""
        search = self.search_entries()
        shown = [*search, *self.search_entries(control=True)]
        published = any(entry.trial.config.select != "val" for entry in shown)
        test = "test top-1 (best test epoch)" if published else "test top-1"
        table = Table(title=f"{self.spec.name}: {len(shown)} trials", title_justify="left", box=None)
        for column in ("", "trial", "val top-1", test, "epochs", *self.spec.short_names().values(), ""):
            text = column in ("trial", "")
            table.add_column(column, justify="left" if text else "right", no_wrap=text)
        for place, entry in enumerate(search[:rows], start=1):
            table.add_row(str(place), *self._cells(entry))
        control = self.best(control=True)
        if control:
            table.add_section()
            table.add_row("", *self._cells(control), style="bold")
        return table

    def _cells(self, entry: Entry) -> list[str]:
        params = [number(entry.params.get(axis)) for axis in self.spec.space]
        mark = "control" if entry.control else MARKS[entry.end.state] if entry.end else "unfinished"
        if not entry.results:
            return [entry.trial.name, "-", "-", "0", *params, mark]
        val, test = entry.best()["val_top1"], entry.test_top1()
        return [entry.trial.name, number(val), number(test), str(len(entry.results)), *params, mark]

    def verdict(self) -> list[str]:
        """Return the best trial, the control and the difference, in words."""
        best, control = self.best(), self.best(control=True)
        if best is None:
            return ["no trial finished: there is no best prompt"]
        lines = [f"best trial {best.trial.name}: {self._metrics_text(best)}"]
        if control is None:
            return lines + self._missing_control()
        lines.append(f"control {control.trial.name}: {self._metrics_text(control)}")
        lines += self._difference(best, control)
        if not best.trial.config.dataset.holds_back:
            lines.append(NO_VAL)
        bias = Bias.of(self.search_entries())
        return lines + [str(bias)] * (bias is not None)

    def gain(self) -> Gain | None:
        """Return the gain of the best trial over the control; None without one of the two."""
        best, control = self.best(), self.best(control=True)
        if best is None or control is None:
            return None
        split, points = list(_differences(best, control).items())[-1]
        paired = (compare(best.trial, control.trial) or {}).get(split)
        return Gain(split, paired.points, *paired.interval, paired.images) if paired else Gain(split, points)

    def _difference(self, best: Entry, control: Entry) -> list[str]:
        """Say how far the best trial is from the control, what that shows, and on how many images."""
        differences, paired = _differences(best, control), compare(best.trial, control.trial)
        figures = {name: f"{name} {points:+z.2f}" for name, points in differences.items()}
        shown = {name: each for name, each in (paired or {}).items() if name in figures}
        figures |= {name: f"{name} {each}" for name, each in shown.items()}
        how = "95 % intervals over images" if shown else NOT_RECORDED if paired is None else OTHER_IMAGES
        lines = [f"difference: {', '.join(figures.values())} points (one seed; {how})"]
        for name, each in reversed(shown.items()):  # test before val
            if name == "test" or "test" not in shown:
                lines.append(f"{name}: {in_words(*each.interval)} ({_images_text(each)})")
            if name == "val" and best.trial.config.dataset.holds_back:
                lines.append(f"{name} is optimistic: {self._chosen_text()} on these {each.images:,} images")
        return lines

    def _chosen_text(self) -> str:
        trials = sum(bool(entry.results) for entry in self.search_entries())
        return f"the best of {trials} trials was chosen" if trials > 1 else "its epoch was chosen"

    def _missing_control(self) -> list[str]:
        """Say that there is nothing to hold the best trial against, and why; nothing where the spec wants none."""
        if self.spec.control is None:
            return []
        ends = [entry.end for entry in self.search_entries(control=True) if entry.end is not None]
        why = next((f"{end.cause or end.state}: {end.reason}".rstrip(": ") for end in ends), "none has run to its end")
        return [f"the control is missing ({why}): how much the prompt gains is not known"]

    def rung_correlation(self) -> list[str]:
        """Format the rank correlation (Spearman) of the scores at each milestone with the final ones."""
        finished = [entry for entry in self.search_entries() if entry.finished]
        final = [entry.score(self.spec) for entry in finished]
        correlations = []
        for epoch in milestones(self.spec):
            at_epoch = [entry.score(self.spec, epoch) for entry in finished]
            if len(set(at_epoch)) > 2 and len(set(final)) > 2:
                correlations.append(f"epoch {epoch} {rank_correlation(at_epoch, final):.2f}")
        if not correlations:
            return []
        return [f"rank correlation with the end, of {len(finished)} finished trials: {', '.join(correlations)}"]

    def failures(self) -> list[str]:
        """List the failures: each cause with its trials."""
        ends = [(entry.trial.name, entry.end) for entry in self.entries if entry.end is not None]
        failed = [(name, end) for name, end in ends if end.state == State.FAILED]
        counts = Counter(end.cause for _, end in failed)
        summary = ", ".join(f"{count} {cause}" for cause, count in counts.most_common())
        lines = [f"{name}: {end.cause}: {end.reason}" for name, end in failed]
        return [f"failed: {summary}", *lines] if failed else []

    def _metrics_text(self, entry: Entry) -> str:
        label = "test top-1" if entry.trial.config.select == "val" else "test top-1 at the best test epoch (published)"
        val, test = entry.best()["val_top1"], entry.test_top1()
        return f"val top-1 {val:.2f} %, {label} {test:.2f} %" if test is not None else f"val top-1 {val:.2f} %"

    def write_parquet(self, path: Path) -> None:
        """Write one row per epoch per trial: the trial, its state, its values on the axes and the epoch's metrics.

        All of a trial's rows have the test top-1 of the epoch that is best on val.
        """
        rows = [
            {
                "trial": entry.trial.name,
                "control": entry.control,
                "stage": entry.stage,
                "state": entry.end.state if entry.end else "unfinished",
            }
            | {f"param.{axis}": entry.params.get(axis) for axis in self.spec.space}
            | epoch_metrics(result)
            | {"lr_prompt": result["lr"].get("prompt"), "lr_head": result["lr"].get("head"), "time": result["time"]}
            | {key: result[key] for key in ("test_loss", "test_top1", "test_top5")}
            | {key: result.get(key, "") for key in ("device", "driver", "precision")}
            | {"test_at_best_val": entry.test_at_best_val()}
            for entry in self.entries
            for result in entry.results
        ]
        for axis in self.spec.space:  # a column has one type: an axis of mixed ones is written as text
            kinds = {type(row[f"param.{axis}"]) for row in rows} - {type(None)}
            if len(kinds) > 1 and kinds != {int, float}:
                for row in rows:
                    value = row[f"param.{axis}"]
                    row[f"param.{axis}"] = None if value is None else str(value)
        with replacing(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)


def _differences(best: Entry, control: Entry) -> dict[str, float]:
    """Return the best's top-1 less the control's in points, on val and, where both have read it, on test."""
    differences = {"val": best.best()["val_top1"] - control.best()["val_top1"]}
    best_test, control_test = best.test_top1(), control.test_top1()
    return differences | ({} if best_test is None or control_test is None else {"test": best_test - control_test})


def _images_text(paired: Paired) -> str:
    return f"{paired.images:,} images: on {paired.ours} only the best is right, on {paired.theirs} only the control"


def epoch_metrics(result: dict[str, Any]) -> dict[str, float]:
    """Return an epoch's metrics by their names in MLflow; the test set's belong to a trial, and are left out."""
    values = {
        key: value
        for key, value in result.items()
        if isinstance(value, int | float) and key != "time" and not key.startswith("test_")
    }
    values |= {f"parameters_{group}": count for group, count in result["parameters"].items()}
    return values | {f"lr_{group}": lr for group, lr in result["lr"].items()}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's."""
    from scipy.stats import spearmanr  # which takes a second to import

    return float(spearmanr(first, second).statistic)


def number(value: Any) -> str:
    """Return a value as it is shown in a table."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
