"""Runs `lapa` commands as processes of their own, for `lapa demo` and `lapa study`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa.console import say
from lapa.errors import UserError

STDERR = 2


@dataclass(frozen=True)
class Stage:
    """One command. artifact: the file that it writes last; the stage is done where it exists."""

    title: str
    command: list[str]
    artifact: Path


def run_stage(stage: Stage, hold: Sequence[int] = ()) -> float:
    """Runs a stage to its end and returns its seconds.

    Ctrl-C reaches the stage too, and SIGTERM is passed on: the stage writes a checkpoint and exits, then
    KeyboardInterrupt is raised. hold: open files that the stage inherits, so that a lock on them lasts as long as the
    stage, even where the caller is killed. Raises UserError where the stage fails.
    """
    started = time.monotonic()
    # What a stage reports is progress of the whole, whose own results go to standard output.
    process = subprocess.Popen([sys.executable, "-m", "lapa", *stage.command], pass_fds=hold, stdout=STDERR)
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True
        say("stopping; the same command continues from here, with --resume where it has that option")
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"the stage {stage.title!r} failed (see above); fix it and run the same command again")
    return round(time.monotonic() - started, 1)
