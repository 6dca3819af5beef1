"""Labels videos with the actions that an inverse dynamics model sees in them (VPT, https://arxiv.org/abs/2206.11795).

    lapa baseline pseudo-label --inverse INVERSE --data VIDEOS --out DATASET
    lapa policy finetune --from-scratch --data DATASET --out POLICY

Every pair of frames one horizon apart says all actions between them, so most steps are told of several times: their
weighted mean counts, of a binary dimension the majority. What the last frame's action led to is not to be seen; it
repeats the one before. An episode too short for a pair is left out.

Axes: T time, P pairs of an episode, C channel, H W image, K steps between the frames of a pair, A action dimensions.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np
from einops import rearrange
from jaxtyping import Float

from lapa import config as configs
from lapa.baselines.inverse import InverseDynamics, inverse_fingerprint
from lapa.console import finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.episode_decoders import window_frames
from lapa.data.lerobot import EXTRA, require_folder
from lapa.data.pairs import horizon_frames
from lapa.data.replace_actions import claim_rewrite, is_dataset, rewrite_actions
from lapa.data.spec import open_dataset
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.policy.scale import ActionScale


@dataclass(frozen=True)
class PseudoLabelConfig:
    """Write a dataset of the same videos with the actions that an inverse dynamics model sees in them."""

    inverse: Path
    """Folder of the inverse dynamics model."""
    data: str
    """Dataset whose videos to label; actions and states that it may have are not read.

    docs/1-data.md has the form: [NAME=][SOURCE:]PATH[,KEY=VALUE...][:WEIGHT].
    """
    out: Path
    """Folder of the dataset to write."""
    camera: str | None = None
    """Which camera's pictures; by default the one that the model learned from."""
    batch_size: int = 128
    """Pairs looked at at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""
    resume: bool = False
    """Accept what `out` holds where it is finished; else begin it again."""


class SeesActions(Protocol):
    """What is asked of an inverse dynamics model."""

    scale: ActionScale

    @property
    def image_size(self) -> int: ...

    @property
    def horizon_frames(self) -> int: ...

    def predict(self, frames_BTCHW: np.ndarray) -> Float[np.ndarray, "B K A"]: ...


def run(config: PseudoLabelConfig) -> None:
    """`lapa baseline pseudo-label`. Raises UserError on bad input, or where no episode is long enough for a pair."""
    next_commands = [f"lapa policy finetune --from-scratch --data {shlex.quote(str(config.out))} --out POLICY"]
    model, dataset = InverseDynamics.from_pretrained(config.inverse), require_folder(open_dataset(config.data))
    camera = config.camera or model.camera
    if camera not in dataset.cameras:
        raise UserError(
            f"{dataset.root}: has no camera {camera!r}, which {config.inverse} learned from; "
            f"say with --camera which takes its place ({', '.join(dataset.cameras)})"
        )
    note = {
        "made_by": "lapa baseline pseudo-label",
        "inverse_fingerprint": inverse_fingerprint(config.inverse),
        "source_fingerprint": dataset.fingerprint,
        "camera": camera,
    }
    if config.resume and not config.overwrite and is_dataset(config.out):
        configs.require_same(config.out / EXTRA, note)
        finish("dataset with pseudo-labels, already complete", config.out, next_commands)
        return
    _require_pairs(model, dataset, config.inverse)
    claim_rewrite(config.out, dataset, note, overwrite=config.overwrite, resume=config.resume, inputs=[config.inverse])
    device = pick_device(config.device)
    say(
        f"labelling {dataset.num_frames} frames of {dataset.name} on {device}, "
        f"from pairs {model.horizon_frames} frames apart"
    )
    actions = pseudo_actions(model.to(device), dataset, camera, config.batch_size)
    written = rewrite_actions(
        dataset, config.out, actions=actions.get, action_space=model.action_space, keep_states=False, note=note
    )
    finish(f"{len(written.lengths)} episodes with pseudo-labels", config.out, next_commands)


def pseudo_actions(model: SeesActions, dataset: Dataset, camera: str, batch_size: int) -> dict[int, np.ndarray]:
    """Actions [T, A] float32, in the robot's units, of every episode that is long enough for a pair."""
    horizon = model.horizon_frames
    episodes = [int(episode) for episode in np.flatnonzero(dataset.lengths > horizon)]
    windows = window_frames(dataset, episodes, horizon, camera, model.image_size)
    actions: dict[int, np.ndarray] = {}
    started, num_frames = time.monotonic(), 0
    with progress() as bar:
        task = bar.add_task("labelling", total=len(episodes), note="")
        for episode, of_episode in groupby(windows, key=itemgetter(0)):
            said = [said_PKA for _, frames in of_episode for said_PKA in _predictions(model, frames, batch_size)]
            actions[episode] = merge_pairs(np.concatenate(said), model.scale)
            num_frames += int(dataset.lengths[episode])
            bar.update(task, advance=1, note=f"{num_frames / (time.monotonic() - started):.0f} frames/s")
    return actions


def merge_pairs(said_PKA: Float[np.ndarray, "P K A"], scale: ActionScale) -> Float[np.ndarray, "T A"]:
    """One action a frame, T = P + K, out of what the pairs (p, p + K) of an episode say, in the robot's units.

    The mean over all pairs that tell of a step, the majority in a binary dimension; a pair counts the more the nearer
    the step is to its middle, since what it tells best is its mean motion. The last frame repeats the action before it.
    """
    num_pairs, horizon, action_dim = said_PKA.shape
    weights_K = np.minimum(np.arange(horizon), np.arange(horizon)[::-1]) + 1
    sums_TA, told_T1 = np.zeros((num_pairs + horizon, action_dim)), np.zeros((num_pairs + horizon, 1))
    for step in range(horizon):
        sums_TA[step : step + num_pairs] += weights_K[step] * said_PKA[:, step]
        told_T1[step : step + num_pairs] += weights_K[step]
    sums_TA[-1], told_T1[-1] = sums_TA[-2], told_T1[-2]
    means_TA = (sums_TA / told_T1).astype(np.float32)
    # The scale sends each number of a binary dimension to the nearer of its two values.
    return np.where(scale.binary_A, scale.decode(scale.encode(means_TA)), means_TA)


def _predictions(model: SeesActions, frames_THWC: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """What the model says of all pairs in consecutive frames, batch by batch."""
    frames_TCHW = np.ascontiguousarray(rearrange(frames_THWC, "t h w c -> t c h w"))
    num_pairs = len(frames_TCHW) - model.horizon_frames
    for first in range(0, num_pairs, batch_size):
        pairs_B = np.arange(first, min(first + batch_size, num_pairs))
        yield model.predict(np.stack([frames_TCHW[pairs_B], frames_TCHW[pairs_B + model.horizon_frames]], axis=1))


def _require_pairs(model: InverseDynamics, dataset: Dataset, folder: Path) -> None:
    """UserError where the pairs are of another length than the model knows, or there is none."""
    horizon = model.horizon_frames
    seconds = model.config.horizon_seconds
    there = horizon_frames(seconds, dataset.fps)
    if there != horizon:
        raise UserError(
            f"{dataset.root}: {seconds:g} s are {there} frames at {dataset.fps:g} fps, {folder} looks {horizon} frames "
            f"ahead at {model.fps:g} fps; label videos of its rate, or train it on such"
        )
    if not (dataset.lengths > horizon).any():
        raise UserError(
            f"{dataset.root}: all {len(dataset.lengths)} episodes are too short for pairs {horizon} frames apart; "
            "train an inverse dynamics model with a shorter --horizon-seconds"
        )
