"""Steps that pretraining and finetuning share: the starting policy, cameras, the run and its validation.

Axes: B batch, K chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lapa import config as configs
from lapa.console import is_main_process, say, warn
from lapa.data.dataset import Dataset
from lapa.data.labels import Labels, Manifest
from lapa.data.sampling import any_held_out, episodes_of_training, recorded_split, require_split
from lapa.data.steps import EpisodeSteps
from lapa.engine.checkpoint import already_trained
from lapa.engine.loop import train
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import UserError, unknown
from lapa.files import claim_output, read_json
from lapa.policy.backbones import create_backbone
from lapa.policy.backbones.hf import native_image_size
from lapa.policy.config import HF, BackboneConfig, FinetuneConfig, HfConfig, PretrainConfig, TrainingOptions
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.prompts import Prompts, parse_prompts
from lapa.policy.runtime import CONFIG, Policy, is_policy, load_policy, policy_folder
from lapa.verdicts import Verdict, judge, of_policy, ratio

# Validation steps of one evaluation, spread evenly over the validation episodes, and the least of each dataset.
EVALUATION_STEPS = 256
LEAST_STEPS = 32
EVALUATION_BATCH = 64
# Before the names of the figures that are measured on them.
HELD_OUT = "held_out_"
# What the run of a policy records of the trainings before it: see `trainings_of`.
EARLIER = "earlier_trainings"


def new_policy(
    options: TrainingOptions, datasets: Sequence[Dataset], segments: dict[str, int], latent_length: int = 0
) -> Policy:
    """A policy that has not learned any action yet: a new backbone, or a pretrained vision-language model."""
    prompts = choose_prompts(options, datasets)
    cameras = options.cameras or datasets[0].cameras[:1]
    config = backbone_config(options)
    texts = [prompts.text(episode.instruction, d.name) for d in datasets for episode in d.episodes]
    backbone, processor, vocabulary = create_backbone(config, texts=texts, num_cameras=len(cameras), segments=segments)
    policy = PolicyConfig(vocabulary, cameras, config, prompts, latent_length=latent_length)
    return Policy(LatentPolicy(policy, backbone), processor)


def backbone_config(options: TrainingOptions) -> BackboneConfig:
    """The backbone that `--backbone` names. Raises UserError for one that is not known."""
    if options.backbone == "tiny":
        return options.tiny
    if options.backbone.startswith(HF) and options.backbone != HF:
        source = options.backbone.removeprefix(HF)
        return HfConfig(source=source, image_size=options.hf_image_size or native_image_size(source))
    if options.backbone == "lwm":
        raise UserError(
            "the backbone lwm has no weights of its own: import LWM-Chat-1M or LAPA-7B with `lapa import lapa-7b`, "
            "and give the folder with --policy"
        )
    raise UserError(
        f"--backbone {options.backbone!r}: expected tiny, or hf:FOLDER or hf:HUB_ID of an image-text model; a policy "
        "folder goes to --policy"
    )


def load_start(options: TrainingOptions, folder: Path) -> Policy:
    """The policy to start from, with its own backbone; warns where --backbone or the preset name another.

    Raises UserError where the output would replace it.
    """
    if folder.resolve() == options.out.resolve():
        raise UserError(f"{options.out}: is the policy to start from; give another --out")
    policy = load_policy(policy_folder(folder))
    backbone = policy.config.backbone
    own = f"{HF}{backbone.source}" if isinstance(backbone, HfConfig) else backbone.kind
    if options.backbone not in ("tiny", own):
        warn(f"--backbone {options.backbone} is ignored: {folder} has its own, {own}")
    before = policy.run.get("preset", options.preset)
    if before != options.preset:
        warn(
            f"{folder} was trained with --preset {before}; steps, learning rate and what is frozen are now those of "
            f"{options.preset}, unless they are given"
        )
    return policy


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


def require_same_codes(policy: PolicyConfig, manifest: Manifest, folder: Path | None) -> None:
    """Raises UserError where the policy has learned other latent actions than those of the labels."""
    known, wanted = (policy.vocabulary.latent, policy.latent_length), (manifest.codebook_size, manifest.latent_length)
    if known not in ((0, 0), wanted):
        raise UserError(
            f"{folder}: predicts latent actions of {known[1]} tokens out of {known[0]}, the labels hold {wanted[1]} "
            f"out of {wanted[0]}; label the data with the latent action model that the policy was pretrained on"
        )
    if policy.lam_fingerprint not in ("", manifest.lam_fingerprint):
        raise UserError(
            f"{folder}: learned the latent actions of the model {policy.lam_fingerprint}, the labels were made by "
            f"{manifest.lam_fingerprint}, whose codes mean something else; label the data with the former"
        )


def choose_prompts(options: TrainingOptions, datasets: Sequence[Dataset], known: Prompts | None = None) -> Prompts:
    """The prompts that the options name, else those of the policy to start from (`known`), else plain ones."""
    if known is not None and options.prompt is None:
        return known
    return parse_prompts(options.prompt or "plain", [dataset.name for dataset in datasets])


def slot_cameras(slots: Sequence[str], datasets: Sequence[Dataset], chosen: Sequence[str] = ()) -> tuple[str, ...]:
    """Which of the datasets' cameras fills each image slot of a policy.

    chosen: the user's choice, in the order of the slots. Without one, the cameras of the slots' names; or for a single
    slot, the only camera that the datasets have in common, or the only camera of each, whatever its name: the slot then
    keeps its own name. Raises UserError where this does not decide.
    """
    common = [name for name in datasets[0].cameras if all(name in dataset.cameras for dataset in datasets)]
    if not chosen and all(name in common for name in slots):
        chosen = slots
    if not chosen and len(common) == len(slots) == 1:
        chosen = common
    if not chosen and len(slots) == 1 and all(len(dataset.cameras) == 1 for dataset in datasets):
        chosen = slots
    elif unfit := [name for name in chosen if name not in common]:
        lacking = next(dataset for dataset in datasets if unfit[0] not in dataset.cameras)
        raise unknown("camera", unfit[0], lacking.cameras)
    if not chosen and not common:
        found = "; ".join(f"{dataset.name}: {', '.join(dataset.cameras)}" for dataset in datasets)
        raise UserError(
            f"the datasets have no camera in common ({found}); read one of each in place, as in "
            "--data SOURCE:PATH,camera=NAME (see `lapa data --help`)"
        )
    if not chosen:
        raise UserError(
            f"{datasets[0].root}: has the cameras {', '.join(common)}, the policy was trained with "
            f"{', '.join(slots)}; choose with --cameras, one for each"
        )
    if len(chosen) != len(slots):
        raise UserError(
            f"the policy has {len(slots)} image slots ({', '.join(slots)}), got the cameras "
            f"{', '.join(chosen)}; give as many --cameras"
        )
    return tuple(chosen)


def run_config_of(
    options: PretrainConfig | FinetuneConfig, datasets: Sequence[Dataset], **made_from: str
) -> dict[str, Any]:
    """What a run records of itself: its options, the fingerprints of its datasets and `made_from`."""
    return {
        **configs.to_dict(options),
        "dataset_fingerprints": [dataset.fingerprint for dataset in datasets],
        **made_from,
    }


def finished_before(options: PretrainConfig | FinetuneConfig, run_config: Mapping[str, Any]) -> bool:
    """Whether a resumed run finds a policy that needs no more steps. Raises UserError as `already_trained` does."""
    return options.resume and is_policy(options.out) and already_trained(options.out / CONFIG, run_config)


def train_policy(
    policy: Policy,
    training: EpisodeSteps,
    held_out: EpisodeSteps | None,
    options: PretrainConfig | FinetuneConfig,
    *,
    description: str,
    **made_from: str,
) -> bool:
    """Trains the policy in place and writes its folder. Returns False where the run was stopped before its end.

    made_from: recorded with the run, next to its options and the fingerprints of its datasets.
    """
    if options.lora_rank:
        policy.model.add_adapters(options.lora_rank)
    policy.model.freeze(vision=options.freeze_vision)
    if is_main_process():
        claim_output(
            options.out,
            complete=is_policy(options.out),
            overwrite=options.overwrite,
            resume=options.resume,
            inputs=[*(d.root for d in training.datasets), *options.labels, *filter(None, [options.policy])],
        )
    run_config = run_config_of(options, training.datasets, **made_from)
    before = None if isinstance(options, FinetuneConfig) and options.from_scratch else options.policy
    earlier = trainings_of(before) if before else []
    evaluate = None if held_out is None else held_out_figures(policy, held_out, training)
    if held_out is None:
        say("no episode is held out: nothing is evaluated during training")
    training.mixture.report(options.loop.steps * options.loop.batch_size)
    result = train(
        policy.model,
        training,
        policy.collate,
        options.loop,
        options.out,
        run_config=run_config,
        description=description,
        resume=options.resume,
        evaluate=evaluate,
        summary=summary,
    )
    if result.finished and is_main_process():
        policy.model.merge_adapters()
        run, metrics = {**run_config, EARLIER: earlier}, {**result.metrics, **versions_and_hardware()}
        policy.save_pretrained(options.out, run=run, metrics=metrics)
    return result.finished


def summary(figures: Mapping[str, Any]) -> str:
    """The figures of the validation split as a line."""
    named = [
        f"{name.removeprefix(HELD_OUT).replace('_', ' ')} {value:.4g}"
        for name, value in figures.items()
        if name.startswith(HELD_OUT)
    ]
    return f"validation split: {', '.join(named) or 'no episode'}"


def verdict_of(metrics: Mapping[str, Any]) -> Verdict:
    """The verdict on the robot actions of the validation split."""
    error = f"{HELD_OUT}action_error"
    ends = [name.removeprefix(error) for name in metrics if name.startswith(error)]
    if not ends:
        return Verdict("doubtful", ("no episode is in the validation split, so nothing was measured on others",))
    # Versions before 0.2 did not write the error of the mean action.
    ratios = [ratio(metrics[error + end], metrics.get(f"{HELD_OUT}mean_action_error{end}")) for end in ends]
    defined = [value for value in ratios if value is not None]
    figures = {"normalised_error": float(np.mean(defined)) if defined else None}
    return judge(of_policy(figures)).advised("try more episodes, or more steps")


def trainings_of(policy: Path) -> list[dict[str, Any] | None]:
    """The trainings that a policy has had, from the first on: `dataset_fingerprints`, `held_out` and `seed` of each.

    None stands for trainings that are not recorded. Raises UserError naming config.json where the record is damaged.
    """
    path = policy_folder(policy) / CONFIG
    written = read_json(path) if path.exists() else {}
    run = written.get("run") if isinstance(written, dict) else None
    if not isinstance(run, dict) or "dataset_fingerprints" not in run:
        return [None]
    # Versions before 0.2 recorded only which policy a run began with.
    began_new = not run.get("policy") or run.get("from_scratch")
    try:
        trainings = [*run.get(EARLIER, [] if began_new else [None]), recorded_split(run)]
        for training in trainings:
            if training is not None:
                require_split(training)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: what it records of its training is damaged ({type(error).__name__}: {error}); train or copy the "
            "policy again"
        ) from None
    return trainings


def trained_episodes(policy: Path, dataset: Dataset) -> tuple[np.ndarray, bool]:
    """The episodes of a dataset that a policy is known to be trained on, and whether all its trainings are recorded."""
    trainings = trainings_of(policy)
    known = [training for training in trainings if training is not None]
    found = [episodes_of_training(split, dataset.fingerprint, len(dataset)) for split in known]
    return np.unique(np.concatenate([np.arange(0), *found])), None not in trainings


def held_out_figures(
    policy: Policy, steps: EpisodeSteps, training: EpisodeSteps
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that evaluates a model on validation steps.

    It returns the loss and its parts given the true tokens before each, and for robot actions `action_error`, the mean
    absolute difference of the decoded chunk, in the robot's units, and `mean_action_error`, that of the mean action of
    the `training` steps; for each dataset, as `action_error_NAME`, where each has statistics of its own. The others are
    means over the datasets, each weighted by its share of the draws.
    """
    groups = []
    for share, chosen in evaluated_steps(steps):
        items = [steps[index] for index in chosen]
        number = steps.location(chosen[0])[0]
        mean_A = None if steps.chunk is None else training.actions(number).mean(0, dtype=np.float64)
        for first in range(0, len(items), EVALUATION_BATCH):
            groups.append((share, len(items), items[first : first + EVALUATION_BATCH], mean_A))
    batches = [policy.collate(group) for _, _, group, _ in groups]

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LatentPolicy)
        device = next(model.parameters()).device
        totals: dict[str, float] = {}
        for (share, num_items, group, mean_A), batch in zip(groups, batches, strict=True):
            placed = {name: value.to(device) for name, value in batch.items()}
            for name, value in _figures(model, policy, group, placed, mean_A).items():
                by_dataset = name.endswith("action_error") and len(policy.statistics) > 1
                key = f"{name}_{group[0]['dataset']}" if by_dataset else name
                weight = len(group) / num_items * (1.0 if by_dataset else share)
                totals[key] = totals.get(key, 0.0) + value * weight
        return {f"{HELD_OUT}{name}": value for name, value in totals.items()}

    return evaluate


def evaluated_steps(steps: EpisodeSteps) -> list[tuple[float, list[int]]]:
    """For each dataset with steps: its share of the draws, and the numbers of steps at even distances.

    As many of each dataset, so that a small one is evaluated too.
    """
    drawn = [part for part in steps.mixture.parts if part.num_items]
    most = max(EVALUATION_STEPS // len(drawn), LEAST_STEPS)
    chosen, first = [], 0
    for part, share in zip(steps.mixture.parts, steps.mixture.shares, strict=True):
        if part.num_items:
            spread = np.linspace(first, first + part.num_items - 1, most).round().astype(int)
            chosen.append((share, np.unique(spread).tolist()))
        first += part.num_items
    return chosen


def open_steps(
    options: TrainingOptions,
    datasets: Sequence[Dataset],
    policy: PolicyConfig,
    cameras: Sequence[str] | None,
    *,
    labels: Sequence[Labels] | None = None,
    chunk: int | None = None,
    state: bool = False,
) -> tuple[EpisodeSteps, EpisodeSteps | None]:
    """The training steps, and the validation steps where there is any validation episode; see `EpisodeSteps`."""
    if cameras and not options.cameras and not all(name in dataset.cameras for name in cameras for dataset in datasets):
        # As in `slot_cameras`: the only camera of each.
        cameras = None

    def steps(split: str) -> EpisodeSteps:
        return EpisodeSteps(
            datasets,
            policy.backbone.image_size,
            cameras,
            labels=labels,
            chunk=chunk,
            state=state,
            augment=options.augment and split == "train",
            seed=options.loop.seed,
            split=split,
            held_out=options.held_out,
            cache_gib=options.cache_gib,
            mix_by=options.mix_by,
        )

    return steps("train"), steps("held_out") if any_held_out(datasets, options.held_out) else None


def _figures(
    model: LatentPolicy,
    policy: Policy,
    items: Sequence[dict[str, Any]],
    batch: dict[str, Tensor],
    mean_A: np.ndarray | None,
) -> dict[str, float]:
    losses = model(batch)
    figures = {"loss": float(losses.loss), **{name: float(value) for name, value in losses.parts.items()}}
    if "action_BKA" in batch:
        decoded_BKA = policy.decode(model.predict_actions(batch).cpu().numpy(), [item["dataset"] for item in items])
        true_BKA = np.stack([item["actions_KA"] for item in items])
        counted_BK = np.stack([item["action_mask_K"] for item in items])
        for name, said_BKA in (("action_error", decoded_BKA), ("mean_action_error", mean_A)):
            figures[name] = float(np.abs(said_BKA - true_BKA).mean(-1)[counted_BK].mean())
    return figures
