"""Pairs of frames (x_t, x_{t+h}), from which the latent action model learns.

The horizon h is given in seconds, for all datasets or for one of them (`--data PATH,horizon=2.4`), and becomes frames
by each dataset's own rate. A pair whose second frame lies past the episode's end does not exist (LAPA's released code
repeats the last frame instead, which teaches "no change").
Axes: T=2 frames of a pair, C channel, H W image, A action dimensions, P pairs of an episode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lapa.console import in_threads, say, warn
from lapa.data.config import MixBy
from lapa.data.dataset import Dataset
from lapa.data.motion import motion_energy, thumbnails
from lapa.data.sampling import (
    STRETCH,
    FrameStore,
    ItemIndex,
    Mixture,
    choose_cameras,
    parse_key,
    split_items,
)
from lapa.errors import UserError
from lapa.types import TrainingDataset


@dataclass(frozen=True)
class PairsConfig:
    """Which pairs of frames to read, and how."""

    size: int = 256
    """Height and width in pixels: the short side is scaled to it, the centre cropped."""
    horizon: float = 0.6
    """Seconds between the two frames (the paper: 0.6 for robots, 2.4 for human video), where a dataset has no own."""
    camera: str | None = None
    """Camera to read; each dataset's first where none is named."""
    held_out: float = 0.1
    """Fraction of the episodes kept from training, for evaluation."""
    cache_gib: float = 4.0
    """Keep decoded images in memory where they take at most this many GiB; 0 never.

    Training and held-out episodes have this much each.
    """
    middle: bool = False
    """Also read the frame halfway between the two."""
    action_share: float = 0.0
    """Share of the episodes with actions whose true actions are read too, at least one episode where above 0."""
    mix_by: MixBy = "frames"
    """What the datasets' shares of the draws are in proportion to, times their weights (lapa.data.sampling)."""
    min_motion: float = 0.0
    """Leave out pairs of the training split that change less than this (lapa.data.motion)."""


# Share of a dataset's pairs from which on dropping them is worth a warning.
MANY_STILL = 0.5
# Relative difference from which on rounding a horizon to whole frames is worth a line.
ROUNDED = 0.05


class FramePairs(TrainingDataset):
    """All pairs of the datasets, one after another: dataset, episode, frame.

    Keys are an index or a draw `(index, number)`. split: 'train', 'held_out' or 'all', by episode, from the seed.
    horizons, horizon_frames: h of each dataset; num_skipped: episodes too short for a pair, of each dataset.
    num_still: pairs left out for lack of motion, of each dataset.
    mixture: how often each dataset is drawn; groups: the same, for lapa.engine.batches.
    in_memory: whether the images are in memory, where DataLoader workers are of no use.
    Raises UserError where no episode is long enough.
    """

    def __init__(self, datasets: Sequence[Dataset], config: PairsConfig, split: str = "train", seed: int = 0):
        if not datasets:
            raise UserError("no dataset was given to take frame pairs from")
        if not 0 <= config.action_share <= 1:
            raise UserError(f"action_share is {config.action_share}; it must be a share from 0 to 1")
        if not 0 < config.horizon < math.inf:
            raise UserError(f"horizon is {config.horizon} seconds; it must be above 0")
        if not 0 <= config.min_motion < 1:
            raise UserError(f"min_motion is {config.min_motion}; it lies from 0 (keep all pairs) to below 1")
        self.datasets, self.config = tuple(datasets), config
        self.horizons = tuple(config.horizon if d.horizon is None else d.horizon for d in datasets)
        self.horizon_frames = tuple(map(horizon_frames, self.horizons, [dataset.fps for dataset in datasets]))
        in_words = ", ".join(f"{seconds:g} s" for seconds in sorted(set(self.horizons)))
        if config.middle and min(self.horizon_frames) < 2:
            raise UserError(f"a horizon of {in_words} is a single frame, which has none halfway; give a longer horizon")
        self.num_skipped = self._count_short_episodes()
        self._index = split_items(
            datasets,
            lambda number, episodes: datasets[number].lengths[episodes] - self.horizon_frames[number],
            split=split,
            held_out=config.held_out,
            seed=seed,
            none_held_out="no episode can be held out (too few, or too short)",
        )
        if not len(self._index):
            raise UserError(
                f"{', '.join(dataset.name for dataset in datasets)}: no episode of this split is longer than the "
                f"horizon of {in_words}; give a shorter horizon or longer videos"
            )
        # 0 where training episodes had to take the place of others.
        self.num_held_out = len(self._index.episodes) if self._index.split == "held_out" else 0
        cameras = choose_cameras(datasets, None if config.camera is None else [config.camera])
        episodes = [self._index.of_dataset(number) for number in range(len(datasets))]
        self._cameras = [camera for (camera,) in cameras]
        self._frames = FrameStore(datasets, cameras, episodes, config.size, config.cache_gib)
        self.in_memory, self.remote = self._frames.in_memory, self._frames.remote
        # The first frame of each pair, where some are left out.
        self._moving: np.ndarray | None = None
        self.num_still = (0,) * len(datasets)
        if config.min_motion and split == "train":
            self._leave_out_still()
        self.mixture = Mixture.of(datasets, self._index, config.mix_by)
        self.groups = self.mixture.groups
        self.action_dim = self._common_action_dim() if config.action_share else 0
        self._actions = self._read_actions(seed) if config.action_share else {}

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: int | Sequence[int]) -> dict[str, Any]:
        """{"frames_TCHW": uint8 [2, 3, size, size], "index", "episode"}, and as the config asks:

        "middle_CHW": uint8 [3, size, size]. "actions_A": float32, the mean action between the frames, in the robot's
        own units; NaN where it is not known.
        """
        index, _ = parse_key(key)
        number, episode, frame = self.location(index)
        horizon = self.horizon_frames[number]
        wanted = (frame, frame + horizon) + ((frame + horizon // 2,) if self.config.middle else ())
        frames_THWC = self._frames.get(number, self._cameras[number], episode, wanted)
        frames_TCHW = np.ascontiguousarray(rearrange(frames_THWC, "t h w c -> t c h w"))
        item = {"frames_TCHW": frames_TCHW[:2], "index": index, "episode": episode}
        if self.config.middle:
            item["middle_CHW"] = frames_TCHW[2]
        if self.config.action_share:
            known_PA = self._actions.get((number, episode))
            item["actions_A"] = np.full(self.action_dim, np.nan, np.float32) if known_PA is None else known_PA[frame]
        return item

    def location(self, index: int) -> tuple[int, int, int]:
        """(number of the dataset, episode, first frame) of a pair."""
        number, episode, position = self._index.locate(index)
        return number, episode, position if self._moving is None else int(self._moving[index])

    def index_of(self, number: int, episode: int, frame: int) -> int:
        """Returns the index of the pair at this location, which must exist."""
        if self._moving is None:
            return self._index.index_of(number, episode, frame)
        first, length = self._index.index_of(number, episode, 0), int(self.datasets[number].lengths[episode])
        # Pairs of the next episodes may follow there, and come later.
        return first + int(np.flatnonzero(self._moving[first : first + length] == frame)[0])

    def actions_between(self, index: int) -> Float[np.ndarray, "h A"]:
        """Returns the robot's actions from the first frame up to, not including, the second."""
        number, episode, frame = self.location(index)
        return self.datasets[number].actions(episode)[frame : frame + self.horizon_frames[number]]

    def known_actions(self) -> Float[np.ndarray, "P A"]:
        """Returns the mean actions of all pairs whose actions are known (action_share)."""
        return np.concatenate(list(self._actions.values()))

    def describe(self, index: int) -> str:
        """Returns the origin of a pair, for messages."""
        number, episode, frame = self.location(index)
        second = frame + self.horizon_frames[number]
        return f"dataset {self.datasets[number].name}, episode {episode}, frames {frame} and {second}"

    def _count_short_episodes(self) -> tuple[int, ...]:
        """Counts the episodes too short for a pair, by dataset. Raises UserError where all of a dataset are."""
        counts = []
        for dataset, seconds, horizon in zip(self.datasets, self.horizons, self.horizon_frames, strict=True):
            if abs(horizon / dataset.fps / seconds - 1) > ROUNDED:
                is_read = f"{horizon / dataset.fps:.3g} s ({horizon} frames at {dataset.fps:g} fps)"
                say(f"{dataset.name}: the horizon of {seconds:g} s is rounded to {is_read}")
            skipped = int((dataset.lengths <= horizon).sum())
            if skipped == len(dataset.lengths):
                raise UserError(
                    f"{dataset.root}: all {skipped} episodes are too short for a horizon of {seconds:g} s "
                    f"({horizon} frames at {dataset.fps:g} fps); give a shorter horizon or longer videos"
                )
            if skipped:
                say(
                    f"{dataset.name}: {skipped} of {len(dataset.lengths)} episodes skipped, "
                    f"not longer than the horizon ({horizon} frames)"
                )
            counts.append(skipped)
        return tuple(counts)

    def _leave_out_still(self) -> None:
        """Drops pairs below `min_motion`, and prints how many. Raises UserError where none of a dataset is left."""
        index = self._index
        starts_E = np.concatenate([[0], index.ends[:-1]])
        # In arrays of all pairs, whose memory does not grow by objects for each episode.
        energies_P = np.zeros(len(index), np.float32)

        def measure(row: int) -> None:
            place = int(index.datasets[row]), int(index.episodes[row])
            energies_P[starts_E[row] : index.ends[row]] = self._motion(place)

        in_threads(measure, range(len(starts_E)), "measuring motion")
        moves_P = energies_P >= self.config.min_motion
        counts_E = np.add.reduceat(moves_P, starts_E, dtype=np.int64)
        self._moving = (np.flatnonzero(moves_P) - np.repeat(starts_E, counts_E)).astype(np.int32)
        episodes, counts, num_still = [], [], []
        for number, dataset in enumerate(self.datasets):
            of_dataset_E = index.datasets == number
            episodes.append(index.episodes[of_dataset_E])
            counts.append(counts_E[of_dataset_E])
            total = index.num_items(number)
            still = total - int(counts[-1].sum())
            if total and still == total:
                most = energies_P[starts_E[of_dataset_E][0] : index.ends[of_dataset_E][-1]].max()
                raise UserError(
                    f"{dataset.root}: none of its {total} pairs changes by --min-motion {self.config.min_motion:g}, "
                    f"{most:.4f} at most; lower it, or leave the dataset out"
                )
            report = warn if still > MANY_STILL * total else say
            report(f"{dataset.name}: {still} of {total} pairs ({still / max(1, total):.0%}) left out, nothing moves")
            num_still.append(still)
        self.num_still = tuple(num_still)
        self._index = ItemIndex(episodes, counts)

    def _motion(self, place: tuple[int, int]) -> Float[np.ndarray, "P"]:
        """Returns the motion energy of each pair of an episode."""
        (number, episode), horizon = place, self.horizon_frames[place[0]]
        stretches = self._frames.stretches(number, self._cameras[number], episode)
        small_THW = np.concatenate([thumbnails(frames_THWC) for frames_THWC in stretches])
        firsts = range(0, len(small_THW) - horizon, STRETCH)
        return np.concatenate([motion_energy(small_THW[f : f + STRETCH + horizon], horizon) for f in firsts])

    def _common_action_dim(self) -> int:
        known = [(dataset.root, dataset.action_dim) for dataset in self.datasets if dataset.action_dim is not None]
        dims = {dim for _, dim in known}
        if len(dims) != 1:
            found = ", ".join(f"{root}: {dim}" for root, dim in known) or "none has actions"
            raise UserError(
                f"action_share {self.config.action_share:g} needs datasets whose actions have one width ({found}); "
                "leave it at 0, or leave out the datasets that differ"
            )
        return dims.pop()

    def _read_actions(self, seed: int) -> dict[tuple[int, int], Float[np.ndarray, "P A"]]:
        """(number of the dataset, episode) -> the mean actions of its pairs, for the share that is to be known."""
        known = {}
        for number, (dataset, horizon) in enumerate(zip(self.datasets, self.horizon_frames, strict=True)):
            if dataset.action_dim is None:
                continue
            episodes = self._index.of_dataset(number)
            count = math.ceil(self.config.action_share * len(episodes))
            for episode in np.random.default_rng([seed, number]).permutation(episodes)[:count]:
                sums_TA = np.cumsum(np.pad(dataset.actions(int(episode)), ((1, 0), (0, 0))), axis=0, dtype=np.float64)
                means_PA = (sums_TA[horizon:-1] - sums_TA[: -horizon - 1]) / horizon
                known[number, int(episode)] = means_PA.astype(np.float32)
        say(f"true actions of {len(known)} episodes are used")
        return known


def horizon_frames(horizon: float, fps: float) -> int:
    """Returns a horizon in seconds as frames. Raises UserError where it is less than half a frame."""
    if horizon * fps < 0.5:
        raise UserError(
            f"a horizon of {horizon:g} s is less than half a frame at {fps:g} fps; give {1 / fps:.3g} or more"
        )
    return max(1, round(horizon * fps))


def collate_pairs(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Items of FramePairs as a batch: frames_BTCHW uint8, index int64, and middle_BCHW, actions_BA where present."""
    named = {"frames_BTCHW": "frames_TCHW", "middle_BCHW": "middle_CHW", "actions_BA": "actions_A"}
    batch = {
        name: torch.from_numpy(np.stack([item[of_item] for item in items]))
        for name, of_item in named.items()
        if of_item in items[0]
    }
    return {**batch, "index": torch.tensor([item["index"] for item in items], dtype=torch.int64)}
