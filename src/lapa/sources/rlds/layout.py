"""What an RLDS folder says of itself (dataset_info.json, features.json), and which of it becomes what.

TFDS flattens the steps of an episode: the feature `steps/action` holds the actions of all steps, end to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.console import say, warn
from lapa.data.action_space import ActionSpace
from lapa.data.source import Item
from lapa.errors import UserError, unknown
from lapa.files import read_json
from lapa.sources.rlds.table import CONSTANTS, POSE, Known, Part, columns
from lapa.sources.rlds.tfrecord import scan_records

INFO_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction", "natural_language_instruction")
STATE = "observation/state"
STEPS = "steps/"
MEND = "download it again, or leave out what is damaged: --skip-bad, or skip_bad=true with --data"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class Shard:
    """A TFRecord file of a split, and how many episodes it should hold. The file need not be there."""

    path: Path
    num_records: int


@dataclass(frozen=True)
class Layout:
    """Features to read, by their names below `steps` in a record.

    cameras: name -> feature; shapes: name -> (height, width), 0 where features.json does not say.
    spelled: how many characters a step has where the instruction is numbers, one a character; else 0.
    actions, states: what stands side by side (lapa.sources.rlds.table), empty without.
    """

    cameras: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    instruction: str | None
    spelled: int
    actions: list[Part]
    states: list[Part]
    action_space: ActionSpace | None
    state_names: tuple[str, ...] | None

    @property
    def numbers(self) -> dict[str, int]:
        """The features that actions and states are made of, and how many numbers a step of each has."""
        return {part.key: part.width for part in (*self.actions, *self.states) if part.key not in CONSTANTS}

    @property
    def keys(self) -> list[str]:
        """All features, by their names in a record."""
        texts = [self.instruction] if self.instruction else []
        return [STEPS + key for key in (*self.cameras.values(), *texts, *self.numbers)]


def read_info(folder: Path, split: str) -> tuple[str, str, list[Shard]]:
    """The dataset's name and version, and the shards of a split. Raises UserError naming the file and the mend."""
    path = folder / INFO_FILE
    if not path.is_file():
        inside = sorted(found.parent for found in folder.glob(f"*/{INFO_FILE}")) if folder.is_dir() else []
        hint = f"name the folder of a version, such as {inside[0]}" if inside else "name the folder of a TFDS dataset"
        raise UserError(f"{folder}: holds no {INFO_FILE}; {hint}")
    info = read_json(path)
    try:
        name, suffix = info["name"], info.get("fileFormat") or "tfrecord"
        splits = {entry["name"]: [int(count) for count in entry["shardLengths"]] for entry in info["splits"]}
        templates = {entry["name"]: entry.get("filepathTemplate") or TEMPLATE for entry in info["splits"]}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: lacks the name, the splits or their shardLengths; download it again") from None
    if suffix != "tfrecord":
        raise UserError(f"{path}: the files are {suffix}, only tfrecord is read; convert them with TFDS")
    if split not in splits:
        raise unknown("split", split, splits)
    fields = {"DATASET": name, "SPLIT": split, "FILEFORMAT": suffix}
    counts = splits[split]
    paths = [folder / _fill(templates[split], fields, index, len(counts)) for index in range(len(counts))]
    # Not the folder's name: a copy elsewhere is the same dataset.
    version = str(info.get("version") or "")
    return name, version, [Shard(path, count) for path, count in zip(paths, counts, strict=True)]


def present_shards(shards: Sequence[Shard], skip_bad: bool) -> list[Shard]:
    """The shards that are there; the others are a problem."""
    missing = [shard for shard in shards if not shard.path.is_file()]
    if missing:
        count = sum(shard.num_records for shard in missing)
        told = f"{missing[0].path}: missing; {len(missing)} of {len(shards)} shards are, with {count} episodes"
        _problem(told, count, skip_bad)
    return [shard for shard in shards if shard not in missing]


def find_items(shards: Sequence[Shard], skip_bad: bool) -> list[Item]:
    """All records that can be found; a shard with another number of them than it should have is a problem."""
    items = []
    for shard in shards:
        problem, num_found = "", 0
        for record in scan_records(shard.path):
            if record.error is not None:
                problem = f"{shard.path}: record {record.index} at byte {record.offset}: {record.error}"
                continue
            num_found += 1
            name = shard.path.name
            items.append(Item(f"{name}:{record.index}", (name, record.offset, record.length)))
        if not problem and num_found != shard.num_records:
            problem = f"{shard.path}: {num_found} records found, dataset_info.json says {shard.num_records}"
        if problem:
            _problem(problem, max(0, shard.num_records - num_found), skip_bad)
    return items


def _problem(told: str, count: int, skip_bad: bool) -> None:
    if not skip_bad:
        raise UserError(f"{told}; {MEND}")
    warn(f"left out: {told} (episodes skipped: {count})")


def choose_layout(
    folder: Path, known: Known, cameras: Sequence[str] = (), actions: bool = True, action_keys: Sequence[str] = ()
) -> Layout:
    """Decides what is read. cameras, action_keys: empty for all, and for what is known of the dataset.

    Raises UserError on a camera or an action feature that is not there.
    """
    features = _read_features(folder)
    # features.json has no order of its own, and the first camera is the one that other commands take.
    known_first = {"observation/" + known.image: 0, "observation/" + known.wrist: 1} if known.image else {}
    pictures = [key for key, node in features.items() if _is_picture(node)]
    pictures.sort(key=lambda key: (known_first.get(key, 2), key))
    images = {_camera(key): key for key in pictures}
    if not images:
        raise UserError(f"{folder / FEATURES_FILE}: none of its step features is a colour picture; nothing to convert")
    for camera in cameras:
        if camera not in images:
            raise unknown("camera", camera, images)
    chosen = {camera: images[camera] for camera in cameras or images}
    widths = {key: width for key, node in features.items() if (width := _width(node)) is not None}
    texts = [key for key, node in features.items() if "text" in node or _dtype(node) in ("string", "object")]
    spelled = widths.get(known.text, 0)
    likely = (*INSTRUCTIONS, *texts)
    instruction = known.text if spelled else next((key for key in (known.text, *likely) if key in texts), None)
    action_parts, space = _actions(folder, features, widths, known, action_keys) if actions else ([], None)
    state_parts = _states(widths, known) if actions else []
    return Layout(
        chosen,
        {camera: _size(features[key]) for camera, key in chosen.items()},
        instruction,
        spelled,
        action_parts,
        state_parts,
        space,
        tuple(_names(state_parts)) or None,
    )


def _actions(
    folder: Path,
    features: Mapping[str, Mapping[str, Any]],
    widths: Mapping[str, int],
    known: Known,
    action_keys: Sequence[str],
) -> tuple[list[Part], ActionSpace]:
    """What makes up the action: as told, as known of the dataset, or else the feature `action`."""
    if not action_keys:
        try:
            parts = columns(known.action, widths)
        except (KeyError, ValueError):
            if known.action != Known.action:
                say(f"{folder}: is not as it is known; its action is taken as it is there")
        else:
            if known.action == Known.action and known.control is None:
                return parts, ActionSpace.named(_names(parts))
            names = list(POSE) if sum(part.num for part in parts) == len(POSE) else _names(parts)
            binary = ["gripper"] if known.binary and "gripper" in names else []
            return parts, ActionSpace.named(names, binary, known.control)
    try:
        parts = columns(list(action_keys) or "action", widths)
    except KeyError as error:
        packed = features.get(error.args[0], {}).get("tensor", {}).get("encoding", "none")
        why = f"; {error.args[0]} is packed ({packed})" if packed != "none" else ""
        raise UserError(
            f"{folder}: has no step feature {error.args[0]!r} of plain numbers (there are {', '.join(widths)}){why}; "
            "name those that make up the action with --action-keys, or give --no-actions"
        ) from None
    except ValueError as error:
        raise UserError(f"{folder / FEATURES_FILE}: --action-keys {error}") from None
    return parts, ActionSpace.named(_names(parts))


def _states(widths: Mapping[str, int], known: Known) -> list[Part]:
    for parts in (known.state, STATE):
        try:
            return columns(parts, widths)
        except (KeyError, ValueError):
            continue
    return []


def _names(parts: Sequence[Part]) -> list[str]:
    """One name a number: the feature's (all of its path where two share a name), and its place there."""
    places = [(part.key, part.start + number) for part in parts for number in range(part.num)]
    short = [f"{key.rsplit('/', 1)[-1]}_{place}" for key, place in places]
    whole = [f"{key.replace('/', '_')}_{place}" for key, place in places]
    names = [one if short.count(one) == 1 else other for one, other in zip(short, whole, strict=True)]
    return [name if names.count(name) == 1 else f"{name}_at_{position}" for position, name in enumerate(names)]


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
        raise UserError(f"{path}: describes no `steps`; only RLDS datasets, one record an episode, are read") from None


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


def _size(node: Mapping[str, Any]) -> tuple[int, int]:
    height, width = _shape(node["image"])[:2]
    return max(0, height), max(0, width)


def _width(node: Mapping[str, Any]) -> int | None:
    """How many numbers a step has; None where it has none or an unknown number, or they are packed into bytes."""
    shape = _shape(node.get("tensor", {}))
    numeric = _dtype(node).startswith(("float", "int", "uint", "bool")) and all(size > 0 for size in shape)
    return math.prod(shape) if numeric and node["tensor"].get("encoding", "none") == "none" else None
