"""The policy folder: everything that a policy needs to act, and nothing beside it.

config.json         the policy's config and the run that made it; written last, it marks the folder as whole
model.safetensors   the weights
tokenizer/          an ordinary tokenizer of transformers
actions.safetensors the bins of the robot's actions (after finetuning)
metrics.json        the last evaluation
training/           checkpoints and metrics of the run, for --resume
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lapa import config as configs
from lapa.files import atomic_path, read_json, write_json
from lapa.policy.actions import ActionBins
from lapa.policy.inputs import PolicyInputs
from lapa.policy.model import LatentPolicy, PolicyConfig
from lapa.policy.tokenizer import load_tokenizer

CONFIG, WEIGHTS, ACTIONS, TOKENIZER = "config.json", "model.safetensors", "actions.safetensors", "tokenizer"


@dataclass(frozen=True)
class PolicyParts:
    """A policy in memory: the model, its tokenizer and, after finetuning, its action bins."""

    model: LatentPolicy
    tokenizer: PreTrainedTokenizerFast
    bins: ActionBins | None = None

    @property
    def inputs(self) -> PolicyInputs:
        return PolicyInputs(self.model.config, self.tokenizer, self.bins)


def is_policy(folder: Path) -> bool:
    """Whether `folder` holds a finished policy."""
    return (Path(folder) / CONFIG).exists()


def save_policy(
    folder: Path, parts: PolicyParts, *, run: dict[str, Any], metrics: dict[str, float] | None = None
) -> None:
    """Writes a policy folder, `config.json` last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.model.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    parts.tokenizer.save_pretrained(str(folder / TOKENIZER))
    if parts.bins is not None:
        parts.bins.save(folder / ACTIONS)
    write_json(folder / "metrics.json", metrics or {})
    write_json(folder / CONFIG, {"policy": configs.to_dict(parts.model.config), "run": run})


def load_policy(folder: Path) -> PolicyParts:
    """Reads a policy folder, on the CPU. Raises ValueError naming what is missing, unfinished or does not fit."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such policy folder; make one with `lapa policy pretrain` or `finetune`")
    if not is_policy(folder):
        raise ValueError(f"{folder}: unfinished or not a policy (no {CONFIG}); finish its training with --resume")
    written = read_json(folder / CONFIG)
    if not isinstance(written, dict) or "policy" not in written:
        raise ValueError(f"{folder / CONFIG}: not the config of a policy (no key 'policy')")
    config = configs.from_dict(PolicyConfig, written["policy"], source=str(folder / CONFIG))
    model = LatentPolicy(config)
    _load_weights(model, folder / WEIGHTS)
    bins = ActionBins.load(folder / ACTIONS) if config.chunk else None
    return PolicyParts(model.eval(), load_tokenizer(folder / TOKENIZER), bins)


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the policy folder is incomplete, train it again") from None
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: does not fit the policy's config ({str(error).splitlines()[0]})") from error
