"""The tables of a dataset folder, as `lapa.data.writer` writes them in the end: frames, episodes, tasks, statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lapa.data.lerobot import DATA_PATH, EPISODES_PATH
from lapa.data.statistics import Moments
from lapa.files import atomic_path

CHUNK_SIZE = 1000  # Files per chunk folder, LeRobot's default.
ROWS_PER_FILE = 500_000  # Of a data parquet: some tens of MB.
EPISODES_PER_GROUP = 1000  # Rows of metadata held in memory at once.
FRAME_COLUMNS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


class Tables:
    """The data files and the episodes files, filled in step, each closed when it is full."""

    def __init__(self, root: Path, schema: pa.Schema):
        self.root, self.schema = root, schema
        # A table of a few rows takes as much memory as one of a thousand, so they are merged now and then.
        self.small: list[pa.Table] = []
        self.frames: list[pa.Table] = []
        self.rows: list[dict[str, Any]] = []
        self.num_rows = self.data_file = self.episode_file = 0

    def add(self, frames: pa.Table, row: dict[str, Any]) -> None:
        """Takes an episode: its frames, and what is known of it."""
        if self.num_rows and self.num_rows + len(frames) > ROWS_PER_FILE:
            self._write_frames()
        if len(self.rows) >= EPISODES_PER_GROUP:
            self._write_episodes()
        here = {"data/chunk_index": self.data_file // CHUNK_SIZE, "data/file_index": self.data_file % CHUNK_SIZE}
        meta = {"meta/episodes/chunk_index": self.episode_file // CHUNK_SIZE}
        meta["meta/episodes/file_index"] = self.episode_file % CHUNK_SIZE
        self.small.append(frames)
        if len(self.small) >= EPISODES_PER_GROUP:
            self._merge()
        self.rows.append({**row, **here, **meta})
        self.num_rows += len(frames)

    def close(self) -> None:
        """Writes what is left."""
        self._write_frames()
        self._write_episodes()

    def _merge(self) -> None:
        if self.small:
            self.frames.append(pa.concat_tables(self.small).combine_chunks())
            self.small = []

    def _write_frames(self) -> None:
        self._merge()
        path = DATA_PATH.format(chunk_index=self.data_file // CHUNK_SIZE, file_index=self.data_file % CHUNK_SIZE)
        with atomic_path(self.root / path) as temporary:
            pq.write_table(pa.concat_tables(self.frames), temporary)
        self.frames, self.num_rows = [], 0
        self.data_file += 1

    def _write_episodes(self) -> None:
        chunk, number = divmod(self.episode_file, CHUNK_SIZE)
        with atomic_path(self.root / EPISODES_PATH.format(chunk_index=chunk, file_index=number)) as temporary:
            pq.write_table(pa.Table.from_pylist(self.rows), temporary)
        self.rows = []
        self.episode_file += 1


def frame_stats(length: int, episode: int, first: int, task: int, fps: float) -> dict[str, dict[str, list[float]]]:
    """Statistics of the columns that every dataset has."""
    steps = np.arange(length, dtype=np.float64)
    columns = {
        "timestamp": steps / fps,
        "frame_index": steps,
        "episode_index": np.full(length, episode),
        "index": first + steps,
        "task_index": np.full(length, task),
    }
    stats = {}
    for name, values in columns.items():
        moments = Moments()
        moments.add(values[:, None])
        stats[name] = moments.to_dict()
    return stats


def shaped(values: dict[str, list[float]], image: bool) -> dict[str, Any]:
    """Statistics as LeRobot shapes them: those of pictures are [3, 1, 1], so that they broadcast over C H W."""
    if not image:
        return values
    return {name: value if name == "count" else [[[item]] for item in value] for name, value in values.items()}


def write_tasks(path: Path, tasks: list[str]) -> None:
    """A table that pandas reads with the instructions as its index, as LeRobot's own reader expects."""
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
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), temporary)
