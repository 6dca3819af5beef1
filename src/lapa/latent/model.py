"""The latent action model: two frames in, a few discrete codes for what happened between them (LAPA, stage 1).

Inverse dynamics encodes (x_t, x_{t+h}) into codes; forward dynamics predicts x_{t+h} from x_t and the codes.
Ye et al., ICLR 2025, https://arxiv.org/abs/2410.11758.

    lapa latent train --data DATASET --preset tiny --out LAM
    model = LatentActionModel.from_pretrained("LAM"); codes_BL = model.codes(frames_BTCHW)

Axes: B batch, T time (two frames), C channel, H W image, D width, L latent action length.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lapa import config as configs
from lapa import files
from lapa.latent.quantizer import NSVQ, FiniteScalar, Standardize
from lapa.nn.patches import PatchEmbedding, PatchPixels, PatchSummary, PositionBias, sinusoids
from lapa.nn.transformer import Transformer
from lapa.types import Losses

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class LatentModelConfig:
    """Shape and options of a latent action model. The defaults are the paper's sizes in the clean layout."""

    image_size: int = 256
    """Pixels on a side; frames are square."""
    patch_size: int = 32
    """Pixels on a side of one token."""
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
    quantizer: Literal["nsvq", "fsq"] = "nsvq"
    """nsvq: the paper's; fsq: finite scalar quantisation."""
    fsq_levels: tuple[int, ...] | None = None
    """Levels of each scalar of fsq, product codebook_size; by default one scalar of codebook_size levels."""
    standardize_z: bool = False
    """Bring latents to zero mean and unit variance before they are quantised."""
    predict: Literal["frame", "change"] = "frame"
    """Whether the decoder predicts the second frame or its difference from the first."""
    action_input: Literal["attend", "attend_and_add"] = "attend"
    """How the decoder sees the action: by cross-attention, or also added to every token."""
    layout: Literal["clean", "released"] = "clean"
    """released: with the quirks that only serve the published weights (see docs/2-latent.md)."""
    horizon_seconds: float = 0.6
    """Time between the two frames that the model was trained on."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}; choose one that does"
            )
        if (product := math.prod(self.levels)) != self.codebook_size:
            raise ValueError(
                f"fsq_levels {self.levels} make {product} codes, but codebook_size is {self.codebook_size}"
            )
        if max(self.latent_shape) > self.grid:
            rows, columns = self.latent_shape
            raise ValueError(
                f"latent_length {self.latent_length} is laid out as {rows} x {columns} codes, which does not fit the "
                f"{self.grid} x {self.grid} patches; choose another length or a smaller patch_size"
            )

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    @property
    def levels(self) -> tuple[int, ...]:
        return self.fsq_levels or (self.codebook_size,)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Rows and columns of the codes: the most nearly square factors of latent_length, rows first."""
        columns = max(n for n in range(1, int(self.latent_length**0.5) + 1) if self.latent_length % n == 0)
        return self.latent_length // columns, columns


@dataclass(frozen=True)
class LatentAction:
    """A batch of latent actions: codes, the continuous latent before quantisation, and the codes' embedding."""

    codes_BL: Int64[Tensor, "B L"]
    z_BLD: Float[Tensor, "B L D"]
    quantized_BLD: Float[Tensor, "B L D"]


class LatentActionModel(nn.Module):
    """Encoder, quantiser and decoder; `forward` is the training loss.

    z = latents(x_{t+h}) - latents(x_t), each read from the tokens of a spatial and a temporal transformer over both
    frames. The decoder starts from x_t's patch embedding, gradient stopped, and attends to the quantised z.
    """

    token_positions_LD: Tensor

    def __init__(self, config: LatentModelConfig):
        super().__init__()
        self.config = config
        transformer = partial(
            Transformer, config.dim, heads=config.heads, dim_head=config.dim_head, released=config.layout == "released"
        )
        self.patch_embedding = PatchEmbedding(config.patch_size, config.dim)
        self.position_bias = PositionBias(config.grid, config.dim, config.heads)
        self.spatial_encoder = transformer(depth=config.spatial_depth, axis="space")
        self.temporal_encoder = transformer(depth=config.temporal_depth, axis="time")
        self.to_latents = PatchSummary(config.dim, config.quant_dim, config.grid, config.latent_shape)
        self.quantizer = _build_quantizer(config)
        self.from_latents = nn.Linear(config.quant_dim, config.dim)
        self.decoder = transformer(depth=config.spatial_depth, axis="space", cross=True)
        self.to_pixels = PatchPixels(config.patch_size, config.dim, zero_init=config.predict == "change")
        self.add_action = (
            nn.Linear(config.latent_length * config.quant_dim, config.dim)
            if config.action_input == "attend_and_add"
            else None
        )
        positions = sinusoids(config.latent_length, config.dim)
        self.register_buffer("token_positions_LD", positions, persistent=False)

    @property
    def horizon(self) -> float:
        """Seconds between the two frames the model was trained on."""
        return self.config.horizon_seconds

    def forward(self, batch: Mapping[str, Any]) -> Losses:
        return self.loss(batch["frames_BTCHW"])

    def loss(self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"], noise: Tensor | None = None) -> Losses:
        """Mean squared error of the predicted second frame, pixels in [0, 1].

        noise: standard normal [B*L, D] for NSVQ's substituted error (drawn in training where not given).
        Parts: reconstruction; copy, the error of predicting no change; codes_used and perplexity in this batch.
        """
        frames = self._pixels(frames_BTCHW)
        tokens, bias = self.patch_embedding(frames), self.position_bias()
        action = self.quantizer(self._latents(tokens, bias), noise)
        prediction = self._predict(frames[:, 0], tokens[:, :1].detach(), action.quantized_BLD, bias)
        loss = F.mse_loss(prediction.float(), frames[:, 1])
        with torch.no_grad():
            share = torch.bincount(action.codes_BL.flatten(), minlength=self.config.codebook_size).float()
            share = share / share.sum()
            parts = {
                "reconstruction": loss.detach(),
                "copy": F.mse_loss(frames[:, 0], frames[:, 1]),
                "codes_used": (share > 0).sum().float(),
                "perplexity": torch.special.entr(share).sum().exp(),
            }
        return Losses(loss, parts)

    @torch.no_grad()
    def encode(self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"]) -> LatentAction:
        """The latent action between the two frames, without noise, changing nothing in the model."""
        z_BLD = self._latents(self.patch_embedding(self._pixels(frames_BTCHW)), self.position_bias())
        codes_BL = self.quantizer.codes(z_BLD)
        return LatentAction(codes_BL, z_BLD, self.quantizer.embed(codes_BL))

    def codes(self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"]) -> Int64[Tensor, "B L"]:
        return self.encode(frames_BTCHW).codes_BL

    @torch.no_grad()
    def decode(self, frame_BCHW: UInt8[Tensor, "B C H W"], codes_BL: Int64[Tensor, "B L"]) -> Float[Tensor, "B C H W"]:
        """The second frame that these codes predict from this first one; pixels in [0, 1], not clamped."""
        self._check_codes(codes_BL, len(frame_BCHW))
        frame = self._pixels(frame_BCHW[:, None], num_frames=1)
        tokens, quantized = self.patch_embedding(frame), self.quantizer.embed(codes_BL)
        return self._predict(frame[:, 0], tokens, quantized, self.position_bias())

    def reconstruct(
        self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"], codes_BL: Int64[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """The second frame predicted from the first and its own codes, or the given ones; not clamped."""
        codes_BL = self.codes(frames_BTCHW) if codes_BL is None else codes_BL
        return self.decode(frames_BTCHW[:, 0], codes_BL)

    @torch.no_grad()
    def initialise(self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"]) -> None:
        """Fits codebook and scale to a batch of real pairs; once, before training. More pairs than codes, please."""
        z_BLD = self._latents(self.patch_embedding(self._pixels(frames_BTCHW)), self.position_bias())
        self.quantizer.initialise(z_BLD)

    def action_tokens(self, quantized_BLD: Tensor) -> Tensor:
        """What the decoder attends to: the quantised latents at the width of the transformer, [B, L, dim]."""
        if self.config.layout == "released":
            # The released code reshapes (b, l, d) to (b, d, l) where it should transpose: features mix.
            b, length, dim = quantized_BLD.shape
            return self.from_latents(quantized_BLD.reshape(b, dim, length).transpose(1, 2))
        return self.from_latents(quantized_BLD) + self.token_positions_LD

    def encode_tokens(self, tokens_BTHWD: Tensor, bias_HNN: Tensor) -> Tensor:
        return self.temporal_encoder(self.spatial_encoder(tokens_BTHWD, bias_HNN))

    def _latents(self, tokens_BTHWD: Tensor, bias_HNN: Tensor) -> Tensor:
        encoded = self.encode_tokens(tokens_BTHWD, bias_HNN)
        return self.to_latents(encoded[:, 1]) - self.to_latents(encoded[:, 0])

    def _predict(self, first_BCHW: Tensor, tokens_B1HWD: Tensor, quantized_BLD: Tensor, bias_HNN: Tensor) -> Tensor:
        if self.add_action is not None:
            added = self.add_action(rearrange(quantized_BLD, "b l d -> b (l d)"))
            tokens_B1HWD = tokens_B1HWD + rearrange(added, "b d -> b 1 1 1 d")
        decoded = self.decoder(tokens_B1HWD, bias_HNN, self.action_tokens(quantized_BLD))
        pixels = self.to_pixels(decoded[:, 0])
        return pixels if self.config.predict == "frame" else first_BCHW + pixels

    def _pixels(self, frames_BTCHW: Tensor, num_frames: int = 2) -> Tensor:
        size = self.config.image_size
        expected = (num_frames, 3, size, size)
        if frames_BTCHW.dtype != torch.uint8 or tuple(frames_BTCHW.shape[1:]) != expected:
            raise ValueError(
                f"frames must be uint8 of shape [B, {', '.join(map(str, expected))}], got {frames_BTCHW.dtype} "
                f"{list(frames_BTCHW.shape)}; resize them to the model's image_size"
            )
        return frames_BTCHW.float() / 255

    def _check_codes(self, codes_BL: Tensor, batch: int) -> None:
        expected = (batch, self.config.latent_length)
        if tuple(codes_BL.shape) != expected:
            raise ValueError(f"codes must be of shape {list(expected)}, got {list(codes_BL.shape)}")
        if codes_BL.numel() and not 0 <= int(codes_BL.min()) <= int(codes_BL.max()) < self.config.codebook_size:
            raise ValueError(
                f"codes must lie in [0, {self.config.codebook_size}), got "
                f"{int(codes_BL.min())} to {int(codes_BL.max())}"
            )

    def save_pretrained(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Writes model.safetensors, then config.json: {**extra, "model": this model's config}."""
        folder = Path(folder)
        with files.atomic_path(folder / WEIGHTS) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, temporary)
        files.write_json(folder / CONFIG, {**(extra or {}), "model": configs.to_dict(self.config)})

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path) -> LatentActionModel:
        """A saved model, on the CPU, in evaluation mode. ValueError naming the file where anything is amiss."""
        folder = _local_folder(folder_or_hub_id)
        model = cls(_read_config(folder))
        try:
            model.load_state_dict(load_file(folder / WEIGHTS))
        except FileNotFoundError:
            raise ValueError(f"{folder / WEIGHTS}: no such file; the model was not saved to its end") from None
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{folder / WEIGHTS}: not the weights that {CONFIG} beside it describes: {error}"
            ) from None
        return model.eval()


def lam_fingerprint(folder_or_hub_id: str | Path) -> str:
    """Identifies a saved model by its weights and its config (16 hex digits): labels carry it."""
    folder = _local_folder(folder_or_hub_id)
    shape = json.dumps(configs.to_dict(_read_config(folder)), sort_keys=True)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder / WEIGHTS}: no such file; the model was not saved to its end")
    return hashlib.sha256((files.fingerprint(folder / WEIGHTS) + shape).encode()).hexdigest()[:16]


def _read_config(folder: Path) -> LatentModelConfig:
    values = files.read_json(folder / CONFIG)
    if not isinstance(values, dict) or "model" not in values:
        raise ValueError(f'{folder / CONFIG}: has no "model"; this is not the folder of a latent action model')
    return configs.from_dict(LatentModelConfig, values["model"], source=str(folder / CONFIG))


def _local_folder(folder_or_hub_id: str | Path) -> Path:
    if Path(folder_or_hub_id).is_dir():
        return Path(folder_or_hub_id)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder_or_hub_id), allow_patterns=[WEIGHTS, CONFIG]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder_or_hub_id}: neither a folder here nor a model on the hub ({reason})") from None


def _build_quantizer(config: LatentModelConfig) -> NSVQ | FiniteScalar:
    width = config.quant_dim if config.quantizer == "nsvq" else len(config.levels)
    standardize = Standardize(config.latent_length, width) if config.standardize_z else None
    if config.quantizer == "nsvq":
        return NSVQ(config.quant_dim, config.codebook_size, standardize)
    return FiniteScalar(config.quant_dim, config.levels, standardize)
