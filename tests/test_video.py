"""Video files: what is written comes back, single frames equal a whole reading, damage is found and counted."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from lapa.data import video
from lapa.data.films import episode_frames
from lapa.data.transforms import augment, resize_and_crop
from lapa.data.video import ClipScan, decode_clip, decode_times, encode_clip, exact_rate, film_times, probe
from lapa.errors import UserError
from lapa.sources.synthetic import moving_squares


def numbered_frames(num: int, size: int = 32) -> np.ndarray:
    """Grey images, each a little lighter than the one before."""
    return np.stack([np.full((size, size, 3), 20 + 5 * number, np.uint8) for number in range(num)])


def test_single_frames_are_the_frames_of_a_whole_reading(tmp_path: Path) -> None:
    frames_THWC = numbered_frames(21)
    assert encode_clip(tmp_path / "a.mp4", frames_THWC, 30.0) == 21
    scanned = np.stack([frame for _, frame in ClipScan(tmp_path / "a.mp4")])
    assert np.abs(scanned.astype(int) - frames_THWC).max() <= 4
    for index in np.random.default_rng(0).permutation(21):
        assert (decode_clip(tmp_path / "a.mp4", [index], 30.0)[0] == scanned[index]).all()
    backwards = decode_clip(tmp_path / "a.mp4", [20, 3, 3, 0], 30.0)
    assert (backwards == scanned[[20, 3, 3, 0]]).all()


def test_the_same_frames_give_the_same_bytes_under_load(tmp_path: Path) -> None:
    """20 is no multiple of 64, nor of a macroblock: x264's `mbtree` gives other bytes there now and then."""
    frames_THWC = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)

    def encoded(number: int) -> bytes:
        # Freed memory that holds something else each time.
        rng = np.random.default_rng(number)
        del [rng.bytes(600 + 64 * more) for more in range(4)][:]
        path = tmp_path / f"{number}.mp4"
        encode_clip(path, frames_THWC, 10.0)
        return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(encoded, range(100)))) == 1


@pytest.mark.parametrize("fps", [5.0, 24.0, 29.97, 12.5])
def test_rates_survive(tmp_path: Path, fps: float) -> None:
    encode_clip(tmp_path / "a.mp4", numbered_frames(9), fps)
    info = probe(tmp_path / "a.mp4")
    assert info.fps == pytest.approx(fps, abs=1e-3)
    assert (info.width, info.height, info.num_frames, info.codec) == (32, 32, 9, "h264")
    assert decode_clip(tmp_path / "a.mp4", range(9), info.fps).shape == (9, 32, 32, 3)


def test_ntsc_rates_are_exact() -> None:
    assert str(exact_rate(29.97)) == "30000/1001"
    assert str(exact_rate(30.0)) == "30"
    assert str(exact_rate(12.5)) == "25/2"


@pytest.mark.parametrize("fps", [14.99, 23.98, 29.973, 7.0004])
def test_a_frame_of_a_long_video_at_an_odd_rate_is_found_at_its_time(fps: float) -> None:
    assert abs(20_000 / exact_rate(fps) - 20_000 / fps) < 0.1 / fps


def test_a_part_of_a_shared_file_is_read_from_its_start(tmp_path: Path) -> None:
    encode_clip(tmp_path / "a.mp4", numbered_frames(20), 10.0)
    whole = decode_clip(tmp_path / "a.mp4", range(20), 10.0)
    assert (decode_clip(tmp_path / "a.mp4", range(5), 10.0, start=1.2) == whole[12:17]).all()


def test_a_frame_past_the_end_is_an_error(tmp_path: Path) -> None:
    encode_clip(tmp_path / "a.mp4", numbered_frames(4), 10.0)
    with pytest.raises(ValueError, match=r"a\.mp4: has no frame 4"):
        decode_clip(tmp_path / "a.mp4", [1, 4], 10.0)


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    encode_clip(tmp_path / "a.mp4", numbered_frames(4), 10.0)
    dark = decode_clip(tmp_path / "a.mp4", [0], 10.0)
    encode_clip(tmp_path / "a.mp4", numbered_frames(30)[20:], 10.0)
    assert decode_clip(tmp_path / "a.mp4", [0], 10.0).mean() > dark.mean() + 50


def test_only_a_few_containers_stay_open(tmp_path: Path) -> None:
    for number in range(video.OPEN_CLIPS + 3):
        encode_clip(tmp_path / f"{number}.mp4", numbered_frames(2), 10.0)
        decode_clip(tmp_path / f"{number}.mp4", [1], 10.0)
    assert len(video._open_clips.clips) == video.OPEN_CLIPS


def test_a_forked_process_reads_beside_its_parent(tmp_path: Path) -> None:
    encode_clip(tmp_path / "a.mp4", numbered_frames(12), 10.0)
    whole = decode_clip(tmp_path / "a.mp4", range(12), 10.0)
    receiver, sender = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_send_frames, args=(sender, tmp_path / "a.mp4"))
    child.start()
    mine = decode_clip(tmp_path / "a.mp4", [7, 2], 10.0)
    assert receiver.poll(30)
    theirs = receiver.recv()
    child.join()
    assert (mine == whole[[7, 2]]).all()
    assert (theirs == whole[[5, 11]]).all()


def _send_frames(sender: multiprocessing.connection.Connection, path: Path) -> None:
    sender.send(decode_clip(path, [5, 11], 10.0))


def test_what_is_not_a_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video"):
        probe(tmp_path / "a.mp4")


def write_film(path: Path, cover: Disposition | None = None, pixel: Fraction | None = None) -> Path:
    """12 images of 64x48, a white square of 16x16 pixels on grey; before them a white cover of one image."""
    frames_THWC = np.full((12, 48, 64, 3), 90, np.uint8)
    frames_THWC[:, 16:32, 24:40] = 255
    with av.open(str(path), "w") as container:
        streams = []
        for codec, rate, images in (("mjpeg", 1, frames_THWC[:1, :16, :16] * 0 + 255), ("libx264", 10, frames_THWC)):
            if codec == "mjpeg" and cover is None:
                continue
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = images.shape[1:3]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if codec == "mjpeg":
                stream.disposition = cover.value
            elif pixel:
                stream.codec_context.sample_aspect_ratio = pixel
            streams.append((stream, images))
        for stream, images in streams:
            for number, frame_HWC in enumerate(images):
                frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("cover", [Disposition.attached_pic, Disposition.default])
def test_the_still_of_a_cover_is_not_the_video(tmp_path: Path, suffix: str, cover: Disposition) -> None:
    path = write_film(tmp_path / f"a.{suffix}", cover)
    info = probe(path)
    assert (info.width, info.height, info.fps, info.codec) == (64, 48, 10.0, "h264")
    assert [frame.shape for _, frame in ClipScan(path)] == [(48, 64, 3)] * 12
    assert decode_clip(path, [7], 10.0).mean() < 120


@pytest.mark.parametrize(("pixel", "width"), [(Fraction(4, 3), 85), (Fraction(1, 2), 32), (Fraction(1), 64)])
def test_frames_have_square_pixels(tmp_path: Path, pixel: Fraction, width: int) -> None:
    path = write_film(tmp_path / "a.mp4", pixel=pixel)
    assert (probe(path).width, probe(path).height) == (width, 48)
    for frame_HWC in (next(iter(ClipScan(path)))[1], decode_clip(path, [3], 10.0)[0]):
        assert frame_HWC.shape == (48, width, 3)
        # The square of the stored image is as wide as its pixels say.
        assert abs((frame_HWC[24, :, 0] > 170).sum() - 16 * pixel) <= 2
        assert abs((frame_HWC[:, width // 2, 0] > 170).sum() - 16) <= 2
    with pytest.raises(UserError, match=r"b\.mp4: declares pixels 20 times as wide as high"):
        probe(write_film(tmp_path / "b.mp4", pixel=Fraction(20)))


def test_a_codec_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for frame in numbered_frames(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    (tmp_path / "a.avi").write_bytes((tmp_path / "a.avi").read_bytes().replace(b"FMP4", b"WHAT"))
    for read in (probe, lambda path: list(ClipScan(path)), lambda path: decode_clip(path, [0], 10.0)):
        with pytest.raises(UserError, match=r"a\.avi: is encoded with a codec that cannot be read"):
            read(tmp_path / "a.avi")


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from lapa.data import video
path = Path(sys.argv[1])
video.probe(path)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + video.ROOM // 2, used + video.ROOM // 2))
try:
    video.probe(path)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space, and reads /proc")
def test_a_video_is_not_opened_where_decoding_could_end_the_process(tmp_path: Path) -> None:
    encode_clip(tmp_path / "a.mp4", numbered_frames(3), 10)
    ran = subprocess.run([sys.executable, "-c", LITTLE_MEMORY, tmp_path / "a.mp4"], capture_output=True, text=True)
    assert ran.stdout == f"{tmp_path / 'a.mp4'}: Cannot allocate memory\n", ran.stderr


def test_a_truncated_video_gives_its_readable_part(tmp_path: Path) -> None:
    truncated = write_truncated(tmp_path / "a.mkv")
    scan = ClipScan(truncated)
    frames = [frame for _, frame in scan]
    assert 10 < len(frames) == scan.num_frames < 60
    assert abs(scan.num_lost + scan.num_frames - 60) <= 2


def write_truncated(path: Path, num_frames: int = 60) -> Path:
    """A video whose header promises `num_frames` and whose second half is gone."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(num_frames):
            noise = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def test_a_failed_encoding_leaves_nothing(tmp_path: Path) -> None:
    def breaks():
        yield from numbered_frames(3)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        encode_clip(tmp_path / "a.mp4", breaks(), 10.0)
    with pytest.raises(ValueError, match="no frame to write"):
        encode_clip(tmp_path / "a.mp4", [], 10.0)
    with pytest.raises(ValueError, match="even width"):
        encode_clip(tmp_path / "a.mp4", np.zeros((2, 33, 32, 3), np.uint8), 10.0)
    assert list(tmp_path.iterdir()) == []


def write_with_b_frames(path: Path, codec: str, options: dict[str, str]) -> None:
    """40 frames of an image that moves."""
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=exact_rate(29.97), options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(40):
            moved = np.roll(image, 2 * number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode(None))


def test_frames_before_the_keyframe_of_an_open_gop_are_found(tmp_path: Path) -> None:
    """A decoder that begins at an HEVC keyframe leaves out what is shown before it."""
    if "libx265" not in av.codecs_available:
        pytest.skip("this build of FFmpeg does not write HEVC")
    options = {"x265-params": "log-level=none:keyint=12:bframes=3:open-gop=1"}
    write_with_b_frames(tmp_path / "a.mp4", "libx265", options)
    scanned = [frame for _, frame in ClipScan(tmp_path / "a.mp4")]
    for index in np.random.default_rng(0).permutation(40):
        assert (decode_clip(tmp_path / "a.mp4", [index], 29.97)[0] == scanned[index]).all()


def test_resize_and_crop_takes_the_centre() -> None:
    wide = np.zeros((1, 40, 80, 3), np.uint8)
    wide[:, :, 20:60] = 200
    assert np.abs(resize_and_crop(wide, 20)[:, :, 2:-2].astype(int) - 200).max() <= 2
    assert resize_and_crop(wide.transpose(0, 2, 1, 3), 64).shape == (1, 64, 64, 3)
    square = wide[:, :, 20:60]
    assert resize_and_crop(square, 40) is square


def test_augmentation_depends_on_its_generator_only() -> None:
    image = np.ascontiguousarray(moving_squares(1)[0][0, 0].transpose(1, 2, 0))
    once, again, other = (augment(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (once == again).all()
    assert (once != other).any()
    assert once.shape == image.shape
    assert once.dtype == np.uint8


def placed(times, starts, lengths, ends=None, fps=10.0):
    starts = np.asarray(starts, float)
    lengths = np.asarray(lengths)
    ends = starts + lengths / fps if ends is None else np.asarray(ends, float)
    firsts, flaws = episode_frames(np.asarray(times, float), starts, ends, lengths, fps)
    return [flaw or int(first) for first, flaw in zip(firsts, flaws, strict=True)]


@pytest.mark.parametrize(
    ("first", "starts", "ends"),
    [
        (0.0, [0, 2, 4, 6], [2, 4, 6, 8]),
        # Sums of rounded durations, with and without the ends.
        (0.0, [0, 2.04, 4.08, 6.12], [2, 4, 6, 8]),
        (0.0, [0, 2.04, 4.08, 6.12], [2.04, 4.08, 6.12, 8.16]),
        (0.0, [0, 1.9, 3.8, 5.7], [1.9, 3.8, 5.7, 7.6]),
        # The file starts late, or the sum began in another file.
        (0.2, [0, 2, 4, 6], [2, 4, 6, 8]),
        (0.0, [8, 10, 12, 14], [10, 12, 14, 16]),
        (0.0, [0, 2, 4, 6], [float("nan")] * 4),
    ],
)
def test_episodes_that_fill_a_file_are_placed_by_order_and_length(first: float, starts, ends) -> None:
    assert placed(first + np.arange(80) / 10, starts, [20] * 4, ends) == [0, 20, 40, 60]
    # At the rate of the file, which merely is near that of the dataset.
    assert placed(first + np.arange(80) / 9.99, starts, [20] * 4, ends) == [0, 20, 40, 60]


@pytest.mark.parametrize("count", [79, 81, 200])
def test_episodes_that_do_not_fill_a_file_begin_on_their_frames(count: int) -> None:
    times = np.arange(count) / 10
    assert placed(times, [0, 2, 4], [20] * 3) == [0, 20, 40]
    # In another order, and with gaps between them.
    assert placed(times, [4.1, 2, 0], [15] * 3) == [41, 20, 0]
    drifted = placed(times, [0, 2.04, 4.08, 4.4], [20, 20, 20, 2])
    assert drifted[0] == 0
    assert "begins at 2.040 s by the metadata, where the video has no frame (the nearest is at 2.000 s)" in drifted[1]
    assert "begins at 4.080 s" in drifted[2]
    assert "after an episode that begins where the video has no frame" in drifted[3]


def test_times_that_contradict_each_other_are_named() -> None:
    times = np.arange(80) / 10
    assert placed(times, [0, 2, 4, 46], [20] * 4)[:3] == [0, 20, 40]
    assert "begins at 46.000 s" in placed(times, [0, 2, 4, 46], [20] * 4)[3]
    longer = placed(times, [0, 2, 4], [20] * 3, [2, 4.5, 6])
    assert (longer[0], longer[2]) == (0, 40)
    assert longer[1] == "takes 2.500 s by the metadata, but its 20 frames take 2.000 s"
    shared = placed(times, [0, 1.5, 4], [20] * 3)
    assert shared[2] == 40
    assert all("in the frames of another episode" in flaw for flaw in shared[:2])
    # As many frames as the file, but other lengths than the times.
    assert all("takes" in flaw for flaw in placed(times[:40], [0, 1.5], [20] * 2, [1.5, 4]))
    assert "the video ends 5 frames too early" in placed(times, [6.5], [20])[0]
    assert "the video starts late, at 0.200 s" in placed(times + 0.2, [0, 2], [20] * 2)[0]
    hole = np.concatenate([times[:10], times[10:] + 0.3])
    assert "its 20 frames take 2.200 s, not those of 10 fps" in placed(hole, [0], [20])[0]


def test_no_episode_is_placed_on_other_frames_than_its_own() -> None:
    """Against the truth: whatever the metadata says, an episode has its own frames or is refused."""
    rng = np.random.default_rng(0)
    num_placed = 0
    for _ in range(500):
        lengths = rng.integers(2, 30, rng.integers(1, 12))
        gaps = rng.integers(0, 3, len(lengths)) * (rng.random() < 0.3)
        truth = np.cumsum(lengths + gaps) - lengths
        times = rng.choice([0.0, 0.2]) + np.arange(truth[-1] + lengths[-1] + rng.integers(0, 3)) / 10
        fills = len(times) == lengths.sum()
        drift = rng.choice([0.0, 0.0, 0.001, 0.03, 0.04, 0.07, *((0.1, 0.2, 0.25, 0.5) if fills else ())]) * np.arange(
            len(lengths)
        )
        from_first = times[0] if rng.random() < 0.5 and not gaps.any() else 0
        starts = times[truth] - from_first + drift
        ends = rng.choice([0, 1]) * (times[truth] - starts) + starts + lengths / 10
        exact = np.allclose(starts, times[truth], atol=1e-9)
        for episode, found in enumerate(placed(times, starts, lengths, ends)):
            assert found == truth[episode] or (isinstance(found, str) and not exact)
            num_placed += not isinstance(found, str)
    assert num_placed > 500


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_times_of_a_files_frames_are_its_own(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_video = list[Path](), video.open_video
    monkeypatch.setattr(video, "open_video", lambda path: opened.append(path) or open_video(path))
    for name, numbers in (("steady", range(3, 15)), ("uneven", [0, 1, 2, 5, 6, 9])):
        path = tmp_path / f"{name}.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            for number in numbers:
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * number, np.uint8), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        scanned = [frame_HWC for _, frame_HWC in ClipScan(path)]
        opened.clear()
        for times in (1, 2):
            # The header has no rate of 30: the times are those of packets.
            assert film_times(path, 30.0) == pytest.approx(np.array(numbers) / 10, abs=2e-3)
            found = decode_times(path, {number: number / 10 for number in numbers}, 0.04)
            assert all((found[number] == frame).all() for number, frame in zip(numbers, scanned, strict=True))
            # Times and then frames are read from one opening.
            assert len(opened) == times
        assert film_times(path, 10.0) == pytest.approx(np.array(numbers) / 10, abs=2e-3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_does_not_wait_for_what_another_thread_has_open(tmp_path: Path) -> None:
    """A forked process frees the open clips of the threads that it lacks."""
    encode_clip(tmp_path / "clip.mp4", np.zeros((4, 360, 640, 3), np.uint8), fps=10)
    opened, done = threading.Event(), threading.Event()

    def read() -> None:
        decode_clip(tmp_path / "clip.mp4", [2], 10.0)
        opened.set()
        done.wait()

    thread = threading.Thread(target=read)
    thread.start()
    assert opened.wait(60)
    context = multiprocessing.get_context("fork")
    forked = context.Process(target=int)
    forked.start()
    forked.join(60)
    done.set()
    thread.join()
    alive = forked.is_alive()
    forked.kill()
    assert not alive


@pytest.mark.parametrize(
    ("name", "options"),
    [("plain.mp4", {}), ("part.mp4", {"movflags": "frag_keyframe"}), ("dash.mp4", {"movflags": "dash"}), ("b.flv", {})],
)
def test_frames_are_counted_where_the_header_counts_others(name: str, options: dict[str, str], tmp_path: Path) -> None:
    """A fragmented file counts its first fragment, and some add the time before the first frame to the length."""
    with av.open(str(tmp_path / name), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "2", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    scan = ClipScan(tmp_path / name)
    assert probe(tmp_path / name).num_frames == len(list(scan)) == 60 and scan.num_lost == 0


@pytest.mark.parametrize(("name", "options"), [("a.mp4", {"movflags": "frag_keyframe"}), ("a.flv", {}), ("a.ts", {})])
def test_frames_that_are_counted_by_packets_keep_their_own_rate(
    name: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Ten seconds at 30 frames a second, of which two are missing in the middle."""
    with av.open(str(tmp_path / name), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "2", "g": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in (*range(120), *range(180, 300)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = probe(tmp_path / name)
    assert info.num_frames == 240 and not info.constant and info.fps == pytest.approx(239 / (299 / 30), rel=1e-3)
