"""What a latent action model does, in figures: reconstruction, code usage, transfer, consistency in time.

`lapa latent probe` and `lapa latent train` compute them; docs/metrics.md says how to read each one. Everything is
measured on a Sample that is encoded once, in the space the decoder predicts: pixels in [0, 1], or vision features.

    sample = draw_sample(pairs, 4000, seed=0); codes_BL, errors = reconstruction_figures(model, sample)

Axes: B pairs, T time, C channel, H W image, L latent action length, D width, K codebook size, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lapa.data.pairs import FramePairs, collate_pairs
from lapa.latent.model import LatentAction, LatentActionModel

BATCH = 64
RARE_CODE = 0.01
MOVING = 0.05  # change of any channel, in [0, 1], from which a pixel counts as moving


@dataclass(frozen=True)
class Sample:
    """Pairs drawn from a dataset: frames uint8 [B, 2, C, H, W], where each comes from, and what is known of it.

    actions_BA: the mean of the actions between the two frames, in the robot's own units. tasks_B: the instructions.
    middle_BCHW: the frame halfway between the two, uint8.
    """

    frames_BTCHW: Tensor
    episodes_B: np.ndarray
    actions_BA: np.ndarray | None = None
    middle_BCHW: Tensor | None = None
    tasks_B: np.ndarray | None = None


def draw_sample(pairs: FramePairs, num: int, seed: int, *, actions: bool = False) -> Sample:
    """Up to `num` different pairs, drawn evenly. actions: with true action and instruction, where the dataset has them.

    The middle frames come along where the pairs have them (PairsConfig.middle).
    """
    return take_sample(pairs, np.random.default_rng(seed).permutation(len(pairs))[:num].tolist(), actions=actions)


def take_sample(pairs: FramePairs, indices: Sequence[int], *, actions: bool = False) -> Sample:
    """The pairs of these indices, in this order."""
    # Read in the order of the files, where neighbours share a video that is open already.
    in_order = sorted(enumerate(indices), key=lambda draw: draw[1])
    drawn = {number: pairs[(index, number)] for number, index in in_order}
    items = [drawn[number] for number in range(len(indices))]
    episodes_B = np.array([item["episode"] for item in items])
    frames_BTCHW = collate_pairs(items)["frames_BTCHW"]
    has_middle = "middle_CHW" in items[0]
    middle_BCHW = torch.from_numpy(np.stack([item["middle_CHW"] for item in items])) if has_middle else None
    if not actions:
        return Sample(frames_BTCHW, episodes_B, middle_BCHW=middle_BCHW)
    places = [pairs.location(index) for index in indices]
    tasks_B = np.array([pairs.datasets[number].episodes[episode].instruction for number, episode, _ in places])
    known = all(dataset.action_dim is not None for dataset in pairs.datasets)
    actions_BA = np.stack([pairs.actions_between(index).mean(axis=0) for index in indices]) if known else None
    return Sample(frames_BTCHW, episodes_B, actions_BA, middle_BCHW, tasks_B)


@torch.no_grad()
def encode(model: LatentActionModel, frames_BTCHW: Tensor) -> LatentAction:
    """The latent actions of many pairs, encoded in batches; on the CPU, in float32."""
    device = device_of(model)
    return _joined([model.encode(frames.to(device)) for frames in frames_BTCHW.split(BATCH)])


def other_episodes(episodes_B: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each pair the index of one of another episode; each pair is chosen once.

    Where one episode holds more than half of the pairs, some get a partner of their own episode.
    """
    rng = np.random.default_rng(seed)
    _, group_B, sizes = np.unique(episodes_B, return_inverse=True, return_counts=True)
    shuffled_B = rng.permutation(len(sizes))[group_B]
    order = np.lexsort((rng.random(len(episodes_B)), shuffled_B))
    # Sorted by episode, a shift by the longest run leaves every run behind.
    partners_B = np.empty_like(order)
    partners_B[order] = np.roll(order, -min(int(sizes.max()), max(1, len(order) // 2)))
    return partners_B


@torch.no_grad()
def reconstruction_figures(
    model: LatentActionModel, sample: Sample, encoded: LatentAction | None = None
) -> tuple[Tensor | None, dict[str, float]]:
    """Codes [B, L] (None for a continuous model), and mean squared errors of the predicted second frame.

    mse: predicted from the pair's own latent action. mse_shuffled: from that of a pair of another episode. mse_copy:
    the first frame itself. mse_mean: the mean second frame. A model that ignores its codes has mse_shuffled = mse.
    moving_*: the same on moving pixels only, those that change by more than 0.05 in any channel (for features: patches
    that hold such a pixel); 0 where none does. moving_share: their share.
    Pixel predictions are clamped to [0, 1]; a model that predicts no pixels is measured on its target features.
    """
    device, encoded = device_of(model), encoded or encode(model, sample.frames_BTCHW)
    partners = torch.from_numpy(other_episodes(sample.episodes_B))
    totals: dict[str, float] = {}
    spread, moving_spread, num_moving, num_values = _Spread(), _Spread(), 0.0, 0
    for rows in torch.arange(len(partners)).split(BATCH):
        first, second = sample.frames_BTCHW[rows].to(device).unbind(1)
        target = model.target(second).float()
        moving = _moving(first, second, target)
        predictions = {
            "": _predict(model, first, encoded.quantized_BLD[rows].to(device)),
            "_shuffled": _predict(model, first, encoded.quantized_BLD[partners[rows]].to(device)),
            "_copy": model.target(first).float(),
        }
        for name, prediction in predictions.items():
            error = (prediction - target).square()
            totals[f"mse{name}"] = totals.get(f"mse{name}", 0.0) + error.sum().item()
            totals[f"moving_mse{name}"] = totals.get(f"moving_mse{name}", 0.0) + (error * moving).sum().item()
        spread.add(target, torch.ones_like(moving))
        moving_spread.add(target, moving)
        num_moving += moving.expand_as(target).sum().item()
        num_values += target.numel()
    mean = spread.mean()
    totals["mse_mean"], totals["moving_mse_mean"] = spread.around(mean), moving_spread.around(mean)
    errors = {
        name: total / (max(num_moving, 1.0) if name.startswith("moving") else num_values)
        for name, total in totals.items()
    }
    return encoded.codes_BL, {**errors, "moving_share": num_moving / num_values}


def usage_figures(codes_BL: Tensor, codebook_size: int) -> dict[str, Any]:
    """How the codebook is used.

    codes_used: share of the K codes that some position uses in more than 1% of the pairs (with more than 10 codes, in
    more than a tenth of an even share). perplexity: exp of the entropy of a position's codes, mean over positions (K
    at best). joint_*: over whole latent actions.
    """
    counts_LK = torch.stack([torch.bincount(codes, minlength=codebook_size) for codes in codes_BL.T]).double()
    share_LK = counts_LK / counts_LK.sum(dim=1, keepdim=True)
    rare = min(RARE_CODE, 0.1 / codebook_size)
    _, joint = torch.unique(codes_BL, dim=0, return_counts=True)
    joint_share = joint.double() / joint.sum()
    return {
        "codes_used": float((share_LK.amax(dim=0) > rare).double().mean()),
        "perplexity": float(_perplexity(share_LK).mean()),
        "joint_codes_used": float(len(joint)),
        "joint_perplexity": float(_perplexity(joint_share)),
        "perplexity_per_position": _perplexity(share_LK).tolist(),
        "codes_used_per_position": (share_LK > rare).double().mean(dim=1).tolist(),
        "share_per_position": share_LK.tolist(),
    }


@torch.no_grad()
def transfer(model: LatentActionModel, sample: Sample, encoded: LatentAction) -> tuple[dict[str, Any], LatentAction]:
    """Each pair's latent action applied to the first frame of a pair of another episode, and encoded again.

    same_code: how often the same code returns, mean over positions; same_code_chance: how often it is that of a third
    pair; both also per position, and only for a model with codes. latent_error: squared distance of the returned
    quantised latent action to the one given, over its distance to that of a third pair (0: it returns; 1: chance).
    donor_share: where the result lies between the receiver's first frame (0) and the donor's second (1): squared
    distance to the former over the sum of both. Near 1, the latent action carries the frame and not the motion.
    Also returns the latent actions encoded again. The model must predict pixels.
    """
    device, num = device_of(model), len(sample.episodes_B)
    receivers = torch.from_numpy(other_episodes(sample.episodes_B, seed=1))
    third = torch.from_numpy(other_episodes(sample.episodes_B, seed=2))
    again, to_receiver, to_donor = [], 0.0, 0.0
    for rows in torch.arange(num).split(BATCH):
        first = sample.frames_BTCHW[receivers[rows], 0].to(device)
        result = (_predict(model, first, encoded.quantized_BLD[rows].to(device)) * 255).round().byte()
        again.append(encode(model, torch.stack([first, result], dim=1)))
        donor = sample.frames_BTCHW[rows, 1].to(device)
        to_receiver += F.mse_loss(result.float(), first.float()).item() * len(rows)
        to_donor += F.mse_loss(result.float(), donor.float()).item() * len(rows)
    returned = _joined(again)
    given = encoded.quantized_BLD
    figures: dict[str, Any] = {
        "donor_share": _ratio(to_receiver, to_receiver + to_donor),
        "latent_error": _ratio(
            (returned.quantized_BLD - given).square().sum(), (returned.quantized_BLD - given[third]).square().sum()
        ),
    }
    if returned.codes_BL is not None and encoded.codes_BL is not None:
        for name, codes_BL in (("same_code", encoded.codes_BL), ("same_code_chance", encoded.codes_BL[third])):
            same_L = (returned.codes_BL == codes_BL).double().mean(dim=0)
            figures |= {name: float(same_L.mean()), f"{name}_per_position": same_L.tolist()}
    return figures, returned


@torch.no_grad()
def consistency_figures(model: LatentActionModel, sample: Sample, encoded: LatentAction) -> dict[str, float | None]:
    """How the continuous latent action z behaves in time, for frames a and c, and b halfway between them.

    reversal_error: |z(a,c) + z(c,a)|^2 / |z(a,c)|^2, ratio of the means; 0 where going back is minus going there.
    reversal_cosine: cosine of z(a,c) and z(c,a), mean. offset_share: |mean z|^2 / mean |z|^2, the part of z that is
    the same for every pair. With middle frames also composition_error, |z(a,c) - z(a,b) - z(b,c)|^2 / |z(a,c)|^2, and
    s_pcfc (CoMo, https://arxiv.org/abs/2505.17006): cosine of z(a,b) and z(c,b), past and future to current.
    """
    whole, frames = encoded.z_BLD.flatten(1), sample.frames_BTCHW
    length = whole.square().sum()
    back = encode(model, frames.flip(1)).z_BLD.flatten(1)
    figures: dict[str, float | None] = {
        "reversal_error": _ratio((whole + back).square().sum(), length),
        "reversal_cosine": float(F.cosine_similarity(whole, back).mean()),
        "offset_share": _ratio(len(whole) * whole.mean(dim=0).square().sum(), length),
    }
    if sample.middle_BCHW is not None:
        middle = sample.middle_BCHW
        to_middle, from_middle, future = (
            encode(model, torch.stack(pair, dim=1)).z_BLD.flatten(1)
            for pair in ((frames[:, 0], middle), (middle, frames[:, 1]), (frames[:, 1], middle))
        )
        figures["composition_error"] = _ratio((whole - to_middle - from_middle).square().sum(), length)
        figures["s_pcfc"] = float(F.cosine_similarity(to_middle, future).mean())
    return figures


def device_of(model: LatentActionModel) -> torch.device:
    return next(model.parameters()).device


def _joined(latents: Sequence[LatentAction]) -> LatentAction:
    codes = [latent.codes_BL.cpu() for latent in latents if latent.codes_BL is not None]
    return LatentAction(
        torch.cat(codes) if codes else None,
        torch.cat([latent.z_BLD.float().cpu() for latent in latents]),
        torch.cat([latent.quantized_BLD.float().cpu() for latent in latents]),
    )


class _Spread:
    """Sums from which the squared error of a mean frame follows once it is known."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, target: Tensor, weight: Tensor) -> None:
        values = target.double()
        sums = torch.stack([(weight * values**power).sum(dim=0) for power in (0, 1, 2)])
        self.sums = sums if self.sums is None else self.sums + sums

    def mean(self) -> Tensor:
        assert self.sums is not None
        return self.sums[1] / self.sums[0]

    def around(self, mean: Tensor) -> float:
        assert self.sums is not None
        return float((self.sums[2] - 2 * mean * self.sums[1] + mean.square() * self.sums[0]).sum())


def _moving(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """1 where the target's place holds a pixel that changes, else 0: [B, 1, h, w]."""
    changed = (second.float() - first.float()).abs().amax(dim=1, keepdim=True) > MOVING * 255
    return F.adaptive_max_pool2d(changed.float(), target.shape[-2:])


def _predict(model: LatentActionModel, first: Tensor, quantized_BLD: Tensor) -> Tensor:
    prediction = model.predict(first, quantized_BLD).float()
    return prediction.clamp(0, 1) if model.predicts_pixels else prediction


def _ratio(numerator: Tensor | float, denominator: Tensor | float) -> float | None:
    """None where there is nothing to compare with, as with latents that are all the same."""
    return float(numerator) / float(denominator) if float(denominator) > 0 else None


def _perplexity(share: Tensor) -> Tensor:
    return torch.special.entr(share).sum(dim=-1).exp()
