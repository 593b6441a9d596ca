"""Whatever turns frames and parameters into an indexing result: one protocol, many backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from envs.crystfel.types import Frame, IndexingResult, Parameters


class Indexer(Protocol):
    """An experiment (geometry file, reference cell) with a program that indexes its frames.

    Pure in what it returns: the same parameters and frames give the same result, up to CPU seconds
    (real CrystFEL: up to a frame).
    """

    @property
    def version(self) -> str:
        """Of the backend and of the experiment's geometry and cell; a key of the memo."""
        ...

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """Indexes the frames.

        Returns:
            arrays in the order of ``frames``.

        Raises:
            IndexerError: what went wrong, with which file, and what to do.
        """
        ...


class IndexerError(RuntimeError):
    """An indexer could not do what it was asked; the message says what to do next."""
