"""Video files in and out, through PyAV: what a header says, reading from end to end, encoding with short GOPs, copying.

A clip written here has a keyframe every second frame (g=2), so that a random frame (lapa.data.random_access) costs one
seek and at most two decoded pictures; `python benchmarks/bench_data.py` measures what that is worth.
Axes: T time, H W image, C channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from lapa.errors import UserError
from lapa.files import atomic_path, is_remote, open_binary, reading, what_instead

# The part by which a mean rate may differ from the rate of a constant one.
VARIES = 0.01
# Codecs that an mp4 holds and that players and LeRobot decode.
MP4_CODECS = ("h264", "hevc", "av1", "vp9")


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says. num_frames is None where the format does not tell.

    constant: whether frames come at one rate; where they do not, `fps` is the mean, and num_frames was counted.
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
        stream = container.streams.video[0]
        fps, num_frames = _rate(stream), _expected_frames(container, stream)
        constant = not stream.base_rate or abs(fps / float(stream.base_rate) - 1) < VARIES
        if not constant:
            times = _packet_times(container, stream, path)
            constant = len(times) < 2
            num_frames, fps = len(times) or None, fps if constant else (len(times) - 1) / (times[-1] - times[0])
        return VideoInfo(
            width=stream.width,
            height=stream.height,
            fps=fps,
            num_frames=num_frames,
            codec=stream.codec_context.name.removeprefix("lib").replace("dav1d", "av1"),
            pix_fmt=stream.codec_context.pix_fmt or "unknown",
            constant=constant,
        )


def frame_times(path: Path) -> list[float]:
    """When each frame is shown, in seconds from the first, without decoding any. UserError where it is no video."""
    with open_video(path) as container:
        times = _packet_times(container, container.streams.video[0], path)
        return [time - times[0] for time in times]


class ClipScan:
    """Reads a clip from its first frame to its last readable one.

    Iterate for `(seconds from the first frame, frame_HWC uint8 RGB)`, upright where the file carries a rotation.
    Damaged packets are passed over. After the iteration, `num_frames` tells what came and `num_lost` what the
    header had promised beyond that.
    """

    def __init__(self, path: Path):
        self.path = path
        self.num_frames = 0
        self.num_lost = 0

    def __iter__(self) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
        self.num_frames, damaged, converter = 0, 0, VideoReformatter()
        with open_video(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            length, rate, first, seconds = _length(container, stream), _rate(stream), None, 0.0
            for frame in _sound_frames(container, stream):
                if frame is None:
                    damaged += 1
                    continue
                seconds = self.num_frames / rate if frame.time is None else frame.time
                first = seconds if first is None else first
                self.num_frames += 1
                yield seconds - first, upright(frame, converter)
            expected = stream.frames
        if expected:
            missing = expected - self.num_frames
        elif length and self.num_frames > 1 and first is not None and seconds > first:
            # Told in frames as far apart as those that came.
            missing = round((length - (seconds - first)) / (seconds - first) * (self.num_frames - 1)) - 1
        else:
            missing = 0
        # Where only the duration is known, the count derived from it may be one too high.
        self.num_lost = max(missing, damaged) if damaged or missing > 1 else 0


def encode_clip(
    path: Path, frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float, keyframe_interval: int = 2
) -> int:
    """Writes frames as an H.264 mp4, atomically; returns their number. Height and width must be even.

    Raises UserError where no frame comes or a shape is wrong; OSError (disk full) leaves nothing behind.
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
                raise UserError(f"{path}: frame {num_frames} has another size than the first")
            picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            picture.pts, picture.time_base = num_frames, 1 / rate
            container.mux(stream.encode(picture))
            num_frames += 1
        if num_frames == 0:
            raise UserError(f"{path}: there is no frame to write; an episode needs at least one")
        container.mux(stream.encode(None))
    return num_frames


def copy_stream(source: Path, target: Path, fps: float) -> int:
    """Copies the video stream of `source`, whose rate must be constant, into an mp4 without re-encoding.

    Frame i of the copy is at exactly `i / fps` seconds, wherever `source` began and however its times were rounded.
    Returns the number of frames. Raises UserError where frames lack times or share one.
    """
    with open_video(source) as reading:
        packet_times = [packet.pts for packet in reading.demux(reading.streams.video[0]) if packet.size]
    times = [time for time in packet_times if time is not None]
    if len(set(times)) != len(packet_times):
        raise UserError(f"{source}: has frames without times of their own")
    # In the order of decoding, which packets are stored in, the place of each in the order of showing.
    shown = np.argsort(np.argsort(times)).tolist()
    # A frame is decoded no later than shown: B-frames, stored after the frame that follows them, move decoding forward.
    delay = max(place - when for place, when in enumerate(shown)) if shown else 0
    rate = exact_rate(fps)
    with (
        open_video(source) as reading,
        atomic_path(Path(target)) as temporary,
        av.open(str(temporary), "w", format="mp4") as writing,
    ):
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        copy.time_base = 1 / rate
        packets = (packet for packet in reading.demux(stream) if packet.size)
        for place, (packet, when) in enumerate(zip(packets, shown, strict=True)):
            packet.stream, packet.time_base = copy, 1 / rate
            packet.pts, packet.dts, packet.duration = when, place - delay, 1
            writing.mux(packet)
    return len(shown)


def open_video(path: Path) -> InputContainer:
    """The file, opened; UserError naming it where it holds no video."""
    try:
        with reading(path):
            source = open_binary(path) if is_remote(path) else str(path)
        container = av.open(source, "r", metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        reason = what_instead(path) or error.strerror or str(error) or type(error).__name__
        raise UserError(f"{path}: not a readable video ({reason}); replace it or take it out") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{path}: holds no video stream; replace it or take it out")
    return container


def upright(frame: VideoFrame, converter: VideoReformatter) -> UInt8[np.ndarray, "H W 3"]:
    """A decoded picture as RGB, turned as the file's display matrix says (phones film sideways).

    converter: kept for all frames of a clip; setting up a new one takes longer than decoding a frame.
    """
    frame_HWC = converter.reformat(frame, format="rgb24").to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame_HWC, turns)) if turns else frame_HWC


def exact_rate(fps: float) -> Fraction:
    """Frames per second as the fraction that is meant: 29.97 is 30000/1001.

    Frames are looked for at `number / fps`, so what is merely near such a rate must not be taken for it: 14.99 for
    15000/1001 would be a frame off after two minutes.
    """
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    return ntsc if abs(float(ntsc) - fps) < 1e-4 and fps % 1 else Fraction(fps).limit_denominator(10_000)


def _sound_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """The frames that can be decoded, and None for each packet that cannot."""
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


def _expected_frames(container: InputContainer, stream: VideoStream) -> int | None:
    if stream.frames:
        return stream.frames
    length = _length(container, stream)
    return None if length is None else round(length * _rate(stream))


def _length(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds, as the header says."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # A container's duration is that of its longest stream, which may be the sound.
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


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
