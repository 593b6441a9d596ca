"""What each algorithm can be told: one frozen class for each, its defaults and what they mean.

A config's ``algorithm`` section is one of them, chosen by ``name``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssl2rl_ray.schema import (
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    PositiveShare,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class _ValueLearning:
    """What is common to learning action values from replay; each algorithm below is one of it."""

    name: str = ""
    learning_rate: Positive = 1e-3
    """Adam's, falling linearly to ``final_learning_rate`` over the run."""
    final_learning_rate: NonNegative = 1e-5
    discount_per_min: PositiveShare = 0.99
    """Discount of one minute of microscope time; a move of t minutes is discounted by power t."""
    n_step: PositiveInt = 3
    double_q: bool = True
    dueling: bool | None = None
    """Q = V(state) + A(row), advantages centred over the allowed actions (Wang et al. 2016).

    None: as the feature set allows: ``rates`` yes; ``paper`` and ``cryorl`` no, there a gradient
    flows through the chosen hole's row alone.
    """
    is_residual: bool | None = None
    """A(row) begins as the planner's surplus of the row plus an MLP that begins at 0.

    None: as the feature set allows: ``rates`` yes; ``paper`` and ``cryorl`` have no planner.
    """
    margin: NonNegative = 0.0
    """Residual: how much more reward a move must promise than the planner's own to be preferred.

    Where the values say less than that, the planner's move is kept, so that their errors are not
    taken for improvements (after Laroche et al. 2019, arXiv:1712.06924). 0: greedy.
    """
    is_shaped: bool | None = None
    """Learn only what the dual bound of the reward still to come does not foresee.

    The bound shapes the reward, and ``discount_per_min`` then discounts what is left over, so a
    short horizon loses little (heuristic-guided RL: Cheng et al. 2021, arXiv:2106.02757, sec. 3).
    None: as the feature set allows: ``rates`` yes; ``paper`` and ``cryorl`` no.
    """
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)
    batch_size: PositiveInt = 128
    buffer_capacity: PositiveInt = 50_000
    """Transitions."""
    learning_starts: NonNegativeInt = 2_000
    """Env steps before the first update."""
    updates_per_env_step: Positive = 0.05
    target_update_interval: PositiveInt = 200
    """Updates between changes of the target network."""
    target_update_rate: PositiveShare = 1.0
    """How far the target then moves towards the network: 1 = a copy, less = soft updates."""
    is_averaged: bool = False
    """The policy that is validated and kept is the target network: an average of past weights."""
    epsilon_initial: Share = 0.2
    epsilon_final: Share = 0.02
    epsilon_steps: PositiveInt = 50_000
    """Env steps over which epsilon falls linearly."""
    is_prioritized: bool = False
    """Prioritised replay (Schaul et al. 2016)."""
    priority_exponent: Share = 0.6
    importance_exponent: Share = 0.4
    """beta_0, annealed to 1 over the run."""
    max_grad_norm: Positive = 10.0
    reward_scale: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class DQNConfig(_ValueLearning):
    """Masked per-hole DQN (Mnih et al. 2015; double: van Hasselt et al. 2016)."""

    name: Literal["dqn"] = "dqn"


@dataclass(frozen=True, kw_only=True)
class RainbowConfig(_ValueLearning):
    """Masked Rainbow (Hessel et al. 2018, arXiv:1710.02298): six parts, each may be left out.

    They are ``double_q``, ``dueling``, ``is_prioritized``, ``n_step`` (1 = off),
    ``is_distributional`` and ``is_noisy``.
    """

    name: Literal["rainbow"] = "rainbow"
    is_distributional: bool = True
    """Learn the distribution of the return on ``num_atoms`` values (C51: Bellemare et al. 2017)."""
    num_atoms: PositiveInt = 51
    v_min: float | None = None
    """Lowest return on the support, times ``reward_scale``. None: from the task.

    Navigation: what the budget can pay at best is the highest, and 0 the lowest; with ``is_shaped``
    the lowest is minus the highest, as far as a session can fall behind its bound.
    """
    v_max: float | None = None
    """Highest return on the support, times ``reward_scale``. None: from the task."""
    is_noisy: bool = True
    """Explore by noise in the weights, whose size is learned (Fortunato et al. 2018)."""
    initial_noise: Positive = 0.5
    """sigma_0: size of the noise at the start, over the square root of a layer's inputs."""
    is_prioritized: bool = True
    """Prioritised replay (Schaul et al. 2016); where distributional, by the KL divergence."""
    priority_exponent: Share = 0.5
    """omega (Hessel et al. 2018, table 1)."""
    epsilon_initial: Share = 0.0
    """Of epsilon-greedy exploration, beside the noise; without ``is_noisy`` it must be above 0."""
    epsilon_final: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation, RLlib's (Schulman et al. 2017, arXiv:1707.06347)."""

    name: Literal["ppo"] = "ppo"
    learning_rate: Positive = 1e-3
    """Adam's, falling linearly to ``final_learning_rate`` over the run."""
    final_learning_rate: NonNegative = 1e-4
    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    trace_decay: Share = 0.95
    """lambda of the generalised advantage estimate."""
    clip: Positive = 0.2
    """epsilon of the clipped objective."""
    entropy_weight: NonNegative = 0.0
    value_weight: NonNegative = 0.5
    num_epochs: PositiveInt = 6
    """Passes over the episodes of an update."""
    num_minibatches: PositiveInt = 4
    """Steps of the optimiser in a pass."""
    max_grad_norm: Positive = 1.0
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """Of the policy and of the value network, tanh."""


ValueAlgorithm = DQNConfig | RainbowConfig
"""Those that learn action values from replay."""
NavigationAlgorithm = DQNConfig | RainbowConfig
"""What ``algorithm`` may be in runs of kind navigation and ssl2rl, the default first."""
TuningAlgorithm = PPOConfig
"""What ``algorithm`` may be in runs of kind crystfel, the default first."""
