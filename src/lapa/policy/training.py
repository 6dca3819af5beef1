"""What pretraining and finetuning share: held-out figures, the run itself, and the folder in the end.

Axes: B batch, K chunk, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from lapa.console import is_main_process, say
from lapa.data.dataset import Dataset
from lapa.data.steps import PolicySteps
from lapa.engine.loop import LoopConfig, train
from lapa.engine.metrics import versions_and_hardware
from lapa.policy.checkpoint import PolicyParts, save_policy
from lapa.policy.inputs import PolicyInputs
from lapa.policy.model import LatentPolicy

# Held-out steps that an evaluation looks at, spread evenly over the held-out episodes.
EVALUATION_STEPS = 256
EVALUATION_BATCH = 64


def train_policy(
    parts: PolicyParts,
    training: PolicySteps,
    held_out: PolicySteps | None,
    loop: LoopConfig,
    out: Path,
    *,
    run_config: dict[str, Any],
    description: str,
    resume: bool,
) -> bool:
    """Trains the policy in place and writes its folder. False where the run was stopped before its end."""
    evaluate = None if held_out is None else held_out_figures(parts.inputs, held_out)
    if held_out is None:
        say("no episode is held out: nothing is evaluated while training")
    result = train(
        parts.model,
        training,
        parts.inputs.collate,
        loop,
        out,
        run_config=run_config,
        description=description,
        resume=resume,
        evaluate=evaluate,
    )
    if result.finished and is_main_process():
        save_policy(out, parts, run=run_config, metrics={**result.metrics, **versions_and_hardware()})
    return result.finished


def held_out_figures(inputs: PolicyInputs, steps: PolicySteps) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation on held-out steps: loss and token accuracy given the true tokens before each, and for robot

    actions `action_error`, the mean absolute difference of the decoded chunk, in the robot's units.
    """
    chosen = np.unique(np.linspace(0, len(steps) - 1, EVALUATION_STEPS).round().astype(int))
    items = [steps[int(index)] for index in chosen]
    groups = [items[first : first + EVALUATION_BATCH] for first in range(0, len(items), EVALUATION_BATCH)]
    batches = [inputs.collate(group) for group in groups]

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LatentPolicy)
        device = next(model.parameters()).device
        totals: dict[str, float] = {}
        for group, batch in zip(groups, batches, strict=True):
            figures = _figures(model, inputs, group, {name: value.to(device) for name, value in batch.items()})
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value * len(group) / len(items)
        return {f"held_out_{name}": value for name, value in totals.items()}

    return evaluate


def open_steps(
    datasets: Sequence[Dataset], held_out: float, build: Callable[[str], PolicySteps]
) -> tuple[PolicySteps, PolicySteps | None]:
    """The training steps, and the held-out ones where any episode is held out."""
    some_held_out = held_out > 0 and any(len(dataset.lengths) > 1 for dataset in datasets)
    return build("train"), build("held_out") if some_held_out else None


def _figures(
    model: LatentPolicy, inputs: PolicyInputs, items: Sequence[dict[str, Any]], batch: dict[str, Tensor]
) -> dict[str, float]:
    losses = model(batch)
    figures = {"loss": float(losses.loss), "token_accuracy": float(losses.parts["token_accuracy"])}
    if "action_BKA" in batch:
        assert inputs.bins is not None
        decoded_BKA = inputs.bins.decode(model.predict_actions(batch).cpu().numpy())
        true_BKA = np.stack([item["actions_KA"] for item in items])
        counted_BK = np.stack([item["action_mask_K"] for item in items])
        figures["action_error"] = float(np.abs(decoded_BKA - true_BKA).mean(-1)[counted_BK].mean())
    return figures
