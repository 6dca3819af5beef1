"""Worker processes for independent jobs whose results are wanted in order.

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
from contextlib import contextmanager
from typing import Any, TypeVar

from lapa.errors import UserError

Result = TypeVar("Result")

# Jobs handed out and not yet fetched, for each worker: early results wait in the parent's memory.
AHEAD = 3
# Seconds between checks that the parent is alive.
WATCH_INTERVAL = 1.0


class Workers:
    """A pool of processes; where it is left early (an error, Ctrl-C), jobs that have not begun are cancelled.

    A worker ignores Ctrl-C, which its parent handles, and ends soon after its parent, however the parent ended.
    """

    def __init__(
        self,
        num: int,
        shared: tuple[Any, ...] = (),
        *,
        threads: bool = False,
        ahead: int | None = None,
        advice: str = "continue with --resume and fewer --workers",
    ):
        """num: processes, or threads of this one; 0: each job runs when its result is asked for.

        shared: arguments before each job's, sent to a process once. ahead: jobs handed out and not yet fetched, by
        default a few for each worker. advice: ends the error message where a worker was killed.
        """
        self.num, self._shared, self._advice = num, shared, advice
        self.ahead = num * AHEAD if ahead is None else ahead
        self._executor: Executor | None = None
        if num and threads:
            self._executor = ThreadPoolExecutor(num, initializer=_share, initargs=(shared,))
        elif num:
            # Spawned, not forked: the parent may hold threads of PyAV or torch, and OpenGL does not survive a fork.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(
                num, context, initializer=_start_process, initargs=(os.getpid(), shared)
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[..., Result], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        """Yields the results of `function(*shared, *job)` in the order of the jobs, which are taken a few at a time.

        Raises the errors of `function`, and UserError where a worker was killed.
        """
        if self._executor is None:
            yield from (function(*self._shared, *job) for job in jobs)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                with interrupts_held():
                    waiting.append(self._executor.submit(_call, function, job))
                if len(waiting) >= self.ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(f"a worker process was killed, most likely for lack of memory; {self._advice}") from None
        finally:
            # Where the iteration ends early, no job may still write into memory that the caller then frees.
            wait([future for future in waiting if not future.cancel()])


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Puts off Ctrl-C while a process is started, which never gets any: half-started, it would end in a traceback."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[Any] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Another thread takes a signal that this one blocks, and has it handled here.
    handler = signal.signal(signal.SIGINT, lambda *signalled: held.append(signalled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if held and callable(handler):
            handler(*held[0])


# The shared arguments of this worker, a process or a thread.
_own = threading.local()


def _call(function: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    return function(*_own.shared, *job)


def _share(shared: tuple[Any, ...]) -> None:
    _own.shared = shared


def _start_process(parent: int, shared: tuple[Any, ...]) -> None:
    _share(shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_INTERVAL)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
