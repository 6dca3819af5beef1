"""Success rates of a policy in a simulator, with Wilson intervals, and videos of its first rollouts.

    lapa evaluate runs/policy --env metaworld --tasks mt10 --episodes 50 --out results/policy
    lapa evaluate random --env metaworld --tasks mt10 --episodes 50 --out results/random

An episode's goal, object positions and phrasing depend on seed, task and episode number only: policies evaluated with
one seed play the same episodes, and none that `lapa data` records.
Interval: Wilson, JASA 22 (1927), 209-212.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Column, Table

from lapa.checksums import SUMS, Journal, files_below, read_sums, verify, write_marker
from lapa.config import require_at_least, require_same, to_dict
from lapa.console import finish, print_results, progress, say, warn
from lapa.data.video import encode_clip
from lapa.drawing import BAD, GOOD, INK, captioned
from lapa.engine.trackers import Tracker, require_tracker
from lapa.envs import EnvironmentKind, Task, kind_of
from lapa.errors import UserError
from lapa.evaluation.config import EvaluateConfig
from lapa.evaluation.episodes import VIDEO_FPS, EpisodeResult, Infer, RolloutSettings, TaskEpisodes, play_episodes
from lapa.files import claim_output, find_files, fingerprint, read_json, read_object, write_json
from lapa.hub.download import as_hub_id
from lapa.locks import locks_output

if TYPE_CHECKING:
    from lapa.policy.runtime import Actor


BASELINES = ("random", "zero", "expert")
CONFIG, EPISODES, RESULTS, VIDEOS = "config.json", "episodes.jsonl", "results.json", "videos"
ANEW = "--overwrite to evaluate anew"
# Folder of the tracker, which keeps its run's id and files there.
TRACKED = "tracker"
# What the row of an episode has at least.
ROW = {"task": str, "episode": int, "success": bool, "steps": int}
VIDEO_WIDTH = 256  # at least
# Notes that may differ when an evaluation is continued, as on another machine.
OF_THE_MACHINE = ("renderer",)


def played(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of episodes that did not end in an error; those that did are neither successes nor failures."""
    return [row for row in rows if not row.get("error")]


def run(config: EvaluateConfig) -> None:
    """`lapa evaluate`: prints a table and the paths of what was written."""
    # Some environments print as they are imported.
    with redirect_stdout(sys.stderr):
        report = evaluate(config)
    print_results(report, _table(report), as_json=config.json)
    if errors := report["overall"].get("errors"):
        warn(f"{errors} episodes ended in an error, and are neither successes nor failures; --resume plays them again")
    if videos := list((config.out / VIDEOS).glob("*.mp4")):
        say(f"videos: {config.out / VIDEOS} ({len(videos)} rollouts, with step and outcome)")
    finish("results", config.out / RESULTS, [f"lapa view {shlex.quote(str(config.out))}"])


@locks_output
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Plays the episodes, and returns and writes the report results.json.

    Keys: tasks (task -> successes, episodes, success_rate, interval, mean_steps), overall (the same), episodes,
    config, and the versions and hardware of lapa.engine.metrics.versions_and_hardware.
    Raises UserError on a user's mistake, before any work is done.
    """
    kind = kind_of(config.env)
    named = kind.default_tasks if config.tasks is None else config.tasks
    config, tasks = replace(config, tasks=named), kind.parse_tasks(named)
    _check(config, kind, tasks.values())
    identity = _identity(config)
    if config.resume and (config.out / RESULTS).exists():
        require_same(config.out / CONFIG, identity)
        verify(config.out, ANEW)
        report = read_report(config.out / RESULTS)
        if not report["overall"].get("errors"):
            say(f"{config.out} is complete")
            return report
    notes = dict(kind.check_machine())
    identity["notes"] = {name: text for name, text in notes.items() if name not in OF_THE_MACHINE}
    settings, infer = _prepare(config, kind)
    claim_output(
        config.out,
        complete=(config.out / RESULTS).exists(),
        overwrite=config.overwrite,
        resume=config.resume,
        inputs=[] if config.policy in BASELINES else [Path(config.policy)],
    )
    require_same(config.out / CONFIG, identity)
    # A finished report stays until the new one replaces it. Its checksums go now, as the other files begin to change.
    (config.out / SUMS).unlink(missing_ok=True)
    write_json(config.out / CONFIG, {**identity, "policy": config.policy, "notes": notes})
    started = time.monotonic()
    results = _play(config, settings, infer, tuple(tasks), 0 if kind.in_process else config.workers)

    from lapa.engine.metrics import versions_and_hardware

    limits = {task: config.max_steps or each.max_steps for task, each in tasks.items()}
    max_steps = limits if len(set(limits.values())) > 1 else next(iter(limits.values()))
    report = {
        "policy": config.policy,
        "policy_fingerprint": identity["policy_fingerprint"],
        "env": config.env,
        "seed": config.seed,
        "tasks": {task: summarise([each for each in results if each.task == task]) for task in tasks},
        "overall": summarise(results),
        "seconds": round(time.monotonic() - started, 1),
        "config": {**to_dict(config), "max_steps": max_steps, "size": settings.size},
        **versions_and_hardware(),
        **{name: importlib.metadata.version(name) for name in kind.packages},
        **({"notes": notes} if notes else {}),
        "episodes": [_row(result) for result in results],
    }
    files = [CONFIG, EPISODES, *files_below(config.out, VIDEOS)]
    write_marker(config.out, RESULTS, report, files)
    return report


def read_report(path: Path) -> dict[str, Any]:
    """Reads the report that `evaluate` wrote. Raises UserError naming the file where it is none."""
    report = read_json(path)
    try:
        _table(report)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no report of `lapa evaluate` ({error}); {ANEW}") from None
    return report


def read_results(folder: Path) -> dict[str, Any]:
    """Reads the report in a folder; of an evaluation that has not ended, its settings and the episodes played so far.

    Has policy, env, seed, config and episodes, and notes where there are any. Raises UserError naming the file that is
    damaged, also where its SHA-256 is not that in SHA256SUMS.
    """
    path = folder / RESULTS
    if path.exists():
        sums = read_sums(folder)
        verify(folder, ANEW, {name: sums[name] for name in (RESULTS, CONFIG) if name in sums})
        report = read_report(path)
    else:
        path = folder / CONFIG
        settings = read_object(path, ANEW)
        named = {name: settings.get(name) for name in ("policy", "policy_fingerprint", "env", "seed")}
        named["notes"] = settings.get("notes") or {}
        report = {**named, "config": settings, "episodes": list(Journal(folder / EPISODES))}
    known = {"policy": str, "env": str, "seed": int, "config": dict, "episodes": list}
    if lacking := [name for name, kind in known.items() if type(report.get(name)) is not kind]:
        raise UserError(f"{path}: no report of `lapa evaluate` (its {lacking[0]}); {ANEW}")
    for number, row in enumerate(report["episodes"]):
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in ROW.items()):
            raise UserError(f"{path}: episode {number} has not {', '.join(ROW)}; {ANEW}")
    return report


def results_folders(folder: Path) -> list[Path]:
    """The folder itself where it holds results, finished or not; else the folders in it that do."""

    def holds(path: Path) -> bool:
        return (path / RESULTS).exists() or (path / EPISODES).exists()

    return [folder] if holds(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and holds(path))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a success rate; (0, 1) without trials."""
    assert 0 <= successes <= trials, f"{successes} successes of {trials} trials"
    if trials == 0:
        return 0.0, 1.0
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarise(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Successes, episodes, success_rate, its 95% interval, and the mean steps of successful episodes.

    The rate is None where no episode was played, the steps where none succeeded. Episodes that ended in an error are no
    episodes; "errors", where there are any, is their number.
    """
    played = [result for result in results if not result.error]
    steps = [result.steps for result in played if result.success]
    errors = len(results) - len(played)
    return {
        "successes": len(steps),
        "episodes": len(played),
        "success_rate": len(steps) / len(played) if played else None,
        "interval": list(wilson_interval(len(steps), len(played))),
        **({"errors": errors} if errors else {}),
        "mean_steps": sum(steps) / len(steps) if steps else None,
    }


def as_percent(row: Mapping[str, Any]) -> str:
    """Returns the success rate of `summarise` as "40%", and "-" where no episode was played."""
    rate = row["success_rate"]
    return "-" if rate is None else f"{rate:.0%}"


def _rates(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The success rates of those summaries that have one, under the same names."""
    return {name: row["success_rate"] for name, row in summaries.items() if row["success_rate"] is not None}


def _prepare(config: EvaluateConfig, kind: EnvironmentKind) -> tuple[RolloutSettings, Infer | None]:
    """Loads the policy, unless a baseline plays, and returns the settings of the workers and the policy's `infer`."""
    cameras, infer, actor = kind.cameras, None, config.policy
    binary: tuple[bool, ...] = ()
    if config.policy not in BASELINES:
        from lapa.policy.runtime import load_actor

        policy = load_actor(config.policy, config.statistics_key)
        _check_policy(config, kind, policy)
        cameras, infer, actor, binary = policy.cameras, policy.infer, "policy", policy.action_space.binary
    settings = RolloutSettings(
        env=config.env,
        size=config.size or kind.size,
        cameras=cameras,
        seed=config.seed,
        max_steps=config.max_steps,
        actor=actor,  # type: ignore[arg-type]
        num_parallel=config.parallel if actor == "policy" else 1,
        steps_per_call=config.steps_per_call,
        ensemble=config.ensemble,
        binary=binary,
        num_recorded=config.videos,
    )
    return settings, infer


def _check_policy(config: EvaluateConfig, kind: EnvironmentKind, policy: Actor) -> None:
    """Raises UserError listing every mismatch of policy and environment, or where the policy's chunks are too short."""
    unfit = []
    lacking = [camera for camera in policy.cameras if camera not in kind.known_cameras]
    if lacking:
        unfit.append(f"needs the cameras {', '.join(lacking)}, {config.env} has {', '.join(kind.known_cameras)}")
    if policy.action_dim != kind.action_dim:
        unfit.append(f"predicts {policy.action_dim} action dimensions, {config.env} takes {kind.action_dim}")
    if policy.state_dim not in (0, kind.state_dim):
        unfit.append(f"needs {policy.state_dim} state dimensions, {config.env} has {kind.state_dim}")
    if policy.fps is not None and not any(math.isclose(policy.fps, fps) for fps in (kind.fps, *kind.declared_fps)):
        unfit.append(f"acts {policy.fps:g} times a second, {config.env} {kind.fps:g} times")
    if unfit:
        raise UserError(f"{config.policy}: {'; '.join(unfit)}; finetune it on episodes from {config.env}")
    if config.steps_per_call is not None and config.steps_per_call > policy.chunk:
        raise UserError(f"--steps-per-call {config.steps_per_call} is more than the policy's chunk of {policy.chunk}")
    if config.ensemble is not None and (config.steps_per_call or 1) >= policy.chunk:
        raise UserError(
            f"--ensemble: a chunk of {policy.chunk} ends before the next one starts, so there is nothing to average; "
            "give a smaller --steps-per-call, or a policy with a longer chunk"
        )


def _play(
    config: EvaluateConfig, settings: RolloutSettings, infer: Infer | None, tasks: Sequence[str], workers: int | None
) -> list[EpisodeResult]:
    """Plays the missing episodes, keeps a journal, writes the videos of the first ones, and reports to the tracker."""
    journal = Journal(config.out / EPISODES)
    results = _kept_results(config, journal)
    done = {(result.task, result.episode) for result in results}
    tracker = Tracker(config.tracker, config.out / TRACKED, config.out.resolve().name, to_dict(config), len(results))
    missing = {task: [number for number in range(config.episodes) if (task, number) not in done] for task in tasks}
    workers = min(os.cpu_count() or 1 if workers is None else workers, config.parallel)
    with closing(tracker), progress() as bar:
        line = bar.add_task("episodes", total=config.episodes * len(tasks), completed=len(results), note="")
        assignments = _split(missing, workers)
        workers = min(workers, len(assignments))
        settings = replace(settings, num_parallel=max(1, settings.num_parallel // max(1, workers)))
        for result in play_episodes(settings, assignments, infer, workers, stop_early=not config.resume):
            if result.frames:
                write_video(_video(config, result), result, settings)
            results.append(result)
            journal.append(_row(result))
            summary = summarise(results)
            bar.update(line, advance=1, note=f"{result.task}, success so far {as_percent(summary)}")
            tracker.scalars(len(results), _rates({"success_rate": summary}))
            if result.frames:
                tracker.video(len(results), f"rollouts/{result.task}-{result.episode}", _video(config, result))
        each = {f"success_rate/{task}": summarise([one for one in results if one.task == task]) for task in tasks}
        tracker.scalars(len(results), _rates(each))
    return sorted(results, key=lambda result: (tasks.index(result.task), result.episode))


def _split(missing: dict[str, list[int]], workers: int) -> list[TaskEpisodes]:
    """Equal shares: whole tasks where the workers divide them evenly, else each task cut into pieces."""
    pieces = max(1, workers) // math.gcd(max(1, workers), len(missing))
    cut = [(task, numbers[piece::pieces]) for task, numbers in missing.items() for piece in range(pieces)]
    return [TaskEpisodes(task, tuple(numbers)) for task, numbers in cut if numbers]


def _kept_results(config: EvaluateConfig, journal: Journal) -> list[EpisodeResult]:
    """Returns the results of an earlier run, and leaves only those in the journal.

    A rollout whose video is missing is played again.
    """
    found = [result for result in (EpisodeResult(**row) for row in journal) if not result.error]
    kept = [result for result in found if result.episode >= config.videos or _video(config, result).exists()]
    journal.begin(map(_row, kept))
    return kept


def write_video(path: Path, result: EpisodeResult, settings: RolloutSettings) -> None:
    """A rollout above its instruction and step; it ends with a second of its last frame, and its outcome."""
    images = [_framed(result, index, settings) for index in range(len(result.frames) + VIDEO_FPS)]
    encode_clip(path, images, kind_of(settings.env).fps / settings.video_every, keyframe_interval=VIDEO_FPS)


def _framed(result: EpisodeResult, index: int, settings: RolloutSettings) -> np.ndarray:
    """Frame `index` of a rollout, or its last one, above what happens in it."""
    if index < len(result.frames) - 1:
        outcome, colour = f"step {index * settings.video_every}", INK
    elif result.success:
        outcome, colour = f"success after {result.steps} steps", GOOD
    else:
        outcome, colour = f"failure after {result.steps} steps", BAD
    lines = [result.instruction or result.task, f"episode {result.episode}: {outcome}"]
    return captioned(result.frames[min(index, len(result.frames) - 1)], lines, colour, VIDEO_WIDTH)


def _video(config: EvaluateConfig, result: EpisodeResult) -> Path:
    return config.out / VIDEOS / f"{result.task}-{result.episode}.mp4"


def _row(result: EpisodeResult) -> dict[str, Any]:
    values = {name: value for name, value in vars(result).items() if name != "frames"}
    return {name: value for name, value in values.items() if name not in ("error", "instruction") or value}


def _check(config: EvaluateConfig, kind: EnvironmentKind, tasks: Collection[Task]) -> None:
    """Raises UserError for options that cannot be meant, before anything is imported or rendered."""
    known = config.policy in BASELINES or Path(config.policy).is_dir() or as_hub_id(config.policy) is not None
    if not known:
        raise UserError(f"{config.policy}: no such folder; name a policy, or one of {', '.join(BASELINES)}")
    require_at_least(config, episodes=1, parallel=1, videos=0, workers=0, max_steps=1, steps_per_call=1, size=16)
    if kind.own_process and config.workers == 0:
        raise UserError(f"--workers must be at least 1 in {config.env}, which is simulated in processes of its own")
    if config.policy == "expert" and (lacking := [task.name for task in tasks if not task.expert]):
        raise UserError(f"{config.env} has no expert for {', '.join(lacking)}; evaluate a policy, or `random`")
    if config.policy == "random" and not np.isfinite([*kind.action_low, *kind.action_high]).all():
        raise UserError(f"{config.env} has actions without bounds, so none can be drawn at random; evaluate a policy")
    if few := [task for task in tasks if config.episodes > (task.initial_states or config.episodes)]:
        states = f"{few[0].initial_states} initial states of {few[0].name}"
        raise UserError(f"--episodes must be at most the {states} in {config.env}, got {config.episodes}")
    if config.max_steps is not None and kind.longest is not None and config.max_steps > kind.longest:
        raise UserError(f"--max-steps must be at most {kind.longest} in {config.env}, got {config.max_steps}")
    if config.ensemble is not None and not math.isfinite(config.ensemble):
        raise UserError(f"--ensemble must be a finite number, got {config.ensemble}")
    if config.ensemble is not None and config.policy in BASELINES:
        raise UserError(f"--ensemble averages a policy's chunks, and {config.policy} predicts none; leave it out")
    if config.size is not None and config.size % 2:
        raise UserError(f"--size must be even, got {config.size}")
    require_tracker(config.tracker)


def _identity(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that the results depend on: the settings, and the policy's contents."""
    contents: list[Path] = []
    if config.policy not in BASELINES:
        from lapa.policy.runtime import policy_folder

        folder = policy_folder(config.policy)
        # Exports and checkpoints may lie in its folder. What is missing is named when it is loaded.
        listed = [folder / name for name in read_sums(folder) if name != "metrics.json"]
        weights = ("*.safetensors", "model/**/*.safetensors") if listed else ("**/*.safetensors",)
        found = [path for pattern in ("config.json", *weights) for path in find_files(folder, pattern)]
        contents = sorted(
            {path for path in (*listed, *found) if path.is_file() and path.relative_to(folder).parts[0] != "training"}
        )
    # A policy is the same under another path: its fingerprint shows it.
    volatile = (
        "out",
        "workers",
        "parallel",
        "tracker",
        "overwrite",
        "resume",
        "json",
        *(("policy",) if contents else ()),
    )
    settings = {name: value for name, value in to_dict(config).items() if name not in volatile}
    return {**settings, "policy_fingerprint": fingerprint(*contents) if contents else None}


def _table(report: dict[str, Any]) -> Table:
    columns = [Column(name, justify="right") for name in ("success", "rate", "95% interval", "steps")]
    title = f"{report['policy']} in {report['env']}, seed {report['seed']}"
    notes = [f"{name}: {text}" for name, text in report.get("notes", {}).items()]
    table = Table("task", *columns, title=title, caption="; ".join(notes) or None)
    for task, row in {**report["tasks"], "all": report["overall"]}.items():
        if task == "all":
            table.add_section()
        low, high = row["interval"]
        steps = "-" if row["mean_steps"] is None else f"{row['mean_steps']:.0f}"
        counts = f"{row['successes']} of {row['episodes']}"
        if errors := row.get("errors"):
            counts += f", {errors} errors"
        rate = "-" if row["success_rate"] is None else f"{row['success_rate']:.2f}"
        table.add_row(task, counts, rate, f"{low:.2f} to {high:.2f}", steps)
    return table
