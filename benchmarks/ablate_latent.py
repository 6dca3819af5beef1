"""Compares what prevents the collapse of a latent action model: one change at a time, on squares that move.

    python benchmarks/ablate_latent.py --out runs/ablation --variants default --seeds 0 1 2
    python benchmarks/ablate_latent.py --out runs/ablation --steps 800          # every variant, one seed

4,096 pairs at 64 px, one thread, the sizes of the preset tiny; measured on 2,048 other pairs. Squares move in eight
directions, so chance of the direction is 0.125. Each run writes OUT/VARIANT_SEED_STEPS.json and is not repeated; the
table is printed from those files. CPU seconds are those of training alone. A run takes 3 to 8 minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from lapa.data.pairs import collate_pairs
from lapa.engine.loop import train
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import unknown
from lapa.files import read_json, write_json
from lapa.latent import quantizers
from lapa.latent.metrics import (
    Sample,
    encode,
    linear_accuracy,
    mutual_information,
    reconstruction_figures,
    usage_figures,
)
from lapa.latent.model import LatentActionModel
from lapa.presets import LATENT
from lapa.sources.synthetic import moving_squares
from lapa.types import TrainingDataset

TINY = LATENT["tiny"]
PAIRS, TEST_PAIRS, INITIALISATION_PAIRS = 4096, 2048, 256
NEVER = 10**9
REPLACE_EVERY = quantizers.REPLACE_EVERY


@dataclass(frozen=True)
class Variant:
    """One change of the preset tiny. optim: changes of the optimizer; revive: whether NSVQ replaces dead codes."""

    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    initialise: bool = True
    revive: bool = True


NSVQ = {"quantizer": "nsvq"}
PUBLISHED = {
    **NSVQ, "latent_length": 4, "patch_norm": True, "standardize_z": False, "predict": "frame", "error": "plain",
    "action_input": "attend", "layout": "released",
}  # fmt: skip
VARIANTS = {
    "default": Variant(),
    "patch-norm": Variant({"patch_norm": True}),
    "frame": Variant({"predict": "frame"}),
    "attend": Variant({"action_input": "attend"}),
    "raw-z": Variant({"standardize_z": False}),
    "augment": Variant({"augment": True}),
    "nsvq": Variant(NSVQ),
    "nsvq-no-revival": Variant(NSVQ, revive=False),
    "continuous": Variant({"quantizer": "continuous"}),
    "published": Variant(PUBLISHED, {"optimizer": "adamw", "lr": 1e-4, "clip": 0.5}, initialise=False, revive=False),
}


@dataclass(frozen=True)
class AblationConfig:
    """Train variants of the preset tiny on moving squares and compare what they learn."""

    out: Path
    """Folder of the results, one file a run."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: tuple[int, ...] = (0,)
    steps: int = TINY.loop.steps
    """Optimizer steps of a run."""
    threads: int = 1
    every: int = 200
    """Steps between measurements."""


class SyntheticPairs(TrainingDataset):
    """Pairs of moving squares in memory, as `lapa.data.pairs.FramePairs` gives them; `directions_N` are the labels."""

    in_memory = True

    def __init__(self, num: int, seed: int):
        self.frames_NTCHW, self.directions_N = moving_squares(num, seed)

    def __len__(self) -> int:
        return len(self.frames_NTCHW)

    def __getitem__(self, key: Sequence[int]) -> dict[str, Any]:
        index = int(key[0])
        return {"frames_TCHW": self.frames_NTCHW[index], "index": index, "episode": index}


def main(config: AblationConfig) -> None:
    torch.set_num_threads(config.threads)
    for name in config.variants:
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
        for seed in config.seeds:
            path = config.out / f"{name}_{seed}_{config.steps}.json"
            if not path.exists():
                write_json(path, {"curve": learn(VARIANTS[name], seed, config), **versions_and_hardware()})
    print(table(config))


def learn(variant: Variant, seed: int, config: AblationConfig) -> list[dict[str, float]]:
    """Trains one variant; returns the figures of each evaluation."""
    quantizers.REPLACE_EVERY = REPLACE_EVERY if variant.revive else NEVER
    data, test = SyntheticPairs(PAIRS, seed=0), SyntheticPairs(TEST_PAIRS, seed=10**6)
    frames_BTCHW = torch.from_numpy(test.frames_NTCHW)
    sample = Sample(frames_BTCHW, np.arange(TEST_PAIRS))
    torch.manual_seed(seed)
    model = LatentActionModel(replace(TINY.model, **variant.model))
    optim = replace(TINY.loop.optim, **variant.optim)
    loop = replace(
        TINY.loop, steps=config.steps, optim=optim, seed=seed, device="cpu", eval_every=config.every,
        save_every_steps=NEVER, save_every_minutes=NEVER,
    )  # fmt: skip
    clock, curve = Stopwatch(), []

    def prepare(model: nn.Module) -> None:
        assert isinstance(model, LatentActionModel)
        if variant.initialise:
            first = np.random.default_rng(seed).permutation(PAIRS)[:INITIALISATION_PAIRS]
            model.initialise(torch.from_numpy(data.frames_NTCHW[first]))

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LatentActionModel)
        spent = clock.pause()
        curve.append({"cpu_seconds": spent, **figures(model, sample, torch.from_numpy(test.directions_N))})
        clock.go_on()
        return curve[-1]

    with TemporaryDirectory() as folder:
        train(
            model, data, collate_pairs, loop, Path(folder), run_config={}, description="ablation", prepare=prepare,
            evaluate=evaluate,
        )  # fmt: skip
    return curve


def figures(model: LatentActionModel, sample: Sample, directions_B: Tensor) -> dict[str, float]:
    """Returns error over copying, shuffled over own error, codes used, and how well codes and latent predict the
    direction.
    """
    size, encoded = model.config.codebook_size, encode(model, sample.frames_BTCHW)
    codes_BL, errors = reconstruction_figures(model, sample, encoded)
    test_B = torch.arange(len(directions_B)) >= len(directions_B) // 2
    found = {
        "over_copy": errors["mse"] / errors["mse_copy"],
        "shuffled_over_own": errors["mse_shuffled"] / errors["mse"],
        "probe_continuous": linear_accuracy(encoded.z_BLD.flatten(1), directions_B, test_B),
    }
    if codes_BL is None:
        return found
    usage = usage_figures(codes_BL, size)
    known = [mutual_information(codes.numpy(), directions_B.numpy())["known"] for codes in codes_BL.T]
    return found | {
        "codes_used": usage["codes_used"] * size,
        "joint_perplexity": usage["joint_perplexity"],
        "probe_codes": linear_accuracy(F.one_hot(codes_BL, size).flatten(1), directions_B, test_B),
        "best_position_knows": max(value or 0.0 for value in known),
    }


class Stopwatch:
    """Counts the CPU seconds of this process, without those between `pause` and `go_on`."""

    def __init__(self) -> None:
        self._left_out, self._started = 0.0, time.process_time()

    def pause(self) -> float:
        self._paused = time.process_time()
        return self._paused - self._started - self._left_out

    def go_on(self) -> None:
        self._left_out += time.process_time() - self._paused


COLUMNS: dict[str, Callable[[dict[str, float]], str]] = {
    "CPU s": lambda row: f"{row['cpu_seconds']:.0f}",
    "error / copying": lambda row: f"{row['over_copy']:.2f}",
    "shuffled / own": lambda row: f"{row['shuffled_over_own']:.2f}",
    "probe of codes": lambda row: f"{row['probe_codes']:.2f}" if "probe_codes" in row else "-",
    "probe of z": lambda row: f"{row['probe_continuous']:.2f}",
    "codes used": lambda row: f"{row['codes_used']:.0f}" if "codes_used" in row else "-",
    "joint perplexity": lambda row: f"{row['joint_perplexity']:.0f}" if "joint_perplexity" in row else "-",
    "best position knows": lambda row: f"{row['best_position_knows']:.2f}" if "best_position_knows" in row else "-",
}


def table(config: AblationConfig) -> str:
    """Returns the last measurement of each run as a markdown table."""
    lines = [f"| variant | seed | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in config.variants:
        for seed in config.seeds:
            row = read_json(config.out / f"{name}_{seed}_{config.steps}.json")["curve"][-1]
            lines.append(f"| {name} | {seed} | {' | '.join(show(row) for show in COLUMNS.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(AblationConfig))
