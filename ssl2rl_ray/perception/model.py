"""A trained perception model as a folder: images and known labels in, ``p_low_ctf`` out.

Classifier, temperature and hierarchical posterior, with the cross-fitted logits of the labels that
it learned from: on its own session, those holes are judged by classifiers that never saw them. Of
sessions without images the classifier is a head on the predictions that they bring. Torch without
Ray. Shape letters: N holes, H and W pixels.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from envs.cryoem.calibration import Calibration, marginal_p
from envs.cryoem.types import BoolArray, FloatArray, HoleTable
from ssl2rl_ray.data.splits import marks
from ssl2rl_ray.perception.classifier import (
    Classifier,
    ClassifierError,
    load_classifier,
    predict_logits,
    save_classifier,
)
from ssl2rl_ray.perception.head import Head, given_logit
from ssl2rl_ray.perception.posterior import HierarchicalPosterior
from ssl2rl_ray.runs import RunDirectory

_NUM_A_STEP = 2048
"""Holes between two signs of progress."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a model says of each hole of a session."""

    logit: FloatArray
    """(N,) of the classifier, over the temperature; NaN = no image (of a head: no prediction)."""
    p_classifier: FloatArray
    """(N,) sigmoid of it; NaN likewise."""
    p_marginal: FloatArray
    """(N,) of the hierarchical posterior before any label of the session is known."""
    p_low_ctf: FloatArray
    """(N,) of the posterior given the known labels (a hole's own left out); no NaN."""
    is_known: BoolArray
    """(N,) whose labels were used for the neighbours."""
    is_seen: BoolArray
    """(N,) whose labels the classifier learned from; their logits are cross-fitted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """All that predicting needs."""

    classifier: Classifier | Head
    temperature: float
    """The logits are divided by it (Guo et al. 2017, arXiv:1706.04599); 1 = not fitted."""
    posterior: HierarchicalPosterior | None
    """None: ``p_low_ctf`` is the classifier's alone."""
    low_ctf_threshold_A: float
    """Å; what low-CTF meant in training."""
    cross_fitted: Mapping[str, float]
    """``data.splits.marks`` of the run's labels, and the logit of a classifier that did not see
    that label (of the one that did, where the run had no folds); temperature not applied."""
    labels_seen: frozenset[str]
    """Marks of all labels learned from, those behind the initial classifier included."""
    validation_marks: frozenset[str] = frozenset()
    """``data.splits.marks`` of the labels that the run validated on."""
    notes: Mapping[str, Any]
    """Where it comes from (JSON)."""

    def save(self, folder: Path) -> None:
        """Writes ``model.json`` and, of a network, ``model.safetensors`` into a folder."""
        notes = {
            "temperature": self.temperature,
            "posterior": None if self.posterior is None else self.posterior.to_json(),
            "low_ctf_threshold_A": self.low_ctf_threshold_A,
            "cross_fitted": dict(self.cross_fitted),
            "labels_seen": sorted(self.labels_seen),
            "validation_marks": sorted(self.validation_marks),
            "notes": dict(self.notes),
        }
        save_classifier(self.classifier, folder, notes)

    def save_new(self, folder: Path) -> None:
        """``save`` into a folder that there was not: whole or not at all."""
        partial = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.save(partial)
        partial.replace(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Inverse of ``save``; raises ClassifierError where the folder holds no such model."""
        classifier, found = load_classifier(folder)
        try:
            posterior = found["posterior"]
            if posterior is not None:
                posterior = HierarchicalPosterior.from_json(posterior)
                _check_numbers(posterior)
            return cls(
                classifier=classifier,
                temperature=_positive(found["temperature"]),
                posterior=posterior,
                low_ctf_threshold_A=_positive(found["low_ctf_threshold_A"]),
                cross_fitted={k: _finite(v) for k, v in dict(found["cross_fitted"]).items()},
                labels_seen=frozenset(found["labels_seen"]),
                validation_marks=frozenset(found["validation_marks"]),
                notes=dict(found["notes"]),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ClassifierError(f"{folder}: model.json is damaged: {error}") from error

    def logits(
        self,
        table: HoleTable,
        images: NDArray[np.uint8] | None,
        has_image: BoolArray | None,
        *,
        on_step: Callable[[str, float], None] | None = None,
    ) -> FloatArray:
        """(N,) of the classifier, cross-fitted where it saw the label; NaN without an image.

        A head reads the table's predictions instead, and no images.

        Raises:
            ValueError: no images, or of another size than the classifier's; for a head: no
                predictions. It says how to import them.
        """
        if isinstance(self.classifier, Head):
            if np.isnan(given_logit(table)).all():
                raise ValueError(
                    "the session has no predictions, and the classifier is a head on them: "
                    "import it again with --predictions FILE"
                )
            return self.with_cross_fitted(table, self.classifier.logits(table))
        if images is None or has_image is None or not has_image.any():
            raise ValueError(
                "the session has no images, and the classifier looks at them: import it again with "
                "--images DIR"
            )
        size = self.classifier.image_size_px
        if images.shape[1:] != (size, size):
            raise ValueError(
                f"the classifier was trained on images of {size} x {size} px, these have "
                f"{images.shape[1]} x {images.shape[2]}: import them with --image-size {size}"
            )
        logit = np.full(len(table), np.nan)
        rows = np.flatnonzero(has_image)
        for part in np.array_split(rows, max(1, len(rows) // _NUM_A_STEP)):
            logit[part] = predict_logits(self.classifier, images, part).double().numpy()
            if on_step:
                on_step("predicting", float((part[-1] + 1) / len(table)))
        return self.with_cross_fitted(table, logit)

    def with_cross_fitted(self, table: HoleTable, logit: FloatArray) -> FloatArray:
        """(N,) the logits with those of labels learned from exchanged."""
        known = np.flatnonzero(np.isfinite(table.ctf_max_resolution_A))
        own = [self.cross_fitted.get(mark, np.nan) for mark in marks(table, known)]
        out = logit.copy()
        out[known] = np.where(np.isnan(own) | np.isnan(logit[known]), logit[known], own)
        return out

    def predict(self, table: HoleTable, logit: FloatArray, is_known: BoolArray) -> Prediction:
        """Probabilities from ``logits``.

        Args:
            table: its hierarchy, and the CTF of known holes, are read.
            logit: (N,) from ``logits``.
            is_known: (N,) measured holes whose labels may be used for their neighbours.

        Raises:
            ValueError: no hole has a logit, or a known hole has no CTF.
        """
        ctf = table.ctf_max_resolution_A
        if (is_known & ~np.isfinite(ctf)).any():
            raise ValueError("is_known: a hole without a CTF value cannot be known")
        scaled = logit / self.temperature
        p_classifier = expit(scaled)
        if self.posterior is None:
            mean = np.nanmean(scaled) if np.isfinite(scaled).any() else 0.0
            p_marginal = p_low = expit(np.where(np.isnan(scaled), mean, scaled))
        else:
            p_marginal = marginal_p(self.posterior.base_logit(table, logit), self.posterior.effects)
            p_low = self.posterior.predict(table, logit, ctf < self.low_ctf_threshold_A, is_known)
        rows = np.flatnonzero(np.isfinite(ctf))
        is_seen = np.zeros(len(table), bool)
        is_seen[rows] = [mark in self.labels_seen for mark in marks(table, rows)]
        return Prediction(
            logit=scaled,
            p_classifier=p_classifier,
            p_marginal=p_marginal,
            p_low_ctf=p_low,
            is_known=is_known,
            is_seen=is_seen,
        )

    def calibration(self) -> Calibration | None:
        """For planners, on a table whose ``p_low_ctf`` is ``p_marginal``; None = no posterior.

        It gives the same probabilities back and says how much neighbours have in common.
        """
        if self.posterior is None:
            return None
        effects = self.posterior.effects
        return Calibration(
            intercept=0.0,
            slope=float(np.sqrt(1 + np.pi / 8 * effects.variance)),
            clip_A=9.0,
            patch_mean_slope=0.0,
            effects=effects,
            fitted_on=self.posterior.fitted_on,
            num_holes=self.posterior.num_labelled,
            log_likelihood=self.posterior.log_likelihood,
            input="logit_p_low_ctf",
        )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {value!r}")
    return number


def _positive(value: Any) -> float:
    if not (number := _finite(value)) > 0:
        raise ValueError(f"expected a number above 0, found {value!r}")
    return number


def _check_numbers(posterior: HierarchicalPosterior) -> None:
    """Raises ValueError or TypeError where a number is none, or an sd is below 0."""
    values = posterior.to_json()
    effects = values.pop("effects")
    for name in ("intercept", *(name for name in values if name.startswith("slope_"))):
        _finite(values[name])
    for name, sd in effects.items():
        if not 0 <= _finite(sd) < 1e6:
            raise ValueError(f"posterior: {name} is {sd!r}, not a standard deviation")


def model_of_run(path: str | os.PathLike[str]) -> Model:
    """The model of a run directory of kind perception, or of an exported ``model`` folder.

    Raises ValueError where there is none (yet).
    """
    return Model.load(model_folder(path))


def model_folder(path: str | os.PathLike[str]) -> Path:
    """Where ``model_of_run`` finds it; raises as that."""
    folder = Path(path)
    if (folder / "model.json").is_file():
        return folder
    run = RunDirectory.open(folder)
    if run.manifest["kind"] == "ssl2rl":
        raise ValueError(
            f"{folder}: a run of the loop has a classifier of each method; name one, such as "
            f"{folder / 'methods/METHOD/model'}"
        )
    if (found := run.artefact("model")) is None:
        raise ValueError(
            f"{folder}: this run has no classifier (kind {run.manifest['kind']}, status "
            f"{run.status!r}); finish it with --resume, or name another run"
        )
    return found
