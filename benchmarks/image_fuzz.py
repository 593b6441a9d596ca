"""Mutated image files against the reader: no crash, memory bounded, every file read or named.

    python benchmarks/image_fuzz.py --inputs 10000

PNG, JPEG, TIFF and MRC files are made, damaged (bits, cuts, headers, parts of another format,
bombs) and read in folders of fifty, among which some are whole. A folder passes if the reader
raises nothing, every whole file is read to the pixel, and every other one is read or kept out with
a reason. The reader runs in a process of its own, so that a crash of a C library is counted and
not suffered; its peak memory is that process' own.
"""

from __future__ import annotations

import argparse
import io
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from ssl2rl_ray.data.images import MAX_PIXELS, read_image_folder

Rng = np.random.Generator
SIDE = 32
NUM_FILES, NUM_WHOLE = 50, 5  # of a folder
EXTREMES = (0, 1, -1, 2, 7, 255, 4096, 4097, 65535, 30_000, 2**30, 2**31 - 1, -(2**31))


# ------------------------------------------------------------ whole files


def picture(rng: Rng, dtype: str = "u1") -> np.ndarray:
    return np.clip(rng.normal(120, 30, (SIDE, SIDE)), 0, 255).astype(dtype)


def by_pillow(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    image, stream = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def by_tifffile(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def mrc(pixels: np.ndarray, order: str = "<", extended: bytes = b"", depth: int = 1) -> bytes:
    """By MRC2014, written apart from the reader and from mrcfile."""
    mode = {"i1": 0, "i2": 1, "f4": 2, "c8": 4, "u2": 6, "f2": 12}[pixels.dtype.str[1:]]
    header = bytearray(1024)
    struct.pack_into(f"{order}4i", header, 0, pixels.shape[1], pixels.shape[0], depth, mode)
    struct.pack_into(f"{order}i", header, 92, len(extended))
    header[208:216] = b"MAP " + (b"DD\0\0" if order == "<" else b"\x11\x11\0\0")
    return bytes(header) + extended + pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()


def whole(rng: Rng) -> list[tuple[str, bytes]]:
    """Suffix and bytes of a file of each kind."""
    grey, deep = picture(rng), picture(rng, "u2") * 200
    colour = np.stack([grey] * 3, -1)
    return [
        *((".png", by_pillow(grey, "PNG", mode)) for mode in (None, "RGB", "RGBA", "P", "1", "LA")),
        (".png", by_pillow(deep, "PNG")),
        (".jpg", by_pillow(grey, "JPEG")),
        (".jpg", by_pillow(grey, "JPEG", "RGB", progressive=True)),
        (".tif", by_tifffile(grey)),
        (".tif", by_tifffile(deep, byteorder=">")),
        (".tif", by_tifffile(deep, bigtiff=True)),
        (".tif", by_tifffile(picture(rng, "f4"), rowsperstrip=5)),
        (".tif", by_tifffile(picture(rng, "i2"), byteorder=">", tile=(16, 16))),
        (".tif", by_tifffile(colour, photometric="rgb", planarconfig="contig")),
        (".tif", by_tifffile(deep, compression="zlib", predictor=True)),
        (".tif", by_tifffile(grey, compression="zlib", tile=(16, 16))),
        (".tif", by_pillow(grey, "TIFF", compression="tiff_lzw")),
        *((".mrc", mrc(picture(rng, dtype))) for dtype in ("i2", "f4", "u2", "f2")),
        (".mrc", mrc(picture(rng, "f4"), ">", b"x" * 160)),
    ]


# ------------------------------------------------------------ mutations: (rng, bytes) -> bytes


def flip_bits(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    stop = len(out) if rng.random() < 0.5 else min(len(out), 300)  # half of them in the header
    for position in rng.integers(0, stop, rng.integers(1, 20)):
        out[position] ^= 1 << int(rng.integers(8))
    return bytes(out)


def cut(rng: Rng, data: bytes) -> bytes:
    start, stop = np.sort(rng.integers(0, len(data) + 1, 2))
    return data[:stop] if rng.random() < 0.7 else data[start:stop]


def insert_noise(rng: Rng, data: bytes) -> bytes:
    at = int(rng.integers(0, len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 200))) + data[at:]


def splice(rng: Rng, data: bytes) -> bytes:
    """The head of one file and the tail of another, perhaps of another format."""
    others = whole(rng)
    other = others[rng.integers(len(others))][1]
    return data[: rng.integers(len(data) + 1)] + other[rng.integers(len(other)) :]


def edit_number(rng: Rng, data: bytes) -> bytes:
    """An extreme number somewhere in the header: sizes, counts, offsets."""
    out = bytearray(data)
    at = 2 * int(rng.integers(0, max(1, min(len(out) - 4, 320) // 2)))
    value = EXTREMES[rng.integers(len(EXTREMES))] & 0xFFFFFFFF
    width, kind = (4, "I") if rng.random() < 0.6 else (2, "H")
    packed = struct.pack("<>"[rng.integers(2)] + kind, value & ((1 << 8 * width) - 1))
    out[at : at + width] = packed
    return bytes(out)


def edit_png(rng: Rng, data: bytes) -> bytes:
    """IHDR says something else, with a right checksum."""
    if not data.startswith(b"\x89PNG") or len(data) < 33:
        return edit_number(rng, data)
    sizes = [EXTREMES[i] & 0x7FFFFFFF for i in rng.integers(len(EXTREMES), size=2)]
    if rng.random() < 0.5:
        sizes[rng.integers(2)] = SIDE
    rest = bytes(data[24:29]) if rng.random() < 0.5 else bytes(rng.integers(0, 17, 5, np.uint8))
    body = b"IHDR" + struct.pack(">2I", *sizes) + rest
    return data[:12] + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def edit_tiff(rng: Rng, data: bytes) -> bytes:
    """An entry of the directory says something else."""
    if data[:4] not in (b"II*\0", b"MM\0*") or len(data) < 16:
        return edit_number(rng, data)
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return data
    (entries,) = struct.unpack_from(f"{order}H", data, start)
    out = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        at = start + 2 + 12 * int(rng.integers(0, max(entries, 1)))
        field, kind = ((0, "H"), (2, "H"), (4, "I"), (8, "I"), (8, "H"))[rng.integers(5)]
        if at + 12 <= len(out):
            value = EXTREMES[rng.integers(len(EXTREMES))] & (0xFFFF if kind == "H" else 0xFFFFFFFF)
            if field == 0:
                value = int(
                    rng.choice([254, 256, 257, 258, 259, 262, 266, 277, 284, 317, 322, 339])
                )
            struct.pack_into(f"{order}{kind}", out, at + field, value)
    return bytes(out)


def edit_mrc(rng: Rng, data: bytes) -> bytes:
    """Sizes, mode or the length of the extended header say something else."""
    if len(data) < 1024 or data[208:211] != b"MAP":
        return edit_number(rng, data)
    out = bytearray(data)
    at = int(rng.choice([0, 4, 8, 12, 92, 212]))
    value = EXTREMES[rng.integers(len(EXTREMES))] if rng.random() < 0.7 else int(rng.integers(130))
    struct.pack_into("<>"[rng.integers(2)] + "i", out, at, value)
    return bytes(out)


def poison(rng: Rng, data: bytes) -> bytes:
    """NaN and infinity among pixels of floats; elsewhere noise."""
    values = struct.pack("<4f", np.nan, np.inf, -np.inf, 1e38)
    at = int(rng.integers(0, max(1, len(data) - 16)))
    return data[:at] + values + data[at + 16 :]


@cache
def bombs() -> tuple[bytes, ...]:
    """Small files that unpack, or say that they do, to very much."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    def zeros(num_mib: int) -> bytes:
        pack = zlib.compressobj(9)
        return b"".join(pack.compress(bytes(2**20)) for _ in range(num_mib)) + pack.flush()

    def png(width: int, height: int, pixels: bytes, extra: bytes = b"") -> bytes:
        head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    gigabyte = zeros(1024)
    fine = zlib.compress(bytes((SIDE + 1) * SIDE))
    tiff = bytearray(by_tifffile(np.zeros((SIDE, SIDE), np.uint8), compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bytes(tiff))) as opened:
        tags = {tag.code: tag.valueoffset for tag in opened.pages.first.tags}
    struct.pack_into("<I", tiff, tags[273], len(tiff))
    struct.pack_into("<I", tiff, tags[279], len(gigabyte))
    said = bytearray(mrc(np.zeros((SIDE, SIDE), np.float32)))
    struct.pack_into("<i", said, 92, 2**31 - 1)
    volume = bytearray(said)
    struct.pack_into("<4i", volume, 0, 40_000, 40_000, 1, 2)
    huge_tile = by_tifffile(np.zeros((SIDE, SIDE), np.uint8), compression="zlib", tile=(16, 16))
    return (
        png(30_000, 30_000, gigabyte),
        png(4096, 4096, zeros(17)),  # the largest that is allowed
        png(4096, 4097, zeros(17)),
        png(SIDE, SIDE, gigabyte),
        png(SIDE, SIDE, fine, chunk(b"zTXt", b"a\0\0" + gigabyte)),
        png(SIDE, SIDE, fine, chunk(b"iCCP", b"a\0\0" + gigabyte)),
        png(SIDE, SIDE, fine, chunk(b"iTXt", b"a\0\1\0\0\0" + gigabyte)),
        png(SIDE, SIDE, fine, b"".join(chunk(b"zTXt", b"a\0\0" + zeros(1)) for _ in range(200))),
        bytes(tiff) + gigabyte,
        huge_tile.replace(
            struct.pack("<HHII", 322, 3, 1, 16), struct.pack("<HHII", 322, 4, 1, 65520)
        ).replace(struct.pack("<HHII", 323, 3, 1, 16), struct.pack("<HHII", 323, 4, 1, 65520)),
        by_tifffile(np.zeros((4096, 4096), np.float64)),  # the largest that is allowed
        by_tifffile(np.zeros((4096, 4096), np.uint8), compression="zlib"),
        bytes(said),
        bytes(volume),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        b"",
    )


def bomb(rng: Rng, data: bytes) -> bytes:
    return bombs()[rng.integers(len(bombs()))]


MUTATIONS: tuple[Callable[[Rng, bytes], bytes], ...] = (
    *(flip_bits, cut, insert_noise, splice, edit_number, edit_png, edit_tiff, edit_mrc, poison),
    *(edit_png, edit_tiff, edit_mrc),  # headers twice
)


# ------------------------------------------------------------ one folder


class Outcome(NamedTuple):
    """Of one folder."""

    num_read: int
    num_rejected: int
    reasons: Counter[str]
    error: str
    seconds: float
    peak_mib: float


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def warm_up() -> float:
    """Peak memory of this process with everything loaded and whole files read, in MiB."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = whole(rng)
        for number, (suffix, data) in enumerate(files):
            (Path(folder) / f"{number}{suffix}").write_bytes(data)
        names = [str(number) for number in range(len(files))]
        read_image_folder(folder, names, Path(folder) / "out.npy")
    return peak_mib()


def check(folder: str, names: list[str]) -> Outcome:
    """Reads a folder whose first files are whole 8-bit PNGs, with their pixels beside them."""
    began, reasons = time.perf_counter(), Counter[str]()
    try:
        found = read_image_folder(folder, names, Path(folder) / "out.npy", image_size_px=SIDE)
        expected = np.load(Path(folder) / "expected.npy")
        assert found.has_image[:NUM_WHOLE].all(), "a whole file was kept out"
        assert (found.images[:NUM_WHOLE] == expected).all(), "a whole file was changed"
        assert not found.images[~found.has_image].any(), "pixels without an image"
        assert len(found.rejected) == int((~found.has_image).sum()), "a file was lost"
        for row in found.rejected:
            assert row.reason.isascii() and row.reason.isprintable() and len(row.reason) <= 200
            reasons[row.reason.partition(":")[0][:30]] += 1
        num_read, error = int(found.has_image.sum()), ""
    except Exception as problem:
        num_read, error = 0, f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - began
    return Outcome(num_read, sum(reasons.values()), reasons, error, seconds, peak_mib())


def fill(rng: Rng, folder: Path, kinds: list[tuple[str, bytes]], bomb_share: float) -> list[str]:
    """Writes the files of a folder; the names of their holes."""
    expected = np.stack([picture(rng) for _ in range(NUM_WHOLE)])
    np.save(folder / "expected.npy", expected)
    for number, pixels in enumerate(expected):
        (folder / f"{number}.png").write_bytes(by_pillow(pixels, "PNG"))
    for number in range(NUM_WHOLE, NUM_FILES):
        suffix, data = kinds[rng.integers(len(kinds))]
        for _ in range(rng.integers(1, 4)):
            data = MUTATIONS[rng.integers(len(MUTATIONS))](rng, data or b"\0")
        if rng.random() < bomb_share:
            data = bomb(rng, data)
        if rng.random() < 0.1:
            suffix = kinds[rng.integers(len(kinds))][0]
        (folder / f"{number}{suffix}").write_bytes(data)
    return [str(number) for number in range(NUM_FILES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bombs", type=float, default=0.01, help="share of the inputs")
    parser.add_argument("--keep", type=Path, help="folder for folders that fail")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    kinds, reasons = whole(rng), Counter[str]()
    num_folders = -(-args.inputs // (NUM_FILES - NUM_WHOLE))
    num_read = num_rejected = num_crashes = 0
    slowest = peak = 0.0
    began = time.perf_counter()

    def reader() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    pool = reader()
    base = pool.submit(warm_up).result()
    for number in range(num_folders):
        with tempfile.TemporaryDirectory() as folder:
            names = fill(rng, Path(folder), kinds, args.bombs)
            try:
                outcome = pool.submit(check, folder, names).result()
            except BrokenProcessPool:  # a C library took the process with it
                outcome = Outcome(0, 0, Counter(), "the process died", 0.0, 0.0)
                pool = reader()
            if outcome.error:
                num_crashes += 1
                print(f"folder {number}: {outcome.error}")
                if args.keep:
                    (args.keep / str(number)).parent.mkdir(parents=True, exist_ok=True)
                    Path(folder).rename(args.keep / str(number))
                    Path(folder).mkdir()
            num_read, num_rejected = (
                num_read + outcome.num_read,
                num_rejected + outcome.num_rejected,
            )
            reasons += outcome.reasons
            slowest, peak = max(slowest, outcome.seconds), max(peak, outcome.peak_mib)
    pool.shutdown()
    seconds = time.perf_counter() - began
    # One large file at a time: as bytes (8 a pixel), as read (8), as float32 (4), and while that is
    # scaled (4); beside it four small ones, and Pillow's 64 MiB for the texts of a PNG in each.
    bound = MAX_PIXELS * (8 + 8 + 4 + 4) / 2**20 + 4 * (64 + 24)
    print(
        f"{num_folders * (NUM_FILES - NUM_WHOLE)} mutated files beside {num_folders * NUM_WHOLE} "
        f"whole ones (seed {args.seed}): {num_crashes} crashes, {num_read} read, {num_rejected} "
        f"kept out, each with a reason; {seconds:.0f} s, the slowest folder {slowest:.1f} s\n"
        f"peak memory {peak:.0f} MiB, of which {base:.0f} MiB before the first mutated file: "
        f"{peak - base:.0f} MiB above it, bound {bound:.0f} MiB: ratio {(peak - base) / bound:.2f}"
    )
    for reason, count in reasons.most_common(12):
        print(f"  {count:6d}  {reason}")
    return int(num_crashes > 0 or peak - base > bound)


if __name__ == "__main__":
    sys.exit(main())
