"""Trains the inverse dynamics model on labelled episodes (VPT, https://arxiv.org/abs/2206.11795).

    lapa baseline inverse --data ROBOT_DATASET --out INVERSE

Axes: B batch, N pairs, T=2 frames of a pair, C channel, H W image, K steps between the frames, A action dimensions.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn

from lapa import config as configs
from lapa.baselines.inverse import InverseConfig, InverseDynamics, Recording, is_inverse
from lapa.console import finish, is_main_process, say
from lapa.data.action_space import ActionSpace, common_action_space
from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs, horizon_frames
from lapa.data.sampling import require_plain, split_episodes
from lapa.engine.checkpoint import seed_everything
from lapa.engine.loop import LoopConfig, train
from lapa.engine.metrics import versions_and_hardware
from lapa.errors import UserError
from lapa.files import claim_output
from lapa.policy.figures import action_figures
from lapa.policy.scale import ActionScale
from lapa.policy.training import tiny_loop

# Held-out pairs that an evaluation looks at, spread evenly over the held-out episodes.
EVALUATION_PAIRS = 512
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class InverseTrainConfig:
    """Train an inverse dynamics model, which tells the robot's actions from pictures, on episodes with actions."""

    data: tuple[str, ...]
    """Datasets with actions to learn from.

    docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT].
    """
    out: Path
    """Folder of the model to write."""
    preset: str = "tiny"
    """debug, tiny or base: the values that the other options start from."""
    model: Annotated[InverseConfig, tyro.conf.arg(name="")] = field(default_factory=InverseConfig)
    loop: Annotated[LoopConfig, tyro.conf.arg(name="")] = field(default_factory=partial(tiny_loop, 1000))
    camera: str | None = None
    """Which camera's pictures, the same of all datasets; by default the first one's first."""
    held_out: float = 0.1
    """Share of the episodes kept for evaluation; at least one of each dataset, none where this is 0."""
    cache_gib: float = 4.0
    """Decoded frames are kept in memory where they fit into this much; training and held-out episodes each."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Go on with the run that `out` holds."""


class InversePairs(torch.utils.data.Dataset):
    """Pairs of frames with the actions between them, on a scale. Keys and the rest are those of `FramePairs`."""

    def __init__(self, pairs: FramePairs, scale: ActionScale) -> None:
        self.pairs, self.scale = pairs, scale
        self.in_memory = pairs.in_memory

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | Sequence[int]) -> dict[str, Any]:
        """{"frames_TCHW", "index", "episode"} as of `FramePairs`, and "actions_KA", float32, scaled."""
        item = self.pairs[key]
        return {**item, "actions_KA": self.scale.encode(self.pairs.actions_between(item["index"]))}

    def describe(self, index: int) -> str:
        """Where a pair comes from, in words."""
        return self.pairs.describe(index)


def run(config: InverseTrainConfig) -> None:
    """`lapa baseline inverse`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    next_commands = [f"lapa baseline pseudo-label --inverse {shlex.quote(str(config.out))} --data VIDEOS --out DATASET"]
    if config.resume and is_inverse(config.out):
        finish("inverse dynamics model, already complete", config.out, next_commands)
        return
    if config.loop.shard:
        raise UserError("--shard: an inverse dynamics model is too small to be shared out; leave the option out")
    datasets = [Dataset.open(path) for path in config.data]
    require_plain(datasets, "lapa baseline inverse", "--horizon-seconds")
    space = common_action_space(datasets)
    recording = _recording(config, datasets, space)
    training, held_out = _open_pairs(config, datasets, recording)
    actions_NA = _training_actions(config, datasets, recording)
    scale = ActionScale.fit(actions_NA, space.binary)
    if is_main_process():
        complete = is_inverse(config.out)
        claim_output(
            config.out,
            complete=complete,
            overwrite=config.overwrite,
            resume=config.resume,
            inputs=[dataset.root for dataset in datasets],
        )
    outside = int(scale.count_outside(actions_NA).sum())
    say(f"actions: {scale.action_dim} dimensions, {outside} of {actions_NA.size} values lie outside and are clamped")
    if held_out is None:
        say("no episode is held out: nothing is evaluated while training")
    seed_everything(config.loop.seed)
    model = InverseDynamics(config.model, recording, scale)
    run_config = {**configs.to_dict(config), "dataset_fingerprints": [dataset.fingerprint for dataset in datasets]}
    result = train(
        model,
        InversePairs(training, scale),
        collate_inverse,
        config.loop,
        config.out,
        run_config=run_config,
        description="inverse dynamics model",
        resume=config.resume,
        evaluate=None if held_out is None else held_out_figures(held_out),
    )
    if result.finished and is_main_process():
        model.save_pretrained(config.out, run=run_config, metrics={**result.metrics, **versions_and_hardware()})
        finish("inverse dynamics model", config.out, next_commands)


def collate_inverse(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Items of InversePairs as a batch: frames_BTCHW uint8, actions_BKA float32, index int64."""
    actions_BKA = torch.from_numpy(np.stack([item["actions_KA"] for item in items]))
    return {**collate_pairs(items), "actions_BKA": actions_BKA}


def held_out_figures(pairs: FramePairs) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation on held-out pairs: the action error, R2 of each dimension that varies, and their mean."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, EVALUATION_PAIRS).round().astype(int))
    frames_NTCHW = collate_pairs([pairs[int(index)] for index in chosen])["frames_BTCHW"]
    true_NKA = np.stack([pairs.actions_between(int(index)) for index in chosen])

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, InverseDynamics)
        said_NKA = np.concatenate([model.predict(frames) for frames in frames_NTCHW.split(EVALUATION_BATCH)])
        counted_NK, mean_A = np.ones(true_NKA.shape[:2], bool), true_NKA.mean((0, 1))
        figures = action_figures(said_NKA, true_NKA, counted_NK, mean_A, model.action_space)
        r2 = {f"r2_{name}": values["r2"] for name, values in figures["dimensions"].items()}
        told = {"action_error": figures["action_error"], "r2": figures["r2"], **r2}
        return {f"held_out_{name}": value for name, value in told.items() if value is not None}

    return evaluate


def _recording(config: InverseTrainConfig, datasets: Sequence[Dataset], space: ActionSpace) -> Recording:
    """UserError where the horizon is not of as many frames in all datasets."""
    seconds = config.model.horizon_seconds
    frames = [horizon_frames(seconds, dataset.fps) for dataset in datasets]
    for dataset, count in zip(datasets, frames, strict=True):
        if count != frames[0]:
            raise UserError(
                f"{dataset.root}: {seconds:g} s are {count} frames at {dataset.fps:g} fps, in {datasets[0].root} "
                f"{frames[0]} at {datasets[0].fps:g} fps; train on datasets of one rate"
            )
    return Recording(frames[0], datasets[0].fps, config.camera or datasets[0].cameras[0], space)


def _open_pairs(
    config: InverseTrainConfig, datasets: Sequence[Dataset], recording: Recording
) -> tuple[FramePairs, FramePairs | None]:
    """The training pairs, and the held-out ones where any episode is held out."""
    pairs = PairsConfig(
        size=config.model.image_size,
        horizon=config.model.horizon_seconds,
        camera=recording.camera,
        held_out=config.held_out,
        cache_gib=config.cache_gib,
    )
    some_held_out = config.held_out > 0 and any(len(dataset.lengths) > 1 for dataset in datasets)
    training = FramePairs(datasets, pairs, split="train", seed=config.loop.seed)
    return training, FramePairs(datasets, pairs, "held_out", config.loop.seed) if some_held_out else None


def _training_actions(
    config: InverseTrainConfig, datasets: Sequence[Dataset], recording: Recording
) -> Float[np.ndarray, "N A"]:
    """All actions of the training episodes that are long enough for a pair."""
    actions = []
    for number, dataset in enumerate(datasets):
        episodes = split_episodes(len(dataset.lengths), config.held_out, config.loop.seed + number, "train")
        long_enough = episodes[dataset.lengths[episodes] > recording.horizon_frames]
        actions += [dataset.actions(int(episode)) for episode in long_enough]
    return np.concatenate(actions)
