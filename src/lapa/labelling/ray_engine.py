"""Labels on the workers of a Ray cluster: Ray Data hands shards to a pool of actors, each of which holds the model.

    lapa label --engine ray --ray.num-cpus 0.5 --lam LAM --data DATASET            # two workers on one core
    lapa label --engine ray --ray.address auto --lam LAM --data DATASET --out s3://bucket/labels

A worker writes its shards itself, whole or not at all, and reports them. One that is killed is started again and makes
its shard again, so nothing is lost or doubled; a shard that kills its worker every time ends the run.
https://docs.ray.io/en/latest/data/data.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapa.config import differences
from lapa.console import say
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import as_path, is_remote
from lapa.labelling.config import LabelConfig
from lapa.labelling.shards import Labeller, Plan, Shard, make_plan, read_complete
from lapa.ray_cluster import cluster, counted_attempts, pool, rows_of


class LabelActor:
    """A worker: opens the dataset and the model with its first shard, and makes one shard a call."""

    def __init__(self, config: LabelConfig, identity: dict[str, Any], folder: str) -> None:
        """identity: as the command's plan has it; folder: the one that the command's paths are relative to."""
        self.config, self.identity, self.folder = config, identity, folder
        self.labeller: Labeller | None = None
        self.error = ""

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Makes the shard that a row names. Errors are returned in the row, not raised: Ray would wrap them."""
        first, last = int(rows["first"][0]), int(rows["last"][0])
        if not self.error:
            try:
                self._attempt(Shard(as_path(str(rows["path"][0])), first, last))
            except (UserError, OSError) as error:
                self.error = str(error)
        return {"first": [first], "last": [last], "error": [self.error]}

    def _attempt(self, shard: Shard) -> None:
        """Makes a shard, unless its worker was killed too often."""
        with counted_attempts(shard.path):
            # Only now, so that a worker that is killed by the model it loads is counted too.
            self.labeller = self.labeller or self._begin()
            self._make(shard, self.labeller)

    def _begin(self) -> Labeller:
        try:
            if Path(self.folder).is_dir():
                os.chdir(self.folder)
            plan = make_plan(self.config)
        except (UserError, OSError) as error:
            raise UserError(f"a worker could not begin: {error}") from None
        changed = differences(self.identity, plan.identity)
        if changed:
            raise UserError(f"a worker has another model or dataset under these names: {'; '.join(changed)}")
        # All cores decode but the one that feeds the model.
        cores = max(0, int(self.config.ray.num_cpus) - 1)
        decoders = cores if self.config.decoders is None else self.config.decoders
        return Labeller(plan, pick_device(self.config.device), decoders)

    def _make(self, shard: Shard, labeller: Labeller) -> None:
        if shard.path.exists():
            try:
                read_complete(shard, labeller.plan)
                return  # Made by a worker that was killed before it could report.
            except UserError:
                pass
        for _ in labeller.label([shard]):
            pass


def label_with_ray(plan: Plan, shards: Sequence[Shard]) -> Iterator[int]:
    """Makes the shards; yields the number of pairs that are done. Raises UserError where a worker cannot go on."""
    if not shards:
        return
    config = plan.config
    with cluster(config.ray) as ray:
        size, cpus, gpus = pool(config.ray, config.device, ray.cluster_resources(), len(shards))
        # A worker sees no GPU but its own.
        worker = replace(config, device="cuda" if gpus else "cpu")
        say(f"{size} workers of Ray, each with {cpus:g} CPU cores and {gpus:g} GPUs")
        # Workers may have another working directory.
        paths = [str(shard.path if is_remote(shard.path) else shard.path.absolute()) for shard in shards]
        rows = [{"path": p, "first": shard.first, "last": shard.last} for p, shard in zip(paths, shards, strict=True)]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            LabelActor,
            fn_constructor_args=(worker, plan.identity, str(Path.cwd())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        num_done = 0
        for row in rows_of(ray, results):
            if row["error"]:
                raise UserError(row["error"])
            num_done += plan.num_pairs(range(row["first"], row["last"] + 1))
            yield num_done
