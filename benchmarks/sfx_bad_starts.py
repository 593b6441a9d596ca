"""From bad starts, on frames: after how many frames is 95 % of an exhaustive grid's best reached?

Run: ``python benchmarks/sfx_bad_starts.py --data DIR --policy RUN [--policy RUN ...]`` on a folder
of ``ssl2rl sfx simulate`` whose geometry is right (10 to 20 minutes on one core). Two starts: SNR
9, min-peaks 25, distance +3 %; SNR 3.5, distance -2 %. The embedded pipeline indexes 200 frames a
setting (fewer where racing ends early). What is asked for is rounded to the steps of the tunables,
SNR and threshold to 0.5 and 20 ADU, for all alike: settings come back, and are not indexed twice.
Runs differ in the order of the frames and in the optimiser's luck, and take the policies in turn.
The grid is the product of SNR, pixels, threshold, distance and min-peaks below, on the same frames.
A run ends when the setting that it recommends indexes 95 % of the grid's best on all 200 frames, or
after 4000 frames. ``--start``, ``--seed`` and ``--memo FILE`` allow to do it in parts.
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

from envs.crystfel.env import IndexerBench, Outcome, scale_of
from envs.crystfel.experiment import read_experiment
from envs.crystfel.rivals import RIVALS, Make, Trial, tune
from envs.crystfel.sfx import pipeline
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.types import (
    TUNABLES,
    FloatArray,
    Frame,
    IndexingResult,
    Parameters,
    TuningConfig,
    concatenate,
)
from ssl2rl_ray.stats import bootstrap_ci95
from ssl2rl_ray.tuning.policy import TuningPolicy

STARTS = {
    "SNR 9, min-peaks 25, distance +3 %": (Parameters(min_snr=9.0, min_peaks=25), 3.0),
    "SNR 3.5, distance -2 %": (Parameters(min_snr=3.5), -2.0),
}
"""Parameters, and by how much the start's distance is wrong."""
GRID = {
    "min_snr": (4.0, 4.5, 5.0, 5.5, 6.0, 7.0),
    "min_pix_count": (2, 3),
    "threshold_adu": (20.0, 40.0, 60.0),
    "clen_offset_percent": (-1.0, 0.0, 1.0),
}
"""Around the right distance; on such frames SNR 3.5 and 8, a pixel and 2 % index fewer."""
MIN_PEAKS = (5, 10, 15, 20, 25)
BUDGET, SHARE = 4000, 0.95
ROUND = {name: tunable.step for name, tunable in TUNABLES.items()} | {"threshold_adu": 20.0}
ROUND["min_peaks"] = 1


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
        """As the protocol of indexers says; ``min_peaks`` is counted afterwards."""
        any_peaks = parameters.replace(min_peaks=MIN_PEAKS[0])
        missing = [frame for frame in frames if (any_peaks, frame) not in self.rows]
        peaks_s = 0.0
        if missing:
            begun = time.process_time()
            self.indexer.peaks(any_peaks, missing)
            peaks_s = (time.process_time() - begun) / len(missing)
        for frame in missing:
            one = self.indexer.run(any_peaks, [frame])
            self.rows[any_peaks, frame] = (
                bool(one.is_indexed[0]), int(one.num_peaks[0]), one.cell_ratio, one.residual_px,
                *one.spot_shift_px, one.cpu_s + peaks_s,
            )  # fmt: skip
        parts = []
        for frame in frames:
            is_found, num_peaks, ratio, residual, x, y, cpu_s = self.rows[any_peaks, frame]
            is_hit = num_peaks >= parameters.min_peaks
            parts.append(
                IndexingResult(
                    is_indexed=np.array([is_found and is_hit]),
                    is_hit=np.array([is_hit]),
                    num_peaks=np.array([num_peaks]),
                    num_crystals=int(is_found and is_hit),
                    mean_cell=np.full(6, ratio),
                    cell_ratio=ratio,
                    residual_px=residual,
                    spot_shift_px=np.array([x, y]),
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
    """The same behind a geometry file whose distance is wrong; counts the frames."""

    def __init__(self, indexer: Known, wrong_percent: float) -> None:
        """``wrong_percent``: how much too long the distance is."""
        self.indexer, self.wrong, self.version = indexer, wrong_percent, indexer.version
        self.num_frames = 0

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """As the protocol of indexers says."""
        self.num_frames += len(frames)
        return self.indexer.run(self.true(parameters), frames)

    def true(self, parameters: Parameters) -> Parameters:
        """Relative to the right geometry, rounded."""
        clen = (1 + self.wrong / 100) * (1 + parameters.clen_offset_percent / 100)
        moved = parameters.replace(clen_offset_percent=100 * (clen - 1)).as_dict()
        return parameters.replace(
            **{name: round(step * round(moved[name] / step), 3) for name, step in ROUND.items()}
        )


class ReachedError(Exception):
    """The recommended setting has what was asked for."""


def watched(make: Make, judge: Any) -> Make:
    """The same optimiser; ``judge(unit)`` is called with each new best."""

    def made(
        config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> Any:
        optimiser = make(config, start, outcome, rng)
        tell = optimiser.tell

        def told(trial: Trial) -> None:
            tell(trial)
            if trial.gain[0] > 0:
                judge(trial.unit)

        optimiser.tell = told  # type: ignore[method-assign]
        return optimiser

    return made


def play(
    started: Started,
    make: Make,
    start: Parameters,
    frames: Sequence[Frame],
    best: int,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Frames after which 95 % of the best are reached (infinite: never), and the last share."""
    order = [frames[i] for i in rng.permutation(len(frames))]
    bench = IndexerBench(started, order, start)
    config = TuningConfig(num_frames=len(frames))
    started.num_frames, share = 0, started.indexer.run(started.true(start), frames).num_indexed
    share /= best

    def judge(unit: FloatArray) -> None:
        nonlocal share
        if started.num_frames <= BUDGET:
            values = scale_of(config.tunables).values(unit, bench.start)[0]
            true = started.true(bench.parameters(values))
            share = started.indexer.run(true, frames).num_indexed / best
            if share >= SHARE:
                raise ReachedError

    try:
        tune(
            bench, config, watched(make, judge), num_evaluations=2 + BUDGET // 50, rng=rng,
            num_first_frames=50, budget_frames=BUDGET,
        )  # fmt: skip
    except ReachedError:
        return float(started.num_frames), share
    return math.inf, share


def grid_best(indexer: Known, frames: Sequence[Frame]) -> tuple[int, dict[str, Any]]:
    """Most frames that a setting of the grid indexes, and the setting."""
    best, at = -1, dict[str, Any]()
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
    parser.add_argument("--frames", type=int, default=200, help="the first so many (200)")
    parser.add_argument("--start", type=int, choices=(0, 1), help="one of the two")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memo", type=Path, metavar="FILE", help="what is known is kept here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipeline._MAX_KEPT = 2000  # settings come back
    experiment = read_experiment(args.data)
    frames = experiment.frames[: args.frames]
    indexer = Known(EmbeddedIndexer(experiment), args.memo)
    begun = time.process_time()
    best, at = grid_best(indexer, frames)
    size = math.prod(map(len, GRID.values())) * len(MIN_PEAKS)
    print(f"grid of {size} settings: {best} of {len(frames)} at {at}; "
          f"{time.process_time() - begun:.0f} CPU s", flush=True)  # fmt: skip
    indexer.save()
    makes: dict[str, list[Make]] = {}
    if args.policy:
        makes["policy"] = [TuningPolicy.load(folder).make for folder in args.policy]
    makes |= {name: [RIVALS[name]] for name in args.against.split(",") if name}
    found: dict[str, Any] = {"grid": best, "at": at, "frames": len(frames), "starts": {}}
    for number, (label, (start, wrong)) in enumerate(STARTS.items()):
        if args.start not in (None, number):
            continue
        started = Started(indexer, wrong)
        share = indexer.run(started.true(start), frames).num_indexed / best
        print(f"-- {label}: the start has {share:.3f} of the grid's best")
        rows: dict[str, Any] = {"start": share}
        for name, made in makes.items():
            begun, runs = time.process_time(), []
            for run in range(args.runs):
                rng = np.random.default_rng([args.seed, run])
                runs.append(play(started, made[run % len(made)], start, frames, best, rng))
                print(f"  {name} run {run}: {runs[-1]}", file=sys.stderr, flush=True)
                indexer.save()
            needed, shares = np.array(runs).T
            low, high = bootstrap_ci95(needed, np.random.default_rng(0), np.median, 2000)
            rows[name] = {
                "frames_to_95": [None if math.isinf(x) else x for x in needed],
                "share": shares.tolist(),
            }
            print(
                f"{name:<14} frames to 95 %: median {np.median(needed):.0f} [{low:.0f}, "
                f"{high:.0f}]; reached within {BUDGET} by {(shares >= SHARE).sum()} of "
                f"{len(shares)}; share at the end: median {np.median(shares):.3f}, lowest "
                f"{shares.min():.3f}; {time.process_time() - begun:.0f} CPU s",
                flush=True,
            )
        found["starts"][label] = rows
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
