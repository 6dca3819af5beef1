"""The published latent action model, written literally step by step: the slow twin of lapa.latent.model.

Ye et al., ICLR 2025, https://arxiv.org/abs/2410.11758. Plain PyTorch that imports nothing of lapa, with the quirks: the
convolution along time that permutes positions, keys and values without a norm, the reshape that mixes features. Its
state dict has the released names. The replacement of unused codes, which the released code runs inside forward, is left
out. The tests compare lapa with it, and bench_latent.py times both:

    pytest tests/test_released_laq.py; python benchmarks/bench_latent.py

Axes: B batch, T time, C channel, H W image or patch grid, N tokens, M context tokens, L codes, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, einsum, nn


class LiteralModel(nn.Module):
    """Built from the published config (the keys of lapa.released.laq.PUBLISHED_CONFIG)."""

    def __init__(self, config: Mapping[str, int]):
        super().__init__()
        dim, heads, dim_head = config["dim"], config["heads"], config["dim_head"]
        self.patch = config["patch_size"]
        grid, pixels = config["image_size"] // self.patch, 3 * self.patch**2
        self.to_patch_emb_first_frame = nn.Sequential(
            nn.Identity(), nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim)
        )
        self.spatial_rel_pos_bias = PositionBias(grid, dim, heads)
        self.enc_spatial_transformer = Transformer(dim, config["spatial_depth"], heads, dim_head)
        self.enc_temporal_transformer = Transformer(dim, config["temporal_depth"], heads, dim_head)
        self.vq = NoiseSubstitution(dim, config["quant_dim"], config["codebook_size"], grid, config["code_seq_len"])
        self.dec_spatial_transformer = Transformer(dim, config["spatial_depth"], heads, dim_head, cross=True)
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(dim, pixels))

    def forward(self, frames_BTCHW: Tensor, noise_RD: Tensor | None = None) -> Tensor:
        """Returns the training loss on uint8 frames [B, 2, 3, H, W]. noise: that of the quantizer, [B*L, D]."""
        video = frames_BTCHW.float() / 255
        tokens = self.embed(video)
        quantized, _ = self.vq(*self.encode(tokens), noise_RD)
        return F.mse_loss(self.decode(tokens[:, :1].detach(), quantized), video[:, 1])

    @torch.no_grad()
    def codes(self, frames_BTCHW: Tensor) -> Tensor:
        """Returns the codes [B, L] of uint8 frames [B, 2, 3, H, W]."""
        first, last = self.encode(self.embed(frames_BTCHW.float() / 255))
        z_RD = self.vq.summary(last) - self.vq.summary(first)
        return self.vq.nearest(z_RD).reshape(len(frames_BTCHW), -1)

    @torch.no_grad()
    def reconstruct(self, frames_BTCHW: Tensor) -> Tensor:
        """Returns the second frame [B, 3, H, W], predicted from the first and the codes."""
        tokens, codes = self.embed(frames_BTCHW.float() / 255), self.codes(frames_BTCHW)
        return self.decode(tokens[:, :1], self.vq.to_tokens(self.vq.codebooks[codes.flatten()], len(codes)))

    def embed(self, video_BTCHW: Tensor) -> Tensor:
        cut = {"p": self.patch, "q": self.patch}
        frames = [
            self.to_patch_emb_first_frame(rearrange(frame, "b t c (h p) (w q) -> b t h w (c p q)", **cut))
            for frame in (video_BTCHW[:, :1], video_BTCHW[:, 1:])
        ]
        return torch.cat(frames, dim=1)

    def encode(self, tokens_BTHWD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the encoded tokens of the first and the last frame, [B, N, D] each."""
        b, t, h, w, _ = shape = tokens_BTHWD.shape
        bias = self.spatial_rel_pos_bias()
        x = rearrange(tokens_BTHWD, "b t h w d -> (b t) (h w) d")
        x = self.enc_spatial_transformer(x, shape, bias=bias)
        x = rearrange(x, "(b t) (h w) d -> (b h w) t d", b=b, h=h)
        x = self.enc_temporal_transformer(x, shape)
        x = rearrange(x, "(b h w) t d -> b t (h w) d", b=b, h=h, w=w)
        return x[:, 0], x[:, t - 1]

    def decode(self, tokens_BTHWD: Tensor, action_BLD: Tensor) -> Tensor:
        b, _, h, w, _ = shape = tokens_BTHWD.shape
        x = rearrange(tokens_BTHWD, "b t h w d -> (b t) (h w) d")
        x = self.dec_spatial_transformer(x, shape, bias=self.spatial_rel_pos_bias(), context=action_BLD)
        pixels = self.to_pixels_first_frame(x)
        cut = {"p": self.patch, "q": self.patch}
        return rearrange(pixels, "b (h w) (c p q) -> b c (h p) (w q)", b=b, h=h, w=w, **cut)


class PositionBias(nn.Module):
    """Position bias: an MLP on every pair of patches, at every call."""

    rel_pos: Tensor

    def __init__(self, grid: int, dim: int, heads: int):
        super().__init__()
        activated = [nn.Sequential(nn.Linear(width, dim), nn.LeakyReLU(0.1)) for width in (2, dim)]
        self.net = nn.Sequential(*activated, nn.Linear(dim, heads))
        places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))
        offsets = (places[:, None] - places[None]).float()
        self.register_buffer("rel_pos", offsets.sign() * torch.log(offsets.abs() + 1), persistent=False)

    def forward(self) -> Tensor:
        return rearrange(self.net(self.rel_pos), "i j h -> h i j")


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, *, cross: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "0": DepthwiseConvolution(dim),
                    "1": Attention(dim, heads, dim_head, num_null=0),
                    **({"2": Attention(dim, heads, dim_head, num_null=2)} if cross else {}),
                    "3": feed_forward(dim),
                }
            )
            for _ in range(depth)
        )
        self.norm_out = Norm(dim)

    def forward(
        self, x: Tensor, shape: tuple[int, ...], bias: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["0"](x.reshape(shape)).reshape(x.shape)
            x = x + layer["1"](x, bias=bias)
            if context is not None:
                x = x + layer["2"](x, context=context)
            x = x + layer["3"](x)
        return self.norm_out(x)


class DepthwiseConvolution(nn.Module):
    """3x3x3, padded with zeros in space, and before the first frame in time."""

    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x_BTHWD: Tensor) -> Tensor:
        padded = F.pad(rearrange(x_BTHWD, "b t h w d -> b d t h w"), (1, 1, 1, 1, 2, 0))
        return rearrange(self.dsconv(padded), "b d t h w -> b t h w d")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, *, num_null: int):
        super().__init__()
        self.heads, self.num_null = heads, num_null
        self.norm, self.context_norm = Norm(dim), Norm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(dim_head)), nn.Parameter(torch.ones(dim_head))
        self.null_kv = nn.Parameter(torch.randn(heads, 2 * num_null, dim_head))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        source = x if context is None else self.context_norm(context)
        products = (self.to_q(self.norm(x)), *self.to_kv(source).chunk(2, dim=-1))
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in products)
        null_k, null_v = repeat(self.null_kv, "h (n r) d -> b h n r d", b=len(x), r=2).unbind(dim=-2)
        k, v = torch.cat((null_k, k), dim=-2), torch.cat((null_v, v), dim=-2)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        logits = einsum("b h i d, b h j d -> b h i j", q, k) * 8
        if bias is not None:
            logits = logits + F.pad(bias, (self.num_null, 0))
        out = einsum("b h i j, b h j d -> b h i d", logits.softmax(dim=-1), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class Norm(nn.Module):
    """Layer norm with a gain, and an offset that stays zero."""

    beta: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class GatedGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * value


def feed_forward(dim: int) -> nn.Sequential:
    inner = int(4 * 2 / 3 * dim)
    up, down = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), up, GatedGELU(), nn.Dropout(0.0), down)


class NoiseSubstitution(nn.Module):
    """NSVQ on the difference of two frames, each summarised by a small CNN over its grid of tokens."""

    def __init__(self, dim: int, quant_dim: int, codebook_size: int, grid: int, code_seq_len: int):
        super().__init__()
        self.grid, self.quant_dim = grid, quant_dim
        rows, columns = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[code_seq_len]
        half = grid // 2
        self.codebooks = nn.Parameter(torch.randn(codebook_size, quant_dim))
        self.project_in, self.project_out = nn.Linear(dim, quant_dim), nn.Linear(quant_dim, dim)
        self.cnn_encoder = nn.Sequential(
            nn.Conv2d(quant_dim, quant_dim, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(quant_dim, quant_dim, (half - rows + 1, half - columns + 1)),
        )

    def forward(self, first_BND: Tensor, last_BND: Tensor, noise_RD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns action tokens [B, L, dim] for the decoder, and codes [B*L]."""
        z_RD = self.summary(last_BND) - self.summary(first_BND)
        codes = self.nearest(z_RD)
        noise = torch.randn_like(z_RD) if noise_RD is None else noise_RD
        residual = (z_RD - self.codebooks[codes]).square().sum(dim=1, keepdim=True).sqrt()
        length = noise.square().sum(dim=1, keepdim=True).sqrt()
        return self.to_tokens(z_RD + residual / length * noise, len(first_BND)), codes

    def summary(self, tokens_BND: Tensor) -> Tensor:
        grid = rearrange(self.project_in(tokens_BND), "b (h w) d -> b d h w", h=self.grid)
        return rearrange(self.cnn_encoder(grid), "b d r c -> (b r c) d")

    def nearest(self, z_RD: Tensor) -> Tensor:
        squares_R1, squares_K = z_RD.square().sum(dim=1, keepdim=True), self.codebooks.square().sum(dim=1)
        return (squares_R1 - 2 * z_RD @ self.codebooks.T + squares_K).argmin(dim=1)

    def to_tokens(self, quantized_RD: Tensor, batch: int) -> Tensor:
        """Reads memory that holds [B, L, D] as [B, D, L], then transposes it."""
        return self.project_out(quantized_RD.reshape(batch, self.quant_dim, -1).transpose(1, 2))
