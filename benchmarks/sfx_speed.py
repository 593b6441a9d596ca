"""How fast is the embedded pipeline?

Run: ``python benchmarks/sfx_speed.py [--frames 200] [--scaling 1000]`` on a machine with free cores
(about a minute and 0.5 GB of disk in a temporary folder; with ``--scaling 0`` the last part is left
out). Frames of 1 Mpx of preset ``lysozyme`` are simulated once. Times are CPU seconds of one core
(median over frames for the peak finder), except for the scaling, which is wall-clock.

Bars: peak finder at most 10 ms a frame (CrystFEL: 20 ms); pipeline at least 80 frames/s per core at
the nominal parameters and 20 frames/s in the worst case; 2 cores at least 1.8 times 1.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from envs.crystfel.experiment import Experiment
from envs.crystfel.sfx.formats import read_images
from envs.crystfel.sfx.peaks import find_peaks
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import simulate
from envs.crystfel.types import Parameters

SETTINGS: dict[str, dict[str, float]] = {
    "nominal": {},
    "min_snr 4": {"min_snr": 4.0},
    "min_snr 3": {"min_snr": 3.0},
    "min_snr 3, all pixels": {"min_snr": 3.0, "min_pix_count": 1, "threshold_adu": 0.0},
    "clen +4 %": {"clen_offset_percent": 4.0},
}


def peak_finder(experiment: Experiment, parameters: Parameters, num_frames: int = 50) -> float:
    """Median CPU seconds of a frame that is already in memory."""
    indexer = EmbeddedIndexer(experiment)
    pixels = indexer.pixels(parameters, experiment.frames[0])
    seconds = []
    for image in list(read_images(experiment.geometry, experiment.frames[:num_frames])):
        started = time.process_time()
        find_peaks(image, pixels, parameters)
        seconds.append(time.process_time() - started)
    return float(np.median(seconds))


def pipeline(experiment: Experiment, parameters: Parameters) -> tuple[float, float, int, int]:
    """Frames per CPU second with nothing known and with known peaks; hits and indexed frames."""
    indexer = EmbeddedIndexer(experiment)
    indexer.run(parameters.replace(min_snr=11.0), experiment.frames[:2])  # what is done once
    first = indexer.run(parameters, experiment.frames)
    again = indexer.run(parameters, experiment.frames)
    n = first.num_frames
    return n / first.cpu_s, n / again.cpu_s, first.num_hits, first.num_indexed


def scaling(experiment: Experiment, parameters: Parameters) -> None:
    """Wall-clock of all frames on one and on two Ray tasks at once, best of three in turn."""
    from ssl2rl_ray.local_ray import local_ray
    from ssl2rl_ray.tuning.spread import SpreadIndexer

    wall, cpu = {1: np.inf, 2: np.inf}, {1: 0.0, 2: 0.0}
    with local_ray(2):
        spread = SpreadIndexer(EmbeddedIndexer(experiment))
        # Workers start, and work out what is worked out once.
        spread.run(parameters.replace(min_snr=11.0), experiment.frames[:200])
        for turn in range(3):
            for n in wall:
                spread.num_tasks = n
                fresh = parameters.replace(min_snr=parameters.min_snr + 0.001 * (2 * turn + n))
                started = time.perf_counter()
                result = spread.run(fresh, experiment.frames)
                if (taken := time.perf_counter() - started) < wall[n]:
                    wall[n], cpu[n] = taken, result.cpu_s
    print(f"\n{len(experiment.frames)} frames over Ray, load {os.getloadavg()[0]:.1f}: "
          f"{wall[1]:.1f} s on 1 core, {wall[2]:.1f} s on 2: {wall[1] / wall[2]:.2f} times "
          f"(bar: 1.8; CPU time in the tasks {cpu[1]:.1f} and {cpu[2]:.1f} s)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--scaling", type=int, default=1000)
    args = parser.parse_args()
    print(f"load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        experiment = simulate("lysozyme", args.frames, 1, os.path.join(folder, "few"))
        nominal = experiment.nominal
        seconds = peak_finder(experiment, nominal)
        print(f"peak finder {seconds * 1e3:.1f} ms a frame: {0.020 / seconds:.1f} times as fast as "
              "CrystFEL's 20 ms (bar: 2)\n")  # fmt: skip
        print(f"{'':>24} {'frames/s':>9} {'peaks known':>12} {'hits':>6} {'indexed':>8}")
        for name, changes in SETTINGS.items():
            new, known, hits, indexed = pipeline(experiment, nominal.replace(**changes))
            print(f"{name:>24} {new:9.0f} {known:12.0f} {hits:6d} {indexed:8d}")
        if args.scaling:
            scaling(simulate("lysozyme", args.scaling, 2, os.path.join(folder, "many")), nominal)


if __name__ == "__main__":
    main()
