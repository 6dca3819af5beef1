"""Latent pretraining: the policy learns to predict latent actions from videos and instructions.

LAPA (https://arxiv.org/abs/2410.11758), stage 2: next-token prediction in the latent segment, given image and
instruction. The labels come from `lapa label`.

    lapa policy pretrain --data DATASET --labels LABELS --out POLICY
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lapa import config as configs
from lapa.console import finish
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels, Manifest
from lapa.data.spec import open_dataset
from lapa.engine.checkpoint import seed_everything
from lapa.errors import UserError
from lapa.policy.config import PretrainConfig
from lapa.policy.runtime import Policy, is_policy
from lapa.policy.training import (
    choose_prompts,
    load_start,
    new_policy,
    open_steps,
    require_same_codes,
    slot_cameras,
    train_policy,
)


def run(config: PretrainConfig) -> None:
    """`lapa policy pretrain`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    start = ["lapa", "policy", "finetune", "--preset", config.preset, "--policy", str(config.out)]
    next_commands = [shlex.join([*start, "--data", "ROBOT_DATASET", "--out", "POLICY"])]
    if config.resume and is_policy(config.out):
        finish("policy, already pretrained", config.out, next_commands)
        return
    datasets = [open_dataset(path) for path in config.data]
    labels = open_labels(config.labels, datasets)
    seed_everything(config.loop.seed)
    policy = _starting_policy(config, datasets, labels[0].manifest)

    cameras = policy.cameras if config.policy else config.cameras or None
    training, held_out = open_steps(config, datasets, policy.config.backbone.image_size, cameras, labels=labels)
    run_config = {
        **configs.to_dict(config),
        "dataset_fingerprints": [dataset.fingerprint for dataset in datasets],
        "lam_fingerprint": labels[0].manifest.lam_fingerprint,
    }
    finished = train_policy(
        policy,
        training,
        held_out,
        config,
        labels=config.labels,
        run_config=run_config,
        description="latent policy",
    )
    if finished:
        finish("pretrained policy", config.out, next_commands)


def open_labels(folders: Sequence[str | Path], datasets: Sequence[Dataset]) -> list[Labels]:
    """The labels of each dataset. Raises UserError where they belong to other datasets or to several models."""
    if len(folders) != len(datasets):
        raise UserError(
            f"{len(datasets)} datasets need as many --labels folders, in the same order; got {len(folders)}"
        )
    labels = [
        Labels.open(folder, dataset_fingerprint=dataset.fingerprint)
        for folder, dataset in zip(folders, datasets, strict=True)
    ]
    for folder, other in zip(folders, labels, strict=True):
        if other.manifest.lam_fingerprint != labels[0].manifest.lam_fingerprint:
            raise UserError(
                f"{folder}: made by the latent action model {other.manifest.lam_fingerprint}, but {folders[0]} by "
                f"{labels[0].manifest.lam_fingerprint}; label all datasets with one model"
            )
    return labels


def _starting_policy(config: PretrainConfig, datasets: Sequence[Dataset], manifest: Manifest) -> Policy:
    """A new policy, or the one to continue, with the segment of the labels' latent actions."""
    if config.policy is None:
        segments = {"latent": manifest.codebook_size}
        start = new_policy(config, datasets, segments, latent_length=manifest.latent_length)
        grown = start.config
    else:
        start = load_start(config, config.policy)
        if start.acts:
            raise UserError(f"{config.policy}: has robot actions already; pretrain a policy that does not act yet")
        require_same_codes(start.config, manifest, config.policy)
        grown = replace(
            start.config,
            vocabulary=replace(start.config.vocabulary, latent=manifest.codebook_size),
            latent_length=manifest.latent_length,
            cameras=slot_cameras(start.cameras, datasets, config.cameras),
            prompts=choose_prompts(config, datasets, start.config.prompts),
        )
        start.processor.grow(grown.vocabulary)
    opening, closing = start.processor.tags("latent")
    grown = replace(
        grown,
        latent_opening=opening,
        latent_closing=closing,
        text_weight=grown.text_weight if config.text_weight is None else config.text_weight,
        lam_fingerprint=manifest.lam_fingerprint,
    )
    return Policy(start.model.grown(grown), start.processor)
