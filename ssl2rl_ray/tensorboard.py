"""What a run writes for TensorBoard: one tree of tags for all kinds and algorithms.

``docs/tensorboard.md`` lists the tags; a test holds it against what is written. The rules:

- The step of every point is env steps (epochs of a classifier, rounds of the loop), so that
  algorithms compare whatever an iteration is to them.
- The time of every point is the time of training. A resumed run goes on where its kept part ended
  in time as well: points at and above the step where it goes on are taken out, later ones are
  stamped without the pause. TensorBoard's horizontal axis "Relative" is then the wall clock of
  training, and no curve has to be written twice.
- Hyperparameters are there from the start, without the list of columns that TensorBoard's own
  helper writes beside them: TensorBoard takes that list from one run for all, and would hide what
  only another algorithm has. Without it, it takes all hyperparameters, those that differ first,
  and shows the last value of every tag beside them, live.
"""

# protobuf makes its messages at run time:
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from envs.cryoem.types import FloatArray
from ssl2rl_ray.runs import STEPS

LEARNED = {
    "total_loss": "loss",
    "q_mean": "q_mean",
    "support_ends": "support_ends",
    "policy_loss": "policy_loss",
    "vf_loss": "value_loss",
    "vf_explained_var": "value_explained",
    "entropy": "entropy",
    "curr_entropy_coeff": "entropy_weight",
    "gradients_default_optimizer_global_norm": "gradient_norm",
    "default_optimizer_learning_rate": "learning_rate",
    "step_size": "step_size",
    "log_ratio": "log_ratio",
}
"""What RLlib's learners say -> ``train/...``; each algorithm has some of them."""
_NOT_COMPARED = ("kind", "compute")
"""Sections that are no hyperparameters ..."""
_NOT_COMPARED_ENDS = (
    "num_torch_threads",
    "is_buffer_saved",
    "evaluation_interval_steps",
    "evaluation_interval_epochs",
    "pseudo_labels",
    "initial",
)
"""... and fields that are none: where and how often, files."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """The points of one tag."""

    step: FloatArray
    """(P,) ascending."""
    time_s: FloatArray
    """(P,) seconds since 1970, of resumed runs without the pauses."""
    value: FloatArray
    """(P,)"""


class TensorBoard:
    """Writes the events of one run; a context manager."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Opens an event file.

        Args:
            folder: where TensorBoard is pointed at; made where it is missing.
            first_step: points at and above it are taken out; > 0 for a resumed run, whose time goes
                on from the last point below it.
        """
        _quiet()
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        kept = _Kept.of(folder, first_step)
        self._trained_s, self._is_session = kept.trained_s, kept.is_session
        self._pause_s = time.time() - kept.last[-1].wall_time if kept.last else 0.0
        # The last step that stays is written once more: TensorBoard's fast loader takes points out
        # for a point at or below them only, its slow one for the step that is announced.
        last = kept.last[-1].step if kept.last else first_step
        self._writer = SummaryWriter(str(folder), purge_step=last)
        for event in kept.last:
            self._writer._get_file_writer().add_event(event, last, event.wall_time)
        self._writer.flush()

    def begin(self, config: Mapping[str, Any], config_text: str) -> None:
        """Notes what was asked for: hyperparameters (nested plain values), the config as YAML.

        The run has no end in the tab HPARAMS until it is closed without an error.
        """
        from tensorboard.plugins.hparams import plugin_data_pb2

        self.text("config", f"```yaml\n{config_text}\n```", 0)
        session = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in hyperparameters(config).items():
            if isinstance(value, bool):
                session.hparams[name].bool_value = value
            elif isinstance(value, str):
                session.hparams[name].string_value = value
            else:
                session.hparams[name].number_value = value
        self._add_session(session_start_info=session)

    def log(self, row: Mapping[str, Any], step: int, *, time_s: float | None = None) -> None:
        """One point for each finite number of a metrics row; the rest is for metrics.jsonl.

        ``wall_s``, which a row counts from the last start, becomes that of the whole run.

        Args:
            row: of metrics.
            step: env steps, or epochs, or rounds.
            time_s: of the point, in seconds since 1970; None = now.
        """
        now = self._now() if time_s is None else time_s
        for tag, value in row.items():
            if tag in STEPS or isinstance(value, bool) or not isinstance(value, Real):
                continue
            number = float(value) + (self._trained_s if tag == "wall_s" else 0)
            if np.isfinite(number):
                self._writer.add_scalar(tag, number, step, walltime=now)
        self._writer.flush()

    def image(self, tag: str, image: np.ndarray, step: int) -> None:
        """One picture, (H, W, 3) uint8."""
        self._writer.add_image(tag, image, step, walltime=self._now(), dataformats="HWC")
        self._writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        self._writer.add_text(tag, text, step, walltime=self._now())
        self._writer.flush()

    def bands(self, charts: Mapping[str, tuple[str, str, str]]) -> None:
        """Charts of the tab "custom scalars": tags of a curve, its lower and its upper bound."""
        layout = {name: ["Margin", list(tags)] for name, tags in charts.items()}
        self._writer.add_custom_scalars({"bands": layout})
        self._writer.flush()

    def close(self, *, is_finished: bool = False) -> None:
        """Ends the event file.

        Only a run that is finished has an end in the tab HPARAMS: any other may be resumed, and
        TensorBoard believes the first end that it is told.
        """
        if is_finished and self._is_session:
            from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

            end = plugin_data_pb2.SessionEndInfo(
                status=api_pb2.STATUS_SUCCESS, end_time_secs=self._now()
            )
            self._add_session(session_end_info=end)
        self._writer.close()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes; without an error the run is finished."""
        self.close(is_finished=kind is None)

    # ------------------------------------------------------------ how it is written

    def _now(self) -> float:
        return time.time() - self._pause_s

    def _add_session(self, **content: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        self._is_session = "session_start_info" in content
        data = plugin_data_pb2.HParamsPluginData(**content, version=metadata.PLUGIN_DATA_VERSION)
        tag = metadata.SESSION_START_INFO_TAG if self._is_session else metadata.SESSION_END_INFO_TAG
        value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(data))
        self._writer._get_file_writer().add_summary(Summary(value=[value]), 0, self._now())
        self._writer.flush()


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """What is worth a column beside results: dotted names, plain values, lists as text.

    Left out: what is not set, where a run ran and how often it was looked at, files and folders.
    """
    found: dict[str, bool | float | str] = {}
    for name, value in _flat(config):
        is_data = name.startswith("data.") and not isinstance(value, int | float)
        is_section = name.split(".")[0] in _NOT_COMPARED
        if value is None or is_data or is_section or name.split(".")[-1] in _NOT_COMPARED_ENDS:
            continue
        column = name.removesuffix(".name")  # before its settings in the order of letters
        found[column] = value if isinstance(value, bool | float | int | str) else str(value)
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass
class _Kept:
    """What a run that is resumed takes over from its event files."""

    last: list[Any]
    """Events of the last step that stays."""
    trained_s: float = 0.0
    is_session: bool = False

    @classmethod
    def of(cls, folder: Path, first_step: int) -> _Kept:
        """Reads the events below a step; a torn end of a file is left out."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams import metadata

        found = cls(last=[])
        for path in sorted(folder.glob("events.*")) if first_step else []:
            for event in LegacyEventFileLoader(str(path)).Load():
                if event.session_log.status == SessionLog.START:  # what stays is told after it
                    found = cls(last=[], is_session=found.is_session and event.step > 0)
                elif event.summary.value and event.step < first_step:
                    reached = max((other.step for other in found.last), default=-1)
                    if event.step > reached:
                        found.last = []
                    if event.step >= reached:
                        found.last.append(event)
                    for value in event.summary.value:
                        found.is_session |= value.tag == metadata.SESSION_START_INFO_TAG
                        if value.tag == "wall_s":
                            found.trained_s = max(found.trained_s, value.simple_value)
        return found


def read_curves(folder: Path) -> dict[str, Curve]:
    """The curves in a folder of events as TensorBoard shows them, by tag; none where it is empty.

    Curves of folders below are left out.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("events.*")):
        return {}
    _quiet()
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {
        tag: Curve(
            step=np.array([p.step for p in own], np.float64),
            time_s=np.array([p.wall_time for p in own]),
            value=np.array([p.value for p in own]),
        )
        for tag, own in points.items()
    }


def _quiet() -> None:
    """It warns that TensorFlow is missing, and of every point that a resumed run took out."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
