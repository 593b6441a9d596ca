"""How a session without images is learned from: the coefficients of its head (perception.head).

It stands in for the image network, so that every other stage of the loop meets a real session. Five
coefficients have a unique optimum, which Newton's method finds: no seed but that of the folds, no
epochs, no learning rate.

Ridge: the coefficients are N(where they begin, (1/2)²) a priori, as slopes of the posterior; f_0
begins at the prediction taken at its word, f_k at f_(k-1). Over 12 splits of the Aldolase training
half the log loss of f_0 was the least with it, at 5, 10 and 20 % labels. Shape letters: N holes of
the session, L holes learned from.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit

from envs.cryoem.types import BoolArray, FloatArray, IntArray
from ssl2rl_ray.config import SSL2RLRunConfig
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.data.splits import folds, marks
from ssl2rl_ray.data.text import DataError
from ssl2rl_ray.perception.head import Head, design_of, given_logit
from ssl2rl_ray.perception.metrics import fit_temperature
from ssl2rl_ray.perception.model import Model
from ssl2rl_ray.perception.posterior import fit_posterior
from ssl2rl_ray.perception.sample import Sample, read_pseudo_labels
from ssl2rl_ray.schema import to_dict

if TYPE_CHECKING:
    from ssl2rl_ray.loop.stages import Task

_FOLDS = 4  # stream of random numbers of the seed, that of the image classifier's folds
_AT_ITS_WORD = np.array([0.0, 1.0, 1.0, 1.0, 1.0])  # a, b_within, b_patch, b_square, b_grid
_PRECISION = 4.0  # of the prior, 1 / (1/2)²
_MAX_STEPS = 100


def sample_of(config: SSL2RLRunConfig) -> Sample:
    """The dataset of the config, holes with a prediction in the place of those with an image.

    Its images are empty, (N, 1, 1).

    Raises:
        DataError: no such dataset, or one without predictions or without labels.
    """
    path = config.data.dataset
    assert path is not None  # ``config.check``
    table = read_dataset(path).table
    has_prediction = np.isfinite(given_logit(table))
    if not has_prediction.any():
        raise DataError(
            f"{path} has no predictions for classifier.network head: import them "
            "(`ssl2rl import cryorl --predictions FILE`), or images for network resnet18 or cnn"
        )
    if not (has_prediction & table.is_labelled).any():
        raise DataError(f"{path} has no labelled hole with a prediction: nothing to learn from")
    images = np.zeros((len(table), 1, 1), np.uint8)
    return Sample(table=table, images=images, has_image=has_prediction)


def pretrain(task: Task, folder: Path, *, has_all_labels: bool) -> Path:
    """f_0: the given prediction, calibrated on the labelled holes; written once.

    ``pretraining.num_folds`` more heads, each without a part of the labels, give the temperature
    and the hierarchical posterior, as for images.

    Args:
        task: the run's.
        folder: of the model.
        has_all_labels: learns from every labelled hole of the training squares.

    Raises:
        ValueError: more folds than labels.
    """
    if (folder / "model.json").exists():
        return folder
    table, config = task.table, task.config
    rows = np.flatnonzero(task.is_labelled)
    if has_all_labels:
        rows = task.train[(table.is_labelled & task.has_image)[task.train]]
    num_folds, is_low = config.pretraining.num_folds, task.truth == 1
    if num_folds > len(rows):
        raise ValueError(
            f"pretraining.num_folds: {num_folds} parts of {len(rows)} labelled holes; lower it, "
            "set it to 0, or raise data.labelled_fraction"
        )
    design = design_of(table, given_logit(table))

    def fit(learned: IntArray) -> FloatArray:
        weight = np.full(len(learned), 1 / len(learned))
        return fit_ridge(
            design[:, learned], is_low[learned], weight, _AT_ITS_WORD, _PRECISION / len(learned)
        )

    coefficients = fit(rows)
    out = coefficients @ design
    for part in folds(rows, num_folds, np.random.default_rng([config.seed, _FOLDS])):
        out[part] = fit(np.setdiff1d(rows, part)) @ design[:, part]
    is_known = np.isin(np.arange(len(table)), rows)
    learned = marks(table, rows)
    judged = np.union1d(task.split.validation, task.split.known)
    Model(
        classifier=Head(coefficients),
        temperature=fit_temperature(out[rows], is_low[rows]) if num_folds else 1.0,
        posterior=fit_posterior(table, out, is_low, is_known) if num_folds else None,
        low_ctf_threshold_A=config.data.low_ctf_threshold_A,
        cross_fitted=dict(zip(learned, out[rows].tolist(), strict=True)),
        labels_seen=frozenset(learned),
        validation_marks=frozenset(marks(table, judged)),
        notes={"config": to_dict(config), "trained_on": table.content_hash},
    ).save_new(folder)
    return folder


def finetune(task: Task, initial: Path, labels: Path | None, folder: Path) -> Path:
    """f_k from f_(k-1): the least of SSL²-RL's loss (section 3) near where it begins; written once.

    mean loss of the labelled holes + ``finetuning.unsupervised_weight`` x mean loss of the
    pseudo-labelled ones, each in proportion to its confidence,
    + ridge / L.

    Args:
        task: the run's.
        initial: folder of f_(k-1).
        labels: file of pseudo labels; None: learns from the labelled holes only.
        folder: of the model.

    Raises:
        DataError: as ``read_pseudo_labels``.
        ValueError: no model of a head in ``initial``.
    """
    if (folder / "model.json").exists():
        return folder
    table, begun = task.table, Model.load(initial)
    assert isinstance(begun.classifier, Head)
    known = np.flatnonzero(task.is_labelled)
    rows, is_low = known, (task.truth == 1)[known]
    weight = np.full(len(known), 1 / len(known))
    if labels is not None:
        label, confidence = read_pseudo_labels(str(labels), table)
        is_open = np.isfinite(label) & (confidence > 0)
        is_open[~np.isin(np.arange(len(table)), task.split.unlabelled)] = False
        pseudo = np.flatnonzero(is_open)
        share = confidence[pseudo] / confidence[pseudo].sum()
        rows, is_low = np.r_[known, pseudo], np.r_[is_low, label[pseudo] == 1]
        weight = np.r_[weight, task.config.finetuning.unsupervised_weight * share]
    design, begin = design_of(table, given_logit(table)), begun.classifier.coefficients
    tuned = Head(fit_ridge(design[:, rows], is_low, weight, begin, _PRECISION / len(known)))
    learned = marks(table, known)
    dataclasses.replace(
        begun,
        classifier=tuned,
        temperature=1.0,
        posterior=None,
        cross_fitted=dict(zip(learned, (tuned.coefficients @ design)[known].tolist(), strict=True)),
        labels_seen=begun.labels_seen | frozenset(learned),
    ).save_new(folder)
    return folder


def fit_ridge(
    design: FloatArray, is_low: BoolArray, weight: FloatArray, begin: FloatArray, ridge: float
) -> FloatArray:
    """(F,) beta that minimises sum_i weight_i loss_i + ridge / 2 |beta - begin|².

    Newton's method with halved steps: the objective is strictly convex and falls in every step.

    Args:
        design: (F, L).
        is_low: (L,) labels.
        weight: (L,) 0 or more, of the logistic losses.
        begin: (F,) where beta begins and is drawn to.
        ridge: above 0.
    """
    sign = np.where(is_low, 1.0, -1.0)

    def objective(beta: FloatArray) -> float:
        losses = np.logaddexp(0, -sign * (beta @ design))
        return float(weight @ losses + ridge / 2 * ((beta - begin) ** 2).sum())

    beta, value = np.array(begin, float), objective(begin)
    for _ in range(_MAX_STEPS):
        p = expit(beta @ design)
        slope = design @ (weight * (p - is_low)) + ridge * (beta - begin)
        curvature = (design * (weight * p * (1 - p))) @ design.T + ridge * np.eye(len(beta))
        step = np.linalg.solve(curvature, slope)
        size = 1.0
        while size > 1e-6 and objective(beta - size * step) > value:
            size /= 2
        if size <= 1e-6 or np.abs(step).max() < 1e-10:
            break
        beta = beta - size * step
        value = objective(beta)
    return beta
