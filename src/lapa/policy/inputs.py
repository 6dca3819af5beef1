"""From samples and observations to the model's batch: the one way in, for training and acting alike.

Axes: B batch, V cameras, H W image, T text tokens, L latent action length, K chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lapa.data.transforms import resize_and_crop
from lapa.policy.actions import ActionBins
from lapa.policy.model import PolicyConfig


@dataclass(frozen=True)
class PolicyInputs:
    """What turns pictures, words and actions into tensors and tokens."""

    config: PolicyConfig
    tokenizer: PreTrainedTokenizerFast
    bins: ActionBins | None = None

    def observed(self, images: Sequence[Sequence[np.ndarray]], instructions: Sequence[str]) -> dict[str, Tensor]:
        """The pictures of each sample (uint8 HWC, any size, in the order of the image slots) and its instruction as

        `images_BVHWC`, `tokens_BT` and `mask_BT`.
        """
        size = self.config.backbone.image_size
        stacked = np.stack([np.concatenate([resize_and_crop(image[None], size) for image in one]) for one in images])
        prompts = [self.config.prompt.replace("{instruction}", instruction) for instruction in instructions]
        text = self.tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return {
            "images_BVHWC": torch.from_numpy(stacked),
            "tokens_BT": text["input_ids"],
            "mask_BT": text["attention_mask"],
        }

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items of `PolicySteps` as a training batch: what is observed, and what is to be said as tokens.

        Raises ValueError for a code that the vocabulary lacks, and for actions of the wrong width or not finite.
        """
        images = [list(item["images"].values()) for item in items]
        batch = self.observed(images, [item["instruction"] for item in items])
        batch["index"] = torch.tensor([int(item["index"]) for item in items])
        vocabulary = self.config.vocabulary
        if "codes_L" in items[0]:
            codes_BL = torch.from_numpy(np.stack([item["codes_L"] for item in items]))
            batch["latent_BL"] = vocabulary.tokens("latent", codes_BL)
        else:
            assert self.bins is not None, "actions to learn, but no bins to say them in"
            bins_BKA = self.bins.encode(np.stack([item["actions_KA"] for item in items]))
            batch["action_BKA"] = vocabulary.tokens("bins", torch.from_numpy(bins_BKA))
            batch["action_mask_BK"] = torch.from_numpy(np.stack([item["action_mask_K"] for item in items]))
        return batch
