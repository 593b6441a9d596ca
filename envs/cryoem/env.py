"""The navigation problem as Gymnasium environments: one episode, or many in one numpy step.

Shape letters: E episodes side by side, T sessions, N holes, P patches, C candidate rows, F features
of a candidate, K past steps. The single environment is a vector of one; the rules stand in
``CryoEMVectorEnv._move`` and, in plain Python for the speed of one episode, in ``_move_one``: tests
hold the two equal.

Rules (SSL²-RL, appendix B.1; CryoRL's public code): the start hole is visited, free, and earns
nothing. A move costs ``minutes[switch]`` and earns ``reward[switch]`` times what the hole is worth.
The move that goes past the budget counts in full; the episode is then ``terminated``, because the
budget is part of the task. It also ends where no hole is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.cryoem.rewards import next_streak, penalty, switch_level
from envs.cryoem.stack import Observation, SessionStack, StackShape
from envs.cryoem.types import (
    BoolArray,
    FloatArray,
    HoleTable,
    IntArray,
    NavigationConfig,
    RandomEffects,
    SessionSource,
)

if TYPE_CHECKING:
    from envs.cryoem.belief import Layout

_OPTIONS = ("start_hole", "session")
_INT32_MAX = np.iinfo(np.int32).max


class CryoEMVectorEnv(VectorEnv[Observation, IntArray, np.ndarray]):
    """E episodes, each on one session of a stack; one ``step`` moves them all.

    Actions (E,): a hole, a patch (``action_level="patch"``: its best unvisited hole by prediction),
    or a candidate row (``feature_set="rates"``). Observations: ``stack.Observation``, or under
    ``rates`` a dict of ``rows`` (E, C, F) float32, ``hole`` (E, C) int32 (-1 = none),
    ``action_mask`` (E, C) int8, ``elapsed_min`` and ``minutes_left`` (E, 1) float32.

    An episode that has ended is reset by the next step (Gymnasium's NEXT_STEP): that row's action
    is ignored and its reward is 0. Each row has its own random generator, spawned from the seed:
    the k-th episode of a row starts alike whatever was done before, so policies compare paired.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        tables: Sequence[HoleTable] | SessionStack,
        config: NavigationConfig,
        num_envs: int,
        *,
        draw_session: SessionSource | None = None,
        capacity: tuple[int, int, int, int, int] | None = None,
        budget_range_min: tuple[float, float] | None = None,
        effects: RandomEffects = RandomEffects(),  # noqa: B008 (frozen)
        seed: int | None = None,
    ) -> None:
        """Stacks the sessions and builds the spaces.

        Args:
            tables: sessions; a reset chooses one at random. Beside ``draw_session`` they only say
                how large a session may be (may be empty).
            config: the rules.
            num_envs: E.
            draw_session: draws a fresh session at every reset of an episode; the stack then has a
                row per episode, and grows under ``rates``, whose spaces do not depend on N.
            capacity: beside ``draw_session``, the ``StackShape`` of the largest session it may
                draw; needed under the compact feature sets, whose spaces depend on it.
            budget_range_min: budgets are drawn uniformly per episode; None = ``config.budget_min``.
            effects: what the ``rates`` rows believe groups share.
            seed: as in ``reset``.

        Raises:
            ValueError: where there is no session, or one with fewer than two holes.
        """
        self.config, self.num_envs, self.effects = config, num_envs, effects
        self.draw_session = draw_session
        self.budget_range_min = budget_range_min or (config.budget_min, config.budget_min)
        self.stack: SessionStack
        self.tables: list[HoleTable] | None = None
        is_stack = isinstance(tables, SessionStack)
        if draw_session is not None:
            known = [tables.shape] if is_stack else [StackShape.of(table) for table in tables]
            if capacity is not None:
                known.append(StackShape(*capacity))
            self.tables = [draw_session(np.random.default_rng(0))] * num_envs
            shape = StackShape.of(self.tables[0]).union(*known)
            self.stack = SessionStack.of(self.tables, config, at_least=shape)
        elif is_stack:
            self.stack = tables
        else:
            self.tables = list(tables)
            self.stack = SessionStack.of(self.tables, config)
        if (small := np.flatnonzero(self.stack.num_holes < 2)).size:
            raise ValueError(f"session {small[0]} has one hole: there is nowhere to go")
        self._minutes, self._reward = np.array(config.minutes), np.array(config.reward)
        self._all = np.arange(num_envs)
        self._allocate(self.stack.shape.num_holes)
        self._generators: list[np.random.Generator] | None = None
        self._candidate_hole: IntArray | None = None
        self._layout: Layout | None = None  # the sessions gathered for ``rates``, until a reset
        self._make_spaces()
        if seed is not None:
            super().reset(seed=seed)

    # ---- Gymnasium ---------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts every episode anew.

        Args:
            seed: fixes everything random from here on.
            options: ``start_hole`` and ``session``, each one number or (E,).

        Raises:
            ValueError: for an unknown option, or a hole or session that does not exist.
        """
        super().reset(seed=seed)
        if seed is not None or self._generators is None:
            self._generators = self.np_random.spawn(self.num_envs)
        self._begin(self._all, options or {})
        return self._observe(), self._info()

    def step(
        self, actions: IntArray
    ) -> tuple[Observation, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """Moves every episode; see the class for what an action is.

        Raises:
            ValueError: naming the first episode whose action leads nowhere, out of range, or to a
                visited hole; no episode has moved then.
        """
        return self.step_holes(self._holes(self._integers(actions)))

    def step_holes(
        self, holes: IntArray
    ) -> tuple[Observation, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """``step`` by holes (E,), whatever the action level, so that any ``Policy`` can drive."""
        if self._generators is None:
            raise gym.error.ResetNeeded("call reset() before the first step")
        holes = self._integers(holes)
        reward, terminated = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        if not self._is_done.any():
            reward, terminated = self._move(self._all, holes)
            self._is_done = terminated
        else:
            rows = np.flatnonzero(~self._is_done)
            reward[rows], terminated[rows] = self._move(rows, holes[rows])
            self._begin(np.flatnonzero(self._is_done), {})
            self._is_done = terminated
        return (
            self._observe(),
            reward,
            terminated.copy(),
            np.zeros(self.num_envs, bool),
            self._info(),
        )

    # ---- what planners and evaluation need -----------------------------------------------------

    def compact_observation(self) -> Observation:
        """The compact observation of all episodes, under every feature set; arrays are copies."""
        return {
            "visited": self._bits.copy(),
            "recent": self._recent.copy(),
            "elapsed_min": self._elapsed[:, None].astype(np.float32),
            "session": self._session[:, None].copy(),
        }

    def action_mask(self) -> BoolArray:
        """(E, A) True where an action is allowed; all False where no hole is left."""
        if self._candidate_hole is not None:
            return self._candidate_mask.copy()
        is_left = ~self._visited & (self.stack.patch_id[self._session] >= 0)
        if self.config.action_level == "hole":
            return is_left
        slots = self.stack.slot_hole[self._session]
        is_open = is_left[self._all[:, None, None], slots] & (slots >= 0)
        return np.asarray(is_open.any(2))

    def visit_order(self, episode: int) -> IntArray:
        """(M,) holes visited so far by one episode, the start hole first."""
        return self._order[episode, : self._num_visits[episode] + 1].copy()

    # ---- the rules ---------------------------------------------------------------------------

    def _move(self, rows: IntArray, holes: IntArray) -> tuple[FloatArray, BoolArray]:
        """Moves these rows' episodes to these holes; their rewards, and True where that was all."""
        session, current = self._session[rows], self._recent[rows, 0]
        offset = session * self.stack.shape.num_holes
        self._check(rows, session, holes)
        source, target = offset + current, offset + holes
        switch = switch_level(
            (self._grid[source], self._grid[target]),
            (self._square[source], self._square[target]),
            (self._patch[source], self._patch[target]),
        )
        outcome = self._outcome[target]
        reward = self._reward[switch] * self._value[target]
        if self.config.high_ctf_penalty:
            self._streak[rows] = next_streak(self._streak[rows], switch, outcome)
            reward += penalty(self._streak[rows], self.config)
        self._mark(rows, holes)
        self._recent[rows, 1:] = self._recent[rows, :-1]
        self._recent[rows, 0] = holes
        self._switch[rows] = switch
        self._num_switches[rows, switch] += 1
        self._num_low[rows] += outcome
        self._num_visits[rows] += 1
        num_visits = self._num_visits[rows]
        self._order[rows, num_visits] = holes
        # From counts: the same minutes whatever the order of the moves, also where a move is not
        # a whole number of minutes.
        self._by_level[rows] = self._num_switches[rows] * self._minutes
        elapsed = self._by_level[rows].sum(1)
        self._elapsed[rows] = elapsed
        return reward, (elapsed > self._budget[rows]) | (
            num_visits + 1 == self.stack.num_holes[session]
        )

    def _move_one(self, hole: int) -> tuple[float, bool]:
        """``_move`` for the only episode of E = 1, in Python numbers: several times faster."""
        session, current = self._session.item(0), self._recent.item(0, 0)
        if not 0 <= hole < self.stack.num_holes.item(session) or self._visited.item(0, hole):
            self._check(self._all, self._session, np.array([hole]))
        offset = session * self.stack.shape.num_holes
        source, target = offset + current, offset + hole
        switch = (
            (self._patch.item(source) != self._patch.item(target))
            + (self._square.item(source) != self._square.item(target))
            + (self._grid.item(source) != self._grid.item(target))
        )
        outcome = self._outcome.item(target)
        reward = self.config.reward[switch] * self._value.item(target)
        if self.config.high_ctf_penalty:
            self._streak[:] = next_streak(self._streak, np.array([switch]), np.array([outcome]))
            reward += penalty(self._streak, self.config).item()
        self._visited[0, hole] = True
        self._bits[0, hole >> 3] |= 1 << (hole & 7)
        self._recent[0, 1:] = self._recent[0, :-1]
        self._recent[0, 0] = hole
        self._switch[0] = switch
        self._num_low[0] += outcome
        num_visits = self._num_visits.item(0) + 1
        self._num_visits[0] = num_visits
        self._order[0, num_visits] = hole
        num_switches = self._num_switches.item(0, switch) + 1
        self._num_switches[0, switch] = num_switches
        self._by_level[0, switch] = num_switches * self.config.minutes[switch]
        elapsed = sum(self._by_level[0].tolist())
        self._elapsed[0] = elapsed
        is_over = elapsed > self._budget.item(0)
        return reward, is_over or num_visits + 1 == self.stack.num_holes.item(session)

    def _begin(self, rows: IntArray, options: Mapping[str, Any]) -> None:
        """Starts these rows' episodes; resets are rare, so a loop over rows is fine."""
        if unknown := set(options) - set(_OPTIONS):
            raise ValueError(f"options: {sorted(unknown)} unknown, choose from {_OPTIONS}")
        assert self._generators is not None
        for row in rows:
            generator = self._generators[row]
            session = self._choose_session(row, generator, options)
            num_holes = int(self.stack.num_holes[session])
            start = int(generator.integers(num_holes))
            if "start_hole" in options:
                start = self._option(options, "start_hole", row)
            if not 0 <= start < num_holes:
                raise ValueError(f"start_hole: {start} is not one of the {num_holes} holes")
            self._session[row], self._start[row] = session, start
            self._budget[row] = generator.uniform(*self.budget_range_min)
        self._layout = None
        start = self._start[rows]
        for array, value in (
            (self._visited, False), (self._bits, 0), (self._recent, -1), (self._order, -1),
            (self._num_switches, 0), (self._by_level, 0), (self._elapsed, 0), (self._num_low, 0),
            (self._num_visits, 0), (self._switch, -1), (self._streak, 0), (self._is_done, False),
        ):  # fmt: skip
            array[rows] = value
        self._mark(rows, start)
        self._recent[rows, 0] = start
        self._order[rows, 0] = start
        self._hash[rows] = self.stack.table_hash[self._session[rows]]
        if self.config.high_ctf_penalty:
            high = self.stack.outcome[self._session[rows], start] < 0.5
            self._streak[rows] = high.astype(int)

    def _choose_session(
        self, row: int, generator: np.random.Generator, options: Mapping[str, Any]
    ) -> int:
        """The row of the stack on which an episode is played."""
        if self.draw_session is not None:
            if "session" in options:
                raise ValueError("options: no session to choose, they are drawn afresh")
            self._put(row, self.draw_session(generator))
            return row
        num_sessions = len(self.stack.num_holes)
        session = int(generator.integers(num_sessions))
        if "session" in options:
            session = self._option(options, "session", row)
        if not 0 <= session < num_sessions:
            raise ValueError(f"session: {session} is not one of the {num_sessions} stacked")
        return session

    def _option(self, options: Mapping[str, Any], name: str, row: int) -> int:
        """The option's number for an episode."""
        value = np.asarray(options[name])
        if value.dtype.kind not in "iu" or value.shape not in ((), (1,), (self.num_envs,)):
            raise ValueError(
                f"{name}: expected a whole number, or one for each of {self.num_envs} episodes, "
                f"found {options[name]!r}"
            )
        return int(np.broadcast_to(value, self.num_envs)[row])

    # ---- state -------------------------------------------------------------------------------

    def _mark(self, rows: IntArray, holes: IntArray) -> None:
        """Visits: in the flags that are looked up and in the packed bits that are observed."""
        self._visited[rows, holes] = True
        self._bits[rows, holes >> 3] |= np.left_shift(1, holes & 7).astype(np.uint8)

    def _check(self, rows: IntArray, session: IntArray, holes: IntArray) -> None:
        """Raises ValueError for the first hole that cannot be visited."""
        num_holes = self.stack.num_holes[session]
        if (outside := (holes < 0) | (holes >= num_holes)).any():
            at = int(outside.argmax())
            raise ValueError(
                f"episode {rows[at]}: hole {holes[at]} is not one of the {num_holes[at]} holes "
                "of its session; see action_mask()"
            )
        if (again := self._visited[rows, holes]).any():
            at = int(again.argmax())
            step = int((self._order[rows[at]] == holes[at]).argmax())
            raise ValueError(
                f"episode {rows[at]}: hole {holes[at]} was visited at step {step}"
                f"{' (the start)' if step == 0 else ''}; see action_mask()"
            )

    def _integers(self, actions: IntArray) -> IntArray:
        """(E,) the actions as an array; raises ValueError where they are something else."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions: one integer for each of {self.num_envs} episodes, "
                f"found {actions.dtype} of shape {actions.shape}"
            )
        return actions

    def _holes(self, actions: IntArray) -> IntArray:
        """(E,) the holes that actions (E,) lead to."""
        is_rates = self._candidate_hole is not None
        if self.config.action_level == "hole" and not is_rates:
            return actions
        size, kind = (
            (self.config.num_candidates, "candidate")
            if is_rates
            else (self.stack.shape.num_patches, "patch")
        )
        is_outside = (actions < 0) | (actions >= size)
        inside = np.where(is_outside, 0, actions)
        if self._candidate_hole is not None:
            holes = self._candidate_hole[self._all, inside]
            is_left = self._candidate_mask[self._all, inside]
        else:
            slots = self.stack.slot_hole[self._session, inside]
            left = (slots >= 0) & ~self._visited[self._all[:, None], slots]
            holes, is_left = slots[self._all, left.argmax(1)], left.any(1)
        if (is_wrong := (is_outside | ~is_left) & ~self._is_done).any():
            at = int(is_wrong.argmax())
            raise ValueError(
                f"episode {at}: {kind} {actions[at]} "
                + (f"is not one of {size}" if is_outside[at] else "has no hole left")
                + "; see action_mask()"
            )
        return holes

    def _allocate(self, num_holes: int) -> None:
        """The state of E episodes for sessions of up to N holes, and flat views of the stack."""
        shape, num_envs = (self.num_envs, num_holes), self.num_envs
        self._visited = np.zeros(shape, bool)
        self._bits = np.zeros((num_envs, -(-num_holes // 8)), np.uint8)
        self._order = np.full(shape, -1, np.int32)
        self._view_stack()
        self._recent = np.full((num_envs, self.config.num_past_steps), -1, np.int32)
        self._session, self._start, self._switch, self._streak = (
            np.zeros(num_envs, np.int32) for _ in range(4)
        )
        self._num_visits = np.zeros(num_envs, np.int64)
        self._num_switches = np.zeros((num_envs, 4), np.int64)
        self._by_level = np.zeros((num_envs, 4))
        self._elapsed, self._budget, self._num_low = (np.zeros(num_envs) for _ in range(3))
        self._is_done = np.zeros(num_envs, bool)
        self._hash = np.full(num_envs, "", "U16")

    def _view_stack(self) -> None:
        """Flat views: one index instead of two, and ``put`` writes through them."""
        stack = self.stack
        self._grid, self._square, self._patch = (
            ids.reshape(-1) for ids in (stack.grid_id, stack.square_id, stack.patch_id)
        )
        self._outcome, self._value = stack.outcome.reshape(-1), stack.value.reshape(-1)

    def _put(self, row: int, table: HoleTable) -> None:
        """Writes a fresh session into a row; under ``rates`` the stack grows where it must."""
        if len(table) < 2:
            raise ValueError("draw_session gave a session of one hole: there is nowhere to go")
        assert self.tables is not None
        self.tables[row] = table
        needed = StackShape.of(table).union(self.stack.shape)
        if needed == self.stack.shape:
            self.stack.put(row, table, self.config)
            return
        if self.config.feature_set != "rates":
            raise ValueError(
                f"draw_session gave a session of {StackShape.of(table)}, the spaces were made for "
                f"{self.stack.shape}: name the largest that it may draw as `capacity`"
            )
        more = needed.num_holes - self.stack.shape.num_holes
        self.stack = SessionStack.of(self.tables, self.config, at_least=needed)
        self._visited = np.pad(self._visited, ((0, 0), (0, more)))
        self._order = np.pad(self._order, ((0, 0), (0, more)), constant_values=-1)
        more = -(-needed.num_holes // 8) - self._bits.shape[1]
        self._bits = np.pad(self._bits, ((0, 0), (0, more)))
        self._view_stack()

    # ---- what is seen ------------------------------------------------------------------------

    def _observe(self) -> Observation:
        """The observation of the feature set."""
        if self.config.feature_set != "rates":
            return self.compact_observation()
        from envs.cryoem.belief import Layout
        from envs.cryoem.rates import candidate_rows

        if self._layout is None:
            self._layout = Layout.of(self.stack, self._session, self.effects)
        left = np.maximum(self._budget - self._elapsed, 0)
        rows, hole, mask = candidate_rows(
            self.stack,
            self._session,
            self._visited,
            self._recent[:, 0],
            left,
            self.config,
            self.effects,
            layout=self._layout,
        )
        self._candidate_hole, self._candidate_mask = hole, mask
        return {
            "rows": rows,
            "hole": hole.copy(),
            "action_mask": mask.astype(np.int8),
            "elapsed_min": self._elapsed[:, None].astype(np.float32),
            "minutes_left": left[:, None].astype(np.float32),
        }

    def _info(self) -> dict[str, Any]:
        """What a person wants to know, (E, ...) each; ``hole`` is the one just visited."""
        return {
            "elapsed_min": self._elapsed.copy(),
            "budget_min": self._budget.copy(),
            "minutes_by_level": self._by_level.copy(),
            "num_low_ctf": self._num_low.copy(),
            "num_visits": self._num_visits.copy(),
            "hole": self._recent[:, 0].copy(),
            "switch_level": self._switch.copy(),
            "start_hole": self._start.copy(),
            "table_hash": self._hash.copy(),
        }

    def _make_spaces(self) -> None:
        """Spaces of one episode and of E."""
        config, shape = self.config, self.stack.shape
        longest = np.float32(max(self.budget_range_min) + max(config.minutes))
        elapsed = spaces.Box(np.float32(0), longest, (1,), np.float32)
        if config.feature_set == "rates":
            from envs.cryoem.rates import NUM_FEATURES

            size = config.num_candidates
            limit = np.finfo(np.float32).max
            observation = spaces.Dict(
                {
                    "rows": spaces.Box(-limit, limit, (size, NUM_FEATURES), np.float32),
                    "hole": spaces.Box(-1, _INT32_MAX, (size,), np.int32),
                    "action_mask": spaces.Box(0, 1, (size,), np.int8),
                    "elapsed_min": elapsed,
                    "minutes_left": elapsed,
                }
            )
        else:
            size = shape.num_holes if config.action_level == "hole" else shape.num_patches
            observation = spaces.Dict(
                {
                    "visited": spaces.Box(0, 255, (self._bits.shape[1],), np.uint8),
                    "recent": spaces.Box(
                        -1, shape.num_holes - 1, (config.num_past_steps,), np.int32
                    ),
                    "elapsed_min": elapsed,
                    "session": spaces.Box(0, max(len(self.stack.num_holes) - 1, 1), (1,), np.int32),
                }
            )
        self.single_observation_space = observation
        self.single_action_space = spaces.Discrete(size)
        self.observation_space = batch_space(observation, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)


class CryoEMNavigationEnv(gym.Env[Observation, int]):
    """One episode: a vector of one, without its axis and without the automatic reset."""

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        tables: HoleTable | Sequence[HoleTable],
        config: NavigationConfig,
        *,
        render_mode: str | None = None,
        draw_session: SessionSource | None = None,
        capacity: tuple[int, int, int, int, int] | None = None,
        budget_range_min: tuple[float, float] | None = None,
        effects: RandomEffects = RandomEffects(),  # noqa: B008 (frozen)
    ) -> None:
        """Arguments as in ``CryoEMVectorEnv``; ``render_mode``: ``rgb_array``, ``ansi`` or None."""
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"render_mode: {render_mode!r}, choose from {self.metadata['render_modes']}"
            )
        self.render_mode = render_mode
        self.config = config
        self.vector = CryoEMVectorEnv(
            [tables] if isinstance(tables, HoleTable) else tables,
            config,
            1,
            draw_session=draw_session,
            capacity=capacity,
            budget_range_min=budget_range_min,
            effects=effects,
        )
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Starts an episode; see ``CryoEMVectorEnv.reset``."""
        super().reset(seed=seed)
        observation, info = self.vector.reset(seed=seed, options=options)
        return _first(observation), _first_info(info)

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Moves; see ``CryoEMVectorEnv.step``.

        Raises:
            ValueError: where the action is not allowed, or the episode is over.
        """
        vector = self.vector
        if vector._generators is None:
            raise gym.error.ResetNeeded("call reset() before the first step")
        if vector._is_done.item(0):
            raise ValueError("the episode is over: call reset()")
        reward, terminated = vector._move_one(
            vector._holes(vector._integers(np.array([action]))).item()
        )
        vector._is_done[0] = terminated
        observation, info = vector._observe(), vector._info()
        return _first(observation), reward, terminated, False, _first_info(info)

    def render(self) -> np.ndarray | str | None:
        """The map with the tour (H, W, 3) uint8, or a few lines of text; None without a mode."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="rgb_array" or "ansi" at construction')
            return None
        from envs.cryoem.render import describe, draw_map

        vector, order = self.vector, self.visit_order()
        assert vector.tables is not None
        table = vector.tables[vector._session.item(0)]
        if self.render_mode == "rgb_array":
            return draw_map(table, self.config, order)
        elapsed, budget = vector._elapsed.item(0), vector._budget.item(0)
        return describe(table, self.config, order, elapsed_min=elapsed, budget_min=budget)

    def action_mask(self) -> BoolArray:
        """(A,) True where an action is allowed."""
        return self.vector.action_mask()[0]

    def compact_observation(self) -> Observation:
        """(1, ...) the compact observation, under every feature set."""
        return self.vector.compact_observation()

    def visit_order(self) -> IntArray:
        """(M,) holes visited so far, the start hole first."""
        return self.vector.visit_order(0)


def _first(observation: Observation) -> Observation:
    """An observation without its episode axis."""
    return {name: value[0] for name, value in observation.items()}


def _first_info(info: dict[str, Any]) -> dict[str, Any]:
    """An info of one episode, as plain Python values."""
    return {k: v[0] if v.ndim > 1 else v[0].item() for k, v in info.items()}
