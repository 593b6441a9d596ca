"""A folder with what an indexer needs: geometry, reference cell, list of frames."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from envs.crystfel.indexer import stamp
from envs.crystfel.sfx.formats import (
    FormatError,
    Geometry,
    PathLike,
    all_frames,
    digest,
    parse_cell,
    parse_geometry,
    read_frames,
    read_text,
)
from envs.crystfel.types import Frame, ParameterError, Parameters, UnitCell

GEOMETRY_FILE = "experiment.geom"
CELL_FILE = "reference.cell"
FRAMES_FILE = "frames.lst"
PARAMETERS_FILE = "parameters.json"
TRUTH_FILE = "truth.npz"
"""Of simulated folders; never read by an indexer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """What is known of an experiment before anything is indexed; the truth is nowhere in it."""

    folder: Path
    geometry_path: Path
    cell_path: Path
    frames_path: Path
    geometry_text: str
    """Of that file when it was read: what it becomes later is another experiment."""
    cell_text: str
    geometry: Geometry
    """The user's start: offsets of ``Parameters`` are relative to it."""
    cell: UnitCell
    frames: tuple[Frame, ...]
    """In the order of the list, with absolute paths; a file listed without an event stands for all
    its frames."""
    nominal: Parameters
    """Where tuning starts."""

    @cached_property
    def digest(self) -> str:
        """16 digits that change with geometry, cell and mask files; for ``Indexer.version``."""
        masks = [f"{mask.file} {stamp(mask.file)}" for mask in self.geometry.masks if mask.file]
        return digest(self.geometry_text, self.cell_text, *masks)


def read_experiment(
    folder: PathLike,
    *,
    geometry: PathLike | None = None,
    cell: PathLike | None = None,
    frames: PathLike | None = None,
) -> Experiment:
    """Reads a data folder: what ``ssl2rl sfx simulate`` writes, or a user's own.

    Where a file does not have its default name (``experiment.geom``, ``reference.cell``,
    ``frames.lst``), the only one of its kind in the folder is taken.

    Args:
        folder: the folder.
        geometry: the ``.geom`` to use instead.
        cell: the ``.cell`` or ``.pdb`` to use instead.
        frames: the ``.lst`` to use instead.

    Raises:
        FormatError: a file that is missing, several of which one is to be named, or a file that is
            not what it should be, with its line.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise FormatError(f"{folder}: there is no such folder")
    paths = [
        _chosen(folder, given, default, patterns, option)
        for given, default, patterns, option in (
            (geometry, GEOMETRY_FILE, ("*.geom",), "--geometry"),
            (cell, CELL_FILE, ("*.cell", "*.pdb"), "--cell"),
            (frames, FRAMES_FILE, ("*.lst",), "--list"),
        )
    ]
    listed = read_frames(paths[2])
    if not listed:
        raise FormatError(f"{paths[2]}: lists no frame")
    geometry_text, cell_text = read_text(paths[0]), read_text(paths[1])
    found = parse_geometry(geometry_text, str(paths[0]), *listed)
    return Experiment(
        folder=folder,
        geometry_path=paths[0],
        cell_path=paths[1],
        frames_path=paths[2],
        geometry_text=geometry_text,
        cell_text=cell_text,
        geometry=found,
        cell=parse_cell(cell_text, str(paths[1])),
        frames=all_frames(found, listed),
        nominal=_nominal(folder / PARAMETERS_FILE),
    )


def _chosen(
    folder: Path, given: PathLike | None, default: str, patterns: tuple[str, ...], option: str
) -> Path:
    if given is not None:
        return Path(os.path.abspath(given))
    if (folder / default).exists():
        return folder / default
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if len(found) == 1:
        return found[0]
    kinds = " or ".join(patterns)
    if not found:
        raise FormatError(f"{folder}: no {default} and no other {kinds}: name one by {option}")
    names = ", ".join(path.name for path in found[:8])
    raise FormatError(f"{folder}: several {kinds} ({names}): name one by {option}")


def _nominal(path: Path) -> Parameters:
    if not path.exists():
        return Parameters()
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("expected an object of parameter names and values")
        return Parameters().replace(**values)
    except (OSError, ValueError, RecursionError, ParameterError) as error:
        raise FormatError(f"{path}: {error}") from error
