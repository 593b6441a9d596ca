"""Whatever turns frames and parameters into an indexing result: one protocol, many backends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from envs.crystfel.types import Frame, IndexingResult, Parameters


class Indexer(Protocol):
    """An experiment (geometry file, reference cell) with a program that indexes its frames.

    Pure in what it returns: the same parameters and frames give the same result, up to CPU seconds
    (real CrystFEL: up to a frame).
    """

    @property
    def version(self) -> str:
        """Of the backend and of the experiment's geometry and cell; a key of the memo."""
        ...

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """Indexes the frames.

        Returns:
            arrays in the order of ``frames``.

        Raises:
            IndexerError: what went wrong, with which file, and what to do.
        """
        ...


class IndexerError(RuntimeError):
    """An indexer could not do what it was asked; the message says what to do next."""


def innermost(indexer: Any) -> Any:
    """The backend below what remembers or spreads: it knows ``frames`` and ``nominal``."""
    while hasattr(indexer, "indexer"):
        indexer = indexer.indexer
    return indexer


class Memo:
    """An indexer that remembers: parameters, frames and version -> result, on disk.

    Any number of processes may share the folder: a result is a file that is put in place whole.
    Two that ask the same at once both work it out, and one result stays. What is damaged is worked
    out again. A result is that of the frames as they were: a file that has changed since (size or
    time) is another frame. CPU seconds are those of the first time.
    """

    def __init__(self, indexer: Indexer, folder: str | os.PathLike[str]) -> None:
        """The folder is made when there is something to remember."""
        self.indexer = indexer
        self.folder = Path(folder)

    @property
    def version(self) -> str:
        """Of the indexer."""
        return self.indexer.version

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """What the indexer said before, or says now. Raises IndexerError."""
        path = self.folder / f"{self._key(parameters, frames)}.npz"
        result = _read(path)
        if result is None or result.num_frames != len(frames):
            result = self.indexer.run(parameters, frames)
            _write(path, result)
        return result

    def _key(self, parameters: Parameters, frames: Sequence[Frame]) -> str:
        stamps = {path: stamp(path) for path in {frame.path for frame in frames}}
        asked = [
            self.version,
            sorted(parameters.as_dict().items()),
            [(frame.path, frame.event, stamps[frame.path]) for frame in frames],
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, by which a changed one is told; (-1, -1) = there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def write_whole(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes an ``.npz`` that is there whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".new-{uuid.uuid4().hex}"  # as readable as the user's other files
    try:
        with open(scratch, "xb") as file:
            np.savez(file, **arrays)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read_whole(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of ``write_whole``; None where the file is missing or damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, TypeError, MemoryError, zipfile.BadZipFile):
        return None
    except RuntimeError:  # by its flags encrypted, or packed in a way that nobody does
        return None


def _write(path: Path, result: IndexingResult) -> None:
    arrays = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    arrays["argv"] = np.array(result.argv, dtype=str)
    write_whole(path, arrays)


def _read(path: Path) -> IndexingResult | None:
    arrays = read_whole(path)
    try:
        values: dict[str, Any] = dict(arrays or {})
        for name, kind in (("num_crystals", int), ("version", str)):
            values[name] = kind(values[name])
        for name in ("cell_ratio", "residual_px", "cpu_s"):
            values[name] = float(values[name])
        values["argv"] = tuple(map(str, values["argv"]))
        return IndexingResult(**values)
    except (KeyError, TypeError, ValueError):  # of another version of this class, or damaged
        return None
