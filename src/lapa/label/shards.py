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
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lapa.console import say, warn
from lapa.data.dataset import Dataset
from lapa.data.episode_decoders import EpisodeDecoders, Window
from lapa.data.labels import (
    SHARDS,
    EpisodeLabels,
    Manifest,
    ShardNotes,
    read_shard,
    shard_notes,
    shard_path,
    write_shard,
)
from lapa.engine.memory import explained_out_of_memory
from lapa.errors import UserError
from lapa.files import is_remote
from lapa.latent.config import LatentModelConfig
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
        self.decoders = EpisodeDecoders(
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


class Encoder:
    """`add` windows of frames, then `finish`. busy: seconds of encoding so far, by the device's own clock.

    precision: fp32, or bf16 by autocast. batch_size: pairs encoded at once, but for the last ones before `finish`.
    embeddings: keep the continuous latents too.
    """

    def __init__(
        self, model: LatentActionModel, horizon: int, batch_size: int, precision: str = "fp32", embeddings: bool = True
    ) -> None:
        self.model, self.horizon, self.batch_size = model, horizon, batch_size
        self.half, self.embeddings = precision == "bf16", embeddings
        self.device = next(model.parameters()).device
        self.busy = 0.0
        self._on_gpu = self.device.type == "cuda"
        self._parts: list[Tensor] = []
        self._num_waiting = 0
        self._codes: list[np.ndarray] = []
        self._z: list[np.ndarray] = []
        self._computed: tuple[Tensor, Tensor, Any] | None = None

    def add(self, frames_THWC: UInt8[np.ndarray, "T H W 3"], starts_P: Int64[np.ndarray, "P"]) -> None:
        """Takes the pairs that begin with these frames; encodes what fills a batch. The frames may change after."""
        if not len(starts_P):
            return
        frames = torch.from_numpy(frames_THWC)
        if self._on_gpu:
            frames = frames.pin_memory().to(self.device, non_blocking=True)
        frames_TCHW, starts = frames.permute(0, 3, 1, 2), torch.from_numpy(starts_P).to(self.device)
        while len(starts):
            taken, starts = starts.tensor_split([self.batch_size - self._num_waiting])
            self._parts.append(torch.stack([frames_TCHW[taken], frames_TCHW[taken + self.horizon]], dim=1))
            self._num_waiting += len(taken)
            if self._num_waiting == self.batch_size:
                self._encode()

    def finish(self) -> tuple[Int64[np.ndarray, "P L"], Float[np.ndarray, "P L D"]]:
        """Codes of all pairs since the last `finish`, in order; continuous latents too, where they are kept."""
        if self._num_waiting:
            self._encode()
        self._fetch()
        config = self.model.config
        none_PLD = np.zeros((0, config.latent_length, config.quant_dim), np.float32)
        codes_PL = np.concatenate([none_PLD[..., 0].astype(np.int64), *self._codes])
        z_PLD = np.concatenate([none_PLD, *self._z])
        self._codes, self._z = [], []
        return codes_PL, z_PLD

    def _encode(self) -> None:
        pairs_BTCHW = torch.cat(self._parts).contiguous()
        self._parts, self._num_waiting = [], 0
        begun = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            action = self.model.encode(pairs_BTCHW)
        assert action.codes_BL is not None
        computing = (action.codes_BL, action.z_BLD.float(), (begun, self._now()))
        self._fetch()
        self._computed = computing

    def _fetch(self) -> None:
        """Waits for the last batch and keeps what it gave."""
        if self._computed is None:
            return
        codes_BL, z_BLD, (begun, ended) = self._computed
        self._codes.append(codes_BL.cpu().numpy())
        if self.embeddings:
            self._z.append(z_BLD.cpu().numpy())
        self.busy += begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun
        self._computed = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def make_shards(out: Path, num_episodes: int, size: int) -> list[Shard]:
    """All episodes, `size` to a shard."""
    ends = [(first, min(first + size, num_episodes) - 1) for first in range(0, num_episodes, size)]
    return [Shard(shard_path(out, first, last), first, last) for first, last in ends]


def missing_shards(shards: Sequence[Shard], out: Path, work: Work) -> list[Shard]:
    """The shards to make: those that are not there, or not whole."""
    there = {path.name for path in out.glob(SHARDS)}
    missing = []
    for shard in shards:
        if shard.path.name in there:
            try:
                read_complete(shard, work)
                continue
            except ValueError as error:
                warn(f"{str(error).partition(';')[0]}; it is made again")
        missing.append(shard)
    return missing


def make_manifest(shards: Sequence[Shard], work: Work, model: LatentModelConfig, identity: dict[str, Any]) -> Manifest:
    """Counts what the shards hold, reading them one by one. UserError where one is not whole, or none has a row."""
    lengths, length, size = work.dataset.lengths, model.latent_length, model.codebook_size
    counts_LK, num_rows, num_episodes, static, bad = np.zeros((length, size), np.int64), 0, 0, 0, list[int]()
    for shard in shards:
        table = read_complete(shard, work)
        codes_TL = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, length)
        for position in range(length):
            counts_LK[position] += np.bincount(codes_TL[:, position], minlength=size)
        num_rows += len(codes_TL)
        num_episodes += pc.count_distinct(table["episode_index"]).as_py()
        notes = shard_notes(table)
        static += notes.static_pairs
        bad += notes.bad_episodes
    if not num_rows:
        raise UserError(
            f"{work.dataset.root}: no pair is left to label: {static} of {work.num_pairs(range(len(lengths)))} are "
            f"static below --min-motion {work.min_motion:g}, {len(bad)} episodes cannot be read"
        )
    return Manifest(
        **identity,
        horizon_frames=work.horizon,
        latent_length=length,
        codebook_size=size,
        num_rows=num_rows,
        num_episodes=num_episodes,
        skipped_episodes=int((lengths <= work.horizon).sum()),
        code_usage=(counts_LK / num_rows).tolist(),
        static_pairs=static,
        bad_episodes=tuple(bad),
    )


def forget_listing(out: Path) -> None:
    """Before what other processes have written is read: clients of stores see no more than they listed."""
    if is_remote(out):
        cast(Any, out).fs.invalidate_cache()


def tell_left_out(manifest: Manifest) -> None:
    """Says what has no label, and why."""
    if manifest.skipped_episodes:
        say(f"{manifest.skipped_episodes} episodes skipped: not longer than the horizon")
    if manifest.static_pairs:
        all_pairs = manifest.num_rows + manifest.static_pairs
        say(f"{manifest.static_pairs} of {all_pairs} pairs left out: less than {manifest.min_motion:g} moves in them")
    if manifest.bad_episodes:
        named = ", ".join(map(str, manifest.bad_episodes[:10])) + ", ..." * (len(manifest.bad_episodes) > 10)
        warn(f"{len(manifest.bad_episodes)} episodes left out, since they cannot be read: {named}")


def clear_up(out: Path) -> None:
    """Removes what processes that were killed have left: hidden files, named after the shards that they were at."""
    for path in out.glob(".episodes-*"):
        path.unlink()
