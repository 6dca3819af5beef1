"""Measures LIBERO in one process: the loop with which others evaluate, and an episode of `lapa evaluate`.

    LP_NUM_THREADS=1 python benchmarks/bench_libero.py        # three minutes on an idle CPU core

Figures are CPU time, which other programs on the machine change little; LP_NUM_THREADS is Mesa's renderer's. The policy
does nothing and costs nothing. `others` compiles the model at each reset and renders two cameras at every step, as
OpenVLA, openpi and LeRobot do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lapa.console import say
from lapa.envs import libero
from lapa.evaluation import episodes
from lapa.evaluation.episodes import RolloutSettings, TaskEpisodes, play_episodes
from lapa.types import Observation

TASK, SUITE, CHUNK = "pick_up_the_milk_and_place_it_in_the_basket", "libero_object", 10
KIND = libero.LIBERO


class Timed:
    """An environment that counts the CPU seconds within its methods."""

    def __init__(self, environment: Any) -> None:
        self.environment, self.seconds = environment, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            begun = time.process_time()
            try:
                return getattr(self.environment, name)(*given)
            finally:
                self.seconds += time.process_time() - begun

        return timed


def others(steps: int) -> None:
    """Plays one episode as others do."""
    from libero.libero.envs import OffScreenRenderEnv

    suite, number = libero._suite(SUITE), libero._tasks()[SUITE].index(TASK)
    size = {"camera_heights": KIND.size, "camera_widths": KIND.size}
    simulator = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(number), **size)
    simulator.seed(7)
    begun = time.process_time()
    simulator.reset()
    simulator.set_init_state(suite.get_task_init_states(number)[0])
    reset = time.process_time() - begun
    for _ in range(libero.SETTLING_STEPS + steps):
        seen, *_ = simulator.step(libero.STILL)
        for view in ("agentview", "robot0_eye_in_hand"):
            np.ascontiguousarray(seen[f"{view}_image"][::-1, ::-1])
    report("others, images every step", steps, time.process_time() - begun, reset)
    simulator.close()


def ours(steps: int, steps_per_call: int) -> None:
    """Plays one episode by the harness of `lapa evaluate`."""
    environment = Timed(KIND.make(TASK, size=KIND.size, cameras=KIND.cameras))
    environment.reset(1, 1)
    reset = environment.seconds

    def still(observations: Sequence[Observation]) -> np.ndarray:
        return np.broadcast_to(libero.STILL, (len(observations), CHUNK, KIND.action_dim))

    settings = RolloutSettings(
        env="libero",
        size=KIND.size,
        cameras=KIND.cameras,
        seed=0,
        max_steps=steps,
        actor="policy",
        num_parallel=1,
        steps_per_call=steps_per_call,
    )
    episodes.make = lambda *_, **__: environment  # type: ignore[attr-defined]
    environment.seconds, begun = 0.0, time.process_time()
    list(play_episodes(settings, [TaskEpisodes(TASK, (0,))], still, num_workers=0))
    total = time.process_time() - begun
    outside = f"; {(total - environment.seconds) / total:.1%} outside the simulator"
    report(f"ours, images every {steps_per_call} steps", steps, total, reset, outside)


def report(name: str, steps: int, total: float, reset: float, more: str = "") -> None:
    """total: CPU seconds of an episode; reset: those of one reset, of which ours includes the settling steps."""
    say(f"{name:28} {steps / total:6.1f} steps/s  {60 / total:5.2f} rollouts/min  reset {reset:.2f} s{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=libero.LIMITS[SUITE])
    steps = parser.parse_args().steps
    notes = KIND.check_machine()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in KIND.packages)
    say(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, python {platform.python_version()}")
    say(f"{notes['libero']}, {versions}; two cameras of {KIND.size} px, {steps} steps of {TASK}")
    ours(steps, CHUNK)
    ours(steps, 1)
    others(steps)


if __name__ == "__main__":
    main()
