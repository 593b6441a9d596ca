"""What fits: how many trials of a sweep run at once, so that none waits for what another holds."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ssl2rl_ray.config import RunConfig
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.schema import to_dict
from ssl2rl_ray.sweep.file import Sweep, TuneConfig, sections


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one trial takes of the cluster."""

    num_cpus: int
    """Of its process."""
    num_gpus: float
    num_runners: int
    """Env runners of one CPU each, in the trial's own placement group."""
    num_worker_cpus: int
    """CPUs of the workers of Ray Train, which makes a placement group of its own."""

    @property
    def total_cpus(self) -> int:
        """All of it: what must be there for the trial to get anywhere."""
        return self.num_cpus + self.num_runners + self.num_worker_cpus


def need_of(config: RunConfig, tune: TuneConfig) -> Need:
    """What a trial of this config takes; stages of one run come one after the other."""
    found = [section for _, section in sections(to_dict(config))]
    threads = [s["num_torch_threads"] for s in found if "num_torch_threads" in s]
    return Need(
        num_cpus=max(threads, default=1) if tune.num_cpus is None else tune.num_cpus,
        num_gpus=tune.num_gpus,
        num_runners=max((s.get("num_env_runners", 0) for s in found), default=0),
        num_worker_cpus=max(
            (s.get("num_workers", 0) * s.get("num_torch_threads", 1) for s in found), default=0
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is to run on."""

    where: str
    num_cpus: float
    num_gpus: float
    largest_node_cpus: float


def find_room() -> Room:
    """The cluster of RAY_ADDRESS (looked at), or this machine (without starting anything)."""
    if not os.environ.get("RAY_ADDRESS"):
        number = own_cpus()
        return Room(
            where="this machine", num_cpus=number, num_gpus=float("nan"), largest_node_cpus=number
        )
    with local_ray(1):
        return cluster_room()


def own_cpus() -> int:
    """CPUs that this process may use; Ray of our own has at least two."""
    count = getattr(os, "sched_getaffinity", None)
    return max(2, len(count(0)) if count else os.cpu_count() or 1)


def cluster_room() -> Room:
    """Of the Ray that this process is connected to."""
    import ray

    resources = ray.cluster_resources()
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return Room(
        where=f"the Ray cluster of {len(nodes)} node" + "s" * (len(nodes) != 1),
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        largest_node_cpus=max(nodes, default=0),
    )


def num_concurrent(sweep: Sweep, room: Room) -> int:
    """How many trials run at once, so that none waits for what another holds.

    Raises ValueError where a trial does not fit at all: Tune would wait for ever.
    """
    needs = {name: need_of(config, sweep.tune) for name, config in sweep.trials.items()}
    fits = sweep.tune.max_concurrent or len(needs)
    for name, need in needs.items():
        if need.total_cpus > room.num_cpus or need.num_cpus > room.largest_node_cpus:
            raise ValueError(
                f"{name} needs {in_words(need)}; {room.where} has {room.num_cpus:g} CPUs, "
                f"{room.largest_node_cpus:g} on its largest node: lower tune.num_cpus, "
                "num_env_runners or num_workers"
            )
        if need.num_gpus > room.num_gpus:  # never so where the number is not known (NaN)
            raise ValueError(
                f"{name} needs {need.num_gpus:g} GPUs; {room.where} has {room.num_gpus:g}: "
                "lower tune.num_gpus"
            )
        fits = min(fits, int(room.num_cpus // need.total_cpus))
        if need.num_gpus and room.num_gpus == room.num_gpus:
            fits = min(fits, int(room.num_gpus / need.num_gpus + 1e-9))
    return max(1, min(fits, len(needs)))


def in_words(need: Need) -> str:
    """``1 CPU + 2 for env runners``."""
    parts = [f"{need.num_cpus} CPU" + "s" * (need.num_cpus != 1)]
    parts += [f"{need.num_runners} for env runners"] * bool(need.num_runners)
    parts += [f"{need.num_worker_cpus} for workers"] * bool(need.num_worker_cpus)
    parts += [f"{need.num_gpus:g} GPU"] * bool(need.num_gpus)
    return " + ".join(parts)
