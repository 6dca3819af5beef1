"""Options of `lapa study run` and `lapa study report`, and the presets of a study's size; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from lapa.config import ReportOptions
from lapa.errors import unknown
from lapa.study.results import ARMS, Arm, Split


@dataclass(frozen=True)
class StudyConfig:
    """Run arms of the study: each is pretrained, finetuned on the same few labelled episodes, and rolled out."""

    out: Path
    """Folder of the study, shared by all arms, seeds and splits."""
    preset: str = "cpu"
    """debug: a minute or two, measures nothing. small: the demo's tasks, two cores, minutes. cpu: six tasks, hours.
    gpu: one GPU. language-table: one family of tasks of the paper's simulator, with one block, on two cores.
    language-table-gpu: its five families. Both need a checkout, which $LANGUAGE_TABLE names."""
    arm: tuple[Arm, ...] = ARMS
    """Arms to run, in this order."""
    seed: tuple[int, ...] = (0,)
    """Seeds of videos, labelled episodes, training and rollouts; a study needs at least three."""
    split: Split = "in-domain"
    """in-domain: videos of the same tasks. cross-task: of other tasks. cross-environment: another camera and look.
    cross-embodiment: a hand, no robot."""
    videos: int | None = None
    """Videos of each task; as many as the preset has by default."""
    demonstrations: int = 2
    """Labelled episodes of each task."""
    clips: Path | None = None
    """Folder of a dataset whose videos, such as real ones, the split cross-environment has in place of another
    rendering."""


@dataclass(frozen=True)
class ReportConfig(ReportOptions):
    """Report a study: tables, plots and intervals."""

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the study; several, as of several machines, are reported as one."""
    out: Path | None = None
    """Folder of the report; by default `report` in the first study."""
    overwrite: bool = False
    """Replace what lies at --out."""


@dataclass(frozen=True)
class World:
    """Where episodes are recorded and rolled out.

    tasks: those with labelled episodes, on which arms are evaluated. In the split cross-task the videos are of
    other_tasks, or the labelled episodes of labelled_tasks alone. camera: the robot's; other_camera, other_look: those
    of the videos of the split cross-environment; clips: a dataset in place of these.
    """

    env: Literal["metaworld", "language_table", "synthetic"]
    tasks: str
    other_tasks: str = ""
    camera: str = ""
    other_camera: str = ""
    other_look: int = 0
    labelled_tasks: str | None = None
    clips: str | None = None


@dataclass(frozen=True)
class StudySizes:
    """World, models and budgets, shared by all arms of a study.

    Policies of all arms but UniPi are alike; UniPi's video model takes the policy's place and has the same number of
    samples in pretraining and finetuning. What an arm needs besides (latent action model, inverse dynamics) has steps
    and batches of its own.
    videos, measured, rollouts: episodes of each task. videos: where the command does not say. measured: recorded
    episodes that no arm learns from, for action errors and probes. stage: the preset of the stages' own commands.
    policy: further options of every policy. pretraining, finetuning: those of these stages alone.
    """

    world: World
    stage: Literal["debug", "tiny", "base"]
    videos: int
    measured: int
    rollouts: int
    horizon_seconds: float
    latent_steps: int
    inverse_steps: int
    pretrain_steps: int
    finetune_steps: int
    chunk: int
    steps_per_call: int
    max_steps: int
    head: Literal["bins", "chunk"] = "bins"
    policy: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ()
    finetuning: tuple[str, ...] = ()


# Of Meta-World's fifty tasks: six that two cores can learn, and as many others with the same kinds of motion.
CPU = StudySizes(
    world=World(
        env="metaworld",
        tasks="reach,push,drawer-open,button-press-topdown,window-open,door-open",
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
    pretrain_steps=1200,
    finetune_steps=600,
    chunk=8,
    steps_per_call=8,
    max_steps=150,
    head="chunk",
    policy=("--layers", "2"),
)
# The paper's simulator at a size of two cores: one family of tasks, and one block in place of eight.
LANGUAGE_TABLE = replace(
    CPU,
    world=World("language_table", tasks="block2absolute_1block", other_tasks="block2relative_1block", other_look=1),
    videos=600,
    measured=30,
    rollouts=60,
    horizon_seconds=0.3,
    latent_steps=1500,
    pretrain_steps=2000,
    finetune_steps=600,
    chunk=3,
    steps_per_call=3,
    max_steps=100,
    # The block is a few pixels wide. With AdamW, policies have not found it after 1,500 steps; with Muon after 750.
    policy=("--image-size", "128", "--layers", "2", "--optimizer", "muon"),
    pretraining=("--lr", "4e-4"),
    # At the learning rate of pretraining, policies forget it.
    finetuning=("--lr", "2e-4"),
)
PRESETS = {
    # A minute or two: checks that everything works, and measures nothing.
    "debug": StudySizes(
        world=World(env="synthetic", tasks="all"),
        stage="debug",
        videos=3,
        measured=2,
        rollouts=1,
        horizon_seconds=0.3,
        latent_steps=20,
        inverse_steps=10,
        pretrain_steps=10,
        finetune_steps=10,
        chunk=3,
        steps_per_call=3,
        max_steps=40,
    ),
    # The tasks and sizes of `lapa demo`.
    "small": replace(
        CPU,
        world=replace(
            CPU.world,
            tasks="button-press-topdown,window-open,door-open",
            other_tasks="button-press,window-close,door-close",
        ),
        horizon_seconds=0.2,
        latent_steps=800,
        inverse_steps=400,
        pretrain_steps=700,
        finetune_steps=500,
        chunk=5,
        steps_per_call=5,
        max_steps=250,
        head="bins",
        policy=(),
    ),
    "cpu": CPU,
    "gpu": replace(
        CPU,
        world=replace(
            CPU.world,
            tasks="mt10",
            other_tasks="button-press,button-press-wall,door-close,door-lock,door-unlock,faucet-open,faucet-close,"
            "handle-press,push-back,plate-slide",
        ),
        stage="base",
        videos=100,
        measured=10,
        latent_steps=10_000,
        inverse_steps=5_000,
        pretrain_steps=10_000,
        finetune_steps=2_000,
        max_steps=250,
        head="bins",
        # The presets of pretraining and finetuning differ in both.
        policy=("--batch-size", "128", "--augment"),
    ),
    "language-table": LANGUAGE_TABLE,
    # The paper has 181,000 videos, 1,000 labelled episodes (7,000 of one family in the split cross-task) and 50
    # rollouts of each of the five families.
    "language-table-gpu": replace(
        LANGUAGE_TABLE,
        world=World(env="language_table", tasks="all", labelled_tasks="separate", other_look=1),
        stage="base",
        videos=2000,
        measured=10,
        rollouts=50,
        latent_steps=20_000,
        inverse_steps=5_000,
        pretrain_steps=20_000,
        finetune_steps=2_000,
        max_steps=200,
        head="bins",
        policy=("--batch-size", "128", "--augment"),
        pretraining=(),
        finetuning=(),
    ),
}


# Seconds of a step, one thread: means over the runs of study_2-core-cpu_2026-11-23.md (cpu), and study_small_ and
# study_language-table_2-core-cpu_2026-12-01.md, in benchmarks/results. Recording Language Table takes half of what it
# took there (docs/log.md).
SECONDS_OF = {
    "small": {
        "videos": 44, "videos without actions": 1, "shuffled labels": 1, "labelled episodes": 8,
        "measured episodes": 12, "latent action model": 134, "labels": 15, "labels of measured episodes": 5,
        "probe": 23, "token accuracy": 6, "inverse dynamics": 23, "pseudo-labelled videos": 8, "pretraining": 93,
        "finetuning": 74, "rollouts": 70, "action error": 7,
    },
    "cpu": {
        "videos": 228, "videos without actions": 2, "shuffled labels": 2, "planner": 12,
        "labelled episodes": 30, "measured episodes": 90, "latent action model": 514, "labels": 61,
        "labels of measured episodes": 30, "probe": 140, "token accuracy": 24, "inverse dynamics": 120,
        "pseudo-labelled videos": 59, "video model": 2248, "video model finetuning": 514, "pretraining": 319,
        "finetuning": 170, "rollouts": 228, "action error": 27,
    },
    "language-table": {
        "videos": 475, "videos without actions": 1, "labelled episodes": 80, "measured episodes": 35,
        "latent action model": 275, "labels": 26, "labels of measured episodes": 4, "probe": 14, "token accuracy": 6,
        "pretraining": 500, "finetuning": 142, "rollouts": 140, "action error": 7,
    },
}  # fmt: skip


def sizes_of(preset: str) -> StudySizes:
    """Returns the sizes of a preset. Raises UserError with the nearest known name."""
    if preset not in PRESETS:
        raise unknown("study preset", preset, PRESETS)
    return PRESETS[preset]
