"""The dataset folder: one session on disk, verified whenever it is read.

holes.parquet      a row per hole: every column of the table, and the time of acquisition
calibration.json   optional: fitted on this session's labels, for use on other sessions
rejected.csv       the rows that the import kept out, each with file, line and reason
manifest.json      format, content hash, counts, provenance; size and SHA-256 of the above
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from envs.cryoem.types import HoleTable
from ssl2rl_ray.config import own_version
from ssl2rl_ray.data.text import DataError, RejectedRow

FORMAT = "ssl2rl-dataset"
FORMAT_VERSION = 1
"""Raised when an older reader could misread the folder."""

_TABLE, _CALIBRATION, _REJECTED = "holes.parquet", "calibration.json", "rejected.csv"
_MANIFEST = "manifest.json"
_OURS = {_TABLE, _CALIBRATION, _REJECTED, _MANIFEST}
_LEVELS = ("grid", "square", "patch")
_VALUES = ("x", "y", "ctf_max_resolution_A", "predicted_ctf_A", "p_low_ctf")
_TYPES = (
    {"hole_name": pa.string()}
    | {f"{level}_id": pa.int32() for level in _LEVELS}
    | {f"{level}_name": pa.string() for level in _LEVELS}
    | {name: pa.float64() for name in _VALUES}
    | {"is_labelled": pa.bool_(), "acquired": pa.timestamp("us")}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A dataset folder in memory."""

    path: Path
    table: HoleTable
    manifest: dict[str, Any]
    calibration: dict[str, Any] | None
    """As ``envs.cryoem.calibration.Calibration.to_json`` wrote it; fitted on this session."""
    acquired: NDArray[np.datetime64] | None
    """(N,) datetime64[us], NaT = unknown."""


def write_dataset(
    table: HoleTable,
    path: str | os.PathLike[str],
    *,
    provenance: dict[str, Any],
    calibration: dict[str, Any] | None = None,
    rejected: Iterable[RejectedRow] = (),
    acquired: NDArray[np.datetime64] | None = None,
    force: bool = False,
) -> Dataset:
    """Writes a session as a folder, whole or not at all.

    Args:
        table: the session.
        path: the folder; its parents are made.
        provenance: where the session comes from (JSON values), kept in the manifest.
        calibration: fitted on this session's labels.
        rejected: the rows that the import kept out.
        acquired: (N,) time of acquisition, NaT = unknown.
        force: replace an earlier dataset folder; one with anything else in it is never touched.

    Raises:
        DataError: something else is there, or it cannot be written.
    """
    target = Path(path).resolve()
    rejected = tuple(rejected)
    _check_target(target, force)
    files = {_TABLE: _table_bytes(table, acquired), _REJECTED: _rejected_bytes(rejected)}
    if calibration is not None:
        files[_CALIBRATION] = _json_bytes(calibration)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created_by": f"ssl2rl-ray {own_version()}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "content_hash": table.content_hash,
        "counts": {
            "holes": len(table),
            "grids": len(table.grid_name),
            "squares": len(table.square_name),
            "patches": len(table.patch_name),
            "labelled": int(table.is_labelled.sum()),
            "predicted": int(np.isfinite(table.predicted_ctf_A).sum()),
        },
        "rejected": {"rows": len(rejected), "by_file": dict(Counter(row.file for row in rejected))},
        "provenance": provenance,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    files[_MANIFEST] = _json_bytes(manifest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_folder(target, files)
    except OSError as error:
        raise DataError(f"cannot write the dataset folder {path}: {error}") from error
    return read_dataset(target)


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Reads a folder of ``write_dataset`` and verifies every byte of it.

    Raises:
        DataError: missing, not a dataset folder, made by a newer version, damaged or edited.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    version = manifest.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise DataError(f"{folder / _MANIFEST}: no format_version: {_AGAIN}")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{folder} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "update ssl2rl-ray, or import the session again with this version"
        )
    try:
        files = dict(manifest["files"])
        data = {name: _read_verified(folder, name, dict(files[name])) for name in files}
        table, acquired = _table_of(data[_TABLE])
        calibration = json.loads(data[_CALIBRATION]) if _CALIBRATION in data else None
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder} is damaged ({type(error).__name__}: {error}): {_AGAIN}"
        ) from error
    if table.content_hash != manifest.get("content_hash"):
        raise DataError(
            f"{folder}: the holes have content hash {table.content_hash}, the manifest says "
            f"{manifest.get('content_hash')}: {_AGAIN}"
        )
    return Dataset(
        path=folder, table=table, manifest=manifest, calibration=calibration, acquired=acquired
    )


_AGAIN = "import the session again (`ssl2rl import ... --force`), or copy the folder again"


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        data = (folder / _MANIFEST).read_bytes()
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise DataError(
                f"{folder} is not a dataset folder: it has no readable {_MANIFEST}; "
                "make one with `ssl2rl import cryorl` or `ssl2rl import synthetic`"
            ) from error
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(
            f"dataset folder {folder} {what}: give the --out folder of `ssl2rl import`"
        ) from error
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder / _MANIFEST} is damaged ({error}): {_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{folder} is not a dataset folder: its {_MANIFEST} is of something else")
    return manifest


def _read_verified(folder: Path, name: str, expected: dict[str, Any]) -> bytes:
    if name not in _OURS:
        raise DataError(f"{folder / _MANIFEST} lists the unknown file {name!r}: {_AGAIN}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise DataError(f"{folder / name} is missing or unreadable: {_AGAIN}") from error
    if len(data) != expected["bytes"]:
        raise DataError(
            f"{folder / name} has {len(data)} bytes, its manifest says {expected['bytes']}: "
            + _AGAIN
        )
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise DataError(f"{folder / name} was changed after the import: {_AGAIN}")
    return data


def _table_bytes(table: HoleTable, acquired: NDArray[np.datetime64] | None) -> bytes:
    columns: dict[str, Any] = {"hole_name": table.hole_name}
    for level in _LEVELS:
        codes = columns[f"{level}_id"] = getattr(table, f"{level}_id")
        columns[f"{level}_name"] = getattr(table, f"{level}_name")[codes]
    columns |= {name: getattr(table, name) for name in (*_VALUES, "is_labelled")}
    if acquired is not None:
        columns["acquired"] = np.asarray(acquired, "datetime64[us]")
    arrays = {  # text through lists: Arrow does not take numpy's fixed-width strings
        name: pa.array(values.tolist() if values.dtype.kind == "U" else values, _TYPES[name])
        for name, values in columns.items()
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(arrays), stream)
    return stream.getvalue()


def _table_of(data: bytes) -> tuple[HoleTable, NDArray[np.datetime64] | None]:
    arrow = pq.read_table(pa.BufferReader(data))
    columns: dict[str, Any] = {field.name: arrow[field.name].to_numpy() for field in arrow.schema}
    acquired = columns.pop("acquired", None)
    for level in _LEVELS:  # a name per hole becomes a name per code
        codes, names = columns[f"{level}_id"], columns[f"{level}_name"].astype(np.str_)
        _, first = np.unique(codes, return_index=True)
        columns[f"{level}_name"] = names[first]
    columns["hole_name"] = columns["hole_name"].astype(np.str_)
    return HoleTable(**columns), acquired


def _rejected_bytes(rejected: tuple[RejectedRow, ...]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["file", "line", "reason", "text"])
    writer.writerows((row.file, row.line, row.reason, row.text) for row in rejected)
    return stream.getvalue().encode("utf-8", "backslashreplace")


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def _check_target(target: Path, force: bool) -> None:
    """Raises DataError unless the path is free, empty, or ours and to be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"{target} is a file: choose another --out")
    found = {entry.name for entry in target.iterdir()}
    if not found:
        return
    try:
        _read_manifest(target)
    except DataError:
        raise DataError(
            f"{target} holds other files and is left alone: choose another --out"
        ) from None
    if foreign := sorted(found - _OURS):
        raise DataError(
            f"{target} is a dataset folder with other files in it ({foreign[0]!r}): "
            "move them away or choose another --out"
        )
    if not force:
        raise DataError(f"{target} is a dataset already: add --force to replace it")


def _write_folder(target: Path, files: dict[str, bytes]) -> None:
    """All files in a temporary sibling, then one rename; an earlier folder goes last."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}-", dir=target.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        for name, data in files.items():
            with (new / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        if target.exists():
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
        else:
            new.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
