"""From compact observations to what a per-hole network needs, on the device (torch alone).

Shape letters: B batch, T sessions, N holes, P patches, S squares, G grids, K past steps, C cells,
F features of a step, D group columns of a step (F without the hole's own). All but the prediction
p is common to a patch's unvisited holes, so features are built once per patch, and unvisited holes
of one patch with equal p share one row: a *cell*. ``envs.cryoem.features`` is the reference;
rows of visited holes are never built, because they cannot be chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from envs.cryoem.features import GROUP_SCALE, NUM_FEATURES
from envs.cryoem.stack import SessionStack
from envs.cryoem.types import NavigationConfig

P_STEP = 0.01
"""Under ``paper`` the hole's own p is rounded to multiples of this (the sums over groups are not):
predictions that close are the same choice, and cells become fewer. ``cryorl`` is exact."""


@dataclass(frozen=True, eq=False)
class Expanded:
    """What one batch of compact observations expands to; made without gradient."""

    group: Tensor
    """(B, P, K D) float32, oldest step first: what all unvisited holes of a patch share."""
    session: Tensor
    """(B,) int64."""
    visited: tuple[Tensor, Tensor]
    """(V,) int64 each: the batch rows and holes of all visits."""


class Expander(nn.Module):
    """Static tables of a stack of sessions and the sums over what was visited.

    The tables are non-persistent buffers: weights that were trained on one stack load into a
    network on any other. ``table_hash`` says whose tables they are.
    """

    def __init__(
        self, stack: SessionStack, config: NavigationConfig, *, p_step: float | None = None
    ) -> None:
        """Takes the tables; ``p_step`` 0 = exact, None = as the feature set has it.

        Raises ValueError for a feature set without features per hole.
        """
        super().__init__()
        if config.feature_set not in NUM_FEATURES:
            raise ValueError(f"feature_set {config.feature_set!r} has no features per hole")
        self.table_hash = tuple(str(h) for h in stack.table_hash)
        self.is_cryorl = config.feature_set == "cryorl"
        self.num_past_steps = config.num_past_steps
        self.p_step = (0.0 if self.is_cryorl else P_STEP) if p_step is None else p_step
        self.num_features = NUM_FEATURES[config.feature_set]
        shape = stack.shape
        num_sessions = len(stack.num_holes)
        session = np.arange(num_sessions)[:, None]
        is_hole = stack.patch_id >= 0
        own_p = np.where(is_hole, stack.p_low_ctf, 0).astype(np.float32)
        if self.p_step:
            own_p = (np.round(own_p / self.p_step) * self.p_step).astype(np.float32)
        patch = np.where(is_hole, stack.patch_id, shape.num_patches - 1).astype(np.int64)
        hole_cell, cell_patch, cell_p = _cells(patch, own_p, is_hole)
        in_patch = np.zeros((2, num_sessions, shape.num_patches), np.float64)
        for sums, weight in zip(in_patch, (is_hole, stack.p_low_ctf * is_hole), strict=True):
            np.add.at(sums, (np.broadcast_to(session, patch.shape), patch), weight)
        slot = stack.slot_hole.astype(np.int64)
        tables = {
            "is_hole": is_hole,
            "own_p": own_p,
            "p": np.where(is_hole, stack.p_low_ctf, 0).astype(np.float32),
            "outcome": np.where(is_hole, stack.outcome, 0).astype(np.float32),
            "patch": patch,
            "square_of_patch": stack.patch_square.astype(np.int64),
            "grid_of_patch": stack.square_grid[session, stack.patch_square].astype(np.int64),
            "num_in_patch": in_patch[0].astype(np.float32),
            "p_in_patch": in_patch[1].astype(np.float32),
            "hole_cell": hole_cell,
            "cell_patch": cell_patch,
            "cell_p": cell_p,
            "slot": np.maximum(slot, 0),
            "is_slot": slot >= 0,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(table)), False)
        self.num_groups = (shape.num_patches, shape.num_squares, shape.num_grids)

    @property
    def own_columns(self) -> list[int]:
        """The K columns of the stacked features that hold the hole's own p."""
        return [step * self.num_features for step in range(self.num_past_steps)]

    @property
    def group_columns(self) -> list[int]:
        """The K D columns that a patch shares; ``visited`` (cryorl) is 0 for unvisited holes."""
        first = 2 if self.is_cryorl else 1
        return [
            step * self.num_features + column
            for step in range(self.num_past_steps)
            for column in range(first, self.num_features)
        ]

    def table(self, name: str, session: Tensor) -> Tensor:
        """(B, ...) the rows of a static table; no copy where there is one session."""
        table = getattr(self, name)
        return table.expand(len(session), *table.shape[1:]) if len(table) == 1 else table[session]

    @torch.no_grad()
    def forward(self, observation: Mapping[str, Tensor]) -> Expanded:
        """Features of every patch from a compact observation (``envs.cryoem.stack``)."""
        session = observation["session"][:, 0].long()
        recent = observation["recent"].long()
        row, hole = unpack_visits(observation["visited"])
        num_patches = self.num_groups[0]
        batch, steps = recent.shape
        weights = self._weights(session[row], hole)  # visits, their p, their outcome
        at = row * num_patches + self._at("patch", session[row], hole)
        now = weights.new_zeros(3, batch * num_patches).index_add_(1, at, weights)
        # A past step is the present without what was visited since; before the first step there
        # is nothing to show, so the frame of the start stands in.
        age = torch.arange(steps - 1, -1, -1, device=recent.device)  # oldest first
        age = torch.minimum(age, (recent >= 0).sum(1, keepdim=True) - 1)
        current = recent.gather(1, age)
        sums = now.view(3, batch, 1, num_patches).repeat(1, 1, steps, 1)
        at_b, at_k, later = (age[:, :, None] > torch.arange(steps, device=age.device)).nonzero(
            as_tuple=True
        )
        undone = recent[at_b, later]
        at = (at_b * steps + at_k) * num_patches + self._at("patch", session[at_b], undone)
        sums.view(3, -1).index_add_(1, at, -self._weights(session[at_b], undone))
        return Expanded(self._columns(session, sums, current), session, (row, hole))

    def _at(self, name: str, session: Tensor, hole: Tensor) -> Tensor:
        table = getattr(self, name)
        return table[0, hole] if len(table) == 1 else table[session, hole]

    def _weights(self, session: Tensor, hole: Tensor) -> Tensor:
        p = self._at("p", session, hole)
        return torch.stack([torch.ones_like(p), p, self._at("outcome", session, hole)])

    def _columns(self, session: Tensor, sums: Tensor, current: Tensor) -> Tensor:
        """(B, P, K D) from the sums (3, B, K, P) over visits and the current holes (B, K).

        Steps are oldest first throughout.
        """
        batch, steps = current.shape
        total = torch.stack(
            [self.table("num_in_patch", session), self.table("p_in_patch", session)]
        )[:, :, None]
        visits, visited_p, visited_low = sums
        # left, predicted low of them, visited, measured low of them
        counts = torch.stack([total[0] - visits, total[1] - visited_p, visits, visited_low])
        here = self.table("patch", session).gather(1, current)
        own = torch.arange(self.num_groups[0], device=here.device).expand(batch, -1)
        columns: list[Tensor] = []
        flags: list[Tensor] = []
        groups = (
            own,
            self.table("square_of_patch", session),
            self.table("grid_of_patch", session),
        )
        for group, size, scale in zip(groups, self.num_groups, GROUP_SCALE, strict=True):
            at = group[None, :, None].expand(4, -1, steps, -1)
            count = counts
            if group is not own:
                count = counts.new_zeros(4, batch, steps, size).scatter_add_(3, at, counts)
            count = self._normalise(count.clamp(min=0), scale)
            columns += (count if group is own else count.gather(3, at)).unbind(0)
            is_same = group[:, None] == group.gather(1, here)[:, :, None]
            flags.append(is_same)
        flags = flags[::-1] if self.is_cryorl else [~flag for flag in flags]
        columns += [flag.to(counts.dtype) for flag in flags]
        features = torch.stack([column.transpose(1, 2) for column in columns], -1)
        return features.view(batch, self.num_groups[0], -1)

    def _normalise(self, count: Tensor, scale: float) -> Tensor:
        if self.is_cryorl:
            return (count / scale).clamp(max=1.0)
        return torch.log1p(count) / np.log1p(scale)


def unpack_visits(visited: Tensor) -> tuple[Tensor, Tensor]:
    """(V,) batch rows and (V,) holes of the bits set in (B, bytes) uint8, in little order.

    The cost follows the number of visits, not of holes.
    """
    row, byte = visited.nonzero(as_tuple=True)
    bits = torch.arange(8, device=visited.device, dtype=torch.uint8)
    at, bit = ((visited[row, byte][:, None] >> bits) & 1).nonzero(as_tuple=True)
    return row[at], byte[at] * 8 + bit


def _cells(
    patch: np.ndarray, own_p: np.ndarray, is_hole: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cell of each hole (T, N); patch and p of each cell (T, C), all padded with cell 0."""
    cells = []
    for session in range(len(patch)):
        rows = is_hole[session]
        key = np.stack([patch[session, rows], own_p[session, rows].view(np.int32)])
        unique, inverse = np.unique(key, axis=1, return_inverse=True)
        cells.append((unique, inverse.ravel()))
    num_cells = max(unique.shape[1] for unique, _ in cells)
    hole_cell = np.zeros(patch.shape, np.int64)
    cell_patch = np.zeros((len(patch), num_cells), np.int64)
    cell_p = np.zeros((len(patch), num_cells), np.float32)
    for session, (unique, inverse) in enumerate(cells):
        hole_cell[session, is_hole[session]] = inverse
        cell_patch[session, : unique.shape[1]] = unique[0]
        cell_p[session, : unique.shape[1]] = unique[1].astype(np.int32).view(np.float32)
    return hole_cell, cell_patch, cell_p
