"""The filters of a clip: pure functions of its frames (F, 3, H, W) in [0, 1] and its `Meta`.

Each function returns a number, or None if it does not apply to the clip, as the flow of an image; such a clip passes.
The threshold of a filter is the field of its name in `CurationConfig`. They use the measures of `postgen.metrics` and
the optical flow of `postgen.rewards`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from postgen.metrics.colour import appearance, luma

from .meta import Meta
from .text_area import LEAST, text_mask

Filter = Callable[[Tensor, Meta], float | None]
"""A filter: frames and facts of a clip -> number, or None if it does not apply."""

_LEAST = 12
"""Smallest side in pixels of the optical flow."""


def height(frames: Tensor, meta: Meta) -> float:
    """Return the height of the file's pictures in pixels, without black bars."""
    return float(meta.height)


def width(frames: Tensor, meta: Meta) -> float:
    """Return the width of the file's pictures in pixels, without black bars."""
    return float(meta.width)


def length(frames: Tensor, meta: Meta) -> float | None:
    """Return the number of frames of the shot; None for an image."""
    return float(meta.frames) if meta.kind == "video" else None


def seconds(frames: Tensor, meta: Meta) -> float | None:
    """Return the length of the shot in seconds; None for an image, or without a rate."""
    return meta.seconds


def fps(frames: Tensor, meta: Meta) -> float | None:
    """Return the frames per second; None for an image, or if the rate is unknown."""
    return meta.fps if meta.kind == "video" and meta.fps else None


def brightness(frames: Tensor, meta: Meta) -> float:
    """Return the mean luma (ITU-R BT.601), in [0, 1]."""
    return float(luma(frames).mean())


def contrast(frames: Tensor, meta: Meta) -> float:
    """Return the standard deviation of luma within a frame, mean over the frames, in [0, 0.5]."""
    return float(luma(frames).flatten(1).std(dim=1, correction=0).mean())


def sharpness(frames: Tensor, meta: Meta) -> float | None:
    """Return the variance of the Laplacian of luma, mean over the frames; None below 3 pixels."""
    return float(appearance(frames)["sharpness"].mean()) if min(frames.shape[-2:]) >= 3 else None


def flow(frames: Tensor, meta: Meta) -> float | None:
    """Return the mean length of the optical flow between neighbouring frames, in shorter sides per second.

    Without a rate it is in shorter sides per frame. A clip of fewer than two neighbouring frames, or below 12 pixels,
    has none.

    Raises:
        UserError: OpenCV is not installed.
    """
    from postgen.rewards.flow import dis_flow

    near = [k for k, (a, b) in enumerate(zip(meta.indices, meta.indices[1:], strict=False)) if b - a == 1]
    if not near or min(frames.shape[-2:]) < _LEAST:
        return None
    lengths = [dis_flow(frames[k : k + 2]).norm(dim=1).mean() for k in near]
    return float(torch.stack(lengths).mean()) / min(frames.shape[-2:]) * (meta.fps or 1.0)


def text_area(frames: Tensor, meta: Meta) -> float | None:
    """Return the share of the picture with marks that look like text (`text_mask`), mean over some frames.

    A picture with a side below 80 pixels has none.
    """
    if min(frames.shape[-2:]) < LEAST:
        return None
    some = frames[:: max(1, len(frames) // 4)]
    return float(text_mask(some).float().mean())


FILTERS: Mapping[str, Filter] = {
    "height": height,
    "width": width,
    "frames": length,
    "seconds": seconds,
    "fps": fps,
    "brightness": brightness,
    "contrast": contrast,
    "sharpness": sharpness,
    "flow": flow,
    "text_area": text_area,
}
"""Name -> filter, in the order of the funnel."""
