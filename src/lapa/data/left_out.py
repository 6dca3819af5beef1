"""The page of a conversion: what was kept and what was left out, with examples; `meta/left_out.html` of the dataset.

The page needs no other file and no network. It is the same for all numbers of workers, engines and resumed runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lapa.errors import printable

# Of each reason.
EXAMPLES = 8
# Pixels of the longer side of an example's image.
IMAGE_SIDE = 160
# The reason of episodes that are in the dataset, and what the names of the others begin with.
KEPT_EPISODES, LEFT_OUT_PREFIX = "kept", "left out, "
# Longest text of an example.
MOST_TEXT = 160

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } th, td { text-align: left; font-weight: normal; vertical-align: top;
  padding: .2rem 1.5rem .2rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, 160px); gap: 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
img, .none { display: block; width: 160px; aspect-ratio: 1; object-fit: contain; background: var(--soft); }
.none { display: grid; place-items: center; font-size: .8rem; opacity: .7; }
small { opacity: .7; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Kept and left out</title>
<style>{style}</style>
</head>
<body>
<h1>Kept and left out: {made_by}</h1>
{body}
</body>
</html>
"""


def left_out_page(
    settings: Mapping[str, Any],
    num_items: int,
    num_episodes: int,
    notes: Mapping[str, int],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    listed: Mapping[str, int],
) -> str:
    """Returns the page, HTML.

    settings: how the dataset is made, with the filters; notes: counts by reason; examples: by reason, each with
    `source`, `text` and `image`, a data URL or None; listed: counts of what was found while listing the source.
    """
    left_out = {reason: count for reason, count in sorted(notes.items()) if reason.startswith(LEFT_OUT_PREFIX)}
    others = {note: count for note, count in sorted(notes.items()) if note not in left_out}
    found = {note: count for note, count in sorted(listed.items()) if count}
    body = [
        f"<p>{num_episodes:,} episodes of {num_items:,} items. Items that are damaged or too small are left out as a "
        "whole, and otherwise episodes are; an episode is counted under the first reason that applies.</p>",
        _table({"episodes kept": num_episodes, **left_out}),
        _section("Kept", num_episodes, examples.get(KEPT_EPISODES, ())),
        *(
            _section(reason.removeprefix(LEFT_OUT_PREFIX).capitalize(), count, examples.get(reason, ()))
            for reason, count in left_out.items()
        ),
        *(["<h2>Other counts</h2>", _table(others)] if others else []),
        *(["<h2>Found while listing the source</h2>", _table(found)] if found else []),
        "<h2>Settings</h2>",
        _table({name: _setting(value) for name, value in settings.items() if name != "made_by"}),
    ]
    return PAGE.format(style=STYLE, made_by=_text(settings.get("made_by", "")), body="\n".join(body))


def _section(title: str, count: int, examples: Sequence[Mapping[str, Any]]) -> str:
    which = "" if len(examples) == count else f"; the first {len(examples)}" if examples else "; no example"
    figures = "\n".join(map(_figure, examples))
    return f'<h2>{_text(title)} <small>({count:,}{which})</small></h2>\n<div class="examples">\n{figures}\n</div>'


def _figure(example: Mapping[str, Any]) -> str:
    image = example["image"]
    shown = f'<img src="{escape(image)}" alt="">' if image else '<div class="none">no image</div>'
    text = f"<br><small>{_text(example['text'])}</small>" if example["text"] else ""
    return f"<figure>{shown}<figcaption>{_text(example['source'])}{text}</figcaption></figure>"


def _table(rows: Mapping[str, int | str]) -> str:
    lines = []
    for name, value in rows.items():
        cell = f'<td class="number">{value:,}' if isinstance(value, int) else f"<td>{_text(value)}"
        lines.append(f"<tr><th>{_text(name)}</th>{cell}</td></tr>")
    return "\n".join(("<table>", *lines, "</table>"))


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(value: Any) -> str:
    """Returns text for the page: escaped, in one line, without control characters, and not too long."""
    line = printable(str(value))
    return escape(line if len(line) <= MOST_TEXT else f"{line[: MOST_TEXT - 1]}…")
