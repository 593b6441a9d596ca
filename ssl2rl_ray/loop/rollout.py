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

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.stack import Observation, Policy, SessionStack
from envs.cryoem.types import FloatArray, IntArray, NavigationConfig


@runtime_checkable
class ValuedPolicy(Policy, Protocol):
    """A policy that says what it thinks its move is worth: the learned ones."""

    def decide(
        self, observation: Observation, rng: np.random.Generator
    ) -> tuple[IntArray, FloatArray]:
        """(E,) the next hole of each episode, and (E,) float32 the action value of going there."""
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
        exploration: probability that a move goes elsewhere than the policy would: to a random
            unvisited hole as near as there is one (patch, else square, grid, any).
        rng: of the exploration and of policies that draw.
        on_step: told the share of the holes visited, after every step.
    """
    num_holes, num_rollouts = int(stack.num_holes[0]), len(start_hole)
    # The env's clock never ends an episode; ``rates`` rows are made by the policy, where needed.
    endless = num_holes * max(rules.minutes) + 1
    env = CryoEMVectorEnv(
        stack,
        dataclasses.replace(rules, budget_min=endless, feature_set="paper", action_level="hole"),
        num_rollouts,
    )
    observation, _ = env.reset(
        seed=int(rng.integers(2**31)),
        options={"session": 0, "start_hole": np.asarray(start_hole)},
    )
    players = [
        (policy, np.arange(first, num_rollouts, len(policies)))
        for first, policy in enumerate(policies[:num_rollouts])
    ]
    has_values = all(isinstance(policy, ValuedPolicy) for policy in policies)
    row = np.arange(num_rollouts)
    began_min = np.zeros(num_rollouts)
    hole = np.zeros(num_rollouts, np.int32)
    worth = np.full(num_rollouts, np.nan, np.float32)
    value = np.full((num_rollouts, num_holes), np.nan, np.float32)
    for step in range(1, num_holes):
        elapsed_min = observation["elapsed_min"][:, 0]
        began_min = np.where(elapsed_min - began_min > duration_min, elapsed_min, began_min)
        seen = {**observation, "elapsed_min": (elapsed_min - began_min)[:, None]}
        for policy, rows in players:
            mine = {name: array[rows] for name, array in seen.items()}
            if has_values:
                assert isinstance(policy, ValuedPolicy)
                hole[rows], worth[rows] = policy.decide(mine, rng)
            else:
                hole[rows] = policy.act(mine, rng)
        if exploration:
            wanders = np.flatnonzero(rng.random(num_rollouts) < exploration)
            hole[wanders] = _nearby(env, wanders, rng)
            worth[wanders] = np.nan
        value[row, hole] = worth
        observation, *_ = env.step_holes(hole)
        if on_step:
            on_step((step + 1) / num_holes)
    return RollOut(
        visit_order=np.stack([env.visit_order(m) for m in range(num_rollouts)]).astype(np.int32),
        value=value if has_values else None,
        num_switches=env._num_switches.copy(),
    )


def _nearby(env: CryoEMVectorEnv, rows: IntArray, rng: np.random.Generator) -> IntArray:
    """(R,) a random unvisited hole for each of these roll-outs, as near as there is one."""
    stack, current = env.stack, env._recent[rows, 0]
    near = np.zeros((len(rows), stack.shape.num_holes))
    for ids in (stack.patch_id[0], stack.square_id[0], stack.grid_id[0]):
        near += ids == ids[current][:, None]
    is_open = env.action_mask()[rows]
    return np.where(is_open, near + rng.random(near.shape), -1).argmax(1)
