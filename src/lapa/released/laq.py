"""Imports the latent action model that LAPA's authors released (`laq_openx.pt`).

    lapa import laq laq_openx.pt --out LAM
    model = from_released(torch.load("laq_openx.pt", weights_only=True), PUBLISHED_CONFIG)

LAPA (https://arxiv.org/abs/2410.11758), https://github.com/LatentActionPretraining/LAPA. The file is a state dict of
493 tensors, 343,796,080 parameters; it is read without running what a pickle may hold, and every name is accounted for.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapa import config as configs
from lapa.console import finish
from lapa.errors import UserError, unknown
from lapa.files import claim_output, errors_about, read_json, write_json
from lapa.latent.config import LatentModelConfig
from lapa.latent.model import CONFIG, LatentActionModel
from lapa.released.checkpoints import MALFORMED
from lapa.released.config import ImportLaqConfig

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

MODEL_NAMES = {
    "to_patch_emb_first_frame.1.weight": "patch_embedding.pixel_norm.weight",
    "to_patch_emb_first_frame.1.bias": "patch_embedding.pixel_norm.bias",
    "to_patch_emb_first_frame.2.weight": "patch_embedding.project.weight",
    "to_patch_emb_first_frame.2.bias": "patch_embedding.project.bias",
    "to_patch_emb_first_frame.3.weight": "patch_embedding.norm.weight",
    "to_patch_emb_first_frame.3.bias": "patch_embedding.norm.bias",
    "spatial_rel_pos_bias.net.0.0.weight": "position_bias.net.0.weight",
    "spatial_rel_pos_bias.net.0.0.bias": "position_bias.net.0.bias",
    "spatial_rel_pos_bias.net.1.0.weight": "position_bias.net.2.weight",
    "spatial_rel_pos_bias.net.1.0.bias": "position_bias.net.2.bias",
    "spatial_rel_pos_bias.net.2.weight": "position_bias.net.4.weight",
    "spatial_rel_pos_bias.net.2.bias": "position_bias.net.4.bias",
    "vq.project_in.weight": "to_latents.project.weight",
    "vq.project_in.bias": "to_latents.project.bias",
    "vq.cnn_encoder.0.weight": "to_latents.shrink.weight",
    "vq.cnn_encoder.0.bias": "to_latents.shrink.bias",
    "vq.cnn_encoder.2.weight": "to_latents.gather.weight",
    "vq.cnn_encoder.2.bias": "to_latents.gather.bias",
    "vq.codebooks": "quantizer.codebook_KD",
    "vq.project_out.weight": "from_latents.weight",
    "vq.project_out.bias": "from_latents.bias",
    "to_pixels_first_frame.0.weight": "to_pixels.project.weight",
    "to_pixels_first_frame.0.bias": "to_pixels.project.bias",
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


def released_config(published: Mapping[str, Any]) -> LatentModelConfig:
    """Returns our config for a published one (the keys of PUBLISHED_CONFIG). Raises UserError where it is not one."""
    for key, value in published.items():
        if key not in PUBLISHED_CONFIG:
            raise unknown("key of the published config", key, PUBLISHED_CONFIG)
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a whole number of at least 1, got {value!r}")
    if missing := sorted(PUBLISHED_CONFIG.keys() - published.keys()):
        raise UserError(f"the published config needs the keys {', '.join(missing)}")
    sizes: dict[str, Any] = dict(published)
    return LatentModelConfig(
        latent_length=sizes.pop("code_seq_len"),
        layout="released",
        horizon_seconds=PUBLISHED_HORIZON_SECONDS,
        **sizes,
    )


def released_names(model: LatentActionModel) -> dict[str, str]:
    """Released name -> our name, for every released tensor that has a counterpart."""
    names = dict(MODEL_NAMES)
    ours = model.state_dict().keys()
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


def from_released(state_dict: Mapping[str, Tensor], published_config: Mapping[str, Any]) -> LatentActionModel:
    """Returns the model with the released weights, in evaluation mode.

    Raises UserError that lists every released name that is missing, left over or of another shape, and every norm's
    offset that is not zero, as the released code keeps it.
    """
    model = LatentActionModel(released_config(published_config))
    own, names, constants = model.state_dict(), released_names(model), released_constants(model)
    shapes = {name: tuple(own[ours].shape) for name, ours in names.items()} | constants
    complaints = [f"{name}: missing" for name in shapes if name not in state_dict]
    for name, tensor in state_dict.items():
        if name not in shapes:
            complaints.append(f"{name}: not a name of the released model")
        elif tuple(tensor.shape) != shapes[name]:
            complaints.append(f"{name}: shape {tuple(tensor.shape)}, expected {shapes[name]}")
        elif name in constants and tensor.any():
            complaints.append(f"{name}: expected zeros")
    if complaints:
        raise UserError("released weights do not fit the published config:\n  " + "\n  ".join(complaints))
    model.load_state_dict({**own, **{ours: state_dict[name] for name, ours in names.items()}})
    return model.eval()


def run(config: ImportLaqConfig) -> None:
    """`lapa import laq`. Raises UserError on a file that is missing, truncated or does not fit."""
    published = PUBLISHED_CONFIG if config.sizes is None else read_json(config.sizes)
    if not isinstance(published, dict):
        raise UserError(f"{config.sizes}: expected an object with the sizes of a released model")
    with errors_about(config.sizes):
        released_config(published)
    weights = read_weights(config.weights)
    with errors_about(config.weights):
        model = from_released(weights, published)
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

    Raises UserError errors_about the file where that fails, or where a tensor is not of finite floating-point numbers.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the released laq_openx.pt")
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except MALFORMED:
        # Torch's own message advises to run what is in the file.
        raise UserError(
            f"{path}: truncated, or not a file of tensors alone; nothing in it was run; download the released "
            "laq_openx.pt again"
        ) from None
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise UserError(f"{path}: not a state dict; expected names and tensors")
    complaints = [f"{name}: {fault}" for name, tensor in weights.items() if (fault := _fault(tensor))]
    if complaints:
        raise UserError(f"{path}: expected finite floating-point numbers:\n  " + "\n  ".join(complaints))
    return weights


def _fault(tensor: Tensor) -> str | None:
    """The reason why a tensor cannot be a weight, if there is one."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return "sparse, or without numbers"
    if not tensor.is_floating_point():
        return str(tensor.dtype)
    return None if bool(tensor.isfinite().all()) else "not finite"
