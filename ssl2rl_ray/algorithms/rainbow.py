"""Rainbow on RLlib: DQN and what was added to it, each part of which may be left out.

Hessel et al. 2018, arXiv:1710.02298. The parts, and where they are:

==================  ============================================================================
double              the online network chooses the next action, the target network judges it
dueling             networks.py: Q = V + A, centred over the allowed actions
prioritised replay  replay.py, by KL divergence where distributional; beta rises to 1 over the run
n-step              replay.py, discounted per minute
C51                 losses.py: the return's distribution on a support set by the task
noisy layers        noisy.py: drawn at every step of exploration, and for each pass of an update
==================  ============================================================================

The loop, the runners and the replay are DQN's (dqn.py); what differs is how actions are explored
and how a batch becomes a loss. One draw of noise serves all episodes that a vector step moves, and
all rows of a batch, as in Fortunato et al.'s DQN.
Shape letters: B batch, A actions, Z outputs (networks.py).
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics import TD_ERROR_KEY
from torch import Tensor

from ssl2rl_ray.algorithms import dqn
from ssl2rl_ray.algorithms.losses import (
    categorical_target,
    cross_entropy,
    kl_divergence,
    td_error,
    weighted_huber,
)
from ssl2rl_ray.algorithms.module import NavigationModule
from ssl2rl_ray.algorithms.networks import expectation
from ssl2rl_ray.algorithms.noisy import NoisyLinear, resample, silence, without_noise
from ssl2rl_ray.config import TrainingConfig
from ssl2rl_ray.recipes import AnyRainbow

TAKEN = "taken"
"""Outputs (B, Z) and offsets (B,) of the actions taken, with gradient."""
REACHED = "reached"
"""The same of the best actions in the states reached, by the target network."""
HAS_ACTION = "has_action"
"""(B,) float32: 0 where nothing is left to do in the state reached, which is worth 0."""


class RainbowModule(NavigationModule):
    """Acts with noise where it explores and without where it does not."""

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        silence(self.network)
        return super()._forward_inference(batch, **kwargs)

    def _forward_exploration(
        self, batch: dict[str, Any], t: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        resample(self.network)
        return super()._forward_exploration(batch, t=t, **kwargs)

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Three passes, each with noise of its own: choosing, judging, and what is learned."""
        with torch.no_grad():
            resample(self.target_network)
            reached = self.network.expand(batch[Columns.NEXT_OBS])
            chooser = self.network if self.is_double else self.target_network
            if self.is_double:
                resample(self.network)
            best, action = chooser.preference(reached).max(1)
            judged = self.target_network.at(reached, action)
        resample(self.network)
        here = self.network.expand(batch[Columns.OBS])
        return {
            TAKEN: self.network.at(here, batch[Columns.ACTIONS]),
            REACHED: judged,
            HAS_ACTION: (~best.isneginf()).to(best.dtype),
        }


class RainbowLearner(dqn.DQNLearner):
    """Cross entropy with the projected distribution, or Huber's loss of the error of a value."""

    def build(self) -> None:
        """Makes the networks; raises ValueError where they lack a part that the recipe asks for."""
        super().build()
        recipe, network = self.config.recipe, self.module[DEFAULT_MODULE_ID].unwrapped().network
        is_noisy = any(isinstance(layer, NoisyLinear) for layer in network.modules())
        for name, found in (
            ("is_distributional", network.support is not None),
            ("is_noisy", is_noisy),
        ):
            if found != getattr(recipe, name):
                raise ValueError(
                    f"algorithm.{name} is {not found} and the network of another kind: make it "
                    "with the support and the initial_noise that the recipe asks for"
                )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """The scalar loss of one batch; logs what priorities are made of."""
        support = self.module[module_id].unwrapped().network.support
        (outputs_tm1, offset_tm1), (outputs_t, offset_t) = fwd_out[TAKEN], fwd_out[REACHED]
        q_tm1 = expectation(outputs_tm1, support) + offset_tm1
        reward, discount = batch[Columns.REWARDS], batch["discount"] * fwd_out[HAS_ACTION]
        if support is None:
            surprise = td_error(q_tm1, reward, discount, expectation(outputs_t, None) + offset_t)
            loss = weighted_huber(surprise, batch["weight"])
        else:
            target = categorical_target(reward, discount, offset_t, outputs_t, offset_tm1, support)
            surprise = kl_divergence(outputs_tm1.detach(), target)
            loss = (batch["weight"] * cross_entropy(outputs_tm1, target)).mean()
            # Share of the targets on the first and last atom: much of it, and the support is too
            # narrow, unless returns do end there.
            ends = (target[:, 0] + target[:, -1]).mean()
            self.metrics.log_value((module_id, "support_ends"), ends, window=1)
        if config.recipe.is_prioritized:
            self.metrics.log_value(
                (module_id, TD_ERROR_KEY), surprise.detach(), reduce="item_series"
            )
        self.metrics.log_dict(
            {"loss": loss.detach(), "q_mean": q_tm1.detach().mean()}, key=module_id, window=1
        )
        return loss


class Rainbow(dqn.DQN):
    """DQN's loop; the policy that is kept is without noise."""

    def network_state(self) -> dict[str, Tensor]:
        """The weights that are judged and kept: those of a network of plain layers."""
        return without_noise(super().network_state())


def build(
    config: AnyRainbow,
    training: TrainingConfig,
    *,
    make_env: dqn.MakeEnv,
    make_network: dqn.MakeNetwork,
    seed: int,
    potential: dqn.Potential | None = None,
) -> Rainbow:
    """The algorithm, ready to ``train()``, as ``dqn.build``.

    ``make_network`` makes a network with a ``support`` where ``config.is_distributional``, with
    noisy layers where ``config.is_noisy``. Raises ValueError where it does not.
    """
    algorithm = dqn.build(
        config,
        training,
        make_env=make_env,
        make_network=make_network,
        seed=seed,
        potential=potential,
        parts=(Rainbow, RainbowLearner, RainbowModule),
    )
    assert isinstance(algorithm, Rainbow)
    return algorithm
