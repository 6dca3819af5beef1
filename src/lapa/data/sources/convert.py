"""Turns any source into a dataset: in parallel, resumable, with the filters people need.

Items are read, filtered, scaled and encoded by worker processes; this process adds their episodes in order, so that the
dataset does not depend on the number of workers. An item that is dealt with, kept or not, is noted in the journal: an
interrupted conversion goes on after it, and what was left out is counted over all runs.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lapa.config import unknown
from lapa.console import finish, progress, say, warn
from lapa.data.action_space import ActionSpace
from lapa.data.dataset import ACTION, STATE
from lapa.data.lerobot import INFO
from lapa.data.motion import motion_energy, shots, thumbnails
from lapa.data.sources.source import Clip, Item, Reading, Source
from lapa.data.statistics import PixelMoments
from lapa.data.transforms import resize_and_crop
from lapa.data.video import encode_clip
from lapa.data.workers import Workers
from lapa.data.writer import DatasetWriter, nothing_to_add, require_even
from lapa.files import as_path, claim_output, is_remote, remove_folder

INCOMING = ".incoming"
KEYFRAME_INTERVAL = 2
# Seconds; a tick this close to the middle between two frames takes the later one, however the sum is rounded.
TIE = 1e-6
# What is counted of items, as the journal and the summary call it.
DAMAGED, SMALL, SHORT, STATIC, BLANK = (
    "left out: damaged",
    "left out: pictures too small",
    "left out: too short",
    "left out: nothing moves",
    "left out: no camera shows anything",
)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What every `lapa data SOURCE` can do with what it reads."""

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
    """Leave out pictures whose shorter side has fewer pixels than this."""
    min_motion: float = 0.0
    """Leave out episodes in which nothing moves: whose brightness, from 0 to 1, changes less than this (RMS) between
    any two frames half a second apart. 0.01 is a start."""
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


@dataclass(frozen=True)
class _Part:
    """An episode that a worker has made; its videos wait at `videos`."""

    key: str
    instruction: str
    videos: dict[str, Path]
    length: int
    pixel_stats: dict[str, dict[str, list[float]]]
    actions: np.ndarray | None
    states: np.ndarray | None


@dataclass(frozen=True)
class _Converted:
    """What became of an item; `error` says why nothing did."""

    parts: tuple[_Part, ...] = ()
    notes: tuple[str, ...] = ()
    lost: int = 0
    error: str | None = None


def run(reading: Reading, options: ConvertOptions) -> None:
    """`lapa data SOURCE`: converts, and says what was left out and what comes next. Raises ValueError on bad input."""
    out = options.out
    if nothing_to_add(out, resume=options.resume, overwrite=options.overwrite):
        return
    if is_remote(as_path(str(out))) or "://" in str(out):
        raise ValueError(f"{out}: datasets are written to this machine's disk; give a folder, and copy it in the end")
    _require_sense(options)
    source = reading.open()
    say(f"{source.kind}: {len(source.items)} items in {source.root}")
    cameras = _choose_cameras(source, options)
    fps = _choose_rate(source, options)
    claim_output(
        out,
        complete=(out / INFO).exists(),
        overwrite=options.overwrite,
        resume=options.resume,
        inputs=[source.root],
    )
    space = source.action_space if options.actions else None
    writer = DatasetWriter(
        out,
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
    items = source.items[: options.limit]
    todo = [item for item in items if item.key not in writer.done_items]
    if len(todo) < len(items):
        say(f"resuming: {len(items) - len(todo)} of {len(items)} items are done")
    _convert_all(source, todo, writer, cameras, fps, options)
    for note, count in sorted(writer.notes.items()):
        warn(f"{note} ({count} of {len(items)})")
    if not writer.num_episodes:
        raise ValueError(f"{source.root}: none of its {len(items)} items became an episode; nothing was written")
    dataset = writer.finish()
    what = f"dataset of {len(dataset.lengths)} episodes, {dataset.num_frames} frames at {fps:g} fps"
    finish(what, out, [f"lapa data info {out}", f"lapa latent train --data {out} --out LAM"])


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

    space: of actions; the deltas of all the steps up to the next tick are added up, switches keep the last value.
    """
    rows = list(resample(((number / fps, np.array([number])) for number in range(len(rows_TD))), rate))
    starts = np.array([int(row[0]) for row in rows])
    if space is None or space.control != "delta":
        return rows_TD[starts]
    added = np.add.reduceat(rows_TD, starts, axis=0)
    last = rows_TD[np.append(starts[1:], len(rows_TD)) - 1]
    return np.where(np.array(space.binary), last, added).astype(rows_TD.dtype)


def _require_sense(options: ConvertOptions) -> None:
    require_even(options.size)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit}: must be at least 1")
    for name in ("min_seconds", "min_side", "min_motion", "workers"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: cannot be below 0")


def _choose_cameras(source: Source, options: ConvertOptions) -> list[str]:
    for camera in options.camera:
        if camera not in source.cameras:
            raise unknown("camera", camera, source.cameras)
    return list(options.camera or source.cameras)


def _choose_rate(source: Source, options: ConvertOptions) -> float:
    """The dataset's frames a second. ValueError where actions cannot follow."""
    rate = source.fps if options.rate is None else options.rate
    if not 0 < rate <= source.fps:
        raise ValueError(f"--rate {rate:g}: {source.root} has {source.fps:g} frames a second, and none can be made up")
    space = source.action_space if options.actions else None
    if rate != source.fps and space is not None and space.control is None:
        raise ValueError(
            f"--rate {rate:g}: whether the actions of {source.root} are deltas or absolute is not known, so they "
            "cannot be taken at another rate; give --no-actions"
        )
    return rate


def _filters(options: ConvertOptions) -> dict[str, Any]:
    """The options that decide what of the source is in the dataset: a resumed run must have the same."""
    names = ("camera", "actions", "size", "rate", "cut_shots", "min_seconds", "min_side", "min_motion", "limit")
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
    incoming = options.out / INCOMING
    jobs = ((item, incoming / str(number)) for number, item in enumerate(items))
    num_workers = options.workers or os.cpu_count() or 1
    shared = (source.without_items(), cameras, fps, options)
    with progress() as bar, Workers(num_workers if num_workers > 1 else 0, shared) as workers:
        task = bar.add_task("converting", total=len(items), note="")
        for item, made in zip(items, workers.in_order(convert_item, jobs), strict=True):
            bar.advance(task)
            notes = list(made.notes)
            if made.error is not None:
                if not options.skip_bad:
                    raise ValueError(
                        f"{made.error}; mend or replace it, or give --skip-bad to leave out what is damaged"
                    )
                warn(f"left out: {made.error}")
                notes.append(DAMAGED)
            if made.lost:
                warn(f"{source.file_of(item)}: damaged; {made.lost} frames lost, the readable ones are kept")
                notes.append("damaged, the readable part is kept")
            for part in made.parts:
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
    if incoming.exists():
        remove_folder(incoming)


def convert_item(
    source: Source, cameras: list[str], fps: float, options: ConvertOptions, item: Item, target: Path
) -> _Converted:
    """What a worker does: reads an item, and writes its episodes' videos below `target`."""
    try:
        clip = source.read(item)
        side = min(min(source.cameras[camera]) for camera in cameras)
        if side < options.min_side:
            return _Converted(notes=(SMALL, *clip.notes))
        segments, dropped = _segments(clip, cameras[0], fps, options)
        if not segments:
            return _Converted(notes=(*dropped, *clip.notes))
        # Where the pictures had to be looked through for that, they are read anew.
        clip = source.read(item) if segments != [None] else clip
        parts = _encode(source, clip, item, segments, cameras, fps, options, target)
    except ValueError as error:
        return _Converted(error=str(error))
    if not parts:
        return _Converted(notes=(BLANK, *clip.notes))
    return _Converted(tuple(parts), (*dropped, *clip.notes), clip.lost)


def _segments(
    clip: Clip, camera: str, fps: float, options: ConvertOptions
) -> tuple[list[range | None], tuple[str, ...]]:
    """Which frames become episodes, [None] for all of them unseen; and what is left out, by reason."""
    if not (options.cut_shots or options.min_motion or options.min_seconds):
        return [None], ()
    small_THW = thumbnails(resample(clip.frames[camera], fps))
    kept: list[range | None] = []
    dropped = []
    for segment in shots(small_THW) if options.cut_shots else [range(len(small_THW))]:
        if len(segment) < options.min_seconds * fps:
            dropped.append(SHORT)
        elif options.min_motion and not _moves(small_THW[segment.start : segment.stop], fps, options.min_motion):
            dropped.append(STATIC)
        else:
            kept.append(segment)
    return kept, tuple(dropped)


def _moves(small_THW: np.ndarray, fps: float, least: float) -> bool:
    apart = max(1, min(round(fps / 2), len(small_THW) - 1))
    energy = motion_energy(small_THW, apart)
    return bool(len(energy)) and float(energy.max()) >= least


def _encode(
    source: Source,
    clip: Clip,
    item: Item,
    segments: Sequence[range | None],
    cameras: list[str],
    fps: float,
    options: ConvertOptions,
    target: Path,
) -> list[_Part]:
    """Writes the videos of each segment. An episode of which no camera shows anything is not made."""
    space = source.action_space
    rows = {
        name: values if fps == source.fps else resample_rows(values, source.fps, fps, space_of)
        for name, values, space_of in ((ACTION, clip.actions, space), (STATE, clip.states, None))
        if options.actions and values is not None
    }
    streams = {camera: resample(clip.frames[camera], fps) for camera in cameras}
    position = dict.fromkeys(cameras, 0)
    parts = []
    for number, segment in enumerate(segments):
        videos, pixels, lengths, shows = {}, {}, {}, False
        for camera in cameras:
            frames: Iterator[np.ndarray] = streams[camera]
            if segment is not None:
                frames = islice(frames, segment.start - position[camera], segment.stop - position[camera])
                position[camera] = segment.stop
            sized = (resize_and_crop(frame_HWC[None], options.size)[0] for frame_HWC in frames)
            videos[camera], pixels[camera] = target / f"{number}-{camera}.mp4", PixelMoments()
            lengths[camera] = encode_clip(videos[camera], pixels[camera].watch(sized), fps, KEYFRAME_INTERVAL)
            shows |= pixels[camera].minimum.tolist() != pixels[camera].maximum.tolist()
        if not shows:
            continue
        span = slice(None) if segment is None else slice(segment.start, segment.stop)
        actions, states = (rows[name][span] if name in rows else None for name in (ACTION, STATE))
        key = item.key if len(segments) == 1 else f"{item.key}#{number:04d}"
        stats = {camera: moments.to_dict() for camera, moments in pixels.items()}
        length = min(lengths.values())
        if len({*lengths.values(), *(len(values) for values in (actions, states) if values is not None)}) > 1:
            raise ValueError(f"{source.file_of(item)}: cameras, actions and states differ in length: {lengths}")
        parts.append(_Part(key, clip.instruction, videos, length, stats, actions, states))
    return parts
