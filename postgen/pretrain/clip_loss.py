"""The reconstruction loss of a clip, and the detection of edge pixels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_FULL_EDGE = 0.4


def clip_loss(
    x: Tensor, y: Tensor, weight: Tensor, mse_weight: float, gradient_weight: float, gradient_scales: int
) -> Tensor:
    """Return the mean of |e| + mse_weight e^2, plus gradient_weight times the absolute differences of e, all weighted.

    e = y - x is the error.

    Args:
        x, y: original and reconstructed clip (B,3,T,H,W).
        weight: (B,1,T,H,W), 1 on average.
        mse_weight: weight of the squared error.
        gradient_weight: weight of the differences along time, height and width.
        gradient_scales: number of scales of the differences; each scale after the first halves height and width.
    """
    error = y - x
    loss = (weight * (error.abs() + mse_weight * error.square())).mean()
    for scale in range(gradient_scales if gradient_weight else 0):
        if scale:
            error, weight = _halved(error), _halved(weight)
        steps = [error.diff(dim=dim).abs() * weight.narrow(dim, 1, weight.shape[dim] - 1) for dim in (2, 3, 4)]
        loss = loss + gradient_weight * sum((s.mean() for s in steps if s.numel()), start=loss.new_zeros(()))
    return loss


def edges(x: Tensor) -> Tensor:
    """Return how much a picture (B,3,T,H,W) in [-1,1] changes around each pixel: (B,1,T,H,W), from 0 to 1.

    The measure is the range of values in a 3x3 window, in the channel where the range is largest. A range of 0.4 or
    more, a fifth of the full range, gives 1.
    """
    frames = x.transpose(1, 2).flatten(0, 1)
    high = functional.max_pool2d(frames, 3, stride=1, padding=1)
    low = -functional.max_pool2d(-frames, 3, stride=1, padding=1)
    most = (high - low).amax(1, keepdim=True)
    share: Tensor = (most / _FULL_EDGE).clamp_max(1).unflatten(0, (len(x), -1)).transpose(1, 2)
    return share


def _halved(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
