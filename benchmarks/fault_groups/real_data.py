"""Datasets as they are found, each with the value that is right, or a refusal that names what is wrong.

Every kind follows public reports of what datasets on the hub are like.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fault_groups.folders import (
    EPISODES,
    FPS,
    FRAMES,
    FRONT,
    SIDE,
    TASKS,
    LeRobot,
    encoded,
    grey,
    rlds,
    seen,
    write_video,
)
from fault_groups.made import Case
from fault_groups.processes import Fault, ask, lapa

OWN = [list(range(FRAMES * episode, FRAMES * (episode + 1))) for episode in range(EPISODES)]
TEXTS = [TASKS[0], TASKS[1], TASKS[0]]


@dataclass(frozen=True)
class Read:
    """What a dataset gives: the numbers of the images, the instructions, the cameras, the first row of actions."""

    seen: list[list[int]]
    texts: list[str]
    cameras: list[str]
    names: list[str]
    actions: list[list[float]]
    output: str = ""


def read(spec: object, folder: Path) -> Read | str:
    """What a dataset gives by its spec, or the line by which it is refused."""

    def reading() -> dict[str, Any]:
        from lapa.data.spec import open_dataset

        dataset = open_dataset(str(spec))
        numbers = range(len(dataset))
        space = dataset.action_space
        return {
            "seen": [seen(dataset.frames(number)) for number in numbers],
            "texts": [dataset.instruction(number) for number in numbers],
            "cameras": list(dataset.cameras),
            "names": list(space.names) if space else [],
            "actions": [dataset.actions(number)[0].tolist() for number in numbers] if space else [],
        }

    ended = ask(reading, folder)
    line = ended.refused()
    return Read(**ended.answer, output=ended.output) if line is None else line


def real_data(made: Path, quick: bool) -> list[Case]:
    """All of them, also when quick."""
    return [Case(name.replace("_", " "), partial(_run, case)) for name, case in CASES.items()]


VIDEOS = ("data", "videos", "clips", "--workers", 1, "--out", "out")
TALK = [{"from": "human", "value": "open"}, {"from": "gpt", "value": "", "raw_actions": [0.1] * 7}]
CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Registers a case by its name."""
    CASES[function.__name__] = function
    return function


def _run(run: Callable[[Path], None], folder: Path, chance: Random) -> None:
    run(folder)


def expect(found: Read | str, *, refusal: tuple[str, ...] | None = None, **right: Any) -> None:
    """Raises Fault where what was read is not what is right.

    refusal: words of the line of a refusal, which is right too, or, without values, alone.
    """
    if isinstance(found, str):
        missing = [word for word in refusal or () if word.lower() not in found.lower()]
        if refusal is None or missing:
            raise Fault(f"refused{f' without naming {missing[0]!r}' if missing else ''}: {found}")
        return
    if not right:
        raise Fault("was read without a word")
    for name, value in right.items():
        if (given := getattr(found, name)) != value:
            raise Fault(f"{name}: {str(given)[:150]}, right is {str(value)[:150]}")


@case
def as_it_should_be(folder: Path) -> None:
    right: dict[str, Any] = {"seen": OWN, "texts": TEXTS, "names": ["dx", "dy"], "cameras": ["front"]}
    expect(read(LeRobot().write(folder / "v30"), folder), **right)
    expect(read(LeRobot().write_legacy(folder / "v21"), folder), **right)


@case
def starts_that_drift(folder: Path) -> None:
    dataset = LeRobot()
    column = dataset.episodes[f"videos/{FRONT}/from_timestamp"]
    column[:] = [start + 0.06 * number for number, start in enumerate(column)]
    expect(read(dataset.write(folder / "data"), folder), refusal=("timestamp",), seen=OWN)


@case
def starts_that_drift_back(folder: Path) -> None:
    dataset = LeRobot()
    column = dataset.episodes[f"videos/{FRONT}/from_timestamp"]
    column[:] = [start - 0.07 * number for number, start in enumerate(column)]
    expect(read(dataset.write(folder / "data"), folder), refusal=("timestamp",), seen=OWN)


@case
def episodes_that_overlap(folder: Path) -> None:
    dataset = LeRobot()
    dataset.episodes[f"videos/{FRONT}/from_timestamp"][2] = 1.5
    dataset.episodes[f"videos/{FRONT}/to_timestamp"][2] = 2.5
    expect(read(dataset.write(folder / "data"), folder), refusal=("file-000.mp4", "episode"), seen=OWN)


@case
def an_episode_longer_than_its_video(folder: Path) -> None:
    dataset = LeRobot()
    dataset.episodes[f"videos/{FRONT}/to_timestamp"][0] = 0.5
    expect(read(dataset.write(folder / "data"), folder), refusal=("timestamp",), seen=OWN)


@case
def a_video_that_starts_late(folder: Path) -> None:
    found = read(LeRobot(first=2).write_legacy(folder / "data"), folder)
    expect(found, refusal=("start",), seen=OWN)
    if isinstance(found, str) and "shorter" in found:
        raise Fault(f"names the wrong reason: {found}")


@case
def rows_out_of_order(folder: Path) -> None:
    dataset = LeRobot()
    for values in dataset.rows.values():
        values[3], values[4] = values[4], values[3]
    expect(read(dataset.write(folder / "data"), folder), refusal=("file-000.parquet",))


@case
def a_depth_camera_of_16_bits(folder: Path) -> None:
    dataset = LeRobot(cameras=())
    levels = [np.full((SIDE, SIDE), 700 + 20 * step, np.uint16) for step in range(EPISODES * FRAMES)]
    _images(dataset, "depth", [encoded(image) for image in levels], 1)
    _images(dataset, "top", [encoded(grey(*divmod(step, FRAMES))) for step in range(EPISODES * FRAMES)], 3)
    expect(read(dataset.write(folder / "data"), folder), cameras=["top"], seen=OWN)


@case
def a_depth_camera_said_to_be_colour(folder: Path) -> None:
    dataset = LeRobot(cameras=())
    levels = [np.full((SIDE, SIDE), 700 + 20 * step, np.uint16) for step in range(EPISODES * FRAMES)]
    _images(dataset, "depth", [encoded(image) for image in levels], 3)
    expect(read(dataset.write(folder / "data"), folder), refusal=("depth",))


@case
def a_depth_video_by_its_flag(folder: Path) -> None:
    dataset = LeRobot(cameras=("depth", "front"))
    feature = dataset.info["features"]["observation.images.depth"]
    feature["info"] = {"video.is_depth_map": True}
    expect(read(dataset.write(folder / "data"), folder), cameras=["front"], seen=OWN)


@case
def a_depth_video_of_one_channel(folder: Path) -> None:
    dataset = LeRobot(cameras=("depth", "front"))
    dataset.info["features"]["observation.images.depth"]["shape"] = [SIDE, SIDE, 1]
    expect(read(dataset.write(folder / "data"), folder), cameras=["front"], seen=OWN)


@case
def a_depth_camera_alone(folder: Path) -> None:
    dataset = LeRobot(cameras=("depth",))
    dataset.info["features"]["observation.images.depth"]["shape"] = [SIDE, SIDE, 1]
    found = read(dataset.write(folder / "data"), folder)
    if isinstance(found, Read) and found.cameras:
        raise Fault("depth is taken for a colour camera")


@case
def jpegs_that_lie_in_parquet(folder: Path) -> None:
    dataset = LeRobot(cameras=())
    _images(dataset, "top", [_lying() for _ in range(EPISODES * FRAMES)], 3)
    _require_upright(dataset.write(folder / "data"), folder)


@case
def jpegs_that_lie_in_a_folder(folder: Path) -> None:
    clip = folder / "frames" / "clip"
    clip.mkdir(parents=True)
    for step in range(FRAMES):
        (clip / f"img_{step:03d}.jpg").write_bytes(_lying())
    _require_upright(f"frames:{folder / 'frames'},fps=10,caption=open", folder)


@case
def jpegs_that_lie_in_rlds(folder: Path) -> None:
    data = rlds(folder, {"language_instruction": lambda step: b"open"}, images=lambda episode, step: _lying())
    _require_upright(f"rlds:{data},fps=10", folder)


@case
def jpegs_that_lie_in_jsonl(folder: Path) -> None:
    (folder / "images").mkdir()
    for step in range(FRAMES):
        (folder / "images" / f"step_{step}.jpg").write_bytes(_lying())
    rows = [
        {"id": f"episode_0/step_{step}", "image": f"step_{step}.jpg", "conversations": TALK} for step in range(FRAMES)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    _require_upright(f"lapa-jsonl:{folder / 'rows.json'},images={folder / 'images'}", folder)


@case
def tasks_as_plain_text(folder: Path) -> None:
    data = LeRobot().write_legacy(folder / "data", lambda row: {**row, "tasks": row["tasks"][0]})
    expect(read(data, folder), texts=TEXTS)


@case
def tasks_of_the_frames_alone(folder: Path) -> None:
    data = LeRobot().write_legacy(folder / "data", lambda row: {k: v for k, v in row.items() if k != "tasks"})
    expect(read(data, folder), texts=TEXTS)


@case
def tasks_of_the_frames_alone_in_one_file(folder: Path) -> None:
    dataset = LeRobot()
    del dataset.episodes["tasks"]
    expect(read(dataset.write(folder / "data"), folder), texts=TEXTS)


@case
def no_file_of_tasks(folder: Path) -> None:
    expect(read(LeRobot(tasks=None).write(folder / "data"), folder), texts=TEXTS)


@case
def rlds_text_of_the_episode(folder: Path) -> None:
    _rlds_text(folder, {}, metadata={"language_instruction": b"open the drawer", "file_path": b"/x/y"})


@case
def rlds_text_that_comes_late(folder: Path) -> None:
    _rlds_text(folder, {"language_instruction": lambda step: b"open the drawer" if step else b""})


@case
def rlds_text_of_bytes(folder: Path) -> None:
    _rlds_text(folder, {"language_instruction": lambda step: b"b'open the drawer'"})


@case
def rlds_second_text(folder: Path) -> None:
    second = {"language_instruction": lambda step: b"", "language_instruction_2": lambda step: b"open the drawer"}
    _rlds_text(folder, second)


@case
def rlds_text_of_a_camera(folder: Path) -> None:
    data = rlds(folder, {"camera_model": lambda step: b"d435", "policy_id": lambda step: b"p7"})
    expect(read(f"rlds:{data},fps=10", folder), texts=[""] * EPISODES)


@case
def rlds_shards_of_a_larger_whole(folder: Path) -> None:
    data = rlds(folder, {"language_instruction": lambda step: b"open"}, shards=3, named=32)
    expect(read(f"rlds:{data},fps=10", folder), seen=OWN)


@case
def nulls_in_the_table_of_episodes(folder: Path) -> None:
    for number, column in enumerate((f"videos/{FRONT}/file_index", f"videos/{FRONT}/from_timestamp", "length")):
        dataset = LeRobot()
        dataset.episodes[column][1] = None
        data = dataset.write(folder / f"data{number}")
        expect(read(data, folder), refusal=(column, "episode", "1"))
        _require_converted(folder, data, [OWN[0], OWN[2]], "--skip-bad")


@case
def nulls_in_the_place_of_the_data(folder: Path) -> None:
    dataset = LeRobot()
    dataset.episodes["data/file_index"][1] = None
    data = dataset.write(folder / "data")
    expect(read(data, folder), refusal=("data/file_index", "episode", "1"))
    _require_converted(folder, data, [OWN[0], OWN[2]], "--skip-bad")


@case
def a_video_was_not_downloaded(folder: Path) -> None:
    data = LeRobot().write_legacy(folder / "data")
    (data / "videos" / "chunk-000" / FRONT / "episode_000002.mp4").unlink()
    expect(read(data, folder), refusal=("episode_000002.mp4",))
    _require_converted(folder, data, OWN[:2], "--skip-bad")
    _require_converted(folder, data, OWN[:2], "--limit", 2)


@case
def a_data_file_was_not_downloaded(folder: Path) -> None:
    data = LeRobot().write_legacy(folder / "data")
    (data / "data" / "chunk-000" / "episode_000001.parquet").unlink()
    _require_converted(folder, data, [OWN[0], OWN[2]], "--skip-bad")


@case
def a_camera_was_not_downloaded(folder: Path) -> None:
    data = LeRobot(cameras=("front", "wrist")).write(folder / "data")
    (data / "videos" / "observation.images.wrist" / "chunk-000" / "file-000.mp4").unlink()
    _require_converted(folder, data, OWN, "--camera", "front")
    expect(read(f"lerobot:{data},camera=front", folder), seen=OWN)


@case
def a_camera_without_columns(folder: Path) -> None:
    dataset = LeRobot(cameras=("front", "wrist"))
    dataset.episodes = {name: column for name, column in dataset.episodes.items() if "wrist" not in name}
    _require_converted(folder, dataset.write(folder / "data"), OWN, "--camera", "front")


@case
def numbers_with_gaps(folder: Path) -> None:
    expect(read(LeRobot(numbers=(0, 2, 5)).write_legacy(folder / "v21"), folder), seen=OWN, texts=TEXTS)
    expect(read(LeRobot(numbers=(1, 2, 5)).write(folder / "v30"), folder), seen=OWN, texts=TEXTS)


@case
def names_in_a_list_of_lists(folder: Path) -> None:
    dataset = LeRobot()
    dataset.info["features"]["action"]["names"] = [["dx", "dy"]]
    expect(read(dataset.write(folder / "data"), folder), names=["dx", "dy"])


@case
def names_by_their_group(folder: Path) -> None:
    dataset = LeRobot()
    dataset.info["features"]["action"]["names"] = {"motors": ["dx", "dy"]}
    expect(read(dataset.write(folder / "data"), folder), names=["dx", "dy"])


@case
def ragged_rows_that_add_up(folder: Path) -> None:
    dataset = LeRobot()
    dataset.rows["action"][3:5] = [[0.1], [0.1, 0.2, 0.3]]
    expect(read(dataset.write(folder / "data"), folder), refusal=("action",))


@case
def rows_that_are_null(folder: Path) -> None:
    for number, value in enumerate((None, [None, 1.0], [])):
        dataset = LeRobot()
        dataset.rows["action"][3] = value
        expect(read(dataset.write(folder / f"data{number}"), folder), refusal=("action",))


@case
def a_horizon_below_a_frame(folder: Path) -> None:
    data = LeRobot().write(folder / "data")
    words = ("latent", "train", "--preset", "debug", "--steps", 2, "--device", "cpu", "--out", "lam", "--data")
    ended = lapa(*words, f"{data},horizon=0.01", folder=folder)
    if ended.refused() is None and "0.01" not in ended.output:
        raise Fault("a horizon of 0.01 s becomes that of a frame without a word")


@case
def pixels_that_are_not_square(folder: Path) -> None:
    frames = np.zeros((FRAMES, 2 * SIDE, SIDE, 3), np.uint8)
    frames[:, SIDE - 16 : SIDE + 16, 8:24] = 255
    write_video(folder / "clips" / "clip.mp4", list(frames), aspect=Fraction(2, 1))
    lapa(*VIDEOS, "--caption", "push", "--size", 64, folder=folder).require_done()

    def sides() -> list[int]:
        from lapa.data.spec import open_dataset

        bright = open_dataset(folder / "out").frames(0)[0, ..., 0] > 128
        return [int(bright.any(axis).sum()) for axis in (0, 1)]

    wide, high = ask(sides, folder).answer
    if abs(wide - high) > 2:
        raise Fault(f"a square is {wide} pixels wide and {high} high")


@case
def frames_that_repeat(folder: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = [rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8) for _ in range(6)]
    for clip in range(3):
        write_video(folder / "clips" / f"clip{clip}.mp4", [kinds[step // 10] for step in range(60)])
    ended = lapa(*VIDEOS, "--caption", "push", "--size", SIDE, folder=folder)
    ended.require_done()
    if "--rate" not in ended.output and "--fps" not in ended.output:
        raise Fault("nine of ten frames repeat the one before, and nothing offers --rate or --fps")


@case
def captions_in_the_folder(folder: Path) -> None:
    write_video(folder / "clips" / "clip.mp4", [grey(0, step) for step in range(FRAMES)])
    (folder / "clips" / "captions.json").write_text(json.dumps({"clip.mp4": "open the drawer"}))
    if line := lapa(*VIDEOS, "--size", SIDE, folder=folder).refused():
        if "captions.json" not in line:
            raise Fault(f"does not offer captions.json: {line}")
        return
    expect(read(folder / "out", folder), texts=["open the drawer"])


@case
def turns_that_are_rare(folder: Path) -> None:
    """Float noise on a dimension that rarely moves: what moves it must come out of the codec."""

    def turned() -> list[float]:
        from lapa.policy.actions import ActionBins, ActionScale

        rng = np.random.default_rng(0)
        actions = rng.normal(0, 1e-9, (5000, 2)).astype(np.float32)
        actions[:, 1] += 1
        actions[::200, 0], actions[::200, 1] = 0.3, 0
        worst = []
        for kind in (ActionScale, ActionBins):
            codec = kind.fit(actions)
            worst.append(float(np.abs(codec.decode(codec.encode(actions)) - actions).max()))
        return worst

    ended = ask(turned, folder)
    ended.require_done()
    if max(ended.answer) > 0.01:
        raise Fault(f"a turn of 0.3, or a gripper that shuts, comes out {max(ended.answer):.2g} off")


@case
def codes_beyond_the_codebook(folder: Path) -> None:
    for number, code in enumerate((70000, 65539, 8, -1)):

        def labelled(code: int = code, number: int = number) -> list[int]:
            from lapa import config as configs
            from lapa.data.labels import EpisodeLabels, Labels, Manifest, shard_path, write_shard

            labels = folder / f"labels{number}"
            rows = np.arange(4)
            write_shard(shard_path(labels, 0, 0), {0: EpisodeLabels(rows, np.full((4, 2), code))})
            usage = [[1 / 8] * 8] * 2
            manifest = Manifest("0" * 16, "1" * 16, "front", 0.3, 3, 2, 8, 4, 1, 0, usage)
            configs.save(manifest, labels / "manifest.json")
            return Labels.open(labels).codes(0)[1].flatten().tolist()

        ended = ask(labelled, folder)
        if ended.refused() is None:
            raise Fault(f"code {code} of a codebook of 8 is read as {ended.answer[0]}")


def _images(dataset: LeRobot, camera: str, images: list[bytes], channels: int) -> None:
    """Adds a camera whose images are in the data file, before all other features."""
    key, names = f"observation.images.{camera}", ["height", "width", "channels"]
    feature = {"dtype": "image", "shape": [SIDE, SIDE, channels], "names": names}
    dataset.info["features"] = {key: feature, **dataset.info["features"]}
    dataset.rows[key] = [{"bytes": image, "path": None} for image in images]


def _lying() -> bytes:
    """A JPEG that is stored on its side: upright, its upper half is blue and its lower half green."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[: SIDE // 2, :, 2], image[SIDE // 2 :, :, 1] = 255, 255
    return encoded(np.array(Image.fromarray(image).transpose(Image.Transpose.ROTATE_90)), "JPEG", orientation=6)


def _require_upright(spec: object, folder: Path) -> None:
    def colours() -> list[int]:
        from lapa.data.spec import open_dataset

        image = open_dataset(str(spec)).frames(0, [0])[0]
        return [int(image[SIDE // 4, SIDE // 2, 2]), int(image[3 * SIDE // 4, SIDE // 2, 1])]

    ended = ask(colours, folder)
    ended.require_done()
    if min(ended.answer) < 200:
        raise Fault("an image lies on its side")


def _rlds_text(folder: Path, texts: dict[str, Callable[[int], bytes]], **options: Any) -> None:
    data = rlds(folder, texts, **options)
    expect(read(f"rlds:{data},fps={FPS}", folder), texts=["open the drawer"] * EPISODES, seen=OWN)


def _require_converted(folder: Path, data: Path, right: list[list[int]], *words: object) -> None:
    """Converts with these options, and compares the images."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    given = ("data", "lerobot", data, *words, "--size", SIDE, "--workers", 1, "--out", out)
    lapa(*given, folder=folder).require_done()
    expect(read(out, folder), seen=right)
