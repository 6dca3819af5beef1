"""Converts any source into a dataset: in parallel, resumable, with filters.

Worker processes read, filter, scale and encode items; this process adds their episodes in order, so that the dataset
does not depend on the number of workers. Each item that is done, kept or not, is noted in the journal: an interrupted
conversion continues after it, and what was left out is counted over all runs. Images pass one at a time, so that a
video of any length needs the memory of a few.
Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shlex
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lapa.console import finish, progress, say, warn
from lapa.data.cards import CardMeter
from lapa.data.config import ConvertOptions
from lapa.data.convert_ray import INCOMING, convert_with_ray, remove_incoming
from lapa.data.dataset import ACTION, STATE, ActionSpace, require_finite
from lapa.data.duplicates import image_bits, looks_of
from lapa.data.left_out import IMAGE_SIDE
from lapa.data.metadata import INFO, LEFT_OUT
from lapa.data.motion import CameraMeter, MotionMeter, inside_bars, share_of_new, shot_numbers, thumbnail
from lapa.data.source import Clip, Item, Source
from lapa.data.statistics import PixelMoments
from lapa.data.transforms import at_most, resize_and_crop, to_page
from lapa.data.video import encode_clip
from lapa.data.workers import Workers
from lapa.data.writer import (
    CAMERA_MOTION,
    IMAGE,
    LOOKS,
    NO_INSTRUCTION,
    SOURCE_FINGERPRINT,
    TEXT,
    DatasetWriter,
)
from lapa.errors import StoreError, UserError, unknown
from lapa.files import as_path, claim_output, is_remote, reading
from lapa.locks import locks_output
from lapa.ray_cluster import check_ray

KEYFRAME_INTERVAL = 2
# Frames of an item, spread over all, in which black bars are looked for; up to twice as many.
BAR_FRAMES = 8
# Images a frame that are too few, and what is looked at for these.
SLOWER = 0.7
SAMPLED_ITEMS, SAMPLED_FRAMES = 3, 90
# Seconds; a tick this close to the middle between two frames takes the later one, however the sum is rounded.
TIE = 1e-6
# Seconds between two frames that are plausible: a damaged timestamp would fill the disk with one image.
LONGEST_GAP = 60.0
# Reasons to leave something out, and other counts, as the journal and the summary name them.
DAMAGED, KEPT = "left out, damaged", "damaged, the readable part is kept"
LOST = "frames lost in what is damaged"
BARS = "kept, black bars cropped"
CUT, SHOTS = "items that are cut into shots", "shots of these"
SMALL, SHORT, STATIC, FROZEN, CARDS, CAMERA, BLANK = (
    "left out, images too small",
    "left out, too short",
    "left out, nothing moves",
    "left out, most frames repeat the one before",
    "left out, most frames are text",
    "left out, the camera moves",
    "left out, no camera shows anything",
)


T = TypeVar("T")


@dataclass(frozen=True)
class ConvertedItem:
    """The result of an item.

    episodes: arguments of `DatasetWriter.add_episode_files`; notes: to be counted; examples: of what is left out, as
    `DatasetWriter.close_item` takes them; lost: frames, because of `damage`; error: why there is no result.
    """

    episodes: tuple[dict[str, Any], ...] = ()
    notes: Counter[str] = field(default_factory=Counter)
    examples: tuple[dict[str, Any], ...] = ()
    lost: int = 0
    damage: str = ""
    error: str | None = None


@locks_output
def run(options: ConvertOptions) -> None:
    """`lapa data SOURCE`: converts, and prints what was left out. Raises UserError on bad input."""
    out, folder = as_path(options.out), shlex.quote(str(options.out))
    next_commands = [f"lapa data info {folder}", f"lapa latent train --data {folder} --out LAM"]
    _check_options(options)
    if options.engine == "ray" and is_remote(out) and getattr(out, "protocol", "") == "memory":
        raise UserError(f"{out}: is the memory of this process, which Ray's workers do not share; give another --out")
    source = options.open()
    say(f"{source.kind}: {len(source.items)} items in {source.root}")
    for camera in options.camera:
        if camera not in source.cameras:
            raise unknown("camera", camera, source.cameras)
    cameras = list(options.camera or source.cameras)
    fps = _choose_rate(source, options)
    items = source.items[: options.limit]
    _check_names(source, items)
    with reading(out):
        complete = (out / INFO).exists()
    claim_output(
        out,
        complete=complete,
        overwrite=options.overwrite,
        resume=options.resume,
        inputs=[source.root, *source.inputs],
    )
    writer = _open_writer(source, items, cameras, fps, options)
    if writer.finished:
        finish("dataset, already complete", out, next_commands)
        return
    report_repeated((_first_frames(source, item, cameras[0]) for item in sample(items)), source.fps, fps)
    if writer.num_items:
        say(f"resuming: {writer.num_items} of {len(items)} items are done")
    # Workers receive their items one by one.
    light = copy.copy(source)
    light.items = ()
    if options.engine == "ray":
        readable = [item for item in sample(items) if not _unreadable(light, cameras, [item])]
        look = partial(_unreadable, light, cameras, readable)
        convert_with_ray(partial(_convert_apart, light, cameras, fps, options), look, items, writer, options.ray)
    else:
        _convert_all(light, items[writer.num_items :], writer, cameras, fps, options)
    for note, count in sorted(writer.notes.items()):
        (say if note in (CUT, SHOTS) else warn)(f"{note}: {count}")
    if not writer.num_episodes:
        writer.discard()
        raise UserError(f"{source.root}: none of its {len(items)} items became an episode; nothing was written")
    dataset = writer.finish(source.notes)
    say(f"what was kept and left out, with examples: {out / LEFT_OUT}")
    finish(f"dataset of {len(dataset)} episodes, {dataset.num_frames} frames at {fps:g} fps", out, next_commands)


def report_repeated(films: Iterable[Iterable[np.ndarray]], fps: float, rate: float) -> None:
    """Warns where most of the films show the same image in most neighbouring frames.

    fps: of the films; rate: at which they are taken.
    """
    shares = [share_of_new(frames) for frames in films]
    repeated = sorted(share for share in shares if share < 1)
    if 2 * len(repeated) <= len(shares):
        return
    real = repeated[len(repeated) // 2] * fps
    if real < SLOWER * rate:
        warn(
            f"most neighbouring frames are the same image, in {len(repeated)} of {len(shares)} films: of {fps:g} "
            f"frames a second about {real:.2g} are new; to take each image once, convert with --rate {real:.2g}"
        )


def sample(items: Sequence[T]) -> list[T]:
    """Returns a few items, spread over all of them."""
    places = np.linspace(0, len(items) - 1, min(SAMPLED_ITEMS, len(items))).round().astype(int)
    return [items[place] for place in places.tolist()]


def _first_frames(source: Source, item: Item, camera: str) -> Iterator[np.ndarray]:
    """Yields the first frames of an item, at the rate of the source, as far as they can be read."""
    with suppress(UserError):
        yield from islice(resample(source.read(item).frames[camera], source.fps), SAMPLED_FRAMES)


def _unreadable(source: Source, cameras: list[str], items: Iterable[Item]) -> str:
    """Returns why one of the items cannot be read, as far as its first frames; "" where all can."""
    try:
        for item in items:
            frames = source.read(item).frames
            for camera in cameras:
                if next(iter(frames[camera]), None) is None:
                    return f"{source.file_of(item)}: none of its frames can be decoded"
    except (UserError, OSError) as error:
        return str(error)
    return ""


def convert_item(
    source: Source, cameras: list[str], fps: float, options: ConvertOptions, item: Item, target: Path
) -> ConvertedItem:
    """Reads an item once, and writes the videos of its episodes; their names begin with that of `target`.

    Raises StoreError, which is no damage of the item.
    """
    where = source.file_of(item)
    try:
        clip = source.read(item)
        streams, small, bars = {}, False, ""
        for camera in cameras:
            timed = in_time(clip.frames[camera], where)
            first = next(timed, None)
            if first is None:
                raise UserError(f"{where}: none of its frames can be decoded; replace it or take it out")
            shape, timed = first[1].shape[:2], chain([first], timed)
            if options.crop_bars:
                place = inside_bars(_spread(image for _, image in source.read(item).frames[camera]))
                whole, shape, timed = shape, first[1][place].shape[:2], _cropped(timed, place, first[1].shape)
                if shape != whole:
                    bars = bars or f", cropped to {shape[1]} x {shape[0]} of {whole[1]} x {whole[0]} pixels"
            if min(shape) < options.min_side:
                small, text = True, f"{shape[1]} x {shape[0]} pixels"
                example = _example(SMALL, item.key, text, first[1])
            streams[camera] = resample(timed, fps)
        if small:
            return ConvertedItem(notes=Counter((SMALL, *clip.notes)), examples=(example,))
        episodes, left_out = _encode(source, clip, item, streams, fps, options, target)
    except StoreError:
        raise
    except UserError as error:
        return ConvertedItem(error=str(error))
    bare = [NO_INSTRUCTION for episode in episodes if not episode["instruction"].strip()]
    cropped = [BARS] * bool(bars and episodes)
    notes = Counter((*(example["reason"] for example in left_out), *bare, *cropped, *clip.notes))
    if (num_shots := len(episodes) + len(left_out)) > 1:
        notes.update({CUT: 1, SHOTS: num_shots})
    for example in (*left_out, *(episode["facts"] for episode in episodes)):
        example[TEXT] += bars
    return ConvertedItem(tuple(episodes), notes, tuple(left_out), clip.lost, clip.damage)


def _example(reason: str, source: str, text: str, image_HWC: np.ndarray | None) -> dict[str, Any]:
    """Returns an example of what is kept or left out, for the page."""
    image = None if image_HWC is None else to_page(at_most(image_HWC, IMAGE_SIDE), exact=False)
    return {"reason": reason, "source": source, TEXT: text, IMAGE: image}


def _spread(frames: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Returns some images, spread over all, of the shape of the first; a film may change its size."""
    kept: list[np.ndarray] = []
    every = 1
    for number, frame_HWC in enumerate(frames):
        if number % every == 0 and (not kept or frame_HWC.shape == kept[0].shape):
            kept.append(frame_HWC)
            if len(kept) > 2 * BAR_FRAMES:
                kept, every = kept[::2], 2 * every
    return kept


def _cropped(
    timed_frames: Iterable[tuple[float, np.ndarray]], place: tuple[slice, slice], shape: tuple[int, ...]
) -> Iterator[tuple[float, np.ndarray]]:
    """Yields the frames (seconds, image), those of this shape cropped."""
    for seconds, frame_HWC in timed_frames:
        yield seconds, frame_HWC[place] if frame_HWC.shape == shape else frame_HWC


def in_time(timed_frames: Iterable[tuple[float, np.ndarray]], where: str) -> Iterator[tuple[float, np.ndarray]]:
    """Yields the frames (seconds, image) unchanged. Raises UserError naming `where` for times that go back or leap."""
    before = None
    for number, (seconds, frame) in enumerate(timed_frames):
        # A comparison that NaN fails, too.
        if before is not None and not before - TIE <= seconds <= before + LONGEST_GAP:
            wrong = "go backwards" if seconds < before else "leap"
            raise UserError(f"{where}: its timestamps {wrong} at frame {number} (from {before:.3f} to {seconds:.3f} s)")
        before = seconds
        yield seconds, frame


def resample(timed_frames: Iterable[tuple[float, np.ndarray]], fps: float) -> Iterator[np.ndarray]:
    """Yields the frame nearest to each tick of 1 / fps seconds, as far as the frames (seconds, image) reach."""
    tick, before = 0, None
    duration = 0.0
    for seconds, frame in timed_frames:
        if before is not None:
            while tick / fps < (before[0] + seconds) / 2 - TIE:
                yield before[1]
                tick += 1
            duration = seconds - before[0]
        before = seconds, frame
    # Half a frame after the last one, a next frame would be the nearest.
    while before is not None and (tick == 0 or tick / fps < before[0] + duration / 2 - TIE):
        yield before[1]
        tick += 1


def resample_rows(rows_TD: np.ndarray, fps: float, rate: float, space: ActionSpace | None = None) -> np.ndarray:
    """Returns the rows at each tick of 1 / rate seconds, of rows at `fps`.

    space: of actions, which hold until the next tick: deltas are added up, of targets and switches the last one holds.
    Without it, rows are measurements at the tick.
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


def _check_options(options: ConvertOptions) -> None:
    if options.size < 2 or options.size % 2:
        raise UserError(f"--size {options.size}: must be an even number of pixels")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    if options.engine == "ray" and options.workers:
        raise UserError("--workers is for this machine alone; with --engine ray, give --ray.num-workers")
    if options.ray.num_gpus:
        raise UserError(f"--ray.num-gpus {options.ray.num_gpus:g}: a conversion uses no GPU; leave this out")
    check_ray(options.ray)
    for name in ("min_seconds", "min_side", "min_motion", "workers"):
        if not getattr(options, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: cannot be below 0")
    for option, of in (("max_frozen", "frames"), ("max_text", "frames"), ("max_camera_motion", "change")):
        value = getattr(options, option)
        if not 0 < value <= 1:
            raise UserError(f"--{option.replace('_', '-')} {value:g}: is a share of the {of}, above 0 and up to 1")


def _check_names(source: Source, items: Sequence[Item]) -> None:
    """Raises UserError where two items share a name, which the dataset notes as its episodes' source."""
    # The names of millions of items take gigabytes in a set, their hashes do not.
    if len(np.unique(np.fromiter((hash(item.key) for item in items), np.int64, len(items)))) == len(items):
        return
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise UserError(f"{source.file_of(item)}: two items have this name; rename or take out one")
        seen.add(item.key)


def _choose_rate(source: Source, options: ConvertOptions) -> float:
    """Returns the dataset's frames a second. Raises UserError where actions cannot follow."""
    rate = source.fps if options.rate is None else options.rate
    if not 0 < rate <= source.fps:
        raise UserError(
            f"--rate {rate:g}: {source.root} has {source.fps:g} frames a second; give a rate above 0 and at most that"
        )
    space = source.action_space if options.actions else None
    if rate != source.fps and space is not None and space.control is None:
        raise UserError(
            f"--rate {rate:g}: whether the actions of {source.root} are deltas or absolute is not known, so they "
            "cannot be taken at another rate; give --no-actions"
        )
    return rate


def _open_writer(
    source: Source, items: Sequence[Item], cameras: list[str], fps: float, options: ConvertOptions, part: bool = False
) -> DatasetWriter:
    space = source.action_space if options.actions else None
    # A resumed run must have the same options, those that decide what of the source is in the dataset.
    names = ("camera", "actions", "rate", "cut_shots", "min_seconds", "min_side", "min_motion", "crop_bars", "limit")
    values = {name: getattr(options, name) for name in (*names, "size")}
    values["drop_duplicates"] = options.drop_duplicates
    for name in ("max_frozen", "max_text", "max_camera_motion"):
        if getattr(options, name) < 1:
            values[name] = getattr(options, name)
    filters = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value}
    return DatasetWriter(
        options.out,
        fps=fps,
        cameras=dict.fromkeys(cameras, (options.size, options.size)),
        action_names=space.names if space else None,
        state_names=source.state_names if options.actions else None,
        binary_actions=space.binary_names if space else (),
        control=space.control if space else None,
        keyframe_interval=KEYFRAME_INTERVAL,
        extra_info={
            "made_by": f"lapa data {source.kind}",
            SOURCE_FINGERPRINT: _fingerprint(items),
            **source.settings,
            **filters,
        },
        resume=options.resume,
        drop_duplicates=options.drop_duplicates and not part,
        part=part,
    )


def _fingerprint(items: Sequence[Item]) -> str:
    """A hash of the items' names and of what is known of them without reading them."""
    # The text of one JSON list, item by item: that of millions of items would take gigabytes.
    digest, before = hashlib.sha256(b"["), b""
    for item in items:
        digest.update(before + json.dumps([item.key, item.instruction, item.length]).encode())
        before = b", "
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _convert_all(
    source: Source,
    items: Sequence[Item],
    writer: DatasetWriter,
    cameras: list[str],
    fps: float,
    options: ConvertOptions,
    tell: Callable[[str], None] = warn,
) -> None:
    remove_incoming(writer.root)
    # A new folder for each run: workers of a killed one may continue for a moment.
    out = None if is_remote(writer.root) else writer.root
    with tempfile.TemporaryDirectory(prefix=INCOMING, dir=out, ignore_cleanup_errors=True) as folder:
        jobs = ((item, Path(folder) / str(number)) for number, item in enumerate(items))
        num_workers = min(options.workers or os.cpu_count() or 1, len(items))
        shared = (source, cameras, fps, options)
        with progress() as bar, Workers(num_workers if num_workers > 1 else 0, shared) as workers:
            task = bar.add_task("converting", total=len(items), note="")
            for number, converted in enumerate(workers.in_order(convert_item, jobs)):
                _add(source, items[number], converted, writer, options.skip_bad, tell)
                bar.advance(task)
        writer.flush()
    remove_incoming(writer.root)


def _convert_apart(
    source: Source, cameras: list[str], fps: float, options: ConvertOptions, items: Sequence[Item], folder: Path
) -> list[str]:
    """Converts items into a folder of their own, as a dataset that is not finished; returns the warnings."""
    warnings: list[str] = []
    options = replace(options, out=str(folder), workers=1, overwrite=False, resume=False)
    writer = _open_writer(source, items, cameras, fps, options, part=True)
    _convert_all(source, items, writer, cameras, fps, options, warnings.append)
    return warnings


def _add(
    source: Source,
    item: Item,
    converted: ConvertedItem,
    writer: DatasetWriter,
    skip_bad: bool,
    tell: Callable[[str], None],
) -> None:
    """Adds an item's result to the dataset and its journal. Raises UserError where it is damaged, unless skip_bad."""
    notes, examples = Counter(converted.notes), list(converted.examples)
    if converted.error is not None:
        if not skip_bad:
            raise UserError(f"{converted.error}; fix or replace it, or give --skip-bad to leave out damaged items")
        tell(f"left out: {converted.error}")
        notes[DAMAGED] += 1
        # The page has no path of this machine.
        text = converted.error.removeprefix(f"{source.file_of(item)}: ").replace(f"{source.root}/", "")
        examples.append(_example(DAMAGED, item.key, text, None))
    if converted.lost:
        kept = sum(episode["length"] for episode in converted.episodes)
        damage = converted.damage or source.file_of(item)
        tell(f"{damage}: damaged; {kept} frames kept, {converted.lost} lost")
        notes.update({KEPT: 1, LOST: converted.lost})
    for episode in converted.episodes:
        # An item that a kill interrupted between two of its episodes is converted again.
        if episode["source"] in writer.done_sources:
            continue
        if writer.is_duplicate({**episode, **episode["facts"]}):
            for video in episode["files"].values():
                video.unlink()
        else:
            writer.add_episode_files(**episode)
    writer.close_item(item.key, notes, examples)


@dataclass
class _Shot:
    """A part of an item; `reason`: why it is left out.

    motion: the greatest of all cameras; frozen: the share of frames that repeat the one before, cards: of frames of
    text, and camera_motion: of the change that the camera's own motion explains, the least of all. image, looks: of the
    first camera.
    """

    start: int
    stop: int
    videos: dict[str, Path] = field(default_factory=dict)
    pixels: dict[str, _Pixels] = field(default_factory=dict)
    motion: float = 0.0
    frozen: float = 1.0
    cards: float = 1.0
    camera_motion: float = 1.0
    image: np.ndarray | None = None
    looks: str = ""
    reason: str | None = None


# A frame with the number of its shot, and its thumbnail where it is measured.
ShotFrame = tuple[int, np.ndarray | None, np.ndarray]


def _encode(
    source: Source,
    clip: Clip,
    item: Item,
    streams: dict[str, Iterator[np.ndarray]],
    fps: float,
    options: ConvertOptions,
    target: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Writes the videos of each shot of the first camera, for all cameras. Also returns the shots that are left out."""
    where = source.file_of(item)
    first, *others = streams
    shots: list[_Shot] = []
    for _, frames in groupby(_by_shot(streams[first], options, options.cut_shots), key=lambda frame: frame[0]):
        start = shots[-1].stop if shots else 0
        shots.append(_Shot(start, start))
        shots[-1].stop += _write(shots[-1], first, frames, _video(target, len(shots), first), fps, options)
        if shots[-1].stop - start < options.min_seconds * fps - TIE:
            shots[-1].reason = SHORT
    total = shots[-1].stop
    for camera in others:
        rest = _by_shot(streams[camera], options, cut=False)
        for number, shot in enumerate(shots, 1):
            length, frames = shot.stop - shot.start, islice(rest, shot.stop - shot.start)
            begins = next(frames, None)
            found = int(begins is not None)
            if begins is not None and shot.reason is None:
                found = _write(shot, camera, chain([begins], frames), _video(target, number, camera), fps, options)
            found += sum(1 for _ in frames)
            if found != length:
                raise UserError(f"{where}: camera {camera} ends after {shot.start + found} of {total} frames")
        if next(rest, None) is not None:
            raise UserError(f"{where}: camera {camera} goes on after {total} frames, where camera {first} ends")
    rows = _rows(source, clip, where, fps, options)
    for name, values in rows.items():
        if len(values) != total:
            raise UserError(f"{where}: {name} has {len(values)} rows for {total} frames; they differ in length")
    episodes, left_out = [], []
    for number, shot in enumerate(shots):
        name = item.key if len(shots) == 1 else f"{item.key}#{number:04d}"
        text = f"{(shot.stop - shot.start) / fps:.1f} s"
        if shot.reason is None and not any(pixels.any_content for pixels in shot.pixels.values()):
            shot.reason = BLANK
        elif shot.reason is None and shot.motion < options.min_motion:
            shot.reason, text = STATIC, f"{text}, motion {shot.motion:.3f}"
        elif shot.reason is None and shot.frozen > options.max_frozen:
            shot.reason, text = FROZEN, f"{text}, {shot.frozen:.0%} of the frames repeat"
        elif shot.reason is None and shot.cards > options.max_text:
            shot.reason, text = CARDS, f"{text}, {shot.cards:.0%} of the frames are text"
        elif shot.reason is None and shot.camera_motion > options.max_camera_motion:
            shot.reason = CAMERA
        if options.max_camera_motion < 1 and shot.reason in (None, CAMERA):
            text = f"{text}, camera motion {shot.camera_motion:.2f}"
        example = _example(shot.reason or "", name, text, shot.image)
        if shot.reason is not None:
            for video in shot.videos.values():
                video.unlink()
            left_out.append(example)
            continue
        facts = {IMAGE: example[IMAGE], TEXT: text}
        if options.drop_duplicates:
            facts[LOOKS] = shot.looks
        if options.max_camera_motion < 1:
            facts[CAMERA_MOTION] = round(shot.camera_motion, 4)
        episode = {
            "files": shot.videos,
            "length": shot.stop - shot.start,
            "instruction": clip.instruction,
            "pixel_stats": {camera: moments.to_dict() for camera, moments in shot.pixels.items()},
            "source": name,
            "facts": facts,
        }
        for name, argument in ((ACTION, "actions"), (STATE, "states")):
            episode[argument] = rows[name][shot.start : shot.stop] if name in rows else None
        episodes.append(episode)
    return episodes, left_out


def _by_shot(frames: Iterable[np.ndarray], options: ConvertOptions, cut: bool) -> Iterator[ShotFrame]:
    """Scales the frames and numbers their shots. cut: look for shots, otherwise all frames are of number 0."""
    waiting: deque[tuple[Any, np.ndarray]] = deque()

    def thumbnails() -> Iterator[Any]:
        for frame_HWC in frames:
            bounds = options.min_motion > 0 or options.max_frozen < 1 or options.max_camera_motion < 1
            measured = cut or bounds or options.drop_duplicates
            small_HW = thumbnail(frame_HWC) if measured else None
            waiting.append((small_HW, resize_and_crop(frame_HWC[None], options.size)[0]))
            yield small_HW

    for shot in shot_numbers(thumbnails()) if cut else (0 for _ in thumbnails()):
        yield shot, *waiting.popleft()


def _write(
    shot: _Shot, camera: str, frames: Iterable[ShotFrame], video: Path, fps: float, options: ConvertOptions
) -> int:
    """Writes the video of a camera, and keeps its statistics and motion in the shot; returns the number of frames."""
    meter, pixels, camera_meter, cards = MotionMeter(max(1, round(fps / 2))), _Pixels(), CameraMeter(), CardMeter()
    is_first, bits = not shot.videos, []

    def images() -> Iterator[np.ndarray]:
        for number, (_, small_HW, frame_HWC) in enumerate(frames):
            if small_HW is not None:
                meter.add(small_HW)
                if options.max_camera_motion < 1:
                    camera_meter.add(small_HW)
                if is_first and options.drop_duplicates:
                    bits.append(image_bits(small_HW))
            if options.max_text < 1:
                cards.add(frame_HWC)
            # At the end, one of the later half: a film begins with titles.
            if is_first and number & (number - 1) == 0:
                shot.image = frame_HWC
            yield frame_HWC

    length = encode_clip(video, pixels.watch(images()), fps, KEYFRAME_INTERVAL)
    shot.videos[camera], shot.pixels[camera] = video, pixels
    shot.motion = max(shot.motion, meter.greatest)
    shot.frozen = min(shot.frozen, meter.frozen)
    shot.cards = min(shot.cards, cards.share)
    shot.camera_motion = min(shot.camera_motion, camera_meter.share)
    if bits:
        shot.looks = looks_of(bits)
    return length


def _video(target: Path, shot: int, camera: str) -> Path:
    return target.with_name(f"{target.name}-{shot}-{camera}.mp4")


def _rows(source: Source, clip: Clip, where: str, fps: float, options: ConvertOptions) -> dict[str, np.ndarray]:
    """Returns actions and states at the dataset's rate, if any. Raises UserError where one is not finite."""
    rows = {}
    for name, values, space in ((ACTION, clip.actions, source.action_space), (STATE, clip.states, None)):
        if not options.actions or values is None:
            continue
        require_finite(values, f"{where}: {name}", remedy="")
        rows[name] = values if fps == source.fps else resample_rows(values, source.fps, fps, space)
    return rows


class _Pixels(PixelMoments):
    """Statistics of images in passing; any_content: whether they hold more than one colour throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.any_content = False

    def watch(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the frames, as `PixelMoments.watch`, and looks for a second colour in each until one is found."""
        colour = None
        for frame_HWC in super().watch(frames):
            if not self.any_content:
                colour = frame_HWC[0, 0] if colour is None else colour
                self.any_content = bool((frame_HWC != colour).any())
            yield frame_HWC
