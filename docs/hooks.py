"""What `make docs` adds to MkDocs, so that the same files read as pages of a site and as Markdown in the repository.

- README.md is the first page, and each file outside docs/ to which a page links becomes a page of the site.
- An instruction to mkdocstrings is a comment in the Markdown: `<!-- ::: lapa.open_dataset -->`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The target of a link or an image, without its anchor: [text](TARGET#anchor).
TARGET = re.compile(r"(?<=\]\()(?!\w+:)[^)#\s]+")
DIRECTIVE = re.compile(r"^<!-- (::: .*?)\s*-->$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> None:
    """Adds README.md and the files outside docs/ to which pages link, directly or through one another."""
    waiting, known = [ROOT / "README.md", *DOCS.glob("*.md")], set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in known and path.suffix == ".md":
            waiting += [target_of(path, link) for link in TARGET.findall(path.read_text())]
        known.add(path)
    for path in known:
        if path.exists() and not path.is_relative_to(DOCS):
            files.append(File.generated(config, page_of(path), content=page_text(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the pages of their files, and shows the instructions to mkdocstrings."""
    own = page.file.src_uri
    path = ROOT / "README.md" if own == "index.md" else next(filter(Path.exists, (DOCS / own, ROOT / own)), None)
    if path is None:
        return markdown  # code

    def page_link(link: re.Match[str]) -> str:
        target = target_of(path, link[0])
        return os.path.relpath(page_of(target), Path(own).parent) if target.exists() else link[0]

    return DIRECTIVE.sub(r"\1", TARGET.sub(page_link, markdown))


def target_of(path: Path, link: str) -> Path:
    return Path(os.path.normpath(path.parent / link))


def page_of(path: Path) -> str:
    """The address of a file's page in the site's sources."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    return str(path.relative_to(ROOT)) + ("" if path.suffix == ".md" else ".md")


def page_text(path: Path) -> str:
    """A Markdown file's text; the code of any other file, or of all files of a folder."""
    if path.suffix == ".md":
        return path.read_text()
    files = sorted(path.rglob("*.*")) if path.is_dir() else [path]
    blocks = [(file.relative_to(ROOT), file.suffix[1:], file.read_text()) for file in files]
    return "\n".join(f"# {name}\n\n`````{language}\n{code}\n`````\n" for name, language, code in blocks)
