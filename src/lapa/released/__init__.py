"""Readers of the files that LAPA's authors released.

from lapa.released import from_released                # LAPA-7B
from_released(params, config).logits(tokens_BT, vision_mask_BT, latent_mask_BT)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lapa.released.lapa7b import from_released

__all__ = ["from_released"]


def __getattr__(name: str) -> Any:
    # Loaded when used, so that `lapa.released.config` imports without torch.
    if name != "from_released":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lapa.released.lapa7b import from_released

    return from_released
