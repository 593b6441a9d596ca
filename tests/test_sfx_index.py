"""Known-cell indexer: finds what is there, whatever the cell, and never what is not."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from scipy.stats import binom

from envs.crystfel.sfx.index import (
    LENGTH_TOLERANCE,
    MAX_LOG10_P,
    Candidates,
    KnownCell,
    _from_to,
    cell_parameters,
    index_peaks,
    misorientation_deg,
    significance,
)
from envs.crystfel.types import UnitCell

WAVELENGTH_A = 1.333
DISTANCE_M, PIXEL_M = 0.12, 200e-6

LYSOZYME = UnitCell(a_A=79.2, b_A=79.2, c_A=38.0, lattice_type="tetragonal", unique_axis="c")
CELLS = {
    "triclinic": UnitCell(a_A=40, b_A=52, c_A=61, alpha_deg=85, beta_deg=97, gamma_deg=103),
    "monoclinic": UnitCell(a_A=60, b_A=45, c_A=90, beta_deg=105),
    "orthorhombic": UnitCell(a_A=50, b_A=70, c_A=110),
    "hexagonal": UnitCell(a_A=63, b_A=63, c_A=104, gamma_deg=120),
    "tetragonal": LYSOZYME,
    "cubic": UnitCell(a_A=78, b_A=78, c_A=78),
}
KNOWN = {name: KnownCell(cell) for name, cell in CELLS.items()}
ORDER = {  # of the holohedry, with the inversion
    "triclinic": 2,
    "monoclinic": 4,
    "orthorhombic": 8,
    "hexagonal": 24,
    "tetragonal": 16,
    "cubic": 48,
}


def to_q(xy_px, clen_error=0.0, shift_px=(0.0, 0.0)):
    """Scattering vectors of spots as a user sees them whose distance and centre are off."""
    xy = (xy_px - np.asarray(shift_px)) * PIXEL_M
    xyz = np.column_stack([xy, np.full(len(xy), DISTANCE_M * (1 + clen_error))])
    q = xyz / np.linalg.norm(xyz, axis=1, keepdims=True)
    q[:, 2] -= 1
    return q / WAVELENGTH_A


def pattern(cell, rng, num_spots, sigma_px=0.4):
    """Spots (n, 2) in px of a crystal in a random orientation, and its basis."""
    rotation = Rotation.random(rng=rng).as_matrix()
    lengths = cell.parameters[:3]
    grid = [np.arange(-n, n + 1) for n in np.ceil(lengths / 2).astype(int)]
    hkl = np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, 3)
    q = hkl @ cell.cell.reciprocal_per_A() @ rotation.T
    ray = q + np.array([0, 0, 1 / WAVELENGTH_A])
    off_sphere = np.abs(np.linalg.norm(ray, axis=1) - 1 / WAVELENGTH_A)
    length = np.linalg.norm(q, axis=1)
    strength = np.exp(-10 * length**2 - (off_sphere / 8e-4) ** 2) * rng.exponential(size=len(q))
    strength[(length > 0.5) | (length == 0) | (off_sphere > 1.5e-3)] = 0
    strength[~cell.cell.allows(hkl)] = 0
    chosen = np.argsort(-strength)[:num_spots]
    chosen = chosen[strength[chosen] > 0]
    xy = ray[chosen, :2] / ray[chosen, 2:] * DISTANCE_M / PIXEL_M
    return xy + rng.normal(0, sigma_px, xy.shape), cell.basis_A @ rotation.T


def junk(rng, number):
    return rng.uniform(-512, 512, (number, 2))


@pytest.mark.parametrize("name", CELLS)
def test_finds_the_orientation_among_junk(name):
    cell = KnownCell(CELLS[name])
    assert len(cell.symmetry) == ORDER[name]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        spots, basis = pattern(cell, rng, 60)
        crystal = index_peaks(to_q(np.concatenate([spots, junk(rng, 20)])), cell)
        assert crystal is not None, seed
        assert misorientation_deg(crystal.basis_A, basis, cell) < 0.5
        np.testing.assert_allclose(crystal.cell[:3], cell.parameters[:3], rtol=0.01)
        assert crystal.is_indexed[: len(spots)].mean() > 0.95
        assert crystal.is_indexed[len(spots) :].mean() < 0.5
        assert crystal.log10_p < -20


@pytest.mark.parametrize("centering", ["C", "I", "F"])
def test_the_centering_is_that_of_the_crystal(centering):
    """A centred crystal is found as what it is; a primitive one is not taken for it."""
    known = dataclasses.replace(CELLS["orthorhombic"], centering=centering)
    centred, primitive = KnownCell(known), KNOWN["orthorhombic"]
    num_taken = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        spots, basis = pattern(centred, rng, 60)
        crystal = index_peaks(to_q(np.concatenate([spots, junk(rng, 15)])), centred)
        assert crystal is not None, seed
        assert misorientation_deg(crystal.basis_A, basis, centred) < 0.5
        spots, _ = pattern(primitive, rng, 60)
        num_taken += index_peaks(to_q(spots), centred) is not None
    assert num_taken == 0


def test_no_crystal_in_junk():
    cell = KnownCell(LYSOZYME)
    rng = np.random.default_rng(0)
    for number in (0, 3, 5, 8, 10, 12, 15, 20, 30, 60, 200) * 5:
        assert index_peaks(to_q(junk(rng, number)), cell) is None
        rays = rng.normal(0, 150, (number, 2))  # crowded around the beam
        assert index_peaks(to_q(rays), cell) is None


def test_no_crystal_where_another_was():
    rng = np.random.default_rng(1)
    lysozyme, other = KnownCell(LYSOZYME), KnownCell(CELLS["orthorhombic"])
    for _ in range(10):
        spots, _ = pattern(other, rng, 60)
        assert index_peaks(to_q(spots), lysozyme) is None


@pytest.mark.parametrize("error", [-0.02, -0.01, 0.01, 0.02])
def test_the_cell_tells_how_wrong_the_distance_is(error):
    cell = KnownCell(LYSOZYME)
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        spots, basis = pattern(cell, rng, 80)
        crystal = index_peaks(to_q(spots, clen_error=error), cell)
        assert crystal is not None
        assert misorientation_deg(crystal.basis_A, basis, cell) < 1.5
        ratios.append((crystal.cell[:3] / cell.parameters[:3]).mean())
    assert np.mean(ratios) == pytest.approx(1 + error, abs=0.003)


@pytest.mark.parametrize("error", [-0.06, 0.06])
def test_a_distance_far_off_indexes_nothing(error):
    cell = KnownCell(LYSOZYME)
    rng = np.random.default_rng(2)
    for _ in range(10):
        spots, _ = pattern(cell, rng, 60)
        assert index_peaks(to_q(spots, clen_error=error), cell) is None


@pytest.mark.parametrize("shift_px", [(5.0, 0.0), (-4.0, 4.0), (8.0, -3.0)])
def test_a_centre_far_off_indexes_little_and_nothing_wrong(shift_px):
    cell = KnownCell(LYSOZYME)
    rng = np.random.default_rng(3)
    num_found = 0
    for _ in range(10):
        spots, basis = pattern(cell, rng, 60)
        crystal = index_peaks(to_q(spots, shift_px=shift_px), cell)
        if crystal is not None:
            num_found += 1
            assert misorientation_deg(crystal.basis_A, basis, cell) < 2.0
    assert num_found <= 2


def test_too_few_or_unusable_peaks():
    cell = KnownCell(LYSOZYME)
    assert index_peaks(np.zeros((0, 3)), cell) is None
    assert index_peaks(np.full((30, 3), np.nan), cell) is None
    assert index_peaks(np.zeros((30, 3)), cell) is None
    assert index_peaks(np.tile([[0.1, 0.0, 0.0]], (30, 1)), cell) is None


def test_many_peaks_in_few_places_are_little_evidence():
    cell = KnownCell(LYSOZYME)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        places = junk(rng, 6)
        crowd = places[rng.integers(0, 6, 100)] + rng.normal(0, 1, (100, 2))
        assert index_peaks(to_q(crowd), cell) is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    number=st.integers(0, 80),
    exponent=st.floats(-6, 4),
    flatness=st.sampled_from([(1, 1, 1), (1, 1, 0), (1, 0, 0), (1, 0.1, 1e-3)]),
    share_bad=st.sampled_from([0.0, 0.1]),
    name=st.sampled_from(["tetragonal", "triclinic"]),
)
def test_whatever_the_peaks_it_neither_crashes_nor_believes(
    seed, number, exponent, flatness, share_bad, name
):
    rng = np.random.default_rng(seed)
    q = rng.normal(0, 10.0**exponent, (number, 3)) * np.array(flatness)
    q[rng.random(number) < share_bad] = rng.choice([np.nan, np.inf, -np.inf])
    assert index_peaks(q, KNOWN[name]) is None


def test_the_order_of_the_peaks_is_kept():
    cell = KnownCell(LYSOZYME)
    spots, _ = pattern(cell, np.random.default_rng(4), 50)
    q = to_q(spots)
    first = index_peaks(q, cell)
    turned = index_peaks(q[::-1], cell)
    assert first is not None and turned is not None
    assert misorientation_deg(first.basis_A, turned.basis_A, cell) < 0.05
    fitted = first.hkl @ np.linalg.inv(first.basis_A).T  # q = h a* + k b* + l c*
    assert np.abs(fitted - q)[first.is_indexed].max() < 0.25 / 38
    assert len(first.hkl) == len(first.is_indexed) == len(q)


# ------------------------------------------------------------------ the test, by hand


def test_significance_of_a_perfect_lattice():
    log10_p, log10_p_axis = significance(np.zeros((3, 1, 10)))
    assert log10_p[0] == pytest.approx(10 * 3 * math.log10(0.16) + 10 + math.log10(4))
    np.testing.assert_allclose(log10_p_axis, 10 * math.log10(0.16) + math.log10(4))


def test_significance_is_binomial():
    away = np.full((3, 1, 20), 0.4)
    away[:, 0, :7] = 0.05  # 7 of 20 peaks within 0.08
    log10_p, _ = significance(away)
    expected = binom.logsf(6, 20, 0.16**3) / math.log(10)
    assert log10_p[0] == pytest.approx(expected + 10 + math.log10(4))


def test_a_wrong_third_axis_is_seen():
    rng = np.random.default_rng(0)
    away = np.abs(rng.normal(0, 0.02, (3, 1, 60)))
    away[2] = rng.uniform(0, 0.5, (1, 60))
    log10_p, log10_p_axis = significance(away)
    assert log10_p[0] < MAX_LOG10_P  # the lattice as a whole looks well
    assert log10_p_axis[0, 0] < -3 and log10_p_axis[1, 0] < -3
    assert log10_p_axis[2, 0] > -3


def test_peaks_that_are_close_to_a_plane_anyhow_are_no_evidence_for_it():
    rng = np.random.default_rng(0)
    away = rng.uniform(0, 0.5, (3, 1, 60))
    away[2] = rng.uniform(0, 0.05, (1, 60))  # all of them within a tenth of a spacing
    width = np.array([[1.0], [1.0], [0.1]])
    log10_p, log10_p_axis = significance(away, width)
    assert log10_p[0] > MAX_LOG10_P and log10_p_axis[2, 0] > -1
    _, log10_p_axis = significance(away)
    assert log10_p_axis[2, 0] < -3


def test_no_crystal_in_a_crowd_around_the_beam():
    cell = KnownCell(LYSOZYME)
    rng = np.random.default_rng(6)
    for sigma_px in (10, 20, 40, 60, 80):
        for number in (15, 40, 100):
            assert index_peaks(to_q(rng.normal(0, sigma_px, (number, 2))), cell) is None


def test_a_long_thin_cell_is_turned_in_parts():
    """Axes of 4 and 900 Å: thousands of turns about the short one, and the crystal is found."""
    cell = KnownCell(UnitCell(a_A=4.0, b_A=700.0, c_A=900.0))
    assert len(cell.turned) > 5 * 512
    rng = np.random.default_rng(0)
    hkl = np.column_stack([rng.integers(-1, 2, 60), rng.integers(-30, 31, (60, 2))])
    hkl = hkl[(hkl[:, 0] != 0) | (np.arange(60) < 20)]
    q = (
        hkl
        @ cell.cell.reciprocal_per_A()
        @ _from_to(np.array([0.0, 0.0, 1.0]), np.array([[0.3, -0.5, 0.8]]))[0].T
    )
    crystal = index_peaks(q, cell)
    assert crystal is not None
    np.testing.assert_allclose(crystal.cell, cell.parameters, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "is_believed"),
    [
        ({}, True),
        ({"log10_p": np.array([-5.9])}, False),
        ({"log10_p_axis": np.array([[-9.0], [-2.9], [-9.0]])}, False),
        ({"explained": np.array([0.38])}, False),
        ({"lawful": np.array([0.74])}, False),
        ({"is_alike": np.array([False])}, False),
    ],
)
def test_what_a_lattice_must_have_to_be_believed(changes, is_believed):
    enough = {
        "bases_A": np.eye(3)[None],
        "log10_p": np.array([-6.1]),
        "log10_p_axis": np.array([[-9.0], [-3.1], [-9.0]]),
        "explained": np.array([0.4]),
        "lawful": np.array([0.76]),
        "is_alike": np.array([True]),
    }
    assert Candidates(**(enough | changes)).is_believed.tolist() == [is_believed]


def test_nothing_close_is_no_evidence():
    log10_p, log10_p_axis = significance(np.full((3, 2, 15), 0.5))
    assert (log10_p > 0).all() and (log10_p_axis > 0).all()


# ------------------------------------------------------------------ geometry of lattices


@pytest.mark.parametrize("name", CELLS)
def test_misorientation(name):
    cell = KnownCell(CELLS[name])
    turn = Rotation.from_rotvec(np.radians(7.0) * np.array([0.6, 0.0, 0.8])).as_matrix()
    basis = cell.basis_A @ turn.T
    assert misorientation_deg(basis, cell.basis_A, cell) == pytest.approx(7.0, abs=1e-6)
    for symmetry in cell.symmetry[np.linalg.det(cell.symmetry) > 0]:
        again = misorientation_deg(symmetry @ basis, basis, cell)
        assert again == pytest.approx(0, abs=1e-4)
    assert misorientation_deg(-basis, basis, cell) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_cell_parameters_of_the_basis(name):
    cell = KnownCell(CELLS[name])
    np.testing.assert_allclose(cell_parameters(cell.basis_A[None])[0], cell.parameters)
    assert cell.is_alike(cell.basis_A[None]).all()
    longer = cell.basis_A * (1 + LENGTH_TOLERANCE * 1.1)
    assert not cell.is_alike(longer[None]).any()


@pytest.mark.parametrize("name", CELLS)
def test_symmetrised_bases_have_the_symmetry_and_stay_where_they_are(name):
    cell = KnownCell(CELLS[name])
    rng = np.random.default_rng(0)
    turn = Rotation.random(rng=rng).as_matrix()
    bases = cell.basis_A @ turn.T + rng.normal(0, 0.3, (5, 3, 3))
    ideal = cell.symmetrised(bases)
    metric = ideal @ ideal.transpose(0, 2, 1)
    for w in cell.symmetry:
        np.testing.assert_allclose(w @ metric @ w.T, metric, atol=1e-8)
    np.testing.assert_allclose(cell.symmetrised(ideal), ideal, atol=1e-8)
    assert np.abs(ideal - bases).max() < 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=6, max_size=6).filter(lambda v: np.std(v) > 0.1))
def test_turns_a_vector_to_a_vector(values):
    unit, target = np.array(values[:3]) + 1e-3, np.array(values[3:]) - 2e-3
    unit /= np.linalg.norm(unit)
    targets = np.stack([target, -target, unit, -unit])
    turns = _from_to(unit, targets)
    expected = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    np.testing.assert_allclose(turns @ unit, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(turns), 1.0)
