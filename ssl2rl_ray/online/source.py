"""Frames as they come: a folder whose files grow in number, or a list that grows in length.

Order is kept: a frame once seen has its place for good, also after a restart. (CrystFEL's ZMQ input
is left out: a run of it never ends and keeps its parameters, so that each change means a restart of
1.5 s and frames lost; files, which every facility writes as well, are indexed twice where asked.)
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py

from envs.crystfel.indexer import stamp
from envs.crystfel.sfx.formats import FormatError, Geometry, format_frames, parse_frames
from envs.crystfel.types import Frame

SUFFIXES = (".h5", ".hdf5", ".cxi", ".nxs")


class GrowingList:
    """A ``.lst`` file to which lines are added; a line counts once its end is written."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """The file may come later."""
        self.path = Path(os.path.abspath(path))
        self.frames: list[Frame] = []
        self.unreadable: dict[str, str] = {}
        """Always empty; see ``GrowingFolder``."""
        self._position = 0

    def poll(self) -> None:
        """Takes in new lines.

        Raises:
            FormatError: a line that is none, or a file that has become shorter.
        """
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._position:
                    raise FormatError(
                        f"{self.path} has become shorter: start anew, with another --out"
                    )
                file.seek(self._position)
                new = file.read()
        except FileNotFoundError:
            return
        whole = new[: new.rfind(b"\n") + 1]
        text = whole.decode(errors="replace")
        self.frames += parse_frames(text, os.fspath(self.path), self.path.parent)
        self._position += len(whole)


class GrowingFolder:
    """A folder to which HDF5 files are added, or whose files get longer.

    A file is looked into once it has stayed as it is from one look to the next. What cannot be
    opened yet is tried again whenever it changes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], geometry: Geometry, log: str | os.PathLike[str]
    ) -> None:
        """Reads the log of an earlier run, if there is one.

        Args:
            folder: where files appear; folders in it are not searched.
            geometry: says where in a file the frames are.
            log: list file to which every frame is added, and which keeps their order.

        Raises:
            FormatError: a log that is damaged.
        """
        self.folder, self.geometry = Path(os.path.abspath(folder)), geometry
        self.log = Path(os.path.abspath(log))
        self.frames: list[Frame] = []
        self.unreadable: dict[str, str] = {}
        """Files that cannot be taken in yet, by path: why."""
        self._known: dict[str, tuple[int, int]] = {}
        self._taken: dict[str, int] = {}
        if self.log.exists():
            text = self.log.read_text()
            self.frames = list(parse_frames(text[: text.rfind("\n") + 1], str(self.log)))
            if not text.endswith("\n") and text:
                self.log.write_text(text[: text.rfind("\n") + 1])
        for frame in self.frames:
            self._taken[frame.path] = self._taken.get(frame.path, 0) + 1

    def poll(self) -> None:
        """Takes in files that are new and settled."""
        paths = sorted(
            entry.path for entry in os.scandir(self.folder) if entry.name.endswith(SUFFIXES)
        )
        for path in paths:
            now = stamp(path)
            is_settled = self._known.get(path) == now
            was_read = self._known.get(f"{path}\0read") == now
            self._known[path] = now
            if not is_settled or was_read:
                continue
            self._known[f"{path}\0read"] = now
            try:
                found = frames_of(self.geometry, path)
            except FormatError as error:
                self.unreadable[path] = str(error)
                continue
            self.unreadable.pop(path, None)
            new = found[self._taken.get(path, 0) :]
            if new:
                with open(self.log, "a") as file:
                    file.write(format_frames(new))
                self._taken[path] = len(found)
                self.frames += new


def frames_of(geometry: Geometry, path: str) -> list[Frame]:
    """The frames in a file, in order.

    Raises:
        FormatError: a file that cannot be read, without the data that the geometry names, or
            whose events are too involved to count (a list file can name them).
    """
    plane = geometry.planes[0]
    at = [axis for axis, what in enumerate(plane.dims) if what == "%"]
    if "%" in plane.data or len(at) > 1:
        raise FormatError(
            f"{path}: the geometry has events within HDF5 paths or several axes: name the frames "
            "in a list file (--list)"
        )
    try:
        with h5py.File(path, "r") as file:
            data = file.get(plane.data)
            if not isinstance(data, h5py.Dataset):
                raise FormatError(f"{path}: has no data at {plane.data}")
            if not at:
                return [Frame(path=path)]
            if data.ndim <= at[0]:
                raise FormatError(f"{path}: {plane.data} has {data.ndim} axes, too few")
            return [Frame(path=path, event=f"//{i}") for i in range(data.shape[at[0]])]
    except OSError as error:
        raise FormatError(f"{path}: cannot be read yet: {error}") from error
