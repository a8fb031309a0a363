"""Rows with videos of the user: reading, resizing and cutting their clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from postgen.errors import UserError, shown
from postgen.video import iter_video


def video_path(row: dict[str, Any], where: str) -> str:
    """Return the column `video` of a row.

    Args:
        row: the row.
        where: name of the row in error messages.

    Raises:
        UserError: the row has no path of a video.
    """
    path = row.get("video")
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: video must be the path of a file or of a folder of frames, got {shown(path)}")
    return path


def read_clip(path: str, num_frames: int, size: tuple[int, int], where: str) -> Tensor:
    """Read the first frames of a video, resized, as a clip (num_frames, 3, H, W) in [0, 1].

    Only a few frames are held at their original size at a time.

    Args:
        path: a video file, or a folder of frames.
        num_frames: number of frames.
        size: height and width in pixels.
        where: name of the row in error messages.

    Raises:
        UserError: the video cannot be read, or is too short.
    """
    found = torch.empty(num_frames, 3, *size)
    done = 0
    for frames in iter_video(path, count=num_frames):
        found[done : done + len(frames)] = _sized(frames, size)
        done += len(frames)
    return first_frames(found[:done], num_frames, f"{where}: {path}")


def first_frames(frames: Tensor, count: int, where: str) -> Tensor:
    """Return the first `count` frames.

    Raises:
        UserError: there are fewer frames.
    """
    if len(frames) < count:
        raise UserError(
            f"{where} has {len(frames)} frames but num_frames is {count}: give longer videos or lower num_frames"
        )
    return frames[:count]


def _sized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(frames.shape[-2:]) == size:
        return frames
    return interpolate(frames, size, mode="bicubic", antialias=True).clamp(0, 1)
