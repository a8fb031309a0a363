"""Uploads of the page: check the limits of the server before any other code reads a file.

Gradio stores each upload in its own folder under a safe file name; `postgen.video` decodes it.
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
"""Largest sidecar, in bytes; the prompt is the longest part of one."""


def uploaded(path: Any, settings: AppSettings, what: str) -> Path:
    """Check the size of an upload and return its path.

    Args:
        path: value of the upload component.
        settings: settings with the limits.
        what: name of the upload in messages, such as "clip".

    Raises:
        UserError: there is no upload, or the file is empty or too large.
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
    """Check an uploaded video against all limits and return it as a `postgen.video.Footage`.

    Decoding stops at the pixel limit, because a small file may contain hours of video.

    Raises:
        UserError: there is no file, it is not a video or damaged, or it has too many bytes, seconds or pixels.
    """
    from postgen.video import Footage, VideoError, probe

    file = uploaded(path, settings, what)
    try:
        info = probe(file, most=settings.upload_pixels)
    except VideoError as error:
        raise UserError(f"the {what} is refused: {_without_place(error, file)}") from error
    if info.seconds > settings.upload_seconds:
        raise UserError(
            f"the {what} has {info.seconds:.1f} seconds, and at most {settings.upload_seconds:g} are allowed: cut it"
        )
    return Footage(file, info)


def uploaded_picture(path: Any, settings: AppSettings, what: str = "picture") -> Any:
    """Return an uploaded picture as a PIL image in RGB.

    Raises:
        UserError: there is no file, it is not a picture, or it has too many bytes or pixels.
    """
    from postgen.video import VideoError, check_picture, read_picture

    file = uploaded(path, settings, what)
    most = settings.upload_pixels // 16
    try:
        width, height = check_picture(file)  # before decoding, because a small file may contain a huge picture
        if width * height > most:
            raise UserError(
                f"the {what} has {width} x {height} pixels, and at most {most:,} are allowed: make it smaller"
            )
        return read_picture(file)
    except VideoError as error:
        raise UserError(f"the {what} cannot be read: {_without_place(error, file)}") from error


@contextmanager
def discarding(path: Any) -> Iterator[None]:
    """Delete an upload if the block raises a `UserError`, because the refused file has no further use.

    Args:
        path: value of the upload component. Files outside the folder of uploads are never deleted.
    """
    try:
        yield
    except UserError:
        with suppress(OSError, ValueError):
            file, folder = Path(path or "").resolve(), uploads_folder().resolve()
            if file.is_file() and file.is_relative_to(folder):
                file.unlink()
                if file.parent != folder:
                    file.parent.rmdir()  # each upload has its own folder
        raise


def uploaded_json(path: Any, settings: AppSettings, what: str = "settings file") -> Mapping[str, Any]:
    """Return the object in an uploaded JSON file.

    Raises:
        UserError: there is no file, it is larger than 1 MiB, or it does not contain a JSON object.
    """
    from postgen.reading import read_json

    file = uploaded(path, settings, what)
    try:
        found = read_json(file, f"the {what} cannot be read", most=_NOTE_BYTES)
    except UserError as error:
        raise UserError(_without_place(error, file)) from error
    if not isinstance(found, dict):
        raise UserError(f"the {what} has no settings: upload the JSON file beside a video of postgen")
    return found


def uploaded_settings(path: Any, settings: AppSettings) -> Mapping[str, Any]:
    """Return the settings in an uploaded sidecar, or in the metadata of an uploaded video of postgen.

    Raises:
        UserError: there is no file, or it has no settings of postgen.
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
            raise UserError("the video has no settings: upload the JSON file that postgen wrote beside it")
        note = parse_json(text, "the settings in the video cannot be read")
    found = note.get("settings") if isinstance(note, dict) else None
    if not isinstance(found, dict):
        raise UserError("the file has no settings: upload a video made by postgen, or the JSON file beside it")
    return found


def _without_place(error: Exception, file: Path) -> str:
    """Return the message of an error with the path of the upload replaced by its file name."""
    text = str(error)
    with suppress(OSError):
        text = text.replace(str(file.resolve()), file.name)
    return text.replace(str(file), file.name)
