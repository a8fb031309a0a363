"""Losses of disparity, known itself or up to a scale and shift: of values, of outlines, and of changes in time."""

from __future__ import annotations

from torch import Tensor

_LEAST = 1e-3
"""Least mean deviation, in 1/m, so that a flat map is not blown up."""
_SCALES = 4


def normalised(disparity_BFHW: Tensor) -> Tensor:
    """Return each clip minus its median over its mean absolute deviation (arXiv:1907.01341, section 5).

    The two are of the whole clip and not of a frame: frames that do not agree cost.
    """
    centred = disparity_BFHW - _median(disparity_BFHW.detach())
    return centred / _deviation(centred)


def affine_difference(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the difference of the normalised maps, which no scale above 0 and no shift of an estimate changes."""
    return normalised(estimate_BFHW) - normalised(true_BFHW)


def known_difference(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the difference itself, in units of each true map's mean absolute deviation."""
    return (estimate_BFHW - true_BFHW) / _deviation(true_BFHW - _median(true_BFHW))


def difference_losses(difference_BFHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three losses of such a difference: its mean size, its slopes and its changes.

    The slopes are those of four scales (arXiv:1907.01341, section 5), for outlines that lie where they are; the
    changes those from a frame to the next (arXiv:2501.12375), 0 for one frame.
    """
    slope = difference_BFHW.new_zeros(())
    for k in range(_SCALES):
        coarse = difference_BFHW[..., :: 2**k, :: 2**k]
        slope = slope + coarse.diff(dim=-1).abs().mean() + coarse.diff(dim=-2).abs().mean()
    change = difference_BFHW.diff(dim=1)
    steady = change.abs().mean() if change.shape[1] else difference_BFHW.new_zeros(())
    return difference_BFHW.abs().mean(), slope / _SCALES, steady


def relative_loss(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the mean of |estimate - true| / (true + 0.05), both in 1/m: far things count nearly as near ones."""
    if not len(true_BFHW):
        return estimate_BFHW.new_zeros(())
    return ((estimate_BFHW - true_BFHW).abs() / (true_BFHW + 0.05)).mean()


def _median(disparity_BFHW: Tensor) -> Tensor:
    return disparity_BFHW.flatten(1).median(1).values.view(-1, 1, 1, 1)


def _deviation(centred_BFHW: Tensor) -> Tensor:
    return centred_BFHW.abs().mean((1, 2, 3), keepdim=True).clamp_min(_LEAST)
