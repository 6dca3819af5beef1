"""A hand in place of Meta-World's robot, for videos of the same tasks by another embodiment; no motion changes.

    lapa data metaworld --tasks mt10 --embodiment hand --no-actions --out VIDEOS

The robot is transparent. The hand is drawn into the scene of each image: palm and wrist move with the gripper's base,
the thumb with one of its fingers, and four fingers with the other.

Axes of the gripper, in metres: x to the finger tips, y from the thumb to the fingers, z across the fingers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

SKIN = (0.93, 0.72, 0.55, 1.0)
BASE, THUMB, FINGERS = "hand", "rightclaw", "leftclaw"
PALM, PALM_RADII = (-0.085, 0.0, 0.0), (0.06, 0.032, 0.058)
WRIST = ((-0.12, -0.005, 0.0), (-0.18, -0.03, 0.0), 0.033)
# Across the palm, and how far each reaches beyond the gripper's finger: index, middle, ring and little finger.
SPREAD, REACH = (0.042, 0.014, -0.014, -0.042), (0.05, 0.065, 0.06, 0.04)
THUMB_REACH, THICK, THUMB_THICK = 0.035, 0.013, 0.015


def hide_robot(model: Any) -> None:
    """Makes the robot of a `mujoco.MjModel` transparent, in place."""
    robot = model.body_rootid == model.body(BASE).rootid
    model.geom_rgba[robot[model.geom_bodyid], 3] = 0
    model.site_rgba[robot[model.site_bodyid], 3] = 0


def draw_hand(scene: Any, data: Any) -> None:
    """Adds the hand to a `mujoco.MjvScene` that shows `data`, a `mujoco.MjData`."""
    import mujoco

    base, (capsule, ellipsoid) = data.body(BASE), (mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_ELLIPSOID)
    turn = base.xmat.reshape(3, 3)

    def add(kind: Any, size: Any, place: Any) -> Any:
        geom = scene.geoms[scene.ngeom]
        mujoco.mjv_initGeom(geom, kind, np.array(size), base.xpos + turn @ place, base.xmat, np.array(SKIN, np.float32))
        scene.ngeom += 1
        return geom

    add(ellipsoid, PALM_RADII, np.array(PALM))
    thumb, fingers = (float((turn.T @ (data.body(claw).xpos - base.xpos))[1]) for claw in (THUMB, FINGERS))
    for begin, end, radius in _bones(thumb, fingers):
        ends = [base.xpos + turn @ np.array(place) for place in (begin, end)]
        mujoco.mjv_connector(add(capsule, (radius,) * 3, np.zeros(3)), capsule, radius, *ends)


def _bones(thumb: float, fingers: float) -> Iterator[tuple[Any, Any, float]]:
    """Yields both ends and the radius of each bone. thumb, fingers: where the gripper's fingers are on the axis y."""
    yield WRIST
    for across, reach in zip(SPREAD, REACH, strict=True):
        knuckle, tip = (-0.05, 0.012, across), (reach, fingers, 0.8 * across)
        joint = (-0.01, fingers + 0.012, across)
        yield knuckle, joint, THICK
        yield joint, tip, THICK
    knuckle, joint, tip = (-0.08, -0.01, 0.03), (-0.03, thumb - 0.012, 0.035), (THUMB_REACH, thumb, 0.01)
    yield knuckle, joint, THUMB_THICK
    yield joint, tip, THUMB_THICK
