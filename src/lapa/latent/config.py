"""Options of a latent action model and of the commands `lapa latent ...`; imports nothing heavy.

lapa latent train --help
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lapa.config import ReportOptions
from lapa.data.config import LARGEST_CODE, MixBy
from lapa.engine.config import LoopConfig
from lapa.errors import UserError

LARGEST_LEVELS = 16
FACTORS = range(8, 1, -1)


@dataclass(frozen=True)
class LatentModelConfig:
    """Shape and options of a latent action model. The defaults are the paper's sizes in the clean layout."""

    image_size: int = 256
    """Height and width of the frames, in pixels."""
    patch_size: int = 32
    """Height and width of one patch, in pixels; a patch is a token."""
    patch_norm: bool = True
    """Normalise the pixels of each patch (paper), which hides its brightness and contrast from the model."""
    dim: int = 1024
    """Width of the tokens."""
    spatial_depth: int = 8
    """Layers of attention over patches, in the encoder and in the decoder."""
    temporal_depth: int = 8
    """Layers of attention over time, in the encoder."""
    heads: int = 16
    """Attention heads."""
    dim_head: int = 64
    """Width of one attention head."""
    latent_length: int = 4
    """Codes of one latent action."""
    codebook_size: int = 8
    """Number of values of a code."""
    quant_dim: int = 32
    """Width of a latent before quantisation."""
    quantizer: Literal["nsvq", "vq", "fsq", "continuous"] = "nsvq"
    """nsvq: noise substitution (paper); vq: moving averages; fsq: finite scalar quantisation; continuous: no codes."""
    standardize_z: bool = False
    """Bring latents to zero mean and unit variance before quantisation."""
    predict: Literal["frame", "change"] = "frame"
    """Whether the decoder predicts the second frame or its difference from the first."""
    action_input: Literal["attend", "attend_and_add"] = "attend"
    """How the decoder reads the latent action: by cross-attention, or also added to every token."""
    error: Literal["plain", "relative"] = "plain"
    """Mean squared error of all pairs, or that of each pair relative to its change, so that few large changes do not
    own the loss."""
    inputs: Literal["pixels", "features", "both"] = "pixels"
    """Input of the encoder: pixels, or the frozen features of vision_tower."""
    targets: Literal["pixels", "features", "both"] = "pixels"
    """Target of the decoder: pixels, or the frozen features of vision_tower."""
    vision_tower: str | None = None
    """Hub id or local folder of a vision model of transformers (DINOv2, DINOv3, SigLIP)."""
    augment: bool = False
    """Train on random crops and colours, the same for both frames of a pair."""
    action_dim: Annotated[int, tyro.conf.Suppress] = 0
    """Dimensions of the true actions that supervise the latent; set from the datasets by --action-share."""
    layout: Annotated[Literal["clean", "released"], tyro.conf.Suppress] = "clean"
    """released: with the quirks of the published weights; set by `lapa import laq`."""
    horizon_seconds: float = 0.6
    """Seconds between the two frames of a training pair."""
    # No options, kept for models that were saved with other values.
    fsq_levels: Annotated[tuple[int, ...] | None, tyro.conf.Suppress] = None
    """Levels of each scalar of fsq, whose product is codebook_size; None: `levels` derives them."""
    commitment_weight: Annotated[float, tyro.conf.Suppress] = 0.25
    """Weight of the loss that pulls latents to their codes, of vq."""
    kl_weight: Annotated[float, tyro.conf.Suppress] = 1e-4
    """Weight of the divergence from the unit normal, of continuous."""
    feature_weight: Annotated[float, tyro.conf.Suppress] = 0.01
    """Weight of the features' error where pixels are a target too; features have unit scale."""
    action_weight: Annotated[float, tyro.conf.Suppress] = 0.1
    """Weight of the error of the true action, in units of its variance."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}; choose one that does"
            )
        if self.latent_length < 1 or self.codebook_size < 2:
            raise UserError(
                f"latent_length {self.latent_length} and codebook_size {self.codebook_size} carry no information; "
                "give at least 1 code of at least 2 values"
            )
        for name in ("codebook_size", "latent_length"):
            if getattr(self, name) > LARGEST_CODE:
                raise UserError(f"{name} must be at most {LARGEST_CODE:,}")
        if math.prod(self.levels) != self.codebook_size or min(self.levels) < 2:
            raise UserError(f"fsq_levels {self.levels} do not make codebook_size {self.codebook_size}")
        if max(self.latent_shape) > self.grid:
            rows, columns = self.latent_shape
            raise UserError(
                f"latent_length {self.latent_length} is laid out as {rows} x {columns} codes, which does not fit the "
                f"{self.grid} x {self.grid} patches; choose another length or a smaller patch_size"
            )
        if self.uses_features and self.vision_tower is None:
            raise UserError(
                f"inputs={self.inputs}, targets={self.targets} need a vision tower: add --vision-tower, "
                "such as facebook/dinov2-small or a folder"
            )
        if self.vision_tower is not None and not self.uses_features:
            raise UserError("--vision-tower is given but not used: add --inputs features or --targets features")
        if self.layout == "released" and not self.patch_norm:
            raise UserError("layout released reads pixels normalised patch by patch; use layout clean otherwise")
        if self.layout == "released" and self.uses_features:
            if (self.inputs, self.targets, self.predict, self.action_input) != (
                "features",
                "features",
                "frame",
                "attend",
            ):
                raise UserError(
                    "layout released with a vision tower has features in and out; use layout clean otherwise"
                )
            if self.kernels is None:
                raise UserError(
                    f"layout released with {self.grid} x {self.grid} patches makes "
                    f"{', '.join(map(str, sorted(strided_lengths(self.grid))))} codes, not {self.latent_length}"
                )

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    @property
    def uses_features(self) -> bool:
        """Whether a vision tower is part of the model."""
        return self.inputs != "pixels" or self.targets != "pixels"

    @property
    def kernels(self) -> tuple[int, ...] | None:
        """Kernels of the strided convolutions that make the latents, of LAPA-DINO alone."""
        released = self.layout == "released" and self.uses_features
        return strided_lengths(self.grid).get(self.latent_length) if released else None

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of each scalar of FSQ: codebook_size in factors of at most 16 where it has them."""
        if self.fsq_levels is not None:
            return self.fsq_levels
        levels, rest = [], self.codebook_size
        while rest > LARGEST_LEVELS and (factor := next((f for f in FACTORS if rest % f == 0), None)):
            levels.append(factor)
            rest //= factor
        return (*levels, rest)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns of the codes: the most nearly square factors of latent_length, rows first."""
        columns = max(n for n in range(1, int(self.latent_length**0.5) + 1) if self.latent_length % n == 0)
        return self.latent_length // columns, columns


def strided_lengths(grid: int) -> dict[int, tuple[int, ...]]:
    """Returns the lengths of a latent action that LAPA-DINO makes of a square grid of patches, and how.

    Each length is that of one or two convolutions of stride 2 and padding 1, with these kernels.
    """
    half = (grid + 1) // 2
    return {half**2: (3,), (grid // 2 + 1) ** 2: (2,), ((half + 1) // 2) ** 2: (3, 3)}


@dataclass(frozen=True)
class LatentTrainConfig(ReportOptions):
    """Train a latent action model on one or more datasets. No actions are needed."""

    data: tuple[str, ...]
    """Datasets to learn from: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`. The key
    horizon=SECONDS sets the horizon of one."""
    out: Path
    """Folder of the latent action model to write."""
    preset: str = "tiny"
    """debug, tiny, base, dino or paper: the defaults of all other options."""
    model: Annotated[LatentModelConfig, tyro.conf.arg(name="")] = field(default_factory=LatentModelConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=LoopConfig)
    camera: str | None = None
    """Camera to read; by default each dataset's first."""
    held_out: float = 0.1
    """Fraction of the episodes kept from training, for evaluation."""
    action_share: float = 0.0
    """Fraction of the episodes with actions whose true actions supervise the latent; 0 for none."""
    mix_by: MixBy = "frames"
    """Datasets are drawn in proportion to weight times frames (pairs), to weight times episodes, or to weight alone."""
    min_motion: float = 0.0
    """Leave out training pairs that change less than this: 0.005 is noise, 0.05 an object of a fiftieth that moves."""
    cache_gib: float = 4.0
    """Keep decoded frames in memory where they fit into this much, training and validation split each."""
    overwrite: bool = False
    """Replace the contents of `out`."""
    resume: bool = False
    """Continue the run in `out`."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(ReportOptions):
    """Options that `lapa latent probe` and `lapa latent compare` share."""

    data: str
    """Dataset to measure on: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT]; see `lapa data --help`.
    If it has actions, regressions to them are fitted."""
    num_pairs: int = 4000
    """Pairs drawn from the dataset."""
    camera: str | None = None
    """Camera to read; by default the dataset's first."""
    seed: int = 0
    """Seed of the drawn pairs, the test episodes and the MLP."""
    motion: bool = False
    """Also fit regressions to optical flow, which stands for the true action of videos; needs lapa-vla[motion]."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the contents of `out`."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(MeasureConfig):
    """Measure a latent action model on a dataset."""

    lam: tyro.conf.Positional[Path]
    """Folder of the latent action model, or its id on the hub."""
    protocol: Literal["lary", "lary-small"] | None = None
    """Also run LARYBench's probes: regression to chunks of actions, classification of clips by instruction. lary: at
    their published sizes, for a GPU; lary-small: with narrow networks, for a CPU."""
    out: Path | None = None
    """Folder of the results; by default LAM/probe_DATASET, or probe_DATASET for a model from the hub."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(MeasureConfig):
    """Measure several latent action models on the same pairs of a dataset."""

    lams: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the latent action models, or their ids on the hub."""
    out: Path | None = None
    """Folder of compare.json; by default compare_DATASET here."""


@dataclass(frozen=True)
class ShowConfig:
    """Draw the effect of each code on an image."""

    lam: tyro.conf.Positional[Path]
    """Folder of the latent action model, or its id on the hub."""
    image: Path
    """Image to start from; its short side is scaled to the model's size, the centre cropped."""
    out: Path | None = None
    """Folder of the results; by default LAM/show_IMAGE, or show_IMAGE for a model from the hub."""
    codes: str | None = None
    """Codes of the positions that are not changed, as 3,1,4,1; by default the middle of the codebook everywhere."""
    rollout: tuple[str, ...] = ()
    """Latent actions to apply one after the other, as 3,1,4,1 2,2,2,2 or in one as 3,1,4,1,2,2,2,2."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace the contents of `out`."""
