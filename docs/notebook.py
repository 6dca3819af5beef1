"""Writes the tutorial as a notebook: its text, its commands and its Python, in the same order.

    python docs/notebook.py docs/tutorial.md docs/tutorial.ipynb

A comment `<!-- notebook ... -->` in the page holds Python for the notebook alone, such as an image to show.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

CODE = re.compile(r"(?:<!-- tested -->\n)?```(bash|python)\n(.*?)```\n|<!-- (notebook)\n(.*?)-->\n", re.DOTALL)


def notebook(page: str) -> dict[str, Any]:
    cells, end = [], 0
    for block in CODE.finditer(page):
        cells += [markdown(page[end : block.start()]), code(*(group for group in block.groups() if group is not None))]
        end = block.end()
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [{"id": f"cell-{number}", **cell} for number, cell in enumerate([*cells, markdown(page[end:])])]
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text)}


def code(language: str, text: str) -> dict[str, Any]:
    if language == "bash":
        text = re.sub(r"^(?=lapa )", "!", text, flags=re.MULTILINE)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines(text)}


def lines(text: str) -> list[str]:
    return text.strip().splitlines(keepends=True)


if __name__ == "__main__":
    page, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(notebook(page.read_text()), indent=1, ensure_ascii=False) + "\n")
