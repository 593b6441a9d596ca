"""Rules of pseudo labels: by hand, for any evidence, and what they never read."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from envs.cryoem.types import HoleTable
from ssl2rl_ray.loop.pseudo_labels import RULES, Evidence, num_positive, pseudo_labels
from ssl2rl_ray.perception.metrics import area_under_roc

VOTED = ("visit-order", "q-values")
BY_PROBABILITY = ("self", "ranking", "smooth", "posterior", "truth")
BY_CUTOFF = ("visit-order", "ranking", "smooth", "posterior", "q-values")


def table_of(patch, square=None, grid=None) -> HoleTable:
    patch = np.asarray(patch)
    square = np.zeros_like(patch) if square is None else np.asarray(square)
    grid = np.zeros_like(patch) if grid is None else np.asarray(grid)
    return HoleTable.from_names(
        hole_name=np.arange(len(patch)).astype(str),
        patch=patch.astype(str),
        square=square.astype(str),
        grid=grid.astype(str),
    )


def evidence_of(p, **changes) -> Evidence:
    """One patch, nothing labelled, unless changed."""
    n = len(p)
    values = {
        "table": table_of(np.zeros(n, int)),
        "p_low_ctf": np.array(p, float),
        "is_low": np.zeros(n, bool),
        "is_labelled": np.zeros(n, bool),
    }
    return Evidence(**{**values, **changes})


def random_evidence(seed: int, n: int = 60, num_rollouts: int = 3, labelled: float = 0.2):
    """Everything that any rule reads; no two scores are equal."""
    rng = np.random.default_rng(seed)
    patch = rng.integers(0, max(n // 6, 1), n)
    logit = rng.standard_normal(n) + rng.standard_normal(n)[patch]
    is_labelled = rng.random(n) < labelled
    is_labelled[0], is_labelled[-1] = True, False
    return Evidence(
        table=table_of(patch, patch // 3, patch // 9),
        p_low_ctf=expit(logit),
        is_low=rng.random(n) < expit(logit),
        is_labelled=is_labelled,
        visit_order=np.stack([rng.permutation(n) for _ in range(num_rollouts)]),
        value=rng.standard_normal((num_rollouts, n)),
        p_posterior=rng.random(n),
        truth=(rng.random(n) < 0.5).astype(float),
    )


def assert_same(one, other):
    np.testing.assert_array_equal(one.is_low, other.is_low)
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-9)
    np.testing.assert_allclose(one.score, other.score, atol=1e-9)


def test_visit_order_by_hand():
    # Hole 0 is labelled: it fills no place among the first two, wherever it is visited.
    evidence = evidence_of(
        [0.5] * 5,
        is_labelled=np.array([True, False, False, False, False]),
        is_low=np.array([True, False, False, False, False]),
        visit_order=np.array([[0, 1, 2, 3, 4], [1, 0, 3, 2, 4], [4, 1, 2, 0, 3]]),
    )
    found = pseudo_labels("visit-order", evidence, 0.5)
    # The first two unlabelled of each: {1, 2}, {1, 3}, {4, 1}. Nobody has two of three but 1.
    np.testing.assert_array_equal(found.is_low, [False, True, False, False, False])
    np.testing.assert_allclose(found.confidence, [0, 1, 2 / 3, 2 / 3, 2 / 3])
    # Places from the end, of three: 1 -> 3, 3, 2; 2 -> 2, 1, 1; 3 -> 1, 2, 0; 4 -> 0, 0, 3.
    np.testing.assert_allclose(found.score, np.array([np.nan, 8, 4, 3, 3]) / 9)
    assert found.num_votes == 3
    # One roll-out has nobody to disagree with.
    alone = dataclasses.replace(evidence, visit_order=np.array([[4, 0, 2, 1, 3]]))
    found = pseudo_labels("visit-order", alone, 0.5)
    np.testing.assert_array_equal(found.is_low, [False, False, True, False, True])
    np.testing.assert_array_equal(found.confidence, [0, 1, 1, 1, 1])


def test_an_even_vote_is_decided_by_the_mean_rank():
    # N_C 2. Hole 0: first and third, mean rank 1; hole 1: second both times; hole 2: third, first.
    evidence = evidence_of([0.5] * 4, visit_order=np.array([[0, 1, 2, 3], [2, 1, 0, 3]]))
    found = pseudo_labels("visit-order", evidence, 0.5)
    np.testing.assert_array_equal(found.is_low, [True, True, True, False])
    np.testing.assert_array_equal(found.confidence, [0.5, 1, 0.5, 1])
    # Hole 0: first and fourth, mean rank 1.5, no nearer to the first two than to the others.
    evidence = evidence_of([0.5] * 4, visit_order=np.array([[0, 1, 2, 3], [2, 1, 3, 0]]))
    found = pseudo_labels("visit-order", evidence, 0.5)
    np.testing.assert_array_equal(found.is_low, [False, True, True, False])


def test_self_and_ranking_by_hand():
    evidence = evidence_of([0.9, 0.6, 0.5, 0.3, 0.2])
    found = pseudo_labels("self", evidence, 0.2)
    np.testing.assert_array_equal(found.is_low, [True, True, True, False, False])
    np.testing.assert_allclose(found.confidence, [0.8, 0.2, 0, 0.4, 0.6], atol=1e-12)
    np.testing.assert_allclose(found.score, [1, 0.75, 0.5, 0.25, 0])
    found = pseudo_labels("ranking", evidence, 0.2)
    np.testing.assert_array_equal(found.is_low, [True, False, False, False, False])
    # What the cutoff overrules is more probably wrong than right: it is not drawn at all.
    np.testing.assert_allclose(found.confidence, [0.8, 0, 0, 0.4, 0.6], atol=1e-12)


def test_equal_scores_are_taken_in_the_order_of_the_table():
    found = pseudo_labels("ranking", evidence_of([0.5, 0.7, 0.5, 0.5]), 0.5)
    np.testing.assert_array_equal(found.is_low, [True, True, False, False])


def test_q_values_and_posterior_by_hand():
    value = np.array([[3.0, -1.0, 2.0, 0.0], [30.0, 10.0, 0.0, 20.0], [1.0, 4.0, 3.0, 2.0]])
    evidence = evidence_of([0.5] * 4, value=value, p_posterior=np.array([0.1, 0.8, 0.7, 0.2]))
    # {0, 2}, {0, 3}, {1, 2}: rows are compared by their order, not by their units.
    found = pseudo_labels("q-values", evidence, 0.5)
    np.testing.assert_array_equal(found.is_low, [True, False, True, False])
    np.testing.assert_allclose(found.confidence, [2 / 3] * 4)
    found = pseudo_labels("posterior", evidence, 0.5)
    np.testing.assert_array_equal(found.is_low, [False, True, True, False])
    np.testing.assert_allclose(found.confidence, [0.8, 0.6, 0.4, 0.6])


def test_a_roll_out_does_not_vote_on_holes_that_it_did_not_choose():
    nan = np.nan
    value = np.array([[nan, 4, 3, 2, nan, nan], [6, 5, 1, 2, 4, nan], [1, 2, nan, nan, 8, nan]])
    found = pseudo_labels("q-values", evidence_of([0.5] * 6, value=value), 0.5)
    # Half of 3, 5 and 3, a half goes up: {1, 2}, {0, 1, 4}, {4, 1}.
    # Hole 0: 1 of 2, ranks 1st of 5 and 3rd of 3; hole 2: 1 of 2, 2nd of 3 and 5th of 5.
    np.testing.assert_allclose(found.confidence, [1 / 2, 1, 1 / 2, 1, 1, 0])
    np.testing.assert_array_equal(found.is_low, [True, True, False, False, True, False])
    np.testing.assert_allclose(found.score, [1 / 2, 2.25 / 3, 1 / 4, 1 / 8, 1.5 / 2, 1 / 2])


def test_truth_is_sure_and_silent_where_nothing_was_measured():
    found = pseudo_labels("truth", evidence_of([0.5] * 3, truth=np.array([1, 0, np.nan])))
    np.testing.assert_array_equal(found.is_low, [True, False, False])
    np.testing.assert_array_equal(found.confidence, [1, 1, 0])


def test_none_gives_none():
    assert pseudo_labels("none", evidence_of([0.5, 0.5])) is None


def test_smooth_leans_on_patches_where_they_tell_and_not_where_they_do_not():
    rng = np.random.default_rng(0)
    n = 4000
    patch = np.arange(n) // 20
    is_labelled = rng.random(n) < 0.2
    quality = rng.standard_normal(n)[patch]
    noise = 1.5 * rng.standard_normal(n)
    for truth_logit, is_better in ((2 * quality, True), (2 * noise, False)):
        low = rng.random(n) < expit(truth_logit)
        # The classifier sees a patch's quality through each hole's noise, or the hole alone.
        p = expit(quality + noise if is_better else noise + 0.1 * rng.standard_normal(n))
        evidence = evidence_of(
            p, table=table_of(patch, patch // 10), is_low=low, is_labelled=is_labelled
        )
        rows = ~is_labelled
        smooth = pseudo_labels("smooth", evidence)
        own = area_under_roc(low[rows], p[rows])
        found = area_under_roc(low[rows], smooth.score[rows])
        if is_better:
            assert found > own + 0.1
        else:
            assert found == pytest.approx(own, abs=0.002)


def test_smooth_without_labels_is_the_classifiers_own():
    evidence = random_evidence(3)
    evidence = dataclasses.replace(evidence, is_labelled=np.zeros(60, bool))
    assert_same(pseudo_labels("smooth", evidence, 0.4), pseudo_labels("ranking", evidence, 0.4))


def test_smooth_fits_what_a_general_optimiser_fits_and_leaves_each_label_out():
    from ssl2rl_ray.loop.pseudo_labels import _fit_logistic

    rng = np.random.default_rng(1)
    x = rng.normal(1.0, 2.0, 40)
    low = (rng.random(40) < expit(0.3 + 0.8 * x)).astype(float)

    def fit(rows):
        def loss(c):
            eta = c[0] + c[1] * x[rows]
            prior = (c[0] ** 2 + (c[1] - 1) ** 2) / 2
            return np.logaddexp(0, np.where(low[rows] == 1, -eta, eta)).sum() + prior

        return minimize(loss, [0.0, 1.0], tol=1e-10).x

    coefficients, (loss,) = _fit_logistic(x[None], low)
    np.testing.assert_allclose(coefficients[0], fit(np.arange(40)), atol=1e-4)
    left_out = 0.0
    for row in range(40):
        a, b = fit(np.delete(np.arange(40), row))
        eta = a + b * x[row]
        left_out += np.logaddexp(0, -eta if low[row] else eta) / 40
    assert loss == pytest.approx(left_out, rel=0.01)


def test_default_cutoff_is_the_low_share_of_the_labelled():
    low = np.array([True, True, False, True, True, True, True, True])
    labelled = np.array([True, True, True, False, False, False, False, False])
    evidence = evidence_of([0.5] * 8, is_low=low, is_labelled=labelled)
    assert num_positive(evidence) == 3  # 2/3 of 5
    assert num_positive(evidence, 0.1) == 1  # a half goes up
    assert num_positive(evidence, 1.0) == 5
    assert num_positive(evidence, 0.0) == 0


@pytest.mark.parametrize(
    ("rule", "changes", "cutoff", "message"),
    [
        ("visit-order", {"visit_order": None}, 0.5, "rule visit-order needs roll-outs"),
        ("visit-order", {"visit_order": np.array([[0, 1, 1]])}, 0.5, "never visits row 2"),
        ("visit-order", {"visit_order": np.array([[0, 1, 3]])}, 0.5, "0 to 2"),
        ("visit-order", {"visit_order": np.array([[0, 1, -1]])}, 0.5, "0 to 2"),
        ("visit-order", {"visit_order": np.array([0, 1, 2])}, 0.5, r"visit_order: \(3,\)"),
        ("q-values", {}, 0.5, "rule q-values needs roll-outs of a policy with values"),
        ("q-values", {"value": np.full((2, 3), np.nan)}, 0.5, "value is NaN throughout"),
        ("posterior", {}, 0.5, "rule posterior needs"),
        ("posterior", {"p_posterior": np.array([0, np.nan, 1])}, 0.5, "p_posterior: row 1"),
        ("truth", {}, 0.5, "rule truth needs"),
        ("ranking", {}, None, "none is labelled; set it"),
        ("ranking", {}, 1.5, "positive_cutoff: a share"),
        ("ranking", {"p_low_ctf": np.array([0.5, 2.0, 0.5])}, 0.5, "row 1 is 2.0"),
        ("ranking", {"is_low": np.zeros(2, bool)}, 0.5, r"is_low: \(2,\) for 3 holes"),
        ("paper", {}, 0.5, "'paper' is not one of"),
    ],
)
def test_errors_say_what_is_missing(rule, changes, cutoff, message):
    with pytest.raises(ValueError, match=message):
        pseudo_labels(rule, evidence_of([0.5] * 3, **changes), cutoff)


@pytest.mark.parametrize("rule", BY_CUTOFF)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 80), cutoff=st.floats(0, 1))
def test_one_row_calls_exactly_n_c_holes_low(rule, seed, n, cutoff):
    evidence = random_evidence(seed, n, num_rollouts=1)
    found = pseudo_labels(rule, evidence, cutoff)
    assert found.is_low.sum() == num_positive(evidence, cutoff)
    # And they are the best ones.
    rows = ~evidence.is_labelled
    low, high = found.score[rows & found.is_low], found.score[rows & ~found.is_low]
    if low.size and high.size:
        assert low.min() > high.max()


@pytest.mark.parametrize("rule", VOTED)
@given(seed=st.integers(0, 2**31), num_rollouts=st.integers(1, 8))
def test_votes_are_a_majority(rule, seed, num_rollouts):
    evidence = random_evidence(seed, num_rollouts=num_rollouts)
    found = pseudo_labels(rule, evidence, 0.5)
    rows = ~evidence.is_labelled
    assert found.num_votes == num_rollouts
    assert (found.confidence[rows] >= 0.5).all()
    assert (found.confidence[rows] <= 1).all()
    # The votes for the label, counted one roll-out at a time.
    field = {"visit-order": "visit_order", "q-values": "value"}[rule]
    alone = [
        pseudo_labels(rule, dataclasses.replace(evidence, **{field: row[None]}), 0.5)
        for row in getattr(evidence, field)
    ]
    votes = np.stack([labels.is_low for labels in alone])
    agree = (votes == found.is_low).mean(axis=0)
    np.testing.assert_allclose(found.confidence[rows], agree[rows])
    # The order of the roll-outs does not matter.
    other = dataclasses.replace(evidence, **{field: getattr(evidence, field)[::-1]})
    assert_same(pseudo_labels(rule, other, 0.5), found)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
@given(seed=st.integers(0, 2**31))
def test_the_order_of_the_table_does_not_matter(rule, seed):
    evidence = random_evidence(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(60)  # new row -> old row
    moved = Evidence(
        table=evidence.table.select(order),
        visit_order=np.argsort(order)[evidence.visit_order],
        value=evidence.value[:, order],
        **{
            name: getattr(evidence, name)[order]
            for name in ("p_low_ctf", "is_low", "is_labelled", "p_posterior", "truth")
        },
    )
    found, other = pseudo_labels(rule, evidence, 0.4), pseudo_labels(rule, moved, 0.4)
    np.testing.assert_array_equal(other.is_low, found.is_low[order])
    np.testing.assert_allclose(other.confidence, found.confidence[order], atol=1e-9)
    if rule != "truth":  # whose scores are equal, and go by the order of the table
        np.testing.assert_allclose(other.score, found.score[order], atol=1e-9)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
@given(seed=st.integers(0, 2**31), cutoff=st.none() | st.floats(0, 1))
def test_labels_of_unlabelled_holes_and_the_truth_are_never_read(rule, seed, cutoff):
    evidence = random_evidence(seed)
    rng = np.random.default_rng(seed)
    hidden = ~evidence.is_labelled
    changes = {
        "is_low": np.where(hidden, rng.random(60) < 0.5, evidence.is_low),
        "table": evidence.table.replace(
            ctf_max_resolution_A=rng.uniform(3, 9, 60),
            predicted_ctf_A=rng.uniform(3, 9, 60),
            p_low_ctf=rng.random(60),
            is_labelled=rng.random(60) < 0.5,
        ),
    }
    if rule != "truth":
        changes["truth"] = np.full(60, np.nan)
    poisoned = dataclasses.replace(evidence, **changes)
    assert_same(pseudo_labels(rule, poisoned, cutoff), pseudo_labels(rule, evidence, cutoff))
    without = dataclasses.replace(evidence, truth=None) if rule != "truth" else evidence
    assert_same(pseudo_labels(rule, without, cutoff), pseudo_labels(rule, evidence, cutoff))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_labelled_holes_take_no_label_and_all_may_be_labelled(rule):
    evidence = random_evidence(5)
    found = pseudo_labels(rule, evidence)
    assert not found.is_low[evidence.is_labelled].any()
    assert (found.confidence[evidence.is_labelled] == 0).all()
    np.testing.assert_array_equal(np.isnan(found.score), evidence.is_labelled)
    full = dataclasses.replace(evidence, is_labelled=np.ones(60, bool))
    assert not pseudo_labels(rule, full).is_low.any()


@pytest.mark.parametrize("rule", RULES)
def test_is_fast_for_a_whole_session(rule):
    evidence = random_evidence(0, n=6489, num_rollouts=5)
    start = time.perf_counter()
    pseudo_labels(rule, evidence)
    assert time.perf_counter() - start < 1.0  # 2 to 30 ms; far off, so that a busy machine passes
