"""Finetuning: a pretrained policy learns the robot's own actions from a few labelled episodes.

LAPA (https://arxiv.org/abs/2410.11758), stage 3: the bin segment is new, everything else starts from the pretrained
policy; the loss moves to the bin segment. `--from-scratch` is the paper's baseline: the same policy, untrained.

    lapa policy finetune --policy POLICY --data ROBOT_DATASET --out FINETUNED

With several datasets, each has statistics of its own actions and states (bins or scale) under its name, which its
samples are encoded with. The datasets may differ in the names of the dimensions, in which of them are binary and in
control, but not in their number. A robot then acts with one set: `lapa evaluate --statistics-key NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lapa.console import finish, is_main_process, print_results, say, warn
from lapa.data.dataset import ActionSpace, Dataset, common_action_space
from lapa.data.sampling import require_names
from lapa.data.spec import open_dataset
from lapa.data.steps import EpisodeSteps
from lapa.engine.checkpoint import seed_everything
from lapa.engine.metrics import read_figures
from lapa.errors import UserError, unknown
from lapa.locks import locks_output
from lapa.policy.actions import ActionBins, ActionCodec, KeyedSpace, Statistics, fit_codec, most_bins, warn_of_ranges
from lapa.policy.backbones import renew_backbone
from lapa.policy.config import FinetuneConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import METRICS, Policy, read_config, statistics_of
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
    verdict_of,
)
from lapa.store_cache import use_store_cache
from lapa.verdicts import suggested

STATE_BINS = 256
# Key of the one set of statistics that several datasets share.
POOLED = "pooled"


@locks_output
def run(config: FinetuneConfig) -> None:
    """`lapa policy finetune`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    use_store_cache(config.loop.store_cache, config.loop.store_cache_gib)
    datasets = [open_dataset(path) for path in config.data]
    if finished_before(config, run_config_of(config, datasets)):
        _conclude(config, "policy, already finetuned")
        return
    policy, training, held_out = prepare(config, datasets)
    description = "policy from scratch" if config.from_scratch else "policy"
    if train_policy(policy, training, held_out, config, description=description):
        _conclude(config, "policy")


def prepare(config: FinetuneConfig, datasets: Sequence[Dataset]) -> tuple[Policy, EpisodeSteps, EpisodeSteps | None]:
    """The policy before its first step, with robot actions and their statistics; training and validation steps.

    Raises UserError where options, datasets and the policy to start from do not fit.
    """
    labels = open_labels(config.labels, datasets) if config.labels else None
    start = _starting_policy(config, datasets)
    cameras = slot_cameras(start.cameras, datasets, config.cameras)
    if labels:
        require_same_codes(start.config, labels[0].manifest, config.policy)
    _check_continuation(config, start.config, datasets)
    training, held_out = open_steps(
        config, datasets, start.config, cameras, labels=labels, chunk=config.chunk, state=config.state
    )
    return _with_actions(config, start, datasets, training, cameras), training, held_out


def _conclude(config: FinetuneConfig, name: str) -> None:
    """Reports the figures of the validation split and the verdict on them, and suggests what fits it."""
    if not is_main_process():
        return
    metrics, policy = read_figures(config.out / METRICS, HELD_OUT), read_config(config.out)
    verdict = verdict_of(metrics)
    print_results({**metrics, "verdict": verdict.as_json()}, summary(metrics), str(verdict), as_json=config.json)
    key = ["--statistics-key", policy.spaces[0].key] if len(policy.spaces) > 1 else []
    data = str(config.data[0]) if verdict.level == "bad" else "OTHER_EPISODES"
    measure = ["lapa", "policy", "measure", str(config.out), *key, "--data", data]
    evaluate = ["lapa", "evaluate", str(config.out), "--env", "ENVIRONMENT", *key, "--out", "RESULTS"]
    finish(name, config.out, suggested(verdict, evaluate, measure))


def _starting_policy(config: FinetuneConfig, datasets: Sequence[Dataset]) -> Policy:
    """The policy to start from: pretrained, of its architecture with new weights, or new."""
    seed_everything(config.loop.seed)
    if config.policy is None:
        if not config.from_scratch:
            raise UserError("give the pretrained policy to start from with --policy, or --from-scratch")
        return new_policy(config, datasets, {})
    pretrained = load_start(config, config.policy)
    return _without_pretraining(pretrained) if config.from_scratch else pretrained


def _without_pretraining(pretrained: Policy) -> Policy:
    """The policy as it was before it learned any action, with the same cameras, prompts and tokenizer."""
    before = pretrained.config
    if before.backbone.kind == "hf" and before.chunk:
        raise UserError(
            "--from-scratch: this policy's tokenizer knows its actions already; give the policy that it was finetuned "
            "from as --policy, or the model itself as --backbone"
        )
    if before.backbone.kind == "lwm":
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
    return Policy(LatentPolicy(config, backbone), pretrained.processor)


def _each_its_own(config: FinetuneConfig, datasets: Sequence[Dataset]) -> bool:
    """Whether each dataset gets its own statistics, in a policy that does not act yet."""
    return len(datasets) > 1 and not config.pool_statistics and not config.statistics


def _check_continuation(config: FinetuneConfig, policy: PolicyConfig, datasets: Sequence[Dataset]) -> None:
    """Raises UserError for options that do not fit the starting policy.

    A policy that acts already cannot change its head, state or robot; one without latent actions cannot train on
    labels; datasets that get statistics of their own need different names.
    """
    if config.labels and not policy.latent_length:
        raise UserError("--labels: this policy has no latent actions to train on; start from a pretrained one")
    if not policy.chunk:
        if _each_its_own(config, datasets):
            require_names(datasets)
        return
    for option, given in {"statistics": config.statistics, "pool-statistics": config.pool_statistics}.items():
        if given:
            raise UserError(f"--{option}: the policy {config.policy} has its own already; leave the option out")
    remedy = "; finetune a policy that was only pretrained"
    if (config.head, config.state) != (policy.head, bool(policy.state_dim)):
        raise UserError(
            f"{config.policy}: acts by --head {policy.head} {'with' if policy.state_dim else 'without'} the robot's "
            f"state; continue with the same --head and --state, or{remedy[1:]}"
        )
    if policy.head == "bins" and config.num_bins != policy.vocabulary.bins:
        raise UserError(f"{config.policy}: has --num-bins {policy.vocabulary.bins} already{remedy}")
    if policy.head == "flow" and (config.flow, config.chunk) != (policy.flow, policy.chunk):
        raise UserError(f"{config.policy}: its flow head was made for --chunk {policy.chunk} and {policy.flow}{remedy}")
    for dataset in datasets:
        space, found = _known_space(policy, dataset, remedy), common_action_space([dataset])
        if space.action_dim != found.action_dim:
            raise UserError(
                f"{dataset.root}: has actions of {found.action_dim} dimensions ({', '.join(found.names)}), the policy "
                f"{config.policy} of {space.action_dim}{remedy}"
            )
        if space.binary != found.binary or (space.control and found.control and space.control != found.control):
            raise UserError(
                f"{dataset.root}: declares its actions differently from the policy {config.policy} (binary "
                f"dimensions, delta or absolute); correct its meta/lapa.json, or{remedy[1:]}"
            )
    if policy.state_dim and any(dataset.state_dim != policy.state_dim for dataset in datasets):
        raise UserError(
            f"{config.data[0]}: the policy {config.policy} reads {policy.state_dim} numbers of state{remedy}"
        )


def _known_space(policy: PolicyConfig, dataset: Dataset, remedy: str) -> ActionSpace:
    """The action space that a policy that acts already has for a dataset."""
    known = {item.key: item.space for item in policy.spaces}
    if len(known) > 1 and dataset.name not in known:
        raise UserError(
            f"{unknown('dataset with statistics', dataset.name, known)}; name the one to take in "
            f"--data NAME={dataset.root}, or{remedy[1:]}"
        )
    return known.get(dataset.name, policy.spaces[0].space)


def _with_actions(
    config: FinetuneConfig,
    start: Policy,
    datasets: Sequence[Dataset],
    training: EpisodeSteps,
    cameras: tuple[str, ...],
) -> Policy:
    """The starting policy with robot actions, and statistics of the training actions unless it has its own."""
    before = start.config
    # An imported policy may have rows for bins that were not released with it.
    num_bins = before.vocabulary.bins or config.num_bins
    statistics, spaces = start.statistics, before.spaces
    if not start.acts:
        statistics, spaces = _statistics(config, training, num_bins)
    for number, dataset in enumerate(datasets):
        _report(dataset, statistics_of(statistics, dataset.name).codec, training.actions(number))
    vocabulary = replace(
        before.vocabulary,
        bins=num_bins if config.head == "bins" else before.vocabulary.bins,
        state=before.vocabulary.state or (STATE_BINS if config.state else 0),
        query=max(before.vocabulary.query, config.chunk if config.head == "chunk" else 0),
    )
    grown = replace(
        before,
        vocabulary=vocabulary,
        cameras=cameras,
        prompts=choose_prompts(config, datasets, before.prompts).acting_as([dataset.name for dataset in datasets]),
        state_bins=most_bins(each.states for each in statistics.values()),
        action_opening=start.processor.tags("bins")[0],
        spaces=spaces,
        head=config.head,
        action_bins=most_bins(each.codec for each in statistics.values()),
        flow=config.flow,
        chunk=config.chunk,
        latent_weight=config.latent_weight if config.labels else 0.0,
    )
    start.processor.grow(vocabulary)
    return Policy(start.model.grown(grown), start.processor, statistics)


def _statistics(
    config: FinetuneConfig, training: EpisodeSteps, num_bins: int
) -> tuple[dict[str, Statistics], tuple[KeyedSpace, ...]]:
    """Statistics of the training actions and states, and the action spaces: of each dataset, or of all in one set."""
    datasets = training.datasets

    def of(space: ActionSpace, actions_NA: np.ndarray, number: int | None) -> Statistics:
        states = ActionBins.fit(training.states(number), STATE_BINS) if config.state else None
        return Statistics(fit_codec(config.head, actions_NA, space.binary, num_bins), states)

    if not _each_its_own(config, datasets):
        space, rates = common_action_space(datasets), {dataset.fps for dataset in datasets}
        key = datasets[0].name if len(datasets) == 1 else POOLED
        fps = rates.pop() if len(rates) == 1 else None
        return {key: of(space, _pooled_actions(config, training), None)}, (KeyedSpace(key, space, fps),)
    spaces = tuple(KeyedSpace(d.name, common_action_space([d]), d.fps) for d in datasets)
    controls = {item.key: item.space.control for item in spaces if item.space.control}
    if len(set(controls.values())) > 1:
        warn(f"datasets differ in control ({controls}): a robot acts with that of its --statistics-key")
    sets = {item.key: of(item.space, training.actions(number), number) for number, item in enumerate(spaces)}
    return sets, spaces


def _pooled_actions(config: FinetuneConfig, training: EpisodeSteps) -> np.ndarray:
    """The actions that one set of statistics is made from: those of --statistics, else the training actions."""
    if not config.statistics:
        return training.actions()
    others = [open_dataset(path) for path in config.statistics]
    common_action_space([*others, *training.datasets])
    return np.concatenate([other.all_actions() for other in others])


def _report(dataset: Dataset, codec: ActionCodec, actions_NA: np.ndarray) -> None:
    outside_A = codec.count_outside(actions_NA)
    how = f" of {', '.join(map(str, codec.counts_A))} bins" if isinstance(codec, ActionBins) else ""
    clamped = f"; {outside_A.sum()} of {actions_NA.size} values lie outside and are clamped" if outside_A.any() else ""
    say(f"actions of {dataset.name}: {codec.action_dim} dimensions{how}{clamped}")
    warn_of_ranges(dataset.name, codec, actions_NA, common_action_space([dataset]).names)
