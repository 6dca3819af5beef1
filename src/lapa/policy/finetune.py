"""Finetuning: a pretrained policy learns the robot's own actions from a few labelled episodes.

LAPA (https://arxiv.org/abs/2410.11758), stage 3: the bin segment is new, everything else starts from the pretrained
policy; the loss moves to the bin segment. `--from-scratch` is the paper's baseline: the same policy, untrained.

    lapa policy finetune --policy POLICY --data ROBOT_DATASET --out FINETUNED

Of several datasets each has statistics of its own actions and states (bins or scale), under its name, and each sample
is learned in its dataset's. They may differ in the names of the dimensions, in which are binary and in control, not in
the number of dimensions. `lapa evaluate --statistics-key NAME` then says whose a robot acts by.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated

import numpy as np
import tyro

from lapa import config as configs
from lapa.console import finish, say, warn
from lapa.data.dataset import ActionSpace, Dataset, common_action_space
from lapa.data.sampling import require_names
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.engine.checkpoint import seed_everything
from lapa.engine.config import LoopConfig
from lapa.errors import UserError, unknown
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import HfConfig, LwmConfig, renew_backbone
from lapa.policy.checkpoint import PolicyParts, is_policy, read_config
from lapa.policy.heads import FlowConfig, HeadKind
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.pretrain import open_labels
from lapa.policy.statistics import ALL, ActionCodec, KeyedSpace, Statistics, fit_codec, most_bins
from lapa.policy.training import (
    TrainingOptions,
    choose_cameras,
    choose_prompts,
    load_start,
    new_policy,
    open_steps,
    require_same_codes,
    tiny_loop,
    train_policy,
)

STATE_BINS = 256


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingOptions):
    """Finetune a policy on robot episodes with actions, or train the same policy without pretraining."""

    from_scratch: bool = False
    """Leave the pretraining out: start from new weights (`tiny`), or from the model as it came (`hf`)."""
    head: HeadKind = "bins"
    """bins: actions are said as tokens, one by one (the paper). chunk: all at once. flow: by flow matching."""
    chunk: int = 5
    """Time steps of actions that the policy says at once."""
    num_bins: int = 256
    """Bins of an action dimension, at most."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    statistics: tuple[str, ...] = ()
    """Datasets whose actions, together, set the policy's bins or scale, where it has none yet; by default those of
    --data, each its own. For training on guessed actions, or another robot's, before the robot's own."""
    pool_statistics: bool = False
    """One set of statistics for all datasets together, and so no --statistics-key."""
    state: bool = False
    """Tell the policy the robot's state (`observation.state` of the datasets)."""
    labels: tuple[str, ...] = ()
    """Labels of the datasets, to go on learning latent actions beside the robot's (arXiv 2412.04445)."""
    latent_weight: float = 1.0
    """Weight of the loss of latent actions, where there are labels."""
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=partial(tiny_loop, 500))


def run(config: FinetuneConfig) -> None:
    """`lapa policy finetune`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    if config.resume and is_policy(config.out):
        finish("policy, already finetuned", config.out, _next_commands(config, read_config(config.out)))
        return
    datasets = [open_dataset(path) for path in config.data]
    labels = open_labels(config.labels, datasets) if config.labels else None
    start = _starting_policy(config, datasets)
    cameras = choose_cameras(config, start.model.config, datasets)
    if labels:
        require_same_codes(start.model.config, labels[0].manifest, config.policy)
    _check_continuation(config, start.model.config, datasets)

    training, held_out = open_steps(
        config,
        datasets,
        start.model.config.backbone.image_size,
        cameras,
        labels=labels,
        chunk=config.chunk,
        state=config.state,
    )
    parts = _with_actions(config, start, datasets, training, cameras)
    finished = train_policy(
        parts,
        training,
        held_out,
        config,
        labels=config.labels,
        run_config={
            **configs.to_dict(config),
            "dataset_fingerprints": [dataset.fingerprint for dataset in datasets],
        },
        description="policy from scratch" if config.from_scratch else "policy",
    )
    if finished:
        finish("policy", config.out, _next_commands(config, parts.model.config))


def _next_commands(config: FinetuneConfig, policy: PolicyConfig) -> list[str]:
    key = ["--statistics-key", policy.spaces[0].key] if policy.spaces else []
    return [shlex.join(["lapa", "evaluate", str(config.out), "--env", "ENVIRONMENT", *key, "--out", "RESULTS"])]


def _starting_policy(config: FinetuneConfig, datasets: Sequence[Dataset]) -> PolicyParts:
    """What training starts from: a pretrained policy, one of its architecture without pretraining, or a new one."""
    seed_everything(config.loop.seed)
    if config.policy is None:
        if not config.from_scratch:
            raise UserError("give the pretrained policy to start from with --policy, or ask for --from-scratch")
        return new_policy(config, datasets, {})
    pretrained = load_start(config, config.policy)
    return _without_pretraining(pretrained) if config.from_scratch else pretrained


def _without_pretraining(pretrained: PolicyParts) -> PolicyParts:
    """The policy as it was before it learned any action; it reads what the pretrained one reads."""
    before = pretrained.model.config
    if isinstance(before.backbone, HfConfig) and before.chunk:
        raise UserError(
            "--from-scratch: this policy's tokenizer knows its actions already; give the policy that it was finetuned "
            "from as --policy, or the model itself as --backbone"
        )
    if isinstance(before.backbone, LwmConfig):
        raise UserError(
            "--from-scratch: an imported model cannot forget its pretraining; give LWM-Chat-1M, imported, as --policy"
        )
    config = PolicyConfig(
        vocabulary=replace(before.vocabulary, bins=0, state=0, query=0),
        cameras=before.cameras,
        backbone=before.backbone,
        prompts=before.prompts,
        latent_length=before.latent_length,
    )
    backbone = renew_backbone(config.backbone, config.vocabulary, num_cameras=len(config.cameras))
    return PolicyParts(LatentPolicy(config, backbone), pretrained.processor)


def _each_its_own(config: FinetuneConfig, datasets: Sequence[Dataset]) -> bool:
    """Whether a policy that does not act yet gets statistics of each dataset."""
    return len(datasets) > 1 and not config.pool_statistics and not config.statistics


def _check_continuation(config: FinetuneConfig, policy: PolicyConfig, datasets: Sequence[Dataset]) -> None:
    """UserError where a policy that acts already is to act in another way, or on another robot, or latent actions are

    asked of one that has none; and where datasets that get statistics of their own have one name.
    """
    if config.labels and not policy.latent_length:
        raise UserError("--labels: this policy has no latent actions to go on learning; start from a pretrained one")
    if policy.action_space is None:
        if _each_its_own(config, datasets):
            require_names(datasets)
        return
    for option, given in {"statistics": config.statistics, "pool-statistics": config.pool_statistics}.items():
        if given:
            raise UserError(f"--{option}: the policy {config.policy} has its own already; leave the option out")
    mend = "; finetune a policy that was only pretrained"
    if (config.head, config.state) != (policy.head, bool(policy.state_dim)):
        raise UserError(
            f"{config.policy}: acts by --head {policy.head} {'with' if policy.state_dim else 'without'} the robot's "
            f"state; go on with the same --head and --state, or{mend[1:]}"
        )
    if policy.head == "bins" and config.num_bins != policy.vocabulary.bins:
        raise UserError(f"{config.policy}: has --num-bins {policy.vocabulary.bins} already{mend}")
    if policy.head == "flow" and (config.flow, config.chunk) != (policy.flow, policy.chunk):
        raise UserError(f"{config.policy}: its flow head was made for --chunk {policy.chunk} and {policy.flow}{mend}")
    for dataset in datasets:
        space, found = _known_space(policy, dataset, mend), common_action_space([dataset])
        if space.action_dim != found.action_dim:
            raise UserError(
                f"{dataset.root}: has actions of {found.action_dim} dimensions ({', '.join(found.names)}), the policy "
                f"{config.policy} of {space.action_dim}{mend}"
            )
        if space.binary != found.binary or (space.control and found.control and space.control != found.control):
            raise UserError(
                f"{dataset.root}: declares its actions otherwise than the policy {config.policy} has them (binary "
                f"dimensions, delta or absolute); correct its meta/lapa.json, or{mend[1:]}"
            )
    if policy.state_dim and any(dataset.state_dim != policy.state_dim for dataset in datasets):
        raise UserError(
            f"{config.data[0]}: the policy {config.policy} is told {policy.state_dim} numbers of state{mend}"
        )


def _known_space(policy: PolicyConfig, dataset: Dataset, mend: str) -> ActionSpace:
    """What the actions of a dataset mean to a policy that acts already."""
    assert policy.action_space is not None, "asked of a policy that acts"
    known = {item.key: item.space for item in policy.spaces}
    if known and dataset.name not in known:
        raise UserError(
            f"{unknown('dataset with statistics', dataset.name, known)}; say with --data NAME={dataset.root} whose it "
            f"is to take, or{mend[1:]}"
        )
    return known.get(dataset.name, policy.action_space)


def _with_actions(
    config: FinetuneConfig,
    start: PolicyParts,
    datasets: Sequence[Dataset],
    training: EpisodeSteps,
    cameras: tuple[str, ...],
) -> PolicyParts:
    """The starting policy with robot actions: statistics of the training actions, or kept where it already acts."""
    before = start.model.config
    # An imported policy may have rows for bins that were not released with it.
    num_bins = before.vocabulary.bins or config.num_bins
    sets, spaces = _statistics(config, start, training, num_bins)
    alone = sets.get(ALL, Statistics())
    for number, dataset in enumerate(datasets):
        _say_statistics(dataset.name, sets.get(dataset.name, alone).codec, training.actions(number))
    vocabulary = before.vocabulary
    vocabulary = replace(
        vocabulary,
        bins=num_bins if config.head == "bins" else vocabulary.bins,
        state=vocabulary.state or (STATE_BINS if config.state else 0),
        query=max(vocabulary.query, config.chunk if config.head == "chunk" else 0),
    )
    grown = replace(
        before,
        vocabulary=vocabulary,
        cameras=cameras,
        prompts=choose_prompts(config, datasets, before.prompts).acting_as([dataset.name for dataset in datasets]),
        state_bins=most_bins(of.states for of in sets.values()),
        action_opening=start.processor.tags("bins")[0],
        action_space=next(iter(spaces.values())),
        spaces=tuple(KeyedSpace(key, space) for key, space in spaces.items() if key != ALL),
        head=config.head,
        action_bins=most_bins(of.codec for of in sets.values()),
        flow=config.flow,
        chunk=config.chunk,
        latent_weight=config.latent_weight if config.labels else 0.0,
    )
    start.processor.grow(vocabulary)
    by_key = {} if ALL in sets else sets
    return PolicyParts(start.model.grown(grown), start.processor, alone.codec, alone.states, by_key)


def _statistics(
    config: FinetuneConfig, start: PolicyParts, training: EpisodeSteps, num_bins: int
) -> tuple[dict[str, Statistics], dict[str, ActionSpace]]:
    """What actions and states are said in, and what the actions mean: of each dataset, or under ALL for all of them."""
    datasets = training.datasets
    if start.by_key:
        return dict(start.by_key), {item.key: item.space for item in start.model.config.spaces}
    if start.codec is None and _each_its_own(config, datasets):
        spaces = {dataset.name: common_action_space([dataset]) for dataset in datasets}
        controls = {name: space.control for name, space in spaces.items() if space.control}
        if len(set(controls.values())) > 1:
            warn(f"datasets differ in control ({controls}): a robot acts as its --statistics-key does")
        sets = {
            dataset.name: Statistics(
                fit_codec(config.head, training.actions(number), spaces[dataset.name].binary, num_bins),
                ActionBins.fit(training.states(number), STATE_BINS) if config.state else None,
            )
            for number, dataset in enumerate(datasets)
        }
        return sets, spaces
    space = common_action_space(datasets)
    codec = start.codec or fit_codec(config.head, _pooled_actions(config, training), space.binary, num_bins)
    states = start.states or (ActionBins.fit(training.states(), STATE_BINS) if config.state else None)
    return {ALL: Statistics(codec, states)}, {ALL: space}


def _pooled_actions(config: FinetuneConfig, training: EpisodeSteps) -> np.ndarray:
    """The actions that one set of statistics is made from: those of --statistics, else those that are learned from."""
    if not config.statistics:
        return training.actions()
    others = [open_dataset(path) for path in config.statistics]
    common_action_space([*others, *training.datasets])
    return np.concatenate([other.all_actions() for other in others])


def _say_statistics(name: str, codec: ActionCodec | None, actions_NA: np.ndarray) -> None:
    assert codec is not None, "there are statistics by now"
    outside_A = codec.count_outside(actions_NA)
    how = f" of {', '.join(map(str, codec.counts_A))} bins" if isinstance(codec, ActionBins) else ""
    clamped = f"; {outside_A.sum()} of {actions_NA.size} values lie outside and are clamped" if outside_A.any() else ""
    say(f"actions of {name}: {codec.action_dim} dimensions{how}{clamped}")
