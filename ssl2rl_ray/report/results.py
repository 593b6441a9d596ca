"""What runs of the loop left behind: every method played to its end, and notes on the rest.

Files only: a run directory of kind ``ssl2rl`` is one data set (a seed with a labelled fraction) on
which several methods played side by side.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl2rl_ray.config import METHODS, SSL2RLRunConfig
from ssl2rl_ray.runs import FORMAT, RunDirectory
from ssl2rl_ray.schema import to_dict

GROUPS: dict[str, tuple[str, ...]] = {
    "the paper's methods": (
        "supervised", "fixmatch", "iterative-fixmatch", "ssl2rl-120", "ssl2rl-480", "full-labels",
    ),
    "controls": ("labelled-only", "ranking", "planner", "true-labels"),
    "ours": ("smooth", "posterior", "q-values", "ssl2rl-posterior"),
    "ablations": ("labelled-rl", "no-movement-cost"),
}  # fmt: skip
"""The order of rows."""
CONTROLS = GROUPS["controls"]
_TITLES = {
    "supervised": "SL (supervised)",
    "fixmatch": "FixMatch",
    "iterative-fixmatch": "iterative FixMatch",
    "ssl2rl-120": "SSL²-RL 120",
    "ssl2rl-480": "SSL²-RL 480",
    "ssl2rl-posterior": "SSL²-RL, policy sees the posterior",
    "full-labels": "full labels",
    "labelled-only": "labelled only, same steps",
    "ranking": "own ranking, equal N_C",
    "planner": "planner in place of RL",
    "true-labels": "true labels (bound)",
    "labelled-rl": "RL on labelled holes only",
    "no-movement-cost": "no movement cost",
}
_OF_SPLITS = ("loop.selection_share",)
"""What makes a data set, beside ``data``."""
# What may differ between the data sets of one cell; `compute` says where a run ran, not what.
_FREE = ("seed", "data.labelled_fraction", "loop.methods", "loop.selection")


class ReportError(ValueError):
    """There is nothing to report, or not this way; the message says what to do next."""


def title(method: str) -> str:
    """A method as tables and legends call it; unknown names stay as they are."""
    return _TITLES.get(method, method)


def group(method: str) -> str:
    """The heading of ``GROUPS`` that a method stands under."""
    return next((name for name, methods in GROUPS.items() if method in methods), "others")


def in_order(methods: Iterable[str]) -> list[str]:
    """Each once, as ``GROUPS`` has them, strangers last."""
    known = [method for methods in GROUPS.values() for method in methods]
    return sorted(
        set(methods), key=lambda m: (known.index(m) if m in known else len(known), m)
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Played:
    """One method on one data set, finished."""

    run: str
    method: str
    navigator: str
    """``algorithm.name`` of the run, or the planner of ``loop.navigator``."""
    seed: int
    labelled_fraction: float
    rounds: tuple[Mapping[str, Any], ...]
    """round.json each, by number."""
    kept: Mapping[str, int]
    """Number of the round kept by ``reward``, ``accuracy``, ``auc``, on the selection squares."""
    stopped: str | None

    def at(self, kept_by: str, *path: str) -> float | None:
        """A number of the kept round, or of the ``last``; None where it is not defined."""
        number = self.rounds[-1].get("round") if kept_by == "last" else self.kept.get(kept_by)
        row = next((row for row in self.rounds if row.get("round") == number), None)
        return number_at(row, *path)


def number_at(value: Any, *path: str) -> float | None:
    """A finite number within nested dicts; None where it is missing, null or NaN."""
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return finite(value)


def finite(value: Any) -> float | None:
    """The number, or None of what is none: null, NaN, text, true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def find_runs(
    paths: Sequence[str | os.PathLike[str]],
    kinds: Sequence[str] = ("ssl2rl",),
    purpose: str = "a report is made from runs of kind ssl2rl",
) -> list[Path]:
    """Folders of runs of these kinds: those named, and those one or two levels below, each once.

    Raises:
        ReportError: a folder holds none, or is a run of another kind; it is named, with the
            ``purpose``.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        folder = path.resolve()
        if not folder.is_dir():
            raise ReportError(f"{path} is not a folder: give run directories, or folders of them")
        if (kind := _kind(folder)) is not None and kind not in kinds:
            raise ReportError(f"{path} is a run of kind {kind}: {purpose}")
        below = [folder] if kind else list(_below(folder, 2, kinds))
        if not below:
            raise ReportError(
                f"no run of kind {' or '.join(kinds)} in {path} (searched two levels deep): "
                "give what `ssl2rl run` or `ssl2rl sweep` wrote"
            )
        found |= dict.fromkeys(below)
    return list(found)


def _kind(folder: Path) -> str | None:
    """The kind of the run in a folder; None = no run."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return str(manifest.get("kind"))


def _below(folder: Path, depth: int, kinds: Sequence[str]) -> Iterator[Path]:
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (kind := _kind(child)) in kinds:
            yield child
        elif kind is None and depth > 1:  # within a run of another kind there is none
            yield from _below(child, depth - 1, kinds)


def read_runs(folders: Sequence[Path]) -> tuple[list[Played], list[dict[str, Any]], list[str]]:
    """What was played to its end, one entry a run, and notes on what is left out."""
    played: list[Played] = []
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    first: dict[tuple[str, float], tuple[Path, dict[str, Any]]] = {}
    owner: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        try:
            run = RunDirectory.open(folder)
            config, summary, status = run.config, run.summary or {}, run.status
        except ValueError as error:  # RunError, ConfigError: each names the file
            notes.append(f"{folder.name}: left out: {error}")
            continue
        assert isinstance(config, SSL2RLRunConfig)
        planner = config.loop.navigator
        navigator = config.algorithm.name if planner == "algorithm" else planner
        fraction = float(config.data.labelled_fraction)
        settings = _settings(config)
        other, expected = first.setdefault((navigator, fraction), (folder, settings))
        if different := [name for name in expected if settings.get(name) != expected[name]]:
            name = different[0]
            raise ReportError(
                f"{other} and {folder} ({navigator}, {percent(fraction)}) differ in "
                f"{', '.join(different[:5])} ({name}: {expected[name]} / {settings.get(name)}): "
                "data sets of one cell differ in their seed only; report them apart"
            )
        finished = []
        for name, result in _methods(folder, summary):
            rounds, why = _finished_rounds(name, result, status, config.loop.num_rounds)
            if why:
                notes.append(
                    f"{folder.name} ({status}): {name} left out, {why} of {config.loop.num_rounds}"
                    " rounds and no result"
                    if name in METHODS and METHODS[name].rule
                    else f"{folder.name} ({status}): {name} left out, it has no result"
                )
                continue
            key = (navigator, name, config.seed, fraction)
            if key in owner:
                raise ReportError(
                    f"{owner[key]} and {folder} hold the same data set: {name}, {navigator}, "
                    f"seed {config.seed}, {percent(fraction)}; it counts once, so leave one out"
                )
            owner[key] = folder
            finished.append(name)
            played.append(
                Played(
                    run=folder.name,
                    method=name,
                    navigator=navigator,
                    seed=config.seed,
                    labelled_fraction=fraction,
                    rounds=rounds,
                    kept=result.get("kept") or {},
                    stopped=result.get("stopped"),
                )
            )
        missing = [name for name in config.loop.methods if name not in finished]
        begun = {name for name, _ in _methods(folder, summary)}
        if not_begun := [name for name in missing if name not in begun]:
            notes.append(f"{folder.name} ({status}): without {', '.join(not_begun)}")
        sample = summary.get("sample") or read_json(folder / "sample.json")
        runs.append(
            {
                "run": folder.name,
                "path": str(folder),
                "seed": config.seed,
                "labelled_fraction": fraction,
                "navigator": navigator,
                "status": status,
                "methods": finished,
                "num_rounds": config.loop.num_rounds,
                "sample": sample,
            }
        )
    notes += _beside(first)
    by_navigator: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for (navigator, fraction), (_, settings) in sorted(first.items()):
        by_navigator.setdefault(navigator, []).append((fraction, settings))
    for navigator, entries in by_navigator.items():
        names = sorted({n for _, s in entries for n in s if s[n] != entries[0][1].get(n)})
        if names:
            notes.append(
                f"{navigator}: labelled fractions were run with different {', '.join(names)}; "
                "their columns do not differ in the labels alone"
            )
    return played, runs, notes


_First = Mapping[tuple[str, float], tuple[Path, dict[str, Any]]]
"""The first run of each navigator and labelled fraction, and its settings."""


def _beside(first: _First) -> Iterator[str]:
    """Notes on runs of several navigators, whose data sets are paired in table 4.

    Raises:
        ReportError: they are not of the same data sets.
    """
    one_of: dict[float, str] = {}  # by fraction: the navigator that the others are compared with
    others: dict[tuple[str, str], set[str]] = {}
    for (navigator, fraction), (folder, settings) in first.items():
        name = one_of.setdefault(fraction, navigator)
        other, expected = first[name, fraction]
        different = {
            key
            for key in expected.keys() | settings.keys()
            if expected.get(key) != settings.get(key)
            and key != "loop.navigator"
            and not key.startswith("algorithm.")
        }
        if of_data := sorted(k for k in different if k.startswith("data.") or k in _OF_SPLITS):
            key = of_data[0]
            raise ReportError(
                f"{other} ({name}) and {folder} ({navigator}) differ in {', '.join(of_data)} "
                f"({key}: {expected.get(key)} / {settings.get(key)}): table 4 pairs algorithms on "
                "the same data sets; report them apart"
            )
        others.setdefault((name, navigator), set()).update(different)
    for (name, navigator), names in others.items():
        if names:
            yield (
                f"{name} and {navigator} were run with different {', '.join(sorted(names))}: "
                "their rows of Table 4 do not differ in the algorithm alone"
            )


def _settings(config: SSL2RLRunConfig) -> dict[str, Any]:
    """All values by dotted name, but those that data sets of one cell may differ in."""

    def flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    return {
        name: value
        for name, value in flat(to_dict(config), "")
        if name not in _FREE and not name.startswith("compute.")
    }


def _methods(folder: Path, summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """By name: what the summary has; else, of a run under way, the rounds that are done."""
    found: dict[str, Mapping[str, Any]] = {
        name: result
        for name, result in (summary.get("methods") or {}).items()
        if isinstance(result, Mapping)
    }
    for path in sorted(folder.glob("methods/*/round-*/round.json")):
        name = path.parts[-3]
        if name not in (summary.get("methods") or {}):
            begun = found.setdefault(name, {"rounds": []})
            begun["rounds"].append(read_json(path))
    return list(found.items())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _finished_rounds(
    name: str, result: Mapping[str, Any], status: str, num_rounds: int
) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """The rounds of a method in order, and how many where it has not come to its end."""
    rounds = sorted(
        (row for row in result.get("rounds") or () if number_at(row, "round") is not None),
        key=lambda row: row["round"],
    )
    is_single = name in METHODS and METHODS[name].rule is None
    is_whole = len(rounds) >= (1 if is_single else num_rounds + 1)
    is_finished = bool(result.get("kept")) and bool(
        rounds and (is_whole or result.get("stopped") or status == "finished")
    )
    return tuple(rounds), None if is_finished else str(max(len(rounds) - 1, 0))


def percent(fraction: float) -> str:
    """0.05 as ``5 %``."""
    return f"{100 * fraction:g} %"
