"""Scans folders that other people made: lists their files, reads many of them at once, and caches the results.

Links are followed, circles end, and what is skipped is counted and reported. The cache is `$XDG_CACHE_HOME/lapa`, or
`~/.cache/lapa`; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from lapa import __version__
from lapa.console import in_threads, say, warn
from lapa.data.metadata import INFO, JOURNAL
from lapa.errors import StoreError, UserError
from lapa.files import as_path, atomic_path, is_remote, reading
from lapa.store_cache import version_of

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv",
)  # fmt: skip
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Reading a header waits for the disk or the network most of the time.
THREADS = 16

Found = TypeVar("Found")


def require_rate(fps: float | None, option: str = "--fps") -> None:
    """Raises UserError for an option that is no rate; None leaves the rate to the source."""
    if fps is not None and not 0 < fps < inf:
        raise UserError(f"{option} {fps}: must be above 0, and finite")


def require_folder(folder: Path | str, content: str) -> Path:
    """Returns the folder; `content`: what it should hold. Raises UserError where it is none, or not on this machine."""
    root = as_path(folder)
    if is_remote(root):
        raise UserError(f"{folder}: {content} are read from this machine's disk; copy or mount it first")
    if not root.is_dir():
        problem = "is a file" if root.exists() else "no such folder"
        if root.exists() and root.suffix.lower() in ARCHIVES:
            problem = "is an archive; unpack it first"
        raise UserError(f"{folder}: {problem}; name a folder with {content}")
    return root


def find_videos(folder: Path | str, others: Sequence[Path] = ()) -> tuple[Path, list[str]]:
    """Returns a folder, and the paths of the videos in it and in the folders inside, in natural order.

    others: files that are used, too, and not counted as ignored.
    Raises UserError where it holds none.
    """
    root = require_folder(folder, "videos")
    names = [f"{inside}/{name}" if inside else name for inside, found in walk(root) for name in found]
    videos = sorted((name for name in names if name.lower().endswith(VIDEO_SUFFIXES)), key=natural_order)
    if not videos:
        raise UserError(f"{folder}: holds no video (other files: {len(names)}); looked for {', '.join(VIDEO_SUFFIXES)}")
    num_used = sum(path.resolve().is_relative_to(root.resolve()) for path in others)
    if num_others := len(names) - len(videos) - num_used:
        say(f"ignored: {num_others} {'file' if num_others == 1 else 'files'} without the suffix of a video")
    return root, videos


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `root`, as its path relative to it ("" for `root`), and the names of the files in it.

    Links to folders are followed, each folder once. Hidden files and datasets of this project are ignored.
    """
    seen = set()
    for place, folders, files in os.walk(root, followlinks=True, onerror=_raise_unlistable):
        here = Path(place)
        status = here.stat()
        is_dataset = here != root and any((here / file).exists() for file in (INFO, JOURNAL))
        if is_dataset or (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_order)
        for name in (*folders, *files):
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise UserError(f"{here}: the name of {name!r} is not UTF-8; rename it")
        yield "" if here == root else here.relative_to(root).as_posix(), [n for n in files if not n.startswith(".")]


def natural_order(name: str) -> tuple[str, str]:
    """Returns a sort key that puts clip2 before clip10."""
    return re.sub(r"[0-9]+", lambda number: number[0].zfill(20), name.lower()), name


def short_names(names: Sequence[str], without_suffix: bool = False) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the file that each name in a table means, and the candidates, in words, of names that fit several.

    A table names files by their paths, or by the last part of these, with or without the suffix.
    """
    candidates: dict[str, list[str]] = {}
    for name in names:
        short = {name.rpartition("/")[2]}
        if without_suffix:
            short |= {name.rpartition(".")[0], Path(name).stem}
        for one in short:
            candidates.setdefault(one, []).append(name)
    candidates |= {name: [name] for name in names}
    unique = {short: found[0] for short, found in candidates.items() if len(found) == 1}
    return unique, {short: " or ".join(found) for short, found in candidates.items() if len(found) > 1}


def scan_files(
    read: Callable[[str], Found], names: Sequence[str], threads: int = THREADS
) -> tuple[dict[str, Found], list[str]]:
    """Returns `read` of each file, and the messages of those for which it raises UserError. Runs in threads.

    Raises StoreError: it is no matter of one file.
    """

    def attempt(name: str) -> Found | UserError:
        try:
            return read(name)
        except StoreError:
            raise
        except UserError as error:
            return error

    if not names:
        return {}, []
    results = dict(zip(names, in_threads(attempt, names, "scanning", threads), strict=True))
    found = {name: result for name, result in results.items() if not isinstance(result, UserError)}
    return found, [str(result) for result in results.values() if isinstance(result, UserError)]


def stop_or_skip(problems: Sequence[str], fix: str, skip_bad: bool) -> int:
    """Raises UserError with the first problem, or, with skip_bad, reports it. Returns how many there are."""
    if not problems:
        return 0
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    if not skip_bad:
        raise UserError(f"{problems[0]}{more}; {fix}")
    warn(f"skipped: {problems[0]}{more}")
    return len(problems)


def cached(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Returns the JSON value cached under a JSON key, or else what `make` returns, which is then cached.

    A damaged entry is made again; a folder that cannot be written to is a warning, and no error.
    """
    # Another version may find something else.
    name = hashlib.sha256(json.dumps([__version__, kind, key]).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapa" / kind
    path = folder / f"{name[:32]}.json"
    try:
        digest, _, text = path.read_text().partition("\n")
        if digest == hashlib.sha256((name + text).encode()).hexdigest():
            return json.loads(text)
    except (OSError, UnicodeDecodeError):
        pass
    value = make()
    text = json.dumps(value)
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(f"{hashlib.sha256((name + text).encode()).hexdigest()}\n{text}")
    except OSError as error:
        warn(f"the scan is not cached, and will be repeated the next time: {error}")
    return value


def file_state(path: Path, anew: bool = True) -> list[Any]:
    """Returns a file's name, size and time of change, on a store its version, for the key of `cached`.

    anew: also ask a store that has answered within a minute. Raises UserError where there is no such file.
    """
    with reading(path):
        if is_remote(path):
            return [str(path), *version_of(path, anew)]
        status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime]


def _raise_unlistable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); change its permissions or remove it")
