"""A Meta-World task (v3) as a simulator that renders fast without a screen and is deterministic for a seed.

Meta-World: Yu et al., CoRL 2019, arXiv 1910.10897; version 3 of the `metaworld` package, with its scripted experts.

    lapa evaluate POLICY --env metaworld --tasks mt10 --out RESULTS
    python benchmarks/bench_metaworld.py

Images come from a `mujoco.Renderer` through EGL, without multisampling, shadows and reflections: several times
the speed of the environment's own `render()` on a CPU. A process owns one OpenGL context at a time (OSMesa returns
garbage when two exist), shared by all simulators of the same task and look.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lapa.envs import EnvironmentKind, Task
from lapa.envs.metaworld import Embodiment
from lapa.envs.metaworld.hand import draw_hand, hide_robot
from lapa.envs.metaworld.look import change_look
from lapa.envs.opengl import check_rendering, choose_backend
from lapa.errors import UserError, unknown
from lapa.files import read_json
from lapa.types import Observation

# Several paraphrases of each task (named without the `-v3`), so that a policy reads and does not memorise. No phrase
# belongs to two tasks, so an instruction alone identifies the task.
INSTRUCTIONS = {
    task: tuple(phrases) for task, phrases in read_json(Path(__file__).with_name("instructions.json")).items()
}
TASKS = tuple(INSTRUCTIONS)
SUITES = {
    "mt10": (
        "reach",
        "push",
        "pick-place",
        "door-open",
        "drawer-open",
        "drawer-close",
        "button-press-topdown",
        "peg-insert-side",
        "window-open",
        "window-close",
    ),
    "mt50": TASKS,
}

ACTION_NAMES = ("dx", "dy", "dz", "gripper")
STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening")
CAMERAS = ("corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
UPSIDE_DOWN = frozenset({"corner", "corner2", "corner3", "corner4"})

# Frames come and actions go at the control rate: 5 physics steps of 2.5 ms.
FPS = 80.0
# The environment itself raises after so many steps.
MAX_STEPS = 500


def check_cameras(cameras: Sequence[str]) -> None:
    """Raises UserError on a camera that Meta-World does not have."""
    if not cameras:
        raise UserError("no camera given; corner4 sees most of the table")
    for camera in cameras:
        if camera not in CAMERAS:
            raise unknown("camera", camera, CAMERAS)


def draw_instruction(task: str, seed: int) -> str:
    """Returns one paraphrase of the task, drawn from the episode's seed."""
    phrases = INSTRUCTIONS[task]
    return phrases[np.random.default_rng([seed, 1]).integers(len(phrases))]


class Simulator:
    """One Meta-World task, an `Environment`. Positions of objects and goal are drawn at `reset` from its seed alone.

    An action is float32 [4] (ACTION_NAMES, clipped to [-1, 1]; one unit moves the hand by 1 cm a step), the state
    float32 [4] (STATE_NAMES: metres, opening in [0, 1]), an image uint8 [size, size, 3].
    look: draws other colours, textures and lights, and changes no motion; None: Meta-World's own. embodiment: what is
    seen to act, which changes no motion; None: the robot.
    """

    def __init__(
        self,
        task: str,
        *,
        size: int = 128,
        cameras: Sequence[str] = ("corner4",),
        look: int | None = None,
        embodiment: Embodiment | None = None,
    ) -> None:
        if task not in INSTRUCTIONS:
            raise unknown("Meta-World task", task, TASKS)
        check_cameras(cameras)
        self.task, self.size, self.cameras, self.look, self.embodiment = task, size, tuple(cameras), look, embodiment
        self._environment = _make_environment(task, size)
        if look is not None:
            change_look(self._environment.model, look)
        if embodiment is not None:
            hide_robot(self._environment.model)
        self._expert: Any = None
        self._observation: np.ndarray | None = None
        self.instruction = ""

    @property
    def state(self) -> np.ndarray:
        """Position of the hand (metres) and opening of the gripper (0 to 1), float32 [4]."""
        assert self._observation is not None, "reset comes first"
        return self._observation[:4].astype(np.float32)

    def reset(self, seed: int, episode: int = 0) -> None:
        """Starts the episode that `seed` determines."""
        from metaworld.policies import ENV_POLICY_MAP

        self._environment.seed(seed)
        self._observation, _ = self._environment.reset()
        experts: dict[str, Any] = dict(ENV_POLICY_MAP)
        self._expert = experts[f"{self.task}-v3"]()
        self.instruction = draw_instruction(self.task, seed)
        # Some tasks move the goal's marker at the very end of their reset; the next image must show it.
        import mujoco

        mujoco.mj_forward(self._environment.model, self._environment.data)

    def step(self, action: np.ndarray) -> bool:
        """Executes one action; returns whether the task is solved after it."""
        self._observation, _, _, _, info = self._environment.step(np.clip(action, -1, 1))
        return bool(info["success"])

    def expert_action(self) -> np.ndarray:
        """Returns the scripted expert's action for the current state, float32 [4] in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")
            action = self._expert.get_action(self._observation)
        return np.clip(action, -1, 1).astype(np.float32)

    def render(self) -> dict[str, np.ndarray]:
        """Returns the image of each camera, upright, uint8 [size, size, 3]."""
        return {camera: _renderer.render(self, camera) for camera in self.cameras}

    def observe(self) -> Observation:
        """Returns images, instruction and state."""
        return Observation(self.render(), self.instruction, self.state)

    def close(self) -> None:
        """Frees the environment, and the process's OpenGL context if it renders this task."""
        _renderer.release(self.task)
        self._environment.close()


class _Renderer:
    """The process's one `mujoco.Renderer`, made again for another task, size or look.

    Every simulator of the same task, size and look can use it: meshes and textures are in the OpenGL context, while
    positions come from the simulator's own model (objects are placed by writing to it) and data.
    """

    def __init__(self) -> None:
        self._key: tuple[str, int, int | None] | None = None
        self._live: Any = None

    def render(self, simulator: Simulator, camera: str) -> np.ndarray:
        import mujoco

        model, data = simulator._environment.model, simulator._environment.data
        key = (simulator.task, simulator.size, simulator.look)
        if self._key != key:
            self.release()
            self._live = mujoco.Renderer(model, height=simulator.size, width=simulator.size)
            self._live.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._live.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self._key = key
            # Registered after EGL's own exit handler, hence run before it: a context must be freed before its display.
            atexit.unregister(self.release)
            atexit.register(self.release)
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = model.camera(camera).id
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, view, every, self._live.scene)
        if simulator.embodiment == "hand":
            draw_hand(self._live.scene, data)
        image_HWC = self._live.render()
        return np.ascontiguousarray(image_HWC[::-1, ::-1]) if camera in UPSIDE_DOWN else image_HWC

    def release(self, task: str | None = None) -> None:
        """Frees the OpenGL context, of this task alone where it is given."""
        if self._key is not None and task in (None, self._key[0]):
            self._live.close()
            self._key, self._live = None, None


_renderer = _Renderer()


def _make_environment(task: str, size: int) -> Any:
    """Returns the task's environment, its goal observable (the expert needs it) and drawn at every reset."""
    choose_backend()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    environment = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    environment._partially_observable = False
    environment._freeze_rand_vec = False
    environment.seeded_rand_vec = True
    environment._set_task_called = True
    # Cached before the goal was observable.
    del environment.sawyer_observation_space
    visual = environment.model.vis
    visual.quality.offsamples = 0
    visual.global_.offwidth = visual.global_.offheight = size
    return environment


METAWORLD = EnvironmentKind(
    title="Meta-World",
    make=Simulator,
    suites=lambda: {suite: [Task(name, 250, expert=True) for name in names] for suite, names in SUITES.items()},
    spelling=lambda word: word.lower().removesuffix("-v3"),
    check=check_rendering,
    known_cameras=CAMERAS,
    cameras=("corner4",),
    size=128,
    fps=FPS,
    action_names=ACTION_NAMES,
    state_names=STATE_NAMES,
    action_low=(-1.0,) * len(ACTION_NAMES),
    action_high=(1.0,) * len(ACTION_NAMES),
    longest=MAX_STEPS,
    packages=("metaworld", "mujoco"),
    extra="metaworld",
    default_tasks="mt10",
)
