"""What `lapa study pack` packed becomes a study again, or part of one that is there already.

    lapa study unpack PACK --out STUDY

Everything is checked before anything is written: the parts against index.json, names that would leave STUDY, results
that differ from those that are there. Artifacts that are there stay as they are; a new one appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import tyro

from lapa.console import finish, say, warn
from lapa.errors import UserError
from lapa.files import atomic_path, naming, read_json
from lapa.study.bfloat import BLOCK, widen
from lapa.study.pack import FORMAT, INDEX, NARROWED, BlockReader, is_finished
from lapa.study.plan import ARTIFACTS
from lapa.study.results import FOLDER, SECONDS, SETTINGS


@dataclass(frozen=True)
class UnpackConfig:
    """Unpack a study that `lapa study pack` packed, into a new folder or into a study of the same settings."""

    pack: Annotated[Path, tyro.conf.Positional]
    """Folder of the parts and index.json."""
    out: Path
    """Folder of the study."""


def run(config: UnpackConfig) -> None:
    """`lapa study unpack`. UserError on bad input, before anything is written."""
    if config.out.is_file():
        raise UserError(f"{config.out}: is a file; --out must name a folder")
    index = read_index(config.pack)
    here = {path.name for path in (config.out / ARTIFACTS).glob("*")}
    seen: set[str] = set()
    for member, file in members(config.pack, index, config.out):
        if member.name in seen:
            raise UserError(f"{config.pack}: holds {member.name} twice; pack the study again")
        seen.add(member.name)
        _check_against(config, member, file)
    if len(seen) != index["files"]:
        raise UserError(f"{config.pack}: holds {len(seen)} files, {INDEX} says {index['files']}; carry it again")
    num_written, made = _write(config, index, here)
    packed = {name.split("/")[1] for name in seen if name.startswith(f"{ARTIFACTS}/")}
    kept = sorted(packed & here)
    unfinished = [name for name in kept if not is_finished(config.out / ARTIFACTS / name)]
    say(f"{num_written} results and {len(made)} artifacts are new; {len(kept)} artifacts were there and stay")
    if unfinished:
        warn(f"unfinished in {config.out / ARTIFACTS}, remove them to take the packed ones: {', '.join(unfinished)}")
    finish("study", config.out, [f"lapa study report {config.out}"])


def read_index(pack: Path) -> dict[str, Any]:
    """What index.json says. UserError naming the parts that are missing or of another size."""
    if not (pack / INDEX).is_file():
        raise UserError(f"{pack}: no whole pack (no {INDEX}); make one with `lapa study pack STUDY --out {pack}`")
    index = read_json(pack / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{pack / INDEX}: not the index of a pack that this version reads (format {FORMAT})")
    wrong = []
    for part in index["parts"]:
        path = pack / part["name"]
        if not path.is_file():
            wrong.append(f"{part['name']} is missing")
        elif path.stat().st_size != part["bytes"]:
            wrong.append(f"{part['name']} has {path.stat().st_size} bytes instead of {part['bytes']}")
    if wrong:
        raise UserError(f"{pack}: {'; '.join(wrong)}; carry these files again")
    return index


def members(pack: Path, index: dict[str, Any], study: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The packed files with their contents, in the order of their names; each must be read before the next.

    Parts are verified as they are read. UserError naming a part that was changed, and a member that is no plain file
    or would lie elsewhere than among the study's own.
    """
    stream = cast(IO[bytes], BlockReader(_verified(pack, index)))
    try:
        with tarfile.open(mode="r|", fileobj=stream) as tar:
            for member in tar:
                parts = member.name.split("/")
                known = member.name in (SETTINGS, SECONDS) or (
                    (parts[0] == FOLDER and len(parts) > 1) or (parts[0] == ARTIFACTS and len(parts) > 2)
                )
                if not member.isfile() or not known or {"", ".", ".."} & set(parts):
                    raise UserError(f"{pack}: holds {member.name!r}, which is no file of a study; nothing was written")
                # tarfile's own filter, which Python 3.11.2 lacks, would look no closer.
                if not (study / member.name).resolve().is_relative_to(study.resolve()):
                    raise UserError(f"{pack}: {member.name!r} would be written outside {study}; nothing was written")
                file = tar.extractfile(member)
                assert file is not None, "it is a plain file"
                yield member, file
    except tarfile.TarError as error:
        raise UserError(f"{pack}: not a pack ({error}); pack the study again") from None


def _verified(pack: Path, index: dict[str, Any]) -> Iterator[bytes]:
    for part in index["parts"]:
        content = (pack / part["name"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise UserError(f"{pack / part['name']}: is not what was packed (its SHA-256 differs); carry it again")
        yield content


def _check_against(config: UnpackConfig, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    """UserError where the study has another file of this name, which is not to be merged or kept."""
    path = config.out / member.name
    if member.name == SECONDS or member.name.startswith(f"{ARTIFACTS}/") or not path.exists():
        return
    with path.open("rb") as there:
        same = path.stat().st_size == member.size and all(block == there.read(len(block)) for block in _blocks(file))
    if same:
        return
    if member.name == SETTINGS:
        raise UserError(f"{path}: belongs to a study of other settings than {config.pack}; give another --out")
    raise UserError(f"{path}: differs from the one in {config.pack}; remove the wrong one, or give another --out")


def _write(config: UnpackConfig, index: dict[str, Any], here: set[str]) -> tuple[int, set[str]]:
    """Writes what is new, and returns how many results and which artifacts that were."""
    num_written, made = 0, set()
    with _Artifacts(config.out / ARTIFACTS).open() as artifacts:
        for member, file in members(config.pack, index, config.out):
            path = config.out / member.name
            if member.name == SECONDS:
                _merge_lines(path, file.read())
            elif not member.name.startswith(f"{ARTIFACTS}/"):
                num_written += member.name != SETTINGS and not path.exists()
                if not path.exists():
                    with atomic_path(path) as temporary:
                        _copy(_blocks(file), temporary)
            elif (name := member.name.split("/")[1]) not in here:
                made.add(name)
                blocks = widen(file) if NARROWED in member.pax_headers else _blocks(file)
                with naming(config.pack / member.name):
                    _copy(blocks, artifacts.place(name) / "/".join(member.name.split("/")[2:]))
    return num_written, made


class _Artifacts:
    """Artifacts being written, one after another: each under another name until it is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name = ""

    @contextmanager
    def open(self) -> Iterator[_Artifacts]:
        """Ends the last one; removes what is unfinished after an error."""
        try:
            yield self
            self._end()
        finally:
            if self._name:
                shutil.rmtree(self._partial, ignore_errors=True)

    def place(self, name: str) -> Path:
        """Where the files of an artifact go now."""
        if name != self._name:
            self._end()
            self._name = name
            shutil.rmtree(self._partial, ignore_errors=True)
        return self._partial

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self._name}.partial"

    def _end(self) -> None:
        if self._name:
            self._partial.rename(self.folder / self._name)
            self._name = ""


def _copy(blocks: Iterator[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _merge_lines(path: Path, packed: bytes) -> None:
    """Adds the lines that are not there yet: packs of several slices bring the same ones again."""
    there = path.read_bytes().splitlines() if path.exists() else []
    new = Counter(packed.splitlines()) - Counter(there)
    if new:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in [*there, *new.elements()]))
