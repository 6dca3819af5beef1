"""Which environments there are, what each needs, and whether it works on this machine.

    lapa envs
    lapa envs metaworld

To know, each renders one image in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table

from lapa.config import ReportOptions
from lapa.console import print_results, progress
from lapa.envs import ENVIRONMENTS, EnvironmentKind, episode_seed, kind_of, make, names
from lapa.errors import UserError, place_and_reason

# A first image may take a minute where a driver compiles its shaders on a busy CPU.
LONGEST_SECONDS = 300
REPLY = "lapa envs: "


@dataclass(frozen=True)
class EnvsConfig(ReportOptions):
    """Lists environments, and tries them out."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """An environment, to list its tasks, cameras, actions and state."""


def run(config: EnvsConfig) -> None:
    """`lapa envs`: prints a table of all, or what one has. Raises UserError where that one does not work here."""
    if config.name:
        notes = try_out(config.name)
        _describe(config, kind_of(config.name), notes)
        return
    table = Table("environment", "tasks", "needs", "works here")
    found: dict[str, dict[str, Any]] = {}
    with progress() as bar:
        line = bar.add_task("environments", total=len(names()), note="")
        for name in names():
            bar.update(line, note=name)
            try:
                works, remark = True, "; ".join(f"{key}: {text}" for key, text in try_out(name).items())
            except UserError as error:
                works, remark = False, str(error)
            tasks, needs = _needs(name)
            found[name] = {"tasks": tasks, "needs": needs, "works": works, "remark": remark}
            table.add_row(name, tasks, needs, "yes" if works else "no")
            bar.advance(line)
    remarks = [f"{name}: {row['remark']}" for name, row in found.items() if row["remark"]]
    print_results({"environments": found}, table, *remarks, as_json=config.json)


def try_out(name: str) -> Mapping[str, str]:
    """Renders one image of an environment in a process of its own, and returns its notes.

    Raises UserError, with the reason and where it is known the fix, where it does not.
    """
    command = [sys.executable, "-c", f"from lapa.envs.listing import report; report({name!r})"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{name}: no image within {LONGEST_SECONDS} seconds") from None
    replies = [line.removeprefix(REPLY) for line in ran.stdout.splitlines() if line.startswith(REPLY)]
    if not replies:
        lines = ran.stderr.strip().splitlines()
        reason = f"its process ended with status {ran.returncode}"
        raise UserError(f"{name}: {reason} ({lines[-1]})" if lines else f"{name}: {reason}")
    reply = json.loads(replies[-1])
    if "problem" in reply:
        raise UserError(reply["problem"])
    return reply


def report(name: str) -> None:
    """Makes the first task of an environment, renders it, and prints its notes, or the problem, for `try_out`."""
    reply: dict[str, str]
    try:
        reply = dict(_render(name))
    except UserError as error:
        reply = {"problem": str(error)}
    except Exception as error:
        reply = {"problem": f"{name}: {place_and_reason(error)}"}
    print(f"\n{REPLY}{json.dumps(reply)}")


def _render(name: str) -> Mapping[str, str]:
    kind = kind_of(name)
    notes = kind.check_machine()
    task = next(iter(kind.parse_tasks("all")))
    environment = make(name, task)
    environment.reset(episode_seed(0, "evaluation", task, 0), 0)
    image = environment.observe().images[kind.cameras[0]]
    environment.close()
    if image.std() == 0:
        raise UserError(f"{name}: its image is blank; check the graphics driver")
    return notes


def _needs(name: str) -> tuple[str, str]:
    """Returns the number of an environment's tasks, where it is known without its packages, and what it needs."""
    try:
        kind = kind_of(name)
        packages = f"lapa-vla[{kind.extra}]" if kind.extra else ", ".join(kind.packages)
        needs = ", ".join(filter(None, (packages, kind.also_needs))) or "nothing"
    # Whatever another distribution raises: `try_out` has returned it as the reason.
    except Exception:
        return "?", "?"
    try:
        return str(len(kind.parse_tasks("all"))), needs
    except Exception:
        return "?", needs


def _describe(config: EnvsConfig, kind: EnvironmentKind, notes: Mapping[str, Any]) -> None:
    table = Table("suite", "task", "steps", "initial states", "expert")
    for suite, tasks in kind.suites().items():
        table.add_section()
        for number, task in enumerate(tasks):
            states, expert = str(task.initial_states or "any"), "yes" if task.expert else "no"
            table.add_row("" if number else suite, task.name, str(task.max_steps), states, expert)
    others = {
        "cameras": ", ".join(kind.known_cameras),
        "default": f"{', '.join(kind.cameras)}, {kind.size} pixels",
        "actions": ", ".join(kind.action_names),
        "state": ", ".join(kind.state_names),
        "rate": f"{kind.fps:g} Hz",
        **notes,
    }
    source = "" if config.name in ENVIRONMENTS else " (of another distribution)"
    lines = [*(f"{key}: {text}" for key, text in others.items()), f"{config.name}{source} works on this machine"]
    suites = {
        suite: [{"task": task.name, "steps": task.max_steps, "expert": task.expert} for task in tasks]
        for suite, tasks in kind.suites().items()
    }
    print_results({"environment": config.name, "suites": suites, **others}, table, *lines, as_json=config.json)
