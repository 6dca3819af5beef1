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
from lapa.config import ReportOptions
from lapa.console import console, finish, print_results, say
from lapa.files import claim_output, read_json, write_json
from lapa.locks import locks_output
from lapa.subcommand import Stage, run_stage

SETTINGS, RESULTS = "settings.json", "demo.json"
# Seeds of the stages are far apart, so that no labelled episode or rollout repeats a video.
DEMONSTRATION_SEED, ROLLOUT_SEED = 1000, 2000
# With the pretrained policy's architecture, trained on the demonstrations alone.
SCRATCH = "policy_from_scratch"
# Columns of the table -> folders of the policies.
ARMS = {"random actions": "random", "from scratch": SCRATCH, "pretrained": "policy"}


@dataclass(frozen=True)
class DemoConfig(ReportOptions):
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


@locks_output
def run(config: DemoConfig) -> None:
    """`lapa demo`. Raises UserError where a demo with other settings is at `out`, and where a stage fails."""
    out = config.out
    claim_output(out, complete=(out / RESULTS).exists(), overwrite=config.overwrite, resume=config.resume)
    run_only = ("out", "overwrite", "resume", "json")
    settings = {name: value for name, value in configs.to_dict(config).items() if name not in run_only}
    configs.require_same(out / SETTINGS, settings)
    write_json(out / SETTINGS, settings)
    plan = stages(config)
    seconds: dict[str, float] = {}
    for number, stage in enumerate(plan, 1):
        console.rule(f"{number}/{len(plan)}  {stage.title}", align="left")
        if stage.artifact.exists():
            say(f"done before: {stage.artifact}")
            continue
        say(f"$ lapa {' '.join(stage.command)}")
        seconds[stage.title] = run_stage(stage)
    _conclude(config, seconds)


def stages(config: DemoConfig) -> list[Stage]:
    """The commands of the demo, in the order of the flow."""
    out, debug, preset = config.out, config.preset == "debug", ("--preset", config.preset)
    videos, robot, lam = ("--data", str(out / "videos")), ("--data", str(out / "demonstrations")), str(out / "lam")

    def stage(title: str, verb: str, folder: str, last: str, *options: str, seed: int | None = config.seed) -> Stage:
        seeded = () if seed is None else ("--seed", str(seed))
        again = "--overwrite" if verb == "latent probe" else "--resume"
        return Stage(title, [*verb.split(), *options, *seeded, "--out", str(out / folder), again], out / folder / last)

    def episodes(title: str, folder: str, number: int, *, actions: bool) -> Stage:
        if debug:
            verb, options = "data synthetic", ["--episodes", "16", *(["--actions"] if actions else [])]
        else:
            verb, options = "data metaworld", ["--tasks", config.tasks, "--episodes", str(number)]
            options += [] if actions else ["--no-actions"]
        seed = config.seed + (DEMONSTRATION_SEED if actions else 0)
        return stage(title, verb, folder, "meta/info.json", *options, seed=seed)

    # With so few demonstrations none is left for validation.
    finetune = (*preset, "--policy", str(out / "latent_policy"), *robot, "--held-out", "0")
    horizon = () if debug else ("--horizon-seconds", "0.2")
    pretrain = (*preset, "--backbone", config.policy, *videos, "--labels", str(out / "labels"))
    world = ("synthetic", "--tasks", "all") if debug else ("metaworld", "--tasks", config.tasks)
    rollouts = ("--env", *world, "--episodes", str(config.rollouts))
    plan = [
        episodes("videos without actions", "videos", config.videos, actions=False),
        episodes("a few demonstrations with actions", "demonstrations", config.demonstrations, actions=True),
        stage("latent action model", "latent train", "lam", "config.json", *preset, *videos, *horizon),
        stage("probe of the latent actions", "latent probe", "probe", "probe.json", lam, *robot, seed=None),
        stage("latent action labels", "label", "labels", "manifest.json", "--lam", lam, *videos, seed=None),
        stage("pretraining on latent actions", "policy pretrain", "latent_policy", "config.json", *pretrain),
        stage("finetuning on the demonstrations", "policy finetune", "policy", "config.json", *finetune),
        stage("the same without pretraining", "policy finetune", SCRATCH, "config.json", "--from-scratch", *finetune),
    ]
    for name, who in ARMS.items():
        options = (who if who == "random" else str(out / who), *rollouts)
        seed = config.seed + ROLLOUT_SEED
        plan.append(stage(f"rollouts: {name}", "evaluate", f"results/{who}", "results.json", *options, seed=seed))
    return plan


def _conclude(config: DemoConfig, seconds: dict[str, float]) -> None:
    """Prints the table, and writes demo.json."""
    path = config.out / RESULTS
    known = read_json(path) if path.exists() else {}
    before = known.get("seconds", {}) if isinstance(known, dict) else {}
    results = {name: read_json(config.out / "results" / who / "results.json") for name, who in ARMS.items()}
    table = Table("success (95% interval)", *results)
    for task in next(iter(results.values()))["tasks"]:
        table.add_row(task, *(_rate(result["tasks"][task]) for result in results.values()))
    table.add_section()
    table.add_row("all tasks", *(_rate(result["overall"]) for result in results.values()))
    found = {"config": configs.to_dict(config), "results": results, "seconds": {**before, **seconds}}
    write_json(path, found)
    print_results(found, table, as_json=config.json)
    finish(
        "the demo's table",
        path,
        [
            "lapa data videos FOLDER --caption TEXT --out DATASET      # your own videos",
            "lapa latent train --preset base --data DATASET --out LAM  # and on",
        ],
    )


def _rate(result: dict[str, Any]) -> str:
    from lapa.evaluation.rollout import as_percent

    low, high = result["interval"]
    return f"{as_percent(result)} ({100 * low:.0f} to {high:.0%})"
