"""What ``ssl2rl import`` does: files or a preset in, a dataset folder out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from envs.cryoem.calibration import Calibration, fit_calibration
from envs.cryoem.synthetic import draw_session, synthetic_calibration
from envs.cryoem.types import HoleTable, NavigationConfig
from ssl2rl_ray.data.cryorl import PathLike, parse_cryorl
from ssl2rl_ray.data.folder import Dataset, read_dataset, write_dataset
from ssl2rl_ray.data.text import DataError


def import_cryorl_command(
    labels: PathLike | None,
    predictions: PathLike | None,
    hierarchy: PathLike | None,
    timestamps: PathLike | None,
    out: PathLike,
    calibration_dir: PathLike | None = None,
    *,
    config: NavigationConfig | None = None,
    force: bool = False,
) -> Dataset:
    """Imports CryoRL's files into a dataset folder.

    A calibration is fitted where the session has labels and predictions, and stored for use on
    *other* sessions: ``p_low_ctf`` of the folder is CryoRL's uncalibrated mapping, or by the
    calibration of another session where ``calibration_dir`` names its folder. Notes on the import
    and whose calibration was applied stand in the manifest under ``provenance``.

    Args:
        labels: see ``ssl2rl_ray.data.cryorl``, as ``predictions, hierarchy, timestamps``.
        predictions: name and predicted CTF (Å).
        hierarchy: every target of the session.
        timestamps: times of acquisition.
        out: the dataset folder to write.
        calibration_dir: dataset folder of a training session.
        config: what counts as low-CTF in the fit; None = preset ``cryorl`` (6 Å or better).
        force: replace an earlier dataset folder.

    Raises:
        DataError: see ``parse_cryorl``, ``write_dataset`` and ``read_calibration``.
    """
    session = parse_cryorl(labels, predictions, hierarchy=hierarchy, timestamps=timestamps)
    config = NavigationConfig.preset("cryorl") if config is None else config
    notes = list(session.notes)
    calibration = _fit(session.table, config, notes)
    table, applied = _calibrated(session.table, calibration_dir, notes)
    return write_dataset(
        table,
        out,
        provenance={
            "importer": "cryorl",
            "sources": list(session.sources),
            "notes": notes,
            "calibration_applied": applied,
        },
        calibration=None if calibration is None else calibration.to_json(),
        rejected=session.rejected,
        acquired=session.acquired,
        force=force,
    )


def import_synthetic_command(
    preset: str, seed: int, out: PathLike, *, force: bool = False
) -> Dataset:
    """Draws one synthetic session into a dataset folder; the same seed gives the same session.

    The calibration stored with it is the model of the preset; ``p_low_ctf`` is by that model.

    Raises:
        ValueError: there is no such preset.
        DataError: see ``write_dataset``.
    """
    if seed < 0:
        raise DataError(f"seed: must be 0 or more, found {seed}")
    return write_dataset(
        draw_session(np.random.default_rng(seed), preset),
        out,
        provenance={
            "importer": "synthetic",
            "preset": preset,
            "seed": seed,
            "notes": [],
            "calibration_applied": {"preset": preset},
        },
        calibration=synthetic_calibration(preset).to_json(),
        force=force,
    )


def read_calibration(path: PathLike) -> Calibration:
    """The calibration stored in a dataset folder.

    Raises:
        DataError: no valid dataset folder, or one without a calibration.
    """
    calibration = read_dataset(path).calibration
    if calibration is None:
        raise DataError(
            f"{os.fspath(path)} has no calibration, as it was imported without labels or without "
            "predictions: name the folder of a session that has both"
        )
    try:
        return Calibration.from_json(calibration)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{os.fspath(path)}: calibration.json is of another version ({error}): "
            "import that session again"
        ) from error


def _fit(table: HoleTable, config: NavigationConfig, notes: list[str]) -> Calibration | None:
    if not table.is_labelled.any() or not np.isfinite(table.predicted_ctf_A).any():
        return None
    try:
        return fit_calibration(table, config)
    except ValueError as error:  # labels of one kind only: a session to plan on, not to learn from
        notes.append(f"no calibration stored: {error}")
        return None


def _calibrated(
    table: HoleTable, calibration_dir: PathLike | None, notes: list[str]
) -> tuple[HoleTable, dict[str, Any] | None]:
    """The table with p by another session's calibration, and whose it was."""
    if calibration_dir is None:
        return table, None
    if not np.isfinite(table.predicted_ctf_A).any():
        raise DataError("a calibration needs predictions: give --predictions")
    calibration = read_calibration(calibration_dir)
    seen = read_dataset(calibration_dir).table
    shared = np.isin(table.hole_name, seen.hole_name[seen.is_labelled]).sum()
    if shared:  # right for a plan that goes on with a session, wrong for its evaluation
        notes.append(
            f"the calibration was fitted on {shared} holes of this same session: "
            "results on them are in-sample"
        )
    return calibration.apply(table), {
        "path": os.fspath(calibration_dir),
        "fitted_on": calibration.fitted_on,
        "num_shared_holes": int(shared),
    }
