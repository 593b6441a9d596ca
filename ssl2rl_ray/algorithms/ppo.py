"""RLlib's PPO learner on our columns and masked networks.

Schulman et al. 2017 (arXiv:1707.06347) with generalised advantages (Schulman et al. 2016,
arXiv:1506.02438). Loss, minibatches and optimiser are RLlib's own; its sampler, which makes an
object of every episode and passes every step through connectors in Python, is not: at 256 episodes
in one numpy step it would be most of the time. All else is A2C's, of which PPO is the form that
looks at its steps more than once (Huang et al. 2022, arXiv:2205.09123).
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.algorithms import ppo as rllib_ppo
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from ssl2rl_ray.algorithms.a2c import (
    A2C,
    MakeEnv,
    MakeNetwork,
    Potential,
    common_settings,
    flat,
    fragment_columns,
    refuse_ignored,
    schedule,
)
from ssl2rl_ray.algorithms.policy_losses import standardized
from ssl2rl_ray.algorithms.returns import gae, next_values
from ssl2rl_ray.algorithms.runner import Columnar
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import PPOConfig

_READ_HERE = ("num_epochs", "minibatch_size", "shuffle_batch_per_epoch")


class PPOAlgorithmConfig(rllib_ppo.PPOConfig):
    """RLlib's config object, carrying ours; made by ``build`` and by nothing else."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        """``recipe`` is set by ``build``."""
        super().__init__(algo_class=algo_class or PPO)
        self.recipe: Any = PPOConfig()
        self.discount = 0.99

    def validate(self) -> None:
        """RLlib's checks, and ValueError for a setting that would be ignored."""
        refuse_ignored(self, PPOAlgorithmConfig(), but=_READ_HERE)
        super().validate()


class PPO(A2C):
    """A2C's sampling; the steps of all fragments in minibatches, several times over."""

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """The config class that belongs to this algorithm."""
        return PPOAlgorithmConfig()

    def learn(self, columns: Columnar) -> list[Any]:
        """The epochs on (T, E) columns; the learner's metrics."""
        batch = self.with_advantages(columns)
        recipe = self.config.recipe
        return self.learner_group.update(
            batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, env_steps=len(batch)),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps},
            num_epochs=recipe.num_epochs,
            minibatch_size=max(1, len(batch) // recipe.num_minibatches),
            shuffle_batch_per_epoch=True,
        )

    def with_advantages(self, columns: Columnar) -> SampleBatch:
        """The moves among the rows, with advantages (standardised, as RLlib does) and targets."""
        recipe = self.config.recipe
        fragment = fragment_columns(columns, recipe.reward_scale, self.config.discount)
        observation = fragment.pop(Columns.OBS)

        def values(learner: Any) -> np.ndarray:
            module = learner.module[DEFAULT_MODULE_ID].unwrapped()
            rows = tree.map_structure(
                lambda rows: torch.as_tensor(rows, device=learner._device), flat(observation)
            )
            with torch.no_grad():
                return module.compute_values({Columns.OBS: rows}).cpu().numpy()

        answers: Any = self.learner_group.foreach_learner(values)
        is_move = fragment["is_move"]
        value = torch.as_tensor(next(iter(answers)).get()).view(len(is_move) + 1, -1)
        advantage = gae(
            reward=torch.as_tensor(fragment[Columns.REWARDS]),
            value=value[:-1],
            next_value=next_values(value[:-1], value[-1]),
            is_terminated=torch.as_tensor(fragment["is_terminated"]),
            is_truncated=torch.as_tensor(fragment["is_truncated"]),
            discount=torch.as_tensor(fragment["discount"]),
            trace_decay=recipe.trace_decay,
        )
        target = advantage + value[:-1]
        advantage = standardized(advantage, torch.as_tensor(is_move))
        rows = {
            Columns.OBS: tree.map_structure(lambda rows: rows[:-1], observation),
            Columns.ACTIONS: columns["action"],
            Columns.ACTION_LOGP: columns[Columns.ACTION_LOGP],
            Columns.ACTION_DIST_INPUTS: columns[Columns.ACTION_DIST_INPUTS],
            Postprocessing.ADVANTAGES: advantage.numpy(),
            Postprocessing.VALUE_TARGETS: target.numpy(),
        }
        return SampleBatch(tree.map_structure(lambda column: column[is_move], rows))

    def restore_checkpoint(self, state: dict[str, Any]) -> None:
        """Goes on from ``checkpoint``; raises ValueError if the networks differ."""
        super().restore_checkpoint(state)

        def catch_up(learner: Any) -> None:  # RLlib's schedules do so after an update only
            falling = learner.entropy_coeff_schedulers_per_module[DEFAULT_MODULE_ID]
            falling.update(timestep=self.num_env_steps)

        self.learner_group.foreach_learner(catch_up)


def build(
    config: PPOConfig,
    training: TrainingConfig,
    *,
    make_env: MakeEnv,
    make_network: MakeNetwork,
    seed: int,
    potential: Potential | None = None,
) -> PPO:
    """The algorithm; one ``train()`` is one fragment of every runner and the epochs on it.

    ``ssl2rl_ray.config.check`` says which settings go together; ``config`` must have ``discount``.
    """
    rllib = PPOAlgorithmConfig()
    rllib.recipe, rllib.discount = config, config.discount
    common_settings(rllib, config, training, make_env, make_network, seed, potential)
    rllib.training(
        lambda_=config.trace_decay,
        clip_param=config.clip,
        vf_clip_param=float("inf"),
        entropy_coeff=schedule(
            config.entropy_weight, config.final_entropy_weight, training.num_env_steps
        ),
        vf_loss_coeff=config.value_weight,
        use_kl_loss=False,
        num_epochs=config.num_epochs,
        minibatch_size=max(1, rllib.train_batch_size_per_learner // config.num_minibatches),
    )
    algorithm = rllib.build_algo()
    assert isinstance(algorithm, PPO)
    return algorithm
