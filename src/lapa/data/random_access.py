"""Single frames of videos by their time, from files that stay open.

    decode_clip(path, [7, 0, 7], fps=10.0)       # [3, H, W, 3]

Axes: T time, H W image, C channel.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8

from lapa.data.video import open_video, upright
from lapa.errors import UserError
from lapa.files import reading

# Containers kept open by each thread; opening one costs about as much as fetching a frame.
OPEN_CLIPS = 16
# Seconds before a frame from which it is decoded, tried in turn.
EARLIER = (0.0, 0.5, 5.0, 60.0)


def decode_clip(path: Path, indices: Sequence[int], fps: float, start: float = 0.0) -> UInt8[np.ndarray, "T H W 3"]:
    """Fetches frames by position: number i is the one shown at `start + i / fps` seconds of the file.

    indices: in any order, repeats allowed. Several episodes may share a file; each has its own `start`.
    Raises UserError naming the file where it cannot be read or ends before a frame asked for.
    """
    clip = open_clip(path)
    wanted = sorted(set(indices))
    found: dict[int, np.ndarray] = {}
    try:
        for index, frame in clip.at([start + index / fps for index in wanted], tolerance=0.5 / fps):
            found[wanted[index]] = upright(frame, clip.converter)
    except (av.FFmpegError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); write the dataset again") from None
    missing = [index for index in wanted if index not in found]
    if missing:
        raise UserError(
            f"{path}: has no frame {missing[0]} ({start + missing[0] / fps:.3f} s at {fps:g} fps); "
            "the video is shorter than the dataset says, write the dataset again"
        )
    return np.stack([found[index] for index in indices])


class OpenClip:
    """A container that stays open for random access."""

    def __init__(self, path: Path):
        self.path = path
        self._open()
        self.converter = VideoReformatter()
        self.position: float | None = None
        self.frames: Iterator[VideoFrame] = iter(())
        self.start: float | None = None

    def first_time(self) -> float:
        """When the first frame is shown, in the file's own seconds."""
        if self.start is None:
            self.seek(0.0)
            self.start = float(next(self.frames).time or 0.0)
        return self.start

    def seek(self, time: float, tolerance: float = 0.0) -> None:
        """`frames` goes on at the last keyframe up to `time`, or from the beginning of files that cannot be sought."""
        assert self.stream.time_base is not None
        # A quarter of a frame later: seeking rounds down, and the frame itself may be a keyframe.
        offset = int((time + tolerance / 2) / self.stream.time_base)
        try:
            self.container.seek(offset, stream=self.stream)
        except av.FFmpegError:
            self.container.close()
            self._open()
        self.frames = self.container.decode(self.stream)

    def at(self, times: Sequence[float], tolerance: float) -> Iterator[tuple[int, VideoFrame]]:
        """Yields (number in `times`, frame) for every time that has a frame within `tolerance` seconds."""
        for number, time in enumerate(times):
            frame = self._frame_at(time, tolerance)
            if frame is not None:
                yield number, frame

    def _frame_at(self, time: float, tolerance: float) -> VideoFrame | None:
        # Just ahead, decoding on is cheaper than a seek.
        if self.position is not None and self.position < time < self.position + 5 * tolerance:
            return self._decode_to(time, tolerance)
        # In an open GOP, the frames shown just before a keyframe need the keyframe before it.
        for seconds_before in EARLIER:
            self.seek(max(0.0, time - seconds_before), tolerance)
            frame = self._decode_to(time, tolerance)
            if frame is not None or self.position is None:
                return frame
        return None

    def _open(self) -> None:
        self.container = open_video(self.path)
        self.stream = self.container.streams.video[0]
        # Threads that work on several frames at once would have to be filled anew after every seek.
        self.stream.thread_type, self.stream.thread_count = "SLICE", 1

    def _decode_to(self, time: float, tolerance: float) -> VideoFrame | None:
        """The frame at `time`; None where there is none, with `position` past it, or None at the end of the file."""
        for frame in self.frames:
            self.position = float(frame.time or 0.0)
            if self.position > time - tolerance:
                return frame if self.position < time + tolerance else None
        self.position = None
        return None


class _OpenClips(threading.local):
    """The containers this thread holds open, the least recently used one first.

    A forked worker must not share file positions with its parent, hence the process id; nor may it close what it
    inherited, since that would wait for the parent's threads: `inherited` keeps it alive unused.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.clips: OrderedDict[Path, tuple[tuple[int, int], OpenClip]] = OrderedDict()
        self.inherited: OrderedDict[Path, tuple[tuple[int, int], OpenClip]] | None = None

    def of_this_process(self) -> OrderedDict[Path, tuple[tuple[int, int], OpenClip]]:
        if self.process != os.getpid():
            self.inherited, self.clips, self.process = self.clips, OrderedDict(), os.getpid()
        return self.clips


_open_clips = _OpenClips()


def open_clip(path: Path) -> OpenClip:
    """The clip, opened for random access, or as this thread has left it open. UserError where it is no video."""
    clips = _open_clips.of_this_process()
    version = _version(path)
    if path in clips and clips[path][0] == version:
        clips.move_to_end(path)
        return clips[path][1]
    clips[path] = version, OpenClip(path)
    clips.move_to_end(path)
    while len(clips) > OPEN_CLIPS:
        _, (_, oldest) = clips.popitem(last=False)
        oldest.container.close()
    return clips[path][1]


def _version(path: Path) -> tuple[int, int]:
    """Tells a file from the one that replaced it under the same name."""
    with reading(path, "write or download the dataset again"):
        status = path.stat()
    return status.st_mtime_ns, status.st_ino or status.st_size
