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
    num_workers: int
    """Of Ray Train, which makes a placement group of its own."""
    cpus_per_worker: int
    device: str
    """Of the workers: ``cpu``, ``cuda``, or ``auto``: a GPU each where the cluster has as many."""

    @property
    def num_worker_cpus(self) -> int:
        """Of all workers."""
        return self.num_workers * self.cpus_per_worker

    @property
    def total_cpus(self) -> int:
        """All of it: what must be there for the trial to get anywhere."""
        return self.num_cpus + self.num_runners + self.num_worker_cpus

    def total_gpus(self, num_there: float) -> float:
        """All of them on a cluster of so many."""
        is_on_gpu = self.device == "cuda" or (
            self.device == "auto" and num_there >= self.num_workers
        )
        return self.num_gpus + self.num_workers * is_on_gpu


def need_of(config: RunConfig, tune: TuneConfig) -> Need:
    """What a trial of this config takes; stages of one run come one after the other."""
    found = [section for _, section in sections(to_dict(config))]
    threads = [s["num_torch_threads"] for s in found if "num_torch_threads" in s]
    with_workers = next((s for s in found if s.get("num_workers", 0) > 0), {})
    return Need(
        num_cpus=max(threads, default=1) if tune.num_cpus is None else tune.num_cpus,
        num_gpus=tune.num_gpus,
        num_runners=max((s.get("num_env_runners", 0) for s in found), default=0),
        num_workers=with_workers.get("num_workers", 0),
        cpus_per_worker=with_workers.get("num_torch_threads", 1),
        device=with_workers.get("device", "cpu"),
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is to run on."""

    where: str
    node_cpus: tuple[float, ...]
    """CPUs of each node."""
    num_gpus: float
    """NaN = not known."""

    @property
    def num_cpus(self) -> float:
        """Of all nodes."""
        return sum(self.node_cpus)


def find_room() -> Room:
    """The cluster of RAY_ADDRESS (looked at), or this machine (without starting anything)."""
    if not os.environ.get("RAY_ADDRESS"):
        return Room(where="this machine", node_cpus=(own_cpus(),), num_gpus=float("nan"))
    with local_ray(1):
        return cluster_room()


def own_cpus() -> int:
    """CPUs that this process may use; Ray of our own has at least two."""
    count = getattr(os, "sched_getaffinity", None)
    return max(2, len(count(0)) if count else os.cpu_count() or 1)


def cluster_room() -> Room:
    """Of the Ray that this process is connected to."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Room(
        where=f"the Ray cluster of {len(nodes)} node" + "s" * (len(nodes) != 1),
        node_cpus=tuple(node.get("CPU", 0) for node in nodes),
        num_gpus=sum(node.get("GPU", 0) for node in nodes),
    )


def num_concurrent(sweep: Sweep, room: Room) -> int:
    """How many trials run at once, so that none waits for what another holds.

    Raises ValueError where a trial does not fit at all: Tune would wait for ever.
    """
    fits = sweep.tune.max_concurrent or len(sweep.trials)
    asked: dict[Need, str] = {}  # of equal needs, the first trial
    for name, config in sweep.trials.items():
        asked.setdefault(need_of(config, sweep.tune), name)
    for need, name in asked.items():
        fits = min(fits, _fitting(need, name, room))
    return max(1, min(fits, len(sweep.trials)))


def _fitting(need: Need, name: str, room: Room) -> int:
    """How many trials of a need there is room for; raises ValueError where there is for none."""
    largest = max(room.node_cpus, default=0)
    if need.total_cpus > room.num_cpus or need.num_cpus > largest:
        raise ValueError(
            f"{name} needs {in_words(need)}; {room.where} has {room.num_cpus:g} CPUs, "
            f"{largest:g} on its largest node: lower tune.num_cpus, num_env_runners or num_workers"
        )
    num_gpus = need.total_gpus(room.num_gpus)
    if num_gpus > room.num_gpus:  # never so where the number is not known
        raise ValueError(
            f"{name} needs {num_gpus:g} GPUs; {room.where} has {room.num_gpus:g}: lower "
            "tune.num_gpus or num_workers, or set compute.device cpu"
        )
    fits = int(room.num_cpus // need.total_cpus)
    if num_gpus and room.num_gpus == room.num_gpus:
        fits = min(fits, int(room.num_gpus / num_gpus + 1e-9))
    num_held = need.num_cpus + need.num_runners
    while fits and _num_left(room, fits * num_held, need.cpus_per_worker) < need.num_workers:
        fits -= 1
    if not fits:
        raise ValueError(
            f"{name} needs {need.num_workers} workers of {need.cpus_per_worker} CPUs each, and "
            f"nodes of {', '.join(f'{cpus:g}' for cpus in room.node_cpus)} CPUs may not hold them "
            "beside it: lower the workers' num_torch_threads or num_workers"
        )
    return fits


def _num_left(room: Room, num_held: float, cpus_per_worker: int) -> int:
    """Workers that still find a place, wherever others took so many CPUs: the worst case.

    A node has places of ``cpus_per_worker``; the first is lost when what is over is taken and one
    CPU more, each other one by ``cpus_per_worker`` CPUs.
    """
    prices = []
    for cpus in room.node_cpus:
        num_places, over = divmod(cpus, cpus_per_worker)
        prices += [over + 1, *[cpus_per_worker] * int(num_places)][: int(num_places)]
    left = len(prices)
    for price in sorted(prices):
        if price > num_held:
            break
        num_held -= price
        left -= 1
    return left


def in_words(need: Need) -> str:
    """``1 CPU + 2 for env runners``."""
    parts = [f"{need.num_cpus} CPU" + "s" * (need.num_cpus != 1)]
    parts += [f"{need.num_runners} for env runners"] * bool(need.num_runners)
    parts += [f"{need.num_worker_cpus} for workers"] * bool(need.num_worker_cpus)
    parts += [f"{need.num_gpus:g} GPU"] * bool(need.num_gpus)
    return " + ".join(parts)
