"""Whole episodes in windows of consecutive frames, for models that look at every pair of frames one horizon apart.

Windows overlap by the horizon, so that each pair lies in one of them, and an hour of video needs no more memory than a
minute. Axes: T time, H W image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from lapa.data.dataset import Dataset
from lapa.data.transforms import resize_and_crop

# Pairs of a window.
WINDOW = 512


def window_starts(length: int, horizon: int) -> range:
    """The first frames of an episode's windows; one window even where the episode is too short for a pair."""
    return range(0, max(1, length - horizon), WINDOW)


def decoded_windows(
    dataset: Dataset, episodes: Sequence[int], horizon: int, camera: str | None, size: int
) -> Iterator[UInt8[np.ndarray, "T size size 3"]]:
    """The frames of each window of the episodes, in order; the next one is decoded while this one is looked at."""

    def decode(window: tuple[int, int]) -> np.ndarray:
        episode, first = window
        last = min(first + WINDOW + horizon, int(dataset.lengths[episode]))
        return resize_and_crop(dataset.frames(episode, range(first, last), camera), size)

    windows = [
        (episode, first) for episode in episodes for first in window_starts(int(dataset.lengths[episode]), horizon)
    ]
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(decode, windows[0]) if windows else None
        for position in range(len(windows)):
            assert following is not None
            frames_THWC = following.result()
            if position + 1 < len(windows):
                following = pool.submit(decode, windows[position + 1])
            yield frames_THWC
