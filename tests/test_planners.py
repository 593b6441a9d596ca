"""Planners: legal to the end, blind to what was not measured, right where the answer is plain."""

import numpy as np
import pytest

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.knapsack import optimum
from envs.cryoem.planners import NAMES, make_planner
from envs.cryoem.rates import FEATURES, bound_of, candidate_rows
from envs.cryoem.stack import SessionStack, unpack_visited
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects

RULES = NavigationConfig.preset("cryorl", budget_min=45)


def sessions(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [draw_session(rng, "demo") for _ in range(count)]


def play(name, tables, rules=RULES, seed=0, watch=None):
    """(E,) returns of one episode in each session from hole 0."""
    stack = SessionStack.of(tables, rules)
    planner = make_planner(name, stack, rules)
    env = CryoEMVectorEnv(stack, rules, len(tables))
    options = {"session": np.arange(len(tables)), "start_hole": np.zeros(len(tables), int)}
    observation, _ = env.reset(seed=seed, options=options)
    rng, returns = np.random.default_rng(seed), np.zeros(len(tables))
    is_running = np.ones(len(tables), bool)
    while is_running.any():
        action = planner.act(observation, rng)
        visited = unpack_visited(observation, stack.p_low_ctf.shape[1])
        row = np.flatnonzero(is_running)
        assert not visited[row, action[row]].any() and (action[row] >= 0).all()
        assert (action[row] < stack.num_holes[row]).all()
        if watch is not None:
            watch.append(np.where(is_running, action, -1))
        observation, reward, terminated, truncated, _ = env.step(action)
        returns += reward * is_running
        is_running &= ~(terminated | truncated)
    return returns


@pytest.mark.parametrize("name", NAMES)
def test_every_planner_plays_to_the_end_and_repeats_itself(name):
    tables, first, again = sessions(), [], []
    np.testing.assert_array_equal(play(name, tables, watch=first), play(name, tables, watch=again))
    np.testing.assert_array_equal(first, again)
    assert len(first) > 5


def test_an_unknown_name_lists_the_known():
    stack = SessionStack.of(sessions(1), RULES)
    with pytest.raises(ValueError, match=r"'rate_index' is not one of .*'rate-index'"):
        make_planner("rate_index", stack, RULES)


def test_nobody_beats_the_oracle_and_it_is_the_optimum():
    tables = sessions(4, seed=2)
    best = play("oracle", tables)
    exact = [optimum(table, RULES, np.zeros(1, int))[0] for table in tables]
    np.testing.assert_allclose(best, exact, atol=1e-4)
    for name in NAMES:
        assert (play(name, tables) <= best + 1e-4).all(), name


@pytest.mark.parametrize("name", [n for n in NAMES if n != "oracle"])
def test_labels_that_were_not_measured_are_not_read(name):
    for table in sessions(2, seed=3):
        seen, blind = [], []
        play(name, [table], watch=seen)
        visited = np.isin(np.arange(len(table)), [0, *np.concatenate(seen)])
        is_low = table.ctf_max_resolution_A <= RULES.low_ctf_threshold_A
        ctf = np.where(visited == is_low, 4.0, 9.0)  # every hole that was not visited is flipped
        play(name, [table.replace(ctf_max_resolution_A=ctf)], watch=blind)
        np.testing.assert_array_equal(seen, blind)


def by_hand(p, patch, square=None):
    n = len(p)
    square = np.zeros(n, int) if square is None else np.array(square)
    return HoleTable.from_names(
        hole_name=np.arange(n).astype(str),
        grid=np.full(n, "g"),
        square=square.astype(str),
        patch=np.array(patch).astype(str),
        ctf_max_resolution_A=np.where(np.array(p) > 0.5, 4.0, 9.0),
        p_low_ctf=np.array(p),
        is_labelled=np.ones(n, bool),
    )


def first_move(name, table):
    moves = []
    play(name, [table], watch=moves)
    return moves[0][0]


def test_predict_rank_goes_anywhere_and_snowball_stays_near():
    table = by_hand([0.9, 0.6, 0.7, 0.95], patch=[0, 0, 1, 2], square=[0, 0, 0, 1])
    assert first_move("predict-rank", table) == 3
    assert first_move("snowball", table) == 1
    table = by_hand([0.9, 0.4, 0.7, 0.95], patch=[0, 0, 1, 2], square=[0, 0, 0, 1])
    assert first_move("snowball", table) == 2  # nothing predicted low is left in the patch


@pytest.mark.parametrize("name", ["rate-index", "adaptive", "lagrange", "knapsack"])
def test_a_poor_patch_is_left_for_a_rich_one_and_a_rich_one_is_not(name):
    poor = by_hand([0.5] + [0.05] * 6 + [0.95] * 60, patch=[0] * 7 + [1] * 60)
    assert first_move(name, poor) >= 7
    rich = by_hand([0.5] + [0.95] * 6 + [0.05] * 12, patch=[0] * 7 + [1] * 12)
    assert 1 <= first_move(name, rich) <= 6


def test_only_the_adaptive_one_learns_that_a_patch_is_bad():
    # Two alike patches; everything in the first turns out bad.
    p = [0.6] * 21 + [0.58] * 20
    ctf = np.array([9.0] * 21 + [4.0] * 20)
    table = by_hand(p, patch=[0] * 21 + [1] * 20).replace(ctf_max_resolution_A=ctf)
    for name, stays in (("rate-index", True), ("adaptive", False)):
        moves = []
        play(name, [table], watch=moves)
        assert (np.array(moves[:12]) < 21).all() == stays, name


def test_random_is_uniform_over_what_is_left():
    table = by_hand([0.5] * 8, patch=[0] * 8)
    stack = SessionStack.of([table], RULES)
    env = CryoEMVectorEnv(stack, RULES, 4000)
    start = {"session": np.zeros(4000, int), "start_hole": np.full(4000, 3)}
    observation, _ = env.reset(seed=0, options=start)
    action = make_planner("random", stack, RULES).act(observation, np.random.default_rng(0))
    count = np.bincount(action, minlength=8)
    assert count[3] == 0
    expected = 4000 / 7
    assert ((count[[0, 1, 2, 4, 5, 6, 7]] - expected) ** 2 / expected).sum() < 22.5  # 6 df, 0.1 %


# ---- candidate rows ------------------------------------------------------------------------------


def rows_after(visits, tables, minutes_left):
    stack = SessionStack.of(tables, RULES)
    count, rng = len(tables), np.random.default_rng(1)
    visited = np.zeros((count, stack.p_low_ctf.shape[1]), bool)
    current = np.zeros(count, int)
    for row in range(count):
        order = rng.permutation(stack.num_holes[row])[:visits]
        visited[row, order], current[row] = True, order[-1]
    left = np.full(count, minutes_left, np.float32)
    effects = RandomEffects()
    made = candidate_rows(stack, np.arange(count), visited, current, left, RULES, effects)
    return stack, visited, current, made


@pytest.mark.parametrize("visits", [1, 30])
def test_candidates_are_legal_moves_of_their_level(visits):
    tables = sessions(4, seed=7)
    _, visited, current, (rows, hole, mask) = rows_after(visits, tables, 30)
    assert rows.dtype == np.float32 and np.isfinite(rows).all() and mask.any(1).all()
    assert (rows[~mask] == 0).all() and (hole[~mask] == -1).all()
    for row, table in enumerate(tables):
        allowed = hole[row, mask[row]]
        assert len(set(allowed)) == len(allowed) and not visited[row, allowed].any()
        here = current[row]
        same = [
            (ids[allowed] == ids[here]).astype(int)
            for ids in (table.patch_id, table.square_id, table.grid_id)
        ]
        level = 3 - sum(same)
        np.testing.assert_array_equal(rows[row, mask[row], :4].argmax(1), level)
        p = rows[row, mask[row], FEATURES.index("p_target")]
        assert ((p > 0) & (p <= 1)).all()


def test_where_nothing_is_left_nothing_is_offered():
    tables = sessions(2, seed=8)
    _, _, _, (rows, _, mask) = rows_after(10_000, tables, 30)
    assert not mask.any() and (rows == 0).all() and (bound_of(rows) == 0).all()


def test_the_bound_is_above_the_exact_optimum_of_the_expectation():
    tables = [t.replace(is_labelled=np.zeros(len(t), bool)) for t in sessions(4, seed=9)]
    # The last move may run over: its minutes come on top of the budget.
    _, _, current, (rows, _, _) = rows_after(1, tables, RULES.budget_min + max(RULES.minutes))
    exact = [
        optimum(table, RULES, np.array([start]))[0]
        for table, start in zip(tables, current, strict=True)
    ]
    assert (bound_of(rows).astype(float) >= np.array(exact) - 1e-3).all()
    assert (bound_of(rows) <= 1.3 * np.array(exact)).all()
