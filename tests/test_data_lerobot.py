"""LeRobot datasets: v2.1, images in tables, other names, the hub, conversion, and damage."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from check_lerobot import LENGTHS, made_up, write_robot, write_v21
from PIL import Image

from lapa.checksums import SUMS
from lapa.data.config import HideActionsConfig
from lapa.data.convert import run
from lapa.data.dataset import Dataset
from lapa.data.lerobot import require_folder
from lapa.data.metadata import EXTRA, INFO, TASKS, find_episodes
from lapa.data.pairs import FramePairs, PairsConfig
from lapa.data.replace_actions import run as hide_actions
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.data.tables import read_parquet
from lapa.data.video import encode_clip
from lapa.errors import UserError
from lapa.files import read_json, write_json
from lapa.sources.lerobot import SEVERAL_TASKS, LeRobotConfig, LeRobotReading

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
DATA = "data/chunk-000/file-000.parquet"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"
OLD_DATA = "data/chunk-000/episode_000001.parquet"

pytestmark = pytest.mark.usefixtures("edited_datasets")


@pytest.fixture(scope="module")
def robot(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_robot(tmp_path_factory.mktemp("lerobot") / "robot")


@pytest.fixture(scope="module")
def old(robot: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old") / "Ein Ordner — 数据"
    write_v21(robot, root)
    return root


def copied(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "d")
    return tmp_path / "d"


def with_images_in_tables(robot: Dataset, root: Path, rows_per_group: int = 5) -> Path:
    """The dataset as LeRobot writes it with `use_videos=False`: PNGs in the data file."""
    shutil.copytree(robot.root, root)
    shutil.rmtree(root / "videos")
    table = pq.read_table(root / DATA)
    for key, camera in ((FRONT, "front"), (WRIST, "wrist")):
        frames = [frame for number in range(len(LENGTHS)) for frame in made_up(number)[0][camera]]
        rows = [{"bytes": png(frame), "path": f"frame-{number:06d}.png"} for number, frame in enumerate(frames)]
        table = table.append_column(key, pa.array(rows))
    pq.write_table(table, root / DATA, row_group_size=rows_per_group)
    info = read_json(root / INFO)
    for key in (FRONT, WRIST):
        info["features"][key] = {"dtype": "image", "shape": info["features"][key]["shape"], "names": None}
    write_json(root / INFO, {**info, "video_path": None})
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    episodes = pq.read_table(path)
    pq.write_table(episodes.drop_columns([name for name in episodes.column_names if name.startswith("videos/")]), path)
    return root


def png(frame_HWC: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(frame_HWC).save(target, "PNG")
    return target.getvalue()


def change_rows(path: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(path)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)


def same(one: Dataset, other: Dataset) -> None:
    assert [(episode.length, episode.instruction) for episode in one.episodes] == [
        (episode.length, episode.instruction) for episode in other.episodes
    ]
    for episode in range(len(one.lengths)):
        for camera in one.cameras:
            assert np.array_equal(one.frames(episode, camera=camera), other.frames(episode, camera=camera))
        assert np.array_equal(one.actions(episode), other.actions(episode))
        assert np.array_equal(one.states(episode), other.states(episode))


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_old_versions_hold_what_the_new_one_does(robot: Dataset, old: Path, tmp_path: Path, version: str) -> None:
    root = copied(old, tmp_path)
    info = read_json(root / INFO)
    write_json(root / INFO, {**info, "codebase_version": version, "chunks_size": 2})
    for folder in ("data", f"videos/{FRONT}", f"videos/{WRIST}"):
        camera = folder.removeprefix("videos/")
        source = root / "data/chunk-000" if folder == "data" else root / "videos/chunk-000" / camera
        target = root / "data/chunk-001" if folder == "data" else root / "videos/chunk-001" / camera
        target.mkdir(parents=True)
        for path in source.glob("episode_000002.*"):
            path.rename(target / path.name)
    dataset = open_dataset(root)
    same(robot, dataset)
    assert dataset.tasks == robot.tasks
    assert (dataset.fps, dataset.image_shape("wrist"), dataset.name) == (30.0, (32, 64), "d")
    assert dataset.fingerprint == open_dataset(f"lerobot:{root}").fingerprint != robot.fingerprint


def test_images_in_tables_are_read_across_row_groups(robot: Dataset, tmp_path: Path) -> None:
    dataset = open_dataset(with_images_in_tables(robot, tmp_path / "d"))
    for episode in (2, 0, 1):
        frames = made_up(episode)[0]
        for camera in ("front", "wrist"):
            assert np.array_equal(dataset.frames(episode, camera=camera), frames[camera])
    assert np.array_equal(dataset.frames(1, [30, 0, 7], "wrist"), made_up(1)[0]["wrist"][[30, 0, 7]])
    assert np.array_equal(dataset.actions(1), robot.actions(1))


def test_names_and_shapes_come_in_several_forms(robot: Dataset, tmp_path: Path) -> None:
    root = copied(robot.root, tmp_path)
    info = read_json(root / INFO)
    features = info["features"]
    features[WRIST] |= {"shape": [3, 32, 64], "names": ["channels", "height", "width"]}
    features[FRONT] |= {"shape": [3, 64, 64], "names": None}
    for names in (
        {"axes": ["a", "b", "c"]},
        {"arm": ["a", "b"], "hand": ["c"], "head": []},
        {"a": 0, "c": 2, "b": 1},
        {"motors": {"a": 0, "c": 2, "b": 1}},
        ["a", "b", "c"],
        [["a", "b", "c"]],
        [["a"], ["b", "c"]],
    ):
        features["action"]["names"] = names
        write_json(root / INFO, info)
        dataset = open_dataset(f"lerobot:{root},control=absolute,binary=b+c")
        assert (dataset.image_shape("wrist"), dataset.image_shape("front")) == ((32, 64), (64, 64))
        assert dataset.action_space.names == ("a", "b", "c")
        assert (dataset.action_space.control, dataset.action_space.binary) == ("absolute", (False, True, True))


OTHER_NAMES = [None, [], ["a", "b"], [["a", "b"]], list("abcd"), ["a", "b", None], ["a", "b", 1.5], "abc", 3, True]
OTHER_NAMES += [[["a"], {}, "c"], ["a", "b", {"c": None}], {"a": None}, json.loads("[" * 50 + '"a"' + "]" * 50)]


@pytest.mark.parametrize("names", OTHER_NAMES)
def test_names_that_do_not_fit_are_replaced_by_numbers(robot: Dataset, tmp_path: Path, names: object) -> None:
    root = copied(robot.root, tmp_path)
    info = read_json(root / INFO)
    info["features"]["action"]["names"] = names
    write_json(root / INFO, info)
    (root / EXTRA).unlink()
    assert open_dataset(root).action_space.names == ("action_0", "action_1", "action_2")
    info["features"]["observation.state"]["names"] = ["x", "y"]
    write_json(root / INFO, info)
    assert LeRobotReading(str(root)).open().state_names == ("state_0",)


def rows_of(robot: Dataset) -> list[list[float]]:
    return pq.read_table(robot.root / DATA)["action"].to_pylist()


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([[0.1], [0.1, 0.2, 0.3, 0.4, 0.5]], "changes its width at frame 1"),
        ([[0.1, 0.2, 0.3], [], [0.1] * 6], "changes its width at frame 1"),
        ([[0.1, 0.2, 0.3], None, [0.1] * 6], "is empty at frame 1"),
        ([None], "is empty at frame 0"),
        ([[0.1, 0.2, 0.3], [0.1, None, 0.3]], "is empty at frame 1"),
        ([[0.1, float("nan"), 0.3]], "is not finite at frame 0"),
    ],
)
def test_rows_of_another_width_spoil_their_episode_alone(
    robot: Dataset, tmp_path: Path, first: list[list[float | None] | None], message: str
) -> None:
    """Numbers that add up to whole rows are no whole rows."""
    root, rows = copied(robot.root, tmp_path), rows_of(robot)
    table = pq.read_table(root / DATA)
    column = pa.array([*first, *rows[len(first) :]], pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), root / DATA)
    dataset = open_dataset(root)
    assert np.array_equal(dataset.actions(1), robot.actions(1))
    assert np.array_equal(dataset.states(0), robot.states(0))
    with pytest.raises(UserError, match=rf"{DATA}: action of episode 0 {message}; correct it or leave the episode out"):
        dataset.actions(0)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float16()),
        pa.list_(pa.float64(), 3),
        pa.large_list(pa.int16()),
        pa.list_(pa.uint64()),
        pa.list_(pa.bool_()),
        pa.list_(pa.decimal128(9, 3)),
        pa.list_(pa.list_(pa.float32(), 1)),
        pa.list_(pa.list_(pa.list_(pa.float32())), 1),
    ],
)
def test_numbers_are_read_from_every_type(robot: Dataset, tmp_path: Path, kind: pa.DataType) -> None:
    root = copied(robot.root, tmp_path)
    expected = (np.arange(47 * 3).reshape(47, 3) % 2).astype(np.float32)
    rows: list[Any] = expected.tolist()
    if kind == pa.list_(pa.list_(pa.float32(), 1)):
        rows = expected[:, :, None].tolist()
    elif kind == pa.list_(pa.list_(pa.list_(pa.float32())), 1):
        rows = expected[:, None, :, None].tolist()
    elif pa.types.is_decimal(kind.value_type):
        rows = [[Decimal(int(number)) for number in row] for row in rows]
    elif pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type):
        rows = [[kind.value_type.to_pandas_dtype()(number) for number in row] for row in rows]
    elif pa.types.is_float16(kind.value_type):
        rows = [[np.float16(number) for number in row] for row in rows]
    table = pq.read_table(root / DATA)
    column = pa.array(rows, kind)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), root / DATA)
    dataset = open_dataset(root)
    assert np.array_equal(np.concatenate([dataset.actions(episode) for episode in range(3)]), expected)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_an_empty_time_spoils_its_episode_alone(robot: Dataset, tmp_path: Path, value: float | None) -> None:
    root = copied(robot.root, tmp_path)
    change_rows(root / DATA, "timestamp", lambda rows: [*rows[:2], value, *rows[3:]])
    dataset = open_dataset(root)
    assert np.array_equal(dataset.frames(1), robot.frames(1))
    with pytest.raises(UserError, match=f"{DATA}: episode 0: timestamps are empty or not finite at frame 2"):
        dataset.frames(0)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_missing_list_of_tasks_is_no_loss_where_episodes_name_theirs(
    robot: Dataset, old: Path, tmp_path: Path, version: str
) -> None:
    root = copied(robot.root if version == "v3.0" else old, tmp_path)
    tasks = root / (TASKS if version == "v3.0" else "meta/tasks.jsonl")
    whole = open_dataset(root).fingerprint
    tasks.unlink()
    dataset = open_dataset(root)
    same(dataset, robot)
    assert len({whole, dataset.fingerprint}) == 2
    if version == "v3.0":
        with pytest.raises(UserError, match=r"needs meta/tasks\.parquet, which is missing; `lapa data lerobot"):
            hide_actions(HideActionsConfig(data=str(root), out=tmp_path / "hidden"))
        change_rows(root / EPISODES_FILE, "tasks", lambda rows: [rows[0], [], rows[2]])
        with pytest.raises(UserError, match=r"tasks\.parquet: no such file, and not all episodes name"):
            open_dataset(root)


DEPTH_FORMS = [
    {"info": {"video.is_depth_map": True}},
    {"info": None, "video_info": {"is_depth_map": True}},
    {"shape": [32, 64, 1]},
    {"shape": [1, 32, 64], "names": ["channel", "height", "width"]},
    {"shape": [32, 64], "names": None},
    {"info": {"video.channels": 1}},
    {"info": {"video.pix_fmt": "gray16le", "video.is_depth_map": False}},
]


@pytest.mark.parametrize("form", DEPTH_FORMS)
def test_depth_maps_are_no_cameras(robot: Dataset, tmp_path: Path, form: dict[str, Any], capsys) -> None:
    root = copied(robot.root, tmp_path)
    info = read_json(root / INFO)
    features = info["features"]
    features[WRIST] |= form
    # The first of the cameras would be the default.
    info["features"] = {WRIST: features[WRIST], **features}
    write_json(root / INFO, info)
    shutil.rmtree(root / "videos" / WRIST)
    dataset = open_dataset(root)
    assert dataset.cameras == ("front",)
    assert np.array_equal(dataset.frames(0), robot.frames(0))
    assert f"1 depth or grey cameras left out: {WRIST}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="camera 'wrist'"):
        dataset.frames(0, camera="wrist")
    hide_actions(HideActionsConfig(data=str(root), out=tmp_path / "hidden"))
    assert WRIST not in open_dataset(tmp_path / "hidden").features
    write_json(root / INFO, {**info, "features": {key: its for key, its in info["features"].items() if key != FRONT}})
    with pytest.raises(ValueError, match=rf"info\.json: has no camera \(only depth or grey images \({WRIST}\)\)"):
        open_dataset(root)


def test_depth_is_known_by_its_name_and_by_its_bits(robot: Dataset, tmp_path: Path) -> None:
    root = with_images_in_tables(robot, tmp_path / "d")
    deep = np.linspace(600, 5000, 32 * 64).reshape(32, 64).astype(np.uint16)
    change_rows(root / DATA, WRIST, lambda rows: [{"bytes": png(deep), "path": "x"} for _ in rows])
    assert open_dataset(root).cameras == ("front",)
    info = read_json(root / INFO)
    name = "observation.images.wrist_depth"
    info["features"][name] = info["features"].pop(WRIST)
    write_json(root / INFO, info)
    assert open_dataset(root).cameras == ("front",)
    change_rows(root / DATA, FRONT, lambda rows: [{"bytes": png(deep), "path": "x"} for _ in rows])
    with pytest.raises(ValueError, match=r"has no camera \(only depth or grey images \("):
        open_dataset(root)


def test_features_of_other_names_are_read_under_their_own(robot: Dataset, tmp_path: Path) -> None:
    root = copied(robot.root, tmp_path)
    info = read_json(root / INFO)
    info["features"]["actions"] = info["features"].pop("action")
    write_json(root / INFO, info)
    table = pq.read_table(root / DATA)
    names = ["actions" if name == "action" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), root / DATA)
    assert open_dataset(root).action_dim is None
    dataset = open_dataset(f"lerobot:{root},action-key=actions,camera=wrist+front")
    assert np.array_equal(dataset.actions(1), robot.actions(1))
    assert dataset.cameras == ("wrist", "front")
    assert np.array_equal(dataset.frames(0), robot.frames(0, camera="wrist"))
    with pytest.raises(ValueError, match="did you mean 'actions'"):
        open_dataset(f"lerobot:{root},action_key=action_s")
    with pytest.raises(ValueError, match="action needs numbers"):
        open_dataset(f"lerobot:{root},action_key={FRONT}")
    with pytest.raises(ValueError, match="did you mean 'wrist'"):
        open_dataset(f"lerobot:{root},camera=wirst")
    with pytest.raises(ValueError, match="without options"):
        require_folder(dataset)


def test_conversion_upgrades_and_scales(robot: Dataset, old: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (old / "meta/episodes.jsonl").read_text().splitlines()]
    root = copied(old, tmp_path)
    rows[1]["tasks"].append("another task")
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LeRobotConfig(str(root), out=tmp_path / "new", size=32, camera=("wrist",), workers=1, control="delta")
    run(config)
    dataset = open_dataset(tmp_path / "new")
    assert dataset.info["codebase_version"] == "v3.0"
    assert (dataset.cameras, dataset.image_shape()) == (("wrist",), (32, 32))
    assert dataset.action_space.names == ("x", "y", "grip")
    assert dataset.action_space.control == "delta"
    assert dataset.extra["source_fingerprint"] == open_dataset(root).fingerprint
    assert [episode.instruction for episode in dataset.episodes] == [episode.instruction for episode in robot.episodes]
    for episode in range(len(LENGTHS)):
        assert np.array_equal(dataset.actions(episode), robot.actions(episode))
        assert np.array_equal(dataset.states(episode), robot.states(episode))
        expected = robot.frames(episode, camera="wrist")[:, :, 16:48]
        assert np.abs(dataset.frames(episode).astype(int) - expected).mean() < 3
    source = LeRobotReading(str(root)).open()
    assert [source.read(item).notes for item in source.items] == [(), (SEVERAL_TASKS,), ()]


def test_conversion_at_another_rate_needs_to_know_the_control(old: Path, tmp_path: Path) -> None:
    settings = {"out": tmp_path / "new", "size": 32, "camera": ("front",), "workers": 1, "rate": 15.0}
    with pytest.raises(ValueError, match="deltas or absolute is not known"):
        run(LeRobotConfig(str(old), **settings))
    run(LeRobotConfig(str(old), **settings, control="absolute"))
    dataset = open_dataset(tmp_path / "new")
    assert dataset.fps == 15.0
    # A target holds until the next tick, a state is what was measured at it.
    assert np.array_equal(dataset.actions(1), made_up(1)[1][[*range(1, 31, 2), 30]])
    assert np.array_equal(dataset.states(1), made_up(1)[2][::2])


def test_damaged_episodes_are_left_out_and_counted(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = copied(old, tmp_path)
    change_rows(root / OLD_DATA, "action", lambda rows: [[float("nan"), 0.0, 0.0], *rows[1:]])
    settings = {"size": 32, "camera": ("front",), "workers": 1}
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: action of episode 1 is not finite at frame 0"):
        run(LeRobotConfig(str(root), out=tmp_path / "a", **settings))
    run(LeRobotConfig(str(root), out=tmp_path / "b", skip_bad=True, **settings))
    assert len(open_dataset(tmp_path / "b").lengths) == 2
    assert re.search("left out, damaged.* 1", capsys.readouterr().err)
    run(LeRobotConfig(str(root), out=tmp_path / "c", actions=False, **settings))
    assert len(open_dataset(tmp_path / "c").lengths) == 3


def test_rewriting_refuses_what_it_cannot_keep(robot: Dataset, old: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs LeRobotDataset v3\.0, got v2\.1; `lapa data lerobot"):
        hide_actions(HideActionsConfig(data=str(old), out=tmp_path / "out"))
    images = with_images_in_tables(robot, tmp_path / "d")
    with pytest.raises(ValueError, match="needs cameras whose images are videos; `lapa data lerobot"):
        hide_actions(HideActionsConfig(data=str(images), out=tmp_path / "out"))
    assert require_folder(open_dataset(f"lerobot:{robot.root}")).root == robot.root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v1.6"}, r"is LeRobotDataset v1\.6.*convert it with LeRobot's own scripts"),
        ({"codebase_version": "v3.7"}, r"is LeRobotDataset v3\.7.*update lapa"),
        ({"codebase_version": None}, "lacks codebase_version"),
        ({"features": None}, "lacks features"),
        ({"features": {"action": {"dtype": "float32"}}}, "feature 'action' needs a dtype and a shape"),
        ({"features": {"action": {"dtype": "float32", "shape": [1]}}}, "has no camera"),
        ({"data_path": None}, "lacks data_path"),
        ({"video_path": None}, "lacks video_path"),
        ({"fps": None}, "lacks fps"),
        ({"fps": "ten"}, "fps must be a number above 0.* got 'ten'"),
        ({"fps": True}, "fps must be a number above 0.* got True"),
        ({"fps": 10**400}, "fps must be a number above 0"),
        ({"fps": float("nan")}, "NaN is no number of JSON"),
        ({"robot_type": float("nan")}, "NaN is no number of JSON"),
        ({"robot_type": "\ud800"}, "not valid JSON"),
        ({"fps": -3}, "fps must be a number above 0"),
        ({"fps": float("inf")}, "Infinity is no number of JSON"),
        ({"features": {"action": {"dtype": "float32", "shape": ["x"]}}}, "feature 'action' needs a dtype and a shape"),
        (
            {"features": {FRONT: {"dtype": "video", "shape": [3]}}},
            "feature .*front' is not as LeRobot describes images",
        ),
        ({"chunks_size": "x"}, "chunks_size must be a whole number above 0, got 'x'"),
        ({"data_path": "{chunk_index.x}"}, "may name chunk_index, file_index"),
        ({"data_path": 3}, "data_path is 3; it may name chunk_index"),
        ({"video_path": []}, r"video_path is \[\]; it may name chunk_index"),
        ({"data_path": "data/{episode}.parquet"}, "may name chunk_index, file_index"),
    ],
)
def test_what_is_wrong_with_info_is_named(robot: Dataset, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "meta").mkdir()
    info = {key: value for key, value in {**robot.info, **change}.items() if value is not None}
    (tmp_path / INFO).write_text(json.dumps(info))
    with pytest.raises(UserError, match=rf"meta/info\.json: .*{message}"):
        open_dataset(tmp_path)


def test_missing_files_are_counted_where_they_are_needed(old: Path, robot: Dataset, tmp_path: Path) -> None:
    root = copied(old, tmp_path)
    for number in (1, 2):
        (root / f"videos/chunk-000/{WRIST}/episode_{number:06d}.mp4").unlink()
    dataset = open_dataset(root)
    dataset.require_files(["front"])
    assert len(dataset.frames(0, [0], "wrist")) == 1
    with pytest.raises(ValueError, match=r"episode_000001\.mp4: no such file; 2 of 3 video files of .*wrist are"):
        dataset.require_files(["front", "wrist"])
    with pytest.raises(ValueError, match=r"2 of 3 video files of .*skip_bad=true"):
        FramePairs([dataset], PairsConfig(size=32, horizon=0.1, camera="wrist"))
    assert open_dataset(f"lerobot:{root},camera=front").cameras == ("front",)
    (root / OLD_DATA).unlink()
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: no such file; 1 of 3 data files are missing"):
        dataset.require_files(["front"])
    new = tmp_path / "new"
    shutil.copytree(robot.root, new)
    shutil.rmtree(new / "videos" / FRONT)
    with pytest.raises(ValueError, match=r"3 of 3 video files of observation\.images\.front are missing; download"):
        open_dataset(new).require_files(["front"])


def test_a_part_of_a_dataset_is_read(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A download lacks the files of some episodes and of a camera; numbers of deleted episodes are gaps."""
    root = copied(old, tmp_path)
    rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    rows[2]["episode_index"] = 7
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder, suffix in (("data/chunk-000", "parquet"), (f"videos/chunk-000/{FRONT}", "mp4")):
        (root / folder / f"episode_000002.{suffix}").rename(root / folder / f"episode_000007.{suffix}")
    last = root / "data/chunk-000/episode_000007.parquet"
    change_rows(last, "episode_index", lambda numbers: [7] * len(numbers))
    (root / f"videos/chunk-000/{FRONT}/episode_000001.mp4").unlink()
    shutil.rmtree(root / "videos/chunk-000" / WRIST)
    whole = open_dataset(old)

    part = open_dataset(f"lerobot:{root},camera=front,skip_bad=true")
    assert part.numbers.tolist() == [0, 7]
    assert part.fingerprint != open_dataset(root).fingerprint
    assert "left out: 1 of 3 episodes; the first: " in capsys.readouterr().err
    for index, episode in enumerate((0, 2)):
        assert part[index].instruction == whole[episode].instruction
        assert np.array_equal(part.frames(index), whole.frames(episode))
        assert np.array_equal(part.actions(index), whole.actions(episode))

    settings = {"size": 32, "camera": ("front",), "workers": 1}
    with pytest.raises(ValueError, match=r"episode_000001\.mp4: no such file; 1 of 3 video files"):
        run(LeRobotConfig(str(root), out=tmp_path / "a", **settings))
    run(LeRobotConfig(str(root), out=tmp_path / "b", skip_bad=True, **settings))
    converted = open_dataset(tmp_path / "b")
    assert [episode.source for episode in converted] == ["episode_000000", "episode_000007"]
    assert np.array_equal(converted.actions(1), whole.actions(2))
    run(LeRobotConfig(str(root), out=tmp_path / "c", limit=1, **settings))
    assert len(open_dataset(tmp_path / "c")) == 1

    change_rows(last, "action", lambda actions: [[float("nan")] * 3, *actions[1:]])
    with pytest.raises(ValueError, match=r"episode_000007\.parquet: action of episode 7 is not finite"):
        open_dataset(root).actions(2)


def test_numbers_with_gaps_are_read_and_kept_apart(robot: Dataset, tmp_path: Path) -> None:
    root = copied(robot.root, tmp_path)
    for file in (EPISODES_FILE, DATA):
        change_rows(root / file, "episode_index", lambda numbers: [(0, 4, 9)[number] for number in numbers])
    dataset = open_dataset(root)
    same(robot, dataset)
    assert dataset.numbers.tolist() == [0, 4, 9]
    hide_actions(HideActionsConfig(data=str(root), out=tmp_path / "hidden"))
    hidden = open_dataset(tmp_path / "hidden")
    assert np.array_equal(hidden.frames(2, [3]), robot.frames(2, [3]))
    assert hidden.numbers.tolist() == [0, 1, 2]


def test_a_total_that_is_wrong_is_said(robot: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = copied(robot.root, tmp_path)
    write_json(root / INFO, {**read_json(root / INFO), "total_episodes": 10})
    assert len(open_dataset(root)) == len(open_dataset(root)) == 3
    assert capsys.readouterr().err.count("total_episodes is 10; the 3 episodes that are listed are read") == 1


def test_metadata_of_a_camera_that_is_not_read_may_be_missing(robot: Dataset, tmp_path: Path) -> None:
    root = copied(robot.root, tmp_path)
    table = pq.read_table(root / EPISODES_FILE)
    of_wrist = [name for name in table.column_names if name.startswith(f"videos/{WRIST}")]
    pq.write_table(table.drop_columns(of_wrist), root / EPISODES_FILE)
    shutil.rmtree(root / "videos" / WRIST)
    assert np.array_equal(open_dataset(f"lerobot:{root},camera=front").frames(1), robot.frames(1))
    dataset = open_dataset(root)
    assert np.array_equal(dataset.frames(1), robot.frames(1))
    for read in (lambda: dataset.frames(1, camera="wrist"), lambda: dataset.require_files(["wrist"])):
        with pytest.raises(ValueError, match=rf"lacks the columns videos/{WRIST}/chunk_index, .*choose other cameras"):
            read()
    run(LeRobotConfig(str(root), out=tmp_path / "out", camera=("front",), size=32, workers=1))
    assert len(open_dataset(tmp_path / "out")) == 3


TASK_FORMS = {
    "text": lambda row: {**row, "tasks": row["tasks"][0]},
    "absent": lambda row: {key: value for key, value in row.items() if key != "tasks"},
    "empty": lambda row: {**row, "tasks": ["", " "]},
    "null": lambda row: {**row, "tasks": None},
    "index": lambda row: {**row, "tasks": [row["episode_index"] % 2]},
}


@pytest.mark.parametrize("form", TASK_FORMS)
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_instructions_are_read_in_every_form(
    robot: Dataset, old: Path, tmp_path: Path, version: str, form: str
) -> None:
    change = TASK_FORMS[form]
    if version == "v2.1":
        root = copied(old, tmp_path)
        rows = [json.loads(line) for line in (old / "meta/episodes.jsonl").read_text().splitlines()]
        (root / "meta/episodes.jsonl").write_text("".join(json.dumps(change(row)) + "\n" for row in rows))
    else:
        root = copied(robot.root, tmp_path)
        rows = [change(row) for row in pq.read_table(root / EPISODES_FILE).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows), root / EPISODES_FILE)
    assert [episode.instruction for episode in open_dataset(root)] == [episode.instruction for episode in robot]


def test_episodes_without_an_instruction_are_counted(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = copied(old, tmp_path)
    rows = [json.loads(line) for line in (old / "meta/episodes.jsonl").read_text().splitlines()]
    del rows[1]["tasks"], rows[2]["tasks"]
    rows[0]["tasks"] = ["first", "second"]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = root / OLD_DATA
    pq.write_table(pq.read_table(path).drop_columns("task_index"), path)
    change_rows(root / "data/chunk-000/episode_000002.parquet", "task_index", lambda numbers: [99] * len(numbers))
    dataset = open_dataset(root)
    assert [episode.instruction for episode in dataset] == ["first", "", ""]
    assert "1 episodes have several tasks; the first of each is its instruction" in capsys.readouterr().err
    run(LeRobotConfig(str(root), out=tmp_path / "new", camera=("front",), size=32, workers=1))
    assert "kept, without an instruction: 2" in capsys.readouterr().err
    EpisodeSteps([dataset], size=32, chunk=2)
    assert "2 of 3 episodes have no instruction" in capsys.readouterr().err


# Seconds by which the times of episodes in one file drift from the frames: 0.4 of a frame for each episode.
DRIFT = np.array([0.0, 0.013, 0.026])


def one_file(robot: Dataset, root: Path, fps: float = 30.0) -> Path:
    """The dataset as LeRobot writes it: the episodes of each camera in one file."""
    shutil.copytree(robot.root, root)
    ends = np.cumsum(LENGTHS)
    for key, camera in ((FRONT, "front"), (WRIST, "wrist")):
        shutil.rmtree(root / "videos" / key)
        frames = np.concatenate([made_up(number)[0][camera] for number in range(len(LENGTHS))])
        encode_clip(root / f"videos/{key}/chunk-000/file-000.mp4", frames, fps)
        change_rows(root / EPISODES_FILE, f"videos/{key}/file_index", lambda numbers: [0] * len(numbers))
        change_rows(root / EPISODES_FILE, f"videos/{key}/from_timestamp", lambda _: ((ends - LENGTHS) / fps).tolist())
        change_rows(root / EPISODES_FILE, f"videos/{key}/to_timestamp", lambda _: (ends / fps).tolist())
    return root


@pytest.mark.parametrize("fps", [30.0, 29.97])
def test_episodes_of_one_file_are_found_though_their_times_drift(robot: Dataset, tmp_path: Path, fps: float) -> None:
    root = one_file(robot, tmp_path / "d", fps)
    same_images(robot, open_dataset(root))
    for column, key in itertools.product(("from_timestamp", "to_timestamp"), (FRONT, WRIST)):
        change_rows(root / EPISODES_FILE, f"videos/{key}/{column}", lambda times: (np.array(times) + DRIFT).tolist())
    same_images(robot, open_dataset(root))


@pytest.mark.parametrize("in_order", [True, False])
def test_episodes_of_a_file_are_found_as_a_look_at_all_finds_them(robot: Dataset, in_order: bool) -> None:
    dataset, random = open_dataset(robot.root), np.random.default_rng(0)
    kind = f"videos/{FRONT}"
    names = [f"{kind}/chunk_index", f"{kind}/file_index"]
    chunks, files = (random.integers(0, most, 200) for most in (3, 9))
    if in_order:
        chunks, files = np.stack([chunks, files])[:, np.lexsort((files, chunks))]
    dataset._columns |= dict(zip(names, (chunks, files), strict=True))
    dataset._files[kind] = dataset._sorted_files(kind)
    for entry in range(200):
        literal = np.flatnonzero((chunks == chunks[entry]) & (files == files[entry]))
        assert dataset._entries_in(kind, entry).tolist() == literal.tolist()
    assert (dataset._files[kind][1] is chunks) == in_order, "nothing is copied where nothing has to be"


def same_images(one: Dataset, other: Dataset) -> None:
    """Images of neighbouring frames differ by far more than those of one frame that is encoded twice."""
    for episode, camera in itertools.product(range(len(one)), one.cameras):
        mine, theirs = (dataset.frames(episode, camera=camera).astype(int) for dataset in (one, other))
        assert np.abs(mine - theirs).max() < 8


def test_an_episode_whose_place_in_a_file_is_not_certain_is_left_out(robot: Dataset, tmp_path: Path, capsys) -> None:
    root = one_file(robot, tmp_path / "d")
    change_rows(root / EPISODES_FILE, f"videos/{FRONT}/from_timestamp", lambda times: [times[0], 46.0, times[2]])
    dataset, message = open_dataset(root), rf"videos/{FRONT}/.*file-000\.mp4: episode 1 begins at 46\.000 s by the meta"
    assert np.abs(dataset.frames(2).astype(int) - robot.frames(2)).max() < 8
    with pytest.raises(UserError, match=message):
        dataset.frames(1)
    settings = {"size": 32, "camera": ("front",), "workers": 1}
    with pytest.raises(UserError, match=message):
        run(LeRobotConfig(str(root), out=tmp_path / "a", **settings))
    run(LeRobotConfig(str(root), out=tmp_path / "b", skip_bad=True, **settings))
    assert open_dataset(tmp_path / "b").lengths.tolist() == [LENGTHS[0], LENGTHS[2]]
    assert re.search("left out, damaged.* 1", capsys.readouterr().err)
    assert open_dataset(f"lerobot:{root},skip_bad=true").numbers.tolist() == [0, 2]
    # Each episode's file of the older layout may begin late, and no frame of it may be missing.
    write_v21(robot, tmp_path / "old")
    path = tmp_path / f"old/videos/chunk-000/{FRONT}/episode_000001.mp4"
    encode_clip(path, made_up(1)[0]["front"][:-2], 30.0)
    with pytest.raises(UserError, match=r"episode 1 begins at .* and needs 31 frames, but the video ends 2 frames too"):
        open_dataset(tmp_path / "old").frames(1, [0])


def test_empty_files_and_pointers_of_git_lfs_are_distinguished(old: Path, tmp_path: Path) -> None:
    root = copied(old, tmp_path)
    video = root / f"videos/chunk-000/{FRONT}/episode_000001.mp4"
    video.write_bytes(b"")
    with pytest.raises(ValueError, match=r"episode_000001\.mp4: not a readable video \(it is empty"):
        open_dataset(root).frames(1, [0])
    video.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ValueError, match=r"not a readable video .*run `git lfs pull`"):
        open_dataset(root).frames(1, [0])
    (root / OLD_DATA).write_bytes(b"")
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: cannot be read \(it is empty, zero bytes\)"):
        open_dataset(root).actions(1)
    (root / OLD_DATA).unlink()
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: no such file"):
        open_dataset(root).actions(1)
    assert len(open_dataset(root).actions(0)) == LENGTHS[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("episodes", '{"episode_index": 0, "length": 9}\n{"episode', "line 2 is not JSON"),
        ("episodes", '{"episode_index": 0, "length": "9"}\n', r"length of episode 0 is '9'; correct it"),
        ("episodes", '{"episode_index": 1, "length": 9}\n' * 2, "lists episode_index 1 twice"),
        ("episodes", '{"episode_index": -1, "length": 9}\n', "lists episode_index -1"),
        ("episodes", '{"episode_index": 0, "length": 0}\n', "length of episode 0 is 0; correct it"),
        ("episodes", "", "holds no episode"),
        ("tasks", "[1]\n", "line 1 lacks task_index, task"),
        ("episodes", "[" * 100_000, "line 1 is not JSON"),
        ("episodes", '{"episode_index": 0, "length": ' + "9" * 30 + "}", "length of episode 0 is 9999"),
        (
            "episodes",
            '{"episode_index": 0, "length": 1000000000}\n{"episode_index": 1, "length": 9}',
            "declares 1000000009",
        ),
        ("episodes", '{"episode_index": 0, "length": 9, "tasks": 3}', "cannot be read"),
    ],
)
def test_damaged_lines_are_named(old: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    root = copied(old, tmp_path)
    path = root / f"meta/{name}.jsonl"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_dataset(root)


@pytest.mark.parametrize(
    ("file", "column", "values", "message"),
    [
        ("meta/tasks.parquet", "task_index", [None, 1], "task_index is empty in row 0, expected whole numbers"),
        ("meta/tasks.parquet", "task_index", ["a", "b"], "task_index holds string, expected whole numbers"),
        (EPISODES_FILE, "length", [9.5, 1, 1], r"length of episode 0 is 9\.5; correct it"),
        (EPISODES_FILE, "tasks", [1, 2, 3], r"cannot be read \("),
        (EPISODES_FILE, f"videos/{FRONT}/from_timestamp", [None, 0, 0], "from_timestamp of episode 0 is empty"),
        (EPISODES_FILE, f"videos/{FRONT}/from_timestamp", ["a"] * 3, "holds string, expected numbers"),
        (DATA, "episode_index", ["a"] * 47, "episode_index holds string, expected whole numbers"),
        (DATA, "timestamp", ["a"] * 47, "timestamp holds string, expected numbers"),
    ],
)
def test_columns_of_other_types_are_named(
    robot: Dataset, tmp_path: Path, file: str, column: str, values: list, message: str
) -> None:
    root = copied(robot.root, tmp_path)
    table = pq.read_table(root / file)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), root / file)
    where = "meta/episodes" if "episodes" in file else file
    with pytest.raises(UserError, match=rf"{where}.*: .*{message}"):
        open_dataset(root).frames(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda times: [*times[:5], times[3], *times[6:]], r"go backwards at frame 5 \(0\.100 s after 0\.133 s\)"),
        (lambda times: [3 * time for time in times], r"do not match 30 fps \(frame 1 is at 0\.100 s, should be at 0"),
        (lambda times: [time + 1 for time in times], r"do not match 30 fps \(frame 0 is at 1\.000 s"),
        (lambda times: [float("nan")] * len(times), "are empty or not finite at frame 0"),
    ],
)
def test_times_that_are_wrong_are_named(old: Path, tmp_path: Path, change: Callable, message: str) -> None:
    root = copied(old, tmp_path)
    change_rows(root / OLD_DATA, "timestamp", change)
    dataset = open_dataset(root)
    for read in (dataset.actions, lambda episode: dataset.frames(episode, [0])):
        with pytest.raises(ValueError, match=rf"episode_000001\.parquet: episode 1: timestamps {message}"):
            read(1)
        assert len(read(0))


def test_episodes_are_found_as_row_by_row() -> None:
    """The literal twin: each episode's rows are looked for one by one."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 5, rng.integers(1, 6))
        owners = np.repeat(
            np.arange(len(lengths)), np.maximum(lengths + rng.choice([0, 0, 0, 0, -1, 1], len(lengths)), 0)
        )
        if rng.random() < 0.3 and len(owners):
            owners = rng.permutation(owners) if rng.random() < 0.5 else owners[::-1]
        seconds = np.concatenate(
            [[0.0], *(np.arange((owners == owner).sum()) / 10 for owner in dict.fromkeys(owners))]
        )[1:]
        if rng.random() < 0.3 and len(seconds):
            seconds[rng.integers(len(seconds))] += rng.choice([-0.2, 0.04, 0.2, np.nan])
        episodes = np.arange(len(lengths))
        firsts, flaws = find_episodes(owners, seconds, episodes, lengths, 10.0)
        for episode, length in enumerate(lengths):
            rows = [row for row in range(len(owners)) if owners[row] == episode]
            good = rows == list(range(rows[0], rows[0] + length)) if rows else False
            times = [seconds[row] for row in rows]
            good = good and all(abs(time - place / 10) < 0.05 for place, time in enumerate(times))
            good = good and all(before < after for before, after in itertools.pairwise(times))
            assert good == (episode not in flaws), (owners, seconds, lengths, flaws)
            assert not good or firsts[episode] == rows[0]


def test_a_path_that_leads_in_a_circle_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="no such dataset folder"):
        open_dataset(tmp_path / "loop")


def test_rows_that_do_not_fit_the_metadata_are_named(old: Path, robot: Dataset, tmp_path: Path) -> None:
    root = copied(old, tmp_path)
    table = pq.read_table(root / OLD_DATA)
    for rows, message in (
        (table[:-2], r"lacks rows of episode 1 \(has 29 of 31\)"),
        (pa.concat_tables([table, table[-1:]]), "has 32 rows of episode 1 of 31 frames"),
        (table.drop_columns("observation.state"), r"lacks the columns observation\.state"),
        (table.set_column(0, "action", pa.array(["x"] * 31)), "action of episode 1 holds string, expected numbers"),
    ):
        pq.write_table(rows, root / OLD_DATA)
        with pytest.raises(ValueError, match=rf"episode_000001\.parquet: {message}"):
            open_dataset(root).actions(1)
    new = tmp_path / "new"
    shutil.copytree(robot.root, new)
    shuffled = pq.read_table(new / DATA).take(list(range(46, -1, -1)))
    pq.write_table(shuffled, new / DATA)
    with pytest.raises(ValueError, match="timestamps go backwards"):
        open_dataset(new).frames(0)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("length", None, "length of episode 1 is empty"),
        ("length", -3, "length of episode 1 is -3"),
        ("data/chunk_index", None, "data/chunk_index of episode 1 is empty"),
        ("data/file_index", -1, "data/file_index of episode 1 is -1"),
        (f"videos/{FRONT}/chunk_index", None, f"videos/{FRONT}/chunk_index of episode 1 is empty"),
        (f"videos/{FRONT}/file_index", None, f"videos/{FRONT}/file_index of episode 1 is empty"),
        (f"videos/{FRONT}/from_timestamp", None, f"videos/{FRONT}/from_timestamp of episode 1 is empty"),
        (f"videos/{FRONT}/from_timestamp", float("inf"), f"videos/{FRONT}/from_timestamp of episode 1 is inf"),
    ],
)
def test_an_empty_value_in_the_table_of_episodes_spoils_that_episode_alone(
    robot: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture, column: str, value: float | None, message: str
) -> None:
    root = copied(robot.root, tmp_path)
    path = root / EPISODES_FILE
    change_rows(path, column, lambda values: [values[0], value, values[2]])
    dataset = open_dataset(root)
    for episode in (0, 2):
        assert np.array_equal(dataset.frames(episode), robot.frames(episode))
        assert np.array_equal(dataset.actions(episode), robot.actions(episode))
    # Numbers do not depend on where the images are.
    for read in (dataset.frames,) if column.startswith("videos/") else (dataset.frames, dataset.actions):
        with pytest.raises(UserError, match=re.escape(f"{path}: {message}; correct it or leave the episode out")):
            read(1)
    settings = {"size": 32, "camera": ("front",), "workers": 1}
    with pytest.raises(UserError, match=re.escape(message)):
        run(LeRobotConfig(str(root), out=tmp_path / "a", **settings))
    run(LeRobotConfig(str(root), out=tmp_path / "b", skip_bad=True, **settings))
    assert open_dataset(tmp_path / "b").lengths.tolist() == [LENGTHS[0], LENGTHS[2]]
    assert re.search("left out, damaged.* 1", capsys.readouterr().err)


def test_whole_numbers_may_be_stored_as_pandas_stores_them_beside_empty_ones(robot: Dataset, tmp_path: Path) -> None:
    root = copied(robot.root, tmp_path)
    table = pq.read_table(root / EPISODES_FILE)
    for column in ("length", f"videos/{FRONT}/chunk_index"):
        values = pa.array(table[column].to_pylist(), pa.float64())
        table = table.set_column(table.column_names.index(column), column, values)
    pq.write_table(table, root / EPISODES_FILE)
    same(open_dataset(root), robot)


def test_rows_that_name_no_episode_spoil_the_episode_that_lacks_them(robot: Dataset, tmp_path: Path) -> None:
    root = copied(robot.root, tmp_path)
    change_rows(root / DATA, "episode_index", lambda rows: [None, *rows[1:]])
    dataset = open_dataset(root)
    with pytest.raises(UserError, match=rf"lacks rows of episode 0 \(has {LENGTHS[0] - 1} of {LENGTHS[0]}\)"):
        dataset.actions(0)
    assert np.array_equal(dataset.actions(1), robot.actions(1))


# Opens the folders one after another; memory is limited to 1 GiB more than the first, a whole one, needs.
WITHIN_LIMITS = """
import resource, sys
from lapa.data.spec import open_dataset
from lapa.errors import UserError
def read(root):
    dataset = open_dataset(root)
    for episode in range(len(dataset)):
        dataset.frames(episode, [0]), dataset.actions(episode), dataset.action_space
read(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for root in sys.argv[2:]:
    try:
        read(root)
        print("read")
    except UserError as error:
        print(error)
"""


def test_a_small_file_takes_no_large_memory(robot: Dataset, tmp_path: Path) -> None:
    """Values that a file holds once, compressed or in a dictionary, and names a million times."""
    expected = {}

    def bomb(name: str, file: str, table: pa.Table, message: str, **options: Any) -> None:
        shutil.copytree(robot.root, tmp_path / name)
        (tmp_path / name / SUMS).unlink()
        pq.write_table(table, tmp_path / name / file, **options)
        assert (tmp_path / name / file).stat().st_size < 2_000_000
        expected[name] = rf"{re.escape(file)}: cannot be read \({message}"

    def repeated(values: pa.Array, count: int) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), values)

    def replaced(file: str, column: str, values: pa.Array) -> pa.Table:
        table = pq.read_table(robot.root / file)
        return table.set_column(table.column_names.index(column), column, values)

    count, plain = 130_000, {"store_schema": False}
    numbers = pa.array(np.arange(count))
    texts = repeated(pa.array(["x" * 33_000]), count)
    bomb("rows", TASKS, pa.table({"task": texts, "task_index": numbers}), "would take 4.* MiB of memory", **plain)
    one = pa.table({"task": ["x" * (300 << 20)], "task_index": [0]})
    bomb("text", TASKS, one, "would take .* MiB of memory", compression="zstd", use_dictionary=False)
    lists = pa.ListArray.from_arrays([0, 43_000, 86_000, count], texts)
    bomb("lists", EPISODES_FILE, replaced(EPISODES_FILE, "tasks", lists), "would take 4.* MiB of memory", **plain)
    many = repeated(pa.array([0]), 4 * 10**7)
    bomb("owners", DATA, pa.table({"episode_index": many}), "would take .* MiB of memory", **plain)
    wide = pa.ListArray.from_arrays(pa.array([0] * 47 + [4 * 10**7], pa.int32()), many.cast(pa.int8()))
    bomb("wide", DATA, replaced(DATA, "action", wide), "would take .* MiB of memory", **plain)
    fixed = pa.array([None] * 47, pa.list_(pa.float32(), 10**7))
    bomb("fixed", DATA, replaced(DATA, "action", fixed), "would take .* MiB of memory")
    for name, shape in (("width", [10**9]), ("product", [10**5, 10**5]), ("overflow", [2**40, 2**40])):
        shutil.copytree(robot.root, tmp_path / name)
        info = read_json(robot.root / INFO)
        info["features"]["action"]["shape"] = shape
        write_json(tmp_path / name / INFO, info)
        expected[name] = r"meta/info\.json: feature 'action' is .* numbers wide"
    shutil.copytree(robot.root, tmp_path / "image")
    info["features"] = {**robot.info["features"], FRONT: {**robot.features[FRONT], "shape": [10**6, 10**6, 3]}}
    write_json(tmp_path / "image" / INFO, info)
    expected["image"] = r"meta/info\.json: feature .*front' is not as LeRobot describes images"
    images = pa.StructArray.from_arrays([repeated(pa.array([b"x" * 900_000]), 47)], ["bytes"])
    shutil.copytree(with_images_in_tables(robot, tmp_path / "images"), tmp_path / "same-images")
    (tmp_path / "same-images" / SUMS).unlink()
    table = pq.read_table(tmp_path / "images" / DATA).drop_columns([FRONT, WRIST])
    pq.write_table(table.append_column(FRONT, images).append_column(WRIST, images), tmp_path / "same-images" / DATA)
    expected["same-images"] = f"{DATA}: {FRONT} cannot be decoded in row 0"
    for name in expected:
        (tmp_path / name / SUMS).unlink(missing_ok=True)
    roots = [str(tmp_path / name) for name in expected]
    done = subprocess.run(
        [sys.executable, "-c", WITHIN_LIMITS, str(robot.root), *roots], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, message in zip(done.stdout.splitlines(), expected.values(), strict=True):
        assert re.search(message, line), line


def test_large_tables_of_real_datasets_are_read(tmp_path: Path) -> None:
    """A million rows of constant numbers, and as many equal texts, are more in memory than in the file.

    LeRobot writes a row group for each few episodes, each with dictionaries of its own.
    """
    path = tmp_path / "data.parquet"
    rows = [[f"task {number % 7}"] for number in range(10_000)]
    episodes = pa.table({"tasks": rows, "data/chunk_index": np.arange(10_000), "text": ["x" * 30_000] * 10_000})
    for size in (10, 10_000):
        pq.write_table(episodes, path, row_group_size=size)
        assert read_parquet(path, ["tasks"])["tasks"].to_pylist() == rows
    pq.write_table(episodes, path, row_group_size=5_000)
    with pytest.raises(UserError, match="would take 286 MiB of memory"):
        read_parquet(path)
    actions = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(14 * 10**6, np.float32)), 14)
    texts = pa.array(["pick up the cup and put it on the plate"] * 10**6)
    pq.write_table(pa.table({"action": actions, "task": texts, "index": np.arange(10**6)}), path)
    assert read_parquet(path).num_rows == 10**6
    assert read_parquet(path, ["task"])["task"].type == pa.string()


def test_damaged_images_in_tables_are_named(robot: Dataset, tmp_path: Path) -> None:
    root = with_images_in_tables(robot, tmp_path / "d")
    first = LENGTHS[0]
    for image, message in (
        ({"bytes": None, "path": "x.png"}, "holds no image in row 11"),
        ({"bytes": png(np.zeros((64, 64, 3), np.uint8))[:60], "path": None}, r"cannot be decoded in row 11 \("),
        ({"bytes": b"nothing", "path": None}, r"cannot be decoded in row 11 \(no image in JPEG, PNG"),
        ({"bytes": png(np.zeros((8, 8, 3), np.uint8)), "path": None}, "differ in size"),
    ):
        change_rows(root / DATA, FRONT, lambda rows, it=image: [*rows[: first + 2], it, *rows[first + 3 :]])
        with pytest.raises(ValueError, match=rf"file-000\.parquet: .*{message}"):
            open_dataset(root).frames(1)
        assert len(open_dataset(root).frames(0)) == first


def test_a_name_on_the_hub_without_network_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"made-up/nothing: neither a folder here nor a dataset on the hub \(.+\)"):
        open_dataset("lerobot:made-up/nothing")
    with pytest.raises(ValueError, match=r"made-up/nothing: neither a folder here nor a dataset on the hub \(.+\)"):
        open_dataset("made-up/nothing")
    with pytest.raises(ValueError, match="no such dataset folder"):
        open_dataset("lerobot:./made-up")


def test_a_name_on_the_hub_opens_its_snapshot(old: Path, robot: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **settings: Any) -> str:
        asked.append((name, settings["repo_type"]))
        return str(old)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    dataset = open_dataset("arm=lerobot:someone/arm:0.5")
    assert set(asked) == {("someone/arm", "dataset")}
    assert (dataset.name, dataset.weight) == ("arm", 0.5)
    assert open_dataset("lerobot:someone/arm").name == open_dataset("someone/arm@v2.1").name == "arm"
    assert dataset.in_place
    assert np.array_equal(dataset.actions(0), robot.actions(0))
