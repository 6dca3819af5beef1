"""Metadata of folders in the layouts of LeRobotDataset (`lapa.data.lerobot`): names of files, and what is in meta/.

Axes: T time, N rows of a file, E episodes of it, R runs of rows of one.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from lapa.data.dataset import all_image_keys, image_keys
from lapa.data.tables import (
    AGAIN,
    LISTS,
    Texts,
    as_numpy,
    column_names,
    floats,
    integers,
    is_text,
    parsing,
    read_json_rows,
    read_parquet,
    texts_of,
)
from lapa.errors import UserError, shown
from lapa.files import errors_about, find_files, inside, is_remote, read_json, reading

CODEBASE_VERSION = "v3.0"
# One file per episode.
LEGACY_VERSIONS = ("v2.1", "v2.0")
INFO = "meta/info.json"
TASKS = "meta/tasks.parquet"
JOURNAL = "meta/journal.jsonl"
# Of a dataset on a store: the folder with the lines of the journal, some items in each file.
JOURNAL_PARTS = "meta/journal"
STATS = "meta/stats.json"
EXTRA = "meta/lapa.json"
# What a conversion has kept and left out, for a browser.
LEFT_OUT = "meta/left_out.html"
EPISODES = "meta/episodes"
EPISODES_PATH = EPISODES + "/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
PLACE = ("chunk_index", "file_index")
SPAN = ("from_timestamp", "to_timestamp")
LEGACY_TASKS = "meta/tasks.jsonl"
LEGACY_EPISODES = "meta/episodes.jsonl"
# Episodes per chunk folder in v2.1, where meta/info.json does not have the number.
LEGACY_CHUNK = 1000
# A number's format in a path template, such as 03d.
WIDTH = "(0?([1-9]|1[0-2]))?d?"
# Frames of a dataset, of which larger ones are split and mixed in training; and of a second.
MOST_FRAMES, MOST_FPS = 10**9, 10**6
# Sides of an image, and numbers of another feature in one frame: far above those of any camera and robot.
MOST_PIXELS, MOST_NUMBERS = 2**14, 10**6


def video_keys(features: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the features that are videos."""
    return [key for key in image_keys(features) if features[key]["dtype"] == "video"]


def read_info(root: Path) -> dict[str, Any]:
    """Reads meta/info.json. Raises UserError with what `root` is instead, or what is wrong with the file."""
    path = root / INFO
    if is_remote(root):
        with reading(path, "a dataset folder holds one; correct the path"):
            path.stat()
    else:
        _require_folder(root)
    info = read_json(path)
    if not isinstance(info, dict):
        raise UserError(f"{path}: expected an object; {AGAIN}")
    version = info.get("codebase_version")
    if version is None:
        raise UserError(f"{path}: lacks codebase_version; {AGAIN}")
    if version not in (CODEBASE_VERSION, *LEGACY_VERSIONS):
        known = ", ".join((CODEBASE_VERSION, *LEGACY_VERSIONS))
        fix = "convert it with LeRobot's own scripts" if str(version) < "v2.0" else "update lapa"
        raise UserError(f"{path}: is LeRobotDataset {version}, {known} are read; {fix}")
    _check_features(path, info)
    if type(info["fps"]) not in (int, float) or not 1 / MOST_FPS < info["fps"] <= MOST_FPS:
        raise UserError(f"{path}: fps must be a number above 0, and {MOST_FPS} at most, got {shown(info['fps'])}")
    _check_templates(path, info)
    try:
        json.dumps(info, allow_nan=False)
    except ValueError:
        raise UserError(f"{path}: holds a number that is not finite; correct it") from None
    return info


class Tasks(Texts):
    """Instructions, ordered by their numbers (task_index); numbers_N: these."""

    __slots__ = ("numbers_N",)

    def __init__(self, numbers_N: Int[np.ndarray, "N"], texts: pa.ChunkedArray | Sequence[str]):
        # Of two with one number, the later one.
        self.numbers_N, last_N = np.unique(numbers_N[::-1], return_index=True)
        super().__init__(Texts(texts).array.take(pa.array(len(numbers_N) - 1 - last_N)))

    def get(self, number: int) -> str:
        """Returns the instruction of a number, "" where there is none."""
        place = int(np.searchsorted(self.numbers_N, number))
        known = place < len(self) and self.numbers_N[place] == number
        return str(self[place]) if known else ""


def read_tasks(root: Path, legacy: bool) -> Tasks:
    """Reads the instructions; none where the file is missing."""
    if not (root / (LEGACY_TASKS if legacy else TASKS)).exists():
        return Tasks(np.zeros(0, np.int64), [])
    if legacy:
        rows = read_json_rows(root / LEGACY_TASKS, {"task_index": int, "task": str})
        with parsing(root / LEGACY_TASKS):
            return Tasks(np.array([row["task_index"] for row in rows], np.int64), [row["task"] for row in rows])
    path = root / TASKS
    table = read_parquet(path)
    # pandas gives an index without a name this one.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise UserError(f"{path}: needs the columns task and task_index; {AGAIN}")
    return Tasks(integers(table, "task_index", path), texts_of(table[names[0]]))


def read_episodes(root: Path, legacy: bool, video_keys: Sequence[str], tasks: Tasks) -> dict[str, Any]:
    """Reads the metadata of all episodes, in order, as columns: arrays, and `Texts`.

    episode_index, length, instruction (the first of its tasks), num_tasks, source (what it was made from, where that is
    noted), flaw (what is wrong with these, "" where nothing is), and for v3.0 its location: data/chunk_index,
    data/file_index, and for each video key videos/KEY/chunk_index, videos/KEY/file_index, videos/KEY/from_timestamp,
    videos/KEY/to_timestamp, videos/KEY/flaw.
    """
    path = root / (LEGACY_EPISODES if legacy else EPISODES)
    with parsing(path):
        columns = _legacy_episodes(path, tasks) if legacy else _episodes(root, video_keys, tasks)
    if not len(columns["length"]):
        raise UserError(f"{root}: holds no episode; write it again")
    numbers = columns["episode_index"]
    if numbers[0] < 0 or (again := np.flatnonzero(np.diff(numbers) < 1)).size:
        wrong = numbers[0] if numbers[0] < 0 else f"{numbers[again[0]]} twice"
        raise UserError(f"{path}: lists episode_index {wrong}; {AGAIN}")
    if (columns["flaw"] != "").all():
        raise UserError(columns["flaw"][0])
    if (num_frames := sum(columns["length"].tolist())) > MOST_FRAMES:
        raise UserError(f"{path}: declares {num_frames} frames, more than {MOST_FRAMES}; {AGAIN}, or split it")
    return columns


def episode_files(root: Path) -> list[Path]:
    """Returns the parquet files with the episodes of a v3.0 dataset."""
    paths = find_files(root / EPISODES, "*/*.parquet")
    if not paths:
        raise UserError(f"{root / EPISODES}: holds no parquet file; {AGAIN}")
    return paths


def find_episodes(
    owners_N: Int[np.ndarray, "N"],
    seconds_N: Float[np.ndarray, "N"] | None,
    episodes_E: Int[np.ndarray, "E"],
    lengths_E: Int[np.ndarray, "E"],
    fps: float,
) -> tuple[Int[np.ndarray, "E"], dict[int, str]]:
    """Returns the first row of each episode in a data file, and by episode what is wrong with its rows.

    owners_N: the episode of each row; seconds_N: its time in the episode, None where the file has no such column.
    Frame i of an episode must be at i / fps seconds, to half a frame, since images are found by it.
    """
    # Runs of rows of one episode, ordered by it. In arrays, since a file may change its episode in every row.
    starts_R = np.flatnonzero(np.concatenate([np.ones(min(1, len(owners_N)), bool), owners_N[1:] != owners_N[:-1]]))
    order_R = np.argsort(owners_N[starts_R], kind="stable")
    ends_R = np.cumsum(np.diff(starts_R, append=len(owners_N))[order_R])
    starts_R = starts_R[order_R]
    pieces_E, beyond_E = (np.searchsorted(owners_N[starts_R], episodes_E, side) for side in ("left", "right"))
    firsts, flaws = [], {}
    for episode, length, piece, beyond in zip(
        episodes_E.tolist(), lengths_E.tolist(), pieces_E.tolist(), beyond_E.tolist(), strict=True
    ):
        count = int(ends_R[beyond - 1] - (ends_R[piece - 1] if piece else 0)) if beyond > piece else 0
        first = int(starts_R[piece]) if count else 0
        firsts.append(first)
        if count < length:
            flaws[episode] = f"lacks rows of episode {episode} (has {count} of {length}); {AGAIN}"
        elif count > length or beyond > piece + 1:
            flaws[episode] = f"has {count} rows of episode {episode} of {length} frames, or not in one piece; {AGAIN}"
        elif seconds_N is not None and (flaw := _time_flaw(seconds_N[first : first + length], fps)):
            flaws[episode] = f"episode {episode}: {flaw}"
    return np.array(firsts), flaws


def _instructions(column: pa.ChunkedArray, tasks: Tasks) -> tuple[pa.ChunkedArray, Int[np.ndarray, "E"]]:
    """Returns the first text of each episode, "" without one, and how many it has.

    column: their `tasks`: texts, or lists of texts or of numbers of tasks.
    """
    if is_text(column.type):
        texts = texts_of(column)
        return texts, 1 - as_numpy(_is_blank(texts).cast(pa.int64()))
    if not (any(is_kind(column.type) for is_kind in LISTS) and is_text(column.type.value_type)):
        # Many episodes share their texts, which are looked at once.
        named = cache(partial(_texts_of, tasks=tasks))
        listed = ((its,) if isinstance(its, str) else tuple(its or ()) for its in column.to_pylist())
        found = [named(its) for its in listed]
        firsts = pa.array([its[0] if its else "" for its in found], pa.large_string())
        return pa.chunked_array([firsts]), np.array([len(its) for its in found], np.int64)
    flat = column.combine_chunks()
    owners, texts = pc.list_parent_indices(flat), texts_of(pa.chunked_array([pc.list_flatten(flat)]))
    places_N = np.flatnonzero(as_numpy(_is_blank(texts).cast(pa.uint8())) == 0)
    owners_N = as_numpy(owners)[places_N]
    counts_E = np.bincount(owners_N, minlength=len(column))
    firsts_E = np.full(len(column), -1)
    # Of several values that are put in one place, the last one stays.
    firsts_E[owners_N[::-1]] = places_N[::-1]
    places = pa.array(firsts_E, mask=firsts_E < 0)
    return texts.take(places).fill_null(""), counts_E


def _is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.equal(pc.utf8_trim_whitespace(texts), "")


def _texts_of(listed: tuple[Any, ...], tasks: Tasks) -> list[str]:
    """Returns the instructions in an episode's `tasks`, texts or numbers of tasks; without empty ones."""
    texts = [tasks.get(task) if type(task) is int else str(task or "") for task in listed]
    return [text for text in texts if text.strip()]


def _time_flaw(seconds_T: np.ndarray, fps: float) -> str:
    """Returns what is wrong with the times of an episode's frames; "" where nothing is."""
    known_T = np.isfinite(seconds_T)
    if not known_T.all():
        return f"timestamps are empty or not finite at frame {np.argmin(known_T)}; correct it or leave the episode out"
    forward, expected_T = np.diff(seconds_T) > 0, np.arange(len(seconds_T)) / fps
    fits_T = np.abs(seconds_T - expected_T) < 0.5 / fps
    if not forward.all():
        frame = int(np.argmin(forward)) + 1
        order = f"{seconds_T[frame]:.3f} s after {seconds_T[frame - 1]:.3f} s"
        return f"timestamps go backwards at frame {frame} ({order}); correct them or leave the episode out"
    if fits_T.all():
        return ""
    frame = int(np.argmin(fits_T))
    found = f"frame {frame} is at {seconds_T[frame]:.3f} s, should be at {expected_T[frame]:.3f} s"
    return f"timestamps do not match {fps:g} fps ({found}); correct them, or fps in meta/info.json"


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise UserError(f"{root}: no such dataset folder; make one with `lapa data videos FOLDER --out {root}`")
    if not (root / INFO).exists():
        if (root / JOURNAL).exists():
            raise UserError(f"{root}: unfinished dataset; run the command that was writing it again with --resume")
        raise UserError(f"{root}: not a dataset (no {INFO}); `lapa data videos {root} --out DATASET` makes one")


def _check_features(path: Path, info: dict[str, Any]) -> None:
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        raise UserError(f"{path}: lacks features; {AGAIN}")
    for name, feature in features.items():
        known = isinstance(feature, dict) and isinstance(feature.get("dtype"), str)
        shape = feature.get("shape") if known else None
        if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
            raise UserError(f"{path}: feature {shown(name)} needs a dtype and a shape, got {shown(feature)}; {AGAIN}")
        if feature["dtype"] in ("video", "image"):
            details = all(isinstance(feature.get(key) or {}, dict) for key in ("info", "video_info"))
            if len(shape) not in (2, 3) or max(shape) > MOST_PIXELS or not details:
                what = f"is not as LeRobot describes images, got {shown(feature)}"
                raise UserError(f"{path}: feature {shown(name)} {what}; {AGAIN}")
        elif math.prod(shape) > MOST_NUMBERS:
            what = f"is {math.prod(shape)} numbers wide, {MOST_NUMBERS} at most are read"
            raise UserError(f"{path}: feature {shown(name)} {what}; {AGAIN}")
    with errors_about(f"{path}: the name of a camera"):
        for key in image_keys(features):
            inside(path.parent.parent, key)
    if not image_keys(features):
        raise UserError(no_colour(path, all_image_keys(features)))
    needed = ["fps", "data_path", *(["video_path"] if video_keys(features) else [])]
    if lacking := [key for key in needed if info.get(key) is None]:
        raise UserError(f"{path}: lacks {', '.join(lacking)}; {AGAIN}")


def no_colour(path: Path, others: Sequence[str]) -> str:
    found = f"only depth or grey images ({', '.join(others)})" if others else "no feature of dtype video or image"
    return f"{path}: has no camera ({found}); lapa learns from colour video"


def _check_templates(path: Path, info: dict[str, Any]) -> None:
    """Raises UserError for a template that is more than names and numbers, or that leads to a file of another kind."""
    legacy, root = info["codebase_version"] in LEGACY_VERSIONS, path.parent.parent
    fields = ("episode_chunk", "episode_index") if legacy else PLACE
    chunk = info.get("chunks_size") or LEGACY_CHUNK
    if type(chunk) is not int or chunk < 1:
        raise UserError(f"{path}: chunks_size must be a whole number above 0, got {shown(chunk)}; {AGAIN}")
    named = []
    for key, known in (("data_path", fields), ("video_path", (*fields, "video_key"))):
        template = info.get(key)
        if template is None:
            continue
        if not _is_template(template, known):
            raise UserError(f"{path}: {key} is {shown(template)}; it may name {', '.join(known)}; {AGAIN}")
        with errors_about(f"{path}: {key}"):
            for video_key in video_keys(info["features"]) if key == "video_path" else [""]:
                name = template.format(**{**dict.fromkeys(fields, 0), "video_key": video_key})
                named.append(inside(root, name).relative_to(root))
    if len(set(named)) < len(named) or any(name.parts[0] == "meta" for name in named):
        raise UserError(f"{path}: data_path and video_path name one file for two purposes, or a file of meta; {AGAIN}")


def _is_template(template: Any, fields: Sequence[str]) -> bool:
    """Whether a text is formatted by these fields and nothing else, with a width at most."""
    try:
        parsed = list(string.Formatter().parse(template))
    except (TypeError, ValueError):
        return False
    return all(
        field is None
        or (field in fields and not conversion and re.fullmatch("" if field == "video_key" else WIDTH, width or ""))
        for _, field, width, conversion in parsed
    )


def _episodes(root: Path, video_keys: Sequence[str], tasks: Tasks) -> dict[str, Any]:
    parts = [_episode_rows(path, video_keys, tasks) for path in episode_files(root)]
    columns = {name: _joined([part.pop(name) for part in parts]) for name in list(parts[0])}
    order = np.argsort(columns["episode_index"], kind="stable")
    if (np.diff(order) == 1).all():
        return columns
    return {name: values[order] for name, values in columns.items()}


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return Texts(pa.chunked_array([chunk for part in parts for chunk in part.chunks]))


def _episode_rows(path: Path, video_keys: Sequence[str], tasks: Tasks) -> dict[str, Any]:
    """Reads a file of episodes.

    What is empty, or no number of its kind, is a flaw of that episode alone, and what is lacking of a camera, of that
    camera alone.
    """
    present, of_data = set(column_names(path)), ["length", *(f"data/{name}" for name in PLACE)]
    wanted = ["episode_index", *of_data]
    of_cameras = {f"videos/{key}": [f"videos/{key}/{name}" for name in (*PLACE, *SPAN)] for key in video_keys}
    ends = [f"videos/{key}/{SPAN[1]}" for key in video_keys]
    optional = ["tasks", "source", *(name for names in of_cameras.values() for name in names)]
    table = read_parquet(path, [*wanted, *(name for name in optional if name in present)])
    columns = {"episode_index": integers(table, "episode_index", path)}
    for kind, names in {"": of_data, **of_cameras}.items():
        lacking = [name for name in names if name not in present and name not in ends]
        flaw = f"{path}: lacks the columns {', '.join(lacking)}; download it again, or choose other cameras (--camera)"
        flaws = np.full(len(table), flaw if lacking else "", object)
        for name in names:
            least = 1 if name == "length" else 0
            if name not in present:
                columns[name] = np.full(len(table), np.nan if name in ends else 0)
                continue
            values = floats(table[name], f"{path}: {name}")
            fits = np.isfinite(values)
            if not name.endswith(SPAN):
                fits &= (np.floor(values) == values) & (values >= least)
            fits &= values < 2**53
            for row in np.flatnonzero(~fits & (flaws == "")):
                number = columns["episode_index"][row]
                flaws[row] = _episode_flaw(path, number, name, table[name][int(row)].as_py())
            values = np.where(fits, values, least)
            columns[name] = values if name.endswith(SPAN) else values.astype(np.int64)
        columns[f"{kind}/flaw" if kind else "flaw"] = flaws
    empty = pa.chunked_array([pa.array([""] * len(table), pa.large_string())])
    columns["source"] = texts_of(table["source"]) if "source" in present else empty
    listed = table["tasks"] if "tasks" in present else empty
    columns["instruction"], columns["num_tasks"] = _instructions(listed, tasks)
    return columns


def _episode_flaw(path: Path, episode: int, column: str, found: object) -> str:
    what = "empty" if found is None else shown(found)
    return f"{path}: {column} of episode {episode} is {what}; correct it or leave the episode out"


def _legacy_episodes(path: Path, tasks: Tasks) -> dict[str, Any]:
    rows = read_json_rows(path, {"episode_index": int})
    rows.sort(key=lambda row: row["episode_index"])
    fits = [type(row.get("length")) is int and 1 <= row["length"] <= MOST_FRAMES for row in rows]
    flaws = [
        "" if fit else _episode_flaw(path, row["episode_index"], "length", row.get("length"))
        for row, fit in zip(rows, fits, strict=True)
    ]
    listed = ((its,) if isinstance(its := row.get("tasks") or (), str) else tuple(its) for row in rows)
    texts = [_texts_of(its, tasks) for its in listed]
    return {
        "num_tasks": np.array([len(its) for its in texts], np.int64),
        "instruction": Texts([its[0] if its else "" for its in texts]),
        "episode_index": np.array([row["episode_index"] for row in rows], np.int64),
        "length": np.array([row["length"] if fit else 1 for row, fit in zip(rows, fits, strict=True)], np.int64),
        "flaw": np.array(flaws, object),
        "source": Texts([str(row.get("source") or "") for row in rows]),
    }
