"""Clips: which frames of a file are trained on, in which bucket, and their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.video import iter_video, read_picture

from .buckets import Bucket, Buckets, fitted
from .data_config import SftDataConfig
from .inspection import MediaInfo
from .items import Item

_AT_ONCE = 8
"""Number of frames that are in memory at their original size."""
_SLOWER = 0.9
"""A video with less than this share of `target_fps` is refused: repeated frames would stutter."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of an item in a bucket."""

    item: Item
    bucket: Bucket
    frames: tuple[int, ...]
    """Indices of the frames in the file, ascending."""
    content: str
    """Digest of the file."""
    number: int = 0
    """Number of the clip among those of a long video."""
    weight: float = 1.0
    """Sampling weight."""

    @property
    def key(self) -> str:
        """Key of the item, with the number of the clip after the first one."""
        return self.item.key + (f"#{self.number}" if self.number else "")


def clips_of(item: Item, info: MediaInfo, buckets: Buckets, config: SftDataConfig) -> list[Clip] | str:
    """Return the clips of a file, or why it has none."""
    if item.kind == "image":
        (bucket, *_) = buckets.nearest(info.height, info.width, 1, image=True)
        return [Clip(item, bucket, (0,), info.content)]
    shortest = buckets.shortest()
    if not shortest:
        return "it is a video, but all buckets have one frame: set num_frames, or leave out videos"
    frames = _resampled(info, config.target_fps)
    if isinstance(frames, str):
        return frames
    fitting = buckets.nearest(info.height, info.width, len(frames))
    if not fitting:
        rate = "" if config.target_fps is None else f" at {config.target_fps:g} frames per second"
        return f"it has {len(frames)} frames{rate}, the shortest bucket has {shortest}: lower num_frames"
    chosen = _chosen(frames, fitting, config)
    return [Clip(item, bucket, picked, info.content, n) for n, (bucket, picked) in enumerate(chosen)]


def _resampled(info: MediaInfo, target_fps: float | None) -> Sequence[int] | str:
    """Return the indices of the frames at the target rate, or why there are none."""
    if target_fps is None:
        return range(info.frames)
    if not info.fps:
        return "its frames per second are not known: give a video file, or leave out target_fps"
    if info.fps < _SLOWER * target_fps:
        return f"it has {info.fps:.4g} frames per second, fewer than target_fps {target_fps:g}: lower target_fps"
    step = info.fps / target_fps
    return [index for number in range(int(info.frames / step) + 2) if (index := round(number * step)) < info.frames]


def _chosen(
    frames: Sequence[int], buckets: Sequence[Bucket], config: SftDataConfig
) -> Iterator[tuple[Bucket, tuple[int, ...]]]:
    longest = buckets[0]
    count = longest.num_frames
    if config.frame_selection == "first":
        yield longest, tuple(frames[:count])
    elif config.frame_selection == "uniform":
        places = np.linspace(0, len(frames) - 1, count).round().astype(int)
        yield longest, tuple(frames[place] for place in places)
    else:
        start = 0
        for bucket in buckets:  # the rest of the video fills shorter buckets
            while len(frames) - start >= bucket.num_frames:
                yield bucket, tuple(frames[start : start + bucket.num_frames])
                start += bucket.num_frames


def read_clip(clip: Clip) -> Tensor:
    """Read the frames of a clip, resized and cropped to its bucket; returns (F, 3, H, W) float32 in [0, 1].

    Raises:
        UserError: the file cannot be read, or has become shorter.
    """
    size = clip.bucket.height, clip.bucket.width
    if clip.item.kind == "image":
        picture = torch.from_numpy(np.array(read_picture(clip.item.path)))
        return fitted(picture.permute(2, 0, 1)[None].float() / 255, *size)
    found = torch.empty(len(clip.frames), 3, *size)
    done, start = 0, clip.frames[0]
    count = clip.frames[-1] - start + 1
    for part in iter_video(clip.item.path, chunk=_AT_ONCE, start=start, count=count):
        stop = start + len(part)
        rows = [index - start for index in clip.frames[done:] if index < stop]
        if rows:
            found[done : done + len(rows)] = fitted(part[rows], *size)
        done, start = done + len(rows), stop
    if done < len(clip.frames):
        raise UserError(f"{clip.item.path} has become shorter since it was checked: start the run again")
    return found
