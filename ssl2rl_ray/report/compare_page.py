"""What ``compare`` found, as a page, tables and curves in a folder, and as words for a terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl2rl_ray.report import folder
from ssl2rl_ray.report.compare import MIN_SEEDS, QUANTITIES, points, word
from ssl2rl_ray.report.figures import draw
from ssl2rl_ray.report.page import figure_html, frame, scroll
from ssl2rl_ray.report.tables import number, to_csv


def check_out(out: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raises ReportError where a comparison may not be written."""
    folder.check_out(out, "compare", force=force)


def write_comparison(
    document: dict[str, Any], out: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Writes page, tables and curves of ``compare`` into a folder; an earlier one gives way.

    Returns:
        The page. ``document`` gets the list of ``files``.

    Raises:
        ReportError: the folder holds something else, or cannot be written.
    """
    check_out(out, force=force)
    files = {
        f"{name}.csv": to_csv(document[name])
        for name in ("scores", "task_scores", "pairs", "thresholds", "runs")
        if document[name]
    }
    images = {}
    for name, figure in document["figures"].items():
        images[name] = files[f"{name}.png"] = draw(figure)
        files[f"{name}.csv"] = to_csv(points(figure))
    files["compare.html"] = _page(document, images).encode()
    folder.write(document, files, out, "compare", force=force)
    return Path(out) / "compare.html"


def format_comparison(document: Mapping[str, Any]) -> str:
    """Scores and pairs for a terminal, then the notes."""
    rows = [("", "seeds", *(f"{name}, {what}" for name, what in _HEADS))]
    for group in document["groups"]:
        cells = [_interval(_score(document, q, group["group"]), s, document) for q, s in _COLUMNS]
        rows.append((group["group"], str(group["num_seeds"]), *cells))
    lines = [f"{document['metric']}, {_what(document)}", _align(rows)]
    if document["thresholds"]:
        lines += ["", f"{document['x_label']} to {document['threshold']:g}, median over runs"]
        lines += [_align([(t["group"], _reached(t)) for t in document["thresholds"]])]
    pairs = _each_pair(document, "final")
    if pairs:
        lines += ["", "of the last look: P(first is better), and difference of IQM"]
        told = [
            (
                f"{p['group']} > {p['against']}",
                _interval(p, "probability", document),
                _interval(p, "iqm_difference", document, sign=True),
            )
            for p in pairs[:_MAX_PAIRS]
        ]
        lines += [_align(told)]
        if len(pairs) > _MAX_PAIRS:
            lines += [f"{len(pairs) - _MAX_PAIRS} more in pairs.csv"]
    lines += ["", *(f"note: {note}" for note in document["notes"])]
    return "\n".join(lines).rstrip()


_COLUMNS = (("final", "iqm"), ("final", "mean"), ("best", "iqm"), ("area", "iqm"))
_HEADS = (("final", "IQM"), ("final", "mean"), ("best", "IQM"), ("area", "IQM"))
_MAX_PAIRS = 15
_ALIKE = (
    "All runs are validated on the same sessions: intervals are over training seeds and say "
    "nothing of other sessions. "
)


def _what(document: Mapping[str, Any]) -> str:
    num_tasks = len(document["tasks"])
    over = f" over {num_tasks} tasks, each in units of its mean" if num_tasks > 1 else ""
    return f"{len(document['runs'])} runs{over}; 95 % bootstrap intervals over runs"


def _score(document: Mapping[str, Any], quantity: str, group: str) -> dict[str, Any] | None:
    return next(
        (s for s in document["scores"] if (s["quantity"], s["group"]) == (quantity, group)), None
    )


def _each_pair(document: Mapping[str, Any], quantity: str) -> list[dict[str, Any]]:
    """One of the two ways round, the better group first."""
    found, seen = [], set()
    for pair in sorted(
        (p for p in document["pairs"] if p["quantity"] == quantity),
        key=lambda p: -p["iqm_difference"],
    ):
        names = frozenset((pair["group"], pair["against"]))
        if names not in seen:
            seen.add(names)
            found.append(pair)
    order = {name: i for i, name in enumerate(_by_score(document, quantity))}
    return sorted(found, key=lambda p: (order[p["group"]], order[p["against"]]))


def _by_score(document: Mapping[str, Any], quantity: str) -> list[str]:
    """Groups, the highest interquartile mean first."""
    rows = [s for s in document["scores"] if s["quantity"] == quantity]
    return [row["group"] for row in sorted(rows, key=lambda row: -row["iqm"])]


def _interval(
    row: Mapping[str, Any] | None,
    name: str,
    document: Mapping[str, Any],
    *,
    sign: bool = False,
    is_raw: bool = False,
) -> str:
    """``value (low to high)``; ``is_raw``: in the unit of the metric, also over several tasks."""
    if row is None or row[name] is None:
        return "–"
    is_share = name == "probability" or (len(document["tasks"]) > 1 and not is_raw)
    decimals = (2 if name == "probability" else 3) if is_share else document["decimals"]
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    text = number(row[name], decimals, sign=sign)
    if low is None or high is None:
        return f"{text} (one seed)" if name == "probability" else text
    if name == "probability" and low == high:
        return f"{text} (no overlap)"
    bounds = (number(bound, decimals, sign=sign) for bound in (low, high))
    return f"{text} ({' to '.join(bounds)})"


def _reached(row: Mapping[str, Any], name: str = "steps") -> str:
    def of(value: float | None) -> str:
        return "never" if value is None else f"{value:,.0f}"

    text = f"{of(row[name])}"
    if row["n"] > 1:
        text += f" ({of(row[f'{name}_low'])} to {of(row[f'{name}_high'])})"
    return f"{text}, {row['num_reached']} of {row['n']} runs"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _page(document: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    groups = [group["group"] for group in document["groups"]]
    sections = [("groups", "What is compared", _groups_html(document))]
    sections += [("scores", "Scores", _scores_html(document))]
    if document["thresholds"]:
        title = f"{document['x_label'].capitalize()} to {document['threshold']:g}"
        sections += [("thresholds", title, _thresholds_html(document))]
    if len(groups) > 1:
        sections += [("pairs", "Which is better", _pairs_html(document))]
    sections += [
        (name, figure["title"], figure_html(name, figure, images[name]))
        for name, figure in document["figures"].items()
    ]
    sections += [("runs", "Every run", _runs_html(document))]
    alike = "" if document["kind"] == "perception" else _ALIKE  # there a seed draws its own data
    lead = escape(
        f"{document['metric']} of {len(groups)} group{'s' * (len(groups) != 1)}, "
        f"{_what(document)}. IQM: the mean of the middle half of the runs (Agarwal et al. 2021, "
        f"arXiv:2108.13264). {alike}“Established” means that the 95 % interval of the difference "
        f"excludes 0 and that both have at least {MIN_SEEDS} seeds, without a correction for how "
        "many are looked at."
    )
    footer = (
        f"<p>ssl2rl-ray {escape(document['version'])}; all numbers: "
        '<a href="compare.json">compare.json</a>.</p>'
    )
    return frame(
        "ssl2rl compare", f"{len(groups)} ways to train, compared", lead, document["notes"],
        sections, footer,
    )  # fmt: skip


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _groups_html(document: Mapping[str, Any]) -> str:
    rows = []
    for group in document["groups"]:
        low, high = (f"{x:,.0f}" for x in group["last"])
        seeds = group["seeds"]
        settings = "<br>".join(
            f"<code>{escape(name)}: {escape(word(value))}</code>"
            for name, value in group["settings"].items()
        )
        rows.append(
            (
                escape(group["group"]),
                " ".join(map(str, seeds)) if len(seeds) <= 12 else f"{len(seeds)} seeds",
                low if low == high else f"{low} to {high}",
                _duration(group["wall_s"]),
                f"<details><summary>{len(group['settings'])}</summary>{settings}</details>"
                if settings
                else "–",
            )
        )
    heads = ("group", "seeds", document["x_label"], "wall clock, median", "differing settings")
    text = _html_table(heads, rows)
    if len(document["tasks"]) > 1:
        scales = ", ".join(
            f"{t['task']} {number(t['scale'], document['decimals'])}" for t in document["tasks"]
        )
        text += (
            '<p class="caption">Scores are divided by the mean over groups of their task '
            f"({escape(scales)}), and runs are resampled within tasks.</p>"
        )
    return text


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _scores_html(document: Mapping[str, Any]) -> str:
    parts = [
        '<p class="caption">Best: at the checkpoint that validation chose, so it is chosen and '
        "scored on the same sessions and reads high; <code>ssl2rl evaluate</code> plays policies "
        "on fresh ones. Area: mean height of the curve over what all runs have. "
        'Numbers: <a href="scores.csv">scores.csv</a></p>'
    ]
    for quantity, what in QUANTITIES.items():
        found = [s for s in document["scores"] if s["quantity"] == quantity]
        if not found:
            continue
        rows = [
            (
                escape(row["group"]),
                _interval(row, "iqm", document),
                _interval(row, "mean", document),
                str(row["n"]) + ("" if row["n"] >= MIN_SEEDS else "<small>ranks nothing</small>"),
            )
            for row in found
        ]
        parts.append(f"<h3>{quantity.capitalize()}: {what}</h3>")
        parts.append(_html_table(("group", "IQM (95 %)", "mean (95 %)", "seeds"), rows))
    if document["task_scores"]:
        parts.append("<h3>Final, of each task in its own unit: IQM</h3>")
        parts.append(_task_scores_html(document))
    return "\n".join(parts)


def _task_scores_html(document: Mapping[str, Any]) -> str:
    found = {
        (s["group"], s["task"]): _interval(s, "iqm", document, is_raw=True)
        for s in document["task_scores"]
        if s["quantity"] == "final"
    }
    tasks = [task["task"] for task in document["tasks"]]
    rows = [
        (escape(group["group"]), *(found[group["group"], task] for task in tasks))
        for group in document["groups"]
    ]
    caption = '<p class="caption">Numbers: <a href="task_scores.csv">task_scores.csv</a></p>'
    return caption + _html_table(("group", *tasks), rows)


def _thresholds_html(document: Mapping[str, Any]) -> str:
    rows = [
        (
            escape(row["group"]),
            escape(_reached(row)),
            escape(_reached(row, "wall_s")) if "wall_s" in row else "–",
        )
        for row in document["thresholds"]
    ]
    caption = (
        '<p class="caption">Median over runs (95 % bootstrap) of the first look that scored as '
        'much; “never”: half of the runs did not. Numbers: <a href="thresholds.csv">'
        "thresholds.csv</a></p>"
    )
    heads = ("group", document["x_label"], "wall clock, s")
    return caption + _html_table(heads, rows)


def _pairs_html(document: Mapping[str, Any]) -> str:
    parts = [
        '<p class="caption">P: the probability that a run of the row scores more than one of the '
        "column (ties count half; Mann-Whitney). “No overlap”: every run of one is above every run "
        "of the other, which is not certainty. Below it the difference of their IQMs. "
        'Numbers: <a href="pairs.csv">pairs.csv</a></p>'
    ]
    for quantity, what in QUANTITIES.items():
        names = _by_score(document, quantity)
        at = {(p["group"], p["against"]): p for p in document["pairs"] if p["quantity"] == quantity}
        if not at:
            continue
        rows = [
            (escape(name), *(_pair_html(at.get((name, other)), document) for other in names))
            for name in names
        ]
        parts.append(f"<h3>{quantity.capitalize()}: {what}</h3>")
        parts.append(_html_table(("P(row > column)", *names), rows))
    return "\n".join(parts)


def _pair_html(pair: Mapping[str, Any] | None, document: Mapping[str, Any]) -> str:
    if pair is None:
        return ""
    probability = _interval(pair, "probability", document)
    less = _interval(pair, "iqm_difference", document, sign=True)
    word = "established" if pair["is_established"] else "not established"
    strong = f"<strong>{probability}</strong>" if pair["is_established"] else probability
    return f"{strong}<small>{less}</small><small>{word}</small>"


def _runs_html(document: Mapping[str, Any]) -> str:
    decimals = document["decimals"]
    is_many = len(document["tasks"]) > 1
    rows = [
        (
            escape(run["run"]),
            escape(run["group"]),
            *([escape(run["task"])] * is_many),
            str(run["seed"]),
            escape(run["status"]),
            f"{run['last']:,.0f}",
            _duration(run["wall_s"]),
            *(number(run[quantity], decimals) for quantity in QUANTITIES),
        )
        for run in document["runs"]
    ]
    heads = ["run", "group", *["task"] * is_many, "seed", "status", document["x_label"]]
    heads += ["wall clock", *QUANTITIES]
    caption = '<p class="caption">Numbers: <a href="runs.csv">runs.csv</a></p>'
    return caption + _html_table(heads, rows)
