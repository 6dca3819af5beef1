"""Patch tokens: from frames, back to frames, into a few latents; and their positions (bias, convolution).

Architecture of the latent action model (LAPA, https://arxiv.org/abs/2410.11758).

    pytest tests/test_nn.py

Axes: B batch, T time, C channel, H W image or patch grid, N patches, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25


class PatchEmbedding(nn.Module):
    """Each square patch as a token: LayerNorm, Linear, LayerNorm. The same for every frame.

    norm_pixels: the first of these, as published. It removes a patch's brightness and contrast for all
    later layers; without it, pixels in [0, 1] are only brought to about unit scale.
    """

    def __init__(self, patch_size: int, dim: int, *, norm_pixels: bool = True):
        super().__init__()
        self.patch_size = patch_size
        pixels = 3 * patch_size**2
        self.pixel_norm = nn.LayerNorm(pixels) if norm_pixels else None
        self.project = nn.Linear(pixels, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, frames_BTCHW: Tensor) -> Tensor:
        size = self.patch_size
        patches = rearrange(frames_BTCHW, "b t c (h p) (w q) -> b t h w (c p q)", p=size, q=size)
        scaled = (patches - PIXEL_MEAN) / PIXEL_STD if self.pixel_norm is None else self.pixel_norm(patches)
        return self.norm(self.project(scaled))


class PatchPixels(nn.Module):
    """Tokens to pixels: one Linear per patch. zero_init: the first predictions are zero."""

    def __init__(self, patch_size: int, dim: int, *, zero_init: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(dim, 3 * patch_size**2)
        if zero_init:
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, tokens_BHWD: Tensor) -> Tensor:
        size = self.patch_size
        return rearrange(self.project(tokens_BHWD), "b h w (c p q) -> b c (h p) (w q)", p=size, q=size)


class PatchSummary(nn.Module):
    """Tokens of a patch grid to a few latents: a projection, then a small CNN whose output grid is `shape`.

    The first convolution halves the grid if enough places remain for the latents. kernels: of one or two convolutions
    of stride 2 and padding 1 in place of these, as LAPA-DINO has them (lapa.latent.config).
    """

    def __init__(
        self, dim: int, latent_dim: int, grid: int, shape: tuple[int, int], kernels: tuple[int, ...] | None = None
    ):
        super().__init__()
        self.project = nn.Linear(dim, latent_dim)
        if kernels is not None:
            convolutions = [nn.Conv2d(latent_dim, latent_dim, size, stride=2, padding=1) for size in kernels]
            self.shrink, self.gather = convolutions[0], convolutions[1] if len(convolutions) == 2 else None
            return
        rows, columns = shape
        halved = (grid + 1) // 2
        stride, side = (2, halved) if halved >= max(shape) else (1, grid)
        self.shrink = nn.Conv2d(latent_dim, latent_dim, 3, stride=stride, padding=1)
        self.gather = nn.Conv2d(latent_dim, latent_dim, (side - rows + 1, side - columns + 1))

    def forward(self, tokens_BHWD: Tensor) -> Tensor:
        grid = rearrange(self.project(tokens_BHWD), "b h w d -> b d h w")
        grid = self.shrink(grid)
        if self.gather is not None:
            grid = self.gather(F.relu(grid))
        return rearrange(grid, "b d r c -> b (r c) d")


class PositionBias(nn.Module):
    """Continuous relative position bias: a small MLP on log-spaced offsets between patches of a square grid.

    The MLP runs once for each distinct offset, (2 grid - 1)^2 of them, not for each of the grid^4 pairs.
    """

    offsets_M2: Tensor
    offset_of_pair_NN: Tensor

    def __init__(self, grid: int, dim: int, heads: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, dim), nn.LeakyReLU(0.1), nn.Linear(dim, dim), nn.LeakyReLU(0.1), nn.Linear(dim, heads)
        )
        span = torch.arange(1 - grid, grid)
        offsets = torch.cartesian_prod(span, span).float()
        self.register_buffer("offsets_M2", offsets.sign() * offsets.abs().log1p(), persistent=False)
        places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))
        between = places[:, None] - places[None] + grid - 1
        index = between[..., 0] * (2 * grid - 1) + between[..., 1]
        self.register_buffer("offset_of_pair_NN", index, persistent=False)

    def forward(self) -> Tensor:
        """The bias to add to the attention logits: [heads, N, N], query before key."""
        return rearrange(self.net(self.offsets_M2)[self.offset_of_pair_NN], "n m h -> h n m")


class CausalPositions(nn.Module):
    """Depthwise 3x3x3 convolution over (time, height, width) that sees no later frame: the PEG of the paper.

    Written as one 2-D convolution for each time lag, since with two frames most taps of the 3-D one meet padding.
    """

    def __init__(self, dim: int):
        super().__init__()
        like = nn.Conv3d(dim, dim, 3, groups=dim)
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.bias = nn.Parameter(like.bias.detach().clone())  # type: ignore[union-attr]

    def forward(self, x_BTHWD: Tensor) -> Tensor:
        # weight[:, :, -1] is the tap of the frame itself, weight[:, :, -1 - lag] that of the frame `lag` before.
        out = self._convolve(x_BTHWD, self.weight[:, :, -1], self.bias)
        for lag in range(1, min(self.weight.shape[2], x_BTHWD.shape[1])):
            past = self._convolve(x_BTHWD[:, :-lag], self.weight[:, :, -1 - lag], None)
            out = out + F.pad(past, (0, 0, 0, 0, 0, 0, lag, 0))
        return out

    @staticmethod
    def _convolve(x_BTHWD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        frames = rearrange(x_BTHWD, "b t h w d -> (b t) d h w")  # A view: channels last, as the convolution wants it.
        out = F.conv2d(frames, weight, bias, padding=1, groups=len(weight))
        return rearrange(out, "(b t) d h w -> b t h w d", b=len(x_BTHWD))


def sinusoids(length: int, dim: int) -> Tensor:
    """Fixed sinusoidal position embeddings [length, dim]."""
    frequencies = 1e4 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim]
