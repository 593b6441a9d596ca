"""EXtra-Xwiz configurations: tuning starts from what one says, and its result goes back into it.

EXtra-Xwiz runs CrystFEL at European XFEL from a TOML file; the peak search is in its section
``[indexamajig_run]``, or ``[proc_coarse]`` before 2022. Units and meaning are those of
``indexamajig``, so values go over as they are. The geometry is not in the file: a tuned one is a
new ``.geom``, whose path goes into ``[geom]``.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.crystfel.types import ParameterError, Parameters

SECTIONS = ("indexamajig_run", "proc_coarse")
NAMES = {
    "peak_snr": "min_snr",
    "peak_threshold": "threshold_adu",
    "peak_min_px": "min_pix_count",
    "peak_max_px": "max_pix_count",
    "local_bg_radius": "local_bg_radius_px",
    "max_res": "max_res_px",
    "min_peaks": "min_peaks",
}
"""EXtra-Xwiz's name -> ours."""


class XwizError(ValueError):
    """A configuration is not what it should be; the message names file, key and remedy."""


@dataclass(frozen=True, kw_only=True)
class XwizConfig:
    """What an EXtra-Xwiz configuration says about indexing."""

    parameters: Parameters
    """Those of its values; ours where it says nothing."""
    indexing: tuple[str, ...] = ()
    """Indexing methods; empty = it says nothing."""
    peaks: str = "peakfinder8"
    geometry: str = ""
    """Path of the ``.geom`` file as written; empty = it says nothing."""
    cell: str = ""


def read_xwiz(path: str | os.PathLike[str]) -> XwizConfig:
    """Reads a configuration. Raises XwizError: what is wrong, and where."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError as error:
        raise XwizError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error
    return parse_xwiz(text, os.fspath(path))


def parse_xwiz(text: str, source: str = "configuration") -> XwizConfig:
    """The same from text; ``source`` is its name in messages. Raises XwizError."""
    tree = _tree(text, source)
    section = _section(tree, source)
    values: dict[str, Any] = {}
    for name, ours in NAMES.items():
        if name not in (table := tree[section]):
            continue
        value = table[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise XwizError(
                f"{source}: [{section}] {name} is {_shown(value)}, and must be a number"
            )
        values[ours] = value
    try:
        parameters = Parameters().replace(**values)
    except ParameterError as error:
        raise XwizError(f"{source}: [{section}] {error}") from error

    def string(table: Any, key: str) -> str:
        value = table.get(key, "") if isinstance(table, dict) else ""
        if not isinstance(value, str):
            raise XwizError(f"{source}: {key} is {_shown(value)}, and must be a string")
        return value

    methods = string(tree[section], "index_method").split(",")
    unit_cell = tree.get("unit_cell")
    return XwizConfig(
        parameters=parameters,
        indexing=tuple(method.strip() for method in methods if method.strip()),
        peaks=string(tree[section], "peak_method") or "peakfinder8",
        geometry=string(tree.get("geom"), "file_path"),
        cell=string(unit_cell, "file_path")
        or string(unit_cell, "file")
        or string(tree[section], "unit_cell"),
    )


def tuned_xwiz(
    text: str, parameters: Parameters, *, geometry: str = "", source: str = "configuration"
) -> str:
    """A user's configuration with the peak search changed, everything else as it was.

    Args:
        text: the file.
        parameters: to write; offsets of the geometry do not go in here but into a ``.geom``.
        geometry: path of the tuned ``.geom``; empty = as it was.
        source: name of the file in messages.

    Returns:
        the text, which ``parse_xwiz`` reads as these parameters.

    Raises:
        XwizError: a layout in which the values cannot be placed.
    """
    section = _section(_tree(text, source), source)
    ours = parameters.as_dict()
    wanted = {section: {name: f"{ours[own]:.12g}" for name, own in NAMES.items()}}
    if geometry:
        wanted["geom"] = {"file_path": _quoted(geometry)}
    lines: list[str] = []
    left: dict[str, str] = {}
    for line in [*text.splitlines(), "[]"]:  # the empty header ends the last section
        if header := re.match(r"\s*\[([^\[\]]*)\]", line):
            end = len(lines)
            while end and not lines[end - 1].strip():
                end -= 1
            lines[end:end] = [f"{name} = {value}" for name, value in left.items()]
            left = wanted.pop(header[1].strip(), {})
        elif (match := _ASSIGNMENT.match(line)) and match[2] in left:
            line = f"{match[1]}{left.pop(match[2])}{match[3]}"
        lines.append(line)
    tuned = "\n".join(lines[:-1]) + "\n"
    for name, values in wanted.items():
        tuned += f"\n[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
    try:
        is_placed = _same(parse_xwiz(tuned, source), parameters, geometry)
    except XwizError:
        is_placed = False
    if not is_placed:
        raise XwizError(
            f"{source}: the values cannot be placed: write its sections as [{section}] and [geom], "
            "with one `name = value` per line"
        )
    return tuned


_ASSIGNMENT = re.compile(r"(\s*([A-Za-z_]+)\s*=\s*)(?:\"[^\"]*\"|'[^']*'|[^\s#]+)(\s*(?:#.*)?)$")


def _same(config: XwizConfig, parameters: Parameters, geometry: str) -> bool:
    ours, read = parameters.as_dict(), config.parameters.as_dict()
    is_same = all(abs(ours[n] - read[n]) <= 1e-9 * abs(ours[n]) for n in NAMES.values())
    return is_same and config.geometry == (geometry or config.geometry)


def _tree(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise XwizError(f"{source}: is no TOML: {error}") from error


def _section(tree: dict[str, Any], source: str) -> str:
    for name in SECTIONS:
        if isinstance(tree.get(name), dict):
            return name
    raise XwizError(f"{source}: has no [{SECTIONS[0]}] section: is it an EXtra-Xwiz configuration?")


def _quoted(text: str) -> str:
    if not text.isprintable():
        raise XwizError(f"the path {_shown(text)} cannot be written into TOML")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shown(value: object) -> str:
    return repr(value)[:60]
