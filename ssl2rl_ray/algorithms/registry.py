"""The algorithms by name: a literal, because a handful of them does not earn a plug-in system."""

from __future__ import annotations

from ssl2rl_ray.algorithms import a2c, acktr, async_a2c, dqn, ppo, rainbow

ALGORITHMS = {
    "dqn": dqn.build,
    "rainbow": rainbow.build,
    "a2c": a2c.build,
    "async_a2c": async_a2c.build,
    "acktr": acktr.build,
    "ppo": ppo.build,
}
"""``config.algorithm.name`` -> ``build(config, training, make_env=, make_network=, seed=)``."""
