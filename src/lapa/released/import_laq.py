"""Turns the latent action model that LAPA's authors released (`laq_openx.pt`) into a LAM folder of this project.

    lapa import laq laq_openx.pt --out LAM

LAPA (https://arxiv.org/abs/2410.11758), https://github.com/LatentActionPretraining/LAPA. The file is a state dict of
493 tensors, 343,796,080 parameters; it is read without running what a pickle may hold, and each name is accounted for.
"""

from __future__ import annotations

import pickle
import shlex
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from lapa import config as configs
from lapa.console import finish
from lapa.errors import UserError
from lapa.files import claim_output, naming, read_json, write_json
from lapa.latent.model import CONFIG
from lapa.released.laq import PUBLISHED_CONFIG, from_released, released_config

# What torch makes of a file that is not whole, or not its own.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError),
    *(ValueError, TypeError, AttributeError, LookupError, AssertionError, OverflowError),
)


@dataclass(frozen=True)
class ImportLaqConfig:
    """Import the released latent action model."""

    weights: tyro.conf.Positional[Path]
    """The released laq_openx.pt."""
    out: Path
    """Folder of the latent action model to write."""
    sizes: Path | None = None
    """JSON with the sizes of a model other than the published one, under the authors' names."""
    overwrite: bool = False
    """Replace what `out` holds."""


def run(config: ImportLaqConfig) -> None:
    """`lapa import laq`. Raises UserError on a file that is missing, truncated or does not fit."""
    published = PUBLISHED_CONFIG if config.sizes is None else read_json(config.sizes)
    if not isinstance(published, dict):
        raise UserError(f"{config.sizes}: expected an object with the sizes of a released model")
    require_sizes(published, config.sizes)
    weights = read_weights(config.weights)
    with naming(config.weights):
        model = from_released(weights, published)
    complete = (config.out / CONFIG).exists()
    claim_output(config.out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=[config.weights])
    write_json(config.out / "metrics.json", {})
    model.save_pretrained(config.out, configs.to_dict(config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lam = shlex.quote(str(config.out))
    next_commands = [f"lapa latent probe {lam} --data DATASET", f"lapa label --lam {lam} --data DATASET"]
    finish(f"latent action model of {parameters:,} parameters", config.out, next_commands)


def require_sizes(published: Mapping[str, Any], path: Path | None) -> None:
    """UserError naming the file where a size is none, or no model of these sizes can be."""
    with naming(path):
        for key, value in published.items():
            if key in PUBLISHED_CONFIG and (type(value) is not int or value < 1):
                raise UserError(f"{key} must be a whole number of at least 1, got {value!r}")
        released_config(published)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file of torch, without running any code in it.

    UserError naming the file where that fails, or where a tensor is not of finite floating-point numbers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the released laq_openx.pt")
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE:
        # Torch's own text advises to run what is in the file.
        raise UserError(
            f"{path}: truncated, or not a file of tensors alone; nothing in it was run; download it again, or name "
            "the released laq_openx.pt"
        ) from None
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{path}: not a state dict; expected names and tensors")
    complaints = [f"{name}: {fault}" for name, tensor in weights.items() if (fault := _fault(tensor))]
    if complaints:
        raise UserError(f"{path}: expected finite floating-point numbers:\n  " + "\n  ".join(complaints))
    return weights


def _fault(tensor: Tensor) -> str | None:
    """What keeps a tensor from being a weight, if anything does."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return "sparse, or without its numbers"
    if not tensor.is_floating_point():
        return f"of {tensor.dtype}"
    return None if bool(tensor.isfinite().all()) else "not all of its numbers are finite"
