"""Cuts of a video: where one shot ends and another begins.

Hard cuts only: a fade or a dissolve changes little from frame to frame and is not found.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

_SIDE = 16
_AROUND = 4


def thumbnails(frames: Tensor) -> Tensor:
    """Return the thumbnails that `find_cuts` compares: (F, 768) uint8 of 16 x 16 pixels from frames (F, 3, H, W)."""
    return (adaptive_avg_pool2d(frames, _SIDE) * 255).round().byte().flatten(1)


def find_cuts(thumbs: Tensor, *, change: float = 0.05, ratio: float = 3.0) -> list[int]:
    """Return the indices of the frames that begin a new shot, without 0.

    A cut is a change of at least `change` that exceeds `ratio` times the median change of the four frames before it,
    and of the four after it, so that a fast camera is no cut. A flash, after which the picture is as before, is no cut
    either.

    Args:
        thumbs: (F, 768) of `thumbnails`, all frames of a video in order.
        change: mean absolute difference of two thumbnails, in [0, 1].
        ratio: at least 1.
    """
    if len(thumbs) < 2:
        return []
    step = _apart(thumbs[1:], thumbs[:-1])
    cuts = []
    for place in (step >= change).nonzero().flatten().tolist():
        # Both sides count, so that the sudden start and end of a fast movement are no cuts.
        sides = (step[max(0, place - _AROUND) : place], step[place + 1 : place + 1 + _AROUND])
        usual = max(float(side.median()) if len(side) else 0.0 for side in sides)
        if step[place] >= ratio * usual and not _flash(thumbs, place + 1, change):
            cuts.append(place + 1)
    return cuts


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).abs().mean(1) / 255


def _flash(thumbs: Tensor, first: int, change: float) -> bool:
    """Return whether the frames around frame `first`, or around the frame before it, are alike."""
    for odd in (first, first - 1):
        if 0 < odd < len(thumbs) - 1 and _apart(thumbs[odd + 1 : odd + 2], thumbs[odd - 1 : odd])[0] < change / 2:
            return True
    return False


def shots(count: int, cuts: list[int]) -> list[tuple[int, int]]:
    """Return (first frame, number of frames) of each shot.

    >>> shots(10, [4])
    [(0, 4), (4, 6)]
    """
    ends = [*cuts, count]
    return [(first, end - first) for first, end in zip([0, *cuts], ends, strict=True)]
