"""Checkpoints of a training run: all state that makes step n + 1 the same after a kill as without it."""

from __future__ import annotations

import hashlib
import os
import random
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lapa.config import differences
from lapa.console import say
from lapa.errors import UserError, out_of_memory
from lapa.files import atomic_path, read_json

# Options that may differ between a run and its resume: they change no sample and no update.
VOLATILE_KEYS = frozenset(
    {
        "overwrite", "resume", "json", "out", "device", "workers", "stop_after", "log_every", "eval_every",
        "save_every_steps", "save_every_minutes", "cache_gib", "store_cache", "store_cache_gib", "compile",
        "gradient_checkpointing", "tracker",
    }
)  # fmt: skip

# Characters of a SHA-256, and bytes that are read at once.
SEAL, BLOCK = 64, 1 << 20

# Folder of a run's state within its artifact.
TRAINING = "training"
# The variable that gives the number of torch's threads.
THREADS = "OMP_NUM_THREADS"
# A file or, of a sharded model, a folder whose last file is this.
SINGLE, SHARDED = "checkpoint.pt", "checkpoint/latest.json"


def resumable(folder: Path, *, shard: bool) -> bool:
    """Whether there is a checkpoint to resume from. Raises UserError where it is of the other kind, sharded or not."""
    name, other = (SHARDED, SINGLE) if shard else (SINGLE, SHARDED)
    if (folder / other).exists():
        raise UserError(
            f"{folder / other}: was written {'without' if shard else 'with'} --shard; resume with the same options, "
            "or use --overwrite to start anew"
        )
    return (folder / name).exists()


@dataclass(frozen=True)
class RunState:
    """State that changes during training, and the config, under which alone the run may be resumed."""

    model: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Optimizer
    run_config: dict[str, Any]


def save_checkpoint(path: Path, run: RunState, step: int, random_states: list[dict[str, Any]]) -> None:
    """Writes the run's state atomically. step: number of finished steps; random_states: one for each process."""
    state = {
        "step": step,
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else None,
        "optimizer": run.optimizer.state_dict(),
        "random": random_states,
        "run_config": lasting(run.run_config),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
        _seal(temporary)


def load_checkpoint(path: Path, run: RunState, *, rank: int = 0, world: int = 1) -> int:
    """Restores what `save_checkpoint` wrote and returns the step.

    Each process gets its own random state back. A different number of processes is seeded anew by step and rank, with
    a message.

    Raises UserError naming the file where it is unreadable, or was written under another config.
    """
    try:
        _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); use --overwrite to start anew"
        ) from error
    require_same_run(path, state["run_config"], run.run_config)
    run.model.load_state_dict(state["model"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])
    step = int(state["step"])
    restore_random_states(state["random"], step=step, rank=rank, world=world)
    return step


def _seal(path: Path) -> None:
    """Appends the SHA-256 of a file of torch to it, as the comment of a zip file, which readers of these pass over."""
    with path.open("rb+") as file:
        # The last two bytes are the length of the comment.
        file.seek(-2, os.SEEK_END)
        file.write(SEAL.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())


def _verify(path: Path) -> None:
    """Raises UserError where a checkpoint is not as it was written."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        rest = max(0, path.stat().st_size - SEAL)
        while block := file.read(min(rest, BLOCK)):
            digest.update(block)
            rest -= len(block)
        seal = file.read()
    if re.fullmatch(rb"[0-9a-f]{64}", seal):
        damaged = seal != digest.hexdigest().encode()
    else:
        # Of an earlier version: a zip file has a checksum of each record, at which torch.load does not look.
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip() is not None
    if damaged:
        raise UserError(f"{path}: damaged, its checksum is wrong; use --overwrite to start anew")


def require_same_run(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError naming the file and the changes where its config differs from this run's.

    More steps are no change: the run goes on, under the schedule of the learning rate of the new number.
    """
    then, now = lasting(then), lasting(now)
    if 0 < _steps(then) < _steps(now):
        now["loop"] |= {"steps": _steps(then)}
    changed = differences(then, now)
    if changed:
        raise UserError(
            f"{path}: was written under another config ({'; '.join(changed[:4])}); "
            "resume with the same options, or use --overwrite to start anew"
        )


def already_trained(path: Path, run_config: Mapping[str, Any], *, key: str | None = "run") -> bool:
    """Whether a resumed run has nothing to do: the finished one that wrote `path` did as many steps.

    path: a JSON file with the config of that run under `key`, or at its top. A version of lapa with fewer options wrote
    fewer; run_config: this run's, as far as it is known.
    False where there are more steps to do and the checkpoint is there to go on from.
    Raises UserError naming the changes where the options differ, and where the checkpoint is gone.
    """
    recorded = read_json(path)
    if key is not None and isinstance(recorded, Mapping):
        recorded = recorded.get(key)
    if not isinstance(recorded, Mapping) or "loop" not in recorded:
        raise UserError(f"{path}: was not written by this command; give another --out")
    then, now = _common(recorded, run_config), _common(run_config, recorded)
    require_same_run(path, then, now)
    before, after = _steps(then), _steps(now)
    if before < after and not resumable(path.parent / TRAINING, shard=run_config["loop"]["shard"]):
        raise UserError(
            f"{path}: finished after {before} steps, and its checkpoint in {path.parent / TRAINING} is gone, so that "
            f"it cannot go on to {after}; use --overwrite to start anew"
        )
    return before == after


def _steps(config: Mapping[str, Any]) -> int:
    loop = config.get("loop")
    steps = loop.get("steps") if isinstance(loop, Mapping) else None
    return steps if isinstance(steps, int) else 0


def _common(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names both have, at every depth."""
    return {
        name: _common(value, other[name]) if isinstance(value, Mapping) and isinstance(other[name], Mapping) else value
        for name, value in config.items()
        if name in other
    }


def restore_random_states(states: list[dict[str, Any]], *, step: int, rank: int, world: int) -> None:
    """Restores this process's random state; seeds it by step and rank where another number of processes wrote them.

    Also the number of threads, where the checkpoint has it and OMP_NUM_THREADS does not give one.
    """
    if len(states) != world:
        say(f"{len(states)} processes wrote this checkpoint, {world} continue: their random states are new")
        seed_everything(step * world + rank)
        return
    state = states[rank]
    if (threads := state.get("threads", torch.get_num_threads())) != torch.get_num_threads():
        if THREADS in os.environ:
            now = torch.get_num_threads()
            say(f"{threads} threads wrote this checkpoint, {now} continue: results differ by rounding")
        else:
            torch.set_num_threads(threads)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def random_state() -> dict[str, Any]:
    """The state of this process's global random generators, as plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the options that may change between a run and its resume."""
    return {
        key: lasting(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in VOLATILE_KEYS
    }
