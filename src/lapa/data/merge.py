"""Several datasets of the same cameras, rate and features as one; the videos stay as they are.

    lapa data merge A B C --out ALL

Video files are hard-linked; they are copied where the file system cannot, and on a store, where they do not leave
it if the datasets are on the same one. Episodes follow one another in the order of the
datasets, with numbers from 0; tables and statistics are written anew, and meta/info.json last, which makes the dataset
readable. So the parts of a source, converted one by one and merged, become the files of the source converted at once.
Labels are carried along where all datasets have them, of one latent action model and with the same settings.
Axes: N rows of a file, E episodes of it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lapa import config as configs
from lapa.checksums import each_sum, read_sums, sealed_line, sha256, write_marker
from lapa.config import differences
from lapa.console import finish, progress, say, warn
from lapa.data.config import MergeConfig
from lapa.data.dataset import ACTION, ACTION_SPACE, STATE, common_action_space, image_keys
from lapa.data.labels import (
    MANIFEST,
    NOTES,
    SHARDS,
    Manifest,
    ShardNotes,
    read_manifest,
    read_shard,
    shard_episodes,
    shard_notes,
    shard_path,
    write_manifest,
)
from lapa.data.lerobot import LeRobotDataset, require_folder
from lapa.data.metadata import (
    DATA_PATH,
    EXTRA,
    INFO,
    JOURNAL,
    SPAN,
    STATS,
    TASKS,
    VIDEO_PATH,
    episode_files,
)
from lapa.data.replace_actions import claim_rewrite, link_videos, report_links
from lapa.data.spec import open_dataset
from lapa.data.statistics import STATISTICS
from lapa.data.tables import as_numpy, integers, matrix, parsing, read_parquet, schema_of
from lapa.data.writer import CHUNK_SIZE, DIGEST, RENUMBERED, Tables, place, with_columns, write_parquet, write_tasks
from lapa.errors import UserError
from lapa.files import as_path, find_files, inside, write_json
from lapa.locks import locks_output

MERGE = "lapa data merge"
# What labels must share to be merged.
OF_LABELS = (
    *("lam_fingerprint", "camera", "horizon_seconds", "horizon_frames", "latent_length", "codebook_size"),
    *("embeddings", "precision", "min_motion"),
)


@locks_output
def run(config: MergeConfig) -> None:
    """`lapa data merge`. Raises UserError where datasets do not fit together, or `out` cannot be written."""
    out = as_path(config.out)
    datasets = [require_folder(open_dataset(data), stores=True) for data in config.data]
    _require_alike(datasets)
    space = common_action_space(datasets) if datasets[0].action_dim is not None else None
    notes = [{name: value for name, value in dataset.extra.items() if name != ACTION_SPACE} for dataset in datasets]
    merged = [{"fingerprint": dataset.fingerprint, **note} for dataset, note in zip(datasets, notes, strict=True)]
    extra = {"made_by": MERGE, "merged": merged, **(space.declared() if space else {})}
    if not (config.resume and not config.overwrite and (out / INFO).exists()):
        claim_rewrite(out, datasets, extra, overwrite=config.overwrite, resume=config.resume)
        merge(datasets, out, extra)
    configs.require_same(out / EXTRA, extra)
    merged_dataset = LeRobotDataset(out)
    carry_labels(datasets, merged_dataset)
    folder = shlex.quote(str(out))
    next_commands = [f"lapa data info {folder}", f"lapa latent train --data {folder} --out LAM"]
    finish(f"dataset of {len(merged_dataset)} episodes, from {len(datasets)} datasets", out, next_commands)


def merge(datasets: Sequence[LeRobotDataset], out: Path, extra: Mapping[str, Any]) -> None:
    """Writes the episodes of all datasets, which are alike, into `out`. extra: for meta/lapa.json."""
    first = datasets[0]
    features = _features(first)
    images = image_keys(features)
    tables = Tables(out, [*images, *(name for name in features if name not in images)])
    texts = pa.chunked_array([dataset.tasks.array for dataset in datasets], pa.large_string())
    tasks = texts.combine_chunks().dictionary_encode()
    numbers_of_tasks = np.split(as_numpy(tasks.indices), np.cumsum([len(dataset.tasks) for dataset in datasets])[:-1])
    schema, stored = _schema_of_episodes(datasets), dict[str, tuple[pa.DataType, Path]]()
    videos = _Videos(out, [dataset.root for dataset in datasets])
    with progress() as bar:
        task = bar.add_task("merging episodes", total=sum(map(len, datasets)), note="")
        for dataset, new_tasks in zip(datasets, numbers_of_tasks, strict=True):
            videos.begin(dataset)
            rows = _Rows(_episode_rows(dataset, schema))
            for path, episodes, frames in _frames(dataset, features, stored):
                numbers_N = integers(frames, "task_index", dataset.root)
                frames = with_columns(frames, {"task_index": _new_tasks(numbers_N, dataset, new_tasks, episodes, path)})
                columns = {"length": pa.array(dataset.lengths[episodes]), **videos.link(episodes)}
                tables.add(frames, with_columns(rows.take(episodes.stop - episodes.start), columns))
                bar.advance(task, episodes.stop - episodes.start)
    tables.close()
    videos.report()
    write_tasks(out / TASKS, tasks.dictionary)
    write_json(out / STATS, tables.totals.to_dict())
    write_json(out / EXTRA, dict(extra))
    info = {
        **first.info,
        "total_episodes": tables.num_episodes,
        "total_frames": tables.num_frames,
        "total_tasks": len(tasks.dictionary),
        "chunks_size": CHUNK_SIZE,
        "splits": {"train": f"0:{tables.num_episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }
    if any(dataset.info.get("robot_type") != first.info.get("robot_type") for dataset in datasets):
        info["robot_type"] = None
    write_marker(out, INFO, info, [TASKS, STATS, EXTRA, *tables.files], known=videos.sums())
    (out / JOURNAL).unlink(missing_ok=True)


def carry_labels(datasets: Sequence[LeRobotDataset], out: LeRobotDataset) -> None:
    """Writes the labels that all datasets have, as labels of the merged one; reports those that are left behind."""
    paths = [path for dataset in datasets for path in find_files(dataset.root / "labels", f"*/{MANIFEST}")]
    names = {path.parent.name for path in paths}
    for name in sorted(names):
        target = out.root / "labels" / name
        if (target / MANIFEST).exists():
            continue
        folders = [dataset.root / "labels" / name for dataset in datasets]
        if lacking := [folder for folder in folders if not (folder / MANIFEST).exists()]:
            warn(f"labels {name}: not merged, {lacking[0]} is missing or not finished")
            continue
        manifests = [read_manifest(folder) for folder in folders]
        kept = [{key: getattr(manifest, key) for key in OF_LABELS} for manifest in manifests]
        stale = [m.dataset_fingerprint != d.fingerprint for m, d in zip(manifests, datasets, strict=True)]
        changed = next((found for one in kept if (found := differences(kept[0], one))), None)
        if any(stale) or changed:
            why = f"{folders[stale.index(True)]} are of another dataset" if any(stale) else f"they differ: {changed}"
            warn(f"labels {name}: not merged, {why}")
            continue
        starts = list(accumulate(map(len, datasets), initial=0))
        for folder, start in zip(folders, starts, strict=False):
            _move_shards(folder, target, start)
        write_manifest(target, _merged_manifest(manifests, starts, out.fingerprint))
        say(f"labels {name}: merged")


def _move_shards(folder: Path, target: Path, start: int) -> None:
    """Writes the shards of labels again, with numbers of episodes that begin at `start`."""
    sums = read_sums(folder)
    for path in find_files(folder, SHARDS):
        table = read_shard(path, sha256=sums.get(path.name))
        notes, metadata = shard_notes(path, table), dict(table.schema.metadata or {})
        numbers = pa.array(as_numpy(table["episode_index"]) + start, pa.int64())
        table = table.set_column(table.column_names.index("episode_index"), "episode_index", numbers)
        if NOTES in metadata:
            moved = ShardNotes(notes.static_pairs, tuple(start + bad for bad in notes.bad_episodes))
            metadata[NOTES] = sealed_line(configs.to_dict(moved))[0]
        first, last = shard_episodes(path)
        write_parquet(shard_path(target, start + first, start + last), table.replace_schema_metadata(metadata))


def _merged_manifest(manifests: Sequence[Manifest], starts: Sequence[int], fingerprint: str) -> Manifest:
    rows = sum(manifest.num_rows for manifest in manifests)
    counts_LK = sum(np.array(manifest.code_usage) * manifest.num_rows for manifest in manifests)
    bad = [start + episode for one, start in zip(manifests, starts, strict=False) for episode in one.bad_episodes]
    summed = ("num_rows", "num_episodes", "skipped_episodes", "static_pairs")
    return dataclasses.replace(
        manifests[0],
        dataset_fingerprint=fingerprint,
        code_usage=(np.asarray(counts_LK) / max(rows, 1)).tolist(),
        bad_episodes=tuple(bad),
        **{name: sum(getattr(manifest, name) for manifest in manifests) for name in summed},
    )


class _Videos:
    """The video files of the merged dataset: each file of the datasets once, numbered for each camera."""

    def __init__(self, out: Path, roots: Sequence[Path]):
        self._out, self._roots = out, roots
        self._num_linked = self._num_copied = 0
        # By camera: the checksums that the files were written with, one after another; of what has none, zeros.
        self._digests: dict[str, bytearray] = {}

    def begin(self, dataset: LeRobotDataset) -> None:
        """Goes on with the next dataset."""
        self._dataset = dataset
        self._listed, self._passed = each_sum(dataset.root), dict[str, str]()
        # The number of each episode's file, and those episodes that are the first of theirs.
        self._files: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for camera in dataset.cameras:
            key = dataset.camera_key(camera)
            numbers_E = dataset.file_numbers(f"videos/{key}")
            firsts = np.flatnonzero(np.diff(np.maximum.accumulate(numbers_E), prepend=-1))
            before = len(self._digests.setdefault(key, bytearray())) // DIGEST
            self._files[camera] = before + numbers_E, firsts

    def link(self, episodes: slice) -> dict[str, pa.Array]:
        """Links or copies the files that these episodes are the first to need; returns columns of their metadata."""
        dataset, columns = self._dataset, dict[str, pa.Array]()
        for camera, (numbers_E, firsts) in self._files.items():
            key = dataset.camera_key(camera)
            for name, values in place(numbers_E[episodes]).items():
                columns[f"videos/{key}/{name}"] = pa.array(values)
            if dataset.num_left_out:
                # Without the others, an episode can no longer be found by counting frames.
                spans_E2 = np.array([dataset.span_in_video(its, camera) for its in range(len(dataset))[episodes]])
                columns |= {f"videos/{key}/{name}": pa.array(spans_E2[:, at]) for at, name in enumerate(SPAN)}
            new = firsts[slice(*np.searchsorted(firsts, (episodes.start, episodes.stop)))].tolist()
            if not new:
                continue
            # No link may lead out of the folder.
            inside(self._out, self._name(key, int(numbers_E[new[0]])), written=True)
            pairs = (
                (dataset.video_path(episode, camera), self._out / self._name(key, int(numbers_E[episode])))
                for episode in new
            )
            linked, copied = link_videos(pairs, self._roots)
            self._num_linked, self._num_copied = self._num_linked + linked, self._num_copied + copied
            for episode in new:
                self._digests[key] += self._digest(dataset.video_path(episode, camera))
        return columns

    def report(self) -> None:
        report_links(self._num_linked, self._num_copied)

    def sums(self) -> Iterator[tuple[str, str]]:
        """Yields name and checksum of each file."""
        for key, digests in self._digests.items():
            for number in range(len(digests) // DIGEST):
                name, digest = self._name(key, number), digests[DIGEST * number : DIGEST * (number + 1)]
                yield name, digest.hex() if any(digest) else sha256(self._out / name)

    def _name(self, key: str, number: int) -> str:
        return VIDEO_PATH.format(video_key=key, **place(number))

    def _digest(self, path: Path) -> bytes:
        """Returns the checksum of a file of the dataset, by its list: mostly the next one there."""
        name = path.relative_to(self._dataset.root).as_posix()
        while name not in self._passed and (listed := next(self._listed, None)):
            if listed[0].startswith("videos/"):
                self._passed[listed[0]] = listed[1]
        try:
            return bytes.fromhex(self._passed.pop(name, "")).rjust(DIGEST, b"\0")
        except ValueError:
            return bytes(DIGEST)


def _require_alike(datasets: Sequence[LeRobotDataset]) -> None:
    if len(datasets) < 2:
        named = f"{datasets[0].root}: is one dataset" if datasets else "no dataset is named"
        raise UserError(f"{named}; name two or more to merge")
    first, roots = datasets[0], [dataset.root.resolve() for dataset in datasets]
    for number, dataset in enumerate(datasets):
        if roots[number] in roots[:number]:
            raise UserError(f"{dataset.root}: is named twice; name each dataset once")
        if changed := differences(_described(first), _described(dataset)):
            raise UserError(
                f"{dataset.root}: differs from {first.root} ({'; '.join(changed[:4])}); merge datasets of the same "
                "cameras, rate and features, or convert one like the other"
            )


def _described(dataset: LeRobotDataset) -> dict[str, Any]:
    features = {
        name: {key: feature.get(key) for key in ("dtype", "shape", "names")}
        for name, feature in _features(dataset).items()
    }
    return {"fps": dataset.fps, "features": features}


def _features(dataset: LeRobotDataset) -> dict[str, Any]:
    """Returns the features without depth maps, which are no cameras."""
    cameras = {dataset.camera_key(camera) for camera in dataset.cameras}
    return {
        name: feature
        for name, feature in dataset.info["features"].items()
        if name in cameras or feature["dtype"] not in ("video", "image")
    }


def _schema_of_episodes(datasets: Sequence[LeRobotDataset]) -> pa.Schema:
    """Returns the columns of the metadata of episodes that are kept. Raises UserError where types do not fit."""
    schema = pa.schema([])
    for path in (path for dataset in datasets for path in episode_files(dataset.root)):
        with parsing(path):
            schema = pa.unify_schemas([schema, _plain_schema(schema_of(path))], promote_options="permissive")
    kept = tuple(f"videos/{datasets[0].camera_key(camera)}/" for camera in datasets[0].cameras)
    # Of columns that are written anew, there are no other statistics.
    gone = tuple(f"stats/{name}/" for name in RENUMBERED)
    return pa.schema(
        field
        for field in schema
        if (not field.name.startswith("videos/") or field.name.startswith(kept))
        and (not field.name.startswith(gone) or field.name.rpartition("/")[2] in STATISTICS)
    )


def _episode_rows(dataset: LeRobotDataset, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields the metadata of the episodes of `dataset`, in their order; null where a file lacks a column."""
    spans = []
    for path in episode_files(dataset.root):
        numbers_N = integers(read_parquet(path, ["episode_index"]), "episode_index", path)
        if len(numbers_N):
            spans.append((int(numbers_N.min()), int(numbers_N.max()), path))
    end, together = -1, list[Path]()
    # Files are mostly in order; those that are not are sorted together.
    for first, last, path in sorted(spans):
        if first > end and together:
            yield _sorted_rows(dataset, together, schema)
            together = []
        together, end = [*together, path], max(end, last)
    yield _sorted_rows(dataset, together, schema)


def _sorted_rows(dataset: LeRobotDataset, paths: Sequence[Path], schema: pa.Schema) -> pa.Table:
    parts = []
    for path in paths:
        with parsing(path):
            table = read_parquet(path).replace_schema_metadata(None)
            present = [field for field in schema if field.name in table.column_names]
            table = table.select([field.name for field in present]).cast(pa.schema(present))
            lacking = [field for field in schema if field.name not in table.column_names]
            table = with_columns(table, {field.name: pa.nulls(len(table), field.type) for field in lacking})
            numbers_N = integers(table, "episode_index", path)
            places = np.searchsorted(dataset.numbers, numbers_N).clip(max=len(dataset) - 1)
            parts.append(table.filter(pa.array(dataset.numbers[places] == numbers_N)).select(schema.names))
    return pa.concat_tables(parts).sort_by("episode_index")


class _Rows:
    """Rows of tables that follow one another, taken some at a time."""

    def __init__(self, tables: Iterator[pa.Table]):
        self._tables = tables
        self._left: list[pa.Table] = []

    def take(self, num: int) -> pa.Table:
        while sum(map(len, self._left)) < num:
            self._left.append(next(self._tables))
        table = pa.concat_tables(self._left)
        self._left = [table[num:]]
        return table[:num]


def _frames(
    dataset: LeRobotDataset, features: Mapping[str, Any], stored: dict[str, tuple[pa.DataType, Path]]
) -> Iterator[tuple[Path, slice, pa.Table]]:
    """Yields data files, the episodes that are there, as far as they follow one another, and the rows of these.

    stored: how the first file of all stores each feature, and that file.
    Raises UserError where a file stores one otherwise, and for an action or state that is not there.
    """
    wanted = [name for name, feature in features.items() if feature["dtype"] != "video"]
    numbers = {name: dataset.action_dim if name == ACTION else dataset.state_dim for name in (ACTION, STATE)}
    starts = np.flatnonzero(np.diff(dataset.file_numbers("data"), prepend=-1)).tolist()
    for start, stop in pairwise([*starts, len(dataset)]):
        path, episodes = dataset.data_path(start), range(start, stop)
        # LeRobot's notes there describe columns that may be gone.
        table = read_parquet(path, wanted).replace_schema_metadata(None)
        table = table.cast(_plain_schema(table.schema))
        for field in table.schema:
            kind, first = stored.setdefault(field.name, (field.type, path))
            if field.type != kind:
                raise UserError(
                    f"{path}: {field.name} is stored as {field.type}, in {first} as {kind}; write one dataset again "
                    "with `lapa data lerobot`"
                )
        firsts_E, lengths_E = np.array([dataset.rows(its).start for its in episodes]), dataset.lengths[start:stop]
        before_E = np.cumsum(lengths_E) - lengths_E
        if (firsts_E == firsts_E[0] + before_E).all():
            table = table[int(firsts_E[0]) : int(firsts_E[0] + lengths_E.sum())]
        else:
            table = table.take(pa.array(np.arange(lengths_E.sum()) + np.repeat(firsts_E - before_E, lengths_E)))
        table = table.select(list(stored))
        for name in numbers.keys() & stored.keys():
            _require_matrix(table[name], numbers[name] or 0, lengths_E, f"{path}: {name}", dataset.numbers[start:stop])
        yield path, slice(start, stop), table


def _require_matrix(
    column: pa.ChunkedArray, width: int, lengths_E: np.ndarray, source: str, numbers_E: np.ndarray
) -> None:
    """Raises UserError where the rows of episodes are not of this width, with the episode."""
    try:
        matrix(column, width, source)
    except UserError:
        for start, length, number in zip(np.cumsum(lengths_E) - lengths_E, lengths_E, numbers_E, strict=True):
            matrix(column[int(start) : int(start + length)], width, f"{source} of episode {number}")
        raise


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """Returns the types with the name that made lists give their values: read ones have another, and files keep it."""
    return pa.schema([field.with_type(_plain(field.type)) for field in schema])


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    return pa.list_(_plain(kind.value_type)) if pa.types.is_list(kind) else kind


def _new_tasks(
    numbers_N: np.ndarray, dataset: LeRobotDataset, new_tasks: np.ndarray, episodes: slice, path: Path
) -> pa.Array:
    """Returns the numbers of tasks in the merged dataset, for the rows of these episodes."""
    known = dataset.tasks.numbers_N
    places_N = np.searchsorted(known, numbers_N).clip(max=max(0, len(known) - 1))
    wrong_N = known[places_N] != numbers_N if len(known) else np.ones(len(numbers_N), bool)
    if wrong_N.any():
        row = int(wrong_N.argmax())
        episode = episodes.start + int(np.searchsorted(np.cumsum(dataset.lengths[episodes]), row, side="right"))
        raise UserError(
            f"{path}: episode {dataset.numbers[episode]}: has the task {numbers_N[row]}, which is not in {TASKS}; "
            "write the dataset again"
        )
    return pa.array(new_tasks[places_N].astype(np.int64))
