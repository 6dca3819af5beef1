"""Sizes of networks that configs check; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from lapa.errors import UserError

# The stem of the residual tower halves the image twice, each further stage once.
STEM_STRIDE = 4


def tower_grid(image_size: int, widths: Sequence[int]) -> int:
    """Returns the side of the feature grid of `lapa.nn.vision.residual_tower`.

    Raises UserError where the image size is not a positive multiple of the tower's stride.
    """
    stride = STEM_STRIDE * 2 ** (len(widths) - 1)
    if image_size < 1 or image_size % stride:
        raise UserError(f"image size {image_size} is not a multiple of the vision tower's stride {stride}")
    return image_size // stride
