"""How often does the embedded indexer find a lattice where there is no crystal, or a wrong one?

Run: ``python benchmarks/sfx_false_lattices.py [--patterns 2000] [--frames 60]`` (two minutes).

First, patterns without a crystal: peaks lie anywhere on the detector, or crowd around the beam, or
lie on rings as ice has them. Prints the best log10 p of any lattice with the right cell, per number
of peaks, beside the bar that a lattice must pass; a test that is honest has few below -1 and next
to none below -2. Bar: none is accepted.

Then, simulated frames at settings where an agent might farm junk. A lattice is wrong where it is
more than 2 degrees from each crystal that the simulation put into the frame. Bars: 0.5 % of the
lattices are wrong, none is found in a frame without a crystal.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from envs.crystfel.experiment import TRUTH_FILE
from envs.crystfel.sfx import index
from envs.crystfel.sfx.pipeline import EmbeddedIndexer
from envs.crystfel.sfx.simulate import LYSOZYME, PRESETS, simulate

WAVELENGTH_A, DISTANCE_M, PIXEL_M = 1.333, 0.12, 200e-6
NUMBERS = (10, 15, 20, 30, 50, 100, 200)
WRONG_DEG = 2.0
SETTINGS: tuple[dict[str, float], ...] = (
    {},
    *({"clen_offset_percent": value} for value in (-6.0, -4.0, -3.0, 3.0, 4.0, 6.0)),
    *({"centre_x_offset_px": value} for value in (-5.0, 2.0, 3.0)),
    {"centre_x_offset_px": 2.0, "centre_y_offset_px": -3.0, "clen_offset_percent": 3.0},
    {"min_snr": 3.0},
    {"min_snr": 3.5, "min_peaks": 0},
    {"min_snr": 4.0, "threshold_adu": 0.0},
    {"min_pix_count": 1},
    {"min_snr": 8.0, "min_peaks": 0},
    {"min_snr": 4.5, "min_peaks": 5, "clen_offset_percent": -4.0},
)
ICE_A = (3.90, 3.67, 3.44, 2.67, 2.25)


def uniform(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(-512, 512, (n, 2))


def crowded(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(0, 180, (n, 2))


def ice(rng: np.random.Generator, n: int) -> np.ndarray:
    angle = 2 * np.arcsin(WAVELENGTH_A / 2 / rng.choice(ICE_A, n))
    radius = DISTANCE_M * np.tan(angle) / PIXEL_M + rng.normal(0, 2, n)
    turn = rng.uniform(0, 2 * np.pi, n)
    return radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def blank_patterns(patterns: int) -> None:
    rng, cell = np.random.default_rng(0), index.KnownCell(LYSOZYME)
    accepted, lowest = 0, {}
    for k in range(patterns):
        draw, n = (uniform, crowded, ice)[k % 3], NUMBERS[k // 3 % len(NUMBERS)]
        xyz = np.column_stack([draw(rng, n) * PIXEL_M, np.full(n, DISTANCE_M)])
        q = xyz / np.linalg.norm(xyz, axis=1, keepdims=True) - [0, 0, 1]
        q /= WAVELENGTH_A
        accepted += index.index_peaks(q, cell) is not None
        found = index.candidates(q, cell)
        lowest.setdefault((draw.__name__, n), []).append(
            found.log10_p[found.is_alike].min(initial=10.0)
        )
    print(f"{'peaks':>18} {'patterns':>9} {'lowest':>8} {'1 in 100':>9} {'1 in 10':>8}")
    for (name, n), values in sorted(lowest.items()):
        quantiles = np.percentile(values, [0, 1, 10])
        print(f"{name:>12} {n:5d} {len(values):9d} {quantiles[0]:8.1f} {quantiles[1]:9.1f} "
              f"{quantiles[2]:8.1f}")  # fmt: skip
    every = np.concatenate([*lowest.values()])
    for bar in (-1, -2, -3, index.MAX_LOG10_P):
        print(f"log10 p below {bar:g}: {np.mean(every < bar):.2%}")
    print(f"accepted: {accepted} of {patterns} (bar: 0; a lattice needs {index.MAX_LOG10_P:g})")


def simulated_frames(num_frames: int) -> None:
    total = np.zeros(3, dtype=int)
    print(f"\n{'preset':>22} {'lattices':>9} {'wrong':>6} {'of these in blank frames':>25}")
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            experiment = simulate(preset, num_frames, 5, Path(folder) / "data")
            indexer, cell = EmbeddedIndexer(experiment), index.KnownCell(experiment.cell)
            with np.load(experiment.folder / TRUTH_FILE) as truth:
                owner, reciprocal = truth["crystal_frame"], truth["reciprocal_per_A"]
            true = [np.linalg.inv(reciprocal[owner == i]).swapaxes(1, 2) for i in range(num_frames)]
            count = np.zeros(3, dtype=int)
            for changes in SETTINGS:
                parameters = experiment.nominal.replace(**changes)
                for i, (_, found) in enumerate(indexer.crystals(parameters, experiment.frames)):
                    if found is not None:
                        angles = [index.misorientation_deg(found.basis_A, b, cell) for b in true[i]]
                        is_wrong = min(angles, default=180.0) > WRONG_DEG
                        count += (1, is_wrong, not angles)
        total += count
        print(f"{preset:>22} {count[0]:9d} {count[1]:6d} {count[2]:25d}")
    share = total[1] / max(total[0], 1)
    print(f"{'all':>22} {total[0]:9d} {total[1]:6d} {total[2]:25d}: {share:.2%} (bar: 0.5 %)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=60)
    args = parser.parse_args()
    blank_patterns(args.patterns)
    simulated_frames(args.frames)


if __name__ == "__main__":
    main()
