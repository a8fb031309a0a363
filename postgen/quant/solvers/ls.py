"""Least squares: codes and scales in turn, each the best for the other (DVD-Quant, arXiv:2505.18663). Needs no data.

For a group with weights w, numbers of the grid q, scale s and zero point z:

    q = round(w / s) + z,   s = <q - z, w> / <q - z, q - z>,   z = round(mean(q - w / s))
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, E4M3_MAX
from postgen.quant.formats import Format
from postgen.quant.hessian import Hessian
from postgen.quant.rounding import Quantized, Scales, codes_of, grouped, quantize_tensor
from postgen.quant.solvers.planes import design, first_coefficients, fitted, stored
from postgen.quant.solvers.ranges import Clip, importance_of, range_scales, squared_error, summed
from postgen.settings import Part


@dataclass(kw_only=True)
class LsOptions(Part):
    """Options of the solver "ls"."""

    steps: int = 20
    """Largest number of rounds; a round that improves no group is the last one."""
    clip: Clip = "search"
    """How the first range of each group is chosen, see `postgen.quant.solvers.ranges.Clip`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in((1, 1000), "steps")


def ls(weight: Tensor, format: Format, hessian: Hessian | None, options: LsOptions) -> Quantized:
    """Round a weight with scales, zero points or plane coefficients of least squared error.

    The diagonal of a Hessian weighs the errors where there is one. Each group keeps its best round, so the error is
    never above that of "rtn". Scales that are powers of two are searched only.
    """
    x, importance = grouped(weight, format), importance_of(weight, format, hessian)
    if format.planes:
        scales = Scales(scale=stored(first_coefficients(x, format.planes)))
    else:
        scales = range_scales(x, format, options.clip, importance)
    if format.scale == "e8m0":
        return quantize_tensor(weight, format, scales)
    best, least = scales, squared_error(x, scales, format, importance)
    for _ in range(options.steps):
        scales = _fit(x, codes_of(x, scales, format), scales, format, importance)
        error = squared_error(x, scales, format, importance)
        better = error < least
        if not better.any():
            break
        best, least = _chosen(better, scales, best), torch.where(better, error, least)
    return quantize_tensor(weight, format, best)


def _fit(x: Tensor, values: Tensor, scales: Scales, format: Format, importance: Tensor | None) -> Scales:
    """Return the best scales for given numbers of the grid."""
    weights = torch.ones_like(x) if importance is None else importance
    if format.planes:
        root = weights.sqrt()
        return Scales(scale=stored(fitted(design(values, format.planes) * root[..., None], x * root)))
    centred = values if scales.zero is None else values - scales.zero
    above, below = summed(centred * x * weights, format), summed(centred.square() * weights, format)
    # A group whose codes are all 0 keeps its scale.
    step = torch.where(above > 0, above / torch.where(below > 0, below, 1), scales.step)
    if scales.whole is not None:
        small = (step / scales.whole).clamp(0, E4M3_MAX).to(E4M3).float()
        return replace(scales, scale=small)
    if scales.zero is None:
        return replace(scales, scale=step)
    zero = (summed((values - x / step) * weights, format) / summed(weights, format)).round()
    return Scales(scale=step, zero=zero.clamp(format.grid.least, format.grid.largest))  # one of the codes


def _chosen(better: Tensor, new: Scales, old: Scales) -> Scales:
    """Return the new scales of the groups that became better, and the old ones of the others."""
    zero = None
    if new.zero is not None and old.zero is not None:
        zero = torch.where(better, new.zero, old.zero)
    return Scales(scale=torch.where(better, new.scale, old.scale), zero=zero, whole=new.whole)
