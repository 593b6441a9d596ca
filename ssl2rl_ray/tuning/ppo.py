"""RLlib's PPO on many experiments side by side: whole episodes as columns, no episode objects.

Schulman et al. 2017 (arXiv:1707.06347) with generalised advantages (Schulman et al. 2016,
arXiv:1506.02438). Loss, minibatches, optimiser and network are RLlib's own; its sampler, which
makes an object of every episode and passes every step through connectors in Python, is not: at 256
episodes in one numpy step it would be most of the time (``benchmarks/sfx_train.py``).

Shape letters: T steps of an episode, E episodes side by side, F observation, K actions.
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from ray.rllib.algorithms import ppo as rllib_ppo
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from torch import nn

from envs.crystfel.types import FloatArray
from ssl2rl_ray.algorithms.dqn import _map_arrays
from ssl2rl_ray.config import TuningTrainingConfig
from ssl2rl_ray.recipes import PPOConfig
from ssl2rl_ray.tuning.policy import MAX_LOG_SPREAD

MakeEnv = Callable[..., VectorEnv[Any, Any, Any]]
"""``make_env(num_envs=..., seed=...)``; all its episodes are equally long."""
_DISTRIBUTION = (Columns.ACTIONS, Columns.ACTION_LOGP, Columns.ACTION_DIST_INPUTS)


class TuningModule(DefaultPPOTorchRLModule):
    """RLlib's network; a Gaussian policy begins with a spread that fits the actions' range."""

    def setup(self) -> None:
        """Builds the network, then sets the spread of the first actions."""
        super().setup()
        if isinstance(self.action_space, spaces.Box):
            last = [layer for layer in self.pi.modules() if isinstance(layer, nn.Linear)][-1]
            num = last.out_features // 2  # means, then logs of spreads
            with torch.no_grad():
                last.weight.mul_(0.1)
                last.bias[:num] = 0.0
                last.bias[num:] = float(np.log(INITIAL_SPREAD))


INITIAL_SPREAD = 0.5
"""Sd of the first actions, which are cut off at -1 and 1."""


class EpisodeRunner(SingleAgentEnvRunner):
    """Plays one whole episode of every experiment in a vector env of ours."""

    def make_env(self) -> None:
        """Makes the vector env; each runner has a seed of its own."""
        if self.env is not None:
            self.env.close()
        self.num_envs = self.config.num_envs_per_env_runner
        self.env = self.config.env_config["make_env"](num_envs=self.num_envs, seed=self._seed)
        self.num_episodes_begun = 0

    def sample(self, **_: Any) -> dict[str, FloatArray]:
        """Columns (T, E, ...) of observations, actions and their distribution, and rewards."""
        # another seed where a run goes on: the experiments of its beginning were played already
        seed = [self._seed or 0, int(self.num_env_steps_sampled_lifetime)]
        fresh = int(np.random.SeedSequence(seed).generate_state(1)[0])
        observation, _ = self.env.reset(seed=None if self.num_episodes_begun else fresh)
        self.num_episodes_begun += self.num_envs
        distribution = self.module.get_exploration_action_dist_cls()
        rows: list[dict[str, Any]] = []
        is_over = False
        while not is_over:
            with torch.no_grad():
                batch = {Columns.OBS: torch.as_tensor(observation)}
                inputs = self.module.forward_exploration(batch)[Columns.ACTION_DIST_INPUTS]
                policy = distribution.from_logits(inputs)
                action = policy.sample()
                logp = policy.logp(action)
            row = {
                Columns.OBS: observation,
                Columns.ACTIONS: action.numpy(),
                Columns.ACTION_LOGP: logp.numpy(),
                Columns.ACTION_DIST_INPUTS: inputs.numpy(),
            }
            observation, reward, terminated, _, _ = self.env.step(row[Columns.ACTIONS])
            rows.append(row | {Columns.REWARDS: np.asarray(reward, np.float32)})
            is_over = bool(terminated.all())
        columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        num_steps = len(rows) * self.num_envs
        self.num_env_steps_sampled_lifetime += num_steps * (self.config.num_env_runners or 1)
        self._increase_sampled_metrics(num_steps, self.num_envs)
        return columns

    def get_metrics(self) -> dict[str, Any]:
        """What was logged since the last call."""
        return self.metrics.reduce()


class TuningPPO(rllib_ppo.PPO):
    """PPO whose batches are whole episodes as columns."""

    def _setup_logdir(self) -> None:
        """Nothing is written there; Tune's own way leaves empty folders in ``~/ray_results``."""
        self._logdir = tempfile.gettempdir()

    def setup(self, config: Any) -> None:
        """Builds runners and learner."""
        super().setup(config)
        self.num_env_steps = self.num_updates = 0
        self.mean_return: float | None = None

    def training_step(self) -> None:
        """An episode of every experiment, then the epochs on it."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            sampled: Any = synchronous_parallel_sample(
                worker_set=self.env_runner_group,
                concat=False,
                sample_timeout_s=self.config.sample_timeout_s,
                _uses_new_env_runners=True,
                _return_metrics=True,
            )
            fragments, results = sampled
            if not fragments:
                return
            self.metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        columns = {
            name: np.concatenate([f[name] for f in fragments], axis=1) for name in fragments[0]
        }
        self.mean_return = float(columns[Columns.REWARDS].sum(0).mean())
        self.num_env_steps += columns[Columns.REWARDS].size
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            batch = self._batch(columns)
            results = self.learner_group.update(
                batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(batch)),
                timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps},
                num_epochs=self.config.num_epochs,
                minibatch_size=self.config.minibatch_size,
                shuffle_batch_per_epoch=True,
            )
            self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.num_updates += 1
        with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
            self.env_runner_group.sync_weights(
                from_worker_or_learner_group=self.learner_group, inference_only=True
            )

    def _batch(self, columns: dict[str, FloatArray]) -> SampleBatch:
        """(T E, ...) rows with advantages (standardised, as RLlib does) and value targets."""
        observation = torch.as_tensor(columns[Columns.OBS])

        def values(learner: Any) -> FloatArray:
            module = learner.module[DEFAULT_MODULE_ID].unwrapped()
            with torch.no_grad():
                flat = module.compute_values({Columns.OBS: observation.flatten(0, 1)})
            return flat.view(observation.shape[:2]).cpu().numpy()

        answers: Any = self.learner_group.foreach_learner(values)
        (value,) = [answer.get() for answer in answers]
        reward = columns.pop(Columns.REWARDS)
        advantage = advantages(reward, value, self.config.gamma, self.config.lambda_)
        target = (advantage + value).astype(np.float32)
        advantage = (advantage - advantage.mean()) / max(1e-4, float(advantage.std()))
        columns[Postprocessing.ADVANTAGES] = advantage.astype(np.float32)
        columns[Postprocessing.VALUE_TARGETS] = target
        return SampleBatch({k: v.reshape(-1, *v.shape[2:]) for k, v in columns.items()})

    def network_state(self) -> dict[str, torch.Tensor]:
        """The weights of the module, on the CPU, by RLlib's names."""
        module = self.learner_group.get_state(components="learner/rl_module")["learner"]
        weights = module["rl_module"][DEFAULT_MODULE_ID]
        return {k: torch.as_tensor(np.asarray(v)).clone() for k, v in weights.items()}

    def checkpoint(self) -> dict[str, Any]:
        """All that goes on after a restart, for ``torch.load(weights_only=True)``."""
        learner = self.learner_group.get_state()["learner"]
        state = {
            "num_env_steps": self.num_env_steps,
            "num_updates": self.num_updates,
            "weights_seq_no": learner["weights_seq_no"],
            "module": learner["rl_module"][DEFAULT_MODULE_ID],
            "optimizer": learner["optimizer"],
            "torch_rng": torch.get_rng_state(),
        }
        return _map_arrays(state, np.ndarray, torch.from_numpy)

    def restore_checkpoint(self, state: dict[str, Any]) -> None:
        """Goes on from ``checkpoint``."""
        state = _map_arrays(state, torch.Tensor, lambda value: value.numpy())
        self.learner_group.set_state(
            {
                "learner": {
                    "rl_module": {DEFAULT_MODULE_ID: state["module"]},
                    "optimizer": state["optimizer"],
                    "weights_seq_no": state["weights_seq_no"],
                }
            }
        )
        self.num_env_steps, self.num_updates = state["num_env_steps"], state["num_updates"]
        torch.set_rng_state(torch.from_numpy(state["torch_rng"]))
        self.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.learner_group, inference_only=True
        )
        self.env_runner.num_env_steps_sampled_lifetime = self.num_env_steps


def advantages(
    reward: FloatArray, value: FloatArray, discount: float, trace_decay: float
) -> FloatArray:
    """(T, E) generalised advantages of whole episodes (arXiv:1506.02438, eq. 16).

    After the last step comes nothing: the episode is terminated.
    """
    if reward.ndim != 2 or value.shape != reward.shape:
        raise ValueError(f"reward and value must be (T, E): {reward.shape} and {value.shape}")
    following = np.vstack([value[1:], np.zeros_like(value[:1])])
    error = reward + discount * following - value
    result = np.zeros_like(error)
    trace = np.zeros_like(error[0])
    for t in reversed(range(len(error))):
        trace = error[t] + discount * trace_decay * trace
        result[t] = trace
    return result


def build(
    config: PPOConfig,
    training: TuningTrainingConfig,
    *,
    make_env: MakeEnv,
    single_observation_space: Any,
    single_action_space: Any,
    num_steps: int,
    seed: int,
) -> TuningPPO:
    """The algorithm; one ``train()`` is one episode of every experiment, then one update."""
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # it greets with a paragraph
    num_rows = num_steps * training.num_envs * max(1, training.num_env_runners)
    rllib = rllib_ppo.PPOConfig(algo_class=TuningPPO)
    rllib.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
    rllib.environment(
        env="ssl2rl-tuning",
        env_config={"make_env": make_env},
        observation_space=single_observation_space,
        action_space=single_action_space,
    )
    rllib.env_runners(
        env_runner_cls=EpisodeRunner,
        num_env_runners=training.num_env_runners,
        num_envs_per_env_runner=training.num_envs,
        rollout_fragment_length=num_steps,
        create_local_env_runner=True,
    )
    rllib.training(
        lr=[[0, config.learning_rate], [training.num_env_steps, config.final_learning_rate]],
        gamma=config.discount,
        lambda_=config.trace_decay,
        clip_param=config.clip,
        entropy_coeff=config.entropy_weight,
        vf_loss_coeff=config.value_weight,
        use_kl_loss=False,
        grad_clip=config.max_grad_norm,
        grad_clip_by="global_norm",
        num_epochs=config.num_epochs,
        minibatch_size=num_rows // config.num_minibatches,
        train_batch_size_per_learner=num_rows,
    )
    rllib.learners(num_learners=0, add_default_connectors_to_learner_pipeline=False)
    rllib.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=TuningModule,
            model_config=DefaultModelConfig(
                fcnet_hiddens=list(config.hidden_sizes),
                fcnet_activation="tanh",
                vf_share_layers=False,
                log_std_clip_param=MAX_LOG_SPREAD,
            ),
        )
    )
    rllib.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)
    rllib.debugging(seed=seed, log_level="ERROR")
    algorithm = rllib.build_algo()
    assert isinstance(algorithm, TuningPPO)
    return algorithm
