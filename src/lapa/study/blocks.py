"""A report as a list of blocks: in Markdown, as tables of the terminal, and on the page of `lapa view STUDY`.

blocks = [Heading("Results"), Table("Success", ("arm", "rate"), (("lapa", "0.62"),)), Figure(path, "By arm")]
text = markdown("Study", blocks)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of words and texts; the word may be empty. highlighted: set apart on the page."""

    items: tuple[tuple[str, str], ...]
    highlighted: bool = False


@dataclass(frozen=True)
class Table:
    """Cells of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A PNG file; left out of Markdown."""

    path: Path
    caption: str


Block: TypeAlias = Heading | Paragraph | Bullets | Table | Figure


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Returns the blocks in GitHub's Markdown, without figures."""
    return "\n\n".join([f"# {title}", *(_markdown(block) for block in blocks if not isinstance(block, Figure))]) + "\n"


def _markdown(block: Heading | Paragraph | Bullets | Table) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- **{word}**: {text}" if word else f"- {text}" for word, text in items)
        case Table(title, header, rows):
            lines = [header, ("---",) * len(header), *rows]
            cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
            return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def rich_table(table: Table) -> RichTable:
    """Returns the table for the terminal."""
    rich = RichTable(*table.header, title=table.title)
    for row in table.rows:
        rich.add_row(*row)
    return rich
