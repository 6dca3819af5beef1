"""How chunks of predicted actions become single actions on the robot. Needs no torch.

`RecedingHorizon` executes the first actions of a chunk, then asks for the next chunk. `TemporalEnsemble` asks before
the chunk ends and averages all predictions of a time step, which is smoother (ACT, https://arxiv.org/abs/2304.13705).

    plan = TemporalEnsemble(decay=0.01, binary=policy.action_space.binary)
    plan.reset()                                                # at the start of each episode
    action_A = plan.next(lambda: policy.infer([observation])[0])

Axes: K action chunk, A action dimensions, P predictions of one time step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Float

from lapa.errors import UserError

Ask = Callable[[], Float[np.ndarray, "K A"]]


class Execution(Protocol):
    """Decides when the policy is asked for a chunk, and which action to execute."""

    @property
    def due(self) -> bool:
        """Whether the next action needs a new chunk."""

    def reset(self) -> None:
        """Forgets all chunks, at the start of an episode."""

    def next(self, ask: Ask) -> Float[np.ndarray, "A"]:
        """The action to execute now. `ask` returns the chunk that begins now; it is called only if `due`."""


class RecedingHorizon:
    """Executes the first actions of each chunk, then asks for the next. execute: how many; None: the whole chunk."""

    def __init__(self, execute: int | None = None) -> None:
        if execute is not None and execute < 1:
            raise UserError(f"execute is {execute}; it must be at least 1")
        self._execute = execute
        self.reset()

    @property
    def due(self) -> bool:
        return self._step >= len(self._chunk_KA)

    def reset(self) -> None:
        self._chunk_KA, self._step = np.zeros((0, 0), np.float32), 0

    def next(self, ask: Ask) -> Float[np.ndarray, "A"]:
        if self.due:
            chunk_KA = _chunk(ask())
            if self._execute is not None and self._execute > len(chunk_KA):
                raise UserError(f"cannot execute {self._execute} actions of a chunk of {len(chunk_KA)}")
            self._chunk_KA, self._step = chunk_KA[: self._execute], 0
        self._step += 1
        return self._chunk_KA[self._step - 1]


class TemporalEnsemble:
    """Asks every `every` steps and averages all chunks' predictions of the current time step.

    As in ACT, the weight of prediction i is exp(-decay * i), where i = 0 is the OLDEST: a decay above 0 (ACT's is 0.01)
    weights old predictions more and is smoother, 0 is the plain mean, below 0 weights new ones more and reacts faster.
    binary: dimensions with two values, whose mean would be neither: the value of more weight is executed, and in a tie
    that of the newest prediction.
    """

    def __init__(self, decay: float, every: int = 1, binary: Sequence[bool] = ()) -> None:
        if not np.isfinite(decay):
            raise UserError(f"the ensemble's decay is {decay}; it must be a finite number (0.01 is usual)")
        if every < 1:
            raise UserError(f"every is {every}; it must be at least 1 step")
        self._decay, self._every = decay, every
        self._binary_A = np.array(binary, bool)
        self.reset()

    @property
    def due(self) -> bool:
        return self._step % self._every == 0

    def reset(self) -> None:
        self._step = 0
        # Chunks that cover the current step, oldest first, with the step at which each begins.
        self._chunks: list[tuple[int, np.ndarray]] = []

    def next(self, ask: Ask) -> Float[np.ndarray, "A"]:
        if self.due:
            chunk_KA = _chunk(ask())
            if len(chunk_KA) < self._every:
                raise UserError(f"a chunk of {len(chunk_KA)} actions does not last for {self._every} steps")
            self._chunks.append((self._step, chunk_KA))
        self._chunks = [(begun, chunk) for begun, chunk in self._chunks if self._step - begun < len(chunk)]
        predictions_PA = np.stack([chunk[self._step - begun] for begun, chunk in self._chunks])
        self._step += 1
        return self._combine(predictions_PA)

    def _combine(self, predictions_PA: np.ndarray) -> np.ndarray:
        exponents_P = -self._decay * np.arange(len(predictions_PA))
        # The largest weight is 1, so that no decay overflows.
        weights_P = np.exp(exponents_P - exponents_P.max())
        action_A = np.average(predictions_PA.astype(np.float64), axis=0, weights=weights_P)
        for dimension in np.flatnonzero(self._binary_A):
            values_P = predictions_PA[:, dimension]
            support_P = (values_P[:, None] == values_P) @ weights_P
            action_A[dimension] = values_P[np.isclose(support_P, support_P.max())][-1]
        return action_A.astype(predictions_PA.dtype)


def _chunk(chunk_KA: np.ndarray) -> np.ndarray:
    if chunk_KA.ndim != 2 or not len(chunk_KA):
        raise UserError(f"expected a chunk of actions [K, A] with at least one, got the shape {list(chunk_KA.shape)}")
    return chunk_KA
