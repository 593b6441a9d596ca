"""The optimisers and the loop that drives them, on benches whose answers are known."""

import numpy as np
import pytest

from envs.crystfel.env import (
    CELL_SCALE,
    FREE_OUTPUTS,
    SHIFT_SCALE_PX,
    SurrogateBench,
    scale_of,
)
from envs.crystfel.rivals import (
    CELL_GAIN,
    DEFAULTS,
    RIVALS,
    SHIFT_GAIN,
    SNR_GRID,
    _Best,
    corrected,
    expected_improvement,
    tune,
    warm_settings,
    with_values,
)
from envs.crystfel.surrogate import (
    BatchResult,
    Sample,
    best_fraction,
    draw_experiments,
    true_fraction,
)
from envs.crystfel.types import TUNABLES, TuningConfig

ALL = tuple(TUNABLES)


class Scripted:
    """E experiments whose first ``rule(values)`` frames of N index."""

    def __init__(self, rule, num_frames=100, start=6.0, num=2):
        self.rule, self.num_frames = rule, num_frames
        self.start = np.tile([start, 20.0, 2, 10, 0, 0, 0], (num, 1))
        self.asked = []

    def run(self, rows, values, num_frames):
        self.asked.append((list(rows), num_frames))
        count = np.array([self.rule(v) for v in values])
        is_indexed = np.arange(num_frames)[None] < count[:, None]
        none = np.full(len(values), np.nan)
        return BatchResult(
            is_indexed=is_indexed, is_hit=np.ones_like(is_indexed),
            num_peaks=np.full(is_indexed.shape, 20), cell_ratio=none, residual_px=none,
            spot_shift_px=np.column_stack([none, none]), cpu_s=np.ones(len(values)),
        )  # fmt: skip


SNR = TuningConfig(tunables=("min_snr",))


class Listed:
    """Asks for a list of SNRs, remembers what it was told."""

    def __init__(self, values):
        self.values, self.trials = list(values), []

    def __call__(self, config, start, outcome, rng):
        self.num = len(start)
        return self

    def ask(self):
        unit = TUNABLES["min_snr"].normalise(self.values.pop(0))
        return np.full((self.num, 1), unit)

    def tell(self, trial):
        self.trials.append(trial)


def test_the_loop_keeps_the_best_and_counts_frames():
    asked = Listed([8, 7, 9])
    bench = Scripted(lambda v: 10 * (v[0] - 3))
    trace = tune(bench, SNR, asked, num_evaluations=4, rng=np.random.default_rng(0))
    assert trace.best_values[:, 0, 0].tolist() == [6, 8, 8, 9]
    np.testing.assert_allclose(trace.best_fraction[:, 0], [0.3, 0.5, 0.5, 0.6])
    assert trace.num_frames[:, 1].tolist() == [100, 200, 300, 400]
    np.testing.assert_allclose([t.gain[0] for t in asked.trials], [0.2, -0.1, 0.1])


def test_racing_decides_as_early_as_it_can():
    """Of 100 frames, the first 10 x (SNR - 3) index; rungs of 25, 50 and 100 frames.

    The start, SNR 4, indexes 10 of its first 25. 3.5 indexes 5 there and is dropped. 9 indexes all
    25, 15 more and none less, and is taken at once. 8 looks the same on 25 and on 50 frames, for
    which the best must be indexed there too, and only all frames show that it is worse.
    """
    asked = Listed([3.5, 9, 8])
    bench = Scripted(lambda v: 10 * (v[0] - 3), start=4.0)
    trace = tune(
        bench, SNR, asked, num_evaluations=4, rng=np.random.default_rng(0), num_first_frames=25
    )
    assert trace.num_frames[:, 0].tolist() == [25, 50, 75, 75 + 100 + 75]
    assert [n for _, n in bench.asked] == [25, 25, 25, 25, 50, 50, 100, 100]
    np.testing.assert_allclose([t.gain[0] for t in asked.trials], [-0.2, 0.6, -0.1])
    np.testing.assert_allclose([t.best_fraction[0] for t in asked.trials], [0.4, 0.4, 0.6])
    assert trace.best_values[:, 0, 0].tolist() == [4, 4, 9, 9]
    np.testing.assert_allclose(trace.best_fraction[:, 0], [0.4, 0.4, 1.0, 0.6])


def test_a_gain_is_on_the_same_frames_however_many_the_best_has_seen():
    """SNR 8 indexes the first 50 of 100, and all of them are looked at; 5 the first 20 of 25."""
    asked = Listed([8, 8, 5])
    bench = Scripted(lambda v: 10 * (v[0] - 3), start=4.0)
    trace = tune(
        bench, SNR, asked, num_evaluations=4, rng=np.random.default_rng(0), num_first_frames=25
    )
    assert trace.best_fraction[2, 0] == 0.5
    assert asked.trials[2].gain[0] == pytest.approx(20 / 25 - 1)
    assert trace.best_values[3, 0, 0] == 8


def test_a_tie_changes_nothing():
    trace = tune(Scripted(lambda v: 50), SNR, Listed([8, 9]), num_evaluations=3,
                 rng=np.random.default_rng(0))  # fmt: skip
    assert trace.best_values[:, 0, 0].tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("num_won", "num_lost", "is_open"),
    [
        (0, 0, True),
        (0, 1, False),  # worse
        (3, 0, True),  # z = 1.73, but of three frames only
        (4, 0, False),  # z = 2
        (7, 2, False),  # z = 1.67
        (6, 2, True),  # z = 1.41
        (5, 5, True),
    ],
)
def test_when_a_race_is_over_by_hand(num_won, num_lost, is_open):
    """z = (won - lost) / sqrt(won + lost), to be above 1.645 with four at least."""
    before, after = np.zeros((1, 40), bool), np.zeros((1, 40), bool)
    before[0, :num_lost], after[0, 20 : 20 + num_won] = True, True
    before[0, -1] = after[0, -1] = True  # something indexes
    none = np.full(1, np.nan)

    def result(flags):
        return BatchResult(
            is_indexed=flags, is_hit=flags | True, num_peaks=np.zeros(flags.shape, int),
            cell_ratio=none, residual_px=none, spot_shift_px=np.full((1, 2), np.nan), cpu_s=none,
        )  # fmt: skip

    best = _Best.of(result(before), np.zeros((1, 7)), 40)
    assert best.is_open(np.array([0]), result(after)).tolist() == [is_open]


def test_warm_tpe_begins_with_the_list_that_all_share():
    pytest.importorskip("optuna")
    e = draw_experiments(np.random.default_rng(43), "normal", 2)
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(44), 2, 20))
    trace = tune(bench, TuningConfig(num_frames=20), RIVALS["tpe-warm"], num_evaluations=4,
                 rng=np.random.default_rng(0))  # fmt: skip
    scale = scale_of(ALL)
    for i in (0, 1):
        rounded = scale.unit(scale.values(warm_settings(ALL)[:3], np.tile(e.start[i], (3, 1))))
        np.testing.assert_allclose(trace.unit[1:, i], rounded)


def test_racing_does_not_go_on_where_nothing_indexes():
    asked = Listed([8, 9])
    bench = Scripted(lambda v: 0)
    trace = tune(
        bench, SNR, asked, num_evaluations=3, rng=np.random.default_rng(0), num_first_frames=25
    )
    assert trace.num_frames[:, 0].tolist() == [25, 50, 75]


def test_a_budget_ends_it():
    asked = Listed([8] * 10)
    bench = Scripted(lambda v: 50)
    trace = tune(
        bench, SNR, asked, num_evaluations=10, rng=np.random.default_rng(0), budget_frames=250
    )
    assert trace.num_frames[:, 0].tolist() == [100, 200, 300]
    trace = tune(
        bench, SNR, asked, num_evaluations=10, rng=np.random.default_rng(0), budget_frames=200
    )
    assert trace.num_frames[:, 0].tolist() == [100, 200], "spent to the last frame"


def test_numbers_that_make_no_sense_are_refused():
    bench, rng = Scripted(lambda v: 50), np.random.default_rng(0)
    with pytest.raises(ValueError, match="num_evaluations"):
        tune(bench, SNR, Listed([]), num_evaluations=0, rng=rng)
    with pytest.raises(ValueError, match="num_first_frames: must be between 1 and 99"):
        tune(bench, SNR, Listed([]), num_evaluations=2, rng=rng, num_first_frames=100)
    for tuned in ("keep-initial", "random", "noise"):
        far = Scripted(lambda v: 50, start=15.0)
        with pytest.raises(ValueError, match="start: min_snr is 15, outside 3 to 12"):
            tune(far, SNR, RIVALS[tuned], num_evaluations=2, rng=rng)
        assert not far.asked, "before anything is indexed"
    without = TuningConfig(tunables=("min_peaks",))
    with pytest.raises(ValueError, match="snr-grid: min_snr"):
        tune(bench, without, RIVALS["snr-grid"], num_evaluations=2, rng=rng)


def test_the_grid_scans_then_stays():
    bench = Scripted(lambda v: 100 - 10 * abs(v[0] - 5))
    trace = tune(bench, SNR, RIVALS["snr-grid"], num_evaluations=10, rng=np.random.default_rng(0))
    tried = 3 + 9 * trace.unit[1:, 0, 0]
    np.testing.assert_allclose(tried, [*SNR_GRID, 5, 5])
    assert trace.best_values[-1, 0, 0] == pytest.approx(5)


def test_coordinate_search_climbs_a_ridge_of_each_parameter():
    def rule(v):
        return 100 - 8 * abs(v[0] - 4.3) - 8 * abs(v[4] + 2.2) - 5 * abs(v[2] - 5)

    config = TuningConfig(tunables=("min_snr", "min_pix_count", "clen_offset_percent"))
    bench = Scripted(rule, num_frames=400)
    trace = tune(bench, config, RIVALS["coordinate"], num_evaluations=60,
                 rng=np.random.default_rng(0))  # fmt: skip
    assert trace.best_values[-1, 0, 0] == pytest.approx(4.3, abs=0.2)
    assert trace.best_values[-1, 0, 2] == 5
    assert trace.best_values[-1, 0, 4] == pytest.approx(-2.2, abs=0.2)


def free(**values):
    row = np.zeros((1, len(FREE_OUTPUTS)))
    for name, value in values.items():
        row[0, FREE_OUTPUTS.index(name)] = value
    return row


def test_corrections_by_hand():
    """A cell 1.84 % too large means a distance 2 % too long; a shift of -0.69 px, 1 px too far."""
    unit = np.full((1, 7), 0.5)
    told = free(has_crystal=1, cell_ratio=0.0184 / CELL_SCALE, spot_shift_x=-0.69 / SHIFT_SCALE_PX)
    assert (CELL_GAIN, SHIFT_GAIN) == (0.92, 0.69)
    got, is_worth = corrected(unit, told, ALL)
    values = scale_of(ALL).values(got, np.zeros((1, 7)))[0]
    np.testing.assert_allclose(values[4:], [-2, -1, 0], atol=1e-9)
    assert is_worth.all()
    _, is_worth = corrected(unit, free(has_crystal=1, cell_ratio=0.001 / CELL_SCALE), ALL)
    assert not is_worth.any()
    same, is_worth = corrected(unit, free(), ALL)
    assert not is_worth.any()
    np.testing.assert_array_equal(same, unit)
    only, _ = corrected(unit[:, :1], told, ("min_snr",))
    np.testing.assert_array_equal(only, unit[:, :1])


def test_rules_repair_a_geometry_that_the_cell_and_spots_give_away():
    e = draw_experiments(np.random.default_rng(21), "normal", 60)
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(22), 60, 200))
    trace = tune(bench, TuningConfig(), RIVALS["rules"], num_evaluations=6,
                 rng=np.random.default_rng(0))  # fmt: skip
    error = np.abs(trace.best_values[-1, :, 4] - e.optimum_clen_percent)
    before = np.abs(e.optimum_clen_percent)
    assert np.median(error) < 0.5 < np.median(before)


def test_expected_improvement_by_hand():
    """At the best, sd 1: 1 / sqrt(2 pi); far below it: nothing; far above: the difference."""
    got = expected_improvement(np.array([0.0, -9.0, 9.0]), np.ones(3), np.zeros(3))
    np.testing.assert_allclose(got, [0.39894228, 0, 9], atol=1e-7)


@pytest.mark.parametrize("num_first_frames", [None, 20])
@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_proposes_within_bounds_and_only_gains(name, num_first_frames):
    if name.startswith("tpe"):
        pytest.importorskip("optuna")
    e = draw_experiments(np.random.default_rng(31), "normal", 5)
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(32), 5, 60))
    config = TuningConfig(num_frames=60)
    trace, again = (
        tune(
            bench,
            config,
            RIVALS[name],
            num_evaluations=9,
            rng=np.random.default_rng(0),
            num_first_frames=num_first_frames,
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(trace.unit, again.unit)
    assert trace.unit.shape == (9, 5, 7)
    assert ((trace.unit >= 0) & (trace.unit <= 1)).all()
    spent = np.diff(trace.num_frames, axis=0)
    if num_first_frames is None:
        assert (np.diff(trace.best_fraction, axis=0) >= 0).all()
        assert (spent == 60).all()
    else:
        assert ((spent >= 20) & (spent <= 60 + 40)).all()


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_tunes_any_subset(name):
    if name.startswith("tpe"):
        pytest.importorskip("optuna")
    e = draw_experiments(np.random.default_rng(41), "normal", 2)
    bench = SurrogateBench(e, Sample.draw(np.random.default_rng(42), 2, 40))
    config = TuningConfig(num_frames=40, tunables=("centre_x_offset_px", "min_snr"))
    trace = tune(bench, config, RIVALS[name], num_evaluations=5, rng=np.random.default_rng(0))
    untouched = [0 + 1, 2, 3, 4, 6]
    expected = np.broadcast_to(e.start[:, untouched], (5, 2, 5))
    np.testing.assert_array_equal(trace.best_values[:, :, untouched], expected)


def test_the_warm_list_begins_with_what_serves_most_and_covers_more():
    settings = warm_settings(ALL)
    assert settings.shape == (12, 7) and ((settings >= 0) & (settings <= 1)).all()
    e = draw_experiments(np.random.default_rng(51), "normal", 60)
    best = best_fraction(e)
    scale = scale_of(ALL)
    shares = [
        true_fraction(e, scale.values(np.tile(s, (60, 1)), e.start), 200) / best for s in settings
    ]
    first, any_of = shares[0].mean(), np.max(shares, axis=0).mean()
    assert first > 1.3 * (true_fraction(e, e.start, 200) / best).mean()
    assert any_of > 1.5 * first


def test_with_values_sets_what_is_tuned():
    got = with_values(np.zeros((2, 2)), ("min_snr", "min_peaks"), DEFAULTS)
    np.testing.assert_allclose(got, [[2 / 9, 0.1]] * 2)
