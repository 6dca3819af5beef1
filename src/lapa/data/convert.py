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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.console import finish, progress, say, warn
from lapa.data.items import KEYFRAME_INTERVAL, Converted, convert_item
from lapa.data.lerobot import INFO
from lapa.data.source import Item, Reading, Source
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


# What a worker does with an item: (source, cameras, fps, options, item, how its videos' names begin) -> Converted.
Job = Callable[[Any, list[str], float, Any, Item, Path], Converted]


def run(reading: Reading, options: ConvertOptions, copy: Job | None = None) -> None:
    """`lapa data SOURCE`: converts, and says what was left out and what comes next. Raises UserError on bad input.

    copy: done with each item in place of encoding it anew; the pictures keep the source's own size.
    """
    out = options.out
    if nothing_to_add(out, resume=options.resume, overwrite=options.overwrite):
        return
    _require_sense(options)
    source = reading.open()
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
    writer = _open_writer(source, cameras, fps, options, copied=copy is not None)
    todo = [item for item in items if item.key not in writer.done_items]
    if len(todo) < len(items):
        say(f"resuming: {len(items) - len(todo)} of {len(items)} items are done")
    _convert_all(source, todo, writer, cameras, fps, options, copy or convert_item)
    for note, count in sorted(writer.notes.items()):
        warn(f"{note}: {count}")
    if not writer.num_episodes:
        writer.discard()
        raise UserError(f"{source.root}: none of its {len(items)} items became an episode; nothing was written")
    dataset = writer.finish()
    what = f"dataset of {len(dataset.lengths)} episodes, {dataset.num_frames} frames at {fps:g} fps"
    folder = shlex.quote(str(out))
    finish(what, out, [f"lapa data info {folder}", f"lapa latent train --data {folder} --out LAM"])


def _open_writer(
    source: Source, cameras: list[str], fps: float, options: ConvertOptions, copied: bool
) -> DatasetWriter:
    space = source.action_space if options.actions else None
    square = (options.size, options.size)
    return DatasetWriter(
        options.out,
        fps=fps,
        cameras={camera: source.cameras[camera] if copied else square for camera in cameras},
        action_names=space.names if space else None,
        state_names=source.state_names if options.actions else None,
        binary_actions=[name for name, switch in zip(space.names, space.binary, strict=True) if switch]
        if space
        else (),
        control=space.control if space else None,
        keyframe_interval=KEYFRAME_INTERVAL,
        extra_info={"made_by": f"lapa data {source.kind}", **source.settings, **_filters(options, copied)},
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


def _filters(options: ConvertOptions, copied: bool) -> dict[str, Any]:
    """The options that decide what of the source is in the dataset: a resumed run must have the same."""
    names = ("camera", "actions", "rate", "cut_shots", "min_seconds", "min_side", "min_motion", "limit")
    values = {name: getattr(options, name) for name in (*names, *(() if copied else ("size",)))}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value}


def _convert_all(
    source: Source,
    items: Sequence[Item],
    writer: DatasetWriter,
    cameras: list[str],
    fps: float,
    options: ConvertOptions,
    work: Job,
) -> None:
    _remove_incoming(options.out)
    # Of its own for each run: workers of a killed one may go on for a moment.
    incoming = Path(tempfile.mkdtemp(prefix=INCOMING, dir=options.out))
    jobs = ((item, incoming / str(number)) for number, item in enumerate(items))
    num_workers = min(options.workers or os.cpu_count() or 1, len(items))
    shared = (source.without_items(), cameras, fps, options)
    with progress() as bar, Workers(num_workers if num_workers > 1 else 0, shared) as workers:
        task = bar.add_task("converting", total=len(items), note="")
        for number, made in enumerate(workers.in_order(work, jobs)):
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
