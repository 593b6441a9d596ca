"""The classifier of sessions that bring predictions and no images: a logistic head on their logit.

    logit P(low) = a + b_within x_within + b_patch x_patch + b_square x_square + b_grid x_grid

x is the logit that the session brings (CryoRL's mapping of predicted Å, or that of ``p_low_ctf``),
split by the hierarchy as in ``perception.posterior``, but without random effects: neighbours'
labels are the posterior's business, as with images. ``loop.head`` fits the coefficients. Shape
letter: N holes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from scipy.special import logit

from envs.cryoem.calibration import uncalibrated_p
from envs.cryoem.types import FloatArray, HoleTable
from ssl2rl_ray.perception.posterior import logit_parts

_LARGEST_LOGIT = 5.0
_LARGEST_CTF_A = 9.0  # as in ``envs.cryoem.calibration``: worse predictions are all the same


@dataclass(frozen=True, eq=False)
class Head:
    """What ``perception.classifier.Classifier`` is to images; a plain value."""

    coefficients: FloatArray
    """(5,) a, b_within, b_patch, b_square, b_grid."""

    def logits(self, table: HoleTable) -> FloatArray:
        """(N,) logit of P(low-CTF); NaN without a prediction."""
        x = given_logit(table)
        return np.where(np.isfinite(x), self.coefficients @ design_of(table, x), np.nan)

    def describe(self) -> dict[str, Any]:
        """What ``model.json`` says of it, which is all that there is."""
        return {"network": "head", "coefficients": self.coefficients.tolist()}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Self:
        """Inverse of ``describe``; raises KeyError, TypeError or ValueError where it is damaged."""
        coefficients = np.array(description["coefficients"], float).reshape(5)
        if not np.isfinite(coefficients).all():
            raise ValueError("a coefficient is not finite")
        return cls(coefficients)


def given_logit(table: HoleTable) -> FloatArray:
    """(N,) x, the logit of the predictions that a table brings; NaN without one.

    CryoRL's mapping 6 - Å (at most 9 Å) where there is any predicted Å, else the logit of
    ``p_low_ctf``, held within 5. Probabilities that are all 0.5 are those of a table without
    predictions.
    """
    predicted = table.predicted_ctf_A
    if np.isfinite(predicted).any():
        return logit(uncalibrated_p(np.minimum(predicted, _LARGEST_CTF_A)))
    if (table.p_low_ctf == 0.5).all():
        return np.full(len(table), np.nan)
    with np.errstate(divide="ignore"):  # of p exactly 0 or 1
        return np.clip(logit(table.p_low_ctf), -_LARGEST_LOGIT, _LARGEST_LOGIT)


def design_of(table: HoleTable, x: FloatArray) -> FloatArray:
    """(5, N) ones and the parts of x within patch, of patch, square and grid."""
    return np.vstack([np.ones(len(table)), logit_parts(table, x)])
