"""Pictures: their shape, what is in them, and what must not break them."""

import subprocess
import sys

import numpy as np
import pytest

from ssl2rl_ray.perception.figures import draw_confusion, draw_mistakes, draw_reliability


def predictions(n=200):
    rng = np.random.default_rng(0)
    p = rng.random(n)
    return rng.random(n) < p, p


def is_picture(image) -> bool:
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def has_colour(image, rgb) -> bool:
    return bool((np.abs(image.astype(int) - rgb).max(axis=-1) <= 8).any())


@pytest.mark.parametrize(
    ("is_low", "p"),
    [
        predictions(),
        ([True, True], [0.9, 1.0]),
        ([False], [0.0]),
        ([], []),
    ],
    ids=["both", "one class", "one hole", "none"],
)
def test_reliability_and_confusion_of_anything(is_low, p):
    for image in (draw_reliability(is_low, p), draw_confusion(is_low, p)):
        assert is_picture(image)
        assert image.std() > 0


def test_the_same_predictions_give_the_same_picture():
    is_low, p = predictions()
    np.testing.assert_array_equal(draw_reliability(is_low, p), draw_reliability(is_low, p))
    assert (draw_confusion(is_low, p) != draw_confusion(~is_low, p)).any()


NAMES = [
    "20feb18a_s_00023gr_00009sq_v02_00002hl_v01_00005en",
    "$x^2$",
    "a_b^{c}",
    "\\frac{}$",
    "100 %",
    "",
    "new\nline\ttab",
    "孔 é Ångström",
]


def test_mistakes_with_names_that_look_like_formulas():
    images = np.zeros((8, 32, 32), np.uint8)  # constant ones too
    images[:4] = np.random.default_rng(0).integers(0, 255, (4, 32, 32))
    low = np.arange(8) % 2 == 0
    image = draw_mistakes(images, low, np.where(low, 0.1, 0.8), NAMES, np.full(8, 5.5))
    assert is_picture(image)
    assert has_colour(image, (0xD6, 0x32, 0x2C))  # called low-CTF
    assert has_colour(image, (0x7A, 0x3F, 0xB0))  # called high-CTF


def test_the_surest_mistakes_are_shown_and_no_other_image_is_read():
    read = []

    class Images:
        def __len__(self):
            return 6

        def __getitem__(self, row):
            read.append(int(row))
            return np.full((16, 16), 100, np.uint8)

    low = [True, True, True, False, False, True]
    p = [0.4, 0.1, 0.9, 0.95, 0.2, 0.3]
    draw_mistakes(Images(), low, p, [str(i) for i in range(6)], num=3)
    assert read == [3, 1, 5]


def test_few_mistakes_or_none():
    images = np.zeros((2, 16, 16), np.uint8)
    none = draw_mistakes(images, [True, False], [0.9, 0.1], ["a", "b"])
    one = draw_mistakes(images, [True, True], [0.9, 0.1], ["a", "b"], np.array([5.0, np.nan]))
    assert is_picture(none)
    assert not has_colour(none, (0x7A, 0x3F, 0xB0))
    assert has_colour(one, (0x7A, 0x3F, 0xB0))
    assert one.shape[0] > none.shape[0]
    assert is_picture(draw_mistakes(images[:0], [], [], []))


def test_what_does_not_fit_together_is_refused():
    images = np.zeros((2, 16, 16), np.uint8)
    with pytest.raises(ValueError, match="hole_name: 1 rows for 2 holes"):
        draw_mistakes(images, [True, True], [0.9, 0.1], ["a"])
    with pytest.raises(ValueError, match="images: 2 rows for 3 holes"):
        draw_mistakes(images, [True] * 3, [0.9] * 3, ["a", "b", "c"])
    with pytest.raises(ValueError, match="a number in"):
        draw_reliability([True], [1.5])


def test_importing_needs_neither_matplotlib_nor_torch():
    code = (
        "import sys, ssl2rl_ray.perception.figures, ssl2rl_ray.perception.posterior\n"
        "assert not {'matplotlib', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
