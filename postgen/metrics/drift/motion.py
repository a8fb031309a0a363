"""Measures on motion: how much a long clip moves, and whether the borders between chunks are visible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.metrics.colour import check_frames


@dataclass(frozen=True, slots=True)
class MotionRatio:
    """Mean absolute difference of consecutive frames, generated divided by true; NaN where the true clip is static."""

    total: float
    parts: tuple[float, ...]
    """Ratio of each of several consecutive parts, so that early motion does not hide motion that dies out later."""

    @property
    def least(self) -> float:
        """The smallest ratio of the parts, NaN if all are NaN."""
        return min((part for part in self.parts if not math.isnan(part)), default=math.nan)

    @property
    def most(self) -> float:
        """The largest ratio of the parts, NaN if all are NaN."""
        return max((part for part in self.parts if not math.isnan(part)), default=math.nan)


def motion_ratio(frames: Tensor, true: Tensor, parts: int = 7) -> MotionRatio:
    """Return the change between frames divided by that of the true clip: 0 if frozen, above 1 if restless.

    Args:
        frames, true: (F, 3, H, W) in [0, 1].
        parts: number of consecutive parts of the F - 1 pairs of frames; their lengths differ by at most one.

    Raises:
        UserError: shapes that do not match, or fewer pairs than parts.
    """
    own, other = _changes(frames), _changes(true)
    if frames.shape != true.shape or not 1 <= parts <= len(own):
        raise UserError(
            f"frames have shape {tuple(frames.shape)} and true frames {tuple(true.shape)}, with {parts=}: give equal"
            " shapes, and at most one part per pair of frames"
        )
    pieces = zip(own.tensor_split(parts), other.tensor_split(parts), strict=True)
    return MotionRatio(_ratio(own, other), tuple(_ratio(a, b) for a, b in pieces))


def seam_ratio(frames: Tensor, borders: Sequence[int], true: Tensor | None = None) -> float:
    """Return the change of frames across chunk borders divided by the change elsewhere: 1 if no border is visible.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        borders: numbers of the first frames of chunks, without frame 0.
        true: the true clip. The ratio is divided by the ratio of the true clip at these borders; None: by 1.

    Raises:
        UserError: borders outside 1 to F - 1, no borders, or only borders.
    """
    own = _changes(frames)
    places = sorted(set(borders))
    if not places or places[0] < 1 or places[-1] > len(own) or len(places) == len(own):
        raise UserError(
            f"borders of {len(frames)} frames must be some but not all of 1 to {len(own)}, got {len(places)} from"
            f" {places[:1]} to {places[-1:]}"
        )
    ratio = _seam(own, places)
    if true is None:
        return ratio
    if true.shape != frames.shape:
        raise UserError(
            f"frames have shape {tuple(frames.shape)} and true frames {tuple(true.shape)}: give equal shapes"
        )
    other = _seam(_changes(true), places)
    return ratio / other if other else math.nan


def _changes(frames: Tensor) -> Tensor:
    check_frames(frames, 2, "frames")
    return torch.stack([(b - a).abs().double().mean() for a, b in itertools.pairwise(frames)])


def _seam(changes: Tensor, places: list[int]) -> float:
    border = torch.zeros_like(changes, dtype=torch.bool)
    border[[place - 1 for place in places]] = True
    return _ratio(changes[border], changes[~border])


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a.mean() / b.mean()) if b.mean() > 0 else math.nan
