"""What a filter knows about a clip besides its frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """Facts of a clip (one shot of a video, or an image)."""

    kind: Literal["image", "video"]
    height: int
    """Height of the file's pictures in pixels, without black bars."""
    width: int
    """Width of the file's pictures in pixels, without black bars."""
    frames: int = 1
    """Number of frames of the shot, not only of those that a filter receives."""
    fps: float = 0.0
    """Frames per second; 0 if it is unknown."""
    indices: tuple[int, ...] = (0,)
    """Index within the shot of each frame that a filter receives."""

    @property
    def seconds(self) -> float | None:
        """Length in seconds; None for an image, or without a rate."""
        return self.frames / self.fps if self.kind == "video" and self.fps else None


def picked(count: int, pairs: int) -> tuple[int, ...]:
    """Return indices of up to `pairs` pairs of neighbouring frames, spread evenly over `count` frames.

    >>> picked(10, 3), picked(1, 3), picked(3, 8)
    ((0, 1, 4, 5, 8, 9), (0,), (0, 1, 2))
    """
    starts = max(count - 1, 1)
    step = (starts - 1) / max(pairs - 1, 1)
    firsts = range(starts) if starts <= pairs else (int(place * step + 0.5) for place in range(pairs))
    return tuple(sorted({index for first in firsts for index in (first, first + 1) if index < count}))
