"""Language Table (Lynch et al., RA-L 2023, arXiv 2210.06407): the options of `lapa data language-table`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LanguageTableConfig:
    """Demonstrations by Language Table's own oracle."""

    out: Path
    """Folder for the dataset."""
    families: str = "all"
    """Families of tasks separated by commas, or all; `lapa envs language_table` lists them."""
    episodes: int = 10
    """Successful episodes of each family."""
    seed: int = 0
    """Determines positions and instructions; other seeds give other episodes."""
    actions: bool = True
    """Store actions and robot states; --no-actions leaves video and instruction only."""
    size: int = 128
    """Height and width of the images in pixels."""
    workers: int | None = None
    """Simulator processes; by default one for each CPU core."""
    overwrite: bool = False
    """Replace what lies at --out."""
    resume: bool = False
    """Continue an unfinished dataset."""
