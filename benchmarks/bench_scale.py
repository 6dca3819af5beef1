"""Measures on this machine what docs/scale.md is computed from, and computes its tables.

    python benchmarks/bench_scale.py simulate --out benchmarks/results/scale_2-core-cpu_2026-11-30.md
    python benchmarks/bench_scale.py measure --out benchmarks/results/scale_2-core-cpu_2026-11-30.md
    python benchmarks/bench_scale.py table --results benchmarks/results/scale_2-core-cpu_2026-11-30.md

`simulate` drives the planner, the journal, the tables, the merge and a training's workers with made-up clips that have
no pixels: CPU seconds, and the most memory of a process of its own for each part. `measure` converts and labels a few
made-up clips, on this machine and on Ray, and reads pairs from this disk and from an HTTP server on loopback
that waits before each answer. Both add their figures to the file. `table` has the assumptions as options, with their
defaults shown by --help.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import tyro
from fsspec import AbstractFileSystem

from lapa.files import write_text

HOURS = (1_000, 100_000, 1_000_000)
# Floating point operations of one forward and backward pass for each parameter and token; of the forward pass.
TRAINED, LABELLED = 6, 2
# Made-up statistics of a clip's pixels.
PIXEL_STATS = {name: [0.1234567890123456] * 3 for name in ("min", "max", "mean", "std")} | {"count": [192]}


@dataclass(frozen=True)
class Simulate:
    """Drive the metadata of many clips without pixels; about 0.15 CPU milliseconds a clip."""

    out: Path
    """Markdown file to write, or to add to."""
    clips: tuple[int, ...] = (100_000, 1_000_000)
    """Numbers of clips, for slopes."""
    frames: int = 50
    """Frames of a clip."""
    samples: int = 4096
    """Samples that each of two workers of a training draws."""


@dataclass(frozen=True)
class Measure:
    """Measure on this machine; a few CPU minutes."""

    out: Path
    """Markdown file to write, or to add to."""
    clips: int = 32
    """Clips to convert and label: Ray's workers take 16 at once."""
    seconds: float = 6.0
    """Length of a clip."""
    files: int = 600
    """Copies of a converted clip to read pairs from."""
    pairs: int = 512
    """Pairs to read for each figure."""


@dataclass(frozen=True)
class Table:
    """Compute the table of docs/scale.md."""

    results: Path
    """What `measure` has written."""
    clip_seconds: float = 10.0
    """Mean length of an episode."""
    cpu_price: float = 0.04
    """Price of a CPU core for an hour, in dollars; an assumption."""
    gpu_price: float = 2.5
    """Price of a GPU for an hour, in dollars; an assumption."""
    storage_price: float = 0.02
    """Price of a gigabyte for a month on a store, in dollars; an assumption."""
    gpu_flops: float = 4e14
    """Useful bf16 operations of a GPU a second (an H100 at 40% of its peak); an assumption."""
    pairs_per_second: float = 2.0
    """Pairs of each second of video: each is labelled, and a policy learns from it once."""
    base: tuple[float, float, float] = (25e6, 50e6, 150)
    """Preset base: parameters of the latent action model and of the policy, tokens of a sample; the last assumed."""
    paper: tuple[float, float, float] = (344e6, 7e9, 300)
    """The same of preset paper: tokens of an image, an instruction and a latent action."""
    convert: float = 0.0
    """CPU seconds to convert a second of video; 0: as measured, on a source of 256 px, where 720p needs several times
    more."""
    mbit_per_second: float = 0.0
    """Rate of the converted video; 0: as measured on made-up clips, of which real video may need several times more."""


class SlowServer(BaseHTTPRequestHandler):
    """Serves a folder over HTTP: listings as JSON, parts of files; waits `latency` seconds before each answer."""

    root = Path()
    latency = 0.0
    protocol_version = "HTTP/1.1"
    # Else an answer waits 40 ms for the client to confirm its headers.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        time.sleep(self.latency)
        path = self.root / self.path.strip("/")
        if not path.exists():
            return self._answer(404, b"")
        if self.headers["X-Info"]:
            return self._answer(200, json.dumps(described(path, self.root)).encode())
        if path.is_dir():
            listed = [described(inner, self.root) for inner in sorted(path.iterdir())]
            return self._answer(200, json.dumps(listed).encode())
        start, stop = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        with path.open("rb") as file:
            file.seek(start)
            return self._answer(206, file.read(stop + 1 - start))

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def described(path: Path, root: Path) -> dict[str, Any]:
    kind, name = ("directory" if path.is_dir() else "file"), "/" + path.relative_to(root).as_posix()
    return {"name": name, "type": kind, "size": path.stat().st_size, "mtime": path.stat().st_mtime}


class LoopbackStore(AbstractFileSystem):
    """A client of `SlowServer`, one connection for each thread."""

    protocol = "loopback"
    port = 0
    _own = threading.local()

    def _get(self, path: str, **headers: str) -> bytes:
        if getattr(self._own, "port", None) != (os.getpid(), self.port):
            self._own.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            self._own.port = os.getpid(), self.port
        self._own.connection.request("GET", "/" + self._strip_protocol(path).strip("/"), headers=headers)
        answer = self._own.connection.getresponse()
        content = answer.read()
        if answer.status == 404:
            raise FileNotFoundError(path)
        return content

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        entries = json.loads(self._get(path))
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return json.loads(self._get(path, **{"X-Info": "1"}))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        start, end = start or 0, self.info(path)["size"] if end is None else end
        return self._get(path, Range=f"bytes={start}-{end - 1}") if end > start else b""

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return io.BytesIO(self.cat_file(path))


@contextlib.contextmanager
def served(root: Path, latency: float) -> Iterator[None]:
    """Serves a folder from a process of its own: threads of this one would share Python's lock with its readers."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(root, latency, sending), daemon=True)
    server.start()
    LoopbackStore.port = receiving.recv()
    fsspec.register_implementation("loopback", LoopbackStore, clobber=True)
    try:
        yield
    finally:
        server.terminate()
        server.join()


def serve(root: Path, latency: float, port: Connection) -> None:
    SlowServer.root, SlowServer.latency = root, latency
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    port.send(server.server_address[1])
    server.serve_forever()


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def pairs_per_second(data: str, num: int, ahead: bool = True) -> float:
    """Returns the rate of random pairs at 64 px, read by this process; ahead: as in training, else one by one."""
    from lapa import store_cache
    from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
    from lapa.data.spec import open_dataset
    from lapa.engine.batches import StepSampler, batch_loader

    store_cache._versions.clear()
    pairs = FramePairs([open_dataset(data)], PairsConfig(size=64, cache_gib=0.0), "all")
    pairs.remote = pairs.remote and ahead
    order = StepSampler(len(pairs), 16, seed=0, first_step=0, last_step=num // 16)
    start = time.perf_counter()
    for _ in batch_loader(pairs, collate_pairs, order, workers=0, pin_memory=False):
        pass
    return num / (time.perf_counter() - start)


def simulate(config: Simulate) -> None:
    """Each part in a process of its own, whose most memory is then that of the part, with Python and libraries."""
    for num in config.clips:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parts: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
                ("plan", plan, (num,)),
                ("journal", write_journal, (folder / "0", 0, num // 2, config.frames)),
                ("", write_journal, (folder / "1", num // 2, num, config.frames)),
                ("tables", finish_tables, (folder / "0",)),
                ("", finish_tables, (folder / "1",)),
                ("merge", merge_parts, ([folder / "0", folder / "1"], folder / "all")),
                ("open", open_all, (folder / "all",)),
                ("workers", train_workers, (folder / "all", config.samples)),
            ]
            for part, function, arguments in parts:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
                    figures = executor.submit(measured, function, arguments).result()
                # Of the two halves, the first counts.
                if part:
                    add_figures(config, {f"{part}_{num}_{figure}": value for figure, value in figures.items()})


def measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, float]:
    """Returns the figures of a part, or else its CPU seconds and the most memory of this process."""
    import lapa.data.convert
    import lapa.data.merge  # noqa: F401

    before = time.process_time()
    figures = function(*arguments)
    # Unlike getrusage's, not of the process that has started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return figures or {"cpu_s": time.process_time() - before, "peak_mib": int(peak[1]) / 1024 if peak else 0.0}


def plan(num: int) -> None:
    """Lists shards of 1,000 clips, as far as a conversion does before its first clip."""
    from lapa.data import convert
    from lapa.sources import webdataset

    def listed(shard: Path, _: Any) -> dict[str, Any]:
        first = int(shard.stem) * 1000
        videos = [
            [f"{number:09d}", "mp4", 1024 * (number - first), 1000, caption(number)]
            for number in range(first, min(first + 1000, num))
        ]
        return {"videos": videos, "notes": {}, "problem": "", "group": 0}

    shards = [f"{number:05d}.tar" for number in range(-(-num // 1000))]
    header = SimpleNamespace(fps=10.0, height=256, width=256)
    with (
        mock.patch.object(webdataset, "find_shards", lambda _: (Path("shards"), shards)),
        mock.patch.object(webdataset, "file_state", lambda path: [str(path), 1, 1]),
        mock.patch.object(webdataset, "cached", lambda kind, key, make: make()),
        mock.patch.object(webdataset, "list_videos", listed),
        mock.patch.object(webdataset.WebDatasetSource, "_sampled_headers", lambda self: [header]),
    ):
        source = webdataset.WebDatasetReading("shards").open()
    convert._check_names(source, source.items)
    convert._fingerprint(source.items)


def caption(number: int) -> str:
    return f"a hand does what no other clip shows, {number}"


@contextlib.contextmanager
def without_files() -> Iterator[None]:
    """Episodes have no videos, and no line of a journal is waited for until it is on disk."""
    from lapa.data import merge, writer

    video = SimpleNamespace(codec="h264", pix_fmt="yuv420p")
    with (
        mock.patch.object(os, "fsync", lambda descriptor: None),
        mock.patch.object(writer, "sha256", lambda path: "01" * 32),
        mock.patch.object(writer, "probe", lambda path: video),
        mock.patch.object(writer.DatasetWriter, "_move", lambda self, files: None),
        mock.patch.object(merge, "link_videos", lambda pairs, roots: (0, 0)),
    ):
        yield


def write_journal(root: Path, first: int, last: int, frames: int) -> None:
    from lapa.data import writer

    with without_files():
        its = writer.DatasetWriter(root, fps=10, cameras={"video": (256, 256)})
        for number in range(first, last):
            source = f"{number // 1000:05d}.tar:{number:09d}"
            its.add_episode_files(
                {"video": Path("no.mp4")}, frames, caption(number), pixel_stats={"video": PIXEL_STATS}, source=source
            )
            its.close_item(source)


def finish_tables(root: Path) -> None:
    """Resumes a conversion that has all its clips, and finishes it."""
    from lapa.data import writer

    with without_files():
        writer.DatasetWriter(root, fps=10, cameras={"video": (256, 256)}, resume=True).finish()


def merge_parts(roots: list[Path], out: Path) -> None:
    from lapa.data.lerobot import LeRobotDataset
    from lapa.data.merge import merge

    with without_files():
        merge([LeRobotDataset(root) for root in roots], out, {})


def open_all(root: Path) -> None:
    from lapa.data.lerobot import LeRobotDataset

    LeRobotDataset(root)


def train_workers(root: Path, samples: int) -> dict[str, float]:
    """Returns the memory of two workers of a training's loader, in MiB: resident, and not shared with the training."""
    import psutil

    from lapa.data import lerobot
    from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
    from lapa.data.writer import CHUNK_SIZE
    from lapa.engine.batches import StepSampler, batch_loader

    dataset = lerobot.LeRobotDataset(root)

    def decoded(path: Path, times: Any, tolerance: float) -> dict[int, np.ndarray]:
        # What a policy reads of an episode, too; each has a file.
        chunk, file = (int(name.rpartition("-")[2]) for name in (path.parent.name, path.stem))
        dataset[chunk * CHUNK_SIZE + file]
        return dict.fromkeys(times, np.zeros((64, 64, 3), np.uint8))

    # As it is by default on Linux, but not in a process that was spawned.
    multiprocessing.set_start_method("fork", force=True)
    # All but the videos is there.
    with (
        mock.patch.object(lerobot, "film_times", lambda path, fps: np.arange(dataset.lengths[0]) / fps),
        mock.patch.object(lerobot, "decode_times", decoded),
        mock.patch.object(lerobot.LeRobotDataset, "require_files", lambda *_: None),
    ):
        pairs = FramePairs([dataset], PairsConfig(size=64, cache_gib=0.0), "all")
        order = StepSampler(len(pairs), 16, seed=0, first_step=0, last_step=2 * samples // 16)
        batches = iter(batch_loader(pairs, collate_pairs, order, workers=2, pin_memory=False))
        figures = {}
        for step, _ in enumerate(batches, 1):
            if step in (16, 2 * samples // 16 - 16):
                memory = [
                    child.memory_full_info() for child in psutil.Process().children() if child.status() != "zombie"
                ]
                mean = {
                    kind: np.mean(sorted(getattr(its, kind) for its in memory)[-2:]) / 2**20 for kind in ("rss", "uss")
                }
                figures[f"uss_after_{'few' if step == 16 else 'all'}_mib"] = float(mean["uss"])
                figures["rss_mib"] = float(mean["rss"])
    return {**figures, "training_rss_mib": psutil.Process().memory_info().rss / 2**20}


def add_figures(config: Simulate | Measure, new: dict[str, float]) -> None:
    """Adds figures to the file; it is written after each part, as a machine may be too busy to wait for the rest."""
    names = [field.name for field in fields(config) if field.name != "out"]
    values = {name: getattr(config, name) for name in names}
    listed = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" for name, value in values.items()
    }
    command = f"python benchmarks/bench_scale.py {type(config).__name__.lower()} "
    command += " ".join(f"--{name} {value}" for name, value in listed.items())
    before = config.out.read_text().splitlines() if config.out.exists() else []
    commands = [line for line in before if line.startswith("- `") and f" {type(config).__name__.lower()} " not in line]
    commands.append(f"- `{command}` ({time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.0f} at its end)")
    figures = (read_figures(config.out) if before else {}) | new
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in figures.items())
    write_text(
        config.out,
        f"# Scale: {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n\ntorch {metadata.version('torch')}, Python "
        f"{sys.version.split()[0]}; a moving texture of 256 px at 30 fps, taken at 10. `cpu_s` are CPU seconds, "
        "`wall_s` seconds, pairs/s by the clock.\n\n"
        + "\n".join(commands)
        + f"\n\n| figure | value |\n|---|---|\n{rows}",
    )


def measure(config: Measure) -> None:
    import torch

    from lapa.data.convert import run
    from lapa.data.spec import open_dataset
    from lapa.data.video import encode_clip
    from lapa.latent.model import LatentActionModel
    from lapa.presets import LATENT
    from lapa.sources.videos import VideosConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "videos").mkdir()
        encode_clip(folder / "videos/0.mp4", drifting(round(config.seconds * 30)), 30.0)
        for number in range(1, config.clips):
            os.link(folder / "videos/0.mp4", folder / f"videos/{number}.mp4")
        start = cpu_seconds()
        run(VideosConfig(str(folder / "videos"), caption="x", rate=10.0, out=str(folder / "ds"), size=256, workers=1))
        video_seconds = config.clips * config.seconds
        size = sum(path.stat().st_size for path in (folder / "ds/videos").rglob("*.mp4"))
        speed = {"convert_cpu_s_per_video_s": (cpu_seconds() - start) / video_seconds}
        add_figures(config, {**speed, "bytes_per_video_s": size / video_seconds})

        torch.set_num_threads(1)
        model = LatentActionModel(LATENT["tiny"].model)
        batch = {"frames_BTCHW": torch.zeros(16, 2, 3, 64, 64, dtype=torch.uint8)}
        model(batch).loss.backward()
        start = cpu_seconds()
        for _ in range(3):
            model(batch).loss.backward()
        add_figures(config, {"train_cpu_s_per_pair": (cpu_seconds() - start) / 48})
        model.save_pretrained(folder / "lam")
        start = cpu_seconds()
        label_all(folder, "labels", engine="local")
        add_figures(config, {"label_cpu_s_per_frame": (cpu_seconds() - start) / open_dataset(folder / "ds").num_frames})
        measure_store(folder, config)
        measure_ray(folder, config)


def label_all(folder: Path, out: str, **options: Any) -> None:
    from lapa.labelling.config import LabelConfig
    from lapa.labelling.run import run

    run(LabelConfig(folder / "lam", str(folder / "ds"), str(folder / out), device="cpu", shard_episodes=16, **options))


def measure_ray(folder: Path, config: Measure) -> None:
    """Seconds of a conversion and of labelling with two workers, local and on Ray in turn, on a cluster that runs."""
    from lapa.data.convert import run
    from lapa.ray_cluster import RayConfig, cluster
    from lapa.sources.videos import VideosConfig

    videos = VideosConfig(str(folder / "videos"), caption="x", rate=10.0, out="", size=256)
    local: dict[str, Any] = {"engine": "local", "workers": 2}
    ray: dict[str, Any] = {"engine": "ray", "ray": RayConfig(num_workers=2)}
    walls: dict[str, list[float]] = {}
    with cluster(RayConfig()):
        for turn in range(2):
            for name, options in (("local", local), ("ray", ray)):
                start = time.perf_counter()
                run(replace(videos, out=str(folder / f"{name}{turn}"), **options))
                walls.setdefault(f"convert_{name}_wall_s", []).append(time.perf_counter() - start)
            for name, options in (("local", {}), ("ray", ray)):
                start = time.perf_counter()
                label_all(folder, f"{name}-labels{turn}", **options)
                walls.setdefault(f"label_{name}_wall_s", []).append(time.perf_counter() - start)
    add_figures(config, {name: float(np.mean(seconds)) for name, seconds in walls.items()})


def measure_store(folder: Path, config: Measure) -> None:
    """Pairs a second of many files, so that most pairs are in a file that was not read before."""
    from lapa.data.spec import open_dataset
    from lapa.data.writer import DatasetWriter
    from lapa.store_cache import use_store_cache

    converted = open_dataset(str(folder / "ds"))
    video, num_frames = sorted((folder / "ds/videos").rglob("*.mp4"))[0], int(converted.lengths[0])
    writer = DatasetWriter(folder / "many", fps=converted.fps, cameras={"video": (256, 256)})
    for _ in range(config.files):
        shutil.copy(video, folder / "copy.mp4")
        writer.add_episode_files({"video": folder / "copy.mp4"}, num_frames, "x", pixel_stats={"video": PIXEL_STATS})
    local = str(writer.finish().root)
    pairs_per_second(local, 16)
    data = "loopback:///many"
    for latency in (0, 20, 100):
        use_store_cache(None, 1)
        with served(folder, latency / 1000):
            # The disk before and after: the machine's load changes meanwhile.
            disk = [pairs_per_second(local, config.pairs)]
            one = pairs_per_second(data, 32, ahead=False)
            ahead = pairs_per_second(data, config.pairs)
            use_store_cache(folder / f"cache{latency}", 1)
            cold, warm = pairs_per_second(data, config.pairs), pairs_per_second(data, config.pairs)
            disk.append(pairs_per_second(local, config.pairs))
            named = {"disk": sum(disk) / 2, "one_by_one": one, "ahead": ahead, "cache_cold": cold, "cache_warm": warm}
            add_figures(config, {f"store_{latency}ms_{name}_pairs_per_s": rate for name, rate in named.items()})
    use_store_cache(None, 1)


def drifting(num: int) -> np.ndarray:
    """Returns frames [T, 256, 256, 3] of a texture that moves by a pixel a frame."""
    texture_HWC = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(texture_HWC, -shift, 1)[:, :256] for shift in range(num)])


def read_figures(path: Path) -> dict[str, float]:
    rows = (line.split("|") for line in path.read_text().splitlines() if line.startswith("| ") and "_" in line)
    return {row[1].strip(): float(row[2]) for row in rows}


def table(config: Table) -> str:
    """Returns the table of costs as Markdown: a row for each quantity, a column for each number of hours."""
    its = read_figures(config.results)
    most = max(simulated(its))
    driver_s = (its[f"journal_{most}_cpu_s"] + its[f"tables_{most}_cpu_s"]) / (most // 2)
    columns = []
    for hours in HOURS:
        seconds = hours * 3600
        episodes, pairs = seconds / config.clip_seconds, seconds * config.pairs_per_second
        video_bytes = config.mbit_per_second * 125_000 or its["bytes_per_video_s"]
        convert = (config.convert or its["convert_cpu_s_per_video_s"]) * seconds / 3600
        driver = driver_s * episodes / 3600
        gigabytes = video_bytes * seconds / 1e9
        gpu = {
            f"{stage}, `{preset}`": operations * parameters * tokens * pairs / config.gpu_flops / 3600
            for preset, (lam, policy, tokens) in (("base", config.base), ("paper", config.paper))
            for stage, operations, parameters in (("label", LABELLED, lam), ("pretrain", TRAINED, policy))
        }
        dollars = {
            "convert": convert * config.cpu_price,
            "storage for a year": 12 * gigabytes * config.storage_price,
            **{name: amount * config.gpu_price for name, amount in gpu.items()},
        }
        columns.append(
            {
                "episodes": episodes,
                "pairs": pairs,
                "convert, CPU hours": convert,
                "write the metadata, CPU hours of one process": driver,
                "storage, TB": gigabytes / 1000,
                **{f"{name}, GPU hours": amount for name, amount in gpu.items()},
                **{f"{name}, $": amount for name, amount in dollars.items()},
                "dearest part": max(dollars, key=lambda part: dollars[part]),
            }
        )
    lines = ["| hours of video | " + " | ".join(f"{hours:,}" for hours in HOURS) + " |", "|---|" + "---:|" * len(HOURS)]
    for name in columns[0]:
        values = (column[name] for column in columns)
        lines.append(f"| {name} | " + " | ".join(v if isinstance(v, str) else rounded(v) for v in values) + " |")
    return "\n".join(lines)


def simulated(its: dict[str, float]) -> list[int]:
    """Returns the numbers of clips that were simulated."""
    return sorted({int(match[1]) for name in its if (match := re.fullmatch(r"plan_(\d+)_cpu_s", name))})


def memory_table(results: Path) -> str:
    """Returns the table of memory and CPU time of the simulation as Markdown, with slopes of the last two sizes."""
    its = read_figures(results)
    sizes = simulated(its)
    lines = ["| part | " + " | ".join(f"{size:,} clips" for size in sizes) + " | each clip more |"]
    lines.append("|---|" + "---|" * len(sizes) + "---|")
    parts = {
        "plan": ("list the clips, check names, fingerprint", 1),
        "journal": ("journal, of half of them", 2),
        "tables": ("resume and write the tables, of half of them", 2),
        "merge": ("merge the two halves", 1),
        "open": ("open the dataset", 1),
    }
    for part, (name, share) in parts.items():
        cells = [
            f"{rounded(its[f'{part}_{n}_peak_mib'])} MiB, {rounded(its[f'{part}_{n}_cpu_s'])} CPU s" for n in sizes
        ]
        few, many = (sizes * 2)[-2:] if len(sizes) > 1 else (0, sizes[-1])
        slopes = [
            (its[f"{part}_{many}_{kind}"] - its.get(f"{part}_{few}_{kind}", 0)) * share * scale / (many - few)
            for kind, scale in (("peak_mib", 2**20), ("cpu_s", 1e6))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {rounded(slopes[0])} B, {rounded(slopes[1])} µs |")
    for figure, name in (
        ("rss_mib", "a worker of a training: resident"),
        ("uss_after_few_mib", "of these its own, after few samples"),
        ("uss_after_all_mib", "of these its own, after many samples"),
    ):
        known = [its.get(f"workers_{n}_{figure}") for n in sizes]
        cells = ["not measured" if each is None else f"{rounded(each)} MiB" for each in known]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def store_table(results: Path) -> str:
    """Returns the table of pairs a second as Markdown, with shares of the local disk's rate where that is known."""
    its = read_figures(results)
    names = {"disk": "local disk", "one_by_one": "one by one", "ahead": "read ahead"}
    names |= {"cache_cold": "`--store-cache`, cold", "cache_warm": "warm"}
    names = {name: title for name, title in names.items() if f"store_0ms_{name}_pairs_per_s" in its}
    lines = ["| wait | " + " | ".join(names.values()) + " |", "|---|" + "---:|" * len(names)]
    for wait in (0, 20, 100):
        rates = {name: its[f"store_{wait}ms_{name}_pairs_per_s"] for name in names}
        shares = {name: f" ({rate / rates['disk']:.0%})" for name, rate in rates.items() if "disk" in rates}
        cells = (rounded(rate) + shares.get(name, "") for name, rate in rates.items())
        lines.append(f"| {wait} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ray_table(results: Path) -> str:
    """Returns the table of Ray against local as Markdown; "" where that was not measured."""
    its = read_figures(results)
    if "label_ray_wall_s" not in its:
        return ""
    lines = ["| two workers | local | Ray | local / Ray |", "|---|---:|---:|---:|"]
    for stage in ("convert", "label"):
        local, ray = its[f"{stage}_local_wall_s"], its[f"{stage}_ray_wall_s"]
        lines.append(f"| {stage} | {rounded(local)} s | {rounded(ray)} s | {local / ray:.2f} |")
    return "\n".join(lines)


def rounded(number: float) -> str:
    """Returns two significant digits, which is all that these figures have."""
    digits = 1 - int(np.floor(np.log10(number))) if number else 0
    return f"{round(number, digits):,.{max(0, digits)}f}"


if __name__ == "__main__":
    chosen = tyro.cli(Simulate | Measure | Table)
    if isinstance(chosen, Simulate):
        simulate(chosen)
    elif isinstance(chosen, Measure):
        measure(chosen)
    else:
        tables = (table(chosen), *(made(chosen.results) for made in (memory_table, ray_table, store_table)))
        print("\n\n".join(tables))
