"""What to do when little or nothing indexes: each finding with its number and its remedy, proved.

First the peaks, which need no crystal: how steeply their number falls with the SNR tells noise from
reflections, and a setting that keeps less than half of the strong frames' peaks is too strict. Then
the geometry: the beam centre from the symmetry of the mean image, the distance from the fitted
cell, or from a scan where nothing indexes at all. The search uses the embedded pipeline, whose
peaks are cached; before and after are judged with the user's backend, on the same frames, and each
remedy is taken back once alone: it is a finding only where that costs frames (McNemar's test), or
where a measurement of the geometry leaves no doubt and mending it does no harm.

Shape letters: N frames, R rows and C columns of the slab, n pixels, P panels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from envs.crystfel.experiment import Experiment
from envs.crystfel.indexer import Indexer, IndexerError
from envs.crystfel.rivals import CELL_GAIN, SHIFT_GAIN
from envs.crystfel.sfx.formats import Geometry, good_pixels, read_images
from envs.crystfel.sfx.index import KnownCell, index_peaks
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.types import BoolArray, FloatArray, Frame, IndexingResult, Parameters
from ssl2rl_ray.online.decide import is_significant

OnStep = Callable[[str, float], None]

CAUSES = {
    "no peaks": "the frames show no peaks at any setting",
    "noise": "most peaks are noise",
    "single pixels": "peaks of a single pixel are flickering pixels",
    "min_snr": "the SNR asked for is too high",
    "threshold_adu": "the threshold is too high",
    "min_pix_count": "peaks must have too many pixels",
    "min_peaks": "a hit must have too many peaks",
    "few crystals": "few frames show a crystal",
    "centre": "the beam centre is wrong",
    "distance": "the detector distance is wrong",
    "energy": "the photon energy is wrong",
    "cell": "the unit cell, or the photon energy, is not that of these crystals",
}
"""What can be found, in the order in which it is looked for."""

LADDER = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0)
"""SNR at which peaks are counted."""
STEEP = 4.0
"""Number of peaks ~ SNR to minus this: steeper is the tail of noise. (Reflections: 1 to 2, noise at
SNR 4: 5, measured on simulated lysozyme.)"""
LENIENT = {"threshold_adu": 20.0, "min_pix_count": 2, "min_peaks": 10}
"""Beside the SNR that the ladder gives; of a pixel detector at an XFEL."""
HIT_PEAKS = 15
"""A frame with so many peaks has a crystal, more likely than not."""
SCAN_PERCENT = tuple(range(-12, 13, 2))
"""Of the distance."""
WIDE_SCAN_PERCENT = (*range(-42, -12, 3), *range(15, 49, 3))
"""Of the photon energy: a distance is seldom measured so badly, and far off the two differ."""
ENERGY_PERCENT = 6.0
"""Beyond, both are tried."""
ENERGY_SHARE = 0.35
"""Of the hits, that must index at another energy: a wrong cell, scaled, finds a few by chance."""
MIN_Z, MIN_DISCORDANT = 1.645, 4
"""Of McNemar's test on the same frames, above which a remedy is believed."""
MIN_CENTRE_PX = 0.6
"""Centres nearer than that are not worth a word."""
MIN_CLEN_PERCENT = 1.0
LATTICE_Z = 4.0
"""``lattice_z`` of a frame that evidently shows a lattice."""
_NEAR_PX, _SAME_PX, _MOST_PEAKS = 70.0, 1.5, 120
NUM_MEAN_FRAMES = 6
"""Of the mean image."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    cause: str
    """A key of ``CAUSES``."""
    evidence: str
    """What was measured."""
    remedy: str
    changes: dict[str, float] = field(default_factory=dict)
    """Parameters to set."""
    is_measured: bool = False
    """The evidence is beyond doubt by itself: kept where the remedy does no harm, too."""
    num_without: int | None = None
    """Frames indexed with all other remedies but not this one; None = not tried."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnosis:
    """What is wrong and what it gives to mend it."""

    frames: tuple[Frame, ...]
    findings: tuple[Finding, ...]
    initial: Parameters
    proposed: Parameters
    before: IndexingResult
    after: IndexingResult
    """On the same frames."""
    centre_px: FloatArray
    """(2,) offset of the beam centre that the mean image's symmetry asks for."""
    centre_error_px: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "num_frames": len(self.frames),
            "num_hits": self.before.num_hits,
            "num_indexed": self.before.num_indexed,
            "num_indexed_after": self.after.num_indexed,
            "findings": [
                {
                    "cause": finding.cause,
                    "what": CAUSES[finding.cause],
                    "evidence": finding.evidence,
                    "remedy": finding.remedy,
                    "changes": finding.changes,
                    "num_indexed_without": finding.num_without,
                }
                for finding in self.findings
            ],
            "parameters": self.proposed.as_dict(),
            "centre_px": [_or_none(x) for x in self.centre_px],
            "centre_error_px": _or_none(self.centre_error_px),
            "version": self.after.version,
            "argv": list(self.after.argv),
        }


def diagnose(
    indexer: Indexer,
    experiment: Experiment,
    parameters: Parameters,
    frames: Sequence[Frame],
    *,
    search: EmbeddedIndexer | None = None,
    on_step: OnStep | None = None,
) -> Diagnosis:
    """Looks for what keeps frames from indexing.

    Args:
        indexer: judges before and after.
        experiment: the user's.
        parameters: the user's.
        frames: N to look at; 40 or more are advised.
        search: the embedded pipeline with peaks that are known already; None = a new one.
        on_step: told what is under way.

    Raises:
        IndexerError: no frames, or frames that cannot be read.
    """
    if not frames:
        raise IndexerError("no frames to diagnose: the list is empty")
    tell = on_step or (lambda what, share: None)
    search = search or EmbeddedIndexer(experiment)
    tell("indexing as it is", 0.0)
    before = indexer.run(parameters, frames)
    tell("counting peaks", 0.2)
    found = _of_peaks(search, parameters, frames)
    better = _with(parameters, found)
    is_blind = any(finding.cause in ("no peaks", "few crystals") for finding in found)
    tell("beam centre", 0.4)
    centre, centre_error = symmetry_centre(
        experiment.geometry, _spread(frames, NUM_MEAN_FRAMES), parameters
    )
    if not is_blind:
        tell("geometry", 0.5)
        found += _of_geometry(search, experiment, better, frames, centre, centre_error)
    better = _with(parameters, found)
    tell("trying it", 0.8)
    after = indexer.run(better, frames) if found and better != parameters else before
    findings = []
    for number, finding in enumerate(found):
        if not finding.changes:
            findings.append(finding)
            continue
        tell("trying each alone", 0.8 + 0.2 * number / len(found))
        without = _with(parameters, [other for other in found if other is not finding])
        other = before if without == parameters else indexer.run(without, frames)
        is_harmless = after.num_indexed >= other.num_indexed
        if is_significant(after.is_indexed, other.is_indexed, MIN_Z, MIN_DISCORDANT) or (
            finding.is_measured and is_harmless
        ):
            findings.append(replace(finding, num_without=other.num_indexed))
    proposed = _with(parameters, findings)
    if proposed != better:
        after = before if proposed == parameters else indexer.run(proposed, frames)
    tell("trying each alone", 1.0)
    return Diagnosis(
        frames=tuple(frames),
        findings=tuple(findings),
        initial=parameters,
        proposed=proposed,
        before=before,
        after=after,
        centre_px=centre,
        centre_error_px=centre_error,
    )


def format_diagnosis(diagnosis: Diagnosis, folder: str = "DIR") -> str:
    """For a reader; ``folder`` is that of the data."""
    num = len(diagnosis.frames)
    before, after = diagnosis.before, diagnosis.after
    lines = [
        f"{before.num_indexed} of {num} frames index, {before.num_hits} are hits, "
        f"{np.median(before.num_peaks):.0f} peaks in the median frame"
    ]
    for number, finding in enumerate(diagnosis.findings, 1):
        lines.append(f"{number}. {CAUSES[finding.cause]}: {finding.evidence}")
        lines.append(f"   {finding.remedy}")
        if finding.num_without is not None:
            lines.append(
                f"   {finding.num_without} frames index with everything else but this, "
                f"{after.num_indexed} with it"
            )
    if not diagnosis.findings:
        lines.append("nothing wrong was found that could be mended")
    if after is not before:
        options = " ".join(
            f"--set {name}={value:g}"
            for name, value in diagnosis.proposed.as_dict().items()
            if value != diagnosis.initial.as_dict()[name]
        )
        lines.append(f"with all of it {after.num_indexed} of {num} frames index:")
        lines.append(f"  ssl2rl sfx index --data {folder} {options}")
    return "\n".join(lines)


# ---- peaks ---------------------------------------------------------------------------------------


def _of_peaks(
    search: EmbeddedIndexer, parameters: Parameters, frames: Sequence[Frame]
) -> list[Finding]:
    """Findings of the peak finder, which need no crystal."""

    def counts(**changes: float) -> FloatArray:
        """(N,) peaks of each frame."""
        peaks = search.peaks(parameters.replace(**changes), frames)
        return np.array([len(found) for found in peaks], float)

    lenient = {**LENIENT, "min_pix_count": 2}
    del lenient["min_peaks"]
    ladder = np.array([counts(min_snr=snr, **lenient).mean() for snr in LADDER])
    if ladder[0] < 1:
        return [
            Finding(
                cause="no peaks",
                evidence=f"{ladder[0]:.2f} peaks a frame at SNR {LADDER[0]:g} without a threshold",
                remedy="look at a frame (--figure): is the data path of the .geom right, and is "
                "the detector not masked?",
            )
        ]
    slopes = -np.diff(np.log(np.maximum(ladder, 0.1))) / np.diff(np.log(LADDER))
    is_calm = slopes < STEEP
    snr = LADDER[int(np.argmax(is_calm))] if is_calm.any() else LADDER[-1]
    found: list[Finding] = []
    now = counts()
    if parameters.min_pix_count < 2 and now.mean() > 3 * (two := counts(min_pix_count=2).mean()):
        found.append(
            Finding(
                cause="single pixels",
                evidence=f"{now.mean():.0f} peaks a frame, {two:.0f} where a peak has two pixels",
                remedy="set min_pix_count to 2",
                changes={"min_pix_count": 2},
            )
        )
    if parameters.min_snr < snr - 0.5:
        below = _slope_at(slopes, parameters.min_snr)
        loud = counts(**{"min_pix_count": max(2, parameters.min_pix_count)})
        quiet = counts(min_snr=snr, min_pix_count=max(2, parameters.min_pix_count))
        if below > STEEP and loud.mean() > 1.5 * quiet.mean():
            found.append(
                Finding(
                    cause="noise",
                    evidence=f"{np.median(loud):.0f} peaks in the median frame at SNR "
                    f"{parameters.min_snr:g}, {np.median(quiet):.0f} at {snr:g}; their number "
                    f"falls by the SNR's power of {below:.1f}, that of reflections by 1 to 2",
                    remedy=f"set min_snr to {snr:g}",
                    changes={"min_snr": snr},
                )
            )
    # What a strong frame keeps: the 90th percent of the peaks.
    strong = np.quantile(counts(min_snr=snr, **lenient), 0.9)
    tight = {"min_snr": snr, "threshold_adu": LENIENT["threshold_adu"], "min_pix_count": 2}
    for name, value in tight.items():
        mine = getattr(parameters, name)
        if mine <= value:
            continue
        kept = np.quantile(counts(**(tight | {name: mine})), 0.9)
        if kept < 0.6 * strong and strong >= HIT_PEAKS:
            found.append(
                Finding(
                    cause=name,
                    evidence=f"a strong frame keeps {kept:.0f} of {strong:.0f} peaks at "
                    f"{name} = {mine:g}",
                    remedy=f"set {name} to {value:g}",
                    changes={name: value},
                )
            )
    better = _with(parameters, found)
    peaks = np.array([len(p) for p in search.peaks(better, frames)])
    num_hits = int((peaks >= min(HIT_PEAKS, better.min_peaks)).sum())
    is_lost = (peaks >= HIT_PEAKS) & (peaks < better.min_peaks)
    if is_lost.sum() >= max(2, 0.2 * (peaks >= HIT_PEAKS).sum()):
        found.append(
            Finding(
                cause="min_peaks",
                evidence=f"{is_lost.sum()} of {len(frames)} frames have {HIT_PEAKS} peaks or more "
                f"and fewer than {better.min_peaks}",
                remedy=f"set min_peaks to {LENIENT['min_peaks']:g}",
                changes={"min_peaks": LENIENT["min_peaks"]},
            )
        )
    if num_hits < max(1, 0.02 * len(frames)):
        found.append(
            Finding(
                cause="few crystals",
                evidence=f"{num_hits} of {len(frames)} frames have {HIT_PEAKS} peaks or more",
                remedy="look at more frames (--frames), or at the sample and the jet: no setting "
                "makes crystals",
            )
        )
    return found


def _slope_at(slopes: FloatArray, snr: float) -> float:
    """Of the step of the ladder that the SNR lies on."""
    at = int(np.searchsorted(LADDER, snr, side="right")) - 1
    return float(slopes[min(max(at, 0), len(slopes) - 1)])


# ---- geometry ------------------------------------------------------------------------------------


def _of_geometry(
    search: EmbeddedIndexer,
    experiment: Experiment,
    parameters: Parameters,
    frames: Sequence[Frame],
    centre: FloatArray,
    centre_error: float,
) -> list[Finding]:
    """Findings of distance, centre, energy and cell, for peaks that are as they should be."""
    start = parameters
    few = max(3, round(0.05 * len(frames)))
    result = search.run(parameters, frames)
    centred = parameters.replace(
        centre_x_offset_px=round(parameters.centre_x_offset_px + float(centre[0]), 2),
        centre_y_offset_px=round(parameters.centre_y_offset_px + float(centre[1]), 2),
    )
    is_off = math.hypot(*centre) > max(MIN_CENTRE_PX, 3 * centre_error)
    how_centre, how_clen = "", ""
    if is_off and (moved := search.run(centred, frames)).num_indexed > result.num_indexed:
        parameters, result = centred, moved
        how_centre = "the mean image is symmetric about a point {} px from the centre"
    if result.num_indexed < few:
        base = centred if is_off else parameters
        scan = {p: _at_distance(search, base, p, frames) for p in SCAN_PERCENT if p}
        best = max(scan, key=lambda p: scan[p][1].num_indexed)
        num_lattices = _num_lattices(search, base, frames)
        if not num_lattices and scan[best][1].num_indexed < few:
            return [
                Finding(
                    cause="few crystals",
                    evidence=f"of {result.num_hits} hits none shows a lattice (distances between "
                    "peaks that repeat), and none indexes at any distance",
                    remedy="look at more frames (--frames), or at the sample and the jet: no "
                    "setting makes crystals",
                )
            ]
        wide: dict[int, int] = {}
        if scan[best][1].num_indexed < few or abs(best) > ENERGY_PERCENT:
            wide = {
                p: _at_energy(experiment, search, base, p, frames)
                for p in (*WIDE_SCAN_PERCENT, *(q for q in scan if abs(q) > ENERGY_PERCENT))
            }
            percent = max(wide, key=lambda p: wide[p])
            enough = max(few, scan[best][1].num_indexed + 1, ENERGY_SHARE * result.num_hits)
            if wide[percent] >= enough:
                return [_energy_finding(experiment, percent, wide[percent], len(frames))]
        percent = best
        if scan[percent][1].num_indexed < max(few, result.num_indexed + 1):
            peaks = np.median(result.num_peaks[result.is_hit]) if result.num_hits else 0
            cell, energy = experiment.cell, experiment.geometry.photon_energy_eV
            ends = [energy / (1 + WIDE_SCAN_PERCENT[at] / 100) for at in (-1, 0)]
            most = scan[best][1].num_indexed, max(wide.values(), default=0)
            return [
                Finding(
                    cause="cell",
                    evidence=f"of {result.num_hits} hits with {peaks:.0f} peaks in the median one "
                    f"{num_lattices} show a lattice, at most {most[0]} index at a distance within "
                    f"{SCAN_PERCENT[-1]} %, and {most[1]} at an energy from {ends[0]:.0f} to "
                    f"{ends[1]:.0f} eV; the mean image is symmetric about the centre to "
                    f"{math.hypot(*centre):.1f} px",
                    remedy=f"check the cell file (a {cell.a_A:g}, b {cell.b_A:g}, c {cell.c_A:g} Å,"
                    f" {cell.lattice_type} {cell.centering}) and photon_energy ({energy:g} eV)",
                )
            ]
        parameters, result = scan[percent]
        how_clen = f"{result.num_indexed} of {len(frames)} frames index at {percent:+d} %, and "
        how_clen += "few without"
        if base is centred and is_off:
            how_centre = "the mean image is symmetric about a point {} px from the centre"
    for _ in range(3):  # what the crystals say themselves
        finer = _refined(parameters, result)
        if finer == parameters:
            break
        if (moved := search.run(finer, frames)).num_indexed < result.num_indexed:
            break
        parameters, result = finer, moved
    is_sure = result.num_indexed >= few  # of the mean fitted cell
    return [
        replace(finding, is_measured=is_off if finding.cause == "centre" else is_sure)
        for finding in _geometry_findings(experiment, start, parameters, how_centre, how_clen)
    ]


def _geometry_findings(
    experiment: Experiment, start: Parameters, end: Parameters, how_centre: str, how_clen: str
) -> list[Finding]:
    found = []
    dx = end.centre_x_offset_px - start.centre_x_offset_px
    dy = end.centre_y_offset_px - start.centre_y_offset_px
    if math.hypot(dx, dy) > MIN_CENTRE_PX:
        how = how_centre or "the spots of indexed frames lie {} px off their prediction"
        where = f"({dx:+.1f}, {dy:+.1f})"
        found.append(
            Finding(
                cause="centre",
                evidence=how.format(where),
                remedy=f"move the beam centre by {where} px: corner_x and corner_y of every panel "
                f"by {-dx:+.1f} and {-dy:+.1f}",
                changes={
                    "centre_x_offset_px": end.centre_x_offset_px,
                    "centre_y_offset_px": end.centre_y_offset_px,
                },
            )
        )
    percent = end.clen_offset_percent - start.clen_offset_percent
    if abs(percent) > MIN_CLEN_PERCENT:
        mine = experiment.geometry.moved(start).distance_m
        theirs = experiment.geometry.moved(end).distance_m
        evidence = how_clen or "the fitted cell of indexed frames is that of another distance"
        found.append(
            Finding(
                cause="distance",
                evidence=f"{evidence}: {percent:+.1f} % makes it the reference cell",
                remedy=f"set the distance to {theirs:.5f} m (now {mine:.5f})",
                changes={"clen_offset_percent": end.clen_offset_percent},
            )
        )
    return found


def _energy_finding(experiment: Experiment, percent: float, num: int, num_frames: int) -> Finding:
    energy = experiment.geometry.photon_energy_eV
    right = energy / (1 + percent / 100)
    return Finding(
        cause="energy",
        evidence=f"{num} of {num_frames} frames index at {right:.0f} eV, and fewer at any distance",
        remedy=f"set photon_energy in the .geom to about {right:.0f} eV (now {energy:.0f}), and "
        "diagnose again",
    )


def _at_energy(
    experiment: Experiment,
    search: EmbeddedIndexer,
    parameters: Parameters,
    percent: float,
    frames: Sequence[Frame],
) -> int:
    """Frames that index at another photon energy, which is in no parameter."""
    energy = experiment.geometry.photon_energy_eV / (1 + percent / 100)
    geometry = replace(experiment.geometry.moved(parameters), photon_energy_eV=energy)
    cell, num = KnownCell(experiment.cell), 0
    for peaks in search.peaks(parameters, frames):
        if len(peaks) >= parameters.min_peaks:
            panel = geometry.panel_index[peaks.ss_px.astype(int), peaks.fs_px.astype(int)]
            positions = geometry.positions_m(peaks.fs_px, peaks.ss_px, panel)
            num += index_peaks(geometry.q_per_A(positions), cell) is not None
    return num


def _at_distance(
    search: EmbeddedIndexer, parameters: Parameters, percent: float, frames: Sequence[Frame]
) -> tuple[Parameters, IndexingResult]:
    offset = round(parameters.clen_offset_percent + percent, 2)
    moved = parameters.replace(clen_offset_percent=offset)
    return moved, search.run(moved, frames)


def _refined(parameters: Parameters, result: IndexingResult) -> Parameters:
    """Geometry as fitted cell and spots say."""
    if not result.num_indexed:
        return parameters
    clen = -100 * (result.cell_ratio - 1) / CELL_GAIN
    x, y = np.nan_to_num(result.spot_shift_px) / SHIFT_GAIN
    return parameters.replace(
        clen_offset_percent=round(parameters.clen_offset_percent + float(np.nan_to_num(clen)), 2),
        centre_x_offset_px=round(parameters.centre_x_offset_px + float(x), 2),
        centre_y_offset_px=round(parameters.centre_y_offset_px + float(y), 2),
    )


def _num_lattices(search: EmbeddedIndexer, parameters: Parameters, frames: Sequence[Frame]) -> int:
    """Hits whose peaks are evidently those of some lattice, whatever its cell."""
    geometry, num = search.experiment.geometry.moved(parameters), 0
    for peaks in search.peaks(parameters, frames):
        if len(peaks) >= max(parameters.min_peaks, HIT_PEAKS):
            panel = geometry.panel_index[peaks.ss_px.astype(int), peaks.fs_px.astype(int)]
            xyz = geometry.positions_m(peaks.fs_px, peaks.ss_px, panel)
            num += lattice_z(xyz[:, :2] * geometry.res_per_m[panel][:, None]) > LATTICE_Z
    return num


def lattice_z(xy_px: FloatArray, num_nulls: int = 8) -> float:
    """How evident it is that peaks belong to a lattice, without knowing it.

    Of a lattice the differences between near peaks repeat. Counted are pairs of differences that
    agree to ``_SAME_PX``, against the same peaks each turned about the beam at random.

    Args:
        xy_px: (n, 2) from the beam, brightest first; so many as ``_MOST_PEAKS`` are used.
        num_nulls: random turns; drawn from a fixed seed.

    Returns:
        standard deviations above the random ones.
    """

    def count(xy: FloatArray) -> int:
        i, j = np.triu_indices(len(xy), 1)
        d = xy[i] - xy[j]
        d = d[np.hypot(*d.T) < _NEAR_PX]
        d = np.where(d[:, :1] < 0, -d, d)
        return len(KDTree(d).query_pairs(_SAME_PX)) if len(d) > 1 else 0

    xy = np.asarray(xy_px, float)[:_MOST_PEAKS]
    radius, rng = np.hypot(*xy.T), np.random.default_rng(0)
    turns = rng.uniform(0, 2 * np.pi, (num_nulls, len(xy)))
    nulls = [count(np.column_stack([radius * np.cos(a), radius * np.sin(a)])) for a in turns]
    mean = float(np.mean(nulls))
    return (count(xy) - mean) / math.sqrt(max(mean, 1.0) + float(np.var(nulls)))


def symmetry_centre(
    geometry: Geometry, frames: Sequence[Frame], parameters: Parameters
) -> tuple[FloatArray, float]:
    """The beam centre by Friedel's law: the mean of many frames is symmetric about the beam.

    Still frames of proteins have too few Friedel *pairs* of peaks to find a centre from (the mate
    of a reflection lies off the Ewald sphere), but background and crystals alike obey
    I(q) = I(-q). To first order a wrong centre adds a dipole, slope of the radial mean times the
    cosine of the angle, which is fitted by least squares; a gain of its own is allowed each panel.

    Args:
        geometry: the user's.
        frames: of the mean image; 5 to 20 will do.
        parameters: whose offsets are applied first.

    Returns:
        (2,) px by which the centre should move, x and y, and its error: half the difference between
        two halves of the rings. Zeros and infinity where the image has no slope.

    Raises:
        FormatError: frames that cannot be read.
    """
    geometry = geometry.moved(parameters)
    images = [image.astype(np.float32) for image in read_images(geometry, frames)]
    good = good_pixels(geometry, frames[0])
    panel = geometry.panel_index[good].astype(int)
    xy = geometry.pixel_positions_m[good][:, :2] * geometry.res_per_m[panel][:, None]
    mean = np.mean([image[good] for image in images], axis=0, dtype=float)
    keep = np.isfinite(mean)
    return dipole_centre(xy[keep], panel[keep], mean[keep])


_RING_PX = 4.0
_MIN_RING = 200
"""Pixels of a ring."""


def dipole_centre(
    xy_px: FloatArray, panel: NDArray[Any], mean: FloatArray, num_rounds: int = 6
) -> tuple[FloatArray, float]:
    """``symmetry_centre`` of (n, 2) positions from the beam, their panels (n,), and values (n,)."""
    centre, error = np.zeros(2), math.inf
    for _ in range(num_rounds):
        v = xy_px - centre
        radius = np.hypot(*v.T)
        ring = (radius / _RING_PX).astype(int)
        count = np.bincount(ring)
        is_full = count >= _MIN_RING
        if is_full.sum() < 8:
            return np.zeros(2), math.inf
        middle = _RING_PX * (np.arange(len(count)) + 0.5)[is_full]
        profile = (np.bincount(ring, mean) / np.maximum(count, 1))[is_full]
        level = np.interp(radius, middle, profile)
        slope = np.interp(radius, middle, np.gradient(profile, middle))
        rest = mean - level
        used: BoolArray = np.abs(rest) < 4 * rest.std()  # spots, hot pixels
        weight = level * used
        total = np.maximum(np.bincount(panel, weight * level), 1e-30)

        def free(
            z: FloatArray,
            level: FloatArray = level,
            weight: FloatArray = weight,
            total: FloatArray = total,
            used: BoolArray = used,
        ) -> FloatArray:
            """What a gain of the panel does not explain."""
            return (z - level * (np.bincount(panel, z * weight) / total)[panel]) * used

        dipole = np.stack([free(-slope * v[:, i] / np.maximum(radius, 1)) for i in (0, 1)], axis=1)
        rest = free(rest)
        normal = dipole.T @ dipole
        if np.linalg.cond(normal) > 1e8:
            return np.zeros(2), math.inf
        move = np.linalg.solve(normal, dipole.T @ rest)
        move *= min(1.0, 10.0 / max(math.hypot(*move), 1e-9))
        halves = [
            np.linalg.lstsq(dipole[half].T @ dipole[half], dipole[half].T @ rest[half])[0]
            for half in ((ring // 3) % 2 == 0, (ring // 3) % 2 == 1)
        ]
        error = float(np.hypot(*(halves[0] - halves[1]))) / 2
        centre = centre + move
        if math.hypot(*move) < 0.02:
            break
    return centre, error


# ---- small things --------------------------------------------------------------------------------


def _with(parameters: Parameters, findings: Sequence[Finding]) -> Parameters:
    changes: dict[str, float] = {}
    for finding in findings:
        changes |= finding.changes
    return parameters.replace(**changes)


def _spread(frames: Sequence[Frame], num: int) -> list[Frame]:
    """So many, evenly."""
    at = np.unique(np.linspace(0, len(frames) - 1, min(num, len(frames))).astype(int))
    return [frames[i] for i in at]


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
