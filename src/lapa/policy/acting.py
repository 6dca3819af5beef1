"""Whatever acts, from its folder: a finetuned policy, or the two models of the baseline UniPi.

actor = load_actor("POLICY")
actions_BKA = actor.infer([Observation({"corner4": image_HWC}, "open the drawer")])

Axes: B batch, K chunk, A action dimensions.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from lapa.data.dataset import ActionSpace
from lapa.files import errors_about, read_json
from lapa.policy.runtime import Policy
from lapa.policy.statistics import require_key
from lapa.types import Observation

# The kind in a folder's config.json -> module and class; a folder of another kind is a Policy.
KINDS = {"unipi": ("lapa.baselines.unipi", "UniPi")}


class Actor(Protocol):
    """What `lapa evaluate` needs to know of something that acts."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that every observation must bring."""

    @property
    def chunk(self) -> int:
        """K, the time steps of actions that `infer` returns."""

    @property
    def action_dim(self) -> int:
        """A, the dimensions of an action."""

    @property
    def state_dim(self) -> int:
        """Dimensions of the state that every observation must bring; 0: none is needed."""

    @property
    def action_space(self) -> ActionSpace:
        """What the actions mean."""

    def infer(self, observations: Sequence[Observation]) -> Float[np.ndarray, "B K A"]:
        """The next K actions for each observation, float32, in the robot's own units."""


def load_actor(folder: Path | str, statistics_key: str | None = None, **options: Any) -> Actor:
    """Loads the actor in a folder, of the kind that its config.json names.

    statistics_key: as `Policy.from_pretrained` takes it; options: `dataset` and `device`, likewise. UserError where
    nothing there can act.
    """
    config = Path(folder) / "config.json"
    written = read_json(config) if config.exists() else None
    kind = written.get("kind") if isinstance(written, dict) else None
    if kind in KINDS:
        with errors_about(Path(folder)):
            require_key(statistics_key, [])
        module, name = KINDS[kind]
        return getattr(importlib.import_module(module), name).from_pretrained(folder, **options)
    if statistics_key is not None:
        options["statistics_key"] = statistics_key
    return Policy.from_pretrained(folder, **options)
