"""The page: one HTML file that needs nothing beside it, made from the values of ``report.json``."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ssl2rl_ray.report.results import number_at, percent
from ssl2rl_ray.report.tables import NOT_AT_HAND, PAPER, PAPER_NOTE, number

_ONE = "n=1: ranks nothing"
_CSS = """
:root { --ink: #222220; --soft: #5f5f5a; --line: #d9d9d4; --band: #f5f5f2; --blue: #1f5c93; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
h4 { font-size: .9rem; margin: 1rem 0 .2rem; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-end; }
.beside table { font-size: .8rem; }
.beside th, .beside td { padding-right: .5rem; }
.beside th:first-child { width: 8.2rem; min-width: 7rem; }
p, ul { margin: .4rem 0; max-width: 48rem; }
a { color: var(--blue); }
.lead, figcaption, .caption, footer { color: var(--soft); font-size: .9rem; }
nav { background: var(--band); padding: .7rem 1rem; margin: 1.2rem 0; font-size: .92rem; }
nav ul { columns: 20rem; column-gap: 2.5rem; margin: .3rem 0 0; padding-left: 1.1rem;
  max-width: none; }
.note { border-left: 3px solid #c98a00; padding-left: 1.6rem; font-size: .92rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
th[scope=row] { font-weight: normal; min-width: 8.5rem; padding-right: 1rem; }
td { white-space: nowrap; }
tr.group th { background: var(--band); font-weight: 600; font-size: .8rem; padding-left: .4rem; }
td .n { color: var(--soft); font-size: .76rem; }
td small, th small { display: block; color: var(--soft); font-size: .76rem; font-weight: normal; }
td.established { font-weight: 600; }
td.none { color: var(--soft); }
figure { margin: 1rem 0 0; }
figure img { max-width: 100%; height: auto; display: block; }
figure .scroll img.wide { min-width: 40rem; }
code { font-size: .88em; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  body { padding: 1rem .8rem 3rem; }
  th[scope=row] { min-width: 7rem; position: sticky; left: 0; background: #fff; }
  h1 { font-size: 1.4rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, h3, h4 { break-after: avoid; }
  tr, figure { break-inside: avoid; }
  table, .beside table { font-size: 8pt; }
  .scroll { overflow: visible; }
  figure .scroll img.wide { min-width: 0; }
  a { color: inherit; text-decoration: none; }
}
"""


def page(document: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        document: as ``report`` returns it.
        images: PNG of every figure, by its name.
    """
    sections = [
        ("data", "What was run", _about(document)),
        *(
            (name, table["title"], _anova(table) if name == "table3" else _table(name, table))
            for name, table in document["tables"].items()
        ),
        *(
            (name, figure["title"], figure_html(name, figure, images[name]))
            for name, figure in document["figures"].items()
        ),
    ]
    footer = (
        f'<p id="paper-note">¹ {escape(PAPER_NOTE)} Source: {escape(PAPER["source"])}.</p>\n'
        f"<p>ssl2rl-ray {escape(document['version'])}; all numbers: "
        '<a href="report.json">report.json</a>.</p>'
    )
    return frame(
        "SSL²-RL: report",
        "SSL²-RL: classifier and policy under few labels",
        _lead(document),
        document["notes"],
        sections,
        footer,
    )


def frame(
    title: str,
    heading: str,
    lead: str,
    notes: Sequence[str],
    sections: Sequence[tuple[str, str, str]],
    footer: str,
) -> str:
    """A page of sections, each a name, a heading and HTML; ``lead`` and ``footer`` are HTML too."""
    contents = "".join(f'<li><a href="#{_id(i)}">{escape(t)}</a></li>' for i, t, _ in sections)
    body = "\n".join(
        f'<section id="{_id(name)}"><h2>{escape(text)}</h2>\n{content}</section>'
        for name, text, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>{escape(heading)}</h1>
<p class="lead">{lead}</p>
{_notes(notes)}
</header>
<nav aria-label="Contents"><strong>Contents</strong><ul>{contents}</ul></nav>
<main>
{body}
</main>
<footer>{footer}
</footer>
</body>
</html>
"""


def _id(name: str) -> str:
    return escape("".join(c if c.isalnum() else "-" for c in name), quote=True)


def _lead(document: Mapping[str, Any]) -> str:
    runs = document["runs"]
    seeds = len({run["seed"] for run in runs})
    fractions = ", ".join(percent(f) for f in document["labelled_fractions"])
    what = "data set" if len(runs) == 1 else "data sets"
    return escape(
        f"{len(runs)} {what} ({seeds} seed{'s' * (seeds != 1)}; labelled {fractions}), navigation "
        f"by {document['navigator']}. Rounds are kept by the selection squares, numbers are of "
        "the test squares. Every cell: mean ± half of Student's 95 % interval over data sets, and "
        "the number n of data sets (seeds). Differences are paired; “established” means that the "
        "95 % interval excludes 0, without a correction for how many are looked at. Whether other "
        "settings of SSL²-RL would do better on such runs is what benchmarks/loop_search.py tries."
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<ul class="note">' + "".join(f"<li>{escape(n)}</li>" for n in notes) + "</ul>"


def _about(document: Mapping[str, Any]) -> str:
    """Data sets by fraction and navigator; a list of hundreds of runs stands in report.json."""
    counted: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        counted.setdefault((run["labelled_fraction"], run["navigator"]), []).append(run)
    lines = []
    for (fraction, navigator), runs in sorted(counted.items()):
        status = Counter(run["status"] for run in runs)
        seeds = sorted({run["seed"] for run in runs})
        methods = len({m for run in runs for m in run["methods"]})
        sizes = {
            name: sorted(
                {int(v) for run in runs if (v := number_at(run["sample"], name)) is not None}
            )
            for name in ("num_holes", "num_labelled")
        }
        holes, labelled = (
            "–" if not v else f"{v[0]}" if len(v) == 1 else f"{v[0]} to {v[-1]}"
            for v in sizes.values()
        )
        cells = [
            navigator,
            " ".join(map(str, seeds)) if len(seeds) <= 12 else f"{len(seeds)} seeds",
            ", ".join(f"{number_} {name}" for name, number_ in status.items()),
            str(methods),
            holes,
            labelled,
        ]
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{percent(fraction)}</th>{row}</tr>')
    heads = ("labelled", "navigation", "seeds", "runs", "methods", "holes", "labels used")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def _table(name: str, table: Mapping[str, Any]) -> str:
    parts = [f'<p class="caption">{escape(table["caption"])}</p>', _links(name, table)]
    titles = {row["row"]: row["title"] for row in table["rows"]}
    for quantity in table["quantities"]:
        cells = [c for c in table["cells"] if c["quantity"] == quantity["name"]]
        decimals = quantity["decimals"]
        parts.append(f"<h3>{escape(quantity['title'])}</h3>")
        parts.append(_by_fraction(table["rows"], cells, decimals, "method"))
        differences = []
        for other in table["against"]:
            found = [
                d
                for d in table["differences"]
                if d["quantity"] == quantity["name"] and d["against"] == other
            ]
            if found:
                less = f"less {titles[other]}"
                differences.append(
                    _by_fraction(table["rows"], found, decimals + 1, less, sign=True)
                )
        if differences:
            parts.append("<h4>Paired differences</h4>")
            parts.append(f'<div class="beside">{"".join(differences)}</div>')
    return "\n".join(parts)


def _by_fraction(
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
    decimals: int,
    heading: str,
    *,
    sign: bool = False,
) -> str:
    """Rows by labelled fraction; ``heading`` stands above the names of the rows."""
    fractions = sorted({cell["labelled_fraction"] for cell in cells})
    at = {(cell["row"], cell["labelled_fraction"]): cell for cell in cells}
    heads = "".join(f'<th scope="col">{percent(f)} labelled</th>' for f in fractions)
    lines = []
    for above, row in _grouped(rows, {cell["row"] for cell in cells}):
        if above is not None:
            lines.append(
                f'<tr class="group"><th colspan="{1 + len(fractions)}" scope="colgroup">'
                f"{escape(above)}</th></tr>"
            )
        line = "".join(_cell(at.get((row["row"], f)), decimals, sign=sign) for f in fractions)
        lines.append(f'<tr><th scope="row">{escape(row["title"])}</th>{line}</tr>')
    return scroll(
        f'<table><thead><tr><th scope="col">{escape(heading)}</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _grouped(
    rows: Sequence[Mapping[str, Any]], wanted: set[str]
) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """The wanted rows, each with its heading where a group begins."""
    last = None
    for row in rows:
        if row["row"] in wanted:
            yield (row["group"] if row["group"] != last else None), row
            last = row["group"]


def _cell(cell: Mapping[str, Any] | None, decimals: int, *, sign: bool = False) -> str:
    """A value with its interval and n; below it the paper's, or whether it is established."""
    if cell is None:
        return '<td class="none">–</td>'
    below, kind = "", ""
    if cell["n"] == 0:
        text, kind = "–" if cell.get("is_run", True) else "no run", ' class="none"'
    elif cell["n"] == 1:
        text = number(cell["mean"], decimals, sign=sign)
        below = f"<small>{_ONE}</small>"
    else:
        mean, half = number(cell["mean"], decimals, sign=sign), number(cell["half_width"], decimals)
        text = f"{mean} ± {half}"
        if "is_established" in cell:
            word = "established" if cell["is_established"] else "not established"
            kind = ' class="established"' if cell["is_established"] else ""
            below = f"<small>{word}, n={cell['n']}</small>"
        else:
            text += f' <span class="n">n={cell["n"]}</span>'
    paper = cell.get("paper")
    if paper == NOT_AT_HAND:
        below += f'<small>paper: {NOT_AT_HAND}<a href="#paper-note">¹</a></small>'
    elif paper is not None:
        below += f"<small>paper: {number(paper, 3)}</small>"
    return f"<td{kind}>{text}{below}</td>"


def _anova(table: Mapping[str, Any]) -> str:
    lines = []
    for share in (c for c in table["cells"] if c["quantity"] == "share"):
        units = next(
            c
            for c in table["cells"]
            if c["quantity"] == "units" and c["level"] == share["level"]
        )  # fmt: skip
        lines.append(
            f'<tr><th scope="row">{share["level"]}</th>{_cell(share | {"paper": None}, 4)}'
            f"<td>{number(share['paper'], 4)}</td>{_cell(units, 0)}</tr>"
        )
    heads = ("level", "share of the sum of squares", "paper", "units")
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    caption = f'<p class="caption">{escape(table["caption"])}</p>'
    return caption + _links("table3", table) + scroll(body)


def _links(name: str, table: Mapping[str, Any]) -> str:
    files = [f"{name}.csv"] + ([f"{name}-differences.csv"] if table.get("differences") else [])
    links = ", ".join(f'<a href="{escape(f, quote=True)}">{escape(f)}</a>' for f in files)
    return f'<p class="caption">Numbers: {links}</p>'


def figure_html(name: str, figure: Mapping[str, Any], image: bytes) -> str:
    """A figure in the page itself, with its caption and a link to its numbers."""
    data = base64.b64encode(image).decode()
    wide = ' class="wide"' if figure["columns"] > 1 else ""
    file = escape(f"{name}.csv", quote=True)
    return (
        f'<figure><div class="scroll"><img{wide} src="data:image/png;base64,{data}" '
        f'alt="{escape(figure["alt"], quote=True)}"></div>'
        f"<figcaption>{escape(figure['caption'])} Numbers: "
        f'<a href="{file}">{file}</a></figcaption></figure>'
    )


def scroll(table: str) -> str:
    """A table that scrolls by itself where the page is narrow."""
    return f'<div class="scroll" tabindex="0">{table}</div>'
