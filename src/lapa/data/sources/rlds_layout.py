"""What an RLDS folder says of itself (dataset_info.json, features.json), and which of it becomes what.

TFDS flattens the steps of an episode: the feature `steps/action` holds the actions of all steps, end to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.config import unknown
from lapa.data.action_space import Control
from lapa.files import read_json

INFO_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction", "natural_language_instruction")
STATE = "observation/state"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
DELTA_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


@dataclass(frozen=True)
class Known:
    """What the files of a dataset do not tell.

    fps: its control rate; action_keys: the step features that make up its action; action_names: one a dimension.
    binary_actions: the names of the switches among them; control: whether the robot moves by the action or to it.
    """

    fps: float | None = None
    action_keys: tuple[str, ...] = ("action",)
    action_names: tuple[str, ...] = ()
    binary_actions: tuple[str, ...] = ()
    control: Control | None = None


RT1_ACTION = ("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action")
BRIDGE = Known(5, action_names=DELTA_POSE, binary_actions=("gripper",), control="delta")
KNOWN = {
    "bridge_dataset": BRIDGE,
    "bridge_orig": BRIDGE,
    # Its gripper says open, shut or as it is: three values.
    "fractal20220817_data": Known(3, RT1_ACTION, DELTA_POSE, control="delta"),
}


@dataclass(frozen=True)
class Shard:
    """A TFRecord file of a split, and how many episodes it should hold. The file need not be there."""

    path: Path
    num_records: int


@dataclass(frozen=True)
class Layout:
    """Features to read, by their names in a record. cameras: name -> feature; actions, states: feature -> width.

    action_names: one a dimension, None without actions; binary_actions, control: what is known of them.
    """

    cameras: dict[str, str]
    instruction: str | None
    actions: dict[str, int]
    states: dict[str, int]
    action_names: list[str] | None
    binary_actions: tuple[str, ...] = ()
    control: Control | None = None

    @property
    def keys(self) -> list[str]:
        """All of them."""
        return [*self.cameras.values(), *([self.instruction] if self.instruction else []), *self.actions, *self.states]


def read_info(folder: Path, split: str) -> tuple[str, list[Shard]]:
    """The dataset's name, and the shards of a split. Raises ValueError naming the file and the mend."""
    path = folder / INFO_FILE
    if not path.is_file():
        inside = sorted(found.parent for found in folder.glob(f"*/{INFO_FILE}")) if folder.is_dir() else []
        hint = f"name the folder of a version, such as {inside[0]}" if inside else "name the folder of a TFDS dataset"
        raise ValueError(f"{folder}: holds no {INFO_FILE}; {hint}")
    info = read_json(path)
    try:
        name, suffix = info["name"], info.get("fileFormat") or "tfrecord"
        splits = {entry["name"]: [int(count) for count in entry["shardLengths"]] for entry in info["splits"]}
        templates = {entry["name"]: entry.get("filepathTemplate") or TEMPLATE for entry in info["splits"]}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: lacks the name, the splits or their shardLengths; download it again") from None
    if suffix != "tfrecord":
        raise ValueError(f"{path}: the files are {suffix}, only tfrecord is read; convert them with TFDS")
    if split not in splits:
        raise unknown("split", split, splits)
    fields = {"DATASET": name, "SPLIT": split, "FILEFORMAT": suffix}
    counts = splits[split]
    paths = [folder / _fill(templates[split], fields, index, len(counts)) for index in range(len(counts))]
    return name, [Shard(path, count) for path, count in zip(paths, counts, strict=True)]


def choose_layout(
    folder: Path, known: Known, cameras: Sequence[str] = (), actions: bool = True, action_keys: Sequence[str] = ()
) -> Layout:
    """Decides what is read. cameras, action_keys: empty for all, and for what is known of the dataset.

    Raises ValueError on a camera or an action feature that is not there.
    """
    features = _read_features(folder)
    # features.json has no order of its own, and the first camera is the one that other commands take.
    images = {_camera(key): f"steps/{key}" for key in sorted(features) if _is_picture(features[key])}
    if not images:
        raise ValueError(f"{folder / FEATURES_FILE}: none of its step features is a colour picture; nothing to convert")
    for camera in cameras:
        if camera not in images:
            raise unknown("camera", camera, images)
    texts = [key for key, node in features.items() if "text" in node or _dtype(node) in ("string", "object")]
    instruction = next((f"steps/{key}" for key in (*INSTRUCTIONS, *texts) if key in texts), None)
    widths = {key: width for key, node in features.items() if (width := _width(node)) is not None}
    action_keys = (action_keys or known.action_keys) if actions else ()
    for key in action_keys:
        if key not in widths:
            raise ValueError(
                f"{folder}: has no step feature {key!r} of plain numbers (there are {', '.join(widths)}); "
                "name those that make up the action with --action-keys, or give --no-actions"
            )
    state_keys = [STATE] if actions and STATE in widths else []
    action_widths = {f"steps/{key}": widths[key] for key in action_keys}
    names = dimension_names(action_widths, known.action_names)
    # Of other features than the known ones, or fewer or more numbers, nothing is known.
    fits = tuple(action_keys) == known.action_keys and names == list(known.action_names)
    return Layout(
        {camera: images[camera] for camera in cameras or images},
        instruction,
        action_widths,
        {f"steps/{key}": widths[key] for key in state_keys},
        names,
        known.binary_actions if fits else (),
        known.control if fits else None,
    )


def dimension_names(widths: Mapping[str, int], known: Sequence[str] = ()) -> list[str] | None:
    """One name a dimension of features side by side: the known ones if they are as many. None without features."""
    names = [f"{key.rsplit('/', 1)[-1]}_{number}" for key, width in widths.items() for number in range(width)]
    return (list(known) if len(known) == len(names) else names) if widths else None


def _fill(template: str, fields: Mapping[str, str], index: int, num: int) -> str:
    """The file name of a shard: TFDS's template with its fields replaced."""
    numbers = {"SHARD_INDEX": f"{index:05d}", "NUM_SHARDS": f"{num:05d}", "SHARD_X_OF_Y": f"{index:05d}-of-{num:05d}"}
    for field, value in {**fields, **numbers}.items():
        template = template.replace(f"{{{field}}}", value)
    return template


def _read_features(folder: Path) -> dict[str, dict[str, Any]]:
    """The step features: path below `steps` -> what features.json says of it."""
    path = folder / FEATURES_FILE
    features = read_json(path)
    try:
        return dict(_leaves(features["featuresDict"]["features"]["steps"]["sequence"]["feature"], ""))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: describes no `steps`; only RLDS datasets, one record an episode, are read") from None


def _leaves(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if "featuresDict" not in node:
        yield path, node
        return
    for name, child in node["featuresDict"]["features"].items():
        yield from _leaves(child, f"{path}/{name}" if path else name)


def _camera(key: str) -> str:
    return key.removeprefix("observation/").replace("/", "_")


def _is_picture(node: Mapping[str, Any]) -> bool:
    return _shape(node.get("image", {}))[-1:] == [3] and node["image"].get("dtype", "uint8") == "uint8"


def _dtype(node: Mapping[str, Any]) -> str:
    return str(node.get("tensor", {}).get("dtype", ""))


def _shape(content: Mapping[str, Any]) -> list[int]:
    return [int(size) for size in content.get("shape", {}).get("dimensions", [])]


def _width(node: Mapping[str, Any]) -> int | None:
    """How many numbers a step has; None where it has none or an unknown number, or they are packed into bytes."""
    shape = _shape(node.get("tensor", {}))
    numeric = _dtype(node).startswith(("float", "int", "uint", "bool")) and all(size > 0 for size in shape)
    return math.prod(shape) if numeric and node["tensor"].get("encoding", "none") == "none" else None
