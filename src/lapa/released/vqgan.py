"""The image tokenizer of the released policy: a VQGAN that turns an image into a grid of codes, and back.

Large World Model (https://arxiv.org/abs/2402.08268), as LAPA uses it (https://arxiv.org/abs/2410.11758): residual
blocks without attention, the nearest of 8192 codes for each 16 x 16 pixels. It is frozen and runs in float32: a code
is an argmin, and an image's codes must not depend on the precision that the policy trains in.

    vqgan = from_released(open_checkpoint(Path("vqgan")), VQGANConfig())      # 146,244,675 parameters
    codes_Bhw = vqgan.encode(images_BHWC)      # uint8 of side 256 -> 16 x 16 codes in [0, 8192)

Axes: B batch, H W image, h w grid of codes, C channels, K codes, D width of a code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from lapa import config as configs
from lapa.errors import UserError
from lapa.files import read_json
from lapa.nn.saved import require_fit, require_sizes, shapes_of_file
from lapa.nn.weights import load_weights, save_weights
from lapa.policy.config import NORM_GROUPS, VQGANConfig
from lapa.released.checkpoints import require_shapes, shapes_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NORM_EPS = 1e-6


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm_0 = nn.GroupNorm(NORM_GROUPS, channels_in, NORM_EPS)
        self.conv_0 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm_1 = nn.GroupNorm(NORM_GROUPS, channels, NORM_EPS)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv_0(F.silu(self.norm_0(x)))
        hidden = self.conv_1(F.silu(self.norm_1(hidden)))
        return hidden + (x if self.conv_2 is None else self.conv_2(x))


class Level(nn.Module):
    """Residual blocks at one resolution, then the change to the next one, if there is one."""

    def __init__(self, channels_in: int, channels: int, num_blocks: int, resample: str | None) -> None:
        super().__init__()
        widths = [channels_in] + [channels] * num_blocks
        self.blocks = nn.ModuleList(ResidualBlock(*pair) for pair in pairwise(widths))
        self.resample = resample
        stride, padding = (2, 0) if resample == "down" else (1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding) if resample else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.conv is None:
            return x
        if self.resample == "down":
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Tower(nn.Module):
    """The encoder (resample "down") or the decoder ("up"), which is its mirror image with one more block a level."""

    def __init__(self, config: VQGANConfig, resample: str) -> None:
        super().__init__()
        self.down = resample == "down"
        widths, channels = (config.hidden_channels, *config.channels), (3, config.z_channels)
        if not self.down:
            widths, channels = (*config.channels, config.channels[-1])[::-1], channels[::-1]
        last = len(widths) - 2
        num_blocks, innermost = config.num_res_blocks + (not self.down), config.channels[-1]
        self.conv_in = nn.Conv2d(channels[0], widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(widths[i], widths[i + 1], num_blocks, resample if i < last else None) for i in range(last + 1)
        )
        self.middle = nn.ModuleList(ResidualBlock(innermost, innermost) for _ in range(2))
        self.norm = nn.GroupNorm(NORM_GROUPS, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels[1], 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        x = self.conv_in(x)
        for layer in (*self.levels, *self.middle) if self.down else (*self.middle, *self.levels):
            x = layer(x)
        return self.conv_out(F.silu(self.norm(x)))


class VQGAN(nn.Module):
    """The frozen image tokenizer: its parameters take no gradient."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Tower(config, "down"), Tower(config, "up")
        self.to_code = nn.Conv2d(config.z_channels, config.quantized_embed_dim, 1)
        self.from_code = nn.Conv2d(config.quantized_embed_dim, config.z_channels, 1)
        self.codebook_KD = nn.Parameter(torch.empty(config.num_embeddings, config.quantized_embed_dim))
        nn.init.uniform_(self.codebook_KD, -1 / config.num_embeddings, 1 / config.num_embeddings)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images_BHWC: UInt8[Tensor, "B H W 3"]) -> Int[Tensor, "B h w"]:
        """Calls `encode`; sharding hooks into a module's call."""
        return self.encode(images_BHWC)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VQGAN:
        """Moves to other devices, and stays in float32 when a policy is cast."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype != tensor.dtype else result

        super()._apply(moved, recurse)
        return self

    @torch.no_grad()
    def latents(self, images_BHWC: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B h w D"]:
        """Returns the latents whose nearest codes `encode` takes. Raises UserError for images of another size."""
        side = self.config.resolution
        if tuple(images_BHWC.shape[1:]) != (side, side, 3):
            raise UserError(f"the image tokenizer takes {side} x {side} x 3 images, got {list(images_BHWC.shape[1:])}")
        # A permuted NHWC tensor already lies in memory as channels_last.
        pixels = images_BHWC.permute(0, 3, 1, 2).to(self.codebook_KD.dtype) / 127.5 - 1
        with torch.autocast(images_BHWC.device.type, enabled=False):
            return self.to_code(self.encoder(pixels)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def encode(self, images_BHWC: UInt8[Tensor, "B H W 3"]) -> Int[Tensor, "B h w"]:
        """Returns the code of each cell of the grid, row by row from the top left."""
        z_BhwD, codebook_KD = self.latents(images_BHWC).float(), self.codebook_KD.float()
        flat_ND = rearrange(z_BhwD, "b h w d -> (b h w) d")
        # |z|^2 is the same for every code, so it does not change which one is nearest.
        with torch.autocast(images_BHWC.device.type, enabled=False):
            distances_NK = torch.addmm(codebook_KD.square().sum(1), flat_ND, codebook_KD.T, alpha=-2)
        return distances_NK.argmin(1).view(z_BhwD.shape[:3])

    @torch.no_grad()
    def decode(self, codes_Bhw: Int[Tensor, "B h w"]) -> Float[Tensor, "B H W 3"]:
        """Returns the images of the codes, in [-1, 1]."""
        code_BDhw = self.codebook_KD[codes_Bhw].permute(0, 3, 1, 2)
        return self.decoder(self.from_code(code_BDhw)).permute(0, 2, 3, 1).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Writes model.safetensors, then config.json."""
        save_weights(self, folder / WEIGHTS)
        configs.save(self.config, folder / CONFIG)

    @classmethod
    def load(cls, folder: Path) -> VQGAN:
        """Reads what `save` wrote. Raises UserError naming the file that is missing or does not fit."""
        require_sizes(folder / CONFIG, read_json(folder / CONFIG), shapes_of_file(folder / WEIGHTS))
        config = configs.load(VQGANConfig, folder / CONFIG)
        require_fit(lambda: cls(config), folder / CONFIG, folder / WEIGHTS)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        load_weights(model, folder / WEIGHTS)
        return model.eval()


RELEASED_PARTS = {
    "conv_in": "Conv_0",
    "conv_out": "Conv_1",
    "norm": "GroupNorm_0",
    "to_code": "quant_conv",
    "from_code": "post_quant_conv",
}


def released_name(own: str) -> str:
    """Our name of a parameter -> the released (Flax) one, with slashes."""
    if own == "codebook_KD":
        return "quantize/embeddings"
    *path, kind = own.split(".")
    level = "DownsamplingBlock" if path[0] == "encoder" else "UpsamplingBlock"
    sampling = "Downsample" if path[0] == "encoder" else "Upsample"
    name = "/".join(RELEASED_PARTS.get(part, part) for part in path)
    name = re.sub(r"levels/(\d+)/conv\b", rf"levels/\1/{sampling}_0/Conv_0", name)
    name = re.sub(r"levels/(\d+)", rf"{level}_\1", name)
    name = re.sub(r"middle/(\d+)", r"MidBlock_0/ResnetBlock_\1", name)
    name = re.sub(r"blocks/(\d+)", r"ResnetBlock_\1", name)
    name = re.sub(r"\bnorm_", "GroupNorm_", re.sub(r"\bconv_", "Conv_", name))
    if kind == "weight":
        kind = "scale" if "GroupNorm" in name.rsplit("/", 1)[-1] else "kernel"
    return f"{name}/{kind}"


def released_shapes(config: VQGANConfig) -> dict[str, tuple[int, ...]]:
    """Released name -> released shape of every parameter."""
    with torch.device("meta"):
        own = VQGAN(config).state_dict()
    # Theirs is HWIO where ours is OIHW.
    shapes = {released_name(name): tuple(tensor.shape) for name, tensor in own.items()}
    return {name: (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape for name, shape in shapes.items()}


def from_released(params: Mapping[str, Any], config: VQGANConfig) -> VQGAN:
    """Returns the tokenizer with the released weights (arrays or tensors), in evaluation mode.

    Raises UserError that lists every name that is missing, left over or of another shape.
    """
    require_shapes("the image tokenizer", shapes_of(params), released_shapes(config))
    model = VQGAN(config)
    for name, own in model.state_dict().items():
        theirs = torch.as_tensor(params[released_name(name)])
        own.copy_(theirs.permute(3, 2, 0, 1) if theirs.ndim == 4 else theirs)
    return model.eval()
