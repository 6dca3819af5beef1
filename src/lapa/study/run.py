"""Runs arms of the study: does latent pretraining pay, and how does it compare with other ways of using video?

    lapa study run --preset cpu --arm scratch lapa --seed 0 --out STUDY
    lapa study run --preset cpu --seed 0 1 2 --minutes 9 --out STUDY      # every arm, in steps of under ten minutes
    lapa study report STUDY

The arms are those of LAPA's table (https://arxiv.org/abs/2410.11758, section 4). What several of them need is made
once; two runs at once into one STUDY share it, each waiting for what the other is making. The same command goes on
where it was stopped.
"""

from __future__ import annotations

import fcntl
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lapa import config as configs
from lapa.console import console, finish, say
from lapa.errors import UserError
from lapa.files import read_json, write_json
from lapa.stages import OutOfTimeError, run_stage
from lapa.study.collect import collect, note_seconds, steps_of
from lapa.study.plan import ARTIFACTS, Plan, Step, order
from lapa.study.results import ARMS, FOLDER, SETTINGS, Arm, Split
from lapa.study.sizes import Sizes, sizes_of, stage_presets

# A step that has less than this left is not begun.
LEAST_SECONDS = 30.0
POLL_SECONDS = 1.0
# The exit status where time is up: more is to be done (EX_TEMPFAIL).
GO_ON = 75
# What the arms need beside the package's own dependencies.
EXTRAS = {"metaworld": ("metaworld", "mujoco"), "unipi": ("diffusers",)}


@dataclass(frozen=True)
class StudyConfig:
    """Run arms of the study: each is pretrained, finetuned on the same few labelled episodes, and rolled out."""

    out: Path
    """Folder of the study; arms, seeds and splits gather in it."""
    preset: str = "cpu"
    """debug: a minute or two, says nothing. cpu: two cores, hours. gpu: one GPU."""
    arm: tuple[Arm, ...] = ARMS
    """Arms to run, in this order."""
    seed: tuple[int, ...] = (0,)
    """Seeds of labelled episodes and training; at least three make a study."""
    split: Split = "in-domain"
    """in-domain: videos of the same tasks. cross-task: of other tasks. cross-environment: another camera and look."""
    demonstrations: int = 2
    """Labelled episodes of each task."""
    minutes: float | None = None
    """Stop after so many minutes (training checkpoints, at most two minutes more) with exit status 75; the same
    command goes on."""


def run(config: StudyConfig) -> None:
    """`lapa study run`. UserError on bad input, where a step fails, and where `out` holds another study.

    SystemExit with status 75 where `minutes` are up before all is done.
    """
    sizes = sizes_of(config.preset)
    plans = [Plan(sizes, config.split, config.demonstrations, seed) for seed in config.seed]
    _check(config, sizes)
    _require_same_study(config.out, config.preset, sizes)
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    try:
        for plan in plans:
            for arm in config.arm:
                _run_arm(config, plan, arm, deadline)
    except OutOfTimeError as stopped:
        say(f"{config.minutes:g} minutes are up, in the step {stopped}; the same command goes on from here")
        raise SystemExit(GO_ON) from None
    finish("results", config.out / FOLDER, [f"lapa study report {config.out}"])


def _check(config: StudyConfig, sizes: Sizes) -> None:
    if config.minutes is not None and 60 * config.minutes < LEAST_SECONDS:
        raise UserError(f"--minutes {config.minutes:g}: no step is begun in less than {LEAST_SECONDS / 60:g}")
    needed = [EXTRAS["metaworld"]] if sizes.world.env == "metaworld" else []
    needed += [EXTRAS["unipi"]] if "unipi" in config.arm else []
    lacking = [name for names in needed for name in names if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f'the study needs {", ".join(lacking)}; install it: pip install "lapa-vla[study]"')


def _require_same_study(out: Path, preset: str, sizes: Sizes) -> None:
    """UserError where `out` was begun at another size, or before the presets of the stages were changed.

    A step's hash covers its command and inputs, not what its preset says: a study keeps to one state of that.
    """
    settings = {"preset": preset, "sizes": configs.to_dict(sizes), "stages": stage_presets(sizes)}
    path = out / SETTINGS
    if path.exists():
        then = read_json(path)
        if changed := configs.differences({name: then.get(name) for name in settings}, settings):
            raise UserError(f"{path}: another study ({'; '.join(changed)}); give another --out")
    write_json(path, settings)


def _run_arm(config: StudyConfig, plan: Plan, arm: Arm, deadline: float | None) -> None:
    """Makes what is missing of one arm under one seed, and writes its result."""
    steps = list(order(*steps_of(plan, arm).values(), unless=lambda step: step.done(config.out)))
    console.rule(f"{arm}, {plan.split}, {plan.demonstrations} labelled episodes a task, seed {plan.seed}", align="left")
    for number, step in enumerate(steps, 1):
        with _alone(config.out, step, deadline) as lock:
            _make(config.out, step, f"{number}/{len(steps)}", deadline, lock)
    result = collect(config.out, plan, arm, config.preset)
    say(f"{result.name}: {sum(rollout.success for rollout in result.rollouts)} of {len(result.rollouts)} succeed")


def _make(study: Path, step: Step, place: str, deadline: float | None, lock: int) -> None:
    """Runs the step, unless another run has made it meanwhile. lock: a file for it to hold."""
    if step.done(study):
        return
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds < LEAST_SECONDS:
        raise OutOfTimeError(step.title)
    stage = step.stage(study)
    say(f"{place} {step.title}: $ lapa {' '.join(stage.command)}")
    begun = time.monotonic()
    try:
        run_stage(stage, seconds, hold=(lock,))
    finally:
        note_seconds(study, step, time.monotonic() - begun)


@contextmanager
def _alone(study: Path, step: Step, deadline: float | None = None) -> Iterator[int]:
    """Holds the step against other runs into the same study; waits where one of them is making it.

    Yields the lock's file descriptor. OutOfTimeError where the wait takes until the deadline.
    """
    path = study / ARTIFACTS / f".{step.key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        waiting = False
        while not _locked(file.fileno()):
            if not waiting:
                say(f"waiting for {step.title}, which another run is making")
                waiting = True
            if deadline is not None and time.monotonic() > deadline:
                raise OutOfTimeError(step.title)
            time.sleep(POLL_SECONDS)
        yield file.fileno()


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
