"""Another rendering of Language Table: camera and colours drawn from a number; no motion changes.

    lapa data language-table --families all --look 1 --no-actions --out VIDEOS

The blocks keep their colours, by which instructions name them.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np

# The middle of the board, about which the camera turns, in metres.
CENTRE = (0.375, 0.0, 0.0)
# Degrees by which it turns about the vertical axis, to either side, and metres by which it rises.
TURN, RISE = (15, 30), (0.0, 0.1)


def change_look(simulator: Any, look: int) -> None:
    """Changes camera and colours of a simulator, in place. The same number gives the same look."""
    rng = np.random.default_rng(look)
    angle = np.deg2rad(rng.uniform(*TURN)) * rng.choice([-1, 1])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    place = np.array(CENTRE) + turn @ (np.array(simulator._camera_pose) - CENTRE)
    simulator._camera_pose = (place[0], place[1], place[2] + rng.uniform(*RISE))
    roll, pitch, yaw = simulator._camera_orientation
    simulator._camera_orientation = (roll, pitch, yaw + angle)
    client = simulator._pybullet_client
    for number in range(client.getNumBodies()):
        body, colour = client.getBodyUniqueId(number), colorsys.hsv_to_rgb(*rng.uniform((0, 0.1, 0.3), (1, 0.5, 0.9)))
        if body not in simulator._block_ids:
            for link in range(-1, client.getNumJoints(body)):
                client.changeVisualShape(body, link, rgbaColor=(*colour, 1))
