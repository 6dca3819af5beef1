"""One writer for each output folder: a lock file that the process holds until its command ends.

The kernel frees the lock when its process ends, however it ends; a forked worker does not inherit it, so that none
that outlives a killed run stands in the way of a resume.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import functools
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from lapa.console import warn
from lapa.errors import UserError

LOCK = ".lock"
COMMAND_SHOWN = 160
# Times and seconds that a command waits for the name of the one that has just taken the lock.
PATIENCE, WAIT = 50, 0.02

P = ParamSpec("P")
Result = TypeVar("Result")

# The lock files that this process holds, each with the thread that took it. A process loses a lock as soon as it
# closes any descriptor of the file, so none that is held is opened a second time.
_held: dict[Path, int] = {}
_guard = threading.Lock()
# The locks of the command that runs in this thread; those taken outside of a command last as long as the process.
_running = threading.local()
_until_exit = ExitStack()
atexit.register(_until_exit.close)


def locks_output(command: Callable[P, Result]) -> Callable[P, Result]:
    """A command's function: folders that `claim_output` locks in it are free again when it ends, also by an error."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        outer = _locks_of_command()
        with ExitStack() as _running.locks:
            try:
                return command(*args, **kwargs)
            finally:
                _running.locks = outer

    return run


def hold_to_the_end(locks: ExitStack) -> None:
    """Keeps these locks until the running command ends."""
    _locks_of_command().push(locks.pop_all())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of an existing local folder; the thread that holds it already may take it again.

    Where the file system has no locks, a warning reports it and nothing is held.
    Raises UserError naming the writer where another process or thread holds it, or where the folder is read-only.
    """
    path = folder.resolve() / LOCK
    with _guard:
        holder = _held.get(path)
        if holder not in (None, threading.get_ident()):
            raise UserError(f"{folder}: is being written by another thread of this process; wait for it to end")
        descriptor = None
        if holder is None:
            descriptor = _taken(folder, path)
            _held[path] = threading.get_ident()
    try:
        yield
    finally:
        if descriptor is not None:
            with _guard:
                # Removed while it is held: whoever opened it meanwhile finds another file, or none, and starts again.
                path.unlink(missing_ok=True)
                os.close(descriptor)
                del _held[path]


def _locks_of_command() -> ExitStack:
    return getattr(_running, "locks", _until_exit)


def _taken(folder: Path, path: Path) -> int:
    """Opens and locks the file, which then names the writer. Returns its descriptor."""
    while True:
        try:
            # A link here, in a folder of unknown origin, must not be followed.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); give another --out") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                writer = _writer(descriptor)
                os.close(descriptor)
                raise UserError(
                    f"{folder}: is being written by {writer}; wait for it to end, or give another --out"
                ) from None
            warn(f"{folder}: its file system has no locks ({error.strerror}); let no second command write there")
            return descriptor
        if is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, who().encode(errors="replace"), 0)
            return descriptor
        os.close(descriptor)


def _writer(descriptor: int) -> str:
    """Returns the writer that the file names, who may have locked it a moment ago and not written that yet."""
    for _ in range(PATIENCE):
        if named := os.pread(descriptor, 1000, 0):
            return named.decode(errors="replace")
        time.sleep(WAIT)
    return "another process"


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`; the last holder of its lock may have renamed or removed it."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def who() -> str:
    """Returns this process, its machine and its command, as a lock names its owner."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    command = shlex.join(["lapa" if program == "__main__.py" else program, *sys.argv[1:]])
    command = command if len(command) <= COMMAND_SHOWN else f"{command[:COMMAND_SHOWN]}..."
    return f"process {os.getpid()} on {socket.gethostname()} ({command}), started {time.strftime('%Y-%m-%d %H:%M:%S')}"
