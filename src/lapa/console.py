"""Console output: messages, warnings, progress bars, and the last lines of every command."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from lapa.errors import printable


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


console = PlainConsole(stderr=True, quiet=not is_main_process(), highlight=False, markup=False)


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
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        refresh_per_second=2,
        disable=not is_main_process(),
    )


def finish(wrote: str, path: object, next_commands: Sequence[str] = ()) -> None:
    """Prints the artifact that a command wrote, and the commands to run next."""
    what, where = f" {printable(wrote)}: ", printable(path)
    console.print(Text.assemble(("wrote", "green"), what, (where, "bold")), soft_wrap=True)
    for command in next_commands:
        console.print(f"  next: {printable(command)}", soft_wrap=True)
