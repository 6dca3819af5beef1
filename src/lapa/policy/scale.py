"""Robot actions on a common scale: what the heads that give real numbers learn and say.

Each dimension's 1st to 99th percentile becomes [-1, 1], as in OpenVLA and OpenVLA-OFT (https://arxiv.org/abs/2502.19645),
so that no stray recording squeezes the rest; what lies beyond is clamped, on the way in and on the way out, so that a
policy never asks the robot for more than that. Where both percentiles are one value, the whole range takes their
place. A constant dimension becomes 0 and decodes to its value. The two values of a binary dimension become -1 and 1;
it decodes to exactly one of them, by sign.

    scale = ActionScale.fit(actions_TA, binary=dataset.action_space.binary)
    scale.decode(scale.encode(actions_TA))

Axes: T time, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from lapa.policy.actions import (
    checked_actions,
    count_outside,
    load_arrays,
    middle,
    require_finite,
    require_width,
    save_arrays,
    two_values,
)

PERCENTILES = (1, 99)
ARRAYS = ("scale_low", "scale_high", "scale_binary")


@dataclass(frozen=True, eq=False)
class ActionScale:
    """The scale of A action dimensions.

    low_A, high_A: what becomes -1 and 1, float32. binary_A: the dimensions that take no other value.
    """

    low_A: Float[np.ndarray, "A"]
    high_A: Float[np.ndarray, "A"]
    binary_A: Bool[np.ndarray, "A"]

    @classmethod
    def fit(cls, actions_TA: Float[np.ndarray, "T A"], binary: Sequence[bool] = ()) -> ActionScale:
        """The scale of the given actions.

        binary: one flag a dimension, as the dataset declares them; none given: none is. UserError for NaN, no
        actions, and a dimension that is declared binary and is not.
        """
        actions_TA, binary = checked_actions(actions_TA, binary)
        ranges = [
            two_values(values_T, dimension) if binary[dimension] else _usual_range(values_T)
            for dimension, values_T in enumerate(actions_TA.T)
        ]
        low_A, high_A = np.array(ranges, dtype=np.float32).T.copy()
        return cls(low_A, high_A, np.array(binary))

    @property
    def action_dim(self) -> int:
        return len(self.low_A)

    def encode(self, actions: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Actions as numbers in [-1, 1], float32. UserError for NaN or wrong width."""
        actions = self._checked(actions)
        low_A, span_A = self.low_A.astype(np.float64), self._span_A
        scaled = np.where(span_A > 0, 2 * (actions - low_A) / np.where(span_A > 0, span_A, 1) - 1, 0)
        sides = np.where(actions < self._middle_A, -1, 1) * (span_A > 0)
        return np.where(self.binary_A, sides, np.clip(scaled, -1, 1)).astype(np.float32)

    def decode(self, scaled: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Numbers as actions in the robot's units, float32; beyond [-1, 1] clamped. UserError for NaN, wrong width."""
        scaled = self._checked(scaled)
        share = (np.clip(scaled, -1, 1) + 1) / 2
        actions = (1 - share) * self.low_A + share * self.high_A
        sides = np.where(scaled < 0, self.low_A, self.high_A)
        return np.where(self.binary_A, sides, actions).astype(np.float32)

    def count_outside(self, actions: Float[np.ndarray, "*T A"]) -> Int[np.ndarray, "A"]:
        """How many values of each dimension lie beyond what becomes -1 and 1, and so are clamped by `encode`."""
        return count_outside(actions, self.low_A, self.high_A)

    def clamp(self, scaled: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """As they are: `decode` takes any number."""
        return scaled

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved, by name."""
        return dict(zip(ARRAYS, (self.low_A, self.high_A, self.binary_A), strict=True))

    def save(self, path: Path) -> None:
        """Writes the arrays as safetensors, atomically."""
        save_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: Path, key: str | None = None) -> ActionScale:
        """Reads what `save` wrote, or one of several that `lapa.policy.statistics` wrote.

        UserError naming the file where it is missing or something else.
        """
        return cls(*load_arrays(path, ARRAYS, "action scales", key).values())

    def _checked(self, values: np.ndarray) -> np.ndarray:
        """In double precision: then both ends come back exactly, and no span of float32 numbers overflows."""
        values = np.asarray(values, dtype=np.float64)
        require_width(values, self.action_dim)
        require_finite(values)
        return values

    @property
    def _span_A(self) -> Float[np.ndarray, "A"]:
        return self.high_A.astype(np.float64) - self.low_A

    @property
    def _middle_A(self) -> Float[np.ndarray, "A"]:
        return np.array([middle(low, high) for low, high in zip(self.low_A, self.high_A, strict=True)])


def _usual_range(values_T: Float[np.ndarray, "T"]) -> tuple[float, float]:
    low, high = np.percentile(values_T.astype(np.float64), PERCENTILES)
    return (float(low), float(high)) if low < high else (float(values_T.min()), float(values_T.max()))
