"""Demonstrations of an environment's expert, written as a dataset; only successful episodes are kept.

A simulator's own command calls `record_dataset`: lapa.envs.metaworld.record, lapa.envs.language_table.record. The
dataset depends on tasks, episodes, seed and image settings, not on the number of workers.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lapa.config import require_same, to_dict
from lapa.console import finish, progress, say, warn
from lapa.data.metadata import INFO
from lapa.data.workers import Workers
from lapa.data.writer import DatasetWriter
from lapa.envs import Environment, EnvironmentKind
from lapa.envs.config import RecordConfig
from lapa.errors import UserError
from lapa.files import claim_output, write_json

# Settings that do not change the dataset.
RUN_ONLY = ("out", "workers", "overwrite", "resume")


@dataclass(frozen=True)
class Demonstration:
    """One successful episode. Row t: frames and state before action t, and action t."""

    frames_THWC: dict[str, np.ndarray]
    states_TS: np.ndarray
    actions_TA: np.ndarray
    instruction: str


# Plays episode `number` of a task in a worker process; None without success.
Attempt = Callable[[Any, str, int], Demonstration | None]


@dataclass(frozen=True)
class Recording:
    """How a simulator's demonstrations are written.

    command: the subcommand of `lapa data`. attempt: called as attempt(config, task, episode). robot_type: as in the
    dataset's info. horizon_seconds: a horizon that suits these episodes.
    """

    command: str
    kind: EnvironmentKind
    attempt: Attempt
    cameras: tuple[str, ...]
    robot_type: str
    horizon_seconds: float

    @property
    def settings_file(self) -> str:
        """The file in the dataset with the settings that it was begun with."""
        return f"meta/{self.command}.json"


def record_dataset(config: RecordConfig, tasks: Sequence[str], recording: Recording) -> None:
    """Records the dataset at `config.out`. Raises UserError on a user's mistake, before any work is done."""
    if config.size < 16 or config.size % 2:
        raise UserError(f"--size must be even and at least 16, got {config.size}")
    kind = recording.kind
    settings = {name: value for name, value in to_dict(config).items() if name not in RUN_ONLY}
    begun = config.out / recording.settings_file
    if config.resume and (config.out / INFO).exists():
        require_same(begun, settings)
        say(f"{config.out} is complete")
        return
    kind.check_machine()
    claim_output(config.out, complete=(config.out / INFO).exists(), overwrite=config.overwrite, resume=config.resume)
    require_same(begun, settings)
    write_json(begun, settings)
    # Without what is None, as in datasets made before there was such an option.
    noted = {name: value for name, value in settings.items() if value is not None}
    writer = DatasetWriter(
        config.out,
        fps=kind.fps,
        cameras=dict.fromkeys(recording.cameras, (config.size, config.size)),
        action_names=kind.action_names if config.actions else None,
        state_names=kind.state_names if config.actions else None,
        control="delta",
        robot_type=recording.robot_type,
        extra_info={"made_by": f"lapa data {recording.command}", **noted},
        resume=config.resume,
    )
    dropped = record_all(config, tasks, recording, writer)
    dataset = writer.finish()
    if dropped:
        counts = ", ".join(f"{task} {count}" for task, count in dropped.items())
        say(f"dropped {dropped.total()} failed episodes: {counts}")
    length = dataset.num_frames / len(dataset.episodes)
    seconds = f"{length / kind.fps:.1f} s at {kind.fps:.0f} fps"
    say(f"{len(dataset.episodes)} episodes of {length:.0f} frames on average ({seconds})")
    horizon = f"--horizon-seconds {recording.horizon_seconds:g}"
    after = f"lapa latent train --data {config.out} --preset tiny {horizon} --out runs/lam"
    finish("dataset", config.out, [f"lapa data info {config.out}", after])


def record(
    environment: Environment,
    seed: int,
    episode: int,
    frames_after_success: int,
    max_steps: int,
    noise: float,
    motion: int,
    most: float,
) -> Demonstration | None:
    """Records the expert in one episode; None without success within `max_steps`.

    frames_after_success: frames kept after it. noise: its standard deviation on the first `motion` numbers of an
    action, all of which lie within `most` of 0.
    """
    observations, actions = [], []
    environment.reset(seed, episode)
    rng = np.random.default_rng([seed, 2])
    solved_at = None
    for step in range(max_steps):
        action = environment.expert_action()
        action[:motion] += noise * rng.standard_normal(motion)
        action = np.clip(action, -most, most)
        observations.append(environment.observe())
        actions.append(action)
        if environment.step(action) and solved_at is None:
            solved_at = step
        if solved_at is not None and step >= solved_at + frames_after_success:
            break
    if solved_at is None:
        return None
    frames_THWC = {
        camera: np.stack([each.images[camera] for each in observations]) for camera in observations[0].images
    }
    states_TS = np.stack([np.asarray(each.state) for each in observations])
    return Demonstration(frames_THWC, states_TS, np.stack(actions), observations[0].instruction)


def record_all(config: RecordConfig, tasks: Sequence[str], recording: Recording, writer: DatasetWriter) -> Counter[str]:
    """Fills the writer with `config.episodes` of each task, in an order that depends on the config alone.

    Returns how many episodes of each task were dropped.
    """
    dropped: Counter[str] = Counter()
    tried = dict.fromkeys(tasks, 0)
    kept = dict.fromkeys(tasks, 0)
    most = 2 * config.episodes + 10
    num_frames, begun = 0, time.monotonic()
    with progress() as bar, Workers(config.workers or os.cpu_count() or 1) as workers:
        line = bar.add_task("episodes", total=config.episodes * len(tasks), note="")
        # The first round tries the wanted number of episodes; each later one replaces the failed ones.
        while attempts := next_attempts(config.episodes, kept, tried, most):
            done = [f"{task}/{episode}" in writer.done_sources for task, episode in attempts]
            new = [attempt for attempt, have in zip(attempts, done, strict=True) if not have]
            demonstrations = workers.in_order(recording.attempt, ((config, *attempt) for attempt in new))
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


def next_attempts(wanted: int, kept: dict[str, int], tried: dict[str, int], most: int) -> list[tuple[str, int]]:
    """Returns the (task, episode number) pairs to try next, and counts them as tried."""
    attempts = []
    for task, have in kept.items():
        stop = min(tried[task] + wanted - have, most)
        attempts += [(task, episode) for episode in range(tried[task], stop)]
        tried[task] = stop
    return attempts
