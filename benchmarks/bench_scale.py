"""Measures on this machine what docs/scale.md is computed from, and computes its table.

    python benchmarks/bench_scale.py measure --out benchmarks/results/scale_2-core-cpu_2026-11-29.md
    python benchmarks/bench_scale.py table --results benchmarks/results/scale_2-core-cpu_2026-11-29.md

`measure` converts, labels and trains on a few made-up clips, reads pairs from this disk and from an HTTP server on the
loopback address that waits before each answer, and writes metadata of many episodes without videos. Everything is in
CPU seconds, but for pairs a second. `table` has the assumptions as options, with their defaults shown by --help.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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


@dataclass(frozen=True)
class Measure:
    """Measure on this machine; a few CPU minutes."""

    out: Path
    """Markdown file to write."""
    clips: int = 16
    """Clips to convert."""
    seconds: float = 6.0
    """Length of a clip."""
    files: int = 200
    """Small videos to read pairs from."""
    pairs: int = 256
    """Pairs to read for each figure."""
    episodes: int = 2000
    """Episodes whose metadata is written without videos, and twice as many, for a slope."""


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
def served(root: Path) -> Iterator[None]:
    SlowServer.root = root
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    server.daemon_threads = True
    LoopbackStore.port = server.server_address[1]
    fsspec.register_implementation("loopback", LoopbackStore, clobber=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()


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


def write_metadata(root: Path, num: int) -> tuple[float, float]:
    """Writes the journal and the tables of `num` episodes without videos; returns CPU seconds of both."""
    from lapa.data import writer

    video = type("Video", (), {"codec": "h264", "pix_fmt": "yuv420p"})
    with (
        mock.patch.object(writer, "sha256", lambda path: "0" * 64),
        mock.patch.object(writer, "probe", lambda path: video),
    ):
        return _write_metadata(root, num)


def _write_metadata(root: Path, num: int) -> tuple[float, float]:
    from lapa.data import writer

    its = writer.DatasetWriter(root, fps=10, cameras={"video": (256, 256)})
    stats = {name: [0.1234567890123456] * 3 for name in ("min", "max", "mean", "std")} | {"count": [192]}
    start = cpu_seconds()
    for number in range(num):
        source = f"shard-{number // 1000:05d}.tar/{number:09d}.mp4"
        its._add(50, {}, {"video": stats}, f"a caption, {number}", source)
        its.close_item(source)
    middle = cpu_seconds()
    its.finish()
    return middle - start, cpu_seconds() - middle


def measure(config: Measure) -> None:
    import torch

    from lapa.data.convert import run
    from lapa.data.spec import open_dataset
    from lapa.data.video import encode_clip
    from lapa.labelling.config import LabelConfig
    from lapa.labelling.run import run as label
    from lapa.latent.model import LatentActionModel
    from lapa.presets import LATENT
    from lapa.sources.videos import VideosConfig

    figures: dict[str, float] = {}

    def note(**values: float) -> None:
        # Written after each part: a machine may be so busy that the rest is not waited for.
        figures.update(values)
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in figures.items())
        options = " ".join(
            f"--{name} {getattr(config, name):g}" for name in ("clips", "seconds", "files", "pairs", "episodes")
        )
        write_text(
            config.out,
            f"# Scale, {time.strftime('%Y-%m-%d')}\n\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}, torch "
            f"{torch.__version__}, Python {sys.version.split()[0]}; a moving texture of 256 px at 30 fps, taken at 10. "
            f"`python benchmarks/bench_scale.py measure {options}`\n\n| figure | value |\n|---|---|\n{rows}",
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = (write_metadata(folder / f"meta{num}", num) for num in (config.episodes, 2 * config.episodes))
        journal, tables = ((many[part] - few[part]) / config.episodes for part in (0, 1))
        note(journal_cpu_s_per_episode=journal, tables_cpu_s_per_episode=tables)

        (folder / "videos").mkdir()
        encode_clip(folder / "videos/0.mp4", drifting(round(config.seconds * 30)), 30.0)
        for number in range(1, config.clips):
            os.link(folder / "videos/0.mp4", folder / f"videos/{number}.mp4")
        start = cpu_seconds()
        run(VideosConfig(str(folder / "videos"), caption="x", rate=10.0, out=folder / "ds", size=256, workers=1))
        video_seconds = config.clips * config.seconds
        size = sum(path.stat().st_size for path in (folder / "ds/videos").rglob("*.mp4"))
        note(convert_cpu_s_per_video_s=(cpu_seconds() - start) / video_seconds, bytes_per_video_s=size / video_seconds)

        measure_store(folder, config, note)

        model = LatentActionModel(LATENT["tiny"].model)
        batch = {"frames_BTCHW": torch.zeros(16, 2, 3, 64, 64, dtype=torch.uint8)}
        model(batch).loss.backward()
        start = cpu_seconds()
        for _ in range(3):
            model(batch).loss.backward()
        note(train_cpu_s_per_pair=(cpu_seconds() - start) / 48)
        model.save_pretrained(folder / "lam")
        start = cpu_seconds()
        label(LabelConfig(lam=folder / "lam", data=str(folder / "ds"), out=str(folder / "labels"), device="cpu"))
        note(label_cpu_s_per_frame=(cpu_seconds() - start) / open_dataset(folder / "ds").num_frames)


def measure_store(folder: Path, config: Measure, note: Callable[..., None]) -> None:
    """Pairs a second of many small files, so that most pairs are in a file that was not read before."""
    from lapa.data.writer import DatasetWriter
    from lapa.store_cache import use_store_cache

    writer = DatasetWriter(folder / "small", fps=10, cameras={"video": (64, 64)})
    frames_THWC = np.ascontiguousarray(drifting(12)[:, :64, :64])
    for _ in range(config.files):
        writer.add_episode({"video": frames_THWC}, "x")
    local = str(writer.finish().root)
    pairs_per_second(local, 16)
    note(local_pairs_per_s=pairs_per_second(local, config.pairs))
    with served(folder):
        for latency in (0, 20, 100):
            SlowServer.latency, data = latency / 1000, "loopback:///small"
            use_store_cache(None, 1)
            one = pairs_per_second(data, 32, ahead=False)
            ahead = pairs_per_second(data, config.pairs)
            use_store_cache(folder / f"cache{latency}", 1)
            cold, warm = pairs_per_second(data, config.pairs), pairs_per_second(data, config.pairs)
            named = {"one_by_one": one, "ahead": ahead, "cache_cold": cold, "cache_warm": warm}
            note(**{f"store_{latency}ms_{name}_pairs_per_s": rate for name, rate in named.items()})
    use_store_cache(None, 1)


def drifting(num: int) -> np.ndarray:
    """Returns frames [T, 256, 256, 3] of a texture that moves by a pixel a frame."""
    texture_HWC = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(texture_HWC, -shift, 1)[:, :256] for shift in range(num)])


def read_figures(path: Path) -> dict[str, float]:
    rows = (line.split("|") for line in path.read_text().splitlines() if line.startswith("| ") and "_" in line)
    return {row[1].strip(): float(row[2]) for row in rows}


def table(config: Table) -> str:
    """Returns the table as Markdown: a row for each quantity, a column for each number of hours."""
    its = read_figures(config.results)
    columns = []
    for hours in HOURS:
        seconds = hours * 3600
        episodes, pairs = seconds / config.clip_seconds, seconds * config.pairs_per_second
        video_bytes = config.mbit_per_second * 125_000 or its["bytes_per_video_s"]
        convert = (config.convert or its["convert_cpu_s_per_video_s"]) * seconds / 3600
        driver = (its["journal_cpu_s_per_episode"] + its["tables_cpu_s_per_episode"]) * episodes / 3600
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


def rounded(number: float) -> str:
    """Returns two significant digits, which is all that these figures have."""
    digits = 1 - int(np.floor(np.log10(number))) if number else 0
    return f"{round(number, digits):,.{max(0, digits)}f}"


if __name__ == "__main__":
    chosen = tyro.cli(Measure | Table)
    if isinstance(chosen, Measure):
        measure(chosen)
    else:
        print(table(chosen))
