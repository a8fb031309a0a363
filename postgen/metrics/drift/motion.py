"""How much a long clip moves, and whether its chunks show at their borders."""

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
    """Mean |difference| of following frames, generated over true; NaN where the true clip stands still."""

    total: float
    parts: tuple[float, ...]
    """Of consecutive parts of the clip: motion that dies out late is not hidden by motion at first."""

    @property
    def least(self) -> float:
        """The least of the parts, NaN if all are."""
        return min((part for part in self.parts if not math.isnan(part)), default=math.nan)

    @property
    def most(self) -> float:
        """The greatest of the parts, NaN if all are."""
        return max((part for part in self.parts if not math.isnan(part)), default=math.nan)


def motion_ratio(frames: Tensor, true: Tensor, parts: int = 7) -> MotionRatio:
    """Return how much frames change, over how much the true ones do: 0 of a frozen clip, above 1 of a restless one.

    Args:
        frames, true: (F, 3, H, W) in [0, 1].
        parts: consecutive parts of the F - 1 pairs of frames, as even as they go.

    Raises:
        UserError: forms that do not belong together, or fewer pairs than parts.
    """
    own, other = _changes(frames), _changes(true)
    if frames.shape != true.shape or not 1 <= parts <= len(own):
        raise UserError(
            f"frames {tuple(frames.shape)} and true frames {tuple(true.shape)} with {parts=}: the same form twice and"
            " at most one part a pair of frames"
        )
    pieces = zip(own.tensor_split(parts), other.tensor_split(parts), strict=True)
    return MotionRatio(_ratio(own, other), tuple(_ratio(a, b) for a, b in pieces))


def seam_ratio(frames: Tensor, borders: Sequence[int], true: Tensor | None = None) -> float:
    """Return the mean |difference| of frames across the borders of chunks over that elsewhere: 1 if no border shows.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        borders: numbers of the first frames of chunks; frame 0 is none.
        true: the true clip: its own ratio at these borders is divided out. None: it is taken as 1.

    Raises:
        UserError: borders outside 1 to F - 1, none of them, or nothing but them.
    """
    own = _changes(frames)
    places = sorted(set(borders))
    if not places or places[0] < 1 or places[-1] > len(own) or len(places) == len(own):
        raise UserError(
            f"borders of {len(frames)} frames must be some of 1 to {len(own)} and not all, got {len(places)} from"
            f" {places[:1]} to {places[-1:]}"
        )
    ratio = _seam(own, places)
    if true is None:
        return ratio
    if true.shape != frames.shape:
        raise UserError(f"frames {tuple(frames.shape)} and true frames {tuple(true.shape)} have different forms")
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
