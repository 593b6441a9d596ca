"""The embedded pipeline: frames and parameters in, an indexing result out; nothing to install.

Peaks depend on the frames and on the peak finder's parameters only, so they are kept: changing the
geometry or ``min_peaks`` costs the indexing, a few ms a hit. (As a consequence the rings of the
peak finder stay centred on the beam of the user's geometry file.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.crystfel.experiment import Experiment
from envs.crystfel.indexer import IndexerError, read_whole, stamp, write_whole
from envs.crystfel.sfx.formats import (
    FormatError,
    Geometry,
    PathLike,
    format_cell,
    good_pixels,
    masks_by_frame,
    read_images,
    tuned_geometry_text,
    unmasked,
)
from envs.crystfel.sfx.index import Crystal, KnownCell, index_peaks
from envs.crystfel.sfx.peaks import Peaks, PixelMap, find_peaks, pixel_map
from envs.crystfel.sfx.spots import mean_offsets, spot_offsets
from envs.crystfel.sfx.stream import Stream, StreamChunk, crystal_of, stream_peaks, write_stream
from envs.crystfel.types import BoolArray, FloatArray, Frame, IndexingResult, IntArray, Parameters

VERSION = "embedded 9"
"""Goes up with every change that changes results: memos and kept peaks of older ones are unread."""

_OF_PEAKS = (
    "min_snr",
    "threshold_adu",
    "min_pix_count",
    "max_pix_count",
    "local_bg_radius_px",
    "min_res_px",
    "max_res_px",
)
_MAX_KEPT = 64
"""Settings of the peak finder whose peaks stay in memory (about 1 MB per 1000 frames each)."""


class EmbeddedIndexer:
    """An experiment with the embedded pipeline: an ``Indexer``."""

    def __init__(self, experiment: Experiment, *, cache: PathLike | None = None) -> None:
        """Nothing is read yet.

        Args:
            experiment: geometry, reference cell.
            cache: folder where found peaks are kept, which processes may share; None = in memory.
        """
        self.experiment = experiment
        self.cache = None if cache is None else Path(cache)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._maps: OrderedDict[tuple[Any, ...], PixelMap] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels without what can be worked out again."""
        geometry = dataclasses.replace(self.experiment.geometry)  # without its cached properties
        experiment = dataclasses.replace(self.experiment, geometry=geometry)
        return _rebuilt, (experiment, self.cache)

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
        """Of the pipeline, the geometry file and the cell file."""
        return f"{VERSION} {self.experiment.digest}"

    def run(self, parameters: Parameters, frames: Sequence[Frame]) -> IndexingResult:
        """Finds peaks, where they are not known yet, and indexes the hits.

        Returns:
            arrays in the order of ``frames``.

        Raises:
            IndexerError: no frames, or a file that cannot be read as the geometry says.
        """
        started = time.process_time()
        geometry = self.experiment.geometry.moved(parameters)
        pairs = self.crystals(parameters, frames)
        num_peaks = np.array([len(peaks) for peaks, _ in pairs], dtype=np.int32)
        found = [(peaks, crystal) for peaks, crystal in pairs if crystal is not None]
        offsets, owner = [np.zeros((0, 2))], [np.zeros(0, dtype=int)]
        for number, (peaks, crystal) in enumerate(found):
            positions, panel = _positions(peaks, geometry)
            reciprocal = np.linalg.inv(crystal.basis_A).T
            offset_m = spot_offsets(positions, reciprocal, geometry.wavelength_A)
            offsets.append(offset_m * geometry.res_per_m[panel][:, None])
            owner.append(np.full(len(panel), number))
        residual, shift = mean_offsets(np.concatenate(offsets), np.concatenate(owner), len(found))
        cells = np.array([crystal.cell for _, crystal in found]).reshape(-1, 6)
        mean_cell = cells.mean(axis=0) if found else np.full(6, np.nan)
        return IndexingResult(
            is_indexed=np.array([crystal is not None for _, crystal in pairs]),
            is_hit=num_peaks >= parameters.min_peaks,
            num_peaks=num_peaks,
            num_crystals=len(found),
            mean_cell=mean_cell,
            cell_ratio=float((mean_cell[:3] / self._cell.parameters[:3]).mean()),
            residual_px=residual,
            spot_shift_px=shift,
            cpu_s=time.process_time() - started,
            version=self.version,
        )

    def crystals(
        self, parameters: Parameters, frames: Sequence[Frame]
    ) -> list[tuple[Peaks, Crystal | None]]:
        """Of each frame, its peaks and the crystal found, if any. Raises IndexerError."""
        geometry = self.experiment.geometry.moved(parameters)
        found: list[tuple[Peaks, Crystal | None]] = []
        for peaks in self.peaks(parameters, frames):
            crystal = None
            if len(peaks) >= parameters.min_peaks:
                q_per_A = geometry.q_per_A(_positions(peaks, geometry)[0])
                crystal = index_peaks(q_per_A, self._cell)
            found.append((peaks, crystal))
        return found

    def write_stream(self, path: PathLike, parameters: Parameters, frames: Sequence[Frame]) -> None:
        """Writes what is found as a ``.stream``, which CrystFEL's programs read.

        Peaks and lattices are in it, integrated reflections are not: to merge data, run
        ``indexamajig`` with the same parameters.

        Raises:
            IndexerError: as ``run``, or the file cannot be written.
        """
        geometry = self.experiment.geometry.moved(parameters)
        chunks = []
        for serial, (frame, (peaks, crystal)) in enumerate(
            zip(frames, self.crystals(parameters, frames), strict=True), 1
        ):
            rows, panels = stream_peaks(geometry, peaks.fs_px, peaks.ss_px, peaks.intensity_adu)
            crystals = []
            if crystal is not None:
                reciprocal = np.linalg.inv(crystal.basis_A).T
                crystals.append(crystal_of(reciprocal, self.experiment.cell))
            chunks.append(
                StreamChunk(
                    frame=frame,
                    serial=serial,
                    is_hit=len(peaks) >= parameters.min_peaks,
                    indexed_by="none" if crystal is None else "file",  # of the names CrystFEL knows
                    photon_energy_eV=geometry.photon_energy_eV,
                    clen_m=geometry.distance_m,
                    num_peaks=len(peaks),
                    peaks=rows,
                    peak_panels=panels,
                    crystals=tuple(crystals),
                )
            )
        stream = Stream(
            generator=f"ssl2rl-ray, {self.version}",
            command="",
            geometry_text=tuned_geometry_text(
                self.experiment.geometry_text, self.experiment.geometry, parameters
            ),
            cell_text=format_cell(self.experiment.cell),
            chunks=tuple(chunks),
        )
        try:
            write_stream(stream, path)
        except OSError as error:
            raise IndexerError(f"{path}: cannot be written: {error.strerror}") from error

    def peaks(self, parameters: Parameters, frames: Sequence[Frame]) -> list[Peaks]:
        """The peaks of each frame, from the cache where they are there.

        Raises:
            IndexerError: no frames, or a file that cannot be read as the geometry says.
        """
        if not frames:
            raise IndexerError("no frames to index: the list is empty")
        kept = self._kept_of(parameters)
        stamps = {path: stamp(path) for path in {frame.path for frame in frames}}
        keys = [(frame.path, frame.event, *stamps[frame.path]) for frame in frames]
        missing = {
            key: frame for key, frame in zip(keys, frames, strict=True) if key not in kept.peaks
        }
        if missing:
            found = self._find(parameters, list(missing.values()))
            kept.add(dict(zip(missing, found, strict=True)))
        return [kept.peaks[key] for key in keys]

    def _find(self, parameters: Parameters, frames: Sequence[Frame]) -> list[Peaks]:
        geometry, found = self.experiment.geometry, []
        path, pixels, masks = "", None, ()
        try:
            for frame, image in zip(frames, read_images(geometry, frames), strict=True):
                if pixels is None or frame.path != path:
                    path, pixels = frame.path, self.pixels(parameters, frame)
                    masks = masks_by_frame(geometry, path)
                image = _without_flagged(image, geometry)
                if masks:
                    image = np.where(unmasked(geometry, frame, masks), image, np.float32(np.nan))
                found.append(find_peaks(image, pixels, parameters))
        except (FormatError, OSError) as error:
            raise IndexerError(str(error)) from error
        return found

    @cached_property
    def _cell(self) -> KnownCell:
        return KnownCell(self.experiment.cell)

    def pixels(self, parameters: Parameters, frame: Frame) -> PixelMap:
        """Which pixels of a frame's file are searched; masks of single frames come on top."""
        geometry = self.experiment.geometry
        own = masks_by_frame(geometry, frame.path)
        common = [mask for mask in geometry.masks if mask not in own]
        usable = self._unmasked & unmasked(geometry, frame, common)
        digest = hashlib.sha256(np.packbits(usable).tobytes()).digest()
        key = (parameters.min_res_px, parameters.max_res_px, digest)
        if key not in self._maps:
            try:
                self._maps[key] = pixel_map(
                    geometry.radius_px,
                    np.where(usable, geometry.panel_index, -1),
                    min_res_px=parameters.min_res_px,
                    max_res_px=parameters.max_res_px,
                )
            except ValueError as error:
                raise IndexerError(f"{self.experiment.geometry_path}: {error}") from error
            while len(self._maps) > 4:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    @cached_property
    def _unmasked(self) -> BoolArray:
        return good_pixels(self.experiment.geometry, masks=())

    def _kept_of(self, parameters: Parameters) -> _Kept:
        values = "|".join(f"{name}={getattr(parameters, name)!r}" for name in _OF_PEAKS)
        key = hashlib.sha256(f"{self.version}|{values}".encode()).hexdigest()[:20]
        if key not in self._kept:
            folder = None if self.cache is None else self.cache / key
            self._kept[key] = _Kept(folder)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        self._kept[key].read()
        return self._kept[key]


_Key = tuple[str, str, int, int]
"""Path, event, size and time of the file."""


class _Kept:
    """Peaks of one setting of the peak finder: in memory, and in a folder that others share.

    Each addition is a file of its own, put in place whole: any number of processes may add and
    read at once, and one that is killed leaves nothing half-written that is ever read.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.peaks: dict[_Key, Peaks] = {}
        self._seen: set[str] = set()

    def read(self) -> None:
        """Takes in what others have added."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.npz")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            arrays = read_whole(path)
            if arrays is None:
                continue  # damaged: found again
            columns = np.split(arrays["peaks"], np.cumsum(arrays["count"])[:-1])
            for name, event, (size, when), array in zip(
                arrays["path"], arrays["event"], arrays["stamp"], columns, strict=True
            ):
                key = str(name), str(event), int(size), int(when)
                self.peaks[key] = Peaks.from_array(array)

    def add(self, found: dict[_Key, Peaks]) -> None:
        """Keeps peaks just found."""
        self.peaks.update(found)
        if self.folder is None:
            return
        path = self.folder / f"{uuid.uuid4().hex}.npz"
        arrays = {
            "path": [key[0] for key in found],
            "event": [key[1] for key in found],
            "stamp": [key[2:] for key in found],
            "count": [len(peaks) for peaks in found.values()],
            "peaks": np.concatenate([peaks.as_array() for peaks in found.values()]),
        }
        write_whole(path, arrays)
        self._seen.add(path.name)


def _positions(peaks: Peaks, geometry: Geometry) -> tuple[FloatArray, IntArray]:
    """Where peaks lie, m (P, 3), and their panels (P,)."""
    panel = geometry.panel_index[peaks.ss_px.astype(int), peaks.fs_px.astype(int)]
    return geometry.positions_m(peaks.fs_px, peaks.ss_px, panel), panel


def _rebuilt(experiment: Experiment, cache: Path | None) -> EmbeddedIndexer:
    return EmbeddedIndexer(experiment, cache=cache)


def _without_flagged(image: NDArray[Any], geometry: Geometry) -> NDArray[Any]:
    """The image, with NaN where the geometry says that a value means a bad pixel."""
    is_bad: BoolArray | bool = False
    if np.isfinite(geometry.flag_below):
        is_bad = is_bad | (image < geometry.flag_below)
    if np.isfinite(geometry.flag_above):
        is_bad = is_bad | (image > geometry.flag_above)
    for value in geometry.flag_equal:
        is_bad = is_bad | (image == value)
    if not np.any(is_bad):
        return image
    return np.where(is_bad, np.float32(np.nan), image.astype(np.float32))
