"""Train the classifier of a run: config -> fits -> model, figures, files.

``cross_fit.Training`` does the work, in this process or in the workers of Ray Train; here is what
surrounds it. Everything random hangs on ``config.seed``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ssl2rl_ray.checkpoint import read_state, write_state
from ssl2rl_ray.config import PerceptionRunConfig, check
from ssl2rl_ray.data.folder import read_dataset
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.perception.cross_fit import Training, judge, model_of
from ssl2rl_ray.perception.distributed import last_state, report, run_workers
from ssl2rl_ray.perception.model import Prediction, model_folder
from ssl2rl_ray.perception.sample import sample_of, truth_of
from ssl2rl_ray.runs import RunDirectory, on_interrupt
from ssl2rl_ray.schema import to_dict, to_yaml
from ssl2rl_ray.stats import or_none
from ssl2rl_ray.tensorboard import TensorBoard


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


def train_classifier(
    config: PerceptionRunConfig,
    run: RunDirectory,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
    is_drawn: bool = True,
) -> dict[str, Any]:
    """Trains to the end, from the run's latest checkpoint if it has one.

    Args:
        config: what the run was begun with.
        run: open for writing; gets metrics, checkpoints, TensorBoard events and figures, the model
            and the summary.
        progress: told each row of metrics, with ``num_epochs`` of all fits; None prints lines to
            stderr.
        is_drawn: whether figures are made at the end.

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
    state = None if run.latest is None else read_state(run.latest)
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
        return _finish(config, run, training, log.board, is_drawn=is_drawn)


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
    begun.load_state(read_state(log.run.latest))


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


_COLLAPSED_EPOCHS = 10
"""In a row, before it is said: a healthy classifier may begin one-sided."""
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
        self._num_collapsed = 0
        self._started = time.perf_counter()
        self.board = TensorBoard(
            run.path / "tensorboard", first_step=epochs_done + 1 if epochs_done else 0
        )
        self._is_stage = run.is_stage
        if not epochs_done and not self._is_stage:
            self.board.begin(to_dict(config), to_yaml(config))

    def row(self, row: dict[str, Any]) -> None:
        self.last_epoch = row["epoch"]
        row = {**row, "wall_s": time.perf_counter() - self._started}
        self.run.log(row)
        told = {} if self._is_stage else {"criterion/last": row.get("validation/accuracy")}
        self.board.log({**row, **told}, row["epoch"])
        self.progress({**row, "num_epochs": self.num_epochs})
        self._num_collapsed = self._num_collapsed + 1 if row.get("is_collapsed") else 0
        if self._num_collapsed == _COLLAPSED_EPOCHS:
            print(
                f"warning: for {_COLLAPSED_EPOCHS} epochs, now {row['epoch']}, nearly all holes "
                f"are called one thing (collapse); {_AGAINST_COLLAPSE[self._method]}",
                file=sys.stderr,
                flush=True,
            )

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        self.run.save_checkpoint(epoch, functools.partial(write_state, state))

    def keep(self, epoch: int, saved: Path) -> None:
        """A state that a worker saved; gone already where two newer ones follow."""

        def copy(folder: Path) -> None:
            shutil.copyfile(saved / "state.pt", folder / "state.pt")

        with contextlib.suppress(FileNotFoundError):
            self.run.save_checkpoint(epoch, copy)


def _print_row(row: dict[str, Any]) -> None:
    """A line where there is something to say."""
    parts = [f"epoch {row['epoch']:>4} of {row['num_epochs']}", row["fit"]]
    for name in ("validation/accuracy", "fold/accuracy", "train/accepted_share"):
        if name in row:
            parts.append(f"{name} {row[name]:.3f}")
    if any("/accuracy" in part for part in parts):
        print("  ".join(parts), file=sys.stderr, flush=True)


def _finish(
    config: PerceptionRunConfig,
    run: RunDirectory,
    training: Training,
    board: TensorBoard,
    *,
    is_drawn: bool,
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
    if is_drawn:
        _draw(config, run, board, training, predicted)
    run.write_summary(summary)
    return summary


def _last(run: RunDirectory, name: str) -> Any:
    """The last value of a column of the metrics that the main fit has."""
    rows = run.metrics()
    if name not in rows:
        return None
    found = rows.loc[rows["fit"] == "main", name].dropna()
    return found.iloc[-1] if len(found) else None


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
