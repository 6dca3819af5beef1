"""The source `videos`, folders of videos and their captions, and how every source reads video files.

    lapa data videos clips/ --captions captions.json --out data/clips
    lapa latent train --data videos:clips,captions=captions.json --out LAM

Reads every format that PyAV opens, at any size and rate: frame i of a clip is the one shown nearest to
`start + i / fps` seconds, whether the file's own rate is constant or not.
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from math import ceil
from pathlib import Path
from statistics import median

import av
import numpy as np
from av.video.frame import VideoFrame
from jaxtyping import UInt8

from lapa.console import say, warn
from lapa.data.config import ConvertOptions
from lapa.data.convert import TIE, in_time, resample
from lapa.data.source import Clip, Item, Source
from lapa.data.video import EARLIER, ClipScan, OpenClip, VideoInfo, frame_times, open_clip, probe
from lapa.errors import UserError
from lapa.sources.captions import CaptionedReading
from lapa.sources.folder_scan import cached, file_state, find_videos, require_rate, scan_files, stop_or_skip

CAMERA = "video"
UNREADABLE = "videos that cannot be read, left out"
# Number of files; scanning fewer headers takes less than a second or two.
WORTH_CACHING = 500
NO_FRAME = np.zeros(0, np.uint8)
# Seconds of a video that are decoded rather than skipped by seeking.
DECODE_ON = 1.0
# Seconds of which half of the videos are shorter only if they play too fast, or show single movements.
SHORT = 2.0


@dataclass(frozen=True)
class VideosReading(CaptionedReading):
    """A folder of videos, each an episode."""

    fps: float | None = None
    """Frames a second at which the videos are read; by default the rate of most of them."""
    true_fps: float | None = None
    """Frames a second that were recorded, where the files state another rate and so play too fast or too slowly: clips
    of RT-1 state 30, and were recorded at 3."""

    def open(self) -> Source:
        return VideosSource(self)


@dataclass(frozen=True)
class VideosConfig(ConvertOptions, VideosReading):
    """Turn a folder of videos into a dataset without actions."""


class VideoFilesSource(Source):
    """A source whose items are whole video files. An item's length, where it has one, is what the header promises.

    skip_bad: when read in place, leave out files that cannot be read.
    """

    skip_bad = False

    def path_of(self, item: Item) -> Path:
        """Returns the file of an item."""
        return self.root / item.key

    def file_of(self, item: Item) -> str:
        return str(self.path_of(item))

    def stretch_of(self, item: Item) -> float:
        """Returns how many times as long an item lasts as by the file's own times."""
        return 1.0

    def rate_of(self, item: Item) -> float:
        """Returns the frames that are taken of each second of an item's file."""
        return self.fps * self.stretch_of(item)

    def read(self, item: Item) -> Clip:
        path = self.path_of(item)
        scan = ClipScan(path)

        def frames() -> Iterator[tuple[float, np.ndarray]]:
            for seconds, frame_HWC in scan:
                yield seconds * self.stretch_of(item), frame_HWC
            if scan.num_lost:
                # Losses are counted in frames of the dataset.
                clip.lost = round(scan.num_lost * self.rate_of(item) / probe(path).fps) or 1

        clip = Clip({CAMERA: frames()}, item.instruction)
        return clip

    def measured(self) -> Sequence[Item]:
        """Returns all items with their lengths; see `count_frames`."""
        rates = {item.key: self.rate_of(item) for item in self.items if item.length is None}
        headers, unreadable = read_headers(self.root, list(rates))
        lengths = {name: quick_count(info, rates[name]) for name, info in headers.items()}
        counted, empty = scan_files(
            lambda name: count_frames(self.root / name, headers[name], rates[name]),
            [name for name, length in lengths.items() if length is None],
        )
        lengths |= counted
        stop_or_skip([*unreadable, *empty], "replace it or remove it, or give skip_bad=true", self.skip_bad)
        lengths |= {item.key: item.length for item in self.items if item.length is not None}
        return [replace(item, length=lengths[item.key]) for item in self.items if lengths.get(item.key) is not None]

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> UInt8[np.ndarray, "T H W 3"]:
        return frames_at(self.path_of(item), [index / self.rate_of(item) for index in frame_indices])


class VideosSource(VideoFilesSource):
    """A folder of videos. An item's place, with --true-fps: its stretch."""

    kind = "videos"

    def __init__(self, reading: VideosReading):
        require_rate(reading.fps)
        require_rate(reading.true_fps, "--true-fps")
        self.root, names = find_videos(reading.folder, reading.inputs)
        self.notes = notes = Counter[str]()
        instructions, skipped = reading.find_captions(names, "video", notes)
        headers, unreadable = read_headers(self.root, [name for name in names if name in instructions])
        notes[UNREADABLE] = stop_or_skip(unreadable, "--skip-bad leaves such files out", reading.skip_bad)
        skipped += notes[UNREADABLE]
        if skipped:
            warn(f"entries skipped in all (--skip-bad): {skipped}")
        if not headers:
            raise UserError(f"{self.root}: no video of it can be used")
        self.name, self.skip_bad, self.inputs = self.root.resolve().name, reading.skip_bad, reading.inputs
        recorded = reading.true_fps
        infos = [replace(info, fps=recorded or info.fps) for info in headers.values()]
        self.fps, size = common_format(infos, reading.fps)
        self.cameras = {CAMERA: size}
        self.settings = reading.settings(self.name, fps=reading.fps, true_fps=recorded)
        self.items = []
        for name, info in headers.items():
            item = Item(name, (info.fps / recorded,) if recorded else (), instructions[name])
            self.items.append(replace(item, length=quick_count(info, self.rate_of(item))))
        seconds = [item.length / self.fps for item in self.items if item.length]
        if recorded is None and seconds and median(seconds) < SHORT:
            say(
                f"half of the videos last {median(seconds):.2g} s or less; where they play too fast, give the rate "
                "that was recorded as --true-fps (clips of RT-1 state 30 frames a second, and were recorded at 3)"
            )

    def stretch_of(self, item: Item) -> float:
        return float(item.place[0]) if item.place else 1.0


def common_format(infos: Collection[VideoInfo], fps: float | None) -> tuple[float, tuple[int, int]]:
    """Rate, unless `fps` is given, and (height, width) of most videos, the greater of two; reports other ones."""
    rates = Counter(round(info.fps, 3) for info in infos)
    sizes = Counter((info.height, info.width) for info in infos)
    fps = fps or max(rates, key=lambda rate: (rates[rate], rate))
    size = max(sizes, key=lambda size: (sizes[size], size))
    if others := ", ".join(f"{count} at {rate:g}" for rate, count in sorted(rates.items()) if rate != fps):
        say(f"read at {fps:g} fps; resampled by their timestamps: {others} fps")
    if len(sizes) > 1:
        most = ", ".join(f"{count} of {width}x{height}" for (height, width), count in sizes.most_common(5))
        say(f"{len(sizes)} different image sizes ({most}); all are scaled and cropped to one when they are used")
    return fps, size


def read_headers(root: Path, names: Sequence[str]) -> tuple[dict[str, VideoInfo], list[str]]:
    """Returns the header of each video that can be read, and what is wrong with the others. Many headers are cached."""

    def header(name: str) -> VideoInfo:
        # A pipe would keep the command waiting forever.
        if (root / name).exists() and not (root / name).is_file():
            raise UserError(f"{root / name}: is no regular file; remove it")
        return probe(root / name)

    if len(names) < WORTH_CACHING:
        return scan_files(header, names)
    states = {}
    for name in names:
        with suppress(UserError):
            states[name] = file_state(root / name)
    kept = cached(
        "video-headers",
        list(states.values()),
        lambda: {name: astuple(info) for name, info in scan_files(header, list(states))[0].items()},
    )
    # Errors are not cached: a missing permission is no change of the file.
    retried, problems = scan_files(header, [name for name in names if name not in kept])
    headers = {name: VideoInfo(*values) for name, values in kept.items()} | retried
    return {name: headers[name] for name in names if name in headers}, problems


def quick_count(info: VideoInfo, fps: float) -> int | None:
    """Returns the number of frames at `fps` up to the middle of the last one, by the header; None if not known.

    As `resample` counts, but one more where a header declares a constant rate that the frames do not keep.
    """
    if not info.constant or info.num_frames is None:
        return None
    return max(1, ceil((info.num_frames - 0.5) / info.fps * fps - TIE * fps))


def count_frames(path: Path, info: VideoInfo, fps: float) -> int:
    """As `quick_count`, by the packets' times where the rate varies, and by decoding where nothing else helps.

    Raises UserError where there is no frame.
    """
    quick = quick_count(info, fps)
    if quick is not None:
        return quick
    times = [seconds for seconds, _ in ClipScan(path)] if info.constant else frame_times(path)
    number = sum(1 for _ in resample(in_time(((seconds, NO_FRAME) for seconds in times), str(path)), fps))
    if not number:
        raise UserError(f"{path}: no frame of it can be decoded; replace it or remove it")
    return number


def frames_at(path: Path, times: Sequence[float]) -> UInt8[np.ndarray, "T H W 3"]:
    """As `frames_in_order`, for times in any order, repeats allowed."""
    wanted = sorted(set(times))
    found = dict(zip(wanted, frames_in_order(path, wanted), strict=True))
    return np.stack([found[time] for time in times])


def frames_in_order(path: Path, times: Sequence[float]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yields the frame shown nearest to each time, in seconds from the first frame; times must not go backwards.

    Seeks the first time instead of decoding up to it. Raises UserError naming the file where it cannot be decoded, or
    ends more than a frame or two before a time.
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
                before, after = _seek(clip, time)
            while after is not None and _time(after) <= time:
                before, after = after, next_frame(clip)
            if after is None and time > _time(before) + _duration(before) + late:
                raise UserError(
                    f"{path}: ends at {_time(before) - first:.3f} s, before {seconds:.3f} s; it is damaged, replace it"
                )
            nearer = before if after is None or time < (_time(before) + _time(after)) / 2 - TIE else after
            yield clip.to_rgb(nearer)
    except (av.FFmpegError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); replace it or remove it") from None
    finally:
        # Forces the next reader to seek: the frames taken here are gone.
        clip.position = None


def next_frame(clip: OpenClip) -> VideoFrame | None:
    """Returns the next frame of an open video, or None at its end."""
    return next(clip.frames, None)


def _seek(clip: OpenClip, time: float) -> tuple[VideoFrame, VideoFrame | None]:
    """Returns the frame shown up to a time, or else the video's first, and the one that follows."""
    for earlier in (*EARLIER, time + 1):
        clip.seek(max(0.0, time - earlier))
        before = next_frame(clip)
        # Seeking may end too late: in an open GOP, or in a file without an index.
        if before is not None and (_time(before) <= time + TIE or earlier > time):
            return before, next_frame(clip)
    raise EOFError("no frame of it can be decoded there")


def _time(frame: VideoFrame) -> float:
    return float(frame.time or 0.0)


def _duration(frame: VideoFrame) -> float:
    return float((frame.duration or 0) * (frame.time_base or 0))
