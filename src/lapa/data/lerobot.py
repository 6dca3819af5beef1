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
Axes: T time, H W image, C channel, D numbers of a feature, N frames of a video file.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, UInt8
from PIL import Image

from lapa.checksums import SUMS, each_sum, sha256, verify
from lapa.console import warn
from lapa.data.dataset import ACTION, ACTION_SPACE, STATE, Dataset, all_image_keys, image_keys
from lapa.data.films import episode_frames
from lapa.data.metadata import (
    CODEBASE_VERSION,
    EPISODES,
    EXTRA,
    INFO,
    LEGACY_CHUNK,
    LEGACY_EPISODES,
    LEGACY_TASKS,
    LEGACY_VERSIONS,
    PLACE,
    TASKS,
    episode_files,
    find_episodes,
    no_colour,
    read_episodes,
    read_info,
    read_tasks,
    video_keys,
)
from lapa.data.tables import (
    AGAIN,
    check_memory,
    column_names,
    floats,
    integers,
    matrix,
    parsing,
    read_parquet,
    read_row_group,
)
from lapa.data.transforms import IMAGE_FORMATS, decode_image
from lapa.data.video import decode_times, film_times
from lapa.errors import StoreError, UserError, unknown
from lapa.files import (
    find_files,
    fingerprint,
    is_remote,
    open_for_arrow,
    read_json,
)
from lapa.hub.push import Pushed

# Parquet files whose numbers stay in memory: they are read episode by episode, mostly in order.
OPEN_TABLES = 8
# Video files of which it stays known where their episodes begin.
OPEN_FILMS = 64
# Row groups of images that stay in memory: LeRobot writes one per episode, and an item has one image per camera.
OPEN_GROUPS = 4
# Modes of images that Pillow reads from PNGs of more than 8 bits: depth, in LeRobot's datasets.
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")

Value = TypeVar("Value")


class LeRobotDataset(Dataset, Pushed):
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
        self._sums = {name: digest for name, digest in each_sum(root) if not name.startswith("videos/")}
        opened = {name for name in self._sums if name in (INFO, TASKS) or name.startswith(EPISODES)}
        verify(root, AGAIN, {name: self._sums[name] for name in opened})
        self.tasks = read_tasks(root, self.legacy)
        self._columns = read_episodes(root, self.legacy, video_keys(self.info["features"]), self.tasks)
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
        self._files = {} if self.legacy else {kind: self._sorted_files(kind) for kind in self._kinds()}
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
        if not self.num_left_out:
            return whole
        return hashlib.sha256(whole.encode() + self.numbers.tobytes()).hexdigest()[: len(whole)]

    @property
    def num_left_out(self) -> int:
        """How many episodes of the folder are left out here (`skip_bad`)."""
        return len(self._columns["length"]) - len(self)

    @cached_property
    def extra(self) -> dict[str, Any]:
        """The notes of the command that wrote the dataset; empty for datasets from elsewhere."""
        path = self.root / EXTRA
        noted = read_json(path) if path.exists() else {}
        # People declare their robot's actions there.
        if path.exists() and EXTRA in self._sums and sha256(path) != self._sums[EXTRA]:
            warn(f"{path}: edited by hand, or damaged: its SHA-256 is not that in {SUMS}")
        if not isinstance(noted, dict):
            raise UserError(f"{path}: expected an object, got {noted!r}; correct it, or delete it")
        known = noted.get(ACTION_SPACE, {})
        declared = self._declared and isinstance(known, dict)
        return {**noted, ACTION_SPACE: {**known, **self._declared}} if declared else noted

    def _artifact_folder(self) -> AbstractContextManager[Path]:
        return nullcontext(self.root)

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

    def file_numbers(self, kind: str) -> Int[np.ndarray, "E"]:
        """Returns a number for each episode's file (`data`, `videos/KEY`), from 0 in the order of their first episodes.

        Raises UserError where the metadata lacks one. Of v3.0.
        """
        for flaws in (self._columns[name] for name in ("flaw", f"{kind}/flaw") if name in self._columns):
            if (bad := np.flatnonzero(flaws[self._entries] != "")).size:
                raise UserError(self._flaw_of(kind, int(self._entries[bad[0]])))
        chunks, files = (
            np.unique(self._columns[f"{kind}/{name}"][self._entries], return_inverse=True)[1] for name in PLACE
        )
        _, firsts, numbers_E = np.unique(chunks * len(self) + files, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(firsts))[numbers_E]

    def rows(self, episode_index: int) -> slice:
        """Returns an episode's rows in its data file, which is checked once. Raises UserError where it is damaged."""
        entry = int(self._entries[episode_index])
        if self._first_rows[entry] < 0 and entry not in self._flaws:
            path = self.data_path(episode_index)
            name = path.relative_to(self.root).as_posix()
            verify(self.root, AGAIN, {name: self._sums[name]} if name in self._sums else {})
            timed = ["timestamp"] if "timestamp" in column_names(path) else []
            table = read_parquet(path, ["episode_index", *timed])
            owners = integers(table, "episode_index", path, empty=-1)
            seconds = floats(table["timestamp"], f"{path}: timestamp") if timed else None
            entries = self._entries_in("data", entry)
            numbers, lengths = (self._columns[name][entries] for name in ("episode_index", "length"))
            with parsing(path):
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
                    numbers[name] = matrix(table[stored], self._width(name) or 0, "")
                except UserError:
                    # What is wrong with one episode is found where it is read.
                    numbers[name] = table[stored]
            return numbers

        rows = _recent(self._tables, path, OPEN_TABLES, read)[feature][span]
        if not isinstance(rows, np.ndarray):
            stored = self._stored[feature]
            rows = matrix(rows, self._width(feature) or 0, f"{path}: {stored} of episode {self.numbers[episode_index]}")
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
        if "task_index" not in column_names(path):
            return ""

        def read() -> dict[str, np.ndarray | pa.ChunkedArray]:
            return {"task_index": integers(read_parquet(path, ["task_index"]), "task_index", path, empty=-1)}

        column = _recent(self._tables, (path, "task_index"), OPEN_TABLES, read)["task_index"]
        return self.tasks.get(int(column[span.start]))

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
        rows_E, chunks_E, files_E = self._files[kind]
        chunk, file = (self._columns[f"{kind}/{name}"][entry] for name in PLACE)
        start, stop = (int(np.searchsorted(chunks_E, chunk, side)) for side in ("left", "right"))
        first, last = (start + int(np.searchsorted(files_E[start:stop], file, side)) for side in ("left", "right"))
        return np.arange(first, last) if rows_E is None else rows_E[first:last]

    def _kinds(self) -> list[str]:
        return ["data", *(f"videos/{key}" for key in video_keys(self.info["features"]))]

    def _sorted_files(self, kind: str) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """Returns the rows of the metadata in the order of their files, None where that is their own, and these files.

        The columns of metadata in order are not copied. Made before workers are forked, which share it.
        """
        chunks_E, files_E = (self._columns[f"{kind}/{name}"] for name in PLACE)
        is_next_E = (np.diff(chunks_E) > 0) | ((np.diff(chunks_E) == 0) & (np.diff(files_E) >= 0))
        if is_next_E.all():
            return None, chunks_E, files_E
        rows_E = np.lexsort((files_E, chunks_E))
        return rows_E, chunks_E[rows_E], files_E[rows_E]

    def _leave_out_depth(self) -> None:
        """Takes depth maps out of the cameras, and reports them. Raises UserError where no camera is left."""
        deep = [camera for camera, key in self._camera_keys.items() if self._is_deep(key)]
        self._camera_keys = {camera: key for camera, key in self._camera_keys.items() if camera not in deep}
        self.cameras = tuple(self._camera_keys)
        others = [key for key in all_image_keys(self.features) if key not in self._camera_keys.values()]
        if not self.cameras:
            raise UserError(no_colour(self.root / INFO, others))
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
                    check_memory(parquet, opened, [key], [0])
                    rows = next(parquet.iter_batches(batch_size=1, row_groups=[0], columns=[key]))[key]
                value = rows[0].as_py()
                encoded = io.BytesIO(value["bytes"] if isinstance(value, dict) else value)
                with Image.open(encoded, formats=IMAGE_FORMATS) as image:
                    return image.mode in DEEP_MODES
            # An error there is reported when an image is read.
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
            except StoreError:
                raise
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
            with parsing(path), open_for_arrow(path) as file:
                metadata = pq.ParquetFile(file).metadata
                sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._group_rows[path] = np.cumsum([0, *sizes])
        starts, images = self._group_rows[path], []
        for row in rows:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            group = _recent(
                self._groups, (path, number, column), OPEN_GROUPS, partial(read_row_group, path, number, column)
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


def require_folder(dataset: Dataset, *, stores: bool = False) -> LeRobotDataset:
    """Returns the dataset, which must be a v3.0 folder of videos, opened as it is stored.

    Damaged episodes may be left out of it. stores: whether it may be elsewhere than on this machine.
    Raises UserError with the way to make one.
    """
    make = f"`lapa data lerobot {dataset.root} --out DATASET` makes one"
    if not isinstance(dataset, LeRobotDataset) or (is_remote(dataset.root) and not stores):
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


def _recent(cache: OrderedDict[Any, Value], key: Any, most: int, read: Callable[[], Value]) -> Value:
    """Returns cache[key], read where it is absent; the cache keeps the `most` last used."""
    # Threads may share the cache: one may take out an entry between a look and the next.
    value = cache.pop(key, None)
    value = read() if value is None else value
    cache[key] = value
    if len(cache) > most:
        with suppress(KeyError):
            cache.popitem(last=False)
    return value


@cache
def _warn_once(message: str) -> None:
    """Prints a warning, once in a process: a command may open a dataset several times."""
    warn(message)
