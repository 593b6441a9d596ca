"""Advantage actor-critic on RLlib: columns from the runners, one update for each fragment.

Mnih et al. 2016 (arXiv:1602.01783), the synchronous form of their algorithm S3, with generalised
advantages (Schulman et al. 2016, arXiv:1506.02438) where asked. ``build`` makes the algorithm from
our config. Shape letters: T steps of a fragment, E episodes side by side.
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
import tree
from gymnasium.vector import VectorEnv
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
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
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from torch import Tensor, nn

from ssl2rl_ray.algorithms import policy_losses
from ssl2rl_ray.algorithms.policy_module import ActorCriticModule
from ssl2rl_ray.algorithms.returns import gae, n_step_returns, next_values
from ssl2rl_ray.algorithms.runner import Columnar, ColumnarEnvRunner, play_fragments
from ssl2rl_ray.checkpoint import check_same_network, to_arrays, to_tensors
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import A2CConfig

MakeEnv = Callable[..., VectorEnv[Any, Any, Any]]
"""``make_env(num_envs=..., seed=...)``; it travels to the runners, so it must be picklable."""
MakeNetwork = Callable[[], nn.Module]
Potential = Callable[[Any], np.ndarray]
"""(E,) of an observation of E episodes: what shapes the reward (runner.py)."""

_NO_EPISODES = "no episode objects are made: read `episode_returns`"
IGNORED = {
    "num_learners": "one learner is enough for networks of this size: leave it at 0",
    "num_epochs": "A2C passes over a fragment once: use ppo for more",
    "minibatch_size": "A2C learns from the whole fragment: use ppo for parts of it",
    "shuffle_batch_per_epoch": "a fragment stays in the order of time: use ppo",
    "batch_mode": "fragments have `rollout_length` steps, and the value stands for what follows",
    "use_gae": "advantages are always generalised: set trace_decay of the recipe to 1 for sums",
    "_env_to_module_connector": "observations go to the module as they are: change the env",
    "_module_to_env_connector": "actions go to the env as they were drawn: change the env",
    "_learner_connector": "batches are made of columns: change the learner's loss",
    "callbacks_on_episode_start": _NO_EPISODES,
    "callbacks_on_episode_step": _NO_EPISODES,
    "callbacks_on_episode_end": _NO_EPISODES,
    "policies_to_train": "there is one policy, and it is trained",
    "evaluation_interval": "policies are validated by `ssl2rl run`, and played by train.play",
}
"""Settings of RLlib's configs that this stack would ignore, and what to do instead."""


class A2CAlgorithmConfig(AlgorithmConfig):
    """RLlib's config object, carrying ours; made by ``build`` and by nothing else."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        """``recipe`` and ``num_env_steps`` (of the whole run) are set by ``build``."""
        super().__init__(algo_class=algo_class or A2C)
        self.recipe: Any = A2CConfig()
        self.discount = 0.99
        self.num_env_steps = TrainingConfig().num_env_steps

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Ours; ``build`` says with which network."""
        return RLModuleSpec(module_class=ActorCriticModule)

    def get_default_learner_class(self) -> type[TorchLearner]:
        """The learner that belongs to this algorithm."""
        return A2CTorchLearner

    def validate(self) -> None:
        """RLlib's checks, and ValueError for a setting that would be ignored."""
        refuse_ignored(self, A2CAlgorithmConfig())
        super().validate()


def refuse_ignored(
    config: AlgorithmConfig, default: AlgorithmConfig, *, but: Sequence[str] = ()
) -> None:
    """Raises ValueError, with the alternative, for a setting that nothing would read."""
    if config.in_evaluation:  # RLlib's own copy, which says "complete_episodes" by itself
        return
    for name, instead in IGNORED.items():
        if name not in but and getattr(config, name, None) != getattr(default, name, None):
            raise ValueError(f"{name.removeprefix('_')}: would be ignored; {instead}")


class A2CTorchLearner(TorchLearner):
    """Policy gradient, value and entropy of a fragment in one pass through the network.

    A batch is one fragment, time first: (T + 1) rows of E episodes, of which the last has only the
    observation that the fragment reached.
    """

    def build(self) -> None:
        """Makes the module and its optimiser."""
        super().build()
        self.entropy_weight = self.config.recipe.entropy_weight

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Lets the weight of the entropy fall with the env steps."""
        super().before_gradient_based_update(timesteps=timesteps)
        recipe = self.config.recipe
        done = min(1.0, timesteps[NUM_ENV_STEPS_SAMPLED_LIFETIME] / self.config.num_env_steps)
        fall = recipe.final_entropy_weight - recipe.entropy_weight
        self.entropy_weight = recipe.entropy_weight + done * fall

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """The scalar loss of one fragment."""
        recipe = config.recipe
        num_rows = config.rollout_fragment_length + 1
        fragment = {
            name: value.view(num_rows, -1, *value.shape[1:])[:-1]
            for name, value in batch.items()
            if name != Columns.OBS
        }
        values = fwd_out[Columns.EMBEDDINGS].view(num_rows, -1)
        output = fwd_out[Columns.ACTION_DIST_INPUTS]
        distribution = (
            self.module[module_id]
            .unwrapped()
            .action_dist_cls.from_logits(output.view(num_rows, -1, *output.shape[1:])[:-1])
        )
        logp = distribution.logp(fragment[Columns.ACTIONS])
        advantage, target = self.advantage_and_target(fragment, values.detach(), logp.detach())
        is_move, value = fragment["is_move"], values[:-1]
        if recipe.is_standardized:
            advantage = policy_losses.standardized(advantage, is_move)
        policy_loss = policy_losses.policy_gradient_loss(logp, advantage, is_move)
        value_loss = policy_losses.value_loss(value, target, is_move)
        entropy = policy_losses.mean_over(distribution.entropy(), is_move)
        loss = policy_loss + recipe.value_weight * value_loss - self.entropy_weight * entropy
        with torch.no_grad():
            spread = policy_losses.mean_over(
                (target - policy_losses.mean_over(target, is_move)) ** 2, is_move
            )
            told = {  # by the names of RLlib's PPO
                "policy_loss": policy_loss,
                "vf_loss": value_loss,
                "vf_explained_var": 1 - value_loss / spread.clamp(min=1e-8),
                "entropy": entropy,
            }
        self.metrics.log_dict({k: v.detach() for k, v in told.items()}, key=module_id, window=1)
        self.metrics.log_value((module_id, "curr_entropy_coeff"), self.entropy_weight, window=1)
        return loss

    def advantage_and_target(
        self, fragment: dict[str, Tensor], values: Tensor, logp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(T, E) each, from columns (T, E), values (T + 1, E) and log-probabilities (T, E)."""
        recipe = self.config.recipe
        value, following = values[:-1], next_values(values[:-1], values[-1])
        ends = fragment["is_terminated"], fragment["is_truncated"]
        reward, discount = fragment[Columns.REWARDS], fragment["discount"]
        if recipe.n_step is not None:
            target = n_step_returns(reward, following, *ends, discount, recipe.n_step)
            return target - value, target
        advantage = gae(reward, value, following, *ends, discount, recipe.trace_decay)
        return advantage, advantage + value


class A2C(Algorithm):
    """Samples from every runner, then learns from all fragments together."""

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """The config class that belongs to this algorithm."""
        return A2CAlgorithmConfig()

    def _setup_logdir(self) -> None:
        """Nothing is written there; Tune's own way leaves empty folders in ``~/ray_results``."""
        self._logdir = tempfile.gettempdir()

    def setup(self, config: AlgorithmConfig) -> None:
        """Builds runners and learner."""
        super().setup(config)
        self.num_env_steps = self.num_updates = 0
        num_streams = max(1, int(self.config.num_env_runners or 0)) * int(
            self.config.num_envs_per_env_runner
        )
        self.episode_returns: deque[float] = deque(maxlen=num_streams)

    @property
    def mean_return(self) -> float | None:
        """Of the last finished episodes, as many as are played side by side; None = none yet."""
        return float(np.mean(self.episode_returns)) if self.episode_returns else None

    def training_step(self) -> None:
        """One fragment from every runner, then what is learned from it."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            if not (fragments := play_fragments(self)):
                return
        columns = beside(fragments)
        self.num_env_steps += int(columns["is_move"].sum())
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            self.metrics.aggregate(self.learn(columns), key=LEARNER_RESULTS)
        self.num_updates += 1
        with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
            self.sync_runners()

    def learn(self, columns: Columnar) -> list[Any]:
        """One update from (T, E) columns; the learner's metrics."""
        batch = fragment_batch(columns, self.config.recipe.reward_scale, self.config.discount)
        return self.learner_group.update(
            batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(batch)),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps},
        )

    def runner_state(self) -> dict[str, Any]:
        """Weights and the step count, as runners take them."""
        state = self.learner_group.get_state(components="learner/rl_module")["learner"]
        # without RLlib's number of the weights: a runner would ignore those of a number it had
        return {
            "rl_module": state["rl_module"],
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps,
        }

    def sync_runners(self) -> None:
        """Sends weights and the step count to every runner."""
        state = self.runner_state()
        if self.env_runner_group.num_remote_workers() == 0:
            self.env_runner.set_state(state)
            return
        reference = ray.put(state)
        self.env_runner_group.foreach_env_runner(
            lambda runner: runner.set_state(ray.get(reference)), local_env_runner=False
        )

    def network_state(self) -> dict[str, Tensor]:
        """The weights of policy and value, on the CPU; what an artefact stores."""
        module = self.learner_group.get_state(components="learner/rl_module")["learner"]
        weights = module["rl_module"][DEFAULT_MODULE_ID]
        return {
            name.removeprefix("network."): torch.as_tensor(np.asarray(value)).clone()
            for name, value in weights.items()
        }

    def checkpoint(self) -> dict[str, Any]:
        """All that goes on after a restart, as tensors, numbers and strings.

        ``torch.load(weights_only=True)`` reads it back: nothing is unpickled. Episodes under way
        are not stored: other ones begin (runner.py); remote runners keep no random state.
        """
        learner = self.learner_group.get_state()["learner"]
        _, keys, position, *_ = np.random.get_state()  # RLlib shuffles by it
        state = {
            "num_env_steps": self.num_env_steps,
            "num_updates": self.num_updates,
            "module": learner["rl_module"][DEFAULT_MODULE_ID],
            "optimizer": learner["optimizer"],
            "numpy_rng": [np.asarray(keys, np.int64), int(position)],
            "torch_rng": torch.get_rng_state(),
        }
        return to_tensors(state)

    def restore_checkpoint(self, state: dict[str, Any]) -> None:
        """Goes on from ``checkpoint``; raises ValueError if the networks differ."""
        state = to_arrays(state)
        learner = self.learner_group.get_state(components="learner/rl_module")["learner"]
        check_same_network(learner["rl_module"][DEFAULT_MODULE_ID], state["module"])
        self.learner_group.set_state(
            {
                "learner": {
                    "rl_module": {DEFAULT_MODULE_ID: state["module"]},
                    "optimizer": state["optimizer"],
                }
            }
        )
        self.num_env_steps, self.num_updates = state["num_env_steps"], state["num_updates"]
        keys, position = state["numpy_rng"]
        np.random.set_state(("MT19937", keys.astype(np.uint32), position))
        torch.set_rng_state(torch.from_numpy(state["torch_rng"]))
        self.sync_runners()


def beside(fragments: list[Columnar]) -> Columnar:
    """One fragment of the streams of all runners that answered."""
    merged: Columnar = {}
    for name in fragments[0].keys() - {"worker_index", "episode_returns"}:
        axis = 0 if name in _OF_STREAMS else 1
        merged[name] = tree.map_structure(
            lambda *parts, axis=axis: np.concatenate(parts, axis), *(f[name] for f in fragments)
        )
    return merged


_OF_STREAMS = ("is_continued", "last_observation")
"""Columns (E, ...); all others are (T, E, ...)."""


def fragment_columns(columns: Columnar, reward_scale: float, discount: float) -> dict[str, Any]:
    """What is learned from: observations (T + 1, E, ...), the last reached; all others (T, E)."""
    return {
        Columns.OBS: tree.map_structure(
            lambda rows, last: np.concatenate([rows, last[None]]),
            columns["observation"],
            columns["last_observation"],
        ),
        Columns.ACTIONS: columns["action"],
        Columns.ACTION_LOGP: columns[Columns.ACTION_LOGP],
        Columns.REWARDS: columns["reward"] * np.float32(reward_scale),
        "discount": np.float32(discount) ** columns["minutes"],
        **{name: columns[name] for name in ("is_terminated", "is_truncated", "is_move")},
    }


def fragment_batch(columns: Columnar, reward_scale: float, discount: float) -> SampleBatch:
    """``fragment_columns`` as (T + 1) E rows, time first; the last E are observations only."""
    fragment = fragment_columns(columns, reward_scale, discount)
    observation = fragment.pop(Columns.OBS)
    padded = {name: np.concatenate([v, np.zeros_like(v[:1])]) for name, v in fragment.items()}
    return SampleBatch(flat({Columns.OBS: observation, **padded}))


def flat(columns: dict[str, Any]) -> dict[str, Any]:
    """(T, E, ...) columns as (T E, ...) rows."""
    rows: Any = tree.map_structure(lambda value: value.reshape(-1, *value.shape[2:]), columns)
    return rows


def build(
    config: A2CConfig,
    training: TrainingConfig,
    *,
    make_env: MakeEnv,
    make_network: MakeNetwork,
    seed: int,
    potential: Potential | None = None,
) -> A2C:
    """The algorithm; one ``train()`` is one fragment of every runner and one update.

    ``ssl2rl_ray.config.check`` says which settings go together; ``config`` must have ``discount``.
    """
    rllib = A2CAlgorithmConfig()
    rllib.recipe, rllib.discount = config, config.discount
    rllib.num_env_steps = training.num_env_steps
    common_settings(rllib, config, training, make_env, make_network, seed, potential)
    algorithm = rllib.build_algo()
    assert isinstance(algorithm, A2C)
    return algorithm


def common_settings(
    rllib: AlgorithmConfig,
    config: Any,
    training: TrainingConfig,
    make_env: MakeEnv,
    make_network: MakeNetwork,
    seed: int,
    potential: Potential | None,
) -> None:
    """What all learners of policies tell RLlib."""
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # it greets with a paragraph
    num_streams = max(1, training.num_env_runners) * training.num_envs_per_runner
    rllib.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
    rllib.environment(env="ssl2rl", env_config={"make_env": make_env, "potential": potential})
    rllib.env_runners(
        env_runner_cls=ColumnarEnvRunner,
        num_env_runners=training.num_env_runners,
        num_envs_per_env_runner=training.num_envs_per_runner,
        rollout_fragment_length=training.rollout_length,
        create_local_env_runner=training.num_env_runners == 0,
    )
    rllib.training(
        lr=schedule(config.learning_rate, config.final_learning_rate, training.num_env_steps),
        gamma=config.discount,
        train_batch_size_per_learner=num_streams * training.rollout_length,
        grad_clip=config.max_grad_norm,
        grad_clip_by="global_norm",
    )
    rllib.learners(num_learners=0, add_default_connectors_to_learner_pipeline=False)
    rllib.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=ActorCriticModule, model_config={"make_network": make_network}
        )
    )
    rllib.reporting(
        min_time_s_per_iteration=0,
        min_sample_timesteps_per_iteration=0,
        metrics_num_episodes_for_smoothing=training.num_envs_per_runner,
        log_gradients=True,  # their norm, also where none is cut off
    )
    rllib.debugging(seed=seed, log_level="ERROR")
    rllib._dont_auto_sync_env_runner_states = True  # ours sends the step count too


def schedule(first: float, final: float, num_env_steps: int) -> float | list[list[float]]:
    """A straight line in RLlib's words."""
    return first if first == final else [[0, first], [num_env_steps, final]]
