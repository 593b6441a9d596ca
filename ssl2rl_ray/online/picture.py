"""A frame with its peaks, and the spots that its crystal should have, as a PNG.

Shape letters: R rows and C columns of the slab, H and W of the canvas, n points.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from envs.crystfel.experiment import Experiment
from envs.crystfel.sfx.formats import Geometry, good_pixels, read_image
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.types import FloatArray, Frame, Parameters

EXCITATION_PER_A = 0.0012
"""A reflection whose lattice point is nearer to the Ewald sphere is drawn."""


def draw_frame(
    search: EmbeddedIndexer, experiment: Experiment, parameters: Parameters, frame: Frame
) -> bytes:
    """PNG of a frame as the beam sees it; circles: peaks, squares: predicted spots.

    Raises:
        IndexerError: a frame that cannot be read.
        FormatError: the same.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    geometry = experiment.geometry.moved(parameters)
    ((peaks, crystal),) = search.crystals(parameters, [frame])
    image = np.where(
        good_pixels(experiment.geometry, frame), read_image(experiment.geometry, frame), np.nan
    )
    canvas, corner = assembled(image, geometry)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot()
    low, high = np.nanquantile(canvas, (0.02, 0.995)) if np.isfinite(canvas).any() else (0, 1)
    extent = (corner[0], corner[0] + canvas.shape[1], corner[1], corner[1] + canvas.shape[0])
    axes.imshow(
        canvas, origin="lower", extent=extent, cmap="gray_r", vmin=low, vmax=max(high, low + 1)
    )
    panel = geometry.panel_index[peaks.ss_px.astype(int), peaks.fs_px.astype(int)]
    where = _px(geometry.positions_m(peaks.fs_px, peaks.ss_px, panel), geometry)
    axes.plot(*where.T, "o", mfc="none", mec="#d55e00", ms=7, label=f"{len(peaks)} peaks")
    if crystal is not None:
        spots = _px(predicted(np.linalg.inv(crystal.basis_A).T, geometry), geometry)
        text = f"{len(spots)} spots of the crystal found"
        axes.plot(*spots.T, "s", mfc="none", mec="#0072b2", ms=5, mew=0.7, label=text)
    axes.plot(0, 0, "+", color="#009e73", ms=14, label="beam")
    is_hit = len(peaks) >= parameters.min_peaks
    state = "indexed" if crystal is not None else "hit, not indexed" if is_hit else "no hit"
    axes.set(
        title=f"{Path(frame.path).name} {frame.event}: {state}",
        xlabel="x (px from the beam)",
        ylabel="y (px)",
        xlim=extent[:2],
        ylim=extent[2:],
    )
    axes.legend(loc="upper right", fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def assembled(image: FloatArray, geometry: Geometry) -> tuple[FloatArray, FloatArray]:
    """The slab (R, C) as the beam sees it.

    Returns:
        (H, W) canvas, rows along y, NaN where no pixel is; and x, y (2,) in px of its corner.
    """
    rows, columns = np.nonzero(geometry.panel_index >= 0)
    xy = _px(geometry.pixel_positions_m[rows, columns], geometry)
    corner = np.floor(xy.min(0))
    at = np.floor(xy - corner).astype(int)
    canvas = np.full((at[:, 1].max() + 1, at[:, 0].max() + 1), np.nan)
    canvas[at[:, 1], at[:, 0]] = image[rows, columns]
    return canvas, corner


def predicted(reciprocal_per_A: FloatArray, geometry: Geometry) -> FloatArray:
    """Where a crystal's reflections meet the detector.

    Args:
        reciprocal_per_A: (3, 3) rows a*, b*, c*, 1/Å.
        geometry: of the detector.

    Returns:
        (n, 3) m; reflections within ``EXCITATION_PER_A`` of the Ewald sphere, up to the
        resolution of the detector's corner.
    """
    corners = geometry.pixel_positions_m[geometry.panel_index >= 0]
    some = corners[:: max(1, len(corners) // 5000)]
    highest = float(np.linalg.norm(geometry.q_per_A(some), axis=1).max())
    most = np.minimum(
        np.ceil(highest * np.linalg.norm(np.linalg.inv(reciprocal_per_A).T, axis=1)), 120
    ).astype(int)
    hkl = np.stack(
        np.meshgrid(*(np.arange(-m, m + 1) for m in most), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    q = hkl @ reciprocal_per_A
    length = np.linalg.norm(q, axis=1)
    q = q[(length > 0) & (length <= highest)]
    rays = q + np.array([0.0, 0.0, 1 / geometry.wavelength_A])
    excitation = np.linalg.norm(rays, axis=1) - 1 / geometry.wavelength_A
    rays = rays[np.abs(excitation) < EXCITATION_PER_A]
    fs, ss, panel = geometry.locate(rays)
    hit = panel >= 0
    return geometry.positions_m(fs[hit], ss[hit], panel[hit])


def _px(positions_m: FloatArray, geometry: Geometry) -> FloatArray:
    """(n, 2) x, y in px of the detector."""
    return positions_m[..., :2] * float(geometry.res_per_m.mean())
