"""The `tiny` backbone: a small residual network sees, a small Llama speaks. From scratch, on a CPU, no download.

A convolutional tower because it learns from few images: in pilots on Meta-World small CNNs at 64 px learned to act
within a thousand steps, and vision transformers from scratch did not. Both halves are models of transformers.

    lapa policy pretrain --preset tiny --data DATASET --labels LABELS --out POLICY

Axes: B batch, V cameras, H W image, N image tokens of all cameras, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetModel

# The stem halves the image twice, each further stage once.
STEM_STRIDE = 4


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the `tiny` backbone; the defaults are the preset `tiny`."""

    image_size: int = 64
    """Side of the square image that the vision tower sees, in pixels."""
    vision_widths: tuple[int, ...] = (32, 64, 128)
    """Channels of the vision tower's stages; each after the first halves the grid."""
    vision_depth: int = 1
    """Residual blocks a stage."""
    width: int = 128
    """Width D of the language model."""
    layers: int = 4
    heads: int = 4

    @property
    def grid(self) -> int:
        """Side of the square grid of image tokens of one camera."""
        return self.image_size // (STEM_STRIDE * 2 ** (len(self.vision_widths) - 1))

    def __post_init__(self) -> None:
        stride = STEM_STRIDE * 2 ** (len(self.vision_widths) - 1)
        if self.image_size % stride:
            raise ValueError(f"image size {self.image_size} is not a multiple of the vision tower's stride {stride}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads of an even width")


class TinyBackbone(nn.Module):
    """ResNet features on a grid, projected to a prefix of image tokens, before a Llama."""

    def __init__(self, config: TinyConfig, *, num_cameras: int, vocabulary_size: int) -> None:
        super().__init__()
        self.vision = _vision_tower(config)
        self.project = nn.Linear(config.vision_widths[-1], config.width)
        self.position_VND = nn.Parameter(0.02 * torch.randn(num_cameras, config.grid**2, config.width))
        self.language = LlamaForCausalLM(_llama_config(config, vocabulary_size))

    def embed_images(self, images_BVHWC: UInt8[torch.Tensor, "B V H W 3"]) -> Float[torch.Tensor, "B N D"]:
        """uint8 images of side `image_size` to image tokens: camera by camera, row by row."""
        num_cameras = images_BVHWC.shape[1]
        pixels = rearrange(images_BVHWC, "b v h w c -> (b v) c h w").float() / 127.5 - 1
        features = self.vision(pixels.contiguous(memory_format=torch.channels_last)).last_hidden_state
        tokens_BVND = self.project(rearrange(features, "(b v) c h w -> b v (h w) c", v=num_cameras))
        return rearrange(tokens_BVND + self.position_VND, "b v n d -> b (v n) d")


def _vision_tower(config: TinyConfig) -> ResNetModel:
    tower = ResNetModel(
        ResNetConfig(
            embedding_size=config.vision_widths[0],
            hidden_sizes=list(config.vision_widths),
            depths=[config.vision_depth] * len(config.vision_widths),
            layer_type="basic",
        )
    )
    _replace_batch_norm(tower)
    return tower.to(memory_format=torch.channels_last)  # type: ignore[call-arg]


def _replace_batch_norm(module: nn.Module) -> None:
    """GroupNorm in BatchNorm's place.

    BatchNorm ties a sample to its batch and training to running averages; with GroupNorm a batch gives what its
    samples give one by one, frozen means frozen, and the weights are the whole state of the model.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(_num_groups(child.num_features), child.num_features))
        else:
            _replace_batch_norm(child)


def _num_groups(channels: int) -> int:
    """Groups of sixteen channels where they divide evenly, else one group."""
    return channels // 16 if channels % 16 == 0 else 1


def _llama_config(config: TinyConfig, vocabulary_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=config.width,
        # Llama's proportion: 8/3 of the width, rounded up to a multiple of 32.
        intermediate_size=-(-config.width * 8 // (3 * 32)) * 32,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        # No code ends a sequence: decoding runs for the length of the field.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
