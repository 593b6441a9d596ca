"""The figures: curves over rounds and over labelled fractions, with bands over data sets.

``figures`` turns results into plain panels of lines, ``points`` makes a table of them, ``draw`` a
PNG. Colours are Okabe and Ito's, and no two methods share a marker, so that the figures also read
without colour.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ssl2rl_ray.config import METHODS
from ssl2rl_ray.report.results import GROUPS, Played, finite, group, number_at, percent, title
from ssl2rl_ray.report.tables import figures_of

Dash = str | tuple[float, tuple[float, ...]]
Style = tuple[str, Dash, str]
"""Colour, dash, marker."""
_LONG: Dash = (0, (7, 2))
_DOTTED: Dash = (0, (3, 1.2, 1, 1.2, 1, 1.2))
_STYLES: dict[str, Style] = {
    "supervised": ("#7a7a7a", ":", "x"),
    "fixmatch": ("#cc79a7", "-.", "P"),
    "iterative-fixmatch": ("#000000", "--", "s"),
    "ssl2rl-120": ("#56b4e9", "-.", "^"),
    "ssl2rl-480": ("#0072b2", "-", "o"),
    "full-labels": ("#009e73", _LONG, "D"),
    "labelled-only": ("#7a7a7a", "-", "v"),
    "ranking": ("#e69f00", "-.", "<"),
    "planner": ("#d55e00", "-", ">"),
    "true-labels": ("#009e73", _DOTTED, "*"),
    "smooth": ("#cc79a7", "-.", "h"),
    "posterior": ("#882255", "-", "p"),
    "q-values": ("#999933", ":", "d"),
    "ssl2rl-posterior": ("#0072b2", _LONG, "H"),
    "labelled-rl": ("#882255", "-.", "X"),
    "no-movement-cost": ("#e69f00", ":", "8"),
    # Figure 4 c-f: the classifier's own labels
    "own_ranking": ("#e69f00", "-.", "<"),
    "own_threshold": ("#000000", "--", "s"),
}
_STRANGER: Style = ("#5b3a8c", _LONG, "+")
_NUMBERED: tuple[Style, ...] = (
    ("#0072b2", "-", "o"),
    ("#d55e00", "--", "s"),
    ("#009e73", "-.", "^"),
    ("#cc79a7", _LONG, "D"),
    ("#000000", ":", "v"),
    ("#56b4e9", _DOTTED, "P"),
    ("#e69f00", "-", "X"),
    ("#882255", "--", "<"),
    ("#999933", "-.", ">"),
    ("#7a7a7a", _LONG, "h"),
)
"""Of lines that are told apart by a number only."""
_REFERENCES = {
    "the paper's methods": ("labelled-only",),
    "controls": ("iterative-fixmatch", "ssl2rl-480"),
    "ours": ("iterative-fixmatch", "labelled-only"),
    "ablations": ("iterative-fixmatch", "ssl2rl-480"),
    "others": ("iterative-fixmatch", "labelled-only"),
}
"""What stands beside the methods of a group, so that the panels can be read alone."""
_LEVELS = ("hole", "patch", "square", "grid")
_BY_SCORE = (
    "ssl2rl-480", "ssl2rl-posterior", "planner", "smooth", "posterior", "q-values", "true-labels",
)  # fmt: skip
"""Methods whose rules Figure 4 f compares."""
_OWN = "the classifier's own ranking, at equal N_C"
_BAND = "bands and bars: 95 % t interval over data sets"


def figures(
    played: Sequence[Played],
    methods: Sequence[str],
    fractions: Sequence[float],
    durations: Sequence[str],
) -> dict[str, Any]:
    """Every figure by file name: title, caption, alt text, panels; those without a number are left.

    Args:
        played: of one navigator.
        methods: in the order of legends.
        fractions: labelled fractions, one row of panels (or one figure) each.
        durations: minutes of the evaluated sessions, as round.json names them.
    """
    grouped: dict[str, list[str]] = {}
    for method in methods:
        grouped.setdefault(group(method), []).append(method)
    shown = {
        name: [m for m in methods if m in own or m in _REFERENCES[name]]
        for name, own in grouped.items()
    }
    found: dict[str, Any] = {}
    for fraction in fractions:
        name = f"figure4-{100 * fraction:g}pct".replace(".", "_")
        found[name] = _figure_4(played, methods, fraction, durations)
    found["figure6"] = _figure_6(played, shown, fractions, durations)
    for name, lines in shown.items():
        slug = name.replace("the paper's methods", "paper")
        found[f"figure7-{slug}"] = _figure_7(played, name, lines, fractions, durations)
    visiting = [m for m in methods if m not in METHODS or METHODS[m].rule == "visit-order"]
    found["switches"] = _switches(played, visiting, fractions)
    found["inconsistency"] = _inconsistency(played, visiting, fractions)
    found["calibration"] = _calibration(played, shown, fractions)
    return {n: f for n, f in found.items() if any(panel["lines"] for panel in f["panels"])}


def _figure_4(
    played: Sequence[Played], methods: Sequence[str], fraction: float, durations: Sequence[str]
) -> dict[str, Any]:
    shown = [
        m for m in methods if m in (*GROUPS["the paper's methods"], *GROUPS["controls"][:1])
    ]  # fmt: skip
    panels = [
        _over_rounds(
            played, shown, fraction, ("classifier", "test", "precision"),
            "(a) precision of the classifier", "precision",
        )
    ]  # fmt: skip
    if durations:
        path = ("return", "test", durations[-1], "num_low_ctf")
        panels.append(
            _over_rounds(
                played, shown, fraction, path, f"(b) low-CTF holes in {durations[-1]} min", "holes"
            )
        )
    has = {p.method for p in played if any(row.get("pseudo_labels") for row in p.rounds)}
    order = ["ssl2rl-480", "ssl2rl-120", "planner", *methods]
    loop = next((m for m in order if m in has), None)
    for letter, quantity in zip("cde", ("accuracy", "precision", "recall"), strict=True):
        lines = [
            _line_of_rounds(
                played,
                str(loop),
                fraction,
                ("pseudo_labels", source, quantity),
                label,
                str(loop) if source == "labels" else source,
            )
            for source, label in (
                ("labels", title(str(loop))),
                ("own_ranking", _OWN),
                ("own_threshold", "the classifier's own, at its threshold"),
            )
        ]
        panels.append(
            _panel(f"({letter}) {quantity} of pseudo labels", "round", quantity, lines)
        )  # fmt: skip
    panels.append(_equal_number(played, methods, fraction))
    return {
        "title": f"Figure 4: precision, low-CTF holes and pseudo labels, {percent(fraction)} "
        "labelled",
        "caption": "(a, b) On the test squares, over rounds; methods without rounds are level "
        "lines. (c-e) Pseudo labels of the unlabelled training holes against the classifier's own, "
        "at the same number of positive labels (N_C) and at its own threshold: only the first of "
        "the two compares like with like. (f) Precision of the top share of the unlabelled holes "
        "by the score of each rule, round 0, where all begin with the same classifier (its "
        f"intervals stand in the CSV); {_BAND}.",
        "alt": f"Six panels for {percent(fraction)} of the labels: precision and low-CTF holes "
        "over rounds by method; accuracy, precision and recall of the pseudo labels over rounds; "
        "precision at equal shares labelled positive.",
        "columns": 3,
        "panels": panels,
    }


def _equal_number(
    played: Sequence[Played], methods: Sequence[str], fraction: float
) -> dict[str, Any]:
    """Precision against the share called positive, round 0: each rule, and f_0's own ranking."""
    rules: dict[str, dict[float, dict[int, float]]] = {}
    own: dict[float, dict[int, float]] = {}
    for p in played:
        if p.labelled_fraction != fraction:
            continue
        curve = (p.rounds[0].get("pseudo_labels") or {}).get("curve") or {}
        columns = [curve.get(name) or () for name in ("share", "labels", "own")]
        for share, label, mine in zip(*columns, strict=False):
            for by_x, value in ((rules.setdefault(p.method, {}), label), (own, mine)):
                if finite(value) is not None:
                    by_x.setdefault(share, {})[p.seed] = value
    lines = [_line(_OWN, "own_ranking", own)]
    lines += [_line(title(m), m, rules[m]) for m in _BY_SCORE if m in rules and m in methods]
    panel = _panel(
        "(f) precision at equal N_C, round 0", "share called low-CTF", "precision", lines
    )
    return panel | {"lines": [line | {"spread": "none"} for line in panel["lines"]]}


def _figure_6(
    played: Sequence[Played],
    shown: Mapping[str, Sequence[str]],
    fractions: Sequence[float],
    durations: Sequence[str],
) -> dict[str, Any]:
    quantities = [
        *(
            (f"return, {d} min", ("return", "test", d, "episode_return"), "reward")
            for d in durations
        ),
        ("accuracy", ("classifier", "test", "accuracy"), "accuracy"),
    ]
    panels = []
    for name, lines in shown.items():
        for quantity, path, kept_by in quantities:
            drawn = []
            for method in lines:
                by_x: dict[float, dict[int, float]] = {}
                for p in played:
                    if p.method == method and (value := p.at(kept_by, *path)) is not None:
                        by_x.setdefault(100 * p.labelled_fraction, {})[p.seed] = value
                drawn.append(_line(title(method), method, by_x) | {"spread": "bars"})
            panel = _panel(f"{name}: {quantity}", "labels used, %", quantity, drawn)
            panel["x_ticks"] = [100 * f for f in fractions]
            panels.append(panel)
    return {
        "title": "Figure 6: return and accuracy against the labelled fraction",
        "caption": "On the test squares, of the round kept by return and by accuracy on the "
        "selection squares. The paper's figure 6 is not at hand: this shows ours. Points of one "
        f"fraction are moved apart a little, so that their bars can be told; {_BAND}.",
        "alt": "Return and accuracy of every method at each labelled fraction, with error bars.",
        "columns": len(quantities),
        "panels": panels,
    }


def _figure_7(
    played: Sequence[Played],
    name: str,
    methods: Sequence[str],
    fractions: Sequence[float],
    durations: Sequence[str],
) -> dict[str, Any]:
    quantities = [
        *(
            (f"return, {d} min", ("return", "selection", d, "episode_return"), "reward")
            for d in durations
        ),
        ("accuracy", ("classifier", "selection", "accuracy"), "accuracy"),
    ]
    panels = [
        _over_rounds(
            played, methods, fraction, path, f"{percent(fraction)}: {quantity}", quantity, kept_by
        )
        for fraction in fractions
        for quantity, path, kept_by in quantities
    ]
    return {
        "title": f"Figure 7: return and accuracy over rounds, {name}",
        "caption": "On the selection squares, by which rounds are kept. A ring marks rounds that "
        "were kept, by return in its panels and by accuracy in its own; its area is the share of "
        "the data sets that kept the round. Methods without rounds are level lines. The paper's "
        f"figure 7 is not at hand: this shows ours; {_BAND}.",
        "alt": f"Return and accuracy on the selection squares, round by round, {name}, one row of "
        "panels for each labelled fraction.",
        "columns": len(quantities),
        "panels": panels,
    }


def _switches(
    played: Sequence[Played], methods: Sequence[str], fractions: Sequence[float]
) -> dict[str, Any]:
    return {
        "title": "Switches in the roll-outs",
        "caption": "Moves by the highest level that changes, in the roll-outs over all training "
        f"holes that make the pseudo labels (means over the roll-outs); {_BAND}.",
        "alt": "Number of moves within the patch and of patch, square and grid switches over "
        "rounds, by method.",
        "columns": len(_LEVELS),
        "panels": [
            _over_rounds(
                played, methods, fraction, ("roll_out", "num_switches", level),
                f"{percent(fraction)}: {level}", "moves",
            )
            for fraction in fractions
            for level in _LEVELS
        ],
    }  # fmt: skip


def _inconsistency(
    played: Sequence[Played], methods: Sequence[str], fractions: Sequence[float]
) -> dict[str, Any]:
    panels = []
    for fraction in fractions:
        for level in _LEVELS[1:]:
            lines = []
            for method in methods:
                for name, what in (("inconsistency", ""), ("inconsistency_bound", ", bound")):
                    line = _line_of_rounds(
                        played, method, fraction, ("roll_out", name, level),
                        title(method) + what, method,
                    )  # fmt: skip
                    lines.append(
                        line | {"spread": "none" if what else "band", "is_bound": bool(what)}
                    )
            panel = _panel(f"{percent(fraction)}: {level}", "round", "R_B", lines)
            panels.append(panel | {"y_range": [0.0, 1.04]})
    return {
        "title": "Inconsistency of the pseudo labels, beside its bound",
        "caption": "R_B of Lemma 1 by level: the share of the groups whose unlabelled holes got "
        "pseudo labels of both kinds, and (thin, dotted) the largest share that the returns of "
        f"the tour to groups it had left allow, whatever N_C; means over the roll-outs; {_BAND}.",
        "alt": "Inconsistency rate and its bound over rounds for patch, square and grid.",
        "columns": 3,
        "panels": panels,
    }


def _calibration(
    played: Sequence[Played], shown: Mapping[str, Sequence[str]], fractions: Sequence[float]
) -> dict[str, Any]:
    return {
        "title": "Calibration over rounds",
        "caption": "Expected calibration error of the classifier on the test squares: how far the "
        f"shares found are from the probabilities said; {_BAND}.",
        "alt": "Expected calibration error over rounds, by group of methods and labelled fraction.",
        "columns": len(shown),
        "panels": [
            _over_rounds(
                played, methods, fraction, ("classifier", "test", "ece"),
                f"{percent(fraction)}: {name}", "ECE",
            )
            for fraction in fractions
            for name, methods in shown.items()
        ],
    }  # fmt: skip


# ---- panels --------------------------------------------------------------------------------------


def _panel(text: str, x: str, y: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = [line for line in lines if line["x"]]
    return {"title": text, "x_label": x, "y_label": y, "lines": kept}


def _over_rounds(
    played: Sequence[Played],
    methods: Sequence[str],
    fraction: float,
    path: tuple[str, ...],
    text: str,
    y: str,
    kept_by: str | None = None,
) -> dict[str, Any]:
    """One line a method over rounds, with the rounds that were kept where asked for."""
    lines = []
    for method in methods:
        line = _line_of_rounds(played, method, fraction, path, title(method), method)
        own = [p for p in played if p.method == method and p.labelled_fraction == fraction]
        if kept_by and any(len(p.rounds) > 1 for p in own):
            kept = [p.kept.get(kept_by) for p in own]
            line["kept_share"] = [kept.count(round(x)) / len(own) for x in line["x"]]
        lines.append(line)
    return _panel(text, "round", y, lines)


def _line_of_rounds(
    played: Sequence[Played],
    method: str,
    fraction: float,
    path: tuple[str, ...],
    label: str,
    style: str,
) -> dict[str, Any]:
    by_x: dict[float, dict[int, float]] = {}
    is_level = True
    for p in played:
        if p.method != method or p.labelled_fraction != fraction:
            continue
        is_level &= len(p.rounds) == 1
        for row in p.rounds:
            if (value := number_at(row, *path)) is not None:
                by_x.setdefault(row["round"], {})[p.seed] = value
    return _line(label, style, by_x) | {"is_level": is_level}


def _line(label: str, style: str, by_x: Mapping[float, Mapping[int, float]]) -> dict[str, Any]:
    """Mean and interval over data sets at each x."""
    found = [(x, figures_of(by_x[x])) for x in sorted(by_x)]
    return {
        "label": label,
        "style": style,
        "x": [x for x, _ in found],
        "n": [cell["n"] for _, cell in found],
        "mean": [cell["mean"] for _, cell in found],
        "low": [cell["ci95"][0] for _, cell in found],
        "high": [cell["ci95"][1] for _, cell in found],
        "spread": "band",
    }


def points(figure: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers of a figure, one row a point."""
    return [
        {
            "panel": panel["title"],
            "line": line["label"],
            "x_label": panel["x_label"],
            "x": x,
            "y_label": panel["y_label"],
            "n": line["n"][i],
            "mean": line["mean"][i],
            "ci95": (line["low"][i], line["high"][i]),
            "kept_share": line["kept_share"][i] if "kept_share" in line else None,
        }
        for panel in figure["panels"]
        for line in panel["lines"]
        for i, x in enumerate(line["x"])
    ]


# ---- drawing -------------------------------------------------------------------------------------


def draw(figure: Mapping[str, Any]) -> bytes:
    """The figure as PNG, its legend below the panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels, columns = figure["panels"], figure["columns"]
    rows = -(-len(panels) // columns)
    labels: dict[str, Any] = {}
    names = {line["label"] for p in panels for line in p["lines"] if not line.get("is_bound")}
    legend_rows = -(-(len(names) + 1) // 3)
    wide, high = figure.get("panel_inches", (3.3, 2.6))
    width, height = max(wide * columns, 6.6), high * rows + 0.24 * legend_rows + 0.3
    page = Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    engine: Any = page.get_layout_engine()
    engine.set(w_pad=0.08, h_pad=0.07, wspace=0.03)
    canvas = FigureCanvasAgg(page)
    for place, panel in enumerate(panels):
        axes = page.add_subplot(rows, columns, place + 1)
        if panel["lines"]:
            _draw_panel(axes, panel, labels)
        else:  # keeps its place, so that rows and columns still mean what they mean
            axes.axis("off")
    page.legend(
        labels.values(),
        [_plain(label) for label in labels],
        loc="outside lower center",
        ncols=3 if columns > 1 else 2,
        frameon=False,
        fontsize=8.5,
        handlelength=3.6,
    )
    stream = io.BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _draw_panel(axes: Any, panel: Mapping[str, Any], labels: dict[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter

    lines = panel["lines"]
    xs = sorted({x for line in lines for x in line["x"]})
    gap = min((b - a for a, b in itertools.pairwise(xs)), default=1.0)
    for i, line in enumerate(lines):
        style = line["style"]
        colour, dash, marker = (
            _NUMBERED[style % len(_NUMBERED)]
            if isinstance(style, int)
            else _STYLES.get(style, _STRANGER)
        )
        look: dict[str, Any] = {"color": colour, "ls": dash, "lw": 1.5, "zorder": 3}
        if line.get("is_bound"):
            look |= {"ls": (0, (1, 2)), "lw": 0.9}
        elif not line.get("is_level"):
            look |= {"marker": marker, "ms": 4.4, "mec": colour if marker in "x+" else "white"}
            look |= {"mew": 1.0 if marker in "x+" else 0.4}
        mean = line["mean"]
        low, high = (  # of one data set there is no interval
            [m if bound is None else bound for m, bound in zip(mean, line[name], strict=True)]
            for name in ("low", "high")
        )
        x = line["x"]
        if line["spread"] == "bars":
            x = [value + 0.07 * gap * (i - (len(lines) - 1) / 2) for value in x]
            error = [
                [m - bound for m, bound in zip(mean, low, strict=True)],
                [bound - m for m, bound in zip(mean, high, strict=True)],
            ]
            axes.errorbar(x, mean, yerr=error, fmt="none", ecolor=colour, elinewidth=1)
        if line.get("is_level"):
            drawn = axes.axhline(mean[0], **look)
        else:
            if is_held := bool(line.get("is_held")):  # until the next point; dashes fray steps
                look |= {"drawstyle": "steps-post", "ls": "-", "markevery": -(-len(x) // 8)}
            (drawn,) = axes.plot(x, mean, **look)
            if line["spread"] == "band":
                how: dict[str, Any] = {"step": "post", "alpha": 0.2} if is_held else {"alpha": 0.1}
                axes.fill_between(x, low, high, color=colour, lw=0, **how)
        if "kept_share" in line:
            axes.scatter(
                line["x"], line["mean"], s=[220 * share for share in line["kept_share"]],
                facecolors="none", edgecolors=colour, linewidths=1.1, zorder=4,
            )  # fmt: skip
        label = "its bound" if line.get("is_bound") else line["label"]
        labels.setdefault(label, drawn)
    axes.set_title(_plain(panel["title"]), fontsize=9.5, loc="left")
    axes.set_xlabel(panel["x_label"], fontsize=8.5)
    axes.set_ylabel(panel["y_label"], fontsize=8.5)
    axes.tick_params(labelsize=8)
    if ticks := panel.get("x_ticks"):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    elif panel["x_label"] == "round":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel["x_label"] == "env steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "y_range" in panel:
        axes.set_ylim(*panel["y_range"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)


def _plain(text: str) -> str:
    """Without mathematics: a name with dollars is a name."""
    return text.replace("$", r"\$")
