"""The arithmetic of the released latent policy as its code has it: the literal twin of the production policy.

LAPA (https://arxiv.org/abs/2410.11758), code https://github.com/LatentActionPretraining/LAPA: losses weighted over
separate heads, greedy latent codes.

Axes: B batch, T tokens, L latent action length, R rows of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from lapa.policy.backbones.base import positions
from lapa.policy.vocabulary import Segment
from lapa.released.lapa7b import ReleasedPolicy, from_released

Layout = Literal["released", "fixed"]
LATENT_SHARE, TEXT_SHARE = 0.99, 0.01
PADDING = 0


def literal_policy(params: Mapping[str, Any], config: Mapping[str, Any], layout: Layout = "fixed") -> LiteralPolicy:
    """The twin with the released weights, in evaluation mode."""
    policy = from_released(params, config)
    return LiteralPolicy(policy, layout).eval()


class LiteralPolicy(ReleasedPolicy):
    """The language model with the released arithmetic: separate heads, weighted losses, greedy latent codes.

    layout: "released" repeats two mistakes of the released code, so that its numbers can be compared; "fixed" does
    not. They are the text loss that also predicts token 0 at latent positions (a misplaced parenthesis), and the
    decoding that takes latent code 2 for the end of the sequence.
    """

    def __init__(self, policy: ReleasedPolicy, layout: Layout) -> None:
        super().__init__(policy.language, policy.vocabulary)
        self.layout = layout

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The losses of each segment, and `total`: 0.99 latent + 0.01 text, or robot actions alone where there are any.

        A checkpoint without latent actions has no such total.
        The batch holds sequences `tokens_BT`, what they are (`vision_mask_BT`, `latent_mask_BT`, `action_mask_BT` in
        a finetuned policy) and `loss_mask_BT`; the model reads all but the last token and predicts all but the first.
        """
        inputs = {name: tensor[:, :-1] for name, tensor in batch.items()}
        targets = {name: tensor[:, 1:] for name, tensor in batch.items()}
        return self.shifted_losses(inputs, targets)

    def shifted_losses(
        self, inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, ""]]:
        """`losses` of inputs and targets that are given apart, under the same names."""
        logits = self.logits(
            inputs["tokens_BT"], inputs["vision_mask_BT"], inputs["latent_mask_BT"], inputs.get("action_mask_BT")
        )
        counted = targets["loss_mask_BT"].float()
        vision, latent = targets["vision_mask_BT"].bool(), targets["latent_mask_BT"].bool()
        action = targets["action_mask_BT"].bool() if "action_mask_BT" in targets else torch.zeros_like(vision)
        text = ~(vision | latent | action)
        segments = {"text": text, "vision": vision, "latent": latent, "bins": action}
        losses = {}
        for segment, here in segments.items():
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
        mask, inputs = mask_BT.long(), self.rows(tokens_BT, vision=vision_mask_BT)
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

    def _of(self, segment: Segment, logits_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B T R"]:
        rows = self.vocabulary.rows(segment)
        return logits_BTV[..., rows.start : rows.stop]


def _mean_by_sequence(
    logits_BTR: Float[Tensor, "B T R"], codes_BT: Int[Tensor, "B T"], weight_BT: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Cross-entropy averaged over each sequence's counted positions, then over the batch."""
    losses_BT = F.cross_entropy(rearrange(logits_BTR.float(), "b t r -> b r t"), codes_BT.long(), reduction="none")
    sums_B = (losses_BT * weight_BT).sum(1)
    return (sums_B / weight_BT.sum(1).clamp(min=1e-10)).mean()
