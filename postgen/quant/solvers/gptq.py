"""GPTQ: round column by column, and let the columns that are still exact compensate (arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen.quant.formats import SQUARE, Format
from postgen.quant.hessian import Hessian
from postgen.quant.rounding import Quantized, Scales, codes_of, grouped, quantize_tensor, represented
from postgen.quant.solvers.compensation import Order, Rounded, inverse, ordering, sweep
from postgen.quant.solvers.planes import stored
from postgen.quant.solvers.ranges import Clip, importance_of, range_scales
from postgen.settings import Part

_BLOCK = 128
"""Columns between two updates of all later columns. Within a block, only the block is updated."""


@dataclass(kw_only=True)
class GptqOptions(Part):
    """Options of the solver "gptq"."""

    order: Order = "none"
    """See `postgen.quant.solvers.compensation.Order`. With "channels" all scales come from the exact weights, because
    the channels of a group are then not rounded together."""
    clip: Clip = "minmax"
    """How the range of each group is chosen, see `postgen.quant.solvers.ranges.Clip`."""


def gptq(weight: Tensor, format: Format, hessian: Hessian, options: GptqOptions) -> Quantized:
    """Round a weight so that the squared error of the layer's output is small.

    The scale of a group that is not a whole row comes from its columns as compensated when the first of them is
    reached. Bit planes keep evenly spaced numbers.
    """
    order = ordering(hessian, options.order, format.group(weight.shape[1]))
    grid = _ColumnGrid(weight, format, hessian, order, options)
    upper = (hessian if options.order == "none" else hessian.reordered(order)).upper
    now = weight.float()[:, order]
    for first in range(0, len(order), grid.block):
        last = min(first + grid.block, len(order))
        _, errors = sweep(now[:, first:last], upper[first:last, first:last], grid.at(first))
        now[:, last:] -= errors @ upper[first:last, last:]
    return grid.result()


class _ColumnGrid:
    """Rounds single columns of a weight to its format, and keeps their codes and scales."""

    def __init__(self, weight: Tensor, format: Format, hessian: Hessian, order: Tensor, options: GptqOptions) -> None:
        self.format, self.clip, self.shape = format, options.clip, tuple(weight.shape)
        self.size, self.order = format.group(weight.shape[1]), order
        self.late = isinstance(format.share, int) and options.order != "channels"
        """Whether scales are computed when a group is reached."""
        self.block = self.size * max(1, _BLOCK // self.size) if self.late else _BLOCK
        self.codes = weight.new_empty(self.shape, dtype=torch.float32)
        self.groups = (order // self.size).tolist()
        self.importance = hessian.matrix.diagonal()[order]
        # Scales that come later only take their places from these, and the scale of the tensor.
        clip: Clip = "minmax" if self.late else options.clip
        self.start = self._scales(weight, clip, importance_of(weight, format, hessian))
        self.scales = _for_each_row(self.start, format, len(weight))

    def at(self, first: int) -> Rounded:
        """Return the function for `sweep` over the columns from `first` on."""

        def rounded(place: int, columns: Tensor) -> Tensor:
            group = self.groups[first + place]
            if self.late and (first + place) % self.size == 0:
                self._reach(group, columns[:, place : place + self.size], first + place)
            own = _part(self.scales, group)
            codes = codes_of(columns[:, place, None, None], own, self.format)
            self.codes[:, first + place] = codes.flatten()
            return represented(codes, own, self.format).flatten()

        return rounded

    def result(self) -> Quantized:
        """Return the weight after all columns were rounded."""
        values = grouped(self.codes[:, inverse(self.order)], self.format)
        scales = self.scales if self.late else self.start
        return Quantized(values=values, scales=scales, format=self.format, shape=self.shape)

    def _reach(self, group: int, columns: Tensor, place: int) -> None:
        found = self._scales(columns, self.clip, self.importance[place : place + self.size], self.scales.whole)
        self.scales.scale[:, group] = found.scale[:, 0]
        if self.scales.zero is not None and found.zero is not None:
            self.scales.zero[:, group] = found.zero[:, 0]

    def _scales(self, weight: Tensor, clip: Clip, importance: Tensor | None, whole: Tensor | None = None) -> Scales:
        if self.format.planes:
            even = quantize_tensor(weight, self.format).scales
            return replace(even, scale=stored(even.scale))
        return range_scales(grouped(weight, self.format), self.format, clip, importance, whole=whole)


def _for_each_row(scales: Scales, format: Format, rows: int) -> Scales:
    """Return scales as (rows, groups, 1), a copy."""

    def each(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if format.share == "block":
            return tensor.repeat_interleave(SQUARE, 0)[:rows]
        return tensor.expand(rows, -1, -1).clone()

    scale = each(scales.scale)
    assert scale is not None
    return Scales(scale=scale, zero=each(scales.zero), whole=scales.whole)


def _part(scales: Scales, group: int) -> Scales:
    """Return the scales of one group, (rows, 1, 1)."""
    zero = None if scales.zero is None else scales.zero[:, group, None]
    return Scales(scale=scales.scale[:, group, None], zero=zero, whole=scales.whole)
