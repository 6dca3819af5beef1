"""The latent policy: a causal vision-language model that predicts latent actions first, robot actions later.

LAPA (https://arxiv.org/abs/2410.11758), stages 2 and 3. A sequence is

    observation: images and prompt | the robot's state | field

and the field is either a latent action, L tokens of the latent segment, or a chunk of K robot actions. The head
predicts robot actions in one of three ways:

bins   K x A tokens of the bin segment, time step by time step: as in the paper, where K = 1
chunk  K query tokens, whose hidden states a small head turns into K actions in one pass (arXiv 2502.19645)
flow   flow matching over the chunk, given the hidden states of the observation (arXiv 2410.24164)

The loss of tokens is their cross-entropy. In the loss and in decoding, the softmax is over the rows that are possible
at a position: those of the field's segment, and of the bin segment as many bins as that dimension has. (The paper's
heads are untied per segment, which is the same restriction.) Decoding is greedy over exactly the field's length, with a
KV cache; no code ends it.

    lapa policy pretrain --preset debug --data DATASET --labels LABELS --out POLICY

Axes: B batch, V cameras, P observation tokens, S state dimensions (and whole sequences), F field tokens, L latent
action length, K chunk, A action dimensions, R rows of a segment, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lapa.engine.memory import built
from lapa.errors import UserError
from lapa.policy.actions import KeyedSpace
from lapa.policy.backbones import Backbone
from lapa.policy.config import BackboneConfig, FlowConfig, HeadKind, TinyConfig
from lapa.policy.heads import ActionHead, build_head
from lapa.policy.lora import add_lora, has_lora, hold_old_rows, merge_lora, vocabulary_weights
from lapa.policy.prompts import Prompts
from lapa.policy.vocabulary import Segment, Vocabulary
from lapa.types import Losses, TrainableModel

LossAndParts = tuple[Float[Tensor, ""], dict[str, Tensor]]


@dataclass(frozen=True)
class PolicyConfig:
    """The config of a policy: all of it but weights, tokenizer and statistics."""

    vocabulary: Vocabulary
    cameras: tuple[str, ...]
    """Names of the image slots, in the order in which the model reads them."""
    backbone: BackboneConfig = field(default_factory=TinyConfig)
    prompts: Prompts = field(default_factory=Prompts)
    """Templates of the text that the model reads; `{instruction}` stands for the task in words."""
    state_bins: tuple[int, ...] = ()
    """Bins of each dimension of the robot's state; none where the policy does not read it."""
    latent_length: int = 0
    """L; 0 where the policy never learned latent actions."""
    latent_opening: tuple[int, ...] = ()
    latent_closing: tuple[int, ...] = ()
    """Text tokens around a latent action, for a backbone that was trained with them."""
    text_weight: float = 0.0
    """Weight of the loss of those text tokens; the latent action has the rest."""
    action_opening: tuple[int, ...] = ()
    spaces: tuple[KeyedSpace, ...] = ()
    """The action space of each set of statistics, with the name of its dataset; none before finetuning."""
    head: HeadKind = "bins"
    """How robot actions are predicted."""
    action_bins: tuple[int, ...] = ()
    """Bins of each action dimension, for the head `bins`; the largest number of any dataset."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Sizes of the head `flow`."""
    chunk: int = 0
    """K, the time steps of robot actions predicted at once."""
    latent_weight: float = 0.0
    """Weight of the loss of latent actions when finetuning."""
    lam_fingerprint: str = ""
    """Fingerprint of the latent action model whose codes the policy predicts; empty: not known."""

    def __post_init__(self) -> None:
        if not all(self.cameras) or not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise UserError(f"a policy needs at least one camera, each named once, got {self.cameras}")
        if self.latent_length < 0 or bool(self.latent_length) != bool(self.vocabulary.latent):
            raise UserError("latent length and codebook size go together: give both or neither")
        if bool(self.chunk) != bool(self.spaces):
            raise UserError("chunk and action spaces go together: give both or neither")
        if self.chunk and self.head == "bins":
            _require_rows("action", self.action_bins, self.action_dim, self.vocabulary.bins)
        if self.state_bins:
            _require_rows("state", self.state_bins, len(self.state_bins), self.vocabulary.state)
        if self.chunk and self.head == "chunk" and self.vocabulary.query < self.chunk:
            raise UserError(f"a chunk of {self.chunk} needs as many query rows, got {self.vocabulary.query}")
        if not 0 <= self.text_weight < 1:
            raise UserError(f"the weight of the text must be in [0, 1), got {self.text_weight}")
        if self.text_weight and not (self.latent_opening or self.latent_closing):
            raise UserError("--text-weight is for backbones that put text around a latent action (lwm); leave it out")
        if self.latent_weight < 0:
            raise UserError(f"the weight of latent actions must be at least 0, got {self.latent_weight}")

    @property
    def action_dim(self) -> int:
        return self.spaces[0].space.action_dim if self.spaces else 0

    @property
    def state_dim(self) -> int:
        """Dimensions of the state that the policy reads; 0: it reads none."""
        return len(self.state_bins)


@dataclass(frozen=True)
class Field:
    """What to predict: a segment, how many of its rows are possible at each of F positions, the text around it."""

    segment: Segment
    sizes_F: tuple[int, ...]
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return len(self.sizes_F)


class LatentPolicy(TrainableModel, nn.Module):
    """The whole policy as one module; `forward` is the training loss.

    A batch holds the output of the backbone's processor, `state_BS` where the policy reads the state, and the targets:
    `latent_BL`, tokens, with `latent_mask_B` where some samples have none; or `action_BKA` with `action_mask_BK` (False
    where the episode has ended): tokens for the head `bins`, scaled actions for others. With both, the losses are
    added, the latent one times `latent_weight`.
    """

    sharded_methods = ("predict_codes", "predict_actions")

    def __init__(self, config: PolicyConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self._adapted_rows: range | None = None
        width = int(vocabulary_weights(backbone.language)[0].shape[-1])
        self.head: ActionHead | None = None
        if config.chunk and config.head != "bins":
            self.head = build_head(config.head, width, config.chunk, config.action_dim, config.flow)

    @property
    def latent_field(self) -> Field:
        """Raises UserError where the policy never learned latent actions."""
        config = self.config
        if not config.latent_length:
            raise UserError("this policy has no latent actions: it was trained on robot actions from scratch")
        sizes_F = (config.vocabulary.latent,) * config.latent_length
        return Field("latent", sizes_F, config.latent_opening, config.latent_closing)

    @property
    def action_field(self) -> Field:
        """Raises UserError where the policy has not been finetuned."""
        if not self.config.chunk:
            raise UserError("this policy was only pretrained and has no robot actions: run `lapa policy finetune`")
        return Field("bins", self.config.action_bins * self.config.chunk, self.config.action_opening)

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        if "action_BKA" not in batch:
            return Losses(*self._latent_loss(batch))
        loss, parts = self._action_loss(batch)
        if "latent_BL" in batch:
            latent_loss, latent_parts = self._latent_loss(batch)
            loss = loss + self.config.latent_weight * latent_loss
            parts = {**parts, **{f"latent_{name}": value for name, value in latent_parts.items()}}
        return Losses(loss, parts)

    def field_logits(
        self, batch: Mapping[str, Tensor], target: Field, tokens_BF: Int[Tensor, "B F"]
    ) -> Float[Tensor, "B F R"]:
        """Logits over the segment's rows at each position of the field, given the true tokens before it."""
        hidden_BSD = self._hidden_of_field(batch, target, tokens_BF)
        first = len(target.opening)
        return self._possible(hidden_BSD[:, first : first + target.length], target)

    @torch.no_grad()
    def decode(self, batch: Mapping[str, Tensor], target: Field) -> tuple[Int[Tensor, "B F"], Float[Tensor, "B F"]]:
        """Greedy decoding of one field with a KV cache: its tokens and their log-probabilities."""
        hidden_BSD, memory = self.backbone.begin(batch, self._context(batch, target.opening), target.length)
        rows = self.config.vocabulary.rows(target.segment)
        # Outside the loop, since making a tensor from numbers makes the CPU wait for the GPU.
        impossible_FR = _impossible(target, rows, hidden_BSD.device)
        tokens: list[Tensor] = []
        log_probabilities = []
        for step in range(target.length):
            if tokens:
                hidden_BSD = self.backbone.advance(memory, tokens[-1])
            logits_B1R = self.backbone.logits(hidden_BSD[:, -1:], rows)
            best, code_B1 = logits_B1R.masked_fill(impossible_FR[step], -torch.inf).log_softmax(-1).max(-1)
            tokens.append(code_B1 + rows.start)
            log_probabilities.append(best)
        return torch.cat(tokens, dim=1), torch.cat(log_probabilities, dim=1)

    def predict_codes(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "B L"]:
        """The latent actions of a batch of observations, as codes."""
        tokens_BL, _ = self.decode(batch, self.latent_field)
        return self.config.vocabulary.codes("latent", tokens_BL)

    @torch.no_grad()
    def predict_actions(self, batch: Mapping[str, Tensor]) -> Int[Tensor, "B K A"] | Float[Tensor, "B K A"]:
        """The robot actions of a batch of observations, as bins of each dimension (head `bins`) or scaled numbers."""
        if self.head is not None:
            return self.head.act(*self._hidden_of_head(batch))
        tokens_BF, _ = self.decode(batch, self.action_field)
        bins_BF = self.config.vocabulary.codes("bins", tokens_BF)
        return rearrange(bins_BF, "b (k a) -> b k a", a=self.config.action_dim)

    def grown(self, config: PolicyConfig) -> LatentPolicy:
        """This policy with a config that has more rows or another head.

        The new policy takes over the backbone, and the weights of the head where it is of the same kind.
        """
        self.backbone.resize(config.vocabulary)
        grown = built(lambda: LatentPolicy(config, self.backbone))
        if self.head is not None and grown.head is not None and self.config.head == config.head:
            grown.head.load_state_dict(self.head.state_dict())
        return grown

    def freeze(self, *, vision: bool = False) -> None:
        """Freezes what is not to be trained: a head that the loss does not reach, and the vision tower if asked.

        The paper's pretraining freezes the tower; its projection is trained.
        """
        if vision:
            self.backbone.vision.requires_grad_(False)
        if self.head is not None and not self.config.latent_weight:
            # Nothing is predicted as tokens, so an output embedding that is not tied to the input is not used.
            for unused in vocabulary_weights(self.backbone.language)[1:]:
                unused.requires_grad_(False)

    def add_adapters(self, rank: int) -> None:
        """LoRA: trains the decoder through adapters, and of its vocabulary only the rows of actions.

        The vision tower and its projection are trained as before, unless `freeze` freezes the tower.
        """
        vocabulary, language = self.config.vocabulary, self.backbone.language
        sight = set(language.parameters()) - set(language.get_decoder().parameters())
        sight -= set(vocabulary_weights(language))
        self._adapted_rows = range(vocabulary.rows("latent").start, vocabulary.size)
        add_lora(language, rank, new_rows=self._adapted_rows)
        for parameter in sight:
            parameter.requires_grad_(True)

    def merge_adapters(self) -> None:
        """Merges adapters, where there are any, into the weights: an ordinary model again."""
        if has_lora(self.backbone.language):
            merge_lora(self.backbone.language)

    def after_sharding(self) -> None:
        """Holds the old rows again, since sharding replaces the parameters."""
        if self._adapted_rows is not None:
            hold_old_rows(self.backbone.language, self._adapted_rows)

    def shard_units(self) -> list[nn.Module]:
        return self.backbone.blocks

    def undecayed(self) -> list[nn.Parameter]:
        """Embedding and head, since decay would change rows of words that no batch contains."""
        return vocabulary_weights(self.backbone.language)

    def full_precision(self) -> list[nn.Module]:
        return self.backbone.full_precision

    def checkpoint_activations(self) -> None:
        language = self.backbone.language
        # The second is the name before transformers 5.23.
        enable = getattr(language, "activation_checkpointing_enable", language.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    def _latent_loss(self, batch: Mapping[str, Tensor]) -> LossAndParts:
        target, tokens_BL = self.latent_field, batch["latent_BL"]
        counted_BL = None
        if "latent_mask_B" in batch:
            counted_BL = batch["latent_mask_B"][:, None].expand_as(tokens_BL)
        hidden_BSD = self._hidden_of_field(batch, target, tokens_BL)
        first, last = len(target.opening), len(target.opening) + target.length
        loss, parts = self._cross_entropy(hidden_BSD[:, first:last], target, tokens_BL, counted_BL)
        if not self.config.text_weight:
            return loss, parts
        hidden_BCD = torch.cat([hidden_BSD[:, :first], hidden_BSD[:, last:]], dim=1)
        tags_BC = _repeated((*target.opening, *target.closing), tokens_BL)
        logits_BCR = self.backbone.logits(hidden_BCD, self.config.vocabulary.rows("text"))
        text_BC = F.cross_entropy(rearrange(logits_BCR, "b c r -> b r c"), tags_BC, reduction="none")
        text = _mean(text_BC, None if counted_BL is None else counted_BL[:, :1].expand_as(text_BC))
        weight = self.config.text_weight
        return (1 - weight) * loss + weight * text, {**parts, "text_loss": text.detach()}

    def _action_loss(self, batch: Mapping[str, Tensor]) -> LossAndParts:
        if self.head is not None:
            return self.head.loss(*self._hidden_of_head(batch), batch["action_BKA"], batch["action_mask_BK"])
        target, tokens_BF = self.action_field, rearrange(batch["action_BKA"], "b k a -> b (k a)")
        counted_BF = batch["action_mask_BK"].repeat_interleave(self.config.action_dim, dim=1)
        hidden_BSD = self._hidden_of_field(batch, target, tokens_BF)
        return self._cross_entropy(hidden_BSD[:, len(target.opening) :], target, tokens_BF, counted_BF)

    def _cross_entropy(
        self,
        hidden_BFD: Float[Tensor, "B F D"],
        target: Field,
        tokens_BF: Int[Tensor, "B F"],
        counted_BF: Bool[Tensor, "B F"] | None,
    ) -> LossAndParts:
        logits_BFR = self._possible(hidden_BFD, target)
        codes_BF = tokens_BF - self.config.vocabulary.rows(target.segment).start
        losses_BF = F.cross_entropy(rearrange(logits_BFR, "b f r -> b r f"), codes_BF, reduction="none")
        right_BF = (logits_BFR.argmax(-1) == codes_BF).float()
        accuracy = _mean(right_BF, counted_BF).detach()
        return _mean(losses_BF, counted_BF), {"token_accuracy": accuracy}

    def _hidden_of_field(
        self, batch: Mapping[str, Tensor], target: Field, tokens_BF: Int[Tensor, "B F"]
    ) -> Float[Tensor, "B S D"]:
        """Hidden states that predict the opening, the field and the closing."""
        context_BC, closing_BC = self._context(batch, target.opening), _repeated(target.closing, tokens_BF)
        hidden_BSD, _ = self.backbone.read(batch, torch.cat([context_BC, tokens_BF, closing_BC], dim=1)[:, :-1])
        return hidden_BSD[:, -(len(target.opening) + target.length + len(target.closing)) :]

    def _hidden_of_head(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"]]:
        """The hidden states for the action head and their mask: those of the queries, for `flow` of the observation."""
        context_BC = self._context(batch, self.config.action_opening)
        if self.config.head == "flow":
            hidden_BSD, mask_BS = self.backbone.read(batch, context_BC)
            return hidden_BSD, mask_BS.bool()
        queries_BK = _repeated(tuple(self.config.vocabulary.rows("query")[: self.config.chunk]), context_BC)
        hidden_BSD, mask_BS = self.backbone.read(batch, torch.cat([context_BC, queries_BK], dim=1))
        return hidden_BSD[:, -self.config.chunk :], mask_BS[:, -self.config.chunk :].bool()

    def _context(self, batch: Mapping[str, Tensor], opening: tuple[int, ...]) -> Int[Tensor, "B C"]:
        """The tokens between the observation and the field: state and opening."""
        opening_BC = _repeated(opening, batch["tokens_BT"])
        return torch.cat([batch["state_BS"], opening_BC], dim=1) if self.config.state_dim else opening_BC

    def _possible(self, hidden_BFD: Float[Tensor, "B F D"], target: Field) -> Float[Tensor, "B F R"]:
        """Logits of the segment's rows, minus infinity where a position cannot have the row."""
        rows = self.config.vocabulary.rows(target.segment)
        logits_BFR = self.backbone.logits(hidden_BFD, rows)
        return logits_BFR.masked_fill(_impossible(target, rows, logits_BFR.device), -torch.inf)


def _require_rows(what: str, bins: tuple[int, ...], dimensions: int, rows: int) -> None:
    if len(bins) != dimensions or not 1 <= min(bins, default=0) <= max(bins, default=0) <= rows:
        raise UserError(f"{what} bins {bins} of {dimensions} dimensions do not fit the {rows} rows of their segment")


def _impossible(target: Field, rows: range, device: torch.device) -> Bool[Tensor, "F R"]:
    """Which of the segment's rows a position cannot have."""
    sizes_F = torch.tensor(target.sizes_F, device=device)
    return torch.arange(len(rows), device=device) >= sizes_F[:, None]


def _repeated(tokens: tuple[int, ...], like_BX: Int[Tensor, "B X"]) -> Int[Tensor, "B C"]:
    """The same tokens for each sample of a batch."""
    return torch.tensor(tokens, dtype=torch.long, device=like_BX.device).expand(len(like_BX), -1)


def _mean(values_BF: Float[Tensor, "B F"], counted_BF: Bool[Tensor, "B F"] | None) -> Float[Tensor, ""]:
    if counted_BF is None:
        return values_BF.mean()
    return (values_BF * counted_BF).sum() / counted_BF.sum().clamp(min=1)
