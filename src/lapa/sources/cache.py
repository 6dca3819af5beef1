"""What a pass over somebody else's files found out, kept in the user's cache folder until the files or lapa change.

    cached("rlds", [[path.name, size, mtime], ...], measure)     # measure() is called where nothing is kept

`$XDG_CACHE_HOME/lapa`, or `~/.cache/lapa`; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lapa import __version__
from lapa.console import warn
from lapa.files import atomic_path, is_remote


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
