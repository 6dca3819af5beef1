"""The same videos with other actions, or with none, as a new dataset.

    lapa data hide-actions DATASET --out VIDEOS

Video files are hard-linked (copied where the file system cannot); images, instructions and the layout of the files stay
as they are. Numbers are written anew: data, statistics, and meta/info.json last, which makes the dataset readable.
Statistics that cannot be merged from those of the episodes (quantiles) are left out.

Axes: T time, A action dimensions.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lapa import config as configs
from lapa.console import finish, say
from lapa.data.config import HideActionsConfig
from lapa.data.dataset import ACTION, STATE, ActionSpace, image_keys
from lapa.data.lerobot import (
    EXTRA,
    INFO,
    JOURNAL,
    STATS,
    TASKS,
    LeRobotDataset,
    episode_files,
    read_parquet,
    require_folder,
)
from lapa.data.spec import open_dataset
from lapa.data.writer import FRAME_COLUMNS, Moments, moments_of
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, read_json_lines, write_json

NO_ACTIONS = "lapa data hide-actions"
STATISTICS = ("min", "max", "mean", "std", "count")


def run(config: HideActionsConfig) -> None:
    """`lapa data hide-actions`. Raises UserError where `out` is, contains or is inside the dataset."""
    dataset = require_folder(open_dataset(config.data))
    note = {"made_by": NO_ACTIONS, "source_fingerprint": dataset.fingerprint}
    next_commands = [f"lapa latent train --data {shlex.quote(str(config.out))} --out LAM"]
    if config.resume and not config.overwrite and is_dataset(config.out):
        configs.require_same(config.out / EXTRA, note)
        finish("dataset without actions, already complete", config.out, next_commands)
        return
    claim_rewrite(config.out, dataset, note, overwrite=config.overwrite, resume=config.resume)
    written = rewrite_actions(dataset, config.out, actions=None, action_space=None, keep_states=False, note=note)
    finish(f"dataset of {len(written)} episodes without actions", config.out, next_commands)


def is_dataset(out: Path) -> bool:
    """Returns whether `out` holds a finished dataset."""
    return (out / INFO).exists()


def claim_rewrite(
    out: Path,
    dataset: LeRobotDataset,
    note: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    inputs: Sequence[Path] = (),
) -> None:
    """Makes `out` ready for `rewrite_actions` under this note, or raises UserError with the reason.

    The caller accepts a finished dataset that is to be resumed; an unfinished one is begun again here.
    inputs: further files that the command reads.
    """
    if out.resolve().is_relative_to(dataset.root.resolve()):
        raise UserError(f"{out}: is or lies inside {dataset.root}, which this command reads; give another --out")
    inputs = [dataset.root, *inputs]
    claim_output(out, complete=is_dataset(out), overwrite=overwrite, resume=resume, inputs=inputs)
    if (begun := read_json_lines(out / JOURNAL)) and begun[0] != note:
        raise UserError(f"{out}: was begun with other settings; --overwrite to start anew")
    with atomic_path(out / JOURNAL) as temporary:
        temporary.write_text(json.dumps(note, ensure_ascii=False) + "\n")


def rewrite_actions(
    dataset: LeRobotDataset,
    out: Path,
    *,
    actions: Callable[[int], np.ndarray | None] | None,
    action_space: ActionSpace | None,
    keep_states: bool,
    note: Mapping[str, Any],
) -> LeRobotDataset:
    """Writes the videos of `dataset` with these actions into `out`, which `claim_rewrite` has made ready.

    actions: returns the actions of an episode, [T, A] in the units of `action_space`; called once for each, in order.
        None leaves the episode out, which is counted and reported. Without `actions` the new dataset has none.
    note: goes into meta/lapa.json.
    Raises UserError where actions do not fit, or every episode is left out.
    """
    assert (actions is None) == (action_space is None), "actions come with their action space"
    kept_features = [STATE] if keep_states and STATE in dataset.features else []
    features = _features(dataset, action_space, kept_features)
    left_out = [name for name in dataset.features if name not in features]
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    numbering = _write_data(dataset, out, actions, action_space, [*kept_features, *FRAME_COLUMNS])
    num_episodes, num_lost = len(numbering.stats), len(dataset) - len(numbering.stats)
    if not num_episodes:
        raise UserError(f"{dataset.root}: every one of its {num_lost} episodes is left out; nothing is left to write")
    if num_lost:
        say(f"{num_lost} of {len(dataset)} episodes left out: they have no actions")
    _link_videos(dataset, out, sorted(numbering.stats))
    totals = _write_episodes(dataset, out, numbering, list(features))
    with atomic_path(out / TASKS) as temporary:
        shutil.copyfile(dataset.root / TASKS, temporary)
    write_json(out / STATS, totals)
    declared = action_space.declared() if action_space else {}
    write_json(out / EXTRA, {**note, "source": dict(dataset.extra), **declared})
    info = {**dataset.info, "features": features}
    info |= {"total_episodes": num_episodes, "total_frames": numbering.num_frames}
    if num_lost or "splits" not in info:
        info["splits"] = {"train": f"0:{num_episodes}"}
    write_json(out / INFO, info)
    (out / JOURNAL).unlink(missing_ok=True)
    return LeRobotDataset(out)


class _Numbering:
    """New numbers, first frames and statistics of the episodes that are kept, by their number in the source."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.firsts: dict[int, int] = {}
        self.stats: dict[int, dict[str, dict[str, list[float]]]] = {}
        self.num_frames = 0

    def keep(self, episode: int, length: int, actions_TA: np.ndarray | None) -> None:
        number, first = len(self.numbers), self.num_frames
        self.numbers[episode], self.firsts[episode] = number, first
        self.num_frames += length
        columns = {"episode_index": np.full((length, 1), number), "index": first + np.arange(length)[:, None]}
        if actions_TA is not None:
            columns[ACTION] = actions_TA
        self.stats[episode] = {name: moments_of(values) for name, values in columns.items()}


def _features(dataset: LeRobotDataset, space: ActionSpace | None, kept: Sequence[str]) -> dict[str, Any]:
    """Returns the features of the new dataset for meta/info.json."""
    action = {ACTION: {"dtype": "float32", "shape": [space.action_dim], "names": list(space.names)}} if space else {}
    wanted = {*image_keys(dataset.features), *kept, *FRAME_COLUMNS}
    return {**action, **{name: feature for name, feature in dataset.features.items() if name in wanted}}


def _write_data(
    dataset: LeRobotDataset,
    out: Path,
    actions: Callable[[int], np.ndarray | None] | None,
    space: ActionSpace | None,
    columns: Sequence[str],
) -> _Numbering:
    """Writes the data files, each under its old name, without the rows of episodes that are left out."""
    numbering = _Numbering()
    files: dict[Path, list[int]] = {}
    for episode in range(len(dataset)):
        files.setdefault(dataset.data_path(episode), []).append(episode)
    for path, episodes in files.items():
        table = read_parquet(path, list(columns))
        parts = []
        for episode in episodes:
            span, length = dataset.rows(episode), int(dataset.lengths[episode])
            actions_TA = None if actions is None else actions(episode)
            if actions is not None and actions_TA is None:
                continue
            if space is not None and actions_TA is not None:
                actions_TA = _checked(actions_TA, (length, space.action_dim), episode)
            numbering.keep(episode, length, actions_TA)
            parts.append(_renumbered(table[span], numbering, episode, actions_TA))
        if parts:
            with atomic_path(out / path.relative_to(dataset.root)) as temporary:
                pq.write_table(pa.concat_tables(parts), temporary)
    return numbering


def _renumbered(table: pa.Table, numbering: _Numbering, episode: int, actions_TA: np.ndarray | None) -> pa.Table:
    """Returns the rows of one episode under its new number, with its actions."""
    # LeRobot's notes there describe columns that are gone.
    table = table.replace_schema_metadata(None)
    new = {
        "episode_index": np.full(len(table), numbering.numbers[episode]),
        "index": numbering.firsts[episode] + np.arange(len(table)),
    }
    for name, values in new.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int64()))
    if actions_TA is None:
        return table
    flat = pa.array(actions_TA.reshape(-1))
    width = actions_TA.shape[1]
    # A feature of width 1 is a plain number in LeRobot's tables.
    return table.add_column(0, ACTION, pa.FixedSizeListArray.from_arrays(flat, width) if width > 1 else flat)


def _write_episodes(
    dataset: LeRobotDataset, out: Path, numbering: _Numbering, features: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Writes the tables of episodes, under their old names; returns the statistics of the whole dataset."""
    totals = {name: Moments() for name in features}
    shapes: dict[str, Any] = {}
    for path in episode_files(dataset.root):
        table = read_parquet(path)
        kept = pc.is_in(table["episode_index"], pa.array(list(numbering.numbers), table["episode_index"].type))
        table = table.filter(kept).sort_by("episode_index")
        rows = [_episode_row(row, numbering, features) for row in table.to_pylist()]
        for row, name in product(rows, features):
            values: dict[str, Any] = {key: row.get(f"stats/{name}/{key}") for key in STATISTICS}
            if all(value is not None for value in values.values()):
                shapes[name] = np.shape(values["mean"])
                totals[name].merge({key: np.ravel(value).tolist() for key, value in values.items()})
        if rows:
            with atomic_path(out / path.relative_to(dataset.root)) as temporary:
                pq.write_table(pa.Table.from_pylist(rows), temporary)
    return {
        name: {
            key: value if key == "count" else np.reshape(value, shapes[name]).tolist()
            for key, value in moments.to_dict().items()
        }
        for name, moments in totals.items()
        if moments.count
    }


def _episode_row(row: Mapping[str, Any], numbering: _Numbering, features: Sequence[str]) -> dict[str, Any]:
    """Returns the row of an episode that is kept: new numbers, and statistics of the new columns only."""
    episode = int(row["episode_index"])
    first, stats = numbering.firsts[episode], numbering.stats[episode]
    new: dict[str, Any] = {
        "episode_index": numbering.numbers[episode],
        "dataset_from_index": first,
        "dataset_to_index": first + int(row["length"]),
    }
    new |= {f"stats/{name}/{key}": value for name, values in stats.items() for key, value in values.items()}
    unchanged = set(features) - set(stats)
    kept = {
        name: value
        for name, value in row.items()
        if name in new or not name.startswith("stats/") or name.split("/")[1] in unchanged
    }
    return {**kept, **new}


def _link_videos(dataset: LeRobotDataset, out: Path, episodes: Sequence[int]) -> None:
    """Links every video file of the episodes, once."""
    paths = {dataset.video_path(episode, camera) for episode in episodes for camera in dataset.cameras}
    num_copied = 0
    for path in sorted(paths):
        target = out / path.relative_to(dataset.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path.resolve(), target)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; write the dataset again") from None
        except OSError:
            with atomic_path(target) as temporary:
                shutil.copyfile(path, temporary)
            num_copied += 1
    say(f"videos: {len(paths) - num_copied} files linked, {num_copied} copied")


def _checked(actions_TA: np.ndarray, shape: tuple[int, int], episode: int) -> np.ndarray:
    if actions_TA.shape != shape:
        raise UserError(f"episode {episode}: actions are {actions_TA.shape}, expected {shape}: one row a frame")
    if not np.isfinite(actions_TA).all():
        frame = int(np.argmin(np.isfinite(actions_TA).all(axis=1)))
        raise UserError(f"episode {episode}: actions are not finite at frame {frame}; leave the episode out")
    return np.ascontiguousarray(actions_TA, dtype=np.float32)
