"""Options of `lapa import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class ImportLaqConfig:
    """Import a released latent action model: LAPA's, or LAPA-DINOv2 and LAPA-DINOv3 of LARYBench."""

    weights: tyro.conf.Positional[Path]
    """The released laq_openx.pt, laq_dinov2.pt or laq_dinov3.pt."""
    out: Path
    """Folder of the latent action model to write."""
    vision_tower: str | None = None
    """Hub id or folder of the frozen DINOv2 or DINOv3 that LAPA-DINO was trained on; by default the published one."""
    sizes: Path | None = None
    """JSON with the sizes of a model other than the published one, under the authors' names; those of LAPA-DINO are
    read off the file."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True, kw_only=True)
class ImportLapaConfig:
    """Import the released LAPA-7B, a policy finetuned from it with the authors' code, or LWM-Chat-1M."""

    params: Path
    """The released weights: the authors' streaming checkpoint."""
    vqgan: Path
    """The released image tokenizer."""
    tokenizer: Path
    """The released tokenizer.model of sentencepiece."""
    out: Path
    """Folder of the policy to write."""
    camera: str = "image"
    """Name of the camera whose image the policy sees."""
    latent_length: int = 4
    """Tokens of a latent action, where the checkpoint has latent actions."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision to write the language model in; auto: that of the file."""
    sizes: Path | None = None
    """JSON with the sizes of a model other than the published one: keys of the authors' Llama config, and `vqgan`."""
    overwrite: bool = False
    """Replace what `out` holds."""
