"""Completion of commands, options and their values in a shell.

lapa completion bash > ~/.local/share/bash-completion/completions/lapa
lapa completion zsh > ~/.zfunc/_lapa

It completes commands, `help`, options, and values that are chosen from a list; after `help` nothing. The script is
tyro's. It holds all names and does not start `lapa`. For zsh, its folder must be in `fpath` before `compinit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, Union

import tyro

from lapa import cli


@dataclass(frozen=True)
class CompletionConfig:
    """Prints the script that completes `lapa` in a shell."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """The shell."""


@dataclass(frozen=True)
class HelpConfig:
    """Shows the commands, or the options of one."""

    command: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The command."""


def run(config: CompletionConfig) -> None:
    """`lapa completion`."""
    print(script(config.shell), end="")


def script(shell: str) -> str:
    """The script for a shell."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(_any_of(cli.all_verbs()), args=["--tyro-print-completion", shell], prog="lapa")
    # A description of several lines would complete to its words.
    lines = printed.getvalue().split("\n")
    return "\n".join(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC") else line for line in lines)


def _any_of(verbs: Sequence[cli.Verb]) -> Any:
    """The type of one of the verbs' configs; those of a group, such as `latent`, are in a type of their own."""
    members = []
    for group, those in groupby(sorted(verbs, key=lambda verb: verb.name), lambda verb: verb.name.split()[0]):
        own = list(those)
        if [verb.name for verb in own] == [group]:
            members.append(_member(own[0]))
            continue
        field = ("command", Annotated[_union(map(_member, own)), tyro.conf.arg(name="")])
        kind = dataclasses.make_dataclass(group.capitalize(), [field])
        members.append(Annotated[kind, tyro.conf.subcommand(name=group)])
    return _union([*members, Annotated[HelpConfig, tyro.conf.subcommand(name="help")]])


def _union(members: Iterable[Any]) -> Any:
    return Union[tuple(members)]  # noqa: UP007


def _member(verb: cli.Verb) -> Any:
    default = cli.preset(verb, cli.PRESET)
    start = {} if default is None else {"default": default}
    subcommand = tyro.conf.subcommand(name=verb.name.split()[-1], description=verb.help, **start)
    return Annotated[cli.imported(verb.config), subcommand]
