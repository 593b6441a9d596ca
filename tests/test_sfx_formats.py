"""CrystFEL's files: geometry, cell, list, stream, frames. Numbers are worked out by hand."""

import math
import pickle
import random
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.crystfel.experiment import read_experiment
from envs.crystfel.sfx.formats import (
    HC_EV_A,
    FormatError,
    Geometry,
    Plane,
    all_frames,
    format_cell,
    format_frames,
    format_geometry,
    good_pixels,
    masks_by_frame,
    parse_cell,
    parse_frames,
    parse_geometry,
    read_frames,
    read_geometry,
    read_image,
    read_images,
    tuned_geometry_text,
)
from envs.crystfel.sfx.stream import (
    crystal_of,
    format_stream,
    parse_stream,
    read_stream,
    slab_positions,
    stream_peaks,
    write_stream,
)
from envs.crystfel.types import Frame, Parameters, UnitCell

GEOM = """\
; two tiles of a made-up detector
photon_energy = 9.5 keV
clen = 120 mm   ; from the encoder
res = 5000
adu_per_photon = 4
dim0 = %
dim1 = ss
dim2 = fs
data = /entry/data/data
rigid_group_all = a,b
group_all = a,b

a/min_fs = 0
a/max_fs = 7
a/min_ss = 0
a/max_ss = 3
a/fs = +1.0x
a/ss = y
a/corner_x = -10.5 ; left
a/corner_y = 2

mask_edge_pixels = 1
b/min_fs = 0
b/max_fs = 7
b/min_ss = 4
b/max_ss = 9
b/fs = -0.6x +0.8y
b/ss = -0.8x - 0.6y + 0.5z
b/corner_x = 3.5
b/corner_y = -1
b/coffset = 0.01
b/res = 10000

bad_corner/min_fs = 6
bad_corner/max_fs = 7
bad_corner/min_ss = 0
bad_corner/max_ss = 0
bad_corner/panel = a
"""


def test_geometry_by_hand() -> None:
    g = parse_geometry(GEOM)
    assert g.panels == ("a", "b")
    assert g.window.tolist() == [[0, 7, 0, 3], [0, 7, 4, 9]]
    assert (g.clen_m, g.photon_energy_eV, g.adu_per_photon) == (0.12, 9500.0, 4.0)
    assert g.wavelength_A == pytest.approx(12398.419843320026 / 9500)
    assert g.planes == (Plane(data="/entry/data/data", dims=("%", "ss", "fs")),)
    assert g.fs_vector.tolist() == [[1, 0, 0], [-0.6, 0.8, 0]]
    assert g.ss_vector.tolist() == [[0, 1, 0], [-0.8, -0.6, 0.5]]
    assert g.corner_px.tolist() == [[-10.5, 2], [3.5, -1]]
    assert g.coffset_m.tolist() == [0, 0.01]
    assert g.res_per_m.tolist() == [5000, 10000]  # the default, and the panel's own
    assert g.edge_px.tolist() == [0, 1]  # a default is for panels first mentioned later
    assert g.shape == (10, 8)
    assert g.distance_m == pytest.approx(0.125)


def test_positions_by_hand() -> None:
    g = parse_geometry(GEOM)
    xyz = g.positions_m(np.array([0.0, 2.5, 1.0]), np.array([0.0, 3.0, 6.0]), np.array([0, 0, 1]))
    assert xyz[0] == pytest.approx([-10.5 / 5000, 2 / 5000, 0.12])
    assert xyz[1] == pytest.approx([-8 / 5000, 5 / 5000, 0.12])
    # b: one px along fs and two along ss from its corner (row 4 is its first).
    expected = [(3.5 - 0.6 - 1.6) / 1e4, (-1 + 0.8 - 1.2) / 1e4, 0.13 + 1.0 / 1e4]
    assert xyz[2] == pytest.approx(expected)
    assert g.pixel_positions_m[0, 0] == pytest.approx([-10 / 5000, 2.5 / 5000, 0.12])


def test_scattering_vector_of_a_ray_at_45_degrees() -> None:
    g = parse_geometry(GEOM)
    q = g.q_per_A(np.array([[0.0, 0.0, 0.3], [0.1, 0.0, 0.1]]))
    assert q[0] == pytest.approx([0, 0, 0])
    assert np.linalg.norm(q[1]) == pytest.approx(2 * math.sin(math.radians(22.5)) / g.wavelength_A)
    assert q[1, 2] < 0 < q[1, 0]


@pytest.mark.parametrize(
    ("text", "vector"),
    [
        ("x", (1, 0, 0)),
        ("-y", (0, -1, 0)),
        ("+0.5x-0.25y", (0.5, -0.25, 0)),
        (" - 0.5 x + 1e-3y -.5z", (-0.5, 0.001, -0.5)),
        ("1x 0.5y", None),
        ("0.5", None),
        ("nanx", None),
    ],
)
def test_directions(text: str, vector: tuple[float, float, float] | None) -> None:
    changed = GEOM.replace("a/fs = +1.0x", f"a/fs = {text}")
    if vector is None:
        with pytest.raises(FormatError, match=r"^geometry:17: expected a direction"):
            parse_geometry(changed)
    else:
        # (0, -1, 0) is parallel to ss = y.
        changed = changed.replace("a/ss = y", "a/ss = 0.1x+z")
        assert parse_geometry(changed).fs_vector[0] == pytest.approx(vector)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a/min_fs = 0", "a/min_fs = zero", r"geometry:13: expected a number, found 'zero'"),
        ("a/min_fs = 0", "a/min_fs", r"geometry:13: expected `name = value`"),
        ("a/min_fs = 0", "a/minfs = 0", r"geometry:13: 'minfs' is not known, did you mean min_fs"),
        ("res = 5000", "ress = 5000", r"geometry:4: 'ress' is not known, did you mean res\?"),
        ("res = 5000", "", r"panel 'a' has no res"),
        ("res = 5000", "res = 0", r"geometry:4: res is pixels per metre"),
        ("clen = 120 mm", "clen = 120 inch", r"geometry:3: the unit 'inch' is not one of m, mm"),
        ("clen = 120 mm", "", r"no clen"),
        (
            "a/min_fs = 0",
            "a/min_fs = 0\na/clen = 0.1",
            r"geometry:14: clen differs from geometry:3",
        ),
        ("clen = 120 mm", "clen = 0", r"geometry:3: clen \+ coffset is 0"),
        ("clen = 120 mm", "clen = /LCLS/z", r"geometry:3: clen is looked up in the data"),
        ("9.5 keV", "9.5", r"geometry:2: a photon energy of 9.5 eV cannot be right"),
        ("a/max_fs = 7", "a/max_fs = -1", r"geometry:14: panel 'a' covers fs 0 to -1"),
        ("a/max_fs = 7", "a/max_fs = 1e12", r"geometry:14: panel 'a' covers fs"),
        ("a/ss = y", "a/ss = -x", r"geometry:18: fs and ss of panel 'a' are parallel"),
        ("dim2 = fs", "dim3 = fs", r"dim2 is missing"),
        ("dim2 = fs", "dim2 = ss", r"must name ss once and fs once"),
        ("dim0 = %", "dim0 = x", r"geometry:6: expected %, ss, fs or a number"),
        ("bad_corner/panel = a", "bad_corner/panel = c", r"geometry:38: there is no panel 'c'"),
        ("bad_corner/max_fs = 7", "", r"'bad_corner' has no max_fs"),
        ("photon_energy = 9.5 keV", "electron_voltage = 200 kV", r"geometry:2: electron"),
    ],
)
def test_what_is_wrong_with_a_geometry_is_said_with_its_line(
    old: str, new: str, message: str
) -> None:
    assert GEOM.count(old) >= 1
    with pytest.raises(FormatError, match=message):
        parse_geometry(GEOM.replace(old, new, 1))


def test_text_without_panels_is_refused() -> None:
    with pytest.raises(FormatError, match=r"my\.geom: no panel"):
        parse_geometry("clen = 1", "my.geom")


def test_wavelength_instead_of_energy() -> None:
    text = GEOM.replace("photon_energy = 9.5 keV", "wavelength = 1.25 A")
    assert parse_geometry(text).photon_energy_eV == pytest.approx(HC_EV_A / 1.25)
    with pytest.raises(FormatError, match="is given already"):
        parse_geometry(text + "photon_energy = 9500\n")


def test_values_looked_up_in_the_frames(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["encoder"] = 150.0  # mm: a header is, where no unit is given
        file["energy"] = [9000.0, 9100.0]
    text = GEOM.replace("clen = 120 mm", "clen = /encoder")
    text = text.replace("photon_energy = 9.5 keV", "photon_energy = /energy eV")
    frame = Frame(path=str(tmp_path / "f.h5"), event="//1")
    g = parse_geometry(text, "g", frame)
    assert (g.clen_m, g.photon_energy_eV) == (pytest.approx(0.15), 9100.0)
    # The adapter's .geom has the number, and no path any more.
    tuned = tuned_geometry_text(text, g, Parameters(clen_offset_percent=10))
    assert "clen = 0.165500000 m   ; from the encoder" in tuned  # 10 % of 0.155 m on average
    with pytest.raises(FormatError, match=r"g:2: cannot read /energy of .*other\.h5"):
        parse_geometry(text, "g", Frame(path=str(tmp_path / "other.h5")))
    with pytest.raises(FormatError, match="has no number for frame"):
        parse_geometry(text, "g", Frame(path=frame.path, event="//2"))


def test_one_looked_up_value_serves_all_frames_that_are_alike(tmp_path: Path) -> None:
    """Energies of 9000, 9020 and 9100 eV: the middle one, and no farther off than 1 %."""
    for name, energies in (("a.h5", [9000.0, 9020.0]), ("b.h5", 9100.0)):
        with h5py.File(tmp_path / name, "w") as file:
            file["energy"], file["clen"] = energies, 120.0
    text = GEOM.replace("9.5 keV", "/energy").replace("clen = 120 mm", "clen = /clen")
    a, b = (str(tmp_path / name) for name in ("a.h5", "b.h5"))
    frames = [Frame(path=a, event="//0"), Frame(path=a, event="//1"), Frame(path=b, event="//5")]
    assert parse_geometry(text, "g", *frames).photon_energy_eV == 9020
    assert parse_geometry(text, "g", Frame(path=a)).photon_energy_eV == 9010, "all of the file"
    with h5py.File(b, "r+") as file:
        del file["clen"]
        file["clen"] = 122.0
    with pytest.raises(FormatError, match=r"g:3: clen is 120 in the middle .* 122 at its farthest"):
        parse_geometry(text, "g", *frames)
    with h5py.File(tmp_path / "d.h5", "w") as file:  # a reading failed, once
        file["energy"], file["clen"] = [0.0] + 29 * [9000.0], 120.0
    assert parse_geometry(text, "g", Frame(path=str(tmp_path / "d.h5"))).photon_energy_eV == 9000
    with pytest.raises(FormatError, match=r"cannot read /energy of .*c\.h5"):
        parse_geometry(text, "g", *frames, Frame(path=str(tmp_path / "c.h5")))


def test_a_shift_may_be_close_to_nothing(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["x"] = [1e-6, -1e-6, 3e-6]
    text = GEOM.replace("res = 5000", "res = 5000\ndetector_shift_x = /x\ndetector_shift_y = 1 mm")
    g = parse_geometry(text, "g", Frame(path=str(tmp_path / "f.h5")))
    assert g.corner_px[0].tolist() == pytest.approx([-10.5 + 1e-6 * 5000, 2 + 1e-3 * 5000])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("flag_equal = -1", r"flag_equal of panel 'b' is not that of panel 'a'"),
        ("b/mask0_data = /mask", r"mask0_data of panel 'b' is not that of panel 'a'"),
        ("b/mask_bad = 0xff", r"mask0_badbits of panel 'b'"),
    ],
)
def test_what_would_be_read_wrongly_of_one_panel_is_refused(line: str, message: str) -> None:
    with pytest.raises(FormatError, match=rf"geometry:22: {message}"):
        parse_geometry(GEOM.replace("mask_edge_pixels = 1", line))


def test_a_default_that_comes_too_late_is_refused_and_so_is_a_panel_without_directions() -> None:
    with pytest.raises(FormatError, match=r"geometry:39: holds for panels that come after it"):
        parse_geometry(GEOM + "res = 10000\n")
    with pytest.raises(FormatError, match=r"panel 'a' has no ss: .* `a/ss = "):
        parse_geometry(GEOM.replace("a/ss = y\n", ""))


def test_flags_add_up() -> None:
    flags = "flag_equal = -1\nflag_equal = 65535\nflag_lessthan = -50\nflag_lessthan = -10\n"
    g = parse_geometry(flags + "flag_morethan = 9e4\n" + GEOM)
    assert (g.flag_equal, g.flag_below, g.flag_above) == ((-1, 65535), -10, 9e4)
    assert parse_geometry(format_geometry(g)).flag_equal == (-1, 65535)


OFFSETS = Parameters(clen_offset_percent=2, centre_x_offset_px=1.5, centre_y_offset_px=-0.5)


def test_moved_centre_and_distance() -> None:
    g, moved = parse_geometry(GEOM), parse_geometry(GEOM).moved(OFFSETS)
    # The beam hits 1.5 px further along +x: seen from it, everything lies 1.5 px to the left.
    assert moved.corner_px.tolist() == [[-12, 2.5], [2, -0.5]]
    assert moved.clen_m == pytest.approx(0.12 + 0.02 * 0.125)
    assert moved.distance_m == pytest.approx(1.02 * g.distance_m)


def test_tuned_text_changes_nothing_else() -> None:
    g = parse_geometry(GEOM)
    assert tuned_geometry_text(GEOM, g, Parameters(min_snr=8)) == GEOM
    text = tuned_geometry_text(GEOM, g, OFFSETS)
    changed = [
        (old, new)
        for old, new in zip(GEOM.splitlines(), text.splitlines(), strict=True)
        if old != new
    ]
    assert changed == [
        ("clen = 120 mm   ; from the encoder", "clen = 0.122500000 m   ; from the encoder"),
        ("a/corner_x = -10.5 ; left", "a/corner_x = -12.000000 ; left"),
        ("a/corner_y = 2", "a/corner_y = 2.500000"),
        ("b/corner_x = 3.5", "b/corner_x = 2.000000"),
        ("b/corner_y = -1", "b/corner_y = -0.500000"),
    ]
    same = parse_geometry(text)
    moved = g.moved(OFFSETS)
    assert same.corner_px == pytest.approx(moved.corner_px)
    assert same.clen_m == pytest.approx(moved.clen_m)


def test_clen_of_each_panel_is_that_of_all() -> None:
    text = GEOM.replace("clen = 120 mm   ; from the encoder\n", "")
    text = text.replace("a/min_fs", "a/clen = 0.12\na/min_fs").replace(
        "b/min_fs", "b/clen = 0.12\nb/min_fs"
    )
    g = parse_geometry(text)
    assert g.clen_m == 0.12
    tuned = tuned_geometry_text(text, g, OFFSETS)
    assert tuned.count("/clen = 0.122500000 m\n") == 2
    assert parse_geometry(tuned).clen_m == pytest.approx(g.moved(OFFSETS).clen_m)


def test_a_geometry_travels_without_its_maps() -> None:
    g = parse_geometry(GEOM)
    before = len(pickle.dumps(g))
    assert g.pixel_positions_m.shape == (10, 8, 3)
    assert len(pickle.dumps(g)) == before
    again = pickle.loads(pickle.dumps(g))
    assert np.array_equal(again.pixel_positions_m, g.pixel_positions_m, equal_nan=True)


def test_tuned_text_keeps_line_ends() -> None:
    text = GEOM.replace("\n", "\r\n")
    tuned = tuned_geometry_text(text, parse_geometry(text), OFFSETS)
    assert tuned.count("\r\n") == text.count("\r\n") == tuned.count("\n")


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    p, planes = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    angle = rng.uniform(0, 2 * math.pi, p)
    first = rng.integers(0, 5, (p, 2))
    sides = rng.integers(1, 30, (p, 2))
    window = np.column_stack(
        [first[:, 0], first[:, 0] + sides[:, 0], first[:, 1], first[:, 1] + sides[:, 1]]
    )
    return Geometry(
        panels=tuple(f"q{i}" for i in range(p)),
        window=window,
        # One panel per plane, so that panels never overlap on the slab.
        plane_index=np.arange(p),
        planes=tuple(Plane(data=f"/d{planes}", dims=("%", i, "ss", "fs")) for i in range(p)),
        fs_vector=np.column_stack([np.cos(angle), np.sin(angle), rng.normal(0, 0.05, p)]),
        ss_vector=np.column_stack([-np.sin(angle), np.cos(angle), rng.normal(0, 0.05, p)]),
        corner_px=rng.uniform(-500, 500, (p, 2)),
        coffset_m=rng.normal(0, 0.001, p),
        res_per_m=rng.uniform(5000, 13000, p),
        clen_m=float(rng.uniform(0.05, 0.5)),
        photon_energy_eV=float(rng.uniform(5000, 15000)),
        adu_per_photon=float(rng.uniform(0.1, 100)),
        bad_panels=rng.random(p) < 0.2,
    )


@settings(deadline=None)
@given(geometries())
def test_written_geometry_is_read_back(g: Geometry) -> None:
    again = parse_geometry(format_geometry(g, comment="two\nlines"))
    assert (again.panels, again.planes) == (g.panels, g.planes)
    assert np.array_equal(again.window, g.window)
    assert np.array_equal(again.plane_index, g.plane_index)
    assert np.array_equal(again.bad_panels, g.bad_panels)
    for name in ("fs_vector", "ss_vector", "corner_px", "coffset_m", "res_per_m"):
        assert getattr(again, name) == pytest.approx(getattr(g, name), abs=1e-6)
    for name in ("clen_m", "photon_energy_eV", "adu_per_photon"):
        assert getattr(again, name) == pytest.approx(getattr(g, name), abs=1e-6)


@settings(deadline=None)
@given(geometries(), st.integers(0, 10**6))
def test_a_ray_hits_the_point_that_it_goes_to(g: Geometry, seed: int) -> None:
    rng = np.random.default_rng(seed)
    panel = rng.integers(len(g.panels), size=20)
    sides = g.window[panel][:, [1, 3]] - g.window[panel][:, [0, 2]] + 1
    fs, ss = (g.window[panel][:, [0, 2]] + sides * rng.uniform(0.01, 0.99, (20, 2))).T
    ss = ss + g.row_offset[panel]
    xyz = g.positions_m(fs, ss, panel)
    found_fs, found_ss, found = g.locate(xyz * rng.uniform(0.1, 10, (20, 1)))
    # Another panel may stand in the way; then its point is on the same ray.
    back = g.positions_m(found_fs, found_ss, found)
    assert (found >= 0).all()
    assert np.linalg.norm(np.cross(back, xyz), axis=1) == pytest.approx(np.zeros(20), abs=1e-9)
    same = found == panel
    assert found_fs[same] == pytest.approx(fs[same], abs=1e-6)
    assert found_ss[same] == pytest.approx(ss[same], abs=1e-6)
    assert np.array_equal(g.panel_index[found_ss.astype(int), found_fs.astype(int)], found)
    assert (g.locate(-xyz)[2] == -1).all()


# ------------------------------------------------------------------------------ frames


MODULES = """\
photon_energy = 9300
clen = 0.12
res = 5000
data = /entry/data/data
dim0 = %
dim2 = ss
dim3 = fs
min_fs = 0
max_fs = 3
min_ss = 0
max_ss = 1
fs = x
ss = y
mask = /entry/data/mask
mask_good = 0x9
mask_bad = 6
m0/dim1 = 0
m0/corner_x = 0
m0/corner_y = 0
m1/dim1 = 2
m1/corner_x = 0
m1/corner_y = 10
"""


@pytest.fixture
def module_file(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["entry/data/data"] = np.arange(2 * 3 * 2 * 4, dtype=np.int16).reshape(2, 3, 2, 4)
        mask = np.full((3, 2, 4), 9, dtype=np.uint16)
        mask[0, 0, 1] = 0  # not good
        mask[2, 1, 3] = 5  # bad
        mask[2, 0, 0] = 8  # one of two good bits
        file["entry/data/mask"] = mask
    return tmp_path / "m.h5"


def test_modules_are_stacked_on_the_slab(module_file: Path) -> None:
    g = parse_geometry(MODULES)
    assert g.shape == (4, 4)
    assert g.row_offset.tolist() == [0, 2]
    image = read_image(g, Frame(path=str(module_file), event="//1"))
    assert image.tolist() == [
        [24, 25, 26, 27],
        [28, 29, 30, 31],
        [40, 41, 42, 43],  # the third module: the second is not in the geometry
        [44, 45, 46, 47],
    ]
    assert image.dtype == np.int16
    both = list(read_images(g, [Frame(path=str(module_file), event=f"//{i}") for i in (1, 0)]))
    assert np.array_equal(both[0], image)
    assert both[1][0].tolist() == [0, 1, 2, 3]
    good = good_pixels(g, Frame(path=str(module_file), event="//1"))
    assert np.argwhere(~good).tolist() == [[0, 1], [2, 0], [3, 3]]


def test_modules_lie_in_any_order_and_along_any_axis(tmp_path: Path) -> None:
    data = np.arange(3 * 2 * 4).reshape(3, 2, 4)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["entry/data/data"] = np.moveaxis(data, 0, 2)  # (ss, fs, module)
    text = MODULES[: MODULES.index("mask")].replace("dim0 = %", "dim0 = ss")
    text = text.replace("dim2 = ss", "dim1 = fs").replace("dim3 = fs\n", "")
    for order in ((2, 0, 1), (1, 2), (0, 2)):
        corners = "".join(f"m{i}/dim2 = {i}\nm{i}/corner_x = 0\nm{i}/corner_y = 0\n" for i in order)
        g = parse_geometry(text + corners)
        image = read_image(g, Frame(path=str(tmp_path / "m.h5")))
        assert np.array_equal(image, np.concatenate([data[i] for i in order]))


def test_far_apart_modules_are_read_alone(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["entry/data/data"] = np.arange(40 * 8).reshape(1, 40, 2, 4)
    text = MODULES[: MODULES.index("mask")] + MODULES[MODULES.index("m0/") :]
    g = parse_geometry(text.replace("m1/dim1 = 2", "m1/dim1 = 39"))
    image = read_image(g, Frame(path=str(tmp_path / "m.h5"), event="//0"))
    assert image[:, 0].tolist() == [0, 4, 312, 316]


def test_masks_of_single_frames_are_told_from_those_of_a_file(module_file: Path) -> None:
    g, path = parse_geometry(MODULES), str(module_file)
    assert masks_by_frame(g, path) == ()
    with h5py.File(path, "r+") as file:
        del file["entry/data/mask"]
        mask = np.full((2, 3, 2, 4), 9, dtype=np.uint16)
        mask[1, 2, 0, 2] = 0
        file["entry/data/mask"] = mask
    assert masks_by_frame(g, path) == g.masks
    bad = [np.argwhere(~good_pixels(g, Frame(path=path, event=f"//{i}"))) for i in (0, 1)]
    assert [places.tolist() for places in bad] == [[], [[2, 2]]]


def test_a_mask_file_lies_beside_the_geometry(tmp_path: Path) -> None:
    text = MODULES.replace("mask = /entry/data/mask", "mask = /bad\nmask_file = bad.h5")
    mask = np.full((3, 2, 4), 9, dtype=np.uint16)
    mask[0, 1, 0] = 13
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["bad"] = mask
    (tmp_path / "m.geom").write_text(text)
    g = read_geometry(tmp_path / "m.geom")
    assert g.masks[0].file == str(tmp_path / "bad.h5")
    assert np.argwhere(~good_pixels(g)).tolist() == [[1, 0]]


def test_a_file_listed_without_an_event_stands_for_all_its_frames(module_file: Path) -> None:
    g, path = parse_geometry(MODULES), str(module_file)
    listed = [Frame(path=path, event="//1"), Frame(path=path)]
    assert [frame.event for frame in all_frames(g, listed)] == ["//1", "//0", "//1"]
    single = parse_geometry(MODULES.replace("dim0 = %", "dim0 = 0"))
    assert all_frames(single, listed) == tuple(listed)
    with pytest.raises(FormatError, match=r"/entry/x is no dataset with 4 axes"):
        all_frames(parse_geometry(MODULES.replace("/entry/data/data", "/entry/x")), listed)
    with pytest.raises(FormatError, match="needs an event for each frame"):
        all_frames(parse_geometry(MODULES.replace("/entry/data/data", "/entry/%/x")), listed)


@pytest.mark.parametrize(
    ("change", "event", "message"),
    [
        (("", ""), "//2", r"m\.h5: /entry/data/data: number 2 of an axis with 2"),
        (("", ""), "", r"event '//' has 0 numbers, while the dims have 1 %"),
        (("", ""), "//1/1", r"event '//1/1' has 2 numbers"),
        (("data/data", "data/other"), "//0", r"there is no such dataset"),
        (("/entry/data/data", "/entry/data"), "//0", r"is a group, and must be a dataset"),
        (("max_fs = 3", "max_fs = 4"), "//0", r"4 px along fs, while the .geom needs 5"),
        (("m1/dim1 = 2", "m1/dim1 = 7"), "//0", r"number 7 of an axis with 3"),
        (("dim3 = fs", "dim3 = fs\ndim4 = 0"), "//0", r"has 4 axes, while the .geom has 5 dims"),
    ],
)
def test_a_frame_that_does_not_fit_is_told(
    module_file: Path, change: tuple[str, str], event: str, message: str
) -> None:
    g = parse_geometry(MODULES.replace(*change) if change[0] else MODULES)
    with pytest.raises(FormatError, match=message):
        read_image(g, Frame(path=str(module_file), event=event))


def test_a_file_that_is_no_hdf5_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(b"not HDF5")
    g = parse_geometry(MODULES)
    for name in ("x.h5", "none.h5"):
        with pytest.raises(FormatError, match=rf"{name}: cannot be opened as HDF5"):
            read_image(g, Frame(path=str(tmp_path / name), event="//0"))
    with pytest.raises(FormatError, match="the mask /entry/data/mask is in the frames' files"):
        good_pixels(g)


def test_good_pixels_by_hand() -> None:
    g = parse_geometry(GEOM.replace("mask_edge_pixels = 1", "b/no_index = 1"))
    good = good_pixels(g)
    assert not good[4:].any()
    assert np.argwhere(~good[:4]).tolist() == [[0, 6], [0, 7]]
    # The same region in the laboratory: centres at x = -4 and -3 px, y = 2.5 px.
    bounds = "bad_corner/min_x = -4.2\nbad_corner/max_x = 0\n"
    bounds += "bad_corner/min_y = 2\nbad_corner/max_y = 3\n"
    text = GEOM[: GEOM.index("bad_corner")].replace("mask_edge_pixels = 1", "b/no_index = true")
    assert np.array_equal(good_pixels(parse_geometry(text + bounds)), good)
    edge = parse_geometry(text.replace("res = 5000", "res = 5000\nmask_edge_pixels = 1"))
    assert good_pixels(edge)[:4].tolist() == [
        [False] * 8,
        [False] + [True] * 6 + [False],
        [False] + [True] * 6 + [False],
        [False] * 8,
    ]


# ------------------------------------------------------------------------------ cells and lists


CELL = """\
CrystFEL unit cell file version 1.0

lattice_type = tetragonal
centering = P
unique_axis = c

a = 79.20 A
b = 7.92 nm
c = 38.00 A
al = 90.00 deg
be = 90.00 deg
ga = 90.00 deg   ; right angles
"""
LYSOZYME = UnitCell(
    a_A=79.2, b_A=79.2, c_A=38.0, lattice_type="tetragonal", centering="P", unique_axis="c"
)


def test_cell_by_hand() -> None:
    cell = parse_cell(CELL)
    assert cell.as_array() == pytest.approx([79.2, 79.2, 38, 90, 90, 90])
    assert (cell.lattice_type, cell.centering, cell.unique_axis) == ("tetragonal", "P", "c")
    assert parse_cell(format_cell(LYSOZYME)) == LYSOZYME


def test_cell_of_a_pdb_file() -> None:
    line = "CRYST1   79.200   79.200   38.000  90.00  90.00 120.00 P 43 21 2     8"
    cell = parse_cell(f"HEADER    LYSOZYME\n{line}\nATOM\n")
    assert cell.as_array() == pytest.approx([79.2, 79.2, 38, 90, 90, 120])
    assert cell.centering == "P"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a = 79.20 A", "a = long", r"cell:7: expected a number, found 'long'"),
        ("a = 79.20 A", "a = 79.20 inch", r"cell:7: the unit 'inch'"),
        ("a = 79.20 A", "a = -79.20 A", r"cell:7: axes"),
        ("c = 38.00 A\n", "", r"no c: a reference cell needs all six numbers"),
        ("al = 90.00", "al = 200.00", r"cannot make a cell"),
        ("be = 90.00 deg\nga = 90.00", "be = 170 deg\nga = 10", r"cannot make a cell"),
        ("tetragonal", "tetragon", r"cell:3: 'tetragon' is not known, did you mean tetragonal"),
        ("centering = P", "centering = Q", r"cell:4: centering 'Q'"),
        ("unique_axis = c\n", "", r"cell: no unique_axis, which a tetragonal cell has"),
        ("unique_axis", "unique", r"cell:5: 'unique' is not known, did you mean unique_axis"),
    ],
)
def test_what_is_wrong_with_a_cell_is_said(old: str, new: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_cell(CELL.replace(old, new))


@pytest.mark.parametrize(
    ("centering", "allowed"),
    [
        ("P", [1, 1, 1, 1, 1, 1]),
        ("R", [1, 1, 1, 1, 1, 1]),
        ("A", [0, 0, 1, 1, 1, 0]),
        ("B", [0, 1, 0, 1, 1, 0]),
        ("C", [1, 0, 0, 1, 1, 1]),
        ("I", [0, 1, 1, 0, 1, 1]),
        ("F", [0, 0, 0, 1, 1, 0]),
        ("H", [0, 1, 0, 0, 0, 0]),
    ],
)
def test_which_reflections_a_centering_allows(centering: str, allowed: list[int]) -> None:
    """Of the six -h + k + l is 1, 0, 2, 1, 2 and 2."""
    cell = UnitCell(a_A=10, b_A=10, c_A=10, centering=centering)
    hkl = [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 2), (1, 1, 2)]
    assert cell.allows(hkl).tolist() == [bool(flag) for flag in allowed]


def test_reciprocal_basis_by_hand() -> None:
    rows = LYSOZYME.reciprocal_per_A()
    assert rows == pytest.approx(np.diag([1 / 79.2, 1 / 79.2, 1 / 38]))
    hexagonal = UnitCell(a_A=10, b_A=10, c_A=20, gamma_deg=120).reciprocal_per_A()
    # a* makes 30 degrees with a, its length is 1 / (a sin 60).
    assert hexagonal[0] == pytest.approx([0.1, 0.1 / math.sqrt(3), 0])
    assert hexagonal[1] == pytest.approx([0, 0.2 / math.sqrt(3), 0], abs=1e-12)
    assert hexagonal[2] == pytest.approx([0, 0, 0.05])


@given(
    st.lists(st.floats(10, 300), min_size=3, max_size=3),
    st.lists(st.floats(60, 119), min_size=3, max_size=3),
)
def test_a_crystal_of_a_cell_has_that_cell(lengths: list[float], angles: list[float]) -> None:
    cosines = [math.cos(math.radians(a)) for a in angles]
    if 1 + 2 * math.prod(cosines) - sum(c * c for c in cosines) < 0.05:
        return
    cell = parse_cell(
        "".join(f"{n} = {x} A\n" for n, x in zip("abc", lengths, strict=True))
        + "".join(f"{n} = {x} deg\n" for n, x in zip(("al", "be", "ga"), angles, strict=True))
    )
    found = crystal_of(cell.reciprocal_per_A(), cell).cell
    assert found == pytest.approx([*lengths, *angles])


def test_list_of_frames(tmp_path: Path) -> None:
    (tmp_path / "a.lst").write_text(
        "one.h5 //3\n\n/abs/two.h5\nsub dir/three.h5 entry_1//7\r\nfour five.h5\n"
    )
    frames = read_frames(tmp_path / "a.lst")
    assert [(frame.path, frame.event) for frame in frames] == [
        (str(tmp_path / "one.h5"), "//3"),
        ("/abs/two.h5", ""),
        (str(tmp_path / "sub dir/three.h5"), "entry_1//7"),
        (str(tmp_path / "four five.h5"), ""),
    ]
    assert parse_frames(format_frames(frames)) == frames
    assert parse_frames(format_frames(frames, tmp_path), folder=tmp_path) == frames
    with pytest.raises(FormatError, match=r"list:2: expected a file and perhaps an event"):
        parse_frames("a.h5\nb.h5 //x\n")


# ------------------------------------------------------------------------------ streams


STREAM = """\
CrystFEL stream format 2.3
Generated by CrystFEL 0.12.0
indexamajig -i x.lst -o x.stream
----- Begin geometry file -----
clen = 0.12
----- End geometry file -----
----- Begin unit cell -----
a = 1 A
----- End unit cell -----
Indexing methods selected: asdf
----- Begin chunk -----
Image filename: /data/x y.h5
Event: //5
Image serial number: 2
hit = 1
indexed_by = asdf
n_indexing_tries = 1
photon_energy_eV = 9300.000000
beam_divergence = 0.00e+00 rad
beam_bandwidth = 1.00e-08 (fraction)
average_camera_length = 0.120000 m
num_peaks = 2
peak_resolution = 5.67 nm^-1 or 1.76 A
Peaks from peak search
  fs/px   ss/px (1/d)/nm^-1   Intensity  Panel
   6.50    1.25       5.37      100.55   a
   2.00    5.00       4.00       50.00   b
End of peak list
--- Begin crystal
Cell parameters 7.92000 7.92000 3.80000 nm, 90.00000 90.00000 90.00000 deg
astar = +0.1262626 +0.0000000 +0.0000000 nm^-1
bstar = +0.0000000 +0.1262626 +0.0000000 nm^-1
cstar = +0.0000000 +0.0000000 +0.2631579 nm^-1
lattice_type = tetragonal
centering = P
unique_axis = c
profile_radius = 0.00559 nm^-1
predict_refine/det_shift x = 0.000 y = 0.000 mm
num_reflections = 17
Reflections measured after indexing
   h    k    l          I   sigma(I)       peak background  fs/px  ss/px panel
  -1    2    3       1.00       1.00       1.00       1.00    1.0    1.0 a
End of reflections
--- End crystal
----- End chunk -----
----- Begin chunk -----
Image filename: /data/z.h5
Event: //
Image serial number: 1
hit = 0
indexed_by = none
photon_energy_eV = 9301.5
num_peaks = 0
----- End chunk -----
"""


def lines_of(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def test_stream_by_hand() -> None:
    stream = parse_stream(lines_of(STREAM))
    assert stream.generator == "CrystFEL 0.12.0"
    assert stream.command == "indexamajig -i x.lst -o x.stream"
    assert (stream.geometry_text, stream.cell_text) == ("clen = 0.12\n", "a = 1 A\n")
    first, second = stream.chunks
    assert first.frame == Frame(path="/data/x y.h5", event="//5")
    assert (first.serial, first.is_hit, first.indexed_by, first.num_peaks) == (2, True, "asdf", 2)
    assert (first.photon_energy_eV, first.clen_m) == (9300.0, 0.12)
    assert first.peaks.tolist() == [
        pytest.approx([6.5, 1.25, 0.537, 100.55]),
        pytest.approx([2, 5, 0.4, 50]),
    ]
    assert first.peak_panels == ("a", "b")
    (crystal,) = first.crystals
    assert crystal.cell == pytest.approx([79.2, 79.2, 38, 90, 90, 90])
    assert crystal.reciprocal_per_A == pytest.approx(LYSOZYME.reciprocal_per_A(), abs=1e-8)
    assert (crystal.lattice_type, crystal.unique_axis) == ("tetragonal", "c")
    assert crystal.profile_radius_per_A == pytest.approx(0.000559)
    assert crystal.num_reflections == 17
    assert second.frame == Frame(path="/data/z.h5")
    assert (second.serial, second.is_hit, second.crystals) == (1, False, ())
    assert math.isnan(second.clen_m)
    assert second.peaks.shape == (0, 4)


def test_written_stream_is_read_back(tmp_path: Path) -> None:
    stream = parse_stream(lines_of(STREAM))
    write_stream(stream, tmp_path / "x.stream")
    again = read_stream(tmp_path / "x.stream")
    assert list(format_stream(again)) == list(format_stream(stream))
    assert [c.frame for c in again.chunks] == [c.frame for c in stream.chunks]
    assert again.chunks[0].peaks == pytest.approx(stream.chunks[0].peaks)
    assert again.chunks[0].crystals[0].cell == pytest.approx([79.2, 79.2, 38, 90, 90, 90])
    assert [path.name for path in tmp_path.iterdir()] == ["x.stream"]


def test_a_stream_cut_off_within_a_chunk_is_refused() -> None:
    lines, whole = lines_of(STREAM), 0
    for end in range(len(lines) + 1):
        is_within = any(
            first < end <= last
            for first, last in zip(
                [n for n, line in enumerate(lines) if line.startswith("----- Begin")],
                [n for n, line in enumerate(lines) if line.startswith("----- End")],
                strict=True,
            )
        )
        if is_within or end == 0:
            with pytest.raises(FormatError, match=rf"stream:{end}: ends within"):
                parse_stream(lines[:end])
        else:
            whole += 1
            parse_stream(lines[:end])
    assert whole == 8  # 3 lines of header, 2 blocks, 1 more line of header, 2 chunks


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format 2.3", "format 1.0", r"stream:1: expected 'CrystFEL stream format 2.3'"),
        ("hit = 1\n", "", r"stream:44 \(chunk that began in line 11\): has no line 'hit'"),
        ("hit = 1\n", "hit = 2\n", r"stream:15: expected hit = 0 or 1"),
        ("num_peaks = 2", "num_peaks = 3", r"num_peaks is 3, while 2 are listed"),
        ("num_peaks = 2", "num_peaks = two", r"stream:22: num_peaks must be a whole number"),
        ("   2.00    5.00", "   2.00    5.0O", r"stream:27: expected fs, ss, 1/d, intensity"),
        ("   50.00   b", "   50.00", r"stream:27: expected fs, ss, 1/d, intensity"),
        ("astar", "bstar", r"needs cell parameters, astar, bstar and cstar"),
        ("7.92000 7.92000 3.80000", "0.00000 7.92000 3.80000", r"must be above 0"),
        ("--- End crystal\n", "", r"'----- End chunk -----' within a crystal"),
        ("photon_energy_eV = 9301.5", "photon_energy_eV = much", r"photon_energy_eV must be a n"),
        ("End of peak list\n--- Begin crystal\n", "----- Begin chunk -----\n", r"new chunk before"),
        ("Indexing methods selected: asdf", "----- End chunk -----", r"outside a chunk"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said(old: str, new: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_stream(lines_of(STREAM.replace(old, new, 1)))


def test_peaks_to_the_stream_and_back_to_the_slab() -> None:
    g = parse_geometry(MODULES)
    fs, ss = np.array([0.5, 3.9]), np.array([1.5, 2.25])
    peaks, panels = stream_peaks(g, fs, ss, np.array([10.0, 20.0]))
    assert panels == ("m0", "m1")
    assert peaks[:, 1] == pytest.approx([1.5, 0.25])  # rows of the module's own data
    r = math.hypot(0.5, 1.5) / 5000
    expected = 2 * math.sin(math.atan2(r, 0.12) / 2) / g.wavelength_A
    assert peaks[0, 2] == pytest.approx(expected)
    chunk = parse_stream(lines_of(STREAM)).chunks[0]
    object.__setattr__(chunk, "peaks", peaks)
    object.__setattr__(chunk, "peak_panels", panels)
    back_fs, back_ss, panel = slab_positions(g, chunk)
    assert back_fs == pytest.approx(fs)
    assert back_ss == pytest.approx(ss)
    assert panel.tolist() == [0, 1]
    object.__setattr__(chunk, "peak_panels", ("m0", "m7"))
    with pytest.raises(FormatError, match="'m7', which the geometry does not have"):
        slab_positions(g, chunk)


# ------------------------------------------------------------------------------ folders


def folder_of(path: Path) -> Path:
    (path / "experiment.geom").write_text(GEOM)
    (path / "reference.cell").write_text(CELL)
    (path / "frames.lst").write_text("a.h5 //0\na.h5 //1\n")
    (path / "parameters.json").write_text('{"min_snr": 6.5, "min_peaks": 20}')
    return path


def test_experiment_of_a_folder(tmp_path: Path) -> None:
    experiment = read_experiment(folder_of(tmp_path))
    assert experiment.frames == tuple(
        Frame(path=str(tmp_path / "a.h5"), event=f"//{i}") for i in (0, 1)
    )
    assert experiment.nominal == Parameters(min_snr=6.5, min_peaks=20)
    assert experiment.cell == parse_cell(CELL)
    before = experiment.digest
    (tmp_path / "reference.cell").write_text(CELL.replace("38.00", "38.10"))
    assert read_experiment(tmp_path).digest != before


def test_another_mask_is_another_experiment(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with_mask = "mask = /bad\nmask_file = bad.h5\n" + GEOM
    (folder / "experiment.geom").write_text(with_mask)
    before = read_experiment(folder).digest
    (folder / "bad.h5").write_bytes(b"some")
    assert read_experiment(folder).digest != before


def test_what_becomes_of_the_geometry_file_later_does_not_count(tmp_path: Path) -> None:
    experiment = read_experiment(folder_of(tmp_path))
    before = read_experiment(tmp_path).digest
    (tmp_path / "experiment.geom").write_text(GEOM.replace("-10.5", "-99"))
    assert experiment.digest == before != read_experiment(tmp_path).digest
    assert experiment.geometry_text == GEOM


def test_a_users_own_names_are_found(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "experiment.geom").rename(folder / "agipd_v3.geom")
    (folder / "frames.lst").rename(folder / "run7.lst")
    (folder / "parameters.json").unlink()
    experiment = read_experiment(folder)
    assert experiment.geometry_path.name == "agipd_v3.geom"
    assert experiment.nominal == Parameters()
    (folder / "old.geom").write_text(GEOM)
    with pytest.raises(FormatError, match=r"several \*\.geom \(agipd_v3.geom, old.geom\)"):
        read_experiment(folder)
    assert read_experiment(folder, geometry=folder / "old.geom").geometry_path.name == "old.geom"
    (folder / "run7.lst").unlink()
    with pytest.raises(
        FormatError, match=r"no frames\.lst and no other \*\.lst: name one by --list"
    ):
        read_experiment(folder, geometry=folder / "old.geom")


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"min_snr": "high"}', '{"min_srn": 5}', '{"min_peaks": 4.7}']
)
def test_wrong_parameters_of_a_folder_are_told(tmp_path: Path, text: str) -> None:
    (folder_of(tmp_path) / "parameters.json").write_text(text)
    with pytest.raises(FormatError, match=r"parameters\.json: "):
        read_experiment(tmp_path)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such folder"):
        read_experiment(tmp_path / "none")
    (folder_of(tmp_path) / "frames.lst").write_text("\n")
    with pytest.raises(FormatError, match="lists no frame"):
        read_experiment(tmp_path)
    (tmp_path / "frames.lst").write_text("a.h5 //0\n")
    with pytest.raises(FormatError, match=r"other\.geom: cannot be read: No such file"):
        read_experiment(tmp_path, geometry=tmp_path / "other.geom")


# ------------------------------------------------------------------------------ anything else


@pytest.mark.parametrize("kind", ["geom", "cell", "lst", "stream"])
def test_mutated_text_ends_in_a_value_or_a_format_error(kind: str) -> None:
    from benchmarks.sfx_format_fuzz import READERS, mutate

    text = {"geom": GEOM, "cell": CELL, "lst": "a.h5 //1\nb.h5\n", "stream": STREAM}[kind]
    rng, refused = random.Random(5), 0
    for _ in range(150):
        data = mutate(text.encode(), rng)
        try:
            READERS[kind](data.decode("utf-8", errors="replace"))
        except FormatError as error:
            refused += 1
            assert str(error).startswith("fuzz")
    assert refused > 5


def test_any_bytes_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.geom"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(FormatError, match=r"x\.geom:\d+: "):
        read_geometry(path)
    path.write_bytes(textwrap.dedent(GEOM).encode("latin-1") + "; 5 Å\n".encode("latin-1"))
    assert read_geometry(path).panels == ("a", "b")
