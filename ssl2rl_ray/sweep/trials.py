"""The trials of a sweep, side by side: Tune hands out the places, run directories say what is left.

Tune's own state, saved every ten seconds, is thrown away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl2rl_ray.launch import run_config
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.runs import Stop, on_interrupt, stopped_by
from ssl2rl_ray.sweep.file import Sweep
from ssl2rl_ray.sweep.folder import DONE, check_folder, held, trial_status, unfinished
from ssl2rl_ray.sweep.halving import halving, reporter
from ssl2rl_ray.sweep.plan import check_disk, estimate
from ssl2rl_ray.sweep.room import cluster_room, find_room, need_of, num_concurrent, own_cpus
from ssl2rl_ray.sweep.suggest import config_of

_WAIT_FOR_ORPHANS_S = 60.0
"""A killed driver's trials end within seconds of it, and hold their run directories until then."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a trial."""

    trial: str
    status: str
    """``running``, ``finished``, ``stopped`` (by the scheduler), ``failed`` or ``interrupted``."""
    reason: str | None
    """Why it failed."""
    num_finished: int
    """Of all trials, those finished or stopped before this call included."""
    num_trials: int


def run_sweep(
    sweep: Sweep,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    argv: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
) -> dict[str, Any]:
    """Runs every trial that is not finished; a failing one does not stop the others.

    Args:
        sweep: from ``load_sweep``.
        out: folder of the sweep, that every node sees; each trial is a run directory in it.
        resume: the folder holds this sweep already; finished trials are left alone, begun ones go
            on from their last checkpoint, failed ones are tried again.
        argv: the command line, for the manifests.
        on_event: told what happens to the trials.

    Returns:
        ``num_trials``, ``num_finished``, ``num_stopped`` (by the scheduler), ``num_run`` (by this
        call) and ``trials``: of each its ``status``, ``run`` (folder) and, where it failed,
        ``reason``.

    Raises:
        RunError: the folder holds something else, another sweep (each difference is named), or
            another process is at it.
        ValueError: a trial does not fit on the cluster, or what the trials leave not on the disk;
            then no folder is made.
        KeyboardInterrupt: after Ctrl-C, once the trials have saved their states.
    """
    folder = Path(out).resolve()
    check_folder(sweep, folder, resume)
    reasons: dict[str, dict[str, Any]] = {}
    todo = was_todo = unfinished(sweep, folder)
    if todo:
        found = {name: trial_status(folder / name) for name in sweep.trials}
        check_disk(estimate(sweep, folder, found, 1), folder)
        if not os.environ.get("RAY_ADDRESS"):
            num_concurrent(sweep, find_room())  # before Ray is started
        with local_ray(own_cpus()):
            num_trials = num_concurrent(sweep, cluster_room())
            with held(sweep, folder):  # only now the folder is made
                todo = unfinished(sweep, folder)
                told = on_event or (lambda event: None)
                if todo:  # a trial of a killed driver may have come to its end in the meantime
                    reasons = _run_trials(sweep, folder, todo, num_trials, argv, told)
    if was_todo or not (folder / "tensorboard").is_dir():  # killed between the two, perhaps
        _write_means(folder)
    found = {name: trial_status(folder / name) for name in sweep.trials}
    return {
        "out": str(folder),
        "num_trials": len(found),
        "num_finished": sum(status == "finished" for status in found.values()),
        "num_stopped": sum(status == "stopped" for status in found.values()),
        "num_run": len(todo),
        "trials": {
            name: {"run": str(folder / name), "status": status}
            | (reasons.get(name, {}) if status not in DONE else {})
            for name, status in found.items()
        },
    }


def _write_means(folder: Path) -> None:
    """TensorBoard runs with the mean of each group; the sweep is complete without them."""
    from ssl2rl_ray.aggregate import write_aggregate

    try:
        write_aggregate(folder)
    except (ValueError, OSError) as error:
        print(f"warning: no means over seeds in TensorBoard: {error}", file=sys.stderr)


_SETTINGS = {  # read by Tune on the driver, and handed on to the trials
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table whatever the verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # nobody reads it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last word of a trial is its status
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
}


def _run_trials(
    sweep: Sweep,
    folder: Path,
    todo: Sequence[str],
    num_concurrent: int,
    argv: Sequence[str],
    on_event: Callable[[Event], None],
) -> dict[str, dict[str, Any]]:
    """Takes the trials to their ends; returns of each that failed the ``reason``."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    with _quiet():
        from ray import tune

    own = folder / ".tune"
    shutil.rmtree(own, ignore_errors=True)  # of a killed driver
    own.mkdir()
    stop = own / "stop"
    messages: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
    hall = _Hall(messages.put)
    task = {
        "sweep": dataclasses.replace(sweep, trials={name: sweep.trials[name] for name in todo})
        if sweep.tune.search != "optuna"
        else sweep,
        "folder": folder,
        "stop": stop,
        "cwd": Path.cwd(),
        "argv": list(argv),
    }
    needs = {name: need_of(sweep.trials[name], sweep.tune) for name in todo}

    def places(point: dict[str, str]) -> Any:
        need = needs[point["trial"]]
        own: dict[str, float] = {"CPU": need.num_cpus}
        own |= {"GPU": need.num_gpus} if need.num_gpus else {}
        return tune.PlacementGroupFactory([own, *[{"CPU": 1.0}] * need.num_runners])

    trainable = tune.with_resources(tune.with_parameters(_trial, task=task), places)
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(todo))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=num_concurrent,
            scheduler=halving(sweep, folder, stop) if sweep.tune.scheduler == "asha" else None,
            reuse_actors=True,  # the next trial need not start Python and torch again
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="state",
            storage_path=str(own),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=sweep.tune.max_failures),
            callbacks=[hall.callback()],
            stop=hall.stopper(),
        ),
    )
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:
            errors.append(error)

    ended: dict[str, dict[str, Any]] = {}
    num_before = len(sweep.trials) - len(todo)

    def tell() -> None:
        while not messages.empty():
            name, message = messages.get()
            if message["status"] != "running":
                ended[name] = message
            num_done = sum(m["status"] in DONE for m in ended.values())
            on_event(
                Event(
                    trial=name,
                    status=message["status"],
                    reason=message.get("reason"),
                    num_finished=num_before + num_done,
                    num_trials=len(sweep.trials),
                )
            )

    # In a thread: on the main one Tune sets a handler of SIGINT that ends trials at once.
    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    with _quiet(), on_interrupt() as interrupted:
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if interrupted.is_set() and not stop.exists():
                hall.is_closing = True
                stop.touch()
            tell()
        tell()
    shutil.rmtree(own, ignore_errors=True)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if errors:
        raise errors[0]
    return {name: m for name, m in ended.items() if m["status"] == "failed"}


class _Hall:
    """Who comes and goes, seen from Tune's thread: messages to the driver, and when to close."""

    def __init__(self, tell: Callable[[tuple[str, dict[str, Any]]], None]) -> None:
        self._tell = tell
        self._inside: set[str] = set()
        self.is_closing = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks, and nobody reads them."""
        return {}

    def came(self, name: str) -> None:
        if not self.is_closing:  # who comes now leaves at once
            self._inside.add(name)
            self._tell((name, {"status": "running"}))

    def left(self, name: str, message: dict[str, Any]) -> None:
        # Who never came in is told, too, where Tune could not begin it.
        if name in self._inside or message["status"] == "failed":
            self._inside.discard(name)
            self._tell((name, message))

    def is_closed(self) -> bool:
        """Asked by Tune before it lets the next ones in."""
        return self.is_closing and not self._inside

    def callback(self) -> Any:
        from ray import tune

        hall = self

        class Callback(tune.Callback):
            def __getstate__(self) -> dict[str, Any]:
                return {}

            def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                hall.came(trial.config["trial"])

            def on_trial_result(
                self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
            ) -> None:
                if "status" in result:
                    message = {k: result[k] for k in ("status", "reason", "where") if k in result}
                    hall.left(trial.config["trial"], message)

            def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                reason = (
                    "its process died (killed, or out of memory) or could not be begun; a resumed "
                    "sweep goes on from its last checkpoint"
                )
                hall.left(trial.config["trial"], {"status": "failed", "reason": reason})

        return Callback()

    def stopper(self) -> Any:
        from ray import tune

        hall = self

        class Stopper(tune.Stopper):
            def __getstate__(self) -> dict[str, Any]:
                return {}

            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return hall.is_closed()

        return Stopper()


def _trial(point: dict[str, str], task: dict[str, Any]) -> dict[str, Any]:
    """What Tune calls: one run, in a thread of the trial's process.

    Errors of the run are returned, not raised: Tune starts again only what died.
    """
    name, sweep, stop = point["trial"], task["sweep"], Path(task["stop"])
    if Path(task["cwd"]).is_dir():
        os.chdir(task["cwd"])  # relative paths of the configs; a worker's own is the cluster's
    folder, stopping, is_over = task["folder"] / name, Stop(), threading.Event()

    def look() -> None:
        while not is_over.wait(0.2):
            if stop.exists():
                stopping.set()
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        if stop.exists():
            return {"status": "interrupted"}
        if (status := _wait_for_orphan(folder)) in DONE:  # by it, or before this process took over
            return {"status": status}
        with stopped_by(stopping):
            run_config(
                config_of(sweep, task["folder"], name),
                folder,
                resume=status != "missing",
                argv=task["argv"],
                progress=reporter(sweep, stop, name, stopping),
            )
    except KeyboardInterrupt:
        return {"status": stopping.status}
    except Exception as error:
        is_told = isinstance(error, ValueError | OSError)
        reason = str(error) if is_told else f"{type(error).__name__}: {error}"
        return {"status": "failed", "reason": reason, "where": traceback.format_exc()}
    finally:
        is_over.set()
    return {"status": "finished"}


def _wait_for_orphan(folder: Path) -> str:
    """The status of the run, once a trial of a killed driver has let go of it."""
    deadline = time.monotonic() + _WAIT_FOR_ORPHANS_S
    while (status := trial_status(folder)) == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    return status


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's libraries warn of names of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(ray|copy)\b")
        yield
