"""Worker processes for jobs that are independent of each other and whose results are wanted in order.

with Workers(os.cpu_count()) as workers:
    for result in workers.in_order(function, [(argument, another), ...]):
        ...
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lapa.errors import UserError

Result = TypeVar("Result")

# Jobs handed out and not yet fetched, for each worker: what is done early waits in the parent's memory.
AHEAD = 3
# Seconds between looks for the parent.
WATCH_INTERVAL = 1.0


class Workers:
    """A pool of processes; left early (an error, Ctrl-C), what has not begun is not done.

    A worker leaves Ctrl-C to its parent, and ends soon after the parent has, however that came about.
    """

    def __init__(
        self,
        num: int,
        shared: tuple[Any, ...] = (),
        *,
        threads: bool = False,
        ahead: int | None = None,
        mend: str = "go on with --resume and fewer --workers",
    ):
        """num: processes, or threads of this one; 0 does the work when it is asked for.

        shared: arguments before each job's, sent to a process once. ahead: jobs handed out and not yet fetched, by
        default a few for each worker. mend: what to say where a worker was killed.
        """
        self.num, self._shared, self._mend = num, shared, mend
        self.ahead = num * AHEAD if ahead is None else ahead
        self._executor: Executor | None = None
        if num and threads:
            self._executor = ThreadPoolExecutor(num, initializer=_share, initargs=(shared,))
        elif num:
            self._executor = _processes(num, shared)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """The results of `function(*shared, *job)` in the order of the jobs, which are taken a few at a time.

        Raises what `function` raises; UserError where a worker was killed.
        """
        if self._executor is None:
            yield from (function(*self._shared, *job) for job in jobs)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(self._executor.submit(_call, function, job))
                if len(waiting) >= self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(f"a worker process was killed, most likely for lack of memory; {self._mend}") from None
        finally:
            # Left early, so that no job still works on what its result was to lie in.
            wait([future for future in waiting if not future.cancel()])


def _processes(num: int, shared: tuple[Any, ...]) -> ProcessPoolExecutor:
    # Spawned, not forked: the parent may hold threads of PyAV or torch, and OpenGL contexts do not survive a fork.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num, context, initializer=_settle_down, initargs=(os.getpid(), shared))


# What the parent shares with this worker, a process or a thread.
_own = threading.local()


def _call(function: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    return function(*_own.shared, *job)


def _share(shared: tuple[Any, ...]) -> None:
    _own.shared = shared


def _settle_down(parent: int, shared: tuple[Any, ...]) -> None:
    _share(shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_INTERVAL)
    os._exit(1)
