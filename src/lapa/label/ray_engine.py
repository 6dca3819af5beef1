"""Labels on the workers of a Ray cluster: Ray Data hands shards to a pool of actors, each of which holds the model.

    lapa label --engine ray --num-cpus 0.5 --lam LAM --data DATASET                # two workers on one core
    lapa label --engine ray --ray-address auto --lam LAM --data DATASET --out s3://bucket/labels

A worker writes its shards itself, whole or not at all, and reports them. One that is killed is started again and does
its shard again, so nothing is lost and nothing is there twice; a shard that kills its worker every time ends the run.
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
from lapa.console import say
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import as_path, is_remote
from lapa.label.run import LabelConfig, make_plan
from lapa.label.shards import Clocks, Labeller, Shard, read_complete

# Times that a shard is done again after its worker was killed.
RETRIES = 3
# Bytes of Ray's object store where a cluster is started for this run: only the numbers of shards travel.
OBJECT_STORE = 128 << 20


class LabelActor:
    """What a worker holds: the plan of the run, opened there with the first shard, and a model."""

    def __init__(self, config: LabelConfig, identity: dict[str, Any], folder: str) -> None:
        """folder: that the command runs in, against which its paths are meant."""
        self.config, self.identity, self.folder = config, identity, folder
        self.labeller: Labeller | None = None
        self.error = ""

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Makes the shard that a row names. What goes wrong is told, not raised: Ray would wrap it."""
        shard = Shard(as_path(str(rows["path"][0])), int(rows["first"][0]), int(rows["last"][0]))
        clocks = Clocks()
        if not self.error:
            try:
                self._attempt(shard, clocks)
            except (ValueError, OSError) as error:
                self.error = str(error)
        told = {"episodes": len(shard.episodes), "error": self.error, **vars(clocks)}
        return {name: [value] for name, value in told.items()}

    def _attempt(self, shard: Shard, clocks: Clocks) -> None:
        """Makes a shard, counting what ended without a word: Ray does what a killed worker was at again, for ever."""
        attempts = _attempts(shard.path)
        killed = sum(attempt.exists() for attempt in attempts)
        if killed > RETRIES:
            raise UserError(
                f"{shard.path.name}: its worker was killed {killed} times, perhaps for lack of memory; what is "
                "finished is kept, go on with --resume and fewer workers or smaller batches"
            )
        attempts[killed].touch()
        # Only now, so that a worker that is killed by the model it loads is counted too.
        self.labeller = self.labeller or self._begin()
        self.labeller.clocks = clocks
        self._make(shard, self.labeller)
        for attempt in attempts[: killed + 1]:
            attempt.unlink(missing_ok=True)

    def _begin(self) -> Labeller:
        try:
            if Path(self.folder).is_dir():
                os.chdir(self.folder)
            plan = make_plan(self.config)
        except (ValueError, OSError) as error:
            raise UserError(f"a worker could not begin: {error}") from None
        changed = differences(self.identity, plan.identity)
        if changed:
            raise UserError(f"a worker has another model or dataset under these names: {'; '.join(changed)}")
        return Labeller(plan.model, plan.work, pick_device(self.config.device), _decoders(self.config))

    def _make(self, shard: Shard, labeller: Labeller) -> None:
        if shard.path.exists():
            try:
                read_complete(shard, labeller.work)
                return  # By a worker that was killed before it could tell.
            except ValueError:
                pass
        for _ in labeller.label([shard]):
            pass


def _attempts(path: Path) -> list[Path]:
    """The files that as many attempts at a shard leave as there may be."""
    return [path.with_name(f".{path.stem}.attempt-{number}") for number in range(RETRIES + 1)]


def label_with_ray(
    config: LabelConfig, identity: dict[str, Any], shards: Sequence[Shard], clocks: Clocks
) -> Iterator[int]:
    """Makes the shards; yields how many episodes are done. UserError where a worker cannot go on."""
    if not shards:
        return
    with _cluster(config) as ray:
        size, cpus, gpus = _pool(config, ray.cluster_resources(), len(shards))
        # A worker sees no GPU but its own.
        worker = replace(config, device="cuda" if gpus else "cpu")
        say(f"{size} workers of Ray, each with {cpus:g} CPU cores and {gpus:g} GPUs")
        rows = [{"path": _everywhere(shard.path), "first": shard.first, "last": shard.last} for shard in shards]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            LabelActor,
            fn_constructor_args=(worker, identity, str(Path.cwd())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        num_done = 0
        for row in _rows(ray, results):
            if row["error"]:
                raise UserError(row["error"])
            num_done += row.pop("episodes")
            del row["error"]
            clocks.add(Clocks(**row))
            yield num_done
        if clocks.num_pairs:
            say(clocks.told(_decoders(config), size))


def _rows(ray: Any, results: Any) -> Iterator[dict[str, Any]]:
    """The rows of a Ray Dataset. UserError where Ray gives up: the cluster is lost, or a worker raised."""
    try:
        yield from results.iter_rows()
    except ray.exceptions.RayError as error:
        # Tracebacks and advice surround the line that says what was raised.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
        raise UserError(
            f"Ray gave up ({[*lines, *named][-1]}); what is finished is kept, go on with --resume"
        ) from error


@contextmanager
def _cluster(config: LabelConfig) -> Iterator[Any]:
    """Ray, connected: to the cluster that the caller or `ray_address` names, else to one that ends with this block."""
    # Ray reads these when it is imported: it reports home, and tells on the console of each worker that ends.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers run at a low priority (nice 15) unless told otherwise; here they do the command's own work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('--engine ray needs Ray: pip install "lapa[ray]"') from None
    for handler in logging.getLogger("ray.data").handlers:
        if "File" not in type(handler).__name__:
            handler.setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if config.ray_address is None:
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        else:
            ray.init(config.ray_address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if config.ray_address is None:
            raise UserError(f"no cluster of Ray can be started on this machine ({reason})") from None
        raise UserError(f"--ray-address {config.ray_address}: no cluster of Ray answers there ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _decoders(config: LabelConfig) -> int:
    """Processes that decode for a worker: all of its cores but the one that feeds the model."""
    return max(0, int(config.num_cpus) - 1) if config.decoders is None else config.decoders


def _everywhere(path: Path) -> str:
    """A path as a worker finds it, whatever folder it runs in."""
    return str(path if is_remote(path) else path.absolute())


def _pool(config: LabelConfig, has: dict[str, float], num_shards: int) -> tuple[int, float, float]:
    """Number of workers, and the CPU cores and GPUs of each. UserError where the cluster has not that much."""
    there = {"CPU": has.get("CPU", 0.0), "GPU": has.get("GPU", 0.0)}
    wants_gpu = _wants_gpu(config, there["GPU"] > 0)
    wanted = {"CPU": config.num_cpus, "GPU": float(wants_gpu) if config.num_gpus is None else config.num_gpus}
    room = [there[kind] / amount for kind, amount in wanted.items() if amount > 0]
    size = config.num_workers or min(num_shards, max(1, int(min(room, default=1))))
    for kind, amount in wanted.items():
        if amount < 0 or amount * size > there[kind] + 1e-6:
            mend = f"give fewer --num-workers, or --num-{kind.lower()}s of each below one"
            raise UserError(
                f"{size} workers of {amount:g} {kind}s each do not fit a cluster that has {there[kind]:g}; "
                f"{mend if there[kind] else 'give --device cpu'}"
            )
    return size, wanted["CPU"], wanted["GPU"]


def _wants_gpu(config: LabelConfig, any_there: bool) -> bool:
    """Whether workers are to have GPUs. UserError where the options do not go together."""
    kind, num = config.device.partition(":")[0], config.num_gpus
    if kind not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {config.device!r}; use auto, cpu or cuda")
    if num is not None and kind != "auto" and (num > 0) != (kind == "cuda"):
        raise UserError(f"--device {config.device} and --num-gpus {num:g} contradict each other; give one of them")
    return kind == "cuda" or (kind == "auto" and any_there)
