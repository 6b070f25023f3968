"""What a trial's model says of each validation and test image: a Parquet file beside the bundle.

It is no part of the bundle, which is given to others: test sets' labels are not always public. It has a row for each
image, in the order of the set:

    split        val, or test where the trial has read it
    label        the image's class, int32
    predicted    the class that came first, int32, with the weights that the bundle holds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lorvp.utils.files import replacing

PREDICTIONS = "predictions.parquet"
SCHEMA = pa.schema([("split", pa.string()), ("label", pa.int32()), ("predicted", pa.int32())])


@dataclass(frozen=True)
class Predictions:
    """Hold the classes of a split's images, in the order of the set."""

    labels: np.ndarray
    """(N,) int32."""
    predicted: np.ndarray
    """(N,) int32."""

    @property
    def right(self) -> np.ndarray:
        """Which images the model gets right: (N,) bool."""
        right: np.ndarray = self.labels == self.predicted
        return right


def write(path: Path, splits: Mapping[str, Predictions]) -> None:
    """Write the predictions of each split, in place of an earlier file. Raises OSError where the disk is full."""
    columns = [
        np.repeat(list(splits), [len(each.labels) for each in splits.values()]),
        np.concatenate([each.labels for each in splits.values()]),
        np.concatenate([each.predicted for each in splits.values()]),
    ]
    arrays = [pa.array(column).cast(kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), temporary, compression="zstd")


def read(path: Path) -> dict[str, Predictions]:
    """Return the predictions of each split; none where there is no such file, or it is damaged."""
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException):  # of an earlier version's trial; a disk that fails
        return {}
    found = {}
    for split in table["split"].unique().to_pylist():
        rows = table.filter(pc.equal(table["split"], split))
        found[split] = Predictions(rows["label"].to_numpy(), rows["predicted"].to_numpy())
    return found
