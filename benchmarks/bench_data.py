"""Measures how fast random frame pairs are read, by keyframe interval, decoded cache and DataLoader workers.

    python benchmarks/bench_data.py --videos FOLDER [--size 256] [--seconds 5]
    python benchmarks/bench_data.py --data videos:FOLDER DATASET --size 64  # as they are

Encodes the folder's videos (or, without one, made-up ones) with keyframes every 2 frames and with the encoder's
default (250), then reads pairs in random order and prints pairs/s as a Markdown table, also of a second of CPU time,
which on a busy machine says more.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import tyro
from torch.utils.data import DataLoader

from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
from lapa.data.spec import open_dataset
from lapa.data.transforms import resize_and_crop
from lapa.data.video import ClipScan
from lapa.data.writer import DatasetWriter
from lapa.sources.synthetic import write_synthetic_dataset


@dataclass(frozen=True)
class BenchConfig:
    """Measure the reader of frame pairs."""

    videos: Path | None = None
    """Folder of videos to measure on; by default made-up video."""
    data: tuple[str, ...] = ()
    """Datasets as `--data` of `lapa latent train` takes them, measured as they are instead of encoding videos."""
    size: int = 256
    """Height and width of the images."""
    horizon: float = 0.6
    """Seconds between the frames of a pair."""
    seconds: float = 5.0
    """How long each row is measured."""
    batch_size: int = 16
    """Pairs in a batch."""


def main(config: BenchConfig) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(config, Path(folder))
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, PyAV {av.__version__}, ", end=""
    )
    print(f"torch {torch.__version__}, {config.size} px, horizon {config.horizon:g} s\n")
    print("| keyframes | images | workers | pairs/s | of a CPU second |\n|---|---|---|---|---|")
    for keyframes, images, workers, (rate, cpu_rate) in rows:
        # The CPU time of workers is not that of this process.
        print(f"| {keyframes} | {images} | {workers} | {rate:.0f} | {'-' if workers else f'{cpu_rate:.0f}'} |")


def measure(config: BenchConfig, folder: Path) -> list[tuple[str, str, int, tuple[float, float]]]:
    if config.data:
        datasets = {spec: open_dataset(spec) for spec in config.data}
        return [
            (spec, "decoded on demand", 0, pairs_per_second(each, config, 0, 0.0)) for spec, each in datasets.items()
        ]
    source = read_clips(config, folder)
    rows = []
    for keyframes, interval in (("every 2", 2), ("default (250)", 250)):
        dataset = encode(source, folder / f"g{interval}", config.size, interval)
        for workers in (0, 1, 2) if interval == 2 else (0,):
            rows.append((keyframes, "decoded on demand", workers, pairs_per_second(dataset, config, workers, 0.0)))
        if interval == 2:
            rows.append((keyframes, "cached in memory", 0, pairs_per_second(dataset, config, 0, 64.0)))
    return rows


def read_clips(config: BenchConfig, folder: Path) -> tuple[list[np.ndarray], float]:
    """Returns clips [T, H, W, C] at the measured size, and their rate."""
    if config.videos is None:
        made_up = write_synthetic_dataset(folder / "made_up", episodes=8, frames=60, size=config.size, fps=30.0)
        return [made_up.frames(episode.index) for episode in made_up.episodes], made_up.fps
    paths = sorted(config.videos.glob("*.mp4"))
    clips = [np.stack([resize_and_crop(frame[None], config.size)[0] for _, frame in ClipScan(path)]) for path in paths]
    return clips, 30.0


def encode(source: tuple[list[np.ndarray], float], root: Path, size: int, interval: int) -> Dataset:
    clips, fps = source
    writer = DatasetWriter(root, fps=fps, cameras={"video": (size, size)}, keyframe_interval=interval)
    for clip in clips:
        writer.add_episode({"video": clip}, "")
    return writer.finish()


def pairs_per_second(dataset: Dataset, config: BenchConfig, workers: int, cache_gib: float) -> tuple[float, float]:
    """Returns random pairs of a second, and of a second of CPU time, after a first batch that starts the workers."""
    pairs_config = PairsConfig(size=config.size, horizon=config.horizon, cache_gib=cache_gib)
    pairs = FramePairs([dataset], pairs_config, split="all")
    sampler = torch.utils.data.RandomSampler(pairs, replacement=True, num_samples=10**7)
    loader = DataLoader(pairs, config.batch_size, sampler=sampler, num_workers=workers, collate_fn=collate_pairs)
    batches = iter(loader)
    next(batches)
    start, used, num_pairs = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < config.seconds:
        num_pairs += len(next(batches)["index"])
    return num_pairs / (time.perf_counter() - start), num_pairs / (time.process_time() - used)


if __name__ == "__main__":
    main(tyro.cli(BenchConfig))
