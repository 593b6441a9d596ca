"""The list of holes to image, in order, as a microscope operator takes it along.

A plan is made before anything is measured. A policy that learns from outcomes is rolled out with
the expected ones: every hole of the plan is taken to turn out as it was predicted, with the
probability as its outcome. So the plan is open-loop; measured outcomes change it, and
``is_visited_labelled`` makes it anew from them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.cryoem.render import draw_map
from envs.cryoem.rewards import switch_level
from envs.cryoem.stack import Policy, SessionStack
from envs.cryoem.types import (
    BoolArray,
    FloatArray,
    HoleTable,
    IntArray,
    NavigationConfig,
    Switch,
)

COLUMNS: tuple[str, ...] = (
    "order",
    "hole",
    "grid",
    "square",
    "patch",
    "x",
    "y",
    "p_low_ctf",
    "minutes",
    "cumulative_min",
    "reason",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A tour of M moves; row 0 is the hole where it starts, free of charge."""

    table: HoleTable
    config: NavigationConfig
    hole: IntArray
    """(M + 1,) rows of the table."""
    switch: IntArray
    """(M,) ``Switch`` of each move."""
    policy: str
    is_done_before: BoolArray
    """(N,) holes that were imaged before the plan begins."""

    @property
    def cumulative_min(self) -> FloatArray:
        """(M + 1,) minutes after each hole; never above the budget."""
        # From counts, as the environment does: the same minutes whatever the order of the moves.
        counts = np.cumsum(np.eye(4)[self.switch], axis=0)
        return np.concatenate([[0.0], counts @ self.config.minutes])

    @property
    def expected_low_ctf(self) -> float:
        """Low-CTF holes to expect of the moves."""
        return float(self.table.p_low_ctf[self.hole[1:]].sum())

    @property
    def expected_reward(self) -> float:
        """Reward to expect of the moves."""
        reward = np.array(self.config.reward)[self.switch]
        return float((reward * self.table.p_low_ctf[self.hole[1:]]).sum())


def make_plan(
    make_policy: Callable[[SessionStack, NavigationConfig], Policy],
    table: HoleTable,
    config: NavigationConfig,
    *,
    start_hole: int | None = None,
    is_visited_labelled: bool = False,
    seed: int = 0,
) -> Plan:
    """Rolls a policy out with expected outcomes until the next move would go past the budget.

    Args:
        make_policy: from a ``Contestant``.
        table: with the probabilities that the policy acts on; labels are not read, but for
            ``is_visited_labelled``.
        config: minutes and budget.
        start_hole: row where the stage is; None: the best prediction, or in a session under way
            the labelled hole that is last in the table.
        is_visited_labelled: the session is under way: labelled holes are done, what they turned
            out to be is known, and the plan goes on from there.
        seed: of policies that draw.

    Raises:
        ValueError: no hole is left to plan for, or the start hole is not one of the table.
    """
    done = table.is_labelled.copy() if is_visited_labelled else np.zeros(len(table), bool)
    if start_hole is None:
        start_hole = int(np.flatnonzero(done)[-1] if done.any() else np.argmax(table.p_low_ctf))
    if not 0 <= start_hole < len(table):
        raise ValueError(f"start hole {start_hole}: rows go from 0 to {len(table) - 1}")
    seen = table.replace(is_labelled=done)
    stack = SessionStack.of([seen], config)
    policy = make_policy(stack, config)
    if policy.name == "oracle":
        raise ValueError("the oracle knows the outcomes, which a plan cannot: take `knapsack`")
    rng = np.random.default_rng(seed)
    visited = done.copy()
    visited[start_hole] = True
    if visited.all():
        raise ValueError("nothing to plan: every hole of this session is imaged already")
    hole, switch, elapsed_min, counts = [start_hole], [], 0.0, np.zeros(4)
    while not visited.all():
        recent = np.full(config.num_past_steps, -1, np.int32)
        last = hole[::-1][: config.num_past_steps]
        recent[: len(last)] = last
        observation = {
            "visited": np.packbits(visited, bitorder="little")[None],
            "recent": recent[None],
            "elapsed_min": np.array([[elapsed_min]], np.float32),
            "session": np.zeros((1, 1), np.int32),
        }
        target = int(policy.act(observation, rng)[0])
        level = _switch(table, hole[-1], target)
        counts[level] += 1
        elapsed_min = float(counts @ config.minutes)
        if elapsed_min > config.budget_min:
            break
        visited[target] = True
        hole.append(target)
        switch.append(level)
    return Plan(
        table=table,
        config=config,
        hole=np.array(hole),
        switch=np.array(switch, np.int64),
        policy=policy.name,
        is_done_before=done,
    )


def find_hole(table: HoleTable, text: str) -> int:
    """The row of a hole by its name, or by its number where no hole is named so.

    Raises ValueError with the nearest name.
    """
    if (rows := np.flatnonzero(table.hole_name == text)).size:
        return int(rows[0])
    if text.isdecimal() and int(text) < len(table):
        return int(text)
    from difflib import get_close_matches

    near = get_close_matches(text, table.hole_name.tolist(), n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"start hole {text!r}: no such name, and rows go to {len(table) - 1}{hint}")


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """The plan as one dict a hole, keys ``COLUMNS``; an unknown position is None."""
    table, minutes = plan.table, np.array(plan.config.minutes)
    reasons = _reasons(plan)
    moves = np.concatenate([[0.0], minutes[plan.switch]])
    return [
        {
            "order": order,
            "hole": str(table.hole_name[row]),
            "grid": str(table.grid_name[table.grid_id[row]]),
            "square": str(table.square_name[table.square_id[row]]),
            "patch": str(table.patch_name[table.patch_id[row]]),
            "x": _known(table.x[row]),
            "y": _known(table.y[row]),
            "p_low_ctf": round(float(table.p_low_ctf[row]), 4),
            "minutes": round(float(moves[order]), 3),
            "cumulative_min": round(float(plan.cumulative_min[order]), 3),
            "reason": reasons[order],
        }
        for order, row in enumerate(plan.hole)
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan with what is to be expected of it."""
    return {
        "policy": plan.policy,
        "budget_min": plan.config.budget_min,
        "num_holes": len(plan.switch),
        "minutes": float(plan.cumulative_min[-1]),
        "expected_low_ctf": plan.expected_low_ctf,
        "expected_reward": plan.expected_reward,
        "num_holes_done_before": int(plan.is_done_before.sum()),
        "holes": rows_of(plan),
    }


def to_csv(rows: list[dict[str, Any]]) -> str:
    """RFC 4180 with a header; unknown values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _reasons(plan: Plan) -> list[str]:
    """Why each hole is next, in words; a new patch says what is planned there."""
    p = plan.table.p_low_ctf[plan.hole]
    # A run is a stretch of moves within one patch; it begins wherever the switch is not HOLE.
    run = np.concatenate([[0], np.cumsum(plan.switch != Switch.HOLE)])
    length, expected = np.bincount(run), np.bincount(run, p)
    place = {
        Switch.PATCH: "next patch in the square",
        Switch.SQUARE: "next square on the grid",
        Switch.GRID: "new grid",
    }
    reasons = ["start: the stage is here"]
    for order, level in enumerate(plan.switch, start=1):
        if level == Switch.HOLE:
            reasons.append("stays in the patch: it still pays for its minutes")
        else:
            n, k = expected[run[order]], length[run[order]]
            holes = "1 hole" if k == 1 else f"{k} holes"
            reasons.append(f"{place[Switch(level)]}: {holes} planned there, {n:.1f} expected good")
    return reasons


def _switch(table: HoleTable, start: int, target: int) -> int:
    """Level of one move."""
    pairs = (
        (column[[start]], column[[target]])
        for column in (table.grid_id, table.square_id, table.patch_id)
    )
    return int(switch_level(*pairs)[0])


def _known(value: Any) -> float | None:
    """A finite number, or None."""
    return round(float(value), 3) if np.isfinite(value) else None


def draw(plan: Plan) -> np.ndarray:
    """The tour on the session's map, (H, W, 3) uint8."""
    done = plan.table.replace(is_labelled=plan.is_done_before)  # what is not measured has no ring
    title = (
        f"{len(plan.switch)} holes in {plan.cumulative_min[-1]:.0f} of "
        f"{plan.config.budget_min:g} min, {plan.expected_low_ctf:.0f} expected low-CTF"
    )
    return draw_map(done, plan.config, plan.hole, title=title)
