"""The history: results of the app as folders on disk. They survive reloads of the page and restarts of the server."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing

_NAME = re.compile(r"(\d{8}-\d{6})-([a-z]+)-([0-9a-f]{8})")
_TIME = "%Y%m%d-%H%M%S"
POSTER = "poster.png"
"""File name of a result's picture in the gallery."""
SIDECAR = "video.json"
"""File name of the settings beside the video, for results of the Generate tab."""
VIDEOS = (".mp4", ".webm", ".gif")
"""File extensions of the videos of results."""
_WIDEST = 320
"""Longest side of a poster, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One result: a folder that the app made."""

    id: str
    """Name of the folder. The page knows this name only, not the path."""
    folder: Path
    """Path of the folder."""
    kind: str
    """Name of the tab that made the result."""

    @property
    def made(self) -> datetime:
        """Time at which the result was begun, in local time."""
        return datetime.strptime(self.id[:15], _TIME)

    def file(self, name: str) -> Path:
        """Return the path of a file of the result.

        Args:
            name: file name; chosen by the program, never by the page.

        Raises:
            UserError: the file does not exist.
        """
        path = self.folder / name
        if not path.is_file():
            raise UserError("this result, or one of its files, has been removed: reload the page")
        return path

    @property
    def video(self) -> Path:
        """Path of the result's video; of several, the first by name.

        Raises:
            UserError: the video has been removed.
        """
        names = sorted(path.name for path in _files(self.folder) if path.suffix in VIDEOS)
        return self.file(names[0] if names else "video.mp4")

    @property
    def poster(self) -> Path:
        """Path of a small picture of the middle frame of the video. The first access writes the picture.

        Raises:
            UserError: the video has been removed or cannot be read, or the picture cannot be written.
        """
        path = self.folder / POSTER
        if not path.is_file():
            try:
                _write_poster(self.video, path)
            except OSError as error:
                raise UserError(f"the picture of a result cannot be written: {error.strerror or error}") from error
        return path


class History:
    """The results in a folder, newest first.

    Args:
        folder: folder of the results, created if it is missing. All users of the app can read every file in it, so
            keep nothing else there.

    Raises:
        UserError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        from postgen.files import check_place

        self.folder = Path(folder).absolute()
        check_place(self.folder / "any", folder=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def adding(self, kind: str) -> Iterator[Entry]:
        """Add a result: the block writes files into the folder of the yielded entry.

        The result appears in the history when the block ends without an error; after an error the folder is deleted.
        While the block runs the folder has a temporary name, so keep the entry's `id` and call `get` afterwards.

        Args:
            kind: name of the tab that makes the result, lower-case letters.

        Raises:
            UserError: the folder cannot be written.
        """
        id = f"{datetime.now().strftime(_TIME)}-{kind}-{secrets.token_hex(4)}"
        assert _NAME.fullmatch(id)
        part = self.folder
        try:
            with replacing(self.folder / id) as part:
                part.mkdir()
                yield Entry(id=id, folder=part, kind=kind)
        except OSError as error:
            raise UserError(f"the server cannot keep the result: {error.strerror or error}") from error
        except UserError as error:  # shown on a page, which must not reveal the folder of the results
            text = str(error).replace(f"{part}{os.sep}", "").replace(f"{self.folder}{os.sep}", "")
            raise UserError(text) from error

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return the results, newest first; with `kind`, the results of this kind only."""
        found = [entry for path in _files(self.folder, folders=True) if (entry := self.find(path.name)) is not None]
        found = [entry for entry in found if kind is None or entry.kind == kind]
        return sorted(found, key=lambda entry: entry.id, reverse=True)

    def find(self, id: Any) -> Entry | None:
        """Return the result with an id, or None; `id` may be any value that the page sent."""
        match = _NAME.fullmatch(id) if isinstance(id, str) else None
        if match is None or not _is_time(match[1]):
            return None
        folder = self.folder / match[0]
        return Entry(id=id, folder=folder, kind=match[2]) if folder.is_dir() and not folder.is_symlink() else None

    def get(self, id: Any) -> Entry:
        """Return the result with an id.

        Raises:
            UserError: no result has this id.
        """
        entry = self.find(id)
        if entry is None:
            raise UserError("there is no such result. It may have been removed: reload the page")
        return entry

    def remove(self, id: Any) -> None:
        """Delete a result and its files permanently.

        Raises:
            UserError: no result has this id.
        """
        shutil.rmtree(self.get(id).folder, ignore_errors=True)


def _is_time(text: str) -> bool:
    with suppress(ValueError):
        return bool(datetime.strptime(text, _TIME))
    return False


def _files(folder: Path, *, folders: bool = False) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if (path.is_dir() if folders else path.is_file())]
    return []


def _write_poster(video: Path, path: Path) -> None:
    from PIL import Image

    from postgen.video import probe, read_video

    middle = read_video(video, start=probe(video).frames // 2, count=1)[0]
    picture = Image.fromarray((middle.permute(1, 2, 0) * 255).round().byte().numpy())
    picture.thumbnail((_WIDEST, _WIDEST))
    with replacing(path) as part:
        picture.save(part, "PNG")
