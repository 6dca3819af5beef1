"""The latent policy: a causal vision-language model that says latent actions first, robot actions later.

LAPA (https://arxiv.org/abs/2410.11758), stages 2 and 3. A sequence is

    image tokens of each camera | instruction | field

and the field is either a latent action, L tokens of the latent segment, or a chunk of K robot actions of A bins each,
time step by time step. The loss is the cross-entropy of the field's tokens. The softmax runs over the rows that are
possible at a position and no others, in the loss and in decoding alike: the field's segment, and of the bin segment
only as many bins as that dimension has. (The paper's heads are untied per segment, which is the same restriction.)
Decoding is greedy over exactly the field's length, with a KV cache; no code ends it.

    lapa policy pretrain --preset debug --data DATASET --labels LABELS --out POLICY

Axes: B batch, V cameras, T text tokens, P prefix = image and text tokens, F field tokens, L latent action length,
K chunk, A action dimensions, R rows of a segment, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from lapa.policy.backbones import BackboneConfig, TinyConfig, build_backbone
from lapa.policy.vocabulary import Segment, Vocabulary
from lapa.types import Losses


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is, apart from its weights. With its tokenizer and bins, all that a policy folder needs."""

    vocabulary: Vocabulary
    cameras: tuple[str, ...]
    """Names of the image slots, in the order in which the model sees them."""
    backbone: BackboneConfig = field(default_factory=TinyConfig)
    prompt: str = "{instruction}"
    """What the model reads; `{instruction}` stands for the task in words."""
    latent_length: int = 0
    """L; 0 where the policy never learned latent actions."""
    action_bins: tuple[int, ...] = ()
    """Bins of each action dimension; none before finetuning."""
    chunk: int = 0
    """K, the time steps of robot actions said at once."""

    def __post_init__(self) -> None:
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise ValueError(f"a policy needs at least one camera, each named once, got {self.cameras}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"the prompt {self.prompt!r} lacks {{instruction}}, the place of the task's words")
        if bool(self.latent_length) != bool(self.vocabulary.latent):
            raise ValueError("latent length and codebook size come together, or neither")
        if bool(self.chunk) != bool(self.action_bins):
            raise ValueError("chunk and action bins come together, or neither")
        if self.action_bins and not 1 <= min(self.action_bins) <= max(self.action_bins) <= self.vocabulary.bins:
            raise ValueError(
                f"action bins {self.action_bins} do not fit the {self.vocabulary.bins} rows of their segment"
            )

    @property
    def action_dim(self) -> int:
        return len(self.action_bins)


@dataclass(frozen=True)
class Field:
    """What is predicted: a segment, and how many of its rows are possible at each of F positions."""

    segment: Segment
    sizes_F: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.sizes_F)


class LatentPolicy(nn.Module):
    """The whole policy as one module; `forward` is the training loss.

    A batch holds `images_BVHWC` (uint8), `tokens_BT` and `mask_BT` (left-padded text), and what is to be learned, as
    tokens of the vocabulary: `latent_BL`, or `action_BKA` with `action_mask_BK` (False where the episode has ended).
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(
            config.backbone, num_cameras=len(config.cameras), vocabulary_size=config.vocabulary.size
        )

    @property
    def latent_field(self) -> Field:
        """ValueError where the policy never learned latent actions."""
        if not self.config.latent_length:
            raise ValueError("this policy has no latent actions: it was trained on robot actions from scratch")
        return Field("latent", (self.config.vocabulary.latent,) * self.config.latent_length)

    @property
    def action_field(self) -> Field:
        """ValueError where the policy has not been finetuned."""
        if not self.config.chunk:
            raise ValueError("this policy was only pretrained and knows no robot actions: run `lapa policy finetune`")
        return Field("bins", self.config.action_bins * self.config.chunk)

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        if "latent_BL" in batch:
            target, tokens_BF, counted_BF = self.latent_field, batch["latent_BL"], None
        else:
            target, tokens_BF = self.action_field, rearrange(batch["action_BKA"], "b k a -> b (k a)")
            counted_BF = batch["action_mask_BK"].repeat_interleave(self.config.action_dim, dim=1)
        logits_BFR = self.field_logits(batch, target, tokens_BF)
        codes_BF = tokens_BF - self.config.vocabulary.rows(target.segment).start
        losses_BF = F.cross_entropy(rearrange(logits_BFR, "b f r -> b r f"), codes_BF, reduction="none")
        right_BF = (logits_BFR.argmax(-1) == codes_BF).float()
        accuracy = _mean(right_BF, counted_BF).detach()
        return Losses(_mean(losses_BF, counted_BF), {"token_accuracy": accuracy})

    def field_logits(
        self, batch: Mapping[str, Tensor], target: Field, tokens_BF: Int[Tensor, "B F"]
    ) -> Float[Tensor, "B F R"]:
        """Logits over the segment's rows at each position of the field, given the true tokens before it."""
        prefix_BPD, mask_BP = self._prefix(batch)
        embed = self.backbone.language.get_input_embeddings()
        inputs = torch.cat([prefix_BPD, embed(tokens_BF[:, :-1]).to(prefix_BPD.dtype)], dim=1)
        mask = F.pad(mask_BP, (0, target.length - 1), value=1)
        logits = self.backbone.language(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=_positions(mask),
            use_cache=False,
            logits_to_keep=target.length,
        ).logits
        return self._possible(logits, target)

    @torch.no_grad()
    def decode(self, batch: Mapping[str, Tensor], target: Field) -> tuple[Int[Tensor, "B F"], Float[Tensor, "B F"]]:
        """Greedy decoding of one field with a KV cache: its tokens and their log-probabilities."""
        language = self.backbone.language
        inputs, mask = self._prefix(batch)
        positions = _positions(mask)
        cache = DynamicCache(config=language.config)
        tokens, log_probabilities = [], []
        for step in range(target.length):
            logits = language(
                inputs_embeds=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            one = Field(target.segment, target.sizes_F[step : step + 1])
            best, code_B1 = self._possible(logits, one).log_softmax(-1).max(-1)
            tokens.append(code_B1 + self.config.vocabulary.rows(target.segment).start)
            log_probabilities.append(best)
            inputs = language.get_input_embeddings()(tokens[-1])
            mask = F.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1
        return torch.cat(tokens, dim=1), torch.cat(log_probabilities, dim=1)

    def predict_codes(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "B L"]:
        """The latent actions of a batch of images and instructions, as codes."""
        tokens_BL, _ = self.decode(batch, self.latent_field)
        return self.config.vocabulary.codes("latent", tokens_BL)

    def predict_actions(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "B K A"]:
        """The robot actions of a batch of images and instructions, as bins of each dimension."""
        tokens_BF, _ = self.decode(batch, self.action_field)
        bins_BF = self.config.vocabulary.codes("bins", tokens_BF)
        return rearrange(bins_BF, "b (k a) -> b k a", a=self.config.action_dim)

    def with_actions(
        self, action_bins: Sequence[int], chunk: int, cameras: Sequence[str], *, num_bins: int = 256
    ) -> LatentPolicy:
        """This policy with robot actions: new rows for the bins, everything else as it was.

        cameras: what the robot calls the pictures in the image slots. Where there already is a bin segment, its rows
        are kept and only the chunk changes.
        """
        vocabulary = replace(self.config.vocabulary, bins=self.config.vocabulary.bins or num_bins)
        config = replace(
            self.config, vocabulary=vocabulary, action_bins=tuple(action_bins), chunk=chunk, cameras=tuple(cameras)
        )
        grown = LatentPolicy(config)
        state = grown.state_dict()
        for name, tensor in self.state_dict().items():
            # Only the embedding and the head differ in shape, by rows at their end.
            state[name][: len(tensor)].copy_(tensor)
        return grown

    def freeze_vision(self) -> None:
        """Keeps the vision tower as it is, as the paper does in pretraining. Its projection goes on learning."""
        self.backbone.vision.requires_grad_(False)

    def _prefix(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B P D"], Int[Tensor, "B P"]]:
        image_BND = self.backbone.embed_images(batch["images_BVHWC"])
        text_BTD = self.backbone.language.get_input_embeddings()(batch["tokens_BT"])
        mask_BP = F.pad(batch["mask_BT"], (image_BND.shape[1], 0), value=1)
        return torch.cat([image_BND, text_BTD.to(image_BND.dtype)], dim=1), mask_BP

    def _possible(self, logits_BFV: Float[Tensor, "B F V"], target: Field) -> Float[Tensor, "B F R"]:
        """The logits of the segment's rows, minus infinity where a position cannot have the row."""
        rows = self.config.vocabulary.rows(target.segment)
        logits_BFR = logits_BFV[..., rows.start : rows.stop].float()
        sizes_F = torch.tensor(target.sizes_F, device=logits_BFR.device)
        impossible_FR = torch.arange(len(rows), device=logits_BFR.device) >= sizes_F[:, None]
        return logits_BFR.masked_fill(impossible_FR, -torch.inf)


def _positions(mask_BP: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """Positions that do not count the padding, so that a padded sequence equals the same one alone."""
    return (mask_BP.cumsum(-1) - 1).clamp(min=0)


def _mean(values_BF: Float[Tensor, "B F"], counted_BF: Bool[Tensor, "B F"] | None) -> Float[Tensor, ""]:
    if counted_BF is None:
        return values_BF.mean()
    return (values_BF * counted_BF).sum() / counted_BF.sum().clamp(min=1)
