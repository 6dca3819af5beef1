"""The whole flow in a simulator: action-free videos and a few demonstrations in, a table of success rates out.

    lapa demo --out runs/demo

Each stage is a command of its own, shown as it begins; two that need nothing of each other run at once. An interrupted
demo continues with --resume: finished artifacts are kept, interrupted stages resume, and one that a killed demo left
running is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lapa import config as configs
from lapa.console import warn
from lapa.demo.config import (
    ARMS,
    DEBUG_VIDEOS,
    DEMONSTRATION_SEED,
    RESULTS,
    ROLLOUT_SEED,
    SCRATCH,
    SETTINGS,
    SMALL,
    WORLDS,
    DemoConfig,
)
from lapa.errors import UserError
from lapa.files import claim_output, write_json
from lapa.locks import locks_output
from lapa.sources.synthetic import DIRECTIONS
from lapa.study.results import SECONDS
from lapa.subcommand import Stage, require_idle, run_stages


@locks_output
def run(config: DemoConfig) -> None:
    """`lapa demo`. Raises UserError where a demo with other settings is at `out`, and where a stage fails."""
    out = config.out
    if config.preset == "debug":
        for name in ("tasks", "videos"):
            if getattr(config, name) != getattr(DemoConfig, name):
                raise UserError(f"--preset debug: has made-up tasks, {DEBUG_VIDEOS} videos of each; leave out --{name}")
    if config.overwrite:
        # Those of a killed demo would go on writing into what replaces it.
        require_idle(stages(config, "metaworld"))
    claim_output(out, complete=(out / RESULTS).exists(), overwrite=config.overwrite, resume=config.resume)
    run_only = ("out", "overwrite", "resume", "json")
    settings = {name: value for name, value in configs.to_dict(config).items() if name not in run_only}
    settings["world"] = world = world_of(config)
    configs.require_same(out / SETTINGS, settings)
    write_json(out / SETTINGS, settings)
    from lapa.demo.conclusion import conclude

    run_stages(stages(config, world))
    conclude(config, world)


def world_of(config: DemoConfig) -> str:
    """Returns the simulator's name: Meta-World where the preset asks for it and this machine can render."""
    from lapa.envs.metaworld.simulator import METAWORLD

    if config.preset == "debug":
        return "synthetic"
    try:
        METAWORLD.check_machine()
    except UserError as error:
        warn(f"{error}; the demo goes on in {WORLDS['synthetic']}, which needs no driver")
        return "synthetic"
    return "metaworld"


def stages(config: DemoConfig, world: str) -> list[Stage]:
    """The commands of the demo, in the order of the flow."""
    out, preset, made_up = config.out, ("--preset", config.preset), world == "synthetic"
    videos, robot, lam = ("--data", str(out / "videos")), ("--data", str(out / "demonstrations")), str(out / "lam")

    num_videos = DEBUG_VIDEOS if config.preset == "debug" else config.videos
    # Folder -> the file that is written last into it.
    made: dict[str, Path] = {}

    def stage(title: str, verb: str, folder: str, last: str, *options: str, seed: int | None = config.seed) -> Stage:
        seeded = () if seed is None else ("--seed", str(seed))
        again = "--overwrite" if verb == "latent probe" else "--resume"
        command = [*verb.split(), *options, *seeded, "--out", str(out / folder), again]
        needs = [made[word] for word in options if word in made]
        made[str(out / folder)] = out / folder / last
        log = out / "logs" / f"{folder.replace('/', '-')}.log"
        note: Callable[[], dict[str, str]] = partial(dict, title=title)
        return Stage(title, command, out / folder / last, log, needs, log.with_suffix(".lock"), out / SECONDS, note)

    def episodes(title: str, folder: str, number: int, *, actions: bool) -> Stage:
        if made_up:
            total = str(number * len(DIRECTIONS))
            verb, options = "data synthetic", ["--episodes", total, *(["--actions"] if actions else [])]
        else:
            verb, options = "data metaworld", ["--tasks", config.tasks, "--episodes", str(number)]
            options += [] if actions else ["--no-actions"]
        seed = config.seed + (DEMONSTRATION_SEED if actions else 0)
        return stage(title, verb, folder, "meta/info.json", *options, seed=seed)

    # With so few demonstrations none is left for validation.
    finetune = (*preset, "--policy", str(out / "latent_policy"), *robot, "--held-out", "0")
    horizon = () if made_up else ("--horizon-seconds", str(SMALL.horizon_seconds))
    # Half the preset's steps: more of them hardly lower the error on these videos (docs/log.md).
    latent = (*preset, *horizon, *(("--steps", str(SMALL.latent_steps)) if config.preset == "tiny" else ()))
    pretrain = (*preset, "--backbone", config.policy, *videos, "--labels", str(out / "labels"))
    rollouts = ("--env", world, "--tasks", "all" if made_up else config.tasks, "--episodes", str(config.rollouts))
    plan = [
        episodes("videos without actions", "videos", num_videos, actions=False),
        episodes("a few demonstrations with actions", "demonstrations", config.demonstrations, actions=True),
        stage("latent action model", "latent train", "lam", "config.json", *latent, *videos),
        stage("probe of the latent actions", "latent probe", "probe", "probe.json", lam, *videos, seed=None),
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
