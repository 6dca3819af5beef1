"""A folder here, or a repository of the Hugging Face hub by its id: one place decides which of them a text names.

    user/name              the repository's main branch
    user/name@revision     a branch, a tag or a commit of it

A folder that exists is taken first. Files that were downloaded before are not downloaded again; a transfer that is cut
is tried again several times, from where it stopped. Private and gated repositories need a token: `hf auth login`, or
HF_TOKEN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lapa.errors import UserError
from lapa.files import errors_about

# As git has it: neither `..` nor a dot in front.
REVISION = re.compile(r"(?!\.|\S*\.\.)[^@\s]+")
HUB_ID = re.compile(rf"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>{REVISION.pattern}))?")
LOG_IN = "`hf auth login` or HF_TOKEN"
LONGEST_REASON = 200
# What the hub answers where the same request may succeed later: it took too long, there were too many.
TRY_AGAIN = (408, 429)
# How the error begins where nothing of that name is found.
NEITHER = "neither"
# The file that every model and policy, every dataset has.
MODEL_MARKER, DATASET_MARKER = "config.json", "meta/info.json"
# What the hub calls repositories of each kind in its addresses.
ADDRESS = {"model": "", "dataset": "datasets/"}


class NotFound(UserError):
    """There is neither a folder nor a repository of this name."""


@dataclass(frozen=True)
class HubId:
    """A repository of the hub, `user/name`, and its revision; None for the main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    def url(self, kind: str = "model") -> str:
        """Its page. kind: `model` or `dataset`."""
        from huggingface_hub import constants

        page = f"{constants.ENDPOINT}/{ADDRESS[kind]}{self.repo}"
        return page if self.revision is None else f"{page}/tree/{self.revision}"


def as_hub_id(text: str | Path, revision: str | None = None) -> HubId | None:
    """The repository that a text names; None where it is a folder here, or cannot be an id.

    revision: one that is given apart from the text. Raises UserError where both give one, for that of a folder, and for
    one that cannot be.
    """
    if revision is not None and not REVISION.fullmatch(revision):
        raise UserError(f"{text}: {revision!r} is no revision; give a branch, tag or commit")
    # A path of another file system is no id. The text may be longer than any name of a file.
    there = not isinstance(text, str | Path) or os.path.exists(text)  # noqa: PTH110
    match = None if there else HUB_ID.fullmatch(str(text))
    if there and revision is not None:
        raise UserError(f"{text}: is a folder here, which has no revision {revision!r}; leave the revision out")
    if match is None:
        return None
    if match["revision"] is not None and revision not in (None, match["revision"]):
        raise UserError(f"{text}: names a revision, and {revision!r} is another one; give one of them")
    return HubId(match["repo"], match["revision"] or revision)


def hub_folder(
    folder_or_hub_id: str | Path,
    patterns: Iterable[str] | None,
    hint: str = "",
    kind: str = "model",
    *,
    marker: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder itself where it exists, else the snapshot of a hub repository with the files that match `patterns`.

    patterns: None for all files; kind: `model` or `dataset`. marker: a file that every such artifact has, fetched
    before the others. revision and token: of the hub, by default the main branch and the token that is logged in.
    Raises UserError where there is neither or the repository has no `marker`, which ends with `hint`, and where the
    repository or its revision cannot be read.
    """
    if revision is None and Path(folder_or_hub_id).is_dir():
        return Path(folder_or_hub_id)
    hub_id = as_hub_id(folder_or_hub_id, revision)
    if hub_id is None:
        raise UserError(f"{folder_or_hub_id}: no such folder{hint}")
    from huggingface_hub import snapshot_download

    options = {"repo_type": kind, "token": token}
    with hub_errors(hub_id, kind, hint):
        if marker is not None:
            folder = Path(
                snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=[marker], **options)  # type: ignore[arg-type]
            )
            if not (folder / marker).is_file():
                raise UserError(f"{hub_id}: the {kind} on the hub has no {marker}, so it is of another kind{hint}")
            # The other files come from the same commit, which is the name of the snapshot's folder.
            hub_id = HubId(hub_id.repo, folder.name)
        wanted = None if patterns is None else list(patterns)
        return Path(
            snapshot_download(hub_id.repo, revision=hub_id.revision, allow_patterns=wanted, **options)  # type: ignore[arg-type]
        )


def require_model(folder_or_hub_id: str | Path) -> None:
    """Raises UserError where there is neither a folder nor a repository with a model's config; downloads that alone."""
    hub_folder(folder_or_hub_id, [MODEL_MARKER], marker=MODEL_MARKER)


def require_policy(folder_or_hub_id: str | Path) -> None:
    """As `require_model`, for a policy. A text without `/` may be the name of a baseline, which its command checks."""
    if isinstance(folder_or_hub_id, Path) or "/" in folder_or_hub_id:
        hint = "; make a policy with `lapa policy pretrain` or `finetune`"
        hub_folder(folder_or_hub_id, [MODEL_MARKER], hint, marker=MODEL_MARKER)


def require_dataset(folder_or_hub_id: str | Path) -> None:
    """Raises UserError where there is neither a folder nor a dataset on the hub; downloads its description alone."""
    hub_folder(folder_or_hub_id, [DATASET_MARKER], kind="dataset", marker=DATASET_MARKER)


@contextmanager
def errors_of(folder_or_hub_id: str | Path) -> Iterator[None]:
    """Puts an id on the hub before the message of a UserError raised inside, which names a file of the hub's cache."""
    if as_hub_id(folder_or_hub_id) is None:
        yield
        return
    with errors_about(folder_or_hub_id):
        yield


@contextmanager
def hub_errors(hub_id: HubId, kind: str, hint: str = "", *, pushing: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises inside into a UserError: the repository, what is wrong, and the fix.

    hint: how else to get what is not found.
    """
    from huggingface_hub.errors import HTTPError, XetDownloadError

    try:
        yield
    except UserError:
        raise
    # A transfer that is cut is a RuntimeError where it ran in a thread or in hf_xet, what the hub refuses a ValueError.
    except (ValueError, HTTPError, OSError, RuntimeError, XetDownloadError) as error:
        explained = _explained(error, hub_id, kind, pushing)
        if explained.startswith(NEITHER):
            raise NotFound(f"{hub_id}: {explained}{hint}") from None
        raise UserError(f"{hub_id}: {explained}") from None


def _explained(error: BaseException, hub_id: HubId, kind: str, pushing: bool) -> str:
    """What went wrong with a repository, and how to fix it."""
    from huggingface_hub import errors

    neither = (
        f"cannot push to this {kind} on the hub" if pushing else f"{NEITHER} a folder here nor a {kind} on the hub"
    )
    # Where nothing was downloaded before, the error of the request is the cause of another.
    chain = list(_chain(error))
    answer = next((each for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    status = None if answer is None else answer.response.status_code
    page = HubId(hub_id.repo).url(kind)
    if isinstance(answer, errors.GatedRepoError):
        return f"the {kind} on the hub is gated; ask for access at {page}, and log in with {LOG_IN}"
    if isinstance(answer, errors.RevisionNotFoundError):
        return f"the {kind} on the hub has no revision {hub_id.revision!r}; choose a branch, tag or commit of {page}"
    if isinstance(answer, errors.RepositoryNotFoundError):
        return f"{neither} (no such repository, or a private one); correct the name, or log in with {LOG_IN}"
    if status == 401:
        return f"the hub refuses the token, or there is none (401); log in with {LOG_IN}"
    if answer is not None and status == 403:
        reason = _reason(answer.server_message or answer)
        return f"no permission (403: {reason}); log in with a token that may do this, or ask the owner of {page}"
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        before = "" if pushing else ", and it was not downloaded before"
        return f"{neither} (HF_HUB_OFFLINE is set{before}); correct the name, or unset HF_HUB_OFFLINE"
    if isinstance(error, errors.HFValidationError):
        return f"{neither} ({_reason(error)}); give an id such as user/name"
    if isinstance(error, ValueError):
        return f"{neither} ({_reason(error)})"
    if type(error) in (OSError, PermissionError):
        return f"cannot be stored or read ({_reason(error)}); make room, or set HF_HOME to a folder with room"
    if answer is not None and 400 <= answer.response.status_code < 500 and status not in TRY_AGAIN:
        reason = _reason(answer.server_message or answer)
        return f"the hub refuses this ({status}: {reason}); correct the name or the revision of {page}"
    again = "check the network and run the command again, which keeps the files that arrived"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{neither} ({_reason(chain[-1])}); correct the name, or {again}"
    return f"the connection to the hub failed ({_reason(answer or chain[-1])}); {again}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was made from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
