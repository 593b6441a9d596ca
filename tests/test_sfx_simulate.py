"""The simulator: what it writes is what it says, and is drawn from its seed alone."""

import dataclasses
import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from envs.crystfel.experiment import TRUTH_FILE, read_experiment
from envs.crystfel.sfx.formats import good_pixels, read_geometry, read_images
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import (
    PRESETS,
    Preset,
    SimulationError,
    World,
    _add_spots,
    _in_brightest,
    draw_frame,
    make_world,
    named_preset,
    simulate,
    user_geometry,
)
from envs.crystfel.types import Parameters
from ssl2rl_ray.cli import main

QUIET = dataclasses.replace(
    PRESETS["clean"],
    hit_rate=0.0,
    num_grains=0.0,
    num_blobs=0.0,
    num_flickering=0.0,
    background_sigma=0.0,
)
"""Nothing but background and its noise."""


@pytest.fixture(scope="module")
def clean() -> World:
    return make_world(PRESETS["clean"], 3)


@pytest.fixture(scope="module")
def modules() -> World:
    return make_world(PRESETS["modules"], 3)


def images_of(folder: Path) -> np.ndarray:
    experiment = read_experiment(folder)
    return np.array(list(read_images(experiment.geometry, experiment.frames)))


# ------------------------------------------------------------------------------ reflections


def test_absences_of_p43212(clean: World) -> None:
    hkl = {tuple(row) for row in clean.hkl.tolist()}
    assert (0, 0, 4) in hkl and not {(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 0, 6)} & hkl
    assert (2, 0, 0) in hkl and not {(1, 0, 0), (0, 3, 0), (-5, 0, 0)} & hkl
    assert {(1, 1, 0), (1, 0, 1), (1, 2, 3)} <= hkl
    assert (0, 0, 0) not in hkl
    d_spacing = 1 / np.linalg.norm(clean.hkl @ PRESETS["clean"].cell.reciprocal_per_A(), axis=1)
    assert d_spacing.min() > 1.8 and d_spacing.min() < 1.81


def test_strongest_reflections_come_first(clean: World) -> None:
    assert (np.diff(clean.intensity) <= 0).all()


def test_intensities_have_the_symmetry_of_the_laue_group(clean: World) -> None:
    intensity = dict(zip(map(tuple, clean.hkl.tolist()), clean.intensity, strict=True))
    equal = [(3, 5, 7), (5, 3, 7), (-3, 5, 7), (3, 5, -7), (-3, -5, -7), (-5, 3, 7)]
    assert len({intensity[hkl] for hkl in equal}) == 1
    assert intensity[3, 5, 7] != intensity[3, 5, 8]


def test_intensities_fall_off_as_wilson_says(clean: World) -> None:
    s2 = ((clean.hkl @ PRESETS["clean"].cell.reciprocal_per_A()) ** 2).sum(axis=1)
    shells = [(s2 > low) & (s2 <= high) for low, high in ((0.01, 0.04), (0.16, 0.2))]
    means = [clean.intensity[shell].mean() for shell in shells]
    b = PRESETS["clean"].b_factor_A2
    expected = [np.exp(-b * s2[shell] / 2).mean() for shell in shells]
    assert means[1] / means[0] == pytest.approx(expected[1] / expected[0], rel=0.1)
    # Acentric: the standard deviation of an exponential distribution is its mean.
    scaled = clean.intensity / np.exp(-b * s2 / 2)
    assert scaled.std() == pytest.approx(scaled.mean(), rel=0.05)


# ------------------------------------------------------------------------------ the detector


def test_a_spot_holds_its_photons(clean: World) -> None:
    photons = np.zeros(clean.geometry.shape, dtype=np.float32)
    at = np.array([100.5]), np.array([200.5])
    _add_spots(photons, clean.geometry, *at, np.array([0]), np.array([80.0]), 0.62)
    assert photons.sum() == pytest.approx(80, rel=0.01)  # a little beyond the patch is left out
    assert np.unravel_index(photons.argmax(), photons.shape) == (200, 100)
    assert photons.max() / photons.sum() == pytest.approx(_in_brightest(0.62), rel=0.01)
    # By hand: erf(0.5 / (0.62 sqrt 2))^2.
    assert _in_brightest(0.62) == pytest.approx(math.erf(0.5 / 0.62 / math.sqrt(2)) ** 2)


def test_spots_do_not_cross_panels(modules: World) -> None:
    photons = np.zeros(modules.geometry.shape, dtype=np.float32)
    row = np.array([64.0])  # between the first two tiles of module 0: rows 63 and 64
    at = np.array([10.5]), row
    _add_spots(photons, modules.geometry, *at, np.array([1]), np.array([80.0]), 0.62)
    assert photons[:64].sum() == 0
    assert photons[64:].sum() == pytest.approx(40, rel=0.01)


def test_noise_is_that_of_photons() -> None:
    preset = dataclasses.replace(QUIET, gain_error=0.0, background_photons=8.0)
    world = make_world(preset, 1)
    rng = np.random.default_rng(1)
    frames = np.array([draw_frame(world, rng)[0] for _ in range(6)])[:, world.good]
    photons = frames / preset.adu_per_photon
    mean = world.background[world.good]
    bright = mean > 4
    assert photons[:, bright].mean() == pytest.approx(mean[bright].mean(), rel=0.005)
    variance = ((photons - mean) ** 2)[:, bright].mean()
    expected = mean[bright].mean() + preset.read_noise_photons**2
    assert variance == pytest.approx(expected, rel=0.02)
    standard = ((photons - mean) / np.sqrt(mean + preset.read_noise_photons**2))[:, bright]
    skewness = (standard**3).mean()
    assert skewness == pytest.approx((1 / np.sqrt(mean[bright])).mean(), rel=0.15)


def test_charge_sharing_is_the_same_noise_in_neighbours() -> None:
    world = make_world(dataclasses.replace(QUIET, charge_sharing=0.4), 1)
    image, _ = draw_frame(world, np.random.default_rng(1))
    z = (image / world.gain - world.background) / np.sqrt(world.background + 0.09)
    z = z[600:1000, 600:1000]
    # The skewness s of Cornish-Fisher's second order brings a little variance with it: s^2 / 18.
    extra = (1 / world.background[600:1000, 600:1000]).mean() / 18
    assert z.var() == pytest.approx(1 + extra, rel=0.02)
    # cov of (z_i + a z_{i-1}) and its neighbour over its variance 1 + 2 a^2: a / (1 + 2 a^2).
    assert (z[:, 1:] * z[:, :-1]).mean() == pytest.approx(0.4 / 1.32, abs=0.02)


def test_modules_lie_round_a_hole_and_do_not_overlap(modules: World) -> None:
    g = modules.geometry
    assert (len(g.panels), len(g.planes), g.shape) == (128, 16, (16 * 512, 128))
    assert 16 * 512 * 128 == 1024 * 1024
    rows, columns = np.nonzero(g.panel_index >= 0)
    panel = g.panel_index[rows, columns]
    sample = np.random.default_rng(1).integers(len(rows), size=3000)
    at = columns[sample] + 0.5, rows[sample] + 0.5, panel[sample].astype(int)
    found = g.locate(g.positions_m(*at))
    assert np.array_equal(found[2], at[2])
    assert found[0] == pytest.approx(at[0], abs=1e-6)
    assert found[1] == pytest.approx(at[1], abs=1e-6)
    assert 25 < np.nanmin(g.radius_px) < 35  # the hole
    assert (g.locate(np.array([[0.0, 0.0, 1.0]]))[2] == -1).all()


# ------------------------------------------------------------------------------ what a frame shows


@pytest.mark.parametrize("kind", ["clean", "modules"])
def test_bright_spots_are_reflections_of_the_true_crystal(
    kind: str, request: pytest.FixtureRequest
) -> None:
    world: World = request.getfixturevalue(kind)
    preset = dataclasses.replace(
        PRESETS["clean"], hit_rate=1.0, second_crystal_rate=0.0, num_flickering=0.0, num_blobs=0.0
    )
    world = dataclasses.replace(world, preset=dataclasses.replace(preset, detector="plate"))
    image, truth = draw_frame(world, np.random.default_rng(2))
    g = dataclasses.replace(world.geometry, photon_energy_eV=truth.photon_energy_eV)
    order = np.argsort(-(image / world.gain - world.background)[world.good])[:60]
    rows, columns = (index[order] for index in np.nonzero(world.good))
    panel = g.panel_index[rows, columns].astype(int)
    q = g.q_per_A(g.positions_m(columns + 0.5, rows + 0.5, panel))
    (basis,) = truth.reciprocal_per_A
    hkl = q @ np.linalg.inv(basis)
    away = np.abs(hkl - np.rint(hkl)).max(axis=1)
    assert np.median(away) < 0.08
    assert (away < 0.15).mean() > 0.9
    # Any other orientation fits as chance does.
    turned = q @ np.linalg.inv(basis[:, [1, 2, 0]])
    assert np.median(np.abs(turned - np.rint(turned)).max(axis=1)) > 0.3


def test_the_true_basis_is_the_cell(clean: World) -> None:
    _, truth = draw_frame(clean, np.random.default_rng(2))
    rows = truth.reciprocal_per_A[0]
    metric = PRESETS["clean"].cell.reciprocal_per_A()
    assert rows @ rows.T == pytest.approx(metric @ metric.T, abs=1e-12)
    assert np.linalg.det(rows) > 0


def test_rates_of_crystals() -> None:
    preset = dataclasses.replace(PRESETS["lysozyme"], hit_rate=0.6, second_crystal_rate=0.3)
    world = make_world(preset, 1)
    # Only the draws matter here: no pixels, no reflections.
    world = dataclasses.replace(world, hkl=world.hkl[:1], intensity=world.intensity[:1])
    counts = np.bincount(
        [len(draw_frame(world, np.random.default_rng(i))[1].scale) for i in range(120)],
        minlength=3,
    )
    assert counts[0] / 120 == pytest.approx(0.4, abs=0.12)
    assert counts[2] / counts[1:].sum() == pytest.approx(0.3, abs=0.16)


def test_drift_moves_the_detector_and_the_background() -> None:
    preset = dataclasses.replace(
        QUIET, drift_clen_percent=4.0, drift_background=2.0, gain_error=0.0
    )
    world = make_world(preset, 1)
    frames = [draw_frame(world, np.random.default_rng(1), share) for share in (0.0, 0.5, 1.0)]
    assert [truth.clen_m for _, truth in frames] == pytest.approx([0.12, 0.1224, 0.1248])
    assert [truth.background for _, truth in frames] == pytest.approx([1, math.sqrt(2), 2])
    means = [image[world.good].mean() for image, _ in frames]
    assert means[2] / means[0] == pytest.approx(2, rel=0.01)


# ------------------------------------------------------------------------------ files


def test_a_folder_has_what_an_indexer_needs(tmp_path: Path) -> None:
    told: list[float] = []
    experiment = simulate(
        "lysozyme", 3, 1, tmp_path / "d", on_step=lambda what, share: told.append(share)
    )
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {
        "experiment.geom", "reference.cell", "frames.lst", "parameters.json", "frames-000.h5",
        "truth.npz",
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["d"]  # no temporary folder is left
    assert (tmp_path / "d" / "frames.lst").read_text().splitlines()[2] == "frames-000.h5 //2"
    assert [frame.event for frame in experiment.frames] == ["//0", "//1", "//2"]
    assert experiment.cell == PRESETS["lysozyme"].cell
    assert experiment.nominal == Parameters()
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    with h5py.File(tmp_path / "d" / "frames-000.h5") as file:
        data = file["entry/data/data"]
        assert (data.dtype, data.shape, data.chunks) == (
            np.int16,
            (3, 1024, 1024),
            (1, 1024, 1024),
        )
    bad = ~good_pixels(experiment.geometry, experiment.frames[0])
    world = make_world(PRESETS["lysozyme"], 1)
    assert bad.sum() == pytest.approx(40 * 40 + world.dead.sum(), abs=5)  # a box, and what is dead
    levels = np.load(tmp_path / "d" / TRUTH_FILE)["background"]
    expected = (world.background * world.gain)[~bad].mean() * levels
    for i, image in enumerate(read_images(experiment.geometry, experiment.frames)):
        assert not image[world.dead].any()
        assert 1.1 < image[~bad].mean() / expected[i] < 1.7  # the rest is grains, spots and junk


def test_modules_are_kept_along_an_axis_of_their_own(tmp_path: Path) -> None:
    experiment = simulate("modules", 1, 1, tmp_path / "d")
    with h5py.File(tmp_path / "d" / "frames-000.h5") as file:
        assert file["entry/data/data"].shape == (1, 16, 512, 128)
        assert file["entry/data/mask"].shape == (16, 512, 128)
    (image,) = read_images(experiment.geometry, experiment.frames)
    expected, _ = draw_frame(
        make_world(PRESETS["modules"], 1), np.random.default_rng([1, 0xF4A, 0])
    )
    assert np.array_equal(image, np.rint(expected))


def test_frames_go_by_their_seed_and_number_alone(tmp_path: Path) -> None:
    simulate(QUIET, 5, 7, tmp_path / "a", frames_per_file=2)
    simulate(QUIET, 2, 7, tmp_path / "b", dtype="uint16")
    simulate(QUIET, 2, 8, tmp_path / "c", dtype="float32")
    a, b, c = (images_of(tmp_path / name) for name in "abc")
    assert sorted(p.name for p in (tmp_path / "a").glob("*.h5")) == [
        f"frames-00{i}.h5" for i in range(3)
    ]
    assert len(a) == 5
    assert np.array_equal(np.maximum(a[:2], 0), b)  # uint16 has nothing below 0
    assert c.dtype == np.float32
    assert np.abs(c[0] - a[0]).max() > 1
    assert not np.array_equal(a[0], a[1])


@pytest.mark.slow
def test_processes_do_not_change_the_frames(tmp_path: Path) -> None:
    simulate(QUIET, 4, 7, tmp_path / "a", frames_per_file=2)
    simulate(QUIET, 4, 7, tmp_path / "b", frames_per_file=2, num_processes=2)
    assert np.array_equal(images_of(tmp_path / "a"), images_of(tmp_path / "b"))
    truths = [np.load(tmp_path / name / TRUTH_FILE) for name in "ab"]
    assert np.array_equal(truths[0]["photon_energy_eV"], truths[1]["photon_energy_eV"])


def test_the_geometry_file_has_the_users_error_and_the_truth_undoes_it(tmp_path: Path) -> None:
    preset = dataclasses.replace(
        QUIET, clen_error_percent=3.0, centre_error_px=(-1.5, 1.0), detector="modules"
    )
    experiment = simulate(preset, 1, 1, tmp_path / "d")
    world = make_world(preset, 1)
    assert experiment.geometry.clen_m == pytest.approx(1.03 * 0.12)
    # The user's beam hits 1.5 px further along -x: from there everything lies 1.5 px to the right.
    shift = experiment.geometry.corner_px - world.geometry.corner_px
    assert shift == pytest.approx(np.tile([1.5, -1.0], (128, 1)), abs=1e-5)
    truth = np.load(tmp_path / "d" / TRUTH_FILE)
    names = ("clen_offset_percent", "centre_x_offset_px", "centre_y_offset_px")
    undone = experiment.geometry.moved(Parameters(**{name: float(truth[name]) for name in names}))
    assert undone.corner_px == pytest.approx(world.geometry.corner_px, abs=1e-5)
    assert undone.clen_m == pytest.approx(world.geometry.clen_m)


def test_the_truth_is_in_no_other_file(tmp_path: Path) -> None:
    """The same frames with two geometries differ in the .geom alone."""
    bad = dataclasses.replace(QUIET, clen_error_percent=3.0, centre_error_px=(-1.5, 1.0))
    for name, preset in (("a", QUIET), ("b", bad)):
        simulate(preset, 1, 1, tmp_path / name)
    for file in ("reference.cell", "frames.lst", "parameters.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert np.array_equal(images_of(tmp_path / "a"), images_of(tmp_path / "b"))
    text = (tmp_path / "b" / "experiment.geom").read_text()
    assert "0.12000" not in text and "clen = 0.123600000 m" in text
    assert "error" not in text and "truth" not in text


def test_the_truth_is_that_of_the_frames(tmp_path: Path) -> None:
    preset = dataclasses.replace(PRESETS["clean"], second_crystal_rate=0.5, hit_rate=0.6)
    simulate(preset, 4, 3, tmp_path / "d")
    truth, world = np.load(tmp_path / "d" / TRUTH_FILE), make_world(preset, 3)
    drawn = [draw_frame(world, np.random.default_rng([3, 0xF4A, i]))[1] for i in range(4)]
    assert truth["num_crystals"].tolist() == [len(t.scale) for t in drawn]
    assert np.array_equal(truth["crystal_frame"], [i for i, t in enumerate(drawn) for _ in t.scale])
    assert np.array_equal(
        truth["reciprocal_per_A"], np.concatenate([t.reciprocal_per_A for t in drawn])
    )
    assert json.loads(str(truth["preset"]))["seed"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_makes_an_experiment(name: str, tmp_path: Path) -> None:
    experiment = simulate(name, 2, 1, tmp_path / "d")
    preset = named_preset(name)
    assert len(experiment.frames) == 2
    images = images_of(tmp_path / "d")
    assert images.size == 2 * 1024 * 1024
    assert 0 < np.median(images) < 60
    expected = user_geometry(make_world(preset, 1))
    assert experiment.geometry.clen_m == pytest.approx(expected.clen_m)
    assert experiment.geometry.corner_px == pytest.approx(expected.corner_px, abs=1e-5)
    assert read_geometry(experiment.geometry_path).panels == expected.panels


def test_another_preset_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    simulate(QUIET, 1, 1, tmp_path / "d")
    before = images_of(tmp_path / "d")
    with pytest.raises(SimulationError, match="holds a simulation already: name another, or use"):
        simulate(QUIET, 1, 2, tmp_path / "d")
    assert np.array_equal(images_of(tmp_path / "d"), before)
    simulate(QUIET, 1, 2, tmp_path / "d", force=True)
    assert not np.array_equal(images_of(tmp_path / "d"), before)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(SimulationError, match="holds other things"):
        simulate(QUIET, 1, 2, tmp_path / "other", force=True)
    with pytest.raises(SimulationError, match="is a file: name a folder"):
        simulate(QUIET, 1, 2, tmp_path / "other" / "thesis.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "other"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "the number of frames is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"dtype": "int8"}, "'int8' is no data type of frames"),
        ({"num_processes": 0}, "the number of processes is 0"),
        ({"preset": "lysozime"}, "there is no preset 'lysozime'; there are clean, lysozyme"),
        ({"preset": Preset(detector="film")}, "'film' is no detector"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    arguments = {"preset": "lysozyme", "num_frames": 1, "seed": 1, "out": tmp_path / "d"}
    with pytest.raises(SimulationError, match=message):
        simulate(**(arguments | change))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    arguments = ["sfx", "simulate", "--preset", "clean", "--frames", "2", "--seed", "4"]
    assert main([*arguments, "--out", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_frames"], result["preset"], result["seed"]) == (2, "clean", 4)
    assert result["digest"] == read_experiment(out).digest
    assert main([*arguments, "--out", out]) == 2
    assert "use --force" in capsys.readouterr().err
    assert main([*arguments, "--out", out, "--force"]) == 0
    assert "2 frames of preset clean, seed 4" in capsys.readouterr().out


def test_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sfx", "simulate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(PRESETS) <= set(words)


@pytest.mark.slow
def test_response_of_lysozyme_has_its_optimum_and_its_cliffs(tmp_path: Path) -> None:
    """The shape measured with CrystFEL 0.12; see benchmarks/sfx_response.py for all of it."""
    experiment = simulate("lysozyme", 60, 1, tmp_path / "d")
    indexer = EmbeddedIndexer(experiment)

    def indexed(**changes: float) -> int:
        parameters = experiment.nominal.replace(**changes)
        return indexer.run(parameters, experiment.frames).num_indexed

    best = indexed()
    assert 15 <= best <= 33  # CrystFEL: 24
    assert indexed(min_snr=3.5) <= 0.25 * best
    assert 0.5 * best <= indexed(min_snr=8) <= 0.85 * best
    assert indexed(min_snr=12) <= 0.6 * best
    assert indexed(clen_offset_percent=2) >= 0.8 * best
    assert indexed(clen_offset_percent=6) == 0
    assert indexed(min_pix_count=1) <= 0.4 * best
    assert indexed(min_peaks=100) <= 0.6 * best
    assert indexed(threshold_adu=200) <= 0.4 * best
