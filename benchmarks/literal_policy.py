"""The policy, written literally step by step: the slow twin of lapa.policy.model, for bench_policy.py.

LAPA (https://arxiv.org/abs/2410.11758) with a Llama, in plain PyTorch. Attention is a matrix of scores, a softmax and a
product. Each segment of the vocabulary has its own head, and every head is computed at every position, as in the
released code. There is no cache: each predicted token is a forward pass of the whole sequence. The optimizer updates
the parameters one by one. The vision part is copied from the policy: a ResNet or an image tokenizer.

    pytest tests/test_bench_policy.py; python benchmarks/bench_policy.py

Axes: B batch, P observation, F tokens after it, S = P + F, D width, H heads, E width of one, R rows of a segment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapa.policy.backbones.tiny import TinyBackbone
from lapa.policy.model import Field, LatentPolicy
from lapa.policy.vocabulary import SEGMENTS, Vocabulary
from lapa.released.lwm import LwmBackbone


class LiteralPolicy(nn.Module):
    """Twin of a policy whose backbone is `tiny` or `lwm`, with a copy of its weights."""

    def __init__(self, policy: LatentPolicy) -> None:
        super().__init__()
        backbone = policy.backbone
        assert isinstance(backbone, TinyBackbone | LwmBackbone)
        language, self.vocabulary = backbone.language, policy.config.vocabulary
        weight = language.lm_head.weight
        with _built_as(weight):
            self.eyes = ResNetEyes(backbone) if isinstance(backbone, TinyBackbone) else CodeEyes(backbone)
            self.model = Llama(language.config)
            self.heads = nn.ModuleDict(_heads(self.vocabulary, weight.shape[1]))
        self.model.load_state_dict(language.model.state_dict())
        for segment, head in self.heads.items():
            assert isinstance(head, nn.Linear)
            rows = self.vocabulary.rows(segment)  # type: ignore[arg-type]
            head.weight.data.copy_(weight.data[rows.start : rows.stop])

    def forward(self, batch: Mapping[str, Tensor], target: Field, tokens_BF: Tensor) -> Tensor:
        """Returns the training loss: cross-entropy of a field's tokens."""
        predicted = torch.cat([_same(target.opening, batch), tokens_BF, _same(target.closing, batch)], dim=1)
        after = len(target.closing) + 1
        logits_BSR = self.logits(batch, predicted)[target.segment]
        logits_BFR = self.possible(logits_BSR[:, -target.length - after : -after], target)
        codes_BF = tokens_BF - self.vocabulary.rows(target.segment).start
        return F.cross_entropy(logits_BFR.flatten(0, 1), codes_BF.flatten())

    @torch.no_grad()
    def act(self, batch: Mapping[str, Tensor], target: Field) -> Tensor:
        """Returns the tokens of a field, with one forward pass for each."""
        predicted = _same(target.opening, batch)
        for step in range(target.length):
            one = Field(target.segment, target.sizes_F[step : step + 1])
            logits_BSR = self.logits(batch, predicted)[target.segment]
            code_B1 = self.possible(logits_BSR[:, -1:], one).softmax(-1).argmax(-1)
            predicted = torch.cat([predicted, code_B1 + self.vocabulary.rows(target.segment).start], dim=1)
        return predicted[:, len(target.opening) :]

    def logits(self, batch: Mapping[str, Tensor], tokens_BF: Tensor) -> dict[str, Tensor]:
        """Returns the logits of all segments at all positions."""
        prefix_BPD, mask_BP = self.eyes(batch, self.model.embed_tokens)
        tokens_BFD = self.model.embed_tokens(tokens_BF).to(prefix_BPD.dtype)
        mask_BS = torch.cat([mask_BP, torch.ones_like(tokens_BF)], dim=1)
        hidden_BSD = self.model(torch.cat([prefix_BPD, tokens_BFD], dim=1), mask_BS)
        return {segment: head(hidden_BSD).float() for segment, head in self.heads.items()}

    def possible(self, logits_BFR: Tensor, target: Field) -> Tensor:
        """Returns the logits, with minus infinity for rows that a position cannot have."""
        rows_R = torch.arange(logits_BFR.shape[-1], device=logits_BFR.device)
        sizes_F1 = torch.tensor(target.sizes_F, device=logits_BFR.device)[:, None]
        return torch.where(rows_R < sizes_F1, logits_BFR, -torch.inf)


class ResNetEyes(nn.Module):
    """Features on a grid, projected, before the text."""

    def __init__(self, backbone: TinyBackbone) -> None:
        super().__init__()
        self.tower = copy.deepcopy(backbone.tower).to(memory_format=torch.contiguous_format)  # type: ignore[call-arg]
        self.project = copy.deepcopy(backbone.project)
        self.position_VND = nn.Parameter(backbone.position_VND.detach().clone())

    def forward(self, batch: Mapping[str, Tensor], embed: nn.Embedding) -> tuple[Tensor, Tensor]:
        image_tokens = []
        for camera, position_ND in enumerate(self.position_VND):
            pixels_BCHW = batch["images_BVHWC"][:, camera].permute(0, 3, 1, 2).to(position_ND.dtype) / 127.5 - 1
            features_BCHW = self.tower(pixels_BCHW.contiguous()).last_hidden_state
            image_tokens.append(self.project(features_BCHW.flatten(2).transpose(1, 2)) + position_ND)
        text_BTD, images_BND = embed(batch["tokens_BT"]), torch.cat(image_tokens, dim=1)
        prefix_BPD = torch.cat([images_BND, text_BTD.to(images_BND.dtype)], dim=1)
        seen_BN = torch.ones(images_BND.shape[:2], dtype=torch.long, device=images_BND.device)
        return prefix_BPD, torch.cat([seen_BN, batch["mask_BT"]], dim=1)


class CodeEyes(nn.Module):
    """Codes of a frozen image tokenizer, at their places in the text. The tokenizer is the policy's own."""

    def __init__(self, backbone: LwmBackbone) -> None:
        super().__init__()
        self.read = [backbone.vqgan]
        self.first, self.num_codes = backbone._first_code, backbone.config.vqgan.num_embeddings

    def forward(self, batch: Mapping[str, Tensor], embed: nn.Embedding) -> tuple[Tensor, Tensor]:
        tokens_BP = batch["tokens_BT"].clone()
        is_code_BP = (tokens_BP >= self.first) & (tokens_BP < self.first + self.num_codes)
        codes = torch.cat([self.read[0](images_VHWC).flatten() for images_VHWC in batch["images_BVHWC"]])
        tokens_BP[is_code_BP] = codes.to(tokens_BP.dtype) + self.first
        return embed(tokens_BP), batch["mask_BT"]


class Llama(nn.Module):
    """Has the parameter names of transformers' LlamaModel. config: its LlamaConfig."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        self.theta = c.rope_parameters["rope_theta"]
        self.head_width = c.hidden_size // c.num_attention_heads

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        length = x_BSD.shape[1]
        causal_SS = torch.ones(length, length, dtype=torch.bool, device=x_BSD.device).tril()
        itself_SS = torch.eye(length, dtype=torch.bool, device=x_BSD.device)
        # Padding attends to itself, so that its softmax is defined.
        seen_BSS = (causal_SS & mask_BS.bool()[:, None, :]) | itself_SS
        positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        frequencies = self.theta ** -(torch.arange(0, self.head_width, 2, device=x_BSD.device) / self.head_width)
        angles_BSE = (positions_BS[..., None] * frequencies).repeat(1, 1, 2)
        rotation = tuple(part[:, None].to(x_BSD.dtype) for part in (angles_BSE.cos(), angles_BSE.sin()))
        for layer in self.layers:
            x_BSD = layer(x_BSD, seen_BSS[:, None], rotation)
        return self.norm(x_BSD)


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        eps = config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.mlp = FeedForward(width, inner)

    def forward(self, x_BSD: Tensor, seen_B1SS: Tensor, rotation: Sequence[Tensor]) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), seen_B1SS, rotation)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_BSD: Tensor, seen_B1SS: Tensor, rotation: Sequence[Tensor]) -> Tensor:
        products = self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)
        q_BHSE, k_BHSE, v_BHSE = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in products)
        q_BHSE, k_BHSE = _rotated(q_BHSE, rotation), _rotated(k_BHSE, rotation)
        scores_BHSS = q_BHSE @ k_BHSE.transpose(2, 3) / q_BHSE.shape[-1] ** 0.5
        weights_BHSS = torch.where(seen_B1SS, scores_BHSS.float(), -torch.inf).softmax(-1).to(v_BHSE.dtype)
        return self.o_proj((weights_BHSS @ v_BHSE).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * gate.sigmoid() * self.up_proj(x))


class Norm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        return self.weight * (full / (full.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x.dtype)


def _same(tokens: Sequence[int], batch: Mapping[str, Tensor]) -> Tensor:
    """Returns these tokens for each sample."""
    text_BT = batch["tokens_BT"]
    return text_BT.new_tensor(tokens).long().expand(len(text_BT), -1)


def _rotated(x_BHSE: Tensor, rotation: Sequence[Tensor]) -> Tensor:
    cosine, sine = rotation
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cosine + torch.cat([-second, first], dim=-1) * sine


def _heads(vocabulary: Vocabulary, width: int) -> dict[str, nn.Linear]:
    rows = {segment: len(vocabulary.rows(segment)) for segment in SEGMENTS}
    return {segment: nn.Linear(width, count, bias=False) for segment, count in rows.items() if count}


@contextmanager
def _built_as(like: Tensor) -> Iterator[None]:
    """Makes modules on this tensor's device and in its type, not by way of the CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with torch.device(like.device):
            yield
    finally:
        torch.set_default_dtype(before)
