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

import io
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from lapa.errors import UserError
from lapa.store_cache import StoreCache, store_cache, use_store_cache
from lapa.types import Plain, TrainingDataset

# Draws among which the parts of a mixture are shuffled.
BLOCK = 1024
# Samples from which on their order is not stored, which takes 8 bytes for each; rounds that scatter them.
LARGE, ROUNDS, MASK = 1 << 24, 6, (1 << 64) - 1
# Samples that a process reads from a store at once.
AHEAD = 32
# Values from which on a list is looked at as a whole.
LONG = 100


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
    """All samples once an epoch, in a new order each.

    Above `LARGE` samples the order is computed place by place and takes no memory, which each worker would need.
    """

    def __init__(self, num_samples: int, *seed: int) -> None:
        self.num_samples, self._seed = num_samples, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def sample(self, number: int) -> int:
        return int(self._order(number // self.num_samples)[number % self.num_samples])

    def _permutation(self, epoch: int) -> np.ndarray | Scattered:
        random = np.random.default_rng([*self._seed, epoch])
        return Scattered(self.num_samples, random) if self.num_samples > LARGE else random.permutation(self.num_samples)


class Scattered:
    """A permutation of `range(num)` that is not stored: a Feistel network on numbers of twice `bits` bits.

    What it maps past `num` is mapped again, until it is below. Black and Rogaway, 2002, "Ciphers with Arbitrary Finite
    Domains".
    """

    def __init__(self, num: int, random: np.random.Generator) -> None:
        self.num, self._bits = num, ((num - 1).bit_length() + 1) // 2
        self._keys = [int(key) for key in random.integers(0, 1 << 62, ROUNDS)]

    def __getitem__(self, place: int) -> int:
        half = (1 << self._bits) - 1
        while True:
            left, right = place >> self._bits, place & half
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & half)
            place = left << self._bits | right
            if place < self.num:
                return place


def _mixed(number: int) -> int:
    """Returns 64 bits that each depend on all of `number` (SplitMix64, Steele et al., 2014)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


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


class ReadAhead:
    """A dataset of which `AHEAD` samples are read at once, in threads, in the order in which they will be asked for.

    For a store that takes its time to answer. The order is known (`StepSampler`), so each worker reads ahead in its own
    share of the batches, beyond those that it was handed. A sample is the same as without.
    """

    def __init__(self, dataset: TrainingDataset, sampler: StepSampler) -> None:
        self.dataset, self._sampler = dataset, sampler
        self._threads: ThreadPoolExecutor | None = None
        self._coming: Iterator[Draw] = iter(())
        self._waiting: deque[tuple[Draw, Future[Any]]] = deque()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        """Returns `dataset[draw]`. Raises its errors."""
        if self._threads is None:
            info = torch.utils.data.get_worker_info()
            first, every = (0, 1) if info is None else (info.id, info.num_workers)
            self._threads = ThreadPoolExecutor(AHEAD, "read-ahead")
            self._coming = chain.from_iterable(islice(self._sampler, first, None, every))
        for coming in islice(self._coming, AHEAD + 1 - len(self._waiting)):
            self._waiting.append((coming, self._threads.submit(self.dataset.__getitem__, coming)))
        if not self._waiting or self._waiting[0][0] != draw:
            return self.dataset[draw]
        return self._waiting.popleft()[1].result()


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
        cast(TrainingDataset, ReadAhead(dataset, sampler)) if dataset.remote else dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        # Workers draw nothing from torch's global generator, and a resumed run must find it as it was left.
        generator=torch.Generator(),
        worker_init_fn=partial(_begin_worker, store_cache()),
    )


def _begin_worker(cache: StoreCache | None, worker: int) -> None:
    # Ctrl-C reaches the whole process group; the loop still wants its workers for the step it finishes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cache is not None:
        use_store_cache(cache.folder, cache.limit / 2**30)
    # Connections to a store do not survive a fork; a copy by pickle has none yet.
    info = torch.utils.data.get_worker_info()
    assert info is not None, "called in a worker"
    if isinstance(info.dataset, ReadAhead):
        vars(info.dataset.dataset).update(_copied(vars(info.dataset.dataset)))


def _copied(value: Any) -> Any:
    """Returns a copy by pickle that shares what is plain: the metadata of a million episodes is in memory once."""
    shared: list[Any] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> int | None:
            # A long list is as its first value is.
            value = thing[0] if isinstance(thing, list | tuple) and len(thing) >= LONG else thing
            if not isinstance(value, np.ndarray | Plain) and (value is thing or not isinstance(value, str)):
                return None
            shared.append(thing)
            return len(shared) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            return shared[number]

    with io.BytesIO() as file:
        Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
        file.seek(0)
        return Unpickler(file).load()
