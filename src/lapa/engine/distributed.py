"""One process or many, with plain torch.distributed under torchrun.

lapa latent train ...                                  # one process, on the GPU if there is one
torchrun --nproc-per-node 4 -m lapa latent train ...   # four, gradients averaged by DistributedDataParallel
torchrun --nproc-per-node 4 -m lapa policy pretrain --shard ...   # four, each with a quarter of the model
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lapa.errors import UserError

# How long processes wait for one another: one alone evaluates, or writes the last shard of labels.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process among its peers. `device` is where its model and batches live."""

    rank: int
    world: int
    device: torch.device
    _averaging: list[DistributedDataParallel] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process. Every process must call this at the same step."""
        if self.world == 1:
            return flag
        flags = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; every process must call this at the same step."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The values averaged over the processes, which must all name the same keys in the same order."""
        if self.world == 1 or not values:
            return values
        stacked = torch.tensor(list(values.values()), dtype=torch.float64).to(self.device, torch.float32)
        dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.world).tolist(), strict=True))

    def averaged(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over the processes in the backward pass."""
        if self.world == 1:
            return model
        wrapped = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Else the buckets that travel are a second copy of all gradients.
            gradient_as_bucket_view=True,
        )
        self._averaging.append(wrapped)
        return wrapped

    def release(self) -> None:
        """Cuts the averaged models off the process group, which must not outlive `start` through them.

        Were a DistributedDataParallel the last to hold the group, its death would end the group's threads while
        holding Python's lock, and a thread that waits for this lock to drop a tensor would never end.
        """
        for wrapped in self._averaging:
            del wrapped.reducer, wrapped.logger
        self._averaging.clear()


def pick_device(name: str = "auto") -> torch.device:
    """The device by name; `auto`: the process's own GPU if there is one, else the CPU.

    Raises UserError where it is absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ("cpu", "cuda", *(["mps"] if torch.backends.mps.is_available() else []))
    if name.partition(":")[0] not in kinds:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {name!r} asked for, but torch {torch.__version__} sees no GPU; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def start(device: str = "auto", *, alone: bool = False) -> Iterator[Processes]:
    """Joins the process group of torchrun, if there is one, and leaves it at the end.

    A group that the caller has joined is used and not left, since torchrun lets a process join only once.
    alone: a process without peers makes a group of its own, which sharding needs.
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and not alone:
        yield Processes(0, 1, chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    joins = not dist.is_initialized()
    if joins and world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif joins:
        dist.init_process_group(backend, timeout=PATIENCE)
    processes = Processes(dist.get_rank(), world, chosen)
    try:
        yield processes
    finally:
        processes.release()
        if joins:
            dist.destroy_process_group()
