"""Single steps for the policy: what is seen and said, and either a latent action or the robot's next actions.

Axes: H W image, L latent action length, K action chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lapa.console import warn
from lapa.data.dataset import Dataset
from lapa.data.frames import EpisodeRows, FrameStore, draw, each_camera, split_episodes
from lapa.data.labels import Labels
from lapa.data.transforms import augment


class PolicySteps(torch.utils.data.Dataset):
    """One item per labelled frame (with `labels`) or per frame (with `chunk`) of the datasets.

    Keys are an index or a draw `(index, number)`; augmentation depends on (seed, number) only, so that a resumed run
    sees what the uninterrupted one would have seen.
    labels: one for each dataset; frames without a label (the last of an episode) are not items.
    chunk: K future actions a frame; past the episode's end the last is repeated and masked out.
    .in_memory: whether the pictures are in memory, where DataLoader workers are of no use.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        size: int,
        cameras: Sequence[str] | None = None,
        labels: Sequence[Labels] | None = None,
        chunk: int | None = None,
        augment: bool = False,
        seed: int = 0,
        *,
        split: str = "all",
        held_out: float = 0.1,
        cache_gib: float = 4.0,
    ):
        """cameras: all datasets must have them; None: each one's first.

        cache_gib: pictures are kept in memory where those of this split take at most this much; training and held-out
        steps have it each. Raises ValueError where no step is left.
        """
        if not datasets:
            raise ValueError("no dataset was given to take steps from")
        if (labels is None) == (chunk is None):
            raise ValueError("give either labels (latent actions) or chunk (robot actions), not both")
        if labels is not None and len(labels) != len(datasets):
            raise ValueError(f"{len(datasets)} datasets need as many labels, got {len(labels)}")
        if chunk is not None:
            _check_actions(datasets, chunk)
        self.datasets, self.size, self.labels, self.chunk = tuple(datasets), size, labels, chunk
        self.augment, self.seed = augment, seed
        self.cameras = each_camera(datasets, cameras)
        self._rows = self._choose(split, held_out)
        if split == "held_out" and not len(self._rows):
            warn("none of the held-out episodes has a label (too short?): evaluating on the training episodes instead")
            self._rows = self._choose("train", held_out)
        if not len(self._rows):
            names = ", ".join(dataset.name for dataset in datasets)
            raise ValueError(f"{names}: no step is left to train on; label the dataset again with a shorter horizon")
        episodes = [self._rows.of_dataset(number) for number in range(len(datasets))]
        self._frames = FrameStore(datasets, self.cameras, episodes, size, cache_gib)
        self.in_memory = self._frames.in_memory

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | Sequence[int]) -> dict[str, Any]:
        """{"images": {camera: uint8 [size, size, 3]}, "instruction", "index", "episode"} and

        with labels "codes_L" int64; with chunk "actions_KA" float32 and "action_mask_K" bool.
        """
        index, number = draw(key)
        dataset_number, episode, position = self._rows.locate(index)
        dataset = self.datasets[dataset_number]
        frame = position
        item: dict[str, Any] = {"index": index, "episode": episode}
        if self.labels is not None:
            frames_T, codes_TL = self.labels[dataset_number].codes(episode)
            frame, item["codes_L"] = int(frames_T[position]), codes_TL[position].astype(np.int64)
        else:
            item["actions_KA"], item["action_mask_K"] = self._chunk_at(dataset, episode, frame)
        item["instruction"] = dataset.episodes[episode].instruction
        item["images"] = self._images(dataset_number, episode, frame, number)
        return item

    def location(self, index: int) -> tuple[int, int, int]:
        """(number of the dataset, episode, frame) of a step."""
        number, episode, position = self._rows.locate(index)
        if self.labels is not None:
            position = int(self.labels[number].codes(episode)[0][position])
        return number, episode, position

    def describe(self, index: int) -> str:
        """Where a step comes from, in words."""
        number, episode, frame = self.location(index)
        return f"dataset {self.datasets[number].name}, episode {episode}, frame {frame}"

    def actions(self) -> np.ndarray:
        """All actions of the episodes in this split, [N, A] float32: what action statistics are made from."""
        rows = zip(self._rows.datasets, self._rows.episodes, strict=True)
        return np.concatenate([self.datasets[number].actions(int(episode)) for number, episode in rows])

    def _choose(self, split: str, held_out: float) -> EpisodeRows:
        """The steps of a split."""
        chosen = [
            split_episodes(len(dataset.lengths), held_out, self.seed + number, split)
            for number, dataset in enumerate(self.datasets)
        ]
        return EpisodeRows(chosen, [self._num_items(number, episodes) for number, episodes in enumerate(chosen)])

    def _num_items(self, number: int, episodes: np.ndarray) -> np.ndarray:
        if self.labels is None:
            return self.datasets[number].lengths[episodes]
        labels = self.labels[number]
        return np.array([len(labels.codes(int(episode))[0]) for episode in episodes], np.int64)

    def _chunk_at(self, dataset: Dataset, episode: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.chunk is not None
        actions_TA = dataset.actions(episode)
        steps_K = frame + np.arange(self.chunk)
        return actions_TA[np.minimum(steps_K, len(actions_TA) - 1)], steps_K < len(actions_TA)

    def _images(self, dataset_number: int, episode: int, frame: int, number: int) -> dict[str, np.ndarray]:
        cameras = self.cameras[dataset_number]
        images = {camera: self._frames.get(dataset_number, camera, episode, [frame])[0] for camera in cameras}
        if not self.augment:
            return images
        rng = np.random.default_rng([self.seed, number])
        return {camera: augment(image_HWC, rng) for camera, image_HWC in images.items()}


def _check_actions(datasets: Sequence[Dataset], chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; a policy predicts at least one action")
    for dataset in datasets:
        if dataset.action_dim is None:
            raise ValueError(f"{dataset.root}: has no actions; finetuning needs a dataset with an `action` feature")
    widths = {dataset.name: dataset.action_dim for dataset in datasets}
    if len(set(widths.values())) > 1:
        raise ValueError(f"datasets differ in the width of their actions: {widths}; finetune on those of one robot")
