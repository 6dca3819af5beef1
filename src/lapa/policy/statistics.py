"""Statistics of actions and states: one set for all that a policy learned from, or one for each dataset, by its name.

A robot that acts needs the set of the dataset that it is like: `--statistics-key NAME`. Sets of several datasets lie
in the same files as a single one, each array under NAME/:

    actions.safetensors    bridge/edges, bridge/centres, ..., rt1/edges, ...
    state.safetensors      the same for the robot's state

Axes: N steps, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lapa.data.dataset import ActionSpace
from lapa.errors import UserError, unknown
from lapa.policy.actions import ActionBins, save_arrays
from lapa.policy.heads import HeadKind
from lapa.policy.scale import ActionScale

ActionCodec = ActionBins | ActionScale
# In place of a dataset's name, where one set is for all of them.
ALL = ""


@dataclass(frozen=True)
class KeyedSpace:
    """What the actions of one of several datasets mean. Part of a policy's config."""

    key: str
    space: ActionSpace


@dataclass(frozen=True)
class Statistics:
    """What the actions of one dataset, and the states that go with them, are said in; None before any is known."""

    codec: ActionCodec | None = None
    states: ActionBins | None = None


def fit_codec(
    head: HeadKind, actions_NA: Float[np.ndarray, "N A"], binary: Sequence[bool], num_bins: int
) -> ActionCodec:
    """What a head says these actions in. UserError for actions that are of no use to it."""
    return ActionBins.fit(actions_NA, num_bins, binary) if head == "bins" else ActionScale.fit(actions_NA, binary)


def save_keyed(path: Path, sets: Mapping[str, ActionCodec | None]) -> None:
    """Writes several sets into one file, atomically; no file where there is none."""
    there = {key: of for key, of in sets.items() if of is not None}
    if there:
        save_arrays(path, {f"{key}/{name}": array for key, of in there.items() for name, array in of.arrays().items()})


def most_bins(sets: Iterable[ActionCodec | None]) -> tuple[int, ...]:
    """Of each dimension, the bins of the dataset that has the most; nothing where no set has bins."""
    counts = [of.counts_A.tolist() for of in sets if isinstance(of, ActionBins)]
    return tuple(max(bins) for bins in zip(*counts, strict=True))


def require_key(key: str | None, known: list[str]) -> None:
    """UserError where the statistics of `known`, none where a policy has one set, leave open or lack what is asked."""
    if not known and key is not None:
        raise UserError(f"has one set of statistics, for all that it learned from; leave out --statistics-key {key}")
    if known and key is None:
        raise UserError(f"has statistics of several datasets; say with --statistics-key whose: {', '.join(known)}")
    if known and key not in known:
        raise unknown("--statistics-key", str(key), known)
