"""Each fault on its own, put into simulated data, is found and mended, and nothing else is."""

import dataclasses
import json

import numpy as np
import pytest

from envs.crystfel.indexer import IndexerError
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import PRESETS, simulate
from envs.crystfel.types import Parameters
from ssl2rl_ray.online.diagnose import CAUSES, diagnose, dipole_centre, format_diagnosis, lattice_z
from ssl2rl_ray.online.picture import assembled, draw_frame, predicted


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """16 frames, nearly all with a crystal, with the junk of real ones."""
    preset = dataclasses.replace(PRESETS["lysozyme"], hit_rate=0.95)
    return simulate(preset, 16, 11, tmp_path_factory.mktemp("sfx") / "data")


@pytest.fixture(scope="module")
def search(experiment):
    """Its peaks are found once for all tests."""
    return EmbeddedIndexer(experiment)


FAULTS = {
    # fault: what is found, and what the remedy is (bounds)
    "nothing": ({}, [], {}),
    "noise": ({"min_snr": 3.3}, ["noise"], {"min_snr": (4, 5)}),
    "flicker": ({"min_pix_count": 1}, ["single pixels"], {"min_pix_count": (2, 2)}),
    "strict SNR": ({"min_snr": 18.0}, ["min_snr"], {"min_snr": (4, 6)}),
    "strict threshold": ({"threshold_adu": 250.0}, ["threshold_adu"], {"threshold_adu": (0, 30)}),
    "strict pixels": ({"min_pix_count": 8}, ["min_pix_count"], {"min_pix_count": (2, 2)}),
    "strict hits": ({"min_peaks": 150}, ["min_peaks"], {"min_peaks": (0, 15)}),
    "too long": ({"clen_offset_percent": 5.0}, ["distance"], {"clen_offset_percent": (-0.6, 0.6)}),
    "too short": (
        {"clen_offset_percent": -5.5},
        ["distance"],
        {"clen_offset_percent": (-0.6, 0.6)},
    ),
    "off centre": (
        {"centre_x_offset_px": -4.0, "centre_y_offset_px": 3.0},
        ["centre"],
        {"centre_x_offset_px": (-0.5, 0.5), "centre_y_offset_px": (-0.5, 0.5)},
    ),
    "noise and distance": (
        {"min_snr": 3.3, "clen_offset_percent": 5.0},
        ["noise", "distance"],
        {"min_snr": (4, 5), "clen_offset_percent": (-0.6, 0.6)},
    ),
}


SLOW = ("too short", "noise and distance")


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAULTS]
)
def test_a_fault_is_found_and_mended(fault, experiment, search):
    changes, causes, remedies = FAULTS[fault]
    healthy = search.run(Parameters(), experiment.frames).num_indexed
    wrong = Parameters().replace(**changes)
    found = diagnose(search, experiment, wrong, experiment.frames, search=search)
    assert [finding.cause for finding in found.findings] == causes
    for name, (low, high) in remedies.items():
        assert low <= getattr(found.proposed, name) <= high
    for name, value in found.proposed.as_dict().items():
        if name not in remedies:
            assert value == getattr(wrong, name)
    assert found.after.num_indexed >= 0.85 * healthy
    if causes:
        assert found.before.num_indexed < 0.5 * healthy
        assert all(finding.num_without is not None for finding in found.findings)
    json.dumps(found.as_json(), allow_nan=False)
    text = format_diagnosis(found)
    assert all(CAUSES[cause] in text for cause in causes)


def test_a_measured_geometry_is_told_of_even_where_each_error_alone_costs_little(
    experiment, search
):
    wrong = Parameters(clen_offset_percent=3.0, centre_x_offset_px=1.5, centre_y_offset_px=-1.5)
    found = diagnose(search, experiment, wrong, experiment.frames, search=search)
    assert [finding.cause for finding in found.findings] == ["centre", "distance"]
    assert found.proposed.clen_offset_percent == pytest.approx(0, abs=0.4)
    assert found.proposed.centre_x_offset_px == pytest.approx(0, abs=0.3)
    assert found.proposed.centre_y_offset_px == pytest.approx(0, abs=0.3)


def other(experiment, **changes):
    changed = dataclasses.replace(experiment, **changes)
    return changed, EmbeddedIndexer(changed)


def test_a_wrong_photon_energy_is_named(experiment):
    geometry = dataclasses.replace(experiment.geometry, photon_energy_eV=9300 * 1.15)
    wrong, search = other(experiment, geometry=geometry)
    found = diagnose(search, wrong, Parameters(), wrong.frames, search=search)
    (finding,) = found.findings
    assert finding.cause == "energy"
    assert finding.remedy.startswith("set photon_energy in the .geom to about 9300 eV (now 10695)")


def test_a_wrong_cell_is_named(experiment):
    cell = dataclasses.replace(experiment.cell, a_A=97.0, b_A=97.0, c_A=61.0)
    wrong, search = other(experiment, cell=cell)
    found = diagnose(search, wrong, Parameters(), wrong.frames, search=search)
    (finding,) = found.findings
    assert finding.cause == "cell" and "a 97, b 97, c 61" in finding.remedy


def test_frames_without_crystals_are_called_so(tmp_path):
    preset = dataclasses.replace(PRESETS["clean"], hit_rate=0.0)
    empty = simulate(preset, 8, 5, tmp_path / "d")
    search = EmbeddedIndexer(empty)
    found = diagnose(search, empty, Parameters(), empty.frames, search=search)
    assert [finding.cause for finding in found.findings] == ["few crystals"]
    assert found.after is found.before


def test_no_frames_is_an_error(experiment, search):
    with pytest.raises(IndexerError, match="no frames to diagnose"):
        diagnose(search, experiment, Parameters(), [], search=search)


def test_a_lattice_is_told_from_random_peaks():
    rng = np.random.default_rng(4)
    turn = np.array([[0.8, 0.6], [-0.6, 0.8]])
    grid = np.array([(i, j) for i in range(-9, 10) for j in range(-9, 10) if (i, j) != (0, 0)])
    lattice = grid * (14.0, 23.0) @ turn
    kept = lattice[rng.permutation(len(lattice))[:60]] + rng.normal(0, 0.3, (60, 2))
    junk = rng.uniform(-200, 200, (60, 2))
    assert lattice_z(np.concatenate([kept, junk[:30]])) > 6
    assert all(lattice_z(rng.uniform(-200, 200, (60, 2))) < 4 for _ in range(20))
    assert lattice_z(junk[:3]) == 0


# ---- the beam centre -----------------------------------------------------------------------------


@pytest.mark.parametrize("true", [(0.0, 0.0), (2.5, -4.0)])
def test_the_centre_of_a_ring(true):
    rng = np.random.default_rng(1)
    x, y = np.meshgrid(np.arange(-150, 151.0), np.arange(-150, 151.0))
    radius = np.hypot(x - true[0], y - true[1])
    image = 20 + 30 * np.exp(-(((radius - 90) / 25) ** 2)) + rng.normal(0, 1.5, x.shape)
    xy = np.column_stack([x.ravel(), y.ravel()])
    centre, error = dipole_centre(xy, np.zeros(len(xy), int), image.ravel())
    assert centre == pytest.approx(true, abs=0.1) and error < 0.1


def test_gains_of_panels_do_not_move_the_centre():
    rng = np.random.default_rng(2)
    x, y = np.meshgrid(np.arange(-160, 160.0), np.arange(-160, 160.0))
    radius = np.hypot(x - 1.0, y + 2.0)
    image = 20 + 30 * np.exp(-(((radius - 90) / 25) ** 2))
    panel = ((x + 160) // 80 + 4 * ((y + 160) // 80)).astype(int)
    image = image * rng.normal(1, 0.03, 16)[panel] + rng.normal(0, 0.5, x.shape)
    xy = np.column_stack([x.ravel(), y.ravel()])
    centre, _ = dipole_centre(xy, panel.ravel(), image.ravel())
    assert centre == pytest.approx((1.0, -2.0), abs=0.35)


def test_a_flat_image_has_no_centre():
    xy = np.random.default_rng(0).uniform(-100, 100, (20_000, 2))
    centre, error = dipole_centre(xy, np.zeros(len(xy), int), np.full(len(xy), 5.0))
    assert centre.tolist() == [0.0, 0.0] and error == np.inf


# ---- the picture ---------------------------------------------------------------------------------


def test_the_picture_shows_every_pixel_where_it_is(experiment):
    geometry = experiment.geometry
    image = np.arange(np.prod(geometry.shape), dtype=float).reshape(geometry.shape)
    canvas, corner = assembled(image, geometry)
    xy = geometry.pixel_positions_m[100, 700, :2] * geometry.res_per_m[0]
    column, row = np.floor(xy - corner).astype(int)
    assert canvas[row, column] == image[100, 700]
    assert np.isfinite(canvas).sum() == image.size


def test_predicted_spots_lie_on_the_peaks_of_an_indexed_frame(experiment, search):
    (peaks, crystal) = next(
        pair for pair in search.crystals(Parameters(), experiment.frames) if pair[1] is not None
    )
    spots = predicted(np.linalg.inv(crystal.basis_A).T, experiment.geometry)[:, :2] * 5000
    panel = np.zeros(len(peaks), int)
    where = experiment.geometry.positions_m(peaks.fs_px, peaks.ss_px, panel)[:, :2] * 5000
    nearest = np.linalg.norm(where[:, None] - spots, axis=2).min(1)
    assert np.median(nearest[crystal.is_indexed]) < 2.0


@pytest.mark.parametrize("min_snr", [5.0, 100.0])
def test_a_frame_is_drawn(experiment, search, min_snr):
    png = draw_frame(search, experiment, Parameters(min_snr=min_snr), experiment.frames[0])
    assert png.startswith(b"\x89PNG")


# ---- from the command line -----------------------------------------------------------------------


def test_from_the_command_line(experiment, tmp_path, capsys):
    from ssl2rl_ray.cli import main

    picture, out = tmp_path / "frame.png", tmp_path / "r.json"
    words = ["--set", "min_snr=18", "--figure", str(picture), "--json", str(out), "--frames", "12"]
    assert main(["sfx", "diagnose", "--data", str(experiment.folder), *words]) == 0
    found = json.loads(out.read_text())
    assert [finding["cause"] for finding in found["findings"]] == ["min_snr"]
    assert found["num_frames"] == 12 and found["num_indexed_after"] > found["num_indexed"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"ssl2rl sfx index --data {experiment.folder} --set min_snr=" in said


def test_mistakes_are_told(experiment, tmp_path, capsys):
    from ssl2rl_ray.cli import main

    assert main(["sfx", "diagnose", "--data", str(tmp_path)]) == 2
    assert "no experiment.geom" in capsys.readouterr().err
    assert main(["sfx", "diagnose", "--data", str(experiment.folder), "--frames", "0"]) == 2
    assert "--frames" in capsys.readouterr().err
