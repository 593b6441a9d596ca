"""Train a policy that tunes an SFX analysis: config -> simulated experiments -> RLlib -> files.

Training, validation and any later comparison draw experiments from seeds that never meet. Shape
letters: E experiments, n evaluations.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from envs.crystfel.env import CrystFELVectorEnv, SurrogateBench, num_features, worth
from envs.crystfel.rivals import tune
from envs.crystfel.surrogate import Sample, best_fraction, draw_experiments, true_fraction
from ssl2rl_ray.algorithms.actor_critic import VectorActorCritic
from ssl2rl_ray.algorithms.networks import support_of
from ssl2rl_ray.config import CrystFELRunConfig, TrainingConfig, check
from ssl2rl_ray.learn import Task, learn, training_row
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.recipes import AnyRainbow, TuningValueAlgorithm
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.tuning.figures import draw_traces
from ssl2rl_ray.tuning.policy import TuningPolicy, Values, make_network, num_outputs

_VALIDATION_SEED = 20210331
_VALIDATED_AT = (10, 20)
"""Evaluations, the start included, at which a policy is judged."""
_DRAWN = 4
"""Experiments whose traces TensorBoard gets."""


def data_hashes(config: CrystFELRunConfig) -> dict[str, str]:
    """Nothing is read: experiments are simulated."""
    return {}


def training_env(config: CrystFELRunConfig, *, num_envs: int, seed: int) -> CrystFELVectorEnv:
    """The env of one runner."""
    return CrystFELVectorEnv(
        config.env,
        num_envs,
        kind=config.experiments.kind,
        pool_size=config.experiments.pool_size,
        seed=seed,
    )


def network_of(config: CrystFELRunConfig) -> nn.Module:
    """The policy and its value; or action values, with noise where they are explored by it."""
    algorithm = config.algorithm
    if isinstance(algorithm, TuningValueAlgorithm):
        noise = None
        if isinstance(algorithm, AnyRainbow) and algorithm.is_noisy:
            noise = algorithm.initial_noise
        return make_network(config.env, algorithm.hidden_sizes, values_of(config), noise)
    return VectorActorCritic(
        num_features(config.env),
        num_outputs(config.env),
        config.algorithm.hidden_sizes,
        is_gaussian=config.env.action == "continuous",
    )


def values_of(config: CrystFELRunConfig) -> Values | None:
    """What action values are made of, where the algorithm learns some.

    Returns are rises of what a share of the best fraction is worth, or changes of the fraction
    (``env.reward``); a discount leaves them within the same bounds.
    """
    algorithm = config.algorithm
    if not isinstance(algorithm, TuningValueAlgorithm):
        return None
    support = None
    if isinstance(algorithm, AnyRainbow):
        nothing, everything = worth(np.array([0.0, np.inf]))
        is_best = config.env.reward == "best"
        support = support_of(algorithm, *((0.0, everything - nothing) if is_best else (-1.0, 1.0)))
    return Values(is_dueling=algorithm.dueling, support=support)


def policy_of(weights: dict[str, torch.Tensor], config: CrystFELRunConfig) -> TuningPolicy:
    """The policy among the weights of ``network_of``."""
    algorithm, values = config.algorithm, values_of(config)
    if values is not None:
        return TuningPolicy.of(weights, config.env, algorithm.hidden_sizes, algorithm.name, values)
    found = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    return TuningPolicy.of(found, config.env, config.algorithm.hidden_sizes, config.algorithm.name)


class Validation:
    """The greedy policy on the same simulated experiments, the same for all runs."""

    def __init__(self, config: CrystFELRunConfig) -> None:
        """Draws them."""
        rng = np.random.default_rng(_VALIDATION_SEED)
        num = config.training.num_validation_experiments
        self.experiments = draw_experiments(rng, "normal", num)
        sample = Sample.draw(rng, num, config.env.num_frames)
        self.bench = SurrogateBench(self.experiments, sample)
        self.best = np.maximum(best_fraction(self.experiments), 0.02)

    def play(self, policy: TuningPolicy) -> dict[str, float]:
        """Share of the best true fraction that is reached: its mean over experiments."""
        trace = tune(
            self.bench,
            policy.config,
            policy.make,
            num_evaluations=max(_VALIDATED_AT),
            rng=np.random.default_rng(0),
        )
        row = {
            f"validation/share_{n}": float(
                (true_fraction(self.experiments, trace.best_values[n - 1]) / self.best).mean()
            )
            for n in _VALIDATED_AT
        }
        row["validation/share_of_best"] = float(np.mean(list(row.values())))
        return row

    def draw(self, policy: TuningPolicy) -> dict[str, np.ndarray]:
        """The first of the experiments, evaluation by evaluation."""
        some = slice(0, _DRAWN)
        bench = SurrogateBench(
            self.experiments.select(some), self.bench.sample.select(some, slice(None))
        )
        trace = tune(
            bench,
            policy.config,
            policy.make,
            num_evaluations=max(_VALIDATED_AT),
            rng=np.random.default_rng(0),
        )
        return {"trace": draw_traces(trace.best_fraction, self.best[some])}


def train(
    config: CrystFELRunConfig,
    run: RunDirectory,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    is_drawn: bool = False,
) -> dict[str, Any]:
    """Trains to the end, from the run's latest checkpoint if it has one.

    Args:
        config: what the run was begun with.
        run: open for writing; gets metrics, checkpoints, TensorBoard events, the best policy (by
            validation) and the summary.
        progress: told each row of metrics; None prints a line to stderr.
        is_drawn: whether TensorBoard gets traces of the best policy now and then.

    Returns:
        The summary.

    Raises:
        ValueError: settings (``config.check``) that do not go together, by name.
        KeyboardInterrupt: after Ctrl-C, once the state is safe on disk.
    """
    from ssl2rl_ray.algorithms.registry import ALGORITHMS

    check(config)
    torch.set_num_threads(config.training.num_torch_threads)
    with local_ray(config.training.num_env_runners + 1), contextlib.ExitStack() as stack:
        algorithm: Any = ALGORITHMS[config.algorithm.name](
            config.algorithm,
            sampling(config),
            make_env=functools.partial(training_env, config),
            make_network=functools.partial(network_of, config),
            seed=config.seed,
        )
        stack.callback(algorithm.stop)
        validation = Validation(config)
        task = Task(
            criterion="validation/share_of_best",
            best_name="best_share_of_best",
            validate=lambda weights: validation.play(policy_of(weights, config)),
            save_policy=lambda weights, folder: policy_of(weights, config).save(folder),
            training_row=functools.partial(training_row, algorithm, config.algorithm),
            checkpoint=algorithm.checkpoint,
            progress=progress or _print_row,
            draw=(lambda folder: validation.draw(TuningPolicy.load(folder))) if is_drawn else None,
        )
        return learn(config, run, algorithm, task)


def sampling(config: CrystFELRunConfig) -> TrainingConfig:
    """Fragments are whole episodes: their steps, and the one in which the env begins anew."""
    training = config.training
    return TrainingConfig(
        num_env_steps=training.num_env_steps,
        num_env_runners=training.num_env_runners,
        num_envs_per_runner=training.num_envs,
        rollout_length=config.env.num_steps + 1,
        num_torch_threads=training.num_torch_threads,
    )


def _print_row(row: dict[str, Any]) -> None:
    shares = "  ".join(
        f"{row[f'validation/share_{n}']:.3f} of the best at {n}" for n in _VALIDATED_AT
    )
    parts = [f"{row['num_env_steps']:>9,} evaluations", shares]
    if row.get("train/episode_return") is not None:
        parts += [f"return {row['train/episode_return']:.3f}", f"{row['wall_s']:.0f} s"]
    print("  ".join(parts), file=sys.stderr, flush=True)
