"""Long videos and a table of what is done in them from when to when: each row becomes a clip, with its text.

    lapa data narrated EPIC-KITCHENS/ --narrations EPIC_100_train.csv --out data/epic
    lapa latent train --data narrated:EPIC-KITCHENS,narrations=EPIC_100_train.csv --out LAM

The CSV has the columns of EPIC-KITCHENS-100 (video_id, start_timestamp, stop_timestamp as HH:MM:SS.mmm, narration),
those usual with Ego4D (video_uid, start_sec, end_sec, narration_text), or video, start, stop, text; times are seconds
or H:MM:SS. Rows may overlap.
https://github.com/epic-kitchens/epic-kitchens-100-annotations, https://ego4d-data.org/docs/data/annotations-schemas/
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import UInt8

from lapa.console import warn
from lapa.data.config import ConvertOptions
from lapa.data.convert import TIE
from lapa.data.source import Clip, Item, Reading, Source
from lapa.data.video import VideoInfo
from lapa.errors import UserError
from lapa.sources.folder_scan import find_videos, natural_order, require_rate, short_names, stop_or_skip
from lapa.sources.videos import (
    CAMERA,
    UNREADABLE,
    common_format,
    count_frames,
    frames_at,
    frames_in_order,
    read_headers,
)

COLUMNS = {
    "video": ("video", "video_id", "video_uid", "video_name", "file"),
    "start": ("start", "start_timestamp", "start_sec", "start_time", "start_seconds", "timestamp_start"),
    "stop": ("stop", "end", "stop_timestamp", "end_timestamp", "stop_sec", "end_sec", "stop_time", "end_time"),
    "text": ("text", "narration", "narration_text", "caption", "instruction"),
}


@dataclass(frozen=True)
class NarratedReading(Reading):
    """Long videos with a table of start, stop and text; each row is an episode."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with the videos; folders inside it are searched too."""
    narrations: str | None = None
    """CSV with the columns video, start, stop, text, or those of EPIC-KITCHENS or Ego4D; needed."""
    fps: float | None = None
    """Frames a second at which the videos are read; by default the rate of most of them."""
    skip_bad: bool = False
    """Leave out, and count, rows whose times are wrong and videos that cannot be read."""

    def open(self) -> Source:
        return NarratedSource(self)


@dataclass(frozen=True)
class NarratedConfig(ConvertOptions, NarratedReading):
    """Cut long, narrated videos into a dataset without actions."""


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    video: str
    start: float
    stop: float
    text: str


class NarratedSource(Source):
    """Rows of a table of narrations. An item: place = (video, seconds at which it starts)."""

    kind = "narrated"

    def __init__(self, reading: NarratedReading):
        if reading.narrations is None:
            raise UserError(f"{reading.folder}: no narrations; give a CSV of video, start, stop, text as --narrations")
        require_rate(reading.fps)
        self.root, names = find_videos(reading.folder)
        self.name = self.root.resolve().name
        table = Path(reading.narrations)
        self.notes = notes = Counter[str]()
        rows, wrong = _read_rows(table)
        fix = "correct the row, or give --skip-bad to leave such rows out"
        if not rows:
            stop_or_skip(wrong, fix, reading.skip_bad)
            raise UserError(f"{table}: none of its rows can be used")
        videos = _find_named(self.root, names, rows, table)
        notes["rows whose video is missing"] = sum(row.video not in videos for row in rows)
        used = sorted(set(videos.values()), key=natural_order)
        headers, unreadable = read_headers(self.root, used)
        skipped = stop_or_skip(unreadable, "--skip-bad leaves such videos out, with their rows", reading.skip_bad)
        notes[UNREADABLE] = skipped
        if not headers:
            raise UserError(f"{self.root}: no video of it can be used")
        self.fps, size = common_format(headers.values(), reading.fps)
        self.cameras, self.inputs = {CAMERA: size}, (table,)
        self.settings = {"folder": self.name, "narrations": table.name, **({"fps": reading.fps} if reading.fps else {})}
        found = [(videos[row.video], row) for row in rows if videos.get(row.video) in headers]
        self.items, past, num_cut = self._find_items(found, headers, table)
        notes["rows that go on past the end of their video, cut there"] = num_cut
        if num_cut:
            warn(f"rows that go on past the end of their video, cut there: {num_cut} of {len(found)}")
        notes["rows that are wrong, left out"] = stop_or_skip([*wrong, *past], fix, reading.skip_bad)
        skipped += notes["rows that are wrong, left out"]
        if skipped:
            warn(f"rows and videos skipped in all (--skip-bad): {skipped}")
        if not self.items:
            raise UserError(f"{table}: none of its rows can be used")

    def file_of(self, item: Item) -> str:
        return f"{self.root / item.place[0]}, from {item.place[1]:g} s"

    def read(self, item: Item) -> Clip:
        frames = frames_in_order(*self._place(item, range(item.length or 0)))
        return Clip({CAMERA: ((index / self.fps, frame) for index, frame in enumerate(frames))}, item.instruction)

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        return frames_at(*self._place(item, frame_indices))

    def _place(self, item: Item, frame_indices: Sequence[int]) -> tuple[Path, list[float]]:
        """Returns the video, and the seconds at which it shows the frames."""
        name, start = item.place
        return self.root / name, [start + index / self.fps for index in frame_indices]

    def _find_items(
        self, rows: Sequence[tuple[str, _Row]], headers: Mapping[str, VideoInfo], table: Path
    ) -> tuple[list[Item], list[str], int]:
        """Items by video and start, so that each video is read in order, and the problems of rows that start too late.

        Rows that go on past the end of their video are cut there; how many is returned, too.
        """
        lengths = {
            name: count_frames(self.root / name, info, info.fps) if info.num_frames is None else info.num_frames
            for name, info in headers.items()
        }
        items, problems, num_cut = [], [], 0
        for name, row in sorted(rows, key=lambda entry: (natural_order(entry[0]), entry[1].start, entry[1].line)):
            duration = lengths[name] / headers[name].fps
            if row.start >= duration:
                problems.append(
                    f"{table}: line {row.line}: starts at {row.start:g} s, but {name} ends at {duration:.3f} s"
                )
                continue
            num_cut += row.stop > duration + 1 / self.fps
            length = max(1, ceil((min(row.stop, duration) - row.start) * self.fps - TIE * self.fps))
            key = f"{name}@{row.start:.3f}-{row.stop:.3f} line {row.line}"
            items.append(Item(key, (name, row.start), row.text, length))
        return items, problems, num_cut


def seconds(text: str) -> float:
    """Parses `12.5`, `1:02.5` or `00:01:02.500` as seconds. Raises UserError where it is none of these."""
    try:
        parts = [float(part) for part in text.strip().split(":")]
    except ValueError:
        parts = [float("nan")]
    value = 0.0
    for part in parts:
        value = value * 60 + part
    if len(parts) > 3 or not isfinite(value) or any(part < 0 for part in parts) or any(p >= 60 for p in parts[1:]):
        raise UserError(f"{text!r} is no time; expected seconds or H:MM:SS")
    return value


def _find_named(root: Path, names: Sequence[str], rows: Sequence[_Row], table: Path) -> dict[str, str]:
    """Returns the file of each video that rows name, of those that there are; missing ones are counted."""
    videos, ambiguous = short_names(names, without_suffix=True)
    asked = dict.fromkeys(row.video for row in rows)
    for video in asked:
        if video in ambiguous:
            raise UserError(f"{table}: {video} may be {ambiguous[video]}; write the folder before it")
    missing = [video for video in asked if video not in videos]
    if missing:
        lost = sum(row.video not in videos for row in rows)
        warn(f"videos missing: {len(missing)} of the {len(asked)} that {table} names ({missing[0]}, ...); rows: {lost}")
    if len(missing) == len(asked):
        raise UserError(f"{root}: holds none of the {len(asked)} videos that {table} names; give their folder")
    return {video: videos[video] for video in asked if video in videos}


def _read_rows(path: Path) -> tuple[list[_Row], list[str]]:
    """Returns the rows of a table of narrations, and what is wrong with malformed ones."""
    if not path.is_file():
        raise UserError(f"{path}: no such table of narrations")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        try:
            names = {name.strip().lower(): name for name in table.fieldnames or ()}
            columns = {}
            for what, known in COLUMNS.items():
                column = next((names[name] for name in known if name in names), None)
                if column is None:
                    raise UserError(f"{path}: has no column for the {what} (known: {', '.join(known)})")
                columns[what] = column
            rows, wrong = [], []
            for entry in table:
                try:
                    rows.append(_row({what: entry[column] or "" for what, column in columns.items()}, table.line_num))
                except UserError as error:
                    wrong.append(f"{path}: line {table.line_num}: {error}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: line {table.line_num + 1}: cannot be read ({error})") from None
    if not rows and not wrong:
        raise UserError(f"{path}: holds no row")
    return rows, wrong


def _row(entry: Mapping[str, str], line: int) -> _Row:
    video, start, stop, text = (entry[what].strip() for what in ("video", "start", "stop", "text"))
    if not video or not text:
        raise UserError(f"has no {'text' if video else 'video'}")
    first, last = seconds(start), seconds(stop)
    if last <= first:
        raise UserError(f"stops at {stop}, which is not after its start at {start}")
    return _Row(line, video, first, last, text)
