"""What a worker process does with an item of a source: reads it, and writes the videos of its episodes.

Axes: T time, H W image, C channel, D numbers of a feature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lapa.data.dataset import ACTION, STATE
from lapa.data.filters import TIE, by_shot, in_time, resample, resample_rows
from lapa.data.motion import MotionMeter
from lapa.data.source import Clip, Item, Source
from lapa.data.statistics import PixelMoments
from lapa.data.video import encode_clip
from lapa.errors import UserError

if TYPE_CHECKING:
    from lapa.data.convert import ConvertOptions


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
