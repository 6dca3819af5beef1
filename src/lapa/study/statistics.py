"""What the rollouts of a study say: success rates, differences and gap recovered, with bootstrap intervals.

An arm's success rate is the mean over tasks of the mean over seeds of the mean over rollouts: each task weighs the same
however often it was played. All arms and seeds of a study play the same goals (task, episode). So a draw of the
bootstrap takes seeds with replacement and, of each task, goals with replacement, the same for every arm and seed: what
arms differ in does not drown in what goals differ in, and a hard goal is not counted as several when several seeds
met it. Tasks are not drawn: the intervals are about these tasks. With one seed they do not cover training, and with
few they are too narrow: in simulated studies with 3 seeds, 6 tasks and 50 goals, 83% to 98% of them held the true rate
(the less seeds differ the more; 81% to 98% where every seed is resampled with goals of its own).

    groups = compare(load_results([Path("runs/study")]))
    groups[0].cells["lapa"].versus["scratch"]        # Estimate(value=0.12, low=0.04, high=0.20)

Gap recovered is that of LAPA (Ye et al., https://arxiv.org/abs/2410.11758).

Axes: A arms, S seeds, K tasks, E episodes, D draws of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from einops import rearrange

from lapa.study.results import ARMS, SPLITS, Arm, ArmResult, Split

NUM_DRAWS = 2000
LEAST_GAP = 0.02  # of actionvla over scratch, from which a gap recovered is given although it may be chance
LEAST_RUNS = 5  # from which a correlation is given


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Gap:
    """(arm - scratch) / (actionvla - scratch). note: why there is no interval, or no value either."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One arm on one split with one number of labelled episodes.

    versus: this arm minus another, paired, on what both played: scratch, and vpt for lapa. mean_rank: 1 is best, mean
    over tasks and seeds that all arms of the group played, ties averaged.
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
    """The arms that are compared with each other: one split, one number of labelled episodes a task."""

    split: Split
    demonstrations: int
    cells: dict[Arm, Cell]


@dataclass(frozen=True)
class Correlation:
    """Of a figure with the success rate over runs. note: why there are no values."""

    figure: str
    num_runs: int
    spearman: float | None = None
    pearson: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Played:
    """What several arms all played: success [A, S, K, E] (0 where absent), present [S, K, E]."""

    success_ASKE: np.ndarray
    present_SKE: np.ndarray
    tasks: tuple[str, ...]


def compare(results: Sequence[ArmResult], num_draws: int = NUM_DRAWS, seed: int = 0) -> tuple[Group, ...]:
    """Every split and number of labelled episodes with its arms, in the order of SPLITS and ARMS."""
    keys = sorted({(SPLITS.index(result.split), result.demonstrations) for result in results})
    groups = []
    for position, demonstrations in keys:
        split = SPLITS[position]
        own = [result for result in results if (result.split, result.demonstrations) == (split, demonstrations)]
        runs = {arm: [run for run in own if run.arm == arm] for arm in ARMS}
        runs = {arm: found for arm, found in runs.items() if any(run.rollouts for run in found)}
        ranks = mean_ranks(shared(*runs.values()))
        cells = {arm: _cell(arm, runs, ranks[n] if ranks else None, num_draws, seed) for n, arm in enumerate(runs)}
        groups.append(Group(split, demonstrations, cells))
    return tuple(groups)


def _cell(arm: Arm, runs: dict[Arm, list[ArmResult]], mean_rank: float | None, num_draws: int, seed: int) -> Cell:
    played = shared(runs[arm])
    assert played is not None
    rates_SK, present_SK = task_rates(played)
    by_task = rates_SK[0].sum(axis=0) / present_SK.sum(axis=0)
    versus: dict[Arm, Estimate] = {}
    others: list[Arm] = ["scratch", "vpt"] if arm == "lapa" else ["scratch"]
    for other in others:
        both = shared(runs[arm], runs.get(other, [])) if other != arm else None
        if both is not None:
            values_A, draws_AD = success_rates(both), bootstrap(both, num_draws, seed)
            versus[other] = estimate(values_A[0] - values_A[1], draws_AD[0] - draws_AD[1])
    gap = None
    if arm not in ("scratch", "actionvla"):
        ends: tuple[Arm, Arm, Arm] = ("scratch", arm, "actionvla")
        gap = gap_recovered(shared(*(runs.get(end, []) for end in ends)), num_draws=num_draws, seed=seed)
    return Cell(
        arm=arm,
        seeds=tuple(sorted({run.seed for run in runs[arm]})),
        num_rollouts=sum(len(run.rollouts) for run in runs[arm]),
        success=estimate(success_rates(played)[0], bootstrap(played, num_draws, seed)[0]),
        by_task={task: float(rate) for task, rate in zip(played.tasks, by_task, strict=True)},
        versus=versus,
        gap=gap,
        mean_rank=mean_rank,
    )


def shared(*arms: Sequence[ArmResult]) -> Played | None:
    """What all arms (each given as its runs) played, by seed, task and episode; None where that is nothing."""
    each = [
        {(run.seed, rollout.task, rollout.episode): rollout.success for run in runs for rollout in run.rollouts}
        for runs in arms
    ]
    common = set.intersection(*map(set, each)) if each else set()
    if not common:
        return None
    seeds, tasks = sorted({key[0] for key in common}), sorted({key[1] for key in common})
    met: dict[str, set[int]] = {task: set() for task in tasks}
    for _, task, goal in common:
        met[task].add(goal)
    goals = {task: sorted(numbers) for task, numbers in met.items()}
    place = {(task, goal): (row, column) for row, task in enumerate(tasks) for column, goal in enumerate(goals[task])}
    success_ASKE = np.zeros((len(each), len(seeds), len(tasks), max(map(len, goals.values()))))
    present_SKE = np.zeros(success_ASKE.shape[1:])
    for number, task, goal in common:
        where = (seeds.index(number), *place[task, goal])
        present_SKE[where] = 1
        success_ASKE[:, *where] = [outcomes[number, task, goal] for outcomes in each]
    return Played(success_ASKE, present_SKE, tuple(tasks))


def success_of(run: ArmResult) -> float | None:
    """The success rate of one run, each task weighing the same; None without rollouts."""
    by_task: dict[str, list[bool]] = {}
    for rollout in run.rollouts:
        by_task.setdefault(rollout.task, []).append(rollout.success)
    return float(np.mean([np.mean(ends) for ends in by_task.values()])) if by_task else None


def success_rates(played: Played) -> np.ndarray:
    """The success rate of each arm: [A]."""
    num_seeds, num_tasks, num_episodes = played.present_SKE.shape
    return _rates(played, np.ones((1, num_seeds)), np.ones((1, num_tasks, num_episodes)))[:, 0]


def bootstrap(played: Played, num_draws: int = NUM_DRAWS, seed: int = 0) -> np.ndarray:
    """Success rates of each arm under resampled seeds and goals: [A, D].

    The draws depend on the shape alone, so arms that played the same are resampled alike in separate calls too.
    """
    goals_K = played.present_SKE.any(axis=0).sum(axis=-1)
    return _rates(played, *_times_drawn(len(played.present_SKE), tuple(map(int, goals_K)), num_draws, seed))


@lru_cache(maxsize=4)
def _times_drawn(num_seeds: int, goals: tuple[int, ...], num_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw took each seed [D, S], and each goal of each task [D, K, E]."""
    random = np.random.default_rng(seed)
    widest, goals_K1 = max(goals), np.array(goals)[:, None]
    seeds_DS = random.integers(0, num_seeds, size=(num_draws, num_seeds))
    goals_DKE = random.integers(0, np.broadcast_to(goals_K1, (num_draws, len(goals), widest)))
    kept_KE = np.arange(widest) < goals_K1
    return _counted(seeds_DS, np.ones(num_seeds), num_seeds), _counted(goals_DKE, kept_KE, widest)


def _counted(drawn: np.ndarray, kept: np.ndarray, num: int) -> np.ndarray:
    rows = drawn.reshape(-1, drawn.shape[-1])
    flat = rows + num * np.arange(len(rows))[:, None]
    weights = np.broadcast_to(kept, drawn.shape).reshape(-1).astype(float)
    return np.bincount(flat.reshape(-1), weights, minlength=num * len(rows)).reshape(*drawn.shape[:-1], num)


def _rates(played: Played, seeds_DS: np.ndarray, goals_DKE: np.ndarray) -> np.ndarray:
    """[A, D]. A task is left out of a draw that holds none of its rollouts."""
    num_seeds = len(played.present_SKE)
    both = np.concatenate([played.success_ASKE, played.present_SKE[None]])
    sums = rearrange(goals_DKE, "d k e -> k d e") @ rearrange(both, "a s k e -> k e (a s)")
    sums_ADSK = rearrange(sums, "k d (a s) -> a d s k", s=num_seeds)
    rates_ADSK, present_DSK = _divided(sums_ADSK[:-1], sums_ADSK[-1])
    weights_DS1 = seeds_DS[..., None]
    rates_ADK, present_DK = _divided((rates_ADSK * weights_DS1).sum(axis=2), (present_DSK * weights_DS1).sum(axis=1))
    return _divided(rates_ADK.sum(axis=-1), present_DK.sum(axis=-1))[0]


def _divided(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means (0 where there is nothing), and where there is something."""
    return sums / np.where(counts > 0, counts, 1), (counts > 0).astype(float)


def task_rates(played: Played) -> tuple[np.ndarray, np.ndarray]:
    """Success rates [A, S, K] (0 where a seed did not play a task), and where they are [S, K]."""
    return _divided(played.success_ASKE.sum(axis=-1), played.present_SKE.sum(axis=-1))


def estimate(value: float, draws_D: np.ndarray) -> Estimate:
    """With the 2.5% and 97.5% percentiles of the draws."""
    low, high = np.percentile(draws_D, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def gap_recovered(played: Played | None, *, num_draws: int = NUM_DRAWS, seed: int = 0) -> Gap:
    """Of three arms: scratch, the arm in question, actionvla.

    No interval where that of actionvla - scratch does not lie above zero, and no value where besides the difference is
    below 0.02. Draws in which actionvla is not above scratch (at most one in forty, then) are left out.
    """
    if played is None:
        return Gap(None, note="needs scratch and actionvla")
    scratch, arm, actionvla = success_rates(played)
    scratch_D, arm_D, actionvla_D = bootstrap(played, num_draws, seed)
    whole, whole_D = actionvla - scratch, actionvla_D - scratch_D
    if estimate(whole, whole_D).low <= 0:
        value = float((arm - scratch) / whole) if whole > LEAST_GAP else None
        return Gap(value, note="gap not above zero for certain" if value is not None else "gap not above zero")
    recovered = estimate((arm - scratch) / whole, ((arm_D - scratch_D)[whole_D > 0]) / whole_D[whole_D > 0])
    return Gap(recovered.value, recovered.low, recovered.high)


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest of the last axis; equal values share the mean of their ranks."""
    below = (values[..., None, :] < values[..., :, None]).sum(axis=-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(axis=-1)
    return below + (equal + 1) / 2


def mean_ranks(played: Played | None) -> list[float] | None:
    """The rank of each arm (1 is best), mean over tasks and seeds; None where not two arms share rollouts."""
    if played is None or len(played.success_ASKE) < 2:
        return None
    rates_ASK, present_SK = task_rates(played)
    ranks_SKA = ranks(-rearrange(rates_ASK, "a s k -> s k a"))
    return ranks_SKA[present_SK > 0].mean(axis=0).tolist()


def correlations(results: Sequence[ArmResult]) -> list[Correlation]:
    """Of every figure with the success rate, over the runs that have it; lam_* figures over those of lapa."""
    found = []
    for name in sorted({name for result in results for name in result.figures}):
        points = figure_and_success(results, name)
        if len(points) < LEAST_RUNS:
            found.append(Correlation(name, len(points), note=f"too few (fewer than {LEAST_RUNS} runs)"))
            continue
        xs, ys = (np.array(column, dtype=float) for column in zip(*((x, y) for _, x, y in points), strict=True))
        if np.ptp(xs) == 0 or np.ptp(ys) == 0:
            found.append(Correlation(name, len(points), note="the figure or success does not vary"))
            continue
        found.append(Correlation(name, len(points), _pearson(ranks(xs), ranks(ys)), _pearson(xs, ys)))
    return found


def figure_and_success(results: Sequence[ArmResult], name: str) -> list[tuple[ArmResult, float, float]]:
    """The runs with that figure, its value and the success rate."""
    points = []
    for result in results:
        value, success = result.figures.get(name), success_of(result)
        if value is None or success is None or not math.isfinite(value):
            continue
        if not name.startswith("lam_") or result.arm == "lapa":
            points.append((result, float(value), success))
    return points


def _pearson(xs: np.ndarray, ys: np.ndarray) -> float:
    return float(np.corrcoef(xs, ys)[0, 1])
