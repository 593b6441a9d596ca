"""A trained tuning policy that acts with torch alone: two files, no Ray, no pickle.

policy.safetensors   the weights of the policy network
policy.json          what they expect: rules, columns of an observation, layers

Shape letters: E experiments, F observation, K parameters that are tuned.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from envs.crystfel.env import FREE_OUTPUTS, Outcome, Progress, num_features
from envs.crystfel.rivals import Make, Trial
from envs.crystfel.types import FloatArray, TuningConfig
from ssl2rl_ray.algorithms.actor_critic import MAX_LOG_SPREAD, tanh_mlp
from ssl2rl_ray.algorithms.networks import Support, VectorNetwork

FORMAT = "ssl2rl-tuning-policy"
FORMAT_VERSION = 1
PATIENCE, STUCK_SPREAD = 5, 0.12
"""After so many evaluations without a gain an experiment is unlike those of the training, and
actions are spread at least so much (chosen on simulated experiments of their own seed)."""


class PolicyError(ValueError):
    """A folder is not a tuning policy that this program can use; the message says why."""


def num_outputs(config: TuningConfig) -> int:
    """Outputs of the policy network: K means and K logs of sds, or a score of each action."""
    num = len(config.tunables)
    return 2 * num if config.action == "continuous" else 2 * num + 1


@dataclass(frozen=True, kw_only=True)
class Values:
    """Of a policy whose scores are action values (dqn, rainbow): how its network is made."""

    is_dueling: bool = True
    support: Support | None = None
    """Of the distributions whose means are the action values, where they are."""


def make_network(
    config: TuningConfig,
    hidden_sizes: tuple[int, ...],
    values: Values | None = None,
    initial_noise: float | None = None,
) -> nn.Module:
    """(E, F) -> (E, ``num_outputs``): a policy, tanh between the layers, or action values."""
    if values is None:
        return tanh_mlp((num_features(config), *hidden_sizes), num_outputs(config))
    return VectorNetwork(
        num_features(config),
        num_outputs(config),
        hidden_sizes,
        is_dueling=values.is_dueling,
        support=values.support,
        initial_noise=initial_noise,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class TuningPolicy:
    """Greedy (the mean action, or the one of the highest score), or as spread as it learned to be.

    The spread is part of what was learned: wide where nothing is known, narrow where the outputs
    say what is wrong. Action values have none: the best one is taken, and one by chance where the
    policy is stuck.
    """

    network: nn.Module
    config: TuningConfig
    """The rules that it was trained under."""
    hidden_sizes: tuple[int, ...]
    name: str = "ppo"
    values: Values | None = None
    """None: the scores are logits, or means and logs of sds."""

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        config: TuningConfig,
        hidden_sizes: tuple[int, ...],
        name: str = "ppo",
        values: Values | None = None,
    ) -> Self:
        """From the weights of ``make_network``; raises PolicyError where they do not fit."""
        network = make_network(config, hidden_sizes, values)
        try:
            network.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise PolicyError(f"policy {name}: weights and description differ: {error}") from error
        network.eval().requires_grad_(False)
        return cls(
            network=network, config=config, hidden_sizes=hidden_sizes, name=name, values=values
        )

    @torch.no_grad()
    def act(
        self,
        observation: FloatArray,
        rng: np.random.Generator | None = None,
        least_sd: FloatArray | float = 0.0,
    ) -> FloatArray:
        """(E, K) actions, or (E,) discrete ones, of (E, F) observations; greedy without ``rng``.

        ``least_sd``: of (E, 1) or all, where the policy has grown too sure of itself.
        """
        output = self.network(torch.as_tensor(observation, dtype=torch.float32)).numpy()
        if self.values is not None:
            return _best_unless_stuck(output, rng, least_sd)
        if self.config.action == "discrete":
            noise = 0.0 if rng is None else rng.gumbel(size=output.shape)
            return (output + noise).argmax(1)
        mean, log_sd = np.split(output, 2, axis=1)
        if rng is None:
            return mean
        sd = np.exp(np.clip(log_sd, -MAX_LOG_SPREAD, MAX_LOG_SPREAD))
        return mean + np.maximum(sd, least_sd) * rng.standard_normal(mean.shape)

    def save(self, folder: Path) -> None:
        """Writes both files; the folder exists."""
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        # not `save_file`: it makes a file that nobody but its owner may read
        (folder / "policy.safetensors").write_bytes(save(weights))
        description = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "config": dataclasses.asdict(self.config),
            "free_outputs": list(FREE_OUTPUTS),
            "hidden_sizes": list(self.hidden_sizes),
            "values": None if self.values is None else dataclasses.asdict(self.values),
            "num_parameters": sum(value.numel() for value in weights.values()),
        }
        (folder / "policy.json").write_text(json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads both files, of an exported folder or of a run; raises PolicyError otherwise."""
        path = Path(folder)
        if (path / "policy" / "policy.json").is_file():
            path = path / "policy"
        try:
            description: dict[str, Any] = dict(json.loads((path / "policy.json").read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise PolicyError(
                f"{path} is not an exported policy ({error}): give a run of kind crystfel or its "
                "`policy` folder"
            ) from error
        version = description.get("format_version", 0)
        is_known = isinstance(version, int) and version <= FORMAT_VERSION
        if description.get("format") != FORMAT or not is_known:
            raise PolicyError(
                f"{path}: format {description.get('format')!r} version {version}; this program "
                f"reads {FORMAT!r} up to {FORMAT_VERSION}: update ssl2rl-ray"
            )
        if description.get("free_outputs") != list(FREE_OUTPUTS):
            raise PolicyError(
                f"{path}: the policy learned from other outputs than this version of ssl2rl-ray "
                "observes: train it again, or use the version that trained it"
            )
        try:
            rules: dict[str, Any] = dict(description["config"])
            rules["tunables"] = tuple(rules["tunables"])
            return cls.of(
                load_file(path / "policy.safetensors"),
                TuningConfig(**rules),
                tuple(description["hidden_sizes"]),
                description["name"],
                _values_of(description.get("values")),
            )
        except PolicyError:
            raise
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise PolicyError(f"{path}: the policy is damaged: {error}") from error

    def check_tunes(self, config: TuningConfig) -> None:
        """Raises PolicyError where these rules tune other parameters than it learned to."""
        if config.tunables != self.config.tunables:
            raise PolicyError(
                f"policy {self.name} tunes {', '.join(self.config.tunables)}, and "
                f"{', '.join(config.tunables)} are asked for"
            )

    @property
    def make(self) -> Make:
        """The policy behind the rivals' shape."""

        def make(
            config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
        ) -> PolicyOptimiser:
            self.check_tunes(config)
            return PolicyOptimiser(self, start, outcome, rng)

        return make


def _best_unless_stuck(
    q: FloatArray, rng: np.random.Generator | None, least_sd: FloatArray | float
) -> FloatArray:
    """(E,) the best of (E, A) action values; any where more spread is asked for."""
    best = q.argmax(1)
    if rng is None:
        return best
    is_stuck = np.broadcast_to(np.asarray(least_sd) > 0, (len(q), 1))[:, 0]
    return np.where(is_stuck, rng.integers(q.shape[1], size=len(q)), best)


def _values_of(described: dict[str, Any] | None) -> Values | None:
    if described is None:
        return None
    support = described["support"]
    return Values(
        is_dueling=described["is_dueling"], support=None if support is None else tuple(support)
    )


class PolicyOptimiser:
    """``rivals.Optimiser``: asks the policy; after its T steps, T more from the best."""

    def __init__(
        self,
        policy: TuningPolicy,
        start: FloatArray,
        outcome: Outcome,
        rng: np.random.Generator | None,
    ) -> None:
        """Use ``TuningPolicy.make``; ``rng`` None: greedy."""
        self.policy, self.rng = policy, rng
        self.progress = Progress(policy.config, start, outcome)

    def ask(self) -> FloatArray:
        """(E, K) units; wider ones where the last ``PATIENCE`` gained nothing."""
        is_stuck = self.progress.num_since_best >= PATIENCE
        least_sd = np.where(is_stuck, STUCK_SPREAD, 0.0)[:, None]
        action = self.policy.act(self.progress.observation(), self.rng, least_sd)
        return self.progress.propose(action)

    def tell(self, trial: Trial) -> None:
        """Keeps the best."""
        self.progress.update(trial.unit, trial.outcome, trial.gain, trial.best_fraction)
