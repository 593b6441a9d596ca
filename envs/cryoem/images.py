"""Images of holes, as a camera at low magnification would show them: grey, round, noisy.

An image follows from its hole's CTF value through one number per hole only, the visible score
(``synthetic.draw_visible_components``): a share f of the CTF's variance at each level, the rest
noise. The score sets latent causes (ice too thick or too thin, ice that is crystalline, a thickness
gradient, contamination, cracks), and the causes are rendered under a gain, a ripple and dose noise
of each image's own. So even a perfect reader of images stops at the score's accuracy,
1/2 + asin(sqrt f) / pi at a median threshold, and nothing in an image tells its grid, square or
patch but what the score does (and on which side of the ideal a patch's thickness lies, which says
nothing about its CTF).

Lengths are in sides of the image, intensities in that of the beam without a specimen.
Shape letters: N holes, B holes of a chunk, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.special import expit, ndtr

from envs.cryoem.synthetic import draw_visible_components
from envs.cryoem.types import FloatArray, HoleTable

REFERENCE_PX = 32
"""Image side at which ``dose_noise`` is stated; a finer pixel takes its share of the electrons."""
CHUNK_PIXELS = 1 << 20
"""Pixels rendered at a time: some 50 MB of working memory at any image size."""


@dataclass(frozen=True, kw_only=True)
class ImagePreset:
    """What images are drawn from.

    "Calibrated": set together so that a small CNN, trained as SSL²-RL's appendix B.2 says, reaches
    that paper's accuracies (``benchmarks/synthetic_calibration.py``).
    """

    size_px: int = 32
    """H = W."""
    visible_fraction: float = 0.43
    """f. Calibrated: the score's own accuracy is .728; ripple and dose noise hide a part of it."""
    thickness_shares: tuple[float, float, float, float] = (0.06, 0.20, 0.34, 0.40)
    """Of the variance of ice thickness: grid, square, patch, hole. A choice: ice varies over larger
    distances than CTF does, to which single holes add failed fits."""
    ideal_thickness_nm: float = 40.0
    """A choice: a particle's size and a little."""
    thickness_range: float = 1.1
    """Largest |log(thickness / ideal)|: 13 to 120 nm, from holes about to run dry to thick ice."""
    mean_free_path_nm: float = 300.0
    """Of inelastic scattering in ice; intensity falls by exp(-thickness / it). A round value for
    300 kV (Rice et al. 2018, J. Struct. Biol. 204, 38)."""
    gradient: float = 0.25
    """Relative thickness difference over the hole, at the median score. A choice."""
    texture: float = 0.14
    """Sd of the intensity where ice is all crystalline. Calibrated: a cue that is weak in each
    pixel, and needs many labels to be learned."""
    texture_grain: float = 0.04
    """Size of crystalline grains, sd of a Gaussian. A choice: 0.1 µm in a field of 2.5 µm."""
    ripple: float = 0.10
    """Sd of the intensity by uneven ice, which says nothing about the CTF (median over images; its
    log varies by 0.5). Calibrated: texture must be told from it by the size of its grains, or 300
    labels would teach nearly as much as 6000."""
    ripple_grain: float = 0.07
    """As ``texture_grain``. A choice: nearly twice it."""
    contamination: float = 0.7
    """Expected number of frost particles at the median score. A choice."""
    crack: float = 0.03
    """Probability of a crack at the median score. A choice."""
    carbon: float = 0.55
    """Intensity behind the film, ice on it included. A choice: clearly darker than any hole."""
    carbon_sd: float = 0.10
    """Sd of the log of the film's intensity. A choice: with a film that were always the same, an
    image's gain could be read from it."""
    gain_sd: float = 0.25
    """Sd of the log of an image's own gain. Calibrated: brightness alone is learned from 300
    labels, and is hidden this far."""
    dose_noise: float = 0.20
    """Sd of a pixel behind no specimen, where the image has 32 x 32 of them. Calibrated."""

    def __post_init__(self) -> None:
        """Raises ValueError with the name of the field that is wrong."""
        if self.size_px < 8:
            raise ValueError(f"size_px: at least 8, found {self.size_px}")
        if not 0 <= self.visible_fraction <= 1:
            raise ValueError(f"visible_fraction: from 0 to 1, found {self.visible_fraction}")


IMAGE_PRESETS: dict[str, ImagePreset] = {
    "y3": ImagePreset(size_px=64),
    "y3-mini": ImagePreset(),
    "aldolase": ImagePreset(size_px=64),
    # 600 holes of which a fifth are labelled: what is to be seen must be easy to see.
    "demo": ImagePreset(visible_fraction=0.8, texture=0.22, ripple=0.05, dose_noise=0.12),
}
"""By the names of ``synthetic.PRESETS``; the paper's images have 224 px."""


def draw_images(
    rng: np.random.Generator, table: HoleTable, preset: str | ImagePreset
) -> NDArray[np.uint8]:
    """Draws an image of every hole of a table; the same generator state gives the same images.

    Args:
        rng: consumed.
        table: with the CTF of every hole; nothing else of it than CTF and hierarchy is read.
        preset: a name of ``IMAGE_PRESETS`` or one's own.

    Returns:
        (N, H, W) uint8 grey values, bright where electrons pass.

    Raises:
        ValueError: no such preset; CTF values are missing.
    """
    if isinstance(preset, str):
        if preset not in IMAGE_PRESETS:
            raise ValueError(f"image preset: {preset!r} is not one of {sorted(IMAGE_PRESETS)}")
        preset = IMAGE_PRESETS[preset]
    visible = draw_visible_components(rng, table, preset.visible_fraction)
    causes = _draw_causes(rng, table, visible, preset)
    images = np.empty((len(table), preset.size_px, preset.size_px), np.uint8)
    step = max(1, CHUNK_PIXELS // preset.size_px**2)
    for begin in range(0, len(table), step):
        rows = slice(begin, begin + step)
        images[rows] = _render(rng, _Causes(*(cause[rows] for cause in causes)), preset)
    return images


_FROST = 6
"""Most frost particles in an image."""
_GREY = 140.0
"""Grey value of the bare beam at gain 1: leaves room for twice the gain, and for noise."""
_EDGE = 1 / 32
"""Width over which the film ends: the blur of a low-magnification image."""


class _Causes(NamedTuple):
    """What is rendered; float32, a row per hole."""

    gain: FloatArray
    """(N,)"""
    carbon: FloatArray
    """(N,) intensity behind the film."""
    hole: FloatArray
    """(N, 3) x and y of the centre from the image's, radius."""
    thickness_nm: FloatArray
    """(N,) in the middle."""
    gradient: FloatArray
    """(N, 2) relative thickness per length, along x and y."""
    texture: FloatArray
    """(N,) sd of intensity by crystalline ice."""
    ripple: FloatArray
    """(N,) sd of intensity by uneven ice."""
    crack: FloatArray
    """(N, 3) direction, offset from the centre, 1 or 0 for a crack or none."""
    frost: FloatArray
    """(N, _FROST, 4) x, y, radius, share of the beam that is absorbed (0: no particle)."""


def _draw_causes(
    rng: np.random.Generator, table: HoleTable, visible: FloatArray, preset: ImagePreset
) -> _Causes:
    """From the visible score to what will be seen; ``visible`` is (4, N), components by level.

    Widths and sizes without a field of their own are a choice, to the eye.
    """
    n, normal, uniform = len(table), rng.standard_normal, rng.random
    score = visible.sum(axis=0)
    size = np.sqrt((visible**2).mean(axis=1, keepdims=True))
    scaled = np.divide(visible, size, out=np.zeros_like(visible), where=size > 1e-9)
    badness = ndtr(np.sqrt(preset.thickness_shares) @ scaled)  # uniform in [0, 1]
    # neighbours lie on the same side of the wedge that ice is: all too thick, or all too thin
    side = rng.choice([-1.0, 1.0], size=len(table.patch_name))[table.patch_id]
    thickness = preset.ideal_thickness_nm * np.exp(side * preset.thickness_range * badness)
    slope = preset.gradient * np.exp(0.4 * score + 0.4 * normal(n))
    direction = 2 * np.pi * uniform(n)
    num_frost = rng.poisson(preset.contamination * np.exp(0.4 * score))
    is_frost = np.arange(_FROST) < num_frost[:, None]
    shape = (n, _FROST)
    causes = _Causes(
        gain=np.exp(preset.gain_sd * normal(n)),
        carbon=np.minimum(preset.carbon * np.exp(preset.carbon_sd * normal(n)), 0.95),
        hole=np.stack([0.03 * normal(n), 0.03 * normal(n), 0.38 + 0.01 * normal(n)], axis=1),
        thickness_nm=thickness,
        gradient=slope[:, None] * np.stack([np.cos(direction), np.sin(direction)], axis=1),
        texture=preset.texture * ndtr(score + 0.3 * normal(n)),
        ripple=preset.ripple * np.exp(0.5 * normal(n)),
        crack=np.stack(
            [
                2 * np.pi * uniform(n),
                0.15 * normal(n),
                uniform(n) < expit(np.log(preset.crack / (1 - preset.crack)) + score),
            ],
            axis=1,
        ),
        frost=np.stack(
            [
                uniform(shape) - 0.5,
                uniform(shape) - 0.5,
                0.02 + 0.04 * uniform(shape),
                np.where(is_frost, 0.2 + 0.4 * uniform(shape), 0.0),
            ],
            axis=2,
        ),
    )
    return _Causes(*(np.asarray(cause, np.float32) for cause in causes))


def _render(rng: np.random.Generator, causes: _Causes, preset: ImagePreset) -> NDArray[np.uint8]:
    """(B, H, W) images of the causes; ``rng`` gives texture and dose noise."""
    side, num_images = preset.size_px, len(causes.gain)
    shape = (num_images, side, side)
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    x, y = axis[None, None, :], axis[None, :, None]

    def across(values: FloatArray) -> FloatArray:
        return values[:, None, None]

    dx, dy = x - across(causes.hole[:, 0]), y - across(causes.hole[:, 1])
    distance = np.sqrt(dx**2 + dy**2)
    inside = np.clip((across(causes.hole[:, 2]) - distance) / _EDGE + 0.5, 0, 1)
    relative = 1 + across(causes.gradient[:, 0]) * dx + across(causes.gradient[:, 1]) * dy
    ice = np.exp(-across(causes.thickness_nm) / preset.mean_free_path_nm * relative)
    ice += across(causes.texture) * _grains(rng, shape, preset.texture_grain * side)
    ice += across(causes.ripple) * _grains(rng, shape, preset.ripple_grain * side)
    cracked = np.flatnonzero(causes.crack[:, 2])
    angle, offset = across(causes.crack[cracked, 0]), across(causes.crack[cracked, 1])
    from_crack = dx[cracked] * np.cos(angle) + dy[cracked] * np.sin(angle) - offset
    ice[cracked] += (1 - ice[cracked]) * np.exp(-0.5 * (from_crack / 0.015) ** 2)
    carbon = across(causes.carbon)
    image = carbon + inside * (ice - carbon)
    for particle in range(_FROST):
        here = np.flatnonzero(causes.frost[:, particle, 3])
        px, py, radius, depth = (across(v) for v in causes.frost[here, particle].T)
        image[here] *= 1 - depth * np.exp(-0.5 * ((x - px) ** 2 + (y - py) ** 2) / radius**2)
    # shot noise of the same electrons, however many pixels they fall on
    noise = preset.dose_noise * side / REFERENCE_PX * np.sqrt(np.maximum(image, 0))
    image += noise * rng.standard_normal(shape, dtype=np.float32)
    image *= _GREY * across(causes.gain)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _grains(rng: np.random.Generator, shape: tuple[int, int, int], grain_px: float) -> FloatArray:
    """White noise blurred to grains of that size, of variance 1, in the dtype float32."""
    width = shape[2]
    k = fft.fftfreq(width)  # cycles per pixel; images are square
    blur = np.exp(-2 * (np.pi * grain_px) ** 2 * (k[:, None] ** 2 + k**2))
    blur = (blur / np.sqrt((blur**2).mean())).astype(np.float32)[:, : width // 2 + 1]
    white = rng.standard_normal(shape, dtype=np.float32)
    return np.asarray(fft.irfft2(np.asarray(fft.rfft2(white)) * blur, s=(width, width)))
