"""The exact optimum from 50 starts: shared work against one programme per start.

    python benchmarks/knapsack.py

Prints the ratio of the two times, measured in one run on one synthetic session.
"""

import time

import numpy as np

from envs.cryoem.knapsack import best_tour, optimum
from envs.cryoem.rewards import outcome
from envs.cryoem.synthetic import draw_session
from envs.cryoem.types import NavigationConfig


def main() -> None:
    table = draw_session(np.random.default_rng(0))
    config = NavigationConfig.preset("cryorl", budget_min=480)
    starts = np.random.default_rng(1).integers(len(table), size=50)
    value = outcome(table, config)
    begin = time.perf_counter()
    shared = optimum(table, config, starts)
    between = time.perf_counter()
    alone = [best_tour(table, value, config, int(start))[1] for start in starts]
    end = time.perf_counter()
    np.testing.assert_allclose(shared, alone)
    print(f"{len(table)} holes, 50 starts, 480 min: mean optimum {shared.mean():.1f}")
    print(f"shared {between - begin:.2f} s, one by one with tours {end - between:.2f} s")
    print(f"ratio {(end - between) / (between - begin):.1f}")


if __name__ == "__main__":
    main()
