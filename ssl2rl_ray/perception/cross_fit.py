"""The main classifier of a run and its folds, one after the other, and the model made of them.

A run has one main fit on all labels, and ``num_folds`` more, each without a part of the labels:
what those say of their part is what a classifier says of holes that it has not seen, and gives the
temperature and the hierarchical posterior. Torch, no Ray. Shape letters: N holes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from envs.cryoem.types import FloatArray, HoleTable, IntArray
from ssl2rl_ray.checkpoint import read_state
from ssl2rl_ray.config import PerceptionRunConfig
from ssl2rl_ray.data.splits import folds, marks
from ssl2rl_ray.perception.classifier import Classifier, make_classifier
from ssl2rl_ray.perception.fit import Fit
from ssl2rl_ray.perception.head import Head
from ssl2rl_ray.perception.metrics import classifier_metrics, fit_temperature
from ssl2rl_ray.perception.model import Model, Prediction, model_of_run
from ssl2rl_ray.perception.posterior import fit_posterior
from ssl2rl_ray.perception.sample import Sample, Split, examples_of, split_of, truth_of
from ssl2rl_ray.runs import RunDirectory
from ssl2rl_ray.schema import to_dict

_FOLDS = 4  # stream of random numbers of the seed, beside those of ``sample``
_NUM_FOR_MEAN = 2000
"""Images whose grey values standardise all: their mean is known to 1 % then."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Initial:
    """The run that a run starts from."""

    weights: dict[str, dict[str, torch.Tensor]]
    """By fit: a fold starts from the fold that did not see its part either."""
    labels_seen: frozenset[str]
    """``marks`` of the labels that it learned from."""
    validation_marks: frozenset[str]


def _initial_weights(
    config: PerceptionRunConfig, table: HoleTable, split: Split, parts: dict[str, IntArray]
) -> Initial | None:
    """Of ``classifier.initial``; None = it names none.

    Raises ValueError where it holds another network, learned from holes that this run validates
    on, or has not the folds of this run.
    """
    asked = config.classifier
    if asked.initial is None:
        return None
    model = model_of_run(asked.initial)
    found = model.classifier
    if isinstance(found, Head):
        raise ValueError(
            f"classifier.initial: {asked.initial} is a head on given predictions, not a network "
            "that looks at images; name a run of kind perception"
        )
    if (found.name, found.dropout) != (asked.network, asked.dropout):
        raise ValueError(
            f"classifier.initial: {asked.initial} holds a {found.name} with dropout "
            f"{found.dropout:g}, the config asks for {asked.network} with {asked.dropout:g}; "
            "make them equal"
        )
    judged = marks(table, np.concatenate([split.validation, split.known]))
    if num_seen := len(model.labels_seen & set(judged)):
        raise ValueError(
            f"classifier.initial: {asked.initial} learned from {num_seen} of the holes that this "
            "run validates on; take its seed and data.validation_share"
        )
    weights = {"main": found.state_dict()}
    if config.training.num_folds:
        finished = _finished_fits(asked.initial)
        for name, part in parts.items():
            same = name == "main" or torch.equal(
                finished.get(name, {}).get("rows", torch.zeros(0)), torch.from_numpy(part)
            )
            if not same or model.notes["trained_on"] != table.content_hash:
                raise ValueError(
                    f"classifier.initial: {asked.initial} has not the folds of this run, so that "
                    "each fold would begin with labels that it is to be judged on; take its data, "
                    "seed, data.labelled_fraction and training.num_folds, or set num_folds 0"
                )
            if name != "main":
                weights[name] = finished[name]["weights"]
    return Initial(
        weights=weights, labels_seen=model.labels_seen, validation_marks=model.validation_marks
    )


def _finished_fits(path: str) -> dict[str, Any]:
    """``Training.finished`` of a finished run; empty where only its model is at hand."""
    if not (Path(path) / "checkpoints").is_dir():
        return {}
    latest = RunDirectory.open(path).latest
    return {} if latest is None else read_state(latest)["finished"]


class Training:
    """The main fit and the folds, one epoch at a time; resumable between any two.

    Attributes:
        epochs_done, num_epochs: of all fits together.
        finished: by name of the fit (``main``, ``fold-0``, ...): weights and logits.
    """

    def __init__(
        self,
        config: PerceptionRunConfig,
        sample: Sample,
        *,
        device: torch.device | str = "cpu",
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        """Raises ValueError as ``split_of``, ``Fit`` and ``_initial_weights``.

        And where there are more folds than labels; DataError as ``read_pseudo_labels``.
        """
        self.config, self.sample = config, sample
        self.num_workers = num_workers
        self._options: dict[str, Any] = {"device": device, "rank": rank, "num_workers": num_workers}
        self.split = split_of(config, sample)
        self._examples = examples_of(config, sample, self.split)
        num_folds, labelled = config.training.num_folds, self.split.labelled
        if num_folds > len(labelled):
            raise ValueError(
                f"training.num_folds: {num_folds} parts of {len(labelled)} labelled holes; lower "
                "it, set it to 0, or raise data.labelled_fraction"
            )
        parts = folds(labelled, num_folds, np.random.default_rng([config.seed, _FOLDS]))
        self.parts: dict[str, IntArray] = {"main": np.zeros(0, np.int64)}
        self.parts |= {f"fold-{i}": part for i, part in enumerate(parts)}
        self.initial = _initial_weights(config, sample.table, self.split, self.parts)
        self.finished: dict[str, dict[str, Any]] = {}
        self.fit = self._begin("main")
        self.num_epochs = self.fit.num_epochs * len(self.parts)

    def _begin(self, name: str) -> Fit:
        """A fit of its own seed, on all labels but the part's."""
        self.name = name
        seed = self.config.seed * 1000 + list(self.parts).index(name)
        torch.manual_seed(seed)
        classifier = self._initial_classifier(name)
        part, examples = self.parts[name], self._examples
        if len(part):
            labelled = np.setdiff1d(examples.labelled, part)
            unlabelled = examples.unlabelled
            if self.config.training.method == "fixmatch":  # as every hole without a label
                unlabelled = np.sort(np.concatenate([unlabelled, part]))
            examples = dataclasses.replace(
                examples, labelled=labelled, unlabelled=unlabelled, validation=part
            )
        training = self.config.training
        return Fit(training, classifier, examples, seed=seed, **self._options)

    def _initial_classifier(self, name: str) -> Classifier:
        classifier, size = self.config.classifier, self.sample.images.shape[1]
        assert classifier.network != "head"  # ``config.check``
        made = make_classifier(classifier.network, size, classifier.dropout)
        if self.initial is not None:
            made.load_state_dict(self.initial.weights[name])
            return made
        train = np.concatenate([self.split.labelled, self.split.unlabelled])
        rows = np.sort(train)[:: max(1, len(train) // _NUM_FOR_MEAN)]
        pixels = self.sample.images[rows]
        made.standardise_by(float(pixels.mean()) / 255, float(pixels.std()) / 255)
        return made

    @property
    def epochs_done(self) -> int:
        """Of all fits together."""
        return len(self.finished) * self.fit.num_epochs + self.fit.epochs_done * (not self.is_over)

    @property
    def is_over(self) -> bool:
        """Whether every fit is finished."""
        return len(self.finished) == len(self.parts)

    def epochs(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Trains what is left; after each epoch its row of metrics, and whether to save now.

        It is time to save after validations and at the end of a fit. Rows of the main fit have
        ``train/...`` and, when due, ``validation/...``; of the folds only ``fold/accuracy`` and the
        like at their end.
        """
        while not self.is_over:
            row = self.fit.epoch()
            is_main, is_last = self.name == "main", self.fit.epochs_done == self.fit.num_epochs
            is_due = is_last or not (
                self.fit.epochs_done % self.config.training.evaluation_interval_epochs
            )
            if not is_main:
                row = {}
            if self._options["rank"] == 0 and is_due and (is_main or is_last):
                row |= self.fit.validate()
            if is_main:
                row["is_collapsed"] = self.fit.is_collapsed(row)
            else:
                row = {name.replace("validation/", "fold/"): v for name, v in row.items()}
            name = self.name
            if is_last:
                self._finish()
            yield {"epoch": self.epochs_done, "fit": name, **row}, is_due

    def _finish(self) -> None:
        """Keeps what the fit was for, and begins the next one."""
        is_main = self.name == "main"
        rows = np.flatnonzero(self.sample.has_image) if is_main else self.parts[self.name]
        is_asked = self._options["rank"] == 0
        self.finished[self.name] = {
            "logits": torch.from_numpy(self.fit.logits(rows) if is_asked else np.zeros(len(rows))),
            "weights": self.fit.average.state_dict(),
            "rows": torch.from_numpy(rows),
        }
        if not self.is_over:
            self.fit = self._begin(list(self.parts)[len(self.finished)])

    def state(self) -> dict[str, Any]:
        """All that goes on: plain values and tensors, for ``torch.save``."""
        return {
            "finished": self.finished,
            "fit": None if self.is_over else self.fit.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``."""
        self.finished = dict(state["finished"])
        if state["fit"] is not None:
            name = list(self.parts)[len(self.finished)]
            if name != self.name:
                self.fit = self._begin(name)
            self.fit.load_state(state["fit"])


def model_of(training: Training) -> tuple[Model, FloatArray]:
    """The model of finished fits, and (N,) the logits that its posterior was fitted on."""
    config = training.config
    sample, split, table = training.sample, training.split, training.sample.table
    main = training.finished["main"]
    logit = np.full(len(table), np.nan)
    logit[sample.has_image] = main["logits"].numpy()
    for name, part in training.parts.items():
        if name != "main":
            logit[part] = training.finished[name]["logits"].numpy()
    classifier = make_classifier(
        training.fit.average.name, training.fit.average.image_size_px, config.classifier.dropout
    )
    classifier.load_state_dict(main["weights"])
    rows, is_low = split.labelled, truth_of(config, table) == 1
    is_cross_fitted = len(training.parts) > 1
    is_known = np.zeros(len(table), bool)
    is_known[rows] = True
    learned, judged = marks(table, rows), marks(table, np.union1d(split.validation, split.known))
    initial = training.initial
    model = Model(
        classifier=classifier.eval().requires_grad_(False),
        temperature=fit_temperature(logit[rows], is_low[rows]) if is_cross_fitted else 1.0,
        posterior=fit_posterior(table, logit, is_low, is_known) if is_cross_fitted else None,
        low_ctf_threshold_A=config.data.low_ctf_threshold_A,
        cross_fitted=dict(zip(learned, logit[rows].tolist(), strict=True)),
        labels_seen=frozenset(learned) | (initial.labels_seen if initial else frozenset()),
        validation_marks=frozenset(judged) | (initial.validation_marks if initial else frozenset()),
        notes={"config": to_dict(config), "trained_on": table.content_hash},
    )
    return model, logit


def judge(
    training: Training, model: Model, logit: FloatArray
) -> tuple[dict[str, dict[str, float]], Prediction]:
    """``classifier_metrics`` on the validation holes, and what was predicted last.

    Of ``classifier`` as it is, ``calibrated`` by the temperature, ``posterior_blind`` without any
    label in the validation squares, ``posterior`` with those that are known there.
    """
    table, split = training.sample.table, training.split
    rows, is_known = split.validation, np.zeros(len(table), bool)
    is_known[split.labelled] = True
    blind = model.predict(table, logit, is_known)
    is_known[split.known] = True
    predicted = model.predict(table, logit, is_known)
    said = {"classifier": expit(logit), "calibrated": predicted.p_classifier}
    if model.posterior is not None:
        said |= {"posterior_blind": blind.p_low_ctf, "posterior": predicted.p_low_ctf}
    is_low = truth_of(training.config, table)[rows] == 1
    return {what: classifier_metrics(is_low, p[rows]) for what, p in said.items()}, predicted
