"""P(low-CTF) of every hole from the classifier's logit, its neighbours' logits, and known labels.

    logit P(low) = a + b_within x_within + b_patch x_patch + b_square x_square + b_grid x_grid
                     + u_grid + u_square + u_patch,                        u ~ N(0, sd²)

The logit x of a hole is split by the hierarchy: the mean of its grid, what the mean of its square
is above that, of its patch above that, and the hole above its patch; the means are over all holes,
labelled or not. A mean of many holes knows its group better than one hole knows itself, so the
parts deserve their own slopes. The u are what the images do not show; known labels of neighbours
reveal them (kriging, in the language of geology; BLUP in that of animal breeding: Robinson 1991,
https://doi.org/10.1214/ss/1177011926). Fitted by ``envs.cryoem.mixed_logit``.

Whoever fits sees to it that the logits of labelled holes are *cross-fitted*: from classifiers that
were not trained on those labels. A classifier's logits on its own training holes are too good, and
the slopes learned from them too steep everywhere else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit
from scipy.special import logit as logit_of

from envs.cryoem.calibration import PROBABILITY_FLOOR, check_keys, marginal_p
from envs.cryoem.mixed_logit import (
    LOG_SD_MEAN,
    Tree,
    fit_mixed_logit,
    patch_moments,
    sds_of,
)
from envs.cryoem.nested import nested_components
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, RandomEffects

_CLIP = float(logit_of(1 - PROBABILITY_FLOOR))  # 9.2: a network may be surer; nothing follows
# Without labels the classifier is taken at its word: the prior means give its own p back, the
# marginal's shrinkage by the prior's sds included.
_PRIOR_SLOPE = float(np.sqrt(1 + np.pi / 8 * 3 * np.exp(2 * LOG_SD_MEAN)))
# The intercept, at the table's mean logit, ~ N(as above, 2²): finite where all labels are of one
# kind. The slopes share a part ~ N(as above, (unit / 2)²); those of patch, square and grid share
# another ~ N(0, (unit / 2)²), for a mean has less of a classifier's noise, of whatever it is a
# mean; the rest is N(0, (unit / 10)²) each. The unit is 1 or, of a timid classifier, the slope that
# makes its logits' sd 1.
_INTERCEPT_SD, _SHARED_SD, _MEANS_SD, _OWN_SD, _LARGEST_UNIT = 2.0, 0.5, 0.5, 0.1, 100.0
_PRIOR_COVARIANCE = np.zeros((5, 5))  # of intercept, within, patch, square, grid; slopes per unit
_PRIOR_COVARIANCE[0, 0] = _INTERCEPT_SD**2
_PRIOR_COVARIANCE[1:, 1:] += _SHARED_SD**2 + _OWN_SD**2 * np.eye(4)
_PRIOR_COVARIANCE[2:, 2:] += _MEANS_SD**2


@dataclass(frozen=True, kw_only=True)
class HierarchicalPosterior:
    """A fitted model; a plain value that is stored with a classifier."""

    intercept: float
    """a, logit."""
    slope_within: float
    """b_within: of a hole's logit above its patch's mean."""
    slope_patch: float
    """b_patch: of the patch's mean logit above its square's."""
    slope_square: float
    """b_square: of the square's mean logit above its grid's."""
    slope_grid: float
    """b_grid: of the grid's mean logit."""
    effects: RandomEffects
    """Sds of u, logits; ``envs.cryoem.belief`` goes on from here as a session brings labels."""
    fitted_on: str
    """``content_hash`` of the table it was fitted on."""
    num_labelled: int
    """Labelled holes it was fitted on; 0: the priors, which give the classifier's own p back."""
    log_likelihood: float
    """Laplace-approximated log marginal likelihood of their labels, nats, priors left out."""

    def base_logit(self, table: HoleTable, logit: ArrayLike) -> FloatArray:
        """(N,) the fixed part, without u.

        ``marginal_p(base_logit, effects)`` is what is said before any label is known, and what a
        table's ``p_low_ctf`` should be where a policy does the updating itself.

        Args:
            table: its hierarchy is used, nothing else.
            logit: (N,) of the classifier; NaN where a hole has no image (it takes its patch's mean,
                a patch without any its square's, and so on).

        Raises:
            ValueError: not one logit a hole, or none at all.
        """
        slopes = (self.slope_within, self.slope_patch, self.slope_square, self.slope_grid)
        return self.intercept + np.array(slopes) @ logit_parts(table, logit)

    def predict(
        self,
        table: HoleTable,
        logit: ArrayLike,
        is_low: ArrayLike | None = None,
        is_known: ArrayLike | None = None,
        *,
        is_own_label_used: bool = False,
    ) -> FloatArray:
        """(N,) P(low), effects integrated out given the known labels; of any session.

        A hole's own label does not enter its own p: known holes get the leave-one-out value, in the
        linear-response form of Laplace's approximation (Vehtari et al. 2016, section 3.4,
        https://jmlr.org/papers/v17/14-540.html). The slopes and sds do not leave it out: where this
        is the session of the fit, a label's share in them is 1 of ``num_labelled`` (simulated: AUC
        of known holes above that of others by .005 with 400 labels or more, .02 with 100).

        Args:
            table: the session; its hierarchy is used, nothing else.
            logit: (N,) as in ``base_logit``.
            is_low: (N,) labels, read only where known.
            is_known: (N,) holes whose labels may be used; both None: the marginal.
            is_own_label_used: True lets a known hole's label pull its own p as any neighbour's.

        Raises:
            ValueError: an argument has not one value a hole, or labels come without ``is_known``.
        """
        base = self.base_logit(table, logit)
        if is_low is None and is_known is None:
            return marginal_p(base, self.effects)
        low, known = _labels(table, is_low, is_known)
        tree = Tree.of(table, known)
        shift, variance = patch_moments(base[known], low[known], tree, sds_of(self.effects))
        eta, variance = base + shift[table.patch_id], variance[table.patch_id]
        if not is_own_label_used:
            p = expit(eta[known])
            # Without the label the variance is v / (1 - v w), and the mode moves by its gradient.
            left_out = variance[known] / (1 - variance[known] * p * (1 - p))
            eta[known] -= left_out * (low[known] - p)
            variance[known] = left_out
        return expit(eta / np.sqrt(1 + np.pi / 8 * variance))

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Inverse of ``to_json``; raises ValueError that names unknown and missing keys."""
        check_keys("posterior", values, cls)
        check_keys("posterior.effects", values["effects"], RandomEffects)
        return cls(**{**values, "effects": RandomEffects(**values["effects"])})


def fit_posterior(
    table: HoleTable, logit: ArrayLike, is_low: ArrayLike, is_known: ArrayLike
) -> HierarchicalPosterior:
    """Fits slopes and sds on the known labels of a table.

    Priors keep it finite for few labels, labels of one kind, or none (it then gives the
    classifier's p back); with a few hundred labels they hardly count.

    Args:
        table: its hierarchy is used, nothing else.
        logit: (N,) of the classifier, calibrated or not; cross-fitted where known (see above); NaN
            where a hole has no image.
        is_low: (N,) labels, read only where known.
        is_known: (N,) holes whose labels may be used.

    Raises:
        ValueError: an argument has not one value a hole, or no hole has a logit.
    """
    parts = logit_parts(table, logit)
    low, known = _labels(table, is_low, is_known)
    x = parts.sum(axis=0)
    centre = x.mean()
    unit = min(max(1.0, 1 / max(float(x.std()), 1e-9)), _LARGEST_UNIT)
    parts[3] -= centre
    fitted = fit_mixed_logit(
        np.vstack([np.ones(len(table)), unit * parts])[:, known],
        low[known],
        Tree.of(table, known),
        prior_mean=_PRIOR_SLOPE * np.array([centre, *[1 / unit] * 4]),
        precision=np.linalg.inv(_PRIOR_COVARIANCE),
    )
    within, patch, square, grid = (float(slope) for slope in unit * fitted.coefficients[1:])
    return HierarchicalPosterior(
        intercept=float(fitted.coefficients[0]) - grid * float(centre),
        slope_within=within,
        slope_patch=patch,
        slope_square=square,
        slope_grid=grid,
        effects=fitted.effects,
        fitted_on=table.content_hash,
        num_labelled=int(known.sum()),
        log_likelihood=fitted.log_likelihood,
    )


def logit_parts(table: HoleTable, logit: ArrayLike) -> FloatArray:
    """(4, N) the logit split into within-patch, patch, square and grid parts, which sum to it.

    Args:
        table: its hierarchy is used, nothing else.
        logit: (N,) of a classifier; NaN as in ``HierarchicalPosterior.base_logit``.

    Raises:
        ValueError: not one logit a hole, or none at all.
    """
    x = np.clip(np.asarray(logit, dtype=np.float64), -_CLIP, _CLIP)
    if x.shape != (len(table),):
        raise ValueError(f"logit: one a hole, found shape {x.shape} for {len(table)} holes")
    if np.isnan(x).all():
        raise ValueError("logit: NaN for every hole; the posterior needs a classifier's logits")
    for ids in (table.patch_id, table.square_id, table.grid_id, np.zeros_like(table.grid_id)):
        has_logit = np.isfinite(x)
        count = np.bincount(ids, has_logit)[ids]
        total = np.bincount(ids, np.where(has_logit, x, 0.0))[ids]
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        x = np.where(has_logit, x, mean)
    grid, square, patch, within = nested_components(table, x)
    return np.stack([within, patch, square, grid + x.mean()])


def _labels(
    table: HoleTable, is_low: ArrayLike | None, is_known: ArrayLike | None
) -> tuple[BoolArray, BoolArray]:
    """Both as (N,) bool."""
    out = []
    for name, values in (("is_low", is_low), ("is_known", is_known)):
        array = np.asarray(values)
        if array.shape != (len(table),):
            raise ValueError(
                f"{name}: one a hole, found shape {array.shape} for {len(table)} holes; labels and "
                "which of them are known come together"
            )
        out.append(array.astype(bool))
    return out[0], out[1]
