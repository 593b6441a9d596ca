"""From predicted CTF resolution to the probability that a hole is low-CTF.

Mixed-effects logistic model, fitted on labelled holes and brought along to any other session:

    logit P(low) = a + b min(x, clip) + c (mean of min(x, clip) in the patch)
                   + u_grid + u_square + u_patch

with x the predicted resolution (Å) and u ~ N(0, sd²): what the holes of a group share beyond
their predictions, so that measured neighbours carry information. The form of the fixed part won
the leave-one-grid-out comparison on the Aldolase training half (CryoRL's public data): -422.5 nats
for a line in x, -411.3 with the patch mean, -389.2 with the clip, -380.4 with both
(``tests/test_calibration.py``; effects fitted too: -381.9).

The sds and slopes are found where the Laplace-approximated marginal likelihood, times weak priors,
is largest (Breslow & Clayton 1993; Bates et al. 2015, section 2). The posterior precision of the
effects is a tree (patch in square in grid): eliminating patches, then squares, then grids is exact
and costs one pass over the holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from envs.cryoem.rewards import is_low_ctf
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, NavigationConfig, RandomEffects

InputKind = Literal["predicted_ctf_A", "logit_p_low_ctf"]

PROBABILITY_FLOOR = 1e-4
"""Probabilities are held this far from 0 and 1 before a logit is taken (1/1 would be infinite)."""
# A weak prior on each sd: log sd ~ N(log 0.4, 0.7²), 95 % between 0.1 and 1.6 logits. With one
# grid or few patches the data say nothing about an sd: the maximum alone falls on 0 or runs away.
_LOG_SD_MEAN, _LOG_SD_SD = float(np.log(0.4)), 0.7
# Slopes on standardised inputs ~ N(0, 5²): no force on real data (the fitted one is near -2), but
# perfectly separated labels keep a finite slope.
_SLOPE_SD = 5.0


def uncalibrated_p(predicted_ctf_A: FloatArray) -> FloatArray:
    """CryoRL's own mapping, 1 / (1 + exp(predicted - 6 Å)); NaN where there is no prediction."""
    return expit(6.0 - np.asarray(predicted_ctf_A, dtype=np.float64))


def base_logit_of(p_low_ctf: FloatArray, effects: RandomEffects) -> FloatArray:
    """The fixed effect m whose marginal probability is ``p_low_ctf``; inverse of ``marginal_p``."""
    p = np.clip(p_low_ctf, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return logit(p) * np.sqrt(1 + np.pi / 8 * effects.variance)


def marginal_p(base_logit: FloatArray, effects: RandomEffects) -> FloatArray:
    """E[sigmoid(m + u)], u ~ N(0, v), as sigmoid(m / sqrt(1 + pi v / 8)) (MacKay 1992, eq. 10)."""
    return expit(np.asarray(base_logit) / np.sqrt(1 + np.pi / 8 * effects.variance))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted model; a plain value that is stored with a policy or a dataset."""

    intercept: float
    """a, logit."""
    slope: float
    """b, logits per Å (per logit where ``input`` is ``logit_p_low_ctf``)."""
    clip_A: float
    """Å; predictions above it are all the same. For logits: the largest magnitude."""
    patch_mean_slope: float
    """c, in the unit of ``slope``."""
    effects: RandomEffects
    fitted_on: str
    """``content_hash`` of the table it was fitted on; a name for one that was not fitted."""
    num_holes: int
    """Labelled holes it was fitted on."""
    log_likelihood: float
    """Laplace-approximated log marginal likelihood of their labels, nats, priors left out."""
    input: InputKind = "predicted_ctf_A"
    """x: the predicted Å, or the logit of ``p_low_ctf`` where a table brings only probabilities."""

    def base_logit(self, table: HoleTable) -> FloatArray:
        """(N,) the fixed effect a + b x + c mean x.

        A hole without a prediction takes its patch's mean, a patch without any the table's.
        Raises ValueError where the table has no prediction at all.
        """
        x, patch_mean = _inputs(table, self.input, self.clip_A)
        return self.intercept + self.slope * x + self.patch_mean_slope * patch_mean

    def apply(self, table: HoleTable) -> HoleTable:
        """The table with ``p_low_ctf``, the marginal probability (effects integrated out).

        With predicted Å this may be repeated without harm; with ``logit_p_low_ctf`` it reads the
        column that it replaces, and belongs to the table as imported.
        """
        return table.replace(p_low_ctf=marginal_p(self.base_logit(table), self.effects))

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Inverse of ``to_json``; raises ValueError that names unknown and missing keys."""
        values = dict(values)
        _check_keys("calibration", values, cls)
        _check_keys("calibration.effects", values["effects"], RandomEffects)
        return cls(**{**values, "effects": RandomEffects(**values["effects"])})


def fit_calibration(
    table: HoleTable,
    config: NavigationConfig,
    *,
    clip_A: float | None = None,
    is_patch_mean_used: bool = True,
    effects: RandomEffects | None = None,
) -> Calibration:
    """Fits the model on the labelled holes of a table (never the session that is evaluated).

    Args:
        table: labels count where ``is_labelled``; low-CTF follows the config's threshold.
        config: its threshold, and whether it is inclusive.
        clip_A: Å above which predictions are all the same, default 9 (5 for logits).
        is_patch_mean_used: False fixes the patch-mean slope at 0.
        effects: sds that are known; None fits them. All zero is plain logistic regression.

    Raises:
        ValueError: no labelled hole, no prediction, or labels that are all equal.
    """
    kind: InputKind = (
        "predicted_ctf_A" if np.isfinite(table.predicted_ctf_A).any() else "logit_p_low_ctf"
    )
    clip_A = (9.0 if kind == "predicted_ctf_A" else 5.0) if clip_A is None else clip_A
    x, patch_mean = _inputs(table, kind, clip_A)
    rows = table.is_labelled
    low = is_low_ctf(table.ctf_max_resolution_A[rows], config)
    if not rows.any() or low.all() or not low.any():
        found = "no labelled hole" if not rows.any() else f"{low.sum()} of {low.size} are low-CTF"
        raise ValueError(
            f"cannot calibrate: labels of both kinds are needed, {found} at "
            f"{config.low_ctf_threshold_A} Å; fit on a session with both and bring it along"
        )
    groups = _Groups.of(table, rows)
    design = np.stack([np.ones(low.size), x[rows], patch_mean[rows]])
    centre, scale = design.mean(axis=1), design.std(axis=1)
    centre[0], scale[0], scale[scale < 1e-9] = 0.0, 1.0, 1.0
    design = (design - centre[:, None]) / scale[:, None]

    def unpack(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        if effects is None:
            return theta[:3], np.exp(theta[3:])
        return theta[:3], np.array([effects.sd_grid, effects.sd_square, effects.sd_patch])

    def loss(theta: FloatArray) -> float:
        coefficients, sds = unpack(theta)
        fit = _laplace(coefficients @ design, low, groups, sds)
        prior = ((coefficients[1:] / _SLOPE_SD) ** 2).sum()
        prior += (((theta[3:] - _LOG_SD_MEAN) / _LOG_SD_SD) ** 2).sum()
        return float(0.5 * prior - fit)

    num_sds = 3 if effects is None else 0
    start = np.r_[np.zeros(3), np.full(num_sds, _LOG_SD_MEAN)]
    bounds = [(-30.0, 30.0)] * 3 + [(np.log(0.01), np.log(10.0))] * num_sds
    if not is_patch_mean_used:
        bounds[2] = (0.0, 0.0)
    coefficients, sds = unpack(minimize(loss, start, method="L-BFGS-B", bounds=bounds).x)
    slopes = coefficients / scale
    return Calibration(
        intercept=float(slopes[0] - slopes[1:] @ centre[1:]),
        slope=float(slopes[1]),
        clip_A=float(clip_A),
        patch_mean_slope=float(slopes[2]),
        effects=RandomEffects(
            sd_grid=float(sds[0]), sd_square=float(sds[1]), sd_patch=float(sds[2])
        ),
        fitted_on=table.content_hash,
        num_holes=int(low.size),
        log_likelihood=float(_laplace(coefficients @ design, low, groups, sds)),
        input=kind,
    )


def leave_one_grid_out_log_likelihood(
    table: HoleTable, config: NavigationConfig, **options: Any
) -> float:
    """Sum of log P(label) over labelled holes, each by a model fitted without its grid (nats).

    Args:
        table: at least two grids with labels.
        config: the threshold.
        options: passed on to ``fit_calibration``.
    """
    if len(table.grid_name) < 2:
        raise ValueError("leave-one-grid-out needs at least two grids; this table has one")
    total = 0.0
    for grid in range(len(table.grid_name)):
        held_out = table.select(table.grid_id == grid)
        fitted = fit_calibration(table.select(table.grid_id != grid), config, **options)
        m = fitted.base_logit(held_out) / np.sqrt(1 + np.pi / 8 * fitted.effects.variance)
        sign = np.where(is_low_ctf(held_out.ctf_max_resolution_A, config), 1.0, -1.0)
        total += float(log_expit(sign * m)[held_out.is_labelled].sum())
    return total


def _check_keys(where: str, values: dict[str, Any], cls: type) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")
    if missing := sorted(known - set(values)):
        raise ValueError(f"{where}: missing keys {missing}")


def _inputs(table: HoleTable, kind: InputKind, clip_A: float) -> tuple[FloatArray, FloatArray]:
    """(N,) x after the clip, and (N,) the mean of it over the hole's patch."""
    if kind == "predicted_ctf_A":
        x = np.minimum(table.predicted_ctf_A, clip_A)
    else:
        p = np.clip(table.p_low_ctf, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        x = np.clip(logit(p), -clip_A, clip_A)
    is_known = np.isfinite(x)
    if not is_known.any():
        raise ValueError(
            "this calibration reads predicted_ctf_A, and the table has none: import predictions"
        )
    count = np.bincount(table.patch_id[is_known], minlength=len(table.patch_name))
    total = np.bincount(table.patch_id, np.where(is_known, x, 0.0), len(table.patch_name))
    patch_mean = np.where(count > 0, total / np.maximum(count, 1), x[is_known].mean())
    patch_mean = patch_mean[table.patch_id]
    return np.where(is_known, x, patch_mean), patch_mean


class _Groups(NamedTuple):
    """The tree of the labelled holes: parents of holes, patches and squares, and their numbers."""

    ids: tuple[np.ndarray, np.ndarray, np.ndarray]
    """(n,) each: grid, square, patch of a hole."""
    patch_square: np.ndarray
    square_grid: np.ndarray
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, table: HoleTable, rows: BoolArray) -> _Groups:
        """Groups without a labelled hole stay, with no weight: they change nothing."""
        return cls(
            (table.grid_id[rows], table.square_id[rows], table.patch_id[rows]),
            table.patch_square,
            table.square_grid,
            (len(table.grid_name), len(table.square_name), len(table.patch_name)),
        )


def _laplace(fixed: FloatArray, low: BoolArray, groups: _Groups, sds: FloatArray) -> float:
    """Log of the integral of P(labels | u) N(u; 0, sd²) over u, by Laplace's method at the mode.

    With u = sd z and z ~ N(0, 1): max over z of log P - z'z/2, less half the log determinant of
    the precision there. Newton's method; the objective is concave.
    """
    sign = np.where(low, 1.0, -1.0)
    z = [np.zeros(size) for size in groups.sizes]

    def value(z: Sequence[FloatArray]) -> tuple[float, FloatArray]:
        eta = fixed + sum(sd * zl[i] for sd, zl, i in zip(sds, z, groups.ids, strict=True))
        return float(log_expit(sign * eta).sum() - 0.5 * sum((zl**2).sum() for zl in z)), eta

    best, eta = value(z)
    for _ in range(50):
        p = expit(eta)
        gradient = [
            sd * np.bincount(i, low - p, size) - zl
            for sd, i, size, zl in zip(sds, groups.ids, groups.sizes, z, strict=True)
        ]
        step, _ = _solve_tree(p * (1 - p), groups, sds, gradient)
        gain = sum(float(s @ g) for s, g in zip(step, gradient, strict=True))
        if gain < 1e-10:  # twice the rise that is left, in nats
            break
        length = 1.0
        while length > 1e-6:
            trial = [zl + length * s for zl, s in zip(z, step, strict=True)]
            trial_value, trial_eta = value(trial)
            if trial_value > best:
                break
            length /= 2
        else:
            break
        z, best, eta = trial, trial_value, trial_eta
    p = expit(eta)
    _, log_determinant = _solve_tree(p * (1 - p), groups, sds, z)
    return best - 0.5 * log_determinant


def _solve_tree(
    weight: FloatArray, groups: _Groups, sds: FloatArray, right: Sequence[FloatArray]
) -> tuple[list[FloatArray], float]:
    """Solves (I + Z' W Z) z = right, and the log determinant, by eliminating leaves first.

    Z maps the effects (grid, square, patch) to holes and holds the sds; W is the (n,) weight. A
    patch meets only its square and its grid, and once patches are gone a square only its grid.
    """
    sd_g, sd_s, sd_p = sds
    num_grids, num_squares, num_patches = groups.sizes
    parent_s, parent_g = groups.patch_square, groups.square_grid
    patch_g = parent_g[parent_s]
    w_p = np.bincount(groups.ids[2], weight, num_patches)
    w_s = np.bincount(parent_s, w_p, num_squares)
    w_g = np.bincount(parent_g, w_s, num_grids)
    pp, ps, pg = 1 + sd_p**2 * w_p, sd_p * sd_s * w_p, sd_p * sd_g * w_p
    ss = 1 + sd_s**2 * w_s - np.bincount(parent_s, ps * ps / pp, num_squares)
    sg = sd_s * sd_g * w_s - np.bincount(parent_s, ps * pg / pp, num_squares)
    gg = 1 + sd_g**2 * w_g - np.bincount(patch_g, pg * pg / pp, num_grids)
    gg -= np.bincount(parent_g, sg * sg / ss, num_grids)
    r_g, r_s, r_p = right
    r_s = r_s - np.bincount(parent_s, ps * r_p / pp, num_squares)
    r_g = r_g - np.bincount(patch_g, pg * r_p / pp, num_grids)
    r_g = r_g - np.bincount(parent_g, sg * r_s / ss, num_grids)
    z_g = r_g / gg
    z_s = (r_s - sg * z_g[parent_g]) / ss
    z_p = (r_p - ps * z_s[parent_s] - pg * z_g[patch_g]) / pp
    return [z_g, z_s, z_p], float(np.log(pp).sum() + np.log(ss).sum() + np.log(gg).sum())
