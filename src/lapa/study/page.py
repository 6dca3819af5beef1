"""The parts of a report: tables that become Markdown, HTML or a terminal's, and a page that needs no other file.

    table = Table("Success", ("arm", "rate"), (("lapa", "0.62"),))
    page = document("Study", [heading("Results"), table_html(table), picture(Path("success.png"), "Success by arm")])

Every function escapes the text it is given. The page loads nothing: its pictures are data URIs, its style is inside,
there is no script. It is read in light and dark; pictures keep their white ground.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape as escape_markup
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
a { color: var(--mark); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
th { background: var(--soft); }
tr.new td { border-top: 2px solid var(--line); }
figure { margin: 1.2rem 0; }
figure img { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; max-width: 100%; height: auto; }
figcaption { font-size: .9rem; }
.verdicts { background: var(--soft); border-left: 4px solid var(--mark); padding: .6rem 1rem .6rem 2rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
""".strip()


@dataclass(frozen=True)
class Table:
    """Cells of text; a row begins a new part of the table where its first cell differs from that above it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def begins_part(self, number: int) -> bool:
        return number > 0 and self.rows[number][0] != self.rows[number - 1][0]


def table_markdown(table: Table) -> str:
    """GitHub's Markdown, without the title."""
    rows = [table.header, ("---",) * len(table.header), *table.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    )


def table_rich(table: Table) -> RichTable:
    """For the terminal."""
    rich = RichTable(*map(escape_markup, table.header), title=escape_markup(table.title))
    for number, row in enumerate(table.rows):
        if table.begins_part(number):
            rich.add_section()
        rich.add_row(*map(escape_markup, row))
    return rich


def table_html(table: Table) -> str:
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join(
        f"<tr{' class=new' if table.begins_part(number) else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>\n"
        for number, row in enumerate(table.rows)
    )
    caption = f"<caption>{html.escape(table.title)}</caption>"
    return f"<div class='wide'><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def bullets(items: Iterable[str], kind: str = "") -> str:
    inner = "\n".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<ul class='{html.escape(kind)}'>\n{inner}\n</ul>"


def terms(items: Iterable[tuple[str, str]]) -> str:
    """Words and what each means."""
    inner = "\n".join(f"<li><b>{html.escape(word)}</b>: {html.escape(meaning)}</li>" for word, meaning in items)
    return f"<ul>\n{inner}\n</ul>"


def link(address: str, text: str) -> str:
    """A line of its own; a link is followed only when it is clicked."""
    return f"<p><a href='{html.escape(address)}' rel='noreferrer'>{html.escape(text)}</a></p>"


def details(summary: str, parts: Sequence[str]) -> str:
    """Parts (HTML) that are shown when they are asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>\n{chr(10).join(parts)}\n</details>"


def picture(path: Path, caption: str) -> str:
    """A PNG file inside the page. UserError where it is none."""
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{path}: not a PNG picture; make it again with `lapa study run`, or remove it")
    data = base64.b64encode(content).decode("ascii")
    text = html.escape(caption)
    return f"<figure><img src='data:image/png;base64,{data}' alt='{text}'><figcaption>{text}</figcaption></figure>"


def document(title: str, parts: Sequence[str]) -> str:
    """The page: `parts` are HTML, in order."""
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
