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
from lapa.view.pages import Pages

# Written last.
INDEX = "index.html"


@locks_output
def export(config: ViewConfig, dataset: Dataset, labels: Labels | None) -> None:
    """Writes the page with at most `limit` episodes, spread over the dataset."""
    assert config.export is not None
    out, page = config.export, Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    claim_output(
        out,
        complete=(out / INDEX).exists(),
        overwrite=config.overwrite,
        resumable=False,
        inputs=[dataset.root, *([labels.folder] if labels is not None else [])],
    )
    num = min(config.limit, len(dataset))
    episodes = np.unique(np.linspace(0, len(dataset) - 1, num).round().astype(int)).tolist()
    (out / "data").mkdir(exist_ok=True)
    (out / "video").mkdir(exist_ok=True)
    with contextlib.closing(Pages(dataset, labels, episodes=episodes, encoded=True)) as pages, progress() as bar:
        task = bar.add_task("exporting", total=len(episodes), note="")
        for name in pages.names():
            write_text(out / "data" / f"{name}.js", f"received({json.dumps(name)}, {json.dumps(pages.json(name))});\n")
        for episode in episodes:
            for camera in range(pages.num_cameras):
                with atomic_path(out / "video" / f"{episode}-{camera}.mp4") as temporary:
                    shutil.move(pages.video(episode, camera), temporary)
            bar.advance(task)
    write_text(out / INDEX, page.replace('<html lang="en">', '<html lang="en" data-exported>', 1))
    if num < len(dataset):
        say(f"{num} of {len(dataset)} episodes, spread over the dataset; --limit takes more")
    finish("page", out / INDEX)
