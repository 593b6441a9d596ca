"""Rainbow against DQN, and Rainbow without each of its parts, on a small standard task.

Tasks of bsuite (Osband et al. 2020, arXiv:1908.03568), written anew as numpy vector envs:

catch         10 x 5 board, a ball falls, the paddle must be below it: -1 or 1 at the end only, so
              the reward is sparse and late; by chance -0.6. The default: as bsuite has it, learned
              within a minute, and values have to travel back over nine moves.
large_catch   The same on 20 x 10, too much for 10,000 steps: seeds differ more than algorithms do.
deep_sea      N x N, one move in each of N rows; only N times to the right (which of the two actions
              that is differs from cell to cell) is worth 1, and every right costs 0.01 / N: what is
              found by chance in 2^N episodes. Neither learns it in 12,000 steps.

DQN is Mnih et al. 2015: uniform replay, one-step targets of its target network, epsilon-greedy. All
variants have the same network width, batch, learning rate, replay and number of updates. The
learning rate is the best of 0.001, 0.003, 0.006 and 0.01 for DQN and for Rainbow, found in one to
three runs each that are none of those reported; at 0.003 and 5,000 steps their difference is within
the seeds' (8 seeds each: 0.056, from -0.044 to 0.124). Nothing was tuned per variant. The score of
a run is the mean return of all its episodes, exploration included: how fast it learns and how well
it plays. Printed: the interquartile mean over seeds with a 95 % stratified bootstrap interval, and
of the differences to Rainbow.
Usage: python benchmarks/rainbow_ablations.py --seeds 8 --ablation-seeds 4
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ssl2rl_ray.algorithms.networks import VectorNetwork, support_of
from ssl2rl_ray.algorithms.registry import ALGORITHMS
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import DQNConfig, RainbowConfig
from ssl2rl_ray.stats import difference, estimate

NUM_ENVS = 4
SEA_SIZE = 10
SHAPES = {"catch": (10, 5), "large_catch": (20, 10), "deep_sea": (SEA_SIZE + 1, SEA_SIZE)}
RETURNS = {"catch": (-1.0, 1.0), "large_catch": (-1.0, 1.0), "deep_sea": (-0.01, 1.0)}
"""The lowest and the highest of each task: the support."""
COMMON: dict[str, Any] = {
    "learning_rate": 1e-2,
    "final_learning_rate": 1e-2,
    "discount_per_min": 0.99,
    "hidden_sizes": (64, 64),
    "batch_size": 32,
    "buffer_capacity": 10_000,
    "learning_starts": 200,
    "updates_per_env_step": 0.25,
    "target_update_interval": 50,
    "max_grad_norm": 10.0,
    "reward_scale": 1.0,
}
GREEDY = {"epsilon_initial": 1.0, "epsilon_final": 0.05, "epsilon_steps": 2_000}
VARIANTS: dict[str, DQNConfig | RainbowConfig] = {
    "dqn": DQNConfig(**COMMON, **GREEDY, n_step=1, double_q=False, dueling=False),
    "rainbow": RainbowConfig(**COMMON),
    "without double": RainbowConfig(**COMMON, double_q=False),
    "without dueling": RainbowConfig(**COMMON, dueling=False),
    "without priorities": RainbowConfig(**COMMON, is_prioritized=False),
    "without n-step": RainbowConfig(**COMMON, n_step=1),
    "without distributions": RainbowConfig(**COMMON, is_distributional=False),
    "without noise": RainbowConfig(**COMMON, **GREEDY, is_noisy=False),
}


class Board(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Episodes of equal length, reset in the next step; the observation is a flat board."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(self, task: str, num_envs: int, mapping_seed: int) -> None:
        """``mapping_seed``: of what the actions of ``deep_sea`` do."""
        self.is_catch, self.num_envs, self.at = task != "deep_sea", num_envs, np.arange(num_envs)
        self.shape = SHAPES[task]
        rng = np.random.default_rng([mapping_seed, SEA_SIZE])
        self.right = rng.integers(0, 2, (SEA_SIZE, SEA_SIZE))
        self.num_features = self.shape[0] * self.shape[1]
        self.num_actions = 3 if self.is_catch else 2
        self.single_observation_space = spaces.Box(0, 1, (self.num_features,), np.float32)
        self.single_action_space = spaces.Discrete(self.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A ball in a random column and the paddle in the middle; or the first row's left end."""
        super().reset(seed=seed)
        self.row, self.is_over = 0, False
        self.ball = self.np_random.integers(0, self.shape[1], self.num_envs)
        self.column = np.full(self.num_envs, self.shape[1] // 2 if self.is_catch else 0)
        return self.observe(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        """One row down."""
        reward, nothing = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        if self.is_over:
            return self.reset()[0], reward, nothing, nothing.copy(), {}
        self.is_over = self.row == self.shape[0] - 2
        if self.is_catch:
            self.column = np.clip(self.column + np.asarray(actions) - 1, 0, self.shape[1] - 1)
            reward += self.is_over * np.where(self.column == self.ball, 1.0, -1.0)
        else:
            is_right = np.asarray(actions) == self.right[self.row, self.column]
            reward += is_right * (-0.01 / SEA_SIZE)
            reward += self.is_over & is_right & (self.column == SEA_SIZE - 1)
            self.column = np.clip(self.column + np.where(is_right, 1, -1), 0, SEA_SIZE - 1)
        self.row += 1
        return self.observe(), reward, np.full(self.num_envs, self.is_over), nothing, {}

    def observe(self) -> np.ndarray:
        """(E, F) where the ball and the paddle are, or the diver."""
        board = np.zeros((self.num_envs, *self.shape), np.float32)
        if self.is_catch:
            board[self.at, self.row, self.ball] = 1
            board[self.at, -1, self.column] = 1
        else:
            board[self.at, self.row, self.column] = 1
        return board.reshape(self.num_envs, -1)


def make_env(task: str, run_seed: int, *, num_envs: int, seed: int) -> Board:
    return Board(task, num_envs, run_seed)


def network(task: str, recipe: DQNConfig | RainbowConfig) -> VectorNetwork:
    board, parts = Board(task, 1, 0), {}
    if isinstance(recipe, RainbowConfig):
        parts["support"] = support_of(recipe, *RETURNS[task])
        parts["initial_noise"] = recipe.initial_noise if recipe.is_noisy else None
    return VectorNetwork(
        board.num_features,
        board.num_actions,
        recipe.hidden_sizes,
        is_dueling=recipe.dueling is not False,
        **parts,
    )


def play(task: str, name: str, seed: int, num_env_steps: int) -> dict[str, Any]:
    """One run: returns of its episodes, in order, averaged over each tenth."""
    recipe = VARIANTS[name]
    algorithm = ALGORITHMS[recipe.name](
        recipe,
        TrainingConfig(num_env_steps=num_env_steps, num_envs_per_runner=NUM_ENVS, rollout_length=8),
        make_env=functools.partial(make_env, task, seed),
        make_network=functools.partial(network, task, recipe),
        seed=seed,
    )
    torch.set_num_threads(1)
    returns = algorithm.episode_returns = deque()
    begun = time.process_time()
    while algorithm.num_env_steps < num_env_steps:
        algorithm.train()
    cpu_s = time.process_time() - begun
    algorithm.stop()
    tenths = [float(part.mean()) for part in np.array_split(np.array(returns), 10)]
    return {
        "task": task,
        "variant": name,
        "seed": seed,
        "num_env_steps": num_env_steps,
        "score": float(np.mean(returns)),
        "last_tenth": tenths[-1],
        "tenths": [round(value, 3) for value in tenths],
        "cpu_s": round(cpu_s, 1),
    }


def report(rows: list[dict[str, Any]]) -> None:
    """A line for each variant."""
    rng = np.random.default_rng(0)
    scores = {
        name: np.array([row["score"] for row in rows if row["variant"] == name])
        for name in VARIANTS
    }
    last = {
        name: [row["last_tenth"] for row in rows if row["variant"] == name] for name in VARIANTS
    }
    print("variant                seeds  IQM of the mean return      last tenth  minus Rainbow")
    for name, values in scores.items():
        if len(values) < 2:
            continue
        found = estimate([values], rng)
        line = (
            f"{name:<22} {len(values):>5}  {found.value:6.3f} "
            f"[{found.ci95[0]:6.3f}, {found.ci95[1]:6.3f}]  {np.mean(last[name]):10.3f}"
        )
        if name != "rainbow" and len(scores["rainbow"]) > 1:
            gap = difference([values], [scores["rainbow"]], rng)
            line += f"  {gap.value:6.3f} [{gap.ci95[0]:6.3f}, {gap.ci95[1]:6.3f}]"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(RETURNS), default="catch")
    parser.add_argument("--seeds", type=int, default=8, help="of DQN and Rainbow")
    parser.add_argument("--ablation-seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rows", type=Path, help="JSON lines: runs are added, all are reported")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.rows is not None and args.rows.exists():
        rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
        rows = [r for r in rows if (r["task"], r["num_env_steps"]) == (args.task, args.steps)]
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=40)
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in range(args.first_seed, args.first_seed + max(args.seeds, args.ablation_seeds)):
        for name in args.variants:
            num_seeds = args.seeds if name in ("dqn", "rainbow") else args.ablation_seeds
            if seed >= args.first_seed + num_seeds or (name, seed) in done:
                continue
            rows.append(play(args.task, name, seed, args.steps))
            print(json.dumps(rows[-1]), flush=True)
            if args.rows is not None:
                with args.rows.open("a") as stream:
                    stream.write(json.dumps(rows[-1]) + "\n")
    ray.shutdown()
    report(rows)


if __name__ == "__main__":
    main()
