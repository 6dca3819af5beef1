"""Statistics of the features of a dataset: minimum, maximum, mean, deviation and count, of rows that arrive in parts.

LeRobotDataset keeps them for each episode and for the whole, which is merged exactly from the parts. Chan et al., 1979,
"Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
Axes: N rows, E episodes, D numbers of a feature, H W 3 an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, UInt8

from lapa.data.tables import LISTS, as_numpy

STATISTICS = ("min", "max", "mean", "std", "count")
# The square of a larger number may be infinite.
LARGEST = 1e150
# Statistics need no more than a sample of the pixels.
FRAME_STRIDE, PIXEL_STRIDE = 5, 4


class Moments:
    """Running minimum, maximum, mean and deviation of rows [N, D]."""

    def __init__(self) -> None:
        self.count = 0
        self.minimum = self.maximum = self.mean = self.squares = np.zeros(0)

    def add(self, rows_ND: Float[np.ndarray, "N D"]) -> None:
        """Adds rows."""
        rows = np.asarray(rows_ND, dtype=np.float64)
        if len(rows):
            mean = rows.mean(axis=0)
            self._merge(len(rows), rows.min(axis=0), rows.max(axis=0), mean, ((rows - mean) ** 2).sum(axis=0))

    def merge(self, values: Mapping[str, Any]) -> None:
        """Adds the rows of others, given their `to_dict`, or arrays [E, D] of the statistics of E others."""
        lows, highs, means, deviations, counts_E1 = (np.atleast_2d(values[name]) for name in STATISTICS)
        count = int(counts_E1.sum())
        mean = (means * counts_E1).sum(axis=0) / count
        squares = ((deviations**2 + (means - mean) ** 2) * counts_E1).sum(axis=0)
        self._merge(count, lows.min(axis=0), highs.max(axis=0), mean, squares)

    def to_dict(self) -> dict[str, list[float]]:
        """Returns the statistics under LeRobot's names, each a list of D numbers (count: one)."""
        deviation = np.sqrt(self.squares / max(self.count, 1))
        values = {"min": self.minimum, "max": self.maximum, "mean": self.mean, "std": deviation}
        return {**{name: array.tolist() for name, array in values.items()}, "count": [self.count]}

    def _merge(self, count: int, low: np.ndarray, high: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
        if not self.count:
            self.count, self.minimum, self.maximum, self.mean, self.squares = count, low, high, mean, squares
            return
        total, gap = self.count + count, mean - self.mean
        self.minimum, self.maximum = np.minimum(self.minimum, low), np.maximum(self.maximum, high)
        self.squares = self.squares + squares + gap**2 * (self.count * count / total)
        self.mean = self.mean + gap * (count / total)
        self.count = total


class PixelMoments(Moments):
    """Statistics of each colour channel, in [0, 1], of a stream of frames."""

    def watch(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames, adding every few of them."""
        for number, frame_HWC in enumerate(frames):
            if number % FRAME_STRIDE == 0:
                self.add(frame_HWC[::PIXEL_STRIDE, ::PIXEL_STRIDE].reshape(-1, 3) / 255.0)
            yield frame_HWC


def moments_of(rows_ND: Float[np.ndarray, "N D"]) -> dict[str, list[float]]:
    """Returns the statistics of rows."""
    moments = Moments()
    moments.add(rows_ND)
    return moments.to_dict()


def moments_by_episode(rows_N: np.ndarray, lengths_E: Int[np.ndarray, "E"]) -> dict[str, np.ndarray]:
    """Returns the statistics [E, 1] of a column of numbers for each episode; their rows follow one another."""
    rows_N, counts_E = np.asarray(rows_N, np.float64), np.asarray(lengths_E, np.int64)
    starts_E = np.cumsum(counts_E) - counts_E
    means_E = np.add.reduceat(rows_N, starts_E) / counts_E
    squares_E = np.add.reduceat((rows_N - np.repeat(means_E, counts_E)) ** 2, starts_E)
    low_E, high_E = np.minimum.reduceat(rows_N, starts_E), np.maximum.reduceat(rows_N, starts_E)
    values = (low_E, high_E, means_E, np.sqrt(squares_E / counts_E), counts_E)
    return {name: its[:, None] for name, its in zip(STATISTICS, values, strict=True)}


class Totals:
    """Statistics of features of a dataset, merged from those of its episodes; of features that all episodes have."""

    def __init__(self, features: Iterable[str]):
        self._moments = {name: Moments() for name in features}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, episodes: pa.Table) -> None:
        """Adds episodes, by their rows in the metadata."""
        for name in list(self._moments):
            values = _statistics(episodes, name)
            shape = () if values is None else values["mean"].shape[1:]
            if values is None or self._shapes.setdefault(name, shape) != shape:
                del self._moments[name]
            else:
                self._moments[name].merge({key: value.reshape(len(value), -1) for key, value in values.items()})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns what meta/stats.json holds."""
        return {
            name: {
                key: value if key == "count" else np.reshape(value, self._shapes[name]).tolist()
                for key, value in moments.to_dict().items()
            }
            for name, moments in self._moments.items()
            if moments.count
        }


def _statistics(episodes: pa.Table, feature: str) -> dict[str, np.ndarray] | None:
    """Returns the episodes' statistics of a feature, None where one is missing or they are no numbers that fit."""
    values = {}
    for key in STATISTICS:
        name = f"stats/{feature}/{key}"
        found = _numbers(episodes[name]) if name in episodes.column_names else None
        if found is None or not (np.abs(found) < LARGEST).all():
            return None
        values[key] = found
    shapes = {value.shape for key, value in values.items() if key != "count"}
    count = values["count"]
    return values if len(shapes) == 1 and count.size == len(count) and count.min() >= 1 else None


def _numbers(column: pa.ChunkedArray) -> np.ndarray | None:
    """Returns a column of numbers, or of lists of one shape, as [E, ...]; None for any other, and without a value."""
    flat, shape = column.combine_chunks(), [len(column)]
    while any(is_kind(flat.type) for is_kind in LISTS):
        lengths = pc.list_value_length(flat).unique().to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            return None
        shape, flat = [*shape, lengths[0]], flat.flatten()
    kind = flat.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or flat.null_count:
        return None
    return as_numpy(flat.cast(pa.float64(), safe=False)).reshape(shape)
