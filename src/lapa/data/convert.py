"""Turns any source into a dataset: in parallel, resumable, with the filters people need.

Items are read, filtered, scaled and encoded by worker processes; this process adds their episodes in order, so that the
dataset does not depend on the number of workers. An item that is dealt with, kept or not, is noted in the journal: an
interrupted conversion goes on after it, and what was left out is counted over all runs.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from lapa.console import finish, progress, say, warn
from lapa.data.action_space import ActionSpace
from lapa.data.dataset import ACTION, STATE
from lapa.data.lerobot import INFO
from lapa.data.motion import MotionMeter, shot_numbers, thumbnail
from lapa.data.source import Clip, Item, Reading, Source
from lapa.data.statistics import PixelMoments
from lapa.data.transforms import resize_and_crop
from lapa.data.video import encode_clip
from lapa.data.workers import Workers
from lapa.data.writer import DatasetWriter, nothing_to_add, require_even
from lapa.errors import UserError, unknown
from lapa.files import claim_output

# How the folder begins in which videos wait to be added.
INCOMING = ".incoming-"
# What is counted, as the journal and the summary call it.
DAMAGED, KEPT = "left out, damaged", "damaged, the readable part is kept"
LOST = "frames lost in what is damaged"


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Reading):
    """What every `lapa data SOURCE` can do with what it reads; a command's config adds the source's reading options."""

    out: Path
    """Folder of the dataset to write, on this machine."""
    camera: tuple[str, ...] = ()
    """Cameras to keep; by default all."""
    actions: bool = True
    """Store actions and robot states; --no-actions leaves video and instruction only."""
    size: int = 256
    """Height and width of the pictures: the short side is scaled to it, the centre cropped. Even."""
    rate: float | None = None
    """Frames a second of the dataset, to take fewer than the source has; by default the source's."""
    cut_shots: bool = False
    """Cut videos where one shot ends and the next begins (hard cuts, as in web video); each shot is an episode."""
    min_seconds: float = 0.0
    """Leave out episodes shorter than this."""
    min_side: int = 0
    """Leave out what has a camera whose pictures' shorter side has fewer pixels than this."""
    min_motion: float = 0.0
    """Leave out episodes in which nothing moves: whose brightness, from 0 to 1, changes less than this (RMS) between
    any two frames half a second apart, in all cameras. 0.01 is a start: real robot clips reached 0.06 to 0.21, a still
    picture with a sensor's noise 0.004."""
    limit: int | None = None
    """Number of items to read (files, records); by default all."""
    skip_bad: bool = False
    """Leave out, and count, what is damaged; otherwise the first such thing stops the command."""
    workers: int = 0
    """Processes that convert; 0: one for each CPU core."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with what an interrupted run wrote."""


def run(options: ConvertOptions) -> None:
    """`lapa data SOURCE`: converts, and says what was left out and what comes next. Raises UserError on bad input."""
    out = options.out
    if nothing_to_add(out, resume=options.resume, overwrite=options.overwrite):
        return
    _require_sense(options)
    source = options.open()
    say(f"{source.kind}: {len(source.items)} items in {source.root}")
    cameras = _choose_cameras(source, options)
    fps = _choose_rate(source, options)
    items = source.items[: options.limit]
    _require_own_names(source, items)
    claim_output(
        out,
        complete=(out / INFO).exists(),
        overwrite=options.overwrite,
        resume=options.resume,
        inputs=[source.root, *source.inputs],
    )
    writer = _open_writer(source, cameras, fps, options)
    todo = [item for item in items if item.key not in writer.done_items]
    if len(todo) < len(items):
        say(f"resuming: {len(items) - len(todo)} of {len(items)} items are done")
    _convert_all(source, todo, writer, cameras, fps, options)
    for note, count in sorted(writer.notes.items()):
        warn(f"{note}: {count}")
    if not writer.num_episodes:
        writer.discard()
        raise UserError(f"{source.root}: none of its {len(items)} items became an episode; nothing was written")
    dataset = writer.finish()
    what = f"dataset of {len(dataset.lengths)} episodes, {dataset.num_frames} frames at {fps:g} fps"
    folder = shlex.quote(str(out))
    finish(what, out, [f"lapa data info {folder}", f"lapa latent train --data {folder} --out LAM"])


def _open_writer(source: Source, cameras: list[str], fps: float, options: ConvertOptions) -> DatasetWriter:
    space = source.action_space if options.actions else None
    return DatasetWriter(
        options.out,
        fps=fps,
        cameras=dict.fromkeys(cameras, (options.size, options.size)),
        action_names=space.names if space else None,
        state_names=source.state_names if options.actions else None,
        binary_actions=[name for name, switch in zip(space.names, space.binary, strict=True) if switch]
        if space
        else (),
        control=space.control if space else None,
        keyframe_interval=KEYFRAME_INTERVAL,
        extra_info={"made_by": f"lapa data {source.kind}", **source.settings, **_filters(options)},
        resume=options.resume,
    )


def _require_own_names(source: Source, items: Sequence[Item]) -> None:
    """What is done is known by its name, so no two items may share one."""
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise UserError(f"{source.file_of(item)}: two items have this name; rename or take out one")
        seen.add(item.key)


def _require_sense(options: ConvertOptions) -> None:
    require_even(options.size)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    for name in ("min_seconds", "min_side", "min_motion", "workers"):
        if not getattr(options, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: cannot be below 0")


def _choose_cameras(source: Source, options: ConvertOptions) -> list[str]:
    for camera in options.camera:
        if camera not in source.cameras:
            raise unknown("camera", camera, source.cameras)
    return list(options.camera or source.cameras)


def _choose_rate(source: Source, options: ConvertOptions) -> float:
    """The dataset's frames a second. UserError where actions cannot follow."""
    rate = source.fps if options.rate is None else options.rate
    if not 0 < rate <= source.fps:
        raise UserError(f"--rate {rate:g}: {source.root} has {source.fps:g} frames a second, and none can be made up")
    space = source.action_space if options.actions else None
    if rate != source.fps and space is not None and space.control is None:
        raise UserError(
            f"--rate {rate:g}: whether the actions of {source.root} are deltas or absolute is not known, so they "
            "cannot be taken at another rate; give --no-actions"
        )
    return rate


def _filters(options: ConvertOptions) -> dict[str, Any]:
    """The options that decide what of the source is in the dataset: a resumed run must have the same."""
    names = ("camera", "actions", "rate", "cut_shots", "min_seconds", "min_side", "min_motion", "limit", "size")
    values = {name: getattr(options, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value}


def _convert_all(
    source: Source,
    items: Sequence[Item],
    writer: DatasetWriter,
    cameras: list[str],
    fps: float,
    options: ConvertOptions,
) -> None:
    _remove_incoming(options.out)
    # Of its own for each run: workers of a killed one may go on for a moment.
    incoming = Path(tempfile.mkdtemp(prefix=INCOMING, dir=options.out))
    jobs = ((item, incoming / str(number)) for number, item in enumerate(items))
    num_workers = min(options.workers or os.cpu_count() or 1, len(items))
    shared = (source.without_items(), cameras, fps, options)
    with progress() as bar, Workers(num_workers if num_workers > 1 else 0, shared) as workers:
        task = bar.add_task("converting", total=len(items), note="")
        for number, made in enumerate(workers.in_order(convert_item, jobs)):
            _add(source, items[number], made, writer, options.skip_bad)
            bar.advance(task)
    _remove_incoming(options.out)


def _remove_incoming(out: Path) -> None:
    for folder in out.glob(f"{INCOMING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _add(source: Source, item: Item, made: Converted, writer: DatasetWriter, skip_bad: bool) -> None:
    """Adds what became of an item to the dataset and its journal. UserError where it is damaged, unless skip_bad."""
    notes = Counter(made.notes)
    if made.error is not None:
        if not skip_bad:
            raise UserError(f"{made.error}; mend or replace it, or give --skip-bad to leave out what is damaged")
        warn(f"left out: {made.error}")
        notes[DAMAGED] += 1
    if made.lost:
        kept = sum(part.length for part in made.parts)
        warn(f"{made.damage or source.file_of(item)}: damaged; {kept} frames kept, {made.lost} lost")
        notes.update({KEPT: 1, LOST: made.lost})
    for part in made.parts:
        # An item that a kill interrupted between two of its episodes is made again.
        if part.key not in writer.done_sources:
            writer.add_episode_files(
                part.videos,
                part.length,
                part.instruction,
                pixel_stats=part.pixel_stats,
                actions=part.actions,
                states=part.states,
                source=part.key,
            )
    writer.close_item(item.key, notes)


KEYFRAME_INTERVAL = 2
# Why something becomes no episode, as the journal and the summary call it.
SMALL, SHORT, STATIC, BLANK = (
    "left out, pictures too small",
    "left out, too short",
    "left out, nothing moves",
    "left out, no camera shows anything",
)


@dataclass(frozen=True)
class Part:
    """An episode that a worker has made; its videos wait at `videos`."""

    key: str
    instruction: str
    videos: dict[str, Path]
    length: int
    pixel_stats: dict[str, dict[str, list[float]]]
    actions: np.ndarray | None = None
    states: np.ndarray | None = None


@dataclass(frozen=True)
class Converted:
    """What became of an item. notes: what to count; lost: frames, `damage` says why; `error`: why nothing did."""

    parts: tuple[Part, ...] = ()
    notes: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    damage: str = ""
    error: str | None = None


def convert_item(
    source: Source, cameras: list[str], fps: float, options: ConvertOptions, item: Item, target: Path
) -> Converted:
    """Reads an item once, and writes the videos of its episodes under names that begin as `target`."""
    where = source.file_of(item)
    try:
        clip = source.read(item)
        streams, small = {}, False
        for camera in cameras:
            timed = in_time(clip.frames[camera], where)
            first = next(timed, None)
            if first is None:
                raise UserError(f"{where}: no frame of it can be decoded")
            small |= min(first[1].shape[:2]) < options.min_side
            streams[camera] = resample(chain([first], timed), fps)
        if small:
            return Converted(notes=Counter((SMALL, *clip.notes)))
        parts, left_out = _encode(source, clip, item, streams, fps, options, target)
    except ValueError as error:
        return Converted(error=str(error))
    return Converted(tuple(parts), Counter((*left_out, *clip.notes)), clip.lost, clip.damage)


@dataclass
class _Shot:
    """A stretch of an item; motion: the greatest that a camera saw. `reason` says why it is not kept."""

    start: int
    stop: int
    videos: dict[str, Path] = field(default_factory=dict)
    pixels: dict[str, _Pixels] = field(default_factory=dict)
    motion: float = 0.0
    reason: str | None = None


# The number of the shot, the thumbnail where it is wanted, and the picture, of a frame.
Watched = tuple[int, np.ndarray | None, np.ndarray]


def _encode(
    source: Source,
    clip: Clip,
    item: Item,
    streams: dict[str, Iterator[np.ndarray]],
    fps: float,
    options: ConvertOptions,
    target: Path,
) -> tuple[list[Part], list[str]]:
    """Writes the videos of each shot; the shots of the first camera are those of all. Also why others are left out."""
    where = source.file_of(item)
    first, *others = streams
    watch = options.min_motion > 0
    shots: list[_Shot] = []
    film = by_shot(streams[first], options.size, options.cut_shots, watch)
    for _, frames in groupby(film, key=lambda picture: picture[0]):
        start = shots[-1].stop if shots else 0
        shots.append(_Shot(start, start))
        shots[-1].stop += _write(shots[-1], first, frames, _video(target, len(shots), first), fps)
        if shots[-1].stop - start < options.min_seconds * fps - TIE:
            shots[-1].reason = SHORT
    total = shots[-1].stop
    for camera in others:
        film = by_shot(streams[camera], options.size, False, watch)
        for number, shot in enumerate(shots, 1):
            length, frames = shot.stop - shot.start, islice(film, shot.stop - shot.start)
            begins = next(frames, None)
            found = int(begins is not None)
            if begins is not None and shot.reason is None:
                found = _write(shot, camera, chain([begins], frames), _video(target, number, camera), fps)
            found += sum(1 for _ in frames)
            if found != length:
                raise UserError(f"{where}: camera {camera} ends after {shot.start + found} of {total} frames")
        if next(film, None) is not None:
            raise UserError(f"{where}: camera {camera} goes on after {total} frames, where camera {first} ends")
    rows = _rows(source, clip, where, fps, options)
    for name, values in rows.items():
        if len(values) != total:
            raise UserError(f"{where}: {name} has {len(values)} rows for {total} frames; they differ in length")
    parts = []
    for number, shot in enumerate(shots):
        if shot.reason is None and not any(pixels.shows for pixels in shot.pixels.values()):
            shot.reason = BLANK
        elif shot.reason is None and shot.motion < options.min_motion:
            shot.reason = STATIC
        if shot.reason is not None:
            for video in shot.videos.values():
                video.unlink()
            continue
        actions, states = (rows[name][shot.start : shot.stop] if name in rows else None for name in (ACTION, STATE))
        key = item.key if len(shots) == 1 else f"{item.key}#{number:04d}"
        stats = {camera: moments.to_dict() for camera, moments in shot.pixels.items()}
        parts.append(Part(key, clip.instruction, shot.videos, shot.stop - shot.start, stats, actions, states))
    return parts, [shot.reason for shot in shots if shot.reason is not None]


def _write(shot: _Shot, camera: str, frames: Iterable[Watched], video: Path, fps: float) -> int:
    """Writes the video of a camera, and notes in the shot what it shows; returns the number of frames."""
    meter, pixels = MotionMeter(max(1, round(fps / 2))), _Pixels()
    length = encode_clip(video, pixels.watch(_watched(frames, meter)), fps, KEYFRAME_INTERVAL)
    shot.videos[camera], shot.pixels[camera] = video, pixels
    shot.motion = max(shot.motion, meter.greatest)
    return length


def _watched(frames: Iterable[Watched], meter: MotionMeter) -> Iterator[np.ndarray]:
    for _, small_HW, frame_HWC in frames:
        if small_HW is not None:
            meter.add(small_HW)
        yield frame_HWC


def _video(target: Path, shot: int, camera: str) -> Path:
    return target.with_name(f"{target.name}-{shot}-{camera}.mp4")


def _rows(source: Source, clip: Clip, where: str, fps: float, options: ConvertOptions) -> dict[str, np.ndarray]:
    """Actions and states at the dataset's rate, those that there are. UserError where one is not finite."""
    rows = {}
    for name, values, space in ((ACTION, clip.actions, source.action_space), (STATE, clip.states, None)):
        if not options.actions or values is None:
            continue
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise UserError(f"{where}: {name} is not finite at frame {int(np.argmin(finite))}")
        rows[name] = values if fps == source.fps else resample_rows(values, source.fps, fps, space)
    return rows


class _Pixels(PixelMoments):
    """Statistics of pictures that pass by, and whether they are more than one colour throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.shows = False

    def watch(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Hands the frames on, as `PixelMoments.watch`, but looks for a second colour in each until one is found."""
        colour = None
        for frame_HWC in super().watch(frames):
            if not self.shows:
                colour = frame_HWC[0, 0] if colour is None else colour
                self.shows = bool((frame_HWC != colour).any())
            yield frame_HWC


# Seconds; a tick this close to the middle between two frames takes the later one, however the sum is rounded.
TIE = 1e-6
# Seconds between two frames that are still believed: a damaged timestamp would fill the disk with one picture.
LONGEST_GAP = 60.0


def in_time(timed_frames: Iterable[tuple[float, np.ndarray]], where: str) -> Iterator[tuple[float, np.ndarray]]:
    """The frames (seconds, picture) as they are. UserError naming `where` for times that run backwards or leap."""
    before = None
    for number, (seconds, frame) in enumerate(timed_frames):
        # A comparison that NaN fails, too.
        if before is not None and not before - TIE <= seconds <= before + LONGEST_GAP:
            wrong = "go backwards" if seconds < before else "leap"
            raise UserError(f"{where}: its timestamps {wrong} at frame {number} (from {before:.3f} to {seconds:.3f} s)")
        before = seconds
        yield seconds, frame


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


def resample_rows(rows_TD: np.ndarray, fps: float, rate: float, space: ActionSpace | None = None) -> np.ndarray:
    """The rows at each tick of 1 / rate seconds, of rows at `fps`.

    space: of actions, which say what to do until the next tick: deltas are added up, of targets and switches the last
    one holds. Without it, rows are what was measured at the tick.
    """
    ticks = resample(((number / fps, np.array([number])) for number in range(len(rows_TD))), rate)
    starts = np.array([int(row[0]) for row in ticks])
    if space is None:
        return rows_TD[starts]
    last = rows_TD[np.append(starts[1:], len(rows_TD)) - 1]
    if space.control != "delta":
        return last
    added = np.add.reduceat(rows_TD, starts, axis=0)
    return np.where(np.array(space.binary), last, added).astype(rows_TD.dtype)


def by_shot(
    frames: Iterable[np.ndarray], size: int, cut: bool, watch: bool
) -> Iterator[tuple[int, np.ndarray | None, np.ndarray]]:
    """The number of the shot, the thumbnail and the picture, `size` pixels a side, of each frame.

    cut: look for shots, otherwise all is number 0. watch: make thumbnails, otherwise None.
    """
    if not cut:
        for frame_HWC in frames:
            yield 0, thumbnail(frame_HWC) if watch else None, resize_and_crop(frame_HWC[None], size)[0]
        return
    waiting: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def seen() -> Iterator[np.ndarray]:
        for frame_HWC in frames:
            waiting.append((thumbnail(frame_HWC), resize_and_crop(frame_HWC[None], size)[0]))
            yield waiting[-1][0]

    for shot in shot_numbers(seen()):
        yield shot, *waiting.popleft()
