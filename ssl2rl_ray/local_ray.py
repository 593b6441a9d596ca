"""A Ray of our own where there is none."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """A local Ray with at least two CPUs, or the cluster of RAY_ADDRESS, unless one is connected.

    Only what was started or connected here is shut down.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    own = {}
    if not os.environ.get("RAY_ADDRESS"):
        # "local": else Ray joins any cluster that it finds on this machine
        own = {"address": "local", "num_cpus": max(2, num_cpus), "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()
