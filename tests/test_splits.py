"""Splits by square, labelled shares that nest, folds, and the marks of labels."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable
from ssl2rl_ray.data.splits import choose_labelled, folds, label_marks, marks, split_by_square


@pytest.fixture(scope="module")
def y3() -> HoleTable:
    return draw_session(np.random.default_rng(0), "y3-mini")


def test_the_split_has_the_papers_sizes_and_breaks_no_square(y3):
    for seed in range(20):
        held_out = split_by_square(y3, 0.25, np.random.default_rng(seed))
        # SSL²-RL, table 1: 6489 and 2164 of 8653
        assert abs(held_out.sum() - 2164) < 0.1 * 2164
        squares = y3.square_id[held_out]
        assert not np.isin(y3.square_id[~held_out], squares).any()
    other = split_by_square(y3, 0.25, np.random.default_rng(1))
    assert (other != split_by_square(y3, 0.25, np.random.default_rng(2))).any()
    assert (other == split_by_square(y3, 0.25, np.random.default_rng(1))).all()


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.001, 0.999), seed=st.integers(0, 100))
def test_both_sides_always_hold_a_square(y3, share, seed):
    held_out = split_by_square(y3, share, np.random.default_rng(seed))
    assert held_out.any() and not held_out.all()


def test_a_single_square_cannot_be_split(y3):
    with pytest.raises(ValueError, match="two squares or more"):
        split_by_square(y3.select(y3.square_id == 0), 0.25, np.random.default_rng(0))


def test_smaller_labelled_shares_are_parts_of_larger_ones():
    rows = np.arange(10, 2010)
    chosen = [choose_labelled(rows, f, np.random.default_rng(3)) for f in (0.05, 0.1, 0.2, 1.0)]
    assert [len(c) for c in chosen] == [100, 200, 400, 2000]
    for small, large in itertools.pairwise(chosen):
        assert np.isin(small, large).all() and (np.diff(small) > 0).all()
    assert len(choose_labelled(rows, 0.0, np.random.default_rng(0))) == 0
    assert len(choose_labelled(rows, 1e-6, np.random.default_rng(0))) == 1
    assert len(choose_labelled(rows[:0], 0.5, np.random.default_rng(0))) == 0


def test_folds_are_a_partition():
    rows = np.arange(100, 123)
    parts = folds(rows, 5, np.random.default_rng(0))
    assert sorted(map(len, parts)) == [4, 4, 5, 5, 5]
    assert np.array_equal(np.sort(np.concatenate(parts)), rows)


def test_marks_tell_a_label_again_and_nothing_else(y3):
    rows = np.array([5, 7, 11])
    found = marks(y3, rows)
    assert len(set(found)) == 3 and all(len(mark) == 12 for mark in found)
    assert marks(y3.select(np.arange(20)), rows) == found  # a part of the session: the same
    changed = y3.replace(ctf_max_resolution_A=y3.ctf_max_resolution_A + 0.01)
    assert not set(marks(changed, rows)) & set(found)
    few = np.zeros(len(y3), bool)
    few[rows] = True
    assert label_marks(y3.replace(is_labelled=few)) == frozenset(found)
