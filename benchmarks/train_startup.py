"""What Ray Train costs before and after the training itself: wall and CPU seconds, and where.

Each run is a process of its own, with all its imports, and trains nothing or next to nothing:

  default     TorchTrainer as it comes, a loop of three reports
  ours        the same loop by ``perception.distributed.run_workers``, as ``ssl2rl run`` does
  in-process  ``ssl2rl run`` of a classifier: two epochs, without Ray
  workers     the same with one worker

Runs take turns; figures are medians. Parts: imports of this process, ``ray.init``, ``fit`` until a
worker runs its first line, the loop, its last line until ``fit`` returns, shutdown. CPU seconds are
of all processes of a run. Bars: none but as little as Ray's settings allow.
Usage: python benchmarks/train_startup.py [--repeats 3] [--sides default ours] [--workers 1]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("default", "ours", "in-process", "workers")


# ---- one run, in a process of its own ------------------------------------------------------------


def loop(task: dict[str, Any]) -> None:
    """Three epochs of nothing; the file says when the first began and the last ended."""
    begun = time.time()
    from ray import train

    for epoch in range(3):
        train.report({"content": {"epoch": epoch}})
    if train.get_context().get_world_rank() == 0:
        Path(task["times"]).write_text(json.dumps([begun, time.time()]))


def trivial(side: str, num_workers: int, folder: Path, begun: float) -> dict[str, float]:
    """Seconds of each part of a run of ``loop``."""
    times = folder / "times.json"
    if side == "default":
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        imported = time.time()
        ray.init(num_cpus=max(2, num_workers), include_dashboard=False, log_to_driver=False)
        ready = time.time()
        TorchTrainer(
            loop,
            train_loop_config={"times": str(times)},
            scaling_config=ScalingConfig(num_workers=num_workers),
            run_config=RunConfig(name="trivial", storage_path=str(folder)),
        ).fit()
        done = time.time()
        ray.shutdown()
    else:
        from ssl2rl_ray.local_ray import local_ray
        from ssl2rl_ray.perception import trainer

        imported = time.time()
        with local_ray(num_workers):
            ready = time.time()
            trainer.run_workers(
                loop,
                {"times": str(times)},
                folder=folder,
                num_workers=num_workers,
                num_cpus=1,
                is_on_gpu=False,
                on_report=lambda content, saved: None,
                is_stopping=lambda: False,
            )
            done = time.time()
    first, last = json.loads(times.read_text())
    return {
        "imports": imported - begun,
        "ray.init": ready - imported,
        "until the loop": first - ready,
        "loop": last - first,
        "after it": done - last,
        "shutdown": time.time() - done,
    }


def classifier(side: str, num_workers: int, folder: Path, begun: float) -> dict[str, float]:
    """Seconds of each part of a run of two epochs."""
    from ssl2rl_ray.config import PerceptionRunConfig, from_dict
    from ssl2rl_ray.perception.trainer import train_classifier
    from ssl2rl_ray.runs import RunDirectory

    imported = time.time()
    config = from_dict(
        {
            "kind": "perception",
            "data": {"preset": "demo"},
            "classifier": {"network": "cnn"},
            "training": {"method": "supervised", "num_epochs": 2, "num_folds": 0},
            "compute": {
                "num_workers": num_workers if side == "workers" else 0,
                "num_torch_threads": 1,
                "device": "cpu",
            },
        }
    )
    assert isinstance(config, PerceptionRunConfig)
    told: list[float] = []
    with RunDirectory.create(folder / "run", config) as run:
        train_classifier(config, run, progress=lambda row: told.append(time.time()))
    done = time.time()
    return {
        "imports": imported - begun,
        "until the first epoch is told": told[0] - imported,
        "until the last is told": told[-1] - told[0],
        "after it": done - told[-1],
    }


# ---- all runs ------------------------------------------------------------------------------------


def measure(side: str, num_workers: int) -> dict[str, float]:
    """Parts, wall and CPU seconds of one run."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, __file__, "--run", side, folder, "--workers", str(num_workers)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        begun, cpu_s = time.time(), dict[int, float]()
        while process.poll() is None:
            cpu_s |= cpu_of_tree(process.pid)
            time.sleep(0.1)
        wall_s = time.time() - begun
        parts = Path(folder) / "parts.json"
        if not parts.exists():
            assert process.stderr is not None
            raise SystemExit(f"{side} failed: {process.stderr.read()[-2000:]}")
        return {**json.loads(parts.read_text()), "wall": wall_s, "CPU": sum(cpu_s.values())}


def cpu_of_tree(root: int) -> dict[int, float]:
    """CPU seconds so far of a process and of those that it started, by id (Linux)."""
    parent: dict[int, int] = {}
    cpu_s: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parent[pid] = int(fields[1])
            cpu_s[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    tree = {root}
    while more := {pid for pid in parent if parent[pid] in tree} - tree:
        tree |= more
    return {pid: cpu_s[pid] for pid in tree & cpu_s.keys()}


def main() -> None:
    begun = time.time()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--run", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        side, folder = args.run[0], Path(args.run[1])
        run = trivial if side in ("default", "ours") else classifier
        parts = run(side, args.workers, folder, begun)
        (folder / "parts.json").write_text(json.dumps(parts))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
    for _ in range(args.repeats):
        for side, runs in found.items():
            runs.append(measure(side, args.workers))
    for side, runs in found.items():
        median = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
        wall_s, cpu_s = median.pop("wall"), median.pop("CPU")
        print(
            f"{side:<10} {wall_s:5.1f} s wall, {cpu_s:5.1f} s CPU: "
            + ", ".join(f"{name} {value:.1f}" for name, value in median.items())
        )


if __name__ == "__main__":
    main()
