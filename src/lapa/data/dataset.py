"""Datasets as every command reads them: episodes of images, an instruction, and perhaps actions and states.

    dataset = lapa.open_dataset("data/clips")                  # or "rlds:bridge_dataset/1.0.0" (lapa.data.spec)
    print(dataset)                                             # size, rate, cameras, actions
    len(dataset), dataset[0].instruction                       # episodes
    dataset.frames(0, [0, 5])                                  # uint8 [2, H, W, 3]

An action space is what a dataset declares of its actions: names, which dimensions are binary, delta or absolute
control. The names are in the `action` feature of meta/info.json; the rest is in meta/lapa.json, which LeRobot does not
read and the fingerprint does not cover, so it may be written by hand at any time and labels stay valid:

    {"action_space": {"binary": ["gripper"], "control": "delta"}}

Axes: T time, H W image, C channel, A action dimensions, S state dimensions, N frames of all episodes.
"""

from __future__ import annotations

import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from lapa.errors import UserError, unknown

CAMERA_PREFIX = "observation.images."
ACTION, STATE = "action", "observation.state"
Control = Literal["delta", "absolute"]
CONTROLS = typing.get_args(Control)
ACTION_SPACE = "action_space"
# Levels of lists in which the names of a feature are found.
NAMES_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Episode:
    """One demonstration. length: in frames; source: what it was made from (a file, a task and seed), where known."""

    index: int
    length: int
    instruction: str
    source: str = ""


@dataclass(frozen=True)
class ActionSpace:
    """Names of the action dimensions, and which of them are binary: switches with two values, such as a gripper.

    control: `delta` moves by the action, `absolute` moves to it; None where it is not declared.
    """

    names: tuple[str, ...]
    binary: tuple[bool, ...]
    control: Control | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.binary):
            raise UserError(f"{len(self.names)} action names and {len(self.binary)} flags of binary dimensions")
        if self.control not in (*CONTROLS, None):
            raise unknown("control", str(self.control), CONTROLS)

    @property
    def action_dim(self) -> int:
        return len(self.names)

    @classmethod
    def named(cls, names: Sequence[str], binary: Sequence[str] = (), control: Control | None = None) -> ActionSpace:
        """binary: the names of the binary dimensions. Raises UserError for a name that is not in `names`."""
        for name in binary:
            if name not in names:
                raise unknown("binary action dimension", str(name), names)
        return cls(tuple(names), tuple(name in binary for name in names), control)

    @property
    def binary_names(self) -> list[str]:
        return [name for name, binary in zip(self.names, self.binary, strict=True) if binary]

    def declared(self) -> dict[str, Any]:
        """Returns the entry of meta/lapa.json; empty where nothing is declared beyond the names."""
        known = self.binary_names or self.control
        return {ACTION_SPACE: {"binary": self.binary_names, "control": self.control}} if known else {}


class Dataset(ABC):
    """A dataset, opened for reading with `lapa.open_dataset`; a sequence of `Episode`s.

    Memory holds the metadata only, as columns; images and numbers are read on demand. Can be pickled.

    root: its location; name: its name in figures, prompts and statistics.
    fps: frames per second, one rate for all episodes; features: `dtype`, `shape` and `names` of each feature, as in
        LeRobot's meta/info.json.
    lengths: frames of each episode, int64; num_frames: their sum.
    numbers: each episode's number in the data, for messages; some may be left out, so it is not always its index.
    cameras: short names; action_dim, state_dim: None where the dataset has none.
    horizon: seconds between the frames of a pair, where the dataset was opened with one (`PATH,horizon=2.4`).
    weight: share of the draws in a mixture (lapa.data.sampling).
    coded: whether it holds codes of an image tokenizer (`image_codes`) in place of images.
    in_place: whether it is somebody else's data, in whose folder nothing may be written.
    """

    coded = False
    in_place = False

    def __init__(
        self,
        root: Path,
        name: str,
        *,
        fps: float,
        features: dict[str, dict[str, Any]],
        lengths: np.ndarray,
        instructions: Sequence[str] | np.ndarray,
        sources: Sequence[str] | np.ndarray,
    ):
        self.root, self.name, self.fps, self.features = root, name, fps, features
        self.lengths = lengths
        self.numbers = np.arange(len(lengths))
        self._instructions, self._sources = instructions, sources
        self.num_frames = int(lengths.sum())
        self._camera_keys = {
            key.removeprefix(CAMERA_PREFIX).removeprefix("observation."): key for key in image_keys(features)
        }
        self.cameras = tuple(self._camera_keys)
        self.action_dim = self._width(ACTION)
        self.state_dim = self._width(STATE)
        self.horizon: float | None = None
        self.weight = 1.0

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that labels of the dataset depend on."""

    @property
    @abstractmethod
    def extra(self) -> dict[str, Any]:
        """Notes on the dataset, such as the command that wrote it and its settings."""

    @abstractmethod
    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        """Returns images that exist, uint8 [T, H, W, 3]."""

    @abstractmethod
    def _numbers(self, feature: str, episode_index: int) -> tuple[np.ndarray, str]:
        """Returns the rows of an episode's feature, float32 [T, D], and the file that holds them."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Episode:
        index = self._position(index)
        return Episode(index, int(self.lengths[index]), self.instruction(index), str(self._sources[index]))

    def __iter__(self) -> Iterator[Episode]:
        return map(self.__getitem__, range(len(self)))

    def __repr__(self) -> str:
        cameras = [f"{name} {width}x{height}" for name in self.cameras for height, width in [self.image_shape(name)]]
        parts = [f"{len(self)} episodes", f"{self.num_frames} frames at {self.fps:g} fps"]
        parts += [f"cameras {', '.join(cameras)}", f"action_dim {self.action_dim}", f"state_dim {self.state_dim}"]
        return f"<{type(self).__name__} {self.name} at {self.root}; {'; '.join(parts)}>"

    @cached_property
    def episodes(self) -> tuple[Episode, ...]:
        """All episodes. Where an episode has several tasks, the first is its instruction."""
        return tuple(self)

    @cached_property
    def action_space(self) -> ActionSpace | None:
        """The action space, None where the dataset has no actions.

        Raises UserError naming meta/lapa.json where its entry does not fit the actions.
        """
        if self.action_dim is None:
            return None
        return read_action_space(self.features[ACTION], self.extra, f"{self.root}/meta/lapa.json")

    def camera_name(self, camera: str | None = None) -> str:
        """Returns the camera, or the first where None. Raises UserError for one that the dataset does not have."""
        camera = self.cameras[0] if camera is None else camera
        if camera not in self._camera_keys:
            raise UserError(f"{self.root}: {unknown('camera', camera, self.cameras)}")
        return camera

    def camera_feature(self, camera: str | None = None) -> dict[str, Any]:
        """Returns the feature of a camera; None: the first."""
        return self.features[self.camera_key(camera)]

    def camera_key(self, camera: str | None = None) -> str:
        """Returns the name of a camera's feature; None: the first."""
        return self._camera_keys[self.camera_name(camera)]

    def image_shape(self, camera: str | None = None) -> tuple[int, int]:
        """Returns the height and width of a camera's stored images."""
        height, width = self.camera_feature(camera)["shape"][:2]
        return int(height), int(width)

    def frames(
        self, episode_index: int, frame_indices: Sequence[int] | None = None, camera: str | None = None
    ) -> UInt8[np.ndarray, "T H W 3"]:
        """Returns images of an episode, RGB, in the order of `frame_indices`, which may repeat; None: all of them.

        camera: None for the first. Raises UserError for a frame or camera that is not there.
        """
        episode_index = self._position(episode_index)
        length = int(self.lengths[episode_index])
        indices = range(length) if frame_indices is None else [int(index) for index in frame_indices]
        if len(indices) and not 0 <= min(indices) <= max(indices) < length:
            raise UserError(f"{self.name}: episode {episode_index} has frames 0 to {length - 1}, asked for {indices}")
        return self._images(episode_index, indices, self.camera_name(camera))

    def require_files(self, cameras: Sequence[str]) -> None:
        """Raises UserError where one of these cameras, or a file that it needs, is known to be missing."""
        for camera in cameras:
            self.camera_name(camera)

    def image_codes(self, episode_index: int, frame_indices: Sequence[int]) -> Int[np.ndarray, "T N"]:
        """Returns the codes of images, of a dataset that is `coded`."""
        raise UserError(f"{self.root}: holds images, not codes of them")

    def instruction(self, episode_index: int) -> str:
        """Returns the instruction of an episode."""
        return str(self._instructions[self._position(episode_index)])

    def actions(self, episode_index: int) -> Float[np.ndarray, "T A"]:
        """Returns an episode's actions in the robot's own units. Raises UserError without any, or for NaN."""
        if self.action_dim is None:
            raise UserError(f"{self.root}: has no actions; this needs a dataset with an `action` feature")
        return self._rows(ACTION, episode_index)

    def all_actions(self) -> Float[np.ndarray, "N A"]:
        """Returns the actions of all episodes, concatenated."""
        return np.concatenate([self.actions(episode) for episode in range(len(self))])

    def states(self, episode_index: int) -> Float[np.ndarray, "T S"] | None:
        """Returns an episode's proprioception, None where the dataset has none."""
        return None if self.state_dim is None else self._rows(STATE, episode_index)

    def _position(self, episode_index: int) -> int:
        """Returns an episode's index from 0; negative ones count from the end. Raises IndexError."""
        try:
            return range(len(self))[episode_index]
        except IndexError:
            raise IndexError(f"{self.name}: has {len(self)} episodes, no episode {episode_index}") from None

    def _width(self, feature: str) -> int | None:
        return math.prod(self.features[feature]["shape"]) if feature in self.features else None

    def _rows(self, feature: str, episode_index: int) -> np.ndarray:
        episode_index = self._position(episode_index)
        rows_TD, file = self._numbers(feature, episode_index)
        require_finite(rows_TD, f"{file}: {feature} of episode {self.numbers[episode_index]}")
        return rows_TD


def require_finite(rows_TD: np.ndarray, what: str, remedy: str = "; correct it or leave the episode out") -> None:
    """Raises UserError naming `what` and its first frame with a number that is not finite."""
    finite_T = np.isfinite(rows_TD).all(axis=1)
    if not finite_T.all():
        raise UserError(f"{what} is not finite at frame {int(np.argmin(finite_T))}{remedy}")


def read_action_space(feature: Mapping[str, Any], extra: Mapping[str, Any], source: str) -> ActionSpace:
    """Returns the action space of a dataset from its `action` feature and the content of meta/lapa.json (`source`).

    Raises UserError naming `source` where its entry does not fit the feature.
    """
    declared = extra.get(ACTION_SPACE, {})
    if not isinstance(declared, Mapping) or not set(declared) <= {"binary", "control"}:
        form = '{"binary": ["gripper"], "control": "delta"}'
        raise UserError(f"{source}: {ACTION_SPACE} must be like {form}, got {declared}")
    binary = declared.get("binary") or []
    if not isinstance(binary, list):
        raise UserError(f"{source}: `binary` must be a list of names of action dimensions, got {binary!r}")
    try:
        return ActionSpace.named(dimension_names(feature), binary, declared.get("control"))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def common_action_space(datasets: Sequence[Dataset]) -> ActionSpace:
    """Returns the action space of datasets to be learned together; the names are the first's.

    Raises UserError where one has no actions, or they differ in the number of dimensions, in the binary ones, or in
    control (undeclared control goes with any).
    """
    if not datasets:
        raise UserError("no dataset was given to take the action space of")
    spaces = []
    for dataset in datasets:
        if dataset.action_space is None:
            raise UserError(f"{dataset.root}: has no actions; finetuning needs a dataset with an `action` feature")
        spaces.append(dataset.action_space)
    root, first = datasets[0].root, spaces[0]
    for dataset, space in zip(datasets, spaces, strict=True):
        if space.action_dim != first.action_dim:
            raise UserError(
                f"{dataset.root}: has actions of {space.action_dim} dimensions ({', '.join(space.names)}), "
                f"{root} of {first.action_dim} ({', '.join(first.names)}); finetune on datasets of one robot"
            )
        if space.binary != first.binary:
            here, there = (", ".join(its.binary_names) or "nothing" for its in (space, first))
            raise UserError(
                f"{dataset.root}: declares {here} binary, {root} {there}; "
                f'correct "{ACTION_SPACE}": {{"binary": [...]}} in the meta/lapa.json of one of them'
            )
    controls = {space.control: dataset.root for dataset, space in zip(datasets, spaces, strict=True) if space.control}
    if len(controls) > 1:
        found = ", ".join(f"{root} {control}" for control, root in controls.items())
        raise UserError(f"datasets differ in control: {found}; finetune on those of one kind")
    return ActionSpace(first.names, first.binary, next(iter(controls), None))


def image_keys(features: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the features that are colour images; depth maps and other images of one channel are not."""
    return [key for key in all_image_keys(features) if _is_colour(key, features[key])]


def all_image_keys(features: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the features that are images of any kind."""
    return [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]


def _is_colour(key: str, feature: Mapping[str, Any]) -> bool:
    # LeRobot has used both places and both names, and notes that a video is no depth map of videos that are.
    details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    if details.get("is_depth_map") or details.get("video.is_depth_map") or "depth" in key.lower():
        return False
    shape, names = feature["shape"], feature.get("names")
    if isinstance(names, list) and len(names) == len(shape) and (named := {"channel", "channels"} & {*map(str, names)}):
        channels = shape[names.index(named.pop())]
    else:
        channels = 1 if len(shape) < 3 or 1 in (shape[0], shape[2]) else 3
    grey = str(details.get("video.pix_fmt")).startswith("gray")
    return channels > 1 and details.get("video.channels") != 1 and not grey


def dimension_names(feature: Mapping[str, Any], prefix: str = ACTION) -> list[str]:
    """Returns one name per dimension from any form of LeRobot's: lists, in lists or under titles, or positions by name.

    Where there are none, or not as many as dimensions, the names are `action_0` and so on (with that prefix).
    """
    width = math.prod(feature["shape"])
    found = list(_flat_names(feature.get("names"), NAMES_DEPTH))
    return found if len(found) == width and all(found) else [f"{prefix}_{number}" for number in range(width)]


def _flat_names(names: object, depth: int) -> Iterator[str]:
    """Yields the names in lists and under titles, at most `depth` levels deep; "" for what is no name."""
    if isinstance(names, Mapping):
        # Positions by name, or a list under each title.
        positions = dict(names)
        by_position = all(type(position) is int for position in positions.values())
        names = sorted(positions, key=positions.__getitem__) if by_position else list(positions.values())
    if isinstance(names, list) and depth:
        for name in names:
            yield from _flat_names(name, depth - 1)
    else:
        yield str(names) if type(names) in (str, int) else ""
