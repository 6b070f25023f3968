"""What the confirmation of a search found: each config's figures over its seeds, beside the control's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from lorvp.parts import ROOMS
from lorvp.utils.files import replacing
from sweeps.results.confirm import Choice
from sweeps.results.leaderboard import Bias, Entry, Leaderboard, number
from sweeps.results.paired import Gain, compare, in_words, recorded
from sweeps.spec.model import Scalar, Spec

CONFIDENCE = 0.95
PUBLISHED_BIAS = (
    "the test figures are optimistic: each is that of the best epoch on the test set itself "
    "(select: test_best_epoch, the published protocol)"
)
VAL_TRAINED_ON = "the val figures are of images that were trained on (confirm.all_images): they measure nothing"
NOT_RECORDED = "which images each trial gets right is not recorded: how many there are is not said"


@dataclass(frozen=True)
class Spread:
    """Of a figure over seeds."""

    mean: float
    sd: float | None
    """With n - 1 below; None where it can't be told."""

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {'-' if self.sd is None else f'{self.sd:.2f}'}"


@dataclass(frozen=True)
class Difference:
    """Of a config to the control, seed by seed: the mean, and its t interval at 95 %."""

    mean: float
    pairs: int
    low: float | None
    """None for a single pair."""
    high: float | None

    def in_words(self) -> str | None:
        """Say what it shows; None for a single pair."""
        return None if self.low is None or self.high is None else in_words(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.mean:+z.2f}" + (f" [{self.low:+z.2f}, {self.high:+z.2f}]" if self.low is not None else "")


def val_top1(entry: Entry) -> float:
    """Return the val top-1 of the trial's best epoch, in percent."""
    return float(entry.best()["val_top1"])


Metric = Callable[[Entry], float | None]
METRICS: dict[str, Metric] = {"val": val_top1, "test": Entry.test_top1}
"""In percent."""


@dataclass(frozen=True)
class Row:
    """A config that was confirmed, with those of its trials that finished."""

    choice: Choice
    value: Scalar
    """On the axis of `search.equal`; None for a control that it has no effect on."""
    by_seed: dict[int, Entry]
    search_seconds: float
    """What the search took for this value of that axis, or for the control."""
    search_score: float = 0.0
    """The objective's value that the search found, larger is better."""

    @property
    def entries(self) -> list[Entry]:
        """Each trial once: a config without a use for seeds has one for all of them."""
        return list({entry.trial.name: entry for entry in self.by_seed.values()}.values())

    @property
    def complete(self) -> bool:
        """Whether a trial finished under every seed."""
        return len(self.by_seed) == len(self.choice.seeds)

    def spread(self, metric: Metric) -> Spread | None:
        """None where no trial finished."""
        values = [value for entry in self.entries if (value := metric(entry)) is not None]
        if not values:
            return None
        seedless = len(set(self.choice.seeds.values())) == 1
        return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0 if seedless else None)

    def difference(self, control: Row, metric: Metric) -> Difference | None:
        """None without a seed that both have finished under."""
        seeds = self.by_seed.keys() & control.by_seed.keys()
        pairs = {(self.by_seed[seed].trial.name, control.by_seed[seed].trial.name): seed for seed in seeds}
        values = [(metric(self.by_seed[seed]), metric(control.by_seed[seed])) for seed in pairs.values()]
        differences = [
            best - control_value for best, control_value in values if best is not None and control_value is not None
        ]
        return paired_difference(differences) if differences else None

    def images(self, split: str) -> int | None:
        """Count the images of val or test that its figures are of; None where its trials have not recorded them."""
        counts = [len(found[split].labels) for entry in self.entries if split in (found := recorded(entry.trial))]
        return max(counts, default=None)

    def last_values(self, key: str) -> list[Any]:
        """Return the values of `key` in the trials' last epochs."""
        return [entry.results[-1][key] for entry in self.entries]

    def parameters(self, part: str) -> int | None:
        """Count the trained numbers of the prompt, the adapter or the head; None if there are none."""
        trained = self.last_values("parameters")[0] if self.entries else {}
        return trained.get(part) or None

    def peak_memory_mib(self) -> float | None:
        """Return the highest peak memory of any epoch, in MiB; None without a finished trial."""
        return max((result["peak_memory_mib"] for entry in self.entries for result in entry.results), default=None)

    def seconds(self) -> float | None:
        """Of a trial's epochs together, on average."""
        return fmean(map(seconds, self.entries)) if self.entries else None


@dataclass(frozen=True)
class Comparison:
    """The rows of a confirmation: the configs of each arm of the search, best first, and the control last."""

    spec: Spec
    rows: list[Row]

    @classmethod
    def of(cls, board: Leaderboard, choices: Sequence[Choice]) -> Comparison:
        """Compare the chosen configs by the leaderboard's trials that confirm them."""
        spec, entries = board.spec, {entry.trial.name: entry for entry in board.entries}
        rows = []
        for choice in choices:
            entry = entries[choice.trial]
            value = entry.params.get(spec.search.equal or "") if choice.control else spec.arm(entry.trial.config)
            by_seed = {seed: entries[name] for seed, name in choice.seeds.items() if entries[name].finished}
            search_entries = board.search_entries(choice.control)
            if not choice.control:
                search_entries = [entry for entry in search_entries if spec.arm(entry.trial.config) == value]
            rows.append(Row(choice, value, by_seed, sum(map(seconds, search_entries)), entry.score(spec)))
        return cls(spec, rows)

    @property
    def control(self) -> Row | None:
        """The control's row, if one of its trials finished."""
        return next((row for row in self.rows if row.choice.control and row.entries), None)

    def best_row(self) -> Row | None:
        """Return the best config by the objective's mean over seeds; None if no trial finished.

        Where val was trained on, the search's own score decides. A config that failed under a seed comes after all
        others.
        """

        def order(row: Row) -> tuple[bool, float]:
            if self.spec.all_images:
                return row.complete, row.search_score
            return row.complete, fmean(entry.score(self.spec) for entry in row.entries)

        return max((row for row in self.rows if row.entries and not row.choice.control), key=order, default=None)

    def best(self) -> Entry | None:
        """Return the best config's trial under the seed that was best on val."""
        row = self.best_row()
        return max(row.entries, key=lambda entry: entry.score(self.spec)) if row else None

    def verdict(self) -> list[str]:
        """Return the best config, the control, and how far each config is from it, in words."""
        best, control = self.best_row(), self.control
        if best is None:
            return ["no trial was confirmed: there is no best prompt"]
        lines = [VAL_TRAINED_ON] * self.spec.all_images + [f"best config {self._metrics_text(best)}"]
        if control is None:
            lines += ["the control was not confirmed"] if self.spec.control is not None else []
            return lines + self._bias(best)
        lines.append(f"control {self._metrics_text(control)}")
        for row in self.rows:
            if not row.choice.control:
                lines += self._differences(row, control)
        return lines + self._over_images(best, control) + self._bias(best)

    def gain(self) -> Gain | None:
        """Return the best config's mean gain over the control on test; None without a seed that both finished under."""
        best, control = self.best_row(), self.control
        difference = best.difference(control, Entry.test_top1) if best and control else None
        if best is None or difference is None:
            return None
        return Gain("test", difference.mean, difference.low, difference.high, best.images("test"))

    def _over_images(self, best: Row, control: Row) -> list[str]:
        """Say how far the best trial, which becomes the model, is from the control under its seed, image by image."""
        model = self.best()
        seed = next((seed for seed, entry in best.by_seed.items() if entry is model and seed in control.by_seed), None)
        if model is None or seed is None:
            return []
        paired = compare(model.trial, control.by_seed[seed].trial)
        if paired is None:
            return [NOT_RECORDED]
        return [
            f"the model, {model.trial.name}, less the control: test {each} points (seed {seed}; 95 % interval over "
            f"{each.images:,} images: on {each.ours} only the model is right, on {each.theirs} only the control)"
            for name, each in paired.items()
            if name == "test"
        ]

    def _bias(self, best: Row) -> list[str]:
        """Return the bias of the published protocol, if the sweep followed it."""
        entries = [entry for row in self.rows for entry in row.entries]
        if all(entry.trial.config.select == "val" for entry in entries):
            return []
        bias, at_best_val = Bias.of(entries), best.spread(Entry.test_at_best_val)
        lines = [PUBLISHED_BIAS] + [str(bias)] * (bias is not None)
        lines.append(f"{self._label(best)} at the epochs that are best on val: test top-1 {at_best_val} %")
        if difference := self.control and best.difference(self.control, Entry.test_at_best_val):
            lines[-1] += f", less the control {difference} points"
        return lines

    def _metrics_text(self, row: Row) -> str:
        val, test = (row.spread(metric) for metric in METRICS.values())
        n = len(row.entries)
        many = f"mean ± sd of {n} seeds" if n > 1 else "one trial: no seed is used" if row.complete else "one trial"
        return f"{self._label(row)}: val top-1 {val} %, test top-1 {test} % ({many})"

    def _differences(self, row: Row, control: Row) -> list[str]:
        differences = {name: row.difference(control, metric) for name, metric in METRICS.items()}
        known = {name: difference for name, difference in differences.items() if difference is not None}
        if len(known) < len(differences):
            return [f"{self._label(row)} and the control: no seed under which both finished"]
        pairs = known["val"].pairs
        interval = f"mean of {pairs} seeds, 95 % t interval" if pairs > 1 else "one pair"
        counts = {name: row.images(name) for name in known}
        images = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count is not None)
        how = f"{interval}; {images} images" if images else interval
        line = f"{self._label(row)} less the control: val {known['val']}, test {known['test']} points ({how})"
        said = {name: difference.in_words() for name, difference in known.items()}
        if self.spec.all_images:  # val was trained on
            del said["val"]
        return [line, *(f"{row.choice.trial}, {name}: {words}" for name, words in said.items() if words)]

    def _label(self, row: Row) -> str:
        equal = self.spec.search.equal
        return f"{row.choice.trial} ({equal} {row.value})" if row.value is not None else row.choice.trial

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each config that was confirmed: figures in percent, differences in points."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {"trial": row.choice.trial, "control": row.choice.control, "n": len(row.entries)}
            for name, metric in METRICS.items():
                spread = row.spread(metric)
                record[f"{name}_top1"], record[f"{name}_top1_sd"] = (spread.mean, spread.sd) if spread else (None, None)
                control = None if row.choice.control else self.control
                difference = row.difference(control, metric) if control else None
                for key in ("mean", "low", "high"):
                    record[f"{name}_difference_{key}"] = getattr(difference, key) if difference else None
                record[f"{name}_images"] = row.images(name)
            at_best_val = row.spread(Entry.test_at_best_val)
            record |= {
                "test_at_best_val": at_best_val.mean if at_best_val else None,
                **{f"parameters_{part}": row.parameters(part) for part in ROOMS},
                "peak_memory_mib": row.peak_memory_mib(),
                "seconds": row.seconds(),
                "optimizer_state_mib": max(row.last_values("optimizer_state_mib"), default=None),
                "search_seconds": row.search_seconds,
            }
            records.append(record)
        return records

    def cells(self) -> list[dict[str, str]]:
        """Return the rows as they are shown, by column."""
        columns = []
        for row, record in zip(self.rows, self.records(), strict=True):
            equal = (
                {self.spec.short_names()[self.spec.search.equal]: number(row.value)} if self.spec.search.equal else {}
            )
            metrics = {f"{name} top-1": str(row.spread(metric) or "-") for name, metric in METRICS.items()}
            columns.append(
                equal
                | {"trial": row.choice.trial + (" (control)" if row.choice.control else "")}
                | metrics
                | {"n": str(record["n"])}
                | {f"{part} params": number(record[f"parameters_{part}"]) for part in ROOMS}
                | {"peak MiB": number(record["peak_memory_mib"]), "seconds": number(record["seconds"])}
                | {
                    "optimizer MiB": number(record["optimizer_state_mib"]),
                    "search seconds": number(record["search_seconds"]),
                }
            )
        return columns

    def table(self) -> Table:
        """Make the table for the terminal."""
        seeds = ", ".join(map(str, self.spec.seeds))
        table = Table(title=f"confirmed under seeds {seeds}", title_justify="left", box=None)
        cells = self.cells()
        for column in cells[0] if cells else ():
            table.add_column(column, justify="right" if column != "trial" else "left", no_wrap=column == "trial")
        for row in cells:
            table.add_row(*row.values())
        return table

    def write(self) -> list[Path]:
        """comparison.parquet and comparison.md in the sweep's folder; where they are."""
        parquet, markdown = self.spec.folder / "comparison.parquet", self.spec.folder / "comparison.md"
        table = pa.Table.from_pylist(self.records(), schema=SCHEMA)
        if equal := self.spec.search.equal:
            values = [row.value for row in self.rows]
            if len({type(value) for value in values} - {type(None)}) > 1:  # a column has one type
                values = [None if value is None else str(value) for value in values]
            table = table.add_column(0, equal, [values])
        with replacing(parquet) as temporary:
            pq.write_table(table, temporary)
        cells = self.cells()
        lines = [f"# {self.spec.name}", ""]
        if cells:
            rows = [list(cells[0]), ["---"] * len(cells[0]), *(list(row.values()) for row in cells)]
            lines += [f"| {' | '.join(row)} |" for row in rows]
        with replacing(markdown) as temporary:
            temporary.write_text("\n".join([*lines, "", *(f"- {line}" for line in self.verdict())]) + "\n")
        return [parquet, markdown]


SCHEMA = pa.schema(
    [("trial", pa.string()), ("control", pa.bool_()), ("n", pa.int64())]
    + [
        (f"{name}_{metric}", pa.int64() if metric == "images" else pa.float64())
        for name in METRICS
        for metric in ("top1", "top1_sd", "difference_mean", "difference_low", "difference_high", "images")
    ]
    + [("test_at_best_val", pa.float64())]
    + [(f"parameters_{part}", pa.int64()) for part in ROOMS]
    + [(key, pa.float64()) for key in ("peak_memory_mib", "seconds", "optimizer_state_mib", "search_seconds")]
)


def seconds(entry: Entry) -> float:
    """Of its epochs together."""
    return float(sum(result["seconds"] for result in entry.results))


def paired_difference(values: Sequence[float]) -> Difference:
    """Return the mean of differences between pairs, with its t interval where there are two of them or more."""
    from scipy.stats import t  # which takes a second to import

    mean, n = fmean(values), len(values)
    if n < 2:
        return Difference(mean, n, None, None)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Difference(mean, n, mean - half, mean + half)
