"""Candidate rows: legal, blind to what was not measured, the best way in; and what the bound is."""

import functools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from envs.cryoem.knapsack import optimum
from envs.cryoem.rates import (
    FEATURES,
    NUM_FEATURES,
    PRIOR_COLUMN,
    bound_of,
    candidate_rows,
    num_by_level,
)
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects
from tests.test_belief import EFFECTS, best_run, is_ample, nested, situations

RULES = NavigationConfig.preset("cryorl")
CERTAIN = RandomEffects(sd_grid=0, sd_square=0, sd_patch=0)
"""Nothing is shared: beliefs stay at the prediction."""


def column(rows, name):
    return rows[..., FEATURES.index(name)].astype(float)


def under_way(seed, num_sessions=3, share=0.4):
    """Sessions of different sizes in one stack, a few episodes under way in each."""
    rng = np.random.default_rng(seed)
    fans = [(1, 1, 1), (2, 2, 3), (3, 3, 2), (5, 1, 6)]
    tables = [
        nested(rng, int(rng.integers(2, 60)), fans[rng.integers(4)]) for _ in range(num_sessions)
    ]
    stack = SessionStack.of(tables, RULES)
    session = rng.integers(num_sessions, size=6)
    visited = rng.random((6, stack.shape.num_holes)) < rng.uniform(0, share, (6, 1))
    current = rng.integers(stack.num_holes[session])
    visited[np.arange(6), current] = True
    visited &= np.arange(stack.shape.num_holes) < stack.num_holes[session][:, None]
    minutes_left = rng.choice([0.0, 1.0, 7.5, 60.0, 480.0], 6)
    return tables, stack, session, visited, current, minutes_left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), num_candidates=st.sampled_from([4, 5, 12, 40]))
def test_rows_are_legal_moves_of_the_level_they_name(seed, num_candidates):
    tables, stack, session, visited, current, left = under_way(seed, share=1.2)
    rules = NavigationConfig.preset("cryorl", num_candidates=num_candidates)
    rows, hole, mask = candidate_rows(stack, session, visited, current, left, rules, EFFECTS)
    assert rows.shape == (6, num_candidates, NUM_FEATURES) and rows.dtype == np.float32
    assert hole.shape == mask.shape == (6, num_candidates)
    assert hole.dtype == np.int32 and mask.dtype == np.bool_
    assert np.isfinite(rows).all() and np.abs(rows).max() <= 10
    assert (rows[~mask] == 0).all() and (hole[~mask] == -1).all()
    for name in ("p_target", "p_1", "p_2", "p_5", "p_10", "run_rate", "price"):
        assert ((column(rows, name) >= 0) & (column(rows, name) <= 1)).all(), name
    counts = np.array(num_by_level(num_candidates))
    for e, table in enumerate(tables[s] for s in session):
        target, here = hole[e, mask[e]], current[e]
        is_left = ~visited[e, : len(table)]
        assert is_left[target].all()  # in range, too: a padded hole has no entry
        patches = table.patch_id[target]
        assert len(np.unique(patches)) == len(patches)  # no two rows lead to one patch
        ids = np.stack([table.patch_id, table.square_id, table.grid_id])
        level = (ids[:, target] != ids[:, [here]]).sum(0)
        np.testing.assert_array_equal(rows[e, mask[e], :4], np.eye(4)[level])
        # As many groups are offered as there are and as the level has rows for.
        open_holes = np.flatnonzero(is_left)
        away = (ids[:, open_holes] != ids[:, [here]]).sum(0)
        num_groups = [len(np.unique(ids[max(k - 1, 0), open_holes[away == k]])) for k in range(4)]
        offered = np.bincount(level, minlength=4)
        np.testing.assert_array_equal(offered, np.minimum(num_groups, counts))


def test_every_level_has_rows():
    assert num_by_level(4) == (1, 1, 1, 1)
    assert num_by_level(12) == (1, 5, 2, 4)
    assert num_by_level(16) == (1, 6, 3, 6)
    for num_candidates in range(4, 65):
        counts = num_by_level(num_candidates)
        assert sum(counts) == num_candidates and min(counts) >= 1


@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=situations(max_holes=9), left=st.floats(1, 40))
def test_the_target_is_the_best_way_into_what_the_move_opens(case, left):
    # Every order of every choice of holes is tried, at the price that the row names.
    assume(is_ample(case, left))
    rules, table, visited, current, p, layout, _ = case
    stack = SessionStack.of([table], rules)
    rows, hole, mask = candidate_rows(
        stack,
        np.zeros(1, int),
        visited[None],
        np.array([current]),
        np.array([left]),
        rules,
        EFFECTS,
        layout=layout,
    )
    for c in np.flatnonzero(mask[0]):
        row, target = rows[0, c], int(hole[0, c])
        level = int(row[:4].argmax())
        price = float(column(row, "price")) * rules.reward[0] / rules.minutes[0]
        group = (table.patch_id, table.patch_id, table.square_id, table.grid_id)[level]
        holes = np.flatnonzero((group == group[target]) & ~visited)
        first = int(np.flatnonzero(holes == target)[0])
        best = best_run(table, p, holes, level, price, rules)[0]
        through = best_run(table, p, holes, level, price, rules, first)[0]
        assert through == pytest.approx(best, abs=1e-4)
        assert column(row, "p_target") == pytest.approx(p[target], abs=1e-6)
        gain = rules.reward[level] * p[target] - price * rules.minutes[level]
        assert column(row, "gain") == pytest.approx(gain, abs=1e-4)
        expected = max(best, 0) if level == 0 else best
        assert column(row, "surplus_group") == pytest.approx(max(expected, -5) / 20, abs=1e-4)
        siblings = np.sort(p[(table.patch_id == table.patch_id[target]) & ~visited])[::-1]
        ranks = np.r_[siblings, np.zeros(10)][[0, 1, 4, 9]]
        np.testing.assert_allclose(row[5 + 1 : 5 + 5], ranks, atol=1e-6)
        assert column(row, "num_left") == pytest.approx(len(siblings) / 25)
        num = np.arange(1, len(siblings) + 1)
        runs = rules.reward[0] * np.cumsum(siblings)
        runs -= (rules.reward[0] - rules.reward[level]) * siblings[0]
        runs /= rules.minutes[level] + (num - 1) * rules.minutes[0]
        rate = runs.max() / rules.reward[0] * rules.minutes[0]
        assert column(row, "run_rate") == pytest.approx(rate, abs=1e-5)


def test_a_row_by_hand():
    # Patch a (here): 0.8 and 0.5 left. Patch b of the same square: 0.9 and 0.9. Time for all: the
    # price is 0, so b is worth 0.90 x 0.9 + 0.9 = 1.71, and all that is left 1.3 + 1.71 = 3.01.
    table = HoleTable.from_names(
        hole_name=np.arange(5).astype(str),
        grid=["g"] * 5,
        square=["s"] * 5,
        patch=["a", "a", "a", "b", "b"],
        p_low_ctf=np.array([0.3, 0.8, 0.5, 0.9, 0.9]),
    )
    rows, hole, mask = candidate_rows(
        SessionStack.of([table], RULES),
        np.zeros(1, int),
        np.arange(5)[None] < 1,
        np.zeros(1, int),
        np.array([480.0]),
        RULES,
        CERTAIN,
    )
    assert mask[0].tolist() == [True, True] + [False] * 10
    assert hole[0, :2].tolist() == [1, 3]
    expected = {
        "p_target": (0.8, 0.9), "p_1": (0.8, 0.9), "p_2": (0.5, 0.9), "p_5": (0, 0),
        "gain": (0.8, 0.81), "run_rate": (0.8, 1.71 / 3), "price": (0, 0),
        "surplus_patch": (1.3 / 5, 1.71 / 5), "surplus_here": (0, 1.3 / 20),
        "num_left": (2 / 25, 2 / 25), "num_worth": (2 / 25, 2 / 25),
        "num_visited_patch": (1 / 25, 0), "num_visited_square": (1 / 150, 1 / 150),
        "num_low_patch": (0.3 / 25, 0), "surprise": (0, 0),
        "minutes_left": (1, 1), "log_minutes_left": (1, 1), "shift": (0, 0),
    }  # fmt: skip
    for name, values in expected.items():
        np.testing.assert_allclose(column(rows[0, :2], name), values, atol=1e-4, err_msg=name)
    assert bound_of(rows)[0] == pytest.approx(3.01 + 480 * column(rows[0, 0], "price"), abs=1e-3)


def test_where_no_hole_is_left_there_is_no_row():
    _, stack, session, visited, current, left = under_way(4)
    visited[:] = stack.patch_id[session] >= 0
    rows, hole, mask = candidate_rows(stack, session, visited, current, left, RULES, EFFECTS)
    assert not mask.any() and (rows == 0).all() and (hole == -1).all()
    assert (bound_of(rows) == 0).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_outcomes_of_unvisited_holes_are_not_read(seed):
    tables, stack, session, visited, current, left = under_way(seed, num_sessions=6)
    session = np.arange(6)  # a session each, so that it has one set of visited holes
    current = current % stack.num_holes
    visited[session, current] = True
    visited &= stack.patch_id >= 0
    rows = candidate_rows(stack, session, visited, current, left, RULES, EFFECTS)
    flipped, wrong = (
        [
            t.replace(ctf_max_resolution_A=np.where(keep[: len(t)], ctf, 13 - ctf))
            for t, keep in zip(tables, keeps, strict=True)
            for ctf in [t.ctf_max_resolution_A]
        ]
        for keeps in (visited, ~visited)
    )
    again = candidate_rows(
        SessionStack.of(flipped, RULES), session, visited, current, left, RULES, EFFECTS
    )
    for one, other in zip(rows, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # Those of visited holes are, unless the belief is not adaptive.
    for is_adaptive in (True, False):
        one, other = (
            candidate_rows(
                SessionStack.of(which, RULES),
                session,
                visited,
                current,
                left,
                RULES,
                EFFECTS,
                is_adaptive=is_adaptive,
            )[0]
            for which in (tables, wrong)
        )
        differs = (column(one, "p_1") != column(other, "p_1")).any()
        assert differs == (is_adaptive and rows[2].any())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_batch_is_its_episodes_without_padding(seed):
    tables, stack, session, visited, current, left = under_way(seed)
    together = candidate_rows(stack, session, visited, current, left, RULES, EFFECTS)
    for e, s in enumerate(session):
        alone = candidate_rows(
            SessionStack.of([tables[s]], RULES),
            np.zeros(1, int),
            visited[[e], : len(tables[s])],
            current[[e]],
            left[[e]],
            RULES,
            EFFECTS,
        )
        np.testing.assert_allclose(together[0][e], alone[0][0], atol=1e-5)
        np.testing.assert_array_equal(together[1][e], alone[1][0])
        np.testing.assert_array_equal(together[2][e], alone[2][0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_holes_and_the_numbers_of_groups_do_not_matter(seed):
    tables, stack, session, visited, current, left = under_way(seed)
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(len(t)) for t in tables]
    shuffled = [t.select(order) for t, order in zip(tables, shuffles, strict=True)]
    new_visited, new_current = np.zeros_like(visited), np.zeros_like(current)
    for e, s in enumerate(session):
        new_visited[e, : len(tables[s])] = visited[e, shuffles[s]]
        new_current[e] = np.flatnonzero(shuffles[s] == current[e])[0]
    rows, hole, mask = candidate_rows(stack, session, visited, current, left, RULES, EFFECTS)
    new_rows, new_hole, new_mask = candidate_rows(
        SessionStack.of(shuffled, RULES), session, new_visited, new_current, left, RULES, EFFECTS
    )
    for e, s in enumerate(session):
        one = {int(h): row for h, row, m in zip(hole[e], rows[e], mask[e], strict=True) if m}
        other = {
            int(shuffles[s][h]): row
            for h, row, m in zip(new_hole[e], new_rows[e], new_mask[e], strict=True)
            if m
        }
        assert one.keys() == other.keys()
        for h, row in one.items():
            np.testing.assert_allclose(other[h], row, atol=2e-5)
        if one:
            advantages = {h: float(row[PRIOR_COLUMN]) for h, row in one.items()}
            best = max(advantages, key=advantages.__getitem__)
            new_best = max(other, key=lambda h: other[h][PRIOR_COLUMN])
            assert advantages[new_best] == pytest.approx(advantages[best], abs=2e-5)


# ---- the bound -----------------------------------------------------------------------------------


def best_return(table, p, holes, rules, minutes_left, *, may_overrun):
    """Largest return from holes[0] by trying every tour; the last move may overrun the time."""
    ids = np.stack([table.patch_id, table.square_id, table.grid_id])[:, holes]
    level = (ids[:, :, None] != ids[:, None, :]).sum(0).tolist()
    value = [float(p[h]) for h in holes]

    @functools.cache
    def best(here, is_left, time):
        if time < -1e-9:
            return 0.0
        out = 0.0
        for k in range(len(value)):
            spare = time - rules.minutes[level[here][k]]
            if is_left >> k & 1 and (may_overrun or spare >= -1e-9):
                gain = rules.reward[level[here][k]] * value[k]
                out = max(out, gain + best(k, is_left & ~(1 << k), spare))
        return out

    return best(0, 2 ** len(value) - 2, float(minutes_left))


def bound_at(case, minutes_left):
    rules, table, visited, current, *_ = case
    rows = candidate_rows(
        SessionStack.of([table], rules),
        np.zeros(1, int),
        visited[None],
        np.array([current]),
        np.array([minutes_left]),
        rules,
        EFFECTS,
    )[0]
    return float(bound_of(rows)[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=situations(), left=st.integers(1, 40))
def test_the_bound_is_weak_duality_from_any_state(case, left):
    """Above every tour that keeps to the time left, for holes worth what is believed of them."""
    rules, table, visited, current, p, *_ = case
    holes = np.r_[current, np.flatnonzero(~visited)]
    bound = bound_at(case, left)
    assert bound >= best_return(table, p, holes, rules, left, may_overrun=False) - 1e-4
    # The rules let the last move overrun. It earns at most one hole, and takes at most a grid move.
    exact = best_return(table, p, holes, rules, left, may_overrun=True)
    assert bound + rules.reward[0] * p.max() >= exact - 1e-4
    assert bound_at(case, left + rules.minutes[3]) >= exact - 1e-4


def test_the_bound_is_no_bound_of_the_move_that_overruns():
    # A minute is left. At 0.405 a minute the next patch (0.90 x 0.9 in 2 minutes) just pays: that
    # is the bound. But the minute goes to the hole near by, and as the budget is not exceeded then,
    # the next patch comes on top of it.
    table = HoleTable.from_names(
        hole_name=["start", "near", "far"],
        grid=["g"] * 3,
        square=["s"] * 3,
        patch=["a", "a", "b"],
        p_low_ctf=np.array([0.5, 0.2, 0.9]),
    )
    rules = NavigationConfig.preset("cryorl", budget_min=1)
    rows = candidate_rows(
        SessionStack.of([table], rules),
        np.zeros(1, int),
        np.arange(3)[None] < 1,
        np.zeros(1, int),
        np.ones(1),
        rules,
        CERTAIN,
    )[0]
    exact = optimum(table, rules, [0], value=table.p_low_ctf)[0]
    assert exact == pytest.approx(0.2 + 0.81)
    assert bound_of(rows)[0] == pytest.approx(0.405, abs=1e-3) and exact < 0.405 + 0.9


@pytest.mark.parametrize("preset", ["cryorl", "paper"])
def test_the_bound_is_close_on_a_whole_session(preset):
    rules = NavigationConfig.preset(preset, budget_min=240)
    table = draw_session(np.random.default_rng(5))
    table = table.replace(is_labelled=np.zeros(len(table), bool))
    start = np.array([0, len(table) // 2])
    visited = np.zeros((2, len(table)), bool)
    visited[[0, 1], start] = True
    rows = candidate_rows(
        SessionStack.of([table], rules), np.zeros(2, int), visited, start, np.full(2, 240.0),
        rules, CERTAIN,
    )[0]  # fmt: skip
    exact = optimum(table, rules, start, value=np.clip(table.p_low_ctf, 1e-4, 1 - 1e-4))
    assert (bound_of(rows) + 1 >= exact).all()
    np.testing.assert_allclose(bound_of(rows), exact, rtol=0.02)
