"""The run directory: the only reader and writer of the files of a run.

    config.yaml       the merged config; the whole of what was asked for
    manifest.json     versions, revision, arguments, data hashes, seed, times, status
    metrics.jsonl     one JSON object a line, appended
    checkpoints/      some folders and index.json, which says which is the latest and which the best
    policy/           the exported artefact, which acts without Ray (kind navigation)
    model/            the classifier and all that predicting needs (kind perception)
    calibration.json  what turns predictions of any session into probabilities for this policy
    summary.json      the results that a report quotes
    sample.json, f0/, methods/NAME/round-NN/   (kind ssl2rl) the data in numbers; a run of kind
                      perception or navigation for each stage; round.json once a round is complete

Files other than ``metrics.jsonl`` appear whole or not at all: written under a temporary name,
synced, renamed. Rows are logged before the checkpoint of the same step: a run killed between the
two says the row once more, and none is lost. No torch and no Ray: what is in a checkpoint is its
writer's business.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd

from ssl2rl_ray.config import RunConfig, load_config, own_version
from ssl2rl_ray.schema import to_dict, to_yaml

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps two writers apart
    fcntl = None

FORMAT = "ssl2rl-run"
FORMAT_VERSION = 1
STEPS = ("num_env_steps", "epoch")
"""What counts the progress of a run: the first of them that a row of metrics has."""
_PACKAGES = ("ray", "torch", "numpy", "gymnasium", "pandas", "pyarrow", "scipy")


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of an OSError: nothing can be written there, and a user can change that."""


class RunError(ValueError):
    """A run directory cannot be used; the message says why and what to do next."""


class RunDirectory:
    """One run on disk.

    ``create`` and ``resume`` return a writer, which is a context manager: it holds the run's lock
    and notes in the manifest how the run ended. ``open`` returns a reader.
    """

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """Use ``create``, ``resume`` or ``open``."""
        self.path = path
        self._lock = lock

    # ------------------------------------------------------------ opening

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: RunConfig,
        *,
        argv: Sequence[str] = (),
        data_hashes: Mapping[str, str] | None = None,
    ) -> Self:
        """Starts a run in a folder that does not exist or is empty.

        Args:
            path: the folder; its parents are made.
            config: saved as config.yaml.
            argv: the command line, for the manifest.
            data_hashes: content hash of each dataset by its path.

        Raises:
            RunError: the folder holds a run or something else, or cannot be written.
        """
        folder = Path(path).resolve()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:
            raise RunError(f"cannot make the run directory {folder}: {error}") from error
        if found and not _is_stillborn(found):
            if _is_run(folder):
                raise RunError(
                    f"{folder} holds a run already: add --resume to go on with it, "
                    "or choose another --run-dir"
                )
            raise RunError(
                f"{folder} is not empty ({found[0]!r}) and not a run: choose another --run-dir"
            )
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": config.kind,
            "seed": config.seed,
            "data_hashes": dict(data_hashes or {}),
            "git_revision": git_revision(Path(__file__).resolve().parents[1]),
            "status": "running",
            "attempts": [_attempt(argv)],
        }
        with _locked(folder) as lock:
            run = cls(folder, lock)
            write_text(folder / "config.yaml", to_yaml(config))
            run._write_manifest(manifest)
        return run

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        config: RunConfig,
        *,
        argv: Sequence[str] = (),
        data_hashes: Mapping[str, str] | None = None,
    ) -> Self:
        """Goes on with a run that was begun with an equal config and the same data.

        Raises:
            RunError: no run there, another config or other data (each difference is named), or
                another process is writing to it.
        """
        run = cls.open(path)
        if changes := list(differences(to_dict(run.config), to_dict(config))):
            raise RunError(
                f"{run.path} was begun with another config:\n  "
                + "\n  ".join(changes)
                + "\nresume with its own config.yaml, or start another --run-dir"
            )
        begun_on = run.manifest["data_hashes"]  # empty: without data, or not noted
        if data_hashes is not None and begun_on and dict(data_hashes) != begun_on:
            raise RunError(
                f"{run.path} was begun on other data: {begun_on}, now {dict(data_hashes)}: "
                "start another --run-dir"
            )
        with _locked(run.path) as run._lock:
            run._mend_metrics()
            run._remove_leftovers()
            manifest = run.manifest  # again: until the lock was ours, another writer may have ended
            manifest["status"] = "running"
            attempt = _attempt(argv)
            if last := run.checkpoints[-1:]:
                attempt["resumed_at"] = last[0]["step"]
            manifest["attempts"].append(attempt)
            run._write_manifest(manifest)
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """A run to read from; raises RunError where there is none or a newer program wrote it."""
        folder = Path(path).resolve()
        if not _is_run(folder):
            raise RunError(
                f"{folder} is not a run directory (no manifest.json of a run): "
                "give the --run-dir of `ssl2rl run`"
            )
        run = cls(folder)
        if (found := run.manifest.get("format_version", 0)) > FORMAT_VERSION:
            raise RunError(
                f"{folder} has format version {found}, this program reads up to {FORMAT_VERSION}: "
                "update ssl2rl-ray"
            )
        return run

    @property
    def is_writer(self) -> bool:
        """True for ``create`` and ``resume``, until closed."""
        return self._lock is not None

    @property
    def is_stage(self) -> bool:
        """Whether it is part of another run, in whose folder it lies."""
        return any(_is_run(folder) for folder in self.path.parents)

    # ------------------------------------------------------------ how a run ends

    def finish(self, status: str, error: str | None = None) -> None:
        """Notes the end (as ``status``) and gives the lock back."""
        if self._lock is None:
            return
        try:
            manifest = self.manifest
            manifest["status"] = status
            manifest["attempts"][-1] |= {"finished": _now(), "status": status, "error": error}
            self._write_manifest(manifest)
        finally:  # the process may go on, and another one with the run
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finished, failed, or after Ctrl-C interrupted (else as the ``Stop`` says).

        A full disk is told with what to do next.
        """
        try:
            if kind is None:
                self.finish("finished")
            elif issubclass(kind, KeyboardInterrupt):
                stop = _STOPS.get()
                self.finish(stop.status if isinstance(stop, Stop) else "interrupted")
            else:
                self.finish("failed", f"{kind.__name__}: {error}")
        except OSError as last:
            error = error or last  # what ended the run counts
        if isinstance(error, OSError) and (told := _told(error, self.path)) is not error:
            raise told from error
        if kind is None and error is not None:
            raise error

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed``, ``interrupted`` or ``stopped``.

        A killed run is interrupted; one that a sweep gave up on the way is stopped.
        """
        status = self.manifest["status"]
        if status == "running" and not self.is_writer and not _is_locked(self.path):
            return "interrupted"
        return status

    # ------------------------------------------------------------ what was asked for

    @property
    def config(self) -> RunConfig:
        """The merged config; raises ConfigError where config.yaml was edited into nonsense."""
        return load_config(self.path / "config.yaml")

    @property
    def manifest(self) -> dict[str, Any]:
        """As on disk."""
        manifest = self._read_json("manifest.json")
        assert manifest is not None
        return manifest

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self._write_json("manifest.json", manifest)

    # ------------------------------------------------------------ metrics

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one row of metrics: plain or numpy scalars, text, None.

        NaN and infinity, which JSON lacks, become null. ``attempt`` and ``time`` are added.
        """
        self._check_writer()
        row = {"attempt": len(self.manifest["attempts"]) - 1, "time": _now(), **row}
        line = json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False)
        _append(self.path / "metrics.jsonl", (line + "\n").encode())

    def metrics(self) -> pd.DataFrame:
        """All rows in order; a damaged line (the last one after a kill) is left out.

        Where a resumed run went over the same steps (``STEPS``) again, the later rows count: those
        of an attempt up to the checkpoint that the next one went on from.
        """
        rows = [row for line in self._metric_lines() if (row := _json_object(line)) is not None]
        ends: dict[int, float] = {  # of each attempt: the last step of those before it that counts
            number: attempt["resumed_at"]
            for number, attempt in enumerate(self.manifest["attempts"])
            if "resumed_at" in attempt
        }
        for row in rows:  # begun anew, or by a program that did not note it: before its first row
            if (step := _step(row)) is not None and row.get("attempt", 0):
                ends.setdefault(row["attempt"], math.nextafter(step, -math.inf))

        def is_current(row: dict[str, Any]) -> bool:
            step, attempt = _step(row), row.get("attempt", 0)
            if step is None:
                return True
            return all(step <= end for later, end in ends.items() if later > attempt)

        return pd.DataFrame([row for row in rows if is_current(row)])

    def _metric_lines(self) -> list[bytes]:
        try:
            return (self.path / "metrics.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []

    def _mend_metrics(self) -> None:
        """Cuts off a half-written last line, so that the next row begins a line of its own."""
        lines = self._metric_lines()
        if lines and lines[-1]:
            path = self.path / "metrics.jsonl"
            os.truncate(path, path.stat().st_size - len(lines[-1]))

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        value: float | None = None,
        num_kept: int = 2,
    ) -> Path:
        """Adds a checkpoint; the folder appears under its name once it is complete.

        Args:
            step: env steps or epochs so far.
            write: fills an empty folder.
            value: result of the validation; the checkpoint with the highest one is the best.
            num_kept: latest checkpoints that stay, beside the best.

        Returns:
            Its folder.
        """
        self._check_writer()
        root = self.path / "checkpoints"
        root.mkdir(exist_ok=True)
        name = _free_name(root, f"step-{step:09d}")
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        try:
            write(temporary)
            _sync_tree(temporary)
            temporary.chmod(0o755)  # mkdtemp's are private
            temporary.rename(root / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(self.path / "metrics.jsonl")  # its rows came first
        entries = [*self.checkpoints, {"name": name, "step": step}]
        entries[-1]["value"] = _plain(value)
        best = _best(entries)
        kept = [e for e in entries if e is best or e in entries[-max(num_kept, 1) :]]
        self._write_json("checkpoints/index.json", {"checkpoints": kept})
        for entry in entries:  # after the index: it never names what is gone
            if entry not in kept:
                shutil.rmtree(root / entry["name"], ignore_errors=True)
        return root / name

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        """``name, step, value`` of what is kept and still there, oldest first."""
        index = self._read_json("checkpoints/index.json") or {"checkpoints": []}
        root = self.path / "checkpoints"
        return [entry for entry in index["checkpoints"] if (root / entry["name"]).is_dir()]

    @property
    def latest(self) -> Path | None:
        """Folder of the last checkpoint; None = none yet."""
        entries = self.checkpoints
        return self.path / "checkpoints" / entries[-1]["name"] if entries else None

    @property
    def best_checkpoint(self) -> dict[str, Any] | None:
        """The one with the highest value, the first of equals; None = none has a value."""
        return _best(self.checkpoints)

    @property
    def best(self) -> Path | None:
        """Folder of ``best_checkpoint``."""
        best = self.best_checkpoint
        return self.path / "checkpoints" / best["name"] if best else None

    def _remove_leftovers(self) -> None:
        """What a killed writer left behind."""
        known = {entry["name"] for entry in self.checkpoints}
        leftovers = [*self.path.glob(".new-*"), *self.path.glob("checkpoints/.new-*")]
        leftovers += self.path.glob("train-*")  # of Ray Train
        leftovers += [p for p in self.path.glob("checkpoints/step-*") if p.name not in known]
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    # ------------------------------------------------------------ results

    def write_artefact(self, name: str, write: Callable[[Path], None]) -> Path:
        """Puts the exported artefact, made by ``write`` in an empty folder, into ``name/``."""
        self._check_writer()
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self.path))
        try:
            write(temporary)
            _sync_tree(temporary)
            temporary.chmod(0o755)
            if (target := self.path / name).exists():
                target.rename(Path(tempfile.mkdtemp(prefix=".new-", dir=self.path)) / "old")
            temporary.rename(target)
        finally:
            for leftover in self.path.glob(".new-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        return target

    def artefact(self, name: str) -> Path | None:
        """Folder of the exported artefact; None = none yet."""
        path = self.path / name
        return path if path.is_dir() else None

    @property
    def policy(self) -> Path | None:
        """Folder of a navigation run's exported policy; None = none yet."""
        return self.artefact("policy")

    def write_calibration(self, calibration: Mapping[str, Any]) -> None:
        """As ``envs.cryoem.calibration.Calibration.to_json`` gives it."""
        self._check_writer()
        self._write_json("calibration.json", calibration)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """For ``Calibration.from_json``; None = none stored."""
        return self._read_json("calibration.json")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """The results that a report quotes."""
        self._check_writer()
        self._write_json("summary.json", summary)

    @property
    def summary(self) -> dict[str, Any] | None:
        """None = the run has not come that far."""
        return self._read_json("summary.json")

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Puts plain values into ``name``, such as ``methods/fixmatch/round-00/round.json``."""
        self._check_writer()
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        self._write_json(name, record)

    def record(self, name: str) -> dict[str, Any] | None:
        """What ``write_record`` put there; None = nothing yet."""
        return self._read_json(name)

    # ------------------------------------------------------------ files

    def _check_writer(self) -> None:
        if not self.is_writer:
            raise RunError(f"{self.path} is open for reading: use RunDirectory.create or resume")

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_text(self.path / name, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        if (value := _json_object(data)) is None:
            raise RunError(f"{self.path / name} is damaged: restore it from a copy of the run")
        return value


def _step(row: Mapping[str, Any]) -> float | None:
    """How far the run had come at a row of metrics; None = it does not say."""
    found = next((row[name] for name in STEPS if name in row), None)
    return found if isinstance(found, int | float) else None


def _is_run(folder: Path) -> bool:
    try:
        manifest = _json_object((folder / "manifest.json").read_bytes())
    except OSError:
        return False
    return manifest is not None and manifest.get("format") == FORMAT


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _plain(value: Any) -> Any:
    """JSON values: numpy scalars and arrays become Python's, what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy (and torch) without importing them
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _append(path: Path, data: bytes) -> None:
    """Adds to a file, all or nothing; a kill cuts at most these bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            while data:  # a disk that is nearly full takes a part, and says so the next time
                data = data[os.write(descriptor, data) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


def _sync(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        os.fsync(stream.fileno())


def _told(error: OSError, folder: Path) -> OSError:
    """The error of a disk that takes nothing more, with where that is and what to do next."""
    hint = "what is there is whole, and --resume goes on once it can be written again"
    if error.errno not in _NO_ROOM or hint in str(error):
        return error
    return OSError(error.errno, f"{os.strerror(error.errno)} while writing {folder}; {hint}")


def _free_name(root: Path, name: str) -> str:
    """The name, or with the first free number: a resumed run passes the same steps again."""
    return next(
        candidate
        for i in range(10**6)
        if not (root / (candidate := f"{name}-{i}" if i else name)).exists()
    )


def _best(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    rated = [entry for entry in entries if entry["value"] is not None]
    return max(rated, key=lambda entry: entry["value"], default=None)


def acquire_lock(folder: Path) -> int:
    """Holds the folder's lock until the descriptor is closed or the process ends; or RunError."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for pause_s in (0.01, 0.05, 0.2, None):  # a reader that looks holds it for a moment
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if pause_s is not None:
                time.sleep(pause_s)
    os.close(descriptor)
    raise RunError(f"another process is writing to {folder}: wait for it, or choose another folder")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder's lock; given back where what is done within fails, which is then a RunError."""
    lock = None
    try:
        lock = acquire_lock(folder)
        yield lock
    except BaseException as error:
        if lock is not None:
            os.close(lock)
        if isinstance(error, OSError):
            raise RunError(
                f"cannot write to {folder}: {error}; mend that, and try again"
            ) from error
        raise


def _is_stillborn(names: Sequence[str]) -> bool:
    """Whether these are the files of a run that ended before its manifest was there."""
    return ".lock" in names and all(
        name in (".lock", "config.yaml") or name.startswith(".new-") for name in names
    )


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _attempt(argv: Sequence[str]) -> dict[str, Any]:
    """One start of the program: what a reader needs to repeat it."""
    return {
        "started": _now(),
        "finished": None,
        "status": "running",
        "error": None,
        "argv": list(argv),
        "versions": {
            "python": platform.python_version(),
            "ssl2rl-ray": own_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "num_cpus": os.cpu_count(),
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def git_revision(root: Path) -> str | None:
    """The commit checked out at ``root``, read from its files; None = not a checkout."""
    with contextlib.suppress(OSError, ValueError):
        git = root / ".git"
        if git.is_file():  # a worktree points to its own folder
            git = (root / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        common = git / "commondir"
        base = (git / common.read_text().strip()) if common.exists() else git
        if (base / name).exists():
            return (base / name).read_text().strip()
        match = re.search(
            rf"^([0-9a-f]+) {re.escape(name)}$", (base / "packed-refs").read_text(), re.MULTILINE
        )
        return match[1] if match else None
    return None


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """``a.b: old, now new`` for each leaf of nested plain values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            below = f"{path}.{name}" if path else name
            yield from differences(old.get(name), new.get(name), below)
    elif old != new:
        yield f"{path}: {old!r}, now {new!r}"


class Stop(threading.Event):
    """Once set, a run saves its state and ends."""

    status = "interrupted"
    """What its manifest says then."""


_STOPS: ContextVar[threading.Event | None] = ContextVar("_STOPS", default=None)


@contextlib.contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
    """``on_interrupt`` within yields this event: for a thread that signals do not reach."""
    token = _STOPS.set(event)
    try:
        yield
    finally:
        _STOPS.reset(token)


@contextlib.contextmanager
def on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM (of a batch system) lets the step end; the second interrupts."""
    if (given := _STOPS.get()) is not None:
        yield given
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        # Not by print: the signal may have come in the middle of one, and streams take no second.
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted: saving a checkpoint, then stopping\n")

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():  # None: Ray's own, of which Python does not know
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
