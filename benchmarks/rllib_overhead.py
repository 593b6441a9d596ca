"""RLlib DQN against a bare PyTorch loop: the same env, network, replay and loss.

CPU time per env step + update (one update for each env step), one thread, feature set ``paper``.
The ratio is bare / RLlib: 1 = RLlib costs nothing. Also: a Rainbow update (all six parts that a
network per hole has) by RLlib's learner against the same update by hand, replay included; and env
steps per second of RLlib's own env runner against ours, with the same env and network.
Usage: python benchmarks/rllib_overhead.py
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from typing import Any

import numpy as np
import ray
import torch
from expander import session
from gymnasium.wrappers.vector import DictInfoToList
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.stack import SessionStack
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms import dqn, rainbow
from ssl2rl_ray.algorithms.losses import (
    bootstrap_value,
    cross_entropy,
    kl_divergence,
    project,
    td_error,
    weighted_huber,
)
from ssl2rl_ray.algorithms.module import epsilon_greedy
from ssl2rl_ray.algorithms.networks import HoleNetwork, make_network, support_of
from ssl2rl_ray.algorithms.noisy import resample
from ssl2rl_ray.algorithms.replay import Replay
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import DQNConfig, RainbowConfig

RULES = NavigationConfig.preset("cryorl", feature_set="paper", budget_min=480)
NUM_ENVS = 8


@functools.cache
def stack(num_holes: int) -> SessionStack:
    return SessionStack.of([session(num_holes, np.random.default_rng(0))], RULES)


def make_env(num_holes: int, *, num_envs: int, seed: int) -> CryoEMVectorEnv:
    return CryoEMVectorEnv(stack(num_holes), RULES, num_envs, seed=seed)


def network(num_holes: int) -> HoleNetwork:
    made = make_network(RULES, stack(num_holes))
    assert isinstance(made, HoleNetwork)
    return made


def tensors(observation: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in observation.items()}


class Bare:
    """What one would write by hand."""

    def __init__(self, num_holes: int, recipe: DQNConfig) -> None:
        """Makes env, networks, optimiser and replay."""
        self.recipe = recipe
        self.env = make_env(num_holes, num_envs=NUM_ENVS, seed=0)
        self.network = network(num_holes)
        self.target = copy.deepcopy(self.network)
        self.adam = torch.optim.Adam(self.network.parameters(), recipe.learning_rate)
        self.replay = Replay(
            capacity=recipe.buffer_capacity,
            num_streams=NUM_ENVS,
            n_step=recipe.n_step,
            discount_per_min=recipe.discount_per_min,
        )
        self.rng = np.random.default_rng(0)
        self.observation, _ = self.env.reset(seed=0)
        self.has_ended = np.zeros(NUM_ENVS, bool)
        self.num_updates = 0

    def step(self, num_updates: int) -> None:
        """One vector step and that many updates."""
        before = self.observation
        with torch.no_grad():
            action = epsilon_greedy(self.network(tensors(before)), 0.1).numpy()
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        self.replay.push(
            observation={key: value[None] for key, value in before.items()},
            action=action[None],
            reward=reward[None],
            minutes=(self.observation["elapsed_min"] - before["elapsed_min"]).T,
            is_terminated=terminated[None],
            is_truncated=truncated[None],
            is_move=~self.has_ended[None],
            is_continued=np.ones(NUM_ENVS, bool),
        )
        self.has_ended = terminated
        for _ in range(num_updates):
            self.update()

    def update(self) -> None:
        """One update of the network."""
        batch = self.replay.sample(self.recipe.batch_size, self.rng)
        with torch.no_grad():
            reached = self.network.expand(tensors(batch["next_obs"]))
            value = bootstrap_value(self.target.score(reached), self.network.score(reached))
        q = self.network.taken(tensors(batch["obs"]), torch.as_tensor(batch["action"]))
        reward, discount, weight = (
            torch.as_tensor(batch[key]) for key in ("reward", "discount", "weight")
        )
        loss = weighted_huber(td_error(q, reward, discount, value), weight)
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.max_grad_norm)
        self.adam.step()
        self.num_updates += 1
        if self.num_updates % self.recipe.target_update_interval == 0:
            self.target.load_state_dict(self.network.state_dict())


def ratio(num_holes: int, batch_size: int, num_rounds: int) -> None:
    recipe = DQNConfig(batch_size=batch_size, learning_starts=500, updates_per_env_step=1.0)
    training = TrainingConfig(num_env_steps=10**6, num_envs_per_runner=NUM_ENVS)
    algorithm = dqn.build(
        recipe,
        training,
        make_env=functools.partial(make_env, num_holes),
        make_network=functools.partial(network, num_holes),
        seed=0,
    )
    bare = Bare(num_holes, recipe)
    torch.set_num_threads(1)
    while algorithm.num_updates == 0:
        algorithm.train()
    for _ in range(70):
        bare.step(0)
    bare.step(1)
    ms: dict[str, list[float]] = {"rllib": [], "bare": []}
    for _ in range(num_rounds):  # in turn, so that the neighbours disturb both alike
        begun, updates = time.process_time(), algorithm.num_updates
        algorithm.train()
        ms["rllib"].append(1e3 * (time.process_time() - begun) / (algorithm.num_updates - updates))
        begun, updates = time.process_time(), bare.num_updates
        for _ in range(training.rollout_length):
            bare.step(NUM_ENVS)
        ms["bare"].append(1e3 * (time.process_time() - begun) / (bare.num_updates - updates))
    algorithm.stop()
    rllib, by_hand = np.median(ms["rllib"]), np.median(ms["bare"])
    print(
        f"{num_holes} holes, batch {batch_size}: bare {by_hand:.2f} ms, RLlib {rllib:.2f} ms CPU "
        f"per env step + update; ratio {by_hand / rllib:.2f}"
    )


class BareRainbow:
    """A Rainbow update as one would write it by hand, from the replay of another."""

    def __init__(self, num_holes: int, recipe: RainbowConfig, replay: Replay) -> None:
        """Makes networks and optimiser."""
        self.recipe, self.replay = recipe, replay
        self.network = distributional(num_holes, recipe)
        self.target = copy.deepcopy(self.network)
        self.adam = torch.optim.Adam(self.network.parameters(), recipe.learning_rate)
        self.rng = np.random.default_rng(0)
        self.num_updates = 0

    def update(self) -> None:
        """One update of the network and of the priorities."""
        support = self.network.support
        assert support is not None
        batch = self.replay.sample(self.recipe.batch_size, self.rng, 0.5)
        reward, discount, weight = (
            torch.as_tensor(batch[key]) for key in ("reward", "discount", "weight")
        )
        with torch.no_grad():
            resample(self.network)
            resample(self.target)
            reached = self.network.expand(tensors(batch["next_obs"]))
            best, action = self.network.score(reached).max(1)
            logits, _ = self.target.at(reached, action)
            p = logits.softmax(1)
            z = reward[:, None] * self.recipe.reward_scale
            z = z + (discount * ~best.isneginf())[:, None] * support
            target = project(z, p, support)
        resample(self.network)
        here = self.network.expand(tensors(batch["obs"]))
        logits, _ = self.network.at(here, torch.as_tensor(batch["action"]))
        loss = (weight * cross_entropy(logits, target)).mean()
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.max_grad_norm)
        self.adam.step()
        surprise = kl_divergence(logits.detach(), target)
        self.replay.update_priorities(batch["index"], surprise.numpy())
        self.num_updates += 1
        if self.num_updates % self.recipe.target_update_interval == 0:
            self.target.load_state_dict(self.network.state_dict())


def distributional(num_holes: int, recipe: RainbowConfig) -> HoleNetwork:
    made = make_network(
        RULES,
        stack(num_holes),
        support=support_of(recipe, 0.0, 100.0),
        initial_noise=recipe.initial_noise,
    )
    assert isinstance(made, HoleNetwork)
    return made


def rainbow_updates(num_holes: int, batch_size: int, num_rounds: int) -> None:
    recipe = RainbowConfig(batch_size=batch_size, learning_starts=500, updates_per_env_step=0.02)
    algorithm = rainbow.build(
        recipe,
        TrainingConfig(num_env_steps=10**6, num_envs_per_runner=NUM_ENVS),
        make_env=functools.partial(make_env, num_holes),
        make_network=functools.partial(distributional, num_holes, recipe),
        seed=0,
    )
    torch.set_num_threads(1)
    while algorithm.num_updates == 0:
        algorithm.train()
    bare = BareRainbow(num_holes, recipe, algorithm.replay)
    bare.update()
    ms: dict[str, list[float]] = {"rllib": [], "bare": []}
    for _ in range(num_rounds):  # in turn, so that the neighbours disturb both alike
        for name, update in (
            ("rllib", functools.partial(algorithm._update, is_last=False)),
            ("bare", bare.update),
        ):
            begun = time.process_time()
            for _ in range(5):
                update()
            ms[name].append(1e3 * (time.process_time() - begun) / 5)
    algorithm.stop()
    rllib, by_hand = np.median(ms["rllib"]), np.median(ms["bare"])
    print(
        f"{num_holes} holes, batch {batch_size}: Rainbow update: bare {by_hand:.2f} ms, RLlib "
        f"{rllib:.2f} ms CPU; ratio {by_hand / rllib:.2f}"
    )


class StockRunner(SingleAgentEnvRunner):
    """RLlib's own, with our vector env."""

    def make_env(self) -> None:
        """Makes the vector env."""
        make = self.config.env_config["make_env"]
        self.num_envs = self.config.num_envs_per_env_runner
        self.env = DictInfoToList(make(num_envs=self.num_envs, seed=0))


def runners(num_holes: int, num_envs: int) -> None:
    speeds: dict[str, float] = {}
    for name, cls in (("ours", None), ("stock", StockRunner)):
        algorithm = dqn.build(
            DQNConfig(),
            TrainingConfig(num_envs_per_runner=num_envs, rollout_length=16),
            make_env=functools.partial(make_env, num_holes),
            make_network=functools.partial(network, num_holes),
            seed=0,
        )
        torch.set_num_threads(1)
        runner: Any = algorithm.env_runner_group.local_env_runner
        if cls is not None:
            runner = cls(config=algorithm.config, worker_index=0)
        runner.sample()
        begun = time.process_time()
        for _ in range(5):
            runner.sample()
        speeds[name] = 5 * 16 * num_envs / (time.process_time() - begun)
        algorithm.stop()
    print(
        f"{num_holes} holes, {num_envs} episodes: env steps per CPU second: RLlib's runner "
        f"{speeds['stock']:,.0f}, ours {speeds['ours']:,.0f}; "
        f"ratio {speeds['ours'] / speeds['stock']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=["rainbow"], help="the figure of that algorithm")
    args = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for num_holes, batch_size in ((1197, 64), (200, 64)):
        rainbow_updates(num_holes, batch_size, args.rounds)
    if args.only == "rainbow":
        return
    for num_holes, batch_size in ((1197, 32), (1197, 64), (200, 32), (200, 64)):
        ratio(num_holes, batch_size, args.rounds)
    for num_holes, num_envs in ((200, 64), (1197, 64), (1197, 8)):
        runners(num_holes, num_envs)
    ray.shutdown()


if __name__ == "__main__":
    main()
