"""CrystFEL's ``.stream``: what was found in each frame, read and written (format 2.3).

A stream is a header (versions, command line, geometry file, reference cell) and chunks, one per
frame, in the order in which the frames were finished. Whatever the bytes are, reading ends in
chunks or in a ``FormatError`` that names file, line and remedy; a stream that ends inside a chunk
is refused, since what wrote it was stopped.

Lengths in a stream are nm; here they are Å. Peak positions in a stream are those of the panel's
data in the file; here they are on the slab, as everywhere (``formats.py``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from envs.crystfel.sfx.formats import FormatError, Geometry, PathLike, format_cell
from envs.crystfel.types import FloatArray, Frame, IntArray, UnitCell

MAX_LINE_CHARS = 65_536
"""CrystFEL's own lines have 1023 at most, its command line apart."""
RESOLUTION_OF_NONE = "inf nm^-1 or 0.0 A"


@dataclass(frozen=True, kw_only=True, eq=False)
class Reflections:
    """Integrated intensities of one crystal; arrays (m,), in the order of ``hkl``."""

    hkl: IntArray
    """(m, 3)"""
    intensity: FloatArray
    sigma: FloatArray
    background: FloatArray
    """Per pixel."""
    fs: FloatArray
    """On the slab, px."""
    ss: FloatArray
    panel: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamCrystal:
    """One lattice of a chunk."""

    cell: FloatArray
    """(6,) Å and degrees."""
    reciprocal_per_A: FloatArray
    """(3, 3) rows a*, b*, c* in the laboratory, 1/Å."""
    lattice_type: str = "triclinic"
    centering: str = "P"
    unique_axis: str = "*"
    reflections: Reflections | None = None
    """Written, and skipped on reading."""


def _none() -> FloatArray:
    return np.zeros(0)


def _no_panel() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """What was found in one frame; n peaks, or none where the stream does not list them."""

    frame: Frame
    """As it was written: the path is not resolved."""
    serial: int = 0
    """Line of the list, from 1."""
    is_hit: bool
    num_peaks: int
    photon_energy_eV: float
    indexed_by: str = "none"
    peak_fs: FloatArray = field(default_factory=_none)
    """(n,) on the slab, px."""
    peak_ss: FloatArray = field(default_factory=_none)
    peak_intensity: FloatArray = field(default_factory=_none)
    """(n,) ADU."""
    peak_panel: IntArray = field(default_factory=_no_panel)
    """(n,) index of the panel."""
    crystals: tuple[StreamCrystal, ...] = ()


# ------------------------------------------------------------------------------------- reading


def read_stream(path: PathLike, geometry: Geometry) -> Iterator[Chunk]:
    """Reads the chunks, one after the other.

    Args:
        path: the file.
        geometry: whose panels the peaks lie on.

    Raises:
        FormatError: what is wrong, in which line, and what to do.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            yield from _chunks(_Lines(file, os.fspath(path)), geometry)
    except OSError as error:
        raise FormatError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


class _Lines:
    """Lines of a file, counted."""

    def __init__(self, file: TextIO, source: str) -> None:
        self._file, self._source, self._number = file, source, 0

    @property
    def at(self) -> str:
        return f"{self._source}:{self._number}"

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE_CHARS):
            self._number += 1
            if len(line) == MAX_LINE_CHARS:
                raise FormatError(f"{self.at}: a line of {MAX_LINE_CHARS} characters: no stream")
            yield line.rstrip("\r\n")

    def until(self, *ends: str, what: str) -> Iterator[str]:
        """Lines up to one of ``ends``, which is consumed."""
        for line in self:
            if line in ends:
                return
            if line.startswith(_CHUNK_BEGINS):
                break
            yield line
        raise FormatError(
            f"{self.at}: {what} has no end: what wrote the stream was stopped; run it again"
        )


_CHUNK_BEGINS, _CHUNK_ENDS = "----- Begin chunk -----", "----- End chunk -----"
_GEOMETRY_BEGINS = "----- Begin geometry file -----"
_GEOMETRY_ENDS = "----- End geometry file -----"
_CELL_BEGINS, _CELL_ENDS = "----- Begin unit cell -----", "----- End unit cell -----"
_PEAKS_BEGIN, _PEAKS_END = "Peaks from peak search", "End of peak list"
_CRYSTAL_BEGINS, _CRYSTAL_ENDS = "--- Begin crystal", "--- End crystal"
_REFLECTIONS_BEGIN = "Reflections measured after indexing"
_REFLECTIONS_END = "End of reflections"


def _chunks(lines: _Lines, geometry: Geometry) -> Iterator[Chunk]:
    first = next(iter(lines), "")
    if not first.startswith("CrystFEL stream format 2."):
        raise FormatError(
            f"{lines.at}: expected `CrystFEL stream format 2.3`, found {first[:40]!r}: is it a "
            "stream?"
        )
    panels = {name: number for number, name in enumerate(geometry.panels)}
    for line in lines:
        if line == _CHUNK_BEGINS:
            yield _chunk(lines, geometry, panels)
        elif line == _CHUNK_ENDS:
            raise FormatError(f"{lines.at}: a chunk ends that did not begin")


def _chunk(lines: _Lines, geometry: Geometry, panels: dict[str, int]) -> Chunk:
    begin = lines.at
    found: dict[str, tuple[str, str]] = {}  # value and place
    peaks: list[tuple[float, float, float, int]] | None = None
    crystals = []
    for line in lines.until(_CHUNK_ENDS, what=f"the chunk from {begin}"):
        if line == _PEAKS_BEGIN:
            if peaks is not None:
                raise FormatError(f"{lines.at}: a second list of peaks in one chunk")
            peaks = _peaks(lines, panels)
        elif line == _CRYSTAL_BEGINS:
            crystals.append(_crystal(lines))
        else:
            for key, name in _OF_CHUNK.items():
                if line.startswith(key):
                    if name in found:
                        raise FormatError(f"{lines.at}: {key.strip(' =:')!r} for a second time")
                    found[name] = line[len(key) :], lines.at
    for key, name in _OF_CHUNK.items():
        if name not in found and name != "event":
            raise FormatError(f"{lines.at}: the chunk has no line {key.strip(' =:')!r}")
    num_peaks = _whole(*found["num_peaks"])
    if peaks is not None and len(peaks) != num_peaks:
        raise FormatError(f"{lines.at}: num_peaks is {num_peaks}, and {len(peaks)} are listed")
    columns = np.array(peaks or [], dtype=float).reshape(-1, 4)
    panel = columns[:, 3].astype(np.int64)
    window = geometry.window[panel]
    is_on = (columns[:, :2] >= window[:, [0, 2]] - 1) & (columns[:, :2] <= window[:, [1, 3]] + 2)
    if not is_on.all():
        fs, ss = columns[int(np.argmin(is_on.all(1))), :2]
        raise FormatError(f"{lines.at}: a peak at {fs:g}, {ss:g} is not on its panel")
    return Chunk(
        frame=Frame(path=found["path"][0], event=found.get("event", ("",))[0]),
        serial=_whole(*found["serial"]),
        is_hit=_whole(*found["hit"]) == 1,
        num_peaks=num_peaks,
        photon_energy_eV=_numbers(found["photon_energy_eV"][0], 1, found["photon_energy_eV"][1])[0],
        indexed_by=found["indexed_by"][0],
        peak_fs=columns[:, 0],
        peak_ss=columns[:, 1] + geometry.row_offset[panel].astype(float),
        peak_intensity=columns[:, 2],
        peak_panel=panel,
        crystals=tuple(crystals),
    )


_OF_CHUNK = {
    "Image filename: ": "path",
    "Event: ": "event",
    "Image serial number: ": "serial",
    "hit = ": "hit",
    "indexed_by = ": "indexed_by",
    "photon_energy_eV = ": "photon_energy_eV",
    "num_peaks = ": "num_peaks",
}


def _peaks(lines: _Lines, panels: dict[str, int]) -> list[tuple[float, float, float, int]]:
    """fs, ss in the panel's data, intensity, panel."""
    peaks = []
    rows = lines.until(_PEAKS_END, what="the list of peaks")
    next(rows, None)  # names of the columns
    for line in rows:
        words = line.split()
        if len(words) != 5 or words[4] not in panels:
            raise FormatError(
                f"{lines.at}: expected fs, ss, 1/d, intensity and a panel of the geometry, found "
                f"{line[:60]!r}"
            )
        fs, ss = _numbers(line, 2, lines.at)
        try:
            intensity = float(words[3])
        except ValueError as error:
            raise FormatError(f"{lines.at}: {error}") from error
        peaks.append((fs, ss, intensity, panels[words[4]]))
    return peaks


def _crystal(lines: _Lines) -> StreamCrystal:
    begin = lines.at
    axes: dict[str, list[float]] = {}
    cell: list[float] = []
    words = {"lattice_type": "triclinic", "centering": "P", "unique_axis": "*"}
    for line in lines.until(_CRYSTAL_ENDS, what=f"the crystal from {begin}"):
        name, equals, value = line.partition(" = ")
        if equals and name in ("astar", "bstar", "cstar"):
            if name in axes:
                raise FormatError(f"{lines.at}: {name} for a second time in one crystal")
            axes[name] = _numbers(value, 3, lines.at)
        elif equals and name in words:
            words[name] = value[:20]
        elif line.startswith(_CELL):
            lengths, _, angles = line[len(_CELL) :].partition(" nm, ")
            cell = [10 * x for x in _numbers(lengths, 3, lines.at)]
            cell += _numbers(angles, 3, lines.at)
        elif line == _REFLECTIONS_BEGIN:
            for _ in lines.until(_REFLECTIONS_END, what="the list of reflections"):
                pass
    if len(axes) < 3 or not cell:
        raise FormatError(f"{lines.at}: the crystal from {begin} has no cell, astar, bstar, cstar")
    reciprocal = np.array([axes["astar"], axes["bstar"], axes["cstar"]]) / 10
    lengths = np.linalg.norm(reciprocal, axis=1)
    if not (lengths > 1e-6).all() or abs(np.linalg.det(reciprocal)) < 1e-3 * np.prod(lengths):
        raise FormatError(f"{lines.at}: astar, bstar and cstar do not span space")
    return StreamCrystal(
        cell=np.array(cell),
        reciprocal_per_A=reciprocal,
        lattice_type=words["lattice_type"],
        centering=words["centering"],
        unique_axis=words["unique_axis"],
    )


_CELL = "Cell parameters "


def _numbers(text: str, count: int, at: str) -> list[float]:
    """The first ``count`` words as finite numbers."""
    words = text.split()[:count]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if len(numbers) < count or not all(math.isfinite(x) and abs(x) < 1e12 for x in numbers):
        raise FormatError(f"{at}: expected {count} number(s), found {text[:60]!r}")
    return numbers


def _whole(text: str, at: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise FormatError(f"{at}: expected a whole number, found {text[:60]!r}")
    return int(text)


# ------------------------------------------------------------------------------------- writing


def write_stream(
    path: PathLike,
    chunks: Iterable[Chunk],
    geometry: Geometry,
    cell: UnitCell,
    *,
    geometry_text: str,
    generator: str,
    argv: Sequence[str] = (),
) -> None:
    """Writes a stream that CrystFEL's programs read; in place at once when it is whole.

    Args:
        path: the file to write.
        chunks: one per frame.
        geometry: with which the frames were indexed.
        cell: the reference.
        geometry_text: the ``.geom`` file of that geometry, which the stream carries along.
        generator: program and version.
        argv: its command.
    """
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(_header(geometry_text, cell, generator, argv))
            for chunk in chunks:
                file.write(format_chunk(chunk, geometry))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(geometry_text: str, cell: UnitCell, generator: str, argv: Sequence[str]) -> str:
    return "\n".join(
        (
            "CrystFEL stream format 2.3",
            f"Generated by {generator}",
            " ".join(argv).replace("\n", " "),
            _GEOMETRY_BEGINS,
            geometry_text.rstrip("\n"),
            _GEOMETRY_ENDS,
            _CELL_BEGINS,
            format_cell(cell).rstrip("\n"),
            _CELL_ENDS,
            "",
        )
    )


def format_chunk(chunk: Chunk, geometry: Geometry) -> str:
    """The text of one chunk, as CrystFEL has it."""
    q = geometry.q_per_A(geometry.positions_m(chunk.peak_fs, chunk.peak_ss, chunk.peak_panel))
    q_per_nm = 10 * np.linalg.norm(q, axis=-1)
    furthest = f"{q_per_nm.max():.6f} nm^-1 or {10 / q_per_nm.max():.6f} A" if q.size else None
    lines = [
        _CHUNK_BEGINS,
        f"Image filename: {chunk.frame.path}",
        f"Event: {chunk.frame.event or '//'}",
        f"Image serial number: {chunk.serial}",
        f"hit = {int(chunk.is_hit)}",
        f"indexed_by = {chunk.indexed_by}",
        *(["n_indexing_tries = 1"] if chunk.crystals else []),
        f"photon_energy_eV = {chunk.photon_energy_eV:.6f}",
        "beam_divergence = 0.00e+00 rad",
        "beam_bandwidth = 1.00e-08 (fraction)",
        f"average_camera_length = {geometry.distance_m:.6f} m",
        f"num_peaks = {chunk.num_peaks}",
        f"peak_resolution = {furthest or RESOLUTION_OF_NONE}",
        _PEAKS_BEGIN,
        "  fs/px   ss/px (1/d)/nm^-1   Intensity  Panel",
    ]
    rows = chunk.peak_ss - geometry.row_offset[chunk.peak_panel]
    for fs, ss, one_over_d, intensity, panel in zip(
        chunk.peak_fs, rows, q_per_nm, chunk.peak_intensity, chunk.peak_panel, strict=True
    ):
        lines.append(
            f"{fs:7.2f} {ss:7.2f} {one_over_d:10.2f}  {intensity:10.2f}   {geometry.panels[panel]}"
        )
    lines.append(_PEAKS_END)
    for crystal in chunk.crystals:
        lines += _crystal_lines(crystal, geometry)
    return "\n".join([*lines, _CHUNK_ENDS, ""])


def _crystal_lines(crystal: StreamCrystal, geometry: Geometry) -> list[str]:
    a, b, c = crystal.cell[:3] / 10
    alpha, beta, gamma = crystal.cell[3:]
    lines = [
        _CRYSTAL_BEGINS,
        f"{_CELL}{a:.5f} {b:.5f} {c:.5f} nm, {alpha:.5f} {beta:.5f} {gamma:.5f} deg",
    ]
    for name, (x, y, z) in zip("abc", 10 * crystal.reciprocal_per_A, strict=True):
        lines.append(f"{name}star = {x:+9.7f} {y:+9.7f} {z:+9.7f} nm^-1")
    lines += [
        f"lattice_type = {crystal.lattice_type}",
        f"centering = {crystal.centering}",
        f"unique_axis = {crystal.unique_axis}",
        "profile_radius = 0.01000 nm^-1",
        "predict_refine/det_shift x = 0.000 y = 0.000 mm",
    ]
    if (found := crystal.reflections) is None:
        return [*lines, "No integrated reflections.", _CRYSTAL_ENDS]
    q = np.linalg.norm(found.hkl @ crystal.reciprocal_per_A, axis=1).max(initial=1e-3)
    lines += [
        f"diffraction_resolution_limit = {10 * q:.2f} nm^-1 or {1 / q:.2f} A",
        f"num_reflections = {len(found.hkl)}",
        "num_saturated_reflections = 0",
        "num_implausible_reflections = 0",
        _REFLECTIONS_BEGIN,
        "   h    k    l          I   sigma(I)       peak background  fs/px  ss/px panel",
    ]
    rows = found.ss - geometry.row_offset[found.panel]
    for indices, intensity, sigma, background, fs, ss, panel in zip(
        found.hkl, found.intensity, found.sigma, found.background, found.fs, rows, found.panel,
        strict=True,
    ):  # fmt: skip
        lines.append(
            f"{indices[0]:4d} {indices[1]:4d} {indices[2]:4d} {intensity:10.2f} {sigma:10.2f} "
            f"{intensity:10.2f} {background:10.2f} {fs:6.1f} {ss:6.1f} {geometry.panels[panel]}"
        )
    return [*lines, _REFLECTIONS_END, _CRYSTAL_ENDS]
