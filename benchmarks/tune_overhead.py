"""What Tune costs: wall of a sweep of short trials against the same trials in a plain process pool.

    python benchmarks/tune_overhead.py [--trials 24] [--slots 2] [--repeats 1]

Both sides are processes of their own, from the first import to the last trial's end, with as many
slots and the same configs: small classifiers of a few seconds each, which need no Ray themselves,
so that the pool has none to start. They take turns. The fixed start (Ray, then the first trial) is
part of the ratio, and printed apart. Bar: at most 1.25.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

BASE = {
    "kind": "perception",
    "data": {"preset": "demo", "labelled_fraction": 0.5},
    "classifier": {"network": "cnn"},
    "training": {
        "method": "supervised",
        "num_epochs": 300,
        "num_folds": 0,
        "evaluation_interval_epochs": 50,
    },
}


def run_one(config: Any, folder: str) -> None:
    """What a trial does."""
    from ssl2rl_ray.launch import run_config

    run_config(config, folder, progress=lambda row: None)


def pool_side(sweep: Path, out: Path, slots: int) -> dict[str, float]:
    """All trials by ``concurrent.futures``."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from ssl2rl_ray.sweep import load_sweep

    with ProcessPoolExecutor(slots, multiprocessing.get_context("spawn")) as pool:
        trials = load_sweep(sweep).trials
        for done in [pool.submit(run_one, trials[name], str(out / name)) for name in trials]:
            done.result()
    return {}


def tune_side(sweep: Path, out: Path, slots: int) -> dict[str, float]:
    """All trials by ``run_sweep``; when the first one began."""
    from ssl2rl_ray.sweep import load_sweep, run_sweep

    started, begun = time.perf_counter(), []

    def on_event(event: Any) -> None:
        begun.append(time.perf_counter() - started)

    run_sweep(load_sweep(sweep, [f"tune.max_concurrent={slots}"]), out, on_event=on_event)
    return {"start_s": begun[0]}


SIDES = {"pool": pool_side, "tune": tune_side}


def trial_seconds(out: Path) -> list[float]:
    """Of each trial, by its own clock."""
    from ssl2rl_ray.sweep.plan import _minutes

    return [60 * _minutes(path.parent) for path in out.glob("*/manifest.json")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)  # of a process of our own
    args = parser.parse_args()
    if args.side:
        side, sweep, out = args.side
        print(json.dumps(SIDES[side](Path(sweep), Path(out), args.slots)))
        return
    print(f"{args.trials} trials on {args.slots} slots; {os.cpu_count()} CPUs")
    walls: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Path(scratch) / "sweep.yaml"
        space = {"seed": list(range(args.trials))}
        sweep.write_text(yaml.safe_dump({"base": BASE, "space": space, "tune": {"num_cpus": 1}}))
        for repeat in range(args.repeats):
            for side in list(SIDES)[:: -1 if repeat % 2 else 1]:
                out = Path(scratch) / f"{side}-{repeat}"
                load, started = os.getloadavg()[0], time.perf_counter()
                command = [sys.executable, __file__, "--slots", str(args.slots)]
                said = subprocess.run(
                    [*command, "--side", side, str(sweep), str(out)],
                    check=True,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                ).stdout
                wall_s = time.perf_counter() - started
                walls[side].append(wall_s)
                found = json.loads(said.splitlines()[-1])
                trials = trial_seconds(out)
                assert len(trials) == args.trials
                busy = sum(trials) / args.slots
                start = f", {found['start_s']:.1f} s until the first trial" if found else ""
                print(
                    f"{side}: {wall_s:6.1f} s{start}; trials {min(trials):.1f} to "
                    f"{max(trials):.1f} s by their own clocks, {busy:.1f} s of each slot; "
                    f"load average before {load:.1f}",
                    flush=True,
                )
    ratio = sum(walls["tune"]) / sum(walls["pool"])
    print(f"tune / pool: {ratio:.2f} (bar: at most 1.25)")


if __name__ == "__main__":
    main()
