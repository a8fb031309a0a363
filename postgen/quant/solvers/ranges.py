"""Scales of groups: from the extremes of the data, or from the clip ratio with the least squared error."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from postgen.quant.formats import Format
from postgen.quant.hessian import Hessian
from postgen.quant.rounding import Scales, codes_of, grouped, represented, scales_of

Clip = Literal["minmax", "search"]
"""How the range of a group is chosen: its extremes, or the part of them with the least squared error of the weights
(weighted with the diagonal of the Hessian where there is one)."""
RATIOS = tuple(1 - 0.025 * step for step in range(29))
"""Clip ratios that a search tries: 1 down to .3. Groups with few levels want small ones."""
_POWERS = (1.0, 0.5, 0.25)
"""Ratios for scales that are powers of two."""


def range_scales(
    x: Tensor, format: Format, clip: Clip, importance: Tensor | None = None, *, whole: Tensor | None = None
) -> Scales:
    """Return scales of a grouped tensor, see `postgen.quant.rounding.grouped`.

    A search tries the same ratio for both extremes; with a zero point it then tries others for each alone.

    Args:
        x: the grouped tensor.
        format: any format but bit planes.
        clip: how the range is chosen.
        importance: factors of the squared errors, broadcast against x.
        whole: the scale of the tensor, for formats with E4M3 scales; None computes it from x.
    """
    if format.scale == "e4m3" and whole is None:
        whole = scales_of(x, format).whole
    start = scales_of(x, format, whole=whole)
    if clip == "minmax":
        return start
    ones = torch.ones_like(start.step)
    ratios = _POWERS if format.scale == "e8m0" else RATIOS
    high, low, least = ones, ones, squared_error(x, start, format, importance)
    for which in ("both", "high", "low") if format.asymmetric else ("both",):
        for ratio in ratios:
            tried_high = high if which == "low" else ones * ratio
            tried_low = low if which == "high" else ones * ratio
            scales = scales_of(x, format, clip=tried_high, clip_low=tried_low, whole=whole)
            error = squared_error(x, scales, format, importance)
            better = error < least
            least = torch.where(better, error, least)
            high, low = torch.where(better, tried_high, high), torch.where(better, tried_low, low)
    return scales_of(x, format, clip=high, clip_low=low, whole=whole)


def squared_error(x: Tensor, scales: Scales, format: Format, importance: Tensor | None = None) -> Tensor:
    """Return the squared error of each set of numbers that share a scale, in the shape of `scales.step`."""
    noise = (x - represented(codes_of(x, scales, format), scales, format)).square()
    return summed(noise if importance is None else noise * importance, format)


def summed(x: Tensor, format: Format) -> Tensor:
    """Return the sum over the numbers that share a scale; the axes stay, with size 1."""
    return x.sum().reshape((1,) * x.dim()) if format.share == "tensor" else x.sum(-1, keepdim=True)


def importance_of(weight: Tensor, format: Format, hessian: Hessian | None) -> Tensor | None:
    """Return the diagonal of the Hessian in the shape of the grouped weight; None without one."""
    if hessian is None:
        return None
    return grouped(hessian.matrix.diagonal().to(weight.device).expand_as(weight), format)
