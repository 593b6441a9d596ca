"""Embedded pipeline, memo and spreading: truth, caches, what goes wrong."""

import dataclasses
import json
import os
import pickle
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import h5py
import numpy as np
import pytest

from envs.crystfel.experiment import TRUTH_FILE, read_experiment
from envs.crystfel.indexer import IndexerError, Memo, _read
from envs.crystfel.sfx import peaks, pipeline
from envs.crystfel.sfx.formats import read_image
from envs.crystfel.sfx.index import KnownCell, misorientation_deg
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import simulate
from envs.crystfel.types import Frame, IndexingResult, Parameters, concatenate, wilson
from ssl2rl_ray.cli import main


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """24 frames of an easy experiment."""
    return simulate("clean", 24, 3, tmp_path_factory.mktemp("sfx") / "clean")


def same(a: IndexingResult, b: IndexingResult) -> bool:
    """Equal in everything but the time it took."""
    fields = [f.name for f in dataclasses.fields(a) if f.name != "cpu_s"]
    return all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n not in
               ("version", "argv")) for n in fields)  # fmt: skip


class Counting:
    """An indexer that counts its calls."""

    version = "counting 1"

    def __init__(self):
        self.calls = 0

    def run(self, parameters, frames):
        self.calls += 1
        if not frames:
            raise IndexerError("no frames")
        n = len(frames)
        is_indexed = np.arange(n) % 2 == 0
        return IndexingResult(
            is_indexed=is_indexed,
            is_hit=np.ones(n, dtype=bool),
            num_peaks=np.full(n, parameters.min_snr),
            num_crystals=int(is_indexed.sum()),
            mean_cell=np.full(6, np.nan),
            cell_ratio=float("nan"),
            residual_px=0.5,
            spot_shift_px=np.array([0.25, np.nan]),
            cpu_s=1.5,
            version=self.version,
            argv=("a", "b c"),
        )


# ------------------------------------------------------------------ against the truth


def test_finds_the_crystals_of_the_simulation_and_no_others(clean):
    indexer = EmbeddedIndexer(clean)
    result = indexer.run(clean.nominal, clean.frames)
    cell = KnownCell(clean.cell)
    with np.load(clean.folder / TRUTH_FILE) as truth:
        owner, reciprocal = truth["crystal_frame"], truth["reciprocal_per_A"]
    has_crystal = np.isin(np.arange(24), owner)
    assert not (result.is_indexed & ~has_crystal).any()
    assert result.is_indexed[has_crystal].mean() > 0.8
    for i, (_, crystal) in enumerate(indexer.crystals(clean.nominal, clean.frames)):
        assert (crystal is not None) == result.is_indexed[i]
        if crystal is not None:
            bases = [np.linalg.inv(rows).T for rows in reciprocal[owner == i]]
            assert min(misorientation_deg(crystal.basis_A, b, cell) for b in bases) < 0.5
    assert result.num_crystals == result.num_indexed
    assert result.cell_ratio == pytest.approx(1, abs=0.002)
    assert result.residual_px < 1
    np.testing.assert_allclose(result.spot_shift_px, 0, atol=0.15)
    np.testing.assert_allclose(result.mean_cell, clean.cell.as_array(), rtol=0.005)
    assert result.cpu_s > 0 and clean.digest in result.version


def test_free_outputs_point_to_the_right_geometry(clean):
    indexer = EmbeddedIndexer(clean)
    wrong = clean.nominal.replace(clen_offset_percent=2.0, centre_x_offset_px=1.0)
    result = indexer.run(wrong, clean.frames)
    assert result.num_indexed > 10
    assert result.cell_ratio == pytest.approx(1.02, abs=0.004)
    x, y = result.spot_shift_px
    assert -1.1 < x < -0.5 and abs(y) < 0.2  # to be added to the offset


def test_nothing_indexed_is_a_result(clean):
    result = EmbeddedIndexer(clean).run(clean.nominal.replace(min_peaks=5000), clean.frames)
    assert result.num_hits == result.num_indexed == 0
    assert np.isnan(result.cell_ratio) and np.isnan(result.residual_px)
    assert np.isnan(result.mean_cell).all() and np.isnan(result.spot_shift_px).all()


def test_the_order_of_the_frames_is_that_of_the_result(clean):
    indexer = EmbeddedIndexer(clean)
    every = indexer.run(clean.nominal, clean.frames)
    order = [5, 2, 2, 17]
    some = indexer.run(clean.nominal, [clean.frames[i] for i in order])
    np.testing.assert_array_equal(some.num_peaks, every.num_peaks[order])
    np.testing.assert_array_equal(some.is_indexed, every.is_indexed[order])


def test_results_by_hand(clean):
    """Of 10 frames 5 are hits and 1 is indexed; Wilson's interval of 1 in 10 is .0179 to .4042."""
    is_hit = np.arange(10) < 5
    result = IndexingResult(
        is_indexed=np.arange(10) < 1, is_hit=is_hit, num_peaks=20 * is_hit, num_crystals=2,
        mean_cell=np.ones(6), cell_ratio=1.0, residual_px=1.0, spot_shift_px=np.zeros(2),
        cpu_s=1.0, version="",
    )  # fmt: skip
    assert (result.indexed_fraction, result.hit_fraction) == (0.1, 0.5)
    np.testing.assert_allclose(result.ci95, (0.01787621, 0.40415002), atol=1e-7)
    np.testing.assert_allclose(wilson(0, 10), (0, 0.27753280), atol=1e-7)
    np.testing.assert_allclose(wilson(10, 10), (0.72246720, 1), atol=1e-7)
    assert wilson(0, 0) == (0, 1)
    for impossible in ((3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes in"):
            wilson(*impossible)


def result(num_frames, num_crystals, **values):
    """The first frames indexed, one crystal each."""
    is_indexed = np.arange(num_frames) < num_crystals
    return IndexingResult(**({
        "is_indexed": is_indexed, "is_hit": is_indexed, "num_peaks": 10 * is_indexed,
        "num_crystals": num_crystals, "mean_cell": np.full(6, np.nan), "cell_ratio": np.nan,
        "residual_px": np.nan, "spot_shift_px": np.full(2, np.nan), "cpu_s": 1.0, "version": "v",
    } | values))  # fmt: skip


def test_results_are_joined_by_hand():
    """One crystal of ratio 1.04, three of 1.00, and frames without any: 1.01."""
    parts = [
        result(2, 1, cell_ratio=1.04, spot_shift_px=np.array([4.0, np.nan]), cpu_s=2.0),
        result(5, 0),
        result(3, 3, cell_ratio=1.00, spot_shift_px=np.array([0.0, 2.0]), cpu_s=3.0),
    ]
    joined = concatenate(parts)
    assert joined.is_indexed.tolist() == [True, False] + 5 * [False] + 3 * [True]
    assert (joined.num_crystals, joined.cpu_s) == (4, 6.0)
    assert joined.cell_ratio == pytest.approx(1.01)
    np.testing.assert_allclose(joined.spot_shift_px, [1, 2])
    assert np.isnan(joined.residual_px) and np.isnan(joined.mean_cell).all()
    with pytest.raises(ValueError, match="different versions: v, w"):
        concatenate([result(1, 0), result(1, 0, version="w")])


def test_a_hit_has_as_many_peaks_as_asked_for(clean):
    indexer, frames = EmbeddedIndexer(clean), clean.frames[:3]
    found = indexer.run(clean.nominal, frames).num_peaks
    for more, is_hit in ((0, True), (1, False)):
        parameters = clean.nominal.replace(min_peaks=int(found[0]) + more)
        assert indexer.run(parameters, frames).is_hit[0] == is_hit


# ------------------------------------------------------------------ kept peaks


def test_geometry_and_min_peaks_need_no_new_peaks(clean, monkeypatch, tmp_path):
    indexer = EmbeddedIndexer(clean, cache=tmp_path)
    first = indexer.run(clean.nominal, clean.frames[:6])
    monkeypatch.setattr(pipeline, "find_peaks", None)  # not to be called again
    for changes in ({"clen_offset_percent": 1.0}, {"centre_y_offset_px": -2}, {"min_peaks": 40}):
        indexer.run(clean.nominal.replace(**changes), clean.frames[:6])
    for other in (EmbeddedIndexer(clean, cache=tmp_path), pickle.loads(pickle.dumps(indexer))):
        assert same(other.run(clean.nominal, clean.frames[:6]), first)
    with pytest.raises(TypeError):
        indexer.run(clean.nominal.replace(min_snr=6), clean.frames[:6])


def test_damaged_kept_peaks_are_found_again(clean, tmp_path):
    first = EmbeddedIndexer(clean, cache=tmp_path).run(clean.nominal, clean.frames[:4])
    (kept,) = tmp_path.rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:500])
    assert same(EmbeddedIndexer(clean, cache=tmp_path).run(clean.nominal, clean.frames[:4]), first)


def test_a_changed_file_is_searched_again(tmp_path):
    experiment = simulate("clean", 3, 1, tmp_path / "data")
    indexer = EmbeddedIndexer(experiment, cache=tmp_path / "peaks")
    memo = Memo(indexer, tmp_path / "memo")
    before = memo.run(experiment.nominal, experiment.frames)
    path = experiment.frames[0].path
    with h5py.File(path, "r+") as file:
        file["entry/data/data"][...] = 0
    import os

    os.utime(path, ns=(1, 1))
    after = memo.run(experiment.nominal, experiment.frames)
    assert before.num_peaks.sum() > 0 and after.num_peaks.sum() == 0


def test_it_travels_light(clean):
    indexer = EmbeddedIndexer(clean)
    indexer.run(clean.nominal, clean.frames[:2])
    assert len(pickle.dumps(indexer)) < 50_000


# ------------------------------------------------------------------ what goes wrong


def test_what_goes_wrong_is_told(clean, tmp_path):
    indexer = EmbeddedIndexer(clean)
    with pytest.raises(IndexerError, match="no frames"):
        indexer.run(clean.nominal, [])
    with pytest.raises(IndexerError, match="gone"):
        indexer.run(clean.nominal, [Frame(path=str(tmp_path / "gone.h5"), event="//0")])
    with pytest.raises(IndexerError, match="number 99"):
        indexer.run(clean.nominal, [Frame(path=clean.frames[0].path, event="//99")])
    with pytest.raises(IndexerError, match="no usable pixel between 5000"):
        far = clean.nominal.replace(min_res_px=5000, max_res_px=6000)
        indexer.run(far, clean.frames[:1])


def test_flagged_values_are_bad_pixels(clean):
    frames = clean.frames[:1]
    (found,) = EmbeddedIndexer(clean).peaks(clean.nominal, frames)
    image = read_image(clean.geometry, frames[0])
    bright = tuple(range(60, 1 + int(image.max())))

    def left(**flags):
        geometry = dataclasses.replace(clean.geometry, **flags)
        indexer = EmbeddedIndexer(dataclasses.replace(clean, geometry=geometry))
        return len(indexer.peaks(clean.nominal, frames)[0])

    assert len(found) > 5
    assert left(flag_above=0.0) == left(flag_below=1e5) == 0
    assert left(flag_above=float(image.max()), flag_below=float(image.min())) == len(found)
    assert left(flag_equal=bright) < len(found)
    assert left(flag_equal=(1e5, -1e5)) == len(found)


def with_mask(clean, folder, mask):
    """The experiment, with the frames of the folder's first file under another mask."""
    shutil.copytree(clean.folder, folder)
    with h5py.File(folder / "frames-000.h5", "r+") as file:
        del file["entry/data/mask"]
        file["entry/data/mask"] = mask
    return read_experiment(folder)


def test_each_frame_has_its_own_mask_where_the_file_has_one_for_each(clean, tmp_path):
    """Of 24 masks the second one blinds the detector, the third all but its upper half."""
    mask = np.zeros((24, 1024, 1024), np.uint16)
    mask[1], mask[2, :512] = 1, 1
    masked = with_mask(clean, tmp_path / "masked", mask)
    open_one = with_mask(clean, tmp_path / "open", mask[0])
    found = EmbeddedIndexer(masked).peaks(clean.nominal, masked.frames[:4])
    expected = EmbeddedIndexer(open_one).peaks(clean.nominal, open_one.frames[:4])
    assert len(found[1]) == 0 < len(expected[1])
    for i in (0, 3):
        np.testing.assert_array_equal(found[i].as_array(), expected[i].as_array())
    assert (found[2].ss_px >= 512).all()
    half = {tuple(p) for p in found[2].as_array()[:, :2].round(1)}
    upper = {tuple(p) for p in expected[2].as_array()[:, :2].round(1) if p[1] > 520}
    assert len(half & upper) > 0.8 * len(upper) > 5


def test_files_with_the_same_mask_share_a_map_and_others_do_not(clean, tmp_path, monkeypatch):
    made = []

    def counted(*args, **options):
        made.append(1)
        return peaks.pixel_map(*args, **options)

    monkeypatch.setattr(pipeline, "pixel_map", counted)
    shutil.copytree(clean.folder, tmp_path / "x")
    for name in ("frames-001.h5", "frames-002.h5"):
        shutil.copy(tmp_path / "x" / "frames-000.h5", tmp_path / "x" / name)
    with h5py.File(tmp_path / "x" / "frames-002.h5", "r+") as file:
        file["entry/data/mask"][:] = 1
        file["entry/data/mask"][100:, 100:] = 0
    frames = [Frame(path=str(tmp_path / "x" / f"frames-00{i}.h5"), event="//0") for i in (0, 1, 2)]
    same, again, other = EmbeddedIndexer(clean).peaks(clean.nominal, frames)
    assert len(made) == 2
    np.testing.assert_array_equal(same.as_array(), again.as_array())
    assert min(other.ss_px.min(), other.fs_px.min()) >= 100


def test_flags_by_hand(clean):
    geometry = dataclasses.replace(
        clean.geometry, flag_below=-2.0, flag_above=9.0, flag_equal=(0.0, 5.0)
    )
    image = np.array([-3, -2, -1, 0, 4, 5, 9, 10], np.int16)
    nan = np.nan
    found = pipeline._without_flagged(image, geometry)
    np.testing.assert_array_equal(found, [nan, -2, -1, nan, 4, nan, 9, nan])
    assert pipeline._without_flagged(image, clean.geometry) is image


# ------------------------------------------------------------------ memo


def test_memo_asks_once(clean, tmp_path):
    counting = Counting()
    memo = Memo(counting, tmp_path / "memo")
    first = memo.run(Parameters(), clean.frames)
    again = memo.run(Parameters(), clean.frames)
    assert counting.calls == 1 and same(first, again)
    assert (again.cpu_s, again.argv, again.version) == (1.5, ("a", "b c"), memo.version)
    other = Memo(counting, tmp_path / "memo")
    assert same(other.run(Parameters(), clean.frames), first) and counting.calls == 1
    memo.run(Parameters(min_snr=6), clean.frames)
    memo.run(Parameters(), clean.frames[1:])
    memo.run(Parameters(), clean.frames[::-1])
    counting.version = "counting 2"
    memo.run(Parameters(), clean.frames)
    assert counting.calls == 5


CHANGED = {
    "min_snr": 6, "threshold_adu": 21, "min_pix_count": 3, "max_pix_count": 199,
    "local_bg_radius_px": 4, "min_res_px": 1, "max_res_px": 1199, "min_peaks": 16,
    "clen_offset_percent": 1, "centre_x_offset_px": 1, "centre_y_offset_px": 1,
}  # fmt: skip


def test_every_parameter_is_a_key_of_the_memo_and_those_of_the_peaks_one_of_theirs(tmp_path):
    counting, frames = Counting(), [Frame(path="/a.h5")]
    memo = Memo(counting, tmp_path)
    assert set(CHANGED) == set(Parameters().as_dict())
    for number, change in enumerate([{}, *({name: v} for name, v in CHANGED.items())], 1):
        memo.run(Parameters().replace(**change), frames)
        memo.run(Parameters().replace(**change), frames)
        assert counting.calls == number, change
    others = {"min_peaks", "clen_offset_percent", "centre_x_offset_px", "centre_y_offset_px"}
    assert {*pipeline._OF_PEAKS} == {*CHANGED} - others


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"nonsense"])
def test_a_damaged_memo_is_worked_out_again(tmp_path, damage):
    counting = Counting()
    memo = Memo(counting, tmp_path)
    frames = [Frame(path="/a.h5", event=f"//{i}") for i in range(5)]
    first = memo.run(Parameters(), frames)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage)
    assert same(memo.run(Parameters(), frames), first)
    assert same(memo.run(Parameters(), frames), first)
    assert counting.calls == 2


def test_whatever_byte_is_changed_it_is_the_result_or_none(tmp_path):
    memo = Memo(Counting(), tmp_path)
    result = memo.run(Parameters(), [Frame(path="/a.h5", event=f"//{i}") for i in range(6)])
    (path,) = tmp_path.iterdir()
    whole, rng, num_read = path.read_bytes(), random.Random(1), 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        found = _read(path)
        num_read += found is not None
        assert found is None or same(found, result)
    assert 0 < num_read < 500


def test_what_is_remembered_is_as_readable_as_any_file(tmp_path):
    before = os.umask(0o027)
    try:
        Memo(Counting(), tmp_path).run(Parameters(), [Frame(path="/a.h5")])
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


def test_errors_are_not_remembered(tmp_path):
    memo = Memo(Counting(), tmp_path)
    with pytest.raises(IndexerError):
        memo.run(Parameters(), [])
    assert list(tmp_path.iterdir()) == []


def hammer(folder):
    memo = Memo(Counting(), folder)
    frames = [Frame(path="/a.h5", event=f"//{i}") for i in range(200)]
    return [
        memo.run(Parameters(min_snr=3 + k % 7), frames).num_peaks[0] for k in range(60)
    ]  # fmt: skip


def test_many_processes_share_a_memo(tmp_path):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(hammer, [str(tmp_path)] * 3))
    assert found == [[3 + k % 7 for k in range(60)]] * 3
    assert len(list(tmp_path.iterdir())) == 7  # and no scratch file is left


# ------------------------------------------------------------------ command


def test_index_command(clean, tmp_path, capsys):
    out = tmp_path / "out.json"
    folder = str(clean.folder)
    command = ["sfx", "index", "--data", folder, "--frames", "6", "--set", "min_snr=6"]
    assert main([*command, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    expected = EmbeddedIndexer(clean).run(clean.nominal.replace(min_snr=6), clean.frames[:6])
    for name in ("num_frames", "num_hits", "num_indexed", "num_crystals", "version"):
        assert found[name] == getattr(expected, name)
    assert found["is_indexed"] == expected.is_indexed.tolist()
    assert found["indexed_fraction"]["value"] == expected.indexed_fraction
    assert found["indexed_fraction"]["ci95"] == list(expected.ci95)
    assert found["cell_ratio"] == expected.cell_ratio and found["cpu_s"] > 0
    assert found["argv"] == [] and found["parameters"]["min_snr"] == 6
    assert f"{expected.num_indexed} of 6 frames indexed" in capsys.readouterr().out


def test_index_command_with_nothing_indexed(clean, tmp_path):
    out = tmp_path / "out.json"
    command = ["sfx", "index", "--data", str(clean.folder), "--frames", "2"]
    assert main([*command, "--set", "min_peaks=9999", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["cell_ratio"] is None and found["num_indexed"] == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "min_snrr=5"], "no parameter is called 'min_snrr'"),
        (["--set", "min_snr"], "expected NAME=NUMBER"),
        (["--set", "min_snr=five"], "expected NAME=NUMBER"),
        (["--set", "min_peaks=4.7"], "whole number"),
        (["--frames", "0"], "1 or more"),
        (["--processes", "0"], "1 or more"),
        (["--cell", "gone.cell"], "gone.cell"),
    ],
)
def test_mistakes_in_the_command(clean, capsys, more, words):
    assert main(["sfx", "index", "--data", str(clean.folder), *more]) == 2
    assert words in capsys.readouterr().err


# ------------------------------------------------------------------ Ray


@pytest.fixture(scope="module")
def two_cpus():
    import ray

    from ssl2rl_ray.local_ray import local_ray

    with local_ray(2):
        yield ray


@pytest.mark.ray
@pytest.mark.slow
def test_spread_over_ray_gives_the_same(clean, two_cpus, tmp_path):
    from ssl2rl_ray.tuning.spread import SpreadIndexer

    alone = EmbeddedIndexer(clean).run(clean.nominal, clean.frames)
    spread = SpreadIndexer(EmbeddedIndexer(clean, cache=tmp_path / "peaks"), frames_per_task=5)
    for _ in range(2):
        result = spread.run(clean.nominal, clean.frames)
        np.testing.assert_array_equal(result.is_indexed, alone.is_indexed)
        np.testing.assert_array_equal(result.num_peaks, alone.num_peaks)
        assert result.cell_ratio == pytest.approx(alone.cell_ratio)
        np.testing.assert_allclose(result.spot_shift_px, alone.spot_shift_px)
        assert result.version == alone.version == spread.version
    with pytest.raises(IndexerError, match="gone"):
        spread.run(clean.nominal, [Frame(path="/gone.h5", event="//0")])
    with pytest.raises(IndexerError, match="no frames"):
        spread.run(clean.nominal, [])


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_worker_costs_its_task_only(clean, two_cpus, tmp_path):
    import os

    from ssl2rl_ray.tuning.spread import SpreadIndexer

    class Fragile:  # here, so that it is pickled by value: workers do not know the tests
        def __init__(self, inner, mark, is_incurable=False):
            self.inner, self.mark, self.is_incurable = inner, mark, is_incurable
            self.version = inner.version

        def run(self, parameters, frames):
            if self.is_incurable or not os.path.exists(self.mark):
                open(self.mark, "w").close()
                os._exit(1)
            return self.inner.run(parameters, frames)

    inner, mark = EmbeddedIndexer(clean), str(tmp_path / "mark")
    spread = SpreadIndexer(Fragile(inner, mark), frames_per_task=10, num_tasks=1)
    assert same(
        dataclasses.replace(spread.run(clean.nominal, clean.frames[:10]), cpu_s=0.0),
        dataclasses.replace(inner.run(clean.nominal, clean.frames[:10]), cpu_s=0.0),
    )
    spread = SpreadIndexer(Fragile(inner, mark, is_incurable=True), num_tasks=1)
    with pytest.raises(IndexerError, match="lost"):
        spread.run(clean.nominal, clean.frames[:2])


@pytest.mark.ray
@pytest.mark.slow
def test_index_command_over_ray(clean, two_cpus, tmp_path):
    command = ["sfx", "index", "--data", str(clean.folder), "--processes", "2"]
    out, memo = tmp_path / "out.json", tmp_path / "memo"
    assert main([*command, "--memo", str(memo), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["num_frames"] == 24
    assert len(list(memo.glob("*.npz"))) == 1 and list((memo / "peaks").rglob("*.npz"))


def test_experiment_is_read_as_written(clean):
    again = read_experiment(clean.folder)
    assert EmbeddedIndexer(again).version == EmbeddedIndexer(clean).version
