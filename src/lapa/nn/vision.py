"""A residual vision tower: ResNet (https://arxiv.org/abs/1512.03385) of transformers, with GroupNorm.

A convolutional tower because it learns from few images: in pilots on Meta-World small CNNs at 64 px learned to act
within a thousand steps, and vision transformers from scratch did not.

    tower = residual_tower((32, 64, 128), depth=1)
    features_BDHW = tower(pixels_BCHW.contiguous(memory_format=torch.channels_last)).last_hidden_state

Axes: B batch, C channel, D width of the last stage, H W image or grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel


def residual_tower(widths: Sequence[int], depth: int, *, in_channels: int = 3) -> ResNetModel:
    """A tower of `depth` residual blocks a stage, one stage for each width, its convolutions in channels_last.

    Widths (64, 128, 256, 512) and depth 2 are those of ResNet-18.
    """
    tower = ResNetModel(
        ResNetConfig(
            num_channels=in_channels,
            embedding_size=widths[0],
            hidden_sizes=list(widths),
            depths=[depth] * len(widths),
            layer_type="basic",
        )
    )
    _replace_batch_norm(tower)
    return tower.to(memory_format=torch.channels_last)  # type: ignore[call-arg]


def _replace_batch_norm(module: nn.Module) -> None:
    """GroupNorm in BatchNorm's place.

    With BatchNorm a sample's output depends on its batch and on running averages; with GroupNorm it does not, and the
    weights are the whole state of the model.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(_num_groups(child.num_features), child.num_features))
        else:
            _replace_batch_norm(child)


def _num_groups(channels: int) -> int:
    """Groups of sixteen channels if sixteen divides them, else one group."""
    return channels // 16 if channels % 16 == 0 else 1
