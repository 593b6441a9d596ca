"""Switch level -> minutes -> reward (SSL²-RL, appendix B.1; CryoRL's public code)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, NavigationConfig, Preset

PRESETS: dict[Preset, NavigationConfig] = {
    # Rewards: SSL²-RL, appendix B.1, exp(-0.185 (t - t_hole)). The minutes are inferred: they are
    # what these rewards imply, and they stand commented out in CryoRL's code.
    "paper": NavigationConfig(minutes=(2, 5, 10, 15), reward=(1.0, 0.57, 0.23, 0.09)),
    # CryoRL's public code (2022): exp(-0.1 (t - t_hole)), rounded as it is there.
    "cryorl": NavigationConfig(
        minutes=(1, 2, 6, 8),
        reward=(1.0, 0.90, 0.61, 0.50),
        is_threshold_inclusive=True,
        num_past_steps=4,
    ),
    # Medians between exposures of a queued session (Aldolase, March 2021, from its timestamps):
    # 91, 185, 186 and 195 s; rewards by CryoRL's rule exp(-0.1 (t - t_hole)).
    "leginon-2021": NavigationConfig(
        minutes=(91 / 60, 185 / 60, 186 / 60, 195 / 60),
        reward=(
            1.0,
            float(np.exp(-0.1 * (185 - 91) / 60)),
            float(np.exp(-0.1 * (186 - 91) / 60)),
            float(np.exp(-0.1 * (195 - 91) / 60)),
        ),
        is_threshold_inclusive=True,
        num_past_steps=4,
    ),
}


def is_low_ctf(ctf_max_resolution_A: ArrayLike, config: NavigationConfig) -> BoolArray:
    """True where the measured resolution (Å) is good; NaN is not."""
    ctf = np.asarray(ctf_max_resolution_A)
    threshold = config.low_ctf_threshold_A
    return ctf <= threshold if config.is_threshold_inclusive else ctf < threshold


def outcome(table: HoleTable, config: NavigationConfig) -> FloatArray:
    """(N,) what a visit is worth: the truth where labelled, the probability f(x) where not.

    The semi-supervised reward of SSL²-RL, section 3.
    """
    truth = is_low_ctf(table.ctf_max_resolution_A, config)
    return np.where(table.is_labelled, truth, table.p_low_ctf)


def switch_level(
    grid: tuple[IntArray, IntArray],
    square: tuple[IntArray, IntArray],
    patch: tuple[IntArray, IntArray],
) -> IntArray:
    """``Switch`` of moves from [0] to [1], elementwise over the parents' codes."""
    return (patch[0] != patch[1]).astype(np.int8) + (square[0] != square[1]) + (grid[0] != grid[1])


def visit_value(table: HoleTable, config: NavigationConfig) -> FloatArray:
    """(N,) what a visit earns as a fraction of ``reward[switch]``.

    ``switch``: the outcome. ``dynamic`` (CryoRL's public code): where labelled, 1 up to the
    threshold, then 1.2 exp(-1.7 (ctf - threshold) / 2) - 0.2, never below 0; p where not.
    """
    if config.reward_rule == "switch":
        return outcome(table, config)
    excess = np.maximum(table.ctf_max_resolution_A - config.low_ctf_threshold_A, 0)
    decay = np.maximum(1.2 * np.exp(-1.7 * excess / 2) - 0.2, 0)
    return np.where(table.is_labelled, decay, table.p_low_ctf)


def highest_return(config: NavigationConfig, budget_min: float, discount_per_min: float) -> float:
    """A bound of the discounted return of any session: every minute pays as the best move does.

    A reward counts at the minute in which its move begins; the last move may go past the budget.
    """
    minutes, reward = np.asarray(config.minutes), np.asarray(config.reward)

    def discounted(duration: FloatArray) -> FloatArray:
        if discount_per_min == 1:
            return duration
        return np.asarray((1 - discount_per_min**duration) / -np.log(discount_per_min))

    best_rate = (reward / discounted(minutes)).max()
    return float(best_rate * discounted(np.asarray(budget_min + minutes.max())))


def next_streak(streak: IntArray, switch: IntArray, outcome: FloatArray) -> IntArray:
    """High-CTF holes in a row within the patch, after a visit; a new patch starts afresh.

    A hole without a label is high where its probability of being low is under one half.
    """
    return np.where(outcome < 0.5, np.where(switch == 0, streak, 0) + 1, 0)


def penalty(streak: IntArray, config: NavigationConfig) -> FloatArray:
    """Reward (at most 0, at least -1) for the visit that made the streak this long."""
    return -np.minimum(config.high_ctf_penalty * streak, 1.0)
