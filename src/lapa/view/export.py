"""The page of `lapa view` as a folder that any browser opens, from a disk or from a web server.

The page loads its data as scripts, which a browser also does where the page itself is a file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lapa.console import finish, progress, say
from lapa.files import atomic_path, claim_output, write_text
from lapa.locks import locks_output
from lapa.view.config import ViewConfig
from lapa.view.opening import open_pages
from lapa.view.pages import PAGE, Pages

# Written last.
INDEX = "index.html"


@locks_output
def export(config: ViewConfig) -> None:
    """Writes the page with its data, of at most `limit` episodes, images or observations."""
    assert config.export is not None
    out = config.export
    with contextlib.closing(open_pages(config)) as pages:
        complete = (out / INDEX).exists()
        claim_output(out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=list(pages.inputs))
        _write(pages, out)
        if pages.left_out:
            say(pages.left_out)
    finish("page", out / INDEX)


def _write(pages: Pages, out: Path) -> None:
    """Writes a page with all its data and files; the index comes last."""
    for folder in ("data", "files"):
        (out / folder).mkdir(exist_ok=True)
    shutil.copytree(PAGE, out / "page", ignore=shutil.ignore_patterns("*.html"), dirs_exist_ok=True)
    names, files = list(pages.names()), list(pages.files())
    with progress() as bar:
        task = bar.add_task("exporting", total=len(names) + len(files), note="")
        for name in names:
            write_text(out / "data" / f"{name}.js", f"received({json.dumps(name)}, {json.dumps(pages.json(name))});\n")
            bar.advance(task)
        for name in files:
            file = pages.file(name)
            # What was made for the page is moved, and files of what is shown stay where they are.
            move: Callable[[Path, Path], object] = shutil.move if file.parent == pages.folder else shutil.copyfile
            with atomic_path(out / "files" / name) as temporary:
                move(file, temporary)
            bar.advance(task)
    write_text(out / INDEX, pages.html.replace('<html lang="en">', '<html lang="en" data-exported>', 1))
