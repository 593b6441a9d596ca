"""Env steps per second at 2341 holes, and their ratio to an env that builds features per hole.

Run: ``python benchmarks/env_steps.py`` (one process, one thread; a few seconds). The naive env is
what the compact observation replaces: each step it counts the groups and writes 17 features for
every hole, in plain Python, and stacks the last four, as the public CryoRL code does; its features
are checked against ours first. All are measured in one run, on one synthetic session, with the same
tours of unvisited holes drawn beforehand. A rate is the best of several repeats: on a machine
that is shared, the others measure the neighbours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, deque
from collections.abc import Callable

import numpy as np

from envs.cryoem.env import CryoEMNavigationEnv, CryoEMVectorEnv
from envs.cryoem.features import hole_features
from envs.cryoem.stack import unpack_visited
from envs.cryoem.types import HoleTable, NavigationConfig


def session(num_holes: int) -> HoleTable:
    """About 21 holes a patch, 7 patches a square, 2 squares a grid, as in the Aldolase session."""
    rng = np.random.default_rng(0)
    patch = np.sort(rng.integers(0, -(-num_holes // 21), num_holes))
    square, grid = patch // 7, patch // 14
    return HoleTable.from_names(
        hole_name=[
            f"g{g}_s{s}_p{p}_h{i}"
            for i, (g, s, p) in enumerate(zip(grid, square, patch, strict=True))
        ],
        grid=[f"g{g}" for g in grid],
        square=[f"g{g}_s{s}" for g, s in zip(grid, square, strict=True)],
        patch=[f"g{g}_s{s}_p{p}" for g, s, p in zip(grid, square, patch, strict=True)],
        ctf_max_resolution_A=rng.uniform(3, 10, num_holes),
        p_low_ctf=rng.random(num_holes),
    )


class NaiveEnv:
    """The same moves, minutes and rewards; the observation is every hole's features."""

    def __init__(self, table: HoleTable, config: NavigationConfig) -> None:
        """Lists instead of arrays."""
        self.config = config
        self.groups = [ids.tolist() for ids in (table.patch_id, table.square_id, table.grid_id)]
        self.p = table.p_low_ctf.tolist()
        self.is_low = (table.ctf_max_resolution_A <= config.low_ctf_threshold_A).tolist()

    def reset(self, start: int) -> np.ndarray:
        """(N, 68) float16 features."""
        self.current, self.elapsed = start, 0.0
        self.visited = [False] * len(self.p)
        self.visited[start] = True
        self.frames = deque([self.features()] * 4, maxlen=4)
        return np.concatenate(self.frames, axis=1)

    def step(self, hole: int) -> tuple[np.ndarray, float, bool]:
        """Features, reward, and whether the budget is gone."""
        switch = sum(group[hole] != group[self.current] for group in self.groups)
        self.current, self.visited[hole] = hole, True
        self.elapsed += self.config.minutes[switch]
        self.frames.append(self.features())
        observation = np.concatenate(self.frames, axis=1)
        reward = self.config.reward[switch] * self.is_low[hole]
        return observation, reward, self.elapsed > self.config.budget_min

    def features(self) -> np.ndarray:
        """(N, 17) float16."""
        rows = [[p, float(is_visited)] for p, is_visited in zip(self.p, self.visited, strict=True)]
        for group, scale in zip(self.groups, (25, 150, 500), strict=True):
            left, predicted, seen, low = Counter(), Counter(), Counter(), Counter()
            for hole, code in enumerate(group):
                if self.visited[hole]:
                    seen[code] += 1
                    low[code] += self.is_low[hole]
                else:
                    left[code] += 1
                    predicted[code] += self.p[hole]
            for row, code in zip(rows, group, strict=True):
                row += [min(count[code] / scale, 1) for count in (left, predicted, seen, low)]
        for group in reversed(self.groups):
            for row, code in zip(rows, group, strict=True):
                row.append(float(code == group[self.current]))
        return np.array(rows, np.float16)


def best_rate(run: Callable[[], int], repeats: int) -> float:
    """Steps per second of the fastest repeat; ``run`` returns how many steps it made."""
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        num_steps = run()
        rates.append(num_steps / (time.perf_counter() - started))
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--holes", type=int, default=2341)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    table = session(args.holes)
    config = NavigationConfig.preset("cryorl", feature_set="cryorl", budget_min=480)
    rng = np.random.default_rng(1)
    tours = np.stack([1 + rng.permutation(args.holes - 1) for _ in range(args.episodes)], axis=1)
    start = {"start_hole": 0}

    # Random tours end after some 65 moves: reset on every end, as a training loop does.
    single = CryoEMNavigationEnv(table, config)
    tour = tours[:, 0].tolist()

    def run_single() -> int:
        for _ in range(20):
            single.reset(options=start)
            for hole in tour:
                if single.step(hole)[2]:
                    break
        return 20 * (int(single.vector.visit_order(0).size) - 1)

    endless = CryoEMVectorEnv(
        [table],
        NavigationConfig.preset("cryorl", feature_set="cryorl", budget_min=1e9),
        args.episodes,
    )
    long_single = CryoEMNavigationEnv(table, endless.config)

    def run_long_single() -> int:
        long_single.reset(options=start)
        for hole in tour[:2000]:
            long_single.step(hole)
        return len(tour[:2000])

    def run_vector() -> int:
        endless.reset(options=start)
        for holes in tours[:1000]:
            endless.step(holes)
        return tours[:1000].size

    def our_features() -> np.ndarray:
        observation = long_single.compact_observation()
        recent = observation["recent"]
        visited = unpack_visited(observation, args.holes)
        return hole_features(
            endless.stack, np.zeros(1, int), visited, recent[:, 0], recent, config
        )[0]

    def run_features() -> int:
        long_single.reset(options=start)
        for hole in tour[:20]:
            long_single.step(hole)
            our_features()
        return 20

    naive = NaiveEnv(table, config)

    def run_naive() -> int:
        naive.reset(0)
        for hole in tour[:20]:
            naive.step(hole)
        return 20

    run_naive()
    run_features()
    np.testing.assert_allclose(np.concatenate(naive.frames, 1), our_features(), atol=1e-3)

    rates = {
        "single_steps_per_s": best_rate(run_long_single, args.repeats),
        "single_with_resets_steps_per_s": best_rate(run_single, args.repeats),
        "vector_steps_per_s": best_rate(run_vector, args.repeats),
        "single_and_numpy_features_steps_per_s": best_rate(run_features, args.repeats),
        "naive_steps_per_s": best_rate(run_naive, args.repeats),
    }
    ratios = {
        "single_over_naive": rates["single_steps_per_s"] / rates["naive_steps_per_s"],
        "vector_over_naive": rates["vector_steps_per_s"] / rates["naive_steps_per_s"],
        "vector_over_single": rates["vector_steps_per_s"] / rates["single_steps_per_s"],
    }
    if args.json:
        print(json.dumps({"holes": args.holes, "episodes": args.episodes} | rates | ratios))
        return
    print(f"{args.holes} holes, {args.episodes} episodes in the vector env, one process")
    for name, value in rates.items():
        print(f"  {name:<40} {value:>12,.0f}")
    for name, value in ratios.items():
        print(f"  {name:<40} {value:>12,.1f}")


if __name__ == "__main__":
    main()
