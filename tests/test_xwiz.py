"""EXtra-Xwiz configurations, in and out."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.crystfel.types import Parameters
from envs.crystfel.xwiz import XwizError, parse_xwiz, read_xwiz, tuned_xwiz

CONFIG = """[data]
proposal = 700000
runs = [30]

[geom]
file_path = "agipd.geom"  # of the beam time

[indexamajig_run]
resolution = 1.6
peak_method = "peakfinder8"
peak_threshold = 800
peak_snr = 5   # as last year
peak_min_px = 1
peak_max_px = 20
index_method = "mosflm, xgandalf"
local_bg_radius = 3
max_res = 1600
min_peaks = 10
extra_options = "--no-non-hits-in-stream"

[unit_cell]
file_path = "hewl.cell"
"""


def test_what_it_says():
    config = parse_xwiz(CONFIG)
    assert config.parameters == Parameters(
        min_snr=5, threshold_adu=800, min_pix_count=1, max_pix_count=20, local_bg_radius_px=3,
        max_res_px=1600, min_peaks=10,
    )  # fmt: skip
    assert config.indexing == ("mosflm", "xgandalf")
    assert (config.geometry, config.cell, config.peaks) == (
        "agipd.geom",
        "hewl.cell",
        "peakfinder8",
    )


def test_what_it_does_not_say_is_ours():
    config = parse_xwiz("[proc_coarse]\npeak_snr = 6\nunit_cell = 'a.cell'\n")
    assert config.parameters == Parameters(min_snr=6)
    assert config.indexing == () and config.cell == "a.cell"


def test_tuned_text_differs_in_the_tuned_lines_only():
    tuned = tuned_xwiz(CONFIG, Parameters(min_snr=6.5, threshold_adu=25), geometry="tuned 1.geom")
    assert "peak_snr = 6.5   # as last year\n" in tuned
    assert 'file_path = "tuned 1.geom"  # of the beam time\n' in tuned
    before, after = tomllib.loads(CONFIG), tomllib.loads(tuned)
    for section in ("data", "unit_cell"):
        assert before[section] == after[section]
    kept = ("resolution", "peak_method", "index_method", "extra_options")
    assert all(before["indexamajig_run"][k] == after["indexamajig_run"][k] for k in kept)
    assert isinstance(after["indexamajig_run"]["min_peaks"], int)
    assert [line.split("=")[0] for line in CONFIG.splitlines()] == [
        line.split("=")[0] for line in tuned.splitlines()
    ]


def test_what_is_absent_is_added_in_its_section():
    tuned = tuned_xwiz(
        "[proc_coarse]\npeak_snr = 6\n\n[merging]\npoint_group = '422'", Parameters()
    )
    tree = tomllib.loads(tuned)
    assert tree["proc_coarse"]["max_res"] == 1200
    assert tree["merging"] == {"point_group": "422"}
    assert tomllib.loads(tuned_xwiz("[proc_coarse]", Parameters(), geometry="a.geom"))["geom"] == {
        "file_path": "a.geom"
    }


@given(
    st.floats(0.1, 1000), st.floats(0, 1e6), st.integers(1, 1000), st.integers(1, 20_000),
    st.integers(0, 10_000),
)  # fmt: skip
def test_in_is_out(snr, threshold, pixels, max_res, min_peaks):
    parameters = Parameters(
        min_snr=snr, threshold_adu=threshold, min_pix_count=pixels, max_res_px=max_res,
        min_peaks=min_peaks,
    )  # fmt: skip
    read = parse_xwiz(tuned_xwiz(CONFIG, parameters)).parameters
    assert read.as_dict() == pytest.approx(parameters.as_dict(), rel=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("peak_snr = ", "no TOML"),
        ("[merging]", r"no \[indexamajig_run\]"),
        ("[indexamajig_run]\npeak_snr = 'five'", "must be a number"),
        ("[indexamajig_run]\nmin_peaks = 4.7", "whole number"),
        ("[indexamajig_run]\npeak_snr = -1", "outside"),
        ("[indexamajig_run]\nindex_method = 3", "must be a string"),
    ],
)
def test_what_is_wrong_is_named(text, words, tmp_path):
    path = tmp_path / "xwiz_conf.toml"
    path.write_text(text)
    with pytest.raises(XwizError, match=words) as error:
        read_xwiz(path)
    assert str(path) in str(error.value)


def test_a_layout_that_cannot_be_edited_is_refused():
    with pytest.raises(XwizError, match="one `name = value` per line"):
        tuned_xwiz("indexamajig_run = {peak_snr = 5}\n", Parameters())
    with pytest.raises(XwizError, match="cannot be read"):
        read_xwiz("/no/such/file.toml")


@given(st.text(alphabet="[]=.\"'#\n{}abc_1-\\ \0é", max_size=60))
def test_no_text_crashes_it(text):
    for tried in (text, CONFIG + text, "[indexamajig_run]\n" + text):
        try:
            tuned_xwiz(tried, Parameters(min_snr=7.5), geometry="x.geom")
        except XwizError:
            continue
