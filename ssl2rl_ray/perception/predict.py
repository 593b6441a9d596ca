"""``ssl2rl predict``: a trained model on a dataset folder -> probabilities that others read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from envs.cryoem.types import BoolArray
from ssl2rl_ray.data.folder import Dataset, check_target, read_dataset, write_dataset
from ssl2rl_ray.data.splits import marks
from ssl2rl_ray.data.text import DataError
from ssl2rl_ray.perception.classifier import Classifier
from ssl2rl_ray.perception.metrics import classifier_metrics
from ssl2rl_ray.perception.model import Model, Prediction, model_of_run
from ssl2rl_ray.stats import or_none

Labels = Literal["data", "run", "none"]


def predict(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: Labels = "data",
    dataset: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_step: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Predicts every hole of a dataset folder and writes a parquet file.

    Its columns: ``hole_name``; ``p_low_ctf`` of the hierarchical posterior given the known labels
    (a hole's own label never enters its own); ``p_marginal`` of the same before any label is
    known, for planners that learn from labels themselves; ``p_classifier`` and ``logit`` (over the
    temperature) of the image alone, null without an image; ``is_known``; ``is_seen`` (the
    classifier learned from its label). Of a head, the prediction that a hole brings stands in for
    its image.

    Args:
        run: run directory of kind perception, or its ``model`` folder, or one of the loop's.
        data: dataset folder with images; for a head, with predictions.
        out: the parquet file.
        labels: whose labels tell about their neighbours: all of ``data``, those of them that the
            run learned from, or none.
        dataset: also write ``data`` again as a dataset folder whose ``p_low_ctf`` is
            ``p_marginal`` and whose calibration says what neighbours have in common.
        force: replace an earlier ``dataset``.
        on_step: told ``("predicting", share)``.

    Returns:
        Counts (``num_inputs``: holes with an ``input``, "an image" or, of a head, "a prediction"),
        notes, and ``classifier_metrics`` of classifier and posterior on the labelled holes
        that the run neither learned from nor validated on.

    Raises:
        ValueError: no model, no dataset, no images (or predictions), or of another size.
    """
    if Path(out).resolve().parent == Path(data).resolve():
        raise DataError(f"{out} lies in the dataset folder {data}: choose another place")
    if dataset is not None:
        check_target(Path(dataset), force)
    model, session = model_of_run(run), read_dataset(data)
    table, classifier = session.table, model.classifier
    if isinstance(classifier, Classifier) and torch.cuda.is_available():
        classifier.to("cuda")
    try:
        logit = model.logits(table, session.images, session.has_image, on_step=on_step)
    except ValueError as error:
        raise DataError(f"{data}: {error}") from error
    predicted = model.predict(table, logit, _known(labels, model, session))
    judged = _judged(model, session, predicted)
    _write(Path(out), session, predicted)
    if dataset is not None:
        _write_dataset(model, session, predicted, run, dataset, force)
    notes = []
    if num_seen := int(predicted.is_seen.sum()):
        is_cross_fitted = model.posterior is not None
        what = "are predictions of classifiers that did not" if is_cross_fitted else "are too sure"
        notes.append(f"the classifier learned from {num_seen} of these holes: theirs {what}")
    if labels == "data" and predicted.is_known.any():
        notes.append("every label of the data tells about its neighbours; --labels run or none")
    if labels == "run" and not predicted.is_known.any():
        notes.append("the run learned from no label of this session: none tells about neighbours")
    return {
        "num_holes": len(table),
        "input": "an image" if isinstance(classifier, Classifier) else "a prediction",
        "num_inputs": int(np.isfinite(logit).sum()),
        "num_known": int(predicted.is_known.sum()),
        "num_seen": num_seen,
        "labels": labels,
        "notes": notes,
        **judged,
    }


def _known(labels: Labels, model: Model, session: Dataset) -> BoolArray:
    table = session.table
    if labels == "data":
        return table.is_labelled.copy()
    known = np.zeros(len(table), bool)
    if labels == "run":
        rows = np.flatnonzero(table.is_labelled)
        known[rows] = [mark in model.cross_fitted for mark in marks(table, rows)]
    return known


def _judged(model: Model, session: Dataset, predicted: Prediction) -> dict[str, Any]:
    """Metrics where labels are new to the model.

    A posterior's p of a known hole leaves its own label out, so known holes count too.
    """
    table = session.table
    rows = np.flatnonzero(table.is_labelled & ~np.isnan(predicted.logit) & ~predicted.is_seen)
    is_new = [mark not in model.validation_marks for mark in marks(table, rows)]
    rows = rows[np.array(is_new, bool)]
    if not len(rows):
        return {}
    is_low = table.ctf_max_resolution_A[rows] < model.low_ctf_threshold_A
    return {
        name: {key: or_none(value) for key, value in classifier_metrics(is_low, p[rows]).items()}
        for name, p in (
            ("classifier", predicted.p_classifier),
            ("posterior", predicted.p_low_ctf),
        )
    }


def _write(path: Path, session: Dataset, predicted: Prediction) -> None:
    """Whole or not at all."""
    columns = {
        "hole_name": pa.array(session.table.hole_name.tolist(), pa.string()),
        "p_low_ctf": pa.array(predicted.p_low_ctf),
        "p_marginal": pa.array(predicted.p_marginal),
        "p_classifier": pa.array(predicted.p_classifier, from_pandas=True),
        "logit": pa.array(predicted.logit, from_pandas=True),
        "is_known": pa.array(predicted.is_known),
        "is_seen": pa.array(predicted.is_seen),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        pq.write_table(pa.table(columns), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_dataset(
    model: Model,
    session: Dataset,
    predicted: Prediction,
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    force: bool,
) -> None:
    calibration = model.calibration()
    write_dataset(
        session.table.replace(
            p_low_ctf=predicted.p_marginal, predicted_ctf_A=np.full(len(session.table), np.nan)
        ),
        out,
        provenance={
            "importer": "predict",
            "source": session.manifest["provenance"],
            "notes": ["p_low_ctf is p_marginal of a perception run"],
            "calibration_applied": {
                "path": os.fspath(run),
                "fitted_on": model.notes["trained_on"],
                "num_shared_holes": int(predicted.is_seen.sum()),
            },
            "labels_seen": sorted(model.labels_seen),  # what the calibration stored here rests on
        },
        calibration=None if calibration is None else calibration.to_json(),
        images=session.images,
        has_image=None if session.images is None else session.has_image,
        acquired=session.acquired,
        force=force,
    )
