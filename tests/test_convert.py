"""The converter that all sources share: order, resuming after a kill, filters, rates, and what is counted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from browser import browser
from lapa.data import convert, writer
from lapa.data.config import ConvertOptions
from lapa.data.convert import convert_item, in_time, resample, resample_rows
from lapa.data.dataset import ActionSpace, Control, Dataset
from lapa.data.duplicates import DIFFERENT_BITS
from lapa.data.left_out import EXAMPLES
from lapa.data.metadata import EPISODES, INFO, JOURNAL, LEFT_OUT
from lapa.data.source import Clip, Item, Source
from lapa.data.spec import open_dataset
from lapa.errors import UserError

SIDE = 32


def shade(level: float, side: int = SIDE) -> np.ndarray:
    """An image whose left half is brighter than its right half."""
    frame = np.full((side, side, 3), level, np.uint8)
    frame[:, : side // 2] += 20
    return frame


class MadeUp(Source):
    """Items named by what they show: `move`, `still`, `black`, `cuts` (three shots), `bad`, `short`, ..."""

    kind = "made-up"

    def __init__(self, root: Path, names: Sequence[str], control: Control | None = None, actions: bool = False):
        self.root, self.name, self.fps, self.settings = root, root.name, 10.0, {}
        self.cameras = {"front": (SIDE, SIDE), "side": (SIDE, SIDE)}
        self.items = [Item(name) for name in names]
        if actions:
            self.action_space = ActionSpace.named(("x", "gripper"), ("gripper",), control)
            self.state_names = ("joint",)

    def read(self, item: Item) -> Clip:
        kind = item.key.split("-")[0]
        trap = self.root / f"{item.key}.trap"
        if trap.exists():
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "bad":
            raise UserError(f"{self.file_of(item)}: is damaged")
        length = {"short": 4, "cuts": 18, "titled": 60}.get(kind, 12)
        clip = Clip({}, f"show {kind}", notes=("noted",) if kind == "noted" else ())
        if self.action_space is not None:
            steps = np.arange(length, dtype=np.float32)
            clip.actions, clip.states = np.stack([steps, steps % 2], axis=1), steps[:, None]
            if kind == "nan":
                clip.actions[7, 0] = np.nan
            if kind == "fewer":
                clip.actions = clip.actions[:-1]

        def frames(camera: str) -> Iterator[tuple[float, np.ndarray]]:
            for number in range(length - (kind == "uneven" and camera == "side")):
                if kind == "lossy" and number == 5 and camera == "front":
                    clip.lost += 1
                    clip.damage = "image 5: broken"
                    continue
                yield (-number if kind == "backwards" else number) / self.fps, _image(kind, number, camera)

        clip.frames = {camera: frames(camera) for camera in self.cameras}
        return clip

    def frames(self, item: Item, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        raise NotImplementedError


def _image(kind: str, number: int, camera: str) -> np.ndarray:
    if kind == "black" or (kind == "dark" and camera == "front"):
        return np.zeros((SIDE, SIDE, 3), np.uint8)
    if kind == "frozen" and number > 3:
        return shade(40)
    if kind == "titled" and number < 20:
        image = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
        image[10:14, 8:20:2] = 255
        return image
    if kind in ("bars", "titled"):
        image = np.full((SIDE, 2 * SIDE, 3), 5, np.uint8)
        image[4:-4] = shade(60 + 10 * (number % 12), 2 * SIDE)[4 : SIDE - 4]
        return image
    if kind == "tiny":
        return shade(10 * number, 16)
    if kind == "cuts":
        image = shade((30, 200, 90)[number // 6])
        return image[::-1] if number // 6 == 2 else image
    return shade(80 if kind == "still" else 10 * number)


class Scenes(MadeUp):
    """Items `KIND-SCENE`: `first` is a scene in which something moves, `copy` the same with noise, darker and
    smaller, `longer` has more frames, `pan` is the scene seen by a camera that turns, `grey` shows almost nothing."""

    def __init__(self, root: Path, names: Sequence[str], *_: Any):
        super().__init__(root, names)
        self.cameras = {"front": (96, 96)}

    def read(self, item: Item) -> Clip:
        kind, scene = item.key.split("-")[:2]
        length = 24 if kind == "longer" else 12
        frames = ((number / self.fps, self.image(kind, int(scene), number)) for number in range(length))
        return Clip({"front": frames}, item.key)

    def image(self, kind: str, scene: int, number: int) -> np.ndarray:
        rng = np.random.default_rng(scene)
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((192, 192))
        wide = np.asarray(small).astype(int)
        if kind == "grey":
            wide[:] = 100 + scene
        left = 6 * number if kind == "pan" else 0
        image = wide[:96, left : left + 96].copy()
        if kind != "pan":
            image[40:60, 5 * number : 5 * number + 20] = 255 - image[40:60, 5 * number : 5 * number + 20]
        if kind == "copy":
            image = image * 0.9 + np.random.default_rng(number).normal(0, 3, image.shape)
        image = image.clip(0, 255).astype(np.uint8)
        return np.asarray(Image.fromarray(image).resize((72, 72))) if kind == "copy" else image


class Silent(Scenes):
    """Scenes without an instruction."""

    def read(self, item: Item) -> Clip:
        clip = super().read(item)
        clip.instruction = ""
        return clip


@dataclass(frozen=True)
class MadeUpConfig(ConvertOptions):
    root: Path
    names: tuple[str, ...]
    control: Control | None = None
    with_actions: bool = False
    kind: type[MadeUp] = MadeUp

    def open(self) -> Source:
        return self.kind(self.root, self.names, self.control, self.with_actions)


def converted(tmp_path: Path, names: Sequence[str], out: str = "out", **settings: Any) -> Dataset:
    root = tmp_path / "source"
    root.mkdir(exist_ok=True)
    convert.run(MadeUpConfig(root, tuple(names), out=tmp_path / out, **{"size": 16, "workers": 1, **settings}))
    return open_dataset(tmp_path / out)


def summary(dataset: Dataset) -> list[tuple[str, int, str]]:
    return [(episode.source, episode.length, episode.instruction) for episode in dataset.episodes]


def same(one: Dataset, other: Dataset) -> bool:
    """The same episodes, with the same images and metadata."""
    assert one.fingerprint == other.fingerprint
    frames = [
        (one.frames(e, None, c) == other.frames(e, None, c)).all() for e in range(len(one.lengths)) for c in one.cameras
    ]
    return all(frames) and json.loads((one.root / "meta/stats.json").read_text()) == json.loads(
        (other.root / "meta/stats.json").read_text()
    )


NAMES = ("move-1", "cuts-1", "still-1", "black-1", "move-2", "short-1", "cuts-2", "noted-1")
FILTERS = {"cut_shots": True, "min_seconds": 0.4, "min_motion": 0.01}


def test_items_become_episodes_in_order_whatever_the_workers(tmp_path: Path) -> None:
    alone = converted(tmp_path, NAMES)
    assert [row[0] for row in summary(alone)] == [name for name in NAMES if name != "black-1"]
    assert alone.cameras == ("front", "side")
    assert same(alone, converted(tmp_path, NAMES, "many", workers=2))
    assert not any(alone.root.glob(f"{convert.INCOMING}*"))


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = (*NAMES, "bad-1", "lossy-1", "dark-1")
    dataset = converted(tmp_path, names, skip_bad=True, min_seconds=0.5, min_motion=0.01)
    kept = [row[0] for row in summary(dataset)]
    assert kept == ["move-1", "cuts-1", "move-2", "cuts-2", "noted-1", "lossy-1", "dark-1"]
    printed = capsys.readouterr().err
    for line in (
        "left out, nothing moves: 1",
        "left out, no camera shows anything: 1",
        "left out, too short: 1",
        "left out, damaged: 1",
        "noted: 1",
        "damaged, the readable part is kept: 1",
        "frames lost in what is damaged: 1",
        "image 5: broken: damaged; 12 frames kept, 1 lost",
        "bad-1: is damaged",
    ):
        assert line in printed, line
    with pytest.raises(ValueError, match=r"bad-1: is damaged; .*--skip-bad"):
        converted(tmp_path, names, "strict")


def test_frozen_videos_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("frozen-1", "move-1", "still-1")
    assert [row[0] for row in summary(converted(tmp_path, names, max_frozen=0.5))] == ["move-1"]
    assert "left out, most frames repeat the one before: 2" in capsys.readouterr().err
    # Seven of eleven.
    assert [row[0] for row in summary(converted(tmp_path, names, "more", max_frozen=0.8))] == ["frozen-1", "move-1"]


# Of the copies of scene 1, the second is like the first, too; grey images are too empty to be compared.
SCENES = ("first-1", "copy-1", "first-2", "longer-1", "copy-1-again", "grey-1", "copy-2", "grey-1-again")
DIFFERENT = ["first-1", "first-2", "longer-1", "grey-1", "grey-1-again"]
FEW = {"kind": Scenes, "size": 64, "drop_duplicates": True}


def test_the_first_of_episodes_that_look_the_same_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = converted(tmp_path, SCENES, **FEW)
    assert [row[0] for row in summary(whole)] == DIFFERENT
    assert "left out, looks like an earlier episode: 3" in capsys.readouterr().err
    page = (whole.root / LEFT_OUT).read_text()
    texts = re.findall(r"like (first-.), (\d+) of 224 bits differ<", page)
    assert sorted(first for first, _ in texts) == ["first-1", "first-1", "first-2"]
    assert all(int(bits) <= DIFFERENT_BITS for _, bits in texts)
    many = converted(tmp_path, SCENES, "many", workers=2, **FEW)
    assert same(whole, many) and (many.root / LEFT_OUT).read_text() == page
    every = converted(tmp_path, SCENES, "every", **{**FEW, "drop_duplicates": False})
    assert len(every) == len(SCENES)


def test_duplicates_do_not_count_as_kept_without_an_instruction(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    converted(tmp_path, SCENES, **{**FEW, "kind": Silent})
    assert f"kept, without an instruction: {len(DIFFERENT)}" in capsys.readouterr().err


@pytest.mark.parametrize("step", range(1, len(SCENES) + 1))
def test_after_a_kill_the_same_duplicates_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, step: int
) -> None:
    closed = []

    def closing(self: writer.DatasetWriter, *arguments: Any) -> None:
        closed.append(arguments)
        if len(closed) == step:
            raise KeyboardInterrupt
        original(self, *arguments)

    original = writer.DatasetWriter.close_item
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.DatasetWriter, "close_item", closing)
        converted(tmp_path, SCENES, **FEW)
    resumed = converted(tmp_path, SCENES, resume=True, **FEW)
    assert [row[0] for row in summary(resumed)] == DIFFERENT
    assert "left out, looks like an earlier episode: 3" in capsys.readouterr().err
    assert (resumed.root / LEFT_OUT).read_text().count("<figure>") == len(SCENES)


def test_episodes_of_text_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("first-1", "grey-1")
    kept = converted(tmp_path, names, max_text=0.5, kind=Scenes, size=96)
    assert [row[0] for row in summary(kept)] == ["first-1"]
    assert "left out, most frames are text: 1" in capsys.readouterr().err
    page = (kept.root / LEFT_OUT).read_text()
    assert "Most frames are text <small>(1)" in page and "1.2 s, 100% of the frames are text" in page
    assert kept.extra["max_text"] == 0.5


def test_films_of_a_camera_that_turns_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ("first-1", "pan-1", "pan-2", "grey-1")
    settings = {"kind": Scenes, "size": 96}
    kept = converted(tmp_path, names, max_camera_motion=0.8, **settings)
    assert [row[0] for row in summary(kept)] == ["first-1", "grey-1"]
    assert "left out, the camera moves: 2" in capsys.readouterr().err
    (path,) = (kept.root / EPISODES).rglob("*.parquet")
    assert all(0 <= share < 0.5 for share in pq.read_table(path)["camera_motion"].to_pylist())
    assert (
        "camera_motion"
        not in pq.read_table(
            next((converted(tmp_path, names, "all", **settings).root / EPISODES).rglob("*.parquet"))
        ).column_names
    )


def test_the_page_has_counts_and_a_few_examples(tmp_path: Path) -> None:
    names = (*(f"move-{number}" for number in range(10)), "still-<b>&", "bad-1", "tiny-1", "black-1")
    dataset = converted(tmp_path, names, min_motion=0.01, min_side=20, skip_bad=True)
    page = (dataset.root / LEFT_OUT).read_text()
    for part in (
        "10 episodes of 14 items",
        f"Kept <small>(10; the first {EXAMPLES})",
        "Nothing moves <small>(1)",
        "still-&lt;b&gt;&amp;",
        "1.2 s, motion 0.000",
        "Images too small <small>(1)",
        "16 x 16 pixels",
        "Damaged <small>(1)",
        "is damaged",
        "No camera shows anything <small>(1)",
    ):
        assert part in page, part
    assert page.count("<img") == EXAMPLES + 3 and "<b>" not in page and str(tmp_path) not in page
    assert LEFT_OUT in (dataset.root / "SHA256SUMS").read_text()


def listed(dataset: Dataset) -> dict[str, int]:
    """What the page shows as found while listing."""
    table = (dataset.root / LEFT_OUT).read_text().partition("Found while listing")[2].partition("<h2>")[0]
    return {name: int(count) for name, count in re.findall(r'<th>(.*?)</th><td class="number">(\d+)', table)}


def test_a_browser_shows_the_page_without_any_other_file(tmp_path: Path) -> None:
    with browser() as tab:
        page = converted(tmp_path, ("move-1", "still-<b>&"), min_motion=0.01).root / LEFT_OUT
        tab.open(page.as_uri())
        assert tab.run("[...document.images].filter((image) => image.naturalWidth).length") == 2
        assert "still-<b>&" in tab.text("body")
        assert not tab.complaints and all(name == page.as_uri() or name.startswith("data:") for name in tab.requests)


def test_black_bars_are_cropped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    titled = converted(tmp_path, ("titled-1",), "titled", crop_bars=True)
    assert titled.frames(0)[30:, :1].mean() > 50
    assert "kept, black bars cropped: 1" in capsys.readouterr().err
    names = ("bars-1", "move-1")
    whole, cropped = converted(tmp_path, names), converted(tmp_path, names, "cropped", crop_bars=True)
    assert "kept, black bars cropped: 1" in capsys.readouterr().err
    assert whole.frames(0)[:, :1].mean() < 20
    assert cropped.frames(0)[:, :1].mean() > 50
    page = (cropped.root / LEFT_OUT).read_text()
    assert page.count(f"s, cropped to {2 * SIDE} x {SIDE - 8} of {2 * SIDE} x {SIDE} pixels") == 1
    assert np.array_equal(whole.frames(1), cropped.frames(1))
    with pytest.raises(ValueError, match="none of its 2 items became an episode"):
        converted(tmp_path, names, "small", crop_bars=True, min_side=SIDE + 1)
    kept = converted(tmp_path, names, "side", crop_bars=True, min_side=SIDE - 7)
    assert [row[0] for row in summary(kept)] == ["move-1"]


def test_an_item_of_which_one_camera_shows_nothing_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert [row[0] for row in summary(converted(tmp_path, ("dark-1", "black-1")))] == ["dark-1"]
    assert "no camera shows anything: 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of its 1 items became an episode"):
        converted(tmp_path, ("dark-1",), "front", camera=("front",))


def test_shots_become_episodes_of_all_cameras(tmp_path: Path) -> None:
    dataset = converted(tmp_path, ("cuts-1", "move-1"), cut_shots=True, with_actions=True, control="delta")
    page = (dataset.root / LEFT_OUT).read_text()
    assert 'items that are cut into shots</th><td class="number">1<' in page
    assert 'shots of these</th><td class="number">3<' in page
    assert [row[:2] for row in summary(dataset)] == [
        ("cuts-1#0000", 6),
        ("cuts-1#0001", 6),
        ("cuts-1#0002", 6),
        ("move-1", 12),
    ]
    assert dataset.actions(1)[:, 0].tolist() == [6, 7, 8, 9, 10, 11]
    for camera in dataset.cameras:
        assert abs(dataset.frames(1, [0], camera).mean() - 210) < 4
    assert converted(tmp_path, ("cuts-1",), "whole").lengths.tolist() == [18]


def test_images_that_are_too_small_are_those_of_the_item_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert [row[0] for row in summary(converted(tmp_path, ("move-1", "tiny-1"), min_side=20))] == ["move-1"]
    assert "images too small: 1" in capsys.readouterr().err
    assert len(converted(tmp_path, ("move-1", "tiny-1"), "all", min_side=16).lengths) == 2


@pytest.mark.parametrize("point", ["before", "moved", "added", "closed"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_kill_at_any_point_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, point: str, step: int
) -> None:
    whole = converted(tmp_path, NAMES, "whole", cut_shots=True)
    counted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert counted == ["warning: left out, no camera shows anything: 1", "warning: noted: 1"]
    kind = writer.DatasetWriter
    calls = 0

    def killing(patch: pytest.MonkeyPatch, name: str, after: bool) -> None:
        original = getattr(kind, name)

        def call(self: writer.DatasetWriter, *arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step and not after:
                raise KeyboardInterrupt
            result = original(self, *arguments, **settings)
            if calls == step and after:
                raise KeyboardInterrupt
            return result

        patch.setattr(kind, name, call)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        name = {"before": "add_episode_files", "moved": "_add", "added": "_add", "closed": "close_item"}[point]
        killing(patch, name, after=point in ("added", "closed"))
        converted(tmp_path, NAMES, cut_shots=True)
    with pytest.raises(ValueError, match="unfinished"):
        open_dataset(tmp_path / "out")
    capsys.readouterr()
    assert same(whole, converted(tmp_path, NAMES, cut_shots=True, resume=True))
    printed = capsys.readouterr().err
    assert all(line in printed for line in counted)


def test_a_killed_worker_loses_and_doubles_nothing(tmp_path: Path) -> None:
    whole = converted(tmp_path, NAMES, "whole", **FILTERS)
    # Not one of those that are read to look for repeated images.
    (tmp_path / "source" / "cuts-2.trap").write_text("")
    with pytest.raises(ValueError, match=r"worker process was killed.*--resume"):
        converted(tmp_path, NAMES, workers=2, **FILTERS)
    assert same(whole, converted(tmp_path, NAMES, resume=True, **FILTERS))


def test_a_killed_command_loses_and_doubles_nothing(tmp_path: Path) -> None:
    whole = converted(tmp_path, NAMES, "whole", **FILTERS)
    (tmp_path / "source" / "cuts-2.trap").write_text("")
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_convert\n"
        "if __name__ == '__main__':\n"
        f"    test_convert.converted(Path({str(tmp_path)!r}), {NAMES!r}, **{FILTERS!r})\n"
    )
    # One process reads and writes here: the trap kills all of the command.
    ended = subprocess.run([sys.executable, script], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    assert len((tmp_path / "out" / JOURNAL).read_text().splitlines()) > 4
    assert same(whole, converted(tmp_path, NAMES, resume=True, workers=2, **FILTERS))


def test_a_worker_that_outlives_its_killed_command_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = converted(tmp_path, NAMES, "whole")
    orphaned = []

    def noting(*arguments: Any) -> convert.ConvertedItem:
        orphaned.append(arguments[-1])
        return convert_item(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "convert_item", noting)
        patch.setattr(writer.DatasetWriter, "close_item", _interrupt)
        converted(tmp_path, NAMES)

    def late(*arguments: Any) -> convert.ConvertedItem:
        made = convert_item(*arguments)
        for video in (tmp_path / "out").glob(".incoming*/*.mp4"):
            other = orphaned[0].parent / video.name
            other.parent.mkdir(exist_ok=True)
            other.write_bytes(b"of another item")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert_item", late)
        resumed = converted(tmp_path, NAMES, resume=True)
    assert same(whole, resumed)
    assert not any(resumed.root.glob(".incoming*"))


def test_a_table_that_a_kill_left_half_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.DatasetWriter, "finish", _interrupt)
        converted(tmp_path, NAMES)
    leftover = tmp_path / "out/data/chunk-000/.file-000.77.partial.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"PAR1")
    dataset = converted(tmp_path, NAMES, resume=True)
    assert [path.name for path in dataset.root.glob("data/*/*")] == ["file-000.parquet"]


def test_a_line_that_a_kill_cut_short_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = converted(tmp_path, NAMES, "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.DatasetWriter, "finish", _interrupt)
        converted(tmp_path, NAMES)
    journal = tmp_path / "out" / JOURNAL
    lines = journal.read_bytes()
    for cut in (len(lines) - 3, lines.index(b"\n", len(lines) // 2) + 10):
        journal.write_bytes(lines[:cut])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(writer.DatasetWriter, "finish", _interrupt)
            converted(tmp_path, NAMES, resume=True)
        assert journal.read_bytes() == lines
    assert same(whole, converted(tmp_path, NAMES, resume=True))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_no_dataset_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = convert.encode_clip, 0

    def full(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(28, "No space left on device")
        return encode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(convert, "encode_clip", full)
        converted(tmp_path, NAMES)
    assert not (tmp_path / "out" / INFO).exists()
    assert same(converted(tmp_path, NAMES, resume=True), converted(tmp_path, NAMES, "whole"))


def test_a_resumed_command_needs_the_same_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.DatasetWriter, "finish", _interrupt)
        converted(tmp_path, NAMES)
    with pytest.raises(ValueError, match="begun with other settings"):
        converted(tmp_path, NAMES, resume=True, min_seconds=0.5)


def test_actions_at_a_lower_rate(tmp_path: Path) -> None:
    deltas = converted(tmp_path, ("move-1",), "delta", with_actions=True, control="delta", rate=5)
    assert (deltas.fps, deltas.lengths.tolist()) == (5.0, [6])
    assert deltas.actions(0).tolist() == [[1, 1], [5, 1], [9, 1], [13, 1], [17, 1], [21, 1]]
    assert deltas.states(0)[:, 0].tolist() == [0, 2, 4, 6, 8, 10]
    targets = converted(tmp_path, ("move-1",), "absolute", with_actions=True, control="absolute", rate=5)
    assert targets.actions(0)[:, 0].tolist() == [1, 3, 5, 7, 9, 11]
    with pytest.raises(ValueError, match=r"--rate 5: whether the actions .*--no-actions"):
        converted(tmp_path, ("move-1",), "unknown", with_actions=True, rate=5)
    assert converted(tmp_path, ("move-1",), "none", with_actions=True, rate=5, actions=False).action_dim is None
    with pytest.raises(ValueError, match=r"--rate 20: .* has 10 frames a second"):
        converted(tmp_path, ("move-1",), "more", rate=20)


def test_the_sum_of_deltas_survives_any_rate() -> None:
    space = ActionSpace.named(("x", "gripper"), ("gripper",), "delta")
    rng = np.random.default_rng(0)
    for length, rate in ((1, 3.0), (7, 3.0), (50, 9.9), (50, 4.0), (33, 10.0)):
        rows = np.stack([rng.normal(size=length), rng.integers(0, 2, length)], axis=1).astype(np.float32)
        slower = resample_rows(rows, 10.0, rate, space)
        assert np.allclose(slower[:, 0].sum(), rows[:, 0].sum(), atol=1e-4)
        assert set(slower[:, 1]) <= {0.0, 1.0}
        frames = resample(((number / 10, np.array(number)) for number in range(length)), rate)
        assert len(slower) == len(list(frames))


def test_lengths_that_differ_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uneven-1: camera side ends after 11 of 12 frames"):
        converted(tmp_path, ("uneven-1",))
    with pytest.raises(ValueError, match=r"fewer-1: action has 11 rows for 12 frames; they differ in length"):
        converted(tmp_path, ("fewer-1",), "fewer", with_actions=True, control="delta")


def test_numbers_and_times_that_are_wrong_are_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"with_actions": True, "control": "delta"}
    with pytest.raises(ValueError, match=r"nan-1: action is not finite at frame 7; .*--skip-bad"):
        converted(tmp_path, ("nan-1",), "nan", **settings)
    with pytest.raises(ValueError, match=r"backwards-1: its timestamps go backwards at frame 1"):
        converted(tmp_path, ("backwards-1",), "backwards", **settings)
    kept = converted(tmp_path, ("nan-1", "backwards-1", "move-1"), skip_bad=True, **settings)
    assert [row[0] for row in summary(kept)] == ["move-1"]
    assert "left out, damaged: 2" in capsys.readouterr().err


def test_times_that_run_backwards_or_leap_are_named() -> None:
    image = shade(10)
    assert len(list(in_time([(0.0, image), (0.1, image), (0.1, image)], "a"))) == 3
    for times, wrong in (
        ([0.0, 0.2, 0.1], r"a: its timestamps go backwards at frame 2 \(from 0\.200 to 0\.100 s\)"),
        ([0.0, 1e9], "a: its timestamps leap at frame 1"),
        ([0.0, float("nan")], "a: its timestamps leap at frame 1"),
    ):
        with pytest.raises(ValueError, match=wrong):
            list(in_time([(seconds, image) for seconds in times], "a"))


def test_two_items_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"move-1: two items have this name"):
        converted(tmp_path, ("move-1", "move-1"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"size": 15}, "--size 15: must be an even"),
        ({"limit": 0}, "--limit 0"),
        ({"min_seconds": -1}, "--min-seconds -1: cannot be below 0"),
        ({"min_motion": float("nan")}, "--min-motion nan"),
        ({"max_frozen": 0.0}, "--max-frozen 0: is a share of the frames"),
        ({"max_text": 1.5}, "--max-text 1.5: is a share of the frames"),
        ({"max_camera_motion": 1.5}, "--max-camera-motion 1.5: is a share of the change"),
        ({"camera": ("frnt",)}, "unknown camera 'frnt'; did you mean 'front'"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        converted(tmp_path, ("move-1",), **settings)
    assert not (tmp_path / "out").exists()


def test_where_nothing_becomes_an_episode_the_folder_stays_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of its 1 items became an episode"):
        converted(tmp_path, ("black-1",))
    assert not any((tmp_path / "out").iterdir())
    assert len(converted(tmp_path, ("move-1",)).lengths) == 1


def test_the_fingerprint_of_items_is_that_of_their_list() -> None:
    items = [Item("a", (), "lift the \u0142"), Item("b", (), "", 3)]
    for its in (items, items[:1], []):
        whole = json.dumps([[item.key, item.instruction, item.length] for item in its])
        assert convert._fingerprint(its) == hashlib.sha256(whole.encode()).hexdigest()[:16]


def test_a_limit_counts_items(tmp_path: Path) -> None:
    assert [row[0] for row in summary(converted(tmp_path, NAMES, limit=2))] == ["move-1", "cuts-1"]
