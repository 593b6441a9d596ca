"""The exact optimum against every possible tour, and against hand-made sessions."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.knapsack import best_tour, is_exact_for, optimum, tour_value
from envs.cryoem.rewards import outcome
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig
from tests.test_calibration import read_aldolase

PAPER, CRYORL = (NavigationConfig.preset(name) for name in ("paper", "cryorl"))
LEGINON = NavigationConfig.preset("leginon-2021")


def session(grid, square, patch) -> HoleTable:
    return HoleTable.from_names(
        hole_name=[f"h{i}" for i in range(len(grid))],
        grid=[f"{g}" for g in grid],
        square=[f"{g}/{s}" for g, s in zip(grid, square, strict=True)],
        patch=[f"{g}/{s}/{p}" for g, s, p in zip(grid, square, patch, strict=True)],
    )


def every_tour(table, value, config, start, budget) -> float:
    """The largest return by trying every sequence of holes."""
    n = len(table)
    level = (
        (table.patch_id[:, None] != table.patch_id).astype(int)
        + (table.square_id[:, None] != table.square_id)
        + (table.grid_id[:, None] != table.grid_id)
    ).tolist()
    minutes, reward, value = config.minutes, config.reward, list(map(float, value))

    def best(here, left, visited):
        if left < -1e-9:
            return 0.0
        return max(
            (
                reward[level[here][k]] * value[k]
                + best(k, left - minutes[level[here][k]], visited | 1 << k)
                for k in range(n)
                if not visited >> k & 1
            ),
            default=0.0,
        )

    return best(start, budget, 1 << start)


@st.composite
def small_sessions(draw, max_holes=7):
    n = draw(st.integers(2, max_holes))
    codes = st.lists(st.integers(0, 2), min_size=n, max_size=n)
    table = session(draw(codes), draw(codes), draw(codes))
    kinds = st.sampled_from([0.0, 1.0]) | st.sampled_from([0.0, 0.1, 0.35, 0.8, 1.0])
    value = np.array(draw(st.lists(kinds, min_size=n, max_size=n)))
    return table, value, draw(st.integers(0, n - 1))


def check(table, value, config, start, budget):
    expected = every_tour(table, value, config, start, budget)
    order, total = best_tour(table, value, config, start, budget)
    assert total == pytest.approx(expected, abs=1e-9)
    achieved, minutes = tour_value(table, value, config, start, order)
    assert achieved == pytest.approx(expected, abs=1e-9)  # the order is a tour of that value
    assert len(np.unique(np.r_[start, order])) == len(order) + 1
    assert (minutes[:-1] <= budget + 1e-9).all()
    shared = optimum(table, config, [start, 0, start], value=value, budget_min=budget)
    np.testing.assert_allclose(shared[[0, 2]], expected, atol=1e-9)


@settings(max_examples=500, deadline=None)
@given(case=small_sessions(), config=st.sampled_from([PAPER, CRYORL]), budget=st.integers(1, 45))
def test_optimum_equals_the_best_of_every_tour(case, config, budget):
    check(*case[:2], config, case[2], float(budget))


@st.composite
def rules(draw):
    """Monotone minutes (in thirds) and rewards of any size for which the result is exact."""
    hole, *more = (draw(st.integers(1, 12)) for _ in range(4))
    patch = hole + more[0]
    square = max(patch, 2 * patch - hole) + more[1]
    grid = max(square, patch + square - hole) + more[2] - 1
    reward = sorted(draw(st.sampled_from([1.0, 0.9, 0.6, 0.5, 0.2, 0.0])) for _ in range(4))
    return NavigationConfig(
        minutes=(hole / 3, patch / 3, square / 3, grid / 3),
        reward=(reward[3], reward[2], reward[1], reward[0]),
    )


@settings(max_examples=300, deadline=None)
@given(case=small_sessions(6), config=rules(), budget=st.integers(1, 150))
def test_exact_for_other_rules_and_fractions_of_minutes(case, config, budget):
    assert is_exact_for(config)
    check(*case[:2], config, case[2], budget / 3)


@settings(max_examples=300, deadline=None)
@given(case=small_sessions(6), budget=st.integers(91, 1500))
def test_leginon_is_short_of_the_optimum_by_no_more_than_one_hole_can_cost(case, budget):
    assert not is_exact_for(LEGINON)
    table, value, start = case
    expected = every_tour(table, value, LEGINON, start, budget / 60)
    order, total = best_tour(table, value, LEGINON, start, budget / 60)
    assert total <= expected + 1e-9
    assert total >= expected - (LEGINON.reward[0] - LEGINON.reward[3]) * value.max() - 1e-9
    assert tour_value(table, value, LEGINON, start, order)[0] == pytest.approx(total)


@pytest.mark.parametrize("seed", range(4))
def test_optimum_equals_the_best_of_every_tour_of_many_larger_sessions(seed):
    rng = np.random.default_rng(seed)
    for _ in range(120):
        n = int(rng.integers(7, 9))
        codes = [rng.integers(0, rng.integers(1, 4), n).tolist() for _ in range(3)]
        value = rng.choice([0.0, 1.0], n) if rng.random() < 0.5 else rng.random(n).round(1)
        config = (PAPER, CRYORL)[rng.integers(2)]
        budget = float(rng.integers(1, int(1.6 * sum(config.minutes))))
        check(session(*codes), value, config, int(rng.integers(n)), budget)


def one_patch(num_holes: int) -> HoleTable:
    return session([0] * num_holes, [0] * num_holes, [0] * num_holes)


def test_the_overshooting_move_counts_in_full():
    # Minutes 1 and 2 are within the budget of 2; the third move overshoots it.
    order, total = best_tour(one_patch(6), np.ones(6), CRYORL, 0, 2.0)
    assert (len(order), total) == (3, 3.0)


def test_at_the_budget_one_more_move_is_allowed_as_in_cryorl():
    order, _ = best_tour(one_patch(6), np.ones(6), CRYORL, 0, 1.9)
    assert len(order) == 2


def test_the_last_move_may_go_to_another_grid_for_free():
    table = session([0, 0, 1], [0, 0, 0], [0, 0, 0])
    order, total = best_tour(table, np.ones(3), CRYORL, 0, 1.0)
    assert order.tolist() == [1, 2]
    assert total == 1.5


def test_a_worthless_hole_pays_the_toll_when_time_allows():
    table = session([0, 1, 1, 1, 1], [0] * 5, [0] * 5)
    value = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    assert best_tour(table, value, CRYORL, 0, 9.0)[1] == 2.5  # 8 min at .5, then two holes
    order, total = best_tour(table, value, CRYORL, 0, 10.0)
    assert total == 3.0  # 8 min on the worthless hole, then three
    assert order[0] == 2


def test_return_to_the_grid_of_the_start_at_the_end():
    # Start alone in its square; 1 (worth 0) and 2 in the next square, 3 in a third; grid 1: 4, 5.
    table = session([0, 0, 0, 0, 1, 1], [0, 1, 1, 2, 0, 0], [0] * 6)
    value = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    order, total = best_tour(table, value, CRYORL, 0, 18.0)
    # 8 + 1 min in grid 1, 8 back to the worthless hole, 1, then 3 at square level for free
    assert total == pytest.approx(0.5 + 1 + 0 + 1 + 0.61)
    assert order[2:].tolist() == [1, 2, 3]


def test_start_groups_come_first_and_better_holes_before_worse():
    table = session([0] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0])
    value = np.array([0.5, 0.6, 0.9, 0.7, 0.8, 0.2])
    order, _ = best_tour(table, value, CRYORL, 0, 60.0)
    assert order.tolist() == [2, 1, 5, 4, 3]  # the least hole of the next square pays


def test_nothing_to_visit():
    order, total = best_tour(one_patch(1), [1.0], CRYORL, 0, 10.0)
    assert (order.size, total) == (0, 0.0)


def test_wrong_arguments_are_named():
    table = one_patch(3)
    with pytest.raises(ValueError, match="row 1 is -1"):
        best_tour(table, [0.0, -1.0, 0.0], CRYORL, 0)
    with pytest.raises(ValueError, match="shape"):
        best_tour(table, [0.0], CRYORL, 0)
    with pytest.raises(ValueError, match="start_hole: 3"):
        best_tour(table, np.ones(3), CRYORL, 3)
    with pytest.raises(ValueError, match="minutes must not fall"):
        best_tour(table, np.ones(3), dataclasses.replace(CRYORL, minutes=(2, 1, 3, 4)), 0)
    with pytest.raises(ValueError, match="rewards must fall"):
        best_tour(table, np.ones(3), dataclasses.replace(CRYORL, reward=(1, 0.2, 0.3, 0.1)), 0)


def test_shared_work_gives_what_single_tours_give():
    table = draw_session(np.random.default_rng(4), "demo")
    value = outcome(table, CRYORL)
    starts = np.random.default_rng(0).integers(len(table), size=12)
    alone = [best_tour(table, value, CRYORL, int(start), 200.0)[1] for start in starts]
    np.testing.assert_allclose(optimum(table, CRYORL, starts, budget_min=200.0), alone)


def test_dynamic_rewards_are_values_too():
    table = one_patch(3).replace(
        ctf_max_resolution_A=np.array([5.0, 5.0, 7.0]), is_labelled=np.ones(3, bool)
    )
    dynamic = dataclasses.replace(CRYORL, reward_rule="dynamic")
    decayed = 1.2 * np.exp(-0.85) - 0.2  # 1 Å above the threshold
    np.testing.assert_allclose(optimum(table, dynamic, [0]), 1 + decayed)
    np.testing.assert_allclose(optimum(table, CRYORL, [0]), 1.0)


def test_no_other_tour_is_better():
    """Swaps and insertions in the best tour of a real-sized session gain nothing."""
    table = draw_session(np.random.default_rng(5), "demo")
    rng = np.random.default_rng(0)
    order, total = best_tour(table, table.p_low_ctf, CRYORL, 7, 120.0)
    unvisited = np.setdiff1d(np.arange(len(table)), np.r_[7, order])
    for _ in range(2000):
        other = order.copy()
        i, j = rng.integers(len(order), size=2)
        if rng.random() < 0.5:
            other[i], other[j] = other[j], other[i]
        else:
            other = np.insert(other, i, rng.choice(unvisited))
        value, minutes = tour_value(table, table.p_low_ctf, CRYORL, 7, other)
        elapsed = np.r_[0.0, minutes[:-1]]
        if (elapsed > 120.0).any():
            value, _ = tour_value(
                table, table.p_low_ctf, CRYORL, 7, other[: int((elapsed <= 120.0).sum())]
            )
        assert value <= total + 1e-9


def test_aldolase_training_half():
    table = read_aldolase()
    starts = np.random.RandomState(1626).randint(0, len(table) - 1, 50)
    means = [optimum(table, CRYORL, starts, budget_min=b).mean() for b in (120, 240, 360, 480)]
    print("optimum at 120, 240, 360, 480 min:", np.round(means, 2))
    np.testing.assert_allclose(means, [111.2, 220.72, 329.75, 437.85], atol=0.01)
    value = outcome(table, CRYORL)
    order, total = best_tour(table, value, CRYORL, 399)
    achieved, minutes = tour_value(table, value, CRYORL, 399, order)
    assert total == pytest.approx(achieved) == pytest.approx(440.61)
    assert minutes[-2] <= 480 < minutes[-1]
