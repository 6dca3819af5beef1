"""Runs `lapa` commands as processes of their own, two at once, for `lapa demo` and `lapa study`."""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lapa.console import NEXT, say, warn
from lapa.errors import UserError

# Stages that run at once, each with one thread, which on a CPU is much faster than one stage with two.
AT_ONCE = min(2, os.cpu_count() or 1)
# Between two looks at the running stages.
PAUSE = 0.1
# The variable by which a stage knows what to record of itself where the program that began it is gone.
ORPHAN = "LAPA_STAGE"


@dataclass(frozen=True)
class Stage:
    """One command.

    artifact: the file that it writes last; the stage is done where it exists. log: the file for all that it prints.
    needs: artifacts of other stages, without which it cannot begin. lock: a file that is locked while it runs, against
    other programs with the same stages. spent: the file of JSON lines to which each attempt adds one: what `note`
    returns as it begins, its seconds, the CPU seconds of it and its processes, and whether it failed; one that is
    stopped has not.
    """

    title: str
    command: Sequence[str]
    artifact: Path
    log: Path
    needs: Sequence[Path] = ()
    lock: Path | None = None
    spent: Path | None = None
    note: Callable[[], Mapping[str, Any]] = dict


# Called when the command of a stage has ended and what it spent is recorded.
Ended = Callable[[Stage], None]


def run_stages(stages: Sequence[Stage], ended: Ended = lambda stage: None, at_once: int = AT_ONCE) -> None:
    """Runs the stages that are not done, `at_once` side by side, those that come first in the list first.

    What a stage prints goes to its log and, line by line behind its title, to the console.
    Ctrl-C, SIGTERM and SIGHUP are passed on: the running stages write checkpoints and exit, and then KeyboardInterrupt
    is raised. Raises UserError where a stage fails or leaves no artifact, after the others have stopped in the same
    way, and what `ended` raises, too.
    """
    waiting, running = [stage for stage in stages if not stage.artifact.exists()], list[_Running]()
    contended: set[str] = set()
    failed: Stage | None = None
    passed_on = 0
    with _signals() as stopping, ExitStack() as if_interrupted:
        # An error of `ended` leaves nothing running.
        if_interrupted.callback(_stop, running)
        while running or (waiting and not stopping):
            for number in stopping[passed_on:]:
                passed_on += 1
                say("stopping; the same command continues from here, with --resume where it has that option")
                for process in running:
                    process.send(number)
            ready = [stage for stage in waiting if all(each.exists() for each in stage.needs)]
            if not ready and not running:
                raise UserError(f"the stage {waiting[0].title!r} lacks what it needs: {waiting[0].needs}; run it again")
            for stage in ready[:0] if stopping else ready:
                if len(running) == at_once:
                    break
                if (lock := _take(stage)) is None:
                    if stage.title not in contended:
                        say(f"waiting for {stage.title}, which another run is making")
                        contended.add(stage.title)
                    continue
                waiting.remove(stage)
                if stage.artifact.exists():
                    lock.close()
                else:
                    running.append(_Running(stage, lock, threads=1 if at_once > 1 else None))
            for process in list(running):
                if (status := process.poll()) is None:
                    continue
                running.remove(process)
                fails = not stopping and (status != 0 or not process.stage.artifact.exists())
                process.close(failed=fails)
                ended(process.stage)
                if fails:
                    failed = process.stage
                    stopping.append(signal.SIGTERM)
            time.sleep(PAUSE)
    if failed is not None:
        fix = f"see above, and {failed.log}; fix it and run the same command again"
        raise UserError(f"the stage {failed.title!r} failed: {fix}")
    if stopping:
        raise KeyboardInterrupt


def require_idle(stages: Sequence[Stage]) -> None:
    """Raises UserError where a stage is still running, as after its program was killed."""
    for stage in stages:
        if stage.lock is not None and stage.lock.exists():
            if (lock := _take(stage)) is None:
                raise UserError(f"{stage.artifact.parent}: the stage {stage.title!r} still runs; wait for its end")
            lock.close()


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines of JSON behind the last whole line, also where several programs write at once."""
    with path.open("a+b") as file:
        _lock(file, fcntl.LOCK_EX)
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def record_where_orphaned() -> None:
    """In the process of a stage: what it spent is recorded at its end where the program that began it is gone."""
    known, begun, process = json.loads(os.environ.pop(ORPHAN)), time.monotonic(), os.getpid()

    def record() -> None:
        if os.getpid() == process and os.getppid() != known["parent"]:
            seconds, cpu, failed = time.monotonic() - begun, sum(os.times()[:4]), not Path(known["artifact"]).exists()
            append_lines(Path(known["spent"]), [_row(known["note"], seconds, cpu, failed)])

    atexit.register(record)


def _row(note: Mapping[str, Any], seconds: float, cpu_seconds: float, failed: bool) -> dict[str, Any]:
    return {**note, "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "failed": failed}


class _Running:
    """A stage's process, and how far its log has been shown."""

    def __init__(self, stage: Stage, lock: IO[bytes], threads: int | None) -> None:
        self.stage, self._lock, self._note = stage, lock, stage.note()
        self._status: int | None = None
        self._begun, self._seconds, self._cpu_seconds = time.monotonic(), 0.0, 0.0
        say(f"{stage.title}: $ lapa {' '.join(stage.command)}")
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        if stage.spent is not None:
            paths = {"spent": str(stage.spent.resolve()), "artifact": str(stage.artifact.resolve())}
            environment[ORPHAN] = json.dumps({"parent": os.getpid(), **paths, "note": self._note})
        with stage.log.open("ab") as written:
            # The stage inherits the lock, which lasts as long as it does, even where this program is killed. In a
            # process group of its own it gets no signal but those that are passed on.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lapa", *stage.command], stdin=subprocess.DEVNULL, stdout=written,
                stderr=subprocess.STDOUT, env=environment, pass_fds=(lock.fileno(),), process_group=0,
            )  # fmt: skip
            self._log = stage.log.open("rb")
            self._log.seek(written.tell())

    def poll(self, wait: bool = False) -> int | None:
        """Shows what the stage has printed, and returns its exit status where it has ended."""
        status = self._ended(0 if wait else os.WNOHANG)
        while (line := self._log.readline()) and (line.endswith(b"\n") or status is not None):
            text = line.decode(errors="replace").rstrip()
            # What a user of the single command may run next, these stages do.
            if not text.startswith(NEXT):
                say(f"{self.stage.title}: {text}")
        if line:
            self._log.seek(-len(line), os.SEEK_CUR)
        return status

    def _ended(self, options: int) -> int | None:
        """Returns the exit status where the process has ended, whose CPU seconds only `wait4` returns."""
        if self._status is None:
            number, status, usage = os.wait4(self._process.pid, options)
            if number:
                self._status = self._process.returncode = os.waitstatus_to_exitcode(status)
                self._seconds, self._cpu_seconds = time.monotonic() - self._begun, usage.ru_utime + usage.ru_stime
        return self._status

    def close(self, *, failed: bool) -> None:
        """Records what the stage spent, and unlocks it; it has ended."""
        self._log.close()
        if self.stage.spent is not None:
            append_lines(self.stage.spent, [_row(self._note, self._seconds, self._cpu_seconds, failed)])
        self._lock.close()

    def send(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self._ended(os.WNOHANG) is None:
            os.kill(self._process.pid, number)


def _stop(running: Sequence[_Running]) -> None:
    for process in running:
        process.send(signal.SIGTERM)
    for process in running:
        process.poll(wait=True)
        process.close(failed=False)


def _take(stage: Stage) -> IO[bytes] | None:
    """Returns the stage's open lock file, locked; None where another program holds it."""
    if stage.lock is None:
        return Path(os.devnull).open("wb")
    stage.lock.parent.mkdir(parents=True, exist_ok=True)
    file = stage.lock.open("wb")
    if _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
        return file
    file.close()
    return None


def is_running(lock: Path) -> bool:
    """Whether a program holds the lock of a stage."""
    try:
        with lock.open("rb") as file:
            return not _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes], operation: int) -> bool:
    """Locks an open file until it is closed, with a warning where its file system has no locks.

    Returns False where another program holds it.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        warn(f"{file.name}: its file system has no locks ({error.strerror}); let no second program write there")
    return True


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list of the signals by which this program has been asked to stop.

    They are only noted here: a handler may run while a stage is being started, or in the middle of a line's printing.
    A SIGHUP that is ignored, as under nohup, stays so.
    """
    asked: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
