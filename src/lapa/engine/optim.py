"""AdamW or Muon with a warm-up and a schedule, as one config; AdamW in 8 bits where memory is short.

lapa latent train --optimizer muon ...
lapa policy finetune --policy POLICY --optimizer adamw8bit --weights bf16 ...
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from lapa.console import warn
from lapa.engine.config import OptimConfig
from lapa.errors import UserError
from lapa.types import TrainableModel

# Of a group of parameters: its learning rate, as a multiple of the run's.
RATE = "rate"
# As Muon is published: at a rate of 0.02 where AdamW's is 0.001.
MUON_RATE = 20
# A matrix with fewer rows or columns has no room for what Muon does: its update has all singular values equal.
SMALLEST_SIDE = 16
# Matrices are made orthogonal together up to so many elements; larger ones gain nothing by it and would need memory.
TOGETHER = 2**22


def build_optimizer(model: TrainableModel, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of the parameters that require a gradient. Raises UserError where there are none, or no torchao.

    Weight decay touches matrices only, and not those of `model.undecayed()`.
    """
    groups = parameter_groups(model, config.weight_decay)
    rounds = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    if config.optimizer == "adamw8bit":
        return _adamw_8bit()(groups, lr=config.lr, betas=config.betas, bf16_stochastic_round=rounds)
    if rounds:
        warn(
            f"bf16 weights trained by {config.optimizer}: an update below 1/256 of its weight is lost to rounding; "
            "use --optimizer adamw8bit, which rounds at random, or --weights fp32"
        )
    if config.optimizer == "muon":
        return MuonAndAdamW(groups, config.lr, config.betas, _tables(model))
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices, and AdamW for embeddings, vectors and all other parameters, as one optimiser.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal:
    all its directions are learned equally fast. Unlike there, the matrices of the first and last layers are its too.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], tables: set[int]):
        """groups: with `params` and `weight_decay`, as of `parameter_groups`. tables: ids of matrices for AdamW."""
        super().__init__(groups, {})
        matrices = [
            # Decay is in proportion to the learning rate.
            {**group, RATE: MUON_RATE, "weight_decay": group["weight_decay"] / MUON_RATE}
            for group in _of_kind(groups, tables, matrix=True)
        ]
        others = _of_kind(groups, tables, matrix=False)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, lr=lr))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, fused=True))
        self._share_groups()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self._parts for group in part.param_groups]


class Muon(torch.optim.Muon):
    """Muon as torch has it by default, faster with many small matrices: those of one shape are updated together."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                size = max(1, TOGETHER // shape.numel())
                for first in range(0, len(parameters), size):
                    self._update(group, parameters[first : first + size])

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        """Updates parameters of one shape."""
        updates = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(average, group["momentum"]))
        rows, columns = parameters[0].shape
        rate, kept = group["lr"] * math.sqrt(max(1.0, rows / columns)), 1 - group["lr"] * group["weight_decay"]
        steps = _orthogonal(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(kept).add_(step, alpha=-rate)


def _orthogonal(
    matrices_NRC: torch.Tensor, coefficients: tuple[float, float, float], steps: int, smallest: float
) -> torch.Tensor:
    """The matrices with all singular values near one, in bf16, by the iteration of Newton and Schulz."""
    a, b, c = coefficients
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.bfloat16()
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=smallest)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _of_kind(groups: list[dict[str, Any]], tables: set[int], *, matrix: bool) -> list[dict[str, Any]]:
    """The groups with only their parameters that Muon trains, or with the others; without groups that are empty."""

    def is_matrix(parameter: torch.Tensor) -> bool:
        return parameter.ndim == 2 and min(parameter.shape) >= SMALLEST_SIDE and id(parameter) not in tables

    chosen = [{**group, "params": [p for p in group["params"] if is_matrix(p) == matrix]} for group in groups]
    return [group for group in chosen if group["params"]]


def _tables(model: nn.Module) -> set[int]:
    """The ids of embeddings: their rows are learned one by one."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


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
        own = rate * group.get(RATE, 1)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


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
