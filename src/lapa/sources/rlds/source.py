"""RLDS datasets, such as the TFDS folders of Open X-Embodiment, without TensorFlow: to convert, or to read in place.

    lapa data rlds bridge_dataset/1.0.0 --camera image_0 --out data/bridge
    lapa latent train --data rlds:bridge_dataset/1.0.0,camera=image_0 --out lam

A record of a TFRecord file is one episode. What the files do not tell is in lapa.sources.rlds.table.
Formats: https://github.com/google-research/rlds, https://www.tensorflow.org/datasets; datasets: arXiv 2310.08864.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import io
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, UnidentifiedImageError

from lapa.console import progress, warn
from lapa.data import convert
from lapa.data.convert import BLANK, ConvertOptions
from lapa.data.dataset import ACTION, STATE
from lapa.data.source import Clip, Item, Source, with_length
from lapa.errors import UserError
from lapa.files import as_path
from lapa.sources.cache import cached, stamp
from lapa.sources.rlds.layout import (
    FEATURES_FILE,
    INFO_FILE,
    MEND,
    STEPS,
    choose_layout,
    find_items,
    present_shards,
    read_info,
)
from lapa.sources.rlds.table import KNOWN, Known
from lapa.sources.rlds.tfrecord import PARSED, parse_example, read_record

FORMATS = ("JPEG", "PNG")
NO_TEXT = "without instruction (--caption TEXT gives them one)"
LEAVE_OUT = "mend or replace it, or convert with `lapa data rlds --skip-bad`, which leaves the episode out"
CHANGES = "the instruction changes, the first is taken"


@dataclass(frozen=True)
class RldsReading:
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
    convert.run(config, config)


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
        found = cached("rlds", [options, [stamp(file) for file in files]], self._measure)
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
