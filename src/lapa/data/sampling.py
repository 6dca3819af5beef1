"""Which frames are trained on and how often: the validation split, the frame cache, mixtures of datasets.

    lapa latent train --data bridge=data/bridge:1.0 --data rt1=data/rt1:0.5 --out LAM --mix-by frames

A dataset's share of the draws is, by `--mix-by`,

frames    its weight x its items (pairs or steps): with equal weights each frame is drawn as often as any other
episodes  its weight x its episodes
equal     its weight alone

The order is a function of the seed and the number of the draw (lapa.engine.batches). Equal weights by frames need no
mixing: all items are one pool, in one permutation an epoch.
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich.table import Table

from lapa.console import console, in_threads, say, warn
from lapa.data.config import MixBy
from lapa.data.dataset import Dataset
from lapa.data.transforms import resize_and_crop
from lapa.errors import UserError
from lapa.files import is_remote

GIB = 2**30
# Images of an episode decoded at once where they are not cached.
STRETCH = 256


def split_episodes(num_episodes: int, held_out: float, seed: int, split: str) -> np.ndarray:
    """Returns the episodes of a split ('train', 'held_out' or 'all'), in order; the same for the same seed.

    Where `held_out` is above 0 and there are two or more, at least one is held out and one trained on; a single one is
    trained on.
    """
    if split == "all":
        return np.arange(num_episodes)
    if split not in ("train", "held_out"):
        raise UserError(f"split {split!r} is not known; it is 'train', 'held_out' or 'all'")
    if not 0 <= held_out < 1:
        raise UserError(f"held_out is {held_out}; it is a fraction of the episodes, from 0 to below 1")
    some = num_episodes > 1 and held_out > 0
    num_held_out = min(max(1, round(held_out * num_episodes)), num_episodes - 1) if some else 0
    order = np.random.default_rng(seed).permutation(num_episodes)
    return np.sort(order[:num_held_out] if split == "held_out" else order[num_held_out:])


def recorded_split(run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides a training's split, from its resolved config: `dataset_fingerprints`, `held_out`, `seed`.

    Raises KeyError, TypeError or ValueError where the config lacks it or is damaged.
    """
    split = {"dataset_fingerprints": list(run["dataset_fingerprints"]), "held_out": run["held_out"]}
    split["seed"] = run["loop"]["seed"]
    require_split(split)
    return split


def require_split(split: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where `split` is not what `recorded_split` returns."""
    split_episodes(2, split["held_out"], split["seed"] + len(split["dataset_fingerprints"]), "train")


def episodes_of_training(split: Mapping[str, Any], fingerprint: str, num_episodes: int) -> np.ndarray:
    """Returns the episodes that a training took of the dataset of this fingerprint, in order; none of any other.

    split: as `recorded_split` returns it.
    """
    known = split["dataset_fingerprints"]
    if fingerprint not in known:
        return np.arange(0)
    return split_episodes(num_episodes, split["held_out"], _split_seed(split["seed"], fingerprint, known), "train")


def episodes_of_split(datasets: Sequence[Dataset], split: str, held_out: float, seed: int) -> list[np.ndarray]:
    """Returns the episodes of a split of each dataset, as `split_episodes`; one that is listed twice has one split."""
    known = [dataset.fingerprint for dataset in datasets]
    return [
        split_episodes(len(dataset.lengths), held_out, _split_seed(seed, dataset.fingerprint, known), split)
        for dataset in datasets
    ]


def _split_seed(seed: int, fingerprint: str, known: Sequence[str]) -> int:
    """Returns the seed of a dataset's split, from the fingerprints of all datasets of the training, in their order."""
    return seed + known.index(fingerprint)


def any_held_out(datasets: Sequence[Dataset], held_out: float) -> bool:
    """Whether some episode of the datasets is kept from training."""
    return held_out > 0 and any(len(dataset.lengths) > 1 for dataset in datasets)


def choose_cameras(datasets: Sequence[Dataset], cameras: Sequence[str] | None) -> list[list[str]]:
    """Returns the cameras to read of each dataset, by default the first.

    Raises UserError where a dataset lacks one, or files of it.
    """
    wanted = [None] if cameras is None else cameras
    chosen = [[dataset.camera_name(camera) for camera in wanted] for dataset in datasets]
    for dataset, names in zip(datasets, chosen, strict=True):
        dataset.require_files(names)
    return chosen


def parse_key(key: int | Sequence[int]) -> tuple[int, int]:
    """Returns a key as (index, number of the draw since training began); a plain index is draw 0 of itself."""
    if isinstance(key, int | np.integer):
        return int(key), 0
    index, number = key
    return int(index), int(number)


class ItemIndex:
    """Items (pairs or steps) numbered through datasets and their episodes, in memory that grows with the episodes."""

    def __init__(self, episodes: Sequence[np.ndarray], counts: Sequence[np.ndarray], split: str = "all"):
        """For each dataset its episodes and the number of items of each; episodes without items are left out.

        split: the one that the episodes are of.
        """
        self.split = split
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
        """Returns the inverse of `locate`."""
        (row,) = np.flatnonzero((self.datasets == number) & (self.episodes == episode))
        return item + (int(self.ends[row - 1]) if row else 0)

    def of_dataset(self, number: int) -> np.ndarray:
        """Returns the episodes of one dataset that have items."""
        return self.episodes[self.datasets == number]

    def num_items(self, number: int) -> int:
        """Returns the number of items of one dataset."""
        return int(np.diff(self.ends, prepend=0)[self.datasets == number].sum())


def split_items(
    datasets: Sequence[Dataset],
    count: Callable[[int, np.ndarray], np.ndarray],
    *,
    split: str,
    held_out: float,
    seed: int,
    none_held_out: str = "",
) -> ItemIndex:
    """Returns the items of a split. count(number of the dataset, episodes) returns the number of items of each episode.

    none_held_out: a warning; where the held-out episodes have no items, the training split takes their place.
    """
    chosen = episodes_of_split(datasets, split, held_out, seed)
    index = ItemIndex(chosen, [count(number, episodes) for number, episodes in enumerate(chosen)], split)
    if split == "held_out" and none_held_out and not len(index):
        warn(f"{none_held_out}: evaluating on the training episodes instead")
        return split_items(datasets, count, split="train", held_out=held_out, seed=seed)
    return index


class FrameStore:
    """Returns resized images by dataset, camera, episode and frame.

    All of the `episodes` named are decoded once and cached where that takes at most `cache_gib` GiB; the processes of a
    DataLoader share the cache when they are forked. Otherwise each image is decoded when it is asked for, to the same
    bytes. in_memory: whether the images are cached. remote: whether they are read from a store.
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
        # By (number of the dataset, camera, episode).
        self._cache: dict[tuple[int, str, int], np.ndarray] = {}
        num_images = sum(
            int(dataset.lengths[chosen].sum()) * len(names)
            for dataset, names, chosen in zip(datasets, cameras, episodes, strict=True)
        )
        gib = num_images * size * size * 3 / GIB
        self.in_memory = gib <= cache_gib
        self.remote = not self.in_memory and any(is_remote(dataset.root) for dataset in datasets)
        if self.in_memory:
            say(f"decoding {num_images} images into memory ({gib:.2f} GiB at {size} px)")
            wanted = [
                (number, camera, int(episode))
                for number, (names, chosen) in enumerate(zip(cameras, episodes, strict=True))
                for camera in names
                for episode in chosen
            ]
            self._cache = dict(zip(wanted, in_threads(self._decode, wanted, "decoding"), strict=True))

    def get(
        self, dataset: int, camera: str, episode: int, frame_indices: Sequence[int]
    ) -> UInt8[np.ndarray, "T size size 3"]:
        """Returns images of one episode, in the given order."""
        if self.in_memory:
            return self._cache[dataset, camera, episode][list(frame_indices)]
        return self._decode((dataset, camera, episode), frame_indices)

    def stretches(self, dataset: int, camera: str, episode: int) -> Iterator[UInt8[np.ndarray, "T size size 3"]]:
        """Yields all images of an episode, a few at a time: a long one needs no more memory than a short one."""
        length = int(self.datasets[dataset].lengths[episode])
        for first in range(0, length, STRETCH):
            yield self.get(dataset, camera, episode, range(first, min(first + STRETCH, length)))

    def _decode(self, place: tuple[int, str, int], frame_indices: Sequence[int] | None = None) -> np.ndarray:
        dataset, camera, episode = place
        return resize_and_crop(self.datasets[dataset].frames(episode, frame_indices, camera), self.size)


@dataclass(frozen=True)
class MixturePart:
    """The training split of one dataset in a mixture; `amount` is proportional to its share of the draws."""

    name: str
    num_items: int
    num_episodes: int
    weight: float
    amount: float


@dataclass(frozen=True)
class Mixture:
    """How often each dataset is drawn. one_pool: whether each item is drawn as often as any other."""

    parts: tuple[MixturePart, ...]
    one_pool: bool

    @classmethod
    def of(cls, datasets: Sequence[Dataset], index: ItemIndex, by: MixBy) -> Mixture:
        """index: the items of the datasets that are trained on. Datasets without any are not drawn."""
        parts = []
        for number, dataset in enumerate(datasets):
            items, episodes = index.num_items(number), len(index.of_dataset(number))
            counted = {"frames": items, "episodes": episodes, "equal": 1}[by]
            amount = dataset.weight * counted * (items > 0)
            parts.append(MixturePart(dataset.name, items, episodes, dataset.weight, amount))
        drawn = [part for part in parts if part.num_items]
        alike = by == "frames" and len({part.weight for part in drawn}) <= 1
        return cls(tuple(parts), alike or len(drawn) <= 1)

    @property
    def groups(self) -> tuple[tuple[int, float], ...] | None:
        """(items, weight) of each dataset as `lapa.engine.batches.StepSampler` takes them; None for one pool."""
        return None if self.one_pool else tuple((part.num_items, part.amount) for part in self.parts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each dataset's share of the draws; together 1."""
        total = sum(part.amount for part in self.parts)
        return tuple(part.amount / total for part in self.parts)

    def report(self, num_draws: int) -> None:
        """Prints the shares, where there are several datasets, and the epochs of each in `num_draws` draws."""
        if len(self.parts) < 2:
            return
        table = Table("dataset", title="mixture")
        for column in ("items", "episodes", "weight", "share", "epochs"):
            table.add_column(column, justify="right")
        for part, share in zip(self.parts, self.shares, strict=True):
            if not part.num_items:
                warn(f"{part.name}: nothing of it is trained on")
            epochs = f"{num_draws * share / part.num_items:.2f}" if part.num_items else "-"
            counts = (f"{part.num_items:,}", f"{part.num_episodes:,}", f"{part.weight:g}")
            table.add_row(part.name, *counts, f"{share:.1%}", epochs)
        console.print(table)


def require_plain(datasets: Sequence[Dataset], command: str, horizon_option: str) -> None:
    """Raises UserError where a dataset has a weight or a horizon of its own, which `command` would ignore."""
    for dataset in datasets:
        if dataset.weight != 1:
            raise UserError(f"{dataset.root}: `{command}` draws all frames alike; leave out the weight")
        if dataset.horizon is not None:
            raise UserError(
                f"{dataset.root}: `{command}` has one horizon for all datasets; leave out `,horizon=`, and give it as "
                f"{horizon_option}"
            )


def require_names(datasets: Sequence[Dataset]) -> None:
    """Raises UserError where two datasets share a name, or one has none."""
    names = [dataset.name for dataset in datasets]
    for dataset in datasets:
        if not dataset.name or names.count(dataset.name) > 1:
            found = f"has the name {dataset.name!r} of another one" if dataset.name else "has no name"
            raise UserError(
                f"{dataset.root}: {found}, and each has statistics of its own by its name; name them as in "
                f"--data NAME={dataset.root}"
            )
