"""A Ray of our own where there is none."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """A local Ray with at least two CPUs unless one is connected; only ours is shut down."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(
        num_cpus=max(2, num_cpus),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
