"""Named configs of every stage: `--preset NAME` starts from one, and any option overrides it.

debug: made-up data, a CPU, seconds. tiny: a CPU, minutes. base: one GPU, hours. paper: the published sizes and recipe.
dino: a latent action model of DINOv2's features, one GPU or several.
smolvlm2-500m, qwen3-vl-2b, paligemma-3b: a policy on that vision-language model, one GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tyro

from lapa.baselines.config import InverseConfig, InverseTrainConfig, VideoConfig, VideoTrainConfig
from lapa.engine.config import LoopConfig, OptimConfig
from lapa.errors import unknown
from lapa.latent.config import LatentModelConfig, LatentTrainConfig
from lapa.policy.config import FinetuneConfig, FlowConfig, PretrainConfig, TinyConfig

# An option without a sensible default, which the user must give.
REQUIRED: Any = tyro.MISSING

# Options that keep the codebook in use and make the decoder use the codes (docs/log.md): the brightness of patches is
# not normalised away, no code of FSQ can die, latents have the scale of the codebook, and the decoder predicts the
# change, for which it needs the codes.
STEADY: dict[str, Any] = {
    "patch_norm": False,
    "quantizer": "fsq",
    "standardize_z": True,
    "predict": "change",
    "action_input": "attend_and_add",
}

QUICK = LoopConfig(
    steps=40, batch_size=16, optim=OptimConfig(lr=2e-3, betas=(0.9, 0.95), warmup_steps=5), device="cpu", log_every=5,
    eval_every=20,
)  # fmt: skip
LARGE_POLICY_OPTIM = OptimConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=500)
# LAPA's recipe for a pretrained 7B model.
PAPER_OPTIM = OptimConfig(lr=2e-5, betas=(0.9, 0.95), warmup_steps=0, schedule="constant")
VLM_OPTIM = OptimConfig(lr=2e-5, betas=(0.9, 0.95), warmup_steps=500)
BACKBONES = {
    "debug": TinyConfig(image_size=32, vision_widths=(16, 32), width=64, layers=2, heads=2),
    "tiny": TinyConfig(),
    "base": TinyConfig(
        image_size=128, vision_widths=(64, 128, 256, 512), vision_depth=2, width=512, layers=12, heads=8
    ),
}


@dataclass(frozen=True)
class Vlm:
    """A vision-language model of the hub.

    image_size: the size its vision tower was trained on or, where it takes any, one that gives few image tokens.
    checkpointing: whether training a batch of 64 on a GPU of 80 GiB needs gradient checkpointing.
    """

    source: str
    image_size: int
    checkpointing: bool


VLMS = {
    "smolvlm2-500m": Vlm("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 512, False),
    "qwen3-vl-2b": Vlm("Qwen/Qwen3-VL-2B-Instruct", 256, True),
    "paligemma-3b": Vlm("google/paligemma-3b-pt-224", 224, True),
}


def _presets(config: Any, presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The configs of a stage by the names of its presets, from the options in which they differ from its defaults."""
    missing = dataclasses.MISSING
    required = [f.name for f in dataclasses.fields(config) if f.default is missing and f.default_factory is missing]
    return {
        name: config(**dict.fromkeys(required, REQUIRED), preset=name, **options) for name, options in presets.items()
    }


def _on_vlms(steps: int, eval_every: int, **options: Any) -> dict[str, dict[str, Any]]:
    """Presets of a policy on each vision-language model, its vision tower frozen."""
    loop = LoopConfig(steps=steps, batch_size=64, optim=VLM_OPTIM, log_every=50, eval_every=eval_every)
    return {
        name: {
            "backbone": f"hf:{vlm.source}",
            "hf_image_size": vlm.image_size,
            "freeze_vision": True,
            "loop": replace(loop, gradient_checkpointing=vlm.checkpointing),
            **options,
        }
        for name, vlm in VLMS.items()
    }


LATENT = _presets(
    LatentTrainConfig,
    {
        "debug": {
            "model": LatentModelConfig(
                image_size=32, patch_size=4, dim=32, spatial_depth=1, temporal_depth=1, heads=2, dim_head=16,
                quant_dim=8, horizon_seconds=0.3, **STEADY,
            ),
            "loop": QUICK,
        },
        "tiny": {
            "model": LatentModelConfig(
                image_size=64, patch_size=8, dim=64, spatial_depth=2, temporal_depth=2, heads=4, dim_head=16,
                latent_length=16, quant_dim=16, error="relative", **STEADY,
            ),
            "loop": LoopConfig(
                steps=1600, batch_size=32, optim=OptimConfig(lr=1e-3, warmup_steps=100, optimizer="muon"), log_every=20,
                eval_every=200,
            ),
        },
        "base": {
            "model": LatentModelConfig(
                image_size=128, patch_size=16, dim=384, spatial_depth=4, temporal_depth=4, heads=6,
                latent_length=16, error="relative", **STEADY,
            ),
            "loop": LoopConfig(
                steps=50_000, batch_size=256, optim=OptimConfig(lr=3e-4, warmup_steps=1000, optimizer="muon"),
                log_every=50, eval_every=2000,
            ),
        },
        # LARYBench's best geometry (https://arxiv.org/abs/2604.11689): frozen features in and out, 49 codes of 64.
        "dino": {
            "model": LatentModelConfig(
                image_size=224, patch_size=16, dim=1024, spatial_depth=4, temporal_depth=4, latent_length=49,
                codebook_size=64, inputs="features", targets="features",
                vision_tower="facebook/dinov2-large", error="relative", **STEADY,
            ),
            "loop": LoopConfig(
                steps=100_000, batch_size=256, optim=OptimConfig(lr=3e-4, warmup_steps=1000, optimizer="muon"),
                log_every=50, eval_every=2000,
            ),
        },
        # The published model and recipe, with the fixes of docs/log.md that do not change its mathematics.
        "paper": {
            "model": LatentModelConfig(),
            "loop": LoopConfig(
                steps=100_000, batch_size=64, precision="fp32", log_every=50, eval_every=2000,
                optim=OptimConfig(lr=1e-4, betas=(0.9, 0.99), clip=0.5, warmup_steps=0, schedule="constant"),
            ),
        },
    },
)  # fmt: skip
PRETRAIN = _presets(
    PretrainConfig,
    {
        "debug": {"tiny": BACKBONES["debug"], "loop": QUICK},
        "tiny": {},
        "base": {
            "tiny": BACKBONES["base"],
            "loop": LoopConfig(
                steps=50_000, batch_size=256, optim=LARGE_POLICY_OPTIM, log_every=50, eval_every=2000
            ),
        },
        "paper": {
            "backbone": "lwm",
            "prompt": "paper",
            "text_weight": 0.01,
            "loop": LoopConfig(
                steps=70_000, batch_size=256, optim=PAPER_OPTIM, gradient_checkpointing=True, log_every=50,
                eval_every=2000,
            ),
        },
        **_on_vlms(20_000, 1000),
    },
)  # fmt: skip
FINETUNE = _presets(
    FinetuneConfig,
    {
        "debug": {
            "chunk": 2,
            "tiny": BACKBONES["debug"],
            "flow": FlowConfig(width=32, layers=1, heads=2),
            "loop": QUICK,
        },
        "tiny": {"flow": FlowConfig(width=128, layers=2)},
        "base": {
            "tiny": BACKBONES["base"],
            "augment": True,
            "loop": LoopConfig(steps=5_000, batch_size=128, optim=LARGE_POLICY_OPTIM, log_every=50, eval_every=500),
        },
        "paper": {
            "backbone": "lwm",
            "chunk": 1,
            "augment": True,
            "loop": LoopConfig(
                steps=2_000, batch_size=128, optim=PAPER_OPTIM, gradient_checkpointing=True, log_every=50,
                eval_every=500,
            ),
        },
        **_on_vlms(5_000, 500, augment=True),
    },
)  # fmt: skip
# UniPi needs an inverse dynamics model and a video model of the same image size.
INVERSE = _presets(
    InverseTrainConfig,
    {
        "debug": {
            "model": InverseConfig(
                image_size=32, vision_widths=(16, 32), vision_depth=1, width=64, horizon_seconds=0.3
            ),
            "loop": QUICK,
        },
        "tiny": {},
        # The widths of ResNet-18.
        "base": {
            "model": InverseConfig(image_size=128, vision_widths=(64, 128, 256, 512), width=512),
            "loop": LoopConfig(steps=5_000, batch_size=128, optim=LARGE_POLICY_OPTIM, log_every=50, eval_every=500),
        },
    },
)
VIDEO = _presets(
    VideoTrainConfig,
    {
        "debug": {
            "model": VideoConfig(image_size=32, widths=(32, 64), text_width=32, horizon_seconds=0.3),
            "loop": QUICK,
        },
        "tiny": {},
        "base": {
            "model": VideoConfig(
                image_size=128, widths=(128, 256, 384), depth=2, heads=8, text_width=256, text_layers=2
            ),
            "loop": LoopConfig(
                steps=20_000, batch_size=128, optim=LARGE_POLICY_OPTIM, ema_decay=0.999, log_every=50, eval_every=2000
            ),
        },
    },
)
STAGES: dict[str, dict[str, Any]] = {
    "latent": LATENT, "pretrain": PRETRAIN, "finetune": FINETUNE, "inverse": INVERSE, "video": VIDEO
}  # fmt: skip


def named(stage: str, name: str) -> Any:
    """The config of a stage by its preset's name. Raises UserError with the nearest known name."""
    presets = STAGES[stage]
    if name not in presets:
        raise unknown("preset", name, presets)
    return presets[name]
