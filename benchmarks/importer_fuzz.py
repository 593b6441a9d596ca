"""Mutated session files against the importer: no crash, and every line is kept or named.

    python benchmarks/importer_fuzz.py --inputs 10000

Files of the Aldolase session are mutated where they lie beside the repository (``--data``), else
files that this program makes. An input passes if the importer raises nothing but DataError, and if
the lines that it kept and the lines that it named are together the non-blank lines of the file.
"""

from __future__ import annotations

import argparse
import codecs
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssl2rl_ray.data import DataError, parse_cryorl

Rng = np.random.Generator
WIDE = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
WIDE_BOMS = tuple(WIDE)
ROLES = ("labels", "predictions", "hierarchy", "timestamps")
FILES = ("labels.csv", "predictions_resnet50.txt", "hierarchy.csv", "timestamps.csv")
NUMBERS = (
    b"nan inf -inf 1e400 -1e400 1e-400 -1 0 -0.0 100000 99999999999 0x1f 1_0 1,5 .5 5. +5 --5 1e"
).split()
TOKENS = [
    *NUMBERS,
    *(
        b"../../etc/passwd",
        b"..",
        b"=1+1",
        b"\0",
        b"\x1b[2J",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xc3",
    ),
    *("٣", "５", "é", "\u2028", "\x85", "\ufeff", "😀", "name", "NULL", '"', "'", "\\", "#", ";"),
    *(
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        b",",
        b" ",
        b"\x0b",
        b"\x0c",
        b"\x1c",
        b"x" * 20_000,
        b"9" * 5_000,
    ),
]
TOKENS = [token.encode() if isinstance(token, str) else token for token in TOKENS]


# ------------------------------------------------------------ mutations: (rng, bytes) -> bytes


def flip_bits(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for position in rng.integers(0, len(out), rng.integers(1, 30)):
        out[position] ^= 1 << int(rng.integers(8))
    return bytes(out)


def cut(rng: Rng, data: bytes) -> bytes:
    start, stop = np.sort(rng.integers(0, len(data) + 1, 2))
    return data[:stop] if rng.random() < 0.7 else data[start:stop]


def insert(rng: Rng, data: bytes) -> bytes:
    for _ in range(rng.integers(1, 20)):
        at = int(rng.integers(0, len(data) + 1))
        data = data[:at] + TOKENS[rng.integers(len(TOKENS))] + data[at:]
    return data


def insert_noise(rng: Rng, data: bytes) -> bytes:
    at = int(rng.integers(0, len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 200))) + data[at:]


def shuffle_lines(rng: Rng, data: bytes) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join(lines[i] for i in rng.permutation(len(lines)))


def repeat_lines(rng: Rng, data: bytes) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join(lines[i] for i in rng.integers(0, len(lines), len(lines) + 5))


def change_fields(rng: Rng, data: bytes) -> bytes:
    lines = data.split(b"\n")
    for at in rng.integers(0, len(lines), rng.integers(1, 12)):
        fields = re.split(rb"[, ]", lines[at])
        fields[rng.integers(len(fields))] = TOKENS[rng.integers(len(TOKENS))]
        if rng.random() < 0.3:
            rng.shuffle(fields)
        if rng.random() < 0.2:
            fields += fields[: rng.integers(len(fields) + 1)]
        if rng.random() < 0.2:
            fields = fields[: rng.integers(len(fields) + 1)]
        lines[at] = b",".join(fields)
    return b"\n".join(lines)


def change_digits(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for position in rng.integers(0, len(out), 60):
        if chr(out[position]).isdigit():
            out[position] = rng.choice(list(b"0123456789.-eE+"))
    return bytes(out)


def encode(rng: Rng, data: bytes) -> bytes:
    text = data.decode("latin-1")
    mark, name = (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (b"", "utf-16-le"),
        (b"", "utf-7"),
        (b"", "cp037"),
    )[rng.integers(8)]
    return mark + text.encode(name, "replace")


def change_newlines(rng: Rng, data: bytes) -> bytes:
    return data.replace(b"\n", (b"\r\n", b"\r", b"\n\n", b"\n \t\n", b"", b"\0")[rng.integers(6)])


def swap_separators(rng: Rng, data: bytes) -> bytes:
    return data.replace(b",", (b";", b"\t", b" ", b", ", b",,")[rng.integers(5)])


MUTATIONS: tuple[Callable[[Rng, bytes], bytes], ...] = (
    flip_bits,
    cut,
    insert,
    insert_noise,
    shuffle_lines,
    repeat_lines,
    change_fields,
    change_digits,
    encode,
    change_newlines,
    swap_separators,
)


# ------------------------------------------------------------ inputs


def load(folder: Path | None) -> dict[str, list[bytes]]:
    """Lines of each role, of the real session or of one made here."""
    if folder is not None and all((folder / name).is_file() for name in FILES):
        return {
            role: (folder / name).read_bytes().split(b"\n")
            for role, name in zip(ROLES, FILES, strict=True)
        }
    rng = np.random.default_rng(0)
    lines: dict[str, list[bytes]] = {role: [] for role in ROLES}
    for i in range(600):
        name = f"26jan01a_{i // 200:05d}gr_{i // 100:05d}sq_v01_{i // 10:05d}hl_v01_{i:05d}en-a"
        ctf = 100000.0 if i % 40 == 0 else rng.uniform(2, 20)
        x, y = rng.normal(0, 300, 2)
        lines["labels"].append(f"{name},{x},{y},{ctf:f},{rng.random()}".encode())
        lines["predictions"].append(f"{name} {rng.uniform(2, 20):.2f}".encode())
        lines["hierarchy"].append(f"{name},{x},{y},-1,-1".encode())
        lines["timestamps"].append(f"{name},2026-01-01 {i // 60:02d}:{i % 60:02d}:00".encode())
    return lines


def sample(rng: Rng, lines: list[bytes], others: list[bytes]) -> bytes:
    """Some lines in a row, the later ones of them sometimes from a file of another role."""
    num_lines = int(rng.integers(1, 80))
    start = int(rng.integers(0, max(len(lines) - num_lines, 1)))
    chosen = lines[start : start + num_lines]
    if rng.random() < 0.1:
        chosen = chosen + others[:10]
    return b"\n".join(chosen) + b"\n" * int(rng.random() < 0.9)


def num_lines_of(data: bytes) -> int:
    """Non-blank lines, counted apart from the importer."""
    for mark, name in WIDE.items():
        if data.startswith(mark):
            data = data[len(mark) :].decode(name, "replace").encode("utf-8", "replace")
            break
    data = data.removeprefix(codecs.BOM_UTF8)
    return sum(bool(line.strip(b" \t")) for line in re.split(rb"\r\n|\r|\n", data))


def check(paths: dict[str, Path], good_labels: frozenset[bytes]) -> tuple[str, int, int]:
    """Outcome, kept and rejected rows of one input; AssertionError where a line is lost."""
    try:
        session = parse_cryorl(**{"labels": None, **paths})
    except DataError as error:
        assert str(error) and len(str(error)) < 5000, "a message that nobody can read"
        return "unusable", 0, 0
    for source in session.sources:
        expected = num_lines_of(paths[str(source["role"])].read_bytes())
        assert source["kept"] + source["rejected"] == expected, f"lines lost: {source}"
    for row in session.rejected:
        assert row.line >= 1 and row.reason and row.text.isascii() and row.text.isprintable()
    assert len(session.rejected) == sum(int(source["rejected"]) for source in session.sources)
    if "labels" in paths and not (data := paths["labels"].read_bytes()).startswith(WIDE_BOMS):
        unharmed = {line.split(b",")[0].decode() for line in good_labels & {*data.split(b"\n")}}
        assert unharmed <= set(session.table.hole_name.tolist()), "a good row is not in the table"
    kept = sum(int(source["kept"]) for source in session.sources)
    return "imported", kept, len(session.rejected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "aldolase"
    parser.add_argument("--data", type=Path, default=beside)
    parser.add_argument("--keep", type=Path, help="folder for inputs that fail")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    lines = load(args.data)
    good_labels = frozenset(line for line in lines["labels"] if line)
    is_real = args.data.is_dir()
    outcomes: Counter[str] = Counter()
    num_kept = num_rejected = 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.inputs):
            roles = [role for role in ROLES if rng.random() < 0.5]
            if roles in ([], ["timestamps"]):
                roles = ["labels", *roles]
            mutated = roles[rng.integers(len(roles))]
            paths: dict[str, Path] = {}
            for role in roles:
                other = ROLES[rng.integers(len(ROLES))]
                data = sample(rng, lines[role][:400], lines[other])
                if role != mutated:  # more of it, so that names meet
                    data = b"\n".join(lines[role][:400])
                for _ in range(rng.integers(1, 4) if role == mutated else 0):
                    data = MUTATIONS[rng.integers(len(MUTATIONS))](rng, data or b"\n")
                paths[role] = Path(folder) / role
                paths[role].write_bytes(data)
            try:
                outcome, kept, rejected = check(paths, good_labels)
            except Exception as error:
                outcome, kept, rejected = "CRASHED", 0, 0
                print(f"input {number} ({mutated}): {type(error).__name__}: {error}")
                if args.keep:
                    args.keep.mkdir(parents=True, exist_ok=True)
                    for role, path in paths.items():
                        (args.keep / f"{number}-{role}").write_bytes(path.read_bytes())
            outcomes[outcome] += 1
            num_kept, num_rejected = num_kept + kept, num_rejected + rejected
    seconds = time.perf_counter() - began
    print(
        f"{args.inputs} mutated inputs ({'real' if is_real else 'made'} files, seed {args.seed}): "
        f"{outcomes['CRASHED']} crashes, {outcomes['imported']} imported, "
        f"{outcomes['unusable']} refused with a reason; "
        f"{num_kept} rows kept, {num_rejected} rejected, each with line and reason; {seconds:.0f} s"
    )
    return int(outcomes["CRASHED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
