"""One shard of labels: its episodes are decoded, encoded and written, each of these while the next is at the others.

A shard is a function of the model, the dataset and the `Work`, bit for bit on one kind of hardware: its batches are
filled across its episodes in their order and hold nothing of other shards, whoever makes it and with however many
decoders. So both engines (this machine, Ray) call `Labeller.label` and nothing else.
Axes: B batch, T time, C channel, H W image, P pairs, L latent action length, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from lapa.data.dataset import Dataset
from lapa.data.labels import EpisodeLabels, ShardNotes, read_shard, shard_notes, write_shard
from lapa.data.windows import Decoders, Window
from lapa.engine.memory import explained_out_of_memory
from lapa.errors import UserError
from lapa.label.encoder import Encoder
from lapa.latent.model import LatentActionModel


@dataclass(frozen=True)
class Work:
    """What decides the labels of a dataset. horizon: frames; precision: fp32 or bf16."""

    dataset: Dataset
    horizon: int
    camera: str
    embeddings: bool
    batch_size: int
    min_motion: float
    precision: str
    skip_bad: bool

    def num_pairs(self, episodes: Sequence[int]) -> int:
        """Pairs that these episodes have, static ones and those of damaged episodes included."""
        lengths = self.dataset.lengths[list(episodes)]
        return int(np.maximum(lengths - self.horizon, 0).sum())


@dataclass(frozen=True)
class Shard:
    """Where the labels of the episodes `first` to `last` (inclusive) go."""

    path: Path
    first: int
    last: int

    @property
    def episodes(self) -> range:
        return range(self.first, self.last + 1)


@dataclass
class Clocks:
    """Seconds that each stage was busy, summed over those that do the same, and what the encoder waited."""

    decoding: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    waiting: float = 0.0
    total: float = 0.0
    num_pairs: int = 0

    def add(self, other: Clocks) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def told(self, num_decoders: int, num_workers: int = 1) -> str:
        """Pairs a second of each stage, and which of them binds."""
        stages = {
            "decoding": (self.decoding, max(1, num_decoders) * num_workers),
            "encoding": (self.encoding, num_workers),
            "writing": (self.writing, num_workers),
        }
        rates = {name: self.num_pairs * at_once / max(busy, 1e-9) for name, (busy, at_once) in stages.items()}
        figures = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        binding = min(rates, key=lambda name: rates[name])
        return (
            f"pairs/s of each stage while busy: {figures}; the encoder waited "
            f"{self.waiting / max(self.total, 1e-9):.0%} of the time; {binding} binds"
        )


@dataclass
class _Pairs:
    """The pairs of a shard in the order in which they are encoded: their episodes and frames.

    static: by episode, how many were left out; errors: by episode, why it cannot be read.
    """

    episodes_P: list[np.ndarray] = field(default_factory=list)
    frames_P: list[np.ndarray] = field(default_factory=list)
    static: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Labeller:
    """Makes shards, with a model and decoders of its own; use as a context manager.

    decoders: processes; 0: a thread. clocks: where the time that the stages take is added up.
    """

    def __init__(
        self, model: LatentActionModel, work: Work, device: torch.device, decoders: int, clocks: Clocks | None = None
    ) -> None:
        self.work, self.clocks = work, clocks or Clocks()
        self.encoder = Encoder(model.to(device), work.horizon, work.batch_size, work.precision, work.embeddings)
        self.decoders = Decoders(
            work.dataset,
            horizon=work.horizon,
            size=model.config.image_size,
            camera=work.camera,
            num=decoders,
            motion=work.min_motion > 0,
        )
        self._writer = ThreadPoolExecutor(1)

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.decoders.__exit__()
        # What is encoded is written, whatever went wrong after it.
        self._writer.shutdown()

    @property
    def decoding(self) -> str:
        """Who decodes, in words."""
        number = self.decoders.num
        return "a thread" if not number else f"{number} process{'es' * (number > 1)}"

    def label(self, shards: Sequence[Shard]) -> Iterator[int]:
        """Makes the shards, in order, all of them on disk in the end; yields how many episodes are encoded.

        UserError where an episode cannot be read (unless skip_bad), where a decoder was killed, or the GPU's memory
        ran out; shards that were encoded before are written.
        """
        started = time.perf_counter()
        windows = self._timed(self.decoders.windows([episode for shard in shards for episode in shard.episodes]))
        writing: Future[None] | None = None
        mend = [f"--batch-size {max(1, self.work.batch_size // 2)}"]
        num_done, busy_before = 0, self.encoder.busy
        with explained_out_of_memory(mend + ["--precision bf16"] * (self.work.precision == "fp32")):
            for shard in shards:
                of_shard = islice(windows, self.decoders.count(shard.episodes))
                pairs = _Pairs()
                for window in of_shard:
                    self._take(window, pairs)
                    yield num_done + window.episode - shard.first
                labels, notes = self._labels_of(shard, pairs)
                if writing is not None:
                    writing.result()
                writing = self._writer.submit(self._write, shard, labels, notes)
                num_done += len(shard.episodes)
                yield num_done
        if writing is not None:
            writing.result()
        self.clocks.encoding += self.encoder.busy - busy_before
        self.clocks.total += time.perf_counter() - started

    def _take(self, window: Window, pairs: _Pairs) -> None:
        """Hands a window's pairs to the encoder."""
        self.clocks.decoding += window.seconds
        if window.error is not None:
            if not self.work.skip_bad:
                raise UserError(
                    f"{window.error}; mend or replace it, or give --skip-bad to leave the episode out; "
                    "what is finished is kept, go on with --resume"
                )
            pairs.errors[window.episode] = window.error
            return
        kept_P = np.arange(len(window.frames_THWC) - self.work.horizon)
        if window.energy_P is not None:
            moves_P = window.energy_P >= self.work.min_motion
            pairs.static[window.episode] = pairs.static.get(window.episode, 0) + int((~moves_P).sum())
            kept_P = kept_P[moves_P]
        pairs.episodes_P.append(np.full(len(kept_P), window.episode))
        pairs.frames_P.append(window.first + kept_P)
        self.clocks.num_pairs += len(kept_P)
        self.encoder.add(window.frames_THWC, kept_P)

    def _labels_of(self, shard: Shard, pairs: _Pairs) -> tuple[dict[int, EpisodeLabels], ShardNotes]:
        """A shard's pairs as labels of its episodes, those that could not be read to their end left out."""
        codes_PL, z_PLD = self.encoder.finish()
        none = np.zeros(0, np.int64)
        episodes_P = np.concatenate([none, *pairs.episodes_P])
        frames_P = np.concatenate([none, *pairs.frames_P])
        labels = {}
        for episode in shard.episodes:
            rows = slice(*np.searchsorted(episodes_P, [episode, episode + 1]))
            rows = slice(0, 0) if episode in pairs.errors else rows
            labels[episode] = EpisodeLabels(
                frames_P[rows], codes_PL[rows], z_PLD[rows] if self.work.embeddings else None
            )
        static = sum(number for episode, number in pairs.static.items() if episode not in pairs.errors)
        return labels, ShardNotes(static, tuple(sorted(pairs.errors)))

    def _write(self, shard: Shard, labels: dict[int, EpisodeLabels], notes: ShardNotes) -> None:
        started = time.perf_counter()
        write_shard(shard.path, labels, notes)
        self.clocks.writing += time.perf_counter() - started

    def _timed(self, windows: Iterator[Window]) -> Iterator[Window]:
        """The windows, with the time that is spent waiting for them."""
        while True:
            started = time.perf_counter()
            window = next(windows, None)
            self.clocks.waiting += time.perf_counter() - started
            if window is None:
                return
            yield window


def read_complete(shard: Shard, work: Work) -> pa.Table:
    """The shard, read. UserError naming the file where it is damaged or does not account for all of its pairs."""
    table = read_shard(shard.path)
    notes = shard_notes(table)
    there = len(table) + notes.static_pairs + work.num_pairs(notes.bad_episodes)
    expected = work.num_pairs(shard.episodes)
    if there != expected:
        raise UserError(
            f"{shard.path}: accounts for {there} pairs where its episodes have {expected}; "
            "run `lapa label --resume`, which makes it again"
        )
    return table
