"""Console output: results on standard output; messages, progress and the last lines of a command on standard error.

A long loop shows a bar in a terminal. Elsewhere, as under nohup or Slurm, it writes a line every half minute:

2026-11-29 09:40:00  latent action model  400/1600 (25%), loss 0.0131, 120 samples/s, 0:01:46 elapsed, 0:05:18 left
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from lapa.errors import printable

# Before a command to run next.
NEXT = "  next: "
# Between two lines of a loop where there is no terminal.
LINE_SECONDS = 30.0
# Of the last steps, over which the speed is taken.
SPEED_SECONDS = 300.0
# Jobs that wait for threads.
AT_ONCE = 512
Job = TypeVar("Job")
Result = TypeVar("Result")


def is_main_process() -> bool:
    """Whether this process prints and writes for the run: rank 0 under torchrun, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


class PlainConsole(Console):
    """A console for texts of other people's files: nothing in them is markup or reaches the terminal's controls."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text="\n".join(map(printable, segment.text.split("\n"))))


console = PlainConsole(stderr=True, quiet=not is_main_process(), highlight=False, markup=False, emoji=False)
output = PlainConsole(quiet=not is_main_process(), highlight=False, markup=False, emoji=False)


def print_results(figures: Mapping[str, Any], *shown: RenderableType, as_json: bool) -> None:
    """Prints what a command found to standard output: tables and lines, or the figures as one JSON object.

    shown: tables, and texts that are printed as a line each. Raises ValueError for NaN and infinity in JSON.
    """
    if as_json:
        output.print(json.dumps(figures, allow_nan=False), soft_wrap=True)
        return
    for part in shown:
        output.print(printable(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))


def say(message: str) -> None:
    """Prints one line of text."""
    console.print(printable(message), soft_wrap=True)


def warn(message: str) -> None:
    """Prints one line as a warning."""
    console.print(Text.assemble(("warning:", "yellow"), f" {printable(message)}"), soft_wrap=True)


def progress() -> Progress:
    """A progress display in the project's style; use as a context manager and `add_task(description, total=n)`.

    A task may carry `note` (task.fields), shown at the end of its line: `progress.update(task, note="loss 0.1")`.
    """
    if not console.is_interactive:
        return ProgressLines(disable=True, speed_estimate_period=SPEED_SECONDS)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24 if console.width >= 100 else 8),
        MofNCompleteColumn(),
        TimesColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
        console=console,
        refresh_per_second=2,
        speed_estimate_period=SPEED_SECONDS,
        disable=not is_main_process(),
    )


def in_threads(
    function: Callable[[Job], Result], jobs: Sequence[Job], description: str, threads: int | None = None
) -> list[Result]:
    """Returns the results in order, with progress. PyAV and Pillow release the interpreter lock while they work.

    threads: by default as many as the machine has CPUs.
    """
    results = []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool, progress() as bar:
        task = bar.add_task(description, total=len(jobs), note="")
        # Few at a time: what is queued takes memory, and delays Ctrl-C.
        for start in range(0, len(jobs), AT_ONCE):
            for result in pool.map(function, jobs[start : start + AT_ONCE]):
                results.append(result)
                bar.advance(task)
    return results


class TimesColumn(ProgressColumn):
    """The time since a task began, and an estimate of the time to its end."""

    def render(self, task: Task) -> Text:
        return Text(times_of(task), style="cyan")


class ProgressLines(Progress):
    """Progress as lines of a log: one every LINE_SECONDS, and one where the display ends or a task does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._written: dict[TaskID, tuple[float, float]] = {}

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        number = super().add_task(description, *args, **options)
        self._written[number] = time.monotonic(), -1.0
        return number

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._write(task_id, LINE_SECONDS)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._write(task_id, LINE_SECONDS)

    def stop(self) -> None:
        super().stop()
        for number in self.task_ids:
            self._write(number, 0.0)

    def _write(self, number: TaskID, pause: float) -> None:
        """Writes the line of a task that has ended, or of which there is news since the line of `pause` seconds ago."""
        task, (seconds, completed) = self._tasks[number], self._written[number]
        due = task.finished or time.monotonic() - seconds >= pause
        if due and task.completed != completed:
            self._written[number] = time.monotonic(), task.completed
            say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line_of(task)}")


def line_of(task: Task) -> str:
    """A task as one line: how much of it is done, its note, and its times."""
    total = f"/{task.total:.0f} ({task.percentage:.0f}%)" if task.total is not None else ""
    parts = [f"{task.description}  {task.completed:.0f}{total}", task.fields.get("note"), times_of(task)]
    return ", ".join(filter(None, parts))


def times_of(task: Task) -> str:
    """Returns "0:01:46 elapsed, 0:05:18 left"; the second from the task's own speed, where that is known."""
    elapsed = task.finished_time if task.finished else task.elapsed
    shown = [f"{timedelta(seconds=int(elapsed or 0))} elapsed"]
    if not task.finished and task.time_remaining is not None:
        shown.append(f"{timedelta(seconds=int(task.time_remaining))} left")
    return ", ".join(shown)


def finish(wrote: str, path: object, next_commands: Sequence[str] = ()) -> None:
    """Prints the artifact that a command wrote, and the commands to run next."""
    what, where = f" {printable(wrote)}: ", printable(path)
    console.print(Text.assemble(("wrote", "green"), what, (where, "bold")), soft_wrap=True)
    for command in next_commands:
        console.print(f"{NEXT}{printable(command)}", soft_wrap=True)
