"""What the campaign works on: small artifacts of every kind, made by the commands themselves, and their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fault_groups.processes import Fault, ask, lapa

# Of the videos that are converted; no multiple of 64, as most are.
SIDE = 40
# Entries of JSON files that hold times, places or machines, or that differ between a run and its resume.
PASSING = frozenset(
    {
        "out", "resume", "overwrite", "workers", "stop_after", "seconds", "samples_per_s", "steps_per_s", "policy",
        "lam", "labels", "date", "time", "hardware", "versions",
    }
)  # fmt: skip
# Files whose contents are times, or the state of a run that is done.
UNCOMPARED = ("training/", "metrics.json")
# The checksums of an artifact's files, in the form of `sha256sum`.
SUMS = "SHA256SUMS"
# The file that the writer of an output locks; one that a kill left is free.
LOCK = ".lock"

STEPS = ("--preset", "debug", "--steps", 8, "--device", "cpu")
# The commands that write artifacts, by name; `{out}` and what they read are folders in the campaign's own.
COMMANDS: dict[str, tuple[object, ...]] = {
    "convert": ("data", "videos", "clips", "--captions", "captions.json", "--size", SIDE, "--workers", 1),
    "train": ("latent", "train", *STEPS, "--save-every-steps", 2, "--data", "videos"),
    "label": ("label", "--lam", "lam", "--data", "videos", "--shard-episodes", 2, "--decoders", 0, "--embeddings"),
    "pretrain": ("policy", "pretrain", *STEPS, "--save-every-steps", 2, "--data", "videos", "--labels", "labels"),
    "finetune": (
        "policy", "finetune", *STEPS, "--save-every-steps", 2, "--head", "chunk", "--data", "robot",
        "--policy", "latent_policy",
    ),
    "inverse": ("baseline", "inverse", *STEPS, "--save-every-steps", 2, "--data", "robot"),
    "pseudo-label": ("baseline", "pseudo-label", "--inverse", "inverse", "--data", "videos"),
    "hide-actions": ("data", "hide-actions", "robot"),
    "evaluate": (
        "evaluate", "policy", "--env", "synthetic", "--tasks", "left,right,up", "--episodes", 4, "--max-steps", 8,
        "--videos", 1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One try. run: takes an empty folder and a source of chance; raises Fault where the fault is not held off."""

    name: str
    run: Callable[[Path, Random], None]


def make(root: Path) -> None:
    """Writes what the commands read and what they make of it below `root`, each under the name in COMMANDS."""
    root.mkdir(parents=True, exist_ok=True)
    ask(lambda: write_clips(root / "clips", 6), root).require_done()
    (root / "captions.json").write_text(json.dumps({f"clip{n}.mp4": f"push the block {n}" for n in range(6)}))
    squares = ("data", "synthetic", "--episodes", 8, "--frames", 10, "--size", 32)
    lapa(*squares, "--out", "videos", folder=root).require_done()
    lapa(*squares, "--actions", "--seed", 1, "--out", "robot", folder=root).require_done()
    names = {"train": "lam", "label": "labels", "pretrain": "latent_policy", "finetune": "policy"}
    for name, words in COMMANDS.items():
        lapa(*words, "--out", names.get(name, name), folder=root).require_done()


def write_clips(folder: Path, number: int, frames: int = 12, side: int = SIDE) -> None:
    """Writes mp4 files of a block that moves over a ground of colours."""
    from lapa.data.video import encode_clip

    folder.mkdir(parents=True)
    for clip in range(number):
        encode_clip(folder / f"clip{clip}.mp4", [block(step, clip, side) for step in range(frames)], 10.0)


def block(step: int, clip: int = 0, side: int = SIDE) -> np.ndarray:
    """An image [side, side, 3] of a block that moves to the right, over a ground of colours."""
    down, right = np.mgrid[:side, :side]
    ground_HWC = np.stack([down * 4 % 200, right * 4 % 200, np.full_like(down, 30 * clip % 250)], -1)
    start = 2 + (2 * step + 5 * clip) % (side - 10)
    ground_HWC[8:16, start : start + 8] = (240, 200 - 20 * clip, 20)
    return ground_HWC.astype(np.uint8)


def contents(folder: Path) -> dict[str, str]:
    """Name -> hash of every file of an artifact: of a JSON file, of what does not pass with time and place."""
    if not folder.is_dir():
        raise Fault(f"{folder.name} is not there")
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(UNCOMPARED) and path.name not in (SUMS, LOCK):
            data = path.read_bytes()
            if path.suffix == ".json" and not name.startswith("processor/"):
                data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def require_same(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raises Fault with the first files that differ."""
    if odd := [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]:
        raise Fault(f"{len(odd)} files differ from those of an undisturbed run: {', '.join(odd[:3])}")


def require_tidy(folder: Path) -> None:
    """Raises Fault where files of an interrupted write are left, or the checksums are not those of the files."""
    if left := [path.name for path in folder.rglob("*") if "partial" in path.name or ".incoming" in path.name]:
        raise Fault(f"left behind: {', '.join(left[:3])}")
    for path in folder.rglob(SUMS):
        for digest, name in (line.split("  ", 1) for line in path.read_text().splitlines()):
            if hashlib.sha256((path.parent / name).read_bytes()).hexdigest() != digest:
                raise Fault(f"the checksum of {name} is not that of the file")


def snapshot(folder: Path, but: Iterable[str] = ()) -> dict[str, str]:
    """Name -> hash of everything in a folder, except below the folders `but`, and the campaign's own logs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith((".log-", *(f"{each}/" for each in but))) and name not in but:
            kind = "link" if path.is_symlink() else "folder" if path.is_dir() else path.read_bytes()
            found[name] = kind if isinstance(kind, str) else hashlib.sha256(kind).hexdigest()
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in PASSING}
    return [_lasting(item) for item in value] if isinstance(value, list) else value
