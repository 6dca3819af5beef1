"""Finds what a folder of somebody else's holds: its files in natural order, what they are called, and what is wrong.

Links are followed, circles end, and what is skipped is counted and said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from lapa import __version__
from lapa.console import progress, say, warn
from lapa.data.lerobot import INFO, JOURNAL
from lapa.errors import UserError
from lapa.files import as_path, atomic_path, is_remote

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# Looking at files waits for the disk or the network most of the time.
LOOKERS, AT_ONCE = 16, 512

Found = TypeVar("Found")


def find_files(folder: Path | str, what: str) -> tuple[Path, list[str]]:
    """A folder, and the paths inside it of all files in it and in the folders inside, in natural order; see `walk`."""
    root = require_folder(folder, what)
    names = [f"{inside}/{name}" if inside else name for inside, found in walk(root) for name in found]
    return root, sorted(names, key=natural)


def require_folder(folder: Path | str, what: str) -> Path:
    """The folder. UserError where it is none, or not on this machine; `what` says what it should hold."""
    root = as_path(folder)
    if is_remote(root):
        raise UserError(f"{folder}: {what} are read from this machine's disk; copy or mount it first")
    if not root.is_dir():
        told = "is a file" if root.exists() else "no such folder"
        if root.exists() and root.suffix.lower() in ARCHIVES:
            told = "is an archive; unpack it first"
        raise UserError(f"{folder}: {told}; name a folder with {what}")
    return root


def require_rate(fps: float | None) -> None:
    """Raises UserError for an --fps that is no rate; None is left to the source."""
    if fps is not None and not 0 < fps < inf:
        raise UserError(f"--fps {fps}: must be above 0, and finite")


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder below `root`, by its path there ("" for `root`), and the names of the files in it.

    Links to folders are followed, each folder once, whatever circles they make. Hidden files and datasets of this
    project are passed over.
    """
    seen = set()
    for place, folders, found in os.walk(root, followlinks=True, onerror=_refuse):
        here = Path(place)
        status = here.stat()
        is_dataset = here != root and any((here / file).exists() for file in (INFO, JOURNAL))
        if is_dataset or (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural)
        for name in (*folders, *found):
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
                raise UserError(f"{here}: the name of {name!r} is not UTF-8; rename it")
        yield "" if here == root else here.relative_to(root).as_posix(), [n for n in found if not n.startswith(".")]


def natural(name: str) -> tuple[str, str]:
    """A sort key under which clip2 comes before clip10."""
    return re.sub(r"[0-9]+", lambda number: number[0].zfill(20), name.lower()), name


def look_through(function: Callable[[str], Found], names: Sequence[str]) -> Iterator[tuple[str, Found | UserError]]:
    """Each name with what `function` finds out about it, or why it cannot, in order; many at a time."""

    def look(name: str) -> Found | UserError:
        try:
            return function(name)
        except UserError as error:
            return error

    if not names:
        return
    with progress() as bar, ThreadPoolExecutor(LOOKERS) as lookers:
        task = bar.add_task("looking", total=len(names), note="")
        # What waits to be looked at takes memory, and keeps Ctrl-C waiting.
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            for name, found in zip(some, lookers.map(look, some), strict=True):
                bar.advance(task)
                yield name, found


def judge(problems: Sequence[str], mend: str, skip_bad: bool) -> int:
    """Stops at the first problem, or with --skip-bad names and counts them."""
    if not problems:
        return 0
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    if not skip_bad:
        raise UserError(f"{problems[0]}{more}; {mend}")
    warn(f"skipped: {problems[0]}{more}")
    return len(problems)


def find_films(folder: Path | str) -> tuple[Path, list[str]]:
    """A folder, and the videos in it and in the folders inside. UserError where it holds none."""
    root, found = find_files(folder, "videos")
    videos = [name for name in found if name.lower().endswith(SUFFIXES)]
    if not videos:
        raise UserError(f"{folder}: holds no video (other files: {len(found)}); looked for {', '.join(SUFFIXES)}")
    if len(found) > len(videos):
        num = len(found) - len(videos)
        say(f"left aside: {num} {'file' if num == 1 else 'files'} without the suffix of a video")
    return root, videos


def unambiguous(names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What videos may be called in a table: with folders and suffix or without. Also which short names fit several."""
    films: dict[str, str] = {}
    twice: dict[str, str] = {}
    for name in names:
        for short in {name.rpartition(".")[0], name.rpartition("/")[2], Path(name).stem}:
            if short in films:
                twice[short] = f"{films[short]} or {name}"
            films[short] = name
    for name in names:
        films[name] = name
        twice.pop(name, None)
    return {short: name for short, name in films.items() if short not in twice}, twice


def by_short_name(names: Sequence[str]) -> dict[str, str]:
    """The names, and their last parts where those are unique, with what they stand for."""
    last = [name.rsplit("/", 1)[-1] for name in names]
    count = Counter(last)
    return {
        **{short: name for short, name in zip(last, names, strict=True) if count[short] == 1},
        **{n: n for n in names},
    }


def most_common(values: Sequence[Found]) -> Found:
    """The value that comes most often, the greatest of several."""
    counted: Mapping[Found, int] = Counter(values)
    return max(counted, key=lambda value: (counted[value], value))


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); change its permissions or take it out")


def cache_folder() -> Path:
    """The folder for what can be found out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lapa"


def cached(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """The JSON value kept under a JSON key, or else what `make` returns, which is then kept.

    What is damaged is made again; a folder that cannot be written to is told, and no error.
    """
    # Another version may find out something else.
    name = hashlib.sha256(json.dumps([__version__, kind, key]).encode()).hexdigest()
    path = cache_folder() / kind / f"{name[:32]}.json"
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
        warn(f"what was found out is not kept for the next time: {error}")
    return value


def stamp(path: Path) -> list[Any]:
    """A file's name, size and time of change: what tells that it is still the same."""
    stat = path.stat()
    return [str(path if is_remote(path) else path.absolute()), stat.st_size, getattr(stat, "st_mtime", None)]
