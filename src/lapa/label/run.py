"""Labels a dataset: every frame gets the latent action that leads to the frame one horizon later.

    lapa label --lam LAM --data DATASET
    lapa label --lam LAM --data rlds:bridge_dataset/1.0.0 --out LABELS       # read in place, without a converted copy
    torchrun --nproc-per-node 8 -m lapa label --lam LAM --data DATASET       # a process for each GPU of this machine
    lapa label --engine ray --ray-address auto --lam LAM --data DATASET --out s3://bucket/labels      # many machines

Episodes are labelled in shards, each written whole. A run that was killed goes on with `--resume`: finished shards
are kept, the others and the damaged ones are made, and the manifest comes last. All engines write the same files.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from lapa import config as configs
from lapa.console import finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.labels import MANIFEST, Manifest
from lapa.data.pairs import horizon_frames
from lapa.engine.distributed import Processes, start
from lapa.errors import UserError
from lapa.files import as_path, claim_output, is_remote, write_json
from lapa.label.shards import (
    Clocks,
    Labeller,
    Shard,
    Work,
    clear_up,
    forget_listing,
    make_manifest,
    make_shards,
    missing_shards,
    tell_left_out,
)
from lapa.latent.model import LatentActionModel, horizon_for, lam_fingerprint

RUN = "run.json"
# Below so many frames, other processes take longer to start than they save.
FEW_FRAMES = 4096
MOST_DECODERS = 16


@dataclass(frozen=True)
class LabelConfig:
    """Label a dataset with a latent action model."""

    lam: Path
    """Folder of the latent action model, or its id on the hub."""
    data: str
    """Dataset to label; PATH,horizon=SECONDS changes the horizon.

    docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT].
    """
    out: str | None = None
    """Folder of the labels, or its URL (s3://...); by default DATASET/labels/FINGERPRINT_OF_THE_LAM."""
    camera: str | None = None
    """Which camera's pictures; by default the dataset's first."""
    embeddings: bool = False
    """Also write the continuous latent actions, before quantisation."""
    min_motion: float = 0.0
    """Leave out pairs of frames whose brightness, from 0 to 1, changes less than this (RMS). 0.01 is a start."""
    skip_bad: bool = False
    """Leave out, and count, episodes that cannot be read; otherwise the first of them stops the command."""
    batch_size: int = 128
    """Pairs encoded at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster on a GPU; a few codes come out otherwise than in fp32."""
    decoders: int | None = None
    """Processes that decode, 0 for a thread; by default as many as the machine and the dataset are worth."""
    shard_episodes: int = 64
    """Episodes of one parquet file: what is lost at most when the run is killed."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine, one process or those of torchrun; ray: the workers of a Ray cluster (pip install lapa[ray]),
    which must reach the model, the dataset and `out` under the same names."""
    ray_address: str | None = None
    """Address of the Ray cluster, or auto for the one that runs here; by default one is started on this machine."""
    num_workers: int | None = None
    """Ray: workers, each with a model; by default as many as there is room for."""
    num_cpus: float = 1.0
    """Ray: CPU cores of a worker; may be a fraction."""
    num_gpus: float | None = None
    """Ray: GPUs of a worker; may be a fraction; by default one where the cluster has any."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


@dataclass(frozen=True)
class Plan:
    """What a command comes to. identity: what labels must share to be those of one run."""

    model: LatentActionModel
    work: Work
    horizon_seconds: float
    identity: dict[str, Any]


def run(config: LabelConfig) -> None:
    """`lapa label`. Raises UserError on bad input, or where no episode is longer than the horizon."""
    _require_sense(config)
    plan = make_plan(config)
    dataset, work = plan.work.dataset, plan.work
    out = _choose_out(config, dataset, plan.identity["lam_fingerprint"])
    if config.resume and (out / MANIFEST).exists():
        known = configs.to_dict(configs.load(Manifest, out / MANIFEST))
        configs.require_same(out / MANIFEST, plan.identity, then=known)
        finish("labels, already complete", out, _next_commands(config, out))
        return
    with start("cpu" if config.engine == "ray" else config.device) as processes:
        if config.engine == "ray" and processes.world > 1:
            raise UserError("--engine ray starts its workers itself; run it without torchrun")
        shards = make_shards(out, len(dataset.lengths), config.shard_episodes)
        missing: list[Shard] = []
        if processes.is_main:
            _claim(config, plan, out)
            clear_up(out)
            missing = missing_shards(shards, out, work)
            num_episodes = int((dataset.lengths > work.horizon).sum())
            say(
                f"labelling {num_episodes} episodes of {dataset.name}, {plan.horizon_seconds:g} s ({work.horizon} "
                f"frames) ahead; {len(shards) - len(missing)} of {len(shards)} shards are there already"
            )
        # One process looks, and tells the others before any of them writes.
        missing = processes.gather(missing)[0]
        _follow(config, plan, missing, processes)
        _wait_for_all(processes)
        if processes.is_main:
            forget_listing(out)
            manifest = make_manifest(shards, work, plan.model.config, plan.identity)
            clear_up(out)
            write_json(out / MANIFEST, configs.to_dict(manifest))
            (out / RUN).unlink()
            tell_left_out(manifest)
            finish(f"{manifest.num_rows} labels", out, _next_commands(config, out))


def make_plan(config: LabelConfig) -> Plan:
    """Opens the dataset and the model. UserError where they do not go together."""
    dataset = Dataset.open(config.data)
    model = LatentActionModel.from_pretrained(config.lam)
    if not model.discrete:
        raise UserError(
            f"{config.lam}: a continuous latent action model, which has no codes to label with; "
            "train one with --quantizer fsq"
        )
    dataset.image_shape(config.camera)
    seconds = horizon_for(config.lam, dataset, model)
    horizon, camera = horizon_frames(seconds, dataset.fps), config.camera or dataset.cameras[0]
    if not (dataset.lengths > horizon).any():
        raise UserError(
            f"{dataset.root}: all {len(dataset.lengths)} episodes are too short for the model's horizon of "
            f"{seconds:g} s ({horizon} frames at {dataset.fps:g} fps); give a shorter one (--data {config.data},"
            "horizon=SECONDS), or train a model with a shorter one"
        )
    work = Work(
        dataset,
        horizon,
        camera,
        config.embeddings,
        config.batch_size,
        config.min_motion,
        config.precision,
        config.skip_bad,
    )
    identity = {
        "lam_fingerprint": lam_fingerprint(config.lam),
        "dataset_fingerprint": dataset.fingerprint,
        "camera": camera,
        "horizon_seconds": seconds,
        "embeddings": config.embeddings,
        "min_motion": config.min_motion,
        "precision": config.precision,
    }
    return Plan(model, work, seconds, identity)


def _require_sense(config: LabelConfig) -> None:
    for name, least in (
        ("batch_size", 1),
        ("shard_episodes", 1),
        ("num_workers", 1),
        ("decoders", 0),
        ("min_motion", 0),
    ):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")


def _choose_out(config: LabelConfig, dataset: Dataset, fingerprint: str) -> Path:
    if config.out is None and dataset.in_place:
        raise UserError(
            f"{config.data}: is read in place, and nothing is written into {dataset.root}; say with --out where its "
            "labels go"
        )
    out = as_path(config.out) if config.out else dataset.root / "labels" / fingerprint
    if config.engine == "ray" and is_remote(out) and getattr(out, "protocol", "") == "memory":
        raise UserError(f"{out}: is the memory of this process, which Ray's workers do not share; give another --out")
    return out


def _claim(config: LabelConfig, plan: Plan, out: Path) -> None:
    complete = (out / MANIFEST).exists()
    inputs = [config.lam, plan.work.dataset.root]
    claim_output(out, complete=complete, overwrite=config.overwrite, resume=config.resume, inputs=inputs)
    shape = {**plan.identity, "shard_episodes": config.shard_episodes}
    configs.require_same(out / RUN, shape)
    write_json(out / RUN, shape)


def _follow(config: LabelConfig, plan: Plan, missing: list[Shard], processes: Processes) -> None:
    """Makes the missing shards with the engine that was asked for, and says how fast each stage was."""
    clocks, started = Clocks(), time.monotonic()
    if config.engine == "ray":
        # Ray takes seconds to import.
        from lapa.label.ray_engine import label_with_ray

        counts, num_episodes = label_with_ray(config, plan.identity, missing, clocks), _count(missing)
    else:
        mine = missing[processes.rank :: processes.world]
        counts, num_episodes = _label_here(config, plan, mine, clocks, processes.device), _count(mine)
    with progress() as bar:
        task = bar.add_task("labelling", total=num_episodes, note="")
        for num_done in counts:
            rate = clocks.num_pairs / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=num_done, note=f"{rate:.0f} pairs/s")


def _label_here(
    config: LabelConfig, plan: Plan, shards: list[Shard], clocks: Clocks, device: torch.device
) -> Iterator[int]:
    num_frames = sum(int(plan.work.dataset.lengths[shard.first : shard.last + 1].sum()) for shard in shards)
    decoders = choose_decoders(config.decoders, device, num_frames)
    with Labeller(plan.model, plan.work, device, decoders, clocks) as labeller:
        say(f"encoding on {device}, {plan.work.precision}; decoding in {labeller.decoding}")
        yield from labeller.label(shards)
    if clocks.num_pairs:
        say(clocks.told(decoders))


def choose_decoders(asked: int | None, device: torch.device, num_frames: int) -> int:
    """Processes that decode, 0 for a thread: a GPU wants the cores to feed it, a CPU most of them for itself."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_frames < FEW_FRAMES or cores < 2:
        return 0
    return min(MOST_DECODERS, cores - 1 if device.type == "cuda" else max(1, cores // 4))


def _count(shards: Sequence[Shard]) -> int:
    return sum(len(shard.episodes) for shard in shards)


def _wait_for_all(processes: Processes) -> None:
    if processes.world > 1:
        dist.barrier()


def _next_commands(config: LabelConfig, out: Path) -> list[str]:
    words = ["lapa", "policy", "pretrain", "--data", str(config.data), "--labels", str(out), "--out", "POLICY"]
    return [shlex.join(words)]
