"""Whole episodes, decoded in windows of consecutive frames: for models that read every pair of frames of an episode.

    with EpisodeDecoders(dataset, horizon=18, size=256, num=4) as decoders:
        for window in decoders.windows(episodes):
            window.frames_THWC     # from frame window.first on; the last `horizon` of them begin the next window

Every frame is decoded once, by processes that work ahead of the consumer, or by a thread. The images lie in shared
memory that is used in turn, so an hour of video needs no more of it than a minute.
Axes: T time, H W image, C channel, P pairs of frames one horizon apart.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from ctypes import c_uint8
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from lapa.data.dataset import Dataset
from lapa.data.motion import motion_energy, thumbnails
from lapa.data.transforms import resize_and_crop
from lapa.data.workers import Workers
from lapa.errors import StoreError, UserError
from lapa.files import is_remote

# New frames of a window.
WINDOW = 256
# Bytes of stored images that a decoder holds at once: a window of large ones is decoded in pieces.
PIECE = 64 << 20


@dataclass(frozen=True)
class Window:
    """Frames `first`, `first + 1`, ... of an episode: its pairs begin with all but the last `horizon` of them.

    frames_THWC: valid until the next window is asked for. energy_P: motion of each pair, where it was asked for.
    error: why the episode cannot be read; then there are no frames.
    """

    episode: int
    first: int
    frames_THWC: UInt8[np.ndarray, "T size size 3"]
    energy_P: Float[np.ndarray, "P"] | None
    error: str | None = None


class EpisodeDecoders:
    """Decoders of a dataset's episodes; use as a context manager.

    num: processes; 0: a thread of this one. motion: measure the motion of each pair (lapa.data.motion).
    Episodes without a pair have no window.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        horizon: int,
        size: int,
        camera: str | None = None,
        num: int = 0,
        motion: bool = False,
    ) -> None:
        # A file system in memory is this process's own.
        self.num = 0 if is_remote(dataset.root) and getattr(dataset.root, "protocol", "") == "memory" else num
        self._lengths, self._horizon, self._window = dataset.lengths, horizon, WINDOW
        # Twice the decoders and more, so that each has its next window to begin while its last one is in use.
        ahead = 2 * max(1, self.num) + 2
        most = min(self._window, int(dataset.lengths.max()))
        shape = (ahead, horizon + most, size, size, 3)
        memory = multiprocessing.get_context("spawn").RawArray(c_uint8, prod(shape)) if self.num else None
        buffer = np.zeros(shape, np.uint8) if memory is None else memory
        self._slots = _slots(buffer, shape)
        self._workers = Workers(
            max(1, self.num),
            shared=(dataset, camera, buffer, shape, horizon, motion),
            threads=self.num == 0,
            ahead=ahead,
            advice="continue with --resume and fewer --decoders",
        )

    def __enter__(self) -> EpisodeDecoders:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.__exit__()

    def count(self, episodes: Sequence[int]) -> int:
        """Returns the number of windows of these episodes."""
        return sum(1 for _ in self._jobs(episodes))

    def windows(self, episodes: Sequence[int]) -> Iterator[Window]:
        """Yields the windows of the episodes, in order. All those of an episode that cannot be read have its error.

        Raises UserError where a decoder was killed.
        """
        horizon, empty, before = self._horizon, self._slots[0, :0], -1
        tail, small_tail, error = empty, None, None
        results = self._workers.in_order(_decode, self._jobs(episodes))
        for (episode, start, stop, slot), (small, its_error) in zip(self._jobs(episodes), results, strict=True):
            if episode != before:
                tail, small_tail, error, before = empty, None, None, episode
            error = error or its_error
            if error is not None:
                yield Window(episode, start, empty, None, error)
                continue
            held = len(tail)
            frames = self._slots[slot, horizon - held : horizon + stop - start]
            frames[:held] = tail
            energy = None
            if small is not None:
                small = small if small_tail is None else np.concatenate([small_tail, small])
                energy, small_tail = motion_energy(small, horizon), small[-horizon:]
            yield Window(episode, start - held, frames, energy)
            # Before the slot is decoded into again.
            tail = frames[-horizon:].copy() if stop < self._lengths[episode] else empty

    def _jobs(self, episodes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """(episode, first new frame, end, slot) of each window."""
        number = 0
        for episode in episodes:
            length = int(self._lengths[episode])
            for start in range(0, length if length > self._horizon else 0, self._window):
                yield episode, start, min(start + self._window, length), number % len(self._slots)
                number += 1


def window_frames(
    dataset: Dataset, episodes: Sequence[int], horizon: int, camera: str | None, size: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "T size size 3"]]]:
    """(episode, frames) of each window of the episodes that have a pair. Raises UserError where one cannot be read."""
    with EpisodeDecoders(dataset, horizon=horizon, size=size, camera=camera) as decoders:
        for window in decoders.windows(episodes):
            if window.error is not None:
                raise UserError(window.error)
            yield window.episode, window.frames_THWC


def _decode(
    dataset: Dataset,
    camera: str | None,
    buffer: Any,
    shape: tuple[int, ...],
    horizon: int,
    motion: bool,
    episode: int,
    start: int,
    stop: int,
    slot: int,
) -> tuple[UInt8[np.ndarray, "T SIDE SIDE"] | None, str | None]:
    """Decodes the frames start..stop into their slot, the job of a worker. Returns (thumbnails, error)."""
    room = _slots(buffer, shape)[slot, horizon:]
    at_once = max(1, PIECE // (3 * prod(dataset.image_shape(camera))))
    try:
        for first in range(start, stop, at_once):
            last = min(first + at_once, stop)
            frames_THWC = dataset.frames(episode, range(first, last), camera)
            room[first - start : last - start] = resize_and_crop(frames_THWC, shape[2])
    except StoreError:
        raise
    except UserError as error:
        return None, str(error)
    return thumbnails(room[: stop - start]) if motion else None, None


def _slots(buffer: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(buffer, np.uint8).reshape(shape)
