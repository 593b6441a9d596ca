"""Numbers with their uncertainty: means, paired differences and seeds, each with a 95 % interval.

Pure functions of arrays. Shape letters: E episodes (or sessions), R and S runs (training seeds),
B resamples, P looks at a run, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from envs.cryoem.types import FloatArray


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A sample in one line; ``sd`` and ``ci95`` are NaN where one value cannot tell."""

    mean: float
    sd: float
    """Of the sample (n - 1)."""
    ci95: tuple[float, float]
    """Student's t interval of the mean."""
    values: tuple[float, ...]

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval: the number behind ±."""
        return (self.ci95[1] - self.ci95[0]) / 2

    def as_json(self) -> dict[str, Any]:
        """The four fields; NaN becomes null."""
        return {
            "mean": or_none(self.mean),
            "sd": or_none(self.sd),
            "ci95": [or_none(bound) for bound in self.ci95],
            "values": [or_none(value) for value in self.values],
        }


def or_none(value: float) -> float | None:
    """A finite number, or None: JSON knows no NaN."""
    return float(value) if np.isfinite(value) else None


def summarize(values: ArrayLike) -> Summary:
    """Mean, sd and 95 % t interval of (E,) values.

    Raises:
        ValueError: no values, or more than one dimension.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(
            f"a summary needs at least one value in one dimension, found shape {x.shape}"
        )
    mean = float(x.mean())
    sd = float(x.std(ddof=1)) if x.size > 1 else float("nan")
    half = float(stdtrit(x.size - 1, 0.975)) * sd / np.sqrt(x.size) if x.size > 1 else float("nan")
    return Summary(mean=mean, sd=sd, ci95=(mean - half, mean + half), values=tuple(x.tolist()))


def paired_difference(ours: ArrayLike, theirs: ArrayLike) -> Summary:
    """Summary of ``ours - theirs``, (E,) each, played on the same sessions from the same starts.

    Raises:
        ValueError: the two do not pair up.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"paired values must match one to one, found shapes {a.shape} and {b.shape}"
        )
    return summarize(a - b)


def bootstrap_ci95(
    values: ArrayLike,
    rng: np.random.Generator,
    statistic: Callable[..., FloatArray] = np.mean,
    num_resamples: int = 10_000,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of a statistic that takes ``axis``.

    For what has no t interval, such as a median or a share. Raises ValueError on no values.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"a bootstrap needs at least one value in one dimension, found {x.shape}")
    resampled = statistic(x[rng.integers(0, x.size, (num_resamples, x.size))], axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def over_runs(values: Sequence[ArrayLike]) -> Summary:
    """Summary over R training seeds: the unit is the run, its episodes are averaged first.

    Episodes of one run share its weights; counting them as independent would make any recipe look
    certain. ``values`` holds the means of the runs.
    """
    return summarize([np.mean(np.asarray(run, dtype=np.float64)) for run in values])


# ---- few runs: what they tell about an algorithm -------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic of several runs and its 95 % percentile bootstrap interval."""

    value: float
    ci95: tuple[float, float]
    """NaN where a stratum has a single run: it cannot tell how far runs spread."""

    def as_json(self) -> dict[str, Any]:
        """Both fields; NaN becomes null."""
        return {"value": or_none(self.value), "ci95": [or_none(bound) for bound in self.ci95]}


def interquartile_mean(values: ArrayLike, axis: int = -1) -> FloatArray:
    """Mean of the middle half along an axis: n // 4 values are cut off at each end.

    More robust than the mean, less wasteful than the median (Agarwal et al. 2021,
    arXiv:2108.13264, section 4.3). Below four values nothing is cut: it is the mean.
    """
    x = np.sort(np.moveaxis(np.asarray(values, dtype=np.float64), axis, -1), axis=-1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(axis=-1)


def estimate(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    statistic: Callable[..., FloatArray] = interquartile_mean,
    num_resamples: int = 10_000,
) -> Estimate:
    """A statistic of all runs together, with its stratified bootstrap interval.

    Args:
        strata: (R,) scores of the runs of each task; runs are drawn again within their own task
            (Agarwal et al. 2021, section 4.1). One task = the plain bootstrap.
        rng: of the resamples.
        statistic: takes ``axis``, such as ``np.mean`` or ``interquartile_mean``.
        num_resamples: B.

    Raises:
        ValueError: no task, a task without a run, or more than one dimension.
    """
    tasks = _strata(strata)
    value = float(statistic(np.concatenate(tasks), axis=0))
    return Estimate(
        value=value, ci95=_percentiles(tasks, _resampled(tasks, rng, statistic, num_resamples))
    )


def difference(
    ours: Sequence[ArrayLike],
    theirs: Sequence[ArrayLike],
    rng: np.random.Generator,
    statistic: Callable[..., FloatArray] = interquartile_mean,
    num_resamples: int = 10_000,
) -> Estimate:
    """The statistic of ``ours`` minus that of ``theirs``; both are resampled, unpaired.

    Arguments and errors as ``estimate``; the two have the same tasks in the same order.
    """
    a, b = _pair_of_strata(ours, theirs)
    value = float(statistic(np.concatenate(a), axis=0) - statistic(np.concatenate(b), axis=0))
    resampled = _resampled(a, rng, statistic, num_resamples)
    resampled = resampled - _resampled(b, rng, statistic, num_resamples)
    return Estimate(value=value, ci95=_percentiles([*a, *b], resampled))


def probability_of_improvement(
    ours: Sequence[ArrayLike],
    theirs: Sequence[ArrayLike],
    rng: np.random.Generator,
    num_resamples: int = 10_000,
) -> Estimate:
    """P(X > Y) + P(X = Y) / 2 for a run X of ``ours`` and Y of ``theirs``, averaged over tasks.

    The Mann-Whitney statistic over the number of pairs (Agarwal et al. 2021, section 4.3), with a
    stratified bootstrap of both sides. Samples that do not overlap give 0 or 1 with an interval
    of no width: that is a limit of the bootstrap, not certainty.

    Arguments and errors as ``difference``.
    """
    a, b = _pair_of_strata(ours, theirs)
    value, resampled = 0.0, np.zeros(num_resamples)
    for x, y in zip(a, b, strict=True):
        wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)  # (R, S)
        value += float(wins.mean()) / len(a)
        # how often each run is drawn is all that a resample is: (B, R) shares against (B, S)
        shares_x, shares_y = (
            rng.multinomial(len(z), np.full(len(z), 1 / len(z)), num_resamples) / len(z)
            for z in (x, y)
        )
        resampled += ((shares_x @ wins) * shares_y).sum(axis=1) / len(a)
    return Estimate(value=value, ci95=_percentiles([*a, *b], resampled))


def _strata(strata: Sequence[ArrayLike]) -> list[FloatArray]:
    tasks: list[FloatArray] = [np.asarray(values, dtype=np.float64) for values in strata]
    if not tasks or any(x.ndim != 1 or x.size == 0 for x in tasks):
        raise ValueError(
            "expected the scores of at least one run of each task, in one dimension, found "
            f"shapes {[x.shape for x in tasks]}"
        )
    return tasks


def _pair_of_strata(
    ours: Sequence[ArrayLike], theirs: Sequence[ArrayLike]
) -> tuple[list[FloatArray], list[FloatArray]]:
    a, b = _strata(ours), _strata(theirs)
    if len(a) != len(b):
        raise ValueError(f"both sides need the same tasks, found {len(a)} and {len(b)}")
    return a, b


def _resampled(
    tasks: Sequence[FloatArray],
    rng: np.random.Generator,
    statistic: Callable[..., FloatArray],
    num_resamples: int,
) -> FloatArray:
    """(B,) statistics of runs drawn with replacement within each task."""
    drawn = [x[rng.integers(0, x.size, (num_resamples, x.size))] for x in tasks]
    return statistic(np.concatenate(drawn, axis=1), axis=1)


def _percentiles(tasks: Sequence[FloatArray], resampled: FloatArray) -> tuple[float, float]:
    if min(x.size for x in tasks) < 2:
        return (float("nan"), float("nan"))
    # order statistics, not between them: a statistic may be infinite (a threshold never reached)
    low, high = np.quantile(resampled, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


# ---- learning curves -----------------------------------------------------------------------------
# A run is looked at now and then: at x (P,) ascending it scored y (P,). Between looks the last
# observation stands.

_MAX_NUMBERS = 5_000_000


def last_observed(x: ArrayLike, y: ArrayLike, at: ArrayLike) -> FloatArray:
    """(G,) y at the last x up to each of ``at`` (G,); NaN before the first."""
    x, y = _curve(x, y)
    found = np.searchsorted(x, np.asarray(at, dtype=np.float64), side="right") - 1
    return np.where(found >= 0, y[np.maximum(found, 0)], np.nan)


def area_under(x: ArrayLike, y: ArrayLike, low: float, high: float) -> float:
    """Mean height of the curve from ``low`` to ``high``; NaN before its first point or of no width.

    The area divided by the width, so that it has the unit of y.
    """
    x, y = _curve(x, y)
    if not x[0] <= low < high:
        return float("nan")
    edges = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    return float(last_observed(x, y, edges[:-1]) @ np.diff(edges) / (high - low))


def first_reached(x: ArrayLike, y: ArrayLike, threshold: float) -> float:
    """The first x at which y is at least ``threshold``; infinity where it never is."""
    x, y = _curve(x, y)
    is_there = y >= threshold
    return float(x[np.argmax(is_there)]) if is_there.any() else float("inf")


def curve_over_runs(
    curves: Sequence[tuple[ArrayLike, ArrayLike]],
    at: ArrayLike,
    rng: np.random.Generator,
    statistic: Callable[..., FloatArray] = interquartile_mean,
    num_resamples: int = 1_000,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """A statistic over R runs at each of ``at`` (G,), by their last observations.

    Returns:
        (G,) statistic, and the ends of its pointwise 95 % bootstrap interval, NaN for one run.
        The same runs are drawn at every point, so that a band belongs to curves.

    Raises:
        ValueError: no run, or a run whose x and y do not go together.
    """
    if not curves:
        raise ValueError("a curve needs at least one run")
    observed = np.stack([last_observed(x, y, at) for x, y in curves])  # (R, G)
    value = statistic(observed, axis=0)
    num_runs = len(curves)
    if num_runs < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    drawn = rng.integers(0, num_runs, (num_resamples, num_runs))  # (B, R)
    width = max(1, _MAX_NUMBERS // drawn.size)  # points at once: (B, R, G) may be too large
    low, high = np.concatenate(
        [
            np.quantile(
                statistic(observed[:, i : i + width][drawn], axis=1), (0.025, 0.975), axis=0
            )
            for i in range(0, observed.shape[1], width)
        ],
        axis=1,
    )
    return value, low, high


def _curve(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0 or (np.diff(a) < 0).any():
        raise ValueError(
            f"a curve needs ascending x and as many y, found shapes {a.shape} and {b.shape}"
        )
    return a, b
