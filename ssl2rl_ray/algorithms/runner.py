"""An env runner that moves all its episodes in one numpy step and returns columns, not episodes."""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import torch
import tree
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, SAMPLE_TIMER

Columnar = dict[str, Any]
"""A fragment: ``observation`` (K, E, ...), a dict of arrays or one, ``action``, ``reward``,
``minutes``, ``is_terminated``, ``is_truncated``, ``is_move`` (K, E); ``is_continued`` (E,);
``last_observation`` (E, ...), which the last row reached; and ``action_logp``,
``action_dist_inputs`` (K, E, ...) of modules that give them."""


class ColumnarEnvRunner(SingleAgentEnvRunner):
    """Samples K = ``rollout_fragment_length`` vector steps as columns.

    RLlib's own runner makes an object of every episode and passes every step of every episode
    through connectors, in Python; with many episodes of a small session side by side that doubles
    the cost of a step (``benchmarks/rllib_overhead.py``), and what it returns must go through
    connectors again before it can be learned from. ``env_config["make_env"]`` makes the
    vector env from ``num_envs`` and ``seed``; it must reset in the next step (gymnasium's
    ``AutoresetMode.NEXT_STEP``). ``minutes`` of a step come from the observation's ``elapsed_min``;
    without it each step takes 1. Continuous actions are cut off at the bounds of their space when
    they are played, and recorded as they were drawn. ``env_config["potential"]``, if there, gives
    (E,) of an observation; the ``reward`` that is learned from is then r + potential(reached) -
    potential(here), the potential of an end being 0 (Ng et al. 1999, theorem 1, undiscounted).
    Returns are logged without it.
    """

    def make_env(self) -> None:
        """Makes the vector env; each runner has a seed of its own."""
        if self.env is not None:
            self.env.close()
        make = self.config.env_config["make_env"]
        self.num_envs = self.config.num_envs_per_env_runner
        self.env = make(num_envs=self.num_envs, seed=self._seed)
        self._observation: Any = None
        self._needs_initial_reset = True

    def make_module(self) -> None:
        """Makes the network; asserts that its tables are those of the env."""
        super().make_module()
        tables = getattr(getattr(self.module, "network", None), "expander", None)
        if tables is not None and (stack := getattr(self.env, "stack", None)) is not None:
            hashes = tuple(str(value) for value in stack.table_hash)
            assert tables.table_hash == hashes, (
                "the network's tables and the env's sessions differ: make both from one stack"
            )

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> Columnar:
        """Plays K vector steps; a move that goes past the fragment is continued by the next.

        ``num_timesteps`` counts steps of all episodes together. Whole episodes
        (``num_episodes``) and ``random_actions`` are not for training: use ``train.play``.
        """
        if num_episodes is not None or random_actions:
            raise ValueError(
                "num_episodes, random_actions: this runner plays fragments; whole episodes are "
                "played by ssl2rl_ray.train.play, random actions by epsilon_initial = 1"
            )
        if self.env is None or self.module is None:
            raise ValueError("this runner has no env: set num_env_runners=0 or use remote runners")
        with self.metrics.log_time(SAMPLE_TIMER):
            if num_timesteps is None:
                num_rows = int(self.config.get_rollout_fragment_length(self.worker_index))
            else:
                num_rows = max(1, num_timesteps // self.num_envs)
            return self._play(
                num_rows, self.config.explore if explore is None else explore, force_reset
            )

    def _play(self, num_rows: int, explore: bool, force_reset: bool) -> Columnar:
        is_continued = not (force_reset or self._needs_initial_reset)
        if not is_continued:
            self._observation, _ = self.env.reset(
                seed=self._seed_of_env() if self._needs_initial_reset else None
            )
            self._needs_initial_reset = False
            self._has_ended = np.zeros(self.num_envs, np.bool_)
            self._return = np.zeros(self.num_envs)
            self._length = np.zeros(self.num_envs, np.int64)
            self._started_s = np.full(self.num_envs, time.perf_counter())
        shape = (num_rows, self.num_envs)
        columns: Columnar = {
            "observation": tree.map_structure(
                lambda value: np.empty((*shape, *value.shape[1:]), value.dtype), self._observation
            ),
            "reward": np.empty(shape, np.float32),
            "minutes": np.ones(shape, np.float32),
            "is_terminated": np.empty(shape, np.bool_),
            "is_truncated": np.empty(shape, np.bool_),
            "is_move": np.empty(shape, np.bool_),
            "is_continued": np.full(self.num_envs, is_continued),
            "worker_index": self.worker_index or 0,
            "episode_returns": [],
        }
        forward = self.module.forward_exploration if explore else self.module.forward_inference
        potential = self.config.env_config.get("potential")
        space = self.env.single_action_space
        has_clock = isinstance(self._observation, dict) and "elapsed_min" in self._observation
        num_runners = self.config.num_env_runners or 1
        num_steps = num_ended = 0
        for row in range(num_rows):
            observation = self._observation
            tree.map_structure(partial(_put, row), columns["observation"], observation)
            batch = {
                Columns.OBS: tree.map_structure(
                    lambda value: torch.as_tensor(value, device=self._device), observation
                )
            }
            t = self.num_env_steps_sampled_lifetime + num_steps * num_runners
            given = {k: v.cpu().numpy() for k, v in forward(batch, t=t).items()}
            for key, value in given.items():
                name = "action" if key == Columns.ACTIONS else key
                if row == 0:
                    columns[name] = np.empty((num_rows, *value.shape), value.dtype)
                columns[name][row] = value
            action = given[Columns.ACTIONS]
            if isinstance(space, spaces.Box):
                action = np.clip(action, space.low, space.high)
            reached, reward, terminated, truncated, _ = self.env.step(action)
            is_move = ~self._has_ended
            columns["reward"][row] = reward
            if potential is not None:
                gain = np.where(terminated, 0, potential(reached)) - potential(observation)
                columns["reward"][row] += gain
            if has_clock:
                minutes = reached["elapsed_min"] - observation["elapsed_min"]
                columns["minutes"][row] = minutes[:, 0]
            columns["is_terminated"][row] = terminated
            columns["is_truncated"][row] = truncated
            columns["is_move"][row] = is_move
            num_steps += int(is_move.sum())
            self._return += reward * is_move
            self._length += is_move
            self._has_ended = terminated | truncated
            for episode in np.flatnonzero(self._has_ended):
                num_ended += 1
                columns["episode_returns"].append(float(self._return[episode]))
                self._end_episode(episode)
            self._observation = reached
        columns["last_observation"] = tree.map_structure(np.array, self._observation)
        self.num_env_steps_sampled_lifetime += num_steps * num_runners
        self._increase_sampled_metrics(num_steps, num_ended)
        return columns

    def _seed_of_env(self) -> int | None:
        """Another one where a run goes on: the sessions of its beginning were played already."""
        num_played = int(self.num_env_steps_sampled_lifetime)
        if self._seed is None or not num_played:
            return self._seed
        return int(np.random.SeedSequence([self._seed, num_played]).generate_state(1)[0])

    def _end_episode(self, episode: int) -> None:
        now = time.perf_counter()
        self._log_episode_metrics(
            int(self._length[episode]),
            float(self._return[episode]),
            now - self._started_s[episode],
        )
        self._return[episode], self._length[episode] = 0.0, 0
        self._started_s[episode] = now

    def get_metrics(self) -> dict[str, Any]:
        """What was logged since the last call."""
        return self.metrics.reduce()


def _put(row: int, column: np.ndarray, value: np.ndarray) -> None:
    column[row] = value


def play_fragments(algorithm: Any) -> list[Columnar]:
    """One fragment from every runner of an algorithm that answers in time.

    What the runners logged goes to the algorithm's metrics, finished episodes to its
    ``episode_returns``.
    """
    sampled: Any = synchronous_parallel_sample(
        worker_set=algorithm.env_runner_group,
        concat=False,
        sample_timeout_s=algorithm.config.sample_timeout_s,
        _uses_new_env_runners=True,
        _return_metrics=True,
    )
    fragments, results = sampled
    if fragments:
        algorithm.metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        algorithm.episode_returns.extend(r for f in fragments for r in f["episode_returns"])
    return fragments
