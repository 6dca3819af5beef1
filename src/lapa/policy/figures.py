"""Figures of what a policy says beside what was done: errors of action chunks, shares of right latent actions.

`lapa policy measure` fills them in; `docs/metrics.md` says how to read each.

Axes: N measured steps, K action chunk, M counted actions of all chunks, A action dimensions, L latent action length.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lapa.data.dataset import ActionSpace

# A true action has a direction where it is longer than this share of the actions' root mean square.
LEAST_MOTION = 0.1


def action_figures(
    said_NKA: np.ndarray, true_NKA: np.ndarray, counted_NK: np.ndarray, mean_A: np.ndarray, space: ActionSpace
) -> dict[str, Any]:
    """The errors of predicted chunks, in the robot's units, beside those of always saying the mean action.

    counted_NK: False where the episode had ended. A figure that is not defined is None: the R2 and the normalised error
    of a dimension that never changes, the direction where nothing moves.
    """
    said_MA, true_MA = said_NKA[counted_NK].astype(np.float64), true_NKA[counted_NK].astype(np.float64)
    errors_MA, mean_errors_MA = np.abs(said_MA - true_MA), np.abs(mean_A - true_MA)
    variance_A = true_MA.var(0)
    unexplained_A = ((said_MA - true_MA) ** 2).mean(0)
    dimensions = {}
    for number, name in enumerate(space.names):
        error, mean_error = float(errors_MA[:, number].mean()), float(mean_errors_MA[:, number].mean())
        dimensions[name] = {
            "action_error": error,
            "mean_action_error": mean_error,
            "normalised_error": _ratio(error, mean_error),
            "r2": None if variance_A[number] < 1e-12 else float(1 - unexplained_A[number] / variance_A[number]),
        }
    defined = [values["r2"] for values in dimensions.values() if values["r2"] is not None]
    error, mean_error = float(errors_MA.mean()), float(mean_errors_MA.mean())
    moving = [number for number, name in enumerate(space.names) if _moves(name, space.binary[number])]
    first_NA = true_NKA[:, 0, moving].astype(np.float64)
    return {
        "num_steps": len(said_NKA),
        "chunk_steps": said_NKA.shape[1],
        "action_error": error,
        "mean_action_error": mean_error,
        "normalised_error": _ratio(error, mean_error),
        "r2": float(np.mean(defined)) if defined else None,
        "direction": _direction(said_NKA[:, 0, moving], first_NA),
        "mean_action_direction": _direction(np.broadcast_to(mean_A[moving], first_NA.shape), first_NA),
        "action_error_by_step": [
            float(np.abs(said_NKA - true_NKA)[:, step][counted_NK[:, step]].mean())
            for step in range(said_NKA.shape[1])
            if counted_NK[:, step].any()
        ],
        "dimensions": dimensions,
    }


def code_figures(said_NL: np.ndarray, true_NL: np.ndarray) -> dict[str, Any]:
    """Shares of right tokens and right whole latent actions, beside what always saying the most frequent would get."""
    right_NL = said_NL == true_NL
    most_L = [Counter(column).most_common(1)[0][1] / len(true_NL) for column in true_NL.T.tolist()]
    most_whole = Counter(map(tuple, true_NL.tolist())).most_common(1)[0][1] / len(true_NL)
    return {
        "num_labels": len(true_NL),
        "token_accuracy": float(right_NL.mean()),
        "token_accuracy_per_position": [float(share) for share in right_NL.mean(0)],
        "most_frequent_token": float(np.mean(most_L)),
        "most_frequent_token_per_position": most_L,
        "latent_action_accuracy": float(right_NL.all(1).mean()),
        "most_frequent_latent_action": most_whole,
    }


def _moves(name: str, binary: bool) -> bool:
    """Whether a dimension is part of the motion; a gripper's effort would drown it in the cosine."""
    return not binary and "gripper" not in name.lower()


def _direction(said_NA: np.ndarray, true_NA: np.ndarray) -> float | None:
    """Mean cosine where the true action is not tiny; a prediction of zero has the cosine 0."""
    lengths_N = np.linalg.norm(true_NA, axis=1)
    counted_N = lengths_N > LEAST_MOTION * np.sqrt((lengths_N**2).mean())
    if not counted_N.any():
        return None
    said_NA, true_NA, lengths_N = said_NA[counted_N].astype(np.float64), true_NA[counted_N], lengths_N[counted_N]
    said_lengths_N = np.maximum(np.linalg.norm(said_NA, axis=1), 1e-12)
    return float(((said_NA * true_NA).sum(1) / (said_lengths_N * lengths_N)).mean())


def _ratio(value: float, over: float) -> float | None:
    return value / over if over > 1e-12 else None
