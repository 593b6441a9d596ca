"""A thousand trials: seconds of ``--dry-run``, and the driver's memory for as many no-ops.

    python benchmarks/sweep_plan.py [--trials 1000]

The dry run is the command itself, started from nothing. The no-ops pass through the whole of
``run_sweep``, on a Ray of its own: only what a trial does is left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ssl2rl_ray.sweep import load_sweep, run_sweep, trials

SWEEP = Path(__file__).parents[1] / "tune_configs" / "smoke.yaml"


def rss_mb() -> float:
    """Of this process, at its highest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def nothing(point: dict[str, str], task: dict[str, Any]) -> dict[str, str]:
    return {"status": "finished"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    number = parser.parse_args().trials
    seeds = f"space.seed={list(range(number))}"
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ssl2rl_ray", "sweep", str(SWEEP), "--set", seeds]
        started = time.perf_counter()
        said = subprocess.run(
            [*command, "--out", f"{folder}/none", "--dry-run"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        wall_s = time.perf_counter() - started
        assert len(said.splitlines()) == number + 2
        cpu_s = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"dry run of {number} trials: {wall_s:.1f} s wall, "
            f"{cpu_s.ru_utime + cpu_s.ru_stime:.1f} s CPU (bar: 5 s)"
        )

        sweep = load_sweep(SWEEP, [seeds])
        trials._trial = nothing
        marks: dict[int, tuple[float, float]] = {}
        started = time.perf_counter()

        def on_event(event: Any) -> None:
            if event.status == "finished":
                marks[event.num_finished] = time.perf_counter() - started, rss_mb()

        run_sweep(sweep, f"{folder}/out", on_event=on_event)
        wall_s = time.perf_counter() - started
    assert max(marks) == number, f"{max(marks)} of {number} ended"
    for done in sorted({1, number // 10, number // 2, number}):
        print(f"{done:>6} trials ended: {marks[done][0]:6.1f} s, driver {marks[done][1]:.0f} MB")
    growth_mb = marks[number][1] - marks[number // 10][1]
    per_trial_kb = growth_mb * 1024 / (number - number // 10)
    print(
        f"{number} no-op trials: {wall_s:.1f} s in all, {1000 * wall_s / number:.0f} ms a trial; "
        f"after the first tenth the driver grew by {growth_mb:.0f} MB, "
        f"{per_trial_kb:.0f} kB a trial"
    )


if __name__ == "__main__":
    main()
