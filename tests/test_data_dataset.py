"""Datasets on disk: written and read back, LeRobot's layout, kills and full disks, damage, action spaces."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from lapa.data.config import InfoConfig
from lapa.data.dataset import ActionSpace, Dataset, common_action_space, read_action_space
from lapa.data.info import run as run_info
from lapa.data.info import summary
from lapa.data.metadata import EXTRA, INFO, JOURNAL
from lapa.data.spec import open_dataset
from lapa.data.statistics import Moments, moments_by_episode, moments_of
from lapa.data.tables import Texts
from lapa.data.video import encode_clip, frame_times
from lapa.data.writer import DatasetWriter
from lapa.engine.batches import _copied
from lapa.errors import UserError
from lapa.sources.synthetic import CAMERA, SyntheticConfig, write_synthetic_dataset
from lapa.sources.synthetic import run as run_synthetic

pytestmark = pytest.mark.usefixtures("edited_datasets")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_synthetic_dataset(tmp_path_factory.mktemp("square") / "d", episodes=4, frames=12, actions=True)


def grey(num: int, level: int = 100) -> np.ndarray:
    return np.full((num, 32, 32, 3), level, np.uint8)


def writer(root: Path, **changes) -> DatasetWriter:
    settings = {"fps": 10, "cameras": {"front": (32, 32)}, "action_names": ["x", "y"], **changes}
    return DatasetWriter(root, **settings)


def test_numbers_and_images_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    actions = [rng.normal(size=(n, 2)).astype(np.float32) for n in (5, 3)]
    writing = writer(tmp_path / "d", state_names=["s"])
    for number, values in enumerate(actions):
        frames = grey(len(values), 60 + 80 * number)
        writing.add_episode(
            {"front": frames}, f"task {number}", actions=values, states=values[:, :1], source=f"s{number}"
        )
    dataset = writing.finish()
    assert (dataset.action_dim, dataset.state_dim, dataset.num_frames, dataset.fps) == (2, 1, 8, 10.0)
    assert [episode.instruction for episode in dataset.episodes] == ["task 0", "task 1"]
    assert [episode.source for episode in dataset.episodes] == ["s0", "s1"]
    for number, values in enumerate(actions):
        assert (dataset.actions(number) == values).all()
        assert (dataset.states(number) == values[:, :1]).all()
        assert np.abs(dataset.frames(number).astype(int) - (60 + 80 * number)).max() <= 4
    assert dataset.image_shape() == (32, 32)
    assert not (tmp_path / "d" / JOURNAL).exists()


def test_a_dataset_is_a_sequence_of_episodes(square: Dataset) -> None:
    assert len(square) == 4 == len(list(square))
    assert square[0] == square.episodes[0] and square[-1] == square.episodes[3]
    assert (square[1].index, square[1].length, square[1].instruction) == (1, 12, "move up-right")
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"has 4 episodes, no episode {index}"):
            square[index]
        with pytest.raises(IndexError, match=f"has 4 episodes, no episode {index}"):
            square.frames(index)
    assert (square.actions(-1) == square.actions(3)).all() and (square.frames(-1) == square.frames(3)).all()
    shown = "4 episodes; 48 frames at 10 fps; cameras front 64x64; action_dim 2; state_dim 2"
    assert repr(square) == f"<LeRobotDataset {square.name} at {square.root}; {shown}>"


def test_the_layout_is_lerobots(square: Dataset) -> None:
    info = json.loads((square.root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 48, 4)
    assert info["splits"] == {"train": "0:4"}
    assert info["features"]["observation.images.front"]["info"]["video.height"] == 64
    rows = pq.read_table(square.root / "data/chunk-000/file-000.parquet")
    assert rows.schema.field("action").type == pa.list_(pa.float32(), 2)
    assert rows.schema.field("timestamp").type == pa.float32()
    assert rows["index"].to_pylist() == list(range(48))
    assert rows["frame_index"].to_pylist() == list(range(12)) * 4
    episodes = pq.read_table(square.root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["dataset_from_index"] for row in episodes] == [0, 12, 24, 36]
    assert episodes[1]["videos/observation.images.front/to_timestamp"] == pytest.approx(1.2)
    assert episodes[1]["tasks"] == ["move up-right"]
    assert np.shape(episodes[0]["stats/observation.images.front/mean"]) == (3, 1, 1)
    stats = json.loads((square.root / "meta/stats.json").read_text())
    everything = np.concatenate([square.actions(number) for number in range(4)])
    assert stats["action"]["mean"] == pytest.approx(everything.mean(axis=0), abs=1e-5)
    assert stats["action"]["std"] == pytest.approx(everything.std(axis=0), abs=1e-5)
    assert stats["action"]["count"] == [48]


def test_pandas_reads_the_tasks_as_an_index(square: Dataset) -> None:
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(square.root / "meta/tasks.parquet")
    assert list(tasks.index) == list(square.tasks)
    assert tasks.loc["move up"].task_index == 2


def test_video_without_actions_has_no_action_feature(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(tmp_path / "d", episodes=2, frames=4)
    assert dataset.action_dim is None
    assert "action" not in dataset.features
    assert dataset.states(0) is None
    with pytest.raises(ValueError, match="has no actions"):
        dataset.actions(0)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (50, 4))
    merged = Moments()
    for part in (rows[:7], rows[7:8], rows[8:]):
        moments = Moments()
        moments.add(part)
        merged.merge(moments.to_dict())
    values = merged.to_dict()
    assert values["mean"] == pytest.approx(rows.mean(axis=0))
    assert values["std"] == pytest.approx(rows.std(axis=0))
    assert values["max"] == pytest.approx(rows.max(axis=0))
    assert values["count"] == [50]


def test_statistics_by_episode_are_those_of_each() -> None:
    rng, lengths = np.random.default_rng(0), np.array([3, 1, 7])
    parts = [rng.normal(5, 2, length) for length in lengths]
    found = moments_by_episode(np.concatenate(parts), lengths)
    for number, part in enumerate(parts):
        for name, values in moments_of(part[:, None]).items():
            assert found[name][number] == pytest.approx(values, abs=1e-12)
    merged = Moments()
    merged.merge(found)
    for name, values in moments_of(np.concatenate(parts)[:, None]).items():
        assert merged.to_dict()[name] == pytest.approx(values)


def test_a_million_texts_are_no_objects_and_are_shared() -> None:
    texts = Texts(pa.chunked_array([["a", "b"], ["c"]]))
    assert (len(texts), texts[1], texts[-1], list(texts)) == (3, "b", "c", ["a", "b", "c"])
    assert texts[np.array([2, 0])] == ("c", "a") and texts != ("a", "b")
    assert pickle.loads(pickle.dumps(texts)) == texts
    assert _copied({"texts": texts})["texts"] is texts


def test_episodes_that_share_files_are_read_as_lerobot_writes_them(square: Dataset, tmp_path: Path) -> None:
    """One mp4 with all episodes, several chunks of data and metadata, an unnamed pandas index, lists of any length."""
    root = tmp_path / "shared"
    shutil.copytree(square.root, root)
    shutil.rmtree(root / "videos")
    frames = np.concatenate([square.frames(number) for number in range(4)])
    key = "observation.images.front"
    encode_clip(root / f"videos/{key}/chunk-000/file-000.mp4", frames, square.fps, keyframe_interval=12)
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet")
    loose = rows["action"].cast(pa.list_(pa.float32()))
    rows = rows.set_column(rows.schema.get_field_index("action"), "action", loose)
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for number, row in enumerate(episodes):
        row.update({f"videos/{key}/file_index": 0, f"videos/{key}/from_timestamp": number * 1.2})
        row.update({"data/chunk_index": number // 2, "meta/episodes/chunk_index": number // 2})
        del row["source"]
    for chunk in (0, 1):
        for folder, table in (
            ("data", rows[24 * chunk : 24 * chunk + 24]),
            ("meta/episodes", episodes[2 * chunk : 2 * chunk + 2]),
        ):
            path = root / folder / f"chunk-00{chunk}" / "file-000.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table if folder == "data" else pa.Table.from_pylist(table), path)
    tasks = pq.read_table(root / "meta/tasks.parquet").rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(tasks.replace_schema_metadata(None), root / "meta/tasks.parquet")
    shared = open_dataset(root)
    assert shared.tasks == square.tasks
    for number in (3, 0, 2, 1):
        assert (shared.actions(number) == square.actions(number)).all()
        apart = shared.frames(number, [11, 0, 5]).astype(int) - square.frames(number, [11, 0, 5])
        assert np.abs(apart).mean() < 4


def test_a_pickled_dataset_reads_on(square: Dataset) -> None:
    square.actions(0)
    square.frames(0, [1])
    copy = pickle.loads(pickle.dumps(square))
    assert (copy.frames(1, [3]) == square.frames(1, [3])).all()
    assert (copy.actions(2) == square.actions(2)).all()


def test_a_killed_writer_goes_on_where_it_was(tmp_path: Path) -> None:
    actions = np.ones((4, 2), np.float32)
    killed = writer(tmp_path / "d")
    for number in range(2):
        killed.add_episode({"front": grey(4)}, "task", actions=actions * number, source=f"s{number}")
    # As a kill -9 leaves it: an mp4 without its line, and half a line.
    encode_clip(killed.video_path("front", 2), grey(9), 10)
    with (tmp_path / "d" / JOURNAL).open("a") as journal:
        journal.write('{"source": "s2", "instruc')
    with pytest.raises(ValueError, match=r"unfinished dataset.*--resume"):
        open_dataset(tmp_path / "d")
    resumed = writer(tmp_path / "d", resume=True)
    assert resumed.done_sources == {"s0", "s1"}
    resumed.add_episode({"front": grey(4)}, "task", actions=actions * 2, source="s2")
    dataset = resumed.finish()
    assert [episode.source for episode in dataset.episodes] == ["s0", "s1", "s2"]
    assert [dataset.actions(number)[0, 0] for number in range(3)] == [0, 1, 2]
    assert dataset.frames(2).shape[0] == 4


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    writer(tmp_path / "d")
    with pytest.raises(ValueError, match="other settings"):
        writer(tmp_path / "d", fps=20, resume=True)
    with pytest.raises(ValueError, match="other settings"):
        writer(tmp_path / "d", extra_info={"seed": 1}, resume=True)


def test_an_interrupted_synthetic_dataset_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SyntheticConfig(tmp_path / "whole", episodes=4, frames=5, size=32)
    run_synthetic(config)
    cut, add_episode = replace(config, out=tmp_path / "cut"), DatasetWriter.add_episode

    def dies(self, *arguments, **named):
        if self.num_episodes == 2:
            raise KeyboardInterrupt
        return add_episode(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DatasetWriter, "add_episode", dies)
        run_synthetic(cut)
    with pytest.raises(ValueError, match="--resume to go on"):
        run_synthetic(cut)
    with pytest.raises(ValueError, match="other settings"):
        run_synthetic(replace(cut, seed=1, resume=True))
    for _ in range(2):
        run_synthetic(replace(cut, resume=True))
    whole, resumed = open_dataset(config.out), open_dataset(cut.out)
    assert resumed.fingerprint == whole.fingerprint
    assert (resumed.frames(3) == whole.frames(3)).all()


def test_a_full_disk_leaves_only_whole_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = np.ones((4, 2), np.float32)
    writing = writer(tmp_path / "d")
    writing.add_episode({"front": grey(4)}, "task", actions=actions, source="s0")
    journal = (tmp_path / "d" / JOURNAL).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            writing.add_episode({"front": grey(4)}, "task", actions=actions, source="s1")
        with pytest.raises(OSError, match="No space"):
            writing._journal.append({"source": "s1"}, sync=True)
        with pytest.raises(OSError, match="No space"):
            writing.finish()
    assert (tmp_path / "d" / JOURNAL).read_bytes() == journal
    assert not (tmp_path / "d" / INFO).exists()
    assert not list((tmp_path / "d").rglob("*.partial*"))
    resumed = writer(tmp_path / "d", resume=True)
    resumed.add_episode({"front": grey(4)}, "task", actions=actions, source="s1")
    assert len(resumed.finish().episodes) == 2


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.full((4, 2), np.nan), "action is not finite at frame 0"),
        (np.zeros((4, 3)), r"action has shape \(4, 3\), expected \(frames, 2\)"),
        (np.zeros((5, 2)), "lengths differ"),
        (None, "action is missing"),
        ([["x", "y"]] * 4, "action is no array of numbers"),
    ],
)
def test_bad_actions_are_refused(tmp_path: Path, actions: np.ndarray | None, message: str) -> None:
    writing = writer(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        writing.add_episode({"front": grey(4)}, "task", actions=actions, source="s0")
    assert writing.num_episodes == 0


def test_images_of_pillow_are_taken(tmp_path: Path) -> None:
    writing = writer(tmp_path / "d", action_names=None)
    writing.add_episode({"front": [Image.fromarray(image) for image in grey(3, 90)]}, "task")
    assert np.abs(writing.finish().frames(0).astype(int) - 90).max() <= 4


@pytest.mark.parametrize("line", ["{", "[1]", "[" * 100_000])
def test_a_damaged_journal_is_named(tmp_path: Path, line: str) -> None:
    writer(tmp_path / "d")
    with (tmp_path / "d" / JOURNAL).open("a") as journal:
        journal.write(f"{line}\n")
    with pytest.raises(UserError, match=r"journal\.jsonl: is damaged .*--overwrite to start anew"):
        writer(tmp_path / "d", resume=True)


def test_bad_images_are_refused(tmp_path: Path) -> None:
    writing = writer(tmp_path / "d", action_names=None)
    with pytest.raises(ValueError, match="frame 0 of front"):
        writing.add_episode({"front": np.zeros((2, 16, 16, 3), np.uint8)}, "task")
    with pytest.raises(ValueError, match="has cameras"):
        writing.add_episode({"side": grey(2)}, "task")
    with pytest.raises(ValueError, match="no episode was written"):
        writing.finish()
    with pytest.raises(ValueError, match="must be even"):
        writer(tmp_path / "odd", cameras={"front": (33, 32)})


def test_what_is_wrong_with_a_folder_is_named(square: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such dataset folder"):
        open_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="not a dataset"):
        open_dataset(tmp_path)
    old = tmp_path / "old"
    shutil.copytree(square.root, old)
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v4.0"}))
    with pytest.raises(ValueError, match=r"v4\.0, v3\.0, v2\.1, v2\.0 are read; update lapa"):
        open_dataset(old)
    (old / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_dataset(old)


def test_damaged_tables_are_named(square: Dataset, tmp_path: Path) -> None:
    root = tmp_path / "d"
    shutil.copytree(square.root, root)
    data = root / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(data)
    pq.write_table(rows[:40], data)
    assert len(open_dataset(root).actions(0)) == 12
    with pytest.raises(ValueError, match=r"file-000\.parquet: lacks rows of episode 3"):
        open_dataset(root).actions(3)
    broken = rows["action"].to_pylist()
    broken[13][1] = float("nan")
    index = rows.schema.get_field_index("action")
    pq.write_table(rows.set_column(index, "action", pa.array(broken, pa.list_(pa.float32(), 2))), data)
    with pytest.raises(ValueError, match="action of episode 1 is not finite at frame 1"):
        open_dataset(root).actions(1)
    narrow = pa.array([[1.0]] * 48, pa.list_(pa.float32(), 1))
    pq.write_table(rows.set_column(index, "action", narrow), data)
    with pytest.raises(ValueError, match=r"file-000\.parquet: action of episode 1 is 1 numbers wide, 2 in meta/info"):
        open_dataset(root).actions(1)
    data.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"file-000\.parquet: cannot be read"):
        open_dataset(root).actions(0)
    (root / "meta/tasks.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tasks\.parquet: cannot be read"):
        open_dataset(root)


def test_wrong_names_are_corrected(square: Dataset) -> None:
    with pytest.raises(ValueError, match="did you mean 'front'"):
        square.frames(0, [0], "frnt")
    with pytest.raises(ValueError, match="has frames 0 to 11"):
        square.frames(0, [12])
    assert square.frames(0, [3], CAMERA).shape == (1, 64, 64, 3)


def test_many_episodes_span_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapa.data.writer.CHUNK_SIZE", 2)
    monkeypatch.setattr("lapa.data.writer.ROWS_PER_FILE", 5)
    monkeypatch.setattr("lapa.data.writer.EPISODES_PER_GROUP", 2)
    writing = writer(tmp_path / "d")
    for number in range(5):
        writing.add_episode({"front": grey(3, 40 * number)}, "task", actions=np.full((3, 2), number))
    dataset = writing.finish()
    assert dataset.video_path(4).parent.name == "chunk-002"
    assert [dataset.actions(number)[0, 0] for number in range(5)] == [0, 1, 2, 3, 4]
    assert [round(dataset.frames(number, [1]).mean() / 40) for number in range(5)] == [0, 1, 2, 3, 4]


def test_a_dataset_is_called_by_its_folder(square: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(square.root)
    assert open_dataset(".").name == square.name == square.root.name


@pytest.mark.parametrize("camera", ["../x", "a/b", "/x", "..", ".", "", "a\0b", "a\x1b[2J", "x" * 201, "a\\b"])
def test_a_camera_is_no_path(tmp_path: Path, camera: str) -> None:
    with pytest.raises(UserError, match="camera") as error:
        writer(tmp_path / "d", cameras={"front": (32, 32), camera: (32, 32)})
    assert str(error.value).isprintable() and not list(tmp_path.iterdir())


def test_info_draws_a_contact_sheet(square: Dataset, tmp_path: Path) -> None:
    run_info(InfoConfig(str(square.root), sheet=tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_info_shows_what_made_the_dataset(square: Dataset, capsys: pytest.CaptureFixture) -> None:
    Console(width=200).print(summary(square))
    assert "lapa data synthetic: episodes 4, frames 12, seed 0" in capsys.readouterr().out


def test_info_does_not_claim_actions_of_a_dataset_without(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A converted dataset notes the command's option, which is on by default."""
    noted = {"made_by": "lapa data videos", "actions": True, "size": 16}
    Console(width=200).print(summary(arm(tmp_path / "clips", names=None, extra_info=noted)))
    shown = capsys.readouterr().out
    assert "none (video only)" in shown and "lapa data videos: size 16" in shown and "True" not in shown


def arm(root: Path, names: tuple[str, ...] | None = ("x", "gripper"), **declared) -> Dataset:
    """A dataset of one short episode."""
    writer = DatasetWriter(root, fps=10, cameras={"front": (16, 16)}, action_names=names, **declared)
    actions = None if names is None else np.zeros((3, len(names)), np.float32)
    writer.add_episode({"front": np.full((3, 16, 16, 3), 90, np.uint8)}, "wait", actions=actions)
    return writer.finish()


def test_what_is_declared_comes_back_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = arm(tmp_path / "d", binary_actions=("gripper",), control="delta")
    assert dataset.action_space == ActionSpace(("x", "gripper"), (False, True), "delta")
    assert open_dataset(dataset.root).action_space == dataset.action_space
    Console(width=200).print(summary(dataset))
    assert "2 numbers: x, gripper (binary); delta control" in capsys.readouterr().out


def test_nothing_declared_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    plain = arm(tmp_path / "plain")
    assert plain.action_space == ActionSpace(("x", "gripper"), (False, False), None)
    assert plain.extra == {}
    video = arm(tmp_path / "video", names=None, control="delta")
    assert video.action_space is None and video.extra == {}
    declared = arm(tmp_path / "declared", binary_actions=("gripper",), control="delta")
    assert declared.fingerprint == plain.fingerprint, "labels of a dataset outlive what is declared of its actions"
    assert (plain.root / INFO).read_bytes() == (declared.root / INFO).read_bytes()


def test_a_dataset_from_elsewhere_is_declared_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dataset = arm(tmp_path / "d")
    (dataset.root / EXTRA).unlink()
    assert open_dataset(dataset.root).action_space == ActionSpace(("x", "gripper"), (False, False))
    (dataset.root / EXTRA).write_text(json.dumps({"action_space": {"binary": ["gripper"], "control": "absolute"}}))
    opened = open_dataset(dataset.root)
    assert opened.action_space == ActionSpace(("x", "gripper"), (False, True), "absolute")
    Console(width=200).print(summary(opened))
    assert "absolute control" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"binary": ["griper"]}, r"unknown binary action dimension 'griper'; did you mean 'gripper'"),
        ({"binary": "gripper"}, r"`binary` must be a list of names"),
        ({"control": "relative"}, r"unknown control 'relative'.*known: delta, absolute"),
        ({"gripper": "binary"}, r"action_space must be like"),
        (["gripper"], r"action_space must be like"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, declared: object, message: str) -> None:
    dataset = arm(tmp_path / "d")
    (dataset.root / EXTRA).write_text(json.dumps({"action_space": declared}))
    with pytest.raises(ValueError, match=rf"meta/lapa\.json: {message}"):
        _ = open_dataset(dataset.root).action_space


def test_a_mistake_in_code_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'gripper'"):
        arm(tmp_path / "d", binary_actions=("griper",))
    with pytest.raises(ValueError, match="unknown control 'position'"):
        arm(tmp_path / "d", control="position")
    with pytest.raises(ValueError, match="2 action names and 1 flags"):
        ActionSpace(("x", "y"), (True,))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["x", "gripper"], ("x", "gripper")),
        ({"motors": ["shoulder", "elbow"]}, ("shoulder", "elbow")),
        ({"left": ["a"], "right": ["b"]}, ("a", "b")),
        ({"gripper": 1, "x": 0}, ("x", "gripper")),
        (["x"], ("action_0", "action_1")),
        (None, ("action_0", "action_1")),
        ({"motors": 3}, ("action_0", "action_1")),
        ("xy", ("action_0", "action_1")),
    ],
)
def test_names_are_read_as_lerobot_writes_them(names: object, read: tuple[str, ...]) -> None:
    assert read_action_space({"shape": [2], "names": names}, {}, "here").names == read


def test_synthetic_actions_are_velocities(tmp_path: Path) -> None:
    dataset = write_synthetic_dataset(tmp_path / "d", episodes=1, frames=3, actions=True)
    assert dataset.action_space == ActionSpace(("right", "down"), (False, False), "delta")


def test_datasets_of_one_robot_have_one_action_space(tmp_path: Path) -> None:
    first = arm(tmp_path / "a")
    second = arm(tmp_path / "b", names=("dx", "grip"), control="absolute")
    assert common_action_space([first]) == first.action_space
    assert common_action_space([first, second]) == ActionSpace(("x", "gripper"), (False, False), "absolute")


def test_what_datasets_differ_in_is_named(tmp_path: Path) -> None:
    switch = arm(tmp_path / "switch", binary_actions=("gripper",), control="delta")
    for other, message in (
        (arm(tmp_path / "wide", names=("x", "y", "gripper")), r"wide: has actions of 3 dimensions \(x, y, gripper\)"),
        (arm(tmp_path / "plain"), r"plain: declares nothing binary, .*switch gripper; correct"),
        (
            arm(tmp_path / "absolute", binary_actions=("gripper",), control="absolute"),
            r"differ in control: .*switch delta, .*absolute absolute",
        ),
        (arm(tmp_path / "video", names=None), r"video: has no actions"),
    ):
        with pytest.raises(ValueError, match=message):
            common_action_space([switch, other])
    with pytest.raises(ValueError, match="no dataset"):
        common_action_space([])


@pytest.mark.parametrize("place", ["disk", "store"])
def test_an_unfinished_dataset_is_not_begun_again_by_accident(place: str, tmp_path: Path) -> None:
    frames = {"front": np.zeros((3, 16, 16, 3), np.uint8)}
    settings = {"fps": 10, "cameras": {"front": (16, 16)}}
    root = tmp_path / "d" if place == "disk" else f"memory://{tmp_path.name}/d"
    begun = DatasetWriter(root, **settings)
    begun.add_episode(frames, "wait")
    begun.flush()
    with pytest.raises(UserError, match="holds an unfinished dataset; continue it"):
        DatasetWriter(root, **settings)
    writer = DatasetWriter(root, resume=True, **settings)
    # Half of a surrogate pair is no character.
    writer.add_episode(frames, "push \ud83d")
    assert [episode.instruction for episode in writer.finish()] == ["wait", "push \ufffd"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fps": 0}, "fps is 0, it must be above 0"),
        ({"fps": float("nan")}, "fps is nan, it must be above 0"),
        ({"cameras": {"front": (0, 16)}}, "camera front is 16x0; both must be even and above 0"),
    ],
)
def test_rates_and_sizes_of_nothing_are_refused(tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DatasetWriter(tmp_path / "d", **{"fps": 10, "cameras": {"front": (16, 16)}, **wrong})


def test_times_of_ntsc_rates_are_those_of_the_video_after_minutes(tmp_path: Path) -> None:
    """LeRobot takes a frame that is up to 0.1 ms away."""
    writer = DatasetWriter(tmp_path / "d", fps=29.97, cameras={"front": (16, 16)})
    writer.add_episode({"front": np.zeros((3600, 16, 16, 3), np.uint8)}, "wait")
    root = writer.finish().root
    (video,), (table,) = (list(root.rglob(pattern)) for pattern in ("*.mp4", "data/**/*.parquet"))
    written_T = pq.read_table(table)["timestamp"].to_numpy()
    assert np.abs(written_T - frame_times(video)).max() < 2e-5
