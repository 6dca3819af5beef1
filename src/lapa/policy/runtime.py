"""A trained policy that acts: observations in, robot actions out.

    policy = Policy.from_pretrained("POLICY")
    actions_BKA = policy.infer([Observation({"corner4": image_HWC}, "open the drawer")])

Axes: B batch, H W image, K chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from lapa.engine.distributed import pick_device
from lapa.policy.checkpoint import PolicyParts, load_policy
from lapa.types import Observation


class Policy:
    """A finetuned policy on a device. Its pictures pass through the same transform as in training."""

    def __init__(self, parts: PolicyParts, device: torch.device) -> None:
        self.model = parts.model.to(device).eval()
        self.inputs = parts.inputs
        self.device = device

    @classmethod
    def from_pretrained(cls, folder: Path | str, device: str = "auto") -> Policy:
        """Loads a policy folder. ValueError where it is unfinished, or was pretrained and never finetuned."""
        parts = load_policy(Path(folder))
        if parts.bins is None:
            raise ValueError(
                f"{folder}: only pretrained, it knows no robot actions; "
                f"run `lapa policy finetune --policy {folder} --data ROBOT_DATASET --out POLICY`"
            )
        return cls(parts, pick_device(device))

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that every observation must bring."""
        return self.model.config.cameras

    @property
    def chunk(self) -> int:
        """K, the time steps of actions that `infer` returns."""
        return self.model.config.chunk

    @property
    def action_dim(self) -> int:
        return self.model.config.action_dim

    def infer(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        """The next K actions for each observation, float32, in the robot's own units.

        Raises ValueError for a missing camera, an image that is not uint8 RGB, and a state that is not finite.
        """
        if not observations:
            return np.zeros((0, self.chunk, self.action_dim), dtype=np.float32)
        for number, observation in enumerate(observations):
            self._check(observation, number)
        batch = self.inputs.observed(
            [[observation.images[camera] for camera in self.cameras] for observation in observations],
            [observation.instruction for observation in observations],
        )
        bins_BKA = self.model.predict_actions({name: value.to(self.device) for name, value in batch.items()})
        assert self.inputs.bins is not None, "from_pretrained refuses a policy without bins"
        return self.inputs.bins.decode(bins_BKA.cpu().numpy())

    def _check(self, observation: Observation, number: int) -> None:
        missing = [camera for camera in self.cameras if camera not in observation.images]
        if missing:
            raise ValueError(
                f"observation {number} lacks the camera{'s' * (len(missing) > 1)} {', '.join(missing)} "
                f"(it brings {', '.join(observation.images) or 'none'}); this policy sees {', '.join(self.cameras)}"
            )
        for camera in self.cameras:
            image = observation.images[camera]
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
                raise ValueError(
                    f"observation {number}, camera {camera}: expected a uint8 image [H, W, 3], "
                    f"got {image.dtype} {list(image.shape)}"
                )
        if observation.state is not None and not np.isfinite(observation.state).all():
            raise ValueError(f"observation {number}: its state is not finite; mend the sensor's reading")
