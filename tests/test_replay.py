"""The columnar replay against windows followed one step at a time."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.synthetic import PRESETS, draw_session
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms.replay import Replay


def fill(replay, script, *, start=0, is_continued=True):
    """Pushes rows (minutes, reward, end, is_move) of one stream; each shows its own number."""
    num = len(script)
    minutes, reward, end, is_move = (np.array(c) for c in zip(*script, strict=True))
    replay.push(
        observation={"x": np.arange(start, start + num, dtype=np.float32).reshape(num, 1, 1)},
        action=np.arange(start, start + num).reshape(num, 1),
        reward=reward.reshape(num, 1),
        minutes=minutes.reshape(num, 1),
        is_terminated=(end == "end").reshape(num, 1),
        is_truncated=(end == "cut").reshape(num, 1),
        is_move=is_move.reshape(num, 1),
        is_continued=np.array([is_continued]),
    )


def everything(replay, gamma_rng=0):
    """All windows, by the number of their first step."""
    batch = replay.sample(4000, np.random.default_rng(gamma_rng))
    first = batch["obs"]["x"][:, 0].astype(int)
    return {
        int(step): {key: batch[key][i] for key in ("reward", "discount", "action")}
        | {"next": int(batch["next_obs"]["x"][i, 0])}
        for i, step in enumerate(first)
    }


def make(n_step=3, capacity=100, gamma=0.5, streams=1, **kwargs):
    return Replay(
        capacity=capacity, num_streams=streams, n_step=n_step, discount_per_min=gamma, **kwargs
    )


def test_returns_are_discounted_by_minutes():
    replay = make()
    # four moves of 1, 2, 1, 3 minutes with rewards 1, 10, 100, 1000, then the episode ends
    fill(
        replay,
        [
            (1, 1, "", True),
            (2, 10, "", True),
            (1, 100, "", True),
            (3, 1000, "end", True),
            (0, 0, "", False),
            (1, 7, "", True),
        ],
    )
    windows = everything(replay)
    assert set(windows) == {0, 1, 2, 3}  # the last row has no successor yet, row 4 is no move
    assert windows[0]["reward"] == pytest.approx(1 + 10 / 2 + 100 / 8)
    assert windows[0]["discount"] == pytest.approx(0.5**4) and windows[0]["next"] == 3
    assert windows[1]["reward"] == pytest.approx(10 + 100 / 4 + 1000 / 8)
    assert windows[1]["discount"] == 0
    assert windows[2]["reward"] == pytest.approx(100 + 1000 / 2)
    assert windows[3]["reward"] == 1000 and windows[3]["discount"] == 0
    assert all(windows[step]["action"] == step for step in windows)


def test_a_truncated_episode_bootstraps_from_its_last_observation():
    replay = make()
    fill(replay, [(1, 1, "", True), (1, 2, "cut", True), (0, 0, "", False), (1, 5, "", True)])
    windows = everything(replay)
    assert windows[0]["next"] == 2 and windows[0]["discount"] == 0.25
    assert windows[1]["next"] == 2 and windows[1]["discount"] == 0.5


def test_no_window_crosses_a_seam():
    replay = make(n_step=2)
    fill(replay, [(1, 1, "", True)] * 4)
    fill(replay, [(1, 1, "", True)] * 4, start=10, is_continued=False)
    assert set(everything(replay)) == {0, 1, 10, 11}
    fill(replay, [(1, 1, "", True)] * 2, start=14)
    assert set(everything(replay)) == {0, 1, 10, 11, 12, 13}


def test_the_ring_forgets_the_oldest_and_never_joins_head_and_tail():
    replay = make(n_step=2, capacity=8)
    for start in range(0, 40, 5):
        fill(replay, [(1, 1, "", True)] * 5, start=start)
        assert max(everything(replay)) == start + 2
        assert min(everything(replay)) == max(0, start + 5 - 8)
        for first, window in everything(replay).items():
            assert window["next"] == first + 2


@settings(max_examples=60, deadline=None)
@given(
    n_step=st.integers(1, 5),
    script=st.lists(
        st.tuples(
            st.integers(1, 15),
            st.floats(-1, 1, width=32),
            st.sampled_from(["", "", "", "end", "cut"]),
        ),
        min_size=1,
        max_size=60,
    ),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12),
)
def test_windows_equal_a_plain_loop(n_step, script, sizes):
    """Whatever the episodes and the sizes of the pushes: the same windows as one step at a time."""
    rows = []
    for minutes, reward, end in script:
        rows.append((minutes, reward, end, True))
        if end:
            rows.append((0, 0.0, "", False))
    replay, gamma, at = make(n_step=n_step, capacity=200, gamma=0.9), 0.9, 0
    for size in [*sizes, len(rows)]:
        if chunk := rows[at : at + size]:
            fill(replay, chunk, start=at)
        at += len(chunk)
    expected = {}
    for first, row in enumerate(rows):
        if not row[3]:
            continue
        total, elapsed, ended, step = 0.0, 0, "", first
        for step in range(first, first + n_step):
            if step >= len(rows):
                break
            total += gamma**elapsed * rows[step][1]
            elapsed += rows[step][0]
            if ended := rows[step][2]:
                break
        if ended == "end":
            expected[first] = (total, 0.0)
        elif step + 1 < len(rows):
            expected[first] = (total, gamma**elapsed)
    assert len(replay) == len(expected)
    if expected:
        windows = everything(replay)
        assert set(windows) <= set(expected)
        for first, window in windows.items():
            assert window["reward"] == pytest.approx(expected[first][0], abs=1e-5)
            assert window["discount"] == pytest.approx(expected[first][1], abs=1e-6)


def test_uniform_sampling_is_uniform():
    replay = make(n_step=1)
    fill(replay, [(1, 0, "", True)] * 11)
    index = replay.sample(50_000, np.random.default_rng(0))["index"]
    counts = np.bincount(index, minlength=10)
    assert len(counts) == 10 and np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_priorities_are_followed_and_weighed():
    replay = make(n_step=1, is_prioritized=True, priority_exponent=0.5)
    fill(replay, [(1, 0, "", True)] * 5)
    replay.update_priorities(np.arange(4), np.array([0.0, 1.0, 4.0, 9.0]))
    batch = replay.sample(60_000, np.random.default_rng(0), importance_exponent=1.0)
    share = np.bincount(batch["index"], minlength=4) / 60_000
    assert share == pytest.approx([1 / 6000, 1 / 6, 2 / 6, 3 / 6], abs=0.01)
    weight = {int(i): float(w) for i, w in zip(batch["index"], batch["weight"], strict=True)}
    assert weight[3] / weight[1] == pytest.approx(1 / 3, rel=1e-4)
    assert replay.sample(9, np.random.default_rng(1), 0.0)["weight"].tolist() == [1.0] * 9


def test_new_windows_get_the_largest_priority_and_old_ones_keep_theirs():
    replay = make(n_step=2, is_prioritized=True, priority_exponent=1.0)
    fill(replay, [(1, 0, "", True)] * 4)
    replay.update_priorities(np.array([0, 1]), np.array([0.5, 6.0]))
    fill(replay, [(1, 0, "", True)], start=4)
    assert replay.priority[:3, 0] == pytest.approx([0.5, 6.0, 6.0], abs=1e-5)
    assert (replay.priority[3:] == 0).all()


def test_state_goes_on_where_it_was():
    rng = np.random.default_rng(3)
    first, second = make(is_prioritized=True), make(is_prioritized=True)
    fill(first, [(1, float(r), "", True) for r in rng.normal(size=20)])
    second.load_state_dict(first.state_dict())
    for replay in (first, second):
        fill(replay, [(1, 3, "", True)] * 3, start=20)
    a, b = (replay.sample(64, np.random.default_rng(5), 0.4) for replay in (first, second))
    assert all(np.array_equal(a[key], b[key]) for key in ("reward", "discount", "weight", "index"))
    with pytest.raises(ValueError, match="resume with the same buffer_capacity"):
        make(capacity=50).load_state_dict(first.state_dict())


def test_errors_say_what_to_change():
    with pytest.raises(ValueError, match="buffer_capacity: 10 steps are 2 rows"):
        make(capacity=10, streams=4)
    with pytest.raises(ValueError, match="nothing to sample"):
        make().sample(1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="do not fit a ring"):
        fill(make(capacity=8), [(1, 1, "", True)] * 9)


@pytest.mark.parametrize("feature_set", ["paper", "cryorl", "rates"])
def test_a_step_at_6489_holes_takes_less_than_1500_bytes(feature_set):
    shape = {"squares_per_grid": (1, 40), "patches_per_square": (1, 320)}
    preset = dataclasses.replace(PRESETS["aldolase"], totals=(40, 320, 6489), **shape)
    table = draw_session(np.random.default_rng(0), preset)
    rules = NavigationConfig.preset("cryorl", feature_set=feature_set)
    observation, _ = CryoEMVectorEnv([table], rules, 4).reset(seed=0)
    replay = make(capacity=640, streams=4, is_prioritized=True)
    zeros = np.zeros((1, 4))
    replay.push(
        observation={key: value[None] for key, value in observation.items()},
        action=zeros,
        reward=zeros,
        minutes=zeros,
        is_terminated=zeros.astype(bool),
        is_truncated=zeros.astype(bool),
        is_move=~zeros.astype(bool),
        is_continued=np.ones(4, bool),
    )
    assert len(table) == 6489 and replay.payload_bytes_per_step <= 1500
