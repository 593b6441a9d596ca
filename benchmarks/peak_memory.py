"""Peak resident memory of training with a full 50,000-step buffer at 6489 holes.

The buffer is filled by the real runner, then updates run. Usage: python benchmarks/peak_memory.py
"""

from __future__ import annotations

import argparse
import functools
import resource

import numpy as np
import ray
import torch
from expander import session

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.features import NUM_FEATURES
from envs.cryoem.stack import SessionStack
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms import dqn
from ssl2rl_ray.algorithms.networks import QNetwork, make_network
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import DQNConfig

RULES = NavigationConfig.preset("cryorl", feature_set="paper", budget_min=480)


@functools.cache
def stack(num_holes: int) -> SessionStack:
    return SessionStack.of([session(num_holes, np.random.default_rng(0))], RULES)


def make_env(num_holes: int, *, num_envs: int, seed: int) -> CryoEMVectorEnv:
    return CryoEMVectorEnv(stack(num_holes), RULES, num_envs, seed=seed)


def network(num_holes: int) -> QNetwork:
    return make_network(RULES, stack(num_holes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holes", type=int, default=6489)
    parser.add_argument("--steps", type=int, default=50_000)
    args = parser.parse_args()
    torch.set_num_threads(2)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    recipe = DQNConfig(
        buffer_capacity=args.steps,
        learning_starts=args.steps,
        batch_size=128,
        updates_per_env_step=0.01,
        epsilon_initial=1.0,
        epsilon_final=1.0,
    )
    algorithm = dqn.build(
        recipe,
        TrainingConfig(num_env_steps=10**6, num_envs_per_runner=64),
        make_env=functools.partial(make_env, args.holes),
        make_network=functools.partial(network, args.holes),
        seed=0,
    )
    while algorithm.num_env_steps < args.steps or algorithm.num_updates < 20:
        algorithm.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    buffer = algorithm.replay.payload_bytes_per_step * args.steps / 2**30
    width = NUM_FEATURES["paper"] * RULES.num_past_steps
    full = 2 * 4 * args.holes * width * args.steps / 2**30
    print(
        f"{args.holes} holes, {args.steps} steps stored ({len(algorithm.replay)} windows): peak "
        f"{peak:.2f} GiB, of which replay {buffer:.3f} GiB; features per hole would be "
        f"{full:.0f} GiB: ratio {full / peak:.0f}"
    )
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
