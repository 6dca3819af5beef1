"""The released latent policy (LAPA-7B, and the LWM-Chat-1M that it starts from) as an ordinary Llama of transformers.

LAPA (https://arxiv.org/abs/2410.11758), code https://github.com/LatentActionPretraining/LAPA. The released model has an
embedding table and a head for each kind of token, chosen by masks; side by side they are one vocabulary, text | vision
| latent | bins, and the rest is Llama-7B with RoPE on interleaved pairs, whose rows are reordered to halves here.

    model = from_released(params, PUBLISHED)          # names with slashes -> arrays, as `open_checkpoint` gives them
    model.logits(tokens_BT, vision_mask_BT, latent_mask_BT)["latent"]

A released checkpoint holds, each under `transformer/` or as a head, and nothing else:

    wte vte dte ate /embedding                    tables of text, vision, latent actions and robot actions [rows, D]
    lm_head vision_head delta_head action_head    /kernel, their heads [D, rows]
    ln_f/kernel                                   the final norm [D]
    h/scan_decoder/...                            all layers stacked, or h/0/..., h/1/...: attention_norm and ffn_norm
                                                  /kernel [D], attention/{wq,wk,wv,wo}/kernel, feed_forward/{w1,w2,w3}
                                                  /kernel [in, out]

LWM-Chat-1M has no `dte` and `delta_head`; only a finetuned policy has `ate` and `action_head`.

Axes: B batch, T tokens, L latent action length, D width, R rows of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lapa.errors import UserError, unknown
from lapa.policy.backbones.base import positions
from lapa.policy.vocabulary import Segment, Vocabulary
from lapa.released.checkpoints import StoredTensors, require_shapes, shapes_of
from lapa.released.lwm import llama_config

PUBLISHED: dict[str, Any] = {
    "vocab_size": 32000,
    "vision_vocab_size": 8448,
    "delta_vocab_size": 8,
    "action_vocab_size": 256,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "theta": 50_000_000,
    "max_sequence_length": 4096,
    "eof_token": 8192,
    "eov_token": 8193,
}
# Of these a checkpoint has as many rows as its own tables.
OPTIONAL_SIZES = ("delta_vocab_size", "action_vocab_size")
REQUIRED = (
    "vocab_size",
    "vision_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
REAL = ("rms_norm_eps", "theta")
# Keys by whose beginning they say how the released code ran, and not what the model is.
OF_THE_RUN = ("scan_", "remat_", "mesh_", "param_scan_", "use_", "tie_", "initializer_", "bos_", "eos_", "pad_")

TABLES: dict[Segment, tuple[str, str, str]] = {
    "text": ("transformer/wte/embedding", "lm_head/kernel", "vocab_size"),
    "vision": ("transformer/vte/embedding", "vision_head/kernel", "vision_vocab_size"),
    "latent": ("transformer/dte/embedding", "delta_head/kernel", "delta_vocab_size"),
    "bins": ("transformer/ate/embedding", "action_head/kernel", "action_vocab_size"),
}
OPTIONAL: tuple[Segment, ...] = ("latent", "bins")
FINAL_NORM = "transformer/ln_f/kernel"
STACKED = "transformer/h/scan_decoder"
LAYER = {
    "attention/wq/kernel": "self_attn.q_proj.weight",
    "attention/wk/kernel": "self_attn.k_proj.weight",
    "attention/wv/kernel": "self_attn.v_proj.weight",
    "attention/wo/kernel": "self_attn.o_proj.weight",
    "feed_forward/w1/kernel": "mlp.gate_proj.weight",
    "feed_forward/w3/kernel": "mlp.up_proj.weight",
    "feed_forward/w2/kernel": "mlp.down_proj.weight",
    "attention_norm/kernel": "input_layernorm.weight",
    "ffn_norm/kernel": "post_attention_layernorm.weight",
}
ROTATED = ("attention/wq/kernel", "attention/wk/kernel")

Layout = Literal["released", "fixed"]
LATENT_SHARE, TEXT_SHARE = 0.99, 0.01
PADDING = 0


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that say what the model is. UserError on unknown, missing or impossible ones, and a tied vocabulary."""
    if config.get("tie_word_embeddings"):
        raise UserError("the released config ties heads to embeddings; the released models do not")
    kept = {key: value for key, value in config.items() if not key.startswith(OF_THE_RUN)}
    for key in kept:
        if key not in PUBLISHED:
            raise unknown("key of the released config", key, PUBLISHED)
    if missing := [key for key in REQUIRED if key not in kept]:
        raise UserError(f"the released config needs the keys {', '.join(missing)}")
    for key, value in kept.items():
        if key in REAL:
            fits, expected = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
        else:
            least = 0 if key in ("eof_token", "eov_token", *OPTIONAL_SIZES) else 1
            fits, expected = type(value) is int and value >= least, f"a whole number of at least {least}"
        if not fits:
            raise UserError(f"{key} of the released config must be {expected}, got {value!r}")
    return kept


def released_vocabulary(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Vocabulary:
    """The segments that a checkpoint has. Latent and action rows are as many as the config or else its tables say."""
    rows = {"text": config["vocab_size"], "vision": config["vision_vocab_size"]}
    for segment in OPTIONAL:
        table, head, key = TABLES[segment]
        if table in shapes or head in shapes:
            own = shapes[table][:1] if table in shapes else shapes[head][-1:]
            rows[segment] = config.get(key, own[0] if own else 0)
    return Vocabulary(**rows)


def released_shapes(config: Mapping[str, Any], vocabulary: Vocabulary, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds."""
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {FINAL_NORM: (width,)}
    for segment, (table, head, _) in TABLES.items():
        if rows := len(vocabulary.rows(segment)):
            shapes |= {table: (rows, width), head: (width, rows)}
    sizes = {"w1": (width, inner), "w3": (width, inner), "w2": (inner, width)}
    for name in LAYER:
        part = name.split("/")[-2]
        shape = (width,) if part.endswith("norm") else sizes.get(part, (width, width))
        if stacked:
            shapes[f"{STACKED}/{name}"] = (layers, *shape)
        else:
            shapes |= {f"transformer/h/{layer}/{name}": shape for layer in range(layers)}
    return shapes


def released_llama(config: Mapping[str, Any], vocabulary: Vocabulary) -> LlamaConfig:
    """The language model's config in transformers."""
    full = {**PUBLISHED, **config}
    return llama_config(
        vocabulary.size,
        width=full["hidden_size"],
        inner_width=full["intermediate_size"],
        layers=full["num_hidden_layers"],
        heads=full["num_attention_heads"],
        rope_theta=full["theta"],
        norm_eps=full["rms_norm_eps"],
        max_length=full["max_sequence_length"],
    )


def llama_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the language model's weights in transformers."""
    with torch.device("meta"):
        own = LlamaForCausalLM(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in own.items()}


def check_weights(params: Mapping[str, Any], config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a checkpoint. UserError listing every tensor that is missing, extra or misshapen."""
    shapes = shapes_of(params)
    stacked = any(name.startswith(f"{STACKED}/") for name in shapes) or not any(
        name.startswith("transformer/h/") for name in shapes
    )
    vocabulary = released_vocabulary(shapes, config)
    require_shapes("the released policy", shapes, released_shapes(config, vocabulary, stacked=stacked))
    return vocabulary


def llama_tensors(params: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and weight in transformers, in the order of `llama_shapes`; of a file only what the next needs is read."""
    segments = [segment for segment in TABLES if TABLES[segment][0] in params]
    yield "model.embed_tokens.weight", torch.cat([_take(params, TABLES[segment][0]) for segment in segments])
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER.items():
            stacked = f"{STACKED}/{theirs}"
            tensor = (
                _take(params, stacked, layer) if stacked in params else _take(params, f"transformer/h/{layer}/{theirs}")
            )
            if theirs in ROTATED:
                tensor = pairs_to_halves(tensor, config["num_attention_heads"])
            yield f"model.layers.{layer}.{ours}", tensor.T.contiguous() if tensor.ndim == 2 else tensor
    yield "model.norm.weight", _take(params, FINAL_NORM)
    heads = [_take(params, TABLES[segment][1]) for segment in segments]
    yield "lm_head.weight", torch.cat(heads, dim=1).T.contiguous()


def pairs_to_halves(kernel_DO: Float[Tensor, "D O"], heads: int) -> Float[Tensor, "D O"]:
    """Outputs of each head reordered from (x0 y0 x1 y1 ...), rotated as pairs, to (x0 x1 ... y0 y1 ...), as halves."""
    return rearrange(kernel_DO, "d (heads pairs two) -> d (heads two pairs)", heads=heads, two=2)


class ReleasedPolicy(nn.Module):
    """The language model with the released arithmetic: separate heads, weighted losses, greedy latent codes.

    layout: "released" repeats two mistakes of the released code, so that its numbers can be compared; "fixed" does
    not. They are the text loss that also predicts token 0 at latent positions (a misplaced parenthesis), and the
    decoding that takes latent code 2 for the end of the sequence.
    """

    def __init__(self, language: LlamaForCausalLM, vocabulary: Vocabulary, *, layout: Layout = "fixed") -> None:
        super().__init__()
        self.language, self.vocabulary, self.layout = language, vocabulary, layout

    def logits(
        self,
        tokens_BT: Int[Tensor, "B T"],
        vision_mask_BT: Tensor,
        latent_mask_BT: Tensor,
        action_mask_BT: Tensor | None = None,
    ) -> dict[Segment, Float[Tensor, "B T R"]]:
        """Logits of each segment's head at every position. Tokens are numbers within the segment that the masks say."""
        tokens = self._rows(tokens_BT, vision=vision_mask_BT, latent=latent_mask_BT, bins=action_mask_BT)
        logits = self.language(input_ids=tokens, use_cache=False).logits
        return {segment: self._of(segment, logits) for segment in self._segments()}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The losses of each segment, and `total`: 0.99 latent + 0.01 text, or robot actions alone where there are any.

        A checkpoint without latent actions has no such total.
        The batch holds sequences `tokens_BT`, what they are (`vision_mask_BT`, `latent_mask_BT`, `action_mask_BT` in
        a finetuned policy) and `loss_mask_BT`; the model reads all but the last token and is to say all but the first.
        """
        inputs = {name: tensor[:, :-1] for name, tensor in batch.items()}
        targets = {name: tensor[:, 1:] for name, tensor in batch.items()}
        return self.shifted_losses(inputs, targets)

    def shifted_losses(
        self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, ""]]:
        """`losses` where what is read and what is to be said are given apart, under the same names."""
        logits = self.logits(
            inputs["tokens_BT"], inputs["vision_mask_BT"], inputs["latent_mask_BT"], inputs.get("action_mask_BT")
        )
        counted = targets["loss_mask_BT"].float()
        vision, latent = targets["vision_mask_BT"].bool(), targets["latent_mask_BT"].bool()
        action = targets["action_mask_BT"].bool() if "action_mask_BT" in targets else torch.zeros_like(vision)
        text = ~(vision | latent | action)
        said = {"text": text, "vision": vision, "latent": latent, "bins": action}
        losses = {}
        for segment, here in said.items():
            if segment not in logits:
                continue
            codes = torch.where(here, targets["tokens_BT"], 0)
            if segment == "text" and self.layout == "released":
                here = ~(vision & ~(latent | action))
            losses[str(segment)] = _mean_by_sequence(logits[segment], codes, counted * here)
        if "bins" in losses and bool(action.any()):
            losses["total"] = losses["bins"]
        elif "latent" in losses:
            losses["total"] = LATENT_SHARE * losses["latent"] + TEXT_SHARE * losses["text"]
        return losses

    @torch.no_grad()
    def generate(
        self,
        tokens_BT: Int[Tensor, "B T"],
        vision_mask_BT: Tensor,
        mask_BT: Tensor,
        *,
        length: int,
        segment: Segment = "latent",
        eos: int = 2,
    ) -> Int[Tensor, "B L"]:
        """Greedy codes of a segment after left-padded tokens. Layout "released" ends a sequence at code `eos`."""
        mask, inputs = mask_BT.long(), self._rows(tokens_BT, vision=vision_mask_BT)
        position_ids, cache = positions(mask), DynamicCache(config=self.language.config)
        ended_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        codes = []
        for _ in range(length):
            logits = self.language(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            code_B = self._of(segment, logits)[:, -1].argmax(-1)
            if self.layout == "released":
                code_B = code_B.masked_fill(ended_B, PADDING)
                ended_B |= code_B == eos
            codes.append(code_B)
            inputs = code_B[:, None] + self.vocabulary.rows(segment).start
            mask = F.pad(mask, (0, 1), value=1)
            position_ids = position_ids[:, -1:] + 1
        return torch.stack(codes, dim=1)

    def _segments(self) -> list[Segment]:
        return [segment for segment in TABLES if len(self.vocabulary.rows(segment))]

    def _of(self, segment: Segment, logits_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B T R"]:
        rows = self.vocabulary.rows(segment)
        return logits_BTV[..., rows.start : rows.stop]

    def _rows(self, tokens_BT: Int[Tensor, "B T"], **masks: Tensor | None) -> Int[Tensor, "B T"]:
        """Tokens of the concatenated vocabulary."""
        rows = tokens_BT.long()
        for segment, mask_BT in masks.items():
            if mask_BT is not None and bool(mask_BT.any()):
                known = self.vocabulary.rows(segment)  # type: ignore[arg-type]
                if not len(known):
                    raise UserError(f"this checkpoint has no {segment} segment, but the mask marks tokens of it")
                rows = torch.where(mask_BT.bool(), tokens_BT.long() + known.start, rows)
        return rows


def from_released(params: Mapping[str, Any], config: Mapping[str, Any], *, layout: Layout = "fixed") -> ReleasedPolicy:
    """The policy with the released weights (arrays or tensors under the released names), in evaluation mode.

    config: the released model's (keys of PUBLISHED). Raises UserError on unknown or missing keys, and one that lists
    every tensor that is missing, left over or of another shape.
    """
    config = checked_config(config)
    vocabulary = check_weights(params, config)
    language = LlamaForCausalLM(released_llama(config, vocabulary))
    own = language.state_dict()
    for name, tensor in llama_tensors(params, config):
        own[name].copy_(tensor)
    return ReleasedPolicy(language, vocabulary, layout=layout).eval()


def _mean_by_sequence(
    logits_BTR: Float[Tensor, "B T R"], codes_BT: Int[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Cross-entropy averaged over each sequence's counted positions, then over the batch."""
    losses_BT = F.cross_entropy(rearrange(logits_BTR.float(), "b t r -> b r t"), codes_BT.long(), reduction="none")
    sums_B = (losses_BT * weight_BT).sum(1)
    return (sums_B / weight_BT.sum(1).clamp(min=1e-10)).mean()


def _take(params: Mapping[str, Any], name: str, layer: int | None = None) -> Tensor:
    if isinstance(params, StoredTensors):
        return params.read(name, layer)
    return torch.as_tensor(params[name] if layer is None else params[name][layer])
