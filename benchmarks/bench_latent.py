"""How fast a latent action model trains and labels: steps and pairs a second, of a preset.

    python benchmarks/bench_latent.py                     # the preset tiny, on the GPU if there is one
    python benchmarks/bench_latent.py --preset base --batch-size 64

The pairs are made up and lie in memory, so this is the model alone; the reader has bench_data.py. Medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from lapa import presets
from lapa.engine.distributed import pick_device
from lapa.engine.optim import build_optimizer
from lapa.latent.model import LatentActionModel


@dataclass(frozen=True)
class BenchConfig:
    """Measure a latent action model."""

    preset: str = "tiny"
    """Which preset of `lapa latent train`."""
    batch_size: int | None = None
    """Pairs of a step; by default the preset's."""
    repeats: int = 20
    """Steps measured, after three that are not."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(config: BenchConfig) -> None:
    preset = presets.named("latent", config.preset)
    device = pick_device(config.device)
    batch_size = config.batch_size or preset.loop.batch_size
    torch.manual_seed(0)
    model = LatentActionModel(preset.model).to(device)
    optimizer = build_optimizer(model, preset.loop.optim)
    size = preset.model.image_size
    frames_BTCHW = torch.randint(0, 256, (batch_size, 2, 3, size, size), dtype=torch.uint8, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    model.initialise(frames_BTCHW)

    def step() -> None:
        with autocast:
            losses = model.loss(frames_BTCHW)
        losses.loss.backward()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def label() -> None:
        with autocast:
            model.codes(frames_BTCHW)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"\n{time.strftime('%Y-%m-%d')}, {name} of {os.cpu_count()} cores, torch {torch.__version__}, ", end="")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"preset {config.preset}, {parameters:,} parameters, {size} px, batch {batch_size}\n")
    print("| what | batches/s | pairs/s |\n|---|---|---|")
    for what, work in {"training step": step, "codes only": label}.items():
        seconds = median_seconds(work, device, config.repeats)
        print(f"| {what} | {1 / seconds:.2f} | {batch_size / seconds:.0f} |")


def median_seconds(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """The median time of a call, the device waited for."""
    seconds = []
    for repeat in range(repeats + 3):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 3:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
