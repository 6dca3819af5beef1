"""The state of a training run: everything that makes step n + 1 the same after a kill as without it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lapa.files import atomic_path

# What may differ between a run and its resume without changing a single sample or update.
VOLATILE_KEYS = frozenset(
    {
        "overwrite", "resume", "out", "device", "workers", "stop_after", "log_every", "eval_every",
        "save_every_steps", "save_every_minutes", "cache_gib", "compile",
    }
)  # fmt: skip


def save_checkpoint(
    path: Path,
    *,
    step: int,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    run_config: dict[str, Any],
) -> None:
    """Writes the run's state atomically. `step` is the number of finished optimiser steps."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "ema": ema.state_dict() if ema is not None else None,
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
        "run_config": _lasting(run_config),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    run_config: dict[str, Any],
) -> int:
    """Restores what `save_checkpoint` wrote and returns the step.

    Raises ValueError naming the file where it is unreadable, or was written under another config.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); use --overwrite to start anew"
        ) from error
    differences = _differences(state["run_config"], _lasting(run_config))
    if differences:
        raise ValueError(
            f"{path}: was written under another config ({'; '.join(differences[:4])}); "
            "resume with the same options, or use --overwrite to start anew"
        )
    model.load_state_dict(state["model"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    restore_random_state(state["random"])
    return int(state["step"])


def random_state() -> dict[str, Any]:
    """The state of every global random generator, as plain values and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in VOLATILE_KEYS
    }


def _differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted({*then, *now}):
        before, after = then.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} was {before!r}, is {after!r}")
    return found
