"""Compares options of `lapa latent train` on real video: what do the codes of clips that were never seen know?

    python benchmarks/bench_lam_real.py --videos DROID RT-1 CALVIN rlds/bridge_dataset/1.0.0 --out runs/lam_real \
        --variants preset latent-length=4 quantizer=continuous

A variant is options of `lapa latent train --preset tiny`, without dashes and separated by commas; `preset` has none.
Videos are converted once, at 64 px. A run trains on one thread, keeps an eighth of the clips from training and is
measured on them; it leaves OUT/VARIANT_SEED_STEPS/measured.json, and is neither trained nor measured again. Needs
`lapa-vla[motion]`.

Figures (docs/metrics.md): error over copying and shuffled over own error, of all and of moving pixels; joint
perplexity; same code / chance: how often a code returns from another scene, over how often by chance; motion: R2 of an
MLP from the codes to optical flow, minus the first frame's where that is above 0 (a second table has these R2, linear
too, and those of the pixel difference and of shuffled codes); verb: nats of the instruction's first word in the best
position's code, minus those after words are permuted; CPU seconds of the training process.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sklearn.metrics import mutual_info_score

from lapa.data.pairs import FramePairs, PairsConfig
from lapa.data.spec import open_dataset
from lapa.engine.metrics import versions_and_hardware
from lapa.files import read_json, write_json
from lapa.latent.metrics import PERMUTATIONS, draw_sample, encode
from lapa.latent.model import LatentActionModel
from lapa.latent.probe import probe

KEPT = 0.125
PAIRS = 4000
PRESET = "preset"


@dataclass(frozen=True)
class Config:
    """Train variants of the preset tiny on videos and compare what they learn."""

    videos: tuple[Path, ...]
    """Folders of videos, with captions.json where there are captions, or of RLDS."""
    out: Path
    """Folder of the datasets and runs."""
    variants: tuple[str, ...] = (PRESET,)
    """Options of `lapa latent train`, such as latent-length=4,codebook-size=64; preset for none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1600
    jobs: int = 2
    """Trainings at once, one thread each."""


@dataclass(frozen=True)
class Run:
    """One training. place: its folder."""

    variant: str
    seed: int
    data: tuple[Path, ...]
    steps: int
    out: Path

    @property
    def place(self) -> Path:
        return self.out / f"{self.variant.replace('/', '-')}_{self.seed}_{self.steps}"

    def train(self) -> None:
        """Trains in a process of its own, and goes on where an earlier one was stopped."""
        if (self.place / "cpu.json").exists():
            return
        command = [sys.executable, "-m", "lapa", "latent", "train", "--preset", "tiny", "--resume"]
        command += ["--data", *map(str, self.data), "--out", str(self.place), "--held-out", str(KEPT)]
        command += ["--seed", str(self.seed), "--steps", str(self.steps)]
        for option in self.variant.split(",") if self.variant != PRESET else ():
            name, _, value = option.partition("=")
            command += [f"--{name}", *([value] if value else [])]
        self.place.mkdir(parents=True, exist_ok=True)
        with (self.place.parent / f"{self.place.name}.log").open("a") as log:
            process = subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"error: {shlex.join(command)} failed; see {log.name}")
        write_json(self.place / "cpu.json", {"cpu_seconds": usage.ru_utime + usage.ru_stime})

    def measure(self) -> None:
        """Writes the figures of the clips that were kept from training."""
        path = self.place / "measured.json"
        if path.exists():
            return
        model = LatentActionModel.from_pretrained(self.place).eval()
        datasets = [open_dataset(str(folder)) for folder in self.data]
        pairs = PairsConfig(model.config.image_size, model.horizon, held_out=KEPT, cache_gib=0.0, middle=True)
        sample = draw_sample(FramePairs(datasets, pairs, split="held_out", seed=self.seed), PAIRS, 0, actions=True)
        encoded = encode(model, sample.frames_BTCHW)
        figures = probe(model, sample, encoded, motions=True)
        if encoded.codes_BL is not None and sample.tasks_B is not None:
            verbs_B = np.array([(text.split() or [""])[0].lower() for text in sample.tasks_B])
            said_B = verbs_B != ""
            codes_BL, episodes_B = encoded.codes_BL.numpy()[said_B], sample.episodes_B[said_B]
            figures["verb"] = verb_figures(codes_BL, verbs_B[said_B], episodes_B)
        cpu = read_json(self.place / "cpu.json")
        write_json(path, {"variant": self.variant, "seed": self.seed, **cpu, **figures, **versions_and_hardware()})


def verb_figures(codes_BL: np.ndarray, verbs_B: np.ndarray, episodes_B: np.ndarray) -> dict[str, float]:
    """What the code of the position that knows most of it knows of the first word of the instruction, in nats.

    permuted: the same after the words of the clips are permuted, mean of 20: pairs of one clip share the scene and the
    word, so that permuting pairs would make any code that knows the scene seem to know the word.
    """
    clips, first, clip_B = np.unique(episodes_B, return_index=True, return_inverse=True)
    words_N, rng = verbs_B[first], np.random.default_rng(0)

    def most(words_B: np.ndarray) -> float:
        return max(float(mutual_info_score(codes_B, words_B)) for codes_B in codes_BL.T)

    permuted = np.mean([most(rng.permutation(words_N)[clip_B]) for _ in range(PERMUTATIONS)])
    return {"nats": most(verbs_B), "permuted": float(permuted), "clips": len(clips)}


def main(config: Config) -> None:
    torch.set_num_threads(1)
    data = tuple(converted(folder, config.out) for folder in config.videos)
    runs = [Run(variant, seed, data, config.steps, config.out) for variant in config.variants for seed in config.seeds]
    with ThreadPoolExecutor(config.jobs) as pool:
        list(pool.map(Run.train, runs))
    for run in runs:
        run.measure()
    rows = [read_json(run.place / "measured.json") for run in runs]
    print(f"{table(rows)}\n\nR2 of optical flow, by what it is read from:\n\n{motion_table(rows)}")


def converted(folder: Path, out: Path) -> Path:
    """The dataset of a folder of videos or of RLDS, at the preset's image size."""
    dataset, source = out / "data" / folder.name, "rlds" if (folder / "dataset_info.json").exists() else "videos"
    command = [sys.executable, "-m", "lapa", "data", source, str(folder), "--size", "64", "--resume"]
    if subprocess.run([*command, "--out", str(dataset)]).returncode:
        raise SystemExit(1)
    return dataset


def _over(name: str, other: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["reconstruction"][name] / row["reconstruction"][other]


def _motion(row: dict[str, Any], kind: str) -> float:
    found = row["motion"][kind]["mlp"]
    return found["quantized"]["r2"] - max(0.0, found["first_frame"]["r2"])


COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "error / copying": _over("mse", "mse_copy"),
    "moving pixels": _over("moving_mse", "moving_mse_copy"),
    "shuffled / own": _over("mse_shuffled", "mse"),
    "moving: shuffled / own": _over("moving_mse_shuffled", "moving_mse"),
    "joint perplexity": lambda row: row["usage"]["joint_perplexity"],
    "codes used": lambda row: row["usage"]["codes_used"],
    "same code / chance": lambda row: row["transfer"]["same_code"] / row["transfer"]["same_code_chance"],
    "motion, cells": lambda row: _motion(row, "grid"),
    "motion, image": lambda row: _motion(row, "whole"),
    "verb, nats": lambda row: row["verb"]["nats"] - row["verb"]["permuted"],
    "CPU s": lambda row: row["cpu_seconds"],
}


def table(rows: list[dict[str, Any]]) -> str:
    """The mean of each figure over seeds, with least and greatest where there are several, as a markdown table."""
    lines = [f"| variant | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        cells = " | ".join(_cell([_value(column, row) for row in own]) for column in COLUMNS.values())
        lines.append(f"| {variant} | {len(own)} | {cells} |")
    return "\n".join(lines)


def motion_table(rows: list[dict[str, Any]]) -> str:
    """R2 of the flow in 4 x 4 cells and of the image's mean, from the latent and from what it is compared with."""
    probes = {f"{kind}, {probe}": (kind, probe) for kind in ("grid", "whole") for probe in ("linear", "mlp")}
    lines = [f"| variant | from | {' | '.join(probes)} |", "|---" * (len(probes) + 2) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row["motion"] for row in rows if row["variant"] == variant]
        for read in ("quantized", "continuous", "pixel_difference", "first_frame", "shuffled"):
            cells = [
                _cell([each[kind][probe].get(read, {}).get("r2") for each in own]) for kind, probe in probes.values()
            ]
            lines.append(f"| {variant} | {read.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(column: Callable[[dict[str, Any]], float], row: dict[str, Any]) -> float | None:
    try:
        return column(row)
    except KeyError:
        return None  # A continuous model has no codes, and videos need no captions.


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = ".0f" if max(known) >= 20 else ".2f" if max(known) >= 0.2 else ".3f"
    mean = format(np.mean(known), digits)
    return mean if len(known) == 1 else f"{mean} ({min(known):{digits}} to {max(known):{digits}})"


if __name__ == "__main__":
    main(tyro.cli(Config))
