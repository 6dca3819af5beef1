"""Checksums: SHA-256 of the files of an artifact, and a CRC in each line of a journal.

A finished artifact has a file SHA256SUMS, in the form of `sha256sum`, which also checks it: `sha256sum -c SHA256SUMS`.
It is written just before the file that marks the artifact as complete, and lists that one too. Artifacts without it,
made by earlier versions, are not checked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from lapa.errors import UserError
from lapa.files import as_json, as_path, atomic_path, errors_about, inside, open_binary, parse_json, reading, write_text

SUMS = "SHA256SUMS"
BLOCK = 1 << 20
SHA256_LENGTH = 64
# The end of a journal's line; the checksum is of all before it, and of the lines before.
CRC_ENDING = re.compile(rb', "crc": "([0-9a-f]{8})"\}\n')
CRC_LENGTH = len(', "crc": "00000000"}\n')
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex digits. Raises UserError naming it where it cannot be read."""
    digest = hashlib.sha256()
    with reading(path), open_binary(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sums_of(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files of a folder, by their names below it."""
    names = sorted(files)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(names, threads.map(lambda name: sha256(folder / name), names), strict=True))


def write_sums(folder: Path, sums: Iterable[tuple[str, str]]) -> None:
    """Writes the folder's SHA256SUMS: of each file its name below the folder, and its SHA-256."""
    with atomic_path(as_path(folder) / SUMS) as temporary, temporary.open("wb") as file:
        file.writelines(f"{digest}  {name}\n".encode() for name, digest in sums)


def each_sum(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields what `write_sums` wrote, nothing without a file. Raises UserError naming the file where it is damaged."""
    path = as_path(folder) / SUMS
    if not path.exists():
        return
    line = b""
    with reading(path), open_binary(path) as file:
        for line in file:
            text = line.decode(errors="replace")
            if not (name := text[SHA256_LENGTH + 2 :].removesuffix("\n")) or not text.endswith("\n"):
                break
            yield name, text[:SHA256_LENGTH]
        else:
            if line:
                return
    raise UserError(f"{path}: damaged; delete it, and its folder is no longer checked")


def read_sums(folder: Path) -> dict[str, str]:
    """Returns what `write_sums` wrote, {} without a file. Raises UserError as `each_sum`."""
    return dict(each_sum(folder))


def write_marker(
    folder: Path, marker: str, value: Any, files: Iterable[str], known: Iterable[tuple[str, str]] = ()
) -> None:
    """Writes the JSON file that marks an artifact as complete, after the checksums of its files.

    marker: its name below the folder; files: the other files of the artifact, named alike; known: further
    files, with their checksums.
    """
    text = as_json(value)
    sums = {marker: hashlib.sha256(text.encode()).hexdigest(), **sums_of(folder, files)}
    write_sums(folder, chain(sums.items(), known))
    write_text(folder / marker, text)


def files_below(folder: Path, *inner: str) -> list[str]:
    """The names, below `folder`, of all files in these folders of it."""
    paths = (path for name in inner for path in (folder / name).rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in paths if not path.name.startswith(".")]


def verify(folder: Path, remedy: str, sums: Mapping[str, str] | None = None) -> None:
    """Raises UserError for the first file of a folder that is not as it was written, ending with the remedy.

    sums: the files to look at, with their checksums; by default all of SHA256SUMS, and none where that is missing.
    """
    sums = read_sums(folder) if sums is None else sums
    for name in sums:
        with errors_about(folder / SUMS):
            path = inside(folder, name)
        if not path.is_file():
            raise UserError(f"{path}: missing, though {SUMS} lists it; {remedy}")
    for name, found in sums_of(folder, sums).items():
        require_sum(folder / name, found, sums[name], remedy)


def require_sum(path: Path, found: str, expected: str, remedy: str) -> None:
    """Raises UserError naming the file where the two checksums of it differ."""
    if found != expected:
        raise UserError(
            f"{path}: damaged or changed, its SHA-256 is not that in {SUMS}; {remedy}, or, where the change is meant, "
            "delete its line there, or the whole list"
        )


class Journal:
    """A file of one JSON object a line, each with a CRC of itself and all lines before it.

    Iterating reads the lines in order. It raises UserError naming the line that is damaged, or before which one is
    missing; a last line that a kill cut short is left out. After that, `append` goes on behind the last whole line.
    length: bytes of the whole lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._crc = self.length = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._crc = self.length = 0
        if not self.path.exists():
            return
        with reading(self.path), self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    value, self._crc = opened_line(line, self._crc)
                except UserError as error:
                    anew = "--overwrite to start anew"
                    raise UserError(f"{self.path}: is damaged in line {number}: {error}; {anew}") from None
                self.length += len(line)
                yield value

    def begin(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the file by these lines, atomically."""
        lines, crc = [], 0
        for value in values:
            line, crc = sealed_line(value, crc)
            lines.append(line)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(lines))
        self._crc, self.length = crc, sum(map(len, lines))

    def append(self, value: Mapping[str, Any], sync: bool = False) -> None:
        """Adds a line, or, where that fails (disk full), leaves the file as it was. sync: wait until it is on disk."""
        line, crc = sealed_line(value, self._crc)
        try:
            with self.path.open("ab", buffering=0) as file:
                if file.tell() != self.length:
                    file.truncate(self.length)
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, self.length)
            raise
        self._crc, self.length = crc, self.length + len(line)


def sealed_line(value: Mapping[str, Any], before: int = 0) -> tuple[bytes, int]:
    """An object as a line of JSON with a CRC, and the CRC. before: that of the line before it."""
    body = ENCODER.encode(value).encode()[:-1]
    crc = zlib.crc32(body, before)
    return body + b', "crc": "%08x"}\n' % crc, crc


def opened_line(line: bytes, before: int = 0) -> tuple[dict[str, Any], int]:
    """The inverse of `sealed_line`. Raises UserError for a line that is not as it was written."""
    body, ending = line[:-CRC_LENGTH], CRC_ENDING.fullmatch(line[-CRC_LENGTH:])
    if ending is None:
        raise UserError("it has no checksum, or is of an earlier version")
    crc = zlib.crc32(body, before)
    if int(ending[1], 16) != crc:
        raise UserError("its checksum does not fit: it was changed, or one before it is missing")
    # Its checksum fits, but whoever made the line may not have made it of JSON.
    try:
        value: dict[str, Any] = parse_json(body + b"}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error})") from None
    return value, crc
