"""Files: atomic writes, outputs that are not overwritten by accident, fingerprints, errors that name the file.

Every artifact is written through this module, so a killed run or a full disk leaves no partial file under its name.

Datasets and labels may be wherever fsspec reaches: `as_path("s3://bucket/dataset")` has the methods of pathlib
(universal-pathlib) and is annotated as `Path`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from lapa.errors import StoreError, UserError, shown
from lapa.locks import LOCK, hold_to_the_end, locked
from lapa.store_cache import store_cache
from lapa.stores import ANSWERS, READ_AHEAD, is_of_store, locked_store, opened, retried

# Protocols of fsspec and the pip packages that implement them.
FILE_SYSTEMS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}

# The name of a file that is being written: of the final name, the process's id and the suffix; or that of safetensors.
PARTIAL = re.compile(r"\..+\.\d+\.partial(\..+)?|\.tmp[A-Za-z0-9]{6}")

# A URL after pathlib, which makes `s3:/bucket` of `s3://bucket`.
URL = re.compile(r"[a-z][a-z0-9+.-]+:/")

# Of JSON: no file of ours is nested more, and code that descends into it must come to an end.
DEEPEST = 400

# Of JSON, in the words of an error.
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}

# Control characters, halves of a surrogate pair, and the separator of Windows: in no path that a file names.
NOT_IN_PATHS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]")


def as_path(location: str | Path) -> Path:
    """The path of a local file or folder, or of a URL of fsspec (`s3://`, `gs://`, `memory://`, `file://`).

    Raises UserError where the protocol is not known or its package is not installed.
    """
    if not isinstance(location, str):
        return location
    if "://" not in location:
        return Path(location)
    from upath import UPath

    protocol, _, rest = location.partition("://")
    if protocol in ("file", "local"):
        return Path(rest)
    try:
        path = UPath(location)
        _ = path.fs
    except ImportError as error:
        remedy = f"pip install {FILE_SYSTEMS[protocol]}" if protocol in FILE_SYSTEMS else str(error)
        raise UserError(f"{location}: reading {protocol}:// needs another package: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{location}: no such file system ({error})") from None
    return cast(Path, path)


def is_remote(path: Path) -> bool:
    """Whether a path is outside this machine's file system."""
    return not isinstance(path, Path)


def is_in_store(path: Path) -> bool:
    """Whether a path is an object of a store by itself; a part of one, such as a member of a shard, is remote alone."""
    return hasattr(path, "fs")


def inside(folder: Path, relative: Any, *, written: bool = False) -> Path:
    """Returns `folder / relative`, where `relative` is what a file names: a file or folder inside `folder`.

    written: whether it is to be written. Then no link on the way may lead out of `folder`; files that are only read
    may be links, as they are in the cache of the hub.
    Raises UserError where `relative` is no path, is absolute, holds `..`, a backslash or a control character.
    """
    named = PurePath(relative) if isinstance(relative, str) and not NOT_IN_PATHS.search(relative) else PurePath()
    if not named.parts or named.anchor or ".." in named.parts:
        raise UserError(f"{shown(relative)} names no file inside {folder}; expected a path such as folder/file")
    path = folder / named
    if written and not is_remote(path) and not _resolved(path).is_relative_to(_resolved(folder)):
        raise UserError(f"{path}: a link leads out of {folder}, where nothing may be written; remove the link")
    return path


def _resolved(path: Path) -> Path:
    # Unlike Path.resolve, no error where links go round in a circle.
    return Path(os.path.realpath(path))


@contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[None]:
    """Turns an error of a file inside (no such file, no permission) into a UserError, of a store into a StoreError."""
    ending = f"; {remedy}" if remedy else ""
    try:
        yield
    except PermissionError as error:
        access = "log in to the store, or ask its owner" if is_remote(path) else "change its permissions"
        kind = StoreError if is_remote(path) else UserError
        raise kind(f"{path}: no permission to read it ({_first_line(error)}); {access}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{ending}") from None
    except Exception as error:
        if not is_of_store(error):
            raise
        kind = StoreError if is_remote(path) and not isinstance(error, ANSWERS) else UserError
        raise kind(f"{path}: cannot be read ({_first_line(error)}){ending}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the paths in `folder`, local or remote, that match a pattern such as `*/*.parquet`, in order.

    `**` stands for the folder and all folders in it; links to folders are not followed there. None without a folder.
    Raises UserError for a folder that may not be listed, which pathlib and universal-pathlib take for an empty one.
    """
    part, _, rest = pattern.partition("/")
    found = find_files(folder, rest) if part == "**" else []
    for name, is_folder in sorted(_listed(folder, follow=part != "**")):
        if part == "**":
            found += find_files(folder / name, pattern) if is_folder else []
        elif fnmatchcase(name, part):
            found += find_files(folder / name, rest) if rest else [folder / name]
    return found


def _listed(folder: Path, follow: bool) -> list[tuple[str, bool]]:
    """The names in a folder, and whether each is a folder; [] where `folder` is none. follow: links."""
    with reading(folder):
        try:
            if not is_remote(folder):
                with os.scandir(folder) as entries:
                    return [(entry.name, entry.is_dir(follow_symlinks=follow)) for entry in entries]
            remote = cast(Any, folder)
            own = remote.path.strip("/")
            listed = retried(folder, lambda: remote.fs.ls(remote.path, detail=True), "listed", ANSWERS)
            found = [(entry["name"].strip("/"), entry["type"]) for entry in listed]
            return [(path.rpartition("/")[2], kind == "directory") for path, kind in found if path != own]
        except (FileNotFoundError, NotADirectoryError):
            return []


def open_binary(path: Path, read_ahead: int = READ_AHEAD) -> BinaryIO:
    """Opens a file, local or remote, for reading bytes; a remote one through the cache of `use_store_cache`, if any.

    read_ahead: bytes of a store that are fetched beyond those that are read.
    """
    if not is_in_store(path):
        return cast(BinaryIO, path.open("rb"))
    cache = store_cache()
    return opened(path, read_ahead) if cache is None else cache.open(path)


@contextmanager
def open_for_arrow(path: Path) -> Iterator[Any]:
    """Opens a file, local or remote, for pyarrow to read.

    A local one is read by pyarrow itself: its threads may drop a file of Python's as late as the process ends, which
    aborts it ("terminate called without an active exception").
    """
    if is_remote(path):
        with open_binary(path) as file:
            yield file
        return
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file:
        yield file


def why_unreadable(path: Path) -> str:
    """The reason why a file is not of its kind: it is empty, or a pointer of Git LFS; "" for any other reason."""
    try:
        with open_binary(as_path(path)) as file:
            head = file.read(64)
    except OSError:
        return ""
    if not head:
        return "it is empty, zero bytes"
    return "it is a pointer of Git LFS, run `git lfs pull`" if head.startswith(b"version https://git-lfs") else ""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success the file is flushed to disk and renamed to `path`.

    On any error the temporary file is removed and `path` stays as it was. The temporary name keeps the suffix, by
    which writers (PyAV, safetensors) choose a format. Raises OSError as `writing` does.
    """
    path = as_path(path)
    if is_remote(path):
        with _uploaded(path) as temporary:
            yield temporary
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """The name under which this process writes `path` until it is whole; `remove_partial` knows it."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def _uploaded(path: Any) -> Iterator[Path]:
    """Yields a local file that is then uploaded to `path`."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        with writing(path):
            yield temporary
            copy_file(temporary, path)


def _make_folder(folder: Any) -> None:
    """Makes a remote folder, except on stores, which have none: there it would be a bucket that is not there."""
    if folder.protocol not in FILE_SYSTEMS:
        folder.fs.makedirs(folder.path, exist_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, local or remote, as a whole or not at all; inside a store without passing through this machine.

    Raises UserError naming what a store refuses, or does not do in some attempts; FileNotFoundError without a source.
    """
    one, other = cast(Any, source), cast(Any, target)

    def copy_inside() -> None:
        try:
            other.fs.cp_file(one.path, other.path)
        except FileNotFoundError:
            if one.fs.exists(one.path):
                raise
            raise FileNotFoundError(errno.ENOENT, "no such file", str(source)) from None

    if is_remote(target):
        _make_folder(other.parent)
    if is_remote(source) and is_remote(target) and one.fs == other.fs:
        retried(target, copy_inside)
    elif is_remote(target) and not is_remote(source):
        retried(target, lambda: other.fs.put_file(str(source), other.path))
    else:
        with atomic_path(target) as temporary:
            if is_remote(source):
                retried(source, lambda: one.fs.get_file(one.path, str(temporary)), "read")
            else:
                shutil.copyfile(source, temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write inside (above all a full disk) into an OSError that names the file or folder `path`.

    torch (RuntimeError), safetensors and tokenizers (plain Exception) each raise their own for the system's error.
    """
    try:
        yield
    except Exception as error:
        plain = type(error) is Exception or type(error).__name__ == "SafetensorError"
        if not plain and not isinstance(error, OSError | RuntimeError):
            raise
        raise OSError(
            f"{path}: could not be written ({_first_line(error)}); make room and run the command again"
        ) from error


@contextmanager
def errors_about(path: Path | str | None) -> Iterator[None]:
    """Puts the file or folder `path` before the message of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode())


def as_json(value: Any) -> str:
    """The text that `write_json` writes. Raises ValueError for NaN and infinity."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. Raises ValueError for NaN and infinity."""
    write_text(path, as_json(value))


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """Parses JSON. Raises ValueError or RecursionError, also for text that no file takes: half a surrogate pair.

    finite: also for NaN and numbers that no float holds (1e400), which Python reads and `write_json` refuses.
    """
    value = json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:20]} is no number of JSON")
    return value


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError naming it where it is absent, not JSON, or holds NaN or infinity."""
    path = as_path(path)
    with reading(path):
        content = retried(path, path.read_bytes, "read", ANSWERS) if is_remote(path) else path.read_bytes()
    # Besides malformed JSON: numbers of thousands of digits are a ValueError, thousands of brackets a RecursionError.
    try:
        value = parse_json(content, finite=True)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if content.count(b"[") + content.count(b"{") > DEEPEST and _deeper(value, DEEPEST):
        raise UserError(f"{path}: not valid here: JSON nested more than {DEEPEST} deep")
    return value


def read_object(path: Path, remedy: str, **keys: type) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    keys: those that it must have, with the type of the value.
    Raises UserError naming the file, ending with the remedy, where it is absent, no object, or damaged in a key.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, got {shown(value)}; {remedy}")
    for key, kind in keys.items():
        if type(value.get(key)) is not kind:
            found = f"is {shown(value[key])}" if key in value else "is missing"
            raise UserError(f"{path}: {key} {found}, expected {KINDS[kind]}; {remedy}")
    return value


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep."""
    level = [value]
    for _ in range(most):
        level = [
            item
            for group in level
            for item in (group.values() if isinstance(group, dict) else group)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def read_json_lines(path: Path, **keys: type) -> list[dict[str, Any]]:
    """Reads a file of one JSON object per line, [] without a file; a last line that a kill cut short is left out.

    keys: those that each must have, with the type of its value.
    Raises UserError naming the file and the line that is damaged.
    """
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_bytes().splitlines(keepends=True)
    values = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                value = parse_json(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is not JSON ({error}); correct it, or start anew") from None
            if not isinstance(value, dict) or not all(type(value.get(key)) is kind for key, kind in keys.items()):
                wanted = f" with {', '.join(keys)}" if keys else ""
                raise UserError(f"{path}: line {number} is no object{wanted}; correct it, or start anew")
            values.append(value)
    return values


def claim_output(
    out: Path,
    *,
    complete: bool,
    overwrite: bool = False,
    resume: bool = False,
    resumable: bool = True,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Makes the folder `out` ready to be written, by this process alone until its command ends (`locks_output`).

    A resumed run finds no partial file of a killed one, and on a store takes over its lock.
    complete: whether `out` holds the finished artifact. resumable: whether the command has --resume. inputs: folders
    that the command reads; `out` may be inside one of them, but neither be nor contain one.
    Raises UserError where another command writes `out`, where it cannot be written, and where it is not empty and
    neither `overwrite` nor `resume` is set.
    """
    out = as_path(out)
    for path in map(as_path, inputs):
        if is_remote(path) == is_remote(out) and path.resolve().is_relative_to(out.resolve()):
            raise UserError(f"{out}: is or contains {path}, which this command reads; give another --out")
    if isinstance(out, Path) and URL.match(str(out)):
        raise UserError(f"{out}: this is written to this machine's disk; give a folder, and copy it afterwards")
    if out.is_file():
        raise UserError(f"{out}: is a file; --out must name a folder")
    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other; give one")
    with ExitStack() as locks:
        if is_remote(out):
            _make_folder(out)
            locks.enter_context(locked_store(out, take_over=resume or overwrite))
            # Clients of stores remember listings.
            cast(Any, out).fs.invalidate_cache()
        else:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
            locks.enter_context(locked(out))
        contents = [out / name for name, _ in _listed(out, follow=True) if name != LOCK]
        if contents and overwrite:
            _remove(out, contents)
        elif contents and resume:
            remove_partial(out)
        elif contents:
            state = "already holds a finished result" if complete else "already exists and is not empty"
            go_on = "--resume to go on with it, --overwrite to start anew"
            remedy = go_on if resumable and not complete else "--overwrite to replace it"
            raise UserError(f"{out}: {state}; give another --out, or {remedy}")
        hold_to_the_end(locks)


def _remove(out: Path, contents: Sequence[Path]) -> None:
    """Removes what a locked folder holds. Raises UserError, and removes nothing, where another command writes in it."""
    if not is_remote(out):
        for lock in sorted(out.rglob(LOCK)):
            with locked(lock.parent):
                pass
    for path in contents:
        remove(path)


def remove_partial(folder: Path) -> None:
    """Removes the files that killed runs left half-written in a folder, except inside folders that are locked."""
    if is_remote(folder):
        return
    for parent, folders, names in os.walk(folder):
        if LOCK in names and Path(parent) != folder:
            folders.clear()
            continue
        for name in filter(PARTIAL.fullmatch, names):
            (Path(parent) / name).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes a file, or a folder with its contents, local or remote; nothing where there is none."""
    if is_remote(path):
        remote = cast(Any, path)

        def remove() -> None:
            # Also removed by an attempt whose answer was lost.
            with suppress(FileNotFoundError):
                remote.fs.rm(remote.path, recursive=True)

        retried(remote, remove, "removed")
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def whole_characters(text: str) -> str:
    """Returns a text that can be written to a file: halves of surrogate pairs, which no character is, are replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell them apart; the last parts where two are one path."""
    parts = [path.resolve().parts for path in paths]
    depths = range(1, max(map(len, parts)) + 1)
    names = [["/".join(each[-depth:]) for each in parts] for depth in depths]
    return next((each for each in names if len(set(each)) == len(each)), names[0])


def fingerprint(*paths: Path) -> str:
    """The first 16 hex digits of the SHA-256 of the contents of the files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with open_binary(as_path(path)) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
