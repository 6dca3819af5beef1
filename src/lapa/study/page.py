"""A report as a list of blocks, written as Markdown or as an HTML page that needs no other file.

    blocks = [Heading("Results"), Table("Success", ("arm", "rate"), (("lapa", "0.62"),)), Figure(path, "By arm")]
    page = html_page("Study", blocks)

Text is escaped. The page loads nothing: images are data URIs, the style is inside, there is no script. It has a light
and a dark form; images keep their white background.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.table import Table as RichTable

from lapa.errors import UserError

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --ground: #ffffff; --soft: #f3f4f6; --line: #d0d5db; --mark: #0060a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --ground: #15181c; --soft: #20252b; --line: #3a424b; --mark: #7cc0ff; }
}
body { color: var(--ink); background: var(--ground); font: 16px/1.55 system-ui, sans-serif; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
th { background: var(--soft); }
tr.new td { border-top: 2px solid var(--line); }
figure { margin: 1.2rem 0; }
figure img { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; max-width: 100%; height: auto; }
figcaption { font-size: .9rem; }
.findings { background: var(--soft); border-left: 4px solid var(--mark); padding: .6rem 1rem .6rem 2rem; }
""".strip()


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
    """Cells of text. A row starts a new part of the table where its first cell differs from the one above."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def starts_part(self, number: int) -> bool:
        return number > 0 and self.rows[number][0] != self.rows[number - 1][0]


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
    for number, row in enumerate(table.rows):
        if table.starts_part(number):
            rich.add_section()
        rich.add_row(*row)
    return rich


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Returns the page. Raises UserError where the file of a figure is not a PNG image."""
    body = "\n".join(map(_html, blocks))
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items, highlighted):
            lines = [
                f"<li><b>{escape(word)}</b>: {escape(text)}</li>\n" if word else f"<li>{escape(text)}</li>\n"
                for word, text in items
            ]
            return f"<ul{' class=findings' if highlighted else ''}>\n{''.join(lines)}</ul>"
        case Table():
            return _html_table(block)
        case Figure(path, caption):
            content = path.read_bytes()
            if not content.startswith(b"\x89PNG\r\n\x1a\n"):
                raise UserError(f"{path}: not a PNG image; remove it and run the same `lapa study run` again")
            source = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
            text = escape(caption)
            return f"<figure><img src='{source}' alt='{text}'><figcaption>{text}</figcaption></figure>"


def _html_table(table: Table) -> str:
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(
        f"<tr{' class=new' if table.starts_part(number) else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for number, row in enumerate(table.rows)
    )
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<div class='wide'><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
