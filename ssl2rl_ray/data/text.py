"""Text files as they come from a microscope PC: numbered lines, whatever the bytes are."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
"""A session of 100 000 holes has label files of 12 MB; what is larger is another kind of file."""
MAX_LINES = 1_000_000
MAX_LINE_LENGTH = 10_000
"""Characters; the longest real line has about 120."""
_SHOWN = 80

_BOMS = (  # UTF-32 first: its little-endian mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
_NOT_TEXT = (
    (b"\x1f\x8b", "compressed by gzip: unpack it (gunzip)"),
    (b"BZh", "compressed by bzip2: unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it (unzstd)"),
    (b"PK\x03\x04", "a zip archive, xlsx or npz: unpack it, or export it as CSV"),
    (b"\x89HDF", "HDF5, not text: export it as CSV"),
    (b"\x93NUMPY", "a numpy array, not text: export it as CSV"),
    (b"PAR1", "Parquet, not text: export it as CSV, or pass an imported folder by --data"),
    (b"%PDF", "a PDF, not text"),
    (b"\x80\x04\x95", "a pickle, which is never opened here: export it as CSV"),
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the data: run `git lfs pull` where it came from",
    ),
)
_UNCLEAN = re.compile(r"[^\t\x20-\x7e]")


class DataError(ValueError):
    """Data cannot be used; the message says what, where, and what to do next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedRow:
    """A line, or a whole image, that was kept out."""

    file: str
    """As the caller named it; of an image the caller's folder and the file's name."""
    line: int | None
    """1-based; None: the file as a whole, as of an image."""
    reason: str
    text: str = ""
    """Its beginning, quoted and escaped: safe in a terminal and in a spreadsheet."""

    @property
    def origin(self) -> str:
        """What a user named: the file of a line, the folder of an image."""
        return self.file if self.line is not None else os.path.join(os.path.dirname(self.file), "")

    def __str__(self) -> str:
        """One line for people."""
        where = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{where}: {self.reason}" + (f": {self.text}" if self.text else "")


class BadRow(Exception):  # noqa: N818  (an outcome of a row, never seen by a caller)
    """Raised by a row parser with the reason."""


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """The non-blank lines of one file."""

    name: str
    sha256: str
    num_bytes: int
    lines: tuple[tuple[int, str], ...]
    """(number, text) of the lines that are clean ASCII."""
    rejected: tuple[RejectedRow, ...]
    """The non-blank lines that are not."""
    has_final_newline: bool

    @property
    def num_lines(self) -> int:
        """Non-blank lines."""
        return len(self.lines) + len(self.rejected)


def read_text(path: str | os.PathLike[str], what: str) -> TextFile:
    """Reads a regular file of text lines; bad lines are listed, the rest is returned.

    Line ends are those of Unix, Windows and old Macs. UTF-8, and by their byte-order mark UTF-16
    and UTF-32, are understood; names and numbers are ASCII, so a line with anything else is
    rejected.

    Args:
        path: the file.
        what: what it is meant to be, for messages ("labels").

    Raises:
        DataError: missing, a folder, not a regular file, too large, empty, or known not to be text.
    """
    name = os.fspath(path)
    data = _read_bytes(name, what)
    for magic, meaning in _NOT_TEXT:
        if data.startswith(magic):
            raise DataError(f"{what}: {name} is {meaning}, then import again")
    text = _decode(data)
    contents = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if len(contents) > MAX_LINES:
        raise DataError(f"{what}: {name} has more than {MAX_LINES} lines: is it the right file?")
    lines, rejected = [], []
    for number, content in enumerate(contents, 1):
        if not content.strip(" \t"):
            continue
        if reason := _unclean(content):
            rejected.append(reject(name, number, reason, content))
        else:
            lines.append((number, content))
    if not lines and not rejected:
        raise DataError(f"{what}: {name} is empty: export it again")
    return TextFile(
        name=name,
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        lines=tuple(lines),
        rejected=tuple(rejected),
        has_final_newline=not contents[-1],
    )


def parse_rows(
    text: TextFile, parse: Callable[[str], tuple[str, Any]], what: str
) -> tuple[dict[str, Any], list[RejectedRow]]:
    """Parses every line into (name, value); of equal names the first is kept.

    Returns the values by name in file order, and every non-blank line that is not among them.

    Raises:
        DataError: no line is usable.
    """
    rows: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    rejected = list(text.rejected)
    for number, content in text.lines:
        try:
            name, value = parse(content)
            if name in rows:
                raise BadRow(f"{name} is already on line {first_line[name]}, which is kept")
        except BadRow as bad:
            rejected.append(reject(text.name, number, str(bad), content))
            continue
        rows[name] = value
        first_line[name] = number
    rejected.sort(key=lambda row: row.line or 0)
    if not rows:
        shown = "\n  ".join(str(row) for row in rejected[:3])
        raise DataError(
            f"{what}: none of the {text.num_lines} lines of {text.name} is usable; the first:\n  "
            f"{shown}\ncheck that it is the {what} file and how it was exported"
        )
    return rows, rejected


def reject(file: str, line: int, reason: str, text: str) -> RejectedRow:
    """A rejected row with its text shortened and escaped."""
    shown = ascii(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
    return RejectedRow(file=file, line=line, reason=reason, text=shown)


def _read_bytes(name: str, what: str) -> bytes:
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{what}: {name} is a folder: give the file itself")
        if not stat.S_ISREG(mode):  # a pipe or a device may never end
            raise DataError(f"{what}: {name} is not a regular file: copy it to one first")
        with Path(name).open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{what}: there is no file {name}: check the path") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{what}: cannot read {name!r}: {error}") from error
    if len(data) > MAX_BYTES:
        raise DataError(
            f"{what}: {name} is larger than {MAX_BYTES // 2**20} MiB: is it the right file?"
        )
    return data


def _decode(data: bytes) -> str:
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            body = data[len(mark) :]
            errors = "surrogateescape" if encoding == "utf-8" else "replace"
            return body.decode(encoding, errors)
    return data.decode("utf-8", "surrogateescape")


def _unclean(content: str) -> str | None:
    """Why a line cannot hold names and numbers, or None."""
    if len(content) > MAX_LINE_LENGTH:
        return f"{len(content)} characters, more than {MAX_LINE_LENGTH}"
    if (found := _UNCLEAN.search(content)) is None:
        return None
    code, column = ord(found.group()), found.start() + 1
    if 0xDC80 <= code <= 0xDCFF or code == 0xFFFD:
        return f"undecodable bytes at column {column} (expected UTF-8)"
    if code < 0x80:
        return f"control character {code:#04x} at column {column}"
    return f"non-ASCII character U+{code:04X} at column {column}"
