"""The dataset folder: one session on disk, verified whenever it is read.

holes.parquet      a row per hole: every column of the table, and optionally the time of acquisition
                   and whether the hole has an image
images.npy         optional: uint8 (N, H, W), a hole image per row of the table (zeros: it has none)
calibration.json   optional: fitted on this session's labels, for use on other sessions
rejected.csv       the rows and images that the import kept out, each with file, line and reason
manifest.json      format, content hash, counts, provenance; size and SHA-256 of the above

Images are the only large file: they are written and verified in pieces, and verified only by who
looks at them (``Dataset.images``), so that a planner's reading of the table costs nothing more.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
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
FORMAT_VERSION = 2
"""Raised when an older reader could misread the folder, or would call it damaged: 2 has images. A
folder without them is written as version 1, which every release reads."""

_TABLE, _CALIBRATION, _REJECTED = "holes.parquet", "calibration.json", "rejected.csv"
_IMAGES, _MANIFEST = "images.npy", "manifest.json"
_OURS = {_TABLE, _CALIBRATION, _REJECTED, _IMAGES, _MANIFEST}
_CHUNK_BYTES = 4 * 2**20
_LEVELS = ("grid", "square", "patch")
_VALUES = ("x", "y", "ctf_max_resolution_A", "predicted_ctf_A", "p_low_ctf")
_TYPES = (
    {"hole_name": pa.string()}
    | {f"{level}_id": pa.int32() for level in _LEVELS}
    | {f"{level}_name": pa.string() for level in _LEVELS}
    | {name: pa.float64() for name in _VALUES}
    | {"is_labelled": pa.bool_(), "acquired": pa.timestamp("us"), "has_image": pa.bool_()}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A dataset folder: the table in memory, the images on disk."""

    path: Path
    table: HoleTable
    manifest: dict[str, Any]
    calibration: dict[str, Any] | None
    """As ``envs.cryoem.calibration.Calibration.to_json`` wrote it; fitted on this session."""
    acquired: NDArray[np.datetime64] | None
    """(N,) datetime64[us], NaT = unknown."""
    has_image: NDArray[np.bool_]
    """(N,) False: no image, or one that the import kept out (its row of ``images`` is zeros)."""

    @cached_property
    def images(self) -> NDArray[np.uint8] | None:
        """Read-only memory map (N, H, W), verified when first asked for; None without images.

        Raises:
            DataError: damaged, or changed after the import.
        """
        entry = self.manifest["files"].get(_IMAGES)
        return None if entry is None else _open_images(self.path, entry, len(self.table))


def write_dataset(
    table: HoleTable,
    path: str | os.PathLike[str],
    *,
    provenance: dict[str, Any],
    calibration: dict[str, Any] | None = None,
    rejected: Iterable[RejectedRow] = (),
    acquired: NDArray[np.datetime64] | None = None,
    images: NDArray[np.uint8] | None = None,
    has_image: NDArray[np.bool_] | None = None,
    force: bool = False,
) -> Dataset:
    """Writes a session as a folder, whole or not at all.

    Args:
        table: the session.
        path: the folder; its parents are made.
        provenance: where the session comes from (JSON values), kept in the manifest.
        calibration: fitted on this session's labels.
        rejected: the rows and images that the import kept out.
        acquired: (N,) time of acquisition, NaT = unknown.
        images: uint8 (N, H, W), an array or a memory map; written in pieces, never copied whole.
        has_image: (N,) which rows of ``images`` hold one; None = all.
        force: replace an earlier dataset folder; one with anything else in it is never touched.

    Raises:
        DataError: something else is there, or it cannot be written.
        ValueError: images or has_image do not fit the table.
    """
    target = check_target(path, force)
    rejected = tuple(rejected)
    has_image = _checked_has_image(len(table), images, has_image)
    contents: dict[str, Iterable[bytes | memoryview]] = {
        _TABLE: [_table_bytes(table, acquired, has_image)],
        _REJECTED: [_rejected_bytes(rejected)],
    }
    if calibration is not None:
        contents[_CALIBRATION] = [_json_bytes(calibration)]
    if images is not None:
        contents[_IMAGES] = _npy_pieces(images)
    manifest = {
        "format": FORMAT,
        "format_version": 1 if images is None else FORMAT_VERSION,
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
        }
        | ({} if has_image is None else {"images": int(has_image.sum())}),
        "rejected": {
            "rows": len(rejected),
            "by_file": dict(Counter(row.origin for row in rejected)),
        },
        "provenance": provenance,
    }
    if images is not None:
        manifest["image_size_px"] = images.shape[1]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as new:
            manifest["files"] = {
                name: _write_file(new / name, pieces) for name, pieces in contents.items()
            }
            _write_file(new / _MANIFEST, [_json_bytes(manifest)])
    except OSError as error:
        raise DataError(f"cannot write the dataset folder {path}: {error}") from error
    return read_dataset(target)


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Reads a folder of ``write_dataset`` and verifies every byte of it, of images the size.

    The bytes of the images are verified when they are first asked for (``Dataset.images``).

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
        if _IMAGES in files:
            _check_size(folder, _IMAGES, dict(files[_IMAGES]))
        data = {
            name: _read_verified(folder, name, dict(files[name]))
            for name in files
            if name != _IMAGES
        }
        table, acquired, has_image = _table_of(data[_TABLE])
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
        path=folder,
        table=table,
        manifest=manifest,
        calibration=calibration,
        acquired=acquired,
        has_image=has_image,
    )


def check_target(path: str | os.PathLike[str], force: bool) -> Path:
    """The absolute path of a folder that may be written: free, empty, or ours and to be replaced.

    Raises:
        DataError: something else is there.
    """
    target = Path(path).resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise DataError(f"{target} is a file: choose another --out")
    found = {entry.name for entry in target.iterdir()}
    if not found:
        return target
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
    return target


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


def _check_size(folder: Path, name: str, expected: dict[str, Any]) -> None:
    if name not in _OURS:
        raise DataError(f"{folder / _MANIFEST} lists the unknown file {name!r}: {_AGAIN}")
    try:
        found = (folder / name).stat()
    except OSError as error:
        raise DataError(f"{folder / name} is missing or unreadable: {_AGAIN}") from error
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end
        raise DataError(f"{folder / name} is not a file: {_AGAIN}")
    if found.st_size != expected["bytes"]:
        raise DataError(
            f"{folder / name} has {found.st_size} bytes, its manifest says {expected['bytes']}: "
            + _AGAIN
        )


def _read_verified(folder: Path, name: str, expected: dict[str, Any]) -> bytes:
    _check_size(folder, name, expected)
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise DataError(f"{folder / name} is missing or unreadable: {_AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise DataError(f"{folder / name} was changed after the import: {_AGAIN}")
    return data


def _open_images(folder: Path, expected: dict[str, Any], num_holes: int) -> NDArray[np.uint8]:
    """The memory map of verified images; nothing that the file says is believed before."""
    path = folder / _IMAGES
    _check_size(folder, _IMAGES, expected)
    try:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                raise DataError(f"{path} was changed after the import: {_AGAIN}")
            stream.seek(0)
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not version 1.0 of the format")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            offset = stream.tell()
            if dtype != np.uint8 or is_fortran or len(shape) != 3 or shape[0] != num_holes:
                raise ValueError(f"{dtype} {shape}, expected uint8 ({num_holes}, H, W)")
            if offset + int(np.prod(shape, dtype=object)) != expected["bytes"]:
                raise ValueError(f"shape {shape} does not fit its {expected['bytes']} bytes")
            return np.memmap(stream, dtype, mode="r", offset=offset, shape=shape)
    except OSError as error:
        raise DataError(f"{path} is missing or unreadable: {_AGAIN}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not an array of hole images ({error}): {_AGAIN}") from error


def _checked_has_image(
    num_holes: int, images: NDArray[np.uint8] | None, has_image: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    if images is None:
        if has_image is not None:
            raise ValueError("has_image says which rows of images hold one: give images too")
        return None
    if images.dtype != np.uint8 or images.ndim != 3 or len(images) != num_holes:
        raise ValueError(
            f"images: expected uint8 ({num_holes}, H, W), found {images.dtype} {images.shape}"
        )
    has_image = np.ones(num_holes, bool) if has_image is None else np.asarray(has_image, bool)
    if has_image.shape != (num_holes,):
        raise ValueError(f"has_image: expected ({num_holes},), found {has_image.shape}")
    return has_image


def _npy_pieces(images: NDArray[np.uint8]) -> Iterator[bytes | memoryview]:
    """The bytes of a .npy file in C order, a few images at a time."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": images.shape}
    )
    yield header.getvalue()
    rows = max(1, _CHUNK_BYTES // max(1, images[:1].nbytes))
    for start in range(0, len(images), rows):
        yield np.ascontiguousarray(images[start : start + rows]).data


def _table_bytes(
    table: HoleTable,
    acquired: NDArray[np.datetime64] | None,
    has_image: NDArray[np.bool_] | None,
) -> bytes:
    columns: dict[str, Any] = {"hole_name": table.hole_name}
    for level in _LEVELS:
        codes = columns[f"{level}_id"] = getattr(table, f"{level}_id")
        columns[f"{level}_name"] = getattr(table, f"{level}_name")[codes]
    columns |= {name: getattr(table, name) for name in (*_VALUES, "is_labelled")}
    if acquired is not None:
        columns["acquired"] = np.asarray(acquired, "datetime64[us]")
    if has_image is not None:
        columns["has_image"] = has_image
    arrays = {  # text through lists: Arrow does not take numpy's fixed-width strings
        name: pa.array(values.tolist() if values.dtype.kind == "U" else values, _TYPES[name])
        for name, values in columns.items()
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(arrays), stream)
    return stream.getvalue()


def _table_of(
    data: bytes,
) -> tuple[HoleTable, NDArray[np.datetime64] | None, NDArray[np.bool_]]:
    arrow = pq.read_table(pa.BufferReader(data))
    columns: dict[str, Any] = {field.name: arrow[field.name].to_numpy() for field in arrow.schema}
    acquired = columns.pop("acquired", None)
    has_image = columns.pop("has_image", np.zeros(len(arrow), bool))
    for level in _LEVELS:  # a name per hole becomes a name per code
        codes, names = columns[f"{level}_id"], columns[f"{level}_name"].astype(np.str_)
        _, first = np.unique(codes, return_index=True)
        columns[f"{level}_name"] = names[first]
    columns["hole_name"] = columns["hole_name"].astype(np.str_)
    return HoleTable(**columns), acquired, has_image


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


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Writes the pieces to the disk itself; their size and SHA-256 for the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
            size += memoryview(piece).nbytes
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary sibling to fill, then one rename; an earlier folder goes last."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}-", dir=target.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
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
