"""The latent action model: from two frames to a few discrete codes of the change between them (LAPA, stage 1).

Inverse dynamics encodes (x_t, x_{t+h}) into codes; forward dynamics predicts x_{t+h} from x_t and the codes.
Ye et al., ICLR 2025, https://arxiv.org/abs/2410.11758.

    lapa latent train --data DATASET --preset tiny --out LAM
    model = LatentActionModel.from_pretrained("LAM"); codes_BL = model.codes(frames_BTCHW)

Axes: B batch, T time (two frames), C channel, H W image or patch grid, D width, L latent action length, A action.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from lapa import checksums, files
from lapa import config as configs
from lapa.data.transforms import as_image, resize_and_crop
from lapa.errors import UserError
from lapa.hub.download import errors_of, hub_folder
from lapa.hub.push import SavedToPush
from lapa.latent.augment import augment_pairs
from lapa.latent.config import LatentModelConfig
from lapa.latent.quantizers import NO_CODES, build_quantizer, mean_everywhere
from lapa.nn.patches import PatchEmbedding, PatchPixels, PatchSummary, PositionBias, sinusoids
from lapa.nn.saved import require_fit, require_sizes, shapes_of_file
from lapa.nn.transformer import Transformer
from lapa.nn.weights import load_weights, save_weights
from lapa.types import Losses, TrainableModel

if TYPE_CHECKING:
    from lapa.data.dataset import Dataset
    from lapa.latent.features import VisionTower


WEIGHTS, CONFIG, TOWER = "model.safetensors", "config.json", "vision_tower"
# In config.json, by which AutoModel of transformers finds the class (lapa.automodel).
MODEL_TYPE = "lapa_lam"
# In config.json, the datasets that a model learned from: fingerprint -> name and horizon.
DATASETS, HORIZON = "datasets", "horizon_seconds"
# Options of earlier versions, which changed the loss alone: models that were saved with them load.
RETIRED = ("reversal_weight", "composition_weight")
SAVED = (WEIGHTS, CONFIG, f"{TOWER}/*", checksums.SUMS)
WANTED_FRAMES = "give pairs [B, 2, 3, H, W] or [B, 2, H, W, 3], or a list of pairs of images"
SMALLEST_STD = 1e-6
SMALLEST_SCALE = 1e-12
# Of the mean change, which is added to each pair's own where errors are relative to it.
STILL = 0.3


@dataclass(frozen=True)
class LatentAction:
    """A batch of latent actions: the continuous latent, its codes, and the quantised latent, the decoder's input.

    codes_BL is None for a continuous latent action model.
    """

    codes_BL: Int64[Tensor, "B L"] | None
    z_BLD: Float[Tensor, "B L D"]
    quantized_BLD: Float[Tensor, "B L D"]


@dataclass(frozen=True)
class View:
    """Input of the model: pixels in [0, 1] and, with a vision tower, its features, on the patch grid."""

    pixels_BTCHW: Tensor
    features_BTHWD: Tensor | None

    def frame(self, time: int) -> View:
        features = self.features_BTHWD
        return View(self.pixels_BTCHW[:, time : time + 1], None if features is None else features[:, time : time + 1])


class LatentActionModel(TrainableModel, SavedToPush, nn.Module):
    """Encoder, quantizer and decoder; `forward` returns the training loss.

    z = latents(x_{t+h}) - latents(x_t), each read from the tokens of a spatial and a temporal transformer over both
    frames. The decoder starts from x_t's tokens, gradient stopped, and attends to the quantised z.
    """

    token_positions_LD: Tensor
    action_mean_A: Tensor
    action_std_A: Tensor

    def __init__(self, config: LatentModelConfig, tower: VisionTower | None = None):
        """tower: the frozen vision tower, by default loaded by the name config.vision_tower."""
        super().__init__()
        self.config = config
        self.notes: dict[str, Any] = {}
        if config.vision_tower is not None and tower is None:
            tower = load_tower(config.vision_tower, config)
        if tower is not None and config.layout == "released" and tower.dim != config.dim:
            raise UserError(
                f"{config.vision_tower}: its features are {tower.dim} wide, {config.dim} in the released weights; "
                "give the vision tower that they were trained on"
            )
        self.tower = tower
        transformer = partial(
            Transformer, config.dim, heads=config.heads, dim_head=config.dim_head, released=config.layout == "released"
        )
        if config.inputs != "features":
            self.patch_embedding = PatchEmbedding(config.patch_size, config.dim, norm_pixels=config.patch_norm)
        if config.inputs != "pixels":
            assert tower is not None
            self.feature_embedding = (
                nn.Identity()
                if config.layout == "released"
                else nn.Sequential(nn.Linear(tower.dim, config.dim), nn.LayerNorm(config.dim))
            )
        self.position_bias = PositionBias(config.grid, config.dim, config.heads)
        self.spatial_encoder = transformer(depth=config.spatial_depth, axis="space")
        self.temporal_encoder = transformer(depth=config.temporal_depth, axis="time")
        self.to_latents = PatchSummary(config.dim, config.quant_dim, config.grid, config.latent_shape, config.kernels)
        self.quantizer = build_quantizer(config)
        self.from_latents = nn.Linear(config.quant_dim, config.dim)
        self.decoder = transformer(depth=config.spatial_depth, axis="space", cross=True)
        if self.predicts_pixels:
            self.to_pixels = PatchPixels(config.patch_size, config.dim, zero_init=config.predict == "change")
        if config.targets != "pixels":
            assert tower is not None
            self.to_features = nn.Identity() if config.layout == "released" else nn.Linear(config.dim, tower.dim)
            if config.predict == "change" and isinstance(self.to_features, nn.Linear):
                nn.init.zeros_(self.to_features.weight)
                nn.init.zeros_(self.to_features.bias)
        latents = config.latent_length * config.quant_dim
        self.add_action = nn.Linear(latents, config.dim) if config.action_input == "attend_and_add" else None
        if config.action_dim:
            self.to_action = nn.Linear(latents, config.action_dim)
            self.register_buffer("action_mean_A", torch.zeros(config.action_dim))
            self.register_buffer("action_std_A", torch.ones(config.action_dim))
        positions = sinusoids(config.latent_length, config.dim)
        self.register_buffer("token_positions_LD", positions, persistent=False)

    @property
    def horizon(self) -> float:
        """Seconds between the two frames of a training pair."""
        return self.config.horizon_seconds

    @property
    def discrete(self) -> bool:
        """Whether latent actions have codes."""
        return self.quantizer.discrete

    @property
    def predicts_pixels(self) -> bool:
        """Whether the decoder predicts pixels, not only the features of a vision tower."""
        return self.config.targets != "features"

    def __repr__(self) -> str:
        config = self.config
        codes = f"{config.latent_length} codes of {config.codebook_size} values" if self.discrete else "continuous"
        return (
            f"LatentActionModel({config.image_size} x {config.image_size} px, {codes} ({config.quantizer}), "
            f"horizon {self.horizon:g} s, {sum(p.numel() for p in self.parameters()):,} parameters)"
        )

    def forward(self, batch: Mapping[str, Any]) -> Losses:
        return self.loss(batch["frames_BTCHW"], actions_BA=batch.get("actions_BA"))

    def loss(
        self,
        frames_BTCHW: UInt8[Tensor, "B 2 C H W"],
        noise: Tensor | None = None,
        *,
        actions_BA: Float[Tensor, "B A"] | None = None,
    ) -> Losses:
        """Mean squared error of the predicted second frame, and the losses that the config adds to it.

        noise: standard normal, of as many elements as z, for the quantizers that draw it (drawn here by default).
        actions_BA: true actions, NaN where not known.
        Parts: reconstruction; copy, the error of predicting no change; batch_codes_used and batch_perplexity; and
        each loss that is added, unweighted.
        """
        config, bias = self.config, self.position_bias()
        augmented = config.augment and self.training
        seen = self._view(augment_pairs(frames_BTCHW) if augmented else frames_BTCHW)
        tokens = self._tokens(seen)
        action = self.quantizer(self._latents(tokens, bias), noise)
        predicted = self._predict(seen.frame(0), tokens[:, :1].detach(), action.quantized_BLD, bias)
        loss, parts = self._reconstruction_loss(predicted, seen)
        added = {} if action.loss is None else {"quantizer": (1.0, action.loss)}
        if config.action_dim and actions_BA is not None:
            scaled_BA = (actions_BA - self.action_mean_A) / self.action_std_A.clamp(min=SMALLEST_STD)
            read_BA = self.to_action(action.quantized_BLD.flatten(1)).float()
            added["action"] = (self.config.action_weight, known_actions_error(read_BA, scaled_BA))
        for name, (weight, error) in added.items():
            loss = loss + weight * error
            parts[name] = error.detach()
        if action.codes_BL is not None:
            parts |= batch_usage(action.codes_BL, config.codebook_size)
        return Losses(loss, parts)

    @torch.no_grad()
    def encode(self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"]) -> LatentAction:
        """The latent action between the two frames, without noise; the model stays unchanged."""
        z_BLD = self._latents(self._tokens(self._view(frames_BTCHW)), self.position_bias())
        quantized = self.quantizer.quantize(z_BLD)
        return LatentAction(quantized.codes_BL, z_BLD, quantized.quantized_BLD)

    def codes(self, frames: Any) -> Int64[Tensor, "B L"]:
        """The codes between the two images of each pair, of which one pair makes B = 1.

        frames: RGB images of any size, uint8 or floats in [0, 1], as NumPy array or tensor, [B, 2, 3, H, W] or
        [B, 2, H, W, 3]; one pair without the batch axis; a pair, or a list of pairs, of PIL images or arrays. They are
        resized as in training: the short side to the model's image_size, the centre cropped. Raises UserError for
        anything else, and for a continuous model.
        """
        frames_BTCHW = _as_frames(frames, self.config.image_size)
        codes_BL = self.encode(frames_BTCHW.to(self.token_positions_LD.device)).codes_BL
        if codes_BL is None:
            raise UserError(NO_CODES)
        return codes_BL

    @torch.no_grad()
    def embed(self, codes_BL: Int64[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The decoder's input for these codes. Raises UserError for codes outside the codebook."""
        expected = (len(codes_BL), self.config.latent_length)
        if tuple(codes_BL.shape) != expected:
            raise UserError(f"codes must be of shape {list(expected)}, got {list(codes_BL.shape)}")
        if codes_BL.numel() and not 0 <= int(codes_BL.min()) <= int(codes_BL.max()) < self.config.codebook_size:
            raise UserError(
                f"codes must lie in [0, {self.config.codebook_size}), got "
                f"{int(codes_BL.min())} to {int(codes_BL.max())}"
            )
        return self.quantizer.embed(codes_BL)

    @torch.no_grad()
    def target(self, frame_BCHW: UInt8[Tensor, "B C H W"]) -> Tensor:
        """The target of `predict` for this second frame: its pixels in [0, 1], or its features [B, D, h, w]."""
        return self._main_target(self._view(frame_BCHW[:, None]))

    @torch.no_grad()
    def predict(self, frame_BCHW: UInt8[Tensor, "B C H W"], quantized_BLD: Float[Tensor, "B L D"]) -> Tensor:
        """The second frame predicted from the first and this latent action, not clamped; in the form of `target`."""
        view = self._view(frame_BCHW[:, None])
        return self._main_target(self._predict(view, self._tokens(view), quantized_BLD, self.position_bias()))

    def decode(self, frame_BCHW: UInt8[Tensor, "B C H W"], codes_BL: Int64[Tensor, "B L"]) -> Float[Tensor, "B C H W"]:
        """The second frame predicted from the first and these codes; pixels in [0, 1], not clamped."""
        if not self.predicts_pixels:
            raise UserError("this model predicts features, not pixels; train one with --targets pixels or both")
        if len(codes_BL) != len(frame_BCHW):
            raise UserError(f"got {len(frame_BCHW)} frames and {len(codes_BL)} latent actions; give one for each frame")
        return self.predict(frame_BCHW, self.embed(codes_BL))

    @torch.no_grad()
    def initialise(self, frames_BTCHW: UInt8[Tensor, "B 2 C H W"]) -> None:
        """Fits codebook and scale to a batch of real pairs, more pairs than codes; once, before training."""
        self.quantizer.initialise(self._latents(self._tokens(self._view(frames_BTCHW)), self.position_bias()))

    def standardise_actions(self, actions_NA: Float[np.ndarray, "N A"]) -> None:
        """Stores mean and spread of the true actions of the loss, in the robot's own units."""
        self.action_mean_A.copy_(torch.from_numpy(actions_NA.mean(0)))
        self.action_std_A.copy_(torch.from_numpy(actions_NA.std(0)))

    def action_tokens(self, quantized_BLD: Tensor) -> Tensor:
        """Context of the decoder's cross-attention: the quantised latents at the transformer's width, [B, L, dim]."""
        if self.config.layout == "released":
            # The released code reshapes (b, l, d) to (b, d, l) where it should transpose: features mix.
            b, length, dim = quantized_BLD.shape
            return self.from_latents(quantized_BLD.reshape(b, dim, length).transpose(1, 2))
        return self.from_latents(quantized_BLD) + self.token_positions_LD

    def encode_tokens(self, tokens_BTHWD: Tensor, bias_HNN: Tensor) -> Tensor:
        return self.temporal_encoder(self.spatial_encoder(tokens_BTHWD, bias_HNN))

    def _view(self, frames_BTCHW: Tensor) -> View:
        size = self.config.image_size
        if frames_BTCHW.dtype != torch.uint8 or tuple(frames_BTCHW.shape[2:]) != (3, size, size):
            raise UserError(
                f"frames must be uint8 of shape [B, T, 3, {size}, {size}], got {frames_BTCHW.dtype} "
                f"{list(frames_BTCHW.shape)}; resize them to the model's image_size"
            )
        pixels = frames_BTCHW.float() / 255
        if self.tower is None:
            return View(pixels, None)
        features = self.tower(rearrange(pixels, "b t c h w -> (b t) c h w"))
        return View(pixels, rearrange(features, "(b t) h w d -> b t h w d", b=len(pixels)))

    def _tokens(self, view: View) -> Tensor:
        if self.config.inputs == "pixels":
            return self.patch_embedding(view.pixels_BTCHW)
        tokens = self.feature_embedding(view.features_BTHWD)
        return tokens if self.config.inputs == "features" else tokens + self.patch_embedding(view.pixels_BTCHW)

    def _latents(self, tokens_BTHWD: Tensor, bias_HNN: Tensor) -> Tensor:
        encoded = self.encode_tokens(tokens_BTHWD, bias_HNN)
        return self.to_latents(encoded[:, 1]) - self.to_latents(encoded[:, 0])

    def _predict(self, first: View, tokens_B1HWD: Tensor, quantized_BLD: Tensor, bias_HNN: Tensor) -> View:
        """The predicted second frame; parts that are no target are copied from the first."""
        if self.add_action is not None:
            added = self.add_action(rearrange(quantized_BLD, "b l d -> b (l d)"))
            tokens_B1HWD = tokens_B1HWD + rearrange(added, "b d -> b 1 1 1 d")
        decoded = self.decoder(tokens_B1HWD, bias_HNN, self.action_tokens(quantized_BLD))
        pixels, features, change = first.pixels_BTCHW, first.features_BTHWD, self.config.predict == "change"
        if self.predicts_pixels:
            predicted = self.to_pixels(decoded[:, 0])[:, None]
            pixels = pixels + predicted if change else predicted
        if self.config.targets != "pixels":
            features = features + self.to_features(decoded) if change else self.to_features(decoded)
        return View(pixels, features)

    def _main_target(self, view: View) -> Tensor:
        if self.predicts_pixels:
            return view.pixels_BTCHW[:, 0]
        assert view.features_BTHWD is not None
        return rearrange(view.features_BTHWD[:, 0].float(), "b h w d -> b d h w")

    def _reconstruction_loss(self, predicted: View, frames: View) -> tuple[Tensor, dict[str, Tensor]]:
        """The error of the predicted second frame in the targets' space, and the error of copying the first."""
        first, second = frames.frame(0), frames.frame(1)
        loss, parts = torch.zeros(()), dict[str, Tensor]()
        if self.config.targets != "pixels":
            assert predicted.features_BTHWD is not None
            assert first.features_BTHWD is not None
            assert second.features_BTHWD is not None
            error_B = squared_errors(predicted.features_BTHWD.float(), second.features_BTHWD)
            copy_B = squared_errors(first.features_BTHWD, second.features_BTHWD)
            parts = {"feature_reconstruction": error_B.mean().detach(), "feature_copy": copy_B.mean()}
            loss = self._mean_error(error_B, copy_B)
        if self.predicts_pixels:
            error_B = squared_errors(predicted.pixels_BTCHW.float(), second.pixels_BTCHW)
            copy_B = squared_errors(first.pixels_BTCHW, second.pixels_BTCHW)
            parts |= {"reconstruction": error_B.mean().detach(), "copy": copy_B.mean()}
            error = self._mean_error(error_B, copy_B)
            loss = error if self.config.targets == "pixels" else error + self.config.feature_weight * loss
        return loss, parts

    def _mean_error(self, error_B: Tensor, copy_B: Tensor) -> Tensor:
        """The mean of the pairs' errors or, relative, of their errors over their own changes, on the scale of errors.

        copy_B: each pair's change, to which a share of the mean change is added: a pair in which nothing moves has only
        noise to predict.
        """
        if self.config.error == "plain":
            return error_B.mean()
        mean = mean_everywhere(copy_B.mean()).clamp(min=SMALLEST_SCALE)
        return (error_B / (copy_B + STILL * mean)).mean() * mean

    def save_pretrained(self, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Writes model.safetensors, the vision tower if any, then config.json: the model's config and `extra`.

        extra: other entries of config.json; by default those that the model was loaded with.
        """
        folder = Path(folder)
        (folder / CONFIG).unlink(missing_ok=True)
        save_weights(self, folder / WEIGHTS)
        if self.tower is not None:
            self.tower.save_pretrained(folder / TOWER)
        noted = self.notes if extra is None else extra
        whole = {**noted, "model_type": MODEL_TYPE, "model": configs.to_dict(self.config)}
        checksums.write_marker(folder, CONFIG, whole, [WEIGHTS, *checksums.files_below(folder, TOWER)])

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> LatentActionModel:
        """A saved model, on the CPU, in evaluation mode: from a folder, or by its id on the hub.

        revision: a branch, tag or commit on the hub (`user/name@revision` names one too). token: by default the one
        that is logged in. Raises UserError naming the file that is missing or wrong.
        """
        folder = _saved_folder(folder_or_hub_id, revision=revision, token=token)
        with errors_of(folder_or_hub_id):
            return cls._load(folder)

    @classmethod
    def _load(cls, folder: Path) -> LatentActionModel:
        config = _read_config(folder)
        checksums.verify(folder, "copy or train the model again")
        require_sizes(folder / CONFIG, configs.to_dict(config), shapes_of_file(folder / WEIGHTS))
        tower = load_tower(folder / TOWER, config) if config.uses_features else None
        require_fit(lambda: cls(config, tower), folder / CONFIG, folder / WEIGHTS)
        model = cls(config, tower)
        load_weights(model, folder / WEIGHTS)
        model.notes = {key: value for key, value in files.read_json(folder / CONFIG).items() if key != "model"}
        return model.eval()


def lam_fingerprint(folder_or_hub_id: str | Path) -> str:
    """Identity of a saved model, from its weights and its config (16 hex digits); stored in labels."""
    folder = _saved_folder(folder_or_hub_id)
    config = _read_config(folder)
    weights = [folder / WEIGHTS] + [folder / TOWER / WEIGHTS] * config.uses_features
    for path in weights:
        if not path.is_file():
            raise UserError(f"{path}: no such file; the model is incomplete, save or copy it again")
    # As it was written, so that an option of a later version does not change it.
    written = files.read_json(folder / CONFIG)["model"]
    identity = [*map(files.fingerprint, weights), json.dumps(written, sort_keys=True)]
    return hashlib.sha256("".join(identity).encode()).hexdigest()[:16]


def horizon_for(folder_or_hub_id: str | Path, dataset: Dataset, model: LatentActionModel) -> float:
    """Seconds between the two frames of a pair of this dataset, for this saved model.

    As given with the dataset (`--data PATH,horizon=2.4`), else as in training on it, else the model's own horizon.
    """
    if dataset.horizon is not None:
        return dataset.horizon
    path = _saved_folder(folder_or_hub_id) / CONFIG
    known = files.read_json(path).get(DATASETS, {})
    try:
        seconds = known.get(dataset.fingerprint, {}).get(HORIZON)
        horizon = model.horizon if seconds is None else float(seconds)
        if 0 < horizon < math.inf:
            return horizon
        raise ValueError(seconds)
    except (AttributeError, OverflowError, TypeError, ValueError):
        raise UserError(f'{path}: "{DATASETS}" must hold {{FINGERPRINT: {{"{HORIZON}": SECONDS}}}}') from None


def _saved_folder(folder_or_hub_id: str | Path, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a saved model, or the hub's copy of it."""
    return hub_folder(folder_or_hub_id, SAVED, marker=CONFIG, revision=revision, token=token)


def squared_errors(ours: Tensor, wanted: Tensor) -> Float[Tensor, "B"]:
    """The mean squared error of each pair; the first axis is the batch."""
    return (ours - wanted).square().flatten(1).mean(1)


def known_actions_error(predicted_BA: Float[Tensor, "B A"], actions_BA: Float[Tensor, "B A"]) -> Tensor:
    """Mean squared error over the pairs whose true action is known (not NaN); zero if none is (LAOM, arXiv 2502.00379).

    The mean is over the pairs of all processes, and separate for each micro-batch of an accumulation.
    """
    known_B1 = actions_BA.isfinite().all(1, keepdim=True)
    error_BA = (predicted_BA - actions_BA.nan_to_num()).square() * known_B1
    known_in_each = mean_everywhere(known_B1.sum().to(error_BA))
    return error_BA.sum() / (known_in_each * actions_BA.shape[1]).clamp(min=1)


@torch.no_grad()
def batch_usage(codes_BL: Int64[Tensor, "B L"], codebook_size: int) -> dict[str, Tensor]:
    """Number of codes used in this batch and their perplexity, each the mean over positions."""
    share_LK = F.one_hot(codes_BL, codebook_size).float().mean(0)
    perplexity_L = torch.special.entr(share_LK).sum(1).exp()
    return {"batch_codes_used": (share_LK > 0).sum(1).float().mean(), "batch_perplexity": perplexity_L.mean()}


def _as_frames(frames: Any, size: int) -> UInt8[Tensor, "B 2 3 size size"]:
    """Pairs of images in any of the forms that `LatentActionModel.codes` takes, resized."""
    if isinstance(frames, Tensor) and frames.dtype == torch.uint8 and tuple(frames.shape[1:]) == (2, 3, size, size):
        return frames
    pairs = _pairs(frames)
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(f"got {_described(frames)}; {WANTED_FRAMES}")
    images = (as_image(image, "frames") for pair in pairs for image in pair)
    images_NHWC = np.stack([resize_and_crop(image_HWC[None], size)[0] for image_HWC in images])
    return torch.from_numpy(rearrange(images_NHWC, "(b t) h w c -> b t c h w", t=2).copy())


def _pairs(frames: Any) -> list[Any]:
    """The pairs, each of two images, of an array or of nested lists."""
    if isinstance(frames, Tensor | np.ndarray) and frames.ndim in (4, 5):
        return list(frames) if frames.ndim == 5 else [frames]
    if isinstance(frames, list | tuple):
        images = [isinstance(item, Image.Image) or getattr(item, "ndim", 0) == 3 for item in frames]
        return [frames] if any(images) else [pair for item in frames for pair in _pairs(item)]
    raise UserError(f"got {_described(frames)}; {WANTED_FRAMES}")


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{value.dtype} {list(shape)}"


def load_tower(name_or_folder: str | Path, config: LatentModelConfig) -> VisionTower:
    """The frozen vision tower of a name on the hub or a folder."""
    # transformers takes seconds to import, and most models have no tower.
    from lapa.latent.features import VisionTower

    return VisionTower.from_pretrained(name_or_folder, config.grid, standardised=config.layout != "released")


def _read_config(folder: Path) -> LatentModelConfig:
    values = files.read_json(folder / CONFIG)
    if not isinstance(values, dict) or "model" not in values:
        raise UserError(f'{folder / CONFIG}: has no "model"; give the folder of a latent action model')
    model = values["model"]
    if isinstance(model, dict):
        model = {name: value for name, value in model.items() if name not in RETIRED}
        if isinstance(model.get("augment"), str):
            # In earlier versions: off, data (as today's True), or view, of the encoder's input alone.
            model["augment"] = model["augment"] != "off"
    return configs.from_dict(LatentModelConfig, model, str(folder / CONFIG))
