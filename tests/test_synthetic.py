"""Synthetic sessions: rules that always hold, and likeness to the real training half."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from envs.cryoem.calibration import base_logit_of, fit_calibration
from envs.cryoem.nested import nested_components, normal_scores, sums_of_squares
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import (
    PRESETS,
    draw_session,
    draw_visible_components,
    redraw_labels,
    synthetic_calibration,
)
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects
from tests.test_calibration import read_aldolase

CONFIG = NavigationConfig.preset("cryorl")


def shares(table, value):
    """Of the sum of squares: grid, square, patch, hole."""
    squares = sums_of_squares(table, value)
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


def test_draws_are_those_of_earlier_versions():
    """Figures of navigation were measured on them."""
    table = draw_session(np.random.default_rng(0), "aldolase")
    assert len(table) == 3148
    np.testing.assert_allclose(table.predicted_ctf_A[[0, -1]], [4.76830562, 4.33408229])
    np.testing.assert_allclose(table.ctf_max_resolution_A[[0, -1]], [4.63786058, 6.2])
    table = draw_session(np.random.default_rng(0), "demo")
    assert len(table) == 624
    np.testing.assert_allclose(table.predicted_ctf_A[[0, -1]], [12.92975282, 15.83])
    np.testing.assert_allclose(table.ctf_max_resolution_A[[0, -1]], [9.50971731, 14.13185205])


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


Y3_SHARES = [0.0462, 0.1471, 0.2704, 0.5363]
"""SSL²-RL, table 3: 5393.9, 17167.2, 31570.4, 62604 of their sum."""


@pytest.fixture(scope="module")
def y3_sessions():
    return [draw_session(np.random.default_rng(seed), "y3") for seed in range(5)]


def test_y3_has_the_published_numbers(y3_sessions):
    for table in y3_sessions:
        sizes = (len(table.grid_name), len(table.square_name), len(table.patch_name), len(table))
        assert sizes == (9, 58, 771, 8653)
        assert np.bincount(table.square_grid).min() >= 2
        assert np.bincount(table.patch_square).min() >= 3
        assert 1 <= np.bincount(table.patch_id).min() < np.bincount(table.patch_id).max() <= 25
        ctf = table.ctf_max_resolution_A
        np.testing.assert_allclose(shares(table, ctf), Y3_SHARES, atol=1e-4)
        assert ((ctf - ctf.mean()) ** 2).sum() == pytest.approx(116735.5, rel=0.02)
        assert (ctf < 6).mean() == pytest.approx(0.5, abs=1e-3)
        assert ((ctf > 5) & (ctf < 7)).mean() == pytest.approx(0.30, abs=0.01)
        assert ctf.min() > 2.8 and ctf.max() == 20.0
        assert not (ctf == 6.0).any()  # < and <= agree
        assert len(np.unique(np.stack([table.x, table.y]), axis=1).T) == len(table)
        assert table.is_labelled.all()


def test_y3_predictions_are_honest_and_as_good_as_the_papers_classifier(y3_sessions):
    p = np.concatenate([t.p_low_ctf for t in y3_sessions])
    low = np.concatenate([t.ctf_max_resolution_A < 6 for t in y3_sessions])
    assert ((p > 0.5) == low).mean() == pytest.approx(0.652, abs=0.012)
    tenth = np.digitize(p, np.quantile(p, np.linspace(0.1, 0.9, 9)))
    for i in range(10):
        assert low[tenth == i].mean() == pytest.approx(p[tenth == i].mean(), abs=0.04)


def test_y3_mini_has_the_same_tables():
    tables = [draw_session(np.random.default_rng(3), preset) for preset in ("y3", "y3-mini")]
    assert tables[0].content_hash == tables[1].content_hash


def test_y3_calibration_is_the_fit_on_drawn_sessions(y3_sessions):
    stored = synthetic_calibration("y3")
    fitted = fit_calibration(y3_sessions[0], NavigationConfig.preset("paper"))
    assert fitted.slope + fitted.patch_mean_slope == pytest.approx(
        stored.slope + stored.patch_mean_slope, abs=0.25
    )
    np.testing.assert_allclose(
        dataclasses.astuple(fitted.effects), dataclasses.astuple(stored.effects), atol=0.3
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    totals=st.sampled_from([(2, 6, 6), (2, 6, 150), (3, 10, 60), (9, 40, 400)]),
)
def test_any_totals_are_kept(seed, totals):
    num_grids = min(2, totals[0] // 2)
    mine = dataclasses.replace(PRESETS["y3"], num_grids=(num_grids, num_grids), totals=totals)
    table = draw_session(np.random.default_rng(seed), mine)
    assert (len(table.square_name), len(table.patch_name), len(table)) == totals
    assert np.isfinite(table.ctf_max_resolution_A).all()


def test_totals_that_no_hierarchy_has_are_refused():
    mine = dataclasses.replace(PRESETS["y3"], totals=(58, 771, 20_000))
    with pytest.raises(ValueError, match="20000 cannot be 771 numbers from 1 to 25"):
        draw_session(np.random.default_rng(0), mine)


def small_table(ctf):
    """Two grids, three squares, four patches, eight holes."""
    return HoleTable.from_names(
        hole_name=list("abcdefgh"),
        grid=list("00001111"),
        square=list("AAAABBCC"),
        patch=list("ppqqrrss"),
        ctf_max_resolution_A=np.asarray(ctf, dtype=float),
    )


def test_nested_anova_by_hand():
    table = small_table([1, 3, 5, 7, 9, 9, 5, 5])
    components = nested_components(table, table.ctf_max_resolution_A)
    # mean 5.5; grids 4 and 7; squares 4, 9, 5; patches 2, 6, 9, 5
    np.testing.assert_allclose(components[0], [-1.5] * 4 + [1.5] * 4)
    np.testing.assert_allclose(components[1], [0] * 4 + [2, 2, -2, -2])
    np.testing.assert_allclose(components[2], [-2, -2, 2, 2, 0, 0, 0, 0])
    np.testing.assert_allclose(components[3], [-1, 1, -1, 1, 0, 0, 0, 0])
    squares = sums_of_squares(table, table.ctf_max_resolution_A)
    np.testing.assert_allclose(squares, [18, 16, 16, 4])  # together 54 = sum of (value - 5.5)²


def test_normal_scores_by_hand():
    np.testing.assert_allclose(
        normal_scores(np.array([20.0, 3.0, 6.0])), [0.967422, -0.967422, 0], atol=1e-6
    )  # quantiles of 5/6, 1/6 and 1/2


@settings(max_examples=20, deadline=None, derandomize=True)  # one draw in 10^5 is 4.5 sd off
@given(seed=st.integers(0, 2**32 - 1), fraction=st.floats(0, 1))
def test_visible_components_have_the_stated_size_and_correlation(seed, fraction):
    table = draw_session(np.random.default_rng(1), "y3")
    score = normal_scores(table.ctf_max_resolution_A)
    visible = draw_visible_components(np.random.default_rng(seed), table, fraction)
    hidden = nested_components(table, score)
    # a grid's component may show by chance (9 of them), a hole's may not (8653)
    for level, tolerance in enumerate((1.0, 0.55, 0.15, 0.05)):
        found = np.corrcoef(visible[level], hidden[level])[0, 1]
        assert found == pytest.approx(np.sqrt(fraction), abs=tolerance)
        np.testing.assert_allclose(
            nested_components(table, visible[level])[level], visible[level], atol=1e-9
        )


def test_everything_or_nothing_shows():
    table = draw_session(np.random.default_rng(1), "y3")
    score = normal_scores(table.ctf_max_resolution_A)
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(draw_visible_components(rng, table, 1.0).sum(0), score, atol=1e-9)
    # nothing: two tables whose holes have each other's CTF look the same
    other = table.replace(ctf_max_resolution_A=table.ctf_max_resolution_A[::-1])
    first, second = (
        draw_visible_components(np.random.default_rng(0), t, 0.0)[3] for t in (table, other)
    )
    assert np.corrcoef(first, second)[0, 1] > 0.99


def test_what_shows_needs_every_ctf_value():
    table = small_table([1, 3, 5, np.nan, 9, 9, 5, 5])
    with pytest.raises(ValueError, match=r"1 of 8 holes have no CTF value \(first 'd'\)"):
        draw_visible_components(np.random.default_rng(0), table, 0.5)


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


def test_y3_sessions_can_be_redrawn(y3_sessions):
    """Training on a stored session does so: the values given the label are the law's."""
    table, calibration = y3_sessions[0], synthetic_calibration("y3")
    rng, base = np.random.default_rng(1), calibration.base_logit(table)
    new = redraw_labels(table, base, calibration.effects, rng, preset="y3")
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    for low in (True, False):
        drawn, first = (
            t.ctf_max_resolution_A[(t.ctf_max_resolution_A < 6) == low] for t in (new, table)
        )
        np.testing.assert_allclose(
            np.quantile(drawn, levels), np.quantile(first, levels), rtol=0.05
        )


def test_redraw_without_predicted_resolution():
    table = draw_session(np.random.default_rng(0), "demo")
    bare = table.replace(predicted_ctf_A=np.full(len(table), np.nan))
    base = base_logit_of(table.p_low_ctf, RandomEffects())
    new = redraw_labels(bare, base, RandomEffects(), np.random.default_rng(1))
    assert np.isfinite(new.ctf_max_resolution_A).all()
