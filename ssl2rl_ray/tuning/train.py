"""Train a policy that tunes an SFX analysis: config -> simulated experiments -> RLlib -> files.

Training, validation and any later comparison draw experiments from seeds that never meet. Shape
letters: E experiments, n evaluations.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.crystfel.env import (
    CrystFELVectorEnv,
    SurrogateBench,
    action_space,
    observation_space,
)
from envs.crystfel.rivals import tune
from envs.crystfel.surrogate import Sample, best_fraction, draw_experiments, true_fraction
from ssl2rl_ray.config import CrystFELRunConfig, check
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.runs import RunDirectory, on_interrupt
from ssl2rl_ray.schema import to_dict, to_yaml
from ssl2rl_ray.tensorboard import TensorBoard
from ssl2rl_ray.tuning.policy import TuningPolicy

_VALIDATION_SEED = 20210331
_VALIDATED_AT = (10, 20)
"""Evaluations, the start included, at which a policy is judged."""


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


def policy_of(weights: dict[str, torch.Tensor], config: CrystFELRunConfig) -> TuningPolicy:
    """The policy network out of RLlib's module."""
    found: dict[str, torch.Tensor] = {}
    num_hidden = len(config.algorithm.hidden_sizes)
    encoder = [k for k in weights if k.startswith("encoder.actor_encoder.")]
    for kind in ("weight", "bias"):
        names = sorted(
            (k for k in encoder if k.endswith(f".{kind}")), key=lambda k: int(k.split(".")[-2])
        )
        assert len(names) == num_hidden, f"RLlib names its encoder otherwise: {encoder}"
        for i, name in enumerate(names):
            found[f"{2 * i}.{kind}"] = weights[name]
        (head,) = (k for k in weights if k.startswith("pi.") and k.endswith(f".{kind}"))
        found[f"{2 * num_hidden}.{kind}"] = weights[head]
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


def train(
    config: CrystFELRunConfig,
    run: RunDirectory,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains to the end, from the run's latest checkpoint if it has one.

    Args:
        config: what the run was begun with.
        run: open for writing; gets metrics, checkpoints, TensorBoard events, the best policy (by
            validation) and the summary.
        progress: told each row of metrics; None prints a line to stderr.

    Returns:
        The summary.

    Raises:
        ValueError: settings (``config.check``) that do not go together, by name.
        KeyboardInterrupt: after Ctrl-C, once the state is safe on disk.
    """
    from ssl2rl_ray.tuning.ppo import build

    check(config)
    progress = progress or _print_row
    training = config.training
    torch.set_num_threads(training.num_torch_threads)
    begun = time.perf_counter()
    with local_ray(training.num_env_runners + 1), contextlib.ExitStack() as stack:
        algorithm = build(
            config.algorithm,
            training,
            make_env=functools.partial(training_env, config),
            single_observation_space=observation_space(config.env),
            single_action_space=action_space(config.env),
            num_steps=config.env.num_steps,
            seed=config.seed,
        )
        stack.callback(algorithm.stop)
        if run.latest is not None:
            algorithm.restore_checkpoint(_read_state(run.latest))
            _keep_best(run)  # it may have been killed between the two
        first_step = algorithm.num_env_steps
        validation = Validation(config)
        board = stack.enter_context(TensorBoard(run.path / "tensorboard", first_step=first_step))
        if not first_step:
            board.begin(to_dict(config), to_yaml(config), "validation/share_of_best")
        interrupted = stack.enter_context(on_interrupt())
        next_look = _next_multiple(first_step, training.evaluation_interval_steps)
        while algorithm.num_env_steps < training.num_env_steps:
            result = algorithm.train()
            is_over = algorithm.num_env_steps >= training.num_env_steps or interrupted.is_set()
            if algorithm.num_env_steps >= next_look or is_over:
                row = _training_row(algorithm, result)
                row["wall_s"] = time.perf_counter() - begun
                _look(config, run, algorithm, validation, board, row, progress)
                next_look = _next_multiple(
                    algorithm.num_env_steps, training.evaluation_interval_steps
                )
            if interrupted.is_set():
                raise KeyboardInterrupt
        return _finish(run, algorithm)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return torch.load(checkpoint / "state.pt", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): remove that folder and resume again, from the "
            "checkpoint before it"
        ) from error


def _look(
    config: CrystFELRunConfig,
    run: RunDirectory,
    algorithm: Any,
    validation: Validation,
    board: TensorBoard,
    row: dict[str, Any],
    progress: Callable[[dict[str, Any]], None],
) -> None:
    """Validates, saves, and says so."""
    policy = policy_of(algorithm.network_state(), config)
    row = {"num_env_steps": algorithm.num_env_steps, **row, **validation.play(policy)}

    def write(folder: Path) -> None:
        torch.save(algorithm.checkpoint(), folder / "state.pt")
        (folder / "policy").mkdir()
        policy.save(folder / "policy")

    saved = run.save_checkpoint(
        algorithm.num_env_steps, write, value=row["validation/share_of_best"]
    )
    if run.best == saved:
        _keep_best(run)
    run.log(row)
    board.log(row, algorithm.num_env_steps)
    progress(row)


def _keep_best(run: RunDirectory) -> None:
    """``policy/`` is a copy of the policy of the best checkpoint, if there is one."""
    if (best := run.best) is not None:

        def copy(folder: Path) -> None:
            shutil.copytree(best / "policy", folder, dirs_exist_ok=True)

        run.write_artefact("policy", copy)


def _training_row(algorithm: Any, result: dict[str, Any]) -> dict[str, Any]:
    learner = result.get("learners", {}).get("default_policy", {})
    return {
        "train/episode_return": algorithm.mean_return,
        "train/policy_loss": learner.get("policy_loss"),
        "train/value_loss": learner.get("vf_loss"),
        "train/value_explained": learner.get("vf_explained_var"),
        "train/entropy": learner.get("entropy"),
        "train/learning_rate": learner.get("default_optimizer_learning_rate"),
        "train/num_updates": algorithm.num_updates,
    }


def _finish(run: RunDirectory, algorithm: Any) -> dict[str, Any]:
    best = run.best_checkpoint
    assert best is not None
    summary = {
        "num_env_steps": algorithm.num_env_steps,
        "num_updates": algorithm.num_updates,
        "best_share_of_best": best["value"],
        "best_num_env_steps": best["step"],
        "policy": "policy",
    }
    run.write_summary(summary)
    return summary


def _next_multiple(number: int, step: int) -> int:
    return (number // step + 1) * step


def _print_row(row: dict[str, Any]) -> None:
    shares = "  ".join(
        f"{row[f'validation/share_{n}']:.3f} of the best at {n}" for n in _VALIDATED_AT
    )
    print(
        f"{row['num_env_steps']:>9,} evaluations  return {row['train/episode_return']:.3f}  "
        f"{shares}  {row['wall_s']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
