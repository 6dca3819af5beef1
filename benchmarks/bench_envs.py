"""Measures how fast an environment is, and what `lapa evaluate` adds to the simulator's own loop.

    python benchmarks/bench_envs.py synthetic
    python benchmarks/bench_envs.py language_table --task separate --steps 100 --out benchmarks/results

The simulator's own loop resets, observes before every action and steps, in one process. Ours is that of `lapa evaluate`
with random actions of a policy: at every step a worker sends an observation to the parent and gets an action back.
Times are CPU seconds of the process and its workers, which other programs disturb less than the clock; rollouts a
minute are by the clock. The start of the processes and each one's first reset are left out, so only one worker compares
with the own loop.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from lapa.envs import Environment, EnvironmentKind, episode_seed, kind_of, make
from lapa.evaluation.episodes import RolloutSettings, TaskEpisodes, play_episodes
from lapa.types import Observation


def cpu_seconds() -> float:
    """CPU seconds of this process and the ones that it started and that live."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


class Random:
    """A policy of random actions, one at a time, which notes what had been spent when it was first asked."""

    def __init__(self, kind: EnvironmentKind) -> None:
        self.kind, self.rng, self.calls = kind, np.random.default_rng(0), 0

    def __call__(self, observations: Sequence[Observation]) -> np.ndarray:
        if self.calls == 0:
            self.cpu, self.clock = cpu_seconds(), time.perf_counter()
        self.calls += 1
        size = (len(observations), 1, self.kind.action_dim)
        return self.rng.uniform(self.kind.action_low, self.kind.action_high, size)


def parts(environment: Environment, kind: EnvironmentKind, task: str, steps: int) -> dict[str, float]:
    """CPU milliseconds of a reset, an observation, a step without and with it, in this process."""
    rng, cost = np.random.default_rng(0), {}

    def measure(name: str, calls: int, call: Callable[[int], object]) -> None:
        begun = time.process_time()
        for number in range(calls):
            call(number)
        cost[name] = 1000 * (time.process_time() - begun) / calls

    environment.reset(episode_seed(0, "evaluation", task, 0), 0)
    environment.observe()
    measure("reset", 3, lambda number: environment.reset(episode_seed(0, "evaluation", task, number), number))
    measure("image and state", steps, lambda _: environment.observe())
    measure("step", steps, lambda _: environment.step(rng.uniform(kind.action_low, kind.action_high)))
    if kind.parse_tasks(task)[task].expert:
        measure("expert", steps, lambda _: environment.step(environment.expert_action()))
        cost["expert"] -= cost["step"]
    return cost


def own_loop(environment: Environment, kind: EnvironmentKind, task: str, steps: int, episodes: int) -> float:
    """CPU seconds of the simulator's own loop, after its first reset."""
    rng = np.random.default_rng(0)
    environment.reset(episode_seed(0, "evaluation", task, 0), 0)
    begun = time.process_time()
    for episode in range(episodes):
        if episode:
            environment.reset(episode_seed(0, "evaluation", task, episode), episode)
        for _ in range(steps):
            environment.observe()
            environment.step(rng.uniform(kind.action_low, kind.action_high))
    return time.process_time() - begun


def ours(name: str, task: str, steps: int, episodes: int, workers: int) -> tuple[float, float]:
    """CPU seconds and seconds of the same episodes through worker processes, after each one's first reset."""
    kind = kind_of(name)
    settings = RolloutSettings(name, kind.size, kind.cameras, 0, steps, "policy", 1, steps_per_call=1)
    assignments = [TaskEpisodes(task, tuple(range(episodes))[part::workers]) for part in range(workers)]
    policy = Random(kind)
    results = play_episodes(settings, assignments, policy, workers)
    # The processes end with the last result.
    for _ in range(episodes):
        next(results)
        spent = cpu_seconds() - policy.cpu, time.perf_counter() - policy.clock
    list(results)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--task", help="by default the first")
    parser.add_argument("--steps", type=int, default=50, help="of an episode")
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for envs_NAME.md")
    options = parser.parse_args()
    kind = kind_of(options.env)
    notes = kind.check_machine()
    task = options.task or next(iter(kind.parse_tasks("all")))
    environment = make(options.env, task)
    cost = parts(environment, kind, task, options.steps)
    alone = own_loop(environment, kind, task, options.steps, options.episodes)
    environment.close()

    versions = " ".join(f"{package} {importlib.metadata.version(package)}" for package in kind.packages)
    load = os.getloadavg()[0]
    lines = [
        f"# {options.env}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/bench_envs.py {' '.join(sys.argv[1:])}`: {task}, {options.episodes} episodes of "
        f"{options.steps} steps, cameras {', '.join(kind.cameras)} at {kind.size} px. {os.cpu_count()} cores "
        f"{platform.machine()}, load {load:.1f}, Python {platform.python_version()} {versions}.",
        *(f"{key}: {text}." for key, text in notes.items()),
        "",
        "| part | CPU ms |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in cost.items()),
        "",
        "| loop | CPU s | CPU steps/s | over the own loop | rollouts/minute |",
        "|---|---|---|---|---|",
    ]
    total = options.steps * options.episodes
    lines.append(f"| the simulator's own | {alone:.2f} | {total / alone:.1f} | | |")
    for workers in (1, 2):
        cpu, seconds = ours(options.env, task, options.steps, options.episodes, workers)
        rate = 60 * options.episodes / seconds
        over = f"{cpu / alone - 1:+.0%}" if workers == 1 else ""
        speed = f"{cpu:.2f} | {total / cpu:.1f} | {over} | {rate:.1f}"
        lines.append(f"| `lapa evaluate`, {workers} worker{'s' * (workers > 1)} | {speed} |")
    text = "\n".join(lines) + "\n"
    if options.out:
        (options.out / f"envs_{options.env}_{os.cpu_count()}-core-cpu_{time.strftime('%Y-%m-%d')}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
