"""Several sessions side by side: padded arrays, so that one numpy step moves every episode.

Shape letters as in ``types``: T sessions, N holes, P patches, S squares, G grids, K holes of the
largest patch; E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from envs.cryoem.rewards import outcome, visit_value
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray, NavigationConfig

Observation = dict[str, np.ndarray]
"""The compact observation of E episodes: all that a policy may know beside the predictions.

``visited`` (E, ceil(N/8)) uint8, bits in little order as ``numpy.packbits`` makes them; padding is
never visited, so the holes that are left are ``~visited & (patch_id >= 0)``;
``recent`` (E, num_past_steps) int32, the holes visited last, [:, 0] the current one, -1 = none;
``elapsed_min`` (E, 1) float32; ``session`` (E, 1) int32, the row of the stack.
"""


class Policy(Protocol):
    """What planners, trained policies and exported artefacts have in common."""

    name: str

    def act(self, observation: Observation, rng: np.random.Generator) -> IntArray:
        """(E,) the next hole of each episode, an unvisited one.

        An outcome may be read only where visited.
        """
        ...


class StackShape(NamedTuple):
    """The padded sizes of a stack."""

    num_holes: int
    num_patches: int
    num_squares: int
    num_grids: int
    num_slots: int
    """K, holes of the largest patch."""

    @classmethod
    def of(cls, table: HoleTable) -> Self:
        """The sizes of one session."""
        return cls(
            len(table),
            len(table.patch_name),
            len(table.square_name),
            len(table.grid_name),
            int(np.bincount(table.patch_id).max()),
        )

    def union(self, *others: StackShape) -> StackShape:
        """The smallest shape that holds all of them."""
        return StackShape(*map(max, zip(self, *others, strict=True)))

    def holds(self, other: StackShape) -> bool:
        """True where a session of that shape fits."""
        return all(mine >= its for mine, its in zip(self, other, strict=True))


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
    """(T, N) float32: 1 low-CTF, 0 high, p where not labelled, ``rewards.outcome``; padding 0."""
    value: FloatArray
    """(T, N) float64: fraction of ``reward[switch]`` earned, ``rewards.visit_value``; padding 0."""
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
    table_hash: np.ndarray
    """(T,) str: ``HoleTable.content_hash``."""

    @property
    def shape(self) -> StackShape:
        """The padded sizes."""
        _, p, k = self.slot_hole.shape
        n, s = self.p_low_ctf.shape[1], self.square_grid.shape[1]
        return StackShape(n, p, s, self.num_grids, k)

    @classmethod
    def of(
        cls,
        tables: Sequence[HoleTable],
        config: NavigationConfig,
        *,
        at_least: StackShape | None = None,
    ) -> Self:
        """Stacks tables, padded to the largest (or to ``at_least``); outcomes follow the config.

        Raises ValueError where there is no table.
        """
        if not tables:
            raise ValueError("no sessions: at least one hole table is needed")
        shapes = [StackShape.of(table) for table in tables]
        n, p, s, g, k = (at_least or shapes[0]).union(*shapes)
        shape = (len(tables), n)
        stack = cls(
            num_holes=np.array([len(t) for t in tables], np.int32),
            grid_id=np.full(shape, -1, np.int32),
            square_id=np.full(shape, -1, np.int32),
            patch_id=np.full(shape, -1, np.int32),
            p_low_ctf=np.zeros(shape, np.float32),
            outcome=np.zeros(shape, np.float32),
            value=np.zeros(shape),
            ctf_A=np.full(shape, np.nan, np.float32),
            slot_hole=np.full((len(tables), p, k), -1, np.int32),
            patch_square=np.full((len(tables), p), s - 1, np.int32),
            square_grid=np.full((len(tables), s), g - 1, np.int32),
            num_grids=g,
            table_hash=np.full(len(tables), "", "U16"),
        )
        for row, table in enumerate(tables):
            stack.put(row, table, config)
        return stack

    def put(self, row: int, table: HoleTable, config: NavigationConfig) -> None:
        """Writes one session into a row, for an env that draws sessions afresh.

        Raises ValueError if the session is larger than the stack's padded shape.
        """
        n = len(table)
        needed = StackShape.of(table)
        if not self.shape.holds(needed):
            raise ValueError(
                f"session of {needed} does not fit a stack of {self.shape}: "
                "stack it together with the larger sessions, or name its shape in at_least"
            )
        sizes = np.bincount(table.patch_id)
        self.num_holes[row] = n
        self.table_hash[row] = table.content_hash
        for name, padding in (
            ("grid_id", -1),
            ("square_id", -1),
            ("patch_id", -1),
            ("p_low_ctf", 0),
        ):
            column = getattr(self, name)
            column[row, :n], column[row, n:] = getattr(table, name), padding
        self.outcome[row, :n], self.outcome[row, n:] = outcome(table, config), 0
        self.value[row, :n], self.value[row, n:] = visit_value(table, config), 0
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
