"""Measures how memory and time of `lapa data videos` grow with the number of clips, converted and in place.

    python benchmarks/bench_convert.py --clips 1000 3000 10000 --workers 2

Makes short clips (hard links of a few files), each with its own caption, and runs every step in its own processes:
their peak resident memory is read from Linux' /proc. Prints a Markdown table, and an estimate for 100,000 clips.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from lapa.data.video import encode_clip

TARGET = 100_000
OPEN = """
import sys, time
from lapa.data.spec import open_dataset
from lapa.data.dataset import Dataset
start = time.perf_counter()
dataset = open_dataset(sys.argv[1])
dataset.fingerprint
print(len(dataset.lengths), time.perf_counter() - start)
"""
# Converts, but links each clip instead of decoding and encoding it: this leaves the cost of the command itself.
LINK = """
import os, sys
from pathlib import Path
from lapa.data import convert
from lapa.data.convert import ConvertedItem, EncodedEpisode
from lapa.sources.videos import VideosConfig

def link(source, cameras, fps, options, item, target):
    video = target.with_name(target.name + ".mp4")
    video.parent.mkdir(parents=True, exist_ok=True)
    os.link(source.path_of(item), video)
    stats = {name: [0.1234567890123456] * 3 for name in ("min", "max", "mean", "std")} | {"count": [192]}
    return ConvertedItem((EncodedEpisode(item.key, item.instruction, {"video": video}, item.length, {"video": stats}),))

folder, captions, out, size = sys.argv[1:]
convert.convert_item = link
convert.run(VideosConfig(folder, captions=captions, out=Path(out), size=int(size), workers=1))
"""


@dataclass(frozen=True)
class Config:
    """What to measure."""

    clips: tuple[int, ...] = (1000, 3000, 10000)
    """Numbers of clips."""
    workers: int = 2
    """Processes that convert."""
    frames: int = 16
    """Frames of a clip."""
    size: int = 64
    """Height and width of the images."""
    link: bool = False
    """Link each clip instead of decoding and encoding it, for numbers of clips that would otherwise take hours."""
    folder: Path | None = None
    """Folder to work in; by default a new temporary folder."""


@dataclass(frozen=True)
class Cost:
    """The cost of one command. parent, worker: peak memory in MiB, of the worker with the highest peak."""

    seconds: float
    parent: float
    worker: float


def main(config: Config) -> None:
    """Measures and prints."""
    print(f"| clips | step | s | clips/s | peak of the command, MiB | of a worker, MiB |\n|{'---|' * 6}")
    costs: dict[str, list[tuple[int, Cost]]] = {}
    for number in config.clips:
        with tempfile.TemporaryDirectory(dir=config.folder) as folder:
            root = Path(folder)
            make_clips(root / "clips", number, config)
            clips, captions, dataset = root / "clips", root / "captions.json", root / "dataset"
            convert = [sys.executable, "-m", "lapa", "data", "videos", clips, "--captions", captions, "--out", dataset]
            convert += ["--size", config.size, "--workers", config.workers]
            steps = {
                "convert": [sys.executable, "-c", LINK, clips, captions, dataset, config.size]
                if config.link
                else convert,
                "open the dataset": [sys.executable, "-c", OPEN, dataset],
                "open in place": [sys.executable, "-c", OPEN, f"videos:{clips},captions={captions}"],
                "open in place again": [sys.executable, "-c", OPEN, f"videos:{clips},captions={captions}"],
            }
            for step, command in steps.items():
                # Headers are cached from one command to the next; converting and opening start with empty caches.
                cost = run(list(map(str, command)), root / ("cache 1" if step == "convert" else "cache 2"))
                costs.setdefault(step, []).append((number, cost))
                rate = number / cost.seconds
                print(
                    f"| {number} | {step} | {cost.seconds:.1f} | {rate:.0f} | {cost.parent:.0f} | {cost.worker:.0f} |"
                )
    for step, measured in costs.items():
        if len(measured) > 1:
            numbers = np.array([number for number, _ in measured])
            for who in ("parent", "worker"):
                peaks = np.array([getattr(cost, who) for _, cost in measured])
                if peaks.any():
                    slope, start = np.polyfit(numbers, peaks, 1)
                    then = start + slope * TARGET
                    print(f"{step}, {who}: {slope * 1024:.2f} KiB a clip, {then:.0f} MiB at {TARGET:,} clips")


def make_clips(folder: Path, number: int, config: Config) -> None:
    """Makes `number` clips in folders of 1,000, and captions.json next to them."""
    rng = np.random.default_rng(0)
    kinds = []
    for kind in range(8):
        start = rng.integers(0, 255, (config.size, config.size, 3), dtype=np.uint8)
        frames = [np.roll(start, shift * (kind + 1), axis=1) // 4 for shift in range(config.frames)]
        kinds.append(folder.parent / f"kind{kind}.mp4")
        encode_clip(kinds[-1], frames, 10.0)
    captions = {}
    for clip in range(number):
        name = f"{clip // 1000:03d}/clip with a name of usual length {clip}.mp4"
        if clip % 1000 == 0:
            (folder / f"{clip // 1000:03d}").mkdir(parents=True)
        os.link(kinds[clip % len(kinds)], folder / name)
        captions[name] = f"move the thing number {clip} from the left to the right"
    (folder.parent / "captions.json").write_text(json.dumps(captions))


def run(command: list[str], cache: Path) -> Cost:
    """Runs a command with its own cache folder. Raises ValueError with the end of its output where it fails."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    peaks: dict[int, float] = {}
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed: {output[-1000:]}")
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    return Cost(time.perf_counter() - start, peaks[process.pid], max(workers, default=0.0))


def watch(process: subprocess.Popen[str], peaks: dict[int, float]) -> None:
    """Records the peak resident memory of a process and its children until it ends."""
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            pids = [process.pid, *map(int, children.read_text().split())]
            for pid in pids:
                status = Path(f"/proc/{pid}/status").read_text()
                line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
                if line is not None:
                    peaks[pid] = int(line.split()[1]) / 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
        time.sleep(0.05)


if __name__ == "__main__":
    if not Path("/proc/self/status").exists():
        raise SystemExit("bench_convert.py reads Linux' /proc")
    main(tyro.cli(Config))
