"""Object stores that fsspec reaches (S3 and its like): requests that are repeated, objects made once, one writer.

A store has no folders, no locks and no files that grow, but an object is written as a whole or not at all, and may be
made on condition that there is none yet. So a lock is an object that its owner writes anew every few seconds: whoever
wants to take it over watches it by a clock of its own, and no two clocks are compared.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar, cast

from lapa.console import say
from lapa.errors import StoreError, UserError
from lapa.locks import LOCK, who

# A path on a store, of universal-pathlib.
StorePath = Any
Result = TypeVar("Result")

# Attempts at a request, each of which the store's client may repeat by itself, and seconds before the second one, twice
# as many before each further one.
ATTEMPTS, PAUSE = 4, 1.0
# What a store answers of an object, rather than fails to.
ANSWERS = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Bytes that are fetched beyond those that are read: the clients' own choice is up to 50 MiB, ten clips of a shard.
READ_AHEAD = 1 << 20
# Packages whose errors, besides OSError, are those of a connection or a store.
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "requests", "httpx", "urllib3")
# Seconds between two writes of a lock, and without one, after which its owner is taken for dead.
BEAT, STALE = 10.0, 60.0

# The locks that this process holds, with the threads that took them.
_held: set[tuple[str, int]] = set()


def is_of_store(error: Exception) -> bool:
    """Whether an error is one of a connection, a store or a file system."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in CLIENTS


def retried(
    path: StorePath,
    request: Callable[[], Result],
    done: str = "written",
    passed: tuple[type[Exception], ...] = (FileExistsError,),
) -> Result:
    """Returns the result of a request, which is repeated where the store or the connection fails.

    done: the verb for messages. Raises UserError naming the object and the fix, StoreError where the store fails or
    refuses; what is in `passed` as it is.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return request()
        except passed:
            raise
        except Exception as error:
            # A file on this machine has a name in the error, an object has none.
            if not is_of_store(error) or getattr(error, "filename", None):
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
                fix = "log in to the store, or ask its owner; what has begun goes on with --resume"
                raise StoreError(f"{path}: no permission, it could not be {done} ({reason}); {fix}") from None
            if isinstance(error, FileNotFoundError):
                fix = "make the bucket, or correct the name"
                raise UserError(
                    f"{path}: could not be {done}, it or its bucket does not exist ({reason}); {fix}"
                ) from None
    raise StoreError(
        f"{path}: could not be {done} in {ATTEMPTS} attempts ({reason}); check the connection and the store, then "
        "run the command again with --resume"
    )


def opened(path: StorePath, read_ahead: int = READ_AHEAD) -> BinaryIO:
    """Opens an object for reading; each request is `retried`. Raises what is in `ANSWERS` as it is."""
    file = retried(path, lambda: path.open("rb", block_size=read_ahead), "read", ANSWERS)
    return cast(BinaryIO, io.BufferedReader(_Object(path, file)))


class _Object(io.RawIOBase):
    """An object that is open for reading. Raises UserError where it is replaced meanwhile."""

    def __init__(self, path: StorePath, file: BinaryIO):
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        position = self._file.tell()
        content = retried(self._path, lambda: self._read(position, len(buffer)), "read")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read(self, position: int, size: int) -> bytes:
        try:
            self._file.seek(position)
            return self._file.read(size)
        except OSError as error:
            # Of s3fs.
            if type(error).__name__ == "FileExpired":
                raise UserError(f"{self._path}: has changed while it was read; run the command again") from None
            raise


def content_of(path: StorePath) -> bytes | None:
    """Reads an object, None where there is none."""

    def read() -> bytes | None:
        try:
            content: bytes = path.fs.cat_file(path.path)
        except FileNotFoundError:
            return None
        return content

    return retried(path, read, "read")


def create(path: StorePath, content: bytes) -> bool:
    """Makes an object, unless there is one: returns whether it now has this content.

    Only as good as the store: one that knows no conditions may replace an object that another made just now.
    """

    def make() -> bool:
        try:
            path.fs.pipe_file(path.path, content, mode="create")
        except Exception as error:
            # Also made by an attempt whose answer was lost.
            if not is_of_store(error) or (found := content_of(path)) is None:
                raise
            return found == content
        return True

    return retried(path, make)


@contextmanager
def locked_store(folder: StorePath, take_over: bool) -> Iterator[None]:
    """Holds the lock of a folder on a store; the thread that holds it already may take it again.

    take_over: that of an owner who is dead, after a time of watching it. Raises UserError naming the owner otherwise.
    """
    path, owner = folder / LOCK, uuid.uuid4().hex
    held = str(path), threading.get_ident()
    if held in _held:
        yield
        return

    def content(beat: int) -> bytes:
        return json.dumps({"owner": owner, "writer": who(), "beat": beat}).encode()

    if not create(path, content(0)):
        _require_dead(folder, path, take_over)
        retried(path, lambda: path.fs.pipe_file(path.path, content(0)))
    ended = threading.Event()

    def is_mine() -> bool:
        return owner.encode() in (content_of(path) or b"")

    def keep() -> None:
        beat = 0
        while not ended.wait(BEAT):
            beat += 1
            try:
                if not is_mine():
                    return
                path.fs.pipe_file(path.path, content(beat))
            except Exception as error:
                # The next beat may come through, and what is written tells by itself.
                if not is_of_store(error) and not isinstance(error, UserError):
                    raise

    beating = threading.Thread(target=keep, daemon=True)
    beating.start()
    _held.add(held)
    try:
        yield
    finally:
        _held.discard(held)
        ended.set()
        beating.join()
        if is_mine():
            retried(path, lambda: path.fs.rm_file(path.path), "removed")


def _require_dead(folder: StorePath, path: StorePath, take_over: bool) -> None:
    """Raises UserError naming who holds the lock, unless nothing is heard of them for a time."""
    first = content_of(path) or b""
    try:
        writer = str(json.loads(first)["writer"])
    except (ValueError, KeyError, TypeError):
        writer = "another command"
    if take_over:
        say(f"{folder}: waiting {STALE:g} s, to see whether {writer} still writes")
        end = time.monotonic() + STALE
        while (found := content_of(path)) == first and time.monotonic() < end:
            time.sleep(min(1.0, STALE / 10))
        if found in (first, None):
            return
    raise UserError(
        f"{folder}: is being written by {writer}; wait for it to end, or give another --out"
        + ("" if take_over else ", or, where it was killed, take over with --resume")
    )
