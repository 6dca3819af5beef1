"""Language Table (Lynch et al., RA-L 2023, arXiv 2210.06407): the options of `lapa data language-table`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lapa.envs.config import RecordConfig

BLOCK = re.compile(r"\b(red|green|blue|yellow|moon|cube|star|pentagon)\b")


def named_blocks(instruction: str) -> tuple[str, ...]:
    """Returns the colours and shapes that an instruction names, in its order."""
    return tuple(BLOCK.findall(instruction))


@dataclass(frozen=True)
class LanguageTableConfig(RecordConfig):
    """Demonstrations of an expert in Language Table, which walks behind a block and pushes it to its goal."""

    families: str = "all"
    """Families of tasks separated by commas, all, or 4blocks (the same with four blocks in place of eight); `lapa envs
    language_table` lists them."""
    look: int | None = None
    """Another camera and other colours of all but the blocks, drawn from this number; by default the authors' own."""
