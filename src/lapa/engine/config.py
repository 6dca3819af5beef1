"""Options of the training loop and of the optimiser that every stage shares; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (https://arxiv.org/abs/1711.05101). Weight decay touches matrices only, never gains and biases."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Gradients are scaled down to this total norm."""
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to a tenth of the peak, or constant."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: its moments in 8 bits, a quarter of the memory (https://arxiv.org/abs/2110.02861); needs torchao."""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast and where to train."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Samples of one optimiser step, over all processes and accumulations."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up before one optimiser step."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    ema_decay: float | None = None
    """Average the weights with this decay and keep the average in the end."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU and with weights in bf16, fp32 on a CPU."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """bf16: half the memory, best with --optimizer adamw8bit; fp32 leaves frozen weights as they are."""
    shard: bool = False
    """Share weights, gradients and optimiser state out over the processes (FSDP2); start them with torchrun."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: bool = False
    """Compile the model with torch.compile."""
    workers: int | None = None
    """Processes that read data; by default none on a CPU, four for each GPU."""
    seed: int = 0
    log_every: int = 20
    eval_every: int = 500
    save_every_steps: int = 1000
    save_every_minutes: float = 5.0
    """A checkpoint is written at whichever comes first."""
    stop_after: int | None = None
    """Stop with a checkpoint after this many steps of the run; go on later with --resume."""
