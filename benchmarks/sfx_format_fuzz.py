"""Damaged ``.geom``, ``.cell``, ``.lst`` and ``.stream`` files: crashes among 10,000 of them.

Each is a sound file with bytes flipped, lines dropped, doubled, swapped or cut off, numbers and
names exchanged for odd ones. Reading must end in a value or in a ``FormatError`` that names the
file; anything else is a crash. What is read must be written and read again to the same.

Run: python benchmarks/sfx_format_fuzz.py [--count 10000] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from envs.crystfel.sfx.formats import (
    FormatError,
    Geometry,
    format_cell,
    format_frames,
    format_geometry,
    good_pixels,
    parse_cell,
    parse_frames,
    parse_geometry,
    tuned_geometry_text,
)
from envs.crystfel.sfx.simulate import LYSOZYME, PRESETS, make_world
from envs.crystfel.sfx.stream import (
    Stream,
    StreamChunk,
    crystal_of,
    format_stream,
    parse_stream,
    stream_peaks,
)
from envs.crystfel.types import Frame, Parameters

OFFSETS = Parameters(clen_offset_percent=3, centre_x_offset_px=-2)
SMALL_PX = 500_000
"""Slabs up to this size are also asked for their pixels."""


def _geom(text: str) -> None:
    geometry = parse_geometry(text, "fuzz")
    moved = parse_geometry(tuned_geometry_text(text, geometry, OFFSETS), "tuned")
    if not np.allclose(moved.corner_px, geometry.moved(OFFSETS).corner_px, atol=1e-3):
        raise AssertionError("the tuned text is not the moved geometry")
    again = parse_geometry(format_geometry(geometry), "written")
    if again.panels != geometry.panels or not np.array_equal(again.window, geometry.window):
        raise AssertionError("the written geometry is another one")
    geometry.locate(np.array([[0.1, 0.0, 1.0], [0.0, -0.1, 1.0]]))
    if geometry.shape[0] * geometry.shape[1] < SMALL_PX:
        with contextlib.suppress(FormatError):  # a mask, which is in no file here
            good_pixels(geometry)


def _cell(text: str) -> None:
    cell = parse_cell(text, "fuzz")
    parse_cell(format_cell(cell), "written")
    if not np.isfinite(cell.reciprocal_per_A()).all():
        raise AssertionError("a cell without a reciprocal one")


def _lst(text: str) -> None:
    frames = parse_frames(text, "fuzz")
    format_frames(frames)


def _stream(text: str) -> None:
    stream = parse_stream(text.splitlines(keepends=True), "fuzz")
    again = parse_stream("".join(format_stream(stream)).splitlines(keepends=True), "written")
    if len(again.chunks) != len(stream.chunks):
        raise AssertionError("the written stream has another number of chunks")


READERS: dict[str, Callable[[str], None]] = {
    "geom": _geom,
    "cell": _cell,
    "lst": _lst,
    "stream": _stream,
}

_ODD = (
    b"nan", b"inf", b"-1", b"0", b"1e999", b"1e308", b"-1e-308", b"99999999999999999999", b"0x",
    b"", b"%", b"/", b"=", b";", b"//", b"//-1", b"//1/2/3", b"\x00", b"\xff\xfe", b"\xc3\x28",
    "\u0661\u0662".encode(), b"1_000", b"+x", b"--x", b"fs", b"p0", b"bad", b"group_all = x",
    b"x" * 3000, b"1" * 500, b"\r", b"\x0b", "\u2028".encode(), b"/entry/x", b"5 mm", b"5 keV",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four kinds of damage."""
    for _ in range(rng.randint(1, 4)):
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        match rng.randrange(9):
            case 0:  # flip a byte
                if data:
                    i = rng.randrange(len(data))
                    data = data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
            case 1:
                data = data[: rng.randrange(len(data) + 1)]
            case 2:
                data = b"\n".join(lines[:at] + lines[at + 1 :])
            case 3:
                data = b"\n".join(lines[: at + 1] + lines[at:])
            case 4:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
                data = b"\n".join(lines)
            case 5:  # another word
                words = lines[at].split(b" ")
                words[rng.randrange(len(words))] = rng.choice(_ODD)
                lines[at] = b" ".join(words)
                data = b"\n".join(lines)
            case 6:
                i = rng.randrange(len(data) + 1)
                data = data[:i] + rng.choice(_ODD) + data[i:]
            case 7:  # a block moved
                end = min(len(lines), at + rng.randint(1, 10))
                block, rest = lines[at:end], lines[:at] + lines[end:]
                to = rng.randrange(len(rest) + 1)
                data = b"\n".join(rest[:to] + block + rest[to:])
            case _:  # another value behind the =
                key, equals, _ = lines[at].partition(b"=")
                lines[at] = key + equals + b" " + rng.choice(_ODD)
                data = b"\n".join(lines)
    return data


def sound_files() -> dict[str, list[bytes]]:
    """Texts to damage: of a plate, of modules, and hand-written ones with everything in them."""
    plate, modules = (make_world(PRESETS[name], 1).geometry for name in ("clean", "modules"))
    few = parse_geometry("\n\n".join(format_geometry(modules).split("\n\n")[:6]))
    texts = [format_geometry(g).encode() for g in (plate, few)]
    return {
        "geom": [*texts, _WITH_EVERYTHING.encode()],
        "cell": [
            format_cell(LYSOZYME).encode(),
            b"CRYST1   79.200   79.200   38.000  90.00  90.00  90.00 P 43 21 2     8\n",
        ],
        "lst": [b"".join(f"run {i}/frames.h5 //{i}\n".encode() for i in range(20))],
        "stream": ["".join(format_stream(_sample(plate))).encode()],
    }


def _sample(geometry: Geometry) -> Stream:
    rng = np.random.default_rng(1)
    chunks = []
    for i in range(4):
        n = 0 if i == 1 else 5
        fs, ss = rng.uniform(0, 1024, (2, n))
        peaks, panels = stream_peaks(geometry, fs, ss, rng.uniform(10, 100, n))
        crystals = (crystal_of(LYSOZYME.reciprocal_per_A(), LYSOZYME),) * (i % 3)
        chunks.append(
            StreamChunk(
                frame=Frame(path="/d/frames.h5", event=f"//{i}"),
                serial=i + 1,
                is_hit=n > 0,
                indexed_by="asdf" if crystals else "none",
                photon_energy_eV=9300.0,
                clen_m=0.12,
                num_peaks=n,
                peaks=peaks,
                peak_panels=panels,
                crystals=crystals,
            )
        )
    return Stream(
        generator="CrystFEL 0.12.0",
        command="indexamajig -i x.lst",
        geometry_text=format_geometry(geometry),
        cell_text=format_cell(LYSOZYME),
        chunks=tuple(chunks),
    )


_WITH_EVERYTHING = """\
; a comment
wavelength = 1.33 A
clen = 100 mm ; near
detector_shift_x = 0.1 mm
bandwidth = 1e-3
adu_per_eV = 0.001
max_adu = 7000
flag_lessthan = -10
flag_equal = 65535
res = 5000
data = /entry/%/data
dim0 = %
dim1 = 2
dim2 = ss
dim3 = fs
mask0_data = /mask
mask0_file = m.h5
mask0_goodbits = 0x0
mask0_badbits = 0xffff
mask1_data = /other
rigid_group_q0 = a0
a0/min_fs = 0
a0/max_fs = 63
a0/min_ss = 0
a0/max_ss = 31
a0/fs = +0.99x -0.01y +0.001z
a0/ss = 0.01x +0.99y
a0/corner_x = 10
a0/corner_y = -5.5
a1/min_fs = 64
a1/max_fs = 127
a1/min_ss = 0
a1/max_ss = 31
a1/fs = -y
a1/ss = x
a1/corner_x = 80
a1/corner_y = 40
a1/coffset = 0.002
a1/no_index = 1
a1/mask_edge_pixels = 2
bad_a/min_x = -3
bad_a/max_x = 3
bad_a/min_y = -3
bad_a/max_y = 3
bad_b/min_fs = 4
bad_b/max_fs = 8
bad_b/min_ss = 2
bad_b/max_ss = 3
bad_b/panel = a0
group_all = a0,a1
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, files = random.Random(args.seed), sound_files()
    tallies: dict[str, dict[str, Any]] = {
        kind: {"read": 0, "refused": 0, "crashed": 0, "slowest_s": 0.0} for kind in files
    }
    shown = 0
    for number in range(args.count):
        kind = tuple(files)[number % len(files)]
        data, tally = mutate(rng.choice(files[kind]), rng), tallies[kind]
        start = time.perf_counter()
        try:
            READERS[kind](data.decode("utf-8", errors="replace"))
            tally["read"] += 1
        except FormatError as error:
            if str(error).startswith("fuzz"):
                tally["refused"] += 1
                continue
            tally["crashed"] += 1
            print(f"{kind} {number}: {error}")
        except Exception:
            tally["crashed"] += 1
            shown += 1
            if shown <= 5:
                print(f"{kind} {number}:\n{traceback.format_exc(limit=-4)}")
        finally:
            tally["slowest_s"] = max(tally["slowest_s"], time.perf_counter() - start)
    print(f"{'kind':<8}{'read':>8}{'refused':>9}{'crashed':>9}{'slowest (s)':>13}")
    for kind, tally in tallies.items():
        print(
            f"{kind:<8}{tally['read']:>8}{tally['refused']:>9}{tally['crashed']:>9}"
            f"{tally['slowest_s']:>13.3f}"
        )
    crashed = sum(tally["crashed"] for tally in tallies.values())
    print(f"{crashed} crashes in {args.count} damaged files")
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
