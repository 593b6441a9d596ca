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
    """(B, P, K D) float32: what all unvisited holes of a patch share; ``group_columns`` names the
    columns."""
    session: Tensor
    """(B,) int64."""
    visited: Tensor
    """(B, N) bool."""


class Expander(nn.Module):
    """Static tables of a stack of sessions and the sums over what was visited.

    The tables are non-persistent buffers: weights that were trained on one stack load into a
    network on any other. ``table_hash`` says whose tables they are.
    """

    is_hole: Tensor
    weight: Tensor
    unit: Tensor
    own_columns: Tensor
    """(K,) the columns of the stacked features that hold the hole's own p."""
    group_columns: Tensor
    """(K D,) the columns that a patch shares, in the order of ``Expanded.group``: those of its
    patch, of its square, of its grid; of each the steps, oldest first; of each the four counts and
    the flag. ``visited`` (cryorl) is left out: it is 0 for unvisited holes."""

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
        # The bins that visits are counted in: patches, then squares, then grids.
        square = stack.patch_square.astype(np.int64)
        group = np.stack(
            [
                np.broadcast_to(np.arange(shape.num_patches), square.shape),
                shape.num_patches + square,
                shape.num_patches + shape.num_squares + stack.square_grid[session, square],
            ],
            axis=2,
        ).astype(np.int64)
        self.num_groups = (shape.num_patches, shape.num_squares, shape.num_grids)
        weight = np.stack([is_hole, *np.where(is_hole, [stack.p_low_ctf, stack.outcome], 0)], 2)
        total = np.zeros((num_sessions, shape.num_patches, 2))
        np.add.at(total, (session, patch), weight[..., :2])
        by_patch = patch.argsort(axis=1, kind="stable")
        size = np.zeros((num_sessions, shape.num_patches), np.int64)
        np.add.at(size, (session, patch), 1)
        scale = np.repeat(GROUP_SCALE, self.num_groups)
        first_flag, flag_step = (14, -1) if self.is_cryorl else (12, 1)
        columns = [
            (*range(4 * level, 4 * level + 4), first_flag + flag_step * level) for level in range(3)
        ]
        own_columns = np.arange(self.num_past_steps) * self.num_features
        shared = own_columns[:, None] + np.array(columns)[:, None] + (2 if self.is_cryorl else 1)
        slot = stack.slot_hole.astype(np.int64)
        tables = {
            "is_hole": is_hole,
            "own_p": own_p,
            "patch": patch,
            "group": group,
            "weight": weight.astype(np.float32),
            "by_patch": by_patch,
            "first_of_patch": size.cumsum(axis=1) - size,
            "total": total.astype(np.float32),
            "unit": (1 / (scale if self.is_cryorl else np.log1p(scale))).astype(np.float32),
            "hole_cell": hole_cell,
            "cell_patch": cell_patch,
            "cell_p": cell_p,
            "own_columns": own_columns,
            "group_columns": shared.ravel(),
            "slot": np.maximum(slot, 0),
            "is_slot": slot >= 0,
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(table)), False)

    def table(self, name: str, session: Tensor) -> Tensor:
        """(B, ...) the rows of a static table; no copy where there is one session."""
        table = getattr(self, name)
        return table.expand(len(session), *table.shape[1:]) if len(table) == 1 else table[session]

    @torch.no_grad()
    def forward(self, observation: Mapping[str, Tensor]) -> Expanded:
        """Features of every patch from a compact observation (``envs.cryoem.stack``)."""
        session = observation["session"][:, 0].long()
        recent = observation["recent"].long()
        visited = unpack_bits(observation["visited"], self.is_hole.shape[1])
        patch, group, total = (self.table(name, session) for name in ("patch", "group", "total"))
        (batch, steps), (num_patches, *_) = recent.shape, self.num_groups
        episode = torch.arange(batch, device=recent.device)[:, None]
        step = torch.arange(steps, device=recent.device)

        # Visits, their p and their outcomes, of each patch.
        by_patch, first = self.table("by_patch", session), self.table("first_of_patch", session)
        num_holes = visited.shape[1]
        sums = nn.functional.embedding_bag(
            (by_patch + session[:, None] * num_holes).flatten(),
            self.weight.flatten(0, 1),
            (first + episode * num_holes).flatten(),
            mode="sum",
            per_sample_weights=visited.gather(1, by_patch).flatten().float(),
        ).view(batch, num_patches, 3)
        # Left, predicted low of them, visited, measured low of them, and room for a flag.
        of_patch = torch.cat([total - sums[..., :2], sums[..., ::2]], -1)
        counts = of_patch.new_zeros(batch, sum(self.num_groups), 5)
        counts[:, :num_patches, :4] = of_patch
        for level in (1, 2):
            at = group[:, :, level, None].expand(-1, -1, 4)
            counts[..., :4].scatter_add_(1, at, of_patch)
        frames = torch.stack([counts] * steps, 2)  # (B, bins, K, 5); faster than `repeat`

        # A past step is the present without what was visited since; before the first step there
        # is nothing to show, so the frame of the start stands in.
        age = torch.minimum(steps - 1 - step, (recent >= 0).sum(1, keepdim=True) - 1)
        hole = recent.clamp(min=0)
        at = group[episode, patch.gather(1, hole)]  # (B, K, 3), newest first
        n, p, low = self.weight[session[:, None], hole].unbind(2)
        change = torch.stack([n, p, -n, -low, -n], -1)[:, :, None, None]
        change = change * (age[:, None, :] > step[:, None])[..., None, None]
        row = (episode[..., None] * frames.shape[1] + at)[:, :, None] * steps + step[:, None]
        frames.view(-1, 5).index_add_(
            0, row.flatten(), change.expand(-1, -1, -1, 3, -1).reshape(-1, 5)
        )
        frames.clamp_(min=0)
        if self.is_cryorl:
            frames.mul_(self.unit[:, None, None]).clamp_(max=1.0)
        else:
            frames.log1p_().mul_(self.unit[:, None, None])
        # The flag: ``cryorl`` has 1 where the current hole is, ``paper`` 1 where it is not.
        frames[..., 4] = float(not self.is_cryorl)
        here = at.gather(1, age[..., None].expand(-1, -1, 3))
        frames[episode[..., None], here, step[:, None], 4] = float(self.is_cryorl)

        rows = (group + episode[..., None] * frames.shape[1]).flatten()
        features = frames.view(-1, steps * 5).index_select(0, rows)
        return Expanded(features.view(batch, num_patches, -1), session, visited)


def unpack_bits(visited: Tensor, num_holes: int) -> Tensor:
    """(B, N) bool from (B, bytes) uint8, in little order."""
    bit = 1 << torch.arange(8, device=visited.device, dtype=torch.uint8)
    return ((visited[:, :, None] & bit) != 0).view(len(visited), -1)[:, :num_holes]


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
