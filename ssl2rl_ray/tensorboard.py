"""Curves of a run for TensorBoard, all against env steps (or epochs), so that runs compare.

| what | tag |
|---|---|
| every number of a row of metrics.jsonl | its key, such as ``validation/episode_return`` |
| the merged config | text ``config``, at step 0 |
| hyperparameters | the HPARAMS tab, from the start on, beside the metric that validation goes by |
| the map of a tour | image ``map``, at the end (kind navigation) |
| reliability, confusion, mistakes | images of those names, at the end (kind perception) |

A resumed run goes on in a new event file of the same folder and takes out the points at and above
the step where it goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ssl2rl_ray.runs import STEPS


class TensorBoard:
    """Writes the events of one run; a context manager."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Opens an event file.

        Args:
            folder: where TensorBoard is pointed at; made where it is missing.
            first_step: > 0 for a resumed run: points at and above it are taken out.
        """
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about TensorFlow
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=first_step if first_step else None)

    def begin(self, config: Mapping[str, Any], config_text: str, metric: str) -> None:
        """Notes what was asked for: hyperparameters (nested plain values), the config as YAML.

        ``metric`` is the tag that stands beside the hyperparameters.
        """
        from torch.utils.tensorboard.summary import hparams

        self._writer.add_text("config", f"```yaml\n{config_text}\n```", 0)
        for summary in hparams(_flat(config), {metric: 0.0}):
            self._file.add_summary(summary)
        self._writer.flush()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """One point for each finite number of a metrics row; the rest is for metrics.jsonl."""
        for tag, value in row.items():
            if tag in STEPS or isinstance(value, bool) or not isinstance(value, Real):
                continue
            if np.isfinite(float(value)):
                self._writer.add_scalar(tag, float(value), step)
        self._writer.flush()

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """One picture, (H, W, 3) uint8."""
        self._writer.add_image(tag, image, step, dataformats="HWC")
        self._writer.flush()

    def bands(self, charts: Mapping[str, tuple[str, str, str]]) -> None:
        """Charts of the tab "custom scalars": tags of a curve, its lower and its upper bound."""
        layout = {name: ["Margin", list(tags)] for name, tags in charts.items()}
        self._writer.add_custom_scalars({"bands": layout})
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()

    @property
    def _file(self) -> Any:
        return self._writer._get_file_writer()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | int | str]:
    """Dotted names; lists and None, which hyperparameters cannot be, become text."""
    flat: dict[str, bool | float | int | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = (
                value if isinstance(value, bool | float | int | str) else str(value)
            )
    return flat
