"""The transformer of the latent action model: over the patches of each frame, or over the times of each patch.

Every block adds, in this order: positions (causal convolution), self-attention, cross-attention where there is a
context, feed-forward. Follows LAPA (https://arxiv.org/abs/2410.11758).

    pytest tests/test_nn.py

Axes: B batch, T time, H W patch grid, D width, S sequences, N tokens of a sequence, L context tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

from einops import rearrange
from torch import Tensor, nn

from lapa.nn.attention import Attention, FeedForward
from lapa.nn.patches import CausalPositions

# Attention runs along the second axis. The first two layouts move nothing in memory.
SEQUENCES = {"space": "(b t) (h w) d", "time": "b t (h w) d", "released time": "(b h w) t d"}
NUM_NULL_IN_CROSS_ATTENTION = 2


class Block(nn.Module):
    """One layer. `positions` is applied by the Transformer, which knows the layout of the sequences."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, cross: bool, norm_context: bool):
        super().__init__()
        self.positions = CausalPositions(dim)
        self.attention = Attention(dim, heads, dim_head, norm_context=norm_context)
        null = NUM_NULL_IN_CROSS_ATTENTION
        self.cross_attention = Attention(dim, heads, dim_head, num_null=null) if cross else None
        self.feed_forward = FeedForward(dim)

    def forward(self, x_SND: Tensor, bias_HNN: Tensor | None, context_SLD: Tensor | None) -> Tensor:
        x = x_SND + self.attention(x_SND, bias_HNM=bias_HNN)
        if self.cross_attention is not None:
            x = x + self.cross_attention(x, context_SLD)
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Blocks along one axis of a video of tokens, with a final norm.

    released: the structure of the published weights. Keys and values of self-attention see no norm, and along
    time the convolution reads the sequences (b h w) t as if they lay in the order b t h w, which permutes positions.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        *,
        axis: Literal["space", "time"],
        cross: bool = False,
        released: bool = False,
    ):
        super().__init__()
        self.sequences = SEQUENCES["released time" if released and axis == "time" else axis]
        self.blocks = nn.ModuleList(
            Block(dim, heads, dim_head, cross=cross, norm_context=not released) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, bias=False)

    def forward(self, x_BTHWD: Tensor, bias_HNN: Tensor | None = None, context_BLD: Tensor | None = None) -> Tensor:
        sizes = dict(zip("bthw", x_BTHWD.shape, strict=False))
        x = rearrange(x_BTHWD, f"b t h w d -> {self.sequences}")
        for block in cast("Iterable[Block]", self.blocks):
            x = x + block.positions(x.reshape(x_BTHWD.shape)).reshape(x.shape)
            x = block(x, bias_HNN, context_BLD)
        return rearrange(self.norm(x), f"{self.sequences} -> b t h w d", **sizes)
