"""Metrics by hand, and what must hold of them for any labels and probabilities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from ssl2rl_ray.perception.metrics import (
    area_under_roc,
    classifier_metrics,
    confusion,
    expected_calibration_error,
    fit_temperature,
    reliability,
)

LABELLED = st.lists(
    st.tuples(st.booleans(), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=40
).map(lambda rows: (np.array([r[0] for r in rows]), np.array([r[1] for r in rows])))


def test_by_hand():
    # truth      low  low  low  high high
    # said       .9   .6   .2   .7   .1     -> low low high low high
    found = classifier_metrics([True, True, True, False, False], [0.9, 0.6, 0.2, 0.7, 0.1])
    assert found["num_holes"] == 5
    assert found["low_share"] == 0.6
    assert found["positive_share"] == 0.6
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    # 6 pairs: .9 beats both, .6 beats .1, .2 beats .1.
    assert found["auc"] == pytest.approx(4 / 6)
    # Largest 2.5: .9 (right), .7 (wrong), half of .6 (half right); the rest: .2 wrong, .1 right.
    assert found["accuracy_at_median"] == pytest.approx(2.5 / 5)
    # Bins of 1/15: .9, .1 -> .9 each (both right), .6 right alone, .7 and .8 wrong, alone each.
    assert found["ece"] == pytest.approx((0.1 * 2 + 0.4 + 0.7 + 0.8) / 5)
    loss = -np.log([0.9, 0.6, 0.2, 0.3, 0.9]).mean()
    assert found["log_loss"] == pytest.approx(loss)
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.64 + 0.49 + 0.01) / 5)
    np.testing.assert_array_equal(
        confusion([True, True, True, False, False], [0.9, 0.6, 0.2, 0.7, 0.1]), [[1, 1], [1, 2]]
    )


def test_ece_groups_before_it_subtracts():
    # Ten holes at confidence .8: eight right is perfect, though each one alone is off.
    assert expected_calibration_error([True] * 8 + [False] * 2, [0.8] * 10) == pytest.approx(0)
    assert expected_calibration_error([True] * 10, [0.8] * 10) == pytest.approx(0.2)
    # Upper edges belong to the bin: 12/15 = .8 and .79 share one, .81 does not.
    assert expected_calibration_error([True, False], [0.8, 0.79]) == pytest.approx(
        abs(1 - 1.59) / 2
    )
    assert expected_calibration_error([True, False], [0.81, 0.79]) == pytest.approx(
        (0.19 + 0.79) / 2
    )


def test_ties_count_half():
    assert area_under_roc([True, False], [0.5, 0.5]) == 0.5
    assert area_under_roc([True, False, False], [0.5, 0.5, 0.1]) == 0.75
    same = classifier_metrics([True, True, True, False], [0.7] * 4)
    assert same["accuracy_at_median"] == 0.5
    assert same["accuracy"] == 0.75


def test_one_class_or_none_is_nan_without_warning():
    low = classifier_metrics([True, True], [0.9, 0.2])
    assert np.isnan(low["auc"])
    assert low["precision"] == 1
    assert low["recall"] == 0.5
    high = classifier_metrics([False, False], [0.1, 0.2])
    assert np.isnan([high[name] for name in ("auc", "precision", "recall", "f1")]).all()
    assert high["accuracy"] == 1
    none = classifier_metrics([], [])
    assert none.pop("num_holes") == 0
    assert np.isnan(list(none.values())).all()


def test_certainty_that_is_wrong_costs_a_finite_log_loss():
    found = classifier_metrics([True, False], [0.0, 1.0])
    assert found["log_loss"] == pytest.approx(-np.log(1e-7))
    assert found["brier"] == 1


@pytest.mark.parametrize(
    ("is_low", "p", "message"),
    [
        ([True], [0.1, 0.2], r"\(1,\), \(2,\)"),
        ([[True]], [[0.1]], r"\(1, 1\)"),
        ([True, False], [0.1, np.nan], "found nan in row 1"),
        ([True, False], [1.5, 0.0], r"\[0, 1\] a hole, found 1.5 in row 0"),
    ],
)
def test_what_is_no_prediction_is_refused(is_low, p, message):
    with pytest.raises(ValueError, match=message):
        classifier_metrics(is_low, p)


def test_reliability_by_hand():
    found = reliability([True, False, True, True], [0.1, 0.2, 0.5, 1.0], num_bins=2)
    np.testing.assert_array_equal(found.count, [2, 2])
    np.testing.assert_allclose(found.mean_p, [0.15, 0.75])
    np.testing.assert_allclose(found.low_share, [0.5, 1.0])
    empty = reliability([True], [0.95], num_bins=10)
    assert np.isnan(empty.mean_p[:-1]).all()
    assert empty.count.sum() == 1


@given(LABELLED)
def test_auc_knows_only_the_order(data):
    is_low, p = data
    p = np.round(p, 4)  # so that the map below keeps apart what is apart
    found = area_under_roc(is_low, p)
    assert area_under_roc(is_low, np.exp(3 * p) - 7) == pytest.approx(found, nan_ok=True)
    assert area_under_roc(is_low, -p) == pytest.approx(1 - found, nan_ok=True)
    assert area_under_roc(~is_low, p) == pytest.approx(1 - found, nan_ok=True)


@given(LABELLED)
def test_auc_is_the_share_of_pairs_in_order(data):
    is_low, p = data
    low, high = p[is_low][:, None], p[~is_low]
    if low.size and high.size:
        pairs = ((low > high) + 0.5 * (low == high)).mean()
        assert area_under_roc(is_low, p) == pytest.approx(pairs)


@given(LABELLED, st.randoms())
def test_order_of_holes_does_not_matter_and_shares_are_shares(data, random):
    is_low, p = data
    found = classifier_metrics(is_low, p)
    order = np.array(random.sample(range(len(p)), len(p)))
    again = classifier_metrics(is_low[order], p[order])
    assert again == pytest.approx(found, nan_ok=True)
    values = np.array([found[name] for name in found if name not in ("num_holes", "log_loss")])
    assert ((values >= 0) & (values <= 1) | np.isnan(values)).all()
    assert confusion(is_low, p).sum() == len(p)


@given(LABELLED)
def test_swapping_the_classes_changes_no_symmetric_figure(data):
    is_low, p = data
    p = np.round(p, 4)  # 1 - p then keeps apart what is apart
    p = np.where(p == 0.5, 0.4, p)  # the threshold itself is on the side of low
    found, swapped = classifier_metrics(is_low, p), classifier_metrics(~is_low, 1 - p)
    for name in ("accuracy", "accuracy_at_median", "brier", "log_loss"):
        assert swapped[name] == pytest.approx(found[name], abs=1e-9)


@given(LABELLED, st.integers(1, 20))
def test_reliability_keeps_every_hole(data, num_bins):
    is_low, p = data
    found = reliability(is_low, p, num_bins)
    assert found.count.sum() == len(p)
    assert np.nansum(found.count * found.mean_p) == pytest.approx(p.sum())
    assert np.nansum(found.count * found.low_share) == pytest.approx(is_low.sum())


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    rng = np.random.default_rng(0)
    true_logit = 1.5 * rng.standard_normal(20_000)
    is_low = rng.logistic(size=20_000) < true_logit
    assert fit_temperature(true_logit * temperature, is_low) == pytest.approx(temperature, rel=0.05)


def test_temperature_by_hand():
    # All logits 2, three of four low: without the prior sigmoid(2 / T) = 3/4, T = 2 / log 3.
    logit, is_low = np.full(4000, 2.0), np.arange(4000) % 4 > 0
    assert fit_temperature(logit, is_low) == pytest.approx(2 / np.log(3), abs=1e-3)


def test_temperature_without_labels_is_one():
    assert fit_temperature([], []) == pytest.approx(1)


def test_few_separable_labels_do_not_make_certainty():
    temperature = fit_temperature([1.0, 2.0, -1.0], [True, True, False])
    assert 0.4 < temperature < 1
    assert fit_temperature([1.0, 2.0, -1.0], [False, False, True]) > 1
    one_class = fit_temperature(np.full(300, 3.0), np.ones(300, bool))
    assert 0.05 <= one_class < 1


def test_temperature_stays_in_its_range():
    assert fit_temperature(np.full(1000, 500.0), np.arange(1000) % 2 > 0) == 20
    assert fit_temperature(np.full(100_000, 0.01), np.ones(100_000, bool)) == 0.05
    with pytest.raises(ValueError, match="row 1 is not finite"):
        fit_temperature([0.0, np.inf], [True, False])


@given(
    st.lists(st.tuples(st.booleans(), st.floats(-30, 30)), max_size=30),
)
def test_temperature_is_the_least_of_its_objective(rows):
    is_low, logit = np.array([r[0] for r in rows], bool), np.array([r[1] for r in rows], float)
    z = np.where(is_low, logit, -logit)

    def loss(log_beta):
        beta = np.exp(log_beta)
        return beta - np.log(beta) - log_expit(beta * z).sum()

    span = (np.log(0.05), np.log(20.0))
    best = minimize_scalar(loss, bounds=span, method="bounded", options={"xatol": 1e-8})
    found = np.log(1 / fit_temperature(logit, is_low))
    assert loss(found) <= best.fun + 1e-9 * max(1, abs(best.fun))
    assert np.isfinite(expit(logit / np.exp(-found))).all()
