"""The same random crop and colour change on both frames of a pair: more to learn from, where videos are few.

    seen_BTCHW = augment_pairs(frames_BTCHW, AugmentConfig(crop=0.2))

Axes: B batch, T time, C channel, H W image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import UInt8
from torch import Tensor

from lapa.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of each change, in [0, 1); zero turns it off."""

    crop: float = 0.2
    """Largest share of the area that is cropped away before the rest is scaled back to full size."""
    brightness: float = 0.2
    """Largest shift, as a share of the full range."""
    contrast: float = 0.2
    """Largest relative change of the distances to the pair's mean grey."""
    saturation: float = 0.2
    """Largest relative change of the distances to each pixel's own grey."""
    hue: float = 0.05
    """Largest rotation of colours about the grey axis, as a share of a full turn."""


DEFAULT = AugmentConfig()


def augment_pairs(
    frames_BTCHW: UInt8[Tensor, "B T 3 H W"], config: AugmentConfig = DEFAULT, generator: torch.Generator | None = None
) -> UInt8[Tensor, "B T 3 H W"]:
    """One crop and one colour change for each pair, the same on all its frames, drawn anew for every pair.

    Runs on the frames' device. Random numbers come from `generator`, by default torch's global one of that device,
    whose state is in checkpoints. Raises UserError if frames are not uint8 of this shape.
    """
    if frames_BTCHW.dtype != torch.uint8 or frames_BTCHW.ndim != 5 or frames_BTCHW.shape[2] != 3:
        raise UserError(
            f"frames must be uint8 of shape [B, T, 3, H, W], got {frames_BTCHW.dtype} {list(frames_BTCHW.shape)}"
        )
    device = frames_BTCHW.device
    draws = torch.rand(7, len(frames_BTCHW), generator=generator, device=generator.device if generator else device)
    area, x, y, *colour = draws.to(device)
    # Half precision has fewer steps than a pixel.
    with torch.autocast(device.type, enabled=False):
        frames = _crop(frames_BTCHW.float(), 1 - config.crop * area, 2 * x - 1, 2 * y - 1)
        frames = _recolour(frames, config, *(2 * draw - 1 for draw in colour))
    return frames.clamp(0, 255).round().to(torch.uint8)


def _crop(frames_BTCHW: Tensor, area_B: Tensor, x_B: Tensor, y_B: Tensor) -> Tensor:
    """Keeps this part of the area, scaled back to full size; x and y in [-1, 1] place it from edge to edge."""
    side, none = area_B.sqrt(), torch.zeros_like(area_B)
    rows = (side, none, x_B * (1 - side)), (none, side, y_B * (1 - side))
    placement_B23 = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    flat = rearrange(frames_BTCHW, "b t c h w -> b (t c) h w")
    grid = F.affine_grid(placement_B23, list(flat.shape), align_corners=False)
    cropped = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return rearrange(cropped, "b (t c) h w -> b t c h w", c=3)


def _recolour(
    frames_BTCHW: Tensor, config: AugmentConfig, brightness_B: Tensor, contrast_B: Tensor, saturation_B: Tensor,
    hue_B: Tensor,
) -> Tensor:  # fmt: skip
    """All four changes are one affine map of a pixel's colour. The draws lie in [-1, 1]."""
    contrast, saturation = 1 + config.contrast * contrast_B, 1 + config.saturation * saturation_B
    grey_33 = torch.full((3, 3), 1 / 3, device=frames_BTCHW.device)
    tint_B33 = _rotation_about_grey(2 * math.pi * config.hue * hue_B) - grey_33
    map_B33 = _per_pair(contrast, 2) * (grey_33 + _per_pair(saturation, 2) * tint_B33)
    mean_B = reduce(frames_BTCHW, "b t c h w -> b", "mean")
    shift_B = (1 - contrast) * mean_B + 255 * config.brightness * brightness_B
    return torch.einsum("bdc,btchw->btdhw", map_B33, frames_BTCHW) + _per_pair(shift_B, 4)


def _rotation_about_grey(angle_B: Tensor) -> Tensor:
    """Rodrigues' formula for the axis (1, 1, 1), in closed form: a circulant matrix, [B, 3, 3]."""
    turned = angle_B[:, None] - angle_B.new_tensor([0.0, 1.0, 2.0]) * (2 * math.pi / 3)
    first_row = (1 + 2 * turned.cos()) / 3
    return torch.stack([first_row.roll(shift, dims=1) for shift in range(3)], dim=1)


def _per_pair(values_B: Tensor, num_axes: int) -> Tensor:
    return values_B.reshape(-1, *[1] * num_axes)
