"""``ssl2rl report``: runs of the loop as tables, figures and one page, beside the paper's numbers.

Run files in, files out. ``report`` reads run directories of kind ``ssl2rl`` and returns one plain
dict, which is ``report.json``; CSV, PNG and HTML are drawn from that dict alone. A round is kept by
the selection squares, as the run noted it; what is quoted is of the test squares. No torch, no Ray.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl2rl_ray.config import own_version
from ssl2rl_ray.report import folder
from ssl2rl_ray.report.figures import draw, figures, points
from ssl2rl_ray.report.page import page
from ssl2rl_ray.report.results import (
    Played,
    ReportError,
    find_runs,
    in_order,
    percent,
    read_runs,
)
from ssl2rl_ray.report.tables import PAPER_NAVIGATORS, cell_text, tables, to_csv

FORMAT_VERSION = 1


def report(paths: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Everything that the page shows, as plain values: ``report.json`` without its file list.

    Args:
        paths: run directories of kind ssl2rl, or folders that hold some.

    Raises:
        ReportError: no run, none with a finished method, one data set twice, or runs whose configs
            differ in more than a cell may hold.
    """
    folders = find_runs(paths)
    played, runs, notes = read_runs(folders)
    if not played:
        reasons = "\n  ".join(notes) or "no round is done"
        raise ReportError(
            f"none of {len(folders)} runs has a finished method yet:\n  {reasons}\n"
            "wait for them, or go on with `ssl2rl run ... --resume`"
        )
    counted = Counter(p.navigator for p in played)
    order = [*PAPER_NAVIGATORS, *sorted(counted)]
    navigators = sorted(counted, key=lambda name: (-counted[name], order.index(name)))
    main = navigators[0]
    of_main = [p for p in played if p.navigator == main]
    methods = in_order(p.method for p in of_main)
    fractions = sorted({p.labelled_fraction for p in played})
    durations = _durations(played)
    notes += _ended_early(played)
    if len(navigators) > 1:
        notes.append(
            f"Tables 1, 2 and 5 and all figures are of the runs that navigate by {main}; "
            f"{', '.join(navigators[1:])} stand in Table 4"
        )
    if all(len({p.seed for p in of_main if p.labelled_fraction == f}) < 2 for f in fractions):
        notes.append("One data set a cell (n=1) ranks nothing: run at least five seeds")
    return {
        "format": folder.FORMATS["report"],
        "format_version": FORMAT_VERSION,
        "version": own_version(),
        "runs": runs,
        "navigator": main,
        "methods": methods,
        "labelled_fractions": fractions,
        "durations_min": [float(duration) for duration in durations],
        "notes": notes,
        "tables": tables(played, runs, main, methods, fractions, durations, navigators),
        "figures": figures(of_main, methods, fractions, durations),
    }


def _durations(played: Sequence[Played]) -> list[str]:
    """Minutes of the evaluated sessions, as round.json names them, shortest first."""
    named = {
        name
        for p in played
        for row in p.rounds
        for name in ((row.get("return") or {}).get("test") or {})
    }
    return sorted(named, key=float)


def _ended_early(played: Sequence[Played]) -> Iterator[str]:
    for method in in_order(p.method for p in played):
        of_method = [p for p in played if p.method == method]
        if stopped := [p for p in of_method if p.stopped]:
            reasons = Counter(str(p.stopped) for p in stopped)
            shown = "; ".join(f"{number} x {why}" for why, number in reasons.most_common(3))
            yield (
                f"{method}: the loop ended early on {len(stopped)} of {len(of_method)} data sets "
                f"({shown}); their kept rounds count"
            )


def check_out(out: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raises ReportError where a report may not be written, before any work is done for it."""
    folder.check_out(out, "report", force=force)


def write_report(
    document: dict[str, Any], out: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Writes page, tables and figures of ``report`` into a folder; an earlier report gives way.

    Returns:
        The page. ``document`` gets the list of ``files``.

    Raises:
        ReportError: as ``check_out``.
    """
    check_out(out, force=force)
    files: dict[str, bytes] = {}
    for name, table in document["tables"].items():
        files[f"{name}.csv"] = to_csv(table["cells"])
        if table.get("differences"):
            files[f"{name}-differences.csv"] = to_csv(table["differences"])
    images = {}
    for name, figure in document["figures"].items():
        images[name] = files[f"{name}.png"] = draw(figure)
        files[f"{name}.csv"] = to_csv(points(figure))
    files["report.html"] = page(document, images).encode()
    folder.write(document, files, out, "report", force=force)
    return Path(out) / "report.html"


def format_report(document: Mapping[str, Any]) -> str:
    """Tables 1 (the longest session) and 2 (accuracy) for a terminal, then the notes."""
    fractions = document["labelled_fractions"]
    lines: list[str] = []
    for name, quantity in (
        ("table1", document["tables"]["table1"]["quantities"][-1:]),
        ("table2", document["tables"]["table2"]["quantities"][:1]),
    ):
        for q in quantity:
            table = document["tables"][name]
            cells = {
                (c["row"], c["labelled_fraction"]): c
                for c in table["cells"]
                if c["quantity"] == q["name"]
            }
            heads = [f"{percent(f):>24}" for f in fractions]
            lines += [f"{q['title']} (test squares, mean ± 95 % over data sets)"]
            lines += [f"{'':<28}" + "".join(heads)]
            for row in table["rows"]:
                if not any(cells[row["row"], f]["n"] for f in fractions):
                    continue
                texts = [cell_text(cells[row["row"], f], q["decimals"]) for f in fractions]
                lines.append(f"{row['title']:<28}" + "".join(f"{text:>24}" for text in texts))
            lines.append("")
    lines += [f"note: {note}" for note in document["notes"]]
    return "\n".join(lines).rstrip()
