"""The contract of both environments: rules by hand on a toy session, properties on random ones."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import DictInfoToList
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.env import CryoEMNavigationEnv, CryoEMVectorEnv
from envs.cryoem.rates import NUM_FEATURES
from envs.cryoem.render import describe, draw_map, lay_out
from envs.cryoem.stack import SessionStack, StackShape, unpack_visited
from envs.cryoem.types import HoleTable, NavigationConfig

PAPER = NavigationConfig.preset("paper")  # minutes 2/5/10/15, rewards 1/0.57/0.23/0.09


def toy() -> HoleTable:
    """2 grids x 2 squares, written by hand; hole 6 has a value but no label, hole 4 neither."""
    rows = [
        # patch, p, ctf, labelled
        ("A1a", 0.9, 5.0, True),
        ("A1a", 0.2, 7.0, True),
        ("A1b", 0.8, 4.0, True),
        ("A2a", 0.5, 6.0, True),
        ("A2a", 0.25, np.nan, False),
        ("B1a", 0.7, 3.0, True),
        ("B1a", 0.75, 3.5, False),
        ("B1b", 0.1, 8.0, True),
        ("B2a", 0.6, 5.0, True),
    ]
    patch = [row[0] for row in rows]
    return HoleTable.from_names(
        hole_name=[f"hole{i}" for i in range(len(rows))],
        grid=[name[0] for name in patch],
        square=[name[:2] for name in patch],
        patch=patch,
        p_low_ctf=np.array([row[1] for row in rows]),
        ctf_max_resolution_A=np.array([row[2] for row in rows]),
        is_labelled=np.array([row[3] for row in rows]),
    )


def random_table(
    rng: np.random.Generator, num_holes: int, *, square_size: int = 2, grid_size: int = 3
) -> HoleTable:
    """Patches of about 4 holes, in squares of ``square_size``, in grids of ``grid_size``."""
    patch = np.sort(rng.integers(0, max(num_holes // 4, 1), num_holes))
    ctf = rng.uniform(2, 10, num_holes)
    ctf[rng.random(num_holes) < 0.2] = np.nan
    return HoleTable.from_names(
        hole_name=[f"hole{i}" for i in range(num_holes)],
        grid=[f"grid{i // square_size // grid_size}" for i in patch],
        square=[f"square{i // square_size}" for i in patch],
        patch=[f"patch{i}" for i in patch],
        ctf_max_resolution_A=ctf,
        p_low_ctf=rng.random(num_holes).round(2),
    )


def random_action(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An allowed action of each row; 0 where there is none."""
    return np.where(mask, rng.random(mask.shape), -1).argmax(-1)


# ---- rules -----------------------------------------------------------------------------------


def test_toy_tour_by_hand() -> None:
    env = CryoEMNavigationEnv(toy(), PAPER)
    observation, info = env.reset(options={"start_hole": 0})
    assert (info["num_visits"], info["num_low_ctf"], info["elapsed_min"]) == (0, 0, 0)
    assert (info["start_hole"], info["hole"], info["switch_level"]) == (0, 0, -1)
    assert info["table_hash"] == toy().content_hash
    tour = [
        # hole, reward, minute, low-CTF so far, switch
        (1, 0.0, 2, 0, 0),  # high
        (2, 0.57, 7, 1, 1),
        (3, 0.0, 17, 1, 2),  # exactly the threshold: not below it
        (4, 0.25, 19, 1.25, 0),  # no label: its probability
        (5, 0.09, 34, 2.25, 3),
        (6, 0.75, 36, 3.0, 0),  # a value, but no label: its probability
        (7, 0.0, 41, 3.0, 1),
        (8, 0.23, 51, 4.0, 2),
    ]
    for step, (hole, expected, minute, num_low, switch) in enumerate(tour, start=1):
        observation, reward, terminated, truncated, info = env.step(hole)
        assert reward == pytest.approx(expected, abs=1e-7)
        assert info["elapsed_min"] == minute
        assert observation["elapsed_min"] == np.float32([minute])
        assert info["num_low_ctf"] == pytest.approx(num_low)
        assert (info["hole"], info["switch_level"], info["num_visits"]) == (hole, switch, step)
        assert (terminated, truncated) == (step == len(tour), False)  # no hole is left
    np.testing.assert_array_equal(info["minutes_by_level"], [6, 10, 20, 15])
    np.testing.assert_array_equal(observation["recent"], [8, 7, 6])
    np.testing.assert_array_equal(env.visit_order(), range(9))
    assert not env.action_mask().any()


@pytest.mark.parametrize(("budget", "steps"), [(17.0, 4), (16.99, 3), (1.0, 1), (18.0, 4)])
def test_the_move_past_the_budget_ends_it_and_the_exact_minute_does_not(
    budget: float, steps: int
) -> None:
    env = CryoEMNavigationEnv(toy(), dataclasses.replace(PAPER, budget_min=budget))
    env.reset(options={"start_hole": 0})
    for step, hole in enumerate((1, 2, 3, 4), start=1):
        _, reward, terminated, _, _ = env.step(hole)
        assert terminated == (step == steps)
        if terminated:
            break
    assert reward == pytest.approx([0, 0.57, 0, 0.25][steps - 1])  # counts in full


def test_fractions_of_minutes_do_not_drift() -> None:
    table = random_table(np.random.default_rng(0), 200).replace(
        patch_id=np.zeros(200), square_id=np.zeros(200), grid_id=np.zeros(200),
        patch_name=["p"], square_name=["s"], grid_name=["g"],
    )  # fmt: skip
    config = NavigationConfig.preset("leginon-2021", budget_min=91.0)  # 60 moves of 91 s
    env = CryoEMNavigationEnv(table, config)
    env.reset(options={"start_hole": 0})
    ends = [env.step(hole)[2] for hole in range(1, 62)]
    assert ends.index(True) == 60


def test_dynamic_reward_and_penalty_by_hand() -> None:
    config = NavigationConfig.preset("cryorl", reward_rule="dynamic", high_ctf_penalty=0.2)
    env = CryoEMNavigationEnv(toy(), config)
    env.reset(options={"start_hole": 1})  # high: a streak of one in this patch
    tour = [
        (0, 1.0),
        (7, 0.5 * 0.01922023 - 0.2),  # 8 Å: 1.2 exp(-1.7) - 0.2; another patch starts afresh
        (6, 0.9 * 0.75),
        (4, 0.5 * 0.25 - 0.2),  # rather high
        (3, 1.0),  # 6 Å is low here
    ]
    for hole, expected in tour:
        assert env.step(hole)[1] == pytest.approx(expected, abs=1e-7)


def test_penalty_counts_the_start_hole_and_stops_at_one() -> None:
    n = 9
    table = HoleTable.from_names(
        hole_name=[f"h{i}" for i in range(n)],
        grid=["g"] * n,
        square=["s"] * n,
        patch=["p"] * n,
        ctf_max_resolution_A=np.full(n, 9.0),
    )
    env = CryoEMNavigationEnv(table, NavigationConfig.preset("cryorl", high_ctf_penalty=0.2))
    env.reset(options={"start_hole": 0})
    rewards = [env.step(hole)[1] for hole in range(1, n)]
    np.testing.assert_allclose(rewards, [-0.4, -0.6, -0.8, -1, -1, -1, -1, -1])


def test_patch_action_takes_its_best_unvisited_hole() -> None:
    env = CryoEMNavigationEnv(toy(), dataclasses.replace(PAPER, action_level="patch"))
    assert env.action_space == gym.spaces.Discrete(6)
    env.reset(options={"start_hole": 0})
    np.testing.assert_array_equal(env.action_mask(), [True] * 6)
    assert [env.step(3)[4]["hole"] for _ in range(2)] == [6, 5]  # B1a: 0.75 before 0.7
    assert env.step(0)[4]["hole"] == 1
    np.testing.assert_array_equal(env.action_mask(), [False, True, True, False, True, True])
    with pytest.raises(ValueError, match="episode 0: patch 0 has no hole left"):
        env.step(0)
    with pytest.raises(ValueError, match="episode 0: patch 6 is not one of 6"):
        env.step(6)


# ---- refusals --------------------------------------------------------------------------------


def test_refusals_name_what_is_wrong_and_move_nothing() -> None:
    single = CryoEMNavigationEnv(toy(), PAPER)
    vector = CryoEMVectorEnv([toy()], PAPER, 2)
    with pytest.raises(gym.error.ResetNeeded):
        single.step(1)
    with pytest.raises(gym.error.ResetNeeded):
        vector.step(np.array([1, 1]))
    single.reset(options={"start_hole": 3})
    vector.reset(options={"start_hole": [3, 3]})
    single.step(5)
    vector.step(np.array([5, 5]))
    for wrong, message in (
        (5, "hole 5 was visited at step 1;"),
        (3, r"hole 3 was visited at step 0 \(the start\)"),
        (9, "hole 9 is not one of the 9 holes"),
        (-1, "hole -1 is not one of the 9 holes"),
    ):
        with pytest.raises(ValueError, match=f"episode 0: {message}"):
            single.step(wrong)
        with pytest.raises(ValueError, match=f"episode 1: {message}"):
            vector.step(np.array([1, wrong]))
    assert single.vector.visit_order(0).tolist() == [3, 5]
    assert [vector.visit_order(e).tolist() for e in range(2)] == [[3, 5], [3, 5]]
    with pytest.raises(ValueError, match="one integer for each of 2 episodes"):
        vector.step(np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="one integer for each"):
        vector.step(np.array([0.5, 1]))
    with pytest.raises(ValueError, match="found float64"):
        single.step(0.5)  # type: ignore[arg-type]
    for options, message in (
        ({"begin": 1}, "begin"),
        ({"start_hole": 9}, "start_hole: 9"),
        ({"start_hole": -1}, "start_hole: -1"),
        ({"session": 1}, "session: 1"),
        ({"start_hole": 1.5}, r"start_hole: expected a whole number.* found 1\.5"),
        ({"start_hole": None}, "start_hole: expected a whole number.* found None"),
        ({"start_hole": [1, 2, 3]}, "one for each of 2 episodes"),
        ({"session": "0"}, "session: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            vector.reset(options=options)


def test_a_single_episode_that_is_over_must_be_reset() -> None:
    env = CryoEMNavigationEnv(toy(), dataclasses.replace(PAPER, budget_min=1))
    env.reset(options={"start_hole": 0})
    assert env.step(1)[2]
    with pytest.raises(ValueError, match="call reset"):
        env.step(2)


def test_a_session_of_one_hole_is_refused() -> None:
    with pytest.raises(ValueError, match="one hole"):
        CryoEMVectorEnv([toy().select(np.array([0]))], PAPER, 1)


# ---- Gymnasium's contract ----------------------------------------------------------------------

FLAVOURS: list[dict[str, Any]] = [
    {"feature_set": "paper"},
    {"feature_set": "cryorl"},
    {"feature_set": "paper", "action_level": "patch"},
    {"feature_set": "rates"},
]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
@pytest.mark.parametrize("is_drawn", [False, True])
def test_check_env(flavour: dict[str, Any], is_drawn: bool) -> None:
    """Gymnasium's own check, with every render mode; its warnings are errors here.

    It draws actions without a mask: every candidate row must be open in this session.
    """

    def draw(rng: np.random.Generator) -> HoleTable:
        return random_table(rng, 600, square_size=7, grid_size=5)

    table = draw(np.random.default_rng(1))
    spec = EnvSpec(
        id="CryoEMNavigation-v0",
        entry_point=CryoEMNavigationEnv,
        kwargs={
            "tables": table,
            "config": NavigationConfig.preset("paper", **flavour),
            "draw_session": draw if is_drawn else None,
            "capacity": (600, 150, 22, 5, 40) if is_drawn else None,
        },
    )
    env = gym.make(spec, disable_env_checker=True).unwrapped
    env.action_space.seed(0)
    check_env(env)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_vector_observations_lie_in_its_space(flavour: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    config = NavigationConfig.preset("cryorl", budget_min=30, **flavour)
    env = CryoEMVectorEnv([random_table(rng, n) for n in (20, 33)], config, 5)
    observation, _ = env.reset(seed=3)
    for _ in range(60):
        assert env.observation_space.contains(observation)
        action = random_action(env.action_mask(), rng)
        assert env.action_space.contains(action)
        observation, reward, terminated, truncated, info = env.step(action)
        assert reward.shape == terminated.shape == truncated.shape == (5,)
        assert not truncated.any()
        assert info["minutes_by_level"].sum(1) == pytest.approx(info["elapsed_min"])


def test_gymnasium_makes_it_as_a_vector_env() -> None:
    """The way of RLlib's env runner: a vector entry point, and infos as a list."""
    spec = EnvSpec(
        id="CryoEMNavigation-v0",
        vector_entry_point=lambda num_envs: CryoEMVectorEnv([toy()], PAPER, num_envs),  # type: ignore[arg-type]
    )
    env = DictInfoToList(gym.make_vec(spec, num_envs=3, vectorization_mode="vector_entry_point"))
    assert env.unwrapped.metadata["autoreset_mode"] is gym.vector.AutoresetMode.NEXT_STEP
    _, infos = env.reset(seed=0, options={"start_hole": [0, 1, 2]})
    assert [info["start_hole"] for info in infos] == [0, 1, 2]
    _, _, _, _, infos = env.step(np.array([1, 2, 3]))
    assert [info["elapsed_min"] for info in infos] == [2, 5, 10]
    assert infos[2]["table_hash"] == toy().content_hash


# ---- vector against single ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_holes=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    preset=st.sampled_from(["paper", "cryorl", "leginon-2021"]),
    budget=st.floats(1, 150),
    rule=st.sampled_from(["switch", "dynamic"]),
    penalty=st.sampled_from([0.0, 0.2]),
    level=st.sampled_from(["hole", "patch"]),
)
def test_vector_equals_single(
    seed: int,
    num_holes: list[int],
    preset: Any,
    budget: float,
    rule: str,
    penalty: float,
    level: str,
) -> None:
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, n) for n in num_holes]
    config = NavigationConfig.preset(
        preset, budget_min=budget, reward_rule=rule, high_ctf_penalty=penalty, action_level=level
    )
    vector = CryoEMVectorEnv(tables, config, 4)
    singles = [CryoEMNavigationEnv(tables, config) for _ in range(4)]
    observation, info = vector.reset(seed=seed)
    reward, terminated = np.zeros(4), np.zeros(4, bool)
    action = np.zeros(4, int)
    for _ in range(25):
        for row, single in enumerate(singles):
            if info["num_visits"][row] == 0:  # this row has just been reset
                assert (reward[row], terminated[row]) == (0, False)
                session, start = observation["session"][row, 0], info["start_hole"][row]
                _, single_info = single.reset(options={"session": session, "start_hole": start})
            else:
                _, single_reward, is_over, _, single_info = single.step(int(action[row]))
                assert (single_reward, is_over) == (reward[row], terminated[row])
            for name, value in single_info.items():
                np.testing.assert_array_equal(value, info[name][row])
            for name, value in single.compact_observation().items():
                np.testing.assert_array_equal(value[0], observation[name][row], strict=True)
            np.testing.assert_array_equal(single.action_mask(), vector.action_mask()[row])
        action = random_action(vector.action_mask(), rng)
        observation, reward, terminated, _, info = vector.step(action)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_holes=st.integers(2, 60))
def test_bits_mask_and_order_tell_the_same(seed: int, num_holes: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (num_holes, 70)  # the first session is padded
    config = dataclasses.replace(PAPER, budget_min=1e6)
    env = CryoEMVectorEnv([random_table(rng, n) for n in sizes], config, 2)
    observation, _ = env.reset(seed=seed, options={"session": [0, 1]})
    for _ in range(num_holes - 1):
        observation, *_ = env.step_holes(random_action(env.action_mask(), rng))
    visited = unpack_visited(observation, 70)
    for row, size in enumerate(sizes):
        order = env.visit_order(row)
        assert set(np.flatnonzero(visited[row])) == set(order.tolist())
        assert set(np.flatnonzero(env.action_mask()[row])) == set(range(size)) - set(order.tolist())
        np.testing.assert_array_equal(observation["recent"][row, : len(order)], order[::-1][:3])


# ---- resets, seeds, sessions -------------------------------------------------------------------


def test_an_ended_episode_is_reset_by_the_next_step() -> None:
    env = CryoEMVectorEnv([toy()], dataclasses.replace(PAPER, budget_min=4), 2)
    env.reset(seed=0, options={"start_hole": [0, 0]})
    observation, _, terminated, _, _ = env.step(np.array([1, 2]))
    assert terminated.tolist() == [False, True]
    np.testing.assert_array_equal(observation["recent"][1], [2, 0, -1])  # the last one is seen
    observation, reward, terminated, _, info = env.step(np.array([2, -77]))  # -77 is ignored
    assert terminated.tolist() == [True, False]
    assert reward.tolist() == pytest.approx([0.57, 0])
    assert info["num_visits"].tolist() == [2, 0]
    np.testing.assert_array_equal(observation["recent"][1], [info["start_hole"][1], -1, -1])
    assert observation["elapsed_min"][1] == 0
    assert unpack_visited(observation, 9)[1].sum() == 1


def rollout(env: CryoEMVectorEnv, seed: int | None, action_seed: int, num_steps: int) -> list[Any]:
    rng = np.random.default_rng(action_seed)
    log: list[Any] = [env.reset(seed=seed)]
    for _ in range(num_steps):
        log.append(env.step(random_action(env.action_mask(), rng)))
    return log


def flatten(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in flatten(v)]
    if isinstance(value, list | tuple):
        return [x for v in value for x in flatten(v)]
    return [value]


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
@pytest.mark.parametrize("is_drawn", [False, True])
def test_one_seed_fixes_everything(flavour: dict[str, Any], is_drawn: bool) -> None:
    config = NavigationConfig.preset("cryorl", **flavour)
    rng = np.random.default_rng(4)
    tables = [random_table(rng, n) for n in (30, 44)]

    def make() -> CryoEMVectorEnv:
        return CryoEMVectorEnv(
            tables,
            config,
            3,
            draw_session=(lambda g: random_table(g, int(g.integers(20, 44)))) if is_drawn else None,
            capacity=(44, 11, 6, 2, 44),
            budget_range_min=(10, 40),
        )

    first, again = make(), make()
    log = flatten(rollout(first, 11, 5, 40))
    for got in (rollout(again, 11, 5, 40), rollout(first, 11, 5, 40)):
        for x, y in zip(log, flatten(got), strict=True):
            np.testing.assert_array_equal(x, y)
    budgets = np.concatenate([step[-1]["budget_min"] for step in rollout(first, None, 5, 40)])
    assert ((budgets >= 10) & (budgets <= 40)).all()
    assert len(np.unique(budgets)) > 3
    other = flatten(rollout(again, 12, 5, 40))
    assert any(not np.array_equal(x, y) for x, y in zip(log, other, strict=True))


def test_a_row_meets_the_same_episodes_whatever_was_done_before() -> None:
    """So two policies on one seed are compared on the same sessions and starts."""
    config = NavigationConfig.preset("cryorl", budget_min=15)
    env = CryoEMVectorEnv(
        [], config, 3, draw_session=lambda g: random_table(g, 30), capacity=(30,) * 5
    )

    def episodes(action_seed: int) -> list[list[tuple[str, int]]]:
        log = rollout(env, 21, action_seed, 60)
        met: list[list[tuple[str, int]]] = [[], [], []]
        for step in log:
            info = step[-1]
            for row in np.flatnonzero(info["num_visits"] == 0):
                met[row].append((str(info["table_hash"][row]), int(info["start_hole"][row])))
        return met

    for mine, theirs in zip(episodes(1), episodes(2), strict=True):
        both = min(len(mine), len(theirs))
        assert both >= 3
        assert mine[:both] == theirs[:both]


def test_drawn_sessions_may_outgrow_the_stack_under_rates_only() -> None:
    sizes = iter([10, 12, 12, 12, 25, 60, 60, 60, 90])

    def draw(rng: np.random.Generator) -> HoleTable:
        return random_table(rng, next(sizes, 90))

    config = NavigationConfig.preset("cryorl", feature_set="rates", budget_min=12)
    env = CryoEMVectorEnv([], config, 3, draw_session=draw)
    space = env.single_observation_space
    observation, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    shapes = [env.stack.shape]
    for _ in range(60):
        observation, *_ = env.step(random_action(env.action_mask(), rng))
        assert env.observation_space.contains(observation)
        shapes.append(env.stack.shape)
    assert space == env.single_observation_space
    assert shapes[-1].num_holes == 90
    assert all(later.holds(earlier) for earlier, later in itertools.pairwise(shapes))
    small = CryoEMVectorEnv(
        [], PAPER, 2, draw_session=lambda g: random_table(g, 10 + 5 * (g.random() < 0.5))
    )
    with pytest.raises(ValueError, match="capacity"):
        for _ in range(20):
            small.reset()
    with pytest.raises(ValueError, match="drawn afresh"):
        env.reset(options={"session": 0})


def test_start_is_uniform_over_holes_and_sessions() -> None:
    env = CryoEMVectorEnv([toy(), toy().select(np.arange(4))], PAPER, 4000)
    observation, info = env.reset(seed=0)
    session = observation["session"][:, 0]
    assert abs(session.mean() - 0.5) < 0.03
    for row, size in enumerate((9, 4)):
        count = np.bincount(info["start_hole"][session == row], minlength=9)
        assert (count[size:] == 0).all()
        assert (abs(count[:size] / count.sum() - 1 / size) < 0.05).all()


# ---- candidates --------------------------------------------------------------------------------


def test_rates_action_is_a_candidate() -> None:
    rng = np.random.default_rng(6)
    config = NavigationConfig.preset("cryorl", feature_set="rates", num_candidates=6)
    tables = [random_table(rng, 50), random_table(rng, 30)]
    env = CryoEMVectorEnv(tables, config, 3)
    single = CryoEMNavigationEnv(tables, config)
    observation, _ = env.reset(seed=1, options={"session": [0, 1, 1], "start_hole": 3})
    single_observation, _ = single.reset(seed=1, options={"session": 1, "start_hole": 3})
    assert observation["rows"].shape == (3, 6, NUM_FEATURES)
    for _ in range(15):
        for name, value in single_observation.items():
            np.testing.assert_array_equal(value, observation[name][1])
        mask = observation["action_mask"].astype(bool)
        np.testing.assert_array_equal(mask, env.action_mask())
        action = random_action(mask, rng)
        target = observation["hole"][np.arange(3), action]
        observation, reward, _, _, info = env.step(action)
        np.testing.assert_array_equal(info["hole"], target)
        single_observation, single_reward, *_ = single.step(int(action[1]))
        assert single_reward == reward[1]
        np.testing.assert_array_equal(
            observation["minutes_left"][:, 0], np.float32(480 - info["elapsed_min"])
        )
    if (closed := np.argwhere(observation["action_mask"] == 0)).size:
        row, column = closed[0]
        action = random_action(env.action_mask(), rng)
        action[row] = column
        with pytest.raises(ValueError, match=f"episode {row}: candidate {column} has no hole left"):
            env.step(action)


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_any_policy_can_drive_any_feature_set(flavour: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    table = random_table(rng, 40)
    env = CryoEMVectorEnv([table], NavigationConfig.preset("paper", **flavour), 2)
    env.reset(seed=0, options={"start_hole": 0})
    for hole in range(1, 6):
        _, _, _, _, info = env.step_holes(np.array([hole, hole + 10]))
        assert info["hole"].tolist() == [hole, hole + 10]
    compact = env.compact_observation()
    np.testing.assert_array_equal(compact["recent"], [[5, 4, 3], [15, 14, 13]])
    compact["visited"][:] = 0  # a copy: the env does not care
    assert unpack_visited(env.compact_observation(), 40)[0].sum() == 6


# ---- stack -------------------------------------------------------------------------------------


def test_stack_shape_is_the_smallest_that_holds_all() -> None:
    tables = [toy(), toy().select(np.array([0, 1, 2]))]
    assert StackShape.of(toy()) == (9, 6, 4, 2, 2)
    stack = SessionStack.of(tables, PAPER, at_least=StackShape(5, 7, 1, 1, 1))
    assert stack.shape == (9, 7, 4, 2, 2)
    assert stack.table_hash.tolist() == [table.content_hash for table in tables]
    with pytest.raises(ValueError, match="does not fit"):
        stack.put(0, random_table(np.random.default_rng(0), 10), PAPER)


# ---- maps --------------------------------------------------------------------------------------


def test_render_modes() -> None:
    env = CryoEMNavigationEnv(toy(), PAPER, render_mode="rgb_array")
    env.reset(options={"start_hole": 0})
    before = env.render()
    env.step(2)
    after = env.render()
    assert isinstance(before, np.ndarray)
    assert isinstance(after, np.ndarray)
    assert before.dtype == np.uint8
    assert before.shape == after.shape
    assert before.shape[1:] == (1600, 3)
    assert (before != after).any()
    text = CryoEMNavigationEnv(toy(), PAPER, render_mode="ansi")
    text.reset(options={"start_hole": 0})
    text.step(2)
    drawn = text.render()
    assert isinstance(drawn, str)
    assert drawn.splitlines()[0] == "minute 5.0 of 480.0 · visits 1 · low-CTF 1.0 · at hole2"
    assert [line.split() for line in drawn.splitlines()[2:4]] == [
        [">A1", "3", "2", "1.0", "1", "0.20"],
        ["A2", "2", "0", "0.0", "2", "0.38"],
    ]
    with pytest.raises(ValueError, match="render_mode"):
        CryoEMNavigationEnv(toy(), PAPER, render_mode="human")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), num_holes=st.integers(1, 120), is_known=st.booleans())
def test_floor_plan_keeps_holes_in_their_boxes_and_boxes_apart(
    seed: int, num_holes: int, is_known: bool
) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(rng, num_holes)
    if is_known:
        table = table.replace(x=rng.uniform(0, 4000, num_holes), y=rng.uniform(0, 4000, num_holes))
    x, y, boxes = lay_out(table)
    for level, code in (
        ("patch", table.patch_id),
        ("square", table.square_id),
        ("grid", table.grid_id),
        ("page", np.zeros(num_holes, int)),
    ):
        left, top, width, height = boxes[level][code].T
        assert ((left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)).all()
        box = boxes[level]
        is_apart = (
            (box[:, None, 0] + box[:, None, 2] <= box[:, 0])
            | (box[:, 0] + box[:, 2] <= box[:, None, 0])
            | (box[:, None, 1] + box[:, None, 3] <= box[:, 1])
            | (box[:, 1] + box[:, 3] <= box[:, None, 1])
        )
        np.fill_diagonal(is_apart, True)
        assert is_apart.all()
    assert len(np.unique(np.column_stack([x, y]), axis=0)) == num_holes


def test_map_of_an_untouched_session_and_of_a_whole_tour() -> None:
    plain = draw_map(toy(), PAPER, np.array([], int), width_px=700)
    toured = draw_map(toy(), PAPER, np.arange(9), title="a tour", width_px=700)
    assert plain.shape[1:] == toured.shape[1:] == (700, 3)
    assert "low-CTF 4.0" in describe(toy(), PAPER, np.arange(9), elapsed_min=51, budget_min=60)


# ---- RLlib -------------------------------------------------------------------------------------


@pytest.mark.ray
def test_rllib_env_runner_plays_it_unwrapped() -> None:
    """The stock runner takes the vector env as it is and cuts it into whole episodes."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    table = random_table(np.random.default_rng(0), 2000)
    config = dataclasses.replace(PAPER, budget_min=30.0)
    algorithm = (
        AlgorithmConfig()
        .environment(env=lambda context: CryoEMVectorEnv([table], config, context["num_envs"]))
        .env_runners(num_envs_per_env_runner=8, gym_env_vectorize_mode="vector_entry_point")
        .debugging(seed=3)
    )
    runner = SingleAgentEnvRunner(config=algorithm, worker_index=0)
    assert isinstance(runner.env.unwrapped, CryoEMVectorEnv)
    # Its random actions know no mask: with this seed they meet no visited hole.
    runner.env.action_space.seed(0)
    episodes = runner.sample(num_timesteps=160, random_actions=True)
    runner.stop()
    assert sum(len(episode) for episode in episodes) >= 160
    assert any(episode.is_terminated for episode in episodes)
    for episode in episodes:
        elapsed = np.array([info["elapsed_min"] for info in episode.get_infos()])
        assert elapsed[0] == 0
        assert (np.diff(elapsed) > 0).all()
        assert episode.is_terminated == (elapsed[-1] > 30)
        assert (elapsed[:-1] <= 30).all()
        observed = episode.get_observations()["elapsed_min"][:, 0]
        np.testing.assert_array_equal(observed, elapsed)
