"""How large a study is: its world, its models and its budgets, by preset. All arms of a study share them.

Policies are alike in all arms but UniPi, which has a video model in the policy's place: the same size, samples of
pretraining and of finetuning, labelled episodes and evaluation goals. What an arm needs besides (latent action model,
inverse dynamics, video model) has steps and batches of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lapa import presets
from lapa.config import to_dict
from lapa.errors import unknown


@dataclass(frozen=True)
class World:
    """Where episodes come from and are played.

    tasks: those with labelled episodes, on which arms are evaluated. other_tasks: those of the videos of the split
    cross-task. camera, other_camera, other_look: what the robot sees, and what the videos of cross-environment show.
    """

    env: Literal["metaworld", "synthetic"]
    tasks: str
    other_tasks: str = ""
    camera: str = ""
    other_camera: str = ""
    other_look: int = 0


@dataclass(frozen=True)
class Sizes:
    """videos, measured, rollouts: episodes of each task. stage: the preset of the stages' own commands.

    measured: recorded episodes that no arm learns from, on which action errors and probes are measured.
    """

    world: World
    stage: Literal["debug", "tiny", "base"]
    videos: int
    measured: int
    rollouts: int
    horizon_seconds: float
    latent_steps: int
    inverse_steps: int
    video_steps: int
    pretrain_steps: int
    finetune_steps: int
    chunk: int
    steps_per_call: int
    max_steps: int
    head: Literal["bins", "chunk"] = "bins"
    policy: tuple[str, ...] = ()
    """Further options of every policy, pretraining and finetuning alike."""


# Of Meta-World's fifty tasks: six that two cores can learn, and as many others of the same kinds of motion.
MT6 = "reach,push,drawer-open,button-press-topdown,window-open,door-open"
MT10 = Sizes(
    world=World(
        env="metaworld",
        tasks="mt10",
        other_tasks="button-press,button-press-wall,door-close,door-lock,door-unlock,faucet-open,faucet-close,"
        "handle-press,push-back,plate-slide",
        camera="corner4",
        other_camera="corner3",
        other_look=1,
    ),
    stage="base",
    videos=100,
    measured=10,
    rollouts=50,
    horizon_seconds=0.1,
    latent_steps=10_000,
    inverse_steps=5_000,
    video_steps=10_000,
    pretrain_steps=10_000,
    finetune_steps=2_000,
    chunk=8,
    steps_per_call=8,
    max_steps=250,
    # The stages' own presets differ in both.
    policy=("--batch-size", "128", "--augment"),
)
PRESETS = {
    # A minute or two: says whether everything works, and nothing about the method.
    "debug": Sizes(
        world=World(env="synthetic", tasks="all"),
        stage="debug",
        videos=3,
        measured=2,
        rollouts=1,
        horizon_seconds=0.3,
        latent_steps=20,
        inverse_steps=10,
        video_steps=4,
        pretrain_steps=10,
        finetune_steps=10,
        chunk=3,
        steps_per_call=3,
        max_steps=40,
    ),
    "cpu": Sizes(
        world=World(
            env="metaworld",
            tasks=MT6,
            other_tasks="push-back,drawer-close,button-press,window-close,door-close,faucet-open",
            camera="corner4",
            other_camera="corner3",
            other_look=1,
        ),
        stage="tiny",
        videos=30,
        measured=5,
        rollouts=50,
        horizon_seconds=0.1,
        latent_steps=1200,
        inverse_steps=600,
        video_steps=1200,
        pretrain_steps=1200,
        finetune_steps=600,
        chunk=8,
        steps_per_call=8,
        max_steps=150,
        head="chunk",
        policy=("--layers", "2"),
    ),
    "gpu": MT10,
}


def sizes_of(preset: str) -> Sizes:
    """UserError with the nearest known name."""
    if preset not in PRESETS:
        raise unknown("study preset", preset, PRESETS)
    return PRESETS[preset]


def stage_presets(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """What the stages' own presets say, without what has no default, by stage."""
    named = {stage: to_dict(presets.named(stage, sizes.stage)) for stage in presets.STAGES}
    return {
        stage: {name: value for name, value in values.items() if value is not presets.REQUIRED}
        for stage, values in named.items()
    }
