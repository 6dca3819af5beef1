"""Policies with untrained weights that act: of each backbone and head, with two cameras and a state.

policy = acting_policy("tiny", "chunk", tmp_path)
policy.infer(observation())
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapa.data.dataset import ActionSpace
from lapa.policy.actions import ActionBins, KeyedSpace, Statistics, fit_codec, most_bins
from lapa.policy.backbones import create_backbone
from lapa.policy.config import BackboneConfig, FlowConfig, HeadKind, HfConfig, LwmConfig, TinyConfig, VQGANConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import Policy
from vlms import IMAGE_SIZE, make_vlm

CAMERAS = ("front", "wrist")
SPACE = ActionSpace(("x", "y", "grip"), (False, False, True))
STATE_DIM, CHUNK, NUM_BINS = 2, 3, 16
INSTRUCTION = "open the drawer"
TINY = TinyConfig(image_size=32, vision_widths=(16, 32), width=32, layers=1, heads=2)
LWM = LwmConfig(
    width=32,
    inner_width=48,
    layers=1,
    heads=2,
    max_length=512,
    vqgan=VQGANConfig(
        resolution=32,
        hidden_channels=32,
        channel_mult=(1, 1, 1),
        num_res_blocks=1,
        z_channels=8,
        quantized_embed_dim=8,
        num_embeddings=256,
    ),
    vision_rows=264,
    end_of_frame=256,
    end_of_vision=257,
)


def acting_policy(backbone: str, head: HeadKind, folder: Path, keys: tuple[str, ...] = ("robot",)) -> Policy:
    """backbone: tiny, lwm, or a family of `vlms.FAMILIES`, whose model goes into `folder`; keys: its datasets."""
    torch.manual_seed(0)
    config: BackboneConfig = {"tiny": TINY, "lwm": LWM}.get(backbone) or HfConfig(
        source=str(make_vlm(backbone, folder / backbone)), image_size=IMAGE_SIZE
    )
    built, processor, vocabulary = create_backbone(
        config, texts=[INSTRUCTION], num_cameras=len(CAMERAS), segments={"latent": 8}
    )
    pretrained = LatentPolicy(PolicyConfig(vocabulary, CAMERAS, config, latent_length=4), built)
    statistics = {key: _statistics(head, seed) for seed, key in enumerate(keys)}
    vocabulary = replace(vocabulary, bins=NUM_BINS if head == "bins" else 0, state=NUM_BINS, query=CHUNK)
    processor.grow(vocabulary)
    acting = replace(
        pretrained.config,
        vocabulary=vocabulary,
        state_bins=most_bins(each.states for each in statistics.values()),
        spaces=tuple(KeyedSpace(key, SPACE, 10.0) for key in keys),
        head=head,
        action_bins=most_bins(each.codec for each in statistics.values()),
        flow=FlowConfig(width=32, layers=1, heads=2, steps=2),
        chunk=CHUNK,
    )
    return Policy(pretrained.grown(acting).eval(), processor, statistics)


def observation(seed: int = 0) -> dict[str, Any]:
    """Images of two sizes, none of them the policy's, an instruction and a state."""
    rng = np.random.default_rng(seed)
    return {
        "front": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
        "wrist": rng.integers(0, 256, (40, 40, 3), dtype=np.uint8),
        "instruction": INSTRUCTION,
        "state": rng.normal(size=STATE_DIM).astype(np.float32),
    }


def _statistics(head: HeadKind, seed: int) -> Statistics:
    rng = np.random.default_rng(seed)
    actions_NA = np.concatenate([rng.normal(size=(200, 2)), rng.choice([-1.0, 1.0], (200, 1))], axis=1)
    states = ActionBins.fit(rng.normal(size=(200, STATE_DIM)), NUM_BINS)
    return Statistics(fit_codec(head, actions_NA, SPACE.binary, NUM_BINS), states)
