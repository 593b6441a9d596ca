"""What ``ssl2rl sweep --dry-run`` says: everything that would run, and nothing started."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.sweep.file import Sweep
from ssl2rl_ray.sweep.folder import DONE, check_folder, trial_status
from ssl2rl_ray.sweep.room import find_room, in_words, need_of, num_concurrent

_MAX_MEASURED = 20
"""Finished trials that are looked at for an estimate."""


def plan(sweep: Sweep, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """What ``run_sweep`` would do: of each trial its needs and how far it is, and an ``estimate``.

    Raises ValueError where a trial does not fit, the disk will not hold what the trials leave, or
    the folder is not for this sweep.
    """
    check_folder(sweep, out.resolve(), resume or (out / "sweep.yaml").exists())
    room = find_room()
    num_at_once = num_concurrent(sweep, room)
    found = {name: trial_status(out / name) for name in sweep.trials}
    estimated = estimate(sweep, out, found, num_at_once)
    check_disk(estimated, out)
    return {
        "num_trials": len(sweep.trials),
        "num_concurrent": num_at_once,
        "where": room.where,
        "num_cpus": room.num_cpus,
        "estimate": estimated,
        "trials": {
            name: {
                "kind": config.kind,
                "needs": in_words(need_of(config, sweep.tune)),
                "status": found[name],
            }
            for name, config in sweep.trials.items()
        },
    }


def estimate(sweep: Sweep, out: Path, found: dict[str, str], num_at_once: int) -> dict[str, Any]:
    """Time and disk of what is left, from trials that are done, else from ``tune.trial_min``.

    Returns:
        ``num_left``; ``minutes`` of wall clock and ``bytes`` on disk, None = nothing tells;
        ``num_measured``, the trials that they are estimated from, 0 = from ``tune.trial_min``;
        ``bytes_free`` where the folder is, or will be.
    """
    done = [name for name, status in found.items() if status == "finished"][-_MAX_MEASURED:]
    left = sum(status not in DONE for status in found.values())
    trial_min = _mean([_minutes(out / name) for name in done]) or sweep.tune.trial_min
    trial_bytes = _mean([_num_bytes(out / name) for name in done])
    return {
        "num_left": left,
        "num_measured": len(done),
        "minutes": None if trial_min is None else math.ceil(left / num_at_once) * trial_min,
        "bytes": None if trial_bytes is None else math.ceil(left * trial_bytes),
        "bytes_free": shutil.disk_usage(_existing(out)).free,
    }


def check_disk(estimated: dict[str, Any], out: Path) -> None:
    """Raises ValueError where an estimate says that the disk fills up."""
    needed, free = estimated["bytes"], estimated["bytes_free"]
    if needed is not None and needed > free:
        raise ValueError(
            f"{estimated['num_left']} trials leave about {in_bytes(needed)}, by the "
            f"{estimated['num_measured']} that are finished, and {_existing(out)} has "
            f"{in_bytes(free)} free: make room, or take another --out"
        )


def in_bytes(number: float) -> str:
    """``3.2 GB``."""
    power = min(4, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def in_minutes(minutes: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if minutes < 1.5:
        return f"{max(1, round(60 * minutes))} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _minutes(folder: Path) -> float:
    """Wall clock of a finished run, of all attempts that noted their end."""
    attempts = RunDirectory.open(folder).manifest["attempts"]
    times = [(a["started"], a["finished"]) for a in attempts if a["finished"]]
    spans = [datetime.fromisoformat(end) - datetime.fromisoformat(start) for start, end in times]
    return sum(span.total_seconds() for span in spans) / 60


def _num_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above that is there."""
    path = Path(os.path.abspath(path))
    return next(p for p in (path, *path.parents) if p.is_dir())
