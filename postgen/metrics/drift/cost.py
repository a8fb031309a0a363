"""Whether a chunk costs the same however late it is."""

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
    """Trend of a cost over chunks."""

    slope: Interval
    """Per chunk, in the unit of the values."""
    growth: Interval
    """What the trend adds from the first chunk to the last, over the mean."""
    flat: bool
    """Whether the interval of the slope holds 0."""


def flat_cost(values: Sequence[float], *, skip: int = 0, block: int | None = None, seed: int = 0) -> Flatness:
    """Return the least-squares slope of seconds, or bytes, a chunk, with a 95 % interval from blocks of chunks.

    Blocks of neighbours are drawn together, so that noise which lasts for some chunks does not look like more evidence
    than it is (block bootstrap, Kuensch 1989). "Flat" means no trend above this noise: give `growth` beside it, which
    says how large a trend could hide there.

    Args:
        values: one a chunk, in order.
        skip: first chunks that are left out: warm-up, and windows that fill.
        block: chunks of a block; None: the cube root of their number. Left-over first chunks are dropped.
        seed: of the draws.

    Raises:
        UserError: fewer than 8 chunks or 4 blocks, or values that are no finite numbers.

    >>> flat_cost([2.0] * 50).flat, flat_cost([2.0 + 0.01 * i for i in range(50)]).flat
    (True, False)
    """
    row = torch.tensor(values[skip:], dtype=torch.float64)
    width = round(len(row) ** (1 / 3)) if block is None else block
    if len(row) < 8 or width < 1 or len(row) // width < 4:
        raise UserError(f"{len(row)} chunks in blocks of {width}: a trend needs at least 8 chunks and 4 blocks")
    row = row[len(row) % width :]
    place = torch.arange(len(row), dtype=torch.float64)
    table = torch.cat((place.unflatten(0, (-1, width)), row.unflatten(0, (-1, width))), 1)
    slope = bootstrap(table, _slope, seed=seed)
    span = len(row) - 1
    growth = bootstrap(table, partial(_growth, span=span), seed=seed)
    return Flatness(slope, growth, slope.low <= 0 <= slope.high)


def _slope(rows: Tensor) -> Tensor:
    """Slope of draws of blocks (..., N, places and values); 0 of a draw of one block of one chunk."""
    place, value = (part.flatten(-2) for part in rows.chunk(2, dim=-1))
    place = place - place.mean(-1, keepdim=True)
    # Around the mean: of equal values nothing but 0 is left, not even rounding.
    value = value - value[..., :1]
    value = value - value.mean(-1, keepdim=True)
    return (place * value).sum(-1) / place.square().sum(-1).clamp_min(1e-12)


def _growth(rows: Tensor, span: int) -> Tensor:
    mean = rows.chunk(2, dim=-1)[1].flatten(-2).mean(-1)
    return _slope(rows) * span / mean
