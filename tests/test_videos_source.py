"""`lapa data videos`: formats, captions, sizes and rates, interruptions, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from lapa.data import writer
from lapa.data.dataset import Dataset
from lapa.data.lerobot import INFO
from lapa.data.sources import videos
from lapa.data.sources.videos import VideosConfig, read_captions, resample, run
from lapa.data.video import encode_clip
from lapa.data.workers import AHEAD, Workers

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
    run(VideosConfig(folder, out, **{"size": 32, "workers": 1, "caption": "wait", **settings}))
    return Dataset.open(out)


def test_a_folder_becomes_a_dataset_in_natural_order(folder: Path) -> None:
    dataset = convert(folder)
    assert [episode.source for episode in dataset.episodes] == ["clip2.mp4", "clip10.mp4", "deeper/clip1.avi"]
    assert [episode.length for episode in dataset.episodes] == [8, 8, 8]
    assert dataset.action_dim is None
    levels = dataset.frames(1).mean(axis=(1, 2, 3))
    assert np.abs(levels - (20 + 200 * np.arange(8) / 8)).max() < 8
    assert not (dataset.root / ".incoming").exists()


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
    for name, told in (
        ("a.jsonl", "line 2 is not valid JSON"),
        ("b.csv", "entry 1 needs `file`"),
        ("c.json", "'a.mp4' is not text"),
        ("d.txt", "not .txt"),
        ("e.json", "no such captions file"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*{told}"):
            read_captions(tmp_path / name)


def test_a_caption_for_a_missing_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"gone.mp4": "push"}))
    with pytest.raises(ValueError, match=r"c\.json: has a caption for gone\.mp4.*--skip-bad"):
        convert(folder, captions=tmp_path / "c.json")
    assert not (tmp_path / "dataset").exists()
    convert(folder, captions=tmp_path / "c.json", skip_bad=True)
    assert "entries skipped in all (--skip-bad): 1" in capsys.readouterr().err


def test_a_video_without_caption(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"clip2.mp4": "push"}))
    with pytest.raises(ValueError, match=r"clip10\.mp4: has no caption in .*\(and 1 more like it\).*--caption TEXT"):
        convert(folder, captions=tmp_path / "c.json", caption=None)
    assert len(convert(folder, captions=tmp_path / "c.json", caption=None, skip_bad=True).episodes) == 1
    with pytest.raises(ValueError, match="no captions; give --captions"):
        convert(folder, caption=None, out=tmp_path / "other")


def test_what_is_not_a_video(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "bad.mp4").write_text("not a video")
    (folder / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"bad\.mp4: not a readable video.*--skip-bad"):
        convert(folder)
    assert len(convert(folder, skip_bad=True).episodes) == 3
    told = capsys.readouterr().err
    assert "bad.mp4" in told
    assert "left aside: 1 file without the suffix of a video" in told


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
    told = capsys.readouterr().err
    assert f"{length} frames kept" in told
    assert "damaged videos: 1; frames lost:" in told


def test_mixed_sizes_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_clip(tmp_path / "clips/a.mp4", num=10, fps=10)
    write_clip(tmp_path / "clips/b.mp4", num=10, fps=10, size=(64, 48))
    write_clip(tmp_path / "clips/c.mp4", num=30, fps=30)
    dataset = convert(tmp_path / "clips")
    assert (dataset.fps, [episode.length for episode in dataset.episodes]) == (10.0, [10, 10, 10])
    apart = dataset.frames(0).mean(axis=(1, 2, 3)) - dataset.frames(2).mean(axis=(1, 2, 3))
    assert np.abs(apart).max() < 6
    told = capsys.readouterr().err
    assert "1 at 30 fps" in told
    assert "2 different picture sizes" in told
    assert convert(tmp_path / "clips", fps=30, out=tmp_path / "fast").episodes[0].length in (29, 30)


def test_resampling_takes_the_nearest_frame() -> None:
    frames = [(number / 10, np.array(number)) for number in range(6)]
    assert [int(frame) for frame in resample(frames, 10)] == [0, 1, 2, 3, 4, 5]
    assert [int(frame) for frame in resample(frames, 5)] == [0, 2, 4]
    assert [int(frame) for frame in resample(frames[:3], 20)] == [0, 1, 1, 2, 2]
    assert [int(frame) for frame in resample(frames[:1], 20)] == [0]
    milliseconds = [(round(number / 30, 3), np.array(number)) for number in range(100)]
    assert [int(frame) for frame in resample(milliseconds, 30)] == list(range(100))


def test_keeping_the_encoding(tmp_path: Path) -> None:
    for name in ("a", "b"):
        frames = np.full((6, 32, 48, 3), 90, np.uint8)
        (tmp_path / "clips").mkdir(exist_ok=True)
        encode_clip(tmp_path / "clips" / f"{name}.mp4", frames, 10.0)
    dataset = convert(tmp_path / "clips", keep_encoding=True)
    assert dataset.image_shape() == (32, 48)
    assert dataset.frames(1).shape == (6, 32, 48, 3)
    write_clip(tmp_path / "clips/c.mp4", size=(32, 48))
    with pytest.raises(ValueError, match=r"c\.mp4: is encoded as mpeg4"):
        convert(tmp_path / "clips", keep_encoding=True, overwrite=True)
    write_clip(tmp_path / "clips/c.mp4")
    with pytest.raises(ValueError, match="mixed picture sizes"):
        convert(tmp_path / "clips", keep_encoding=True, overwrite=True)
    assert len(dataset.frames(0)) == 6


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_kept_encodings_with_b_frames_are_read_from_their_first_frame(tmp_path: Path, suffix: str) -> None:
    write_clip(tmp_path / "clips" / f"a.{suffix}", num=30, codec="libx264", bf="2", g="10")
    kept = convert(tmp_path / "clips", keep_encoding=True)
    assert kept.episodes[0].length == 30
    levels = [kept.frames(0, [number]).mean() for number in range(30)]
    assert np.abs(levels - (20 + 200 * np.arange(30) / 30)).max() < 8


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
        "def tell(seconds):\n"
        "    os.write(1, b'begun ')\n"
        "    time.sleep(seconds)\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as workers:\n"
        "        list(workers.in_order(tell, [(600,), (600,)]))\n"
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    told = b""
    while told.count(b"begun") < 2:
        told += os.read(parent.stdout.fileno(), 100)
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
        Dataset.open(out)
    with pytest.raises(ValueError, match="--resume"):
        convert(folder, out=out)
    assert convert(folder, out=out, resume=True).fingerprint == whole.fingerprint
    assert not (out / ".incoming").exists()


def test_a_full_disk_is_not_taken_for_a_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder.parent / "dataset"

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(videos, "encode_clip", full)
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
