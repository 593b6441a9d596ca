"""Rewards with numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.cryoem.rewards import (
    PRESETS,
    is_low_ctf,
    next_streak,
    outcome,
    penalty,
    switch_level,
    visit_value,
)
from envs.cryoem.types import HoleTable, NavigationConfig, Switch


def table(ctf: list[float], *, is_labelled: list[bool] | None = None, p: float = 0.3) -> HoleTable:
    n = len(ctf)
    return HoleTable.from_names(
        hole_name=[f"hole{i}" for i in range(n)],
        grid=["g"] * n,
        square=["s"] * n,
        patch=["p"] * n,
        ctf_max_resolution_A=np.array(ctf),
        p_low_ctf=np.full(n, p),
        is_labelled=None if is_labelled is None else np.array(is_labelled),
    )


def test_paper_rewards_are_its_exponential_of_the_inferred_minutes() -> None:
    config = PRESETS["paper"]
    formula = np.exp(-0.185 * (np.array(config.minutes) - config.minutes[0]))
    np.testing.assert_allclose(config.reward, formula, atol=0.006)


def test_cryorl_rewards_are_its_exponential() -> None:
    config = PRESETS["cryorl"]
    formula = np.exp(-0.1 * (np.array(config.minutes) - config.minutes[0]))
    np.testing.assert_allclose(config.reward, formula, atol=0.006)


def test_leginon_costs_hardly_more_for_a_grid_than_for_a_patch() -> None:
    config = PRESETS["leginon-2021"]
    np.testing.assert_allclose(np.array(config.minutes) * 60, [91, 185, 186, 195])
    np.testing.assert_allclose(config.reward, [1, 0.854989, 0.853565, 0.840857], atol=1e-6)


@pytest.mark.parametrize(
    ("is_inclusive", "expected"), [(False, [1, 0, 0, 0]), (True, [1, 1, 0, 0])]
)
def test_the_threshold_itself(is_inclusive: bool, expected: list[int]) -> None:
    config = dataclasses.replace(PRESETS["paper"], is_threshold_inclusive=is_inclusive)
    np.testing.assert_array_equal(is_low_ctf([5.9, 6.0, 6.1, np.nan], config), expected)


def test_outcome_is_truth_where_labelled_and_probability_elsewhere() -> None:
    holes = table([5.0, 7.0, 5.0, np.nan], is_labelled=[True, True, False, False])
    np.testing.assert_array_equal(outcome(holes, PRESETS["paper"]), [1, 0, 0.3, 0.3])


def test_dynamic_value_by_hand() -> None:
    config = dataclasses.replace(PRESETS["cryorl"], reward_rule="dynamic")
    holes = table([3.0, 6.0, 6.5, 8.0, 9.0, np.nan])
    # 1.2 exp(-0.425) - 0.2 = 0.584523; 1.2 exp(-1.7) - 0.2 = 0.019220; 1.2 exp(-2.55) < 0.2
    expected = [1, 1, 0.584523, 0.019220, 0, 0.3]
    np.testing.assert_allclose(visit_value(holes, config), expected, atol=1e-6)


def test_switch_level_is_the_highest_level_that_changes() -> None:
    #                    hole     patch    square   grid
    source = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    target = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]])
    got = switch_level(*((source[:, i], target[:, i]) for i in range(3)))
    np.testing.assert_array_equal(got, list(Switch))


def test_streak_and_penalty_by_hand() -> None:
    config = dataclasses.replace(PRESETS["cryorl"], high_ctf_penalty=0.2)
    # high in the patch: 2; low ends it; high elsewhere: 1; unlabelled, rather high: on; rather low.
    streak = next_streak(
        np.array([1, 5, 5, 1, 1]), np.array([0, 0, 2, 0, 0]), np.array([0, 1, 0, 0.4, 0.6])
    )
    np.testing.assert_array_equal(streak, [2, 0, 1, 2, 0])
    np.testing.assert_allclose(penalty(np.array([0, 1, 3, 5, 9]), config), [0, -0.2, -0.6, -1, -1])


@given(
    ctf=st.lists(st.floats(0.5, 30) | st.just(float("nan")), min_size=1, max_size=20),
    p=st.floats(0, 1),
)
def test_value_of_a_visit_lies_between_nothing_and_all(ctf: list[float], p: float) -> None:
    holes = table(ctf, p=p)
    plain = NavigationConfig.preset("cryorl")
    dynamic = NavigationConfig.preset("cryorl", reward_rule="dynamic")
    for config in (plain, dynamic):
        value = visit_value(holes, config)
        assert ((value >= 0) & (value <= 1)).all()
    # The dynamic rule only adds to what a measured hole is worth.
    assert (visit_value(holes, dynamic) >= visit_value(holes, plain)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget_min", np.nan),
        ("budget_min", 0.0),
        ("low_ctf_threshold_A", np.nan),
        ("reward", (np.nan, 1, 1, 1)),
        ("minutes", (1, 2, 3, np.nan)),
        ("minutes", (1, 2, 3)),
    ],
)
def test_rules_that_make_no_sense_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        NavigationConfig.preset("cryorl", **{name: value})
