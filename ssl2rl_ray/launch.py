"""One run of any kind, from its config to its folder: what ``ssl2rl run`` and every trial do.

A kind is two functions, imported only when they are needed: ``data_hashes(config)``, which raises
whatever is wrong with the data, and ``train(config, run, progress=...)``, which fills the folder.
"""

from __future__ import annotations

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

    def train_and_draw(config: Any, run: RunDirectory, *, progress: Progress | None) -> Any:
        summary = train(config, run, progress=progress)
        _leave_map(run, config, summary["num_env_steps"])
        return summary

    return data_hashes, train_and_draw


def _perception() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.perception.trainer import data_hashes, train_classifier

    return data_hashes, train_classifier


def _ssl2rl() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.loop.ssl2rl import data_hashes, ssl2rl

    return data_hashes, ssl2rl


def _crystfel() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from ssl2rl_ray.tuning.train import data_hashes, train

    return data_hashes, train


KINDS: dict[str, Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]] = {
    "navigation": _navigation,
    "perception": _perception,
    "ssl2rl": _ssl2rl,
    "crystfel": _crystfel,
}
"""Of each ``kind``: imports and returns ``data_hashes`` and ``train``."""


def _leave_map(run: RunDirectory, config: Any, num_env_steps: int) -> None:
    """The trained policy's tour among the run's TensorBoard events."""
    import numpy as np

    from envs.cryoem.synthetic import draw_session
    from ssl2rl_ray.config import navigation_config
    from ssl2rl_ray.data.folder import read_dataset
    from ssl2rl_ray.evaluate import contestant, draw_tour
    from ssl2rl_ray.tensorboard import TensorBoard

    real = [*config.data.validation, *config.data.train]
    table = (
        read_dataset(real[0]).table
        if real
        else draw_session(np.random.default_rng(0), config.sessions.preset)
    )
    image = draw_tour(contestant(str(run.path)), table, navigation_config(config.env))
    with TensorBoard(run.path / "tensorboard", first_step=num_env_steps + 1) as board:
        board.image("map", image, num_env_steps)
