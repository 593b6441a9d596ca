"""The tuning problem as Gymnasium environments: one experiment, or many simulated ones at once.

Shape letters: E experiments side by side, K parameters that are tuned, V = 7 of all ``TUNABLES``,
N frames, J free outputs, F numbers of an observation.

Rules: an episode begins at the user's parameters, which are evaluated first and for nothing. Each
action proposes another set, evaluated on the same cached frames, so that gains are paired. After
``num_steps`` proposals the episode is over (``terminated``: the budget is part of the task).
Geometry is an offset from the user's own file, and the truth is nowhere in an observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.crystfel.indexer import Indexer, innermost
from envs.crystfel.surrogate import (
    BatchResult,
    Experiments,
    Kind,
    Sample,
    best_fraction,
    draw_experiments,
    respond,
)
from envs.crystfel.types import (
    TUNABLES,
    BoolArray,
    FloatArray,
    Frame,
    IndexingResult,
    Parameters,
    TunableParameter,
    TuningConfig,
    concatenate,
    tunables,
)


class Scale:
    """(E, K) numbers in 0..1 from and to (E, V) parameter values."""

    def __init__(self, tuned: Sequence[TunableParameter]) -> None:
        """``tuned``: K of ``TUNABLES``."""
        self.columns = np.array([list(TUNABLES).index(tunable.name) for tunable in tuned])
        self.is_integer = np.array([tunable.is_integer for tunable in tuned])
        self.low = np.array([tunable.low for tunable in tuned], float)
        self.high = np.array([tunable.high for tunable in tuned], float)
        self.step = np.array([tunable.step for tunable in tuned], float)
        self.width = self.high - self.low

    def unit(self, values: FloatArray) -> FloatArray:
        """(E, K) of (E, V) values; those out of bounds come to the bound."""
        inside = np.clip(values[:, self.columns], self.low, self.high)
        return (inside - self.low) / self.width

    def values(self, unit: FloatArray, start: FloatArray) -> FloatArray:
        """(E, V) from (E, K); what is not tuned is ``start``'s, integers are rounded."""
        x = self.low + np.clip(unit, 0, 1) * self.width
        x = np.clip(np.where(self.is_integer, np.rint(x), x), self.low, self.high)
        values = np.array(start, float)
        values[:, self.columns] = x
        return values

    def check(self, values: FloatArray) -> None:
        """Raises ValueError where one of (E, V) is out of bounds: it would be moved unasked."""
        own = values[:, self.columns]
        is_outside = ~((own >= self.low) & (own <= self.high))
        if is_outside.any():
            e, k = np.argwhere(is_outside)[0]
            raise ValueError(
                f"start: {list(TUNABLES)[self.columns[k]]} is {own[e, k]:g}, outside "
                f"{self.low[k]:g} to {self.high[k]:g} where it is tuned: begin within, or do "
                "not tune it"
            )

    def stepped(self, unit: FloatArray, which: Any, sign: Any) -> FloatArray:
        """(E, K) where parameter ``which`` (E,) went ``sign`` (E,) discrete steps."""
        rows = np.arange(len(unit))
        stepped = unit.copy()
        stepped[rows, which] += sign * (self.step / self.width)[which]
        return np.clip(stepped, 0, 1)


@lru_cache(maxsize=64)
def scale_of(names: tuple[str, ...]) -> Scale:
    """Of these tunables."""
    return Scale(tunables(names))


# ---- what an evaluation tells --------------------------------------------------------------------

FREE_OUTPUTS = (
    "sqrt_indexed_fraction",
    "hit_fraction",
    "peaks_10",
    "peaks_50",
    "peaks_90",
    "has_crystal",
    "cell_ratio",
    "spot_shift_x",
    "spot_shift_y",
    "residual",
    "cpu",
)
"""J numbers of an evaluation that an observation holds, each of order 1."""
CELL_SCALE, SHIFT_SCALE_PX = 0.05, 4.0
"""A cell ratio so far from 1, and a spot shift so long, are 1 in an observation."""
TYPICAL_MOVE, MEMORY = 0.1, 0.8
"""Share of a parameter's range; how much of what gains told is left after a step."""
_BOUND = 3.0
"""Of every number of an observation."""
_POOL_STREAM = 7021
"""The pool of a seed is not what validation, or a comparison, draws from the same number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """E evaluations in a few numbers each; every array is (E,) unless it says more."""

    indexed_fraction: FloatArray
    hit_fraction: FloatArray
    peak_quantiles: FloatArray
    """(E, 3)"""
    cell_ratio: FloatArray
    """NaN = no crystal, also in the next two."""
    spot_shift_px: FloatArray
    """(E, 2)"""
    residual_px: FloatArray
    cpu_frame_s: FloatArray
    """CPU seconds for each frame."""
    num_indexed: FloatArray

    @classmethod
    def of(cls, result: BatchResult) -> Self:
        """The summary of a result."""
        return cls(
            indexed_fraction=result.indexed_fraction,
            hit_fraction=result.hit_fraction,
            peak_quantiles=result.peak_quantiles,
            cell_ratio=result.cell_ratio,
            spot_shift_px=result.spot_shift_px,
            residual_px=result.residual_px,
            cpu_frame_s=result.cpu_s / result.num_frames,
            num_indexed=result.is_indexed.sum(1).astype(float),
        )

    def put(self, rows: Any, other: Outcome) -> Self:
        """The same with ``other`` in some rows."""
        merged = {}
        for field in dataclasses.fields(self):
            array = np.array(getattr(self, field.name))
            array[rows] = getattr(other, field.name)
            merged[field.name] = array
        return dataclasses.replace(self, **merged)

    def features(self, fraction: FloatArray, is_free_seen: bool) -> FloatArray:
        """(E, J) ``FREE_OUTPUTS``, the first of ``fraction``, the others 0 where not seen."""
        seen = np.isfinite(self.cell_ratio)
        cell = np.clip(np.nan_to_num((self.cell_ratio - 1) / CELL_SCALE), -2, 2)
        shift = np.clip(np.nan_to_num(self.spot_shift_px / SHIFT_SCALE_PX), -2, 2)
        features = np.column_stack(
            [
                np.sqrt(np.maximum(fraction, 0)),  # equal steps are equally significant
                self.hit_fraction,
                np.log1p(self.peak_quantiles) / 5,
                seen,
                cell,
                shift,
                np.clip(np.nan_to_num(self.residual_px) / 2, 0, 2),
                np.clip(np.log(np.maximum(self.cpu_frame_s, 1e-4) / 0.05) / 2, -2, 2),
            ]
        )
        if not is_free_seen:
            features[:, 1:] = 0
        return features


class Progress:
    """How far E experiments have come: what the rules know, and all that a policy sees.

    The same for the environments and for a policy that tunes a real experiment. It never learns
    where the right geometry is: it is told parameters (relative to the start) and outcomes.
    """

    def __init__(self, config: TuningConfig, start: FloatArray, outcome: Outcome) -> None:
        """``start``: (E, V) the user's values; ``outcome``: what they give."""
        self.config, self.scale = config, scale_of(config.tunables)
        self.start = np.array(start, float)
        unit = self.scale.unit(self.start)
        self.best_unit, self.last_unit = unit.copy(), unit.copy()
        self.best_fraction = np.array(outcome.indexed_fraction, float)
        self.start_fraction = self.best_fraction.copy()
        self.best_free = outcome.features(self.best_fraction, config.is_free_seen)
        self.last_free = self.best_free.copy()
        self.last_fraction = self.best_fraction.copy()
        self.last_gain = np.zeros(len(unit))
        self.slope = np.zeros((2, *unit.shape))
        self.num_since_best = np.zeros(len(unit))
        self.num_steps_done = 0

    def propose(self, action: Any) -> FloatArray:
        """(E, K) units that an action (E, K), or (E,) of a discrete one, asks to be evaluated."""
        if self.config.action == "continuous":
            change = np.clip(np.asarray(action, float), -1, 1) * self.config.max_change
            return np.clip(self.best_unit + change, 0, 1)
        action = np.asarray(action, int)
        which, is_up = np.divmod(np.maximum(action - 1, 0), 2)
        sign = np.where(action == 0, 0, np.where(is_up == 1, 1, -1))
        return self.scale.stepped(self.last_unit, which, sign)

    def update(
        self,
        unit: FloatArray,
        outcome: Outcome,
        gain: FloatArray,
        best_fraction: FloatArray | None = None,
    ) -> FloatArray:
        """Takes in an evaluation.

        Args:
            unit: (E, K) as evaluated.
            outcome: what it gave.
            gain: (E,) paired, against the best so far.
            best_fraction: (E,) of that best, where more is known of it by now.

        Returns:
            (E,) rewards before normalisation.
        """
        if best_fraction is not None:
            self.best_fraction = np.array(best_fraction, float)
        fraction = self.best_fraction + gain
        is_better = gain > 0
        rise = np.maximum(gain, 0)
        change = fraction - self.last_fraction
        free = outcome.features(fraction, self.config.is_free_seen)
        self.last_unit, self.last_free, self.last_fraction = np.array(unit), free, fraction
        self.last_gain = np.clip(gain / (self.best_fraction + 0.02), -1, 1)
        move = (unit - self.best_unit) / TYPICAL_MOVE
        told = self.last_gain[:, None] * np.stack([move, np.abs(move)])
        self.slope = MEMORY * self.slope + told
        self.best_unit = np.where(is_better[:, None], unit, self.best_unit)
        self.best_free = np.where(is_better[:, None], free, self.best_free)
        self.best_fraction = np.where(is_better, fraction, self.best_fraction)
        self.num_since_best = np.where(is_better, 0, self.num_since_best + 1)
        self.num_steps_done += 1
        reward = rise if self.config.reward == "best" else change
        return reward - self.config.time_cost * outcome.cpu_frame_s

    def observation(self) -> FloatArray:
        """(E, F) float32, each number of order 1.

        Best and last units, best and last free outputs, start fraction, steps left, steps since
        the best was found, the last gain as a share of the best before it, and where gains lay:
        a fading sum of gain x move (a direction) and of gain x size of the move, by parameter.
        """
        steps_left = 1 - (self.num_steps_done % self.config.num_steps) / self.config.num_steps
        columns = np.column_stack(
            [
                2 * self.best_unit - 1,
                2 * self.last_unit - 1,
                self.best_free,
                self.last_free,
                self.start_fraction,
                np.full(len(self.start), steps_left),
                np.minimum(self.num_since_best, 10) / 10,
                self.last_gain,
                *self.slope,
            ]
        )
        return np.clip(columns, -_BOUND, _BOUND).astype(np.float32)

    @property
    def best_values(self) -> FloatArray:
        """(E, V) the best parameters so far."""
        return self.scale.values(self.best_unit, self.start)


# ---- what can be evaluated -----------------------------------------------------------------------


class Bench(Protocol):
    """E experiments with their cached frames: what a tuner may ask."""

    @property
    def start(self) -> FloatArray:
        """(E, V) the user's parameters."""
        ...

    @property
    def num_frames(self) -> int:
        """N cached frames of each experiment."""
        ...

    def run(self, rows: Any, values: FloatArray, num_frames: int) -> BatchResult:
        """The experiments ``rows`` at (len(rows), V) values, on their first frames."""
        ...


@dataclass(frozen=True, eq=False)
class SurrogateBench:
    """Simulated experiments."""

    experiments: Experiments
    sample: Sample

    @property
    def start(self) -> FloatArray:
        """(E, V)."""
        return self.experiments.start

    @property
    def num_frames(self) -> int:
        """N."""
        return self.sample.crystal.shape[1]

    def run(self, rows: Any, values: FloatArray, num_frames: int) -> BatchResult:
        """See ``Bench``."""
        is_all = num_frames == self.num_frames and len(rows) == len(self.experiments)
        if is_all and np.array_equal(rows, np.arange(len(rows))):
            return respond(self.experiments, self.sample, values)
        sample = self.sample.select(rows, slice(0, num_frames))
        return respond(self.experiments.select(rows), sample, values)


class IndexerBench:
    """One experiment behind an ``Indexer``; frames already indexed at a setting are not again."""

    def __init__(self, indexer: Indexer, frames: Sequence[Frame], nominal: Parameters) -> None:
        """``nominal``: the user's parameters, whose tunables are the start."""
        if not frames:
            raise ValueError("frames: none to index; name at least one")
        self.indexer, self.frames, self.nominal = indexer, tuple(frames), nominal
        self.start = np.array([[getattr(nominal, name) for name in TUNABLES]], float)
        self._known: dict[tuple[float, ...], dict[int, IndexingResult]] = {}
        self.results: list[tuple[Parameters, IndexingResult]] = []
        """Everything that was run, in order."""

    @property
    def num_frames(self) -> int:
        """N."""
        return len(self.frames)

    def parameters(self, values: FloatArray) -> Parameters:
        """Of (V,) values."""
        return self.nominal.replace(**dict(zip(TUNABLES, map(float, values), strict=True)))

    def run(self, rows: Any, values: FloatArray, num_frames: int) -> BatchResult:
        """See ``Bench``; IndexerError passes through."""
        return BatchResult.of([self._run(tuple(map(float, row)), num_frames) for row in values])

    def _run(self, values: tuple[float, ...], num_frames: int) -> IndexingResult:
        parameters, known = self.parameters(np.array(values)), self._known.setdefault(values, {})
        if num_frames not in known:
            done = max((n for n in known if n < num_frames), default=0)
            result = self.indexer.run(parameters, self.frames[done:num_frames])
            known[num_frames] = concatenate([known[done], result]) if done else result
            self.results.append((parameters, known[num_frames]))
        return known[num_frames]


# ---- the environments ----------------------------------------------------------------------------


def action_space(config: TuningConfig) -> gym.Space[Any]:
    """Of one episode."""
    num = len(config.tunables)
    if config.action == "discrete":
        return spaces.Discrete(2 * num + 1)
    return spaces.Box(-1.0, 1.0, (num,), np.float32)


def observation_space(config: TuningConfig) -> spaces.Box:
    """Of one episode."""
    return spaces.Box(-_BOUND, _BOUND, (num_features(config),), np.float32)


def num_features(config: TuningConfig) -> int:
    """F."""
    return 4 * len(config.tunables) + 2 * len(FREE_OUTPUTS) + 4


class CrystFELTuningEnv(gym.Env[np.ndarray, Any]):
    """One experiment: each step indexes the cached frames at the proposed parameters.

    The first reset starts at the user's parameters; later ones at the best that were found
    (Ferreira de Lima et al. 2021), unless ``options={"restart": True}``. ``info`` has
    ``parameters``, ``indexed_fraction``, ``best_parameters`` and ``best_fraction``.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        indexer: Indexer,
        config: TuningConfig,
        frames: Sequence[Frame] | None = None,
        nominal: Parameters | None = None,
    ) -> None:
        """The experiment and the rules.

        Args:
            indexer: any backend.
            config: the rules.
            frames: the cached sample, of which the first ``config.num_frames`` are used; None =
                those of the indexer's experiment.
            nominal: the user's parameters; None = those of the indexer's experiment.

        Raises:
            ValueError: fewer frames than the config asks for, or an indexer that knows of none; a
                start that is out of the bounds of what is tuned.
        """
        own = innermost(indexer)
        sample = getattr(own, "frames", ()) if frames is None else frames
        start = getattr(own, "nominal", Parameters()) if nominal is None else nominal
        if len(sample) < config.num_frames:
            raise ValueError(
                f"num_frames: {config.num_frames} are asked for, and there are {len(sample)}; "
                "lower it or name more frames"
            )
        self.config, self.scale = config, scale_of(config.tunables)
        self.bench = IndexerBench(indexer, sample[: config.num_frames], start)
        self.scale.check(self.bench.start)
        self.action_space = action_space(config)
        self.observation_space = observation_space(config)
        self._progress: Progress | None = None
        self._episode_begins = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; evaluates the start where that is not known yet."""
        super().reset(seed=seed)
        is_restart = seed is not None or bool((options or {}).get("restart"))
        before = None if is_restart else self._progress
        start = self.bench.start if before is None else before.best_values
        outcome = self._evaluate(start)
        self._progress = Progress(self.config, start, outcome)
        return self._progress.observation()[0], self._info(start, outcome)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Evaluates what the action proposes."""
        if self._progress is None:
            raise gym.error.ResetNeeded("call reset() before the first step")
        values = self.scale.values(
            self._progress.propose(np.asarray(action)[None]), self.bench.start
        )
        unit = self.scale.unit(values)  # as evaluated: integers are whole
        outcome = self._evaluate(values)
        gain = outcome.indexed_fraction - self._progress.best_fraction
        reward = self._progress.update(unit, outcome, gain)
        terminated = self._progress.num_steps_done >= self.config.num_steps
        return (
            self._progress.observation()[0],
            float(reward[0]),
            terminated,
            False,
            self._info(values, outcome),
        )

    def _evaluate(self, values: FloatArray) -> Outcome:
        return Outcome.of(self.bench.run([0], values, self.bench.num_frames))

    def _info(self, values: FloatArray, outcome: Outcome) -> dict[str, Any]:
        assert self._progress is not None
        return {
            "parameters": self.bench.parameters(values[0]),
            "indexed_fraction": float(outcome.indexed_fraction[0]),
            "best_parameters": self.bench.parameters(self._progress.best_values[0]),
            "best_fraction": float(self._progress.best_fraction[0]),
        }


def worth(share: FloatArray) -> FloatArray:
    """Of a share of the best fraction: the last steps towards it count more than the first."""
    return -np.sqrt(np.maximum(1.05 - share, 0.02))


class CrystFELVectorEnv(VectorEnv[np.ndarray, Any, np.ndarray]):
    """E simulated experiments, drawn afresh for every episode, in one numpy step.

    The reward ``best`` is the rise of what the share of the best possible fraction is worth
    (``worth``), so that poor and rich samples count alike; only the reward knows what is possible.
    All episodes are equally long and end together; the next step resets them (Gymnasium's
    NEXT_STEP), its actions ignored.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        config: TuningConfig,
        num_envs: int,
        *,
        kind: Kind = "normal",
        pool_size: int = 2048,
        seed: int | None = None,
    ) -> None:
        """Draws a pool of experiments, from which episodes draw; starts are mixed among them.

        Args:
            config: the rules.
            num_envs: E.
            kind: see ``draw_experiments``.
            pool_size: responses that differ; each episode gives one another start, other geometry
                errors and other frames.
            seed: of the pool and of the first episodes.
        """
        self.config, self.num_envs = config, num_envs
        self.scale = scale_of(config.tunables)
        self.single_action_space = action_space(config)
        self.single_observation_space = observation_space(config)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        rng = np.random.default_rng(None if seed is None else [seed, _POOL_STREAM])
        self._pool = draw_experiments(rng, kind, pool_size)
        self._pool_best = best_fraction(self._pool, 100)
        self._bench: SurrogateBench | None = None
        self._progress: Progress | None = None
        self._is_over = False
        if seed is not None:
            super().reset(seed=seed)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draws E experiments and evaluates their starts."""
        super().reset(seed=seed)
        return self._begin(), {}

    def step(
        self, actions: Any
    ) -> tuple[np.ndarray, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """One evaluation of every experiment."""
        if self._progress is None or self._bench is None:
            raise gym.error.ResetNeeded("call reset() before the first step")
        nothing = np.zeros(self.num_envs, bool)
        if self._is_over:
            return self._begin(), np.zeros(self.num_envs), nothing, nothing.copy(), {}
        progress, bench = self._progress, self._bench
        values = self.scale.values(progress.propose(actions), bench.start)
        unit = self.scale.unit(values)  # as evaluated: integers are whole
        outcome = Outcome.of(bench.run(self._rows, values, bench.num_frames))
        gain = outcome.indexed_fraction - progress.best_fraction
        before = progress.best_fraction
        reward = progress.update(unit, outcome, gain)
        if self.config.reward == "best":
            rise = worth(progress.best_fraction / self._reference) - worth(before / self._reference)
            reward = reward + rise - (progress.best_fraction - before)
        self._is_over = progress.num_steps_done >= self.config.num_steps
        terminated = np.full(self.num_envs, self._is_over)
        return progress.observation(), reward, terminated, nothing, {}

    def _begin(self) -> np.ndarray:
        rng = self.np_random
        self._rows = np.arange(self.num_envs)
        which, geometry, start = rng.integers(len(self._pool), size=(3, self.num_envs))
        experiments = dataclasses.replace(
            self._pool.select(which),
            optimum_clen_percent=self._pool.optimum_clen_percent[geometry],
            optimum_centre_px=self._pool.optimum_centre_px[geometry],
            start=self._pool.start[start],
        )
        sample = Sample.draw(rng, self.num_envs, self.config.num_frames)
        self._bench = SurrogateBench(experiments, sample)
        self._reference = np.maximum(self._pool_best[which], 0.02)
        outcome = Outcome.of(
            self._bench.run(self._rows, experiments.start, sample.crystal.shape[1])
        )
        self._progress = Progress(self.config, experiments.start, outcome)
        self._is_over = False
        return self._progress.observation()
