"""Networks that score actions (torch alone).

Shape letters: B batch, A actions, C candidate rows or cells, F features, H hidden units, N holes,
P patches, Z outputs of an action: one, its value, or the logits of a distribution of the return
over the atoms of a ``support`` (Bellemare et al. 2017, arXiv:1707.06887).

Every network maps an observation (tensors with B first) to action values (B, A), -inf where an
action is not allowed, in two steps: ``expand`` (no weights, so what it gives serves a target
network too) and ``score``. ``at`` has the outputs (B, Z) of given actions only, with the gradient
that learning needs, and an offset (B,) of their values; ``taken`` has those values. ``preference``
is what the policy maximises. With ``initial_noise`` all layers but the first are noisy (noisy.py).
``make_network`` makes the one that a config asks for.
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
from ssl2rl_ray.algorithms.losses import make_support
from ssl2rl_ray.algorithms.noisy import make_linear
from ssl2rl_ray.recipes import AnyRainbow

Support = tuple[float, float, int]
"""Lowest and highest return, and the number of atoms from one to the other."""
Observation = Mapping[str, Tensor]
_CELLS_AT_ONCE = 8192


def mlp(
    sizes: Sequence[int],
    num_outputs: int,
    initial_noise: float | None = None,
    *,
    num_plain: int = 1,
) -> nn.Sequential:
    """Linear and ReLU in turn, ``sizes`` = (inputs, hidden ...), and a linear output layer.

    The first ``num_plain`` layers are without noise.
    """
    layers: list[nn.Module] = []
    for i, (num_in, num_out) in enumerate(itertools.pairwise((*sizes, num_outputs))):
        noise = None if i < num_plain else initial_noise
        layers += [make_linear(num_in, num_out, noise), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def expectation(outputs: Tensor, support: Tensor | None) -> Tensor:
    """(...) values of outputs (..., Z): the output itself, or the mean of the distribution."""
    if support is None:
        return outputs.squeeze(-1)
    return outputs.softmax(-1) @ support


def _register_support(network: nn.Module, support: Support | None) -> int:
    """Makes the buffer and returns Z; it is no part of the weights."""
    atoms = None if support is None else make_support(*support)
    network.register_buffer("support", atoms, persistent=False)
    return 1 if atoms is None else len(atoms)


class CandidateNetwork(nn.Module):
    """One MLP over every candidate row: Q = V(all rows) + A(row), centred over allowed rows.

    Dueling: Wang et al. 2016, arXiv:1511.06581, eq. 9; of a distribution, each atom's logits are
    centred over the rows, never over the atoms. With ``prior_column`` the advantage is ``scale``
    times that feature (what a planner thinks of the row; the scale is learned) plus an MLP whose
    last layer begins at zero: untrained, the policy plays as the planner does. A distribution is
    moved by it as a whole, and the scale stays. The policy departs from the planner's move only for
    one whose value is higher by more than ``margin``: errors of the values are not taken for
    improvements.
    """

    support: Tensor | None

    def __init__(
        self,
        num_features: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_dueling: bool = True,
        prior_column: int | None = None,
        prior_scale: float = 1.0,
        margin: float = 0.0,
        support: Support | None = None,
        initial_noise: float | None = None,
    ) -> None:
        """Makes the layers; raises ValueError if the prior is not one of the features."""
        super().__init__()
        if prior_column is not None and not 0 <= prior_column < num_features:
            raise ValueError(f"prior_column: {prior_column} is not one of {num_features} features")
        if not hidden_sizes:
            raise ValueError("hidden_sizes: at least one hidden layer is needed")
        self.prior_column, self.margin = prior_column, margin
        num_outputs, num_hidden = _register_support(self, support), hidden_sizes[-1]
        self.body = nn.Sequential(*mlp((num_features, *hidden_sizes), 1, initial_noise)[:-1])
        # Centring cancels a constant: under dueling the advantage needs no bias.
        self.advantage = make_linear(num_hidden, num_outputs, initial_noise, bias=not is_dueling)
        self.value = (
            mlp((num_hidden, num_hidden), num_outputs, initial_noise, num_plain=0)
            if is_dueling
            else None
        )
        if prior_column is not None:
            for parameter in (self.advantage.weight, self.advantage.bias):
                if parameter is not None:
                    nn.init.zeros_(parameter)
            scale = torch.tensor(prior_scale)
            if support is None:
                self.prior_scale = nn.Parameter(scale)
            else:  # no gradient comes through the projection
                self.register_buffer("prior_scale", scale)

    def expand(self, observation: Observation) -> Observation:
        """The observation: its rows are features already."""
        return observation

    def forward(self, observation: Observation) -> Tensor:
        """(B, C) action values."""
        return self.score(observation)

    def score(self, observation: Observation) -> Tensor:
        """(B, C) action values from ``rows`` (B, C, F) float32 and ``action_mask`` (B, C)."""
        hidden = self.body(observation["rows"])
        outputs, prior = self.advantage(hidden), self._prior(observation)
        if self.value is not None:
            part = _part(observation["action_mask"])
            base = self.value(_pool(part, hidden)) - _pool(part, outputs)
            outputs = outputs + base[:, None]
            prior = prior - (part * prior).sum(1, keepdim=True)
        q = expectation(outputs, self.support) + prior
        return q.masked_fill(~observation["action_mask"].bool(), -torch.inf)

    def _prior(self, observation: Observation) -> Tensor:
        """(B, C) what the planner thinks of the rows."""
        rows = observation["rows"]
        if self.prior_column is None:
            return rows.new_zeros(rows.shape[:2])
        return self.prior_scale * rows[..., self.prior_column]

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

    def at(self, observation: Observation, action: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, Z) and offsets (B,) of the candidates (B,) int64."""
        hidden, prior = self.body(observation["rows"]), self._prior(observation)
        at = torch.arange(len(action), device=action.device)
        chosen, offset = hidden[at, action], prior[at, action]
        if self.value is None:
            return self.advantage(chosen), offset
        # The advantage is linear: that of the pooled rows is the mean of all rows' advantages.
        part = _part(observation["action_mask"])
        pooled = _pool(part, hidden)
        outputs = self.value(pooled) + self.advantage(chosen - pooled)
        return outputs, offset - (part * prior).sum(1)

    def taken(self, observation: Observation, action: Tensor) -> Tensor:
        """(B,) values of the candidates (B,) int64."""
        outputs, offset = self.at(observation, action)
        return expectation(outputs, self.support) + offset


def _part(is_allowed: Tensor) -> Tensor:
    """(B, C) float32 weights of a mean over what is allowed (B, C); 0 where nothing is."""
    part = is_allowed.float()
    return part / part.sum(dim=1, keepdim=True).clamp(min=1)


def _pool(part: Tensor, values: Tensor) -> Tensor:
    """(B, H) means of (B, C, H)."""
    return torch.einsum("bc,bch->bh", part, values)


class HoleNetwork(nn.Module):
    """One MLP over every unvisited hole; it serves sessions of any size with the same weights.

    Equal to ``mlp`` on ``envs.cryoem.features.hole_features`` (own p rounded, see
    ``expander.P_STEP``), hole by hole, at a fraction of the cost: the first layer is applied per
    patch and per cell. With ``action_level`` patch, a patch is worth what its best unvisited hole
    by prediction is worth.
    """

    support: Tensor | None

    def __init__(
        self,
        expander: Expander,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_patch: bool = False,
        support: Support | None = None,
        initial_noise: float | None = None,
    ) -> None:
        """Makes the layers; raises ValueError without a hidden layer."""
        super().__init__()
        if not hidden_sizes:
            raise ValueError("hidden_sizes: at least one hidden layer is needed")
        self.expander = expander
        self.is_patch = is_patch
        num_features = expander.num_past_steps * expander.num_features
        num_outputs = _register_support(self, support)
        self.mlp = mlp((num_features, *hidden_sizes), num_outputs, initial_noise)

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
            q = self.values_of(per_patch.addcmul_(p[..., None], own))
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
                self.values_of(flat.index_select(0, rows).addcmul_(column[:, None], own))
                for rows, column in zip(at.split(size), p.flatten().split(size), strict=True)
            ]
        ).view(batch, -1)

    def preference(self, expanded: Expanded, q: Tensor | None = None) -> Tensor:
        """The action values; ``q`` saves computing them again."""
        return self.score(expanded) if q is None else q

    def at(self, expanded: Expanded, action: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, Z) of holes or patches (B,) int64, their rows alone; offsets (B,) of 0."""
        table, session = self.expander.table, expanded.session
        hole = action
        if self.is_patch:
            is_left = table("is_hole", session) & ~expanded.visited
            hole = self.best_hole(session, is_left)[0].gather(1, action[:, None])[:, 0]
        at = torch.arange(len(action), device=action.device)
        per_patch, own = self.first_layer(expanded.group[at, table("patch", session)[at, hole]])
        outputs = self.tail(per_patch + table("own_p", session)[at, hole][:, None] * own)
        return outputs, outputs.new_zeros(len(action))

    def taken(self, observation: Observation, action: Tensor) -> Tensor:
        """(B,) values of holes or patches (B,) int64; only their rows are computed."""
        return expectation(self.at(self.expand(observation), action)[0], self.support)

    def first_layer(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """What a patch (or row) contributes (..., H), and the column (H,) that own p multiplies."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        weight = first.weight.index_select(1, self.expander.group_columns)
        own = first.weight.index_select(1, self.expander.own_columns).sum(1)
        return nn.functional.linear(group, weight, first.bias), own

    def tail(self, hidden: Tensor) -> Tensor:
        """(..., Z) the other layers on (..., H), which is overwritten."""
        for layer in self.mlp[1:]:
            hidden = hidden.relu_() if isinstance(layer, nn.ReLU) else layer(hidden)
        return hidden

    def values_of(self, hidden: Tensor) -> Tensor:
        """(...) values of (..., H), which is overwritten."""
        return expectation(self.tail(hidden), self.support)

    def best_hole(self, session: Tensor, is_left: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P) the best hole left of each patch by prediction, and where there is one."""
        slot = self.expander.table("slot", session)
        is_open = self.expander.table("is_slot", session) & is_left.gather(
            1, slot.flatten(1)
        ).view_as(slot)
        has_hole, first = is_open.to(torch.uint8).max(2, keepdim=True)
        return slot.gather(2, first).squeeze(2), has_hole.squeeze(2).bool()


class VectorNetwork(nn.Module):
    """Action values of one flat observation (B, F), as tuning and the control tasks have it.

    Dueling as in ``CandidateNetwork``; every action is allowed.
    """

    support: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_actions: int,
        hidden_sizes: Sequence[int] = (64, 64),
        *,
        is_dueling: bool = True,
        support: Support | None = None,
        initial_noise: float | None = None,
    ) -> None:
        """Makes the layers; raises ValueError without a hidden layer."""
        super().__init__()
        if not hidden_sizes:
            raise ValueError("hidden_sizes: at least one hidden layer is needed")
        num_outputs, num_hidden = _register_support(self, support), hidden_sizes[-1]
        self.body = nn.Sequential(*mlp((num_features, *hidden_sizes), 1, initial_noise)[:-1])
        self.advantage = make_linear(num_hidden, num_actions * num_outputs, initial_noise)
        self.value = make_linear(num_hidden, num_outputs, initial_noise) if is_dueling else None
        self.num_outputs = num_outputs

    def expand(self, observation: Tensor) -> Tensor:
        """The observation as floats."""
        return observation.float()

    def forward(self, observation: Tensor) -> Tensor:
        """(B, A) action values."""
        return self.score(self.expand(observation))

    def outputs(self, observation: Tensor) -> Tensor:
        """(B, A, Z) of (B, F)."""
        hidden = self.body(observation)
        outputs = self.advantage(hidden).unflatten(-1, (-1, self.num_outputs))
        if self.value is None:
            return outputs
        return self.value(hidden)[:, None] + outputs - outputs.mean(1, keepdim=True)

    def score(self, observation: Tensor) -> Tensor:
        """(B, A) action values."""
        return expectation(self.outputs(observation), self.support)

    def preference(self, observation: Tensor, q: Tensor | None = None) -> Tensor:
        """The action values; ``q`` saves computing them again."""
        return self.score(observation) if q is None else q

    def at(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, Z) of actions (B,) int64, and offsets (B,) of 0."""
        outputs = self.outputs(observation)
        at = torch.arange(len(action), device=action.device)
        return outputs[at, action], outputs.new_zeros(len(action))

    def taken(self, observation: Tensor, action: Tensor) -> Tensor:
        """(B,) values of actions (B,) int64."""
        return expectation(self.at(self.expand(observation), action)[0], self.support)


QNetwork = CandidateNetwork | HoleNetwork


def support_of(config: AnyRainbow, lowest: float, highest: float) -> Support | None:
    """The support of a recipe: as asked, else the task's returns, times ``reward_scale``.

    None where values are no distributions. Raises ValueError where that is no range.
    """
    if not config.is_distributional:
        return None
    low = lowest * config.reward_scale if config.v_min is None else config.v_min
    high = highest * config.reward_scale if config.v_max is None else config.v_max
    if not low < high:
        raise ValueError(
            f"algorithm.v_min, algorithm.v_max: {low:g} to {high:g} is no range; where one is null "
            "it comes from the task: set both"
        )
    return low, high, config.num_atoms


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
    support: Support | None = None,
    initial_noise: float | None = None,
) -> QNetwork:
    """The network for a feature set; ``stack`` is needed for those per hole.

    ``is_residual`` and ``margin`` concern ``rates`` alone; ``prior_scale`` is where its scale
    begins: the prior is in units of reward, action values and margin in those times
    ``reward_scale``. ``support`` makes values distributions, ``initial_noise`` layers noisy. Raises
    ValueError where ``is_dueling`` is asked of a network that learns from the taken row only.
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
            support=support,
            initial_noise=initial_noise,
        )
    if is_dueling:
        raise ValueError(
            f"algorithm.dueling: with feature_set {config.feature_set!r} only the taken hole's row "
            "is learned from, so there is nothing to centre: leave it out, or use 'rates'"
        )
    if stack is None:
        raise ValueError(f"feature_set {config.feature_set!r} needs the sessions' tables")
    return HoleNetwork(
        Expander(stack, config),
        hidden_sizes,
        is_patch=config.action_level == "patch",
        support=support,
        initial_noise=initial_noise,
    )
