"""A trained policy that acts: observations in, robot actions out.

    policy = Policy.from_pretrained("POLICY")                    # statistics_key="bridge" where it has several
    actions_BKA = policy.infer([Observation({"corner4": image_HWC}, "open the drawer")])

Axes: B batch, H W image, K chunk, A action dimensions, S state dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from lapa.data.dataset import ActionSpace
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.files import errors_about
from lapa.policy.checkpoint import PolicyParts, load_policy
from lapa.types import Observation


class Policy:
    """A finetuned policy on a device. Its pictures pass through the same transform as in training.

    dataset: whose prompt it reads, for a policy that learned from several; by default its own.
    """

    def __init__(
        self,
        parts: PolicyParts,
        device: torch.device,
        dataset: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        if dataset is not None:
            parts.model.config.prompts.require(dataset)
        self.model = parts.model.to(device=device, dtype=dtype).eval()
        if compile:
            self.model.backbone.compile_steps()
        self.inputs = parts.inputs
        self.device = device
        self.dataset = dataset

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str = "auto",
        dataset: str | None = None,
        *,
        statistics_key: str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> Policy:
        """Loads a policy folder. UserError where it is unfinished, or was pretrained and never finetuned.

        statistics_key: the dataset whose statistics it acts by, where it learned from several.
        dtype: of the weights; by default as they were saved, and bfloat16 on a GPU, where policies are trained so.
        compile: decode through torch.compile, on a GPU as CUDA graphs; the first calls take long.
        """
        parts = load_policy(Path(folder))
        if not parts.acts:
            raise UserError(
                f"{folder}: only pretrained, it knows no robot actions; "
                f"run `lapa policy finetune --policy {folder} --data ROBOT_DATASET --out POLICY`"
            )
        with errors_about(Path(folder)):
            parts = parts.under(statistics_key)
        where = pick_device(device)
        if dtype is None and where.type == "cuda":
            dtype = torch.bfloat16
        return cls(parts, where, dataset, dtype=dtype, compile=compile)

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

    @property
    def state_dim(self) -> int:
        """Dimensions of the state that every observation must bring; 0: none is needed."""
        return self.model.config.state_dim

    @property
    def action_space(self) -> ActionSpace:
        """What the actions mean: names, which dimensions are binary, delta or absolute control."""
        space = self.model.config.action_space
        assert space is not None, "from_pretrained refuses a policy without actions"
        return space

    def infer(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        """The next K actions for each observation, float32, in the robot's own units.

        Raises UserError for a missing camera, an image that is not uint8 RGB, and a state that is missing, of
        another width or not finite.
        """
        if not observations:
            return np.zeros((0, self.chunk, self.action_dim), dtype=np.float32)
        for number, observation in enumerate(observations):
            check_observation(observation, number, self.cameras, self.state_dim)
        batch = self.inputs.observed(
            [[observation.images[camera] for camera in self.cameras] for observation in observations],
            [observation.instruction for observation in observations],
            [observation.state for observation in observations if observation.state is not None],
            [self.dataset] * len(observations),
        )
        said_BKA = self.model.predict_actions({name: value.to(self.device) for name, value in batch.items()})
        assert self.inputs.codec is not None, "from_pretrained refuses a policy without actions"
        return self.inputs.codec.decode(said_BKA.cpu().numpy())


def check_observation(observation: Observation, number: int, cameras: Sequence[str], state_dim: int) -> None:
    """UserError saying what is wrong with the `number`-th observation.

    cameras, state_dim: what the policy sees, and how many numbers of state it is told.
    """
    missing = [camera for camera in cameras if camera not in observation.images]
    if missing:
        raise UserError(
            f"observation {number} lacks the camera{'s' * (len(missing) > 1)} {', '.join(missing)} "
            f"(it brings {', '.join(observation.images) or 'none'}); this policy sees {', '.join(cameras)}"
        )
    for camera in cameras:
        image = np.asarray(observation.images[camera])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise UserError(
                f"observation {number}, camera {camera}: expected a uint8 image [H, W, 3], "
                f"got {image.dtype} {list(image.shape)}"
            )
    if not isinstance(observation.instruction, str):
        raise UserError(f"observation {number}: its instruction is {observation.instruction!r}; give text, or ''")
    state = observation.state
    if state is not None and not np.issubdtype(np.asarray(state).dtype, np.number):
        raise UserError(f"observation {number}: its state is {np.asarray(state).dtype}, not numbers")
    if state is not None and not np.isfinite(state).all():
        raise UserError(f"observation {number}: its state is not finite; mend the sensor's reading")
    if state_dim and (state is None or np.shape(state) != (state_dim,)):
        brought = "no state" if state is None else f"a state of shape {np.shape(state)}"
        raise UserError(f"observation {number} brings {brought}; this policy is told {state_dim} numbers")
