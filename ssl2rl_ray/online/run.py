"""The online mode at work: a pipeline and a tuner beside it, each a worker of its own.

All decisions are ``decide.step``'s; here its questions are carried to workers and their answers
back, and everything is written down before it counts. Workers are Ray actors. One that dies is
started again and asked again; a stream that stalls is waited for; a process that is killed goes on,
when started again, with the question that was open.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from envs.crystfel.experiment import Experiment
from envs.crystfel.indexer import Indexer, IndexerError
from envs.crystfel.rivals import Make
from envs.crystfel.types import Frame, IndexingResult, Parameters
from ssl2rl_ray.online.decide import (
    Decision,
    Event,
    Failed,
    Index,
    Indexed,
    OnlineConfig,
    Processed,
    Propose,
    Proposed,
    Skipped,
    State,
    Tuner,
    Wait,
    begin,
    changes,
    resumed,
    step,
)
from ssl2rl_ray.online.store import Store

PIPELINE, TUNER = "pipeline", "tuner"
MAX_LOSSES = 5
"""Times in a row that a worker may die over the same frames."""
MAX_TRIES = 3
"""Times that frames which cannot be read are tried: a file may still be on its way."""


class Source(Protocol):
    """Frames that come: ``source.GrowingList`` or ``GrowingFolder``."""

    frames: list[Frame]
    unreadable: dict[str, str]

    def poll(self) -> None:
        """Takes in what is new."""
        ...


@dataclass(frozen=True, kw_only=True)
class Done:
    """A worker's answer: a result, or why there is none."""

    name: str
    result: IndexingResult | None = None
    error: str = ""
    is_lost: bool = False
    """The worker died."""


class Workers(Protocol):
    """Two of them, ``pipeline`` and ``tuner``, that index at the same time."""

    def submit(self, name: str, parameters: Parameters, frames: Sequence[Frame]) -> None:
        """Gives an idle worker something to do."""
        ...

    def wait(self, timeout_s: float) -> list[Done]:
        """What has been done since; after at most so long."""
        ...


class RayWorkers:
    """Ray actors; Ray must be connected. One that dies is replaced."""

    def __init__(self, indexer: Indexer) -> None:
        """``indexer`` must pickle."""
        self.indexer = indexer
        self.actors = {name: self._actor() for name in (PIPELINE, TUNER)}
        self._under_way: dict[Any, str] = {}

    def _actor(self) -> Any:
        import ray

        return ray.remote(num_cpus=1, max_restarts=0)(_Worker).remote(self.indexer)

    def submit(self, name: str, parameters: Parameters, frames: Sequence[Frame]) -> None:
        """See ``Workers``."""
        reference = self.actors[name].run.remote(parameters, tuple(frames))
        self._under_way[reference] = name

    def wait(self, timeout_s: float) -> list[Done]:
        """See ``Workers``; errors that are bugs are raised."""
        import ray
        import ray.exceptions

        if not self._under_way:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(list(self._under_way), num_returns=1, timeout=timeout_s)
        done = []
        for reference in ready:
            name = self._under_way.pop(reference)
            try:
                done.append(Done(name=name, result=ray.get(reference)))
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, IndexerError):
                    raise
                done.append(Done(name=name, error=str(error.cause)))
            except ray.exceptions.RayActorError as error:
                done.append(Done(name=name, error=str(error), is_lost=True))
                ray.kill(self.actors[name])  # in case that it was only out of reach
                self.actors[name] = self._actor()
        return done

    def close(self) -> None:
        """Ends the actors."""
        import ray

        for actor in self.actors.values():
            ray.kill(actor)


class _Worker:
    """The actor: an indexer that stays warm."""

    def __init__(self, indexer: Indexer) -> None:
        self.indexer = indexer

    def run(self, parameters: Parameters, frames: tuple[Frame, ...]) -> IndexingResult:
        return self.indexer.run(parameters, frames)


class InlineWorkers:
    """The same in this process, one after the other: no Ray, and no surprises in their order."""

    def __init__(self, indexer: Indexer) -> None:
        """Any indexer."""
        self.indexer = indexer
        self._given: list[tuple[str, Parameters, Sequence[Frame]]] = []

    def submit(self, name: str, parameters: Parameters, frames: Sequence[Frame]) -> None:
        """See ``Workers``."""
        self._given.append((name, parameters, frames))

    def wait(self, timeout_s: float) -> list[Done]:
        """Does the oldest thing that was given."""
        if not self._given:
            time.sleep(timeout_s)
            return []
        name, parameters, frames = self._given.pop(0)
        try:
            return [Done(name=name, result=self.indexer.run(parameters, frames))]
        except IndexerError as error:
            return [Done(name=name, error=str(error))]


@dataclass(frozen=True, kw_only=True)
class Until:
    """When a run ends by itself: with nothing left to do, and one of these."""

    num_frames: int | None = None
    """So many have been processed (or skipped), in all runs together."""
    idle_s: float | None = None
    """No frame has come for so long."""


Curves = Callable[[Mapping[str, float], int], None]
"""``curves(values, num_processed)``, for TensorBoard."""


def serve(
    config: OnlineConfig,
    make: Make,
    workers: Workers,
    source: Source,
    store: Store,
    *,
    experiment: Experiment | None = None,
    initial: Parameters,
    until: Until,
    xwiz: str | None = None,
    batch_frames: int = 50,
    poll_s: float = 1.0,
    stop: threading.Event | None = None,
    curves: Curves | None = None,
    say: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    header: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Processes frames as they come, and tunes, until told to stop.

    Args:
        config: the rules.
        make: of the optimiser.
        workers: who index.
        source: of frames.
        store: where everything is written; an earlier run in it is gone on with.
        experiment: for the files to paste; None = none are written.
        initial: the user's parameters; those of an earlier run in the store go before.
        until: when to end.
        xwiz: the user's EXtra-Xwiz configuration, to be written with tuned values.
        batch_frames: that the pipeline takes at once.
        poll_s: between looks for new frames.
        stop: ends the run after what is under way.
        curves: told numbers for TensorBoard.
        say: told lines for the user.
        clock: seconds.
        header: what the log's line about the start says beside.

    Returns:
        the summary, plain values: counts, parameters, and times: ``agent_s`` for which the
        optimiser thought, ``asked_s`` for which its frames were indexed, the share of the first in
        both.

    Raises:
        OnlineError: a damaged state, or a geometry that is not the one that it is relative to.
        IndexerError: a worker that dies again and again over the same frames.
        FormatError: of the source.
    """
    if experiment is not None:
        store.check_origin(experiment)
    state = store.state()
    is_new = state is None
    state = begin(initial) if state is None else resumed(config, state)
    tell = say or (lambda line: None)
    tuner, started = Tuner(config, make), clock()
    agent_s = asked_s = 0.0
    store.note(
        {
            "what": "started" if is_new else "started again",
            "version": state.version,
            "parameters": state.incumbent.as_dict(),
            "num_processed": state.num_processed,
            "uncounted": list(store.uncounted),
            "config": {**vars(config), "tunables": list(config.tunables)},
            **(header or {}),
        }
    )
    store.save(state)
    if experiment is not None:
        store.publish(experiment, state.incumbent, xwiz)

    def log(happened: Mapping[str, Any]) -> None:
        """Of what no state knows."""
        assert state is not None
        store.note(dict(happened))
        store.save(state)

    def take(event: Event) -> None:
        nonlocal state
        assert state is not None
        before, decision = state, step(config, state, event)
        for happened in decision.happened:
            store.note(happened)
        state = decision.state
        store.save(state)
        if state.version != before.version and experiment is not None:
            store.publish(experiment, state.incumbent, xwiz)
        for line in _lines(before, decision):
            tell(line)
        if curves is not None:
            for values in _values(before, decision):
                curves(values, state.num_processed)

    busy: dict[str, tuple[tuple[Frame, ...], int]] = {}  # frames, version
    num_lost: dict[str, int] = {PIPELINE: 0, TUNER: 0}
    num_tries, last_new, num_seen, asked = 0, clock(), 0, clock()
    told: dict[str, str] = {}
    while stop is None or not stop.is_set():
        source.poll()
        for path, reason in source.unreadable.items():
            if told.get(path) != reason:
                told[path] = reason
                log({"what": "unreadable", "file": path, "reason": reason})
                tell(reason)
        if is_growing := len(source.frames) > num_seen:
            num_seen, last_new = len(source.frames), clock()
        done = state.num_processed + state.num_skipped
        if PIPELINE not in busy and (until.num_frames is None or done < until.num_frames):
            batch = tuple(source.frames[done : done + batch_frames])
            if len(batch) == batch_frames or (batch and not is_growing):
                busy[PIPELINE] = batch, state.version
                workers.submit(PIPELINE, state.incumbent, batch)
        question = state.question
        if isinstance(question, Propose):
            assert state.search is not None
            begun = clock()
            proposed = tuner.propose(state.search)
            agent_s += clock() - begun
            take(Proposed(parameters=proposed))
            continue
        if isinstance(question, Index) and TUNER not in busy:
            busy[TUNER], asked = (question.frames, state.version), clock()
            workers.submit(TUNER, question.parameters, question.frames)
        if not busy and isinstance(question, Wait):
            is_idle = until.idle_s is not None and clock() - last_new >= until.idle_s
            if done >= len(source.frames) and is_idle:
                break
            if until.num_frames is not None and done >= until.num_frames:
                break
        for answer in workers.wait(poll_s):
            frames, version = busy.pop(answer.name)
            if answer.is_lost:
                num_lost[answer.name] += 1
                log({"what": "worker lost", "worker": answer.name, "reason": answer.error[:2000]})
                tell(f"the {answer.name}'s worker died; it is asked again")
                if num_lost[answer.name] >= MAX_LOSSES:
                    raise IndexerError(
                        f"the {answer.name}'s worker died {MAX_LOSSES} times in a row over "
                        f"{frames[0]} and the {len(frames) - 1} frames after it (is there enough "
                        f"memory?): {answer.error[:500]}"
                    )
                continue  # the question, or the frames, are still there
            num_lost[answer.name] = 0
            if answer.name == TUNER:
                asked_s += clock() - asked
                if answer.result is None:
                    take(Failed(reason=answer.error))
                else:
                    take(Indexed(result=answer.result))
            elif answer.result is not None:
                num_tries = 0
                take(Processed(frames=frames, result=answer.result, version=version))
            else:
                num_tries += 1
                log({"what": "pipeline failed", "try": num_tries, "reason": answer.error})
                tell(f"the pipeline failed ({num_tries} of {MAX_TRIES}): {answer.error}")
                if num_tries >= MAX_TRIES:
                    num_tries = 0
                    take(Skipped(frames=frames, reason=answer.error))
    times = {
        "elapsed_s": clock() - started,
        "agent_s": agent_s,
        "asked_s": asked_s,
        "agent_share": agent_s / max(agent_s + asked_s, 1e-9),
    }
    result = summary(state) | times
    log({"what": "ended", **result})
    return result


def summary(state: State) -> dict[str, Any]:
    """Plain values."""
    num = state.num_control
    return {
        "version": state.version,
        "parameters": state.incumbent.as_dict(),
        "changed": changes(state.initial, state.incumbent),
        "num_processed": state.num_processed,
        "num_indexed": state.num_indexed,
        "num_skipped": state.num_skipped,
        "num_searched": state.num_searched,
        "num_tested": state.num_tested,
        "num_searches": state.num_searches,
        "num_deployed": state.num_deployed,
        "num_refused": state.num_refused,
        "control": {
            "num_frames": num,
            "fraction_tuned": state.num_control_tuned / num if num else None,
            "fraction_initial": state.num_control_initial / num if num else None,
        },
    }


def _lines(before: State, decision: Decision) -> list[str]:
    """What a user wants to be told at once."""
    lines = []
    for note in decision.happened:
        if note["what"] == "deployed":
            changed = ", ".join(f"{name} {value:g}" for name, value in note["changed"].items())
            lines.append(
                f"version {note['version']}: {changed}; {note['num_indexed']} of "
                f"{note['num_frames']} fresh frames indexed, {note['num_indexed_before']} before "
                f"(sign test of the pairs: p {note['p']:.1g})"
            )
        elif note["what"] == "reverted":
            lines.append(f"version {note['version']}: back to the initial parameters")
        elif note["what"] == "drift":
            lines.append(f"drift: {note['reason']}")
    return lines


def _values(before: State, decision: Decision) -> list[dict[str, float]]:
    """Numbers for TensorBoard."""
    found: list[dict[str, float]] = []
    for note in decision.happened:
        if note["what"] == "processed":
            share = note["num_indexed"] / note["num_frames"]
            values = {"online/indexed_fraction": share, "online/version": note["version"]}
            values["online/num_searched"] = decision.state.num_searched
            parameters = before.incumbent.as_dict().items()
            found.append(values | {f"parameters/{name}": value for name, value in parameters})
        elif note["what"] in ("control", "deployed", "refused"):
            num = note["num_frames"]
            if note["what"] == "control":
                tuned, initial = note["num_indexed_tuned"], note["num_indexed_initial"]
                values = {"control/tuned": tuned / num, "control/initial": initial / num}
                values["control/gain"] = (tuned - initial) / num
            else:
                after, kept = note["num_indexed"], note["num_indexed_before"]
                values = {"test/candidate": after / num, "test/incumbent": kept / num}
            found.append(values)
    return found
