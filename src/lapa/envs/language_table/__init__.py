"""Language Table (Lynch et al., RA-L 2023, arXiv 2210.06407): the options of `lapa data language-table`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lapa.envs.config import RecordConfig

# Word of a goal -> what it means: colours, shapes, and places and directions, of which some have several words.
MEANINGS = {
    **{word: word for word in ["red", "green", "blue", "yellow", "moon", "cube", "star", "pentagon", "left", "right"]},
    **dict.fromkeys(("top", "upper", "above", "up", "upwards", "base"), "top"),
    **dict.fromkeys(("bottom", "lower", "below", "down", "downwards"), "bottom"),
    **dict.fromkeys(("center", "middle"), "center"),
}


def named_goal(instruction: str) -> tuple[str, ...]:
    """Returns the colours, shapes, places and directions that an instruction names, in its order."""
    return tuple(MEANINGS[word] for word in re.findall(r"\w+", instruction) if word in MEANINGS)


@dataclass(frozen=True)
class LanguageTableConfig(RecordConfig):
    """Demonstrations of an expert in Language Table, which walks behind a block and pushes it to its goal."""

    families: str = "all"
    """Families of tasks separated by commas, all, 4blocks (the same with four blocks in place of eight) or 1block;
    `lapa envs language_table` lists them."""
    look: int | None = None
    """Another camera and other colours of all but the blocks, drawn from this number; by default the authors' own."""
