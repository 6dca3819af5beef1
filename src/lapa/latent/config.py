"""The shape and the options of a latent action model; `lapa latent train --help` lists them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lapa.errors import UserError

LARGEST_LEVELS = 16
FACTORS = range(8, 1, -1)


@dataclass(frozen=True)
class LatentModelConfig:
    """Shape and options of a latent action model. The defaults are the paper's sizes in the clean layout."""

    image_size: int = 256
    """Pixels on a side; frames are square."""
    patch_size: int = 32
    """Pixels on a side of one token."""
    patch_norm: bool = True
    """Normalise the pixels of each patch (paper), which hides its brightness and contrast from the model."""
    dim: int = 1024
    """Width of the tokens."""
    spatial_depth: int = 8
    """Layers over patches, in the encoder and in the decoder."""
    temporal_depth: int = 8
    """Layers over time, in the encoder."""
    heads: int = 16
    """Attention heads."""
    dim_head: int = 64
    """Width of one attention head."""
    latent_length: int = 4
    """Codes in a latent action."""
    codebook_size: int = 8
    """Values a code can take."""
    quant_dim: int = 32
    """Width of a latent before it is quantised."""
    quantizer: Literal["nsvq", "vq", "fsq", "continuous"] = "nsvq"
    """nsvq: the paper's; vq: moving averages; fsq: finite scalar quantisation; continuous: no codes."""
    fsq_levels: tuple[int, ...] | None = None
    """Levels of each scalar of fsq, product codebook_size; by default one scalar up to 16 levels, then several."""
    commitment_weight: float = 0.25
    """Of the loss that holds latents to their codes, in vq."""
    kl_weight: float = 1e-4
    """Of the divergence from the unit normal, in continuous."""
    standardize_z: bool = False
    """Bring latents to zero mean and unit variance before they are quantised."""
    predict: Literal["frame", "change"] = "frame"
    """Whether the decoder predicts the second frame or its difference from the first."""
    action_input: Literal["attend", "attend_and_add"] = "attend"
    """How the decoder sees the action: by cross-attention, or also added to every token."""
    inputs: Literal["pixels", "features", "both"] = "pixels"
    """What the encoder reads: pixels, or the frozen features of vision_tower."""
    targets: Literal["pixels", "features", "both"] = "pixels"
    """What the decoder predicts: pixels, or the frozen features of vision_tower."""
    vision_tower: str | None = None
    """Name on the hub or local folder of a vision model of transformers (DINOv2, DINOv3, SigLIP)."""
    feature_weight: float = 0.01
    """Of the features' error beside the pixels' in targets=both; features have unit scale."""
    augment: Literal["off", "data", "view"] = "off"
    """Random crop and colour change, one for both frames: of all that the model sees, or of the encoder's view only."""
    action_dim: Annotated[int, tyro.conf.Suppress] = 0
    """Dimensions of the true actions that supervise the latent; the datasets' own, where --action-share is above 0."""
    action_weight: float = 0.1
    """Of the error of the true action, read linearly from the latent, in units of its variance."""
    reversal_weight: float = 0.0
    """Of the loss that wants the latent of the reversed pair to be the negative one."""
    composition_weight: float = 0.0
    """Of the loss that wants the latents of the two halves of a pair to add up to the whole's."""
    layout: Literal["clean", "released"] = "clean"
    """released: with the quirks that only serve the published weights (see docs/2-latent.md)."""
    horizon_seconds: float = 0.6
    """Time between the two frames that the model was trained on."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}; choose one that does"
            )
        if self.latent_length < 1 or self.codebook_size < 2 or min(self.levels) < 2:
            raise UserError(
                f"latent_length {self.latent_length} of codebook_size {self.codebook_size} says nothing; "
                "give at least 1 code of at least 2 values, and fsq_levels of at least 2"
            )
        if self.fsq_levels is not None and self.quantizer != "fsq":
            raise UserError(f"fsq_levels are given, but the quantizer is {self.quantizer}; add --quantizer fsq")
        if (product := math.prod(self.levels)) != self.codebook_size:
            raise UserError(f"fsq_levels {self.levels} make {product} codes, but codebook_size is {self.codebook_size}")
        if max(self.latent_shape) > self.grid:
            rows, columns = self.latent_shape
            raise UserError(
                f"latent_length {self.latent_length} is laid out as {rows} x {columns} codes, which does not fit the "
                f"{self.grid} x {self.grid} patches; choose another length or a smaller patch_size"
            )
        if self.uses_features and self.vision_tower is None:
            raise UserError(
                f"inputs={self.inputs}, targets={self.targets} need a vision tower: give --vision-tower, "
                "such as facebook/dinov2-small or a folder"
            )
        if self.vision_tower is not None and not self.uses_features:
            raise UserError("--vision-tower is given but not used: add --inputs features or --targets features")
        if self.layout == "released" and (self.uses_features or not self.patch_norm):
            raise UserError(
                "the released layout has pixels only, normed patch by patch; leave --layout clean for anything else"
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
    def levels(self) -> tuple[int, ...]:
        """Levels of each scalar of FSQ: as given, or codebook_size in factors of at most 16 where it has them."""
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
