"""The same videos with other actions, or with none, as a new dataset.

    lapa data hide-actions DATASET --out VIDEOS

Video files are hard-linked (copied where the file system cannot); images, instructions and the layout of the files stay
as they are. Numbers are written anew: data, statistics, and meta/info.json last, which makes the dataset readable.
Statistics that cannot be merged from those of the episodes (quantiles, or where an episode has none) are left out.

Axes: T time, A action dimensions.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lapa import config as configs
from lapa.checksums import read_sums, write_marker
from lapa.console import finish, say
from lapa.data.config import HideActionsConfig
from lapa.data.dataset import ACTION, STATE, ActionSpace, image_keys, require_finite
from lapa.data.lerobot import LeRobotDataset, require_folder
from lapa.data.metadata import EXTRA, INFO, JOURNAL, STATS, TASKS, episode_files
from lapa.data.spec import open_dataset
from lapa.data.statistics import Totals, moments_of
from lapa.data.tables import parsing, read_parquet
from lapa.data.video import probe
from lapa.data.writer import FRAME_COLUMNS, REQUESTS, feature_column, write_parquet
from lapa.errors import UserError
from lapa.files import (
    atomic_path,
    claim_output,
    copy_file,
    inside,
    is_remote,
    partial_path,
    read_json_lines,
    reading,
    write_json,
)
from lapa.locks import locks_output

NO_ACTIONS = "lapa data hide-actions"
# The columns that are written anew.
CHANGED = (ACTION, "episode_index", "index")


@locks_output
def run(config: HideActionsConfig) -> None:
    """`lapa data hide-actions`. Raises UserError where `out` is, contains or is inside the dataset."""
    dataset = require_folder(open_dataset(config.data))
    note = {"made_by": NO_ACTIONS, "source_fingerprint": dataset.fingerprint}
    next_commands = [f"lapa latent train --data {shlex.quote(str(config.out))} --out LAM"]
    if config.resume and not config.overwrite and (config.out / INFO).exists():
        configs.require_same(config.out / EXTRA, note)
        finish("dataset without actions, already complete", config.out, next_commands)
        return
    claim_rewrite(config.out, [dataset], note, overwrite=config.overwrite, resume=config.resume)
    written = rewrite_actions(dataset, config.out, actions=None, action_space=None, keep_states=False, note=note)
    finish(f"dataset of {len(written)} episodes without actions", config.out, next_commands)


def claim_rewrite(
    out: Path,
    datasets: Sequence[LeRobotDataset],
    note: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    inputs: Sequence[Path] = (),
) -> None:
    """Makes `out` ready for what is made of datasets under this note, or raises UserError with the reason.

    The caller accepts a finished dataset that is to be resumed; an unfinished one is begun again here.
    inputs: further files that the command reads.
    """
    for dataset in datasets:
        if is_remote(out) == is_remote(dataset.root) and out.resolve().is_relative_to(dataset.root.resolve()):
            raise UserError(f"{out}: is or lies inside {dataset.root}, which this command reads; give another --out")
    inputs = [*(dataset.root for dataset in datasets), *inputs]
    with reading(out):
        complete = (out / INFO).exists()
    claim_output(out, complete=complete, overwrite=overwrite, resume=resume, inputs=inputs)
    journal = inside(out, JOURNAL, written=True)
    if (begun := read_json_lines(journal)) and begun[0] != note:
        raise UserError(f"{out}: was begun with other settings; --overwrite to start anew")
    with atomic_path(journal) as temporary:
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
    targets = _targets(dataset, out)
    rows, num_frames = _write_data(dataset, targets, actions, action_space, [*kept_features, *FRAME_COLUMNS])
    num_lost = len(dataset) - len(rows)
    if not rows:
        raise UserError(f"{dataset.root}: every one of its {num_lost} episodes is left out; nothing is left to write")
    if num_lost:
        say(f"{num_lost} of {len(dataset)} episodes left out: they have no actions")
        # Without the others, an episode can no longer be found by counting frames.
        for (episode, change), camera in product(rows.items(), dataset.cameras):
            kind, span = f"videos/{dataset.camera_key(camera)}", dataset.span_in_video(episode, camera)
            change |= {f"{kind}/from_timestamp": span[0], f"{kind}/to_timestamp": span[1]}
    paths = {dataset.video_path(episode, camera) for episode in rows for camera in dataset.cameras}
    report_links(*link_videos(((path, targets[path]) for path in sorted(paths)), [dataset.root]))
    videos = {path.relative_to(dataset.root).as_posix() for path in paths}
    changes = {int(dataset.numbers[episode]): change for episode, change in rows.items()}
    totals = _write_episodes(dataset, targets, changes, list(features))
    with atomic_path(out / TASKS) as temporary:
        shutil.copyfile(dataset.root / TASKS, temporary)
    write_json(out / STATS, totals)
    declared = action_space.declared() if action_space else {}
    write_json(out / EXTRA, {**note, "source": dict(dataset.extra), **declared})
    info = {**dataset.info, "features": features, "total_episodes": len(rows), "total_frames": num_frames}
    if num_lost or "splits" not in info:
        info["splits"] = {"train": f"0:{len(rows)}"}
    names = {path.relative_to(out).as_posix() for path in targets.values() if path.exists()} - {INFO, JOURNAL}
    # Videos are the same files, whose checksums are those that they were written with.
    known = {name: digest for name, digest in read_sums(dataset.root).items() if name in names and name in videos}
    write_marker(out, INFO, info, names - set(known), known.items())
    (out / JOURNAL).unlink(missing_ok=True)
    return LeRobotDataset(out)


def _targets(dataset: LeRobotDataset, out: Path) -> dict[Path, Path]:
    """Returns the place in `out` of each file of the dataset.

    Raises UserError where that is outside `out`, through a link, or is the place of two files.
    """
    episodes, root = range(len(dataset)), dataset.root
    kinds: list[set[Path]] = [
        {dataset.data_path(episode) for episode in episodes},
        {dataset.video_path(episode, camera) for episode in episodes for camera in dataset.cameras},
        set(episode_files(root)),
        {root / name for name in (TASKS, STATS, EXTRA, INFO, JOURNAL)},
    ]
    targets = {path: inside(out, path.relative_to(root).as_posix(), written=True) for kind in kinds for path in kind}
    if len(targets) < sum(map(len, kinds)):
        raise UserError(f"{root / INFO}: data_path or video_path names a file of another kind; write the dataset again")
    return targets


def _features(dataset: LeRobotDataset, space: ActionSpace | None, kept: Sequence[str]) -> dict[str, Any]:
    """Returns the features of the new dataset for meta/info.json."""
    action = {ACTION: {"dtype": "float32", "shape": [space.action_dim], "names": list(space.names)}} if space else {}
    wanted = {*image_keys(dataset.features), *kept, *FRAME_COLUMNS}
    return {**action, **{name: feature for name, feature in dataset.features.items() if name in wanted}}


def _write_data(
    dataset: LeRobotDataset,
    targets: Mapping[Path, Path],
    actions: Callable[[int], np.ndarray | None] | None,
    space: ActionSpace | None,
    columns: Sequence[str],
) -> tuple[dict[int, dict[str, Any]], int]:
    """Writes the data files, each under its old name, without the rows of episodes that are left out.

    Returns what changes in the metadata row of each episode that is kept, by its number in the source, and the number
    of frames.
    """
    rows: dict[int, dict[str, Any]] = {}
    num_frames = 0
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
                if actions_TA.shape != (expected := (length, space.action_dim)):
                    raise UserError(f"episode {episode}: actions are {actions_TA.shape}, expected {expected}")
                require_finite(actions_TA, f"episode {episode}: action", "; leave the episode out")
                actions_TA = np.ascontiguousarray(actions_TA, dtype=np.float32)
            new = {"episode_index": np.full(length, len(rows)), "index": num_frames + np.arange(length)}
            parts.append(_renumbered(table[span], new, actions_TA))
            columns_TD = {name: values[:, None] for name, values in new.items()}
            columns_TD |= {} if actions_TA is None else {ACTION: actions_TA}
            stats = {name: moments_of(values) for name, values in columns_TD.items()}
            rows[episode] = {
                "episode_index": len(rows),
                "dataset_from_index": num_frames,
                "dataset_to_index": num_frames + length,
                **{f"stats/{name}/{key}": value for name, its in stats.items() for key, value in its.items()},
            }
            num_frames += length
        if parts:
            write_parquet(targets[path], pa.concat_tables(parts))
    return rows, num_frames


def _renumbered(table: pa.Table, new: Mapping[str, np.ndarray], actions_TA: np.ndarray | None) -> pa.Table:
    """Returns the rows of one episode with new indices, and with its actions."""
    # LeRobot's notes there describe columns that are gone.
    table = table.replace_schema_metadata(None)
    for name, values in new.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, pa.int64()))
    return table if actions_TA is None else table.add_column(0, ACTION, feature_column(actions_TA))


def _write_episodes(
    dataset: LeRobotDataset,
    targets: Mapping[Path, Path],
    changes: Mapping[int, dict[str, Any]],
    features: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Writes the tables of episodes, under their old names; returns the statistics of the whole dataset."""
    # Statistics of columns that are gone, or written anew, are not kept.
    gone = tuple(f"stats/{name}/" for name in {*dataset.features, *CHANGED} if name in CHANGED or name not in features)
    totals = Totals(features)
    for path in episode_files(dataset.root):
        table = read_parquet(path)
        kept = pc.is_in(table["episode_index"], pa.array(list(changes), table["episode_index"].type))
        with parsing(path):
            known = table.filter(kept).sort_by("episode_index").to_pylist()
        rows = []
        for row in known:
            new = changes[int(row["episode_index"])]
            rows.append({name: value for name, value in row.items() if name in new or not name.startswith(gone)} | new)
        if rows:
            written = pa.Table.from_pylist(rows)
            totals.add(written)
            write_parquet(targets[path], written)
    return totals.to_dict()


def link_videos(pairs: Iterable[tuple[Path, Path]], roots: Sequence[Path]) -> tuple[int, int]:
    """Links video files to their places in a new dataset, or copies them: on stores, or where the file system cannot.

    pairs: each file and its place; roots: the folders of the datasets that they are of.
    Returns how many files were linked, and how many copied.
    """
    folders = [root.resolve() for root in roots if not is_remote(root)]
    num_linked = num_copied = 0
    remote: list[tuple[Path, Path]] = []
    for path, target in pairs:
        if is_remote(path) or is_remote(target):
            remote.append((path, target))
            continue
        source = Path(os.path.realpath(path))
        if not any(source.is_relative_to(folder) for folder in folders):
            # A link of the hub's cache, or to any file: what is no video is not taken along.
            probe(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = partial_path(target)
        try:
            os.link(source, temporary)
            temporary.replace(target)
            num_linked += 1
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; write the dataset again") from None
        except OSError:
            copy_file(path, target)
            num_copied += 1
        finally:
            # Also after success: a link that replaces one to the same file stays.
            temporary.unlink(missing_ok=True)
    with ThreadPoolExecutor(REQUESTS) as threads:
        num_copied += len(list(threads.map(lambda pair: copy_file(*pair), remote)))
    return num_linked, num_copied


def report_links(num_linked: int, num_copied: int) -> None:
    say(f"videos: {num_linked} files linked, {num_copied} copied")
