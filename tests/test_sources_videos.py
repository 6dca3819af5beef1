"""`lapa data videos`: formats, captions, sizes and rates, interruptions, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from lapa.data import writer
from lapa.data.config import InfoConfig
from lapa.data.convert import resample, run
from lapa.data.dataset import Dataset
from lapa.data.info import run as run_info
from lapa.data.metadata import INFO
from lapa.data.source import SourceDataset
from lapa.data.spec import open_dataset
from lapa.data.transforms import resize_and_crop
from lapa.data.video import ClipScan, encode_clip
from lapa.data.workers import AHEAD, Workers
from lapa.errors import UserError
from lapa.sources import videos
from lapa.sources.captions import read_captions
from lapa.sources.videos import VideosConfig
from test_convert import listed

SHARED = Path(os.environ.get("LAPA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def write_clip(
    path: Path, num: int = 8, fps: int = 10, size: tuple[int, int] = (48, 64), codec: str = "mpeg4", **options: str
) -> None:
    """A clip that grows lighter from frame to frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=fps, options=options))
        stream.height, stream.width = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for number in range(num):
            grey = np.full((*size, 3), 20 + 200 * number // num, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("clip10.mp4", "clip2.mp4", "deeper/clip1.avi"):
        write_clip(tmp_path / "clips" / name)
    return tmp_path / "clips"


def convert(folder: Path, **settings) -> Dataset:
    out = settings.pop("out", folder.parent / "dataset")
    settings = {"size": 32, "workers": 1, "caption": "wait", **settings}
    if settings.get("captions"):
        settings["captions"] = str(settings["captions"])
    run(VideosConfig(str(folder), out=out, **settings))
    return open_dataset(out)


def test_a_folder_becomes_a_dataset_in_natural_order(folder: Path) -> None:
    dataset = convert(folder)
    assert [episode.source for episode in dataset.episodes] == ["clip2.mp4", "clip10.mp4", "deeper/clip1.avi"]
    assert [episode.length for episode in dataset.episodes] == [8, 8, 8]
    assert dataset.action_dim is None
    levels = dataset.frames(1).mean(axis=(1, 2, 3))
    assert np.abs(levels - (20 + 200 * np.arange(8) / 8)).max() < 8
    assert not any(dataset.root.glob(".incoming*"))


def test_workers_do_not_change_the_dataset(folder: Path) -> None:
    alone = convert(folder)
    many = convert(folder, workers=2, out=folder.parent / "many")
    assert alone.fingerprint == many.fingerprint
    assert (alone.frames(2) == many.frames(2)).all()


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("webm", "libvpx-vp9"), ("gif", "gif"), ("mov", "libx264")]
)
def test_formats(tmp_path: Path, suffix: str, codec: str) -> None:
    write_clip(tmp_path / "clips" / f"a.{suffix}", codec=codec)
    dataset = convert(tmp_path / "clips")
    assert (dataset.episodes[0].length, dataset.fps) == (8, 10.0)
    assert np.abs(np.diff(dataset.frames(0).mean(axis=(1, 2, 3))) - 25).max() < 20


def test_captions_in_every_form(folder: Path, tmp_path: Path) -> None:
    texts = {"clip10.mp4": "push", "./clip2.mp4": "pull", "clip1.avi": 'say "hi", then go'}
    (tmp_path / "c.json").write_text(json.dumps(texts))
    rows = [{"file": name, "caption": text} for name, text in texts.items()]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    quoted = [name + ',"' + text.replace('"', '""') + '"' for name, text in texts.items()]
    (tmp_path / "c.csv").write_text("\n".join(["file,instruction", *quoted]))
    for name in ("c.json", "c.jsonl", "c.csv"):
        dataset = convert(folder, captions=tmp_path / name, caption=None, out=tmp_path / f"{name}_out")
        assert [episode.instruction for episode in dataset.episodes] == ["pull", "push", 'say "hi", then go']


def test_bad_captions_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"file": "a.mp4", "text": "x"}\n{"file": ')
    (tmp_path / "b.csv").write_text("name,text\na.mp4,push\n")
    (tmp_path / "c.json").write_text('{"a.mp4": 3}')
    (tmp_path / "d.txt").write_text("push")
    (tmp_path / "f.csv").write_bytes("file,text\na.mp4,caf\u00e9\n".encode("latin-1"))
    (tmp_path / "f.jsonl").write_bytes('{"file": "a.mp4", "text": "caf\u00e9"}\n'.encode("latin-1"))
    for name, message in (
        ("a.jsonl", "line 2 is not valid JSON"),
        ("b.csv", "entry 1 needs `file`"),
        ("c.json", "'a.mp4' is not text"),
        ("d.txt", "not .txt"),
        ("e.json", "no such captions file"),
        ("f.csv", "save it as UTF-8"),
        ("f.jsonl", "save it as UTF-8"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read_captions(tmp_path / name)


def test_of_several_captions_the_first_counts_and_an_empty_one_is_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [("clip2.mp4", " "), ("clip2.mp4", "push\u2028on"), ("./clip2.mp4", "pull"), ("clip10.mp4", "lift")]
    text = "\n\n".join(json.dumps({"file": name, "text": text}, ensure_ascii=False) for name, text in rows)
    (tmp_path / "c.jsonl").write_text(text)
    dataset = convert(folder, captions=tmp_path / "c.jsonl", caption="other")
    assert [episode.instruction for episode in dataset.episodes] == ["push\u2028on", "lift", "other"]
    assert "further captions of a video that has one, not used: 1" in capsys.readouterr().err
    assert listed(dataset) == {"further captions of a video, not used": 1}


def test_an_empty_cell_of_a_table_is_no_caption(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("file,text\nclip2.mp4,push\nclip10.mp4,\n")
    dataset = convert(folder, captions=tmp_path / "c.csv", caption="play")
    assert [episode.instruction for episode in dataset] == ["push", "play", "play"]


def test_a_caption_for_one_of_two_files_of_that_name_is_named(folder: Path, tmp_path: Path) -> None:
    write_clip(folder / "other" / "clip1.avi")
    (tmp_path / "c.json").write_text(json.dumps({"clip1.avi": "push"}))
    with pytest.raises(UserError, match=r"c\.json: clip1\.avi may be deeper/clip1\.avi or other/clip1\.avi; put the"):
        convert(folder, captions=tmp_path / "c.json")


def test_a_caption_fits_a_name_whose_accents_are_written_apart(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / f"{unicodedata.normalize('NFD', 'café')}.mp4")
    (tmp_path / "c.json").write_text(json.dumps({unicodedata.normalize("NFC", "café.mp4"): "pour"}))
    dataset = convert(tmp_path / "clips", captions=tmp_path / "c.json", caption=None)
    assert [episode.instruction for episode in dataset] == ["pour"]


def test_a_caption_for_a_missing_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"gone.mp4": "push"}))
    with pytest.raises(ValueError, match=r"c\.json: has a caption for gone\.mp4.*--skip-bad"):
        convert(folder, captions=tmp_path / "c.json")
    assert not (tmp_path / "dataset").exists()
    (tmp_path / "c.json").write_text(json.dumps({"gone.mp4": "push", "clip2.mp4": "lift"}))
    dataset = convert(folder, captions=tmp_path / "c.json", caption=None, skip_bad=True)
    assert listed(dataset) == {"captions without a video": 1, "videos without a caption, left out": 2}
    assert "entries skipped in all (--skip-bad): 3" in capsys.readouterr().err


def test_a_video_without_caption(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"clip2.mp4": "push"}))
    with pytest.raises(ValueError, match=r"clip10\.mp4: has no caption in .*\(and 1 more like it\).*--caption TEXT"):
        convert(folder, captions=tmp_path / "c.json", caption=None)
    assert len(convert(folder, captions=tmp_path / "c.json", caption=None, skip_bad=True).episodes) == 1
    with pytest.raises(ValueError, match="no captions; give --captions"):
        convert(folder, caption=None, out=tmp_path / "other")


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl", "captions.csv"])
def test_captions_in_the_folder_are_used(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    texts = {"clip2.mp4": "two", "clip10.mp4": "ten", "deeper/clip1.avi": "one"}
    content = {
        "captions.json": json.dumps(texts),
        "captions.jsonl": "".join(json.dumps({"file": key, "text": text}) + "\n" for key, text in texts.items()),
        "captions.csv": "file,text\n" + "".join(f"{key},{text}\n" for key, text in texts.items()),
    }
    (folder / name).write_text(content[name])
    for dataset in (convert(folder, caption=None), open_dataset(f"videos:{folder}")):
        assert [one.instruction for one in dataset.episodes] == ["two", "ten", "one"]
    shown = capsys.readouterr().err
    assert f"{name}: used as the captions" in shown and "ignored" not in shown
    assert dataset.extra["captions"] == name
    # What is asked for comes first.
    assert in_place(folder).episodes[0].instruction == "wait"
    assert f"{name}: not used, --caption is given; --captions takes it" in capsys.readouterr().err


def test_captions_that_are_no_text_do_no_harm(folder: Path, tmp_path: Path) -> None:
    names = ("clip2.mp4", "clip10.mp4", "deeper/clip1.avi")
    (tmp_path / "c.jsonl").write_text("".join(f'{{"file": "{name}", "text": "push \\ud800 it"}}\n' for name in names))
    for options in ({"captions": tmp_path / "c.jsonl", "caption": None}, {"caption": "push \udcff it"}):
        dataset = convert(folder, **options, overwrite=True)
        assert {one.instruction for one in dataset.episodes} == {"push \ufffd it"}


def test_captions_in_the_folder_that_lead_elsewhere_are_named(folder: Path) -> None:
    write_clip(folder.parent / "outside.mp4")
    (folder / "captions.json").write_text(json.dumps({"../outside.mp4": "push"}))
    with pytest.raises(ValueError, match=r"has a caption for \.\./outside\.mp4, which is not in"):
        convert(folder, caption=None)


def test_what_is_not_a_video(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "bad.mp4").write_text("not a video")
    (folder / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"bad\.mp4: not a readable video.*--skip-bad"):
        convert(folder)
    assert len(convert(folder, skip_bad=True).episodes) == 3
    message = capsys.readouterr().err
    assert "bad.mp4" in message
    assert "ignored: 1 file without the suffix of a video" in message


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"clips: holds no video \(other files: 1\)"):
        convert(tmp_path / "clips")
    with pytest.raises(ValueError, match="no such folder"):
        convert(tmp_path / "none")


def test_a_truncated_video_is_kept_as_far_as_it_goes(folder: Path, capsys: pytest.CaptureFixture) -> None:
    path = folder / "long.mkv"
    write_clip(path, num=120, codec="libx264")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    dataset = convert(folder)
    length = dataset.episodes[3].length
    assert 5 < length < 115
    message = capsys.readouterr().err
    assert f"{length} frames kept" in message
    assert "damaged, the readable part is kept: 1" in message
    assert "frames lost in what is damaged: " in message


def test_mixed_sizes_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_clip(tmp_path / "clips/a.mp4", num=10, fps=10)
    write_clip(tmp_path / "clips/b.mp4", num=10, fps=10, size=(64, 48))
    write_clip(tmp_path / "clips/c.mp4", num=30, fps=30)
    dataset = convert(tmp_path / "clips")
    assert (dataset.fps, [episode.length for episode in dataset.episodes]) == (10.0, [10, 10, 10])
    apart = dataset.frames(0).mean(axis=(1, 2, 3)) - dataset.frames(2).mean(axis=(1, 2, 3))
    assert np.abs(apart).max() < 6
    message = capsys.readouterr().err
    assert "1 at 30 fps" in message
    assert "2 different image sizes" in message
    assert convert(tmp_path / "clips", fps=30, out=tmp_path / "fast").episodes[0].length in (29, 30)


def test_resampling_takes_the_nearest_frame() -> None:
    frames = [(number / 10, np.array(number)) for number in range(6)]
    assert [int(frame) for frame in resample(frames, 10)] == [0, 1, 2, 3, 4, 5]
    assert [int(frame) for frame in resample(frames, 5)] == [0, 2, 4]
    assert [int(frame) for frame in resample(frames[:3], 20)] == [0, 1, 1, 2, 2]
    assert [int(frame) for frame in resample(frames[:1], 20)] == [0]
    milliseconds = [(round(number / 30, 3), np.array(number)) for number in range(100)]
    assert [int(frame) for frame in resample(milliseconds, 30)] == list(range(100))


def test_an_output_that_holds_the_videos(folder: Path) -> None:
    for out in (folder, folder.parent):
        with pytest.raises(ValueError, match=r"is or contains .*clips, which this command reads"):
            convert(folder, out=out, overwrite=True)
    assert len(list(folder.rglob("*.*"))) == 3


def test_a_killed_worker_is_named_with_the_mend() -> None:
    with Workers(1) as workers, pytest.raises(ValueError, match=r"worker process was killed.*--resume and fewer"):
        list(workers.in_order(os._exit, [(1,)]))


def test_workers_leave_interrupts_to_their_parent_and_take_a_few_jobs_at_a_time() -> None:
    taken = []

    def jobs() -> Iterator[tuple[int]]:
        for number in range(20):
            taken.append(number)
            yield (signal.SIGINT,)

    with Workers(1) as workers:
        results = workers.in_order(signal.raise_signal, jobs())
        assert next(results) is None
        assert len(taken) <= AHEAD
        assert list(results) == [None] * 19


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, time\n"
        "from lapa.data.workers import Workers\n"
        "def report(seconds):\n"
        "    os.write(1, b'begun ')\n"
        "    time.sleep(seconds)\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as workers:\n"
        "        list(workers.in_order(report, [(600,), (600,)]))\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    message = b""
    while message.count(b"begun") < 2:
        message += os.read(parent.stdout.fileno(), 100)
    parent.kill()
    # The output ends when the last process that holds it is gone.
    parent.communicate(timeout=30)


def test_an_output_that_exists(folder: Path) -> None:
    convert(folder)
    with pytest.raises(ValueError, match=r"already holds a finished result.*--overwrite"):
        convert(folder)
    convert(folder, resume=True)
    convert(folder, overwrite=True)


def test_an_interrupted_run_equals_an_uninterrupted_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(folder)
    out, add = folder.parent / "interrupted", writer.DatasetWriter.add_episode_files

    def interrupted(self, *arguments, **settings):
        if self.num_episodes == 2:
            raise KeyboardInterrupt
        return add(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(writer.DatasetWriter, "add_episode_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, out=out)
    with pytest.raises(ValueError, match="unfinished"):
        open_dataset(out)
    with pytest.raises(ValueError, match="--resume"):
        convert(folder, out=out)
    assert convert(folder, out=out, resume=True).fingerprint == whole.fingerprint
    assert not any(out.glob(".incoming*"))


def test_a_full_disk_is_not_taken_for_a_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder.parent / "dataset"

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lapa.data.convert.encode_clip", full)
        with pytest.raises(OSError, match="No space"):
            convert(folder)
    assert not (out / INFO).exists()
    assert len(convert(folder, resume=True).episodes) == 3


@pytest.mark.parametrize(("name", "fps", "frames"), [("rt1_videos", 30, 220), ("calvin_videos", 20, 373)])
def test_real_robot_videos(tmp_path: Path, name: str, fps: int, frames: int) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip("the shared sample data are not here")
    shutil.copytree(SHARED / name, tmp_path / name)
    dataset = convert(tmp_path / name, captions=tmp_path / name / "captions.json", caption=None, size=64)
    assert (len(dataset.episodes), dataset.num_frames, dataset.fps) == (6, frames, fps)
    assert len(dataset.tasks) == 6


def repeating(path: Path, times: int, num: int = 12) -> None:
    """A film at 30 frames a second of squares that move every `times` frames."""
    frames = np.full((num * times, 48, 64, 3), 60, np.uint8)
    for number, frame_HWC in enumerate(frames):
        left = 4 * (number // times)
        frame_HWC[10:30, left : left + 16] = 220
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_clip(path, frames, 30, keyframe_interval=12)


def test_repeated_images_are_said_and_a_rate_takes_each_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(3):
        repeating(tmp_path / "films" / f"{number}.mp4", times=10)
    said = r"most neighbouring frames are the same image, in 3 of 3 films: of 30 .* about 3 are new; .*--rate 3"
    dataset = convert(tmp_path / "films")
    assert re.search(said, capsys.readouterr().err)
    run_info(InfoConfig(str(dataset.root)))
    assert re.search(said, capsys.readouterr().err)
    once = convert(tmp_path / "films", rate=3, overwrite=True)
    assert (once.fps, once.lengths.tolist()) == (3, [12] * 3)
    run_info(InfoConfig(str(once.root)))
    assert "same image" not in capsys.readouterr().err


@pytest.mark.parametrize("fps", [None, 6.0])
def test_a_rate_that_the_files_state_wrongly_is_corrected(
    tmp_path: Path, fps: float | None, capsys: pytest.CaptureFixture
) -> None:
    repeating(tmp_path / "films" / "a.mp4", times=1)
    (tmp_path / "films" / "b").mkdir()
    write_times(tmp_path / "films" / "b" / "varies.mp4", [0, 0.1, 0.3, 0.4, 0.6, 0.7])
    in_place(tmp_path / "films")
    assert "or less; where they play too fast, give the rate that was recorded as --true-fps" in capsys.readouterr().err
    there = convert(tmp_path / "films", true_fps=3.0, fps=fps)
    assert "--true-fps" not in capsys.readouterr().err
    here = in_place(tmp_path / "films", true_fps=3.0, **({"fps": fps} if fps else {}))
    times = 1 if fps is None else 2
    for dataset in (there, here):
        assert dataset.fps == 3.0 * times and dataset.extra["true_fps"] == 3.0
    # Each frame is that much longer, and the last one not cut off by more than half of it.
    lefts = [int(np.flatnonzero(frame_HWC[20, :, 0] > 140)[0]) for frame_HWC in here.frames(0)]
    assert len(lefts) >= 12 * times - times // 2
    assert np.abs(np.array(lefts) - 4 * (np.arange(len(lefts)) // times)).max() <= 4
    assert len(set(np.round(np.array(lefts) / 4))) == 12
    assert there.lengths.tolist() == here.lengths.tolist()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="--true-fps"):
            in_place(tmp_path / "films", true_fps=wrong)


def test_real_clips_are_as_long_as_they_were_recorded(tmp_path: Path) -> None:
    if not (SHARED / "rt1_videos").is_dir():
        pytest.skip("the shared sample data are not here")
    dataset = open_dataset(f"videos:{SHARED / 'rt1_videos'},true_fps=3")
    assert (dataset.fps, dataset.num_frames, len(dataset)) == (3.0, 220, 6)


def write_times(path: Path, times: list[float], size: tuple[int, int] = (48, 64), codec: str = "libx264") -> None:
    """A clip with a frame at each time, as bright as the frame's number times 7 plus 20."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=1000, options={"g": "12", "bf": "2"}))
        stream.height, stream.width, stream.pix_fmt, stream.time_base = *size, "yuv420p", Fraction(1, 1000)
        for number, seconds in enumerate(times):
            grey = np.full((*size, 3), 20 + 7 * number, np.uint8)
            image = av.VideoFrame.from_ndarray(grey, format="rgb24")
            image.pts, image.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))


def in_place(folder: Path, **options: object) -> Dataset:
    message = "".join(f",{key}={value}" for key, value in {"caption": "wait", **options}.items())
    return open_dataset(f"videos:{folder}{message}")


def numbers(frames_THWC: np.ndarray) -> list[int]:
    """The frames' numbers, by their brightness."""
    return np.round((frames_THWC.mean(axis=(1, 2, 3)) - 20) / 7).astype(int).tolist()


def test_in_place_equals_the_converted_dataset(folder: Path) -> None:
    write_clip(folder / "fast.webm", num=30, fps=30, codec="libvpx-vp9")
    there, here = convert(folder, size=48), in_place(folder)
    assert isinstance(here, SourceDataset)
    assert (here.fps, here.cameras, here.action_dim) == (there.fps, there.cameras, None)
    assert [(e.source, e.length, e.instruction) for e in here.episodes] == [
        (e.source, e.length, e.instruction) for e in there.episodes
    ]
    for episode in range(4):
        apart = resize_and_crop(here.frames(episode), 48).astype(int) - there.frames(episode)
        assert np.abs(apart).mean() < 3
    assert (here.frames(3, [7, 0, 7, 9]) == here.frames(3)[[7, 0, 7, 9]]).all()
    assert here.fingerprint == in_place(folder).fingerprint
    assert here.fingerprint != in_place(folder, fps=5).fingerprint
    again = pickle.loads(pickle.dumps(here))
    assert (again.frames(1, [3]) == here.frames(1, [3])).all()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_of_a_variable_rate_is_read_by_its_times(tmp_path: Path, suffix: str) -> None:
    times = [0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.7, 0.8, 1.5, 1.6, 1.7, 1.8]
    write_times(tmp_path / "clips" / f"a.{suffix}", times)
    dataset = in_place(tmp_path / "clips", fps=10)
    length = int(dataset.lengths[0])
    assert abs(length - 19) <= 1
    seen = numbers(dataset.frames(0))
    nearest = [int(np.argmin(np.abs(np.array(times) - number / 10 + 1e-7))) for number in range(length)]
    assert seen == nearest
    there = convert(tmp_path / "clips", fps=10, size=48)
    shared = min(length, int(there.lengths[0]))
    assert numbers(there.frames(0))[:shared] == seen[:shared]
    assert abs(int(there.lengths[0]) - length) <= 1


@pytest.mark.parametrize(("fps", "length"), [(5, 15), (10, 30), (12, 36), (30, 89), (7.5, 22)])
def test_single_frames_of_any_rate_are_the_nearest(tmp_path: Path, fps: float, length: int) -> None:
    write_times(tmp_path / "clips" / "a.mp4", [number / 10 for number in range(30)])
    dataset = in_place(tmp_path / "clips", fps=fps)
    assert abs(int(dataset.lengths[0]) - length) <= 1
    there = convert(tmp_path / "clips", fps=fps, size=48, out=tmp_path / "out")
    assert dataset.lengths.tolist() == there.lengths.tolist()
    expected = numbers(there.frames(0))
    order = np.random.default_rng(0).permutation(int(dataset.lengths[0]))
    assert [numbers(dataset.frames(0, [number]))[0] for number in order] == [expected[number] for number in order]


def test_a_file_that_cannot_be_sought_is_read_from_its_beginning(tmp_path: Path) -> None:
    for suffix, codec in (("gif", "gif"), ("ts", "libx264"), ("avi", "mpeg4")):
        write_clip(tmp_path / suffix / f"a.{suffix}", num=20, codec=codec)
        dataset = in_place(tmp_path / suffix)
        assert abs(int(dataset.lengths[0]) - 20) <= 1
        levels = [dataset.frames(0, [number]).mean() for number in (15, 2, 9)]
        assert np.abs(np.array(levels) - (20 + 10 * np.array([15, 2, 9]))).max() < 8


def test_a_truncated_video_read_in_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "clips" / "a.mkv"
    write_clip(path, num=120, codec="libx264")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    dataset = in_place(tmp_path / "clips")
    assert len(dataset.frames(0, [0, 3])) == 2
    assert dataset.lengths.tolist() == [120], "the header promises all of them"
    with pytest.raises(ValueError, match=r"a\.mkv: (ends at|cannot be decoded).*replace it"):
        dataset.frames(0, [119])


def test_a_video_without_a_frame_is_left_out_in_place_on_request(folder: Path) -> None:
    path = folder / "blind.webm"
    with av.open(str(path), "w", options={"live": "1"}) as container:
        stream = cast(VideoStream, container.add_stream("libvpx-vp9", rate=10))
        stream.height, stream.width = 48, 64
        packets = [*stream.encode(av.VideoFrame(64, 48, "yuv420p")), *stream.encode(None)]
        container.mux(packets)
        image = bytes(packets[0])
    assert path.read_bytes().count(image) == 1
    path.write_bytes(path.read_bytes().replace(image, bytes(len(image))))
    with pytest.raises(ValueError, match=r"blind\.webm: no frame of it can be decoded.*skip_bad=true"):
        in_place(folder)
    assert len(in_place(folder, skip_bad=True).lengths) == 3


def test_names_with_spaces_and_unicode(tmp_path: Path) -> None:
    folder = tmp_path / "my clips ü"
    names = ["a b.mp4", "Σωκράτης/кошка 2.mp4", "Σωκράτης/кошка 10.mp4", "日本, =語.mp4"]
    for name in names:
        write_clip(folder / name)
    (tmp_path / "c.json").write_text(json.dumps({name: f"watch {name}" for name in names}), encoding="utf-8")
    dataset = convert(folder, captions=tmp_path / "c.json", caption=None)
    assert {episode.source: episode.instruction for episode in dataset.episodes} == {n: f"watch {n}" for n in names}
    assert [e.source for e in dataset.episodes].index(names[1]) < [e.source for e in dataset.episodes].index(names[2])
    assert len(in_place(folder).frames(0)) == 8


def test_links_are_followed_once_and_circles_end(folder: Path) -> None:
    write_clip(folder.parent / "elsewhere" / "far.mp4")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere" / "back").symlink_to(folder)
    (folder / "deeper" / "self").symlink_to(folder / "deeper")
    dataset = convert(folder)
    assert [e.source for e in dataset.episodes] == ["clip2.mp4", "clip10.mp4", "deeper/clip1.avi", "link/far.mp4"]
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / "round.mp4").symlink_to(folder / "round.mp4")
    with pytest.raises(ValueError, match=r"gone\.mp4: .*\(and 1 more like it\)"):
        convert(folder, overwrite=True)


def test_empty_files_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "empty.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.mp4: .*empty, zero bytes.*--skip-bad"):
        convert(folder)
    assert not (folder.parent / "dataset").exists()
    dataset = convert(folder, skip_bad=True)
    assert len(dataset) == 3 and listed(dataset) == {"videos that cannot be read, left out": 1}
    assert len(in_place(folder, skip_bad="true").lengths) == 3
    assert "skipped in all (--skip-bad): 1" in capsys.readouterr().err


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe\.mp4: is no regular file"):
        convert(folder)
    assert len(convert(folder, skip_bad=True).lengths) == 3


def test_an_archive_is_not_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "clips.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../outside.mp4"))
    with pytest.raises(ValueError, match=r"clips\.tar\.gz: is an archive; unpack it first"):
        convert(tmp_path / "clips.tar.gz")
    assert not (tmp_path.parent / "outside.mp4").exists()
    with pytest.raises(ValueError, match="read from this machine's disk"):
        open_dataset("videos:memory://clips,caption=wait")


def test_datasets_inside_the_folder_are_passed_over(folder: Path) -> None:
    convert(folder, out=folder / "dataset")
    assert len(convert(folder, out=folder.parent / "second").lengths) == 3


def test_options_that_do_not_fit(folder: Path) -> None:
    for fps in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"--fps (0|inf|nan).*above 0"):
            convert(folder, fps=fps)
    with pytest.raises(ValueError, match=r"unknown option of videos.*captoins.*captions"):
        open_dataset(f"videos:{folder},captoins=x.json")


def test_joined_real_clips_are_cut_apart(tmp_path: Path) -> None:
    if not (SHARED / "rt1_videos").is_dir():
        pytest.skip("the shared sample data are not here")
    paths = [sorted((SHARED / name).glob("*.mp4"))[0] for name in ("rt1_videos", "calvin_videos")]
    clips = [[resize_and_crop(frame[None], 128)[0] for _, frame in ClipScan(path)] for path in paths]
    (tmp_path / "clips").mkdir()
    encode_clip(tmp_path / "clips" / "joined.mp4", [*clips[0], *clips[1]], 20.0)
    dataset = convert(tmp_path / "clips", cut_shots=True)
    assert dataset.lengths.tolist() == [len(clip) for clip in clips]
    assert [e.source for e in dataset.episodes] == ["joined.mp4#0000", "joined.mp4#0001"]


def test_headers_of_many_videos_are_kept_until_a_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(videos, "WORTH_CACHING", 3)
    looked = []
    probe = videos.probe
    monkeypatch.setattr(videos, "probe", lambda path: looked.append(path.name) or probe(path))
    first = in_place(folder)
    assert sorted(looked) == ["clip1.avi", "clip10.mp4", "clip2.mp4"]
    looked.clear()
    assert in_place(folder).fingerprint == first.fingerprint
    assert looked == []
    write_clip(folder / "clip2.mp4", num=5)
    assert in_place(folder).lengths.tolist() == [5, 8, 8]
    (folder / "bad.mp4").write_text("no video")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"bad\.mp4: not a readable video"):
            in_place(folder)
