"""Attention and feed-forward of the published latent action model (LAPA, https://arxiv.org/abs/2410.11758).

Queries and keys are l2-normalised and scaled by learned per-dimension gains; logits are multiplied by 8.

    pytest tests/test_nn.py

Axes: B sequences, N queries, M keys, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

LOGIT_SCALE = 8.0


class Attention(nn.Module):
    """Self-attention, or cross-attention where a context is given.

    num_null: learned key/value pairs that every query may attend to instead of the context.
    norm_context: whether keys and values see a norm. The released self-attention holds this norm's gain
        but never applies it, so there it is kept, frozen, for the sake of the weights' round trip.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, *, num_null: int = 0, norm_context: bool = True):
        super().__init__()
        self.heads = heads
        self.norm_context = norm_context
        self.query_norm = nn.LayerNorm(dim, bias=False)
        self.context_norm = nn.LayerNorm(dim, bias=False).requires_grad_(norm_context)
        self.to_queries = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_keys_values = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.query_scale = nn.Parameter(torch.ones(dim_head))
        self.key_scale = nn.Parameter(torch.ones(dim_head))
        # Rows alternate key, value: the released order.
        self.null_keys_values = nn.Parameter(torch.randn(heads, 2 * num_null, dim_head)) if num_null else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x_BND: Tensor, context_BMD: Tensor | None = None, bias_HNM: Tensor | None = None) -> Tensor:
        context = x_BND if context_BMD is None else context_BMD
        if self.norm_context:
            context = self.context_norm(context)
        queries = self._split(self.to_queries(self.query_norm(x_BND)))
        keys, values = map(self._split, self.to_keys_values(context).chunk(2, dim=-1))
        if self.null_keys_values is not None:
            null = repeat(self.null_keys_values.to(values.dtype), "h n d -> b h n d", b=x_BND.shape[0])
            keys = torch.cat((null[:, :, 0::2], keys), dim=2)
            values = torch.cat((null[:, :, 1::2], values), dim=2)
        queries = (F.normalize(queries, dim=-1) * self.query_scale).to(values.dtype)
        keys = (F.normalize(keys, dim=-1) * self.key_scale).to(values.dtype)
        bias = None if bias_HNM is None else bias_HNM.to(values.dtype)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=LOGIT_SCALE)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


class FeedForward(nn.Module):
    """LayerNorm, then a gated GELU of two thirds of four times the width, no biases in the products."""

    def __init__(self, dim: int):
        super().__init__()
        inner = int(4 * 2 / 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)
