"""Options of `lapa demo`, and the names of what it writes; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lapa.config import ReportOptions
from lapa.study.config import sizes_of

SETTINGS, RESULTS, IMAGE, MOVIE = "settings.json", "demo.json", "demo.png", "demo.mp4"
# Seeds of the stages are far apart, so that no labelled episode or rollout repeats a video.
DEMONSTRATION_SEED, ROLLOUT_SEED = 1000, 2000
# With the pretrained policy's architecture, trained on the demonstrations alone.
SCRATCH = "policy_from_scratch"
# Columns of the table -> folders of the policies.
ARMS = {"random actions": "random", "from scratch": SCRATCH, "pretrained": "policy"}
# The tasks and sizes that the demo and the study have in common.
SMALL = sizes_of("small")
# Of each task, with the preset debug.
DEBUG_VIDEOS = 2
WORLDS = {"metaworld": "Meta-World", "synthetic": "a made-up world of moving squares"}


@dataclass(frozen=True)
class DemoConfig(ReportOptions):
    """Run every stage, and compare random actions, training without pretraining, and with it."""

    out: Path = Path("runs/demo")
    """Folder for all artifacts of the demo."""
    preset: Literal["tiny", "debug"] = "tiny"
    """tiny: Meta-World, minutes on two cores. debug: a made-up world, a minute, learns little."""
    policy: str = "tiny"
    """Backbone of the policy: tiny, or hf: and the folder or hub id of an image-text model of transformers."""
    tasks: str = SMALL.world.tasks
    """Meta-World tasks, separated by commas."""
    videos: int = SMALL.videos
    """Action-free videos of each task."""
    demonstrations: int = 2
    """Episodes with actions of each task."""
    rollouts: int = SMALL.rollouts
    """Rollouts of each task and policy."""
    seed: int = 0
    """Seed of all stages."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Continue the demo at --out."""
