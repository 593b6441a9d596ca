"""Roll-outs over all holes: every hole once, the clock anew, and draws that differ."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.planners import NAMES, make_planner
from envs.cryoem.stack import SessionStack
from envs.cryoem.synthetic import draw_session, synthetic_calibration
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects
from ssl2rl_ray.algorithms.networks import make_network
from ssl2rl_ray.algorithms.policy import Artefact
from ssl2rl_ray.evaluate import roll_out
from ssl2rl_ray.loop.rollout import imagine, roll_out_all

RULES = NavigationConfig.preset("paper", budget_min=120)  # 2/5/10/15 minutes, 3 past steps
KINDS = [("paper", "hole"), ("paper", "patch"), ("rates", "hole")]


def session(places, p=None, **columns):
    """A table from (grid, square, patch) of each hole."""
    names = ["".join(map(str, place)) for place in places]
    return HoleTable.from_names(
        hole_name=[f"{i}" for i in range(len(places))],
        grid=[name[0] for name in names],
        square=[name[:2] for name in names],
        patch=names,
        p_low_ctf=np.linspace(0.2, 0.8, len(places)) if p is None else np.array(p),
        **columns,
    )


def stack_of(table, rules=RULES):
    return SessionStack.of([table], rules)


def learned(stack, feature_set="paper", action_level="hole", seed=0):
    rules = NavigationConfig.preset(
        "paper", feature_set=feature_set, action_level=action_level, budget_min=120
    )
    torch.manual_seed(seed)
    return Artefact(
        weights=make_network(rules, stack, is_residual=False).state_dict(),
        rules=rules,
        calibration=synthetic_calibration(),
        hidden_sizes=(64, 64),
        is_dueling=None,
        is_residual=False,
    ).make(stack)


def play(policies, stack, start_hole=(0, 5, 9), seed=0, **changes):
    settings = {"duration_min": 120.0, "exploration": 0.0, **changes}
    return roll_out_all(
        policies,
        stack,
        RULES,
        start_hole=np.array(start_hole),
        rng=np.random.default_rng(seed),
        **settings,
    )


class InOrder:
    """Visits the holes from the first row to the last, and keeps what it saw."""

    name = "in order"

    def __init__(self, num_holes):
        self.num_holes = num_holes
        self.elapsed_min, self.recent = [], []

    def act(self, observation, rng):
        self.elapsed_min.append(observation["elapsed_min"][:, 0].tolist())
        self.recent.append(observation["recent"].tolist())
        visited = np.unpackbits(
            observation["visited"], axis=1, count=self.num_holes, bitorder="little"
        )
        return visited.argmin(1)


@pytest.fixture(scope="module")
def table():
    return draw_session(np.random.default_rng(2)).select(np.arange(250))


@pytest.mark.parametrize("name", NAMES)
def test_every_planner_visits_every_hole_once_from_its_start(name):
    small = draw_session(np.random.default_rng(2)).select(np.arange(60))
    stack = stack_of(small)
    for exploration in (0.0, 1.0):
        found = play([make_planner(name, stack, RULES)], stack, exploration=exploration)
        assert found.visit_order.dtype == np.int32 and found.value is None
        assert found.visit_order[:, 0].tolist() == [0, 5, 9]
        assert (np.sort(found.visit_order, axis=1) == np.arange(60)).all()
        assert (found.num_switches.sum(1) == 59).all()


@pytest.mark.parametrize(("feature_set", "action_level"), KINDS)
def test_a_learned_policy_gives_the_value_of_every_hole_but_the_start(
    table, feature_set, action_level
):
    stack = stack_of(table)
    policy = learned(stack, feature_set, action_level)
    for exploration in (0.0, 1.0):
        found = play([policy], stack, exploration=exploration)
        assert (np.sort(found.visit_order, axis=1) == np.arange(len(table))).all()
        assert found.value.shape == found.visit_order.shape and found.value.dtype == np.float32
        row, hole = np.nonzero(np.isnan(found.value))
        assert row.tolist() == [0, 1, 2] and hole.tolist() == [0, 5, 9]


def test_the_value_is_that_of_the_move():
    small = draw_session(np.random.default_rng(2)).select(np.arange(30))
    stack = stack_of(small)
    policy = learned(stack)
    found = play([policy], stack, start_hole=[3])
    visited = np.zeros((1, 30), bool)
    visited[0, 3] = True
    q = policy.network(
        {
            "visited": torch.from_numpy(np.packbits(visited, axis=1, bitorder="little")),
            "recent": torch.tensor([[3, -1, -1]]),
            "elapsed_min": torch.zeros(1, 1),
            "session": torch.zeros(1, 1, dtype=torch.long),
        }
    )[0]
    first = found.visit_order[0, 1]
    assert first == q.argmax() and found.value[0, first] == q.max()


def test_switches_are_counted_by_the_highest_level_that_changes():
    # patch, square, grid, and back by a grid into the hole that was left
    places = [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 0), (0, 0, 1)]
    stack = stack_of(session(places))
    found = play([InOrder(7)], stack, start_hole=[0, 1])
    assert found.visit_order.tolist() == [[0, 1, 2, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6]]
    assert found.num_switches.tolist() == [[2, 1, 1, 2], [2, 1, 1, 2]]


def test_the_clock_begins_anew_with_the_first_move_past_the_duration():
    # 2 minutes a hole, 15 for the grid; a session is 5 minutes: over at 6, and again at 15 + 2
    places = [(0, 0, 0)] * 5 + [(1, 0, 0)] * 4
    stack = stack_of(session(places))
    policy = InOrder(9)
    play([policy], stack, start_hole=[0], duration_min=5.0)
    #  after hole: 0  1  2  3=6 4  5=2+15 6  7
    assert [e[0] for e in policy.elapsed_min] == [0, 2, 4, 0, 2, 0, 2, 4]
    assert policy.recent[:3] == [[[0, -1, -1]], [[1, 0, -1]], [[2, 1, 0]]]
    # exactly the duration is not past it, as in the env
    policy = InOrder(9)
    play([policy], stack, start_hole=[0], duration_min=6.0)
    assert [e[0] for e in policy.elapsed_min] == [0, 2, 4, 6, 0, 0, 2, 4]


@pytest.mark.parametrize("name", ["snowball", "lagrange"])
def test_hole_by_hole_the_first_session_is_that_of_the_environment(table, name):
    stack = stack_of(table)
    policy = make_planner(name, stack, RULES)
    start = np.array([0, 40])
    played = roll_out(
        policy, stack, RULES, session=np.zeros(2, int), start_hole=start,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    found = play([policy], stack, start_hole=start, is_by_run=False)
    for theirs, ours in zip(played.visit_order, found.visit_order, strict=True):
        theirs = theirs[theirs >= 0]
        assert np.array_equal(theirs, ours[: len(theirs)])


def test_a_run_takes_the_holes_worth_their_minutes_best_first():
    # One good patch, one bad far away: all good holes are one run, whatever the order of rows.
    p = [0.9, 0.7, 0.95, 0.8, 0.02, 0.03]
    stack = stack_of(session([(0, 0, 0)] * 4 + [(1, 0, 0)] * 2, p))
    planner = make_planner("lagrange", stack, RULES, RandomEffects(sd_grid=0, sd_square=0))
    asked = []

    class Counting:
        name = "counting"

        def act(self, observation, rng):
            raise AssertionError("it decides by runs")

        def act_run(self, observation, rng):
            asked.append(len(asked))
            return planner.act_run(observation, rng)

    found = play([Counting()], stack, start_hole=[1])
    # The grid is entered by its worst hole: the switch pays a share of that one's reward only.
    assert found.visit_order.tolist() == [[1, 2, 0, 3, 4, 5]]
    assert len(asked) == 2


def test_by_run_the_order_is_nearly_that_of_hole_by_hole(table):
    stack = stack_of(table)
    policy = make_planner("lagrange", stack, RULES)
    exact, by_run = (play([policy], stack, is_by_run=flag) for flag in (False, True))
    for a, b in zip(exact.visit_order, by_run.visit_order, strict=True):
        assert np.corrcoef(a.argsort(), b.argsort())[0, 1] > 0.7


def test_without_exploration_one_start_gives_one_order(table):
    stack = stack_of(table)
    for policy in (make_planner("lagrange", stack, RULES), learned(stack, action_level="patch")):
        found = play([policy], stack, start_hole=[4, 4, 7])
        assert np.array_equal(found.visit_order[0], found.visit_order[1])
        assert not np.array_equal(found.visit_order[0], found.visit_order[2])


@pytest.mark.parametrize("kind", ["lagrange", ("paper", "patch"), ("rates", "hole")])
def test_exploration_differs_between_roll_outs_and_repeats_with_the_generator(table, kind):
    stack = stack_of(table)
    policy = make_planner(kind, stack, RULES) if isinstance(kind, str) else learned(stack, *kind)
    first, again, other = (
        play([policy], stack, start_hole=[4, 4], seed=seed, exploration=0.5) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.visit_order, again.visit_order)
    assert not np.array_equal(first.visit_order[0], first.visit_order[1])
    assert not np.array_equal(first.visit_order, other.visit_order)


def test_several_policies_take_turns(table):
    stack = stack_of(table)
    a, b = make_planner("snowball", stack, RULES), make_planner("predict-rank", stack, RULES)
    both = play([a, b], stack, start_hole=[4, 4, 4])
    alone = [play([policy], stack, start_hole=[4]).visit_order[0] for policy in (a, b)]
    for row, expected in zip(both.visit_order, (alone[0], alone[1], alone[0]), strict=True):
        assert np.array_equal(row, expected)


@pytest.mark.parametrize("num_holes", [2, 12])
@pytest.mark.parametrize("kind", ["lagrange", "snowball", *KINDS])
def test_a_session_of_one_patch_and_of_two_holes(num_holes, kind):
    stack = stack_of(session([(0, 0, 0)] * num_holes))
    policy = make_planner(kind, stack, RULES) if isinstance(kind, str) else learned(stack, *kind)
    for exploration in (0.0, 1.0):
        found = play([policy], stack, start_hole=[0, 1], exploration=exploration)
        assert (np.sort(found.visit_order, axis=1) == np.arange(num_holes)).all()
        assert found.num_switches.tolist() == [[num_holes - 1, 0, 0, 0]] * 2


def test_what_cannot_be_moved_to_drawn_sessions_is_said():
    stack = stack_of(session([(0, 0, 0)] * 3))
    with pytest.raises(ValueError, match="'in order' has no `on"):
        play([InOrder(3)], stack, start_hole=[0], exploration=0.5)


def test_imagined_sessions_keep_the_truth_and_move_the_predictions(table):
    is_labelled = np.arange(len(table)) % 5 == 0
    stack = stack_of(table.replace(is_labelled=is_labelled))
    drawn = imagine(
        stack, 400, exploration=1.0, effects=RandomEffects(), rng=np.random.default_rng(0)
    )
    low = table.ctf_max_resolution_A[is_labelled] < RULES.low_ctf_threshold_A
    assert (drawn.outcome[:, is_labelled] == low).all()
    assert (drawn.outcome[:, ~is_labelled] == drawn.p_low_ctf[:, ~is_labelled]).all()
    # every logit is moved by N(0, sd_grid² + sd_square² + 2 sd_patch²)
    logit = np.log(drawn.p_low_ctf / (1 - drawn.p_low_ctf))
    own = np.log(table.p_low_ctf / (1 - table.p_low_ctf))
    spread = np.sqrt(0.29**2 + 0.34**2 + 2 * 0.52**2)
    assert np.mean(logit - own) == pytest.approx(0, abs=0.05)
    assert np.std(logit - own, axis=0).mean() == pytest.approx(spread, rel=0.03)
    for row in range(3):  # as a stack of such tables would be
        again = stack_of(table.replace(p_low_ctf=drawn.p_low_ctf[row]))
        assert np.array_equal(again.slot_hole[0], drawn.slot_hole[row])
    nothing = imagine(
        stack, 2, exploration=0.0, effects=RandomEffects(), rng=np.random.default_rng(0)
    )
    assert nothing.p_low_ctf == pytest.approx(np.repeat(stack.p_low_ctf, 2, 0), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=2, max_size=25), st.data())
def test_any_small_session_is_visited_in_full(places, data):
    starts = data.draw(st.lists(st.integers(0, len(places) - 1), min_size=1, max_size=3))
    p = data.draw(st.lists(st.floats(0, 1), min_size=len(places), max_size=len(places)))
    stack = stack_of(session(places, p))
    for exploration in (0.0, 1.0):
        found = play(
            [make_planner("lagrange", stack, RULES)],
            stack,
            start_hole=starts,
            duration_min=data.draw(st.sampled_from([1.0, 20.0, 480.0])),
            exploration=exploration,
        )
        assert found.visit_order[:, 0].tolist() == starts
        assert (np.sort(found.visit_order, axis=1) == np.arange(len(places))).all()
        assert (found.num_switches.sum(1) == len(places) - 1).all()
