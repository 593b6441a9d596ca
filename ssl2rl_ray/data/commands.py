"""What ``ssl2rl import`` does: files or a preset in, a dataset folder out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from envs.cryoem.calibration import Calibration, fit_calibration
from envs.cryoem.images import IMAGE_PRESETS, draw_images
from envs.cryoem.synthetic import draw_session, synthetic_calibration
from envs.cryoem.types import HoleTable, NavigationConfig
from ssl2rl_ray.data.cryorl import PathLike, parse_cryorl
from ssl2rl_ray.data.folder import Dataset, check_target, read_dataset, write_dataset
from ssl2rl_ray.data.images import HoleImages, OnStep, read_image_folder
from ssl2rl_ray.data.text import DataError

WITHOUT_PREDICTIONS = ("y3", "y3-mini")
"""Synthetic presets whose holes are to be predicted from their images by a classifier of ours."""


def import_cryorl_command(
    labels: PathLike | None,
    predictions: PathLike | None,
    hierarchy: PathLike | None,
    timestamps: PathLike | None,
    out: PathLike,
    calibration_dir: PathLike | None = None,
    *,
    images: PathLike | None = None,
    image_size_px: int | None = None,
    config: NavigationConfig | None = None,
    force: bool = False,
    on_step: OnStep | None = None,
) -> Dataset:
    """Imports CryoRL's files, and images of the holes, into a dataset folder.

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
        images: folder of hole images, see ``ssl2rl_ray.data.images``.
        image_size_px: side of the images as they are kept; None = see ``read_image_folder``.
        config: what counts as low-CTF in the fit; None = preset ``cryorl`` (6 Å or better).
        force: replace an earlier dataset folder.
        on_step: told what is under way and its share done.

    Raises:
        DataError: see ``parse_cryorl``, ``read_image_folder``, ``write_dataset`` and
            ``read_calibration``.
    """
    if image_size_px is not None and images is None:
        raise DataError("an image size needs images: give --images")
    target = check_target(out, force)  # before the images are read, which may take minutes
    session = parse_cryorl(labels, predictions, hierarchy=hierarchy, timestamps=timestamps)
    config = NavigationConfig.preset("cryorl") if config is None else config
    notes = list(session.notes)
    calibration = _fit(session.table, config, notes)
    table, applied = _calibrated(session.table, calibration_dir, notes)

    def write(read: HoleImages | None) -> Dataset:
        provenance = {
            "importer": "cryorl",
            "sources": list(session.sources),
            "notes": notes if read is None else [*notes, *read.notes],
            "calibration_applied": applied,
        }
        return write_dataset(
            table,
            out,
            provenance=provenance if read is None else provenance | {"images": read.provenance},
            calibration=None if calibration is None else calibration.to_json(),
            rejected=session.rejected if read is None else session.rejected + read.rejected,
            acquired=session.acquired,
            images=None if read is None else read.images,
            has_image=None if read is None else read.has_image,
            force=force,
        )

    if images is None:
        return write(None)
    # Beside the folder to come: it has the room, while the system's own place may be in memory.
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".images-", dir=target.parent) as scratch:
            return write(
                read_image_folder(
                    images,
                    table.hole_name,
                    Path(scratch) / "images.npy",
                    image_size_px=image_size_px,
                    on_step=on_step,
                )
            )
    except OSError as error:
        raise DataError(f"cannot write beside {os.fspath(out)}: {error}") from error


def import_synthetic_command(
    preset: str, seed: int, out: PathLike, *, force: bool = False
) -> Dataset:
    """Draws one synthetic session into a dataset folder; the same seed gives the same session.

    Its images, of the presets that have some, are drawn beside it, so that they do not change the
    session. The calibration stored with it is the model of the preset, and ``p_low_ctf`` is by that
    model; those of ``WITHOUT_PREDICTIONS`` have no predictions, no calibration, and 0.5.

    Raises:
        ValueError: there is no such preset.
        DataError: see ``write_dataset``.
    """
    if seed < 0:
        raise DataError(f"seed: must be 0 or more, found {seed}")
    table, notes = draw_session(np.random.default_rng(seed), preset), list[str]()
    has_predictions = preset not in WITHOUT_PREDICTIONS
    if not has_predictions:
        table = table.replace(
            predicted_ctf_A=np.full(len(table), np.nan), p_low_ctf=np.full(len(table), 0.5)
        )
        notes.append("no predictions, p_low_ctf is 0.5: a classifier of the images is to make them")
    images = None
    if preset in IMAGE_PRESETS:
        images = draw_images(np.random.default_rng([seed, 1]), table, preset)
    return write_dataset(
        table,
        out,
        provenance={
            "importer": "synthetic",
            "preset": preset,
            "seed": seed,
            "notes": notes,
            "calibration_applied": {"preset": preset} if has_predictions else None,
        },
        calibration=synthetic_calibration(preset).to_json() if has_predictions else None,
        images=images,
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
