"""Write the parts of files that are clips of their own: shots of a video, and pictures without their black bars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from postgen.errors import UserError
from postgen.files import replacing
from postgen.training.digests import digest
from postgen.video import iter_video, read_picture, write_video

from .bars import Box
from .funnel import Candidate

_QUALITY = 9.0
"""Quality of the written videos, of 10."""
_RATE = 24.0
"""Rate of a shot of a folder of frames that has none."""


def needs_file(one: Candidate) -> bool:
    """Return whether a clip is only a part of its file, in time or in the picture."""
    assert one.shot is not None
    return one.shot.box is not None or one.shot.count != one.measured.frames


def clip_name(one: Candidate) -> str:
    """Return the name of the file of a clip; it changes with the source and with the part, so no file is outdated."""
    shot = one.shot
    assert shot is not None
    box = shot.box
    part = [one.key, shot.first, shot.count, None if box is None else [box.top, box.left, box.height, box.width]]
    suffix = ".png" if one.item.kind == "image" else ".mp4"
    return f"{one.item.path.stem[:80]}-{one.number:04d}-{digest(part)[:8]}{suffix}"


def write_clip(one: Candidate, target: Path) -> None:
    """Write a clip to its own file: H.264 of high quality for a video, PNG for an image. An existing file is kept.

    Raises:
        UserError: the source changed or cannot be read any more, or the file cannot be written.
    """
    assert one.shot is not None
    if target.exists():
        return
    if one.item.kind == "image":
        try:
            with replacing(target) as part:
                _cut_picture(one.item.path, one.shot.box).save(part, format="PNG")
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
        return
    frames = _frames(one.item.path, one.shot.first, one.shot.count, one.shot.box)
    written = write_video(target, frames, fps=one.measured.fps or _RATE, quality=_QUALITY)
    if written.frames != one.shot.count:
        target.unlink()
        raise UserError(f"{one.item.path} changed while it was read: run the same command again")


def _frames(path: Path, first: int, count: int, box: Box | None) -> Iterator[Tensor]:
    for chunk in iter_video(path, start=first, count=count):
        yield chunk if box is None else box.cut(chunk)


def _cut_picture(path: Path, box: Box | None) -> Image.Image:
    picture = read_picture(path)
    if box is None:
        return picture
    pixels = np.asarray(picture)[box.top : box.top + box.height, box.left : box.left + box.width]
    return Image.fromarray(pixels)
