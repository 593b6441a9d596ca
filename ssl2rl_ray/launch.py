"""One run of any kind, from its config to its folder: what ``ssl2rl run`` and every trial do.

A kind is two functions, imported only when they are needed: ``data_hashes(config)``, which raises
whatever is wrong with the data, and ``train(config, run, progress=...)``, which fills the folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from ssl2rl_ray.config import RunConfig
from ssl2rl_ray.runs import RunDirectory

Progress = Callable[[dict[str, Any]], None]


def run_config(
    config: RunConfig,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    argv: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains as the config says, in a new folder or from where the run in it was.

    Args:
        config: of any kind.
        folder: of the run.
        resume: go on with the run that was begun there.
        argv: the command line, for the manifest.
        progress: told each row of metrics; None prints lines to stderr.

    Returns:
        The summary.

    Raises:
        ValueError: a mistake in the data (then no folder is made), settings that do not go
            together, or a folder that cannot be used (``RunError``).
        KeyboardInterrupt: after Ctrl-C, once the state is safe on disk.
    """
    data_hashes, train = KINDS[config.kind]()
    hashes = data_hashes(config)
    start = RunDirectory.resume if resume else RunDirectory.create
    with start(folder, config, argv=argv, data_hashes=hashes) as run:
        return train(config, run, progress=progress)


def _navigation() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.train import data_hashes, train

    return data_hashes, functools.partial(train, is_drawn=True)


def _perception() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.perception.trainer import data_hashes, train_classifier

    return data_hashes, train_classifier


def _ssl2rl() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.loop.ssl2rl import data_hashes, ssl2rl

    return data_hashes, ssl2rl


def _crystfel() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.tuning.train import data_hashes, train

    return data_hashes, functools.partial(train, is_drawn=True)


KINDS: dict[str, Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "navigation": _navigation,
    "perception": _perception,
    "ssl2rl": _ssl2rl,
    "crystfel": _crystfel,
}
"""Of each ``kind``: imports and returns ``data_hashes`` and ``train``."""
