"""Imports the latent action models that LAPA's authors (`laq_openx.pt`) and LARYBench's (LAPA-DINO) released.

    lapa import laq laq_openx.pt --out LAM
    lapa import laq laq_dinov2.pt --out LAM                   # the frozen DINOv2 comes from the hub
    model = from_released(torch.load("laq_openx.pt", weights_only=True), PUBLISHED_CONFIG)

LAPA (https://arxiv.org/abs/2410.11758), https://github.com/LatentActionPretraining/LAPA. The file is a state dict of
493 tensors, 343,796,080 parameters; it is read without running what a pickle may hold, and every name is accounted for.
LAPA-DINOv2 and LAPA-DINOv3 (https://arxiv.org/abs/2604.11689) have the features of a frozen DINO in place of pixels,
in and out: 253 tensors next to those of the backbone, which are not read, since it has a release of its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapa import config as configs
from lapa.console import finish
from lapa.errors import UserError, unknown
from lapa.files import claim_output, errors_about, read_json, write_json
from lapa.latent.config import LatentModelConfig, strided_lengths
from lapa.latent.model import CONFIG, LatentActionModel
from lapa.locks import locks_output
from lapa.released.checkpoints import MALFORMED, misfits, shapes_of
from lapa.released.config import ImportLaqConfig

if TYPE_CHECKING:
    from lapa.latent.features import VisionTower

PUBLISHED_CONFIG = {
    "dim": 1024,
    "quant_dim": 32,
    "codebook_size": 8,
    "image_size": 256,
    "patch_size": 32,
    "spatial_depth": 8,
    "temporal_depth": 8,
    "dim_head": 64,
    "heads": 16,
    "code_seq_len": 4,
}
PUBLISHED_HORIZON_SECONDS = 0.6
# Of LAPA-DINO: the image size, which its file does not hold, and the mean and std that pixels are normalised with.
DINO_IMAGE_SIZE, DINO_HALF = 224, (0.5, 0.5, 0.5)
BACKBONE = "dino_tokenizer."
DINOV2, DINOV3 = "facebook/dinov2-large", "facebook/dinov3-vitl16-pretrain-lvd1689m"
# Of a training checkpoint, the entry with the weights; of a moving average, what the names of its weights begin with.
CHECKPOINT, AVERAGED = "model", "ema_model."

PARTS = "weight", "bias"
# Layers with a weight and a bias: their released name -> ours.
LAYER_NAMES = {
    "to_patch_emb_first_frame.1": "patch_embedding.pixel_norm",
    "to_patch_emb_first_frame.2": "patch_embedding.project",
    "to_patch_emb_first_frame.3": "patch_embedding.norm",
    "spatial_rel_pos_bias.net.0.0": "position_bias.net.0",
    "spatial_rel_pos_bias.net.1.0": "position_bias.net.2",
    "spatial_rel_pos_bias.net.2": "position_bias.net.4",
    "vq.project_in": "to_latents.project",
    "vq.cnn_encoder.0": "to_latents.shrink",
    "vq.cnn_encoder.2": "to_latents.gather",
    "vq.project_out": "from_latents",
    "to_pixels_first_frame.0": "to_pixels.project",
}
TRANSFORMER_NAMES = {
    "enc_spatial_transformer": "spatial_encoder",
    "enc_temporal_transformer": "temporal_encoder",
    "dec_spatial_transformer": "decoder",
}
ATTENTION_NAMES = {
    "norm.gamma": "query_norm.weight",
    "context_norm.gamma": "context_norm.weight",
    "to_q.weight": "to_queries.weight",
    "to_kv.weight": "to_keys_values.weight",
    "q_scale": "query_scale",
    "k_scale": "key_scale",
    "null_kv": "null_keys_values",
    "to_out.weight": "to_out.weight",
}
BLOCK_NAMES = {
    "0.dsconv.weight": "positions.weight",
    "0.dsconv.bias": "positions.bias",
    **{f"1.{released}": f"attention.{ours}" for released, ours in ATTENTION_NAMES.items()},
    **{f"2.{released}": f"cross_attention.{ours}" for released, ours in ATTENTION_NAMES.items()},
    "3.0.weight": "feed_forward.norm.weight",
    "3.0.bias": "feed_forward.norm.bias",
    "3.1.weight": "feed_forward.up.weight",
    "3.4.weight": "feed_forward.down.weight",
}


def released_config(published: Mapping[str, Any], vision_tower: str | None = None) -> LatentModelConfig:
    """Returns our config for a published one (the keys of PUBLISHED_CONFIG). Raises UserError where it is not one.

    vision_tower: the backbone of LAPA-DINO, by hub id or folder.
    """
    for key, value in published.items():
        if key not in PUBLISHED_CONFIG:
            raise unknown("key of the published config", key, PUBLISHED_CONFIG)
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a whole number of at least 1, got {value!r}")
    if missing := sorted(PUBLISHED_CONFIG.keys() - published.keys()):
        raise UserError(f"the published config needs the keys {', '.join(missing)}")
    sizes: dict[str, Any] = dict(published)
    if vision_tower is not None:
        sizes |= {"inputs": "features", "targets": "features", "vision_tower": vision_tower}
    return LatentModelConfig(
        latent_length=sizes.pop("code_seq_len"),
        layout="released",
        horizon_seconds=PUBLISHED_HORIZON_SECONDS,
        **sizes,
    )


def released_names(model: LatentActionModel) -> dict[str, str]:
    """Released name -> our name, for every released tensor that has a counterpart."""
    ours = model.state_dict().keys()
    names = {
        f"{released}.{part}": f"{own}.{part}"
        for released, own in LAYER_NAMES.items()
        for part in PARTS
        if f"{own}.{part}" in ours
    }
    names["vq.codebooks"] = "quantizer.codebook_KD"
    for released, own in TRANSFORMER_NAMES.items():
        names[f"{released}.norm_out.gamma"] = f"{own}.norm.weight"
        for layer in range(len(getattr(model, own).blocks)):
            for theirs, inner in BLOCK_NAMES.items():
                if (name := f"{own}.blocks.{layer}.{inner}") in ours:
                    names[f"{released}.layers.{layer}.{theirs}"] = name
    return names


def released_constants(model: LatentActionModel) -> dict[str, tuple[int, ...]]:
    """Released name -> shape, for every released tensor without content: zero offsets of norms, empty nulls."""
    config = model.config
    shapes: dict[str, tuple[int, ...]] = {}
    for name in released_names(model):
        if name.endswith(".gamma"):
            shapes[name.removesuffix("gamma") + "beta"] = (config.dim,)
        if name.endswith(".1.to_q.weight"):
            shapes[name.removesuffix("to_q.weight") + "null_kv"] = (config.heads, 0, config.dim_head)
    return shapes


def from_released(
    state_dict: Mapping[str, Tensor],
    published_config: Mapping[str, Any],
    vision_tower: str | None = None,
    tower: VisionTower | None = None,
) -> LatentActionModel:
    """Returns the model with the released weights, in evaluation mode.

    vision_tower, tower: of LAPA-DINO, whose backbone in the state dict is not read: see `dino_tower`.
    Raises UserError that lists every released name that is missing, left over or of another shape, and every norm's
    offset that is not zero, as the released code keeps it.
    """
    state_dict = {name: tensor for name, tensor in state_dict.items() if not (tower and name.startswith(BACKBONE))}
    config = released_config(published_config, vision_tower)
    # Without memory, until its shapes are known to be those of the file.
    with torch.device("meta"):
        model = LatentActionModel(config, tower)
    own, names, constants = model.state_dict(), released_names(model), released_constants(model)
    shapes = {name: tuple(own[ours].shape) for name, ours in names.items()} | constants
    complaints = misfits("the released model", shapes_of(state_dict), shapes)
    complaints += [f"{name}: expected zeros" for name in constants if name in state_dict and state_dict[name].any()]
    if complaints:
        raise UserError("the weights do not fit the released model: " + "; ".join(complaints))
    model = LatentActionModel(config, tower)
    model.load_state_dict({**model.state_dict(), **{ours: state_dict[name] for name, ours in names.items()}})
    return model.eval()


def dino_tower(name_or_folder: str, image_size: int = DINO_IMAGE_SIZE) -> VisionTower:
    """Returns LAPA-DINO's frozen backbone: pixels scaled to [-1, 1], features as they leave its final norm.

    Raises as `VisionTower.from_pretrained`.
    """
    # transformers takes seconds to import, and the model of LAPA's authors needs none of it.
    from lapa.latent.features import VisionTower

    model = VisionTower.from_pretrained(name_or_folder, grid=1).model
    patch_size = model.config.patch_size
    return VisionTower(model, max(1, image_size // patch_size), DINO_HALF, DINO_HALF, standardised=False)


def dino_sizes(weights: Mapping[str, Tensor], patch_size: int, image_size: int = DINO_IMAGE_SIZE) -> dict[str, int]:
    """Returns the published config (the keys of PUBLISHED_CONFIG) of LAPA-DINO's weights, read off their shapes.

    Raises UserError where they are not of that kind, or of another patch size.
    """
    shapes = shapes_of(weights)
    patches = {shape[-1] for name, shape in shapes.items() if name.startswith(BACKBONE) and len(shape) == 4}
    if patches and patches != {patch_size}:
        raise UserError(f"its backbone has patches of {max(patches)} pixels, the vision tower {patch_size}")

    def depth(transformer: str) -> int:
        return len({name.split(".")[2] for name in shapes if name.startswith(f"{transformer}.layers.")})

    convolutions = [name for number in (0, 2) if (name := f"vq.cnn_encoder.{number}.weight") in shapes]
    try:
        quant_dim, dim = shapes["vq.project_in.weight"]
        kernels = tuple(shapes[name][-1] for name in convolutions)
        lengths = {made_by: length for length, made_by in strided_lengths(image_size // patch_size).items()}
        return {
            "dim": dim,
            "quant_dim": quant_dim,
            "codebook_size": shapes["vq.codebooks"][0],
            "image_size": image_size,
            "patch_size": patch_size,
            "spatial_depth": depth("enc_spatial_transformer"),
            "temporal_depth": depth("enc_temporal_transformer"),
            "dim_head": shapes["enc_spatial_transformer.layers.0.1.q_scale"][0],
            "heads": shapes["spatial_rel_pos_bias.net.2.weight"][0],
            "code_seq_len": lengths[kernels],
        }
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(f"not the weights of LAPA-DINO: its sizes cannot be read off ({error})") from None


@locks_output
def run(config: ImportLaqConfig) -> None:
    """`lapa import laq`. Raises UserError on a file that is missing, truncated or does not fit."""
    published = PUBLISHED_CONFIG if config.sizes is None else read_json(config.sizes)
    if not isinstance(published, dict):
        raise UserError(f"{config.sizes}: expected an object with the sizes of a released model")
    with errors_about(config.sizes):
        released_config(published)
    weights, name = read_weights(config.weights), config.vision_tower
    if name is None and any(each.startswith(BACKBONE) for each in weights):
        name = DINOV3 if f"{BACKBONE}embeddings.register_tokens" in weights else DINOV2
    tower = None if name is None else dino_tower(name, published["image_size"] if config.sizes else DINO_IMAGE_SIZE)
    with errors_about(config.weights):
        if tower is not None and config.sizes is None:
            published = dino_sizes(weights, tower.patch_size)
        model = from_released(weights, published, name, tower)
    complete = (config.out / CONFIG).exists()
    claim_output(config.out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=[config.weights])
    write_json(config.out / "metrics.json", {})
    model.save_pretrained(config.out, configs.to_dict(config))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lam = shlex.quote(str(config.out))
    next_commands = [f"lapa latent probe {lam} --data DATASET", f"lapa label --lam {lam} --data DATASET"]
    finish(f"latent action model of {parameters:,} parameters", config.out, next_commands)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Reads the tensors of a file of torch, without running any code in it.

    Raises UserError naming the file where that fails, or where a tensor is not of finite floating-point numbers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the released laq_openx.pt, laq_dinov2.pt or laq_dinov3.pt")
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MALFORMED:
        # Torch's own message advises to run what is in the file.
        raise UserError(
            f"{path}: truncated, or not a file of tensors alone; nothing in it was run; download the released "
            "file again"
        ) from None
    if isinstance(weights, Mapping):
        weights = unwrapped(weights)
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{path}: not a state dict; expected names and tensors")
    complaints = [f"{name}: {fault}" for name, tensor in weights.items() if (fault := _fault(tensor))]
    if complaints:
        raise UserError(f"{path}: expected finite floating-point numbers: " + "; ".join(complaints))
    return weights


def unwrapped(weights: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Returns the state dict in a training checkpoint or a moving average, without the prefix of several processes."""
    if isinstance(inner := weights.get(CHECKPOINT), Mapping):
        weights = inner
    if averaged := {name: value for name, value in weights.items() if str(name).startswith(AVERAGED)}:
        weights = {name.removeprefix(AVERAGED): value for name, value in averaged.items()}
    return {name.removeprefix("module.") if isinstance(name, str) else name: value for name, value in weights.items()}


def _fault(tensor: Tensor) -> str | None:
    """The reason why a tensor cannot be a weight, if there is one."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return "sparse, or without numbers"
    # With a stride of 0 one number stands for any number of them.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "larger than what the file holds of it"
    if not tensor.is_floating_point():
        return str(tensor.dtype)
    return None if bool(tensor.isfinite().all()) else "not finite"
