"""Folders of videos, with or without a caption each, to a dataset without actions.

    lapa data videos clips/ --captions captions.json --out data/clips

Reads whatever PyAV opens, at any size and rate. Pictures are scaled and cropped to one size; frames are taken at the
dataset's rate by their timestamps. Captions are JSON {file: text}, JSONL or CSV (columns `file` and `text`,
`caption` or `instruction`), or one text for all. Interrupt it and go on with `--resume`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lapa import files
from lapa.console import finish, progress, say, warn
from lapa.data.lerobot import INFO
from lapa.data.statistics import PixelMoments
from lapa.data.transforms import resize_and_crop
from lapa.data.video import MP4_CODECS, ClipScan, VideoInfo, copy_stream, decode_clip, encode_clip, probe
from lapa.data.workers import Workers
from lapa.data.writer import DatasetWriter, nothing_to_add, require_even

CAMERA = "video"
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
CAPTION_COLUMNS = ("text", "caption", "instruction")
KEYFRAME_INTERVAL = 2
# Seconds; a tick this close to the middle between two frames takes the later one, however the sum is rounded.
TIE = 1e-6


@dataclass(frozen=True)
class VideosConfig:
    """Turn a folder of videos into a dataset without actions."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder with videos; folders inside it are searched too."""
    out: Path
    """Folder of the dataset to write."""
    captions: Path | None = None
    """JSON {file: text}, JSONL or CSV with the columns file and text (or caption, or instruction)."""
    caption: str | None = None
    """One text for every video; with --captions, for those that have none there."""
    size: int = 256
    """Height and width of the pictures: the short side is scaled to it, the centre cropped. Even."""
    fps: float | None = None
    """Frames per second of the dataset; by default the rate most of the videos have."""
    keep_encoding: bool = False
    """Copy the video streams as they are (H.264, HEVC, AV1 or VP9, all of one size and rate); slower to train on."""
    skip_bad: bool = False
    """Leave out, and count, files that are no videos, videos without caption and captions without video."""
    workers: int = 0
    """Processes that convert; 0: one for each CPU core."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with what an interrupted run wrote."""


@dataclass(frozen=True)
class _Clip:
    """A video to convert. name: its path inside the folder, which is also how captions call it."""

    path: Path
    name: str
    instruction: str
    info: VideoInfo


@dataclass(frozen=True)
class _Converted:
    """What a worker hands back; the mp4 waits at `path`, or `error` says why there is none."""

    path: Path
    num_frames: int = 0
    num_lost: int = 0
    pixel_stats: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None


@dataclass
class _Tally:
    """What did not go as the user may believe; shown at the end."""

    skipped: int = 0
    truncated: int = 0
    lost_frames: int = 0

    def report(self) -> None:
        if self.skipped:
            warn(f"entries skipped in all (--skip-bad): {self.skipped}")
        if self.truncated:
            warn(f"damaged videos: {self.truncated}; frames lost: {self.lost_frames}, the readable ones are kept")


def run(config: VideosConfig) -> None:
    """`lapa data videos`."""
    complete = (config.out / INFO).exists()
    if nothing_to_add(config.out, resume=config.resume, overwrite=config.overwrite):
        return
    require_even(config.size)
    tally = _Tally()
    clips = _find_clips(config, tally)
    fps = _choose_fps(clips, config)
    height, width = _choose_shape(clips, config)
    files.claim_output(
        config.out,
        complete=complete,
        overwrite=config.overwrite,
        resume=config.resume,
        inputs=[config.folder, *([config.captions] if config.captions else [])],
    )
    writer = DatasetWriter(
        config.out,
        fps=fps,
        cameras={CAMERA: (height, width)},
        keyframe_interval=KEYFRAME_INTERVAL,
        extra_info={"made_by": "lapa data videos", "folder": config.folder.name, "keep_encoding": config.keep_encoding},
        resume=config.resume,
    )
    todo = [clip for clip in clips if clip.name not in writer.done_sources]
    if len(todo) < len(clips):
        say(f"resuming: {len(clips) - len(todo)} of {len(clips)} videos are done")
    _convert_all(todo, writer, fps, config, tally)
    tally.report()
    if not writer.num_episodes:
        raise ValueError(f"{config.folder}: none of its videos could be read; nothing was written")
    dataset = writer.finish()
    what = f"dataset of {len(dataset.episodes)} episodes, {dataset.num_frames} frames at {fps:g} fps"
    finish(what, config.out, [f"lapa data info {config.out}", f"lapa latent train --data {config.out} --out LAM"])


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, from JSON, JSONL or CSV. Raises ValueError naming the file and the line."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ValueError(f"{path}: no such captions file")
    if suffix == ".json":
        captions = files.read_json(path)
        if isinstance(captions, Mapping):
            wrong = next((name for name, text in captions.items() if not isinstance(text, str)), None)
            if wrong is not None:
                raise ValueError(f'{path}: the caption of {wrong!r} is not text; expected {{"file": "text"}}')
            return dict(captions)
        return _caption_rows(path, captions if isinstance(captions, list) else [captions])
    if suffix in (".jsonl", ".ndjson"):
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        return _caption_rows(path, (_json_line(path, number, line) for number, line in enumerate(lines, 1)))
    if suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as table:
            return _caption_rows(path, csv.DictReader(table))
    raise ValueError(f"{path}: captions are .json, .jsonl or .csv, not {suffix or 'a file without a suffix'}")


def resample(timed_frames: Iterable[tuple[float, np.ndarray]], fps: float) -> Iterator[np.ndarray]:
    """The frame nearest to each tick of 1 / fps seconds, as far as the frames (seconds, picture) reach."""
    tick, before = 0, None
    duration = 0.0
    for seconds, frame in timed_frames:
        if before is not None:
            while tick / fps < (before[0] + seconds) / 2 - TIE:
                yield before[1]
                tick += 1
            duration = seconds - before[0]
        before = seconds, frame
    # Half a frame past the last one, a next frame would be the nearest.
    while before is not None and (tick == 0 or tick / fps < before[0] + duration / 2 - TIE):
        yield before[1]
        tick += 1


def _find_clips(config: VideosConfig, tally: _Tally) -> list[_Clip]:
    """All videos in natural order, each with its caption and header; says what is wrong before any work is done."""
    paths = _list_videos(config.folder, config.out)
    captions = None if config.captions is None else _match_captions(config, paths, tally)
    if captions is None and config.caption is None:
        raise ValueError(f'{config.folder}: no captions; give --captions FILE, or --caption "what the videos show"')
    clips, bare, broken = [], [], []
    with progress() as bar:
        task = bar.add_task("looking", total=len(paths), note="")
        for name, path in paths.items():
            bar.advance(task)
            instruction = (captions or {}).get(name, config.caption)
            if instruction is None:
                bare.append(f"{path}: has no caption in {config.captions}")
                continue
            try:
                clips.append(_Clip(path, name, instruction, probe(path)))
            except ValueError as error:
                broken.append(str(error))
    _judge(bare, "add one, or give --caption TEXT for those without, or --skip-bad to leave them out", config, tally)
    _judge(broken, "--skip-bad leaves such files out", config, tally)
    if not clips:
        raise ValueError(f"{config.folder}: no video of it can be used")
    return clips


def _list_videos(folder: Path, out: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is a file' if folder.exists() else 'no such folder'}; name a folder with videos")
    own = out.resolve() if folder.resolve() in out.resolve().parents else None
    inside = (path for path in folder.rglob("*") if not path.name.startswith(".") and path.is_file())
    found = [path for path in inside if own is None or not path.resolve().is_relative_to(own)]
    videos = [path for path in found if path.suffix.lower() in SUFFIXES]
    if not videos:
        raise ValueError(f"{folder}: holds no video (other files: {len(found)}); looked for {', '.join(SUFFIXES)}")
    if len(found) > len(videos):
        num = len(found) - len(videos)
        say(f"left aside: {num} {'file' if num == 1 else 'files'} without the suffix of a video")
    names = {path.relative_to(folder).as_posix(): path for path in videos}
    return {name: names[name] for name in sorted(names, key=_natural)}


def _match_captions(config: VideosConfig, paths: Mapping[str, Path], tally: _Tally) -> dict[str, str]:
    """Captions under the videos' names. A caption may name a file with its folders or without, if that is unique."""
    assert config.captions is not None
    bases = Counter(name.rsplit("/", 1)[-1] for name in paths)
    short = {name.rsplit("/", 1)[-1]: name for name in paths if bases[name.rsplit("/", 1)[-1]] == 1}
    matched, missing = {}, []
    for key, text in read_captions(config.captions).items():
        name = key.removeprefix("./")
        name = name if name in paths else short.get(name, name)
        if name in paths:
            matched[name] = text.strip()
        else:
            missing.append(f"{config.captions}: has a caption for {key}, which is not in {config.folder}")
    _judge(missing, "add the video, or take the entry out, or give --skip-bad", config, tally)
    return matched


def _judge(problems: list[str], mend: str, config: VideosConfig, tally: _Tally) -> None:
    """Stops at the first problem, or with --skip-bad counts and names them."""
    if not problems:
        return
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    if not config.skip_bad:
        raise ValueError(f"{problems[0]}{more}; {mend}")
    warn(f"skipped: {problems[0]}{more}")
    tally.skipped += len(problems)


def _choose_fps(clips: list[_Clip], config: VideosConfig) -> float:
    rates = Counter(round(clip.info.fps, 3) for clip in clips)
    fps = config.fps or max(rates, key=lambda rate: (rates[rate], rate))
    if fps <= 0:
        raise ValueError(f"--fps {fps}: must be above 0")
    others = {rate: count for rate, count in sorted(rates.items()) if rate != fps}
    if not others:
        return fps
    told = ", ".join(f"{count} at {rate:g}" for rate, count in others.items())
    if config.keep_encoding:
        raise ValueError(f"{config.folder}: mixed rates ({told}, others {fps:g} fps); run without --keep-encoding")
    say(f"dataset at {fps:g} fps; resampled by their timestamps: {told} fps")
    return fps


def _choose_shape(clips: list[_Clip], config: VideosConfig) -> tuple[int, int]:
    """Height and width of the pictures in the dataset."""
    shapes = Counter((clip.info.height, clip.info.width) for clip in clips)
    if not config.keep_encoding:
        if len(shapes) > 1:
            say(f"{len(shapes)} different picture sizes; all become {config.size}x{config.size}")
        return config.size, config.size
    if len(shapes) > 1:
        told = ", ".join(f"{count} of {width}x{height}" for (height, width), count in shapes.items())
        raise ValueError(f"{config.folder}: mixed picture sizes ({told}); run without --keep-encoding")
    for clip in clips:
        if clip.info.codec not in MP4_CODECS:
            raise ValueError(
                f"{clip.path}: is encoded as {clip.info.codec}, which an mp4 dataset cannot keep "
                f"(only {', '.join(MP4_CODECS)}); run without --keep-encoding"
            )
    (shape,) = shapes
    return shape


def _convert_all(clips: list[_Clip], writer: DatasetWriter, fps: float, config: VideosConfig, tally: _Tally) -> None:
    """Converts in parallel and adds the episodes in order, so that the dataset does not depend on `workers`."""
    incoming = config.out / ".incoming"
    convert: Callable[..., _Converted] = _copy if config.keep_encoding else _encode
    jobs = ((clip, incoming / f"{number}.mp4", fps, config.size) for number, clip in enumerate(clips))
    num_workers = config.workers or os.cpu_count() or 1
    with progress() as bar, Workers(num_workers if num_workers > 1 else 0) as workers:
        task = bar.add_task("converting", total=len(clips), note="")
        for clip, converted in zip(clips, workers.in_order(convert, jobs), strict=True):
            bar.advance(task)
            if converted.error is not None:
                _judge([converted.error], "--skip-bad leaves such files out", config, tally)
                continue
            if converted.num_lost:
                warn(f"{clip.path}: damaged; {converted.num_frames} frames kept, {converted.num_lost} lost")
                tally.truncated += 1
                tally.lost_frames += converted.num_lost
            writer.add_episode_files(
                {CAMERA: converted.path},
                converted.num_frames,
                clip.instruction,
                pixel_stats={CAMERA: converted.pixel_stats},
                source=clip.name,
            )
    if incoming.exists():
        for leftover in incoming.iterdir():
            leftover.unlink()
        incoming.rmdir()


def _encode(clip: _Clip, target: Path, fps: float, size: int) -> _Converted:
    scan, pixels = ClipScan(clip.path), PixelMoments()
    pictures = ((seconds, resize_and_crop(frame_HWC[None], size)[0]) for seconds, frame_HWC in scan)
    try:
        num_frames = encode_clip(target, pixels.watch(resample(pictures, fps)), fps, KEYFRAME_INTERVAL)
    except ValueError as error:
        if scan.num_frames:
            raise
        reason = str(error) if "not a readable video" in str(error) else f"{clip.path}: no frame of it can be decoded"
        return _Converted(target, error=reason)
    # A loss is told in frames of the dataset.
    lost = round(scan.num_lost * fps / clip.info.fps) or int(scan.num_lost > 0)
    return _Converted(target, num_frames, lost, pixels.to_dict())


def _copy(clip: _Clip, target: Path, fps: float, size: int) -> _Converted:
    """Copies the stream, after reading all of it to be sure that its frames are where the dataset will say."""
    scan, pixels = ClipScan(clip.path), PixelMoments()
    worst, turned = 0.0, False

    def watched() -> Iterator[np.ndarray]:
        nonlocal worst, turned
        for number, (seconds, frame_HWC) in enumerate(scan):
            worst = max(worst, abs(seconds - number / fps))
            turned = frame_HWC.shape[:2] != (clip.info.height, clip.info.width)
            yield frame_HWC

    checksums = [zlib.crc32(frame_HWC.tobytes()) for frame_HWC in pixels.watch(watched())]
    if scan.num_lost or not scan.num_frames:
        problem: str | None = "is damaged"
    elif worst > 0.25 / fps:
        problem = "its frames do not come at a constant rate"
    else:
        problem = "is stored turned" if turned else _copy_checked(clip.path, target, fps, checksums)
    if problem is not None:
        return _Converted(target, error=f"{clip.path}: {problem}; run without --keep-encoding")
    return _Converted(target, scan.num_frames, 0, pixels.to_dict())


def _copy_checked(source: Path, target: Path, fps: float, checksums: list[int]) -> str | None:
    """Copies the stream and reads each frame back by its number; what is wrong with the copy, or None."""
    try:
        num_copied = copy_stream(source, target, fps)
        copied = (zlib.crc32(decode_clip(target, [number], fps).tobytes()) for number in range(len(checksums)))
        same = num_copied == len(checksums) and all(a == b for a, b in zip(copied, checksums, strict=True))
    except ValueError as error:
        return f"its copy cannot be read ({error})"
    return None if same else "its copy shows other frames"


def _caption_rows(path: Path, rows: Iterable[Any]) -> dict[str, str]:
    captions = {}
    for number, row in enumerate(rows, 1):
        column = next((name for name in CAPTION_COLUMNS if isinstance(row, Mapping) and row.get(name)), None)
        if column is None or not row.get("file"):
            raise ValueError(f"{path}: entry {number} needs `file` and one of {', '.join(CAPTION_COLUMNS)}")
        captions[str(row["file"])] = str(row[column])
    return captions


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {number} is not valid JSON ({error.msg})") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key under which clip2 comes before clip10."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", name)]
