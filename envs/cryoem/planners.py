"""Planners: what a user would pick instead of RL, all acting through the policy interface.

Each is a function from a ``Situation`` to the next hole of E episodes at once; shape letters as in
``stack``. ``make_planner`` knows them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from envs.cryoem import belief
from envs.cryoem.belief import Layout, Place, Sorted
from envs.cryoem.knapsack import best_tour
from envs.cryoem.rates import PRIOR_COLUMN, candidate_rows, num_in_run, run_from
from envs.cryoem.stack import Observation, Policy, SessionStack, unpack_visited
from envs.cryoem.types import (
    BoolArray,
    FloatArray,
    HoleTable,
    IntArray,
    NavigationConfig,
    RandomEffects,
)

_RATE_BISECTIONS = 14


@dataclass(frozen=True, eq=False)
class Situation:
    """What a planner may know of E episodes: the sessions' predictions and its own visits."""

    stack: SessionStack
    session: IntArray
    """(E,) row of the stack."""
    visited: BoolArray
    """(E, N)"""
    current: IntArray
    """(E,)"""
    minutes_left: FloatArray
    """(E,)"""
    config: NavigationConfig
    effects: RandomEffects
    layout: Layout
    rng: np.random.Generator

    @property
    def is_open(self) -> BoolArray:
        """(E, N) holes that may be visited."""
        exists = np.arange(self.visited.shape[1]) < self.stack.num_holes[self.session][:, None]
        return exists & ~self.visited


def random(now: Situation) -> IntArray:
    """Any unvisited hole, uniformly."""
    return np.where(now.is_open, now.rng.random(now.visited.shape), -1).argmax(1)


def predict_rank(now: Situation) -> IntArray:
    """The unvisited hole of the highest predicted probability, wherever it is."""
    return np.where(now.is_open, now.stack.p_low_ctf[now.session], -1).argmax(1)


def snowball(now: Situation) -> IntArray:
    """The best hole predicted low (p > 0.5) of the patch, else of the square, the grid, of all.

    Where nothing predicted low is left, the nearest hole of the highest probability (the heuristic
    that beats CryoRL's DQN on its own data).
    """
    place = Place.of(now.layout, now.current)
    parent = now.layout.hole_patch
    square = np.take_along_axis(now.layout.patch_square, parent, 1)
    grid = np.take_along_axis(now.layout.square_grid, square, 1)
    nearness = (
        (parent == place.patch[:, None]).astype(np.int8)
        + (square == place.square[:, None])
        + (grid == place.grid[:, None])
    )
    p = now.stack.p_low_ctf[now.session]
    score = 8 * (p > 0.5) + 2 * nearness + p
    return np.where(now.is_open, score, -1).argmax(1)


def rate_index(now: Situation, *, is_adaptive: bool = False) -> IntArray:
    """The move whose run earns the most per minute (Gittins-like index over stay and the switches).

    A group's rate is the price at which its surplus vanishes (Dinkelbach 1967): the best prefix of
    a patch's holes, with further patches merged while they raise the rate.
    """
    layout, config, row = now.layout, now.config, np.arange(len(now.current))
    believed = belief.believe(layout, now.visited, now.effects, is_adaptive=is_adaptive)
    sorted_p, place = Sorted.of(believed), Place.of(layout, now.current)
    highest = config.reward[0] / config.minutes[0]
    left = now.minutes_left[:, None]

    def solve(level: int) -> tuple[FloatArray, FloatArray, IntArray]:
        """(E, P) rate of the patch (1), its square (2) or grid (3), and its way in: worth, rank."""
        low = np.zeros(layout.patch_square.shape, np.float32)
        high = np.full_like(low, highest)
        for _ in range(_RATE_BISECTIONS):
            rate = (low + high) / 2
            value = belief.worth(sorted_p, rate, config, left)
            groups = belief.group_worth(layout, value, config)
            surplus = (
                value.patch[1],
                np.take_along_axis(groups.square[0], layout.patch_square, 1),
                np.take_along_axis(groups.grid, layout.patch_grid, 1),
            )[level - 1]
            is_too_cheap = surplus > 0
            low, high = np.where(is_too_cheap, rate, low), np.where(is_too_cheap, high, rate)
        value = belief.worth(sorted_p, low, config, left)
        has_holes = sorted_p.p[0] > 0
        way_in = value.patch[level] - np.maximum(value.patch[1], 0)
        return (
            np.where(has_holes, low, -1),
            np.where(has_holes, way_in, -np.inf),
            value.entry[level],
        )

    in_square = layout.patch_square == place.square[:, None]
    in_grid = layout.patch_grid == place.grid[:, None]
    where = (place.other_patch, in_grid & ~in_square, ~in_grid)
    best = believed.p[row, place.patch].max(-1)
    rates = [best * highest - (best <= 0)]
    targets, ranks = [place.patch], [np.zeros_like(place.patch)]
    for level in (1, 2, 3):
        rate, way_in, entry = solve(level)
        rate = np.where(where[level - 1], rate, -1)
        top = rate.max(1)
        # Among the patches of the best group, the entry that loses least.
        targets.append(np.where(rate >= top[:, None], way_in, -np.inf).argmax(1))
        ranks.append(entry[row, targets[-1]])
        rates.append(top)
    level = np.stack(rates, 1).argmax(1)
    patch = np.stack(targets, 1)[row, level]
    p_target = sorted_p.p[np.stack(ranks, 1)[row, level], row, patch]
    slot = (believed.p[row, patch] == p_target[:, None]).argmax(-1)
    return layout.slot_hole[row, patch, slot]


def adaptive(now: Situation) -> IntArray:
    """``rate_index`` with probabilities updated by what was measured in patch, square and grid."""
    return rate_index(now, is_adaptive=True)


def lagrange(now: Situation) -> IntArray:
    """The move that the price of time likes best, replanned at every step with updated beliefs.

    The price is the Lagrange multiplier at which the tree knapsack, in expectation, just spends the
    time left (belief.price_of_time): stay while the hole is worth its minutes, else go where the
    surplus is. The strongest planner that was measured.
    """
    return _best_row(now)[1]


def _best_row(now: Situation) -> tuple[FloatArray, IntArray]:
    """(E, F) the row that the price of time likes best, and (E,) its hole."""
    rows, hole, mask = candidate_rows(
        now.stack,
        now.session,
        now.visited,
        now.current,
        now.minutes_left,
        now.config,
        now.effects,
        layout=now.layout,
    )
    pick = np.where(mask, rows[..., PRIOR_COLUMN], -np.inf).argmax(1)
    at = np.arange(len(pick)), pick
    return rows[at], hole[at]


PLANNERS: dict[str, Callable[[Situation], IntArray]] = {
    "random": random,
    "predict-rank": predict_rank,
    "snowball": snowball,
    "rate-index": rate_index,
    "adaptive": adaptive,
    "lagrange": lagrange,
}
"""Planners that decide step by step; ``knapsack`` and ``oracle`` are tours planned at the start."""
TOURS = ("knapsack", "oracle")
NAMES = (*PLANNERS, *TOURS)


@dataclass(eq=False)
class Planner:
    """One of ``PLANNERS`` as a ``Policy`` on the sessions of a stack."""

    name: str
    stack: SessionStack
    config: NavigationConfig
    effects: RandomEffects = field(default_factory=RandomEffects)
    _layout: tuple[bytes, Layout] | None = None

    def on(self, stack: SessionStack) -> Policy:
        """The same planner on other sessions."""
        return Planner(self.name, stack, self.config, self.effects)

    def act(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E,) the next hole of each episode."""
        return PLANNERS[self.name](self._situation(observation, rng))

    def act_run(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E, R) the next holes of each episode, -1 after the end of each run.

        ``lagrange`` decides once for all holes of a patch that are worth their minutes, without
        looking at what the first ones turn out to be; other planners decide hole by hole.
        """
        now = self._situation(observation, rng)
        if self.name != "lagrange":
            return PLANNERS[self.name](now)[:, None]
        row, hole = _best_row(now)
        count = num_in_run(row, now.minutes_left, self.config)
        return run_from(self.stack, now.session, now.visited, hole, count)

    def _situation(self, observation: Observation, rng: np.random.Generator) -> Situation:
        session = observation["session"][:, 0]
        key = session.tobytes()
        if self._layout is None or self._layout[0] != key:
            self._layout = key, Layout.of(self.stack, session, self.effects)
        return Situation(
            stack=self.stack,
            session=session,
            visited=unpack_visited(observation, self.stack.p_low_ctf.shape[1]),
            current=observation["recent"][:, 0],
            minutes_left=self.config.budget_min - observation["elapsed_min"][:, 0],
            config=self.config,
            effects=self.effects,
            layout=self._layout[1],
            rng=rng,
        )


@dataclass(eq=False)
class Tour:
    """A plan made at the start and followed to the end, as a ``Policy``.

    ``knapsack``: the best tour if every hole were worth its probability (open loop). ``oracle``:
    the exact optimum on the true labels, which no policy may know.
    """

    name: str
    stack: SessionStack
    config: NavigationConfig
    _order: dict[tuple[int, int], IntArray] = field(default_factory=dict)
    _start: IntArray = field(default_factory=lambda: np.zeros(0, int))

    def on(self, stack: SessionStack) -> Policy:
        """The same plan for other sessions."""
        return Tour(self.name, stack, self.config)

    def act(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E,) the next hole of each tour; past its end the most probable hole that is left.

        Raises:
            ValueError: an episode that was not followed from its first move.
        """
        session = observation["session"][:, 0]
        visited = unpack_visited(observation, self.stack.p_low_ctf.shape[1])
        current = observation["recent"][:, 0]
        is_new = visited.sum(1) == 1
        known = self._start if len(self._start) == len(current) else np.full(len(current), -1)
        starts = np.where(is_new, current, known)
        if (starts < 0).any() or not visited[np.arange(len(starts)), starts].all():
            raise ValueError(f"{self.name} plans at the start: begin with a new session")
        self._start = starts
        rank = np.full(visited.shape, np.inf)
        for episode, (row, start) in enumerate(zip(session, starts, strict=True)):
            key = (int(row), int(start))
            if key not in self._order:
                self._order[key] = self._plan(*key)
            order = self._order[key]
            rank[episode, order] = np.arange(len(order))
        rank[visited] = np.inf
        exists = np.arange(visited.shape[1]) < self.stack.num_holes[session][:, None]
        p = np.where(exists & ~visited, self.stack.p_low_ctf[session], -1)
        return np.where(np.isfinite(rank).any(1), rank.argmin(1), p.argmax(1))

    def _plan(self, row: int, start: int) -> IntArray:
        count = self.stack.num_holes[row]
        values = self.stack.value if self.name == "oracle" else self.stack.p_low_ctf
        table = HoleTable.from_names(
            hole_name=np.arange(count).astype(str),
            grid=self.stack.grid_id[row, :count].astype(str),
            square=self.stack.square_id[row, :count].astype(str),
            patch=self.stack.patch_id[row, :count].astype(str),
        )
        return best_tour(table, values[row, :count].astype(float), self.config, start)[0]


def make_planner(
    name: str,
    stack: SessionStack,
    config: NavigationConfig,
    effects: RandomEffects | None = None,
) -> Policy:
    """The planner of that name on the sessions of a stack.

    Raises:
        ValueError: no such planner; the message lists them.
    """
    if name in TOURS:
        return Tour(name, stack, config)
    if name not in PLANNERS:
        raise ValueError(f"planner: {name!r} is not one of {NAMES}")
    return Planner(name, stack, config, effects or RandomEffects())
