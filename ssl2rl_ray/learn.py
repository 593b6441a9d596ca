"""The frame of every reinforcement learning run: learn, look, keep the best, go on where it was."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl2rl_ray.algorithms.module import linear_epsilon
from ssl2rl_ray.checkpoint import read_state, weights_hash, write_state
from ssl2rl_ray.runs import RunDirectory, on_interrupt
from ssl2rl_ray.schema import to_dict, to_yaml
from ssl2rl_ray.tensorboard import LEARNED, TensorBoard

Row = dict[str, Any]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the frame asks of a kind of run."""

    criterion: str
    """Of ``validate``'s row: what the best policy has most of."""
    best_name: str
    """Its name in the summary."""
    validate: Callable[[Weights], Row]
    """How good the policy of these weights is."""
    save_policy: Callable[[Weights, Path], None]
    """Writes it into a folder, such that it acts without Ray."""
    training_row: Callable[[Row], Row]
    """What there is to say of training, from the result of the last ``train()``."""
    checkpoint: Callable[[], Row]
    """All that goes on after a restart."""
    progress: Callable[[Row], None]
    """Told every row."""
    draw: Callable[[Path], dict[str, np.ndarray]] | None = None
    """Pictures for TensorBoard, by tag, of the policy in a folder; None: none are made."""


def learn(config: Any, run: RunDirectory, algorithm: Any, task: Task) -> Row:
    """Trains to the end, from the run's latest checkpoint if it has one.

    Args:
        config: of the run; its ``training`` says how long, and how often it is looked at.
        run: open for writing; gets metrics, checkpoints, TensorBoard events, the best policy (by
            validation) and the summary.
        algorithm: built by one of ``algorithms.registry``.
        task: what differs between kinds.

    Returns:
        The summary.

    Raises:
        ValueError: a damaged checkpoint, or one of another network; nothing was learned.
        KeyboardInterrupt: after Ctrl-C, once the state is safe on disk.
    """
    training = config.training
    with contextlib.ExitStack() as stack:
        if is_begun := (latest := run.latest) is not None:
            algorithm.restore_checkpoint(read_state(latest))
            _keep_best(run)  # it may have been killed between the two
        first_step = algorithm.num_env_steps
        board = stack.enter_context(
            TensorBoard(run.path / "tensorboard", first_step=first_step + 1 if is_begun else 0)
        )
        look = functools.partial(_look, run, algorithm, task, board)
        album = _Album(run, task, board)
        interrupted = stack.enter_context(on_interrupt())  # before the first sign of life
        if not is_begun:
            if not run.is_stage:
                board.begin(to_dict(config), to_yaml(config))
            look({})
        clock = _Clock(first_step)
        next_look = _next_multiple(first_step, training.evaluation_interval_steps)
        while algorithm.num_env_steps < training.num_env_steps:
            result = algorithm.train()
            is_over = algorithm.num_env_steps >= training.num_env_steps or interrupted.is_set()
            if algorithm.num_env_steps >= next_look or is_over:
                look({**task.training_row(result), **clock.row(algorithm.num_env_steps)})
                next_look = _next_multiple(
                    algorithm.num_env_steps, training.evaluation_interval_steps
                )
                album.look(algorithm.num_env_steps, is_last=is_over)
                clock.restart(algorithm.num_env_steps)
            if interrupted.is_set():
                raise KeyboardInterrupt
        return _finish(run, algorithm, task)


def training_row(algorithm: Any, recipe: Any, result: Row) -> Row:
    """What runners and learner say at the end of an iteration, as far as they do."""
    learner = result.get("learners", {}).get("default_policy", {})
    row: Row = {
        "train/episode_return": algorithm.mean_return,
        **{f"train/{ours}": learner[name] for name, ours in LEARNED.items() if name in learner},
        "train/num_updates": algorithm.num_updates,
    }
    if hasattr(recipe, "epsilon_initial"):
        schedule = recipe.epsilon_initial, recipe.epsilon_final, recipe.epsilon_steps
        row["train/epsilon"] = linear_epsilon(schedule, algorithm.num_env_steps)
    if hasattr(algorithm, "policy_lag"):
        row["train/policy_lag"] = algorithm.policy_lag
    return row


def _look(run: RunDirectory, algorithm: Any, task: Task, board: TensorBoard, row: Row) -> None:
    """Validates, saves, and says so."""
    weights = algorithm.network_state()
    started = time.perf_counter()
    row = {"num_env_steps": algorithm.num_env_steps, **row, **task.validate(weights)}
    row["validation/wall_s"] = time.perf_counter() - started
    # Untrained, a residual network is the planner that it starts from: to keep that one where it
    # scores best would pass a planner off as a policy.
    is_candidate = algorithm.num_updates > 0

    def write(folder: Path) -> None:
        write_state(task.checkpoint(), folder)
        (folder / "policy").mkdir()
        task.save_policy(weights, folder / "policy")

    run.log(row)  # before the checkpoint: a run killed between the two says this row once more
    board.log({**row, **_criterion(run, task, row, is_candidate)}, algorithm.num_env_steps)
    saved = run.save_checkpoint(
        algorithm.num_env_steps, write, value=row[task.criterion] if is_candidate else None
    )
    if run.best == saved:
        _keep_best(run)
    task.progress(row)


def _criterion(run: RunDirectory, task: Task, row: Row, is_candidate: bool) -> Row:
    """For TensorBoard: what every kind of run is compared by, under one name."""
    if run.is_stage:
        return {}
    last, best = row[task.criterion], (run.best_checkpoint or {}).get("value")
    if is_candidate:
        best = last if best is None else max(best, last)
    return {"criterion/last": last, "criterion/best": best}


def _keep_best(run: RunDirectory) -> None:
    """``policy/`` is a copy of the policy of the best checkpoint, if there is one."""
    if (best := run.best) is not None:
        run.write_artefact("policy", functools.partial(_copy_policy, best))


def _copy_policy(checkpoint: Path, folder: Path) -> None:
    for file in (checkpoint / "policy").iterdir():  # copytree hides the reason of an error
        shutil.copyfile(file, folder / file.name)


def _finish(run: RunDirectory, algorithm: Any, task: Task) -> Row:
    best = run.best_checkpoint
    if best is None:
        raise ValueError(
            "nothing was learned: no update was due by training.num_env_steps; raise it, or lower "
            "algorithm.learning_starts"
        )
    summary = {
        "num_env_steps": algorithm.num_env_steps,
        "num_updates": algorithm.num_updates,
        task.best_name: best["value"],
        "best_num_env_steps": best["step"],
        "weights_hash": weights_hash(algorithm.network_state()),
        "policy": "policy",
    }
    run.write_summary(summary)
    return summary


class _Album:
    """Pictures of the best policy so far: ever more rarely, and at the end."""

    def __init__(self, run: RunDirectory, task: Task, board: TensorBoard) -> None:
        self._run, self._task, self._board, self._next = run, task, board, 0

    def look(self, num_env_steps: int, *, is_last: bool) -> None:
        policy = self._run.policy
        if (
            self._task.draw is None
            or policy is None
            or not (is_last or num_env_steps >= self._next)
        ):
            return
        for tag, image in self._task.draw(policy).items():
            self._board.image(tag, image, num_env_steps)
        self._next = 2 * num_env_steps


class _Clock:
    """Env steps per second since the last look, without the looking."""

    def __init__(self, num_env_steps: int) -> None:
        self._begun = self._since = time.perf_counter()
        self._num_env_steps = num_env_steps

    def row(self, num_env_steps: int) -> dict[str, float]:
        now = time.perf_counter()
        speed = (num_env_steps - self._num_env_steps) / max(now - self._since, 1e-9)
        return {"wall_s": now - self._begun, "train/env_steps_per_s": speed}

    def restart(self, num_env_steps: int) -> None:
        self._since, self._num_env_steps = time.perf_counter(), num_env_steps


def _next_multiple(number: int, step: int) -> int:
    return (number // step + 1) * step
