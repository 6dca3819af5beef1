"""Latent pretraining: the policy learns to say the latent action of what it sees, from video alone.

LAPA (https://arxiv.org/abs/2410.11758), stage 2: next-token prediction in the latent segment, given image and
instruction. The labels come from `lapa label`.

    lapa policy pretrain --data DATASET --labels LABELS --out POLICY
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from lapa import config as configs
from lapa.console import finish, is_main_process
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels
from lapa.data.steps import PolicySteps
from lapa.engine.checkpoint import seed_everything
from lapa.engine.loop import LoopConfig
from lapa.engine.optim import OptimConfig
from lapa.files import claim_output
from lapa.policy.backbones import BackboneConfig, TinyConfig
from lapa.policy.checkpoint import PolicyParts, is_policy
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.tokenizer import train_tokenizer
from lapa.policy.training import open_steps, train_policy
from lapa.policy.vocabulary import Vocabulary


def _tiny_loop() -> LoopConfig:
    return LoopConfig(steps=700, batch_size=32, optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01))


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a policy on the latent actions of videos. No robot actions are needed."""

    data: tuple[Path, ...]
    """Datasets to learn from."""
    labels: tuple[Path, ...]
    """Their labels, one folder for each dataset, in the same order."""
    out: Path
    """Folder of the policy to write."""
    preset: str = "tiny"
    """debug, tiny or base: the values that the other options start from."""
    lam_fingerprint: str | None = None
    """Refuse labels that another latent action model made."""
    cameras: tuple[str, ...] = ()
    """Cameras to see, one image slot each; by default each dataset's first."""
    backbone: Annotated[BackboneConfig, tyro.conf.arg(name="")] = field(default_factory=TinyConfig)
    prompt: str = "{instruction}"
    """What the policy reads; {instruction} stands for the task in words."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=_tiny_loop)
    augment: bool = False
    """Random crops, brightness and contrast."""
    freeze_vision: bool = False
    """Keep the vision tower as it is (the paper's recipe, for towers that were trained before)."""
    held_out: float = 0.1
    """Share of the episodes kept for evaluation."""
    cache_gib: float = 4.0
    """Decoded frames are kept in memory where they fit into this much; training and held-out episodes each."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


def run(config: PretrainConfig) -> None:
    """`lapa policy pretrain`. Raises ValueError on bad input, FloatingPointError on a loss that is not finite."""
    next_commands = [f"lapa policy finetune --policy {config.out} --data ROBOT_DATASET --out POLICY"]
    if config.resume and is_policy(config.out):
        finish("policy, already pretrained", config.out, next_commands)
        return
    datasets = [Dataset.open(path) for path in config.data]
    labels = open_labels(config.labels, datasets, config.lam_fingerprint)

    def steps(split: str) -> PolicySteps:
        return PolicySteps(
            datasets,
            config.backbone.image_size,
            config.cameras or None,
            labels=labels,
            augment=config.augment and split == "train",
            seed=config.loop.seed,
            split=split,
            held_out=config.held_out,
            cache_gib=config.cache_gib,
        )

    training, held_out = open_steps(datasets, config.held_out, steps)
    parts = _fresh_policy(config, datasets, labels)
    if is_main_process():
        claim_output(
            config.out,
            complete=is_policy(config.out),
            overwrite=config.overwrite,
            resume=config.resume,
            inputs=[*config.data, *config.labels],
        )
    run_config = {
        **configs.to_dict(config),
        "dataset_fingerprints": [dataset.fingerprint for dataset in datasets],
        "lam_fingerprint": labels[0].manifest.lam_fingerprint,
    }
    finished = train_policy(
        parts,
        training,
        held_out,
        config.loop,
        config.out,
        run_config=run_config,
        description="latent policy",
        resume=config.resume,
    )
    if finished:
        finish("pretrained policy", config.out, next_commands)


def open_labels(
    folders: Sequence[Path], datasets: Sequence[Dataset], lam_fingerprint: str | None = None
) -> list[Labels]:
    """The labels of each dataset. Raises ValueError where they are not of these datasets, or not of one LAM."""
    if len(folders) != len(datasets):
        raise ValueError(
            f"{len(datasets)} datasets need as many --labels folders, in the same order; got {len(folders)}"
        )
    labels = [
        Labels.open(folder, lam_fingerprint=lam_fingerprint, dataset_fingerprint=dataset.fingerprint)
        for folder, dataset in zip(folders, datasets, strict=True)
    ]
    for folder, other in zip(folders, labels, strict=True):
        if other.manifest.lam_fingerprint != labels[0].manifest.lam_fingerprint:
            raise ValueError(
                f"{folder}: made by the latent action model {other.manifest.lam_fingerprint}, but {folders[0]} by "
                f"{labels[0].manifest.lam_fingerprint}; label all datasets with one model"
            )
    return labels


def _fresh_policy(config: PretrainConfig, datasets: Sequence[Dataset], labels: Sequence[Labels]) -> PolicyParts:
    seed_everything(config.loop.seed)
    tokenizer = train_tokenizer(instructions(datasets, config.prompt))
    manifest = labels[0].manifest
    model = LatentPolicy(
        PolicyConfig(
            vocabulary=Vocabulary(text=len(tokenizer), latent=manifest.codebook_size),
            cameras=config.cameras or datasets[0].cameras[:1],
            backbone=config.backbone,
            prompt=config.prompt,
            latent_length=manifest.latent_length,
        )
    )
    if config.freeze_vision:
        model.freeze_vision()
    return PolicyParts(model, tokenizer)


def instructions(datasets: Sequence[Dataset], prompt: str) -> list[str]:
    """What a policy with this prompt reads in the datasets: the text that its tokenizer is trained on."""
    return [prompt.replace("{instruction}", episode.instruction) for d in datasets for episode in d.episodes]
