"""Success rates of a policy in a simulator, with Wilson intervals, and videos of its first rollouts.

    lapa evaluate runs/policy --env metaworld --tasks mt10 --episodes 50 --out results/policy
    lapa evaluate random --env metaworld --tasks mt10 --episodes 50 --out results/random

An episode's goal, object positions and phrasing depend on seed, task and episode number only, so that policies
evaluated with one seed meet the same episodes, and none that `lapa data` ever draws.
Interval: Wilson, JASA 22 (1927), 209-212.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from lapa.config import require_same, to_dict
from lapa.console import console, finish, progress, say
from lapa.data.video import encode_clip
from lapa.envs.registry import EnvironmentKind, kind_of
from lapa.errors import UserError
from lapa.evaluate.episodes import VIDEO_FPS, Infer, Job, Outcome, Setup, play_all
from lapa.files import atomic_path, claim_output, fingerprint, read_json, read_json_lines, write_json

if TYPE_CHECKING:
    from lapa.policy.acting import Actor

BASELINES = ("random", "expert")
CONFIG, EPISODES, RESULTS = "config.json", "episodes.jsonl", "results.json"
GREEN, RED = (40, 180, 70), (210, 50, 40)


@dataclass(frozen=True)
class EvaluateConfig:
    """Rolls a policy out and counts its successes."""

    policy: Annotated[str, tyro.conf.Positional]
    """Folder of a finetuned policy, or `random` or `expert` as baselines."""
    out: Path
    """Folder for results.json and the videos."""
    env: str = "metaworld"
    """Environment: metaworld or synthetic."""
    tasks: str = "mt10"
    """Task names parted by commas; metaworld also takes mt10 and mt50, synthetic takes all."""
    episodes: int = 20
    """Episodes of each task."""
    seed: int = 0
    """Draws the episodes' goals; policies are comparable under one seed."""
    max_steps: int | None = None
    """An episode has failed after so many steps; by default 250 in Meta-World."""
    steps_per_call: int | None = None
    """Steps after which the policy is asked again; by default when all actions of its chunk are executed, or with
    --ensemble at every step."""
    ensemble: float | None = None
    """Average what overlapping chunks say of a moment, the i-th oldest weighted exp(-ENSEMBLE * i): 0.01 is usual."""
    prompt_of: str | None = None
    """Whose prompt the policy reads, of the datasets it learned from; by default --statistics-key's, or its own."""
    statistics_key: str | None = None
    """By which dataset's statistics the policy acts, where it learned from several with actions."""
    size: int | None = None
    """Height and width of rendered pictures; by default 128 in Meta-World."""
    videos: int = 4
    """Rollouts of each task shown in its video; 0 for none."""
    workers: int | None = None
    """Simulator processes, 0 for none beside this one; by default one for each CPU core."""
    parallel: int = 16
    """Simulators in all processes together, and so the largest batch of the policy."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Play only the episodes that are missing at --out."""


def run(config: EvaluateConfig) -> None:
    """`lapa evaluate`: prints a table and the paths of what was written."""
    results = evaluate(config)
    console.print(_table(results))
    videos = sorted((config.out / "videos").glob("*.mp4"))
    if videos:
        say(f"videos: {config.out / 'videos'} ({len(videos)} tasks, green border for success)")
    finish("results", config.out / RESULTS)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Plays the episodes and returns what it writes to results.json. UserError on a user's mistake, before any work.

    Keys: tasks (task -> successes, episodes, success_rate, interval, mean_steps), overall (the same), episodes,
    config, and the versions and hardware of lapa.engine.metrics.versions_and_hardware.
    """
    kind, tasks = kind_of(config.env), kind_of(config.env).parse_tasks(config.tasks)
    _check(config, kind)
    identity = _identity(config)
    if config.resume and (config.out / RESULTS).exists():
        require_same(config.out / CONFIG, identity)
        say(f"{config.out} is complete")
        return read_json(config.out / RESULTS)
    kind.check_machine()
    setup, infer = _prepare(config, kind)
    claim_output(
        config.out,
        complete=(config.out / RESULTS).exists(),
        overwrite=config.overwrite,
        resume=config.resume,
        inputs=[] if config.policy in BASELINES else [Path(config.policy)],
    )
    require_same(config.out / CONFIG, identity)
    write_json(config.out / CONFIG, identity)
    begun = time.monotonic()
    outcomes = _play(config, setup, infer, tasks, 0 if kind.in_process else config.workers)
    results = {
        "policy": config.policy,
        "policy_fingerprint": identity["policy_fingerprint"],
        "env": config.env,
        "seed": config.seed,
        "tasks": {task: summarise(o for o in outcomes if o.task == task) for task in tasks},
        "overall": summarise(outcomes),
        "seconds": round(time.monotonic() - begun, 1),
        "config": {**to_dict(config), "max_steps": setup.max_steps, "size": setup.size},
        **_provenance(config.env),
        "episodes": [_plain(outcome) for outcome in outcomes],
    }
    write_json(config.out / RESULTS, results)
    return results


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a success rate; z = 1.96 gives 95%. (0, 1) where there was no trial."""
    if not 0 <= successes <= trials:
        raise UserError(f"expected 0 <= successes <= trials, got {successes} of {trials}")
    if trials == 0:
        return 0.0, 1.0
    rate, square = successes / trials, z * z
    centre = rate + square / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + square / (4 * trials * trials))
    low, high = ((centre + sign * spread) / (1 + square / trials) for sign in (-1, 1))
    # Where every trial went one way, rounding would leave a hair between the interval and its end.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def summarise(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Successes, episodes, success_rate, its 95% interval, and the mean steps of successful episodes (or None)."""
    outcomes = list(outcomes)
    steps = [outcome.steps for outcome in outcomes if outcome.success]
    return {
        "successes": len(steps),
        "episodes": len(outcomes),
        "success_rate": len(steps) / len(outcomes),
        "interval": list(wilson_interval(len(steps), len(outcomes))),
        "mean_steps": sum(steps) / len(steps) if steps else None,
    }


def _prepare(config: EvaluateConfig, kind: EnvironmentKind) -> tuple[Setup, Infer | None]:
    """Loads the policy, if one is meant, and says what the simulators shall do."""
    cameras, infer, actor = kind.cameras, None, config.policy
    binary: tuple[bool, ...] = ()
    if config.policy not in BASELINES:
        if not Path(config.policy).is_dir():
            raise UserError(f"{config.policy}: no such folder; name a policy, or one of {', '.join(BASELINES)}")
        from lapa.policy.acting import load_actor

        policy = load_actor(config.policy, config.statistics_key, dataset=config.prompt_of)
        _check_policy(config, kind, policy)
        cameras, infer, actor = policy.cameras, policy.infer, "policy"
        binary = policy.action_space.binary
    setup = Setup(
        env=config.env,
        size=config.size or kind.size,
        cameras=cameras,
        seed=config.seed,
        max_steps=config.max_steps or kind.max_steps,
        actor=actor,  # type: ignore[arg-type]
        slots=config.parallel,
        steps_per_call=config.steps_per_call,
        ensemble=config.ensemble,
        binary=binary,
        num_recorded=config.videos,
    )
    return setup, infer


def _check_policy(config: EvaluateConfig, kind: EnvironmentKind, policy: Actor) -> None:
    """UserError saying all in which the policy does not fit the environment, or that its chunks are too short."""
    unfit = []
    lacking = [camera for camera in policy.cameras if camera not in kind.known_cameras]
    if lacking:
        unfit.append(f"sees {', '.join(lacking)}, {config.env} has the cameras {', '.join(kind.known_cameras)}")
    if policy.action_dim != kind.action_dim:
        unfit.append(f"gives actions of {policy.action_dim} dimensions, {config.env} takes {kind.action_dim}")
    if policy.state_dim not in (0, kind.state_dim):
        unfit.append(f"is told a state of {policy.state_dim} dimensions, {config.env} has {kind.state_dim}")
    if unfit:
        raise UserError(f"{config.policy}: {'; '.join(unfit)}; finetune it on episodes from {config.env}")
    if config.steps_per_call is not None and config.steps_per_call > policy.chunk:
        raise UserError(f"--steps-per-call {config.steps_per_call} is more than the policy's chunk of {policy.chunk}")
    if config.ensemble is not None and (config.steps_per_call or 1) >= policy.chunk:
        raise UserError(
            f"--ensemble: a chunk of {policy.chunk} ends before the policy is asked again, there is nothing to "
            "average; give a smaller --steps-per-call, or a policy with a longer chunk"
        )


def _play(
    config: EvaluateConfig, setup: Setup, infer: Infer | None, tasks: Sequence[str], workers: int | None
) -> list[Outcome]:
    """Plays what is missing, keeping a journal, and writes a task's video when its last rollout is there."""
    outcomes = _journal(config, tasks)
    done = {(outcome.task, outcome.episode) for outcome in outcomes}
    missing = {task: [number for number in range(config.episodes) if (task, number) not in done] for task in tasks}
    workers = os.cpu_count() or 1 if workers is None else workers
    recorded: dict[str, list[Outcome]] = defaultdict(list)
    with progress() as bar, (config.out / EPISODES).open("a") as journal:
        line = bar.add_task("episodes", total=config.episodes * len(tasks), completed=len(outcomes), note="")
        jobs = _split(missing, workers)
        workers = min(workers, len(jobs))
        setup = replace(setup, slots=max(1, math.ceil(config.parallel / max(1, workers))))
        for outcome in play_all(setup, jobs, infer, workers):
            outcomes.append(outcome)
            journal.write(json.dumps(_plain(outcome)) + "\n")
            journal.flush()
            if outcome.frames:
                recorded[outcome.task].append(outcome)
                if len(recorded[outcome.task]) == min(config.videos, config.episodes):
                    write_video(_video(config, outcome.task), recorded.pop(outcome.task), setup)
            rate = sum(o.success for o in outcomes) / len(outcomes)
            bar.update(line, advance=1, note=f"{outcome.task}, success so far {rate:.0%}")
    return sorted(outcomes, key=lambda outcome: (tasks.index(outcome.task), outcome.episode))


def _split(missing: dict[str, list[int]], workers: int) -> list[Job]:
    """Jobs in equal shares: whole tasks where the workers divide them evenly, else each task cut into pieces."""
    pieces = max(1, workers) // math.gcd(max(1, workers), len(missing))
    cut = [(task, numbers[piece::pieces]) for task, numbers in missing.items() for piece in range(pieces)]
    return [Job(task, tuple(numbers)) for task, numbers in cut if numbers]


def _journal(config: EvaluateConfig, tasks: Sequence[str]) -> list[Outcome]:
    """The outcomes that an earlier run left, cut to its whole lines.

    Rollouts whose video was not written yet are played again: their frames went with that run.
    """
    path = config.out / EPISODES
    kept = [Outcome(**row) for row in read_json_lines(path)]
    filmed = {task for task in tasks if _video(config, task).exists()}
    kept = [outcome for outcome in kept if outcome.episode >= config.videos or outcome.task in filmed]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(_plain(outcome)) + "\n" for outcome in kept))
    return kept


def write_video(path: Path, outcomes: Sequence[Outcome], setup: Setup) -> None:
    """Rollouts side by side; each ends on its last frame, in a green border for success and a red one for failure."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.episode)
    columns = math.ceil(math.sqrt(len(ordered)))
    blank = np.zeros_like(ordered[0].frames[0])
    # Half a second more, to see how the last one ended.
    length = max(len(outcome.frames) for outcome in ordered) + VIDEO_FPS // 2
    pictures = []
    for time_step in range(length):
        tiles = [_tile(outcome, time_step) for outcome in ordered]
        tiles += [blank] * (-len(tiles) % columns)
        rows = [np.concatenate(tiles[first : first + columns], axis=1) for first in range(0, len(tiles), columns)]
        pictures.append(np.concatenate(rows))
    encode_clip(path, pictures, kind_of(setup.env).fps / setup.video_every, keyframe_interval=VIDEO_FPS)


def _tile(outcome: Outcome, time_step: int) -> np.ndarray:
    if time_step < len(outcome.frames) - 1:
        return outcome.frames[time_step]
    framed = outcome.frames[-1].copy()
    colour = GREEN if outcome.success else RED
    framed[:3], framed[-3:], framed[:, :3], framed[:, -3:] = colour, colour, colour, colour
    return framed


def _video(config: EvaluateConfig, task: str) -> Path:
    return config.out / "videos" / f"{task}.mp4"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {name: value for name, value in asdict(replace(outcome, frames=())).items() if name != "frames"}


def _provenance(env: str) -> dict[str, Any]:
    from lapa.engine.metrics import versions_and_hardware

    packages = ("metaworld", "mujoco") if env == "metaworld" else ()
    return {**versions_and_hardware(), **{name: importlib.metadata.version(name) for name in packages}}


def _check(config: EvaluateConfig, kind: EnvironmentKind) -> None:
    least = {"episodes": 1, "parallel": 1, "videos": 0, "workers": 0, "max_steps": 1, "steps_per_call": 1, "size": 16}
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
    if config.max_steps is not None and config.max_steps > kind.longest:
        raise UserError(f"--max-steps must be at most {kind.longest} in {config.env}, got {config.max_steps}")
    if config.ensemble is not None and not math.isfinite(config.ensemble):
        raise UserError(f"--ensemble must be a finite number, got {config.ensemble}")
    if config.ensemble is not None and config.policy in BASELINES:
        raise UserError(f"--ensemble averages a policy's chunks, and {config.policy} predicts none; leave it out")
    if config.size is not None and config.size % 2:
        raise UserError(f"--size must be even, got {config.size}")


def _identity(config: EvaluateConfig) -> dict[str, Any]:
    """What decides the outcomes: the settings, and the policy's contents."""
    folder = Path(config.policy)
    found = [] if config.policy in BASELINES else sorted([*folder.glob("config.json"), *folder.rglob("*.safetensors")])
    contents = [path for path in found if path.relative_to(folder).parts[0] != "training"]
    passing = ("out", "workers", "parallel", "overwrite", "resume")
    settings = {name: value for name, value in to_dict(config).items() if name not in passing}
    return {**settings, "policy_fingerprint": fingerprint(*contents) if contents else None}


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['policy']} in {results['env']}, seed {results['seed']}")
    table.add_column("task")
    for column in ("success", "rate", "95% interval", "steps"):
        table.add_column(column, justify="right")
    for task, row in [*results["tasks"].items(), ("all", results["overall"])]:
        low, high = row["interval"]
        steps = "-" if row["mean_steps"] is None else f"{row['mean_steps']:.0f}"
        counts = f"{row['successes']} of {row['episodes']}"
        table.add_row(task, counts, f"{row['success_rate']:.2f}", f"{low:.2f} to {high:.2f}", steps)
        if task == list(results["tasks"])[-1]:
            table.add_section()
    return table
