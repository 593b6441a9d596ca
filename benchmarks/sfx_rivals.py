"""Does a policy trained on simulated experiments tune better than what a user would take instead?

Run: ``python benchmarks/sfx_rivals.py --runs DIR`` (four policies of five minutes each are trained
into DIR where they are missing; the comparison takes about four minutes on one core, most of it
TPE's). Everything is measured in one run, on simulated experiments of their own seed: ``normal``
ones and the ``harder`` kind, on which no weights were trained. The kinds themselves were known: the
recipe was chosen on other draws of both, so this is new draws of known kinds, not a kind that
nobody had seen. Seven parameters, 200 frames an evaluation, the start being the first of n.

1. Share of the best true fraction after n evaluations, no racing. "Best" is the highest of an
   exhaustive grid at the right geometry and of whatever any contestant reached. Intervals are 95 %
   over experiments; the policy's is the mean of its training seeds, each of which is shown too.
2. Paired differences, policy minus rival, on the same experiments and frames.
3. Frames to 95 % of the best, with racing (50 frames first) against without: median, and ratio.
4. The policy's share of the time of a tuning step, on one experiment.

Bars: .85 at 10 and .92 at 20; above both TPEs; ahead of all on the harder kind at 20; racing at
most .65x; at most 1 % of a step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from envs.crystfel.env import IndexerBench, Outcome, SurrogateBench
from envs.crystfel.rivals import RIVALS, Make, Trace, Trial, tune
from envs.crystfel.surrogate import (
    Experiments,
    Kind,
    Sample,
    SurrogateIndexer,
    best_fraction,
    draw_experiments,
    nominal_experiment,
    true_fraction,
)
from envs.crystfel.types import FloatArray, IntArray, TuningConfig
from ssl2rl_ray.stats import or_none, summarize
from ssl2rl_ray.tuning.policy import TuningPolicy

CONFIG = Path(__file__).parents[1] / "tune_configs" / "crystfel_ppo.yaml"
EXPERIMENTS_SEED = 20_261_121
AT = (10, 20, 40)
RACING_FRAMES, RACING_BUDGET = 50, 4000
EMBEDDED_FRAMES_PER_S = 80.0
"""Of the embedded pipeline, which is faster than CrystFEL: a tuning step is not shorter."""


def policies(folder: Path, num_seeds: int) -> dict[str, TuningPolicy]:
    """Trained by ``tune_configs/crystfel_ppo.yaml``, one a seed; missing ones are trained."""
    from ssl2rl_ray.config import load_config
    from ssl2rl_ray.launch import run_config

    found = {}
    for seed in range(num_seeds):
        run = folder / f"seed-{seed}"
        if not (run / "summary.json").is_file():
            resume = (run / "manifest.json").is_file()
            run_config(load_config(CONFIG, [f"seed={seed}"]), run, resume=resume)
        found[f"ppo seed {seed}"] = TuningPolicy.load(run)
    return found


def shares(experiments: Experiments, traces: dict[str, Trace], num: int) -> dict[str, FloatArray]:
    """(n, E) share of the best after each evaluation, by contestant."""
    reached: dict[str, FloatArray] = {}
    for name, trace in traces.items():
        rows: list[FloatArray] = []
        for i in range(num):
            values = trace.best_values[i]
            same = i > 0 and np.array_equal(values, trace.best_values[i - 1])
            rows.append(rows[-1] if same else true_fraction(experiments, values))
        reached[name] = np.stack(rows)
    best = best_fraction(experiments, 1500)
    best = np.maximum(best, np.max([rows.max(0) for rows in reached.values()], axis=0))
    return {name: rows / best for name, rows in reached.items()}


def frames_to(share: FloatArray, num_frames: IntArray, level: float = 0.95) -> FloatArray:
    """(E,) frames until a share is reached; infinite = not within ``RACING_BUDGET``."""
    is_there = (share >= level) & (num_frames <= RACING_BUDGET)
    first = is_there.argmax(0)
    return np.where(is_there.any(0), num_frames[first, np.arange(share.shape[1])], np.inf)


def agent_share(policy: TuningPolicy, num_steps: int = 200) -> tuple[float, float]:
    """Seconds of the policy in a step of one experiment, and its share of the step's time."""
    indexer = SurrogateIndexer(nominal_experiment(), num_frames=200)
    bench = IndexerBench(indexer, indexer.frames, indexer.start)
    outcome = Outcome.of(bench.run([0], bench.start, 200))
    optimiser = policy.make(policy.config, bench.start, outcome, np.random.default_rng(0))
    optimiser.ask()
    begun = time.perf_counter()
    for _ in range(num_steps):
        unit = optimiser.ask()
        optimiser.tell(
            Trial(unit=unit, outcome=outcome, gain=np.zeros(1), best_fraction=np.ones(1))
        )
    seconds = (time.perf_counter() - begun) / num_steps
    return seconds, seconds / (seconds + 200 / EMBEDDED_FRAMES_PER_S)


def measure(
    kind: Kind, num_experiments: int, makes: dict[str, Make], num_policies: int
) -> dict[str, Any]:
    """All figures of one kind."""
    rng = np.random.default_rng([EXPERIMENTS_SEED, ("normal", "harder").index(kind)])
    experiments = draw_experiments(rng, kind, num_experiments)
    bench = SurrogateBench(experiments, Sample.draw(rng, num_experiments, 200))
    config = TuningConfig()
    traces: dict[str, Trace] = {}
    raced: dict[str, Trace] = {}
    for name, make in makes.items():
        begun = time.perf_counter()
        traces[name] = tune(
            bench, config, make, num_evaluations=max(AT), rng=np.random.default_rng(1)
        )
        if name.startswith("ppo") or name == "rules":  # a GP of 80 points takes minutes
            raced[name] = tune(
                bench, config, make, num_evaluations=4 * max(AT), rng=np.random.default_rng(1),
                num_first_frames=RACING_FRAMES, budget_frames=200 * max(AT),
            )  # fmt: skip
        print(f"{kind} {name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    plain = shares(experiments, traces, max(AT))
    ours = np.mean([plain[name] for name in list(makes)[-num_policies:]], axis=0)
    rows: dict[str, FloatArray] = {**plain, "ppo": ours}
    table = {name: {n: _interval(rows[name][n - 1]) for n in AT} for name in [*list(makes), "ppo"]}
    against = {
        name: {n: _interval(ours[n - 1] - plain[name][n - 1]) for n in AT}
        for name in list(makes)[:-num_policies]
    }
    racing = {}
    for name, trace in raced.items():
        num = len(trace.num_frames)
        share = shares(experiments, {name: trace}, num)[name]
        slow = frames_to(plain[name], traces[name].num_frames)
        fast = frames_to(share, trace.num_frames)
        medians = float(np.median(slow)), float(np.median(fast))
        racing[name] = {
            "without": medians[0],
            "with": medians[1],
            "ratio": medians[1] / medians[0] if np.isfinite(medians[0]) else float("nan"),
            "reached_without": float(np.isfinite(slow).mean()),
            "reached_with": float(np.isfinite(fast).mean()),
        }
    return {"share": table, "ppo_minus": against, "racing": racing}


def _interval(values: FloatArray) -> tuple[float, float, float]:
    found = summarize(values)
    return found.mean, *found.ci95


def _plain(value: Any) -> Any:
    """With null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return or_none(value) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="where the policies are")
    parser.add_argument("--policies", type=int, default=4, help="training seeds")
    parser.add_argument("--experiments", type=int, default=200)
    parser.add_argument("--against", help="rivals, comma-separated (all)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trained = policies(args.runs, args.policies)
    names = list(RIVALS) if args.against is None else args.against.split(",")
    makes = {name: RIVALS[name] for name in names}
    makes |= {name: policy.make for name, policy in trained.items()}
    found: dict[str, Any] = {}
    for kind in ("normal", "harder"):
        found[kind] = result = measure(kind, args.experiments, makes, len(trained))
        print(f"\n{kind}: {args.experiments} unseen experiments, share of the best after n")
        print(f"  {'':<14}" + "".join(f"{f'n={n}':>20}" for n in AT))
        for name, row in result["share"].items():
            cells = "".join(f"{f'{m:.3f} [{a:.3f}, {b:.3f}]':>24}" for m, a, b in row.values())
            print(f"  {name:<14}{cells}")
        print("  policy minus rival, paired")
        for name, row in result["ppo_minus"].items():
            cells = "".join(f"{f'{m:+.3f} [{a:+.3f}, {b:+.3f}]':>27}" for m, a, b in row.values())
            print(f"  {name:<14}{cells}")
        print("  median frames to 95 % of the best: without racing, with, ratio")
        for name, row in result["racing"].items():
            within = f"{row['reached_without']:.0%}, {row['reached_with']:.0%}"
            print(
                f"  {name:<14}{row['without']:>8,.0f}{row['with']:>8,.0f}{row['ratio']:>8.2f}"
                f"   (within {RACING_BUDGET}: {within})"
            )
    seconds, share = agent_share(next(iter(trained.values())))
    found["agent"] = {"step_s": seconds, "share": share}
    print(
        f"\nagent: {1e3 * seconds:.2f} ms of a step, {share:.3%} of the time where 200 frames are "
        f"indexed at {EMBEDDED_FRAMES_PER_S:g} frames/s"
    )
    if args.json:
        args.json.write_text(json.dumps(_plain(found), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
