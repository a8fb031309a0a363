"""Confidence interval of a mean over clips: percentile bootstrap (Efron 1979)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A statistic of a sample, and the interval that holds the middle 95 % of its bootstrap values."""

    value: float
    low: float
    high: float


def mean(rows: Tensor) -> Tensor:
    """Return the mean over the second last axis: the default statistic, for rows of one column."""
    return rows.mean(dim=-2)[..., 0]


def ratio_of_means(rows: Tensor) -> Tensor:
    """Return the mean of the first column divided by the mean of the second."""
    means = rows.mean(dim=-2)
    return means[..., 0] / means[..., 1]


def bootstrap(
    rows: Tensor, statistic: Callable[[Tensor], Tensor] = mean, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Return a statistic and its 95 % interval. All columns of one clip are drawn together.

    Args:
        rows: (N,) or (N, columns), one row per clip.
        statistic: function from (..., N, columns) to (...).
        draws: number of resamples; each has N rows, drawn with replacement.
        seed: seed of the draws.

    Raises:
        UserError: fewer than 2 rows, or a value that is not finite.

    >>> interval = bootstrap(torch.tensor([0.0, 1.0, 1.0, 2.0]))
    >>> interval.value, interval.low < 1.0 < interval.high
    (1.0, True)
    """
    rows = rows.double().cpu()
    rows = rows[:, None] if rows.dim() == 1 else rows
    if len(rows) < 2 or not rows.isfinite().all():
        raise UserError(f"a bootstrap needs at least 2 rows of finite numbers, got {tuple(rows.shape)}")
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(rows), (draws, len(rows)), generator=generator)
    values = statistic(rows[picked])
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(value=float(statistic(rows)), low=low, high=high)
