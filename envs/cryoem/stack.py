"""Several sessions side by side: padded arrays, so that one numpy step moves every episode.

Shape letters as in ``types``: T sessions, N holes, P patches, S squares, G grids, K holes of the
largest patch; E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from envs.cryoem.rewards import is_low_ctf, outcome
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, NavigationConfig

Observation = dict[str, np.ndarray]
"""The compact observation of E episodes (what a policy may know, besides the sessions' predictions).

``visited`` (E, ceil(N/8)) uint8, bits in little order as ``numpy.packbits`` makes them;
``recent`` (E, num_past_steps) int32, the holes visited last, [:, 0] the current one, -1 = none;
``elapsed_min`` (E, 1) float32; ``session`` (E, 1) int32, the row of the stack.
"""


class Policy(Protocol):
    """What planners, trained policies and exported artefacts have in common."""

    name: str

    def act(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E,) the next hole of each episode, an unvisited one; an outcome may be read only where visited."""
        ...


@dataclass(frozen=True, eq=False)
class SessionStack:
    """T sessions as padded arrays; build it with ``of``. A slot is a place in (P, K)."""

    num_holes: IntArray
    """(T,)"""
    grid_id: IntArray
    """(T, N) int32, padding -1; ``square_id`` and ``patch_id`` alike."""
    square_id: IntArray
    patch_id: IntArray
    p_low_ctf: FloatArray
    """(T, N) float32, padding 0."""
    outcome: FloatArray
    """(T, N) float32: reward value of a visit, ``rewards.outcome``; padding 0."""
    ctf_A: FloatArray
    """(T, N) float32, Å, NaN = unknown; padding NaN."""
    slot_hole: IntArray
    """(T, P, K) int32: the holes of each patch, best prediction first (ties by row); padding -1."""
    patch_square: IntArray
    """(T, P) int32; padding: S - 1 of the padded shape (its slots are empty)."""
    square_grid: IntArray
    """(T, S) int32; padding: G - 1 of the padded shape."""
    num_grids: int
    """G of the padded shape."""

    @classmethod
    def of(cls, tables: Sequence[HoleTable], config: NavigationConfig) -> Self:
        """Stacks tables; the outcome of each hole follows the config's threshold."""
        if not tables:
            raise ValueError("no sessions: at least one hole table is needed")
        n = max(len(t) for t in tables)
        p = max(len(t.patch_name) for t in tables)
        s = max(len(t.square_name) for t in tables)
        g = max(len(t.grid_name) for t in tables)
        k = max(int(np.bincount(t.patch_id).max()) for t in tables)
        shape = (len(tables), n)
        stack = cls(
            num_holes=np.array([len(t) for t in tables], np.int32),
            grid_id=np.full(shape, -1, np.int32),
            square_id=np.full(shape, -1, np.int32),
            patch_id=np.full(shape, -1, np.int32),
            p_low_ctf=np.zeros(shape, np.float32),
            outcome=np.zeros(shape, np.float32),
            ctf_A=np.full(shape, np.nan, np.float32),
            slot_hole=np.full((len(tables), p, k), -1, np.int32),
            patch_square=np.full((len(tables), p), s - 1, np.int32),
            square_grid=np.full((len(tables), s), g - 1, np.int32),
            num_grids=g,
        )
        for row, table in enumerate(tables):
            stack.put(row, table, config)
        return stack

    def put(self, row: int, table: HoleTable, config: NavigationConfig) -> None:
        """Writes one session into a row, for an env that draws sessions afresh.

        Raises ValueError if the session is larger than the stack's padded shape.
        """
        n = len(table)
        t, p, k = self.slot_hole.shape
        sizes = np.bincount(table.patch_id)
        if (
            n > self.p_low_ctf.shape[1]
            or len(sizes) > p
            or sizes.max() > k
            or (
                len(table.square_name) > self.square_grid.shape[1]
                or len(table.grid_name) > self.num_grids
            )
        ):
            raise ValueError(
                f"session of {n} holes, {len(sizes)} patches of up to {sizes.max()} does not fit a stack of "
                f"{self.p_low_ctf.shape[1]} holes, {p} patches of up to {k}: stack it with the larger sessions"
            )
        self.num_holes[row] = n
        for name, padding in (
            ("grid_id", -1),
            ("square_id", -1),
            ("patch_id", -1),
            ("p_low_ctf", 0),
        ):
            column = getattr(self, name)
            column[row, :n], column[row, n:] = getattr(table, name), padding
        self.outcome[row, :n], self.outcome[row, n:] = outcome(table, config), 0
        self.ctf_A[row, :n], self.ctf_A[row, n:] = table.ctf_max_resolution_A, np.nan
        order = np.lexsort((np.arange(n), -self.p_low_ctf[row, :n], table.patch_id))
        start = np.cumsum(sizes) - sizes
        self.slot_hole[row] = -1
        patch = table.patch_id[order]
        self.slot_hole[row, patch, np.arange(n) - start[patch]] = order
        self.patch_square[row] = self.square_grid.shape[1] - 1
        self.patch_square[row, : len(sizes)] = table.patch_square
        self.square_grid[row] = self.num_grids - 1
        self.square_grid[row, : len(table.square_name)] = table.square_grid


def unpack_visited(observation: Observation, num_holes: int) -> BoolArray:
    """(E, N) bool from the packed bits of an observation."""
    return np.unpackbits(
        observation["visited"], axis=-1, count=num_holes, bitorder="little"
    ).astype(bool)


__all__ = ["Observation", "Policy", "SessionStack", "is_low_ctf", "unpack_visited"]
