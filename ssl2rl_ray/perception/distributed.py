"""One function on several workers of Ray Train (V2, Ray 2.60), and what they report, as it comes.

How rows travel: rank 0 hands them to ``ray.train.report``, a callback in Train's controller (which
runs on the driver's node) appends them to a file, and the driver follows that file. A report waits
for the controller's next look, so rows are reported in bundles, when a state is due as well.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SETTINGS = {  # read by driver and controller; Train hands them on to its workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # default 2: each report, and the end, waits for it
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
}
_MAX_FAILURES = 2
"""Restarts of the workers, from the last state, after one of them died."""
# What the same input would bring again: told at once, not tried again.
_FATAL = (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, OSError)
_PASSING = (ConnectionError, TimeoutError)  # of the OSErrors: another worker died

Report = Callable[[dict[str, Any] | None, dict[str, Any] | None], None]
"""``report(content, state)``: by every worker equally often; rank 0's count, None elsewhere."""


def run_workers(
    loop: Callable[[dict[str, Any]], None],
    task: dict[str, Any],
    *,
    folder: Path,
    num_workers: int,
    num_cpus: int,
    is_on_gpu: bool,
    on_report: Callable[[dict[str, Any], Path | None], None],
    is_stopping: Callable[[], bool],
) -> None:
    """Runs ``loop(task)`` on every worker of a group and waits for it.

    Args:
        loop: calls ``report`` of this module, and ends early where ``task["stop"]`` exists.
        task: for the loop; ``stop`` (a path in the folder) is added. Large values: ``ray.put``.
        folder: that every node sees; what Train writes there is gone at the end.
        num_workers: of the group.
        num_cpus: of each worker.
        is_on_gpu: one GPU a worker.
        on_report: told the content of each report and the folder of its state, in this thread.
        is_stopping: asked now and then; once True, the workers are told to stop.

    Raises:
        ValueError: the cluster has no room for the group.
        RuntimeError: a worker died more often than it is started again.
        Exception: what a worker raised, where trying again would not help.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from ray.train import (
        CheckpointConfig,
        ControllerError,
        FailureConfig,
        LoggingConfig,
        RunConfig,
        ScalingConfig,
        WorkerGroupError,
    )
    from ray.train.torch import TorchTrainer

    check_room(num_workers, num_cpus, is_on_gpu)
    name = f"train-{uuid.uuid4().hex[:8]}"  # Train goes on silently with a name used before
    scratch = folder / name
    scratch.mkdir()
    rows, stop = scratch / "rows.jsonl", scratch / "stop"
    trainer = TorchTrainer(
        loop,
        train_loop_config={**task, "stop": str(stop)},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=is_on_gpu,
            resources_per_worker={"CPU": num_cpus, **({"GPU": 1} if is_on_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            # a controller that cannot place its workers would try for ever
            failure_config=FailureConfig(max_failures=_MAX_FAILURES, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[_callback(str(rows))],
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(num_cpus)}},
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    # In a thread: on the main one it would leave a handler of SIGINT behind.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    try:
        with _quiet():
            thread.start()
            num_read = 0
            while True:
                thread.join(0.2)
                is_over = not thread.is_alive()  # before the reading: nothing comes after it
                if is_stopping():
                    stop.touch()
                lines = rows.read_bytes().split(b"\n")[:-1] if rows.exists() else []
                for line in lines[num_read:]:
                    found = json.loads(line)
                    state = found["state"] and Path(found["state"])
                    on_report(found["content"], state)
                num_read = len(lines)
                if is_over:
                    break
    finally:
        if thread.is_alive():  # an error on this side: the workers end too, on a shared cluster
            stop.touch()
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    if not errors:
        return
    error = errors[0]
    if isinstance(error, ControllerError):
        raise error.controller_failure from None
    if isinstance(error, WorkerGroupError):
        rank, cause = sorted(error.worker_failures.items())[0]
        reason = (str(cause).splitlines() or [""])[0]
        raise RuntimeError(
            f"worker {rank} of {num_workers} failed {_MAX_FAILURES + 1} times, last by "
            f"{type(cause).__name__}: {reason}"
        ) from error
    raise error


def check_room(num_workers: int, num_cpus: int, is_on_gpu: bool) -> None:
    """Raises ValueError where the cluster has no room for the group: Train would wait for it."""
    import ray

    needed = {"CPU": num_workers * num_cpus, "GPU": num_workers * is_on_gpu}
    for what, found in (("has", ray.cluster_resources()), ("has free", ray.available_resources())):
        for name, number in needed.items():
            if found.get(name, 0) < number:
                way = "set compute.device cpu" if name == "GPU" else "lower num_torch_threads"
                raise ValueError(
                    f"compute.num_workers: {num_workers} workers need {number} {name}, the Ray "
                    f"cluster {what} {found.get(name, 0):g}; lower num_workers, {way}, or wait "
                    "for other jobs"
                )


def report(content: dict[str, Any] | None, state: dict[str, Any] | None) -> None:
    """In a worker: hands rows and a state (for ``torch.save``) on; every rank calls it."""
    from ray import train
    from ray.train import Checkpoint

    from ssl2rl_ray.checkpoint import write_state

    if state is None:
        train.report({"content": content})
        return
    with tempfile.TemporaryDirectory() as folder:
        write_state(state, Path(folder))
        train.report({"content": content}, checkpoint=Checkpoint.from_directory(folder))


def last_state() -> dict[str, Any] | None:
    """In a worker: the state last reported, where the group was started again; else None."""
    import torch
    from ray import train

    if (checkpoint := train.get_checkpoint()) is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)


def _callback(path: str) -> Any:
    """Runs in Train's controller."""
    from ray.train import UserCallback

    class Callback(UserCallback):
        def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
            found = next((m["content"] for m in metrics if m["content"] is not None), None)
            line = {"content": found, "state": checkpoint and checkpoint.path}
            with Path(path).open("a") as stream:
                stream.write(json.dumps(line) + "\n")

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for _, error in sorted(worker_exceptions.items()):
                if isinstance(error, _FATAL) and not isinstance(error, _PASSING):
                    raise error  # an error of the controller is not tried again

    return Callback()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data's context, which Train makes, warns of names of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(ray|copy)\b")
        yield
