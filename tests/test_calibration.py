"""From predicted Å to probabilities: known answers, properties, and the real training half."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit

from envs.cryoem import calibration as c
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable, NavigationConfig, RandomEffects

CONFIG = NavigationConfig.preset("cryorl")
NO_EFFECTS = RandomEffects(sd_grid=0.0, sd_square=0.0, sd_patch=0.0)


def read_aldolase() -> HoleTable:
    folder = Path(__file__).parents[1].parent / "shared" / "data" / "aldolase"
    if not folder.is_dir():
        pytest.skip("the Aldolase training half (../shared/data/aldolase) is not here")
    with (folder / "labels.csv").open() as file:
        rows = list(csv.reader(file))
    lines = (folder / "predictions_resnet50.txt").read_text().splitlines()
    predicted = dict(line.split() for line in lines)
    names = [row[0] for row in rows]
    parents = {
        level: [name[: name.index(mark) + 2] for name in names]
        for level, mark in (("grid", "gr_"), ("square", "sq_"), ("patch", "hl_"))
    }
    return HoleTable.from_names(
        hole_name=names,
        **parents,
        ctf_max_resolution_A=np.minimum([float(row[3]) for row in rows], 20.0),
        predicted_ctf_A=np.array([float(predicted[name]) for name in names]),
    )


def small_table(predicted, ctf, patch=None, grid=None) -> HoleTable:
    n = len(predicted)
    patch = ["p"] * n if patch is None else patch
    grid = ["g"] * n if grid is None else grid
    return HoleTable.from_names(
        hole_name=[f"h{i}" for i in range(n)],
        grid=grid,
        square=[f"s{g}" for g in grid],
        patch=patch,
        ctf_max_resolution_A=np.asarray(ctf, float),
        predicted_ctf_A=np.asarray(predicted, float),
    )


def model(**changes) -> c.Calibration:
    values = {
        "intercept": 9.0,
        "slope": -1.0,
        "clip_A": 9.0,
        "patch_mean_slope": -0.5,
        "effects": RandomEffects(sd_grid=0.3, sd_square=0.4, sd_patch=0.5),
        "fitted_on": "hand",
        "num_holes": 4,
        "log_likelihood": -1.0,
    }
    return c.Calibration(**{**values, **changes})


def test_base_logit_by_hand():
    table = small_table([4.0, 12.0, 6.0], [5, 7, 5], patch=["a", "a", "b"])
    # clipped 4, 9, 6; patch means 6.5, 6.5, 6: 9 - x - mean / 2
    np.testing.assert_allclose(model().base_logit(table), [1.75, -3.25, 0.0])


def test_missing_predictions_take_the_mean_of_the_patch_then_of_the_table():
    table = small_table([4.0, np.nan, np.nan], [5, 7, 5], patch=["a", "a", "b"])
    np.testing.assert_allclose(model().base_logit(table), [3.0, 3.0, 3.0])


def test_a_table_without_predictions_is_refused():
    table = small_table([np.nan], [5.0])
    with pytest.raises(ValueError, match="import predictions"):
        model().base_logit(table)


def test_apply_is_the_marginal_and_may_be_repeated():
    table = small_table([4.0, 12.0, 6.0], [5, 7, 5], patch=["a", "a", "b"])
    applied = model().apply(table)
    shrink = np.sqrt(1 + np.pi / 8 * 0.5)  # variance 0.09 + 0.16 + 0.25
    np.testing.assert_allclose(applied.p_low_ctf, expit(np.array([1.75, -3.25, 0]) / shrink))
    np.testing.assert_array_equal(model().apply(applied).p_low_ctf, applied.p_low_ctf)


@given(
    m=st.floats(-7, 7),
    sds=st.tuples(*[st.floats(0, 1.0)] * 3),
)
def test_base_logit_of_inverts_the_marginal(m, sds):
    effects = RandomEffects(sd_grid=sds[0], sd_square=sds[1], sd_patch=sds[2])
    p = c.marginal_p(np.array([m]), effects)
    np.testing.assert_allclose(c.base_logit_of(p, effects), [m], atol=1e-6)


def test_probabilities_of_zero_and_one_stay_finite():
    assert np.isfinite(c.base_logit_of(np.array([0.0, 1.0]), RandomEffects())).all()


@pytest.mark.parametrize("m", [-4.0, -1.0, 0.0, 2.5])
def test_marginal_is_close_to_the_integral(m):
    effects = RandomEffects(sd_grid=0.3, sd_square=0.3, sd_patch=0.5)
    sd = np.sqrt(effects.variance)
    exact, _ = quad(lambda z: expit(m + sd * z) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi), -9, 9)
    assert c.marginal_p(np.array([m]), effects)[0] == pytest.approx(exact, abs=4e-3)


def test_uncalibrated_is_cryorls_mapping():
    np.testing.assert_allclose(
        c.uncalibrated_p(np.array([6.0, 5.0])), [0.5, 1 / (1 + np.exp(-1.0))]
    )


def test_json_round_trip_is_strict():
    values = json.loads(json.dumps(model().to_json()))
    assert c.Calibration.from_json(values) == model()
    with pytest.raises(ValueError, match=r"unknown keys \['slop'\]"):
        c.Calibration.from_json({**values, "slop": 1.0})
    with pytest.raises(ValueError, match=r"calibration\.effects: missing keys \['sd_patch'\]"):
        c.Calibration.from_json({**values, "effects": {"sd_grid": 1.0, "sd_square": 1.0}})
    del values["slope"]
    with pytest.raises(ValueError, match=r"missing keys \['slope'\]"):
        c.Calibration.from_json(values)


@pytest.mark.parametrize(
    ("ctf", "message"),
    [
        ([4.0, 4.0, 5.0], "3 of 3 are low"),
        ([7.0, 8.0, 9.0], "0 of 3"),
        ([np.nan] * 3, "no labelled hole"),
    ],
)
def test_labels_of_one_kind_cannot_calibrate(ctf, message):
    with pytest.raises(ValueError, match=message):
        c.fit_calibration(small_table([4.0, 5.0, 6.0], ctf), CONFIG)


def test_without_effects_it_is_logistic_regression():
    # Two values of x, three of four and one of four low-CTF: logits of log 3 and -log 3.
    table = small_table([5.0] * 4 + [7.0] * 4, [5, 5, 5, 7, 5, 7, 7, 7])
    fitted = c.fit_calibration(table, CONFIG, is_patch_mean_used=False, effects=NO_EFFECTS)
    np.testing.assert_allclose(
        fitted.base_logit(table)[[0, -1]], [np.log(3), -np.log(3)], atol=0.06
    )  # the slope's prior takes the last 5 %
    assert fitted.patch_mean_slope == 0.0


def test_separated_labels_and_one_grid_keep_finite_values():
    table = small_table(np.linspace(3, 9, 40), np.linspace(3, 9, 40))
    fitted = c.fit_calibration(table, CONFIG)
    assert -30 < fitted.slope < 0
    assert min(dataclasses.astuple(fitted.effects)) > 0.05
    assert max(dataclasses.astuple(fitted.effects)) < 2.0


def test_probabilities_alone_can_be_calibrated():
    table = draw_session(np.random.default_rng(1), "demo")
    bare = table.replace(predicted_ctf_A=np.full(len(table), np.nan))
    fitted = c.fit_calibration(bare, CONFIG)
    assert fitted.input == "logit_p_low_ctf"
    assert fitted.slope > 0
    p, low = fitted.apply(bare).p_low_ctf, bare.ctf_max_resolution_A < 6
    assert abs(p.mean() - low.mean()) < 0.03


def test_unlabelled_rows_do_not_count():
    table = draw_session(np.random.default_rng(2), "demo")
    half = np.arange(len(table)) % 2 == 0
    hidden = np.where(half, table.ctf_max_resolution_A, np.nan)
    other = np.where(half, table.ctf_max_resolution_A, 3.0)
    first = c.fit_calibration(table.replace(ctf_max_resolution_A=hidden, is_labelled=half), CONFIG)
    second = c.fit_calibration(table.replace(ctf_max_resolution_A=other, is_labelled=half), CONFIG)
    assert first.num_holes == half.sum()
    assert first.slope == second.slope


def test_fit_recovers_the_model_that_made_the_labels():
    fits = [
        c.fit_calibration(draw_session(np.random.default_rng(seed)), CONFIG) for seed in range(12)
    ]
    assert np.mean([fit.slope for fit in fits]) == pytest.approx(-1.0, abs=0.1)
    assert np.mean([fit.patch_mean_slope for fit in fits]) == pytest.approx(-0.47, abs=0.15)
    assert np.median([fit.effects.sd_patch for fit in fits]) == pytest.approx(0.39, abs=0.12)


def test_aldolase_leave_one_grid_out_reproduces_the_comparison_of_forms():
    table = read_aldolase()
    line, mean, clip, both = (
        c.leave_one_grid_out_log_likelihood(table, CONFIG, effects=NO_EFFECTS, **options)
        for options in (
            {"clip_A": 99.0, "is_patch_mean_used": False},
            {"clip_A": 99.0},
            {"is_patch_mean_used": False},
            {},
        )
    )
    mixed = c.leave_one_grid_out_log_likelihood(table, CONFIG)
    fitted = c.fit_calibration(table, CONFIG)
    print(
        f"line {line:.1f} patch mean {mean:.1f} clip {clip:.1f} both {both:.1f}, mixed {mixed:.1f}"
    )
    print(fitted)
    assert line == pytest.approx(-422.5, abs=0.5)
    assert mean == pytest.approx(-411.3, abs=0.5)
    assert clip == pytest.approx(-389.2, abs=0.5)
    assert both > -384.5
    assert mixed > -384.5
    np.testing.assert_allclose(
        dataclasses.astuple(fitted.effects), [0.29, 0.34, 0.52], atol=0.15
    )  # measured before with other priors


def test_aldolase_probabilities_are_calibrated():
    table = read_aldolase()
    p = c.fit_calibration(table, CONFIG).apply(table).p_low_ctf
    low = table.ctf_max_resolution_A <= 6
    for lower, upper in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
        rows = (p >= lower) & (p < upper)
        assert low[rows].mean() == pytest.approx(p[rows].mean(), abs=0.06)
