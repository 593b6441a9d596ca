"""Drawn images: what they are, what they may tell, and that nothing else leaks."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from envs.cryoem.images import IMAGE_PRESETS, ImagePreset, draw_images
from envs.cryoem.nested import nested_components
from envs.cryoem.synthetic import PRESETS, draw_session, draw_visible_components
from envs.cryoem.types import HoleTable


def table_of(ctf, holes_per_patch=10):
    """Two grids of two squares of patches."""
    n = len(ctf)
    patch = np.arange(n) // holes_per_patch
    square = patch * 4 // (patch[-1] + 1)
    return HoleTable.from_names(
        hole_name=[f"h{i}" for i in range(n)],
        grid=np.char.add("g", (square // 2).astype(str)),
        square=np.char.add("s", square.astype(str)),
        patch=np.char.add("p", patch.astype(str)),
        ctf_max_resolution_A=np.asarray(ctf, dtype=float),
    )


def random_table(n, seed=0):
    return table_of(np.random.default_rng(seed).uniform(3, 20, n))


def area_under_curve(score, is_positive):
    rank = rankdata(score)[is_positive].sum()
    positives = is_positive.sum()
    return (rank - positives * (positives + 1) / 2) / (positives * (~is_positive).sum())


def graininess(images):
    """(N,) spread between neighbouring pixels' sums in the middle, over the mean: texture."""
    side = images.shape[1]
    middle = slice(side // 2 - side // 5, side // 2 + side // 5)
    window = images[:, middle, middle].astype(np.float32)
    pooled = window[:, :-1, :-1] + window[:, 1:, :-1] + window[:, :-1, 1:] + window[:, 1:, 1:]
    return pooled.std(axis=(1, 2)) / pooled.mean(axis=(1, 2))


@pytest.mark.parametrize("preset", sorted(IMAGE_PRESETS))
def test_size_and_type_of_each_preset(preset):
    images = draw_images(np.random.default_rng(0), random_table(40), preset)
    side = IMAGE_PRESETS[preset].size_px
    assert images.shape == (40, side, side) and images.dtype == np.uint8


def test_every_session_preset_has_images():
    assert set(IMAGE_PRESETS) == set(PRESETS)
    assert IMAGE_PRESETS["y3"].size_px == 64
    assert dataclasses.replace(IMAGE_PRESETS["y3"], size_px=32) == IMAGE_PRESETS["y3-mini"]


def test_same_generator_same_images():
    table = random_table(40)
    first, second, third = (draw_images(np.random.default_rng(s), table, "demo") for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != third).mean() > 0.5


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="image preset: 'y4' is not one of"):
        draw_images(np.random.default_rng(0), random_table(20), "y4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_px": 4}, "size_px: at least 8"),
        ({"visible_fraction": 1.5}, "visible_fraction: from"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ImagePreset(**change)


def test_a_session_without_all_ctf_values_is_refused():
    table = random_table(20)
    ctf = np.array(table.ctf_max_resolution_A)
    ctf[7] = np.nan
    partly = table.replace(ctf_max_resolution_A=ctf, is_labelled=np.isfinite(ctf))
    with pytest.raises(ValueError, match=r"1 of 20 holes have no CTF value .* 'h7'.*select"):
        draw_images(np.random.default_rng(0), partly, "demo")
    rest = partly.select(np.isfinite(partly.ctf_max_resolution_A))
    assert len(draw_images(np.random.default_rng(0), rest, "demo")) == 19


def test_a_hole_is_brighter_than_the_film_and_fills_the_grey_values():
    images = draw_images(np.random.default_rng(0), random_table(500), "y3-mini").astype(float)
    centre = images[:, 10:22, 10:22].mean(axis=(1, 2))
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=1)
    assert (centre > corners).mean() > 0.9
    assert np.isin(images, (0, 255)).mean() < 0.03  # neither end of the scale hides much
    assert 60 < images.mean() < 140


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 30),
    size=st.integers(8, 48),
    fraction=st.floats(0, 1),
    value=st.one_of(st.none(), st.floats(0.1, 100)),
)
def test_any_table_has_images(seed, n, size, fraction, value):
    """Also one hole, odd sizes, and CTF values that are all the same."""
    table = random_table(n, seed) if value is None else table_of(np.full(n, value))
    preset = ImagePreset(size_px=size, visible_fraction=fraction)
    images = draw_images(np.random.default_rng(seed), table, preset)
    assert images.shape == (n, size, size)
    assert images.std() > 0


def test_good_and_bad_ice_look_different_where_everything_shows():
    table = random_table(2000)
    preset = ImagePreset(visible_fraction=1.0, texture=0.3)
    images = draw_images(np.random.default_rng(0), table, preset)
    is_bad = table.ctf_max_resolution_A > np.median(table.ctf_max_resolution_A)
    assert area_under_curve(graininess(images), is_bad) > 0.75
    # too thick and too thin are both bad: bad holes are darker and brighter than good ones
    ratio = images[:, 10:22, 10:22].mean(axis=(1, 2)) / images[:, :3].mean(axis=(1, 2))
    assert np.log(ratio)[is_bad].std() > 1.1 * np.log(ratio)[~is_bad].std()


def test_nothing_shows_where_nothing_may():
    """The images of two tables with different CTF are then the same, but for the groups' sizes."""
    table = random_table(2000)
    images = draw_images(np.random.default_rng(0), table, ImagePreset(visible_fraction=0.0))
    is_bad = table.ctf_max_resolution_A > np.median(table.ctf_max_resolution_A)
    for figure in (graininess(images), images.mean(axis=(1, 2)), images.std(axis=(1, 2))):
        assert area_under_curve(figure, is_bad) == pytest.approx(0.5, abs=0.045)


def test_images_tell_groups_no_more_than_the_score_does():
    """With a score that says nothing, its group's part taken out, no level shows in the pixels."""
    table = draw_session(np.random.default_rng(0), "y3-mini")
    flat = ImagePreset(
        thickness_range=0.0, gradient=0.0, texture=0.0, contamination=1e-9, crack=1e-9
    )
    images = draw_images(np.random.default_rng(1), table, flat)
    degrees = np.array([8, 49, 713, 8653 - 771])  # of freedom
    for figure in (images.mean(axis=(1, 2)), images[:, 16, 16].astype(float)):
        squares = (nested_components(table, figure) ** 2).sum(axis=1) / degrees
        # between groups no more than within: F of about 1
        np.testing.assert_allclose(squares[:3] / squares[3], 1.0, atol=1.1)
        assert squares[2] / squares[3] == pytest.approx(1.0, abs=0.2)


def test_order_of_rows_says_nothing():
    table = draw_session(np.random.default_rng(0), "y3-mini")
    images = draw_images(np.random.default_rng(1), table, "y3-mini")
    brightness = images.mean(axis=(1, 2))
    assert abs(np.corrcoef(brightness[:-1:2], brightness[1::2])[0, 1]) < 0.25  # the same patch
    order = np.arange(len(table)) % 7  # what a chunk or a lattice could imprint
    means = np.array([brightness[order == i].mean() for i in range(7)])
    assert means.std() < 3 * brightness.std() / np.sqrt(len(table) / 7)


def test_score_bounds_what_images_tell():
    """The accuracy of the visible score is 1/2 + asin(sqrt f) / pi, the stated limit."""
    fraction = IMAGE_PRESETS["y3"].visible_fraction
    correct = []
    for seed in range(8):
        table = draw_session(np.random.default_rng(seed), "y3")
        score = draw_visible_components(np.random.default_rng(99), table, fraction).sum(axis=0)
        correct.append(((score < 0) == (table.ctf_max_resolution_A < 6)).mean())
    expected = 0.5 + np.arcsin(np.sqrt(fraction)) / np.pi
    assert np.mean(correct) == pytest.approx(expected, abs=0.015)


def test_memory_is_bounded():
    table = draw_session(np.random.default_rng(0), "y3")
    tracemalloc.start()
    try:
        images = draw_images(np.random.default_rng(1), table, "y3")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - images.nbytes < 100e6
