"""A trained policy and its rivals on the same experiment: what they reach against frames spent.

A *seed* is one try: a cached sample of frames (simulated: another experiment) and the optimiser's
own luck. All contestants of a seed have the same sample. What is judged is the recommended setting,
on frames that no contestant has seen. Shape letters: S seeds, B budgets, V all tunables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.crystfel.env import Bench, IndexerBench, SurrogateBench
from envs.crystfel.indexer import Indexer
from envs.crystfel.rivals import RIVALS, Make, Trace, tune
from envs.crystfel.surrogate import (
    Kind,
    Sample,
    best_fraction,
    draw_experiments,
    true_fraction,
)
from envs.crystfel.types import BoolArray, FloatArray, Frame, IntArray, Parameters, TuningConfig
from ssl2rl_ray.stats import or_none, paired_difference, summarize
from ssl2rl_ray.tensorboard import TensorBoard
from ssl2rl_ray.tuning.policy import TuningPolicy

OnStep = Callable[[str, float, str | None], None]
"""``on_step(what, share, text)``"""
Judge = Callable[[FloatArray], FloatArray]
"""(E, V) settings of a bench's experiments -> (E,) indexed fraction on frames of their own."""

DEFAULT = ("keep-initial", "snr-grid", "coordinate", "rules", "tpe-warm", "gp-warm-free")
"""Rivals that are compared where none are named."""
RACING_FRAMES = 50
"""Frames on which a candidate is looked at first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """One or more experiments with those who judge."""

    bench: Bench
    judge: Judge


def contestants(names: Sequence[str], policies: Sequence[str] = ()) -> dict[str, Make]:
    """Rivals by name, then trained policies by their folder; raises ValueError for unknown ones."""
    if unknown := [name for name in names if name not in RIVALS]:
        raise ValueError(f"no rival is called {unknown[0]!r}; there are {', '.join(RIVALS)}")
    found: dict[str, Make] = {name: RIVALS[name] for name in names}
    for number, folder in enumerate(policies, 1):
        policy = TuningPolicy.load(folder)
        found[policy.name if len(policies) == 1 else f"{policy.name}-{number}"] = policy.make
    return found


def simulated(kind: Kind, num_seeds: int, num_frames: int, seed: int) -> list[Arena]:
    """``num_seeds`` simulated experiments side by side."""
    rng = np.random.default_rng([seed, 977])
    experiments = draw_experiments(rng, kind, num_seeds)
    bench = SurrogateBench(experiments, Sample.draw(rng, num_seeds, num_frames))
    return [Arena(bench=bench, judge=lambda values: true_fraction(experiments, values))]


def real(
    indexer: Indexer,
    frames: Sequence[Frame],
    nominal: Parameters,
    *,
    num_seeds: int,
    num_frames: int,
    num_judged: int,
    seed: int,
) -> list[Arena]:
    """One experiment, ``num_seeds`` samples of its frames.

    Each sample and the frames that judge it are disjoint. Raises ValueError where the experiment
    has fewer than both need.
    """
    if len(frames) < num_frames + num_judged:
        raise ValueError(
            f"{num_frames} frames to tune on and {num_judged} others to judge by are asked for, "
            f"and the experiment has {len(frames)}: lower --frames or --judge-frames"
        )
    arenas = []
    for number in range(num_seeds):
        order = np.random.default_rng([seed, number, 31]).permutation(len(frames))
        sample = [frames[i] for i in order[:num_frames]]
        judges = [frames[i] for i in order[num_frames : num_frames + num_judged]]
        bench = IndexerBench(indexer, sample, nominal)
        judge = IndexerBench(indexer, judges, nominal)
        arenas.append(Arena(bench=bench, judge=_judged_by(judge)))
    return arenas


def _judged_by(bench: IndexerBench) -> Judge:
    def judge(values: FloatArray) -> FloatArray:
        return bench.run([0], values, bench.num_frames).indexed_fraction

    return judge


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What each contestant reached."""

    budgets: IntArray
    """(B,) frames."""
    reached: Mapping[str, FloatArray]
    """(S, B) indexed fraction of the setting recommended after so many frames."""
    best: FloatArray
    """(S,) the highest known: of the simulation, or of any contestant."""
    agent_s: Mapping[str, float]
    """Seconds that a contestant thought, of all seeds."""
    num_evaluations: Mapping[str, float]
    """Mean over seeds."""
    policies: tuple[str, ...] = ()
    """Contestants that are one recipe, trained from several initialisations."""

    def band(self) -> tuple[FloatArray, FloatArray]:
        """(B,) mean of the policies' curves and the root mean square about it, as of the seed."""
        curves = np.array([self.reached[name].mean(0) for name in self.policies])
        return curves.mean(0), np.sqrt(((curves - curves.mean(0)) ** 2).mean(0))

    def frames_to(self, share: float) -> dict[str, FloatArray]:
        """(S,) frames until a share of the best is recommended; infinite = not within budget."""
        return {
            name: np.where(
                (is_there := reached >= share * self.best[:, None]).any(1),
                self.budgets[is_there.argmax(1)],
                np.inf,
            )
            for name, reached in self.reached.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Plain values: means with intervals, paired differences to the last contestant."""
        names = list(self.reached)
        ours = names[-1]
        to_95 = self.frames_to(0.95)
        band = None
        if len(self.policies) > 1:
            mean, rms = self.band()
            band = {"of": list(self.policies), "mean": mean.tolist(), "rms": rms.tolist()}
        return {
            "band": band,
            "budgets": self.budgets.tolist(),
            "num_seeds": len(self.best),
            "best_fraction": float(self.best.mean()),
            "contestants": {
                name: {
                    "fraction": [summarize(column).mean for column in reached.T],
                    "ci95": [[or_none(b) for b in summarize(column).ci95] for column in reached.T],
                    "share_of_best": float((reached[:, -1] / self.best).mean()),
                    "frames_to_95": or_none(float(np.median(to_95[name]))),
                    "num_evaluations": self.num_evaluations[name],
                    "agent_s": self.agent_s[name],
                    f"{ours}_minus_this": [
                        paired_difference(mine, theirs).mean
                        for mine, theirs in zip(self.reached[ours].T, reached.T, strict=True)
                    ],
                }
                for name, reached in self.reached.items()
            },
        }


def compare(
    arenas: Sequence[Arena],
    makes: Mapping[str, Make],
    config: TuningConfig,
    *,
    budget_frames: int,
    num_first_frames: int | None = RACING_FRAMES,
    best: FloatArray | None = None,
    num_budgets: int = 12,
    seed: int = 0,
    policies: Sequence[str] = (),
    on_step: OnStep | None = None,
) -> Comparison:
    """Lets every contestant tune every arena within a budget of frames.

    Args:
        arenas: see ``simulated`` and ``real``; S experiments in all.
        makes: contestants by name.
        config: which parameters; its ``num_frames`` are the arenas'.
        budget_frames: of each contestant and seed.
        num_first_frames: of racing, the same for all; None = no racing.
        best: (S,) the best that can be reached; None = the highest that anybody did.
        num_budgets: B, evenly spaced in the logarithm.
        seed: of the optimisers.
        policies: of the contestants, those that make a band (``Comparison.policies``).
        on_step: told what is under way.

    Raises:
        ValueError: a budget that is spent by the start alone.
    """
    num_frames = arenas[0].bench.num_frames
    if budget_frames < 2 * num_frames:
        raise ValueError(
            f"budget_frames: {budget_frames} is spent by two evaluations of {num_frames} frames; "
            "raise it or lower num_frames"
        )
    budgets = np.unique(np.geomspace(num_frames, budget_frames, num_budgets).astype(int))
    # a candidate that loses at once costs least
    first = num_first_frames or num_frames
    most = 1 + (budget_frames - first) // first
    reached: dict[str, list[FloatArray]] = {name: [] for name in makes}
    thought = dict.fromkeys(makes, 0.0)
    evaluated: dict[str, list[float]] = {name: [] for name in makes}
    num_done = 0
    for number, arena in enumerate(arenas):
        for name, make in makes.items():
            if on_step is not None:
                share = num_done / (len(arenas) * len(makes))
                on_step("comparing", share, f"{name}, seed {number + 1} of {len(arenas)}")
            clock = _Clock(arena.bench)
            begun = clock.now()
            trace = tune(
                clock,
                config,
                make,
                num_evaluations=most,
                rng=np.random.default_rng([seed, number]),
                num_first_frames=num_first_frames,
                budget_frames=budget_frames,
            )
            thought[name] += clock.now() - begun - clock.indexing_s
            reached[name].append(_judge(arena.judge, trace, budgets))
            evaluated[name].append(float((trace.num_frames <= budget_frames).sum(0).mean()))
            num_done += 1
    found = {name: np.concatenate(parts) for name, parts in reached.items()}
    highest = np.max([part.max(1) for part in found.values()], axis=0)
    return Comparison(
        budgets=budgets,
        reached=found,
        best=np.maximum(highest if best is None else best, 1e-9),
        agent_s=thought,
        num_evaluations={name: float(np.mean(counts)) for name, counts in evaluated.items()},
        policies=tuple(policies),
    )


class _Clock:
    """A bench that notes how long it takes."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.start, self.num_frames = bench, bench.start, bench.num_frames
        self.indexing_s = 0.0

    def now(self) -> float:
        import time

        return time.perf_counter()

    def run(self, rows: Any, values: FloatArray, num_frames: int) -> Any:
        begun = self.now()
        result = self.bench.run(rows, values, num_frames)
        self.indexing_s += self.now() - begun
        return result


def _judge(judge: Judge, trace: Trace, budgets: IntArray) -> FloatArray:
    """(E, B) of the settings recommended within each budget; equal ones are judged once."""
    columns: list[FloatArray] = []
    before: FloatArray | None = None
    for budget in budgets:
        is_within: BoolArray = trace.num_frames <= budget
        at = is_within.sum(0) - 1
        values = trace.best_values[at, np.arange(trace.best_values.shape[1])]
        is_same = before is not None and np.array_equal(values, before)
        columns.append(columns[-1] if is_same else judge(values))
        before = values
    return np.stack(columns, axis=1)


def best_of_simulated(arenas: Sequence[Arena]) -> FloatArray:
    """(S,) the best true fraction of simulated experiments."""
    (arena,) = arenas
    assert isinstance(arena.bench, SurrogateBench)
    return best_fraction(arena.bench.experiments, 1500)


def format_comparison(found: dict[str, Any]) -> str:
    """A table of ``Comparison.as_json``."""
    budgets = found["budgets"]
    shown = sorted({0, len(budgets) // 3, 2 * len(budgets) // 3, len(budgets) - 1})
    width = max(len(name) for name in found["contestants"])
    head = "".join(f"{budgets[i]:>18,}" for i in shown)
    lines = [
        f"indexed fraction of unseen frames by frames spent, mean [95 %] of {found['num_seeds']} "
        "seeds:",
        f"{'':<{width}}{head}   to 95 %",
    ]
    for name, row in found["contestants"].items():
        cells = ""
        for i in shown:
            low, high = row["ci95"][i]
            interval = "" if low is None else f" [{max(low, 0):.2f},{min(high, 1):.2f}]"
            cells += f"{row['fraction'][i]:.3f}{interval}".rjust(18)
        to_95 = row["frames_to_95"]
        lines.append(f"{name:<{width}}{cells}{'never' if to_95 is None else f'{to_95:,.0f}':>10}")
    if (band := found.get("band")) is not None:
        ends = f"{band['mean'][-1]:.3f} ± {band['rms'][-1]:.3f}"
        lines.append(f"{len(band['of'])} policies end at {ends} (root mean square about the mean)")
    return "\n".join(lines)


def log_comparison(found: dict[str, Any], board: TensorBoard) -> None:
    """Curves against frames spent, and the band of the policies, for TensorBoard."""
    for name, row in found["contestants"].items():
        for budget, fraction in zip(found["budgets"], row["fraction"], strict=True):
            board.log({f"compare/{name}": fraction}, budget)
    if (band := found.get("band")) is not None:
        tags = ("band/mean", "band/lower", "band/upper")
        for budget, mean, rms in zip(found["budgets"], band["mean"], band["rms"], strict=True):
            board.log(dict(zip(tags, (mean, mean - rms, mean + rms), strict=True)), budget)
        board.bands({"indexed fraction over initialisations": tags})


_COLOURS = ("#7a7a7a", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#0072b2")
_MARKERS = "xvs^DP*ohp"


def draw_comparison(found: dict[str, Any]) -> bytes:
    """PNG of the curves with their 95 % bands."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    band = found.get("band") or {"of": ()}
    rows = {name: row for name, row in found["contestants"].items() if name not in band["of"]}
    for number, (name, row) in enumerate(rows.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.plot(
            found["budgets"],
            row["fraction"],
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            label=name,
        )
        bands = np.array(row["ci95"], float)
        axes.fill_between(found["budgets"], *bands.T, color=colour, alpha=0.12, linewidth=0)
    if band["of"]:
        mean, rms = np.array(band["mean"]), np.array(band["rms"])
        axes.plot(found["budgets"], mean, color="#0072b2", marker="o", linewidth=2.5,
                  label=f"{len(band['of'])} policies (band: rms over trainings)")  # fmt: skip
        axes.fill_between(found["budgets"], mean - rms, mean + rms, color="#0072b2", alpha=0.25)
    axes.axhline(found["best_fraction"], color="#7a7a7a", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="frames spent", ylabel="indexed fraction of unseen frames")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
