"""What `lapa view` shows: the pages of each kind of artifact, and which options they take."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lapa.config import require_at_least
from lapa.errors import UserError
from lapa.evaluation.rollout import EPISODES, results_folders
from lapa.files import as_path, find_files, reading
from lapa.hub.artifacts import KINDS, MANIFEST, MARKERS, kind_of
from lapa.hub.download import NotFound, as_hub_id, errors_of, hub_folder
from lapa.study.results import FOLDER, SETTINGS
from lapa.view.config import ViewConfig
from lapa.view.pages import Pages


@dataclass(frozen=True)
class View:
    """How a kind of artifact is shown. opener: `module:function`, from ViewConfig to Pages.

    options: fields of ViewConfig that this kind takes and not every other one does.
    """

    opener: str
    options: frozenset[str] = frozenset()


REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")
# By kind of artifact (lapa.hub.artifacts), and a study.
VIEWS = {
    "dataset": View("lapa.view.dataset:open_dataset_pages", frozenset({"rerun"})),
    "labels": View("lapa.view.dataset:open_labels_pages", frozenset({"data", "rerun"})),
    "results": View("lapa.view.results:open_results_pages", frozenset({"compare"})),
    "study": View("lapa.view.study:open_study_pages", frozenset({"compare"})),
    "lam": View("lapa.view.lam:open_lam_pages", frozenset({"data", "compare", "device"})),
    "policy": View("lapa.view.policy:open_policy_pages", frozenset({"data", "lam", "device"})),
}


def open_pages(config: ViewConfig) -> Pages:
    """Returns the pages of what is at `config.path`, those of an export where there is one.

    Raises UserError where there is nothing that can be shown, and for an option that it does not take.
    """
    if config.limit is not None:
        require_at_least(config, limit=1)
    kind = kind_at(config.path)
    view = VIEWS[kind]
    for name in sorted(frozenset().union(*(each.options for each in VIEWS.values())) - view.options):
        if getattr(config, name) != _default(name):
            called = KINDS[kind].name if kind in KINDS else kind
            raise UserError(f"{config.path}: {called} does not take --{name}; leave it out")
    module, _, function = view.opener.partition(":")
    opener: Callable[[ViewConfig], Pages] = getattr(importlib.import_module(module), function)
    return opener(config)


def kind_at(path: str) -> str:
    """The kind of artifact in a folder, at a URL or on the hub. Sources in place, and what is not there, are datasets.

    Of the hub it downloads the file that marks the artifact, and no other.
    """
    folder = Path(path)
    if folder.is_dir():
        if (folder / EPISODES).exists():
            # Also of an evaluation that has not ended.
            return "results"
        if (folder / SETTINGS).exists() or find_files(folder / FOLDER, "*.json"):
            return "study"
        if not any((folder / name).exists() for name in MARKERS) and results_folders(folder):
            return "results"
        return kind_of(folder) if any((folder / name).exists() for name in MARKERS) else "dataset"
    if REMOTE.match(path):
        manifest = as_path(path) / MANIFEST
        with reading(manifest):
            return "labels" if manifest.exists() else "dataset"
    return "dataset" if as_hub_id(path) is None else _kind_on_hub(path)


def _kind_on_hub(hub_id: str) -> str:
    for repo_type in ("dataset", "model"):
        try:
            folder = hub_folder(hub_id, MARKERS, kind=repo_type)
        except NotFound as error:
            missing = error
            continue
        with errors_of(hub_id):
            return kind_of(folder)
    raise missing


def _default(name: str) -> object:
    return next(field.default for field in dataclasses.fields(ViewConfig) if field.name == name)
