"""Losses on disparity, either known or up to a scale and shift: on values, on gradients, and on changes in time."""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-3
"""Lower bound of the mean absolute deviation in 1/m, so that a flat map is not amplified."""
_SCALES = 4


def normalised(disparity_BFHW: Tensor) -> Tensor:
    """Subtract the median of each clip and divide by its mean absolute deviation (arXiv:1907.01341, section 5).

    Median and deviation are of the whole clip, not of a frame, so frames with inconsistent scales increase the loss.
    """
    centred = disparity_BFHW - _median(disparity_BFHW.detach())
    return centred / _deviation(centred)


def affine_difference(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the difference of the normalised maps. A scale above 0 and a shift of the estimate do not change it."""
    return normalised(estimate_BFHW) - normalised(true_BFHW)


def known_difference(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the difference of the maps, divided by the mean absolute deviation of each true clip (not frame)."""
    return (estimate_BFHW - true_BFHW) / _deviation(true_BFHW - _median(true_BFHW))


def difference_losses(difference_BFHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three losses of a difference map: mean absolute value, spatial gradients, and changes in time.

    The gradient loss covers four scales (arXiv:1907.01341, section 5) and keeps outlines in place. The loss of changes
    is over consecutive frames (arXiv:2501.12375) and is 0 for a single frame.
    """
    slope = difference_BFHW.new_zeros(())
    for k in range(_SCALES):
        coarse = difference_BFHW[..., :: 2**k, :: 2**k]
        slope = slope + coarse.diff(dim=-1).abs().mean() + coarse.diff(dim=-2).abs().mean()
    change = difference_BFHW.diff(dim=1)
    steady = change.abs().mean() if change.shape[1] else difference_BFHW.new_zeros(())
    return difference_BFHW.abs().mean(), slope / _SCALES, steady


def relative_loss(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the mean of |estimate - true| / (true + 0.05), both in 1/m. Distant objects count nearly as near ones."""
    if not len(true_BFHW):
        return estimate_BFHW.new_zeros(())
    return ((estimate_BFHW - true_BFHW).abs() / (true_BFHW + 0.05)).mean()


def _median(disparity_BFHW: Tensor) -> Tensor:
    return disparity_BFHW.flatten(1).median(1).values.view(-1, 1, 1, 1)


def _deviation(centred_BFHW: Tensor) -> Tensor:
    return centred_BFHW.abs().mean((1, 2, 3), keepdim=True).clamp_min(_LEAST)
