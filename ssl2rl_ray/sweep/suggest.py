"""Points that are asked for while a sweep runs: Optuna, told what the run directories say.

    points/trial-07.json  in the sweep's folder: a point, noted before its trial begins

Nothing is kept in memory from one question to the next: the folder is the study. So a sweep whose
driver was killed goes on with the points that were noted, and with what its trials have shown.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ssl2rl_ray.config import RunConfig
from ssl2rl_ray.runs import STEPS, RunDirectory, RunError, acquire_lock, write_text
from ssl2rl_ray.sweep.file import Sweep, config_at, metric_of
from ssl2rl_ray.sweep.folder import DONE, trial_status
from ssl2rl_ray.sweep.points import Point, rounded, said_of

_WAIT_S = 60.0
"""For another trial of the sweep that asks; an answer takes well below a second."""


def config_of(sweep: Sweep, folder: Path, name: str) -> RunConfig:
    """The config of a trial that begins, or goes on; its point is on disk before this returns.

    Raises:
        ValueError: a finished trial lacks the metric; the point makes no valid config.
    """
    if sweep.tune.search != "optuna":
        return sweep.trials[name]
    return config_at(sweep.base, _point_of(sweep, folder, name), sweep.tune)


def _point_of(sweep: Sweep, folder: Path, name: str) -> Point:
    points = folder / "points"
    points.mkdir(exist_ok=True)
    with _alone(points):  # two that ask at once would get the same answer
        noted = points / f"{name}.json"
        if not noted.exists():
            number = list(sweep.trials).index(name)
            _, mode = metric_of(sweep)
            point = ask(
                sweep.space, _tries(sweep, folder), (sweep.tune.seed or 0, number), mode=mode
            )
            write_text(noted, json.dumps(point) + "\n")
        return json.loads(noted.read_text())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Its lock, once whoever holds it has let go."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            lock = acquire_lock(folder)
            break
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    try:
        yield
    finally:
        os.close(lock)


# ---- what is known -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Try:
    """A point that was asked for, and what came of it."""

    point: Point
    value: float | None
    """Its best; None: not there (yet), or it failed."""


def _tries(sweep: Sweep, folder: Path) -> list[Try]:
    """Those noted, in the order of the trials."""
    metric, mode = metric_of(sweep)
    tries = []
    for name in sweep.trials:
        if (noted := folder / "points" / f"{name}.json").exists():
            is_done = trial_status(folder / name) in DONE
            value = best_of(folder / name, metric, mode) if is_done else None
            tries.append(Try(point=json.loads(noted.read_text()), value=value))
    return tries


class Told(NamedTuple):
    """What a row of metrics says of a run's learning."""

    step: float
    """Env steps or epochs; rows where they are not counted."""
    value: float
    """Of the metric."""
    time: str
    """When, in ISO 8601."""


def told(row: Mapping[str, Any], metric: str, *, default_step: float = 0) -> Told | None:
    """None where the row does not count.

    That is without the metric, before the first step, or of a classifier of a fold.
    """
    step: float = next((row[name] for name in STEPS if name in row), default_step)
    value = row.get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if not step > 0 or row.get("fit", "main") != "main":
        return None
    return Told(float(step), float(value), str(row.get("time", "")))


def learning_rows(folder: Path, metric: str) -> Iterator[Told]:
    """A run's learning curve."""
    rows = RunDirectory.open(folder).metrics()
    for i, row in enumerate(rows.to_dict("records"), 1):
        if (found := told(row, metric, default_step=i)) is not None:
            yield found


def best_of(folder: Path, metric: str, mode: str) -> float | None:
    """The best value of a run's metric, None where none is a number; ValueError: no such metric."""
    values = [row.value for row in learning_rows(folder, metric)]
    if values:
        return max(values) if mode == "max" else min(values)
    known = list(map(str, RunDirectory.open(folder).metrics().columns))
    if metric not in known:
        raise ValueError(
            f"tune.metric: the metrics of {folder.name} have no {metric!r}; they have "
            + ", ".join(known)
        )
    return None


# ---- Optuna --------------------------------------------------------------------------------------


def ask(space: Mapping[str, Any], tries: Sequence[Try], seed: Sequence[int], *, mode: str) -> Point:
    """The next point by Optuna's TPE; the same for the same tries and seed.

    Args:
        space: of distributions alone.
        tries: what was asked for before; those without a value count as bad ones, so that the
            same is not asked for twice, nor what makes trials fail.
        seed: whole numbers.
        mode: ``max`` or ``min``.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number = int(np.random.SeedSequence(seed).generate_state(1)[0])
    study = optuna.create_study(
        direction="maximize" if mode == "max" else "minimize",
        sampler=optuna.samplers.TPESampler(seed=number, constant_liar=True),
    )
    distributions = {name: _distribution(line) for name, line in space.items()}
    states = optuna.trial.TrialState
    for known in tries:
        study.add_trial(
            optuna.trial.create_trial(
                params={name: _parameter(space[name], known.point[name]) for name in space},
                distributions=distributions,
                value=known.value,
                state=states.RUNNING if known.value is None else states.COMPLETE,
            )
        )
    asked = study.ask(distributions).params
    return {name: _value(line, asked[name]) for name, line in space.items()}


def _distribution(line: Mapping[str, Any]) -> Any:
    import optuna

    name, said = said_of(line)
    if name == "choice":  # by number: Optuna knows plain values only
        return optuna.distributions.CategoricalDistribution(tuple(range(len(said))))
    if name == "randint":
        return optuna.distributions.IntDistribution(*said)
    return optuna.distributions.FloatDistribution(*map(float, said), log=name == "loguniform")


def _parameter(line: Mapping[str, Any], value: Any) -> Any:
    """A value of a point as Optuna knows it."""
    name, said = said_of(line)
    if name != "choice":
        return value
    return [json.dumps(choice) for choice in said].index(json.dumps(value))  # 1 is not True here


def _value(line: Mapping[str, Any], parameter: Any) -> Any:
    """The inverse, numbers rounded."""
    name, said = said_of(line)
    if name == "choice":
        return said[parameter]
    return int(parameter) if name == "randint" else rounded(parameter, *said)
