"""The gain of Enhance-A-Video as a function of what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


def frame_gain(
    share: Tensor,
    frames: int,
    weight: float,
    *,
    reduction: Literal["sample", "batch"] = "sample",
    max_gain: float | None = None,
) -> Tensor:
    """Return min(max(1, (T + w) CFI), max_gain) with CFI = (1 - share) / (T - 1) (arXiv:2502.07508, eq. 6-8).

    Args:
        share: (B,) mean share of itself in a frame's attention over the frames, in [0, 1].
        frames: T, at least 2.
        weight: w, the enhance temperature.
        reduction: one gain per sample, or that of the mean share for all of them.
        max_gain: upper bound, above 1; None has none.

    >>> import torch
    >>> frame_gain(torch.tensor([0.25, 1.0]), frames=4, weight=2.0)
    tensor([1.5000, 1.0000])
    """
    if reduction == "batch":
        share = share.mean().expand_as(share)
    return ((1 - share) * ((frames + weight) / (frames - 1))).clamp(min=1.0, max=max_gain)
