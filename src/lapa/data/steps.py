"""Single steps for the policy: images and instruction, with a latent action, the robot's next actions, or both.

Axes: H W image, L latent action length, K action chunk, A action dimensions, S state dimensions, N numbers of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from lapa.console import warn
from lapa.data.config import MixBy
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.sampling import FrameStore, Mixture, choose_cameras, parse_key, split_items
from lapa.data.transforms import augment
from lapa.errors import UserError
from lapa.types import TrainingDataset


class EpisodeSteps(TrainingDataset):
    """One item per frame of the datasets (with `chunk`), or per labelled frame (with `labels` alone).

    Keys are an index or a draw `(index, number)`; augmentation depends on (seed, number) only, so that a resumed run
    sees the same images as an uninterrupted one.
    labels: one for each dataset; without `chunk`, frames without a label (the last of an episode) are not items.
    chunk: K future actions a frame; past the episode's end the last is repeated and masked out.
    state: whether items have the robot's state.
    mixture: how often each dataset is drawn; groups: the same, for lapa.engine.batches.
    in_memory: whether the images are in memory, where DataLoader workers are of no use.
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
        state: bool = False,
        mix_by: MixBy = "frames",
    ):
        """cameras: all datasets must have them; None: each one's first.

        cache_gib: images are kept in memory where those of this split take at most this much; training and held-out
        steps have it each. Raises UserError where no step is left, and where a dataset lacks the actions or the state
        asked for or has others than the first in width.
        """
        if not datasets:
            raise UserError("no dataset was given to take steps from")
        if labels is None and chunk is None:
            raise UserError("nothing to learn: give labels (latent actions), chunk (robot actions), or both")
        if labels is not None and len(labels) != len(datasets):
            raise UserError(f"{len(datasets)} datasets need as many labels, got {len(labels)}")
        if chunk is not None:
            if chunk < 1:
                raise UserError(f"chunk is {chunk}; a policy predicts at least one action")
            _check_width(datasets, "actions", "action", [dataset.action_dim for dataset in datasets])
        if state:
            _check_width(datasets, "state", "observation.state", [dataset.state_dim for dataset in datasets])
        self.datasets, self.size, self.labels, self.chunk, self.state = tuple(datasets), size, labels, chunk, state
        self.augment, self.seed = augment, seed
        self.cameras = choose_cameras(datasets, cameras)
        self._index = split_items(
            datasets,
            self._count,
            split=split,
            held_out=held_out,
            seed=seed,
            none_held_out="none of the held-out episodes has a label (too short?)",
        )
        if not len(self._index):
            names = ", ".join(dataset.name for dataset in datasets)
            raise UserError(f"{names}: no step is left to train on; label the dataset again with a shorter horizon")
        for number, dataset in enumerate(datasets):
            its = self._index.of_dataset(number)
            if bare := sum(not dataset.instruction(episode).strip() for episode in its):
                warn(f"{dataset.name}: {bare} of {len(its)} episodes have no instruction")
        coded = [dataset.name for dataset in datasets if dataset.coded]
        if augment and coded:
            warn(f"{', '.join(coded)}: has image codes and no images, so nothing is augmented")
        episodes = [self._index.of_dataset(number) for number in range(len(datasets))]
        episodes = [chosen[:0] if data.coded else chosen for data, chosen in zip(datasets, episodes, strict=True)]
        self._frames = FrameStore(datasets, self.cameras, episodes, size, cache_gib)
        self.in_memory, self.remote = self._frames.in_memory, self._frames.remote
        self.mixture = Mixture.of(datasets, self._index, mix_by)
        self.groups = self.mixture.groups

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, key: int | Sequence[int]) -> dict[str, Any]:
        """{"images": {camera: uint8 [size, size, 3], or int64 [N] of a dataset that is coded}, "instruction",

        "dataset" (its name), "index", "episode"} and with labels "codes_L" int64 and "has_codes", False (and the codes
        0) where the frame has no label;
        with chunk "actions_KA" float32 and "action_mask_K" bool; with state "state_S" float32.
        """
        index, draw = parse_key(key)
        number, episode, frame = self.location(index)
        dataset = self.datasets[number]
        item: dict[str, Any] = {"index": index, "episode": episode, "dataset": dataset.name}
        if self.labels is not None:
            item["codes_L"], item["has_codes"] = codes_at(self.labels[number], episode, frame)
        if self.chunk is not None:
            item["actions_KA"], item["action_mask_K"] = self._chunk_at(dataset, episode, frame)
        if self.state:
            item["state_S"] = _states(dataset, episode)[frame]
        item["instruction"] = dataset.instruction(episode)
        item["images"] = self._images(number, episode, frame, draw)
        return item

    def location(self, index: int) -> tuple[int, int, int]:
        """(number of the dataset, episode, frame) of a step."""
        number, episode, position = self._index.locate(index)
        if self.labels is not None and self.chunk is None:
            position = int(self.labels[number].codes(episode)[0][position])
        return number, episode, position

    def describe(self, index: int) -> str:
        """Returns the origin of a step, for messages."""
        number, episode, frame = self.location(index)
        return f"dataset {self.datasets[number].name}, episode {episode}, frame {frame}"

    def actions(self, number: int | None = None) -> Float[np.ndarray, "N A"]:
        """Returns all actions of the episodes in this split: the base of action statistics.

        number: of one of the datasets only. Like `states`, raises UserError naming dataset, episode and frame where a
        number is not finite.
        """
        return np.concatenate([dataset.actions(episode) for dataset, episode in self._episodes(number)])

    def states(self, number: int | None = None) -> Float[np.ndarray, "N S"]:
        """Returns all states of the episodes in this split. Raises UserError where a dataset has none."""
        return np.concatenate([_states(dataset, episode) for dataset, episode in self._episodes(number)])

    def _episodes(self, only: int | None) -> list[tuple[Dataset, int]]:
        rows = zip(self._index.datasets, self._index.episodes, strict=True)
        return [(self.datasets[number], int(episode)) for number, episode in rows if only in (None, number)]

    def _count(self, number: int, episodes: np.ndarray) -> np.ndarray:
        if self.labels is None or self.chunk is not None:
            return self.datasets[number].lengths[episodes]
        labels = self.labels[number]
        return np.array([len(labels.codes(int(episode))[0]) for episode in episodes], np.int64)

    def _chunk_at(
        self, dataset: Dataset, episode: int, frame: int
    ) -> tuple[Float[np.ndarray, "K A"], Bool[np.ndarray, "K"]]:
        assert self.chunk is not None
        actions_TA = dataset.actions(episode)
        steps_K = frame + np.arange(self.chunk)
        return actions_TA[np.minimum(steps_K, len(actions_TA) - 1)], steps_K < len(actions_TA)

    def _images(self, number: int, episode: int, frame: int, draw: int) -> dict[str, np.ndarray]:
        cameras = self.cameras[number]
        if self.datasets[number].coded:
            return {camera: self.datasets[number].image_codes(episode, [frame])[0] for camera in cameras}
        images = {camera: self._frames.get(number, camera, episode, [frame])[0] for camera in cameras}
        if not self.augment:
            return images
        rng = np.random.default_rng([self.seed, draw])
        return {camera: augment(image_HWC, rng) for camera, image_HWC in images.items()}


def codes_at(labels: Labels, episode: int, frame: int) -> tuple[Int64[np.ndarray, "L"], bool]:
    """Returns the codes of a frame and True; zeros and False where it has no label."""
    frames_T, codes_TL = labels.codes(episode)
    row = int(np.searchsorted(frames_T, frame))
    if row == len(frames_T) or frames_T[row] != frame:
        return np.zeros(labels.manifest.latent_length, np.int64), False
    return codes_TL[row], True


def _states(dataset: Dataset, episode: int) -> Float[np.ndarray, "T S"]:
    states_TS = dataset.states(episode)
    if states_TS is None:
        raise UserError(f"{dataset.root}: has no state; this needs a dataset with the feature `observation.state`")
    return states_TS


def _check_width(datasets: Sequence[Dataset], what: str, feature: str, widths: Sequence[int | None]) -> None:
    """Raises UserError where a dataset lacks a feature, or datasets differ in its width."""
    for dataset, width in zip(datasets, widths, strict=True):
        if width is None:
            raise UserError(f"{dataset.root}: has no {what}; this needs a dataset with the feature `{feature}`")
    if len(set(widths)) > 1:
        named = {dataset.name: width for dataset, width in zip(datasets, widths, strict=True)}
        raise UserError(f"datasets differ in the width of their {what}: {named}; learn from those of one robot")
