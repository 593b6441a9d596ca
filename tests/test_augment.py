"""Views of images: exact where they move, gentle where they change grey values."""

import pytest
import torch

from ssl2rl_ray.perception.augment import MAX_GAIN, MAX_SHIFT, strong, weak


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_weak_view_moves_pixels_and_changes_none():
    images = torch.arange(32 * 32, dtype=torch.int32).view(1, 1, 32, 32).repeat(200, 1, 1, 1)
    views = weak(images, generator())
    assert views.dtype == images.dtype and views.shape == images.shape
    assert torch.isin(views, images).all()
    centre = views[:, 0, 12:20, 12:20]  # too far inside for the mirrored border to reach
    right, down = centre[:, 0, 1] - centre[:, 0, 0], centre[:, 1, 0] - centre[:, 0, 0]
    # eight orientations of the square, all drawn
    steps = set(zip(right.tolist(), down.tolist(), strict=True))
    assert steps == {(a, b) for x in (1, -1) for y in (32, -32) for a, b in ((x, y), (y, x))}
    # every pixel of the inside is where one turn, mirror and shift would put it
    rows, columns = torch.arange(8).view(8, 1), torch.arange(8).view(1, 8)
    expected = centre[:, :1, :1] + rows * down.view(-1, 1, 1) + columns * right.view(-1, 1, 1)
    assert (centre == expected).all()


def test_the_weak_shift_reaches_its_bound_and_no_further():
    images = torch.arange(64.0).repeat(2000, 1, 64, 1)  # the column of each pixel
    middle = weak(images, generator(1))[:, 0, 32, 32]
    reach = int(MAX_SHIFT * 64)
    # a flip takes 32 to 31 before the shift
    assert middle.min() == 31 - reach and middle.max() == 32 + reach


def test_views_repeat_with_their_generator():
    images = torch.rand(8, 1, 32, 32)
    for view in (weak, strong):
        assert torch.equal(view(images, generator(5)), view(images, generator(5)))
        assert not torch.equal(view(images, generator(5)), view(images, generator(6)))


def test_the_mean_grey_value_survives_the_strong_view():
    """It carries the ice thickness: a thin, a good and a thick hole stay apart."""
    grey = torch.tensor([0.3, 0.5, 0.7]).repeat_interleave(300)
    images = grey.view(-1, 1, 1, 1).expand(-1, 1, 32, 32)
    means = strong(images, generator()).mean((1, 2, 3))
    assert ((means / grey - 1).abs() < MAX_GAIN + 0.02).all()
    assert means.view(3, 300).mean(1) == pytest.approx([0.3, 0.5, 0.7], abs=0.01)


def test_a_strength_of_zero_only_moves():
    images = torch.full((50, 1, 32, 32), 0.4)
    assert torch.allclose(strong(images, generator(), strength=0.0), images, atol=1e-6)
    assert not torch.allclose(strong(images, generator()), images, atol=0.02)


def test_the_strong_view_keeps_a_hole_where_it_can_be_seen():
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    disc = ((x**2 + y**2) < 8**2).float().view(1, 1, 32, 32).repeat(300, 1, 1, 1)
    views = strong(disc, generator(), strength=0.0)
    assert (views.sum((1, 2, 3)) / disc.sum((1, 2, 3))).min() > 0.7
    assert views.min() >= -1e-6 and views.max() <= 1 + 1e-6
