"""Compares the speed of the latent action model with that of its literal twin (literal.py), in training and labelling.

    python benchmarks/bench_latent.py                                  # CPU: alternating, against the measured bound
    python benchmarks/bench_latent.py --device cuda --sizes paper --batch-sizes 16 64 256 512 --preset None

The pairs are made up and in memory, so this measures the model alone; bench_data.py measures reading. A training step
is forward, backward and optimizer: Adam for the literal model, which is always fp32 and eager; lapa's fused AdamW, or
the preset's own, for ours, which on a GPU is bf16 and compiled. Figures are medians; CPU ms is what the process used of
all cores for a batch, which on a busy machine says more than pairs/s; there the bound is a rate by CPU time too.
--profile lists where the preset's step goes. The bound is the arithmetic of our model (matrix products and
convolutions) at the rate of a large fp32 matrix product, measured between the others, or at --peak-tflops.
On a CPU all models take turns; on a GPU only one is in memory at a time, so that its peak memory can be measured.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

import torch
import tyro
from literal import LiteralModel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lapa import presets
from lapa.engine.config import OptimConfig
from lapa.engine.distributed import pick_device
from lapa.engine.optim import build_optimizer
from lapa.latent.config import LatentModelConfig
from lapa.latent.model import LatentActionModel
from lapa.released.laq import PUBLISHED_CONFIG, released_config

MINI = {
    "dim": 64,
    "quant_dim": 16,
    "codebook_size": 8,
    "image_size": 64,
    "patch_size": 8,
    "spatial_depth": 2,
    "temporal_depth": 2,
    "dim_head": 16,
    "heads": 4,
    "code_seq_len": 4,
}
SMALL = {
    **PUBLISHED_CONFIG,
    "dim": 256,
    "image_size": 128,
    "patch_size": 16,
    "spatial_depth": 4,
    "temporal_depth": 4,
    "heads": 4,
}
# The published config of a size, and its batch on a CPU.
SIZES = {"mini": (MINI, 4), "small": (SMALL, 16), "paper": (dict(PUBLISHED_CONFIG), 2)}
GPU_BATCHES = (16, 64, 256, 512)
H100_BF16_TFLOPS = 989.0
MATRIX = 2048
PAIRS_TO_COUNT = 4
WARM_UP = 2
PROFILED, LISTED = 8, 16
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class BenchConfig:
    """Measure the latent action model."""

    sizes: tuple[Literal["mini", "small", "paper"], ...] = ("small", "paper")
    """small: 128 px, width 256; paper: the published model; mini: to try this script."""
    models: tuple[Literal["literal", "released", "clean"], ...] = ("literal", "clean")
    """literal: the slow twin; clean: ours, as users get it; released: ours, with the same mathematics as the twin. At
    the paper's size each takes 6 GiB of memory."""
    preset: str | None = "tiny"
    """A preset of `lapa latent train` to measure as well."""
    batch_sizes: tuple[int, ...] = ()
    """Pairs in a step; by default 2 to 16 on a CPU, depending on the size, and 16 to 512 on a GPU."""
    repeats: int = 10
    """Measured rounds, after two for warming up."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of our models. auto: bf16 on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile our models with torch.compile. auto: on a GPU."""
    peak_tflops: float | None = None
    """The bound, instead of the measured one; by default 989 on a GPU, the H100's and H200's in bf16."""
    profile: bool = False
    """List the operations that take most of a training step of the preset, on a CPU."""


@dataclass(frozen=True)
class Contender:
    """A model to measure. uses: by name, the functions that train on or label uint8 frames [B, 2, 3, H, W]."""

    uses: dict[str, Callable[[Tensor], object]]


@dataclass(frozen=True)
class Measured:
    """Median seconds of a batch, by the clock and of all cores, and the peak of a GPU's memory in GiB."""

    seconds: float
    cpu_seconds: float
    gib: float | None = None


Results = dict[tuple[str, int, str], Measured]  # by model, batch size, and training or labelling


def main(config: BenchConfig) -> None:
    device = pick_device(config.device)
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    ours = f"{_precision(config, device)}, {'compiled' if _compiled(config, device) else 'eager'}"
    print(f"\n{time.strftime('%Y-%m-%d')}, {where}, torch {torch.__version__}; literal: fp32, eager; ours: {ours}")
    for name in config.sizes:
        published, batch = SIZES[name]
        released = released_config(published)
        sizes = {"released": released, "clean": replace(released, layout="clean")}
        builders: dict[str, Callable[[], Contender]] = {
            "literal": partial(build_literal, published, device),
            **{model: partial(build_ours, size, config, device) for model, size in sizes.items()},
        }
        chosen = {str(model): builders[model] for model in config.models}
        title = f"{name}: {released.image_size} px, patch {released.patch_size}, width {released.dim}"
        report(title, config, chosen, sizes["clean"], config.batch_sizes or (GPU_BATCHES if on_gpu else (batch,)))
    if config.preset is not None:
        preset = presets.named("latent", config.preset)
        build = partial(build_ours, preset.model, config, device, preset.loop.optim)
        batches = config.batch_sizes or (preset.loop.batch_size,)
        report(f"preset {config.preset}", config, {"clean": build}, preset.model, batches)
        if config.profile:
            list_operations(build().uses["training"], preset.model.image_size, batches[0])


def report(
    title: str,
    config: BenchConfig,
    builders: Mapping[str, Callable[[], Contender]],
    size: LatentModelConfig,
    batches: Sequence[int],
) -> None:
    """Measures these models at these batch sizes and prints a table of pairs a second."""
    device = pick_device(config.device)
    groups = [[model] for model in builders] if device.type == "cuda" else [list(builders)]
    flops, results, rate = flops_of_a_pair(size, device), Results(), 0.0
    for group in groups:
        found, rate = measure({model: builders[model] for model in group}, size.image_size, batches, config)
        results |= found
    peak_tflops = config.peak_tflops or (H100_BF16_TFLOPS if device.type == "cuda" else rate / 1e12)
    a_pair = ", ".join(f"{count / 1e9:.3g} GFLOP a pair in {what}" for what, count in flops.items())
    print(f"\n{title}; {a_pair}; bound {peak_tflops:.3g} TFLOP/s\n")
    rates = " | ".join(f"{model}, pairs/s" for model in builders)
    print(f"| | batch | {rates} | against literal | of the bound | CPU ms | peak GiB |")
    print("|" + "---|" * (len(builders) + 6))
    for what in ("training", "labelling"):
        for batch in batches:
            row = {model: results.get((model, batch, what)) for model in builders}
            cells = ["out of memory" if r is None else f"{batch / r.seconds:.3g}" for r in row.values()]
            best, literal = row[list(builders)[-1]], row.get("literal")
            ratio = f"{literal.seconds / best.seconds:.2f}x" if literal and best else "-"
            busy = 0.0 if best is None else best.seconds if device.type == "cuda" else best.cpu_seconds
            share = f"{batch * flops[what] / busy / peak_tflops / 1e12:.0%}" if best else "-"
            used = f"{1000 * best.cpu_seconds:.0f}" if best else "-"
            memory = f"{best.gib:.1f}" if best and best.gib is not None else "-"
            print(f"| {what} | {batch} | {' | '.join(cells)} | {ratio} | {share} | {used} | {memory} |")


def measure(
    builders: Mapping[str, Callable[[], Contender]], image_size: int, batches: Sequence[int], config: BenchConfig
) -> tuple[Results, float]:
    """Measures these models in turn, at each batch size that fits; also returns the matrix products' rate."""
    device = pick_device(config.device)
    on_gpu, square = device.type == "cuda", torch.randn(MATRIX, MATRIX, device=device)
    contenders = {name: build() for name, build in builders.items()}
    results, rates = Results(), []
    # On a GPU each use has its own peak of memory; labelling is first, before there is any optimizer state.
    for uses in (["labelling"], ["training"]) if on_gpu else (["training", "labelling"],):
        for batch in batches:
            torch.compiler.reset()
            frames = torch.randint(0, 256, (batch, 2, 3, image_size, image_size), dtype=torch.uint8, device=device)
            works: dict[tuple[str, str], Callable[[], object]] = {("matrix", "product"): lambda: square @ square}
            for name, contender in contenders.items():
                works |= {(name, use): partial(contender.uses[use], frames) for use in uses}
            if on_gpu:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                medians = alternate(works, config.repeats, device)
            except torch.OutOfMemoryError:
                break
            gib = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
            wall, used = medians.pop(("matrix", "product"))
            rates.append(2 * MATRIX**3 / (wall if on_gpu else used))
            results |= {(name, batch, use): Measured(*median, gib) for (name, use), median in medians.items()}
    return results, statistics.median(rates) if rates else 0.0


def build_literal(published: Mapping[str, int], device: torch.device) -> Contender:
    model = LiteralModel(published).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def train(frames_BTCHW: Tensor) -> None:
        model(frames_BTCHW).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Contender({"training": train, "labelling": model.codes})


def build_ours(
    size: LatentModelConfig, config: BenchConfig, device: torch.device, optim: OptimConfig | None = None
) -> Contender:
    model = LatentActionModel(size).to(device)
    optimizer = build_optimizer(model, optim or OptimConfig())
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=_precision(config, device) == "bf16")
    loss, codes = model.loss, model.codes
    if _compiled(config, device):
        loss, codes = torch.compile(loss, dynamic=False), torch.compile(codes, dynamic=False)

    def train(frames_BTCHW: Tensor) -> None:
        with autocast:
            total = loss(frames_BTCHW).loss
        total.backward()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def label(frames_BTCHW: Tensor) -> None:
        with autocast:
            codes(frames_BTCHW)

    return Contender({"training": train, "labelling": label})


def alternate(
    works: Mapping[Key, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Key, tuple[float, float]]:
    """Returns the median seconds of each function, by the clock and of all cores, called in turn and synchronized."""
    seconds: dict[Key, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(WARM_UP + repeats):
        for name, work in works.items():
            started, used = time.perf_counter(), time.process_time()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append((time.perf_counter() - started, time.process_time() - used))
    return {
        name: (statistics.median(wall), statistics.median(cpu))
        for name, times in seconds.items()
        for wall, cpu in [zip(*times[WARM_UP:], strict=True)]
    }


def list_operations(train: Callable[[Tensor], object], image_size: int, batch: int) -> None:
    """Prints the milliseconds of a training step by operation.

    Of the calls of an operation on one shape, the lower quartile counts: other programs interrupt the others.
    """
    frames = torch.randint(0, 256, (batch, 2, 3, image_size, image_size), dtype=torch.uint8)
    for _ in range(WARM_UP):
        train(frames)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(PROFILED):
            train(frames)
    calls: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in found.events():
        calls[event.name, str(event.input_shapes)].append(event.self_cpu_time_total)
    totals: dict[str, float] = defaultdict(float)
    for (name, _), times in calls.items():
        totals[name] += sorted(times)[len(times) // 4] * len(times) / PROFILED / 1000
    print(f"\n| of {sum(totals.values()):.0f} ms | ms |\n|---|---|")
    for name in sorted(totals, key=lambda name: -totals[name])[:LISTED]:
        print(f"| {name} | {totals[name]:.1f} |")


def flops_of_a_pair(size: LatentModelConfig, device: torch.device) -> dict[str, float]:
    """Returns the floating point operations of our matrix products and convolutions, in training and in labelling."""
    model = LatentActionModel(size).to(device)
    frames = torch.randint(0, 256, (PAIRS_TO_COUNT, 2, 3, size.image_size, size.image_size), dtype=torch.uint8)
    works = {
        "training": lambda: model.loss(frames.to(device)).loss.backward(),  # type: ignore[attr-defined]
        "labelling": lambda: model.codes(frames.to(device)),
    }
    totals = {}
    for what, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        # The counter takes the backward pass of a depthwise convolution for a full one's; it is twice the forward.
        counts["aten.convolution_backward"] = 2 * counts.get("aten.convolution", 0) * (what == "training")
        totals[what] = sum(counts.values()) / PAIRS_TO_COUNT
    return totals


def _precision(config: BenchConfig, device: torch.device) -> str:
    automatic = "bf16" if device.type == "cuda" else "fp32"
    return automatic if config.precision == "auto" else config.precision


def _compiled(config: BenchConfig, device: torch.device) -> bool:
    return config.compile == "yes" or (config.compile == "auto" and device.type == "cuda")


if __name__ == "__main__":
    main(tyro.cli(BenchConfig, description=__doc__))
