"""Frames as they come: a folder whose files grow in number, or a list that grows in length.

Order is kept: a frame once seen has its place for good, also after a restart. (CrystFEL's ZMQ input
is left out: a run of it never ends and keeps its parameters, so that each change means a restart of
1.5 s and frames lost; files, which every facility writes as well, are indexed twice where asked.)
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path

from envs.crystfel.indexer import stamp
from envs.crystfel.sfx.formats import (
    FormatError,
    FramesNeededError,
    PathLike,
    all_frames,
    format_frames,
    parse_frames,
    read_geometry,
)
from envs.crystfel.types import Frame

SUFFIXES = (".h5", ".hdf5", ".cxi", ".nxs")


class GrowingList:
    """A ``.lst`` file to which lines are added; a line counts once its end is written."""

    def __init__(self, path: str | os.PathLike[str], geometry: PathLike | None = None) -> None:
        """Nothing is read yet.

        Args:
            path: of the list, which may come later.
            geometry: of the ``.geom`` file, by which files listed without an event stand for all
                their frames; None = each line is one frame.
        """
        self.path = Path(os.path.abspath(path))
        self.frames: list[Frame] = []
        self.unreadable: dict[str, str] = {}
        """Files that cannot be taken in yet, by path: why."""
        self._geometry_path = geometry
        self._position = 0
        self._pending: deque[Frame] = deque()

    def poll(self) -> None:
        """Takes in new lines, up to one whose file cannot be read yet.

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
        self._pending.extend(parse_frames(text, os.fspath(self.path), self.path.parent))
        self._position += len(whole)
        while self._pending:
            frame = self._pending[0]
            if frame.event or self._geometry_path is None:
                self.frames.append(frame)
            else:
                try:
                    geometry = read_geometry(self._geometry_path, frame)
                    self.frames += all_frames(geometry, (frame,))
                except FormatError as error:
                    self.unreadable[frame.path] = str(error)
                    return
            self.unreadable.pop(frame.path, None)
            self._pending.popleft()


class GrowingFolder:
    """A folder to which HDF5 files are added, or whose files get longer.

    A file is looked into once it has stayed as it is from one look to the next. What cannot be
    opened yet is tried again whenever it changes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], geometry: PathLike, log: str | os.PathLike[str]
    ) -> None:
        """Reads the log of an earlier run, if there is one.

        Args:
            folder: where files appear; folders in it are not searched.
            geometry: of the ``.geom`` file, which says where in a file the frames are.
            log: list file to which every frame is added, and which keeps their order.

        Raises:
            FormatError: a log or a ``.geom`` that is damaged.
        """
        with contextlib.suppress(FramesNeededError):  # what it points to comes with the first file
            read_geometry(geometry)
        self.folder, self._geometry_path = Path(os.path.abspath(folder)), geometry
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
                geometry = read_geometry(self._geometry_path, Frame(path=path))
                found = all_frames(geometry, (Frame(path=path),))
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
