"""What a tour looks like: a map for eyes, a table for terminals."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.cryoem.rewards import outcome
from envs.cryoem.types import FloatArray, HoleTable, IntArray, NavigationConfig

# Sizes of the floor plan in sides of a patch: space between boxes, and above them for their name.
_PATCH_GAP, _SQUARE_GAP, _GRID_GAP = 0.3, 0.25, 0.4
_SQUARE_HEADER, _GRID_HEADER = 0.38, 0.35
_LOW, _HIGH, _UNKNOWN = "#12a150", "#d6322c", "#8f8f8f"


def lay_out(table: HoleTable) -> tuple[FloatArray, FloatArray, dict[str, FloatArray]]:
    """Where each hole is drawn: x, y (N,) and the boxes (left, top, width, height) of each level.

    Positions in a table are relative to the patch's image (or of unknown frame), so the map is a
    floor plan, not a photograph: patches are unit tiles, in reading order within their square,
    squares within their grid, grids within the page. Within a tile, holes keep their own x, y;
    where these are unknown they sit on a lattice in row order. y grows downwards. The boxes are
    ``patch`` (P, 4), ``square`` (S, 4), ``grid`` (G, 4) and ``page`` (1, 4).
    """
    patch_box = np.zeros((len(table.patch_name), 4))
    patch_box[:, 2:] = 1.0
    num_squares, num_grids = len(table.square_name), len(table.grid_name)
    square_box = _pack(patch_box, table.patch_square, num_squares, _PATCH_GAP, _SQUARE_HEADER, 1.6)
    grid_box = _pack(square_box, table.square_grid, num_grids, _SQUARE_GAP, _GRID_HEADER, 2.4)
    page_box = _pack(grid_box, np.zeros(num_grids, np.int32), 1, _GRID_GAP, 0.0, 2.4)
    grid_box[:, :2] += page_box[0, :2]
    square_box[:, :2] += grid_box[table.square_grid, :2]
    patch_box[:, :2] += square_box[table.patch_square, :2]
    unit_x, unit_y = _within_patch(table)
    x = patch_box[table.patch_id, 0] + unit_x
    y = patch_box[table.patch_id, 1] + unit_y
    boxes = {"patch": patch_box, "square": square_box, "grid": grid_box, "page": page_box}
    return x, y, boxes


def draw_map(
    table: HoleTable,
    config: NavigationConfig,
    visit_order: IntArray,
    *,
    title: str | None = None,
    width_px: int = 1600,
) -> np.ndarray:
    """The session as an image (H, W, 3) uint8, with the tour drawn into it.

    Holes are filled by ``p_low_ctf``. A visited hole has a ring: green where it turned out low-CTF,
    red where not, grey where it is not labelled. Patches carry the numbers of the stops that the
    tour makes there (a stop = a run of visits without leaving the patch); lines join one stop to
    the next, light to dark in time, and faintly the holes within a stop.

    Args:
        table: the session.
        config: its threshold decides which measured holes are low-CTF.
        visit_order: (M,) holes in the order of the visits, the start first; may be empty.
        title: line above the map; by default counts of the tour.
        width_px: width of the image.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    order = np.asarray(visit_order, int)
    x, y, boxes = lay_out(table)
    left, top, width, height = boxes["page"][0]
    inch, bar_share, head_inch = width_px / 100, 0.06, 0.8
    unit = inch * (1 - bar_share) / width  # inches
    tall = max(height * unit, 2.5) + head_inch
    figure = Figure(figsize=(inch, tall), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1 - bar_share, 1 - head_inch / tall))
    axes.set(xlim=(left, left + width), ylim=(top + height, top), aspect="equal")
    axes.axis("off")

    for level, face, edge in (
        ("grid", "#f1f1ee", "#8a8a86"),
        ("square", "#ffffff", "#b5b5b0"),
        ("patch", "#f8f8f6", "#dededa"),
    ):
        for box in boxes[level]:
            axes.add_patch(Rectangle(box[:2], box[2], box[3], fc=face, ec=edge, lw=0.7, zorder=0))
    font = float(np.clip(unit * 72 * 0.26, 4.5, 11))
    for level, size, names in (
        ("grid", font * 1.2, _short(table.grid_name, None)),
        ("square", font, _short(table.square_name, table.grid_name[table.square_grid])),
    ):
        for (box_x, box_y, box_width, _), name in zip(boxes[level], names, strict=True):
            fits = max(int(box_width * unit * 72 / (0.62 * size)), 2)
            label = name if len(name) <= fits else "…" + name[-(fits - 1) :]
            axes.text(
                box_x + 0.1, box_y + 0.1, label, fontsize=size, va="top", color="#444440", zorder=1
            )

    area = float(np.clip((_spacing(table, x, y) * unit * 72 * 0.62) ** 2, 1.5, 150))
    ring = max(area**0.5 * 0.2, 0.7)
    holes = axes.scatter(
        x, y, c=table.p_low_ctf, s=area, cmap="cividis", vmin=0, vmax=1, linewidths=0, zorder=4
    )
    truth, is_labelled = outcome(table, config), table.is_labelled
    for is_kind, colour in (
        (is_labelled & (truth == 1), _LOW),
        (is_labelled & (truth == 0), _HIGH),
        (~is_labelled, _UNKNOWN),
    ):
        seen = order[is_kind[order]]
        axes.scatter(
            x[seen], y[seen], s=area * 1.5, fc="none", ec=colour, linewidths=ring, zorder=5
        )
    if len(order):
        place = np.column_stack([x, y])[order]
        move = np.stack([place[:-1], place[1:]], 1)
        is_stop = table.patch_id[order[1:]] != table.patch_id[order[:-1]]
        colours = colormaps["plasma_r"](np.linspace(0.15, 1, max(len(move), 1)))
        for chosen, thickness, alpha in ((~is_stop, ring * 0.5, 0.35), (is_stop, ring, 0.75)):
            if chosen.any():
                lines = LineCollection(
                    list(move[chosen]), colors=list(colours[: len(move)][chosen]), zorder=3
                )
                lines.set(linewidth=thickness, alpha=alpha)
                axes.add_collection(lines)
        _number_stops(axes, table.patch_id[order], boxes["patch"], font)
        axes.plot(*place[0], "*", ms=1.9 * area**0.5, mfc="black", mec="white", mew=0.5, zorder=6)

    bar = figure.colorbar(holes, cax=figure.add_axes((1 - bar_share + 0.008, 0.2, 0.01, 0.6)))
    bar.set_label("predicted P(low CTF)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    known = truth[order][is_labelled[order]]
    default = (
        f"{len(table)} holes, {max(len(order) - 1, 0)} visited after the start; of {len(known)} "
        f"labelled holes on the tour {int(known.sum())} are low-CTF "
        f"(threshold {config.low_ctf_threshold_A:g} Å)"
    )
    figure.text(0.012, 1 - 0.24 / tall, title or default, fontsize=12, va="center", color="#222220")
    style: dict[str, Any] = {"marker": "o", "ls": "", "mfc": "none", "mew": 1.8, "ms": 7}
    figure.legend(
        handles=[
            Line2D([], [], marker="*", ls="", color="black", ms=9, label="start"),
            Line2D([], [], mec=_LOW, label="visited, low-CTF", **style),
            Line2D([], [], mec=_HIGH, label="visited, high-CTF", **style),
            Line2D([], [], mec=_UNKNOWN, label="visited, not labelled", **style),
            Line2D([], [], color=colormaps["plasma_r"](0.7), label="move (darker = later)"),
            Line2D([], [], marker="$1$", ls="", color="black", label="stop of the tour"),
        ],
        loc="center left", bbox_to_anchor=(0.006, 1 - 0.56 / tall), ncols=6, frameon=False,
        fontsize=9, handletextpad=0.4, columnspacing=1.6,
    )  # fmt: skip
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def describe(
    table: HoleTable,
    config: NavigationConfig,
    visit_order: IntArray,
    *,
    elapsed_min: float,
    budget_min: float,
) -> str:
    """The state in a few lines of text: minute, hole, lows found, and a row for each square."""
    order = np.asarray(visit_order, int)
    truth = outcome(table, config)
    here, visits = int(order[-1]), order[1:]
    lines = [
        f"minute {elapsed_min:.1f} of {budget_min:.1f} · visits {len(visits)} · "
        f"low-CTF {truth[visits].sum():.1f} · at {table.hole_name[here]}",
        f"{'square':<40} {'holes':>6} {'visited':>8} {'low':>6} {'left':>6} {'p left':>7}",
    ]
    size = len(table.square_name)
    is_seen = np.zeros(len(table), bool)
    is_seen[order] = True
    num_holes = np.bincount(table.square_id, minlength=size)
    num_seen = np.bincount(table.square_id, is_seen, size)
    num_low = np.bincount(table.square_id[visits], truth[visits], size)
    left = np.bincount(table.square_id, table.p_low_ctf * ~is_seen, size)
    for square in range(size):
        mark = ">" if square == table.square_id[here] else " "
        remaining = num_holes[square] - num_seen[square]
        mean = f"{left[square] / remaining:.2f}" if remaining else "-"
        lines.append(
            f"{mark}{table.square_name[square][-39:]:<39} {num_holes[square]:>6} "
            f"{num_seen[square]:>8.0f} {num_low[square]:>6.1f} {remaining:>6.0f} {mean:>7}"
        )
    return "\n".join(lines) + "\n"


def _pack(
    child: FloatArray, parent: IntArray, num_parents: int, gap: float, header: float, aspect: float
) -> FloatArray:
    """Places children (left, top, width, height) in rows within their parents; parents' boxes.

    Children's left and top become relative to the parent; the parent's own wait for its turn. Rows
    are as long as makes the parent about ``aspect`` times as wide as high.
    """
    out = np.zeros((num_parents, 4))
    for index in range(num_parents):
        members = np.flatnonzero(parent == index)
        area = ((child[members, 2] + gap) * (child[members, 3] + gap)).sum()
        row_width = max(float(np.sqrt(area * aspect)), float(child[members, 2].max()))
        x, y, row_height, widest = gap, gap + header, 0.0, 0.0
        for member in members:
            if x > gap and x + child[member, 2] > row_width + gap:
                x, y, row_height = gap, y + row_height + gap, 0.0
            child[member, :2] = x, y
            x += child[member, 2] + gap
            row_height, widest = max(row_height, float(child[member, 3])), max(widest, x)
        out[index, 2:] = widest, y + row_height + gap
    return out


def _within_patch(table: HoleTable) -> tuple[FloatArray, FloatArray]:
    """(N,) positions in a unit tile: the table's own, or a lattice where they are unknown."""
    size = len(table.patch_name)
    count = np.bincount(table.patch_id, minlength=size)
    rank = np.empty(len(table), int)
    by_patch = np.argsort(table.patch_id, kind="stable")
    rank[by_patch] = np.arange(len(table)) - (np.cumsum(count) - count)[table.patch_id[by_patch]]
    side = np.ceil(np.sqrt(count)).astype(int)[table.patch_id]
    lattice = [(rank % side + 0.5) / side, (rank // side + 0.5) / side]
    position = np.stack([table.x, table.y])
    is_finite = np.isfinite(position).all(0)
    is_known = np.bincount(table.patch_id, ~is_finite, size) == 0
    position = np.where(is_finite, position, 0.0)
    low, high = np.full((2, size), np.inf), np.full((2, size), -np.inf)
    for axis in (0, 1):
        np.minimum.at(low[axis], table.patch_id, position[axis])
        np.maximum.at(high[axis], table.patch_id, position[axis])
    extent = (high - low).max(0)  # one scale for both axes: no distortion
    is_known &= extent > 0
    unit = 0.84 / np.where(is_known, extent, 1.0)
    x, y = np.where(
        is_known[table.patch_id],
        0.5 + (position - ((high + low) / 2)[:, table.patch_id]) * unit[table.patch_id],
        lattice,
    )
    return x, y


def _spacing(table: HoleTable, x: FloatArray, y: FloatArray) -> float:
    """Typical distance to the nearest neighbour in the patch: the median over patches."""
    nearest = []
    for patch in range(len(table.patch_name)):
        rows = np.flatnonzero(table.patch_id == patch)
        if len(rows) < 2:
            continue
        distance = np.hypot(x[rows, None] - x[rows], y[rows, None] - y[rows])
        np.fill_diagonal(distance, np.inf)
        nearest.append(np.median(distance.min(1)))
    return float(np.median(nearest)) if nearest else 0.5


def _short(names: np.ndarray, parents: np.ndarray | None) -> list[str]:
    """Names without their parent's, or without the beginning that all share: it says nothing."""
    whole = [str(name) for name in names]
    if parents is not None:
        return [
            name.removeprefix(str(parent)).lstrip("_") or name
            for name, parent in zip(whole, parents, strict=True)
        ]
    parts = [name.split("_") for name in whole]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["_".join(p[shared:]) for p in parts]


def _number_stops(axes: Any, patch: IntArray, patch_box: FloatArray, font: float) -> None:
    """Writes the numbers of a tour's stops, (M,) patches of its visits, beside their patches."""
    is_stop = np.concatenate([[True], patch[1:] != patch[:-1]])
    stops = patch[is_stop]
    for index in np.unique(stops):
        numbers = [str(i + 1) for i in np.flatnonzero(stops == index)]
        label = ",".join(numbers[:3]) + ("…" if len(numbers) > 3 else "")
        axes.text(
            patch_box[index, 0], patch_box[index, 1] - 0.02, label, fontsize=font * 0.9,
            fontweight="bold", ha="left", va="bottom", color="black", zorder=7,
        )  # fmt: skip
