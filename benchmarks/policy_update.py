"""An A2C update by RLlib's learner against the same update in bare PyTorch.

The same fragment (8 steps of 8 episodes: batch 64), network (every hole of a session scored,
feature set ``paper``) and loss; CPU time of one thread, taken in turn. The ratio is bare / RLlib:
1 = RLlib costs nothing. Usage: python benchmarks/policy_update.py
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import numpy as np
import ray
import torch
from rllib_overhead import RULES, make_env, stack

from ssl2rl_ray.algorithms import a2c
from ssl2rl_ray.algorithms.actor_critic import HoleActorCritic, make_actor_critic
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import NavigationA2CConfig


def network(num_holes: int) -> HoleActorCritic:
    made = make_actor_critic(RULES, stack(num_holes))
    assert isinstance(made, HoleActorCritic)
    return made


class Bare:
    """What one would write by hand."""

    def __init__(self, num_holes: int, recipe: NavigationA2CConfig) -> None:
        """Makes network and optimiser."""
        self.recipe = recipe
        self.network = network(num_holes)
        self.adam = torch.optim.Adam(self.network.parameters(), recipe.learning_rate)

    def update(self, fragment: dict[str, Any]) -> None:
        """One update from a fragment of columns."""
        recipe = self.recipe
        num_steps, num_envs = fragment["reward"].shape
        rows = {
            key: torch.as_tensor(np.concatenate([value, fragment["last_observation"][key][None]]))
            for key, value in fragment["observation"].items()
        }
        expanded = self.network.expand({k: v.flatten(0, 1) for k, v in rows.items()})
        logits, value = self.network.score(expanded), self.network.value(expanded)
        value = value.view(num_steps + 1, num_envs)
        logits = logits.view(num_steps + 1, num_envs, -1)[:-1]
        reward, minutes, terminated, is_move = (
            torch.as_tensor(fragment[k]) for k in ("reward", "minutes", "is_terminated", "is_move")
        )
        discount = recipe.discount_per_min**minutes
        with torch.no_grad():
            error = recipe.reward_scale * reward + discount * value[1:] * ~terminated - value[:-1]
            advantage, trace = torch.empty_like(error), torch.zeros(num_envs)
            for t in reversed(range(num_steps)):
                trace = error[t] + discount[t] * recipe.trace_decay * trace * ~terminated[t]
                advantage[t] = trace
            target = advantage + value[:-1]
            advantage = (advantage - advantage[is_move].mean()) / advantage[is_move].std()
        policy = torch.distributions.Categorical(logits=logits[is_move], validate_args=False)
        logp = policy.log_prob(torch.as_tensor(fragment["action"])[is_move])
        loss = (
            -(logp * advantage[is_move]).mean()
            + recipe.value_weight * (target - value[:-1])[is_move].square().mean()
            - recipe.entropy_weight * policy.entropy().mean()
        )
        self.adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), recipe.max_grad_norm)
        self.adam.step()


def ratio(num_holes: int, num_rounds: int) -> None:
    recipe = NavigationA2CConfig()
    algorithm = a2c.build(
        recipe,
        TrainingConfig(num_env_steps=10**6, num_envs_per_runner=8, rollout_length=8),
        make_env=functools.partial(make_env, num_holes),
        make_network=functools.partial(network, num_holes),
        seed=0,
    )
    torch.set_num_threads(1)
    fragment = a2c.beside([algorithm.env_runner_group.local_env_runner.sample()])
    bare = Bare(num_holes, recipe)
    updates = {"rllib": algorithm.learn, "bare": bare.update}
    ms: dict[str, list[float]] = {name: [] for name in updates}
    for update in updates.values():
        update(fragment)
    for _ in range(num_rounds):  # in turn, so that the neighbours disturb both alike
        for name, update in updates.items():
            begun = time.process_time()
            for _ in range(5):
                update(fragment)
            ms[name].append(1e3 * (time.process_time() - begun) / 5)
    algorithm.stop()
    rllib, by_hand = np.median(ms["rllib"]), np.median(ms["bare"])
    print(
        f"{num_holes} holes, batch 64: A2C update: bare {by_hand:.2f} ms, RLlib {rllib:.2f} ms "
        f"CPU; ratio {by_hand / rllib:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for num_holes in (1197, 200):
        ratio(num_holes, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
