"""Networks that score actions (torch alone).

Shape letters: B batch, C candidate rows, F features. Every network maps an observation (a dict of
tensors with B first) to action values (B, A), -inf where an action is not allowed, and has
``taken``: the values of given actions only, with the gradient that learning needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssl2rl_ray.algorithms.losses import take

Observation = Mapping[str, Tensor]


def mlp(sizes: Sequence[int], num_outputs: int) -> nn.Sequential:
    """Linear and ReLU in turn, ``sizes`` = (inputs, hidden ...), and a linear output layer."""
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_outputs))


class CandidateNetwork(nn.Module):
    """One MLP over every candidate row: Q = V(all rows) + A(row), centred over allowed rows.

    Dueling: Wang et al. 2016, arXiv:1511.06581, eq. 9. With ``prior_column`` the advantage is
    ``scale`` times that feature (what a planner thinks of the row; the scale is learned) plus an
    MLP whose last layer begins at zero: untrained, the policy plays as the planner does, and
    learning departs from it only where that pays.
    """

    def __init__(
        self,
        num_features: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_dueling: bool = True,
        prior_column: int | None = None,
        prior_scale: float = 1.0,
    ) -> None:
        """Makes the layers; raises ValueError if the prior is not one of the features."""
        super().__init__()
        if prior_column is not None and not 0 <= prior_column < num_features:
            raise ValueError(f"prior_column: {prior_column} is not one of {num_features} features")
        if not hidden_sizes:
            raise ValueError("hidden_sizes: at least one hidden layer is needed")
        self.prior_column = prior_column
        self.body = nn.Sequential(*mlp((num_features, *hidden_sizes), 1)[:-1])
        self.advantage = nn.Linear(hidden_sizes[-1], 1)
        self.value = mlp((hidden_sizes[-1], hidden_sizes[-1]), 1) if is_dueling else None
        if prior_column is not None:
            nn.init.zeros_(self.advantage.weight)
            nn.init.zeros_(self.advantage.bias)
            self.prior_scale = nn.Parameter(torch.tensor(prior_scale))

    def forward(self, observation: Observation) -> Tensor:
        """(B, C) action values from ``rows`` (B, C, F) float32 and ``action_mask`` (B, C)."""
        rows, is_allowed = observation["rows"], observation["action_mask"].bool()
        hidden = self.body(rows)
        q = self.advantage(hidden).squeeze(-1)
        if self.prior_column is not None:
            q = q + self.prior_scale * rows[..., self.prior_column]
        if self.value is not None:
            part = is_allowed.to(q.dtype)
            part = part / part.sum(dim=1, keepdim=True).clamp(min=1)
            pooled = torch.einsum("bc,bch->bh", part, hidden)
            q = self.value(pooled) + q - (part * q).sum(dim=1, keepdim=True)
        return q.masked_fill(~is_allowed, -torch.inf)

    def taken(self, observation: Observation, action: Tensor) -> Tensor:
        """(B,) values of the candidates (B,) int64."""
        return take(self(observation), action)
