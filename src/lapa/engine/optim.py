"""AdamW with a warm-up and a schedule, as one config; in 8 bits where memory is short.

lapa policy finetune --policy POLICY --optimizer adamw8bit --weights bf16 ...
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lapa.console import warn
from lapa.engine.config import OptimConfig
from lapa.errors import UserError
from lapa.types import TrainableModel


def build_optimizer(model: TrainableModel, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that require a gradient. Raises UserError where there are none, or without torchao.

    Weight decay touches matrices only, and not those of `model.undecayed()`.
    """
    groups = parameter_groups(model, config.weight_decay)
    rounds = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    if config.optimizer == "adamw8bit":
        return _adamw_8bit()(groups, lr=config.lr, betas=config.betas, bf16_stochastic_round=rounds)
    if rounds:
        warn(
            "trained weights in bf16 with plain AdamW: an update below 1/256 of its weight is lost to rounding; "
            "use --optimizer adamw8bit, which rounds at random, or --weights fp32"
        )
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def parameter_groups(model: TrainableModel, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that require a gradient, with and without weight decay. Raises UserError where there are none."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("nothing to train: every parameter is frozen")
    kept = {id(p) for p in model.undecayed()}
    decays = [p.ndim >= 2 and id(p) not in kept for p in trained]
    groups = [
        {"params": [p for p, yes in zip(trained, decays, strict=True) if yes], "weight_decay": weight_decay},
        {"params": [p for p, yes in zip(trained, decays, strict=True) if not yes], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate, in place where it is a tensor, as in compiled optimisers."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of `step` (from 0) in a run of `steps`: a pure function, so that a resume needs no state."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _adamw_8bit() -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f'--optimizer adamw8bit needs torchao ({error}); install it with: pip install "lapa-vla[8bit]"'
        ) from None
    return AdamW8bit
