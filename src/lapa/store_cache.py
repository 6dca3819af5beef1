"""A bounded cache, on a local disk, of what is read from stores; any number of processes share it.

    lapa latent train --data s3://bucket/clips --store-cache /scratch/lapa --store-cache-gib 200 --out LAM

Files are kept in blocks of 4 MiB, so that a shard of many videos is fetched only where it is read. A block is a file,
named by the address and the version (ETag, time of change, size) of its object and written under another name first.
While one process fetches a block, others that need it wait for its lock. Where the bound would be passed, blocks that
were not read for the longest time are deleted first; a process that reads one of these keeps it until it closes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from lapa.console import warn
from lapa.errors import UserError
from lapa.locks import is_at
from lapa.stores import ANSWERS, retried

BLOCK = 4 << 20
# Share of the bound that is left after blocks were deleted.
KEPT = 0.9
# Seconds for which what a store has answered about an object is taken to hold; objects of which that is remembered.
FRESH, REMEMBERED = 60.0, 1 << 16
# Seconds after which a file that is being written was left by a killed process.
LEFT = 3600.0
# What stores name of an object that changes with its content.
VERSION = ("ETag", "etag", "size", "LastModified", "last_modified", "mtime", "created", "updated", "generation")


class StoreCache:
    """The cache in `folder`, of `gib` GiB at most. Raises UserError where the folder cannot hold one."""

    def __init__(self, folder: Path | str, gib: float):
        self.folder, self.limit = Path(folder).absolute(), int(gib * 2**30)
        if self.limit < 4 * BLOCK:
            raise UserError(f"--store-cache-gib {gib:g}: must be at least {4 * BLOCK / 2**30:g}")
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(self.folder / "bytes"):
                pass
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot hold a cache ({error.strerror}); give a folder of a local disk as --store-cache"
            ) from None

    def open(self, path: Any) -> BinaryIO:
        """Opens an object of a store for reading; what is not in the cache is fetched when it is read."""
        size, version = version_of(path)
        return cast(BinaryIO, io.BufferedReader(_Cached(self, path, size, version), 1 << 16))

    def block(self, path: Any, size: int, version: str, number: int) -> BinaryIO:
        """Returns an opened block of an object; only in memory where the disk is full."""
        name = hashlib.sha256(f"{path}\n{version}\n{number}".encode()).hexdigest()
        file, start = self.folder / name[:2] / name[2:], number * BLOCK
        stop = min(start + BLOCK, size)
        try:
            if (found := _opened(file, stop - start)) is not None:
                return found
            file.parent.mkdir(exist_ok=True)
            with self._locked(file.with_suffix(".part")) as part:
                # Another process may have fetched it while this one waited.
                if (found := _opened(file, stop - start)) is not None:
                    file.with_suffix(".part").unlink(missing_ok=True)
                    return found
                content = fetched(path, start, stop)
                self._make_room(len(content))
                os.ftruncate(part, 0)
                if os.pwrite(part, content, 0) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.with_suffix(".part").rename(file)
                return file.open("rb", buffering=0)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            if not self._warned:
                warn(f"{self.folder}: cannot be written ({error.strerror}); the store is read without a cache")
            self._warned = True
            return io.BytesIO(fetched(path, start, stop))

    def num_bytes(self) -> int:
        """Returns the size of all blocks."""
        return sum(size for _, size, _ in self._blocks())

    def _make_room(self, size: int) -> None:
        """Counts `size` more bytes, of all processes, and deletes blocks where they would pass the limit."""
        with self._locked(self.folder / "bytes") as counter:
            used = int(os.pread(counter, 32, 0) or b"0") + size
            if used > self.limit:
                used = self._delete_oldest(int(KEPT * self.limit) - size) + size
            # In one write: after a kill, or on a full disk, there is still a number.
            os.pwrite(counter, b"%32d" % used, 0)

    def _delete_oldest(self, most: int) -> int:
        """Deletes blocks until they have at most `most` bytes; returns how many they have."""
        blocks = sorted(self._blocks())
        used = sum(size for _, size, _ in blocks)
        for _, size, path in blocks:
            if used <= most:
                break
            with suppress(FileNotFoundError):
                Path(path).unlink()
            used -= size
        return used

    def _blocks(self) -> Iterator[tuple[float, int, str]]:
        """Yields the time of the last use, the size and the path of each block; deletes what killed processes left."""
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    if not entry.name.endswith(".part"):
                        yield status.st_mtime, status.st_size, entry.path
                    elif status.st_mtime < time.time() - LEFT:
                        Path(entry.path).unlink()

    @contextmanager
    def _locked(self, path: Path) -> Iterator[int]:
        """Opens a file and holds its lock, which a killed process loses."""
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if is_at(descriptor, path):
                    yield descriptor
                    return
            finally:
                os.close(descriptor)


class _Cached(io.RawIOBase):
    """An object of a store, read through a cache."""

    def __init__(self, cache: StoreCache, path: Any, size: int, version: str):
        self._cache, self._path, self._size, self._version = cache, path, size, version
        self._position, self._number = 0, -1
        self._block: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        number, offset = divmod(self._position, BLOCK)
        if self._block is None or number != self._number:
            self._leave()
            self._block, self._number = self._cache.block(self._path, self._size, self._version, number), number
        self._block.seek(offset)
        num = int(self._block.readinto(buffer))  # type: ignore[attr-defined]
        self._position += num
        return num

    def close(self) -> None:
        self._leave()
        super().close()

    def _leave(self) -> None:
        if self._block is not None:
            self._block.close()
        self._block = None


_used: StoreCache | None = None
_versions: dict[str, tuple[float, int, str]] = {}


def use_store_cache(folder: Path | None, gib: float) -> None:
    """From now on this process, and those it forks, read stores through a cache; None: without one."""
    global _used
    _used = None if folder is None else StoreCache(folder, gib)


def store_cache() -> StoreCache | None:
    """Returns the cache that this process reads stores through."""
    return _used


def version_of(path: Any, anew: bool = False) -> tuple[int, str]:
    """Returns the size and the version of an object of a store, which is asked once a minute, or `anew`.

    Raises OSError where there is no such object, and StoreError.
    """
    known = _versions.get(str(path))
    if anew or known is None or known[0] < time.monotonic() - FRESH:
        # Clients would answer from a listing, however old.
        path.fs.invalidate_cache(path.path)
        info = retried(path, lambda: path.fs.info(path.path), "read", ANSWERS)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        version = ";".join(f"{name}={info[name]}" for name in VERSION if info.get(name) is not None)
        if len(_versions) >= REMEMBERED:
            _versions.clear()
        known = _versions[str(path)] = time.monotonic(), int(info["size"]), version
    return known[1:]


def fetched(path: Any, start: int, stop: int) -> bytes:
    """Returns bytes of an object of a store. Raises StoreError where it does not answer, or has changed its length."""

    def fetch() -> bytes:
        content = path.fs.cat_file(path.path, start=start, end=stop)
        if len(content) != stop - start:
            _versions.pop(str(path), None)
            raise OSError(f"{len(content)} bytes in place of {stop - start}: it was cut off, or has changed")
        return cast(bytes, content)

    return retried(path, fetch, "read")


def _opened(file: Path, size: int) -> BinaryIO | None:
    """Returns a block, opened and marked as used now; None where it is not there, whole."""
    try:
        block = file.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    if os.fstat(block.fileno()).st_size != size:
        block.close()
        return None
    with suppress(OSError):
        os.utime(block.fileno())
    return cast(BinaryIO, block)
