"""A Ray of our own where there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """A local Ray with at least two CPUs, or the cluster of RAY_ADDRESS, unless one is connected.

    Only what was started or connected here is shut down. Raises ValueError where nothing answers at
    RAY_ADDRESS.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    own = {}
    if address := os.environ.get("RAY_ADDRESS"):
        _check_it_answers(address)
    else:
        # "local": else Ray joins any cluster that it finds on this machine
        own = {"address": "local", "num_cpus": max(2, num_cpus), "include_dashboard": False}
    mode = os.environ.get("RAY_AUTH_MODE")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()
        # A Ray of our own asks for a token, and leaves that behind for whatever this process starts
        # or joins next: on a cluster without one, no actor would ever begin.
        if mode is None:
            os.environ.pop("RAY_AUTH_MODE", None)


def _check_it_answers(address: str) -> None:
    """Asked at once, as ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdigit():  # auto, or ray://
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({error}): start it or correct the "
            "address; without RAY_ADDRESS there is a Ray of this machine's own"
        ) from error
