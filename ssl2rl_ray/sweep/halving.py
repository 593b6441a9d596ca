"""Successive halving: trials tell their curves while they run, and those that are behind end early.

Tune's ASHA decides. Tune itself would end a trial by an exit from within ``tune.report``, in the
middle of whatever the run is doing. So its decision becomes a file, which the trial sees as soon as
its report returns, and the run ends as on Ctrl-C: complete on disk, with the status ``stopped``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ssl2rl_ray.runs import Stop
from ssl2rl_ray.sweep.file import Sweep, metric_of, rungs
from ssl2rl_ray.sweep.folder import trial_status
from ssl2rl_ray.sweep.suggest import learning_rows, told

_STEP, _VALUE = "step", "value"
"""What a report holds; small, for Tune keeps the last one of every trial."""


def _sign(stop: Path, name: str) -> Path:
    """The file that tells a trial to end early."""
    return stop.with_name(f"stop-{name}")


def reporter(sweep: Sweep, stop: Path, name: str, stopping: Stop) -> Callable[[dict], None]:
    """What a trial's run is to tell its rows: reports them, and ends the run where that is said."""
    if sweep.tune.scheduler != "asha":
        return lambda row: None
    from ray import tune

    metric, _ = metric_of(sweep)

    def end() -> None:
        stopping.status = "stopped"
        stopping.set()

    if _sign(stop, name).exists():  # decided upon before a driver was killed
        end()

    def report(row: dict[str, Any]) -> None:
        if stopping.is_set() or (found := told(row, metric)) is None:
            return
        tune.report({_STEP: found.step, _VALUE: found.value})  # returns once it was decided upon
        if _sign(stop, name).exists():
            end()

    return report


def halving(sweep: Sweep, folder: Path, stop: Path) -> Any:
    """The scheduler for Tune, told of all that trials in the folder have shown, as it was then."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    metric, mode = metric_of(sweep)
    first, factor, total = rungs(sweep)
    asha = ASHAScheduler(
        time_attr=_STEP,
        metric=_VALUE,
        mode=mode,
        grace_period=first,
        reduction_factor=factor,
        max_t=max(first, total - 1),  # no rung at the end: who came there is finished
        stop_last_trials=False,
    )

    def decide(name: str, step: float, value: float) -> None:
        trial: Any = SimpleNamespace(trial_id=name)  # ours: the same after a restart
        nobody: Any = None
        said = asha.on_trial_result(nobody, trial, {_STEP: step, _VALUE: value})
        if said == ASHAScheduler.STOP and step < total:  # a last row may be the first past a rung
            _sign(stop, name).touch()

    begun = [name for name in sweep.trials if trial_status(folder / name) != "missing"]
    for name in sweep.trials:
        asha.on_trial_add(None, SimpleNamespace(trial_id=name))  # type: ignore[arg-type]
    rows = [(row, name) for name in begun for row in learning_rows(folder / name, metric)]
    for row, name in sorted(rows, key=lambda found: found[0].time):
        decide(name, row.step, row.value)

    class Scheduler(FIFOScheduler):
        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves it, and nobody reads it

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if _VALUE in result:
                decide(trial.config["trial"], result[_STEP], result[_VALUE])
            return self.CONTINUE

    return Scheduler()
