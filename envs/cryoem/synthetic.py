"""Sessions that never were: hierarchy, predictions with realistic errors, labels, CTF values.

Predictions come from a latent quality, a nested Gaussian (grid + square + patch + hole, in normal
scores), mapped to Å by the quantiles of real predictions; that makes the two modes of real data
(ice good: near 4.5 Å, ice bad: near 10 Å), patches of one kind and mixed ones. Labels then come
from the calibrated model (``calibration``), so what a planner is told (``p_low_ctf``, the marginal)
and what it finds agree as well as they do on a real session, up to what differs from session to
session: the sds of the effects are multiplied by exp(N(0, jitter²)) each, and every hole's logit is
moved by one session bias ~ N(0, bias sd²), which the predictions do not know. On the real held-out
session a visited hole was said to be low-CTF at .94 and was so at .91: a bias of -0.4.

Sessions like SSL²-RL's Y3 go the other way round (``CtfLaw``), as of Y3 it is the CTF values that
are published: nested random effects give them the published shares of the sums of squares, and a
prediction is what a part of them shows. ``images`` draws what a camera would show.

Constants: "fitted to the Aldolase training half" (CryoRL's public data; ``tests/test_synthetic.py``
compares them with those files).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.cryoem.calibration import Calibration
from envs.cryoem.nested import nested_components, normal_scores, sums_of_squares
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, RandomEffects

_SCORES = np.linspace(-3.0, 3.0, 13)  # normal scores at which quantiles are tabulated
_CTF_SCORES = np.linspace(-2.0, 2.0, 9)

HOLE_PITCH, PATCH_GAP, SQUARE_GAP, GRID_GAP = 2.5, 1.0, 25.0, 100.0
"""µm: hole to hole (a holey film R1.2/1.3), then what is left between patches, squares, grids."""


@dataclass(frozen=True, kw_only=True)
class CtfLaw:
    """CTF values like Y3's (SSL²-RL, table 3), and how much of them a prediction tells.

    A normal score z, nested over grid, square, patch and hole, becomes
    best + (median - best) exp(spread z) Å, at most ``failed_A``.
    """

    shares: tuple[float, float, float, float] = (0.0462, 0.1471, 0.2704, 0.5363)
    """Of the sum of squares of CTF: grid, square, patch, hole. Table 3: 5393.9, 17167.2, 31570.4,
    62604. (Its degrees of freedom are numbers of units, and do not add up to its holes.)"""
    best_A: float = 2.8
    """A choice: below it no hole of the field's data lies."""
    median_A: float = 6.0
    """Half the holes are low-CTF: a choice, near the 51-54 % that SSL²-RL's precisions imply, and
    with many values near the threshold, as the paper says of Y3."""
    spread: float = 0.828
    """30 % of the holes in 5 to 7 Å, and the total sum of squares of table 3 (116 735 Å²)."""
    failed_A: float = 20.0
    """What a failed fit is set to, as in CryoRL's data."""
    predicted_fraction: float = 0.211
    """Share of each level's variance of z that a prediction tells. The better guess of low or high
    then is right for 1/2 + asin(sqrt .211) / pi = .652 of the holes, as SSL²-RL's classifier is
    with all labels (section 4)."""
    predicted_spread_A: float = 1.0
    """Å per sd of the predicted score. A choice: a regressor of noisy values keeps to their middle;
    and linear, so that the calibration's logit, linear in Å, can be right everywhere."""

    def resolution_A(self, score: FloatArray) -> FloatArray:
        """Å at a normal score, 0 = median, high = bad."""
        above = (self.median_A - self.best_A) * np.exp(self.spread * score)
        return np.minimum(self.best_A + above, self.failed_A)


@dataclass(frozen=True, kw_only=True)
class SessionPreset:
    """Everything that a session is drawn from. Ranges are inclusive and uniform."""

    num_grids: tuple[int, int]
    squares_per_grid: tuple[int, int]
    patches_per_square: tuple[int, int]
    totals: tuple[int, int, int] | None = None
    """Squares, patches, holes of every session, shared out unevenly; of the ranges, and of
    ``holes_per_patch``, the ends then are the least and the largest number."""
    holes_per_patch: tuple[int, ...] = (5, 15, 16, 17, 19, 20, 21, 22, 23, 23, 25)
    """Deciles, fitted to the Aldolase training half (60 patches, 5 to 25 holes)."""
    latent_sd: tuple[float, float, float, float] = (0.70, 0.14, 0.33, 0.60)
    """Of grid, square, patch, hole, in normal scores of the predicted Å; their squares sum to about
    1. Moment estimates of the nested ANOVA on the Aldolase training half."""
    latent_sd_jitter: float = 0.35
    """Sd of the log of a session's own grid, square and patch sds. A choice: six grids leave them
    uncertain by about as much, and the sessions of CryoRL and SSL²-RL differ by more."""
    patch_spread_jitter: float = 0.4
    """Sd of the log of a patch's own hole sd (Aldolase training half: quartiles .42, .58, .76)."""
    predicted_quantiles_A: tuple[float, ...] = (
        3.16, 3.46, 3.71, 3.95, 4.29, 4.99, 6.92, 9.54, 11.0, 12.46, 13.75, 14.45, 15.83,
    )  # fmt: skip
    """Å at normal scores -3, -2.5, ... 3: quantiles of the Aldolase training half."""
    low_ctf_quantiles_A: tuple[float, ...] = (3.16, 3.28, 3.37, 3.51, 4.08, 4.43, 5.14, 5.6, 5.9)
    """Å of low-CTF holes at normal scores -2, -1.5, ... 2, Aldolase training half."""
    high_ctf_quantiles_A: tuple[float, ...] = (
        6.2,
        6.54,
        7.25,
        8.34,
        9.5,
        11.38,
        13.92,
        17.93,
        20.0,
    )
    """Å of the others; 20 is the clip of a failed fit."""
    ctf_correlation: float = 0.45
    """Of normal scores of predicted and measured Å among holes of one label (rank: .47 and .41)."""
    calibration: Calibration
    """The model that labels are drawn from, and that gives ``p_low_ctf``."""
    effects_jitter: float = 0.35
    """Sd of the log of a session's own effect sds (grid, square, patch)."""
    session_bias_sd: float = 0.3
    """Logits."""
    ctf_law: CtfLaw | None = None
    """Not None: CTF first, predictions from what shows of it; the fields from ``latent_sd`` to
    ``predicted_quantiles_A`` then are not used, the later ones by ``redraw_labels`` only."""

    @property
    def max_shape(self) -> tuple[int, int, int, int, int]:
        """Upper bounds N, P, S, G, K of a draw: the padded shape that every session fits."""
        num_grids, per_patch = self.num_grids[1], max(self.holes_per_patch)
        if self.totals is not None:
            return self.totals[2], self.totals[1], self.totals[0], num_grids, per_patch
        num_squares = num_grids * self.squares_per_grid[1]
        num_patches = num_squares * self.patches_per_square[1]
        return num_patches * per_patch, num_patches, num_squares, num_grids, per_patch


# ``fit_calibration`` on the 1197 labelled holes of the Aldolase training half (CryoRL's data).
_ALDOLASE = Calibration(
    intercept=9.605,
    slope=-0.9996,
    clip_A=9.0,
    patch_mean_slope=-0.4674,
    effects=RandomEffects(sd_grid=0.27, sd_square=0.33, sd_patch=0.39),
    # Its content hash: on that session this calibration is in-sample, and is refused.
    fitted_on="8a2d32054bef2d03",
    num_holes=1197,
    log_likelihood=-371.95,
)

# SSL²-RL's Y3 (table 1): 9 grids, 58 squares, 771 patches, 8653 holes.
_Y3 = SessionPreset(
    num_grids=(9, 9),
    squares_per_grid=(2, 58),
    patches_per_square=(3, 771),
    totals=(58, 771, 8653),
    holes_per_patch=(1, 25),
    ctf_law=CtfLaw(),
    # what the law gives at these normal scores among low-CTF holes, and among the others
    low_ctf_quantiles_A=(3.29, 3.5, 3.8, 4.18, 4.63, 5.1, 5.51, 5.79, 5.93),
    high_ctf_quantiles_A=(6.08, 6.23, 6.58, 7.24, 8.39, 10.24, 13.08, 17.4, 20.0),
    # ``fit_calibration`` on ten drawn sessions in one table (seeds 1000 to 1009); of holes of other
    # draws it says .188, .476 and .816 in the lowest, the fifth and the highest tenth, where .182,
    # .479 and .816 are low-CTF (``tests/test_synthetic.py``).
    calibration=Calibration(
        intercept=7.431,
        slope=-1.1938,
        clip_A=9.0,
        patch_mean_slope=-0.0422,
        effects=RandomEffects(sd_grid=0.448, sd_square=0.949, sd_patch=1.180),
        fitted_on="ten drawn sessions",
        num_holes=86530,
        log_likelihood=-44949.2,
    ),
)

PRESETS: dict[str, SessionPreset] = {
    # Real: 6 grids, 9 squares, 60 patches, 1197 holes (training half); 10/16/112/2341 (held out).
    "aldolase": SessionPreset(
        num_grids=(5, 14),
        squares_per_grid=(1, 3),
        patches_per_square=(4, 10),
        calibration=_ALDOLASE,
    ),
    # About 600 holes: a demonstration trains on it in three minutes.
    "demo": SessionPreset(
        num_grids=(4, 5),
        squares_per_grid=(1, 2),
        patches_per_square=(4, 5),
        calibration=_ALDOLASE,
    ),
    # SSL²-RL's Y3; images of 64 px and of 32 px (``images``), else the same.
    "y3": _Y3,
    "y3-mini": _Y3,
}


def synthetic_calibration(preset: str | SessionPreset = "aldolase") -> Calibration:
    """The model that the preset's labels are drawn from (jitter and session bias apart)."""
    return _preset(preset).calibration


def draw_session(rng: np.random.Generator, preset: str | SessionPreset = "aldolase") -> HoleTable:
    """Draws one session; the same generator state gives the same table.

    Args:
        rng: consumed.
        preset: a name of ``PRESETS`` or one's own.

    Returns:
        A table with predicted Å, the calibrated marginal ``p_low_ctf``, CTF values drawn by the
        model (all labelled; below 6 Å where low-CTF, above elsewhere) and positions in µm. With a
        ``ctf_law`` the predictions are one regressor's; images drawn for the table show another
        view of the same CTF, equally good.

    Raises:
        ValueError: no such preset.
    """
    preset = _preset(preset)
    tree, law = _draw_tree(rng, preset), preset.ctf_law
    n, unknown = len(tree.patch_id), np.full(len(tree.patch_id), np.nan)
    predicted = unknown
    if law is None:
        predicted = np.interp(
            _draw_latent(rng, preset, tree), _SCORES, preset.predicted_quantiles_A
        )
    x, y = _draw_positions(rng, tree)
    table = HoleTable(
        hole_name=_names("hole", n),
        grid_id=tree.square_grid[tree.patch_square[tree.patch_id]],
        square_id=tree.patch_square[tree.patch_id],
        patch_id=tree.patch_id,
        grid_name=_names("grid", tree.num_grids),
        square_name=_names("square", len(tree.square_grid)),
        patch_name=_names("patch", len(tree.patch_square)),
        x=x,
        y=y,
        ctf_max_resolution_A=unknown,
        predicted_ctf_A=predicted,
        p_low_ctf=np.full(n, 0.5),
        is_labelled=np.zeros(n, bool),
    )
    calibration = preset.calibration
    if law is not None:
        table = table.replace(
            ctf_max_resolution_A=_draw_ctf(rng, table, law), is_labelled=np.ones(n, bool)
        )
        score = draw_visible_components(rng, table, law.predicted_fraction).sum(axis=0)
        predicted = law.median_A + law.predicted_spread_A * score
        return calibration.apply(table.replace(predicted_ctf_A=predicted))
    return redraw_labels(
        calibration.apply(table),
        calibration.base_logit(table),
        calibration.effects,
        rng,
        effects_jitter=preset.effects_jitter,
        session_bias_sd=preset.session_bias_sd,
        preset=preset,
    )


def redraw_labels(
    table: HoleTable,
    base_logit: FloatArray,
    effects: RandomEffects,
    rng: np.random.Generator,
    *,
    effects_jitter: float = 0.0,
    session_bias_sd: float = 0.0,
    low_ctf_threshold_A: float = 6.0,
    preset: str | SessionPreset = "aldolase",
) -> HoleTable:
    """The same holes and predictions with labels drawn again: another session that could have been.

    Args:
        table: gives the hierarchy and the predictions.
        base_logit: (N,) fixed effect, from ``Calibration.base_logit`` or ``base_logit_of(p)``.
        effects: sds of grid, square and patch effects, drawn anew, as is each hole.
        rng: consumed.
        effects_jitter: sd of the log of this draw's own sds.
        session_bias_sd: sd of one shift of all logits of this draw.
        low_ctf_threshold_A: Å; drawn values lie strictly on their side of it.
        preset: whose CTF values, given the label, are drawn (scaled by the threshold / 6 Å).

    Returns:
        The table with new ``ctf_max_resolution_A``, all labelled; ``p_low_ctf`` is as it was.
    """
    preset = _preset(preset)
    sds = np.array([effects.sd_grid, effects.sd_square, effects.sd_patch])
    sds = sds * np.exp(effects_jitter * rng.standard_normal(3))
    true_logit = base_logit + session_bias_sd * rng.standard_normal()
    for sd, ids, names in (
        (sds[0], table.grid_id, table.grid_name),
        (sds[1], table.square_id, table.square_name),
        (sds[2], table.patch_id, table.patch_name),
    ):
        true_logit = true_logit + sd * rng.standard_normal(len(names))[ids]
    is_low = rng.logistic(size=len(table)) < true_logit
    predicted = table.predicted_ctf_A
    if not np.isfinite(predicted).all():  # no regressor: the logit orders the holes as well
        predicted = -np.asarray(base_logit)
    score = _standardised(predicted, is_low)
    rho = preset.ctf_correlation
    score = rho * score + np.sqrt(1 - rho**2) * rng.standard_normal(len(table))
    ctf = np.where(
        is_low,
        np.interp(score, _CTF_SCORES, preset.low_ctf_quantiles_A),
        np.interp(score, _CTF_SCORES, preset.high_ctf_quantiles_A),
    )
    return table.replace(
        ctf_max_resolution_A=ctf * (low_ctf_threshold_A / 6.0),
        is_labelled=np.ones(len(table), bool),
    )


def draw_visible_components(
    rng: np.random.Generator, table: HoleTable, visible_fraction: float
) -> FloatArray:
    """What an image can tell of a hole's CTF, by level; high = bad.

    The normal scores of the CTF values are taken apart by level; what shows of each component c is
    sqrt(f) c + sqrt(1 - f) e, with e noise of the same level and size. So the sum has variance 1,
    and correlates with the normal scores by sqrt(f).

    Args:
        rng: consumed.
        table: with the CTF of every hole.
        visible_fraction: f in [0, 1].

    Returns:
        (4, N) components of grid, square, patch, hole.

    Raises:
        ValueError: CTF values are missing.
    """
    missing = np.isnan(table.ctf_max_resolution_A)
    if missing.any():
        raise ValueError(
            f"{missing.sum()} of {len(table)} holes have no CTF value (first "
            f"{str(table.hole_name[missing][0])!r}), from which what shows follows: give a "
            "fully measured session, or table.select(np.isfinite(table.ctf_max_resolution_A))"
        )
    c = nested_components(table, normal_scores(table.ctf_max_resolution_A))
    e = _draw_levels(rng, table)
    size = np.sqrt((c**2).mean(axis=1, keepdims=True))
    return np.sqrt(visible_fraction) * c + np.sqrt(1 - visible_fraction) * size * e


def _draw_levels(rng: np.random.Generator, table: HoleTable) -> FloatArray:
    """(4, N) a normal value per grid, square, patch and hole, at its holes; mean square 1.

    Each is less the mean of its parent, so that levels are orthogonal; a level at which every
    parent has one child is 0.
    """
    names = (table.grid_name, table.square_name, table.patch_name, table.hole_name)
    grid, square, patch, hole = (rng.standard_normal(len(level)) for level in names)
    values = (grid[table.grid_id], square[table.square_id], patch[table.patch_id], hole)
    levels = np.stack([nested_components(table, v)[i] for i, v in enumerate(values)])
    size = np.sqrt((levels**2).mean(axis=1, keepdims=True))
    return np.where(size > 1e-9, levels / np.maximum(size, 1e-9), 0.0)


def _draw_ctf(rng: np.random.Generator, table: HoleTable, law: CtfLaw) -> FloatArray:
    """(N,) Å whose nested ANOVA has the law's shares, by fixed-point iteration of the sds."""
    levels, shares = _draw_levels(rng, table), np.array(law.shares)
    sds = np.sqrt(shares)
    ctf = law.resolution_A(normal_scores(sds @ levels))
    for _ in range(60):  # ends within 1e-5 of the shares
        reached = sums_of_squares(table, ctf) / ((ctf - ctf.mean()) ** 2).sum()
        sds *= np.sqrt(np.divide(shares, reached, out=np.ones(4), where=reached > 1e-9))
        ctf = law.resolution_A(normal_scores(sds @ levels))
    # the middle one of an odd number of holes lies on the threshold: < and <= must agree
    return np.where(ctf == law.median_A, law.median_A + 1e-3, ctf)


class _Tree(NamedTuple):
    """A hierarchy without names."""

    num_grids: int
    square_grid: IntArray
    """(S,)"""
    patch_square: IntArray
    """(P,)"""
    patch_id: IntArray
    """(N,)"""


def _preset(preset: str | SessionPreset) -> SessionPreset:
    if isinstance(preset, SessionPreset):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"synthetic preset: {preset!r} is not one of {sorted(PRESETS)}")
    return PRESETS[preset]


def _draw_tree(rng: np.random.Generator, preset: SessionPreset) -> _Tree:
    """Numbers of children, top down; holes per patch by their deciles."""
    num_grids = int(rng.integers(*preset.num_grids, endpoint=True))
    if preset.totals is not None:
        num_squares, num_patches, num_holes = preset.totals
        squares = _split(rng, num_squares, num_grids, preset.squares_per_grid, 8.0)
        patches = _split(rng, num_patches, num_squares, preset.patches_per_square, 6.0)
        holes = _split(rng, num_holes, num_patches, preset.holes_per_patch, 8.0)
    else:
        squares = rng.integers(*preset.squares_per_grid, size=num_grids, endpoint=True)
        patches = rng.integers(*preset.patches_per_square, size=squares.sum(), endpoint=True)
        deciles = np.linspace(0, 1, len(preset.holes_per_patch))
        holes = np.interp(rng.random(patches.sum()), deciles, preset.holes_per_patch)
        holes = np.rint(holes).astype(np.int64)
    ids = [np.repeat(np.arange(len(counts)), counts) for counts in (squares, patches, holes)]
    return _Tree(num_grids, *ids)


def _split(
    rng: np.random.Generator, total: int, parts: int, ends: Sequence[int], concentration: float
) -> IntArray:
    """(parts,) counts between the ends that sum to ``total``, by a symmetric Dirichlet draw.

    Concentrations of 6 to 8 (relative spread about .4) are a choice: Y3's own counts per grid,
    square and patch are not published.
    """
    low, high = ends[0], ends[-1]
    if not parts * low <= total <= parts * high:
        raise ValueError(f"totals: {total} cannot be {parts} numbers from {low} to {high}")
    weights = rng.dirichlet(np.full(parts, concentration))
    counts = low + _apportion(total - parts * low, weights)
    excess = np.maximum(counts - high, 0).sum()
    counts = np.minimum(counts, high)
    return counts + _apportion(int(excess), high - counts)  # never more than there is room for


def _apportion(total: int, weights: FloatArray | IntArray) -> IntArray:
    """Whole numbers in proportion to the weights that sum to ``total``."""
    ends = np.rint(total * np.cumsum(weights) / max(weights.sum(), 1e-12)).astype(np.int64)
    return np.diff(ends, prepend=0)


def _draw_latent(rng: np.random.Generator, preset: SessionPreset, tree: _Tree) -> FloatArray:
    """(N,) quality of each hole in normal scores, high = bad."""
    sd = np.array(preset.latent_sd[:3]) * np.exp(preset.latent_sd_jitter * rng.standard_normal(3))
    grid = sd[0] * rng.standard_normal(tree.num_grids)
    square = grid[tree.square_grid] + sd[1] * rng.standard_normal(len(tree.square_grid))
    patch = square[tree.patch_square] + sd[2] * rng.standard_normal(len(tree.patch_square))
    spread = preset.latent_sd[3] * np.exp(
        preset.patch_spread_jitter * rng.standard_normal(len(patch))
    )
    noise = rng.standard_normal(len(tree.patch_id))
    return patch[tree.patch_id] + spread[tree.patch_id] * noise


def _draw_positions(rng: np.random.Generator, tree: _Tree) -> tuple[FloatArray, FloatArray]:
    """(N,) x and y in µm: square lattices of grids of squares of patches of holes."""
    sizes = np.bincount(tree.patch_id)
    side = int(np.ceil(np.sqrt(sizes.max())))
    order = rng.random((len(sizes), side * side)).argsort(axis=1)
    within = np.arange(len(tree.patch_id)) - (np.cumsum(sizes) - sizes)[tree.patch_id]
    row, column = np.divmod(order[tree.patch_id, within], side)
    x, y, pitch = column * HOLE_PITCH, row * HOLE_PITCH, side * HOLE_PITCH + PATCH_GAP
    patch_grid = tree.square_grid[tree.patch_square]
    for parent, child, gap in (
        (tree.patch_square, tree.patch_id, SQUARE_GAP),
        (tree.square_grid, tree.patch_square[tree.patch_id], GRID_GAP),
        (np.zeros(tree.num_grids, int), patch_grid[tree.patch_id], 0.0),
    ):
        counts = np.bincount(parent)
        rank = np.arange(len(parent)) - (np.cumsum(counts) - counts)[parent]
        side = int(np.ceil(np.sqrt(counts.max())))
        row, column = np.divmod(rank[child], side)
        x, y, pitch = x + column * pitch, y + row * pitch, side * pitch + gap
    return x, y


def _standardised(values: FloatArray, is_low: BoolArray) -> FloatArray:
    """Values less the mean of their label's holes, over their sd."""
    out = np.zeros(len(values))
    for label in (is_low, ~is_low):
        if label.any():
            out[label] = (values[label] - values[label].mean()) / (values[label].std() + 1e-9)
    return out


@lru_cache(maxsize=64)
def _names_up_to(prefix: str, n: int) -> NDArray[np.str_]:
    return np.array([f"{prefix}{i:05d}" for i in range(n)])


def _names(prefix: str, n: int) -> NDArray[np.str_]:
    """(n,) names; the list is kept, because making it costs more than the session's physics."""
    return _names_up_to(prefix, 1 << max(n - 1, 1).bit_length())[:n]
