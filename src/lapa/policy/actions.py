"""Robot actions as a policy predicts them, and the statistics that turn them into the robot's units and back.

ActionBins   a bin of each dimension, for the head `bins` and for the robot's state
ActionScale  a number in [-1, 1] for each dimension, for the heads `chunk` and `flow`
Statistics   either of a dataset's actions, and the bins of its states

    bins = ActionBins.fit(actions_TA); bins.decode(bins.encode(actions_TA))

LAPA (https://arxiv.org/abs/2410.11758) cuts each dimension into 256 bins of equal frequency and drops duplicate edges.
Where many actions share a value (a clipped ±1, a gripper that is open or closed), that loses bins, and the shared value
decodes to a midpoint near it. Here a value that would fill two bins or more has a bin of its own, and the others share
the remaining bins; a dimension of at most 256 distinct values has a bin for each. A bin decodes to the median of its
data (the paper's: to its midpoint), which has the least absolute error and is exactly the shared value where a bin
holds one and a few others.

The scale is linear, from the 1st to the 99th percentile of each dimension; values beyond are clamped. A dimension that
hardly moves, as a rotation that is float dust but in a few steps, is scaled from its least to its greatest value, and
its dust is one value for the bins: percentiles would make the dust all that a policy can do.

A dimension that the dataset declares binary (`lapa.data.dataset`) has two bins, or the ends of the scale, whatever
values its recordings passed through between the two.

Axes: T time, A action dimensions, N bins of the widest dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lapa.console import warn
from lapa.data.dataset import ActionSpace
from lapa.errors import UserError
from lapa.files import atomic_path
from lapa.policy.config import HeadKind

PERCENTILES = (1, 99)
# A binary dimension may pass through other values on its way from one to the other, as a gripper that takes a moment
# to close: BridgeData's does in 2 to 4% of its steps. It is not binary where more than BINARY_STRAGGLERS of its values
# are farther from both than BINARY_TOLERANCE of their distance.
BINARY_TOLERANCE, BINARY_STRAGGLERS = 0.05, 0.1
SHOWN_VALUES = 6
# A dimension hardly moves where its percentiles span less than this share of its whole range.
HARDLY_MOVES = 1e-3
# A warning names a dimension of which a codec keeps less than this share of the range.
LEAST_KEPT = 0.5


@dataclass(frozen=True, eq=False)
class ActionCodec(ABC):
    """Turns actions in the robot's units into what a head predicts, and back.

    low_A, high_A: the range of each dimension, float32; `encode` clamps values outside.
    """

    low_A: Float[np.ndarray, "A"]
    high_A: Float[np.ndarray, "A"]

    # Name for messages; name of each array in a file -> name of its field.
    NAME: ClassVar[str]
    ARRAYS: ClassVar[Mapping[str, str]]

    @abstractmethod
    def encode(self, actions: Float[np.ndarray, "*T A"]) -> np.ndarray:
        """Actions as the head predicts them. Raises UserError for NaN or a wrong width."""

    @abstractmethod
    def decode(self, encoded: np.ndarray) -> Float[np.ndarray, "*T A"]:
        """Predictions as actions in the robot's units, float32. Raises UserError for a wrong width."""

    def clamp(self, encoded: np.ndarray) -> np.ndarray:
        """Predictions as `decode` accepts them."""
        return encoded

    @property
    def action_dim(self) -> int:
        return len(self.low_A)

    def count_outside(self, actions: Float[np.ndarray, "*T A"]) -> Int[np.ndarray, "A"]:
        """How many values of each dimension lie outside the range. Raises UserError for a wrong width."""
        actions = np.asarray(actions, dtype=np.float32)
        self._require_width(actions)
        return ((actions < self.low_A) | (actions > self.high_A)).reshape(-1, self.action_dim).sum(0)

    def kept_range(self, actions_NA: Float[np.ndarray, "N A"]) -> Float[np.ndarray, "A"]:
        """The share of each dimension's range, from its least to its greatest value, that can be predicted."""
        ends_2A = np.stack([actions_NA.min(0), actions_NA.max(0)])
        kept_2A = self.decode(self.encode(ends_2A))
        kept_A, range_A = (np.diff(each.astype(np.float64), axis=0)[0] for each in (kept_2A, ends_2A))
        return np.where(range_A > 0, kept_A / np.where(range_A > 0, range_A, 1), 1.0)

    def save(self, path: Path) -> None:
        """Writes the arrays as safetensors, atomically."""
        _save_arrays(path, self.arrays())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that `save` writes, by name."""
        return {name: getattr(self, field) for name, field in self.ARRAYS.items()}

    @classmethod
    def load(cls, path: Path, key: str | None = None) -> Self:
        """Reads a file of `save`, or the set `key` from a file of `save_keyed`; files of one set once had no key.

        Raises UserError naming the file where it is missing or something else.
        """
        try:
            arrays = load_file(path)
            prefix = f"{key}/" if key is not None and any(name.startswith(f"{key}/") for name in arrays) else ""
            own = {name: arrays[f"{prefix}{name}"] for name in cls.ARRAYS}
        except FileNotFoundError:
            raise UserError(f"{path}: missing; the folder is incomplete, train its model again") from None
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{path}: not a file of {cls.NAME} ({error}); train its model again") from None
        for name, values in own.items():
            # Edges are padded with infinity.
            if np.isnan(values).any() or (name != "edges" and np.isinf(values).any()):
                raise UserError(f"{path}: {prefix}{name} holds numbers that are not finite; train its model again")
        return cls(**{field: own[name] for name, field in cls.ARRAYS.items()})

    def _require_width(self, actions: np.ndarray) -> None:
        if actions.ndim < 1 or actions.shape[-1] != self.action_dim:
            raise UserError(f"expected actions of {self.action_dim} dimensions, got an array of shape {actions.shape}")


@dataclass(frozen=True, eq=False)
class ActionBins(ActionCodec):
    """The bins of A action dimensions.

    edges_AN: upper edge of each bin but the last, padded with infinity; a value on an edge lies above it.
    centres_AN: the action that each bin decodes to, padded with the last.
    counts_A: how many bins each dimension has.
    """

    edges_AN: Float[np.ndarray, "A N"]
    centres_AN: Float[np.ndarray, "A N"]
    counts_A: Int[np.ndarray, "A"]

    NAME = "action bins"
    ARRAYS: ClassVar = {
        "edges": "edges_AN",
        "centres": "centres_AN",
        "counts": "counts_A",
        "low": "low_A",
        "high": "high_A",
    }

    @classmethod
    def fit(cls, actions_TA: Float[np.ndarray, "T A"], num_bins: int = 256, binary: Sequence[bool] = ()) -> ActionBins:
        """Bins for the given actions: at most `num_bins` for each dimension, two for a binary one.

        binary: one flag for each dimension, as the dataset declares them; none given: no dimension is. Raises
        UserError for NaN, no actions, and a dimension that is declared binary and is not.
        """
        actions_TA, binary = _checked_actions(actions_TA, binary)
        if num_bins < 2:
            raise UserError(f"an action dimension needs at least 2 bins, got {num_bins}")
        plain_TA = actions_TA.copy()
        for dimension in np.flatnonzero(binary):
            low, high = _two_values(actions_TA[:, dimension], int(dimension))
            plain_TA[:, dimension] = np.where(actions_TA[:, dimension] < _middle(low, high), low, high)
        dimensions = [_fit_dimension(values_T, num_bins) for values_T in plain_TA.T]
        counts_A = np.array([len(centres) for _, centres in dimensions], dtype=np.int64)
        width = int(counts_A.max())
        return cls(
            low_A=actions_TA.min(0),
            high_A=actions_TA.max(0),
            edges_AN=np.stack([np.pad(e, (0, width - len(e)), constant_values=np.inf) for e, _ in dimensions]),
            centres_AN=np.stack([np.pad(c, (0, width - len(c)), mode="edge") for _, c in dimensions]),
            counts_A=counts_A,
        )

    def encode(self, actions: Float[np.ndarray, "*T A"]) -> Int[np.ndarray, "*T A"]:
        """The bin of each action; outside the range of the data, the first or last bin."""
        actions = np.asarray(actions, dtype=np.float32)
        self._require_width(actions)
        _require_finite(actions)
        bins = [np.searchsorted(self.edges_AN[a], actions[..., a], side="right") for a in range(self.action_dim)]
        return np.stack(bins, axis=-1).astype(np.int64)

    def decode(self, encoded: Int[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """The action of each bin. Raises UserError also for a bin that its dimension does not have."""
        bins = np.asarray(encoded)
        self._require_width(bins)
        for dimension, count in enumerate(self.counts_A):
            column = bins[..., dimension]
            if column.size and not (column.min() >= 0 and column.max() < count):
                raise UserError(
                    f"action dimension {dimension} has bins 0 to {count - 1}, got {column.min()} to {column.max()}"
                )
        return self.centres_AN[np.arange(self.action_dim), bins]

    def clamp(self, encoded: Int[np.ndarray, "*T A"]) -> Int[np.ndarray, "*T A"]:
        """Bins that a dimension lacks, but another dataset's has, as its highest bin."""
        return np.minimum(encoded, self.counts_A - 1)


@dataclass(frozen=True, eq=False)
class ActionScale(ActionCodec):
    """The scale of A action dimensions, whose low_A becomes -1 and high_A 1.

    binary_A: the dimensions that take only these two values.
    """

    binary_A: Bool[np.ndarray, "A"]

    NAME = "action scales"
    ARRAYS: ClassVar = {"scale_low": "low_A", "scale_high": "high_A", "scale_binary": "binary_A"}

    @classmethod
    def fit(cls, actions_TA: Float[np.ndarray, "T A"], binary: Sequence[bool] = ()) -> ActionScale:
        """The scale of the given actions. `binary` and errors are those of `ActionBins.fit`."""
        actions_TA, binary = _checked_actions(actions_TA, binary)
        ranges = [
            _two_values(values_T, dimension) if binary[dimension] else _usual_range(values_T)
            for dimension, values_T in enumerate(actions_TA.T)
        ]
        low_A, high_A = np.array(ranges, dtype=np.float32).T.copy()
        return cls(low_A, high_A, np.array(binary))

    def encode(self, actions: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Actions as numbers in [-1, 1], float32."""
        actions = self._checked(actions)
        low_A = self.low_A.astype(np.float64)
        span_A = self.high_A.astype(np.float64) - low_A
        middle_A = np.array([_middle(low, high) for low, high in zip(self.low_A, self.high_A, strict=True)])
        scaled = np.where(span_A > 0, 2 * (actions - low_A) / np.where(span_A > 0, span_A, 1) - 1, 0)
        sides = np.where(actions < middle_A, -1, 1) * (span_A > 0)
        return np.where(self.binary_A, sides, np.clip(scaled, -1, 1)).astype(np.float32)

    def decode(self, encoded: Float[np.ndarray, "*T A"]) -> Float[np.ndarray, "*T A"]:
        """Numbers, clamped to [-1, 1], as actions. Raises UserError also for NaN."""
        scaled = self._checked(encoded)
        share = (np.clip(scaled, -1, 1) + 1) / 2
        actions = (1 - share) * self.low_A + share * self.high_A
        sides = np.where(scaled < 0, self.low_A, self.high_A)
        return np.where(self.binary_A, sides, actions).astype(np.float32)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        """In double precision, where both ends come back exactly and no span of float32 numbers overflows."""
        values = np.asarray(values, dtype=np.float64)
        self._require_width(values)
        _require_finite(values)
        return values


@dataclass(frozen=True)
class KeyedSpace:
    """The meaning of a dataset's actions: part of a policy's config. key: the name of the dataset.

    fps: actions per second; None where datasets of different rates share one set of statistics, or it is not known.
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
    """The bins or scale in which a head predicts these actions. Raises UserError as `ActionBins.fit` does."""
    return ActionBins.fit(actions_NA, num_bins, binary) if head == "bins" else ActionScale.fit(actions_NA, binary)


def warn_of_ranges(name: str, codec: ActionCodec, actions_NA: Float[np.ndarray, "N A"], names: Sequence[str]) -> None:
    """Warns of the dimensions whose clamping loses most of their range, and of those that hardly move.

    name: of the dataset; names: of the dimensions.
    """
    kept_A = codec.kept_range(actions_NA)
    if narrow := [f"{names[a]} to {kept:.1%}" for a, kept in enumerate(kept_A) if kept < LEAST_KEPT]:
        warn(
            f"actions of {name}: rare values are clamped, which narrows {', '.join(narrow)} of its range; if these are "
            "moves that the policy needs, give more episodes with them"
        )
    still = [f"{names[a]} ({v.min():g} to {v.max():g})" for a, v in enumerate(actions_NA.T) if _hardly_moves(v)]
    if still:
        warn(
            f"actions of {name}: nearly all values of {', '.join(still)} are one; its whole range is kept for the "
            "others; if these are errors of the recording, leave their episodes out"
        )


def save_keyed(path: Path, sets: Mapping[str, ActionCodec | None]) -> None:
    """Writes several sets into one file, each array under KEY/, atomically; no file where there is none."""
    arrays = {f"{key}/{name}": a for key, each in sets.items() if each for name, a in each.arrays().items()}
    if arrays:
        _save_arrays(path, arrays)


def most_bins(sets: Iterable[ActionCodec | None]) -> tuple[int, ...]:
    """The most bins that any of the sets has, for each dimension; empty where no set has bins."""
    counts = [each.counts_A.tolist() for each in sets if isinstance(each, ActionBins)]
    return tuple(max(bins) for bins in zip(*counts, strict=True))


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary:
        save_file(arrays, temporary)


def _checked_actions(
    actions_TA: Float[np.ndarray, "T A"], binary: Sequence[bool]
) -> tuple[Float[np.ndarray, "T A"], tuple[bool, ...]]:
    """Actions as float32, and one flag for each dimension. Raises UserError where they allow no statistics."""
    actions_TA = np.asarray(actions_TA, dtype=np.float32)
    if actions_TA.ndim != 2 or 0 in actions_TA.shape:
        raise UserError(f"actions to take statistics of must be [T, A], at least one row, got {actions_TA.shape}")
    if len(binary) not in (0, actions_TA.shape[1]):
        raise UserError(f"{len(binary)} dimensions are declared binary or not, the actions have {actions_TA.shape[1]}")
    _require_finite(actions_TA)
    return actions_TA, tuple(map(bool, binary)) or (False,) * actions_TA.shape[1]


def _require_finite(actions: np.ndarray) -> None:
    broken = ~np.isfinite(actions).reshape(-1, actions.shape[-1])
    if broken.any():
        row, dimension = (int(i) for i in np.argwhere(broken)[0])
        raise UserError(f"actions are not finite: row {row}, dimension {dimension} (and {broken.sum() - 1} more)")


def _two_values(values_T: Float[np.ndarray, "T"], dimension: int) -> tuple[float, float]:
    """The lower and the higher value of a binary dimension; both the same where the data hold only one.

    Raises UserError naming the dimension where its values are not of two kinds (see BINARY_TOLERANCE).
    """
    is_high_T = values_T >= _middle(values_T.min(), values_T.max())
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


def _middle(low: float, high: float) -> float:
    """Halfway between two values, where the higher of a binary dimension begins."""
    return float(low) / 2 + float(high) / 2


def _hardly_moves(values_T: Float[np.ndarray, "T"]) -> bool:
    """Whether the percentiles are next to each other, and other values far from them."""
    low, high = np.percentile(values_T.astype(np.float64), PERCENTILES)
    return bool(high - low < HARDLY_MOVES * (float(values_T.max()) - float(values_T.min())))


def _usual_range(values_T: Float[np.ndarray, "T"]) -> tuple[float, float]:
    """The percentiles, or the whole range of a dimension that hardly moves."""
    if _hardly_moves(values_T):
        return float(values_T.min()), float(values_T.max())
    low, high = np.percentile(values_T.astype(np.float64), PERCENTILES)
    return float(low), float(high)


def _without_dust(values_T: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """The values, with those near the median put on it where the dimension hardly moves."""
    if not _hardly_moves(values_T):
        return values_T
    median = np.median(values_T)
    distance_T = np.abs(values_T.astype(np.float64) - median)
    dust = HARDLY_MOVES * (float(values_T.max()) - float(values_T.min()))
    return np.where(distance_T <= dust, median, values_T).astype(np.float32)


def _fit_dimension(values_T: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner edges (float64) and centres (float32) of one dimension."""
    distinct, counts = np.unique(values_T, return_counts=True)
    if len(distinct) > num_bins:
        values_T = _without_dust(values_T)
        distinct, counts = np.unique(values_T, return_counts=True)
    bins = np.arange(len(distinct)) if len(distinct) <= num_bins else _bins_of_distinct(counts, num_bins)
    firsts = np.flatnonzero(np.diff(bins, prepend=-1))
    edges = (distinct[firsts[1:]].astype(np.float64) + distinct[firsts[1:] - 1]) / 2
    groups = np.split(np.sort(values_T), np.cumsum(counts)[firsts[1:] - 1])
    return edges, np.array([np.median(group) for group in groups], dtype=np.float32)


def _bins_of_distinct(counts_U: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each of U sorted distinct values, given how often it occurs: at most `num_bins`, in order.

    A heavy value would fill two plain bins or more, so there are fewer than num_bins / 2 of them. Each takes one bin
    and may cut one more in two; the light values share the remaining bins at equal frequency.
    """
    heavy_U = counts_U * num_bins > 2 * counts_U.sum()
    light_U = np.where(heavy_U, 0, counts_U)
    num_shared = num_bins - 2 * int(heavy_U.sum())
    middle_rank_U = (np.cumsum(light_U) - light_U / 2) / max(1, light_U.sum())
    shared_U = np.minimum((middle_rank_U * num_shared).astype(np.int64), num_shared - 1)
    after_heavy_U = np.concatenate([[False], heavy_U[:-1]])
    starts_U = heavy_U | after_heavy_U | (np.diff(shared_U, prepend=-1) > 0)
    return np.cumsum(starts_U) - 1
