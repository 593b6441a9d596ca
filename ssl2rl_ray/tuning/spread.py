"""Frames over Ray tasks: any indexer, on as many cores or machines as Ray has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from envs.crystfel.indexer import Indexer, IndexerError
from envs.crystfel.types import Frame, IndexingResult, Parameters, concatenate

_PER_CPU = 4
"""Tasks per CPU, so that a slow one at the end does not keep the others waiting."""
_MAX_FRAMES_PER_TASK = 50
"""So that a lost worker costs a second of work."""


class SpreadIndexer:
    """An indexer whose frames are shared out to Ray tasks; its results are the same, in order.

    A task whose worker dies is run again elsewhere. Workers keep the indexer warm from call to
    call, but which of them gets which frames is up to Ray: give an ``EmbeddedIndexer`` a ``cache``
    folder that all of them see, so that peaks found by one are known to the others.
    """

    def __init__(
        self, indexer: Indexer, *, frames_per_task: int | None = None, num_tasks: int | None = None
    ) -> None:
        """Ray must be connected by the time that it runs.

        Args:
            indexer: what runs in the tasks; it must pickle.
            frames_per_task: None = about four tasks for each CPU, of at most 50 frames.
            num_tasks: at most so many at once; None = as many as Ray has CPUs for.
        """
        self.indexer = indexer
        self.frames_per_task = frames_per_task
        self.num_tasks = num_tasks
        self._shared: Any = None

    @property
    def version(self) -> str:
        """Of the indexer."""
        return self.indexer.version

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """Indexes the frames; CPU seconds are those of all tasks together.

        Raises:
            IndexerError: as the indexer, or a worker that died again and again.
        """
        import ray
        import ray.exceptions

        if not frames:
            raise IndexerError("no frames to index: the list is empty")
        if self._shared is None:
            self._shared = ray.put(self.indexer)
        cpus = self.num_tasks or int(ray.cluster_resources().get("CPU", 1))
        size = self.frames_per_task or min(
            math.ceil(len(frames) / (_PER_CPU * cpus)), _MAX_FRAMES_PER_TASK
        )
        batches = [frames[i : i + size] for i in range(0, len(frames), size)]
        task = ray.remote(num_cpus=1, max_retries=3)(_index)
        place: dict[Any, int] = {}  # of what is under way
        results: dict[int, IndexingResult] = {}
        try:
            for number, batch in enumerate(batches):
                if len(place) >= cpus:
                    _collect(place, results)
                place[task.remote([self._shared], parameters, batch)] = number
            while place:
                _collect(place, results)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, IndexerError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise IndexerError(
                f"a worker was lost four times over the same frames: {error}"
            ) from error
        finally:
            for reference in place:
                ray.cancel(reference, force=False)
        return concatenate([results[number] for number in range(len(batches))])


def _collect(place: dict[Any, int], results: dict[int, IndexingResult]) -> None:
    """Waits for one task, or more that are ready."""
    import ray

    ready, _ = ray.wait(list(place), num_returns=1)
    for reference in ready:
        number = place.pop(reference)
        results[number] = ray.get(reference)


_WARM: dict[str, Indexer] = {}
"""Of a worker: the indexers it used last, with what they have worked out."""
_MAX_WARM = 4


def _index(shared: list[Any], parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
    """What a task does. The reference comes in a list, so that Ray hands it over unread."""
    import ray

    key = shared[0].hex()
    if key not in _WARM:
        while len(_WARM) >= _MAX_WARM:
            del _WARM[next(iter(_WARM))]
        _WARM[key] = ray.get(shared[0])
    return _WARM[key].run(parameters, frames)
