"""Views of hole images, drawn anew each time, every image of a batch with its own.

What leaves a hole's quality as it is decides what is in:

| op | in | why |
|---|---|---|
| flips, quarter turns | weak, strong | a hole has no up or down |
| shift | weak, strong | the crop is centred only as well as the hole was found |
| any rotation, scale | strong | as above; neighbouring magnifications differ by a few per cent |
| gain | strong, small | the beam drifts by some per cent; more would be another ice thickness |
| blur, noise | strong | defocus and dose of an overview image vary |
| cutout | strong | no single place decides (DeVries & Taylor 2017, arXiv:1708.04552) |
| brightness, contrast, equalise, invert, solarise, posterise | no | the grey value *is* the ice
thickness, and a hole that is too thin or too thick is bad |

Batched tensor operations on the images' device, from one generator; torchvision's v2 transforms
draw one set of parameters for a whole batch. Shape letters: B batch, H and W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

MAX_SHIFT = 0.125
"""Of the image's side: FixMatch's weak view (Sohn et al. 2020, sec. 2.3)."""
MAX_SCALE = 0.1
MAX_GAIN = 0.1
MAX_NOISE = 0.1
"""Sd, in grey values of 0 to 1."""
CUTOUT = (0.2, 0.5)
"""Side of the square that is taken out, of the image's side."""


def weak(images: Tensor, generator: Generator) -> Tensor:
    """Flips, quarter turns and a shift by whole pixels, mirrored at the border: exact grey values.

    Args:
        images: (B, 1, H, W) with H = W, any dtype (uint8 is the fastest).
        generator: on the images' device.

    Returns:
        (B, 1, H, W), same dtype.
    """
    b, size, device = len(images), images.shape[-1], images.device
    reach = int(MAX_SHIFT * size)
    shift = torch.randint(-reach, reach + 1, (2, b, 1), generator=generator, device=device)
    flip = torch.randint(0, 2, (3, b, 1), generator=generator, device=device).bool()
    at = torch.arange(size, device=device) + shift  # (2, B, size): rows, columns
    at = (size - 1) - (size - 1 - at.abs()).abs()  # mirrored at both borders
    row, column = torch.where(flip[:2], size - 1 - at, at)
    turned = torch.where(flip[2][:, :, None, None], images.mT, images)
    index = row[:, :, None] * size + column[:, None, :]
    return turned.flatten(1).gather(1, index.flatten(1)).view_as(images)


def strong(images: Tensor, generator: Generator, *, strength: float = 1.0) -> Tensor:
    """Rotation, scale and shift, then gain, blur, noise and a cut-out square.

    Args:
        images: (B, 1, H, W) float32 in [0, 1], H = W.
        generator: on the images' device.
        strength: multiplies scale, gain, noise and the side of the cutout; 0 leaves flips,
            rotation and shift.

    Returns:
        (B, 1, H, W) float32; noise may leave [0, 1].
    """
    b, size, device = len(images), images.shape[-1], images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(b, generator=generator, device=device)

    angle, scale = uniform(-math.pi, math.pi), 1 + strength * uniform(-MAX_SCALE, MAX_SCALE)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    dx, dy = uniform(-2 * MAX_SHIFT, 2 * MAX_SHIFT), uniform(-2 * MAX_SHIFT, 2 * MAX_SHIFT)
    theta = torch.stack([mirror * cosine, -sine, dx, mirror * sine, cosine, dy], 1).view(b, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    out = grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    def column(values: Tensor) -> Tensor:
        return values.view(b, 1, 1, 1)

    blurred = avg_pool2d(out, 3, 1, 1, count_include_pad=False)
    out = torch.lerp(out, blurred, column(strength * uniform(-0.5, 0.5).clamp(min=0)))
    out = out * column(1 + strength * uniform(-MAX_GAIN, MAX_GAIN))
    noise = torch.randn(out.shape, generator=generator, device=device)
    out = out.addcmul(noise, column(strength * uniform(-MAX_NOISE, MAX_NOISE).clamp(min=0)))
    side = strength * uniform(*CUTOUT) / 2
    at = (torch.arange(size, device=device) + 0.5) / size
    is_cut_row = (at - uniform(0, 1)[:, None]).abs() < side[:, None]
    is_cut_column = (at - uniform(0, 1)[:, None]).abs() < side[:, None]
    is_cut = (is_cut_row[:, :, None] & is_cut_column[:, None, :]).unsqueeze(1)
    return torch.where(is_cut, out.mean((2, 3), keepdim=True), out)
