"""Training of the classifier against the bare network, and two workers against one.

1. Images per second of ``Fit.epoch`` (batches, views, loss, step, average, figures) against forward
   and backward of the same network on float tensors in memory: same batch size, same threads.
   Time is CPU time with one thread, wall time with more. Each round times one epoch and as many
   bare steps, in turn; the figure is the median of the rounds' ratios. Bars: supervised 0.85,
   FixMatch 0.75.
2. Images per second of two workers of Ray Train, one thread each, against one of them alone. Each
   round trains an epoch of one alone, of both side by side with nothing shared (what the machine
   itself allows), and of both as a group. Bar: 1.7. Wall time: what else the machine does is in
   it; the ratio of CPU times is not, nor is it what a worker waits for the other.

Batches are the paper's: 64 labelled images; FixMatch has 256 weak and 256 strong views besides.
Images have 32 px. Usage: python benchmarks/perception_throughput.py [--only bare] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ssl2rl_ray.config import PerceptionTrainingConfig
from ssl2rl_ray.local_ray import local_ray
from ssl2rl_ray.perception.classifier import NetworkName, make_classifier
from ssl2rl_ray.perception.distributed import report, run_workers
from ssl2rl_ray.perception.fit import Examples, Fit
from ssl2rl_ray.perception.losses import supervised_loss

Method = Literal["supervised", "fixmatch"]

BARS: dict[Method, float] = {"supervised": 0.85, "fixmatch": 0.75}
BAR_WORKERS = 1.7
BATCH = 64
VIEWS: dict[Method, int] = {"supervised": BATCH, "fixmatch": 9 * BATCH}
"""Images that the network sees in a step."""
STEPS: dict[NetworkName, dict[Method, int]] = {
    "cnn": {"supervised": 40, "fixmatch": 8},
    "resnet18": {"supervised": 3, "fixmatch": 1},
}
"""Steps of an epoch."""


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    begun = clock()
    call()
    return clock() - begun


def fit_of(network: NetworkName, method: Method, *, rank: int = 0, num_workers: int = 1) -> Fit:
    rng = np.random.default_rng(0)
    n, num_labelled = 8653, BATCH * STEPS[network][method]  # holes of the paper's Y3
    is_low = rng.random(n) < 0.5
    return Fit(
        PerceptionTrainingConfig(method=method, batch_size=BATCH, num_epochs=10**6),
        make_classifier(network, 32),
        Examples(
            images=rng.integers(0, 256, (n, 32, 32), dtype=np.uint8),
            labelled=np.arange(num_labelled),
            is_low=is_low,
            unlabelled=np.arange(num_labelled, n),
            validation=np.zeros(0, np.int64),
            truth=is_low.astype(float),
        ),
        seed=0,
        rank=rank,
        num_workers=num_workers,
    )


def against_bare(network: NetworkName, method: Method, num_threads: int, num_rounds: int) -> None:
    """``Fit.epoch`` and the bare network in turn; prints the median of the ratios."""
    torch.set_num_threads(num_threads)
    clock = time.process_time if num_threads == 1 else time.perf_counter
    steps, views = STEPS[network][method], VIEWS[method]
    fit = fit_of(network, method)
    bare = copy.deepcopy(fit.classifier).train()
    images = torch.rand(views, 1, 32, 32).to(memory_format=torch.channels_last)
    label = (torch.rand(views) < 0.5).float()

    def bare_steps() -> None:
        for _ in range(steps):
            for parameter in bare.parameters():
                parameter.grad = None
            supervised_loss(bare(images), label).backward()

    fit.epoch()
    bare_steps()
    ours, by_hand = (
        np.array(times)
        for times in zip(
            *((seconds(fit.epoch, clock), seconds(bare_steps, clock)) for _ in range(num_rounds)),
            strict=True,
        )
    )
    ratio = float(np.median(by_hand / ours))
    per_s = steps * views / np.array([np.median(by_hand), np.median(ours)])
    print(
        f"{network}, {method}, {num_threads} threads: images/s bare {per_s[0]:,.0f}, training "
        f"{per_s[1]:,.0f}; ratio {ratio:.2f} (bar {BARS[method]:.2f})",
        flush=True,
    )


def two_workers(network: NetworkName, method: Method, num_rounds: int) -> None:
    """Trains under Ray Train, one worker and both in turn; prints the ratio of their speeds."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        run_workers(
            in_turn,
            {"network": network, "method": method, "num_rounds": num_rounds},
            folder=Path(folder),
            num_workers=2,
            num_cpus=1,
            is_on_gpu=False,
            on_report=lambda content, saved: rows.append(content),
            is_stopping=lambda: False,
        )
    speeds = {key: np.array([row[key] for row in rows[1:]]) for key in rows[0]}
    one, two = np.median(speeds["one"]), np.median(speeds["two"])
    per_round = speeds["two"] / speeds["one"]
    print(
        f"{network}, {method}: images/s one worker {one:,.0f}, two {two:,.0f}; ratio "
        f"{np.median(per_round):.2f} (bar {BAR_WORKERS}), best round {per_round.max():.2f}; two "
        f"that share nothing {np.median(speeds['apart'] / speeds['one']):.2f}; CPU time of a "
        f"worker for one, in a pair: {np.median(speeds['cpu one'] / speeds['cpu two']):.2f}",
        flush=True,
    )


def in_turn(task: dict[str, Any]) -> None:
    """In each of two workers: an epoch of the first alone, of both apart, of both together."""
    from ray import train

    torch.set_num_threads(1)
    rank = train.get_context().get_world_rank()
    alone, together = (
        fit_of(task["network"], task["method"], rank=rank, num_workers=n) for n in (1, 2)
    )
    for _ in range(task["num_rounds"] + 1):
        torch.distributed.barrier()
        begun = time.process_time()
        one = alone.epoch()["train/images_per_s"] if rank == 0 else 0.0
        cpu_one = time.process_time() - begun
        torch.distributed.barrier()
        apart = torch.tensor(alone.epoch()["train/images_per_s"])
        torch.distributed.all_reduce(apart)
        begun = time.process_time()
        two = together.epoch()["train/images_per_s"]
        cpu_two = time.process_time() - begun
        found = {"one": one, "apart": float(apart), "two": two}
        found |= {"cpu one": cpu_one, "cpu two": cpu_two}
        report(found if rank == 0 else None, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("bare", "workers"), help="one part of it")
    networks, methods = get_args(NetworkName), get_args(Method)
    parser.add_argument("--networks", nargs="+", default=networks, choices=networks)
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="of part 1")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    pairs = [(network, method) for network in args.networks for method in args.methods]
    if args.only != "workers":
        for network, method in pairs:
            for num_threads in args.threads:
                against_bare(network, method, num_threads, args.rounds)
    if args.only != "bare":
        with local_ray(2):
            for network, method in pairs:
                two_workers(network, method, args.rounds)


if __name__ == "__main__":
    main()
