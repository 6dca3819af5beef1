"""A labels folder in the making: which shards there are to be, which are missing, and the manifest of the whole.

Axes: T time, L latent action length, K codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc

from lapa.console import say, warn
from lapa.data.labels import SHARDS, Manifest, shard_notes, shard_path
from lapa.errors import UserError
from lapa.files import is_remote
from lapa.label.shards import Shard, Work, read_complete
from lapa.latent.config import LatentModelConfig


def make_shards(out: Path, num_episodes: int, size: int) -> list[Shard]:
    """All episodes, `size` to a shard."""
    ends = [(first, min(first + size, num_episodes) - 1) for first in range(0, num_episodes, size)]
    return [Shard(shard_path(out, first, last), first, last) for first, last in ends]


def missing_shards(shards: Sequence[Shard], out: Path, work: Work) -> list[Shard]:
    """The shards to make: those that are not there, or not whole."""
    there = {path.name for path in out.glob(SHARDS)}
    missing = []
    for shard in shards:
        if shard.path.name in there:
            try:
                read_complete(shard, work)
                continue
            except ValueError as error:
                warn(f"{str(error).partition(';')[0]}; it is made again")
        missing.append(shard)
    return missing


def make_manifest(shards: Sequence[Shard], work: Work, model: LatentModelConfig, identity: dict[str, Any]) -> Manifest:
    """Counts what the shards hold, reading them one by one. UserError where one is not whole, or none has a row."""
    lengths, length, size = work.dataset.lengths, model.latent_length, model.codebook_size
    counts_LK, num_rows, num_episodes, static, bad = np.zeros((length, size), np.int64), 0, 0, 0, list[int]()
    for shard in shards:
        table = read_complete(shard, work)
        codes_TL = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, length)
        for position in range(length):
            counts_LK[position] += np.bincount(codes_TL[:, position], minlength=size)
        num_rows += len(codes_TL)
        num_episodes += pc.count_distinct(table["episode_index"]).as_py()
        notes = shard_notes(table)
        static += notes.static_pairs
        bad += notes.bad_episodes
    if not num_rows:
        raise UserError(
            f"{work.dataset.root}: no pair is left to label: {static} of {work.num_pairs(range(len(lengths)))} are "
            f"static below --min-motion {work.min_motion:g}, {len(bad)} episodes cannot be read"
        )
    return Manifest(
        **identity,
        horizon_frames=work.horizon,
        latent_length=length,
        codebook_size=size,
        num_rows=num_rows,
        num_episodes=num_episodes,
        skipped_episodes=int((lengths <= work.horizon).sum()),
        code_usage=(counts_LK / num_rows).tolist(),
        static_pairs=static,
        bad_episodes=tuple(bad),
    )


def forget_listing(out: Path) -> None:
    """Before what other processes have written is read: clients of stores see no more than they listed."""
    if is_remote(out):
        cast(Any, out).fs.invalidate_cache()


def tell_left_out(manifest: Manifest) -> None:
    """Says what has no label, and why."""
    if manifest.skipped_episodes:
        say(f"{manifest.skipped_episodes} episodes skipped: not longer than the horizon")
    if manifest.static_pairs:
        all_pairs = manifest.num_rows + manifest.static_pairs
        say(f"{manifest.static_pairs} of {all_pairs} pairs left out: less than {manifest.min_motion:g} moves in them")
    if manifest.bad_episodes:
        named = ", ".join(map(str, manifest.bad_episodes[:10])) + ", ..." * (len(manifest.bad_episodes) > 10)
        warn(f"{len(manifest.bad_episodes)} episodes left out, since they cannot be read: {named}")


def clear_up(out: Path) -> None:
    """Removes what processes that were killed have left: hidden files, named after the shards that they were at."""
    for path in out.glob(".episodes-*"):
        path.unlink()
