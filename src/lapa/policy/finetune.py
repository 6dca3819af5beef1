"""Finetuning: a pretrained policy learns the robot's own actions from a few labelled episodes.

LAPA (https://arxiv.org/abs/2410.11758), stage 3: the bin segment is new, everything else starts from the pretrained
policy; the loss moves to the bin segment. `--from-scratch` is the paper's baseline: the same policy, untrained.

    lapa policy finetune --policy POLICY --data ROBOT_DATASET --out FINETUNED
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from lapa import config as configs
from lapa.console import finish, is_main_process, say
from lapa.data.dataset import Dataset
from lapa.data.steps import PolicySteps
from lapa.engine.checkpoint import seed_everything
from lapa.engine.loop import LoopConfig
from lapa.engine.optim import OptimConfig
from lapa.files import claim_output
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import BackboneConfig, TinyConfig
from lapa.policy.checkpoint import PolicyParts, is_policy, load_policy
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.pretrain import instructions
from lapa.policy.tokenizer import train_tokenizer
from lapa.policy.training import open_steps, train_policy
from lapa.policy.vocabulary import Vocabulary


def _tiny_loop() -> LoopConfig:
    return LoopConfig(steps=500, batch_size=32, optim=OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01))


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetune a policy on robot episodes with actions, or train the same policy from scratch."""

    data: tuple[Path, ...]
    """Datasets of robot episodes, with actions."""
    out: Path
    """Folder of the policy to write."""
    policy: Path | None = None
    """The pretrained policy to start from; with --from-scratch, the one whose architecture and tokenizer to use."""
    from_scratch: bool = False
    """Start from new weights."""
    preset: str = "tiny"
    """debug, tiny or base: the values that the other options start from."""
    chunk: int = 5
    """Time steps of actions that the policy says at once."""
    num_bins: int = 256
    """Bins of an action dimension, at most."""
    cameras: tuple[str, ...] = ()
    """Cameras for the policy's image slots; by default those it was trained with, or the dataset's first."""
    backbone: Annotated[BackboneConfig, tyro.conf.arg(name="")] = field(default_factory=TinyConfig)
    prompt: str = "{instruction}"
    """Like the backbone's sizes, for a policy from scratch without --policy."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=_tiny_loop)
    augment: bool = False
    """Random crops, brightness and contrast."""
    freeze_vision: bool = False
    """Keep the vision tower as it is."""
    held_out: float = 0.1
    """Share of the episodes kept for evaluation; at least one of each dataset, none where this is 0."""
    cache_gib: float = 4.0
    """Decoded frames are kept in memory where they fit into this much; training and held-out episodes each."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


def run(config: FinetuneConfig) -> None:
    """`lapa policy finetune`. Raises ValueError on bad input, FloatingPointError on a loss that is not finite."""
    next_commands = [f"lapa evaluate {config.out} --env metaworld --out RESULTS"]
    if config.resume and is_policy(config.out):
        finish("policy, already finetuned", config.out, next_commands)
        return
    datasets = [Dataset.open(path) for path in config.data]
    start = _starting_policy(config, datasets)
    cameras = _cameras(config, start.model.config, datasets)

    def steps(split: str) -> PolicySteps:
        return PolicySteps(
            datasets,
            start.model.config.backbone.image_size,
            cameras,
            chunk=config.chunk,
            augment=config.augment and split == "train",
            seed=config.loop.seed,
            split=split,
            held_out=config.held_out,
            cache_gib=config.cache_gib,
        )

    training, held_out = open_steps(datasets, config.held_out, steps)
    parts = _with_actions(config, start, training, cameras)
    if is_main_process():
        claim_output(
            config.out,
            complete=is_policy(config.out),
            overwrite=config.overwrite,
            resume=config.resume,
            inputs=[*config.data, *([config.policy] if config.policy else [])],
        )
    finished = train_policy(
        parts,
        training,
        held_out,
        config.loop,
        config.out,
        run_config={
            **configs.to_dict(config),
            "dataset_fingerprints": [dataset.fingerprint for dataset in datasets],
        },
        description="policy from scratch" if config.from_scratch else "policy",
        resume=config.resume,
    )
    if finished:
        finish("policy", config.out, next_commands)


def _starting_policy(config: FinetuneConfig, datasets: Sequence[Dataset]) -> PolicyParts:
    """What training starts from: a pretrained policy, one of its architecture with new weights, or a new one."""
    seed_everything(config.loop.seed)
    if config.policy is not None:
        if config.policy.resolve() == config.out.resolve():
            raise ValueError(f"{config.out}: is the policy to start from; give another --out")
        pretrained = load_policy(config.policy)
        if not config.from_scratch:
            return pretrained
        fresh = replace(
            pretrained.model.config,
            vocabulary=replace(pretrained.model.config.vocabulary, bins=0),
            action_bins=(),
            chunk=0,
        )
        return PolicyParts(LatentPolicy(fresh), pretrained.tokenizer)
    if not config.from_scratch:
        raise ValueError("give the pretrained policy to start from with --policy, or ask for --from-scratch")
    tokenizer = train_tokenizer(instructions(datasets, config.prompt))
    model = LatentPolicy(
        PolicyConfig(
            vocabulary=Vocabulary(text=len(tokenizer)),
            cameras=config.cameras or datasets[0].cameras[:1],
            backbone=config.backbone,
            prompt=config.prompt,
        )
    )
    return PolicyParts(model, tokenizer)


def _cameras(config: FinetuneConfig, policy: PolicyConfig, datasets: Sequence[Dataset]) -> tuple[str, ...]:
    """Which of the robot's cameras fills each image slot: as told, or by name, or the only one for the only slot."""
    common = [name for name in datasets[0].cameras if all(name in dataset.cameras for dataset in datasets)]
    chosen = config.cameras
    if not chosen and all(name in common for name in policy.cameras):
        chosen = policy.cameras
    if not chosen and len(common) == len(policy.cameras) == 1:
        chosen = tuple(common)
    if not chosen:
        raise ValueError(
            f"{datasets[0].root}: has the cameras {', '.join(common)}, the policy was trained with "
            f"{', '.join(policy.cameras)}; say with --cameras which take their place"
        )
    if len(chosen) != len(policy.cameras):
        raise ValueError(
            f"the policy has {len(policy.cameras)} image slots ({', '.join(policy.cameras)}), got the cameras "
            f"{', '.join(chosen)}; give as many --cameras"
        )
    return chosen


def _with_actions(
    config: FinetuneConfig, start: PolicyParts, training: PolicySteps, cameras: Sequence[str]
) -> PolicyParts:
    """The starting policy with a bin segment: fitted to the training actions, or kept where it already acts."""
    actions_NA = training.actions()
    bins = start.bins or ActionBins.fit(actions_NA, config.num_bins)
    if bins.action_dim != actions_NA.shape[-1]:
        raise ValueError(
            f"{config.data[0]}: has actions of {actions_NA.shape[-1]} dimensions, the policy {config.policy} of "
            f"{bins.action_dim}; finetune a policy that was only pretrained"
        )
    outside_A = bins.count_outside(actions_NA)
    say(
        f"actions: {bins.action_dim} dimensions of {', '.join(map(str, bins.counts_A))} bins"
        + (f"; {outside_A.sum()} of {actions_NA.size} values lie outside and are clamped" if outside_A.any() else "")
    )
    model = start.model.with_actions(bins.counts_A.tolist(), config.chunk, cameras, num_bins=config.num_bins)
    if config.freeze_vision:
        model.freeze_vision()
    return PolicyParts(model, start.tokenizer, bins)
