"""Losses of disparity that is known up to a scale and shift: of values, of outlines, and of changes in time."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-3
"""Least mean deviation, in 1/m, so that a flat map is not blown up."""
_SCALES = 4


def normalised(disparity_BFHW: Tensor) -> Tensor:
    """Return each clip minus its median over its mean absolute deviation (arXiv:1907.01341, section 5).

    The two are of the whole clip and not of a frame: frames that do not agree cost.
    """
    median = disparity_BFHW.detach().flatten(1).median(1).values.view(-1, 1, 1, 1)
    centred = disparity_BFHW - median
    return centred / centred.abs().mean((1, 2, 3), keepdim=True).clamp_min(_LEAST)


def affine_losses(estimate_BFHW: Tensor, true_BFHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three losses that no scale above 0 and no shift of an estimate changes.

    Mean absolute difference of the normalised maps; of its gradient at four scales (of the same section), for
    outlines that lie where they are; of its change from a frame to the next (arXiv:2501.12375), 0 for one frame.
    """
    difference = normalised(estimate_BFHW) - normalised(true_BFHW)
    slope = difference.new_zeros(())
    for k in range(_SCALES):
        coarse = difference[..., :: 2**k, :: 2**k]
        slope = slope + coarse.diff(dim=-1).abs().mean() + coarse.diff(dim=-2).abs().mean()
    change = difference.diff(dim=1)
    steady = change.abs().mean() if change.shape[1] else difference.new_zeros(())
    return difference.abs().mean(), slope / _SCALES, steady


def absolute_loss(estimate_BFHW: Tensor, true_BFHW: Tensor) -> Tensor:
    """Return the mean of |estimate - true| / (true + 0.05), both in 1/m: far things count nearly as near ones."""
    return ((estimate_BFHW - true_BFHW).abs() / (true_BFHW + 0.05)).mean() if len(true_BFHW) else torch.zeros(())
