"""Bytes that one step takes in the replay, compact and as features per hole.

Usage: python benchmarks/replay_bytes.py [--holes 6489]
"""

from __future__ import annotations

import argparse

import numpy as np
from expander import session

from envs.cryoem.env import CryoEMVectorEnv
from envs.cryoem.features import NUM_FEATURES
from envs.cryoem.types import FeatureSet, NavigationConfig
from ssl2rl_ray.algorithms.replay import Replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holes", type=int, default=6489)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    feature_sets: tuple[FeatureSet, ...] = ("paper", "cryorl", "rates")
    for feature_set in feature_sets:
        config = NavigationConfig.preset("cryorl", feature_set=feature_set)
        env = CryoEMVectorEnv([session(args.holes, rng)], config, 4)
        observation, _ = env.reset(seed=0)
        replay = Replay(
            capacity=400, num_streams=4, n_step=3, discount_per_min=1.0, is_prioritized=True
        )
        row = np.zeros((1, 4))
        replay.push(
            observation={key: value[None] for key, value in observation.items()},
            action=row.astype(int),
            reward=row,
            minutes=row,
            is_terminated=row.astype(bool),
            is_truncated=row.astype(bool),
            is_move=row == 0,
            is_continued=np.ones(4, bool),
        )
        ours = replay.payload_bytes_per_step
        line = f"{feature_set:7} {args.holes} holes: {ours:.0f} bytes a step, priorities included"
        if feature_set != "rates":
            full = args.holes * NUM_FEATURES[feature_set] * config.num_past_steps * 4 * 2
            line += (
                f"; features of a step and the next as float32 {full:.1e}: ratio {full / ours:.0f}"
            )
        print(line)


if __name__ == "__main__":
    main()
