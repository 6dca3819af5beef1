"""Environments that a policy is rolled out in: what they have in common, and the registry that makes them by name.

A new simulator needs a class with the methods of `Environment` and one entry in ENVIRONMENTS.

    lapa evaluate POLICY --env metaworld --tasks mt10 --out RESULTS
    lapa evaluate random --env synthetic --tasks all --out RESULTS
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from lapa.envs import synthetic
from lapa.envs.metaworld import simulator as metaworld
from lapa.errors import unknown
from lapa.sources.synthetic import CAMERA
from lapa.types import Observation


class Environment(Protocol):
    """One simulated task. Rendering costs more than physics, so pictures are made only when asked for."""

    def reset(self, seed: int) -> None:
        """Begins the episode that belongs to the seed, and to it alone."""

    def observe(self) -> Observation:
        """What a policy sees now."""

    def step(self, action: Float[np.ndarray, "A"]) -> bool:
        """Executes an action in the robot's own units; returns whether the task stands solved after it."""

    def expert_action(self) -> Float[np.ndarray, "A"]:
        """What a scripted expert would do now."""

    def close(self) -> None:
        """Frees what the environment holds."""


@dataclass(frozen=True)
class EnvironmentKind:
    """A family of tasks, and what can be known about it before one is made.

    make: (task, size, cameras) -> Environment; parse_tasks: the user's text -> task names, UserError on a typo;
    check_machine: raises UserError where the machine cannot run it. known_cameras: all there are; cameras: those that
    are seen by default. state_dim: width of the state that observations bring, that of its datasets too.
    action_limit: random actions are uniform in [-limit, limit]; in_process: too light for processes of its own.
    """

    make: Callable[[str, int, Sequence[str]], Environment]
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


class MetaworldEnvironment:
    """A Meta-World task as an Environment."""

    def __init__(self, task: str, size: int, cameras: Sequence[str]) -> None:
        self._simulator = metaworld.Simulator(task, size=size, cameras=cameras)
        self.reset, self.step = self._simulator.reset, self._simulator.step
        self.expert_action, self.close = self._simulator.expert_action, self._simulator.close

    def observe(self) -> Observation:
        simulator = self._simulator
        return Observation(simulator.render(), simulator.instruction, simulator.state)


ENVIRONMENTS = {
    "metaworld": EnvironmentKind(
        make=MetaworldEnvironment,
        parse_tasks=metaworld.parse_tasks,
        check_machine=metaworld.check_installation,
        known_cameras=metaworld.CAMERAS,
        cameras=("corner4",),
        size=128,
        fps=metaworld.FPS,
        action_dim=len(metaworld.ACTION_NAMES),
        state_dim=len(metaworld.STATE_NAMES),
        action_limit=1.0,
        max_steps=250,
        longest=metaworld.MAX_STEPS,
    ),
    "synthetic": EnvironmentKind(
        make=synthetic.SquareEnvironment,
        parse_tasks=synthetic.parse_tasks,
        check_machine=lambda: None,
        known_cameras=(CAMERA,),
        cameras=(CAMERA,),
        size=64,
        fps=10.0,
        action_dim=2,
        state_dim=2,
        action_limit=synthetic.LONGEST_STEP,
        max_steps=40,
        longest=1000,
        in_process=True,
    ),
}


def kind_of(name: str) -> EnvironmentKind:
    """The kind registered under a name; UserError with the nearest name on a typo."""
    if name not in ENVIRONMENTS:
        raise unknown("environment", name, ENVIRONMENTS)
    return ENVIRONMENTS[name]


def make(name: str, task: str, *, size: int | None = None, cameras: Sequence[str] | None = None) -> Environment:
    """An environment by name and task; size and cameras default to the kind's own."""
    kind = kind_of(name)
    return kind.make(task, size or kind.size, cameras or kind.cameras)
