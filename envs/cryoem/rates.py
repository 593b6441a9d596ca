"""The ``rates`` observation: a dozen moves worth considering, each with what it is worth.

A row is a move: stay in the patch, another patch of the square, another square of the grid, another
grid. Its columns come from the belief and from the price of time (belief.py), so a network that
reads them starts where the strongest planner ends. Shape letters: E episodes, C candidates,
F features, K holes of the largest patch.
"""

from __future__ import annotations

import numpy as np

from envs.cryoem import belief
from envs.cryoem.belief import Layout, Place, Sorted
from envs.cryoem.stack import SessionStack
from envs.cryoem.types import BoolArray, FloatArray, IntArray, NavigationConfig, RandomEffects

FEATURES = (
    "is_stay",
    "is_patch",
    "is_square",
    "is_grid",
    "advantage",  # what the price of time says of the move, at most about 0: the planner's score
    "p_target",  # P(low) of the hole that would be visited
    "p_1",  # P(low) of the best, 2nd, 5th and 10th hole left in that patch
    "p_2",
    "p_5",
    "p_10",
    "gain",  # expected reward of the move minus its minutes at the price
    "run_rate",  # best expected reward per minute of a run in that patch, over the highest possible
    "price",  # price of a minute, over the highest possible
    "surplus_patch",  # worth of the patch beyond its price, this way in
    "surplus_group",  # worth of the square or grid that the move opens, beyond its price
    "surplus_here",  # worth of what the move leaves behind
    "num_left",  # holes left in the patch / 25
    "num_worth",  # of them worth their minutes / 25
    "shift",  # posterior mean of the patch's effect, logits
    "num_visited_patch",  # / 25
    "num_low_patch",
    "num_visited_square",  # / 150
    "num_low_square",
    "num_visited_grid",  # / 500
    "num_low_grid",
    "surprise",  # measured minus predicted lows per visit, whole session so far
    "minutes_left",  # / 480
    "log_minutes_left",  # log(1 + minutes) / log(481)
    "bound",  # dual bound of the reward still to come / 480: price x minutes left + surpluses
)
NUM_FEATURES = len(FEATURES)
PRIOR_COLUMN = FEATURES.index("advantage")
BOUND_COLUMN = FEATURES.index("bound")
_NUM_WORTH_COLUMN = FEATURES.index("num_worth")
BOUND_SCALE = np.float32(480)
_TIE = np.float32(1e-3)  # among moves that the price calls equal, the one with more surplus


def num_by_level(num_candidates: int) -> tuple[int, int, int, int]:
    """How many candidates stay, change patch, square, grid (12: 1, 5, 2, 4)."""
    others = num_candidates - 1
    square = max(1, others // 4)
    grid = max(1, (others - square) // 2)
    return 1, others - square - grid, square, grid


def _top(values: FloatArray, count: int) -> IntArray:
    """(E, count) indices of the largest values (E, M), best first; M may be below count."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    if order.shape[1] < count:
        order = np.pad(order, ((0, 0), (0, count - order.shape[1])), mode="edge")
    return order


def bound_of(rows: FloatArray) -> FloatArray:
    """(...) reward still to come that rows (..., C, F) promise; 0 where no move is left."""
    return rows[..., BOUND_COLUMN].max(-1) * BOUND_SCALE


def candidate_rows(
    stack: SessionStack,
    session: IntArray,
    visited: BoolArray,
    current: IntArray,
    minutes_left: FloatArray,
    config: NavigationConfig,
    effects: RandomEffects,
    *,
    layout: Layout | None = None,
    is_adaptive: bool = True,
) -> tuple[FloatArray, IntArray, BoolArray]:
    """Rows (E, C, F) float32, their target holes (E, C) int32 (-1 = no such move), and the mask.

    ``session`` (E,) rows of the stack, ``visited`` (E, N), ``current`` hole (E,), ``minutes_left``
    (E,). Outcomes are read only of visited holes. ``layout`` saves gathering the sessions again.
    """
    layout = layout or Layout.of(stack, session, effects)
    num_episodes = len(current)
    row = np.arange(num_episodes)
    col = row[:, None]
    believed = belief.believe(layout, visited, effects, is_adaptive=is_adaptive)
    sorted_p = Sorted.of(believed)
    place = Place.of(layout, current)
    left = np.maximum(np.asarray(minutes_left, np.float32), np.float32(config.minutes[0]))
    price = belief.price_of_time(layout, sorted_p, place, left, config)
    value = belief.worth(sorted_p, price[:, None], config, left[:, None])
    groups = belief.group_worth(layout, value, config)
    own_patch, own_square = np.maximum(value.patch[1], 0), np.maximum(groups.square[0], 0)

    # What a move leaves behind can be come back to, but only through a dearer switch.
    stay = value.stay[row, place.patch]
    in_square = stay + (own_patch * place.other_patch).sum(-1)
    in_grid = in_square + (own_square * place.other_square).sum(-1)
    loss_patch = stay - own_patch[row, place.patch]
    loss_square = in_square - own_square[row, place.square]
    loss_grid = in_grid - np.maximum(groups.grid[row, place.grid], 0)

    # Where each level would go: patches of this square; the entry patch of squares and of grids.
    n_stay, n_patch, n_square, n_grid = num_by_level(config.num_candidates)
    worth_patch = np.where(place.other_patch, value.patch[1], -np.inf)
    worth_square = np.where(place.other_square, groups.square[0], -np.inf)
    worth_grid = np.where(place.other_grid, groups.grid, -np.inf)
    bound = price * left + in_grid + np.maximum(worth_grid, 0).sum(-1)
    to_patch, to_square, to_grid = (
        _top(worth_patch, n_patch),
        _top(worth_square, n_square),
        _top(worth_grid, n_grid),
    )
    square_in = np.where(
        layout.square_grid[:, None, :] == to_grid[..., None],
        (groups.square[1] - own_square)[:, None, :],
        -np.inf,
    ).argmax(-1)

    def patch_in(square: IntArray, level: int) -> IntArray:
        """(E, c) the patch by which each square is entered."""
        is_inside = layout.patch_square[:, None, :] == square[..., None]
        way_in = np.where(value.patch[1] > -np.inf, value.patch[level] - own_patch, -np.inf)
        return np.where(is_inside, way_in[:, None, :], -np.inf).argmax(-1)

    patch = np.concatenate(
        [place.patch[:, None], to_patch, patch_in(to_square, 2), patch_in(square_in, 3)], 1
    )
    level = np.repeat(np.arange(4), (n_stay, n_patch, n_square, n_grid))
    minutes, reward = np.array(config.minutes, np.float32), np.array(config.reward, np.float32)
    surplus_patch = np.stack(value.patch, -1)[col, patch, level]
    surplus_group = np.concatenate(
        [
            stay[:, None],
            worth_patch[col, to_patch],
            worth_square[col, to_square],
            worth_grid[col, to_grid],
        ],
        1,
    )
    loss = np.stack([np.zeros_like(stay), loss_patch, loss_square, loss_grid], 1)[:, level]
    behind = np.stack([np.zeros_like(stay), stay, in_square, in_grid], 1)[:, level]

    # Staying takes the best hole; a switch pays less, so it takes the one that loses least by it.
    p = believed.p[col, patch]  # (E, C, K)
    rank = np.stack(value.entry, -1)[col, patch, level]
    p_target = sorted_p.p[rank, col, patch]
    slot = (p == p_target[..., None]).argmax(-1)
    gain = reward[level] * p_target - price[:, None] * minutes[level]
    mask = (p_target > 0) & (surplus_group > -np.inf)
    mask &= _is_first(patch, mask)
    hole = np.where(mask, layout.slot_hole[col, patch, slot], -1)
    advantage = np.where(
        level == 0,
        np.minimum(gain, 0) + _TIE * np.float32(0.1),
        np.minimum(surplus_group, 0) - loss + _TIE * np.maximum(surplus_group, -1),
    )
    ranked = np.moveaxis(sorted_p.p[:, col, patch], 0, -1)  # (E, C, K + 1), best first
    sums = np.moveaxis(sorted_p.sum_p[:, col, patch], 0, -1)
    num_slots = ranked.shape[-1] - 1
    k = np.arange(1, num_slots + 1, dtype=np.float32)
    run = (reward[0] * sums[..., 1:] - ((reward[0] - reward[level])[:, None]) * ranked[..., :1]) / (
        minutes[level][:, None] + (k - 1) * minutes[0]
    )
    top_rate = reward[0] / minutes[0]

    def by_group(values: FloatArray, group: IntArray, size: int) -> FloatArray:
        return belief._sum(values, group, size).take(np.take_along_axis(group, patch, 1))

    num_squares = layout.square_grid.shape[1]
    num_visited = believed.num_visited.sum(-1)
    predicted = np.where(visited, _marginal(layout, effects), 0).sum(-1)
    surprise = (believed.num_low.sum(-1) - predicted) / np.maximum(num_visited, 10)
    columns = [
        level == 0,
        level == 1,
        level == 2,
        level == 3,
        np.maximum(advantage, -10),
        p_target,
        *(ranked[..., min(i, num_slots)] for i in (0, 1, 4, 9)),
        gain,
        run.max(-1) / top_rate,
        (price / top_rate)[:, None],
        np.clip(surplus_patch, -5, None) / 5,
        np.clip(surplus_group, -5, None) / 20,
        behind / 20,
        (ranked > 0).sum(-1) / 25,
        value.num_worth[col, patch] / 25,
        believed.shift[col, patch],
        believed.num_visited[col, patch] / 25,
        believed.num_low[col, patch] / 25,
        by_group(believed.num_visited, layout.square_of_patch, num_squares) / 150,
        by_group(believed.num_low, layout.square_of_patch, num_squares) / 150,
        by_group(believed.num_visited, layout.grid_of_patch, layout.num_grids) / 500,
        by_group(believed.num_low, layout.grid_of_patch, layout.num_grids) / 500,
        surprise[:, None],
        (minutes_left / 480)[:, None],
        (np.log1p(np.maximum(minutes_left, 0)) / np.log(481))[:, None],
        bound[:, None] / BOUND_SCALE,
    ]
    rows = np.empty((*patch.shape, NUM_FEATURES), np.float32)
    for index, column in enumerate(columns):
        rows[..., index] = column
    rows[~mask] = 0
    return rows, hole.astype(np.int32), mask


def run_from(
    stack: SessionStack,
    session: IntArray,
    visited: BoolArray,
    hole: IntArray,
    num_holes: IntArray,
) -> IntArray:
    """(E, R) int32 the holes of runs within a patch, -1 after the end of each.

    A run begins at ``hole`` (E,) and goes on with the most probable holes left in its patch, up to
    ``num_holes`` (E,) in all. Their order is that of the predictions, whatever is believed of the
    patch: one shift is common to all its holes.
    """
    row = np.arange(len(hole))
    slots = stack.slot_hole[session, stack.patch_id[session, hole]]
    is_open = (slots >= 0) & ~visited[row[:, None], slots] & (slots != hole[:, None])
    is_open &= is_open.cumsum(1) < num_holes[:, None]
    length = is_open.sum(1)
    run = np.full((len(hole), int(length.max()) + 1), -1, np.int32)
    run[:, 0] = hole
    episode, slot = np.nonzero(is_open)
    run[episode, 1 + (is_open.cumsum(1) - 1)[episode, slot]] = slots[episode, slot]
    return run


def num_in_run(rows: FloatArray, minutes_left: FloatArray, config: NavigationConfig) -> IntArray:
    """(E,) holes worth their minutes after moves whose rows are (E, F), as far as time goes."""
    num_worth = np.rint(rows[:, _NUM_WORTH_COLUMN] * 25).astype(int)
    level = rows[:, :4].argmax(1)
    left = np.maximum(minutes_left, config.minutes[0])
    most = belief.num_in_time(left, config)[level, np.arange(len(level))]
    return np.clip(num_worth, 1, most)


def _marginal(layout: Layout, effects: RandomEffects) -> FloatArray:
    """(E, N) predicted P(low) before anything was measured."""
    scale = np.float32(1 / np.sqrt(1 + np.pi / 8 * effects.variance))
    return 1 / (1 + np.exp(-layout.hole_base * scale))


def _is_first(patch: IntArray, mask: BoolArray) -> BoolArray:
    """(E, C) True where no earlier allowed candidate leads to the same patch."""
    same = (patch[:, :, None] == patch[:, None, :]) & mask[:, None, :]
    earlier = np.tril(np.ones((patch.shape[1],) * 2, bool), -1)
    return ~(same & earlier).any(-1)
