"""Whether it fits: an estimate before anything is loaded or trained, instead of a crash after minutes.

    require_memory(training_bytes(7_000_000_000, 7_000_000_000), device, "training 7B parameters", ["--shard"])

Weights, gradients and optimiser state are counted, and not the activations: these depend on the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from lapa.errors import UserError

GIB = 2**30
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
# Two moments a parameter: as wide as the weight, or a byte each and a float for every 256 of them.
MOMENTS = 2
MOMENT_8BIT_BYTES = 1 + 4 / 256


def training_bytes(
    num_parameters: int,
    num_trained: int,
    weights: Literal["fp32", "bf16"] = "fp32",
    optimizer: Literal["adamw", "adamw8bit"] = "adamw",
    *,
    autocast: bool = False,
    ema: bool = False,
    shards: int = 1,
) -> int:
    """Bytes that a process needs for weights, gradients and optimiser state.

    autocast: weights in fp32 are used in bf16, and so kept in both from forward to backward; not where they are
    sharded, which gathers a unit at a time. ema: a second copy of all weights. shards: processes that share all this.
    """
    wide = WEIGHT_BYTES[weights]
    kept = num_parameters * wide
    moment = MOMENT_8BIT_BYTES if optimizer == "adamw8bit" else wide
    needed = kept * (2 if ema else 1) + num_trained * (wide + MOMENTS * moment)
    if autocast and weights == "fp32" and shards == 1:
        needed += num_trained * WEIGHT_BYTES["bf16"]
    return -int(-needed // shards)


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes this process may still take on `device`; on a CPU its share among the processes of the machine.

    root: where proc and sys are, for tests.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [*_machine_bytes(root), *_group_bytes(root)]
    if not limits:
        # Nothing known here (not Linux): nothing is refused.
        return 2**63
    return max(0, min(limits)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_memory(
    needed: int, device: torch.device, what: str, mend: Sequence[str], *, available: int | None = None
) -> None:
    """UserError where `what` needs more than there is, with both figures and what helps.

    available: by default `available_bytes(device)`.
    """
    free = available_bytes(device) if available is None else available
    if needed <= free:
        return
    raise UserError(
        f"{what} needs {needed / GIB:.1f} GiB of memory, and {device} has {free / GIB:.1f} GiB free; "
        f"try {', '.join(mend[:-1])}{' or ' if len(mend) > 1 else ''}{mend[-1]}"
    )


@contextmanager
def explained_out_of_memory(mend: Sequence[str]) -> Iterator[None]:
    """A GPU whose memory runs out in this block is a UserError that says what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"the memory of the GPU ran out ({reason}); try {', '.join(mend)}") from error


def _machine_bytes(root: Path) -> list[int]:
    """What the system could still give, as it says itself."""
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return [int(value.split()[0]) * 1024]
    return []


def _group_bytes(root: Path) -> list[int]:
    """What the limit of each control group of this process leaves (containers, Slurm), of version 2 or 1."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = Path(path.strip("/"))
        for folder in (mount / part for part in (own, *own.parents)):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                found.append(most - now + _reclaimable(folder / "memory.stat"))
    return found


def _reclaimable(stat: Path) -> int:
    """Pages of files count as used, and are given back when memory is short."""
    rows = dict(line.split() for line in _lines(stat))
    prefix = "total_" if "total_inactive_file" in rows else ""
    return sum(int(rows.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or no limit ("max")."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    """Some of these files cannot be read in some containers, which then set no limit that is known."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
