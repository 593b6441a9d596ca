"""A plan by hand on a toy session, and what must hold of every plan."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from envs.cryoem.planners import NAMES
from envs.cryoem.types import HoleTable, NavigationConfig, Switch
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.evaluate import contestant
from ssl2rl_ray.plan import COLUMNS, Plan, as_json, draw, find_hole, make_plan, rows_of, to_csv

CONFIG = NavigationConfig.preset("cryorl", budget_min=10)


def toy() -> HoleTable:
    """Two grids; nothing is measured."""
    return HoleTable.from_names(
        hole_name=["a", "b", "c", "d", "e"],
        grid=["g0"] * 4 + ["g1"],
        square=["s0"] * 4 + ["s1"],
        patch=["p0", "p0", "p0", "p1", "p2"],
        p_low_ctf=np.array([0.9, 0.8, 0.1, 0.7, 0.6]),
        x=np.array([1.5, 2.5, 3.5, 4.5, np.nan]),
    )


def plan_of(table: HoleTable, name: str = "snowball", config=CONFIG, **options) -> Plan:
    return make_plan(contestant(name).make, table, config, **options)


def test_the_toy_plan_by_hand():
    # Starts at the best prediction, a. b: 1 min; d: another patch, 2 min, 3 in all; e: another
    # grid, 8 min: that would be minute 11 of 10, so the plan ends before it.
    plan = plan_of(toy())
    assert plan.hole.tolist() == [0, 1, 3]
    assert plan.switch.tolist() == [Switch.HOLE, Switch.PATCH]
    assert plan.cumulative_min.tolist() == [0, 1, 3]
    assert plan.expected_low_ctf == pytest.approx(0.8 + 0.7)
    assert plan.expected_reward == pytest.approx(0.8 + 0.9 * 0.7)
    rows = rows_of(plan)
    assert [row["reason"] for row in rows] == [
        "start: the stage is here",
        "stays in the patch: it still pays for its minutes",
        "next patch in the square: 1 hole planned there, 0.7 expected good",
    ]
    assert rows[2] == {
        "order": 2,
        "hole": "d",
        "grid": "g0",
        "square": "s0",
        "patch": "p1",
        "x": 4.5,
        "y": None,
        "p_low_ctf": 0.7,
        "minutes": 2.0,
        "cumulative_min": 3.0,
        "reason": rows[2]["reason"],
    }


def test_a_budget_that_is_just_enough_is_used():
    assert plan_of(toy(), config=replace(CONFIG, budget_min=11)).hole.tolist() == [0, 1, 3, 4]


def test_the_csv_can_be_read_back():
    rows = rows_of(plan_of(toy()))
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert tuple(read[0]) == COLUMNS
    assert [row["hole"] for row in read] == ["a", "b", "d"]
    assert [float(row["cumulative_min"]) for row in read] == [0, 1, 3]
    assert read[0]["y"] == ""


def test_labels_are_not_read():
    ctf = np.array([9.0, 9.0, 4.0, 9.0, 4.0])
    measured = toy().replace(ctf_max_resolution_A=ctf, is_labelled=np.ones(5, bool))
    for name in ("snowball", "rate-index", "adaptive", "lagrange", "knapsack"):
        assert plan_of(measured, name).hole.tolist() == plan_of(toy(), name).hole.tolist(), name


def test_a_session_under_way_goes_on_from_what_was_measured():
    table = toy().replace(
        ctf_max_resolution_A=np.array([4.0, 9.0, np.nan, np.nan, np.nan]),
        is_labelled=np.array([True, True, False, False, False]),
    )
    plan = plan_of(table, is_visited_labelled=True)
    # From the last labelled hole, b, and never back to a: d (2 min), then e (8 min) just fits.
    assert plan.hole.tolist() == [1, 3, 4]
    assert plan.cumulative_min.tolist() == [0, 2, 10]
    assert as_json(plan)["num_holes_done_before"] == 2
    with pytest.raises(ValueError, match="nothing to plan"):
        plan_of(table.select(np.arange(2)), is_visited_labelled=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "oracle"])
@pytest.mark.parametrize("preset", ["paper", "cryorl", "leginon-2021"])
def test_every_plan_visits_once_and_keeps_to_the_budget(demo_dir, name, preset):
    table = read_dataset(demo_dir).table
    config = NavigationConfig.preset(preset, budget_min=45)
    plan = plan_of(table, name, config, start_hole=7)
    assert plan.hole[0] == 7
    assert len(set(plan.hole.tolist())) == len(plan.hole) > 1
    assert np.diff(plan.cumulative_min) == pytest.approx(np.array(config.minutes)[plan.switch])
    assert plan.cumulative_min[-1] <= 45
    parents = np.stack([table.grid_id, table.square_id, table.patch_id])[:, plan.hole]
    assert (np.diff(parents, axis=1) != 0).sum(axis=0).tolist() == plan.switch.tolist()


def test_the_oracle_makes_no_plans():
    with pytest.raises(ValueError, match="take `knapsack`"):
        plan_of(toy(), "oracle")


def test_holes_are_found_by_name_or_row():
    table = toy()
    assert find_hole(table, "c") == find_hole(table, "2") == 2
    with pytest.raises(ValueError, match="rows go to 4"):
        find_hole(table, "5")
    with pytest.raises(ValueError, match=r"did you mean b\?"):
        find_hole(table, "bb")
    with pytest.raises(ValueError, match="from 0 to 4"):
        plan_of(table, start_hole=5)


def test_the_map_is_a_picture():
    image = draw(plan_of(toy()))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert image.min() < 100 < image.max()
