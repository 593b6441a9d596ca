"""Synthetic sessions: rules that always hold, and likeness to the real training half."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from envs.cryoem.calibration import base_logit_of, fit_calibration
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import PRESETS, draw_session, redraw_labels, synthetic_calibration
from envs.cryoem.types import NavigationConfig, RandomEffects
from tests.test_calibration import read_aldolase

CONFIG = NavigationConfig.preset("cryorl")


def shares(table, value):
    """Shares of the sum of squares: grid, square, patch, hole."""

    def of(ids):
        return (np.bincount(ids, value) / np.bincount(ids))[ids]

    levels = [np.full(len(value), value.mean())]
    levels += [of(table.grid_id), of(table.square_id), of(table.patch_id), value]
    squares = np.array([((b - a) ** 2).sum() for a, b in itertools.pairwise(levels)])
    return squares / squares.sum()


def area_under_curve(table):
    low = table.ctf_max_resolution_A < 6
    rank = rankdata(-table.predicted_ctf_A)[low]
    return (rank.sum() - low.sum() * (low.sum() + 1) / 2) / (low.sum() * (~low).sum())


@pytest.fixture(scope="module")
def sessions():
    rng = np.random.default_rng(0)
    return [draw_session(rng) for _ in range(60)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), preset=st.sampled_from(["aldolase", "demo"]))
def test_every_draw_is_a_whole_session(seed, preset):
    table = draw_session(np.random.default_rng(seed), preset)
    p = PRESETS[preset]
    n, num_patches, num_squares, num_grids, num_slots = p.max_shape
    assert len(table) <= n and len(table.patch_name) <= num_patches
    assert len(table.square_name) <= num_squares
    assert p.num_grids[0] <= len(table.grid_name) <= num_grids
    assert np.bincount(table.patch_id).max() <= num_slots
    assert table.is_labelled.all()
    assert not (table.ctf_max_resolution_A == 6.0).any()  # < and <= agree
    assert ((table.p_low_ctf > 0) & (table.p_low_ctf < 1)).all()
    assert len(np.unique(np.stack([table.x, table.y]), axis=1).T) == len(table)
    p_again = synthetic_calibration(preset).apply(table).p_low_ctf
    np.testing.assert_array_equal(p_again, table.p_low_ctf)


def test_same_generator_same_session():
    first, second, third = (draw_session(np.random.default_rng(s), "demo") for s in (7, 7, 8))
    assert first.content_hash == second.content_hash != third.content_hash


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="'aldolas' is not one of"):
        draw_session(np.random.default_rng(0), "aldolas")


def test_one_may_bring_a_preset_of_ones_own():
    mine = dataclasses.replace(PRESETS["demo"], num_grids=(2, 2), squares_per_grid=(1, 1))
    assert len(draw_session(np.random.default_rng(0), mine).grid_name) == 2


def test_a_pool_fits_one_stack_with_larger_ones_of_the_preset():
    tables = [draw_session(np.random.default_rng(seed), "demo") for seed in range(3)]
    assert SessionStack.of(tables, CONFIG).num_holes.tolist() == [len(t) for t in tables]


def test_y3_has_the_published_numbers():
    table = draw_session(np.random.default_rng(0), "y3")
    sizes = (len(table.grid_name), len(table.square_name), len(table.patch_name), len(table))
    assert sizes == (9, 58, 771, 8653)
    many = [draw_session(np.random.default_rng(seed), "y3") for seed in range(10)]
    mean = np.mean([shares(t, t.predicted_ctf_A) for t in many], axis=0)
    np.testing.assert_allclose(mean, [0.046, 0.147, 0.270, 0.536], atol=0.08)


def test_demo_is_about_600_holes():
    sizes = [len(draw_session(np.random.default_rng(seed), "demo")) for seed in range(40)]
    assert 450 < np.mean(sizes) < 700


def test_positions_follow_the_hierarchy():
    table = draw_session(np.random.default_rng(5), "demo")

    def extent(ids):
        return max(np.ptp(table.x[ids == i]) for i in np.unique(ids))

    assert extent(table.patch_id) < extent(table.square_id) < extent(table.grid_id)
    centre = np.stack([np.bincount(table.patch_id, v) for v in (table.x, table.y)])
    centre /= np.bincount(table.patch_id)
    inside = np.hypot(table.x - centre[0][table.patch_id], table.y - centre[1][table.patch_id])
    assert inside.max() < 12  # µm, half the diagonal of 5 x 5 holes and a little


def test_probabilities_agree_with_labels_over_sessions(sessions):
    p = np.concatenate([t.p_low_ctf for t in sessions])
    low = np.concatenate([t.ctf_max_resolution_A < 6 for t in sessions])
    for lower in np.arange(0, 1, 0.2):
        rows = (p >= lower) & (p < lower + 0.2)
        assert low[rows].mean() == pytest.approx(p[rows].mean(), abs=0.03)


def test_likeness_to_the_aldolase_training_half(sessions):
    real = read_aldolase()
    predicted = np.concatenate([t.predicted_ctf_A for t in sessions])
    levels = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95]
    np.testing.assert_allclose(
        np.quantile(predicted, levels), np.quantile(real.predicted_ctf_A, levels), atol=0.6
    )
    mean = np.mean([shares(t, t.predicted_ctf_A) for t in sessions], axis=0)
    np.testing.assert_allclose(mean, shares(real, real.predicted_ctf_A), atol=0.08)
    measured = np.mean([shares(t, t.ctf_max_resolution_A) for t in sessions], axis=0)
    np.testing.assert_allclose(measured, shares(real, real.ctf_max_resolution_A), atol=0.08)
    low = np.mean([(t.ctf_max_resolution_A < 6).mean() for t in sessions])
    assert low == pytest.approx((real.ctf_max_resolution_A < 6).mean(), abs=0.04)
    assert np.mean([area_under_curve(t) for t in sessions]) == pytest.approx(
        area_under_curve(real), abs=0.02
    )
    for side in (1, -1):  # low-CTF holes, then the others
        rows = [side * t.ctf_max_resolution_A < side * 6.0 for t in (*sessions, real)]
        drawn = np.concatenate(
            [t.ctf_max_resolution_A[r] for t, r in zip(sessions, rows[:-1], strict=True)]
        )
        np.testing.assert_allclose(
            np.quantile(drawn, levels),
            np.quantile(real.ctf_max_resolution_A[rows[-1]], levels),
            rtol=0.06,
        )
        correlation = np.mean(
            [
                spearmanr(t.predicted_ctf_A[r], t.ctf_max_resolution_A[r])[0]
                for t, r in zip(sessions[:20], rows[:20], strict=True)
            ]
        )
        expected = spearmanr(
            real.predicted_ctf_A[rows[-1]], real.ctf_max_resolution_A[rows[-1]]
        ).statistic
        assert correlation == pytest.approx(expected, abs=0.12)


def test_stored_calibration_is_the_fit_on_the_training_half():
    real = read_aldolase()
    fitted, stored = fit_calibration(real, CONFIG), synthetic_calibration()
    assert stored.num_holes == fitted.num_holes == len(real)
    np.testing.assert_allclose(stored.base_logit(real), fitted.base_logit(real), atol=0.01)
    np.testing.assert_allclose(
        dataclasses.astuple(stored.effects), dataclasses.astuple(fitted.effects), atol=0.01
    )


def test_redraw_keeps_everything_but_the_labels():
    table = draw_session(np.random.default_rng(0), "demo")
    effects = RandomEffects()
    base = base_logit_of(table.p_low_ctf, effects)
    new = redraw_labels(table, base, effects, np.random.default_rng(1))
    again = redraw_labels(table, base, effects, np.random.default_rng(1))
    assert new.content_hash == again.content_hash != table.content_hash
    for name in ("hole_name", "patch_id", "x", "predicted_ctf_A", "p_low_ctf"):
        np.testing.assert_array_equal(getattr(new, name), getattr(table, name))


def test_redraw_moments():
    """The mean over draws is the marginal; effects and bias move whole groups together."""
    table = draw_session(np.random.default_rng(0), "demo")
    effects = RandomEffects(sd_grid=0.0, sd_square=0.0, sd_patch=1.0)
    base = base_logit_of(np.full(len(table), 0.6), effects)
    rng = np.random.default_rng(2)
    low = np.array(
        [redraw_labels(table, base, effects, rng).ctf_max_resolution_A < 6 for _ in range(300)]
    )
    assert low.mean() == pytest.approx(0.6, abs=0.01)
    patch_share = np.array([np.bincount(table.patch_id, row) for row in low])
    patch_share /= np.bincount(table.patch_id)
    holes = np.bincount(table.patch_id).mean()
    # E[var] = binomial part + spread of sigmoid(m + u), about (0.24 * 1 / 1.2)² by the delta method
    assert patch_share.var() == pytest.approx(0.24 / holes + 0.037, abs=0.01)
    free = RandomEffects(sd_grid=0.0, sd_square=0.0, sd_patch=0.0)
    biased = [
        (redraw_labels(table, base, free, rng, session_bias_sd=0.5).ctf_max_resolution_A < 6).mean()
        for _ in range(300)
    ]
    assert np.std(biased) == pytest.approx(0.5 * 0.23, abs=0.02)


def test_redraw_at_another_threshold_keeps_labels_on_their_side():
    table = draw_session(np.random.default_rng(0), "demo")
    base, effects = np.where(np.arange(len(table)) % 2, 50.0, -50.0), RandomEffects()
    new = redraw_labels(table, base, effects, np.random.default_rng(1), low_ctf_threshold_A=4.5)
    np.testing.assert_array_equal(new.ctf_max_resolution_A < 4.5, base > 0)


def test_redraw_without_predicted_resolution():
    table = draw_session(np.random.default_rng(0), "demo")
    bare = table.replace(predicted_ctf_A=np.full(len(table), np.nan))
    base = base_logit_of(table.p_low_ctf, RandomEffects())
    new = redraw_labels(bare, base, RandomEffects(), np.random.default_rng(1))
    assert np.isfinite(new.ctf_max_resolution_A).all()
