"""A Leginon session in the files of CryoRL (Li, Fan et al., eLife 2023; IBM/CryoRL-pytorch).

| file | a line |
|---|---|
| labels | name, x, y, CTF max resolution (Å), fit confidence; no header |
| predictions | name and the CTF resolution (Å) that a regressor predicted from the hole's image |
| hierarchy | every target with the columns of the labels; -1 = no value |
| timestamps | name, time of acquisition |

A CTF value below zero (measured or predicted) means "no value"; 100000 means that the fit failed,
which is a bad hole. Names carry the parents:
``21mar02c_grid1c_00019gr_00023sq_v01_00006hl_v01_00005en-a`` lies in the grid ``..gr``, the square
``..sq`` and the patch ``..hl``; a version ``_v01`` behind a target does not belong to its name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from envs.cryoem.calibration import uncalibrated_p
from envs.cryoem.types import HoleTable
from ssl2rl_ray.data.text import BadRow, DataError, RejectedRow, parse_rows, read_text

PathLike = str | os.PathLike[str]
Rows = dict[str, Any]
"""Value by name, in file order."""

FAILED_FIT_A = 20.0
"""Å; failed fits (100000 in the files) and everything worse are clipped here, as CryoRL does."""
MIN_CTF_A = 0.5
"""Å; no microscope resolves less, so a smaller value is in another unit (nm) or damaged."""
MAX_NUMBER = 1e9
"""Positions (pixels, or stage units) beyond it are damage."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?")
_HOLE = re.compile(
    r"(?P<patch>(?P<square>(?P<grid>[A-Za-z0-9_.+-]*?[0-9]gr)(?:_v[0-9]+)?_[0-9]+sq)(?:_v[0-9]+)?_[0-9]+hl)"
    r"(?:_v[0-9]+)?_[0-9]+en(?:-[A-Za-z0-9]+)?(?:_v[0-9]+)?"
)


class Parents(NamedTuple):
    """Names of the targets in which a hole lies."""

    grid: str
    square: str
    patch: str


class _Target(NamedTuple):
    x: float
    y: float
    ctf_A: float
    """NaN = no value."""

    @classmethod
    def unknown(cls) -> _Target:
        return cls(math.nan, math.nan, math.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class CryorlSession:
    """What one import found."""

    table: HoleTable
    """Rows in the order of the labels (else of the predictions, else of the hierarchy)."""
    rejected: tuple[RejectedRow, ...]
    """File by file, each by line."""
    notes: tuple[str, ...]
    """What a user should know although nothing is wrong."""
    sources: tuple[dict[str, str | int], ...]
    """role, path, sha256, bytes, lines (non-blank), kept, rejected of each file."""
    acquired: NDArray[np.datetime64] | None
    """(N,) datetime64[us], NaT = unknown; None without a timestamps file."""


def read_cryorl(
    labels: PathLike | None,
    predictions: PathLike | None = None,
    *,
    hierarchy: PathLike | None = None,
    timestamps: PathLike | None = None,
) -> HoleTable:
    """The hole table of ``parse_cryorl``; bad rows are kept out silently."""
    return parse_cryorl(labels, predictions, hierarchy=hierarchy, timestamps=timestamps).table


def import_cryorl(
    labels: PathLike | None,
    predictions: PathLike | None = None,
    *,
    hierarchy: PathLike | None = None,
    timestamps: PathLike | None = None,
) -> tuple[HoleTable, tuple[RejectedRow, ...]]:
    """The hole table of ``parse_cryorl`` and every row that was kept out."""
    session = parse_cryorl(labels, predictions, hierarchy=hierarchy, timestamps=timestamps)
    return session.table, session.rejected


def parse_cryorl(
    labels: PathLike | None,
    predictions: PathLike | None = None,
    *,
    hierarchy: PathLike | None = None,
    timestamps: PathLike | None = None,
) -> CryorlSession:
    """Reads a session; every bad row is named, the rest is imported.

    The holes are those of ``labels``; without labels those of ``predictions``; with neither, the
    exposures of ``hierarchy`` (each once: ``en-a`` replaces its ``en``). The probability of a hole
    is CryoRL's 1 / (1 + exp(predicted - 6 Å)), uncalibrated, and 0.5 where there is no prediction.

    Raises:
        DataError: no file given, a file that cannot be used at all, or files of two sessions.
    """
    if labels is None and predictions is None and hierarchy is None:
        raise DataError("no holes: give --labels, --predictions or --hierarchy")
    rejected: list[RejectedRow] = []
    sources: list[dict[str, str | int]] = []
    notes: list[str] = []

    def load(role: str, path: PathLike | None, parse: Callable[[str], tuple[str, Any]]) -> Rows:
        if path is None:
            return {}
        text = read_text(path, role)
        rows, bad = parse_rows(text, parse, role)
        rejected.extend(bad)
        counts = {"lines": text.num_lines, "kept": len(rows), "rejected": len(bad)}
        sources.append(
            {"role": role, "path": text.name, "sha256": text.sha256, "bytes": text.num_bytes}
            | counts
        )
        if not text.has_final_newline:
            notes.append(
                f"{role}: the last line has no line end; copy the file again if it was cut"
            )
        return rows

    targets = load("hierarchy", hierarchy, _target)
    parents_of = _ParentsOf(frozenset(targets))

    def with_parents(parse: Callable[[str], tuple[str, Any]]) -> Callable[[str], tuple[str, Any]]:
        def row(line: str) -> tuple[str, Any]:
            name, value = parse(line)
            return name, (parents_of(name), value)

        return row

    if labels is not None:
        holes = load("labels", labels, with_parents(_target))
        predicted = load("predictions", predictions, _prediction)
    elif predictions is not None:
        found = load("predictions", predictions, with_parents(_prediction))
        predicted = {name: value for name, (_, value) in found.items()}
        holes = {name: (parents, _position(targets, name)) for name, (parents, _) in found.items()}
    else:
        holes, predicted = _exposures(targets, parents_of), {}
        if not holes:
            raise DataError(
                f"hierarchy: no exposure (..en) among the {len(targets)} targets of {hierarchy}: "
                "give --labels or --predictions, which name the holes"
            )
    times = load("timestamps", timestamps, _time)

    names = list(holes)
    value = np.array([predicted.get(name, np.nan) for name in names])
    if predictions is not None:
        _check_overlap(
            "prediction", np.isfinite(value), len(predicted.keys() - holes.keys()), notes
        )
    acquired = None
    if timestamps is not None:
        acquired = np.array([times.get(name, "NaT") for name in names], "datetime64[us]")
        _check_overlap(
            "time of acquisition", ~np.isnat(acquired), 0, notes
        )  # times are of all targets
    x, y, ctf = np.array([target for _, target in holes.values()], float).T
    table = HoleTable.from_names(
        hole_name=names,
        grid=[parents.grid for parents, _ in holes.values()],
        square=[parents.square for parents, _ in holes.values()],
        patch=[parents.patch for parents, _ in holes.values()],
        x=x,
        y=y,
        ctf_max_resolution_A=np.minimum(ctf, FAILED_FIT_A),
        predicted_ctf_A=value,
        p_low_ctf=np.where(np.isfinite(value), uncalibrated_p(value), 0.5),
    )
    if labels is not None and not table.is_labelled.any():
        notes.append("labels: no hole has a CTF value; all are imported as unlabelled")
    return CryorlSession(
        table=table,
        rejected=tuple(rejected),
        notes=tuple(notes),
        sources=tuple(sources),
        acquired=acquired,
    )


class _ParentsOf:
    """Hole name -> Parents, or BadRow; by the name, else by the targets of the hierarchy."""

    def __init__(self, targets: frozenset[str]) -> None:
        self._targets = targets
        self._parent: dict[str, str] = {}  # of a patch and of a square, as first seen

    def __call__(self, name: str) -> Parents:
        if match := _HOLE.fullmatch(name):
            found = Parents(*match.group("grid", "square", "patch"))
        else:
            found = self._from_hierarchy(name)
        for child, parent in ((found.patch, found.square), (found.square, found.grid)):
            if self._parent.setdefault(child, parent) != parent:
                raise BadRow(f"{child} lies in {self._parent[child]} by an earlier row")
        return found

    def _from_hierarchy(self, name: str) -> Parents:
        child, chain = name, []
        for level in ("hl", "sq", "gr"):
            cuts = (m.start() for m in reversed(list(re.finditer("_", child))))
            prefixes = (child[:cut] for cut in cuts)
            child = next((p for p in prefixes if p.endswith(level) and p in self._targets), "")
            chain.append(child)
        if not all(chain):
            raise BadRow(
                "not a hole: the name is not of the form ..gr_..sq_..hl_..en, "
                "nor are its parents in the hierarchy"
            )
        return Parents(*reversed(chain))


def _exposures(targets: Rows, parents_of: _ParentsOf) -> Rows:
    """The holes among all targets; what was acquired (``en-a``) replaces its target (``en``)."""
    acquired = {name.partition("en-")[0] + "en" for name in targets if "en-" in name}
    holes: Rows = {}
    for name, target in targets.items():
        if name in acquired or not _HOLE.fullmatch(name):
            continue
        try:
            holes[name] = (parents_of(name), target)
        except BadRow:  # its patch contradicts an earlier one; the row stays a target
            continue
    return holes


def _position(targets: Rows, name: str) -> _Target:
    """The hole's target without its CTF value (the file of labels was not given on purpose)."""
    found = targets.get(name) or targets.get(name.partition("en-")[0] + "en") or _Target.unknown()
    return found._replace(ctf_A=math.nan)


def _target(line: str) -> tuple[str, _Target]:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 5:
        raise BadRow(f"{len(fields)} columns, expected 5: name, x, y, CTF (Å), confidence")
    name = _valid_name(fields[0])
    x = _valid_number(fields[1], "x")
    y = _valid_number(fields[2], "y")
    ctf = _valid_number(fields[3], "CTF")
    _valid_number(fields[4], "confidence")
    if ctf < 0:
        ctf = math.nan
    elif ctf < MIN_CTF_A:
        raise BadRow(f"CTF {fields[3]} is below {MIN_CTF_A} Å; is it in nm?")
    return name, _Target(x, y, ctf)


def _prediction(line: str) -> tuple[str, float]:
    fields = line.replace(",", " ").split()
    if len(fields) != 2:
        raise BadRow(f"{len(fields)} columns, expected 2: name, predicted CTF (Å)")
    value = _valid_number(fields[1], "prediction")
    return _valid_name(fields[0]), value if value >= 0 else math.nan


def _time(line: str) -> tuple[str, datetime]:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != 2:
        raise BadRow(f"{len(fields)} columns, expected 2: name, time")
    name = _valid_name(fields[0])
    try:
        if _TIME.fullmatch(fields[1]):
            return name, datetime.fromisoformat(fields[1])
    except ValueError:
        pass
    raise BadRow(f"time {fields[1][:40]!r} is not of the form 2021-03-02 12:44:07")


def _valid_name(field: str) -> str:
    if not _NAME.fullmatch(field) or ".." in field:
        raise BadRow(
            "the name must be 1 to 200 letters, digits and _ . + -, without '..'"
            if field
            else "the name is empty"
        )
    return field


def _valid_number(field: str, column: str) -> float:
    if not _NUMBER.fullmatch(field):
        raise BadRow(f"{column} {field[:40]!r} is not a number")
    value = float(field)
    if abs(value) > MAX_NUMBER:  # infinity too: 1e400 is a well-formed number
        raise BadRow(f"{column} {field[:40]} is beyond {MAX_NUMBER:g}")
    return value


def _check_overlap(what: str, has: NDArray[np.bool_], num_unused: int, notes: list[str]) -> None:
    """Notes the holes that lack something, and raises DataError if all of them do."""
    if not has.any():
        raise DataError(f"no hole has a {what}: are the files of the same session?")
    if missing := int((~has).sum()):
        notes.append(f"{missing} of {len(has)} holes have no {what}")
    if num_unused:
        notes.append(f"{num_unused} rows with a {what} name no hole of this session")
