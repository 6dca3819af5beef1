"""The expert: walks behind the block and pushes it straight to the goal.

What it does depends on where stick, block and goal are now, and on nothing before, so that a policy can learn it from
one image. The authors' oracle follows plans that no image shows (RRT*), in two to four times as many steps.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

# Metres. A step is at most LONGEST_STEP; the authors' oracle moves as far.
LONGEST_STEP = 0.03
# The stick walks this far from the block's centre, and never nearer than TOO_CLOSE unless it pushes.
AROUND = 0.06
TOO_CLOSE = 0.045
# From this far behind the block no straight way to its start touches the block.
BEHIND = 0.05
# It pushes from between NEAREST and FURTHEST behind the block's centre, at most BESIDE to the side.
NEAREST, FURTHEST, BESIDE = 0.01, 0.075, 0.012
PUSH, LONGEST_PUSH = 0.02, 0.025


def push(
    stick_2: Float[np.ndarray, "2"], block_2: Float[np.ndarray, "2"], goal_2: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "2"]:
    """Returns the stick's next movement in metres, from three positions on the table in metres."""
    ahead_2 = _unit(goal_2 - block_2)
    stick_from_block_2 = stick_2 - block_2
    along = float(stick_from_block_2 @ ahead_2)
    beside_2 = stick_from_block_2 - along * ahead_2
    if -FURTHEST < along < -NEAREST and np.linalg.norm(beside_2) < BESIDE:
        return _at_most(PUSH * ahead_2 - 0.8 * beside_2, LONGEST_PUSH)
    to_start_2 = block_2 - AROUND * ahead_2 - stick_2
    length = float(np.linalg.norm(to_start_2))
    nearest_2 = to_start_2 * np.clip(-stick_from_block_2 @ to_start_2 / max(length, 1e-9) ** 2, 0, 1)
    if along <= -BEHIND or np.linalg.norm(stick_from_block_2 + nearest_2) >= TOO_CLOSE:
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
