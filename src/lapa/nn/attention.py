"""Attention and feed-forward of the published latent action model (LAPA, https://arxiv.org/abs/2410.11758).

Queries and keys are l2-normalised and scaled by learned per-dimension gains; logits are multiplied by 8.

    pytest tests/test_nn.py

Axes: B sequences, N queries, M keys, D width, H heads. The sequence is the second axis; axes between it and the width,
as N in B T N D, are batch axes (attention over time for each patch).

Plain products, not scaled_dot_product_attention: it has no fast CPU kernel for a learned bias, and is
slower on sequences this short even where it has one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

LOGIT_SCALE = 8.0
# A multiple of the width of a vector register and of a tensor core's fragment.
EVEN_WIDTH = 16
# Keeps the direction of a zero vector finite; far below the squared length of any other.
LENGTH_FLOOR = 1e-24


class Attention(nn.Module):
    """Self-attention, or cross-attention where a context is given.

    num_null: learned key/value pairs that every query may attend to instead of the context.
    norm_context: whether the input of keys and values is normalised. The released self-attention holds this norm's
        gain but never applies it, so there it is kept, frozen, for the weights' round trip.
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
        # Two products instead of one: no gradient has to be concatenated from halves.
        keys, values = (self._split(F.linear(context, weight)) for weight in self.to_keys_values.weight.chunk(2))
        if self.null_keys_values is not None:
            null = repeat(self.null_keys_values.to(values.dtype), "h n d -> b n h d", b=len(x_BND))
            keys, values = torch.cat((null[:, 0::2], keys), 1), torch.cat((null[:, 1::2], values), 1)
        # The logits depend on the product of both gains and the scale only, so the keys alone are multiplied by it.
        keys = direction(keys) * (LOGIT_SCALE * self.query_scale * self.key_scale)
        out = attend(direction(queries), keys, values, bias_HNM)
        return self.to_out(out.flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "... (h d) -> ... h d", h=self.heads)


class FeedForward(nn.Module):
    """LayerNorm, then a gated GELU of two thirds of four times the width, no biases in the products."""

    def __init__(self, dim: int):
        super().__init__()
        inner = int(4 * 2 / 3 * dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Zero padding to an even width changes only the speed: uneven products run at two thirds of it.
        missing = -self.down.in_features % EVEN_WIDTH
        to_value, to_gate = F.pad(self.up.weight.unflatten(0, (2, -1)), (0, 0, 0, missing))
        x = self.norm(x)
        inner = F.gelu(F.linear(x, to_gate)) * F.linear(x, to_value)
        return F.linear(inner, F.pad(self.down.weight, (0, missing)))


def attend(queries_BNHD: Tensor, keys_BMHD: Tensor, values_BMHD: Tensor, bias_HNM: Tensor | None) -> Tensor:
    """softmax(queries keys + bias) values, along the second axis; [B, N, ..., H, D] as the queries."""
    if keys_BMHD.shape[1] == 2 and bias_HNM is None:
        # The softmax of two logits is the sigmoid of their difference: no logits, no change of layout.
        (key, other_key), (value, other_value) = keys_BMHD.unbind(1), values_BMHD.unbind(1)
        share = (queries_BNHD * (other_key - key)[:, None]).sum(-1, keepdim=True).sigmoid()
        return value[:, None] + share * (other_value - value)[:, None]
    queries, keys, values = (x.movedim(1, -2) for x in (queries_BNHD, keys_BMHD, values_BMHD))
    logits = queries @ keys.mT
    weights = (logits if bias_HNM is None else logits + bias_HNM).softmax(-1)
    return (weights @ values).movedim(-2, 1)


def direction(x: Tensor) -> Tensor:
    """x at length one along its last axis: F.normalize in fewer passes."""
    return x * (x.square().sum(-1, keepdim=True) + LENGTH_FLOOR).rsqrt()
