"""RLDS datasets, such as the TFDS folders of Open X-Embodiment, without TensorFlow: to convert, or to read in place.

    lapa data rlds bridge_dataset/1.0.0 --camera image_0 --out data/bridge
    lapa latent train --data rlds:bridge_dataset/1.0.0,camera=image_0 --out lam

A record of a TFRecord file is one episode. What the files do not tell is in lapa.sources.rlds.table.
Formats: https://github.com/google-research/rlds, https://www.tensorflow.org/datasets; datasets: arXiv 2310.08864.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import io
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, UnidentifiedImageError

from lapa.console import progress, say, warn
from lapa.data import convert
from lapa.data.action_space import ActionSpace
from lapa.data.config import ConvertOptions
from lapa.data.convert import BLANK
from lapa.data.dataset import ACTION, STATE
from lapa.data.source import Clip, Item, Reading, Source, with_length
from lapa.errors import UserError, unknown
from lapa.files import as_path, read_json
from lapa.sources.folder_scan import cached, file_state
from lapa.sources.rlds.table import CONSTANTS, KNOWN, POSE, Known, Part, columns
from lapa.sources.rlds.tfrecord import PARSED, parse_example, read_record, scan_records

FORMATS = ("JPEG", "PNG")
NO_TEXT = "without instruction (--caption TEXT gives them one)"
LEAVE_OUT = "mend or replace it, or convert with `lapa data rlds --skip-bad`, which leaves the episode out"
CHANGES = "the instruction changes, the first is taken"


@dataclass(frozen=True)
class RldsReading(Reading):
    """How an RLDS folder is read."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with features.json, dataset_info.json and the TFRecord files; mostly NAME/VERSION. May be a URL."""
    split: str = "train"
    """Split to read."""
    camera: tuple[str, ...] = ()
    """Cameras to read, by their names in the observation, the first first; by default all."""
    actions: bool = True
    """Read actions and robot states."""
    action_keys: tuple[str, ...] = ()
    """Step features that make up the action, in order; by default `action`, or what is known of the dataset. KEY is a
    feature, KEY[6] or KEY[:6] some of its numbers, not:KEY[6] one less it; lapa.sources.rlds.table has all."""
    caption: str | None = None
    """One text for the episodes that have no instruction."""
    fps: float | None = None
    """Steps per second, which RLDS does not store; needed where it is not known of the dataset."""
    skip_bad: bool = False
    """Leave out, and count, damaged records, episodes that do not fit features.json, and missing shards."""

    def open(self) -> RldsSource:
        """Raises UserError naming the file that is wrong and the mend."""
        return RldsSource(self)


@dataclass(frozen=True)
class RldsConfig(ConvertOptions, RldsReading):
    """Turn an RLDS (TFDS) folder, such as one of Open X-Embodiment, into a dataset."""


def run(config: RldsConfig) -> None:
    """`lapa data rlds`."""
    convert.run(config)


class RldsSource(Source):
    """An RLDS folder; an item is a record."""

    kind = "rlds"

    def __init__(self, reading: RldsReading):
        self.reading, self.root = reading, as_path(reading.folder)
        self.name, version, shards = read_info(self.root, reading.split)
        known = KNOWN.get(self.name, Known())
        self.fps = _rate(reading, known, self.name)
        self._layout = layout = choose_layout(self.root, known, reading.camera, reading.actions, reading.action_keys)
        self.action_space, self.state_names = layout.action_space, layout.state_names
        self._shards = present_shards(shards, reading.skip_bad)
        self.items = find_items(self._shards, reading.skip_bad)
        self._token = uuid.uuid4().hex
        self.cameras = {name: shape if all(shape) else self._look(name) for name, shape in layout.shapes.items()}
        self.settings = {
            "dataset": self.name,
            "version": version,
            "split": reading.split,
            "caption": reading.caption,
            "features": {ACTION: list(map(str, layout.actions)), STATE: list(map(str, layout.states))},
        }

    def file_of(self, item: Item) -> str:
        shard, offset, _ = item.place
        return f"{self.root / shard}: record {item.key.rsplit(':', 1)[-1]} at byte {offset}"

    def read(self, item: Item) -> Clip:
        values, num_steps = self._values(item), self._num_steps(item)
        numbers, instruction, notes, _ = self._looked_at(item, values)

        def pictures(camera: str) -> Iterator[tuple[float, np.ndarray]]:
            for step in range(num_steps):
                yield step / self.fps, self._picture(item, values, camera, step)

        return Clip(
            {camera: pictures(camera) for camera in self.cameras},
            instruction,
            numbers.get(ACTION),
            numbers.get(STATE),
            tuple(notes),
        )

    def _looked_at(
        self, item: Item, values: Mapping[str, Any]
    ) -> tuple[Mapping[str, np.ndarray], str, list[str], list[str]]:
        """What is told without decoding all pictures: numbers, instruction, notes, and the cameras that are blank."""
        numbers = self.numbers(item)
        instruction, notes = self._told(item, values)
        blank = self._blank(item, values)
        notes += [f"camera {name} shows one colour throughout (--camera chooses others)" for name in blank]
        return numbers, instruction, notes, blank

    def pictures(self, item: Item, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        try:
            values = self._values(item)
            return np.stack([self._picture(item, values, camera, int(step)) for step in frame_indices])
        except ValueError as error:
            raise UserError(f"{error}; {LEAVE_OUT}") from None

    def numbers(self, item: Item) -> Mapping[str, np.ndarray]:
        values, num_steps = self._values(item), self._num_steps(item)
        rows = {key: self._rows(item, values, key, width, num_steps) for key, width in self._layout.numbers.items()}
        parts = {ACTION: self._layout.actions, STATE: self._layout.states}
        return {
            name: np.concatenate([part.of(rows, num_steps) for part in its_parts], axis=1)
            for name, its_parts in parts.items()
            if its_parts
        }

    def measured(self) -> Sequence[Item]:
        """Instructions and lengths need a pass over all records, which is kept in the user's cache folder."""
        files = [self.root / INFO_FILE, self.root / FEATURES_FILE, *(shard.path for shard in self._shards)]
        options = [self.settings, self._layout.keys, self.reading.skip_bad]
        found = cached("rlds", [options, [file_state(file) for file in files]], self._measure)
        for problem in found["problems"]:
            warn(f"left out: {problem}")
        for note, count in found["notes"].items():
            warn(f"{self.name}: {note}: {count}")
        by_key = {item.key: item for item in self.items}
        return [with_length(by_key[key], length, text) for key, length, text in found["episodes"]]

    def _measure(self) -> dict[str, Any]:
        episodes, problems = [], []
        notes: Counter[str] = Counter()
        with progress() as bar:
            task = bar.add_task("looking through", total=len(self.items), note=self.name)
            for item in self.items:
                bar.advance(task)
                try:
                    _, instruction, its_notes, blank = self._looked_at(item, self._values(item))
                    num_steps = self._num_steps(item)
                except ValueError as error:
                    if not self.reading.skip_bad:
                        raise UserError(f"{error}; {MEND}") from None
                    problems.append(str(error))
                    continue
                notes.update(its_notes)
                if len(blank) == len(self.cameras):
                    notes[BLANK] += 1
                    continue
                episodes.append((item.key, num_steps, instruction))
        PARSED.clear()
        return {"episodes": episodes, "notes": notes, "problems": problems}

    def _values(self, item: Item) -> dict[str, Any]:
        """The features of a record, parsed; the last few are kept."""
        values = PARSED.get((self._token, item.key))
        if values is not None:
            return values
        shard, offset, length = item.place
        try:
            values = parse_example(read_record(self.root / shard, offset, length), self._layout.keys)
        except ValueError as error:
            raise self._wrong(item, error) from None
        lacking = [key for key in self._layout.keys if key not in values]
        if lacking:
            raise self._wrong(item, f"lacks {', '.join(lacking)}, which features.json names")
        values = {key.removeprefix(STEPS): value for key, value in values.items()}
        PARSED.put((self._token, item.key), values, length)
        return values

    def _num_steps(self, item: Item) -> int:
        """Steps of an episode: as many as its pictures."""
        values = self._values(item)
        counts = {key: len(values[key]) for key in self._layout.cameras.values()}
        first = next(iter(counts.values()))
        if not first:
            raise self._wrong(item, "has no step")
        for key, count in counts.items():
            if count != first:
                raise self._wrong(item, f"{STEPS}{key} has {count} pictures in an episode of {first} steps")
        return first

    def _picture(self, item: Item, values: Mapping[str, Any], camera: str, step: int) -> np.ndarray:
        key = self._layout.cameras[camera]
        try:
            with Image.open(io.BytesIO(values[key][step]), formats=FORMATS) as image:
                return np.asarray(image.convert("RGB"))
        # Pillow raises SyntaxError for a broken PNG; numbers where bytes should be are a TypeError.
        except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
            reason = "no JPEG or PNG" if isinstance(error, UnidentifiedImageError | TypeError) else error
            raise self._wrong(item, f"{STEPS}{key} cannot be decoded at step {step} ({reason})") from None

    def _blank(self, item: Item, values: Mapping[str, Any]) -> list[str]:
        """The cameras that show one colour throughout: the same bytes at every step, and these of one colour."""
        blank = []
        for camera, key in self._layout.cameras.items():
            encoded = values[key]
            if all(one == encoded[0] for one in encoded):
                frame_HWC = self._picture(item, values, camera, 0)
                if not np.ptp(frame_HWC, axis=(0, 1)).any():
                    blank.append(camera)
        return blank

    def _told(self, item: Item, values: Mapping[str, Any]) -> tuple[str, list[str]]:
        """The instruction, and what is to be noted of it."""
        texts: list[str] = []
        key = self._layout.instruction
        if key and self._layout.spelled:
            width, letters = self._layout.spelled, np.asarray(values[key])
            if not np.issubdtype(letters.dtype, np.integer) or len(letters) % width:
                raise self._wrong(item, f"{STEPS}{key} is not {width} characters a step")
            texts = [_spelled(row) for row in letters.reshape(-1, width)]
        elif key:
            try:
                texts = [text.decode().strip() for text in values[key]]
            except (UnicodeDecodeError, AttributeError):
                raise self._wrong(item, "its instruction is not UTF-8 text") from None
        instruction = (texts[0] if texts else "") or self.reading.caption or ""
        return instruction, [*([CHANGES] if len(set(texts)) > 1 else []), *([] if instruction else [NO_TEXT])]

    def _rows(self, item: Item, values: Mapping[str, Any], key: str, width: int, num_steps: int) -> np.ndarray:
        """The numbers of a feature, [T, width]."""
        flat = values[key]
        if not isinstance(flat, np.ndarray) or len(flat) != num_steps * width:
            raise self._wrong(item, f"{STEPS}{key} is not {width} numbers in each of {num_steps} steps")
        rows_TD = flat.reshape(num_steps, width).astype(np.float32)
        if not np.isfinite(rows_TD).all():
            step = int(np.argmin(np.isfinite(rows_TD).all(axis=1)))
            raise self._wrong(item, f"{STEPS}{key} is not finite at step {step}")
        return rows_TD

    def _look(self, camera: str) -> tuple[int, int]:
        """The size of a camera's pictures, where features.json does not say it: that of the first one."""
        if not self.items:
            return 0, 0
        height, width = self._picture(self.items[0], self._values(self.items[0]), camera, 0).shape[:2]
        return height, width

    def _wrong(self, item: Item, problem: object) -> UserError:
        return UserError(f"{self.file_of(item)}: {problem}")


def _rate(reading: RldsReading, known: Known, name: str) -> float:
    fps = known.fps if reading.fps is None else reading.fps
    if fps is None or not 0 < fps < float("inf"):
        told = "is not known" if fps is None else f"cannot be {fps:g}"
        raise UserError(f"{reading.folder}: the control rate of {name} {told}; give it as --fps (or fps= with --data)")
    return fps


def _spelled(row: np.ndarray) -> str:
    """Characters as numbers, filled up with zeros."""
    letters = row[: int(np.argmin(row))] if (row == 0).any() else row
    return "".join(chr(int(letter)) for letter in letters if 0 < letter < 0x110000).strip()


INFO_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
INSTRUCTIONS = ("language_instruction", "observation/natural_language_instruction", "natural_language_instruction")
STATE_FEATURE = "observation/state"
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
    for parts in (known.state, STATE_FEATURE):
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
