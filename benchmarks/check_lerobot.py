"""Checks that LeRobot reads the datasets of this project and the reverse: `make check-lerobot`, in two environments.

    .venv/bin/python benchmarks/check_lerobot.py write FOLDER            writes datasets, and arrays of their contents
    .venv-lerobot/bin/python benchmarks/check_lerobot.py lerobot FOLDER  LeRobot reads those and writes others
    .venv/bin/python benchmarks/check_lerobot.py read FOLDER             reads the datasets that LeRobot wrote

Numbers, times and instructions must be equal. Decoded images may differ by `APART` of 255, since versions of FFmpeg
round the conversion from YUV differently; neighbouring frames of these datasets differ by more than 10. LeRobot reads
with PyAV and, where FFmpeg's libraries are installed, with torchcodec.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# A thirtieth of a second has no exact decimal form, so times in files of several episodes accumulate errors.
FPS, SIDE, LENGTHS = 30, 64, (9, 31, 7)
APART = 2
TASKS = ("push the square", "pull the square — 推")
OURS = ("video", "robot", "hidden", "upgraded")
THEIRS = ("videos", "images")


def write_robot(folder: Path) -> Any:
    """Writes a dataset of this project, of a made-up robot: two cameras, actions and states."""
    import lapa

    writer = lapa.DatasetWriter(
        folder,
        fps=FPS,
        cameras={"front": (SIDE, SIDE), "wrist": (SIDE // 2, SIDE)},
        action_names=["x", "y", "grip"],
        state_names=["angle"],
        binary_actions=["grip"],
        control="delta",
    )
    for number in range(len(LENGTHS)):
        frames, actions, states, task = made_up(number)
        writer.add_episode(frames, task, actions=actions, states=states, source=f"made up {number}")
    return writer.finish()


def write(folder: Path) -> None:
    """Writes four datasets: video only, a robot with two cameras, the same without actions, and one from v2.1."""
    from lapa import open_dataset
    from lapa.data.config import HideActionsConfig
    from lapa.data.convert import run as convert
    from lapa.data.replace_actions import run as hide_actions
    from lapa.sources.lerobot import LeRobotConfig
    from lapa.sources.synthetic import write_synthetic_dataset

    shutil.rmtree(folder, ignore_errors=True)
    write_synthetic_dataset(folder / "video", 3, frames=10, size=SIDE, fps=FPS)
    robot = write_robot(folder / "robot")
    hide_actions(HideActionsConfig(data=str(folder / "robot"), out=folder / "hidden"))
    write_v21(robot, folder / "v21")
    convert(LeRobotConfig(str(folder / "v21"), out=folder / "upgraded", size=32, workers=1))
    for name in (*OURS, "v21"):
        _dump(folder / f"{name}.npz", _ours(open_dataset(folder / name)))


def lerobot(folder: Path) -> None:
    """Opens our datasets with LeRobot, upgrades the v2.1 folder with its converter, and records others with it."""
    from importlib.metadata import version

    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    print(f"lerobot {version('lerobot')}, torch {version('torch')}, av {version('av')}")
    backends = ["pyav", "torchcodec"]
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        print("skipped: reading with torchcodec, which needs FFmpeg's libraries (Debian's package ffmpeg)")
        backends.remove("torchcodec")
    for name in OURS:
        for backend in backends:
            dataset = LeRobotDataset(f"made-up/{name}", folder / name, video_backend=backend, return_uint8=True)
            _compare(f"{name}: written here, read by LeRobot ({backend})", folder, name, _theirs(dataset), APART)
    shutil.copytree(folder / "v21", folder / "v30")
    convert_dataset("made-up/v30", root=folder / "v30", push_to_hub=False)
    dataset = LeRobotDataset("made-up/v30", folder / "v30", video_backend="pyav", return_uint8=True)
    _compare("v30: v2.1 written here, upgraded by LeRobot", folder, "v21", _theirs(dataset), APART)
    for name in THEIRS:
        _record(LeRobotDataset, folder / name, "video" if name == "videos" else "image")
        dataset = LeRobotDataset(f"made-up/{name}", folder / name, video_backend="pyav", return_uint8=True)
        _dump(folder / f"{name}.npz", _theirs(dataset))


def read(folder: Path) -> None:
    """Opens the datasets that LeRobot wrote, and the one that its converter made from v2.1."""
    from lapa import open_dataset

    for name in THEIRS:
        dataset = open_dataset(f"lerobot:{folder / name}")
        apart = APART if name == "videos" else 0
        _compare(f"{name}: written by LeRobot, read here", folder, name, _ours(dataset), apart)
        files = {dataset.data_path(episode) for episode in range(len(dataset.lengths))}
        assert len(files) == 1 < len(dataset.lengths), "expected LeRobot to write several episodes into one file"
        assert dataset.action_space.names == ("x", "y", "grip"), dataset.action_space
    exact = open_dataset(folder / "images")
    for episode in range(len(LENGTHS)):
        assert np.array_equal(exact.frames(episode, camera="wrist"), made_up(episode)[0]["wrist"]), episode
    _compare("v30: upgraded by LeRobot, read here", folder, "v21", _ours(open_dataset(folder / "v30")), 0)
    print("the check passed in both directions")


def made_up(number: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, str]:
    """Returns frames, actions, states and instruction of an episode. Codecs preserve its smooth images well."""
    rng, length = np.random.default_rng(number), LENGTHS[number]
    ramp_W = np.linspace(0, 150, SIDE)
    # Brightness jumps from frame to frame, so that an image one frame early or late is clearly different.
    level_T = 10 + 80 * (np.arange(length) * 5 % length) / length + 5 * number
    frames = {}
    for camera, height in (("front", SIDE), ("wrist", SIDE // 2)):
        ramp_HW = np.broadcast_to(ramp_W, (height, SIDE))
        grey_THW = level_T[:, None, None] + (ramp_HW if camera == "front" else ramp_HW[:, ::-1])
        frames[camera] = np.stack([grey_THW, grey_THW * 0.8, 255 - grey_THW], axis=-1).astype(np.uint8)
    actions = rng.normal(size=(length, 3)).astype(np.float32)
    actions[:, 2] = np.arange(length) % 2
    return frames, actions, rng.normal(size=(length, 1)).astype(np.float32), TASKS[number % 2]


def write_v21(dataset: Any, root: Path) -> None:
    """Writes a dataset of this project in the v2.1 layout of LeRobot 0.3: a data file and a video for each episode."""
    import pyarrow.parquet as pq

    table = pq.read_table(dataset.root / "data/chunk-000/file-000.parquet")
    episodes, stats, keys = [], [], [f"observation.images.{camera}" for camera in dataset.cameras]
    rows = pq.read_table(dataset.root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for number, (episode, row) in enumerate(zip(dataset.episodes, rows, strict=True)):
        data = root / f"data/chunk-000/episode_{number:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(row["dataset_from_index"], episode.length), data)
        for key, camera in zip(keys, dataset.cameras, strict=True):
            video = root / f"videos/chunk-000/{key}/episode_{number:06d}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(dataset.video_path(number, camera), video)
        episodes.append({"episode_index": number, "tasks": [episode.instruction], "length": episode.length})
        its = {name.split("/")[1]: {} for name in row if name.startswith("stats/")}
        for name, value in row.items():
            if name.startswith("stats/"):
                its[name.split("/")[1]][name.split("/")[2]] = value
        stats.append({"episode_index": number, "stats": its})
    tasks = [{"task_index": number, "task": task} for number, task in enumerate(dataset.tasks)]
    info = {key: value for key, value in dataset.info.items() if not key.endswith("_size_in_mb")} | {
        "codebase_version": "v2.1",
        "total_videos": len(episodes) * len(keys),
        "total_chunks": 1,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
    for name, lines in (("tasks", tasks), ("episodes", episodes), ("episodes_stats", stats)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (root / f"meta/{name}.jsonl").write_text(text, encoding="utf-8")


def _record(create: Any, root: Path, dtype: str) -> None:
    """Records a dataset with LeRobot: two cameras, several episodes in a file."""
    features: dict[str, Any] = {
        "action": {"dtype": "float32", "shape": (3,), "names": {"axes": ["x", "y", "grip"]}},
        "observation.state": {"dtype": "float32", "shape": (1,), "names": ["angle"]},
    }
    names = ["height", "width", "channels"]
    for camera, height in (("front", SIDE), ("wrist", SIDE // 2)):
        features[f"observation.images.{camera}"] = {"dtype": dtype, "shape": (height, SIDE, 3), "names": names}
    videos = dtype == "video"
    dataset = create.create(f"made-up/{root.name}", FPS, features, root, use_videos=videos, video_backend="pyav")
    for number, length in enumerate(LENGTHS):
        frames, actions, states, task = made_up(number)
        for step in range(length):
            images = {f"observation.images.{camera}": frames[camera][step] for camera in frames}
            row = {"action": actions[step], "observation.state": states[step], "task": task}
            dataset.add_frame({**images, **row})
        dataset.save_episode()
    dataset.finalize()


def _ours(dataset: Any) -> dict[str, np.ndarray]:
    """Returns the whole content of a dataset, as this project reads it."""
    held: dict[str, Any] = {"task": [episode.instruction for episode in dataset.episodes], "fps": [dataset.fps]}
    for episode in range(len(dataset.lengths)):
        held |= {f"{camera}/{episode}": dataset.frames(episode, camera=camera) for camera in dataset.cameras}
        if dataset.action_dim is not None:
            held[f"action/{episode}"] = dataset.actions(episode)
        if dataset.state_dim is not None:
            held[f"state/{episode}"] = dataset.states(episode)
    return {name: np.asarray(values) for name, values in held.items()}


def _theirs(dataset: Any) -> dict[str, np.ndarray]:
    """Returns the same, as LeRobot reads it, frame by frame."""
    held: dict[str, list[Any]] = {"task": [], "fps": [float(dataset.fps)]}
    for number in range(len(dataset)):
        item = dataset[number]
        episode = int(item["episode_index"])
        if int(item["frame_index"]) == 0:
            held["task"].append(item["task"])
        assert abs(float(item["timestamp"]) - int(item["frame_index"]) / dataset.fps) < 1e-4
        for key in dataset.meta.camera_keys:
            image = item[key].permute(1, 2, 0).numpy()
            image = image if image.dtype == np.uint8 else np.round(image * 255).astype(np.uint8)
            held.setdefault(f"{key.removeprefix('observation.images.')}/{episode}", []).append(image)
        for key, name in (("action", "action"), ("observation.state", "state")):
            if key in item:
                held.setdefault(f"{name}/{episode}", []).append(np.atleast_1d(item[key].numpy()))
    return {name: np.asarray(values) for name, values in held.items()}


def _dump(path: Path, held: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **held)


def _compare(what: str, folder: Path, name: str, held: dict[str, np.ndarray], apart: int) -> None:
    """Raises SystemExit where `held` differs from the dumped content; prints the largest difference of images."""
    with np.load(folder / f"{name}.npz") as dumped:
        expected = dict(dumped)
    if set(held) != set(expected):
        raise SystemExit(f"FAILED {what}: holds {sorted(held)}, expected {sorted(expected)}")
    largest, frames = 0, 0
    for key, values in expected.items():
        if values.shape != held[key].shape:
            raise SystemExit(f"FAILED {what}: {key} is {held[key].shape}, expected {values.shape}")
        if values.dtype == np.uint8:
            largest = max(largest, int(np.abs(values.astype(int) - held[key]).max()))
            frames += len(values)
        elif not np.array_equal(values, held[key]):
            raise SystemExit(f"FAILED {what}: {key} is {held[key]}, expected {values}")
    if largest > apart:
        raise SystemExit(f"FAILED {what}: images differ by {largest} of 255, at most {apart} are allowed")
    numbers = sum(key.startswith(("action/", "state/")) for key in expected)
    print(f"ok {what}: {frames} images differ by at most {largest} of 255, {numbers} tables of numbers are equal")


STEPS: dict[str, Callable[[Path], None]] = {"write": write, "lerobot": lerobot, "read": read}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in STEPS:
        raise SystemExit(__doc__)
    STEPS[sys.argv[1]](Path(sys.argv[2]))
