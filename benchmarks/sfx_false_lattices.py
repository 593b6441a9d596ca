"""How often does the embedded indexer find a lattice where there is no crystal?

Run: ``python benchmarks/sfx_false_lattices.py [--patterns 2000]`` (about half a minute). Peaks lie
anywhere on the detector, or crowd around the beam, or lie on rings as ice has them. Prints the best
log10 p of any lattice with the right cell, per number of peaks, beside the bar that a lattice must
pass; a test that is honest has few below -1 and next to none below -2. Bar: none is accepted.
"""

from __future__ import annotations

import argparse

import numpy as np

from envs.crystfel.sfx import index
from envs.crystfel.sfx.simulate import LYSOZYME

WAVELENGTH_A, DISTANCE_M, PIXEL_M = 1.333, 0.12, 200e-6
NUMBERS = (10, 15, 20, 30, 50, 100, 200)
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", type=int, default=2000)
    patterns = parser.parse_args().patterns
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


if __name__ == "__main__":
    main()
