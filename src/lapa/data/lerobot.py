"""Dataset folders in the LeRobotDataset v3.0 layout; `lapa.data.writer` writes them.

    meta/info.json                       what there is: fps, features, path templates
    meta/tasks.parquet                   instruction (index) -> task_index
    meta/episodes/chunk-*/file-*.parquet one row an episode: its instruction, length, and where it lies
    data/chunk-*/file-*.parquet          one row a frame: action, observation.state, timestamp, indices
    videos/KEY/chunk-*/file-*.mp4        pictures; several episodes may share a file

Action-free video has no `action` feature. `lapa data info DATASET` shows what is inside.
Axes: T time, H W image, C channel, A action dimensions, S state dimensions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapa.data.dataset import ACTION, STATE, Dataset
from lapa.data.video import decode_clip
from lapa.files import fingerprint, is_remote, open_binary, read_json, reading

CODEBASE_VERSION = "v3.0"
INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EXTRA = "meta/lapa.json"
JOURNAL = "meta/journal.jsonl"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# Parquet files whose numbers stay in memory; they are read episode by episode, mostly in order.
OPEN_TABLES = 8


class LeRobotDataset(Dataset):
    """A dataset folder; `LeRobotDataset(root)` raises ValueError naming the file, what is wrong with it, and the mend.

    .info: meta/info.json; .tasks: the instructions by task_index.
    """

    def __init__(self, root: Path, name: str | None = None):
        self.info = _read_info(root)
        self.tasks = _read_tasks(root / TASKS)
        self._columns = columns = _read_episodes(root, video_keys(self.info["features"]))
        if not len(columns["length"]):
            raise ValueError(f"{root}: holds no episode; write it again")
        super().__init__(
            root,
            name or root.name,
            fps=float(self.info["fps"]),
            features=self.info["features"],
            lengths=columns["length"],
            instructions=columns["instruction"],
            sources=columns["source"],
        )
        self._tables: OrderedDict[Path, dict[str, np.ndarray]] = OrderedDict()

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the dataset: a hash of its metadata files."""
        files = [self.root / INFO, self.root / TASKS, *sorted(self.root.glob("meta/episodes/*/*.parquet"))]
        return fingerprint(*files)

    @cached_property
    def extra(self) -> dict[str, Any]:
        """What the command that wrote the dataset noted about it; empty for datasets from elsewhere."""
        return read_json(self.root / EXTRA) if (self.root / EXTRA).exists() else {}

    def video_path(self, episode_index: int, camera: str | None = None) -> Path:
        """The mp4 that holds an episode."""
        key = self._camera_key(camera)
        return self.root / self.info["video_path"].format(
            video_key=key,
            chunk_index=int(self._columns[f"videos/{key}/chunk_index"][episode_index]),
            file_index=int(self._columns[f"videos/{key}/file_index"][episode_index]),
        )

    def _pictures(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        start = float(self._columns[f"videos/{self._camera_key(camera)}/from_timestamp"][episode_index])
        return decode_clip(self.video_path(episode_index, camera), frame_indices, self.fps, start)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _numbers(self, feature: str, episode_index: int) -> tuple[np.ndarray, str]:
        columns = self._columns
        where = {
            "chunk_index": int(columns["data/chunk_index"][episode_index]),
            "file_index": int(columns["data/file_index"][episode_index]),
        }
        path = self.root / self.info["data_path"].format(**where)
        table = self._table(path)
        start = int(np.searchsorted(table["episode_index"], columns["episode_index"][episode_index]))
        length = int(columns["length"][episode_index])
        owners = table["episode_index"][start : start + length]
        if len(owners) != length or (owners != columns["episode_index"][episode_index]).any():
            raise ValueError(f"{path}: lacks rows of episode {episode_index}; write the dataset again")
        return table[feature][start : start + length], str(path)

    def _table(self, path: Path) -> dict[str, np.ndarray]:
        """The numbers of one data file, the last few kept."""
        if path not in self._tables:
            wanted = [name for name in (ACTION, STATE) if name in self.features]
            table = read_parquet(path, ["episode_index", *wanted])
            arrays = {name: _matrix(table[name], self._width(name) or 0, f"{path}: {name}") for name in wanted}
            self._tables[path] = {"episode_index": table["episode_index"].to_numpy(), **arrays}
            if len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(path)
        return self._tables[path]


def require_folder(dataset: Dataset) -> LeRobotDataset:
    """The dataset, which must be a folder on this machine. ValueError, with the mend, where it is read in place."""
    if not isinstance(dataset, LeRobotDataset) or is_remote(dataset.root):
        raise ValueError(f"{dataset.root}: this needs a dataset folder on this machine; convert or copy it first")
    return dataset


def _read_info(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise ValueError(f"{root}: no such dataset folder; make one with `lapa data videos FOLDER --out {root}`")
    if not (root / INFO).exists():
        if (root / JOURNAL).exists():
            raise ValueError(f"{root}: unfinished dataset; run the command that was writing it again with --resume")
        raise ValueError(f"{root}: not a dataset (no {INFO}); `lapa data videos {root} --out DATASET` makes one")
    info = read_json(root / INFO)
    version = info.get("codebase_version")
    if version != CODEBASE_VERSION:
        raise ValueError(f"{root / INFO}: is LeRobotDataset {version}, {CODEBASE_VERSION} is read; convert it first")
    lacking = [key for key in ("fps", "features", "data_path", "video_path") if not info.get(key)]
    if lacking:
        raise ValueError(f"{root / INFO}: lacks {', '.join(lacking)}; write the dataset again")
    if not video_keys(info["features"]):
        raise ValueError(f"{root / INFO}: has no video feature; only datasets whose pictures are videos are read")
    return info


def _read_tasks(path: Path) -> tuple[str, ...]:
    table = read_parquet(path)
    # pandas calls an index without a name so.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise ValueError(f"{path}: needs the columns task and task_index; write the dataset again")
    pairs = zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True)
    return tuple(task for _, task in sorted(pairs))


def _read_episodes(root: Path, video_keys: list[str]) -> dict[str, np.ndarray]:
    """The metadata of all episodes as columns, without the statistics."""
    wanted = ["episode_index", "length", "data/chunk_index", "data/file_index", "tasks"]
    wanted += [f"videos/{key}/{name}" for key in video_keys for name in ("chunk_index", "file_index", "from_timestamp")]
    paths = sorted(root.glob("meta/episodes/*/*.parquet"))
    if not paths:
        raise ValueError(f"{root / 'meta/episodes'}: holds no parquet file; write the dataset again")
    tables = []
    for path in paths:
        with open_binary(path) as file:
            names = pq.read_schema(file).names
        lacking = [name for name in wanted if name not in names]
        if lacking:
            raise ValueError(f"{path}: lacks the columns {', '.join(lacking)}; write the dataset again")
        tables.append(read_parquet(path, [*wanted, *(["source"] if "source" in names else [])]))
    table = pa.concat_tables(tables, promote_options="default").sort_by("episode_index")
    columns = {name: table[name].to_numpy() for name in wanted if name != "tasks"}
    columns["instruction"] = np.array([tasks[0] if tasks else "" for tasks in table["tasks"].to_pylist()], object)
    sources = table["source"].to_pylist() if "source" in table.column_names else [""] * len(table)
    columns["source"] = np.array([source or "" for source in sources], object)
    if (columns["episode_index"] != np.arange(len(table))).any():
        raise ValueError(f"{root / 'meta/episodes'}: episode_index does not count from 0; write the dataset again")
    return columns


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A table of a dataset. ValueError naming the file where it cannot be read."""
    again = "write the dataset again"
    try:
        with reading(path, again), open_binary(path) as file:
            return pq.ParquetFile(file).read(columns=columns)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {again}") from None


def _matrix(column: pa.ChunkedArray, width: int, source: str) -> np.ndarray:
    """A parquet column as float32 [T, width]; a feature of width 1 may be stored as plain numbers."""
    array = column.combine_chunks()
    flat = array if pa.types.is_floating(array.type) or pa.types.is_integer(array.type) else array.flatten()
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if len(values) != len(array) * width:
        raise ValueError(f"{source} is not {width} numbers wide in every row, as {INFO} says; write the dataset again")
    return values.reshape(len(array), width)


def video_keys(features: dict[str, dict[str, Any]]) -> list[str]:
    """The features that are videos."""
    return [key for key, feature in features.items() if feature["dtype"] == "video"]
