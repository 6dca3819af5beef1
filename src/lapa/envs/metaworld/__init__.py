"""Meta-World (Yu et al., CoRL 2019, arXiv 1910.10897): the options of `lapa data metaworld`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MetaworldConfig:
    """Demonstrations by Meta-World's scripted experts."""

    out: Path
    """Folder for the dataset."""
    tasks: str = "mt10"
    """mt10, mt50, or task names separated by commas."""
    episodes: int = 10
    """Successful episodes of each task."""
    seed: int = 0
    """Determines goals, object positions and phrasing; other seeds give other episodes."""
    actions: bool = True
    """Store actions and robot states; --no-actions leaves video and instruction only."""
    size: int = 128
    """Height and width of the images in pixels."""
    cameras: tuple[str, ...] = ("corner4",)
    """Camera views to record."""
    look: int | None = None
    """Other colours and textures, drawn from this number; by default Meta-World's own."""
    noise: float = 0.0
    """Standard deviation of noise on the expert's motion; the noisy action is executed and stored."""
    max_steps: int = 250
    """An episode without success after this many steps is dropped."""
    workers: int | None = None
    """Simulator processes; by default one for each CPU core."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Continue an unfinished dataset."""
