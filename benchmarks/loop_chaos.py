"""Runs of the loop killed at random moments and resumed: do they end with the same tables?

    python benchmarks/loop_chaos.py --kills 10

One run of a small config (every stage: FixMatch with folds, DQN, roll-outs, fine-tuning) is left
alone and timed. Then others of the same config are killed (SIGKILL, the whole process group) after
a random share of that time, once or several times each, and resumed by ``ssl2rl run --resume``
until they are done. Their summaries, times left out, must be equal; prints how many are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "loop.methods=[iterative-fixmatch, ssl2rl-480, posterior]",
    "loop.num_rounds=1",
    "loop.pretraining_steps=40",
    "loop.finetuning_steps=20",
    "loop.num_starts=4",
    "loop.num_rollouts=3",
    "rl.num_env_steps=1000",
    "rl.evaluation_interval_steps=500",
    "rl.num_validation_sessions=2",
    "rl.num_torch_threads=1",
    "compute.num_torch_threads=1",
)


def command(folder: Path, *, is_resumed: bool) -> list[str]:
    words = [sys.executable, "-m", "ssl2rl_ray", "run", str(ROOT / "tune_configs/ssl2rl_demo.yaml")]
    for setting in SETTINGS:
        words += ["--set", setting]
    return [*words, "--run-dir", str(folder), *(["--resume"] if is_resumed else [])]


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Begins a run, or goes on with what was killed; what was killed while made is made anew."""
    is_begun = (folder / "manifest.json").exists()
    if not is_begun:
        shutil.rmtree(folder, ignore_errors=True)
    return subprocess.Popen(
        command(folder, is_resumed=is_begun),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a run ended with {process.returncode}:\n{errors.decode()[-3000:]}")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k != "wall_s"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def summary_of(folder: Path) -> Any:
    return without_times(json.loads((folder / "summary.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description="see the top of this file")
    parser.add_argument("--kills", type=int, default=10, help="runs that are killed (%(default)s)")
    parser.add_argument("--most", type=int, default=2, help="kills of one run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        finish(start(Path(scratch) / "alone"))
        seconds = time.perf_counter() - began
        expected = summary_of(Path(scratch) / "alone")
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        num_equal = num_kills = 0
        for i in range(args.kills):
            folder = Path(scratch) / f"killed-{i}"
            moments = []
            for _ in range(int(rng.integers(1, args.most + 1))):
                process = start(folder)
                moments.append(float(rng.uniform(2, seconds)))
                try:
                    process.wait(moments[-1])
                    break  # it was faster than the first one
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                    num_kills += 1
            finish(start(folder))
            is_equal = summary_of(folder) == expected
            num_equal += is_equal
            when = ", ".join(f"{moment:.0f} s" for moment in moments)
            print(f"killed after {when}: {'equal' if is_equal else 'DIFFERENT'}", flush=True)
            shutil.rmtree(folder)
    print(f"{num_equal} of {args.kills} runs end equal, {num_kills} kills")


if __name__ == "__main__":
    main()
