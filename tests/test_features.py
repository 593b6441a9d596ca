"""Features with counts worked out by hand; the public CryoRL values are in test_conformance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cryoem.features import NUM_FEATURES, hole_features, normalise_count, past_frames
from envs.cryoem.stack import SessionStack
from envs.cryoem.types import FeatureSet, HoleTable, NavigationConfig


def table(patch: list[str], p: list[float], ctf: list[float]) -> HoleTable:
    """A patch's name begins with its grid, then its square."""
    return HoleTable.from_names(
        hole_name=[f"hole{i}" for i in range(len(patch))],
        grid=[name[0] for name in patch],
        square=[name[:2] for name in patch],
        patch=patch,
        p_low_ctf=np.array(p),
        ctf_max_resolution_A=np.array(ctf),
    )


TOY = table(
    ["A1a", "A1a", "A1b", "A2a", "B1a", "B1a"],
    [0.5, 0.25, 0.75, 1.0, 0.125, 0.0],
    [5.0, 9.0, 4.0, np.nan, 7.0, 3.0],
)
# Visited: 0 (the start, low), 3 (no label: its p of 1 counts), 4 (high) where the tour stands.
VISITED = np.array([[1, 0, 0, 1, 1, 0]], bool)
RECENT = np.array([[4, 3, 0]], np.int32)


def features(name: FeatureSet, recent: np.ndarray = RECENT) -> np.ndarray:
    config = NavigationConfig.preset("paper", feature_set=name, num_past_steps=recent.shape[1])
    stack = SessionStack.of([TOY], config)
    session = np.zeros(1, int)
    return hole_features(stack, session, VISITED, recent[:, 0], recent, config)


#        patch: left, predicted, visited, low; square; grid
COUNTS = {
    1: [1, 0.25, 1, 1, 2, 1.0, 1, 1, 2, 1.0, 2, 2],
    2: [1, 0.75, 0, 0, 2, 1.0, 1, 1, 2, 1.0, 2, 2],
    3: [0, 0, 1, 1, 0, 0, 1, 1, 2, 1.0, 2, 2],
    5: [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0],
}
SCALE = np.repeat([25.0, 150.0, 500.0], 4)


@pytest.mark.parametrize("hole", COUNTS)
def test_newest_step_by_hand(hole: int) -> None:
    is_same = [hole == 5] * 3
    counts, p = np.array(COUNTS[hole]), TOY.p_low_ctf[hole]
    cryorl = [p, VISITED[0, hole], *counts / SCALE, *is_same]
    paper = [p, *np.log1p(counts) / np.log1p(SCALE), *(not same for same in is_same)]
    np.testing.assert_allclose(features("cryorl")[0, hole, -17:], cryorl, rtol=1e-6)
    np.testing.assert_allclose(features("paper")[0, hole, -16:], paper, rtol=1e-6)


def test_older_steps_stand_before_newer_ones() -> None:
    got = features("cryorl")[0].reshape(6, 3, 17)
    np.testing.assert_array_equal(
        got[:, :, 1], [[1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]]
    )
    # Same grid, square, patch as hole 0 (start), 3 (then), 4 (now), seen from hole 2.
    np.testing.assert_array_equal(got[2, :, 14:], [[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def test_before_the_start_the_frame_of_the_start_is_repeated() -> None:
    visited = np.array([[True, False, False]])
    past, current = past_frames(visited, np.array([[0, -1, -1]]))
    np.testing.assert_array_equal(past, np.repeat(visited[:, None], 3, 1))
    np.testing.assert_array_equal(current, [[0, 0, 0]])
    visited = np.array([[True, False, True]])
    past, current = past_frames(visited, np.array([[2, 0, -1]]))
    np.testing.assert_array_equal(past[0], [[1, 0, 1], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(current, [[2, 0, 0]])


def test_normalisation() -> None:
    count = np.array([0.0, 25, 50])
    np.testing.assert_array_equal(normalise_count(count, 25, "cryorl"), [0, 1, 1])
    np.testing.assert_allclose(normalise_count(count, 25, "paper"), [0, 1, np.log(51) / np.log(26)])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="rates"):
        features("rates")
    config = NavigationConfig.preset("paper")
    with pytest.raises(ValueError, match="current"):
        hole_features(
            SessionStack.of([TOY], config), np.zeros(1, int), VISITED, np.array([0]), RECENT, config
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(2, 24), min_size=1, max_size=4),
    name=st.sampled_from(list(NUM_FEATURES)),
    num_steps=st.integers(1, 5),
)
def test_a_batch_is_its_episodes_and_padding_is_nothing(
    seed: int, sizes: list[int], name: FeatureSet, num_steps: int
) -> None:
    rng = np.random.default_rng(seed)
    config = NavigationConfig.preset("cryorl", feature_set=name, num_past_steps=num_steps)
    tables = []
    for n in sizes:
        code = np.sort(rng.integers(0, 6, n))
        tables.append(
            table(
                [f"{'ABC'[c // 3]}{c // 2}{c}" for c in code],
                list(rng.random(n)),
                list(np.where(rng.random(n) < 0.2, np.nan, rng.uniform(2, 9, n))),
            )
        )
    stack = SessionStack.of(tables, config)
    n_max = max(sizes)
    visited = np.zeros((len(sizes), n_max), bool)
    recent = np.full((len(sizes), num_steps), -1)
    for row, n in enumerate(sizes):
        order = rng.permutation(n)[: rng.integers(1, n + 1)]
        visited[row, order] = True
        newest = order[::-1][:num_steps]
        recent[row, : len(newest)] = newest
    session = np.arange(len(sizes))
    whole = hole_features(stack, session, visited, recent[:, 0], recent, config)
    assert whole.shape == (len(sizes), n_max, num_steps * NUM_FEATURES[name])
    assert whole.dtype == np.float32
    for row, n in enumerate(sizes):
        alone = hole_features(
            SessionStack.of([tables[row]], config),
            np.zeros(1, int),
            visited[[row], :n],
            recent[[row], 0],
            recent[[row]],
            config,
        )
        np.testing.assert_allclose(whole[row, :n], alone[0], atol=1e-6)
        assert (whole[row, n:] == 0).all()
    assert (whole >= 0).all()
    assert (whole <= 1.0 + 1e-6).all()  # no group here is larger than a full patch
