"""Black bars (letterbox, pillarbox) around the picture of a clip."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from postgen.metrics.colour import luma

_BLACK = 0.06
"""Largest luma of a bar: black with the noise of a video file."""
_LEAST = 0.5
"""A bright part of a frame smaller than this share of its height or width is not taken for a picture between bars."""


_THIN = 0.01
"""Bars that cover less than this share of a frame are dark lines at its edge, not worth another encoding."""


@dataclass(frozen=True, slots=True)
class Box:
    """The picture within the bars, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def area(self, height: int, width: int) -> float:
        """Return the share of a frame of this size that the bars cover."""
        return 1 - self.height * self.width / (height * width)

    def cut(self, frames: Tensor) -> Tensor:
        """Return the frames (F, 3, H, W) without the bars."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]


def find_bars(frames: Tensor) -> Box | None:
    """Return the picture between black bars that all frames share; None without bars.

    A row belongs to a bar if no pixel of it is brighter than 0.06 in any frame. A dark scene has no bars unless at
    least half of the height and of the width is brighter. Bars of another colour, and bars with subtitles or a logo on
    them, are not found. Bars that cover less than 1 % are ignored.

    Args:
        frames: (F, 3, H, W) in [0, 1] of one shot.
    """
    brightest = luma(frames).amax(0)
    height, width = brightest.shape
    rows = (brightest.amax(1) > _BLACK).nonzero().flatten().tolist()
    columns = (brightest.amax(0) > _BLACK).nonzero().flatten().tolist()
    if not rows:
        return None
    box = Box(rows[0], columns[0], rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0])
    if box.height < _LEAST * height or box.width < _LEAST * width or box.area(height, width) < _THIN:
        return None
    return box


def enlarged(box: Box, small: tuple[int, int], full: tuple[int, int]) -> Box:
    """Return a box that was found on small frames in the pixels of the full frames, with even height and width.

    It lies within the picture: where an edge falls between two pixels, the pixel of the edge is cut off too.
    """
    top, bottom = _inner(box.top, box.top + box.height, small[0], full[0])
    left, right = _inner(box.left, box.left + box.width, small[1], full[1])
    # A video with 4:2:0 chroma needs even sizes.
    return Box(top, left, (bottom - top) // 2 * 2, (right - left) // 2 * 2)


def _inner(start: int, stop: int, small: int, full: int) -> tuple[int, int]:
    first = -(-start * full // small) + (full > small) * (start > 0)
    last = stop * full // small - (full > small) * (stop < small)
    return first, last
