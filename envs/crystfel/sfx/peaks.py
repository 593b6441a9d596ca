"""Peak finder: statistics of rings around the beam, connected pixels, local signal to noise.

The recipe is that of Cheetah's ``peakfinder8`` (Barty et al., J. Appl. Cryst. 47 (2014) 1118,
section 3.3), written from the paper for arrays: pixels are gathered ring after ring, so that sums
over rings are sums over slices, and what is above the threshold of its ring is a short list. Of
large rings a part of the pixels is enough.

Shape letters: R rows and C columns of the slab, K rings, P peaks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from envs.crystfel.types import BoolArray, FloatArray, IntArray, Parameters

MAX_PEAKS = 2048
"""Of a frame; the brightest are kept. More are noise, and would cost time only."""
NUM_CLIPPINGS = 5
"""Rounds of leaving out what is beyond ``min_snr`` of its ring (Cheetah's number)."""
_NUM_SAMPLES = 64
"""Pixels of a ring that tell roughly where its threshold is: to 9 %."""
_ENOUGH = 256
"""Pixels that tell the statistics of a ring; of larger ones, up to three in four are left out."""
_RUN = 16
_BLOCK = 2**16
"""Pixels that are worked on together, about."""
_MAX_AT_ONCE = 2**22
"""Background pixels, of all peaks together: some 200 MB."""
_WORTH_A_LOOK = 0.7
"""Pixels beyond this share of the rough threshold are the ones that clipping may leave out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Peaks:
    """The P peaks of a frame, brightest first."""

    fs_px: FloatArray
    """(P,) centre of mass on the slab along the columns; the centre of pixel i is i + 0.5."""
    ss_px: FloatArray
    """(P,) the same along the rows."""
    intensity_adu: FloatArray
    """(P,) sum over the peak's pixels above the local background."""
    snr: FloatArray
    """(P,) the sum over its standard deviation."""

    def __len__(self) -> int:
        """P."""
        return len(self.fs_px)

    def as_array(self) -> NDArray[np.float32]:
        """(P, 4) fs, ss, intensity, signal to noise."""
        columns = (self.fs_px, self.ss_px, self.intensity_adu, self.snr)
        return np.stack(columns, axis=1).astype(np.float32)

    @classmethod
    def from_array(cls, array: NDArray[Any]) -> Peaks:
        """From what ``as_array`` gives."""
        return cls(fs_px=array[:, 0], ss_px=array[:, 1], intensity_adu=array[:, 2], snr=array[:, 3])


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelMap:
    """Which pixels are searched, and of which ring they are; made once per geometry."""

    shape: tuple[int, int]
    """(R, C)"""
    ring: IntArray
    """(R * C,) which of the K rings each pixel belongs to; -1 = not searched."""
    panel: IntArray
    """(R * C,) panel of each pixel; -1 = not searched."""
    order: IntArray
    """(m,) the pixels that the statistics are made of, ring after ring: all of a small ring, every
    second to fourth of a large one."""
    starts: IntArray
    """(K,) where each ring begins in ``order``."""
    counts: IntArray
    """(K,) how many of ``order`` are of each ring."""
    sample: IntArray
    """(K, S) places in ``order`` of some pixels of each ring, evenly spaced."""
    blocks: tuple[slice, ...]
    """Rings that are worked on together."""
    run_ring: IntArray
    """(R * C / 16,) innermost ring of each run of pixels; -1 = its rings are not close together."""


def pixel_map(
    radius_px: FloatArray, panel: IntArray, *, min_res_px: float = 0, max_res_px: float = np.inf
) -> PixelMap:
    """Sorts the pixels of a slab by their ring.

    Args:
        radius_px: (R, C) distance from the beam.
        panel: (R, C) number of the panel; -1 where a pixel is bad or belongs to none. Peaks do
            not reach over from one panel to another.
        min_res_px: pixels from this radius on,
        max_res_px: and up to this one, are searched.

    Raises:
        ValueError: no pixel is left, or the shapes differ.
    """
    if radius_px.shape != panel.shape or radius_px.ndim != 2:
        raise ValueError("radius_px and panel must be (R, C) both")
    is_searched = (panel >= 0) & (radius_px >= min_res_px) & (radius_px <= max_res_px)
    pixels = np.flatnonzero(is_searched)
    if not len(pixels):
        raise ValueError(
            f"no usable pixel between {min_res_px} and {max_res_px} px from the beam; the "
            f"detector reaches from {np.nanmin(radius_px):.0f} to {np.nanmax(radius_px):.0f} px"
        )
    whole = np.floor(radius_px.ravel()[pixels]).astype(np.int64)
    _, number, counts = np.unique(whole, return_inverse=True, return_counts=True)
    ring = np.full(panel.size, -1, dtype=np.int32)
    ring[pixels] = number
    order = pixels[np.argsort(number, kind="stable")]
    inside = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = order[inside % np.repeat(np.clip(counts // _ENOUGH, 1, 4), counts) == 0]
    counts = np.bincount(ring[order])
    starts = np.cumsum(counts) - counts
    share = np.linspace(0.0, 1.0, _NUM_SAMPLES, endpoint=False)
    edges = np.unique(np.searchsorted(starts, np.arange(0, len(order), _BLOCK)))
    edges = [*edges[edges < len(starts)].tolist(), len(starts)]
    return PixelMap(
        shape=(panel.shape[0], panel.shape[1]),
        ring=ring,
        panel=np.where(is_searched, panel, -1).astype(np.int32).ravel(),
        order=order,
        starts=starts,
        counts=counts,
        sample=starts[:, None] + (share * counts[:, None]).astype(np.int64),
        blocks=tuple(slice(*ends) for ends in itertools.pairwise(edges)),
        run_ring=_innermost(ring),
    )


def _innermost(ring: IntArray) -> IntArray:
    """Ring from which on the 16 rings are that all pixels of a run belong to; -1 = they do not.

    Runs without a searched pixel count as of the last 16 rings: whatever is found is none.
    """
    runs = ring[: len(ring) // _RUN * _RUN].reshape(-1, _RUN)
    low = np.where(runs >= 0, runs, ring.max()).min(axis=1)
    return np.where(runs.max(axis=1) - low < _RUN, low, -1)


def find_peaks(image: NDArray[Any], pixels: PixelMap, parameters: Parameters) -> Peaks:
    """Finds the peaks of a frame.

    A peak is at least ``min_pix_count`` and at most ``max_pix_count`` connected pixels (sides or
    corners, of one panel), each above the mean of its ring by ``min_snr`` standard deviations of
    the ring and above ``threshold_adu``; their sum above the local background must be ``min_snr``
    times its own standard deviation, and no pixel of the background may outshine the peak.

    Args:
        image: (R, C) of any number type; NaN = bad pixel.
        pixels: from ``pixel_map`` with the same ``min_res_px`` and ``max_res_px``.
        parameters: the numbers above, and ``local_bg_radius_px``.

    Raises:
        ValueError: the image is not (R, C).
    """
    if image.shape != pixels.shape:
        raise ValueError(f"the image is {image.shape}, and the geometry is of {pixels.shape}")
    flat = np.ascontiguousarray(image).ravel()
    with np.errstate(over="ignore", invalid="ignore"):  # 1e30 ADU: infinite, and no peak
        mean, high = _rings(flat, pixels, parameters)
    peak, spot = _components(_brighter(flat, high, pixels), pixels, parameters)
    if not len(spot):
        return Peaks.from_array(np.zeros((0, 4), dtype=np.float32))
    value = flat[spot].astype(np.float64)
    excess = np.maximum(value - mean[pixels.ring[spot]], 1e-9)
    if peak[-1] >= 2 * MAX_PEAKS:  # noise: not worth a close look at each
        weight = np.bincount(peak, excess)
        is_seen = weight >= np.partition(weight, -2 * MAX_PEAKS)[-2 * MAX_PEAKS]
        kept = is_seen[peak]
        peak = (np.cumsum(is_seen) - 1)[peak[kept]]
        spot, value, excess = spot[kept], value[kept], excess[kept]
    row, column = np.divmod(spot, pixels.shape[1])
    weight = np.bincount(peak, excess)
    ss = np.bincount(peak, excess * row) / weight
    fs = np.bincount(peak, excess * column) / weight
    size = np.bincount(peak)
    background, sigma, brightest = _surroundings(
        flat, high, fs, ss, pixels.panel[spot[_first(peak)]], pixels, parameters.local_bg_radius_px
    )
    total = np.bincount(peak, value) - size * background
    peak_max = np.maximum.reduceat(value, _first(peak))
    with np.errstate(divide="ignore", invalid="ignore"):
        snr = total / (np.sqrt(size) * sigma)
    is_peak = (snr >= parameters.min_snr) & (total > 0) & (peak_max > brightest)
    chosen = np.flatnonzero(is_peak)
    chosen = chosen[np.argsort(-total[chosen], kind="stable")][:MAX_PEAKS]
    columns = (fs[chosen] + 0.5, ss[chosen] + 0.5, total[chosen], snr[chosen])
    return Peaks.from_array(np.stack(columns, axis=1).astype(np.float32))


def _rings(
    flat: NDArray[Any], pixels: PixelMap, parameters: Parameters
) -> tuple[FloatArray, FloatArray]:
    """Mean and upper threshold (K,) of each ring without what lies beyond.

    A small sample of each ring tells which few pixels are worth a look; the others are summed up
    once, and the rounds of clipping go over the few. Some rings at a time: what is small stays in
    the cache of the processor.
    """
    starts, counts, snr = pixels.starts, pixels.counts, parameters.min_snr
    num_rings = len(counts)
    s1, s2 = np.empty(num_rings), np.empty(num_rings)
    places, values = [], []
    for rings in pixels.blocks:
        first, n = starts[rings.start], counts[rings]
        order = pixels.order[first : starts[rings.stop - 1] + counts[rings.stop - 1]]
        x = np.take(flat, order, mode="clip").astype(np.float32, copy=False)
        if flat.dtype.kind == "f":
            x[~np.isfinite(x)] = np.nan
        centre, spread = _rough(np.take(x, pixels.sample[rings] - first))
        y = x - np.repeat(centre, n)
        np.abs(y, out=y)
        few = np.flatnonzero(~(y <= np.repeat(_WORTH_A_LOOK * snr * spread, n)))  # NaN as well
        places.append(few + first)
        values.append(x[few].astype(np.float64))
        x[few] = 0.0
        s1[rings] = np.add.reduceat(x, starts[rings] - first)
        s2[rings] = np.add.reduceat(np.square(x, out=x), starts[rings] - first)
    few, value = np.concatenate(places), np.concatenate(values)
    where = pixels.ring[pixels.order[few]]
    rest = counts - np.bincount(where, minlength=num_rings)
    is_kept = np.isfinite(value)
    mean = high = np.zeros(num_rings)
    for _ in range(NUM_CLIPPINGS):
        kept, v = where[is_kept], value[is_kept]
        n = np.maximum(rest + np.bincount(kept, minlength=num_rings), 1)
        mean = (s1 + np.bincount(kept, v, minlength=num_rings)) / n
        square = (s2 + np.bincount(kept, v**2, minlength=num_rings)) / n
        reach = snr * np.sqrt(np.maximum(square - mean**2, 0.0))
        high = np.maximum(mean + reach, parameters.threshold_adu)
        was_kept, is_kept = is_kept, (value <= high[where]) & (value >= (mean - reach)[where])
        if np.array_equal(is_kept, was_kept):
            break
    return mean, high


def _brighter(flat: NDArray[Any], high: FloatArray, pixels: PixelMap) -> IntArray:
    """The pixels above the threshold of their ring, in order.

    Runs of pixels are compared with the lowest threshold of the 16 rings that they may be of, which
    is one pass over the image; the few that are above that, with their own.
    """
    runs = flat[: len(pixels.run_ring) * _RUN].reshape(-1, _RUN)
    padded = np.concatenate([high, np.full(_RUN - 1, np.inf)])
    lowest = sliding_window_view(padded, _RUN).min(axis=1)
    bar = np.where(pixels.run_ring < 0, high.min(), lowest[pixels.run_ring])[:, None]
    if flat.dtype.kind in "iu":  # for whole numbers, above x is above the whole part of x
        limits = np.iinfo(flat.dtype)
        bar = np.clip(np.floor(bar), limits.min, limits.max)
    some = np.flatnonzero(runs > bar.astype(flat.dtype))
    some = np.concatenate([some, np.arange(runs.size, len(flat))])
    ring = pixels.ring[some]
    some, ring = some[ring >= 0], ring[ring >= 0]
    is_bright = (flat[some] > high[ring]) & np.isfinite(flat[some])
    return some[is_bright]


def _rough(
    sample: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation (K,) of samples (K, S), the outliers and NaN left out."""
    ordered = np.nan_to_num(np.sort(sample, axis=1), copy=False)
    low, centre, high = (ordered[:, sample.shape[1] * q // 4, None] for q in (1, 2, 3))
    is_in = np.abs(sample - centre) <= 4 * (high - low) / 1.349  # of a normal distribution; not NaN
    n = np.maximum(is_in.sum(axis=1), 1)
    value = np.where(is_in, sample, 0.0)
    mean = value.sum(axis=1) / n
    variance = np.where(is_in, (sample - mean[:, None]) ** 2, 0.0).sum(axis=1) / n
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def _components(
    spot: IntArray, pixels: PixelMap, parameters: Parameters
) -> tuple[IntArray, IntArray]:
    """Connected bright pixels whose number is allowed: (number of the peak, pixel), by peak."""
    if not len(spot):
        return spot, spot
    panel = pixels.panel[spot]
    width = pixels.shape[1] + 2  # so that the end of a row is no neighbour of the next one's start
    key = spot + 2 * (spot // pixels.shape[1])
    n = len(key)
    steps = np.array([1, width - 1, width, width + 1])
    sought = key + steps[:, None]
    found = np.minimum(np.searchsorted(key, sought.ravel()), n - 1).reshape(4, n)
    is_pair = (key[found] == sought) & (panel[found] == panel)
    first, second = np.nonzero(is_pair)[1], found[is_pair]
    graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(n, n))
    _, label = connected_components(graph, directed=False)
    size = np.bincount(label)
    is_allowed = (size >= parameters.min_pix_count) & (size <= parameters.max_pix_count)
    kept = np.flatnonzero(is_allowed[label])
    kept = kept[np.argsort(label[kept], kind="stable")]
    number = np.cumsum(is_allowed) - 1
    return number[label[kept]], spot[kept]


def _surroundings(
    flat: NDArray[Any],
    high: FloatArray,
    fs: FloatArray,
    ss: FloatArray,
    panel: IntArray,
    pixels: PixelMap,
    radius_px: int,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean, standard deviation and maximum (P,) of the background pixels around each peak.

    Background are the pixels within twice ``radius_px`` that are not above their ring's threshold.
    """
    rows, columns = _disc(2 * radius_px)
    if len(fs) > 1 and len(fs) * len(rows) > _MAX_AT_ONCE:
        half = len(fs) // 2
        parts = [
            _surroundings(flat, high, fs[some], ss[some], panel[some], pixels, radius_px)
            for some in (slice(0, half), slice(half, None))
        ]
        mean, spread, brightest = (np.concatenate(column) for column in zip(*parts, strict=True))
        return mean, spread, brightest
    row = np.rint(ss).astype(np.int64)[:, None] + rows
    column = np.rint(fs).astype(np.int64)[:, None] + columns
    height, width = pixels.shape
    is_on = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = np.where(is_on, row * width + column, 0)
    is_used = is_on & (pixels.panel[pixel] == panel[:, None])
    value = flat[pixel].astype(np.float64)
    with np.errstate(invalid="ignore"):
        is_used &= np.isfinite(value) & (value <= high[pixels.ring[pixel]])
    value = np.where(is_used, value, 0.0)
    n = np.maximum(is_used.sum(axis=1), 1)
    mean = value.sum(axis=1) / n
    variance = (value**2).sum(axis=1) / n - mean**2
    brightest = np.where(is_used, value, -np.inf).max(axis=1)
    return mean, np.sqrt(np.maximum(variance, 0.0)), brightest


@lru_cache(maxsize=8)
def _disc(radius_px: int) -> tuple[IntArray, IntArray]:
    side = np.arange(-radius_px, radius_px + 1)
    rows, columns = np.meshgrid(side, side, indexing="ij")
    is_in: BoolArray = rows**2 + columns**2 <= radius_px**2
    return rows[is_in], columns[is_in]


def _first(labels: IntArray) -> IntArray:
    """Where each label begins, of sorted labels that leave none out."""
    return np.flatnonzero(np.diff(labels, prepend=-1))
