"""Compare the first and the last part of a long clip, and compute the trend between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError

SHARE = 0.15
"""Share of a clip's frames that counts as its start, and as its end (FramePack, arXiv:2504.12626)."""


def ends(frames: int, share: float = SHARE) -> tuple[slice, slice]:
    """Return the frames of the start and of the end of a clip, at least one frame each.

    Raises:
        UserError: a share outside (0, 0.5], or fewer than 2 frames.

    >>> ends(161)
    (slice(0, 24, None), slice(137, 161, None))
    """
    if not 0 < share <= 0.5 or frames < 2:
        raise UserError(f"{frames} frames with share={share}: give at least 2 frames and a share in (0, 0.5]")
    count = max(1, int(share * frames))
    return slice(0, count), slice(frames - count, frames)


@dataclass(frozen=True, slots=True)
class StartEnd:
    """Summary of a measure of every frame. Frames without a value (NaN) do not count."""

    first: float
    """Mean over the start."""
    last: float
    """Mean over the end."""
    slope: float
    """Least-squares slope over all frames, per 100 frames."""
    excess: float
    """`change` minus that of the true clip; without a true clip, `change`."""
    excess_slope: float
    """`slope` minus that of the true clip; without a true clip, `slope`."""

    @property
    def change(self) -> float:
        """`last` - `first`."""
        return self.last - self.first

    @property
    def contrast(self) -> float:
        """|first - last|: the start-end contrast."""
        return abs(self.change)


def start_end(values: Tensor, true: Tensor | None = None, share: float = SHARE) -> StartEnd:
    """Return the start, the end and the slope of a measure of every frame, and the excess over the true clip.

    Args:
        values: (F,), NaN where a frame has no value.
        true: (F,), the same measure of the true clip.
        share: share of the frames that count as start, and as end.

    Raises:
        UserError: different shapes, a share outside (0, 0.5], or fewer than 2 frames.
    """
    own = _summary(values, share)
    if true is None:
        return StartEnd(*own, own[1] - own[0], own[2])
    if true.shape != values.shape:
        raise UserError(
            f"values have shape {tuple(values.shape)} and true values {tuple(true.shape)}: give one value per frame"
        )
    other = _summary(true, share)
    return StartEnd(*own, own[1] - own[0] - (other[1] - other[0]), own[2] - other[2])


def start_end_contrast(
    values: Mapping[str, Tensor], true: Mapping[str, Tensor] | None = None, share: float = SHARE
) -> dict[str, StartEnd]:
    """Return `start_end` of several measures by name. Without an entry in `true`, the true measure counts as constant.

    Raises:
        UserError: as in `start_end`.
    """
    return {name: start_end(row, (true or {}).get(name), share) for name, row in values.items()}


def _summary(values: Tensor, share: float) -> tuple[float, float, float]:
    values = values.double()
    first, last = ends(len(values), share)
    return float(values[first].nanmean()), float(values[last].nanmean()), 100 * slope(values)


def slope(values: Tensor, places: Tensor | None = None) -> float:
    """Return the least-squares slope of values (N,) over positions (N,), default 0..N-1; NaN for fewer than 2 values.

    >>> slope(torch.tensor([1.0, 3.0, float("nan"), 7.0]))
    2.0
    """
    places = torch.arange(len(values), device=values.device) if places is None else places
    known = values.isfinite()
    if int(known.sum()) < 2:
        return math.nan
    y, x = values[known].double(), places[known].double()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())
