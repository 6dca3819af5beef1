"""Simulators that a policy is rolled out in: their common interface, and the table that finds them by name.

    lapa evaluate POLICY --env metaworld --tasks mt10 --out RESULTS
    lapa evaluate random --env synthetic --tasks all --out RESULTS

A new simulator is a class with the methods of `Environment` and an `EnvironmentKind` that describes it: an entry in
ENVIRONMENTS, or in another distribution an entry point of the group `lapa.environments`:

    [project.entry-points."lapa.environments"]
    my-robot = "my_package.simulator:MY_ROBOT"          # an EnvironmentKind

Axes: A action dimensions.
"""

from __future__ import annotations

import importlib.metadata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from lapa.errors import UserError, unknown
from lapa.types import Observation

# Name -> "module:EnvironmentKind", imported when it is asked for.
ENVIRONMENTS = {
    "metaworld": "lapa.envs.metaworld.simulator:METAWORLD",
    "synthetic": "lapa.envs.synthetic:SYNTHETIC",
}
ENTRY_POINTS = "lapa.environments"
# Episodes for training and for evaluation never share a seed, whatever seed the user gives to either.
PURPOSES = {"demonstration": 0, "evaluation": 1}


class Environment(Protocol):
    """One simulated task. Rendering costs more than physics, so images are rendered only in `observe`."""

    def reset(self, seed: int) -> None:
        """Starts the episode that the seed determines, whatever came before."""

    def observe(self) -> Observation:
        """Returns the current observation: an image of each camera, the instruction, the state."""

    def step(self, action: Float[np.ndarray, "A"]) -> bool:
        """Executes an action in the robot's own units; returns whether the task is solved after it."""

    def expert_action(self) -> Float[np.ndarray, "A"]:
        """Returns the action of a scripted expert for the current state."""

    def close(self) -> None:
        """Frees what the environment holds."""


@dataclass(frozen=True)
class EnvironmentKind:
    """A family of tasks: how to make one, and what is known before one is made.

    make: called as make(task, size=..., cameras=...). parse_tasks: the text of --tasks -> task names; raises UserError
    on a typo. check_machine: raises UserError where the machine cannot run it. known_cameras: every camera; cameras:
    those rendered by default. size: default height and width of images; fps: control rate. state_dim: dimensions of the
    state in observations and datasets. action_limit: random actions are uniform in [-limit, limit]. max_steps: default
    length of an episode; longest: the most that the simulator allows. in_process: too light for worker processes.
    packages: distributions whose versions belong in the results.
    """

    make: Callable[..., Environment]
    parse_tasks: Callable[[str], tuple[str, ...]]
    check_machine: Callable[[], None]
    known_cameras: tuple[str, ...]
    cameras: tuple[str, ...]
    size: int
    fps: float
    action_dim: int
    state_dim: int
    action_limit: float
    max_steps: int
    longest: int
    in_process: bool = False
    packages: tuple[str, ...] = ()


def kind_of(name: str) -> EnvironmentKind:
    """Returns the environment registered under a name. Raises UserError on an unknown name and a failing import."""
    others = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if name not in ENVIRONMENTS and name not in others.names:
        raise unknown("environment", name, [*ENVIRONMENTS, *sorted(others.names)])
    if name in ENVIRONMENTS:
        return importlib.metadata.EntryPoint(name, ENVIRONMENTS[name], ENTRY_POINTS).load()
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
