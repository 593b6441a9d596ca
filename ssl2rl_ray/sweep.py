"""Many runs of one config: a sweep file -> trials -> run directories, side by side on Ray Tune.

    base   a config of any kind: in place, or the path of another YAML file, relative to this one
    space  dotted name -> list of values; the trials are all their combinations. A value may be a
           section: its fields are laid over those of base, one choice of several settings
    tune   ``TuneConfig``: what a trial may use, how many run at once

A trial is a run directory ``OUT/<what it varies>/``, made by the same function as ``ssl2rl run``.
Those directories are the whole truth about a sweep: a resumed one asks them what is left to do.
Tune only hands out the places; its own state, saved every ten seconds, is thrown away.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssl2rl_ray.config import RunConfig, from_dict
from ssl2rl_ray.launch import run_config
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.runs import (
    RunDirectory,
    RunError,
    acquire_lock,
    differences,
    on_interrupt,
    stopped_by,
    write_text,
)
from ssl2rl_ray.schema import ConfigError, apply_override, build, parse_yaml, read_yaml, to_dict

_MAX_TRIALS = 10_000
_MAX_NAME_BYTES = 200
_WAIT_FOR_ORPHANS_S = 60.0
"""A killed driver's trials end within seconds of it, and hold their run directories until then."""


# ---- what a sweep file says ----------------------------------------------------------------------


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
    for name, chosen in zip(_trial_names(points), points, strict=True):
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
    for path, section in _sections(values):
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


def _sections(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every section of a config's plain values, with its dotted path."""
    yield path, values
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _sections(value, f"{path}.{name}".removeprefix("."))


def _trial_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
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


# ---- what fits -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one trial takes of the cluster."""

    num_cpus: int
    """Of its process."""
    num_gpus: float
    num_runners: int
    """Env runners of one CPU each, in the trial's own placement group."""
    num_worker_cpus: int
    """CPUs of the workers of Ray Train, which makes a placement group of its own."""

    @property
    def total_cpus(self) -> int:
        """All of it: what must be there for the trial to get anywhere."""
        return self.num_cpus + self.num_runners + self.num_worker_cpus


def need_of(config: RunConfig, tune: TuneConfig) -> Need:
    """What a trial of this config takes; stages of one run come one after the other."""
    sections = [section for _, section in _sections(to_dict(config))]
    threads = [s["num_torch_threads"] for s in sections if "num_torch_threads" in s]
    return Need(
        num_cpus=max(threads, default=1) if tune.num_cpus is None else tune.num_cpus,
        num_gpus=tune.num_gpus,
        num_runners=max((s.get("num_env_runners", 0) for s in sections), default=0),
        num_worker_cpus=max(
            (s.get("num_workers", 0) * s.get("num_torch_threads", 1) for s in sections), default=0
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is to run on."""

    where: str
    num_cpus: float
    num_gpus: float
    largest_node_cpus: float


def find_room() -> Room:
    """The cluster of RAY_ADDRESS (looked at), or this machine (without starting anything)."""
    if not os.environ.get("RAY_ADDRESS"):
        number = _own_cpus()
        return Room(
            where="this machine", num_cpus=number, num_gpus=float("nan"), largest_node_cpus=number
        )
    with local_ray(1):
        return _cluster_room()


def _own_cpus() -> int:
    """CPUs that this process may use; Ray of our own has at least two."""
    count = getattr(os, "sched_getaffinity", None)
    return max(2, len(count(0)) if count else os.cpu_count() or 1)


def _cluster_room() -> Room:
    import ray

    resources = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return Room(
        where=f"the Ray cluster of {len(nodes)} node" + "s" * (len(nodes) != 1),
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        largest_node_cpus=max(nodes, default=0),
    )


def num_concurrent(sweep: Sweep, room: Room) -> int:
    """How many trials run at once, so that none waits for what another holds.

    Raises ValueError where a trial does not fit at all: Tune would wait for ever.
    """
    needs = {name: need_of(config, sweep.tune) for name, config in sweep.trials.items()}
    fits = sweep.tune.max_concurrent or len(needs)
    for name, need in needs.items():
        if need.total_cpus > room.num_cpus or need.num_cpus > room.largest_node_cpus:
            raise ValueError(
                f"{name} needs {_words(need)}; {room.where} has {room.num_cpus:g} CPUs, "
                f"{room.largest_node_cpus:g} on its largest node: lower tune.num_cpus, "
                "num_env_runners or num_workers"
            )
        if need.num_gpus > room.num_gpus:  # never so where the number is not known (NaN)
            raise ValueError(
                f"{name} needs {need.num_gpus:g} GPUs; {room.where} has {room.num_gpus:g}: "
                "lower tune.num_gpus"
            )
        fits = min(fits, int(room.num_cpus // need.total_cpus))
        if need.num_gpus and room.num_gpus == room.num_gpus:
            fits = min(fits, int(room.num_gpus / need.num_gpus + 1e-9))
    return max(1, min(fits, len(needs)))


def _words(need: Need) -> str:
    parts = [f"{need.num_cpus} CPU" + "s" * (need.num_cpus != 1)]
    parts += [f"{need.num_runners} for env runners"] * bool(need.num_runners)
    parts += [f"{need.num_worker_cpus} for workers"] * bool(need.num_worker_cpus)
    parts += [f"{need.num_gpus:g} GPU"] * bool(need.num_gpus)
    return " + ".join(parts)


def plan(sweep: Sweep, out: Path) -> dict[str, Any]:
    """What ``run_sweep`` would do: of each trial its needs and how far it is.

    Raises ValueError where a trial does not fit.
    """
    room = find_room()
    return {
        "num_trials": len(sweep.trials),
        "num_concurrent": num_concurrent(sweep, room),
        "where": room.where,
        "num_cpus": room.num_cpus,
        "trials": {
            name: {
                "kind": config.kind,
                "needs": _words(need_of(config, sweep.tune)),
                "status": trial_status(out / name),
            }
            for name, config in sweep.trials.items()
        },
    }


# ---- the trials ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a trial."""

    trial: str
    status: str
    """``running``, ``finished``, ``failed`` or ``interrupted``."""
    reason: str | None
    """Why it failed."""
    num_finished: int
    """Of all trials, those finished before this call included."""
    num_trials: int


def trial_status(folder: Path) -> str:
    """As ``RunDirectory.status``; ``missing`` where there is no run."""
    try:
        return RunDirectory.open(folder).status
    except RunError:
        return "missing"


def run_sweep(
    sweep: Sweep,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    argv: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Runs every trial that is not finished; a failing one does not stop the others.

    Args:
        sweep: from ``load_sweep``.
        out: folder of the sweep, that every node sees; each trial is a run directory in it.
        resume: the folder holds this sweep already; finished trials are left alone, begun ones go
            on from their last checkpoint, failed ones are tried again.
        argv: the command line, for the manifests.
        on_event: told what happens to the trials.

    Returns:
        ``num_trials``, ``num_finished``, ``num_run`` (by this call) and ``trials``: of each its
        ``status``, ``run`` (folder) and, where it failed, ``reason``.

    Raises:
        RunError: the folder holds something else, another sweep (each difference is named), or
            another process is at it.
        ValueError: a trial does not fit on the cluster; then no folder is made.
        KeyboardInterrupt: after Ctrl-C, once the trials have saved their states.
    """
    folder = Path(out).resolve()
    _check_folder(sweep, folder, resume)
    reasons: dict[str, dict[str, Any]] = {}
    todo = _unfinished(sweep, folder)
    if todo:
        if not os.environ.get("RAY_ADDRESS"):
            num_concurrent(sweep, find_room())  # before Ray is started
        with local_ray(_own_cpus()):
            num_trials = num_concurrent(sweep, _cluster_room())
            with _held(sweep, folder):  # only now the folder is made
                todo = _unfinished(sweep, folder)
                told = on_event or (lambda event: None)
                if todo:  # a trial of a killed driver may have come to its end in the meantime
                    reasons = _run_trials(sweep, folder, todo, num_trials, argv, told)
    found = {name: trial_status(folder / name) for name in sweep.trials}
    return {
        "out": str(folder),
        "num_trials": len(found),
        "num_finished": sum(status == "finished" for status in found.values()),
        "num_run": len(todo),
        "trials": {
            name: {"run": str(folder / name), "status": status}
            | (reasons.get(name, {}) if status != "finished" else {})
            for name, status in found.items()
        },
    }


def _unfinished(sweep: Sweep, folder: Path) -> list[str]:
    return [name for name in sweep.trials if trial_status(folder / name) != "finished"]


def _check_folder(sweep: Sweep, folder: Path, resume: bool) -> None:
    """Raises RunError where the folder is not for this sweep."""
    file = folder / "sweep.yaml"
    if resume:
        if not file.exists():
            raise RunError(f"{folder} holds no sweep (no sweep.yaml): leave --resume out")
        begun = read_yaml(os.fspath(file))
        if changed := list(differences(_identity(begun), _identity(_asked(sweep)))):
            raise RunError(
                f"{folder} was begun as another sweep:\n  "
                + "\n  ".join(changed)
                + "\nresume it as it was (sweep.yaml there), or choose another --out"
            )
        return
    try:
        found = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise RunError(f"cannot use the folder {folder}: {error}") from error
    if "sweep.yaml" in found:
        raise RunError(
            f"{folder} holds a sweep already: add --resume to go on with it, or choose "
            "another --out"
        )
    if found:
        raise RunError(f"{folder} is not empty ({found[0]!r}): choose another --out")


@contextlib.contextmanager
def _held(sweep: Sweep, folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, with what was asked and its lock; or RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(folder)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error}") from error
    try:
        text = yaml.safe_dump(_asked(sweep), sort_keys=False, allow_unicode=True)
        write_text(folder / "sweep.yaml", text)
        yield
    finally:
        os.close(lock)


def _asked(sweep: Sweep) -> dict[str, Any]:
    """What ``sweep.yaml`` in the folder says: a sweep file again."""
    return {
        "base": dict(sweep.base),
        "space": dict(sweep.space),
        "tune": dataclasses.asdict(sweep.tune),
    }


def _identity(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two sweeps the same: not how many run at once, but CPUs, which are threads."""
    named = {**asked, "tune": {"num_cpus": (asked.get("tune") or {}).get("num_cpus")}}
    return json.loads(json.dumps(named, default=str))


def _remove_stillborn(folder: Path) -> None:
    """A trial killed before its manifest was written has nothing to go on from."""
    if not folder.is_dir() or trial_status(folder) != "missing":
        return
    if all(e.name in (".lock", "config.yaml") or e.name[:5] == ".new-" for e in folder.iterdir()):
        shutil.rmtree(folder)


_SETTINGS = {  # read by Tune on the driver, and handed on to the trials
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table whatever the verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # nobody reads it
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
}


def _run_trials(
    sweep: Sweep,
    folder: Path,
    todo: Sequence[str],
    num_concurrent: int,
    argv: Sequence[str],
    on_event: Callable[[Event], None],
) -> dict[str, dict[str, Any]]:
    """Takes the trials to their ends; returns of each that failed the ``reason``."""
    for name in todo:
        _remove_stillborn(folder / name)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with _quiet():
        from ray import tune

    own = folder / ".tune"
    shutil.rmtree(own, ignore_errors=True)  # of a killed driver
    own.mkdir()
    stop = own / "stop"
    messages: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
    hall = _Hall(messages.put)
    task = {
        "configs": {name: sweep.trials[name] for name in todo},
        "folder": folder,
        "stop": stop,
        "cwd": Path.cwd(),
        "argv": list(argv),
    }
    needs = {name: need_of(sweep.trials[name], sweep.tune) for name in todo}

    def places(point: dict[str, str]) -> Any:
        need = needs[point["trial"]]
        own: dict[str, float] = {"CPU": need.num_cpus}
        own |= {"GPU": need.num_gpus} if need.num_gpus else {}
        return tune.PlacementGroupFactory([own, *[{"CPU": 1.0}] * need.num_runners])

    trainable = tune.with_resources(tune.with_parameters(_trial, task=task), places)
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(todo))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=num_concurrent,
            reuse_actors=True,  # the next trial need not start Python and torch again
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="state",
            storage_path=str(own),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=sweep.tune.max_failures),
            callbacks=[hall.callback()],
            stop=hall.stopper(),
        ),
    )
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            errors.append(error)

    ended: dict[str, dict[str, Any]] = {}
    num_before = len(sweep.trials) - len(todo)

    def tell() -> None:
        while not messages.empty():
            name, message = messages.get()
            if message["status"] != "running":
                ended[name] = message
            num_done = sum(m["status"] == "finished" for m in ended.values())
            on_event(
                Event(
                    trial=name,
                    status=message["status"],
                    reason=message.get("reason"),
                    num_finished=num_before + num_done,
                    num_trials=len(sweep.trials),
                )
            )

    # In a thread: on the main one Tune sets a handler of SIGINT that ends trials at once.
    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    with _quiet(), on_interrupt() as interrupted:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if interrupted.is_set() and not stop.exists():
                hall.is_closing = True
                stop.touch()
            tell()
        tell()
    shutil.rmtree(own, ignore_errors=True)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return {name: m for name, m in ended.items() if m["status"] == "failed"}


class _Hall:
    """Who comes and goes, seen from Tune's thread: messages to the driver, and when to close."""

    def __init__(self, tell: Callable[[tuple[str, dict[str, Any]]], None]) -> None:
        self._tell = tell
        self._inside: set[str] = set()
        self.is_closing = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks, and nobody reads them."""
        return {}

    def came(self, name: str) -> None:
        if not self.is_closing:  # who comes now leaves at once
            self._inside.add(name)
            self._tell((name, {"status": "running"}))

    def left(self, name: str, message: dict[str, Any]) -> None:
        if name in self._inside:
            self._inside.discard(name)
            self._tell((name, message))

    def is_closed(self) -> bool:
        """Asked by Tune before it lets the next ones in."""
        return self.is_closing and not self._inside

    def callback(self) -> Any:
        from ray import tune

        hall = self

        class Callback(tune.Callback):
            def __getstate__(self) -> dict[str, Any]:
                return {}

            def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                hall.came(trial.config["trial"])

            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
            ) -> None:
                if "status" in result:
                    message = {k: result[k] for k in ("status", "reason", "where") if k in result}
                    hall.left(trial.config["trial"], message)

            def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                reason = (
                    "its process died (killed, or out of memory); a resumed sweep goes on from its "
                    "last checkpoint"
                )
                hall.left(trial.config["trial"], {"status": "failed", "reason": reason})

        return Callback()

    def stopper(self) -> Any:
        from ray import tune

        hall = self

        class Stopper(tune.Stopper):
            def __getstate__(self) -> dict[str, Any]:
                return {}

            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return hall.is_closed()

        return Stopper()


def _trial(point: dict[str, str], task: dict[str, Any]) -> dict[str, Any]:
    """What Tune calls: one run, in a thread of the trial's process.

    Errors of the run are returned, not raised: Tune starts again only what died.
    """
    name, stop = point["trial"], Path(task["stop"])
    if Path(task["cwd"]).is_dir():
        os.chdir(task["cwd"])  # relative paths of the configs; a worker's own is the cluster's
    folder, stopping, is_over = task["folder"] / name, threading.Event(), threading.Event()

    def look() -> None:
        while not is_over.wait(0.2):
            if stop.exists():
                stopping.set()
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        if stop.exists():
            return {"status": "interrupted"}
        is_begun = _wait_for_orphan(folder)
        with stopped_by(stopping):
            run_config(
                task["configs"][name],
                folder,
                resume=is_begun,
                argv=task["argv"],
                progress=lambda row: None,
            )
    except KeyboardInterrupt:
        return {"status": "interrupted"}
    except Exception as error:
        is_told = isinstance(error, ValueError | OSError)
        reason = str(error) if is_told else f"{type(error).__name__}: {error}"
        return {"status": "failed", "reason": reason, "where": traceback.format_exc()}
    finally:
        is_over.set()
    return {"status": "finished"}


def _wait_for_orphan(folder: Path) -> bool:
    """Whether there is a run to go on with, once a trial of a killed driver has let go of it."""
    deadline = time.monotonic() + _WAIT_FOR_ORPHANS_S
    while (status := trial_status(folder)) == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    return status != "missing"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's libraries warn of names of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(ray|copy)\b")
        yield
