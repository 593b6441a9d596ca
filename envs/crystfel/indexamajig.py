"""The real CrystFEL behind the indexer protocol: ``indexamajig``, the project's only subprocess.

The program is trusted as little as a detector. It ends with 0 although files are missing, reads 4.7
peaks as 4, finds 0 peaks where its peak finder is not compiled in, and changes defaults between
versions. So every number is passed, what it says it understood is compared with what it was told,
and what it wrote is counted three ways: frames asked for, chunks of the stream, ``Final:`` line.

CrystFEL: White, Crystals and Diffraction Methods in Serial Crystallography; manual page
``indexamajig(1)``, versions 0.11 and 0.12. It is called as a program; none of it is in here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from envs.crystfel.experiment import Experiment
from envs.crystfel.indexer import IndexerError
from envs.crystfel.sfx.formats import HC_EV_A, FormatError, Geometry, tuned_geometry_text
from envs.crystfel.sfx.spots import mean_offsets, spot_offsets
from envs.crystfel.sfx.stream import StreamChunk, read_stream, slab_positions
from envs.crystfel.types import FloatArray, Frame, IndexingResult, Parameters, UnitCell

OLDEST_VERSION = (0, 11)
PEAK_METHODS = ("peakfinder8", "peakfinder9", "zaef")
INDEXING_METHODS = (
    "asdf", "xgandalf", "ffbidx", "pinkindexer", "taketwo", "smallcell", "mosflm", "dirax", "xds",
)  # fmt: skip
OPTIONS = frozenset(
    (
        "--peakfinder8-fast", "--asdf-fast", "--multi", "--no-retry", "--no-refine", "--highres",
        "--int-radius", "--integration", "--peak-radius", "--fix-profile-radius", "--median-filter",
        "--filter-noise", "--no-use-saturated", "--min-sig", "--min-snr-biggest-pix",
        "--min-snr-peak-pix", "--min-peak-over-neighbour", "--min-squared-gradient",
        "--max-indexer-threads", "--xgandalf-sampling-pitch", "--xgandalf-grad-desc-iterations",
        "--xgandalf-tolerance", "--xgandalf-no-deviation-from-provided-cell",
        "--xgandalf-max-peaks", "--xgandalf-fast-execution", "--wavelength-estimate",
        "--camera-length-estimate",
    )
)  # fmt: skip
"""What a user may add. Tolerance is not among them: a wide one indexes junk."""


@dataclass(frozen=True, kw_only=True)
class Indexamajig:
    """Real CrystFEL on one experiment.

    Each run has a temporary folder of its own, with list, geometry and stream; whatever happens,
    the folder and all processes are gone when ``run`` returns or raises.
    """

    experiment: Experiment
    executable: str = "indexamajig"
    """Name on PATH, or a path."""
    indexing: tuple[str, ...] = ("asdf",)
    """Indexing methods, tried in this order."""
    peaks: str = "peakfinder8"
    options: tuple[str, ...] = ("--asdf-fast",)
    """Added to the command; of ``OPTIONS`` only. asdf's fast mode finds the same lattices sooner,
    while peakfinder8's finds other peaks, up to twice as many on a detector of modules."""
    num_processes: int = 1
    start_s: float = 60.0
    """Time that a run may take beside its frames (about 1.5 s measured)."""
    frame_s: float = 10.0
    """Time that a frame may take, on average (20 to 200 ms measured with asdf)."""
    scratch: str | None = None
    """Folder for temporary folders; None = the system's."""

    def __post_init__(self) -> None:
        """Raises IndexerError for a setting that no command line should have."""
        if self.peaks not in PEAK_METHODS:
            raise IndexerError(f"peaks is {self.peaks!r}, and must be one of {_or(PEAK_METHODS)}")
        for method in self.indexing:
            if method not in INDEXING_METHODS:
                raise IndexerError(
                    f"indexing method {method!r} is not one of {_or(INDEXING_METHODS)}"
                )
        if not self.indexing:
            raise IndexerError(f"name an indexing method: {_or(INDEXING_METHODS)}")
        for option in self.options:
            name, equals, value = option.partition("=")
            if name not in OPTIONS or (equals and not re.fullmatch(r"[\w.,+-]+", value)):
                raise IndexerError(
                    f"option {option!r} cannot be added; `--name` or `--name=value` with one of "
                    f"{_or(sorted(OPTIONS))}"
                )
        if self.num_processes < 1:
            raise IndexerError(f"num_processes is {self.num_processes}, and must be at least 1")

    @property
    def frames(self) -> tuple[Frame, ...]:
        """The experiment's."""
        return self.experiment.frames

    @property
    def nominal(self) -> Parameters:
        """The user's."""
        return self.experiment.nominal

    @cached_property
    def version(self) -> str:
        """CrystFEL's version, the settings, and digests of the geometry and the cell.

        Raises:
            IndexerError: no such program, or not CrystFEL 0.11 or newer.
        """
        with _folder(self.scratch) as folder:
            ended = call((self._found, "--version"), folder, folder, timeout_s=self.start_s)
        match = re.search(r"CrystFEL: ((\d+)\.(\d+)\S*)", ended.log)
        if ended.code != 0 or match is None:
            raise IndexerError(
                f"{self._found} --version {_ending(ended.code)}, and does not name a CrystFEL "
                f"version: is it CrystFEL's indexamajig?{_tail(ended.log)}"
            )
        if (int(match[2]), int(match[3])) < OLDEST_VERSION:
            raise IndexerError(
                f"{self._found} is CrystFEL {match[1]}; "
                f"{'.'.join(map(str, OLDEST_VERSION))} or newer is needed"
            )
        settings = " ".join((self.peaks, ",".join(self.indexing), *self.options))
        return f"crystfel {match[1]} {settings} {self.experiment.digest}"

    @cached_property
    def _found(self) -> str:
        if (found := shutil.which(self.executable)) is None:
            raise IndexerError(
                f"no {self.executable!r} on PATH: load CrystFEL 0.11 or newer "
                "(`module load crystfel` at many facilities), or use the embedded pipeline "
                "(`--backend embedded`)"
            )
        return os.path.abspath(found)

    def command(
        self, parameters: Parameters, *, frames: str, geometry: str, stream: str
    ) -> tuple[str, ...]:
        """The command line as a list, to run or to paste (``shlex.join``), here or elsewhere.

        Args:
            parameters: peak search; the offsets of the geometry are in the ``.geom`` file
                (``geometry_text``).
            frames: path of the list file.
            geometry: path of the tuned ``.geom`` file.
            stream: path of the output.
        """
        whole = {
            "min-pix-count": parameters.min_pix_count,
            "max-pix-count": parameters.max_pix_count,
            "local-bg-radius": parameters.local_bg_radius_px,
            "min-res": parameters.min_res_px,
            "max-res": parameters.max_res_px,
            "min-peaks": parameters.min_peaks,
        }
        return (
            os.path.abspath(found) if (found := shutil.which(self.executable)) else self.executable,
            f"--input={frames}",
            f"--output={stream}",
            f"--geometry={geometry}",
            f"--pdb={self.experiment.cell_path}",
            f"-j{self.num_processes}",
            f"--peaks={self.peaks}",
            f"--min-snr={_decimal(parameters.min_snr)}",
            f"--threshold={_decimal(parameters.threshold_adu)}",
            *(f"--{name}={value:d}" for name, value in whole.items()),
            f"--indexing={','.join(self.indexing)}",
            *self.options,
        )

    def geometry_text(self, parameters: Parameters) -> str:
        """The user's ``.geom`` with the tuned distance and beam centre, all else as it was."""
        return tuned_geometry_text(
            self.experiment.geometry_text, self.experiment.geometry, parameters
        )

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """Indexes the frames in one call (which costs 1.5 s: batches under 20 waste time).

        Raises:
            IndexerError: the program failed, took too long, or did not do what it was asked; with
                its last words.
        """
        if not frames:
            raise IndexerError("no frames to index: name at least one")
        version = self.version
        lines = [list_line(frame) for frame in frames]
        asked = dict(zip(lines, frames, strict=True))  # each once, in order
        with _folder(self.scratch) as folder:
            listed, geometry = folder / "run.lst", folder / "run.geom"
            stream, harvest = folder / "run.stream", folder / "harvest.json"
            listed.write_text("".join(f"{line}\n" for line in asked))
            geometry.write_text(self.geometry_text(parameters))
            argv = (
                *self.command(
                    parameters, frames=str(listed), geometry=str(geometry), stream=str(stream)
                ),
                f"--temp-dir={folder}",
                f"--harvest-file={harvest}",
                "--cell-parameters-only",
                "--no-refls-in-stream",
            )
            ended = call(
                argv,
                folder,
                self.experiment.geometry_path.parent,  # to which masks in the .geom are relative
                timeout_s=self.start_s + self.frame_s * math.ceil(len(asked) / self.num_processes),
            )
            if ended.code != 0:
                raise IndexerError(f"indexamajig {_ending(ended.code)}{_tail(ended.log)}")
            check_understood(harvest, parameters)
            try:
                chunks = read_stream(stream).chunks
            except FormatError as error:
                raise IndexerError(
                    f"its stream is unreadable: {error}{_tail(ended.log)}"
                ) from error
        check_counts(chunks, asked, ended.log, self.peaks)
        by_line = {list_line(chunk.frame): chunk for chunk in chunks}
        return result_of(
            [by_line[line] for line in lines],
            self.experiment.geometry.moved(parameters),
            self.experiment.cell,
            cpu_s=ended.cpu_s,
            version=version,
            argv=argv,
        )


# ------------------------------------------------------------------------------- the subprocess


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A program that has ended, and everything it started with it."""

    code: int
    """Exit status; below 0: the signal that killed it."""
    log: str
    """What it printed (both streams); the beginning is cut where it is long."""
    cpu_s: float


def call(argv: Sequence[str], folder: Path, cwd: Path, *, timeout_s: float) -> Ended:
    """Runs a program in a process group of its own, of which nothing is left afterwards.

    Args:
        argv: no shell reads it.
        folder: where its output is kept while it runs.
        cwd: its working directory.
        timeout_s: after which it is killed.

    Raises:
        IndexerError: it cannot be started, took too long, or printed without end.
    """
    log = folder / "log.txt"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:
        raise IndexerError(f"{argv[0]} cannot be started: {error}") from error
    try:
        with _guard(process.pid, folder):
            trouble = _wait(process.pid, log, timeout_s)
    finally:
        # The leader is still there, if only as a zombie: its number cannot be another group's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        _unlink_shared(process.pid)
    if trouble:
        raise IndexerError(f"{argv[0]} {trouble}{_tail(_text(log))}")
    return Ended(code=process.returncode, log=_text(log), cpu_s=usage.ru_utime + usage.ru_stime)


_MAX_LOG_BYTES = 256 * 2**20
_READ_LOG_BYTES = 4 * 2**20


def _wait(pid: int, log: Path, timeout_s: float) -> str:
    """Until the process ends, which is not reaped; says what is wrong where it does not."""
    begin, pause = time.monotonic(), 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() - begin > timeout_s:
            return (
                f"did not end within {timeout_s:g} s and was killed: give it more time "
                "(`frame_s`), fewer frames, or a higher min_snr"
            )
        if log.stat().st_size > _MAX_LOG_BYTES:
            return f"printed more than {_MAX_LOG_BYTES >> 20} MB and was killed"
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return ""


@contextlib.contextmanager
def _guard(pid: int, folder: Path) -> Iterator[None]:
    """Should this process be killed, the group ``pid`` dies with it and its folder is removed.

    The guard reads a pipe that nobody writes; it ends when this process does, of whatever.
    """
    with subprocess.Popen(
        (sys.executable, "-ISc", _GUARD, str(pid), str(folder)),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as guard:
        try:
            yield
        finally:
            guard.kill()


_GUARD = """
import os, shutil, signal, sys, time
sys.stdin.read()
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except OSError:
    pass
for _ in range(20):
    shutil.rmtree(sys.argv[2], ignore_errors=True)
    time.sleep(0.05)
for name in ("indexamajig.shm.", "sem.indexamajig-q"):
    try:
        os.unlink("/dev/shm/" + name + sys.argv[1])
    except OSError:
        pass
"""


def _unlink_shared(pid: int) -> None:
    """A killed run leaves its names in shared memory, which would stop one with the same number."""
    for name in (f"indexamajig.shm.{pid}", f"sem.indexamajig-q{pid}"):
        with contextlib.suppress(OSError):
            os.unlink(f"/dev/shm/{name}")


@contextlib.contextmanager
def _folder(scratch: str | None) -> Iterator[Path]:
    """A temporary folder that is gone afterwards, even while killed workers write their last."""
    try:
        folder = tempfile.mkdtemp(prefix="indexamajig-", dir=scratch)
    except OSError as error:
        raise IndexerError(f"no temporary folder: {error}; choose another `scratch`") from error
    try:
        yield Path(folder).resolve()
    except OSError as error:
        raise IndexerError(f"the temporary folder failed: {error}") from error
    finally:
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.05)


def _text(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _READ_LOG_BYTES))
        return file.read().decode(errors="replace")


def _tail(log: str, num_lines: int = 6) -> str:
    """The last words of the program, for a message."""
    lines = [line for raw in log.splitlines() if (line := _printable(raw))]
    return "".join(f"\n  | {line}" for line in lines[-num_lines:])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:200]).strip()


def _ending(code: int) -> str:
    if code == 0:
        return "ended well"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"was killed by {name}: bisect the frames for the one that crashes it"
    advice = {
        1: "could not set itself up, or was asked to stop",
        5: "processed no frame: do the files exist, and does the .geom name their data?",
        64: f"does not know an option: is it CrystFEL {'.'.join(map(str, OLDEST_VERSION))}?",
    }
    return f"ended with status {code}: {advice.get(code, 'which none of its versions does')}"


# ---------------------------------------------------------------------- what it was told, and did


def list_line(frame: Frame) -> str:
    """A frame as the program's list has it; a file's only image is its event ``//``.

    Raises:
        IndexerError: a path or event that a line cannot hold.
    """
    line = f"{frame.path} {frame.event or '//'}"
    is_path = os.path.isabs(frame.path) and not re.search(r"[\0\r\n]", frame.path)
    is_event = not frame.event or re.fullmatch(r"[^\s\0]*//[^\s\0]*", frame.event)
    if not is_path or not is_event or len(line.encode(errors="surrogateescape")) > 1000:
        raise IndexerError(
            f"frame {_printable(repr(frame.path))} {_printable(repr(frame.event))}: expected an "
            "absolute path and an event such as //3, within 1000 bytes"
        )
    return line


_HARVESTED = (
    ("peaksearch", "min_snr", "min_snr"),
    ("peaksearch", "threshold_adu", "threshold_adu"),
    ("peaksearch", "min_pixel_count", "min_pix_count"),
    ("peaksearch", "max_pixel_count", "max_pix_count"),
    ("peaksearch", "local_bg_radius_px", "local_bg_radius_px"),
    ("peaksearch", "min_res_px", "min_res_px"),
    ("peaksearch", "max_res_px", "max_res_px"),
    ("hitfinding", "min_num_peaks", "min_peaks"),
)


def check_understood(harvest: Path, parameters: Parameters) -> None:
    """Compares what the program says it understood with what it was told.

    Without cJSON it does not say, and nothing is checked.

    Raises:
        IndexerError: a value differs.
    """
    try:
        understood = json.loads(harvest.read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, RecursionError) as error:
        raise IndexerError(f"what indexamajig says it understood is unreadable: {error}") from error
    told = parameters.as_dict()
    for section, key, name in _HARVESTED:
        part = understood.get(section) if isinstance(understood, dict) else None
        value = part.get(key) if isinstance(part, dict) else None
        if value is None:  # another version
            continue
        is_number = isinstance(value, int | float)
        if not is_number or not math.isclose(value, told[name], rel_tol=1e-5, abs_tol=1e-6):
            raise IndexerError(
                f"indexamajig was told {name} = {told[name]:g} and understood "
                f"{_printable(repr(value))}: this version reads the option differently"
            )


_FINAL = re.compile(
    r"^Final: (\d+) images processed, (\d+) hits \([^)]*\), (\d+) indexable \([^)]*\), "
    r"(\d+) crystals",
    re.MULTILINE,
)


def check_counts(
    chunks: Sequence[StreamChunk], asked: Mapping[str, Frame], log: str, peaks: str = "peakfinder8"
) -> None:
    """Insists that frames asked for, chunks of the stream and the ``Final:`` line agree.

    Args:
        chunks: of the stream.
        asked: line of the list -> frame.
        log: what the program printed.
        peaks: the peak finder.

    Raises:
        IndexerError: what does not agree, with the frames concerned.
    """
    if absent := re.search(r"compiled without (\S{1,40})", log):
        raise IndexerError(
            f"this CrystFEL was compiled without {_printable(absent[1])}: choose another method"
        )
    final = _FINAL.findall(log)
    if not final:
        raise IndexerError(f"indexamajig ended well without its `Final:` line{_tail(log)}")
    done = [list_line(chunk.frame) for chunk in chunks]
    is_done = set(done)
    if len(is_done) < len(done):
        twice = next(line for line in done if done.count(line) > 1)
        raise IndexerError(f"the stream has frame {twice} more than once")
    if foreign := [line for line in done if line not in asked]:
        raise IndexerError(
            f"the stream has {_some(foreign)}, which nobody asked for; a file with several images "
            "needs list lines such as `file.h5 //0`"
        )
    if missing := [line for line in asked if line not in is_done]:
        words = [
            line for line in log.splitlines() if any(f.split(" //")[0] in line for f in missing[:3])
        ]
        words += [line for line in log.splitlines() if "killed by signal" in line]
        raise IndexerError(
            f"indexamajig ended well without {len(missing)} of {len(asked)} frames: "
            f"{_some(missing)}; see whether the files are there, whole, and as the .geom says, or "
            f"take them off the list{_tail(chr(10).join(words))}"
        )
    names = ("images", "hits", "indexed", "crystals")
    said = tuple(map(int, final[-1]))
    found = (
        len(chunks),
        sum(chunk.is_hit for chunk in chunks),
        sum(bool(chunk.crystals) for chunk in chunks),
        sum(len(chunk.crystals) for chunk in chunks),
    )
    if said != found:
        both = (", ".join(f"{n} {w}" for n, w in zip(c, names, strict=True)) for c in (said, found))
        raise IndexerError("its `Final:` line says {}, and its stream has {}".format(*both))
    if any(chunk.crystals and not chunk.is_hit for chunk in chunks):
        raise IndexerError("the stream has a crystal in a frame that is no hit")
    if peaks == "peakfinder9" and not any(chunk.num_peaks for chunk in chunks):
        raise IndexerError(
            "peakfinder9 found 0 peaks in every frame, as it does where CrystFEL was built "
            "without it: use peakfinder8"
        )


def _some(lines: Sequence[str]) -> str:
    return ", ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")


def _or(names: Sequence[str]) -> str:
    return ", ".join(names)


def _decimal(value: float) -> str:
    """Without an exponent, which not every version reads."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------- what it found


def result_of(
    chunks: Sequence[StreamChunk],
    geometry: Geometry,
    cell: UnitCell,
    *,
    cpu_s: float,
    version: str,
    argv: tuple[str, ...] = (),
) -> IndexingResult:
    """Chunks of a stream as an indexing result, in their order.

    Args:
        chunks: one per frame, with peaks where residuals are wanted.
        geometry: with which the frames were indexed.
        cell: the reference.
        cpu_s: of the program.
        version: of the program.
        argv: its command.
    """
    crystals = [crystal for chunk in chunks for crystal in chunk.crystals]
    cells = np.array([crystal.cell for crystal in crystals]).reshape(-1, 6)
    nothing = np.full(6, np.nan)
    mean_cell = cells.mean(0) if crystals else nothing
    residual_px, spot_shift_px = _residuals(chunks, geometry)
    return IndexingResult(
        is_indexed=np.array([bool(chunk.crystals) for chunk in chunks]),
        is_hit=np.array([chunk.is_hit for chunk in chunks]),
        num_peaks=np.array([chunk.num_peaks for chunk in chunks]),
        num_crystals=len(crystals),
        mean_cell=mean_cell,
        cell_ratio=float((mean_cell[:3] / cell.as_array()[:3]).mean()),
        residual_px=residual_px,
        spot_shift_px=spot_shift_px,
        cpu_s=cpu_s,
        version=version,
        argv=argv,
    )


def _residuals(chunks: Sequence[StreamChunk], geometry: Geometry) -> tuple[float, FloatArray]:
    """Mean length and vector of observed minus predicted spots, px (of indexed frames only)."""
    pairs = [(chunk, crystal) for chunk in chunks for crystal in chunk.crystals]
    if not pairs:
        return math.nan, np.full(2, np.nan)
    try:
        places = [slab_positions(geometry, chunk) for chunk, _ in pairs]
    except FormatError as error:
        raise IndexerError(f"its stream does not fit the geometry: {error}") from error
    owner = np.repeat(np.arange(len(pairs)), [len(panel) for *_, panel in places])
    fs, ss, panel = (np.concatenate(column) for column in zip(*places, strict=True))
    reciprocal = np.array([crystal.reciprocal_per_A for _, crystal in pairs])[owner]
    wavelength_A = HC_EV_A / np.array([chunk.photon_energy_eV for chunk, _ in pairs])[owner, None]
    offsets_m = spot_offsets(geometry.positions_m(fs, ss, panel), reciprocal, wavelength_A)
    return mean_offsets(offsets_m * geometry.res_per_m[panel, None], owner, len(pairs))
