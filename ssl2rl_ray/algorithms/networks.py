"""Networks that score actions (torch alone).

Shape letters: B batch, A actions, C candidate rows or cells, F features, H hidden units, N holes,
P patches. Every network maps an observation (a dict of tensors with B first) to action values
(B, A), -inf where an action is not allowed, in two steps: ``expand`` (no weights, so what it gives
serves a target network too) and ``score``. ``taken`` has the values of given actions only, with the
gradient that learning needs; ``preference`` is what the policy maximises. ``make_network`` makes
the one that a config asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from envs.cryoem.stack import SessionStack
from envs.cryoem.types import FloatArray, IntArray, NavigationConfig
from ssl2rl_ray.algorithms.expander import Expanded, Expander
from ssl2rl_ray.algorithms.losses import take

Observation = Mapping[str, Tensor]
_CELLS_AT_ONCE = 8192


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
    MLP whose last layer begins at zero: untrained, the policy plays as the planner does. It departs
    from the planner's move only for one whose value is higher by more than ``margin``: errors of
    the values are not taken for improvements.
    """

    def __init__(
        self,
        num_features: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_dueling: bool = True,
        prior_column: int | None = None,
        prior_scale: float = 1.0,
        margin: float = 0.0,
    ) -> None:
        """Makes the layers; raises ValueError if the prior is not one of the features."""
        super().__init__()
        if prior_column is not None and not 0 <= prior_column < num_features:
            raise ValueError(f"prior_column: {prior_column} is not one of {num_features} features")
        if not hidden_sizes:
            raise ValueError("hidden_sizes: at least one hidden layer is needed")
        self.prior_column, self.margin = prior_column, margin
        self.body = nn.Sequential(*mlp((num_features, *hidden_sizes), 1)[:-1])
        # Centring cancels a constant: under dueling the advantage needs no bias.
        self.advantage = nn.Linear(hidden_sizes[-1], 1, bias=not is_dueling)
        self.value = mlp((hidden_sizes[-1], hidden_sizes[-1]), 1) if is_dueling else None
        if prior_column is not None:
            for parameter in self.advantage.parameters():
                nn.init.zeros_(parameter)
            self.prior_scale = nn.Parameter(torch.tensor(prior_scale))

    def expand(self, observation: Observation) -> Observation:
        """The observation: its rows are features already."""
        return observation

    def forward(self, observation: Observation) -> Tensor:
        """(B, C) action values."""
        return self.score(observation)

    def score(self, observation: Observation) -> Tensor:
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

    def preference(self, observation: Observation, q: Tensor | None = None) -> Tensor:
        """(B, C) action values, that of the planner's own move (B,) raised by the margin.

        ``q`` saves computing the values again.
        """
        q = self.score(observation) if q is None else q
        if self.prior_column is None or self.margin == 0:
            return q
        is_allowed = observation["action_mask"].bool()
        prior = observation["rows"][..., self.prior_column].masked_fill(~is_allowed, -torch.inf)
        move = prior.argmax(dim=1, keepdim=True)
        return q.scatter_add(1, move, torch.full_like(move, self.margin, dtype=q.dtype))

    def taken(self, observation: Observation, action: Tensor) -> Tensor:
        """(B,) values of the candidates (B,) int64."""
        return take(self(observation), action)


class HoleNetwork(nn.Module):
    """One MLP over every unvisited hole; it serves sessions of any size with the same weights.

    Equal to ``mlp`` on ``envs.cryoem.features.hole_features`` (own p rounded, see
    ``expander.P_STEP``), hole by hole, at a fraction of the cost: the first layer is applied per
    patch and per cell. With ``action_level`` patch, a patch is worth what its best unvisited hole
    by prediction is worth.
    """

    def __init__(
        self, expander: Expander, hidden_sizes: Sequence[int] = (64, 64), *, is_patch: bool = False
    ) -> None:
        """Makes the layers; raises ValueError without a hidden layer."""
        super().__init__()
        if not hidden_sizes:
            raise ValueError("hidden_sizes: at least one hidden layer is needed")
        self.expander = expander
        self.is_patch = is_patch
        num_features = expander.num_past_steps * expander.num_features
        self.mlp = mlp((num_features, *hidden_sizes), 1)

    def expand(self, observation: Observation) -> Expanded:
        """Features per patch, without gradient."""
        return self.expander(observation)

    def forward(self, observation: Observation) -> Tensor:
        """(B, N) action values of holes, or (B, P) of patches."""
        return self.score(self.expand(observation))

    def score(self, expanded: Expanded) -> Tensor:
        """(B, N) or (B, P) action values."""
        per_patch, own = self.first_layer(expanded.group)
        session, table = expanded.session, self.expander.table
        is_allowed = table("is_hole", session) & ~expanded.visited
        if self.is_patch:
            best, has_hole = self.best_hole(session, is_allowed)
            p = table("own_p", session).gather(1, best)
            q = self.tail(per_patch.addcmul_(p[..., None], own))
            return q.masked_fill(~has_hole, -torch.inf)
        q = self.cell_values(per_patch, own, session).gather(1, table("hole_cell", session))
        # 0 where allowed, else -inf: `masked_fill` guesses a branch per hole, wrongly half the time
        return q + (1 - 1 / is_allowed)

    def cell_values(self, per_patch: Tensor, own: Tensor, session: Tensor) -> Tensor:
        """(B, C) values of the cells, from what ``first_layer`` gives."""
        p = self.expander.table("cell_p", session)
        batch, num_patches, num_hidden = per_patch.shape
        at = torch.arange(batch, device=p.device)[:, None] * num_patches
        at = (at + self.expander.table("cell_patch", session)).flatten()
        # A few episodes at a time: what is in the cache need not be fetched from memory (4x).
        size = max(1, _CELLS_AT_ONCE // p.shape[1]) * p.shape[1]
        flat = per_patch.view(-1, num_hidden)
        return torch.cat(
            [
                self.tail(flat.index_select(0, rows).addcmul_(column[:, None], own))
                for rows, column in zip(at.split(size), p.flatten().split(size), strict=True)
            ]
        ).view(batch, -1)

    def preference(self, expanded: Expanded, q: Tensor | None = None) -> Tensor:
        """The action values; ``q`` saves computing them again."""
        return self.score(expanded) if q is None else q

    def taken(self, observation: Observation, action: Tensor) -> Tensor:
        """(B,) values of holes or patches (B,) int64; only their rows are computed."""
        expanded = self.expand(observation)
        table, session = self.expander.table, expanded.session
        hole = action
        if self.is_patch:
            is_left = table("is_hole", session) & ~expanded.visited
            hole = self.best_hole(session, is_left)[0].gather(1, action[:, None])[:, 0]
        at = torch.arange(len(action), device=action.device)
        per_patch, own = self.first_layer(expanded.group[at, table("patch", session)[at, hole]])
        return self.tail(per_patch + table("own_p", session)[at, hole][:, None] * own)

    def first_layer(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """What a patch (or row) contributes (..., H), and the column (H,) that own p multiplies."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        weight = first.weight.index_select(1, self.expander.group_columns)
        own = first.weight.index_select(1, self.expander.own_columns).sum(1)
        return nn.functional.linear(group, weight, first.bias), own

    def tail(self, hidden: Tensor) -> Tensor:
        """(...) the other layers on (..., H), which is overwritten."""
        for layer in self.mlp[1:]:
            hidden = hidden.relu_() if isinstance(layer, nn.ReLU) else layer(hidden)
        return hidden.squeeze(-1)

    def best_hole(self, session: Tensor, is_left: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P) the best hole left of each patch by prediction, and where there is one."""
        slot = self.expander.table("slot", session)
        is_open = self.expander.table("is_slot", session) & is_left.gather(
            1, slot.flatten(1)
        ).view_as(slot)
        has_hole, first = is_open.to(torch.uint8).max(2, keepdim=True)
        return slot.gather(2, first).squeeze(2), has_hole.squeeze(2).bool()


QNetwork = CandidateNetwork | HoleNetwork


def choose(network: Any, observation: Mapping[str, np.ndarray]) -> IntArray:
    """(E,) the action that a network prefers in each of E episodes, from arrays (E, ...)."""
    return choose_and_value(network, observation)[0]


@torch.inference_mode()
def choose_and_value(
    network: Any, observation: Mapping[str, np.ndarray]
) -> tuple[IntArray, FloatArray]:
    """``choose``, and (E,) float32 the values of those actions, in one forward pass."""
    tensors = {key: torch.as_tensor(value) for key, value in observation.items()}
    expanded = network.expand(tensors)
    q = network.score(expanded)
    action = network.preference(expanded, q).numpy().argmax(1)
    return action, q.numpy()[np.arange(len(action)), action]


def make_network(
    config: NavigationConfig,
    stack: SessionStack | None,
    *,
    hidden_sizes: Sequence[int] = (64, 64),
    is_dueling: bool | None = None,
    is_residual: bool = True,
    prior_scale: float = 1.0,
    margin: float = 0.0,
) -> QNetwork:
    """The network for a feature set; ``stack`` is needed for those per hole.

    ``is_residual`` and ``margin`` concern ``rates`` alone; ``prior_scale`` is where its scale
    begins: the prior is in units of reward, action values and margin in those times
    ``reward_scale``. Raises ValueError where
    ``is_dueling`` is asked of a network that learns from the taken row only.
    """
    if config.feature_set == "rates":
        from envs.cryoem.rates import NUM_FEATURES, PRIOR_COLUMN

        return CandidateNetwork(
            NUM_FEATURES,
            hidden_sizes,
            is_dueling=is_dueling is not False,
            prior_column=PRIOR_COLUMN if is_residual else None,
            prior_scale=prior_scale,
            margin=margin,
        )
    if is_dueling:
        raise ValueError(
            f"algorithm.dueling: with feature_set {config.feature_set!r} only the taken hole's row "
            "is learned from, so there is nothing to centre: leave it out, or use 'rates'"
        )
    if stack is None:
        raise ValueError(f"feature_set {config.feature_set!r} needs the sessions' tables")
    return HoleNetwork(
        Expander(stack, config), hidden_sizes, is_patch=config.action_level == "patch"
    )
