"""Batches in an order that is a function of the seed and the step, so that a resume needs only the step number."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Draw(NamedTuple):
    """One draw from a dataset: which sample, and how many draws came before it since training began.

    A dataset that augments seeds itself from (seed, number), and so gives the same sample after a resume.
    """

    sample: int
    number: int


class StepSampler(Sampler[list[Draw]]):
    """Micro-batches of one process, from `first_step` on: a fresh permutation of the dataset each epoch.

    A step draws `batch_size` samples over all processes and accumulations; the process `rank` takes its share.
    So one process and many see the same samples at the same step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        first_step: int,
        last_step: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ValueError("the dataset has no samples to train on")
        if batch_size % (accumulate * world):
            raise ValueError(
                f"batch size {batch_size} does not divide into {world} processes x {accumulate} accumulations; "
                f"use a multiple of {accumulate * world}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.first_step, self.last_step = first_step, last_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.batch_size // (self.accumulate * self.world)
        for step in range(self.first_step, self.last_step):
            for accumulation in range(self.accumulate):
                first = step * self.batch_size + (accumulation * self.world + self.rank) * micro
                yield [
                    Draw(int(self._order(number // self.num_samples)[number % self.num_samples]), number)
                    for number in range(first, first + micro)
                ]


def batch_loader(
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    sampler: StepSampler,
    *,
    workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """A DataLoader over a StepSampler. Workers add speed and change nothing in the order or the samples."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        # Workers draw nothing from torch's global generator, and a resumed run must find it as it was left.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop still wants its workers for the step it finishes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
