"""RLDS datasets, such as the TFDS folders of Open X-Embodiment, without TensorFlow: to convert, or to read in place.

    lapa data rlds bridge_dataset/1.0.0 --camera image_0 --out data/bridge
    lapa latent train --data rlds:bridge_dataset/1.0.0,camera=image_0 --out lam

dataset_info.json names the splits and their TFRecord files, features.json the features of a step; a record is one
episode, whose feature `steps/action` holds the actions of all steps, end to end. What the files do not contain is in
lapa.sources.rlds.table.
Formats: https://github.com/google-research/rlds, https://www.tensorflow.org/datasets; datasets: arXiv 2310.08864.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import ast
import math
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lapa.console import progress, say, warn
from lapa.data.config import ConvertOptions
from lapa.data.convert import BLANK
from lapa.data.dataset import ACTION, STATE, ActionSpace
from lapa.data.source import Clip, Item, Reading, Source
from lapa.data.transforms import decode_image
from lapa.errors import StoreError, UserError, shown, unknown
from lapa.files import as_path, errors_about, inside, read_json, whole_characters
from lapa.files import reading as reading_folder
from lapa.sources.folder_scan import cached, file_state
from lapa.sources.rlds.table import CONSTANTS, KNOWN, POSE, Known, Part, columns
from lapa.sources.rlds.tfrecord import PARSED, parse_example, read_record, scan_records

INFO_FILE, FEATURES_FILE = "dataset_info.json", "features.json"
STEPS = "steps/"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# Last parts of names of features that hold an instruction, the first preferred; a number may follow (DROID has three).
INSTRUCTIONS = (
    *("language_instruction", "natural_language_instruction", "instruction"),
    *("task_instruction", "task_description", "caption"),
)
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,199}")
NUMBERED = re.compile(r"(.*?)_?(\d*)")
# Stand for the numbers in a file's name; of no meaning in a pattern, and in no name.
INDEX, NUM = "\ue000", "\ue001"
# Bytes that Python printed, stored as a text.
PRINTED = re.compile(r"b(['\"]).*\1", re.DOTALL)
STATE_FEATURE = "observation/state"
# What reading JSON of another structure, or absurd numbers, may raise.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
FIX = "download it again, or leave out what is damaged: --skip-bad, or skip_bad=true with --data"
FIX_EPISODE = "repair or replace it, or convert with `lapa data rlds --skip-bad`, which leaves the episode out"
# What is counted.
NO_TEXT = "without instruction (--caption TEXT gives them one)"
CHANGES = "the instruction changes, the first is taken"
OTHERS = "other features hold other instructions (--instruction-key takes one of these)"


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
    feature, KEY[6] or KEY[:6] some of its numbers, not:KEY[6] one minus it; lapa.sources.rlds.table has all."""
    instruction_key: str | None = None
    """Text feature that is the instruction: of a step, or `episode_metadata/KEY`; by default those of usual names, such
    as language_instruction, the first of them that has words."""
    caption: str | None = None
    """One text for the episodes that have no instruction."""
    fps: float | None = None
    """Steps per second, which RLDS does not store; needed where it is not known of the dataset."""
    skip_bad: bool = False
    """Leave out, and count, damaged records, episodes that do not fit features.json, and missing shards."""

    def open(self) -> Source:
        return RldsSource(self)


@dataclass(frozen=True)
class RldsConfig(ConvertOptions, RldsReading):
    """Turn an RLDS (TFDS) folder, such as one of Open X-Embodiment, into a dataset."""

    def open(self) -> Source:
        """As `RldsReading.open`; with --limit, shards after those that hold as many records need not be there."""
        return RldsSource(self, self.limit)


@dataclass(frozen=True)
class Feature:
    """A step feature of features.json. kind: image, text, tensor or anything else, which is not read."""

    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    encoding: str = "none"

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Feature:
        """Raises one of `MALFORMED` where the node has another structure."""
        kind = next((kind for kind in ("image", "text", "tensor") if kind in node), "")
        content = node.get(kind, {})
        shape = tuple(int(size) for size in content.get("shape", {}).get("dimensions", []))
        return cls(kind, shape, str(content.get("dtype", "")), str(content.get("encoding", "none")))

    @property
    def is_colour_image(self) -> bool:
        return self.kind == "image" and len(self.shape) == 3 and self.shape[2] == 3 and self.dtype in ("", "uint8")

    @property
    def is_text(self) -> bool:
        return self.kind == "text" or (self.kind == "tensor" and self.dtype in ("string", "object"))

    @property
    def width(self) -> int | None:
        """Numbers in a step; None where there are none or an unknown number, or where they are packed into bytes."""
        numeric = self.kind == "tensor" and self.dtype.startswith(("float", "int", "uint", "bool"))
        plain = self.encoding == "none" and all(size > 0 for size in self.shape)
        return math.prod(self.shape) if numeric and plain else None


@dataclass(frozen=True)
class Layout:
    """Features to read, by their names below `steps` in a record.

    cameras: name -> feature; sizes: name -> (height, width), 0 where features.json does not contain it.
    texts: features of the instruction by their names in a record, the first preferred.
    spelled: characters in a step where the only one of these is numbers, one a character; else 0.
    actions, states: parts that are concatenated (lapa.sources.rlds.table), empty without.
    """

    cameras: dict[str, str]
    sizes: dict[str, tuple[int, int]]
    texts: list[str]
    spelled: int
    actions: list[Part]
    states: list[Part]
    action_space: ActionSpace | None

    @property
    def widths(self) -> dict[str, int]:
        """The features of actions and states, and how many numbers a step of each has."""
        return {part.key: part.width for part in (*self.actions, *self.states) if part.key not in CONSTANTS}

    @property
    def keys(self) -> list[str]:
        """All features, by their names in a record."""
        return [*(STEPS + key for key in (*self.cameras.values(), *self.widths)), *self.texts]


@dataclass(frozen=True)
class Episode:
    """A parsed record: its features by their names. where: file and record, for messages.

    Its methods raise UserError, naming the place, where the record does not fit the layout.
    """

    values: Mapping[str, Any]
    layout: Layout
    where: str

    @cached_property
    def num_steps(self) -> int:
        """As many as its images."""
        counts = {key: len(self.values[STEPS + key]) for key in self.layout.cameras.values()}
        first = next(iter(counts.values()))
        if not first:
            raise self._error("has no step")
        for key, count in counts.items():
            if count != first:
                raise self._error(f"{STEPS}{key} has {count} images in an episode of {first} steps")
        return first

    def image(self, camera: str, step: int) -> np.ndarray:
        key = STEPS + self.layout.cameras[camera]
        return decode_image(self.values[key][step], f"{self.where}: {key} cannot be decoded at step {step}")

    def blank_cameras(self) -> list[str]:
        """Returns the cameras that show one colour throughout: the same bytes at every step, of one colour."""
        blank = []
        for camera, key in self.layout.cameras.items():
            encoded = self.values[STEPS + key]
            if all(one == encoded[0] for one in encoded) and not np.ptp(self.image(camera, 0), axis=(0, 1)).any():
                blank.append(camera)
        return blank

    def instructions(self) -> dict[str, list[str]]:
        """Returns the texts of each feature of the instruction that has words, without its empty ones."""
        found = {key: [text for text in self._texts(key) if text] for key in self.layout.texts}
        return {key: texts for key, texts in found.items() if texts}

    def _texts(self, key: str) -> list[str]:
        if width := self.layout.spelled:
            letters = np.asarray(self.values[key])
            if not np.issubdtype(letters.dtype, np.integer) or len(letters) % width:
                raise self._error(f"{key} is not {width} characters a step")
            return [_spelled(row) for row in letters.reshape(-1, width)]
        try:
            return [_words(text.decode()) for text in self.values[key]]
        except (UnicodeDecodeError, AttributeError):
            raise self._error("its instruction is not UTF-8 text") from None

    def numbers(self) -> dict[str, np.ndarray]:
        """Returns actions and states, [T, D], those of them that there are."""
        rows = {key: self._rows(key, width) for key, width in self.layout.widths.items()}
        parts = {ACTION: self.layout.actions, STATE: self.layout.states}
        return {
            name: np.concatenate([part.of(rows, self.num_steps) for part in its_parts], axis=1)
            for name, its_parts in parts.items()
            if its_parts
        }

    def _rows(self, key: str, width: int) -> np.ndarray:
        """Returns the numbers of a feature, [T, width]."""
        flat = self.values[STEPS + key]
        if not isinstance(flat, np.ndarray) or len(flat) != self.num_steps * width:
            raise self._error(f"{STEPS}{key} is not {width} numbers in each of {self.num_steps} steps")
        rows_TD = flat.reshape(self.num_steps, width).astype(np.float32)
        finite_T = np.isfinite(rows_TD).all(axis=1)
        if not finite_T.all():
            raise self._error(f"{STEPS}{key} is not finite at step {int(np.argmin(finite_T))}")
        return rows_TD

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")


class RldsSource(Source):
    """An RLDS folder; an item is a record: place = (file, first byte, length)."""

    kind = "rlds"

    def __init__(self, reading: RldsReading, limit: int | None = None):
        self.reading, self.root = reading, as_path(reading.folder)
        self.name, version, shards = read_info(self.root, reading.split)
        known = KNOWN.get(self.name, Known())
        self.fps = _rate(reading, known, self.name)
        self._layout = layout = choose_layout(self.root, known, reading)
        self.action_space, self.state_names = layout.action_space, tuple(_names(layout.states)) or None
        if limit is not None and not reading.skip_bad:
            shards = first_shards(shards, limit)
        expected, shards = shards, present_shards(shards, reading.skip_bad)
        self.items = find_items(shards, reading.skip_bad)
        # Of shards whose records are not counted anywhere, what is damaged is only shown.
        num_lost = max(0, sum(num or 0 for num in shards.values()) - len(self.items))
        self.notes = {"shards missing": len(expected) - len(shards), "records damaged or missing in others": num_lost}
        self._files = [self.root / INFO_FILE, self.root / FEATURES_FILE, *shards]
        self._token = uuid.uuid4().hex
        self.cameras = dict(layout.sizes)
        for camera, size in layout.sizes.items():
            if not all(size) and self.items:
                height, width = self._episode(self.items[0]).image(camera, 0).shape[:2]
                self.cameras[camera] = height, width
        self.settings = {
            "dataset": self.name,
            "version": version,
            "split": reading.split,
            "caption": reading.caption and whole_characters(reading.caption),
            **({"instruction": reading.instruction_key} if reading.instruction_key else {}),
            "features": {ACTION: list(map(str, layout.actions)), STATE: list(map(str, layout.states))},
        }

    def file_of(self, item: Item) -> str:
        shard, offset, _ = item.place
        return f"{self.root / shard}: record {item.key.rsplit(':', 1)[-1]} at byte {offset}"

    def read(self, item: Item) -> Clip:
        episode = self._episode(item)
        num_steps, numbers = episode.num_steps, episode.numbers()
        instruction, notes, _ = self._examine(episode)
        # The converter counts these for every source.
        notes = [note for note in notes if note != NO_TEXT]

        def images(camera: str) -> Iterator[tuple[float, np.ndarray]]:
            for step in range(num_steps):
                yield step / self.fps, episode.image(camera, step)

        frames = {camera: images(camera) for camera in self.cameras}
        return Clip(frames, instruction, numbers.get(ACTION), numbers.get(STATE), tuple(notes))

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        try:
            episode = self._episode(item)
            return np.stack([episode.image(camera, int(step)) for step in frame_indices])
        except StoreError:
            raise
        except UserError as error:
            raise UserError(f"{error}; {FIX_EPISODE}") from None

    def numbers(self, item: Item) -> Mapping[str, np.ndarray]:
        return self._episode(item).numbers()

    def measured(self) -> Sequence[Item]:
        """Instructions and lengths need a pass over all records, which is cached."""
        options = [self.settings, self._layout.keys, self._layout.texts, self.reading.skip_bad]
        found = cached("rlds", [options, [file_state(file) for file in self._files]], self._measure)
        for problem in found["problems"]:
            warn(f"left out: {problem}")
        for note, count in found["notes"].items():
            warn(f"{self.name}: {note}: {count}")
        by_key = {item.key: item for item in self.items}
        return [replace(by_key[key], length=length, instruction=text) for key, length, text in found["episodes"]]

    def _measure(self) -> dict[str, Any]:
        episodes, problems = [], []
        notes: Counter[str] = Counter()
        with progress() as bar:
            task = bar.add_task("scanning", total=len(self.items), note=self.name)
            for item in self.items:
                bar.advance(task)
                try:
                    episode = self._episode(item)
                    episode.numbers()
                    instruction, its_notes, blank = self._examine(episode)
                except StoreError:
                    raise
                except UserError as error:
                    if not self.reading.skip_bad:
                        raise UserError(f"{error}; {FIX}") from None
                    problems.append(str(error))
                    continue
                notes.update(its_notes)
                if len(blank) == len(self.cameras):
                    notes[BLANK] += 1
                    continue
                episodes.append((item.key, episode.num_steps, instruction))
        PARSED.clear()
        return {"episodes": episodes, "notes": notes, "problems": problems}

    def _examine(self, episode: Episode) -> tuple[str, list[str], list[str]]:
        """Returns the instruction, what should be counted, and the blank cameras, without decoding all images."""
        texts = episode.instructions()
        first, *others = texts.values() or [[]]
        instruction = first[0] if first else whole_characters(self.reading.caption or "")
        blank = episode.blank_cameras()
        notes = [*([CHANGES] if len(set(first)) > 1 else []), *([] if instruction else [NO_TEXT])]
        notes += [OTHERS] if any(text not in first for other in others for text in other) else []
        notes += [f"camera {name} shows one colour throughout (--camera chooses others)" for name in blank]
        return instruction, notes, blank

    def _episode(self, item: Item) -> Episode:
        """Returns the parsed record of an item; the last few are kept in memory."""
        episode = PARSED.get((self._token, item.key))
        if episode is not None:
            return episode
        (shard, offset, length), where, keys = item.place, self.file_of(item), self._layout.keys
        try:
            values = parse_example(read_record(self.root / shard, offset, length), keys)
        except StoreError:
            raise
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if lacking := [key for key in keys if key not in values]:
            raise UserError(f"{where}: lacks {', '.join(lacking)}, which features.json names")
        episode = Episode(values, self._layout, where)
        PARSED.put((self._token, item.key), episode, length)
        return episode


def read_info(folder: Path, split: str) -> tuple[str, str, dict[Path, int | None]]:
    """Returns the dataset's name and version, and the files of a split with the episodes that each should hold.

    That is None where it is not known. The files need not be there.
    Raises UserError naming the file that is wrong and how to fix it.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        versions = sorted(found.parent for found in folder.glob(f"*/{INFO_FILE}")) if folder.is_dir() else []
        such = f"a version, such as {versions[0]}" if versions else "a TFDS dataset"
        hint = f"name the folder of {such}"
        raise UserError(f"{folder}: holds no {INFO_FILE}; {hint}")
    info = read_json(path)
    try:
        name, file_format = str(info["name"]), str(info.get("fileFormat") or "tfrecord")
        splits = {str(entry["name"]): [int(count) for count in entry["shardLengths"]] for entry in info["splits"]}
        templates = {str(entry["name"]): str(entry.get("filepathTemplate") or TEMPLATE) for entry in info["splits"]}
        # Not the folder's name: a copy elsewhere is the same dataset.
        version = str(info.get("version") or "")
    except MALFORMED:
        raise UserError(f"{path}: lacks the name, the splits or their shardLengths; download it again") from None
    if file_format != "tfrecord":
        raise UserError(f"{path}: the files are {file_format}, only tfrecord is read; convert them with TFDS")
    if split not in splits:
        raise unknown("split", split, splits)
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{path}: the dataset's name is {shown(name)}; expected letters, digits and any of _ . + -")

    def file_name(index: str, num: str) -> str:
        found = templates[split]
        for field, value in {
            "DATASET": name,
            "SPLIT": split,
            "FILEFORMAT": file_format,
            "SHARD_INDEX": index,
            "NUM_SHARDS": num,
            "SHARD_X_OF_Y": f"{index}-of-{num}",
        }.items():
            found = found.replace(f"{{{field}}}", value)
        with errors_about(path):
            if inside(folder, found).parent != folder:
                raise UserError(f"the files' names hold a folder, {shown(found)}; expected files in {folder}")
        return found

    return name, version, _name_shards(folder, splits[split], file_name)


def _name_shards(folder: Path, counts: Sequence[int], file_name: Callable[[str, str], str]) -> dict[Path, int | None]:
    """Returns the files with the episodes that each should hold, None where this is not known.

    counts: these, by dataset_info.json. In a part of a dataset, or in one that was divided again, the files there count
    others than dataset_info.json: where it names none that is there, the files themselves are taken.
    """
    shards = {folder / file_name(f"{index:05d}", f"{len(counts):05d}"): count for index, count in enumerate(counts)}
    if any(path.is_file() for path in shards):
        return dict(shards)
    numbered = _numbered_files(folder, re.escape(file_name(INDEX, NUM)))
    if not numbered:
        return dict(shards)
    num = max(numbered, key=lambda num: (len(numbered[num]), num))
    here = len(numbered[num])
    warn(
        f"{folder}: {INFO_FILE} lists {len(counts)} shards with {sum(counts)} episodes, the files are of {num} shards; "
        f"the {here} that are here are read, missing: {num - here}"
    )
    if ignored := sum(len(files) for other, files in numbered.items() if other != num):
        warn(f"{folder}: shards of other numbers, not read: {ignored}")
    return {path: None for _, path in sorted(numbered[num].items())}


def _numbered_files(folder: Path, pattern: str) -> dict[int, dict[int, Path]]:
    """Returns the files whose names fit a pattern, by their number of shards and their index among these."""
    for mark, group in ((INDEX, "index"), (NUM, "num")):
        pattern = pattern.replace(mark, rf"(?P<{group}>\d{{5,9}})", 1).replace(mark, f"(?P={group})")
    numbered: dict[int, dict[int, Path]] = {}
    with reading_folder(folder):
        for path in folder.iterdir():
            match = re.fullmatch(pattern, path.name)
            groups = match.groupdict() if match else {}
            if {"index", "num"} <= set(groups) and int(groups["index"]) < int(groups["num"]) and path.is_file():
                numbered.setdefault(int(groups["num"]), {})[int(groups["index"])] = path
    return numbered


def first_shards(shards: Mapping[Path, int | None], limit: int) -> dict[Path, int | None]:
    """Returns the first files that hold `limit` records together; all where that is not known."""
    if None in shards.values():
        return dict(shards)
    before = accumulate((count or 0 for count in shards.values()), initial=0)
    return {path: count for (path, count), number in zip(shards.items(), before, strict=False) if number < limit}


def present_shards(shards: Mapping[Path, int | None], skip_bad: bool) -> dict[Path, int | None]:
    """Returns the files that are there; a missing one is a problem as in `find_items`."""
    present = {path: num_records for path, num_records in shards.items() if path.is_file()}
    if len(present) < len(shards):
        missing = [path for path in shards if path not in present]
        num_lost = sum(shards[path] or 0 for path in missing)
        problem = f"{missing[0]}: missing; {len(missing)} of {len(shards)} shards are, with {num_lost} episodes"
        _report(problem, num_lost, skip_bad)
    return present


def find_items(shards: Mapping[Path, int | None], skip_bad: bool) -> list[Item]:
    """Returns all records. Raises UserError (with skip_bad: warns) where their number is not the expected one."""
    items = []
    for path, num_records in shards.items():
        problem, num_found = "", 0
        for record in scan_records(path):
            if record.error is not None:
                problem = f"{path}: record {record.index} at byte {record.offset}: {record.error}"
                continue
            num_found += 1
            items.append(Item(f"{path.name}:{record.index}", (path.name, record.offset, record.length)))
        if not problem and num_records is not None and num_found != num_records:
            problem = f"{path}: {num_found} records found, dataset_info.json expects {num_records}"
        if problem:
            _report(problem, max(0, (num_records or 0) - num_found), skip_bad)
    return items


def _report(problem: str, num_lost: int, skip_bad: bool) -> None:
    if not skip_bad:
        raise UserError(f"{problem}; {FIX}")
    warn(f"left out: {problem} (episodes skipped: {num_lost})")


def choose_layout(folder: Path, known: Known, reading: RldsReading) -> Layout:
    """Decides what is read. Raises UserError on a camera or an action feature that is not there."""
    features, of_episode = _read_features(folder)
    # features.json has no order of its own, and the first camera is the one that other commands take.
    known_first = {"observation/" + known.image: 0, "observation/" + known.wrist: 1} if known.image else {}
    images = {
        key.removeprefix("observation/").replace("/", "_"): key
        for key in sorted(features, key=lambda key: (known_first.get(key, 2), key))
        if features[key].is_colour_image
    }
    others = [key for key, feature in features.items() if feature.kind == "image" and not feature.is_colour_image]
    if not images:
        raise UserError(f"{folder / FEATURES_FILE}: none of its step features is a colour image; nothing to convert")
    if others:
        say(f"{folder}: left out, no colour images (depth, masks): {', '.join(others)}")
    for camera in reading.camera:
        if camera not in images:
            raise unknown("camera", camera, images)
    cameras = {camera: images[camera] for camera in reading.camera or images}
    sizes = {camera: features[key].shape for camera, key in cameras.items()}
    widths = {key: feature.width for key, feature in features.items() if feature.width is not None}
    spelled = 0 if reading.instruction_key else widths.get(known.text, 0)
    texts = [STEPS + known.text] if spelled else _choose_texts(folder, features, of_episode, known, reading)
    action_parts, space = _choose_actions(folder, features, widths, known, reading) if reading.actions else ([], None)
    return Layout(
        cameras,
        {camera: (max(0, height), max(0, width)) for camera, (height, width, _) in sizes.items()},
        texts,
        spelled,
        action_parts,
        _choose_states(widths, known) if reading.actions else [],
        space,
    )


def _choose_texts(
    folder: Path,
    features: Mapping[str, Feature],
    of_episode: Mapping[str, Feature],
    known: Known,
    reading: RldsReading,
) -> list[str]:
    """Returns the features of the instruction by their names in a record: the one that is given, or those known."""
    texts = [STEPS + key for key, feature in features.items() if feature.is_text]
    texts += [key for key, feature in of_episode.items() if feature.is_text]
    if reading.instruction_key:
        for key in (STEPS + reading.instruction_key, reading.instruction_key):
            if key in texts:
                return [key]
        raise unknown("text feature", reading.instruction_key, [key.removeprefix(STEPS) for key in texts])

    def preference(key: str) -> tuple[bool, bool, int, int, str] | None:
        match = NUMBERED.fullmatch(key.rpartition("/")[2])
        assert match is not None, "the pattern takes any name"
        if key == STEPS + known.text:
            return False, False, 0, 0, key
        if match[1] not in INSTRUCTIONS:
            return None
        return True, not key.startswith(STEPS), INSTRUCTIONS.index(match[1]), int(match[2][:9] or 0), key

    found = sorted(place for key in texts if (place := preference(key)) is not None)
    if texts and not found:
        others = ", ".join(key.removeprefix(STEPS) for key in texts)
        say(f"{folder}: none of its texts is known to be an instruction ({others}); --instruction-key KEY takes one")
    return [key for *_, key in found]


def _choose_actions(
    folder: Path, features: Mapping[str, Feature], widths: Mapping[str, int], known: Known, reading: RldsReading
) -> tuple[list[Part], ActionSpace]:
    """Returns the parts of the action: those given, those known of the dataset, or else the feature `action`."""
    if not reading.action_keys:
        try:
            parts = columns(known.action, widths)
        except (KeyError, UserError):
            if known.action != Known.action:
                say(f"{folder}: has other features than known of this dataset; its action is read as stored")
        else:
            if known.action == Known.action and known.control is None:
                return parts, ActionSpace.named(_names(parts))
            names = list(POSE) if sum(part.num for part in parts) == len(POSE) else _names(parts)
            binary = ["gripper"] if known.binary and "gripper" in names else []
            return parts, ActionSpace.named(names, binary, known.control)
    try:
        parts = columns(reading.action_keys or "action", widths)
    except KeyError as error:
        key = error.args[0]
        packed = features[key].encoding if key in features else "none"
        raise UserError(
            f"{folder}: has no step feature {key!r} of plain numbers (there are {', '.join(widths)})"
            + (f"; {key} is packed ({packed})" if packed != "none" else "")
            + "; name those that make up the action with --action-keys, or give --no-actions"
        ) from None
    except UserError as error:
        raise UserError(f"{folder / FEATURES_FILE}: --action-keys {error}") from None
    return parts, ActionSpace.named(_names(parts))


def _choose_states(widths: Mapping[str, int], known: Known) -> list[Part]:
    for parts in (known.state, STATE_FEATURE):
        try:
            return columns(parts, widths)
        except (KeyError, UserError):
            continue
    return []


def _names(parts: Sequence[Part]) -> list[str]:
    """Returns one name a number: the feature's (its whole path where two share a name), and its place there."""
    places = [(part.key, part.start + number) for part in parts for number in range(part.num)]
    short = [f"{key.rsplit('/', 1)[-1]}_{place}" for key, place in places]
    whole = [f"{key.replace('/', '_')}_{place}" for key, place in places]
    names = [one if short.count(one) == 1 else other for one, other in zip(short, whole, strict=True)]
    return [name if names.count(name) == 1 else f"{name}_at_{position}" for position, name in enumerate(names)]


def _read_features(folder: Path) -> tuple[dict[str, Feature], dict[str, Feature]]:
    """Returns the features of features.json: those of steps, by their paths below `steps`, and those of episodes."""

    def leaves(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Feature]]:
        if "featuresDict" not in node:
            yield path, Feature.of(node)
            return
        for name, child in node["featuresDict"]["features"].items():
            yield from leaves(child, f"{path}/{name}" if path else name)

    path = folder / FEATURES_FILE
    features = read_json(path)
    try:
        steps = features["featuresDict"]["features"].pop("steps")["sequence"]["feature"]
        return dict(leaves(steps, "")), dict(leaves(features, ""))
    except MALFORMED:
        raise UserError(f"{path}: describes no `steps`; only RLDS datasets, one record an episode, are read") from None


def _rate(reading: RldsReading, known: Known, name: str) -> float:
    fps = known.fps if reading.fps is None else reading.fps
    if fps is None or not 0 < fps < math.inf:
        problem = "is not known" if fps is None else f"cannot be {fps:g}"
        raise UserError(
            f"{reading.folder}: the control rate of {name} {problem}; give it as --fps (or fps= with --data)"
        )
    return fps


def _words(text: str) -> str:
    """Returns a text without blanks around it, and as it was before Python printed it as bytes."""
    text = text.strip()
    if PRINTED.fullmatch(text):
        # Where it is not certain what was printed, it stays as it is.
        with suppress(SyntaxError, ValueError):
            return _words(ast.literal_eval(text).decode())
    return text


def _spelled(row: np.ndarray) -> str:
    """Returns the text of characters as numbers, padded with zeros."""
    letters = row[: int(np.argmin(row))] if (row == 0).any() else row
    return "".join(chr(int(letter)) for letter in letters if 0 < letter < 0x110000).strip()
