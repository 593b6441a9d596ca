"""``ssl2rl compare``: runs that differ in more than their seed, side by side.

Run files in, files out. ``compare`` reads run directories of one kind and returns one plain dict,
which is ``compare.json``; ``compare_page`` makes CSV, PNG and HTML from that dict alone. A run is
one sample of what its settings lead to: statistics are over runs (seeds), never over episodes.

Words: a *task* is what scores are measured on, runs of different tasks are not compared; a *group*
is all runs that differ in nothing but seed and task. Shape letters: P looks at a run, G points of
a grid.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.cryoem.types import FloatArray
from ssl2rl_ray.config import own_version
from ssl2rl_ray.report import folder
from ssl2rl_ray.report.results import ReportError, find_runs
from ssl2rl_ray.runs import STEPS, RunDirectory
from ssl2rl_ray.schema import to_dict
from ssl2rl_ray.stats import (
    Estimate,
    area_under,
    curve_over_runs,
    difference,
    estimate,
    first_reached,
    interquartile_mean,
    or_none,
    probability_of_improvement,
)

FORMAT_VERSION = 1
MIN_SEEDS = 5
"""Fewer runs of a group rank nothing: intervals of three exclude a difference that is not there in
one of five cases, those of five in 6 % (benchmarks/interval_coverage.py)."""
_MAX_POINTS = 200
"""Of a curve."""
_TOGETHER = 1.05
"""Runs whose ends differ by no more than this end together: few stop at the very step."""
_SEED = 20210831
"""Of the resamples: the same runs give the same bytes."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a kind of run is compared by."""

    metric: str
    """Column of metrics.jsonl that validation goes by; higher is better."""
    named_by: str
    """Setting that names a group."""
    task: tuple[str, ...]
    """Settings, and sections of settings, that say what the metric is measured on ..."""
    own: tuple[str, ...]
    """... but for these in them, which an agent may choose."""


_KINDS = {
    "navigation": _Kind(
        metric="validation/episode_return",
        named_by="algorithm.name",
        task=("data", "env", "sessions", "training.num_validation_sessions"),
        own=(
            "env.action_level",
            "env.feature_set",
            "env.num_past_steps",
            "env.num_candidates",
            "sessions.real",
            "sessions.unlabelled",
            "sessions.pool_size",
            "sessions.budget_range_min",
        ),
    ),
    "crystfel": _Kind(
        metric="validation/share_of_best",
        named_by="algorithm.name",
        task=("env", "training.num_validation_experiments"),
        own=(
            "env.num_steps",
            "env.action",
            "env.max_change",
            "env.reward",
            "env.time_cost",
            "env.is_free_seen",
        ),
    ),
    "perception": _Kind(
        metric="validation/accuracy", named_by="training.method", task=("data",), own=()
    ),
}
_NOT_LEARNED = ("seed", "training.num_torch_threads", "training.is_buffer_saved", "compute")
"""Settings, and sections of them, that do not make a group: which sample, where, what is kept."""
QUANTITIES = {
    "final": "at the last look",
    "best": "where validation was best",
    "area": "mean height of the learning curve",
}
"""What is said of a run, and in words."""


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """One run: what it was asked for, and its learning curve."""

    path: Path
    seed: int
    status: str
    asked: Mapping[str, Any]
    """Every setting by its dotted name; datasets by the hash of their content."""
    x_label: str
    """What ``x`` counts."""
    x: FloatArray
    """(P,) env steps or epochs, ascending."""
    wall_s: FloatArray
    """(P,) seconds of training until then, of all attempts; NaN where the run did not say."""
    score: FloatArray
    """(P,)"""
    best: float
    """Score at the checkpoint that validation chose; NaN where nothing is chosen."""
    hardware: str

    @property
    def name(self) -> str:
        """Its folder within the sweep's, or alone."""
        return self.path.name


def _read(path: Path, kind: str, metric: str) -> Trained:
    """The run of a folder; raises ReportError, RunError or ConfigError, each with the reason."""
    run = RunDirectory.open(path)
    rows, manifest = run.metrics(), run.manifest
    if "fit" in rows:  # classifiers of folds are not the run's
        rows = rows.loc[rows["fit"] == "main"]
    x_label = next((name for name in STEPS if name in rows), None)
    if x_label is None or metric not in rows:
        known = [str(n) for n in rows.columns if n not in STEPS and rows[n].dtype.kind in "fiu"]
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ReportError(f"its metrics have no {metric!r} yet{hint}")
    wall_s = _wall_s(rows)
    is_scored = (rows[metric].notna() & rows[x_label].notna()).to_numpy()
    if not is_scored.any():
        raise ReportError(f"its metrics have no value of {metric!r} yet")
    x = rows.loc[is_scored, x_label].to_numpy(np.float64)
    order = np.argsort(x, kind="stable")
    score = rows.loc[is_scored, metric].to_numpy(np.float64)[order]
    chosen = run.best_checkpoint
    at_best = np.flatnonzero(x[order] == chosen["step"]) if chosen else []
    return Trained(
        path=path,
        seed=run.config.seed,
        status=run.status,
        asked=_settings(run),
        x_label={"num_env_steps": "env steps", "epoch": "epochs"}.get(x_label, x_label),
        x=x[order],
        wall_s=np.maximum.accumulate(wall_s[is_scored][order]),
        score=score,
        best=float(score[at_best[-1]]) if len(at_best) else math.nan,
        hardware=json.dumps((manifest.get("attempts") or [{}])[-1].get("hardware")),
    )


def _settings(run: RunDirectory) -> dict[str, Any]:
    hashes = run.manifest.get("data_hashes") or {}
    return {
        name: _by_content(value, hashes) if name.startswith("data.") else value
        for name, value in _flat(to_dict(run.config))
    }


def learned_settings(run: RunDirectory) -> dict[str, Any]:
    """Every setting that makes a group, by its dotted name; datasets by their content's hash."""
    return {n: v for n, v in _settings(run).items() if not _is_in(n, _NOT_LEARNED)}


def _wall_s(rows: Any) -> FloatArray:
    """(P,) ``wall_s`` begins anew with every attempt: those before it are added.

    What an attempt did after its last checkpoint is gone with its rows, and so is that time.
    """
    if "wall_s" not in rows:
        return np.full(len(rows), np.nan)
    wall_s, before = np.empty(len(rows)), 0.0
    for _, own in rows.assign(place=range(len(rows))).groupby("attempt", sort=True):
        found = own["wall_s"].to_numpy(np.float64, copy=True)
        if np.isnan(found[0]):  # the look before the first step
            found[0] = 0.0
        wall_s[own["place"].to_numpy()] = before + found
        before += float(np.nanmax(found))
    return wall_s


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _by_content(value: Any, hashes: Mapping[str, str]) -> Any:
    """Hashes of datasets in place of their paths."""
    if isinstance(value, list):
        return [_by_content(item, hashes) for item in value]
    return hashes.get(value, value) if isinstance(value, str) else value


# ---- tasks and groups ----------------------------------------------------------------------------


def _is_in(name: str, sections: Sequence[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _task_of(run: Trained, kind: _Kind) -> dict[str, Any]:
    """What its score was measured on."""
    return {n: v for n, v in run.asked.items() if _is_in(n, kind.task) and n not in kind.own}


def _check_task(runs: Sequence[Trained], kind: _Kind, varied: Sequence[str]) -> None:
    """Raises ReportError where runs were measured on different things."""
    first = _task_of(runs[0], kind)
    for run in runs[1:]:
        other = _task_of(run, kind)
        found = [n for n in {**first, **other} if first.get(n) != other.get(n) and n not in varied]
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            said = "\n  ".join(f"{n}: {first.get(n)!r} / {other.get(n)!r}" for n in found[:3])
            raise ReportError(
                f"{runs[0].path} and {run.path} are of different tasks, so their scores do not "
                f"compare{more}:\n  {said}\ncompare them apart, or add "
                + " ".join(f"--task {name}" for name in found[:3])
                + " to compare within each task"
            )


def word(value: Any) -> str:
    """A setting's value in a label."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(word, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shorts(names: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted names, as many as tell them apart."""
    depth = 1
    while len(found := {n: ".".join(n.split(".")[-depth:]) for n in names}) > len(
        set(found.values())
    ):
        depth += 1
    return found


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose values are not the same everywhere, in the order of the config."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [n for n in names if len({json.dumps(each.get(n)) for each in settings}) > 1]


def labels(settings: Sequence[Mapping[str, Any]], named_by: str) -> list[str]:
    """Names of groups: the algorithm, then what tells it from others of the same algorithm.

    Settings that follow from others named before are left out, numbers rather than switches and
    words, and so is a value that more than half of them share: of an ablation, only what was taken
    away is said.
    """
    found = [""] * len(settings)
    names = [word(each.get(named_by)) for each in settings]
    for name in dict.fromkeys(names):
        members = [i for i, other in enumerate(names) if other == name]
        own = [settings[i] for i in members]
        keys: list[str] = []
        for key in sorted(_differing(own), key=lambda key: _is_number(own, key)):
            if _num_apart(own, [*keys, key]) > _num_apart(own, keys):
                keys.append(key)
        shorts = _shorts(keys)
        usual = {}
        for key in keys:
            value, count = Counter(json.dumps(each.get(key)) for each in own).most_common(1)[0]
            usual[key] = value if count > len(own) / 2 and len(own) > 2 else None
        for i, each in zip(members, own, strict=True):
            parts = [
                f"{shorts[key]}={word(each.get(key))}"
                for key in keys
                if json.dumps(each.get(key)) != usual[key]
            ]
            is_told = len(set(names)) > 1 or not parts
            found[i] = ", ".join([name] * is_told + parts)
    return found


def _is_number(settings: Sequence[Mapping[str, Any]], key: str) -> bool:
    """One number or several; not a switch, a word, or nothing."""
    return not all(isinstance(each.get(key), bool | str | None) for each in settings)


def _num_apart(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({json.dumps([each.get(key) for key in keys]) for each in settings})


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Runs that differ in seed and task only."""

    label: str
    settings: Mapping[str, Any]
    runs: Mapping[str, tuple[Trained, ...]]
    """By task, in the order of their seeds."""

    @property
    def num_seeds(self) -> int:
        """Of the task that has fewest."""
        return min(map(len, self.runs.values()))

    def strata(self, value: Callable[[str, Trained], float]) -> list[FloatArray]:
        """(R,) finite values of the runs of each task."""
        found = [np.array([value(t, r) for r in runs]) for t, runs in self.runs.items()]
        return [each[~np.isnan(each)] for each in found]


def _grouped(
    runs: Sequence[Trained], kind: _Kind, varied: Sequence[str], notes: list[str]
) -> tuple[list[str], list[Group]]:
    """Tasks by their labels, and the groups that every task has."""
    tasks: dict[str, dict[str, list[Trained]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    shorts = _shorts(varied)
    for run in runs:
        task = ", ".join(f"{shorts[name]}={word(run.asked.get(name))}" for name in varied)
        is_task = _task_of(run, kind)
        own = {
            n: v
            for n, v in run.asked.items()
            if n not in varied and n not in is_task and not _is_in(n, _NOT_LEARNED)
        }
        key = json.dumps(own, sort_keys=True)
        settings.setdefault(key, own)
        others = tasks.setdefault(task, {}).setdefault(key, [])
        if twin := next((other for other in others if other.seed == run.seed), None):
            raise ReportError(
                f"{twin.path} and {run.path} are the same run twice (seed {run.seed}): it counts "
                "once, so leave one out"
            )
        others.append(run)
    named = dict(zip(settings, labels(list(settings.values()), kind.named_by), strict=True))
    whole = [task for task, groups in tasks.items() if len(groups) == len(settings)]
    if not whole:
        said = "\n  ".join(
            f"{task or 'all'}: {', '.join(named[key] for key in groups)}"
            for task, groups in tasks.items()
        )
        raise ReportError(f"no task was run by every group:\n  {said}\nleave some runs out")
    for task in tasks:
        if task not in whole:
            missing = [name for key, name in named.items() if key not in tasks[task]]
            notes.append(f"task {task} left out: without runs of {'; '.join(missing)}")
    return whole, [
        Group(
            label=named[key],
            settings=own,
            runs={
                task: tuple(sorted(tasks[task][key], key=lambda run: run.seed)) for task in whole
            },
        )
        for key, own in settings.items()
    ]


# ---- the comparison ------------------------------------------------------------------------------


def compare(
    paths: Sequence[str | os.PathLike[str]],
    *,
    metric: str | None = None,
    threshold: float | None = None,
    tasks: Sequence[str] = (),
    has_unfinished: bool = False,
) -> dict[str, Any]:
    """Everything that the page shows, as plain values: ``compare.json`` without its file list.

    Args:
        paths: run directories, or folders that hold some (of a sweep), all of one kind.
        metric: column of metrics.jsonl, higher is better; None = what validation goes by.
        threshold: also say after how many env steps each run scored as much.
        tasks: dotted names of settings that tell tasks apart. Runs are compared within a task;
            over several, each score is divided by the mean over groups of its task, and runs are
            resampled within tasks.
        has_unfinished: take runs that are not finished as far as they came.

    Raises:
        ReportError: no run, none that is finished, runs of several kinds or tasks, a run twice.
    """
    folders = find_runs(
        paths, tuple(_KINDS), "`ssl2rl report` sets the methods of such runs side by side"
    )
    kinds: dict[str, Path] = {}
    for path in folders:
        kinds.setdefault(str(RunDirectory.open(path).manifest.get("kind")), path)
    if len(kinds) > 1:
        said = ", ".join(f"{path} is of kind {kind}" for kind, path in kinds.items())
        raise ReportError(f"runs of different kinds do not compare ({said}): name those of one")
    (kind_name,) = kinds
    kind, tasks = _KINDS[kind_name], list(dict.fromkeys(tasks))
    metric = metric or kind.metric
    notes: list[str] = []
    runs = _read_all(folders, kind_name, metric, has_unfinished, notes)
    known = {name for run in runs for name in run.asked}
    if unknown := [name for name in tasks if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ReportError(f"--task {unknown[0]}: no run has such a setting{hint}")
    _check_task(runs, kind, tasks)
    named, groups = _grouped(runs, kind, tasks, notes)
    if threshold is not None and not math.isfinite(threshold):
        raise ReportError(f"--threshold: expected a number, found {threshold}")
    if threshold is not None and len(named) > 1:
        raise ReportError("a threshold is of one task: leave --threshold or --task out")
    if len({run.x_label for run in runs}) > 1:
        raise ReportError("some runs count env steps and some epochs: name those of one kind")
    notes += _cautions(groups, named, kind)
    values, scales = _values(groups, named)
    return {
        "format": folder.FORMATS["compare"],
        "format_version": FORMAT_VERSION,
        "version": own_version(),
        "kind": kind_name,
        "metric": metric,
        "x_label": runs[0].x_label,
        "decimals": _decimals(groups),
        "threshold": threshold,
        "notes": notes,
        "tasks": [{"task": task, "scale": scales[task]} for task in named],
        "groups": [_about(group, [g.settings for g in groups]) for group in groups],
        "scores": _scores(groups, values),
        "task_scores": _task_scores(groups, values, scales),
        "pairs": _pairs(groups, values),
        "thresholds": [] if threshold is None else _thresholds(groups, threshold),
        "runs": [
            {
                "group": group.label,
                "task": task,
                "seed": run.seed,
                "run": run.name,
                "path": str(run.path),
                "status": run.status,
                "last": float(run.x[-1]),
                "wall_s": or_none(run.wall_s[-1]),
                **{q: or_none(values[q][task][run.path] * scales[task]) for q in QUANTITIES},
            }
            for group in groups
            for task, own in group.runs.items()
            for run in own
        ],
        "figures": _figures(groups, named, metric),
    }


def _read_all(
    folders: Sequence[Path], kind: str, metric: str, has_unfinished: bool, notes: list[str]
) -> list[Trained]:
    """The runs that count; the others are said."""
    runs = []
    for path in folders:
        try:
            run = _read(path, kind, metric)
        except ValueError as error:  # ReportError, RunError, ConfigError: each says why
            notes.append(f"{path.name}: left out: {error}")
            continue
        if run.status == "finished" or has_unfinished:
            runs.append(run)
        if run.status != "finished":
            how_far = f"{run.x[-1]:,.0f} {run.x_label}"
            notes.append(
                f"{path.name} ({run.status}): taken as far as it came, {how_far}"
                if has_unfinished
                else f"{path.name} ({run.status}, {how_far}): left out, as it is not finished"
            )
    if not runs:
        more = f"\n  and {len(notes) - 3} more" if len(notes) > 3 else ""
        hint = "\nwait for them, or add --unfinished to take them as far as they came"
        raise ReportError(
            f"none of {len(folders)} runs can be compared:\n  "
            + "\n  ".join(notes[:3])
            + more
            + hint * any("not finished" in note for note in notes)
        )
    return runs


def _cautions(groups: Sequence[Group], tasks: Sequence[str], kind: _Kind) -> Iterator[str]:
    """What a reader must know before any number."""
    if few := [g for g in groups if g.num_seeds < MIN_SEEDS]:
        what = (
            f"{'; '.join(g.label for g in few)}: " if len(few) < len(groups) and few else ""
        ) + f"fewer than {MIN_SEEDS} seeds"
        yield f"{what}: this ranks nothing, and intervals of so few are too narrow"
    runs = [run for group in groups for own in group.runs.values() for run in own]
    for task in tasks:
        last = {run.x[-1] for group in groups for run in group.runs[task]}
        if max(last) > _TOGETHER * min(last):
            yield (
                f"{task + ': ' if task else ''}runs end between {min(last):,.0f} and "
                f"{max(last):,.0f} {runs[0].x_label}: their final scores are of different lengths; "
                "the area is over what all have"
            )
    if len(groups) == 1:
        yield "one group: there is nothing to compare it with"
    others = [  # the name says what is in its own section
        n
        for n in _differing([g.settings for g in groups])
        if n != kind.named_by and not n.startswith("algorithm.")
    ]
    told = _shorts(others)
    if hidden := [n for n in others if not any(f"{told[n]}=" in g.label for g in groups)]:
        first = hidden[0]
        found = {g.label: word(g.settings.get(first)) for g in groups}
        (usual, _), *_ = Counter(found.values()).most_common(1)
        others = [f"{label} {value}" for label, value in found.items() if value != usual]
        shown = ", ".join([*others[:5], *["..."] * (len(others) > 5), f"else {usual}"])
        yield (
            f"groups differ in {', '.join(hidden[:5])}, which their names do not say "
            f"({first}: {shown})"
        )
    threads = {run.asked.get("training.num_torch_threads") for run in runs}
    if len({run.hardware for run in runs}) > 1 or len(threads) > 1:
        yield "runs are of different hardware or threads: their wall clocks do not compare"
    if any(np.isnan(run.wall_s).any() for run in runs):
        yield "some runs did not note their wall clock: the curves against it are left out"


Values = dict[str, dict[str, dict[Path, float]]]
"""Of each quantity, task and run: its value in units of the task's scale, NaN = not defined."""


def _values(groups: Sequence[Group], tasks: Sequence[str]) -> tuple[Values, dict[str, float]]:
    """Values, and the scale of each task: 1 where there is one task only."""
    values: Values = {quantity: {} for quantity in QUANTITIES}
    scales: dict[str, float] = {}
    for task in tasks:
        runs = [run for group in groups for run in group.runs[task]]
        low, high = max(run.x[0] for run in runs), min(run.x[-1] for run in runs)
        scales[task] = 1.0
        if len(tasks) > 1:
            means = [np.mean([run.score[-1] for run in group.runs[task]]) for group in groups]
            scales[task] = float(np.mean(means)) or 1.0
        for quantity, value in (
            ("final", lambda run: run.score[-1]),
            ("best", lambda run: run.best),
            ("area", lambda run, a=low, b=high: area_under(run.x, run.score, a, b)),
        ):
            values[quantity][task] = {run.path: float(value(run)) / scales[task] for run in runs}
    return values, scales


def _strata(group: Group, values: dict[str, dict[Path, float]]) -> list[FloatArray] | None:
    """(R,) of each task; None where some task has no value."""
    strata = group.strata(lambda task, run: values[task][run.path])
    return strata if all(len(each) for each in strata) else None


def _scores(groups: Sequence[Group], values: Values) -> list[dict[str, Any]]:
    """Over all tasks."""
    return [
        {"quantity": quantity, "group": group.label} | _statistics(strata)
        for quantity in QUANTITIES
        for group in groups
        if (strata := _strata(group, values[quantity])) is not None
    ]


def _task_scores(
    groups: Sequence[Group], values: Values, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Of each task apart, in its own unit; nothing where there is one task only."""
    return [
        {"quantity": quantity, "task": task, "group": group.label} | _statistics([stratum * scale])
        for quantity in QUANTITIES
        for group in groups
        if len(scales) > 1 and (strata := _strata(group, values[quantity])) is not None
        for (task, scale), stratum in zip(scales.items(), strata, strict=True)
    ]


def _statistics(strata: Sequence[FloatArray]) -> dict[str, Any]:
    found: dict[str, Any] = {"n": min(map(len, strata))}
    for name, statistic in (("iqm", interquartile_mean), ("mean", np.mean)):
        found |= _named(name, estimate(strata, np.random.default_rng(_SEED), statistic))
    return found


def _named(name: str, found: Estimate) -> dict[str, Any]:
    plain = found.as_json()
    return {name: plain["value"], f"{name}_low": plain["ci95"][0], f"{name}_high": plain["ci95"][1]}


def _pairs(groups: Sequence[Group], values: Values) -> list[dict[str, Any]]:
    """Every group against every other, both ways round."""
    found = []
    for quantity in QUANTITIES:
        strata = [(group.label, _strata(group, values[quantity])) for group in groups]
        for (ours, x), (theirs, y) in itertools.combinations(strata, 2):
            if x is None or y is None:
                continue
            n = min(map(len, [*x, *y]))
            wins = probability_of_improvement(x, y, np.random.default_rng(_SEED))
            iqm = difference(x, y, np.random.default_rng(_SEED))
            low, high = iqm.ci95
            is_established = bool(n >= MIN_SEEDS and (low > 0 or high < 0))
            for group, against, p, d in (
                (ours, theirs, wins, iqm),
                (theirs, ours, _mirrored(wins, 1), _mirrored(iqm, 0)),
            ):
                names = {"quantity": quantity, "group": group, "against": against, "n": n}
                numbers = _named("probability", p) | _named("iqm_difference", d)
                found.append(names | numbers | {"is_established": is_established})
    return found


def _mirrored(found: Estimate, total: float) -> Estimate:
    """The other way round: what is left of the total."""
    low, high = found.ci95
    return Estimate(value=total - found.value, ci95=(total - high, total - low))


def _thresholds(groups: Sequence[Group], threshold: float) -> list[dict[str, Any]]:
    """Median over runs of when each first scored as much; null = half of them never did."""
    found = []
    for group in groups:
        (runs,) = group.runs.values()
        steps = [first_reached(run.x, run.score, threshold) for run in runs]
        row: dict[str, Any] = {
            "group": group.label,
            "n": len(runs),
            "num_reached": int(np.isfinite(steps).sum()),
        }
        row |= _named("steps", estimate([steps], np.random.default_rng(_SEED), np.median))
        if not any(np.isnan(run.wall_s).any() for run in runs):
            seconds = [first_reached(run.wall_s, run.score, threshold) for run in runs]
            rng = np.random.default_rng(_SEED)
            row |= _named("wall_s", estimate([seconds], rng, np.median))
        found.append(row)
    return found


def _about(group: Group, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = [run for own in group.runs.values() for run in own]
    wall_s = [run.wall_s[-1] for run in runs]
    return {
        "group": group.label,
        "num_seeds": group.num_seeds,
        "seeds": sorted({run.seed for run in runs}),
        "num_runs": len(runs),
        "last": [float(min(run.x[-1] for run in runs)), float(max(run.x[-1] for run in runs))],
        "wall_s": or_none(float(np.median(wall_s))),
        "settings": {n: group.settings[n] for n in _differing(settings) if n in group.settings},
    }


def _decimals(groups: Sequence[Group]) -> int:
    """Of scores: three where they are shares, fewer where they are large."""
    largest = max(
        float(np.abs(run.score).max()) for group in groups for own in group.runs.values()
        for run in own
    )  # fmt: skip
    return 3 if largest < 10 else 2 if largest < 100 else 1


# ---- curves --------------------------------------------------------------------------------------


def _figures(groups: Sequence[Group], tasks: Sequence[str], metric: str) -> dict[str, Any]:
    runs = [run for group in groups for own in group.runs.values() for run in own]
    found = {
        "curves-steps": _curves(
            groups, tasks, metric, runs[0].x_label, lambda run: run.x, _GRID + _BAND
        )
    }
    if not any(np.isnan(run.wall_s).any() for run in runs):
        longest = max(run.wall_s[-1] for run in runs)
        unit, seconds = next(
            (unit, size) for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0))
            if longest >= 2 * size or unit == "s"
        )  # fmt: skip
        found["curves-wall-clock"] = _curves(
            groups, tasks, metric, f"wall clock, {unit}", lambda run: run.wall_s / seconds,
            "Seconds that training took, with validation and whatever else ran on the machine; "
            "of a run that was resumed, the attempts together. " + _GRID + _BAND,
        )  # fmt: skip
    return found


_GRID = (
    "Looks at different runs do not fall together: all are put on one grid, on which the last "
    "look stands until the next, and a curve ends where the first of its runs ends (the last, "
    "where all end within 5 %). "
)
_BAND = "Bands: pointwise 95 % bootstrap over runs; of a single run there is none."


def _end(last: Sequence[float]) -> float:
    """Where a curve over runs ends: its last looks should be of all runs, not of the earliest."""
    return max(last) if max(last) <= _TOGETHER * min(last) else min(last)


def _looks(x: Sequence[FloatArray]) -> FloatArray:
    """(G,) where curves are looked at: at every point of theirs, within reason."""
    looks = np.unique(np.concatenate(x))
    return np.linspace(looks[0], looks[-1], _MAX_POINTS) if len(looks) > _MAX_POINTS else looks


def _within(looks: FloatArray, x: Sequence[FloatArray]) -> FloatArray:
    """The looks from where all runs have begun to the end of their curve."""
    begin, end = max(own[0] for own in x), _end([own[-1] for own in x])
    return looks[(looks >= begin) & (looks <= end)]


def curve_grid(x: Sequence[FloatArray]) -> FloatArray:
    """(G,) at which a curve over R runs is drawn; ``x`` are the (P,) of the runs, ascending."""
    return _within(_looks(x), x)


def _curves(
    groups: Sequence[Group],
    tasks: Sequence[str],
    metric: str,
    x_label: str,
    x_of: Callable[[Trained], FloatArray],
    caption: str,
) -> dict[str, Any]:
    """One row of panels a task: interquartile mean, mean."""
    panels = []
    for task in tasks:
        curves = {g.label: [(x_of(run), run.score) for run in g.runs[task]] for g in groups}
        looks = _looks([x for own in curves.values() for x, _ in own])
        for name, statistic in (("interquartile mean", interquartile_mean), ("mean", np.mean)):
            lines = []
            for i, (label, own) in enumerate(curves.items()):
                at = _within(looks, [x for x, _ in own])
                if not len(at):
                    continue
                rng = np.random.default_rng(_SEED)
                value, low, high = curve_over_runs(own, at, rng, statistic)
                lines.append(
                    {
                        "label": label,
                        "style": i,
                        "x": at.tolist(),
                        "n": [len(own)] * len(at),
                        "mean": value.tolist(),
                        "low": [or_none(v) for v in low],
                        "high": [or_none(v) for v in high],
                        "spread": "band",
                        "is_held": True,
                    }
                )
            title = f"{task}: {name}" if task else name
            panels.append(
                {"title": title, "task": task, "statistic": name, "x_label": x_label,
                 "y_label": metric, "lines": lines}
            )  # fmt: skip
    return {
        "title": f"Learning curves against {x_label.split(',')[0]}",
        "caption": caption,
        "alt": f"{metric} of {', '.join(group.label for group in groups)} against {x_label}: "
        "interquartile mean and mean over runs, with bands.",
        "columns": 2,
        "panel_inches": (4.4, 3.3),
        "panels": panels,
    }


def points(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of a figure, one row a point."""
    return [
        {
            "task": panel["task"],
            "group": line["label"],
            "statistic": panel["statistic"],
            "x_label": panel["x_label"],
            "x": x,
            "n": line["n"][i],
            "value": line["mean"][i],
            "ci95": (line["low"][i], line["high"][i]),
        }
        for panel in figure["panels"]
        for line in panel["lines"]
        for i, x in enumerate(line["x"])
    ]
