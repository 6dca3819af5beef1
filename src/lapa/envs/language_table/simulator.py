"""Language Table: a stick pushes blocks on a table by an instruction.

Language Table: Lynch et al., RA-L 2023, arXiv 2210.06407; https://github.com/google-research/language-table.

    git clone https://github.com/google-research/language-table
    export LANGUAGE_TABLE=$PWD/language-table
    lapa evaluate POLICY --env language_table --tasks all --episodes 50 --out RESULTS
    lapa evaluate expert --env language_table --tasks separate --episodes 5 --out RESULTS

Episodes are those of the authors' evaluation: eight blocks (four in the suite `4blocks`, one in `1block`), 200 steps,
positions drawn until their oracle finds a plan, instructions drawn from templates. Their reset leaves something behind,
so each episode has a new simulator. Blocks that a task does not have lie in a heap next to the table; the suites of
fewer blocks leave it out, which halves the time of an episode and moves where a push ends a little.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from lapa.console import warn
from lapa.envs import ALL, EnvironmentKind, Task
from lapa.envs.language_table.look import change_look
from lapa.envs.language_table.pusher import push
from lapa.envs.language_table.stand_ins import stand_ins
from lapa.errors import UserError
from lapa.types import Observation

VARIABLE = "LANGUAGE_TABLE"
REPOSITORY = "https://github.com/google-research/language-table"
# The commit that was tested.
COMMIT = "5b7bf0e9ff4edce323d5dd6d18e3341ae3ddb438"

# Family of tasks -> the file and the class of its reward.
FAMILIES = {
    "block2block": ("block2block", "BlockToBlockReward"),
    "block2absolute": ("block2absolutelocation", "BlockToAbsoluteLocationReward"),
    "block2relative": ("block2relativelocation", "BlockToRelativeLocationReward"),
    "block2blockrelative": ("block2block_relative_location", "BlockToBlockRelativeLocationReward"),
    "separate": ("separate_blocks", "SeparateBlocksReward"),
}
# After a task's family -> what the authors call its blocks: four, one of each colour and shape, or a green star.
FEWER_BLOCKS = {"4block": "BLOCK_4", "1block": "BLOCK_1"}
MAX_STEPS = 200
# As the published datasets name it.
CAMERA = "rgb"
FPS = 10.0
# Metres: a movement of the stick's target, and the stick's position.
ACTION_NAMES = STATE_NAMES = ("x", "y")
LONGEST_MOVE = 0.1


def checkout() -> Path:
    """Returns the user's checkout of the simulator. Raises UserError, with the fix, where there is none."""
    folder = os.environ.get(VARIABLE, "")
    fix = f"git clone {REPOSITORY} && export {VARIABLE}=$PWD/language-table"
    if not folder:
        raise UserError(f"Language Table needs a checkout of its repository, which ${VARIABLE} names: {fix}")
    if not (Path(folder) / "language_table" / "environments" / "language_table.py").is_file():
        raise UserError(f"${VARIABLE}={folder}: is no checkout of Language Table; make one: {fix}")
    return Path(folder).resolve()


def check_checkout() -> dict[str, str]:
    """Returns the protocol and the checkout's commit; warns where that is another than the tested one."""
    folder = checkout()
    try:
        found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip()
    except FileNotFoundError:
        commit = ""
    if commit and commit != COMMIT:
        fix = f"results may differ from those of others; git -C {folder} checkout {COMMIT}"
        warn(f"{folder}: is at another commit than the tested one: {fix}")
    return {"protocol": "initial states that the oracle can plan", "checkout": commit[:12] or "no git"}


class LanguageTableEnvironment:
    """One family of tasks, an `Environment`. Each episode has a simulator of its own.

    An action is [2] (metres that the stick's target moves, clipped to 0.1), the state float32 [2] (metres).
    look: draws another camera and other colours, and changes no motion; None: the authors' own. planned: positions are
    drawn until the authors' oracle finds a plan.
    """

    def __init__(
        self, task: str, size: int, cameras: Sequence[str], look: int | None = None, *, planned: bool = True
    ) -> None:
        self._task, self._size, self._cameras, self._look, self._planned = task, size, tuple(cameras), look, planned
        self._simulator: Any = None

    def reset(self, seed: int, episode: int = 0) -> None:
        self.close()
        with _numbers(seed % 2**32), _silence():
            self._simulator = _make(self._task, seed % 2**32)
            if self._look is not None:
                change_look(self._simulator, self._look)
            self._observation = self._simulator.reset()
            if self._planned:
                oracle = _oracle(self._simulator)
                while not oracle.get_plan(self._simulator.compute_state()):
                    self._observation = self._simulator.reset()

    def observe(self) -> Observation:
        image = Image.fromarray(self._simulator.image())
        image = image.resize((self._size, self._size), Image.Resampling.LANCZOS)
        instruction = self._simulator.decode_instruction(self._observation["instruction"])
        images = dict.fromkeys(self._cameras, np.asarray(image))
        return Observation(images, instruction, self._observation["effector_translation"].astype(np.float32))

    def step(self, action: Float[np.ndarray, "2"]) -> bool:
        self._observation, _, solved, _ = self._simulator.step(np.clip(action, -LONGEST_MOVE, LONGEST_MOVE))
        return bool(solved)

    def expert_action(self) -> Float[np.ndarray, "2"]:
        state = self._simulator.compute_state()
        stick_2 = state["effector_target_translation"][:2]
        to_block_2 = state["effector_target_to_start_block_translation"][:2]
        to_goal_2 = state["effector_target_to_task_target_translation"][:2]
        bounds_22 = self._simulator.bounds_22
        move_2 = push(stick_2, stick_2 + to_block_2, stick_2 + to_goal_2, bounds_22)
        return np.clip(stick_2 + move_2, *bounds_22) - stick_2

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.pybullet_client.disconnect()
            self._simulator = None


def _make(task: str, seed: int) -> Any:
    """Returns the simulator of a task."""
    modules = _modules()
    family, _, fewer = task.partition("_")
    name, reward = FAMILIES[family]
    return modules.simulator(
        block_mode=modules.blocks.LanguageTableBlockVariants[FEWER_BLOCKS.get(fewer, "BLOCK_8")],
        reward_factory=getattr(modules.rewards[name], reward),
        control_frequency=FPS,
        seed=seed,
    )


@contextmanager
def _numbers(seed: int) -> Iterator[None]:
    """NumPy's global random numbers, from which instructions and plans are drawn too, are those of the seed."""
    others = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(others)  # noqa: NPY002


@contextmanager
def _silence() -> Iterator[None]:
    """pybullet prints from C whenever it starts, and Gymnasium warns of the precision of bounds."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        # What C holds back would come later.
        ctypes.CDLL(None).fflush(None)
        for descriptor, stream in enumerate(streams, start=1):
            os.dup2(stream, descriptor)
            os.close(stream)
        os.close(nowhere)


def _oracle(simulator: Any) -> Any:
    return _modules().oracle(simulator, use_ee_planner=True)


@cache
def _modules() -> SimpleNamespace:
    """Imports the checkout's files, and returns what is used of them."""
    root = "language_table.environments"
    sys.path.append(str(checkout()))
    with stand_ins():
        table = importlib.import_module(f"{root}.language_table")
        oracles = importlib.import_module(f"{root}.oracles.push_oracle_rrt_slowdown")
        blocks = importlib.import_module(f"{root}.blocks")
        rewards = {name: importlib.import_module(f"{root}.rewards.{name}") for name, _ in FAMILIES.values()}
    blank = np.zeros((table.constants.IMAGE_HEIGHT, table.constants.IMAGE_WIDTH, 3), np.uint8)

    class Simulator(table.LanguageTable):  # type: ignore[name-defined]
        """Renders when it is asked for an image, not at every step. The oracle asks for the specs.

        bounds_22: the lowest and the highest position of the stick, in metres.
        """

        bounds_22 = table.constants.WORKSPACE_BOUNDS

        def _render_camera(self, image_size: object, return_seg_mask: bool = False) -> np.ndarray:
            return blank

        def image(self) -> UInt8[np.ndarray, "H W 3"]:
            return super()._render_camera(self._image_size)

        def _get_urdf_paths(self) -> dict[str, str]:
            paths = super()._get_urdf_paths()
            if self._block_mode == blocks.LanguageTableBlockVariants.BLOCK_8:
                return paths
            # The constructor looks for one block, whichever are on the table.
            laid = {blocks.DUMMY_START_BLOCK, *blocks.get_block_set(self._block_mode)}
            return {block: path for block, path in paths.items() if block in laid}

        def time_step_spec(self) -> None:
            return None

        def action_spec(self) -> None:
            return None

    oracle = oracles.ObstacleOrientedPushOracleBoard2dRRT
    return SimpleNamespace(simulator=Simulator, oracle=oracle, blocks=blocks, rewards=rewards)


LANGUAGE_TABLE = EnvironmentKind(
    title="Language Table",
    make=LanguageTableEnvironment,
    suites=lambda: {
        ALL: [Task(family, MAX_STEPS, expert=True) for family in FAMILIES],
        "4blocks": [Task(f"{family}_4block", MAX_STEPS, expert=True) for family in FAMILIES],
        "1block": [Task(f"{family}_1block", MAX_STEPS, expert=True) for family in ("block2absolute", "block2relative")],
    },
    known_cameras=(CAMERA,),
    cameras=(CAMERA,),
    size=128,
    fps=FPS,
    action_names=ACTION_NAMES,
    state_names=STATE_NAMES,
    action_low=(-LONGEST_MOVE,) * 2,
    action_high=(LONGEST_MOVE,) * 2,
    own_process=True,
    packages=("pybullet", "gymnasium", "opencv-python-headless", "absl-py", "six"),
    extra="language-table",
    also_needs=f"a checkout at ${VARIABLE}",
    check=check_checkout,
)
