"""Dataset folders in the LeRobotDataset v3.0 layout, which `lapa.data.writer` writes, and in that of v2.1.

    meta/info.json                       what there is: fps, features, path templates
    meta/tasks.parquet                   instruction (index) -> task_index
    meta/episodes/chunk-*/file-*.parquet one row an episode: its instruction, length, and where it lies
    data/chunk-*/file-*.parquet          one row a frame: action, observation.state, timestamp, indices
    videos/KEY/chunk-*/file-*.mp4        pictures; several episodes may share a file

Pictures may also be PNG or JPEG in columns of the data files (features of dtype `image`). Action-free video has no
`action` feature. `lapa data info DATASET` shows what is inside; lapa.data.lerobot has the layout of v2.1.
Axes: T time, H W image, C channel, A action dimensions, S state dimensions.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt8

from lapa.data.dataset import ACTION, ACTION_SPACE, STATE, Dataset, image_keys
from lapa.data.video import decode_clip, decode_image
from lapa.errors import UserError, unknown
from lapa.files import fingerprint, is_remote, open_binary, read_json, reading, what_instead

__all__ = [
    "CODEBASE_VERSION",
    "DATA_PATH",
    "EPISODES_PATH",
    "EXTRA",
    "INFO",
    "JOURNAL",
    "STATS",
    "TASKS",
    "VIDEO_PATH",
    "LeRobotDataset",
    "require_folder",
]

STATS = "meta/stats.json"
EXTRA = "meta/lapa.json"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
# Episodes of a folder in v2.1, where meta/info.json does not say.
LEGACY_CHUNK = 1000
# Parquet files whose numbers stay in memory; they are read episode by episode, mostly in order.
OPEN_TABLES = 8


class LeRobotDataset(Dataset):
    """A dataset folder; `LeRobotDataset(root)` raises UserError naming the file, what is wrong with it, and the mend.

    .info: meta/info.json; .version: its codebase_version; .tasks: the instructions by task_index.
    .num_tasks: how many tasks each episode has, of which the first is its instruction.
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
        """cameras: those to offer, in this order, by default all. columns: other names under which `action` and

        `observation.state` are stored. declared: what is known of the actions that meta/lapa.json does not say.
        """
        self.info = read_info(root)
        self.version = str(self.info["codebase_version"])
        self.tasks = read_tasks(root, self.version)
        self._columns = read_episodes(root, self.version, video_keys(self.info["features"]))
        self._stored = {ACTION: ACTION, STATE: STATE, **(columns or {})}
        self._declared = dict(declared or {})
        super().__init__(
            root,
            name or root.name or root.absolute().name,
            fps=float(self.info["fps"]),
            features=_features(self.info["features"], self._stored, f"{root / INFO}"),
            lengths=self._columns["length"],
            instructions=self._columns["instruction"],
            sources=self._columns["source"],
        )
        self.num_tasks = self._columns["num_tasks"]
        if cameras:
            self._camera_keys = {camera: self._camera_keys[self.camera_name(camera)] for camera in cameras}
            self.cameras = tuple(cameras)
        self._tables: OrderedDict[Path, dict[str, np.ndarray]] = OrderedDict()
        # The first row of each episode in its data file, -1 until that was looked through; and what was wrong there.
        self._first_rows = np.full(len(self.lengths), -1)
        self._flaws: dict[int, str] = {}
        self._pictures_stored = StoredPictures()
        self._require_videos()

    @property
    def legacy(self) -> bool:
        """Whether it is of v2.1 or v2.0: one data file and one video an episode."""
        return self.version in LEGACY_VERSIONS

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the dataset: a hash of its metadata files."""
        return fingerprint(*metadata_files(self.root, self.version))

    @cached_property
    def extra(self) -> dict[str, Any]:
        """What the command that wrote the dataset noted about it; empty for datasets from elsewhere."""
        noted = read_json(self.root / EXTRA) if (self.root / EXTRA).exists() else {}
        return {**noted, ACTION_SPACE: {**noted.get(ACTION_SPACE, {}), **self._declared}} if self._declared else noted

    def image_shape(self, camera: str | None = None) -> tuple[int, int]:
        """Height and width of a camera's stored pictures."""
        feature = self.camera_feature(camera)
        shape = [int(side) for side in feature["shape"]]
        names = feature.get("names")
        # LeRobot's older datasets say channels first of pictures that are stored as any others.
        if isinstance(names, list) and "height" in names and "width" in names and len(names) == len(shape):
            return shape[names.index("height")], shape[names.index("width")]
        height, width = shape[1:] if len(shape) == 3 and shape[0] == 3 and shape[2] != 3 else shape[:2]
        return height, width

    def video_path(self, episode_index: int, camera: str | None = None) -> Path:
        """The mp4 that holds an episode."""
        key = self._camera_keys[self.camera_name(camera)]
        return self.root / self.info["video_path"].format(video_key=key, **self._place(f"videos/{key}", episode_index))

    def data_path(self, episode_index: int) -> Path:
        """The parquet file that holds an episode's rows."""
        return self.root / self.info["data_path"].format(**self._place("data", episode_index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        key = self._camera_keys[camera]
        span = self._span(episode_index)
        if self.features[key]["dtype"] == "image":
            rows = [span.start + index for index in frame_indices]
            return self._pictures_stored.get(self.data_path(episode_index), key, rows)
        start = 0.0 if self.legacy else float(self._columns[f"videos/{key}/from_timestamp"][episode_index])
        return decode_clip(self.video_path(episode_index, camera), frame_indices, self.fps, start)

    def _numbers(self, feature: str, episode_index: int) -> tuple[np.ndarray, str]:
        path, span = self.data_path(episode_index), self._span(episode_index)
        return self._table(path)[feature][span], str(path)

    def _place(self, kind: str, episode_index: int) -> dict[str, int]:
        """What a path template asks for."""
        if self.legacy:
            chunk = episode_index // int(self.info.get("chunks_size") or LEGACY_CHUNK)
            return {"episode_chunk": chunk, "episode_index": episode_index}
        return {name: int(self._columns[f"{kind}/{name}"][episode_index]) for name in ("chunk_index", "file_index")}

    def _span(self, episode_index: int) -> slice:
        """An episode's rows in its data file, which is looked through once. UserError where something is wrong."""
        if self._first_rows[episode_index] < 0:
            path = self.data_path(episode_index)
            timed = ["timestamp"] if "timestamp" in column_names(path) else []
            table = read_parquet(path, ["episode_index", *timed])
            seconds = table["timestamp"].to_numpy().astype(np.float64) if timed else None
            owners, episodes = table["episode_index"].to_numpy(), self._episodes_in(episode_index)
            lengths = self.lengths[episodes]
            self._first_rows[episodes], flaws = find_episodes(owners, seconds, episodes, lengths, self.fps)
            self._flaws |= {episode: f"{path}: {flaw}" for episode, flaw in flaws.items()}
        if episode_index in self._flaws:
            raise UserError(self._flaws[episode_index])
        first = int(self._first_rows[episode_index])
        return slice(first, first + int(self.lengths[episode_index]))

    def _episodes_in(self, episode_index: int) -> np.ndarray:
        """The episodes of one's data file."""
        if self.legacy:
            return np.array([episode_index])
        chunks, files = self._columns["data/chunk_index"], self._columns["data/file_index"]
        same = (chunks == chunks[episode_index]) & (files == files[episode_index])
        return np.flatnonzero(same)

    def _table(self, path: Path) -> dict[str, np.ndarray]:
        """The numbers of one data file, the last few kept."""
        if path not in self._tables:
            wanted = {name: stored for name, stored in self._stored.items() if name in self.features}
            table = read_parquet(path, list(wanted.values()))
            lacking = [stored for stored in wanted.values() if stored not in table.column_names]
            if lacking:
                raise UserError(f"{path}: lacks the columns {', '.join(lacking)}; {AGAIN}")
            self._tables[path] = {
                name: matrix(table[stored], self._width(name) or 0, f"{path}: {stored}")
                for name, stored in wanted.items()
            }
            if len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(path)
        return self._tables[path]

    def _require_videos(self) -> None:
        """UserError naming the first and the number of those video files that are not there."""
        for key in video_keys(self.features):
            if key not in self._camera_keys.values():
                continue
            if self.legacy:
                places = [self._place("", episode) for episode in range(len(self.lengths))]
            else:
                names = ("chunk_index", "file_index")
                numbers = zip(*(self._columns[f"videos/{key}/{name}"].tolist() for name in names), strict=True)
                places = [dict(zip(names, pair, strict=True)) for pair in dict.fromkeys(numbers)]
            files = [self.info["video_path"].format(video_key=key, **place) for place in places]
            mend = "download the dataset again, or leave the camera out"
            require_files(self.root, files, f"video files of {key}", mend)


def require_folder(dataset: Dataset) -> LeRobotDataset:
    """The dataset, which must be a v3.0 folder on this machine, of videos. UserError, with the mend, where not."""
    mend = f"`lapa data lerobot {dataset.root} --out DATASET` makes such a one"
    if not isinstance(dataset, LeRobotDataset) or is_remote(dataset.root):
        raise UserError(f"{dataset.root}: this needs a dataset folder on this machine; convert or copy it first")
    if dataset.legacy:
        raise UserError(f"{dataset.root}: this needs LeRobotDataset {CODEBASE_VERSION}, got {dataset.version}; {mend}")
    if dataset._stored != {ACTION: ACTION, STATE: STATE} or len(dataset.cameras) < len(image_keys(dataset.features)):
        raise UserError(f"{dataset.root}: this needs the dataset as it is, without options; {mend}")
    if len(video_keys(dataset.features)) < len(dataset.cameras):
        raise UserError(f"{dataset.root}: this needs cameras whose pictures are videos; {mend}")
    return dataset


def _features(features: dict[str, Any], stored: Mapping[str, str], source: str) -> dict[str, Any]:
    """The features, with those that are stored under other names under their own. UserError naming `source`."""
    renamed = dict(features)
    for name, column in stored.items():
        if column == name:
            continue
        if column not in features:
            raise UserError(f"{source}: {unknown('feature', column, features)}")
        if features[column]["dtype"] in ("video", "image", "string"):
            raise UserError(f"{source}: {column} is {features[column]['dtype']}; {name} needs numbers")
        renamed[name] = features[column]
    return renamed


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
    return [key for key in image_keys(features) if features[key]["dtype"] == "video"]


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
    if not image_keys(features):
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


AGAIN = "write the dataset again"
# Row groups of pictures that stay in memory; LeRobot writes one an episode, and an item has a picture a camera.
OPEN_GROUPS = 4


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A table of a dataset. UserError naming the file where it cannot be read."""
    try:
        with reading(path, AGAIN), open_binary(path) as file:
            table = pq.ParquetFile(file).read(columns=columns)
        # Finds texts that are not UTF-8, which would raise where they are used.
        table.validate(full=True)
        return table
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def column_names(path: Path) -> list[str]:
    """The columns of a table. UserError as `read_parquet`."""
    try:
        with reading(path, AGAIN), open_binary(path) as file:
            return pq.read_schema(file).names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def matrix(column: pa.ChunkedArray, width: int, source: str) -> Float[np.ndarray, "T D"]:
    """A column as rows of `width` numbers; one number a row may be stored plainly. UserError naming `source`."""
    flat = column.combine_chunks()
    num_rows = len(flat)
    if isinstance(flat, pa.ExtensionArray):
        flat = flat.storage
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        flat = flat.flatten()
    if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type) or pa.types.is_boolean(flat.type)):
        raise UserError(f"{source} holds {flat.type}, expected numbers; {AGAIN}")
    values = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if len(values) != num_rows * width:
        raise UserError(f"{source} is not {width} numbers wide in every row, as meta/info.json says; {AGAIN}")
    return values.reshape(num_rows, width)


def find_episodes(
    owners_N: Int[np.ndarray, "N"],
    seconds_N: Float[np.ndarray, "N"] | None,
    episodes_E: Int[np.ndarray, "E"],
    lengths_E: Int[np.ndarray, "E"],
    fps: float,
) -> tuple[Int[np.ndarray, "E"], dict[int, str]]:
    """The first row of each of the episodes in a data file, and what is wrong, by episode.

    owners_N: the episode of each row; seconds_N: its time in the episode, None where the file has no such column.
    Frame i of an episode must be at i / fps seconds, to half a frame: pictures are found by it.
    """
    present_P, firsts_P, kinds_N, counts_P = np.unique(
        owners_N, return_index=True, return_inverse=True, return_counts=True
    )
    places_N = np.arange(len(owners_N)) - firsts_P[kinds_N]
    scattered = np.flatnonzero(np.diff(owners_N)) + 1
    in_pieces = set(owners_N[scattered[places_N[scattered] != 0]].tolist())
    late: set[int] = set()
    if seconds_N is not None:
        fits_N = np.abs(seconds_N - places_N / fps) < 0.5 / fps
        fits_N[1:] &= (np.diff(seconds_N) > 0) | (places_N[1:] == 0)
        late = set(owners_N[~fits_N].tolist())
    there = dict(zip(present_P.tolist(), zip(firsts_P.tolist(), counts_P.tolist(), strict=True), strict=True))
    firsts, flaws = [], {}
    for episode, length in zip(episodes_E.tolist(), lengths_E.tolist(), strict=True):
        first, count = there.get(episode, (0, 0))
        firsts.append(first)
        if count < length:
            flaws[episode] = f"lacks rows of episode {episode} (has {count} of {length}); {AGAIN}"
        elif count > length or episode in in_pieces:
            flaws[episode] = f"has {count} rows of episode {episode} of {length} frames, or not in one piece; {AGAIN}"
        elif seconds_N is not None and episode in late:
            flaws[episode] = f"episode {episode}: {_time_flaw(seconds_N[first : first + length], fps)}"
    return np.array(firsts), flaws


def _time_flaw(seconds_T: np.ndarray, fps: float) -> str:
    """What is wrong with the times of an episode, in words."""
    forward = np.diff(seconds_T) > 0
    if not forward.all():
        frame = int(np.argmin(forward)) + 1
        told = f"{seconds_T[frame]:.3f} s after {seconds_T[frame - 1]:.3f} s"
        return f"timestamps go backwards at frame {frame} ({told}); correct them or leave the episode out"
    expected_T = np.arange(len(seconds_T)) / fps
    frame = int(np.argmin(np.abs(seconds_T - expected_T) < 0.5 / fps))
    told = f"frame {frame} is at {seconds_T[frame]:.3f} s, should be at {expected_T[frame]:.3f} s"
    return f"timestamps do not match {fps:g} fps ({told}); correct them, or fps in meta/info.json"


class StoredPictures:
    """Pictures in tables: columns of {bytes, path}, of which the last few row groups stay in memory."""

    def __init__(self) -> None:
        self._starts: dict[Path, np.ndarray] = {}
        self._groups: OrderedDict[tuple[Path, int, str], pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_starts": {}, "_groups": OrderedDict()}

    def get(self, path: Path, column: str, rows: Sequence[int]) -> UInt8[np.ndarray, "T H W 3"]:
        """The pictures of rows that exist. UserError naming file and row where one cannot be decoded."""
        if path not in self._starts:
            try:
                with reading(path, AGAIN), open_binary(path) as file:
                    metadata = pq.ParquetFile(file).metadata
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise _unreadable(path, error) from None
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts[path] = np.cumsum([0, *sizes])
        starts = self._starts[path]
        pictures = []
        for row in rows:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            value = self._group(path, group, column)[int(row - starts[group])].as_py()
            encoded = value.get("bytes") if isinstance(value, dict) else value
            if not encoded:
                raise UserError(f"{path}: {column} holds no picture in row {row}; {AGAIN}")
            try:
                pictures.append(decode_image(encoded))
            except ValueError as error:
                raise UserError(f"{path}: {column} cannot be decoded in row {row} ({error}); {AGAIN}") from None
        if len({picture_HWC.shape for picture_HWC in pictures}) > 1:
            raise UserError(f"{path}: pictures of {column} differ in size between rows {rows[0]} and {rows[-1]}")
        return np.stack(pictures)

    def _group(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        key = path, group, column
        if key not in self._groups:
            try:
                with reading(path, AGAIN), open_binary(path) as file:
                    self._groups[key] = pq.ParquetFile(file).read_row_group(group, columns=[column])[column]
            except (pa.ArrowException, UnicodeDecodeError, KeyError) as error:
                raise _unreadable(path, error) from None
            if len(self._groups) > OPEN_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _unreadable(path: Path, error: Exception) -> UserError:
    told = what_instead(path) or str(error).splitlines()[0]
    return UserError(f"{path}: cannot be read ({told}); {AGAIN}")
