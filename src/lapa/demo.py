"""The whole flow on Meta-World: action-free videos and a few demonstrations in, a table of success rates out.

    lapa demo --out runs/demo

Each stage is a command of its own, shown before it runs. An interrupted demo continues with --resume: finished
artifacts are kept, and the interrupted stage resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from lapa import config as configs
from lapa.console import console, finish, say
from lapa.files import claim_output, read_json, write_json
from lapa.subcommand import Stage, run_stage

SETTINGS, RESULTS = "settings.json", "demo.json"
# Seeds of the stages are far apart, so that no labelled episode or rollout repeats a video.
DEMONSTRATION_SEED, ROLLOUT_SEED = 1000, 2000


@dataclass(frozen=True)
class DemoConfig:
    """Run every stage, and compare random actions, training without pretraining, and with it."""

    out: Path = Path("runs/demo")
    """Folder for all artifacts of the demo."""
    preset: Literal["tiny", "debug"] = "tiny"
    """tiny: Meta-World, about a quarter of an hour on two cores. debug: a synthetic world, a minute, learns little."""
    policy: str = "tiny"
    """Backbone of the policy: tiny, or hf: and the folder or hub id of an image-text model of transformers."""
    tasks: str = "button-press-topdown,window-open,door-open"
    """Meta-World tasks, separated by commas."""
    videos: int = 30
    """Action-free videos of each task."""
    demonstrations: int = 5
    """Episodes with actions of each task."""
    rollouts: int = 20
    """Rollouts of each task and policy."""
    seed: int = 0
    """Seed of all stages."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Continue the demo at --out."""


def run(config: DemoConfig) -> None:
    """`lapa demo`. Raises UserError where a demo with other settings is at `out`, and where a stage fails."""
    out = config.out
    claim_output(out, complete=(out / RESULTS).exists(), overwrite=config.overwrite, resume=config.resume)
    _require_same_settings(config)
    plan = stages(config)
    seconds: dict[str, float] = {}
    for number, stage in enumerate(plan, 1):
        console.rule(f"{number}/{len(plan)}  {stage.title}", align="left")
        if stage.artifact.exists():
            say(f"done before: {stage.artifact}")
            continue
        say(f"$ lapa {' '.join(stage.command)}")
        seconds[stage.title] = run_stage(stage)
    report(config, seconds)


def stages(config: DemoConfig) -> list[Stage]:
    """The commands of the demo, in the order of the flow."""
    out, seed, preset = config.out, str(config.seed), ["--preset", config.preset]
    videos, robot, lam, labels = out / "videos", out / "demonstrations", out / "lam", out / "labels"
    latent_policy, policy, scratch = out / "latent_policy", out / "policy", out / "policy_from_scratch"
    world = [] if config.preset == "debug" else ["--horizon-seconds", "0.2"]
    # With so few episodes none is left for validation.
    robot_data = ["--data", str(robot), "--held-out", "0"]
    labelled_videos = ["--data", str(videos), "--labels", str(labels)]

    def train(verb: str, artifact: Path, *options: str) -> list[str]:
        return [*verb.split(), *preset, *options, "--seed", seed, "--out", str(artifact), "--resume"]

    plan = [
        Stage("videos without actions", _data(config, videos, actions=False), videos / "meta" / "info.json"),
        Stage("a few demonstrations with actions", _data(config, robot, actions=True), robot / "meta" / "info.json"),
        Stage("latent action model", train("latent train", lam, "--data", str(videos), *world), lam / "config.json"),
        Stage(
            "probe of the latent actions",
            ["latent", "probe", str(lam), "--data", str(robot), "--out", str(out / "probe"), "--overwrite"],
            out / "probe" / "probe.json",
        ),
        Stage(
            "latent action labels",
            ["label", "--lam", str(lam), "--data", str(videos), "--out", str(labels), "--resume"],
            labels / "manifest.json",
        ),
        Stage(
            "pretraining on latent actions",
            train("policy pretrain", latent_policy, "--backbone", config.policy, *labelled_videos),
            latent_policy / "config.json",
        ),
        Stage(
            "finetuning on the demonstrations",
            train("policy finetune", policy, "--policy", str(latent_policy), *robot_data),
            policy / "config.json",
        ),
        Stage(
            "the same without pretraining",
            train("policy finetune", scratch, "--from-scratch", "--policy", str(latent_policy), *robot_data),
            scratch / "config.json",
        ),
    ]
    for name, who in arms(config).items():
        plan.append(Stage(f"rollouts: {name}", _evaluate(config, who), _results(config, who)))
    return plan


def arms(config: DemoConfig) -> dict[str, str]:
    """Returns the columns of the table: name -> the policy argument of `lapa evaluate`.

    `from scratch` has the pretrained policy's architecture, trained on the demonstrations alone.
    """
    return {
        "random actions": "random",
        "from scratch": str(config.out / "policy_from_scratch"),
        "pretrained": str(config.out / "policy"),
    }


def report(config: DemoConfig, seconds: dict[str, float]) -> None:
    """Prints the table and the artifacts, and writes demo.json."""
    out = config.out
    before = read_json(out / RESULTS)["seconds"] if (out / RESULTS).exists() else {}
    results = {name: read_json(_results(config, who)) for name, who in arms(config).items()}
    tasks = list(next(iter(results.values()))["tasks"])
    table = Table("success (95% interval)", *results)
    for task in tasks:
        table.add_row(task, *(_rate(result["tasks"][task]) for result in results.values()))
    table.add_section()
    table.add_row("all tasks", *(_rate(result["overall"]) for result in results.values()))
    console.print(table)
    write_json(out / RESULTS, {"config": configs.to_dict(config), "results": results, "seconds": {**before, **seconds}})
    for path, what in {
        "videos": "dataset without actions",
        "demonstrations": "dataset with actions",
        "lam": "latent action model",
        "probe": "probe of the latent actions (probe.json, grid.png)",
        "labels": "latent action labels",
        "latent_policy": "latent policy",
        "policy": "policy",
        "policy_from_scratch": "policy without pretraining",
        "results": "rollouts, with videos",
    }.items():
        say(f"  {out / path}: {what}")
    finish(
        "the demo's table",
        out / RESULTS,
        [
            "lapa data videos FOLDER --caption TEXT --out DATASET      # your own videos",
            "lapa latent train --preset base --data DATASET --out LAM  # and on",
        ],
    )


def _data(config: DemoConfig, out: Path, *, actions: bool) -> list[str]:
    seed = str(config.seed + (DEMONSTRATION_SEED if actions else 0))
    if config.preset == "debug":
        options = ["--actions"] if actions else []
        return ["data", "synthetic", "--episodes", "16", *options, "--seed", seed, "--out", str(out), "--resume"]
    episodes = config.demonstrations if actions else config.videos
    options = [] if actions else ["--no-actions"]
    return [
        "data", "metaworld", "--tasks", config.tasks, "--episodes", str(episodes), *options,
        "--seed", seed, "--out", str(out), "--resume",
    ]  # fmt: skip


def _evaluate(config: DemoConfig, who: str) -> list[str]:
    world = ["synthetic", "--tasks", "all"] if config.preset == "debug" else ["metaworld", "--tasks", config.tasks]
    return [
        "evaluate", who, "--env", *world, "--episodes", str(config.rollouts),
        "--seed", str(config.seed + ROLLOUT_SEED), "--out", str(_results(config, who).parent), "--resume",
    ]  # fmt: skip


def _results(config: DemoConfig, who: str) -> Path:
    return config.out / "results" / Path(who).name / "results.json"


def _require_same_settings(config: DemoConfig) -> None:
    settings: dict[str, Any] = configs.to_dict(config)
    for volatile in ("out", "overwrite", "resume"):
        del settings[volatile]
    configs.require_same(config.out / SETTINGS, settings)
    write_json(config.out / SETTINGS, settings)


def _rate(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['success_rate']:.0%} ({100 * low:.0f} to {high:.0%})"
