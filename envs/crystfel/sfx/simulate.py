"""Simulated SFX experiments: frames of known crystals, in files that CrystFEL reads.

A frame is the sum of diffuse scattering with a solvent ring, the Bragg spots of perhaps a crystal
or two, and what a detector adds: photon and read noise with charge sharing, gain errors, pixels
that flicker and faint blobs that are no reflections. Weak crystals and such junk are what makes an
optimum of the peak finder's parameters: without them every crystal indexes at any setting.

Model: still images on the Ewald sphere; a reflection of excitation error e (1/Å off the sphere) is
recorded with partiality exp(-e^2 / 2 w^2), w from profile radius, mosaicity and bandwidth; Wilson's
intensities (A. J. C. Wilson, Acta Cryst. 2 (1949) 318) with a B factor, equal under the Laue group;
log-normal crystal volumes. Photon noise has Poisson's first three cumulants to leading order
(E. A. Cornish, R. A. Fisher, Rev. Int. Stat. Inst. 5 (1938) 307).

Shape letters: R rows and C columns of the slab (see ``formats``), N frames, M crystals, H
reflections, S spots.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from envs.crystfel.experiment import (
    CELL_FILE,
    FRAMES_FILE,
    GEOMETRY_FILE,
    PARAMETERS_FILE,
    TRUTH_FILE,
    Experiment,
    read_experiment,
)
from envs.crystfel.sfx.formats import (
    HC_EV_A,
    BadRegion,
    Geometry,
    Mask,
    PathLike,
    Plane,
    format_cell,
    format_frames,
    format_geometry,
)
from envs.crystfel.types import BoolArray, FloatArray, Frame, IntArray, Parameters, UnitCell

LYSOZYME = UnitCell(
    a_A=79.2, b_A=79.2, c_A=38.0, lattice_type="tetragonal", centering="P", unique_axis="c"
)
"""Hen egg-white lysozyme, P4(3)2(1)2."""

_FAINTEST_PHOTONS = 1.0
"""Of a spot that is drawn."""

OnStep = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What an experiment is like. Lengths on the detector in px, intensities in photons."""

    # detector
    detector: str = "plate"
    """``plate``: one panel of 1024 x 1024 px. ``modules``: 16 of 512 x 128 px around a hole, each
    in 8 tiles with gaps, kept along an axis of their own (as an AGIPD's are)."""
    pixel_m: float = 200e-6
    clen_m: float = 0.120
    photon_energy_eV: float = 9300.0
    photon_energy_jitter: float = 0.0015
    """Standard deviation between shots, of the energy."""
    adu_per_photon: float = 2.2
    read_noise_photons: float = 0.3
    charge_sharing: float = 0.4
    """Amplitude of noise that a pixel gives to its neighbours: why noise makes peaks of two px."""
    gain_error: float = 0.02
    dead_pixels: float = 0.0005
    """Fraction that is masked."""
    beamstop_px: float = 20.0
    # sample
    cell: UnitCell = LYSOZYME
    hit_rate: float = 0.7
    second_crystal_rate: float = 0.04
    scale_photons: float = 135.0
    """Of a full reflection of mean intensity at low resolution, in the median crystal."""
    scale_sigma: float = 1.0
    """Standard deviation of the logarithm of a crystal's scale."""
    b_factor_A2: float = 20.0
    resolution_A: float = 1.8
    profile_radius_per_A: float = 0.0004
    mosaicity_rad: float = 0.0008
    bandwidth: float = 0.002
    spot_sigma_px: float = 0.62
    # background
    background_photons: float = 12.0
    ring_photons: float = 9.0
    """At the maximum of the solvent ring, 3.3 Å."""
    background_sigma: float = 0.25
    """Standard deviation of the logarithm of a frame's background."""
    # junk
    num_flickering: float = 1000.0
    """Single pixels with a signal of their own, in the mean frame."""
    flicker_photons: float = 12.0
    """Mean of their exponential distribution."""
    num_grains: float = 110000.0
    """Faint grains of the background (scattering of solvent and jet) in the mean frame."""
    grain_strength: float = 2.75
    """Of a grain's brightest pixel, in standard deviations of the noise around it."""
    num_blobs: float = 8.0
    """Bright blobs that are no reflections, in the mean frame."""
    blob_photons: float = 20.0
    """Mean of the exponential distribution of what a blob holds."""
    blob_sigma_px: float = 0.6
    # what the user has wrong, and what changes during the run
    clen_error_percent: float = 0.0
    """The user's distance = the true one x (1 + error / 100)."""
    centre_error_px: tuple[float, float] = (0.0, 0.0)
    """The user's beam centre minus the true one, x and y."""
    drift_clen_percent: float = 0.0
    """By how much the true distance has changed at the last frame."""
    drift_background: float = 1.0
    """By what factor the background has changed at the last frame."""
    nominal: Parameters = dataclasses.field(default_factory=Parameters)


PRESETS: dict[str, Preset] = {
    "clean": Preset(
        hit_rate=0.9,
        scale_photons=400.0,
        scale_sigma=0.5,
        background_photons=4.0,
        ring_photons=2.0,
        num_grains=5000.0,
        num_flickering=50.0,
        num_blobs=1.0,
    ),
    "lysozyme": Preset(),
    "weak": Preset(scale_photons=70.0, hit_rate=0.5),
    "hard": Preset(
        hit_rate=0.4,
        second_crystal_rate=0.15,
        scale_photons=120.0,
        scale_sigma=1.1,
        background_photons=18.0,
        ring_photons=16.0,
        background_sigma=0.5,
        grain_strength=3.0,
        num_flickering=2000.0,
        num_blobs=20.0,
        gain_error=0.05,
        clen_error_percent=-3.0,
        centre_error_px=(2.0, -2.0),
    ),
    "bad-geometry": Preset(clen_error_percent=3.5, centre_error_px=(-2.5, 2.0)),
    "modules": Preset(detector="modules", clen_m=0.125),
    "modules-bad-geometry": Preset(
        detector="modules", clen_m=0.125, clen_error_percent=-3.2, centre_error_px=(2.0, 2.5)
    ),
    "drift": Preset(drift_clen_percent=4.0, drift_background=1.6),
}
"""``lysozyme`` is the reference: its response curves are those measured with CrystFEL 0.12 on such
frames (an optimum at min_snr 5, a cliff below 4, no gradient beyond 4 % of distance)."""


class SimulationError(ValueError):
    """A simulation that cannot be made; the message says why."""


# ------------------------------------------------------------------------------ the experiment


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What all frames of an experiment share; drawn once from the seed."""

    preset: Preset
    geometry: Geometry
    """The true one."""
    background: NDArray[np.float32]
    """(R, C) expected photons without a crystal."""
    gain: NDArray[np.float32]
    """(R, C) ADU per photon."""
    good: BoolArray
    """(R, C)"""
    dead: BoolArray
    """(R, C) what the mask of the files says."""
    grains: NDArray[np.float32]
    """(R, C) faint grains of the background in standard deviations of the noise; shifted at random
    from frame to frame."""
    hkl: IntArray
    """(H, 3) without the absent ones, strongest first."""
    intensity: FloatArray
    """(H,) photons of a full reflection in the median crystal."""


def make_world(preset: Preset, seed: int) -> World:
    """Draws what the frames of an experiment have in common."""
    if preset.detector not in ("plate", "modules"):
        raise SimulationError(f"{preset.detector!r} is no detector: plate or modules")
    rng = np.random.default_rng([seed, 0xA11])
    geometry = _plate(preset) if preset.detector == "plate" else _modules(preset, rng)
    is_panel = geometry.panel_index >= 0
    panel_gain = 1 + preset.gain_error * rng.standard_normal(len(geometry.panels))
    gain = 1 + preset.gain_error * rng.standard_normal(geometry.shape)
    gain *= np.where(is_panel, panel_gain[geometry.panel_index], 1.0)
    dead = (rng.random(geometry.shape) < preset.dead_pixels) & is_panel
    good = is_panel & ~dead & (geometry.radius_px > preset.beamstop_px)
    grains = _grains(preset, geometry.shape, rng)
    hkl = _reflections(preset)
    intensity = _intensities(preset, hkl, rng)
    order = np.argsort(-intensity, kind="stable")
    return World(
        preset=preset,
        geometry=geometry,
        background=_background(preset, geometry),
        gain=(preset.adu_per_photon * np.maximum(gain, 0.1)).astype(np.float32),
        good=good,
        dead=dead,
        grains=grains,
        hkl=hkl[order],
        intensity=intensity[order],
    )


def _plate(preset: Preset) -> Geometry:
    side = 1024
    return Geometry(
        panels=("p0",),
        window=np.array([[0, side - 1, 0, side - 1]]),
        plane_index=np.zeros(1, dtype=int),
        planes=(Plane(data="/entry/data/data", dims=("%", "ss", "fs")),),
        fs_vector=np.array([[1.0, 0.0, 0.0]]),
        ss_vector=np.array([[0.0, 1.0, 0.0]]),
        corner_px=np.array([[-512.4, -511.7]]),  # the beam never hits a corner of a pixel exactly
        coffset_m=np.zeros(1),
        res_per_m=np.full(1, 1 / preset.pixel_m),
        clen_m=preset.clen_m,
        photon_energy_eV=preset.photon_energy_eV,
        adu_per_photon=preset.adu_per_photon,
        bad_regions=(_beamstop(preset),),
        masks=(Mask(data="/entry/data/mask", good_bits=0, bad_bits=0xFFFF),),
    )


def _modules(preset: Preset, rng: np.random.Generator) -> Geometry:
    """Four quadrants of four modules around a hole; long sides along x, tiles of 64 px along it."""
    tiles, rows, columns, gap = 8, 64, 128, 2  # px, as an AGIPD has them
    names, window, plane_index, fs, ss, corner, coffset = [], [], [], [], [], [], []
    for module in range(16):
        quadrant, place = divmod(module, 4)
        # Quadrants: upper left, upper right, lower right, lower left, each moved on round the beam
        # by the side of the hole that they leave.
        side_x, side_y = ((-1, 1), (1, 1), (1, -1), (-1, -1))[quadrant]
        move_x, move_y = ((-1, 0), (0, 1), (1, 0), (0, -1))[quadrant]
        x0 = 8.0 * side_x + 20.0 * move_x
        y0 = side_y * (8.0 + (columns + 30) * place) + 20.0 * move_y
        angle, tilt = rng.normal(0.0, 0.002), rng.normal(0.0, 0.3, 2)
        along, across = _turned(side_x, angle), _turned(side_y * 1j, angle)
        for tile in range(tiles):
            start = complex(x0 + tilt[0], y0 + tilt[1]) + along * tile * (rows + gap)
            names.append(f"p{module}a{tile}")
            window.append([0, columns - 1, tile * rows, (tile + 1) * rows - 1])
            plane_index.append(module)
            ss.append([along.real, along.imag, 0.0])
            fs.append([across.real, across.imag, 0.0])
            corner.append([start.real, start.imag])
            coffset.append(0.0)
    return Geometry(
        panels=tuple(names),
        window=np.array(window),
        plane_index=np.array(plane_index),
        planes=tuple(
            Plane(data="/entry/data/data", dims=("%", module, "ss", "fs")) for module in range(16)
        ),
        fs_vector=np.array(fs),
        ss_vector=np.array(ss),
        corner_px=np.array(corner),
        coffset_m=np.array(coffset),
        res_per_m=np.full(len(names), 1 / preset.pixel_m),
        clen_m=preset.clen_m,
        photon_energy_eV=preset.photon_energy_eV,
        adu_per_photon=preset.adu_per_photon,
        bad_regions=(_beamstop(preset),),
        masks=(Mask(data="/entry/data/mask", good_bits=0, bad_bits=0xFFFF),),
    )


def _turned(direction: complex, angle: float) -> complex:
    return direction * complex(math.cos(angle), math.sin(angle))


def _beamstop(preset: Preset) -> BadRegion:
    r = preset.beamstop_px
    return BadRegion(low=(-r, -r), high=(r, r), panel=None)


def _background(preset: Preset, geometry: Geometry) -> NDArray[np.float32]:
    """Air scattering that falls off, and a ring of the solvent (water: 3.3 Å, so s = 0.30 1/Å)."""
    xyz = geometry.pixel_positions_m
    cosine = xyz[..., 2] / np.linalg.norm(xyz, axis=-1)
    s = np.sqrt(np.maximum(2 * (1 - cosine), 0)) / geometry.wavelength_A
    air = preset.background_photons * (0.35 + 0.65 * np.exp(-((s / 0.22) ** 2)) + np.exp(-s / 0.02))
    ring = preset.ring_photons * np.exp(-(((s - 0.30) / 0.05) ** 2) / 2)
    polarisation_and_angle = cosine**3  # solid angle of a flat pixel
    return np.nan_to_num((air + ring) * polarisation_and_angle).astype(np.float32)


def _grains(
    preset: Preset, shape: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float32]:
    n = rng.poisson(preset.num_grains)
    grains = np.zeros(shape, dtype=np.float32)
    fs, ss = rng.random(n) * shape[1], rng.random(n) * shape[0]
    total = np.full(n, preset.grain_strength / _in_brightest(preset.blob_sigma_px))
    _add_spots(grains, None, fs, ss, None, total, preset.blob_sigma_px)
    return grains


def _in_brightest(sigma_px: float) -> float:
    """Share of a Gaussian spot in the pixel that it is centred on."""
    return float(2 * ndtr(0.5 / sigma_px) - 1) ** 2


def _reflections(preset: Preset) -> IntArray:
    rows = preset.cell.reciprocal_per_A()
    direct = np.linalg.norm(np.linalg.inv(rows), axis=0)
    most = np.floor(direct / preset.resolution_A).astype(int)
    grid = np.meshgrid(*(np.arange(-m, m + 1) for m in most), indexing="ij")
    hkl = np.stack([axis.ravel() for axis in grid], axis=1)
    length = np.linalg.norm(hkl @ rows, axis=1)
    hkl = hkl[(length > 0) & (length < 1 / preset.resolution_A)]
    return hkl[~_absent(hkl, preset.cell)].astype(np.int32)


def _absent(hkl: IntArray, cell: UnitCell) -> BoolArray:
    if cell.centering != "P" or cell.lattice_type != "tetragonal":
        return ~cell.allows(hkl)
    h, k, l = hkl.T  # noqa: E741
    # P4(3)2(1)2: 00l with l = 4n only, h00 and 0k0 with even indices only.
    return (
        ((h == 0) & (k == 0) & (l % 4 != 0))
        | ((k == 0) & (l == 0) & (h % 2 != 0))
        | ((h == 0) & (l == 0) & (k % 2 != 0))
    )


def _intensities(preset: Preset, hkl: IntArray, rng: np.random.Generator) -> FloatArray:
    unique = np.abs(hkl)
    if preset.cell.lattice_type in ("tetragonal", "cubic"):  # 4/mmm; cubic: good enough
        unique[:, :2] = np.sort(unique[:, :2], axis=1)
    table = rng.exponential(size=tuple(unique.max(axis=0) + 1))
    s2 = ((hkl @ preset.cell.reciprocal_per_A()) ** 2).sum(axis=1)
    falloff = np.exp(-preset.b_factor_A2 * s2 / 2)
    return preset.scale_photons * table[tuple(unique.T)] * falloff


# ------------------------------------------------------------------------------ a frame


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameTruth:
    """What a frame shows; M crystals, none in a blank."""

    reciprocal_per_A: FloatArray
    """(M, 3, 3) rows a*, b*, c* in the laboratory."""
    scale: FloatArray
    """(M,) relative to the median crystal."""
    photon_energy_eV: float
    clen_m: float
    background: float
    """Factor of the frame's background."""


def draw_frame(
    world: World, rng: np.random.Generator, share: float = 0.0
) -> tuple[NDArray[np.float32], FrameTruth]:
    """One frame.

    Args:
        world: of the experiment.
        rng: of the frame.
        share: how far through the run it is, 0 to 1 (for drifts).

    Returns:
        (R, C) ADU, not rounded, and what it shows.
    """
    preset = world.preset
    geometry = world.geometry
    if preset.drift_clen_percent:
        moved = Parameters(clen_offset_percent=share * preset.drift_clen_percent)
        geometry = geometry.moved(moved)
    level = preset.drift_background**share * math.exp(
        preset.background_sigma * rng.standard_normal()
    )
    energy = preset.photon_energy_eV * (1 + preset.photon_energy_jitter * rng.standard_normal())
    num_crystals = int(rng.random() < preset.hit_rate)
    num_crystals += num_crystals * int(rng.random() < preset.second_crystal_rate)
    bases = preset.cell.reciprocal_per_A() @ _rotations(rng, num_crystals).transpose(0, 2, 1)
    scale = np.exp(preset.scale_sigma * rng.standard_normal(num_crystals))
    photons = world.background * np.float32(level)
    for basis, factor in zip(bases, scale, strict=True):
        fs, ss, panel, total = _spots(world, geometry, basis, factor, energy)
        _add_spots(photons, geometry, fs, ss, panel, total, preset.spot_sigma_px)
    _add_blobs(photons, world, rng)
    image = _detected(photons, world, rng)
    _add_flickering(image, world, rng)
    truth = FrameTruth(
        reciprocal_per_A=bases,
        scale=scale,
        photon_energy_eV=energy,
        clen_m=geometry.clen_m,
        background=level,
    )
    return image, truth


def _rotations(rng: np.random.Generator, n: int) -> FloatArray:
    """(n, 3, 3) uniform over all rotations (quaternions of a 4-D Gaussian)."""
    q = rng.standard_normal((n, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ).transpose(2, 0, 1)


def _spots(
    world: World, geometry: Geometry, basis: FloatArray, scale: float, energy: float
) -> tuple[FloatArray, FloatArray, IntArray, FloatArray]:
    """fs, ss, panel, photons (S,) of the reflections that a crystal shows."""
    preset = world.preset
    k = energy / HC_EV_A
    n = int(np.searchsorted(-world.intensity, -_FAINTEST_PHOTONS / scale))
    q = world.hkl[:n].astype(np.float32) @ basis.astype(np.float32)
    s2 = np.einsum("hi,hi->h", q, q)
    # Off the Ewald sphere by |q + k z| - k; its square is s2 + 2 k q_z + k^2.
    excitation = np.sqrt(np.maximum(s2 + 2 * k * q[:, 2] + k * k, 0)) - k
    width2 = preset.profile_radius_per_A**2 + preset.mosaicity_rad**2 * s2
    # A band of wavelengths thickens the sphere by q_z = s2 / 2k per unit of dk / k.
    width2 = width2 + (preset.bandwidth * s2 / (2 * k)) ** 2
    x = excitation**2 / width2
    near = x < 12.0
    q, total = q[near].astype(float), scale * world.intensity[:n][near] * np.exp(-x[near] / 2)
    bright = total > _FAINTEST_PHOTONS
    q, total = q[bright], total[bright]
    fs, ss, panel = geometry.locate(q + np.array([0.0, 0.0, k]))
    on = panel >= 0
    return fs[on], ss[on], panel[on], total[on]


def _add_spots(
    photons: NDArray[np.float32],
    geometry: Geometry | None,
    fs: FloatArray,
    ss: FloatArray,
    panel: IntArray | None,
    total: FloatArray,
    sigma_px: float,
) -> None:
    """Adds Gaussian spots, integrated over the pixels; what falls beyond the panel is lost."""
    if not len(fs):
        return
    half = max(math.ceil(3 * sigma_px), 2)
    offsets = np.arange(-half, half + 1)
    columns = np.floor(fs).astype(int)[:, None] + offsets
    rows = np.floor(ss).astype(int)[:, None] + offsets

    def profile(first: IntArray, centre: FloatArray) -> FloatArray:
        edges = np.column_stack([first, first[:, -1] + 1]) - centre[:, None]
        return np.diff(ndtr(edges / sigma_px), axis=1)

    values = total[:, None, None] * profile(rows, ss)[:, :, None] * profile(columns, fs)[:, None, :]
    r, c = np.broadcast_arrays(rows[:, :, None], columns[:, None, :])
    inside = (r >= 0) & (c >= 0) & (r < photons.shape[0]) & (c < photons.shape[1])
    at = np.where(inside, r * photons.shape[1] + c, 0)
    if geometry is not None and panel is not None:
        inside &= geometry.panel_index.ravel()[at] == panel[:, None, None]
    np.add.at(photons.ravel(), at[inside], values[inside].astype(np.float32))


def _add_blobs(photons: NDArray[np.float32], world: World, rng: np.random.Generator) -> None:
    preset, geometry = world.preset, world.geometry
    n = rng.poisson(preset.num_blobs)
    fs, ss = rng.random(n) * photons.shape[1], rng.random(n) * photons.shape[0]
    total = rng.exponential(preset.blob_photons, n)
    panel = geometry.panel_index[ss.astype(int), fs.astype(int)]
    on = panel >= 0
    _add_spots(photons, geometry, fs[on], ss[on], panel[on], total[on], preset.blob_sigma_px)


def _detected(
    photons: NDArray[np.float32], world: World, rng: np.random.Generator
) -> NDArray[np.float32]:
    """ADU with noise of the third-order Cornish-Fisher kind; in place where it can be."""
    preset, share = world.preset, np.float32(world.preset.charge_sharing)
    z = rng.standard_normal(photons.shape, dtype=np.float32)
    if share:
        shared = z.copy()
        shared[:, 1:] += share * z[:, :-1]
        shared[1:] += share * z[:-1]
        z = shared
        z *= np.float32(1 / math.sqrt(1 + 2 * share**2))
    adu = photons + np.float32(preset.read_noise_photons**2)
    np.sqrt(adu, out=adu)
    skewed = z * z  # skewness 1 / sqrt(mean): sqrt(mean) (z^2 - 1) / 6 / sqrt(mean) of it
    skewed -= 1
    skewed *= np.float32(1 / 6)
    z += np.roll(world.grains, rng.integers(z.size))  # over the flat array
    adu *= z
    adu += photons
    adu += skewed
    adu *= world.gain
    adu[~world.good] = 0
    return adu


def _add_flickering(image: NDArray[np.float32], world: World, rng: np.random.Generator) -> None:
    preset = world.preset
    n = rng.poisson(preset.num_flickering)
    at = rng.integers(image.size, size=n)
    adu = preset.adu_per_photon * rng.exponential(preset.flicker_photons, n)
    on = world.good.ravel()[at]
    image.ravel()[at[on]] += adu[on].astype(np.float32)


# ------------------------------------------------------------------------------ files


def simulate(
    preset: Preset | str,
    num_frames: int,
    seed: int,
    out: PathLike,
    *,
    dtype: str = "int16",
    frames_per_file: int = 250,
    num_processes: int = 1,
    force: bool = False,
    on_step: OnStep | None = None,
) -> Experiment:
    """Writes an experiment: ``.geom``, ``.cell``, ``.lst``, frames as HDF5, parameters and truth.

    The ``.geom`` is the user's, with the errors of the preset; the truth is in ``truth.npz`` only.
    Frame i of a seed is the same however many there are in all (drifts apart), however they are
    spread over files and processes, and whatever the data type.

    Args:
        preset: one, or the name of one of ``PRESETS``.
        num_frames: how many.
        seed: of everything that is drawn.
        out: folder to make; with ``force`` the files of an earlier simulation are replaced.
        dtype: of the frames: int16, uint16 or float32.
        frames_per_file: at most.
        num_processes: that share the work, file by file.
        force: see ``out``.
        on_step: told what is under way and its share done.

    Raises:
        SimulationError: an argument that makes no sense, or a folder that holds other things.
    """
    name = preset if isinstance(preset, str) else "custom"
    preset = named_preset(preset) if isinstance(preset, str) else preset
    for what, value in (
        ("the number of frames", num_frames),
        ("the number of frames per file", frames_per_file),
        ("the number of processes", num_processes),
    ):
        if value < 1:
            raise SimulationError(f"{what} is {value}, and must be 1 or more")
    if seed < 0:
        raise SimulationError(f"the seed is {seed}, and must be 0 or more")
    if dtype not in ("int16", "uint16", "float32"):
        raise SimulationError(f"{dtype!r} is no data type of frames: int16, uint16 or float32")
    target = _checked_target(out, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        truths = _write_frames(
            preset, num_frames, seed, scratch, dtype, frames_per_file, num_processes, on_step
        )
        world = make_world(preset, seed)
        _write_description(world, name, seed, scratch, truths)
        os.chmod(scratch, 0o777 & ~_umask())
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read_experiment(target)


def named_preset(name: str) -> Preset:
    """Raises SimulationError where there is none of this name."""
    if name not in PRESETS:
        raise SimulationError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def user_geometry(world: World) -> Geometry:
    """What the user believes: the true geometry with the errors of the preset."""
    return world.geometry.moved(
        Parameters(
            clen_offset_percent=world.preset.clen_error_percent,
            centre_x_offset_px=world.preset.centre_error_px[0],
            centre_y_offset_px=world.preset.centre_error_px[1],
        )
    )


def _checked_target(out: PathLike, force: bool) -> Path:
    target = Path(os.path.abspath(out))
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir():
        raise SimulationError(f"{target} is a file: name a folder")
    if not (target / TRUTH_FILE).exists():
        raise SimulationError(f"{target} holds other things: name a new folder")
    if not force:
        raise SimulationError(f"{target} holds a simulation already: name another, or use --force")
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_frames(
    preset: Preset,
    num_frames: int,
    seed: int,
    folder: Path,
    dtype: str,
    frames_per_file: int,
    num_processes: int,
    on_step: OnStep | None,
) -> list[FrameTruth]:
    starts = range(0, num_frames, frames_per_file)
    jobs = [
        (
            preset,
            seed,
            folder / f"frames-{number:03d}.h5",
            first,
            num_frames,
            frames_per_file,
            dtype,
        )
        for number, first in enumerate(starts)
    ]
    done: list[list[FrameTruth]] = [[] for _ in jobs]
    if num_processes == 1:
        for number, job in enumerate(jobs):

            def told(count: int, number: int = number) -> None:
                if on_step is not None:
                    on_step("frames", (number * frames_per_file + count) / num_frames)

            done[number] = _write_file(*job, told)
    else:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(_write_file, *job): n for n, job in enumerate(jobs)}
            for count, future in enumerate(as_completed(futures), 1):
                done[futures[future]] = future.result()
                if on_step is not None:
                    on_step("frames", count / len(jobs))
    return [truth for truths in done for truth in truths]


def _write_file(
    preset: Preset,
    seed: int,
    path: Path,
    first: int,
    num_frames: int,
    frames_per_file: int,
    dtype: str,
    told: Callable[[int], None] | None = None,
) -> list[FrameTruth]:
    world = make_world(preset, seed)
    count = min(frames_per_file, num_frames - first)
    shape = _file_shape(world.geometry)
    truths = []
    with h5py.File(path, "w") as file:
        group = file.create_group("entry/data")
        data = group.create_dataset("data", (count, *shape), dtype, chunks=(1, *shape))
        group.create_dataset("mask", data=world.dead.reshape(shape).astype(np.uint16))
        for i in range(count):
            number = first + i
            rng = np.random.default_rng([seed, 0xF4A, number])
            image, truth = draw_frame(world, rng, number / max(num_frames - 1, 1))
            data[i] = _stored(image, dtype).reshape(shape)
            truths.append(truth)
            if told is not None:
                told(i + 1)
    return truths


def _file_shape(geometry: Geometry) -> tuple[int, ...]:
    if len(geometry.planes) == 1:
        return geometry.shape
    return len(geometry.planes), geometry.plane_rows, geometry.shape[1]


def _stored(image: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    if dtype == "float32":
        return image
    limits = np.iinfo(dtype)
    np.rint(image, out=image)
    return np.clip(image, limits.min, limits.max, out=image).astype(dtype)


def _write_description(
    world: World, name: str, seed: int, folder: Path, truths: list[FrameTruth]
) -> None:
    geometry, preset = user_geometry(world), world.preset
    comment = f"simulated by ssl2rl sfx simulate: preset {name}, seed {seed}"
    (folder / GEOMETRY_FILE).write_text(format_geometry(geometry, comment=comment))
    (folder / CELL_FILE).write_text(format_cell(preset.cell))
    (folder / PARAMETERS_FILE).write_text(json.dumps(preset.nominal.as_dict(), indent=2) + "\n")
    frames = []
    for path in sorted(folder.glob("frames-*.h5")):
        with h5py.File(path, "r") as file:
            count = len(file["entry/data/data"])  # type: ignore[arg-type]
        frames += [Frame(path=str(path), event=f"//{i}") for i in range(count)]
    (folder / FRAMES_FILE).write_text(format_frames(frames, folder))
    crystals = np.array([len(truth.scale) for truth in truths])
    # The offsets that lead from the user's geometry to the true one, of the first frame.
    mine, theirs = world.geometry, geometry
    centre = np.array(preset.centre_error_px)
    np.savez_compressed(
        folder / TRUTH_FILE,
        crystal_frame=np.repeat(np.arange(len(truths)), crystals),
        reciprocal_per_A=np.concatenate([t.reciprocal_per_A for t in truths]),
        scale=np.concatenate([t.scale for t in truths]),
        num_crystals=crystals,
        photon_energy_eV=np.array([t.photon_energy_eV for t in truths]),
        background=np.array([t.background for t in truths]),
        clen_m=np.array([t.clen_m for t in truths]),
        clen_offset_percent=100 * (mine.distance_m / theirs.distance_m - 1),
        centre_x_offset_px=-centre[0],
        centre_y_offset_px=-centre[1],
        preset=json.dumps({"name": name, "seed": seed} | dataclasses.asdict(preset)),
    )
