"""The expert: walks behind the block and pushes it straight to the goal.

What it does depends on where stick, block and goal are now, and on nothing before, so that a policy can learn it. The
goal of block2relative alone is not to be seen later: it is a distance from where the block began. The authors' oracle
follows plans that no image shows (RRT*), in two to four times as many steps.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

# Metres. A step is at most LONGEST_STEP.
LONGEST_STEP = 0.03
# The stick walks around the block at this distance from its centre; a straight way nearer than TOO_CLOSE touches it.
AROUND = 0.06
TOO_CLOSE = 0.045
# It pushes from a lane behind the block: between these distances from its centre, and at most LANE to the side. In
# contact the lane is wider, so that the stick does not turn back at once.
NEAREST, FURTHEST, CONTACT = 0.01, 0.075, 0.045
LANE, LANE_IN_CONTACT = 0.012, 0.018
PUSH, LONGEST_PUSH = 0.02, 0.025


def push(
    stick_2: Float[np.ndarray, "2"],
    block_2: Float[np.ndarray, "2"],
    goal_2: Float[np.ndarray, "2"],
    bounds_22: Float[np.ndarray, "2 2"],
) -> Float[np.ndarray, "2"]:
    """Returns the stick's next movement, from three positions on the table, and its own lowest and highest; metres.

    The movement may lead out of these bounds.
    """
    ahead_2 = _unit(goal_2 - block_2)
    stick_from_block_2 = stick_2 - block_2
    along = float(stick_from_block_2 @ ahead_2)
    beside_2 = stick_from_block_2 - along * ahead_2
    to_start_2 = np.clip(block_2 - AROUND * ahead_2, *bounds_22) - stick_2
    length = float(np.linalg.norm(to_start_2))
    lane = LANE_IN_CONTACT if along > -CONTACT else LANE
    if (-FURTHEST < along < -NEAREST and np.linalg.norm(beside_2) < lane) or length < 0.005:
        return _at_most(PUSH * ahead_2 - 1.2 * beside_2, LONGEST_PUSH)
    nearest_2 = to_start_2 * np.clip(-stick_from_block_2 @ to_start_2 / max(length, 1e-9) ** 2, 0, 1)
    if np.linalg.norm(stick_from_block_2 + nearest_2) >= TOO_CLOSE:
        return _at_most(to_start_2, LONGEST_STEP)
    # The straight way would touch the block: around it, on the shorter side.
    outwards_2 = _unit(stick_from_block_2)
    aside_2 = np.array([-outwards_2[1], outwards_2[0]])
    if aside_2 @ ahead_2 > 0:
        aside_2 = -aside_2
    correction = np.clip(AROUND - np.linalg.norm(stick_from_block_2), -LONGEST_STEP, LONGEST_STEP)
    return _at_most(LONGEST_STEP * aside_2 + correction * outwards_2, LONGEST_STEP)


def _unit(vector_2: Float[np.ndarray, "2"]) -> Float[np.ndarray, "2"]:
    return vector_2 / max(float(np.linalg.norm(vector_2)), 1e-9)


def _at_most(move_2: Float[np.ndarray, "2"], length: float) -> Float[np.ndarray, "2"]:
    return move_2 * min(1.0, length / max(float(np.linalg.norm(move_2)), 1e-9))
