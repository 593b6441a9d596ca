"""The belief against dense algebra and integrals; worth and price against every tour."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from envs.cryoem import belief
from envs.cryoem.belief import Layout, Place, Sorted, base_logit, believe
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects

RULES = NavigationConfig.preset("cryorl", budget_min=60)
PAPER = NavigationConfig.preset("paper")
LEGINON = NavigationConfig.preset("leginon-2021")
ALIKE = NavigationConfig(minutes=(1, 3, 7, 12), reward=(1.0, 1.0, 1.0, 1.0))
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


def test_time_is_free_where_it_suffices_and_dearer_the_less_there_is():
    table = draw_session(np.random.default_rng(3))
    stack = SessionStack.of([table], RULES)
    layout = Layout.of(stack, np.zeros(6, int), EFFECTS)
    visited = np.zeros((6, len(table)), bool)
    sorted_p = Sorted.of(believe(layout, visited, EFFECTS))
    place = Place.of(layout, np.zeros(6, int))
    left = np.array([20, 60, 120, 240, 480, 1e6], np.float32)
    price = belief.price_of_time(layout, sorted_p, place, left, RULES)
    # (At 20 minutes a patch is cut to what fits them, so fewer holes compete for a minute.)
    assert (np.diff(price[1:]) <= 0).all() and price[0] > price[4] > 0
    assert price[5] < 1e-3


def nested(rng, num_holes, fan=(2, 2, 2)) -> HoleTable:
    """Holes scattered over at most ``fan`` grids x squares x patches; labels by coin."""
    g, s, p = (rng.integers(size, size=num_holes).astype(str) for size in fan)
    return HoleTable.from_names(
        hole_name=np.arange(num_holes).astype(str),
        grid=g,
        square=np.char.add(np.char.add(g, "/"), s),
        patch=np.char.add(np.char.add(np.char.add(g, "/"), s), np.char.add("/", p)),
        ctf_max_resolution_A=np.where(rng.random(num_holes) < 0.5, 4.0, 9.0),
        p_low_ctf=rng.uniform(0.02, 0.98, num_holes),
    )


def posterior(table, visited, effects):
    """(P,) mode and variance of u_grid + u_square + u_patch: dense, by a generic optimiser."""
    ids = (table.grid_id, table.square_id, table.patch_id)
    sizes = [len(names) for names in (table.grid_name, table.square_name, table.patch_name)]
    offset = np.r_[0, np.cumsum(sizes)[:-1]]
    design = np.zeros((len(table), sum(sizes)))
    for level in range(3):
        design[np.arange(len(table)), offset[level] + ids[level]] = 1
    precision = np.repeat([effects.sd_grid, effects.sd_square, effects.sd_patch], sizes) ** -2.0
    odds = table.p_low_ctf / (1 - table.p_low_ctf)
    fixed = np.log(odds) * np.sqrt(1 + np.pi * effects.variance / 8)
    sign = np.where(table.ctf_max_resolution_A <= 6, 1.0, -1.0)[visited]
    z, fixed = design[visited], fixed[visited]

    def loss(u):
        margin = sign * (fixed + z @ u)
        return (precision * u**2).sum() / 2 - log_expit(margin).sum(), (
            precision * u - z.T @ (sign * expit(-margin))
        )

    mode = minimize(loss, np.zeros(len(precision)), jac=True, tol=1e-9, method="BFGS").x
    q = expit(fixed + z @ mode)
    covariance = np.linalg.inv(np.diag(precision) + z.T @ ((q * (1 - q))[:, None] * z))
    _, hole_of_patch = np.unique(table.patch_id, return_index=True)
    rows = design[hole_of_patch]  # grid, square and patch of every patch
    return rows @ mode, np.diag(rows @ covariance @ rows.T)


sds = st.floats(0.05, 1.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_holes=st.integers(1, 40),
    share=st.floats(0, 1),
    effects=st.builds(RandomEffects, sd_grid=sds, sd_square=sds, sd_patch=sds),
)
def test_mode_and_variance_are_those_of_the_dense_posterior(seed, num_holes, share, effects):
    rng = np.random.default_rng(seed)
    table = nested(rng, num_holes)
    visited = rng.random(num_holes) < share
    layout = Layout.of(SessionStack.of([table], RULES), np.zeros(1, int), effects)
    now = believe(layout, visited[None], effects)
    shift, variance = posterior(table, visited, effects)
    np.testing.assert_allclose(now.shift[0], shift, atol=2e-5)
    np.testing.assert_allclose(now.variance[0], variance, rtol=2e-5)
    is_low = table.ctf_max_resolution_A[visited] <= 6
    count = np.bincount(table.patch_id[visited], minlength=len(table.patch_name))
    low = np.bincount(table.patch_id[visited], is_low, len(table.patch_name))
    np.testing.assert_array_equal(now.num_visited[0], count)
    np.testing.assert_array_equal(now.num_low[0], low)


@pytest.mark.parametrize("p", [0.9, 0.97, 0.99])
@pytest.mark.parametrize("num_bad", [20, 50, 300])
def test_many_surprises_are_believed_and_do_not_throw_newton_off(p, num_bad):
    # Full Newton steps from 0 swing to and fro here: 50 bad holes at 0.97 once ended at shift -0.1.
    table = HoleTable.from_names(
        hole_name=np.arange(num_bad + 25).astype(str),
        grid=np.full(num_bad + 25, "g"),
        square=np.full(num_bad + 25, "s"),
        patch=(np.arange(num_bad + 25) // 25).astype(str),
        ctf_max_resolution_A=np.full(num_bad + 25, 9.0),
        p_low_ctf=np.full(num_bad + 25, p),
    )
    visited = np.arange(num_bad + 25) < num_bad
    effects = RandomEffects()
    layout = Layout.of(SessionStack.of([table], RULES), np.zeros(1, int), effects)
    now = believe(layout, visited[None], effects)
    shift, variance = posterior(table, visited, effects)
    np.testing.assert_allclose(now.shift[0], shift, atol=2e-5)
    np.testing.assert_allclose(now.variance[0], variance, rtol=2e-5)


@pytest.mark.parametrize(("effects", "tolerance"), [(RandomEffects(), 0.003), (EFFECTS, 0.005)])
def test_the_mean_over_the_effects_is_the_prediction(effects, tolerance):
    # The probit approximation; its error is largest near p = 0.04 and 0.96.
    node, weight = np.polynomial.hermite_e.hermegauss(100)
    p = np.linspace(0.001, 0.999, 999)
    at_node = expit(base_logit(p, effects)[:, None] + np.sqrt(effects.variance) * node)
    np.testing.assert_allclose(at_node @ weight / weight.sum(), p, atol=tolerance)
    assert np.isfinite(base_logit(np.array([0.0, 1.0]), effects)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    p=st.lists(st.floats(0.05, 0.95), min_size=1, max_size=12),
    num_low=st.integers(0, 12),
    p_next=st.floats(0.05, 0.95),
)
def test_the_probability_of_the_next_hole_is_near_the_exact_integral(p, num_low, p_next):
    # One patch: its u_grid + u_square + u_patch is one number, which can be integrated out.
    n = len(p)
    low = np.arange(n) < num_low
    table = HoleTable.from_names(
        hole_name=np.arange(n + 1).astype(str),
        grid=["g"] * (n + 1),
        square=["s"] * (n + 1),
        patch=["p"] * (n + 1),
        ctf_max_resolution_A=np.where(np.r_[low, True], 4.0, 9.0),
        p_low_ctf=np.r_[p, p_next],
    )
    effects = RandomEffects()
    stack = SessionStack.of([table], RULES)
    layout = Layout.of(stack, np.zeros(1, int), effects)
    now = believe(layout, np.arange(n + 1)[None] < n, effects)
    u = np.linspace(-8, 8, 4001) * np.sqrt(effects.variance)
    base = base_logit(table.p_low_ctf, effects)
    log_weight = -(u**2) / (2 * effects.variance)
    log_weight += log_expit(np.where(low, 1, -1) * (base[:-1] + u[:, None])).sum(1)
    weight = np.exp(log_weight - log_weight.max())
    exact = weight @ expit(base[-1] + u) / weight.sum()
    assert now.p.sum() == pytest.approx(exact, abs=0.012)  # one hole is left


def test_a_batch_is_its_episodes_and_padding_is_nothing():
    rng = np.random.default_rng(11)
    tables = [nested(rng, n, fan) for n, fan in ((5, (1, 1, 2)), (30, (3, 2, 3)), (12, (2, 1, 1)))]
    stack = SessionStack.of(tables, RULES)
    session = np.array([1, 0, 2, 1, 0])
    visited = rng.random((5, stack.shape.num_holes)) < 0.5
    visited &= stack.patch_id[session] >= 0
    left = np.array([5, 20, 60, 1, 300], np.float32)
    current = visited.argmax(1)

    def all_of(stack, session, visited, current, left):
        layout = Layout.of(stack, session, EFFECTS)
        now = believe(layout, visited, EFFECTS)
        sorted_p, place = Sorted.of(now), Place.of(layout, current)
        price = belief.price_of_time(layout, sorted_p, place, left, RULES)
        value = belief.worth(sorted_p, price[:, None], RULES, left[:, None])
        return now, price, value, belief.group_worth(layout, value, RULES)

    now, price, value, groups = all_of(stack, session, visited, current, left)
    for row, which in enumerate(session):
        table = tables[which]
        n, s, g = len(table), len(table.square_name), len(table.grid_name)
        alone = SessionStack.of([table], RULES)  # no padding at all
        now_1, price_1, value_1, groups_1 = all_of(
            alone, np.zeros(1, int), visited[[row], :n], current[[row]], left[[row]]
        )
        _, num_patches, num_slots = now_1.p.shape
        np.testing.assert_array_equal(now.p[row, :num_patches, :num_slots], now_1.p[0])
        assert now.p[row, num_patches:].sum() == now.p[row, :, num_slots:].sum() == 0
        np.testing.assert_array_equal(now.shift[row, :num_patches], now_1.shift[0])
        assert price[row] == price_1[0]
        for level in range(4):
            np.testing.assert_array_equal(
                value.patch[level][row, :num_patches], value_1.patch[level][0]
            )
            if level:
                assert (value.patch[level][row, num_patches:] == -np.inf).all()
        np.testing.assert_array_equal(groups.square[0][row, :s], groups_1.square[0][0])
        assert (groups.square[0][row, s : stack.shape.num_squares] == -np.inf).all()
        np.testing.assert_array_equal(groups.grid[row, :g], groups_1.grid[0])
        assert (groups.grid[row, g:] == -np.inf).all()


AMPLE = np.full((1, 1), 1e6, np.float32)
"""Minutes that suffice for everything."""


def best_run(table, p, holes, entry_level, price, rules, first=None, left=np.inf):
    """Largest reward - price x minutes of any order of any holes, and that run's minutes.

    The first move is of ``entry_level``, to holes[first] or any of them; without a level the run
    starts at holes[0] and may be empty. No move starts when more than ``left`` minutes are spent.
    """
    minutes, reward = rules.minutes, rules.reward
    ids = np.stack([table.patch_id, table.square_id, table.grid_id])[:, holes]
    level = (ids[:, :, None] != ids[:, None, :]).sum(0).tolist()
    p = [float(p[hole]) for hole in holes]

    def go(to, level, is_left, left):
        surplus, spent = after(to, is_left & ~(1 << to), left - minutes[level])
        return reward[level] * p[to] - price * minutes[level] + surplus, minutes[level] + spent

    @functools.cache
    def after(here, is_left, left):
        if left < -1e-9:
            return 0.0, 0.0
        moves = [go(k, level[here][k], is_left, left) for k in range(len(p)) if is_left >> k & 1]
        return max([(0.0, 0.0), *moves])  # or stop here

    everything = 2 ** len(p) - 1
    if entry_level is None:
        return after(0, everything - 1, left)
    entries = range(len(p)) if first is None else [first]
    return max((go(k, entry_level, everything, left) for k in entries), default=(-np.inf, 0.0))


@st.composite
def situations(draw, max_holes=8, rules=(RULES, PAPER, LEGINON, ALIKE)):
    """A session under way: rules, table, visited (N,), current hole, and the believed p (N,)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    fan = draw(st.sampled_from([(2, 2, 2), (2, 1, 4), (3, 2, 1), (1, 2, 3)]))
    table = nested(rng, draw(st.integers(2, max_holes)), fan)
    visited = rng.random(len(table)) < draw(st.sampled_from([0.0, 0.2, 0.5]))
    current = int(rng.integers(len(table)))
    visited[current] = True
    rules = draw(st.sampled_from(rules))
    layout = Layout.of(SessionStack.of([table], rules), np.zeros(1, int), EFFECTS)
    now = believe(layout, visited[None], EFFECTS)
    p = np.zeros(len(table))
    p[layout.slot_hole[now.is_left]] = now.p[now.is_left]
    return rules, table, visited, current, p, layout, now


def sum_of_parts(layout, value, groups, place):
    """What all that is left is worth, from where one is: here, then every group worth entering."""
    return float(
        value.stay[0, place.patch[0]]
        + (np.maximum(value.patch[1], 0) * place.other_patch).sum()
        + (np.maximum(groups.square[0], 0) * place.other_square).sum()
        + (np.maximum(groups.grid, 0) * place.other_grid).sum()
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=situations(), price=st.floats(0.01, 1.0))
def test_worth_is_the_best_run_of_every_group_and_their_sum_the_best_tour(case, price):
    rules, table, visited, current, p, layout, now = case
    value = belief.worth(Sorted.of(now), np.full((1, 1), price, np.float32), rules, AMPLE)
    groups = belief.group_worth(layout, value, rules)
    price = float(np.float32(price))

    def best(ids, code, level):
        holes = np.flatnonzero((ids == code) & ~visited)
        return best_run(table, p, holes, level, price, rules)[0]

    def check(found, ids, code, level):
        assert found == pytest.approx(best(ids, code, level), abs=2e-5)

    for patch in range(len(table.patch_name)):
        stay = max(0, best(table.patch_id, patch, 0))
        assert value.stay[0, patch] == pytest.approx(stay, abs=2e-5)
        for level in (1, 2, 3):
            check(value.patch[level][0, patch], table.patch_id, patch, level)
    for square in range(len(table.square_name)):
        for level in (2, 3):
            check(groups.square[level - 2][0, square], table.square_id, square, level)
    for grid in range(len(table.grid_name)):
        check(groups.grid[0, grid], table.grid_id, grid, 3)
    # No tour from here, in whatever order and with whatever returns, is worth more than the parts.
    holes = np.r_[current, np.flatnonzero(~visited)]
    whole = best_run(table, p, holes, None, price, rules)[0]
    place = Place.of(layout, np.array([current]))
    assert sum_of_parts(layout, value, groups, place) == pytest.approx(whole, abs=5e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=situations(), price=st.floats(0.01, 1.0), left=st.integers(0, 24))
def test_worth_is_the_best_run_of_a_patch_in_the_minutes_left_entered_by_its_first_hole(
    case, price, left
):
    rules, table, visited, _, p, _, now = case
    price = float(np.float32(price))
    time = np.full((1, 1), left, np.float32)
    sorted_p = Sorted.of(now)
    value = belief.worth(sorted_p, np.full((1, 1), price, np.float32), rules, time)
    for patch in range(len(table.patch_name)):
        holes = np.flatnonzero((table.patch_id == patch) & ~visited)
        for level in range(4):
            best = best_run(table, p, holes, level, price, rules, left=left)[0]
            found = value.patch[level][0, patch]
            assert found == pytest.approx(max(0, best) if level == 0 else best, abs=2e-5)
            if level and len(holes):
                entry = sorted_p.p[value.entry[level][0, patch], 0, patch]
                first = int(np.abs(p[holes] - entry).argmin())
                through = best_run(table, p, holes, level, price, rules, first, left=left)[0]
                assert through == pytest.approx(best, abs=2e-5)


def is_ample(case, minutes_left):
    """True where any patch can be finished in the minutes left, whatever the way in."""
    rules, table, *_ = case
    return np.bincount(table.patch_id).max() <= belief.num_in_time(minutes_left, rules)[3]


def price_and_tour(case, minutes_left):
    rules, table, visited, current, p, layout, now = case
    place = Place.of(layout, np.array([current]))
    left = np.array([minutes_left], np.float32)
    price = float(belief.price_of_time(layout, Sorted.of(now), place, left, rules)[0])
    holes = np.r_[current, np.flatnonzero(~visited)]
    return price, lambda at: best_run(table, p, holes, None, at, rules)[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=situations(rules=(ALIKE,)), minutes_left=st.floats(1, 50))
def test_a_little_dearer_and_the_best_tour_fits_a_little_cheaper_and_it_does_not(
    case, minutes_left
):
    # Where every switch pays alike, nobody visits a hole below the price only to pay a toll by it.
    assume(is_ample(case, minutes_left))
    price, minutes_at = price_and_tour(case, minutes_left)
    step = 2e-4 * ALIKE.reward[0] / min(ALIKE.minutes)
    assert minutes_at(price + step) <= minutes_left
    if price > step:
        assert minutes_at(price - step) > minutes_left
    else:  # time suffices for all that is left
        assert minutes_at(1e-9) <= minutes_left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=situations(rules=(RULES, PAPER, LEGINON)), minutes_left=st.floats(1, 50))
def test_below_the_price_the_best_tour_does_not_fit(case, minutes_left):
    price, minutes_at = price_and_tour(case, minutes_left)
    step = 2e-4 * case[0].reward[0] / min(case[0].minutes)
    if price > step:
        assert minutes_at(price - step) > minutes_left
