"""The folder of a sweep: what was asked, a lock, and a run directory for each trial."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ssl2rl_ray.runs import RunDirectory, RunError, acquire_lock, differences, write_text
from ssl2rl_ray.schema import read_yaml
from ssl2rl_ray.sweep.file import Sweep, TuneConfig

DONE = ("finished", "stopped")
"""Statuses of trials that need nothing more; a scheduler stopped the second."""


def trial_status(folder: Path) -> str:
    """As ``RunDirectory.status``; ``missing`` where there is no run."""
    try:
        return RunDirectory.open(folder).status
    except RunError:
        return "missing"


def unfinished(sweep: Sweep, folder: Path) -> list[str]:
    """Names of the trials that are still to be run, or to be gone on with."""
    return [name for name in sweep.trials if trial_status(folder / name) not in DONE]


def check_folder(sweep: Sweep, folder: Path, resume: bool) -> None:
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
    if file_there := next((parent for parent in folder.parents if parent.is_file()), None):
        raise RunError(f"cannot make the folder {folder}: {file_there} is a file")
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
def held(sweep: Sweep, folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, with what was asked and its lock; or RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(folder)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error}") from error
    try:
        for leftover in folder.glob(".new-*"):  # of a killed driver
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
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


_OF_PLACES = ("num_gpus", "max_concurrent", "max_failures", "trial_min")
"""Of ``tune``, what may differ when a sweep is resumed; CPUs are threads, and may not."""


def _identity(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two sweeps the same: not how many run at once."""
    tune = {**dataclasses.asdict(TuneConfig()), **(asked.get("tune") or {})}
    named = {**asked, "tune": {k: v for k, v in tune.items() if k not in _OF_PLACES}}
    return json.loads(json.dumps(named, default=str))
