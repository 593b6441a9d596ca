"""The exact optimum against every possible tour, and against hand-made sessions."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.knapsack import best_tour, is_exact_for, optimum, tour_value
from envs.cryoem.types import HoleTable, NavigationConfig

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


@settings(max_examples=400, deadline=None)
@given(case=small_sessions(), config=st.sampled_from([PAPER, CRYORL]), budget=st.integers(1, 45))
def test_optimum_equals_the_best_of_every_tour(case, config, budget):
    check(*case[:2], config, case[2], float(budget))
