"""Conversion on the workers of a Ray cluster: each converts shards, which this process adds to the dataset in order.

    lapa data webdataset 's3://bucket/clips-{00000..01023}.tar' --engine ray --ray.address auto --out /shared/DATASET

A shard is a few items in a row. A worker converts it into a folder of its own, as a dataset that is not finished, whose
journal has the episodes; the folder then gets its name, whole or not at all. Its episodes are moved to the dataset as
soon as all shards before it are there. So the dataset is that of one machine, byte for byte. A worker that is killed is
started again and makes its shard again; after this process is killed, --resume goes on with the shards that are there.
https://docs.ray.io/en/latest/data/data.html
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lapa.console import progress, say, warn
from lapa.data.source import Item
from lapa.data.writer import DatasetWriter
from lapa.errors import UserError
from lapa.files import read_json, write_json
from lapa.ray_cluster import RayConfig, cluster, counted_attempts, pool, rows_of

# Prefix of the folders in the dataset's with what waits to be added.
INCOMING = ".incoming-"
SHARDS = f"{INCOMING}shards"
SHARD_ITEMS = 16
# Of a shard that a worker is making.
PRIVATE = ".making-"
# In a shard: a list of the warnings of its conversion, shown when it is added.
WARNINGS = "warnings.json"

# Converts items into a folder, as an unfinished dataset, and returns warnings.
Convert = Callable[[Sequence[Item], Path], list[str]]


class ShardActor:
    """A worker: makes one shard a call. folder: the one that the command's paths are relative to."""

    def __init__(self, convert: Convert, folder: str) -> None:
        self.convert, self.folder = convert, folder
        self.error = ""

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Makes the shard that a row names. Errors are returned in the row, not raised: Ray would wrap them."""
        if not self.error:
            try:
                if Path(self.folder).is_dir():
                    os.chdir(self.folder)
                self._make(Path(str(rows["path"][0])), pickle.loads(rows["items"][0]))
            except (UserError, OSError) as error:
                self.error = str(error)
        return {"error": [self.error]}

    def _make(self, shard: Path, items: Sequence[Item]) -> None:
        if shard.exists():
            return  # Made by a worker that was killed before it could report.
        with counted_attempts(shard):
            private = Path(tempfile.mkdtemp(prefix=PRIVATE, dir=shard.parent))
            write_json(private / WARNINGS, self.convert(items, private))
            try:
                private.rename(shard)
            except OSError:
                # A worker that was taken for dead has made it meanwhile.
                if not shard.exists():
                    raise
                shutil.rmtree(private, ignore_errors=True)


def convert_with_ray(convert: Convert, items: Sequence[Item], writer: DatasetWriter, config: RayConfig) -> None:
    """Converts items and adds their episodes to the dataset. Raises UserError where a worker cannot go on."""
    folder = writer.root / SHARDS / writer.identity
    _remove_leftovers(writer.root, folder)
    shards = {
        folder / f"{start:09d}": items[start : start + SHARD_ITEMS] for start in range(0, len(items), SHARD_ITEMS)
    }
    waiting = deque(path for path, its in shards.items() if any(item.key not in writer.done_items for item in its))
    num_done = len(items) - sum(len(shards[path]) for path in waiting)
    missing = [path for path in waiting if not path.exists()]
    with progress() as bar:
        task = bar.add_task("converting", total=len(items), note="")

        def add_ready() -> None:
            nonlocal num_done
            while waiting and waiting[0].exists():
                for warning in read_json(waiting[0] / WARNINGS):
                    warn(warning)
                writer.add_unfinished(waiting[0])
                num_done += len(shards[waiting[0]])
                shutil.rmtree(waiting.popleft())
            bar.update(task, completed=num_done)

        add_ready()
        if missing:
            with cluster(config) as ray:
                size, cpus, _ = pool(config, "cpu", ray.cluster_resources(), len(missing))
                say(f"{size} workers of Ray, each with {cpus:g} CPU cores")
                rows = [{"path": str(path.absolute()), "items": pickle.dumps(shards[path])} for path in missing]
                results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                    ShardActor,
                    fn_constructor_args=(convert, str(Path.cwd())),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=size),
                    num_cpus=cpus,
                )
                for row in rows_of(ray, results):
                    if row["error"]:
                        raise UserError(row["error"])
                    add_ready()
    if waiting:
        raise UserError(f"{waiting[0]}: is missing, though its worker has reported it; continue with --resume")
    shutil.rmtree(writer.root / SHARDS, ignore_errors=True)


def _remove_leftovers(root: Path, folder: Path) -> None:
    """Removes what killed workers, runs on one machine and runs with other settings have left in the dataset."""
    shards = root / SHARDS
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*root.glob(f"{INCOMING}*"), *shards.iterdir(), *folder.glob(f"{PRIVATE}*")]:
        if path not in (shards, folder):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.attempt-*"):
        path.unlink(missing_ok=True)
