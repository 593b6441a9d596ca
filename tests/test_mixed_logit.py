"""Random effects on the tree against dense algebra and quadrature."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit, log_expit

from envs.cryoem import mixed_logit as m
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import HoleTable


def test_tree_solve_and_determinant_against_dense_algebra():
    table = draw_session(np.random.default_rng(3), "demo").select(np.arange(150))
    rng = np.random.default_rng(0)
    tree = m.Tree.of(table, table.is_labelled)
    weight, sds = rng.random(len(table)), np.array([0.3, 0.7, 1.2])
    right = [rng.standard_normal(size) for size in tree.sizes]
    z = np.concatenate(
        [sd * np.eye(size)[ids] for sd, size, ids in zip(sds, tree.sizes, tree.ids, strict=True)],
        axis=1,
    )
    precision = np.eye(z.shape[1]) + z.T @ (weight[:, None] * z)
    solution, log_determinant = m._solve_tree(weight, tree, sds, right)
    np.testing.assert_allclose(
        np.concatenate(solution), np.linalg.solve(precision, np.concatenate(right)), atol=1e-10
    )
    assert log_determinant == pytest.approx(np.linalg.slogdet(precision)[1])


def test_laplace_against_quadrature_for_one_patch():
    tree = m.Tree.of(one_patch(12), np.ones(12, bool))
    low, fixed = np.arange(12) < 9, np.full(12, 0.4)
    sds = np.array([0.3, 0.2, 0.5])  # one group of each level: their sum is one normal
    sd = np.sqrt((sds**2).sum())

    def integrand(u):
        return np.exp(9 * log_expit(0.4 + u) + 3 * log_expit(-0.4 - u) - (u / sd) ** 2 / 2)

    exact = np.log(quad(integrand, -8, 8)[0] / (sd * np.sqrt(2 * np.pi)))
    assert m.log_marginal_likelihood(fixed, low, tree, sds) == pytest.approx(exact, abs=0.01)


def one_patch(n) -> HoleTable:
    same = {level: ["one"] * n for level in ("grid", "square", "patch")}
    return HoleTable.from_names(hole_name=[f"h{i}" for i in range(n)], **same)


def dense_posterior(table, rows, fixed, low, sds):
    """Mode and covariance of the (P,) patch totals by Newton's method on n x n kernels."""
    patch_s, patch_g = table.patch_square, table.square_grid[table.patch_square]
    kernel = (
        sds[0] ** 2 * (patch_g[:, None] == patch_g)
        + sds[1] ** 2 * (patch_s[:, None] == patch_s)
        + sds[2] ** 2 * np.eye(len(patch_s))
    )
    ids = table.patch_id[rows]
    k = kernel[np.ix_(ids, ids)]
    f = np.zeros(len(ids))
    for _ in range(100):
        p = expit(fixed + f)
        w = p * (1 - p)
        f = k @ np.linalg.solve(np.eye(len(ids)) + w[:, None] * k, w * f + low - p)
    p = expit(fixed + f)
    w = p * (1 - p)
    across = kernel[:, ids]
    mode = across @ (low - p)
    return mode, kernel - across @ np.linalg.solve(np.diag(1 / w) + k, across.T)


@pytest.mark.parametrize("sds", [(0.3, 0.7, 1.2), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0)])
def test_patch_moments_against_dense_kriging(sds):
    table = draw_session(np.random.default_rng(5), "demo")
    rng = np.random.default_rng(0)
    rows = rng.random(len(table)) < 0.2
    low, fixed = rng.random(rows.sum()) < 0.6, rng.standard_normal(rows.sum())
    mode, variance = m.patch_moments(fixed, low, m.Tree.of(table, rows), np.array(sds))
    dense_mode, covariance = dense_posterior(table, rows, fixed, low, np.array(sds))
    np.testing.assert_allclose(mode, dense_mode, atol=1e-5)
    np.testing.assert_allclose(variance, np.diag(covariance), atol=1e-5)


def test_without_labels_the_prior_is_left():
    table = draw_session(np.random.default_rng(5), "demo")
    none = np.zeros(len(table), bool)
    tree, empty, sds = m.Tree.of(table, none), np.zeros(0), np.array([0.3, 0.4, 0.5])
    mode, variance = m.patch_moments(empty, empty > 0, tree, sds)
    np.testing.assert_array_equal(mode, 0)
    np.testing.assert_allclose(variance, 0.5)
    fitted = m.fit_mixed_logit(
        np.zeros((2, 0)), empty > 0, tree, prior_mean=np.array([0.5, -2.0]), precision=np.eye(2)
    )
    np.testing.assert_allclose(fitted.coefficients, [0.5, -2.0])
    np.testing.assert_allclose(m.sds_of(fitted.effects), 0.4)
    assert fitted.log_likelihood == 0
