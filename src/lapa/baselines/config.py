"""Options of `lapa baseline`, and sizes of the baselines' models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lapa.config import ReportOptions
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.errors import UserError
from lapa.nn.config import tower_grid

# Groups of the video model's group norms.
NORM_GROUPS = 8


@dataclass(frozen=True)
class InverseConfig:
    """Sizes of the inverse dynamics model, and the horizon between its two frames; the defaults are preset `tiny`."""

    image_size: int = 64
    """Side of the square images that it takes, in pixels."""
    horizon_seconds: float = 0.1
    """Seconds between the two frames."""
    vision_widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of the residual network's stages; each after the first halves the grid."""
    vision_depth: int = 2
    """Residual blocks a stage."""
    width: int = 256
    """Width of the MLP."""
    augment: bool = True
    """Shift both frames alike, and change their colours alike, while training."""

    @property
    def grid(self) -> int:
        """Side of the grid of features."""
        return tower_grid(self.image_size, self.vision_widths)

    def __post_init__(self) -> None:
        assert self.grid
        if self.horizon_seconds <= 0:
            raise UserError(f"horizon is {self.horizon_seconds} seconds; it must be above 0")


@dataclass(frozen=True)
class VideoConfig:
    """Sizes of the video model; the defaults are preset `tiny`."""

    image_size: int = 64
    """Height and width of the frames in pixels."""
    num_frames: int = 2
    """Future frames that are predicted at once, each one horizon after the last."""
    horizon_seconds: float = 0.1
    """Seconds between the frames."""
    patch_size: int = 4
    """The network takes patches of this side as channels: 4 is sixteen times faster than 1, and coarser."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the network's levels; each after the first halves the grid. The last attends to the text."""
    depth: int = 1
    """Residual blocks a level."""
    heads: int = 4
    text_width: int = 64
    text_layers: int = 1
    drop_instruction: float = 0.1
    """Share of the training samples without an instruction, for guidance at sampling."""

    def __post_init__(self) -> None:
        stride = self.patch_size * 2 ** (len(self.widths) - 1)
        if self.image_size % stride:
            raise UserError(f"image size {self.image_size} is not a multiple of the video model's stride {stride}")
        if self.text_width % self.heads or self.widths[-1] % self.heads or any(w % NORM_GROUPS for w in self.widths):
            raise UserError(
                f"widths {self.widths} must be multiples of {NORM_GROUPS}; the last of them and the text's width "
                f"{self.text_width} must be multiples of the {self.heads} heads"
            )
        if self.num_frames < 1 or self.horizon_seconds <= 0:
            raise UserError(f"{self.num_frames} frames {self.horizon_seconds:g} s apart: both must be above 0")


@dataclass(frozen=True)
class TrainingOptions(ReportOptions):
    """Options that the two trainings share."""

    data: tuple[str, ...]
    """Datasets to learn from: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`."""
    out: Path
    """Folder of the model to write."""
    preset: str = "tiny"
    """debug, tiny or base: the values that the other options start from."""
    camera: str | None = None
    """Camera to learn from, by default the first of a dataset."""
    held_out: float = 0.1
    """Share of the episodes kept for evaluation; 0: none."""
    cache_gib: float = 4.0
    """Keep decoded frames in memory up to this size; training and held-out episodes have this much each."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


@dataclass(frozen=True)
class InverseTrainConfig(TrainingOptions):
    """Train an inverse dynamics model, which predicts the robot's actions between two frames, on robot episodes."""

    model: Annotated[InverseConfig, tyro.conf.arg(name="")] = field(default_factory=InverseConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01))
    )


@dataclass(frozen=True)
class VideoTrainConfig(TrainingOptions):
    """Train a video model, which predicts the frames after one frame and an instruction, on videos without actions."""

    start: Path | None = None
    """A trained video model to go on from, with its sizes and horizon."""
    model: Annotated[VideoConfig, tyro.conf.arg(name="")] = field(default_factory=VideoConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: LoopConfig(
            steps=1500, batch_size=32, optim=OptimConfig(lr=1e-3, weight_decay=0.01), ema_decay=0.995, eval_every=500
        )
    )


@dataclass(frozen=True)
class PseudoLabelConfig:
    """Write a dataset of the same videos with the actions that an inverse dynamics model predicts for them."""

    inverse: Path
    """Folder of the inverse dynamics model."""
    data: str
    """Dataset whose videos to label; its actions and states are not read:
    [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`."""
    out: Path
    """Folder of the dataset to write."""
    camera: str | None = None
    """Camera to label from; by default the only one of the dataset, or else the one that the model learned from."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Accept what `out` holds where it is finished; else begin it again."""


@dataclass(frozen=True)
class ShuffleLabelsConfig:
    """Write the labels of a dataset with each frame's codes exchanged for another frame's, drawn at random."""

    labels: tyro.conf.Positional[Path]
    """Folder of labels."""
    out: Path
    """Folder of the labels to write."""
    seed: int = 0
    """Which codes each frame has."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True)
class UniPiConfig:
    """Join a video model and an inverse dynamics model into a policy that `lapa evaluate` takes."""

    video: Path
    """Folder of a video model."""
    inverse: Path
    """Folder of an inverse dynamics model, of the same horizon and image size."""
    out: Path
    """Folder of the policy to write."""
    sampling_steps: int = 8
    """Denoising steps of a plan, 1 to 1000."""
    guidance: float = 1.0
    """How far a plan follows the instruction: 1 as the video model learned it, above 1 beyond, 0 not at all."""
    overwrite: bool = False
    """Replace what `out` holds."""
