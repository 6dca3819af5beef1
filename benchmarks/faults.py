"""Tries faults on every command and artifact: kills, two writers, flipped bits, strangers' files, odd real data.

    python benchmarks/faults.py                    # all groups, about a quarter of an hour on two cores
    python benchmarks/faults.py --quick            # two minutes
    python benchmarks/faults.py --group flipped --seed 3

A case is held where the result is the right one (bit-identical to that of an undisturbed run), or the command refuses
in one line with status 2: without a traceback, in bounded memory, and with nothing written outside `--out`. Everything
else has failed; failed cases are listed below the table, and `--case NAME` runs those whose names hold NAME alone.
All inputs are made here, small; nothing is downloaded. Linux only.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

# Before torch is imported: cores are used by cases, and a fork must not find threads.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

GROUPS = {
    "kills": "interrupted:kills",
    "two writers": "interrupted:writers",
    "repeats under load": "interrupted:repeats",
    "options of a finished run": "interrupted:options",
    "flipped bits": "flips:flips",
    "strangers' files": "hostile:hostile",
    "odd real data": "real_data:real_data",
}


@dataclass(frozen=True)
class Config:
    """What to try."""

    group: tuple[str, ...] = ()
    """Groups, or beginnings of their names; by default all."""
    case: tuple[str, ...] = ()
    """Only cases whose names hold one of these."""
    quick: bool = False
    """Fewer cases of each kind."""
    seed: int = 0
    """Decides the moments of kills and the places of flipped bits."""
    jobs: int = 2
    """Cases at once."""
    folder: Path | None = None
    """Folder to work in; by default a new temporary folder. What failed is left there."""


@dataclass(frozen=True)
class Result:
    """A case that was tried. fault: what went wrong, "" where it held."""

    group: str
    case: str
    fault: str
    seconds: float


def main(config: Config) -> int:
    """Tries all cases and prints the table; returns the number of those that failed."""
    import_everything()
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="faults-", dir=config.folder)).resolve()
    os.environ.update(HOME=str(root / "home"), XDG_CACHE_HOME=str(root / "cache"))
    from fault_groups.made import make

    chosen = [name for name in GROUPS if not config.group or name.startswith(config.group)]
    if chosen != ["odd real data"]:
        make(root / "made")
    results = [result for group in chosen for result in tried(group, root, config)]
    print(table(results, chosen))
    failed = [result for result in results if result.fault]
    for result in failed:
        print(f"- {result.group}, {result.case} (seed {config.seed}): {result.fault}")
    print(f"\n{len(results)} cases, {time.monotonic() - started:.0f} s, seed {config.seed}")
    if not failed:
        shutil.rmtree(root)
    return len(failed)


def import_everything() -> None:
    """Imports what the commands use, which then costs a forked process nothing."""
    import torch

    from lapa import cli

    torch.set_num_threads(1)
    for verb in cli.VERBS:
        for name in (verb.config, verb.run):
            cli.imported(name)
    for name in ("safetensors.torch", "transformers", "tokenizers", "scipy.stats", "PIL.Image"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def tried(group: str, root: Path, config: Config) -> list[Result]:
    """Tries the cases of a group in several processes, each a share of them."""
    module, _, function = GROUPS[group].partition(":")
    cases = getattr(importlib.import_module(f"fault_groups.{module}"), function)(root / "made", config.quick)
    cases = [case for case in cases if not config.case or any(text in case.name for text in config.case)]
    jobs, ways = max(1, min(config.jobs, len(cases))), []
    for job in range(jobs):
        path = root / f"{group}-{job}.jsonl"
        ways.append((os.fork() or _share(group, cases[job::jobs], root / group.replace(" ", "-"), path, config), path))
    for pid, _ in ways:
        os.waitpid(pid, 0)
    found = [Result(**json.loads(line)) for _, path in ways for line in path.read_text().splitlines()]
    if len(found) != len(cases):
        raise SystemExit(f"{group}: {len(found)} of {len(cases)} cases ended; the campaign itself is at fault")
    failed = sum(bool(result.fault) for result in found)
    print(f"{group}: {len(found)} cases, {failed} failed", file=sys.stderr, flush=True)
    return found


def _share(group: str, cases: Sequence, folder: Path, path: Path, config: Config) -> int:
    """Runs cases one after another in this process, a fork, and ends it."""
    from fault_groups.processes import Fault

    try:
        with path.open("w", buffering=1) as lines:
            for case in cases:
                place = folder / case.name.replace("/", "-").replace(" ", "-")
                place.mkdir(parents=True)
                started, fault = time.monotonic(), ""
                try:
                    case.run(place, Random(zlib.crc32(f"{config.seed} {case.name}".encode())))
                except Fault as error:
                    fault = str(error)
                except Exception as error:
                    fault = f"the campaign could not judge: {type(error).__name__}: {error}"
                if not fault:
                    shutil.rmtree(place)
                result = Result(group, case.name, " ".join(fault.split()), time.monotonic() - started)
                lines.write(json.dumps(vars(result)) + "\n")
    finally:
        os._exit(0)
    raise AssertionError("unreachable")


def table(results: Sequence[Result], groups: Sequence[str]) -> str:
    """The table in Markdown."""
    rows = ["| group | tried | held | failed | s |", "|---|---|---|---|---|"]
    for name in groups:
        its = [result for result in results if result.group == name]
        failed = sum(bool(result.fault) for result in its)
        seconds = sum(result.seconds for result in its)
        rows.append(f"| {name} | {len(its)} | {len(its) - failed} | {failed} | {seconds:.0f} |")
    failed = sum(bool(result.fault) for result in results)
    rows.append(f"| all | {len(results)} | {len(results) - failed} | {failed} | |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    import tyro

    sys.exit(min(main(tyro.cli(Config)), 1))
