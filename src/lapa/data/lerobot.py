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

import hashlib
import io
import json
import math
import re
import string
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float, Int, UInt8
from PIL import Image

from lapa.checksums import SUMS, read_sums, sha256, verify
from lapa.console import warn
from lapa.data.dataset import ACTION, ACTION_SPACE, STATE, Dataset, all_image_keys, image_keys
from lapa.data.films import episode_frames
from lapa.data.transforms import IMAGE_FORMATS, decode_image
from lapa.data.video import decode_times, film_times
from lapa.errors import UserError, shown, unknown
from lapa.files import (
    errors_about,
    find_files,
    fingerprint,
    inside,
    is_remote,
    open_for_arrow,
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
SPAN = ("from_timestamp", "to_timestamp")
LEGACY_TASKS = "meta/tasks.jsonl"
LEGACY_EPISODES = "meta/episodes.jsonl"
# Episodes per chunk folder in v2.1, where meta/info.json does not have the number.
LEGACY_CHUNK = 1000
# Parquet files whose numbers stay in memory: they are read episode by episode, mostly in order.
OPEN_TABLES = 8
# Video files of which it stays known where their episodes begin.
OPEN_FILMS = 64
# Row groups of images that stay in memory: LeRobot writes one per episode, and an item has one image per camera.
OPEN_GROUPS = 4
# A number's format in a path template, such as 03d.
WIDTH = "(0?([1-9]|1[0-2]))?d?"
# Frames of a dataset, of which larger ones are split and mixed in training; and of a second.
MOST_FRAMES, MOST_FPS = 10**9, 10**6
# Sides of an image, and numbers of another feature in one frame: far above those of any camera and robot.
MOST_PIXELS, MOST_NUMBERS = 2**14, 10**6
# Bytes that columns of a file may take in memory: so many in any case, and so many times the size of the file. Repeated
# values take next to no room in a file.
SMALL_TABLE, EXPANSION = 2**28, 100
# Bytes of a number, or of a reference to a text, by the name of its type in parquet.
SIZES = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "BYTE_ARRAY": 4}
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
# Modes of images that Pillow reads from PNGs of more than 8 bits: depth, in LeRobot's datasets.
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")
AGAIN = "write the dataset again"

Value = TypeVar("Value")


class LeRobotDataset(Dataset):
    """A dataset folder. `LeRobotDataset(root)` raises UserError naming the file, what is wrong, and how to fix it.

    info: meta/info.json; version: its codebase_version; tasks: the instructions by task_index.
    num_tasks: how many tasks the metadata gives each episode. The first is its instruction; where there is none, that
    of its first frame. Depth maps and other images of one channel are no cameras.
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
        skip_bad: bool = False,
    ):
        """Opens a folder.

        cameras: the cameras to use, in this order; by default all. columns: other names under which `action` and
        `observation.state` are stored. declared: entries of the action space that meta/lapa.json lacks.
        skip_bad: leave out, and count, episodes whose files are missing or do not fit the metadata; otherwise they
        raise UserError when they are read.
        """
        self.info = read_info(root)
        self.version = str(self.info["codebase_version"])
        self.legacy = self.version in LEGACY_VERSIONS
        # Videos are many and large: `lapa data check` compares theirs.
        self._sums = {name: digest for name, digest in read_sums(root).items() if not name.startswith("videos/")}
        opened = {name for name in self._sums if name in (INFO, TASKS) or name.startswith(EPISODES)}
        verify(root, AGAIN, {name: self._sums[name] for name in opened})
        self._task_of = read_tasks(root, self.legacy)
        self.tasks = tuple(self._task_of.values())
        self._columns = read_episodes(root, self.legacy, video_keys(self.info["features"]), self._task_of)
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
        self.numbers, self.num_tasks = self._columns["episode_index"], self._columns["num_tasks"]
        # The row of each episode in the metadata, all of which is needed to find an episode in a shared file.
        self._entries = np.arange(len(self))
        self._tables: OrderedDict[Any, dict[str, np.ndarray | pa.ChunkedArray]] = OrderedDict()
        self._films: OrderedDict[Any, _Film] = OrderedDict()
        # Of data files with images: the first row of each row group, and the last few row groups.
        self._group_rows: dict[Path, np.ndarray] = {}
        self._groups: OrderedDict[Any, pa.ChunkedArray] = OrderedDict()
        # By row of the metadata: the first row in its data file, -1 before that is read; and the errors found there.
        self._first_rows = np.full(len(self), -1)
        self._flaws = {entry: flaw for entry, flaw in enumerate(self._columns["flaw"]) if flaw}
        self._leave_out_depth()
        if cameras:
            self._camera_keys = {camera: self._camera_keys[self.camera_name(camera)] for camera in cameras}
            self.cameras = tuple(cameras)
        if type(total := self.info.get("total_episodes")) is int and total != len(self):
            _warn_once(f"{root / INFO}: total_episodes is {total}; the {len(self)} episodes that are listed are read")
        if several := int((self.num_tasks > 1).sum()):
            _warn_once(f"{root}: {several} episodes have several tasks; the first of each is its instruction")
        if skip_bad:
            self._leave_out_bad()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the metadata files."""
        tasks = self.root / (LEGACY_TASKS if self.legacy else TASKS)
        episodes = [self.root / LEGACY_EPISODES] if self.legacy else episode_files(self.root)
        whole = fingerprint(self.root / INFO, *([tasks] if tasks.exists() else []), *episodes)
        if len(self) == len(self._columns["length"]):
            return whole
        return hashlib.sha256(whole.encode() + self.numbers.tobytes()).hexdigest()[: len(whole)]

    @cached_property
    def extra(self) -> dict[str, Any]:
        """The notes of the command that wrote the dataset; empty for datasets from elsewhere."""
        path = self.root / EXTRA
        noted = read_json(path) if path.exists() else {}
        # People declare their robot's actions there.
        if path.exists() and sha256(path) != self._sums.get(EXTRA, sha256(path)):
            warn(f"{path}: edited by hand, or damaged: its SHA-256 is not that in {SUMS}")
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

    def instruction(self, episode_index: int) -> str:
        """Returns the instruction of an episode: the first of its tasks, or else the task of its first frame."""
        noted = super().instruction(episode_index)
        return noted or self._task_of_frames(self._position(episode_index))

    def require_files(self, cameras: Sequence[str], episodes: Sequence[int] | None = None) -> None:
        """Raises UserError with the first missing file of these cameras and episodes (None: all), and their number.

        Each folder is listed once, which is much faster than asking for every file.
        """
        entries = self._entries if episodes is None else self._entries[list(episodes)]
        keys = [self.camera_key(camera) for camera in cameras]
        kinds = [f"videos/{key}" for key in keys if self.features[key]["dtype"] == "video"]
        for kind in (*kinds, "data"):
            sound = [entry for entry in entries.tolist() if not self._flaw_of(kind, entry)]
            files = list(dict.fromkeys(self._file(kind, entry) for entry in sound))
            if len(sound) < len(entries) and not sound:
                raise UserError(self._flaw_of(kind, int(entries[0])))
            folders = {file.rpartition("/")[0] for file in files}
            present = {f"{folder}/{path.name}" for folder in folders for path in find_files(self.root / folder, "*")}
            if missing := [file for file in files if file not in present]:
                what = "data files" if kind == "data" else f"video files of {kind.removeprefix('videos/')}"
                raise UserError(
                    f"{self.root / missing[0]}: no such file; {len(missing)} of {len(files)} {what} are missing; "
                    f"download the dataset again, or leave their episodes out (--skip-bad; in place "
                    f"lerobot:{self.root},skip_bad=true)"
                )

    def video_path(self, episode_index: int, camera: str | None = None) -> Path:
        """Returns the mp4 that holds an episode."""
        key = self.camera_key(camera)
        return self.root / self._file(f"videos/{key}", int(self._entries[episode_index]))

    def span_in_video(self, episode_index: int, camera: str) -> tuple[float, float]:
        """Returns when an episode begins and ends in its mp4, in seconds. Raises UserError where it is not certain."""
        _, film, first = self._film(episode_index, camera)
        start = float(film.times_N[first])
        return start, start + int(self.lengths[episode_index]) / self.fps

    def data_path(self, episode_index: int) -> Path:
        """Returns the parquet file that holds an episode's rows."""
        return self.root / self._file("data", int(self._entries[episode_index]))

    def rows(self, episode_index: int) -> slice:
        """Returns an episode's rows in its data file, which is checked once. Raises UserError where it is damaged."""
        entry = int(self._entries[episode_index])
        if self._first_rows[entry] < 0 and entry not in self._flaws:
            path = self.data_path(episode_index)
            name = path.relative_to(self.root).as_posix()
            verify(self.root, AGAIN, {name: self._sums[name]} if name in self._sums else {})
            timed = ["timestamp"] if "timestamp" in _column_names(path) else []
            table = read_parquet(path, ["episode_index", *timed])
            owners = _integers(table, "episode_index", path, empty=-1)
            seconds = _floats(table["timestamp"], f"{path}: timestamp") if timed else None
            entries = self._entries_in("data", entry)
            numbers, lengths = (self._columns[name][entries] for name in ("episode_index", "length"))
            with _parsing(path):
                firsts, flaws = find_episodes(owners, seconds, numbers, lengths, self.fps)
            self._first_rows[entries] = firsts
            entry_of = dict(zip(numbers.tolist(), entries.tolist(), strict=True))
            self._flaws = {entry_of[number]: f"{path}: {flaw}" for number, flaw in flaws.items()} | self._flaws
        if entry in self._flaws:
            raise UserError(self._flaws[entry])
        first = int(self._first_rows[entry])
        return slice(first, first + int(self.lengths[episode_index]))

    def __getstate__(self) -> dict[str, Any]:
        emptied = ("_tables", "_films", "_groups")
        return {**self.__dict__, **{name: OrderedDict() for name in emptied}, "_group_rows": {}}

    def _images(self, episode_index: int, frame_indices: Sequence[int], camera: str) -> np.ndarray:
        key, span = self._camera_keys[camera], self.rows(episode_index)
        if self.features[key]["dtype"] == "image":
            return self._stored_images(self.data_path(episode_index), key, [span.start + i for i in frame_indices])
        path, film, first = self._film(episode_index, camera)
        times = {index: float(film.times_N[first + index]) for index in set(frame_indices)}
        found = decode_times(path, times, film.tolerance)
        return np.stack([found[index] for index in frame_indices])

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
            rows = _matrix(
                rows, self._width(feature) or 0, f"{path}: {stored} of episode {self.numbers[episode_index]}"
            )
        return rows, str(path)

    def _film(self, episode_index: int, camera: str) -> tuple[Path, _Film, int]:
        """Returns an episode's video file, the file's frames, and the number of the episode's first frame there.

        Raises UserError where its place in the file is not certain.
        """
        entry, path = int(self._entries[episode_index]), self.video_path(episode_index, camera)
        kind = f"videos/{self._camera_keys[camera]}"
        film = _recent(self._films, (kind, path), OPEN_FILMS, partial(self._read_film, path, kind, entry))
        if entry in film.flaws:
            raise UserError(film.flaws[entry])
        return path, film, film.firsts[entry]

    def _read_film(self, path: Path, kind: str, entry: int) -> _Film:
        entries = [its for its in self._entries_in(kind, entry).tolist() if not self._flaw_of(kind, its)]
        times_N, lengths = film_times(path, self.fps), self._columns["length"][entries]
        # In the older layout each episode has a file of its own, from second 0 on.
        starts = np.zeros(1) if self.legacy else self._columns[f"{kind}/from_timestamp"][entries]
        ends = lengths / self.fps if self.legacy else self._columns[f"{kind}/to_timestamp"][entries]
        firsts, flaws = episode_frames(times_N, starts, ends, lengths, self.fps)
        numbers, fix = self._columns["episode_index"][entries], "correct it or leave the episode out"
        found = zip(entries, numbers, flaws, strict=True)
        named = {its: f"{path}: episode {number} {flaw}; {fix}" for its, number, flaw in found if flaw}
        closest = float(np.diff(times_N).min(initial=1 / self.fps))
        return _Film(times_N, closest / 2, dict(zip(entries, firsts.tolist(), strict=True)), named)

    def _task_of_frames(self, episode_index: int) -> str:
        """Returns the task that an episode's first frame names; "" where none is known."""
        path, span = self.data_path(episode_index), self.rows(episode_index)
        if "task_index" not in _column_names(path):
            return ""

        def read() -> dict[str, np.ndarray | pa.ChunkedArray]:
            return {"task_index": _integers(read_parquet(path, ["task_index"]), "task_index", path, empty=-1)}

        column = _recent(self._tables, (path, "task_index"), OPEN_TABLES, read)["task_index"]
        return self._task_of.get(int(column[span.start]), "")

    def _file(self, kind: str, entry: int) -> str:
        """Returns the file of a row of the metadata. kind: `data`, or `videos/KEY`."""
        if flaw := self._flaw_of(kind, entry):
            raise UserError(flaw)
        if self.legacy:
            number = int(self._columns["episode_index"][entry])
            chunk = number // int(self.info.get("chunks_size") or LEGACY_CHUNK)
            place = {"episode_chunk": chunk, "episode_index": number}
        else:
            place = {name: int(self._columns[f"{kind}/{name}"][entry]) for name in PLACE}
        template = self.info["data_path" if kind == "data" else "video_path"]
        return str(template.format(video_key=kind.removeprefix("videos/"), **place))

    def _flaw_of(self, kind: str, entry: int) -> str:
        """Returns what the metadata lacks to find a file (`data`, `videos/KEY`) of one of its rows; "" for nothing."""
        of_kind = self._columns.get(f"{kind}/flaw")
        return str(self._columns["flaw"][entry] or ("" if of_kind is None else of_kind[entry]))

    def _entries_in(self, kind: str, entry: int) -> np.ndarray:
        """Returns the rows of the metadata that share one's file (`data`, `videos/KEY`)."""
        if self.legacy:
            return np.array([entry])
        chunks, files = (self._columns[f"{kind}/{name}"] for name in PLACE)
        return np.flatnonzero((chunks == chunks[entry]) & (files == files[entry]))

    def _leave_out_depth(self) -> None:
        """Takes depth maps out of the cameras, and reports them. Raises UserError where no camera is left."""
        deep = [camera for camera, key in self._camera_keys.items() if self._is_deep(key)]
        self._camera_keys = {camera: key for camera, key in self._camera_keys.items() if camera not in deep}
        self.cameras = tuple(self._camera_keys)
        others = [key for key in all_image_keys(self.features) if key not in self._camera_keys.values()]
        if not self.cameras:
            raise UserError(_no_colour(self.root / INFO, others))
        if others:
            _warn_once(f"{self.root}: {len(others)} depth or grey cameras left out: {', '.join(others)}")

    def _is_deep(self, key: str) -> bool:
        """Whether the first image of a column that can be read has more than 8 bits, as depth maps have."""
        if self.features[key]["dtype"] != "image":
            return False
        sound = (entry for entry in range(len(self)) if not self._flaw_of("data", entry))
        for file in dict.fromkeys(self._file("data", entry) for entry in sound):
            try:
                with open_for_arrow(self.root / file) as opened:
                    parquet = pq.ParquetFile(opened)
                    _check_memory(parquet, opened, [key], [0])
                    rows = next(parquet.iter_batches(batch_size=1, row_groups=[0], columns=[key]))[key]
                value = rows[0].as_py()
                encoded = io.BytesIO(value["bytes"] if isinstance(value, dict) else value)
                with Image.open(encoded, formats=IMAGE_FORMATS) as image:
                    return image.mode in DEEP_MODES
            # What is wrong there is said when an image is read.
            except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, StopIteration, SyntaxError):
                continue
            except Image.DecompressionBombError:
                return False
        return False

    def _leave_out_bad(self) -> None:
        """Leaves out, and counts, the episodes whose files are missing or do not fit. Raises UserError for all."""
        problems = {}
        for episode in range(len(self)):
            try:
                self.rows(episode)
                for camera in self.cameras:
                    if self.camera_feature(camera)["dtype"] == "video":
                        self._film(episode, camera)
            except UserError as error:
                problems[episode] = str(error)
        if not problems:
            return
        first = next(iter(problems.values()))
        if len(problems) == len(self):
            raise UserError(f"{first} (and so in all {len(self)} episodes)")
        warn(f"left out: {len(problems)} of {len(self)} episodes; the first: {first}")
        self._entries = np.array([entry for entry in range(len(self)) if entry not in problems])
        self._instructions, self._sources = (self._columns[name][self._entries] for name in ("instruction", "source"))
        self.lengths, self.numbers, self.num_tasks = (
            self._columns[name][self._entries] for name in ("length", "episode_index", "num_tasks")
        )
        self.num_frames = int(self.lengths.sum())

    def _stored_images(self, path: Path, column: str, rows: Sequence[int]) -> UInt8[np.ndarray, "T H W 3"]:
        """Returns images of a column of {bytes, path}. Raises UserError naming file and row of a damaged one."""
        if path not in self._group_rows:
            with _parsing(path), open_for_arrow(path) as file:
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


@dataclass(frozen=True)
class _Film:
    """The frames of a video file; by row of the metadata the first frame of each episode, or what is wrong with it.

    times_N: when the frames are shown; tolerance: of finding one by its time. Seconds.
    """

    times_N: np.ndarray
    tolerance: float
    firsts: dict[int, int]
    flaws: dict[int, str]


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
    if type(info["fps"]) not in (int, float) or not 1 / MOST_FPS < info["fps"] <= MOST_FPS:
        raise UserError(f"{path}: fps must be a number above 0, and {MOST_FPS} at most, got {shown(info['fps'])}")
    _check_templates(path, info)
    try:
        json.dumps(info, allow_nan=False)
    except ValueError:
        raise UserError(f"{path}: holds a number that is not finite; correct it") from None
    return info


def read_tasks(root: Path, legacy: bool) -> dict[int, str]:
    """Reads the instruction of each task_index, in order; none where the file is missing."""
    if not (root / (LEGACY_TASKS if legacy else TASKS)).exists():
        return {}
    if legacy:
        rows = _json_lines(root / LEGACY_TASKS, {"task_index": int, "task": str})
        return dict(sorted((row["task_index"], row["task"]) for row in rows))
    path = root / TASKS
    table = read_parquet(path)
    # pandas gives an index without a name this one.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise UserError(f"{path}: needs the columns task and task_index; {AGAIN}")
    pairs = zip(_integers(table, "task_index", path).tolist(), table[names[0]].to_pylist(), strict=True)
    return dict(sorted((number, str(task or "")) for number, task in pairs))


def read_episodes(
    root: Path, legacy: bool, video_keys: Sequence[str], tasks: Mapping[int, str]
) -> dict[str, np.ndarray]:
    """Reads the metadata of all episodes, in order, as columns.

    episode_index, length, instruction (the first of its tasks), num_tasks, source (what it was made from, where that is
    noted), flaw (what is wrong with these, "" where nothing is), and for v3.0 its location: data/chunk_index,
    data/file_index, and for each video key videos/KEY/chunk_index, videos/KEY/file_index, videos/KEY/from_timestamp,
    videos/KEY/to_timestamp, videos/KEY/flaw.
    """
    path = root / (LEGACY_EPISODES if legacy else EPISODES)
    with _parsing(path):
        columns = _legacy_episodes(path) if legacy else _episodes(root, video_keys)
        texts = [_texts_of(its, tasks) for its in columns.pop("tasks")]
        columns["num_tasks"] = np.array([len(its) for its in texts], np.int64)
        columns["instruction"] = np.array([its[0] if its else "" for its in texts], object)
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


def _texts_of(tasks: Any, known: Mapping[int, str]) -> list[str]:
    """Returns the instructions in an episode's `tasks`: texts, numbers of tasks, or one of them; without empty ones."""
    listed = [tasks] if isinstance(tasks, str) else list(tasks)
    texts = [known.get(task, "") if type(task) is int else str(task or "") for task in listed]
    return [text for text in texts if text.strip()]


def episode_files(root: Path) -> list[Path]:
    """Returns the parquet files with the episodes of a v3.0 dataset."""
    paths = find_files(root / EPISODES, "*/*.parquet")
    if not paths:
        raise UserError(f"{root / EPISODES}: holds no parquet file; {AGAIN}")
    return paths


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Reads a table of a dataset.

    Raises UserError naming the file where it is damaged, lacks a column, or would be far larger in memory.
    """
    with _parsing(path), open_for_arrow(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        if lacking := [name for name in columns or () if name not in parquet.schema_arrow.names]:
            raise UserError(f"{path}: lacks the columns {', '.join(lacking)}; {AGAIN}")
        rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        if min(rows, default=0) < 0 or sum(rows) != parquet.metadata.num_rows:
            raise ValueError(f"its row groups hold {sum(rows)} rows, its footer declares {parquet.metadata.num_rows}")
        _check_memory(parquet, file, columns, range(len(rows)))
        table = parquet.read(columns=columns)
        # Finds texts that are not UTF-8, which would raise where they are used.
        table.validate(full=True)
    return table


def _check_memory(
    parquet: pq.ParquetFile, file: BinaryIO, columns: Sequence[str] | None, groups: Sequence[int]
) -> None:
    """Raises ValueError where these columns of these row groups would be far larger in memory than the file."""
    metadata, kinds = parquet.metadata, {field.name: field.type for field in parquet.schema_arrow}
    size, text_size, texts = 0, 0, dict[str, str]()
    for leaf in range(len(parquet.schema)):
        column = parquet.schema.column(leaf)
        name = max((name for name in kinds if f"{column.path}.".startswith(f"{name}.")), key=len, default="")
        if columns is not None and name not in columns:
            continue
        width = SIZES.get(column.physical_type, max(8, column.length)) + 4 * column.max_repetition_level
        for group in groups:
            rows, chunk = metadata.row_group(group).num_rows, metadata.row_group(group).column(leaf)
            values = max(chunk.num_values, rows, _num_slots(kinds.get(name), rows, chunk.num_values))
            size += max(chunk.total_uncompressed_size, values * width)
            if column.physical_type == "BYTE_ARRAY":
                texts[column.path] = name
                # As if each text were as large as all that are stored.
                text_size += values * chunk.total_uncompressed_size
    _require_memory(size, file)
    if text_size > _most_memory(file):
        text_size, dictionaries = 0, pq.ParquetFile(file, metadata=metadata, read_dictionary=list(texts))
        for group in groups:
            table = dictionaries.read_row_group(group, columns=sorted(set(texts.values())))
            text_size += sum(map(_text_size, table.columns))
            _require_memory(text_size, file)


def _most_memory(file: BinaryIO) -> int:
    return max(SMALL_TABLE, EXPANSION * file.seek(0, 2))


def _require_memory(num_bytes: int, file: BinaryIO) -> None:
    """Raises ValueError where `num_bytes` are far more than the size of the file."""
    if num_bytes > (most := _most_memory(file)):
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
        return [] if pa.types.is_primitive(column.type.value_type) else [column]
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
        raise UserError(_no_colour(path, all_image_keys(features)))
    needed = ["fps", "data_path", *(["video_path"] if video_keys(features) else [])]
    if lacking := [key for key in needed if info.get(key) is None]:
        raise UserError(f"{path}: lacks {', '.join(lacking)}; {AGAIN}")


def _no_colour(path: Path, others: Sequence[str]) -> str:
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
    parts = [_episode_rows(path, video_keys) for path in episode_files(root)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["episode_index"], kind="stable")
    return {name: values[order] for name, values in columns.items()}


def _episode_rows(path: Path, video_keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Reads a file of episodes.

    What is empty, or no number of its kind, is a flaw of that episode alone, and what is lacking of a camera, of that
    camera alone.
    """
    present, of_data = set(_column_names(path)), ["length", *(f"data/{name}" for name in PLACE)]
    wanted = ["episode_index", *of_data]
    of_cameras = {f"videos/{key}": [f"videos/{key}/{name}" for name in (*PLACE, *SPAN)] for key in video_keys}
    ends = [f"videos/{key}/{SPAN[1]}" for key in video_keys]
    optional = ["tasks", "source", *(name for names in of_cameras.values() for name in names)]
    table = read_parquet(path, [*wanted, *(name for name in optional if name in present)])
    columns = {"episode_index": _integers(table, "episode_index", path)}
    for kind, names in {"": of_data, **of_cameras}.items():
        lacking = [name for name in names if name not in present and name not in ends]
        flaw = f"{path}: lacks the columns {', '.join(lacking)}; download it again, or choose other cameras (--camera)"
        flaws = np.full(len(table), flaw if lacking else "", object)
        for name in names:
            least = 1 if name == "length" else 0
            if name not in present:
                columns[name] = np.full(len(table), np.nan if name in ends else 0)
                continue
            values = _floats(table[name], f"{path}: {name}")
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
    for name, empty in (("source", ""), ("tasks", [])):
        values = table[name].to_pylist() if name in present else [empty] * len(table)
        columns[name] = np.fromiter((value or empty for value in values), object, len(table))
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
    with _parsing(path), open_for_arrow(path) as file:
        return pq.read_schema(file).names


def _read_group(path: Path, group: int, column: str) -> pa.ChunkedArray:
    with _parsing(path), open_for_arrow(path) as file:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        _check_memory(parquet, file, [column], [group])
        return parquet.read_row_group(group, columns=[column])[column]


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
    # What float32 does not hold is not finite, which is named where the numbers are checked.
    with np.errstate(over="ignore"):
        return flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(num_rows, width)


def _recent(cache: OrderedDict[Any, Value], key: Any, most: int, read: Callable[[], Value]) -> Value:
    """Returns cache[key], read where it is absent; the cache keeps the `most` last used."""
    value = cache.pop(key) if key in cache else read()
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)
    return value


@cache
def _warn_once(message: str) -> None:
    """Prints a warning, once in a process: a command may open a dataset several times."""
    warn(message)
