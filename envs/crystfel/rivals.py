"""What a user would take instead of RL, behind one ask/tell shape, and the loop that drives it.

Everything works on E experiments side by side; a real one is E = 1. Shape letters: E experiments,
K parameters that are tuned (units 0..1, ``env.Scale``), V = 7 all tunables, N cached frames, n
evaluations, the start included, C candidates.

| name | what it does |
|---|---|
| keep-initial | nothing |
| snr-grid | a scan of the SNR, as most pipelines do |
| random | uniform within the bounds |
| noise | Gaussian changes of the best so far: an agent's exploration without its network |
| coordinate | one parameter at a time, up or down, steps halved where neither helps |
| rules | defaults, distance from the cell ratio, centre from the spots' shift, then coordinate |
| tpe, tpe-warm | Optuna's TPE (Bergstra et al. 2011), cold or after settings tuned on simulations |
| gp | Gaussian process with expected improvement (Jones et al. 1998), cold |
| gp-warm, gp-warm-free | begins with those settings; and with the two corrections of ``rules`` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from envs.crystfel.env import (
    CELL_SCALE,
    FREE_OUTPUTS,
    SHIFT_SCALE_PX,
    Bench,
    Outcome,
    Progress,
    scale_of,
)
from envs.crystfel.surrogate import (
    BatchResult,
    best_fraction,
    draw_experiments,
    true_fraction,
)
from envs.crystfel.types import TUNABLES, BoolArray, FloatArray, IntArray, TuningConfig

# ---- the loop ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """An evaluation of E experiments, as an optimiser is told it."""

    unit: FloatArray
    """(E, K) as evaluated: integers are whole."""
    outcome: Outcome
    gain: FloatArray
    """(E,) indexed fraction minus that of the best so far, on the frames that both have seen."""
    best_fraction: FloatArray
    """(E,) of that best, as known by now: racing refines it."""


class Optimiser(Protocol):
    """Proposes parameters, is told what they give."""

    def ask(self) -> FloatArray:
        """(E, K) units to evaluate next."""
        ...

    def tell(self, trial: Trial) -> None:
        """What the last proposal gave."""
        ...


Make = Callable[[TuningConfig, FloatArray, Outcome, np.random.Generator], Optimiser]
"""An optimiser from the rules, the start (E, V), its outcome, and a generator."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What a tuner did, evaluation by evaluation, the start first."""

    unit: FloatArray
    """(n, E, K) evaluated."""
    best_values: FloatArray
    """(n, E, V) what it would recommend."""
    best_fraction: FloatArray
    """(n, E) as measured on the cached frames."""
    num_frames: IntArray
    """(n, E) indexed so far."""


def tune(
    bench: Bench,
    config: TuningConfig,
    make: Make,
    *,
    num_evaluations: int,
    rng: np.random.Generator,
    num_first_frames: int | None = None,
    budget_frames: int | None = None,
) -> Trace:
    """Drives an optimiser; every comparison is paired on the same frames.

    Args:
        bench: the experiments.
        config: which parameters.
        make: of the optimiser.
        num_evaluations: n; the start is the first.
        rng: the optimiser's.
        num_first_frames: racing (after Maron and Moore 1994): start and candidates are evaluated on
            so many frames first; a candidate that is worse there is dropped, one that is clearly
            better is taken, and an open race goes on with twice as many, up to all. None = always
            all.
        budget_frames: stop once every experiment has indexed so many; None = never.

    Raises:
        ValueError: numbers that do not go together.
    """
    num_frames = bench.num_frames
    if num_evaluations < 1:
        raise ValueError(f"num_evaluations: must be 1 or more, found {num_evaluations}")
    if num_first_frames is not None and not 0 < num_first_frames < num_frames:
        raise ValueError(
            f"num_first_frames: must be between 1 and {num_frames - 1}, found {num_first_frames}"
        )
    start, scale = bench.start, scale_of(config.tunables)
    scale.check(start)
    first = num_first_frames or num_frames
    everyone = np.arange(len(start))
    result = bench.run(everyone, start, first)
    best, outcome = _Best.of(result, start, num_frames), Outcome.of(result)
    optimiser = make(config, start, outcome, rng)
    spent = np.full(len(start), first)
    rows = [(scale.unit(start), best.values, best.fraction, spent)]
    rungs = [first]
    while rungs[-1] < num_frames:
        rungs.append(min(2 * rungs[-1], num_frames))
    while len(rows) < num_evaluations and (budget_frames is None or spent.min() < budget_frames):
        values = scale.values(optimiser.ask(), start)
        gain, on, before = np.zeros(len(start)), everyone, 0
        flags = np.zeros((len(start), num_frames), bool)
        num_known, spent = np.zeros(len(start), int), spent.copy()
        for rung in rungs:
            new = on[best.num_known[on] < rung]
            if new.size:
                spent[new] += rung - best.num_known[new]
                best.learn(new, bench.run(new, best.values[new], rung))
            result = bench.run(on, values[on], rung)
            outcome, gain[on] = outcome.put(on, Outcome.of(result)), best.gain(on, result)
            flags[on, :rung], num_known[on] = result.is_indexed, rung
            spent[on] += rung - before
            on, before = on[best.is_open(on, result)], rung
            if not on.size:
                break
        unit = scale.unit(values)
        optimiser.tell(Trial(unit=unit, outcome=outcome, gain=gain, best_fraction=best.fraction))
        best.replace(gain > 0, values, flags, num_known)
        rows.append((unit, best.values, best.fraction, spent))
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    return Trace(
        unit=columns[0], best_values=columns[1], best_fraction=columns[2], num_frames=columns[3]
    )


_CLEARLY, _NUM_DISCORDANT = 1.645, 4
"""A candidate is taken at once where McNemar's z is above this (one-sided 5 %), with so many frames
at least that only one of the two indexed."""


class _Best:
    """The best settings of E experiments, and which of the cached frames they index."""

    def __init__(self, values: FloatArray, flags: BoolArray, num_known: IntArray) -> None:
        self.values, self.flags, self.num_known = values, flags, num_known

    @classmethod
    def of(cls, result: BatchResult, values: FloatArray, num_frames: int) -> _Best:
        """At the start; the frames not indexed yet are unknown."""
        flags = _padded(result.is_indexed, num_frames)
        return cls(np.array(values, float), flags, np.full(len(values), result.num_frames))

    @property
    def fraction(self) -> FloatArray:
        """(E,) of the frames that are known."""
        return self.flags.sum(1) / self.num_known

    def gain(self, rows: IntArray, result: BatchResult) -> FloatArray:
        """Fraction of a result minus that of the best, on the frames of the result."""
        before = self.flags[rows, : result.num_frames].mean(1)
        return result.indexed_fraction - before

    def is_open(self, rows: IntArray, result: BatchResult) -> BoolArray:
        """True where the frames so far neither rule a candidate out nor settle it."""
        before = self.flags[rows, : result.num_frames]
        num_won = (result.is_indexed & ~before).sum(1)
        num_lost = (before & ~result.is_indexed).sum(1)
        num = num_won + num_lost
        z = (num_won - num_lost) / np.sqrt(np.maximum(num, 1))
        is_clear = (num >= _NUM_DISCORDANT) & (z > _CLEARLY)
        has_any = result.is_indexed.any(1)
        return has_any & (num_won >= num_lost) & ~is_clear

    def learn(self, rows: IntArray, result: BatchResult) -> None:
        """More frames of some."""
        self.flags[rows, : result.num_frames] = result.is_indexed
        self.num_known[rows] = result.num_frames

    def replace(
        self, is_better: BoolArray, values: FloatArray, flags: BoolArray, num_known: IntArray
    ) -> None:
        """New best ones of some; the arrays are new, as rows of a trace hold the old ones."""
        self.values = np.where(is_better[:, None], values, self.values)
        self.flags = np.where(is_better[:, None], flags, self.flags)
        self.num_known = np.where(is_better, num_known, self.num_known)


def _padded(flags: BoolArray, num_frames: int) -> BoolArray:
    """(E, N) with False where nothing is known."""
    full = np.zeros((len(flags), num_frames), bool)
    full[:, : flags.shape[1]] = flags
    return full


# ---- without a model -----------------------------------------------------------------------------


class KeepInitial:
    """Asks for the start again and again."""

    def __init__(
        self, config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> None:
        """See ``Make``."""
        self.unit = scale_of(config.tunables).unit(start)

    def ask(self) -> FloatArray:
        """The start."""
        return self.unit

    def tell(self, trial: Trial) -> None:
        """Nothing is learned."""


class Random:
    """Uniform within the bounds."""

    def __init__(
        self, config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> None:
        """See ``Make``."""
        self.shape, self.rng = (len(start), len(config.tunables)), rng

    def ask(self) -> FloatArray:
        """A point of the cube."""
        return self.rng.random(self.shape)

    def tell(self, trial: Trial) -> None:
        """Nothing is learned."""


SNR_GRID = (3.5, 4.25, 5.0, 6.0, 7.0, 8.5, 10.0)


class SnrGrid:
    """Seven values of the SNR at what else the user has, then the best of them."""

    def __init__(
        self, config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> None:
        """See ``Make``; ValueError where the SNR is not tuned."""
        if "min_snr" not in config.tunables:
            raise ValueError("snr-grid: min_snr is not among the tunables; add it")
        self.progress = Progress(config, start, outcome)
        self.start_unit = self.progress.best_unit.copy()
        self.at = config.tunables.index("min_snr")
        snr = TUNABLES["min_snr"]
        self.grid = [snr.normalise(value) for value in SNR_GRID]

    def ask(self) -> FloatArray:
        """The next of the grid."""
        done = self.progress.num_steps_done
        if done >= len(self.grid):
            return self.progress.best_unit
        unit = self.start_unit.copy()
        unit[:, self.at] = self.grid[done]
        return unit

    def tell(self, trial: Trial) -> None:
        """Keeps the best."""
        self.progress.update(trial.unit, trial.outcome, trial.gain, trial.best_fraction)


class Noise:
    """Gaussian changes of the best so far, of a spread that served best on simulations."""

    SPREAD = 0.15
    """Share of a parameter's range."""

    def __init__(
        self, config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> None:
        """See ``Make``."""
        self.progress, self.rng = Progress(config, start, outcome), rng

    def ask(self) -> FloatArray:
        """The best with noise."""
        best = self.progress.best_unit
        return np.clip(best + self.SPREAD * self.rng.standard_normal(best.shape), 0, 1)

    def tell(self, trial: Trial) -> None:
        """Keeps the best."""
        self.progress.update(trial.unit, trial.outcome, trial.gain, trial.best_fraction)


class Coordinate:
    """One parameter after the other: on where it helps, else back, else half the step."""

    FIRST_STEP = 0.2
    """Share of a parameter's range."""

    def __init__(
        self, config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> None:
        """See ``Make``."""
        self.progress = Progress(config, start, outcome)
        num = len(start)
        scale = scale_of(config.tunables)
        self.smallest = np.where(scale.is_integer, 1 / (scale.high - scale.low), 1e-3)
        self.step = np.tile(np.maximum(self.FIRST_STEP, self.smallest), (num, 1))
        self.which = np.zeros(num, int)
        self.sign = np.ones(num)
        self.has_failed = np.zeros(num, bool)
        self.all = np.arange(num)

    def ask(self) -> FloatArray:
        """The best with one parameter changed."""
        best = self.progress.best_unit[self.all, self.which]
        step = self.step[self.all, self.which]
        is_outside = (best + self.sign * step > 1 + step / 2) | (
            best + self.sign * step < -step / 2
        )
        self.sign = np.where(is_outside, -self.sign, self.sign)
        unit = self.progress.best_unit.copy()
        unit[self.all, self.which] = np.clip(best + self.sign * step, 0, 1)
        return unit

    def tell(self, trial: Trial, is_own: BoolArray | None = None) -> None:
        """Keeps the best, and turns where it did not help (of those that were its own asking)."""
        self.progress.update(trial.unit, trial.outcome, trial.gain, trial.best_fraction)
        own = np.ones(len(self.all), bool) if is_own is None else is_own
        is_worse = own & (trial.gain <= 0)
        is_over = is_worse & self.has_failed
        over = np.flatnonzero(is_over)
        at = over, self.which[over]
        self.step[at] = np.maximum(self.step[at] / 2, self.smallest[self.which[over]])
        self.which[over] = (self.which[over] + 1) % self.step.shape[1]
        self.sign = np.where(is_worse, -self.sign, self.sign)
        self.has_failed = np.where(own, is_worse & ~is_over, self.has_failed)


# ---- with what the pipeline tells for free -------------------------------------------------------

CELL_GAIN, SHIFT_GAIN = 0.92, 0.69
"""Percent of the cell for one of the distance, and share of the centre's error that the spots' mean
shift shows: measured (real CrystFEL; 56-82 % for the shift)."""
_WORTH_CLEN_PERCENT, _WORTH_CENTRE_PX = 0.3, 0.4
_HAS, _CELL, _DX, _DY = (
    FREE_OUTPUTS.index(name)
    for name in ("has_crystal", "cell_ratio", "spot_shift_x", "spot_shift_y")
)


def corrected(
    unit: FloatArray, free: FloatArray, names: tuple[str, ...]
) -> tuple[FloatArray, BoolArray]:
    """Geometry as the fitted cell and the spots' shift say it should be.

    Args:
        unit: (E, K) parameters.
        free: (E, J) what they gave, ``FREE_OUTPUTS``.
        names: of the K.

    Returns:
        (E, K) units, and (E,) True where there was a crystal and the change is worth a try.
    """
    result, scale = unit.copy(), scale_of(names)
    is_worth = np.zeros(len(unit), bool)
    has = free[:, _HAS] > 0
    clen = -100 * CELL_SCALE / CELL_GAIN * free[:, _CELL]
    for name, change, worth in (
        ("clen_offset_percent", clen, _WORTH_CLEN_PERCENT),
        ("centre_x_offset_px", SHIFT_SCALE_PX / SHIFT_GAIN * free[:, _DX], _WORTH_CENTRE_PX),
        ("centre_y_offset_px", SHIFT_SCALE_PX / SHIFT_GAIN * free[:, _DY], _WORTH_CENTRE_PX),
    ):
        if name in names:
            k = names.index(name)
            width = scale.high[k] - scale.low[k]
            result[:, k] = np.clip(unit[:, k] + np.where(has, change, 0) / width, 0, 1)
            is_worth |= has & (np.abs(change) > worth)
    return result, is_worth


DEFAULTS = {"min_snr": 5.0, "threshold_adu": 20.0, "min_pix_count": 2.0, "min_peaks": 10.0}
"""Where most CrystFEL analyses of a pixel detector begin."""
_SCAN = ((2.0, 0, 0), (-2.0, 0, 0), (0, 2.0, 0), (0, -2.0, 0), (0, 0, 2.0), (0, 0, -2.0),
         (4.0, 0, 0), (-4.0, 0, 0))  # fmt: skip
"""Percent and px, tried in turn while nothing indexes."""


class Rules:
    """What an experienced user does; coordinate search at the end."""

    def __init__(
        self, config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
    ) -> None:
        """See ``Make``."""
        self.names = config.tunables
        self.coordinate = Coordinate(config, start, outcome, rng)
        self.progress = self.coordinate.progress
        self.correction = _Correction(self.progress)
        self.num_scanned = np.zeros(len(start), int)
        self.is_own = np.zeros(len(start), bool)

    def ask(self) -> FloatArray:
        """Defaults; then corrections, a scan while nothing indexes, or coordinate search."""
        progress = self.progress
        is_first = progress.num_steps_done == 0
        unit, is_pending = self.correction.ask()
        if is_first:
            return with_values(unit, self.names, DEFAULTS)
        has_crystal = progress.best_free[:, _HAS] > 0
        is_scan = ~has_crystal & (self.num_scanned < len(_SCAN))
        self.is_own = ~is_pending & ~is_scan
        unit = np.where(self.is_own[:, None], self.coordinate.ask(), unit)
        offsets = np.array(_SCAN)[np.minimum(self.num_scanned, len(_SCAN) - 1)]
        scan = with_values(scale_of(self.names).unit(progress.start), self.names, DEFAULTS)
        geometry = ("clen_offset_percent", "centre_x_offset_px", "centre_y_offset_px")
        scan = with_values(scan, self.names, dict(zip(geometry, offsets.T, strict=True)))
        self.num_scanned += is_scan
        return np.where(is_scan[:, None], scan, unit)

    def tell(self, trial: Trial) -> None:
        """Keeps the best."""
        self.coordinate.tell(trial, self.is_own)
        self.correction.tell(trial)


class _Correction:
    """Which of the best parameters have a correction of their geometry to try."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.is_tried = np.zeros(len(progress.start), bool)

    def ask(self) -> tuple[FloatArray, BoolArray]:
        """(E, K) the best, corrected where that is new and worth it: (E,) True there."""
        best = self.progress.best_unit
        unit, is_worth = corrected(best, self.progress.best_free, self.progress.config.tunables)
        is_pending = is_worth & ~self.is_tried
        self.is_tried |= is_pending
        return np.where(is_pending[:, None], unit, best), is_pending

    def tell(self, trial: Trial) -> None:
        """A new best may be corrected again; ``progress`` was told before."""
        self.is_tried &= ~(trial.gain > 0)


def with_values(unit: FloatArray, names: tuple[str, ...], values: Any) -> FloatArray:
    """(E, K) units with some parameters (by name, numbers or (E,)) set; others are left out."""
    result, scale = unit.copy(), scale_of(names)
    for name, value in values.items():
        if name in names:
            k = names.index(name)
            low, high = scale.low[k], scale.high[k]
            result[:, k] = np.clip((np.asarray(value, float) - low) / (high - low), 0, 1)
    return result


@lru_cache(maxsize=16)
def warm_settings(names: tuple[str, ...], num_settings: int = 12) -> FloatArray:
    """(num_settings, K) units that together serve simulated experiments best, chosen greedily.

    The first is the best single setting, each further one what adds most to the best of those
    before it. Chosen on ``normal`` experiments of their own seed; geometry relative to the start,
    so that a list can only guess it.
    """
    rng = np.random.default_rng(40_321)
    experiments, scale = draw_experiments(rng, "normal", 192), scale_of(names)
    best = np.maximum(best_fraction(experiments), 0.02)
    num = 900
    unit = rng.random((num, len(names)))
    unit[: num // 2] = 0.5 + 0.15 * rng.standard_normal((num // 2, len(names)))
    like_default = with_values(unit, names, DEFAULTS)
    is_peak = ~np.isin(names, [name for name, tunable in TUNABLES.items() if tunable.is_geometry])
    jitter = 0.1 * np.abs(rng.standard_normal((num, len(names))))
    unit = np.where(is_peak, np.clip(like_default + jitter, 0, 1), np.clip(unit, 0, 1))
    unit[0] = with_values(np.full((1, len(names)), 0.5), names, DEFAULTS)[0]
    reached = np.stack(
        [
            true_fraction(experiments, scale.values(np.tile(u, (192, 1)), experiments.start), 150)
            / best
            for u in unit
        ]
    )
    chosen: list[int] = []
    have = np.zeros(192)
    for _ in range(num_settings):
        chosen.append(int(np.maximum(reached, have).mean(1).argmax()))
        have = np.maximum(have, reached[chosen[-1]])
    return unit[chosen]


# ---- with a model --------------------------------------------------------------------------------


class TPE:
    """Optuna's tree-structured Parzen estimator, one study an experiment."""

    def __init__(
        self,
        config: TuningConfig,
        start: FloatArray,
        outcome: Outcome,
        rng: np.random.Generator,
        *,
        is_warm: bool = False,
    ) -> None:
        """See ``Make``; ``is_warm``: begins with ``warm_settings``.

        Raises:
            RuntimeError: optuna is not installed.
        """
        try:
            import optuna
        except ImportError as error:
            raise RuntimeError(
                "tpe needs optuna: pip install 'ssl2rl-ray[bo]', or leave tpe out"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.names = config.tunables
        self.progress = Progress(config, start, outcome)
        space: dict[str, Any] = {
            name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in self.names
        }
        self.space, self.studies, self.asked = space, [], []
        seeds = rng.integers(2**31, size=len(start))
        for seed, unit, fraction in zip(
            seeds, self.progress.best_unit, self.progress.best_fraction, strict=True
        ):
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=int(seed), multivariate=True),
            )
            study.add_trial(
                optuna.trial.create_trial(
                    params=dict(zip(self.names, unit.tolist(), strict=True)),
                    distributions=space,
                    value=float(fraction),
                )
            )
            self.studies.append(study)
        self.first = warm_settings(self.names) if is_warm else np.empty((0, len(self.names)))

    def ask(self) -> FloatArray:
        """The settings of the list, then what each study suggests."""
        if self.progress.num_steps_done < len(self.first):
            self.asked = []
            return np.tile(self.first[self.progress.num_steps_done], (len(self.studies), 1))
        self.asked = [study.ask(self.space) for study in self.studies]
        return np.array([[trial.params[name] for name in self.names] for trial in self.asked])

    def tell(self, trial: Trial) -> None:
        """The paired estimate of the fraction."""
        import optuna

        value = trial.best_fraction + trial.gain
        for i, study in enumerate(self.studies):
            if self.asked:
                study.tell(self.asked[i], float(value[i]))
            else:
                params = dict(zip(self.names, trial.unit[i].tolist(), strict=True))
                study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=self.space, value=float(value[i])
                    )
                )
        self.progress.update(trial.unit, trial.outcome, trial.gain, trial.best_fraction)


class GP:
    """A Gaussian process (Matérn 5/2) of each experiment, expected improvement.

    Two length scales, of the peak finder's and of the geometry's parameters, by marginal likelihood
    on a grid at every step; noise by the binomial variance of a fraction.
    """

    LENGTHS = (0.12, 0.25, 0.5, 1.0)

    def __init__(
        self,
        config: TuningConfig,
        start: FloatArray,
        outcome: Outcome,
        rng: np.random.Generator,
        *,
        is_warm: bool = False,
        is_free_used: bool = False,
    ) -> None:
        """See ``Make``; ``is_warm``: a prior list, ``is_free_used``: geometry corrections."""
        self.config, self.rng = config, rng
        self.progress = Progress(config, start, outcome)
        self.correction = _Correction(self.progress) if is_free_used else None
        self.first = warm_settings(config.tunables) if is_warm else None
        self.x = self.progress.best_unit[:, None]
        self.y = self.progress.best_fraction[:, None]
        tuned = [TUNABLES[name] for name in config.tunables]
        self.is_geometry = np.array([tunable.is_geometry for tunable in tuned])
        self.num_listed = np.zeros(len(start), int)

    def ask(self) -> FloatArray:
        """A correction that is due, a setting of the list, or the highest improvement expected."""
        num = len(self.x)
        has_crystal = self.progress.best_free[:, _HAS] > 0
        if self.first is None:
            is_listed = np.zeros(num, bool)
        else:  # the first in any case, the others while nothing indexes
            is_listed = (self.num_listed == 0) | (
                ~has_crystal & (self.num_listed < len(self.first))
            )
        unit = np.empty((num, self.x.shape[2]))
        if not is_listed.all():
            unit[:] = self._improve()
        if self.first is not None:
            listed = self.first[np.minimum(self.num_listed, len(self.first) - 1)]
            unit = np.where(is_listed[:, None], listed, unit)
        if self.correction is not None:
            due, is_due = self.correction.ask()
            # the list's first with the corrected geometry of the start, else the best corrected
            swap = is_listed[:, None] & ~self.is_geometry
            unit = np.where(is_due[:, None] & ~swap, due, unit)
            is_listed &= ~is_due | (self.num_listed == 0)
        self.num_listed += is_listed
        return unit

    def tell(self, trial: Trial) -> None:
        """One more point of each."""
        value = trial.best_fraction + trial.gain
        self.x = np.concatenate([self.x, trial.unit[:, None]], axis=1)
        self.y = np.concatenate([self.y, value[:, None]], axis=1)
        self.progress.update(trial.unit, trial.outcome, trial.gain, trial.best_fraction)
        if self.correction is not None:
            self.correction.tell(trial)

    def _improve(self) -> FloatArray:
        """(E, K) the candidate of the highest expected improvement."""
        mean, spread = self.y.mean(1, keepdims=True), self.y.std(1, keepdims=True) + 0.02
        y = (self.y - mean) / spread
        p = np.clip(self.y, 0.02, 0.98)
        noise = p * (1 - p) / self.config.num_frames / spread**2 * 0.3 + 1e-4  # paired: less
        best_lengths, best_evidence = np.zeros((len(y), 2)), np.full(len(y), -np.inf)
        for a in self.LENGTHS:
            for b in self.LENGTHS:
                evidence = _evidence(self._kernel(self.x, self.x, np.array([[a, b]])), noise, y)
                evidence += -0.5 * (np.log(a / 0.3) ** 2 + np.log(b / 0.3) ** 2)
                is_more = evidence > best_evidence
                best_lengths[is_more], best_evidence[is_more] = (a, b), evidence[is_more]
        candidates = self._candidates()
        k = self._kernel(self.x, self.x, best_lengths) + noise[:, :, None] * np.eye(y.shape[1])
        cross = self._kernel(candidates, self.x, best_lengths)
        solved = np.linalg.solve(k, np.concatenate([y[:, :, None], cross.transpose(0, 2, 1)], 2))
        mu = (cross @ solved[:, :, :1])[:, :, 0]
        variance = 1 - np.einsum("ecn,enc->ec", cross, solved[:, :, 1:])
        sd = np.sqrt(np.maximum(variance, 1e-9))
        return candidates[
            np.arange(len(y)), expected_improvement(mu, sd, y.max(1, keepdims=True)).argmax(1)
        ]

    def _candidates(self) -> FloatArray:
        """(E, C, K) anywhere, around the best, and along single parameters of the best."""
        num, num_tuned = len(self.x), self.x.shape[2]
        best = self.progress.best_unit[:, None]
        anywhere = self.rng.random((num, 100, num_tuned))
        noise = self.rng.standard_normal((num, 200, num_tuned))
        width = np.repeat([0.03, 0.08, 0.2, 0.2], 50)[None, :, None]
        noise[:, 100:] *= self.rng.random((num, 100, num_tuned)) < 2 / num_tuned
        return np.concatenate([anywhere, np.clip(best + width * noise, 0, 1)], axis=1)

    def _kernel(self, x: FloatArray, z: FloatArray, lengths: FloatArray) -> FloatArray:
        """(E, C, n) Matérn 5/2 of (E, C, K) and (E, n, K), by two lengths (E or 1, 2)."""
        scale = np.where(self.is_geometry, lengths[:, 1:], lengths[:, :1])[:, None]
        x, z = x / scale, z / scale
        square = (x**2).sum(2)[:, :, None] + (z**2).sum(2)[:, None] - 2 * x @ z.transpose(0, 2, 1)
        r = np.sqrt(5 * np.maximum(square, 0))
        return (1 + r + r**2 / 3) * np.exp(-r)


def _evidence(kernel: FloatArray, noise: FloatArray, y: FloatArray) -> FloatArray:
    """(E,) log marginal likelihood up to a constant."""
    factor = np.linalg.cholesky(kernel + noise[:, :, None] * np.eye(y.shape[1]))
    half = np.linalg.solve(factor, y[:, :, None])[:, :, 0]
    diagonal = np.einsum("enn->en", factor)
    return -0.5 * (half**2).sum(1) - np.log(diagonal).sum(1)


def expected_improvement(mean: FloatArray, sd: FloatArray, best: FloatArray) -> FloatArray:
    """Of normal predictions over the best (Jones et al. 1998, J. Global Optim. 13, eq. 15)."""
    from scipy.special import ndtr

    z = (mean - best) / sd
    return sd * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))


def _tpe_warm(
    config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
) -> Optimiser:
    return TPE(config, start, outcome, rng, is_warm=True)


def _gp_warm(
    config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
) -> Optimiser:
    return GP(config, start, outcome, rng, is_warm=True)


def _gp_warm_free(
    config: TuningConfig, start: FloatArray, outcome: Outcome, rng: np.random.Generator
) -> Optimiser:
    return GP(config, start, outcome, rng, is_warm=True, is_free_used=True)


RIVALS: dict[str, Make] = {
    "keep-initial": KeepInitial,
    "snr-grid": SnrGrid,
    "random": Random,
    "noise": Noise,
    "coordinate": Coordinate,
    "rules": Rules,
    "tpe": TPE,
    "tpe-warm": _tpe_warm,
    "gp": GP,
    "gp-warm": _gp_warm,
    "gp-warm-free": _gp_warm_free,
}
"""By the names of the table above."""
