"""Logistic regression with random effects of grid, square and patch.

    logit P(low) = x' beta + u_grid + u_square + u_patch,    u ~ N(0, sd²)

The sds and coefficients are found where the Laplace-approximated marginal likelihood, times weak
priors, is largest (Breslow & Clayton 1993; Bates et al. 2015, section 2). The posterior precision
of the effects is a tree (patch in square in grid): eliminating patches, then squares, then grids is
exact and costs one pass over the holes.

Shape letters: n labelled holes, F fixed effects, G, S, P grids, squares, patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from envs.cryoem.types import BoolArray, FloatArray, HoleTable, RandomEffects

# A weak prior on each sd: log sd ~ N(log 0.4, 0.7²), 95 % between 0.1 and 1.6 logits. With one
# grid or few patches the data say nothing about an sd: the maximum alone falls on 0 or runs away.
LOG_SD_MEAN, LOG_SD_SD = float(np.log(0.4)), 0.7


class Tree(NamedTuple):
    """The tree of the labelled holes: parents of holes, patches and squares, and their numbers."""

    ids: tuple[np.ndarray, np.ndarray, np.ndarray]
    """(n,) each: grid, square, patch of a hole."""
    patch_square: np.ndarray
    square_grid: np.ndarray
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, table: HoleTable, rows: BoolArray) -> Tree:
        """Groups without a labelled hole stay, with no weight: they change nothing."""
        return cls(
            (table.grid_id[rows], table.square_id[rows], table.patch_id[rows]),
            table.patch_square,
            table.square_grid,
            (len(table.grid_name), len(table.square_name), len(table.patch_name)),
        )


@dataclass(frozen=True, eq=False)
class MixedLogit:
    """What ``fit_mixed_logit`` found."""

    coefficients: FloatArray
    """(F,) beta."""
    effects: RandomEffects
    log_likelihood: float
    """Laplace-approximated log marginal likelihood, nats, priors left out."""


def fit_mixed_logit(
    design: FloatArray,
    low: BoolArray,
    tree: Tree,
    *,
    prior_mean: FloatArray,
    precision: FloatArray,
    effects: RandomEffects | None = None,
) -> MixedLogit:
    """The coefficients and sds of largest posterior density.

    Args:
        design: (F, n) x, each row of the order of 1 in size (the optimiser takes no other scale).
        low: (n,) labels; n may be 0, and the priors then decide alone.
        tree: of the n holes.
        prior_mean: (F,) of beta, where the search begins.
        precision: (F, F) of beta's normal prior; rows of 0 are flat.
        effects: sds that are known; None fits them.
    """
    num_fixed = len(design)

    def unpack(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        if effects is None:
            return theta[:num_fixed], np.exp(theta[num_fixed:])
        return theta, sds_of(effects)

    def loss(theta: FloatArray) -> float:
        beta, sds = unpack(theta)
        away, log_sd = beta - prior_mean, theta[num_fixed:]
        prior = away @ precision @ away + (((log_sd - LOG_SD_MEAN) / LOG_SD_SD) ** 2).sum()
        return float(0.5 * prior - log_marginal_likelihood(beta @ design, low, tree, sds))

    num_sds = 3 if effects is None else 0
    start = np.r_[prior_mean, np.full(num_sds, LOG_SD_MEAN)]
    bounds = [(m - 30.0, m + 30.0) for m in prior_mean] + [(np.log(0.01), np.log(10.0))] * num_sds
    beta, sds = unpack(minimize(loss, start, method="L-BFGS-B", bounds=bounds).x)
    return MixedLogit(
        beta,
        RandomEffects(sd_grid=float(sds[0]), sd_square=float(sds[1]), sd_patch=float(sds[2])),
        log_marginal_likelihood(beta @ design, low, tree, sds),
    )


def sds_of(effects: RandomEffects) -> FloatArray:
    """(3,) sds of grid, square, patch."""
    return np.array([effects.sd_grid, effects.sd_square, effects.sd_patch])


def log_marginal_likelihood(
    fixed: FloatArray, low: BoolArray, tree: Tree, sds: FloatArray
) -> float:
    """Log of the integral of P(labels | u) N(u; 0, sd²) over u, by Laplace's method at the mode.

    Args:
        fixed: (n,) x' beta.
        low: (n,) labels.
        tree: of the n holes.
        sds: (3,) of grid, square, patch.
    """
    z, value, eta = _mode(fixed, low, tree, sds)
    p = expit(eta)
    _, log_determinant = _solve_tree(p * (1 - p), tree, sds, z)
    return value - 0.5 * log_determinant


def patch_moments(
    fixed: FloatArray, low: BoolArray, tree: Tree, sds: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(P,) mode and (P,) Laplace variance of u_grid + u_square + u_patch, given the labels.

    Arguments as in ``log_marginal_likelihood``. A patch without labels has what its square and grid
    tell; without any label the mode is 0 and the variance the sum of the sds' squares.
    """
    z, _, eta = _mode(fixed, low, tree, sds)
    p = expit(eta)
    parent_s, parent_g = tree.patch_square, tree.square_grid
    mode_g, mode_s, mode_p = (sd * zl for sd, zl in zip(sds, z, strict=True))
    mode = mode_p + (mode_s + mode_g[parent_g])[parent_s]
    # Eliminate leaves first; what is kept of a parent's variance passes down again.
    var_g, var_s, var_p = np.square(sds)
    w_p = np.bincount(tree.ids[2], p * (1 - p), tree.sizes[2])
    keep_p = 1 / (1 + var_p * w_p)
    w_s = np.bincount(parent_s, w_p * keep_p, tree.sizes[1])
    keep_s = 1 / (1 + var_s * w_s)
    w_g = np.bincount(parent_g, w_s * keep_s, tree.sizes[0])
    grid = var_g / (1 + var_g * w_g)
    square = var_s * keep_s + keep_s**2 * grid[parent_g]
    return mode, var_p * keep_p + keep_p**2 * square[parent_s]


def _mode(
    fixed: FloatArray, low: BoolArray, tree: Tree, sds: FloatArray
) -> tuple[Sequence[FloatArray], float, FloatArray]:
    """The mode z of the effects u = sd z, the log density there up to a constant, and (n,) logits.

    With z ~ N(0, 1): max over z of log P - z'z/2. Newton's method; the objective is concave.
    """
    sign = np.where(low, 1.0, -1.0)
    z: Sequence[FloatArray] = [np.zeros(size) for size in tree.sizes]

    def value(z: Sequence[FloatArray]) -> tuple[float, FloatArray]:
        eta = fixed + sum(sd * zl[i] for sd, zl, i in zip(sds, z, tree.ids, strict=True))
        return float(log_expit(sign * eta).sum() - 0.5 * sum((zl**2).sum() for zl in z)), eta

    best, eta = value(z)
    for _ in range(50):
        p = expit(eta)
        gradient = [
            sd * np.bincount(i, low - p, size) - zl
            for sd, i, size, zl in zip(sds, tree.ids, tree.sizes, z, strict=True)
        ]
        step, _ = _solve_tree(p * (1 - p), tree, sds, gradient)
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
    return z, best, eta


def _solve_tree(
    weight: FloatArray, tree: Tree, sds: FloatArray, right: Sequence[FloatArray]
) -> tuple[list[FloatArray], float]:
    """Solves (I + Z' W Z) z = right, and the log determinant, by eliminating leaves first.

    Z maps the effects (grid, square, patch) to holes and holds the sds; W is the (n,) weight. A
    patch meets only its square and its grid, and once patches are gone a square only its grid.
    """
    sd_g, sd_s, sd_p = sds
    num_grids, num_squares, num_patches = tree.sizes
    parent_s, parent_g = tree.patch_square, tree.square_grid
    patch_g = parent_g[parent_s]
    w_p = np.bincount(tree.ids[2], weight, num_patches)
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
