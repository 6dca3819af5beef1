"""Labels a dataset: every frame gets the latent action that leads to the frame one horizon later.

    lapa label --lam LAM --data DATASET
    lapa label --lam LAM --data rlds:bridge_dataset/1.0.0 --out LABELS       # read in place, without a converted copy
    torchrun --nproc-per-node 8 -m lapa label --lam LAM --data DATASET       # a process for each GPU of this machine
    lapa label --engine ray --ray.address auto --lam LAM --data DATASET --out s3://bucket/labels      # many machines

Episodes are labelled in shards, each written whole. A run that was killed continues with `--resume`: finished shards
are kept, missing and damaged ones are made, and the manifest comes last. All engines write the same files.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from lapa import config as configs
from lapa.console import finish, progress, say, warn
from lapa.data.labels import MANIFEST, Labels, Manifest, read_manifest, write_manifest
from lapa.engine.distributed import Processes, start
from lapa.errors import UserError
from lapa.files import as_path, claim_output, is_remote, write_json
from lapa.labelling import lary
from lapa.labelling.config import LabelConfig
from lapa.labelling.shards import Labeller, Plan, Shard, make_manifest, make_plan, make_shards, missing_shards
from lapa.locks import locks_output
from lapa.ray_cluster import check_ray

RUN = "run.json"
# Below this number of frames, other processes take longer to start than they save.
FEW_FRAMES = 4096
MOST_DECODERS = 16


@locks_output
def run(config: LabelConfig) -> None:
    """`lapa label`. Raises UserError on bad input, or where no episode is longer than the horizon."""
    _check_options(config)
    plan = make_plan(config)
    dataset = plan.dataset
    out = _choose_out(plan)
    next_command = shlex.join(["lapa", "policy", "pretrain", "--data", str(config.data), "--labels", str(out)])
    next_commands = [f"{next_command} --out POLICY"]
    if config.lary:
        lary.require_actions(plan)
    if config.resume and (out / MANIFEST).exists():
        known = configs.to_dict(read_manifest(out))
        configs.require_same(out / MANIFEST, plan.identity, then=known)
        if config.lary:
            lary.export(Labels.open(out), plan)
        finish("labels, already complete", out, next_commands)
        return
    with start("cpu" if config.engine == "ray" else config.device) as processes:
        if config.engine == "ray" and processes.world > 1:
            raise UserError("--engine ray starts its workers itself; run it without torchrun")
        shards = make_shards(out, len(dataset.lengths), config.shard_episodes)
        missing: list[Shard] = []
        if processes.is_main:
            claim_output(
                out,
                complete=(out / MANIFEST).exists(),
                overwrite=config.overwrite,
                resume=config.resume,
                inputs=[config.lam, dataset.root],
            )
            settings = {**plan.identity, "shard_episodes": config.shard_episodes}
            configs.require_same(out / RUN, settings)
            write_json(out / RUN, settings)
            _remove_leftovers(out)
            missing = missing_shards(shards, out, plan)
            num_episodes = int((dataset.lengths > plan.horizon).sum())
            say(
                f"labelling {num_episodes} episodes of {dataset.name}, {plan.horizon_seconds:g} s ({plan.horizon} "
                f"frames) ahead; {len(shards) - len(missing)} of {len(shards)} shards are there already"
            )
        # One process looks for shards, and shares the result before any process writes.
        missing = processes.gather(missing)[0]
        _make_shards(plan, missing, processes)
        if processes.world > 1:
            dist.barrier()
        if processes.is_main:
            if is_remote(out):
                # Clients of stores remember listings, and other processes have written since.
                cast(Any, out).fs.invalidate_cache()
            manifest = make_manifest(shards, plan)
            _remove_leftovers(out)
            write_manifest(out, manifest)
            (out / RUN).unlink()
            _report_left_out(manifest)
            if config.lary:
                lary.export(Labels.open(out), plan)
            finish(f"{manifest.num_rows} labels", out, next_commands)


def choose_decoders(asked: int | None, device: torch.device, num_frames: int) -> int:
    """Returns the number of decoding processes, 0 for a thread: nearly all cores for a GPU, few for a CPU."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_frames < FEW_FRAMES or cores < 2:
        return 0
    return min(MOST_DECODERS, cores - 1 if device.type == "cuda" else max(1, cores // 4))


def _check_options(config: LabelConfig) -> None:
    for name, value, smallest in (
        ("batch-size", config.batch_size, 1),
        ("shard-episodes", config.shard_episodes, 1),
        ("decoders", config.decoders, 0),
        ("min-motion", config.min_motion, 0),
    ):
        if value is not None and value < smallest:
            raise UserError(f"--{name} {value}: must be at least {smallest}")
    check_ray(config.ray)


def _choose_out(plan: Plan) -> Path:
    config, dataset = plan.config, plan.dataset
    if config.out is None and dataset.in_place:
        raise UserError(
            f"{config.data}: is read in place, and nothing is written into {dataset.root}; give a folder for the "
            "labels with --out"
        )
    out = as_path(config.out) if config.out else dataset.root / "labels" / plan.identity["lam_fingerprint"]
    if config.lary and is_remote(out):
        raise UserError(f"{out}: --lary writes files for programs that read local folders; give one as --out")
    if config.engine == "ray" and is_remote(out) and getattr(out, "protocol", "") == "memory":
        raise UserError(f"{out}: is the memory of this process, which Ray's workers do not share; give another --out")
    return out


def _make_shards(plan: Plan, missing: list[Shard], processes: Processes) -> None:
    """Makes the missing shards with the engine that was asked for, and shows the progress in pairs."""
    if plan.config.engine == "ray":
        # Ray takes seconds to import.
        from lapa.labelling.ray_engine import label_with_ray

        counts = label_with_ray(plan, missing)
    else:
        missing = missing[processes.rank :: processes.world]
        counts = _label_here(plan, missing, processes.device)
    started = time.monotonic()
    with progress() as bar:
        task = bar.add_task("labelling pairs", total=sum(plan.num_pairs(shard.episodes) for shard in missing), note="")
        for num_done in counts:
            rate = num_done / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=num_done, note=f"{rate:.0f} pairs/s")


def _label_here(plan: Plan, shards: list[Shard], device: torch.device) -> Iterator[int]:
    num_frames = sum(int(plan.dataset.lengths[shard.first : shard.last + 1].sum()) for shard in shards)
    with Labeller(plan, device, choose_decoders(plan.config.decoders, device, num_frames)) as labeller:
        number = labeller.decoders.num
        decoding = "a thread" if not number else f"{number} process{'es' * (number > 1)}"
        say(f"encoding on {device}, {plan.config.precision}; decoding in {decoding}")
        yield from labeller.label(shards)


def _report_left_out(manifest: Manifest) -> None:
    """Prints what has no label, and why."""
    if manifest.skipped_episodes:
        say(f"{manifest.skipped_episodes} episodes skipped: not longer than the horizon")
    if manifest.static_pairs:
        all_pairs = manifest.num_rows + manifest.static_pairs
        say(f"{manifest.static_pairs} of {all_pairs} pairs left out: less than {manifest.min_motion:g} moves in them")
    if manifest.bad_episodes:
        named = ", ".join(map(str, manifest.bad_episodes[:10])) + ", ..." * (len(manifest.bad_episodes) > 10)
        warn(f"{len(manifest.bad_episodes)} episodes left out, since they cannot be read: {named}")


def _remove_leftovers(out: Path) -> None:
    """Removes the hidden files of processes that were killed, named after the shards that they were making."""
    for path in out.glob(".episodes-*"):
        path.unlink()
