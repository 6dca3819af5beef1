"""Dataset folders in the LeRobotDataset v3.0 layout, which `lapa.data.writer` writes, and in those of v2.1 and v2.0.

    v3.0                                               v2.1 and v2.0
    meta/info.json: fps, features, path templates      meta/info.json
    meta/tasks.parquet: instruction -> task_index      meta/tasks.jsonl
    meta/episodes/chunk-*/file-*.parquet: one row      meta/episodes.jsonl
      per episode: instruction, length, location
    data/chunk-*/file-*.parquet: one row per frame:    data/chunk-*/episode_*.parquet
      action, observation.state, timestamp, indices
    videos/KEY/chunk-*/file-*.mp4                      videos/chunk-*/KEY/episode_*.mp4

Files of v3.0 hold many episodes, those of v2.1 one each. Images may also be PNG or JPEG in columns of the data files
(features of dtype `image`). Action-free video has no `action` feature. LeRobot's statistics are not read.
`lapa data info DATASET` shows the content of a dataset.
Formats: https://huggingface.co/docs/lerobot/lerobot-dataset-v3, https://github.com/huggingface/lerobot (v0.3.3: v2.1).
Axes: T time, H W image, C channel, D numbers of a feature, N rows of a file, E episodes of it, R runs of rows of one.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt8

from lapa.data.dataset import ACTION, ACTION_SPACE, STATE, Dataset, image_keys
from lapa.data.transforms import decode_image
from lapa.data.video import decode_clip
from lapa.errors import UserError, shown, unknown
from lapa.files import (
    errors_about,
    fingerprint,
    inside,
    is_remote,
    open_binary,
    parse_json,
    read_json,
    reading,
    why_unreadable,
)

CODEBASE_VERSION = "v3.0"
# One file per episode.
LEGACY_VERSIONS = ("v2.1", "v2.0")
INFO = "meta/info.json"
TASKS = "meta/tasks.parquet"
JOURNAL = "meta/journal.jsonl"
STATS = "meta/stats.json"
EXTRA = "meta/lapa.json"
EPISODES = "meta/episodes"
EPISODES_PATH = EPISODES + "/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
PLACE = ("chunk_index", "file_index")
LEGACY_TASKS = "meta/tasks.jsonl"
LEGACY_EPISODES = "meta/episodes.jsonl"
# Episodes per chunk folder in v2.1, where meta/info.json does not have the number.
LEGACY_CHUNK = 1000
# Parquet files whose numbers stay in memory: they are read episode by episode, mostly in order.
OPEN_TABLES = 8
# Row groups of images that stay in memory: LeRobot writes one per episode, and an item has one image per camera.
OPEN_GROUPS = 4
# A number's format in a path template, such as 03d.
WIDTH = "(0?([1-9]|1[0-2]))?d?"
# Frames of a dataset; larger ones are split, and mixed in training.
MOST_FRAMES = 10**9
# Sides of an image, and numbers of another feature in one frame: far above those of any camera and robot.
MOST_PIXELS, MOST_NUMBERS = 2**14, 10**6
# Bytes that columns of a file may take in memory: so many in any case, and so many times the size of the file. Repeated
# values take next to no room in a file.
SMALL_TABLE, EXPANSION = 2**28, 100
# Bytes of a number, or of a reference to a text, by the name of its type in parquet.
SIZES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "BYTE_ARRAY": 4}
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
AGAIN = "write the dataset again"

Value = TypeVar("Value")


class LeRobotDataset(Dataset):
    """A dataset folder. `LeRobotDataset(root)` raises UserError naming the file, what is wrong, and how to fix it.

    info: meta/info.json; version: its codebase_version; tasks: the instructions by task_index.
    num_tasks: how many tasks each episode has, of which the first is its instruction.
    legacy: whether it is of v2.1 or v2.0: one data file and one video per episode.
    """

    def __init__(
        self,
        root: Path,
        name: str | None = None,
        *,
        cameras: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
        declared: Mapping[str, Any] | None = None,
    ):
        """Opens a folder.

        cameras: the cameras to use, in this order; by default all. columns: other names under which `action` and
        `observation.state` are stored. declared: entries of the action space that meta/lapa.json lacks.
        """
        self.info = read_info(root)
        self.version = str(self.info["codebase_version"])
        self.legacy = self.version in LEGACY_VERSIONS
        self.tasks = read_tasks(root, self.legacy)
        self._columns = read_episodes(root, self.legacy, video_keys(self.info["features"]))
        tasks = root / (LEGACY_TASKS if self.legacy else TASKS)
        if not self._columns["num_tasks"].all() and not tasks.exists():
            raise UserError(f"{tasks}: no such file, and not all episodes name their tasks; {AGAIN}")
        self._stored = {ACTION: ACTION, STATE: STATE, **(columns or {})}
        self._declared = dict(declared or {})
        super().__init__(
            root,
            name or root.name or root.absolute().name,
            fps=float(self.info["fps"]),
            features=_renamed(self.info["features"], self._stored, root / INFO),
            lengths=self._columns["length"],
            instructions=self._columns["instruction"],
            sources=self._columns["source"],
        )
        self.num_tasks = self._columns["num_tasks"]
        if cameras:
            self._camera_keys = {camera: self._camera_keys[self.camera_name(camera)] for camera in cameras}
            self.cameras = tuple(cameras)
        self._tables: OrderedDict[Any, dict[str, np.ndarray | pa.ChunkedArray]] = OrderedDict()
        # Of data files with images: the first row of each row group, and the last few row groups.
        self._group_rows: dict[Path, np.ndarray] = {}
        self._groups: OrderedDict[Any, pa.ChunkedArray] = OrderedDict()
        # The first row of each episode in its data file, -1 before that is read; and the errors found there.
        self._first_rows = np.full(len(self.lengths), -1)
        self._flaws = {episode: flaw for episode, flaw in enumerate(self._columns["flaw"]) if flaw}
        self._require_videos()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the metadata files."""
        tasks = self.root / (LEGACY_TASKS if self.legacy else TASKS)
        episodes = [self.root / LEGACY_EPISODES] if self.legacy else episode_files(self.root)
        return fingerprint(self.root / INFO, *([tasks] if tasks.exists() else []), *episodes)

    @cached_property
    def extra(self) -> dict[str, Any]:
        """The notes of the command that wrote the dataset; empty for datasets from elsewhere."""
        path = self.root / EXTRA
        noted = read_json(path) if path.exists() else {}
        if not isinstance(noted, dict):
            raise UserError(f"{path}: expected an object, got {noted!r}; correct it, or delete it")
        known = noted.get(ACTION_SPACE, {})
        declared = self._declared and isinstance(known, dict)
        return {**noted, ACTION_SPACE: {**known, **self._declared}} if declared else noted

    def image_shape(self, camera: str | None = None) -> tuple[int, int]:
        """Returns the height and width of a camera's stored images."""
        feature = self.camera_feature(camera)
        shape, names = feature["shape"], feature.get("names")
        # LeRobot's older datasets declare channels first, of images that are stored as all others.
        if isinstance(names, list) and "height" in names and "width" in names and len(names) == len(shape):
            return shape[names.index("height")], shape[names.index("width")]
        height, width = shape[1:] if len(shape) == 3 and shape[0] == 3 and shape[2] != 3 else shape[:2]
        return height, width

    def video_path(self, episode_index: int, camera: str | None = None) -> Path:
        """Returns the mp4 that holds an episode."""
        key = self._camera_keys[self.camera_name(camera)]
        return self.root / self.info["video_path"].format(video_key=key, **self._place(f"videos/{key}", episode_index))

    def data_path(self, episode_index: int) -> Path:
        """Returns the parquet file that holds an episode's rows."""
        return self.root / self.info["data_path"].format(**self._place("data", episode_index))

    def rows(self, episode_index: int) -> slice:
        """Returns an episode's rows in its data file, which is checked once. Raises UserError where it is damaged."""
        if self._first_rows[episode_index] < 0 and episode_index not in self._flaws:
            path = self.data_path(episode_index)
            timed = ["timestamp"] if "timestamp" in _column_names(path) else []
            table = read_parquet(path, ["episode_index", *timed])
            owners = _integers(table, "episode_index", path, empty=-1)
            seconds = _floats(table["timestamp"], f"{path}: timestamp") if timed else None
            episodes = self._episodes_in(episode_index)
            with _parsing(path):
                found = find_episodes(owners, seconds, episodes, self.lengths[episodes], self.fps)
            self._first_rows[episodes] = found[0]
            self._flaws = {episode: f"{path}: {flaw}" for episode, flaw in found[1].items()} | self._flaws
        if episode_index in self._flaws:
            raise UserError(self._flaws[episode_index])
        first = int(self._first_rows[episode_index])
        return slice(first, first + int(self.lengths[episode_index]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_group_rows": {}, "_groups": OrderedDict()}

    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        key, span = self._camera_keys[camera], self.rows(episode_index)
        if self.features[key]["dtype"] == "image":
            return self._stored_images(self.data_path(episode_index), key, [span.start + i for i in frame_indices])
        start = 0.0 if self.legacy else float(self._columns[f"videos/{key}/from_timestamp"][episode_index])
        return decode_clip(self.video_path(episode_index, camera), frame_indices, self.fps, start)

    def _numbers(self, feature: str, episode_index: int) -> tuple[np.ndarray, str]:
        path, span = self.data_path(episode_index), self.rows(episode_index)

        def read() -> dict[str, np.ndarray | pa.ChunkedArray]:
            wanted = {name: stored for name, stored in self._stored.items() if name in self.features}
            table = read_parquet(path, list(wanted.values()))
            numbers: dict[str, np.ndarray | pa.ChunkedArray] = {}
            for name, stored in wanted.items():
                try:
                    numbers[name] = _matrix(table[stored], self._width(name) or 0, "")
                except UserError:
                    # What is wrong with one episode is found where it is read.
                    numbers[name] = table[stored]
            return numbers

        rows = _recent(self._tables, path, OPEN_TABLES, read)[feature][span]
        if not isinstance(rows, np.ndarray):
            stored = self._stored[feature]
            rows = _matrix(rows, self._width(feature) or 0, f"{path}: {stored} of episode {episode_index}")
        return rows, str(path)

    def _place(self, kind: str, episode_index: int) -> dict[str, int]:
        """Returns the fields of a path template."""
        if self.legacy:
            chunk = episode_index // int(self.info.get("chunks_size") or LEGACY_CHUNK)
            return {"episode_chunk": chunk, "episode_index": episode_index}
        if flaw := self._columns["flaw"][episode_index]:
            raise UserError(flaw)
        return {name: int(self._columns[f"{kind}/{name}"][episode_index]) for name in PLACE}

    def _episodes_in(self, episode_index: int) -> np.ndarray:
        """Returns the episodes that share one's data file."""
        if self.legacy:
            return np.array([episode_index])
        chunks, files = self._columns["data/chunk_index"], self._columns["data/file_index"]
        return np.flatnonzero((chunks == chunks[episode_index]) & (files == files[episode_index]))

    def _stored_images(self, path: Path, column: str, rows: Sequence[int]) -> UInt8[np.ndarray, "T H W 3"]:
        """Returns images of a column of {bytes, path}. Raises UserError naming file and row of a damaged one."""
        if path not in self._group_rows:
            with _parsing(path), open_binary(path) as file:
                metadata = pq.ParquetFile(file).metadata
                sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._group_rows[path] = np.cumsum([0, *sizes])
        starts, images = self._group_rows[path], []
        for row in rows:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            group = _recent(
                self._groups, (path, number, column), OPEN_GROUPS, partial(_read_group, path, number, column)
            )
            value = group[int(row - starts[number])].as_py()
            encoded = value.get("bytes") if isinstance(value, dict) else value
            if not encoded:
                raise UserError(f"{path}: {column} holds no image in row {row}; {AGAIN}")
            images.append(decode_image(encoded, f"{path}: {column} cannot be decoded in row {row}", f"; {AGAIN}"))
        if len({image_HWC.shape for image_HWC in images}) > 1:
            raise UserError(f"{path}: images of {column} differ in size between rows {rows[0]} and {rows[-1]}")
        return np.stack(images)

    def _require_videos(self) -> None:
        """Raises UserError with the first missing video file and their number.

        Each folder is listed once, which is much faster than asking for every file.
        """
        for key in (key for key in video_keys(self.features) if key in self._camera_keys.values()):
            if self.legacy:
                places = [self._place("", episode) for episode in range(len(self))]
            else:
                whole = self._columns["flaw"] == ""
                numbers = zip(*(self._columns[f"videos/{key}/{name}"][whole].tolist() for name in PLACE), strict=True)
                places = [dict(zip(PLACE, pair, strict=True)) for pair in dict.fromkeys(numbers)]
            files = [self.info["video_path"].format(video_key=key, **place) for place in places]
            folders = {file.rpartition("/")[0] for file in files}
            present = {f"{folder}/{name}" for folder in folders for name in _names_in(self.root / folder)}
            if missing := [file for file in files if file not in present]:
                raise UserError(
                    f"{self.root / missing[0]}: no such file; {len(missing)} of {len(files)} video files of {key} are "
                    "missing; download the dataset again, or leave the camera out"
                )


def require_folder(dataset: Dataset) -> LeRobotDataset:
    """Returns the dataset, which must be a v3.0 folder of videos on this machine, opened without options.

    Raises UserError with the way to make one.
    """
    make = f"`lapa data lerobot {dataset.root} --out DATASET` makes one"
    if not isinstance(dataset, LeRobotDataset) or is_remote(dataset.root):
        raise UserError(f"{dataset.root}: this needs a dataset folder on this machine; convert or copy it first")
    if dataset.legacy:
        raise UserError(f"{dataset.root}: this needs LeRobotDataset {CODEBASE_VERSION}, got {dataset.version}; {make}")
    if not (dataset.root / TASKS).exists():
        raise UserError(f"{dataset.root}: this needs {TASKS}, which is missing; {make}")
    if dataset._stored != {ACTION: ACTION, STATE: STATE} or len(dataset.cameras) < len(image_keys(dataset.features)):
        raise UserError(f"{dataset.root}: this needs the dataset as it is, without options; {make}")
    if len(video_keys(dataset.features)) < len(dataset.cameras):
        raise UserError(f"{dataset.root}: this needs cameras whose images are videos; {make}")
    return dataset


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
    if not isinstance(info["fps"], int | float) or not 0 < info["fps"] < math.inf:
        raise UserError(f"{path}: fps must be a number above 0, got {info['fps']!r}")
    _check_templates(path, info)
    try:
        json.dumps(info, allow_nan=False)
    except ValueError:
        raise UserError(f"{path}: holds a number that is not finite; correct it") from None
    return info


def read_tasks(root: Path, legacy: bool) -> tuple[str, ...]:
    """Reads the instructions, in the order of task_index; none where the file is missing."""
    if not (root / (LEGACY_TASKS if legacy else TASKS)).exists():
        return ()
    if legacy:
        rows = _json_lines(root / LEGACY_TASKS, {"task_index": int, "task": str})
        return tuple(row["task"] for row in sorted(rows, key=lambda row: row["task_index"]))
    path = root / TASKS
    table = read_parquet(path)
    # pandas gives an index without a name this one.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise UserError(f"{path}: needs the columns task and task_index; {AGAIN}")
    pairs = zip(_integers(table, "task_index", path).tolist(), table[names[0]].to_pylist(), strict=True)
    return tuple(task for _, task in sorted(pairs, key=lambda pair: pair[0]))


def read_episodes(root: Path, legacy: bool, video_keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads the metadata of all episodes, in order, as columns.

    length, instruction (the first of its tasks), num_tasks, source (what it was made from, where that is noted), flaw
    (what is wrong with these, "" where nothing is), and for v3.0 its location: data/chunk_index, data/file_index, and
    for each video key videos/KEY/chunk_index, videos/KEY/file_index, videos/KEY/from_timestamp.
    """
    path = root / (LEGACY_EPISODES if legacy else EPISODES)
    with _parsing(path):
        columns = _legacy_episodes(path) if legacy else _episodes(root, video_keys)
        tasks = columns.pop("tasks")
        columns["num_tasks"] = np.array([len(its) for its in tasks], np.int64)
        columns["instruction"] = np.array([str(its[0]) if len(its) else "" for its in tasks], object)
    if not len(columns["length"]):
        raise UserError(f"{root}: holds no episode; write it again")
    if (columns.pop("episode_index") != np.arange(len(tasks))).any():
        raise UserError(f"{path}: episode_index does not count from 0; {AGAIN}")
    if (columns["flaw"] != "").all():
        raise UserError(columns["flaw"][0])
    if (num_frames := sum(columns["length"].tolist())) > MOST_FRAMES:
        raise UserError(f"{path}: declares {num_frames} frames, more than {MOST_FRAMES}; {AGAIN}, or split it")
    return columns


def episode_files(root: Path) -> list[Path]:
    """Returns the parquet files with the episodes of a v3.0 dataset."""
    with reading(root / EPISODES, AGAIN):
        paths = sorted(root.glob(f"{EPISODES}/*/*.parquet"))
    if not paths:
        raise UserError(f"{root / EPISODES}: holds no parquet file; {AGAIN}")
    return paths


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a table of a dataset.

    Raises UserError naming the file where it is damaged, lacks a column, or would be far larger in memory.
    """
    with _parsing(path), open_binary(path) as file:
        parquet = _open_parquet(file, columns)
        if lacking := [name for name in columns or () if name not in parquet.schema_arrow.names]:
            raise UserError(f"{path}: lacks the columns {', '.join(lacking)}; {AGAIN}")
        table = parquet.read(columns=columns)
        # Finds texts that are not UTF-8, which would raise where they are used.
        table.validate(full=True)
        if any(_texts_in(column) for column in table.columns):
            _require_memory(sum(map(_text_size, table.columns)), file)
            table = pq.ParquetFile(file).read(columns=columns)
    return table


def _open_parquet(file: BinaryIO, columns: Sequence[str] | None, groups: Sequence[int] | None = None) -> pq.ParquetFile:
    """Opens a file to read these columns of these row groups; None: all. Texts are read as dictionaries.

    Raises ValueError where they would be far larger in memory than the file.
    """
    parquet = pq.ParquetFile(file)
    metadata, leaves = parquet.metadata, list(range(len(parquet.schema)))
    paths = [parquet.schema.column(leaf).path for leaf in leaves]
    if columns is not None:
        leaves = [leaf for leaf in leaves if any(f"{paths[leaf]}.".startswith(f"{name}.") for name in columns)]
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its row groups hold {sum(rows)} rows, its footer declares {metadata.num_rows}")
    slots = {field.name: field.type for field in parquet.schema_arrow}
    total = 0
    for leaf in leaves:
        column, path = parquet.schema.column(leaf), paths[leaf]
        width = SIZES.get(column.physical_type, max(8, column.length)) + 4 * column.max_repetition_level
        kind = next((kind for name, kind in slots.items() if f"{path}.".startswith(f"{name}.")), None)
        for group in range(len(rows)) if groups is None else groups:
            chunk = metadata.row_group(group).column(leaf)
            values = max(chunk.num_values, rows[group], _num_slots(kind, rows[group], chunk.num_values))
            total += max(chunk.total_uncompressed_size, values * width)
    _require_memory(total, file)
    texts = [paths[leaf] for leaf in leaves if parquet.schema.column(leaf).physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(file, read_dictionary=texts) if texts else parquet


def _require_memory(num_bytes: int, file: BinaryIO) -> None:
    """Raises ValueError where `num_bytes` are far more than the size of the file."""
    most = max(SMALL_TABLE, EXPANSION * file.seek(0, 2))
    if num_bytes > most:
        raise ValueError(f"would take {num_bytes / 2**20:.0f} MiB of memory, a file of this size {most >> 20} at most")


def _num_slots(kind: pa.DataType | None, rows: int, values: int) -> int:
    """Returns the most values that Arrow makes room for, which it does in empty lists of a fixed size as well."""
    if isinstance(kind, pa.BaseExtensionType):
        return _num_slots(kind.storage_type, rows, values)
    if kind is None or not pa.types.is_nested(kind):
        return rows
    if pa.types.is_fixed_size_list(kind):
        return _num_slots(kind.value_type, rows * kind.list_size, values)
    return max(_num_slots(kind.field(number).type, values, values) for number in range(kind.num_fields))


def _texts_in(column: pa.ChunkedArray | pa.Array) -> list[pa.DictionaryArray]:
    """Returns the texts of a column that is read as dictionaries, out of its lists and structures."""
    if isinstance(column, pa.ChunkedArray):
        return [texts for chunk in column.chunks for texts in _texts_in(chunk)]
    if isinstance(column, pa.DictionaryArray):
        return [column]
    if isinstance(column, pa.ExtensionArray):
        return _texts_in(column.storage)
    if isinstance(column, pa.StructArray):
        return [texts for field in column.flatten() for texts in _texts_in(field)]
    return _texts_in(column.flatten()) if pa.types.is_nested(column.type) else []


def _text_size(column: pa.ChunkedArray) -> int:
    """Returns the bytes of a column's texts, each counted as often as it occurs."""
    lengths = (pc.binary_length(texts.dictionary).take(texts.indices) for texts in _texts_in(column))
    return sum(pc.sum(its).as_py() or 0 for its in lengths)


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
        hub = f"; `lerobot:{root}` reads it from the hub" if len(root.parts) == 2 and not root.is_absolute() else ""
        make = f"make one with `lapa data videos FOLDER --out {root}`"
        raise UserError(f"{root}: no such dataset folder; {make}{hub}")
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
        raise UserError(f"{path}: has no camera (no feature of dtype video or image); lapa learns from video")
    needed = ["fps", "data_path", *(["video_path"] if video_keys(features) else [])]
    if lacking := [key for key in needed if info.get(key) is None]:
        raise UserError(f"{path}: lacks {', '.join(lacking)}; {AGAIN}")


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


def _renamed(features: dict[str, Any], stored: Mapping[str, str], path: Path) -> dict[str, Any]:
    """Returns the features, with those that are stored under other names under their own."""
    renamed = dict(features)
    for name, column in stored.items():
        if column == name:
            continue
        if column not in features:
            raise UserError(f"{path}: {unknown('feature', column, features)}")
        if features[column]["dtype"] in ("video", "image", "string"):
            raise UserError(f"{path}: {column} is {features[column]['dtype']}; {name} needs numbers")
        renamed[name] = features[column]
    return renamed


def _episodes(root: Path, video_keys: Sequence[str]) -> dict[str, np.ndarray]:
    integers = ["length", *(f"data/{name}" for name in PLACE)]
    integers += [f"videos/{key}/{name}" for key in video_keys for name in PLACE]
    starts = [f"videos/{key}/from_timestamp" for key in video_keys]
    parts = [_episode_rows(path, integers, starts) for path in episode_files(root)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["episode_index"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _episode_rows(path: Path, integers: Sequence[str], starts: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads a file of episodes. What is empty, or no number of its kind, is a flaw of that episode alone."""
    noted = ["source"] if "source" in _column_names(path) else []
    table = read_parquet(path, ["episode_index", *integers, *starts, "tasks", *noted])
    episodes = _integers(table, "episode_index", path)
    columns = {"episode_index": episodes, "flaw": np.full(len(table), "", object)}
    for name in (*integers, *starts):
        values, least = _floats(table[name], f"{path}: {name}"), 1 if name == "length" else 0
        fits = np.isfinite(values)
        if name in integers:
            fits &= (np.floor(values) == values) & (values >= least)
        fits &= values < 2**53
        for row in np.flatnonzero(~fits & (columns["flaw"] == "")):
            columns["flaw"][row] = _episode_flaw(path, episodes[row], name, table[name][int(row)].as_py())
        values = np.where(fits, values, least)
        columns[name] = values.astype(np.int64) if name in integers else values
    sources = table["source"].to_pylist() if noted else [""] * len(table)
    columns["source"] = np.array([source or "" for source in sources], object)
    columns["tasks"] = np.fromiter((its or [] for its in table["tasks"].to_pylist()), object, len(table))
    return columns


def _episode_flaw(path: Path, episode: int, column: str, found: object) -> str:
    what = "empty" if found is None else shown(found)
    return f"{path}: {column} of episode {episode} is {what}; correct it or leave the episode out"


def _legacy_episodes(path: Path) -> dict[str, Any]:
    rows = _json_lines(path, {"episode_index": int})
    rows.sort(key=lambda row: row["episode_index"])
    fits = [type(row.get("length")) is int and 1 <= row["length"] <= MOST_FRAMES for row in rows]
    flaws = [
        "" if fit else _episode_flaw(path, row["episode_index"], "length", row.get("length"))
        for row, fit in zip(rows, fits, strict=True)
    ]
    return {
        "episode_index": np.array([row["episode_index"] for row in rows], np.int64),
        "length": np.array([row["length"] if fit else 1 for row, fit in zip(rows, fits, strict=True)], np.int64),
        "flaw": np.array(flaws, object),
        "source": np.array([str(row.get("source") or "") for row in rows], object),
        "tasks": [row.get("tasks") or [] for row in rows],
    }


def _json_lines(path: Path, keys: Mapping[str, type]) -> list[dict[str, Any]]:
    with _parsing(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
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


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Raises what pyarrow, NumPy and Python raise of a damaged file as UserError naming `path`."""
    try:
        with reading(path, AGAIN):
            yield
    except UserError:
        raise
    except (pa.ArrowException, LookupError, MemoryError, OverflowError, TypeError, ValueError) as error:
        reason = why_unreadable(path) or (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); {AGAIN}") from None


def _column_names(path: Path) -> list[str]:
    with _parsing(path), open_binary(path) as file:
        return pq.read_schema(file).names


def _read_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    with _parsing(path), open_binary(path) as file:
        return _open_parquet(file, [column], [group]).read_row_group(group, columns=[column])[column]


def _integers(table: pa.Table, name: str, path: Path, empty: int | None = None) -> Int[np.ndarray, "N"]:
    """Returns a column of whole numbers, with `empty` for those that are not there; None: all must be."""
    column = table[name]
    if not pa.types.is_integer(column.type):
        raise UserError(f"{path}: {name} holds {column.type}, expected whole numbers; {AGAIN}")
    if column.null_count and empty is None:
        row = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{path}: {name} is empty in row {row}, expected whole numbers; {AGAIN}")
    return (column.fill_null(empty) if column.null_count else column).to_numpy()


def _floats(column: pa.ChunkedArray, source: str) -> Float[np.ndarray, "N"]:
    """Returns a column of numbers, NaN for those that are not there."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise UserError(f"{source} holds {column.type}, expected numbers; {AGAIN}")
    return column.cast(pa.float64(), safe=False).to_numpy()


def _matrix(column: pa.ChunkedArray, width: int, source: str) -> Float[np.ndarray, "N D"]:
    """Returns a column as rows of `width` numbers; rows of one number may be stored as plain numbers.

    Raises UserError where a row, or a list inside it, is empty, or has another number of numbers than the rest.
    """
    flat = column.combine_chunks()
    num_rows, found = len(flat), 1
    while True:
        if isinstance(flat, pa.ExtensionArray):
            flat = flat.storage
        if not any(is_kind(flat.type) for is_kind in LISTS):
            break
        lengths = pc.list_value_length(flat).unique().to_pylist()
        if None in lengths:
            row = pc.index(flat.is_null(), True).as_py() // found
            raise UserError(f"{source} is empty at frame {row}; correct it or leave the episode out")
        if len(lengths) > 1:
            row = pc.index(pc.not_equal(pc.list_value_length(flat), lengths[0]), True).as_py() // found
            raise UserError(f"{source} changes its width at frame {row}; correct it or leave the episode out")
        found *= lengths[0] if lengths else 1
        flat = flat.flatten()
    if pa.types.is_decimal(flat.type):
        flat = flat.cast(pa.float64())
    if flat.null_count:
        row = pc.index(flat.is_null(), True).as_py() // found
        raise UserError(f"{source} is empty at frame {row}; correct it or leave the episode out")
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)):
        raise UserError(f"{source} holds {flat.type}, expected numbers; {AGAIN}")
    if num_rows and found != width:
        raise UserError(f"{source} is {found} numbers wide, {width} in meta/info.json; correct one of them")
    return flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(num_rows, width)


def _recent(cache: OrderedDict[Any, Value], key: Any, most: int, read: Callable[[], Value]) -> Value:
    """Returns cache[key], read where it is absent; the cache keeps the `most` last used."""
    if key not in cache:
        cache[key] = read()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
