"""Train the classifier of a run: config -> images and splits -> fits -> model, figures, files.

A run has one main fit on all labels, and ``num_folds`` more, each without a part of the labels:
what those say of their part is what a classifier says of holes that it has not seen, and gives the
temperature and the hierarchical posterior. ``Training`` goes through them one after the other, in
this process or in the workers of Ray Train. Everything random hangs on ``config.seed``.
Shape letters: N holes, H and W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from envs.cryoem.images import draw_images
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import BoolArray, FloatArray, HoleTable, IntArray
from ssl2rl_ray.config import PerceptionRunConfig, check, to_dict, to_yaml
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.data.splits import choose_labelled, folds, marks, split_by_square
from ssl2rl_ray.data.text import DataError
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.perception.classifier import Classifier, make_classifier
from ssl2rl_ray.perception.distributed import last_state, report, run_workers
from ssl2rl_ray.perception.fit import Examples, Fit
from ssl2rl_ray.perception.metrics import classifier_metrics, fit_temperature
from ssl2rl_ray.perception.model import Model, Prediction, model_folder, model_of_run
from ssl2rl_ray.perception.posterior import fit_posterior
from ssl2rl_ray.runs import RunDirectory, on_interrupt
from ssl2rl_ray.stats import or_none
from ssl2rl_ray.tensorboard import TensorBoard

_SAMPLE, _SPLIT, _LABELLED, _KNOWN, _FOLDS = range(5)  # streams of random numbers of one seed
_NUM_FOR_MEAN = 2000
"""Images whose grey values standardise all: their mean is known to 1 % then."""


# ---- what is learned from ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A session with images."""

    table: HoleTable
    images: NDArray[np.uint8]
    """(N, H, W), read-only, often a memory map."""
    has_image: BoolArray
    """(N,)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Rows of the sample by what they are for, sorted; only holes with an image."""

    labelled: IntArray
    unlabelled: IntArray
    validation: IntArray
    """With a label, not known to the posterior."""
    known: IntArray
    """In validation squares, with a label that the posterior may use."""


@functools.lru_cache(maxsize=2)
def sample_of(config: PerceptionRunConfig) -> Sample:
    """The dataset of the config, or its synthetic sample.

    Raises:
        DataError: no such dataset, or one without images or labels.
    """
    data = config.data
    if data.dataset is None:
        rng = np.random.default_rng([config.seed, _SAMPLE])
        table = draw_session(rng, data.preset)
        images = draw_images(rng, table, data.preset)
        return Sample(table=table, images=images, has_image=np.ones(len(table), bool))
    dataset = read_dataset(data.dataset)
    images, has_image = dataset.images, dataset.has_image
    if images is None or has_image is None or not has_image.any():
        raise DataError(
            f"{data.dataset} has no images to learn from: import it with --images DIR, or a "
            "synthetic preset such as y3-mini"
        )
    if not (has_image & dataset.table.is_labelled).any():
        raise DataError(f"{data.dataset} has no labelled hole with an image: nothing to learn from")
    return Sample(table=dataset.table, images=images, has_image=has_image)


def data_hashes(config: PerceptionRunConfig) -> dict[str, str]:
    """What tells by path whether the files that a run reads are still the same.

    Raises whatever is wrong with them, and with what the config asks of them, as ``Training``.
    """
    Training(config, sample_of(config), device=device_of(config))
    hashes, dataset = {}, config.data.dataset
    if dataset is not None:
        hashes[dataset] = sample_of(config).table.content_hash
        files = read_dataset(dataset).manifest["files"]
        hashes[f"{dataset}: images"] = files["images.npy"]["sha256"]
    if (path := config.training.pseudo_labels) is not None:
        hashes[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if (initial := config.classifier.initial) is not None:
        weights = model_folder(initial) / "model.safetensors"
        hashes[initial] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return hashes


def split_of(config: PerceptionRunConfig, sample: Sample) -> Split:
    """Validation squares, then which labels of either part are used.

    Raises ValueError where nothing labelled is left on one of the two sides, and where the labels
    to train on are of one kind.
    """
    data, table = config.data, sample.table

    def rng(stream: int) -> np.random.Generator:
        return np.random.default_rng([config.seed, stream])

    held_out = split_by_square(table, data.validation_share, rng(_SPLIT))
    has_label = table.is_labelled & sample.has_image
    labelled = choose_labelled(
        np.flatnonzero(has_label & ~held_out), data.labelled_fraction, rng(_LABELLED)
    )
    candidates = np.flatnonzero(has_label & held_out)
    known = choose_labelled(candidates, data.validation_labelled_fraction, rng(_KNOWN))
    if not len(labelled) or len(known) == len(candidates):
        raise ValueError(
            f"seed {config.seed}: the split by squares leaves {len(labelled)} labelled holes to "
            f"train on and {len(candidates) - len(known)} to validate on; take another seed or "
            "data.validation_share, or label holes of more squares"
        )
    is_low = truth_of(config, table)[labelled] == 1
    if is_low.all() or not is_low.any():
        raise ValueError(
            f"all {len(labelled)} labelled holes to train on are {'' if is_low.all() else 'not '}"
            f"low-CTF at data.low_ctf_threshold_A {data.low_ctf_threshold_A:g}: nothing to tell "
            "apart; raise data.labelled_fraction, or change the threshold"
        )
    is_unlabelled = sample.has_image & ~held_out
    is_unlabelled[labelled] = False
    return Split(
        labelled=labelled,
        unlabelled=np.flatnonzero(is_unlabelled),
        validation=np.setdiff1d(candidates, known),
        known=known,
    )


def examples_of(config: PerceptionRunConfig, sample: Sample, split: Split) -> Examples:
    """What the main fit learns from; reads the pseudo labels where the method has any."""
    truth = truth_of(config, sample.table)
    examples = Examples(
        images=sample.images,
        labelled=split.labelled,
        is_low=truth == 1,
        unlabelled=split.unlabelled,
        validation=split.validation,
        truth=truth,
    )
    if config.training.method != "finetuning":
        return examples
    assert config.training.pseudo_labels is not None
    label, confidence = read_pseudo_labels(config.training.pseudo_labels, sample.table)
    is_low = examples.is_low.copy()
    pseudo = split.unlabelled[np.isfinite(label[split.unlabelled])]
    is_low[pseudo] = label[pseudo] == 1
    return dataclasses.replace(examples, unlabelled=pseudo, is_low=is_low, confidence=confidence)


def truth_of(config: PerceptionRunConfig, table: HoleTable) -> FloatArray:
    """(N,) 1 low-CTF, 0 not, NaN not measured."""
    ctf = table.ctf_max_resolution_A
    return np.where(np.isnan(ctf), np.nan, ctf < config.data.low_ctf_threshold_A)


def read_pseudo_labels(path: str, table: HoleTable) -> tuple[FloatArray, FloatArray]:
    """(N,) label (1, 0, NaN = none) and (N,) confidence of a parquet file's holes.

    Raises DataError where it cannot be read, lacks a column, names a hole twice or one that the
    table does not have, or has a confidence below 0.
    """
    import pyarrow.parquet as pq

    columns = ("hole_name", "is_low_ctf", "confidence")
    try:
        found = pq.read_table(path, columns=list(columns)).to_pydict()
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected a parquet file with the columns {', '.join(columns)}: {error}"
        ) from error
    row_of = {name: row for row, name in enumerate(table.hole_name.tolist())}
    names = found["hole_name"]
    if strangers := [name for name in names if name not in row_of]:
        raise DataError(f"{path}: the session has no hole {strangers[0]!r} ({len(strangers)} rows)")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: a hole is there twice")
    if not all(value in (0, 1) for value in found["is_low_ctf"]):
        raise DataError(f"{path}: is_low_ctf: expected true or false in every row")
    label, confidence = np.full(len(table), np.nan), np.zeros(len(table))
    rows = np.array([row_of[name] for name in names], np.int64)
    label[rows] = np.array(found["is_low_ctf"], float)
    try:
        confidence[rows] = np.array(found["confidence"], float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: confidence: expected numbers: {error}") from error
    if not (np.isfinite(confidence) & (confidence >= 0)).all():
        raise DataError(f"{path}: confidence: expected numbers of 0 or more in every row")
    return label, confidence


# ---- all fits of a run ---------------------------------------------------------------------------


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
    return {} if latest is None else _read_state(latest)["finished"]


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


# ---- the run -------------------------------------------------------------------------------------


def train_classifier(
    config: PerceptionRunConfig,
    run: RunDirectory,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Trains to the end, from the run's latest checkpoint if it has one.

    Args:
        config: what the run was begun with.
        run: open for writing; gets metrics, checkpoints, TensorBoard events and figures, the model
            and the summary.
        progress: told each row of metrics, with ``num_epochs`` of all fits; None prints lines to
            stderr.

    Returns:
        The summary: ``classifier_metrics`` on the validation holes of the ``classifier`` as it is,
        ``calibrated`` by the temperature, of the ``posterior`` without labels in the validation
        squares (``posterior_blind``) and with those that are known (``posterior``).

    Raises:
        ValueError: settings (``config.check``) or data that do not go together, by name.
        KeyboardInterrupt: after Ctrl-C, once the state is safe on disk.
    """
    check(config)
    sample = sample_of(config)
    torch.set_num_threads(config.compute.num_torch_threads)
    is_alone = config.compute.num_workers == 0
    training = Training(config, sample, device=device_of(config))
    state = None if run.latest is None else _read_state(run.latest)
    if state is not None:
        training.load_state(state)
    with contextlib.ExitStack() as stack:
        if not is_alone and not training.is_over:
            # before our handlers of signals: Ray sets one of its own
            stack.enter_context(
                local_ray(config.compute.num_workers * config.compute.num_torch_threads)
            )
        log = _Log(config, run, training, progress or _print_row)
        stack.enter_context(log.board)
        interrupted = stack.enter_context(on_interrupt())
        if is_alone:
            _train_here(training, log, interrupted)
        elif not training.is_over:
            _train_with_ray(training, state, log, interrupted)
        return _finish(config, run, training, log.board)


def _train_here(training: Training, log: _Log, interrupted: threading.Event) -> None:
    for row, is_due in training.epochs():
        log.row(row)
        is_stopping = interrupted.is_set()
        if is_due or is_stopping:
            log.save(row["epoch"], training.state())
        if is_stopping:
            raise KeyboardInterrupt


def _train_with_ray(
    begun: Training, state: dict[str, Any] | None, log: _Log, interrupted: threading.Event
) -> None:
    """Takes the training to its end; images and state reach each node once, by Ray's store."""
    import ray

    config, compute = begun.config, begun.config.compute
    num_gpus = ray.cluster_resources().get("GPU", 0)
    is_on_gpu = compute.device == "cuda" or (
        compute.device == "auto" and num_gpus >= compute.num_workers
    )

    def on_report(content: dict[str, Any], saved: Path | None) -> None:
        for row in content["rows"]:
            if row["epoch"] > log.last_epoch:  # a group that was started again repeats some
                log.row(row)
        if saved is not None:
            log.keep(log.last_epoch, saved)

    run_workers(
        _worker,
        {"config": config, "sample": ray.put(begun.sample), "state": ray.put(state)},
        folder=log.run.path,
        num_workers=compute.num_workers,
        num_cpus=compute.num_torch_threads,
        is_on_gpu=is_on_gpu,
        on_report=on_report,
        is_stopping=interrupted.is_set,
    )
    if interrupted.is_set():
        raise KeyboardInterrupt
    assert log.run.latest is not None
    begun.load_state(_read_state(log.run.latest))


def _worker(task: dict[str, Any]) -> None:
    """What each worker runs: ``Training`` as one of several, from the last state."""
    import ray
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    config, rank = task["config"], context.get_world_rank()
    torch.set_num_threads(config.compute.num_torch_threads)
    training = Training(
        config,
        ray.get(task["sample"]),
        device=get_device(),
        rank=rank,
        num_workers=context.get_world_size(),
    )
    if (state := last_state() or ray.get(task["state"])) is not None:
        training.load_state(state)
    rows = []
    for row, is_due in training.epochs():
        rows.append(row)
        is_stopping = _agreed(Path(task["stop"]).exists(), training)
        if is_due or is_stopping:
            is_first = rank == 0
            report({"rows": rows} if is_first else None, training.state() if is_first else None)
            rows = []
        if is_stopping:
            return


def _agreed(is_stopping: bool, training: Training) -> bool:
    """Whether any worker saw the sign to stop: they look at different times."""
    flag = torch.tensor(float(is_stopping), device=training.fit.device)
    if training.num_workers > 1:
        torch.distributed.all_reduce(flag)
    return bool(flag > 0)


def device_of(config: PerceptionRunConfig) -> torch.device:
    """As asked, or a GPU where torch sees one; raises ValueError where one is asked for in vain."""
    asked = config.compute.device
    if config.compute.num_workers > 0:
        return torch.device("cpu")  # of this process: the workers have their own
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("compute.device: cuda was asked for, and torch sees no GPU; set auto")
    has_gpu = asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if has_gpu else "cpu")


_EARLY_SHARE = 0.2
"""Of the epochs: a healthy classifier may begin one-sided."""
_AGAINST_COLLAPSE = {
    "supervised": "more labels, or another training.learning_rate",
    "fixmatch": "lower training.unsupervised_weight, raise training.num_warmup_epochs, or set "
    "training.is_aligned",
    "finetuning": "lower training.unsupervised_weight, and look at the pseudo labels",
}


class _Log:
    """Where rows and states of a run go."""

    def __init__(
        self,
        config: PerceptionRunConfig,
        run: RunDirectory,
        training: Training,
        progress: Callable[[dict[str, Any]], None],
    ) -> None:
        self.run, self.num_epochs, self.progress = run, training.num_epochs, progress
        self.last_epoch = epochs_done = training.epochs_done
        self._method = config.training.method
        self._warns_from: float = _EARLY_SHARE * training.fit.num_epochs
        self._started = time.perf_counter()
        self.board = TensorBoard(
            run.path / "tensorboard", first_step=epochs_done + 1 if epochs_done else 0
        )
        if not epochs_done:
            self.board.begin(to_dict(config), to_yaml(config), "validation/accuracy")

    def row(self, row: dict[str, Any]) -> None:
        self.last_epoch = row["epoch"]
        row = {**row, "wall_s": time.perf_counter() - self._started}
        self.run.log(row)
        self.board.log(row, row["epoch"])
        self.progress({**row, "num_epochs": self.num_epochs})
        if row.get("is_collapsed") and row["epoch"] > self._warns_from:
            self._warns_from = math.inf  # said once
            print(
                f"warning: from epoch {row['epoch']} on nearly all holes are called one thing "
                f"(collapse); {_AGAINST_COLLAPSE[self._method]}",
                file=sys.stderr,
                flush=True,
            )

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        stream = io.BytesIO()  # torch tells a full disk as a bug of its own
        torch.save(state, stream)

        def write(folder: Path) -> None:
            (folder / "state.pt").write_bytes(stream.getbuffer())

        self.run.save_checkpoint(epoch, write)

    def keep(self, epoch: int, saved: Path) -> None:
        """A state that a worker saved; gone already where two newer ones follow."""

        def copy(folder: Path) -> None:
            shutil.copyfile(saved / "state.pt", folder / "state.pt")

        with contextlib.suppress(FileNotFoundError):
            self.run.save_checkpoint(epoch, copy)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``_Log.save`` wrote; raises ValueError where it is damaged."""
    try:
        return torch.load(checkpoint / "state.pt", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): remove that folder and resume again, from the "
            "checkpoint before it"
        ) from error


def _print_row(row: dict[str, Any]) -> None:
    """A line where there is something to say."""
    parts = [f"epoch {row['epoch']:>4} of {row['num_epochs']}", row["fit"]]
    for name in ("validation/accuracy", "fold/accuracy", "train/accepted_share"):
        if name in row:
            parts.append(f"{name} {row[name]:.3f}")
    if any("/accuracy" in part for part in parts):
        print("  ".join(parts), file=sys.stderr, flush=True)


def _finish(
    config: PerceptionRunConfig, run: RunDirectory, training: Training, board: TensorBoard
) -> dict[str, Any]:
    """Model, figures and summary of finished fits."""
    split = training.split
    model, logit = model_of(training)
    run.write_artefact("model", model.save)
    judged, predicted = judge(training, model, logit)
    summary = {
        "num_epochs_of_all_fits": training.num_epochs,
        "num_labelled": len(split.labelled),
        "num_unlabelled": len(split.unlabelled),
        "num_validation": len(split.validation),
        "num_known_in_validation_squares": len(split.known),
        "temperature": model.temperature,
        "is_collapsed": bool(_last(run, "is_collapsed")),
        **{
            what: {name: or_none(value) for name, value in figures.items()}
            for what, figures in judged.items()
        },
    }
    _draw(config, run, board, training, predicted)
    run.write_summary(summary)
    return summary


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


def _last(run: RunDirectory, name: str) -> Any:
    """The last value of a column of the metrics that the main fit has."""
    rows = run.metrics()
    if name not in rows:
        return None
    found = rows.loc[rows["fit"] == "main", name].dropna()
    return found.iloc[-1] if len(found) else None


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


def _draw(
    config: PerceptionRunConfig,
    run: RunDirectory,
    board: TensorBoard,
    training: Training,
    predicted: Prediction,
) -> None:
    """Reliability, confusion and mistakes: in ``figures/`` and in TensorBoard."""
    from PIL import Image

    from ssl2rl_ray.perception.figures import draw_confusion, draw_mistakes, draw_reliability

    table, rows = training.sample.table, training.split.validation
    p, is_low = predicted.p_low_ctf[rows], truth_of(config, table)[rows] == 1
    figures = {
        "reliability": draw_reliability(is_low, p),
        "confusion": draw_confusion(is_low, p),
        "mistakes": draw_mistakes(
            training.sample.images[rows],
            is_low,
            p,
            table.hole_name[rows],
            ctf_max_resolution_A=table.ctf_max_resolution_A[rows],
        ),
    }
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for name, image in figures.items():
        board.image(name, image, training.num_epochs)
        Image.fromarray(image).save(folder / f"{name}.png")
