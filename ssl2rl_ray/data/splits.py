"""Which holes train, which validate, whose labels are used, and marks that tell labels again.

Pure functions, no files.

Shape letters: N holes, S squares.
"""

from __future__ import annotations

import hashlib

import numpy as np

from envs.cryoem.types import BoolArray, HoleTable, IntArray


def split_by_square(table: HoleTable, share: float, rng: np.random.Generator) -> BoolArray:
    """Whole squares held out, so that no patch (whose holes resemble each other) is on both sides.

    Squares are taken in random order as long as they bring the number of held-out holes nearer to
    ``share`` of all; at least one is held out, at least one stays.

    Args:
        table: the session.
        share: of the holes, between 0 and 1.
        rng: consumed.

    Returns:
        (N,) True = held out.

    Raises:
        ValueError: the session has one square only.
    """
    num_squares = len(table.square_name)
    if num_squares < 2:
        raise ValueError("a split by squares needs two squares or more, the session has one")
    size = np.bincount(table.square_id, minlength=num_squares)
    target, total, held = share * len(table), 0, np.zeros(num_squares, bool)
    order = rng.permutation(num_squares)
    for square in order:
        if abs(total + size[square] - target) < abs(total - target):
            held[square], total = True, total + size[square]
    if not held.any():
        held[order[0]] = True
    if held.all():
        held[order[-1]] = False
    return held[table.square_id]


def choose_labelled(rows: IntArray, fraction: float, rng: np.random.Generator) -> IntArray:
    """The share of the rows whose labels are used, sorted; at least one where ``fraction`` > 0.

    With equal generators a smaller fraction is a subset of a larger one, so that a curve over
    fractions is paired.
    """
    order = rng.permutation(len(rows))
    count = max(round(fraction * len(rows)), int(fraction > 0 and len(rows) > 0))
    return np.sort(np.asarray(rows)[order[:count]])


def folds(rows: IntArray, num_folds: int, rng: np.random.Generator) -> list[IntArray]:
    """The rows in ``num_folds`` random parts of nearly equal size, each sorted; none for 0."""
    if num_folds == 0:
        return []
    parts = np.array_split(rng.permutation(np.asarray(rows)), num_folds)
    return [np.sort(part) for part in parts]


def marks(table: HoleTable, rows: IntArray | BoolArray) -> list[str]:
    """Name, parents and Å of each of the rows, hashed (12 hex digits).

    What two tables share tells that they hold labels of one session, also where one is a part of
    the other or was imported otherwise; the labels themselves are not given away.
    """
    columns = (
        table.grid_name[table.grid_id[rows]],
        table.square_name[table.square_id[rows]],
        table.patch_name[table.patch_id[rows]],
        table.hole_name[rows],
        table.ctf_max_resolution_A[rows],
    )
    texts = ("/".join(map(str, row)) for row in zip(*(c.tolist() for c in columns), strict=True))
    return [hashlib.blake2b(text.encode(), digest_size=6).hexdigest() for text in texts]


def label_marks(table: HoleTable) -> frozenset[str]:
    """``marks`` of every labelled hole."""
    return frozenset(marks(table, table.is_labelled))
