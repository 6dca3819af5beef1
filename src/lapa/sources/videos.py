"""Folders of videos, with or without a caption each: a dataset without actions, or read in place.

    lapa data videos clips/ --captions captions.json --out data/clips
    lapa latent train --data videos:clips,captions=captions.json --out LAM

Reads whatever PyAV opens, at any size and rate; frames are taken at one rate by their timestamps. Captions are JSON
{file: text}, JSONL or CSV (columns `file` and `text`, `caption` or `instruction`), or one text for all.
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lapa import files
from lapa.console import say, warn
from lapa.data import convert
from lapa.data.convert import Converted, ConvertOptions, Part
from lapa.data.source import Item, Source
from lapa.data.statistics import PixelMoments
from lapa.data.video import MP4_CODECS, ClipScan, VideoInfo, copy_stream, decode_clip
from lapa.errors import UserError
from lapa.sources.folder_scan import by_short_name, find_films, judge, most_common, require_rate
from lapa.sources.video_files import CAMERA, FilmSource, quick_count, read_headers

CAPTION_COLUMNS = ("text", "caption", "instruction")


@dataclass(frozen=True)
class VideosReading:
    """A folder of videos, each an episode."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder with videos; folders inside it are searched too."""
    captions: str | None = None
    """JSON {file: text}, JSONL or CSV with the columns file and text (or caption, or instruction)."""
    caption: str | None = None
    """One text for every video; with --captions, for those that have none there."""
    fps: float | None = None
    """Frames a second at which the videos are read; by default the rate most of them have."""
    skip_bad: bool = False
    """Leave out, and count, files that are no videos, videos without caption and captions without video."""

    def open(self) -> Source:
        """Looks at the header of every video. UserError naming the file that is wrong and the mend."""
        return open_videos(self)


@dataclass(frozen=True)
class VideosConfig(ConvertOptions, VideosReading):
    """Turn a folder of videos into a dataset without actions."""

    keep_encoding: bool = False
    """Copy the video streams as they are (H.264, HEVC, AV1 or VP9, all of one size and rate); slower to train on."""

    def open(self) -> Source:
        """As `VideosReading.open`; with `keep_encoding`, UserError also where the videos differ."""
        return open_videos(self, keep_encoding=self.keep_encoding)


class VideosSource(FilmSource):
    """A folder of videos."""

    kind = "videos"


def run(config: VideosConfig) -> None:
    """`lapa data videos`."""
    given = [name for name in ("rate", "cut_shots", "min_seconds", "min_side", "min_motion") if getattr(config, name)]
    if config.keep_encoding and given:
        raise UserError(
            f"--keep-encoding copies whole videos; run without it, or without --{given[0].replace('_', '-')}"
        )
    convert.run(config, config, copy=_copy if config.keep_encoding else None)


def open_videos(reading: VideosReading, keep_encoding: bool = False) -> VideosSource:
    """Lists the videos with their captions and headers; what is wrong is said before anything is written."""
    require_rate(reading.fps)
    root, names = find_films(reading.folder)
    instructions, skipped = find_captions(reading, names)
    captioned = [name for name in names if name in instructions]
    items, infos, broken = [], [], []
    for name, info in read_headers(root, captioned):
        if isinstance(info, UserError):
            broken.append(str(info))
            continue
        items.append((name, instructions[name]))
        infos.append(info)
    skipped += judge(broken, "--skip-bad leaves such files out", reading.skip_bad)
    if skipped:
        warn(f"entries skipped in all (--skip-bad): {skipped}")
    if not items:
        raise UserError(f"{root}: no video of it can be used")
    source = VideosSource()
    source.skip_bad = reading.skip_bad
    source.root, source.name = root, root.resolve().name
    source.fps = _choose_fps(root, infos, reading.fps, keep_encoding)
    source.cameras = {CAMERA: _choose_shape(root, [name for name, _ in items], infos, keep_encoding)}
    source.inputs = () if reading.captions is None else (Path(reading.captions),)
    settings = {
        "folder": source.name,
        "captions": reading.captions and Path(reading.captions).name,
        "caption": reading.caption,
        "fps": reading.fps,
        "keep_encoding": keep_encoding,
    }
    source.settings = {name: value for name, value in settings.items() if value}
    source.items = [
        Item(name, (), text, quick_count(info, source.fps)) for (name, text), info in zip(items, infos, strict=True)
    ]
    return source


def read_captions(path: Path) -> list[tuple[str, str]]:
    """(file name, caption) in order, from JSON, JSONL or CSV. Raises UserError naming the file and the line."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such captions file")
    if suffix == ".json":
        captions = files.read_json(path)
        if isinstance(captions, Mapping):
            wrong = next((name for name, text in captions.items() if not isinstance(text, str)), None)
            if wrong is not None:
                raise UserError(f'{path}: the caption of {wrong!r} is not text; expected {{"file": "text"}}')
            return list(captions.items())
        return _caption_rows(path, captions if isinstance(captions, list) else [captions])
    try:
        if suffix in (".jsonl", ".ndjson"):
            # Not splitlines: a caption may hold what Unicode takes for the end of a line.
            lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1)
            return _caption_rows(path, (_json_line(path, number, line) for number, line in lines if line.strip()))
        if suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as table:
                return _caption_rows(path, csv.DictReader(table))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from None
    raise UserError(f"{path}: captions are .json, .jsonl or .csv, not {suffix or 'a file without a suffix'}")


def find_captions(reading: Any, names: Sequence[str], what: str = "video") -> tuple[dict[str, str], int]:
    """The text of each name that has one, and how many problems were skipped.

    reading: has `folder`, `captions`, `caption` and `skip_bad`. A caption may name a file with its folders or without,
    if that is unique; of several the first counts, and an empty one is none. UserError for names without caption and
    captions without file, unless `skip_bad`.
    """
    if reading.captions is None and reading.caption is None:
        raise UserError(f'{reading.folder}: no captions; give --captions FILE, or --caption "what the {what}s show"')
    found = dict.fromkeys(names, reading.caption) if reading.caption is not None else {}
    if reading.captions is None:
        return found, 0
    known, missing, told, again = by_short_name(names), [], set(), 0
    for key, text in read_captions(Path(reading.captions)):
        name = known.get(key.removeprefix("./"))
        if name is None:
            missing.append(f"{reading.captions}: has a caption for {key}, which is not in {reading.folder}")
        elif name in told:
            again += 1
        elif text.strip():
            found[name] = text.strip()
            told.add(name)
    if again:
        warn(f"{reading.captions}: further captions of a {what} that has one, not used: {again}")
    skipped = judge(missing, f"add the {what}, or take the entry out, or give --skip-bad", reading.skip_bad)
    bare = [f"{reading.folder}/{name}: has no caption in {reading.captions}" for name in names if name not in found]
    mend = "add one, or give --caption TEXT for those without, or --skip-bad to leave them out"
    return found, skipped + judge(bare, mend, reading.skip_bad)


def _choose_fps(root: Path, infos: Sequence[VideoInfo], wanted: float | None, keep_encoding: bool) -> float:
    rates = Counter(round(info.fps, 3) for info in infos)
    fps = wanted or most_common([round(info.fps, 3) for info in infos])
    others = {rate: count for rate, count in sorted(rates.items()) if rate != fps}
    if not others:
        return fps
    told = ", ".join(f"{count} at {rate:g}" for rate, count in others.items())
    if keep_encoding:
        raise UserError(f"{root}: mixed rates ({told}, others {fps:g} fps); run without --keep-encoding")
    say(f"read at {fps:g} fps; resampled by their timestamps: {told} fps")
    return fps


def _choose_shape(root: Path, names: Sequence[str], infos: Sequence[VideoInfo], keep_encoding: bool) -> tuple[int, int]:
    """Height and width of the pictures, of most videos where they differ."""
    shapes = Counter((info.height, info.width) for info in infos)
    shape = most_common([(info.height, info.width) for info in infos])
    if len(shapes) > 1:
        told = ", ".join(f"{count} of {width}x{height}" for (height, width), count in shapes.most_common(5))
        if keep_encoding:
            raise UserError(f"{root}: mixed picture sizes ({told}); run without --keep-encoding")
        say(f"{len(shapes)} different picture sizes ({told}); all are scaled and cropped to one when they are used")
    if keep_encoding and (shape[0] % 2 or shape[1] % 2):
        raise UserError(f"{root}: pictures of {shape[1]}x{shape[0]}, an odd size; run without --keep-encoding")
    for name, info in zip(names, infos, strict=True):
        if keep_encoding and info.codec not in MP4_CODECS:
            raise UserError(
                f"{root / name}: is encoded as {info.codec}, which an mp4 dataset cannot keep "
                f"(only {', '.join(MP4_CODECS)}); run without --keep-encoding"
            )
    return shape


def _copy(
    source: VideosSource, cameras: list[str], fps: float, options: VideosConfig, item: Item, target: Path
) -> Converted:
    """Copies the stream, after reading all of it to be sure that its frames are where the dataset will say."""
    path, target = source.film(item), target.with_name(f"{target.name}.mp4")
    try:
        problem, num_frames, pixels = _copy_whole(path, target, fps, source.cameras[CAMERA])
    except ValueError as error:
        return Converted(error=str(error))
    if problem is not None:
        return Converted(error=f"{path}: {problem}; run without --keep-encoding")
    stats = {CAMERA: pixels.to_dict()}
    return Converted((Part(item.key, item.instruction, {CAMERA: target}, num_frames, stats),))


def _copy_whole(path: Path, target: Path, fps: float, shape: tuple[int, int]) -> tuple[str | None, int, PixelMoments]:
    """What keeps the stream from being copied, or None; how many frames it has, and their statistics."""
    scan, pixels = ClipScan(path), PixelMoments()
    worst, turned = 0.0, False

    def watched() -> Iterator[np.ndarray]:
        nonlocal worst, turned
        for number, (seconds, frame_HWC) in enumerate(scan):
            worst = max(worst, abs(seconds - number / fps))
            turned |= frame_HWC.shape[:2] != shape
            yield frame_HWC

    checksums = [zlib.crc32(frame_HWC.tobytes()) for frame_HWC in pixels.watch(watched())]
    if scan.num_lost or not scan.num_frames:
        problem: str | None = "is damaged"
    elif worst > 0.25 / fps:
        problem = "its frames do not come at a constant rate"
    else:
        problem = "is stored turned" if turned else _copy_checked(path, target, fps, checksums)
    return problem, scan.num_frames, pixels


def _copy_checked(source: Path, target: Path, fps: float, checksums: list[int]) -> str | None:
    """Copies the stream and reads each frame back by its number; what is wrong with the copy, or None."""
    try:
        num_copied = copy_stream(source, target, fps)
        copied = (zlib.crc32(decode_clip(target, [number], fps).tobytes()) for number in range(len(checksums)))
        same = num_copied == len(checksums) and all(a == b for a, b in zip(copied, checksums, strict=True))
    except ValueError as error:
        return f"its copy cannot be read ({error})"
    return None if same else "its copy shows other frames"


def _caption_rows(path: Path, rows: Iterable[Any]) -> list[tuple[str, str]]:
    captions = []
    for number, row in enumerate(rows, 1):
        column = next((name for name in CAPTION_COLUMNS if isinstance(row, Mapping) and row.get(name)), None)
        if column is None or not row.get("file"):
            raise UserError(f"{path}: entry {number} needs `file` and one of {', '.join(CAPTION_COLUMNS)}")
        captions.append((str(row["file"]), str(row[column])))
    return captions


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not valid JSON ({error.msg})") from None
