"""The RLModule of a policy and its value, and the distributions that RLlib's learners ask for.

``model_config["make_network"]`` is a picklable function without arguments that makes the network
(``actor_critic.py``). Discrete actions are a masked categorical, bounded continuous ones Gaussian.
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, Self

import gymnasium as gym
import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.distribution import Distribution
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from ssl2rl_ray.algorithms import policy_losses


class MaskedCategorical(Distribution):
    """``policy_losses``' categorical behind RLlib's interface; logits are (B, A)."""

    def __init__(self, logits: Tensor) -> None:
        """Keeps the logits, -inf where an action is not allowed."""
        self.logits = logits

    @classmethod
    def from_logits(cls, logits: Tensor, **_: Any) -> Self:
        """From what the module's forward pass gives."""
        return cls(logits)

    def sample(self, **_: Any) -> Tensor:
        """(B,) int64."""
        return policy_losses.categorical_sample(self.logits)

    def rsample(self, **_: Any) -> Tensor:
        """Raises NotImplementedError: discrete actions have no gradient."""
        raise NotImplementedError("a categorical has no reparameterised sample: use sample()")

    def logp(self, value: Tensor, **_: Any) -> Tensor:
        """(B,)."""
        return policy_losses.categorical_log_prob(self.logits, value)

    def entropy(self, **_: Any) -> Tensor:
        """(B,)."""
        return policy_losses.categorical_entropy(self.logits)

    def kl(self, other: MaskedCategorical, **_: Any) -> Tensor:
        """(B,)."""
        return policy_losses.categorical_kl(self.logits, other.logits)

    def greedy(self) -> Tensor:
        """(B,) the most likely action, 0 where none is allowed."""
        return self.logits.argmax(-1)

    @staticmethod
    def required_input_dim(space: gym.Space[Any], **_: Any) -> int:
        """A."""
        assert isinstance(space, spaces.Discrete)
        return int(space.n)


class Gaussian(Distribution):
    """``policy_losses``' Gaussian behind RLlib's interface; the runner cuts actions off."""

    def __init__(self, output: Tensor) -> None:
        """Keeps (B, 2 K) means and logs of standard deviations."""
        self.output = output

    @classmethod
    def from_logits(cls, logits: Tensor, **_: Any) -> Self:
        """From what the module's forward pass gives."""
        return cls(logits)

    def sample(self, **_: Any) -> Tensor:
        """(B, K)."""
        return policy_losses.gaussian_sample(self.output)

    def rsample(self, **_: Any) -> Tensor:
        """(B, K) with gradient."""
        mean, log_sd = self.output.chunk(2, -1)
        return mean + log_sd.exp() * torch.randn_like(mean)

    def logp(self, value: Tensor, **_: Any) -> Tensor:
        """(B,)."""
        return policy_losses.gaussian_log_prob(self.output, value)

    def entropy(self, **_: Any) -> Tensor:
        """(B,)."""
        return policy_losses.gaussian_entropy(self.output)

    def kl(self, other: Gaussian, **_: Any) -> Tensor:
        """(B,)."""
        return policy_losses.gaussian_kl(self.output, other.output)

    def greedy(self) -> Tensor:
        """(B, K) the means."""
        return self.output.chunk(2, -1)[0]

    @staticmethod
    def required_input_dim(space: gym.Space[Any], **_: Any) -> int:
        """2 K."""
        assert isinstance(space, spaces.Box)
        return 2 * int(space.shape[0])


class ActorCriticModule(TorchRLModule, ValueFunctionAPI):
    """A policy and its value; what is drawn comes with its probability."""

    def setup(self) -> None:
        """Makes the network; raises ValueError for actions that we have no distribution for."""
        self.network: nn.Module = self.model_config["make_network"]()
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            self.action_dist_cls = MaskedCategorical
        elif isinstance(space, spaces.Box) and len(space.shape) == 1 and space.is_bounded():
            self.action_dist_cls = Gaussian
        else:
            raise ValueError(
                f"action_space: expected Discrete or a bounded Box (K,), found {space}"
            )

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """(B,) values; ``embeddings`` are those of ``_forward_train``, which are the values."""
        if embeddings is not None:
            return embeddings
        return self.network.value(self.network.expand(batch[Columns.OBS]))

    def _forward_inference(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.action_dist_cls.from_logits(self._score(batch)).greedy()}

    def _forward_exploration(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        output = self._score(batch)
        distribution = self.action_dist_cls.from_logits(output)
        action = distribution.sample()
        return {
            Columns.ACTIONS: action,
            Columns.ACTION_LOGP: distribution.logp(action),
            Columns.ACTION_DIST_INPUTS: output,
        }

    @torch.no_grad()
    def _score(self, batch: dict[str, Any]) -> Tensor:
        return self.network.score(self.network.expand(batch[Columns.OBS]))

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Policy and value of the batch's observations, both with gradient."""
        expanded = self.network.expand(batch[Columns.OBS])
        return {
            Columns.ACTION_DIST_INPUTS: self.network.score(expanded),
            Columns.EMBEDDINGS: self.network.value(expanded),
        }
