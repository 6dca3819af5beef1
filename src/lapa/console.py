"""Console output: messages, warnings, progress bars, and the last lines of every command."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def is_main_process() -> bool:
    """Whether this process prints and writes for the run: rank 0 under torchrun, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


console = Console(stderr=True, quiet=not is_main_process(), highlight=False)


def say(message: str) -> None:
    """Prints one line of plain text (square brackets are not markup)."""
    console.print(escape(message), soft_wrap=True)


def warn(message: str) -> None:
    """Prints one line as a warning."""
    console.print(f"[yellow]warning:[/] {escape(message)}", soft_wrap=True)


def progress() -> Progress:
    """A progress display in the project's style; use as a context manager and `add_task(description, total=n)`.

    A task may carry `note` (task.fields), shown at the end of its line: `progress.update(task, note="loss 0.1")`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        refresh_per_second=2,
        disable=not is_main_process(),
    )


def finish(wrote: str, path: object, next_commands: Sequence[str] = ()) -> None:
    """Prints the artifact that a command wrote, and the commands to run next."""
    console.print(f"[green]wrote[/] {escape(wrote)}: [bold]{escape(str(path))}[/]", soft_wrap=True)
    for command in next_commands:
        console.print(f"  next: {escape(command)}", soft_wrap=True)
