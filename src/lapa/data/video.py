"""Video files, through PyAV: header, reading from end to end, single frames by their time, encoding with short GOPs.

    encode_clip(path, frames, fps=10.0)
    decode_clip(path, [7, 0, 7], fps=10.0)       # [3, H, W, 3]

A clip written here has a keyframe every second frame (g=2), so that a random frame costs one seek and at most two
decoded frames; `python benchmarks/bench_data.py` measures what that is worth. Files stay open for further frames.
Axes: T time, H W image, C channel, N frames of a file.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8

from lapa.errors import UserError
from lapa.files import atomic_path, is_in_store, is_remote, open_binary, reading, why_unreadable
from lapa.store_cache import version_of
from lapa.stores import is_of_store

# Codecs of covers, and of films that have no other video stream.
STILL_CODECS = ("mjpeg", "png", "bmp", "webp")
# Relative difference up to which a mean rate counts as a constant one.
VARIES = 0.01
# Frames by which the length of a whole file may differ from that of its frames at a constant rate.
STEADY = 0.02
# Containers kept open by each thread; opening one costs about as much as fetching a frame.
OPEN_CLIPS = 16
# Ratio of a pixel's width to its height, or the reverse, beyond which a file is taken to be damaged.
WIDEST_PIXEL = 8
# Bytes that must be free to open a file: where FFmpeg finds no memory while it decodes, it may end the process.
ROOM = 128 * 2**20
# Seconds before a frame from which it is decoded, tried in turn.
EARLIER = (0.0, 0.5, 5.0, 60.0)
# From version 17 on, PyAV starts threads for each converter, which takes longer than converting a frame; and a forked
# process that frees one would wait for threads that it does not have.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


@dataclass(frozen=True)
class VideoInfo:
    """The header of a video. num_frames is None where the format does not have it.

    width, height: in square pixels, as frames are read.
    constant: whether frames come at one rate; otherwise `fps` is the mean, and num_frames was counted.
    """

    width: int
    height: int
    fps: float
    num_frames: int | None
    codec: str
    pix_fmt: str
    constant: bool = True


def probe(path: Path) -> VideoInfo:
    """Reads a video's header. Raises UserError naming the file where it is not a video."""
    with open_video(path) as container:
        stream = film_of(container)
        fps, length = _rate(stream), _length(container, stream)
        num_frames = _counted(stream, length, fps)
        constant = not stream.base_rate or abs(fps / float(stream.base_rate) - 1) < VARIES
        if not constant or (num_frames is None and (stream.frames or length is not None)):
            times = _packet_times(container, stream, path)
            num_frames = len(times) or None
            if len(times) > 1 and times[-1] > times[0]:
                mean = (len(times) - 1) / (times[-1] - times[0])
                constant = constant and abs(mean / fps - 1) < VARIES
                fps = fps if constant else mean
            else:
                constant = True
        return VideoInfo(
            width=round(stream.width * _pixel_width(stream)),
            height=stream.height,
            fps=fps,
            num_frames=num_frames,
            codec=stream.codec_context.name.removeprefix("lib").replace("dav1d", "av1"),
            pix_fmt=stream.codec_context.pix_fmt or "unknown",
            constant=constant,
        )


def frame_times(path: Path) -> list[float]:
    """Reads the time of each frame, in seconds from the first, without decoding. Raises UserError as `probe`."""
    with open_video(path) as container:
        times = _packet_times(container, film_of(container), path)
        return [time - times[0] for time in times]


class ClipScan:
    """Reads a clip from its first frame to its last readable one.

    Iterate for `(seconds from the first frame, frame_HWC uint8 RGB)`, as `ToRgb` makes it.
    Damaged packets are skipped. After the iteration, `num_frames` is the number of frames that were read, and
    `num_lost` the number of those that the header promises beyond them.
    """

    def __init__(self, path: Path):
        self.path = path
        self.num_frames = 0
        self.num_lost = 0

    def __iter__(self) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
        self.num_frames, damaged = 0, 0
        with open_video(self.path) as container:
            stream = film_of(container)
            to_rgb = ToRgb(stream)
            stream.thread_type = "AUTO"
            length, rate, first, seconds = _length(container, stream), _rate(stream), None, 0.0
            for frame in _sound_frames(container, stream):
                if frame is None:
                    damaged += 1
                    continue
                seconds = self.num_frames / rate if frame.time is None else frame.time
                first = seconds if first is None else first
                self.num_frames += 1
                yield seconds - first, to_rgb(frame)
            counted = stream.frames
            expected = _counted(stream, length, rate) if counted else None
            if length and stream.start_time and stream.time_base:
                length -= float(stream.start_time * stream.time_base)
        if counted and expected is None:
            with suppress(UserError):
                expected = len(frame_times(self.path))
        if expected is not None:
            missing = expected - self.num_frames
        elif length and self.num_frames > 1 and first is not None and seconds > first:
            # The missing seconds, as frames as far apart as those that were read.
            missing = round((length - (seconds - first)) / (seconds - first) * (self.num_frames - 1)) - 1
        else:
            missing = 0
        # Where only the duration is known, the count derived from it may be one too high.
        self.num_lost = max(missing, damaged) if damaged or missing > 1 else 0


def count_frames(path: Path) -> tuple[int, int]:
    """Decodes a video from its first frame to its last; returns the numbers of whole and of damaged ones."""
    whole = damaged = 0
    with open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in _sound_frames(container, stream):
            sound = frame is not None and not frame.is_corrupt
            whole, damaged = whole + sound, damaged + (not sound)
    return whole, damaged


def encode_clip(
    path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float, keyframe_interval: int = 2
) -> int:
    """Writes frames as an H.264 mp4, atomically; returns their number. Height and width must be even.

    Raises UserError where there is no frame or a shape is wrong; OSError (disk full) leaves nothing behind.
    """
    rate = exact_rate(fps)
    # B-frames would make a frame wait for its successor; CRF 18 is visually lossless; `fastdecode` (no arithmetic
    # coding, no deblocking) nearly doubles the speed of random access at the same size and PSNR. Without `mbtree`,
    # whose AVX-512 code errs now and then, the same frames always give the same bytes.
    options = {
        "crf": "18",
        "preset": "veryfast",
        "tune": "fastdecode",
        "g": str(keyframe_interval),
        "bf": "0",
        "mbtree": "0",
    }
    num_frames = 0
    with atomic_path(Path(path)) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt, stream.thread_count, stream.time_base = "yuv420p", 1, 1 / rate
        for frame_HWC in frames:
            if num_frames == 0:
                stream.height, stream.width = _even_shape(frame_HWC, path)
            elif frame_HWC.shape[:2] != (stream.height, stream.width):
                raise UserError(f"{path}: frame {num_frames} has another size than the first; scale all to one size")
            image = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            image.pts, image.time_base = num_frames, 1 / rate
            container.mux(stream.encode(image))
            num_frames += 1
        if num_frames == 0:
            raise UserError(f"{path}: there is no frame to write; an episode needs at least one")
        container.mux(stream.encode(None))
    return num_frames


def decode_clip(path: Path, indices: Sequence[int], fps: float, start: float = 0.0) -> UInt8[np.ndarray, "T H W 3"]:
    """Reads frames by position: number i is the one shown at `start + i / fps` seconds of the file.

    indices: in any order, repeats allowed. Several episodes may share a file; each has its own `start`.
    Raises UserError naming the file where it cannot be read or ends before a frame that is asked for.
    """
    times = {index: start + index / fps for index in set(indices)}
    found = decode_times(path, times, tolerance=0.5 / fps)
    return np.stack([found[index] for index in indices])


def decode_times(path: Path, times: Mapping[int, float], tolerance: float) -> dict[int, UInt8[np.ndarray, "H W 3"]]:
    """Reads the frame within `tolerance` of each time, in the file's own seconds. Raises UserError as `decode_clip`.

    times: by any number of the frame, which is that of the result and of the error.
    """
    clip = open_clip(path)
    wanted = sorted(times, key=lambda number: times[number])
    found: dict[int, np.ndarray] = {}
    try:
        for number in wanted:
            frame = clip.frame_at(times[number], tolerance)
            if frame is not None:
                found[number] = clip.to_rgb(frame)
    except (av.FFmpegError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be decoded ({error}); write the dataset again") from None
    missing = next((number for number in wanted if number not in found), None)
    if missing is not None:
        raise UserError(
            f"{path}: has no frame {missing} (at {times[missing]:.3f} s); "
            "the video is shorter than the dataset's metadata, write the dataset again"
        )
    return found


def film_times(path: Path, fps: float) -> Float[np.ndarray, "N"]:
    """Returns when each frame of a file is shown, in order and in the file's own seconds.

    By the header, where that has a constant rate of `fps`. Raises UserError as `probe`.
    """
    clip = open_clip(path)
    stream = clip.stream
    length, first = stream.duration, stream.start_time
    if stream.frames and length and first is not None and stream.time_base and stream.base_rate:
        drift = abs(float(length * stream.time_base) * fps - stream.frames)
        if drift < STEADY and abs(float(stream.base_rate) / fps - 1) < VARIES:
            return float(first * stream.time_base) + np.arange(stream.frames) / fps
    times_N = np.array(clip.packet_times())
    if not len(times_N):
        raise UserError(f"{path}: has no frame; replace it or take it out")
    return times_N


def open_video(path: Path) -> InputContainer:
    """Opens a file. Raises UserError naming it where it is not a video, or one that PyAV cannot decode.

    Raises MemoryError where less than ROOM bytes are free, as under `ulimit -v`.
    """
    try:
        mmap.mmap(-1, ROOM).close()
    except OSError as error:
        raise MemoryError(f"{path}: {error.strerror}") from None
    file = None
    try:
        with reading(path):
            file = open_binary(path) if is_remote(path) else None
        container = av.open(file or str(path), "r", metadata_errors="ignore")
    except Exception as error:
        if file is not None:
            file.close()
        if not isinstance(error, av.FFmpegError) and not is_of_store(error):
            raise
        reason = why_unreadable(path) or getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise UserError(f"{path}: not a readable video ({reason}); replace it or take it out") from None
    problem = _film_flaw(container)
    if problem:
        container.close()
        raise UserError(f"{path}: {problem}; replace it or take it out")
    return container


def film_of(container: InputContainer) -> VideoStream:
    """Returns the video stream of an opened file that is its film, not the still of its cover."""
    films = _films(container)
    best = container.streams.best("video")
    return next((film for film in films if best is not None and film.index == best.index), films[0])


class OpenClip:
    """A container that stays open for random access.

    frames: those from the last seek on. moved: whether there was one.
    """

    frames: Iterator[VideoFrame]
    moved: bool

    def __init__(self, path: Path):
        self.path = path
        self._open()
        self.start: float | None = None

    def packet_times(self) -> list[float]:
        """Returns when each frame is shown, in order, without decoding. Raises UserError as `probe`."""
        if self.moved:
            self.container.close()
            self._open()
        self.moved = True
        return _packet_times(self.container, self.stream, self.path)

    def first_time(self) -> float:
        """Returns the time of the first frame, in the file's own seconds. Raises EOFError where there is none."""
        if self.start is None:
            self.seek(0.0)
            first = next(self.frames, None)
            if first is None:
                raise EOFError("it has no frame")
            self.start = float(first.time or 0.0)
        return self.start

    def seek(self, time: float, tolerance: float = 0.0) -> None:
        """Sets `frames` to begin at the last keyframe up to `time`, or at the beginning of files without seeking."""
        assert self.stream.time_base is not None
        # A quarter of a frame later: seeking rounds down, and the frame itself may be a keyframe.
        offset = int((time + tolerance / 2) / self.stream.time_base)
        try:
            self.container.seek(offset, stream=self.stream)
        except av.FFmpegError:
            self.container.close()
            self._open()
        self.moved, self.frames = True, self.container.decode(self.stream)

    def frame_at(self, time: float, tolerance: float) -> VideoFrame | None:
        """Returns the frame within `tolerance` seconds of `time`, None where there is none."""
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
        self.stream = film_of(self.container)
        self.moved = False
        self.position: float | None = None
        self.frames = iter(())
        self.to_rgb = ToRgb(self.stream)
        # Threads that work on several frames at once would have to start again after every seek.
        self.stream.thread_type, self.stream.thread_count = "SLICE", 1

    def _decode_to(self, time: float, tolerance: float) -> VideoFrame | None:
        """Returns the frame at `time`, or None: then `position` is past it, or None at the end of the file."""
        for frame in self.frames:
            self.position = float(frame.time or 0.0)
            if self.position > time - tolerance:
                return frame if self.position < time + tolerance else None
        self.position = None
        return None


def open_clip(path: Path) -> OpenClip:
    """Returns the clip, opened or still open in this thread. Raises UserError where it is not a video."""
    clips = _open_clips.of_this_process()
    with reading(path, "write or download the dataset again"):
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


def _version(path: Any) -> tuple[Any, ...]:
    """Returns what distinguishes a file from one that replaced it under the same name; a part of a file has its own."""
    if is_in_store(path):
        return version_of(path)
    if is_remote(path):
        return tuple(path.version())
    status = path.stat()
    return status.st_mtime_ns, status.st_ino or status.st_size


class ToRgb:
    """Converts decoded frames of a stream to RGB: rotated by the display matrix (phones record sideways), and scaled in
    width to square pixels.

    One for all frames of a clip: setting up a new one takes longer than decoding a frame.
    """

    def __init__(self, stream: VideoStream):
        self._pixel_width = _pixel_width(stream)
        self._converter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
        width = round(frame.width * self._pixel_width)
        frame_HWC = self._converter.reformat(frame, width=width, format="rgb24", **ONE_THREAD).to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(frame_HWC, turns)) if turns else frame_HWC


def exact_rate(fps: float) -> Fraction:
    """Frames per second as an exact fraction: 29.97 is 30000/1001.

    Frames are read at `number / fps`, so a rate that is merely near such a one must not be rounded to it: 14.99 as
    15000/1001 would be a frame off after two minutes.
    """
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(float(ntsc) - fps) < 1e-4 and fps % 1 else Fraction(fps).limit_denominator(10_000)


class _OpenClips(threading.local):
    """The containers this thread holds open, the least recently used one first.

    A forked worker must not share file positions with its parent, hence the process id; nor may it close what it
    inherited, since that would wait for the parent's threads: `inherited` keeps it alive unused.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.clips: OrderedDict[Path, tuple[object, OpenClip]] = OrderedDict()
        self.inherited: OrderedDict[Path, tuple[object, OpenClip]] | None = None

    def of_this_process(self) -> OrderedDict[Path, tuple[object, OpenClip]]:
        if self.process != os.getpid():
            self.inherited, self.clips, self.process = self.clips, OrderedDict(), os.getpid()
        return self.clips


_open_clips = _OpenClips()


def _films(container: InputContainer) -> list[VideoStream]:
    """Returns the video streams that are no covers, and no stills where there are others."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    return [stream for stream in streams if not _is_still(stream)] or streams


def _is_still(stream: VideoStream) -> bool:
    return stream.frames == 1 or (stream.codec_context is not None and stream.codec_context.name in STILL_CODECS)


def _film_flaw(container: InputContainer) -> str:
    """Returns what is wrong with the video stream of a file, \"\" where nothing is."""
    if not container.streams.video:
        return "has no video stream"
    if not _films(container):
        return "has no video stream but the still of a cover"
    film = film_of(container)
    if film.codec_context is None:
        return "is encoded with a codec that cannot be read"
    wide = _pixel_width(film)
    if not 1 / WIDEST_PIXEL <= wide <= WIDEST_PIXEL:
        return f"declares pixels {float(wide):g} times as wide as high"
    return ""


def _pixel_width(stream: VideoStream) -> Fraction:
    """Returns the ratio of width to height of a stream's pixels; 1 where it is not declared."""
    return stream.sample_aspect_ratio or Fraction(1)


def _sound_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """Yields the frames that can be decoded, and None for each packet that cannot."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            yield None
            return
        if packet.is_corrupt:
            yield None
            continue
        try:
            yield from stream.decode(packet)
        except av.FFmpegError:
            yield None


def _length(container: InputContainer, stream: VideoStream) -> float | None:
    """Returns the length in seconds, by the header; None where it is not known."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # A container's duration is that of its longest stream, which may be the sound.
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _counted(stream: VideoStream, length: float | None, fps: float) -> int | None:
    """Returns the number of frames by the header, where that is also what the length gives; None otherwise.

    The header of a fragmented file counts the first fragment alone, that of a file that was cut without encoding it
    again also what an edit list leaves out.
    """
    if stream.frames:
        agrees = length is None or abs(length * fps - stream.frames) < 0.5 + VARIES * stream.frames
        return stream.frames if agrees else None
    # Some containers count the time before the first frame as part of the length.
    return None if length is None or stream.start_time else round(length * fps)


def _packet_times(container: InputContainer, stream: VideoStream, path: Path) -> list[float]:
    assert stream.time_base is not None
    try:
        packets = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    except av.FFmpegError as error:
        raise UserError(f"{path}: cannot be read to its end ({error}); replace it or take it out") from None
    return sorted(float(time * stream.time_base) for time in packets if time is not None)


def _rate(stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0


def _even_shape(frame_HWC: np.ndarray, path: Path) -> tuple[int, int]:
    if frame_HWC.ndim != 3 or frame_HWC.shape[2] != 3 or frame_HWC.dtype != np.uint8:
        raise UserError(f"{path}: frames must be uint8 (H, W, 3), got {frame_HWC.dtype} {frame_HWC.shape}")
    height, width = frame_HWC.shape[:2]
    if height % 2 or width % 2:
        raise UserError(f"{path}: frames are {width}x{height}; H.264 needs an even width and height")
    return height, width
