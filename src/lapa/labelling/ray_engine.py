"""Labels on the workers of a Ray cluster: Ray Data hands shards to a pool of actors, each of which holds the model.

    lapa label --engine ray --ray.num-cpus 0.5 --lam LAM --data DATASET            # two workers on one core
    lapa label --engine ray --ray.address auto --lam LAM --data DATASET --out s3://bucket/labels

A worker writes its shards itself, whole or not at all, and reports them. One that is killed is started again and makes
its shard again, so nothing is lost or doubled; a shard that kills its worker every time ends the run.
https://docs.ray.io/en/latest/data/data.html
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lapa.config import differences
from lapa.console import say, warn
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import as_path, is_remote
from lapa.labelling.config import LabelConfig
from lapa.labelling.shards import Labeller, Plan, Shard, make_plan, read_complete

# Attempts at a shard after the first one, when workers are killed.
RETRIES = 3
# Bytes of Ray's object store where a cluster is started for this run: only the numbers of shards travel.
OBJECT_STORE = 128 << 20
# Whether Ray's processes may be reached from other machines, on the systems where its default is no.
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


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
        """Makes a shard, counting the attempts that were killed: Ray repeats those without end."""
        attempts = [shard.path.with_name(f".{shard.path.stem}.attempt-{number}") for number in range(RETRIES + 1)]
        killed = sum(attempt.exists() for attempt in attempts)
        if killed > RETRIES:
            raise UserError(
                f"{shard.path.name}: its worker was killed {killed} times, perhaps for lack of memory; what is "
                "finished is kept, continue with --resume and fewer workers or smaller batches"
            )
        attempts[killed].touch()
        # Only now, so that a worker that is killed by the model it loads is counted too.
        self.labeller = self.labeller or self._begin()
        self._make(shard, self.labeller)
        for attempt in attempts[: killed + 1]:
            attempt.unlink(missing_ok=True)

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
    with _cluster(config) as ray:
        size, cpus, gpus = _pool(config, ray.cluster_resources(), len(shards))
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
        for row in _rows(ray, results):
            if row["error"]:
                raise UserError(row["error"])
            num_done += plan.num_pairs(range(row["first"], row["last"] + 1))
            yield num_done


def _rows(ray: Any, results: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Ray Dataset. Raises UserError where Ray gives up (cluster lost, worker raised)."""
    try:
        yield from results.iter_rows()
    except ray.exceptions.RayError as error:
        # The line with the exception stands amid tracebacks and advice.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
        raise UserError(
            f"Ray gave up ({[*lines, *named][-1]}); what is finished is kept, continue with --resume"
        ) from error


@contextmanager
def _cluster(config: LabelConfig) -> Iterator[Any]:
    """Ray, connected to the caller's cluster or that of `--ray.address`, else to one that ends with this block."""
    # Ray reads these when it is imported: no usage reports, and no line on the console for each worker that ends.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers run at a low priority (nice 15) by default; here they do the command's own work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if config.ray.address is None:
        # A cluster for this run alone listens on the loopback address; by default on Linux, on every interface.
        os.environ[LOOPBACK_ONLY] = "0"
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('--engine ray needs Ray: pip install "lapa-vla[ray]"') from None
    for handler in logging.getLogger("ray.data").handlers:
        if "File" not in type(handler).__name__:
            handler.setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if config.ray.address is None:
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
            if not ray.util.get_node_ip_address().startswith("127."):
                warn("Ray was imported before it could be told to listen on this machine alone: others may reach it")
        else:
            ray.init(config.ray.address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if config.ray.address is None:
            raise UserError(f"Ray cannot start a cluster on this machine ({reason})") from None
        raise UserError(f"--ray.address {config.ray.address}: no Ray cluster answers there ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _pool(config: LabelConfig, has: dict[str, float], num_shards: int) -> tuple[int, float, float]:
    """Returns the number of workers, and the CPU cores and GPUs of each. Raises UserError if they do not fit."""
    there = {"CPU": has.get("CPU", 0.0), "GPU": has.get("GPU", 0.0)}
    kind, num_gpus = config.device.partition(":")[0], config.ray.num_gpus
    if kind not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {config.device!r}; use auto, cpu or cuda")
    if num_gpus is None:
        num_gpus = float(kind == "cuda" or (kind == "auto" and there["GPU"] > 0))
    elif kind != "auto" and (num_gpus > 0) != (kind == "cuda"):
        raise UserError(
            f"--device {config.device} and --ray.num-gpus {num_gpus:g} contradict each other; give one of them"
        )
    wanted = {"CPU": config.ray.num_cpus, "GPU": num_gpus}
    room = [there[kind] / amount for kind, amount in wanted.items() if amount > 0]
    size = config.ray.num_workers or min(num_shards, max(1, int(min(room, default=1))))
    for kind, amount in wanted.items():
        if amount < 0 or amount * size > there[kind] + 1e-6:
            fix = f"give fewer --ray.num-workers, or --ray.num-{kind.lower()}s of each below one"
            raise UserError(
                f"{size} workers of {amount:g} {kind}s each do not fit a cluster that has {there[kind]:g}; "
                f"{fix if there[kind] else 'give --device cpu'}"
            )
    return size, wanted["CPU"], wanted["GPU"]
