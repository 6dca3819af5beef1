"""Running minimum, maximum, mean and deviation, as LeRobotDataset keeps them for each episode and for the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, UInt8

# Pictures are sampled for statistics: each pixel of each frame would tell no more.
FRAME_STRIDE, PIXEL_STRIDE = 5, 4


class Moments:
    """Statistics of rows [N, D] that arrive in parts, merged exactly (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.minimum = self.maximum = self.mean = self.squares = np.zeros(0)

    def add(self, rows_ND: Float[np.ndarray, "N D"]) -> None:
        """Takes in rows."""
        rows = np.asarray(rows_ND, dtype=np.float64)
        if len(rows):
            mean = rows.mean(axis=0)
            self._merge(len(rows), rows.min(axis=0), rows.max(axis=0), mean, ((rows - mean) ** 2).sum(axis=0))

    def merge(self, values: dict[str, list[float]]) -> None:
        """Takes in what another one's `to_dict` gave."""
        count = int(values["count"][0])
        low, high, mean, deviation = (np.array(values[name]) for name in ("min", "max", "mean", "std"))
        self._merge(count, low, high, mean, deviation**2 * count)

    def to_dict(self) -> dict[str, list[float]]:
        """The statistics under LeRobot's names, each a list of D numbers (count: one)."""
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
    """Statistics of each colour channel, in [0, 1], of frames that pass by."""

    def watch(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Hands the frames on, taking in every few of them."""
        for number, frame_HWC in enumerate(frames):
            if number % FRAME_STRIDE == 0:
                self.add(frame_HWC[::PIXEL_STRIDE, ::PIXEL_STRIDE].reshape(-1, 3) / 255.0)
            yield frame_HWC
