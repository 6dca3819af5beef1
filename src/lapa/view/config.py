"""Options of `lapa view`; imports neither torch nor a web server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ViewConfig:
    """Shows a dataset, labels, a latent action model, a policy, results or a study in the browser."""

    path: Annotated[str, tyro.conf.Positional]
    """What to show: the folder of a dataset, labels, a latent action model, a policy, a study, results, or one that
    holds several results; its id on the hub; or a source in place such as rlds:FOLDER, see `lapa data --help`."""
    data: str | None = None
    """The dataset of labels whose folder is not inside the dataset's; for a model or policy, the dataset of its example
    images, by default the one that it was trained on, where that is here."""
    compare: tuple[str, ...] = ()
    """Further latent action models or results, which are shown side by side and in step with the first; further
    folders of a study, as of several machines, which are shown as one."""
    lam: str | None = None
    """The latent action model whose codes a policy predicts, to show them as an image; by default the one in the folder
    in which the policy's folder is, where it is there."""
    device: str = "auto"
    """Of models: auto, cpu, cuda or cuda:N."""
    port: int = 7860
    """Port of 127.0.0.1; 0 for a free one."""
    export: Path | None = None
    """Write the page and its data to this folder, which any browser opens, and serve nothing."""
    rerun: Path | None = None
    """Write the episodes of a dataset, with the codes of labels, to this .rrd file of Rerun, and serve nothing."""
    limit: int | None = None
    """Most episodes of an export or a recording, spread over the dataset or the rollouts with videos (by default 50),
    images of a latent action model (12) or observations of a policy (20)."""
    overwrite: bool = False
    """Replace the contents of the export's folder, or the recording."""
