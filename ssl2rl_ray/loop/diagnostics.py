"""How good a round's pseudo labels are, how its tours moved, and whether the loop has gone wrong.

Pure functions of arrays; what is not defined is None, ready for JSON. Shape letters: N holes,
M roll-outs, U unlabelled holes. Low-CTF is the positive class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr

from envs.cryoem.rewards import switch_level
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, Switch
from ssl2rl_ray.loop.pseudo_labels import PseudoLabels
from ssl2rl_ray.perception.metrics import area_under_roc, classifier_metrics

_QUALITY = ("accuracy", "precision", "recall", "auc", "positive_share")
_SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
_LEVELS = ("patch", "square", "grid")
_COLLAPSED_SHARE = 0.05  # of either label; a choice


def label_quality(
    rule: str, labels: PseudoLabels, truth: ArrayLike, p_low_ctf: ArrayLike, rows: IntArray
) -> dict[str, Any]:
    """Pseudo labels against the truth, beside what the classifier would have said by itself.

    A rule that calls more holes low than the classifier does differs from it by that alone, so that
    the fair rival is the classifier's own order at as many low holes (``own_ranking``), over all
    cutoffs (``curve``); its own threshold (``own_threshold``) is what SSL²-RL's figures 4 c-e
    compare with. Holes that were not measured count in ``num_unlabelled``, ``num_positive`` and
    ``confidence_mean`` only.

    Args:
        rule: its name, passed on.
        labels: what the rule said.
        truth: (N,) 1 low-CTF, 0 not, NaN not measured.
        p_low_ctf: (N,) the classifier's own.
        rows: (U,) the unlabelled holes.

    Returns:
        ``rule``, ``num_unlabelled``, ``num_positive``; accuracy, precision, recall, auc and
        positive_share in ``labels``, ``own_ranking`` and ``own_threshold``; ``curve``: precision of
        the best ``share`` of the holes by the rule's score (``labels``) and by p (``own``);
        ``confidence_mean``; and, where several roll-outs voted, ``agreement_share`` of holes on
        which all agree, the accuracy of their labels and of the others' (``agreement_accuracy``,
        ``disagreement_accuracy``).
    """
    truth, p = np.asarray(truth, float), np.asarray(p_low_ctf, float)
    known = rows[np.isfinite(truth[rows])]
    y, own, score = truth[known] == 1, p[known], labels.score[known]
    is_low, is_agreed = labels.is_low[known], labels.confidence[known] == 1
    is_right, is_voted = is_low == y, labels.num_votes > 1
    by_own = np.argsort(-own, kind="stable")
    is_first = np.zeros(len(known), bool)
    is_first[by_own[: np.count_nonzero(is_low)]] = True
    return {
        "rule": rule,
        "num_unlabelled": len(rows),
        "num_positive": int(labels.is_low[rows].sum()),
        "labels": _quality(y, is_low, score),
        "own_ranking": _quality(y, is_first, own),
        "own_threshold": _quality(y, own >= 0.5, own),
        "curve": {
            "share": list(_SHARES),
            "labels": _precisions(y[np.argsort(-score, kind="stable")]),
            "own": _precisions(y[by_own]),
        },
        "confidence_mean": _mean(labels.confidence[rows]),
        "agreement_share": _mean(is_agreed) if is_voted else None,
        "agreement_accuracy": _mean(is_right[is_agreed]) if is_voted else None,
        "disagreement_accuracy": _mean(is_right[~is_agreed]) if is_voted else None,
    }


def tour_figures(
    table: HoleTable, visit_order: IntArray, is_labelled: BoolArray, num_positive: int
) -> dict[str, dict[str, float | None]]:
    """Moves by the level that they switch, and lemma 1 of SSL²-RL in numbers; means over M.

    Args:
        table: its hierarchy is read, nothing else.
        visit_order: (M, N) permutations of the rows.
        is_labelled: (N,) holes that take no pseudo label.
        num_positive: N_C, as in ``pseudo_labels.num_positive``.

    Returns:
        ``num_switches`` by ``Switch``; ``inconsistency`` and ``inconsistency_bound`` by level, of
        the labels of each roll-out by itself and of its tour of the unlabelled holes.
    """
    visit_order, is_unlabelled = np.asarray(visit_order), ~np.asarray(is_labelled, bool)
    tours = visit_order[is_unlabelled[visit_order]].reshape(len(visit_order), -1)
    is_low = np.zeros(visit_order.shape, bool)
    np.put_along_axis(is_low, tours[:, :num_positive], True, axis=1)
    switches = num_switches(table, visit_order).mean(axis=0)
    groups = {level: getattr(table, f"{level}_id") for level in _LEVELS}
    return {
        "num_switches": {switch.name.lower(): float(switches[switch]) for switch in Switch},
        "inconsistency": {
            level: _mean([inconsistency_rate(row, ids, is_unlabelled) for row in is_low])
            for level, ids in groups.items()
        },
        "inconsistency_bound": {
            level: _mean(inconsistency_bound(ids, tours)) for level, ids in groups.items()
        },
    }


def inconsistency_rate(is_low: BoolArray, group_id: IntArray, is_counted: BoolArray) -> float:
    """R_B of SSL²-RL's lemma 1: the share of groups whose holes got labels of both kinds.

    Args:
        is_low: (N,) pseudo labels.
        group_id: (N,) patch, square or grid of each hole.
        is_counted: (N,) the unlabelled holes; a group without any does not count.

    Returns:
        In [0, 1]; NaN where no hole counts.
    """
    num_holes = np.bincount(group_id, is_counted)
    num_low = np.bincount(group_id, is_counted & is_low)
    is_mixed = (num_low > 0) & (num_low < num_holes)
    num_groups = np.count_nonzero(num_holes)
    return float(is_mixed.sum() / num_groups) if num_groups else float("nan")


def inconsistency_bound(group_id: IntArray, visit_order: IntArray) -> FloatArray:
    """(M,) the largest R_B that a tour allows, whatever N_C (our reading of SSL²-RL's lemma 1).

    "The first N_C visited are low" makes at most 1 + E - G of G groups inconsistent, with E entries
    into groups: 1 + the switches at this level and above, as a move that changes the square changes
    the patch. Proof:

    1. The tour is E runs, each within one group; every group has one, so that a group with k runs
       was returned to k - 1 times, and there are E - G returns in all.
    2. A group with labels of both kinds has holes on either side of the cutoff. One run lies across
       it, at most; any other such group has a run on either side, and so a return.
    3. Hence at most 1 + (E - G) groups, and at most 1 for a tour that never returns.
    4. Holes with a true label take none. Dropped from the tour, they join runs, or remove a group
       with all its k >= 1 runs: E - G never grows; the switches of the whole tour bound it, too.
    5. Equality: the cutoff cuts a run, and every other group that is returned to has two runs, one
       on either side of it.

    Args:
        group_id: (N,) patch, square or grid of every hole.
        visit_order: (M, V) rows of the holes in the order of visit, each at most once a tour; the
            tour without the labelled holes gives the tightest bound.

    Returns:
        In [0, 1]; NaN of tours of no holes.
    """
    if not visit_order.shape[1]:
        return np.full(len(visit_order), np.nan)
    group = group_id[visit_order]
    num_entries = 1 + np.count_nonzero(np.diff(group, axis=1), axis=1)
    num_groups = np.array([len(np.unique(row)) for row in group])
    return np.minimum((1 + num_entries - num_groups) / num_groups, 1.0)


def num_switches(table: HoleTable, visit_order: IntArray) -> IntArray:
    """(M, 4) moves of each tour by ``Switch``, the highest level that they change; N - 1 in all."""

    def moves(group_id: IntArray) -> tuple[IntArray, IntArray]:
        group = group_id[visit_order]
        return group[:, :-1], group[:, 1:]

    level = switch_level(moves(table.grid_id), moves(table.square_id), moves(table.patch_id))
    return np.stack([np.count_nonzero(level == switch, axis=1) for switch in Switch], axis=1)


def is_collapsed(figures: Mapping[str, float | None], low_share: float) -> bool:
    """True where a classifier calls nearly all holes the same, and the labelled ones are mixed.

    Args:
        figures: with ``positive_share``, as of ``classifier_metrics`` on the unlabelled holes;
            pseudo labels of the N_C best cannot collapse.
        low_share: of the labelled holes.
    """
    share = figures["positive_share"]
    return bool(
        share is not None
        and np.isfinite(share)
        and not _COLLAPSED_SHARE <= share <= 1 - _COLLAPSED_SHARE
        and _COLLAPSED_SHARE <= low_share <= 1 - _COLLAPSED_SHARE
    )


def mean_entropy(p: ArrayLike) -> float | None:
    """Of predictions (N,), nats; its fall towards 0 is a sign of collapse. None of no holes."""
    return _mean(entr(np.asarray(p, float)) + entr(1 - np.asarray(p, float)))


def has_fallen(accuracies: Sequence[float], max_fall: float) -> bool:
    """True where the last round is below the best one before it by more than ``max_fall``."""
    return len(accuracies) > 1 and bool(max(accuracies[:-1]) - accuracies[-1] > max_fall)


def _quality(y: BoolArray, is_called_low: BoolArray, score: FloatArray) -> dict[str, float | None]:
    """Figures of labels, and the AUC of the score behind them."""
    figures = classifier_metrics(y, is_called_low.astype(float))
    figures["auc"] = area_under_roc(y, score)
    return {name: _or_none(figures[name]) for name in _QUALITY}


def _precisions(y: BoolArray) -> list[float | None]:
    """Low share of the first .1, .2 ... .9 of holes in order."""
    return [_mean(y[: int(share * len(y) + 0.5)]) for share in _SHARES]


def _mean(values: ArrayLike) -> float | None:
    """The mean; None of nothing."""
    values = np.asarray(values, float)
    return _or_none(float(values.mean())) if values.size else None


def _or_none(value: float) -> float | None:
    """None for NaN: JSON has none."""
    return None if np.isnan(value) else float(value)
