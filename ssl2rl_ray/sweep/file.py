"""What a sweep file says: ``base``, ``space`` and ``tune`` become the configs of named trials."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssl2rl_ray.config import PerceptionRunConfig, RunConfig, SSL2RLRunConfig, from_dict
from ssl2rl_ray.schema import ConfigError, apply_override, build, parse_yaml, read_yaml, to_dict
from ssl2rl_ray.sweep.points import ROOT, draw, fields, grid, probes, space_problems, varied

_FACTOR = 3
_PARTS = ("base", "space", "tune")
_MAX_NAME_BYTES = 200
CRITERIA = {
    "navigation": "validation/episode_return",
    "crystfel": "validation/share_of_best",
    "perception": "validation/accuracy",
}
"""What validation goes by, of each kind whose runs are one learning curve; higher is better."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What each trial may use, how many run at once, and which points are tried."""

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
    trial_min: float | None = None
    """Minutes of one trial, for the estimate of ``--dry-run`` until trials of the sweep tell."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """``grid``: all combinations of the lists of ``space``. ``random``: for each of ``num_samples``
    draws from its distributions all combinations of its lists. ``optuna``: ``num_samples`` points,
    each asked of Optuna's TPE when its trial begins (Bergstra et al. 2011)."""
    num_samples: int | None = None
    """Of search random and optuna."""
    seed: int | None = None
    """Of search random and optuna; None = 0."""
    metric: str | None = None
    """Column of metrics.jsonl that search optuna and scheduler asha go by; None = what validation
    goes by."""
    mode: Literal["max", "min"] | None = None
    """Whether a higher (None, max) or lower (min) metric is better."""
    scheduler: Literal["none", "asha"] = "none"
    """``asha``: trials that are not among the best at a rung are stopped (Li et al. 2018,
    arXiv:1810.05934). Rungs are at ``grace`` env steps or epochs, and at each ``reduction_factor``
    times as many; at each the best 1 of ``reduction_factor`` of those that came there go on."""
    grace: int | None = None
    """asha: env steps or epochs that every trial gets; None = those of the longest trial by the
    square of ``reduction_factor``, so that there are two rungs."""
    reduction_factor: int | None = None
    """asha; None = 3."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file, checked; ``base`` and ``space`` as plain values."""

    base: Mapping[str, Any]
    space: Mapping[str, Any]
    tune: TuneConfig
    trials: Mapping[str, RunConfig]
    """The config of each trial by its name, in the order in which they are begun.

    With search optuna nobody knows them yet: each is at the first point of ``space``, which says
    what the trial needs; ``config_of`` asks for its own.
    """


def read_sweep(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The plain values of a sweep file, its base in place: one file that says all.

    Raises:
        ConfigError: a file that cannot be read, or is no sweep.
    """
    return _read(os.fspath(path), ())


def _read(source: str, readers: tuple[str, ...]) -> dict[str, Any]:
    values = read_yaml(source)
    if unknown := sorted(map(str, set(values) - set(_PARTS))):
        hint = "" if set(values) & set(_PARTS) else f"; for a single run: `ssl2rl run {source}`"
        raise ConfigError(
            [f"{unknown[0]}: unknown key; a sweep has base, space, tune{hint}"], source
        )
    if "base" in values:
        values["base"] = _base(values["base"], source, (*readers, os.path.realpath(source)))
    return values


def _base(said: Any, source: str, readers: tuple[str, ...]) -> Any:
    """In place: as it stands, of another file (of a sweep its base), or layers of these."""
    if isinstance(said, str):
        path = os.fspath(Path(source).parent / said)
        if os.path.realpath(path) in readers:
            raise ConfigError([f"base: {said} is a sweep whose base is this one"], source)
        values = read_yaml(path)
        return _read(path, readers).get("base") if "base" in values else values
    if not isinstance(said, list) or not said:
        return said
    base: dict[str, Any] = {}
    for layer in [_base(layer, source, readers) for layer in said]:
        if not isinstance(layer, dict):
            return said
        base = varied(base, dict(fields(layer)))
    return base


def load_sweep(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a YAML file with overrides such as ``base.seed=3`` or ``space.seed=[0, 1]``.

    Raises:
        ConfigError: unreadable file, unknown keys, and whatever is wrong with any trial's config:
            all of it at once, each problem with the trials that have it.
    """
    source = os.fspath(path)
    values = read_sweep(source)
    space = values.pop("space", None)
    space = dict(space) if isinstance(space, dict) else {"": space}
    for override in overrides:
        name, equals, text = override.partition("=")
        if equals and name.strip().startswith("space."):
            line = name.strip().removeprefix("space.") or ROOT
            space[line] = parse_yaml(text, f"--set {override!r}")
        elif name.strip().split(".")[0] in ("base", "tune"):
            apply_override(values, override)
        else:
            raise ConfigError(
                [f"--set {override!r}: expected base.a.b=value, space.a.b=[values] or tune.a=value"]
            )
    return _checked(values.get("base"), space, values.get("tune"), source)


def _checked(base: Any, space: dict[str, Any], said: Any, source: str) -> Sweep:
    """A sweep of plain values."""
    problems: list[str] = []
    if isinstance(said, dict) and said.get("scheduler") == "pbt":
        raise ConfigError([_NO_PBT], source)
    tune = build(TuneConfig, {} if said is None else said, "tune", problems)
    if not isinstance(base, dict):
        problems.append("base: expected a config, the path of a YAML file, or a list of these")
    if tune is not None:
        problems += _tune_problems(tune)
    search, number = (tune.search, tune.num_samples or 1) if tune is not None else ("grid", 1)
    problems += space_problems(space, search, number)
    if problems or tune is None:
        raise ConfigError(problems, source)
    trials = _known_trials if tune.search == "optuna" else _all_trials
    sweep = Sweep(base=base, space=space, tune=tune, trials=trials(base, space, tune, source))
    if problems := list(_kind_problems(sweep)):
        raise ConfigError(problems, source)
    return sweep


def _all_trials(
    base: Mapping[str, Any], space: Mapping[str, Any], tune: TuneConfig, source: str
) -> dict[str, RunConfig]:
    """Of search grid and random."""
    if tune.search == "random":
        points = draw(space, tune.num_samples or 1, tune.seed or 0)
    else:
        points = grid(space)
    trials: dict[str, RunConfig] = {}
    found: dict[str, list[str]] = {}  # problem -> names of the trials that have it
    for name, point in zip(trial_names(points), points, strict=True):
        try:
            trials[name] = config_at(base, point, tune)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(name)
    if found:
        raise ConfigError(
            [f"{_whose(names, len(points))}: {problem}" for problem, names in found.items()], source
        )
    return trials


def _known_trials(
    base: Mapping[str, Any], space: Mapping[str, Any], tune: TuneConfig, source: str
) -> dict[str, RunConfig]:
    """Of search optuna, as far as they are known: that they are valid at the ends of ``space``."""
    configs = []
    for point in probes(space):
        try:
            configs.append(config_at(base, point, tune))
        except ConfigError as error:
            where = ", ".join(f"{name} {value}" for name, value in point.items())
            raise ConfigError([f"at {where}: {p}" for p in error.problems], source) from None
    number = tune.num_samples or 1
    digits = len(str(number - 1))
    return {f"trial-{i:0{digits}}": configs[0] for i in range(number)}


def config_at(base: Mapping[str, Any], point: Mapping[str, Any], tune: TuneConfig) -> RunConfig:
    """The config of a trial: the base with the values of a point laid over; raises ConfigError."""
    values = dict(fields(point))
    return _with_threads(from_dict(varied(base, values)), tune.num_cpus, set(values))


# ---- what goes together --------------------------------------------------------------------------

_NO_PBT = (
    "tune.scheduler: pbt is not offered: it changes settings in the middle of a run, and a run "
    "directory has one config; search random or optuna with scheduler asha tries the same settings"
)


def _tune_problems(tune: TuneConfig) -> Iterator[str]:
    for name in ("num_cpus", "max_concurrent", "num_samples", "grace"):
        if (value := getattr(tune, name)) is not None and value < 1:
            yield f"tune.{name}: must be above 0, found {value}"
    for name in ("num_gpus", "max_failures", "seed"):
        if (value := getattr(tune, name)) is not None and value < 0:
            yield f"tune.{name}: must be 0 or more, found {value}"
    if tune.trial_min is not None and tune.trial_min <= 0:
        yield f"tune.trial_min: must be above 0, found {tune.trial_min}"
    if tune.reduction_factor is not None and tune.reduction_factor < 2:
        yield f"tune.reduction_factor: must be 2 or more, found {tune.reduction_factor}"
    if tune.search == "grid":
        for name in ("num_samples", "seed"):
            if getattr(tune, name) is not None:
                yield f"tune.{name}: is of search random and optuna, and tune.search is grid"
    elif tune.num_samples is None:
        yield f"tune.num_samples: says how many points search {tune.search} tries; try 20"
    if tune.search == "optuna" and importlib.util.find_spec("optuna") is None:
        yield "tune.search: Optuna is not installed: pip install 'ssl2rl-ray[bo]', or search random"
    if tune.search != "optuna" and tune.scheduler == "none":
        for name in ("metric", "mode"):
            if getattr(tune, name) is not None:
                yield f"tune.{name}: is read by search optuna and scheduler asha alone"
    if tune.scheduler != "asha":
        for name in ("grace", "reduction_factor"):
            if getattr(tune, name) is not None:
                yield f"tune.{name}: is of scheduler asha, and tune.scheduler is {tune.scheduler}"


def _kind_problems(sweep: Sweep) -> Iterator[str]:
    """Of what search and scheduler go by."""
    tune, kinds = sweep.tune, {config.kind for config in sweep.trials.values()}
    if tune.search != "optuna" and tune.scheduler == "none":
        return
    if len(kinds) > 1:
        yield f"space: trials are of kinds {', '.join(sorted(kinds))}, whose metrics differ"
    elif tune.scheduler == "asha" and kinds <= set(CRITERIA):
        first, _, total = rungs(sweep)
        if first >= total:
            yield f"tune.grace: {first}, and no trial is longer than {total}: none would be stopped"
    elif not kinds & set(CRITERIA):
        (kind,) = kinds
        if tune.scheduler == "asha":
            yield (
                f"tune.scheduler: asha follows one learning curve a trial, and kind {kind} has one "
                "for each of its methods: leave it out"
            )
        elif tune.metric is None:
            yield f"tune.metric: kind {kind} has several criteria: name a column of metrics.jsonl"


def rungs(sweep: Sweep) -> tuple[int, int, int]:
    """Of scheduler asha: the first rung, the factor between rungs, the longest trial's length."""
    total = max(_length(config) for config in sweep.trials.values())
    factor = sweep.tune.reduction_factor or _FACTOR
    return sweep.tune.grace or math.ceil(total / factor**2), factor, total


def _length(config: RunConfig) -> int:
    """Env steps, or epochs of the main classifier; 0 of what is no learning curve."""
    if isinstance(config, PerceptionRunConfig):
        default = 40 if config.training.method == "finetuning" else 200
        return config.training.num_epochs or default
    return 0 if isinstance(config, SSL2RLRunConfig) else config.training.num_env_steps


def metric_of(sweep: Sweep) -> tuple[str, str]:
    """What search and scheduler go by: a column of metrics.jsonl, and ``max`` or ``min``."""
    kind = next(iter(sweep.trials.values())).kind
    return sweep.tune.metric or CRITERIA[kind], sweep.tune.mode or "max"


def _whose(names: Sequence[str], num_trials: int) -> str:
    """Some trials in words."""
    if len(names) == num_trials:
        return "every trial"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ---- threads -------------------------------------------------------------------------------------


def _with_threads(config: RunConfig, num_cpus: int | None, varied: set[str]) -> RunConfig:
    """The config with as many torch threads as the trial has CPUs; raises ConfigError."""
    if num_cpus is None:
        return config
    values = to_dict(config)
    is_changed = False
    for path, section in sections(values):
        if "num_torch_threads" not in section:
            continue
        name = f"{path}.num_torch_threads".removeprefix(".")
        if name not in varied:
            is_changed |= section["num_torch_threads"] != num_cpus
            section["num_torch_threads"] = num_cpus
        elif section["num_torch_threads"] > num_cpus:
            raise ConfigError(
                [f"{name}: {section['num_torch_threads']} is more than tune.num_cpus {num_cpus}"]
            )
    return from_dict(values) if is_changed else config


def sections(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section of a config's plain values, with its dotted path."""
    yield path, values
    for name, value in values.items():
        if isinstance(value, dict):
            yield from sections(value, f"{path}.{name}".removeprefix("."))


# ---- names ---------------------------------------------------------------------------------------


def trial_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """``labelled_fraction-0.05_seed-3``: readable, names of folders, no two the same."""
    told = [_told(point) for point in points]
    keys, depth = list(dict.fromkeys(key for point in told for key in point)), 1
    while len(shorts := {key: ".".join(key.split(".")[-depth:]) for key in keys}) > len(
        set(shorts.values())
    ):
        depth += 1
    names = [
        "_".join(
            _as_word(value) if key == ROOT else f"{_as_word(shorts[key])}-{_as_word(value)}"
            for key, value in point.items()
        )
        for point in told
    ]
    if len(set(names)) == len(names) and max(len(n.encode()) for n in names) <= _MAX_NAME_BYTES:
        return names
    digits = len(str(len(names) - 1))
    return [f"{i:0{digits}}_{name}"[:_MAX_NAME_BYTES] for i, name in enumerate(names)]


def _told(point: Mapping[str, Any]) -> dict[str, Any]:
    """What a name tells of a point; of nameless values laid over the whole base their sections."""
    root = point.get(ROOT)
    if not isinstance(root, dict) or not root or "name" in root:
        return dict(point)
    return {**root, **{name: value for name, value in point.items() if name != ROOT}}


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
