"""The gain of Enhance-A-Video, computed from the measured attention shares."""

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
        share: mean share of its attention that a frame gives to itself, (B,), in [0, 1].
        frames: number T of latent frames, at least 2.
        weight: weight w (the enhance temperature of the paper).
        reduction: `sample` computes one gain per sample; `batch` uses the gain of the mean share for all samples.
        max_gain: upper bound of the gain, above 1; None sets no bound.

    Returns:
        Gains (B,), at least 1.

    >>> import torch
    >>> frame_gain(torch.tensor([0.25, 1.0]), frames=4, weight=2.0)
    tensor([1.5000, 1.0000])
    """
    return factored_gain(share, gain_factor(frames, weight), reduction=reduction, max_gain=max_gain)


def gain_factor(frames: int, weight: float) -> float:
    """Return (T + w) / (T - 1), the factor by which `frame_gain` multiplies 1 - share."""
    return (frames + weight) / (frames - 1)


def factored_gain(
    share: Tensor, factor: float, *, reduction: Literal["sample", "batch"], max_gain: float | None
) -> Tensor:
    """Return the gains of `frame_gain` for a given `gain_factor`."""
    if reduction == "batch":
        share = share.mean().expand_as(share)
    return ((1 - share) * factor).clamp(min=1.0, max=max_gain)
