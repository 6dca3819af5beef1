"""Latent pretraining: the policy learns to predict latent actions from videos and instructions.

LAPA (https://arxiv.org/abs/2410.11758), stage 2: next-token prediction in the latent segment, given image and
instruction. The labels come from `lapa label`.

    lapa policy pretrain --data DATASET --labels LABELS --out POLICY
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from lapa.console import finish, is_main_process, print_results
from lapa.data.dataset import Dataset
from lapa.data.labels import Manifest
from lapa.data.spec import open_dataset
from lapa.engine.checkpoint import seed_everything
from lapa.engine.metrics import read_figures
from lapa.errors import UserError
from lapa.locks import locks_output
from lapa.policy.config import PretrainConfig
from lapa.policy.runtime import METRICS, Policy
from lapa.policy.training import (
    HELD_OUT,
    choose_prompts,
    finished_before,
    load_start,
    new_policy,
    open_labels,
    open_steps,
    require_same_codes,
    run_config_of,
    slot_cameras,
    summary,
    train_policy,
)
from lapa.store_cache import use_store_cache


@locks_output
def run(config: PretrainConfig) -> None:
    """`lapa policy pretrain`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    use_store_cache(config.loop.store_cache, config.loop.store_cache_gib)
    datasets = [open_dataset(path) for path in config.data]
    labels = open_labels(config.labels, datasets)
    lam = labels[0].manifest.lam_fingerprint
    if finished_before(config, run_config_of(config, datasets, lam_fingerprint=lam)):
        _conclude(config, "policy, already pretrained")
        return
    seed_everything(config.loop.seed)
    policy = _starting_policy(config, datasets, labels[0].manifest)

    cameras = policy.cameras if config.policy else config.cameras or None
    training, held_out = open_steps(config, datasets, policy.config, cameras, labels=labels)
    if train_policy(policy, training, held_out, config, description="latent policy", lam_fingerprint=lam):
        _conclude(config, "pretrained policy")


def _conclude(config: PretrainConfig, name: str) -> None:
    """Reports the figures of the validation split."""
    if not is_main_process():
        return
    metrics = read_figures(config.out / METRICS, HELD_OUT)
    print_results(metrics, summary(metrics), as_json=config.json)
    start = ["lapa", "policy", "finetune", "--preset", config.preset, "--policy", str(config.out)]
    finish(name, config.out, [shlex.join([*start, "--data", "ROBOT_DATASET", "--out", "POLICY"])])


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
