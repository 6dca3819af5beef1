"""Interface of a source: somebody else's data as episodes, to convert (lapa.data.convert) or to read in place.

A source has `Reading` options (a dataclass; `--data SOURCE:PATH,key=value` gives the same) and opens as a `Source`: a
list of items, most often files, each of which holds one episode or several. Opening looks at names and metadata only.
Sources are sent to worker processes, so they pickle and hold no open file.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from lapa.data.dataset import ACTION, CAMERA_PREFIX, STATE, ActionSpace, Dataset
from lapa.errors import UserError
from lapa.types import Plain


@dataclass(frozen=True, slots=True)
class Item(Plain):
    """The origin of one episode (or, cut into shots, of several).

    key: its name within the source, which never changes: the dataset's `source` column has it.
    place: plain values by which the source finds it.
    instruction, length (frames): where they are known without reading it; else "" and None.
    """

    key: str
    place: tuple[Any, ...] = ()
    instruction: str = ""
    length: int | None = None


@dataclass
class Clip:
    """An item, read for conversion.

    frames: for each camera an iterable of (seconds from the start, image) in order, read lazily. Once it is exhausted,
        `lost` counts the frames that could not be read, and `damage` is the error of the first of them.
    actions, states: float32 of as many rows as frames, or None.
    notes: oddities to count and report ("the instruction changes").
    """

    frames: Mapping[str, Iterable[tuple[float, UInt8[np.ndarray, "H W 3"]]]]
    instruction: str
    actions: Float[np.ndarray, "T D"] | None = None
    states: Float[np.ndarray, "T D"] | None = None
    notes: tuple[str, ...] = ()
    lost: int = 0
    damage: str = ""


class Reading(ABC):
    """Reading options of a source: a frozen dataclass whose first field is the path."""

    @abstractmethod
    def open(self) -> Source:
        """Returns the source. Raises UserError naming the file that is wrong and how to fix it."""


class Source(ABC):
    """Episodes of a folder, in a fixed order.

    kind: the source's name on the command line; root: its location; name: the default name of a dataset made of it.
    fps: frames per second of its episodes (videos of other rates are resampled); cameras: name -> (height, width).
    action_space, state_names: None without.
    settings: the options that the content depends on, as plain JSON values: noted in a converted dataset.
    inputs: files that are read besides the root, such as a table of captions.
    notes: counts of what was found while listing and is no item, or not all of one; for the page (lapa.data.left_out).
    """

    kind: str
    root: Path
    name: str
    fps: float
    cameras: Mapping[str, tuple[int, int]]
    action_space: ActionSpace | None = None
    state_names: tuple[str, ...] | None = None
    settings: Mapping[str, Any]
    inputs: Sequence[Path] = ()
    notes: Mapping[str, int] = MappingProxyType({})
    items: Sequence[Item]

    @abstractmethod
    def read(self, item: Item) -> Clip:
        """Returns all of an item. Raises UserError naming file and place where it is damaged."""

    @abstractmethod
    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        """Returns single images, which exist, at `fps`; in any order, repeats allowed. Raises UserError as `read`."""

    def numbers(self, item: Item) -> Mapping[str, Float[np.ndarray, "T D"]]:
        """Returns the rows of `action` and `observation.state`, as far as the source has them."""
        return {}

    def measured(self) -> Sequence[Item]:
        """Returns all items with instruction and length, for reading in place; may take a pass over the files."""
        return self.items

    def dataset(self, name: str | None = None) -> Dataset:
        """Returns the source as a dataset, in place."""
        return SourceDataset(self, name)

    def file_of(self, item: Item) -> str:
        """Returns the location of an item, for messages."""
        return f"{self.root}: {item.key}"


class SourceDataset(Dataset):
    """A source read in place, without a converted copy; its items and settings make its fingerprint."""

    in_place = True

    def __init__(self, source: Source, name: str | None = None):
        self.source = source
        self._items = source.measured()
        if not self._items:
            raise UserError(f"{source.root}: holds no episode")
        super().__init__(
            source.root,
            # Part of the names of files that commands write.
            name or source.name.replace("/", "_"),
            fps=float(source.fps),
            features=_features(source),
            lengths=np.array([item.length for item in self._items], np.int64),
            instructions=[item.instruction for item in self._items],
            sources=[item.key for item in self._items],
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the source's settings and of its items' names, lengths and instructions."""
        digest = hashlib.sha256(json.dumps([self.source.kind, self.fps, dict(self.source.settings)]).encode())
        for item in self._items:
            digest.update(json.dumps([item.key, item.length, item.instruction]).encode())
        return digest.hexdigest()[:16]

    @property
    def extra(self) -> dict[str, Any]:
        """The source's settings and what is known of its actions."""
        declared = self.source.action_space.declared() if self.source.action_space else {}
        return {"made_by": f"{self.source.kind}, in place", **self.source.settings, **declared}

    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        return self.source.frames(self._items[episode_index], frame_indices, camera)

    def _numbers(self, feature: str, episode_index: int) -> tuple[np.ndarray, str]:
        item = self._items[episode_index]
        return self.source.numbers(item)[feature], self.source.file_of(item)


def _features(source: Source) -> dict[str, dict[str, Any]]:
    """Returns the source's features as LeRobot's meta/info.json would describe them."""
    features: dict[str, dict[str, Any]] = {}
    actions = source.action_space.names if source.action_space else None
    for feature, names in ((ACTION, actions), (STATE, source.state_names)):
        if names is not None:
            features[feature] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    for camera, (height, width) in source.cameras.items():
        features[CAMERA_PREFIX + camera] = {"dtype": "video", "shape": [height, width, 3]}
    return features
