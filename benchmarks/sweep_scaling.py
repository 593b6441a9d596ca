"""Does a second slot double a sweep? Env steps/s of navigation trials on 2 against 1 slots.

    python benchmarks/sweep_scaling.py [--trials 4] [--steps 40000] [--repeats 1]

Sweeps of the same trials take turns, each on a Ray of its own. What counts is the time from the
first trial's beginning to the last one's end: the imports of a slot's first trial are in it, the
start of Ray is not. Needs as many idle CPUs as slots and a few more. Bar: at least 1.8.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from ssl2rl_ray.sweep import load_sweep, run_sweep

BASE = {
    "kind": "navigation",
    "env": {"preset": "paper", "budget_min": 480, "feature_set": "rates", "action_level": "patch"},
    "sessions": {"synthetic": 1, "unlabelled": 1, "preset": "aldolase", "pool_size": None},
    "algorithm": {"discount_per_min": 0.97, "is_residual": False, "is_shaped": False},
    "training": {
        "num_envs_per_runner": 64,
        "num_validation_sessions": 16,
        "num_torch_threads": 1,
    },
}


def steps_per_s(num_trials: int, num_steps: int, slots: int, scratch: Path) -> float:
    """Of all trials together."""
    training = {"num_env_steps": num_steps, "evaluation_interval_steps": num_steps}
    base = {**BASE, "training": {**BASE["training"], **training}}
    path = scratch / "sweep.yaml"
    space = {"seed": list(range(num_trials))}
    tune = {"num_cpus": 1, "max_concurrent": slots}
    path.write_text(yaml.safe_dump({"base": base, "space": space, "tune": tune}))
    times: list[float] = []

    def on_event(event: Any) -> None:
        times.append(time.perf_counter())

    load = os.getloadavg()[0]
    run_sweep(load_sweep(path), scratch / f"out-{time.time_ns()}", on_event=on_event)
    speed = num_trials * num_steps / (times[-1] - times[0])
    print(
        f"{slots} slot{'s' * (slots != 1)}: {num_trials} trials of {num_steps:,} env steps in "
        f"{times[-1] - times[0]:.1f} s, {speed:,.0f} env steps/s; load average before {load:.1f}",
        flush=True,
    )
    return speed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs")
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(args.repeats):
            for slots in (1, 2) if repeat % 2 == 0 else (2, 1):
                speed = steps_per_s(args.trials, args.steps, slots, Path(scratch))
                speeds[slots].append(speed)
    ratio = sum(speeds[2]) / sum(speeds[1])
    print(f"2 slots / 1 slot: {ratio:.2f} (bar: at least 1.8)")


if __name__ == "__main__":
    main()
