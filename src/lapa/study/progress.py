"""How far the runs of a study are: done, running, failed, stopped or not begun.

for run, state in progress([Path("runs/study")]).items():
    print(run.name, state.text)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapa import config as configs
from lapa.errors import UserError
from lapa.files import read_json, read_json_lines
from lapa.study.config import StudySizes
from lapa.study.plan import Plan, order, steps_of
from lapa.study.results import FOLDER, SECONDS, SETTINGS, Arm, RunKey, load_results
from lapa.subcommand import append_lines, is_running

# The runs that `lapa study run` was asked for.
WANTED = "runs.jsonl"


# From the furthest on.
KINDS = ("done", "running", "failed", "stopped", "waiting", "unknown")


@dataclass(frozen=True)
class State:
    """kind: one of KINDS. step: the title of the one at which it is."""

    kind: str
    step: str = ""
    num_done: int = 0
    num_steps: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Orders states, the furthest first."""
        return KINDS.index(self.kind), -self.num_done

    @property
    def text(self) -> str:
        if self.kind == "done":
            return "done"
        if self.kind == "unknown":
            return "no result; its steps are of another version"
        where = "not begun, next is" if self.kind == "waiting" else f"{self.kind} at"
        return f"{where} {self.step}, {self.num_done} of {self.num_steps} steps done"


def note_wanted(study: Path, runs: Sequence[RunKey]) -> None:
    """Notes that these runs were asked for."""
    known = wanted(study)
    append_lines(study / WANTED, [configs.to_dict(run) for run in runs if run not in known])


def wanted(study: Path) -> list[RunKey]:
    """The runs that were asked for, and those with a result, in the order of a report."""
    path = study / WANTED
    rows = read_json_lines(path, arm=str, setting=dict, seed=int)
    found = {configs.from_dict(RunKey, row, source=str(path)) for row in rows}
    if any((study / FOLDER).glob("*.json")):
        found |= {result.key for result in load_results([study])}
    return sorted(found, key=lambda run: run.place)


def sizes_in(study: Path) -> StudySizes | None:
    """The sizes of a study; None where its folder has results alone, or is of another version.

    Raises UserError for a damaged file.
    """
    path = study / SETTINGS
    if not path.exists():
        return None
    settings = read_json(path)
    if not isinstance(settings, dict) or not isinstance(settings.get("sizes"), dict):
        raise UserError(f"{path}: has no sizes of a study; restore it, or run the study again elsewhere")
    try:
        return configs.from_dict(StudySizes, settings["sizes"], source=str(path))
    except UserError:
        return None


def progress(studies: Sequence[Path]) -> dict[RunKey, State]:
    """The state of each run that was asked for; of several folders of one study, the furthest."""
    found: dict[RunKey, list[State]] = {}
    for study in studies:
        for run, state in _progress(study).items():
            found.setdefault(run, []).append(state)
    return {run: min(states, key=lambda state: state.place) for run, states in found.items()}


def _progress(study: Path) -> dict[RunKey, State]:
    sizes = sizes_in(study)
    rows = read_json_lines(study / SECONDS, key=str)
    failed = {row["key"]: row.get("failed", False) for row in rows}
    states = {}
    for run in wanted(study):
        if (study / FOLDER / f"{run.name}.json").exists():
            states[run] = State("done")
        elif sizes is None:
            states[run] = State("unknown")
        else:
            states[run] = _state(study, Plan(sizes, run.setting, run.seed), run.arm, failed)
    return states


def _state(study: Path, plan: Plan, arm: Arm, failed: dict[str, bool]) -> State:
    """The state of a run without a result. failed: of each step that was begun, whether its last attempt failed."""
    steps = list(order(*steps_of(plan, arm).values()))
    left = [step for step in steps if not step.done(study)]
    counts = (len(steps) - len(left), len(steps))
    for kind, those in (
        ("running", (step for step in left if is_running(step.lock(study)))),
        ("failed", (step for step in left if failed.get(step.key))),
        ("stopped", (step for step in left if step.key in failed)),
    ):
        if (at := next(those, None)) is not None:
            return State(kind, at.title, *counts)
    return State("waiting", left[0].title if left else "its result", *counts)
