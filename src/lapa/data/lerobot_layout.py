"""The metadata of LeRobot dataset folders, versions v3.0, v2.1 and v2.0, as one set of columns.

    v3.0                                          v2.1 and v2.0
    meta/tasks.parquet                            meta/tasks.jsonl
    meta/episodes/chunk-*/file-*.parquet          meta/episodes.jsonl
    data/chunk-*/file-*.parquet                   data/chunk-*/episode_*.parquet
    videos/KEY/chunk-*/file-*.mp4                 videos/chunk-*/KEY/episode_*.mp4

Files of v3.0 hold many episodes, those of v2.1 one each. The statistics of either are not read.
Formats: https://huggingface.co/docs/lerobot/lerobot-dataset-v3, https://github.com/huggingface/lerobot (v0.3.3: v2.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from lapa.data.dataset import picture_keys
from lapa.data.parquet import AGAIN, column_names, read_parquet
from lapa.errors import UserError
from lapa.files import is_remote, read_json, reading

CODEBASE_VERSION = "v3.0"
# One file an episode.
LEGACY_VERSIONS = ("v2.1", "v2.0")
INFO = "meta/info.json"
TASKS = "meta/tasks.parquet"
JOURNAL = "meta/journal.jsonl"
LEGACY_TASKS = "meta/tasks.jsonl"
LEGACY_EPISODES = "meta/episodes.jsonl"


def read_info(root: Path) -> dict[str, Any]:
    """meta/info.json of a dataset. UserError saying what `root` is instead, or what is wrong with the file."""
    if is_remote(root):
        with reading(root / INFO, "a dataset folder holds one; correct the path"):
            (root / INFO).stat()
    else:
        _require_folder(root)
    info = read_json(root / INFO)
    if not isinstance(info, dict):
        raise UserError(f"{root / INFO}: expected an object; {AGAIN}")
    version = info.get("codebase_version")
    if version is None:
        raise UserError(f"{root / INFO}: lacks codebase_version; {AGAIN}")
    if version not in (CODEBASE_VERSION, *LEGACY_VERSIONS):
        known = ", ".join((CODEBASE_VERSION, *LEGACY_VERSIONS))
        mend = "convert it with LeRobot's own scripts" if str(version) < "v2.0" else "update lapa"
        raise UserError(f"{root / INFO}: is LeRobotDataset {version}, {known} are read; {mend}")
    _check_features(root, info)
    needed = ["fps", "data_path"]
    needed += ["video_path"] if video_keys(info["features"]) else []
    lacking = [key for key in needed if not info.get(key)]
    if lacking:
        raise UserError(f"{root / INFO}: lacks {', '.join(lacking)}; {AGAIN}")
    if not isinstance(info["fps"], int | float) or info["fps"] <= 0:
        raise UserError(f"{root / INFO}: fps must be a number above 0, got {info['fps']!r}")
    _check_templates(root, info)
    return info


def read_tasks(root: Path, version: str) -> tuple[str, ...]:
    """The instructions, by task_index."""
    if version in LEGACY_VERSIONS:
        rows = _json_lines(root / LEGACY_TASKS, {"task_index": int, "task": str})
        return tuple(row["task"] for row in sorted(rows, key=lambda row: row["task_index"]))
    path = root / TASKS
    table = read_parquet(path)
    # pandas calls an index without a name so.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise UserError(f"{path}: needs the columns task and task_index; {AGAIN}")
    pairs = zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True)
    return tuple(task for _, task in sorted(pairs))


def read_episodes(root: Path, version: str, video_keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The metadata of all episodes, in order, as columns.

    length, instruction (the first of its tasks), num_tasks, source (what it was made from, where that is noted), and
    for v3.0 where it lies: data/chunk_index, data/file_index, and for each video key videos/KEY/chunk_index,
    videos/KEY/file_index, videos/KEY/from_timestamp.
    """
    columns = _legacy_episodes(root) if version in LEGACY_VERSIONS else _episodes(root, video_keys)
    where = root / (LEGACY_EPISODES if version in LEGACY_VERSIONS else "meta/episodes")
    tasks = columns.pop("tasks")
    columns["num_tasks"] = np.array([len(its) for its in tasks], np.int64)
    columns["instruction"] = np.array([str(its[0]) if len(its) else "" for its in tasks], object)
    if not len(columns["length"]):
        raise UserError(f"{root}: holds no episode; write it again")
    if (columns.pop("episode_index") != np.arange(len(tasks))).any():
        raise UserError(f"{where}: episode_index does not count from 0; {AGAIN}")
    if columns["length"].min() < 1:
        episode = int(columns["length"].argmin())
        raise UserError(f"{where}: episode {episode} has length {columns['length'][episode]}; {AGAIN}")
    return columns


def metadata_files(root: Path, version: str) -> list[Path]:
    """The files that say what a dataset holds."""
    if version in LEGACY_VERSIONS:
        return [root / INFO, root / LEGACY_TASKS, root / LEGACY_EPISODES]
    return [root / INFO, root / TASKS, *_episode_files(root)]


def require_files(root: Path, files: Sequence[str], what: str, mend: str) -> None:
    """UserError naming the first and the number of those files below `root` that are not there.

    Each folder is listed once, which is much faster than asking for every file.
    """
    present = {folder: set(_names_in(root / folder)) for folder in {file.rpartition("/")[0] for file in files}}
    places = (file.rpartition("/") for file in files)
    missing = [file for file, (folder, _, name) in zip(files, places, strict=True) if name not in present[folder]]
    if missing:
        told = f"{len(missing)} of {len(files)} {what} are missing"
        raise UserError(f"{root / missing[0]}: no such file; {told}; {mend}")


def video_keys(features: dict[str, dict[str, Any]]) -> list[str]:
    """The features that are videos."""
    return [key for key in picture_keys(features) if features[key]["dtype"] == "video"]


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        hub = f"; `lerobot:{root}` reads it from the hub" if len(root.parts) == 2 and not root.is_absolute() else ""
        make = f"make one with `lapa data videos FOLDER --out {root}`"
        raise UserError(f"{root}: no such dataset folder; {make}{hub}")
    if not (root / INFO).exists():
        if (root / JOURNAL).exists():
            raise UserError(f"{root}: unfinished dataset; run the command that was writing it again with --resume")
        raise UserError(f"{root}: not a dataset (no {INFO}); `lapa data videos {root} --out DATASET` makes one")


def _check_features(root: Path, info: dict[str, Any]) -> None:
    features = info.get("features")
    if not isinstance(features, dict) or not features:
        raise UserError(f"{root / INFO}: lacks features; {AGAIN}")
    for name, feature in features.items():
        if not isinstance(feature, dict) or not feature.get("dtype") or not isinstance(feature.get("shape"), list):
            raise UserError(f"{root / INFO}: feature {name} needs a dtype and a shape, got {feature}; {AGAIN}")
    if not picture_keys(features):
        raise UserError(f"{root / INFO}: has no camera (no feature of dtype video or image); lapa learns from video")


def _check_templates(root: Path, info: dict[str, Any]) -> None:
    legacy = info["codebase_version"] in LEGACY_VERSIONS
    fields = ("episode_chunk", "episode_index") if legacy else ("chunk_index", "file_index")
    for key in ("data_path", "video_path"):
        try:
            (info.get(key) or "").format(video_key="", **dict.fromkeys(fields, 0))
        except (KeyError, IndexError, ValueError) as error:
            told = f"may name {', '.join(fields)}"
            raise UserError(f"{root / INFO}: {key} is {info[key]!r}; it {told} (got {error}); {AGAIN}") from None


def _episodes(root: Path, video_keys: Sequence[str]) -> dict[str, Any]:
    wanted = ["episode_index", "length", "data/chunk_index", "data/file_index", "tasks"]
    wanted += [f"videos/{key}/{name}" for key in video_keys for name in ("chunk_index", "file_index", "from_timestamp")]
    tables = []
    for path in _episode_files(root):
        names = column_names(path)
        lacking = [name for name in wanted if name not in names]
        if lacking:
            raise UserError(f"{path}: lacks the columns {', '.join(lacking)}; {AGAIN}")
        tables.append(read_parquet(path, [*wanted, *(["source"] if "source" in names else [])]))
    table = pa.concat_tables(tables, promote_options="default").sort_by("episode_index")
    columns: dict[str, Any] = {name: table[name].to_numpy() for name in wanted if name != "tasks"}
    sources = table["source"].to_pylist() if "source" in table.column_names else [""] * len(table)
    columns["source"] = np.array([source or "" for source in sources], object)
    return {**columns, "tasks": [its or [] for its in table["tasks"].to_pylist()]}


def _legacy_episodes(root: Path) -> dict[str, Any]:
    rows = _json_lines(root / LEGACY_EPISODES, {"episode_index": int, "length": int})
    rows.sort(key=lambda row: row["episode_index"])
    return {
        "episode_index": np.array([row["episode_index"] for row in rows], np.int64),
        "length": np.array([row["length"] for row in rows], np.int64),
        "source": np.array([str(row.get("source") or "") for row in rows], object),
        "tasks": [row.get("tasks") or [] for row in rows],
    }


def _episode_files(root: Path) -> list[Path]:
    with reading(root / "meta/episodes", AGAIN):
        paths = sorted(root.glob("meta/episodes/*/*.parquet"))
    if not paths:
        raise UserError(f"{root / 'meta/episodes'}: holds no parquet file; {AGAIN}")
    return paths


def _json_lines(path: Path, keys: Mapping[str, type]) -> list[dict[str, Any]]:
    rows = []
    try:
        with reading(path, AGAIN):
            lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); {AGAIN}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); {AGAIN}") from None
        lacking = [key for key, kind in keys.items() if not isinstance(row, dict) or not isinstance(row.get(key), kind)]
        if lacking:
            raise UserError(f"{path}: line {number} lacks {', '.join(lacking)}; {AGAIN}")
        rows.append(row)
    return rows


def _names_in(folder: Path) -> list[str]:
    with reading(folder):
        try:
            if not is_remote(folder):
                return [path.name for path in folder.iterdir()]
            # UPath takes a folder that may not be listed for one that is not there.
            remote = cast(Any, folder)
            return [name.rstrip("/").rsplit("/", 1)[-1] for name in remote.fs.ls(remote.path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
