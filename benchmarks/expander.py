"""Expander and network against features built per hole and passed through the plain MLP.

Batch 32 x 6489 holes, two threads, the same weights and the same output. Two ratios: against the
numpy reference of the features plus the plain MLP, and against the MLP alone with its features
for nothing. Usage: python benchmarks/expander.py [--holes 6489] [--batch 32] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.features import hole_features
from envs.cryoem.stack import unpack_visited
from envs.cryoem.types import FeatureSet, HoleTable, NavigationConfig
from ssl2rl_ray.algorithms.expander import Expander
from ssl2rl_ray.algorithms.networks import HoleNetwork


def session(num_holes: int, rng: np.random.Generator, holes_per_patch: int = 13) -> HoleTable:
    """Predictions of all values, few of them equal: the worst case for cells."""
    patch = np.arange(num_holes) // holes_per_patch
    quality = rng.normal(size=patch.max() + 1)[patch]
    p = 1 / (1 + np.exp(-(2 * quality + rng.normal(0, 1.5, num_holes))))
    return HoleTable.from_names(
        hole_name=np.char.add("h", np.arange(num_holes).astype(str)),
        grid=(patch // 45).astype(str),
        square=(patch // 9).astype(str),
        patch=patch.astype(str),
        p_low_ctf=p,
        ctf_max_resolution_A=np.where(rng.random(num_holes) < p, 4.0, 9.0),
    )


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time; the first call is not counted."""
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return float(np.median(times)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holes", type=int, default=6489)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    feature_sets: tuple[FeatureSet, ...] = ("paper", "cryorl")
    for feature_set in feature_sets:
        config = NavigationConfig.preset("cryorl", feature_set=feature_set)
        env = CryoEMVectorEnv([session(args.holes, rng)], config, args.batch)
        observation, _ = env.reset(seed=0)
        for _ in range(200):
            mask = env.action_mask()
            observation, *_ = env.step((rng.random(mask.shape) * mask).argmax(1))
        batch = {key: torch.as_tensor(value) for key, value in observation.items()}
        network = HoleNetwork(Expander(env.stack, config, p_step=0))
        rounded = HoleNetwork(Expander(env.stack, config, p_step=0.01))
        visited = unpack_visited(observation, args.holes)

        def features() -> torch.Tensor:
            recent = observation["recent"]  # noqa: B023
            at = observation["session"][:, 0]  # noqa: B023
            return torch.as_tensor(
                hole_features(env.stack, at, visited, recent[:, 0], recent, config)  # noqa: B023
            )

        with torch.no_grad():
            rows = features()
            plain = network.mlp(rows).squeeze(-1)
            ours = network(batch)
            difference = (plain - ours)[ours.isfinite()].abs().max().item()
            assert difference < 1e-5, difference
            ms_features = milliseconds(features, 5)
            ms_plain = milliseconds(lambda: network.mlp(rows), args.repeats)  # noqa: B023
            ms_ours = milliseconds(lambda: network(batch), args.repeats)  # noqa: B023
            ms_rounded = milliseconds(lambda: rounded(batch), args.repeats)  # noqa: B023
            ms_expand = milliseconds(lambda: network.expand(batch), args.repeats)  # noqa: B023
        print(
            f"{feature_set:7} {args.batch} x {args.holes} holes, {args.threads} threads: per hole "
            f"{ms_features:.0f} ms features + {ms_plain:.0f} ms MLP; ours {ms_ours:.1f} ms "
            f"(expander {ms_expand:.1f}; own p rounded {ms_rounded:.1f}); largest difference "
            f"{difference:.0e}"
        )
        print(
            f"{feature_set:7} ratio {(ms_features + ms_plain) / ms_ours:.1f} "
            f"(features for nothing: {ms_plain / ms_ours:.1f})"
        )


if __name__ == "__main__":
    main()
