"""The policy folder: everything that a policy needs to act, and nothing beside it.

config.json         the policy's config and the run that made it; written last, it marks the folder as whole
model/              the backbone's weights; of an `hf` or `lwm` backbone an ordinary folder of transformers
processor/          an ordinary tokenizer of transformers, and an image processor where the backbone has one
head.safetensors    the weights of the head `chunk` or `flow`
actions.safetensors the bins or the scale of the robot's actions (after finetuning), of each dataset (policy.statistics)
state.safetensors   the bins of the robot's state, where the policy is told it
metrics.json        the last evaluation
training/           checkpoints and metrics of the run, for --resume
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lapa import config as configs
from lapa.errors import UserError
from lapa.files import read_json, write_json
from lapa.policy.actions import ActionBins
from lapa.policy.backbones import Processor, load_backbone
from lapa.policy.backbones.base import load_weights, save_weights
from lapa.policy.inputs import PolicyInputs
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.scale import ActionScale
from lapa.policy.statistics import ActionCodec, Statistics, most_bins, require_key, save_keyed

CONFIG, HEAD, ACTIONS, STATES = "config.json", "head.safetensors", "actions.safetensors", "state.safetensors"
MODEL, PROCESSOR = "model", "processor"


@dataclass(frozen=True)
class PolicyParts:
    """A policy in memory: the model, its processor and, after finetuning, what its actions and states are said in:

    codec and states, or by_key where each dataset that it learned from has its own.
    """

    model: LatentPolicy
    processor: Processor
    codec: ActionCodec | None = None
    states: ActionBins | None = None
    by_key: Mapping[str, Statistics] = field(default_factory=dict)

    @property
    def inputs(self) -> PolicyInputs:
        return PolicyInputs(self.model.config, self.processor, self.codec, self.states, self.by_key)

    @property
    def acts(self) -> bool:
        """Whether it knows robot actions."""
        return bool(self.model.config.chunk)

    def under(self, key: str | None) -> PolicyParts:
        """The policy that acts by one of its sets of statistics, and reads the prompt of that dataset.

        A policy that has but one set is given no key. UserError listing the keys where it is missing or none of them.
        """
        config = self.model.config
        require_key(key, [item.key for item in config.spaces])
        if key is None:
            return self
        chosen = self.by_key[key]
        config = replace(
            config,
            spaces=(),
            prompts=replace(config.prompts, default=config.prompts.template(key)),
            action_space=next(item.space for item in config.spaces if item.key == key),
            action_bins=most_bins([chosen.codec]),
            state_bins=most_bins([chosen.states]),
        )
        return PolicyParts(self.model.grown(config).eval(), self.processor, chosen.codec, chosen.states)


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
    save_keyed(folder / ACTIONS, {key: of.codec for key, of in parts.by_key.items()})
    save_keyed(folder / STATES, {key: of.states for key, of in parts.by_key.items()})
    write_json(folder / "metrics.json", metrics or {})
    write_json(folder / CONFIG, {"policy": configs.to_dict(parts.model.config), "run": run})


def read_config(folder: Path) -> PolicyConfig:
    """The config of a policy folder. Raises UserError naming what is missing or unfinished."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such policy folder; make one with `lapa policy pretrain` or `finetune`")
    if not is_policy(folder):
        raise UserError(f"{folder}: unfinished or not a policy (no {CONFIG}); finish its training with --resume")
    written = read_json(folder / CONFIG)
    if not isinstance(written, dict) or "policy" not in written:
        raise UserError(f"{folder / CONFIG}: not the config of a policy (no key 'policy')")
    return configs.from_dict(PolicyConfig, written["policy"], source=str(folder / CONFIG))


def load_policy(folder: Path) -> PolicyParts:
    """Reads a policy folder, on the CPU. Raises UserError naming what is missing, unfinished or does not fit."""
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
    if not config.chunk:
        return PolicyParts(model.eval(), processor)
    if config.spaces:
        by_key = {item.key: _load_statistics(config, folder, item.key) for item in config.spaces}
        return PolicyParts(model.eval(), processor, by_key=by_key)
    one = _load_statistics(config, folder)
    return PolicyParts(model.eval(), processor, one.codec, one.states)


def _load_statistics(config: PolicyConfig, folder: Path, key: str | None = None) -> Statistics:
    codec: ActionCodec = (ActionBins if config.head == "bins" else ActionScale).load(folder / ACTIONS, key)
    return Statistics(codec, ActionBins.load(folder / STATES, key) if config.state_dim else None)
