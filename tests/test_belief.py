"""The belief against a generic optimiser and a dense Hessian; prices against brute force."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from envs.cryoem import belief
from envs.cryoem.belief import Layout, Place, Sorted, base_logit, believe
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects

RULES = NavigationConfig.preset("cryorl", budget_min=60)
EFFECTS = RandomEffects(sd_grid=0.4, sd_square=0.5, sd_patch=0.6)


def small_session(seed, sizes=((3, 2), (4,), (2, 3))):
    """Two grids: two squares in the first, one in the second; patches of the given sizes."""
    rng = np.random.default_rng(seed)
    square = np.repeat(np.arange(len(sizes)), [sum(s) for s in sizes])
    patch = np.repeat(np.arange(sum(map(len, sizes))), list(itertools.chain(*sizes)))
    n = len(square)
    return HoleTable.from_names(
        hole_name=np.arange(n).astype(str),
        grid=(square // 2).astype(str),
        square=square.astype(str),
        patch=patch.astype(str),
        ctf_max_resolution_A=np.where(rng.random(n) < 0.5, 4.0, 9.0),
        p_low_ctf=rng.uniform(0.1, 0.9, n),
        is_labelled=np.ones(n, bool),
    )


def believed(table, visited, **kwargs):
    stack = SessionStack.of([table], RULES)
    layout = Layout.of(stack, np.zeros(1, int), EFFECTS)
    return layout, believe(layout, visited[None], EFFECTS, **kwargs)


@pytest.mark.parametrize("seed", range(5))
def test_the_posterior_is_that_of_a_generic_optimiser(seed):
    table = small_session(seed)
    visited = np.random.default_rng(seed + 50).random(len(table)) < 0.6
    y = (table.ctf_max_resolution_A <= 6)[visited].astype(float)
    base = base_logit(table.p_low_ctf, EFFECTS)
    ids = (table.grid_id, table.square_id, table.patch_id)
    sizes = [i.max() + 1 for i in ids]
    design = np.concatenate([np.eye(m)[i] for i, m in zip(ids, sizes, strict=True)], 1)
    sd = np.repeat([EFFECTS.sd_grid, EFFECTS.sd_square, EFFECTS.sd_patch], sizes)

    def loss(u):
        eta = base[visited] + design[visited] @ u
        return (np.logaddexp(0, eta) - y * eta).sum() + 0.5 * (u**2 / sd**2).sum()

    mode = minimize(loss, np.zeros(len(sd)), tol=1e-12).x
    q = 1 / (1 + np.exp(-(base[visited] + design[visited] @ mode)))
    hessian = (design[visited].T * (q * (1 - q))) @ design[visited] + np.diag(sd**-2.0)
    covariance = design @ np.linalg.inv(hessian) @ design.T
    _, now = believed(table, visited)
    np.testing.assert_allclose(now.shift[0, table.patch_id], design @ mode, atol=2e-5)
    np.testing.assert_allclose(now.variance[0, table.patch_id], np.diag(covariance), rtol=1e-4)


def test_before_any_visit_the_belief_is_the_prediction():
    table = small_session(1)
    layout, now = believed(table, np.zeros(len(table), bool))
    is_hole = layout.slot_hole[0] >= 0
    p = table.p_low_ctf[layout.slot_hole[0][is_hole]]
    np.testing.assert_allclose(now.p[0][is_hole], p, atol=1e-6)
    assert (now.p[0][~is_hole] == 0).all() and not now.is_left[0][~is_hole].any()
    np.testing.assert_allclose(now.variance, EFFECTS.variance, rtol=1e-6)


def test_only_outcomes_of_visited_holes_are_read():
    table = small_session(2)
    visited = np.arange(len(table)) % 3 == 0
    flipped = np.where(visited, table.ctf_max_resolution_A, 13 - table.ctf_max_resolution_A)
    other = table.replace(ctf_max_resolution_A=flipped)
    np.testing.assert_array_equal(believed(table, visited)[1].p, believed(other, visited)[1].p)
    wrong = table.replace(ctf_max_resolution_A=13 - table.ctf_max_resolution_A)
    assert np.abs(believed(table, visited)[1].p - believed(wrong, visited)[1].p).max() > 0.05
    np.testing.assert_array_equal(
        believed(table, visited, is_adaptive=False)[1].p,
        believed(wrong, visited, is_adaptive=False)[1].p,
    )


def test_episodes_do_not_touch_each_other():
    tables = [small_session(seed) for seed in (3, 4)] + [draw_session(np.random.default_rng(0))]
    stack = SessionStack.of(tables, RULES)
    session = np.array([2, 0, 1, 0])
    rng = np.random.default_rng(5)
    visited = rng.random((4, stack.p_low_ctf.shape[1])) < 0.3
    visited &= np.arange(visited.shape[1]) < stack.num_holes[session][:, None]
    together = believe(Layout.of(stack, session, EFFECTS), visited, EFFECTS)
    for row, which in enumerate(session):
        layout = Layout.of(stack, np.array([which]), EFFECTS)
        alone = believe(layout, visited[[row]], EFFECTS)
        np.testing.assert_allclose(together.p[row], alone.p[0], atol=1e-6)


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("price", [0.2, 0.5, 0.8])
def test_a_patch_is_worth_its_best_subset_and_way_in(level, price):
    table = small_session(6)
    _, now = believed(table, np.zeros(len(table), bool))
    value = belief.worth(Sorted.of(now), np.full((1, 1), price, np.float32), RULES)
    minutes, reward = RULES.minutes, RULES.reward
    for patch in range(table.patch_id.max() + 1):
        p = now.p[0, patch][now.is_left[0, patch]]
        best_stay, best_in = 0.0, -np.inf
        for size in range(len(p) + 1):
            for chosen in itertools.combinations(p, size):
                later = sum(reward[0] * q - price * minutes[0] for q in chosen)
                best_stay = max(best_stay, later)
                for first in chosen:
                    switch = reward[level] * first - price * minutes[level]
                    rest = later - (reward[0] * first - price * minutes[0])
                    best_in = max(best_in, switch + rest)
        assert value.stay[0, patch] == pytest.approx(best_stay, abs=1e-5)
        assert value.patch[level][0, patch] == pytest.approx(best_in, abs=1e-5)


def test_time_is_free_where_it_suffices_and_dearer_the_less_there_is():
    table = draw_session(np.random.default_rng(3))
    stack = SessionStack.of([table], RULES)
    layout = Layout.of(stack, np.zeros(6, int), EFFECTS)
    visited = np.zeros((6, len(table)), bool)
    sorted_p = Sorted.of(believe(layout, visited, EFFECTS))
    place = Place.of(layout, np.zeros(6, int))
    left = np.array([20, 60, 120, 240, 480, 1e6], np.float32)
    price = belief.price_of_time(layout, sorted_p, place, left, RULES)
    assert (np.diff(price) <= 0).all() and price[0] > price[4] > 0
    assert price[5] < 1e-3
