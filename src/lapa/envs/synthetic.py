"""A square to be moved in a named direction: a simulator of a few lines of numpy, for tests and the debug preset.

It looks like the synthetic videos of lapa.sources.synthetic and has their action, the velocity in pixels a frame
(right, down), and their state, the square's centre in pixels (right, down), so a policy trained on those can act here,
without any graphics driver.

    lapa evaluate expert --env synthetic --tasks all --episodes 5 --out RESULTS
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lapa.envs import ALL, EnvironmentKind, Task
from lapa.sources.synthetic import CAMERA, DIRECTIONS, Square, heading
from lapa.types import Observation

# In pixels of a 64 px image, on each axis.
LONGEST_STEP = 4.0
# Share of the image's width that the square must travel.
DISTANCE = 0.4
MAX_STEPS = 40


class SquareEnvironment:
    """One direction. Solved when the square has travelled far enough, nearer to that direction than to any other."""

    def __init__(self, task: str, size: int, cameras: Sequence[str]) -> None:
        self._heading = heading(DIRECTIONS.index(task))
        self._task, self._size, self._cameras = task, size, tuple(cameras)

    def reset(self, seed: int, episode: int = 0) -> None:
        way = self._heading * self._size * (DISTANCE + 0.1)
        self._square = Square(np.random.default_rng(seed), self._size, way)
        self._centre = self._square.start

    def observe(self) -> Observation:
        images = dict.fromkeys(self._cameras, self._square.image(self._centre))
        return Observation(images, f"move {self._task}", self._centre.astype(np.float32))

    def step(self, action: np.ndarray) -> bool:
        half = self._square.half
        longest = LONGEST_STEP * self._size / 64
        self._centre = (self._centre + np.clip(action, -longest, longest)).clip(half, self._size - half)
        travelled = self._centre - self._square.start
        distance = float(np.hypot(*travelled))
        return distance >= DISTANCE * self._size and bool(travelled @ self._heading > np.cos(np.pi / 8) * distance)

    def expert_action(self) -> np.ndarray:
        return (2 * self._heading * self._size / 64).astype(np.float32)

    def close(self) -> None:
        pass


SYNTHETIC = EnvironmentKind(
    title="synthetic",
    make=SquareEnvironment,
    suites=lambda: {ALL: [Task(direction, MAX_STEPS, expert=True) for direction in DIRECTIONS]},
    known_cameras=(CAMERA,),
    cameras=(CAMERA,),
    size=64,
    fps=10.0,
    action_names=("right", "down"),
    state_names=("right", "down"),
    action_low=(-LONGEST_STEP, -LONGEST_STEP),
    action_high=(LONGEST_STEP, LONGEST_STEP),
    longest=1000,
    in_process=True,
)
