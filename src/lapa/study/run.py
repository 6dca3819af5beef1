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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa import config as configs
from lapa import presets
from lapa.console import console, finish, say
from lapa.files import write_json
from lapa.stages import OutOfTimeError, run_stage
from lapa.study.collect import collect, note_seconds, steps_of
from lapa.study.plan import ARTIFACTS, Plan, Step, order
from lapa.study.results import ARMS, Arm, Split
from lapa.study.sizes import Sizes, sizes_of

SETTINGS = "study.json"
# A step that has less than this left is not begun.
LEAST_SECONDS = 30.0


@dataclass(frozen=True)
class StudyConfig:
    """Run arms of the study: each is pretrained, finetuned on the same few labelled episodes, and rolled out."""

    out: Path
    """Folder of the study; arms, seeds and splits gather in it."""
    preset: str = "cpu"
    """debug: a minute or two, says nothing. cpu: two cores, hours. gpu, gpu-mt50: one GPU."""
    arm: tuple[Arm, ...] = ARMS
    """Arms to run, in this order."""
    seed: tuple[int, ...] = (0,)
    """Seeds of labelled episodes and training; at least three make a study."""
    split: Split = "in-domain"
    """in-domain: videos of the same tasks. cross-task: of other tasks. cross-environment: another camera and look."""
    demonstrations: int = 2
    """Labelled episodes of each task."""
    minutes: float | None = None
    """Stop, with a checkpoint, after so many minutes; the same command goes on."""


def run(config: StudyConfig) -> None:
    """`lapa study run`. ValueError on bad input, where a step fails, and where `out` holds another study."""
    sizes = sizes_of(config.preset)
    settings = {"preset": config.preset, "sizes": configs.to_dict(sizes), "stages": _stage_presets(sizes)}
    plans = [Plan(sizes, config.split, config.demonstrations, seed) for seed in config.seed]
    configs.require_same(config.out / SETTINGS, settings)
    write_json(config.out / SETTINGS, settings)
    deadline = None if config.minutes is None else time.monotonic() + 60 * config.minutes
    try:
        for plan in plans:
            for arm in config.arm:
                _run_arm(config, plan, arm, deadline)
    except OutOfTimeError as stopped:
        say(f"{config.minutes:g} minutes are up, in the step {stopped}; the same command goes on from here")
        return
    finish("results", config.out / "results", [f"lapa study report {config.out}"])


def _stage_presets(sizes: Sizes) -> dict[str, Any]:
    """What the stages' own presets say, which a step's hash does not cover: a study keeps to one state of them."""
    named = {stage: configs.to_dict(presets.named(stage, sizes.stage)) for stage in presets.STAGES}
    return {
        stage: {name: value for name, value in values.items() if value is not presets.REQUIRED}
        for stage, values in named.items()
    }


def _run_arm(config: StudyConfig, plan: Plan, arm: Arm, deadline: float | None) -> None:
    """Makes what is missing of one arm under one seed, and writes its result."""
    steps = list(order(*steps_of(plan, arm).values()))
    console.rule(f"{arm}, {plan.split}, {plan.demonstrations} labelled episodes a task, seed {plan.seed}", align="left")
    for number, step in enumerate(steps, 1):
        if not step.done(config.out):
            with _alone(config.out, step):
                _make(config.out, step, f"{number}/{len(steps)}", deadline)
    result = collect(config.out, plan, arm, config.preset)
    say(f"{result.name}: {sum(rollout.success for rollout in result.rollouts)} of {len(result.rollouts)} succeed")


def _make(study: Path, step: Step, place: str, deadline: float | None) -> None:
    if step.done(study):
        return
    seconds = None if deadline is None else deadline - time.monotonic()
    if seconds is not None and seconds < LEAST_SECONDS:
        raise OutOfTimeError(step.title)
    stage = step.stage(study)
    say(f"{place} {step.title}: $ lapa {' '.join(stage.command)}")
    begun = time.monotonic()
    try:
        run_stage(stage, seconds)
    finally:
        note_seconds(study, step, time.monotonic() - begun)


@contextmanager
def _alone(study: Path, step: Step) -> Iterator[None]:
    """Holds the step against other runs into the same study; waits where one of them is making it."""
    path = study / ARTIFACTS / f".{step.key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for {step.title}, which another run is making")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
