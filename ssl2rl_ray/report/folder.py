"""The folder of a report or a comparison: one JSON document, and files that are made from it.

What was written before gives way to what is written now; what is not ours is left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl2rl_ray.report.results import ReportError, read_json

FORMATS = {"report": "ssl2rl-report", "compare": "ssl2rl-compare"}
"""What the document ``NAME.json`` calls its format."""


def check_out(out: str | os.PathLike[str], name: str, *, force: bool = False) -> None:
    """Raises ReportError where the folder may not be written, before any work is done for it."""
    folder = Path(out)
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ReportError(f"cannot write {folder}: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ReportError(f"cannot write {folder}: the folder {above} is read-only for you")
    if not folder.is_dir() or force or _written_before(folder, name):
        return
    if found := sorted(path.name for path in folder.iterdir()):
        raise ReportError(
            f"{folder} is not empty ({found[0]!r}) and holds no earlier {_WORDS[name]}: "
            "name another --out, or --force to write beside what is there"
        )


_WORDS = {"report": "report", "compare": "comparison"}


def _written_before(folder: Path, name: str) -> list[str]:
    """Files of an earlier document there; empty = none."""
    earlier = read_json(folder / f"{name}.json")
    names = earlier.get("files") if earlier.get("format") == FORMATS[name] else None
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def write(
    document: dict[str, Any],
    files: Mapping[str, bytes],
    out: str | os.PathLike[str],
    name: str,
    *,
    force: bool = False,
) -> None:
    """Writes ``NAME.json`` and the files; ``document`` gets their list. Raises as ``check_out``."""
    check_out(out, name, force=force)
    folder, main = Path(out), f"{name}.json"
    document["files"] = [main, *files]
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for old in _written_before(folder, name):
        if old not in files:
            (folder / old).unlink(missing_ok=True)
    # the document first: a write that was cut short is known for one, and made again
    for file, data in {main: text.encode(), **files}.items():
        partial = folder / f".{file}.{os.getpid()}.part"
        try:
            partial.write_bytes(data)
            partial.replace(folder / file)
        finally:
            partial.unlink(missing_ok=True)
