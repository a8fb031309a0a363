"""Test whether the cost of a chunk stays the same over a long video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.metrics.bootstrap import Interval, bootstrap


@dataclass(frozen=True, slots=True)
class Flatness:
    """Trend of a cost over chunks, in the unit of the values."""

    slope: Interval
    """Slope per chunk, in the unit of the values."""
    growth: Interval
    """Increase of the trend from the first chunk to the last, divided by the mean."""
    flat: bool
    """Whether the interval of the slope includes 0."""


def flat_cost(values: Sequence[float], *, skip: int = 0, block: int | None = None, seed: int = 0) -> Flatness:
    """Return the least-squares slope of the cost per chunk (seconds or bytes), with a 95 % block-bootstrap interval.

    Blocks of consecutive chunks are resampled together, so that noise that lasts for several chunks does not count as
    more evidence than it is (block bootstrap, Kuensch 1989). "Flat" means that there is no trend above this noise.
    Report `growth` with it: it shows how large a trend could be hidden by the noise.

    Args:
        values: one cost per chunk, in order.
        skip: number of first chunks to ignore: warm-up, and chunks while the window fills.
        block: chunks of a block; None: the cube root of their number. First chunks that fill no block are dropped.
        seed: seed of the bootstrap.

    Raises:
        UserError: fewer than 8 chunks or 4 blocks, or values that are not finite numbers.

    >>> flat_cost([2.0] * 50).flat, flat_cost([2.0 + 0.01 * i for i in range(50)]).flat
    (True, False)
    """
    row = torch.tensor(values[skip:], dtype=torch.float64)
    width = round(len(row) ** (1 / 3)) if block is None else block
    if len(row) < 8 or width < 1 or len(row) // width < 4:
        raise UserError(f"{len(row)} chunks in blocks of {width}: give at least 8 chunks and 4 blocks")
    row = row[len(row) % width :]
    place = torch.arange(len(row), dtype=torch.float64)
    table = torch.cat((place.unflatten(0, (-1, width)), row.unflatten(0, (-1, width))), 1)
    slope = bootstrap(table, _slope, seed=seed)
    span = len(row) - 1
    growth = bootstrap(table, partial(_growth, span=span), seed=seed)
    return Flatness(slope, growth, slope.low <= 0 <= slope.high)


def _slope(rows: Tensor) -> Tensor:
    """Return the slope of resampled blocks (..., N, positions and values); 0 if all samples are the same chunk."""
    place, value = (part.flatten(-2) for part in rows.chunk(2, dim=-1))
    place = place - place.mean(-1, keepdim=True)
    # Subtract the first value before the mean: equal values then give exactly 0, without rounding errors.
    value = value - value[..., :1]
    value = value - value.mean(-1, keepdim=True)
    return (place * value).sum(-1) / place.square().sum(-1).clamp_min(1e-12)


def _growth(rows: Tensor, span: int) -> Tensor:
    mean = rows.chunk(2, dim=-1)[1].flatten(-2).mean(-1)
    return _slope(rows) * span / mean
