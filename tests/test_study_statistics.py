"""Success rates, intervals, gap recovered and ranks of a study, against hand counts and simulations."""

from collections.abc import Sequence

import numpy as np
import pytest

from lapa.study.results import Arm, ArmResult, Rollout, Setting
from lapa.study.statistics import (
    SharedRollouts,
    bootstrap,
    by_wording,
    compare,
    estimate,
    gap_recovered,
    mean_ranks,
    shared,
    success_rates,
)

IN_DOMAIN = Setting("in-domain", 30, 2)


def run_of(arm: Arm, seed: int, outcomes: dict[str, Sequence[bool | int]], **rest: object) -> ArmResult:
    rollouts = [
        Rollout(task, episode, bool(success), 10)
        for task, row in outcomes.items()
        for episode, success in enumerate(row)
    ]
    values = {"setting": IN_DOMAIN, "preset": "cpu", "sizes": {}, **rest}
    return ArmResult(arm=arm, seed=seed, rollouts=tuple(rollouts), **values)  # type: ignore[arg-type]


def played(success_ASKE: np.ndarray) -> SharedRollouts:
    tasks = tuple(map(str, range(success_ASKE.shape[2])))
    return SharedRollouts(success_ASKE.astype(float), np.ones(success_ASKE.shape[1:]), tasks)


def rollouts(rates: Sequence[float], num_seeds: int = 3, num: int = 50, seed: int = 0) -> SharedRollouts:
    """Independent rollouts of one task, one arm a rate."""
    random = np.random.default_rng(seed)
    return played(random.random((len(rates), num_seeds, 1, num)) < np.array(rates)[:, None, None, None])


def interval(each: SharedRollouts, *weights: float) -> tuple[float, float]:
    found = estimate(each, weights or (1,))
    assert found.low is not None and found.high is not None
    return found.low, found.high


def test_the_success_rate_weighs_tasks_alike_however_often_each_was_played() -> None:
    runs = [run_of("lapa", 0, {"push": [1, 1, 1, 1], "reach": [0, 1]}), run_of("lapa", 1, {"push": [1, 0]})]
    (group,) = compare(runs)
    cell = group.cells["lapa"]
    assert cell.by_task == {"push": 0.75, "reach": 0.5}  # (1 + 0.5) / 2 over seeds; one seed
    assert cell.success.value == pytest.approx(0.625)
    assert (cell.seeds, cell.num_rollouts) == ((0, 1), 8)


def test_the_interval_of_a_constant_is_that_constant() -> None:
    for rate in (0.0, 1.0):
        assert interval(rollouts([rate])) == (rate, rate)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    each = rollouts([0.5])
    assert np.array_equal(bootstrap(each, seed=1), bootstrap(each, seed=1))
    assert not np.array_equal(bootstrap(each, seed=1), bootstrap(each, seed=2))


def test_a_draw_takes_as_many_goals_as_there_are() -> None:
    each = played(np.arange(6).reshape(1, 1, 2, 3) % 2)
    drawn_D = bootstrap(each, num_draws=4000)[0] * 6  # two tasks of three rollouts: whole sixths
    assert np.allclose(drawn_D, drawn_D.round())
    assert drawn_D.mean() == pytest.approx(3, abs=0.1)
    # Of 3 goals drawn with replacement, all give 0 in 8/27 of draws where one succeeds, in 1/27 where two do.
    assert (drawn_D == 0).mean() == pytest.approx(8 / 27 / 27, abs=0.006)


def test_seeds_that_disagree_widen_the_interval_by_students_t() -> None:
    same = np.arange(20) % 2
    apart = np.stack([np.zeros(20), same, np.ones(20)])[None, :, None]
    alike = same[None, None, None].repeat(3, axis=1)
    assert success_rates(played(alike)) == success_rates(played(apart)) == [0.5]
    assert interval(played(apart)) == (0.0, 1.0)  # within what a rate can be
    assert np.ptp(interval(played(alike))) <= 0.5
    # Rates of 0.4, 0.5, 0.6, of so many goals that these hardly count: 4.303 standard errors to each side.
    apart = np.stack([np.arange(2000) % 10 < number for number in (4, 5, 6)])[None, :, None]
    low, high = interval(played(apart))
    assert [0.5 - low, high - 0.5] == pytest.approx([4.303 * 0.1 / 3**0.5] * 2, rel=0.07)


def test_with_few_seeds_intervals_cover_what_other_trainings_would_give() -> None:
    """Trainings differ by 8 points: the interval of three covers their mean, that of one does not."""
    random = np.random.default_rng(0)
    covered: dict[int, list[bool]] = {1: [], 3: []}
    for num_seeds, found in covered.items():
        for _ in range(100):
            rates_S = 0.5 + 0.08 * random.standard_normal(num_seeds)
            low, high = interval(played(random.random((1, num_seeds, 2, 50)) < rates_S[None, :, None, None]))
            found.append(low <= 0.5 <= high)
    assert np.mean(covered[3]) >= 0.92
    assert np.mean(covered[1]) <= 0.8


def test_under_ten_goals_a_task_there_is_no_interval_and_no_side() -> None:
    few, enough = played(np.ones((2, 3, 2, 9))), played(np.ones((2, 3, 2, 10)))
    found = estimate(few, (1, -0.5))
    assert (found.value, found.low, found.high, found.sign, found.num_seeds) == (0.5, None, None, 0, 3)
    assert estimate(enough, (1, -0.5)).sign == 1
    ends = np.zeros((3, 1, 1, 9))
    ends[1:] = 1
    gap = gap_recovered(played(ends))
    assert (gap.value, gap.low, gap.num_seeds) == (1.0, None, 1) and "too few rollouts" in gap.note


def test_a_comparison_knows_how_many_seeds_it_shares() -> None:
    runs = [run_of("scratch", seed, {"push": [0, 1]}) for seed in (0, 1, 2)]
    runs += [run_of("lapa", seed, {"push": [1, 1]}) for seed in (2, 3, 4)]
    (group,) = compare(runs)
    assert group.cells["lapa"].success.num_seeds == 3
    assert group.cells["lapa"].versus["scratch"].num_seeds == 1


def test_goals_are_told_apart_by_whether_their_wording_was_heard() -> None:
    """Half of the goals are heard, others with another seed; scratch reaches none but heard ones."""
    runs = []
    for arm, rates in (("scratch", (0, 1)), ("lapa", (1, 1))):
        for seed in (0, 1):
            rollouts = [
                Rollout("push", goal, bool(rates[heard]), 9, bool(heard))
                for goal in range(20)
                for heard in [(goal + seed) % 2]
            ]
            runs.append(ArmResult(arm, IN_DOMAIN, seed, "cpu", {}, tuple(rollouts)))  # type: ignore[arg-type]
    runs.append(run_of("vpt", 0, {"push": [1] * 20}))  # no word on wording
    (heard,), (unheard,) = by_wording(runs, heard=True), by_wording(runs, heard=False)
    assert list(heard.cells) == list(unheard.cells) == ["scratch", "lapa"]
    assert heard.cells["lapa"].versus["scratch"].value == 0.0
    assert unheard.cells["lapa"].versus["scratch"].value == 1.0
    assert heard.cells["scratch"].num_rollouts == unheard.cells["scratch"].num_rollouts == 20
    assert by_wording(runs[-1:], heard=True) == ()


def test_intervals_of_independent_rollouts_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = [low <= 0.4 <= high for low, high in (interval(rollouts([0.4], 1, 100, seed)) for seed in range(200))]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_goals_that_all_seeds_share_are_not_counted_several_times() -> None:
    """Half of the goals are met by every seed, the others by none: three seeds tell no more than one."""
    random = np.random.default_rng(0)
    covered = []
    for _ in range(100):
        met = (random.random(40) < 0.5)[None, None, None].repeat(3, axis=1)
        low, high = interval(played(met))
        covered.append(low <= 0.5 <= high)
    assert np.mean(covered) >= 0.88


def test_the_paired_interval_is_narrower_than_the_unpaired_on_correlated_arms() -> None:
    random = np.random.default_rng(0)
    hard = random.random((1, 3, 4, 30))
    both = played(np.concatenate([hard < 0.4, hard < 0.5]))
    unpaired = np.ptp(np.percentile(bootstrap(both, seed=7)[1] - bootstrap(both)[0], [2.5, 97.5]))
    assert np.ptp(interval(both, -1, 1)) < 0.7 * unpaired


def test_one_runs_success_rate_is_that_of_the_comparison() -> None:
    run = run_of("lapa", 0, {"push": [1, 1, 1, 1], "reach": [0, 1]})
    both = shared([run])
    assert both is not None and run.success_rate() == success_rates(both)[0] == 0.75
    assert run_of("lapa", 0, {}).success_rate() is None


def test_arms_are_compared_on_what_both_played() -> None:
    runs = [
        run_of("scratch", 0, {"push": [0, 0, 1, 1]}),
        run_of("lapa", 0, {"push": [1, 1]}),
        run_of("lapa", 1, {"push": [0, 0]}),
    ]
    (group,) = compare(runs)
    lapa = group.cells["lapa"]
    assert lapa.success.value == 0.5
    assert lapa.versus["scratch"].value == 1.0  # seed 0, episodes 0 and 1
    assert "vpt" not in lapa.versus and lapa.gap is not None and lapa.gap.value is None


def test_arms_that_share_no_seed_have_no_difference_and_no_rank() -> None:
    (group,) = compare([run_of("scratch", 0, {"push": [0, 1]}), run_of("lapa", 1, {"push": [1, 1]})])
    assert group.cells["lapa"].versus == {} and group.cells["lapa"].mean_rank is None


def test_the_gap_recovered_of_exact_rates_is_their_quotient() -> None:
    episodes = np.arange(100)[None, None, :]
    each = played(np.stack([episodes < 20, episodes < 50, episodes < 60]))
    gap = gap_recovered(each)
    assert gap.value == pytest.approx(0.75) and gap.note == ""
    assert gap.low is not None and gap.high is not None and 0.5 < gap.low < 0.75 < gap.high < 1.0


def test_a_gap_that_may_be_nothing_has_no_interval_and_never_blows_up() -> None:
    episodes = np.arange(100)[None, None, :]
    odd = (episodes % 2 == 0, episodes < 50)
    unsure = gap_recovered(
        played(np.stack([odd[0], odd[0], odd[1] | (episodes == 60) | (episodes == 62) | (episodes > 98)]))
    )
    assert unsure.value == pytest.approx(0.0) and unsure.low is None and "for certain" in unsure.note
    for upper in (odd[1], episodes < 10):
        assert gap_recovered(played(np.stack([odd[0], episodes < 90, upper]))).value is None


def test_draws_without_a_gap_widen_its_interval_rather_than_drop_out() -> None:
    """A gap that is above zero only just: leaving its worst draws out would narrow the interval."""
    episodes = np.arange(60)[None, None, :]
    each = played(np.stack([episodes < 20, episodes % 2 == 0, (episodes >= 20) & (episodes < 56)]))
    gap, draws_AN = gap_recovered(each), bootstrap(each)
    whole_N, part_N = draws_AN[2] - draws_AN[0], draws_AN[1] - draws_AN[0]
    above = whole_N > 0
    assert 0 < (~above).mean() <= 1 / 40 and gap.low is not None and gap.high is not None
    left = np.percentile(part_N[above] / whole_N[above], [2.5, 97.5])
    assert gap.low < left[0] and gap.high > left[1] and np.isfinite([gap.low, gap.high]).all()


def test_the_mean_rank_averages_over_tasks_and_seeds_and_ties_share_theirs() -> None:
    both = shared(
        [run_of("scratch", 0, {"push": [0, 0], "reach": [1, 1]})],
        [run_of("lapa", 0, {"push": [1, 0], "reach": [1, 1]})],
    )
    assert mean_ranks(both) == [1.75, 1.25]
