"""Pairs of frames (x_t, x_{t+h}): what the latent action model learns from.

The horizon h is given in seconds and becomes frames by each dataset's own rate. A pair whose second frame lies past
the episode's end does not exist (LAPA's released code repeats the last frame instead, which teaches "no change").
Axes: T=2 frames of a pair, C channel, H W image, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lapa.console import say, warn
from lapa.data.dataset import Dataset
from lapa.data.frames import FrameStore, draw, each_camera, split_episodes


@dataclass(frozen=True)
class PairsConfig:
    """Which pairs of frames to read, and how."""

    size: int = 256
    """Height and width in pixels: the short side is scaled to it, the centre cropped."""
    horizon: float = 0.6
    """Seconds between the two frames (the paper: 0.6 for robots, 2.4 for human video)."""
    camera: str | None = None
    """Camera to read; each dataset's first where none is named."""
    held_out: float = 0.1
    """Fraction of the episodes kept from training, for evaluation."""
    cache_gib: float = 4.0
    """Keep all decoded pictures in memory where they take at most this many GiB; 0 never."""


class FramePairs(torch.utils.data.Dataset):
    """All pairs of the datasets, one after another: dataset, episode, frame.

    Keys are an index or a draw `(index, number)`. split: 'train', 'held_out' or 'all', by episode, from the seed.
    .horizon_frames: h of each dataset; .num_skipped: episodes too short for a pair, of each dataset.
    Raises ValueError where no episode is long enough.
    """

    def __init__(self, datasets: Sequence[Dataset], config: PairsConfig, split: str = "train", seed: int = 0):
        if not datasets:
            raise ValueError("no dataset was given to take frame pairs from")
        if config.horizon <= 0:
            raise ValueError(f"horizon is {config.horizon} seconds; it must be above 0")
        self.datasets, self.config = tuple(datasets), config
        self.horizon_frames = tuple(horizon_frames(config.horizon, dataset.fps) for dataset in datasets)
        self.num_skipped = tuple(
            int((dataset.lengths <= horizon).sum())
            for dataset, horizon in zip(datasets, self.horizon_frames, strict=True)
        )
        self._report_skipped()
        chosen = self._choose(split, seed)
        if split == "held_out" and not any(map(len, chosen)):
            warn("no episode can be held out (too few, or too short): evaluating on the training episodes instead")
            chosen = self._choose("train", seed)
        self._cameras = each_camera(datasets, None if config.camera is None else [config.camera])
        self._index(chosen)
        self._frames = FrameStore(datasets, self._cameras, chosen, config.size, config.cache_gib)

    @property
    def skipped_episodes(self) -> int:
        """Episodes of all datasets and splits that are too short for one pair."""
        return sum(self.num_skipped)

    @property
    def cached(self) -> bool:
        """Whether the pictures are in memory; DataLoader workers are of no use then."""
        return self._frames.cached

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: int | Sequence[int]) -> dict[str, Any]:
        """{"frames_TCHW": uint8 [2, 3, size, size], "index", "episode"}."""
        index, _ = draw(key)
        number, episode, frame = self.location(index)
        frames_THWC = self._frames.get(
            number, self._cameras[number][0], episode, (frame, frame + self.horizon_frames[number])
        )
        frames_TCHW = np.ascontiguousarray(rearrange(frames_THWC, "t h w c -> t c h w"))
        return {"frames_TCHW": frames_TCHW, "index": index, "episode": episode}

    def location(self, index: int) -> tuple[int, int, int]:
        """(number of the dataset, episode, first frame) of a pair."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[row - 1]) if row else 0
        return int(self._datasets[row]), int(self._episodes[row]), index - before

    def actions_between(self, index: int) -> Float[np.ndarray, "h A"]:
        """The robot's actions from the first frame up to, not including, the second."""
        number, episode, frame = self.location(index)
        return self.datasets[number].actions(episode)[frame : frame + self.horizon_frames[number]]

    def describe(self, index: int) -> str:
        """Where a pair comes from, in words."""
        number, episode, frame = self.location(index)
        second = frame + self.horizon_frames[number]
        return f"dataset {self.datasets[number].name}, episode {episode}, frames {frame} and {second}"

    def _choose(self, split: str, seed: int) -> list[np.ndarray]:
        """The episodes of the split that are long enough, of each dataset."""
        chosen = []
        for number, (dataset, horizon) in enumerate(zip(self.datasets, self.horizon_frames, strict=True)):
            episodes = split_episodes(len(dataset.lengths), self.config.held_out, seed + number, split)
            chosen.append(episodes[dataset.lengths[episodes] > horizon])
        return chosen

    def _index(self, chosen: list[np.ndarray]) -> None:
        """One row an episode, with the number of pairs up to its end: memory does not grow with the frames."""
        counts = [
            dataset.lengths[episodes] - horizon
            for dataset, horizon, episodes in zip(self.datasets, self.horizon_frames, chosen, strict=True)
        ]
        self._datasets = np.concatenate([np.full(len(episodes), number) for number, episodes in enumerate(chosen)])
        self._episodes, self._ends = np.concatenate(chosen), np.cumsum(np.concatenate(counts))
        if not len(self._ends):
            raise ValueError(
                f"{', '.join(dataset.name for dataset in self.datasets)}: no episode of this split is longer than the "
                f"horizon of {self.config.horizon:g} s; give a shorter horizon or longer videos"
            )

    def _report_skipped(self) -> None:
        for dataset, horizon, skipped in zip(self.datasets, self.horizon_frames, self.num_skipped, strict=True):
            if skipped == len(dataset.lengths):
                raise ValueError(
                    f"{dataset.root}: all {skipped} episodes are too short for a horizon of {self.config.horizon:g} s "
                    f"({horizon} frames at {dataset.fps:g} fps); give a shorter horizon or longer videos"
                )
            if skipped:
                say(
                    f"{dataset.name}: {skipped} of {len(dataset.lengths)} episodes skipped, "
                    f"not longer than the horizon ({horizon} frames)"
                )


def horizon_frames(horizon: float, fps: float) -> int:
    """A horizon in seconds as frames, at least one."""
    return max(1, round(horizon * fps))


def collate_pairs(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Items of FramePairs as a batch: frames_BTCHW uint8, index int64."""
    return {
        "frames_BTCHW": torch.from_numpy(np.stack([item["frames_TCHW"] for item in items])),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
    }
