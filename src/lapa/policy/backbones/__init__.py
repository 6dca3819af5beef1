"""The backbones, by the `kind` of their config.

tiny  a small residual network and a small Llama, from scratch, without a download
hf    any image-text model of transformers
lwm   Llama over discrete image codes: the released LAPA-7B and LWM

Each has a module with three functions: `create`, a backbone to start training from; `renew`, the same for an existing
vocabulary; and `load`, a backbone from a policy folder, with its weights or arbitrary ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lapa.policy.backbones.base import Backbone, Processor
from lapa.policy.config import BackboneConfig
from lapa.policy.vocabulary import Vocabulary

# Kind -> the module that holds its `create`, `renew` and `load`.
MODULES = {
    "tiny": "lapa.policy.backbones.tiny",
    "hf": "lapa.policy.backbones.hf",
    "lwm": "lapa.released.lwm",
}


def create_backbone(
    config: BackboneConfig, *, texts: Iterable[str], num_cameras: int, segments: Mapping[str, int]
) -> tuple[Backbone, Processor, Vocabulary]:
    """A backbone to start training from: new (`tiny`) or pretrained on images and text (`hf`).

    texts: the prompts that the policy will read; segments: rows of each segment after the text. Raises UserError where
    the config's source cannot be read.
    """
    created: tuple[Backbone, Processor, Vocabulary] = _module(config).create(
        config, texts=texts, num_cameras=num_cameras, segments=segments
    )
    return created


def renew_backbone(config: BackboneConfig, vocabulary: Vocabulary, *, num_cameras: int) -> Backbone:
    """A backbone that has learned no action, for an existing vocabulary: new (`tiny`), or as published (`hf`).

    Raises UserError for `lwm`, which has no such weights.
    """
    renewed: Backbone = _module(config).renew(config, vocabulary, num_cameras)
    return renewed


def load_backbone(
    config: BackboneConfig,
    model: Path,
    processor: Path,
    *,
    vocabulary: Vocabulary,
    num_cameras: int,
    weights: bool = True,
) -> tuple[Backbone, Processor]:
    """Reads the folders of `Backbone.save` and `Processor.save`. Raises UserError naming what is missing or damaged.

    weights: False: `model` holds what `Backbone.save_config` writes, and the weights are arbitrary.
    """
    loaded: tuple[Backbone, Processor] = _module(config).load(
        config, model, processor, vocabulary=vocabulary, num_cameras=num_cameras, weights=weights
    )
    return loaded


def _module(config: BackboneConfig) -> Any:
    return importlib.import_module(MODULES[config.kind])
