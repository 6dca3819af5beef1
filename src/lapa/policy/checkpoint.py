"""The policy folder: everything that a policy needs to act, and nothing beside it.

config.json         the policy's config and the run that made it; written last, it marks the folder as whole
model/              the backbone's weights; of an `hf` or `lwm` backbone an ordinary folder of transformers
processor/          an ordinary tokenizer of transformers, and an image processor where the backbone has one
head.safetensors    the weights of the head `chunk` or `flow`
actions.safetensors the bins or the scale of the robot's actions (after finetuning)
state.safetensors   the bins of the robot's state, where the policy is told it
metrics.json        the last evaluation
training/           checkpoints and metrics of the run, for --resume
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapa import config as configs
from lapa.files import read_json, write_json
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import Processor, load_backbone
from lapa.policy.backbones.base import load_weights, save_weights
from lapa.policy.inputs import ActionCodec, PolicyInputs
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.scale import ActionScale

CONFIG, HEAD, ACTIONS, STATES = "config.json", "head.safetensors", "actions.safetensors", "state.safetensors"
MODEL, PROCESSOR = "model", "processor"


@dataclass(frozen=True)
class PolicyParts:
    """A policy in memory: the model, its processor and, after finetuning, what its actions and states are said in."""

    model: LatentPolicy
    processor: Processor
    codec: ActionCodec | None = None
    states: ActionBins | None = None

    @property
    def inputs(self) -> PolicyInputs:
        return PolicyInputs(self.model.config, self.processor, self.codec, self.states)


def is_policy(folder: Path) -> bool:
    """Whether `folder` holds a finished policy."""
    return (Path(folder) / CONFIG).exists()


def save_policy(
    folder: Path, parts: PolicyParts, *, run: dict[str, Any], metrics: dict[str, float] | None = None
) -> None:
    """Writes a policy folder, `config.json` last."""
    folder = Path(folder)
    for inner in (MODEL, PROCESSOR):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    parts.model.backbone.save(folder / MODEL)
    parts.processor.save(folder / PROCESSOR)
    if parts.model.head is not None:
        save_weights(parts.model.head, folder / HEAD)
    if parts.codec is not None:
        parts.codec.save(folder / ACTIONS)
    if parts.states is not None:
        parts.states.save(folder / STATES)
    write_json(folder / "metrics.json", metrics or {})
    write_json(folder / CONFIG, {"policy": configs.to_dict(parts.model.config), "run": run})


def read_config(folder: Path) -> PolicyConfig:
    """The config of a policy folder. Raises ValueError naming what is missing or unfinished."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such policy folder; make one with `lapa policy pretrain` or `finetune`")
    if not is_policy(folder):
        raise ValueError(f"{folder}: unfinished or not a policy (no {CONFIG}); finish its training with --resume")
    written = read_json(folder / CONFIG)
    if not isinstance(written, dict) or "policy" not in written:
        raise ValueError(f"{folder / CONFIG}: not the config of a policy (no key 'policy')")
    return configs.from_dict(PolicyConfig, written["policy"], source=str(folder / CONFIG))


def load_policy(folder: Path) -> PolicyParts:
    """Reads a policy folder, on the CPU. Raises ValueError naming what is missing, unfinished or does not fit."""
    folder = Path(folder)
    config = read_config(folder)
    backbone, processor = load_backbone(
        config.backbone,
        folder / MODEL,
        folder / PROCESSOR,
        vocabulary=config.vocabulary,
        num_cameras=len(config.cameras),
    )
    model = LatentPolicy(config, backbone)
    if model.head is not None:
        load_weights(model.head, folder / HEAD)
    codec: ActionCodec | None = None
    if config.chunk:
        codec = (ActionBins if config.head == "bins" else ActionScale).load(folder / ACTIONS)
    states = ActionBins.load(folder / STATES) if config.state_dim else None
    return PolicyParts(model.eval(), processor, codec, states)
