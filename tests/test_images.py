"""Hole images: known answers, formats against each other, every hostile file with its reason."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssl2rl_ray.data import DataError, read_image_folder
from ssl2rl_ray.data.images import DEFAULT_SIZE_PX, MAX_BYTES, HoleImages

SIDE = 16
GREY = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)  # no two rows are alike


def png(pixels: np.ndarray, mode: str | None = None, kind: str = "PNG", **options: object) -> bytes:
    image, stream = Image.fromarray(pixels), io.BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind, **options)
    return stream.getvalue()


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(stream, pixels, **options)
    return stream.getvalue()


def mrc(pixels: np.ndarray, extended: bytes = b"") -> bytes:
    """By mrcfile, the reference implementation of the format."""
    mrcfile = pytest.importorskip("mrcfile")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mrc"
        with mrcfile.new(path) as file:
            file.set_data(pixels)
            if extended:
                file.set_extended_header(np.frombuffer(extended, "V1"))
        return path.read_bytes()


def put(data: bytes, at: int, value: int, kind: str = "<i") -> bytes:
    out = bytearray(data)
    struct.pack_into(kind, out, at, value)
    return bytes(out)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path, names: list[str], **options: object) -> HoleImages:
    return read_image_folder(folder, names, folder.parent / "images.npy", **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One good image of the hole ``good``."""
    return write(tmp_path / "holes", {"good.png": png(GREY)})


# ------------------------------------------------------------ known answers


def test_each_hole_gets_the_image_that_bears_its_name(tmp_path: Path) -> None:
    files = {"b.png": png(GREY), "a.PNG": png(GREY[::-1]), "stranger.png": png(GREY), "a.txt": b"x"}
    steps: list[tuple[str, float]] = []
    found = read(
        write(tmp_path / "holes", files),
        ["a", "none", "b"],
        on_step=lambda what, share: steps.append((what, share)),
    )
    assert found.images.dtype == np.uint8 and found.images.shape == (3, SIDE, SIDE)
    np.testing.assert_array_equal(found.images, [GREY[::-1], 0 * GREY, GREY])
    assert found.has_image.tolist() == [True, False, True] and found.rejected == ()
    assert not found.images.flags.writeable
    assert any("1 of 3 holes have no file" in note for note in found.notes)
    assert any("1 images in" in note and "of no hole" in note for note in found.notes)
    assert (
        found.provenance["num_files_of_no_hole"] == found.provenance["num_holes_without_file"] == 1
    )
    assert found.provenance["to_uint8"] is None
    shares = [share for _, share in steps]
    assert shares == sorted(shares) and shares[-1] == 1.0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_colours_of_grey_are_grey(tmp_path: Path, mode: str) -> None:
    found = read(write(tmp_path / "holes", {"a.png": png(GREY, mode)}), ["a"])
    np.testing.assert_array_equal(found.images[0], GREY)


def test_jpeg_and_a_wrong_suffix_are_read_by_their_content(tmp_path: Path) -> None:
    smooth = np.full((SIDE, SIDE), 77, np.uint8)
    files = {"a.jpg": png(smooth, kind="JPEG"), "b.tif": png(GREY)}
    found = read(write(tmp_path / "holes", files), ["a", "b"])
    np.testing.assert_array_equal(found.images, [smooth, GREY])
    assert found.provenance["kinds"] == {"jpeg": 1, "png": 1}
    assert any("several formats" in note for note in found.notes)


def test_images_are_averaged_over_the_area_and_cropped_to_the_square(tmp_path: Path) -> None:
    tall = np.full((24, 16), 200, np.uint8)
    tall[4:20] = np.kron(np.arange(64).reshape(8, 8), np.ones((2, 2)))  # its middle square
    tall[4:20:2, ::2] += 2  # 2, 0, 0, 0 over each block: half a grey value on average
    tall[5:20:2, 1::2] += 2  # and another half
    found = read(write(tmp_path / "holes", {"a.png": png(tall)}), ["a"], image_size_px=8)
    np.testing.assert_array_equal(found.images[0], np.arange(64).reshape(8, 8) + 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 40), 40), ((256, 256), 256), ((257, 257), DEFAULT_SIZE_PX), ((30, 40), DEFAULT_SIZE_PX)],
)
def test_default_size(tmp_path: Path, shape: tuple[int, int], expected: int) -> None:
    usual = np.zeros(shape, np.uint8)
    files = {"a.png": png(usual), "b.png": png(usual), "c.png": png(np.zeros((50, 50), np.uint8))}
    found = read(write(tmp_path / "holes", files), ["a", "b", "c"])
    assert found.images.shape == (3, expected, expected)
    assert any("sizes" in note for note in found.notes)


# ------------------------------------------------------------ formats


def test_the_same_picture_in_every_format(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 30_000, (SIDE, SIDE))
    u2, i2, f4 = deep.astype(np.uint16), deep.astype(np.int16), deep.astype(np.float32)
    big = {kind: pixels.astype(pixels.dtype.newbyteorder(">")) for kind, pixels in
           (("i2", i2), ("f4", f4))}  # fmt: skip
    files = {
        "png.png": png(u2),
        "tiff_u2.tif": tiff(u2),
        "tiff_i2_big.tif": tiff(i2, byteorder=">"),
        "tiff_f4.tif": tiff(f4, rowsperstrip=3),
        "tiff_f8.tif": tiff(deep.astype(np.float64), bigtiff=True),
        "tiff_i4_tiled.tif": tiff(deep.astype(np.int32), tile=(16, 16), byteorder=">"),
        "tiff_deflate.tif": tiff(f4, compression="zlib", rowsperstrip=5),
        "tiff_deflate_u2.tif": tiff(u2, compression="zlib", predictor=True, byteorder=">"),
        "tiff_white_low.tif": tiff(np.invert(u2), photometric="miniswhite"),
        "mrc_u2.mrc": mrc(u2),
        "mrc_i2_big.mrc": mrc(big["i2"]),
        "mrc_f4.mrc": mrc(f4),
        "mrc_f4_big.mrc": mrc(big["f4"]),
        "mrc_extended.mrc": mrc(f4, extended=b"x" * 320),
        "mrc_no_stamp.mrc": put(mrc(f4), 212, 0),
        "mrc_old.mrc": put(put(mrc(big["f4"]), 212, 0), 208, 0),
        "mrc_wrong_stamp.mrc": put(mrc(f4), 212, 0x1111),
    }
    found = read(write(tmp_path / "holes", files), [name.rpartition(".")[0] for name in files])
    assert found.rejected == ()
    low, high = (found.provenance["to_uint8"][key] for key in ("low", "high"))
    expected = np.rint(np.clip((deep - low) * 255 / (high - low), 0, 255))
    assert np.abs(found.images[0].astype(int) - expected).max() <= 1  # float32 at a half
    for row, name in enumerate(files):
        np.testing.assert_array_equal(found.images[row], found.images[0], err_msg=name)


def test_8_bit_grey_is_the_same_by_png_and_tiff(tmp_path: Path) -> None:
    colour = np.stack([GREY] * 3, -1)
    files = {
        "a.tif": tiff(GREY),
        "b.tif": tiff(GREY, compression="zlib", tile=(16, 16)),
        "c.tif": tiff(colour, photometric="rgb"),
        "d.tif": tiff(np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate"),
        "e.png": png(GREY),
        "f.tif": tiff(np.invert(GREY), photometric="miniswhite"),
    }
    found = read(write(tmp_path / "holes", files), list("abcdef"))
    assert found.rejected == ()
    np.testing.assert_array_equal(found.images, [GREY] * 6)


def test_signed_bytes_and_half_floats_of_mrc(tmp_path: Path) -> None:
    signed = (GREY.astype(int) - 128).astype(np.int8)
    files = {"a.mrc": mrc(signed), "b.mrc": mrc(signed.astype(np.float16))}
    found = read(write(tmp_path / "holes", files), ["a", "b"])
    np.testing.assert_array_equal(found.images[0], found.images[1])
    assert (np.diff(found.images[0].reshape(-1).astype(int)) >= 0).all()


def test_the_first_row_of_a_file_is_the_first_row_of_the_image(tmp_path: Path) -> None:
    rows = np.repeat(np.arange(SIDE, dtype=np.float32), SIDE).reshape(SIDE, SIDE)
    files = {"a.mrc": mrc(rows), "b.tif": tiff(rows), "c.png": png(rows.astype(np.uint8))}
    found = read(write(tmp_path / "holes", files), ["a", "b", "c"])
    for image in found.images:
        assert (np.diff(image[:, 0].astype(int)) > 0).all() and (image == image[:, :1]).all()


def test_one_affine_map_for_all_images_of_a_session(tmp_path: Path) -> None:
    """Thick ice stays darker than thin ice, and a hot pixel does not darken the others."""
    rng = np.random.default_rng(1)
    means = np.linspace(1000, 3000, 40)
    pictures = [rng.normal(mean, 20, (SIDE, SIDE)).astype(np.float32) for mean in means]
    pictures[0][3, 3] = 1e30
    files = {f"{i}.tif": tiff(picture) for i, picture in enumerate(pictures)}
    found = read(write(tmp_path / "holes", files), [str(i) for i in range(40)])
    seen = found.images[1:-1].mean(axis=(1, 2))
    assert np.corrcoef(seen, means[1:-1])[0, 1] > 0.999 and np.ptp(seen) > 200
    assert found.images[0][3, 3] == 255 and np.median(found.images[0]) < 15
    to_uint8 = found.provenance["to_uint8"]
    assert 900 < to_uint8["low"] < 1010 and 2990 < to_uint8["high"] < 3100
    assert to_uint8["percentiles"] == [0.1, 99.9]
    again = read(tmp_path / "holes", [str(i) for i in range(20)][::-1])  # half of the session
    assert again.provenance["to_uint8"] != to_uint8


def test_a_flat_image_has_a_map_too(tmp_path: Path) -> None:
    found = read(write(tmp_path / "holes", {"a.mrc": mrc(np.full((9, 9), 5, np.float32))}), ["a"])
    assert not found.images.any()


# ------------------------------------------------------------ hostile files


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, pixels: bytes, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zeros(num_mib: int) -> bytes:
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(bytes(2**20)) for _ in range(num_mib)) + pack.flush()


def tag_at(data: bytes, tag: int) -> int:
    """Where a little-endian TIFF keeps the entry of a tag."""
    (start,) = struct.unpack_from("<I", data, 4)
    (number,) = struct.unpack_from("<H", data, start)
    entries = range(start + 2, start + 2 + 12 * number, 12)
    return next(at for at in entries if struct.unpack_from("<H", data, at)[0] == tag)


def tiff_with(tag: int, value: int, **options: object) -> bytes:
    data = tiff(GREY, **options)
    return put(put(data, tag_at(data, tag) + 2, 4, "<H"), tag_at(data, tag) + 8, value, "<I")


def tiff_bomb() -> bytes:
    """16 x 16 pixels whose strip unpacks to 64 MiB."""
    data, packed = tiff(GREY, compression="zlib"), zeros(64)
    data = put(data, tag_at(data, 273) + 8, len(data), "<I")
    return put(data, tag_at(data, 279) + 8, len(packed), "<I") + packed


def tiff_of_many_values() -> bytes:
    data = tiff(GREY)
    at = tag_at(data, 273)
    return put(put(data, at + 4, 2**20, "<I"), at + 8, len(data), "<I") + bytes(4 * 2**20)


def frames(kind: str) -> bytes:
    images, stream = [Image.fromarray(GREY), Image.fromarray(GREY[::-1])], io.BytesIO()
    images[0].save(stream, kind, save_all=True, append_images=images[1:])
    return stream.getvalue()


F4 = GREY.astype(np.float32)
SHORT = np.zeros((1, 1), np.uint8)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HOSTILE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "lfs pointer": (".png", lambda: LFS, "git lfs pull"),
    "empty": (".png", lambda: b"", "empty"),
    "text": (".png", lambda: b"not an image", "not a PNG, JPEG, TIFF or MRC image"),
    "gif": (".png", lambda: png(GREY, kind="GIF"), r"begins with b'GIF8"),
    "zeros": (".mrc", lambda: bytes(2000), "not a PNG, JPEG, TIFF or MRC image"),
    "too large a file": (".mrc", lambda: b"", "more than the"),
    "png cut": (".png", lambda: png(GREY)[:-40], "truncated or damaged"),
    "png header only": (".png", lambda: png(GREY)[:20], "damaged header"),
    "png flipped": (".png", lambda: put(png(GREY), 60, 7, "<B"), "damaged"),
    "png of one pixel": (".png", lambda: png(SHORT), "1 x 1 pixels: at least 8"),
    "png too long": (".png", lambda: png(np.zeros((8, 100), np.uint8)), "100 x 8 pixels: too long"),
    "png animated": (".png", lambda: frames("PNG"), "2 frames"),
    "png says larger": (".png", lambda: png_of(64, 64, zlib.compress(bytes(17 * 16))), "truncated"),
    "png bomb": (".png", lambda: png_of(5000, 5000, zeros(8)), "more than 16777216"),
    "png huge bomb": (".png", lambda: png_of(30_000, 30_000, zeros(8)), "decompression bomb"),
    "png text bomb": (
        ".png",
        lambda: png_of(16, 16, zlib.compress(bytes(17 * 16)), chunk(b"zTXt", b"a\0\0" + zeros(64))),
        "Decompressed data too large",
    ),
    "png profile bomb": (
        ".png",
        lambda: png_of(16, 16, zlib.compress(bytes(17 * 16)), chunk(b"iCCP", b"a\0\0" + zeros(64))),
        "Decompressed data too large",
    ),
    "jpeg cut": (".jpg", lambda: png(GREY, kind="JPEG")[:-60], "truncated"),
    "jpeg of inks": (".jpg", lambda: png(GREY, "CMYK", kind="JPEG"), "colours of the kind CMYK"),
    "mrc cut": (".mrc", lambda: mrc(F4)[:-1], "2047 bytes, its header says 2048"),
    "mrc too long": (".mrc", lambda: mrc(F4) + b"x", "2049 bytes, its header says 2048"),
    "mrc header cut": (".mrc", lambda: mrc(F4)[:1000], "not a PNG, JPEG, TIFF or MRC image"),
    "mrc says larger": (".mrc", lambda: put(mrc(F4), 0, 20), "its header says"),
    "mrc says smaller": (".mrc", lambda: put(mrc(F4), 4, 12), "its header says"),
    "mrc says huge": (".mrc", lambda: put(put(mrc(F4), 0, 2**31 - 1), 4, 2**31 - 1), "more than"),
    "mrc says negative": (".mrc", lambda: put(mrc(F4), 0, -16), "at least 8"),
    "mrc extended huge": (".mrc", lambda: put(mrc(F4), 92, 2**31 - 1), "its header says"),
    "mrc extended negative": (".mrc", lambda: put(mrc(F4), 92, -100), "its header says"),
    "mrc stack": (".mrc", lambda: mrc(np.stack([F4] * 3)), "16 x 16 x 3 pixels"),
    "mrc complex": (".mrc", lambda: mrc(F4.astype(np.complex64)), "mode 4 .complex."),
    "mrc 4-bit": (".mrc", lambda: put(mrc(F4), 12, 101), "mode 101 .4-bit."),
    "mrc unknown mode": (".mrc", lambda: put(mrc(F4), 12, 77), "mode 77 .unknown."),
    "mrc nan": (".mrc", lambda: put(mrc(F4), 1024, 0x7FC00000), "1 pixels are NaN or infinite"),
    "mrc inf": (".mrc", lambda: put(mrc(F4), 1024, 0x7F800000), "NaN or infinite"),
    "tiff cut": (".tif", lambda: tiff(F4)[:-10], "truncated"),
    "tiff header cut": (".tif", lambda: tiff(F4)[:6], "damaged header"),
    "tiff pages": (".tif", lambda: tiff(np.stack([F4] * 2), photometric="minisblack"), "one page"),
    "tiff nan": (".tif", lambda: tiff(F4 * np.nan), "256 pixels are NaN"),
    "tiff beyond float32": (".tif", lambda: tiff(F4.astype(float) * 1e300), "infinite"),
    "tiff complex": (".tif", lambda: tiff(F4.astype(np.complex64)), "complex64"),
    "tiff palette": (".tif", lambda: png(GREY, "P", kind="TIFF"), "photometry 3"),
    "tiff lzw": (".tif", lambda: png(GREY, kind="TIFF", compression="tiff_lzw"), "by LZW"),
    "tiff deep colours": (
        ".tif",
        lambda: tiff(np.zeros((16, 16, 3), np.uint16), photometric="rgb"),
        "colours of uint16",
    ),
    "tiff says larger": (".tif", lambda: tiff_with(256, 32), "bytes of pixels, its header says"),
    "tiff says huge": (".tif", lambda: tiff_with(256, 2**31), "more than 16777216"),
    "tiff directory beyond": (".tif", lambda: put(tiff(GREY), 4, 2**30), "damaged header"),
    "tiff strip beyond": (".tif", lambda: tiff_with(273, 2**31), "truncated"),
    "tiff strip counts": (".tif", lambda: tiff_with(279, 10), "10 bytes of pixels"),
    "tiff bomb": (".tif", tiff_bomb, "unpacks to 257 bytes or more, its header says 256"),
    "tiff huge tile": (
        ".tif",
        lambda: tiff_with(322, 2**20, compression="zlib", tile=(16, 16)),
        "unpacks to 256 bytes, its header says 16777216",
    ),
    "tiff of many values": (".tif", tiff_of_many_values, "1048576 values"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_kept_out_with_its_reason(
    folder: Path, name: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    suffix, make, reason = HOSTILE[name]
    write(folder, {f"bad{suffix}": make()})
    if name == "too large a file":
        with (folder / f"bad{suffix}").open("r+b") as stream:
            stream.truncate(MAX_BYTES + 1)  # a hole in the disk, of no size
    found = read(folder, ["bad", "good"])
    assert found.has_image.tolist() == [False, True]
    assert not found.images[0].any() and (found.images[1] == GREY).all()
    [row] = found.rejected
    assert row.file == str(folder / f"bad{suffix}") and row.line is None
    assert row.origin == f"{folder}{os.sep}" and str(row) == f"{row.file}: {row.reason}"
    assert re.search(reason, row.reason, re.IGNORECASE), row.reason
    assert found.provenance["num_rejected"] == 1
    said = capfd.readouterr()
    assert said.out == said.err == "" and caplog.records == []


@pytest.mark.parametrize(
    "name", ["png text bomb", "mrc extended huge", "mrc says huge", "tiff bomb"]
)
def test_what_a_header_says_costs_no_memory(folder: Path, name: str) -> None:
    suffix, make, _ = HOSTILE[name]
    write(folder, {f"bad{suffix}": make()})
    read(folder, ["bad", "good"])  # imports are not counted
    tracemalloc.start()
    read(folder, ["bad", "good"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_what_is_no_file_is_kept_out(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "other", {"secret.png": png(GREY)})
    os.mkfifo(folder / "pipe.png")  # its opening would wait for a writer
    (folder / "dir.png").mkdir()
    (folder / "out.png").symlink_to(outside / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    (folder / "inside.png").symlink_to(folder / "good.png")
    names = ["pipe", "dir", "out", "loop", "dangling", "inside", "good"]
    found = read(folder, names)
    reasons = {Path(row.file).stem: row.reason for row in found.rejected}
    assert reasons["pipe"] == "not a regular file" and reasons["dir"] == "a folder"
    assert "a link out of the folder" in reasons["out"]
    assert "cannot be read" in reasons["loop"] and "cannot be read" in reasons["dangling"]
    assert found.has_image.tolist() == [False] * 5 + [True] * 2


def test_a_full_disk_is_an_error(folder: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        read_image_folder(folder, ["good"], "/dev/full")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_kept_out(folder: Path) -> None:
    write(folder, {"bad.png": png(GREY)})
    (folder / "bad.png").chmod(0)
    [row] = read(folder, ["bad", "good"]).rejected
    assert "Permission denied" in row.reason


def test_an_error_of_the_system_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, {"bad.png": png(GREY)})
    genuine = os.open

    def denied(path: object, *rest: object) -> int:
        if str(path).endswith("bad.png"):
            raise PermissionError(13, "Permission denied")
        return genuine(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", denied)
    [row] = read(folder, ["bad", "good"]).rejected
    assert "cannot be read: PermissionError" in row.reason


def test_of_two_files_of_a_hole_one_is_kept(tmp_path: Path) -> None:
    files = {"a.mrc": mrc(F4), "a.png": png(GREY), "a.tif": tiff(GREY)}
    found = read(write(tmp_path / "holes", files), ["a"])
    np.testing.assert_array_equal(found.images[0], GREY)
    assert [Path(row.file).name for row in found.rejected] == ["a.mrc", "a.tif"]
    assert {row.reason for row in found.rejected} == {"a.png is of the same hole, and kept"}


def test_deep_images_that_no_sample_foresaw_are_kept_out(tmp_path: Path) -> None:
    """A map that one image alone determines would be of that image, not of the session."""
    files = {f"{i:03d}.png": png(GREY) for i in range(600)}
    files["001.png"] = png(GREY.astype(np.uint16))  # not among 256 of 600
    found = read(write(tmp_path / "holes", files), sorted(name[:3] for name in files))
    [row] = found.rejected
    assert row.file.endswith("001.png") and "not 8-bit" in row.reason


# ------------------------------------------------------------ what stops an import


def test_what_cannot_be_used_at_all_is_said(folder: Path, tmp_path: Path) -> None:
    def fails(match: str, path: Path, names: list[str], **options: object) -> None:
        with pytest.raises(DataError, match=match):
            read(path, names, **options)

    fails("there is no folder", tmp_path / "none", ["a"])
    fails("is a file: give its folder", folder / "good.png", ["a"])
    fails("its first image is 'good.png'; expected such as 'x.png'", folder, ["x"])
    (tmp_path / "empty").mkdir()
    fails("it has no image", tmp_path / "empty", ["x"])
    fails("image size: 8 to 4096", folder, ["good"], image_size_px=4)
    write(folder, {"bad.png": LFS})
    fails(r"none of the 1 images of .* is usable; the first:\n.*git lfs pull", folder, ["bad"])


def test_a_missing_package_is_told_with_the_line_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, {"a.tif": tiff(GREY)})
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(DataError, match=r"pip install 'ssl2rl-ray\[em\]'"):
        read(folder, ["a", "good"])
    assert not logging.getLogger("tifffile").disabled


# ------------------------------------------------------------ any bytes


WHOLE = (".png", ".tif", ".mrc")


def whole(suffix: str) -> bytes:
    return {".png": png, ".tif": tiff, ".mrc": mrc}[suffix](GREY if suffix != ".mrc" else F4)


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from(WHOLE),
    edits=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)), max_size=4),
    kept=st.integers(0, 3000),
)
def test_any_edit_is_read_or_has_a_reason(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    edits: list[tuple[int, bytes]],
    kept: int,
) -> None:
    data = whole(suffix)
    for at, replacement in edits:
        data = data[:at] + replacement + data[at + len(replacement) :]
    folder = tmp_path_factory.mktemp("any") / "holes"
    write(folder, {"good.png": png(GREY), f"bad{suffix}": data[:kept]})
    found = read(folder, ["bad", "good"])
    assert found.has_image[1] and (found.images[1] == GREY).all()
    assert len(found.rejected) == int(not found.has_image[0])
    for row in found.rejected:
        assert row.reason.isascii() and row.reason.isprintable()
