"""Language Table (Lynch et al., RA-L 2023, arXiv 2210.06407): the options of `lapa data language-table`."""

from __future__ import annotations

from dataclasses import dataclass

from lapa.envs.config import RecordConfig


@dataclass(frozen=True)
class LanguageTableConfig(RecordConfig):
    """Demonstrations by Language Table's own oracle."""

    families: str = "all"
    """Families of tasks separated by commas, or all; `lapa envs language_table` lists them."""
