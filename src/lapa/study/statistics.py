"""Success rates of a study's arms, differences, gap recovered and ranks, with paired bootstrap intervals.

An arm's success rate is the mean over tasks of the mean over seeds of the mean over rollouts: each task has the same
weight. All arms of a seed play the same goals, named by task and episode. A draw of the bootstrap takes episodes of
each task with replacement, the same for every arm and seed: differences of goals cancel in differences of arms, and an
episode that several seeds played counts once. Each draw adds the error of a mean over few trainings: Student's t with
one degree of freedom fewer than seeds, times the standard error of the seeds' rates, the same draw for every arm. With
one seed intervals cover goals alone. Tasks are not drawn: the intervals hold for these tasks.

In 400 simulated studies (6 tasks, 50 goals; rates vary by 15 points between goals, by 0, 4 or 8 between seeds) the
interval contained the true rate in 95%, 72%, 45% with 1 seed; 99%, 99%, 99% with 2; 99%, 97%, 95% with 3; 99%, 97%, 96%
with 5; the true difference about as often. Resampling seeds, scaled by sqrt(S / (S - 1)), contained it in 78% with 2
and 86% with 3, at 8 points.

    groups = compare(load_results([Path("runs/study")]))
    groups[0].cells["lapa"].versus["scratch"]        # Estimate(value=0.12, low=0.04, high=0.20, num_seeds=3)

Gap recovered is that of LAPA (Ye et al., https://arxiv.org/abs/2410.11758).
Axes: A arms, S seeds, K tasks, E episodes, D draws of goals, N draws of goals and trainings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from einops import rearrange
from scipy.stats import rankdata

from lapa.study.results import ARMS, Arm, ArmResult, Rollout, Setting, settings_of

NUM_DRAWS = 2000  # of goals
TRAININGS = 8  # drawn for each of them: the tails of Student's t are long, and cost less than goals
LEAST_GAP = 0.02  # of actionvla over scratch, for a value of gap recovered where the gap may be chance
LEAST_GOALS = 10  # a task, in the mean over tasks, for an interval
TOO_FEW = f"too few rollouts, under {LEAST_GOALS} goals a task"


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval (None where too few goals were played), over `num_seeds` seeds."""

    value: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        return 0 if self.low is None or self.high is None else int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Gap:
    """(arm - scratch) / (actionvla - scratch). note: why there is no interval, or no value."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    num_seeds: int = 0


@dataclass(frozen=True)
class Cell:
    """One arm in one setting.

    versus: this arm minus another, paired, on the goals that both played: scratch, and for lapa captions and vpt, too.
    mean_rank: 1 is best; mean over tasks and seeds that all arms of the group played, ties averaged.
    """

    arm: Arm
    seeds: tuple[int, ...]
    num_rollouts: int
    success: Estimate
    by_task: dict[str, float]
    versus: dict[Arm, Estimate]
    gap: Gap | None
    mean_rank: float | None


@dataclass(frozen=True)
class Group:
    """The arms that are compared with each other."""

    setting: Setting
    cells: dict[Arm, Cell]

    @property
    def name(self) -> str:
        return self.setting.name


class Played(Protocol):
    """Rollouts under one seed."""

    @property
    def seed(self) -> int: ...

    @property
    def rollouts(self) -> Sequence[Rollout]: ...


@dataclass(frozen=True)
class SharedRollouts:
    """The rollouts that several arms share: success [A, S, K, E] (0 where absent), present [S, K, E]."""

    success_ASKE: np.ndarray
    present_SKE: np.ndarray
    tasks: tuple[str, ...]


def compare(results: Sequence[ArmResult]) -> tuple[Group, ...]:
    """Compares the arms of every setting, in the order of `Setting.place` and ARMS.

    Runs without rollouts are left out.
    """
    groups = []
    results = [run for run in results if run.rollouts]
    for setting in settings_of(results):
        own = [run for run in results if run.setting == setting]
        runs = {arm: found for arm in ARMS if (found := [run for run in own if run.arm == arm])}
        ranks = mean_ranks(shared(*runs.values()))
        cells = {arm: _cell(arm, runs, ranks[n] if ranks else None) for n, arm in enumerate(runs)}
        groups.append(Group(setting, cells))
    return tuple(groups)


def by_wording(results: Sequence[ArmResult], heard: bool) -> tuple[Group, ...]:
    """Compares on the goals whose wording the labelled episodes of the seed contain, or on the others."""
    return compare(
        [replace(run, rollouts=tuple(each for each in run.rollouts if each.heard is heard)) for run in results]
    )


def _cell(arm: Arm, runs: dict[Arm, list[ArmResult]], mean_rank: float | None) -> Cell:
    rollouts = shared(runs[arm])
    assert rollouts is not None, "runs without rollouts are left out"
    rates_SK, present_SK = task_rates(rollouts)
    by_task = rates_SK[0].sum(axis=0) / present_SK.sum(axis=0)
    others: list[Arm] = ["scratch", "captions", "vpt"] if arm == "lapa" else ["scratch"]
    both = {other: shared(runs[arm], runs.get(other, [])) for other in others if other != arm}
    ends: tuple[Arm, Arm, Arm] = ("scratch", arm, "actionvla")
    return Cell(
        arm=arm,
        seeds=tuple(sorted({run.seed for run in runs[arm]})),
        num_rollouts=sum(len(run.rollouts) for run in runs[arm]),
        success=estimate(rollouts, (1,)),
        by_task=dict(zip(rollouts.tasks, by_task.tolist(), strict=True)),
        versus={other: estimate(pair, (1, -1)) for other, pair in both.items() if pair is not None},
        gap=gap_recovered(shared(*(runs.get(end, []) for end in ends))) if len(set(ends)) == 3 else None,
        mean_rank=mean_rank,
    )


def shared(*arms: Sequence[Played]) -> SharedRollouts | None:
    """Returns the rollouts (seed, task, episode) that all arms, each given as its runs, share; None without any."""
    each = [
        {(run.seed, rollout.task, rollout.episode): rollout.success for run in runs for rollout in run.rollouts}
        for runs in arms
    ]
    common = set.intersection(*map(set, each)) if each else set()
    if not common:
        return None
    seeds = sorted({seed for seed, _, _ in common})
    columns: dict[str, dict[int, int]] = {}
    for task, goal in sorted({(task, goal) for _, task, goal in common}):
        of_task = columns.setdefault(task, {})
        of_task[goal] = len(of_task)
    tasks = tuple(columns)
    success_ASKE = np.zeros((len(each), len(seeds), len(tasks), max(map(len, columns.values()))))
    present_SKE = np.zeros(success_ASKE.shape[1:])
    for seed, task, goal in common:
        place = seeds.index(seed), tasks.index(task), columns[task][goal]
        present_SKE[place] = 1
        success_ASKE[:, *place] = [outcomes[seed, task, goal] for outcomes in each]
    return SharedRollouts(success_ASKE, present_SKE, tasks)


def estimate(rollouts: SharedRollouts, weights: Sequence[float]) -> Estimate:
    """Estimates a weighted sum of the arms' success rates: (1,) is a rate, (1, -1) a difference.

    Its interval is between percentiles of the draws, clipped to the values that such a sum can have.
    """
    weights_A = np.array(weights, dtype=float)
    value, num_seeds = float(weights_A @ success_rates(rollouts)), len(rollouts.present_SKE)
    if rollouts.present_SKE.any(axis=0).sum() < LEAST_GOALS * len(rollouts.tasks):
        return Estimate(value, None, None, num_seeds)
    ends = np.percentile(weights_A @ bootstrap(rollouts), [2.5, 97.5])
    low, high = np.clip(ends, weights_A[weights_A < 0].sum(), weights_A[weights_A > 0].sum())
    return Estimate(value, float(low), float(high), num_seeds)


def success_rates(rollouts: SharedRollouts) -> np.ndarray:
    """The success rate of each arm: [A]."""
    return _rates(rollouts, np.ones((1, *rollouts.present_SKE.shape[1:])))[:, 0]


def bootstrap(rollouts: SharedRollouts, num_draws: int = NUM_DRAWS, seed: int = 0) -> np.ndarray:
    """Draws success rates of each arm with other goals and other trainings: [A, N]; they may be outside 0 to 1.

    The draws depend on the shape alone, so arms with the same goals have the same draws in separate calls too.
    """
    goals_K = rollouts.present_SKE.any(axis=0).sum(axis=-1)
    goals_DKE, students_NS = _drawn(len(rollouts.present_SKE), tuple(map(int, goals_K)), num_draws, seed)
    rates_ASK, present_SK = task_rates(rollouts)
    num_K = present_SK.sum(axis=0)
    # The deviation of each arm's rate that each seed causes; zero in the sum over seeds.
    away_ASK = (rates_ASK - rates_ASK.sum(axis=1, keepdims=True) / num_K) * present_SK
    shares_AS = (away_ASK / num_K).mean(axis=-1)
    return np.repeat(_rates(rollouts, goals_DKE), TRAININGS, axis=1) + shares_AS @ students_NS.T


@lru_cache(maxsize=4)
def _drawn(num_seeds: int, goals: tuple[int, ...], num_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw took each goal of each task [D, K, E], and the factor of each seed's share [N, S]."""
    random = np.random.default_rng(seed)
    shape_DKE, goals_K1 = (num_draws, len(goals), max(goals)), np.array(goals)[:, None]
    drawn_DKE = random.integers(0, np.broadcast_to(goals_K1, shape_DKE))
    # A task with fewer goals than the widest draws only so many.
    kept_DKE = np.broadcast_to(np.arange(max(goals)) < goals_K1, shape_DKE)
    places_DKE = drawn_DKE + max(goals) * np.arange(num_draws * len(goals)).reshape(num_draws, -1, 1)
    counts = np.bincount(places_DKE.ravel(), kept_DKE.ravel().astype(float), minlength=places_DKE.size)
    students_NS = np.zeros((TRAININGS * num_draws, num_seeds))
    if num_seeds > 1:
        # Shares of S seeds have S - 1 degrees of freedom and, squared, add up to (S - 1) / S standard errors squared.
        spread_N1 = random.chisquare(num_seeds - 1, size=(len(students_NS), 1))
        students_NS = random.standard_normal(students_NS.shape) * np.sqrt(num_seeds / spread_N1)
    return counts.reshape(shape_DKE), students_NS


def _rates(rollouts: SharedRollouts, goals_DKE: np.ndarray) -> np.ndarray:
    """[A, D]. A task is left out of a draw that has none of its rollouts."""
    both = np.concatenate([rollouts.success_ASKE, rollouts.present_SKE[None]])
    sums = rearrange(goals_DKE, "d k e -> k d e") @ rearrange(both, "a s k e -> k e (a s)")
    sums_ADSK = rearrange(sums, "k d (a s) -> a d s k", s=len(rollouts.present_SKE))
    rates_ADSK, present_DSK = _divided(sums_ADSK[:-1], sums_ADSK[-1])
    rates_ADK, present_DK = _divided(rates_ADSK.sum(axis=2), present_DSK.sum(axis=1))
    return _divided(rates_ADK.sum(axis=-1), present_DK.sum(axis=-1))[0]


def _divided(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means (0 where the count is 0), and where the count is above 0."""
    return sums / np.where(counts > 0, counts, 1), (counts > 0).astype(float)


def task_rates(rollouts: SharedRollouts) -> tuple[np.ndarray, np.ndarray]:
    """Success rates [A, S, K] (0 where a seed did not play a task), and where they are [S, K]."""
    return _divided(rollouts.success_ASKE.sum(axis=-1), rollouts.present_SKE.sum(axis=-1))


def gap_recovered(rollouts: SharedRollouts | None) -> Gap:
    """The gap recovered of three arms: scratch, the arm in question, actionvla.

    No interval where the interval of actionvla - scratch is not above zero, and no value where also the difference is
    below 0.02. A draw in which actionvla is not above scratch (then at most one in forty) counts as below the low end
    and as above the high end.
    """
    if rollouts is None:
        return Gap(None, note="needs scratch and actionvla")
    scratch, arm, _ = success_rates(rollouts)
    whole = estimate(rollouts, (-1, 0, 1))
    if whole.sign < 1 and whole.value <= LEAST_GAP:
        return Gap(None, note="gap not above zero", num_seeds=whole.num_seeds)
    value = float((arm - scratch) / whole.value)
    if whole.sign < 1:
        note = TOO_FEW if whole.low is None else "gap not above zero for certain"
        return Gap(value, note=note, num_seeds=whole.num_seeds)
    scratch_N, arm_N, actionvla_N = bootstrap(rollouts)
    whole_N = actionvla_N - scratch_N
    bounded_N = whole_N > 0
    recovered_N = (arm_N - scratch_N) / np.where(bounded_N, whole_N, 1)
    # These percentiles are draws, not points between two: at most one in forty is infinite, so they are finite.
    low = np.percentile(np.where(bounded_N, recovered_N, -np.inf), 2.5, method="higher")
    high = np.percentile(np.where(bounded_N, recovered_N, np.inf), 97.5, method="lower")
    return Gap(value, float(low), float(high), num_seeds=whole.num_seeds)


def mean_ranks(rollouts: SharedRollouts | None) -> list[float] | None:
    """The rank of each arm (1 is best), mean over tasks and seeds; None where fewer than two arms share rollouts."""
    if rollouts is None or len(rollouts.success_ASKE) < 2:
        return None
    rates_ASK, present_SK = task_rates(rollouts)
    ranks_ASK = rankdata(-rates_ASK, axis=0)
    return ranks_ASK[:, present_SK > 0].mean(axis=1).tolist()
