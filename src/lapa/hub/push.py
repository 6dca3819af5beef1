"""Pushes an artifact to the Hugging Face hub. A push that was cut sends only what is missing when it is run again.

    lapa push POLICY user/name --license apache-2.0
    lapa push DATASET user/name --license cc-by-4.0 --private
    lapa push LAM user/name@v2 --license mit --dry-run

Files go up in groups, each skipped where the hub has its content already, and are committed together, so that the
repository is never half of two artifacts; more than MOST_IN_COMMIT in several commits, the file that marks the artifact
as complete in the last. Files of an earlier push that the artifact no longer has are removed; others are left alone.
"""

from __future__ import annotations

import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapa.checksums import SUMS, read_sums
from lapa.console import console, finish, say
from lapa.errors import UserError
from lapa.hub.artifacts import INFO, KINDS, MARKERS, Artifact, read_artifact
from lapa.hub.card import README, card_of
from lapa.hub.config import PushConfig
from lapa.hub.download import HubId, as_hub_id, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc0-1.0"),
    *("openrail", "llama3", "gemma", "other"),
)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
MAIN = "main"
GROUP, MOST_IN_COMMIT = 64, 5000
# The command that takes what was pushed.
NEXT = {
    "lam": "lapa latent probe {} --data DATASET",
    "policy": "lapa policy measure {} --data DATASET --out MEASURED",
    "labels": "lapa policy pretrain --data DATASET --labels {} --out LATENT_POLICY",
    "dataset": "lapa data info {}",
}


def run(config: PushConfig) -> None:
    """`lapa push`. Raises UserError where the artifact or the repository cannot be used, or the connection breaks."""
    if config.license is None or not LICENSE.fullmatch(config.license):
        given = "is needed" if config.license is None else f"{config.license!r} is no licence of the hub"
        raise UserError(
            f"--license {given}: name the one under which others may use this ({', '.join(LICENSES)}); that of its "
            "data and of the model that it began with may bind you"
        )
    hub_id = _repository(config.repo, config.revision)
    artifact = read_artifact(config.artifact)
    name = KINDS[artifact.kind].name
    say(f"{name} in {config.artifact}: {len(artifact.files)} files, {_size(artifact.num_bytes)}")
    if config.dry_run:
        for file, content in artifact.files.items():
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            say(f"  {file}  {_size(size)}")
        console.print(card_of(artifact, HubId(hub_id.repo), config.license), soft_wrap=True)
        say(f"nothing was pushed; without --dry-run, this goes to {hub_id.url(KINDS[artifact.kind].repo_type)}")
        return
    url = _push(artifact, hub_id, config.license, private=config.private or None)
    command = NEXT.get(artifact.kind)
    finish(f"{name} on the hub", url, [command.format(hub_id)] if command else [])


class Pushed(ABC):
    """Whatever has `push_to_hub`: models and policies, which are saved for it, labels and datasets."""

    @abstractmethod
    def _artifact_folder(self) -> AbstractContextManager[str | Path]:
        """A folder that holds the artifact while the context lasts."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        license: str | None = None,
    ) -> str:
        """Pushes to `user/name`, which is made where it does not exist, as `lapa push` does. Returns the page.

        private: of a new repository; by default as the account has it. revision: a branch. token: by default the one
        that is logged in. license: for the card, such as apache-2.0. The card of a model or a policy that is pushed
        from Python has the figures of its validation split; `lapa push FOLDER` adds those of the folder.
        Raises UserError where the hub refuses it or the connection breaks.
        """
        with self._artifact_folder() as folder:
            artifact = read_artifact(Path(folder))
            return _push(artifact, _repository(repo_id, revision), license, private=private, token=token)


class SavedToPush(Pushed):
    """`Pushed` for what `save_pretrained` writes."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder."""

    @contextmanager
    def _artifact_folder(self) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            yield folder


def _push(
    artifact: Artifact,
    hub_id: HubId,
    license: str | None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    kind = KINDS[artifact.kind].repo_type
    files = {**artifact.files, README: card_of(artifact, HubId(hub_id.repo), license).encode()}
    api = HfApi(token=token, library_name="lapa")
    with hub_errors(hub_id, kind, pushing=True):
        _make_repository(api, hub_id, kind, private)
        # The markers last.
        order = sorted(files, key=lambda name: (name in MARKERS, name))
        operations = [CommitOperationAdd(name, files[name]) for name in order]
        stale = _stale(api, hub_id, kind, set(files))
        for first in range(0, len(operations), MOST_IN_COMMIT):
            _commit(api, hub_id, kind, operations[first : first + MOST_IN_COMMIT], stale if first == 0 else [])
        if artifact.kind == "dataset" and hub_id.revision in (None, MAIN):
            _tag(api, hub_id, str(artifact.json(INFO).get("codebase_version")))
    return hub_id.url(kind)


def _repository(repo_id: str, revision: str | None) -> HubId:
    """Raises UserError where the text is no id of a repository."""
    hub_id = None if Path(repo_id).exists() else as_hub_id(repo_id, revision)
    if hub_id is None:
        reason = "is a folder here" if Path(repo_id).exists() else "is no id on the hub"
        raise UserError(f"{repo_id}: {reason}; give the repository to push to as user/name")
    return hub_id


def _make_repository(api: HfApi, hub_id: HubId, kind: str, private: bool | None) -> None:
    """Makes the repository and the branch where they do not exist. Raises UserError where a private one is public."""
    api.create_repo(hub_id.repo, repo_type=kind, private=private, exist_ok=True)
    if private and not api.repo_info(hub_id.repo, repo_type=kind).private:
        page = HubId(hub_id.repo).url(kind)
        raise UserError(f"{hub_id.repo}: is there and public; make it private at {page}/settings, or give another name")
    if hub_id.revision not in (None, MAIN):
        api.create_branch(hub_id.repo, branch=str(hub_id.revision), repo_type=kind, exist_ok=True)


def _stale(api: HfApi, hub_id: HubId, kind: str, names: set[str]) -> list[CommitOperationDelete]:
    """The deletion of files of an earlier push, by its SHA256SUMS, that the artifact no longer has."""
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.errors import EntryNotFoundError

    try:
        there = set(api.list_repo_files(hub_id.repo, revision=hub_id.revision, repo_type=kind))
        if SUMS not in there:
            return []
        path = api.hf_hub_download(hub_id.repo, SUMS, revision=hub_id.revision, repo_type=kind)
    except EntryNotFoundError:
        return []
    pushed = {*read_sums(Path(path).parent), SUMS}
    return [CommitOperationDelete(name) for name in sorted((pushed & there) - names)]


def _commit(
    api: HfApi,
    hub_id: HubId,
    kind: str,
    additions: list[CommitOperationAdd],
    deletions: list[CommitOperationDelete],
) -> None:
    """Uploads the contents that the hub lacks, group by group, and commits them at once."""
    where: dict[str, Any] = {"repo_type": kind, "revision": hub_id.revision}
    for first in range(0, len(additions), GROUP):
        group = additions[first : first + GROUP]
        api.preupload_lfs_files(hub_id.repo, group, free_memory=False, **where)
        done = first + len(group)
        if len(additions) > GROUP:
            say(f"{done} of {len(additions)} files are on the hub")
    message = f"Upload {'part of ' if len(additions) == MOST_IN_COMMIT else ''}an artifact of lapa"
    api.create_commit(hub_id.repo, [*deletions, *additions], commit_message=message, **where)


def _tag(api: HfApi, hub_id: HubId, version: str) -> None:
    """Marks the main branch with the version of the layout, by which LeRobot finds a dataset's revision."""
    from huggingface_hub.errors import RevisionNotFoundError

    with suppress(RevisionNotFoundError):
        api.delete_tag(hub_id.repo, tag=version, repo_type="dataset")
    api.create_tag(hub_id.repo, tag=version, repo_type="dataset", exist_ok=True)


def _size(num_bytes: int) -> str:
    number, units = float(num_bytes), iter(("bytes", "kB", "MB", "GB"))
    unit = next(units)
    while number >= 1000 and unit != "GB":
        number, unit = number / 1000, next(units)
    return f"{number:.3g} {unit}" if unit != "bytes" else f"{num_bytes} bytes"
