"""DQN on RLlib: columns from the runners, our replay, the learner group's update.

Mnih et al. 2015 (doi:10.1038/nature14236) with double Q-learning, n-step returns discounted per
minute, and prioritised replay. ``build`` makes the algorithm from our config.
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import logging
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from gymnasium.vector import VectorEnv
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn import dqn as rllib_dqn
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module import RLModuleSpec
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    REPLAY_BUFFER_SAMPLE_TIMER,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TD_ERROR_KEY,
    TIMERS,
)
from torch import nn

from ssl2rl_ray.algorithms.losses import td_error, weighted_huber
from ssl2rl_ray.algorithms.module import Q_TM1, V_T, NavigationModule
from ssl2rl_ray.algorithms.replay import Replay
from ssl2rl_ray.algorithms.runner import Columnar, ColumnarEnvRunner, play_fragments
from ssl2rl_ray.checkpoint import check_same_network, to_arrays, to_tensors
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import DQNConfig, TuningValueAlgorithm, ValueAlgorithm

MakeEnv = Callable[..., VectorEnv]
"""``make_env(num_envs=..., seed=...)``; it travels to the runners, so it must be picklable."""
MakeNetwork = Callable[[], nn.Module]
Potential = Callable[[dict[str, np.ndarray]], np.ndarray]
"""(E,) of an observation of E episodes: what shapes the reward (runner.py)."""
Parts = tuple[type["DQN"], type["DQNLearner"], type[NavigationModule]]
"""What runs, what learns, what acts."""


class NavigationDQNConfig(rllib_dqn.DQNConfig):
    """RLlib's config object, carrying ours; made by ``build`` and by nothing else."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        """``recipe`` and ``num_env_steps`` (of the whole run) are set by ``build``."""
        super().__init__(algo_class=algo_class or DQN)
        self.recipe: ValueAlgorithm | TuningValueAlgorithm = DQNConfig()
        self.num_env_steps = TrainingConfig().num_env_steps

    def validate(self) -> None:
        """Raises ValueError for settings of RLlib's that nothing here would read."""
        super().validate()
        default = rllib_dqn.DQNConfig()
        for name, instead in _UNREAD.items():
            if getattr(self, name) != getattr(default, name):
                raise ValueError(f"{name}: is ignored by {self.algo_class.__name__}; {instead}")


_UNREAD = {
    "noisy": "use algorithm rainbow with is_noisy",
    "sigma0": "use initial_noise of algorithm rainbow",
    "num_atoms": "use is_distributional and num_atoms of algorithm rainbow",
    "v_min": "use v_min of algorithm rainbow",
    "v_max": "use v_max of algorithm rainbow",
    "dueling": "use dueling of the recipe",
    "double_q": "use double_q of the recipe",
    "epsilon": "use epsilon_initial, epsilon_final and epsilon_steps of the recipe",
    "hiddens": "use hidden_sizes of the recipe",
    "target_network_update_freq": "use target_update_interval of the recipe",
    "tau": "use target_update_rate of the recipe",
    "replay_buffer_config": "use buffer_capacity and is_prioritized of the recipe",
    "store_buffer_in_checkpoints": "use training.is_buffer_saved",
    "num_steps_sampled_before_learning_starts": "use learning_starts of the recipe",
    "training_intensity": "use updates_per_env_step of the recipe",
    "td_error_loss_fn": "the loss is Huber's, or the cross entropy of distributions",
    "adam_epsilon": "RLlib's own Adam has no such setting either; change learning_rate",
    "categorical_distribution_temperature": "use epsilon_initial of the recipe",
    "before_learn_on_batch": "change the batch in DQN._update",
    "burn_in_len": "the networks have no memory",
}
"""RLlib's settings that have no effect here, and what has."""


class DQNLearner(TorchLearner):
    """Huber's loss of the double-Q error; targets follow by number of updates."""

    def build(self) -> None:
        """Makes the module, its optimiser and the target networks."""
        super().build()
        self.module.foreach_module(lambda _, module: module.unwrapped().make_target_networks())
        self.num_updates = 0

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """The scalar loss of one batch; logs errors (for priorities) and values."""
        q_tm1 = fwd_out[Q_TM1]
        error = td_error(q_tm1, batch[Columns.REWARDS], batch["discount"], fwd_out[V_T])
        loss = weighted_huber(error, batch["weight"])
        if config.recipe.is_prioritized:
            self.metrics.log_value((module_id, TD_ERROR_KEY), error.detach(), reduce="item_series")
        self.metrics.log_dict(
            {"loss": loss.detach(), "q_mean": q_tm1.detach().mean()}, key=module_id, window=1
        )
        return loss

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Lets the learning rate fall (RLlib's schedule) and the targets follow."""
        super().after_gradient_based_update(timesteps=timesteps)
        self.num_updates += 1
        recipe = self.config.recipe
        if self.num_updates % recipe.target_update_interval == 0:
            for module in self.module._rl_modules.values():
                for network, target in module.unwrapped().get_target_network_pairs():
                    follow(target, network, recipe.target_update_rate)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's, and the number of updates."""
        return {**super().get_state(*args, **kwargs), "num_updates": self.num_updates}

    def set_state(self, state: dict[str, Any]) -> None:
        """The opposite of ``get_state``."""
        super().set_state(state)
        self.num_updates = int(state.get("num_updates", self.num_updates))


@torch.no_grad()
def follow(target: nn.Module, network: nn.Module, rate: float) -> None:
    """Target <- target + rate (network - target), parameter by parameter."""
    for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
        slow.lerp_(fast, rate)


class DQN(rllib_dqn.DQN):
    """RLlib's DQN with a training step of its own.

    Columns go from the runners into ``Replay``, ready batches from there to the learner group:
    no episode objects and no connectors on the way.
    """

    @classmethod
    def get_default_config(cls) -> NavigationDQNConfig:
        """The config class that belongs to this algorithm."""
        return NavigationDQNConfig()

    @classmethod
    def _create_local_replay_buffer_if_necessary(cls, config: AlgorithmConfig) -> None:
        return None

    def _setup_logdir(self) -> None:
        """Nothing is written there; Tune's own way leaves empty folders in ``~/ray_results``."""
        self._logdir = tempfile.gettempdir()

    def setup(self, config: AlgorithmConfig) -> None:
        """Builds runners, learners and the replay."""
        super().setup(config)
        recipe = self.config.recipe
        self.replay = Replay(
            capacity=recipe.buffer_capacity,
            num_streams=max(1, int(self.config.num_env_runners or 0))
            * int(self.config.num_envs_per_env_runner),
            n_step=recipe.n_step,
            discount_per_min=recipe.discount,
            is_prioritized=recipe.is_prioritized,
            priority_exponent=recipe.priority_exponent,
        )
        self.num_env_steps = 0
        self.num_updates = 0
        self._learning_starts = recipe.learning_starts
        self._updates_due = 0.0
        self.episode_returns: deque[float] = deque(maxlen=self.replay.num_streams)
        """Of the last finished episodes, as many as are played side by side."""
        self._rng = np.random.default_rng([self.config.seed or 0, 1])

    @property
    def mean_return(self) -> float | None:
        """The mean of ``episode_returns``; None = none yet."""
        return float(np.mean(self.episode_returns)) if self.episode_returns else None

    def training_step(self) -> None:
        """One fragment from every runner, then the updates that are due for it."""
        recipe = self.config.recipe
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            if not (fragments := play_fragments(self)):
                return
            columns = side_by_side(fragments, max(1, self.config.num_env_runners))
            self.replay.push(**columns)
            num_new = int(columns["is_move"].sum())
        self.num_env_steps += num_new
        if self.num_env_steps < self._learning_starts or not len(self.replay):
            return
        self._updates_due += num_new * recipe.updates_per_env_step
        num_updates = int(self._updates_due)
        self._updates_due -= num_updates
        for update in range(num_updates):
            self._update(is_last=update == num_updates - 1)
        if num_updates:
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self._sync_runners()

    def _update(self, *, is_last: bool) -> None:
        recipe = self.config.recipe
        with self.metrics.log_time((TIMERS, REPLAY_BUFFER_SAMPLE_TIMER)):
            done = min(1.0, self.num_env_steps / self.config.num_env_steps)
            beta = recipe.importance_exponent + (1 - recipe.importance_exponent) * done
            batch = self.replay.sample(recipe.batch_size, self._rng, beta)
        columns = {
            Columns.OBS: _as_seen(batch["obs"]),
            Columns.NEXT_OBS: _as_seen(batch["next_obs"]),
            Columns.ACTIONS: batch["action"],
            Columns.REWARDS: batch["reward"] * np.float32(recipe.reward_scale),
            "discount": batch["discount"],
            "weight": batch["weight"],
        }
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            results = self.learner_group.update(
                batch=MultiAgentBatch(
                    {DEFAULT_MODULE_ID: SampleBatch(columns)}, env_steps=recipe.batch_size
                ),
                timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps},
                # Reducing metrics costs a millisecond; one row per fragment is enough.
                _no_metrics_reduce=not (is_last or recipe.is_prioritized),
            )
        self.num_updates += 1
        if recipe.is_prioritized:
            errors = [result[DEFAULT_MODULE_ID].pop(TD_ERROR_KEY).peek() for result in results]
            self.replay.update_priorities(
                batch["index"], np.concatenate([np.asarray(error) for error in errors])
            )
        if results[0] is not None:
            self.metrics.aggregate(results, key=LEARNER_RESULTS)

    def _sync_runners(self) -> None:
        """Sends weights and the step count (epsilon hangs on it) to every runner."""
        state = self.learner_group.get_state(components="learner/rl_module", inference_only=True)[
            "learner"
        ]
        state = {key: state[key] for key in ("rl_module", "weights_seq_no")}
        state[NUM_ENV_STEPS_SAMPLED_LIFETIME] = self.num_env_steps
        if self.env_runner_group.num_remote_workers() == 0:
            self.env_runner.set_state(state)
            return
        reference = ray.put(state)
        self.env_runner_group.foreach_env_runner(
            lambda runner: runner.set_state(ray.get(reference)), local_env_runner=False
        )

    def network_state(self) -> dict[str, torch.Tensor]:
        """The weights that are judged and kept, on the CPU; what ``policy.Artefact`` stores.

        With ``is_averaged`` those of the target network, which follows slowly.
        """
        module = self.learner_group.get_state(components="learner/rl_module")["learner"]
        weights = module["rl_module"][DEFAULT_MODULE_ID]
        prefix = "target_network." if self.config.recipe.is_averaged else "network."
        return {
            name.removeprefix(prefix): torch.as_tensor(np.asarray(value)).clone()
            for name, value in weights.items()
            if name.startswith(prefix)
        }

    def checkpoint(self, *, has_replay: bool = False) -> dict[str, Any]:
        """All that goes on after a restart, as tensors, numbers and strings.

        ``torch.load(weights_only=True)`` reads it back: nothing is unpickled. Episodes under way
        are not stored: other ones begin (runner.py); remote runners keep no random state.
        """
        learner = self.learner_group.get_state()["learner"]
        state = {
            "num_env_steps": self.num_env_steps,
            "num_updates": self.num_updates,
            "updates_due": self._updates_due,
            "weights_seq_no": learner["weights_seq_no"],
            "learner_num_updates": learner["num_updates"],
            "module": learner["rl_module"][DEFAULT_MODULE_ID],
            "optimizer": learner["optimizer"],
            "numpy_rng": repr(self._rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
        }
        if has_replay:
            state["replay"] = self.replay.state_dict()
        return to_tensors(state)

    def restore_checkpoint(self, state: dict[str, Any]) -> None:
        """Goes on from ``checkpoint``; raises ValueError if the networks differ.

        Without a replay in it updates wait, as at the start, until ``learning_starts`` env steps
        are there to sample from.
        """
        state = to_arrays(state)
        learner = self.learner_group.get_state(components="learner/rl_module")["learner"]
        check_same_network(learner["rl_module"][DEFAULT_MODULE_ID], state["module"])
        self.learner_group.set_state(
            {
                "learner": {
                    "rl_module": {DEFAULT_MODULE_ID: state["module"]},
                    "optimizer": state["optimizer"],
                    "weights_seq_no": state["weights_seq_no"],
                    "num_updates": state["learner_num_updates"],
                }
            }
        )
        self.num_env_steps = state["num_env_steps"]
        self.num_updates = state["num_updates"]
        self._updates_due = state["updates_due"]
        self._rng.bit_generator.state = ast.literal_eval(state["numpy_rng"])
        torch.set_rng_state(torch.from_numpy(state["torch_rng"]))
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
        else:
            self._learning_starts += self.num_env_steps
        self._sync_runners()


def side_by_side(fragments: list[Columnar], num_runners: int) -> Columnar:
    """One fragment of all streams; those of a runner that did not answer are empty."""
    fragments = [{**f, "observation": _as_dict(f["observation"])} for f in fragments]
    by_runner = {max(0, int(f["worker_index"]) - 1): f for f in fragments}
    first = fragments[0]
    keys = ("action", "reward", "minutes", "is_terminated", "is_truncated", "is_move")
    missing = {key: np.zeros_like(first[key]) for key in (*keys, "is_continued")}
    missing["observation"] = {k: np.zeros_like(v) for k, v in first["observation"].items()}
    parts = [by_runner.get(index, missing) for index in range(num_runners)]
    columns: Columnar = {key: np.concatenate([p[key] for p in parts], axis=1) for key in keys}
    columns["is_continued"] = np.concatenate([p["is_continued"] for p in parts])
    columns["observation"] = {
        key: np.concatenate([p["observation"][key] for p in parts], axis=1)
        for key in first["observation"]
    }
    return columns


def _as_dict(observation: Any) -> dict[str, np.ndarray]:
    """What the replay keeps of an observation, which may be one array."""
    return observation if isinstance(observation, dict) else {"": observation}


def _as_seen(observation: dict[str, np.ndarray]) -> Any:
    """The opposite of ``_as_dict``."""
    return observation.get("", observation)


def build(
    config: ValueAlgorithm | TuningValueAlgorithm,
    training: TrainingConfig,
    *,
    make_env: MakeEnv,
    make_network: MakeNetwork,
    seed: int,
    potential: Potential | None = None,
    parts: Parts | None = None,
) -> DQN:
    """The algorithm, ready to ``train()``; one call of it is one fragment of every runner.

    ``parts`` are those of an algorithm that shares this loop (rainbow.py).
    ``ssl2rl_ray.config.check`` says which settings go together.
    """
    algorithm_class, learner_class, module_class = parts or (DQN, DQNLearner, NavigationModule)
    learning_rate = [[0, config.learning_rate]]
    if config.final_learning_rate != config.learning_rate:
        learning_rate.append([training.num_env_steps, config.final_learning_rate])
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # it greets with a paragraph
    rllib = NavigationDQNConfig(algorithm_class)
    rllib.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
    rllib.recipe = config
    rllib.num_env_steps = training.num_env_steps
    rllib.environment(
        env="ssl2rl-navigation", env_config={"make_env": make_env, "potential": potential}
    )
    rllib.env_runners(
        env_runner_cls=ColumnarEnvRunner,
        num_env_runners=training.num_env_runners,
        num_envs_per_env_runner=training.num_envs_per_runner,
        rollout_fragment_length=training.rollout_length,
        create_local_env_runner=training.num_env_runners == 0,
    )
    rllib.training(
        lr=learning_rate if len(learning_rate) > 1 else config.learning_rate,
        train_batch_size_per_learner=config.batch_size,
        grad_clip=config.max_grad_norm,
        grad_clip_by="global_norm",
        n_step=1,  # ours is in the replay; RLlib's must not exceed the fragment
    )
    rllib.learners(num_learners=0, learner_class=learner_class)
    rllib.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=module_class,
            model_config={
                "make_network": make_network,
                "is_double": config.double_q,
                "epsilon": (config.epsilon_initial, config.epsilon_final, config.epsilon_steps),
            },
        )
    )
    rllib.reporting(
        min_time_s_per_iteration=0,
        min_sample_timesteps_per_iteration=0,
        metrics_num_episodes_for_smoothing=training.num_envs_per_runner,
    )
    rllib.debugging(seed=seed, log_level="ERROR")
    rllib._dont_auto_sync_env_runner_states = True  # ours sends the step count too
    algorithm = rllib.build_algo()
    assert isinstance(algorithm, DQN)
    return algorithm
