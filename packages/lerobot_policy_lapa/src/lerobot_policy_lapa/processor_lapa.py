"""LeRobot's pipelines before and after a LAPA policy: batches and devices only.

The policy itself turns images, text and state into tensors, and predictions into actions in the robot's units, with the
tokenizer and the statistics in its folder.
"""

from __future__ import annotations

from typing import Any

import torch
from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors

from lerobot_policy_lapa.configuration_lapa import LapaConfig


def make_lapa_pre_post_processors(
    config: LapaConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """LeRobot's default pipelines. dataset_stats: ignored, since nothing is normalised."""
    del dataset_stats
    return make_default_pre_post_processors(config)
