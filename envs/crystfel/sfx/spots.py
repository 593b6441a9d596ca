"""Observed against predicted spots of an indexed frame: the free signal on the beam centre.

What the mean offset says: where the assumed beam centre is off by a few px, every spot lies off
its prediction by most of that, since turning the crystal can follow only part of it.
"""

from __future__ import annotations

import numpy as np

from envs.crystfel.types import FloatArray, IntArray

PAIRED = 0.25
"""A peak belongs to a lattice where all three of its indices are so close to whole numbers."""


def spot_offsets(
    positions_m: FloatArray, reciprocal_per_A: FloatArray, wavelength_A: float | FloatArray
) -> FloatArray:
    """Observed minus predicted position of peaks, for the lattice of their frame.

    The predicted spot lies where the ray s0 + h a* + k b* + l c* meets the plane across the beam
    at the peak's distance, h k l being the nearest whole indices: how far the lattice point is
    from the Ewald sphere does not count.

    Args:
        positions_m: (n, 3) x, y, z of the peaks in the laboratory (z along the beam).
        reciprocal_per_A: (3, 3) or (n, 3, 3), rows a*, b*, c*, 1/Å.
        wavelength_A: Å; one, or (n, 1).

    Returns:
        (n, 2) x, y in m; NaN for peaks that do not belong to the lattice.
    """
    positions = np.asarray(positions_m, dtype=float)
    rays = positions / np.linalg.norm(positions, axis=-1, keepdims=True)
    q = (rays - (0.0, 0.0, 1.0)) / wavelength_A
    indices = np.einsum("...j,...jk->...k", q, np.linalg.inv(reciprocal_per_A))
    nearest = np.rint(indices)
    is_paired = (np.abs(indices - nearest) < PAIRED).all(-1) & (nearest != 0).any(-1)
    predicted = np.einsum("...j,...jk->...k", nearest, reciprocal_per_A) * wavelength_A
    predicted[..., 2] += 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        offsets = positions[..., :2] - predicted[..., :2] / predicted[..., 2:] * positions[..., 2:]
    offsets[~is_paired | ~np.isfinite(offsets).all(-1)] = np.nan
    return offsets


def mean_offsets(
    offsets: FloatArray, crystal: IntArray, num_crystals: int
) -> tuple[float, FloatArray]:
    """Mean length and mean vector of offsets, each crystal counting once.

    Args:
        offsets: (n, 2), NaN = not paired.
        crystal: (n,) number of the crystal that each belongs to.
        num_crystals: of all.

    Returns:
        mean length, and mean x, y (2,); NaN where no crystal has a paired peak.
    """
    is_paired = np.isfinite(offsets).all(-1)
    offsets, crystal = offsets[is_paired], crystal[is_paired]
    columns = (np.ones(len(offsets)), np.hypot(*offsets.T), *offsets.T)
    count, *sums = (np.bincount(crystal, column, num_crystals) for column in columns)
    means = np.array([total[count > 0] / count[count > 0] for total in sums])
    if not means.shape[1]:
        return float("nan"), np.full(2, np.nan)
    length, x, y = means.mean(1)
    return float(length), np.array([x, y])
