"""Numbers worked out by hand, and properties."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, trim_mean

from ssl2rl_ray.stats import (
    area_under,
    bootstrap_ci95,
    curve_over_runs,
    difference,
    estimate,
    first_reached,
    interquartile_mean,
    last_observed,
    over_runs,
    paired_difference,
    probability_of_improvement,
    summarize,
)

reals = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50)
seeds = st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=8)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_summary_of_1_2_3_4_by_hand():
    # mean 2.5, sd sqrt(5/3), t(3, .975) = 3.182446: half width 3.182446 * 1.290994 / 2
    summary = summarize([1, 2, 3, 4])
    assert summary.mean == 2.5
    assert summary.sd == pytest.approx(1.2909944487)
    assert summary.half_width == pytest.approx(2.0542602568, rel=1e-6)
    assert summary.ci95 == pytest.approx((0.4457397432, 4.5542602568), rel=1e-6)


def test_one_value_has_a_mean_and_no_interval():
    summary = summarize([7.0])
    assert summary.mean == 7.0
    assert np.isnan(summary.sd) and np.isnan(summary.ci95).all()
    assert summary.as_json() == {"mean": 7.0, "sd": None, "ci95": [None, None], "values": [7.0]}
    json.dumps(summary.as_json(), allow_nan=False)


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_no_values_or_two_dimensions_are_refused(values):
    with pytest.raises(ValueError, match="at least one value"):
        summarize(values)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ci95(values, np.random.default_rng(0))


def test_paired_difference_by_hand():
    # differences 1, 1, 4: mean 2, sd sqrt(3)
    difference = paired_difference([2, 4, 9], [1, 3, 5])
    assert difference.values == (1, 1, 4)
    assert difference.mean == 2
    assert difference.sd == pytest.approx(3**0.5)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="one to one"):
        paired_difference([1, 2], [1, 2, 3])


def test_pairing_removes_what_both_share():
    luck = np.random.default_rng(0).normal(0, 100, 40)
    difference = paired_difference(luck + 2.0, luck)
    assert difference.mean == pytest.approx(2.0)
    assert difference.half_width < 1e-9


def test_the_run_is_the_unit_over_seeds():
    # two runs with means 1 and 3: sd sqrt(2), whatever the number of episodes
    summary = over_runs([[0, 1, 2], [3, 3]])
    assert summary.values == (1, 3)
    assert summary.mean == 2
    assert summary.sd == pytest.approx(2**0.5)


def test_bootstrap_agrees_with_t_on_a_normal_sample():
    x = np.random.default_rng(1).normal(5, 2, 400)
    assert bootstrap_ci95(x, np.random.default_rng(2)) == pytest.approx(summarize(x).ci95, abs=0.03)


def test_bootstrap_of_a_median_and_of_a_constant():
    low, high = bootstrap_ci95([1, 2, 3, 4, 100], np.random.default_rng(0), np.median, 2_000)
    assert 1 <= low <= 3 <= high <= 100
    assert bootstrap_ci95([3.0] * 5, np.random.default_rng(0)) == (3.0, 3.0)


@settings(deadline=None)  # a busy machine is slow, not wrong
@given(reals, st.floats(-1e6, 1e6))
def test_a_shift_moves_the_mean_and_nothing_else(values, shift):
    before, after = summarize(values), summarize(np.array(values) + shift)
    assert after.mean == pytest.approx(before.mean + shift, abs=1e-6)
    assert after.sd == pytest.approx(before.sd, abs=1e-6)


@settings(deadline=None)
@given(reals)
def test_the_interval_holds_the_mean(values):
    summary = summarize(values)
    assert summary.ci95[0] <= summary.mean <= summary.ci95[1]


# ---- few runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5], 5),
        ([1, 2, 9], 4),  # below four values it is the mean
        ([0, 2, 4, 100], 3),  # one is cut at each end
        ([7, -50, 1, 3, 99], 11 / 3),  # of five, too: (1 + 3 + 7) / 3
        ([8, 1, 2, 3, 4, 5, 6, 70], 4.5),  # of eight two: (3 + 4 + 5 + 6) / 4
    ],
)
def test_interquartile_mean_by_hand(values, expected):
    assert float(interquartile_mean(values)) == pytest.approx(expected)


@settings(deadline=None)
@given(reals)
def test_interquartile_mean_is_scipys_trimmed_mean(values):
    assert float(interquartile_mean(values)) == pytest.approx(trim_mean(values, 0.25), abs=1e-6)


def test_interquartile_mean_goes_along_the_axis_that_is_named():
    x = np.random.default_rng(0).normal(size=(3, 5, 2))
    found = interquartile_mean(x, axis=1)
    assert found.shape == (3, 2)
    assert found[2, 1] == pytest.approx(float(interquartile_mean(x[2, :, 1])))


@settings(deadline=None)
@given(seeds, st.floats(0.5, 10), st.integers(-50, 50))
def test_estimates_move_with_their_unit(values, scale, shift):
    before = estimate([values], rng())
    after = estimate([np.array(values) * scale + shift], rng())
    assert after.value == pytest.approx(before.value * scale + shift, abs=1e-6)
    assert after.ci95 == pytest.approx([b * scale + shift for b in before.ci95], abs=1e-6)


@settings(deadline=None)
@given(seeds)
def test_the_interval_of_a_mean_holds_it_and_lies_within_the_sample(values):
    found = estimate([values], rng(), np.mean, 2_000)
    assert min(values) <= found.ci95[0] <= found.value + 1e-9
    assert found.value - 1e-9 <= found.ci95[1] <= max(values)


def test_bootstrap_of_two_runs_by_hand():
    # resamples of (0, 1): mean 0, 0.5, 1 with probability 1/4, 1/2, 1/4
    assert estimate([[0.0, 1.0]], rng(), np.mean).ci95 == (0.0, 1.0)
    # of ten zeros and ten ones: a binomial of 20 over 20; its 2.5 % point is 6, 97.5 % point 14
    found = estimate([[0.0] * 10 + [1.0] * 10], rng(), np.mean, 50_000)
    assert found.ci95 == pytest.approx((0.3, 0.7))


def test_tasks_are_strata_and_never_mixed():
    # within each task nothing varies, so nothing is left to resample; mixed, it would
    found = estimate([[0.0] * 3, [10.0] * 3], rng(), np.mean)
    assert (found.value, found.ci95) == (5.0, (5.0, 5.0))
    low, high = estimate([[0.0] * 3 + [10.0] * 3], rng(), np.mean).ci95
    assert low < 5.0 < high


def test_one_run_has_no_interval():
    found = estimate([[3.0]], rng())
    assert found.value == 3.0 and np.isnan(found.ci95).all()
    assert found.as_json() == {"value": 3.0, "ci95": [None, None]}
    assert np.isnan(estimate([[1.0, 2.0], [3.0]], rng()).ci95).all()
    assert np.isnan(probability_of_improvement([[1.0]], [[0.0, 2.0]], rng()).ci95).all()
    assert np.isnan(difference([[1.0]], [[0.0, 2.0]], rng()).ci95).all()


@pytest.mark.parametrize("strata", [[], [[]], [[1.0], []], [[[1.0, 2.0]]]])
def test_a_task_without_runs_is_refused(strata):
    with pytest.raises(ValueError, match="at least one run of each task"):
        estimate(strata, rng())


@pytest.mark.parametrize("function", [difference, probability_of_improvement])
def test_both_sides_need_the_same_tasks(function):
    with pytest.raises(ValueError, match="the same tasks, found 1 and 2"):
        function([[1.0]], [[1.0], [2.0]], rng())


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[2, 3]], [[0, 1]], 1.0),
        ([[1, 4]], [[2, 3]], 0.5),
        ([[1, 2]], [[1, 2]], 0.5),  # ties count half: (0.5 + 0 + 1 + 0.5) / 4
        ([[1, 3, 5]], [[2, 4]], 0.5),  # wins: 0 + 1 + 2 of 6
        ([[5, 3, 5]], [[2, 4]], 5 / 6),
        ([[2, 3], [0, 0]], [[0, 1], [5, 5]], 0.5),  # won one task, lost the other
    ],
)
def test_probability_of_improvement_by_hand(ours, theirs, expected):
    found = probability_of_improvement(ours, theirs, rng())
    assert found.value == pytest.approx(expected)
    assert found.ci95[0] <= expected <= found.ci95[1]


@settings(deadline=None)
@given(seeds, seeds)
def test_probability_of_improvement_is_mann_whitney_and_its_two_sides_add_up(ours, theirs):
    found = probability_of_improvement([ours], [theirs], rng(), 200)
    pairs = len(ours) * len(theirs)
    assert found.value == pytest.approx(mannwhitneyu(ours, theirs).statistic / pairs)
    other = probability_of_improvement([theirs], [ours], rng(), 200)
    assert found.value + other.value == pytest.approx(1)
    assert 0 <= found.ci95[0] <= found.ci95[1] <= 1 + 1e-12


@settings(deadline=None)
@given(seeds, seeds)
def test_probability_of_improvement_needs_only_the_order(ours, theirs):
    before = probability_of_improvement([ours], [theirs], rng(), 100)
    after = probability_of_improvement(
        [np.exp(np.array(ours) / 9)], [np.exp(np.array(theirs) / 9)], rng(), 100
    )
    assert (after.value, after.ci95) == (before.value, before.ci95)


def test_the_resamples_of_a_probability_are_those_of_its_runs():
    x, y = np.array([1.0, 4.0, 2.5, 6.0, 3.0]), np.array([0.0, 3.5, 2.0, 5.0])
    found = probability_of_improvement([x], [y], rng(), 40_000).ci95
    r = np.random.default_rng(1)
    a, b = x[r.integers(0, 5, (40_000, 5))], y[r.integers(0, 4, (40_000, 4))]
    plain = (a[:, :, None] > b[:, None, :]).mean(axis=(1, 2))
    assert found == pytest.approx(np.quantile(plain, (0.025, 0.975)), abs=0.011)


def test_differences_of_separated_samples_exclude_0():
    x = np.random.default_rng(0).normal(5, 1, 10)
    found = difference([x + 4], [x], rng())
    assert found.value == pytest.approx(4)
    assert 2 < found.ci95[0] < 4 < found.ci95[1] < 6
    low, high = difference([x], [x], rng()).ci95
    assert low < 0 < high


# ---- learning curves -----------------------------------------------------------------------------

STEPS, SCORES = [0, 10, 20, 40], [1.0, 3.0, 2.0, 8.0]


def test_between_looks_the_last_observation_stands():
    found = last_observed(STEPS, SCORES, [-1, 0, 9.9, 10, 25, 40, 99])
    assert found == pytest.approx([np.nan, 1, 1, 3, 2, 8, 8], nan_ok=True)


def test_area_by_hand():
    # 10 wide at 1, 10 at 3, 20 at 2: 80 over 40
    assert area_under(STEPS, SCORES, 0, 40) == pytest.approx(80 / 40)
    assert area_under(STEPS, SCORES, 5, 25) == pytest.approx((5 * 1 + 10 * 3 + 5 * 2) / 20)
    assert area_under(STEPS, SCORES, 40, 50) == pytest.approx(8)
    assert np.isnan(area_under(STEPS, SCORES, -1, 40))
    assert np.isnan(area_under(STEPS, SCORES, 20, 20))


def test_a_threshold_is_reached_at_the_first_look_that_shows_it():
    assert [first_reached(STEPS, SCORES, t) for t in (0, 1, 2, 3, 3.1, 9)] == [
        0, 0, 10, 10, 40, float("inf"),
    ]  # fmt: skip


def test_a_threshold_that_some_runs_never_reach_has_a_median_and_an_interval():
    found = estimate([[10.0, 20.0, 30.0, np.inf, np.inf]], rng(), np.median)
    assert found.value == 30 and found.ci95 == (10.0, np.inf)
    assert estimate([[np.inf] * 5], rng(), np.median).as_json()["value"] is None


@pytest.mark.parametrize(("x", "y"), [([], []), ([0, 1], [1]), ([1, 0], [1, 2]), ([[0]], [[1]])])
def test_curves_that_are_none_are_refused(x, y):
    with pytest.raises(ValueError, match="ascending x"):
        area_under(x, y, 0, 1)


def test_a_curve_over_runs_by_hand():
    curves = [([0, 10], [0.0, 4.0]), ([0, 12], [2.0, 6.0])]
    value, low, high = curve_over_runs(curves, [0, 10, 12], rng(), np.mean)
    assert value == pytest.approx([1, 3, 5])  # at 10 the second run still shows 2
    assert low == pytest.approx([0, 2, 4]) and high == pytest.approx([2, 4, 6])
    x = np.linspace(0, 1, 300)
    many = [(x, np.random.default_rng(i).normal(size=300)) for i in range(30)]
    whole = curve_over_runs(many, x, rng(), num_resamples=1000)  # in two pieces
    part = curve_over_runs(many, x[-5:], rng(), num_resamples=1000)
    assert all(w[-5:] == pytest.approx(p) for w, p in zip(whole, part, strict=True))
    one = curve_over_runs(curves[:1], [0, 10], rng())
    assert one[0] == pytest.approx([0, 4]) and np.isnan(one[1]).all() and np.isnan(one[2]).all()
    with pytest.raises(ValueError, match="at least one run"):
        curve_over_runs([], [0], rng())


@settings(deadline=None)
@given(st.lists(seeds, min_size=1, max_size=6))
def test_the_area_lies_between_the_lowest_and_the_highest_score(rows):
    for row in rows:
        found = area_under(range(len(row)), row, 0, len(row) - 0.5)
        assert min(row) - 1e-9 <= found <= max(row) + 1e-9
