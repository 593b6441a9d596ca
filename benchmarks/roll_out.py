"""Roll-outs over all holes: the share of the time that is not the network's own arithmetic.

Run: ``python benchmarks/roll_out.py`` (one process, one thread; minutes). M roll-outs side by side
over a Y3-like session of some 6500 holes (three quarters of the squares of the synthetic preset
``y3-mini``), with untrained networks: what they choose does not matter to the time.

The network's arithmetic is what no program around the same network can do without: its layers on
the features of all patches and on all cells of the M sessions, as ``HoleNetwork`` applies them (the
first layer per patch, the prediction's own column and the other layers per cell, or per patch at
patch level). Not counted: features, masks, argmax, the moves and the books. After every decision of
the roll-out one such pass on tensors of the same shapes is timed apart, so that both see the same
neighbours on a machine that is shared; the figure is (roll-out - passes) / roll-out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from envs.cryoem.planners import make_planner
from envs.cryoem.stack import Policy, SessionStack
from envs.cryoem.synthetic import draw_session, synthetic_calibration
from envs.cryoem.types import ActionLevel, FeatureSet, HoleTable, NavigationConfig
from ssl2rl_ray.algorithms.networks import HoleNetwork, make_network
from ssl2rl_ray.algorithms.policy import Artefact, TorchPolicy
from ssl2rl_ray.loop.rollout import roll_out_all

DURATION_MIN = 480.0


def training_squares(seed: int, share: float) -> HoleTable:
    """Some of the squares of a Y3-like session."""
    rng = np.random.default_rng(seed)
    table = draw_session(rng, "y3-mini")
    squares = rng.permutation(len(table.square_name))
    return table.select(np.isin(table.square_id, squares[: round(share * len(squares))]))


def untrained(rules: NavigationConfig, stack: SessionStack) -> TorchPolicy:
    """A policy with the weights that it would begin to learn from."""
    torch.manual_seed(0)
    return Artefact(
        weights=make_network(rules, stack).state_dict(),
        rules=rules,
        calibration=synthetic_calibration(),
        hidden_sizes=(64, 64),
        is_dueling=None,
        is_residual=True,
    ).make(stack)


def arithmetic(network: HoleNetwork, num_rollouts: int) -> Callable[[], None]:
    """One pass through the layers for M episodes, on tensors of the shapes of a roll-out."""
    expander = network.expander
    num_patches = expander.num_groups[0]
    group = torch.rand(num_rollouts, num_patches, len(expander.group_columns))
    session = torch.zeros(num_rollouts, dtype=torch.long)

    @torch.inference_mode()
    def run() -> None:
        per_patch, own = network.first_layer(group)
        network.cell_values(per_patch, own, session)

    @torch.inference_mode()
    def run_per_patch() -> None:
        per_patch, own = network.first_layer(group)
        network.values_of(per_patch + torch.ones(num_rollouts, num_patches, 1) * own)

    return run_per_patch if network.is_patch else run


def seconds(
    policy: Policy, stack: SessionStack, rules: NavigationConfig, starts: Sequence[int]
) -> tuple[float, float]:
    """Of a full roll-out, and of the network's passes within it (0 where it has none)."""
    apart = 0.0
    network = getattr(policy, "network", None)
    forward = arithmetic(network, len(starts)) if isinstance(network, HoleNetwork) else None

    def on_step(_: float) -> None:
        nonlocal apart
        if forward:
            began = time.perf_counter()
            forward()
            apart += time.perf_counter() - began

    began = time.perf_counter()
    roll_out_all(
        [policy],
        stack,
        rules,
        start_hole=np.array(starts),
        duration_min=DURATION_MIN,
        exploration=0.0,
        rng=np.random.default_rng(0),
        on_step=on_step,
    )
    return time.perf_counter() - began - apart, apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.75, help="of the squares")
    parser.add_argument("--rollouts", type=int, default=5, help="M, side by side")
    parser.add_argument("--only", default="", help="part of the policy's name")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = training_squares(0, args.share)
    rules = NavigationConfig.preset("paper", budget_min=DURATION_MIN)
    stack = SessionStack.of([table], rules)
    starts = np.random.default_rng(1).integers(0, len(table), args.rollouts).tolist()
    effects = synthetic_calibration().effects

    def learned(feature_set: FeatureSet, level: ActionLevel) -> TorchPolicy:
        chosen = NavigationConfig.preset(
            "paper", feature_set=feature_set, action_level=level, budget_min=DURATION_MIN
        )
        return untrained(chosen, stack)

    players: dict[str, Policy] = {
        "lagrange": make_planner("lagrange", stack, rules, effects),
        "DQN, rates": learned("rates", "hole"),
        "DQN, paper, patch level": learned("paper", "patch"),
        "DQN, paper, hole level": learned("paper", "hole"),
    }
    report: dict[str, dict[str, float]] = {}
    print(f"{args.rollouts} roll-outs side by side over {len(table)} holes, one thread")
    for name, policy in players.items():
        if args.only not in name:
            continue
        total, within = seconds(policy, stack, rules, starts)
        report[name] = {"seconds": total}
        line = f"{name:24} {total:7.1f} s"
        if within:
            report[name] |= {"network_s": within, "share_outside": (total - within) / total}
            line += f", of them {within:.1f} s in the network: {1 - within / total:.0%} outside"
        print(line, flush=True)
    if args.json:
        print(json.dumps({"num_holes": len(table), **report}))


if __name__ == "__main__":
    main()
