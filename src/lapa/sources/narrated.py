"""Long videos and a table of what is done in them from when to when: each row a clip, with its text.

    lapa data narrated EPIC-KITCHENS/ --narrations EPIC_100_train.csv --out data/epic
    lapa latent train --data narrated:EPIC-KITCHENS,narrations=EPIC_100_train.csv --out LAM

The CSV has the columns of EPIC-KITCHENS-100 (video_id, start_timestamp, stop_timestamp as HH:MM:SS.mmm, narration),
those usual with Ego4D (video_uid, start_sec, end_sec, narration_text), or video, start, stop, text; times are seconds
or H:MM:SS. A clip is leapt to, not read up to, and rows may overlap.
https://github.com/epic-kitchens/epic-kitchens-100-annotations, https://ego4d-data.org/docs/data/annotations-schemas/
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import UInt8

from lapa.console import warn
from lapa.data import convert
from lapa.data.convert import ConvertOptions
from lapa.data.source import Clip, Item, Source
from lapa.data.video import VideoInfo
from lapa.errors import UserError
from lapa.sources.folder_scan import find_films, judge, most_common, natural, require_rate, unambiguous
from lapa.sources.video_files import CAMERA, TIE, count_frames, frames_near, pictures_near, read_headers

COLUMNS = {
    "video": ("video", "video_id", "video_uid", "video_name", "file"),
    "start": ("start", "start_timestamp", "start_sec", "start_time", "start_seconds", "timestamp_start"),
    "stop": ("stop", "end", "stop_timestamp", "end_timestamp", "stop_sec", "end_sec", "stop_time", "end_time"),
    "text": ("text", "narration", "narration_text", "caption", "instruction"),
}


@dataclass(frozen=True)
class NarratedReading:
    """Long videos with a table of start, stop and text; each row is an episode."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with the videos; folders inside it are searched too."""
    narrations: str | None = None
    """CSV with the columns video, start, stop, text, or those of EPIC-KITCHENS or Ego4D; needed."""
    fps: float | None = None
    """Frames a second at which the videos are read; by default the rate most of them have."""
    skip_bad: bool = False
    """Leave out, and count, rows whose times are wrong and videos that cannot be read."""

    def open(self) -> Source:
        """Reads the table and the headers of its videos. UserError naming the row that is wrong and the mend."""
        return _open(self)


@dataclass(frozen=True)
class NarratedConfig(ConvertOptions, NarratedReading):
    """Cut long, narrated videos into a dataset without actions."""


class NarratedSource(Source):
    """Rows of a table of narrations. An item: place = (video, seconds at which it starts)."""

    kind = "narrated"

    def file_of(self, item: Item) -> str:
        return f"{self.root / item.place[0]}, from {item.place[1]:g} s"

    def read(self, item: Item) -> Clip:
        frames = zip(self._times(range(item.length or 0)), frames_near(*self._where(item, None)), strict=True)
        return Clip({CAMERA: frames}, item.instruction)

    def pictures(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        return pictures_near(*self._where(item, frame_indices))

    def _where(self, item: Item, frame_indices: Sequence[int] | None) -> tuple[Path, list[float]]:
        """The video, and when in it the frames are shown; None: all."""
        name, start = item.place
        indices = range(item.length or 0) if frame_indices is None else frame_indices
        return self.root / name, [start + seconds for seconds in self._times(indices)]

    def _times(self, frame_indices: Sequence[int]) -> list[float]:
        return [index / self.fps for index in frame_indices]


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    video: str
    start: float
    stop: float
    text: str


def run(config: NarratedConfig) -> None:
    """`lapa data narrated`."""
    convert.run(config, config)


def seconds(text: str) -> float:
    """Seconds from `12.5`, `1:02.5` or `00:01:02.500`. UserError where it is none of these, negative or not finite."""
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


def _open(reading: NarratedReading) -> NarratedSource:
    if reading.narrations is None:
        raise UserError(f"{reading.folder}: no narrations; give a CSV of video, start, stop, text as --narrations")
    require_rate(reading.fps)
    table = Path(reading.narrations)
    root, names = find_films(reading.folder)
    films, twice = unambiguous(names)
    rows, wrong = _read_rows(table)
    asked = dict.fromkeys(row.video for row in rows)
    for video in asked:
        if video in twice:
            raise UserError(f"{table}: {video} may be {twice[video]}; write the folder before it")
    missing = [video for video in asked if video not in films]
    if missing:
        lost = sum(row.video not in films for row in rows)
        warn(f"videos missing: {len(missing)} of the {len(asked)} that {table} names ({missing[0]}, ...); rows: {lost}")
    used = sorted({films[video] for video in asked if video in films}, key=natural)
    if not used:
        raise UserError(f"{root}: holds none of the {len(asked)} videos that {table} names; give their folder")
    headers: dict[str, VideoInfo] = {}
    broken = []
    for name, info in read_headers(root, used):
        if isinstance(info, UserError):
            broken.append(str(info))
        else:
            headers[name] = info
    skipped = judge(broken, "--skip-bad leaves such videos out, with their rows", reading.skip_bad)
    if not headers:
        raise UserError(f"{root}: no video of it can be used")
    source = NarratedSource()
    source.root, source.name = root, root.resolve().name
    source.fps = reading.fps or most_common([round(info.fps, 3) for info in headers.values()])
    source.cameras = {CAMERA: most_common([(info.height, info.width) for info in headers.values()])}
    source.inputs = (table,)
    source.settings = {"folder": source.name, "narrations": table.name, **({"fps": reading.fps} if reading.fps else {})}
    found = [(films[row.video], row) for row in rows if films.get(row.video) in headers]
    source.items, past = _items(source, found, headers, table)
    skipped += judge([*wrong, *past], "correct the row, or give --skip-bad to leave such rows out", reading.skip_bad)
    if skipped:
        warn(f"rows and videos skipped in all (--skip-bad): {skipped}")
    if not source.items:
        raise UserError(f"{table}: none of its rows can be used")
    return source


def _items(
    source: NarratedSource, rows: Sequence[tuple[str, _Row]], headers: Mapping[str, VideoInfo], table: Path
) -> tuple[list[Item], list[str]]:
    """The rows as items, those of a video together and in order, so that it is read on; and what is wrong with others.

    What goes on past the end of its video is cut there, and counted.
    """
    durations = {name: _duration(source.root / name, info) for name, info in headers.items()}
    items, wrong, cut = [], [], 0
    for name, row in sorted(rows, key=lambda entry: (natural(entry[0]), entry[1].start, entry[1].line)):
        duration = durations[name]
        if row.start >= duration:
            wrong.append(f"{table}: line {row.line}: starts at {row.start:g} s, but {name} ends at {duration:.3f} s")
            continue
        cut += row.stop > duration + 1 / source.fps
        length = max(1, ceil((min(row.stop, duration) - row.start) * source.fps - TIE * source.fps))
        items.append(
            Item(f"{name}@{row.start:.3f}-{row.stop:.3f} line {row.line}", (name, row.start), row.text, length)
        )
    if cut:
        warn(f"rows that go on past the end of their video, cut there: {cut} of {len(rows)}")
    return items, wrong


def _duration(path: Path, info: VideoInfo) -> float:
    return (count_frames(path, info, info.fps) if info.num_frames is None else info.num_frames) / info.fps


def _read_rows(path: Path) -> tuple[list[_Row], list[str]]:
    """The rows of a table of narrations, and what is wrong with those that are none."""
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
                    rows.append(_row(entry, columns, table.line_num))
                except ValueError as error:
                    wrong.append(f"{path}: line {table.line_num}: {error}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}: line {table.line_num + 1}: cannot be read ({error})") from None
    if not rows and not wrong:
        raise UserError(f"{path}: holds no row")
    return rows, wrong


def _row(entry: Mapping[str, str | None], columns: Mapping[str, str], line: int) -> _Row:
    video, start, stop, text = (str(entry[columns[what]] or "").strip() for what in ("video", "start", "stop", "text"))
    if not video or not text:
        raise UserError(f"has no {'text' if video else 'video'}")
    first, last = seconds(start), seconds(stop)
    if last <= first:
        raise UserError(f"stops at {stop}, which is not after its start at {start}")
    return _Row(line, video, first, last, text)
