"""Quality of pseudo labels by hand; lemma 1 on any hierarchy and any tour; collapse and fall."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.cryoem.types import HoleTable
from ssl2rl_ray.loop.diagnostics import (
    has_fallen,
    inconsistency_bound,
    inconsistency_rate,
    is_collapsed,
    label_quality,
    mean_entropy,
    num_switches,
    tour_figures,
)
from ssl2rl_ray.loop.pseudo_labels import PseudoLabels

LEVELS = ("patch", "square", "grid")


def random_table(rng, n: int) -> HoleTable:
    """A hierarchy of any shape, down to groups of one and up to one group."""
    patch = rng.integers(0, rng.integers(1, n + 1), n)
    square = rng.integers(0, rng.integers(1, n + 1), n)[patch]
    grid = rng.integers(0, rng.integers(1, n + 1), n)[square]
    return HoleTable.from_names(
        hole_name=np.arange(n).astype(str),
        patch=patch.astype(str),
        square=square.astype(str),
        grid=grid.astype(str),
    )


def block_tour(rng, table: HoleTable):
    """A tour that finishes every group before it leaves it."""
    keys = [rng.permutation(len(table))]
    keys += [rng.permutation(len(table))[getattr(table, f"{level}_id")] for level in LEVELS]
    return np.lexsort(keys)


def quality_of(truth, p, is_low, confidence, score, rows=None, num_votes=1, rule="any"):
    labels = PseudoLabels(
        is_low=np.array(is_low),
        confidence=np.array(confidence, float),
        score=np.array(score, float),
        num_votes=num_votes,
    )
    rows = np.arange(len(truth)) if rows is None else np.array(rows)
    return label_quality(rule, labels, truth, p, rows)


def test_label_quality_by_hand():
    # Row 0 is labelled, row 6 was never measured.
    found = quality_of(
        truth=[0, 1, 1, 0, 0, 1, np.nan],
        p=[0.99, 0.9, 0.4, 0.7, 0.6, 0.3, 0.95],
        is_low=[False, True, True, False, True, False, True],
        confidence=[0, 1, 1, 0.6, 1, 0.8, 1],
        score=[np.nan, 0.9, 0.8, 0.1, 0.7, 0.2, 1.0],
        rows=[1, 2, 3, 4, 5, 6],
        num_votes=5,
        rule="visit-order",
    )
    assert found["rule"] == "visit-order"
    assert found["num_unlabelled"] == 6
    assert found["num_positive"] == 4
    # Rows 1..5: truth 1 1 0 0 1, called 1 1 0 1 0; pairs won by the score: .9, .8 both, .2 one.
    assert found["labels"] == pytest.approx(
        {
            "accuracy": 3 / 5,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "auc": 5 / 6,
            "positive_share": 3 / 5,
        }
    )
    # The best three by p: 1, 3, 4; pairs won: .9 both.
    assert found["own_ranking"] == pytest.approx(
        {
            "accuracy": 1 / 5,
            "precision": 1 / 3,
            "recall": 1 / 3,
            "auc": 2 / 6,
            "positive_share": 3 / 5,
        }
    )
    assert found["own_threshold"] == found["own_ranking"]  # three are above .5, the same ones
    # 5 holes: .1 -> 1 hole (a half goes up), .2 -> 1, .3 and .4 -> 2, .5 and .6 -> 3, then 4, 4, 5.
    assert found["curve"]["share"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    order_by_score, order_by_p = [1, 1, 0, 1, 0], [1, 0, 0, 1, 1]
    for name, low in (("labels", order_by_score), ("own", order_by_p)):
        expected = [np.mean(low[:k]) for k in (1, 1, 2, 2, 3, 3, 4, 4, 5)]
        assert found["curve"][name] == pytest.approx(expected)
    assert found["confidence_mean"] == pytest.approx((1 + 1 + 0.6 + 1 + 0.8 + 1) / 6)
    # All agree on 1, 2 and 4, of which 4 is wrong; of 3 and 5 one is right.
    assert found["agreement_share"] == pytest.approx(3 / 5)
    assert found["agreement_accuracy"] == pytest.approx(2 / 3)
    assert found["disagreement_accuracy"] == pytest.approx(1 / 2)


def test_what_is_not_defined_is_null_and_the_rest_is_json():
    found = quality_of([1, 1], [0.9, 0.2], [False, False], [1, 1], [1, 0])
    assert found["labels"]["auc"] is None
    assert found["labels"]["precision"] is None
    assert found["labels"]["recall"] == 0
    assert found["agreement_share"] is None  # a single opinion agrees with itself
    none = quality_of([np.nan], [0.5], [True], [1.0], [0.0], num_votes=3)
    assert none["num_positive"] == 1
    assert set(none["labels"].values()) == {None}
    assert set(none["curve"]["own"]) == {None}
    assert none["agreement_share"] is None
    empty = quality_of([1.0], [0.5], [False], [0.0], [np.nan], rows=np.array([], int))
    assert empty["confidence_mean"] is None
    for figures in (found, none, empty):
        json.dumps(figures, allow_nan=False)


def test_perfect_and_own_labels():
    rng = np.random.default_rng(0)
    truth, p = (rng.random(200) < 0.4).astype(float), rng.random(200)
    perfect = quality_of(truth, p, truth == 1, np.ones(200), truth)
    assert perfect["labels"]["accuracy"] == perfect["labels"]["auc"] == 1
    assert perfect["curve"]["labels"][2] == 1
    own = quality_of(truth, p, p >= 0.5, np.maximum(p, 1 - p), p)
    assert own["labels"] == own["own_ranking"] == own["own_threshold"]
    assert own["curve"]["labels"] == own["curve"]["own"]


def hand_table() -> HoleTable:
    # Patches 0: holes 0 1; 1: holes 2 3; 2: holes 4 5. Squares: {0, 1}, {2}. One grid.
    return HoleTable.from_names(
        hole_name=[str(row) for row in range(6)],
        patch=list("aabbcc"),
        square=list("AAAABB"),
        grid=["G"] * 6,
    )


def test_tours_by_hand():
    table = hand_table()
    order = np.array([[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
    np.testing.assert_array_equal(num_switches(table, order), [[3, 1, 1, 0], [0, 2, 3, 0]])
    found = tour_figures(table, order, np.zeros(6, bool), 3)
    assert found["num_switches"] == {"hole": 1.5, "patch": 1.5, "square": 2, "grid": 0}
    # First tour, N_C 3: patch 1 is cut. Second: every patch has its first hole low, both squares
    # are mixed, and the three entries beyond the first to each allow it.
    assert found["inconsistency"] == {
        "patch": (1 / 3 + 1) / 2,
        "square": (1 / 2 + 1) / 2,
        "grid": 1,
    }
    assert found["inconsistency_bound"] == {
        "patch": (1 / 3 + 1) / 2,
        "square": (1 / 2 + 1) / 2,
        "grid": 1,
    }
    # Holes 1, 3 and 5 labelled: each patch has one hole left, and cannot be of both kinds.
    found = tour_figures(table, order, np.array([False, True] * 3), 1)
    assert found["inconsistency"] == {"patch": 0, "square": 0.5, "grid": 1}
    assert found["inconsistency_bound"]["patch"] == pytest.approx(1 / 3)
    json.dumps(found, allow_nan=False)
    full = tour_figures(table, order, np.ones(6, bool), 0)
    assert full["inconsistency"] == full["inconsistency_bound"] == dict.fromkeys(LEVELS)


def test_a_group_without_unlabelled_holes_does_not_count():
    ids = np.array([0, 0, 1, 1, 2, 2])
    low = np.array([True, False, True, True, True, False])
    assert inconsistency_rate(low, ids, np.ones(6, bool)) == pytest.approx(2 / 3)
    assert inconsistency_rate(low, ids, np.array([1, 1, 1, 1, 0, 0], bool)) == 0.5
    assert inconsistency_rate(low, ids, np.array([1, 0, 1, 1, 0, 0], bool)) == 0
    assert np.isnan(inconsistency_rate(low, ids, np.zeros(6, bool)))


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    share=st.floats(0, 1),
    labelled=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    noise=st.integers(0, 5),
)
def test_lemma_1(seed, n, share, labelled, noise):
    """Any hierarchy; tours by blocks, by blocks with some returns, and at random."""
    rng = np.random.default_rng(seed)
    table = random_table(rng, n)
    with_returns = block_tour(rng, table)
    for _ in range(noise):
        i, j = rng.integers(0, n, 2)
        with_returns[[i, j]] = with_returns[[j, i]]
    orders = np.stack([block_tour(rng, table), with_returns, rng.permutation(n)])
    is_labelled = rng.random(n) < labelled
    num_unlabelled = int((~is_labelled).sum())
    if not num_unlabelled:
        return
    num_low = int(share * num_unlabelled)
    tours = orders[~is_labelled[orders]].reshape(3, -1)
    switches = num_switches(table, orders)
    assert (switches.sum(axis=1) == n - 1).all()
    for level, name in enumerate(LEVELS, start=1):
        ids = getattr(table, f"{name}_id")
        bound = inconsistency_bound(ids, tours)
        num_groups = len(np.unique(ids[~is_labelled]))
        num_mixed = []
        for tour in tours:
            is_low = np.zeros(n, bool)
            is_low[tour[:num_low]] = True
            num_mixed.append(inconsistency_rate(is_low, ids, ~is_labelled) * num_groups)
        assert (np.array(num_mixed) <= bound * num_groups + 1e-9).all()
        # Step 4 of the proof: the switches of the whole tour, labelled holes included.
        num_entries = 1 + switches[:, level:].sum(axis=1)
        num_returns = num_entries - len(np.unique(ids))
        assert (np.array(num_mixed) <= 1 + num_returns + 1e-9).all()
        assert (bound * num_groups <= 1 + num_returns + 1e-9).all()
        # By blocks: no returns, and at most one group.
        assert num_returns[0] == 0
        assert num_mixed[0] <= 1 + 1e-9


@given(sizes=st.lists(st.integers(2, 5), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_the_bound_is_reached(sizes, seed):
    """A block tour whose cutoff cuts a group; a tour that takes one hole of each, then the rest."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    n, everywhere = len(ids), np.ones(len(ids), bool)
    first = np.cumsum(sizes) - sizes
    blocks = np.arange(n)
    cut = first[rng.integers(len(sizes))] + 1  # one hole of a group, at least one is left
    twice = np.concatenate([first, np.setdiff1d(blocks, first)])
    for tour, num_low, num_mixed in ((blocks, cut, 1), (twice, len(sizes), len(sizes))):
        is_low = np.zeros(n, bool)
        is_low[tour[:num_low]] = True
        assert inconsistency_rate(is_low, ids, everywhere) * len(sizes) == pytest.approx(num_mixed)
        (bound,) = inconsistency_bound(ids, tour[None])
        assert bound * len(sizes) == pytest.approx(num_mixed)


def test_a_collapse_is_all_one_way_where_the_labels_are_not():
    assert is_collapsed({"positive_share": 0.99}, 0.5)
    assert is_collapsed({"positive_share": 0.0}, 0.5)
    assert not is_collapsed({"positive_share": 0.05}, 0.5)
    assert not is_collapsed({"positive_share": 0.95}, 0.5)
    assert not is_collapsed({"positive_share": 0.99}, 0.97)  # so are the labels
    assert not is_collapsed({"positive_share": None}, 0.5)
    assert not is_collapsed({"positive_share": float("nan")}, 0.5)


def test_a_fall_is_from_the_best_so_far():
    assert not has_fallen([], 0.02)
    assert not has_fallen([0.6], 0.02)
    assert not has_fallen([0.6, 0.59], 0.02)
    assert has_fallen([0.6, 0.63, 0.62, 0.6], 0.02)
    assert not has_fallen([0.63, 0.5, 0.62], 0.02)  # it has come back
    assert not has_fallen([0.5, 0.7], 0.02)


def test_entropy_of_predictions():
    assert mean_entropy([0.5, 1.0, 0.0]) == pytest.approx(np.log(2) / 3)
    assert mean_entropy([]) is None
