"""The config of a LAPA policy in LeRobot: `--policy.type=lapa`, and its optimizer and learning rate as in lapa."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from lapa import presets
from lapa.engine.config import OptimConfig
from lapa.engine.optim import learning_rate
from lapa.errors import UserError, unknown
from lapa.policy.config import FinetuneConfig, HeadKind
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

DTYPES = ("float32", "bfloat16")


@LRSchedulerConfig.register_subclass("lapa")
@dataclass
class LapaSchedulerConfig(LRSchedulerConfig):
    """The learning rate of `lapa policy finetune`: a warm-up, then to a tenth along a cosine, or constant."""

    num_warmup_steps: int | None = 100
    schedule: str = "cosine"

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        shape = OptimConfig(lr=1.0, warmup_steps=self.num_warmup_steps or 0, schedule=self.schedule)  # type: ignore[arg-type]
        return LambdaLR(optimizer, lambda step: learning_rate(shape, step, num_training_steps))


@PreTrainedConfig.register_subclass("lapa")
@dataclass
class LapaConfig(PreTrainedConfig):
    """Options of a LAPA policy.

    A folder of `lapa export lerobot` (`--policy.path`) has chunk_size, head and state of its own. Without one, a new
    policy is made for the dataset: from the pretrained policy `start`, or from nothing.
    """

    chunk_size: int = 5
    """Time steps of actions that the policy predicts at once."""
    n_action_steps: int | None = None
    """How many of them are executed before the next prediction; by default all."""
    head: str = "bins"
    """How actions are predicted: bins, chunk or flow."""
    state: bool = False
    """Whether the policy reads observation.state."""
    start: str | None = None
    """Of a new policy: folder of a policy of `lapa policy pretrain` to start from."""
    preset: str = "tiny"
    """Of a new policy: preset of `lapa policy finetune` with its sizes and its optimizer."""
    cameras: list[str] = field(default_factory=list)
    """Of a new policy: cameras for its image slots, in order; by default those of `start`, or all of the dataset."""
    freeze_vision: bool = False
    """Do not train the vision tower."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    dtype: str = "float32"
    """bfloat16: train and act under autocast; the weights keep their own precision."""
    optimizer_lr: float | None = None
    """Peak learning rate; this and the following by default as in the run that made the policy, or in the preset."""
    optimizer_betas: tuple[float, float] | None = None
    optimizer_weight_decay: float | None = None
    optimizer_grad_clip_norm: float | None = None
    scheduler_warmup_steps: int | None = None
    scheduler: str | None = None
    """After the warm-up: cosine to a tenth of the peak, or constant."""
    action_feature_names: list[str] | None = None
    """Names of the action dimensions."""
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )
    """None: the policy holds its own statistics."""

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    @property
    def finetuning(self) -> FinetuneConfig:
        """The preset of `lapa policy finetune`. Raises UserError with the nearest known name."""
        options: FinetuneConfig = presets.named("finetune", self.preset)
        return options

    def get_optimizer_preset(self) -> AdamWConfig:
        optim = self.finetuning.loop.optim
        return AdamWConfig(
            lr=_given(self.optimizer_lr, optim.lr),
            betas=_given(self.optimizer_betas, optim.betas),
            weight_decay=_given(self.optimizer_weight_decay, optim.weight_decay),
            grad_clip_norm=_given(self.optimizer_grad_clip_norm, optim.clip),
        )

    def get_scheduler_preset(self) -> LapaSchedulerConfig:
        optim = self.finetuning.loop.optim
        return LapaSchedulerConfig(
            num_warmup_steps=_given(self.scheduler_warmup_steps, optim.warmup_steps),
            schedule=_given(self.scheduler, optim.schedule),
        )

    def validate_features(self) -> None:
        """Raises UserError where an option is unknown, or there is no camera, no action or no state to read."""
        if self.head not in get_args(HeadKind):
            raise unknown("--policy.head", self.head, get_args(HeadKind))
        if self.dtype not in DTYPES:
            raise unknown("--policy.dtype", self.dtype, DTYPES)
        if self.chunk_size < 1:
            raise UserError(f"--policy.chunk_size is {self.chunk_size}; it must be at least 1")
        if self.n_action_steps is not None and not 1 <= self.n_action_steps <= self.chunk_size:
            raise UserError(
                f"--policy.n_action_steps is {self.n_action_steps}; a chunk has {self.chunk_size} actions to execute"
            )
        if not self.image_features:
            raise UserError("a lapa policy needs at least one camera, observation.images.NAME; the inputs have none")
        if self.action_feature is None:
            raise UserError("a lapa policy predicts the feature `action`; the outputs have none")
        if self.state and self.robot_state_feature is None:
            raise UserError("--policy.state: the inputs have no observation.state; leave the option out")


def _given[T](value: T | None, default: T) -> T:
    return default if value is None else value
