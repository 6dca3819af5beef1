"""Batches in an order that is a function of the seed and the step, so that a resume needs only the step number.

A dataset of one part is drawn in a fresh permutation each epoch. A mixture declares `groups`: the number of samples,
which follow each other, and the weight of each part. Then

- of any first N draws, part i has exactly `count(i, N)`, the nearest whole number to its share of what the parts
  before it leave; so however long the run is, no count strays from its share by more draws than half the parts;
- within a block of 1024 draws the order of the parts is shuffled;
- each part is gone through in permutations of its own.

Which sample a draw is follows from its number alone: from neither the workers, the processes nor the batch size.
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from lapa.errors import UserError
from lapa.types import TrainingDataset

# Draws among which the parts of a mixture are shuffled.
BLOCK = 1024


class Draw(NamedTuple):
    """One draw from a dataset: which sample, and how many draws came before it since training began.

    A dataset that augments seeds itself from (seed, number), and so gives the same sample after a resume.
    """

    sample: int
    number: int


class Order(Protocol):
    """Which sample each draw since training began is."""

    def sample(self, number: int) -> int:
        """The sample of the draw `number`, counted from 0."""


class Permutations:
    """All samples once an epoch, in a new order each."""

    def __init__(self, num_samples: int, *seed: int) -> None:
        self.num_samples, self._seed = num_samples, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def sample(self, number: int) -> int:
        return int(self._order(number // self.num_samples)[number % self.num_samples])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self._seed, epoch]).permutation(self.num_samples)


class Mixed:
    """Samples of several parts, one after the other in the dataset, in exact shares: see the module's docstring."""

    def __init__(self, groups: Sequence[tuple[int, float]], seed: int) -> None:
        """groups: (number of samples, weight) of each part; an empty part, or one of weight 0, is never drawn."""
        if any(weight < 0 for _, weight in groups):
            raise UserError(f"the parts of a mixture have weights {[weight for _, weight in groups]}; none is below 0")
        weights = [Fraction(weight) if size else Fraction(0) for size, weight in groups]
        left = [sum(weights[part:], Fraction(0)) for part in range(len(weights))]
        if not left or not left[0]:
            raise UserError("no part of the mixture has both samples and a weight above 0")
        self._ratios = [weight / rest if rest else Fraction(0) for weight, rest in zip(weights, left, strict=True)]
        self._starts = np.cumsum([0, *(size for size, _ in groups)])
        self._parts = [Permutations(max(1, size), seed, 1 + part) for part, (size, _) in enumerate(groups)]
        self._seed = seed
        self._block = lru_cache(maxsize=2)(self._shuffled)

    def counts(self, num_draws: int) -> list[int]:
        """How many of the first draws fall to each part."""
        counts, rest = [], num_draws
        for ratio in self._ratios:
            counts.append((2 * rest * ratio.numerator + ratio.denominator) // (2 * ratio.denominator))
            rest -= counts[-1]
        return counts

    def place(self, number: int) -> tuple[int, int]:
        """The part of a draw, and how many draws of that part came before it."""
        parts_N, before_N = self._block(number // BLOCK)
        return int(parts_N[number % BLOCK]), int(before_N[number % BLOCK])

    def sample(self, number: int) -> int:
        part, before = self.place(number)
        return int(self._starts[part]) + self._parts[part].sample(before)

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The part of each draw of a block, and how many of that part were drawn before it."""
        first, last = self.counts(block * BLOCK), self.counts((block + 1) * BLOCK)
        parts_N = np.repeat(np.arange(len(first)), np.subtract(last, first))
        parts_N = np.random.default_rng([self._seed, 0, block]).permutation(parts_N)
        before_N = np.zeros(BLOCK, np.int64)
        for part, count in enumerate(first):
            before_N[parts_N == part] = count + np.arange(last[part] - count)
        return parts_N, before_N


class StepSampler(Sampler[list[Draw]]):
    """Micro-batches of one process, from `first_step` on, in the order of `Permutations` or, with `groups`, of `Mixed`.

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
        groups: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        if num_samples < 1:
            raise UserError("the dataset has no samples to train on")
        if batch_size % (accumulate * world):
            raise UserError(
                f"batch size {batch_size} does not divide into {world} processes x {accumulate} accumulations; "
                f"use a multiple of {accumulate * world}"
            )
        if groups is not None and sum(size for size, _ in groups) != num_samples:
            raise UserError(f"the parts of the dataset have {groups} samples and weights, the dataset {num_samples}")
        self.batch_size = batch_size
        self.first_step, self.last_step = first_step, last_step
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self._order: Order = Permutations(num_samples, seed) if groups is None else Mixed(groups, seed)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        micro = self.batch_size // (self.accumulate * self.world)
        for step in range(self.first_step, self.last_step):
            for accumulation in range(self.accumulate):
                first = step * self.batch_size + (accumulation * self.world + self.rank) * micro
                yield [Draw(self._order.sample(number), number) for number in range(first, first + micro)]


def batch_loader(
    dataset: TrainingDataset,
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
        worker_init_fn=_begin_worker,
    )


def _begin_worker(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the loop still wants its workers for the step it finishes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Connections to a store (upath is imported for those alone) do not survive a fork; a copy by pickle has none yet.
    info = torch.utils.data.get_worker_info()
    assert info is not None, "called in a worker"
    dataset = cast(TrainingDataset, info.dataset)
    if "upath" in sys.modules and not dataset.in_memory:
        vars(dataset).update(pickle.loads(pickle.dumps(vars(dataset))))
