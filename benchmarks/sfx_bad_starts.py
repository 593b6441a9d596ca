"""From bad starts, on frames: how near to an exhaustive grid's best within 4000 frames?

Run: ``python benchmarks/sfx_bad_starts.py --data DIR --policy RUN [--policy RUN ...]`` on a folder
of ``ssl2rl sfx simulate`` whose geometry is right (most of an hour on one core). Two starts: SNR
9, min-peaks 25, distance +3 %; SNR 3.5, distance -2 %. The embedded pipeline indexes 200 frames a
setting (fewer where racing ends early); what is asked for is rounded as a user would write it
(SNR by 0.5, threshold by 20 ADU, distance by 0.1 %, centre by 0.2 px), for all alike, so that
settings come back, which cost nothing the second time. Runs differ in the order of the frames, in the
optimiser's luck, and take the policies in turn. The grid is the product of SNR, pixels, threshold,
distance and min-peaks below, on the same frames. A share is the fraction that the recommended
setting indexes of all 200 frames over the grid's best (settings off the grid may have more).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.crystfel.env import IndexerBench
from envs.crystfel.experiment import read_experiment
from envs.crystfel.rivals import RIVALS, Make, tune
from envs.crystfel.sfx import pipeline
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.types import Frame, IndexingResult, Parameters, TuningConfig, concatenate
from ssl2rl_ray.stats import bootstrap_ci95
from ssl2rl_ray.tuning.policy import TuningPolicy

STARTS = {
    "SNR 9, min-peaks 25, distance +3 %": (Parameters(min_snr=9.0, min_peaks=25), 3.0),
    "SNR 3.5, distance -2 %": (Parameters(min_snr=3.5), -2.0),
}
"""Parameters, and by how much the start's distance is wrong."""
GRID = {
    "min_snr": (3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0),
    "min_pix_count": (1, 2, 3),
    "threshold_adu": (20.0, 40.0, 60.0),
    "clen_offset_percent": (-2.0, -1.0, 0.0, 1.0, 2.0),
}
MIN_PEAKS = (5, 10, 15, 20, 25)
BUDGETS = (500, 1000, 2000, 4000)
ROUND = {"min_snr": 0.5, "threshold_adu": 20.0, "clen_offset_percent": 0.1}
ROUND |= {"centre_x_offset_px": 0.2, "centre_y_offset_px": 0.2}


class Known:
    """An indexer that never does a frame twice at a setting, here or in an earlier call."""

    def __init__(self, indexer: EmbeddedIndexer, path: Path | None) -> None:
        """``path``: where what is known is kept; None = nowhere."""
        self.indexer, self.version, self.path = indexer, indexer.version, path
        self.rows: dict[tuple[Parameters, Frame], tuple[Any, ...]] = {}
        if path is not None and path.exists():
            version, rows = pickle.loads(path.read_bytes())
            self.rows = rows if version == self.version else {}

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """As the protocol of indexers says."""
        missing = [frame for frame in frames if (parameters, frame) not in self.rows]
        if missing:
            begun = time.process_time()
            self.indexer.peaks(parameters, missing)
            peaks_s = (time.process_time() - begun) / len(missing)
        for frame in missing:
            one = self.indexer.run(parameters, [frame])
            self.rows[parameters, frame] = (
                bool(one.is_indexed[0]), bool(one.is_hit[0]), int(one.num_peaks[0]),
                one.cell_ratio, one.residual_px, *one.spot_shift_px, one.cpu_s + peaks_s,
            )  # fmt: skip
        parts = []
        for frame in frames:
            is_indexed, is_hit, num_peaks, ratio, residual, x, y, cpu_s = self.rows[
                parameters, frame
            ]
            parts.append(
                IndexingResult(
                    is_indexed=[is_indexed],
                    is_hit=[is_hit],
                    num_peaks=[num_peaks],
                    num_crystals=int(is_indexed),
                    mean_cell=np.full(6, ratio),
                    cell_ratio=ratio,
                    residual_px=residual,
                    spot_shift_px=[x, y],
                    cpu_s=cpu_s,
                    version=self.version,
                )
            )
        return concatenate(parts)

    def save(self) -> None:
        """Keeps it."""
        if self.path is not None:
            self.path.write_bytes(pickle.dumps((self.version, self.rows)))


class Started:
    """The same behind a geometry file whose distance is wrong."""

    def __init__(self, indexer: Known, wrong_percent: float) -> None:
        """``wrong_percent``: how much too long it is."""
        self.indexer, self.wrong, self.version = indexer, wrong_percent, indexer.version

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """As the protocol of indexers says."""
        return self.indexer.run(self.true(parameters), frames)

    def true(self, parameters: Parameters) -> Parameters:
        """Relative to the right geometry, rounded."""
        clen = (1 + self.wrong / 100) * (1 + parameters.clen_offset_percent / 100)
        moved = parameters.replace(clen_offset_percent=100 * (clen - 1)).as_dict()
        return parameters.replace(
            **{name: round(step * round(moved[name] / step), 3) for name, step in ROUND.items()}
        )


def grid_best(indexer: Known, frames: Sequence[Frame]) -> tuple[int, dict[str, float]]:
    """Most frames that a setting of the grid indexes, and the setting."""
    best, at = -1, {}
    for values in itertools.product(*GRID.values()):
        changes = dict(zip(GRID, values, strict=True))
        found = indexer.run(Parameters(**changes, min_peaks=MIN_PEAKS[0]), frames)
        for least in MIN_PEAKS:  # fewer peaks than asked for: no hit, else the same
            num = int((found.is_indexed & (found.num_peaks >= least)).sum())
            if num > best:
                best, at = num, changes | {"min_peaks": least}
    return best, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--policy", action="append", default=[], metavar="RUN")
    parser.add_argument("--against", default="gp-warm-free,rules", metavar="NAME,NAME")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--frames", type=int, default=200, help="of a sample (200)")
    parser.add_argument("--samples", type=int, default=1, help="of frames, taken in turn (1)")
    parser.add_argument("--start", type=int, choices=(0, 1), help="one of the two")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memo", type=Path, metavar="FILE", help="what is known is kept here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipeline._MAX_KEPT = 2000  # settings come back
    experiment = read_experiment(args.data)
    indexer = Known(EmbeddedIndexer(experiment), args.memo)
    samples = [
        experiment.frames[i * args.frames : (i + 1) * args.frames] for i in range(args.samples)
    ]
    begun = time.perf_counter()
    best = []
    for frames in samples:
        num, at = grid_best(indexer, frames)
        best.append(num)
        size = math.prod(map(len, GRID.values())) * len(MIN_PEAKS)
        print(f"grid of {size} settings: {num} of {len(frames)} at {at}; "
              f"{time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip
        indexer.save()
    names = [name for name in args.against.split(",") if name]
    makes: dict[str, list[Make]] = {name: [RIVALS[name]] for name in names}
    if args.policy:
        makes["policy"] = [TuningPolicy.load(folder).make for folder in args.policy]
    config = TuningConfig(num_frames=args.frames)
    found: dict[str, Any] = {"grid": best, "frames": args.frames, "starts": {}}
    for number, (label, (start, wrong)) in enumerate(STARTS.items()):
        if args.start not in (None, number):
            continue
        started = Started(indexer, wrong)
        share = [started.run(start, f).num_indexed / b for f, b in zip(samples, best, strict=True)]
        print(f"-- {label}: the start has {np.mean(share):.3f} of the grid's best")
        rows: dict[str, Any] = {"start": float(np.mean(share))}
        for name, made in makes.items():
            begun, shares = time.perf_counter(), []
            for run in range(args.runs):
                frames = samples[run % len(samples)]
                rng = np.random.default_rng([args.seed, run])
                order = [frames[i] for i in rng.permutation(len(frames))]
                bench = IndexerBench(started, order, start)
                trace = tune(
                    bench, config, made[run % len(made)], num_evaluations=2 + max(BUDGETS) // 50,
                    rng=rng, num_first_frames=50, budget_frames=max(BUDGETS),
                )  # fmt: skip
                reached = []
                for budget in BUDGETS:
                    last = int((trace.num_frames[:, 0] <= budget).sum()) - 1
                    values = trace.best_values[max(last, 0), 0]
                    result = started.run(bench.parameters(values), frames)
                    reached.append(result.num_indexed / best[run % len(best)])
                shares.append(reached)
                print(f"  {name} run {run}: {reached}", file=sys.stderr, flush=True)
            table = np.array(shares)
            rows[name] = {
                "shares": table.tolist(),
                "median": np.median(table, axis=0).tolist(),
                "ci95": [
                    bootstrap_ci95(column, np.random.default_rng(0), np.median, 2000)
                    for column in table.T
                ],
                "wall_s": time.perf_counter() - begun,
            }
            low, high = rows[name]["ci95"][-1]
            text = ", ".join(
                f"{budget}: {value:.3f}"
                for budget, value in zip(BUDGETS, rows[name]["median"], strict=True)
            )
            print(
                f"{name:<14} median share after frames {text} [{low:.3f}, {high:.3f}]; lowest "
                f"{table[:, -1].min():.3f}, at 0.95 or more {(table[:, -1] >= 0.95).sum()} of "
                f"{len(table)}; {rows[name]['wall_s']:.0f} s",
                flush=True,
            )
            indexer.save()
        found["starts"][label] = rows
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
