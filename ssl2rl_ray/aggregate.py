"""After a sweep: one TensorBoard run for each group, the mean over its seeds with a band.

Groups are those of ``ssl2rl compare`` (runs that differ in nothing but their seed), within each
kind; of a run of the loop every method is one. What is averaged is what the runs wrote for
TensorBoard, so that a mean lies in the same chart as its runs, on either horizontal axis. Shape
letters: R runs, G points of a grid.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.cryoem.types import FloatArray
from ssl2rl_ray.report.compare import curve_grid, labels, learned_settings
from ssl2rl_ray.runs import RunDirectory, RunError
from ssl2rl_ray.stats import curve_over_runs, last_observed
from ssl2rl_ray.tensorboard import Curve, TensorBoard, read_curves

_NAMED_BY = {"perception": "training.method", "ssl2rl": "method"}
"""Setting that names a group; elsewhere the algorithm."""
_JUDGED = ("validation", "selection", "test", "selection_posterior", "test_posterior")
"""First parts of the tags that get a band: what is judged, not what training says of itself."""
_SEED = 20210831
"""Of the resamples, that of ``ssl2rl compare``: the same runs give the same numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Member:
    """One run, or one method of a run of the loop."""

    name: str
    kind: str
    seed: int
    settings: Mapping[str, Any]
    """By dotted name, those that make a group."""
    curves: Mapping[str, Curve]

    @property
    def begun(self) -> float:
        """Its first point's time."""
        return min(float(curve.time_s[0]) for curve in self.curves.values())


def write_aggregate(folder: Path) -> list[Path]:
    """Writes ``FOLDER/tensorboard/GROUP/`` for every group of finished runs; replaces older ones.

    Each has the mean of every curve under the runs' own tag, from where all of its runs have begun
    to where the first of them ends; a pointwise 95 % bootstrap band over runs of what is judged, as
    ``validation_band/episode_return/lower`` and ``upper``, with charts in the tab "custom scalars";
    and the text ``group``: which runs they are.

    Args:
        folder: of a sweep; its runs are the folders in it. Those that are not finished are left
            out, and so are those without events.

    Returns:
        The folders written, none where no two finished runs differ in their seed only.

    Raises:
        ValueError: the folder is itself a run, or there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give what `ssl2rl sweep` wrote")
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} is a run: a mean is over many, give the folder of a sweep")
    groups = _grouped([m for path in sorted(folder.glob("*/manifest.json")) for m in _read(path)])
    if all(len(members) < 2 for members in groups.values()):
        return []
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        for name, members in groups.items():
            with TensorBoard(new / name) as board:
                _write(members, board)
        new.chmod(0o755)  # mkdtemp's are private
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        new.rename(folder / "tensorboard")
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return [folder / "tensorboard" / name for name in groups]


def _read(manifest: Path) -> list[_Member]:
    """What a finished run has to give; nothing of any other."""
    try:
        run = RunDirectory.open(manifest.parent)
        if run.status != "finished":
            return []
        config, settings = run.config, learned_settings(run)
    except (RunError, ValueError):
        return []
    events = run.path / "tensorboard"
    if config.kind != "ssl2rl":
        found = {"": (events, settings)}
    else:
        settings = {n: v for n, v in settings.items() if n not in ("loop.methods",)}
        found = {
            method: (events / method, {"method": method, **settings})
            for method in config.loop.methods
        }
    return [
        _Member(
            name=f"{run.path.name}/{name}".rstrip("/"),
            kind=config.kind,
            seed=config.seed,
            settings=own,
            curves=curves,
        )
        for name, (path, own) in found.items()
        if (curves := read_curves(path))
    ]


def _grouped(members: Sequence[_Member]) -> dict[str, list[_Member]]:
    """Groups by the names of their folders."""
    groups: dict[tuple[str, str], list[_Member]] = {}
    for member in members:
        key = member.kind, json.dumps(member.settings, sort_keys=True)
        groups.setdefault(key, []).append(member)
    kinds = list(dict.fromkeys(kind for kind, _ in groups))
    named: dict[str, list[_Member]] = {}
    for kind in kinds:
        own = [members for (other, _), members in groups.items() if other == kind]
        settings = [each[0].settings for each in own]
        for label, each in zip(
            labels(settings, _NAMED_BY.get(kind, "algorithm.name")), own, strict=True
        ):
            name = re.sub(r"[^A-Za-z0-9._+=-]+", "_", f"{kind}-{label}" if kinds[1:] else label)
            while name in named:
                name += "+"
            named[name] = sorted(each, key=lambda member: member.seed)
    return named


def _write(members: Sequence[_Member], board: TensorBoard) -> None:
    """Means, bands and the text of one group."""
    seeds = ", ".join(str(member.seed) for member in members)
    rows = [f"- {member.name} (seed {member.seed})" for member in members]
    settings = "\n".join(f"{name}: {json.dumps(v)}" for name, v in members[0].settings.items())
    head = f"Mean of {len(members)} runs, seeds {seeds}; bands: pointwise 95 % bootstrap over runs."
    board.text("group", "\n".join([head, "", *rows, "", f"```yaml\n{settings}\n```"]), 0)
    bands: dict[str, tuple[str, str, str]] = {}
    for tag in dict.fromkeys(tag for member in members for tag in member.curves):
        curves = [member.curves[tag] for member in members if tag in member.curves]
        if len(curves) < len(members):  # a mean of some runs under the name of all misleads
            continue
        at = np.unique(np.round(curve_grid([curve.step for curve in curves])))
        if not len(at):
            continue
        first, *rest = tag.split("/")
        is_banded = first in _JUDGED and len(members) > 1 and rest != ["wall_s"]
        rows = _statistics(tag, curves, at, is_banded)
        elapsed_s = [
            last_observed(curve.step, curve.time_s - member.begun, at)
            for curve, member in zip(curves, members, strict=True)
        ]
        time_s = min(member.begun for member in members) + np.mean(elapsed_s, axis=0)
        for i, step in enumerate(at):
            values = {name: float(column[i]) for name, column in rows.items()}
            board.log(values, int(step), time_s=float(time_s[i]))
        if is_banded:
            low, high = (name for name in rows if name != tag)
            bands[tag] = tag, low, high
    board.bands(bands)


def _statistics(
    tag: str, curves: Sequence[Curve], at: FloatArray, is_banded: bool
) -> dict[str, FloatArray]:
    """(G,) of each tag that comes of a tag."""
    pairs = [(curve.step, curve.value) for curve in curves]
    if not is_banded:
        return {tag: np.mean([last_observed(x, y, at) for x, y in pairs], axis=0)}
    rng = np.random.default_rng(_SEED)
    mean, low, high = curve_over_runs(pairs, at, rng, np.mean)
    first, rest = tag.split("/", 1)
    return {tag: mean, f"{first}_band/{rest}/lower": low, f"{first}_band/{rest}/upper": high}
