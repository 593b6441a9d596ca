"""What ``space`` says: lists and distributions become points, which are laid over the base.

A point is a value for each line of ``space``. Drawn numbers are rounded to four digits, so that the
name of a trial, its config and what a search learns from are the same number.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ssl2rl_ray.schema import ConfigError, words

ROOT = "."
"""The line of ``space`` whose values are laid over the whole base; ``name`` in one names it."""
_MAX_TRIALS = 10_000
_MAX_DRAWS = 100
"""For each point that is to be another one than those before."""
_FIXED = ("num_torch_threads", "num_env_runners", "num_workers")
"""Settings that say what a trial needs; where points are not known ahead they cannot vary."""

Point = dict[str, Any]


# ---- values by dotted name -----------------------------------------------------------------------


def fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted name, those of sections apart."""
    for name, value in values.items():
        if name == ROOT and not path:
            yield from fields({k: v for k, v in value.items() if k != "name"})
        elif isinstance(value, dict):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def varied(base: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the values of a point at their dotted names; raises ConfigError."""
    result = copy.deepcopy(dict(base))
    for name, value in point.items():
        values, keys = result, str(name).split(".")
        for key in keys[:-1]:
            if values.get(key) is None:
                values[key] = {}
            values = values[key]
            if not isinstance(values, dict):
                raise ConfigError([f"space.{name}: {key} is not a section"])
        values[keys[-1]] = value
    return result


# ---- distributions -------------------------------------------------------------------------------


def is_drawn(line: Any) -> bool:
    """Whether a line of ``space`` is a distribution."""
    return isinstance(line, dict)


def rounded(value: float, low: float, high: float) -> float:
    """To four digits, within the ends."""
    return min(max(float(f"{value:.4g}"), low), high)


def _uniform(rng: np.random.Generator, ends: Sequence[float]) -> float:
    return rounded(rng.uniform(ends[0], ends[1]), *ends)


def _loguniform(rng: np.random.Generator, ends: Sequence[float]) -> float:
    return rounded(math.exp(rng.uniform(math.log(ends[0]), math.log(ends[1]))), *ends)


def _randint(rng: np.random.Generator, ends: Sequence[int]) -> int:
    return int(rng.integers(ends[0], ends[1], endpoint=True))


def _choice(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, Any], Any]] = {
    "uniform": _uniform,
    "loguniform": _loguniform,
    "randint": _randint,
    "choice": _choice,
}
"""How a value is drawn, by the names that ``space`` knows; both ends of ``randint`` are drawn."""


def said_of(line: Mapping[str, Any]) -> tuple[str, Any]:
    """The name of a distribution and its ends or values."""
    ((name, said),) = line.items()
    return name, said


def _line_problem(line: Any, search: str) -> str | None:
    """What is wrong with a line of ``space`` by itself."""
    if not is_drawn(line):
        if not isinstance(line, list) or not line:
            drawn = "" if search == "grid" else ", or a distribution such as {uniform: [0, 1]}"
            return f"expected a list of values{drawn}"
        if search == "optuna":
            return (
                "is a list, all of whose values are run, and search optuna chooses: "
                "write {choice: [...]}, or put a single value into base"
            )
        return _twice(line)
    if search == "grid":
        return (
            "a distribution is drawn from by tune.search random or optuna; "
            "for search grid list the values"
        )
    if len(line) != 1 or (name := next(iter(line))) not in DISTRIBUTIONS:
        return f"expected a list of values, or one of {words(DISTRIBUTIONS)} with its ends"
    said = line[name]
    if name == "choice":
        return _twice(said) if isinstance(said, list) and said else "choice: expected a list"
    kinds = int if name == "randint" else int | float
    if not (
        isinstance(said, list)
        and len(said) == 2
        and all(isinstance(x, kinds) and not isinstance(x, bool) for x in said)
        and all(math.isfinite(x) for x in said)
        and said[0] < said[1]
    ):
        what = "whole numbers" if name == "randint" else "numbers"
        return f"{name}: expected two {what} [low, high]"
    if name == "loguniform" and said[0] <= 0:
        return f"loguniform: must be above 0, found {said[0]}"
    return None


def _twice(values: Sequence[Any]) -> str | None:
    is_twice = len({json.dumps(value, default=str) for value in values}) < len(values)
    return "a value is there twice" if is_twice else None


def space_problems(space: Mapping[str, Any], search: str, num_samples: int) -> Iterator[str]:
    """Everything that is wrong with ``space`` by itself."""
    if not space or "" in space:
        yield (
            "space: expected lines `a.b: [values]`, what the trials vary; "
            "for a single run there is `ssl2rl run`"
        )
        return
    wrong = {name: p for name, line in space.items() if (p := _line_problem(line, search))}
    yield from (f"space.{name}: {problem}" for name, problem in wrong.items())
    if search == "random" and not wrong and not any(map(is_drawn, space.values())):
        yield "space: search random draws from distributions, and here are only lists: search grid"
    num_trials = num_samples if search != "grid" else 1
    for name, line in space.items():
        num_trials *= len(line) if isinstance(line, list) and name not in wrong else 1
    if num_trials > _MAX_TRIALS:
        yield f"space: {num_trials} combinations; at most {_MAX_TRIALS} are a sweep"
    owner: dict[str, str] = {}  # field -> line of space that varies it
    for name, line in space.items():
        listed = [] if name in wrong else _examples(line)
        if name == ROOT and not all(isinstance(value, dict) for value in listed):
            yield f"space.{name}: each value is laid over the whole base: expected sections"
            continue
        for field in sorted({field for value in listed for field, _ in fields({name: value})}):
            if (other := owner.setdefault(field, name)) != name:
                yield f"space.{name}: {field} is varied by space.{other}, too"
            if search == "optuna" and field.split(".")[-1] in _FIXED:
                yield f"space.{name}: {field} says what a trial needs; with search optuna all alike"


def _examples(line: Any) -> list[Any]:
    """The values of a line, or the ends of what is drawn from."""
    return list(said_of(line)[1] if is_drawn(line) else line)


# ---- points --------------------------------------------------------------------------------------


def grid(space: Mapping[str, Sequence[Any]]) -> list[Point]:
    """All combinations of lists, the last line of ``space`` the quickest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def draw(space: Mapping[str, Any], num_samples: int, seed: int) -> list[Point]:
    """For each of ``num_samples`` draws all combinations of the lists; no two draws are the same.

    Those of a smaller number are the first ones of a larger.

    Raises:
        ConfigError: the distributions have not as many values.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: said_of(line) for name, line in space.items() if is_drawn(line)}
    listed = grid({name: line for name, line in space.items() if name not in drawn})
    seen: set[str] = set()
    points: list[Point] = []
    while len(seen) < num_samples:
        for _ in range(_MAX_DRAWS):
            values = {name: DISTRIBUTIONS[what](rng, said) for name, (what, said) in drawn.items()}
            if (key := json.dumps(values, default=str)) not in seen:
                break
        else:
            raise ConfigError(
                [
                    f"tune.num_samples: {num_samples}, and space has hardly more than {len(seen)} "
                    "different points: lower it, or list the values for search grid"
                ]
            )
        seen.add(key)
        points += [{name: {**values, **rest}[name] for name in space} for rest in listed]
    return points


def probes(space: Mapping[str, Any]) -> list[Point]:
    """Points at the ends of what may be asked for: the first values, then each other one alone."""
    examples = {name: _examples(line) for name, line in space.items()}
    first = {name: values[0] for name, values in examples.items()}
    others = [(name, value) for name, values in examples.items() for value in values[1:]]
    return [first, *({**first, name: value} for name, value in others)]
