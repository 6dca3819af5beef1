"""Patch features of a frozen vision tower: DINOv2, DINOv3, SigLIP or SigLIP 2, from the hub or a folder.

Inputs or targets of the latent action model in place of pixels; LARYBench compares the two
(https://arxiv.org/abs/2604.11689).

    tower = VisionTower.from_pretrained("facebook/dinov2-small", grid=16)
    features_NHWD = tower(pixels_NCHW)          # pixels in [0, 1], any square size

Axes: N images, C channel, H W image or patch grid, D width, S tokens of the tower.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import logging

from lapa import files
from lapa.console import warn
from lapa.errors import UserError
from lapa.hub.download import hub_folder
from lapa.nn.pretrained import load_model, read_config
from lapa.nn.saved import damaged
from lapa.nn.weights import require_finite_weights

NORMALISATION = "preprocessor_config.json"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionTower(nn.Module):
    """A frozen model of transformers whose patch tokens are read as a grid of features.

    The model is no submodule: its weights are in no state dict, parameter list or training mode of the holder, so that
    no checkpoint, optimizer or DistributedDataParallel handles it, and copies share it. It does move with its
    holder (`to`, `cuda`, `bfloat16`), and is saved by `save_pretrained`.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        grid: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        *,
        standardised: bool = True,
    ):
        """mean, std: of each channel, pixels in [0, 1]. standardised: each feature vector, as in `forward`.

        Raises UserError where the model has no square patch grid.
        """
        super().__init__()
        if grid < 1:
            raise UserError(f"grid {grid} must be at least 1 patch on a side")
        self.grid, self.mean, self.std, self.standardised = grid, mean, std, standardised
        self.patch_size = _square_patch(model)
        # In a tuple, where nn.Module does not look for submodules.
        self._frozen = (model.requires_grad_(False).eval(),)
        self.register_buffer("mean_C11", rearrange(torch.tensor(mean), "c -> c 1 1"), persistent=False)
        self.register_buffer("std_C11", rearrange(torch.tensor(std), "c -> c 1 1"), persistent=False)
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._num_prefix = self._count_prefix()

    @property
    def model(self) -> PreTrainedModel:
        return self._frozen[0]

    @property
    def dim(self) -> int:
        """Width of a feature vector."""
        return self.model.config.hidden_size

    def forward(self, pixels_NCHW: Float[Tensor, "N 3 H H"]) -> Float[Tensor, "N grid grid dim"]:
        """Features of `grid` x `grid` patches, each vector of zero mean and unit variance, in the model's dtype.

        Where not `standardised`, they are the model's last hidden states as they are (LAPA-DINO).
        pixels_NCHW: in [0, 1], of any square size; they are resized to `grid` patches on a side. No gradient flows.
        """
        if pixels_NCHW.ndim != 4 or pixels_NCHW.shape[1] != 3 or pixels_NCHW.shape[2] != pixels_NCHW.shape[3]:
            raise UserError(f"pixels must be square images [N, 3, H, H], got {list(pixels_NCHW.shape)}")
        if not pixels_NCHW.is_floating_point():
            raise UserError(f"pixels must be floats in [0, 1], got {pixels_NCHW.dtype}; divide them by 255")
        size = self.grid * self.patch_size
        with torch.no_grad():
            pixels = pixels_NCHW.float()
            if pixels.shape[-1] != size:
                pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
            tokens_NSD = self._tokens((pixels - self.mean_C11) / self.std_C11)
            if tokens_NSD.shape[1] != self._num_prefix + self.grid**2:
                raise UserError(
                    f"{self.model.config.model_type}: {tokens_NSD.shape[1]} tokens for {self.grid} x {self.grid} "
                    "patches; it has no plain patch grid, choose a DINOv2, DINOv3 ViT or SigLIP model"
                )
            features_NSD = tokens_NSD[:, self._num_prefix :]
            if self.standardised:
                features_NSD = F.layer_norm(features_NSD.float(), (self.dim,)).to(self.model.dtype)
        return rearrange(features_NSD, "n (h w) d -> n h w d", h=self.grid)

    def _tokens(self, normalised_NCHW: Tensor) -> Tensor:
        """All output tokens of the model; those of patches come last, row by row."""
        model, pixels = self.model, normalised_NCHW.to(self.model.dtype)
        inputs: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self._takes:
            inputs["interpolate_pos_encoding"] = True
        if "spatial_shapes" in self._takes:
            # SigLIP 2 for any aspect ratio takes patches, and the layout of each image.
            pixels = rearrange(pixels, "n c (h p) (w q) -> n (h w) (p q c)", p=self.patch_size, q=self.patch_size)
            layout = torch.full((len(pixels), 2), int(pixels.shape[1] ** 0.5))
            inputs = {"spatial_shapes": layout, "pixel_attention_mask": pixels.new_ones(pixels.shape[:2])}
        return model(pixel_values=pixels, **inputs).last_hidden_state

    def _count_prefix(self) -> int:
        """How many tokens (class, registers) come before those of the patches, counted on an image of 2 x 2."""
        side = 2 * self.patch_size
        with torch.no_grad():
            tokens = self._tokens(torch.zeros(1, 3, side, side, device=self.model.device))
        if tokens.ndim != 3 or tokens.shape[1] < 4:
            raise UserError(f"{self.model.config.model_type} has no token for each patch (2 x 2: {list(tokens.shape)})")
        return tokens.shape[1] - 4

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionTower:
        """Applies `to`, `cuda`, `half` and the like to the frozen model too."""
        super()._apply(fn, recurse)
        self.model._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionTower:
        """Shares the frozen model, which averages of weights do not change."""
        copy = VisionTower(self.model, self.grid, self.mean, self.std, standardised=self.standardised)
        return copy.to(self.mean_C11.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model as transformers does, with mean and std: a folder for `from_pretrained`."""
        folder = Path(folder)
        files.write_json(folder / NORMALISATION, {"image_mean": self.mean, "image_std": self.std})
        self.model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, grid: int, *, standardised: bool = True) -> VisionTower:
        """The vision tower of a model on the hub or in a folder, in float32 on the CPU.

        Of a two-tower model (SigLIP) only the vision tower is loaded. If the model has no mean and std, ImageNet's
        are used, with a warning. Raises UserError naming the model if it is missing, incomplete, no vision model, or
        without a square patch grid.
        """
        gated = "; if it is gated (DINOv3), accept its licence there and run `hf auth login`"
        folder = hub_folder(name_or_folder, ["*.json", "*.safetensors"], gated)
        model = _load_model(folder, name_or_folder)
        mean, std = _normalisation(folder, name_or_folder)
        try:
            return cls(model, grid, mean, std, standardised=standardised)
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{name_or_folder}: not usable as a vision tower ({error}); choose a DINOv2, DINOv3 ViT or SigLIP model"
            ) from error


def _load_model(folder: Path, name: str | Path) -> PreTrainedModel:
    remedy = "; it needs config.json and model.safetensors"
    with _quiet(), damaged(f"{name}: not a model that transformers can load", remedy, even_named=True):
        config = read_config(folder)
        config = getattr(config, "vision_config", config)
        model, report = load_model(AutoModel, folder, config, dtype=torch.float32)
    if model.main_input_name != "pixel_values":
        raise UserError(
            f"{name}: a {config.model_type} model, which reads {model.main_input_name}, not images; "
            "choose a DINOv2, DINOv3 ViT or SigLIP model"
        )
    # Some checkpoints come without the pooling head, which patch features do not pass through.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(
            f"{name}: has no weights for {len(missing)} parameters of its {config.model_type} ({missing[0]}, ...); "
            "give the model that the vision tower comes from, or download it again"
        )
    require_finite_weights(name, model.named_parameters())
    return model


def _normalisation(folder: Path, name: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel, pixels in [0, 1]."""
    if not (folder / NORMALISATION).is_file():
        warn(f"{name} has no {NORMALISATION}: images are normalised with the mean and std of ImageNet")
        return IMAGENET_MEAN, IMAGENET_STD
    values = files.read_json(folder / NORMALISATION)
    try:
        mean, std = (tuple(float(value) for value in values[key]) for key in ("image_mean", "image_std"))
    except (KeyError, OverflowError, TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
        raise UserError(f"{folder / NORMALISATION}: needs image_mean and image_std, three numbers each, std above 0")
    return mean, std


def _square_patch(model: PreTrainedModel) -> int:
    """Pixels on a side of one patch."""
    size = getattr(model.config, "patch_size", None)
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise UserError(f"{model.config.model_type} has no square patches (patch_size {size})")
    return side


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' report of the text tower's unexpected weights; missing ones are checked by the caller."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
