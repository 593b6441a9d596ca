"""What is believed of the holes that are left, and what going there is worth at a price per minute.

Model (calibration.py): logit P(low) = base + u_grid + u_square + u_patch, u ~ N(0, sd²). Outcomes
of visited holes move the u's; a Lagrange multiplier ``price`` (reward per minute) turns the tree
knapsack into sums over patches, squares and grids (Everett 1963, relaxation of a knapsack).
Pure functions over E episodes at once. Shape letters as in ``stack``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from envs.cryoem.stack import SessionStack
from envs.cryoem.types import BoolArray, FloatArray, IntArray, NavigationConfig, RandomEffects

_NEWTON_STEPS = 25  # at most: three or four in a usual session, about one a logit of surprise
_CONVERGED = 1e-3  # logits: the step that is shorter squares the error to below 1e-6
_ROUNDING = np.float32(1e-4)  # of minutes that are sums of float32, in moves
_NO_WAY = np.array([-np.inf, 0], np.float32)  # to add: -inf where a mask is False
_BISECTIONS = 14  # price to 1e-4 of its range


def base_logit(p_low_ctf: FloatArray, effects: RandomEffects) -> FloatArray:
    """The part of the logit that is fixed, so that the mean over u is p (probit approximation)."""
    p = np.clip(p_low_ctf, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p)) * np.sqrt(1 + np.pi / 8 * effects.variance).astype(p.dtype)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where E episodes play: rows of a stack gathered once, with what the sums over groups need."""

    slot_hole: IntArray
    """(E, P, K); -1 = padding."""
    base: FloatArray
    """(E, P, K) base logit, 0 in padding."""
    hole_patch: IntArray
    """(E, N); padding 0."""
    hole_base: FloatArray
    """(E, N)"""
    outcome: FloatArray
    """(E, N); read it only where visited."""
    patch_square: IntArray
    """(E, P)"""
    patch_grid: IntArray
    """(E, P)"""
    square_grid: IntArray
    """(E, S)"""
    num_grids: int

    @cached_property
    def square_of_patch(self) -> IntArray:
        """(E, P) flat index into (E, S) values, for ``take``."""
        return _flat(self.patch_square, self.square_grid.shape[1])

    @cached_property
    def grid_of_patch(self) -> IntArray:
        """(E, P) flat index into (E, G) values."""
        return _flat(self.patch_grid, self.num_grids)

    @cached_property
    def grid_of_square(self) -> IntArray:
        """(E, S) flat index into (E, G) values."""
        return _flat(self.square_grid, self.num_grids)

    @cached_property
    def hole_of_slot(self) -> IntArray:
        """(E, P, K) flat index into (E, N) values; padding leads to hole 0."""
        num_episodes, num_holes = self.hole_patch.shape
        episode = np.arange(num_episodes)[:, None, None]
        return np.maximum(self.slot_hole, 0) + episode * num_holes

    @classmethod
    def of(cls, stack: SessionStack, session: IntArray, effects: RandomEffects) -> Layout:
        """Gathers the sessions (E,) of the episodes."""
        slot_hole = stack.slot_hole[session]
        p = stack.p_low_ctf[session]
        hole_base = base_logit(p, effects)
        episode = np.arange(len(session))[:, None, None]
        square_grid = stack.square_grid[session]
        patch_square = stack.patch_square[session]
        return cls(
            slot_hole=slot_hole,
            base=np.where(slot_hole >= 0, hole_base[episode, slot_hole], np.float32(0)),
            hole_patch=np.maximum(stack.patch_id[session], 0),
            hole_base=hole_base,
            outcome=stack.outcome[session],
            patch_square=patch_square,
            patch_grid=np.take_along_axis(square_grid, patch_square, 1),
            square_grid=square_grid,
            num_grids=stack.num_grids,
        )


@dataclass(frozen=True, eq=False)
class Belief:
    """P(low) of every hole that is left, given the outcomes so far."""

    p: FloatArray
    """(E, P, K) float32, in the order of ``slot_hole``; 0 where visited or padding."""
    is_left: BoolArray
    """(E, P, K)"""
    shift: FloatArray
    """(E, P) posterior mean of u_grid + u_square + u_patch, logits."""
    variance: FloatArray
    """(E, P) its posterior variance."""
    num_visited: FloatArray
    """(E, P)"""
    num_low: FloatArray
    """(E, P) sum of the outcomes of the visited holes."""


def _flat(index: IntArray, size: int) -> IntArray:
    """(E, M) indices into (E, size) values flattened, from indices (E, M) within each episode."""
    return index + np.arange(len(index))[:, None] * size


def _sum(values: FloatArray, flat: IntArray, size: int) -> FloatArray:
    """(E, size) sums of values (E, M) over groups ``flat`` (E, M)."""
    out = np.bincount(flat.ravel(), values.ravel(), len(flat) * size)
    return out.reshape(len(flat), size).astype(np.float32)


def _max(values: FloatArray, flat: IntArray, size: int) -> FloatArray:
    """(E, size) maxima of values (E, M) over groups ``flat``; -inf where a group is empty."""
    out = np.full(len(flat) * size, -np.inf, np.float32)
    np.maximum.at(out, flat.ravel(), values.ravel())
    return out.reshape(len(flat), size)


def believe(
    layout: Layout, visited: BoolArray, effects: RandomEffects, *, is_adaptive: bool = True
) -> Belief:
    """Belief after the visits (E, N); ``is_adaptive=False`` ignores their outcomes.

    The posterior mode of all u by Newton's method, exact at each step because the groups are nested
    (patches are eliminated into squares, squares into grids); variances from the same elimination
    (Laplace).
    """
    num_episodes, num_patches, _ = layout.slot_hole.shape
    num_squares, num_grids = layout.square_grid.shape[1], layout.num_grids
    episode, hole = np.nonzero(visited)
    patch = layout.hole_patch[episode, hole] + episode * num_patches
    y = layout.outcome[episode, hole]
    base = layout.hole_base[episode, hole]
    size = num_episodes * num_patches

    def by_patch(values: FloatArray | None) -> FloatArray:
        sums = np.bincount(patch, values, size).astype(np.float64)
        return sums.reshape(num_episodes, num_patches)

    num_visited = by_patch(None)
    num_low = by_patch(y)
    square_index, grid_index = layout.square_of_patch, layout.grid_of_square
    tau_g, tau_s, tau_p = (
        1 / max(sd, 1e-6) ** 2 for sd in (effects.sd_grid, effects.sd_square, effects.sd_patch)
    )
    u_g = np.zeros((num_episodes, num_grids))
    u_s = np.zeros((num_episodes, num_squares))
    u_p = np.zeros((num_episodes, num_patches))

    def up(values_g: FloatArray, values_s: FloatArray) -> FloatArray:
        """(E, P) sum of a grid's and a square's value, brought to patches."""
        return values_g.take(layout.grid_of_patch) + values_s.take(square_index)

    def likelihood() -> tuple[FloatArray, FloatArray]:
        """(E, P) gradient and curvature of the outcomes at the present u."""
        q = 1 / (1 + np.exp(-(base + (up(u_g, u_s) + u_p).ravel()[patch])))
        return by_patch(y - q), by_patch(q * (1 - q))

    def eliminate(w_p: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Schur complements of the nested Hessian: shares kept (E, P), (E, S), weights below."""
        keep_p = tau_p / (tau_p + w_p)
        w_s = _sum(w_p * keep_p, square_index, num_squares)
        keep_s = tau_s / (tau_s + w_s)
        return keep_p, keep_s, w_s, _sum(w_s * keep_s, grid_index, num_grids)

    is_moving = np.full((num_episodes, 1), is_adaptive)
    for _ in range(_NEWTON_STEPS):
        if not is_moving.any():
            break
        g_p, w_p = likelihood()
        keep_p, keep_s, w_s, w_g = eliminate(w_p)
        g_s = _sum(g_p - (1 - keep_p) * (g_p - tau_p * u_p), square_index, num_squares)
        g_g = _sum(g_s - (1 - keep_s) * (g_s - tau_s * u_s), grid_index, num_grids)
        d_g = (g_g - tau_g * u_g) / (tau_g + w_g)
        d_s = (g_s - tau_s * u_s - w_s * d_g.take(grid_index)) / (tau_s + w_s)
        d_p = (g_p - tau_p * u_p - w_p * up(d_g, d_s)) / (tau_p + w_p)
        # A step of at most a logit always gains (curvatures change by at most a factor e: Bach
        # 2010, Electron. J. Stat. 4); without the limit, 20 surprises in a row send u to and fro.
        longest = np.abs(up(d_g, d_s) + d_p).max(1, keepdims=True)
        step = is_moving / np.maximum(longest, 1)
        u_g, u_s, u_p = u_g + step * d_g, u_s + step * d_s, u_p + step * d_p
        is_moving &= longest > _CONVERGED

    w_p = likelihood()[1] if is_adaptive else np.zeros_like(u_p)
    keep_p, keep_s, w_s, w_g = eliminate(w_p)
    var_g = 1 / (tau_g + w_g)
    var_s = 1 / (tau_s + w_s) + keep_s**2 * var_g.take(grid_index)
    variance = 1 / (tau_p + w_p) + keep_p**2 * var_s.take(square_index)
    shift = up(u_g, u_s) + u_p
    scale = 1 / np.sqrt(1 + np.pi / 8 * variance)
    is_left = (layout.slot_hole >= 0) & ~visited.take(layout.hole_of_slot)
    p = layout.base + shift[..., None].astype(np.float32)
    p *= -scale[..., None].astype(np.float32)
    np.exp(p, out=p)
    p += 1
    np.divide(is_left, p, out=p)
    return Belief(
        p=p,
        is_left=is_left,
        shift=shift.astype(np.float32),
        variance=variance.astype(np.float32),
        num_visited=num_visited.astype(np.float32),
        num_low=num_low.astype(np.float32),
    )


@dataclass(frozen=True, eq=False)
class Sorted:
    """The holes left of each patch, best first, with running sums; rank leads: it sums fast."""

    p: FloatArray
    """(K + 1, E, P); 0 past the last hole left."""
    sum_p: FloatArray
    """(K + 1, E, P) sum of the first k."""

    @classmethod
    def of(cls, belief: Belief) -> Sorted:
        """Sorts once; every price then costs a count and three look-ups a patch."""
        num_episodes, num_patches, num_slots = belief.p.shape
        p = np.empty((num_slots + 1, num_episodes, num_patches), np.float32)
        sum_p = np.empty_like(p)
        p[-1], sum_p[0] = 0, 0
        p[:-1] = np.moveaxis(np.sort(belief.p, axis=-1)[..., ::-1], -1, 0)
        np.cumsum(p[:-1], 0, out=sum_p[1:])
        return cls(p=p, sum_p=sum_p)

    @cached_property
    def is_empty(self) -> BoolArray:
        """(E, P) True where nothing is left."""
        return self.p[0] <= 0

    @cached_property
    def no_way(self) -> FloatArray:
        """(E, P) -inf where nothing is left, else 0: to be added."""
        return _NO_WAY[(~self.is_empty).view(np.uint8)]

    @cached_property
    def first(self) -> IntArray:
        """(E, P) flat indices of the first rank."""
        return np.arange(self.p[0].size).reshape(self.p[0].shape)

    def at(self, rank: IntArray) -> IntArray:
        """(E, P) flat indices of a rank (E, P), for ``take``."""
        return rank * rank.size + self.first

    def num_above(self, p: FloatArray) -> IntArray:
        """(E, P) int32 how many holes left are more probable than p (E, P) or (E, 1)."""
        is_above = self.p > p
        # Counted in bytes: half the time.
        count = np.uint8 if len(is_above) < 256 else np.int32
        return is_above.view(np.uint8).sum(0, dtype=count).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Worth:
    """Expected reward minus price x minutes of what is left, by patch (E, P), at each way in.

    ``patch[L]`` enters by a switch of level L (1 patch, 2 square, 3 grid) and then takes every hole
    worth its minutes, as far as the minutes left go; -inf where nothing is left. The switch pays a
    lower reward, so a patch is entered by the hole that loses least by it: the worst of those that
    are taken, or the best of those that are not worth their minutes.
    """

    stay: FloatArray
    """Surplus if one is there already."""
    patch: tuple[FloatArray, FloatArray, FloatArray, FloatArray]
    """By ``Switch``; [HOLE] is ``stay`` again."""
    entry: tuple[IntArray, IntArray, IntArray, IntArray]
    """Rank of the hole that comes first, by ``Switch``: 0 is the most probable."""
    num_worth: IntArray
    """Holes that are taken if one is there already."""
    minutes: FloatArray
    """Minutes of that patch's holes, entered from another patch of its square."""


def num_in_time(minutes_left: FloatArray, config: NavigationConfig) -> IntArray:
    """(4, ...) most holes that fit the minutes left (...), by the ``Switch`` of the first move.

    A move starts while minutes are left, or none too many are spent; the last one may overrun.
    """
    t = np.array(config.minutes, np.float32).reshape(-1, *[1] * np.ndim(minutes_left))
    after_first = np.floor((minutes_left - t) / t[0] + _ROUNDING) + 1
    return 1 + np.maximum(after_first, 0).astype(np.int32)


def worth(
    sorted_p: Sorted, price: FloatArray, config: NavigationConfig, minutes_left: FloatArray
) -> Worth:
    """Surpluses at a price (E, P) or (E, 1), reward per minute, with ``minutes_left`` (E, 1)."""
    t, r = np.array(config.minutes, np.float32), np.array(config.reward, np.float32)
    most = num_in_time(minutes_left, config)
    cost = price.astype(np.float32) * t[0]
    worth_it = sorted_p.num_above(cost / r[0])
    # Masks are added, as 0 or -inf: `where` costs several times as much.
    num, patch, entry = [worth_it] * 4, [], []
    is_time_for_all = most.min() >= len(sorted_p.p)  # then all ways in take the same holes
    inside, last, following, no_last, no_next = _around(sorted_p, worth_it, cost, r[0])
    for level in range(4):
        if not is_time_for_all:
            n = num[level] = np.minimum(worth_it, most[level])
            inside, last, following, no_last, no_next = _around(sorted_p, n, cost, r[0])
            no_next = _NO_WAY[((n < most[level]) & (no_next == 0)).view(np.uint8)]
        if level == 0:
            patch.append(inside)
            entry.append(np.zeros_like(worth_it))
            continue
        swap = (r[level] - r[0]) * last + cost + no_last
        add = r[level] * following + no_next
        surplus = inside + np.maximum(swap, add) - price * t[level]
        patch.append(surplus + sorted_p.no_way)
        entry.append(num[level] - (swap > add))
    minutes: FloatArray = t[1] + t[0] * np.maximum(num[1] - 1, 0).astype(np.float32)
    minutes *= ~sorted_p.is_empty
    return Worth(
        stay=patch[0], patch=tuple(patch), entry=tuple(entry), num_worth=num[0], minutes=minutes
    )


def _around(
    sorted_p: Sorted, num: IntArray, cost: FloatArray, reward: np.float32
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """(E, P) each: surplus of the first ``num``; p of the last of them and of the next one.

    Then, for the last and for the next, 0 where there is one and -inf where there is none.
    """
    index = sorted_p.at(num)
    inside = reward * sorted_p.sum_p.take(index) - num.astype(np.float32) * cost
    last = sorted_p.p.take(np.maximum(index - num.size, sorted_p.first))
    following = sorted_p.p.take(index)
    return (
        inside,
        last,
        following,
        _NO_WAY[(num > 0).view(np.uint8)],
        _NO_WAY[(following > 0).view(np.uint8)],
    )


@dataclass(frozen=True, eq=False)
class GroupWorth:
    """Worth of squares and grids: entered by their best patch, every patch worth entering taken."""

    square: tuple[FloatArray, FloatArray]
    """(E, S) entered by a switch of square, of grid; -inf where nothing is left."""
    grid: FloatArray
    """(E, G)"""
    square_minutes: FloatArray
    grid_minutes: FloatArray


def group_worth(layout: Layout, value: Worth, config: NavigationConfig) -> GroupWorth:
    """Sums patches into squares and squares into grids; the entry pays the higher switch."""
    t = config.minutes
    num_squares, num_grids = layout.square_grid.shape[1], layout.num_grids
    own = np.maximum(value.patch[1], 0)
    square, grid_of = layout.square_of_patch, layout.grid_of_square
    total = _sum(own, square, num_squares)
    entry_s = _max(value.patch[2] - own, square, num_squares)
    entry_g = _max(value.patch[3] - own, square, num_squares)
    minutes = _sum(value.minutes * (own > 0), square, num_squares) + (t[2] - t[1])
    square_s, square_g = total + entry_s, total + entry_g
    own_s = np.maximum(square_s, 0)
    grid = _sum(own_s, grid_of, num_grids) + _max(square_g - own_s, grid_of, num_grids)
    grid_minutes = _sum(minutes * (own_s > 0), grid_of, num_grids) + (t[3] - t[2])
    return GroupWorth(
        square=(square_s, square_g), grid=grid, square_minutes=minutes, grid_minutes=grid_minutes
    )


@dataclass(frozen=True, eq=False)
class Place:
    """Where the episodes stand: codes (E,) of the current patch, square and grid, as masks."""

    patch: IntArray
    square: IntArray
    grid: IntArray
    other_patch: BoolArray
    """(E, P) other patches of the current square."""
    other_square: BoolArray
    """(E, S) other squares of the current grid."""
    other_grid: BoolArray
    """(E, G)"""

    @classmethod
    def of(cls, layout: Layout, current: IntArray) -> Place:
        """From the current hole (E,)."""
        row = np.arange(len(current))
        patch = layout.hole_patch[row, current]
        square = layout.patch_square[row, patch]
        grid = layout.square_grid[row, square]
        num_patches, num_squares = layout.patch_square.shape[1], layout.square_grid.shape[1]
        return cls(
            patch=patch,
            square=square,
            grid=grid,
            other_patch=(layout.patch_square == square[:, None])
            & (np.arange(num_patches) != patch[:, None]),
            other_square=(layout.square_grid == grid[:, None])
            & (np.arange(num_squares) != square[:, None]),
            other_grid=np.arange(layout.num_grids) != grid[:, None],
        )


def price_of_time(
    layout: Layout,
    sorted_p: Sorted,
    place: Place,
    minutes_left: FloatArray,
    config: NavigationConfig,
) -> FloatArray:
    """(E,) reward per minute at which everything worth its minutes just fills the time left.

    Bisection; 0 where the time suffices for all that is left.
    """
    low = np.zeros(len(minutes_left), np.float32)
    high = np.full(len(minutes_left), config.reward[0] / min(config.minutes), np.float32)
    row = np.arange(len(minutes_left))
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        value = worth(sorted_p, price[:, None], config, minutes_left[:, None])
        groups = group_worth(layout, value, config)
        minutes = (
            value.num_worth[row, place.patch] * config.minutes[0]
            + (value.minutes * ((value.patch[1] > 0) & place.other_patch)).sum(-1)
            + (groups.square_minutes * ((groups.square[0] > 0) & place.other_square)).sum(-1)
            + (groups.grid_minutes * ((groups.grid > 0) & place.other_grid)).sum(-1)
        )
        is_too_cheap = minutes > minutes_left
        low, high = np.where(is_too_cheap, price, low), np.where(is_too_cheap, high, price)
    return (low + high) / 2
