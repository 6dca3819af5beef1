"""The square that the made-up videos show and that the made-up environment moves; numpy alone.

Axes: H W image, C channel.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

# Direction k points at k * 45 degrees, counted from the right, anticlockwise.
DIRECTIONS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
CAMERA = "front"
NOISE = 3.0  # Standard deviation of the pixel noise, of 255.


def heading(direction: int) -> Float[np.ndarray, "2"]:
    """The unit vector (right, down) of a direction."""
    angle = direction * np.pi / 4
    return np.array([np.cos(angle), -np.sin(angle)])


class Square:
    """A square and its ground. `start`, its first centre in pixels (right, down), leaves room for the whole `way`."""

    def __init__(self, rng: np.random.Generator, size: int, way: Float[np.ndarray, "2"]):
        """rng: draws place, colours and noise; size: of the picture; way: where it will go, in pixels (right, down)."""
        # Sizes and colours for which copying the first frame of `moving_squares` errs by 0.011 in mean square.
        self.size, self.half = size, 0.08 * size
        low, high = self.half + np.maximum(-way, 0), size - self.half - np.maximum(way, 0)
        self.start = rng.uniform(low, high)
        self._ground, self._colour, self._rng = rng.uniform(0, 138, 3), rng.uniform(117, 255, 3), rng

    def picture(self, centre: Float[np.ndarray, "2"]) -> UInt8[np.ndarray, "size size 3"]:
        """The square at a place, with new noise."""
        right, down = centre
        pixels = np.arange(self.size) + 0.5
        inside_HW = (np.abs(pixels[:, None] - down) < self.half) & (np.abs(pixels[None] - right) < self.half)
        picture_HWC = np.where(inside_HW[..., None], self._colour, self._ground)
        return (picture_HWC + self._rng.normal(0, NOISE, picture_HWC.shape)).clip(0, 255).astype(np.uint8)
