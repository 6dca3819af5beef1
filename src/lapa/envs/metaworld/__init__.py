"""Meta-World (Yu et al., CoRL 2019, arXiv 1910.10897): the options of `lapa data metaworld`."""

from __future__ import annotations

from dataclasses import dataclass

from lapa.envs.config import RecordConfig


@dataclass(frozen=True)
class MetaworldConfig(RecordConfig):
    """Demonstrations by Meta-World's scripted experts."""

    tasks: str = "mt10"
    """mt10, mt50, or task names separated by commas."""
    cameras: tuple[str, ...] = ("corner4",)
    """Camera views to record."""
    look: int | None = None
    """Other colours and textures, drawn from this number; by default Meta-World's own."""
    max_steps: int = 250
    """An episode without success after this many steps is dropped."""
