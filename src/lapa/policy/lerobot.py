"""A policy as a folder of LeRobot's policies (type `lapa`), and back. Needs no LeRobot.

    lapa export lerobot POLICY --out FOLDER
    lapa import lerobot FOLDER --out POLICY

The plugin packages/lerobot_policy_lapa runs such a folder in LeRobot's tools, and writes the same files when
`lerobot-train` saves a checkpoint:

config.json                 LeRobot's config of the policy
model.safetensors           all weights: those of the backbone, and of the head `chunk` or `flow`
policy_preprocessor.json    LeRobot's steps before and after the policy, which leave all numbers as they are: images and
policy_postprocessor.json   states are prepared, and actions put into the robot's units, by the policy itself
lapa/                       a policy folder without its weights: config, tokenizer, image processor, statistics
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from lapa import config as configs
from lapa.checksums import verify
from lapa.console import finish
from lapa.engine.config import OptimConfig
from lapa.errors import UserError
from lapa.files import atomic_path, claim_output, errors_about, read_json, write_json
from lapa.hub.download import hub_folder
from lapa.locks import locks_output
from lapa.nn.saved import require_few, require_sizes, shapes_of_file
from lapa.nn.weights import finite_weights
from lapa.policy.backbones import Processor, load_backbone
from lapa.policy.backbones.base import require_room
from lapa.policy.config import ExportLeRobotConfig, ImportLeRobotConfig
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.runtime import (
    CONFIG,
    MODEL,
    PROCESSOR,
    Policy,
    is_policy,
    load_policy,
    policy_folder,
    read_config,
    with_parts,
)

WEIGHTS, PARTS = "model.safetensors", "lapa"
TYPE = "lapa"
# What is downloaded from the hub.
FILES = ("*.json", WEIGHTS, f"{PARTS}/*")
# The attribute of the plugin's policy that is the model, and so the start of the names of its weights.
ATTRIBUTE = "model"
ACTION, STATE, CAMERA = "action", "observation.state", "observation.images."
# What a run records of places on the machine that it ran on.
PLACES = ("data", "labels", "statistics", "policy", "out")


@locks_output
def export(config: ExportLeRobotConfig) -> None:
    """`lapa export lerobot`. Raises UserError where the policy cannot act, or the statistics are to be chosen."""
    policy = load_policy(policy_folder(config.policy))
    if not policy.acts:
        raise UserError(
            f"{config.policy}: only pretrained, it has no robot actions; run `lapa policy finetune --policy "
            f"{config.policy}`, or let LeRobot do it: lerobot-train --policy.type=lapa --policy.start={config.policy}"
        )
    with errors_about(config.policy):
        policy = policy.under(config.statistics_key)
        exported = lerobot_config(policy)
    finished = (config.out / CONFIG).exists()
    claim_output(config.out, complete=finished, overwrite=config.overwrite, resumable=False, inputs=[config.policy])
    write_parts(policy, config.out)
    with atomic_path(config.out / WEIGHTS) as temporary:
        save_model(nn.ModuleDict({ATTRIBUTE: policy.model}), str(temporary), metadata={"format": "pt"})
    for name, steps in processor_steps(features(policy)).items():
        write_json(config.out / f"{name}.json", {"name": name, "steps": steps})
    write_json(config.out / CONFIG, exported)
    command = f"lerobot-eval --policy.path={config.out} --env.type=ENVIRONMENT"
    finish("policy for LeRobot", config.out, [command])


@locks_output
def read_back(config: ImportLeRobotConfig) -> None:
    """`lapa import lerobot`. Raises UserError naming the file that is missing or does not fit."""
    policy = open_lerobot(hub_folder(config.exported, FILES, marker=CONFIG))
    complete = is_policy(config.out)
    claim_output(config.out, complete=complete, overwrite=config.overwrite, resumable=False, inputs=[config.exported])
    policy.save_pretrained(config.out)
    finish("policy", config.out, [f"lapa evaluate {config.out} --env ENVIRONMENT --out RESULTS"])


def open_lerobot(folder: Path) -> Policy:
    """The policy in a folder of `export` or of the plugin, on the CPU.

    Raises UserError naming the file that is missing or does not fit.
    """
    folder = Path(folder)
    parts = folder / PARTS
    if not parts.is_dir():
        raise UserError(
            f"{folder}: has no folder {PARTS}/, so no policy of `lapa export lerobot` or of the type `lapa`; of a "
            "training, give CHECKPOINT/pretrained_model"
        )
    config = read_config(parts)
    verify(parts, "copy or export the policy again")
    shapes = shapes_of_file(folder / WEIGHTS)
    require_sizes(parts / CONFIG, configs.to_dict(config), shapes)
    if (model_config := parts / MODEL / CONFIG).is_file():
        require_sizes(model_config, read_json(model_config), shapes)
    require_room(folder, str(folder))
    with torch.device("meta"):
        planned, _ = _blank(config, parts)
    _require_fit(planned, folder, shapes)
    model, processor = _blank(config, parts)
    _fill(model, folder / WEIGHTS)
    return with_parts(parts, model, processor)


def write_parts(policy: Policy, folder: Path) -> None:
    """Writes what a folder of LeRobot's holds besides LeRobot's own files: all but the weights."""
    (folder / PARTS / MODEL).mkdir(parents=True, exist_ok=True)
    policy.model.backbone.save_config(folder / PARTS / MODEL)
    recorded = {name: value for name, value in policy.run.items() if name not in PLACES}
    policy.save_parts(folder / PARTS, run=recorded)


def features(policy: Policy) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs and outputs of a policy in LeRobot's words, as JSON."""
    side = policy.config.backbone.image_size
    inputs: dict[str, Any] = {f"{CAMERA}{name}": _feature("VISUAL", 3, side, side) for name in policy.cameras}
    if policy.state_dim:
        inputs[STATE] = _feature("STATE", policy.state_dim)
    return inputs, {ACTION: _feature("ACTION", policy.action_dim)}


def lerobot_config(policy: Policy) -> dict[str, Any]:
    """LeRobot's config.json; keys that are left out have their defaults there.

    The options of the optimizer are those of the run that made the policy.
    """
    inputs, outputs = features(policy)
    options = {
        "type": TYPE,
        "input_features": inputs,
        "output_features": outputs,
        "chunk_size": policy.chunk,
        "head": policy.config.head,
        "state": bool(policy.state_dim),
        "action_feature_names": list(policy.action_space.names),
    }
    loop = policy.run.get("loop")
    optim = loop.get("optim") if isinstance(loop, Mapping) else None
    if isinstance(optim, Mapping) and optim:
        known = configs.from_dict(OptimConfig, dict(optim), source="the run of the policy")
        options |= {
            "optimizer_lr": known.lr,
            "optimizer_betas": list(known.betas),
            "optimizer_weight_decay": known.weight_decay,
            "optimizer_grad_clip_norm": known.clip,
            "scheduler_warmup_steps": known.warmup_steps,
            "scheduler": known.schedule,
        }
    return options


def processor_steps(features: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The steps of LeRobot's default pipelines, by the name of the pipeline; the normalisation leaves all as it is.

    features: inputs and outputs, as `features` returns them.
    """
    inputs, outputs = features
    identity = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")

    def step(name: str, **options: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": options}

    return {
        "policy_preprocessor": [
            step("rename_observations_processor", rename_map={}),
            step("to_batch_processor"),
            step("device_processor", device="cpu", float_dtype=None),
            step("normalizer_processor", eps=1e-8, features={**inputs, **outputs}, norm_map=identity),
        ],
        "policy_postprocessor": [
            step("unnormalizer_processor", eps=1e-8, features=dict(outputs), norm_map=identity),
            step("device_processor", device="cpu", float_dtype=None),
        ],
    }


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _blank(config: PolicyConfig, parts: Path) -> tuple[LatentPolicy, Processor]:
    """The policy that the files in `parts` describe, with arbitrary weights."""
    backbone, processor = load_backbone(
        config.backbone,
        parts / MODEL,
        parts / PROCESSOR,
        vocabulary=config.vocabulary,
        num_cameras=len(config.cameras),
        weights=False,
    )
    return LatentPolicy(config, backbone), processor


def _named(model: LatentPolicy) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the file; tied ones are one tensor under several names."""
    named: dict[str, Tensor] = nn.ModuleDict({ATTRIBUTE: model}).state_dict(keep_vars=True)
    return named


def _require_fit(planned: LatentPolicy, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where the file of weights has other tensors than the planned model; of tied ones it has one."""
    what = f"{folder / WEIGHTS}: does not fit {folder / PARTS / CONFIG}"
    wanted = _named(planned)
    if extra := sorted(shapes.keys() - wanted.keys()):
        raise UserError(f"{what} ({extra[0]} is in no such policy)")
    held = {id(wanted[name]) for name in shapes}
    for name, tensor in wanted.items():
        if id(tensor) not in held:
            raise UserError(f"{what} ({name} is missing)")
        if shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise UserError(f"{what} ({name} is of shape {list(shapes[name])}, not {list(tensor.shape)})")
    require_few(folder / PARTS / CONFIG, sum(buffer.numel() for buffer in planned.buffers()), dict(shapes))


@torch.no_grad()
def _fill(model: LatentPolicy, path: Path) -> None:
    """Reads the weights in the precision of the file. Raises UserError where one is not finite."""
    wanted = _named(model)
    try:
        with safe_open(path, "pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            for name, tensor in finite_weights(path, tensors):
                wanted[name].data = wanted[name].data.to(tensor.dtype)
                wanted[name].copy_(tensor)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); copy or export the policy again") from None
