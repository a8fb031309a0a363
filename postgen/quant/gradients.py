"""Rounding with gradients: straight-through estimates, so that scales, clips, zero points and weights can be trained.

The values are those of `postgen.quant.rounding`, bit by bit; only the gradients differ. Rounding passes gradients on.
Numbers beyond the range of the grid get none, but scales and clips get theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from postgen.quant.formats import Format
from postgen.quant.rounding import Scales, codes_of, grouped, represented, scales_of, ungrouped


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, path: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def through(path: Tensor, value: Tensor) -> Tensor:
    """Return `value` exactly, with the gradient of `path`; both have the same shape.

    The usual form path + (value - path).detach() has rounding errors.
    """
    found: Tensor = _Through.apply(path, value.detach())  # type: ignore[no-untyped-call]
    return found


def clamped(x: Tensor, least: float, most: float) -> Tensor:
    """Clamp x, and pass all gradients on, so that a number beyond the range can return (EfficientQAT's clamp)."""
    return through(x, x.clamp(least, most))


def fake_quantize(
    x: Tensor,
    format: Format,
    scales: Scales | None = None,
    *,
    clip: Tensor | float = 1.0,
    clip_low: Tensor | float | None = None,
) -> Tensor:
    """Quantise a tensor and return the numbers that its codes represent, with gradients.

    Args:
        x: (..., K), any floating-point dtype.
        format: the number format. Bit planes need scales.
        scales: scales to use; None computes them from x, and lets gradients flow through the range of x.
        clip: see `scales_of`; only without scales.
        clip_low: see `scales_of`.

    Returns:
        The shape and dtype of x; the numbers of `quantize(x, format, scales).numbers(x.dtype)`.

    Raises:
        UserError: the format's group does not divide K.
    """
    parts = grouped(x, format)
    if scales is None:
        scales = range_scales(parts, format, clip, clip_low)
    return ungrouped(_rounded(parts, scales, format), format, tuple(x.shape)).to(x.dtype)


def range_scales(
    x: Tensor, format: Format, clip: Tensor | float = 1.0, clip_low: Tensor | float | None = None
) -> Scales:
    """Return the scales of `scales_of` with gradients with respect to x and the clips; powers of two and E4M3 numbers
    pass gradients through their rounding.

    Args:
        x: the grouped tensor.
        format: any format but bit planes.
        clip: see `scales_of`.
        clip_low: see `scales_of`.
    """
    with torch.no_grad():
        exact = scales_of(x, format, clip=clip, clip_low=clip_low)
    axes = (-1,) if format.share != "tensor" else tuple(range(x.dim()))
    if exact.zero is not None:
        high, low = (
            x.amax(axes, keepdim=True) * clip,
            x.amin(axes, keepdim=True) * (clip if clip_low is None else clip_low),
        )
        step = through((high - low) / format.grid.largest, exact.scale)
        return Scales(scale=step, zero=through(-low / step, exact.zero))
    step = x.abs().amax(axes, keepdim=True) * clip / format.grid.largest
    return Scales(scale=through(step, exact.step))


def _rounded(x: Tensor, scales: Scales, format: Format) -> Tensor:
    if format.planes:
        return represented(codes_of(x, scales, format), scales, format)
    step = scales.step
    # A block of zeros in an NV format has the scale 0.
    scaled = torch.where(step > 0, x / torch.where(step > 0, step, 1), 0)
    least, most = format.grid.least, format.grid.largest
    if scales.zero is None:
        return through(scaled.clamp(least, most), format.grid.round(scaled)) * step
    return ((through(scaled, scaled.round()) + scales.zero).clamp(least, most) - scales.zero) * step
