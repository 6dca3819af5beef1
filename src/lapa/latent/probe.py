"""What a latent action model has learned, measured without a robot.

lapa latent probe LAM --data DATASET

Writes probe.json and grid.png, and prints the table: is the codebook used, does the decoder read the codes, and
(where the dataset has actions) can the true action be read off them. `docs/metrics.md` says how to read each figure.
Axes: B pairs, T time, C channel, H W image, L latent action length, D width, A action dimensions, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image, ImageDraw
from rich.table import Table
from torch import Tensor

from lapa import config as configs
from lapa.console import console, finish, say
from lapa.data.dataset import Dataset
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs
from lapa.engine.distributed import pick_device
from lapa.engine.metrics import versions_and_hardware
from lapa.files import atomic_path, claim_output, write_json
from lapa.latent.model import LatentActionModel

RARE_CODE = 0.01
RIDGE = 1e-3  # on standardised features, a share of the number of rows
PIXEL_BASELINE_SIDE = 8


@dataclass(frozen=True)
class ProbeConfig:
    """Measure a latent action model on a dataset."""

    lam: tyro.conf.Positional[Path]
    """Folder of the latent action model, or its id on the hub."""
    data: Path
    """Dataset to measure on. Where it has actions, a linear probe to them is fitted."""
    out: Path | None = None
    """Folder of the results; by default LAM/probe_DATASET, or probe_DATASET for a model from the hub."""
    num_pairs: int = 4000
    """Pairs drawn from the dataset."""
    num_rows: int = 6
    """Pairs shown in the picture."""
    camera: str | None = None
    """Which camera's pictures; by default the dataset's first."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    overwrite: bool = False
    """Replace what `out` holds."""


@dataclass(frozen=True)
class Sample:
    """Pairs drawn from a dataset: frames uint8 [B, 2, C, H, W], where each comes from, and its true action if known.

    actions_BA: the mean of the actions between the two frames, in the robot's own units.
    """

    frames_BTCHW: Tensor
    episodes_B: np.ndarray
    actions_BA: np.ndarray | None = None


def run(config: ProbeConfig) -> None:
    """`lapa latent probe`. Raises ValueError on bad input."""
    model = LatentActionModel.from_pretrained(config.lam).to(pick_device(config.device)).eval()
    dataset = Dataset.open(config.data)
    # A model from the hub has no folder here to write into.
    out = config.out or (config.lam if config.lam.is_dir() else Path()) / f"probe_{dataset.name}"
    inputs = [config.lam, config.data]
    claim_output(out, complete=(out / "probe.json").exists(), overwrite=config.overwrite, inputs=inputs)
    pairs = PairsConfig(size=model.config.image_size, horizon=model.horizon, camera=config.camera, held_out=0.0)
    sample = draw_sample(FramePairs([dataset], pairs, split="all"), config.num_pairs, config.seed, actions=True)
    say(f"{len(sample.frames_BTCHW)} pairs, {model.horizon:g} s apart, of {dataset.name}")
    figures = probe(model, sample, seed=config.seed)
    _print(figures)
    with atomic_path(out / "grid.png") as path:
        code_grid(model, sample.frames_BTCHW[: config.num_rows]).save(path)
    write_json(out / "probe.json", {**figures, "config": configs.to_dict(config), **versions_and_hardware()})
    finish("probe.json and grid.png", out, [f"lapa label --lam {config.lam} --data {config.data}"])


def draw_sample(pairs: FramePairs, num: int, seed: int, *, actions: bool = False) -> Sample:
    """Up to `num` different pairs, drawn evenly. actions: with the mean true action of each, if the dataset has any."""
    chosen = np.random.default_rng(seed).permutation(len(pairs))[:num]
    items = [pairs[(int(index), number)] for number, index in enumerate(chosen)]
    episodes_B = np.array([item["episode"] for item in items])
    frames_BTCHW = collate_pairs(items)["frames_BTCHW"]
    if not actions or any(dataset.action_dim is None for dataset in pairs.datasets):
        return Sample(frames_BTCHW, episodes_B)
    actions_BA = np.stack([pairs.actions_between(int(index)).mean(axis=0) for index in chosen])
    return Sample(frames_BTCHW, episodes_B, actions_BA)


def probe(model: LatentActionModel, sample: Sample, seed: int = 0) -> dict[str, Any]:
    """All figures of a model on a sample. Linear probes are split by episode, so that they cannot know the scene."""
    codes_BL, errors = reconstruction_figures(model, sample)
    figures: dict[str, Any] = {
        "num_pairs": len(codes_BL),
        "usage": usage_figures(codes_BL, model.config.codebook_size),
        "reconstruction": errors,
    }
    if sample.actions_BA is not None and len(np.unique(sample.episodes_B)) > 1:
        figures["linear_probe"] = linear_probes(model, sample, seed)
    return figures


@torch.no_grad()
def reconstruction_figures(
    model: LatentActionModel, sample: Sample, batch_size: int = 64
) -> tuple[Tensor, dict[str, float]]:
    """Codes [B, L], and mean squared errors of the second frame, pixels in [0, 1].

    mse: predicted from the pair's own codes. mse_shuffled: from another pair's codes. mse_copy: the first frame
    itself. mse_mean: the mean second frame. A model that ignores its codes has mse_shuffled = mse.
    """
    device = next(model.parameters()).device
    batches = sample.frames_BTCHW.split(batch_size)
    codes_BL = torch.cat([model.codes(frames.to(device)).cpu() for frames in batches])
    shift = max(1, len(codes_BL) // 2)
    shuffled = codes_BL.roll(shift, dims=0).split(batch_size)
    mean_CHW = sample.frames_BTCHW[:, 1].float().mean(0) / 255
    totals = dict.fromkeys(("mse", "mse_shuffled", "mse_copy", "mse_mean"), 0.0)
    for frames, own, other in zip(batches, codes_BL.split(batch_size), shuffled, strict=True):
        frames_BTCHW = frames.to(device)
        target = frames_BTCHW[:, 1].float() / 255
        predictions = {
            "mse": model.reconstruct(frames_BTCHW, own.to(device)).float().clamp(0, 1),
            "mse_shuffled": model.reconstruct(frames_BTCHW, other.to(device)).float().clamp(0, 1),
            "mse_copy": frames_BTCHW[:, 0].float() / 255,
            "mse_mean": mean_CHW.to(device).expand_as(target),
        }
        for name, prediction in predictions.items():
            totals[name] += F.mse_loss(prediction, target).item() * len(frames)
    return codes_BL, {name: total / len(codes_BL) for name, total in totals.items()}


def usage_figures(codes_BL: Tensor, codebook_size: int) -> dict[str, Any]:
    """How the codebook is used.

    codes_used: share of the K codes that some position uses in more than 1% of the pairs. perplexity: exp of the
    entropy of a position's codes, mean over positions (K at best). joint_*: over whole latent actions.
    """
    counts_LK = torch.stack([torch.bincount(codes, minlength=codebook_size) for codes in codes_BL.T]).double()
    share_LK = counts_LK / counts_LK.sum(dim=1, keepdim=True)
    _, joint = torch.unique(codes_BL, dim=0, return_counts=True)
    joint_share = joint.double() / joint.sum()
    return {
        "codes_used": float((share_LK.amax(dim=0) > RARE_CODE).double().mean()),
        "perplexity": float(_perplexity(share_LK).mean()),
        "joint_codes_used": float(len(joint)),
        "joint_perplexity": float(_perplexity(joint_share)),
        "perplexity_per_position": _perplexity(share_LK).tolist(),
        "share_per_position": share_LK.tolist(),
    }


@torch.no_grad()
def linear_probes(model: LatentActionModel, sample: Sample, seed: int) -> dict[str, Any]:
    """Ridge regressions to the mean true action: R2 on held-out episodes, per dimension and their mean.

    From the quantised and the continuous latent action, and as a yardstick from the two frames' pixel difference.
    0 is as good as the mean action of the training episodes; None marks a dimension that never changes.
    """
    assert sample.actions_BA is not None
    device = next(model.parameters()).device
    latents = [model.encode(frames.to(device)) for frames in sample.frames_BTCHW.split(64)]
    small = [_small_difference(frames) for frames in sample.frames_BTCHW.split(64)]
    features = {
        "codes": F.one_hot(torch.cat([latent.codes_BL for latent in latents]), model.config.codebook_size),
        "quantized": torch.cat([latent.quantized_BLD for latent in latents]),
        "continuous": torch.cat([latent.z_BLD for latent in latents]),
        "pixel_difference": torch.cat(small),
    }
    episodes = np.unique(sample.episodes_B)
    held_out = np.random.default_rng(seed).permutation(episodes)[: max(1, len(episodes) // 5)]
    test_B = np.isin(sample.episodes_B, held_out)
    results: dict[str, Any] = {"num_held_out_episodes": len(held_out)}
    for name, values in features.items():
        features_BF = values.float().cpu().flatten(1).double().numpy()
        r2_A = ridge_r2(features_BF, sample.actions_BA.astype(np.float64), test_B)
        moving_A = r2_A[~np.isnan(r2_A)]
        results[name] = {
            "r2": float(moving_A.mean()) if len(moving_A) else 0.0,
            "r2_per_dimension": [None if np.isnan(r2) else r2 for r2 in r2_A.tolist()],
        }
    return results


def ridge_r2(features_BF: np.ndarray, targets_BA: np.ndarray, test_B: np.ndarray) -> np.ndarray:
    """R2 [A] on the test rows, of a ridge regression fitted on the others; NaN where the target never changes."""
    train_B = ~test_B
    mean_F, std_F = features_BF[train_B].mean(0), features_BF[train_B].std(0)
    x_BF = (features_BF - mean_F) / np.where(std_F > 1e-8, std_F, 1.0)
    mean_A = targets_BA[train_B].mean(0)
    y_BA = targets_BA - mean_A
    penalty = RIDGE * train_B.sum() * np.eye(x_BF.shape[1])
    weights_FA = np.linalg.solve(x_BF[train_B].T @ x_BF[train_B] + penalty, x_BF[train_B].T @ y_BA[train_B])
    residual_A = ((y_BA[test_B] - x_BF[test_B] @ weights_FA) ** 2).sum(0)
    total_A = (y_BA[test_B] ** 2).sum(0)
    varies_A = total_A > 1e-12
    return np.where(varies_A, 1 - residual_A / np.where(varies_A, total_A, 1.0), np.nan)


@torch.no_grad()
def code_grid(model: LatentActionModel, frames_BTCHW: Tensor) -> Image.Image:
    """A picture, one row a pair: first frame, true second frame, reconstruction, and every single-code change.

    Column (l, k) decodes the pair's own codes with position l set to k; the pair's own code is framed in green.
    """
    device = next(model.parameters()).device
    size, length, num_codes = model.config.image_size, model.config.latent_length, model.config.codebook_size
    columns = 3 + length * num_codes
    header = 14
    sheet = Image.new("RGB", (columns * (size + 2), header + len(frames_BTCHW) * (size + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    titles = ["x_t", "x_t+h", "own codes"]
    titles += [f"{position}:{code}" for position in range(length) for code in range(num_codes)]
    for column, title in enumerate(titles):
        draw.text((column * (size + 2) + 2, 1), title, fill="black")
    for row, frames_TCHW in enumerate(frames_BTCHW.to(device)):
        own_L = model.codes(frames_TCHW[None])[0]
        changed = own_L.repeat(length * num_codes, 1)
        changed[torch.arange(len(changed)), torch.arange(length).repeat_interleave(num_codes)] = torch.arange(
            num_codes, device=device
        ).repeat(length)
        codes = torch.cat([own_L[None], changed])
        decoded = torch.cat(
            [model.decode(frames_TCHW[:1].expand(len(part), -1, -1, -1), part) for part in codes.split(64)]
        )
        cells = torch.cat([frames_TCHW.float() / 255, decoded.float().clamp(0, 1)])
        pixels = (rearrange(cells, "n c h w -> n h w c") * 255).round().byte().cpu().numpy()
        top = header + row * (size + 2)
        for column, cell in enumerate(pixels):
            sheet.paste(Image.fromarray(cell), (column * (size + 2), top))
        for position, code in enumerate(own_L.tolist()):
            left = (3 + position * num_codes + code) * (size + 2)
            draw.rectangle((left, top, left + size - 1, top + size - 1), outline="lime")
    return sheet


def _small_difference(frames_BTCHW: Tensor) -> Tensor:
    frames = frames_BTCHW.float() / 255
    return F.interpolate(frames[:, 1] - frames[:, 0], size=PIXEL_BASELINE_SIDE, mode="area")


def _perplexity(share: Tensor) -> Tensor:
    return torch.special.entr(share).sum(dim=-1).exp()


def _print(figures: dict[str, Any]) -> None:
    table = Table("figure", "value", "read it as", title="latent action model")
    errors, usage = figures["reconstruction"], figures["usage"]
    table.add_row("reconstruction (MSE)", f"{errors['mse']:.5f}", "predicting the second frame")
    table.add_row(
        "  / copying the first frame", f"{errors['mse'] / errors['mse_copy']:.2f}", "below 1: it predicts motion"
    )
    table.add_row(
        "  shuffled codes / own codes", f"{errors['mse_shuffled'] / errors['mse']:.2f}", "1: codes are ignored"
    )
    table.add_row("codes used by over 1%", f"{usage['codes_used']:.0%}", "100%: nothing has collapsed")
    table.add_row("perplexity per position", ", ".join(f"{p:.1f}" for p in usage["perplexity_per_position"]), "")
    table.add_row("joint perplexity", f"{usage['joint_perplexity']:.1f}", f"{usage['joint_codes_used']:.0f} seen")
    for name, result in figures.get("linear_probe", {}).items():
        if isinstance(result, dict):
            per_dimension = ", ".join("-" if r2 is None else f"{r2:.2f}" for r2 in result["r2_per_dimension"])
            table.add_row(f"action R2 from {name}", f"{result['r2']:.2f}", f"per dimension: {per_dimension}")
    console.print(table)
