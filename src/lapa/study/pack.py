"""Carries a study from a machine from which little can be carried: one stream of files, cut in small parts.

    lapa study pack STUDY --out PACK               # results alone
    lapa study pack STUDY --weights --out PACK     # and what was trained
    lapa study unpack PACK --out STUDY             # lapa.study.unpack

PACK holds part-000, part-001, ... (together a tar file) and index.json, written last: sizes and SHA-256 of the parts,
and what was left out and why. The same study gives the same bytes.

Weights are carried as bfloat16, except where something knows them by their fingerprint: latent action models, and the
parts of UniPi's planner.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

import tyro

from lapa.console import finish, say
from lapa.data.lerobot import INFO
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, naming, read_json, write_json
from lapa.study.bfloat import narrow, narrowed_size
from lapa.study.plan import ARTIFACTS
from lapa.study.results import FOLDER, SECONDS, SETTINGS

INDEX, FORMAT = "index.json", 1
RESULT_SUFFIXES = (".json", ".png")
# What a step writes last, by what it leaves; a folder of rollouts has a config.json from its beginning.
FINISHED = (INFO, "manifest.json", "results.json", "measure.json", "probe.json", "config.json")
BEGUN_ROLLOUTS = "episodes.jsonl"
TRAINING, CURVES = "training", "metrics.jsonl"
# Says in the tar file that a member is narrowed.
NARROWED = "LAPA.narrowed"
MIB = 1 << 20


@dataclass(frozen=True)
class PackConfig:
    """Pack a study's results, and with --weights what it trained, into files that are small enough to carry."""

    study: Annotated[Path, tyro.conf.Positional]
    """Folder of the study."""
    out: Path
    """Folder for the parts."""
    weights: bool = False
    """Also what the steps made: models, labels, measurements, rollouts."""
    datasets: bool = False
    """With --weights, also the datasets, which the study can render again."""
    full: bool = False
    """Weights as they are, instead of as bfloat16."""
    part_mib: float = 15.0
    """Size of a part in MiB, at most."""
    overwrite: bool = False
    """Replace what lies at --out."""


@dataclass(frozen=True)
class LeftOut:
    """Something of the study that is not in the pack."""

    path: str
    why: str
    bytes: int


class Parts:
    """A writable stream that becomes the files part-000, part-001, ... of at most `size` bytes; one is in memory."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.written: list[dict[str, Any]] = []
        self._waiting = bytearray()

    def write(self, block: bytes) -> int:
        self._waiting += block
        while len(self._waiting) >= self.size:
            self._write_part(bytes(self._waiting[: self.size]))
            del self._waiting[: self.size]
        return len(block)

    def finish(self) -> None:
        if self._waiting:
            self._write_part(bytes(self._waiting))
            self._waiting.clear()

    def _write_part(self, content: bytes) -> None:
        name = f"part-{len(self.written):03d}"
        with atomic_path(self.folder / name) as path:
            path.write_bytes(content)
        self.written.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})


class BlockReader:
    """Blocks of bytes as a readable stream; `read` gives as many as are asked for, or all that are left."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._waiting = blocks, bytearray()

    def read(self, size: int) -> bytes:
        while len(self._waiting) < size and (block := next(self._blocks, None)) is not None:
            self._waiting += block
        wanted = bytes(self._waiting[:size])
        del self._waiting[:size]
        return wanted


def run(config: PackConfig) -> None:
    """`lapa study pack`. UserError on bad input, before anything is written."""
    size = int(config.part_mib * MIB)
    if size < 1:
        raise UserError(f"--part-mib must be above 0, got {config.part_mib:g}")
    if config.datasets and not config.weights:
        raise UserError("--datasets: goes with --weights; give both")
    if not (config.study / FOLDER).is_dir() and not (config.study / ARTIFACTS).is_dir():
        raise UserError(f"{config.study}: no study (neither {FOLDER} nor {ARTIFACTS}); make one with `lapa study run`")
    for inner in (FOLDER, ARTIFACTS):
        if config.out.resolve().is_relative_to((config.study / inner).resolve()):
            raise UserError(f"{config.out}: lies in {config.study / inner}, which is packed; give another --out")
    paths, left_out = choose(config.study, weights=config.weights, datasets=config.datasets)
    if not paths:
        raise UserError(f"{config.study}: nothing to pack yet; {len(left_out)} things were left out (--weights?)")
    complete = (config.out / INDEX).exists()
    claim_output(config.out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=[config.study])
    parts = Parts(config.out, size)
    num_narrowed = write_tar(parts, config.study, paths, full=config.full)
    parts.finish()
    index = {
        "format": FORMAT,
        "files": len(paths),
        "narrowed": num_narrowed,
        "bytes": sum(part["bytes"] for part in parts.written),
        "parts": parts.written,
        "left_out": [vars(item) for item in left_out],
    }
    write_json(config.out / INDEX, index)
    say(f"{len(paths)} files, {index['bytes'] / MIB:.1f} MiB in {len(parts.written)} parts; {num_narrowed} as bfloat16")
    for item in left_out:
        say(f"left out: {item.path}, {item.bytes / MIB:.1f} MiB ({item.why})")
    finish("pack", config.out, [f"lapa study unpack {config.out} --out STUDY"])


def choose(study: Path, *, weights: bool, datasets: bool = False) -> tuple[list[Path], list[LeftOut]]:
    """The files to pack, relative to the study and sorted, and what is left out."""
    paths = [Path(name) for name in (SETTINGS, SECONDS) if (study / name).is_file()]
    left_out: list[LeftOut] = []
    for path in _files(study / FOLDER):
        if path.suffix in RESULT_SUFFIXES:
            paths.append(path.relative_to(study))
        else:
            left_out.append(_without(study, path, "neither JSON nor PNG"))
    folders = sorted(path for path in (study / ARTIFACTS).glob("*") if path.is_dir() and path.name[0] != ".")
    for folder in folders:
        if not weights:
            left_out.append(_without(study, folder, "given with --weights"))
        elif not is_finished(folder):
            left_out.append(_without(study, folder, "unfinished"))
        elif (folder / INFO).exists() and not datasets:
            left_out.append(_without(study, folder, "a dataset; given with --datasets"))
        else:
            paths += [path.relative_to(study) for path in _files(folder) if not _is_training(path, folder)]
            if (folder / TRAINING).is_dir():
                left_out.append(_without(study, folder / TRAINING, f"checkpoints; its {CURVES} is packed"))
    return sorted(paths, key=lambda path: path.as_posix()), left_out


def is_finished(artifact: Path) -> bool:
    """Whether the step that makes this folder has come to its end."""
    if (artifact / BEGUN_ROLLOUTS).exists():
        return (artifact / "results.json").exists()
    return any((artifact / name).exists() for name in FINISHED)


def write_tar(parts: Parts, study: Path, paths: list[Path], *, full: bool) -> int:
    """Writes the files as one tar stream, and returns how many were narrowed."""
    num_narrowed = 0
    with tarfile.open(mode="w|", fileobj=cast(IO[bytes], parts), format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            with (study / path).open("rb") as file:
                member = tarfile.TarInfo(path.as_posix())
                member.mode = 0o644
                member.size = os.fstat(file.fileno()).st_size
                content: Any = file
                if not full and path.suffix == ".safetensors" and not _is_fingerprinted(study / path):
                    with naming(study / path):
                        size = narrowed_size(file)
                    if size < member.size:
                        member.size, member.pax_headers = size, {NARROWED: "bfloat16"}
                        content, num_narrowed = BlockReader(narrow(file)), num_narrowed + 1
                tar.addfile(member, content)
    return num_narrowed


def _is_fingerprinted(weights: Path) -> bool:
    """Whether something else knows these weights by their fingerprint.

    So labels know a latent action model (its config.json has the key `model`), and UniPi's planner its parts.
    """
    # The second is for what lies in a folder inside: a vision tower, the planner's parts.
    found = [folder / "config.json" for folder in weights.parents[:2]]
    written = [read_json(path) for path in found if path.exists()]
    return any(isinstance(values, dict) and ("model" in values or values.get("kind") == "unipi") for values in written)


def _is_training(path: Path, artifact: Path) -> bool:
    inside = path.relative_to(artifact)
    return inside.parts[0] == TRAINING and inside != Path(TRAINING) / CURVES


def _files(folder: Path) -> list[Path]:
    """All files below a folder; hidden ones are what a run is writing now."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def _without(study: Path, path: Path, why: str) -> LeftOut:
    files = [path] if path.is_file() else _files(path)
    return LeftOut(path.relative_to(study).as_posix(), why, sum(file.stat().st_size for file in files))
