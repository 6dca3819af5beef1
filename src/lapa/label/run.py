"""Labels a dataset: every frame gets the latent action that leads to the frame one horizon later.

lapa label --lam LAM --data DATASET
torchrun --nproc-per-node 8 -m lapa label --lam LAM --data DATASET

Episodes are labelled in shards, each written whole. A run that was killed goes on with `--resume`: finished shards
are kept, the others are made, and the manifest comes last. Processes started by torchrun share the shards out.
Axes: T time, C channel, H W image, L latent action length, D width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from einops import rearrange

from lapa import config as configs
from lapa.console import finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.labels import MANIFEST, EpisodeLabels, Manifest, shard_path, write_shard
from lapa.data.pairs import horizon_frames
from lapa.data.windows import decoded_windows, window_starts
from lapa.engine.distributed import Processes, start
from lapa.files import as_path, claim_output, write_json
from lapa.latent.model import LatentActionModel, lam_fingerprint

RUN = "run.json"


@dataclass(frozen=True)
class LabelConfig:
    """Label a dataset with a latent action model."""

    lam: Path
    """Folder of the latent action model, or its id on the hub."""
    data: str
    """Dataset to label."""
    out: str | None = None
    """Folder of the labels; by default DATASET/labels/FINGERPRINT_OF_THE_LAM."""
    camera: str | None = None
    """Which camera's pictures; by default the dataset's first."""
    embeddings: bool = False
    """Also write the continuous latent actions, before quantisation."""
    batch_size: int = 128
    """Pairs encoded at once."""
    shard_episodes: int = 64
    """Episodes of one parquet file: what is lost at most when the run is killed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


def run(config: LabelConfig) -> None:
    """`lapa label`. Raises ValueError on bad input, or where no episode is longer than the horizon."""
    dataset = Dataset.open(config.data)
    model = LatentActionModel.from_pretrained(config.lam)
    if not model.discrete:
        raise ValueError(
            f"{config.lam}: a continuous latent action model, which has no codes to label with; "
            "train one with --quantizer fsq"
        )
    horizon = horizon_frames(model.horizon, dataset.fps)
    fingerprint = lam_fingerprint(config.lam)
    out = as_path(config.out) if config.out else dataset.root / "labels" / fingerprint
    identity = {
        "lam_fingerprint": fingerprint,
        "dataset_fingerprint": dataset.fingerprint,
        "camera": config.camera or dataset.cameras[0],
        "embeddings": config.embeddings,
    }
    dataset.image_shape(config.camera)
    long_enough = int((dataset.lengths > horizon).sum())
    if not long_enough:
        raise ValueError(
            f"{dataset.root}: all {len(dataset.lengths)} episodes are too short for the model's horizon of "
            f"{model.horizon:g} s ({horizon} frames at {dataset.fps:g} fps); train a model with a shorter horizon"
        )
    if config.resume and (out / MANIFEST).exists():
        configs.require_same(out / MANIFEST, identity)
        finish("labels, already complete", out, _next_commands(config, out))
        return
    with start(config.device) as processes:
        if processes.is_main:
            complete = (out / MANIFEST).exists()
            inputs = [config.lam, dataset.root]
            claim_output(out, complete=complete, overwrite=config.overwrite, resume=config.resume, inputs=inputs)
            shape = {**identity, "shard_episodes": config.shard_episodes}
            configs.require_same(out / RUN, shape)
            write_json(out / RUN, shape)
        _wait_for_all(processes)
        shards = _shards(out, len(dataset.lengths), config.shard_episodes)
        missing = [shard for shard in shards if not shard[0].exists()]
        say(
            f"labelling {long_enough} episodes of {dataset.name} on {processes.device}, {model.horizon:g} s "
            f"({horizon} frames) ahead; {len(shards) - len(missing)} of {len(shards)} shards are there already"
        )
        _label_shards(model.to(processes.device), dataset, horizon, missing[processes.rank :: processes.world], config)
        _wait_for_all(processes)
        if processes.is_main:
            manifest = _manifest(out, shards, model, dataset, horizon, identity)
            write_json(out / MANIFEST, configs.to_dict(manifest))
            (out / RUN).unlink()
            if manifest.skipped_episodes:
                say(f"{manifest.skipped_episodes} episodes skipped: not longer than the horizon")
            finish(f"{manifest.num_rows} labels", out, _next_commands(config, out))


def encode_pairs(
    model: LatentActionModel, frames_THWC: np.ndarray, horizon: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [P, L] and continuous latents [P, L, D] of the P pairs (t, t + horizon) in consecutive frames.

    frames_THWC: uint8, at the model's size; P = T - horizon, none where that is below one.
    """
    device, config = next(model.parameters()).device, model.config
    frames_TCHW = torch.from_numpy(np.ascontiguousarray(rearrange(frames_THWC, "t h w c -> t c h w")))
    num_pairs = max(0, len(frames_TCHW) - horizon)
    codes_PL = np.zeros((num_pairs, config.latent_length), np.int64)
    z_PLD = np.zeros((num_pairs, config.latent_length, config.quant_dim), np.float32)
    for first in range(0, num_pairs, batch_size):
        last = min(first + batch_size, num_pairs)
        pairs = torch.stack([frames_TCHW[first:last], frames_TCHW[first + horizon : last + horizon]], dim=1)
        action = model.encode(pairs.to(device))
        assert action.codes_BL is not None
        codes_PL[first:last] = action.codes_BL.cpu().numpy()
        z_PLD[first:last] = action.z_BLD.float().cpu().numpy()
    return codes_PL, z_PLD


Shard = tuple[Path, range]


def _shards(out: Path, num_episodes: int, size: int) -> list[Shard]:
    return [
        (shard_path(out, first, min(first + size, num_episodes) - 1), range(first, min(first + size, num_episodes)))
        for first in range(0, num_episodes, size)
    ]


def _label_shards(
    model: LatentActionModel, dataset: Dataset, horizon: int, shards: list[Shard], config: LabelConfig
) -> None:
    episodes = [episode for _, members in shards for episode in members]
    windows = decoded_windows(dataset, episodes, horizon, config.camera, model.config.image_size)
    started, num_rows = time.monotonic(), 0
    with progress() as bar:
        task = bar.add_task("labelling", total=len(episodes), note="")
        for path, members in shards:
            labels = {}
            for episode in members:
                encoded = [
                    encode_pairs(model, next(windows), horizon, config.batch_size)
                    for _ in window_starts(int(dataset.lengths[episode]), horizon)
                ]
                codes_TL, z_TLD = (np.concatenate(parts) for parts in zip(*encoded, strict=True))
                labels[episode] = EpisodeLabels(
                    np.arange(len(codes_TL)), codes_TL, z_TLD if config.embeddings else None
                )
                num_rows += len(codes_TL)
                bar.update(task, advance=1, note=f"{num_rows / (time.monotonic() - started):.0f} pairs/s")
            write_shard(path, labels)


def _manifest(
    out: Path, shards: list[Shard], model: LatentActionModel, dataset: Dataset, horizon: int, identity: dict
) -> Manifest:
    """Counts what the shards hold, reading them one by one."""
    length, size = model.config.latent_length, model.config.codebook_size
    counts_LK, num_rows, num_episodes = np.zeros((length, size), np.int64), 0, 0
    for path, _ in shards:
        table = pq.read_table(path, columns=["episode_index", "codes"])
        codes_TL = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, length)
        for position in range(length):
            counts_LK[position] += np.bincount(codes_TL[:, position], minlength=size)
        num_rows += len(codes_TL)
        num_episodes += len(table["episode_index"].unique())
    expected = int(np.maximum(dataset.lengths - horizon, 0).sum())
    assert num_rows == expected, f"{out}: {num_rows} rows where {expected} were expected"
    return Manifest(
        lam_fingerprint=identity["lam_fingerprint"],
        dataset_fingerprint=identity["dataset_fingerprint"],
        camera=identity["camera"],
        horizon_seconds=model.horizon,
        horizon_frames=horizon,
        latent_length=length,
        codebook_size=size,
        num_rows=num_rows,
        num_episodes=num_episodes,
        skipped_episodes=len(dataset.lengths) - num_episodes,
        code_usage=(counts_LK / num_rows).tolist(),
        embeddings=identity["embeddings"],
    )


def _wait_for_all(processes: Processes) -> None:
    if processes.world > 1:
        dist.barrier()


def _next_commands(config: LabelConfig, out: Path) -> list[str]:
    return [f"lapa policy pretrain --data {config.data} --labels {out} --out POLICY"]
