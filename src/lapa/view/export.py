"""The page of `lapa view` as a folder that any browser opens, from a disk or from a web server.

The page loads its data as scripts, which a browser also does where the page itself is a file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np

from lapa.console import finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.files import atomic_path, claim_output, write_text
from lapa.locks import locks_output
from lapa.view.config import ViewConfig
from lapa.view.dataset import DatasetPages
from lapa.view.pages import Pages

# HTML, scripts and style.
PAGE = Path(__file__).with_name("page")
# Written last.
INDEX = "index.html"


@locks_output
def export(config: ViewConfig, dataset: Dataset, labels: Labels | None) -> None:
    """Writes the page with at most `limit` episodes, spread over the dataset."""
    assert config.export is not None
    out = config.export
    claim_output(
        out,
        complete=(out / INDEX).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[dataset.root, *([labels.folder] if labels is not None else [])],
    )
    num = min(config.limit, len(dataset))
    episodes = np.unique(np.linspace(0, len(dataset) - 1, num).round().astype(int)).tolist()
    with contextlib.closing(DatasetPages(dataset, labels, episodes=episodes, encoded=True)) as pages:
        _write(pages, out)
    if num < len(dataset):
        say(f"{num} of {len(dataset)} episodes, spread over the dataset; --limit takes more")
    finish("page", out / INDEX)


def _write(pages: Pages, out: Path) -> None:
    """Writes a page with all its data and files; the index comes last."""
    for folder in ("data", "files"):
        (out / folder).mkdir(exist_ok=True)
    shutil.copytree(PAGE, out / "page", ignore=shutil.ignore_patterns("*.html"), dirs_exist_ok=True)
    files = list(pages.files())
    with progress() as bar:
        task = bar.add_task("exporting", total=len(files), note="")
        for name in pages.names():
            write_text(out / "data" / f"{name}.js", f"received({json.dumps(name)}, {json.dumps(pages.json(name))});\n")
        for name in files:
            with atomic_path(out / "files" / name) as temporary:
                shutil.move(pages.file(name), temporary)
            bar.advance(task)
    page = (PAGE / pages.html).read_text(encoding="utf-8")
    write_text(out / INDEX, page.replace('<html lang="en">', '<html lang="en" data-exported>', 1))
