"""Roll-outs over all holes of one session, past the budget (SSL²-RL, Algorithm 1).

The order in which a policy visits holes says which of them it takes for good; M roll-outs that
differ say how sure that is. Shape letters: M roll-outs side by side, N holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from envs.cryoem.rewards import switch_level
from envs.cryoem.stack import Observation, Policy, SessionStack
from envs.cryoem.types import (
    FloatArray,
    IntArray,
    NavigationConfig,
    RandomEffects,
)


@runtime_checkable
class Movable(Protocol):
    """A policy that can be put on other sessions: planners and learned ones."""

    def on(self, stack: SessionStack) -> Policy:
        """The same policy on the sessions of another stack."""
        ...


@runtime_checkable
class PlansRuns(Protocol):
    """A planner that decides on several holes at once."""

    def act_run(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E, R) the next holes of each episode, -1 after the end of each run."""
        ...


@runtime_checkable
class DecidesRuns(Protocol):
    """A learned policy: it says what its move is worth."""

    def decide_run(
        self, observation: Observation, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """``act_run``, and (E,) float32 the action value of the move that begins the run."""
        ...

    def decide(
        self, observation: Observation, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """(E,) the next hole of each episode, and (E,) float32 its action value."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RollOut:
    """M visits of every hole."""

    visit_order: IntArray
    """(M, N) int32: each row a permutation of the holes, the start first."""
    value: FloatArray | None
    """(M, N) float32 by row of the table: the action value at which each hole was visited; the
    start hole's is NaN. None of policies without values (planners, actor-critics)."""
    num_switches: IntArray
    """(M, 4) int64 moves by ``Switch``."""


def roll_out_all(
    policies: Sequence[Policy],
    stack: SessionStack,
    rules: NavigationConfig,
    *,
    start_hole: IntArray,
    duration_min: float,
    exploration: float,
    rng: np.random.Generator,
    effects: RandomEffects = RandomEffects(),  # noqa: B008 (frozen)
    is_by_run: bool = True,
    on_step: Callable[[float], None] | None = None,
) -> RollOut:
    """Visits every hole of the session (row 0 of the stack) M times.

    The clock that a policy sees begins anew with every move past ``duration_min``: what is left is
    played as one session after the other, each from where the last one ended. Else every policy
    would act as in its last minute for most of the way.

    Args:
        policies: roll-out m is played by ``policies[m % len(policies)]``; made for this stack and
            for rules whose ``budget_min`` is ``duration_min``.
        stack: the session; its outcomes are the truth where labelled, else predictions.
        rules: minutes of the moves, past steps shown; the budget is not read.
        start_hole: (M,) row of the hole where each begins.
        duration_min: minutes of a session.
        exploration: 0: all see the session as it is; else each roll-out plays on a session of its
            own, drawn by ``imagine`` with this share of the spread.
        rng: of the exploration and of policies that draw.
        effects: the spread, for ``imagine``.
        is_by_run: policies that can decide on a run of holes within a patch do, which saves most
            of the work; False: hole by hole, as in ``evaluate.roll_out``.
        on_step: told the share of the holes visited by the slowest, after every decision.

    Raises:
        ValueError: exploration asked of a policy that cannot be put on other sessions.
    """
    if exploration:
        if fixed := [policy.name for policy in policies if not isinstance(policy, Movable)]:
            raise ValueError(
                f"exploration: policy {fixed[0]!r} has no `on(stack)`, so it cannot play on drawn "
                "sessions; give it one, or set exploration to 0"
            )
        stack = imagine(stack, len(start_hole), exploration=exploration, effects=effects, rng=rng)
        policies = [policy.on(stack) for policy in policies if isinstance(policy, Movable)]
    num_holes, num_rollouts = int(stack.num_holes[0]), len(start_hole)
    visit_order = np.full((num_rollouts, num_holes), -1, np.int32)
    visit_order[:, 0] = start_hole
    visited = np.zeros((num_rollouts, stack.shape.num_holes), bool)
    visited[np.arange(num_rollouts), start_hole] = True
    num_visited = np.ones(num_rollouts, int)
    num_switches = np.zeros((num_rollouts, 4), np.int64)
    began_min = np.zeros(num_rollouts)
    value = np.full((num_rollouts, num_holes), np.nan, np.float32)
    parents = [ids[0] for ids in (stack.grid_id, stack.square_id, stack.patch_id)]
    player = np.arange(num_rollouts) % len(policies)
    back = np.arange(1, rules.num_past_steps + 1)

    while (is_running := num_visited < num_holes).any():
        elapsed_min = num_switches @ np.array(rules.minutes)
        began_min = np.where(elapsed_min - began_min > duration_min, elapsed_min, began_min)
        for number, policy in enumerate(policies):
            rows = np.flatnonzero(is_running & (player == number))
            if not len(rows):
                continue
            at = num_visited[rows, None] - back
            recent = np.where(at >= 0, visit_order[rows[:, None], np.maximum(at, 0)], -1)
            observation = {
                "visited": np.packbits(visited[rows], axis=1, bitorder="little"),
                "recent": recent.astype(np.int32),
                "elapsed_min": (elapsed_min - began_min)[rows, None].astype(np.float32),
                "session": (rows % len(stack.num_holes))[:, None].astype(np.int32),
            }
            run, worth = _ask(policy, observation, rng, is_by_run)
            turn, place = np.nonzero(run >= 0)
            row, hole = rows[turn], run[turn, place]
            visited[row, hole] = True
            visit_order[row, num_visited[row] + place] = hole
            value[row, hole] = worth[turn]
            before = visit_order[row, num_visited[row] + place - 1]
            switch = switch_level(*((ids[before], ids[hole]) for ids in parents))
            np.add.at(num_switches, (row, switch), 1)
            num_visited[rows] += (run >= 0).sum(1)
        if on_step:
            on_step(float(num_visited.min() / num_holes))
    return RollOut(
        visit_order=visit_order,
        value=None if np.isnan(value).all() else value,
        num_switches=num_switches,
    )


def _ask(
    policy: Policy, observation: Observation, rng: np.random.Generator, is_by_run: bool
) -> tuple[IntArray, FloatArray]:
    """(E, R) the next holes of each episode, -1 after the end, and (E,) their value or NaN."""
    if isinstance(policy, DecidesRuns):
        if is_by_run:
            return policy.decide_run(observation, rng)
        hole, worth = policy.decide(observation, rng)
        return hole[:, None], worth
    no_worth = np.full(len(observation["session"]), np.nan, np.float32)
    if is_by_run and isinstance(policy, PlansRuns):
        return policy.act_run(observation, rng), no_worth
    return policy.act(observation, rng)[:, None], no_worth


def imagine(
    stack: SessionStack,
    num_sessions: int,
    *,
    exploration: float,
    effects: RandomEffects,
    rng: np.random.Generator,
) -> SessionStack:
    """``num_sessions`` that the session (row 0) might be, as far as its predictions can tell.

    Every logit of ``p_low_ctf`` is moved by ``exploration`` times what the model of the labels
    (``calibration.py``) leaves open: N(0, sd²) shared by a grid, by a square, by a patch, and one
    more of each hole's own, for which the sd of patches stands in. Outcomes move along where they
    are predictions; where they are true labels they stay. This is posterior sampling (Thompson
    1933; Osband et al. 2013, arXiv:1306.0940): each roll-out goes, without a stray move, where it
    would be right to go if its draw were the truth, so the share of roll-outs that visit a hole
    early is about the probability that it should be. A random move now and then says nothing of the
    kind: a policy soon returns to the order that it had.
    """
    num_holes = int(stack.num_holes[0])
    parents = [ids[0, :num_holes] for ids in (stack.grid_id, stack.square_id, stack.patch_id)]
    p = np.clip(stack.p_low_ctf[0, :num_holes].astype(float), 1e-6, 1 - 1e-6)
    logit = np.tile(np.log(p / (1 - p)), (num_sessions, 1))
    spreads = (effects.sd_grid, effects.sd_square, effects.sd_patch)
    for sd, ids in zip(spreads, parents, strict=True):
        logit += exploration * sd * rng.standard_normal((num_sessions, ids.max() + 1))[:, ids]
    logit += exploration * effects.sd_patch * rng.standard_normal(logit.shape)

    rows = np.zeros(num_sessions, int)
    drawn = dataclasses.replace(
        stack,
        **{
            field.name: getattr(stack, field.name)[rows]
            for field in dataclasses.fields(stack)
            if field.name != "num_grids"
        },
    )
    drawn.p_low_ctf[:, :num_holes] = 1 / (1 + np.exp(-logit))
    is_predicted = stack.outcome[0] == stack.p_low_ctf[0]
    drawn.outcome[:, is_predicted] = drawn.p_low_ctf[:, is_predicted]
    drawn.value[:, is_predicted] = drawn.p_low_ctf[:, is_predicted]
    is_slot = stack.slot_hole[0] >= 0
    for row in range(num_sessions):
        drawn.slot_hole[row, is_slot] = np.lexsort((-drawn.p_low_ctf[row, :num_holes], parents[2]))
    return drawn
