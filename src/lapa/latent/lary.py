"""LARYBench's probes of latent actions, on any dataset: regression to chunks of actions, classification of clips.

    lapa latent probe LAM --data DATASET --protocol lary              # a GPU; lary-small: narrow networks, for a CPU

Nie et al. 2026, https://arxiv.org/abs/2604.11689; networks and training as in its code (commit 2092d20), with the
dataset's own split by episode. Controls show leakage: latent actions of other episodes, one frame alone, and the raw
features of both frames, which know the whole state. docs/metrics.md explains the figures.

Axes: B pairs or clips, T time, K steps of a chunk, A action dimensions, P tokens, D width, F features, Y targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from lapa.data.dataset import Dataset
from lapa.data.transforms import resize_and_crop
from lapa.latent.metrics import BATCH, MAX_TASKS, Sample, device_of, encode, hold_out, other_episodes
from lapa.latent.model import LatentAction, LatentActionModel
from lapa.latent.quantizers import NSVQ

SEED = 42
# Below this, a target's standard deviation counts as 1.
SMALLEST_STD = 1e-6
# Cells on a side to which raw features are averaged: twice the numbers of LARYBench's latent actions, not 32 times.
CELLS = 4
CLIP_FRAMES, SHORT_CLIP = 9, 18
SSIM_SIDE, SSIM_WINDOW, STRETCH = 224, 7, 256
# Of the five probes that are trained at once: learning rate and weight decay.
PROBES = ((5e-3, 0.01), (3e-3, 0.1), (1e-3, 0.4), (3e-4, 0.8), (1e-4, 0.01))
TIMES = 128
# Below this share of the error of always the mean action, the first frame tells most of it.
MOST_IS_TOLD = 0.5


@dataclass(frozen=True)
class Sizes:
    """Widths of the two networks, and the length of their training."""

    regression_width: int = 4096
    regression_batch: int = 256
    regression_rate: float = 1e-4
    classifier_width: int = 768
    classifier_heads: int = 16
    classifier_batch: int = 64
    epochs: int = 20


SIZES = {"lary": Sizes(), "lary-small": Sizes(regression_width=512, classifier_width=192, classifier_heads=4)}


def regression_figures(
    model: LatentActionModel,
    sample: Sample,
    encoded: LatentAction,
    chunks_BKA: np.ndarray,
    sizes: Sizes,
    *,
    delta: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean squared errors of the standardised actions between the two frames, on test episodes.

    chunks_BKA: the actions from the first frame up to the second. delta: whether they are moves, not places.
    absolute: of the whole chunk; relative: of its last action minus its first (of the sum of moves), None where that
    never changes. `mean` is the error of always the mean action of the training episodes.
    """
    test_B = hold_out(sample.episodes_B, seed)
    inputs = _inputs(model, sample.frames_BTCHW, encoded)
    inputs["shuffled"] = inputs["quantized"][other_episodes(sample.episodes_B, seed)]
    found: dict[str, Any] = {"num_held_out_episodes": len(np.unique(sample.episodes_B[test_B]))}
    for mode in ("absolute", "relative"):
        targets_BKA = chunks_BKA.astype(np.float64)
        if mode == "relative":
            moved = targets_BKA.sum(1) if delta else targets_BKA[:, -1] - targets_BKA[:, 0]
            targets_BKA = moved[:, None]
        std_A = targets_BKA[~test_B].std((0, 1))
        if not (std_A >= SMALLEST_STD).any():
            found[mode] = None
            continue
        varies_A = np.where(std_A < SMALLEST_STD, 1.0, std_A)
        scaled_BKA = torch.from_numpy((targets_BKA - targets_BKA[~test_B].mean((0, 1))) / varies_A).float()
        found[mode] = {"mean": {"mse": float(scaled_BKA[test_B].square().mean())}} | {
            name: _regress(tokens_BPD.flatten(1), scaled_BKA, torch.from_numpy(test_B), sizes, device_of(model))
            for name, tokens_BPD in inputs.items()
        }
    return found


def classification_figures(
    model: LatentActionModel,
    dataset: Dataset,
    camera: str | None,
    episodes: Sequence[int],
    sizes: Sizes,
    *,
    most: int,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Accuracy with which an attentive probe reads the instruction off the latent actions of a clip, on test episodes.

    Of each episode 9 frames, chosen by motion; `most` episodes at most. A fifth of each instruction's episodes are test
    episodes; instructions of one episode are left out, and only the 50 most frequent are classes. None if that leaves
    fewer than two. accuracy, class_accuracy: of clips, and the mean over classes, of the best of five probes and epochs
    by the test clips themselves, as published; last_accuracy: of the best probe after the last epoch.
    """
    drawn = np.random.default_rng(seed).permutation(np.asarray(episodes))[:most]
    names_B = np.array([dataset.instruction(int(episode)) for episode in drawn])
    names, counts = np.unique(names_B[names_B != ""], return_counts=True)
    frequent = names[np.argsort(-counts, kind="stable")][:MAX_TASKS]
    several = [name for name in frequent if (names_B == name).sum() > 1]
    kept_B = np.isin(names_B, several)
    if len(several) < 2:
        return None
    drawn, names_B = drawn[kept_B], names_B[kept_B]
    test_B = np.zeros(len(drawn), bool)
    for name in several:
        test_B[names_B == name] = hold_out(drawn[names_B == name], seed)
    frames_BTCHW = torch.stack([_clip(model, dataset, int(episode), camera) for episode in drawn])
    pairs = torch.stack([frames_BTCHW[:, :-1], frames_BTCHW[:, 1:]], dim=2).flatten(0, 1)
    inputs = {
        name: rearrange(tokens, "(b t) p d -> b t p d", b=len(drawn))
        for name, tokens in _inputs(model, pairs, encode(model, pairs)).items()
        if name in ("published", "quantized", "continuous", "raw_features")
    }
    inputs["shuffled"] = inputs["quantized"][other_episodes(drawn, seed)]
    first_BPD = _raw(model, frames_BTCHW[:, 0])
    inputs["first_frame"] = repeat(first_BPD, "b p d -> b t p d", t=CLIP_FRAMES - 1)
    labels_B = torch.from_numpy(np.searchsorted(sorted(several), names_B))
    _, frequent = np.unique(names_B[test_B], return_counts=True)
    return {"num_classes": len(several), "num_clips": len(drawn), "chance": float(frequent.max() / frequent.sum())} | {
        name: _classify(tokens_BTPD, labels_B, torch.from_numpy(test_B), sizes, device_of(model))
        for name, tokens_BTPD in inputs.items()
    }


def clip_frames(differences: Sequence[float], length: int) -> list[int]:
    """The 9 frames of a clip of `length`: as much change between each two, of `differences` between neighbours.

    Short clips, and those that never change, evenly. Frames that are chosen twice are replaced by repeating the last.
    """
    total = float(np.sum(differences))
    if length <= SHORT_CLIP or total <= 0:
        chosen = {index * length // CLIP_FRAMES for index in range(CLIP_FRAMES)}
    else:
        share = np.cumsum(differences) / total
        wanted = (np.arange(CLIP_FRAMES) + 0.5) / CLIP_FRAMES
        chosen = {int(np.abs(share - each).argmin()) + 1 for each in wanted}
    ordered = sorted(chosen)
    return ordered + [ordered[-1]] * (CLIP_FRAMES - len(ordered))


def change(first_HW: np.ndarray, second_HW: np.ndarray) -> float:
    """sqrt(1 - SSIM) of two grey images in [0, 255] (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861)."""
    from scipy.ndimage import uniform_filter

    def mean(image_HW: np.ndarray) -> np.ndarray:
        edge = SSIM_WINDOW // 2
        return uniform_filter(image_HW, SSIM_WINDOW)[edge:-edge, edge:-edge]

    x, y = first_HW.astype(np.float64), second_HW.astype(np.float64)
    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_x, mean_y = mean(x), mean(y)
    covariance = unbiased * (mean(x * y) - mean_x * mean_y)
    variances = unbiased * (mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2)
    small, smaller = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + small) * (2 * covariance + smaller)
    return math.sqrt(max(0.0, 1 - float((likeness / ((mean_x**2 + mean_y**2 + small) * (variances + smaller))).mean())))


def _clip(model: LatentActionModel, dataset: Dataset, episode: int, camera: str | None) -> Tensor:
    """The 9 frames of an episode at the model's size, uint8 [T, C, H, W]."""
    length = int(dataset.lengths[episode])
    differences, before = list[float](), None
    for first in range(0, length if length > SHORT_CLIP else 0, STRETCH):
        for frame_HWC in dataset.frames(episode, range(first, min(first + STRETCH, length)), camera):
            grey = np.asarray(Image.fromarray(frame_HWC).convert("L").resize((SSIM_SIDE, SSIM_SIDE)))
            if before is not None:
                differences.append(change(before, grey))
            before = grey
    frames_THWC = dataset.frames(episode, clip_frames(differences, length), camera)
    return torch.from_numpy(resize_and_crop(frames_THWC, model.config.image_size).copy()).permute(0, 3, 1, 2)


def _inputs(model: LatentActionModel, frames_BTCHW: Tensor, encoded: LatentAction) -> dict[str, Tensor]:
    """What is probed, as tokens [B, P, D]: the latent action in its forms, and what frames alone show."""
    first, second = (_raw(model, frames_BTCHW[:, time]) for time in (0, 1))
    published = {}
    if isinstance(getattr(model, "quantizer", None), NSVQ):
        published["published"] = _with_noise(model, encoded.z_BLD)
    return published | {
        "quantized": encoded.quantized_BLD.float(),
        "continuous": encoded.z_BLD.float(),
        "first_frame": first,
        "second_frame": second,
        "raw_features": torch.cat([first, second], dim=1),
    }


@torch.no_grad()
def _with_noise(model: LatentActionModel, z_BLD: Tensor) -> Tensor:
    """The latent action as LARYBench computes it: with the noise of training in place of the quantisation error."""
    noise = torch.randn(z_BLD.shape, generator=torch.Generator().manual_seed(SEED))
    device = device_of(model)
    parts = zip(z_BLD.split(BATCH), noise.split(BATCH), strict=True)
    noisy = [model.quantizer(z.to(device), each.to(device)).quantized_BLD for z, each in parts]
    return torch.cat([model.action_tokens(each).cpu() for each in noisy])


@torch.no_grad()
def _raw(model: LatentActionModel, frames_BCHW: Tensor) -> Tensor:
    """What an image shows without a latent action, averaged in 4 x 4 cells: features of the tower, or 8 x 8 pixels."""
    tower, parts = getattr(model, "tower", None), []
    for frames in frames_BCHW.split(BATCH):
        pixels = frames.to(device_of(model)).float() / 255
        if tower is None:
            small = F.interpolate(pixels, size=2 * CELLS, mode="area")
            cells = rearrange(small, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2)
        else:
            features = rearrange(tower(pixels).float(), "b h w d -> b d h w")
            cells = rearrange(F.adaptive_avg_pool2d(features, CELLS), "b d h w -> b (h w) d")
        parts.append(cells.cpu())
    return torch.cat(parts)


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def _regress(x_BF: Tensor, targets_BKA: Tensor, test_B: Tensor, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Trains the MLP of the benchmark; mse: the lowest on test rows over epochs, as published; last_mse: the last."""
    with _seeded(device):
        width, outputs = sizes.regression_width, targets_BKA[0].numel()
        network = nn.Sequential(
            nn.LayerNorm(x_BF.shape[1]), nn.Linear(x_BF.shape[1], width), nn.ReLU(),
            _Residual(width), _Residual(width), nn.LayerNorm(width), nn.Linear(width, outputs),
        ).to(device)  # fmt: skip
        rate = sizes.regression_rate
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=1e-4)
        train, test = torch.where(~test_B)[0], torch.where(test_B)[0]
        steps = sizes.epochs * math.ceil(len(train) / sizes.regression_batch)
        warm_up = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
        errors, best_YA = list[float](), None
        for _ in range(sizes.epochs):
            network.train()
            for rows in train[torch.randperm(len(train))].split(sizes.regression_batch):
                wanted = targets_BKA[rows].flatten(1).to(device)
                optimizer.zero_grad()
                F.huber_loss(network(x_BF[rows].to(device)), wanted).backward()
                optimizer.step()
                schedule.step()
            network.eval()
            with torch.no_grad():
                predicted = torch.cat([network(x_BF[rows].to(device)).cpu() for rows in test.split(BATCH)])
            error_BKA = (predicted.reshape(-1, *targets_BKA.shape[1:]) - targets_BKA[test]).square()
            errors.append(float(error_BKA.mean()))
            if errors[-1] == min(errors):
                best_YA = error_BKA.mean((0, 1)).tolist()
    return {
        "mse": min(errors),
        "epoch": int(np.argmin(errors)) + 1,
        "last_mse": errors[-1],
        "mse_per_dimension": best_YA,
    }


class Classifier(nn.Module):
    """An attentive probe: three blocks over the tokens of all pairs of a clip, then one query that attends to them."""

    def __init__(self, dim: int, num_classes: int, width: int, heads: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width), nn.GELU())
        self.times = nn.Parameter(torch.zeros(TIMES, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(3)
        )
        self.heads, self.query = heads, nn.Parameter(torch.zeros(1, 1, width))
        self.context_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_query, self.to_keys_values = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.zeros_(module.in_proj_bias)
        with torch.no_grad():
            for number, block in enumerate(cast(Iterable[nn.TransformerEncoderLayer], self.blocks), start=1):
                for layer in (block.self_attn.out_proj, block.linear2):
                    layer.weight.div_(math.sqrt(2 * number))
            cast(nn.Linear, self.mlp[2]).weight.div_(math.sqrt(6))
        self.to_classes = nn.Linear(width, num_classes)

    def forward(self, tokens_BTPD: Tensor) -> Tensor:
        x = self.project(tokens_BTPD) + self.times[: tokens_BTPD.shape[1], None]
        x = rearrange(x, "b t p d -> b (t p) d")
        for block in self.blocks:
            x = block(x)
        query = self.query.expand(len(x), -1, -1)
        projected = (self.to_query(query), *self.to_keys_values(self.context_norm(x)).chunk(2, dim=-1))
        split = [rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in projected]
        query = query + rearrange(F.scaled_dot_product_attention(*split), "b h n d -> b n (h d)")
        return self.to_classes((query + self.mlp(self.norm(query)))[:, 0])


def _classify(
    tokens_BTPD: Tensor, labels_B: Tensor, test_B: Tensor, sizes: Sizes, device: torch.device
) -> dict[str, float]:
    """Trains the five probes on the same batches, classes drawn evenly."""
    num_classes, dim = int(labels_B.max()) + 1, tokens_BTPD.shape[-1]
    train, test = torch.where(~test_B)[0], torch.where(test_B)[0]
    weights = 1.0 / torch.bincount(labels_B[train], minlength=num_classes)[labels_B[train]]
    steps = math.ceil(len(train) / sizes.classifier_batch)
    with _seeded(device):
        probes = [
            Classifier(dim, num_classes, sizes.classifier_width, sizes.classifier_heads).to(device) for _ in PROBES
        ]
        optimizers = [
            torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=decay)
            for probe, (rate, decay) in zip(probes, PROBES, strict=True)
        ]
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps * sizes.epochs) for each in optimizers]
        best: dict[str, float] = {"accuracy": -1.0}
        last = 0.0
        for _ in range(sizes.epochs):
            drawn = train[torch.multinomial(weights, len(train), replacement=True)]
            for rows in drawn.split(sizes.classifier_batch):
                tokens, labels = tokens_BTPD[rows].to(device), labels_B[rows].to(device)
                for probe, optimizer, schedule in zip(probes, optimizers, schedules, strict=True):
                    probe.train()
                    optimizer.zero_grad()
                    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                        scores = probe(tokens)
                    F.cross_entropy(scores.float(), labels, label_smoothing=0.1).backward()
                    optimizer.step()
                    schedule.step()
            right = [_right(probe.eval(), tokens_BTPD[test], labels_B[test], device) for probe in probes]
            last = max(float(each.mean()) for each in right)
            for each in right:
                if float(each.mean()) > best["accuracy"]:
                    classes = [float(each[labels_B[test] == label].mean()) for label in labels_B[test].unique()]
                    best = {"accuracy": float(each.mean()), "class_accuracy": float(np.mean(classes))}
    return {**best, "last_accuracy": last}


@torch.no_grad()
def _right(probe: nn.Module, tokens_BTPD: Tensor, labels_B: Tensor, device: torch.device) -> Tensor:
    guesses = [probe(tokens.to(device)).argmax(-1).cpu() for tokens in tokens_BTPD.split(BATCH)]
    return (torch.cat(guesses) == labels_B).float()


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The published seed, without an effect on what comes after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        yield


def relative_error_over_frames(figures: Mapping[str, Any]) -> float | None:
    """Of what is quantised, the error in relative mode over that of the best guess without a latent action.

    That is: from one of the two frames alone, or always the mean. None where it is not measured, and where the first
    frame tells most of the action, as a scripted robot's does: codes then need not know more than it.
    """
    relative = figures.get("regression", {}).get("relative")
    if relative is None or relative["first_frame"]["mse"] < MOST_IS_TOLD * relative["mean"]["mse"]:
        return None
    without = min(relative[name]["mse"] for name in ("mean", "first_frame", "second_frame"))
    return relative["quantized"]["mse"] / without if without > 0 else None
