"""Peak finder: against a loop that reads like the paper, and frames with known peaks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.crystfel.sfx import peaks
from envs.crystfel.sfx.peaks import MAX_PEAKS, Peaks, _brighter, _rings, find_peaks, pixel_map
from envs.crystfel.types import Parameters

SIDE = 64
CENTRE = 31.5


def radius(side=SIDE, centre=CENTRE):
    rows, columns = np.mgrid[:side, :side]
    return np.hypot(rows - centre, columns - centre)


def one_panel(side=SIDE):
    return np.zeros((side, side), dtype=int)


def noise(seed=0, side=SIDE, mean=100.0, sigma=3.0):
    return np.random.default_rng(seed).normal(mean, sigma, (side, side))


def with_spot(image, row, column, height=100.0):
    """Adds a spot of 3 x 3 px: the middle, half of it beside, a quarter at the corners."""
    shape = np.outer([0.5, 1, 0.5], [0.5, 1, 0.5])
    image[row - 1 : row + 2, column - 1 : column + 2] += height * shape
    return image


def brute_force_rings(image, ring, snr, threshold):
    """Mean and threshold of each ring by the plain recipe, pixel list by pixel list."""
    means, highs = [], []
    for number in np.unique(ring):
        pixels = image[ring == number].astype(np.float64)
        pixels = pixels[np.isfinite(pixels)]
        kept = pixels
        for _ in range(5):
            mean, sigma = kept.mean(), kept.std()
            high, low = max(mean + snr * sigma, threshold), mean - snr * sigma
            kept = pixels[(pixels <= high) & (pixels >= low)]
        means.append(mean)
        highs.append(high)
    return np.array(means), np.array(highs)


@pytest.mark.parametrize("snr", [3.0, 5.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_rings_are_those_of_the_plain_recipe(seed, snr):
    rng = np.random.default_rng(seed)
    image = rng.poisson(20 + 10 * np.exp(-((radius() - 20) ** 2) / 20)).astype(np.float32)
    image[rng.integers(0, SIDE, 40), rng.integers(0, SIDE, 40)] += rng.exponential(200, 40)
    image[3, 5] = np.nan
    pixels = pixel_map(radius(), one_panel())
    parameters = Parameters(min_snr=snr, threshold_adu=10)
    mean, high = _rings(image.ravel(), pixels, parameters)
    bright = _brighter(image.ravel(), high, pixels)
    expected_mean, expected_high = brute_force_rings(image, radius().astype(int), snr, 10)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(high, expected_high, rtol=1e-4)
    is_above = image > expected_high[radius().astype(int)] * (1 + 1e-4)
    np.testing.assert_array_equal(bright, np.flatnonzero(is_above))


def test_large_rings_are_told_by_some_of_their_pixels():
    side = 500
    image = noise(5, side)
    pixels = pixel_map(radius(side, side / 2), one_panel(side))
    assert len(pixels.order) < 0.5 * side**2
    mean, high = _rings(image.ravel(), pixels, Parameters(min_snr=4))
    expected_mean, expected_high = brute_force_rings(
        image, radius(side, side / 2).astype(int), 4, 20
    )
    large = slice(50, 240)
    np.testing.assert_allclose(mean[large], expected_mean[large], atol=1.0)
    np.testing.assert_allclose(high[large] - 100, expected_high[large] - 100, rtol=0.2)
    assert abs((high - expected_high)[large].mean()) < 0.15


def test_a_hot_pixel_does_not_swamp_the_sums():
    image = noise().astype(np.float32)
    image[10, 10] = 1e7
    pixels = pixel_map(radius(), one_panel())
    _, high = _rings(image.ravel(), pixels, Parameters())
    ring = int(radius()[10, 10])
    assert 110 < high[ring] < 125  # 100 + 5 x 3, give or take the noise of the ring


def test_finds_spots_where_they_are_and_nothing_else():
    image = noise()
    places = [(12, 20), (40, 50), (50, 11), (20, 45)]
    for height, (row, column) in enumerate(places, 1):
        with_spot(image, row, column, 100.0 * height)
    peaks = find_peaks(image, pixel_map(radius(), one_panel()), Parameters(max_pix_count=20))
    assert len(peaks) == 4
    brightest_first = [(fs, ss) for fs, ss in zip(peaks.fs_px, peaks.ss_px, strict=True)]
    expected = [(column + 0.5, row + 0.5) for row, column in reversed(places)]
    np.testing.assert_allclose(brightest_first, expected, atol=0.15)
    np.testing.assert_allclose(peaks.intensity_adu, [1600, 1200, 800, 400], rtol=0.15)
    assert (peaks.snr > 5).all()


def test_no_peak_in_noise():
    pixels = pixel_map(radius(200, 100), one_panel(200))
    found = [len(find_peaks(noise(s, 200), pixels, Parameters())) for s in range(5)]
    assert found == [0] * 5


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_the_number_type_does_not_matter(dtype):
    image = with_spot(np.rint(noise()), 12, 20).round().astype(dtype)
    pixels = pixel_map(radius(), one_panel())
    expected = find_peaks(image.astype(np.float64), pixels, Parameters())
    np.testing.assert_array_equal(
        find_peaks(image, pixels, Parameters()).as_array(), expected.as_array()
    )
    assert len(expected) == 1


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 1),
        ({"min_pix_count": 9}, 1),
        ({"min_pix_count": 10}, 0),
        ({"max_pix_count": 8}, 0),
        ({"threshold_adu": 210}, 0),  # only the middle, 300, is above
        ({"threshold_adu": 210, "min_pix_count": 1}, 1),
        ({"threshold_adu": 301}, 0),
        ({"min_snr": 500}, 0),
        ({"min_res_px": 25}, 0),  # it lies at 22.6 px
        ({"max_res_px": 20}, 0),
        ({"min_res_px": 10, "max_res_px": 30}, 1),
    ],
)
def test_each_parameter(changes, number):
    image = np.full((SIDE, SIDE), 100.0)
    image += np.where(np.indices((SIDE, SIDE)).sum(axis=0) % 2, 1.0, -1.0)
    with_spot(image, 12, 20, 200.0)
    parameters = Parameters().replace(**changes)
    pixels = pixel_map(
        radius(),
        one_panel(),
        min_res_px=parameters.min_res_px,
        max_res_px=parameters.max_res_px,
    )
    assert len(find_peaks(image, pixels, parameters)) == number


def test_a_peak_does_not_reach_over_to_another_panel_or_row():
    panel = one_panel()
    panel[:, 32:] = 1
    image = noise(sigma=1)
    image[20, 31] = image[20, 32] = 300  # a neighbour each, but on another panel
    image[40, -1] = image[41, 0] = 300  # end of a row, start of the next
    pixels = pixel_map(radius(), panel)
    assert len(find_peaks(image, pixels, Parameters(min_pix_count=2))) == 0
    assert len(find_peaks(image, pixels, Parameters(min_pix_count=1))) == 4


def test_corners_touch():
    image = noise(sigma=1)
    image[20, 20] = image[21, 21] = image[40, 21] = image[41, 20] = 300
    found = find_peaks(image, pixel_map(radius(), one_panel()), Parameters(min_pix_count=2))
    assert len(found) == 2


def test_bad_pixels_are_not_seen():
    pixels = pixel_map(radius(), one_panel())
    image = with_spot(noise(), 12, 20)
    image[12, 20] = np.nan
    found = find_peaks(image, pixels, Parameters(min_pix_count=2))
    assert len(found) == 1 and np.isfinite(found.as_array()).all()
    panel = one_panel()
    panel[10:15, 18:23] = -1
    assert (
        len(find_peaks(with_spot(noise(), 12, 20), pixel_map(radius(), panel), Parameters())) == 0
    )
    nothing = np.full((SIDE, SIDE), np.nan)
    assert len(find_peaks(nothing, pixels, Parameters())) == 0


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_has_no_peaks(value):
    image = np.full((SIDE, SIDE), value, dtype=np.int16)
    assert len(find_peaks(image, pixel_map(radius(), one_panel()), Parameters(min_snr=3))) == 0


@pytest.mark.parametrize("value", [1e30, -1e30, np.inf, np.nan])
def test_values_beyond_any_detector_are_no_trouble(value):
    """All pixels; and a few, beside which the spot is found as it is without them."""
    pixels, parameters = pixel_map(radius(), one_panel()), Parameters(min_snr=6)
    assert not len(find_peaks(np.full((SIDE, SIDE), value), pixels, parameters))
    image = with_spot(noise(), 20, 40).astype(np.float32)
    plain = find_peaks(image, pixels, parameters)
    image[10, 10] = image[50, 45] = value
    spoiled = find_peaks(image, pixels, parameters)
    assert len(plain) == len(spoiled) == 1
    np.testing.assert_allclose(spoiled.as_array()[:, :2], plain.as_array()[:, :2], atol=0.02)


def test_many_peaks_with_a_wide_background_are_worked_on_in_parts(monkeypatch):
    image = noise()
    for row in range(6, SIDE - 4, 8):
        for column in range(6, SIDE - 4, 8):
            with_spot(image, row, column, 200)
    pixels, parameters = pixel_map(radius(), one_panel()), Parameters(local_bg_radius_px=2)
    whole = find_peaks(image, pixels, parameters)
    monkeypatch.setattr(peaks, "_MAX_AT_ONCE", 200)
    parts = find_peaks(image, pixels, parameters)
    assert len(whole) > 8
    np.testing.assert_array_equal(whole.as_array(), parts.as_array())


def test_not_more_than_the_limit_and_the_brightest():
    side = 400
    image = noise(1, side, sigma=1)
    rows, columns = np.mgrid[3 : side - 3 : 7, 3 : side - 3 : 7]
    image[rows, columns] += np.arange(rows.size).reshape(rows.shape) + 500
    pixels = pixel_map(radius(side, side / 2), one_panel(side))
    parameters = Parameters(min_pix_count=1, min_snr=1, local_bg_radius_px=1)
    peaks = find_peaks(image, pixels, parameters)
    assert rows.size > MAX_PEAKS == len(peaks)
    assert (np.diff(peaks.intensity_adu) <= 0).all()


def test_arrays_there_and_back():
    peaks = find_peaks(with_spot(noise(), 12, 20), pixel_map(radius(), one_panel()), Parameters())
    again = Peaks.from_array(peaks.as_array())
    np.testing.assert_array_equal(again.as_array(), peaks.as_array())


def test_what_cannot_be_searched_is_told():
    with pytest.raises(ValueError, match=r"no usable pixel between 500 and inf px.*0 to 44|45"):
        pixel_map(radius(), one_panel(), min_res_px=500)
    with pytest.raises(ValueError, match="both"):
        pixel_map(radius(), one_panel(32))
    with pytest.raises(ValueError, match=r"\(3, 3\).*\(64, 64\)"):
        find_peaks(np.zeros((3, 3)), pixel_map(radius(), one_panel()), Parameters())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    min_snr=st.floats(1, 12),
    threshold_adu=st.floats(0, 200),
    min_pix_count=st.integers(1, 8),
    radius_px=st.integers(1, 6),
    num_bad=st.integers(0, SIDE * SIDE),
)
def test_whatever_the_frame_peaks_are_on_the_detector_and_as_asked(
    seed, min_snr, threshold_adu, min_pix_count, radius_px, num_bad
):
    rng = np.random.default_rng(seed)
    image = rng.exponential(50, (SIDE, SIDE)).astype(np.float32)
    image.ravel()[rng.permutation(SIDE * SIDE)[:num_bad]] = rng.choice([np.nan, np.inf, -np.inf])
    parameters = Parameters(
        min_snr=min_snr,
        threshold_adu=threshold_adu,
        min_pix_count=min_pix_count,
        local_bg_radius_px=radius_px,
    )
    peaks = find_peaks(image, pixel_map(radius(), one_panel()), parameters)
    assert np.isfinite(peaks.as_array()[:, :3]).all()
    assert ((peaks.fs_px > 0) & (peaks.fs_px < SIDE)).all()
    assert ((peaks.ss_px > 0) & (peaks.ss_px < SIDE)).all()
    assert (peaks.snr >= np.float32(min_snr)).all() and (peaks.intensity_adu > 0).all()
