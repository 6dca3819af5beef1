"""Options of the training loop and of the optimiser that every stage shares; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lapa.config import require_at_least
from lapa.errors import UserError

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (https://arxiv.org/abs/1711.05101) or Muon. Weight decay touches matrices only, never gains and biases."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of the two moments."""
    weight_decay: float = 0.0
    """Of matrices only."""
    clip: float = 1.0
    """Gradients are scaled down to this total norm."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises to its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine to a tenth of the peak, or constant."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit: moments in 8 bits, a quarter of the memory (https://arxiv.org/abs/2110.02861); needs torchao.
    muon: matrices by Muon at 20 times the learning rate and with its own momentum
    (https://kellerjordan.github.io/posts/muon), embeddings and all else by AdamW; for training from scratch."""

    def __post_init__(self) -> None:
        require_at_least(self, lr=0, weight_decay=0, warmup_steps=0)
        if not self.clip > 0:
            raise UserError(f"--clip must be above 0, got {self.clip}; a large number clips nothing")


@dataclass(frozen=True)
class LoopConfig:
    """How long, how fast and where to train."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Samples of one optimiser step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches of one optimiser step; more of them need less memory."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is saved in their place; by default none."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU and with bf16 weights, else fp32."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Precision of the weights. bf16: half the memory, best with --optimizer adamw8bit."""
    shard: bool = False
    """Shard weights, gradients and optimiser state over the processes of torchrun (FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: bool = False
    """Compile the model with torch.compile."""
    workers: int | None = None
    """Processes that read samples; by default four for each GPU, none on a CPU."""
    store_cache: Path | None = None
    """Folder of a local disk that keeps what is read from a store (s3://...); several commands may share it."""
    store_cache_gib: float = 100.0
    """Largest size of --store-cache; what was not read for the longest time is deleted first."""
    seed: int = 0
    """Of the weights, the order of the samples and their augmentation."""
    log_every: int = 20
    """Steps between lines of the log."""
    eval_every: int = 500
    """Steps between evaluations on the validation split."""
    save_every_steps: int = 1000
    """Steps between checkpoints."""
    save_every_minutes: float = 5.0
    """Minutes between checkpoints; one is written at whichever comes first."""
    tracker: TrackerName | None = None
    """Also report config, figures and images to this tracker; without it, they are in OUT/training alone."""
    stop_after: int | None = None
    """Stop with a checkpoint after this many steps of the run; --resume continues."""

    def __post_init__(self) -> None:
        require_at_least(
            self, steps=1, batch_size=1, accumulate=1, workers=0, seed=0, log_every=1, eval_every=1, save_every_steps=1,
            stop_after=1,
        )  # fmt: skip
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay must be from 0 to below 1, got {self.ema_decay}")


@dataclass(frozen=True)
class PlotConfig:
    """Draw the training curves of one or several runs as one image."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of trainings, finished or not: latent action models, policies, baselines."""
    out: Path = Path("curves.png")
    """PNG to draw to."""
    overwrite: bool = False
    """Replace the file at --out."""
