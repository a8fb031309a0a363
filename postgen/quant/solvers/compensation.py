"""Column by column: each rounding error is compensated by the columns that are still exact (arXiv:2210.17323).

With the upper triangular U of H^-1 = U^T U, the columns of a weight W are rounded from left to right:

    e_t = (w_t - q_t) / U_tt,   w_s -= e_t U_ts for all s > t

The errors E of all columns fulfil E U = W - Q, and ||E||^2 is the squared error of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from postgen.quant.hessian import Hessian

Rounded = Callable[[int, Tensor], Tensor]
Order = Literal["none", "groups", "channels"]
"""Order in which channels are rounded: as they are; whole groups, or single channels, with the largest inputs first.
The stored order never changes."""


def sweep(exact: Tensor, upper: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor]:
    """Round the columns of a part of a weight in turn.

    Args:
        exact: the columns (N, C), float32; they stay as they are.
        upper: the rows and columns of U that belong to them (C, C).
        rounded: function from the number t of a column and the columns as compensated so far (N, C), where those from
            t on are still exact, to the rounded column t (N).

    Returns:
        The rounded columns Q (N, C) and the errors E (N, C), with E U = exact - Q.
    """
    # A column is a row of these tensors, so that its numbers lie side by side in memory.
    now = exact.T.clone(memory_format=torch.contiguous_format)
    numbers, errors = torch.empty_like(now), torch.empty_like(now)
    for place in range(len(now)):
        numbers[place] = rounded(place, now.T)
        errors[place] = (now[place] - numbers[place]) / upper[place, place]
        now[place + 1 :].addr_(upper[place, place + 1 :], errors[place], alpha=-1)
    return numbers.T.contiguous(), errors.T.contiguous()


def ordering(hessian: Hessian, order: Order, group: int) -> Tensor:
    """Return the channels in the order in which they are rounded, (K)."""
    size = hessian.matrix.diagonal()
    if order == "channels":
        return size.argsort(descending=True, stable=True)
    channels = torch.arange(len(size), device=size.device)
    if order == "none":
        return channels
    groups = size.reshape(-1, group).mean(1).argsort(descending=True, stable=True)
    return channels.reshape(-1, group)[groups].flatten()


def inverse(order: Tensor) -> Tensor:
    """Return the order that undoes an order of channels."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back
