"""A Ray cluster for the commands that have `--engine ray`: its options, its start, and room for workers in it.

https://docs.ray.io
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.console import warn
from lapa.errors import UserError

# Attempts at a piece of work after the first one, when workers are killed.
RETRIES = 3
# Bytes of Ray's object store where a cluster is started for this run: only names of pieces of work travel.
OBJECT_STORE = 128 << 20
# Whether Ray's processes may be reached from other machines, on the systems where its default is no.
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True)
class RayConfig:
    """Workers of a Ray cluster, for `--engine ray`."""

    address: str | None = None
    """Address of the cluster, or auto for the one that runs here; by default one is started on this machine."""
    num_workers: int | None = None
    """Workers; by default as many as there is room for."""
    num_cpus: float = 1.0
    """CPU cores of a worker; may be a fraction."""
    num_gpus: float | None = None
    """GPUs of a worker; may be a fraction; by default one where the cluster has any and the work needs one."""


def check_ray(config: RayConfig) -> None:
    """Raises UserError for numbers of workers and amounts that there cannot be."""
    for name, value, smallest in (
        ("num-workers", config.num_workers, 1),
        ("num-cpus", config.num_cpus, 0),
        ("num-gpus", config.num_gpus, 0),
    ):
        # Not a number is no amount either.
        if value is not None and not value >= smallest:
            raise UserError(f"--ray.{name} {value:g}: must be at least {smallest}")


@contextmanager
def counted_attempts(path: Path) -> Iterator[None]:
    """Counts attempts at making `path`, in files next to it, until one succeeds: Ray repeats killed ones without end.

    Raises UserError after the last one.
    """
    attempts = [path.with_name(f".{path.stem}.attempt-{number}") for number in range(RETRIES + 1)]
    killed = sum(attempt.exists() for attempt in attempts)
    if killed > RETRIES:
        raise killed_too_often(path.name, killed)
    attempts[killed].touch()
    yield
    for attempt in attempts[: killed + 1]:
        attempt.unlink(missing_ok=True)


def killed_too_often(name: str, times: int) -> UserError:
    """Returns the error about a piece of work whose workers are killed."""
    return UserError(
        f"{name}: its worker was killed {times} times, perhaps for lack of memory; what is finished is kept, "
        "continue with --resume and fewer workers or smaller batches"
    )


def rows_of(ray: Any, results: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a Ray Dataset. Raises UserError as `ray_errors`."""
    with ray_errors(ray):
        yield from results.iter_rows()


@contextmanager
def ray_errors(ray: Any) -> Iterator[None]:
    """Raises UserError where Ray gives up inside (cluster lost, worker raised)."""
    try:
        yield
    except ray.exceptions.RayError as error:
        # The line with the exception stands amid tracebacks and advice.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        named = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
        raise UserError(
            f"Ray gave up ({[*lines, *named][-1]}); what is finished is kept, continue with --resume"
        ) from error


@contextmanager
def cluster(config: RayConfig) -> Iterator[Any]:
    """Ray, connected to the caller's cluster or that of `--ray.address`, else to one that ends with this block."""
    # Ray reads these when it is imported: no usage reports, and no line on the console for each worker that ends.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers run at a low priority (nice 15) by default; here they do the command's own work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if config.address is None:
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
        if config.address is None:
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
            if not ray.util.get_node_ip_address().startswith("127."):
                warn("Ray was imported before its address could be set to this machine alone: others may reach it")
        else:
            ray.init(config.address, **quiet)
    # Ray raises a plain Exception where it does not start in time.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith("Version mismatch"):
            there, here = re.findall(r"Ray: (\S+)\s+Python: (\S+)", str(error))
            raise UserError(
                f"--ray.address {config.address}: runs Ray {there[0]} and Python {there[1]}, here are {here[0]} and "
                f"{here[1]}; install the same on all machines (pip install ray=={there[0]})"
            ) from None
        reason = lines[0]
        if config.address is None:
            raise UserError(f"Ray cannot start a cluster on this machine ({reason})") from None
        raise UserError(f"--ray.address {config.address}: no Ray cluster answers there ({reason})") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def pool(config: RayConfig, device: str, has: dict[str, float], num_shards: int) -> tuple[int, float, float]:
    """Returns the number of workers, and the CPU cores and GPUs of each. Raises UserError if they do not fit."""
    there = {"CPU": has.get("CPU", 0.0), "GPU": has.get("GPU", 0.0)}
    kind, num_gpus = device.partition(":")[0], config.num_gpus
    if kind not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {device!r}; use auto, cpu or cuda")
    if num_gpus is None:
        num_gpus = float(kind == "cuda" or (kind == "auto" and there["GPU"] > 0))
    elif kind != "auto" and (num_gpus > 0) != (kind == "cuda"):
        raise UserError(f"--device {device} and --ray.num-gpus {num_gpus:g} contradict each other; give one of them")
    wanted = {"CPU": config.num_cpus, "GPU": num_gpus}
    room = [there[kind] / amount for kind, amount in wanted.items() if amount > 0]
    size = config.num_workers or min(num_shards, max(1, int(min(room, default=1))))
    for kind, amount in wanted.items():
        if amount * size > there[kind] + 1e-6:
            fix = f"give fewer --ray.num-workers, or --ray.num-{kind.lower()}s of each below one"
            raise UserError(
                f"{size} workers of {amount:g} {kind}s each do not fit a cluster that has {there[kind]:g}; "
                f"{'give --device cpu' if kind == 'GPU' and not there[kind] else fix}"
            )
    return size, wanted["CPU"], wanted["GPU"]
