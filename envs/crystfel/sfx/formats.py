"""CrystFEL's files: ``.geom`` ``.cell`` ``.lst`` ``.stream``, and HDF5 frames.

The formats are those of CrystFEL 0.12 (manual pages ``crystfel_geometry(5)``, ``indexamajig(1)``;
stream format 2.3). Whatever the bytes of a text file are, reading ends in a value or in a
``FormatError`` that names file, line and remedy.

Shape letters: P panels, R rows and C columns of the *slab*, n points.

The slab is the data of one frame as a 2-D array: where the file keeps modules along an axis of
their own, they are stacked along the rows. All positions here are (fs, ss) on the slab in px, fs
along the columns, and pixel i covers [i, i + 1): its centre is i + 0.5, as in CrystFEL.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from envs.crystfel.types import BoolArray, FloatArray, Frame, IntArray, Parameters, UnitCell

PathLike = str | os.PathLike[str]

HC_EV_A = 12398.419843320026
"""Planck's constant times the speed of light, eV Å (CODATA 2018, exact)."""
MAX_TEXT_BYTES = 256 * 2**20
"""Of a geometry, cell or list file; the largest real list files have a few MB."""
MAX_SIDE_PX = 100_000
"""Of a panel; the largest detectors have 4 000."""
MAX_SPREAD, MAX_SHARE_FAR = 0.01, 0.05
"""Of values looked up in the frames, about the middle one, and how many may be farther off."""


class FormatError(ValueError):
    """A file is not what it should be; the message names file, line and remedy."""


class FramesNeededError(FormatError):
    """A ``.geom`` file that points into the data, and no frame to look into."""


# ---------------------------------------------------------------------------------- geometry


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where one 2-D piece of a frame's data lies in the file."""

    data: str
    """HDF5 path; ``%`` stands for a part of the event."""
    dims: tuple[str | int, ...]
    """Of each axis: ``%`` (frame), a fixed index, ``ss`` or ``fs``; ``fs`` comes after ``ss``."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """An array of bits that says which pixels are bad."""

    data: str
    file: str = ""
    """Empty: in the frame's own file. Relative ones are relative to the ``.geom`` file's folder,
    and resolved on reading."""
    good_bits: int = 0
    """All of these are set in a good pixel."""
    bad_bits: int = 0
    """None of these is set in a good pixel."""


@dataclass(frozen=True, kw_only=True)
class BadRegion:
    """A rectangle without usable pixels; inclusive bounds."""

    low: tuple[float, float]
    high: tuple[float, float]
    panel: int | None
    """Bounds are (fs, ss) in this panel's data (-1: in every panel's), or (x, y) of the laboratory
    in px (None)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """A detector: P flat panels in the laboratory frame: +z along the beam, +y up, sample at 0.

    A point (fs, ss) of a panel lies at ``corner + fs * fs_vector + ss * ss_vector`` px, counted
    from the panel's first pixel, divided by ``res_per_m``; its z is ``clen_m + coffset_m`` more.
    """

    panels: tuple[str, ...]
    """Names of the P panels."""
    window: IntArray
    """(P, 4) min_fs, max_fs, min_ss, max_ss in the data of its plane, inclusive."""
    plane_index: IntArray
    """(P,) which of ``planes`` holds the panel."""
    planes: tuple[Plane, ...]
    fs_vector: FloatArray
    """(P, 3) px of x, y, z for one px along fs."""
    ss_vector: FloatArray
    """(P, 3)"""
    corner_px: FloatArray
    """(P, 2) x, y of the corner of the first pixel, px."""
    coffset_m: FloatArray
    """(P,)"""
    res_per_m: FloatArray
    """(P,) pixels per metre."""
    clen_m: float
    photon_energy_eV: float
    adu_per_photon: float = 1.0
    flag_below: float = -math.inf
    flag_above: float = math.inf
    """Pixels with a value below, above, or equal to one of ``flag_equal`` are bad."""
    flag_equal: tuple[float, ...] = ()
    edge_px: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(P,) so many pixels along the edges of each panel are bad; empty = none."""
    bad_panels: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """(P,) not used at all; empty = none."""
    bad_regions: tuple[BadRegion, ...] = ()
    masks: tuple[Mask, ...] = ()

    def __post_init__(self) -> None:
        """Freezes the arrays."""
        p = len(self.panels)
        for name, dtype, shape in (
            ("window", np.int64, (p, 4)),
            ("plane_index", np.int64, (p,)),
            ("fs_vector", np.float64, (p, 3)),
            ("ss_vector", np.float64, (p, 3)),
            ("corner_px", np.float64, (p, 2)),
            ("coffset_m", np.float64, (p,)),
            ("res_per_m", np.float64, (p,)),
            ("edge_px", np.int64, (p,)),
            ("bad_panels", np.bool_, (p,)),
        ):
            array = np.array(getattr(self, name), dtype=dtype)
            if name in ("edge_px", "bad_panels") and not array.size:
                array = np.zeros(p, dtype=dtype)
            if array.shape != shape:
                raise FormatError(f"{name} has shape {array.shape}, and must have {shape}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was worked out from them would travel as tens of MB."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def wavelength_A(self) -> float:
        """Å."""
        return HC_EV_A / self.photon_energy_eV

    @cached_property
    def plane_rows(self) -> int:
        """Rows that each plane takes on the slab."""
        return int(self.window[:, 3].max()) + 1

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(R, C) of the slab."""
        return len(self.planes) * self.plane_rows, int(self.window[:, 1].max()) + 1

    @cached_property
    def row_offset(self) -> IntArray:
        """(P,) row of the slab where the panel's plane begins: slab row = data row + offset."""
        return self.plane_index * self.plane_rows

    @cached_property
    def panel_index(self) -> NDArray[np.int16]:
        """(R, C) panel of each pixel of the slab; -1 = none."""
        index = np.full(self.shape, -1, dtype=np.int16)
        for panel, (fs0, fs1, ss0, ss1) in enumerate(self.window):
            row = self.row_offset[panel]
            index[row + ss0 : row + ss1 + 1, fs0 : fs1 + 1] = panel
        index.setflags(write=False)
        return index

    @property
    def distance_m(self) -> float:
        """Mean distance of the panels from the sample along the beam."""
        return float(np.mean(self.clen_m + self.coffset_m))

    def positions_m(self, fs: FloatArray, ss: FloatArray, panel: IntArray) -> FloatArray:
        """Points of the slab in the laboratory.

        Args:
            fs: (n,) px on the slab.
            ss: (n,) px on the slab.
            panel: (n,) to which panel each belongs.

        Returns:
            (n, 3) x, y, z in m.
        """
        u = np.asarray(fs - self.window[panel, 0])[..., None]
        v = np.asarray(ss - self.row_offset[panel] - self.window[panel, 2])[..., None]
        xyz = u * self.fs_vector[panel] + v * self.ss_vector[panel]
        xyz[..., :2] += self.corner_px[panel]
        xyz /= self.res_per_m[panel][..., None]
        xyz[..., 2] += self.clen_m + self.coffset_m[panel]
        return xyz

    @cached_property
    def pixel_positions_m(self) -> NDArray[np.float64]:
        """(R, C, 3) of the pixels' centres; NaN where no panel is."""
        xyz = np.full((*self.shape, 3), np.nan)
        rows, columns = np.nonzero(self.panel_index >= 0)
        panel = self.panel_index[rows, columns]
        xyz[rows, columns] = self.positions_m(columns + 0.5, rows + 0.5, panel)
        xyz.setflags(write=False)
        return xyz

    @cached_property
    def radius_px(self) -> NDArray[np.float32]:
        """(R, C) distance of the pixels' centres from the beam, px of their panel; NaN = none."""
        xy = self.pixel_positions_m[..., :2]
        radius = np.hypot(xy[..., 0], xy[..., 1]) * self.res_per_m[self.panel_index]
        return radius.astype(np.float32)

    def q_per_A(self, positions_m: FloatArray) -> FloatArray:
        """(..., 3) scattering vectors s - s0 over the wavelength of rays to these points, 1/Å."""
        q = positions_m / np.linalg.norm(positions_m, axis=-1, keepdims=True)
        q[..., 2] -= 1.0
        return q / self.wavelength_A

    def locate(self, rays: FloatArray) -> tuple[FloatArray, FloatArray, IntArray]:
        """Where rays from the sample hit the detector.

        Args:
            rays: (n, 3) directions, of any length.

        Returns:
            fs, ss on the slab (n,) in px, and the panel (n,); NaN and -1 where none is hit.
        """
        to_m = 1.0 / self.res_per_m[:, None]
        f, s = self.fs_vector * to_m, self.ss_vector * to_m
        corner = np.column_stack([self.corner_px * to_m, self.clen_m + self.coffset_m])
        normal = np.cross(f, s)
        # u, v = the two coordinates of a point in the panel's plane, by the dual basis of f and s.
        square = np.einsum("pi,pi->p", normal, normal)[:, None]
        dual_f, dual_s = np.cross(s, normal) / square, np.cross(normal, f) / square
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.einsum("pi,pi->p", corner, normal) / (rays @ normal.T)  # (n, P)
            u = t * (rays @ dual_f.T) - np.einsum("pi,pi->p", corner, dual_f)
            v = t * (rays @ dual_s.T) - np.einsum("pi,pi->p", corner, dual_s)
            sides = self.window[:, [1, 3]] - self.window[:, [0, 2]] + 1
            is_on = (t > 0) & (u >= 0) & (v >= 0) & (u < sides[:, 0]) & (v < sides[:, 1])
        panel = np.where(is_on.any(1), is_on.argmax(1), -1)
        n = np.arange(len(rays))
        fs = u[n, panel] + self.window[panel, 0]
        ss = v[n, panel] + self.window[panel, 2] + self.row_offset[panel]
        fs[panel < 0] = ss[panel < 0] = np.nan
        return fs, ss, panel

    def moved(self, parameters: Parameters) -> Geometry:
        """The geometry with the offsets of ``parameters`` applied (see there for their meaning)."""
        shift = np.array([parameters.centre_x_offset_px, parameters.centre_y_offset_px])
        return replace(
            self,
            corner_px=self.corner_px - shift,
            clen_m=self.clen_m + self.distance_m * parameters.clen_offset_percent / 100.0,
        )


def read_geometry(path: PathLike, *frames: Frame) -> Geometry:
    """Reads a ``.geom`` file.

    Args:
        path: the file.
        frames: in which values are looked up that the file only points to (``clen = /path``). One
            value serves all of them: the middle one, where 95 % of them are within 1 % of it.

    Raises:
        FormatError: what is wrong, in which line, and what to do.
    """
    return parse_geometry(read_text(path), os.fspath(path), *frames)


def parse_geometry(text: str, source: str = "geometry", *frames: Frame) -> Geometry:
    """The same from text; ``source`` is the file's name. Raises FormatError."""
    defaults: dict[str, _Value] = {}
    panels: dict[str, dict[str, _Value]] = {}
    regions: dict[str, dict[str, _Value]] = {}
    overall: dict[str, _Value] = {}
    unused: _Value | None = None  # the last default, until a panel follows that it is for
    for number, line in enumerate(text.splitlines(), 1):
        at = f"{source}:{number}"
        line = line.split(";", 1)[0].strip()
        if not line:
            continue
        key, equals, text_value = (part.strip() for part in line.partition("="))
        if not equals or not key or not text_value:
            raise FormatError(f"{at}: expected `name = value`, found {_shown(line)}")
        value = _Value(text_value, at)
        owner, slash, name = key.rpartition("/")
        name = _MASK_SYNONYMS.get(name, name)
        if name == "clen":  # of each panel in old files
            known = overall.setdefault(name, value)
            if known.text != value.text:
                raise FormatError(f"{at}: clen differs from {known.at}: keep one, use coffset")
        elif not slash:
            if name in _OVERALL:
                overall[name] = value
            elif name in _OF_PANEL or _OF_PANEL_PATTERN.fullmatch(name):
                _put(defaults, name, value)  # of panels first mentioned later
                unused = value
            elif not name.startswith(("group_", "rigid_group")) and name not in _UNUSED:
                raise FormatError(f"{at}: {_unknown(name, (*_OVERALL, *_OF_PANEL))}")
        elif owner.startswith("bad"):
            if name not in _OF_REGION:
                raise FormatError(f"{at}: {_unknown(name, _OF_REGION)}")
            regions.setdefault(owner, {})[name] = value
        elif owner.startswith(("group", "rigid_group")):
            raise FormatError(f"{at}: no panel may be called {_shown(owner)}")
        elif name in _OF_PANEL or _OF_PANEL_PATTERN.fullmatch(name):
            if owner not in panels:
                panels[owner], unused = dict(defaults), None
            _put(panels[owner], name, value)
        elif name not in _UNUSED:
            raise FormatError(f"{at}: {_unknown(name, tuple(_OF_PANEL))}")
    if panels and unused is not None:
        raise FormatError(
            f"{unused.at}: holds for panels that come after it, and none does: move the line up"
        )
    if not panels:
        raise FormatError(f"{source}: no panel: expected lines such as `p0/min_fs = 0`")
    if len(panels) > 30_000:
        raise FormatError(f"{source}: {len(panels)} panels, which no detector has")
    return _geometry(source, frames, overall, panels, regions)


def _put(values: dict[str, _Value], name: str, value: _Value) -> None:
    """The last value counts; flags add up."""
    if name in _FLAGS and name in values:
        value = replace(value, text=f"{values[name].text} {value.text}")
    values[name] = value


def _geometry(
    source: str,
    frames: Sequence[Frame],
    overall: dict[str, _Value],
    panels: dict[str, dict[str, _Value]],
    regions: dict[str, dict[str, _Value]],
) -> Geometry:
    names = tuple(panels)

    def column(name: str, default: float | None = None) -> FloatArray:
        found = []
        for panel, values in panels.items():
            if name in values:
                found.append(values[name].number())
            elif default is None:
                raise FormatError(f"{source}: panel {_shown(panel)} has no {name}: add a line")
            else:
                found.append(default)
        return np.array(found)

    def vector(name: str) -> FloatArray:
        for panel, values in panels.items():
            if name not in values:
                raise FormatError(
                    f"{source}: panel {_shown(panel)} has no {name}: add its direction, such as "
                    f"`{panel}/{name} = +1.0x`"
                )
        return np.array([values[name].direction() for values in panels.values()])

    _check_alike(panels)
    window = np.column_stack([column(name) for name in ("min_fs", "max_fs", "min_ss", "max_ss")])
    for panel, values, (fs0, fs1, ss0, ss1) in zip(names, panels.values(), window, strict=True):
        if not (0 <= fs0 <= fs1 < MAX_SIDE_PX and 0 <= ss0 <= ss1 < 100 * MAX_SIDE_PX):
            raise FormatError(
                f"{values['max_fs'].at}: panel {_shown(panel)} covers fs {fs0:g} to {fs1:g}, ss "
                f"{ss0:g} to {ss1:g}: expected pixel numbers, the first not above the last"
            )
    window = window.astype(np.int64)
    fs_vector, ss_vector = vector("fs"), vector("ss")
    area = np.linalg.norm(np.cross(fs_vector, ss_vector), axis=1)
    if not (area > 1e-6).all():
        panel = names[int(np.argmin(area > 1e-6))]
        raise FormatError(
            f"{_first(panels[panel], ('ss', 'fs'), source)}: fs and ss of panel {_shown(panel)} "
            "are parallel: give two directions"
        )
    planes: dict[Plane, int] = {}
    plane_index = [planes.setdefault(_plane(v), len(planes)) for v in panels.values()]
    rows, columns = int(window[:, 3].max()) + 1, int(window[:, 1].max()) + 1
    if rows * columns * len(planes) > 2**31:
        raise FormatError(
            f"{source}: {len(planes)} planes of {rows} x {columns} px, which no detector has"
        )
    res = column("res")
    if not (res > 0).all():
        panel = names[int(np.argmin(res > 0))]
        raise FormatError(
            f"{panels[panel]['res'].at}: res is pixels per metre, and must be above 0"
        )
    energy = _photon_energy_eV(overall, source, frames)
    clen = _looked_up(overall, "clen", source, frames, {"m": 1.0, "mm": 1e-3}, "m", "mm")
    corner = np.column_stack([column("corner_x"), column("corner_y")])
    for axis, name in enumerate(("detector_shift_x", "detector_shift_y")):
        if name in overall:
            units = {"m": 1.0, "mm": 1e-3}
            shift_m = _looked_up(overall, name, source, frames, units, "m", "m", slack=2e-5)
            corner[:, axis] += shift_m * res
    gain = column("adu_per_eV", math.nan) * energy
    gain = np.where(np.isfinite(gain), gain, column("adu_per_photon", math.nan))
    any_panel = panels[names[0]]
    flags = {name: any_panel[name].numbers() for name in _FLAGS if name in any_panel}
    coffset = column("coffset", 0.0)
    if not (np.abs(clen + coffset) > 1e-6).all():
        raise FormatError(
            f"{overall['clen'].at}: clen + coffset is 0: the detector is at the sample"
        )
    geometry = Geometry(
        panels=names,
        window=window,
        plane_index=np.array(plane_index),
        planes=tuple(planes),
        fs_vector=fs_vector,
        ss_vector=ss_vector,
        corner_px=corner,
        coffset_m=coffset,
        res_per_m=res,
        clen_m=clen,
        photon_energy_eV=energy,
        adu_per_photon=float(gain[0]) if np.isfinite(gain[0]) and gain[0] > 0 else 1.0,
        flag_below=max(flags.get("flag_lessthan", (-math.inf,))),
        flag_above=min(flags.get("flag_morethan", (math.inf,))),
        flag_equal=flags.get("flag_equal", ()),
        edge_px=np.clip(column("mask_edge_pixels", 0.0), 0, MAX_SIDE_PX).astype(np.int64),
        bad_panels=np.array(
            [v["no_index"].flag() if "no_index" in v else False for v in panels.values()]
        ),
        bad_regions=tuple(_region(name, v, names) for name, v in regions.items()),
        masks=_masks(any_panel, os.path.dirname(source)),
    )
    return geometry


def _check_alike(panels: dict[str, dict[str, _Value]]) -> None:
    """Flags and masks are read once for all panels: raises FormatError where one has its own."""
    (first, of_first), *others = panels.items()
    for name in (*_FLAGS, *_OF_MASK):
        for panel, values in others:
            one, other = of_first.get(name), values.get(name)
            if (one and one.text) != (other and other.text):
                at = next(value.at for value in (other, one) if value)
                raise FormatError(
                    f"{at}: {name} of panel {_shown(panel)} is not that of panel {_shown(first)}: "
                    "give all panels the same, above the first one"
                )


def tuned_geometry_text(
    text: str, geometry: Geometry, parameters: Parameters, *, masks_in: PathLike | None = None
) -> str:
    """A user's ``.geom`` with distance and beam centre changed, everything else as it was.

    Args:
        text: the file.
        geometry: what it says (the start that the offsets are relative to).
        parameters: with the offsets.
        masks_in: folder to which its mask files are relative, where the text is to stand in another
            one; None = they stay as they are.
    """
    moved = geometry.moved(parameters)
    shift = {"x": parameters.centre_x_offset_px, "y": parameters.centre_y_offset_px}

    def edited(line: str) -> str:
        if masks_in is not None and (match := _MASK_LINE.match(line)) is not None:
            before, file, after = match.groups()
            return f"{before}{os.path.abspath(os.path.join(masks_in, file))}{after}"
        if (match := _TUNED_LINE.match(line)) is None:
            return line
        before, name, value, after = match.groups()
        if name == "clen":
            is_moved = moved.clen_m != geometry.clen_m
            return f"{before}{moved.clen_m:.9f} m{after}" if is_moved else line
        offset = shift[name[-1]]
        return f"{before}{float(value) - offset:.6f}{after}" if offset else line

    return "".join(map(edited, text.splitlines(keepends=True)))


def format_geometry(geometry: Geometry, *, comment: str = "") -> str:
    """The text of a ``.geom`` file; ``parse_geometry`` gives the same geometry back."""
    lines = [f"; {line}" for line in comment.splitlines()]
    lines += [
        f"photon_energy = {geometry.photon_energy_eV:.6f} eV",
        f"clen = {geometry.clen_m:.9f} m",
        f"adu_per_photon = {geometry.adu_per_photon:.6f}",
    ]
    for name, value in (
        ("flag_lessthan", geometry.flag_below),
        ("flag_morethan", geometry.flag_above),
        *(("flag_equal", value) for value in geometry.flag_equal),
    ):
        if math.isfinite(value):
            lines.append(f"{name} = {value:.6f}")
    for number, mask in enumerate(geometry.masks):
        lines.append(f"mask{number}_data = {mask.data}")
        if mask.file:
            lines.append(f"mask{number}_file = {mask.file}")
        lines.append(f"mask{number}_goodbits = 0x{mask.good_bits:x}")
        lines.append(f"mask{number}_badbits = 0x{mask.bad_bits:x}")
    for panel, name in enumerate(geometry.panels):
        plane = geometry.planes[geometry.plane_index[panel]]
        lines += ["", f"{name}/data = {plane.data}"]
        lines += [f"{name}/dim{axis} = {what}" for axis, what in enumerate(plane.dims)]
        names = ("min_fs", "max_fs", "min_ss", "max_ss")
        lines += [
            f"{name}/{key} = {value}"
            for key, value in zip(names, geometry.window[panel], strict=True)
        ]
        for key, vector in (("fs", geometry.fs_vector), ("ss", geometry.ss_vector)):
            terms = (
                f"{value:+.9f}{axis}" for value, axis in zip(vector[panel], "xyz", strict=True)
            )
            lines.append(f"{name}/{key} = {' '.join(terms)}")
        lines += [
            f"{name}/corner_x = {geometry.corner_px[panel, 0]:.6f}",
            f"{name}/corner_y = {geometry.corner_px[panel, 1]:.6f}",
            f"{name}/coffset = {geometry.coffset_m[panel]:.9f}",
            f"{name}/res = {geometry.res_per_m[panel]:.6f}",
        ]
        if geometry.edge_px[panel]:
            lines.append(f"{name}/mask_edge_pixels = {geometry.edge_px[panel]}")
        if geometry.bad_panels[panel]:
            lines.append(f"{name}/no_index = 1")
    for number, region in enumerate(geometry.bad_regions):
        axes = ("x", "y") if region.panel is None else ("fs", "ss")
        lines.append("")
        for axis, low, high in zip(axes, region.low, region.high, strict=True):
            lines += [f"bad{number}/min_{axis} = {low:.6f}", f"bad{number}/max_{axis} = {high:.6f}"]
        if region.panel is not None and region.panel >= 0:
            lines.append(f"bad{number}/panel = {geometry.panels[region.panel]}")
    return "\n".join(lines) + "\n"


_OVERALL = (
    "clen",
    "photon_energy",
    "wavelength",
    "electron_voltage",
    "bandwidth",
    "detector_shift_x",
    "detector_shift_y",
)
_OF_PANEL = (
    "min_fs", "max_fs", "min_ss", "max_ss", "corner_x", "corner_y", "fs", "ss", "coffset", "res",
    "data", "adu_per_eV", "adu_per_photon", "no_index", "mask_edge_pixels",
    "flag_lessthan", "flag_morethan", "flag_equal",
)  # fmt: skip
_FLAGS = ("flag_lessthan", "flag_morethan", "flag_equal")
_OF_MASK = tuple(
    f"mask{number}_{what}"
    for number in range(8)
    for what in ("data", "file", "goodbits", "badbits")
)
_OF_PANEL_PATTERN = re.compile(r"dim\d{1,2}|mask[0-7]_(?:data|file|goodbits|badbits)")
_OF_REGION = (
    "min_x", "max_x", "min_y", "max_y", "min_fs", "max_fs", "min_ss", "max_ss", "panel",
)  # fmt: skip
_MASK_SYNONYMS = {
    "mask": "mask0_data",
    "mask_file": "mask0_file",
    "mask_good": "mask0_goodbits",
    "mask_bad": "mask0_badbits",
}
_UNUSED = frozenset(
    (
        "max_adu", "saturation_map", "saturation_map_file", "badrow_direction", "peak_list",
        "peak_list_type", "peak_info_location", "rail_direction", "clen_for_centering",
        "beam_divergence", "beam_bandwidth", "profile_radius", "polarization", "integr_radius",
        "peak_sep", "min_sep",
    )
)  # fmt: skip
"""Known to some version of CrystFEL, and without a meaning here."""
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_TERM = re.compile(r"([+-]?)((?:[0-9]+\.?[0-9]*|\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)\*?([xyz])")
_TUNED_LINE = re.compile(
    rf"([ \t]*(?:(?!bad)[^\s/;=]+/)?(clen|corner_[xy])[ \t]*=[ \t]*)"
    rf"({_NUMBER.pattern}|/[^\s;]*)(?:[ \t]*mm?(?=[\s;]|$))?(.*)",
    re.DOTALL,
)
_MASK_LINE = re.compile(
    r"([ \t]*(?:[^\s/;=]+/)?mask[0-7]?_file[ \t]*=[ \t]*)([^\s;]+)(.*)", re.DOTALL
)


@dataclass(frozen=True)
class _Value:
    """What stands behind a ``=``, and where."""

    text: str
    at: str

    def number(self) -> float:
        return _number(self.text, self.at)

    def numbers(self) -> tuple[float, ...]:
        return tuple(_number(text, self.at) for text in self.text.split())

    def flag(self) -> bool:
        return self.text.lower() in ("true", "yes") or (
            _NUMBER.fullmatch(self.text) is not None and float(self.text) != 0
        )

    def bits(self) -> int:
        with_prefix = re.fullmatch(r"0[xX]([0-9a-fA-F]{1,16})", self.text)
        if with_prefix:
            return int(with_prefix[1], 16)
        if re.fullmatch(r"[0-9]{1,19}", self.text):
            return int(self.text)
        raise FormatError(f"{self.at}: expected a bit mask such as 0xff, found {_shown(self.text)}")

    def direction(self) -> tuple[float, float, float]:
        terms = re.sub(r"\s+", "", self.text)
        found = {"x": 0.0, "y": 0.0, "z": 0.0}
        end = 0
        while end < len(terms):
            match = _TERM.match(terms, end)
            if match is None or (end and not match[1]):
                raise FormatError(
                    f"{self.at}: expected a direction like -0.9x +0.1y, found {_shown(self.text)}"
                )
            size = _number(match[2], self.at) if match[2] else 1.0
            found[match[3]] += -size if match[1] == "-" else size
            end = match.end()
        return found["x"], found["y"], found["z"]

    def with_unit(self, units: dict[str, float], default: str) -> float:
        number, _, unit = self.text.partition(" ")
        if (match := _NUMBER.match(number)) and match.end() < len(number):
            number, unit = number[: match.end()], number[match.end() :]
        unit = unit.strip() or default
        if unit not in units:
            raise FormatError(
                f"{self.at}: the unit {_shown(unit)} is not one of {', '.join(units)}"
            )
        return _number(number, self.at) * units[unit]


def _number(text: str, at: str) -> float:
    if _NUMBER.fullmatch(text) and math.isfinite(value := float(text)) and abs(value) < 1e30:
        return value
    raise FormatError(f"{at}: expected a number, found {_shown(text)}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _unknown(name: str, valid: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name[:60], list(valid), 1)
    return f"{_shown(name)} is not known" + (f", did you mean {near[0]}?" if near else "")


def _first(values: dict[str, _Value], names: Iterable[str], otherwise: str) -> str:
    return next((values[name].at for name in names if name in values), otherwise)


def _looked_up(
    overall: dict[str, _Value],
    name: str,
    source: str,
    frames: Sequence[Frame],
    units: dict[str, float],
    default: str,
    default_of_header: str,
    slack: float = 0.0,
) -> float:
    """A number, or the middle one of what the frames say, nearly all within 1 % or ``slack``."""
    if name not in overall:
        raise FormatError(f"{source}: no {name}: add a line such as `{name} = ...`")
    value = overall[name]
    if not value.text.startswith("/"):
        return value.with_unit(units, default)
    path, *unit_given = value.text.split(None, 1)
    unit = unit_given[0] if unit_given else default_of_header
    if unit not in units:
        raise FormatError(f"{value.at}: the unit {_shown(unit)} is not one of {', '.join(units)}")
    if not frames:
        raise FramesNeededError(
            f"{value.at}: {name} is looked up in the data ({path}): frames are needed to know it, "
            f"or write a number"
        )
    found = np.concatenate(
        [
            _headers(file, list(group), path, value.at)
            for file, group in itertools.groupby(frames, lambda frame: frame.path)
        ]
    )
    middle = float(np.median(found))
    away = np.abs(found - middle)
    if np.mean(away > MAX_SPREAD * abs(middle) + slack / units[unit]) > MAX_SHARE_FAR:
        farthest = float(found[np.argmax(away)])
        raise FormatError(
            f"{value.at}: {name} is {middle:g} in the middle of the frames and {farthest:g} at its "
            "farthest, and one value serves all: split the list by it, or write a number"
        )
    return middle * units[unit]


def _headers(file_path: str, frames: Sequence[Frame], path: str, at: str) -> FloatArray:
    """Numbers kept in the frames' file, one for all frames or one for each."""
    try:
        with h5py.File(file_path, "r") as file:
            node = file[path]
            if not isinstance(node, h5py.Dataset):
                raise FormatError(f"{at}: {path} of {file_path} is no dataset")
            numbers = np.asarray(node[()], dtype=float).reshape(-1)
    except FormatError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{at}: cannot read {path} of {file_path}: {error}") from error
    found = []
    for frame in frames:
        event = re.search(r"//(\d+)", frame.event)
        here = numbers[int(event[1]) :][:1] if event and numbers.size > 1 else numbers
        if not here.size or not np.isfinite(here).all():
            raise FormatError(f"{at}: {path} of {file_path} has no number for frame {frame}")
        found.append(here)
    return np.concatenate(found)


def _photon_energy_eV(overall: dict[str, _Value], source: str, frames: Sequence[Frame]) -> float:
    given = [
        name for name in ("photon_energy", "wavelength", "electron_voltage") if name in overall
    ]
    if len(given) > 1:
        raise FormatError(f"{overall[given[1]].at}: {given[0]} is given already: keep one of them")
    if given == ["electron_voltage"]:
        raise FormatError(
            f"{overall['electron_voltage'].at}: electron diffraction is not supported here"
        )
    if given == ["wavelength"]:
        units = {"m": 1e10, "A": 1.0}
        wavelength = _looked_up(overall, "wavelength", source, frames, units, "m", "m")
        energy = HC_EV_A / wavelength if wavelength > 0 else math.nan
    else:
        units = {"eV": 1.0, "keV": 1e3}
        energy = _looked_up(overall, "photon_energy", source, frames, units, "eV", "eV")
    if not 100 < energy < 1e6:
        raise FormatError(
            f"{_first(overall, given, source)}: a photon energy of {energy:g} eV cannot be right"
        )
    return energy


def _plane(values: dict[str, _Value]) -> Plane:
    axes: dict[int, _Value] = {}
    for name, value in values.items():
        if name.startswith("dim"):
            axes[int(name[3:])] = value
    data = values["data"].text if "data" in values else "/data/data"
    if not axes:
        return Plane(data=data, dims=("ss", "fs"))
    dims: list[str | int] = []
    at = next(iter(axes.values())).at
    for axis in range(max(axes) + 1):
        if axis not in axes:
            raise FormatError(f"{at}: dim{axis} is missing: give every axis up to the last")
        text = axes[axis].text
        if text in ("%", "ss", "fs"):
            dims.append(text)
        elif re.fullmatch(r"[0-9]{1,6}", text):
            dims.append(int(text))
        else:
            raise FormatError(
                f"{axes[axis].at}: expected %, ss, fs or a number, found {_shown(text)}"
            )
    if dims.count("ss") != 1 or dims.count("fs") != 1 or dims.index("fs") < dims.index("ss"):
        raise FormatError(f"{at}: the dims must name ss once and fs once, fs after ss")
    return Plane(data=data, dims=tuple(dims))


def _masks(values: dict[str, _Value], folder: str) -> tuple[Mask, ...]:
    masks = []
    for number in range(8):
        if (data := values.get(f"mask{number}_data")) is None:
            continue
        file = values.get(f"mask{number}_file")
        good, bad = (values.get(f"mask{number}_{kind}bits") for kind in ("good", "bad"))
        masks.append(
            Mask(
                data=data.text,
                file=os.path.join(folder, file.text) if file else "",
                good_bits=good.bits() if good else 0,
                bad_bits=bad.bits() if bad else 0,
            )
        )
    return tuple(masks)


def _region(name: str, values: dict[str, _Value], panels: Sequence[str]) -> BadRegion:
    at = next(iter(values.values())).at
    is_of_data = any(key.endswith(("fs", "ss")) for key in values)
    axes = ("fs", "ss") if is_of_data else ("x", "y")
    bounds = []
    for end in ("min", "max"):
        for axis in axes:
            if (value := values.get(f"{end}_{axis}")) is None:
                raise FormatError(f"{at}: {_shown(name)} has no {end}_{axis}: add a line")
            bounds.append(value.number())
    panel = None
    if is_of_data and "panel" not in values:
        panel = -1
    elif is_of_data:
        if values["panel"].text not in panels:
            raise FormatError(
                f"{values['panel'].at}: there is no panel {_shown(values['panel'].text)}"
            )
        panel = panels.index(values["panel"].text)
    return BadRegion(low=(bounds[0], bounds[1]), high=(bounds[2], bounds[3]), panel=panel)


# -------------------------------------------------------------------------------- unit cells

_LATTICES = (
    "triclinic", "monoclinic", "orthorhombic", "tetragonal", "rhombohedral", "hexagonal", "cubic",
)  # fmt: skip
_CELL_LENGTHS = ("a", "b", "c")
_CELL_ANGLES = ("al", "be", "ga")


def parse_cell(text: str, source: str = "cell") -> UnitCell:
    """The cell of a CrystFEL ``.cell`` file, or of the ``CRYST1`` line of a PDB file.

    Args:
        text: of the file.
        source: its name in messages.

    Raises:
        FormatError: what is wrong, in which line, and what to do.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("CRYST1"):
            return _cell_of_pdb(line, f"{source}:{number}")
    values: dict[str, _Value] = {}
    for number, line in enumerate(lines, 1):
        at = f"{source}:{number}"
        line = line.split(";", 1)[0].strip()
        if not line or line.startswith("CrystFEL unit cell file"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not value:
            raise FormatError(f"{at}: expected `name = value`, found {_shown(line)}")
        names = (*_CELL_LENGTHS, *_CELL_ANGLES, "lattice_type", "centering", "unique_axis")
        if key not in names:
            raise FormatError(f"{at}: {_unknown(key, names)}")
        values[key] = _Value(value, at)
    numbers = []
    for name in (*_CELL_LENGTHS, *_CELL_ANGLES):
        if name not in values:
            raise FormatError(f"{source}: no {name}: a reference cell needs all six numbers")
        is_length = name in _CELL_LENGTHS
        units = {"A": 1.0, "nm": 10.0} if is_length else {"deg": 1.0, "rad": 180.0 / math.pi}
        numbers.append(values[name].with_unit(units, "A" if is_length else "deg"))
    lattice = values["lattice_type"].text if "lattice_type" in values else "triclinic"
    if lattice not in _LATTICES:
        raise FormatError(f"{values['lattice_type'].at}: {_unknown(lattice, _LATTICES)}")
    centering = values["centering"].text if "centering" in values else "P"
    if centering not in tuple("PABCIFRH"):
        raise FormatError(
            f"{values['centering'].at}: centering {_shown(centering)} is not one of P A B C I F R H"
        )
    axis = values["unique_axis"].text if "unique_axis" in values else "*"
    if axis not in ("a", "b", "c", "*", "?"):
        raise FormatError(f"{values['unique_axis'].at}: the unique axis is a, b, c or *")
    if axis in "*?" and lattice in ("monoclinic", "tetragonal", "hexagonal"):
        raise FormatError(f"{source}: no unique_axis, which a {lattice} cell has: a, b or c")
    return _checked_cell(numbers, lattice, centering, axis, values["a"].at)


def format_cell(cell: UnitCell) -> str:
    """The text of a ``.cell`` file."""
    lines = [
        "CrystFEL unit cell file version 1.0",
        "",
        f"lattice_type = {cell.lattice_type}",
        f"centering = {cell.centering}",
    ]
    if cell.unique_axis in ("a", "b", "c"):
        lines.append(f"unique_axis = {cell.unique_axis}")
    lines.append("")
    numbers = cell.as_array()
    lines += [f"{n} = {v:.4f} A" for n, v in zip(_CELL_LENGTHS, numbers[:3], strict=True)]
    lines += [f"{n} = {v:.4f} deg" for n, v in zip(_CELL_ANGLES, numbers[3:], strict=True)]
    return "\n".join(lines) + "\n"


def _cell_of_pdb(line: str, at: str) -> UnitCell:
    columns = ((6, 15), (15, 24), (24, 33), (33, 40), (40, 47), (47, 54))
    numbers = [_number(line[first:last].strip(), at) for first, last in columns]
    centering = line[55:56].strip() or "P"
    if centering not in tuple("PABCIFRH"):
        raise FormatError(f"{at}: the space group begins with {_shown(centering)}")
    return _checked_cell(numbers, "triclinic", centering, "*", at)


def _checked_cell(
    numbers: Sequence[float], lattice: str, centering: str, axis: str, at: str
) -> UnitCell:
    cosines = [math.cos(math.radians(angle)) for angle in numbers[3:]]
    square = 1 + 2 * math.prod(cosines) - sum(c * c for c in cosines)
    if not all(1 <= n <= 1e5 for n in numbers[:3]):
        raise FormatError(f"{at}: axes {numbers[:3]} Å: expected 1 Å or more")
    if not all(0 < n < 180 for n in numbers[3:]) or square <= 1e-6:
        raise FormatError(f"{at}: angles {list(numbers[3:])} deg cannot make a cell")
    return UnitCell(
        a_A=numbers[0],
        b_A=numbers[1],
        c_A=numbers[2],
        alpha_deg=numbers[3],
        beta_deg=numbers[4],
        gamma_deg=numbers[5],
        lattice_type=lattice,
        centering=centering,
        unique_axis=axis,
    )


# -------------------------------------------------------------------------------- frame lists


def read_frames(path: PathLike) -> tuple[Frame, ...]:
    """Reads a list of frames (``.lst``): per line a file and, after a space, an event ``//n``.

    Returns:
        frames with absolute paths; relative ones are relative to the list's folder.

    Raises:
        FormatError: what is wrong, in which line. That the files exist is not checked.
    """
    folder = Path(os.path.abspath(path)).parent
    return parse_frames(read_text(path), os.fspath(path), folder)


def parse_frames(text: str, source: str = "list", folder: PathLike = "/") -> tuple[Frame, ...]:
    """The same from text; ``source`` is its name in messages. Raises FormatError."""
    frames = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        head, _, tail = line.rpartition(" ")
        path, event = (head.rstrip(), tail) if head and "//" in tail else (line, "")
        if "\0" in path or (event and not _EVENT.fullmatch(event)):
            raise FormatError(
                f"{source}:{number}: expected a file and perhaps an event such as //3, found "
                f"{_shown(line)}"
            )
        path = os.path.normpath(os.path.join(os.fspath(folder), path))
        frames.append(Frame(path=path, event=event))
    return tuple(frames)


def format_frames(frames: Iterable[Frame], folder: PathLike | None = None) -> str:
    """The text of a list; paths relative to ``folder`` where given."""

    def line(frame: Frame) -> str:
        if folder is None:
            return str(frame)
        return str(Frame(path=os.path.relpath(frame.path, folder), event=frame.event))

    return "".join(f"{line(frame)}\n" for frame in frames)


def all_frames(geometry: Geometry, frames: Iterable[Frame]) -> tuple[Frame, ...]:
    """The frames, where those without an event stand for all frames of their file (as CrystFEL's).

    Raises:
        FormatError: a file that cannot be read, or whose frames cannot be counted.
    """
    plane = geometry.planes[0]
    if "%" not in plane.dims and "%" not in plane.data:
        return tuple(frames)
    found: list[Frame] = []
    for frame in frames:
        if frame.event:
            found.append(frame)
            continue
        if "%" in plane.data:
            raise FormatError(
                f"{frame.path}: data = {plane.data} needs an event for each frame: write lines "
                "such as `file.h5 entry//`; CrystFEL's list_events makes them"
            )
        with _open(frame.path) as file:
            node = file.get(plane.data)
            if not isinstance(node, h5py.Dataset) or node.ndim != len(plane.dims):
                raise FormatError(
                    f"{frame.path}: {plane.data} is no dataset with {len(plane.dims)} axes: check "
                    "`data` and the dims of the .geom"
                )
            counts = [node.shape[axis] for axis, dim in enumerate(plane.dims) if dim == "%"]
        found += [
            Frame(path=frame.path, event="//" + "/".join(map(str, index)))
            for index in np.ndindex(*counts)
        ]
    return tuple(found)


_EVENT = re.compile(r"[^\s]*?//[0-9]{0,9}(?:/[0-9]{1,9})*")


# -------------------------------------------------------------------------------- images


def read_images(geometry: Geometry, frames: Iterable[Frame]) -> Iterator[NDArray[Any]]:
    """The slabs (R, C) of the frames, one after the other, in the data type of the file.

    A file is opened once for all its consecutive frames.

    Raises:
        FormatError: a file, dataset or event that is not there or does not fit the geometry.
    """
    file: h5py.File | None = None
    try:
        for frame in frames:
            if file is None or frame.path != file.filename:
                if file is not None:
                    file.close()
                file = _open(frame.path)
            yield _slab(geometry, file, frame)
    finally:
        if file is not None:
            file.close()


def read_image(geometry: Geometry, frame: Frame) -> NDArray[Any]:
    """The slab (R, C) of one frame. Raises FormatError."""
    return next(read_images(geometry, (frame,)))


def good_pixels(
    geometry: Geometry, frame: Frame | None = None, masks: Sequence[Mask] | None = None
) -> BoolArray:
    """(R, C) pixels that may be used: on a panel, not in a bad region, not masked.

    Args:
        geometry: with regions and masks.
        frame: whose file holds the masks; may be None where no mask is in the data.
        masks: None = all of the geometry's.

    Raises:
        FormatError: a mask that is not there.
    """
    good = (geometry.panel_index >= 0).copy()
    for panel, (fs0, fs1, ss0, ss1) in enumerate(geometry.window):
        row = geometry.row_offset[panel]
        view = good[row + ss0 : row + ss1 + 1, fs0 : fs1 + 1]
        if geometry.bad_panels[panel]:
            view[:] = False
        elif edge := geometry.edge_px[panel]:
            view[:edge], view[-edge:], view[:, :edge], view[:, -edge:] = (False,) * 4
    for region in geometry.bad_regions:
        low, high = region.low, region.high
        if region.panel is None:
            xy = (
                geometry.pixel_positions_m[..., :2]
                * geometry.res_per_m[geometry.panel_index][..., None]
            )
            good &= ~((xy >= low) & (xy <= high)).all(-1)
            continue
        for panel in range(len(geometry.panels)) if region.panel < 0 else (region.panel,):
            row, (fs0, fs1, ss0, ss1) = geometry.row_offset[panel], geometry.window[panel]
            fs = slice(max(math.ceil(low[0]), fs0), max(math.floor(min(high[0], fs1)) + 1, 0))
            ss0, ss1 = max(math.ceil(low[1]), ss0), max(math.floor(min(high[1], ss1)) + 1, 0)
            good[row + ss0 : row + ss1, fs] = False
    return good & unmasked(geometry, frame, geometry.masks if masks is None else masks)


def unmasked(
    geometry: Geometry, frame: Frame | None, masks: Sequence[Mask]
) -> BoolArray | np.bool_:
    """(R, C), or one True, where no mask says that a pixel is bad; see ``good_pixels``."""
    good: BoolArray | np.bool_ = np.True_
    for mask in masks:
        path = mask.file or (frame.path if frame else "")
        if not path:
            raise FormatError(f"the mask {mask.data} is in the frames' files: a frame is needed")
        with _open(path) as file:
            event = frame.event if frame else ""
            planes = [replace(plane, data=mask.data) for plane in geometry.planes]
            bits = _stacked(geometry, file, planes, event, is_mask=True).astype(np.int64)
        good = good & (bits & mask.good_bits == mask.good_bits) & (bits & mask.bad_bits == 0)
    return good


def masks_by_frame(geometry: Geometry, path: str) -> tuple[Mask, ...]:
    """Those masks that are not the same for all frames of a file. Raises FormatError."""
    dims = geometry.planes[0].dims

    def has_frames(mask: Mask) -> bool:
        if "%" in mask.data or "%" not in dims:
            return "%" in mask.data
        with _open(mask.file or path) as file:
            node = file.get(mask.data)
            return isinstance(node, h5py.Dataset) and node.ndim == len(dims)

    return tuple(mask for mask in geometry.masks if has_frames(mask))


def _open(path: str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be opened as HDF5: {error}") from error


def _slab(geometry: Geometry, file: h5py.File, frame: Frame) -> NDArray[Any]:
    return _stacked(geometry, file, geometry.planes, frame.event)


def _stacked(
    geometry: Geometry,
    file: h5py.File,
    planes: Sequence[Plane],
    event: str,
    is_mask: bool = False,
) -> NDArray[Any]:
    shape = geometry.plane_rows, geometry.shape[1]
    planes, modules = _together(tuple(planes))
    found = [_plane_data(file, plane, event, shape, is_mask, modules) for plane in planes]
    return found[0] if len(found) == 1 else np.concatenate(found)


@lru_cache(maxsize=64)
def _together(planes: tuple[Plane, ...]) -> tuple[tuple[Plane, ...], _Modules | None]:
    """Planes as one that is read at once, where they differ in one fixed index only."""
    first = planes[0]
    columns = list(zip(*(plane.dims for plane in planes), strict=False))
    varied = [axis for axis, column in enumerate(columns) if len(set(column)) > 1]
    is_alike = len({(plane.data, len(plane.dims)) for plane in planes}) == 1 and len(varied) == 1
    if not is_alike or not all(isinstance(dim, int) for dim in columns[varied[0]]):
        return planes, None
    numbers = np.array(columns[varied[0]])
    if np.ptp(numbers) >= 2 * len(numbers):  # most of what lies between is of no use
        return planes, None
    return (first,), _Modules(axis=varied[0], numbers=numbers)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Modules:
    """Which of the modules along an axis of the data are stacked on the slab."""

    axis: int
    numbers: IntArray


def _plane_data(
    file: h5py.File,
    plane: Plane,
    event: str,
    shape: tuple[int, int],
    is_mask: bool,
    modules: _Modules | None,
) -> NDArray[Any]:
    names, _, numbers = event.partition("//")
    where = f"{file.filename}: {plane.data}"
    data = plane.data
    for name in names.split("/") if names else ():
        data = data.replace("%", name, 1)
    try:
        node = file[data]
    except (KeyError, ValueError) as error:
        raise FormatError(f"{where}: there is no such dataset ({error})") from error
    if not isinstance(node, h5py.Dataset):
        raise FormatError(f"{where}: is a group, and must be a dataset: check `data` of the .geom")
    dims: tuple[Any, ...] = plane.dims
    if modules:
        dims = (*dims[: modules.axis], modules, *dims[modules.axis + 1 :])
    events = [int(n) for n in numbers.split("/") if n]
    if is_mask and node.ndim == len(dims) - dims.count("%"):  # one for all frames
        dims, events = tuple(dim for dim in dims if dim != "%"), []
    if node.ndim != len(dims):
        raise FormatError(f"{where}: has {node.ndim} axes, while the .geom has {len(dims)} dims")
    if len(events) != dims.count("%"):
        raise FormatError(
            f"{where}: event {'//' + numbers!r} has {len(events)} numbers, while the dims have "
            f"{dims.count('%')} %: write list lines such as `file.h5 //0`"
        )
    index: list[int | slice] = []
    for axis, dim in enumerate(dims):
        size = node.shape[axis]
        if dim in ("ss", "fs"):
            need = shape[dim == "fs"]
            if size < need:
                raise FormatError(f"{where}: {size} px along {dim}, while the .geom needs {need}")
            index.append(slice(0, need))
            continue
        if isinstance(dim, _Modules):
            low, at = int(dim.numbers.min()), int(dim.numbers.max())
            index.append(slice(low, at + 1))
        else:
            at = events.pop(0) if dim == "%" else int(dim)
            index.append(at)
        if at >= size:
            raise FormatError(f"{where}: number {at} of an axis with {size} (counted from 0)")
    try:
        data = node[tuple(index)]
        if modules is None:
            return data
        along = sum(isinstance(i, slice) for i in index[: dims.index(modules)])
        stack = np.moveaxis(data, along, 0)
        return stack[modules.numbers - modules.numbers.min()].reshape(-1, shape[1])
    except (OSError, ValueError) as error:
        raise FormatError(f"{where}: cannot be read: {error}") from error


# -------------------------------------------------------------------------------- text


def read_text(path: PathLike) -> str:
    """A text file whatever its bytes. Raises FormatError where it cannot be read, or is huge."""
    try:
        size = os.stat(path).st_size
        if size > MAX_TEXT_BYTES:
            raise FormatError(f"{os.fspath(path)}: {size / 2**20:.0f} MB is no file of this kind")
        return Path(path).read_bytes().decode("utf-8", errors="replace")
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


def digest(*texts: str) -> str:
    """16 hexadecimal digits that change with the texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
