"""How good the probabilities of a binary classifier are, and the temperature that repairs them.

Pure functions of ``is_low`` (N,), the truth, and ``p`` (N,) in [0, 1], P(low-CTF) as it was said;
low-CTF is the positive class. A figure that is not defined for the labels at hand (of one class
only, or none) is NaN, never a warning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import root_scalar
from scipy.special import expit

from envs.cryoem.types import BoolArray, FloatArray, IntArray

_P_FLOOR = 1e-7
"""Log loss holds p this far from 0 and 1: float32 knows nothing closer to 1."""
_TEMPERATURES = (0.05, 20.0)


def classifier_metrics(is_low: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """All figures of one set of predictions, by name, ready for a log.

    - ``num_holes``
    - ``low_share`` of the truth, ``positive_share`` of the predictions (p >= .5): the two drift
      apart where a classifier collapses.
    - ``accuracy``, ``precision``, ``recall``, ``f1`` at p >= .5. Precision is NaN where no hole is
      called low, recall where none is.
    - ``accuracy_at_median``: the half with the larger p is called low, so that the positive share
      is the same for every classifier; ties (and the middle one of an odd number) count in part.
    - ``auc``: P(p of a low-CTF hole > p of another one), ties count half; NaN for one class.
    - ``ece``: see ``expected_calibration_error``.
    - ``log_loss`` (nats a hole) and ``brier``, mean (p - is_low)².

    Raises:
        ValueError: shapes differ or have more than one dimension; p is NaN or outside [0, 1].
    """
    y, p = _checked(is_low, p)
    n = len(y)
    (true_high, false_low), (false_high, true_low) = confusion(y, p)
    clipped = np.clip(p, _P_FLOOR, 1 - _P_FLOOR)
    return {
        "num_holes": float(n),
        "low_share": _ratio(true_low + false_high, n),
        "positive_share": _ratio(true_low + false_low, n),
        "accuracy": _ratio(true_low + true_high, n),
        "accuracy_at_median": _accuracy_at_median(y, p),
        "precision": _ratio(true_low, true_low + false_low),
        "recall": _ratio(true_low, true_low + false_high),
        "f1": _ratio(2 * true_low, 2 * true_low + false_low + false_high),
        "auc": area_under_roc(y, p),
        "ece": expected_calibration_error(y, p),
        "log_loss": _ratio(-np.log(np.where(y, clipped, 1 - clipped)).sum(), n),
        "brier": _ratio(((p - y) ** 2).sum(), n),
    }


def confusion(is_low: ArrayLike, p: ArrayLike) -> IntArray:
    """(2, 2) counts: row = truth (high, low), column = called so at p >= .5 (high, low).

    Raises ValueError as ``classifier_metrics``.
    """
    y, p = _checked(is_low, p)
    return np.bincount(2 * y + (p >= 0.5), minlength=4).reshape(2, 2)


def area_under_roc(is_low: ArrayLike, score: ArrayLike) -> float:
    """AUC by ranks (Mann-Whitney U over the number of pairs); any finite or infinite score.

    NaN where the labels are of one class only. Raises ValueError where a score is NaN.
    """
    y, score = _checked(is_low, score, is_probability=False)
    num_low, num_high = int(y.sum()), int((~y).sum())
    if not num_low or not num_high:
        return float("nan")
    _, group, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # ties share the mean of theirs
    rank_sum = rank[group][y].sum()
    return float((rank_sum - num_low * (num_low + 1) / 2) / (num_low * num_high))


def expected_calibration_error(is_low: ArrayLike, p: ArrayLike, num_bins: int = 15) -> float:
    """ECE = sum over bins of (holes in it / N) |accuracy - mean confidence|.

    Guo et al. 2017, eq. 3 (https://arxiv.org/abs/1706.04599): confidence is the probability of the
    predicted class, max(p, 1 - p), in ``num_bins`` bins of equal width ((m-1)/M, m/M] on [0, 1]; of
    two classes, only those above 1/2 hold anything. NaN for no holes.
    """
    y, p = _checked(is_low, p)
    confidence, is_right = np.maximum(p, 1 - p), (p >= 0.5) == y
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    # Counts cancel: (n_b / N) |right_b / n_b - confidence_b / n_b|.
    gap = np.bincount(bins, is_right - confidence, num_bins)
    return _ratio(np.abs(gap).sum(), len(y))


@dataclass(frozen=True, eq=False)
class Reliability:
    """Said against found, in bins of p of equal width; B bins."""

    mean_p: FloatArray
    """(B,) mean of p; NaN where the bin is empty."""
    low_share: FloatArray
    """(B,) share of low-CTF holes; NaN where the bin is empty."""
    count: IntArray
    """(B,) holes."""


def reliability(is_low: ArrayLike, p: ArrayLike, num_bins: int = 10) -> Reliability:
    """What was said of P(low-CTF) and what was found, in bins [b/B, (b+1)/B); the last holds 1.

    Unlike ECE, bins are of P(low-CTF) itself, not of the predicted class.
    """
    y, p = _checked(is_low, p)
    bins = np.minimum((p * num_bins).astype(int), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    num_holes = np.where(count > 0, count, np.nan)
    return Reliability(
        mean_p=np.bincount(bins, p, num_bins) / num_holes,
        low_share=np.bincount(bins, y, num_bins) / num_holes,
        count=count,
    )


def fit_temperature(logit: ArrayLike, is_low: ArrayLike) -> float:
    """T of the least log loss of sigmoid(logit / T), within [0.05, 20].

    Temperature scaling (Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599), with a
    prior worth about one label: beta = 1/T ~ Gamma(2, 1), whose mode is 1. The sum over labels of
    log(1 + exp(-beta z)) plus beta - log beta is convex in beta and has its least value inside
    (0, inf), so that separable labels do not send T to 0, and no labels leave it at 1.

    There is no intercept (Platt scaling has one): one parameter cannot change which holes are
    called low, nor their order, and a few dozen held-out labels fix it. Where the share of low-CTF
    holes is off, ``posterior`` is the remedy: its intercept has a prior.

    Args:
        logit: (N,) finite, of holes that the classifier was not trained on.
        is_low: (N,) their labels.

    Raises:
        ValueError: shapes differ, or a logit is not finite.
    """
    y, z = _checked(is_low, logit, is_probability=False)
    if not np.isfinite(z).all():
        raise ValueError(f"logit: row {np.flatnonzero(~np.isfinite(z))[0]} is not finite")
    z = np.where(y, z, -z)

    def slope(beta: float) -> float:
        return float(1 - 1 / beta - (z * expit(-beta * z)).sum())

    low, high = 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]
    if slope(low) >= 0:
        return _TEMPERATURES[1]
    if slope(high) <= 0:
        return _TEMPERATURES[0]
    return 1 / root_scalar(slope, bracket=(low, high), xtol=1e-10).root


def _checked(
    is_low: ArrayLike, p: ArrayLike, *, is_probability: bool = True
) -> tuple[BoolArray, FloatArray]:
    """Both as arrays of bool and float64."""
    y, p = np.asarray(is_low, dtype=bool), np.asarray(p, dtype=np.float64)
    if y.shape != p.shape or y.ndim != 1:
        raise ValueError(f"labels and predictions: one of each a hole, found {y.shape}, {p.shape}")
    wrong = ~((p >= 0) & (p <= 1)) if is_probability else np.isnan(p)
    if wrong.any():
        row = np.flatnonzero(wrong)[0]
        what = "p: a number in [0, 1] a hole" if is_probability else "score: a number a hole"
        raise ValueError(f"{what}, found {p[row]} in row {row} ({wrong.sum()} rows)")
    return y, p


def _accuracy_at_median(is_low: BoolArray, p: FloatArray) -> float:
    """Accuracy where the N/2 largest p are called low; ties share what is left of the half."""
    value, group = np.unique(-p, return_inverse=True)
    count = np.bincount(group, minlength=len(value))
    before = np.cumsum(count) - count
    share = np.clip((len(p) / 2 - before) / np.maximum(count, 1), 0, 1)[group]
    return _ratio(np.where(is_low, share, 1 - share).sum(), len(p))


def _ratio(part: float, whole: float) -> float:
    """A quotient; NaN of nothing."""
    return float(part / whole) if whole else float("nan")
