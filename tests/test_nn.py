"""The building blocks against slow, literal twins (house rule 7)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from lapa.nn.attention import Attention, FeedForward
from lapa.nn.patches import CausalPositions, PatchEmbedding, PatchPixels, PatchSummary, PositionBias, sinusoids
from lapa.nn.transformer import Transformer


def literal_attention(module: Attention, x, context=None, bias=None):
    source = x if context is None else context
    if module.norm_context:
        source = module.context_norm(source)

    def split(y):
        return rearrange(y, "b n (h d) -> b h n d", h=module.heads)

    queries = split(module.to_queries(module.query_norm(x)))
    keys, values = map(split, module.to_keys_values(source).chunk(2, dim=-1))
    if module.null_keys_values is not None:
        null = module.null_keys_values.expand(len(x), -1, -1, -1)
        keys = torch.cat((null[:, :, [0, 2]], keys), dim=2)
        values = torch.cat((null[:, :, [1, 3]], values), dim=2)
    queries = queries / queries.norm(dim=-1, keepdim=True) * module.query_scale
    keys = keys / keys.norm(dim=-1, keepdim=True) * module.key_scale
    logits = 8 * torch.einsum("bhnd,bhmd->bhnm", queries, keys)
    logits = logits if bias is None else logits + bias
    out = torch.einsum("bhnm,bhmd->bhnd", logits.softmax(-1), values)
    return module.to_out(rearrange(out, "b h n d -> b n (h d)"))


def perturb(module: torch.nn.Module) -> None:
    """Gains away from one, so that forgetting one of them shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("norm_context", [True, False])
def test_self_attention_is_the_literal_one(norm_context):
    torch.manual_seed(0)
    module = Attention(24, heads=3, dim_head=8, norm_context=norm_context)
    perturb(module)
    x, bias = torch.randn(2, 5, 24, requires_grad=True), torch.randn(3, 5, 5)
    assert_same_with_gradients(module(x, bias_HNM=bias), literal_attention(module, x, bias=bias), module, x)


def test_cross_attention_is_the_literal_one():
    torch.manual_seed(0)
    module = Attention(24, heads=3, dim_head=8, num_null=2)
    perturb(module)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 4, 24)
    torch.testing.assert_close(module(x, context), literal_attention(module, x, context))


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("norm_context", [True, False])
def test_attention_along_time_is_the_literal_one_of_each_patch(num_frames, norm_context):
    """Two frames take the closed form, others the general one; neither moves the patches' axis."""
    torch.manual_seed(0)
    module = Attention(24, heads=3, dim_head=8, norm_context=norm_context)
    perturb(module)
    x_BTND = torch.randn(2, num_frames, 5, 24, requires_grad=True)
    literal = literal_attention(module, rearrange(x_BTND, "b t n d -> (b n) t d"))
    assert_same_with_gradients(module(x_BTND), rearrange(literal, "(b n) t d -> b t n d", b=2), module, x_BTND)


def test_two_keys_of_many_queries_take_the_closed_form_too():
    torch.manual_seed(0)
    module = Attention(24, heads=3, dim_head=8)
    perturb(module)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 2, 24)
    torch.testing.assert_close(module(x, context), literal_attention(module, x, context))


def test_feed_forward_is_the_literal_one():
    torch.manual_seed(0)
    module, x = FeedForward(20), torch.randn(2, 5, 20, requires_grad=True)
    assert module.down.in_features % 16  # The zeros that even it out must not show.
    perturb(module)
    value, gate = module.up(module.norm(x)).chunk(2, dim=-1)
    assert_same_with_gradients(module(x), module.down(F.gelu(gate) * value), module, x)


def assert_same_with_gradients(fast, literal, module: torch.nn.Module, x) -> None:
    torch.testing.assert_close(fast, literal)
    inputs, weights = [x, *(p for p in module.parameters() if p.requires_grad)], torch.randn_like(fast)
    of_fast, of_literal = (
        torch.autograd.grad((y * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
        for y in (fast, literal)
    )
    torch.testing.assert_close(of_fast, of_literal, rtol=1e-4, atol=1e-5)


def test_only_the_released_attention_holds_a_frozen_gain():
    frozen = [name for name, p in Attention(8, 2, 4, norm_context=False).named_parameters() if not p.requires_grad]
    assert frozen == ["context_norm.weight"]
    assert all(p.requires_grad for p in Attention(8, 2, 4).parameters())


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_causal_positions_are_the_padded_3d_convolution(num_frames):
    torch.manual_seed(0)
    module, x = CausalPositions(6), torch.randn(2, num_frames, 4, 5, 6, requires_grad=True)
    padded = F.pad(rearrange(x, "b t h w d -> b d t h w"), (1, 1, 1, 1, 2, 0))
    literal = rearrange(F.conv3d(padded, module.weight, module.bias, groups=6), "b d t h w -> b t h w d")
    fast, weights = module(x), torch.randn(2, num_frames, 4, 5, 6)
    torch.testing.assert_close(fast, literal)
    inputs = (x, module.weight, module.bias)
    of_fast, of_literal = (torch.autograd.grad((y * weights).sum(), inputs) for y in (fast, literal))
    torch.testing.assert_close(of_fast, of_literal)


def test_position_bias_is_the_mlp_of_every_pair():
    torch.manual_seed(0)
    grid, module = 3, PositionBias(3, dim=8, heads=2)
    literal = torch.empty(2, grid**2, grid**2)
    for i in range(grid**2):
        for j in range(grid**2):
            offset = torch.tensor([i // grid - j // grid, i % grid - j % grid]).float()
            literal[:, i, j] = module.net(offset.sign() * torch.log(offset.abs() + 1)).detach()
    torch.testing.assert_close(module().detach(), literal)


def test_patches_go_there_and_back():
    frames, patch = torch.rand(2, 2, 3, 8, 8), 4
    embedding, pixels = PatchEmbedding(patch, dim=48), PatchPixels(patch, dim=48)
    embedding.pixel_norm, embedding.norm = torch.nn.Identity(), torch.nn.Identity()
    for linear in (embedding.project, pixels.project):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    torch.testing.assert_close(pixels(embedding(frames)[:, 1]), frames[:, 1])
    assert not PatchPixels(patch, dim=48, zero_init=True)(torch.randn(1, 2, 2, 48)).any()


@pytest.mark.parametrize(
    ("grid", "shape"), [(8, (1, 1)), (8, (2, 1)), (8, (2, 2)), (8, (7, 7)), (8, (7, 1)), (16, (4, 2))]
)
def test_patch_summary_gives_any_number_of_latents(grid, shape):
    assert PatchSummary(12, 5, grid, shape)(torch.randn(3, grid, grid, 12)).shape == (3, shape[0] * shape[1], 5)


def test_clean_time_transformer_keeps_patches_apart_and_the_released_one_does_not():
    """The convolution reaches the 8 neighbours of a patch; read in permuted order it reaches patches far away."""
    torch.manual_seed(0)
    for released in (False, True):
        model = Transformer(8, 1, 2, 4, axis="time", released=released)
        x = torch.randn(1, 2, 6, 6, 8, requires_grad=True)
        # Not the plain sum: the last layer is a LayerNorm, whose outputs always add up to the same.
        (model(x)[0, 1, 2, 2] * torch.randn(8)).sum().backward()
        largest = x.grad.abs().amax(dim=(0, 1, 4))
        touched = largest > 1e-5 * largest.max()
        near = torch.zeros(6, 6, dtype=torch.bool)
        near[1:4, 1:4] = True
        assert bool((touched & ~near).any()) == released


def test_sinusoids_differ():
    rows = sinusoids(49, 15)
    assert rows.shape == (49, 15)
    assert torch.pdist(rows).min() > 0.1
