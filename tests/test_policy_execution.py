"""From chunks to single actions: when the policy is asked, what is averaged, what is voted."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lapa.policy.execution import Execution, RecedingHorizon, TemporalEnsemble


class Forecaster:
    """Says at its n-th call (from 0) that the action j steps ahead is 100 n + j, in two dimensions."""

    def __init__(self, chunk: int) -> None:
        self.chunk, self.calls = chunk, 0

    def __call__(self) -> np.ndarray:
        ahead_K = np.arange(self.chunk, dtype=np.float32)
        self.calls += 1
        return np.stack([100 * (self.calls - 1) + ahead_K, -ahead_K], axis=1)


def play(plan: Execution, ask: Forecaster, steps: int) -> list[float]:
    return [float(plan.next(ask)[0]) for _ in range(steps)]


def test_the_beginning_of_each_chunk_is_executed() -> None:
    ask = Forecaster(5)
    plan = RecedingHorizon(3)
    assert play(plan, ask, 7) == [0, 1, 2, 100, 101, 102, 200]
    assert not plan.due
    plan.reset()
    assert plan.due
    assert play(plan, ask, 2) == [300, 301]


def test_without_a_number_whole_chunks_are_executed() -> None:
    ask = Forecaster(2)
    assert play(RecedingHorizon(), ask, 5) == [0, 1, 100, 101, 200]
    assert ask.calls == 3


def test_overlapping_predictions_are_averaged_with_the_oldest_first() -> None:
    ask, decay = Forecaster(3), 0.5
    plan = TemporalEnsemble(decay)
    w0, w1, w2 = np.exp(-decay * np.arange(3))
    told = [
        0.0,
        (w0 * 1 + w1 * 100) / (w0 + w1),
        (w0 * 2 + w1 * 101 + w2 * 200) / (w0 + w1 + w2),
        # The first chunk has ended: the oldest of those left has weight 1.
        (w0 * 102 + w1 * 201 + w2 * 300) / (w0 + w1 + w2),
    ]
    assert play(plan, ask, 4) == pytest.approx(told)
    assert plan.next(ask).dtype == np.float32
    plan.reset()
    assert play(plan, Forecaster(3), 1) == [0.0]


def test_the_policy_may_be_asked_less_often() -> None:
    ask = Forecaster(4)
    plan = TemporalEnsemble(0.0, every=2)
    assert play(plan, ask, 6) == [0, 1, (2 + 100) / 2, (3 + 101) / 2, (102 + 200) / 2, (103 + 201) / 2]
    assert ask.calls == 3 and plan.due


@pytest.mark.parametrize(("decay", "told"), [(2000.0, 1.0), (-2000.0, 100.0)])
def test_a_large_decay_leaves_one_prediction(decay: float, told: float) -> None:
    assert play(TemporalEnsemble(decay), Forecaster(2), 2)[1] == pytest.approx(told)


@pytest.mark.parametrize(
    ("decay", "said", "told"),
    [
        (0.0, [-1, -1, 1], -1),
        (-2.0, [-1, -1, 1], 1),
        (0.0, [-1, 1], 1),
        (0.0, [1, -1], -1),
        (0.01, [0.5, 0.2], 0.5),
    ],
)
def test_a_binary_dimension_is_voted(decay: float, said: list[float], told: float) -> None:
    plan = TemporalEnsemble(decay, binary=(False, True))
    for value in said:
        action_A = plan.next(lambda value=value: np.full((3, 2), value, np.float32))
    assert action_A[1] == np.float32(told)
    assert min(said) < action_A[0] < max(said)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="execute is 0"):
        RecedingHorizon(0)
    with pytest.raises(ValueError, match="cannot execute 4 actions of a chunk of 3"):
        RecedingHorizon(4).next(Forecaster(3))
    with pytest.raises(ValueError, match="does not last for 4 steps"):
        TemporalEnsemble(0.1, every=4).next(Forecaster(3))
    with pytest.raises(ValueError, match="decay is nan"):
        TemporalEnsemble(float("nan"))
    with pytest.raises(ValueError, match="every is 0"):
        TemporalEnsemble(0.1, every=0)
    with pytest.raises(ValueError, match=r"got the shape \[2\]"):
        RecedingHorizon().next(lambda: np.zeros(2))


def test_a_robot_needs_no_torch_for_it() -> None:
    code = "import sys, lapa.policy.execution; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
