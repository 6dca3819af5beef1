"""Other people's Gymnasium environments as ours, in a few lines; examples/pusht has them for PushT.

    REACH = gymnasium_kind("reaching", {"reach": lambda: gymnasium.make("my_package/Reach-v0")})

An environment follows LeRobot's conventions:

    observation["pixels"]                an image, uint8 [H, W, 3], or a dictionary of them by camera
    observation["agent_pos"]             the robot's state, where it has one
    task_description, or task            the instruction; without either it is the name of the task
    info["is_success"]                   at every step: whether the task is solved
    metadata["render_fps"]               the control rate

Conventions: https://huggingface.co/docs/lerobot/envhub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lapa.envs import ALL, EnvironmentKind, Task
from lapa.errors import UserError
from lapa.types import Observation

PIXELS, STATE, SUCCESS = "pixels", "agent_pos", "is_success"
# The camera of an environment with one, as LeRobot's `observation.image` is named in a dataset.
CAMERA = "image"

MakeGymnasium = Callable[[], Any]


def gymnasium_kind(
    title: str,
    tasks: Mapping[str, MakeGymnasium],
    *,
    fps: float | None = None,
    max_steps: int | None = None,
    packages: tuple[str, ...] = (),
) -> EnvironmentKind:
    """Returns the kind of some Gymnasium environments by the names of their tasks. Makes one, to read its spaces.

    title: their name in messages. fps, max_steps: where the environment does not declare them. packages:
    distributions whose versions belong in the results. Raises UserError where it does not follow the conventions.
    """
    from gymnasium.spaces import Box

    name, make = next(iter(tasks.items()))
    environment = make()
    images, actions = _image_spaces(name, environment), environment.action_space
    state = environment.observation_space.spaces.get(STATE)
    if not isinstance(actions, Box) or len(actions.shape) != 1:
        raise UserError(f"{name}: expected actions that are a Box of one axis, got {actions}")
    fps = fps or environment.metadata.get("render_fps")
    max_steps = max_steps or (environment.spec and environment.spec.max_episode_steps)
    environment.close()
    native = next(iter(images.values())).shape[0]
    for what, value in (("fps", fps), ("max_steps", max_steps)):
        if value is None:
            raise UserError(f"{name}: the environment does not declare {what}; give it to gymnasium_kind")

    def make_task(task: str, size: int, cameras: Sequence[str]) -> GymnasiumEnvironment:
        if size != native:
            raise UserError(f"{task}: the environment itself chose {native} pixels, not {size}; leave out --size")
        return GymnasiumEnvironment(tasks[task](), task, cameras)

    return EnvironmentKind(
        title=title,
        make=make_task,
        suites=lambda: {ALL: [Task(name, max_steps) for name in tasks]},
        known_cameras=tuple(images),
        cameras=tuple(images)[:1],
        size=native,
        fps=float(fps),
        action_names=tuple(f"action_{number}" for number in range(actions.shape[0])),
        state_names=tuple(f"state_{number}" for number in range(state.shape[0] if state else 0)),
        action_low=tuple(actions.low.tolist()),
        action_high=tuple(actions.high.tolist()),
        longest=max_steps,
        packages=packages,
    )


class GymnasiumEnvironment:
    """One task, an `Environment`. An episode that its environment ends without success stays unsolved."""

    def __init__(self, environment: Any, task: str, cameras: Sequence[str]) -> None:
        self._environment, self._task, self._cameras = environment, task, tuple(cameras)

    def reset(self, seed: int, episode: int) -> None:
        self._observation, _ = self._environment.reset(seed=seed % 2**32)
        texts = (_attribute(self._environment, name) for name in ("task_description", "task"))
        self._instruction = str(next(filter(None, texts), self._task))
        self._over = False

    def observe(self) -> Observation:
        pixels, state = self._observation[PIXELS], self._observation.get(STATE)
        images = pixels if isinstance(pixels, Mapping) else {CAMERA: pixels}
        seen = {camera: images[camera] for camera in self._cameras}
        return Observation(seen, self._instruction, None if state is None else np.asarray(state, np.float32))

    def step(self, action: Float[np.ndarray, "A"]) -> bool:
        if self._over:
            return False
        space = self._environment.action_space
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        self._observation, _, terminated, truncated, info = self._environment.step(action)
        if SUCCESS not in info:
            raise UserError(f'{self._task}: the environment does not report success; its info needs "{SUCCESS}"')
        self._over = bool(terminated or truncated)
        return bool(info[SUCCESS])

    def expert_action(self) -> Float[np.ndarray, "A"]:
        raise NotImplementedError("no task has an expert")

    def close(self) -> None:
        self._environment.close()


def _attribute(environment: Any, name: str) -> Any:
    """Returns an attribute of the environment, or of one that it wraps; None where none has it."""
    return environment.get_wrapper_attr(name) if environment.has_wrapper_attr(name) else None


def _image_spaces(name: str, environment: Any) -> dict[str, Any]:
    """Returns the spaces of the images by camera. Raises UserError where there are none."""
    pixels = getattr(environment.observation_space, "spaces", {}).get(PIXELS)
    if pixels is None:
        raise UserError(
            f'{name}: expected observations that are a Dict with "{PIXELS}", got {environment.observation_space}'
        )
    return dict(getattr(pixels, "spaces", {CAMERA: pixels}))
