"""Labels videos with the actions that an inverse dynamics model predicts (VPT, https://arxiv.org/abs/2206.11795).

    lapa baseline pseudo-label --inverse INVERSE --data VIDEOS --out DATASET
    lapa policy finetune --from-scratch --data DATASET --out POLICY

Every pair of frames one horizon apart gives all actions between them, so most steps are predicted several times: their
weighted mean counts, in a binary dimension the majority. The last frame repeats the action before it, whose effect is
not in the video. An episode too short for a pair is left out.

Axes: T time, P pairs of an episode, C channel, H W image, K steps between the frames of a pair, A action dimensions.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import Float

from lapa import config as configs
from lapa.baselines.config import PseudoLabelConfig
from lapa.baselines.inverse import InverseDynamics, inverse_fingerprint
from lapa.console import finish, progress, say
from lapa.data.dataset import Dataset
from lapa.data.episode_decoders import window_frames
from lapa.data.lerobot import require_folder
from lapa.data.metadata import EXTRA, INFO
from lapa.data.pairs import horizon_frames
from lapa.data.replace_actions import claim_rewrite, rewrite_actions
from lapa.data.spec import open_dataset
from lapa.engine.distributed import pick_device
from lapa.errors import UserError
from lapa.locks import locks_output
from lapa.policy.actions import ActionScale

# Pairs in one forward pass.
BATCH = 128


@locks_output
def run(config: PseudoLabelConfig) -> None:
    """`lapa baseline pseudo-label`. Raises UserError on bad input, or where no episode is long enough for a pair."""
    next_commands = [f"lapa policy finetune --from-scratch --data {shlex.quote(str(config.out))} --out POLICY"]
    model, dataset = InverseDynamics.from_pretrained(config.inverse), require_folder(open_dataset(config.data))
    only = dataset.cameras[0] if len(dataset.cameras) == 1 else None
    camera = config.camera or only or model.recording.camera
    if camera not in dataset.cameras:
        raise UserError(
            f"{dataset.root}: has no camera {camera!r}, which {config.inverse} learned from; "
            f"choose one of its own with --camera ({', '.join(dataset.cameras)})"
        )
    note = {
        "made_by": "lapa baseline pseudo-label",
        "inverse_fingerprint": inverse_fingerprint(config.inverse),
        "source_fingerprint": dataset.fingerprint,
        "camera": camera,
    }
    if config.resume and not config.overwrite and (config.out / INFO).exists():
        configs.require_same(config.out / EXTRA, note)
        finish("dataset with pseudo-labels, already complete", config.out, next_commands)
        return
    _require_pairs(model, dataset, config.inverse)
    claim_rewrite(
        config.out, [dataset], note, overwrite=config.overwrite, resume=config.resume, inputs=[config.inverse]
    )
    device = pick_device(config.device)
    say(
        f"labelling {dataset.num_frames} frames of {dataset.name} on {device}, "
        f"from pairs {model.horizon_frames} frames apart"
    )
    actions = pseudo_actions(model.to(device), dataset, camera)
    written = rewrite_actions(
        dataset,
        config.out,
        actions=actions.get,
        action_space=model.recording.action_space,
        keep_states=False,
        note=note,
    )
    finish(f"{len(written.lengths)} episodes with pseudo-labels", config.out, next_commands)


def pseudo_actions(
    model: InverseDynamics, dataset: Dataset, camera: str, batch_size: int = BATCH
) -> dict[int, np.ndarray]:
    """Returns the actions [T, A] of every episode that is long enough for a pair, float32, in the robot's units."""
    horizon = model.horizon_frames
    episodes = [int(episode) for episode in np.flatnonzero(dataset.lengths > horizon)]
    windows = window_frames(dataset, episodes, horizon, camera, model.config.image_size)
    actions: dict[int, np.ndarray] = {}
    started, num_frames = time.monotonic(), 0
    with progress() as bar:
        task = bar.add_task("labelling", total=len(episodes), note="")
        for episode, of_episode in groupby(windows, key=itemgetter(0)):
            predicted = [part for _, frames in of_episode for part in _predictions(model, frames, batch_size)]
            actions[episode] = merge_pairs(np.concatenate(predicted), model.scale)
            num_frames += int(dataset.lengths[episode])
            bar.update(task, advance=1, note=f"{num_frames / (time.monotonic() - started):.0f} frames/s")
    return actions


def merge_pairs(predicted_PKA: Float[np.ndarray, "P K A"], scale: ActionScale) -> Float[np.ndarray, "T A"]:
    """Merges the predictions for the pairs (p, p + K) of an episode into one action a frame, T = P + K.

    The mean over all pairs that span a step, the majority in a binary dimension; a pair weighs the more the nearer the
    step is to its middle, where its predictions are best. The last frame repeats the action before it.
    """
    num_pairs, horizon, action_dim = predicted_PKA.shape
    weights_K = np.minimum(np.arange(horizon), np.arange(horizon)[::-1]) + 1
    sums_TA, weights_T1 = np.zeros((num_pairs + horizon, action_dim)), np.zeros((num_pairs + horizon, 1))
    for step in range(horizon):
        sums_TA[step : step + num_pairs] += weights_K[step] * predicted_PKA[:, step]
        weights_T1[step : step + num_pairs] += weights_K[step]
    sums_TA[-1], weights_T1[-1] = sums_TA[-2], weights_T1[-2]
    means_TA = (sums_TA / weights_T1).astype(np.float32)
    # The scale rounds a binary dimension to the nearer of its two values.
    return np.where(scale.binary_A, scale.decode(scale.encode(means_TA)), means_TA)


def _predictions(model: InverseDynamics, frames_THWC: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """The predictions for all pairs in consecutive frames, batch by batch."""
    frames_TCHW = np.ascontiguousarray(rearrange(frames_THWC, "t h w c -> t c h w"))
    num_pairs = len(frames_TCHW) - model.horizon_frames
    for first in range(0, num_pairs, batch_size):
        pairs_B = np.arange(first, min(first + batch_size, num_pairs))
        yield model.predict(np.stack([frames_TCHW[pairs_B], frames_TCHW[pairs_B + model.horizon_frames]], axis=1))


def _require_pairs(model: InverseDynamics, dataset: Dataset, folder: Path) -> None:
    """Raises UserError where the horizon is another number of frames than the model learned, or no episode spans it."""
    horizon = model.horizon_frames
    seconds = model.config.horizon_seconds
    there = horizon_frames(seconds, dataset.fps)
    if there != horizon:
        raise UserError(
            f"{dataset.root}: {seconds:g} s are {there} frames at {dataset.fps:g} fps, but {horizon} at the "
            f"{model.recording.fps:g} fps of {folder}; label videos of that rate, or train a model on this one"
        )
    if not (dataset.lengths > horizon).any():
        raise UserError(
            f"{dataset.root}: all {len(dataset.lengths)} episodes are too short for pairs {horizon} frames apart; "
            "train an inverse dynamics model with a shorter --horizon-seconds"
        )
