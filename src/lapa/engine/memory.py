"""Memory: an estimate before anything is loaded or trained, instead of a crash after minutes.

    require_memory(training_bytes(7_000_000_000, 7_000_000_000), device, "training 7B parameters", ["--shard"])

Weights, gradients and optimiser state are counted; activations, which depend on the batch, are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import psutil
import torch
from torch import nn

from lapa.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

GIB = 2**30
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
# AdamW keeps two moments for each parameter: as wide as the weight, or one byte and a float for every 256 of them.
# Muon keeps one for matrices, and is counted as AdamW.
MOMENTS = 2
MOMENT_8BIT_BYTES = 1 + 4 / 256


def training_bytes(
    num_parameters: int,
    num_trained: int,
    weights: Literal["fp32", "bf16"] = "fp32",
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw",
    *,
    autocast: bool = False,
    ema: bool = False,
    shards: int = 1,
) -> int:
    """Bytes that a process needs for weights, gradients and optimiser state.

    autocast: weights in fp32 are also kept in bf16 from forward to backward, except where they are sharded and so
    gathered a unit at a time. ema: a second copy of all weights. shards: number of processes that share all this.
    """
    wide = WEIGHT_BYTES[weights]
    kept = num_parameters * wide
    moment = MOMENT_8BIT_BYTES if optimizer == "adamw8bit" else wide
    needed = kept * (2 if ema else 1) + num_trained * (wide + MOMENTS * moment)
    if autocast and weights == "fp32" and shards == 1:
        needed += num_trained * WEIGHT_BYTES["bf16"]
    return -int(-needed // shards)


def available_bytes(device: torch.device) -> int:
    """Bytes this process may still take on `device`; on a CPU its share among the processes of the machine.

    On a CPU this is the memory of the machine: the limit of a container or of a Slurm job may be lower.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_memory(needed: int, device: torch.device, what: str, remedies: Sequence[str]) -> None:
    """Raises UserError where `what` needs more bytes than `available_bytes(device)`."""
    free = available_bytes(device)
    if needed <= free:
        return
    raise UserError(
        f"{what} needs {needed / GIB:.1f} GiB of memory, and {device} has {free / GIB:.1f} GiB free; "
        f"try {', '.join(remedies[:-1])}{' or ' if len(remedies) > 1 else ''}{remedies[-1]}"
    )


def built(build: Callable[[], Model]) -> Model:
    """Returns `build()`, a new model of the sizes that options give.

    Raises UserError where its weights do not fit into the memory of the machine: it is planned without memory first.
    """
    with torch.device("meta"):
        planned = build()
    new = [tensor for tensor in (*planned.parameters(), *planned.buffers()) if tensor.is_meta]
    num, needed = sum(tensor.numel() for tensor in new), sum(tensor.nbytes for tensor in new)
    require_memory(needed, torch.device("cpu"), f"a model of {num:,} new weights", ["smaller sizes"])
    return build()


@contextmanager
def explained_out_of_memory(remedies: Sequence[str]) -> Iterator[None]:
    """Turns torch's error of a GPU that runs out of memory into a UserError with remedies."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"the memory of the GPU ran out ({reason}); try {', '.join(remedies)}") from error
