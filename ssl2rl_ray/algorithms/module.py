"""The RLModule: any of our networks, masked epsilon-greedy, and a target network.

``model_config`` has ``make_network``, a picklable function without arguments that makes the
network (``networks.py``: action values with -inf where an action is not allowed), and
``epsilon``: (first value, last value, env steps over which it falls linearly).
"""

# RLlib's annotations say None where a built object has a value, and more of the kind:
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import copy
from typing import Any

import torch
from gymnasium import spaces
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, QNetAPI, TargetNetworkAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from ssl2rl_ray.algorithms.losses import bootstrap_value

Q_TM1 = "q_tm1"
V_T = "v_t"


def linear_epsilon(schedule: tuple[float, float, int], num_env_steps: int) -> float:
    """Epsilon after that many env steps."""
    first, last, num_steps = schedule
    return first + (last - first) * min(1.0, num_env_steps / max(1, num_steps))


def epsilon_greedy(q: Tensor, epsilon: float) -> Tensor:
    """(B,) int64 actions from values (B, A): only finite ones are allowed, and 0 where none is."""
    action = q.argmax(dim=1)
    if epsilon > 0:
        noise = torch.rand_like(q).masked_fill_(q.isneginf(), -1.0)
        is_random = torch.rand(len(q), device=q.device) < epsilon
        action = torch.where(is_random, noise.argmax(dim=1), action)
    return action


class NavigationModule(TorchRLModule, InferenceOnlyAPI, QNetAPI, TargetNetworkAPI):
    """Action values of one network; the runner acts with it, the learner owns its target too."""

    def setup(self) -> None:
        """Makes the network; the learner calls ``make_target_networks`` later.

        Raises ValueError for actions that are not discrete.
        """
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(
                f"action_space: action values are of discrete actions, found {self.action_space}; "
                "a2c and ppo learn continuous ones"
            )
        self.network: nn.Module = self.model_config["make_network"]()
        self.is_double = bool(self.model_config.get("is_double", True))
        self.epsilon = tuple(self.model_config["epsilon"])

    def make_target_networks(self) -> None:
        """A frozen copy of the network that shares its tables."""
        shared = {id(m): m for m in self.network.modules() if not any(True for _ in m.parameters())}
        self.target_network = copy.deepcopy(self.network, memo=dict(shared)).requires_grad_(False)

    def get_non_inference_attributes(self) -> list[str]:
        """What runners do without."""
        return ["target_network"]

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The network and its target."""
        return [(self.network, self.target_network)]

    def forward_target(self, batch: dict[str, Any]) -> Tensor:
        """(B, A) values of the batch's observations by the target network."""
        return self.target_network(batch[Columns.OBS])

    def compute_q_values(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """(B, A) values of the batch's observations."""
        return {"qf_preds": self.network(batch[Columns.OBS])}

    def _forward_inference(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: epsilon_greedy(self._preference(batch), 0.0)}

    def _forward_exploration(self, batch: dict[str, Any], t: int = 0, **_: Any) -> dict[str, Any]:
        epsilon = linear_epsilon(self.epsilon, t)
        return {Columns.ACTIONS: epsilon_greedy(self._preference(batch), epsilon)}

    @torch.no_grad()
    def _preference(self, batch: dict[str, Any]) -> Tensor:
        return self.network.preference(self.network.expand(batch[Columns.OBS]))

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Values of the taken actions, with gradient, and of the states reached, without."""
        with torch.no_grad():
            reached = self.network.expand(batch[Columns.NEXT_OBS])
            q_t = self.target_network.score(reached)
            selector = self.network if self.is_double else self.target_network
            v_t = bootstrap_value(q_t, selector.preference(reached))
        return {
            Q_TM1: self.network.taken(batch[Columns.OBS], batch[Columns.ACTIONS]),
            V_T: v_t,
        }
