"""Demonstrations from Meta-World's scripted experts, written as a dataset; only successful episodes are kept.

    lapa data metaworld --tasks mt10 --episodes 50 --seed 0 --no-actions --out data/videos
    lapa data metaworld --tasks door-open,window-open --episodes 5 --seed 1 --out data/robot

The control rate is 80 Hz and an expert needs 40 to 120 steps, about one second: a horizon of 0.1 to 0.2 seconds
(8 to 16 frames) suits these episodes; the paper's 0.6 seconds would span half of one.
The dataset depends on tasks, episodes, seed and image settings, not on the number of workers.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from lapa.config import require_at_least, require_same, to_dict
from lapa.console import finish, progress, say, warn
from lapa.data.metadata import INFO
from lapa.data.workers import Workers
from lapa.data.writer import DatasetWriter
from lapa.envs import episode_seed
from lapa.envs.metaworld import MetaworldConfig
from lapa.envs.metaworld.simulator import (
    ACTION_NAMES,
    FPS,
    MAX_STEPS,
    METAWORLD,
    STATE_NAMES,
    Simulator,
    check_cameras,
)
from lapa.errors import UserError
from lapa.files import claim_output, write_json
from lapa.locks import locks_output

# Frames kept after success: enough to show the result, too few to train a policy to stand still.
FRAMES_AFTER_SUCCESS = 5
BEGUN = "meta/metaworld.json"
# Settings that do not change the dataset.
RUN_ONLY = ("out", "workers", "overwrite", "resume")


@dataclass(frozen=True)
class Demonstration:
    """One successful episode. Row t: frames and state before action t, and action t."""

    frames_THWC: dict[str, np.ndarray]
    states_TS: np.ndarray
    actions_TA: np.ndarray
    instruction: str


@locks_output
def run(config: MetaworldConfig) -> None:
    """Records the dataset at `config.out`. Raises UserError on a user's mistake, before any work is done."""
    tasks = tuple(METAWORLD.parse_tasks(config.tasks))
    _check(config)
    settings = {name: value for name, value in to_dict(config).items() if name not in RUN_ONLY}
    if config.resume and (config.out / INFO).exists():
        require_same(config.out / BEGUN, settings)
        say(f"{config.out} is complete")
        return
    METAWORLD.check_machine()
    claim_output(config.out, complete=(config.out / INFO).exists(), overwrite=config.overwrite, resume=config.resume)
    require_same(config.out / BEGUN, settings)
    write_json(config.out / BEGUN, settings)
    # Without a look where it is None, as in datasets made before there were looks.
    noted = {name: value for name, value in settings.items() if name != "look" or value is not None}
    writer = DatasetWriter(
        config.out,
        fps=FPS,
        cameras=dict.fromkeys(config.cameras, (config.size, config.size)),
        action_names=ACTION_NAMES if config.actions else None,
        state_names=STATE_NAMES if config.actions else None,
        # The gripper's number is the effort with which it closes, anywhere from -1 to 1.
        control="delta",
        robot_type="metaworld-sawyer",
        extra_info={"made_by": "lapa data metaworld", **noted},
        resume=config.resume,
    )
    dropped = _record_all(config, tasks, writer)
    dataset = writer.finish()
    if dropped:
        counts = ", ".join(f"{task} {count}" for task, count in dropped.items())
        say(f"dropped {dropped.total()} failed episodes: {counts}")
    length = dataset.num_frames / len(dataset.episodes)
    say(f"{len(dataset.episodes)} episodes of {length:.0f} frames on average ({length / FPS:.1f} s at {FPS:.0f} fps)")
    after = f"lapa latent train --data {config.out} --preset tiny --horizon-seconds 0.2 --out runs/lam"
    finish("dataset", config.out, [f"lapa data info {config.out}", after])


def record(simulator: Simulator, seed: int, *, noise: float = 0.0, max_steps: int = MAX_STEPS) -> Demonstration | None:
    """Records the expert in the episode of `seed`; None without success within `max_steps`."""
    rng = np.random.default_rng([seed, 2])
    frames: dict[str, list[np.ndarray]] = {camera: [] for camera in simulator.cameras}
    states, actions = [], []
    simulator.reset(seed)
    solved_at = None
    for step in range(max_steps):
        action = simulator.expert_action()
        action[:3] += noise * rng.standard_normal(3)
        action = np.clip(action, -1, 1)
        for camera, image in simulator.render().items():
            frames[camera].append(image)
        states.append(simulator.state)
        actions.append(action)
        if simulator.step(action) and solved_at is None:
            solved_at = step
        if solved_at is not None and step == solved_at + FRAMES_AFTER_SUCCESS:
            break
    if solved_at is None:
        return None
    frames_THWC = {camera: np.stack(images) for camera, images in frames.items()}
    return Demonstration(frames_THWC, np.stack(states), np.stack(actions), simulator.instruction)


def _record_all(config: MetaworldConfig, tasks: tuple[str, ...], writer: DatasetWriter) -> Counter[str]:
    """Fills the writer with `config.episodes` of each task, in an order that depends on the config alone."""
    dropped: Counter[str] = Counter()
    tried = dict.fromkeys(tasks, 0)
    kept = dict.fromkeys(tasks, 0)
    most = 2 * config.episodes + 10
    num_frames, begun = 0, time.monotonic()
    with progress() as bar, Workers(config.workers or os.cpu_count() or 1) as workers:
        line = bar.add_task("episodes", total=config.episodes * len(tasks), note="")
        # The first round tries the wanted number of episodes; each later one replaces the failed ones.
        while attempts := _next_attempts(config.episodes, kept, tried, most):
            done = [f"{task}/{episode}" in writer.done_sources for task, episode in attempts]
            new = [attempt for attempt, have in zip(attempts, done, strict=True) if not have]
            demonstrations = workers.in_order(_attempt, ((config, *attempt) for attempt in new))
            for (task, episode), have in zip(attempts, done, strict=True):
                demonstration = None if have else next(demonstrations)
                if demonstration is not None:
                    writer.add_episode(
                        demonstration.frames_THWC,
                        demonstration.instruction,
                        actions=demonstration.actions_TA if config.actions else None,
                        states=demonstration.states_TS if config.actions else None,
                        source=f"{task}/{episode}",
                    )
                    num_frames += len(demonstration.states_TS)
                elif not have:
                    dropped[task] += 1
                    continue
                kept[task] += 1
                rate = num_frames / (time.monotonic() - begun)
                bar.update(line, advance=1, note=f"{task}, {rate:.0f} frames/s")
    for task in tasks:
        if kept[task] < config.episodes:
            warn(f"{task}: {kept[task]} of {config.episodes} episodes; the expert failed {dropped[task]} times")
    say(f"{num_frames} frames in {time.monotonic() - begun:.0f} s")
    return dropped


def _next_attempts(wanted: int, kept: dict[str, int], tried: dict[str, int], most: int) -> list[tuple[str, int]]:
    """Returns the (task, episode number) pairs to try next, and counts them as tried."""
    attempts = []
    for task, have in kept.items():
        stop = min(tried[task] + wanted - have, most)
        attempts += [(task, episode) for episode in range(tried[task], stop)]
        tried[task] = stop
    return attempts


_simulator: Simulator | None = None


def _attempt(config: MetaworldConfig, task: str, episode: int) -> Demonstration | None:
    """Runs in a worker process, which keeps its simulator until another task comes."""
    global _simulator
    if _simulator is None or _simulator.task != task:
        if _simulator is not None:
            _simulator.close()
        _simulator = Simulator(task, size=config.size, cameras=config.cameras, look=config.look)
    seed = episode_seed(config.seed, "demonstration", task, episode)
    return record(_simulator, seed, noise=config.noise, max_steps=config.max_steps)


def _check(config: MetaworldConfig) -> None:
    check_cameras(config.cameras)
    require_at_least(config, episodes=1, look=0, noise=0, workers=1)
    if config.size < 16 or config.size % 2:
        raise UserError(f"--size must be even and at least 16, got {config.size}")
    if not 1 <= config.max_steps <= MAX_STEPS:
        raise UserError(f"--max-steps must lie in 1 to {MAX_STEPS} (Meta-World's own limit), got {config.max_steps}")
