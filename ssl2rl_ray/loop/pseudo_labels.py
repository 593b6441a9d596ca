"""Pseudo labels: from what is known of the unlabelled holes to a label and a confidence each.

A rule is a function from ``Evidence`` to a ``Score``, whose M rows are M opinions. Every row calls
its N_C best unlabelled holes low-CTF, the majority of the rows is the label, and the share of the
rows that agree with it is the confidence (SSL²-RL, section 3 and Algorithm 1, where the opinions
are M roll-outs and the score is how early a hole was visited). Labelled holes never count.

Confidence is what the trainer draws pseudo-labelled holes in proportion to. M roll-outs of one
deterministic policy agree on nearly every hole whatever their starts, and it then says nothing:
diversify them. Shape letters: N holes, U unlabelled holes, M rows, L labelled holes, W weightings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.special import logit as logit_of

from envs.cryoem.calibration import PROBABILITY_FLOOR
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """All that a rule may look at: the N holes of the squares that are trained on."""

    table: HoleTable
    """Its hierarchy is read, nothing else."""
    p_low_ctf: FloatArray
    """(N,) the classifier's P(low), of the hole's image alone. ``smooth`` weighs it against its
    neighbours on the labelled holes: there it should be cross-fitted, as for the posterior, or it
    looks better than it is and nothing is smoothed."""
    is_low: BoolArray
    """(N,) labels, read only where labelled."""
    is_labelled: BoolArray
    """(N,)"""
    visit_order: IntArray | None = None
    """(M, N) rows of the table in the order of visit, every hole once in every roll-out."""
    value: FloatArray | None = None
    """(M, N) by row of the table: what the policy thought the visit worth when it made it; NaN
    where it did not choose it (the start, exploration)."""
    p_posterior: FloatArray | None = None
    """(N,) P(low) of the whole system, neighbours and labels included."""
    truth: FloatArray | None = None
    """(N,) 1 low-CTF, 0 not, NaN not measured; read by the rule ``truth`` alone."""

    def __post_init__(self) -> None:
        """Raises ValueError where an array has not one value a hole, or a p is no probability."""
        n = len(self.table)
        for name in ("p_low_ctf", "is_low", "is_labelled", "p_posterior", "truth"):
            array = getattr(self, name)
            if array is not None and np.shape(array) != (n,):
                raise ValueError(f"{name}: {np.shape(array)} for {n} holes; one value a hole")
        for name in ("visit_order", "value"):
            array = getattr(self, name)
            if array is not None and (np.ndim(array) != 2 or np.shape(array)[1] != n):
                raise ValueError(f"{name}: {np.shape(array)}; expected (roll-outs, {n} holes)")
        for name in ("p_low_ctf", "p_posterior"):
            p = getattr(self, name)
            if p is not None and (wrong := np.flatnonzero(~((p >= 0) & (p <= 1)))).size:
                raise ValueError(
                    f"{name}: row {wrong[0]} is {p[wrong[0]]}, outside [0, 1] ({wrong.size} rows)"
                )


class Score(NamedTuple):
    """What a rule says."""

    value: FloatArray
    """(M, N) higher = more probably low-CTF; NaN = no opinion. Rows are compared by their order."""
    is_probability: bool = False
    """One row, of P(low): it gives the confidence, too."""
    threshold: float | None = None
    """Holes from here on are called low; None: the N_C best of each row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PseudoLabels:
    """Meaningful at the unlabelled holes only."""

    is_low: BoolArray
    """(N,) False where labelled."""
    confidence: FloatArray
    """(N,) in [0, 1]: the share of the rows that agree with the label (at least 1/2) or, of one row
    of probabilities, P(right) - P(wrong), 0 or more: the part of a noisy label's gradient that does
    not cancel on average. 0 where labelled, and where the rule has no opinion."""
    score: FloatArray
    """(N,) in [0, 1]: mean over rows of the share of the other unlabelled holes that come after
    this one (1 = always the first); 1/2 where the rule has no opinion, NaN where labelled."""
    num_votes: int
    """M, the rows that voted."""


def pseudo_labels(
    rule: str, evidence: Evidence, positive_cutoff: float | None = None
) -> PseudoLabels | None:
    """The labels that a rule gives to the unlabelled holes; None of the rule ``none``.

    Equal scores of a row are taken in the order of the table. A row that has no opinion on some
    holes calls the same share of the others low, and does not vote on those. Where as many rows are
    for a label as against it (M even), the hole is low if its mean rank is among the N_C, and the
    confidence is 1/2; to count it as high would leave fewer than N_C.

    Args:
        rule: a name of ``RULES``.
        evidence: what is known.
        positive_cutoff: see ``num_positive``; not read by ``self``, ``truth`` and ``none``.

    Raises:
        ValueError: no such rule, or the evidence lacks what the rule reads.
    """
    if rule not in RULES:
        raise ValueError(f"rule: {rule!r} is not one of {tuple(RULES)}")
    score = RULES[rule](evidence)
    if score is None:
        return None
    rows = np.flatnonzero(~np.asarray(evidence.is_labelled, bool))
    value = np.asarray(score.value)[:, rows]
    is_said = ~np.isnan(value)
    num_said = is_said.sum(axis=1, keepdims=True)  # (M, 1)
    rank = _rank(value)
    if score.threshold is None:
        share = num_positive(evidence, positive_cutoff) / max(len(rows), 1)
        votes = rank < np.floor(share * num_said + 0.5)
    else:
        votes = value >= score.threshold
    num_opinions = is_said.sum(axis=0)  # (U,)

    def mean(values: NDArray) -> FloatArray:
        return np.where(is_said, values, 0).sum(axis=0) / np.maximum(num_opinions, 1)

    for_low = mean(votes)
    mean_place = mean((rank + 0.5) / np.maximum(num_said, 1))  # in (0, 1)
    is_among_first = mean_place < votes.sum() / max(num_said.sum(), 1) - 1e-9
    is_low = (for_low > 0.5) | ((for_low == 0.5) & is_among_first)
    confidence = np.maximum(for_low, 1 - for_low)
    if score.is_probability:
        confidence = np.clip(np.where(is_low, 2 * value[0] - 1, 1 - 2 * value[0]), 0, 1)
    after = 1 - mean(rank / np.maximum(num_said - 1, 1))
    n, has_opinion = len(evidence.table), num_opinions > 0
    return PseudoLabels(
        is_low=_spread(is_low, rows, n, False),
        confidence=_spread(np.where(has_opinion, confidence, 0.0), rows, n, 0.0),
        score=_spread(np.where(has_opinion, after, 0.5), rows, n, np.nan),
        num_votes=len(value),
    )


def num_positive(evidence: Evidence, positive_cutoff: float | None = None) -> int:
    """N_C, how many unlabelled holes each row calls low: a share of them, rounded.

    Args:
        evidence: its labels are read where there are any.
        positive_cutoff: the share, in [0, 1]; None: the low share of the labelled holes.

    Raises:
        ValueError: a share outside [0, 1], or none and no labelled hole to take it from.
    """
    is_labelled = np.asarray(evidence.is_labelled, bool)
    share = positive_cutoff
    if share is None:
        if not is_labelled.any():
            raise ValueError(
                "positive_cutoff: its default is the low share of the labelled holes, and none is "
                "labelled; set it"
            )
        share = float(np.asarray(evidence.is_low, bool)[is_labelled].mean())
    if not 0 <= share <= 1:
        raise ValueError(f"positive_cutoff: a share of the unlabelled holes, found {share}")
    return int(np.floor(share * np.count_nonzero(~is_labelled) + 0.5))


def _visit_order(evidence: Evidence) -> Score:
    """SSL²-RL, Algorithm 1: the earlier a policy goes to a hole, the better it thinks of it."""
    order = evidence.visit_order
    if order is None:
        raise ValueError("rule visit-order needs roll-outs over all holes: visit_order is None")
    n = len(evidence.table)
    order = np.asarray(order, np.int64)
    if order.min() < 0 or order.max() >= n:
        raise ValueError(f"visit_order: rows of the table, 0 to {n - 1}; found others")
    position = np.full(order.shape, np.nan)
    np.put_along_axis(position, order, np.arange(float(n))[None], axis=1)
    if (missing := np.argwhere(np.isnan(position))).size:
        raise ValueError(
            f"visit_order: roll-out {missing[0][0]} never visits row {missing[0][1]} "
            f"({len(missing)} holes missed in all); roll out until every hole is visited"
        )
    return Score(-position)


def _self(evidence: Evidence) -> Score:
    """What the classifier says at its own threshold: iterative FixMatch's labels."""
    return Score(np.asarray(evidence.p_low_ctf)[None], is_probability=True, threshold=0.5)


def _ranking(evidence: Evidence) -> Score:
    """The classifier's own order: the control of ``visit-order`` at equal N_C."""
    return Score(np.asarray(evidence.p_low_ctf)[None], is_probability=True)


def _smooth(evidence: Evidence) -> Score:
    """The classifier's logit, averaged with the mean logits of its patch and of its square.

    Of every weighting the labels of the labelled holes are regressed on the mean (logistic, with an
    intercept); the least leave-one-out log loss chooses, and "own only" comes first, so that
    without labels nothing is smoothed.
    """
    table, is_labelled = evidence.table, np.asarray(evidence.is_labelled, bool)
    p = np.clip(evidence.p_low_ctf, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    own = logit_of(p)
    parts = np.stack([own, _group_mean(own, table.patch_id), _group_mean(own, table.square_id)])
    low = np.asarray(evidence.is_low, bool)[is_labelled].astype(float)
    coefficients, loss = _fit_logistic(_WEIGHTINGS @ parts[:, is_labelled], low)
    best = int(np.argmin(loss))
    intercept, slope = coefficients[best]
    return Score(expit(intercept + slope * (_WEIGHTINGS[best] @ parts))[None], is_probability=True)


def _posterior(evidence: Evidence) -> Score:
    """Classifier, neighbours and known labels together (``perception.posterior``)."""
    if evidence.p_posterior is None:
        raise ValueError("rule posterior needs the hierarchical posterior: p_posterior is None")
    return Score(np.asarray(evidence.p_posterior)[None], is_probability=True)


def _q_values(evidence: Evidence) -> Score:
    """What the policy expected when it went there (a suggestion of SSL²-RL for later work)."""
    if evidence.value is None:
        raise ValueError("rule q-values needs roll-outs of a policy with values: value is None")
    if np.isnan(evidence.value).all():
        raise ValueError("rule q-values: value is NaN throughout; roll out a policy with values")
    return Score(np.asarray(evidence.value))


def _truth(evidence: Evidence) -> Score:
    """The bound that no method can pass: what was measured; no opinion where nothing was."""
    if evidence.truth is None:
        raise ValueError("rule truth needs measured labels: truth is None")
    return Score(np.asarray(evidence.truth, float)[None], is_probability=True, threshold=0.5)


def _none(evidence: Evidence) -> None:
    """No pseudo labels: the control that goes on training on the labelled holes alone."""


RULES: dict[str, Callable[[Evidence], Score | None]] = {
    "visit-order": _visit_order,
    "self": _self,
    "ranking": _ranking,
    "smooth": _smooth,
    "posterior": _posterior,
    "q-values": _q_values,
    "truth": _truth,
    "none": _none,
}

# (W, 3): own, patch, square in fifths that sum to 1, own at least 1/5; own only comes first.
_WEIGHTINGS: FloatArray = (
    np.array(
        [(own, patch, 5 - own - patch) for own in range(5, 0, -1) for patch in range(6 - own)],
        dtype=float,
    )
    / 5
)
_PRIOR_PRECISION = np.eye(2)  # intercept ~ N(0, 1), slope ~ N(1, 1): the classifier at its word
_MAX_STEPS = 50


def _fit_logistic(x: FloatArray, low: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Logistic regressions of one set of labels on each of W inputs.

    Steps by the upper bound 1/4 of p (1 - p): the posterior never falls, whatever the labels
    (Böhning and Lindsay 1988, https://doi.org/10.1007/BF00049423). A label is left out of its own
    loss in the linear-response form that ``perception.posterior`` uses, too.

    Args:
        x: (W, L).
        low: (L,) labels, 1 or 0.

    Returns:
        (W, 2) intercept and slope, and (W,) the leave-one-out log loss, nats a label (0 of none).
    """
    design = np.stack([np.ones_like(x), x], axis=-1)  # (W, L, 2)
    transposed = design.swapaxes(1, 2)
    step = np.linalg.inv(transposed @ design / 4 + _PRIOR_PRECISION)
    prior = np.array([0.0, 1.0])
    coefficients = np.tile(prior, (len(x), 1))
    for _ in range(_MAX_STEPS):
        p = expit((design @ coefficients[..., None])[..., 0])
        slope = (transposed @ (low - p)[..., None])[..., 0]
        slope -= (coefficients - prior) @ _PRIOR_PRECISION
        move = (step @ slope[..., None])[..., 0]
        coefficients += move
        if np.abs(move).max() < 1e-6:
            break
    eta = (design @ coefficients[..., None])[..., 0]
    p = expit(eta)
    weight = p * (1 - p)
    covariance = np.linalg.inv((transposed * weight[:, None]) @ design + _PRIOR_PRECISION)
    variance = ((design @ covariance) * design).sum(axis=-1)
    eta -= variance / (1 - variance * weight) * (low - p)
    loss = np.logaddexp(0, np.where(low == 1, -eta, eta)).sum(axis=1) / max(len(low), 1)
    return coefficients, loss


def _group_mean(values: FloatArray, group_id: IntArray) -> FloatArray:
    """(N,) mean of each hole's group, itself included."""
    return (np.bincount(group_id, values) / np.bincount(group_id))[group_id]


def _rank(value: FloatArray) -> IntArray:
    """(M, U) 0 = the highest of its row; equal ones in the order of the table, NaN last."""
    order = np.argsort(-value, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(value.shape[1])[None], axis=1)
    return rank


def _spread(values: NDArray, rows: IntArray, n: int, elsewhere: float | bool) -> NDArray:
    """(N,) the values at their rows."""
    out = np.full(n, elsewhere, dtype=values.dtype)
    out[rows] = values
    return out
