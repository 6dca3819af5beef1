"""Completion of commands, options and their values in a shell.

lapa completion bash                # prints the script
lapa completion zsh --install       # writes it to where zsh looks for it

`lapa --install-completion` does the latter for your shell. Completed are commands, also after `help`, options, and
values that are chosen from a list. The script is tyro's. It holds all names and does not start `lapa`.
"""

from __future__ import annotations

import ast
import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro

from lapa import cli
from lapa.console import finish, say
from lapa.errors import printable
from lapa.files import write_text

# Of the script: before the names in it, as a literal of Python.
NAMES = "COMPLETION_SPEC = "
# Where a shell looks for the script, and what it needs to look there.
PLACES = {"bash": "~/.local/share/bash-completion/completions/lapa", "zsh": "~/.zfunc/_lapa"}
NEEDS = {
    "bash": "bash reads it with the package bash-completion, and without that after: source {path}",
    "zsh": "zsh reads it if ~/.zshrc has the line: fpath+={folder}; autoload -Uz compinit; compinit",
}


@dataclass(frozen=True)
class CompletionConfig:
    """Prints the script that completes `lapa` in a shell."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell."""
    install: bool = False
    """Write the script to where the shell looks for it, instead of printing it."""


def run(config: CompletionConfig) -> None:
    """`lapa completion`."""
    if not config.install:
        print(script(config.shell), end="")
        return
    path = Path(PLACES[config.shell]).expanduser()
    write_text(path, script(config.shell))
    finish(f"completion for {config.shell}", path)
    say(NEEDS[config.shell].format(path=path, folder=path.parent))


def script(shell: str) -> str:
    """The script for a shell."""
    members = tuple(map(_member, cli.all_verbs()))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(Union[members], args=["--tyro-print-completion", shell], prog="lapa")  # type: ignore[call-overload]  # noqa: UP007
    lines = printed.getvalue().split("\n")
    return "\n".join(_nested(line) if line.startswith(NAMES) else line for line in lines)


def _member(verb: cli.Verb) -> Any:
    default = cli.preset(verb, cli.PRESET)
    start = {} if default is None else {"default": default}
    return Annotated[cli.imported(verb.config), tyro.conf.subcommand(name=verb.name, **start)]


def _nested(line: str) -> str:
    """The line of the names, in which `data videos` is one: as `videos` below `data`, and all of them below `help`."""
    names = ast.literal_eval(line.removeprefix(NAMES))
    found = names.pop("subcommands")
    names["subcommands"] = {"help": _group("shows the commands, or the options of one")}
    for verb in cli.all_verbs():
        options = {**found[verb.name], "description": printable(verb.help)}
        *groups, last = verb.name.split()
        for root, command in ((names, options), (names["subcommands"]["help"], _group(printable(verb.help)))):
            for group in groups:
                root = root["subcommands"].setdefault(group, _group(f"`lapa help {group}` lists its commands"))
            root["subcommands"][last] = command
    # A description of several lines would complete to its words.
    return f"{NAMES}{names!r}".replace("\\n", " ")


def _group(description: str) -> dict[str, Any]:
    """A word without options."""
    return {"description": description, "options": [], "subcommands": {}, "frontier_groups": []}
