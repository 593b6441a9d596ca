"""Hole images from a folder, one file a hole, as one array (N, H, W) of 8-bit grey.

A file belongs to the hole whose name it bears (``<hole_name>.png``, as CryoRL and Leginon have it;
``.jpg``, ``.tif``, ``.mrc`` too); what it contains is told by its first bytes. Headers are judged
before any pixel is read, so a header that lies costs no memory. A file that cannot be used is kept
out with a reason and its hole has no image; nothing that a file holds stops an import.

**Intensity carries the thickness of the ice**, so no image is stretched by itself: 8-bit images are
taken as they are, and all others of a session go through one and the same affine map (below).

What is read by what, and why:

| format | by | reason |
|---|---|---|
| PNG, JPEG | Pillow | its output never exceeds what the header says |
| TIFF, plain or by deflate | tifffile (extra ``em``) | Pillow reads int8 and others wrongly |
| MRC | here | the header is five numbers; mrcfile allocates what they say before it looks |

What tifffile would unpack is measured before, because it unpacks a strip to any size at all; other
compressions are refused, as only libtiff would bound them, which writes to the terminal.

The first row of a file is the first row of the image in every format. For MRC that is the row of
the lowest y, which programs that put the origin bottom left show at the bottom; Leginon and numpy
show it on top, as here. Holes have no up or down, so nothing depends on it. MRC's bytes are signed.
"""

from __future__ import annotations

import io
import logging
import math
import os
import stat
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import add
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from envs.cryoem.types import BoolArray, FloatArray
from ssl2rl_ray.data.text import BadRow, DataError, RejectedRow

SUFFIXES = (".png", ".tif", ".tiff", ".mrc", ".jpg", ".jpeg")
"""Of several files of one hole the first by this order is kept."""
MAX_PIXELS = 4096 * 4096
"""A whole camera frame; the crop of a hole has a few hundred pixels a side. Pillow's own limit
against decompression bombs is five times this."""
MAX_BYTES = 8 * MAX_PIXELS + 2**20
"""Of a file: double precision, and a large header."""
MIN_SIDE_PX = 8
MAX_ASPECT = 2.0
"""Longer side over shorter. What is longer than wide is cropped to the square in its middle, so
that the scale is kept; beyond this it is not the image of one hole."""
MAX_OWN_SIZE_PX, DEFAULT_SIZE_PX = 256, 64
"""Images are kept at their own size up to the first, else reduced to the second."""
PERCENTILES = (0.1, 99.9)
"""Of the pixels of a sample of holes, mapped to 0 and 255: hot and dead pixels are beyond them."""

_SAMPLE = 256  # holes that are looked at to choose size and map
_SAMPLE_PIXELS = 4096  # of each
_BATCH, _BATCH_BYTES = 256, 2**24  # holes whose images are in memory at a time
_LARGE = 2**20  # bytes or pixels: files beyond it are read one at a time
_SHARE_OF_LOOKING = 0.1  # of the progress that the sample stands for

T = TypeVar("T")
OnStep = Callable[[str, float], None]
"""Called with what is done and the share of it, 0 to 1."""
Picture = NDArray[np.uint8] | NDArray[np.float32]
"""(h, w): 8-bit grey as it was, everything else as float32."""


class Header(NamedTuple):
    """What a file says about itself, and how to read its pixels."""

    height: int
    width: int
    load: Callable[[], NDArray[Any]]
    """(height, width) in the file's own type."""


class Scale(NamedTuple):
    """The affine map of a session: ``low`` becomes 0, ``high`` 255; beyond them it is clipped."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class HoleImages:
    """What one folder of images gave."""

    images: NDArray[np.uint8]
    """(N, H, W) read-only memory map; zeros where a hole has no image."""
    has_image: BoolArray
    """(N,)"""
    rejected: tuple[RejectedRow, ...]
    """By file name."""
    notes: tuple[str, ...]
    """What a user should know although nothing is wrong."""
    provenance: dict[str, Any]
    """Folder, counts, sizes and the affine map, as JSON values."""


def read_image_folder(
    folder: str | os.PathLike[str],
    hole_name: Sequence[str] | NDArray[np.str_],
    out: str | os.PathLike[str],
    *,
    image_size_px: int | None = None,
    on_step: OnStep | None = None,
) -> HoleImages:
    """Reads the image of every hole into a memory-mapped .npy file, in bounded memory.

    Two passes: a sample of holes gives the size (where none is asked for) and the affine map of
    what is not 8-bit; then all are read, cropped to a square and resampled by area averaging.

    Args:
        folder: the images, none in folders below it.
        hole_name: (N,) whose images are wanted; other files are counted and left alone.
        out: the .npy file to write.
        image_size_px: H = W of the result. None: the most common size of the folder if that is
            square and at most ``MAX_OWN_SIZE_PX``, else ``DEFAULT_SIZE_PX``.
        on_step: told how far it has come.

    Raises:
        DataError: no such folder, no usable image in it, or a missing package.
    """
    if image_size_px is not None and not MIN_SIDE_PX <= image_size_px <= 4096:
        raise DataError(f"image size: {MIN_SIDE_PX} to 4096 pixels, found {image_size_px}")
    names = [str(name) for name in hole_name]
    found = _find(folder, names)
    root = Path(folder).resolve()
    large = threading.RLock()
    rejected, counts = list(found.rejected), Counter[str]()

    def look(row: int) -> _Glance | None:
        try:
            return _read(root / found.file_of[row], root, large, _glance)[1]
        except BadRow:  # reported when all are read
            return None

    def report(what: str, share: float) -> None:
        if on_step is not None:
            on_step(what, share)

    order = sorted(found.file_of, key=lambda row: (Path(found.file_of[row]).suffix.lower(), row))
    sample = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, _SAMPLE).astype(int))]
    with _quiet(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        sizes, scale = _chosen(pool.map(look, sample))
        size = image_size_px or _default_size(sizes)
        report("reading images", _SHARE_OF_LOOKING)

        def fit(row: int) -> tuple[str, NDArray[np.uint8]] | BadRow:
            try:
                path = root / found.file_of[row]
                return _read(path, root, large, lambda picture: _fit(picture, size, scale))
            except BadRow as bad:
                return bad

        # Written as a stream, read as a map: a full disk is an error here, and would be the death
        # of the process in a map.
        has_image = np.zeros(len(names), bool)
        step = max(1, min(_BATCH, _BATCH_BYTES // size**2))
        with open(out, "wb") as stream:
            np.lib.format.write_array_header_1_0(
                stream,
                {"descr": "|u1", "fortran_order": False, "shape": (len(names), size, size)},
            )
            for start in range(0, len(names), step):
                stop = min(start + step, len(names))
                block = np.zeros((stop - start, size, size), np.uint8)
                rows = [row for row in range(start, stop) if row in found.file_of]
                for row, result in zip(rows, pool.map(fit, rows), strict=True):
                    if isinstance(result, BadRow):
                        rejected.append(_rejected(folder, found.file_of[row], str(result)))
                        continue
                    kind, block[row - start] = result
                    has_image[row] = True
                    counts[kind] += 1
                stream.write(block.data)
                report(
                    "reading images",
                    _SHARE_OF_LOOKING + (1 - _SHARE_OF_LOOKING) * stop / len(names),
                )
    rejected.sort(key=lambda row: row.file)
    if not has_image.any():
        shown = "\n  ".join(map(str, rejected[:3]))
        raise DataError(
            f"images: none of the {len(found.file_of)} images of {folder} is usable; the first:\n"
            f"  {shown}"
        )
    return HoleImages(
        images=np.load(out, mmap_mode="r", allow_pickle=False),
        has_image=has_image,
        rejected=tuple(rejected),
        notes=tuple(_notes(folder, found, has_image, sizes, size, scale, counts)),
        provenance={
            "folder": os.fspath(folder),
            "image_size_px": size,
            "is_size_asked_for": image_size_px is not None,
            "sizes_in_sample": {f"{w}x{h}": n for (h, w), n in sizes.most_common(5)},
            "kinds": dict(counts),
            "num_rejected": len(rejected),
            "num_files_of_no_hole": found.num_strangers,
            "num_holes_without_file": len(names) - len(found.file_of),
            "to_uint8": None
            if scale is None
            else {
                "low": scale.low,
                "high": scale.high,
                "percentiles": list(PERCENTILES),
                "of": f"the images other than 8-bit among {len(sample)} sampled holes",
            },
        },
    )


# ------------------------------------------------------------ files


class _Found(NamedTuple):
    file_of: dict[int, str]
    """Row of the hole -> file name."""
    rejected: list[RejectedRow]
    num_strangers: int
    """Files that look like images and bear the name of no hole."""


def _find(folder: str | os.PathLike[str], names: list[str]) -> _Found:
    """Which file belongs to which hole; no file is opened."""
    try:
        files = sorted(os.listdir(folder))
    except NotADirectoryError:
        raise DataError(f"images: {os.fspath(folder)} is a file: give its folder") from None
    except FileNotFoundError:
        raise DataError(f"images: there is no folder {os.fspath(folder)}: check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"images: cannot read {os.fspath(folder)!r}: {error}") from error
    row_of = {name: row for row, name in enumerate(names)}
    file_of: dict[int, str] = {}
    rejected, strangers = [], []
    ranked = [(SUFFIXES.index(s), f) for f in files if (s := Path(f).suffix.lower()) in SUFFIXES]
    for _, file in sorted(ranked):
        row = row_of.get(Path(file).stem)
        if row is None:
            strangers.append(file)
        elif row in file_of:
            rejected.append(
                _rejected(folder, file, f"{file_of[row]} is of the same hole, and kept")
            )
        else:
            file_of[row] = file
    if not file_of:
        what = f"its first image is {strangers[0]!a}" if strangers else "it has no image"
        raise DataError(
            f"images: no file of {os.fspath(folder)} is named after a hole ({what}; expected "
            f"such as {names[0] + '.png'!r}): is it the folder of this session?"
        )
    return _Found(file_of, rejected, len(strangers))


def _rejected(folder: str | os.PathLike[str], file: str, reason: str) -> RejectedRow:
    if not (reason.isascii() and reason.isprintable()):  # a value of a damaged header
        reason = ascii(reason)
    return RejectedRow(file=os.path.join(folder, file), line=None, reason=reason[:200])


def _read(
    path: Path, root: Path, large: threading.RLock, keep: Callable[[Picture], T]
) -> tuple[str, T]:
    """Kind of one file and what is kept of its pixels; large ones one at a time: bounded memory."""

    def room(amount: int) -> AbstractContextManager[Any]:
        return large if amount > _LARGE else nullcontext()

    with _open(path, root) as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        with room(num_bytes):
            data = stream.read(num_bytes)
            kind, header = _judged(data, num_bytes)
            with room(header.height * header.width):
                return kind, keep(_pixels(header))


def _open(path: Path, root: Path) -> io.BufferedReader:
    """The file, open; BadRow unless it is a regular file of a bearable size inside the folder."""
    try:
        if path.is_symlink():
            path = path.resolve(strict=True)
            if not path.is_relative_to(root):
                raise BadRow("a link out of the folder, which is not followed: copy the file")
        # Without O_NONBLOCK the opening of a pipe waits for a writer, for ever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        stream = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115
    except IsADirectoryError:
        raise BadRow("a folder") from None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BadRow(f"cannot be read: {_said(error)}") from None
    found = os.fstat(stream.fileno())
    reason = None
    if not stat.S_ISREG(found.st_mode):
        reason = "not a regular file"
    elif found.st_size == 0:
        reason = "empty: copy it again"
    elif found.st_size > MAX_BYTES:
        reason = f"{found.st_size} bytes, more than the {MAX_BYTES} of an image"
    if reason is None:
        return stream
    stream.close()
    raise BadRow(reason)


# ------------------------------------------------------------ formats: bytes -> Header, or BadRow


def _judged(data: bytes, num_bytes: int) -> tuple[str, Header]:
    """Kind and header of a file whose header is in order."""
    if len(data) < num_bytes:
        raise BadRow("became shorter while it was read: copy it again")
    try:
        kind, header = open_image(data)
    except (BadRow, DataError):
        raise
    except Exception as error:  # damaged bytes make the libraries raise anything at all
        raise BadRow(f"damaged header: {_said(error)}") from None
    _check_shape(header.height, header.width)
    return kind, header


def open_image(data: bytes) -> tuple[str, Header]:
    """Kind (``png``, ``jpeg``, ``tiff``, ``mrc``) and header of a file; pixels are not read.

    Raises:
        BadRow: the reason why it cannot be used. Damaged files may raise any Exception.
        DataError: a package is missing.
    """
    if data.startswith(b"version https://git-lfs"):
        raise BadRow("a Git LFS pointer, not the image: run `git lfs pull` where it came from")
    for kind, magic in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if data.startswith(magic):
            return kind, _open_pillow(data, kind.upper())
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff", _open_tiff(data)
    if (header := _open_mrc(data)) is not None:
        return "mrc", header
    raise BadRow(f"not a PNG, JPEG, TIFF or MRC image (it begins with {data[:8]!r})")


def _open_pillow(data: bytes, kind: str) -> Header:
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError:
        raise BadRow(f"far more than {MAX_PIXELS} pixels: a decompression bomb") from None
    except UnidentifiedImageError:
        raise BadRow(f"truncated or damaged header of a {kind}") from None
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise BadRow(f"{frames} frames, expected one image")
    width, height = image.size

    def load() -> NDArray[Any]:
        with image:
            if image.mode in ("L", "I", "F") or image.mode.startswith("I;16"):
                return np.asarray(image)
            if image.mode in ("1", "P", "LA", "PA", "RGB", "RGBA", "RGBX"):
                return np.asarray(image.convert("L"))  # by luma; transparency is dropped
            raise BadRow(f"colours of the kind {image.mode}: save it as 8-bit grey")

    return Header(height, width, load)


_DEFLATE = (8, 32946)
_MAX_TIFF_VALUES = 2**16
"""Of a tag of numbers: 4096 x 4096 pixels in tiles of 16 x 16."""


def _open_tiff(data: bytes) -> Header:
    try:
        import tifffile
    except ImportError:
        raise DataError(
            "TIFF images need tifffile: pip install 'ssl2rl-ray[em]', then import again"
        ) from None
    _check_tiff_directory(data)
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
    height, width, dtype = int(page.imagelength), int(page.imagewidth), page.dtype
    _check_shape(height, width)
    if page.imagedepth != 1 or page.samplesperpixel not in (1, 3, 4):
        raise BadRow(f"shape {page.shape}, expected (height, width), grey or RGB")
    if dtype is None or page.photometric not in (0, 1, 2):
        raise BadRow(f"pixels of {page.bitspersample} bits, photometry {int(page.photometric)}")
    is_grey, is_white_low = page.samplesperpixel == 1, page.photometric == 0
    if not is_grey and dtype != np.uint8:
        raise BadRow(f"colours of {dtype}: save it as grey")
    if page.compression not in (1, *_DEFLATE):
        how = getattr(page.compression, "name", "an unknown method")
        raise BadRow(f"compressed by {how}: save it without compression, or by deflate (zip)")
    # Pixels lie in chunks (strips or tiles). Each must be in the file and of the size that the
    # header gives it: tifffile would read, and unpack, whatever is there.
    offsets, counts = page.dataoffsets, page.databytecounts
    num_chunks, num_chunk_bytes = math.prod(page.chunked), math.prod(page.chunks) * dtype.itemsize
    if num_chunk_bytes > MAX_BYTES:
        raise BadRow(f"tiles of shape {page.chunks}: too large")
    num_last_bytes = num_chunk_bytes  # the last strip may hold what rows are left
    if not page.is_tiled:
        num_rows = min(page.rowsperstrip, height)
        num_last_bytes = num_chunk_bytes // num_rows * ((height - 1) % num_rows + 1)
    if not len(offsets) == len(counts) == num_chunks:
        raise BadRow(f"{len(offsets)} strips or tiles, its header says {num_chunks}")
    if max(map(add, offsets, counts)) > len(data) or sum(counts) > len(data):
        raise BadRow(f"truncated: its pixels end beyond its {len(data)} bytes")
    if page.compression == 1:
        num_bytes = height * width * page.samplesperpixel * dtype.itemsize
        if page.is_tiled:
            num_bytes = num_chunks * num_chunk_bytes
        if sum(counts) != num_bytes:
            raise BadRow(f"{sum(counts)} bytes of pixels, its header says {num_bytes}")

    def load() -> NDArray[Any]:
        if page.compression != 1:
            for offset, count in zip(offsets, counts, strict=True):
                packed = data[offset : offset + count]
                num_found = len(zlib.decompressobj().decompress(packed, num_chunk_bytes + 1))
                if num_found not in (num_chunk_bytes, num_last_bytes):
                    more = " or more" if num_found > num_chunk_bytes else ""
                    raise BadRow(
                        f"a strip or tile unpacks to {num_found} bytes{more}, "
                        f"its header says {num_chunk_bytes}"
                    )
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            pixels = tiff.pages.first.asarray(maxworkers=1)
        if not is_grey:
            if pixels.shape[0] == page.samplesperpixel and pixels.shape != (height, width, 3):
                pixels = np.moveaxis(pixels, 0, -1)  # stored plane by plane
            return np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., :3])).convert("L"))
        return np.invert(pixels) if is_white_low and dtype.kind == "u" else pixels

    return Header(height, width, load)


def _check_tiff_directory(data: bytes) -> None:
    """BadRow unless there is one page, whose tags are not so many that they fill the memory."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in data[2:4]
    number, entry = (f"{order}Q", f"{order}HHQQ") if is_big else (f"{order}I", f"{order}HHII")
    (start,) = struct.unpack_from(number, data, 8 if is_big else 4)
    (num_tags,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, start)
    start += 8 if is_big else 2
    stop = start + num_tags * struct.calcsize(entry)
    if stop + struct.calcsize(number) > len(data):
        raise BadRow(f"truncated: its directory ends beyond its {len(data)} bytes")
    for tag, kind, num_values, _ in struct.iter_unpack(entry, data[start:stop]):
        if num_values > _MAX_TIFF_VALUES and kind not in (1, 2, 7):  # text and bytes stay as such
            raise BadRow(f"damaged header: tag {tag} with {num_values} values")
    if struct.unpack_from(number, data, stop)[0]:
        raise BadRow("more than one page, expected one image")


_MRC_DTYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_MRC_OTHER = {3: "complex 16-bit", 4: "complex", 16: "RGB", 101: "4-bit"}
_MRC_HEADER_BYTES = 1024


def _open_mrc(data: bytes) -> Header | None:
    """By MRC2014 (Cheng et al. 2015); None where the bytes are not MRC at all."""
    if len(data) < _MRC_HEADER_BYTES:
        return None
    # The stamp of the byte order is often missing or wrong; no mode exceeds 127, which tells it.
    by_stamp = "><" if data[212:213] == b"\x11" else "<>"
    orders = [o for o in by_stamp if 0 <= struct.unpack_from(f"{o}i", data, 12)[0] <= 127]
    if not orders:
        return None
    order = orders[0]
    width, height, depth, mode = struct.unpack_from(f"{order}4i", data, 0)
    is_plausible = mode in _MRC_DTYPES and all(0 < n < 2**16 for n in (width, height, depth))
    if data[208:211] != b"MAP" and not is_plausible:  # files older than that mark, or other ones
        return None
    (num_extended,) = struct.unpack_from(f"{order}i", data, 92)
    if mode not in _MRC_DTYPES:
        raise BadRow(f"MRC mode {mode} ({_MRC_OTHER.get(mode, 'unknown')}): save it as mode 2")
    if depth != 1:
        raise BadRow(f"{width} x {height} x {depth} pixels: not one image")
    _check_shape(height, width)
    dtype = np.dtype(order + _MRC_DTYPES[mode])
    num_expected = _MRC_HEADER_BYTES + num_extended + width * height * dtype.itemsize
    if num_extended < 0 or num_expected != len(data):
        raise BadRow(f"{len(data)} bytes, its header says {num_expected}: copy it again")

    def load() -> NDArray[Any]:
        start = _MRC_HEADER_BYTES + num_extended
        return np.frombuffer(data, dtype, width * height, start).reshape(height, width)

    return Header(height, width, load)


def _check_shape(height: int, width: int) -> None:
    """BadRow unless it may be the image of one hole."""
    shown = f"{width} x {height} pixels"
    if min(height, width) < MIN_SIDE_PX:
        raise BadRow(f"{shown}: at least {MIN_SIDE_PX} a side are needed")
    if height * width > MAX_PIXELS:
        raise BadRow(f"{shown}, more than {MAX_PIXELS}: crop it to the hole")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadRow(f"{shown}: too long for the image of one hole")


# ------------------------------------------------------------ pixels


def _pixels(header: Header) -> Picture:
    """The pixels of a header, as 8-bit or float32; BadRow where they are damaged or not finite."""
    try:
        pixels = header.load()
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(f"truncated or damaged: {_said(error)}") from None
    if pixels.shape != (header.height, header.width):
        raise BadRow(f"shape {pixels.shape}, its header says ({header.height}, {header.width})")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise BadRow(f"pixels of type {pixels.dtype}: save it as 8-bit grey or float32")
    pixels = pixels.astype(np.float32)
    if not (is_finite := np.isfinite(pixels)).all():
        raise BadRow(f"{is_finite.size - int(is_finite.sum())} pixels are NaN or infinite")
    return pixels


class _Glance(NamedTuple):
    """What is kept of a sampled picture."""

    shape: tuple[int, ...]
    values: FloatArray | None
    """Some of its pixels; None of an 8-bit picture."""


def _glance(picture: Picture) -> _Glance:
    if picture.dtype == np.uint8:
        return _Glance(picture.shape, None)
    flat = picture.reshape(-1)
    step = -(-flat.size // _SAMPLE_PIXELS)
    return _Glance(picture.shape, flat[::step].astype(np.float64))


def _chosen(
    glances: Iterator[_Glance | None],
) -> tuple[Counter[tuple[int, ...]], Scale | None]:
    """Sizes (h, w) in a sample, and the map of what is not 8-bit in it; None if nothing is."""
    found = [glance for glance in glances if glance is not None]
    sizes = Counter(glance.shape for glance in found)
    values = [glance.values for glance in found if glance.values is not None]
    if not values:
        return sizes, None
    low, high = np.percentile(np.concatenate(values), PERCENTILES)
    return sizes, Scale(float(low), float(high if high > low else low + 1.0))


def _default_size(sizes: Counter[tuple[int, ...]]) -> int:
    if sizes:
        (height, width), _ = sizes.most_common(1)[0]
        if height == width <= MAX_OWN_SIZE_PX:
            return height
    return DEFAULT_SIZE_PX


def _fit(picture: Picture, size: int, scale: Scale | None) -> NDArray[np.uint8]:
    """(size, size) of the square in the middle."""
    side = min(picture.shape)
    top, left = ((length - side) // 2 for length in picture.shape)
    picture = picture[top : top + side, left : left + side]
    if picture.dtype != np.uint8:
        if scale is None:
            raise BadRow("not 8-bit, unlike all images of the sample: keep it in its own folder")
        picture = picture - np.float32(scale.low)
        picture *= np.float32(255.0 / (scale.high - scale.low))
        np.clip(picture, 0, 255, out=picture)
    if side != size:  # an average over the area; there is none when the image becomes larger
        how = Image.Resampling.BOX if side > size else Image.Resampling.BILINEAR
        picture = np.asarray(Image.fromarray(picture).resize((size, size), how))
    return np.rint(picture).astype(np.uint8)  # 8-bit is left as it is


# ------------------------------------------------------------ words


def _notes(
    folder: str | os.PathLike[str],
    found: _Found,
    has_image: BoolArray,
    sizes: Counter[tuple[int, ...]],
    size: int,
    scale: Scale | None,
    kinds: Counter[str],
) -> Iterator[str]:
    if missing := len(has_image) - len(found.file_of):
        yield f"{missing} of {len(has_image)} holes have no file in {os.fspath(folder)}"
    if found.num_strangers:
        yield f"{found.num_strangers} images in {os.fspath(folder)} are of no hole of this session"
    (height, width), _ = sizes.most_common(1)[0] if sizes else ((size, size), 0)
    if (height, width) != (size, size):
        yield f"images of {width} x {height} pixels are kept at {size} x {size} (--image-size)"
    if len(sizes) > 1:
        yield f"images have {len(sizes)} sizes or more: each is brought to {size} x {size}"
    if scale is not None:
        yield f"intensities other than 8-bit: {scale.low:g} became 0, {scale.high:g} became 255"
    if len(kinds) > 1:
        shown = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        yield f"images of several formats ({shown}): are their intensities of one scale?"


def _said(error: BaseException) -> str:
    """A library's message: one short line of ASCII."""
    message = ascii(" ".join(str(error).split())[:120])[1:-1]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' warnings about damaged files are ours to report; for this process' threads."""
    logger = logging.getLogger("tifffile")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled
