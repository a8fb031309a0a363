"""Files that come in through the page: held to the limits of the server before anything else looks at them.

Gradio keeps an upload in a folder of its own under a name that it made safe; postgen.video decodes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from postgen.apps.guard import uploads_folder
from postgen.apps.settings import AppSettings
from postgen.errors import UserError

_NOTE_BYTES = 2**20
"""Largest sidecar: its prompt is the longest part."""


def uploaded(path: Any, settings: AppSettings, what: str) -> Path:
    """Return an upload whose size is allowed.

    Args:
        path: what the page's component gave.
        settings: with the limits.
        what: what it should be, for messages.

    Raises:
        UserError: nothing was uploaded, or the file is too large or empty.
    """
    if not isinstance(path, str) or not path:
        raise UserError(f"there is no {what}: choose a file")
    file = Path(path)
    try:
        size = file.stat().st_size if file.is_file() else -1
    except OSError:
        size = -1
    if size < 0:
        raise UserError(f"the {what} is no longer on the server: upload it again")
    if size == 0:
        raise UserError(f"the {what} is empty: upload another file")
    if size > settings.upload_bytes:
        raise UserError(
            f"the {what} has {size:,} bytes, and at most {settings.upload_bytes:,} are allowed: make it smaller"
        )
    return file


def uploaded_video(path: Any, settings: AppSettings, what: str = "video") -> Any:
    """Return an uploaded video that keeps to all limits, as a `postgen.video.Footage`.

    Frames are decoded no further than the limit of pixels reaches: a small file may hold hours.

    Raises:
        UserError: no file, too large, too long, too many pixels, no video, damaged.
    """
    from postgen.video import Footage, VideoError, probe

    file = uploaded(path, settings, what)
    try:
        info = probe(file, most=settings.upload_pixels)
    except VideoError as error:
        raise UserError(f"the {what} is refused: {_without_place(error, file)}") from error
    if info.seconds > settings.upload_seconds:
        raise UserError(
            f"the {what} takes {info.seconds:.1f} seconds, and at most {settings.upload_seconds:g} are allowed: cut it"
        )
    return Footage(file, info)


def uploaded_picture(path: Any, settings: AppSettings, what: str = "picture") -> Any:
    """Return an uploaded picture as a PIL image in RGB.

    Raises:
        UserError: no file, too large, too many pixels, no picture.
    """
    from postgen.video import VideoError, check_picture, read_picture

    file = uploaded(path, settings, what)
    most = settings.upload_pixels // 16
    try:
        width, height = check_picture(file)  # before it is decoded: a small file may hold a large picture
        if width * height > most:
            raise UserError(
                f"the {what} has {width} x {height} pixels, and at most {most:,} are allowed: make it smaller"
            )
        return read_picture(file)
    except VideoError as error:
        raise UserError(f"the {what} cannot be read: {_without_place(error, file)}") from error


@contextmanager
def discarding(path: Any) -> Iterator[None]:
    """Remove an upload when the block refuses it, by a `UserError`: nobody can do anything with it then.

    Args:
        path: what the page's component gave. Nothing outside of the folder of uploads is removed.
    """
    try:
        yield
    except UserError:
        with suppress(OSError, ValueError):
            file, folder = Path(path or "").resolve(), uploads_folder().resolve()
            if file.is_file() and file.is_relative_to(folder):
                file.unlink()
                if file.parent != folder:
                    file.parent.rmdir()  # each upload has a folder of its own
        raise


def uploaded_json(path: Any, settings: AppSettings, what: str = "settings file") -> Mapping[str, Any]:
    """Return the object in an uploaded JSON file.

    Raises:
        UserError: no file, larger than 1 MiB, or no JSON object.
    """
    from postgen.reading import read_json

    file = uploaded(path, settings, what)
    try:
        found = read_json(file, f"the {what} cannot be read", most=_NOTE_BYTES)
    except UserError as error:
        raise UserError(_without_place(error, file)) from error
    if not isinstance(found, dict):
        raise UserError(f"the {what} holds no settings: upload the JSON that stands beside a video of postgen")
    return found


def uploaded_settings(path: Any, settings: AppSettings) -> Mapping[str, Any]:
    """Return the settings in an uploaded sidecar, or in a video that postgen wrote them into.

    Raises:
        UserError: no such file, or one without settings of postgen.
    """
    from postgen.reading import parse_json
    from postgen.video import VideoError, read_comment

    file = uploaded(path, settings, "file")
    if file.suffix.lower() == ".json":
        note: Any = uploaded_json(path, settings)
    else:
        try:
            text = read_comment(file)
        except VideoError as error:
            raise UserError(f"the file cannot be read as a video: {_without_place(error, file)}") from error
        if text is None:
            raise UserError("the video holds no settings: upload the JSON that postgen wrote beside it")
        note = parse_json(text, "the settings in the video cannot be read")
    found = note.get("settings") if isinstance(note, dict) else None
    if not isinstance(found, dict):
        raise UserError("the file holds no settings of postgen: upload a video that it made, or the JSON beside one")
    return found


def _without_place(error: Exception, file: Path) -> str:
    """Return what an error says, with the name of the upload in place of where the server keeps it."""
    text = str(error)
    with suppress(OSError):
        text = text.replace(str(file.resolve()), file.name)
    return text.replace(str(file), file.name)
