"""Options of `lapa import`, and sizes of the released models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lapa import config as configs
from lapa.errors import UserError

# Groups of the image tokenizer's group norms.
NORM_GROUPS = 32


@dataclass(frozen=True)
class ImportLaqConfig:
    """Import the released latent action model."""

    weights: tyro.conf.Positional[Path]
    """The released laq_openx.pt."""
    out: Path
    """Folder of the latent action model to write."""
    sizes: Path | None = None
    """JSON with the sizes of a model other than the published one, under the authors' names."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True, kw_only=True)
class ImportLapaConfig:
    """Import the released LAPA-7B, a policy finetuned from it with the authors' code, or LWM-Chat-1M."""

    params: Path
    """The released weights: the authors' streaming checkpoint."""
    vqgan: Path
    """The released image tokenizer."""
    tokenizer: Path
    """The released tokenizer.model of sentencepiece."""
    out: Path
    """Folder of the policy to write."""
    camera: str = "image"
    """Name of the camera whose image the policy sees."""
    latent_length: int = 4
    """Tokens of a latent action, where the checkpoint has latent actions."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision to write the language model in; auto: that of the file."""
    sizes: Path | None = None
    """JSON with the sizes of a model other than the published one: keys of the authors' Llama config, and `vqgan`."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the image tokenizer; the defaults are the published ones."""

    resolution: int = 256
    """Side of the square image, in pixels."""
    hidden_channels: int = 128
    """Channels at full resolution."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 4, 6)
    """Channels of each level, as multiples of `hidden_channels`; each level after the first halves the image."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder level; the decoder has one more."""
    z_channels: int = 64
    """Channels between the encoder and the codes."""
    quantized_embed_dim: int = 64
    """Width of a code."""
    num_embeddings: int = 8192
    """Size of the codebook."""

    def __post_init__(self) -> None:
        sizes = (self.resolution, self.hidden_channels, *self.channel_mult, self.num_res_blocks, self.z_channels)
        if min(*sizes, self.quantized_embed_dim, self.num_embeddings) < 1:
            raise UserError(f"sizes of the image tokenizer must be at least 1, got {configs.to_dict(self)}")
        if self.hidden_channels % NORM_GROUPS:
            raise UserError(f"hidden_channels must be a multiple of {NORM_GROUPS}, got {self.hidden_channels}")
        if not self.channel_mult or self.resolution % 2 ** (len(self.channel_mult) - 1):
            raise UserError(
                f"resolution must be divisible by 2 once for each level of channel_mult {list(self.channel_mult)} "
                f"but the first, got {self.resolution}"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.hidden_channels * multiple for multiple in self.channel_mult)

    @property
    def num_tokens(self) -> int:
        """Codes of one image: a square grid."""
        return (self.resolution // 2 ** (len(self.channel_mult) - 1)) ** 2


@dataclass(frozen=True)
class LwmConfig:
    """Sizes of the `lwm` backbone; the defaults are those of LAPA-7B."""

    kind: Annotated[Literal["lwm"], tyro.conf.Suppress] = "lwm"
    width: int = 4096
    """Width D of the language model."""
    inner_width: int = 11008
    """Width inside its feed-forward layers."""
    layers: int = 32
    heads: int = 32
    rope_theta: float = 5e7
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-6
    max_length: int = 4096
    """Longest sequence, in tokens."""
    vqgan: VQGANConfig = field(default_factory=VQGANConfig)
    """The image tokenizer."""
    vision_rows: int = 8448
    """Rows of the image codes' segment: the codes, the two that end images, and rows that were never used."""
    end_of_frame: int = 8192
    """The code after each image but the last."""
    end_of_vision: int = 8193
    """The code after the last image."""

    @property
    def image_size(self) -> int:
        """Side of the square image, in pixels."""
        return self.vqgan.resolution

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise UserError(f"width {self.width} does not divide into {self.heads} heads of an even width")
        ends = self.end_of_frame, self.end_of_vision
        if not self.vqgan.num_embeddings <= min(ends) < max(ends) < self.vision_rows:
            raise UserError(
                f"end of frame {ends[0]} and end of vision {ends[1]} must be two codes after the "
                f"{self.vqgan.num_embeddings} of the image tokenizer, within {self.vision_rows} rows"
            )
