"""One command of several: what `lapa demo` and `lapa study` are made of."""

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

# What a stage has, to write its checkpoint, once it is told to stop.
GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Stage:
    """One command. `artifact` is the file that it writes last: where it is, the stage is done."""

    title: str
    command: list[str]
    artifact: Path


class OutOfTimeError(Exception):
    """A stage was stopped because its time was up; run again, it goes on."""


def run_stage(stage: Stage, seconds: float | None = None, hold: Sequence[int] = ()) -> float:
    """Runs a stage to its end and returns its seconds.

    Ctrl-C reaches the stage too, and SIGTERM is passed on: it checkpoints and leaves, and then so does the caller, by
    KeyboardInterrupt. seconds: the same after so many seconds, by OutOfTimeError. hold: open files that the stage holds
    too, so that a lock on them outlives a caller that is killed. UserError where the stage fails.
    """
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lapa", *stage.command], pass_fds=hold)
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        stopping = True
        say("stopping; the same command goes on from here, with --resume where it has that option")
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    out_of_time = False
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        out_of_time = True
        process.terminate()
        status = _leave(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopping:
        raise KeyboardInterrupt
    if out_of_time and not stage.artifact.exists():
        raise OutOfTimeError(stage.title)
    if status and not out_of_time:
        raise UserError(f"the stage {stage.title!r} failed (see above); mend it and run the same command again")
    return round(time.monotonic() - started, 1)


def _leave(process: subprocess.Popen[bytes]) -> int:
    """Waits for a stage that was told to stop; one that does not is killed."""
    try:
        return process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
