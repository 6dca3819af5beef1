"""Named configs of every stage: `--preset NAME` starts from one, and any option overrides it.

debug: made-up data, a CPU, seconds. tiny: a CPU, minutes. base: one GPU, hours. paper: the published sizes and recipe.
smolvlm2-500m, qwen3-vl-2b, paligemma-3b: a policy on that vision-language model, one GPU.
"""

from __future__ import annotations

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
    steps=40,
    batch_size=16,
    optim=OptimConfig(lr=2e-3, betas=(0.9, 0.95), warmup_steps=5),
    device="cpu",
    log_every=5,
    eval_every=20,
)


def _latent(name: str, model: LatentModelConfig, loop: LoopConfig) -> LatentTrainConfig:
    return LatentTrainConfig(data=REQUIRED, out=REQUIRED, preset=name, model=model, loop=loop)


LATENT = {
    "debug": _latent(
        "debug",
        LatentModelConfig(
            image_size=32,
            patch_size=4,
            dim=32,
            spatial_depth=1,
            temporal_depth=1,
            heads=2,
            dim_head=16,
            quant_dim=8,
            horizon_seconds=0.3,
            **STEADY,
        ),
        QUICK,
    ),
    "tiny": _latent(
        "tiny",
        LatentModelConfig(
            image_size=64,
            patch_size=8,
            dim=64,
            spatial_depth=2,
            temporal_depth=2,
            heads=4,
            dim_head=16,
            quant_dim=16,
            **STEADY,
        ),
        LoopConfig(
            steps=1600, batch_size=32, optim=OptimConfig(lr=1e-3, warmup_steps=100), log_every=20, eval_every=200
        ),
    ),
    "base": _latent(
        "base",
        LatentModelConfig(image_size=128, patch_size=16, dim=384, spatial_depth=4, temporal_depth=4, heads=6, **STEADY),
        LoopConfig(
            steps=50_000, batch_size=256, optim=OptimConfig(lr=3e-4, warmup_steps=1000), log_every=50, eval_every=2000
        ),
    ),
    # The published model and recipe, with the fixes of docs/log.md that do not change its mathematics.
    "paper": _latent(
        "paper",
        LatentModelConfig(),
        LoopConfig(
            steps=100_000,
            batch_size=64,
            optim=OptimConfig(lr=1e-4, betas=(0.9, 0.99), clip=0.5, warmup_steps=0, schedule="constant"),
            precision="fp32",
            log_every=50,
            eval_every=2000,
        ),
    ),
}

BACKBONES = {
    "debug": TinyConfig(image_size=32, vision_widths=(16, 32), width=64, layers=2, heads=2),
    "tiny": TinyConfig(),
    "base": TinyConfig(
        image_size=128, vision_widths=(64, 128, 256, 512), vision_depth=2, width=512, layers=12, heads=8
    ),
}
LARGE_POLICY_OPTIM = OptimConfig(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=500)
# LAPA's recipe for a pretrained 7B model.
PAPER_OPTIM = OptimConfig(lr=2e-5, betas=(0.9, 0.95), warmup_steps=0, schedule="constant")
VLM_OPTIM = OptimConfig(lr=2e-5, betas=(0.9, 0.95), warmup_steps=500)


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


def _on_vlm(config: Any, name: str, loop: LoopConfig, **changes: Any) -> Any:
    """A stage's config on a vision-language model, with its vision tower frozen."""
    vlm = VLMS[name]
    return config(
        out=REQUIRED,
        data=REQUIRED,
        preset=name,
        backbone=f"hf:{vlm.source}",
        hf_image_size=vlm.image_size,
        freeze_vision=True,
        loop=replace(loop, optim=VLM_OPTIM, gradient_checkpointing=vlm.checkpointing, log_every=50),
        **changes,
    )


PRETRAIN = {
    "debug": PretrainConfig(
        data=REQUIRED, labels=REQUIRED, out=REQUIRED, preset="debug", tiny=BACKBONES["debug"], loop=QUICK
    ),
    "tiny": PretrainConfig(data=REQUIRED, labels=REQUIRED, out=REQUIRED),
    "base": PretrainConfig(
        data=REQUIRED,
        labels=REQUIRED,
        out=REQUIRED,
        preset="base",
        tiny=BACKBONES["base"],
        loop=LoopConfig(steps=50_000, batch_size=256, optim=LARGE_POLICY_OPTIM, log_every=50, eval_every=2000),
    ),
    "paper": PretrainConfig(
        data=REQUIRED,
        labels=REQUIRED,
        out=REQUIRED,
        preset="paper",
        backbone="lwm",
        prompt="paper",
        text_weight=0.01,
        loop=LoopConfig(
            steps=70_000,
            batch_size=256,
            optim=PAPER_OPTIM,
            gradient_checkpointing=True,
            log_every=50,
            eval_every=2000,
        ),
    ),
    **{
        name: _on_vlm(PretrainConfig, name, LoopConfig(steps=20_000, batch_size=64, eval_every=1000), labels=REQUIRED)
        for name in VLMS
    },
}
FINETUNE = {
    "debug": FinetuneConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="debug",
        chunk=2,
        tiny=BACKBONES["debug"],
        flow=FlowConfig(width=32, layers=1, heads=2),
        loop=QUICK,
    ),
    "tiny": FinetuneConfig(data=REQUIRED, out=REQUIRED, flow=FlowConfig(width=128, layers=2)),
    "base": FinetuneConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="base",
        tiny=BACKBONES["base"],
        augment=True,
        loop=LoopConfig(steps=5_000, batch_size=128, optim=LARGE_POLICY_OPTIM, log_every=50, eval_every=500),
    ),
    "paper": FinetuneConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="paper",
        backbone="lwm",
        chunk=1,
        augment=True,
        loop=LoopConfig(
            steps=2_000, batch_size=128, optim=PAPER_OPTIM, gradient_checkpointing=True, log_every=50, eval_every=500
        ),
    ),
    **{
        name: _on_vlm(FinetuneConfig, name, LoopConfig(steps=5_000, batch_size=64, eval_every=500), augment=True)
        for name in VLMS
    },
}
# UniPi needs an inverse dynamics model and a video model of the same image size.
INVERSE = {
    "debug": InverseTrainConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="debug",
        model=InverseConfig(image_size=32, vision_widths=(16, 32), vision_depth=1, width=64, horizon_seconds=0.3),
        loop=QUICK,
    ),
    "tiny": InverseTrainConfig(data=REQUIRED, out=REQUIRED),
    # The widths of ResNet-18.
    "base": InverseTrainConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="base",
        model=InverseConfig(image_size=128, vision_widths=(64, 128, 256, 512), width=512),
        loop=LoopConfig(steps=5_000, batch_size=128, optim=LARGE_POLICY_OPTIM, log_every=50, eval_every=500),
    ),
}
VIDEO = {
    "debug": VideoTrainConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="debug",
        model=VideoConfig(image_size=32, widths=(32, 64), text_width=32, horizon_seconds=0.3),
        loop=QUICK,
    ),
    "tiny": VideoTrainConfig(data=REQUIRED, out=REQUIRED),
    "base": VideoTrainConfig(
        data=REQUIRED,
        out=REQUIRED,
        preset="base",
        model=VideoConfig(image_size=128, widths=(128, 256, 384), depth=2, heads=8, text_width=256, text_layers=2),
        loop=LoopConfig(
            steps=20_000,
            batch_size=128,
            optim=LARGE_POLICY_OPTIM,
            ema_decay=0.999,
            log_every=50,
            eval_every=2000,
        ),
    ),
}
STAGES: dict[str, dict[str, Any]] = {
    "latent": LATENT,
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "inverse": INVERSE,
    "video": VIDEO,
}


def named(stage: str, name: str) -> Any:
    """The config of a stage by its preset's name. Raises UserError with the nearest known name."""
    presets = STAGES[stage]
    if name not in presets:
        raise unknown("preset", name, presets)
    return presets[name]
