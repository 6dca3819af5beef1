"""LeRobot datasets, v3.0 and v2.1: folders, here or on a store, and those of the hub; read in place or converted.

    lapa data lerobot lerobot/pusht --out data/pusht
    lapa latent train --data lerobot:lerobot/pusht --out LAM

Converting upgrades v2.1, scales the images, and encodes them so that single frames are quick to fetch; where nothing
has to change, read in place. LeRobot's own converter upgrades v2.1 without encoding anew.
Formats: https://huggingface.co/docs/lerobot/lerobot-dataset-v3; lapa.data.lerobot.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lapa.checksums import SUMS
from lapa.data.config import ConvertOptions
from lapa.data.dataset import ACTION, STATE, Control, Dataset, dimension_names
from lapa.data.lerobot import LeRobotDataset
from lapa.data.metadata import INFO
from lapa.data.source import Clip, Item, Reading, Source
from lapa.files import as_path
from lapa.hub.download import as_hub_id, hub_folder

# Frames that are decoded at a time when a whole episode is read.
BLOCK = 32
# What is downloaded from the hub.
PATTERNS = ("meta/*", "data/*", "videos/*", SUMS)
SEVERAL_TASKS = "has several tasks, the first is taken as the instruction"


@dataclass(frozen=True)
class LeRobotReading(Reading):
    """How a LeRobot dataset is read."""

    path: Annotated[str, tyro.conf.Positional]
    """Its folder, here or on a store (s3://bucket/dataset), or its id on the hub (lerobot/pusht, or with a revision
    lerobot/pusht@v3.0)."""
    camera: tuple[str, ...] = ()
    """Cameras to read, the first of which is the default of other commands; by default all."""
    action_key: str = ACTION
    """The feature that is the action, where it has another name (`actions`)."""
    state_key: str = STATE
    """The feature that is the robot's state, where it has another name (`state`)."""
    control: Control | None = None
    """Whether the actions are `delta` or `absolute`, which LeRobot's datasets do not contain. --rate needs it."""
    binary: tuple[str, ...] = ()
    """Names of the action dimensions that are switches, such as a gripper that opens or shuts."""
    skip_bad: bool = False
    """Leave out, and count, episodes whose files are missing or do not fit the metadata."""

    def open(self) -> LeRobotSource:
        return LeRobotSource(self)


@dataclass(frozen=True)
class LeRobotConfig(ConvertOptions, LeRobotReading):
    """Convert a LeRobot dataset (v3.0 or v2.1, a folder or on the hub) to a dataset of images of one size."""

    def open(self) -> LeRobotSource:
        """As `LeRobotReading.open`; with --no-actions, damaged actions are no error.

        Raises UserError where files of the episodes up to --limit are missing, unless `skip_bad`.
        """
        source = LeRobotSource(replace(self, skip_bad=False), with_numbers=self.actions)
        if not self.skip_bad:
            source.require_files(self.limit)
        return source


class LeRobotSource(Source):
    """A LeRobot dataset, episode by episode. with_numbers: whether conversion reads actions and states."""

    kind = "lerobot"

    def __init__(self, reading: LeRobotReading, with_numbers: bool = True):
        self.root, self.with_numbers = _folder(reading.path), with_numbers
        hub_id = as_hub_id(reading.path)
        # A snapshot of the hub lies in a folder that is named by its revision.
        self.name = Path(hub_id.repo if hub_id else reading.path).name or self.root.name
        columns = {ACTION: reading.action_key, STATE: reading.state_key}
        declared: dict[str, Any] = {"control": reading.control, "binary": list(reading.binary)}
        self._dataset = dataset = LeRobotDataset(
            self.root,
            self.name,
            cameras=reading.camera,
            columns=columns,
            declared={key: value for key, value in declared.items() if value},
            skip_bad=reading.skip_bad,
        )
        # Nothing is written into the hub's copy.
        dataset.in_place = hub_id is not None
        self.fps = dataset.fps
        self.cameras = {camera: dataset.image_shape(camera) for camera in dataset.cameras}
        self.action_space = dataset.action_space
        if STATE in dataset.features:
            self.state_names = tuple(dimension_names(dataset.features[STATE], "state"))
        self.settings = {
            "dataset": self.name,
            "version": dataset.version,
            "source_fingerprint": dataset.fingerprint,
            **{key: column for key, column in columns.items() if column != key},
        }
        episodes = zip(dataset.numbers.tolist(), dataset.lengths.tolist(), strict=True)
        self.items = [
            Item(f"episode_{number:06d}", (index,), length=length) for index, (number, length) in enumerate(episodes)
        ]

    def require_files(self, limit: int | None) -> None:
        """Raises UserError where a file of the first `limit` episodes is missing."""
        self._dataset.require_files(self._dataset.cameras, range(len(self.items))[:limit])

    def dataset(self, name: str | None = None) -> Dataset:
        """Returns the folder itself: the same dataset, with the same fingerprint, as `--data FOLDER`."""
        self._dataset.name = name or self.name
        return self._dataset

    def read(self, item: Item) -> Clip:
        episode = int(item.place[0])
        numbers = self.numbers(item) if self.with_numbers else {}
        return Clip(
            {camera: self._frames(episode, camera) for camera in self.cameras},
            self._dataset.instruction(episode),
            numbers.get(ACTION),
            numbers.get(STATE),
            notes=(SEVERAL_TASKS,) if self._dataset.num_tasks[episode] > 1 else (),
        )

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        return self._dataset.frames(int(item.place[0]), frame_indices, camera)

    def numbers(self, item: Item) -> Mapping[str, np.ndarray]:
        episode, numbers = int(item.place[0]), {}
        if self._dataset.action_dim is not None:
            numbers[ACTION] = self._dataset.actions(episode)
        if (states := self._dataset.states(episode)) is not None:
            numbers[STATE] = states
        return numbers

    def _frames(self, episode: int, camera: str) -> Iterator[tuple[float, np.ndarray]]:
        length = int(self._dataset.lengths[episode])
        for first in range(0, length, BLOCK):
            indices = range(first, min(first + BLOCK, length))
            for index, frame_HWC in zip(indices, self._dataset.frames(episode, indices, camera), strict=True):
                yield index / self.fps, frame_HWC


def _folder(path: str) -> Path:
    """Returns the folder, or the hub's copy of it. Raises UserError where there is neither."""
    if as_hub_id(path) is None:
        return as_path(path)
    return hub_folder(path, PATTERNS, kind="dataset", marker=INFO)
