"""CartPole-v1: mean return of the last 20 episodes against env steps, of several seeds.

The bars of these algorithms: A2C at least 475 within 100,000 env steps in 5 seeds, without a later
collapse within 200,000; ACKTR at least 450 within 100,000, and 400 in fewer than A2C; asynchronous
A2C with two runners at least 450 within 150,000. Settings are the same for all seeds.
Usage: python benchmarks/cartpole.py a2c --seeds 5 --steps 200000
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch

from ssl2rl_ray.algorithms.actor_critic import VectorActorCritic
from ssl2rl_ray.algorithms.registry import ALGORITHMS
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import (
    TuningA2CConfig,
    TuningACKTRConfig,
    TuningAsyncA2CConfig,
    TuningPPOConfig,
)

NUM_LAST = 20
RECIPES: dict[str, tuple[Any, dict[str, int]]] = {
    "a2c": (
        TuningA2CConfig(
            discount=0.99,
            trace_decay=0.95,
            learning_rate=2e-3,
            final_learning_rate=0.0,
            entropy_weight=0.01,
            value_weight=0.5,
            max_grad_norm=0.5,
            reward_scale=0.1,
            hidden_sizes=(64, 64),
        ),
        {"num_envs_per_runner": 8, "rollout_length": 8},
    ),
    "async_a2c": (
        TuningAsyncA2CConfig(
            discount=0.99,
            trace_decay=0.95,
            learning_rate=2e-3,
            final_learning_rate=0.0,
            entropy_weight=0.01,
            max_grad_norm=0.5,
            is_standardized=False,
            reward_scale=0.1,
            hidden_sizes=(64, 64),
        ),
        {"num_envs_per_runner": 8, "rollout_length": 16, "num_env_runners": 2},
    ),
    "acktr": (
        TuningACKTRConfig(
            discount=0.99, is_standardized=False, reward_scale=0.1, hidden_sizes=(64, 64)
        ),
        {"num_envs_per_runner": 8, "rollout_length": 32},
    ),
    "ppo": (
        TuningPPOConfig(
            discount=0.99,
            learning_rate=1e-3,
            final_learning_rate=0.0,
            hidden_sizes=(64, 64),
            reward_scale=0.1,
        ),
        {"num_envs_per_runner": 8, "rollout_length": 64},
    ),
}
"""Recipe and sizes of each algorithm."""


def make_env(*, num_envs: int, seed: int) -> gym.vector.VectorEnv[Any, Any, Any]:
    return gym.make_vec("CartPole-v1", num_envs, vectorization_mode="sync")


def network(hidden_sizes: tuple[int, ...]) -> VectorActorCritic:
    return VectorActorCritic(4, 2, hidden_sizes)


def learn(name: str, seed: int, num_env_steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """First env step at 400, 450 and 475, and the lowest mean return after that."""
    recipe, sizes = RECIPES[name]
    recipe = type(recipe)(**{**vars(recipe), **changes})
    algorithm = ALGORITHMS[name](
        recipe,
        TrainingConfig(num_env_steps=num_env_steps, **sizes),
        make_env=make_env,
        make_network=functools.partial(network, recipe.hidden_sizes),
        seed=seed,
    )
    torch.set_num_threads(1)
    begun = time.perf_counter()
    last = algorithm.episode_returns = deque(maxlen=NUM_LAST)
    reached: dict[int, int] = {}
    lowest, entropy, mean, curve = np.inf, np.nan, 0.0, []
    next_point = 0
    while algorithm.num_env_steps < num_env_steps:
        result = algorithm.train()
        told = result.get("learners", {}).get("default_policy", {})
        entropy = float(told.get("entropy", np.nan))
        if len(last) < NUM_LAST:
            continue
        mean = float(np.mean(last))
        for bar in (400, 450, 475):
            if mean >= bar:
                reached.setdefault(bar, algorithm.num_env_steps)
        if 475 in reached:
            lowest = min(lowest, mean)
        if algorithm.num_env_steps >= next_point:
            curve.append(round(mean))
            next_point += 20_000
    algorithm.stop()
    return {
        "seed": seed,
        "reached": reached,
        "lowest_after": lowest,
        "last": mean,
        "entropy": entropy,
        "curve": curve,
        "s": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("algorithm", choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--set", action="append", default=[], help="field=number of the recipe")
    args = parser.parse_args()
    changes = {k: float(v) for k, v in (item.split("=") for item in args.set)}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        found = learn(args.algorithm, seed, args.steps, changes)
        at = "  ".join(f"{bar} at {found['reached'].get(bar, 'never')}" for bar in (400, 450, 475))
        print(
            f"{args.algorithm} seed {seed}: {at}; lowest after 475: {found['lowest_after']:.0f}; "
            f"at the end {found['last']:.0f}, entropy {found['entropy']:.2f}; every 20,000 steps "
            f"{found['curve']}; {found['s']:.0f} s",
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
