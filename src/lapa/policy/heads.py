"""Heads that turn a policy's hidden states into a chunk of robot actions, real numbers in place of bins.

`chunk`: one regression for each of K query tokens, L1 loss (OpenVLA-OFT, https://arxiv.org/abs/2502.19645).
`flow`: flow matching over the whole chunk, given the observation (pi0, https://arxiv.org/abs/2410.24164).

Both predict actions on the scale of `lapa.policy.actions.ActionScale`, have the same two methods, and do not depend on
the model whose hidden states they read:

    head = build_head("flow", width=576, chunk=10, action_dim=7)
    loss, parts = head.loss(hidden_BSD, mask_BS, targets_BKA, counted_BK)
    actions_BKA = head.act(hidden_BSD, mask_BS)

Axes: B batch, S positions of the observation, D width of the hidden states, K chunk, A action dimensions, W width of
the flow head, H its attention heads, E width of one of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lapa.policy.config import FlowConfig

# pi0 draws the flow's time as LAST_TIME (1 - u), u ~ Beta(1.5, 1): more often early, where there is most noise, and
# never at the very end.
TIME_BETA, LAST_TIME = 1.5, 0.999
# Periods of the time embedding, as in pi0: from a fraction of an Euler step to four times the whole way.
SHORTEST_PERIOD, LONGEST_PERIOD = 4e-3, 4.0
CHUNK_BLOCKS = 2


class ActionHead(nn.Module, ABC):
    """Interface of a policy's head. Inputs may be of any floating type; losses and actions are float32."""

    @abstractmethod
    def loss(
        self,
        hidden: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S"] | None,
        targets_BKA: Float[Tensor, "B K A"],
        counted_BK: Bool[Tensor, "B K"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss over counted steps, and detached figures for the log.

        mask: False where a position is padding; None: none is. counted_BK: False past the end of an episode, where the
        targets have no effect.
        The figure `action_l1` is the mean absolute error of the prediction of `act`, on the targets' scale. The flow
        head returns it in evaluation only, since sampling would slow down training.
        """

    @abstractmethod
    def act(self, hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B K A"]:
        """The actions of a chunk; the rest of the batch has no effect on them."""


class ChunkHead(ActionHead):
    """An MLP with residual blocks, applied to the hidden state of each of K query tokens."""

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(CHUNK_BLOCKS)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, action_dim)

    def forward(self, hidden_BKD: Float[Tensor, "B K D"]) -> Float[Tensor, "B K A"]:
        x_BKD = self.start(hidden_BKD.to(self.out.weight.dtype))
        for block in self.blocks:
            x_BKD = x_BKD + block(x_BKD)
        return _in_full(self.out, self.norm(x_BKD))

    def loss(
        self,
        hidden: Float[Tensor, "B K D"],
        mask: Bool[Tensor, "B K"] | None,
        targets_BKA: Float[Tensor, "B K A"],
        counted_BK: Bool[Tensor, "B K"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `ActionHead.loss`. hidden: those of the query tokens, which are never padding; `mask` is ignored."""
        targets_BKA = _only_counted(targets_BKA, counted_BK)
        loss = _mean((self(hidden) - targets_BKA).abs(), counted_BK)
        return loss, {"action_l1": loss.detach()}

    @torch.no_grad()
    def act(self, hidden: Float[Tensor, "B K D"], mask: Bool[Tensor, "B K"] | None = None) -> Float[Tensor, "B K A"]:
        return self(hidden)


class Context(NamedTuple):
    """An observation for the flow head: keys and values of each layer, and the mask of padding."""

    keys_values: list[tuple[Tensor, Tensor]]
    mask_B11S: Bool[Tensor, "B 1 1 S"] | None


class FlowHead(ActionHead):
    """A transformer that turns noise into a chunk of actions along a straight path, given the observation.

    At time 0 a chunk is noise, at time 1 the actions, in between their mixture; the target is the velocity, actions
    minus noise. `act` starts from one noise, drawn from a fixed seed and saved with the head, so that an observation
    always gives the same actions. Where several chunks are good, the noise chooses one; from zero the path would lead
    to their mean.
    """

    acting_noise_KA: Tensor

    def __init__(self, width: int, chunk: int, action_dim: int, config: FlowConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FlowConfig()
        self.context_norm = nn.LayerNorm(width)
        self.context_in = nn.Linear(width, config.width)
        self.action_in = nn.Linear(action_dim, config.width)
        self.places_KW = nn.Parameter(0.02 * torch.randn(chunk, config.width))
        self.mix = nn.Sequential(
            nn.Linear(2 * config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.layers = nn.ModuleList(_FlowLayer(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, action_dim)
        noise_KA = torch.randn(chunk, action_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("acting_noise_KA", noise_KA)

    def observe(self, hidden_BSD: Float[Tensor, "B S D"], mask_BS: Bool[Tensor, "B S"] | None = None) -> Context:
        """Computes once what every Euler step reads of an observation."""
        if mask_BS is not None:
            mask_BS = mask_BS.bool()
            # Attention multiplies padding by zero, which keeps a NaN.
            hidden_BSD = hidden_BSD.masked_fill(~mask_BS[..., None], 0)
        context_BSW = self.context_in(self.context_norm(hidden_BSD.to(self.context_in.weight.dtype)))
        keys_values = [layer.across.keys_values(context_BSW) for layer in self._layers]
        return Context(keys_values, None if mask_BS is None else mask_BS[:, None, None, :])

    def velocity(
        self,
        noisy_BKA: Float[Tensor, "B K A"],
        time_B: Float[Tensor, "B"],
        context: Context,
        counted_BK: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B K A"]:
        """The predicted velocity of the chunk. Only itself attends to a step that is not counted."""
        dtype = self.action_in.weight.dtype
        actions_BKW = self.action_in(noisy_BKA.to(dtype))
        time_BKW = _embed_time(time_B, self.config.width).to(actions_BKW.dtype)[:, None].expand_as(actions_BKW)
        x_BKW = self.mix(torch.cat([actions_BKW, time_BKW], dim=-1)) + self.places_KW
        among_B1KK = None
        if counted_BK is not None:
            itself_KK = torch.eye(counted_BK.shape[1], dtype=torch.bool, device=counted_BK.device)
            among_B1KK = (counted_BK.bool()[:, None, :] | itself_KK)[:, None]
        for layer, keys_values in zip(self._layers, context.keys_values, strict=True):
            x_BKW = layer(x_BKW, among_B1KK, keys_values, context.mask_B11S)
        return _in_full(self.out, self.norm(x_BKW))

    def loss(
        self,
        hidden: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S"] | None,
        targets_BKA: Float[Tensor, "B K A"],
        counted_BK: Bool[Tensor, "B K"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """See `ActionHead.loss`: the squared error of the velocity, at one noise and time for each sample.

        In evaluation the draws are the same each time, so that losses can be compared.
        """
        targets_BKA = _only_counted(targets_BKA, counted_BK)
        generator = None if self.training else torch.Generator(targets_BKA.device).manual_seed(0)
        noise_BKA = torch.randn(targets_BKA.shape, generator=generator, device=targets_BKA.device)
        time_B = draw_times(len(targets_BKA), targets_BKA.device, generator)
        noisy_BKA = torch.lerp(noise_BKA, targets_BKA, time_B[:, None, None])
        velocity_BKA = self.velocity(noisy_BKA, time_B, self.observe(hidden, mask), counted_BK)
        loss = _mean((velocity_BKA - (targets_BKA - noise_BKA)).square(), counted_BK)
        if self.training:
            return loss, {}
        error = _mean((self.act(hidden, mask) - targets_BKA).abs(), counted_BK)
        return loss, {"action_l1": error.detach()}

    @torch.no_grad()
    def act(self, hidden: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"] | None = None) -> Float[Tensor, "B K A"]:
        return self.sample(hidden, mask, self.acting_noise_KA.expand(len(hidden), -1, -1))

    @torch.no_grad()
    def sample(
        self,
        hidden_BSD: Float[Tensor, "B S D"],
        mask_BS: Bool[Tensor, "B S"] | None,
        noise_BKA: Float[Tensor, "B K A"],
    ) -> Float[Tensor, "B K A"]:
        """The chunk of actions from this noise, in `config.steps` Euler steps."""
        context = self.observe(hidden_BSD, mask_BS)
        chunk_BKA = noise_BKA.float()
        for step in range(self.config.steps):
            time_B = chunk_BKA.new_full((len(chunk_BKA),), step / self.config.steps)
            chunk_BKA = chunk_BKA + self.velocity(chunk_BKA, time_B, context) / self.config.steps
        return chunk_BKA

    @property
    def _layers(self) -> Sequence[_FlowLayer]:
        return cast("Sequence[_FlowLayer]", self.layers)


class _FlowLayer(nn.Module):
    """Attention among the steps of the chunk, attention to the observation, feed-forward; each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.among_norm, self.across_norm, self.inner_norm = (nn.LayerNorm(width) for _ in range(3))
        self.among, self.across = _Attention(width, heads), _Attention(width, heads)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x_BKW: Tensor,
        among_B1KK: Tensor | None,
        keys_values: tuple[Tensor, Tensor],
        across_B11S: Tensor | None,
    ) -> Tensor:
        y_BKW = self.among_norm(x_BKW)
        x_BKW = x_BKW + self.among(y_BKW, self.among.keys_values(y_BKW), among_B1KK)
        x_BKW = x_BKW + self.across(self.across_norm(x_BKW), keys_values, across_B11S)
        return x_BKW + self.inner(self.inner_norm(x_BKW))


class _Attention(nn.Module):
    """Attention whose keys and values can be computed once and kept."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_queries = nn.Linear(width, width)
        self.to_keys_values = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def keys_values(self, context_BSW: Tensor) -> tuple[Tensor, Tensor]:
        keys_BHSE, values_BHSE = rearrange(
            self.to_keys_values(context_BSW), "b s (two h e) -> two b h s e", two=2, h=self.heads
        )
        return keys_BHSE, values_BHSE

    def forward(self, x_BKW: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        queries_BHKE = rearrange(self.to_queries(x_BKW), "b k (h e) -> b h k e", h=self.heads)
        out_BHKE = F.scaled_dot_product_attention(queries_BHKE, *keys_values, attn_mask=mask)
        return self.to_out(rearrange(out_BHKE, "b h k e -> b k (h e)"))


def build_head(
    kind: Literal["chunk", "flow"], width: int, chunk: int, action_dim: int, flow: FlowConfig | None = None
) -> ActionHead:
    """A head for hidden states of the given width. `bins` needs none: its actions are tokens of the vocabulary."""
    return ChunkHead(width, action_dim) if kind == "chunk" else FlowHead(width, chunk, action_dim, flow)


def draw_times(num: int, device: torch.device, generator: torch.Generator | None = None) -> Float[Tensor, "B"]:
    """Random times of the flow to train at, in [0, LAST_TIME]; early ones are more likely."""
    # The inverse of Beta(b, 1)'s distribution function u^b.
    beta_B = torch.rand(num, generator=generator, device=device) ** (1 / TIME_BETA)
    return LAST_TIME * (1 - beta_B)


def _embed_time(time_B: Float[Tensor, "B"], width: int) -> Float[Tensor, "B W"]:
    """Sines and cosines of the time, with periods spread evenly on a log scale."""
    share = torch.linspace(0, 1, width // 2, device=time_B.device)
    periods = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** share
    angles = 2 * math.pi * time_B.float()[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _in_full(out: nn.Linear, x: Tensor) -> Tensor:
    """The last layer in the precision of its weights, also under autocast: bf16 has only 128 numbers in [0.5, 1)."""
    with torch.autocast(x.device.type, enabled=False):
        return out(x.to(out.weight.dtype)).float()


def _only_counted(targets_BKA: Tensor, counted_BK: Tensor) -> Tensor:
    """Targets with zeros past the end of an episode, so that not even a NaN there reaches a gradient."""
    return targets_BKA.float().masked_fill(~counted_BK.bool()[..., None], 0)


def _mean(errors_BKA: Tensor, counted_BK: Tensor) -> Tensor:
    """The mean over the numbers of counted steps."""
    counted_BK1 = counted_BK[..., None].to(errors_BKA.dtype)
    return (errors_BKA * counted_BK1).sum() / (counted_BK1.sum() * errors_BKA.shape[-1]).clamp(min=1)
