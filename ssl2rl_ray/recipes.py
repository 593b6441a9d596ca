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
    n_step: PositiveInt = 3
    double_q: bool = True
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
class _ValueNavigation(_ValueLearning):
    """What learning action values on navigation asks besides."""

    discount_per_min: PositiveShare = 0.99
    """Discount of one minute of microscope time; a move of t minutes is discounted by power t."""
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

    @property
    def discount(self) -> float:
        """Of the unit of time."""
        return self.discount_per_min


@dataclass(frozen=True, kw_only=True)
class DQNConfig(_ValueNavigation):
    """Masked per-hole DQN (Mnih et al. 2015; double: van Hasselt et al. 2016)."""

    name: Literal["dqn"] = "dqn"


@dataclass(frozen=True, kw_only=True)
class _RainbowParts(_ValueLearning):
    """What Rainbow adds to DQN, wherever it learns."""

    is_distributional: bool = True
    """Learn the distribution of the return on ``num_atoms`` values (C51: Bellemare et al. 2017)."""
    num_atoms: PositiveInt = 51
    v_min: float | None = None
    """Lowest return on the support, times ``reward_scale``. None: from the task.

    Navigation: what the budget can pay at best is the highest, and 0 the lowest; with ``is_shaped``
    the lowest is minus that, as far as a session can fall behind its bound, and the highest a
    quarter of it. Tuning: what the rise to the best possible fraction is worth.
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
class RainbowConfig(_RainbowParts, _ValueNavigation):
    """Masked Rainbow (Hessel et al. 2018, arXiv:1710.02298): six parts, each may be left out.

    They are ``double_q``, ``dueling``, ``is_prioritized``, ``n_step`` (1 = off),
    ``is_distributional`` and ``is_noisy``.
    """

    name: Literal["rainbow"] = "rainbow"


@dataclass(frozen=True, kw_only=True)
class _PolicyGradient:
    """What learners of a policy and its value have in common."""

    learning_rate: Positive = 1e-3
    """Adam's, falling linearly to ``final_learning_rate`` over the run."""
    final_learning_rate: NonNegative = 1e-4
    trace_decay: Share = 0.95
    """lambda of the generalised advantage estimate (Schulman et al. 2016, arXiv:1506.02438)."""
    entropy_weight: NonNegative = 0.0
    """Of the policy's entropy, falling linearly to ``final_entropy_weight`` over the run."""
    final_entropy_weight: NonNegative = 0.0
    value_weight: NonNegative = 0.5
    """Of the mean square error of the value."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are cut off at this norm; None: they are not."""
    reward_scale: Positive = 1.0
    hidden_sizes: tuple[PositiveInt, ...] = (64, 64)
    """Of the policy and of the value network."""


@dataclass(frozen=True, kw_only=True)
class A2CConfig(_PolicyGradient):
    """Advantage actor-critic, synchronous (Mnih et al. 2016, arXiv:1602.01783).

    One update for each fragment of ``training.rollout_length`` steps (t_max of the paper).
    """

    name: Literal["a2c"] = "a2c"
    n_step: PositiveInt | None = None
    """Rewards in a return before the value stands in, in place of ``trace_decay``.

    None: ``trace_decay`` decides, 1 being the paper's, as many as the fragment has.
    """
    is_standardized: bool = True
    """Advantages of an update are brought to mean 0 and sd 1; the paper takes them as they are."""


@dataclass(frozen=True, kw_only=True)
class AsyncA2CConfig(_PolicyGradient):
    """Advantage actor-critic, asynchronous: IMPALA (Espeholt et al. 2018, arXiv:1802.01561).

    One update for each fragment of each runner, as it comes; V-trace corrects for its age.
    """

    name: Literal["async_a2c"] = "async_a2c"
    trace_decay: Share = 1.0
    """lambda of V-trace."""
    max_rho: Positive = 1.0
    """How much more likely than when it was taken an action may count at most (rho)."""
    max_c: Positive = 1.0
    """The same for what comes back from later steps (c); at most ``max_rho``."""
    is_standardized: bool = True
    """Advantages of an update are brought to mean 0 and sd 1; the paper takes them as they are."""


@dataclass(frozen=True, kw_only=True)
class ACKTRConfig(_PolicyGradient):
    """Actor-critic with K-FAC in a trust region (Wu et al. 2017, arXiv:1708.05144)."""

    name: Literal["acktr"] = "acktr"
    n_step: PositiveInt | None = None
    """Rewards in a return before the value stands in, in place of ``trace_decay``."""
    is_standardized: bool = True
    """Advantages of an update are brought to mean 0 and sd 1; the paper takes them as they are.

    Without it ``learning_rate`` hangs on the scale of rewards.
    """
    learning_rate: Positive = 0.25
    """Largest step (eta_max), falling linearly to ``final_learning_rate`` over the run."""
    final_learning_rate: NonNegative = 0.025
    max_grad_norm: Positive | None = None
    """Gradients are cut off at this norm; None: they are not, the trust region limits the step."""
    max_kl: Positive = 0.005
    """delta of the trust region; values count too: Gaussian of variance 1 in scaled reward."""
    damping: Positive = 0.01
    """lambda: added to the Fisher matrix, times the unit matrix."""
    momentum: Share = 0.0
    """Share of the last step in the next. The paper has 0.9, and learns for 100 times as long."""
    moment_decay: Share = 0.95
    """Of the running averages of the Fisher matrix's factors, per update."""
    inverse_interval: PositiveInt = 10
    """Updates between new inverses of the factors."""
    other_learning_rate: NonNegative = 1e-3
    """Adam's, for parameters that are no Linear layer's."""


@dataclass(frozen=True, kw_only=True)
class PPOConfig(_PolicyGradient):
    """Proximal policy optimisation, RLlib's (Schulman et al. 2017, arXiv:1707.06347)."""

    name: Literal["ppo"] = "ppo"
    clip: Positive = 0.2
    """epsilon of the clipped objective."""
    num_epochs: PositiveInt = 6
    """Passes over the steps of an update."""
    num_minibatches: PositiveInt = 4
    """Steps of the optimiser in a pass."""


@dataclass(frozen=True, kw_only=True)
class _PolicyNavigation:
    """What learning a policy on navigation asks besides."""

    discount_per_min: PositiveShare = 0.97
    """Discount of one minute of microscope time; a move of t minutes is discounted by power t."""
    is_residual: bool | None = None
    """Logits begin as the planner's surplus of the row, plus an MLP that begins at 0.

    None: as the feature set allows: ``rates`` yes; ``paper`` and ``cryorl`` have no planner.
    """
    prior_scale: Positive = 4.0
    """Residual: what one reward of the planner's surplus counts for in the logits at first."""
    is_shaped: bool | None = None
    """Learn only what the dual bound of the reward still to come does not foresee.

    See DQN's; None: as the feature set allows: ``rates`` yes; ``paper`` and ``cryorl`` no.
    """

    @property
    def discount(self) -> float:
        """Of the unit of time."""
        return self.discount_per_min


@dataclass(frozen=True, kw_only=True)
class NavigationA2CConfig(_PolicyNavigation, A2CConfig):
    """Advantage actor-critic, synchronous and masked (Mnih et al. 2016, arXiv:1602.01783).

    One update for each fragment of ``training.rollout_length`` steps (t_max of the paper).
    """

    entropy_weight: NonNegative = 0.01
    reward_scale: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class NavigationAsyncA2CConfig(_PolicyNavigation, AsyncA2CConfig):
    """Advantage actor-critic, asynchronous and masked (Espeholt et al. 2018, arXiv:1802.01561).

    One update for each fragment of each runner, as it comes; V-trace corrects for its age.
    """

    entropy_weight: NonNegative = 0.01
    reward_scale: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class NavigationACKTRConfig(_PolicyNavigation, ACKTRConfig):
    """Masked actor-critic with K-FAC in a trust region (Wu et al. 2017, arXiv:1708.05144)."""

    reward_scale: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class NavigationPPOConfig(_PolicyNavigation, PPOConfig):
    """Proximal policy optimisation, RLlib's, masked (Schulman et al. 2017, arXiv:1707.06347)."""

    entropy_weight: NonNegative = 0.003
    num_epochs: PositiveInt = 3
    reward_scale: Positive = 0.1


@dataclass(frozen=True, kw_only=True)
class TuningA2CConfig(A2CConfig):
    """Advantage actor-critic, synchronous (Mnih et al. 2016, arXiv:1602.01783).

    One update for each episode of all experiments side by side.
    """

    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """Of the policy and of the value network, tanh."""


@dataclass(frozen=True, kw_only=True)
class TuningAsyncA2CConfig(AsyncA2CConfig):
    """Advantage actor-critic, asynchronous: IMPALA (Espeholt et al. 2018, arXiv:1802.01561).

    One update for each runner's episodes side by side, as they come.
    """

    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """Of the policy and of the value network, tanh."""


@dataclass(frozen=True, kw_only=True)
class TuningACKTRConfig(ACKTRConfig):
    """Actor-critic with K-FAC in a trust region (Wu et al. 2017, arXiv:1708.05144)."""

    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """Of the policy and of the value network, tanh."""


@dataclass(frozen=True, kw_only=True)
class TuningPPOConfig(PPOConfig):
    """Proximal policy optimisation, RLlib's (Schulman et al. 2017, arXiv:1707.06347)."""

    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    """Of the policy and of the value network, tanh."""


@dataclass(frozen=True, kw_only=True)
class TuningDQNConfig(_ValueLearning):
    """DQN on discrete changes (Mnih et al. 2015; double: van Hasselt et al. 2016)."""

    name: Literal["dqn"] = "dqn"
    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    dueling: bool = True
    """Q = V(state) + A(action), advantages centred over the actions (Wang et al. 2016)."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    reward_scale: Positive = 1.0


@dataclass(frozen=True, kw_only=True)
class TuningRainbowConfig(_RainbowParts):
    """Rainbow on discrete changes (Hessel et al. 2018, arXiv:1710.02298); see navigation's."""

    name: Literal["rainbow"] = "rainbow"
    discount: PositiveShare = 0.95
    """Of one evaluation: below 1, what is gained early counts more."""
    dueling: bool = True
    """Q = V(state) + A(action), advantages centred over the actions (Wang et al. 2016)."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 128)
    reward_scale: Positive = 1.0


AnyRainbow = RainbowConfig | TuningRainbowConfig
TuningValueAlgorithm = TuningDQNConfig | TuningRainbowConfig
"""Those that learn action values of changes of parameters from replay."""
ValueAlgorithm = DQNConfig | RainbowConfig
"""Those that learn action values from replay, on navigation."""
PolicyAlgorithm = (
    NavigationA2CConfig | NavigationAsyncA2CConfig | NavigationACKTRConfig | NavigationPPOConfig
)
"""Those that learn a policy and its value on navigation."""
NavigationAlgorithm = (
    DQNConfig
    | RainbowConfig
    | NavigationA2CConfig
    | NavigationAsyncA2CConfig
    | NavigationACKTRConfig
    | NavigationPPOConfig
)
"""What ``algorithm`` may be in runs of kind navigation and ssl2rl, the default first."""
TuningPolicyAlgorithm = TuningPPOConfig | TuningA2CConfig | TuningAsyncA2CConfig | TuningACKTRConfig
"""Those that learn a policy of changes of parameters, and its value."""
TuningAlgorithm = (
    TuningPPOConfig
    | TuningA2CConfig
    | TuningAsyncA2CConfig
    | TuningACKTRConfig
    | TuningDQNConfig
    | TuningRainbowConfig
)
"""What ``algorithm`` may be in runs of kind crystfel, the default first."""
