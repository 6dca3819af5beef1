"""What RLDS files do not contain: cameras, language, meaning of actions and rate, for the datasets of the paper.

One row a dataset of Open X-Embodiment that LAPA and OpenVLA train on (arXiv 2310.08864, 2406.09246), with actions in
one form: x y z roll pitch yaw of the end effector and the gripper, 1 open and 0 closed. LIBERO's are an exception: they
stay as the simulator takes them, and as the LeRobot form of the same data has them.
Axes: T time, D numbers of a part.

    columns("action[:6] not:clip:action[6]", {"action": 7})     # what is read, and how

Parts are concatenated, left to right. A part is a step feature, `KEY[a:b]` or `KEY[a]` some of its numbers (counted
from the end below 0), `zeros[n]` or `ones[n]` constants for what it lacks. Operations stand before it, the innermost
last:

    not:     1 - x, where 1 is a closed gripper
    clip:    cut to 0..1
    moves:   1 closes, -1 opens and 0 keeps the gripper: whether it is open
    settled: an opening on its way between 0 and 1: where it is going
    euler:   a quaternion x y z w as roll, pitch, yaw
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lapa.data.dataset import Control
from lapa.errors import UserError

POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
PART = re.compile(r"((?:[a-z]+:)*)([\w/.-]+)(?:\[(-?\d+)\]|\[(-?\d+)?:(-?\d+)?\])?")
EXPECTED = "expected a feature, as KEY, KEY[2] or KEY[:6], or zeros[3] or ones[1]"
CONSTANTS = {"zeros": 0.0, "ones": 1.0}
# Numbers of a step; a file of some bytes may declare any.
MAX_NUMBERS = 4096
# How far from zero a movement of the gripper counts, and how near to its ends an opening is settled.
MOVES, SETTLED = 0.1, 0.05


@dataclass(frozen=True)
class Known:
    """What is known of a dataset. Keys are step features; empty or None: not known, or there is none.

    fps: control rate in Hz; image: the outer camera, which comes first, wrist: the one at the hand, which follows, both
    of the observation; text: the instruction; action, state: parts (see above); control: of the action's pose.
    binary: whether the action's gripper has two values; None: not known, and treated as any number.
    """

    fps: float | None = None
    image: str = ""
    wrist: str = ""
    text: str = ""
    action: str = "action"
    state: str = "observation/state"
    control: Control | None = None
    binary: bool | None = None


TEXT, NATURAL = "language_instruction", "observation/natural_language_instruction"
ARM = "action/world_vector action/rotation_delta "
CLOSING = "action/gripper_closedness_action"
# A delta pose, and a gripper that is 1 where it closes and -1 where it opens.
INVERTED = "action[:6] not:clip:action[6]"
RLDS = "_converted_externally_to_rlds"
STATE, ROBOT_STATE = "observation/state", "observation/robot_state"
BRIDGE = Known(5, "image_0", "", TEXT, "action[:6] settled:action[6]", STATE, "delta", True)
# The rotation is an axis times its angle, 0.5 rad at 1; the gripper opens at -1 and closes at 1 (lapa.envs.libero).
LIBERO = Known(20, "image", "wrist_image", TEXT, "action", STATE, "delta", True)
FMB = Known(
    10,
    "image_side_1",
    "image_wrist_1",
    TEXT,
    "action",
    "observation/eef_pose observation/state_gripper_pose",
    "delta",
)

# Rates, and what the catalog of TFDS lacks: as Open X-Embodiment's overview, Octo and OpenVLA have them.
# fmt: off
KNOWN: dict[str, Known] = {
    "bridge_dataset": BRIDGE,
    "bridge_orig": BRIDGE,
    "bridge": Known(5, "image", "", NATURAL, ARM + "action/open_gripper", STATE, "delta", True),
    "fractal20220817_data": Known(3, "image", "", NATURAL, ARM + "moves:" + CLOSING,
        "observation/base_pose_tool_reached observation/gripper_closed", "delta", True),
    # Its state is packed (zlib).
    "kuka": Known(10, "image", "", NATURAL, ARM + "moves:" + CLOSING, "", "delta", True),
    "taco_play": Known(15, "rgb_static", "rgb_gripper", NATURAL,
        "action/rel_actions_world[:6] clip:action/rel_actions_world[6]", "observation/robot_obs", "delta", True),
    "jaco_play": Known(10, "image", "image_wrist", NATURAL, "action/world_vector zeros[3] moves:" + CLOSING,
        "observation/end_effector_cartesian_pos", "delta", True),
    # No gripper moves.
    "berkeley_cable_routing": Known(10, "image", "wrist45_image", NATURAL, ARM + "zeros[1]", ROBOT_STATE, "delta"),
    "roboturk": Known(10, "front_rgb", "", NATURAL, ARM + "not:clip:" + CLOSING, "", "delta"),
    "viola": Known(20, "agentview_rgb", "eye_in_hand_rgb", NATURAL, ARM + "not:clip:" + CLOSING,
        "observation/joint_states observation/gripper_states", "delta"),
    "berkeley_autolab_ur5": Known(5, "image", "hand_image", NATURAL, ARM + "moves:" + CLOSING,
        ROBOT_STATE, "delta", True),
    "toto": Known(30, "image", "", NATURAL, ARM + "action/open_gripper", STATE, "delta", True),
    # A stick on a table: x and y. Its words are numbers, one a character.
    "language_table": Known(10, "rgb", "", "observation/instruction", "action zeros[4] ones[1]",
        "observation/effector_translation", "delta"),
    "stanford_hydra_dataset" + RLDS: Known(10, "image", "wrist_image", TEXT,
        "action[:6] not:action[6]", STATE, "delta"),
    "austin_buds_dataset" + RLDS: Known(20, "image", "wrist_image", TEXT, INVERTED, STATE, "delta"),
    # Seven joint velocities come first, the end of the episode last.
    "nyu_franka_play_dataset" + RLDS: Known(3, "image", "", TEXT, "action[7:13] clip:action[13]", STATE, "delta"),
    "furniture_bench_dataset" + RLDS: Known(10, "image", "wrist_image", TEXT,
        "action[:3] euler:action[3:7] not:clip:action[7]", STATE, "delta"),
    # The catalog of these three names position and orientation, OpenVLA takes them as deltas: not known.
    "ucsd_kitchen_dataset" + RLDS: Known(2, "image", "", TEXT, "action[:7]", STATE),
    "dlr_edan_shared_control" + RLDS: Known(5, "image", "", TEXT, "action[:6] not:action[6]", STATE),
    "iamlab_cmu_pickup_insert" + RLDS: Known(20, "image", "wrist_image", TEXT,
        "action[:3] euler:action[3:7] action[7]", STATE),
    "austin_sailor_dataset" + RLDS: Known(20, "image", "wrist_image", TEXT, INVERTED, STATE, "delta"),
    "austin_sirius_dataset" + RLDS: Known(20, "image", "wrist_image", TEXT, INVERTED, STATE, "delta"),
    "utaustin_mutex": Known(20, "image", "wrist_image", TEXT, INVERTED, STATE, "delta"),
    # The gripper is in the state alone.
    "berkeley_fanuc_manipulation": Known(10, "image", "wrist_image", TEXT, "action[:6] not:observation/state[6]",
        STATE, "delta"),
    "cmu_stretch": Known(10, "image", "", TEXT, "action[:7]", STATE, "delta"),
    # The first of ten future waypoints; the rotation is an axis times its angle.
    "bc_z": Known(10, "image", "", NATURAL,
        "action/future/xyz_residual[:3] action/future/axis_angle_residual[:3] not:action/future/target_close[0]",
        "observation/present/xyz observation/present/axis_angle observation/present/sensed_close", "delta", True),
    "fmb": FMB,
    "fmb_dataset": FMB,
    # As OpenVLA made them: without steps that do nothing, and with images turned by 180 degrees.
    **{f"libero_{suite}_no_noops": LIBERO for suite in ("spatial", "object", "goal", "10", "90")},
    # A phone on a stick: the only camera is at the hand.
    "dobbe": Known(3.75, "wrist_image", "", TEXT, "action", STATE, "delta"),
    # Velocities of the end effector, in the robot's frame.
    "droid": Known(15, "exterior_image_1_left", "wrist_image_left", TEXT,
        "action_dict/cartesian_velocity not:action_dict/gripper_position",
        "observation/cartesian_position observation/gripper_position", "delta"),
}
# fmt: on


@dataclass(frozen=True)
class Part:
    """Some numbers of a step feature, or a constant, and the operations, first to last. width: of the feature."""

    key: str
    width: int
    start: int
    stop: int
    operations: tuple[str, ...] = ()

    @property
    def num(self) -> int:
        """How many numbers it gives."""
        return 3 if "euler" in self.operations else self.stop - self.start

    def __str__(self) -> str:
        before = "".join(f"{operation}:" for operation in reversed(self.operations))
        return f"{before}{self.key}[{self.start}:{self.stop}]"

    def of(self, values: Mapping[str, Float[np.ndarray, "T W"]], num_steps: int) -> Float[np.ndarray, "T D"]:
        """Its numbers, given the features."""
        if self.key in CONSTANTS:
            return np.full((num_steps, self.num), CONSTANTS[self.key], np.float32)
        numbers_TD = values[self.key][:, self.start : self.stop]
        for operation in self.operations:
            numbers_TD = OPERATIONS[operation](numbers_TD)
        return numbers_TD.astype(np.float32)


def columns(parts: str | Sequence[str], widths: Mapping[str, int]) -> list[Part]:
    """Returns the parts to concatenate, given how many numbers each feature has.

    Raises KeyError with the name of a feature that is not there, UserError for a malformed or too narrow part.
    """
    found = []
    for text in parts.split() if isinstance(parts, str) else parts:
        match = PART.fullmatch(text)
        if not match:
            raise UserError(f"{text!r}: {EXPECTED}")
        before, key, place, start, stop = match.groups()
        operations = tuple(reversed(before.split(":")[:-1]))
        if unknown := [name for name in operations if name not in OPERATIONS]:
            raise UserError(f"{text!r}: unknown operation {unknown[0]}; there are {', '.join(OPERATIONS)}")
        constant = key in CONSTANTS and not operations
        if constant and text.endswith("]") and place is None:
            raise UserError(f"{text!r}: {EXPECTED}")
        width = int(place or 1) if constant else widths[key]
        inside = range(width) if constant else _inside(width, place, start, stop)
        if not inside or ("euler" in operations and len(inside) != 4):
            raise UserError(f"{text!r}: {key} has {width} numbers a step")
        found.append(Part(key, width, inside.start, inside.stop, operations))
    if (num := sum(part.num for part in found)) > MAX_NUMBERS:
        raise UserError(f"{parts!r}: {num} numbers a step are no action or state; expected up to {MAX_NUMBERS}")
    return found


def _inside(width: int, place: str | None, start: str | None, stop: str | None) -> range:
    """Returns the indices that `[place]` or `[start:stop]` means; empty where the feature lacks any of them."""
    numbers = range(width)
    if any(not -width <= int(end) <= width for end in (place, start, stop) if end):
        return range(0)
    if place:
        return numbers[int(place) :][:1]
    return numbers[int(start) if start else None : int(stop) if stop else None]


def _open_from_moves(closing_TD: np.ndarray) -> np.ndarray:
    """Returns whether a gripper is open after each command; before the first its opposite, without any open."""
    opened = np.empty_like(closing_TD)
    for dim in range(closing_TD.shape[1]):
        commands = np.where(closing_TD[:, dim] > MOVES, 0.0, np.where(closing_TD[:, dim] < -MOVES, 1.0, np.nan))
        given = np.flatnonzero(~np.isnan(commands))
        state = 1.0 - commands[given[0]] if len(given) else 1.0
        latest = np.maximum.accumulate(np.where(np.isnan(commands), -1, np.arange(len(commands))))
        opened[:, dim] = np.where(latest >= 0, commands[latest], state)
    return opened


def _settled(opening_TD: np.ndarray) -> np.ndarray:
    """Returns the end that an opening moves to: the next value at an end; after the last such value, the nearer end."""
    settled = np.empty_like(opening_TD)
    for dim in range(opening_TD.shape[1]):
        state = float(opening_TD[-1, dim] > 0.5) if len(opening_TD) else 0.0
        for step in reversed(range(len(opening_TD))):
            opening = opening_TD[step, dim]
            if not SETTLED <= opening <= 1 - SETTLED:
                state = float(opening > 0.5)
            settled[step, dim] = state
    return settled


def _euler(quaternion_T4: np.ndarray) -> np.ndarray:
    x, y, z, w = (quaternion_T4 / np.maximum(np.linalg.norm(quaternion_T4, axis=1, keepdims=True), 1e-12)).T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(np.clip(2 * (w * y - z * x), -1, 1))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return np.stack([roll, pitch, yaw], axis=1)


OPERATIONS = {
    "not": lambda numbers: 1 - numbers,
    "clip": lambda numbers: np.clip(numbers, 0, 1),
    "moves": _open_from_moves,
    "settled": _settled,
    "euler": _euler,
}
