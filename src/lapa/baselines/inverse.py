"""The inverse dynamics model: predicts the robot's actions between two frames.

VPT (https://arxiv.org/abs/2206.11795) labels videos with a model that learned from few episodes. Its model takes a long
window of frames, past and future; this one takes two, as in the baseline that LAPA compares itself with
(https://arxiv.org/abs/2410.11758): a residual network on the first frame and the change to the second, then an MLP on
its features, once as their mean and once as a whole, so that places are known. Actions are learned on the scale of
`lapa.policy.actions`, by the L1 loss.

    lapa baseline inverse --data ROBOT_DATASET --out INVERSE
    actions_BKA = InverseDynamics.from_pretrained("INVERSE").predict(frames_BTCHW)

Axes: B batch, N pairs, T=2 frames of a pair, C channel, H W image, K steps between the frames, A action dimensions.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from lapa import checksums
from lapa import config as configs
from lapa.baselines.config import InverseConfig, InverseTrainConfig
from lapa.console import finish, is_main_process, print_results, say
from lapa.data.dataset import ActionSpace, Dataset, common_action_space
from lapa.data.pairs import FramePairs, PairsConfig, collate_pairs, horizon_frames
from lapa.data.sampling import any_held_out, episodes_of_split, require_plain
from lapa.data.spec import open_dataset
from lapa.engine.checkpoint import already_trained, seed_everything
from lapa.engine.loop import train
from lapa.engine.memory import built
from lapa.engine.metrics import read_figures, versions_and_hardware
from lapa.errors import UserError
from lapa.files import claim_output, fingerprint, read_json, write_json
from lapa.locks import locks_output
from lapa.nn.saved import require_fit, require_sizes, shapes_of_file
from lapa.nn.vision import residual_tower
from lapa.nn.weights import load_weights, save_weights
from lapa.policy.actions import ActionScale, warn_of_ranges
from lapa.policy.open_loop import action_figures
from lapa.store_cache import use_store_cache
from lapa.types import Losses, TrainableModel

CONFIG, WEIGHTS, ACTIONS, METRICS = "config.json", "model.safetensors", "actions.safetensors", "metrics.json"
# Augmentation: the largest shift as a part of the side, and how far brightness and each colour may change.
SHIFT, BRIGHTNESS, GAIN = 1 / 16, 0.1, 0.2
# Pairs that an evaluation takes, spread evenly over the validation split.
EVALUATION_PAIRS, EVALUATION_BATCH = 512, 64


@dataclass(frozen=True)
class Recording:
    """How the episodes that a model learned from were recorded. horizon_frames: from the first frame to the second."""

    horizon_frames: int
    fps: float
    camera: str
    action_space: ActionSpace


class InverseDynamics(TrainableModel, nn.Module):
    """The model with the scale of its actions; `forward(batch)` returns the training loss."""

    def __init__(self, config: InverseConfig, recording: Recording, scale: ActionScale) -> None:
        super().__init__()
        self.config, self.recording, self.scale = config, recording, scale
        last = config.vision_widths[-1]
        self.tower = residual_tower(config.vision_widths, config.vision_depth, in_channels=6)
        self.place = nn.Conv2d(last, max(1, last // 4), 1)
        self.perceptron = nn.Sequential(
            nn.Linear(last + max(1, last // 4) * config.grid**2, config.width),
            nn.GELU(),
            nn.Linear(config.width, config.width),
            nn.GELU(),
            nn.Linear(config.width, recording.horizon_frames * scale.action_dim),
        )

    @property
    def horizon_frames(self) -> int:
        """Frames from the first to the second, and actions between them."""
        return self.recording.horizon_frames

    def forward(self, batch: Mapping[str, Tensor]) -> Losses:
        """The L1 loss of `frames_BTCHW` uint8 and `actions_BKA`, scaled."""
        frames_BTCHW = batch["frames_BTCHW"]
        if self.training and self.config.augment:
            frames_BTCHW = augmented(frames_BTCHW)
        return Losses((self.scaled_actions(frames_BTCHW) - batch["actions_BKA"]).abs().mean())

    def scaled_actions(self, frames_BTCHW: Tensor) -> Float[Tensor, "B K A"]:
        """The actions on the model's scale, for frames with values from 0 to 255."""
        frames = frames_BTCHW.to(self.place.weight.dtype) / 127.5 - 1
        seen_BCHW = torch.cat([frames[:, 0], frames[:, 1] - frames[:, 0]], dim=1)
        features = self.tower(seen_BCHW.contiguous(memory_format=torch.channels_last)).last_hidden_state
        whole = rearrange(self.place(features), "b c h w -> b (c h w)")
        scaled = self.perceptron(torch.cat([reduce(features, "b c h w -> b c", "mean"), whole], dim=1))
        return rearrange(scaled, "b (k a) -> b k a", k=self.horizon_frames).float()

    @torch.no_grad()
    def predict(self, frames_BTCHW: UInt8[np.ndarray | Tensor, "B 2 3 H W"]) -> Float[np.ndarray, "B K A"]:
        """Returns the actions between the two frames of each pair, float32, in the robot's units.

        The frames are of side `config.image_size`, on any device. Raises UserError for others.
        """
        frames = torch.as_tensor(frames_BTCHW)
        expected = (2, 3, self.config.image_size, self.config.image_size)
        if frames.dtype != torch.uint8 or frames.ndim != 5 or tuple(frames.shape[1:]) != expected:
            raise UserError(
                f"frame pairs must be uint8 of shape [B, {', '.join(map(str, expected))}], "
                f"got {frames.dtype} {list(frames.shape)}"
            )
        return self.scale.decode(self.scaled_actions(frames.to(self.place.weight.device)).cpu().numpy())

    def save_pretrained(
        self, folder: Path, *, run: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Writes weights, scale and metrics, then config.json, which marks the folder as complete."""
        folder = Path(folder)
        (folder / CONFIG).unlink(missing_ok=True)
        save_weights(self, folder / WEIGHTS)
        self.scale.save(folder / ACTIONS)
        write_json(folder / METRICS, dict(metrics or {}))
        model = {"sizes": configs.to_dict(self.config), "recording": configs.to_dict(self.recording)}
        whole = {"inverse_dynamics": model, "run": dict(run or {})}
        checksums.write_marker(folder, CONFIG, whole, [WEIGHTS, ACTIONS, METRICS])

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> InverseDynamics:
        """Reads a saved model onto the CPU, in evaluation mode. Raises UserError naming the file that does not fit."""
        folder = Path(folder)
        parts = read_inverse_config(folder)
        checksums.verify(folder, "copy or train the model again")
        require_sizes(folder / CONFIG, parts, shapes_of_file(folder / WEIGHTS))
        sizes = configs.from_dict(InverseConfig, parts["sizes"], str(folder / CONFIG))
        recording = configs.from_dict(Recording, parts["recording"], str(folder / CONFIG))
        scale = ActionScale.load(folder / ACTIONS)
        require_fit(lambda: cls(sizes, recording, scale), folder / CONFIG, folder / WEIGHTS)
        model = cls(sizes, recording, scale)
        load_weights(model, folder / WEIGHTS)
        return model.eval()


def read_inverse_config(folder: Path) -> dict[str, Any]:
    """The parts "sizes" and "recording" of a model's config. Raises UserError where there is no finished model."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise UserError(
            f"{folder}: no finished inverse dynamics model (no {CONFIG}); train one with `lapa baseline inverse`, or "
            "finish it with --resume"
        )
    values = read_json(path)
    parts = values.get("inverse_dynamics") if isinstance(values, dict) else None
    if not isinstance(parts, dict) or set(parts) != {"sizes", "recording"}:
        raise UserError(f"{path}: not the config of an inverse dynamics model; give another folder")
    return parts


def inverse_fingerprint(folder: Path) -> str:
    """Identifies a saved model by its weights, scale and config (16 hex digits): pseudo-labels carry it."""
    # As written: a field that the config gains later leaves the fingerprints of older models as they are.
    parts = read_inverse_config(folder)
    described = [json.dumps(parts[part], sort_keys=True) for part in ("sizes", "recording")]
    files = fingerprint(folder / WEIGHTS, folder / ACTIONS)
    return hashlib.sha256("".join([files, *described]).encode()).hexdigest()[:16]


def augmented(frames_BTCHW: UInt8[Tensor, "B T C H W"]) -> Float[Tensor, "B T C H W"]:
    """Shifts pairs by whole pixels (the edge repeated) and changes their colours, both frames of a pair alike.

    Each pair has draws of its own, from torch's global generator of the frames' device, whose state a checkpoint keeps.
    """
    size, device = frames_BTCHW.shape[-1], frames_BTCHW.device
    most = round(size * SHIFT)
    padded = F.pad(rearrange(frames_BTCHW, "b t c h w -> b (t c) h w").float(), [most] * 4, mode="replicate")
    first_2B1 = torch.randint(0, 2 * most + 1, (2, len(frames_BTCHW), 1), device=device)
    rows_BH, columns_BW = first_2B1 + torch.arange(size, device=device)
    pair_B = torch.arange(len(frames_BTCHW), device=device)
    # Indexing puts the axes that are not indexed last.
    shifted = padded[pair_B[:, None, None], :, rows_BH[:, :, None], columns_BW[:, None]]
    frames = rearrange(shifted, "b h w (t c) -> b t c h w", c=frames_BTCHW.shape[2])
    draws_B4 = 2 * torch.rand(len(frames_BTCHW), 4, device=device) - 1
    gain = rearrange(1 + GAIN * draws_B4[:, :3], "b c -> b 1 c 1 1")
    shift = rearrange(255 * BRIGHTNESS * draws_B4[:, 3:], "b c -> b 1 c 1 1")
    return (gain * frames + shift).clamp(0, 255)


@locks_output
def run(config: InverseTrainConfig) -> None:
    """`lapa baseline inverse`. Raises UserError on bad input, FloatingPointError on a loss that is not finite."""
    complete = (config.out / CONFIG).exists()
    if config.loop.shard:
        raise UserError("--shard: an inverse dynamics model is too small to be sharded; leave the option out")
    use_store_cache(config.loop.store_cache, config.loop.store_cache_gib)
    datasets = [open_dataset(path) for path in config.data]
    require_plain(datasets, "lapa baseline inverse", "--horizon-seconds")
    run_config = {**configs.to_dict(config), "dataset_fingerprints": [dataset.fingerprint for dataset in datasets]}
    if config.resume and complete and already_trained(config.out / CONFIG, run_config):
        _conclude(config, read_figures(config.out / METRICS, "held_out_"), "inverse dynamics model, already complete")
        return
    space = common_action_space(datasets)
    recording = _recording(config, datasets, space)
    training, held_out = _open_pairs(config, datasets, recording)
    actions_NA = _training_actions(config, datasets, recording)
    scale = ActionScale.fit(actions_NA, space.binary)
    if is_main_process():
        claim_output(
            config.out,
            complete=complete,
            overwrite=config.overwrite,
            resume=config.resume,
            inputs=[dataset.root for dataset in datasets],
        )
    outside = int(scale.count_outside(actions_NA).sum())
    say(f"actions: {scale.action_dim} dimensions, {outside} of {actions_NA.size} values lie outside and are clamped")
    warn_of_ranges(", ".join(dataset.name for dataset in datasets), scale, actions_NA, space.names)
    if held_out is None:
        say("no episode is held out: nothing is evaluated during training")
    seed_everything(config.loop.seed)
    model = built(lambda: InverseDynamics(config.model, recording, scale))
    result = train(
        model,
        training,
        partial(collate_inverse, training, scale),
        config.loop,
        config.out,
        run_config=run_config,
        description="inverse dynamics model",
        resume=config.resume,
        evaluate=None if held_out is None else held_out_figures(held_out),
        summary=summary,
    )
    if result.finished and is_main_process():
        model.save_pretrained(config.out, run=run_config, metrics={**result.metrics, **versions_and_hardware()})
        _conclude(config, result.metrics, "inverse dynamics model")


def _conclude(config: InverseTrainConfig, metrics: Mapping[str, Any], name: str) -> None:
    print_results(metrics, summary(metrics), as_json=config.json)
    out = shlex.quote(str(config.out))
    finish(name, config.out, [f"lapa baseline pseudo-label --inverse {out} --data VIDEOS --out DATASET"])


def summary(figures: Mapping[str, Any]) -> str:
    """The figures of the validation split as a line."""
    if "held_out_action_error" not in figures:
        return "validation split: no episode"
    r2 = f", R2 {figures['held_out_r2']:.2f}" if "held_out_r2" in figures else ""
    return f"validation split: action error {figures['held_out_action_error']:.4g}{r2}"


def collate_inverse(pairs: FramePairs, scale: ActionScale, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Items of `pairs` as a batch: frames_BTCHW uint8, index int64, actions_BKA float32, scaled."""
    actions_BKA = np.stack([scale.encode(pairs.actions_between(item["index"])) for item in items])
    return {**collate_pairs(items), "actions_BKA": torch.from_numpy(actions_BKA)}


def held_out_figures(pairs: FramePairs) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation on the validation split: the action error, R2 of each dimension that varies, and their mean."""
    indices = np.unique(np.linspace(0, len(pairs) - 1, EVALUATION_PAIRS).round().astype(int)).tolist()
    frames_NTCHW = collate_pairs([pairs[index] for index in indices])["frames_BTCHW"]
    true_NKA = np.stack([pairs.actions_between(index) for index in indices])

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, InverseDynamics)
        predicted_NKA = np.concatenate([model.predict(frames) for frames in frames_NTCHW.split(EVALUATION_BATCH)])
        counted_NK, mean_A = np.ones(true_NKA.shape[:2], bool), true_NKA.mean((0, 1))
        figures = action_figures(predicted_NKA, true_NKA, counted_NK, mean_A, model.recording.action_space)
        r2 = {f"r2_{name}": values["r2"] for name, values in figures["dimensions"].items()}
        chosen = {"action_error": figures["action_error"], "r2": figures["r2"], **r2}
        return {f"held_out_{name}": value for name, value in chosen.items() if value is not None}

    return evaluate


def _recording(config: InverseTrainConfig, datasets: Sequence[Dataset], space: ActionSpace) -> Recording:
    """Raises UserError where the horizon is another number of frames in one dataset than in another."""
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
    """The pairs of the training split, and those of the validation split where there is one."""
    pairs = PairsConfig(
        size=config.model.image_size,
        horizon=config.model.horizon_seconds,
        camera=config.camera,
        held_out=config.held_out,
        cache_gib=config.cache_gib,
    )
    training = FramePairs(datasets, pairs, split="train", seed=config.loop.seed)
    some_held_out = any_held_out(datasets, config.held_out)
    return training, FramePairs(datasets, pairs, "held_out", config.loop.seed) if some_held_out else None


def _training_actions(
    config: InverseTrainConfig, datasets: Sequence[Dataset], recording: Recording
) -> Float[np.ndarray, "N A"]:
    """All actions of the training episodes that are long enough for a pair."""
    actions = []
    chosen = episodes_of_split(datasets, "train", config.held_out, config.loop.seed)
    for dataset, episodes in zip(datasets, chosen, strict=True):
        long_enough = episodes[dataset.lengths[episodes] > recording.horizon_frames]
        actions += [dataset.actions(int(episode)) for episode in long_enough]
    return np.concatenate(actions)
