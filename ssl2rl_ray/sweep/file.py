"""What a sweep file says: ``base``, ``space`` and ``tune`` become the configs of named trials."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl2rl_ray.config import RunConfig, from_dict
from ssl2rl_ray.schema import ConfigError, apply_override, build, parse_yaml, read_yaml, to_dict

_MAX_TRIALS = 10_000
_MAX_NAME_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What each trial may use, and how many run at once."""

    num_cpus: int | None = None
    """CPUs of a trial's process, and its torch threads.

    A number: every trial gets as many, and its ``num_torch_threads`` becomes that, whatever
    ``base`` says (threads that ``space`` varies stand, and may not exceed it). None: as many as the
    trial's own ``num_torch_threads``. Env runners and workers of Ray Train come on top.
    """
    num_gpus: float = 0.0
    """GPUs of a trial's process; less than 1 = shared with other trials."""
    max_concurrent: int | None = None
    """Trials at once; None = as many as fit. What fits is the limit in any case."""
    max_failures: int = 2
    """Times that a trial whose process died is started again, from its last checkpoint.

    A trial that ended with an error of its own is not: the same input would bring it again.
    """


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, checked; ``base`` and ``space`` as plain values."""

    base: Mapping[str, Any]
    space: Mapping[str, Sequence[Any]]
    tune: TuneConfig
    trials: Mapping[str, RunConfig]
    """The config of each trial by its name, in the order in which they are begun."""


def load_sweep(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a YAML file with overrides such as ``base.seed=3`` or ``space.seed=[0, 1]``.

    Raises:
        ConfigError: unreadable file, unknown keys, and whatever is wrong with any trial's config:
            all of it at once, each problem with the trials that have it.
    """
    source = os.fspath(path)
    values = read_yaml(source)
    if unknown := sorted(map(str, set(values) - {"base", "space", "tune"})):
        raise ConfigError([f"{unknown[0]}: unknown key; a sweep has base, space, tune"], source)
    if isinstance(base := values.get("base"), str):
        values["base"] = read_yaml(os.fspath(Path(source).parent / base))
    space = values.pop("space", None)
    space = dict(space) if isinstance(space, dict) else {"": space}
    for override in overrides:
        name, equals, text = override.partition("=")
        if equals and name.strip().startswith("space."):
            space[name.strip().removeprefix("space.")] = parse_yaml(text, f"--set {override!r}")
        elif name.strip().split(".")[0] in ("base", "tune"):
            apply_override(values, override)
        else:
            raise ConfigError(
                [f"--set {override!r}: expected base.a.b=value, space.a.b=[values] or tune.a=value"]
            )
    return _checked(values.get("base"), space, values.get("tune"), source)


def _checked(base: Any, space: dict[str, Any], tune_values: Any, source: str) -> Sweep:
    """A sweep of plain values."""
    problems: list[str] = []
    tune = build(TuneConfig, {} if tune_values is None else tune_values, "tune", problems)
    if tune is not None:
        problems += _tune_problems(tune)
    if not isinstance(base, dict):
        problems.append("base: expected a config, or the path of a YAML file with one")
    problems += _space_problems(space)
    if problems or tune is None:
        raise ConfigError(problems, source)
    points = [
        dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())
    ]
    trials: dict[str, RunConfig] = {}
    found: dict[str, list[str]] = {}  # problem -> names of the trials that have it
    for name, chosen in zip(trial_names(points), points, strict=True):
        point = dict(_fields(chosen))
        try:
            config = _with_threads(from_dict(_varied(base, point)), tune.num_cpus, set(point))
            trials[name] = config
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(name)
    if found:
        raise ConfigError(
            [f"{_whose(names, len(points))}: {problem}" for problem, names in found.items()], source
        )
    return Sweep(base=base, space=space, tune=tune, trials=trials)


def _tune_problems(tune: TuneConfig) -> Iterator[str]:
    for name in ("num_cpus", "max_concurrent"):
        if (value := getattr(tune, name)) is not None and value < 1:
            yield f"tune.{name}: must be above 0, found {value}"
    for name in ("num_gpus", "max_failures"):
        if (value := getattr(tune, name)) < 0:
            yield f"tune.{name}: must be 0 or more, found {value}"


def _space_problems(space: dict[str, Any]) -> Iterator[str]:
    if not space or "" in space:
        yield (
            "space: expected lines `a.b: [values]`, what the trials vary; "
            "for a single run there is `ssl2rl run`"
        )
        return
    num_trials = 1
    for name, values in space.items():
        if not isinstance(values, list) or not values:
            yield f"space.{name}: expected a list of values"
        elif len({json.dumps(value, default=str) for value in values}) < len(values):
            yield f"space.{name}: a value is there twice"
        else:
            num_trials *= len(values)
    if num_trials > _MAX_TRIALS:
        yield f"space: {num_trials} combinations; at most {_MAX_TRIALS} are a sweep"
    owner: dict[str, str] = {}  # field -> line of space that varies it
    for name, values in space.items():
        listed = values if isinstance(values, list) else []
        for field in sorted({field for value in listed for field, _ in _fields({name: value})}):
            if (other := owner.setdefault(field, name)) != name:
                yield f"space.{name}: {field} is varied by space.{other}, too"


def _fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted name, those of sections apart."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _whose(names: Sequence[str], num_trials: int) -> str:
    """Some trials in words."""
    if len(names) == num_trials:
        return "every trial"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _varied(base: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the values of a point at their dotted names; raises ConfigError."""
    varied = copy.deepcopy(dict(base))
    for name, value in point.items():
        values, keys = varied, str(name).split(".")
        for key in keys[:-1]:
            if values.get(key) is None:
                values[key] = {}
            values = values[key]
            if not isinstance(values, dict):
                raise ConfigError([f"space.{name}: {key} is not a section"])
        values[keys[-1]] = value
    return varied


def _with_threads(config: RunConfig, num_cpus: int | None, varied: set[str]) -> RunConfig:
    """The config with as many torch threads as the trial has CPUs; raises ConfigError."""
    if num_cpus is None:
        return config
    values = to_dict(config)
    for path, section in sections(values):
        if "num_torch_threads" not in section:
            continue
        name = f"{path}.num_torch_threads".removeprefix(".")
        if name not in varied:
            section["num_torch_threads"] = num_cpus
        elif section["num_torch_threads"] > num_cpus:
            raise ConfigError(
                [f"{name}: {section['num_torch_threads']} is more than tune.num_cpus {num_cpus}"]
            )
    return from_dict(values)


def sections(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section of a config's plain values, with its dotted path."""
    yield path, values
    for name, value in values.items():
        if isinstance(value, dict):
            yield from sections(value, f"{path}.{name}".removeprefix("."))


def trial_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """``labelled_fraction-0.05_seed-3``: readable, names of folders, no two the same."""
    keys, depth = list(points[0]), 1
    while len(shorts := {key: ".".join(key.split(".")[-depth:]) for key in keys}) > len(
        set(shorts.values())
    ):
        depth += 1
    names = [
        "_".join(f"{_as_word(shorts[key])}-{_as_word(value)}" for key, value in point.items())
        for point in points
    ]
    if len(set(names)) == len(names) and max(len(n.encode()) for n in names) <= _MAX_NAME_BYTES:
        return names
    digits = len(str(len(names) - 1))
    return [f"{i:0{digits}}_{name}"[:_MAX_NAME_BYTES] for i, name in enumerate(names)]


def _as_word(value: Any) -> str:
    """A value as part of a folder's name; of a section its ``name``, else its fields."""
    if isinstance(value, dict) and "name" in value:
        return _as_word(value["name"])
    if isinstance(value, dict):
        return "_".join(f"{k}-{_as_word(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return "-".join(map(_as_word, value)) or "none"
    if isinstance(value, int | float):
        return json.dumps(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.") or "none"
