"""Video files as sources use them: their headers, their lengths, and their pictures by time.

Frame i of a clip is the one shown nearest to `start + i / fps` seconds, whatever the file's own rate, constant or not.
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from math import ceil
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import UInt8

from lapa.data.convert import TIE, in_time, resample
from lapa.data.source import Clip, Item, Source, with_length
from lapa.data.video import EARLIER, ClipScan, OpenClip, VideoInfo, frame_times, open_clip, probe, upright
from lapa.errors import UserError
from lapa.sources.folder_scan import cached, judge, look_through, stamp

# Files; looking at fewer headers takes less than a second or two.
WORTH_KEEPING = 500
CAMERA = "video"
UNSEEN = np.zeros(0, np.uint8)
# Seconds of a film that are decoded rather than leapt over.
DECODE_ON = 1.0


class FilmSource(Source):
    """A source whose items are whole video files; `length`, where an item has one, is what the header says.

    skip_bad: leave out, when read in place, what cannot be read.
    """

    skip_bad = False

    def film(self, item: Item) -> Path:
        """The file of an item."""
        return self.root / item.key

    def file_of(self, item: Item) -> str:
        return str(self.film(item))

    def read(self, item: Item) -> Clip:
        path = self.film(item)
        scan = ClipScan(path)

        def frames() -> Iterator[tuple[float, np.ndarray]]:
            yield from scan
            if scan.num_lost:
                # A loss is told in frames of the dataset.
                clip.lost = round(scan.num_lost * self.fps / probe(path).fps) or 1

        clip = Clip({CAMERA: frames()}, item.instruction)
        return clip

    def measured(self) -> Sequence[Item]:
        """All items with their lengths; see `count_frames`."""

        unknown = [item.key for item in self.items if item.length is None]
        lengths: dict[str, int | UserError] = {}
        infos: dict[str, VideoInfo] = {}
        for name, info in read_headers(self.root, unknown):
            if isinstance(info, UserError):
                lengths[name] = info
            elif (length := quick_count(info, self.fps)) is not None:
                lengths[name] = length
            else:
                infos[name] = info
        counted = look_through(lambda name: count_frames(self.root / name, infos[name], self.fps), list(infos))
        lengths.update(counted)
        measured, broken = [], []
        for item in self.items:
            found = lengths[item.key] if item.length is None else item.length
            if isinstance(found, UserError):
                broken.append(str(found))
            else:
                measured.append(with_length(item, found))
        judge(broken, "replace it or take it out, or give skip_bad=true", self.skip_bad)
        return measured

    def pictures(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        return pictures_near(self.film(item), [index / self.fps for index in frame_indices])


def read_headers(root: Path, names: Sequence[str]) -> Iterator[tuple[str, VideoInfo | UserError]]:
    """Each video with what its header says, or why it cannot be read. Many headers are kept for the next time."""

    def look() -> list[list[Any] | None]:
        found = look_through(lambda name: _header(root / name), names)
        return [None if isinstance(info, UserError) else list(astuple(info)) for _, info in found]

    if len(names) < WORTH_KEEPING:
        yield from look_through(lambda name: _header(root / name), names)
        return
    kept = cached("videos", [_stamp(root / name) for name in names], look)
    broken = dict(
        look_through(lambda name: _header(root / name), [n for n, entry in zip(names, kept, strict=True) if not entry])
    )
    for name, entry in zip(names, kept, strict=True):
        yield name, VideoInfo(*entry) if entry else broken[name]


def _header(path: Path) -> VideoInfo:
    # A pipe would be waited for without end.
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file; take it out")
    return probe(path)


def _stamp(path: Path) -> list[Any]:
    try:
        return stamp(path)
    except OSError:
        return [str(path)]


def quick_count(info: VideoInfo, fps: float) -> int | None:
    """How many frames at `fps` a video gives, up to the middle of the last frame, by its header alone.

    As `resample` counts, but one more where a header declares a constant rate that the frames do not keep. None where
    the header does not tell.
    """
    if not info.constant or info.num_frames is None:
        return None
    return max(1, ceil((info.num_frames - 0.5) / info.fps * fps - TIE * fps))


def count_frames(path: Path, info: VideoInfo, fps: float) -> int:
    """As `quick_count`, by the packets' times where the rate varies, and by reading where nothing else helps.

    UserError where there is no frame.
    """
    quick = quick_count(info, fps)
    if quick is not None:
        return quick
    times = [seconds for seconds, _ in ClipScan(path)] if info.constant else frame_times(path)
    number = sum(1 for _ in resample(in_time(((seconds, UNSEEN) for seconds in times), str(path)), fps))
    if not number:
        raise UserError(f"{path}: no frame of it can be decoded; replace it or take it out")
    return number


def frames_near(path: Path, times: Sequence[float]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """The frame shown nearest to each time, in seconds from the first frame on; times must not go backwards.

    Leaps to the first time instead of reading up to it. UserError naming the file where it cannot be decoded, or ends
    more than a frame or two before a time.
    """
    clip = open_clip(path)
    try:
        first, rate = clip.first_time(), clip.stream.average_rate or clip.stream.guessed_rate
        late = 1.5 / float(rate or 25)
        before: VideoFrame | None = None
        after: VideoFrame | None = None
        for seconds in times:
            time = first + seconds
            if before is None or not _time(before) <= time + TIE or time > _time(before) + DECODE_ON:
                before, after = _leap(clip, time)
            while after is not None and _time(after) <= time:
                before, after = after, next_frame(clip)
            if after is None and time > _time(before) + _duration(before) + late:
                raise UserError(
                    f"{path}: ends at {_time(before) - first:.3f} s, before {seconds:.3f} s; it is damaged, replace it"
                )
            nearer = before if after is None or time < (_time(before) + _time(after)) / 2 - TIE else after
            yield upright(nearer, clip.converter)
    except (av.FFmpegError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace it or take it out") from None
    finally:
        # Whoever reads on has to leap: the frames taken here are gone.
        clip.position = None


def next_frame(clip: OpenClip) -> VideoFrame | None:
    """The frame that comes next in an open film, or None at its end."""
    return next(clip.frames, None)


def pictures_near(path: Path, times: Sequence[float]) -> UInt8[np.ndarray, "T H W 3"]:
    """As `frames_near`, of times in any order, repeats allowed."""
    wanted = sorted(set(times))
    found = dict(zip(wanted, frames_near(path, wanted), strict=True))
    return np.stack([found[time] for time in times])


def _leap(clip: OpenClip, time: float) -> tuple[VideoFrame, VideoFrame | None]:
    """A frame shown up to a time, or else the film's first, and the one that follows."""
    for earlier in (*EARLIER, time + 1):
        clip.seek(max(0.0, time - earlier))
        before = next_frame(clip)
        # Seeking may end up late: in an open GOP, or in a file without an index.
        if before is not None and (_time(before) <= time + TIE or earlier > time):
            return before, next_frame(clip)
    raise EOFError("no frame of it can be decoded there")


def _time(frame: VideoFrame) -> float:
    return float(frame.time or 0.0)


def _duration(frame: VideoFrame) -> float:
    return float((frame.duration or 0) * (frame.time_base or 0))
