"""Measures how fast Meta-World renders and steps: as shipped, in lapa's simulator, and in a whole recording.

    python benchmarks/bench_metaworld.py            # about a minute on two CPU cores

`as shipped` is metaworld's own `env.render()` (gymnasium's renderer, multisampling, shadows, reflections), through
the same EGL backend. `recording` is `lapa data metaworld` on all cores: physics, images and video encoding.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lapa
from lapa.console import say
from lapa.envs.metaworld import MetaworldConfig
from lapa.envs.metaworld.record import run
from lapa.envs.metaworld.simulator import METAWORLD, Simulator

TASK, SIZE, SECONDS = "door-open", 128, 6.0


def rate(call: Callable[[], object]) -> float:
    """Returns calls a second, after a first call that warms up."""
    call()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        call()
        calls += 1
    return calls / (time.perf_counter() - begun)


def shipped() -> float:
    """Returns frames a second of metaworld's own renderer."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    kind = ALL_V3_ENVIRONMENTS[f"{TASK}-v3"]
    environment = kind(render_mode="rgb_array", camera_name="corner4", width=SIZE, height=SIZE)
    environment._freeze_rand_vec = False
    environment._set_task_called = True
    environment.reset()
    return rate(environment.render)


def ours() -> float:
    """Returns frames a second of lapa's simulator."""
    simulator = Simulator(TASK, size=SIZE)
    simulator.reset(0)
    return rate(simulator.render)


def physics() -> float:
    """Returns steps a second without images, including the expert's actions."""
    simulator = Simulator(TASK, size=SIZE)
    simulator.reset(0)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps % 400 == 0:
            simulator.reset(0)
        simulator.step(simulator.expert_action())

    return rate(step)


def recording() -> float:
    """Returns frames a second of a recording on all cores, including the start of the workers."""
    with tempfile.TemporaryDirectory() as folder:
        out, begun = Path(folder) / "data", time.perf_counter()
        run(MetaworldConfig(out=out, tasks=TASK, episodes=8, size=SIZE))
        return lapa.open_dataset(out).num_frames / (time.perf_counter() - begun)


def main() -> None:
    METAWORLD.check_machine()
    # A process has one OpenGL context, so each measurement has its own process.
    context = multiprocessing.get_context("spawn")
    figures = {}
    for measure in (shipped, ours, physics):
        with context.Pool(1) as pool:
            figures[measure.__name__] = pool.apply(measure)
    figures["recording"] = recording()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("metaworld", "mujoco", "lapa"))
    say(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, {os.environ.get('MUJOCO_GL')}")
    say(f"python {platform.python_version()}, {versions}; {TASK}, {SIZE} px; {' '.join(sys.argv)}")
    say(f"rendering as shipped   {figures['shipped']:8.1f} frames/s")
    say(f"rendering here         {figures['ours']:8.1f} frames/s")
    say(f"physics and expert     {figures['physics']:8.1f} steps/s")
    say(f"recording a dataset    {figures['recording']:8.1f} frames/s")


if __name__ == "__main__":
    main()
