"""The objects that cross from one room to another, and the legend of axes.

Axes: B batch, T time, C channel, H W image, N image tokens, L latent action length, D width,
K action chunk, A action dimensions, S state dimensions.
A tensor carries its axes in its name where that helps: `frames_BTCHW`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, UInt8


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one instant.

    images: camera name -> RGB picture, uint8, any size (the policy's own transform resizes it).
    instruction: the task in words; may be empty.
    state: proprioception in the robot's own units, or None.
    """

    images: Mapping[str, UInt8[np.ndarray, "H W 3"]]
    instruction: str
    state: Float[np.ndarray, "S"] | None = None


@dataclass(frozen=True)
class Losses:
    """What a model's forward returns in training: the scalar to minimise, and its named parts for the log.

    `loss` is a scalar torch.Tensor with gradient; `parts` are scalar torch.Tensors, detached.
    (Typed loosely because this module must import without torch.)
    """

    loss: object
    parts: Mapping[str, object] = field(default_factory=dict)
