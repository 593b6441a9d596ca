"""Observed against predicted spots: known lattices, known shifts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from envs.crystfel.sfx.spots import mean_offsets, spot_offsets

WAVELENGTH_A, DISTANCE_M = 1.333, 0.12
CELL = np.diag([1 / 79.2, 1 / 79.2, 1 / 38.0])


def spots_of(reciprocal: np.ndarray) -> np.ndarray:
    """(n, 3) positions at which lattice points near the Ewald sphere are predicted."""
    indices = np.stack(np.meshgrid(*[np.arange(-8, 9)] * 3), -1).reshape(-1, 3)
    indices = indices[(indices != 0).any(1)]
    ray = indices @ reciprocal * WAVELENGTH_A + (0.0, 0.0, 1.0)
    is_near = np.abs(np.linalg.norm(ray, axis=1) - 1) < 1e-3 * WAVELENGTH_A
    return (ray / ray[:, 2:] * DISTANCE_M)[is_near]


@given(st.integers(0, 1000), st.floats(-2e-4, 2e-4), st.floats(-2e-4, 2e-4))
def test_a_shifted_beam_shows_as_its_shift(seed, x, y):
    reciprocal = CELL @ Rotation.random(random_state=seed).as_matrix()
    positions = spots_of(reciprocal) + np.array([x, y, 0.0])
    offsets = spot_offsets(positions, reciprocal, WAVELENGTH_A)
    is_paired = np.isfinite(offsets).all(1)
    assert is_paired.mean() > 0.9
    np.testing.assert_allclose(offsets[is_paired], [(x, y)] * is_paired.sum(), atol=1e-9)


def test_by_hand():
    # The reflection 10 0 -1 lies on the Ewald sphere, where sine = 10 a* x wavelength.
    sine = 10 / 79.2 * WAVELENGTH_A
    cosine = np.sqrt(1 - sine**2)
    reciprocal = np.diag([1 / 79.2, 1 / 79.2, (1 - cosine) / WAVELENGTH_A])
    x = DISTANCE_M * sine / cosine
    positions = np.array(
        [[x + 1e-4, -5e-5, DISTANCE_M], [1.05 * x, 0, DISTANCE_M], [0, 0, DISTANCE_M]]
    )
    offsets = spot_offsets(positions, reciprocal, WAVELENGTH_A)
    np.testing.assert_allclose(offsets[0], [1e-4, -5e-5], atol=1e-12)
    assert np.isnan(offsets[1:]).all()  # between two points, and the direct beam


def test_crystals_count_once_each():
    offsets = np.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, -1.0], [np.nan, np.nan]])
    length, mean = mean_offsets(offsets, np.array([0, 0, 0, 2, 1]), 3)
    assert length == pytest.approx(3.0)  # (5 + 1) / 2
    np.testing.assert_allclose(mean, [1.5, 1.5])
    length, mean = mean_offsets(np.zeros((0, 2)), np.zeros(0, dtype=int), 0)
    assert np.isnan(length) and np.isnan(mean).all()
