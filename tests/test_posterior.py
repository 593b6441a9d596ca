"""The hierarchical posterior: by hand, against brute force, on sessions drawn from the model."""

import json
import time

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import t as student_t

from envs.cryoem.calibration import marginal_p
from envs.cryoem.types import HoleTable, RandomEffects
from ssl2rl_ray.perception.metrics import area_under_roc, classifier_metrics
from ssl2rl_ray.perception.posterior import HierarchicalPosterior, fit_posterior

NO_EFFECTS = RandomEffects(sd_grid=0.0, sd_square=0.0, sd_patch=0.0)


def tree_table(rng, num_grids=9, num_squares=58, num_patches=771, num_holes=8653) -> HoleTable:
    """The hierarchy of Y3 by default."""

    def parents(children, groups):  # every group has a child
        return rng.permutation(np.r_[np.arange(groups), rng.integers(0, groups, children - groups)])

    patch = parents(num_holes, num_patches)
    square = parents(num_patches, num_squares)[patch]
    grid = parents(num_squares, num_grids)[square]
    return HoleTable.from_names(
        hole_name=np.arange(num_holes).astype(str),
        grid=grid.astype(str),
        square=square.astype(str),
        patch=patch.astype(str),
    )


def model(**changes) -> HierarchicalPosterior:
    values = {
        "intercept": 0.2,
        "slope_within": 1.0,
        "slope_patch": 1.5,
        "slope_square": 1.2,
        "slope_grid": 0.8,
        "effects": RandomEffects(sd_grid=0.3, sd_square=0.5, sd_patch=0.8),
        "fitted_on": "hand",
        "num_labelled": 4,
        "log_likelihood": -1.0,
    }
    return HierarchicalPosterior(**{**values, **changes})


def draw_logit(rng, table):
    """A classifier's logits, sd about .75: something of every level."""
    return sum(
        sd * rng.standard_normal(size)[ids]
        for sd, size, ids in (
            (0.2, len(table.grid_name), table.grid_id),
            (0.3, len(table.square_name), table.square_id),
            (0.4, len(table.patch_name), table.patch_id),
            (0.55, len(table), np.arange(len(table))),
        )
    )


def draw_labels(rng, table, logit, posterior):
    eta = posterior.base_logit(table, logit)
    effects = posterior.effects
    for sd, size, ids in (
        (effects.sd_grid, len(table.grid_name), table.grid_id),
        (effects.sd_square, len(table.square_name), table.square_id),
        (effects.sd_patch, len(table.patch_name), table.patch_id),
    ):
        eta = eta + sd * rng.standard_normal(size)[ids]
    return rng.logistic(size=len(table)) < eta


def lower_bound(values) -> float:
    """Of the 95 % t interval of the mean."""
    values = np.array(values)
    sem = values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - student_t.ppf(0.975, len(values) - 1) * sem


def small() -> HoleTable:
    # Grid A: square a (patches a1, a2) and b (b1); grid C: one hole alone.
    return HoleTable.from_names(
        hole_name=list("123456"),
        grid=list("AAAAAC"),
        square=list("aaaabc"),
        patch=["a1", "a1", "a2", "a2", "b1", "c1"],
    )


LOGIT = np.array([1.0, 3.0, -1.0, -1.0, 2.0, 4.0])


def test_base_logit_by_hand():
    # Means: a1 2, a2 -1, b1 2, c1 4; squares .5, 2, 4; grids .8, 4.
    within = np.array([-1, 1, 0, 0, 0, 0])
    patch = np.array([1.5, 1.5, -1.5, -1.5, 0, 0])
    square = np.array([-0.3, -0.3, -0.3, -0.3, 1.2, 0])
    grid = np.array([0.8] * 5 + [4])
    expected = 0.2 + within + 1.5 * patch + 1.2 * square + 0.8 * grid
    np.testing.assert_allclose(model().base_logit(small(), LOGIT), expected)


def test_a_hole_without_image_takes_the_mean_of_what_is_nearest():
    logit = np.array([1.0, np.nan, -1.0, -3.0, np.nan, np.nan])
    same = model(intercept=0.0, slope_patch=1.0, slope_square=1.0, slope_grid=1.0)
    # Its patch (1); its grid, of four holes then (1, 1, -1, -3); the table.
    np.testing.assert_allclose(same.base_logit(small(), logit), [1, 1, -1, -3, -0.5, -0.5])


def test_logits_beyond_any_certainty_are_held():
    logit = np.array([np.inf, 1e6, -np.inf, -1e300, 0, 0])
    base = model().base_logit(small(), logit)
    assert np.isfinite(base).all()
    assert base[0] == base[1]
    assert np.isfinite(fit_posterior(small(), logit, LOGIT > 0, LOGIT < 9).log_likelihood)


def test_one_label_by_hand():
    # One known hole and no other: the mode solves u = V (y - sigmoid(base + u)).
    posterior = model()
    known = np.arange(6) == 5
    base = posterior.base_logit(small(), LOGIT)[5]
    variance = posterior.effects.variance
    u = 0.0
    for _ in range(200):
        u += 0.3 * (variance * (0 - expit(base + u)) - u)
    w = expit(base + u) * expit(-base - u)
    own = expit((base + u) / np.sqrt(1 + np.pi / 8 * variance / (1 + variance * w)))
    p = posterior.predict(small(), LOGIT, ~known, known, is_own_label_used=True)
    assert p[5] == pytest.approx(own, abs=1e-5)
    # Its own label left out nothing is known; of the other grid nothing ever was.
    marginal = posterior.predict(small(), LOGIT)
    left_out = posterior.predict(small(), LOGIT, ~known, known)
    np.testing.assert_allclose(left_out, marginal, atol=1e-6)


def test_a_label_pulls_its_patch_most_then_square_then_grid():
    known = np.arange(6) == 0
    posterior, logit = model(), np.zeros(6)
    good = posterior.predict(small(), logit, np.ones(6, bool), known)
    bad = posterior.predict(small(), logit, np.zeros(6, bool), known)
    gain = good - bad
    assert gain[1] > gain[2] == gain[3] > gain[4] > 0
    assert gain[0] == pytest.approx(0, abs=1e-6)
    assert gain[5] == pytest.approx(0, abs=1e-6)


def test_against_brute_force_over_holes():
    """Laplace's approximation with n x n kernels, and leaving out one label after the other."""
    rng = np.random.default_rng(0)
    table = tree_table(rng, 3, 8, 30, 200)
    posterior, logit = model(), draw_logit(rng, table)
    low, known = draw_labels(rng, table, logit, posterior), rng.random(200) < 0.25
    base, effects = posterior.base_logit(table, logit), posterior.effects
    kernel = sum(
        sd**2 * (ids[:, None] == ids)
        for sd, ids in (
            (effects.sd_grid, table.grid_id),
            (effects.sd_square, table.square_id),
            (effects.sd_patch, table.patch_id),
        )
    )

    def dense(rows):
        k, y, f = kernel[np.ix_(rows, rows)], low[rows], np.zeros(len(rows))
        for _ in range(60):
            q = expit(base[rows] + f)
            w = q * (1 - q)
            f = k @ np.linalg.solve(np.eye(len(rows)) + w[:, None] * k, w * f + y - q)
        q = expit(base[rows] + f)
        across = kernel[:, rows]
        inverse = np.linalg.inv(np.diag(1 / (q * (1 - q))) + k)
        variance = np.diag(kernel) - ((across @ inverse) * across).sum(1)
        return expit((base + across @ (y - q)) / np.sqrt(1 + np.pi / 8 * variance))

    rows = np.flatnonzero(known)
    np.testing.assert_allclose(
        posterior.predict(table, logit, low, known, is_own_label_used=True), dense(rows), atol=1e-5
    )
    left_out = np.array([dense(rows[rows != row])[row] for row in rows])
    p = posterior.predict(table, logit, low, known)
    np.testing.assert_allclose(p[~known], dense(rows)[~known], atol=1e-5)
    error = np.abs(p[rows] - left_out)
    assert error.max() < 0.02, error.max()
    assert np.abs(dense(rows)[rows] - left_out).mean() > 10 * error.mean()


def test_order_of_rows_does_not_matter():
    rng = np.random.default_rng(1)
    table = tree_table(rng, 3, 8, 40, 400)
    logit = draw_logit(rng, table)
    low, known = draw_labels(rng, table, logit, model()), rng.random(400) < 0.3
    order = rng.permutation(400)
    other = table.select(order)
    p = fit_posterior(table, logit, low, known).predict(table, logit, low, known)
    again = fit_posterior(other, logit[order], low[order], known[order])
    q = again.predict(other, logit[order], low[order], known[order])
    np.testing.assert_allclose(q, p[order], atol=1e-3)


def test_labels_that_are_not_known_are_not_read():
    rng = np.random.default_rng(2)
    table = tree_table(rng, 2, 4, 12, 100)
    logit, known = draw_logit(rng, table), rng.random(100) < 0.3
    low = rng.random(100) < 0.5
    one = fit_posterior(table, logit, low, known)
    two = fit_posterior(table, logit, np.where(known, low, ~low), known)
    assert one == two
    np.testing.assert_array_equal(
        one.predict(table, logit, low, known),
        two.predict(table, logit, np.where(known, low, ~low), known),
    )


def test_own_label_does_not_leak_on_labels_that_are_noise():
    rng = np.random.default_rng(3)
    table = tree_table(rng, 4, 10, 60, 600)
    logit, known = draw_logit(rng, table), rng.random(600) < 0.5
    low = rng.random(600) < 0.5
    posterior = model(intercept=0.0, slope_within=0.0, slope_patch=0, slope_square=0, slope_grid=0)
    auc = {
        used: area_under_roc(
            low[known],
            posterior.predict(table, logit, low, known, is_own_label_used=used)[known],
        )
        for used in (False, True)
    }
    assert auc[True] > 0.7
    assert auc[False] < 0.55


def test_without_labels_it_is_the_classifier():
    rng = np.random.default_rng(4)
    table = tree_table(rng, 3, 8, 40, 400)
    logit, none = draw_logit(rng, table) + 0.5, np.zeros(400, bool)
    posterior = fit_posterior(table, logit, none, none)
    assert posterior.num_labelled == 0
    np.testing.assert_allclose(posterior.predict(table, logit), expit(logit), atol=1e-4)
    np.testing.assert_allclose(posterior.predict(table, logit, none, none), expit(logit), atol=1e-4)


@pytest.mark.parametrize("kind", [True, False])
@pytest.mark.parametrize("num_labels", [1, 20, 300])
def test_labels_of_one_kind_stay_finite(kind, num_labels):
    rng = np.random.default_rng(5)
    table = tree_table(rng, 3, 8, 40, 400)
    logit, known = draw_logit(rng, table), np.arange(400) < num_labels
    posterior = fit_posterior(table, logit, np.full(400, kind), known)
    p = posterior.predict(table, logit, np.full(400, kind), known)
    assert np.isfinite(p).all()
    assert ((p > 0.5).mean() > 0.5) == kind
    assert abs(posterior.intercept) < 8
    assert posterior.effects.variance < 4


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 30),
        (1, 1, 30, 30),
        (1, 30, 30, 30),
        (30, 30, 30, 30),
        (1, 5, 5, 100),
        (1, 1, 1, 1),
    ],
    ids=["one patch", "one square", "one grid", "alone", "one patch a square", "one hole"],
)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0])
def test_odd_hierarchies_and_scales(shape, scale):
    rng = np.random.default_rng(6)
    table = tree_table(rng, *shape)
    n = len(table)
    logit, low, known = scale * rng.standard_normal(n), rng.random(n) < 0.5, rng.random(n) < 0.6
    posterior = fit_posterior(table, logit, low, known)
    p = posterior.predict(table, logit, low, known)
    assert ((p > 0) & (p < 1)).all()
    assert 0 < posterior.effects.variance < 10


def test_a_scale_of_the_logits_does_not_matter_much():
    """Neither an overconfident nor a timid classifier is a reason to lose what it knows."""
    rng = np.random.default_rng(7)
    table = tree_table(rng)
    logit = draw_logit(rng, table)
    low, known = draw_labels(rng, table, logit, model()), rng.random(len(table)) < 0.05
    auc = [
        area_under_roc(low[~known], fit_posterior(table, x, low, known).predict(table, x)[~known])
        for x in (logit, 4 * logit, 0.05 * logit, logit + 3)
    ]
    assert np.ptp(auc) < 0.01, auc


def test_parameters_are_recovered():
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        table = tree_table(rng)
        logit = draw_logit(rng, table)
        fit = fit_posterior(
            table, logit, draw_labels(rng, table, logit, model()), rng.random(len(table)) < 0.8
        )
        e = fit.effects
        found.append([fit.slope_within, fit.slope_patch, e.sd_grid, e.sd_square, e.sd_patch])
    # With two labels a patch the patches' sd comes out a quarter short: Laplace's approximation of
    # binary labels (Breslow & Lin 1995, Biometrika 82, 81). Here it is nine a patch.
    np.testing.assert_allclose(np.mean(found, axis=0), [1, 1.5, 0.3, 0.5, 0.8], atol=0.1)


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_neighbours_raise_auc_and_probabilities_are_calibrated(share):
    # What images miss of a Y3-like session (64 % of the variance at each level, ``images``), in
    # logits; and a classifier whose errors are mostly those of single holes.
    truth = model(
        slope_patch=2.5,
        slope_square=2.5,
        slope_grid=2.5,
        effects=RandomEffects(sd_grid=0.5, sd_square=0.9, sd_patch=1.2),
    )
    with_labels, without, ece = [], [], []
    for seed in range(10):
        rng = np.random.default_rng(100 + seed)
        table = tree_table(rng)
        logit = draw_logit(rng, table)
        low = draw_labels(rng, table, logit, truth)
        known = rng.random(len(table)) < share
        alone = area_under_roc(low[~known], logit[~known])
        # As in a session under way: labels everywhere.
        p = fit_posterior(table, logit, low, known).predict(table, logit, low, known)
        with_labels.append(area_under_roc(low[~known], p[~known]) - alone)
        ece.append(classifier_metrics(low[~known], p[~known])["ece"])
        # And in a quarter of the squares not one.
        new = np.isin(table.square_id, rng.permutation(58)[:15])
        posterior = fit_posterior(table, logit, low, known & ~new)
        p = posterior.predict(table, logit, low, known & ~new)
        without.append(area_under_roc(low[new], p[new]) - area_under_roc(low[new], logit[new]))
    assert lower_bound(with_labels) > 0.02, with_labels
    assert lower_bound(without) > 0.005, without
    assert np.mean(ece) < 0.03, ece


def test_where_nothing_is_shared_little_is_lost():
    flat = model(slope_patch=1.0, slope_square=1.0, slope_grid=1.0, effects=NO_EFFECTS)
    lost = []
    for seed in range(10):
        rng = np.random.default_rng(200 + seed)
        table = tree_table(rng)
        logit = draw_logit(rng, table)
        low, known = draw_labels(rng, table, logit, flat), rng.random(len(table)) < 0.1
        p = fit_posterior(table, logit, low, known).predict(table, logit, low, known)
        lost.append(
            area_under_roc(low[~known], logit[~known]) - area_under_roc(low[~known], p[~known])
        )
    assert np.mean(lost) < 0.005, lost


def test_twenty_labels_do_no_harm_to_speak_of():
    gain = []
    for seed in range(20):
        rng = np.random.default_rng(300 + seed)
        table = tree_table(rng)
        logit = draw_logit(rng, table)
        low, known = draw_labels(rng, table, logit, model()), np.zeros(len(table), bool)
        known[rng.choice(len(table), 20, replace=False)] = True
        p = fit_posterior(table, logit, low, known).predict(table, logit, low, known)
        gain.append(
            area_under_roc(low[~known], p[~known]) - area_under_roc(low[~known], logit[~known])
        )
    assert np.mean(gain) > -0.005, gain
    assert np.min(gain) > -0.06, gain


def test_another_session_brings_its_own_labels():
    rng = np.random.default_rng(8)
    first, second = tree_table(rng), tree_table(rng, 4, 12, 100, 1200)
    logit, other = draw_logit(rng, first), draw_logit(rng, second)
    low, truth = (draw_labels(rng, t, x, model()) for t, x in ((first, logit), (second, other)))
    posterior = fit_posterior(first, logit, low, rng.random(len(first)) < 0.2)
    known = rng.random(len(second)) < 0.15
    before = posterior.predict(second, other)
    np.testing.assert_array_equal(
        before, marginal_p(posterior.base_logit(second, other), posterior.effects)
    )
    after = posterior.predict(second, other, truth, known)
    gain = area_under_roc(truth[~known], after[~known]) - area_under_roc(
        truth[~known], before[~known]
    )
    assert gain > 0.02


def test_a_full_session_takes_less_than_a_second():
    rng = np.random.default_rng(9)
    table = tree_table(rng)
    logit = draw_logit(rng, table)
    low, known = draw_labels(rng, table, logit, model()), np.zeros(len(table), bool)
    known[rng.choice(len(table), 900, replace=False)] = True
    start = time.process_time()
    fit_posterior(table, logit, low, known).predict(table, logit, low, known)
    assert time.process_time() - start < 1.0


def test_json_round_trip_is_strict():
    values = json.loads(json.dumps(model().to_json()))
    assert HierarchicalPosterior.from_json(values) == model()
    with pytest.raises(ValueError, match=r"posterior: unknown keys \['slope'\]"):
        HierarchicalPosterior.from_json({**values, "slope": 1.0})
    with pytest.raises(ValueError, match=r"posterior\.effects: missing keys"):
        HierarchicalPosterior.from_json({**values, "effects": {"sd_grid": 1.0}})


def test_what_does_not_fit_the_table_is_refused():
    yes = np.ones(6, bool)
    with pytest.raises(ValueError, match=r"logit: one a hole, found shape \(3,\) for 6 holes"):
        model().predict(small(), np.zeros(3))
    with pytest.raises(ValueError, match="NaN for every hole"):
        fit_posterior(small(), np.full(6, np.nan), yes, yes)
    with pytest.raises(ValueError, match=r"is_known: one a hole, found shape \(\)"):
        model().predict(small(), LOGIT, yes)
    with pytest.raises(ValueError, match=r"is_low: one a hole, found shape \(2,\)"):
        fit_posterior(small(), LOGIT, yes[:2], yes)
