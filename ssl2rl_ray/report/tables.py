"""The tables: mean and interval over data sets, paired differences, and the paper beside them.

Every cell counts its data sets: ``n``, their seeds and values stand in it. Differences are paired
over seeds (same seed, fraction and navigator) and called established only where the 95 % interval
excludes 0; nothing is corrected for how many differences are looked at.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssl2rl_ray.report.results import CONTROLS, GROUPS, Played, group, in_order, number_at, title
from ssl2rl_ray.stats import or_none, summarize

NOT_AT_HAND = "not at hand"

PAPER: dict[str, Any] = {
    "source": "Xu et al., SSL²-RL, tables 1-3",
    # table 2: accuracy by method and labelled fraction; supervised at 100 % is `full-labels`
    "accuracy": {
        ("supervised", 0.05): 0.571,
        ("supervised", 0.1): 0.619,
        ("supervised", 0.2): 0.630,
        ("full-labels", 1.0): 0.652,
        ("fixmatch", 0.05): 0.623,
    },
    # table 1: SSL²-RL at 10 % of the labels, and full labels
    "return": {"ssl2rl at 10 %": 65.73, "full-labels": 69.76},
    # table 3: shares of the sum of squares of CTF
    "anova": {"grid": 0.0462, "square": 0.1471, "patch": 0.2704, "hole": 0.5363},
}
"""All that is at hand of the paper's numbers. Its other cells read ``not at hand``."""
PAPER_NOTE = (
    "The published tables beyond these numbers were not available to us, so every other cell of "
    "the paper reads “not at hand”. The paper's absolute returns are of another data set (Y3, "
    "which is not public): only ratios compare."
)

AGAINST = ("iterative-fixmatch", "labelled-only")
"""What every method is compared with."""
PAPER_NAVIGATORS = ("dqn", "rainbow", "a2c")
"""Algorithms of the paper's table 4."""
_OF_TABLE_4 = ("ssl2rl-480", "ssl2rl-120", *GROUPS["ablations"])
"""Its rows in the paper, as far as we know them."""
_ALWAYS = (*GROUPS["the paper's methods"], *CONTROLS)
"""Rows of tables 1 and 2, run or not."""
_LEVELS = ("grid", "square", "patch", "hole")

Key = tuple[int, float]
"""A data set: seed, labelled fraction."""


def figures_of(by_seed: Mapping[int, float]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds; without an interval where one seed is all."""
    seeds = sorted(by_seed)
    if not seeds:
        return {"n": 0, "mean": None, "half_width": None, "ci95": [None, None], "sd": None} | {
            "seeds": [],
            "values": [],
        }
    found = summarize([by_seed[seed] for seed in seeds])
    return {
        "n": len(seeds),
        "mean": or_none(found.mean),
        "half_width": or_none(found.half_width),
        "ci95": [or_none(bound) for bound in found.ci95],
        "sd": or_none(found.sd),
        "seeds": seeds,
        "values": list(found.values),
    }


def _difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    """Paired over the seeds that both have; established: the 95 % interval excludes 0."""
    found = figures_of({seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()})
    low, high = found["ci95"]
    return found | {"is_established": low is not None and (low > 0 or high < 0)}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of a table: which results it takes its numbers from."""

    name: str
    title: str
    group: str
    method: str
    navigator: str
    kept_by: str
    against: tuple[str, ...] = ()
    """Rows that it is compared with besides those that all are."""


def _by_seed(
    played: Sequence[Played], row: _Row, path: tuple[str, ...], fraction: float
) -> dict[int, float]:
    """The row's number of every data set of a fraction, where it is defined."""
    found = {}
    for p in played:
        if (p.method, p.navigator, p.labelled_fraction) == (row.method, row.navigator, fraction):
            value = p.at(row.kept_by, *path)
            if value is not None:
                found[p.seed] = value
    return found


def _table(
    played: Sequence[Played],
    rows: Sequence[_Row],
    quantities: Sequence[Mapping[str, Any]],
    fractions: Sequence[float],
    against: Sequence[str],
    **about: Any,
) -> dict[str, Any]:
    """Cells and paired differences of every row, quantity and fraction.

    A quantity is ``name, title, path, decimals`` and, where rows have their own, ``paths`` by row
    name. ``against`` names rows, which all others are compared with.
    """
    cells, differences = [], []
    references = list(dict.fromkeys([*against, *(other for row in rows for other in row.against)]))
    for quantity in quantities:
        for fraction in fractions:
            values = {
                row.name: _by_seed(
                    played, row, quantity.get("paths", {}).get(row.name, quantity["path"]), fraction
                )
                for row in rows
            }
            for row in rows:
                where = {
                    "quantity": quantity["name"],
                    "row": row.name,
                    "method": row.method,
                    "navigator": row.navigator,
                    "kept_by": row.kept_by,
                    "labelled_fraction": fraction,
                }
                paper = _paper(quantity["name"], row, fraction)
                is_run = any(
                    (p.method, p.navigator, p.labelled_fraction)
                    == (row.method, row.navigator, fraction)
                    for p in played
                )
                about_cell = {"paper": paper, "is_run": is_run}
                cells.append(where | figures_of(values[row.name]) | about_cell)
                for other in dict.fromkeys((*against, *row.against)):
                    if other != row.name and values.get(other):
                        found = _difference(values[row.name], values[other])
                        if found["n"]:
                            differences.append(where | {"against": other} | found)
    return {
        **about,
        "rows": [{"row": r.name, "title": r.title, "group": r.group} for r in rows],
        "quantities": [{k: q[k] for k in ("name", "title", "decimals")} for q in quantities],
        "against": [other for other in references if any(r.name == other for r in rows)],
        "cells": cells,
        "differences": differences,
    }


def _paper(quantity: str, row: _Row, fraction: float) -> float | str | None:
    """The paper's number; None where the paper has no such row or quantity."""
    if row.name != row.method:  # of table 4
        is_there = row.method in _OF_TABLE_4 and row.navigator in PAPER_NAVIGATORS
        is_printed = quantity.startswith("return") or quantity == "accuracy"
        return NOT_AT_HAND if is_there and is_printed else None
    if row.method not in GROUPS["the paper's methods"]:
        return None
    if quantity == "accuracy":
        at = 1.0 if row.method == "full-labels" else round(fraction, 6)
        return PAPER["accuracy"].get((row.method, at), NOT_AT_HAND)
    is_printed = quantity.startswith("return") or quantity in ("auc", "precision")
    return NOT_AT_HAND if is_printed else None


def tables(
    played: Sequence[Played],
    runs: Sequence[Mapping[str, Any]],
    main: str,
    methods: Sequence[str],
    fractions: Sequence[float],
    durations: Sequence[str],
    navigators: Sequence[str],
) -> dict[str, Any]:
    """Tables 1 to 7 by file name.

    Args:
        played: of all navigators.
        runs: as ``results.read_runs`` gives them; their samples are table 3.
        main: the navigator of all tables but the fourth.
        methods: run with it, in order.
        fractions: labelled fractions, the columns.
        durations: minutes of the evaluated sessions, as round.json names them.
        navigators: the main one first.
    """

    def rows(kept_by: str, *, is_whole: bool = False) -> list[_Row]:
        return [
            _Row(
                name=name,
                title=title(name),
                group=group(name),
                method=name,
                navigator=main,
                kept_by=kept_by,
            )
            for name in (in_order((*methods, *_ALWAYS)) if is_whole else methods)
        ]

    returns = [
        {
            "name": f"return-{duration}",
            "title": f"Episode return, sessions of {duration} min",
            "path": ("return", "test", duration, "episode_return"),
            "decimals": 1,
        }
        for duration in durations
    ]
    of_classifier = [
        {"name": name, "title": text, "path": ("classifier", "test", name), "decimals": 3}
        for name, text in (
            ("accuracy", "Accuracy"),
            ("auc", "AUC"),
            ("precision", "Precision"),
            ("accuracy_at_median", "Accuracy at the median (equal positive share)"),
        )
    ]
    of_posterior = [
        {"name": f"posterior-{name}", "title": text, "path": ("posterior", "test", name),
         "decimals": 3}
        for name, text in (("accuracy", "Posterior: accuracy"), ("auc", "Posterior: AUC"))
    ]  # fmt: skip
    no_run = [name for name in _ALWAYS if name not in methods]
    missing = f" No run of: {', '.join(map(title, no_run))}." if no_run else ""
    return {
        "table1": _table(
            played, rows("reward", is_whole=True), returns, fractions, AGAINST,
            title="Table 1: return of the navigation policy",
            caption="Episode return on the test squares, of the round that was kept by its return "
            "on the selection squares, in sessions as long as the method's RL was trained for, or "
            "else the longest. Full labels learn from all labels in every column. Where the policy "
            "sees the posterior, it also has the labels that the run knows in the judged squares "
            "(data.validation_labelled_fraction); the others have not." + missing,
        ),
        "table2": _table(
            played, rows("accuracy", is_whole=True), of_classifier, fractions, AGAINST,
            title="Table 2: quality of the classifier",
            caption="On the test squares, of the round that was kept by its accuracy on the "
            "selection squares. N_C sets a classifier's positive share, and with it its precision, "
            "almost mechanically: read AUC and the accuracy at the median beside them. Full labels "
            "learn from all labels in every column." + missing,
        ),
        "table3": _anova(runs),
        "table4": _ablations(played, main, navigators, methods, fractions, returns, of_classifier),
        "table5": _whole_system(played, rows, methods, fractions, durations),
        "table6": _table(
            played, rows("last"), [*of_classifier, *of_posterior, *returns], fractions, AGAINST,
            title="Table 6: after the last round, whatever was kept",
            caption="On the test squares, of the last round that was played: what a rule does to "
            "the classifier, without the noise of choosing a round. Posterior: classifier, "
            "neighbours and the labels that the run knows in the test squares.",
        ),
        "table7": _table(
            played, rows("auc"), [*of_classifier, *of_posterior], fractions, AGAINST,
            title="Table 7: quality of the classifier, kept by AUC",
            caption="As table 2, of the round that was kept by its AUC on the selection squares: "
            "where few labels are known there, it is less of a draw than the accuracy. Runs of "
            "earlier versions have not noted that round.",
        ),
    }  # fmt: skip


def _anova(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of the sum of squares over the different samples, of which runs may share one."""
    samples: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        sample = run["sample"]
        if any(number_at(sample, "anova", level) is not None for level in _LEVELS):
            what = {name: sample.get(name) for name in ("anova", "units")}
            samples.setdefault(json.dumps(what, sort_keys=True), sample)
    rows = []
    for level in _LEVELS:
        for quantity, path in (("share", "anova"), ("units", "units")):
            values = [number_at(sample, path, level) for sample in samples.values()]
            known = {i: value for i, value in enumerate(values) if value is not None}
            found = {k: v for k, v in figures_of(known).items() if k != "seeds"}
            paper = PAPER["anova"][level] if quantity == "share" else None
            rows.append({"level": level, "quantity": quantity} | found | {"paper": paper})
    return {
        "title": "Table 3: where the variance of CTF lies",
        "caption": "Shares of the sum of squares of the CTF resolution by level of the hierarchy "
        "(nested analysis of variance), over the different samples that the runs were made on.",
        "cells": rows,
    }


def _ablations(
    played: Sequence[Played],
    main: str,
    navigators: Sequence[str],
    methods: Sequence[str],
    fractions: Sequence[float],
    returns: Sequence[dict[str, Any]],
    of_classifier: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Algorithms and ablations; every row quotes return and accuracy of the same kept round."""

    def row(method: str, navigator: str, kept_by: str, heading: str, text: str) -> _Row:
        return _Row(
            name=f"{method}/{navigator}/{kept_by}",
            title=text,
            group=heading,
            method=method,
            navigator=navigator,
            kept_by=kept_by,
            # of the same algorithm: returns differ by it whatever the labels
            against=tuple(f"{m}/{navigator}/reward" for m in AGAINST),
        )

    has = {(p.method, p.navigator) for p in played}
    heading = "algorithm, and what the round is kept by"
    rows = [
        row(m, navigator, kept_by, heading, f"{title(m)}, {navigator}, kept by {kept_by}")
        for m in ("ssl2rl-480", "ssl2rl-120")
        for navigator in navigators
        for kept_by in ("reward", "accuracy")
        if (m, navigator) in has
    ]
    base = rows[0].name if rows else None
    heading = f"ablations ({main}, kept by reward)"
    rows += [row(m, main, "reward", heading, title(m)) for m in GROUPS["ablations"] if m in methods]
    heading = "controls and reference (kept by reward)"
    rows += [
        row(m, navigator, "reward", heading, f"{title(m)}, {navigator}")
        for navigator in navigators
        for m in ("iterative-fixmatch", *CONTROLS)
        if (m, navigator) in has and (navigator == main or m in AGAINST)
    ]
    no_run = [name for name in PAPER_NAVIGATORS if name not in navigators]
    no_run += [title(name) for name in GROUPS["ablations"] if name not in methods]
    missing = f" Rows of the paper without a run here: {', '.join(no_run)}." if no_run else ""
    return _table(
        played, rows, [*returns, of_classifier[0], of_classifier[1]], fractions,
        [base] if base else [],
        title="Table 4: algorithms and ablations",
        caption="On the test squares; return and accuracy are of the same round, kept as the row "
        "says. Runs of one data set are paired, whatever navigates; SSL²-RL is compared with "
        "iterative FixMatch of the same algorithm. The paper's own numbers of this table are not "
        "at hand." + missing,
    )  # fmt: skip


def _whole_system(
    played: Sequence[Played],
    rows: Callable[[str], list[_Row]],
    methods: Sequence[str],
    fractions: Sequence[float],
    durations: Sequence[str],
) -> dict[str, Any]:
    """Classifier + posterior against full supervision; return over that of full labels."""
    reference = ("classifier", "test")
    kinds = (("test", "with the labels known there"), ("test_blind", "without a label there"))
    systems = [
        {
            "name": f"system-{metric}-{split}",
            "title": f"{text} of classifier + posterior on the test squares, {how}",
            "path": ("posterior", split, metric),
            "paths": {"full-labels": (*reference, metric)},
            "decimals": 3,
        }
        for metric, text in (("accuracy", "Accuracy"), ("auc", "AUC"))
        for split, how in kinds
    ]
    by_accuracy = rows("accuracy")
    table = _table(
        played, by_accuracy, systems, fractions, ["full-labels"],
        title="Table 5: the whole system against full labels",
        caption="Classifier and hierarchical posterior together, of the round kept by accuracy, "
        "beside (full labels) a classifier alone that learned from all labels; then each method's "
        "return over that of full labels on the same data set (mean of the ratios), of the round "
        "kept by reward. "
        "The paper has 65.73 at 10 % and 69.76 with all labels (its table 1); for how long a "
        "session, is not at hand. "
        "No row is chosen here: the best of many rows on the test squares flatters itself.",
    )  # fmt: skip
    ratios = []
    for duration in durations:
        path = ("return", "test", duration, "episode_return")
        by_name = {row.name: row for row in rows("reward")}
        for fraction in fractions:
            full = by_name.get("full-labels")
            whole = _by_seed(played, full, path, fraction) if full else {}
            for row in by_name.values():
                if row is full:
                    continue
                own = _by_seed(played, row, path, fraction)
                shares = {s: own[s] / whole[s] for s in own.keys() & whole.keys() if whole[s]}
                paper = None
                if row.method in ("ssl2rl-120", "ssl2rl-480"):
                    is_there = round(fraction, 6) == 0.1
                    both = PAPER["return"]
                    paper = NOT_AT_HAND
                    if is_there:
                        paper = both["ssl2rl at 10 %"] / both["full-labels"]
                ratios.append(
                    {
                        "quantity": f"return-{duration}-ratio",
                        "row": row.name,
                        "method": row.method,
                        "navigator": row.navigator,
                        "kept_by": "reward",
                        "labelled_fraction": fraction,
                    }
                    | figures_of(shares)
                    | {"paper": paper}
                )
        table["quantities"].append(
            {
                "name": f"return-{duration}-ratio",
                "title": f"Return over that of full labels, sessions of {duration} min",
                "decimals": 3,
            }
        )
    table["cells"] += ratios
    return table


# ---- words and files -----------------------------------------------------------------------------


def number(value: float | None, decimals: int, *, sign: bool = False) -> str:
    """A figure as tables print it, with a true minus; a dash where it is not defined."""
    if value is None:
        return "–"
    value = round(value, decimals) + 0.0  # no minus before a zero
    text = f"{value:+.{decimals}f}" if sign and value else f"{value:.{decimals}f}"
    return text.replace("-", "−")


def cell_text(cell: Mapping[str, Any], decimals: int, *, sign: bool = False) -> str:
    """``mean ± half width (n=seeds)``."""
    if not cell["n"]:
        return "–"
    mean = number(cell["mean"], decimals, sign=sign)
    if cell["half_width"] is None:
        return f"{mean} (n={cell['n']})"
    return f"{mean} ± {number(cell['half_width'], decimals)} (n={cell['n']})"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One line a cell; what is not defined is empty, lists are joined by spaces."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    flat = [
        c for name in columns for c in (["ci95_low", "ci95_high"] if name == "ci95" else [name])
    ]
    writer.writerow(flat)
    for row in rows:
        line: list[Any] = []
        for name in columns:
            value = row.get(name)
            if name == "ci95":
                line += ["" if bound is None else bound for bound in value or (None, None)]
            elif isinstance(value, list | tuple):
                line.append(" ".join(map(str, value)))
            else:
                line.append("" if value is None else value)
        writer.writerow(line)
    return stream.getvalue().encode()
