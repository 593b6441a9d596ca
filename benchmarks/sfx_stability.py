"""Online tuning of what is well tuned, and of what is not: who makes it worse?

Run: ``python benchmarks/sfx_stability.py [--policy RUN ...] [--runs 20]`` (minutes on one core).
``optimum``: simulated experiments that begin at the right geometry with the best settings of a grid
and do not change; for 60 steps of 200 frames the tuner searches on without a rest, the hardest case
for its test. A deployment is harmful where its true fraction, on 12,000 frames that nobody has
seen, is below that of what it replaced by more than the paired 95 % interval. Beside them stands
what the test kept out: harmful ones among all candidates that were best on a cache. ``bad start``:
the same from bad starts. Several policies (training seeds) give a band, as the seed of this work
showed it (root mean square about their mean); ``--figure`` draws it, ``--tensorboard`` logs it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from sfx_drift import NUM_FRAMES, NUM_STEPS, DriftingIndexer, play, tuned

from envs.crystfel.rivals import RIVALS, Make
from envs.crystfel.surrogate import (
    Experiments,
    Sample,
    best_fraction,
    draw_experiments,
    respond,
    true_fraction,
)
from envs.crystfel.types import BoolArray, FloatArray, Parameters
from ssl2rl_ray.online.decide import OnlineConfig, values_of

NUM_TRUTH = 12_000
CONTESTANTS = ("noise", "coordinate", "rules", "gp-warm-free")


def truth(experiment: Experiments, parameters: list[Parameters]) -> BoolArray:
    """(n, NUM_TRUTH) flags of an experiment on the same unseen frames at each setting."""
    sample = Sample.draw(np.random.default_rng(90_210), 1, NUM_TRUTH)
    rows = [respond(experiment, sample, values_of(p)).is_indexed[0] for p in parameters]
    return np.array(rows)


def harm(before: BoolArray, after: BoolArray) -> tuple[float, float]:
    """Difference of the fractions and half its paired 95 % interval."""
    d = after.astype(float) - before
    return float(d.mean()), float(1.96 * d.std() / np.sqrt(len(d)))


def measure(
    starts: Experiments, makes: dict[str, Make], config: OnlineConfig, seed: int
) -> dict[str, Any]:
    best = best_fraction(starts, 1500)
    found: dict[str, Any] = {"best_fraction": float(best.mean()), "contestants": {}}
    for name, make in makes.items():
        rows: list[dict[str, Any]] = []
        curves = []
        for run in range(len(starts)):
            mine = starts.select(slice(run, run + 1))
            indexer = DriftingIndexer([mine] * NUM_STEPS, 1000 * seed + run)
            deployed, _, audit = play(indexer, make, config, NUM_STEPS)
            incumbents, tests = [indexer.start], []
            for note in audit:
                if note["what"] in ("deployed", "refused"):
                    candidate = Parameters(**note["parameters"])
                    tests.append((len(incumbents) - 1, candidate, note["what"] == "deployed"))
                    if note["what"] == "deployed":
                        incumbents.append(candidate)
            flags = truth(mine, incumbents)
            judged = [
                (*harm(flags[at], truth(mine, [candidate])[0]), is_deployed)
                for at, candidate, is_deployed in tests
            ]
            to_start = [harm(flags[0], after) for after in flags]
            rows.append(
                {
                    "num_tests": len(judged),
                    "num_deployed": sum(d for _, _, d in judged),
                    "num_harmful_tested": sum(m < -h for m, h, _ in judged),
                    "num_harmful_deployed": sum(m < -h for m, h, d in judged if d),
                    "lowest": min(m for m, _ in to_start),
                    "is_below_start": any(m < -h for m, h in to_start),
                    "gain": to_start[-1][0],
                }
            )
            values, which = np.unique(deployed, axis=0, return_inverse=True)
            reached = np.concatenate([true_fraction(mine, row[None], 1500) for row in values])
            curves.append(reached[which.ravel()])
        total = {key: float(np.sum([row[key] for row in rows])) for key in rows[0]}
        found["contestants"][name] = total | {
            "lowest": float(min(row["lowest"] for row in rows)),
            "gain": float(np.mean([row["gain"] for row in rows])),
            "curve": np.mean(curves, axis=0).tolist(),
        }
        t = found["contestants"][name]
        print(
            f"{name:<14} {t['num_deployed']:.0f} deployed, harmful {t['num_harmful_deployed']:.0f};"
            f" {t['num_tests']:.0f} tested, harmful {t['num_harmful_tested']:.0f}; runs ever below "
            f"their start {t['is_below_start']:.0f} of {len(rows)}, lowest {t['lowest']:+.4f}; "
            f"gain at the end {t['gain']:+.4f}; loss at the end "
            f"{best.mean() - t['curve'][-1]:.4f}",
            flush=True,
        )
    return found


def band(found: dict[str, Any], names: list[str]) -> tuple[FloatArray, FloatArray]:
    """(T,) mean of the policies' curves and the root mean square about it."""
    curves = np.array([found["contestants"][name]["curve"] for name in names])
    return curves.mean(0), np.sqrt(((curves - curves.mean(0)) ** 2).mean(0))


def draw(found: dict[str, dict[str, Any]], policies: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    x = NUM_FRAMES * np.arange(NUM_STEPS)
    for axes, (condition, result) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        axes.set_prop_cycle(color=["#e69f00", "#009e73", "#cc79a7", "#d55e00"])
        for name, row in result["contestants"].items():
            if name not in policies:
                kept = {"color": "#7a7a7a"} if name == "keep-initial" else {}
                axes.plot(x, row["curve"], label=name, linewidth=1, **kept)
        if policies:
            mean, rms = band(result, policies)
            axes.plot(x, mean, color="#0072b2", label=f"{len(policies)} policies", linewidth=2)
            axes.fill_between(x, mean - rms, mean + rms, color="#0072b2", alpha=0.2)
        axes.axhline(result["best_fraction"], color="#7a7a7a", linestyle=":", label="best")
        axes.set(title=f"from {condition}", xlabel="frames processed", ylabel="indexed fraction")
        axes.set_ylim(0, 1.08 * result["best_fraction"])
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def log(found: dict[str, dict[str, Any]], policies: list[str], folder: Path) -> None:
    from ssl2rl_ray.tensorboard import TensorBoard

    with TensorBoard(folder) as board:
        for condition, result in found.items():
            kept = result["contestants"]["keep-initial"]["curve"]
            names = [f"{condition}/{name}" for name in ("mean", "lower", "upper", "keep-initial")]
            for at, (mean, rms, initial) in enumerate(
                zip(*band(result, policies), kept, strict=True)
            ):
                values = (mean, mean - rms, mean + rms, initial)
                board.log(dict(zip(names, values, strict=True)), NUM_FRAMES * at)
        board.bands({f"from {c}": (f"{c}/mean", f"{c}/lower", f"{c}/upper") for c in found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", action="append", default=[], metavar="RUN")
    parser.add_argument("--only", metavar="NAME,NAME", help="rivals")
    parser.add_argument("--figure", type=Path, metavar="PNG")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = ("keep-initial", *(args.only.split(",") if args.only else CONTESTANTS))
    makes: dict[str, Make] = {name: RIVALS[name] for name in names}
    policies = []
    for number, folder in enumerate(args.policy, 1):
        from ssl2rl_ray.tuning.policy import TuningPolicy

        makes[f"policy-{number}"] = TuningPolicy.load(folder).make
        policies.append(f"policy-{number}")
    config = OnlineConfig(control_every=0, rest_frames=0)
    drawn = draw_experiments(np.random.default_rng([args.seed, 61]), "normal", args.runs)
    found = {}
    for condition, starts in (("optimum", tuned(drawn)), ("bad start", drawn)):
        print(f"-- from {condition}")
        found[condition] = measure(starts, makes, config, args.seed)
    if policies:
        for condition, result in found.items():
            mean, rms = band(result, policies)
            print(f"from {condition}: policies end at {mean[-1]:.4f} ± {rms[-1]:.4f} (rms)")
    if args.figure:
        draw(found, policies, args.figure)
    if args.tensorboard and policies:
        log(found, policies, args.tensorboard)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
