"""Runs arms of the study: does latent pretraining pay, and how does it compare with other ways of using video?

    lapa study run --preset cpu --arm scratch lapa --seed 0 --out STUDY
    timeout 9m lapa study run --preset cpu --seed 0 1 2 --out STUDY      # every arm; run again until it is done
    lapa study report STUDY

The arms are those of LAPA's table (https://arxiv.org/abs/2410.11758, section 4). A step that several arms need runs
once; two runs at once into one STUDY share it, each waiting for the steps of the other. The same command continues a
stopped run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import lapa
from lapa import config as configs
from lapa.checksums import verify
from lapa.console import finish, say
from lapa.data.spec import open_dataset
from lapa.data.video import decode_clip, probe
from lapa.drawing import Row, grid
from lapa.envs import kind_of
from lapa.envs.language_table import named_goal
from lapa.envs.metaworld.simulator import draw_instruction
from lapa.errors import UserError
from lapa.evaluation.episodes import VIDEO_FPS
from lapa.evaluation.rollout import played, read_results
from lapa.files import atomic_path, fingerprint, read_json, read_json_lines, read_object, write_json
from lapa.policy.open_loop import action_figures
from lapa.study.config import SECONDS_OF, StudyConfig, StudySizes, sizes_of
from lapa.study.plan import Plan, Step, order, stage_presets, steps_of
from lapa.study.progress import note_wanted
from lapa.study.results import (
    FOLDER,
    SECONDS,
    SETTINGS,
    Arm,
    ArmResult,
    Curve,
    Rollout,
    RunKey,
    Setting,
    require_played,
)
from lapa.subcommand import AT_ONCE, Stage, is_running, run_stages

# The figures of a result: the JSON file of a step -> name of the figure -> where it is in that file.
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
# What each step printed, in the folder of the study.
LOGS = "logs"
# Stages whose curves are kept.
TRAINED = ("latent action model", "inverse dynamics", "video model", "pretraining", "finetuning")
PROVENANCE = ("lapa", "torch", "python", "gpu", "num_gpus", "machine", "metaworld", "mujoco")
MOMENTS = 6
AGAIN = "delete this folder and run the study again"
# Points of a curve that are kept.
CURVE_POINTS = 100


def run(config: StudyConfig) -> None:
    """`lapa study run`. Raises UserError on bad input, where a step fails, and where `out` is of another study."""
    sizes = sizes_of(config.preset)
    if config.clips is not None:
        sizes = replace(sizes, world=replace(sizes.world, clips=str(config.clips.resolve())))
    videos = sizes.videos if config.videos is None else config.videos
    if config.clips is not None and config.split == "cross-environment":
        if config.videos is not None:
            raise UserError("--videos: those of --clips are all used; leave it out")
        videos = len(open_dataset(str(config.clips)))
    setting = Setting(config.split, videos, config.demonstrations)
    plans = [Plan(sizes, setting, seed) for seed in config.seed]
    _require_installed(config, sizes)
    _require_same_study(config.out, config.preset, sizes)
    runs = [(plan, arm) for plan in plans for arm in config.arm]
    note_wanted(config.out, [RunKey(arm, setting, plan.seed) for plan, arm in runs])
    wanted = [step for plan, arm in runs for step in steps_of(plan, arm).values()]
    steps = list(order(*wanted, unless=lambda step: step.done(config.out)))
    without_result = list(runs)

    def conclude() -> None:
        """Writes the results of the arms whose steps are all done, and recorded by the runs that made them."""
        for plan, arm in list(without_result):
            last = steps_of(plan, arm).values()
            recorded = not any(is_running(step.lock(config.out)) for step in order(*last))
            if recorded and all(step.done(config.out) for step in last):
                without_result.remove((plan, arm))
                result = collect(config.out, plan, arm, config.preset)
                won = sum(rollout.success for rollout in result.rollouts)
                say(f"{result.name}: {won} of {len(result.rollouts)} succeed")

    conclude()
    if steps:
        say(_expected(config, list(order(*wanted)), steps))
    run_stages([_stage(config.out, step) for step in steps], lambda stage: conclude())
    conclude()
    finish("results", config.out / FOLDER, [f"lapa study report {config.out}", f"lapa view {config.out}"])


def _require_installed(config: StudyConfig, sizes: StudySizes) -> None:
    needed = ["metaworld", "mujoco"] if sizes.world.env == "metaworld" else []
    needed += ["diffusers"] if "unipi" in config.arm else []
    if lacking := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f'the study needs {", ".join(lacking)}; install it: pip install "lapa-vla[study]"')
    if sizes.world.env == "language_table":
        kind_of(sizes.world.env).check_machine()


def _require_same_study(out: Path, preset: str, sizes: StudySizes) -> None:
    """Raises UserError where `out` was started at other sizes, or before the presets of the stages changed.

    A step's hash covers its options and inputs, not the values of its preset, so a study keeps to one version of these.
    """
    settings = {"preset": preset, "sizes": configs.to_dict(sizes), "stages": stage_presets(sizes)}
    path = out / SETTINGS
    if path.exists():
        then = read_json(path)
        if not isinstance(then, dict):
            raise UserError(f"{path}: expected an object; give another --out")
        if changed := configs.differences({name: then.get(name) for name in settings}, settings):
            raise UserError(f"{path}: another study ({'; '.join(changed)}); give another --out")
    write_json(path, settings)


def _expected(config: StudyConfig, every: Sequence[Step], left: Sequence[Step]) -> str:
    """How long the steps that are left will take, by those of their kind in this study or in a published one.

    every: all steps of the runs, those that are done, too.
    """
    spent: dict[str, float] = {}
    for row in read_json_lines(config.out / SECONDS, key=str, seconds=float):
        spent[row["key"]] = spent.get(row["key"], 0.0) + row["seconds"]
    known = {step.kind: spent[step.key] for step in every if step.key in spent and step.done(config.out)}
    known = {**SECONDS_OF.get(config.preset, {}), **known}
    minutes = sum(known.get(step.kind, 0.0) for step in left) / AT_ONCE / 60
    unknown = sum(step.kind not in known for step in left)
    if unknown == len(left):
        return f"{len(left)} steps, {AT_ONCE} at once; none of their kind was timed yet, so how long is not known"
    note = f" (of which {unknown} were never timed)" if unknown else ""
    return f"{len(left)} steps{note}, {AT_ONCE} at once: about {max(1, round(minutes))} minutes on idle cores"


def _stage(study: Path, step: Step) -> Stage:
    folder = step.folder(study)
    needs = [needed.folder(study) / needed.artifact for needed in step.inputs]
    log = study / LOGS / f"{folder.name}.log"

    def note() -> dict[str, str]:
        return {"key": step.key, "code": fingerprint(*sorted(Path(lapa.__file__).parent.rglob("*.py")))}

    artifact = folder / step.artifact
    return Stage(step.title, step.command(study), artifact, log, needs, step.lock(study), study / SECONDS, note)


def collect(study: Path, plan: Plan, arm: Arm, preset: str) -> ArmResult:
    """Writes the arm's result and its images to STUDY/results, and returns the result. All its steps are done."""
    steps = steps_of(plan, arm)
    every = list(order(*steps.values()))
    titles = {step.key: step.title for step in every}
    spent = [row for row in read_json_lines(study / SECONDS, key=str, code=str, seconds=float) if row["key"] in titles]
    stages = json.dumps(stage_presets(plan.sizes), sort_keys=True)
    verify(steps["rollouts"].folder(study), AGAIN)
    rollouts = read_results(steps["rollouts"].folder(study))
    require_played(rollouts["episodes"], steps["rollouts"].folder(study))
    episodes = played(rollouts["episodes"])
    videos = f"--videos {plan.setting.videos}" if plan.clips is None else f"--clips {shlex.quote(plan.clips)}"
    result = ArmResult(
        arm=arm,
        setting=plan.setting,
        seed=plan.seed,
        preset=preset,
        sizes={**configs.to_dict(plan.sizes), "stage_presets": hashlib.sha256(stages.encode()).hexdigest()[:8]},
        rollouts=_rollouts(study, plan, episodes),
        errors=len(rollouts["episodes"]) - len(episodes),
        figures=_figures(study, plan, arm, steps),
        curves=tuple(_curves(study, every)),
        seconds=_sums(spent, "seconds", titles),
        cpu_seconds=_sums(spent, "cpu_seconds", titles),
        provenance={
            "command": f"lapa study run --preset {preset} --arm {arm} --seed {plan.seed} --split {plan.setting.split} "
            f"{videos} --demonstrations {plan.setting.demonstrations} --out STUDY",
            "code": ", ".join(sorted({row["code"] for row in spent})),
            **{name: rollouts[name] for name in PROVENANCE if name in rollouts},
        },
        folder=study / FOLDER,
    )
    result.save(study)
    strip = rollout_strip(steps["rollouts"].folder(study) / "videos")
    if strip is not None:
        with atomic_path(study / FOLDER / f"{result.name}.png") as path:
            strip.save(path)
    if arm == "lapa":
        with (
            Image.open(steps["probe"].folder(study) / "grid.png") as grid,
            atomic_path(study / FOLDER / f"{result.name}-codes.png") as path,
        ):
            grid.save(path)
    return result


def _sums(rows: Sequence[Mapping[str, Any]], name: str, titles: Mapping[str, str]) -> dict[str, float]:
    """The sum of a number over the attempts of each step, by its title; without steps of which an attempt lacks it."""
    found = {title: [row for row in rows if row["key"] == key] for key, title in titles.items()}
    whole = {title: own for title, own in found.items() if own and all(name in row for row in own)}
    return {title: round(sum(row[name] for row in own), 1) for title, own in whole.items()}


def rollout_strip(videos: Path) -> Image.Image | None:
    """Draws one row for each task: its first rollout at equal distances in time, without the end that stands still.

    None where no first rollout was recorded, as where each ended in an error.
    """
    rows = []
    for path in sorted(videos.glob("*-0.mp4")):
        video = probe(path)
        last = max(0, (video.num_frames or 1) - VIDEO_FPS - 1)
        moments = np.linspace(0, last, MOMENTS).round().astype(int).tolist()
        rows.append(Row(path.stem.removesuffix("-0"), list(decode_clip(path, moments, video.fps))))
    return grid(rows, "Rollouts, from start to end") if rows else None


def _rollouts(study: Path, plan: Plan, episodes: Sequence[Mapping[str, Any]]) -> tuple[Rollout, ...]:
    """Returns the rollouts, with whether the labelled episodes contain the instruction where tasks have several.

    In Language Table, whether they name the same blocks and places: hardly any of its instructions comes twice.
    """
    heard: list[bool | None] = [None] * len(episodes)
    env = plan.sizes.world.env
    if env != "synthetic":
        asked = [
            each["instruction"] if env == "language_table" else draw_instruction(each["task"], each["seed"])
            for each in episodes
        ]
        labelled = [episode.instruction for episode in open_dataset(plan.labelled.folder(study)).episodes]
        meant = named_goal if env == "language_table" else str
        known = {meant(instruction) for instruction in labelled}
        heard = [meant(instruction) in known for instruction in asked]
    return tuple(
        Rollout(each["task"], each["episode"], each["success"], each["steps"], known_wording)
        for each, known_wording in zip(episodes, heard, strict=True)
    )


def _figures(study: Path, plan: Plan, arm: Arm, steps: dict[str, Step]) -> dict[str, float]:
    found: dict[str, float | None] = {}
    for which, names in FIGURES.items():
        if which in steps:
            values = read_object(steps[which].folder(study) / steps[which].artifact, AGAIN)
            found |= {name: _figure(values, path) for name, path in names.items()}
    if arm == "vpt":
        found |= _inverse_figures(study, plan)
    if arm == "unipi":
        metrics = read_object(plan.video_model.folder(study) / "metrics.json", AGAIN)
        found["video_error_of_copying"] = _figure(metrics, "held_out_mse/held_out_mse_copy")
    return {name: value for name, value in found.items() if value is not None}


def _inverse_figures(study: Path, plan: Plan) -> dict[str, float | None]:
    """Share of the variance of the videos' true actions that the pseudo-actions explain, mean over varying dimensions.

    As they are, and on every second video after a linear map fitted on the others, as finetuning can learn it. Empty
    where the videos have no actions or another robot's, and where the inverse dynamics model left out an episode as too
    short.
    """
    videos = plan.videos if isinstance(plan.videos, str) else str(plan.videos.folder(study))
    pseudo, true = open_dataset(plan.pseudo_labelled.folder(study)), open_dataset(videos)
    space = true.action_space
    alike = pseudo.action_dim == true.action_dim and pseudo.lengths.tolist() == true.lengths.tolist()
    if space is None or not alike:
        return {}

    def r2(predicted_NA: np.ndarray, true_NA: np.ndarray) -> float | None:
        counted_N1 = np.ones((len(true_NA), 1), bool)
        return action_figures(predicted_NA[:, None], true_NA[:, None], counted_N1, true_NA.mean(0), space)["r2"]

    pseudo_NA, true_NA = (dataset.all_actions().astype(np.float64) for dataset in (pseudo, true))
    figures = {"inverse_r2": r2(pseudo_NA, true_NA)}
    fitted_N = np.repeat(np.arange(len(true.lengths)) % 2 == 0, true.lengths)
    if not fitted_N.all():
        with_one_NB = np.column_stack([pseudo_NA, np.ones(len(pseudo_NA))])
        map_BA = np.linalg.lstsq(with_one_NB[fitted_N], true_NA[fitted_N], rcond=None)[0]
        figures["inverse_linear_r2"] = r2(with_one_NB[~fitted_N] @ map_BA, true_NA[~fitted_N])
    return figures


def _figure(values: dict[str, Any], path: str) -> float | None:
    """Returns the number at a dotted path, or the ratio of two ("a.b/a.c"); None where it is not defined."""
    numbers: list[Any] = []
    for part in path.split("/"):
        value: Any = values
        for name in part.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        numbers.append(value)
    if any(type(number) not in (int, float) for number in numbers) or (len(numbers) == 2 and not numbers[1]):
        return None
    return float(numbers[0] if len(numbers) == 1 else numbers[0] / numbers[1])


def _curves(study: Path, steps: list[Step]) -> Iterator[Curve]:
    for step in steps:
        rows = read_json_lines(step.folder(study) / "training" / "metrics.jsonl", step=int)
        if rows and step.title.startswith(TRAINED):
            every = -(-len(rows) // CURVE_POINTS)
            evaluated = [any(name.startswith("eval/") for name in row) for row in rows]
            kept = (row for number, row in enumerate(rows) if number % every == 0 or evaluated[number])
            yield Curve(step.title, tuple(kept))
