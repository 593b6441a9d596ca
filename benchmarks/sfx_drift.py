"""Conditions that drift slowly: how many frames are lost by whom, at equal frames?

Run: ``python benchmarks/sfx_drift.py [--policy RUN ...] [--runs 20]`` (minutes on one core). Each
run is a simulated experiment that begins well tuned. Over 60 steps of 200 frames its distance moves
by 2.5 to 5 %, its beam centre by 1 to 3 px, and its background rises (noise peaks x 3 to 12). All
contestants go through the same online mode (``ssl2rl_ray.online.decide``): the same pipeline, the
same tests before parameters change, at most 200 frames a step to search and test with (nobody
rests, so that all may spend them); only who proposes differs. Loss: best fraction that the
experiment allows at the time minus the true fraction at the parameters deployed, mean over steps,
paired over runs. Conditions: ``distance``, ``background`` or both with the centre (``all``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from envs.crystfel.rivals import RIVALS, Make
from envs.crystfel.surrogate import (
    Experiments,
    Sample,
    SurrogateIndexer,
    at_optimum,
    best_fraction,
    draw_experiments,
    respond,
    true_fraction,
)
from envs.crystfel.types import (
    TUNABLES,
    FloatArray,
    Frame,
    IndexingResult,
    Parameters,
    concatenate,
)
from ssl2rl_ray.online.decide import (
    Event,
    Happened,
    Index,
    Indexed,
    OnlineConfig,
    Processed,
    Propose,
    Proposed,
    State,
    Tuner,
    Wait,
    begin,
    step,
    values_of,
)
from ssl2rl_ray.stats import paired_difference, summarize

NUM_STEPS, NUM_FRAMES = 60, 200
NUM_TRUTH = 1500
CONDITIONS = ("all", "distance", "background")
CONTESTANTS = (
    "keep-initial", "snr-grid", "random", "noise", "coordinate", "rules", "tpe-warm", "gp",
    "gp-warm", "gp-warm-free",
)  # fmt: skip


def drifting(condition: str, num_runs: int, seed: int, num_steps: int) -> list[Experiments]:
    """The experiments (R of them) at each step; they start well tuned."""
    rng = np.random.default_rng([seed, 60])
    base = tuned(draw_experiments(rng, "normal", num_runs))
    sign = rng.choice([-1.0, 1.0], num_runs)
    clen = sign * rng.uniform(2.5, 5.0, num_runs) * (condition != "background")
    angle = rng.uniform(0, 2 * np.pi, num_runs)
    centre = rng.uniform(1.0, 3.0, num_runs) * (condition == "all")
    direction = np.stack([np.cos(angle), np.sin(angle)], 1) * centre[:, None]
    junk = np.log(rng.uniform(3.0, 12.0, num_runs)) * (condition != "distance")
    return [
        dataclasses.replace(
            base,
            optimum_clen_percent=base.optimum_clen_percent + share * clen,
            optimum_centre_px=base.optimum_centre_px + share * direction,
            log_junk=base.log_junk + share * junk,
        )
        for share in np.linspace(0, 1, num_steps)
    ]


def tuned(experiments: Experiments) -> Experiments:
    """The same, the user's geometry being right and the user's settings the best of a grid."""
    right = dataclasses.replace(
        experiments,
        optimum_clen_percent=np.zeros(len(experiments)),
        optimum_centre_px=np.zeros((len(experiments), 2)),
    )
    best, start = np.full(len(right), -1.0), np.zeros_like(right.start)
    for snr in (3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.5, 10.0):  # the grid of ``best_fraction``
        for pixels in (2, 3, 4, 6):
            for threshold in (0.0, 10.0, 20.0, 40.0, 80.0, 160.0):
                values = at_optimum(right, snr, threshold, pixels)
                reached = true_fraction(right, values, NUM_TRUTH)
                start = np.where((reached > best)[:, None], values, start)
                best = np.maximum(best, reached)
    return dataclasses.replace(right, start=start)


class DriftingIndexer:
    """One run: a frame is indexed as the experiment was when it was taken."""

    version = "drifting surrogate"

    def __init__(self, steps: Sequence[Experiments], seed: int) -> None:
        """The run's experiment at each step."""
        self.steps, self.seed = steps, seed
        self.start = SurrogateIndexer(steps[0], num_frames=1).start
        self._samples: dict[int, Sample] = {}

    def frames(self, at: int, num: int = NUM_FRAMES) -> tuple[Frame, ...]:
        """Of a step."""
        return tuple(Frame(path=str(at), event=f"//{i}") for i in range(num))

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """As the protocol of indexers says."""
        parts, first = [], 0
        while first < len(frames):
            path, last = frames[first].path, first
            while last < len(frames) and frames[last].path == path:
                last += 1
            parts.append(self._run(parameters, int(path), frames[first:last]))
            first = last
        return concatenate(parts)

    def _run(self, parameters: Parameters, at: int, frames: Sequence[Frame]) -> IndexingResult:
        if at not in self._samples:
            rng = np.random.default_rng([self.seed, at])
            self._samples[at] = Sample.draw(rng, 1, NUM_FRAMES)
        rows = np.array([int(frame.event[2:]) for frame in frames])
        sample = self._samples[at].select(slice(None), rows)
        values = np.array([[getattr(parameters, name) for name in TUNABLES]], float)
        found = respond(self.steps[at], sample, values)
        ratio = float(found.cell_ratio[0])
        return IndexingResult(
            is_indexed=found.is_indexed[0],
            is_hit=found.is_hit[0],
            num_peaks=found.num_peaks[0],
            num_crystals=int(found.is_indexed.sum()),
            mean_cell=np.full(6, ratio),
            cell_ratio=ratio,
            residual_px=float(found.residual_px[0]),
            spot_shift_px=found.spot_shift_px[0],
            cpu_s=float(found.cpu_s[0]),
            version=self.version,
        )


def play(
    indexer: DriftingIndexer, make: Make, config: OnlineConfig, num_steps: int
) -> tuple[FloatArray, State, list[Happened]]:
    """(T, 7) the parameters deployed at each step, the last state, and the audit log."""
    tuner, state, deployed = Tuner(config, make), begin(indexer.start), []
    audit: list[Happened] = []
    for at in range(num_steps):
        deployed.append(values_of(state.incumbent)[0])
        batch = indexer.frames(at)
        done = indexer.run(state.incumbent, batch)
        decision = step(config, state, Processed(frames=batch, result=done, version=state.version))
        state = decision.state
        audit += decision.happened
        left = NUM_FRAMES
        while not isinstance(state.question, Wait):
            question = state.question
            if isinstance(question, Propose):
                assert state.search is not None
                event: Event = Proposed(parameters=tuner.propose(state.search))
            else:
                assert isinstance(question, Index)
                if len(question.frames) > left:
                    break
                left -= len(question.frames)
                event = Indexed(result=indexer.run(question.parameters, question.frames))
            decision = step(config, state, event)
            state = decision.state
            audit += decision.happened
    return np.array(deployed), state, audit


def measure(
    condition: str, makes: dict[str, Make], config: OnlineConfig, num_runs: int, seed: int
) -> dict[str, object]:
    steps = drifting(condition, num_runs, seed, NUM_STEPS)
    # on the same frames as the truth below, so that the best setting loses nothing; (T, R)
    best = np.stack([best_fraction(experiments, NUM_TRUTH) for experiments in steps])
    losses: dict[str, FloatArray] = {}
    rows: dict[str, object] = {}
    for name, make in makes.items():
        begun, lost, counts = time.perf_counter(), [], []
        for run in range(num_runs):
            mine = [experiments.select(slice(run, run + 1)) for experiments in steps]
            deployed, state, _ = play(
                DriftingIndexer(mine, 1000 * seed + run), make, config, NUM_STEPS
            )
            reached = true_fraction(Experiments.join(mine), deployed, NUM_TRUTH)
            lost.append(np.maximum(best[:, run], reached) - reached)
            counts.append((state.num_deployed, state.num_searched + state.num_tested))
        losses[name] = np.array(lost).mean(1)
        deployments, frames = np.mean(counts, axis=0)
        rows[name] = {
            "loss": summarize(losses[name]).as_json(),
            "num_deployed": float(deployments),
            "num_frames": float(frames),
            "wall_s": time.perf_counter() - begun,
        }
        print(f"{condition:<11}{name:<16} loss {losses[name].mean():.4f}  deployed "
              f"{deployments:.1f}  frames {frames:.0f}  {time.perf_counter() - begun:.0f} s",
              flush=True)  # fmt: skip
    ours = next(reversed(makes))
    keep = losses["keep-initial"]
    for name, lost in losses.items():
        against = paired_difference(losses[ours], lost)
        print(
            f"{condition:<11}{name:<16} loss {lost.mean():.4f} = {lost.mean() / keep.mean():.2f} x "
            f"keep-initial; {ours} minus this {against.mean:+.4f} ± {against.half_width:.4f}"
        )
        rows[name] |= {"of_keep_initial": float(lost.mean() / keep.mean())}  # type: ignore[operator]
    return {"best_fraction": float(best.mean()), "contestants": rows, "num_runs": num_runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", action="append", default=[], metavar="RUN")
    parser.add_argument("--only", metavar="NAME,NAME", help="rivals")
    parser.add_argument("--condition", choices=CONDITIONS, action="append")
    parser.add_argument("--rule", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.only.split(",") if args.only else CONTESTANTS
    makes: dict[str, Make] = {name: RIVALS[name] for name in names}
    for number, folder in enumerate(args.policy, 1):
        from ssl2rl_ray.tuning.policy import TuningPolicy

        makes[f"policy-{number}"] = TuningPolicy.load(folder).make
    rules = {}
    for text in args.rule:
        name, _, value = text.partition("=")
        rules[name] = float(value) if "." in value else int(value)
    config = OnlineConfig(**({"control_every": 0, "rest_frames": 0} | rules))
    found = {
        condition: measure(condition, makes, config, args.runs, args.seed)
        for condition in args.condition or CONDITIONS
    }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
