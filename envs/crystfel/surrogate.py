"""Many simulated experiments at once: what an indexer would say, frame by frame, in microseconds.

Each frame has latent values (how strong its crystal is, how much junk it carries, how far the
geometry may be off) that stay the same whatever the parameters: results on the same frames are
paired, as those of a real indexer are. The shapes are response curves of CrystFEL 0.12 on lysozyme
(peakfinder8, asdf), measured by us; ``nominal_experiment`` repeats them, ``draw_experiments``
varies them so that an agent meets a new experiment prepared (domain randomisation, Tobin et al.
2017, arXiv:1703.06907).

Shape letters: E experiments, N frames, K = 7 tunables, in the order of ``types.TUNABLES``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np

from envs.crystfel.indexer import IndexerError
from envs.crystfel.types import (
    TUNABLES,
    BoolArray,
    FloatArray,
    Frame,
    IndexingResult,
    IntArray,
    Parameters,
    UnitCell,
)

Kind = Literal["normal", "wide", "harder"]
KINDS: tuple[Kind, ...] = ("normal", "wide", "harder")

LYSOZYME = UnitCell(a_A=79.2, b_A=79.2, c_A=38.0, lattice_type="tetragonal", unique_axis="c")
_SNR, _THRESHOLD, _PIXELS, _PEAKS, _CLEN, _X, _Y = range(len(TUNABLES))
_LOW = np.array([tunable.low for tunable in TUNABLES.values()])
_HIGH = np.array([tunable.high for tunable in TUNABLES.values()])


# ---- what an indexer says of many experiments ----------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchResult:
    """E indexing results on N frames each, side by side; the fields are ``IndexingResult``'s."""

    is_indexed: BoolArray
    """(E, N)"""
    is_hit: BoolArray
    """(E, N)"""
    num_peaks: IntArray
    """(E, N)"""
    cell_ratio: FloatArray
    """(E,) NaN = no crystal."""
    residual_px: FloatArray
    """(E,) NaN = no crystal."""
    spot_shift_px: FloatArray
    """(E, 2) NaN = no crystal."""
    cpu_s: FloatArray
    """(E,)"""

    @classmethod
    def of(cls, results: Sequence[IndexingResult]) -> Self:
        """Results on equally many frames side by side."""
        return cls(
            **{
                field.name: np.array([getattr(result, field.name) for result in results])
                for field in dataclasses.fields(cls)
            }
        )

    @property
    def num_frames(self) -> int:
        """N."""
        return self.is_indexed.shape[1]

    @cached_property
    def indexed_fraction(self) -> FloatArray:
        """(E,) of all frames."""
        return self.is_indexed.mean(1)

    @cached_property
    def hit_fraction(self) -> FloatArray:
        """(E,) of all frames."""
        return self.is_hit.mean(1)

    @cached_property
    def peak_quantiles(self) -> FloatArray:
        """(E, 3) peaks of a frame: the 10th, 50th and 90th percent of the frames (lower ones)."""
        at = [int(q * (self.num_frames - 1)) for q in (0.1, 0.5, 0.9)]
        return np.partition(self.num_peaks, at, axis=1)[:, at].astype(float)

    def select(self, rows: IntArray | BoolArray) -> Self:
        """Some of the experiments."""
        return dataclasses.replace(
            self, **{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        )


# ---- the experiments -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiments:
    """E experiments: how each responds to its parameters; every array (E,) unless it says more.

    Logarithms are natural. "Effective SNR" is the one that remains of the SNR and the threshold,
    of which the stricter counts.
    """

    start: FloatArray
    """(E, K) the user's parameters, geometry at 0 by definition."""
    optimum_clen_percent: FloatArray
    """What the user's distance is wrong by: the offset at which it is right."""
    optimum_centre_px: FloatArray
    """(E, 2)"""
    crystal_share: FloatArray
    """Of the frames."""
    log_peaks: FloatArray
    """Median over crystals of their real peaks at SNR 5."""
    log_peaks_sd: FloatArray
    peaks_power: FloatArray
    """Real peaks fall with the effective SNR by this power."""
    log_peaks_needed: FloatArray
    """Real peaks with which half of the frames index."""
    log_adu_per_snr: FloatArray
    """Threshold (ADU) that is as strict as SNR 1, near SNR 7.5."""
    pixel_loss: FloatArray
    """Log of real peaks lost for each pixel beyond 2 that ``min_pix_count`` asks for."""
    pixel_saturation: FloatArray
    """Pixels up to which nothing is lost (large spots)."""
    log_junk: FloatArray
    """Junk peaks of a frame at SNR 4 and 2 pixels."""
    junk_fall: FloatArray
    """1 = as a Gaussian tail falls with the effective SNR; less is a longer tail."""
    log_junk_sd: FloatArray
    log_flicker: FloatArray
    """More of them at 1 pixel: flickering pixels."""
    junk_pixel_loss: FloatArray
    """Log of junk lost for each pixel beyond 2."""
    log_blobs: FloatArray
    """Spurious peaks that no parameter removes."""
    log_specks: FloatArray
    """Dim spots where the background is near 0: of high SNR, they fall with the threshold only."""
    log_specks_adu: FloatArray
    """Threshold (ADU) at which a share 1/e of them is left."""
    log_junk_tolerance: FloatArray
    """Junk peaks for each real one at which half of the frames fail."""
    log_tolerance_sd: FloatArray
    clen_window_percent: FloatArray
    """Error of the distance at which half of the frames fail."""
    clen_asymmetry: FloatArray
    """The window is so much wider (share) where the distance is too long."""
    clen_window_sd: FloatArray
    """Of its log."""
    centre_window_px: FloatArray
    centre_window_sd: FloatArray
    """Of its log."""
    cell_slope: FloatArray
    """Percent of the cell for one percent of the distance."""
    cell_bias_percent: FloatArray
    """The reference cell is not quite that of the crystals."""
    cell_sd_percent: FloatArray
    """Of one crystal."""
    shift_gain: FloatArray
    """Share of the centre's error that the spots' mean shift shows."""
    shift_turn: FloatArray
    """Angle by which the shift points elsewhere, rad."""
    shift_sd_px: FloatArray
    """Of one crystal."""
    residual_px: FloatArray
    chaos: FloatArray
    """Size (log peaks) of what a change of parameters does to a frame for no reason."""
    cpu_frame_s: FloatArray
    cpu_hit_s: FloatArray
    cpu_peak_s: FloatArray
    """For each peak of a hit."""

    def __len__(self) -> int:
        """E."""
        return len(self.crystal_share)

    def select(self, rows: IntArray | BoolArray | slice) -> Self:
        """Some of them, also repeatedly."""
        return dataclasses.replace(
            self, **{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Several as one."""
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in dataclasses.fields(cls)
            }
        )


def nominal_experiment() -> Experiments:
    """(E = 1) the lysozyme measurement behind the model, geometry right, nominal parameters."""
    values: dict[str, float] = {
        "crystal_share": 0.70,
        "log_peaks": np.log(31.0),
        "log_peaks_sd": 0.95,
        "peaks_power": 1.08,
        "log_peaks_needed": np.log(26.0),
        "log_adu_per_snr": np.log(8.0),
        "pixel_loss": 0.27,
        "pixel_saturation": 2.0,
        "log_junk": np.log(100.0),
        "junk_fall": 1.15,
        "log_junk_sd": 0.35,
        "log_flicker": 7.5,
        "junk_pixel_loss": 1.2,
        "log_blobs": np.log(3.0),
        "log_specks": -5.0,
        "log_specks_adu": np.log(10.0),
        "log_junk_tolerance": np.log(1.1),
        "log_tolerance_sd": 0.6,
        "clen_window_percent": 3.13,
        "clen_asymmetry": 0.03,
        "clen_window_sd": 0.11,
        "centre_window_px": 1.65,
        "centre_window_sd": 0.43,
        "cell_slope": 0.9,
        "cell_bias_percent": 0.0,
        "cell_sd_percent": 1.0,
        "shift_gain": 0.7,
        "shift_turn": 0.0,
        "shift_sd_px": 0.8,
        "residual_px": 0.7,
        "chaos": 0.12,
        "cpu_frame_s": 0.022,
        "cpu_hit_s": 0.035,
        "cpu_peak_s": 0.0003,
        "optimum_clen_percent": 0.0,
    }
    start = np.array([[5.0, 20.0, 2.0, 15.0, 0.0, 0.0, 0.0]])
    arrays = {name: np.array([value]) for name, value in values.items()}
    return Experiments(start=start, optimum_centre_px=np.zeros((1, 2)), **arrays)


_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    # name: uniform between (normal), (harder)
    "crystal_share": ((0.40, 0.95), (0.15, 0.70)),
    "log_peaks": ((2.9, 4.4), (2.6, 4.2)),
    "log_peaks_sd": ((0.7, 1.15), (0.5, 1.3)),
    "peaks_power": ((0.85, 1.35), (0.7, 2.0)),
    "log_peaks_needed": ((2.8, 3.4), (2.6, 3.6)),
    "log_adu_per_snr": ((0.5, 3.0), (0.2, 3.6)),
    "pixel_loss": ((0.18, 0.40), (0.10, 0.60)),
    "pixel_saturation": ((1.2, 4.0), (1.0, 5.0)),
    "log_junk": ((3.4, 6.5), (2.5, 8.0)),
    "junk_fall": ((0.35, 1.3), (0.1, 0.6)),
    "log_junk_sd": ((0.25, 0.6), (0.2, 1.0)),
    "log_flicker": ((4.0, 8.0), (0.0, 6.0)),
    "junk_pixel_loss": ((0.5, 1.5), (0.2, 1.5)),
    "log_blobs": ((0.0, 2.0), (0.0, 2.8)),
    "log_specks": ((-1.0, 5.0), (0.0, 6.0)),
    "log_specks_adu": ((1.6, 3.6), (1.0, 4.2)),
    "log_junk_tolerance": ((-0.3, 0.5), (-0.9, 0.4)),
    "log_tolerance_sd": ((0.45, 0.85), (0.4, 1.2)),
    "clen_window_percent": ((2.4, 3.6), (1.5, 3.0)),
    "clen_asymmetry": ((-0.10, 0.15), (-0.40, 0.40)),
    "clen_window_sd": ((0.06, 0.15), (0.05, 0.35)),
    "centre_window_px": ((1.4, 2.4), (1.1, 2.2)),
    "centre_window_sd": ((0.35, 0.50), (0.25, 0.60)),
    "cell_slope": ((0.85, 1.0), (0.5, 1.1)),
    "cell_bias_percent": ((-0.25, 0.25), (-0.8, 0.8)),
    "cell_sd_percent": ((0.6, 1.4), (1.0, 3.0)),
    "shift_gain": ((0.56, 0.82), (0.2, 0.9)),
    "shift_turn": ((-0.15, 0.15), (-0.7, 0.7)),
    "shift_sd_px": ((0.6, 1.2), (1.0, 3.0)),
    "residual_px": ((0.5, 1.0), (0.5, 2.0)),
    "chaos": ((0.08, 0.16), (0.1, 0.3)),
    "cpu_frame_s": ((0.015, 0.03), (0.01, 0.06)),
    "cpu_hit_s": ((0.02, 0.05), (0.02, 0.1)),
    "cpu_peak_s": ((0.0002, 0.0004), (0.0001, 0.0008)),
}
STRETCH = 1.0
"""The most that a range is stretched by on each side, as a share of its width."""
_SIGNED = ("clen_asymmetry", "cell_bias_percent", "shift_turn")
_AT_MOST = {"crystal_share": 0.98}
_CLEN_PERCENT = {"normal": 3.5, "wide": 5.0, "harder": 4.5}
"""The distance's error is uniform within so much on both sides."""
_CENTRE_PX = {"normal": 3.0, "wide": 4.5, "harder": 4.0}
"""The centre's error is uniform in a disc of this radius."""
_STARTS: dict[Kind, tuple[tuple[float, float], ...]] = {
    # (SNR, threshold in ADU, pixels, peaks): uniform between, but log-uniform SNR
    "normal": ((3.6, 9.5), (0.0, 100.0), (2, 5), (0, 45)),
    "wide": ((3.2, 11.5), (0.0, 160.0), (1, 6), (0, 60)),
    "harder": ((3.2, 11.5), (0.0, 160.0), (1, 6), (0, 60)),
}


def draw_experiments(rng: np.random.Generator, kind: Kind, num_experiments: int) -> Experiments:
    """Experiments with bad starts.

    ``normal``: response curves around the measured ones. ``wide``, what to train on: each
    experiment stretches all those ranges by a share of their own width, between 0 and 1, and starts
    may be farther off. ``harder`` is unlike both in what it draws from and always hard: weaker
    crystals, long tails of junk, narrow and lopsided windows, free outputs that say little; nothing
    is ever trained on it. Experiments whose best setting indexes less than 5 % of the
    frames are drawn again.

    Raises:
        ValueError: for another kind, or less than one experiment.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    if num_experiments < 1:
        raise ValueError(f"num_experiments: must be 1 or more, found {num_experiments}")
    found: list[Experiments] = []
    while (missing := num_experiments - sum(map(len, found))) > 0:
        drawn = _draw(rng, kind, missing + missing // 4 + 8)
        found.append(drawn.select(np.flatnonzero(best_fraction(drawn, 80) >= 0.05)))
    return Experiments.join(found).select(slice(0, num_experiments))


def _draw(rng: np.random.Generator, kind: Kind, num: int) -> Experiments:
    stretch = STRETCH * rng.random(num) if kind == "wide" else 0.0
    values = {name: _uniform(rng, name, kind, stretch, num) for name in _RANGES}
    radius, angle = _CENTRE_PX[kind] * np.sqrt(rng.random(num)), rng.uniform(0, 2 * np.pi, num)
    (snr, threshold, pixels, peaks) = _STARTS[kind]
    start = np.zeros((num, len(TUNABLES)))
    start[:, _SNR] = np.exp(rng.uniform(np.log(snr[0]), np.log(snr[1]), num))
    start[:, _THRESHOLD] = rng.uniform(*threshold, num)
    start[:, _PIXELS] = rng.integers(int(pixels[0]), int(pixels[1]) + 1, num)
    start[:, _PEAKS] = rng.integers(int(peaks[0]), int(peaks[1]) + 1, num)
    return Experiments(
        start=start,
        optimum_clen_percent=rng.uniform(-1, 1, num) * _CLEN_PERCENT[kind],
        optimum_centre_px=np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1),
        **values,
    )


def _uniform(
    rng: np.random.Generator, name: str, kind: Kind, stretch: FloatArray | float, num: int
) -> FloatArray:
    """(E,) within a range, stretched by a share (E,) of its width on both sides."""
    low, high = _RANGES[name][kind == "harder"]
    more = stretch * (high - low)
    values = rng.uniform(low - more, high + more, num)
    if (name not in _SIGNED and not name.startswith("log_")) or name.endswith("_sd"):
        values = np.maximum(values, low / 3)  # what cannot be negative
    return np.minimum(values, _AT_MOST.get(name, np.inf))


# ---- their frames --------------------------------------------------------------------------------

_NUM_LATENTS = 9
_STRENGTH, _JUNK, _TOLERANCE, _CLEN_WINDOW, _CENTRE_WINDOW, _KAPPA, _CELL, _DX, _DY = range(
    _NUM_LATENTS
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """N cached frames of each of E experiments: what is theirs whatever the parameters."""

    normal: FloatArray
    """(C, E, N) float32, standard normal; the latents named above."""
    crystal: FloatArray
    """(E, N) float32 uniform: below ``crystal_share`` the frame has a crystal."""
    phase: FloatArray
    """(E, N) float32, 0 to 2 pi."""

    @classmethod
    def draw(cls, rng: np.random.Generator, num_experiments: int, num_frames: int) -> Self:
        """Fresh frames."""
        shape = (num_experiments, num_frames)
        return cls(
            normal=rng.standard_normal((_NUM_LATENTS, *shape), dtype=np.float32),
            crystal=rng.random(shape, dtype=np.float32),
            phase=rng.random(shape, dtype=np.float32) * np.float32(2 * np.pi),
        )

    def select(self, rows: IntArray | BoolArray | slice, frames: IntArray | slice) -> Self:
        """Some experiments, and of each some frames."""
        return dataclasses.replace(
            self,
            normal=self.normal[:, rows][:, :, frames],
            crystal=self.crystal[rows][:, frames],
            phase=self.phase[rows][:, frames],
        )


_WANDER = np.array([[1.5, 0.05, 1.2, 0, 0, 0, 0], [0, 0, 0, 0, 0.9, 0.7, -0.8]])
"""How fast ``chaos`` of peaks, and of the indexing, changes with each parameter, rad per unit."""


def respond(experiments: Experiments, sample: Sample, values: FloatArray) -> BatchResult:
    """What the indexer says of each experiment's sample at its parameters.

    Args:
        experiments: E of them.
        sample: their frames.
        values: (E, K) parameters in their units, geometry relative to the user's start.
    """
    e, column = experiments, lambda x: np.asarray(x, np.float32)[:, None]
    strictness = effective_snr(e, values)
    extra_pixels = values[:, _PIXELS] - 2
    lost = np.maximum(values[:, _PIXELS] - e.pixel_saturation, 0) - np.maximum(
        2 - e.pixel_saturation, 0
    )
    log_real = e.log_peaks - e.peaks_power * np.log(strictness / 5) - e.pixel_loss * lost
    # Gaussian tail, but no more peaks than there is room for
    fall = e.junk_fall * (strictness**2 - 16) / 2
    few_pixels = np.where(extra_pixels < 0, e.log_flicker * -extra_pixels, 0.0)
    log_junk = e.log_junk - fall + few_pixels - e.junk_pixel_loss * np.maximum(extra_pixels, 0)
    log_junk = np.minimum(log_junk, 7.5)

    latent = sample.normal
    of_peaks, of_indexing = (
        column(e.chaos) * np.sin(sample.phase + latent[_KAPPA] * column(values @ speed))
        for speed in _WANDER
    )
    real = column(log_real) + column(e.log_peaks_sd) * latent[_STRENGTH] + of_peaks
    junk = np.exp(column(log_junk) + column(e.log_junk_sd) * latent[_JUNK])
    junk += column(
        np.exp(e.log_blobs)
        + np.exp(e.log_specks - values[:, _THRESHOLD] / np.exp(e.log_specks_adu))
    )
    has_crystal = sample.crystal < column(e.crystal_share)
    real_peaks = np.exp(np.minimum(real, 7.0)) * has_crystal
    num_peaks = np.rint(real_peaks + junk).astype(np.int32)
    is_hit = num_peaks >= values[:, _PEAKS, None]

    clen_error = values[:, _CLEN] - e.optimum_clen_percent
    centre_error = values[:, _X:] - e.optimum_centre_px
    clen_window = e.clen_window_percent * (1 + np.sign(clen_error) * e.clen_asymmetry)
    clen_strain = column(np.abs(clen_error) / clen_window)
    centre_strain = column(np.hypot(*centre_error.T) / e.centre_window_px)
    clen_strain = clen_strain * np.exp(column(-e.clen_window_sd) * latent[_CLEN_WINDOW])
    centre_strain = centre_strain * np.exp(column(-e.centre_window_sd) * latent[_CENTRE_WINDOW])
    real += of_indexing
    is_indexed = is_hit & has_crystal
    is_indexed &= real > column(e.log_peaks_needed)
    tolerance = column(e.log_junk_tolerance) + column(e.log_tolerance_sd) * latent[_TOLERANCE]
    is_indexed &= np.log(junk) - real < tolerance
    is_indexed &= clen_strain**4 + centre_strain**2 < 1

    count = is_indexed.sum(1)
    no_crystal = np.where(count > 0, 0.0, np.nan)

    def mean(x: FloatArray) -> FloatArray:
        """(E,) of the indexed frames."""
        return np.where(is_indexed, x, 0).sum(1, dtype=float) / np.maximum(count, 1) + no_crystal

    cell = e.cell_slope * clen_error + e.cell_bias_percent
    cell = cell + e.cell_sd_percent * mean(latent[_CELL])
    cos, sin = np.cos(e.shift_turn), np.sin(e.shift_turn)
    dx, dy = -e.shift_gain * centre_error.T
    shift = np.stack(
        [
            cos * dx - sin * dy + e.shift_sd_px * mean(latent[_DX]),
            sin * dx + cos * dy + e.shift_sd_px * mean(latent[_DY]),
        ],
        axis=1,
    )
    error = np.hypot(0.35 * np.hypot(*centre_error.T), 0.25 * clen_error)
    cpu = e.cpu_frame_s * is_hit.shape[1] + e.cpu_hit_s * is_hit.sum(1)
    cpu = cpu + e.cpu_peak_s * np.where(is_hit, num_peaks, 0).sum(1)
    return BatchResult(
        is_indexed=is_indexed,
        is_hit=is_hit,
        num_peaks=num_peaks,
        cell_ratio=1 + cell / 100,
        residual_px=np.hypot(e.residual_px, error) + no_crystal,
        spot_shift_px=shift,
        cpu_s=cpu,
    )


def effective_snr(experiments: Experiments, values: FloatArray) -> FloatArray:
    """(E,) the SNR that is as strict as SNR and threshold together."""
    by_threshold = (
        7.5
        * (np.maximum(values[:, _THRESHOLD], 0) / (7.5 * np.exp(experiments.log_adu_per_snr)))
        ** 0.8
    )
    return (values[:, _SNR] ** 6 + by_threshold**6) ** (1 / 6)


# ---- what is true of them ------------------------------------------------------------------------

_TRUTH_SEED, _NUM_TRUTH_FRAMES = 8128, 1500
_GRID_SNR = (3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.5, 10.0)
_GRID_PIXELS = (2, 3, 4, 6)
_GRID_THRESHOLD = (0.0, 10.0, 20.0, 40.0, 80.0, 160.0)


def true_fraction(
    experiments: Experiments, values: FloatArray, num_frames: int = _NUM_TRUTH_FRAMES
) -> FloatArray:
    """(E,) indexed fraction on frames of the experiment that no tuner sees.

    The same latents serve every experiment: comparisons are paired.
    """
    rng = np.random.default_rng(_TRUTH_SEED)
    frames = Sample.draw(rng, 1, num_frames)
    rows = np.zeros(min(len(experiments), 64), dtype=int)
    parts = []
    for first in range(0, len(experiments), 64):
        some = slice(first, first + 64)
        here = experiments.select(some)
        sample = frames.select(rows[: len(here)], slice(None))
        parts.append(respond(here, sample, values[some]).indexed_fraction)
    return np.concatenate(parts)


def best_fraction(experiments: Experiments, num_frames: int = 200) -> FloatArray:
    """(E,) the highest true fraction of an exhaustive grid at the right geometry.

    SNR x threshold x pixels without min_peaks, which can only lose.
    """
    best = np.zeros(len(experiments))
    for snr in _GRID_SNR:
        for pixels in _GRID_PIXELS:
            for threshold in _GRID_THRESHOLD:
                values = at_optimum(experiments, snr, threshold, pixels)
                best = np.maximum(best, true_fraction(experiments, values, num_frames))
    return best


def at_optimum(
    experiments: Experiments, snr: float = 5.0, threshold: float = 20.0, pixels: int = 2
) -> FloatArray:
    """(E, K) the right geometry with these peak-finding parameters, as far as bounds allow."""
    values = np.zeros((len(experiments), len(TUNABLES)))
    values[:, _SNR], values[:, _THRESHOLD], values[:, _PIXELS] = snr, threshold, pixels
    values[:, _CLEN] = np.clip(experiments.optimum_clen_percent, _LOW[_CLEN], _HIGH[_CLEN])
    values[:, _X:] = np.clip(experiments.optimum_centre_px, _LOW[_X:], _HIGH[_X:])
    return values


# ---- one of them as an indexer -------------------------------------------------------------------


class SurrogateIndexer:
    """One simulated experiment behind the ``Indexer`` protocol."""

    def __init__(self, experiments: Experiments, *, num_frames: int = 1000, seed: int = 0) -> None:
        """One experiment with its frames, ``frames``.

        Raises:
            ValueError: not exactly one experiment.
        """
        if len(experiments) != 1:
            raise ValueError(f"one experiment makes an indexer, found {len(experiments)}")
        self.experiments = experiments
        self.frames = tuple(Frame(path="surrogate.h5", event=f"//{i}") for i in range(num_frames))
        self._row = {frame: i for i, frame in enumerate(self.frames)}
        self._sample = Sample.draw(np.random.default_rng(seed), 1, num_frames)
        digest = hashlib.sha256(f"{seed} {num_frames}".encode())
        for field in dataclasses.fields(experiments):
            digest.update(getattr(experiments, field.name).tobytes())
        self._version = f"surrogate 1 {digest.hexdigest()[:16]}"

    @property
    def version(self) -> str:
        """Model, experiment and frames."""
        return self._version

    @property
    def nominal(self) -> Parameters:
        """The user's."""
        named = dict(zip(TUNABLES, self.experiments.start[0].tolist(), strict=True))
        return Parameters(**named)

    start = nominal

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """As the protocol says; CPU seconds are those that CrystFEL would take."""
        try:
            rows = np.array([self._row[frame] for frame in frames], dtype=int)
        except KeyError as error:
            raise IndexerError(
                f"{error.args[0]} is not a frame of this surrogate: take them from its `frames`"
            ) from None
        values = np.array([[getattr(parameters, name) for name in TUNABLES]], dtype=float)
        if len(rows) == 0:
            raise IndexerError("no frames to index: name at least one")
        result = respond(self.experiments, self._sample.select(slice(None), rows), values)
        ratio = float(result.cell_ratio[0])
        scale = np.array([ratio] * 3 + [ratio * 0 + 1] * 3)  # NaN angles as well, without a crystal
        return IndexingResult(
            is_indexed=result.is_indexed[0],
            is_hit=result.is_hit[0],
            num_peaks=result.num_peaks[0],
            num_crystals=int(result.is_indexed.sum()),
            mean_cell=LYSOZYME.as_array() * scale,
            cell_ratio=ratio,
            residual_px=float(result.residual_px[0]),
            spot_shift_px=result.spot_shift_px[0],
            cpu_s=float(result.cpu_s[0]),
            version=self.version,
        )
