"""Measures `lapa serve`: what a request costs in addition to the model, what batching brings, and whether memory grows.

    OMP_NUM_THREADS=1 python benchmarks/bench_serve.py
    OMP_NUM_THREADS=1 python benchmarks/bench_serve.py --requests 10000 --seconds 5 --rounds 5

A policy with random weights of bench_policy.py (--policy, --head) is saved to a folder. Two servers of it run as users
start them, each in a process of its own: `batched` with the default options, `one by one` with --max-batch 1. A server
whose turn it is not has no clients, and does nothing.

- Round trip: one client sends one request after the other to `batched`, and the time that the server reports for its
  model (`infer_ms`) is subtracted from each. Direct calls of `Policy.infer` in this process take turns with them.
- Throughput: 1, 4 and 16 clients, each of which sends its next request as soon as it has a reply, to `one by one` and
  `batched` in turns. Clients are connections of one asyncio loop in a process of its own; their messages are packed
  before, and replies are only counted, so that they need little of the second core. The table has the processor time
  of both sides: a side at 100% of a core is what limits.
- Soak: --requests requests of 16 clients to `batched`, which begin new connections on the way; resident memory of the
  server at the start (after a tenth as many requests that do not count), in the middle and at the end. The command
  fails where the second half adds more than --growth MiB.

Figures are medians over the rounds of what one round measures. An aim (AIMS) that is missed is named at the end.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import bench_policy
import numpy as np
import psutil
import torch
import tyro
from websockets.asyncio.client import connect

from lapa.policy.config import HeadKind
from lapa.policy.runtime import Policy
from lapa.serve.client import pack, unpack

# Milliseconds of a round trip minus the model's; requests/s of batched over one by one with the most clients.
AIMS = {"round trip": 3.0, "batching": 1.5}
MESSAGES, RECONNECT_AFTER, START_SECONDS = 64, 250, 180
SERVERS: dict[str, tuple[str, ...]] = {"one by one": ("--max-batch", "1"), "batched": ()}


@dataclass(frozen=True)
class BenchConfig:
    """Measure a server."""

    size: Annotated[Literal["debug", "tiny", "100m"], tyro.conf.arg(name="policy")] = "tiny"
    """Backbone of the policy, as of bench_policy.py."""
    head: HeadKind = "chunk"
    chunk: int = 8
    action_dim: int = 7
    image_size: int = 256
    """Height and width of the images that clients send."""
    clients: tuple[int, ...] = (1, 4, 16)
    rounds: int = 5
    seconds: float = 4.0
    """Of each measurement of throughput, after half a second that does not count."""
    round_trips: int = 100
    """Requests of a round that measures the round trip."""
    requests: int = 10_000
    """Requests of the soak."""
    growth: float = 8.0
    """MiB that the second half of the soak may add."""


@dataclass(frozen=True)
class Server:
    """A process of `lapa serve`."""

    name: str
    port: int
    process: psutil.Process

    @property
    def address(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def mebibytes(self) -> float:
        return float(self.process.memory_info().rss) / 2**20


@dataclass(frozen=True)
class Load:
    """What a group of clients saw. cores: processor time over time, of the server and of the clients."""

    milliseconds: list[float] = field(repr=False)
    seconds: float
    server_cores: float = 0.0
    client_cores: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.milliseconds) / self.seconds

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.milliseconds, share))


def main(config: BenchConfig) -> int:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        policy = save_policy(config, Path(folder) / "policy")
        servers = {name: stack.enter_context(serve(name, Path(folder) / "policy")) for name in SERVERS}
        clients = stack.enter_context(multiprocessing.get_context("spawn").Pool(1))
        images_NHWC = np.random.default_rng(0).integers(
            0, 256, (MESSAGES, config.image_size, config.image_size, 3), dtype=np.uint8
        )
        observations = [
            {bench_policy.CAMERA: image, "instruction": bench_policy.INSTRUCTIONS[at % len(bench_policy.INSTRUCTIONS)]}
            for at, image in enumerate(images_NHWC)
        ]
        messages = [pack(observation) for observation in observations]
        print(
            f"\n{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, torch {torch.__version__} ({torch.get_num_threads()} threads); "
            f"{config.size}, {config.head}, {policy.chunk} x {policy.action_dim} actions, images of "
            f"{config.image_size} px ({len(messages[0]) / 1000:.0f} kB a message); medians of {config.rounds} rounds"
        )
        missed = measure_round_trip(config, policy, servers["batched"], observations, messages)
        missed += measure_throughput(config, servers, clients, messages)
        grown = soak(config, servers["batched"], clients, messages)
    for line in missed + grown:
        print(f"missed: {line}", file=sys.stderr)
    return len(grown)


def save_policy(config: BenchConfig, folder: Path) -> Policy:
    """Writes a policy with random weights, and returns it as it is read again."""
    torch.manual_seed(0)
    sizes = bench_policy.BenchConfig(action_dim=config.action_dim, chunk=config.chunk, bins_chunk=config.chunk)
    built = bench_policy.build(config.size, sizes, torch.device("cpu"), torch.float32)
    built.policies[config.head].save_pretrained(folder, run={})
    return Policy.from_pretrained(folder, "cpu")


@contextmanager
def serve(name: str, policy: Path) -> Iterator[Server]:
    """Starts a server and waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lapa", "serve", str(policy), "--port", str(port), *SERVERS[name]]
    log = policy.with_name(f"{name}.log")
    with log.open("wb") as written, subprocess.Popen(command, stdout=written, stderr=written) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} does not answer:\n{log.read_text()}")
                time.sleep(0.1)
            yield Server(name, port, psutil.Process(process.pid))
        finally:
            process.terminate()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as reply:
            return bool(reply.read() == b"OK")
    except OSError:
        return False


def measure_round_trip(
    config: BenchConfig, policy: Policy, server: Server, observations: Sequence[dict[str, Any]], messages: list[bytes]
) -> list[str]:
    """Prints the round trip of one client and what of it is the model's; returns the aim where it is missed."""
    rounds = []
    for _ in range(1 + config.rounds):
        whole, model = asyncio.run(one_after_the_other(server.address, messages, config.round_trips))
        direct = []
        for at in range(config.round_trips):
            begun = time.perf_counter()
            policy.infer(observations[at % len(observations)])
            direct.append(1e3 * (time.perf_counter() - begun))
        rest = np.subtract(whole, model)
        rounds.append(
            [*(np.quantile(each, share) for each in (whole, model, rest, direct) for share in (0.5, 0.99)), rest.min()]
        )
    median = np.median(rounds[1:], axis=0)
    print("\n| one client, ms | p50 | p99 |\n|---|---|---|")
    names = ("round trip", "of it the model, as the server reports", "the rest", "`Policy.infer` called directly")
    for at, name in enumerate(names):
        print(f"| {name} | {median[2 * at]:.2f} | {median[2 * at + 1]:.2f} |")
    if median[4] < AIMS["round trip"]:
        return []
    return [f"a round trip takes {median[4]:.2f} ms in addition to the model; the aim is {AIMS['round trip']:g}"]


async def one_after_the_other(address: str, messages: list[bytes], count: int) -> tuple[list[float], list[float]]:
    """Returns milliseconds of each round trip and of the model in it."""
    whole, model = [], []
    async with connect(address, compression=None, max_size=None) as client:
        await client.recv()
        for at in range(count):
            begun = time.perf_counter()
            await client.send(messages[at % len(messages)])
            reply = await client.recv()
            whole.append(1e3 * (time.perf_counter() - begun))
            model.append(float(answered(reply)["server_timing"]["infer_ms"]))
    return whole, model


def measure_throughput(
    config: BenchConfig, servers: dict[str, Server], clients: Any, messages: list[bytes]
) -> list[str]:
    """Prints requests/s and latency of `one by one` and `batched`; returns the aim where it is missed."""
    rates = {}
    print("\n| clients | server | requests/s | p50, ms | p99, ms | cores: server | clients | batched over one by one |")
    print("|---|---|---|---|---|---|---|---|")
    for number in config.clients:
        loads: dict[str, list[Load]] = {name: [] for name in servers}
        for _ in range(config.rounds):
            for name in servers:
                loads[name].append(loaded(servers[name], clients, messages, number, seconds=config.seconds))
        ratios = [two.rate / one.rate for one, two in zip(*loads.values(), strict=True)]
        rates[number] = statistics.median(ratios)
        for name, each in loads.items():
            cells = [statistics.median(values) for values in zip(*map(figures, each), strict=True)]
            last = f"{rates[number]:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if name == "batched" else ""
            print(
                f"| {number} | {name} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:.1f} | {cells[3]:.0%} | "
                f"{cells[4]:.0%} | {last} |",
                flush=True,
            )
    most = max(config.clients)
    if most < 16 or rates[most] >= AIMS["batching"]:
        return []
    return [
        f"batching brings {rates[most]:.2f} times the requests/s with {most} clients; the aim is {AIMS['batching']:g}"
    ]


def figures(load: Load) -> tuple[float, ...]:
    return load.rate, load.quantile(0.5), load.quantile(0.99), load.server_cores, load.client_cores


def soak(config: BenchConfig, server: Server, clients: Any, messages: list[bytes]) -> list[str]:
    """Prints the server's resident memory over many requests; returns a line where the second half adds to it."""
    number, half = max(config.clients), config.requests // 2
    run = partial(loaded, server, clients, messages, number)
    run(requests=config.requests // 10)
    start = server.mebibytes
    first = run(requests=half)
    middle = server.mebibytes
    second = run(requests=half)
    end = server.mebibytes
    print("\n| requests | seconds | requests/s | MiB at the start | in the middle | at the end |")
    print("|---|---|---|---|---|---|")
    count, took = len(first.milliseconds) + len(second.milliseconds), first.seconds + second.seconds
    print(f"| {count:,} | {took:.0f} | {count / took:.0f} | {start:.1f} | {middle:.1f} | {end:.1f} |")
    if end - middle <= config.growth:
        return []
    return [f"the server has {end - middle:.1f} MiB more after another {half} requests; {config.growth:g} are allowed"]


def loaded(
    server: Server, clients: Any, messages: list[bytes], number: int, *, seconds: float = 0.0, requests: int = 0
) -> Load:
    """Lets `number` clients ask for some seconds or a number of requests."""
    return clients.apply(_load, (server.address, server.process.pid, messages, number, seconds, requests))


def _load(address: str, pid: int, messages: list[bytes], number: int, seconds: float, requests: int) -> Load:
    return asyncio.run(_load_of_clients(address, psutil.Process(pid), messages, number, seconds, requests))


async def _load_of_clients(
    address: str, server: psutil.Process, messages: list[bytes], number: int, seconds: float, requests: int
) -> Load:
    milliseconds: list[float] = []
    counting, stopped, taken = not seconds, False, 0

    async def ask(first: int) -> None:
        nonlocal taken
        at = first
        while not stopped:
            async with connect(address, compression=None, max_size=None) as client:
                await client.recv()
                for _ in range(RECONNECT_AFTER):
                    if stopped or (requests and taken == requests):
                        return
                    taken += 1
                    at += 1
                    begun = time.perf_counter()
                    await client.send(messages[at % len(messages)])
                    reply = await client.recv()
                    if counting:
                        milliseconds.append(1e3 * (time.perf_counter() - begun))
                    if isinstance(reply, str):
                        raise SystemExit(f"the server refuses: {reply}")

    tasks = [asyncio.create_task(ask(first)) for first in range(number)]
    own = psutil.Process()
    if seconds:
        await asyncio.sleep(0.5)
    begun, before, counting = time.perf_counter(), (_processor(server), _processor(own)), True
    if seconds:
        await asyncio.sleep(seconds)
    else:
        await asyncio.gather(*tasks)
    took, after = time.perf_counter() - begun, (_processor(server), _processor(own))
    counting, stopped = False, True
    await asyncio.gather(*tasks)
    return Load(milliseconds, took, (after[0] - before[0]) / took, (after[1] - before[1]) / took)


def _processor(process: psutil.Process) -> float:
    """Seconds of processor time that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def answered(reply: str | bytes) -> dict[str, Any]:
    if isinstance(reply, str):
        raise SystemExit(f"the server refuses: {reply}")
    return unpack(reply)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(BenchConfig, description=__doc__)))
