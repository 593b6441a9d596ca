"""A Tune callback that writes our tags for any trainable, RLlib's algorithms included.

Tune's own TensorBoard callback puts RLlib's new results on an axis of iterations, which differ from
algorithm to algorithm, and tells hyperparameters only when a trial ends. Trials of ``ssl2rl sweep``
do not need this one: each writes its events itself, in its run folder, from the first minute, from
whatever node it runs on, and survives the driver; this one sees what is reported to the driver.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from ray.tune.logger import TBXLoggerCallback
from ray.tune.result import AUTO_RESULT_KEYS

from ssl2rl_ray.tensorboard import LEARNED, TensorBoard

_STEPS = (
    "num_env_steps",
    "num_env_steps_sampled_lifetime",
    "env_runners/num_env_steps_sampled_lifetime",
    "timesteps_total",
    "training_iteration",
)
"""What is an env step, the first that a result has; the last: it counts nothing better."""
_RETURN, _VALIDATION = "train/episode_return", "validation/episode_return"
_TAGS = {
    "env_runners/episode_return_mean": _RETURN,
    "evaluation/env_runners/episode_return_mean": _VALIDATION,
    "time_total_s": "wall_s",
}
_RLLIB = ("env_runners", "learners", "evaluation")
"""Parts of a result that RLlib's algorithms report."""


class TensorBoardLogger(TBXLoggerCallback):
    """Writes each trial's events into its folder; give it to ``tune.RunConfig(callbacks=[...])``.

    The step is env steps, tags are those of ``docs/tensorboard.md``: of RLlib's result
    ``train/...``, ``validation/episode_return``, ``wall_s``; of a function trainable whatever it
    reports. Hyperparameters (what the search varies) and the config as text are there from the
    start. A trial that is restarted goes on in its curves. It derives from Tune's callback only so
    that Tune does not add that one beside it; where the experiment's storage is another machine's,
    events arrive there as Tune syncs them.
    """

    def __init__(
        self, *, metric: str | None = None, mode: str = "max", has_rest: bool = False
    ) -> None:
        """Says what trials are compared by.

        Args:
            metric: tag or name in a result that becomes ``criterion/last`` and ``criterion/best``;
                None = the validation return, else that of training.
            mode: ``max`` or ``min``: which is best.
            has_rest: also write every other number of RLlib's results, as ``rllib/...``.

        Raises:
            ValueError: another mode.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"mode: expected max or min, found {mode!r}")
        self._metric, self._has_rest = metric, has_rest
        self._choose = max if mode == "max" else min
        self._boards: dict[str, TensorBoard] = {}
        self._best: dict[str, float] = {}
        self._begun: dict[str, tuple[float, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: Tune saves its callbacks."""
        return self.__dict__ | {"_boards": {}}

    def log_trial_start(self, trial: Any) -> None:
        """A new trial says what was asked for; a restarted one waits until it says where it is."""
        self._close(trial)
        trial.init_local_path()
        folder = Path(trial.local_path)
        if any(folder.glob("events.*")):
            return
        board = self._boards[trial.trial_id] = TensorBoard(folder)
        chosen = {"trainable": trial.trainable_name, **trial.evaluated_params}
        text = json.dumps(trial.config, indent=1, default=str)
        board.begin({name: _plain(value) for name, value in chosen.items()}, text)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """One point of every number."""
        flat = dict(_flat(result))
        step = next(int(flat[name]) for name in _STEPS if isinstance(flat.get(name), Real))
        if (board := self._boards.get(trial.trial_id)) is None:
            folder = Path(trial.local_path)
            board = self._boards[trial.trial_id] = TensorBoard(folder, first_step=step)
        row = self._row(flat)
        wall_s = float(flat.get("time_total_s", 0.0))
        before = self._begun.get(trial.trial_id, (0, 0.0))
        if wall_s > before[1] and step > before[0]:
            row["train/env_steps_per_s"] = (step - before[0]) / (wall_s - before[1])
        self._begun[trial.trial_id] = step, wall_s
        board.log({**row, **self._criterion(trial, row)}, step)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """The trial has an end, unless it failed: then it may be tried again."""
        self._close(trial, is_finished=not failed)

    def _close(self, trial: Any, *, is_finished: bool = False) -> None:
        if (board := self._boards.pop(trial.trial_id, None)) is not None:
            board.close(is_finished=is_finished)

    def _row(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """A result by our tags."""
        is_rllib = any(name.split("/")[0] in _RLLIB for name in flat)
        row: dict[str, Any] = {}
        for name, value in flat.items():
            first, _, rest = name.partition("/")
            learned = rest.rpartition("/")[2]
            if name in _TAGS:
                row[_TAGS[name]] = value
            elif first == "learners" and learned in LEARNED and "__all_modules__" not in rest:
                row.setdefault(f"train/{LEARNED[learned]}", value)
            elif first in _BOOKKEEPING or name in _STEPS:
                continue
            elif not is_rllib:
                row[name] = value
            elif self._has_rest:
                row[f"rllib/{name}"] = value
        return row

    def _criterion(self, trial: Any, row: Mapping[str, Any]) -> dict[str, float]:
        names = (self._metric,) if self._metric else (_VALIDATION, _RETURN)
        last = next((row[name] for name in names if isinstance(row.get(name), Real)), None)
        if last is None or last != last:
            return {}
        best = self._choose(self._best.get(trial.trial_id, last), last)
        self._best[trial.trial_id] = best
        return {"criterion/last": last, "criterion/best": best}


_BOOKKEEPING = {
    *AUTO_RESULT_KEYS,
    "done",
    "trial_id",
    "experiment_tag",
    "timers",
    "perf",
    "fault_tolerance",
}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A result's numbers by their paths; numpy's as Python's."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value
