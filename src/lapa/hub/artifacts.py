"""The artifact in a folder, as it goes to the hub: its kind and its files, without paths of this machine.

Left out are checkpoints (`training/`), locks, half-written files, and whatever else is not part of the artifact. Paths
of this machine in the options that made it are cut to their last name, and SHA256SUMS is made to fit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from lapa.checksums import SUMS, read_sums, sha256, verify
from lapa.console import warn
from lapa.errors import UserError
from lapa.files import as_json, find_files, inside, read_json
from lapa.locks import LOCK, locked

CONFIG, MANIFEST, RESULTS = "config.json", "manifest.json", "results.json"
INFO, NOTES = "meta/info.json", "meta/lapa.json"
# Files that mark an artifact as complete, which a reader looks for first.
MARKERS = (CONFIG, INFO, MANIFEST, RESULTS)
# Parts of a policy of `lapa baseline unipi`, whose files identify it.
PARTS = (f"video/{CONFIG}", f"inverse/{CONFIG}")
# Files that hold options and commands, and so paths of the machine where they were written.
TELLING = (CONFIG, "metrics.json", RESULTS, NOTES, "probe_*/*.json", "measure_*/*.json", *PARTS)
# Keys of config.json that identify a model, whose texts stay as they are.
IDENTITY = ("model", "policy")
# An absolute path, or one from the home folder or the folder above, in a text; not the slashes of a URL.
MACHINE_PATH = re.compile(r"(?<![^\s=:,'\"])(?:~|\.\.)?/(?=[^\s=:,'\"/])(?:[^\s=:,'\"/]+/)*([^\s=:,'\"/]*)")


@dataclass(frozen=True)
class Kind:
    """A kind of artifact. repo_type: of its repositories; patterns: its files, as of `files.find_files`."""

    name: str
    repo_type: str
    patterns: tuple[str, ...]


KINDS = {
    "lam": Kind(
        "latent action model",
        "model",
        (CONFIG, "model.safetensors", "metrics.json", "vision_tower/**/*", "probe_*/*.json"),
    ),
    "policy": Kind(
        "policy",
        "model",
        (
            *(CONFIG, "metrics.json", "*.safetensors", "model/**/*", "processor/**/*", "measure_*/*.json"),
            # A policy of `lapa baseline unipi`.
            *("video/**/*", "inverse/**/*"),
        ),
    ),
    "labels": Kind("labels", "dataset", (MANIFEST, "episodes-*.parquet")),
    "dataset": Kind("dataset", "dataset", ("meta/**/*", "data/**/*", "videos/**/*", "images/**/*")),
    "results": Kind("results", "dataset", (RESULTS, CONFIG, "episodes.jsonl", "videos/**/*")),
}


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. files: by name in the repository, the file here or its content where that is changed."""

    folder: Path
    kind: str
    files: Mapping[str, Path | bytes]

    @property
    def num_bytes(self) -> int:
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object among the files; {} where there is none."""
        file = self.files.get(name)
        value = {} if file is None else without_paths(read_json(self.folder / name))
        return value if isinstance(value, dict) else {}


def read_artifact(folder: Path) -> Artifact:
    """The artifact in a folder. Raises UserError where it is none, unfinished, damaged, or being written."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give that of a model, policy, labels, dataset or results")
    if (folder / LOCK).exists():
        with locked(folder):
            pass
    kind = kind_of(folder)
    sums = read_sums(folder)
    # Notes may be edited by hand.
    verify(folder, "make it again", {name: digest for name, digest in sums.items() if name != NOTES})
    paths = [path for pattern in KINDS[kind].patterns for path in find_files(folder, pattern)]
    names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()} | set(sums)
    names = {name for name in names if not any(part.startswith(".") for part in PurePosixPath(name).parts)}
    # The sums name every file of a folder such as model/, or none, as for the measurements.
    whole = set() if kind == "dataset" else {name.partition("/")[0] for name in sums if "/" in name}
    names -= {name for name in names if name not in sums and name.partition("/")[0] in whole}
    files: dict[str, Path | bytes] = {name: inside(folder, name) for name in sorted(names)}
    for name in files:
        if any(fnmatchcase(name, pattern) for pattern in TELLING):
            files[name] = _public(folder, name)
    if sums:
        changed = {name: hashlib.sha256(file).hexdigest() for name, file in files.items() if isinstance(file, bytes)}
        if NOTES in sums:
            changed.setdefault(NOTES, sha256(folder / NOTES))
        lines = [f"{changed.get(name, digest)}  {name}\n" for name, digest in sums.items()]
        files[SUMS] = "".join(lines).encode()
    return Artifact(folder, kind, files)


def without_paths(value: Any, keep: tuple[str, ...] = ()) -> Any:
    """JSON whose texts have no path of this machine: of each absolute one only the last name is left.

    keep: keys of an object that are not changed.
    """
    if isinstance(value, dict):
        return {key: item if key in keep else without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if re.match(r"(?:~|\.\.)?/\S", value) and " -" not in value:
        # A path with blanks in it.
        return PurePosixPath(value).name
    return MACHINE_PATH.sub(r"\1", value)


def kind_of(folder: Path) -> str:
    """The kind of a finished artifact, by the file that marks it as complete."""
    if (folder / INFO).exists():
        return "dataset"
    if (folder / MANIFEST).exists():
        return "labels"
    if (folder / RESULTS).exists():
        return "results"
    if not (folder / CONFIG).exists():
        unfinished = (folder / "training").exists() or (folder / "episodes.jsonl").exists()
        fix = "finish it with --resume" if unfinished else "give that of a model, policy, labels, dataset or results"
        raise UserError(f"{folder}: holds no finished artifact; {fix}")
    config = read_json(folder / CONFIG)
    config = config if isinstance(config, dict) else {}
    if isinstance(config.get("policy"), dict) or config.get("kind") == "unipi":
        return "policy"
    if isinstance(config.get("model"), dict):
        return "lam"
    raise UserError(f"{folder}: neither a latent action model nor a policy, by its {CONFIG}; give the folder of one")


def _public(folder: Path, name: str) -> bytes | Path:
    """A file of options without paths of this machine; the file itself where it has none."""
    value = read_json(folder / name)
    kept = IDENTITY if name == CONFIG and isinstance(value, dict) else ()
    public = value if name in PARTS else without_paths(value, kept)
    if without_paths(public) != public:
        warn(f"{folder / name}: names a path of this machine, which is part of the model's identity and goes up")
    return folder / name if public == value else as_json(public).encode()
