"""Group counts -> features of every hole: pure, batched, the reference for the torch expander.

Shape letters: E episodes, N holes, K past steps, F features; T sessions in the stack. Features of
one hole at one time are, in this order,

* ``cryorl`` (17; the public CryoRL code, classification mode): p, visited, 3 x 4 counts, and three
  flags: same grid, same square, same patch as the current hole;
* ``paper`` (16; SSL²-RL, section 4): p, 3 x 4 counts, and three flags: the move would switch patch,
  square, grid.

The counts of the hole's patch, square and grid are: unvisited holes, unvisited low-CTF holes as
predicted (the sum of p), visited holes, visited low-CTF holes as measured (the sum of outcomes).
The last K steps are stacked, oldest first, newest last.
"""

from __future__ import annotations

import numpy as np

from envs.cryoem.stack import SessionStack
from envs.cryoem.types import BoolArray, FeatureSet, FloatArray, IntArray, NavigationConfig

GROUP_SCALE = (25.0, 150.0, 500.0)
"""Holes of a full patch, square and grid: the divisors of the counts (CryoRL's public code)."""

NUM_FEATURES: dict[FeatureSet, int] = {"paper": 16, "cryorl": 17}
"""F of one step; the stacked features are ``num_past_steps`` times as many."""


def normalise_count(count: np.ndarray, scale: float, feature_set: FeatureSet) -> FloatArray:
    """Group counts to about [0, 1].

    ``cryorl``: min(count / scale, 1), as its code has it; squares of more than 150 holes saturate.
    ``paper`` does not say. Ours is log(1 + count) / log(1 + scale): it never saturates, it resolves
    best where decisions are made (is one good hole left here, or none?), and it does not depend on
    the session, so that weights carry over to another one.
    """
    if feature_set == "cryorl":
        return np.minimum(count / scale, 1.0)
    return np.log1p(count) / np.log1p(scale)


def past_frames(visited: BoolArray, recent: IntArray) -> tuple[BoolArray, IntArray]:
    """The visited sets (E, K, N) and current holes (E, K) of the last K steps, newest first.

    A past step is the present without what was visited since. Before the first step there is
    nothing to show, so the frame of the start fills the missing ones (as CryoRL does).
    """
    steps = np.arange(recent.shape[1])
    age = np.minimum(steps, (recent >= 0).sum(1, keepdims=True) - 1)
    past = np.repeat(visited[:, None], len(steps), 1)
    episode, step, later = np.nonzero(steps < age[:, :, None])
    past[episode, step, recent[episode, later]] = False
    return past, np.take_along_axis(recent, age, 1)


def hole_features(
    stack: SessionStack,
    session: IntArray,
    visited: BoolArray,
    current: IntArray,
    recent: IntArray,
    config: NavigationConfig,
) -> FloatArray:
    """(E, N, K F) float32 features of every hole under ``paper`` or ``cryorl``; padding rows are 0.

    Args:
        stack: the sessions, T of them.
        session: (E,) row of the stack of each episode.
        visited: (E, N) bool, padding False.
        current: (E,) the current hole, which is ``recent[:, 0]``.
        recent: (E, K) the holes visited last, newest first, -1 = none; K = num_past_steps.
        config: names the feature set.

    Raises:
        ValueError: for a feature set that has no features of holes, or where ``current`` is not
            the most recent hole.
    """
    if config.feature_set not in NUM_FEATURES:
        raise ValueError(f"feature_set {config.feature_set!r} has no features per hole")
    if not np.array_equal(current, recent[:, 0]):
        raise ValueError("current must be recent[:, 0], the hole visited last")
    is_cryorl = config.feature_set == "cryorl"
    is_hole = stack.patch_id[session] >= 0
    past, past_current = past_frames(visited, recent)
    num_episodes, num_steps, num_holes = past.shape
    p = np.broadcast_to(stack.p_low_ctf[session][:, None], past.shape).astype(float)
    truth = stack.outcome[session][:, None].astype(float)
    left = ~past & is_hole[:, None]
    weights = np.stack([left, p * left, past, truth * past]).reshape(4, -1)

    columns: list[np.ndarray] = [p]
    if is_cryorl:
        columns.append(past)
    is_same = []
    frame = np.arange(num_episodes * num_steps)[:, None]
    for code, scale in zip(
        (stack.patch_id, stack.square_id, stack.grid_id), GROUP_SCALE, strict=True
    ):
        group = np.repeat(code[session], num_steps, 0)
        size = int(code.max()) + 2  # the last bin takes the padding (code -1)
        index = (frame * size + group % size).ravel()
        for weight in weights:
            count = np.bincount(index, weight, frame.size * size)[index].reshape(past.shape)
            columns.append(normalise_count(count, scale, config.feature_set))
        here = np.take_along_axis(code[session], past_current, 1)
        is_same.append(code[session][:, None] == here[:, :, None])
    columns += is_same[::-1] if is_cryorl else [~same for same in is_same]
    frames = np.stack(columns, -1, dtype=np.float32, casting="unsafe")  # (E, K, N, F)
    frames *= is_hole[:, None, :, None]
    return frames[:, ::-1].transpose(0, 2, 1, 3).reshape(num_episodes, num_holes, -1)
