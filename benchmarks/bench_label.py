"""Compares the speed of `lapa label` with that of its stages: decoding only, encoding only, and both at once.

    OMP_NUM_THREADS=1 python benchmarks/bench_label.py            # one decoder process, one thread that encodes
    OMP_NUM_THREADS=1 python benchmarks/bench_label.py --decoders 0 1 2 --video-size 256
    python benchmarks/bench_label.py --device cuda --preset paper --batch-size 256 --video-size 256 --episodes 400 \
        --frames 120 --fps 30 --decoders 4 8 15 --precision bf16

The machine may be shared, so each round measures all three, one after another; the Markdown table has medians over the
rounds. `of the slower` is the figure to optimize: pairs/s of both at once over those of the slower stage alone, in the
same round.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import torch
import tyro

import lapa
from lapa.data.dataset import Dataset
from lapa.data.episode_decoders import window_frames
from lapa.engine.distributed import pick_device
from lapa.labelling.config import LabelConfig
from lapa.labelling.shards import Labeller, Shard, make_plan, make_shards
from lapa.latent.model import LatentActionModel
from lapa.presets import LATENT
from lapa.sources.synthetic import write_synthetic_dataset


@dataclass(frozen=True)
class BenchConfig:
    """Measure labelling with an untrained model, which is as fast as a trained one."""

    data: str | None = None
    """Dataset to label; by default made-up video."""
    preset: str = "tiny"
    """Preset of the latent action model."""
    video_size: int = 128
    """Height and width of made-up video."""
    episodes: int = 48
    """Episodes, of made-up video or of the dataset."""
    frames: int = 30
    """Frames of a made-up episode."""
    fps: float = 10.0
    """Frames a second of made-up video."""
    decoders: tuple[int, ...] = (1,)
    """Numbers of decoding processes to measure; 0 is a thread."""
    rounds: int = 5
    """Number of rounds."""
    batch_size: int = 32
    """Pairs encoded at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Round:
    """Pairs a second of each stage alone and of both at once."""

    decoding: float
    encoding: float
    at_once: float

    @property
    def of_slower(self) -> float:
        return self.at_once / min(self.decoding, self.encoding)


def main(config: BenchConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dataset = bench_dataset(config, Path(folder) / "videos")
        rows = {num: measure(config, dataset, num, Path(folder)) for num in config.decoders}
    device = torch.cuda.get_device_name() if config.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, PyAV {av.__version__}, torch "
        f"{torch.__version__}; {config.preset} on {device}, {config.precision}, batch {config.batch_size}; "
        f"{dataset.num_frames} frames of {dataset.image_shape()[0]} px; medians of {config.rounds} rounds\n"
    )
    print("| decoders | decoding alone | encoding alone | at once | of the slower | lowest, highest |")
    print("|---|---|---|---|---|---|")
    for num, rounds in rows.items():
        median = {
            name: statistics.median(getattr(r, name) for r in rounds) for name in ("decoding", "encoding", "at_once")
        }
        shares = sorted(each.of_slower for each in rounds)
        print(
            f"| {num or 'a thread'} | {median['decoding']:.0f} | {median['encoding']:.0f} | {median['at_once']:.0f} | "
            f"{statistics.median(shares):.1%} | {shares[0]:.1%}, {shares[-1]:.1%} |"
        )


def bench_dataset(config: BenchConfig, folder: Path) -> Dataset:
    if config.data is not None:
        return lapa.open_dataset(config.data)
    return write_synthetic_dataset(
        folder, episodes=config.episodes, frames=config.frames, size=config.video_size, fps=config.fps
    )


def measure(config: BenchConfig, dataset: Dataset, num_decoders: int, folder: Path) -> list[Round]:
    """Returns the rounds after a first one that starts the processes and warms up caches and kernels."""
    lam = folder / "lam"
    LatentActionModel(LATENT[config.preset].model).save_pretrained(lam)
    options = LabelConfig(lam, str(dataset.root), batch_size=config.batch_size, precision=config.precision)
    plan, device = make_plan(options), pick_device(config.device)
    num_episodes = min(config.episodes, len(dataset.lengths))
    shards = make_shards(folder / f"labels-{num_decoders}", num_episodes, 64)
    num_pairs = plan.num_pairs(range(num_episodes))
    with Labeller(plan, device, num_decoders) as labeller:
        batch = example_batch(plan.model, dataset, plan.horizon, config.batch_size).to(device)
        rounds = [measure_round(labeller, shards, batch, num_pairs) for _ in range(1 + config.rounds)]
    return rounds[1:]


def measure_round(labeller: Labeller, shards: list[Shard], batch: torch.Tensor, num_pairs: int) -> Round:
    decoding, encoding = decode_alone(labeller, shards), encode_alone(labeller, batch, num_pairs)
    at_once = seconds(lambda: all(True for _ in labeller.label(shards)))
    return Round(num_pairs / decoding, num_pairs / encoding, num_pairs / at_once)


def decode_alone(labeller: Labeller, shards: list[Shard]) -> float:
    episodes = [episode for shard in shards for episode in shard.episodes]
    return seconds(lambda: all(True for _ in labeller.decoders.windows(episodes)))


def encode_alone(labeller: Labeller, batch_BTCHW: torch.Tensor, num_pairs: int) -> float:
    """Returns the seconds of the model alone, on one batch that is already on the device, for as many pairs."""
    encoder = labeller.encoder

    def encode() -> None:
        for first in range(0, num_pairs, len(batch_BTCHW)):
            encoder.encode(batch_BTCHW[: num_pairs - first])
        if encoder.device.type == "cuda":
            torch.cuda.synchronize()

    return seconds(encode)


def example_batch(model: LatentActionModel, dataset: Dataset, horizon: int, size: int) -> torch.Tensor:
    episodes = range(len(dataset.lengths))
    frames = next(window_frames(dataset, episodes, horizon, None, model.config.image_size))[1].copy()
    pairs_BT = torch.arange(size)[:, None] % (len(frames) - horizon) + torch.tensor([0, horizon])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)[pairs_BT].contiguous()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
