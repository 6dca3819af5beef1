"""Options of `lapa push`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Push an artifact to the Hugging Face hub, with a card made from its figures."""

    artifact: tyro.conf.Positional[Path]
    """Folder of a latent action model, a policy, labels, a dataset, or results."""
    repo: tyro.conf.Positional[str]
    """Its id on the hub, user/name; made where it does not exist. user/name@branch names a branch, as --revision."""
    license: str | None = None
    """Licence under which others may use it, by the hub's name for it: apache-2.0, mit, cc-by-4.0, ...; required."""
    private: bool = False
    """Make the repository private."""
    revision: str | None = None
    """Branch to push to, made where it does not exist; by default main."""
    dry_run: bool = False
    """Show the files, their sizes and the card, and push nothing."""
