"""Dataset folders in the LeRobotDataset v3.0 layout, which `lapa.data.writer` writes, and in that of v2.1.

    meta/info.json                       what there is: fps, features, path templates
    meta/tasks.parquet                   instruction (index) -> task_index
    meta/episodes/chunk-*/file-*.parquet one row an episode: its instruction, length, and where it lies
    data/chunk-*/file-*.parquet          one row a frame: action, observation.state, timestamp, indices
    videos/KEY/chunk-*/file-*.mp4        pictures; several episodes may share a file

Pictures may also be PNG or JPEG in columns of the data files (features of dtype `image`). Action-free video has no
`action` feature. `lapa data info DATASET` shows what is inside; lapa.data.lerobot_layout has the layout of v2.1.
Axes: T time, H W image, C channel, A action dimensions, S state dimensions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lapa.data.action_space import KEY
from lapa.data.dataset import ACTION, STATE, Dataset, picture_keys
from lapa.data.lerobot_layout import (
    CODEBASE_VERSION,
    INFO,
    JOURNAL,
    LEGACY_VERSIONS,
    TASKS,
    metadata_files,
    read_episodes,
    read_info,
    read_tasks,
    require_files,
    video_keys,
)
from lapa.data.parquet import AGAIN, StoredPictures, column_names, find_episodes, matrix, read_parquet
from lapa.data.video import decode_clip
from lapa.errors import UserError, unknown
from lapa.files import fingerprint, is_remote, read_json

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
            self._camera_keys = {camera: self._camera_key(camera) for camera in cameras}
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
        return {**noted, KEY: {**noted.get(KEY, {}), **self._declared}} if self._declared else noted

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
        key = self._camera_key(camera)
        return self.root / self.info["video_path"].format(video_key=key, **self._place(f"videos/{key}", episode_index))

    def data_path(self, episode_index: int) -> Path:
        """The parquet file that holds an episode's rows."""
        return self.root / self.info["data_path"].format(**self._place("data", episode_index))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _pictures(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        key = self._camera_key(camera)
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
    if dataset._stored != {ACTION: ACTION, STATE: STATE} or len(dataset.cameras) < len(picture_keys(dataset.features)):
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
