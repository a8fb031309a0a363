"""Size, length and content of the files of a data set, measured once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from postgen.errors import UserError, first_line
from postgen.training.logging import Progress
from postgen.video import iter_video, probe, read_picture

from .items import Item, Kind

_File = tuple[str, Kind]
"""Path and kind, image or video."""
_LEDGER = "files.jsonl"
_PIECE = 2**20
_AT_ONCE = 8
_THREADS = 8
"""Largest number of files that a process reads at the same time."""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a file contains."""

    content: str
    """Digest of its bytes."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    frames: int
    """Number of frames; 1 for an image."""
    fps: float
    """Frames per second; 0 if it is not known."""


class Inspector:
    """Measures files. A file is decoded as a whole once, so that a damaged file is found before anything is encoded.

    The results are kept in a file of the cache by path, size and time of the last change. Processes share it.

    Args:
        folder: folder of the cache.
        processes: number of processes that inspect the same files.
        rank: number of this process.
        shown: whether to show a progress bar.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, processes: int = 1, rank: int = 0, shown: bool = False) -> None:
        self._path, self._processes, self._rank, self._shown = folder / _LEDGER, processes, rank, shown
        self._known: dict[str, MediaInfo] = {}
        self._wrong: dict[str, str] = {}
        self._read = 0
        self._append(b"\n")  # a killed process may have left half a line

    def inspect(self, items: Sequence[Item]) -> list[MediaInfo | str]:
        """Return what each item's file contains, or why it cannot be used.

        A process begins with its share of the files, and then takes over those that others have not noted.
        """
        self._refresh()
        # A GIF file may be an image in one row and a video in another one.
        files = dict.fromkeys((str(item.path), item.kind) for item in items)
        stamps = {file: _stamp(*file) for file in files}
        missing = [file for file in stamps if stamps[file] not in self._known]
        shown = self._shown and bool(missing)
        with closing(Progress(step=0, max_steps=len(missing), shown=shown, name="check files")) as bar:
            self._measure(missing, stamps, bar)
        own = [stamps[str(item.path), item.kind] for item in items]
        return [self._known.get(stamp) or self._wrong[stamp] for stamp in own]

    def _measure(self, missing: Sequence[_File], stamps: Mapping[_File, str], bar: Progress) -> None:
        for turn in range(self._processes):
            share = missing[(self._rank + turn) % self._processes :: self._processes]
            self._refresh()
            todo = [file for file in share if stamps[file] not in self._known]
            for file, found in self._measured(todo):
                if isinstance(found, str):
                    self._wrong[stamps[file]] = found
                else:
                    self._note(stamps[file], found)
                bar.step()

    def _measured(self, files: Sequence[_File]) -> Iterator[tuple[_File, MediaInfo | str]]:
        threads = min(_THREADS, max(1, (os.cpu_count() or 1) // self._processes))
        pool = ThreadPoolExecutor(threads)
        try:
            yield from zip(files, pool.map(_inspected, files), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _note(self, stamp: str, info: MediaInfo) -> None:
        self._known[stamp] = info
        self._append(json.dumps({"file": stamp, **asdict(info)}).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(file, line)  # one call, so that lines of several processes do not mix
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"cache_dir {self._path.parent} cannot be written: {first_line(error)}") from error

    def _refresh(self) -> None:
        """Read the lines that this and other processes have added."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        end = content.rfind(b"\n") + 1
        self._read += end
        for line in content[:end].splitlines():
            try:
                row = json.loads(line)
                stamp = row.pop("file")
                self._known[stamp] = MediaInfo(**row)
            except (ValueError, TypeError, KeyError, AttributeError):  # an empty line, or half a line
                continue


def _stamp(name: str, kind: str) -> str:
    """Return a text that changes if a file, or a file in a folder of frames, changes."""
    path = Path(name)
    try:
        files = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
        told: list[Any] = [os.path.abspath(path), kind]
        for file in files:
            found = file.stat()
            told.append([file.name, found.st_size, found.st_mtime_ns])
    except OSError as error:
        return f"{path}: {error.strerror}"
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _inspected(file: _File) -> MediaInfo | str:
    path, kind = Path(file[0]), file[1]
    try:
        content = _content(path)
        if kind == "image":
            width, height = read_picture(path).size
            return MediaInfo(content, height, width, 1, 0.0)
        found = probe(path)
        for _ in iter_video(path, chunk=_AT_ONCE) if path.is_dir() else ():
            pass  # `probe` reads only the first picture of a folder
        return MediaInfo(content, found.height, found.width, found.frames, found.fps)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def _content(path: Path) -> str:
    """Return a digest of the bytes of a file, or of the files in a folder and their names."""
    said = hashlib.sha256()
    for file in sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            said.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as data:
            while piece := data.read(_PIECE):
                said.update(piece)
    return said.hexdigest()[:32]
