"""Simulators that a policy is rolled out in: their common interface, and the table that finds them by name.

    lapa envs
    lapa evaluate POLICY --env metaworld --tasks mt10 --out RESULTS
    lapa evaluate random --env synthetic --tasks all --out RESULTS

A new simulator is a class with the methods of `Environment` and an `EnvironmentKind` that describes it: an entry in
ENVIRONMENTS, or in another distribution an entry point of the group `lapa.environments`:

    [project.entry-points."lapa.environments"]
    my-robot = "my_package.simulator:MY_ROBOT"          # an EnvironmentKind

A path that a simulator needs, such as a checkout, is an environment variable. Another protocol of the same simulator,
such as other step limits, is an entry of its own, made with `dataclasses.replace`.

Axes: A action dimensions.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from lapa.errors import UserError, unknown
from lapa.types import Observation

# Name -> "module:EnvironmentKind", imported when it is asked for.
ENVIRONMENTS = {
    "language_table": "lapa.envs.language_table.simulator:LANGUAGE_TABLE",
    "libero": "lapa.envs.libero:LIBERO",
    "libero-openvla": "lapa.envs.libero:LIBERO_OPENVLA",
    "metaworld": "lapa.envs.metaworld.simulator:METAWORLD",
    "simpler": "lapa.envs.simpler:SIMPLER",
    "synthetic": "lapa.envs.synthetic:SYNTHETIC",
}
ENTRY_POINTS = "lapa.environments"
# Episodes for training and for evaluation never share a seed, whatever seed the user gives to either.
PURPOSES = {"demonstration": 0, "evaluation": 1}
# The suite of all tasks, or of the usual ones, in every environment.
ALL = "all"


class Environment(Protocol):
    """One simulated task. Rendering costs more than physics, so images are rendered only in `observe`."""

    def reset(self, seed: int, episode: int) -> None:
        """Starts the episode that these determine, whatever came before.

        episode: its number, which chooses the initial state where the task has numbered ones.
        """

    def observe(self) -> Observation:
        """Returns the current observation: an image of each camera, the instruction, the state."""

    def step(self, action: Float[np.ndarray, "A"]) -> bool:
        """Executes an action in the robot's own units; returns whether the task is solved after it."""

    def expert_action(self) -> Float[np.ndarray, "A"]:
        """Returns the action of a scripted expert for the current state. Called only for tasks with an expert."""

    def close(self) -> None:
        """Frees what the environment holds."""


@dataclass(frozen=True)
class Task:
    """What is known of a task before its environment is made.

    max_steps: an episode without success fails after so many. initial_states: how many numbered ones there are, so the
    most episodes; None: an initial state for every seed. expert: whether a scripted expert exists.
    """

    name: str
    max_steps: int
    initial_states: int | None = None
    expert: bool = False


@dataclass(frozen=True)
class EnvironmentKind:
    """A family of tasks: how to make one, and what is known before one is made.

    title: its name in messages. make: called as make(task name, size=..., cameras=...). suites: returns the tasks of
    each suite; raises UserError where it needs a package to know them. known_cameras: every camera; cameras: those
    rendered by default. size: default height and width of images. fps: control rate; declared_fps: other rates that
    datasets from this environment declare. action_names, state_names: one for each dimension. action_low,
    action_high: random actions are uniform between them. longest: the most steps that the simulator allows.
    stops_at_success: where False, an episode is played to its limit and the last step counts. in_process: too light
    for worker processes; own_process: only in worker processes. packages: distributions that it needs, whose versions
    belong in the results; extra: our extra that installs them. also_needs: what else, for the reader. check: raises
    UserError, with the fix, where the machine cannot run it, and may return notes for the results, such as the
    protocol or the renderer; `lapa view` shows one that begins with "stand-in" as a warning. spelling: returns the name
    of a task or suite for another spelling of it. default_tasks: those that `lapa evaluate` plays by default.
    """

    title: str
    make: Callable[..., Environment]
    suites: Callable[[], Mapping[str, Sequence[Task]]]
    known_cameras: tuple[str, ...]
    cameras: tuple[str, ...]
    size: int
    fps: float
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    declared_fps: tuple[float, ...] = ()
    longest: int | None = None
    stops_at_success: bool = True
    in_process: bool = False
    own_process: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    also_needs: str = ""
    check: Callable[[], Mapping[str, str] | None] = dict
    spelling: Callable[[str], str] = str
    default_tasks: str = "all"

    @property
    def action_dim(self) -> int:
        """The number of action dimensions."""
        return len(self.action_names)

    @property
    def state_dim(self) -> int:
        """The number of dimensions of the state, in observations and datasets."""
        return len(self.state_names)

    @property
    def install(self) -> str:
        """The command that installs its packages; empty where it needs none."""
        names = f'"lapa-vla[{self.extra}]"' if self.extra else " ".join(self.packages)
        return f"pip install {names}" if names else ""

    def parse_tasks(self, text: str) -> dict[str, Task]:
        """Suites and task names separated by commas -> the tasks by name, each once, in that order.

        The suite `all` has every task. Raises UserError, with the nearest names, on an unknown one.
        """
        suites = self.suites()
        tasks = {task.name: task for suite in suites.values() for task in suite}
        chosen: dict[str, Task] = {}
        for word in filter(None, (word.strip() for word in text.split(","))):
            name = self.spelling(word)
            if name in suites:
                chosen |= {task.name: task for task in suites[name]}
            elif name == ALL:
                chosen |= tasks
            elif name in tasks:
                chosen[name] = tasks[name]
            else:
                raise self._unknown_task(word, suites, tasks)
        if not chosen:
            known = ", ".join(dict.fromkeys((ALL, *suites)))
            raise UserError(f"no task given; name tasks of {self.title} separated by commas, or a suite ({known})")
        return chosen

    def check_machine(self) -> Mapping[str, str]:
        """Returns notes for the results. Raises UserError, with the fix, where this machine cannot run it."""
        missing = [name for name in self.packages if not _is_installed(name)]
        if missing:
            raise UserError(f"{self.title} needs {', '.join(missing)}; install it: {self.install}")
        return self.check() or {}

    def _unknown_task(self, word: str, suites: Mapping[str, object], tasks: Mapping[str, object]) -> UserError:
        groups = list(dict.fromkeys((ALL, *suites)))
        near = difflib.get_close_matches(word, [*groups, *tasks], n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return UserError(f"unknown {self.title} task {word!r}{hint} (suites: {', '.join(groups)})")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def names() -> tuple[str, ...]:
    """Returns the names of all environments: ours, then those of other distributions."""
    others = importlib.metadata.entry_points(group=ENTRY_POINTS).names
    return (*ENVIRONMENTS, *sorted(others - ENVIRONMENTS.keys()))


def kind_of(name: str) -> EnvironmentKind:
    """Returns the environment registered under a name. Raises UserError on an unknown name and a failing import."""
    if name in ENVIRONMENTS:
        return importlib.metadata.EntryPoint(name, ENVIRONMENTS[name], ENTRY_POINTS).load()
    others = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in others.names:
        raise unknown("environment", name, names())
    try:
        kind = others[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"environment {name!r}: cannot load {others[name].value} ({error}); reinstall it") from error
    if not isinstance(kind, EnvironmentKind):
        raise UserError(f"environment {name!r}: {others[name].value} is not a lapa.envs.EnvironmentKind")
    return kind


def make(name: str, task: str, *, size: int | None = None, cameras: Sequence[str] | None = None) -> Environment:
    """Returns an environment by name and task; size and cameras default to the kind's own."""
    kind = kind_of(name)
    return kind.make(task, size=size or kind.size, cameras=cameras or kind.cameras)


def episode_seed(seed: int, purpose: str, task: str, episode: int) -> int:
    """Returns the seed of one episode, a 63-bit integer: the same for every policy, worker count and choice of tasks.

    purpose: a key of PURPOSES. Raises UserError where `seed` is negative.
    """
    if seed < 0:
        raise UserError(f"seed must not be negative, got {seed}")
    entropy = [seed, PURPOSES[purpose], zlib.crc32(task.encode()), episode]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
