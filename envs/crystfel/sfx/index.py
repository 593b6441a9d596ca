"""Known-cell indexer: the orientation of a crystal whose cell is known, and whether to believe it.

Search in the manner of the direct-space indexers (Gevorkov et al., Acta Cryst. A75 (2019) 694;
Duisenberg, J. Appl. Cryst. 25 (1992) 92): a lattice vector t of the crystal makes q . t whole for
all scattering vectors q. The shortest axis of the known cell is sought on a hemisphere of
directions, the two others by turning about it; the best candidates are refined together.

A fit alone proves nothing: with enough orientations to choose from, some lattice comes close to
half of any set of points. A lattice is therefore believed only where the number of peaks close to
it is significant against peaks that lie anywhere (binomial, corrected for the orientations tried),
along each axis on its own, where it explains a good part of them, and where its cell is the known
one, of the same symmetry and centering. An agent that is rewarded for indexed frames would find any
gap here.

Where the assumed beam centre is off, all scattering vectors are, by the same amount: the lattice
misses the origin. So each axis has an offset, q . t - offset is whole, and rows of four are
(t, -offset) that multiply peaks (q, 1). The lattice that comes out is the best one *without* it.

Shape letters: N peaks, D directions, L lengths, T candidate axes, M candidate lattices,
S symmetries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.special import betainc

from envs.crystfel.types import BoolArray, FloatArray, IntArray, UnitCell

LENGTH_TOLERANCE = 0.042
"""Of the known cell against each axis that is found. Never tuned: a wide one takes junk.

CrystFEL's default is 5 %, of cells that its refinement has drawn back towards where they were: with
the distance 3 % wrong it reports 2.6 %. Cells here follow the whole error, so that 4.2 % accepts
what 5 % accepts there (measured on the same frames at 3 and 4 %).
"""
ANGLE_TOLERANCE_DEG = 1.5
"""Of each angle (CrystFEL's default)."""
MIN_EXPLAINED = 0.39
"""Share of the peaks within ``EXPLAINED_WITHIN`` of the lattice."""
EXPLAINED_WITHIN = 0.25
"""Of a lattice spacing, along each axis."""
MIN_LAWFUL = 0.75
"""Share of those that the centering of the cell allows. A crystal without it has half or less."""
MAX_LOG10_P = -6.0
"""Of the whole lattice: one in a million blank hits, were peaks to lie anywhere."""
MAX_LOG10_P_AXIS = -3.0
"""Of each axis, given the other two."""

_LOG10_TRIED = 10.0
"""Orientations, cells and offsets that differ by more than the closeness tested, about 10^10."""
_CLOSENESS = (0.08, 0.12, 0.18, 0.25)
"""Distances from a lattice point, in spacings, at which peaks are counted."""
_MAX_ORDER = 10.0
"""Of the sought axis: peaks up to this order take part in the search."""
_NUM_NEAR, _NUM_MIDDLE, _NUM_FAR = 60, 80, 120
_MIDDLE, _FAR = 1.4, 2.0
"""At most so many peaks of the lowest angles take part in the search for an axis, so many up to
1.4 times the angle in turning about it, so many up to twice the angle in ranking axes,"""
_MIN_PEAKS = 25
"""and at least so many, where there are."""
_LENGTHS = (0.96, 1.0, 1.04)
"""Of the sought axis over its length in the known cell: a wrong distance scales all."""
_NUM_AXES = 200
_APART = 0.012
"""Candidate axes that differ by less, in lengths of the axis, are one."""
_NUM_LATTICES = 12
"""And of axes, each of which is turned at two scales. (More of all these finds no more.)"""
_NUM_FINALISTS = 10
_MAX_DIRECTIONS = 40_000
_PHASE_STEP = 3.0
"""Between neighbouring directions at the highest order, rad."""
_BLOCK = 512
"""Directions, or turns, at a time: what is small stays in the cache."""
_FEWEST = 4
"""Peaks; fewer prove nothing."""
_TURN = 2 * math.pi


@dataclass(frozen=True, kw_only=True, eq=False)
class Crystal:
    """A lattice that was found."""

    basis_A: FloatArray
    """(3, 3) rows a, b, c in the laboratory, Å."""
    hkl: IntArray
    """(N, 3) nearest lattice point of each peak."""
    is_indexed: BoolArray
    """(N,) peaks within ``EXPLAINED_WITHIN`` of their lattice point."""
    log10_p: float
    """Of so many peaks this close to any of the lattices tried, had they lain anywhere."""

    @cached_property
    def cell(self) -> FloatArray:
        """(6,) a, b, c in Å; alpha, beta, gamma in degrees."""
        return cell_parameters(self.basis_A[None])[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The M lattices that fit best, believed or not."""

    bases_A: FloatArray
    """(M, 3, 3)"""
    log10_p: FloatArray
    """(M,) see ``significance``."""
    log10_p_axis: FloatArray
    """(3, M) see ``significance``."""
    explained: FloatArray
    """(M,) share of the peaks within ``EXPLAINED_WITHIN``."""
    lawful: FloatArray
    """(M,) share of these that the centering allows."""
    is_alike: BoolArray
    """(M,) the cell is the known one within the tolerances."""

    @cached_property
    def is_believed(self) -> BoolArray:
        """(M,) whether each can be believed."""
        return (
            (self.log10_p <= MAX_LOG10_P)
            & (self.log10_p_axis.max(axis=0, initial=-np.inf) <= MAX_LOG10_P_AXIS)
            & (self.explained >= MIN_EXPLAINED)
            & (self.lawful >= MIN_LAWFUL)
            & self.is_alike
        )


def index_peaks(q_per_A: FloatArray, cell: KnownCell) -> Crystal | None:
    """Finds the crystal in a frame, if there is one.

    Args:
        q_per_A: (N, 3) scattering vectors of the peaks (without 2 pi), 1/Å, brightest first; rows
            that are not finite count as no peak.
        cell: what is sought.

    Returns:
        The most significant lattice; None where none can be believed.
    """
    q = np.nan_to_num(np.asarray(q_per_A, dtype=np.float64), posinf=0.0, neginf=0.0)
    found = candidates(q, cell)
    if not found.is_believed.any():
        return None
    best = int(np.argmin(np.where(found.is_believed, found.log10_p, np.inf)))
    basis = found.bases_A[best]
    whole, away = _orders(basis[None], q)
    return Crystal(
        basis_A=basis,
        hkl=whole[:, 0].T.astype(np.int32),
        is_indexed=away[:, 0].max(axis=0) < EXPLAINED_WITHIN,
        log10_p=float(found.log10_p[best]),
    )


def candidates(q_per_A: FloatArray, cell: KnownCell) -> Candidates:
    """The lattices that fit the peaks best, with what there is to say for them.

    Significance is judged with the offset; the bases that come out have none, and must explain the
    peaks as they are.
    """
    q = _apart(q_per_A, cell)
    q1 = np.column_stack([q, np.ones(len(q))])
    lattices = np.zeros((0, 3, 4))
    if len(q) >= _FEWEST:
        near = _lowest(q1, cell.max_q_per_A, _NUM_NEAR)
        middle = _lowest(q1, _MIDDLE * cell.max_q_per_A, _NUM_MIDDLE)
        far = _lowest(q1, _FAR * cell.max_q_per_A, _NUM_FAR)
        axes = _find_axes(near, far, cell)
        if not cell.has_flip:
            axes = np.concatenate([axes, -axes])
        lattices = _turn(middle, axes, cell)
    if not len(lattices):
        none = np.zeros(0)
        return Candidates(
            bases_A=lattices[:, :, :3],
            log10_p=none,
            log10_p_axis=np.zeros((3, 0)),
            explained=none,
            lawful=none,
            is_alike=none > 0,
        )
    lattices = _refine(lattices, q1, cell)
    whole, away = _orders(lattices, q1)
    order = lattices.transpose(1, 0, 2) @ q1.T
    width = 4 * np.abs(order - order.mean(axis=2, keepdims=True)).mean(axis=2)
    log10_p, log10_p_axis = significance(away, width)
    is_close = away.max(axis=0) < EXPLAINED_WITHIN
    bases = _fit(lattices[:, :, :3], whole, is_close, q, _pairs(q), cell)
    whole, away = _orders(bases, q)
    is_close = away.max(axis=0) < EXPLAINED_WITHIN
    is_lawful = is_close & cell.cell.allows(np.moveaxis(whole, 0, -1))
    return Candidates(
        bases_A=bases,
        log10_p=log10_p,
        log10_p_axis=log10_p_axis,
        explained=is_close.mean(axis=1),
        lawful=is_lawful.sum(axis=1) / np.maximum(is_close.sum(axis=1), 1),
        is_alike=cell.is_alike(bases),
    )


# ------------------------------------------------------------------------------ the known cell


@dataclass(frozen=True)
class KnownCell:
    """A unit cell with what the search needs of it, worked out once."""

    cell: UnitCell

    @cached_property
    def basis_A(self) -> FloatArray:
        """(3, 3) rows a, b, c: a along x, b in the xy plane."""
        return np.linalg.inv(self.cell.reciprocal_per_A()).T

    @cached_property
    def parameters(self) -> FloatArray:
        """(6,) lengths and angles."""
        return self.cell.as_array()

    @cached_property
    def symmetry(self) -> FloatArray:
        """(S, 3, 3) integer matrices W that leave the metric as it is (within a per mille).

        The rows of ``W @ basis`` are as good a basis of the lattice: the holohedry, found by trial
        instead of by table, so that any setting will do.
        """
        every = np.array(list(product((-1, 0, 1), repeat=3)))
        metric = self.basis_A @ self.basis_A.T
        square = np.einsum("ni,ij,nj->n", every, metric, every)
        alike = [every[np.abs(square - metric[i, i]) < 2e-3 * metric[i, i]] for i in range(3)]
        found = np.array([np.stack(rows) for rows in product(*alike)])
        new = found @ metric @ found.transpose(0, 2, 1)
        scale = np.sqrt(np.outer(np.diag(metric), np.diag(metric)))
        is_same = (np.abs(new - metric) < 2e-3 * scale).all(axis=(1, 2))
        return found[is_same].astype(np.float64)

    @cached_property
    def axis(self) -> int:
        """The shortest axis: fewest directions to try."""
        return int(np.argmin(self.parameters[:3]))

    @property
    def max_q_per_A(self) -> float:
        """Up to where the search uses peaks."""
        return _MAX_ORDER / float(self.parameters[self.axis])

    @cached_property
    def directions(self) -> NDArray[np.float32]:
        """(D, 3) unit vectors over a hemisphere, so close that no lattice row slips through."""
        spacing = _PHASE_STEP / (_TURN * _MAX_ORDER)
        number = min(int(_TURN / (0.866 * spacing**2)), _MAX_DIRECTIONS)
        k = np.arange(number) + 0.5
        z = k / number
        turn = k * math.pi * (3 - math.sqrt(5))
        radius = np.sqrt(1 - z * z)
        xyz = np.stack([radius * np.cos(turn), radius * np.sin(turn), z], axis=1)
        return xyz.astype(np.float32)

    @cached_property
    def turned(self) -> FloatArray:
        """(A, 2, 3) the two other axes, turned about the sought one by A angles."""
        others = np.delete(self.basis_A, self.axis, axis=0)
        along = self.basis_A[self.axis] / np.linalg.norm(self.basis_A[self.axis])
        reach = np.linalg.norm(others, axis=1).max() * self.max_q_per_A * _MIDDLE
        turns = _TURN / self._fold
        number = max(4, math.ceil(turns / (2.0 / (_TURN * reach))))
        return others @ _about(along, turns * np.arange(number) / number).transpose(0, 2, 1)

    @property
    def _fold(self) -> int:
        """Proper rotations of the lattice about the sought axis."""
        is_proper = np.linalg.det(self.symmetry) > 0
        keeps = (self.symmetry[:, self.axis] == np.eye(3)[self.axis]).all(axis=1)
        return max(1, int((is_proper & keeps).sum()))

    @cached_property
    def has_flip(self) -> bool:
        """Whether some symmetry turns the sought axis round: then a hemisphere is enough."""
        is_proper = np.linalg.det(self.symmetry) > 0
        return bool(
            (is_proper & (self.symmetry[:, self.axis] == -np.eye(3)[self.axis]).all(1)).any()
        )

    @cached_property
    def _averaging(self) -> FloatArray:
        """(9, 9) what takes a metric, as a row of nine, to its mean over the symmetries."""
        w = self.symmetry
        return np.einsum("sij,slk->jkil", w, w).reshape(9, 9) / len(w)

    def symmetrised(self, bases: FloatArray) -> FloatArray:
        """The nearest bases (M, 3, 3) whose metric has the symmetry of the cell.

        The metric is averaged over the symmetries; the basis with that metric is then turned to
        where the given one is (Kabsch).
        """
        metric = bases @ bases.transpose(0, 2, 1)
        ideal = np.linalg.cholesky((metric.reshape(-1, 9) @ self._averaging).reshape(-1, 3, 3))
        u, _, vt = np.linalg.svd(ideal.transpose(0, 2, 1) @ bases)
        return ideal @ u @ vt  # improper where the basis is: handedness is kept

    def is_alike(self, bases: FloatArray) -> BoolArray:
        """(M,) whether the cells are the known one within the tolerances."""
        found, known = cell_parameters(bases), self.parameters
        is_long = np.abs(known[:3] / found[:, :3] - 1) <= LENGTH_TOLERANCE
        is_wide = np.abs(found[:, 3:] - known[3:]) <= ANGLE_TOLERANCE_DEG
        return np.all(np.concatenate([is_long, is_wide], axis=1), axis=1)


def cell_parameters(bases: FloatArray) -> FloatArray:
    """Lengths (Å) and angles (degrees) (M, 6) of bases (M, 3, 3)."""
    metric = bases @ bases.transpose(0, 2, 1)
    lengths = np.sqrt(np.einsum("mii->mi", metric))
    first, second = [1, 2, 0], [2, 0, 1]  # alpha is between b and c
    cosine = metric[:, first, second] / (lengths[:, first] * lengths[:, second])
    return np.concatenate([lengths, np.degrees(np.arccos(np.clip(cosine, -1, 1)))], axis=1)


def misorientation_deg(basis_A: FloatArray, true_basis_A: FloatArray, cell: KnownCell) -> float:
    """Angle of the smallest rotation between two bases of one lattice, over its symmetries."""
    alike = cell.symmetry @ true_basis_A
    u, _, vt = np.linalg.svd(alike.transpose(0, 2, 1) @ basis_A)
    rotation = u @ vt
    trace = np.einsum("sii->s", rotation)
    is_proper = np.linalg.det(rotation) > 0
    angle = np.degrees(np.arccos(np.clip((trace[is_proper] - 1) / 2, -1, 1)))
    return float(angle.min(initial=180.0))


# ------------------------------------------------------------------------------ the search


def _apart(q: FloatArray, cell: KnownCell) -> FloatArray:
    """The peaks (N', 3) that have no earlier one within a quarter of a lattice spacing.

    A streak or a flaring corner of the detector is many peaks but one piece of evidence.
    """
    pairs = KDTree(q).query_pairs(0.25 / cell.parameters[:3].max(), output_type="ndarray")
    is_first = np.linalg.norm(q, axis=1) > 0
    is_first[pairs.max(axis=1, initial=0)] = False
    return q[is_first]


def _lowest(q1: FloatArray, max_q_per_A: float, number: int) -> FloatArray:
    """The peaks (N', 4) of angles up to a limit, or a few more; at most ``number``."""
    length = np.linalg.norm(q1[:, :3], axis=1)
    order = np.argsort(length, kind="stable")
    num_below = int((length <= max_q_per_A).sum())
    return q1[order[: min(max(num_below, _MIN_PEAKS), number)]]


def _find_axes(near: FloatArray, far: FloatArray, cell: KnownCell) -> FloatArray:
    """Candidates (T, 4) of the sought axis, Å, and its offset; best first, none like another.

    Found with the peaks that are near the beam, then refined and ranked with more.
    """
    length = float(cell.parameters[cell.axis])
    turns = (_TURN * length * near[:, :3]).astype(np.float32)
    every = np.ones((1, len(near)), dtype=np.float32)
    score = np.empty((len(_LENGTHS), len(cell.directions)), dtype=np.float32)
    for first in range(0, score.shape[1], _BLOCK):
        phase = turns @ cell.directions[first : first + _BLOCK].T  # (N', block)
        for k, scale in enumerate(_LENGTHS):
            some = _coherence(phase * np.float32(scale), every)
            score[k, first : first + _BLOCK] = some[0]
    best = np.argpartition(-score.ravel(), min(_NUM_AXES, score.size - 1))[:_NUM_AXES]
    scale, place = np.divmod(best, len(cell.directions))
    axes = cell.directions[place] * (length * np.array(_LENGTHS)[scale])[:, None]
    axes = _with_offset(axes.astype(np.float64), near, np.ones(len(near)))
    for seen in (near, far, far):
        whole, away = _orders(axes[:, None], seen)
        weight = (away[0] < 0.25).astype(np.float64)
        target = ((weight * whole[0]) @ seen)[:, None]
        axes = _solve(weight, target, axes[:, None], _pairs(seen))[:, 0]
    ratio = np.linalg.norm(axes[:, :3], axis=1) / length
    score = np.cos((_TURN * (axes @ far.T)).astype(np.float32)).sum(axis=1)
    score[np.abs(ratio - 1) > 1.6 * LENGTH_TOLERANCE] = -np.inf
    order = np.argsort(-score, kind="stable")[: 4 * _NUM_LATTICES]
    axes, score = axes[order], score[order]
    t = axes[:, :3]
    square = np.einsum("ti,ti->t", t, t)
    apart = square[:, None] + square - 2 * np.abs(t @ t.T)
    is_close = apart < (_APART * length) ** 2
    is_new = ~np.triu(is_close, 1).any(axis=0) & np.isfinite(score)
    return axes[is_new][:_NUM_LATTICES]


def _turn(q1: FloatArray, axes: FloatArray, cell: KnownCell) -> FloatArray:
    """Lattices (M, 3, 4) made of an axis and the two others at the angles that fit best."""
    if not len(axes):
        return np.zeros((0, 3, 4))
    along, t = cell.basis_A[cell.axis], axes[:, :3]
    scale = np.linalg.norm(t, axis=1) / np.linalg.norm(along)
    # Few peaks tell the length of a short axis badly, and the long ones are sensitive to it: each
    # candidate is turned at the scale that it came out with, and at that of the known cell.
    axes, t = np.tile(axes, (2, 1)), np.tile(t, (2, 1))
    scale = np.concatenate([scale, np.ones_like(scale)])
    to_axis = _from_to(along / np.linalg.norm(along), t)  # (T, 3, 3)
    own = np.einsum("ni,tij->tnj", q1[:, :3], to_axis) * (_TURN * scale)[:, None, None]
    own = own.astype(np.float32)  # 2 pi q in the cell's frame, (T, N', 3)
    weight = np.maximum(np.cos(_TURN * (axes @ q1.T)), 0.0)  # (T, N')
    row = weight[:, None].astype(np.float32)
    turned = cell.turned  # (A, 2, 3)
    columns = turned.transpose(1, 2, 0).astype(np.float32)
    score = np.concatenate(  # (T, A)
        [
            sum(_coherence(own @ columns[k, :, some], row)[:, 0] for k in range(2))
            for some in (slice(a, a + _BLOCK) for a in range(0, len(turned), _BLOCK))
        ],
        axis=1,
    )
    is_peak = (score >= np.roll(score, 1, axis=1)) & (score > np.roll(score, -1, axis=1))
    score = np.where(is_peak, score, -np.inf).ravel()
    best = np.argsort(-score, kind="stable")[:_NUM_LATTICES]
    which, angle = np.divmod(best[np.isfinite(score[best])], len(turned))
    others = np.einsum("mkj,mij->mki", turned[angle], to_axis[which]) * scale[which, None, None]
    first, second = (_with_offset(others[:, k], q1, weight[which]) for k in range(2))
    return np.insert(np.stack([first, second], axis=1), cell.axis, axes[which], axis=1)


def _refine(lattices: FloatArray, q1: FloatArray, cell: KnownCell) -> FloatArray:
    """Least squares over the peaks close to each lattice, from low angles to high."""
    length = np.linalg.norm(q1[:, :3], axis=1)
    pairs = _pairs(q1)
    highest = max(float(length.max()), cell.max_q_per_A)
    for reach in (*np.linspace(cell.max_q_per_A, highest, 4), highest):
        whole, away = _orders(lattices, q1)
        weight = (away.max(axis=0) < EXPLAINED_WITHIN) & (length <= reach)
        lattices = _fit(lattices, whole, weight, q1, pairs, cell)
        if len(lattices) > _NUM_FINALISTS:
            score = (
                np.cos((_TURN * away).astype(np.float32))
                .sum(axis=0)[:, length <= reach]
                .sum(axis=1)
            )
            lattices = lattices[np.argsort(-score, kind="stable")[:_NUM_FINALISTS]]
    return lattices


def _fit(
    lattices: FloatArray,
    whole: FloatArray,
    weight: NDArray[np.floating | np.bool_],
    q: FloatArray,
    pairs: FloatArray,
    cell: KnownCell,
) -> FloatArray:
    """Lattices (M, 3, 3 or 4) whose peaks (N, 3 or 4) have these orders, of the cell's symmetry."""
    weight = weight.astype(np.float64)
    target = ((weight * whole) @ q).transpose(1, 0, 2)
    fitted = _solve(weight, target, lattices, pairs)
    fitted[:, :, :3] = cell.symmetrised(fitted[:, :, :3])
    return fitted


def _orders(lattices: FloatArray, q: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Nearest lattice point of each peak, and the distance from it: (3, M, N) each."""
    order = lattices.transpose(1, 0, 2) @ q.T
    whole = np.rint(order)
    return whole, np.abs(order - whole)


def _coherence(phase: FloatArray, weight: FloatArray) -> FloatArray:
    """How well phases (..., N, D) agree, best on 0, but also on another value.

    Args:
        phase: (..., N, D).
        weight: (..., 1, N).

    Returns:
        (..., 1, D).
    """
    cos, sin = weight @ np.cos(phase), weight @ np.sin(phase)
    return np.hypot(cos, sin) + cos


def _with_offset(axes: FloatArray, q1: FloatArray, weight: FloatArray) -> FloatArray:
    """Axes (T, 4) with the offset that makes the orders of the peaks whole on the mean."""
    phase = (_TURN * (axes @ q1[:, :3].T)).astype(np.float32)
    cos, sin = (weight * np.cos(phase)).sum(axis=-1), (weight * np.sin(phase)).sum(axis=-1)
    return np.concatenate([axes, -np.arctan2(sin, cos)[:, None] / _TURN], axis=1)


def _pairs(q: FloatArray) -> FloatArray:
    """(N, k^2) the outer products of the rows (N, k) with themselves."""
    return (q[:, :, None] * q[:, None, :]).reshape(len(q), -1)


def _solve(
    weight: FloatArray, target: FloatArray, before: FloatArray, pairs: FloatArray
) -> FloatArray:
    """Rows t (M, r, k) that make q . t whole, drawn a little towards what they were.

    The draw holds what few peaks leave open, such as the length along the beam; an offset is
    drawn to nothing.

    Args:
        weight: (M, N).
        target: (M, r, k) the weighted sums of order x q.
        before: (M, r, k).
        pairs: (N, k^2) of the q.
    """
    k = before.shape[-1]
    draw = np.array([0.0025, 0.0025, 0.0025, 0.1][:k])  # (0.1 of an order / 2 Å, / 0.3)^2
    normal = (weight @ pairs).reshape(-1, k, k) + np.diag(draw)
    right = target + draw * before * (np.arange(k) < 3)
    return np.linalg.solve(normal, right.transpose(0, 2, 1)).transpose(0, 2, 1)


# ------------------------------------------------------------------------------ the test


def significance(
    away: FloatArray, width: FloatArray | float = 1.0
) -> tuple[FloatArray, FloatArray]:
    """How unlikely so many peaks so close to a lattice are, had they lain anywhere.

    Peaks anywhere fall within t of a lattice point along an axis with probability 2 t, and along
    all three with (2 t)^3, so that their number is binomial. The best of several t counts, and
    the probability is multiplied by their number and by that of the lattices tried. For one axis,
    only the peaks count that are close along the other two: a lattice with two right axes and a
    wrong third one passes the first test but not this. Where all peaks lie within less than a
    spacing along an axis, such as those crowded around the beam, it is little wonder that they are
    close to one plane: 2 t is then divided by their width.

    Args:
        away: (3, M, N) distance of each peak from the nearest lattice point, in spacings.
        width: (3, M) of the region that the peaks cover along each axis, in spacings.

    Returns:
        Decimal logarithm of the corrected probability (M,), and of the probability of each axis
        given the other two (3, M).
    """
    width = np.broadcast_to(np.clip(width, 1e-3, 1.0), away.shape[:2])
    whole, axis = [], []
    for t in _CLOSENESS:
        chance = np.minimum(2 * t / width, 1.0)
        is_close = away < t
        all_three = is_close.all(axis=0).sum(axis=1)
        other_two = np.stack([(is_close[j - 1] & is_close[j - 2]).sum(axis=1) for j in range(3)])
        whole.append(_log10_tail(all_three, np.full_like(all_three, away.shape[2]), chance.prod(0)))
        axis.append(_log10_tail(all_three, other_two, chance))
    tried = math.log10(len(_CLOSENESS))
    return (
        np.min(whole, axis=0) + _LOG10_TRIED + tried,
        np.min(axis, axis=0) + tried,
    )


def _log10_tail(successes: IntArray, trials: IntArray, probability: FloatArray) -> FloatArray:
    """Decimal logarithm of the chance of at least so many successes (binomial)."""
    safe = np.maximum(successes, 1)
    tail = betainc(safe, np.maximum(trials - safe + 1, 1), probability)
    return np.where(successes > 0, np.log10(np.maximum(tail, 1e-300)), 0.0)


# ------------------------------------------------------------------------------ rotations


def _about(unit: FloatArray, angles: FloatArray) -> FloatArray:
    """Rotations (A, 3, 3) about a unit vector (Rodrigues)."""
    x, y, z = unit
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sin, cos = np.sin(angles)[:, None, None], np.cos(angles)[:, None, None]
    return np.eye(3) + sin * cross + (1 - cos) * (cross @ cross)


def _from_to(unit: FloatArray, targets: FloatArray) -> FloatArray:
    """Rotations (T, 3, 3) that take a unit vector to the directions of T vectors."""
    to = targets / np.linalg.norm(targets, axis=1, keepdims=True)
    half = unit + to
    is_opposite = np.linalg.norm(half, axis=1) < 1e-6
    half[is_opposite] = np.roll(np.eye(3), 1, axis=0)[int(np.argmax(np.abs(unit)))]
    half[is_opposite] -= unit * (half[is_opposite] @ unit)[:, None]
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    return 2 * half[:, :, None] * half[:, None, :] - np.eye(3)  # half a turn about the middle
