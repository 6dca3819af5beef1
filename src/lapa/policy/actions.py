"""Robot actions as bins: equal-frequency binning of each action dimension, made for data with ties.

LAPA (https://arxiv.org/abs/2410.11758) cuts each dimension into 256 bins of equal frequency and drops duplicate edges.
Where many actions share a value (a clipped ±1, a gripper that is open or shut), that loses bins and decodes the shared
value to a midpoint beside it. Here a value that would fill two bins or more has a bin of its own, and the others share
what is left; a dimension of at most 256 distinct values has a bin for each.

A bin decodes to the median of its data (the paper's: to its midpoint): the median errs least in absolute terms, and
where a bin holds a shared value and a few stragglers it is that value exactly.

A dimension that the dataset declares binary (`lapa.data.dataset`) has two bins, whatever its recordings passed
through between its two values.

    bins = ActionBins.fit(actions_TA); bins.decode(bins.encode(actions_TA))

Axes: T time, A action dimensions, N bins of the widest dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lapa.data.dataset import ActionSpace
from lapa.errors import UserError
from lapa.files import atomic_path
from lapa.policy.config import HeadKind

ARRAYS = ("edges", "centres", "counts", "low", "high")
# A binary dimension may pass through other values on its way from one to the other, as a gripper that takes a moment
# to close: BridgeData's does in 2 to 4% of its steps. What lies farther from both values than the first of these
# shares of their distance, in more than the second of all steps, is not binary.
BINARY_TOLERANCE, BINARY_STRAGGLERS = 0.05, 0.1
SHOWN_VALUES = 6


@dataclass(frozen=True, eq=False)
class ActionBins:
    """The bins of A action dimensions.

    edges_AN: upper edge of each bin but the last, padded with infinity; a value on an edge lies above it.
    centres_AN: what each bin decodes to, padded with the last.
    counts_A: how many bins each dimension has.
    low_A, high_A: the range of the data; what lies outside is clamped to the edge bins.
    """

    edges_AN: Float[np.ndarray, "A N"]
    centres_AN: Float[np.ndarray, "A N"]
    counts_A: Int[np.ndarray, "A"]
    low_A: Float[np.ndarray, "A"]
    high_A: Float[np.ndarray, "A"]

    @classmethod
    def fit(cls, actions_TA: Float[np.ndarray, "T A"], num_bins: int = 256, binary: Sequence[bool] = ()) -> ActionBins:
        """Bins for the given actions, at most `num_bins` a dimension, two for a binary one.

        binary: one flag a dimension, as the dataset declares them; none given: none is. UserError for NaN, no
        actions, and a dimension that is declared binary and is not.
        """
        actions_TA, binary = checked_actions(actions_TA, binary)
        if num_bins < 2:
            raise UserError(f"an action dimension needs at least 2 bins, got {num_bins}")
        plain_TA = actions_TA.copy()
        for dimension in np.flatnonzero(binary):
            low, high = two_values(actions_TA[:, dimension], int(dimension))
            plain_TA[:, dimension] = np.where(actions_TA[:, dimension] < middle(low, high), low, high)
        dimensions = [_fit_dimension(values_T, num_bins) for values_T in plain_TA.T]
        counts_A = np.array([len(centres) for _, centres in dimensions], dtype=np.int64)
        width = int(counts_A.max())
        return cls(
            edges_AN=np.stack([np.pad(e, (0, width - len(e)), constant_values=np.inf) for e, _ in dimensions]),
            centres_AN=np.stack([np.pad(c, (0, width - len(c)), mode="edge") for _, c in dimensions]),
            counts_A=counts_A,
            low_A=actions_TA.min(0),
            high_A=actions_TA.max(0),
        )

    @property
    def action_dim(self) -> int:
        return len(self.counts_A)

    def encode(self, actions: Float[np.ndarray, "*T A"]) -> Int[np.ndarray, "*T A"]:
        """The bin of each action; outside the range of the data, the edge bin. UserError for NaN or wrong width."""
        actions = np.asarray(actions, dtype=np.float32)
        require_width(actions, self.action_dim)
        require_finite(actions)
        bins = [np.searchsorted(self.edges_AN[a], actions[..., a], side="right") for a in range(self.action_dim)]
        return np.stack(bins, axis=-1).astype(np.int64)

    def decode(self, bins: Int[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Bins as actions in the robot's units, float32. UserError for a bin that its dimension does not have."""
        bins = np.asarray(bins)
        require_width(bins, self.action_dim)
        for dimension, count in enumerate(self.counts_A):
            column = bins[..., dimension]
            if column.size and not (column.min() >= 0 and column.max() < count):
                raise UserError(
                    f"action dimension {dimension} has bins 0 to {count - 1}, got {column.min()} to {column.max()}"
                )
        return self.centres_AN[np.arange(self.action_dim), bins]

    def count_outside(self, actions: Float[np.ndarray, "*T A"]) -> Int[np.ndarray, "A"]:
        """How many values of each dimension lie outside the fitted range, and so are clamped by `encode`."""
        return count_outside(actions, self.low_A, self.high_A)

    def clamp(self, bins: Int[np.ndarray, "*T A"]) -> Int[np.ndarray, "*T A"]:
        """Bins with those that a dimension does not have, but another dataset's does, as the highest it has."""
        return np.minimum(bins, self.counts_A - 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved, by name."""
        return {name: getattr(self, field) for name, field in _fields().items()}

    def save(self, path: Path) -> None:
        """Writes the arrays as safetensors, atomically."""
        save_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: Path, key: str | None = None) -> ActionBins:
        """Reads what `save` wrote, or the set `key` of several that `save_keyed` wrote.

        UserError naming the file where it is missing or something else.
        """
        arrays = load_arrays(path, ARRAYS, "action bins", key)
        return cls(**{field: arrays[name] for name, field in _fields().items()})


def _fields() -> dict[str, str]:
    return {name: f"{name}_{'AN' if name in ('edges', 'centres') else 'A'}" for name in ARRAYS}


def checked_actions(
    actions_TA: Float[np.ndarray, "T A"], binary: Sequence[bool]
) -> tuple[Float[np.ndarray, "T A"], tuple[bool, ...]]:
    """Actions to take statistics of, as float32, and one flag a dimension. UserError where they are of no use."""
    actions_TA = np.asarray(actions_TA, dtype=np.float32)
    if actions_TA.ndim != 2 or 0 in actions_TA.shape:
        raise UserError(f"actions to take statistics of must be [T, A], at least one row, got {actions_TA.shape}")
    if len(binary) not in (0, actions_TA.shape[1]):
        raise UserError(f"{len(binary)} dimensions are declared binary or not, the actions have {actions_TA.shape[1]}")
    require_finite(actions_TA)
    return actions_TA, tuple(map(bool, binary)) or (False,) * actions_TA.shape[1]


def two_values(values_T: Float[np.ndarray, "T"], dimension: int) -> tuple[float, float]:
    """The lower and the higher value of a binary dimension; both the same where the data hold only one.

    UserError naming the dimension where its values are not of two kinds (see BINARY_TOLERANCE).
    """
    is_high_T = values_T >= middle(values_T.min(), values_T.max())
    low, high = (float(np.median(values_T[kind])) if kind.any() else None for kind in (~is_high_T, is_high_T))
    assert high is not None, "the greatest value is no lower than the middle"
    low = high if low is None else low
    stray_T = np.minimum(np.abs(values_T - low), np.abs(values_T - high)) > BINARY_TOLERANCE * (high - low)
    if stray_T.mean() > BINARY_STRAGGLERS:
        distinct = np.unique(values_T)
        shown = ", ".join(f"{value:g}" for value in distinct[:SHOWN_VALUES])
        more = f" and {len(distinct) - SHOWN_VALUES} more" if len(distinct) > SHOWN_VALUES else ""
        raise UserError(
            f"action dimension {dimension} is declared binary, but {stray_T.mean():.0%} of its values lie away from "
            f"{low:g} and {high:g} (it takes {shown}{more}); take it out of `binary` in the dataset's meta/lapa.json"
        )
    return low, high


def middle(low: float, high: float) -> float:
    """Halfway between two values, where the higher of a binary dimension begins."""
    return float(low) / 2 + float(high) / 2


def count_outside(
    actions: Float[np.ndarray, "*T A"], low_A: Float[np.ndarray, "A"], high_A: Float[np.ndarray, "A"]
) -> Int[np.ndarray, "A"]:
    """How many values of each dimension lie outside a range. UserError for wrong width."""
    actions = np.asarray(actions, dtype=np.float32)
    require_width(actions, len(low_A))
    return ((actions < low_A) | (actions > high_A)).reshape(-1, len(low_A)).sum(0)


def require_width(actions: np.ndarray, action_dim: int) -> None:
    """UserError for actions of another number of dimensions."""
    if actions.ndim < 1 or actions.shape[-1] != action_dim:
        raise UserError(f"expected actions of {action_dim} dimensions, got an array of shape {actions.shape}")


def require_finite(actions: np.ndarray) -> None:
    """UserError naming the first value that is NaN or infinite."""
    broken = ~np.isfinite(actions).reshape(-1, actions.shape[-1])
    if broken.any():
        row, dimension = (int(i) for i in np.argwhere(broken)[0])
        raise UserError(f"actions are not finite: row {row}, dimension {dimension} (and {broken.sum() - 1} more)")


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as safetensors, atomically."""
    with atomic_path(path) as temporary:
        save_file(dict(arrays), temporary)


def load_arrays(path: Path, names: Sequence[str], what: str, key: str | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of these names, those under KEY/ where the file has any (files of one set once had no key).

    Raises UserError naming the file where it is missing or lacks any of the names.
    """
    try:
        arrays = load_file(path)
        prefix = f"{key}/" if key is not None and any(name.startswith(f"{key}/") for name in arrays) else ""
        return {name: arrays[f"{prefix}{name}"] for name in names}
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the policy folder is incomplete, finetune it again") from None
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not a file of {what} ({error}); finetune the policy again") from None


def _fit_dimension(values_T: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner edges (float64) and centres (float32) of one dimension."""
    distinct, counts = np.unique(values_T, return_counts=True)
    bins = np.arange(len(distinct)) if len(distinct) <= num_bins else _bins_of_distinct(counts, num_bins)
    firsts = np.flatnonzero(np.diff(bins, prepend=-1))
    edges = (distinct[firsts[1:]].astype(np.float64) + distinct[firsts[1:] - 1]) / 2
    groups = np.split(np.sort(values_T), np.cumsum(counts)[firsts[1:] - 1])
    return edges, np.array([np.median(group) for group in groups], dtype=np.float32)


def _bins_of_distinct(counts_U: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each of U sorted distinct values, given how often it occurs: at most `num_bins`, in order.

    A heavy value fills two plain bins or more, so there are fewer than num_bins / 2 of them. Each takes one bin and
    may cut one more in two; the bins of equal frequency that the light values share are as many as that leaves.
    """
    heavy_U = counts_U * num_bins > 2 * counts_U.sum()
    light_U = np.where(heavy_U, 0, counts_U)
    num_shared = num_bins - 2 * int(heavy_U.sum())
    middle_rank_U = (np.cumsum(light_U) - light_U / 2) / max(1, light_U.sum())
    shared_U = np.minimum((middle_rank_U * num_shared).astype(np.int64), num_shared - 1)
    after_heavy_U = np.concatenate([[False], heavy_U[:-1]])
    starts_U = heavy_U | after_heavy_U | (np.diff(shared_U, prepend=-1) > 0)
    return np.cumsum(starts_U) - 1


PERCENTILES = (1, 99)
SCALE_ARRAYS = ("scale_low", "scale_high", "scale_binary")


@dataclass(frozen=True, eq=False)
class ActionScale:
    """The scale of A action dimensions.

    low_A, high_A: what becomes -1 and 1, float32. binary_A: the dimensions that take no other value.
    """

    low_A: Float[np.ndarray, "A"]
    high_A: Float[np.ndarray, "A"]
    binary_A: Bool[np.ndarray, "A"]

    @classmethod
    def fit(cls, actions_TA: Float[np.ndarray, "T A"], binary: Sequence[bool] = ()) -> ActionScale:
        """The scale of the given actions.

        binary: one flag a dimension, as the dataset declares them; none given: none is. UserError for NaN, no
        actions, and a dimension that is declared binary and is not.
        """
        actions_TA, binary = checked_actions(actions_TA, binary)
        ranges = [
            two_values(values_T, dimension) if binary[dimension] else _usual_range(values_T)
            for dimension, values_T in enumerate(actions_TA.T)
        ]
        low_A, high_A = np.array(ranges, dtype=np.float32).T.copy()
        return cls(low_A, high_A, np.array(binary))

    @property
    def action_dim(self) -> int:
        return len(self.low_A)

    def encode(self, actions: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Actions as numbers in [-1, 1], float32. UserError for NaN or wrong width."""
        actions = self._checked(actions)
        low_A, span_A = self.low_A.astype(np.float64), self._span_A
        scaled = np.where(span_A > 0, 2 * (actions - low_A) / np.where(span_A > 0, span_A, 1) - 1, 0)
        sides = np.where(actions < self._middle_A, -1, 1) * (span_A > 0)
        return np.where(self.binary_A, sides, np.clip(scaled, -1, 1)).astype(np.float32)

    def decode(self, scaled: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Numbers as actions in the robot's units, float32; beyond [-1, 1] clamped. UserError for NaN, wrong width."""
        scaled = self._checked(scaled)
        share = (np.clip(scaled, -1, 1) + 1) / 2
        actions = (1 - share) * self.low_A + share * self.high_A
        sides = np.where(scaled < 0, self.low_A, self.high_A)
        return np.where(self.binary_A, sides, actions).astype(np.float32)

    def count_outside(self, actions: Float[np.ndarray, "*T A"]) -> Int[np.ndarray, "A"]:
        """How many values of each dimension lie beyond what becomes -1 and 1, and so are clamped by `encode`."""
        return count_outside(actions, self.low_A, self.high_A)

    def clamp(self, scaled: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """As they are: `decode` takes any number."""
        return scaled

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved, by name."""
        return dict(zip(SCALE_ARRAYS, (self.low_A, self.high_A, self.binary_A), strict=True))

    def save(self, path: Path) -> None:
        """Writes the arrays as safetensors, atomically."""
        save_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: Path, key: str | None = None) -> ActionScale:
        """Reads what `save` wrote, or the set `key` of several that `save_keyed` wrote.

        UserError naming the file where it is missing or something else.
        """
        return cls(*load_arrays(path, SCALE_ARRAYS, "action scales", key).values())

    def _checked(self, values: np.ndarray) -> np.ndarray:
        """In double precision: then both ends come back exactly, and no span of float32 numbers overflows."""
        values = np.asarray(values, dtype=np.float64)
        require_width(values, self.action_dim)
        require_finite(values)
        return values

    @property
    def _span_A(self) -> Float[np.ndarray, "A"]:
        return self.high_A.astype(np.float64) - self.low_A

    @property
    def _middle_A(self) -> Float[np.ndarray, "A"]:
        return np.array([middle(low, high) for low, high in zip(self.low_A, self.high_A, strict=True)])


def _usual_range(values_T: Float[np.ndarray, "T"]) -> tuple[float, float]:
    low, high = np.percentile(values_T.astype(np.float64), PERCENTILES)
    return (float(low), float(high)) if low < high else (float(values_T.min()), float(values_T.max()))


ActionCodec = ActionBins | ActionScale


@dataclass(frozen=True)
class KeyedSpace:
    """What the actions of a dataset mean: part of a policy's config. key: the name of the dataset.

    fps: actions a second; None where datasets of different rates share one set of statistics, or it is not known.
    """

    key: str
    space: ActionSpace
    fps: float | None = None


@dataclass(frozen=True)
class Statistics:
    """Bins or scale of the actions of a dataset, and the bins of its states where the policy reads them."""

    codec: ActionCodec
    states: ActionBins | None = None


def fit_codec(
    head: HeadKind, actions_NA: Float[np.ndarray, "N A"], binary: Sequence[bool], num_bins: int
) -> ActionCodec:
    """The bins or scale in which a head predicts these actions. Raises UserError where they are of no use to it."""
    return ActionBins.fit(actions_NA, num_bins, binary) if head == "bins" else ActionScale.fit(actions_NA, binary)


def save_keyed(path: Path, sets: Mapping[str, ActionCodec | None]) -> None:
    """Writes several sets into one file, each array under KEY/, atomically; no file where there is none."""
    arrays = {f"{key}/{name}": a for key, each in sets.items() if each for name, a in each.arrays().items()}
    if arrays:
        save_arrays(path, arrays)


def most_bins(sets: Iterable[ActionCodec | None]) -> tuple[int, ...]:
    """Of each dimension, the bins of the dataset that has the most; nothing where no set has bins."""
    counts = [each.counts_A.tolist() for each in sets if isinstance(each, ActionBins)]
    return tuple(max(bins) for bins in zip(*counts, strict=True))
