"""Importer and dataset folder: known answers, hostile files, round trips."""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from envs.cryoem.types import HoleTable
from ssl2rl_ray.cli import main
from ssl2rl_ray.data import (
    DataError,
    RejectedRow,
    import_cryorl,
    import_cryorl_command,
    import_synthetic_command,
    parse_cryorl,
    read_calibration,
    read_cryorl,
    read_dataset,
    write_dataset,
)
from ssl2rl_ray.data import text as text_module

ALDOLASE = Path(__file__).parents[1].parent / "shared" / "data" / "aldolase"
real_data = pytest.mark.skipif(
    not ALDOLASE.is_dir(), reason="the Aldolase session is not beside this repository"
)

PATCH = "s_00001gr_00002sq_v01_00003hl"
HOLES = [f"{PATCH}_v01_0000{i}en-a" for i in range(1, 6)]
GOOD = (
    f"{HOLES[0]},-161.5,2.5,4.25,0.9\n"
    f"{HOLES[1]},10,-3.5e1,100000.0,0.001\n"
    f"{HOLES[2]},1,2,-1,-1\n"
    "s_00001gr_00002sq_v01_00004hl_v02_00001en,5,6,21.4,0.4\n"
    "s_00007gr_v01_00002sq_00003hl_00001en-b,7,8,6.0,0.99\n"
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    return write(tmp_path / "labels.csv", GOOD)


# ------------------------------------------------------------ known answers


def test_hand_written_session(labels: Path, tmp_path: Path) -> None:
    predictions = write(
        tmp_path / "p.txt", f"{HOLES[0]} 6.0\n{HOLES[1]} 8.0\n{HOLES[2]} -1\nother_00001gr 5\n"
    )
    session = parse_cryorl(labels, predictions)
    table = session.table
    assert session.rejected == ()
    assert table.hole_name.tolist()[:3] == HOLES[:3]
    np.testing.assert_array_equal(table.ctf_max_resolution_A, [4.25, 20, np.nan, 20, 6])
    np.testing.assert_array_equal(table.is_labelled, [True, True, False, True, True])
    np.testing.assert_array_equal(table.x, [-161.5, 10, 1, 5, 7])
    np.testing.assert_array_equal(table.y, [2.5, -35, 2, 6, 8])
    np.testing.assert_array_equal(table.predicted_ctf_A, [6, 8, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(table.p_low_ctf, [0.5, 1 / (1 + math.exp(2)), 0.5, 0.5, 0.5])
    assert table.grid_name.tolist() == ["s_00001gr", "s_00007gr"]
    assert table.square_name.tolist() == ["s_00001gr_00002sq", "s_00007gr_v01_00002sq"]
    assert table.patch_name.tolist() == [
        PATCH,
        "s_00001gr_00002sq_v01_00004hl",
        "s_00007gr_v01_00002sq_00003hl",
    ]
    assert table.patch_id.tolist() == [0, 0, 0, 1, 2]
    assert session.notes == (
        "3 of 5 holes have no prediction",
        "1 rows with a prediction name no hole of this session",
    )


@real_data
def test_aldolase_is_the_session_of_the_public_environment() -> None:
    session = parse_cryorl(
        ALDOLASE / "labels.csv",
        ALDOLASE / "predictions_resnet50.txt",
        hierarchy=ALDOLASE / "hierarchy.csv",
        timestamps=ALDOLASE / "timestamps.csv",
    )
    table = session.table
    assert session.rejected == () and session.notes == ()
    sizes = [len(table.grid_name), len(table.square_name), len(table.patch_name), len(table)]
    assert sizes == [6, 9, 60, 1197]
    lines = (ALDOLASE / "labels.csv").read_text().splitlines()
    assert table.hole_name.tolist() == [line.split(",")[0] for line in lines]
    with np.load(ALDOLASE / "conformance" / "conformance_train_cat_pred.npz") as public:
        row = {name: i for i, name in enumerate(table.hole_name)}
        rows = np.array([row[name] for name in public["names"]])
        np.testing.assert_array_equal(table.ctf_max_resolution_A[rows], public["gt"])
        np.testing.assert_array_equal(table.p_low_ctf[rows].round(4), public["p_low"])
        for level in ("grid", "square", "patch"):
            pairs = set(zip(getattr(table, f"{level}_id")[rows], public[level], strict=True))
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert session.acquired is not None
    first = session.acquired[row["21mar02c_grid1c_00019gr_00023sq_v01_00006hl_v01_00005en-a"]]
    assert first == np.datetime64("2021-03-06T11:08:30")


@real_data
def test_session_without_labels_imports_just_as_well() -> None:
    labelled = read_cryorl(ALDOLASE / "labels.csv", ALDOLASE / "predictions_resnet50.txt")
    table = read_cryorl(
        None, ALDOLASE / "predictions_resnet50.txt", hierarchy=ALDOLASE / "hierarchy.csv"
    )
    assert not table.is_labelled.any() and np.isnan(table.ctf_max_resolution_A).all()
    assert table.hole_name.tolist() == labelled.hole_name.tolist()
    np.testing.assert_array_equal(table.p_low_ctf, labelled.p_low_ctf)
    np.testing.assert_allclose(table.x, labelled.x, rtol=1e-14)  # the last digit differs in places
    exposures = read_cryorl(None, hierarchy=ALDOLASE / "hierarchy.csv")
    assert len(exposures) == 1370  # 1370 en, of which 1202 were acquired as en-a
    assert sum(name.endswith("en-a") for name in exposures.hole_name) == 1202


def test_predictions_alone_have_no_positions(tmp_path: Path) -> None:
    table = read_cryorl(None, write(tmp_path / "p", f"{HOLES[0]}\t5.5\r\n{HOLES[1]},7\r\n"))
    assert np.isnan(table.x).all() and table.predicted_ctf_A.tolist() == [5.5, 7]


def test_parents_from_the_hierarchy_where_names_do_not_say(tmp_path: Path) -> None:
    targets = "".join(f"{name},0,0,-1,-1\n" for name in ("aXgr", "aXgr_bsq", "aXgr_bsq_v01_chl"))
    table, rejected = import_cryorl(
        write(tmp_path / "l", "aXgr_bsq_v01_chl_00001ex,1,2,5,1\naXgr_bsq_00001ex,1,2,5,1\n"),
        hierarchy=write(tmp_path / "h", targets),
    )
    assert table.patch_name.tolist() == ["aXgr_bsq_v01_chl"]
    assert [(row.line, row.reason[:10]) for row in rejected] == [(2, "not a hole")]


# ------------------------------------------------------------ bad rows


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{HOLES[4]},1,2,5", "4 columns"),
        (f"{HOLES[4]},1,2,5,1,9", "6 columns"),
        ("name,x,y,ctf,confidence", "x 'x' is not a number"),
        (f"{HOLES[4]},1,2,five,1", "CTF 'five' is not a number"),
        (f"{HOLES[4]},1,2,,1", "CTF '' is not a number"),
        (f"{HOLES[4]},nan,2,5,1", "x 'nan' is not a number"),
        (f"{HOLES[4]},1,inf,5,1", "y 'inf' is not a number"),
        (f"{HOLES[4]},1,2,1e400,1", "CTF 1e400 is beyond"),
        (f"{HOLES[4]},1,2,1_0,1", "CTF '1_0' is not a number"),
        (f"{HOLES[4]},1,2,0x10,1", "CTF '0x10' is not a number"),
        (f"{HOLES[4]},1,2,\N{ARABIC-INDIC DIGIT FIVE},1", "non-ASCII character U+0665"),
        (f"{HOLES[4]},1,2,0.42,1", "below 0.5"),
        (f"{HOLES[4]},1,2,0,1", "below 0.5"),
        (f"{HOLES[0]},1,2,5,1", "already on line 1"),
        (PATCH + ",1,2,5,1", "not a hole"),
        (f"{PATCH}_00001fa,1,2,5,1", "not a hole"),
        ("../../etc/passwd,1,2,5,1", "the name must be"),
        (f"{PATCH}_..00009en,1,2,5,1", "the name must be"),
        ("=cmd|' /C calc'!A0,1,2,5,1", "the name must be"),
        (",1,2,5,1", "the name is empty"),
        ("a" * 201 + ",1,2,5,1", "the name must be"),
        (f"{HOLES[4]},1,2,5,1\0", "control character 0x00"),
        (f"{HOLES[4]}\x1b[2J,1,2,5,1", "control character 0x1b"),
        ("x" * 20_000, "20000 characters"),
    ],
)
def test_a_bad_row_is_kept_out_with_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "labels.csv", GOOD + "\n" + line + "\n" + f"{HOLES[3]},1,2,5,1\n")
    table, rejected = import_cryorl(path)
    assert [len(table), len(rejected)] == [6, 1]
    (row,) = rejected
    assert (row.file, row.line) == (str(path), 7)
    assert reason in row.reason
    assert len(row.text) < 200 and row.text.isascii() and row.text.isprintable()


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "l", GOOD.encode() + b"\xe9\xff" + HOLES[3].encode() + b",1,2,5,1\n")
    table, rejected = import_cryorl(path)
    assert len(table) == 5 and "undecodable bytes at column 1" in rejected[0].reason


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends_change_nothing(
    labels: Path, tmp_path: Path, mark: bytes, encoding: str, newline: str
) -> None:
    encoded = write(tmp_path / "e", mark + GOOD.replace("\n", newline).encode(encoding))
    assert read_cryorl(encoded).content_hash == read_cryorl(labels).content_hash
    cut = write(tmp_path / "cut", mark + GOOD.encode(encoding)[:-7])
    session = parse_cryorl(cut)
    assert len(session.table) in (4, 5) and any("no line end" in note for note in session.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \t\r\n\n", "is empty"),
        (b"\x1f\x8b\x08\x00abc", "compressed by gzip"),
        (b"PK\x03\x04abc", "zip archive"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"name,x,y,ctf,conf\n1,2,3\n", "none of the 2 lines"),
        (b"{}", "none of the 1 lines"),
        (bytes(1000), "none of the 1 lines"),
        (GOOD.encode("utf-16-le"), "none of the 6 lines"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_to_do(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = write(tmp_path / "labels.csv", content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read_cryorl(path)
    assert "labels" in str(error.value) and str(path) in str(error.value)


def test_missing_folder_pipe_and_large_files(
    tmp_path: Path, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="check the path"):
        read_cryorl(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"^labels: \S+ is a folder"):
        read_cryorl(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_cryorl("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        read_cryorl(tmp_path / "pipe")
    with pytest.raises(DataError, match="give --labels"):
        read_cryorl(None)
    monkeypatch.setattr(text_module, "MAX_LINES", 3)
    with pytest.raises(DataError, match="more than 3 lines"):
        read_cryorl(labels)
    monkeypatch.setattr(text_module, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="larger than"):
        read_cryorl(labels)


def test_files_of_two_sessions_are_an_error(labels: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "p", f"t{HOLES[0]} 5\n")
    with pytest.raises(DataError, match="the same session"):
        read_cryorl(labels, other)
    with pytest.raises(DataError, match="no exposure"):
        read_cryorl(None, hierarchy=write(tmp_path / "h", f"{PATCH},0,0,-1,-1\n"))


def test_times(labels: Path, tmp_path: Path) -> None:
    times = write(
        tmp_path / "t",
        f"{HOLES[0]},2021-03-02 12:44:07\n{HOLES[1]},2021-02-30 12:00:00\n{HOLES[2]},yesterday\n",
    )
    session = parse_cryorl(labels, timestamps=times)
    assert session.acquired is not None and session.acquired.shape == (5,)
    assert session.acquired[0] == np.datetime64("2021-03-02T12:44:07")
    assert np.isnat(session.acquired[1:]).all()
    assert [row.line for row in session.rejected] == [2, 3]


def test_a_hundred_thousand_rows_in_seconds(tmp_path: Path) -> None:
    names = [
        f"s_{i // 20000:05d}gr_{i // 5000:05d}sq_v01_{i // 20:05d}hl_v01_{i:06d}en-a"
        for i in range(100_000)
    ]
    rng = np.random.default_rng(0)
    ctf = rng.uniform(2, 20, 100_000)
    lines = "".join(f"{n},1.5,2.5,{c:.3f},0.9\n" for n, c in zip(names, ctf, strict=True))
    table = read_cryorl(write(tmp_path / "l", lines))
    assert len(table) == 100_000 and len(table.patch_name) == 5000


# ------------------------------------------------------------ properties


def expected_lines(data: bytes) -> int:
    """Non-blank lines, counted apart from the importer."""
    for mark, encoding in (
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if data.startswith(mark):
            data = data[len(mark) :].decode(encoding, "replace").encode("utf-8", "replace")
            break
    data = data.removeprefix(codecs.BOM_UTF8)
    return sum(bool(line.strip(b" \t")) for line in re.split(rb"\r\n|\r|\n", data))


def assert_accounted(path: Path, role: str = "labels") -> None:
    try:
        session = parse_cryorl(**{"labels": None, role: path})
    except DataError:
        return
    (source,) = session.sources
    assert (
        source["kept"] + source["rejected"] == source["lines"] == expected_lines(path.read_bytes())
    )
    assert len(session.rejected) == source["rejected"]
    assert all(row.line >= 1 and row.reason and row.text.isprintable() for row in session.rejected)
    if role != "hierarchy":
        assert len(session.table) == source["kept"]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    assert_accounted(write(folder / "a", data))
    assert_accounted(write(folder / "b", GOOD.encode() + data))


FIELDS = st.one_of(
    st.sampled_from([*HOLES, PATCH, "-1", "100000", "nan", "", "1e400", "5.5", "..", "\0", "٣"]),
    st.floats().map(repr),
    st.text(max_size=12),
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.lists(FIELDS, max_size=7), max_size=12), separator=st.sampled_from(", \t"))
def test_any_rows_in_any_role(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], separator: str
) -> None:
    content = "\n".join(separator.join(row) for row in rows).encode("utf-8", "surrogatepass")
    path = write(tmp_path_factory.mktemp("rows") / "a", content)
    for role in ("labels", "predictions", "hierarchy"):
        assert_accounted(path, role)


@settings(max_examples=100, deadline=None)
@given(
    position=st.integers(0, len(GOOD) - 1),
    kept=st.integers(0, len(GOOD)),
    byte=st.binary(max_size=3),
)
def test_any_cut_and_any_flip(
    tmp_path_factory: pytest.TempPathFactory, position: int, kept: int, byte: bytes
) -> None:
    data = (GOOD.encode()[:position] + byte + GOOD.encode()[position + len(byte) :])[:kept]
    assert_accounted(write(tmp_path_factory.mktemp("cut") / "a", data))


# ------------------------------------------------------------ dataset folder


@st.composite
def tables(draw: st.DrawFn) -> HoleTable:
    n = draw(st.integers(1, 12))
    number = st.one_of(st.just(math.nan), st.floats(-1e9, 1e9))
    ctf = st.one_of(st.just(math.nan), st.floats(0.5, 20))
    letters = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
    patch = draw(st.lists(st.integers(0, 7), min_size=n, max_size=n))

    def column(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=n, max_size=n)))

    table = HoleTable.from_names(
        hole_name=draw(st.lists(letters, min_size=n, max_size=n, unique=True)),
        grid=[f"g{p // 4}" for p in patch],
        square=[f"s{p // 2}" for p in patch],
        patch=[f"p{p}" for p in patch],
        x=column(number),
        y=column(number),
        ctf_max_resolution_A=column(ctf),
        predicted_ctf_A=column(number),
        p_low_ctf=column(st.floats(0, 1)),
    )
    codes = draw(st.permutations(range(len(table.patch_name))))  # codes in another order
    names = np.empty_like(table.patch_name)
    names[list(codes)] = table.patch_name
    return table.replace(patch_id=np.array(codes)[table.patch_id], patch_name=names)


@settings(max_examples=60, deadline=None)
@given(table=tables(), has_times=st.booleans())
def test_folder_round_trip(
    tmp_path_factory: pytest.TempPathFactory, table: HoleTable, has_times: bool
) -> None:
    folder = tmp_path_factory.mktemp("d") / "session"
    times = np.array(["2021-03-02T12:44:07", "NaT"] * len(table), "datetime64[us]")[: len(table)]
    write_dataset(table, folder, provenance={"å": [1, None]}, acquired=times if has_times else None)
    dataset = read_dataset(folder)
    assert dataset.table.content_hash == table.content_hash
    assert dataset.table.patch_name.tolist() == table.patch_name.tolist()
    assert dataset.manifest["provenance"] == {"å": [1, None]} and dataset.calibration is None
    if has_times:
        np.testing.assert_array_equal(dataset.acquired, times)
    else:
        assert dataset.acquired is None


@pytest.fixture
def folder(labels: Path, tmp_path: Path) -> Path:
    rejected = [RejectedRow(file="a.csv", line=3, reason="why, indeed", text="'=1+1'")]
    path = tmp_path / "out" / "session"
    write_dataset(
        read_cryorl(labels), path, provenance={}, calibration={"a": 1.5}, rejected=rejected
    )
    return path


def test_folder_content(folder: Path) -> None:
    assert sorted(p.name for p in folder.parent.iterdir()) == ["session"]  # nothing temporary
    dataset = read_dataset(folder)
    assert dataset.calibration == {"a": 1.5}
    counts = {"holes": 5, "grids": 2, "squares": 2, "patches": 3, "labelled": 4, "predicted": 0}
    assert dataset.manifest["counts"] == counts
    assert dataset.manifest["rejected"] == {"rows": 1, "by_file": {"a.csv": 1}}
    with (folder / "rejected.csv").open(newline="") as stream:
        assert list(csv.reader(stream))[1] == ["a.csv", "3", "why, indeed", "'=1+1'"]


def test_only_our_own_folder_is_replaced_and_only_by_force(folder: Path, labels: Path) -> None:
    table = read_cryorl(labels)
    with pytest.raises(DataError, match="--force"):
        write_dataset(table, folder, provenance={})
    assert write_dataset(table, folder, provenance={"v": 2}, force=True).calibration is None
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other files in it \('notes.txt'\)"):
        write_dataset(table, folder, provenance={}, force=True)
    with pytest.raises(DataError, match="left alone"):
        write_dataset(table, folder.parent, provenance={}, force=True)
    with pytest.raises(DataError, match="is a file"):
        write_dataset(table, labels, provenance={}, force=True)
    with pytest.raises(DataError, match="cannot write"):
        write_dataset(table, labels / "below", provenance={})
    assert read_dataset(folder).manifest["provenance"] == {"v": 2}


def test_a_failed_write_leaves_the_earlier_folder(
    folder: Path, labels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_dataset(folder).manifest

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        write_dataset(read_cryorl(labels), folder, provenance={}, force=True)
    assert read_dataset(folder).manifest == before
    assert [p.name for p in folder.parent.iterdir()] == ["session"]


# ------------------------------------------------------------ images in the folder


def pictures(num: int, side: int = 4) -> np.ndarray:
    return np.arange(num * side * side, dtype=np.uint32).reshape(num, side, side).astype(np.uint8)


@pytest.fixture
def with_images(labels: Path, tmp_path: Path) -> Path:
    has_image = np.array([True, True, False, True, True])
    images = pictures(5) * has_image[:, None, None]
    path = tmp_path / "with images"
    write_dataset(read_cryorl(labels), path, provenance={}, images=images, has_image=has_image)
    return path


def test_images_round_trip(with_images: Path, folder: Path) -> None:
    dataset = read_dataset(with_images)
    assert dataset.has_image.tolist() == [True, True, False, True, True]
    images = dataset.images
    assert isinstance(images, np.memmap) and not images.flags.writeable
    np.testing.assert_array_equal(images[[0, 1, 3, 4]], pictures(5)[[0, 1, 3, 4]])
    assert not images[2].any() and dataset.images is images
    np.testing.assert_array_equal(np.load(with_images / "images.npy"), images)
    assert dataset.manifest["counts"]["images"] == 4 and dataset.manifest["image_size_px"] == 4
    without = read_dataset(folder)
    assert without.table.content_hash == dataset.table.content_hash  # images are beside the table
    assert without.images is None and without.has_image.tolist() == [False] * 5
    assert "images" not in without.manifest["counts"]


def test_only_a_folder_with_images_needs_the_newer_reader(with_images: Path, folder: Path) -> None:
    assert read_dataset(with_images).manifest["format_version"] == 2
    assert read_dataset(folder).manifest["format_version"] == 1


def test_all_holes_have_an_image_unless_it_is_said_otherwise(labels: Path, tmp_path: Path) -> None:
    table = read_cryorl(labels)
    dataset = write_dataset(table, tmp_path / "d", provenance={}, images=pictures(5))
    assert dataset.has_image.all()
    for images, has_image, match in (
        (pictures(4), None, r"expected uint8 \(5, H, W\), found uint8 \(4, 4, 4\)"),
        (pictures(5).astype(float), None, "found float64"),
        (pictures(5)[0], None, "images: expected"),
        (pictures(5), np.ones(4, bool), "has_image: expected"),
        (None, np.ones(5, bool), "give images too"),
    ):
        with pytest.raises(ValueError, match=match):
            write_dataset(table, tmp_path / "e", provenance={}, images=images, has_image=has_image)
    assert not (tmp_path / "e").exists()


def test_images_are_written_and_read_without_being_held_in_memory(tmp_path: Path) -> None:
    names = [f"h{i}" for i in range(256)]
    table = HoleTable.from_names(hole_name=names, grid=["g"] * 256, square=["s"] * 256, patch=names)
    source = np.lib.format.open_memmap(
        tmp_path / "source.npy", mode="w+", dtype=np.uint8, shape=(256, 512, 512)
    )  # 64 MiB
    source[::17, 5, :] = np.arange(512).astype(np.uint8)
    tracemalloc.start()
    dataset = write_dataset(table, tmp_path / "d", provenance={}, images=source)
    mirrored = source[:, :, ::-1]  # in no order that could be written as it is
    again = write_dataset(table, tmp_path / "e", provenance={}, images=mirrored)
    assert dataset.images is not None and again.images is not None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * 2**20
    np.testing.assert_array_equal(dataset.images[17], source[17])
    np.testing.assert_array_equal(again.images[17], source[17, :, ::-1])


def test_reading_the_table_reads_no_image(with_images: Path) -> None:
    data = bytearray((with_images / "images.npy").read_bytes())
    data[-1] ^= 1
    write(with_images / "images.npy", bytes(data))
    dataset = read_dataset(with_images)
    assert len(dataset.table) == 5
    with pytest.raises(DataError, match=r"images\.npy was changed after the import: import the"):
        _ = dataset.images


def replace_images(folder: Path, data: bytes) -> None:
    """Another file of images, with a manifest that vouches for it."""
    write(folder / "images.npy", data)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["images.npy"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, files=files)


def npy(array: np.ndarray, **options: bool) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_damaged_images_are_said(with_images: Path) -> None:
    path = with_images / "images.npy"
    good = path.read_bytes()
    for make, match in (
        (lambda: write(path, good[:-1]), r"images\.npy has \d+ bytes, its manifest says"),
        (path.unlink, "missing or unreadable"),
        (lambda: path.symlink_to(with_images), "is not a file"),
    ):
        make()
        with pytest.raises(DataError, match=match):
            read_dataset(with_images)
    path.unlink()
    for data, match in (
        (good.replace(b"(5, 4, 4)", b"(5, 9, 9)"), "does not fit its"),
        (good.replace(b"(5, 4, 4)", b"(4, 5, 4)"), r"\(4, 5, 4\), expected uint8 \(5, H, W\)"),
        (good.replace(b"|u1", b"|i1"), "int8"),
        (npy(np.asfortranarray(pictures(5))), "expected uint8"),
        (npy(np.array([{}] * 5), allow_pickle=True), "object"),
        (b"\x93NUMPY\x09\x00" + good[8:], "not version 1.0"),
        (b"PK" + good[2:], "magic"),
        (b"", "images"),
    ):
        replace_images(with_images, data)
        with pytest.raises(DataError, match=match) as told:
            _ = read_dataset(with_images).images
        assert "import the session again" in str(told.value)
    replace_images(with_images, good)
    assert read_dataset(with_images).images is not None


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_what_is_wrong_with_a_folder_is_said(folder: Path, tmp_path: Path) -> None:
    def fails(match: str, path: Path = folder) -> None:
        with pytest.raises(DataError, match=match):
            read_dataset(path)

    fails("does not exist", tmp_path / "none")
    fails("is a file", write(tmp_path / "file", "x"))
    fails("not a dataset folder", tmp_path)
    original = {p.name: p.read_bytes() for p in folder.iterdir()}

    def restored() -> None:
        for name, data in original.items():
            write(folder / name, data)

    table = original["holes.parquet"]
    write(folder / "holes.parquet", table[:-10])
    fails("bytes, its manifest says")
    write(folder / "holes.parquet", table[:50] + bytes([table[50] ^ 1]) + table[51:])
    fails("changed after the import")
    (folder / "holes.parquet").unlink()
    fails("missing")
    restored()
    write(folder / "calibration.json", b'{"a": 1.6}')
    fails(r"calibration\.json")
    restored()
    edit_manifest(folder, content_hash="0" * 16)
    fails("content hash")
    edit_manifest(folder, format_version=99)
    fails("update ssl2rl-ray")
    edit_manifest(folder, format_version="one")
    fails("no format_version")
    for files in ({}, [], None, {"holes.parquet": 3}, {"../../x": {"bytes": 1, "sha256": ""}}):
        restored()
        edit_manifest(folder, files=files)
        fails("import the session again")
    restored()
    edit_manifest(folder, format="other")
    fails("of something else")
    write(folder / "manifest.json", b'{"format": "ssl2rl')
    fails("damaged")
    write(folder / "manifest.json", b"[" * 100_000)
    fails("damaged")
    restored()
    assert len(read_dataset(folder).table) == 5


@settings(max_examples=200, deadline=None)
@given(position=st.floats(0, 1), bit=st.integers(0, 7), is_table=st.booleans())
def test_any_flipped_bit_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int, is_table: bool
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    table = read_cryorl(write(folder / "l", GOOD))
    out = folder / "out"
    write_dataset(table, out, provenance={})
    path = out / ("holes.parquet" if is_table else "manifest.json")
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
    if is_table:
        with pytest.raises(DataError, match="changed after the import"):
            read_dataset(out)
        return
    with contextlib.suppress(DataError):  # noticed, or in a text that nothing depends on
        assert read_dataset(out).table.content_hash == table.content_hash


# ------------------------------------------------------------ commands


@real_data
def test_calibration_is_stored_with_one_session_and_used_on_another(tmp_path: Path) -> None:
    lines = (ALDOLASE / "labels.csv").read_text().splitlines(keepends=True)
    half = ["00008gr", "00012gr", "00019gr"]
    train = write(
        tmp_path / "train.csv", "".join(line for line in lines if any(g in line for g in half))
    )
    predictions = ALDOLASE / "predictions_resnet50.txt"
    first = import_cryorl_command(train, predictions, None, None, tmp_path / "train")
    assert first.calibration is not None
    assert first.calibration["fitted_on"] == first.table.content_hash
    raw = read_cryorl(train, predictions)
    np.testing.assert_array_equal(first.table.p_low_ctf, raw.p_low_ctf)  # its own stays raw

    rest = write(
        tmp_path / "rest.txt",
        "".join(
            line
            for line in predictions.read_text().splitlines(keepends=True)
            if not any(g in line for g in half)
        ),
    )
    second = import_cryorl_command(None, rest, None, None, tmp_path / "new", tmp_path / "train")
    assert second.calibration is None and not second.table.is_labelled.any()
    applied = second.manifest["provenance"]["calibration_applied"]
    assert applied["fitted_on"] == first.table.content_hash and applied["num_shared_holes"] == 0
    expected = read_calibration(tmp_path / "train").apply(read_cryorl(None, rest))
    np.testing.assert_array_equal(second.table.p_low_ctf, expected.p_low_ctf)
    again = import_cryorl_command(
        None, predictions, None, None, tmp_path / "same", tmp_path / "train"
    )
    assert again.manifest["provenance"]["calibration_applied"]["num_shared_holes"] == len(raw)
    assert any("in-sample" in note for note in again.manifest["provenance"]["notes"])
    with pytest.raises(DataError, match="has no calibration"):
        read_calibration(tmp_path / "new")


def test_labels_of_one_kind_import_without_a_calibration(labels: Path, tmp_path: Path) -> None:
    only_high = write(tmp_path / "l", f"{HOLES[0]},1,2,9,1\n{HOLES[1]},1,2,9,1\n")
    predictions = write(tmp_path / "p", f"{HOLES[0]} 5\n{HOLES[1]} 6\n")
    dataset = import_cryorl_command(only_high, predictions, None, None, tmp_path / "out")
    assert dataset.calibration is None
    assert "no calibration stored" in dataset.manifest["provenance"]["notes"][0]


def test_synthetic_session_by_seed(tmp_path: Path) -> None:
    first = import_synthetic_command("demo", 3, tmp_path / "a")
    again = import_synthetic_command("demo", 3, tmp_path / "b")
    other = import_synthetic_command("demo", 4, tmp_path / "c")
    assert first.table.content_hash == again.table.content_hash != other.table.content_hash
    assert read_calibration(tmp_path / "a").num_holes > 0
    with pytest.raises(ValueError, match="nonsense"):
        import_synthetic_command("nonsense", 3, tmp_path / "d")
    with pytest.raises(DataError, match="seed"):
        import_synthetic_command("demo", -1, tmp_path / "d")


@pytest.mark.parametrize("preset", ["demo", "y3-mini"])
def test_synthetic_sessions_have_images(preset: str, tmp_path: Path) -> None:
    first = import_synthetic_command(preset, 3, tmp_path / "a")
    again = import_synthetic_command(preset, 3, tmp_path / "b")
    assert first.images is not None and again.images is not None
    assert first.images.shape == (len(first.table), 32, 32) and first.has_image.all()
    np.testing.assert_array_equal(first.images, again.images)
    is_predicted = np.isfinite(first.table.predicted_ctf_A)
    if preset == "demo":
        assert is_predicted.all() and first.calibration is not None
    else:  # a classifier of the images is to predict
        assert not is_predicted.any() and (first.table.p_low_ctf == 0.5).all()
        assert first.calibration is None
        assert "a classifier of the images" in first.manifest["provenance"]["notes"][0]


def test_images_of_a_session_are_imported_with_it(labels: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for value, name in enumerate(HOLES):
        Image.fromarray(np.full((20, 20), value, np.uint8)).save(images / f"{name}.png")
    write(images / f"{HOLES[1]}.png", b"version https://git-lfs.github.com/spec/v1\n")
    out = tmp_path / "out" / "session"
    steps: list[float] = []
    dataset = import_cryorl_command(
        labels,
        None,
        None,
        None,
        out,
        images=images,
        image_size_px=10,
        on_step=lambda what, share: steps.append(share),
    )
    assert dataset.has_image.tolist() == [True, False, True, False, False]
    assert dataset.images is not None and dataset.images.shape == (5, 10, 10)
    assert (dataset.images[2] == 2).all()
    provenance = dataset.manifest["provenance"]
    assert provenance["images"]["num_rejected"] == 1 and provenance["images"]["to_uint8"] is None
    assert provenance["images"]["sizes_in_sample"] == {"20x20": 2}
    assert any("2 of 5 holes have no file" in note for note in provenance["notes"])
    assert dataset.manifest["rejected"] == {"rows": 1, "by_file": {f"{images}{os.sep}": 1}}
    with (out / "rejected.csv").open(newline="") as stream:
        [_, row] = csv.reader(stream)
    assert row[:2] == [str(images / f"{HOLES[1]}.png"), ""] and "git lfs pull" in row[2]
    assert sorted(p.name for p in out.parent.iterdir()) == ["session"]  # nothing temporary
    assert steps[-1] == 1.0
    with pytest.raises(DataError, match="--force"):  # before any image is read
        import_cryorl_command(labels, None, None, None, out, images=tmp_path / "none")
    with pytest.raises(DataError, match="give --images"):
        import_cryorl_command(labels, None, None, None, out, image_size_px=10)


def test_the_command_says_how_many_images(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "session"
    images.mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(images / f"{HOLES[0]}.png")
    write(images / f"{HOLES[1]}.png", b"")
    words = ["import", "cryorl", "--labels", labels, "--images", images, "--image-size", 8]
    assert main([*map(str, words), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 of 5 holes have an image, 8 px" in said
    assert f"1 rows and images kept out (1 of {images}{os.sep})" in said
    assert f"with its reason in {out / 'rejected.csv'}" in said
    assert "3 of 5 holes have no file" in said
    assert main(["import", "synthetic", "--preset", "demo", "--out", str(tmp_path / "demo")]) == 0
    assert re.search(r"(\d+) of \1 holes have an image, 32 px", capsys.readouterr().out)
    assert main([*map(str, words[:-2]), "--out", str(tmp_path / "other")]) == 0
    assert "1 of 5 holes have an image, 20 px" in capsys.readouterr().out
