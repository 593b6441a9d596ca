"""Pictures of a classifier's probabilities: said against found, the confusion, its worst mistakes.

Every function returns an image (H, W, 3) uint8, for a file or for TensorBoard. Nothing is written,
no window opens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.cryoem.types import FloatArray
from ssl2rl_ray.perception.metrics import (
    classifier_metrics,
    confusion,
    expected_calibration_error,
    reliability,
)

Image = NDArray[np.uint8]

_BLUE, _GREY, _INK = "#2b6ca3", "#8f8f8f", "#222220"
_DPI = 100


def draw_reliability(is_low: ArrayLike, p: ArrayLike, *, num_bins: int = 10) -> Image:
    """The share of low-CTF holes found where p was said, with 95 % intervals, over a histogram.

    Bins are of P(low-CTF), equal in width. Intervals are Wilson's, so that a bin of few holes shows
    how little it says. The title gives ECE by the definition of ``metrics``.

    Raises:
        ValueError: as ``metrics.classifier_metrics``.
    """
    bins = reliability(is_low, p, num_bins)
    has_any = bins.count > 0
    said, found, count = bins.mean_p[has_any], bins.low_share[has_any], bins.count[has_any]
    figure, canvas = _blank(5.0, 5.6)
    top = figure.add_axes((0.14, 0.34, 0.82, 0.54))
    top.plot([0, 1], [0, 1], color=_GREY, lw=1, ls="--", label="as said")
    low, high = _wilson(found, count)
    # Rounding may put a bound past the share itself by an ulp.
    error = np.maximum([found - low, high - found], 0)
    top.errorbar(
        said, found, yerr=error, fmt="o", ms=5, lw=1.2, capsize=2, color=_BLUE, label="found (95 %)"
    )
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="share low-CTF")
    top.tick_params(labelbottom=False)
    top.legend(loc="upper left", frameon=False, fontsize=9)
    bottom = figure.add_axes((0.14, 0.1, 0.82, 0.2), sharex=top)
    width = 1 / num_bins
    bottom.bar((np.arange(num_bins) + 0.5) * width, bins.count, 0.92 * width, color=_BLUE)
    bottom.set(xlim=(0, 1), ylim=(0, 1.08 * max(bins.count.max(), 1)))
    bottom.set(xlabel="said P(low-CTF)", ylabel="holes")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    num_holes = int(bins.count.sum())
    ece = expected_calibration_error(is_low, p)
    title = f"{num_holes} holes, ECE {ece:.3f}" if num_holes else "no holes"
    figure.text(0.5, 0.94, title, fontsize=12, ha="center", va="center", color=_INK)
    return _pixels(canvas)


def draw_confusion(is_low: ArrayLike, p: ArrayLike) -> Image:
    """The 2 x 2 table at p >= .5: counts, and their share of the row (what became of each class).

    Raises:
        ValueError: as ``metrics.classifier_metrics``.
    """
    table, found = confusion(is_low, p), classifier_metrics(is_low, p)
    rows = table.sum(axis=1, keepdims=True)
    share = table / np.where(rows > 0, rows, np.nan)
    figure, canvas = _blank(4.8, 4.4)
    axes = figure.add_axes((0.2, 0.05, 0.75, 0.68))
    axes.imshow(np.nan_to_num(share), cmap="Blues", vmin=0, vmax=1.25)
    for (row, column), count in np.ndenumerate(table):
        of_row = f"\n{share[row, column]:.0%}" if rows[row, 0] else ""
        is_dark = np.nan_to_num(share[row, column]) > 0.65
        axes.text(
            column, row, f"{count}{of_row}", ha="center", va="center", fontsize=14,
            color="white" if is_dark else _INK,
        )  # fmt: skip
    names = ["high-CTF", "low-CTF"]
    axes.set_xticks([0, 1], names)
    axes.set_yticks([0, 1], names, rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labelsize=10)
    axes.set_xlabel("called", fontsize=11, labelpad=6)
    axes.set_ylabel("is", fontsize=11, labelpad=6)
    axes.spines[:].set_visible(False)
    title = (
        f"accuracy {_figure(found['accuracy'])}, precision {_figure(found['precision'])}, "
        f"recall {_figure(found['recall'])}"
    )
    figure.text(0.5, 0.94, title, fontsize=11, ha="center", va="center", color=_INK)
    return _pixels(canvas)


def draw_mistakes(
    images: NDArray[np.uint8],
    is_low: ArrayLike,
    p: ArrayLike,
    hole_name: Sequence[str] | NDArray[np.str_],
    ctf_max_resolution_A: FloatArray | None = None,
    *,
    num: int = 24,
) -> Image:
    """A sheet of the mistakes that the classifier was surest of, the surest first.

    Each hole in its own grey scale (as its first and last percentile), with its name, what was said
    and what was measured; red frame: called low-CTF, violet: called high-CTF. Labels are noisy near
    the threshold, so a sure mistake is as often a hole to look at as a fault of the network.

    Args:
        images: (N, H, W), an array or a memory map; only the rows that are shown are read.
        is_low: (N,) truth.
        p: (N,) P(low-CTF); p >= .5 calls a hole low.
        hole_name: (N,) any text; of a long name the end is shown, which tells holes apart.
        ctf_max_resolution_A: (N,) Å; NaN = not known; None leaves the line out.
        num: most to show; without any mistake the sheet is its heading.

    Raises:
        ValueError: as ``metrics.classifier_metrics``, or an argument has not one row a hole.
    """
    from matplotlib.patches import Rectangle

    confusion(is_low, p)  # raises where they are no predictions
    truth, said = np.asarray(is_low, dtype=bool), np.asarray(p, dtype=np.float64)
    ctf = np.full(len(truth), np.nan) if ctf_max_resolution_A is None else ctf_max_resolution_A
    for what, rows in (("images", images), ("hole_name", hole_name), ("ctf", ctf)):
        if len(rows) != len(truth):
            raise ValueError(f"{what}: {len(rows)} rows for {len(truth)} holes")
    wrong = np.flatnonzero((said >= 0.5) != truth)
    surest = wrong[np.argsort(-np.abs(said[wrong] - 0.5), kind="stable")][:num]
    columns = min(max(len(surest), 4), 8)
    head, cell, text = 0.62, 1.6, 0.74  # inches
    width, height = columns * cell, head + -(-len(surest) // columns) * (cell + text)
    figure, canvas = _blank(width, height)
    counted = f"{len(wrong)} of {len(truth)} holes are called wrong"
    shown = f", here the surest {len(surest)}" if len(surest) < len(wrong) else ""
    key = "frame: red = called low-CTF, violet = called high-CTF"
    for line, (words, size) in enumerate(((counted + shown, 12), (key, 8))):
        y = 1 - (0.2 + 0.24 * line) / height
        figure.text(0.1 / width, y, words, fontsize=size, va="center", color=_INK)
    for place, row in enumerate(surest):
        line, column = divmod(place, columns)
        left, bottom = column * cell, height - head - line * (cell + text) - cell
        margin = 0.08
        axes = figure.add_axes(
            (
                (left + margin) / width,
                (bottom + margin) / height,
                (cell - 2 * margin) / width,
                (cell - 2 * margin) / height,
            )
        )
        picture = np.asarray(images[row], dtype=np.float64)
        dark, bright = np.percentile(picture, (1, 99))
        axes.imshow(picture, cmap="gray", vmin=dark, vmax=max(bright, dark + 1))
        axes.axis("off")
        axes.add_patch(
            Rectangle(
                (0, 0), 1, 1, transform=axes.transAxes, fc="none", lw=3,
                ec="#d6322c" if said[row] >= 0.5 else "#7a3fb0",
            )
        )  # fmt: skip
        measured = f"{ctf[row]:.1f} Å" if np.isfinite(ctf[row]) else ""
        outcome = f"{measured} ({'low' if truth[row] else 'high'})".strip()
        lines = [_two_lines(str(hole_name[row])), f"said p = {said[row]:.2f}", f"is {outcome}"]
        figure.text(
            (left + cell / 2) / width, bottom / height, "\n".join(lines), fontsize=7.5,
            ha="center", va="top", color=_INK, parse_math=False, linespacing=1.25,
        )  # fmt: skip
    return _pixels(canvas)


def _two_lines(name: str, width: int = 24) -> str:
    """A name on two lines, without what cannot be drawn; of a long one the end."""
    clean = "".join(c if c.isprintable() and c < "\u0250" else "?" for c in name)
    clean = clean if len(clean) <= 2 * width else "…" + clean[1 - 2 * width :]
    return f"{clean[:width]}\n{clean[width:]}"


def _figure(value: float) -> str:
    """Three decimals, or a dash of what is not defined."""
    return f"{value:.3f}" if np.isfinite(value) else "–"


def _wilson(share: FloatArray, count: NDArray[np.integer[Any]]) -> tuple[FloatArray, FloatArray]:
    """95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return middle - half, middle + half


def _blank(width: float, height: float) -> tuple[Any, Any]:
    """A white figure of so many inches, and its canvas, apart from pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    return figure, FigureCanvasAgg(figure)


def _pixels(canvas: Any) -> Image:
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
