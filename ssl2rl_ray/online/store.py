"""The folder of an online run: what a restart needs, what a user takes, what an audit asks.

state.json       everything that the tuner knows; written whole after every event
origin.json      which geometry and cell it is relative to
audit.jsonl      one line for everything that happened, only ever added to
frames.lst       the frames in the order of their processing (where a folder is watched)
tuned.geom       the user's geometry with the incumbent's distance and centre
parameters.json  the incumbent
command.txt      how to index with it
xwiz.toml        the user's EXtra-Xwiz configuration with it (where one was given)

A crash can leave lines in the log whose consequence is not in the state: what they tell happens
again, and ``started again`` names them as ``uncounted``. All other lines add up to the state.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from envs.crystfel.experiment import Experiment
from envs.crystfel.indexamajig import Indexamajig
from envs.crystfel.sfx.formats import tuned_geometry_text
from envs.crystfel.types import Parameters
from envs.crystfel.xwiz import tuned_xwiz
from ssl2rl_ray.online.decide import Happened, State, from_plain, to_plain
from ssl2rl_ray.runs import acquire_lock, write_text


class OnlineError(ValueError):
    """An online run cannot be started or gone on with; the message says why."""


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Store:
    """One folder, held by one process at a time; a context manager."""

    def __init__(self, folder: str | os.PathLike[str], clock: Callable[[], str] = now) -> None:
        """Makes the folder, or opens that of an earlier run.

        Raises:
            OnlineError: the folder holds other things, or another process has it.
        """
        self.folder, self._clock = Path(os.path.abspath(folder)), clock
        self.folder.mkdir(parents=True, exist_ok=True)
        state_path = self.folder / "state.json"
        names = {entry.name for entry in self.folder.iterdir()} - {".lock"}
        if names and not state_path.exists() and "audit.jsonl" not in names:
            raise OnlineError(f"{self.folder} holds other things: name a new folder by --out")
        try:
            self._lock = acquire_lock(self.folder)
        except ValueError as error:
            raise OnlineError(str(error)) from error
        self._num_lines = _mended(self.folder / "audit.jsonl")
        self.uncounted: tuple[int, ...] = ()
        """Lines of the log that an earlier run wrote and no state has taken in."""
        self._audit = open(self.folder / "audit.jsonl", "a", encoding="utf-8")  # noqa: SIM115

    def state(self) -> State | None:
        """Of the earlier run; None = there was none. Raises OnlineError where it is damaged."""
        path = self.folder / "state.json"
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text())
            num_counted = document.pop("num_lines", self._num_lines)
            state = from_plain(document)
            self.uncounted = tuple(range(num_counted + 1, self._num_lines + 1))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise OnlineError(
                f"{path} is damaged or of another version ({error}): start anew with another "
                "--out; parameters.json has the parameters"
            ) from error
        if not isinstance(state, State):
            raise OnlineError(f"{path} is no state of an online run")
        return state

    def check_origin(self, experiment: Experiment) -> None:
        """Offsets are relative to a geometry file: raises OnlineError where it is another now."""
        path = self.folder / "origin.json"
        if not path.exists():
            origin = {"digest": experiment.digest, "geometry": str(experiment.geometry_path)}
            write_text(path, json.dumps(origin | {"cell": str(experiment.cell_path)}) + "\n")
        try:
            digest = json.loads(path.read_text())["digest"]
        except (ValueError, TypeError, KeyError) as error:
            raise OnlineError(f"{path} is damaged: start anew with another --out") from error
        if digest != experiment.digest:
            raise OnlineError(
                f"{experiment.geometry_path} or {experiment.cell_path} has changed since the run "
                f"in {self.folder} began, and its offsets are relative to what they were: start "
                "anew with another --out"
            )

    def save(self, state: State) -> None:
        """Puts the state in place, whole, with how many lines of the log it knows of."""
        document = to_plain(state) | {"num_lines": self._num_lines}
        write_text(self.folder / "state.json", json.dumps(document) + "\n")

    def note(self, happened: Happened) -> None:
        """One more line of the audit log, on disk when this returns."""
        self._num_lines += 1
        line = {"line": self._num_lines, "time": self._clock()} | _plain(happened)
        self._audit.write(json.dumps(line, allow_nan=False) + "\n")
        self._audit.flush()
        os.fsync(self._audit.fileno())

    def publish(self, experiment: Experiment, parameters: Parameters, xwiz: str | None) -> None:
        """Writes what a user takes.

        Args:
            experiment: with the user's geometry.
            parameters: the incumbent.
            xwiz: text of the user's EXtra-Xwiz configuration; None = none.
        """
        original = experiment.geometry_path.read_text(errors="replace")
        geometry = self.folder / "tuned.geom"
        masks_in = experiment.geometry_path.parent
        write_text(
            geometry,
            tuned_geometry_text(original, experiment.geometry, parameters, masks_in=masks_in),
        )
        write_text(
            self.folder / "parameters.json", json.dumps(parameters.as_dict(), indent=1) + "\n"
        )
        write_text(self.folder / "command.txt", self.command(experiment, parameters) + "\n")
        if xwiz is not None:
            tuned = tuned_xwiz(xwiz, parameters, geometry=str(geometry))
            write_text(self.folder / "xwiz.toml", tuned)

    def command(self, experiment: Experiment, parameters: Parameters) -> str:
        """What to paste: CrystFEL's command with the tuned geometry."""
        argv = Indexamajig(experiment=experiment).command(
            parameters,
            frames=str(experiment.frames_path),
            geometry=str(self.folder / "tuned.geom"),
            stream="tuned.stream",
        )
        return shlex.join(argv)

    def audit(self) -> list[dict[str, Any]]:
        """All lines so far."""
        text = (self.folder / "audit.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def close(self) -> None:
        """Lets go of the folder."""
        self._audit.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        """The store."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


def _mended(path: Path) -> int:
    """Ends a line that a crash has cut short, so that the next begins anew; lines so far."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        kept = data[: data.rfind(b"\n") + 1]
        cut = json.dumps({"what": "cut short", "text": data[len(kept) :].decode(errors="replace")})
        write_text(path, kept.decode(errors="replace") + cut + "\n")
        data = path.read_bytes()
    return data.count(b"\n")


def _plain(value: Any) -> Any:
    """NaN becomes null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
