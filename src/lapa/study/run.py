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
import hashlib
import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import lapa
from lapa import config as configs
from lapa.console import console, finish, say
from lapa.data.spec import open_dataset
from lapa.data.video import decode_clip, probe
from lapa.envs.metaworld.simulator import draw_instruction
from lapa.errors import UserError
from lapa.files import atomic_path, fingerprint, read_json, read_json_lines, write_json
from lapa.policy.figures import action_figures
from lapa.study.plan import ARTIFACTS, Plan, Sizes, Step, order, sizes_of, stage_presets
from lapa.study.results import ARMS, FOLDER, SECONDS, SETTINGS, Arm, ArmResult, Curve, Rollout, Split
from lapa.subcommand import OutOfTimeError, run_stage

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


# What a figure is called, and where the JSON file of which step has it.
FIGURES = {
    "action error": {
        "action_error": "action_error",
        "action_error_normalised": "normalised_error",
        "action_r2": "r2",
    },
    "token accuracy": {"token_accuracy": "token_accuracy"},
    "probe": {
        "lam_linear_r2": "action.linear.quantized.r2",
        "lam_mlp_r2": "action.mlp.quantized.r2",
        "lam_error_of_copying": "reconstruction.mse/reconstruction.mse_copy",
        "lam_shuffled_over_own": "reconstruction.mse_shuffled/reconstruction.mse",
        "lam_codes_used": "usage.codes_used",
        "lam_joint_perplexity": "usage.joint_perplexity",
    },
}
# Stages whose loss is drawn.
TRAINED = ("latent action model", "inverse dynamics", "video model", "pretraining", "finetuning")
PROVENANCE = ("lapa", "torch", "python", "gpu", "num_gpus", "machine", "metaworld", "mujoco")
MOMENTS, TILE, CAPTION = 6, 96, 14
# Points of a curve that are kept: a picture shows no more.
CURVE_POINTS = 100


def steps_of(plan: Plan, arm: Arm) -> dict[str, Step]:
    """The steps that an arm's result is read from, by what they are in FIGURES."""
    steps = {"rollouts": plan.rollouts(arm), "action error": plan.action_error(arm)}
    if arm == "lapa":
        steps |= {"probe": plan.probe, "token accuracy": plan.token_accuracy}
    return steps


def collect(study: Path, plan: Plan, arm: Arm, preset: str) -> ArmResult:
    """Writes the arm's result and its pictures to STUDY/results, and returns it. All its steps are done."""
    steps = steps_of(plan, arm)
    every = list(order(*steps.values()))
    spent = _spent(study, every)
    played = read_json(steps["rollouts"].folder(study) / "results.json")
    result = ArmResult(
        arm=arm,
        split=plan.split,
        demonstrations=plan.demonstrations,
        seed=plan.seed,
        preset=preset,
        sizes={**configs.to_dict(plan.sizes), "stage_presets": _short_hash(stage_presets(plan.sizes))},
        rollouts=_rollouts(study, plan, played["episodes"]),
        figures=_figures(study, plan, arm, steps),
        curves=tuple(_curves(study, every)),
        seconds=_seconds(spent, every),
        provenance={
            "command": f"lapa study run --preset {preset} --arm {arm} --seed {plan.seed} --split {plan.split} "
            f"--demonstrations {plan.demonstrations} --out STUDY",
            "code": ", ".join(sorted({row["code"] for row in spent})),
            **{name: played[name] for name in PROVENANCE if name in played},
        },
        folder=study / FOLDER,
    )
    result.save(study)
    strip = rollout_strip(steps["rollouts"].folder(study) / "videos")
    with atomic_path(study / FOLDER / f"{result.name}.png") as path:
        strip.save(path)
    if arm == "lapa":
        with (
            Image.open(steps["probe"].folder(study) / "grid.png") as grid,
            atomic_path(study / FOLDER / f"{result.name}-codes.png") as path,
        ):
            grid.save(path)
    return result


def note_seconds(study: Path, step: Step, seconds: float) -> None:
    """Adds to the time that a step has taken, and which code it was made by; it may be made in several goes."""
    with (study / SECONDS).open("a") as file:
        file.write(json.dumps({"key": step.key, "seconds": round(seconds, 1), "code": code_hash()}) + "\n")


def rollout_strip(videos: Path) -> Image.Image:
    """A row a task: its first rollout at equal distances in time, in the end framed green for success, red if not."""
    paths = sorted(videos.glob("*.mp4"))
    strip = Image.new("RGB", (MOMENTS * TILE, len(paths) * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(strip)
    for row, path in enumerate(paths):
        top = row * (TILE + CAPTION)
        draw.text((2, top + 1), path.stem, fill="black")
        video = probe(path)
        moments = np.linspace(0, (video.num_frames or 1) - 1, MOMENTS).round().astype(int).tolist()
        for column, frame_HWC in enumerate(decode_clip(path, moments, video.fps)):
            picture = Image.fromarray(frame_HWC).resize((TILE, TILE), Image.Resampling.LANCZOS)
            strip.paste(picture, (column * TILE, top + CAPTION))
    return strip


def _rollouts(study: Path, plan: Plan, episodes: Sequence[dict[str, Any]]) -> tuple[Rollout, ...]:
    """Each with whether the labelled episodes hold its instruction, where tasks have several phrasings."""
    heard: dict[tuple[str, int], bool] = {}
    if plan.sizes.world.env == "metaworld":
        known = {episode.instruction for episode in open_dataset(plan.labelled.folder(study)).episodes}
        heard = {(e["task"], e["episode"]): draw_instruction(e["task"], e["seed"]) in known for e in episodes}
    return tuple(
        Rollout(e["task"], e["episode"], e["success"], e["steps"], heard.get((e["task"], e["episode"])))
        for e in episodes
    )


def _figures(study: Path, plan: Plan, arm: Arm, steps: dict[str, Step]) -> dict[str, float]:
    found: dict[str, float | None] = {}
    for which, names in FIGURES.items():
        if which in steps:
            values = read_json(steps[which].folder(study) / steps[which].artifact)
            found |= {name: _figure(values, path) for name, path in names.items()}
    if arm == "vpt":
        found["inverse_r2"] = _inverse_r2(study, plan)
    if arm == "unipi":
        metrics = read_json(plan.video_model.folder(study) / "metrics.json")
        found["video_error_of_copying"] = _figure(metrics, "held_out_mse/held_out_mse_copy")
    return {name: value for name, value in found.items() if value is not None}


def _inverse_r2(study: Path, plan: Plan) -> float | None:
    """How much of the true actions' variance in the videos the pseudo-labels explain, mean over dimensions that vary.

    Episodes that the inverse dynamics model found too short are missing there; None where any is.
    """
    said, true = (open_dataset(step.folder(study)) for step in (plan.pseudo_labelled, plan.videos))
    if said.lengths.tolist() != true.lengths.tolist():
        return None
    said_N1A, true_N1A = (data.all_actions()[:, None] for data in (said, true))
    assert true.action_space is not None, "videos are recorded with actions"
    counted_N1 = np.ones(true_N1A.shape[:2], bool)
    return action_figures(said_N1A, true_N1A, counted_N1, true_N1A.mean((0, 1)), true.action_space)["r2"]


def _spent(study: Path, steps: list[Step]) -> list[dict[str, Any]]:
    """What `note_seconds` noted of these steps."""
    keys = {step.key for step in steps}
    return [row for row in read_json_lines(study / SECONDS) if row["key"] in keys]


def code_hash() -> str:
    """A hash of the package's sources."""
    package = Path(lapa.__file__).parent
    return fingerprint(*sorted(package.rglob("*.py")))


def _short_hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _figure(values: dict[str, Any], path: str) -> float | None:
    """The number at a dotted path, or the ratio of two; None where it is not defined."""
    numbers: list[Any] = []
    for part in path.split("/"):
        value: Any = values
        for name in part.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        numbers.append(value)
    if any(number is None for number in numbers) or (len(numbers) == 2 and not numbers[1]):
        return None
    return float(numbers[0] if len(numbers) == 1 else numbers[0] / numbers[1])


def _curves(study: Path, steps: list[Step]) -> Iterator[Curve]:
    for step in steps:
        rows = read_json_lines(step.folder(study) / "training" / "metrics.jsonl")
        if rows and step.title.startswith(TRAINED):
            every = -(-len(rows) // CURVE_POINTS)
            kept = [row for number, row in enumerate(rows) if number % every == 0 or _evaluated(row)]
            yield Curve(step.title, tuple(kept))


def _evaluated(row: dict[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


def _seconds(spent: list[dict[str, Any]], steps: list[Step]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in spent:
        totals[row["key"]] = totals.get(row["key"], 0.0) + row["seconds"]
    return {step.title: round(totals[step.key], 1) for step in steps if step.key in totals}
