"""Writes a dataset (layout: lapa.data.lerobot) so that a kill at any instant loses and doubles nothing.

Each episode is one mp4 per camera, written atomically, and then one line of `meta/journal.jsonl`; an episode exists
once its line does. A killed writer leaves whole episodes and perhaps an mp4 without a line, which the next writer
replaces. `finish` turns the journal into the tables of the layout; `meta/info.json` comes last and makes the dataset
readable. Memory does not grow with the number of frames.

On a store, where no file grows, some videos are uploaded under their final names, and their lines then follow as one
object of `meta/journal/`, made on condition that there is none: of two writers that number them alike one stops.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt8

from lapa.checksums import Journal, sha256, write_marker
from lapa.config import differences
from lapa.data.dataset import ACTION, ACTION_SPACE, CAMERA_PREFIX, STATE, ActionSpace, Control, require_finite
from lapa.data.duplicates import BITS, Duplicates
from lapa.data.left_out import EXAMPLES, KEPT_EPISODES, left_out_page
from lapa.data.lerobot import LeRobotDataset
from lapa.data.metadata import (
    CODEBASE_VERSION,
    DATA_PATH,
    EPISODES_PATH,
    EXTRA,
    INFO,
    JOURNAL,
    JOURNAL_PARTS,
    LEFT_OUT,
    SPAN,
    STATS,
    TASKS,
    VIDEO_PATH,
)
from lapa.data.statistics import PixelMoments, Totals, moments_by_episode, moments_of
from lapa.data.tables import as_numpy
from lapa.data.video import encode_clip, exact_rate, probe
from lapa.errors import UserError, shown
from lapa.files import (
    as_path,
    atomic_path,
    copy_file,
    errors_about,
    find_files,
    inside,
    is_remote,
    remove,
    remove_partial,
    whole_characters,
    write_json,
    write_text,
)
from lapa.stores import content_of, create

MAX_NAME = 200  # Bytes of a camera's name, which is part of folders' names.
CHUNK_SIZE = 1000  # Files per chunk folder, LeRobot's default.
ROWS_PER_FILE = 500_000  # Of a data parquet: some tens of MB.
EPISODES_PER_GROUP = 1000  # Episodes whose rows are made at once.
EPISODES_PER_FILE = 10_000
TASKS_AT_ONCE = 1 << 20
# In meta/lapa.json: what the source held.
SOURCE_FINGERPRINT = "source_fingerprint"
# What an episode may have in the journal besides its content (`add_episode_files`), and which become columns.
LOOKS, IMAGE, TEXT, CAMERA_MOTION = "looks", "image", "text", "camera_motion"
DUPLICATE = "left out, looks like an earlier episode"
NO_INSTRUCTION = "kept, without an instruction"
FRAME_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
# Of a dataset on a store: requests at a time, fewer than a client has connections (botocore 10), of which the lock
# needs one within seconds; and lines that are one object of the journal.
REQUESTS, LINES_PER_PART = 8, 32
# Bytes of a SHA-256.
DIGEST = 32
# Columns that depend on the episodes before, in the data files and with their statistics.
RENUMBERED = ("episode_index", "index", "task_index")


class DatasetWriter:
    """Writes one dataset, episode by episode; `finish()` makes it readable and returns it.

        writer = lapa.DatasetWriter("data/arm", fps=10, cameras={"front": (96, 128)}, action_names=["dx", "dy", "grip"])
        writer.add_episode({"front": images}, "lift the cup", actions=actions)  # uint8 [T, 96, 128, 3], float [T, 3]
        dataset = writer.finish()

    root: the folder, or its URL on a store; fps: frames per second of all episodes.
    cameras: short name -> (height, width), both even. action_names, state_names: one name per dimension, or None.
    binary_actions, control: the action space: names of the dimensions that are switches, and whether actions are
        `delta` or `absolute` (lapa.data.dataset).
    robot_type: for meta/info.json. keyframe_interval: frames between two keyframes of the videos.
    extra_info: how the dataset is made, noted in meta/lapa.json (`Dataset.extra`).
    resume: continue after the last whole episode of a writer with the same settings. `num_items` is how many items are
        closed, `notes` what was counted of them, and `done_sources` are the sources of the episodes since then. Where
        `root` holds a finished dataset of these settings, `finished` is set, and `finish` opens it. `identity` is a
        hash of these.
    drop_duplicates: `is_duplicate` and `add_unfinished` find episodes that look like an earlier one.
    part: what is written is for the `add_unfinished` of another writer, which needs the examples of all episodes.
    Raises UserError where `root` was begun with other settings, or holds a dataset, finished or not, and is not to be
    resumed.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        fps: float,
        cameras: Mapping[str, tuple[int, int]],
        action_names: Sequence[str] | None = None,
        state_names: Sequence[str] | None = None,
        binary_actions: Sequence[str] = (),
        control: Control | None = None,
        robot_type: str | None = None,
        keyframe_interval: int = 2,
        extra_info: Mapping[str, Any] | None = None,
        resume: bool = False,
        drop_duplicates: bool = False,
        part: bool = False,
    ):
        if not 0 < fps < math.inf:
            raise UserError(f"{root}: fps is {fps}, it must be above 0")
        self.root, self.fps, self.cameras = as_path(root), float(fps), dict(cameras)
        self.widths = {
            name: len(names) for name, names in ((ACTION, action_names), (STATE, state_names)) if names is not None
        }
        self.names = {ACTION: list(action_names or ()), STATE: list(state_names or ())}
        self.robot_type, self.keyframe_interval = robot_type, keyframe_interval
        declared = {} if action_names is None else ActionSpace.named(action_names, binary_actions, control).declared()
        self.extra_info = {**(extra_info or {}), **declared}
        self.num_episodes = self.num_items = 0
        self.finished = False
        self.done_sources: set[str] = set()
        self.notes: Counter[str] = Counter()
        # For the page about what was left out; and of the item that is not closed yet.
        self._examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._open_notes: Counter[str] = Counter()
        self._open_examples: list[dict[str, Any]] = []
        self._part = part
        self._duplicates = Duplicates() if drop_duplicates else None
        # What is on its way to a store; else the dataset's own folder.
        self._outgoing = tempfile.TemporaryDirectory(prefix="lapa-") if is_remote(self.root) else None
        self._here = Path(self._outgoing.name) if self._outgoing else self.root
        self._threads = ThreadPoolExecutor(REQUESTS) if self._outgoing else None
        self._requests: list[Future[None]] = []
        self._num_parts = self._num_sent = self._lines_since = 0
        self._journal = Journal(self._here / JOURNAL)
        self._image_keys = [CAMERA_PREFIX + camera for camera in self.cameras]
        for camera, (height, width) in self.cameras.items():
            with errors_about(f"{root}: camera {shown(camera)}"):
                inside(self.root, camera)
            if "/" in camera or len(camera.encode()) > MAX_NAME:
                raise UserError(f"{root}: camera {shown(camera)}: a name has no slash and at most {MAX_NAME} bytes")
            if min(height, width) < 2 or height % 2 or width % 2:
                raise UserError(f"{root}: camera {camera} is {width}x{height}; both must be even and above 0")
        self._begin(resume)

    def add_episode(
        self,
        frames: Mapping[str, UInt8[np.ndarray, "T H W 3"] | Iterable[UInt8[np.ndarray, "H W 3"]]],
        instruction: str,
        *,
        actions: Float[np.ndarray, "T A"] | None = None,
        states: Float[np.ndarray, "T S"] | None = None,
        source: str = "",
    ) -> int:
        """Writes an episode and returns its index.

        frames: for every camera an array or any iterable of RGB images; row t of `actions` belongs to image t.
        Raises UserError, and adds nothing, where shapes or lengths do not fit or numbers are not finite.
        """
        rows = self._checked_rows({ACTION: actions, STATE: states}, source)
        if set(frames) != set(self.cameras):
            raise UserError(f"{self._name(source)}: has cameras {sorted(frames)}, not {sorted(self.cameras)}")
        files, lengths, pixels = {}, {}, {}
        for camera, images in frames.items():
            pixels[camera] = PixelMoments()
            checked = self._checked_frames(images, camera, source)
            path = files[camera] = self._here / self._video_name(camera, self.num_episodes)
            lengths[camera] = encode_clip(path, pixels[camera].watch(checked), self.fps, self.keyframe_interval)
        length = self._common_length(lengths, rows, source)
        stats = {camera: moments.to_dict() for camera, moments in pixels.items()}
        return self._add(files, length, rows, stats, instruction, source)

    def add_episode_files(
        self,
        files: Mapping[str, Path],
        length: int,
        instruction: str,
        *,
        pixel_stats: Mapping[str, dict[str, list[float]]],
        actions: Float[np.ndarray, "T A"] | None = None,
        states: Float[np.ndarray, "T S"] | None = None,
        source: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> int:
        """Adds an episode from mp4 files (camera -> path, on the same file system), which are moved.

        pixel_stats: camera -> PixelMoments.to_dict() of its frames. facts: what is known of it: its `looks`
        (lapa.data.duplicates), `image` and `text` as an example of what is kept, and `camera_motion`, a column of the
        episodes' table. Otherwise as `add_episode`.
        """
        rows = self._checked_rows({ACTION: actions, STATE: states}, source)
        self._common_length(dict.fromkeys(files, length), rows, source)
        return self._add(files, length, rows, pixel_stats, instruction, source, facts or {})

    def is_duplicate(self, episode: Mapping[str, Any]) -> bool:
        """Returns whether an episode, by `looks` and `length`, is like an earlier one; it is then counted as left out.

        Episodes are to be asked for, and added, in the order of the dataset; the first of those that are alike is kept.
        """
        if self._duplicates is None or LOOKS not in episode:
            return False
        first = self._duplicates.first(episode[LOOKS], episode["length"])
        if first is None:
            return False
        self._open_notes[DUPLICATE] += 1
        # It was counted as kept when its item was converted.
        self._open_notes[NO_INSTRUCTION] -= not episode["instruction"].strip()
        if max(len(self._examples[DUPLICATE]), len(self._open_examples)) < EXAMPLES:
            lines = (record for record in Journal(self._journal.path) if LOOKS in record)
            bits = self._duplicates.num_different(first, episode[LOOKS])
            text = f"like {next(islice(lines, first, None))['source']}, {bits} of {BITS} bits differ"
            self._open_examples.append(
                {"reason": DUPLICATE, "source": episode["source"], TEXT: text, IMAGE: episode.get(IMAGE)}
            )
        return True

    def add_unfinished(self, root: Path, first: int) -> None:
        """Adds, in order, what another writer has written in `root`, a folder, and not finished; its videos are moved.

        first: the number of its first item here. `root` may be on the store of this dataset; videos are copied there
        then, and lines are written as one part. Where this was interrupted, it goes on: what is there is left out.
        """
        lines = iter(Journal(root / JOURNAL))
        next(lines, None)
        item, number = first, 0
        episodes: list[Mapping[str, Any]] = []
        for record in lines:
            if "item" not in record:
                episodes.append(record)
                continue
            if item == self.num_items:
                for at, episode in enumerate(episodes, number):
                    if episode["source"] not in self.done_sources and not self.is_duplicate(episode):
                        self._move({camera: root / self._video_name(camera, at) for camera in self.cameras})
                        self._write_record(episode)
                self.close_item(record["item"], record["notes"], record.get("examples", ()))
            item, number = item + 1, number + len(episodes)
            episodes = []
        self.flush()

    def close_item(
        self, item: str, notes: Mapping[str, int] | None = None, examples: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Records that all episodes of `item` have been added or left out.

        notes: counts to report; `notes` adds them up over all runs. Items are closed in one order, by which a resumed
        conversion knows what is done. examples: of what was left out, each with its `reason`, one of the notes,
        `source`, `text` and `image`, a data URL or None.
        """
        notes = Counter(notes or {}) + self._open_notes
        shown = [example for example in (*examples, *self._open_examples) if self._take_example(example)]
        self._journal.append({"item": item, "notes": dict(notes), "examples": shown})
        self._open_notes.clear()
        self._open_examples.clear()
        self._note_item(notes)
        self._flush_where_many()

    def discard(self) -> None:
        """Removes the journal of a writer without episodes, as if nothing had been begun."""
        self._remove_journal()
        self._journal.path.parent.rmdir()

    def video_path(self, camera: str, episode_index: int) -> Path:
        """Returns the mp4 of an episode."""
        return self.root / self._video_name(camera, episode_index)

    def _video_name(self, camera: str, number: int) -> str:
        return VIDEO_PATH.format(video_key=CAMERA_PREFIX + camera, **place(number))

    def finish(self, listed: Mapping[str, int] = MappingProxyType({})) -> LeRobotDataset:
        """Writes the tables, meta/info.json last, and opens the dataset. Raises UserError without an episode.

        listed: counts of what was found while listing the source, for the page about what was left out.
        """
        if self.finished:
            return LeRobotDataset(self.root)
        if not self.num_episodes:
            raise UserError(f"{self.root}: no episode was written; there is nothing to finish")
        tasks: dict[str, int] = {}
        self.flush()
        tables = Tables(self.root, [*self._image_keys, *self.widths, *FRAME_COLUMNS])
        digests = bytearray()
        records = self._records()
        while some := list(islice(records, EPISODES_PER_GROUP)):
            for record in some:
                for camera in self.cameras:
                    digests += bytes.fromhex(record["videos"][camera])
            numbers = [tasks.setdefault(record["instruction"], len(tasks)) for record in some]
            tables.add(*self._tables_of(some, np.array(numbers), tables.num_episodes))
        if tables.num_episodes != self.num_episodes:
            raise UserError(f"{self._journal.path}: has lost an episode; --overwrite to start anew")
        tables.close()
        write_tasks(self.root / TASKS, list(tasks))
        write_json(self.root / STATS, tables.totals.to_dict())
        write_json(self.root / EXTRA, self.extra_info)
        files = [TASKS, STATS, EXTRA, *tables.files]
        if self.num_items:
            counts = self.num_items, self.num_episodes, self.notes
            write_text(self.root / LEFT_OUT, left_out_page(self.extra_info, *counts, self._examples, listed))
            files.append(LEFT_OUT)
        names = (self._video_name(camera, index) for index in range(self.num_episodes) for camera in self.cameras)
        videos = ((name, digests[DIGEST * at : DIGEST * (at + 1)].hex()) for at, name in enumerate(names))
        write_marker(self.root, INFO, self._info(tables.num_frames, len(tasks)), files, known=videos)
        self._remove_journal()
        self.finished = True
        return LeRobotDataset(self.root)

    def _begin(self, resume: bool) -> None:
        """Opens the journal: new, or cut back to its last whole line."""
        settings = {
            "fps": self.fps,
            "cameras": {name: list(shape) for name, shape in self.cameras.items()},
            "names": self.names,
            "keyframe_interval": self.keyframe_interval,
            "extra_info": self.extra_info,
        }
        self.identity = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        if (self.root / INFO).exists():
            if not resume:
                raise UserError(f"{self.root}: is a finished dataset; give another --out, or --overwrite to replace it")
            self._require_same(settings, self._settings_of_finished(settings))
            self._remove_journal()
            self.finished = True
            return
        if is_remote(self.root):
            cast(Any, self.root).fs.invalidate_cache()
        if not resume and self._is_begun():
            raise UserError(
                f"{self.root}: holds an unfinished dataset; continue it (--resume; resume=True), delete it, or give "
                "another folder"
            )
        if is_remote(self.root) and resume:
            self._fetch_journal()
        if not self._journal.path.exists():
            self._journal.begin(())
        for number, record in enumerate(self._journal):
            if number == 0:
                self._require_same(settings, record)
            elif "item" in record:
                self._note_item(record["notes"])
                for example in record.get("examples", ()):
                    self._take_example(example)
            else:
                self._note_episode(record)
        # Half-written tables keep their suffix, and a reader that lists the folder would take them for whole ones.
        remove_partial(self.root)
        self._num_sent = self._journal.length
        if not self._journal.length:
            self._journal.append(settings, sync=True)
            self.flush()

    def _is_begun(self) -> bool:
        if is_remote(self.root):
            return bool(find_files(self.root, f"{JOURNAL_PARTS}/*.jsonl"))
        return self._journal.path.exists() and self._journal.path.stat().st_size > 0

    def _fetch_journal(self) -> None:
        """Makes the journal of this machine from its parts on the store; where one is missing, up to there."""
        assert self._threads is not None
        paths = find_files(self.root, f"{JOURNAL_PARTS}/*.jsonl")
        if not paths:
            return
        with atomic_path(self._journal.path) as temporary, temporary.open("wb") as file:
            for number, (path, part) in enumerate(zip(paths, self._threads.map(content_of, paths), strict=True)):
                if part is None or path != self._part_path(number):
                    break
                file.write(part)
                self._num_parts = number + 1
        # Behind a part that is missing, what follows is of no use, and the new parts get these names.
        for path in paths[self._num_parts :]:
            path.unlink()

    def _part_path(self, number: int) -> Path:
        return self.root / JOURNAL_PARTS / f"{number:09d}.jsonl"

    def flush(self) -> None:
        """Where the dataset is on a store, waits until all that was added is there, and writes their lines there.

        Raises UserError where another writer has been first.
        """
        requests, self._requests, self._lines_since = self._requests, [], 0
        try:
            for request in requests:
                request.result()
        finally:
            # None is left to do, or one has failed.
            for request in requests:
                request.cancel()
        if self._threads is None or self._num_sent == self._journal.length:
            return
        with self._journal.path.open("rb") as file:
            file.seek(self._num_sent)
            lines = file.read(self._journal.length - self._num_sent)
        if not create(self._part_path(self._num_parts), lines):
            raise UserError(
                f"{self._part_path(self._num_parts)}: another command has written this dataset meanwhile; stop one of "
                "them, and continue with --resume"
            )
        self._num_parts, self._num_sent = self._num_parts + 1, self._journal.length

    def _remove_journal(self) -> None:
        self._journal.path.unlink(missing_ok=True)
        if is_remote(self.root) and find_files(self.root, JOURNAL_PARTS):
            remove(self.root / JOURNAL_PARTS)

    def _move(self, files: Mapping[str, Path]) -> None:
        """Moves the videos of the next episode to their places; of one that an earlier run moved, none is there."""
        for camera, path in files.items():
            target = self.video_path(camera, self.num_episodes)
            if self._threads is not None:
                self._requests.append(self._threads.submit(self._upload, path, target))
            elif path != target and (path.exists() or not target.exists()):
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)

    def _upload(self, path: Path, target: Path) -> None:
        copy_file(path, target)
        if not is_remote(path):
            path.unlink()

    def _settings_of_finished(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings of the finished dataset, those that it does not note as in `settings`."""
        dataset = LeRobotDataset(self.root)
        extra = {name: value for name, value in dataset.extra.items() if name != ACTION_SPACE}
        # The action space may be declared by hand, and earlier versions did not fingerprint the source.
        unknown = {ACTION_SPACE} | {SOURCE_FINGERPRINT} - set(extra)
        extra |= {name: value for name, value in self.extra_info.items() if name in unknown}
        names = {name: (dataset.features.get(name) or {}).get("names") or [] for name in (ACTION, STATE)}
        cameras = {name: dataset.features[CAMERA_PREFIX + name]["shape"][:2] for name in dataset.cameras}
        return {**settings, "fps": dataset.fps, "cameras": cameras, "names": names, "extra_info": extra}

    def _require_same(self, settings: Mapping[str, Any], then: Mapping[str, Any]) -> None:
        if changed := differences(then, settings):
            raise UserError(
                f"{self.root}: was begun with other settings ({'; '.join(changed[:4])}); --overwrite to start anew, or "
                "give another --out"
            )

    def _records(self) -> Iterator[dict[str, Any]]:
        lines = iter(self._journal)
        next(lines)
        return (record for record in lines if "item" not in record)

    def _add(
        self,
        files: Mapping[str, Path],
        length: int,
        rows: Mapping[str, np.ndarray],
        pixel_stats: Mapping[str, dict[str, list[float]]],
        instruction: str,
        source: str,
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> int:
        stats = {CAMERA_PREFIX + camera: values for camera, values in pixel_stats.items()}
        stats |= {name: moments_of(values) for name, values in rows.items()}
        videos = {camera: sha256(path) for camera, path in files.items()}
        self._move(files)
        words = whole_characters(instruction)
        record = {"source": source, "instruction": words, "length": length, "stats": stats, "videos": videos}
        return self._write_record({**record, **{name: values.tolist() for name, values in rows.items()}, **facts})

    def _write_record(self, record: Mapping[str, Any]) -> int:
        """Writes the line of an episode whose videos are in their places, and returns its index."""
        if not self._part and len(self._examples[KEPT_EPISODES]) >= EXAMPLES:
            record = {name: value for name, value in record.items() if name not in (IMAGE, TEXT)}
        self._journal.append(record, sync=True)
        self._note_episode(record)
        self._flush_where_many()
        return self.num_episodes - 1

    def _note_item(self, notes: Mapping[str, int]) -> None:
        """Notes an item that is closed in the journal, of whose episodes none will come again."""
        self.num_items += 1
        self.done_sources.clear()
        self.notes.update(notes)

    def _note_episode(self, record: Mapping[str, Any]) -> None:
        """Notes an episode that is in the journal."""
        self.num_episodes += 1
        self.done_sources.add(record["source"])
        if self._duplicates is not None and LOOKS in record:
            self._duplicates.add(record[LOOKS], record["length"])
        if IMAGE in record:
            self._take_example({"reason": KEPT_EPISODES, **{name: record[name] for name in ("source", TEXT, IMAGE)}})

    def _take_example(self, example: Mapping[str, Any]) -> bool:
        """Keeps an example, unless there are enough of its reason."""
        others = self._examples[example["reason"]]
        if len(others) >= EXAMPLES:
            return False
        others.append(dict(example))
        return True

    def _flush_where_many(self) -> None:
        self._lines_since += 1
        if self._lines_since >= LINES_PER_PART:
            self.flush()

    def _name(self, source: str) -> str:
        return f"episode {source or self.num_episodes}"

    def _checked_rows(self, rows: Mapping[str, np.ndarray | None], source: str) -> dict[str, np.ndarray]:
        checked = {}
        for name, values in rows.items():
            where, width = f"{self._name(source)}: {name}", self.widths.get(name)
            if (values is None) != (width is None):
                problem = "missing" if values is None else "given, though the dataset was begun without it"
                raise UserError(f"{where} is {problem}; every episode of a dataset has the same features")
            if values is None:
                continue
            try:
                array = np.asarray(values, dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise UserError(f"{where} is no array of numbers ({error})") from None
            if array.ndim != 2 or array.shape[1] != width:
                raise UserError(f"{where} has shape {array.shape}, expected (frames, {width}): one column a name")
            require_finite(array, where)
            checked[name] = array
        return checked

    def _checked_frames(self, frames: Iterable[np.ndarray], camera: str, source: str) -> Iterator[np.ndarray]:
        expected = (*self.cameras[camera], 3)
        for number, frame_HWC in enumerate(frames):
            frame_HWC = np.asarray(frame_HWC)
            if frame_HWC.shape != expected or frame_HWC.dtype != np.uint8:
                raise UserError(
                    f"{self._name(source)}: frame {number} of {camera} is {frame_HWC.dtype} "
                    f"{frame_HWC.shape}, expected uint8 {expected}"
                )
            yield frame_HWC

    def _common_length(self, lengths: Mapping[str, int], rows: Mapping[str, np.ndarray], source: str) -> int:
        counts = {**lengths, **{name: len(values) for name, values in rows.items()}}
        if len(set(counts.values())) != 1:
            raise UserError(f"{self._name(source)}: lengths differ: {counts}; all need one row a frame")
        return next(iter(counts.values()))

    def _tables_of(
        self, records: Sequence[Mapping[str, Any]], tasks_E: np.ndarray, first: int
    ) -> tuple[pa.Table, pa.Table]:
        """Returns the rows of the frames of some episodes, and of their metadata, as `Tables.add` takes them.

        tasks_E: the numbers of their instructions; first: the number of the first of them.
        """
        lengths_E = np.array([record["length"] for record in records])
        steps_N = np.arange(lengths_E.sum()) - np.repeat(np.cumsum(lengths_E) - lengths_E, lengths_E)
        # The video's own: of 29.97 frames a second as they are named, one would be 0.1 ms off after 96 s.
        rate = float(exact_rate(self.fps))
        times_N = steps_N / rate
        frames: dict[str, pa.Array] = {}
        for name, width in self.widths.items():
            rows = [np.array(record[name], np.float32).reshape(-1, width) for record in records]
            frames[name] = feature_column(np.concatenate(rows))
        frames |= {name: pa.array(np.zeros_like(steps_N)) for name in FRAME_COLUMNS}
        frames |= {"timestamp": pa.array(times_N.astype(np.float32)), "frame_index": pa.array(steps_N)}
        frames["task_index"] = pa.array(np.repeat(tasks_E, lengths_E))
        numbers_E = np.arange(first, first + len(records))
        columns: dict[str, Any] = {
            "episode_index": numbers_E,
            "tasks": [[record["instruction"]] for record in records],
            "length": lengths_E,
            "dataset_from_index": np.zeros_like(lengths_E),
            "dataset_to_index": np.zeros_like(lengths_E),
            "source": [record["source"] for record in records],
        }
        if any(CAMERA_MOTION in record for record in records):
            columns[CAMERA_MOTION] = [record.get(CAMERA_MOTION) for record in records]
        for key in self._image_keys:
            columns |= {f"videos/{key}/{name}": its for name, its in place(numbers_E).items()}
            columns |= {f"videos/{key}/{SPAN[0]}": 0.0 * lengths_E, f"videos/{key}/{SPAN[1]}": lengths_E / rate}
        for name, statistics in records[0]["stats"].items():
            for key in statistics:
                values = np.array([record["stats"][name][key] for record in records])
                # LeRobot's are [3, 1, 1] of images, to broadcast over C H W.
                is_image = name in self._image_keys and key != "count"
                columns[f"stats/{name}/{key}"] = list_column(values[..., None, None] if is_image else values)
        for name, values in (("timestamp", times_N), ("frame_index", steps_N)):
            for key, value in moments_by_episode(values, lengths_E).items():
                columns[f"stats/{name}/{key}"] = list_column(value)
        return pa.table(frames), pa.table(columns)

    def _info(self, num_frames: int, num_tasks: int) -> dict[str, Any]:
        fps = int(self.fps) if self.fps.is_integer() else self.fps
        features: dict[str, Any] = {}
        for name, width in self.widths.items():
            features[name] = {"dtype": "float32", "shape": [width], "names": self.names[name]}
        for camera, (height, width) in self.cameras.items():
            video = probe(self.video_path(camera, 0))
            features[CAMERA_PREFIX + camera] = {
                "dtype": "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": height,
                    "video.width": width,
                    "video.codec": video.codec,
                    "video.pix_fmt": video.pix_fmt,
                    "video.is_depth_map": False,
                    "video.fps": fps,
                    "video.channels": 3,
                    "has_audio": False,
                },
            }
        for name in FRAME_COLUMNS:
            dtype = "float32" if name == "timestamp" else "int64"
            features[name] = {"dtype": dtype, "shape": [1], "names": None}
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.robot_type,
            "total_episodes": self.num_episodes,
            "total_frames": num_frames,
            "total_tasks": num_tasks,
            "chunks_size": CHUNK_SIZE,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 500,
            "fps": fps,
            "splits": {"train": f"0:{self.num_episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": features,
        }


def place(number: Any) -> dict[str, Any]:
    """Returns chunk and number in it of a file, or of an array of files, under LeRobot's names."""
    return {"chunk_index": number // CHUNK_SIZE, "file_index": number % CHUNK_SIZE}


def feature_column(rows_ND: np.ndarray) -> pa.Array:
    """Returns rows as a column of LeRobot's tables: lists of D numbers, or plain numbers where D is 1."""
    flat, width = pa.array(rows_ND.reshape(-1)), rows_ND.shape[1]
    return pa.FixedSizeListArray.from_arrays(flat, width) if width > 1 else flat


def list_column(values: np.ndarray) -> pa.Array:
    """Returns an array [N, ...] as a column of lists (of lists) of numbers."""
    column = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        column = pa.ListArray.from_arrays(pa.array(np.arange(0, len(column) + 1, size, dtype=np.int32)), column)
    return column


class Tables:
    """The data files and the episodes files, filled in step, each closed when it is full.

    num_episodes, num_frames: how many were added; totals: their statistics, of these features; files: names of the
    files that are written.
    """

    def __init__(self, root: Path, features: Iterable[str]):
        self.root = root
        self.num_episodes = self.num_frames = 0
        self.totals = Totals(features)
        self.files: list[str] = []
        self._frames: list[pa.Table] = []
        self._episodes: list[pa.Table] = []
        self._num_rows = self._data_file = self._episode_file = 0

    def add(self, frames: pa.Table, episodes: pa.Table) -> None:
        """Adds episodes: the rows of their frames, one episode after another, and their rows of metadata.

        What depends on the episodes before is written here: RENUMBERED and their statistics, dataset_from_index,
        dataset_to_index, and the files that the rows are in. Columns that are there keep their places.
        """
        lengths_E = as_numpy(episodes["length"])
        episode = row = 0
        while episode < len(lengths_E):
            waiting = sum(map(len, self._episodes))
            if waiting >= EPISODES_PER_FILE:
                self._write_episodes()
                continue
            ends = np.cumsum(lengths_E[episode : episode + EPISODES_PER_FILE - waiting])
            fit = int(np.searchsorted(ends, ROWS_PER_FILE - self._num_rows, side="right"))
            if not fit and self._num_rows:
                self._write_frames()
                continue
            fit = max(1, fit)
            num_rows = int(ends[fit - 1])
            self._place(frames[row : row + num_rows], episodes[episode : episode + fit])
            episode, row = episode + fit, row + num_rows

    def close(self) -> None:
        """Writes the rest."""
        self._write_frames()
        self._write_episodes()

    def _place(self, frames: pa.Table, episodes: pa.Table) -> None:
        lengths_E = as_numpy(episodes["length"]).astype(np.int64)
        numbers_E = self.num_episodes + np.arange(len(lengths_E))
        ends_E = self.num_frames + np.cumsum(lengths_E)
        new = {"episode_index": np.repeat(numbers_E, lengths_E), "index": self.num_frames + np.arange(len(frames))}
        frames = with_columns(frames, {name: pa.array(values) for name, values in new.items()})
        columns = {
            "episode_index": pa.array(numbers_E),
            "dataset_from_index": pa.array(ends_E - lengths_E),
            "dataset_to_index": pa.array(ends_E),
        }
        for name in RENUMBERED:
            for key, values in moments_by_episode(as_numpy(frames[name]), lengths_E).items():
                columns[f"stats/{name}/{key}"] = list_column(values)
        for folder, number in (("data", self._data_file), ("meta/episodes", self._episode_file)):
            columns |= {f"{folder}/{name}": pa.array(np.full(len(episodes), at)) for name, at in place(number).items()}
        self._frames.append(frames)
        self._episodes.append(with_columns(episodes, columns))
        self._num_rows += len(frames)
        self.num_episodes, self.num_frames = self.num_episodes + len(episodes), self.num_frames + len(frames)

    def _write_frames(self) -> None:
        self._write(DATA_PATH.format(**place(self._data_file)), pa.concat_tables(self._frames).combine_chunks())
        self._frames, self._num_rows = [], 0
        self._data_file += 1

    def _write_episodes(self) -> None:
        table = pa.concat_tables(self._episodes).combine_chunks()
        self.totals.add(table)
        self._write(EPISODES_PATH.format(**place(self._episode_file)), table)
        self._episodes = []
        self._episode_file += 1

    def _write(self, name: str, table: pa.Table) -> None:
        write_parquet(self.root / name, table)
        self.files.append(name)


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Returns the table with these columns, in the place of those of the same name, or else at the end."""
    for name, column in columns.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def write_tasks(path: Path, tasks: Sequence[str] | pa.Array) -> None:
    """Writes a table that pandas reads with the instructions as its index, as LeRobot's own reader expects."""
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    number = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **number},
            {"name": "task", "field_name": "task", **text},
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    # A piece of text columns holds two gigabytes at most.
    parts = [pa.array(tasks[at : at + TASKS_AT_ONCE], pa.string()) for at in range(0, len(tasks), TASKS_AT_ONCE)]
    table = pa.table({"task_index": pa.array(np.arange(len(tasks))), "task": pa.chunked_array(parts, pa.string())})
    write_parquet(path, table.replace_schema_metadata({"pandas": json.dumps(pandas)}))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table of a dataset, atomically; its pages have checksums."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
