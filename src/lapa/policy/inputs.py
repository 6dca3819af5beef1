"""From samples and observations to the model's batch: the one way in, for training and acting alike.

Axes: B batch, V cameras, H W image, S state dimensions, L latent action length, K chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapa.errors import UserError
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import Processor
from lapa.policy.model import PolicyConfig
from lapa.policy.statistics import ActionCodec, Statistics


@dataclass(frozen=True)
class PolicyInputs:
    """What turns pictures, words, states and actions into tensors and tokens.

    codec: the robot's actions as bins or scaled numbers; states: the bins of its state. None where there are none.
    by_key: the same for each dataset by name, in their place, where each has its own.
    """

    config: PolicyConfig
    processor: Processor
    codec: ActionCodec | None = None
    states: ActionBins | None = None
    by_key: Mapping[str, Statistics] = field(default_factory=dict)

    def observed(
        self,
        images: Sequence[Sequence[np.ndarray]],
        instructions: Sequence[str],
        states: Sequence[np.ndarray] | None = None,
        datasets: Sequence[str | None] | None = None,
    ) -> dict[str, Tensor]:
        """The pictures of each sample (uint8 HWC, any size, in the order of the image slots; an `lwm` policy also takes

        the codes of its image tokeniser, int [N], in place of one), its instruction, and its state, for a policy that
        is told it. datasets: whose prompt each sample gets; by default the policy's own.
        """
        if self.config.backbone.kind != "lwm" and any(image.ndim == 1 for one in images for image in one):
            raise UserError(
                "the data hold codes of pictures in place of pictures, which a policy with the backbone "
                f"{self.config.backbone.kind} cannot read; take one with the backbone lwm (`lapa import lapa-7b`), or "
                "give the pictures: images=FOLDER with --data lapa-jsonl:FILE"
            )
        names = datasets or [None] * len(instructions)
        prompts = [self.config.prompts.text(words, name) for words, name in zip(instructions, names, strict=True)]
        batch = self.processor(images, prompts)
        if self.config.state_dim:
            assert states is not None, "a state to be told, but none is given"
            bins_BS = np.stack(
                [self._bins_of(name).encode(state_S) for state_S, name in zip(states, names, strict=True)]
            )
            batch["state_BS"] = self.config.vocabulary.tokens("state", torch.from_numpy(bins_BS))
        return batch

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items of `EpisodeSteps` as a training batch: what is observed, and what is to be said.

        Raises UserError for a code that the vocabulary lacks, and for actions of the wrong width or not finite.
        """
        batch = self.observed(
            [list(item["images"].values()) for item in items],
            [item["instruction"] for item in items],
            [item["state_S"] for item in items] if self.config.state_dim else None,
            [item["dataset"] for item in items],
        )
        batch["index"] = torch.tensor([int(item["index"]) for item in items])
        vocabulary = self.config.vocabulary
        if "codes_L" in items[0]:
            codes_BL = torch.from_numpy(np.stack([item["codes_L"] for item in items]))
            batch["latent_BL"] = vocabulary.tokens("latent", codes_BL)
            batch["latent_mask_B"] = torch.tensor([bool(item["has_codes"]) for item in items])
        if "actions_KA" in items[0]:
            said = [self.codec_of(item["dataset"]).encode(item["actions_KA"]) for item in items]
            actions_BKA = torch.from_numpy(np.stack(said))
            batch["action_BKA"] = vocabulary.tokens("bins", actions_BKA) if self.config.head == "bins" else actions_BKA
            batch["action_mask_BK"] = torch.from_numpy(np.stack([item["action_mask_K"] for item in items]))
        return batch

    def decode(self, said_BKA: np.ndarray, datasets: Sequence[str | None]) -> np.ndarray:
        """What the model says, in the units of each sample's robot."""
        codecs = [self.codec_of(name) for name in datasets]
        return np.stack([codec.decode(codec.clamp(said_KA)) for codec, said_KA in zip(codecs, said_BKA, strict=True)])

    def codec_of(self, dataset: str | None) -> ActionCodec:
        """What the actions of a dataset are said in; None: of the only one."""
        codec = self.by_key[dataset or ""].codec if self.by_key else self.codec
        assert codec is not None, "actions to learn, but nothing to say them in"
        return codec

    def _bins_of(self, dataset: str | None) -> ActionBins:
        states = self.by_key[dataset or ""].states if self.by_key else self.states
        assert states is not None, "a state to be told, but no bins for it"
        return states
