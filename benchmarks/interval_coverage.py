"""How often the 95 % intervals of `ssl2rl compare` hold what they should, by number of seeds.

Usage: python benchmarks/interval_coverage.py [--repeats 1000]

Scores are drawn afresh from a normal and from a skewed distribution (runs that fail below most).
Bars: the interquartile mean's interval should hold its expectation in 95 % of the repeats; of two
groups without any difference, an interval should exclude "no difference" in 5 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from ssl2rl_ray.stats import difference, estimate, interquartile_mean, probability_of_improvement

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: -rng.exponential(size=shape),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    args = parser.parse_args()
    print("scores  seeds  IQM held  difference excludes 0  P excludes 1/2  (the last two: falsely)")
    for name, draw in DISTRIBUTIONS.items():
        for num_seeds in (3, 5, 10, 20):
            rng = np.random.default_rng(num_seeds)
            truth = interquartile_mean(draw(rng, (100_000, num_seeds))).mean()
            found = np.zeros(3)
            for repeat in range(args.repeats):
                x, y = draw(rng, (2, num_seeds))
                resamples = [np.random.default_rng(repeat) for _ in range(3)]
                low, high = estimate([x], resamples[0], num_resamples=1000).ci95
                found[0] += low <= truth <= high
                low, high = difference([x], [y], resamples[1], num_resamples=1000).ci95
                found[1] += low > 0 or high < 0
                improvement = probability_of_improvement([x], [y], resamples[2], 1000)
                low, high = improvement.ci95
                found[2] += low > 0.5 or high < 0.5
            held, apart, better = found / args.repeats
            print(f"{name:<6}  {num_seeds:>5}  {held:>8.3f}  {apart:>21.3f}  {better:>14.3f}")


if __name__ == "__main__":
    main()
