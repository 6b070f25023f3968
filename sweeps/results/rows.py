"""The results of sweeps as a paper's rows: what was trained on what, how well it did, what others have published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PositiveInt, model_validator

from lorvp.config import BackboneConfig, DatasetConfig, TrialConfig
from lorvp.errors import UserError
from lorvp.parts import ROOMS, Part, Trained
from lorvp.utils.yaml_file import YamlFile
from sweeps.results.comparison import Comparison, Difference, Row, Spread
from sweeps.results.confirm import Choice
from sweeps.results.leaderboard import Entry
from sweeps.results.outcome import Outcome

PUBLISHED_PATH = Path(__file__).parent / "published.yaml"
OOD = "ood.parquet"
CORRUPTED = "corrupted"
"""What the mean over all corruptions is called among the OOD sets."""
Key = tuple[str, str, str, str, str | None]
"""Network, pre-training, dataset, method and label mapping."""


class Published(Part):
    """An accuracy that others have published."""

    network: str = Field(description="clip: a CLIP image tower that the source does not name")
    pretraining: str
    dataset: str
    method: str
    label_mapping: str | None = Field(None, description="null: the source does not name it, and any is compared")
    top1: float = Field(ge=0, le=100)
    epochs: PositiveInt | None = Field(None, description="where the source names them")
    note: str | None = Field(None, description="what else is known to be otherwise than in a trial here")
    source: str = Field(min_length=1, description="where it was read: page or table and address")

    @property
    def key(self) -> Key:
        """What the accuracy belongs to."""
        return self.network, self.pretraining, self.dataset, self.method, self.label_mapping

    def differs_by(self, config: TrialConfig) -> str:
        """How it was obtained otherwise than by a trial of `config`, in words; empty where nothing is known of it."""
        epochs = f"{self.epochs} epochs" if self.epochs not in (None, config.epochs) else None
        return "; ".join(word for word in (epochs, self.note) if word)


class PublishedResults(Part):
    """The file of published accuracies."""

    figures: list[Published]

    @model_validator(mode="after")
    def _has_each_once(self) -> PublishedResults:
        keys = [result.key for result in self.figures]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise ValueError(f"figures names {', '.join(part for part in twice if part)} twice")
        return self


def published(path: Path = PUBLISHED_PATH) -> dict[Key, Published]:
    """Read the published accuracies, by what they belong to. Raises UserError for a key that is wrong."""
    return {result.key: result for result in YamlFile(path).validate(PublishedResults).figures}


@dataclass(frozen=True)
class Result:
    """A config of a sweep, over its seeds, beside the sweep's control."""

    sweep: str
    row: Row
    control: Row | None
    confirmed: bool
    """Or one trial of the search itself, under one seed."""
    ood: dict[str, dict[str, float]]
    """Top-1 in percent on each OOD set, of `best` and `control`; empty where it was not evaluated there."""

    @property
    def entry(self) -> Entry:
        """The first of the row's trials."""
        return self.row.entries[0]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Network, pre-training, dataset and method."""
        config = self.entry.trial.config
        return *network(config.backbone), dataset(config.dataset), config.method

    def published(self, published_by_key: dict[Key, Published]) -> Published | None:
        """Find the accuracy published for the same method, label mapping, network and data, if there is one."""
        config = self.entry.trial.config
        name, *rest = self.key
        networks = [name] + ["clip"] * ("_clip_" in name)
        keys = [(network_name, *rest, mapping) for network_name in networks for mapping in (config.head.kind, None)]
        return next((published_by_key[key] for key in keys if key in published_by_key), None)

    @property
    def select(self) -> str:
        """The protocol by which the best epoch was selected."""
        return self.entry.trial.config.select

    @property
    def top1(self) -> Spread:
        """Test top-1 over the seeds, in percent."""
        return self._spread(self.row)

    @property
    def control_top1(self) -> Spread | None:
        """The control's test top-1 over the seeds, in percent."""
        return self._spread(self.control) if self.control else None

    @property
    def difference(self) -> Difference | None:
        """The difference in test top-1 from the control, in points."""
        return self.row.difference(self.control, Entry.test_top1) if self.control else None

    def _spread(self, row: Row) -> Spread:
        spread = row.spread(Entry.test_top1)
        assert spread is not None  # only rows with a finished trial are taken
        return spread if self.confirmed else replace(spread, sd=None)

    def lrs(self) -> dict[str, float]:
        """Return the learning rate of each part that was trained by steps."""
        parts, by_steps = self.entry.trial.config.parts, self.entry.results[0]["lr"]
        return {name: part.lr for name, part in parts.items() if isinstance(part, Trained) and name in by_steps}

    def record(self, known: Published | None) -> dict[str, Any]:
        """Its row of tables.parquet, without the OOD sets: accuracies in percent, differences in points."""
        config, lrs, control, difference = self.entry.trial.config, self.lrs(), self.control_top1, self.difference
        return (
            dict(zip(("network", "pretraining", "dataset", "method"), self.key, strict=True))
            | {f"lr_{part}": lrs.get(part) for part in ROOMS}
            | {"label_mapping": config.head.kind, "rank": config.rank}
            | {"epochs": config.epochs, "batch_size": config.batch_size}
            | {"select": self.select, "confirmed": self.confirmed, "n": len(self.row.entries)}
            | {"top1": self.top1.mean, "top1_sd": self.top1.sd}
            | {"control_top1": control.mean if control else None, "control_top1_sd": control.sd if control else None}
            | {f"difference_{end}": getattr(difference, end) if difference else None for end in ("mean", "low", "high")}
            | {"published_top1": known.top1 if known else None, "published_source": known.source if known else None}
            | {"published_differs": known.differs_by(config) if known else None}
            | {"sweep": self.sweep, "trial": self.row.choice.trial}
        )


SCHEMA = pa.schema(
    [(key, pa.string()) for key in ("network", "pretraining", "dataset", "method")]
    + [(f"lr_{part}", pa.float64()) for part in ROOMS]
    + [("label_mapping", pa.string()), ("rank", pa.int64()), ("epochs", pa.int64()), ("batch_size", pa.int64())]
    + [("select", pa.string()), ("confirmed", pa.bool_()), ("n", pa.int64())]
    + [(key, pa.float64()) for key in ("top1", "top1_sd", "control_top1", "control_top1_sd")]
    + [(f"difference_{end}", pa.float64()) for end in ("mean", "low", "high")]
    + [("published_top1", pa.float64()), ("published_source", pa.string()), ("published_differs", pa.string())]
    + [("sweep", pa.string()), ("trial", pa.string())]
)
"""Of tables.parquet; the OOD sets come after it."""


def results(folder: Path) -> Iterator[Result]:
    """Yield the best config of each arm of a sweep, as it was confirmed, or else as the search saw it.

    Raises UserError for a folder that Outcome can't read, and for trials that never read the test set.
    """
    outcome = Outcome.read(folder)
    comparison = outcome.comparison or unconfirmed(outcome)
    ood = read_ood(folder)
    for value in outcome.spec.arms():
        arm = replace(comparison, rows=[row for row in comparison.rows if row.value == value])
        row = arm.best_row()
        if row is None:
            continue
        if None in (entry.test_top1() for entry in row.entries):
            raise UserError(
                f"{folder}: its trials never read the test set (trial.read_test): nothing to put in a table"
            )
        names = {entry.trial.name for entry in row.entries}
        sets = ood if any(ood_row["trial"] in names for ood_row in ood) else []
        yield Result(str(folder), row, comparison.control, outcome.comparison is not None, ood_top1(sets, row))


def unconfirmed(outcome: Outcome) -> Comparison:
    """Make rows of one seed from the best trial of each arm of an unconfirmed search, and of its control."""
    spec, board = outcome.spec, outcome.board
    finished = [entry for entry in board.search_entries() if entry.finished]
    bests = [(value, next((e for e in finished if spec.arm(e.trial.config) == value), None)) for value in spec.arms()]
    rows = [single_seed_row(entry, value, False) for value, entry in bests if entry is not None]
    control = board.best(control=True)
    return Comparison(spec, rows + ([single_seed_row(control, None, True)] if control else []))


def single_seed_row(entry: Entry, value: Any, control: bool) -> Row:
    """Make a row of one trial of the search, under one seed."""
    return Row(Choice(entry.trial.name, control, {0: entry.trial.name}), value, {0: entry}, 0.0)


def read_ood(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that sweeps.ood has left in a sweep's folder; none where it was not run."""
    path = folder / OOD
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    except FileNotFoundError:
        return []
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path}: damaged ({str(error).splitlines()[0]}); python -m sweeps.ood writes it anew"
        ) from None


def ood_top1(rows: Sequence[dict[str, Any]], row: Row) -> dict[str, dict[str, float]]:
    """Top-1 of each model on each OOD set, and its mean over all corruptions; not on the plain test images."""
    test_title = row.entries[0].trial.config.dataset.title
    top1: dict[str, dict[str, list[float]]] = {}
    for ood_row in rows:
        if ood_row["corruption"] or ood_row["data"] != test_title:
            name = CORRUPTED if ood_row["corruption"] else without_size(ood_row["data"])
            top1.setdefault(name, {}).setdefault(ood_row["model"], []).append(ood_row["top1"])
    return {name: {model: fmean(values) for model, values in models.items()} for name, models in top1.items()}


def network(config: BackboneConfig) -> tuple[str, str]:
    """Return the network and its pre-training by a timm name: resnet18.tv_in1k is resnet18 on in1k.

    Of the tag it keeps the datasets, in21k_ft_in1k for one after the other, and all of it where it names none that is
    known; MIIL's in21k is in21k_p, their ImageNet-21K-P. Without a tag it is the name of the checkpoint, or unknown.
    """
    name, _, tag = config.name.rpartition("/")[2].partition(".")  # of hf-hub:OWNER/NAME and local-dir:FOLDER the last
    if not config.pretrained and config.checkpoint is None:
        return name, "none"
    sets = re.search(r"in(1|12|21|22)k(_ft_in\d+k)*", tag)
    trained = sets[0] if sets else tag or (config.checkpoint.stem if config.checkpoint else "unknown")
    if "miil" in config.name:
        trained = trained.replace("in21k", "in21k_p")
    return name.removesuffix("_miil"), trained


def dataset(config: DatasetConfig) -> str:
    """Return a dataset's name without its store's size, and say if it is only a part of the dataset."""
    name = without_size(config.title) if config.name == "store" else config.title
    limits = config.max_classes, config.max_per_class, config.train_images
    return name if limits == (None, None, None) else f"{name} (part)"


def without_size(store: str) -> str:
    """Remove the image size from a store's name."""
    return re.sub(r"-(\d+|encoded)$", "", store)
