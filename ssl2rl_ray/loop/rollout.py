"""Roll-outs over all holes of one session, past the budget (SSL²-RL, Algorithm 1).

The order in which a policy visits holes says which of them it takes for good; M roll-outs that
differ say how sure that is. Shape letters: M roll-outs side by side, N holes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from envs.cryoem.rewards import switch_level
from envs.cryoem.stack import Observation, Policy, SessionStack
from envs.cryoem.types import (
    BoolArray,
    FloatArray,
    HoleTable,
    IntArray,
    NavigationConfig,
    RandomEffects,
)


def imagine(
    table: HoleTable,
    num_rollouts: int,
    *,
    exploration: float,
    effects: RandomEffects,
    rng: np.random.Generator,
) -> list[HoleTable]:
    """``num_rollouts`` sessions that might be this one, as far as the predictions can tell."""
    p = np.clip(table.p_low_ctf, 1e-6, 1 - 1e-6)
    logit = np.log(p / (1 - p))
    out = []
    for _ in range(num_rollouts):
        u = (
            effects.sd_grid * rng.standard_normal(len(table.grid_name))[table.grid_id]
            + effects.sd_square * rng.standard_normal(len(table.square_name))[table.square_id]
            + effects.sd_patch * rng.standard_normal(len(table.patch_name))[table.patch_id]
        )
        out.append(table.replace(p_low_ctf=1 / (1 + np.exp(-logit - exploration * u))))
    return out


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
    start hole's is NaN. None where a policy has no values (planners)."""
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
        stack: the session.
        rules: minutes of the moves, past steps shown; the budget is not read.
        start_hole: (M,) row of the hole where each begins.
        duration_min: minutes of a session.
        exploration: probability that a decision goes elsewhere than the policy would: to a random
            unvisited hole as near as there is one (patch, else square, grid, any).
        rng: of the exploration and of policies that draw.
        is_by_run: policies that can decide on a run of holes within a patch do, which saves most
            of the work; False: hole by hole, as in ``evaluate.roll_out``.
        on_step: told the share of the holes visited by the slowest, after every decision.
    """
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
    has_values = all(isinstance(policy, DecidesRuns) for policy in policies)
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
            if exploration and (wanders := rng.random(len(rows)) < exploration).any():
                run[wanders] = -1
                run[wanders, 0] = _nearby(stack, visited[rows[wanders]], recent[wanders, 0], rng)
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
        value=value if has_values else None,
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


def _nearby(
    stack: SessionStack, visited: BoolArray, current: IntArray, rng: np.random.Generator
) -> IntArray:
    """(E,) a random unvisited hole for each episode, as near as there is one."""
    near = np.zeros(visited.shape)
    for ids in (stack.patch_id[0], stack.square_id[0], stack.grid_id[0]):
        near += ids == ids[current][:, None]
    is_open = ~visited & (stack.patch_id[0] >= 0)
    return np.where(is_open, near + rng.random(near.shape), -1).argmax(1)
