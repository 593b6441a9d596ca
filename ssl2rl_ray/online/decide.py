"""What the online mode does next: a pure function of what has happened so far.

``step(config, state, event) -> (state, question)``: no clock, no file, no process. Whoever drives
it answers the question (propose parameters, index frames) and reports what the pipeline has
processed; everything that must survive a restart is in the state, and the question that is open is
part of it.

How parameters change. The pipeline indexes every frame with the *incumbent*. A *search* takes its
latest N frames as a cache, on which the incumbent's flags are known for nothing, and lets any
optimiser of ``rivals`` or a trained policy propose; a candidate is looked at on a few of them first
(racing) and then on all. Its best is *tested* on other frames, which the search has not seen,
against the incumbent's flags: only where the sign test of the pairs is significant there does it
become the incumbent. Many candidates on one cache would find a lucky one; frames of its own it
cannot fool. Many tests would find a lucky one as well: each that changes nothing makes the next
stricter (``OnlineConfig.level``), until something is deployed or conditions change.

After a search that changed nothing the tuner rests, until the fraction drops, the fitted cell or
the spots move (drift), or ``rest_frames`` have passed. Now and then the user's initial parameters
are indexed too, so that what tuning brings is known; should they be better, they come back.

Shape letters: N cached frames, K parameters that are tuned, V all tunables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy.special import betainc, ndtr, ndtri

from envs.crystfel.env import Outcome, scale_of
from envs.crystfel.rivals import Make, Optimiser, Trial
from envs.crystfel.surrogate import BatchResult
from envs.crystfel.types import (
    TUNABLES,
    BoolArray,
    FloatArray,
    Frame,
    IndexingResult,
    Parameters,
    TuningConfig,
    concatenate,
)

MIN_CRYSTALS = 15
"""Indexed frames without which the mean cell and the mean shift of the spots say little."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """The rules of online tuning."""

    tunables: tuple[str, ...] = tuple(TUNABLES)
    """Which parameters; the others stay the user's."""
    num_cache_frames: int = 100
    """N, of a search."""
    num_first_frames: int = 50
    """Of these, on which a candidate is looked at first; 0 = always on all."""
    num_test_frames: int = 100
    """Fresh ones, of one look of the test that changes parameters."""
    num_looks: int = 6
    """After each the test may end: what is clear needs few frames, what is not gets more."""
    num_steps: int = 10
    """Proposals of a search."""
    max_error: float = 0.1
    """Of the changes that are deployed, the share that may be no better (see ``level``)."""
    min_z: float = 1.645
    """McNemar's z on the cache above which a best is tested before the search is over."""
    promising_z: float = 1.0
    """On the cache, below which the best of a search is not worth a test."""
    hopeless_z: float = 0.0
    """Below it a test ends without a further look."""
    min_discordant: int = 4
    """Frames that only one of the two indexes; with fewer nothing is believed."""
    rest_frames: int = 2000
    """Processed since the last search, after which there is another one without drift."""
    num_drift_frames: int = 200
    """The latest ones, which are compared with those when the rest began."""
    drift_z: float = 2.6
    """Of two proportions; a fraction that has dropped by more is drift."""
    drift_cell_percent: float = 0.7
    """Drift as well: the fitted cell has moved by so much."""
    drift_shift_px: float = 0.7
    """Or the spots."""
    control_every: int = 1000
    """Processed frames after which the initial parameters are looked at again; 0 = never."""
    num_control_frames: int = 50
    revert_z: float = 3.0
    """Above which they come back."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError (ParameterError for tunables), with the field's name."""
        object.__setattr__(self, "tunables", tuple(self.tunables))
        _ = self.tuning
        least = {"num_test_frames": 1, "num_drift_frames": 1, "num_control_frames": 1}
        least |= {"num_looks": 1}
        least |= {"min_discordant": 1, "rest_frames": 0, "control_every": 0, "num_first_frames": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be {low} or more, found {getattr(self, name)}")
        if not 0 < self.max_error < 1:
            raise ValueError(f"max_error: must be between 0 and 1, found {self.max_error}")
        if self.num_first_frames >= self.num_cache_frames:
            raise ValueError(
                f"num_first_frames: must be below num_cache_frames {self.num_cache_frames}, "
                f"found {self.num_first_frames}"
            )
        for name in ("min_z", "drift_z", "revert_z", "drift_cell_percent", "drift_shift_px"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be above 0, found {getattr(self, name)}")

    def level(self, num_refused: int, look: int) -> float:
        """The p at which a look (1, 2, ...) of the next test deploys.

        The k-th test since the last deployment (``num_refused`` + 1) may err in ``max_error`` /
        (k (k + 1)), which add up to ``max_error``. So the changes that are deployed and no better
        are, on the mean, at most ``max_error`` x (1 + deployments + times that conditions changed),
        however often is tested (the marginal false discovery rate of Foster and Stine, J. R. Stat.
        Soc. B 70 (2008) 429). Its looks share that as Lan and DeMets (Biometrika 70 (1983) 659)
        spend it, little on the first, most on the last; that they are of the same data is not made
        use of, so that the exact test of ``sign_p`` stays within it.
        """
        k = num_refused + 1
        z = -ndtri(self.max_error / (k * (k + 1)) / 2)
        before, now = (math.sqrt((look - i) / self.num_looks) for i in (1, 0))
        return float(2 * ndtr(-z / now) - (2 * ndtr(-z / before) if before else 0.0))

    @property
    def tuning(self) -> TuningConfig:
        """As the optimisers have it."""
        return TuningConfig(
            tunables=self.tunables, num_frames=self.num_cache_frames, num_steps=self.num_steps
        )

    @property
    def num_kept_frames(self) -> int:
        """Of the latest ones, that the state holds."""
        return max(
            self.num_cache_frames + self.num_looks * self.num_test_frames,
            self.num_drift_frames,
            self.num_control_frames,
        )


# ---- the state -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Frames that were indexed with the incumbent."""

    frames: tuple[Frame, ...]
    result: IndexingResult


@dataclass(frozen=True, kw_only=True)
class Level:
    """How well it goes, to notice when it changes."""

    num_frames: int
    num_indexed: int
    cell_ratio: float
    """NaN = no crystal, as in the next."""
    shift_x_px: float
    shift_y_px: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Search:
    """A search on cached frames; an optimiser can be rebuilt from it at any time."""

    number: int
    tunables: tuple[str, ...]
    origin: Parameters
    """The incumbent when it began: geometry is relative to it, as it is to a user's start."""
    frames: tuple[Frame, ...]
    """(N,)"""
    outcome: Outcome
    """(1,) of the incumbent on them."""
    level: Level
    incumbent_flags: BoolArray
    """(N,) indexed with the incumbent."""
    best: Parameters
    best_flags: BoolArray
    trials: tuple[Trial, ...] = ()
    candidate: Parameters | None = None
    """Proposed, and not judged yet."""
    first: IndexingResult | None = None
    """Of the candidate, on the first frames."""
    tested: tuple[Batch, ...] = ()
    """What the best gave on fresh frames, look by look."""
    tested_flags: BoolArray = field(default_factory=lambda: np.zeros(0, bool))
    """The incumbent's on the same frames."""
    is_refused: bool = False
    """The best was tested and not believed."""
    num_deployed: int = 0
    is_stale: bool = False
    """Conditions have changed since it began."""


@dataclass(frozen=True)
class Propose:
    """Which parameters next? Ask the search's optimiser."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """What do these parameters give on these frames?"""

    purpose: Literal["search", "test", "control"]
    parameters: Parameters
    frames: tuple[Frame, ...]
    baseline: BoolArray
    """Indexed with the incumbent (search: with the best so far)."""


@dataclass(frozen=True)
class Wait:
    """Nothing to do until more frames have been processed."""


Question = Propose | Index | Wait


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """All that is known; what a restart begins with."""

    initial: Parameters
    """The user's."""
    incumbent: Parameters
    version: int = 1
    """Of the incumbent; goes up with every change."""
    recent: tuple[Batch, ...] = ()
    """The latest frames processed with the incumbent, oldest first."""
    num_processed: int = 0
    """Frames, by the pipeline."""
    num_indexed: int = 0
    num_skipped: int = 0
    """Frames that the pipeline could not read."""
    num_searched: int = 0
    """Frames indexed for searches."""
    num_tested: int = 0
    """Frames indexed for tests and controls."""
    num_searches: int = 0
    num_deployed: int = 0
    num_refused: int = 0
    num_refused_now: int = 0
    """Since the last deployment, or since conditions changed."""
    search: Search | None = None
    question: Question = Wait()
    rest_level: Level | None = None
    """When the rest began; None = a search is due."""
    rest_began: int = 0
    """``num_processed`` then."""
    last_control: int = 0
    """``num_processed`` at the last one."""
    num_control: int = 0
    """Frames of all controls so far."""
    num_control_tuned: int = 0
    """Of these, indexed with the incumbent of the time."""
    num_control_initial: int = 0
    """And with the initial parameters."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Processed:
    """The pipeline has indexed frames with version ``version`` of the parameters."""

    frames: tuple[Frame, ...]
    result: IndexingResult
    version: int


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """The answer to ``Propose``."""

    parameters: Parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class Indexed:
    """The answer to ``Index``."""

    result: IndexingResult


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The answer to ``Index`` where the indexer gave up, for instance on time."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """The pipeline could not index these frames, and goes on without them."""

    frames: tuple[Frame, ...]
    reason: str


Event = Processed | Skipped | Proposed | Indexed | Failed
Happened = dict[str, Any]
"""A line for the audit log: ``what``, and its numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """The new state, whose ``question`` is open now, and what is worth writing down."""

    state: State
    happened: tuple[Happened, ...] = ()


# ---- the step ------------------------------------------------------------------------------------


def begin(initial: Parameters) -> State:
    """Nothing has happened yet."""
    return State(initial=initial, incumbent=initial)


def resumed(config: OnlineConfig, state: State) -> State:
    """The state of an earlier run under rules that may have changed: a search of others ends."""
    if state.search is None or state.search.tunables == config.tunables:
        return state
    return replace(state, search=None, question=Wait())


def step(config: OnlineConfig, state: State, event: Event) -> Decision:
    """What has happened, taken in; the new state's question is what to do next.

    Raises:
        ValueError: an answer to a question that is not open, or that does not fit it.
    """
    notes: list[Happened] = []
    if isinstance(event, Skipped):
        notes.append(
            {
                "what": "skipped",
                "frames": [str(frame) for frame in event.frames],
                "reason": event.reason,
            }
        )
        state = replace(state, num_skipped=state.num_skipped + len(event.frames))
        return Decision(state=state, happened=tuple(notes))
    if isinstance(event, Processed):
        state = _processed(config, state, event, notes)
        if isinstance(state.question, Wait):
            state = _next(config, state, notes)
        return Decision(state=state, happened=tuple(notes))
    question, search = state.question, state.search
    if isinstance(event, Proposed):
        if not isinstance(question, Propose) or search is None:
            raise ValueError(f"parameters were proposed, and the question is {question}")
        state = replace(state, search=replace(search, candidate=event.parameters))
    else:
        if not isinstance(question, Index):
            raise ValueError(f"frames were indexed, and the question is {question}")
        if isinstance(event, Failed):
            notes.append({"what": "failed", "for": question.purpose, "reason": event.reason})
            result = _nothing(len(question.frames))
        else:
            result = event.result
        if result.num_frames != len(question.frames):
            raise ValueError(
                f"{result.num_frames} frames were indexed, and {len(question.frames)} were asked "
                "for"
            )
        state = _ANSWERED[question.purpose](config, state, question, result, notes)
    return Decision(
        state=_next(config, replace(state, question=Wait()), notes), happened=tuple(notes)
    )


def _processed(
    config: OnlineConfig, state: State, event: Processed, notes: list[Happened]
) -> State:
    result = event.result
    notes.append(
        {
            "what": "processed",
            "version": event.version,
            "num_frames": result.num_frames,
            "num_hits": result.num_hits,
            "num_indexed": result.num_indexed,
            "num_crystals": result.num_crystals,
            "first_frame": str(event.frames[0]),
            "last_frame": str(event.frames[-1]),
            "backend": result.version,
            "argv": list(result.argv),
        }
    )
    state = replace(
        state,
        num_processed=state.num_processed + result.num_frames,
        num_indexed=state.num_indexed + result.num_indexed,
    )
    if event.version != state.version:  # under way when the parameters changed
        return state
    recent = state.recent
    if recent and recent[-1].result.version != result.version:
        notes.append({"what": "backend changed", "backend": result.version})
        recent = ()
        if state.search is not None:
            state = replace(state, search=replace(state.search, is_stale=True))
    recent = (*recent, Batch(frames=event.frames, result=result))
    while len(recent) > 1 and _count(recent[1:]) >= config.num_kept_frames:
        recent = recent[1:]
    state = replace(state, recent=recent)
    if state.search is not None and not state.search.is_stale:
        if reason := _drift(config, state.search.level, recent):
            notes.append({"what": "drift", "during": "search", "reason": reason})
            stale = replace(state.search, is_stale=True)
            state = replace(state, search=stale, num_refused_now=0)
    elif state.search is None and state.rest_level is not None:
        rested = state.num_processed - state.rest_began
        if reason := _drift(config, state.rest_level, recent):
            notes.append({"what": "drift", "during": "rest", "reason": reason})
            state = replace(state, rest_level=None, num_refused_now=0)
        elif rested >= config.rest_frames:
            state = replace(state, rest_level=None)
    return state


def _next(config: OnlineConfig, state: State, notes: list[Happened]) -> State:
    """The state with the question that follows from it."""
    search = state.search
    if search is not None and search.candidate is not None:
        return replace(state, question=_on_candidate(config, search))
    is_control_due = 0 < config.control_every <= state.num_processed - state.last_control
    if is_control_due and state.incumbent != state.initial:
        frames, flags = _latest(state.recent, config.num_control_frames)
        if len(frames) == config.num_control_frames:
            control = Index(
                purpose="control", parameters=state.initial, frames=frames, baseline=flags
            )
            return replace(state, question=control)
    if search is not None:
        is_over = search.is_stale or len(search.trials) >= config.num_steps
        if (test := _test(config, state, search, is_over)) is not None:
            return replace(state, question=test)
        if not is_over:
            return replace(state, question=Propose())
        if _is_promising(config, search) and not search.is_refused and not search.is_stale:
            return replace(state, question=Wait())  # for fresh frames to test the best on
        notes.append(
            {
                "what": "search ended",
                "search": search.number,
                "num_trials": len(search.trials),
                "num_deployed": search.num_deployed,
                "is_stale": search.is_stale,
            }
        )
        is_rest = not search.num_deployed and not search.is_stale
        state = replace(
            state,
            search=None,
            rest_level=_level(state.recent, config.num_drift_frames) if is_rest else None,
            rest_began=state.num_processed,
        )
    if state.rest_level is None:
        frames, flags = _latest(state.recent, config.num_cache_frames)
        if len(frames) == config.num_cache_frames:
            return _search_begun(config, state, frames, flags, notes)
    return replace(state, question=Wait())


def _search_begun(
    config: OnlineConfig,
    state: State,
    frames: tuple[Frame, ...],
    flags: BoolArray,
    notes: list[Happened],
) -> State:
    number = state.num_searches + 1
    result = concatenate([b.result for b in _covering(state.recent, config.num_cache_frames)])
    outcome = Outcome.of(BatchResult.of([result]))
    outcome = replace(
        outcome,
        indexed_fraction=np.array([flags.mean()]),
        num_indexed=np.array([float(flags.sum())]),
    )
    search = Search(
        number=number,
        tunables=config.tunables,
        origin=state.incumbent,
        frames=frames,
        outcome=outcome,
        level=_level(state.recent, config.num_drift_frames),
        incumbent_flags=flags,
        best=state.incumbent,
        best_flags=flags,
    )
    notes.append({"what": "search began", "search": number, "fraction": float(flags.mean())})
    return replace(state, search=search, num_searches=number, question=Propose())


def _on_candidate(config: OnlineConfig, search: Search) -> Index:
    """The candidate on the first frames, then on the others."""
    assert search.candidate is not None
    first = config.num_first_frames or len(search.frames)
    part = slice(0, first) if search.first is None else slice(first, None)
    return Index(
        purpose="search",
        parameters=search.candidate,
        frames=search.frames[part],
        baseline=search.best_flags[part],
    )


def _is_promising(config: OnlineConfig, search: Search) -> bool:
    z, num_discordant = mcnemar_z(search.best_flags, search.incumbent_flags)
    return num_discordant > 0 and z >= config.promising_z


def _test(config: OnlineConfig, state: State, search: Search, is_over: bool) -> Index | None:
    """The test that is due, if any: of a best that is worth it, on frames that nobody has seen."""
    if search.is_refused or not _is_promising(config, search):
        return None
    is_worth_it = is_significant(
        search.best_flags, search.incumbent_flags, config.min_z, config.min_discordant
    )
    if not (is_over or is_worth_it or search.tested):
        return None
    seen = {*search.frames, *(frame for batch in search.tested for frame in batch.frames)}
    frames, flags = _latest(state.recent, config.num_test_frames, without=seen)
    if len(frames) < config.num_test_frames:
        return None
    return Index(purpose="test", parameters=search.best, frames=frames, baseline=flags)


def _searched(
    config: OnlineConfig,
    state: State,
    question: Index,
    result: IndexingResult,
    notes: list[Happened],
) -> State:
    """A candidate was indexed on the first frames, or on the others."""
    search = state.search
    assert search is not None and search.candidate is not None
    state = replace(state, num_searched=state.num_searched + result.num_frames)
    if search.first is not None:
        result = _joined(search.first, result)
    num = result.num_frames
    gain = result.indexed_fraction - float(search.best_flags[:num].mean())
    if num < len(search.frames) and gain >= 0:
        return replace(state, search=replace(search, first=result))
    trial = Trial(
        unit=unit_of(config, search.origin, search.candidate),
        outcome=Outcome.of(BatchResult.of([result])),
        gain=np.array([gain]),
        best_fraction=np.array([search.best_flags.mean()]),
    )
    is_best = num == len(search.frames) and gain > 0
    notes.append(
        {
            "what": "tried",
            "search": search.number,
            "parameters": changes(search.origin, search.candidate),
            "num_frames": num,
            "num_indexed": result.num_indexed,
            "gain": round(gain, 4),
            "is_best": is_best,
            "argv": list(result.argv),
        }
    )
    search = replace(search, trials=(*search.trials, trial), candidate=None, first=None)
    if is_best:
        assert question.parameters is not None
        search = replace(
            search,
            best=question.parameters,
            best_flags=result.is_indexed,
            tested=(),
            tested_flags=search.tested_flags[:0],
            is_refused=False,
        )
    return replace(state, search=search)


def _tested(
    config: OnlineConfig,
    state: State,
    question: Index,
    result: IndexingResult,
    notes: list[Happened],
) -> State:
    """The search's best was indexed on fresh frames: it becomes the incumbent, or does not."""
    search = state.search
    assert search is not None
    state = replace(state, num_tested=state.num_tested + result.num_frames)
    tested = (*search.tested, Batch(frames=question.frames, result=result))
    ours = np.concatenate([batch.result.is_indexed for batch in tested])
    theirs = np.concatenate([search.tested_flags, question.baseline])
    z, num_discordant = mcnemar_z(ours, theirs)
    p, level = sign_p(ours, theirs), config.level(state.num_refused_now, len(tested))
    is_deployed = p <= level
    is_last = len(tested) >= config.num_looks or z < config.hopeless_z
    what = "deployed" if is_deployed else "refused" if is_last else "looked at"
    note: Happened = {
        "what": what,
        "version": state.version + is_deployed,
        "parameters": question.parameters.as_dict(),
        "changed": changes(state.incumbent, question.parameters),
        "num_frames": len(ours),
        "num_indexed": int(ours.sum()),
        "num_indexed_before": int(theirs.sum()),
        "z": round(z, 3),
        "p": p,
        "level": level,
        "num_discordant": num_discordant,
        "backend": result.version,
        "argv": list(result.argv),
    }
    notes.append(note)
    if what == "looked at":
        return replace(state, search=replace(search, tested=tested, tested_flags=theirs))
    search = replace(search, tested=(), tested_flags=theirs[:0])
    if what == "refused":
        search = replace(search, is_refused=True)
        return replace(
            state,
            search=search,
            num_refused=state.num_refused + 1,
            num_refused_now=state.num_refused_now + 1,
        )
    search = replace(
        search,
        incumbent_flags=search.best_flags,
        num_deployed=search.num_deployed + 1,
        level=_level(tested, config.num_drift_frames),
    )
    return replace(
        state,
        incumbent=question.parameters,
        version=state.version + 1,
        recent=tested,
        num_deployed=state.num_deployed + 1,
        num_refused_now=0,
        search=search,
    )


def _controlled(
    config: OnlineConfig,
    state: State,
    question: Index,
    result: IndexingResult,
    notes: list[Happened],
) -> State:
    """The initial parameters were indexed beside the incumbent."""
    z, num_discordant = mcnemar_z(result.is_indexed, question.baseline)
    is_reverted = is_significant(
        result.is_indexed, question.baseline, config.revert_z, config.min_discordant
    )
    notes.append(
        {
            "what": "control",
            "num_frames": result.num_frames,
            "num_indexed_initial": result.num_indexed,
            "num_indexed_tuned": int(question.baseline.sum()),
            "z": round(-z, 3),
            "num_discordant": num_discordant,
            "argv": list(result.argv),
        }
    )
    state = replace(
        state,
        num_tested=state.num_tested + result.num_frames,
        last_control=state.num_processed,
        num_control=state.num_control + result.num_frames,
        num_control_tuned=state.num_control_tuned + int(question.baseline.sum()),
        num_control_initial=state.num_control_initial + result.num_indexed,
    )
    if not is_reverted:
        return state
    notes.append({"what": "reverted", "version": state.version + 1, "z": round(z, 3)})
    return replace(
        state,
        incumbent=state.initial,
        version=state.version + 1,
        recent=(Batch(frames=question.frames, result=result),),
        search=None,
        rest_level=None,
    )


_ANSWERED = {"search": _searched, "test": _tested, "control": _controlled}


# ---- statistics of pairs -------------------------------------------------------------------------


def mcnemar_z(ours: BoolArray, theirs: BoolArray) -> tuple[float, int]:
    """McNemar's z of flags on the same frames, and the number of discordant pairs.

    z = (b - c) / sqrt(b + c), b frames that only ``ours`` has, c that only ``theirs`` has
    (McNemar, Psychometrika 12 (1947) 153); 0 without any.
    """
    b, c = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return (b - c) / math.sqrt(b + c) if b + c else 0.0, b + c


def sign_p(ours: BoolArray, theirs: BoolArray) -> float:
    """P of so many won pairs, or more, were ``ours`` no better: exact, so few pairs do not fool it.

    Of n discordant pairs b are won: P(Binomial(n, 1/2) >= b).
    """
    b, c = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return float(betainc(b, c + 1, 0.5)) if b else 1.0


def is_significant(ours: BoolArray, theirs: BoolArray, min_z: float, min_discordant: int) -> bool:
    """Whether ``ours`` is believed to be better."""
    z, num_discordant = mcnemar_z(ours, theirs)
    return z > min_z and num_discordant >= min_discordant


def _drift(config: OnlineConfig, before: Level, recent: Sequence[Batch]) -> str:
    """Why the latest frames are not what they were; empty = they are."""
    now = _level(recent, config.num_drift_frames)
    if now.num_frames < config.num_drift_frames:
        return ""
    shared = (before.num_indexed + now.num_indexed) / (before.num_frames + now.num_frames)
    variance = shared * (1 - shared) * (1 / before.num_frames + 1 / now.num_frames)
    p, q = before.num_indexed / before.num_frames, now.num_indexed / now.num_frames
    if variance > 0 and (p - q) / math.sqrt(variance) > config.drift_z:
        return f"indexed fraction {p:.3f} -> {q:.3f}"
    if min(before.num_indexed, now.num_indexed) < MIN_CRYSTALS:
        return ""
    cell = 100 * (now.cell_ratio - before.cell_ratio)
    if abs(cell) > config.drift_cell_percent:  # never for NaN
        return f"fitted cell {cell:+.2f} %"
    shift = math.hypot(now.shift_x_px - before.shift_x_px, now.shift_y_px - before.shift_y_px)
    if shift > config.drift_shift_px:
        return f"spots by {shift:.2f} px"
    return ""


def _level(recent: Sequence[Batch], num_frames: int) -> Level:
    """Of the latest batches with so many frames, or of all."""
    return _level_of([batch.result for batch in _covering(recent, num_frames)])


def _level_of(results: Sequence[IndexingResult]) -> Level:
    joined = concatenate(results)
    return Level(
        num_frames=joined.num_frames,
        num_indexed=joined.num_indexed,
        cell_ratio=joined.cell_ratio,
        shift_x_px=float(joined.spot_shift_px[0]),
        shift_y_px=float(joined.spot_shift_px[1]),
    )


# ---- frames --------------------------------------------------------------------------------------


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(batch.frames) for batch in batches)


def _covering(recent: Sequence[Batch], num_frames: int) -> Sequence[Batch]:
    """The fewest latest batches with so many frames, or all."""
    first = len(recent) - 1
    while first > 0 and _count(recent[first:]) < num_frames:
        first -= 1
    return recent[max(first, 0) :]


def _latest(
    recent: Sequence[Batch], num_frames: int, without: set[Frame] | None = None
) -> tuple[tuple[Frame, ...], BoolArray]:
    """The latest so many frames, or all, oldest first, and the incumbent's flags on them."""
    pairs = [
        (frame, flag)
        for batch in recent
        for frame, flag in zip(batch.frames, batch.result.is_indexed, strict=True)
        if not without or frame not in without
    ][-num_frames:]
    return tuple(frame for frame, _ in pairs), np.array([flag for _, flag in pairs], bool)


def _joined(first: IndexingResult, rest: IndexingResult) -> IndexingResult:
    """One result, also where one of the two failed."""
    return concatenate([first, replace(rest, version=first.version)])


def _nothing(num_frames: int) -> IndexingResult:
    """What parameters are worth with which the indexer gives up."""
    nothing = np.zeros(num_frames, bool)
    return IndexingResult(
        is_indexed=nothing,
        is_hit=nothing,
        num_peaks=np.zeros(num_frames, int),
        num_crystals=0,
        mean_cell=np.full(6, np.nan),
        cell_ratio=math.nan,
        residual_px=math.nan,
        spot_shift_px=np.full(2, np.nan),
        cpu_s=0.0,
        version="",
    )


# ---- parameters and units ------------------------------------------------------------------------

_IS_GEOMETRY = np.array([tunable.is_geometry for tunable in TUNABLES.values()])
_BOUNDS = np.array([(tunable.low, tunable.high) for tunable in TUNABLES.values()]).T


def values_of(parameters: Parameters) -> FloatArray:
    """(1, V) numbers of all tunables."""
    return np.array([[getattr(parameters, name) for name in TUNABLES]], float)


def unit_of(config: OnlineConfig, origin: Parameters, parameters: Parameters) -> FloatArray:
    """(1, K) numbers 0 to 1, geometry relative to the origin."""
    values = values_of(parameters) - np.where(_IS_GEOMETRY, values_of(origin), 0.0)
    return scale_of(config.tunables).unit(values)


def check_start(config: OnlineConfig, start: Parameters) -> None:
    """Raises ValueError where a tuned parameter begins out of bounds, geometry apart."""
    scale_of(config.tunables).check(np.where(_IS_GEOMETRY, 0.0, values_of(start)))


def parameters_of(config: OnlineConfig, origin: Parameters, unit: FloatArray) -> Parameters:
    """Parameters of (1, K) numbers; within the bounds, with at most 4 decimals, as in a log."""
    start = np.where(_IS_GEOMETRY, 0.0, values_of(origin))
    values = scale_of(config.tunables).values(unit, start)
    values = values + np.where(_IS_GEOMETRY, values_of(origin), 0.0)
    tuned = np.isin(list(TUNABLES), config.tunables)
    values = np.where(tuned, np.clip(values, *_BOUNDS), values)
    names = dict(zip(TUNABLES, np.round(values[0], 4).tolist(), strict=True))
    return origin.replace(**{name: names[name] for name in config.tunables})


def changes(before: Parameters, after: Parameters) -> dict[str, float]:
    """What is different."""
    old = before.as_dict()
    return {name: value for name, value in after.as_dict().items() if value != old[name]}


# ---- the optimiser -------------------------------------------------------------------------------


class Tuner:
    """The optimiser of whatever search is on.

    Only a cache: it is what its search's trials have made it, so that a restart, which has lost it,
    rebuilds it by telling them again.
    """

    def __init__(self, config: OnlineConfig, make: Make) -> None:
        """``make``: one of ``rivals.RIVALS`` or ``TuningPolicy.make``."""
        self.config, self.make = config, make
        self._number = 0
        self._optimiser: Optimiser | None = None
        self._num_told = 0

    def propose(self, search: Search) -> Parameters:
        """The answer to ``Propose``."""
        if self._optimiser is None or self._number != search.number:
            start = np.where(_IS_GEOMETRY, 0.0, values_of(search.origin))
            rng = np.random.default_rng([self.config.seed, search.number])
            self._optimiser = self.make(self.config.tuning, start, search.outcome, rng)
            self._number, self._num_told = search.number, 0
            for trial in search.trials:
                self._optimiser.ask()
                self._optimiser.tell(trial)
        else:
            for trial in search.trials[self._num_told :]:
                self._optimiser.tell(trial)
        self._num_told = len(search.trials)
        return parameters_of(self.config, search.origin, self._optimiser.ask())


# ---- as plain values -----------------------------------------------------------------------------

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        State, Batch, Level, Search, Propose, Index, Wait, Parameters, Frame, IndexingResult,
        Trial, Outcome,
    )
}  # fmt: skip


def to_plain(value: Any) -> Any:
    """A state as JSON has it (NaN included, which Python's reads)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__} | fields
    if isinstance(value, np.ndarray):
        return {"is": "array", "dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def from_plain(value: Any) -> Any:
    """The other way; raises ValueError, TypeError or KeyError for what is no state."""
    if isinstance(value, list):
        return tuple(from_plain(item) for item in value)
    if not isinstance(value, dict):
        return value
    if value["is"] == "array":
        return np.array(value["values"], dtype=value["dtype"])
    fields = {name: from_plain(item) for name, item in value.items() if name != "is"}
    return _KINDS[value["is"]](**fields)
