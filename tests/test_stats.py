"""Numbers worked out by hand, and properties."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl2rl_ray.stats import bootstrap_ci95, over_runs, paired_difference, summarize

reals = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50)


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


@given(reals, st.floats(-1e6, 1e6))
def test_a_shift_moves_the_mean_and_nothing_else(values, shift):
    before, after = summarize(values), summarize(np.array(values) + shift)
    assert after.mean == pytest.approx(before.mean + shift, abs=1e-6)
    assert after.sd == pytest.approx(before.sd, abs=1e-6)


@given(reals)
def test_the_interval_holds_the_mean(values):
    summary = summarize(values)
    assert summary.ci95[0] <= summary.mean <= summary.ci95[1]
