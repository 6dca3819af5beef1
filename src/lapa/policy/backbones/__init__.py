"""Backbones: what sees and what speaks. A policy asks no more of one than the interface below.

`tiny` is trained from scratch and downloads nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import nn
from transformers import PreTrainedModel

from lapa.policy.backbones.tiny import TinyBackbone, TinyConfig

BackboneConfig = TinyConfig


class Backbone(Protocol):
    """An `nn.Module` with a vision tower and a causal language model of transformers.

    vision: what `freeze_vision` freezes.
    language: called with `inputs_embeds`; its input embedding and head have a row for each token of the vocabulary.
    """

    @property
    def vision(self) -> nn.Module: ...

    @property
    def language(self) -> PreTrainedModel: ...

    def embed_images(self, images_BVHWC: UInt8[torch.Tensor, "B V H W 3"]) -> Float[torch.Tensor, "B N D"]:
        """The image tokens of V cameras, in the language model's width."""


def build_backbone(config: BackboneConfig, *, num_cameras: int, vocabulary_size: int) -> Backbone:
    """A freshly initialised backbone."""
    return TinyBackbone(config, num_cameras=num_cameras, vocabulary_size=vocabulary_size)
