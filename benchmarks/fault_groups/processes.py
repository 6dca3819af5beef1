"""Runs commands and functions in forked processes, and judges how they end.

The campaign imports lapa with all that it needs once; a fork then starts in some hundredths of a second. Each process
is the leader of a group of its own, so that a kill reaches its workers, and has a bound on its memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lapa import cli

# MiB that a command on the campaign's small inputs may use above what the process has when it starts. A run of the
# debug preset uses up to 200.
MEMORY = 1024
# MiB of address space above that at the start, after which allocations fail: it protects the machine.
ADDRESS_SPACE = 3072
# Seconds after which a process is taken to hang, and is ended by SIGALRM.
PATIENCE = 90
ERROR = "lapa: error: "


class Fault(Exception):
    """What went wrong in a case, in one line."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    status: its exit status, or minus the signal that ended it. memory: its peak above that at the start, in MiB.
    answer: what the function returned, None for a command.
    """

    status: int
    output: str
    seconds: float
    memory: float
    answer: Any = None

    def refused(self) -> str | None:
        """The one line of a refusal; None where the command did what it was asked for. Raises Fault for other ends."""
        tail = " / ".join(self.output.strip().splitlines()[-2:])[-300:]
        if self.status < 0:
            raise Fault(f"ended by {signal.Signals(-self.status).name}: {tail}")
        if self.memory > MEMORY:
            raise Fault(f"took {self.memory:.0f} MiB")
        if "Traceback" in self.output or "terminate called" in self.output:
            raise Fault(f"traceback: {tail}")
        if odd := {c for c in self.output if unicodedata.category(c) == "Cc" and c not in "\n\t"}:
            raise Fault(f"prints control characters: {sorted(odd)}")
        if self.status == 0:
            return None
        lines = self.output.rstrip("\n").splitlines()
        start = next((number for number, line in enumerate(lines) if line.startswith(ERROR)), None)
        if self.status != 2 or start is None or start != len(lines) - 1:
            raise Fault(f"status {self.status}, and no single line of error: {tail}")
        return lines[start].removeprefix(ERROR)

    def require_done(self) -> None:
        """Raises Fault where the command was refused, or ended in another way."""
        if line := self.refused():
            raise Fault(f"refused: {line}")

    def require_refused(self, *words: str) -> str:
        """Returns the line of the refusal, which must hold each of the words. Raises Fault otherwise."""
        line = self.refused()
        if line is None:
            raise Fault("was accepted")
        if missing := [word for word in words if word.lower() not in line.lower()]:
            raise Fault(f"refused without the word {missing[0]!r}: {line}")
        return line


class Process:
    """A process that was started, or all of its group."""

    def __init__(self, pid: int, log: Path, answers: int) -> None:
        self.pid, self.log = pid, log
        self._answers, self._started = answers, time.monotonic()

    def kill(self) -> None:
        """Kills the process and its workers at once."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Waits for the end."""
        with os.fdopen(self._answers, "rb") as answers:
            base, _, answer = answers.read().partition(b"\n")
        _, status, usage = os.wait4(self.pid, 0)
        seconds = time.monotonic() - self._started
        output = self.log.read_text(errors="backslashreplace")
        memory = usage.ru_maxrss / 1024 - float(base) if base else 0.0
        value = json.loads(answer) if answer else None
        return Ended(os.waitstatus_to_exitcode(status), output, seconds, memory, value)


def start(function: Callable[[], Any], folder: Path, *, address_space: int = ADDRESS_SPACE) -> Process:
    """Starts a function, whose return value is JSON, in `folder`; its output goes to a file there.

    address_space: MiB above the present that the process may map.
    """
    log = folder / f".log-{time.monotonic_ns()}"
    log.touch()
    answers, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        os.close(theirs)
        return Process(pid, log, answers)
    status = 1
    try:
        os.setsid()
        signal.alarm(PATIENCE)
        os.close(answers)
        os.write(theirs, b"%f\n" % _resident())
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(output, stream)
        # A caller may have put something else in their place, as pytest does.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1) for stream in (1, 2))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + (address_space << 20), hard))
        status = _status_of(function, theirs)
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(status)
    raise AssertionError("unreachable")


def lapa(*words: object, folder: Path, **options: Any) -> Ended:
    """Runs a command in `folder`, and waits for its end."""
    return start_lapa(*words, folder=folder, **options).wait()


def start_lapa(*words: object, folder: Path, **options: Any) -> Process:
    """Starts a command in `folder`."""
    return start(lambda: cli.main([str(word) for word in words]), folder, **options)


def ask(function: Callable[[], Any], folder: Path, **options: Any) -> Ended:
    """Runs a function in the place of a command, whose mistakes and lacks are shown as those of one."""
    return start(partial(_as_command, function), folder, **options).wait()


def _as_command(function: Callable[[], Any]) -> Any:
    answers: list[Any] = []

    def dispatch(arguments: list[str]) -> int:
        answers.append(function())
        return 0

    # In this forked process alone.
    cli._dispatch = dispatch
    try:
        cli.main([])
    except SystemExit as end:
        if end.code:
            raise
    return answers[0]


def _status_of(function: Callable[[], Any], answers: int) -> int:
    try:
        os.write(answers, json.dumps(function()).encode())
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _exit(status: int) -> None:
    """Ends this process as the interpreter does: threads are waited for, then destructors of C++ run."""
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(status)


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)
