"""Numbers with their uncertainty: means, paired differences and seeds, each with a 95 % interval.

Pure functions of arrays. Shape letters: E episodes (or sessions), R runs (training seeds).
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
