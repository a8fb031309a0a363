"""What the app has made, as folders on disk: it is there after a reload of the page and a restart of the server."""

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
"""One picture of a result, for the gallery."""
SIDECAR = "video.json"
"""Settings beside the video of a result of Generate."""
VIDEOS = (".mp4", ".webm", ".gif")
"""Ends of names of the videos of results."""
_WIDEST = 320
"""Pixels of the longer side of a poster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One result: a folder that the app made."""

    id: str
    """Name of the folder, which is all that a page knows of its place."""
    folder: Path
    """Where it is."""
    kind: str
    """Which tab made it."""

    @property
    def made(self) -> datetime:
        """When it was asked for."""
        return datetime.strptime(self.id[:15], _TIME)

    def file(self, name: str) -> Path:
        """Return one of its files.

        Raises:
            UserError: it has none of that name, which a program gives and no page.
        """
        path = self.folder / name
        if not path.is_file():
            raise UserError("this result has been removed, or a part of it: reload the page")
        return path

    @property
    def video(self) -> Path:
        """Its first video by name.

        Raises:
            UserError: it has none any more.
        """
        names = sorted(path.name for path in _files(self.folder) if path.suffix in VIDEOS)
        return self.file(names[0] if names else "video.mp4")

    @property
    def poster(self) -> Path:
        """A small picture of the middle of its video, which is made when it is first asked for.

        Raises:
            UserError: it has no video any more, or one that cannot be read, or the picture cannot be written.
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
        folder: made when it is missing. Everything in it can be read by whoever uses the app, so nothing else belongs
            there.

    Raises:
        UserError: it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        from postgen.files import check_place

        self.folder = Path(folder).absolute()
        check_place(self.folder / "any", folder=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def adding(self, kind: str) -> Iterator[Entry]:
        """Give a new result to write files into its folder; it counts when the block ends well, else it vanishes.

        Args:
            kind: which tab makes it, lower case letters.

        Raises:
            UserError: it cannot be written.

        While the block runs the folder has another name: keep its `id`, and ask for the entry afterwards.
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
        except UserError as error:  # it goes to a page, which need not know where the results are
            text = str(error).replace(f"{part}{os.sep}", "").replace(f"{self.folder}{os.sep}", "")
            raise UserError(text) from error

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return the results, newest first; of one kind where it is named."""
        found = [entry for path in _files(self.folder, folders=True) if (entry := self.find(path.name)) is not None]
        found = [entry for entry in found if kind is None or entry.kind == kind]
        return sorted(found, key=lambda entry: entry.id, reverse=True)

    def find(self, id: Any) -> Entry | None:
        """Return a result by its id, of whatever type and content the page sent; None where there is none."""
        match = _NAME.fullmatch(id) if isinstance(id, str) else None
        if match is None or not _is_time(match[1]):
            return None
        folder = self.folder / match[0]
        return Entry(id=id, folder=folder, kind=match[2]) if folder.is_dir() and not folder.is_symlink() else None

    def get(self, id: Any) -> Entry:
        """Return a result by its id.

        Raises:
            UserError: there is none.
        """
        entry = self.find(id)
        if entry is None:
            raise UserError("there is no such result: it may have been removed, reload the page")
        return entry

    def remove(self, id: Any) -> None:
        """Remove a result and its files for good.

        Raises:
            UserError: there is none.
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
