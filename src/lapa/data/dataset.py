"""Datasets as every command reads them: episodes of pictures, an instruction, and perhaps actions and states.

    dataset = open_dataset("data/clips")                       # a folder in the LeRobotDataset layout
    dataset = open_dataset("rlds:bridge_dataset/1.0.0")        # another source, in place (lapa.data.spec)
    dataset.frames(episode_index, [0, 5])                      # uint8 [2, H, W, 3]

Axes: T time, H W image, C channel, A action dimensions, S state dimensions, N frames of all episodes.
"""

from __future__ import annotations

import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from lapa.errors import UserError, unknown

CAMERA_PREFIX = "observation.images."
ACTION, STATE = "action", "observation.state"


@dataclass(frozen=True, slots=True)
class Episode:
    """One demonstration. `source` says what it was made from, where the writer knew (a file, a task and seed)."""

    index: int
    length: int
    instruction: str
    source: str = ""


class Dataset(ABC):
    """A dataset, opened for reading; use `open_dataset(data)`.

    Only metadata is held in memory, as columns; pictures and numbers are read when asked for. May be pickled.

    root, name: where it lies, and what it is called in figures, prompts and statistics.
    fps: of all episodes; features: as in LeRobot's meta/info.json (`dtype`, `shape`, `names` of each).
    lengths: frames of each episode, int64; num_frames: of all.
    cameras: short names; action_dim, state_dim: None where there are none.
    horizon: seconds between the frames of a pair, where it was given with the dataset (`--data PATH,horizon=2.4`).
    weight: how often it is drawn in a mixture (lapa.data.sampling).
    coded: whether it has codes of an image tokeniser (`image_codes`) in place of pictures.
    """

    coded = False

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
        self._instructions, self._sources = instructions, sources
        self.num_frames = int(lengths.sum())
        self._camera_keys = {_short(key): key for key in image_keys(features)}
        self.cameras = tuple(self._camera_keys)
        self.action_dim = self._width(ACTION)
        self.state_dim = self._width(STATE)
        self.horizon: float | None = None
        self.weight = 1.0

    @property
    def in_place(self) -> bool:
        """Whether this is somebody else's data, in whose folder nothing is written."""
        return False

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the dataset, as far as labels depend on it."""

    @property
    @abstractmethod
    def extra(self) -> dict[str, Any]:
        """What is noted about the dataset, such as how it was made."""

    @abstractmethod
    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        """Pictures that exist, uint8 [T, H, W, 3]."""

    @abstractmethod
    def _numbers(self, feature: str, episode_index: int) -> tuple[np.ndarray, str]:
        """The rows of an episode's feature, float32 [T, D], and the file they are in."""

    @cached_property
    def episodes(self) -> tuple[Episode, ...]:
        """All episodes, in order. Where an episode has several tasks, the first is its instruction."""
        rows = zip(self.lengths, self._instructions, self._sources, strict=True)
        return tuple(
            Episode(index, int(length), str(instruction), str(source))
            for index, (length, instruction, source) in enumerate(rows)
        )

    @cached_property
    def action_space(self) -> ActionSpace | None:
        """What the numbers of an action are; None where the dataset has no actions.

        UserError naming meta/lapa.json where what it declares does not fit them.
        """
        if self.action_dim is None:
            return None
        return read_action_space(self.features[ACTION], self.extra, f"{self.root}/meta/lapa.json")

    def camera_name(self, camera: str | None = None) -> str:
        """The camera, or the first where None. Raises UserError where the dataset does not have it."""
        camera = self.cameras[0] if camera is None else camera
        if camera not in self._camera_keys:
            raise UserError(f"{self.root}: {unknown('camera', camera, self.cameras)}")
        return camera

    def camera_feature(self, camera: str | None = None) -> dict[str, Any]:
        """What is known of a camera; None: the first."""
        return self.features[self._camera_keys[self.camera_name(camera)]]

    def image_shape(self, camera: str | None = None) -> tuple[int, int]:
        """Height and width of a camera's stored pictures."""
        height, width = self.camera_feature(camera)["shape"][:2]
        return int(height), int(width)

    def frames(
        self, episode_index: int, frame_indices: Sequence[int] | None = None, camera: str | None = None
    ) -> UInt8[np.ndarray, "T H W 3"]:
        """Pictures of an episode, RGB; None: all of them. camera None: the first. May repeat and go backwards."""
        length = int(self.lengths[episode_index])
        indices = range(length) if frame_indices is None else [int(index) for index in frame_indices]
        if len(indices) and not 0 <= min(indices) <= max(indices) < length:
            raise UserError(f"{self.name}: episode {episode_index} has frames 0 to {length - 1}, asked for {indices}")
        return self._images(episode_index, indices, self.camera_name(camera))

    def image_codes(self, episode_index: int, frame_indices: Sequence[int]) -> Int[np.ndarray, "T N"]:
        """The codes of pictures, of a dataset that is `coded`."""
        raise UserError(f"{self.root}: has pictures, and no codes of them")

    def instruction(self, episode_index: int) -> str:
        """What is asked for in an episode."""
        return str(self._instructions[episode_index])

    def actions(self, episode_index: int) -> Float[np.ndarray, "T A"]:
        """An episode's actions, in the robot's own units. UserError where the dataset has none or they are NaN."""
        if self.action_dim is None:
            raise UserError(f"{self.root}: has no actions; this needs a dataset with an `action` feature")
        return self._rows(ACTION, episode_index)

    def all_actions(self) -> Float[np.ndarray, "N A"]:
        """The actions of all episodes, one after another."""
        return np.concatenate([self.actions(episode) for episode in range(len(self.lengths))])

    def states(self, episode_index: int) -> Float[np.ndarray, "T S"] | None:
        """An episode's proprioception, or None where the dataset has none."""
        return None if self.state_dim is None else self._rows(STATE, episode_index)

    def _width(self, feature: str) -> int | None:
        return int(np.prod(self.features[feature]["shape"])) if feature in self.features else None

    def _rows(self, feature: str, episode_index: int) -> np.ndarray:
        rows_TD, file = self._numbers(feature, episode_index)
        if not np.isfinite(rows_TD).all():
            frame = int(np.argmin(np.isfinite(rows_TD).all(axis=1)))
            raise UserError(
                f"{file}: {feature} of episode {episode_index} is not finite at frame {frame}; "
                "correct it or leave the episode out"
            )
        return rows_TD


def image_keys(features: dict[str, dict[str, Any]]) -> list[str]:
    """The features that are pictures in colour; depth maps are none."""
    return [key for key, feature in features.items() if feature["dtype"] in ("video", "image") and not _depth(feature)]


def _depth(feature: dict[str, Any]) -> bool:
    # LeRobot has used both places and both names.
    details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(details.get("is_depth_map") or details.get("video.is_depth_map"))


def _short(key: str) -> str:
    return key.removeprefix(CAMERA_PREFIX).removeprefix("observation.")


Control = Literal["delta", "absolute"]
CONTROLS = typing.get_args(Control)
ACTION_SPACE = "action_space"


@dataclass(frozen=True)
class ActionSpace:
    """What the numbers of an action are. control: None where it is not declared."""

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
        """binary: the names of the binary dimensions. UserError for a name that is not there."""
        for name in binary:
            if name not in names:
                raise unknown("binary action dimension", str(name), names)
        return cls(tuple(names), tuple(name in binary for name in names), control)

    def declared(self) -> dict[str, Any]:
        """What meta/lapa.json says of it; nothing where nothing is declared beyond the names."""
        binary = [name for name, switch in zip(self.names, self.binary, strict=True) if switch]
        return {ACTION_SPACE: {"binary": binary, "control": self.control}} if binary or self.control else {}


def read_action_space(feature: Mapping[str, Any], extra: Mapping[str, Any], source: str) -> ActionSpace:
    """The action space of a dataset, given its `action` feature and what meta/lapa.json (`source`) holds.

    Raises UserError naming `source` where what it declares does not fit the feature.
    """
    names = _names(feature)
    declared = extra.get(ACTION_SPACE, {})
    if not isinstance(declared, Mapping) or not set(declared) <= {"binary", "control"}:
        raise UserError(
            f'{source}: {ACTION_SPACE} must be like {{"binary": ["gripper"], "control": "delta"}}, got {declared}'
        )
    binary = declared.get("binary") or []
    if not isinstance(binary, list):
        raise UserError(f"{source}: `binary` must be a list of names of action dimensions, got {binary!r}")
    try:
        return ActionSpace.named(names, binary, declared.get("control"))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def common_action_space(datasets: Sequence[Dataset]) -> ActionSpace:
    """The action space of datasets that are to be learned together; the names are the first's.

    Raises UserError where one has no actions, or they differ in the number of dimensions, in which of them are
    binary, or in control (undeclared control goes with any).
    """
    if not datasets:
        raise UserError("no dataset was given to take the action space of")
    first = datasets[0]
    spaces = [_space(dataset) for dataset in datasets]
    for dataset, space in zip(datasets, spaces, strict=True):
        if space.action_dim != spaces[0].action_dim:
            raise UserError(
                f"{dataset.root}: has actions of {space.action_dim} dimensions ({', '.join(space.names)}), "
                f"{first.root} of {spaces[0].action_dim} ({', '.join(spaces[0].names)}); "
                "finetune on datasets of one robot"
            )
        if space.binary != spaces[0].binary:
            raise UserError(
                f"{dataset.root}: declares {_switches(space)} binary, {first.root} {_switches(spaces[0])}; "
                f'correct "{ACTION_SPACE}": {{"binary": [...]}} in the meta/lapa.json of one of them'
            )
    controls = {space.control: dataset.root for dataset, space in zip(datasets, spaces, strict=True) if space.control}
    if len(controls) > 1:
        told = ", ".join(f"{root} {control}" for control, root in controls.items())
        raise UserError(f"datasets differ in control: {told}; finetune on those of one kind")
    return ActionSpace(spaces[0].names, spaces[0].binary, next(iter(controls), None))


def _space(dataset: Dataset) -> ActionSpace:
    if dataset.action_space is None:
        raise UserError(f"{dataset.root}: has no actions; finetuning needs a dataset with an `action` feature")
    return dataset.action_space


def _switches(space: ActionSpace) -> str:
    names = [name for name, switch in zip(space.names, space.binary, strict=True) if switch]
    return ", ".join(names) or "nothing"


def _names(feature: Mapping[str, Any]) -> list[str]:
    """One name a dimension, as LeRobot's datasets give them (a list, a list under a title, places by name); else

    `action_0` and so on.
    """
    width, names = int(np.prod(feature["shape"])), feature.get("names")
    if isinstance(names, Mapping):
        places = {name: place for name, place in names.items() if isinstance(place, int)}
        lists = [group for group in names.values() if isinstance(group, list)]
        names = sorted(places, key=lambda name: places[name]) or [name for group in lists for name in group]
    told = [str(name) for name in names] if isinstance(names, list) else []
    return told if len(told) == width else [f"action_{number}" for number in range(width)]
