"""Response curves: frames indexed against each parameter, on simulated lysozyme.

Beside them are the curves measured with CrystFEL 0.12 (peakfinder8, asdf) on simulated lysozyme of
another program: 80 of 200 at nominal parameters. What is compared is their shape, so both are given
relative to nominal. The last line is the correlation of the two columns and their mean difference.

Run: python benchmarks/sfx_response.py [--frames 200] [--data DIR] [--backend embedded|crystfel]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from envs.crystfel.experiment import read_experiment
from envs.crystfel.indexamajig import Indexamajig
from envs.crystfel.indexer import Indexer
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import simulate
from envs.crystfel.types import Frame, Parameters

CRYSTFEL: dict[str, dict[float, int]] = {
    "min_snr": {
        3.5: 0, 4: 44, 4.5: 76, 5: 80, 5.5: 75, 6: 69, 7: 58, 8: 48, 10: 37, 12: 29,
    },
    "clen_offset_percent": {-6: 0, -4: 0, -3: 47, -2: 77, -1: 81, 1: 84, 2: 79, 3: 61, 4: 5, 6: 0},
    "centre_x_offset_px": {1: 68, 2: 26, 3: 8, 5: 0},
    "min_peaks": {0: 80, 25: 78, 30: 73, 40: 55, 60: 39, 100: 17},
    "min_pix_count": {1: 0, 2: 80, 3: 64, 4: 47, 6: 28},
    "threshold_adu": {0: 78, 40: 75, 60: 55, 100: 33, 200: 16},
}  # fmt: skip
"""Indexed of 200."""
NOMINAL = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--preset", default="lysozyme")
    parser.add_argument("--backend", choices=("embedded", "crystfel"), default="embedded")
    parser.add_argument("--data", help="a data folder instead of a simulated one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            experiment = read_experiment(args.data)
        else:
            experiment = simulate(args.preset, args.frames, 1, Path(folder) / "data")
        indexer: Indexer = EmbeddedIndexer(experiment)
        if args.backend == "crystfel":
            indexer = Indexamajig(experiment=experiment, num_processes=1)
        print(indexer.version)
        report(indexer, experiment.frames[: args.frames], experiment.nominal)


def report(indexer: Indexer, frames: tuple[Frame, ...], nominal: Parameters) -> None:
    first = indexer.run(nominal, frames)
    at_nominal, cpu_s = first.num_indexed, first.cpu_s
    print(f"nominal: {at_nominal} of {len(frames)} indexed (CrystFEL: {NOMINAL} of 200)")
    print(f"{'':<28}{'indexed':>8}{'relative':>10}{'CrystFEL':>10}")
    ours, theirs = [], []
    for name, curve in CRYSTFEL.items():
        for value, count in curve.items():
            result = indexer.run(nominal.replace(**{name: value}), frames)
            found, cpu_s = result.num_indexed, cpu_s + result.cpu_s
            ours.append(found / max(at_nominal, 1))
            theirs.append(count / NOMINAL)
            what = f"{name} {value:g}"
            print(f"{what:<28}{found:>8}{ours[-1]:>10.2f}{theirs[-1]:>10.2f}", flush=True)
    away = np.abs(np.subtract(ours, theirs)).mean()
    print(
        f"{len(ours)} settings: correlation {np.corrcoef(ours, theirs)[0, 1]:.3f}, mean absolute "
        f"difference {away:.3f} of nominal; {cpu_s:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
