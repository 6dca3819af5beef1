"""The made-up world of lapa.envs.synthetic for LeRobot: an environment of eight tasks, and a robot.

    PYTHONPATH=benchmarks lerobot-eval --policy.path=FOLDER --env.type=squares --env.discover_packages_path=squares
    PYTHONPATH=benchmarks lerobot-rollout --policy.path=FOLDER --robot.type=squares \
      --robot.discover_packages_path=squares --task="move up" --fps=10 --duration=2

`make check-lerobot` runs these. A robot writes what happened to it into the file `log`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.robots import Robot, RobotConfig

from lapa import envs
from lapa.sources.synthetic import CAMERA, DIRECTIONS

SIZE, FPS, MAX_STEPS = 32, 10, 40
AXES = ("right", "down")


class SquareTask(gym.Env):
    """One direction, as a gymnasium environment."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012
    render_mode = "rgb_array"
    _max_episode_steps = MAX_STEPS

    def __init__(self, task: str) -> None:
        self.task, self.task_description = task, f"move {task}"
        self.square = envs.make("synthetic", task, size=SIZE)
        image = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        plane = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = gym.spaces.Dict({"pixels": gym.spaces.Dict({CAMERA: image}), "agent_pos": plane})
        self.action_space = plane

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.square.reset(int(self.np_random.integers(2**31)))
        self.steps = 0
        return self._observed(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        solved = self.square.step(np.asarray(action))
        self.steps += 1
        return self._observed(), float(solved), solved, self.steps >= MAX_STEPS, {"is_success": solved}

    def render(self) -> np.ndarray:
        return self._image

    def _observed(self) -> dict[str, Any]:
        seen = self.square.observe()
        self._image = seen.images[CAMERA]
        return {"pixels": {CAMERA: self._image}, "agent_pos": seen.state}


@EnvConfig.register_subclass("squares")
@dataclass
class SquaresEnv(EnvConfig):
    """All eight directions."""

    fps: int = FPS
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (2,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (2,)),
            f"pixels/{CAMERA}": PolicyFeature(FeatureType.VISUAL, (SIZE, SIZE, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            f"pixels/{CAMERA}": f"observation.images.{CAMERA}",
        }
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, gym.vector.VectorEnv]]:
        def several(task: str) -> gym.vector.VectorEnv:
            mode = gym.vector.AutoresetMode.SAME_STEP
            return gym.vector.SyncVectorEnv([partial(SquareTask, task)] * n_envs, autoreset_mode=mode)

        return {"squares": {number: several(task) for number, task in enumerate(DIRECTIONS)}}


@RobotConfig.register_subclass("squares")
@dataclass(kw_only=True)
class SquareRobotConfig(RobotConfig):
    """log: file for the actions that came, and whether they solved the task. start: seed of the first place."""

    log: Path
    direction: str = "up"
    start: int = 0


class SquareRobot(Robot):
    """One direction, as a robot of LeRobot: joints `right.pos` and `down.pos`, moved by the action."""

    config_class = SquareRobotConfig
    name = "squares"

    def __init__(self, config: SquareRobotConfig) -> None:
        super().__init__(config)
        self.config = config
        self.square = envs.make("synthetic", config.direction, size=SIZE)
        self.cameras = {CAMERA: None}
        self.actions: list[list[float]] = []
        self.solved = self._connected = False

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**self.action_features, CAMERA: (SIZE, SIZE, 3)}

    @property
    def action_features(self) -> dict[str, Any]:
        return {f"{axis}.pos": float for axis in AXES}

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def connect(self, calibrate: bool = True) -> None:
        self.square.reset(self.config.start)
        self._connected = True

    def get_observation(self) -> dict[str, Any]:
        seen = self.square.observe()
        assert seen.state is not None
        place = {f"{axis}.pos": float(value) for axis, value in zip(AXES, seen.state, strict=True)}
        return {**place, CAMERA: seen.images[CAMERA]}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.actions.append([float(action[f"{axis}.pos"]) for axis in AXES])
        self.solved |= self.square.step(np.array(self.actions[-1]))
        return action

    def disconnect(self) -> None:
        self._connected = False
        self.config.log.write_text(json.dumps({"actions": self.actions, "solved": self.solved}))
