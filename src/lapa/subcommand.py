"""Runs `lapa` commands as processes of their own, two at once, for `lapa demo` and `lapa study`."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lapa.console import NEXT, say
from lapa.errors import UserError

# Stages that run at once, each with one thread, which on a CPU is much faster than one stage with two.
AT_ONCE = min(2, os.cpu_count() or 1)
# Between two looks at the running stages.
PAUSE = 0.1


@dataclass(frozen=True)
class Stage:
    """One command.

    artifact: the file that it writes last; the stage is done where it exists. log: the file for all that it prints.
    needs: artifacts of other stages, without which it cannot begin. lock: a file that is locked while it runs, against
    other programs with the same stages.
    """

    title: str
    command: Sequence[str]
    artifact: Path
    log: Path
    needs: Sequence[Path] = ()
    lock: Path | None = None


# Called with a stage, its seconds, and whether it failed, when its command has ended; one that is stopped has not.
Ended = Callable[[Stage, float, bool], None]


def run_stages(stages: Sequence[Stage], ended: Ended, at_once: int = AT_ONCE) -> None:
    """Runs the stages that are not done, `at_once` side by side, those that come first in the list first.

    What a stage prints goes to its log and, line by line behind its title, to the console.
    Ctrl-C reaches the running stages too, and SIGTERM is passed on: they write checkpoints and exit, and then
    KeyboardInterrupt is raised. Raises UserError where a stage fails or leaves no artifact, after the others have
    stopped in the same way.
    """
    waiting, running = [stage for stage in stages if not stage.artifact.exists()], list[_Running]()
    contended: set[str] = set()
    failed: Stage | None = None
    passed_on = 0
    with _signals() as stopping, ExitStack() as if_interrupted:
        # An error of `ended` leaves nothing running.
        if_interrupted.callback(_terminate, running)
        while running or (waiting and not stopping):
            if news := stopping[passed_on:]:
                passed_on += len(news)
                say("stopping; the same command continues from here, with --resume where it has that option")
                if signal.SIGTERM in news:
                    _terminate(running)
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
                ended(process.stage, process.seconds, fails)
                process.lock.close()
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


class _Running:
    """A stage's process, and how far its log has been shown."""

    def __init__(self, stage: Stage, lock: IO[str], threads: int | None) -> None:
        self.stage, self.lock = stage, lock
        self._begun = time.monotonic()
        say(f"{stage.title}: $ lapa {' '.join(stage.command)}")
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if threads is not None:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        with stage.log.open("ab") as written:
            # The stage inherits the lock, which lasts as long as it does, even where this program is killed.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lapa", *stage.command],
                stdout=written, stderr=subprocess.STDOUT, env=environment, pass_fds=(self.lock.fileno(),),
            )  # fmt: skip
            self._log = stage.log.open("rb")
            self._log.seek(written.tell())

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._begun, 1)

    def poll(self) -> int | None:
        """Shows what the stage has printed, and returns its exit status where it has ended."""
        status = self._process.poll()
        while (line := self._log.readline()) and (line.endswith(b"\n") or status is not None):
            text = line.decode(errors="replace").rstrip()
            # What a user of the single command may run next, these stages do.
            if not text.startswith(NEXT):
                say(f"{self.stage.title}: {text}")
        if line:
            self._log.seek(-len(line), os.SEEK_CUR)
        if status is not None:
            self._log.close()
        return status

    def terminate(self) -> None:
        self._process.terminate()


def _terminate(running: Sequence[_Running]) -> None:
    for process in running:
        process.terminate()


def _take(stage: Stage) -> IO[str] | None:
    """Returns the stage's open lock file, locked; None where another program holds it."""
    if stage.lock is not None:
        stage.lock.parent.mkdir(parents=True, exist_ok=True)
    file = Path(os.devnull if stage.lock is None else stage.lock).open("w")  # noqa: SIM115
    try:
        if stage.lock is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list of the signals by which this program has been asked to stop.

    They are only noted here: a handler may run while a stage is being started, or in the middle of a line's printing.
    """
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
