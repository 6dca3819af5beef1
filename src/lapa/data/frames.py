"""Pictures at the model's size, out of memory where they fit, out of the videos where they do not.

Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from lapa.console import progress, say
from lapa.data.dataset import Dataset
from lapa.data.transforms import resize_and_crop
from lapa.errors import UserError

GIB = 2**30
# Pictures of an episode decoded at once where they do not stay in memory.
STRETCH = 256
Job = TypeVar("Job")
Result = TypeVar("Result")


class Stream(NamedTuple):
    """One camera of one of several datasets, the latter by number."""

    dataset: int
    camera: str


class FrameStore:
    """Hands out resized pictures by episode and frame.

    All of the `episodes` named are decoded once and kept where that takes at most `cache_gib` GiB; each process of a
    DataLoader shares them while it is forked. Otherwise each picture is decoded when it is asked for. Both give the
    same bytes. `.in_memory` tells which it is.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        cameras: Sequence[Sequence[str]],
        episodes: Sequence[np.ndarray],
        size: int,
        cache_gib: float,
    ):
        """cameras, episodes: for each dataset, those that will be asked for."""
        self.datasets, self.size = tuple(datasets), size
        self._cache: dict[Stream, dict[int, np.ndarray]] = {}
        num_pictures = sum(
            int(dataset.lengths[chosen].sum()) * len(names)
            for dataset, names, chosen in zip(datasets, cameras, episodes, strict=True)
        )
        gib = num_pictures * size * size * 3 / GIB
        self.in_memory = gib <= cache_gib
        if self.in_memory:
            say(f"decoding {num_pictures} pictures into memory ({gib:.2f} GiB at {size} px)")
            self._fill(cameras, episodes)

    def get(
        self, dataset: int, camera: str, episode: int, frame_indices: Sequence[int]
    ) -> UInt8[np.ndarray, "T size size 3"]:
        """Pictures of one episode, in the order asked for."""
        if self.in_memory:
            return self._cache[Stream(dataset, camera)][episode][list(frame_indices)]
        return resize_and_crop(self.datasets[dataset].frames(episode, frame_indices, camera), self.size)

    def _fill(self, cameras: Sequence[Sequence[str]], episodes: Sequence[np.ndarray]) -> None:
        wanted = [
            (Stream(number, camera), int(episode))
            for number, (names, chosen) in enumerate(zip(cameras, episodes, strict=True))
            for camera in names
            for episode in chosen
        ]
        for (stream, episode), frames_THWC in zip(wanted, in_threads(self._whole, wanted, "decoding"), strict=True):
            self._cache.setdefault(stream, {})[episode] = frames_THWC

    def stretches(self, dataset: int, camera: str, episode: int) -> Iterator[UInt8[np.ndarray, "T size size 3"]]:
        """All pictures of an episode, a few at a time: a long one needs no more memory than a short one."""
        length = int(self.datasets[dataset].lengths[episode])
        for first in range(0, length, STRETCH):
            yield self.get(dataset, camera, episode, range(first, min(first + STRETCH, length)))

    def _whole(self, wanted: tuple[Stream, int]) -> np.ndarray:
        stream, episode = wanted
        return resize_and_crop(self.datasets[stream.dataset].frames(episode, None, stream.camera), self.size)


def in_threads(function: Callable[[Job], Result], wanted: Sequence[Job], description: str) -> list[Result]:
    """The results in order, with progress. PyAV and Pillow let go of the interpreter lock while they work."""
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress() as bar:
        task = bar.add_task(description, total=len(wanted), note="")
        for result in pool.map(function, wanted):
            results.append(result)
            bar.advance(task)
    return results


class EpisodeRows:
    """Items numbered through datasets and their episodes: one row an episode, so it does not grow with the frames."""

    def __init__(self, episodes: Sequence[np.ndarray], counts: Sequence[np.ndarray]):
        """For each dataset the episodes and how many items each has; episodes without items are left out."""
        filled = [chosen[count > 0] for chosen, count in zip(episodes, counts, strict=True)]
        self.datasets = np.concatenate([np.full(len(chosen), number) for number, chosen in enumerate(filled)])
        self.episodes = np.concatenate(filled)
        self.ends = np.cumsum(np.concatenate([count[count > 0] for count in counts]))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> tuple[int, int, int]:
        """(number of the dataset, episode, number of the item within the episode)."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        row = int(np.searchsorted(self.ends, index, side="right"))
        return int(self.datasets[row]), int(self.episodes[row]), index - (int(self.ends[row - 1]) if row else 0)

    def index_of(self, number: int, episode: int, item: int) -> int:
        """The inverse of `locate`."""
        (row,) = np.flatnonzero((self.datasets == number) & (self.episodes == episode))
        return item + (int(self.ends[row - 1]) if row else 0)

    def of_dataset(self, number: int) -> np.ndarray:
        """The episodes of one dataset that have items."""
        return self.episodes[self.datasets == number]

    def num_items(self, number: int) -> int:
        """How many items one dataset has."""
        return int(np.diff(self.ends, prepend=0)[self.datasets == number].sum())


def split_episodes(num_episodes: int, held_out: float, seed: int, split: str) -> np.ndarray:
    """The episodes of a split ('train', 'held_out' or 'all'), in order; the same for the same seed.

    At least one episode is held out where `held_out` is above 0 and there are two or more; a single one is trained on.
    """
    if split == "all":
        return np.arange(num_episodes)
    if split not in ("train", "held_out"):
        raise UserError(f"split {split!r} is not known; it is 'train', 'held_out' or 'all'")
    if not 0 <= held_out < 1:
        raise UserError(f"held_out is {held_out}; it is a fraction of the episodes, from 0 to below 1")
    num_held_out = 0 if num_episodes < 2 or held_out == 0 else max(1, round(held_out * num_episodes))
    order = np.random.default_rng(seed).permutation(num_episodes)
    return np.sort(order[:num_held_out] if split == "held_out" else order[num_held_out:])


def draw(key: int | Sequence[int]) -> tuple[int, int]:
    """A dataset's key as (index, number of the draw since training began); a plain index is draw 0 of itself."""
    if isinstance(key, int | np.integer):
        return int(key), 0
    index, number = key
    return int(index), int(number)


def each_camera(datasets: Sequence[Dataset], cameras: Sequence[str] | None) -> list[list[str]]:
    """The cameras to read of each dataset: those given, which all must have, or else the first of each."""
    if cameras is None:
        return [[dataset.cameras[0]] for dataset in datasets]
    for dataset in datasets:
        for camera in cameras:
            dataset.image_shape(camera)
    return [list(cameras) for _ in datasets]
