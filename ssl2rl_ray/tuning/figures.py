"""What a tuning policy reached, evaluation by evaluation, as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.crystfel.types import FloatArray

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_traces(fraction: FloatArray, best: FloatArray) -> NDArray[np.uint8]:
    """The indexed fraction of the best setting so far, a line an experiment; (H, W, 3).

    Args:
        fraction: (n, E) measured on the cached frames, after each evaluation.
        best: (E,) the best that any setting reaches, dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=100, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    evaluation = np.arange(1, len(fraction) + 1)
    for number, (own, most) in enumerate(zip(fraction.T, best, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(evaluation, own, color=colour, drawstyle="steps-post", lw=1.8)
        axes.axhline(most, color=colour, ls="--", lw=1)
    highest = max(float(best.max()), float(fraction.max()), 0.1)
    axes.set(xlabel="evaluations", ylabel="indexed fraction", ylim=(0, min(1.1 * highest, 1)))
    axes.set_xlim(1, max(len(fraction), 2))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("best setting so far (dashed: the best there is)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
