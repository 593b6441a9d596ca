"""Networks with a policy and a value (torch alone).

Shape letters as in networks.py. Like the networks there, each maps an observation to scores (B, A)
of its actions, -inf where one is not allowed, in two steps, ``expand`` and ``score``; here scores
are logits of a policy (or means and log standard deviations, (B, 2 K)), and ``value`` gives (B,)
what the state is worth to that policy. Nothing is shared between the two: a poor value does not
bend the policy's features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from envs.cryoem.stack import SessionStack
from envs.cryoem.types import NavigationConfig
from ssl2rl_ray.algorithms.expander import Expanded, Expander
from ssl2rl_ray.algorithms.networks import HoleNetwork, Observation, mlp

MAX_LOG_SPREAD = 2.6
"""Logs of sds are cut off at plus and minus this: an sd of 0.07 at least."""
INITIAL_SPREAD = 0.5
"""Sd of the first actions, which are cut off at -1 and 1."""
_FIRST_LOGITS = 0.1
"""The policy's last layer begins this much smaller: nearly all actions are as likely at first."""


class CandidateActorCritic(nn.Module):
    """One MLP over every candidate row gives its logit; another, pooled over rows, the value.

    With ``prior_column`` the logit is ``scale`` times that feature (what a planner thinks of the
    row; the scale is learned) plus an MLP whose last layer begins at zero: untrained, the policy is
    the planner with some noise.
    """

    def __init__(
        self,
        num_features: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        prior_column: int | None = None,
        prior_scale: float = 1.0,
    ) -> None:
        """Makes the layers; raises ValueError if the prior is not one of the features."""
        super().__init__()
        if prior_column is not None and not 0 <= prior_column < num_features:
            raise ValueError(f"prior_column: {prior_column} is not one of {num_features} features")
        self.prior_column = prior_column
        self.policy = mlp((num_features, *hidden_sizes), 1)
        self.row_value = nn.Sequential(*mlp((num_features, *hidden_sizes), 1)[:-1])
        self.pooled_value = mlp((hidden_sizes[-1], hidden_sizes[-1]), 1)
        shrink_last_layer(self.policy, _FIRST_LOGITS if prior_column is None else 0.0)
        if prior_column is not None:
            self.prior_scale = nn.Parameter(torch.tensor(prior_scale))

    def expand(self, observation: Observation) -> Observation:
        """The observation: its rows are features already."""
        return observation

    def score(self, observation: Observation) -> Tensor:
        """(B, C) logits from ``rows`` (B, C, F) float32 and ``action_mask`` (B, C)."""
        rows = observation["rows"]
        logits = self.policy(rows).squeeze(-1)
        if self.prior_column is not None:
            logits = logits + self.prior_scale * rows[..., self.prior_column]
        return logits.masked_fill(~observation["action_mask"].bool(), -torch.inf)

    def preference(self, observation: Observation, logits: Tensor | None = None) -> Tensor:
        """The logits; ``logits`` saves computing them again."""
        return self.score(observation) if logits is None else logits

    def value(self, observation: Observation) -> Tensor:
        """(B,) from the mean over the allowed rows."""
        hidden = self.row_value(observation["rows"])
        pooled = pool(hidden, observation["action_mask"].bool())
        return self.pooled_value(pooled).squeeze(-1)


class Timed(NamedTuple):
    """What one batch of compact observations expands to; made without gradient."""

    features: Expanded
    elapsed: Tensor
    """(B,) the share of the budget that passed."""


class HoleActorCritic(nn.Module):
    """Logits as ``HoleNetwork`` has action values; the value is pooled over open patches.

    A patch's row for the value is what its unvisited holes share, the prediction of its best one,
    and the time that has passed: the features of ``paper`` and ``cryorl`` tell no time, and what a
    session is still worth hangs on it.
    """

    def __init__(
        self,
        expander: Expander,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_patch: bool = False,
        budget_min: float = 480.0,
    ) -> None:
        """Makes the layers; ``budget_min`` is the unit of time."""
        super().__init__()
        self.policy = HoleNetwork(expander, hidden_sizes, is_patch=is_patch)
        shrink_last_layer(self.policy.mlp, _FIRST_LOGITS)
        self.budget_min = budget_min
        num_group = len(expander.group_columns)
        self.row_value = nn.Sequential(*mlp((num_group + 2, *hidden_sizes), 1)[:-1])
        self.pooled_value = mlp((hidden_sizes[-1], hidden_sizes[-1]), 1)

    @property
    def expander(self) -> Expander:
        """Whose tables these are."""
        return self.policy.expander

    def expand(self, observation: Observation) -> Timed:
        """Features per patch, and the time."""
        elapsed = observation["elapsed_min"][:, 0].float() / self.budget_min
        return Timed(self.policy.expand(observation), elapsed)

    def score(self, expanded: Timed) -> Tensor:
        """(B, N) or (B, P) logits."""
        return self.policy.score(expanded.features)

    def preference(self, expanded: Timed, logits: Tensor | None = None) -> Tensor:
        """The logits; ``logits`` saves computing them again."""
        return self.score(expanded) if logits is None else logits

    def value(self, expanded: Timed) -> Tensor:
        """(B,) from the mean over the patches that have an unvisited hole."""
        features, table = expanded.features, self.expander.table
        is_left = table("is_hole", features.session) & ~features.visited
        best, is_open = self.policy.best_hole(features.session, is_left)
        p = table("own_p", features.session).gather(1, best)
        rows = [
            features.group,
            p[..., None],
            expanded.elapsed[:, None, None].expand_as(p[..., None]),
        ]
        hidden = self.row_value(torch.cat(rows, -1))
        return self.pooled_value(pool(hidden, is_open)).squeeze(-1)


class VectorActorCritic(nn.Module):
    """Policy and value of one flat observation (B, F), as tuning and the control tasks have it."""

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_gaussian: bool = False,
    ) -> None:
        """Makes both MLPs; of a Gaussian half of the outputs are logs of standard deviations."""
        super().__init__()
        self.is_gaussian = is_gaussian
        self.policy = tanh_mlp((num_features, *hidden_sizes), num_outputs)
        self.critic = tanh_mlp((num_features, *hidden_sizes), 1)
        shrink_last_layer(self.policy, _FIRST_LOGITS)
        if is_gaussian:
            last = self.policy[-1]
            assert isinstance(last, nn.Linear)
            with torch.no_grad():
                last.bias[: num_outputs // 2] = 0.0
                last.bias[num_outputs // 2 :] = math.log(INITIAL_SPREAD)

    def expand(self, observation: Tensor) -> Tensor:
        """The observation as floats."""
        return observation.float()

    def score(self, observation: Tensor) -> Tensor:
        """(B, A) logits, or (B, 2 K) means and logs of standard deviations."""
        output = self.policy(observation)
        if not self.is_gaussian:
            return output
        mean, log_sd = output.chunk(2, -1)
        return torch.cat([mean, log_sd.clamp(-MAX_LOG_SPREAD, MAX_LOG_SPREAD)], -1)

    def value(self, observation: Tensor) -> Tensor:
        """(B,)."""
        return self.critic(observation).squeeze(-1)


NavigationActorCritic = CandidateActorCritic | HoleActorCritic


def make_actor_critic(
    config: NavigationConfig,
    stack: SessionStack | None,
    *,
    hidden_sizes: Sequence[int] = (64, 64),
    is_residual: bool = True,
    prior_scale: float = 1.0,
) -> NavigationActorCritic:
    """The network for a feature set; ``stack`` is needed for those per hole.

    ``is_residual`` and ``prior_scale`` concern ``rates`` alone.
    """
    if config.feature_set == "rates":
        from envs.cryoem.rates import NUM_FEATURES, PRIOR_COLUMN

        return CandidateActorCritic(
            NUM_FEATURES,
            hidden_sizes,
            prior_column=PRIOR_COLUMN if is_residual else None,
            prior_scale=prior_scale,
        )
    if stack is None:
        raise ValueError(f"feature_set {config.feature_set!r} needs the sessions' tables")
    return HoleActorCritic(
        Expander(stack, config),
        hidden_sizes,
        is_patch=config.action_level == "patch",
        budget_min=config.budget_min,
    )


def pool(hidden: Tensor, is_allowed: Tensor) -> Tensor:
    """(B, H) mean of (B, C, H) over what is allowed (B, C); zeros where nothing is."""
    part = is_allowed.to(hidden.dtype)
    part = part / part.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bc,bch->bh", part, hidden)


def tanh_mlp(sizes: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Linear and tanh in turn, ``sizes`` = (inputs, hidden ...), and a linear output layer."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_outputs))


@torch.no_grad()
def shrink_last_layer(network: nn.Sequential, factor: float) -> None:
    """Multiplies the weights and biases of the last layer."""
    for parameter in network[-1].parameters():
        parameter.mul_(factor)
