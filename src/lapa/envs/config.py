"""Options that all commands have which record a simulator's expert; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RecordConfig:
    """What every recording of demonstrations needs; a simulator adds its tasks and its own options."""

    out: Path
    """Folder for the dataset."""
    episodes: int = 10
    """Successful episodes of each task."""
    seed: int = 0
    """Determines goals, positions and phrasing; other seeds give other episodes."""
    actions: bool = True
    """Store actions and robot states; --no-actions leaves video and instruction only."""
    size: int = 128
    """Height and width of the images in pixels."""
    noise: float = 0.0
    """Standard deviation of noise on the expert's motion, in units of the action, so that the episodes also show how it
    corrects itself; the noisy action is executed and stored."""
    workers: int | None = None
    """Simulator processes; by default one for each CPU core."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Continue an unfinished dataset."""
