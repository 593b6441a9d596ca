"""The exact optimum of a session whose values are known: a knapsack on the tree of groups.

The minutes and the reward factor of a move depend only on the highest level that changes, so the
best tour is a choice of how many holes to take in which patch, not of an order among thousands:
take the best k holes of a patch, and let the least of them pay the toll of the way in. A dynamic
programme walks over the patches once and carries, for every minute, the best value so far in each
of a few *states*: what of the current grid and square is settled, and where the last move goes.

**Contiguity.** Two runs of one group can be joined without loss in minutes or reward, unless the
one holds the tour's first holes (the start, or who paid for coming from afar) and the other its
last. **The last move** is free: it may overshoot the budget by any amount. So its hole h is chosen
apart, in one of these ways, each a row of states below:

- in the patch of the hole before it, which is the last patch of its square (level 0);
- in a fresh patch of the last square (level 1), of the last grid (level 2), of any grid (level 3).

A group can come last if it is not the first of its parent's run, or the only one in it. The
start's grid is first; to make it last another grid level toll is paid, by some hole of a square
that was not visited before ("second run"). No other return pays where

    2 m_patch <= m_square + m_hole   and   m_patch + m_square <= m_grid + m_hole

(``is_exact_for``; true of ``paper`` and ``cryorl``): to put h into the earlier run costs no more
minutes than the toll of the return, and the hole visited before h becomes the free one. Elsewhere
(``leginon-2021`` misses both) the result is the best tour of this form. It is short of the optimum
by at most (r_hole - r_grid) times the largest value, whatever the size of the session: join the
runs, which saves minutes, and reach h at grid level. ``tests/test_knapsack.py`` compares with every
possible tour of small sessions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from math import gcd, isqrt, lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from envs.cryoem.rewards import switch_level, visit_value
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, NavigationConfig

# Rows of the state matrix (num_rows, minutes + 1). A trailing 0 or 1: the last hole is not yet, is
# chosen. Entries are the best value within so many minutes; -inf where there is no such tour.
# Between grids, and between squares of one grid:
#   o  nothing visited: zero for ever
#   n  this grid has no run (the start's grid: no second run)
#   p  its run has squares, but the first square is still to come
#   q  its run has its first square; or it is the start's grid and the only one
# Within a square (second letter: the grid's row outside it), its run's first patch
#   a  is still to come, b  was entered at square level, c  at grid level (the grid's first square)
#   ha, hb  the same, and the last hole lies in this square, which comes last
#   za, zc, zha, zhc  the same, this square being the only one of its grid's run, and the last
#   s  the start's square is the only one visited
_ROWS: tuple[str, ...] = (
    *("o", "n0", "n1", "p0", "p1", "q0", "q1"),
    *("an0", "an1", "bn0", "bn1", "ap0", "ap1", "bp0", "bp1", "aq0", "aq1", "bq0", "bq1"),
    *("c0", "c1", "hap", "hbp", "haq", "hbq", "za", "zc", "zha", "zhc", "s0", "s1"),
)
_ROW = {name: row for row, name in enumerate(_ROWS)}


class _Move(NamedTuple):
    """Transitions that a patch (or the border of a group) offers, all at once."""

    label: str
    src: IntArray
    dst: IntArray
    times: Sequence[int]
    """Minutes (in units) of taking 1, 2, ... holes."""
    gains: Sequence[float]


class _Step(NamedTuple):
    """One step of the programme: ``keep`` rows stay, ``moves`` are offered."""

    patch: int
    """-1 at the border of a group."""
    keep: BoolArray
    moves: tuple[_Move, ...]


def _pairs(text: str) -> tuple[IntArray, IntArray]:
    """Rows of ``"a>b c>d e"``; a single name goes to itself."""
    words = [word.partition(">") for word in text.split()]
    src = np.array([_ROW[a] for a, _, _ in words])
    return src, np.array([_ROW[b or a] for a, _, b in words])


def _border(pairs: Sequence[str], dropped: str = "") -> _Step:
    """A step without a patch: copies rows (the better one stays), forgets ``dropped`` ones."""
    keep = np.ones(len(_ROWS), bool)
    keep[[_ROW[name] for name in dropped.split()]] = False
    return _Step(-1, keep, tuple(_Move("", *_pairs(p), (0,), (0.0,)) for p in pairs))


_IN_SQUARE = " ".join(_ROWS[_ROW["an0"] : _ROW["s0"]])
_OPEN_GRID = _border(["n0>p0 n1>p1"], dropped="p0 p1 q0 q1")
_CLOSE_GRID = _border(["q0>n0 q1>n1"], dropped="p0 p1 q0 q1")
_OPEN_SQUARE = _border(["p0>ap0 p1>ap1 q0>aq0 q1>aq1 n0>za"], dropped=_IN_SQUARE)
_CLOSE_SQUARE = _border(
    ["bp0>p0 bp1>p1 bq0>q0 bq1>q1 bn0>n0 bn1>n1", "c0>q0 c1>q1 hbp>p1 zhc>n1", "hbq>q1"],
    dropped=_IN_SQUARE,
)
# In the start's grid more squares may be added to the first run (an, bn).
_OPEN_START_GRID = _border(["n0>p0 n1>p1 o>q0"], dropped="p0 p1 q0 q1")
_OPEN_SIBLING = _border(["p0>ap0 p1>ap1 q0>aq0 q1>aq1 n0>za", "n0>an0 n1>an1"], dropped=_IN_SQUARE)
_OPEN_START_SQUARE = _border(["o>s0"], dropped="p0 p1 s0 s1")

# What a patch offers, by where it lies. ``A``: k holes, entered at that level. ``T``: entered at
# that level, k - 1 holes, then the last one free of minutes (k = 1: the last move is the way in).
# ``J``: only the last move, at that level, though other patches of the group are visited.
_PATCH = {
    "A1": "an0 an1 bn0 bn1 ap0 ap1 bp0 bp1 aq0 aq1 bq0 bq1 c0 c1 hap hbp haq hbq za zc zha zhc",
    "A2": "an0>bn0 an1>bn1 ap0>bp0 ap1>bp1 aq0>bq0 aq1>bq1 hap>hbp haq>hbq",
    "A3": "ap0>c0 ap1>c1 za>zc zha>zhc",
    "T1": "ap0>hap bp0>hbp aq0>haq bq0>hbq za>zha zc>zhc",
    "T2": "p0>p1 q0>q1",
    "T3": "n0>n1",
    "J2": "ap0>ap1 bp0>bp1 aq0>aq1 bq0>bq1 c0>c1",
    "J3": "an0>an1 bn0>bn1",
}
_PATCH_OF_START_SQUARE = {
    "A1": "n0 n1 q0 q1 s0 s1",
    "T1": "s0>s1",
    "J2": "q0>q1",
    "J3": "n0>n1",
}
_START_PATCH = {"A0": "n0 n1 q0 q1 s0 s1", "T0": "o>s1"}
_FINAL = [_ROW[name] for name in ("o", "n0", "n1", "q0", "q1", "s0", "s1")]
_RULES = {
    name: {label: _pairs(text) for label, text in rules.items()}
    for name, rules in (
        ("patch", _PATCH),
        ("sibling", _PATCH_OF_START_SQUARE),
        ("start", _START_PATCH),
    )
}


def is_exact_for(config: NavigationConfig) -> bool:
    """Whether the result is proven to be the optimum over all tours (see the module's text)."""
    hole, patch, square, grid = config.minutes
    return 2 * patch <= square + hole + 1e-9 and patch + square <= grid + hole + 1e-9


def tour_value(
    table: HoleTable,
    value: ArrayLike,
    config: NavigationConfig,
    start_hole: int,
    visit_order: Sequence[int] | IntArray,
) -> tuple[float, FloatArray]:
    """The return of a tour by the environment's rules, and (M,) minutes after each move.

    Args:
        table: N holes.
        value: (N,) what each hole is worth at reward factor 1.
        config: minutes and rewards.
        start_hole: row of the hole where the session begins.
        visit_order: (M,) rows.
    """
    tour = np.r_[start_hole, np.asarray(visit_order, np.int64)]
    levels = switch_level(
        *(
            (ids[tour[:-1]], ids[tour[1:]])
            for ids in (table.grid_id, table.square_id, table.patch_id)
        )
    )
    gains = np.asarray(config.reward)[levels] * np.asarray(value, np.float64)[tour[1:]]
    return float(gains.sum()), np.cumsum(np.asarray(config.minutes)[levels])


def best_tour(
    table: HoleTable,
    value: ArrayLike,
    config: NavigationConfig,
    start_hole: int,
    budget_min: float | None = None,
) -> tuple[IntArray, float]:
    """The tour of largest return from one hole.

    Args:
        table: N holes.
        value: (N,) >= 0, what each hole is worth: 0 and 1 for known labels (the oracle),
            probabilities for the open-loop plan.
        config: minutes and rewards.
        start_hole: row of the hole where the session begins; it earns nothing.
        budget_min: minutes, the config's by default.

    Returns:
        (M,) int64 rows in the order of the visits, and the return. Within a patch, where the order
        is free, the best come first; among groups, those of the best mean value.

    Raises:
        ValueError: a value that is negative or not finite; minutes that fall or rewards that rise
            with the level; a start hole that is not a row.
    """
    problem = _Problem(table, value, config, budget_min)
    steps = list(problem.steps(problem.start(start_hole)))
    decisions, total = _trace(steps, problem.initial())
    order = _order(table, problem, decisions, start_hole)
    return order, total


def optimum(
    table: HoleTable,
    config: NavigationConfig,
    start_holes: Sequence[int] | IntArray,
    *,
    value: ArrayLike | None = None,
    budget_min: float | None = None,
) -> FloatArray:
    """(E,) the largest return from each start hole; the work is shared between starts.

    Args:
        table: N holes.
        config: minutes, rewards, and the threshold if ``value`` is left out.
        start_holes: (E,) rows.
        value: (N,) >= 0; by default ``rewards.visit_value``, the truth where labelled. A penalty
            for high-CTF holes (``high_ctf_penalty``) is left out: then this is an upper bound.
        budget_min: minutes, the config's by default.

    Raises:
        ValueError: as ``best_tour``.
    """
    if value is None:
        value = visit_value(table, config)
    problem = _Problem(table, value, config, budget_min)
    starts = [problem.start(int(hole)) for hole in start_holes]
    grids, squares, patches = ({start[: i + 1] for start in starts} for i in range(3))
    results = {}
    blocks = {g: problem.grid_steps(g) for g in range(len(table.grid_name))}
    for g, at_grid in _leave_one_out(problem.initial(), blocks, {g for (g,) in grids}):
        at_grid = _advance(at_grid, _OPEN_START_GRID)
        blocks_s = {s: problem.square_steps(s, _OPEN_SIBLING) for s in problem.squares[g]}
        for s, at_square in _leave_one_out(at_grid, blocks_s, {s for g_, s in squares if g_ == g}):
            at_square = _advance(at_square, _OPEN_START_SQUARE)
            blocks_p = {p: [problem.patch_step(p, "sibling")] for p in problem.patches[s]}
            for p, at_patch in _leave_one_out(
                at_square, blocks_p, {p for _, s_, p in patches if s_ == s}
            ):
                for start in {start for start in starts if start[2] == p}:
                    final = _advance(at_patch, problem.patch_step(p, "start", start[3]))
                    results[start] = float(final[_FINAL, -1].max())
    return np.array([results[start] for start in starts], np.float64)


class _Problem:
    """A session in the programme's terms: integer minutes, and the steps of each group."""

    def __init__(
        self,
        table: HoleTable,
        value: ArrayLike,
        config: NavigationConfig,
        budget_min: float | None,
    ) -> None:
        self.table, self.reward = table, config.reward
        self.value = np.asarray(value, np.float64)
        if self.value.shape != (len(table),):
            raise ValueError(f"value: shape {self.value.shape}, expected ({len(table)},)")
        if (wrong := np.flatnonzero(~((self.value >= 0) & np.isfinite(self.value)))).size:
            raise ValueError(f"value: row {wrong[0]} is {self.value[wrong[0]]}, expected >= 0")
        if list(config.minutes) != sorted(config.minutes):
            raise ValueError(f"minutes must not fall with the level, found {config.minutes}")
        if list(config.reward) != sorted(config.reward, reverse=True) or config.reward[-1] < 0:
            raise ValueError(f"rewards must fall with the level to >= 0, found {config.reward}")
        budget_min = config.budget_min if budget_min is None else budget_min
        self.cost, self.horizon = _integer_minutes(config.minutes, budget_min)
        # No tour takes longer than a visit of everything, with a second run of the start's grid.
        groups = (len(table), len(table.patch_name), len(table.square_name))
        num_moves = (*groups, len(table.grid_name) + 1)
        self.horizon = min(self.horizon, int(np.dot(self.cost, num_moves)))
        by_value = np.lexsort((np.arange(len(table)), -self.value))
        by_patch = by_value[np.argsort(table.patch_id[by_value], kind="stable")]
        self.holes = np.split(by_patch, np.cumsum(np.bincount(table.patch_id))[:-1])
        self.patches = _children(table.patch_square, len(table.square_name))
        self.squares = _children(table.square_grid, len(table.grid_name))

    def initial(self) -> FloatArray:
        """(num_rows, horizon + 1): nothing visited, no minute used."""
        state = np.full((len(_ROWS), self.horizon + 1), -np.inf)
        state[[_ROW["o"], _ROW["n0"]]] = 0.0
        return state

    def start(self, hole: int) -> tuple[int, int, int, int]:
        """Grid, square, patch and row of the start hole."""
        table = self.table
        if not 0 <= hole < len(table):
            raise ValueError(f"start_hole: {hole} is not a row of {len(table)} holes")
        parents = (table.grid_id[hole], table.square_id[hole], table.patch_id[hole])
        return int(parents[0]), int(parents[1]), int(parents[2]), hole

    def steps(self, start: tuple[int, int, int, int]) -> Iterator[_Step]:
        """The whole programme for one start."""
        grid, square, patch, hole = start
        for g in range(len(self.squares)):
            if g != grid:
                yield from self.grid_steps(g)
        yield _OPEN_START_GRID
        for s in self.squares[grid]:
            if s != square:
                yield from self.square_steps(s, _OPEN_SIBLING)
        yield _OPEN_START_SQUARE
        for p in self.patches[square]:
            if p != patch:
                yield self.patch_step(p, "sibling")
        yield self.patch_step(patch, "start", hole)

    def grid_steps(self, grid: int) -> list[_Step]:
        inside = [step for s in self.squares[grid] for step in self.square_steps(s, _OPEN_SQUARE)]
        return [_OPEN_GRID, *inside, _CLOSE_GRID]

    def square_steps(self, square: int, opening: _Step) -> list[_Step]:
        inside = [self.patch_step(p, "patch") for p in self.patches[square]]
        return [opening, *inside, _CLOSE_SQUARE]

    def chosen(self, patch: int, without: int = -1) -> IntArray:
        """The patch's holes that can matter, best first; of the worthless ones one, for a toll."""
        holes = self.holes[patch]
        holes = holes[holes != without]
        return holes[: int((self.value[holes] > 0).sum()) + 1]

    def patch_step(self, patch: int, rules: str, without: int = -1) -> _Step:
        """What a patch offers: minutes and value of taking its best k holes, by level of entry."""
        v = self.value[self.chosen(patch, without)]
        rest = np.r_[0.0, np.cumsum(v)][:-1] * self.reward[0]  # of the better k - 1
        moves = []
        for label, (src, dst) in _RULES[rules].items():
            kind, level = label[0], int(label[1])
            times = self.cost[level] + self.cost[0] * np.arange(len(v))
            gains = rest + self.reward[level] * v
            if kind == "T":
                times = np.r_[0, times][:-1]
            elif kind == "J":
                times, gains = times[:1] * 0, gains[:1]
            moves.append(_Move(label, src, dst, times.tolist(), gains.tolist()))
        return _Step(patch, np.ones(len(_ROWS), bool), tuple(moves))


def _integer_minutes(minutes: Sequence[float], budget_min: float) -> tuple[list[int], int]:
    """Minutes as integers of the largest unit that holds them all, and the budget in that unit.

    Exact where each is a multiple of 1/n minute, n up to 3600 (seconds and their sixtieths);
    other values are rounded to the nearest.
    """
    exact = [Fraction(m).limit_denominator(3600) for m in minutes]
    scale = lcm(*(m.denominator for m in exact))
    cost = [int(m * scale) for m in exact] if scale <= 3600 else [round(m * 60) for m in minutes]
    scale = scale if scale <= 3600 else 60
    unit = gcd(*cost)
    return [c // unit for c in cost], int(np.floor(budget_min * scale / unit + 1e-6))


def _children(parent: IntArray, num_parents: int) -> list[list[int]]:
    """The children of each parent."""
    children: list[list[int]] = [[] for _ in range(num_parents)]
    for child, p in enumerate(parent.tolist()):
        children[p].append(child)
    return children


def _advance(state: FloatArray, step: _Step) -> FloatArray:
    """(num_rows, T + 1) after a step: for each row the best of staying and of all moves into it."""
    width = state.shape[1]
    out = state.copy()
    out[~step.keep] = -np.inf
    for move in step.moves:
        source = state[move.src]
        best = out[move.dst]
        for time, gain in zip(move.times, move.gains, strict=True):
            if time >= width:
                break
            np.maximum(best[:, time:], source[:, : width - time] + gain, out=best[:, time:])
        out[move.dst] = best
    return out


def _leave_one_out(
    state: FloatArray, blocks: dict[int, list[_Step]], wanted: Iterable[int]
) -> Iterator[tuple[int, FloatArray]]:
    """For each wanted block, the state after all the other blocks; halves share their work."""
    wanted = set(wanted)
    if len(blocks) == 1:
        yield next(iter(blocks)), state
        return
    keys = list(blocks)
    for inside, outside in (
        (keys[: len(keys) // 2], keys[len(keys) // 2 :]),
        (keys[len(keys) // 2 :], keys[: len(keys) // 2]),
    ):
        if wanted.intersection(inside):
            after = state
            for key in outside:
                for step in blocks[key]:
                    after = _advance(after, step)
            yield from _leave_one_out(
                after, {key: blocks[key] for key in inside}, wanted.intersection(inside)
            )


class _Decision(NamedTuple):
    """What the optimum does with a patch."""

    patch: int
    label: str
    num_holes: int


def _trace(steps: list[_Step], state: FloatArray) -> tuple[list[_Decision], float]:
    """Runs the programme, and reads the decisions of the best end backwards.

    States are kept at every sqrt(steps)-th step and made again in between: memory for long
    budgets in fine units.
    """
    stride = isqrt(len(steps)) + 1
    marks = []
    for i, step in enumerate(steps):
        if i % stride == 0:
            marks.append(state)
        state = _advance(state, step)
    row = _FINAL[int(state[_FINAL, -1].argmax())]
    time, total = state.shape[1] - 1, float(state[row, -1])
    decisions = []
    for mark in reversed(range(len(marks))):
        states = [marks[mark]]
        segment = steps[mark * stride : (mark + 1) * stride]
        for step in segment:
            states.append(_advance(states[-1], step))
        for before, after, step in zip(states[-2::-1], states[:0:-1], segment[::-1], strict=True):
            row, time, decision = _step_back(before, step, row, time, float(after[row, time]))
            if decision is not None:
                decisions.append(decision)
    return decisions, total


def _step_back(
    before: FloatArray, step: _Step, row: int, time: int, target: float
) -> tuple[int, int, _Decision | None]:
    """The row and time from which ``target`` came, and what the patch was used for."""
    if step.keep[row] and before[row, time] == target:
        return row, time, None
    for move in step.moves:
        for src in move.src[move.dst == row]:
            for k, (spent, gain) in enumerate(zip(move.times, move.gains, strict=True)):
                if spent <= time and before[src, time - spent] + gain == target:
                    used = None if step.patch < 0 else _Decision(step.patch, move.label, k + 1)
                    return int(src), time - spent, used
    raise AssertionError("knapsack: a value without an origin; this is a bug")


def _order(
    table: HoleTable, problem: _Problem, decisions: list[_Decision], start_hole: int
) -> IntArray:
    """The visits in order: first groups first, the last hole last, free choices best first."""
    grid, square, patch, _ = problem.start(start_hole)
    patch_square, square_grid = table.patch_square.tolist(), table.square_grid.tolist()
    pieces: dict[int, IntArray] = {}
    first_patches, first_squares = {patch}, {square}  # the beginning of a run lies there
    last_hole: list[int] = []
    last_patch = last_square = last_grid = -1
    for p, label, num_holes in decisions:
        kind, level = label[0], int(label[1])
        holes = problem.chosen(p, start_hole)[:num_holes]
        if level > 0:  # the least hole pays the way in
            holes = np.roll(holes, 1)
        if kind in "TJ":
            last_hole, holes = [int(holes[-1])], holes[:-1]
            level_of_last = 0 if len(holes) else level
            last_patch = p if level_of_last == 0 else -1
            last_square = patch_square[p] if level_of_last <= 1 else -1
            last_grid = square_grid[patch_square[p]] if level_of_last <= 2 else -1
        if len(holes):
            pieces[p] = holes
            if level >= 2:
                first_patches.add(p)
            if level == 3:
                first_squares.add(patch_square[p])
    # The start's grid has a second run where one of its squares was entered from another grid.
    second_run = first_squares & set(problem.squares[grid]) - {square}
    if second_run:
        second_run.add(last_square)
    mean = [
        (np.bincount(ids, problem.value) / np.bincount(ids)).tolist()
        for ids in (table.grid_id, table.square_id, table.patch_id)
    ]

    def key(p: int) -> tuple[float, ...]:
        s = patch_square[p]
        g = square_grid[s]
        run = 0 if g == grid and s not in second_run else 2 if g in (grid, last_grid) else 1
        square_place = 0 if s in first_squares else 2 if s == last_square else 1
        patch_place = 0 if p in first_patches else 2 if p == last_patch else 1
        return (
            *(run, -mean[0][g], g),
            *(square_place, -mean[1][s], s),
            *(patch_place, -mean[2][p], p),
        )

    tour = [pieces[p] for p in sorted(pieces, key=key)]
    return np.concatenate([*tour, last_hole]).astype(np.int64)
