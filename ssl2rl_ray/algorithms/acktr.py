"""ACKTR on RLlib: A2C whose steps are natural gradients in a trust region.

Wu et al. 2017 (arXiv:1708.05144); the optimiser is ``kfac.py``'s. Sampling, returns and loss are
A2C's: all that is new is one more backward pass, whose loss is the likelihood of actions and values
that the model draws itself. ``build`` makes the algorithm from our config.
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.distribution import Distribution
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from torch import Tensor

from ssl2rl_ray.algorithms.a2c import (
    A2C,
    A2CAlgorithmConfig,
    A2CTorchLearner,
    MakeEnv,
    MakeNetwork,
    Potential,
    common_settings,
)
from ssl2rl_ray.algorithms.kfac import KFAC
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import ACKTRConfig


class ACKTRAlgorithmConfig(A2CAlgorithmConfig):
    """RLlib's config object, carrying ours; made by ``build`` and by nothing else."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        """``recipe`` and ``num_env_steps`` (of the whole run) are set by ``build``."""
        super().__init__(algo_class=algo_class or ACKTR)
        self.recipe: Any = ACKTRConfig()

    def get_default_learner_class(self) -> type[TorchLearner]:
        """The learner that belongs to this algorithm."""
        return ACKTRTorchLearner


def fisher_loss(policy: Distribution, value: Tensor) -> Tensor:
    """Scalar: sum over samples of -log p of an action and a value that the model draws itself.

    ``value`` is (B,); values are drawn from a Gaussian of variance 1 (in units of the scaled
    reward) around it, independent of the action: Wu et al. 2017, on the critic.
    """
    drawn = (value + torch.randn_like(value)).detach()
    return 0.5 * (value - drawn).square().sum() - policy.logp(policy.sample()).sum()


class ACKTRTorchLearner(A2CTorchLearner):
    """A2C's learner with K-FAC in place of Adam."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """K-FAC for the module's Linear layers, Adam for its other parameters."""
        module, recipe = self._module[module_id], config.recipe
        optimizer = KFAC(
            module,
            lr=recipe.learning_rate,
            max_kl=recipe.max_kl,
            damping=recipe.damping,
            momentum=recipe.momentum,
            moment_decay=recipe.moment_decay,
            inverse_interval=recipe.inverse_interval,
            other_lr=recipe.other_learning_rate,
        )
        self.register_optimizer(
            module_id=module_id,
            optimizer=optimizer,
            params=self.get_parameters(module),
            lr_or_lr_schedule=config.lr,
        )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """A2C's loss, after the factors have been taken from the same forward pass."""
        is_move = batch["is_move"]
        num_moves = int(is_move.sum())
        if num_moves:
            policies = self.module[module_id].unwrapped().action_dist_cls
            policy = policies.from_logits(fwd_out[Columns.ACTION_DIST_INPUTS][is_move])
            drawn = fisher_loss(policy, fwd_out[Columns.EMBEDDINGS][is_move])
            self.get_optimizer(module_id).collect(drawn, num_moves)
        return super().compute_loss_for_module(
            module_id=module_id, config=config, batch=batch, fwd_out=fwd_out
        )

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Lets the largest step fall (RLlib's schedule), and says what the last one was."""
        super().after_gradient_based_update(timesteps=timesteps)
        for module_id in self.module.keys():  # noqa: SIM118 (a MultiRLModule is no mapping)
            step = self.get_optimizer(module_id).last_lr
            self.metrics.log_value((module_id, "step_size"), step, window=1)


class ACKTR(A2C):
    """A2C with another learner."""

    @classmethod
    def get_default_config(cls) -> AlgorithmConfig:
        """The config class that belongs to this algorithm."""
        return ACKTRAlgorithmConfig()


def build(
    config: ACKTRConfig,
    training: TrainingConfig,
    *,
    make_env: MakeEnv,
    make_network: MakeNetwork,
    seed: int,
    potential: Potential | None = None,
) -> ACKTR:
    """The algorithm; one ``train()`` is one fragment of every runner and one update.

    ``ssl2rl_ray.config.check`` says which settings go together; ``config`` must have ``discount``.
    """
    rllib = ACKTRAlgorithmConfig()
    rllib.recipe, rllib.discount = config, config.discount
    rllib.num_env_steps = training.num_env_steps
    common_settings(rllib, config, training, make_env, make_network, seed, potential)
    algorithm = rllib.build_algo()
    assert isinstance(algorithm, ACKTR)
    return algorithm
