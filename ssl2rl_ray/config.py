"""What a user's YAML says, as frozen values: one default each, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from envs.cryoem.types import ActionLevel, FeatureSet, Preset


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where sessions come from. Paths are dataset folders, as ``ssl2rl import`` writes them."""

    train: tuple[str, ...] = ()
    """Sessions to train on; empty = synthetic sessions only."""
    validation: tuple[str, ...] = ()
    """Sessions on which the best checkpoint is selected, beside synthetic ones; never test data."""
    validation_grids: tuple[str, ...] = ()
    """Grids of the training sessions (by name) held out of training and used for validation."""
    calibration: str | None = None
    """Dataset folder whose stored calibration is used; None = fitted on the training sessions."""


@dataclass(frozen=True, kw_only=True)
class SessionsConfig:
    """What one training episode is played on: weights of three sources (they need not sum to 1)."""

    real: float = 0.0
    """A training session as it is, with its own labels."""
    redrawn: float = 0.0
    """A training session whose labels are drawn again from the calibrated model."""
    synthetic: float = 1.0
    """A session drawn afresh: structure, predictions and labels (domain randomisation)."""
    preset: str = "aldolase"
    """Synthetic preset, see ``envs.cryoem.synthetic``."""
    pool_size: int | None = None
    """Sessions drawn once at the start and replayed; None = afresh every episode (``rates`` only)."""
    budget_range_min: tuple[float, float] | None = None
    """Budgets drawn per episode; None = always ``env.budget_min``."""


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """``NavigationConfig`` by preset with changes; None keeps the preset's value."""

    preset: Preset = "paper"
    budget_min: float | None = None
    """Minutes."""
    low_ctf_threshold_A: float | None = None
    """Å."""
    is_threshold_inclusive: bool | None = None
    action_level: ActionLevel | None = None
    feature_set: FeatureSet | None = None
    num_past_steps: int | None = None
    num_candidates: int | None = None
    minutes: tuple[float, float, float, float] | None = None
    """Minutes of a move within the patch, to another patch, square, grid."""
    reward: tuple[float, float, float, float] | None = None
    """Reward of a low-CTF target reached by such a move."""


@dataclass(frozen=True, kw_only=True)
class DQNConfig:
    """Masked per-hole DQN (Mnih et al. 2015; double: van Hasselt et al. 2016)."""

    name: Literal["dqn"] = "dqn"
    learning_rate: float = 1e-3
    """Adam's, falling linearly to ``final_learning_rate`` over the run."""
    final_learning_rate: float = 1e-5
    discount_per_min: float = 0.99
    """Discount of one minute of microscope time: a move of t minutes is discounted by its power t."""
    n_step: int = 3
    double_q: bool = True
    dueling: bool = True
    """Q = V(state) + A(row), advantages centred over the allowed actions."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    batch_size: int = 128
    buffer_capacity: int = 50_000
    """Transitions."""
    learning_starts: int = 2_000
    """Env steps before the first update."""
    updates_per_env_step: float = 0.05
    target_update_interval: int = 200
    """Updates between copies to the target network."""
    epsilon_initial: float = 0.2
    epsilon_final: float = 0.02
    epsilon_steps: int = 50_000
    """Env steps over which epsilon falls linearly."""
    is_prioritized: bool = False
    """Prioritised replay (Schaul et al. 2016)."""
    priority_exponent: float = 0.6
    importance_exponent: float = 0.4
    """beta_0, annealed to 1 over the run."""
    max_grad_norm: float = 10.0
    reward_scale: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how wide, and how often it is looked at."""

    num_env_steps: int = 200_000
    num_env_runners: int = 0
    """Remote env runners; 0 = in the algorithm's own process (best on few cores)."""
    num_envs_per_runner: int = 32
    """Episodes in one numpy step."""
    num_torch_threads: int = 2
    evaluation_interval_steps: int = 20_000
    """Env steps between validations, checkpoints and progress lines."""
    num_validation_sessions: int = 64
    """Synthetic (or redrawn) sessions of the validation, the same in every validation."""


@dataclass(frozen=True, kw_only=True)
class NavigationRunConfig:
    """``kind: navigation``: train a policy that chooses holes."""

    kind: Literal["navigation"] = "navigation"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    algorithm: DQNConfig = field(default_factory=DQNConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
