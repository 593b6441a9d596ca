"""Values of holes, taken apart by the level of the hierarchy at which they vary.

Shape letters as in ``types``: N holes. Level index: 0 grid, 1 square, 2 patch, 3 hole.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from envs.cryoem.types import FloatArray, HoleTable


def nested_components(table: HoleTable, values: FloatArray) -> FloatArray:
    """(4, N) deviations of each group's mean from that of its parent; they are orthogonal.

    Grid mean less overall mean, square less grid, patch less square, hole less patch (every mean
    over holes): ``values.mean()`` plus the sum over levels gives ``values`` back.

    Args:
        table: gives the hierarchy.
        values: (N,), finite.
    """
    means = [np.full(len(table), values.mean())]
    for ids in (table.grid_id, table.square_id, table.patch_id):
        means.append((np.bincount(ids, values) / np.bincount(ids))[ids])
    return np.diff(np.stack([*means, values]), axis=0)


def sums_of_squares(table: HoleTable, values: FloatArray) -> FloatArray:
    """(4,) of the nested ANOVA: grids, squares in grids, patches in squares, in patches.

    In the unit of ``values``, squared; divided by their sum they are the shares of the variance
    (SSL²-RL, table 3).
    """
    return (nested_components(table, values) ** 2).sum(axis=1)


def normal_scores(values: FloatArray) -> FloatArray:
    """(N,) standard normal quantile of each value's rank, (rank - 0.5) / N; ties by position."""
    rank = np.empty(len(values))
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ndtri((rank + 0.5) / len(values))
