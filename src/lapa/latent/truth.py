"""What latent actions say of the true actions and of the instructions, where a dataset has them.

`lapa latent probe` computes these figures; docs/metrics.md says how to read each one. Whatever is fitted is scored on
episodes left out, beside what the mean action and the bare pixels reach.

Axes: B pairs, T time, C channel, H W image, L latent action length, A action dimensions, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lapa.latent.figures import Sample
from lapa.latent.model import LatentAction
from lapa.latent.regression import (
    HELD_OUT,
    equal_frequency_bins,
    fit_ridge,
    hold_out,
    linear_accuracy,
    mlp,
    mutual_information,
    ridge,
    scores,
)

PIXEL_BASELINE_SIDE = 8
MAX_TASKS = 50
ACTION_BINS = 8


def action_figures(
    sample: Sample, encoded: LatentAction, codebook_size: int, seed: int = 0, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Linear (ridge) and MLP probes to the mean true action, scored on held-out episodes; see regression.scores.

    From the codes (one-hot), the quantised latent action, the continuous one and, as a yardstick, the difference of
    the two frames at 8x8 pixels; mean_action: from nothing. lp_mse (CoMo, https://arxiv.org/abs/2505.17006): the
    linear probe's error from the continuous latent action, actions brought to unit variance.
    """
    assert sample.actions_BA is not None
    actions_BA, episodes_B = sample.actions_BA.astype(np.float64), sample.episodes_B
    test_B = hold_out(episodes_B, seed)
    features = features_of(sample, encoded, codebook_size)
    mean_BA = np.broadcast_to(actions_BA[~test_B].mean(0), actions_BA.shape)
    linear = {
        name: scores(ridge(values, actions_BA, test_B, episodes_B), actions_BA, test_B)
        for name, values in features.items()
        if name != "first_frame"
    }
    nonlinear = {
        name: scores(mlp(features[name], actions_BA, test_B, episodes_B, seed, device), actions_BA, test_B)
        for name in ("quantized", "continuous", "pixel_difference")
    }
    return {
        "num_held_out_episodes": len(np.unique(episodes_B[test_B])),
        "lp_mse": linear["continuous"]["standardised_mse"],
        "mean_action": scores(mean_BA, actions_BA, test_B),
        "linear": linear,
        "mlp": nonlinear,
    }


def returned_action_r2(sample: Sample, encoded: LatentAction, returned: LatentAction, seed: int = 0) -> float | None:
    """Whether the linear probe reads the same action after a transfer: R2 of its readings, on held-out episodes.

    returned: the latent actions encoded again (figures.transfer). 1: the same; 0 or less: no better than the mean
    reading, which is None where the probe reads the same from every pair.
    """
    assert sample.actions_BA is not None
    test_B = hold_out(sample.episodes_B, seed)
    given_BF, returned_BF = (latent.quantized_BLD.flatten(1).double().numpy() for latent in (encoded, returned))
    probe = fit_ridge(given_BF[~test_B], sample.actions_BA[~test_B], sample.episodes_B[~test_B])
    reading_BA = probe(given_BF)
    # A dimension of which the probe reads next to nothing would divide by next to nothing.
    told_A = reading_BA[test_B].var(0) > 0.01 * sample.actions_BA[test_B].var(0)
    if not told_A.any():
        return None
    return float(scores(probe(returned_BF)[:, told_A], reading_BA[:, told_A], test_B)["r2"])


def information_figures(codes_BL: Tensor, actions_BA: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mutual information of each code, and of the whole latent action, with each binned action dimension.

    Bins of equal frequency, 8 for each dimension; each entry as regression.mutual_information gives it. known: mean
    over dimensions of the best position's share; known_joint: the same of whole latent actions.
    """
    codes_BL_numpy = codes_BL.numpy()
    _, joint_B = np.unique(codes_BL_numpy, axis=0, return_inverse=True)
    bins = [equal_frequency_bins(values_B, ACTION_BINS) for values_B in actions_BA.T]
    positions = [[mutual_information(codes_B, bins_B, seed=seed) for bins_B in bins] for codes_B in codes_BL_numpy.T]
    joint = [mutual_information(joint_B.reshape(-1), bins_B, seed=seed) for bins_B in bins]
    best = [_largest([position[number]["known"] for position in positions]) for number in range(len(bins))]
    return {
        "known": _mean(best),
        "known_joint": _mean([entry["known"] for entry in joint]),
        "positions": positions,
        "joint": joint,
    }


def task_figures(sample: Sample, encoded: LatentAction, codebook_size: int, seed: int = 0) -> dict[str, Any] | None:
    """Accuracy of a logistic regression from the latent action to the instruction, on held-out episodes.

    A fifth of each instruction's episodes is held out; those of one episode are left out, and only the 50 with most
    pairs are told apart. None where that leaves fewer than two. chance: the share of the most frequent instruction.
    first_frame: from the first frame at 8x8 pixels, what the scene alone tells.
    """
    assert sample.tasks_B is not None
    tasks_B, episodes_B = sample.tasks_B, sample.episodes_B
    names, counts = np.unique(tasks_B[tasks_B != ""], return_counts=True)
    several = [
        name for name in names[np.argsort(-counts, kind="stable")] if len(np.unique(episodes_B[tasks_B == name])) > 1
    ][:MAX_TASKS]
    if len(several) < 2:
        return None
    kept_B, test_B = np.isin(tasks_B, several), np.zeros(len(tasks_B), bool)
    for name in several:
        test_B[tasks_B == name] = hold_out(episodes_B[tasks_B == name], seed, HELD_OUT)
    labels_B = np.searchsorted(names, tasks_B[kept_B])
    _, frequent = np.unique(labels_B[test_B[kept_B]], return_counts=True)
    accuracy = {
        name: linear_accuracy(values[kept_B], labels_B, test_B[kept_B])
        for name, values in features_of(sample, encoded, codebook_size).items()
    }
    return {"num_tasks": len(several), "chance": float(frequent.max() / frequent.sum()), **accuracy}


def features_of(sample: Sample, encoded: LatentAction, codebook_size: int) -> dict[str, np.ndarray]:
    """What the probes read, each [B, F]: the latent action in its forms, and pixels as yardsticks."""
    features = {
        "quantized": encoded.quantized_BLD,
        "continuous": encoded.z_BLD,
        "pixel_difference": _small(sample.frames_BTCHW[:, 1]) - _small(sample.frames_BTCHW[:, 0]),
        "first_frame": _small(sample.frames_BTCHW[:, 0]),
    }
    if encoded.codes_BL is not None:
        features = {"codes": F.one_hot(encoded.codes_BL, codebook_size), **features}
    return {name: rearrange(values, "b ... -> b (...)").double().numpy() for name, values in features.items()}


def _small(frame_BCHW: Tensor) -> Tensor:
    parts = [F.interpolate(part.float() / 255, size=PIXEL_BASELINE_SIDE, mode="area") for part in frame_BCHW.split(64)]
    return torch.cat(parts)


def _largest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
