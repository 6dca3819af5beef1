"""Shards of labels: episodes are decoded, encoded and written, each stage while the next one works.

A shard is a function of the model, the dataset and the options, bit for bit on one kind of hardware: its batches are
filled across its episodes in their order and hold nothing of other shards, whichever process makes it and with however
many decoders. So both engines (this machine, Ray) call `Labeller.label` and nothing else.
Axes: B batch, T time, C channel, H W image, P pairs, L latent action length, D width, K codebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from lapa.console import warn
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
    table_codes,
    write_shard,
)
from lapa.data.pairs import horizon_frames
from lapa.data.spec import open_dataset
from lapa.engine.memory import explained_out_of_memory
from lapa.errors import UserError
from lapa.files import find_files
from lapa.labelling.config import LabelConfig
from lapa.latent.model import LatentActionModel, horizon_for, lam_fingerprint


@dataclass(frozen=True)
class Plan:
    """A labelling run: its options, model and dataset.

    horizon: in frames; identity: the settings that all labels of one run share.
    """

    config: LabelConfig
    model: LatentActionModel
    dataset: Dataset
    camera: str
    horizon: int
    horizon_seconds: float
    identity: dict[str, Any]

    def num_pairs(self, episodes: Sequence[int]) -> int:
        """Returns the number of pairs of these episodes, static ones and those of damaged episodes included."""
        return int(np.maximum(self.dataset.lengths[list(episodes)] - self.horizon, 0).sum())


@dataclass(frozen=True)
class Shard:
    """The file with the labels of the episodes `first` to `last` (inclusive)."""

    path: Path
    first: int
    last: int

    @property
    def episodes(self) -> range:
        return range(self.first, self.last + 1)


def make_plan(config: LabelConfig) -> Plan:
    """Opens the dataset and the model. Raises UserError where they do not fit together."""
    dataset = open_dataset(config.data)
    model = LatentActionModel.from_pretrained(config.lam)
    if not model.discrete:
        raise UserError(
            f"{config.lam}: a continuous latent action model, which has no codes to label with; "
            "train one with --quantizer fsq"
        )
    seconds = horizon_for(config.lam, dataset, model)
    horizon, camera = horizon_frames(seconds, dataset.fps), dataset.camera_name(config.camera)
    dataset.require_files([camera])
    if not (dataset.lengths > horizon).any():
        raise UserError(
            f"{dataset.root}: all {len(dataset.lengths)} episodes are too short for the model's horizon of "
            f"{seconds:g} s ({horizon} frames at {dataset.fps:g} fps); give a shorter one (--data {config.data},"
            "horizon=SECONDS), or train a model with a shorter one"
        )
    identity = {
        "lam_fingerprint": lam_fingerprint(config.lam),
        "dataset_fingerprint": dataset.fingerprint,
        "camera": camera,
        "horizon_seconds": seconds,
        "embeddings": config.embeddings or config.lary,
        "min_motion": config.min_motion,
        "precision": config.precision,
    }
    return Plan(config, model, dataset, camera, horizon, seconds, identity)


def make_shards(out: Path, num_episodes: int, size: int) -> list[Shard]:
    """Returns all episodes, `size` to a shard."""
    ends = [(first, min(first + size, num_episodes) - 1) for first in range(0, num_episodes, size)]
    return [Shard(shard_path(out, first, last), first, last) for first, last in ends]


def missing_shards(shards: Sequence[Shard], out: Path, plan: Plan) -> list[Shard]:
    """Returns the shards to make: those without a file, or with a damaged one."""
    there = {path.name for path in find_files(out, SHARDS)}
    missing = []
    for shard in shards:
        if shard.path.name in there:
            try:
                read_complete(shard, plan)
                continue
            except UserError as error:
                warn(f"{str(error).partition(';')[0]}; it is made again")
        missing.append(shard)
    return missing


def read_complete(shard: Shard, plan: Plan) -> pa.Table:
    """Reads a shard. Raises UserError naming the file where it is damaged or does not account for all of its pairs."""
    table = read_shard(shard.path)
    notes = shard_notes(shard.path, table)
    there = len(table) + notes.static_pairs + plan.num_pairs(notes.bad_episodes)
    expected = plan.num_pairs(shard.episodes)
    if there != expected:
        raise UserError(
            f"{shard.path}: accounts for {there} pairs where its episodes have {expected}; "
            "run `lapa label --resume`, which makes it again"
        )
    return table


def make_manifest(shards: Sequence[Shard], plan: Plan) -> Manifest:
    """Counts the rows of the shards, reading one by one. Raises UserError where one is damaged or all are empty."""
    lengths, length, size = plan.dataset.lengths, plan.model.config.latent_length, plan.model.config.codebook_size
    counts_LK, num_rows, num_episodes, static, bad = np.zeros((length, size), np.int64), 0, 0, 0, list[int]()
    for shard in shards:
        table = read_complete(shard, plan)
        codes_TL = table_codes(table, length, size, shard.path)
        for position in range(length):
            counts_LK[position] += np.bincount(codes_TL[:, position], minlength=size)
        num_rows += len(codes_TL)
        num_episodes += pc.count_distinct(table["episode_index"]).as_py()
        notes = shard_notes(shard.path, table)
        static += notes.static_pairs
        bad += notes.bad_episodes
    if not num_rows:
        raise UserError(
            f"{plan.dataset.root}: no pair is left to label: {static} of {plan.num_pairs(range(len(lengths)))} are "
            f"static below --min-motion {plan.config.min_motion:g}, {len(bad)} episodes cannot be read"
        )
    return Manifest(
        **plan.identity,
        horizon_frames=plan.horizon,
        latent_length=length,
        codebook_size=size,
        num_rows=num_rows,
        num_episodes=num_episodes,
        skipped_episodes=int((lengths <= plan.horizon).sum()),
        code_usage=(counts_LK / num_rows).tolist(),
        static_pairs=static,
        bad_episodes=tuple(bad),
    )


@dataclass
class _Pairs:
    """The pairs of a shard in the order in which they are encoded: their episodes and frames.

    num_seen: static ones included; static: number left out, by episode; errors: why an episode cannot be read.
    """

    episodes_P: list[np.ndarray] = field(default_factory=list)
    frames_P: list[np.ndarray] = field(default_factory=list)
    num_seen: int = 0
    static: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


class Labeller:
    """Makes shards, with decoders of its own; use as a context manager. decoders: processes; 0: a thread."""

    def __init__(self, plan: Plan, device: torch.device, decoders: int) -> None:
        self.plan = plan
        self.encoder = Encoder(plan, device)
        self.decoders = EpisodeDecoders(
            plan.dataset,
            horizon=plan.horizon,
            size=plan.model.config.image_size,
            camera=plan.camera,
            num=decoders,
            motion=plan.config.min_motion > 0,
        )
        self._writer = ThreadPoolExecutor(1)

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.decoders.__exit__()
        # Whatever is encoded is written, even after an error.
        self._writer.shutdown()

    def label(self, shards: Sequence[Shard]) -> Iterator[int]:
        """Makes the shards, in order; yields the number of pairs that are done. All are on disk in the end.

        Raises UserError where an episode cannot be read (unless skip_bad), a decoder was killed, or the GPU is out of
        memory; shards that were encoded before are written.
        """
        config, num_done = self.plan.config, 0
        windows = self.decoders.windows([episode for shard in shards for episode in shard.episodes])
        writing: Future[None] | None = None
        remedies = [f"--batch-size {max(1, config.batch_size // 2)}"]
        with explained_out_of_memory(remedies + ["--precision bf16"] * (config.precision == "fp32")):
            for shard in shards:
                pairs = _Pairs()
                for window in islice(windows, self.decoders.count(shard.episodes)):
                    self._take(window, pairs)
                    yield num_done + pairs.num_seen
                labels, notes = self._labels_of(shard, pairs)
                if writing is not None:
                    writing.result()
                writing = self._writer.submit(write_shard, shard.path, labels, notes)
                num_done += self.plan.num_pairs(shard.episodes)
                yield num_done
        if writing is not None:
            writing.result()

    def _take(self, window: Window, pairs: _Pairs) -> None:
        """Hands a window's pairs to the encoder."""
        if window.error is not None:
            if not self.plan.config.skip_bad:
                raise UserError(
                    f"{window.error}; fix or replace it, or give --skip-bad to leave the episode out; "
                    "what is finished is kept, continue with --resume"
                )
            pairs.errors[window.episode] = window.error
            return
        kept_P = np.arange(len(window.frames_THWC) - self.plan.horizon)
        pairs.num_seen += len(kept_P)
        if window.energy_P is not None:
            moves_P = window.energy_P >= self.plan.config.min_motion
            pairs.static[window.episode] = pairs.static.get(window.episode, 0) + int((~moves_P).sum())
            kept_P = kept_P[moves_P]
        pairs.episodes_P.append(np.full(len(kept_P), window.episode))
        pairs.frames_P.append(window.first + kept_P)
        self.encoder.add(window.frames_THWC, kept_P)

    def _labels_of(self, shard: Shard, pairs: _Pairs) -> tuple[dict[int, EpisodeLabels], ShardNotes]:
        """Returns a shard's pairs as labels of its episodes, without those that could not be read to their end."""
        codes_PL, z_PLD = self.encoder.finish()
        none = np.zeros(0, np.int64)
        episodes_P = np.concatenate([none, *pairs.episodes_P])
        frames_P = np.concatenate([none, *pairs.frames_P])
        labels = {}
        for episode in shard.episodes:
            rows = slice(*np.searchsorted(episodes_P, [episode, episode + 1]))
            rows = slice(0, 0) if episode in pairs.errors else rows
            embeddings = z_PLD[rows] if self.plan.identity["embeddings"] else None
            labels[episode] = EpisodeLabels(frames_P[rows], codes_PL[rows], embeddings)
        static = sum(number for episode, number in pairs.static.items() if episode not in pairs.errors)
        return labels, ShardNotes(static, tuple(sorted(pairs.errors)))


class Encoder:
    """Encodes pairs in full batches that are filled across windows and episodes: `add` windows, then `finish`.

    Frames go to the device once and pairs are made there. On a GPU a batch is queued while the one before is computed:
    codes come back one batch late, so that the GPU does not wait for this process.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.model, self.horizon, self.config = plan.model.to(device), plan.horizon, plan.config
        self.device, self.embeddings = device, plan.identity["embeddings"]
        self._parts: list[Tensor] = []
        self._num_waiting = 0
        self._codes: list[np.ndarray] = []
        self._z: list[np.ndarray] = []
        self._computed: tuple[Tensor, Tensor] | None = None

    def add(self, frames_THWC: UInt8[np.ndarray, "T H W 3"], starts_P: Int64[np.ndarray, "P"]) -> None:
        """Takes the pairs that begin with these frames; encodes each full batch. The frames may change afterwards."""
        if not len(starts_P):
            return
        frames = torch.from_numpy(frames_THWC)
        if self.device.type == "cuda":
            frames = frames.pin_memory().to(self.device, non_blocking=True)
        frames_TCHW, starts = frames.permute(0, 3, 1, 2), torch.from_numpy(starts_P).to(self.device)
        while len(starts):
            taken, starts = starts.tensor_split([self.config.batch_size - self._num_waiting])
            self._parts.append(torch.stack([frames_TCHW[taken], frames_TCHW[taken + self.horizon]], dim=1))
            self._num_waiting += len(taken)
            if self._num_waiting == self.config.batch_size:
                self._encode()

    def finish(self) -> tuple[Int64[np.ndarray, "P L"], Float[np.ndarray, "P L D"]]:
        """Returns the codes of all pairs since the last `finish`, in order, and the latents where they are kept."""
        if self._num_waiting:
            self._encode()
        self._fetch()
        config = self.model.config
        none_PLD = np.zeros((0, config.latent_length, config.quant_dim), np.float32)
        codes_PL = np.concatenate([none_PLD[..., 0].astype(np.int64), *self._codes])
        z_PLD = np.concatenate([none_PLD, *self._z])
        self._codes, self._z = [], []
        return codes_PL, z_PLD

    def encode(self, pairs_BTCHW: UInt8[Tensor, "B 2 3 H W"]) -> tuple[Int64[Tensor, "B L"], Float[Tensor, "B L D"]]:
        """Returns codes and continuous latents of a batch, at the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            action = self.model.encode(pairs_BTCHW)
        assert action.codes_BL is not None
        return action.codes_BL, action.z_BLD.float()

    def _encode(self) -> None:
        pairs_BTCHW = torch.cat(self._parts).contiguous()
        self._parts, self._num_waiting = [], 0
        computing = self.encode(pairs_BTCHW)
        self._fetch()
        self._computed = computing

    def _fetch(self) -> None:
        """Waits for the last batch and keeps its results."""
        if self._computed is None:
            return
        codes_BL, z_BLD = self._computed
        self._codes.append(codes_BL.cpu().numpy())
        if self.embeddings:
            self._z.append(z_BLD.cpu().numpy())
        self._computed = None
