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
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapa import config as configs
from lapa.checksums import read_sums, sealed_line, sums_of, write_marker
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
    EPISODES,
    EXTRA,
    INFO,
    JOURNAL,
    STATS,
    TASKS,
    VIDEO_PATH,
    episode_files,
    read_tasks,
)
from lapa.data.replace_actions import Totals, claim_rewrite, link_videos
from lapa.data.spec import open_dataset
from lapa.data.tables import as_numpy, integers, matrix, parsing, read_parquet, schema_of
from lapa.data.writer import CHUNK_SIZE, EPISODES_PER_GROUP, Tables, moments_of, place, write_parquet, write_tasks
from lapa.errors import UserError
from lapa.files import as_path, find_files, inside, write_json
from lapa.locks import locks_output

MERGE = "lapa data merge"
# Columns that are written anew; statistics of these are, too.
RENUMBERED = ("episode_index", "index", "task_index")
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
    tasks: dict[str, int] = {}
    totals = Totals([*image_keys(features), *(name for name in features if name not in image_keys(features))])
    columns = _columns_of_episodes(datasets)
    tables, videos, stored = Tables(out), _Videos(out), dict[str, tuple[pa.DataType, Path]]()
    num_episodes = num_frames = 0
    with progress() as bar:
        task = bar.add_task("merging episodes", total=sum(map(len, datasets)), note="")
        for dataset in datasets:
            for text in dataset.tasks:
                tasks.setdefault(text, len(tasks))
            task_of = {number: tasks[text] for number, text in read_tasks(dataset.root, legacy=False).items()}
            episodes = zip(_episode_rows(dataset, columns), _frames(dataset, features, stored), strict=True)
            for episode, (noted, frames) in enumerate(episodes):
                length = len(frames)
                there = f"{dataset.data_path(episode)}: episode {dataset.numbers[episode]}"
                renumbered = {
                    "episode_index": np.full(length, num_episodes),
                    "index": num_frames + np.arange(length),
                    "task_index": _new_tasks(integers(frames, "task_index", dataset.root), task_of, there),
                }
                for name, values in renumbered.items():
                    frames = frames.set_column(frames.column_names.index(name), name, pa.array(values, pa.int64()))
                row = _renumbered(dict.fromkeys(columns) | noted, renumbered, num_episodes, num_frames)
                for camera in dataset.cameras:
                    chunk = videos.place(dataset, episode, camera)
                    kind = f"videos/{dataset.camera_key(camera)}"
                    row |= {f"{kind}/{name}": number for name, number in chunk.items()}
                    if dataset.num_left_out:
                        # Without the others, an episode can no longer be found by counting frames.
                        span = dataset.span_in_video(episode, camera)
                        row |= {f"{kind}/from_timestamp": span[0], f"{kind}/to_timestamp": span[1]}
                totals.add(row)
                tables.add(frames, row)
                num_episodes, num_frames = num_episodes + 1, num_frames + length
                bar.advance(task)
    tables.close()
    sums = videos.link([dataset.root for dataset in datasets])
    write_tasks(out / TASKS, list(tasks))
    write_json(out / STATS, totals.to_dict())
    write_json(out / EXTRA, dict(extra))
    info = {
        **first.info,
        "total_episodes": num_episodes,
        "total_frames": num_frames,
        "total_tasks": len(tasks),
        "chunks_size": CHUNK_SIZE,
        "splits": {"train": f"0:{num_episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }
    if any(dataset.info.get("robot_type") != first.info.get("robot_type") for dataset in datasets):
        info["robot_type"] = None
    write_marker(out, INFO, info, [TASKS, STATS, EXTRA, *tables.files], known=sums)
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

    def __init__(self, out: Path):
        self.out = out
        self._targets: dict[Path, Path] = {}
        self._places: dict[Path, dict[str, int]] = {}
        self._num_of: dict[str, int] = {}
        self._sums: dict[str, str] = {}
        self._sums_of: dict[Path, dict[str, str]] = {}

    def place(self, dataset: LeRobotDataset, episode: int, camera: str) -> dict[str, int]:
        """Returns chunk and number of the file that an episode's video will be in."""
        path, key = dataset.video_path(episode, camera), dataset.camera_key(camera)
        if path not in self._places:
            number = self._num_of.get(key, 0)
            self._num_of[key] = number + 1
            self._places[path] = place(number)
            name = VIDEO_PATH.format(video_key=key, **self._places[path])
            self._targets[path] = inside(self.out, name, written=True)
            if dataset.root not in self._sums_of:
                self._sums_of[dataset.root] = read_sums(dataset.root)
            self._sums[name] = self._sums_of[dataset.root].get(path.relative_to(dataset.root).as_posix(), "")
        return self._places[path]

    def link(self, roots: Sequence[Path]) -> dict[str, str]:
        """Links or copies the files, which are those of datasets in `roots`; returns their checksums by name.

        These are those they were written with, where known.
        """
        link_videos(self._targets, roots)
        return self._sums | sums_of(self.out, [name for name, digest in self._sums.items() if not digest])


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


def _columns_of_episodes(datasets: Sequence[LeRobotDataset]) -> list[str]:
    """Returns the columns of the metadata of episodes that are kept. Raises UserError where types do not fit."""
    schema = pa.schema([])
    for path in (path for dataset in datasets for path in episode_files(dataset.root)):
        with parsing(path):
            schema = pa.unify_schemas([schema, schema_of(path)], promote_options="permissive")
    kept = tuple(f"videos/{datasets[0].camera_key(camera)}/" for camera in datasets[0].cameras)
    return [name for name in schema.names if not name.startswith("videos/") or name.startswith(kept)]


def _episode_rows(dataset: LeRobotDataset, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the row of each episode of `dataset` in the metadata, in their order; None where a file lacks a column."""
    files = [read_parquet(path) for path in episode_files(dataset.root)]
    with parsing(dataset.root / EPISODES):
        chosen = [file.select([name for name in columns if name in file.column_names]) for file in files]
        table = pa.concat_tables(chosen, promote_options="permissive")
        table = table.filter(pc.is_in(table["episode_index"], pa.array(dataset.numbers, table["episode_index"].type)))
        batches = table.sort_by("episode_index").to_batches(max_chunksize=EPISODES_PER_GROUP)
    for batch in batches:
        with parsing(dataset.root / EPISODES):
            rows = batch.to_pylist()
        yield from rows


def _frames(
    dataset: LeRobotDataset, features: Mapping[str, Any], stored: dict[str, tuple[pa.DataType, Path]]
) -> Iterator[pa.Table]:
    """Yields the rows of each episode in the data files, in the order of the episodes.

    stored: how the first file of all stores each feature, and that file.
    Raises UserError where a file stores one otherwise, and for an action or state that is not there.
    """
    wanted = [name for name, feature in features.items() if feature["dtype"] != "video"]
    numbers = {name: dataset.action_dim if name == ACTION else dataset.state_dim for name in (ACTION, STATE)}
    for path, episodes in groupby(range(len(dataset)), key=dataset.data_path):
        # LeRobot's notes there describe columns that may be gone.
        table = read_parquet(path, wanted).replace_schema_metadata(None)
        # What is read from parquet has another name for the numbers of a list than what is made, and files keep it.
        table = table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema]))
        for field in table.schema:
            kind, first = stored.setdefault(field.name, (field.type, path))
            if field.type != kind:
                raise UserError(
                    f"{path}: {field.name} is stored as {field.type}, in {first} as {kind}; write one dataset again "
                    "with `lapa data lerobot`"
                )
        table = table.select(list(stored))
        for episode in episodes:
            frames = table[dataset.rows(episode)]
            for name in numbers.keys() & stored.keys():
                matrix(frames[name], numbers[name] or 0, f"{path}: {name} of episode {dataset.numbers[episode]}")
            yield frames


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.list_(kind.value_type, kind.list_size) if pa.types.is_fixed_size_list(kind) else kind


def _new_tasks(numbers_N: np.ndarray, task_of: Mapping[int, int], there: str) -> np.ndarray:
    """Returns the numbers of tasks in the merged dataset."""
    for number in np.unique(numbers_N).tolist():
        if number not in task_of:
            raise UserError(f"{there}: has the task {number}, which is not in {TASKS}; write the dataset again")
    return np.array([task_of[number] for number in numbers_N.tolist()], np.int64)


def _renumbered(
    row: dict[str, Any], columns: Mapping[str, np.ndarray], episode: int, first_frame: int
) -> dict[str, Any]:
    """Returns the row of an episode in the metadata under its new number, with the statistics of the new columns."""
    length = len(columns["index"])
    stats = {
        f"stats/{name}/{key}": value
        for name, values in columns.items()
        for key, value in moments_of(values[:, None]).items()
    }
    new = {
        "episode_index": episode,
        "dataset_from_index": first_frame,
        "dataset_to_index": first_frame + length,
        **stats,
    }
    gone = tuple(f"stats/{name}/" for name in RENUMBERED)
    return {name: value for name, value in row.items() if name in new or not name.startswith(gone)} | new
