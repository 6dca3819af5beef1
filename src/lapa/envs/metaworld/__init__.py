"""Meta-World (Yu et al., CoRL 2019, arXiv 1910.10897): the options of `lapa data metaworld`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lapa.envs.config import RecordConfig

Embodiment = Literal["hand"]


@dataclass(frozen=True)
class MetaworldConfig(RecordConfig):
    """Demonstrations by Meta-World's scripted experts."""

    tasks: str = "mt10"
    """mt10, mt50, or task names separated by commas."""
    cameras: tuple[str, ...] = ("corner4",)
    """Camera views to record."""
    look: int | None = None
    """Other colours and textures, drawn from this number; by default Meta-World's own."""
    embodiment: Embodiment | None = None
    """hand: draw a hand that moves as the robot's gripper does, and no robot; by default the robot is seen."""
    max_steps: int = 250
    """An episode without success after this many steps is dropped."""
