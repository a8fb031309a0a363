"""The rank of auxiliary branches falls to 0 while a model trains (QVGen, arXiv:2505.11497).

A branch of rank r has floor(log2 r) + 1 periods of equal length. In each of them the gains of the weaker half of its
components (of the last one in the last period) fall from 1 to 0 with a cosine, and stay 0. The strength of a component
is |up_i| |down_i| at the start of the period. QVGen decomposes up down again at the start of a period instead; here no
weight is rewritten, so the moments of the optimiser and an average of the weights stay valid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def periods(rank: int) -> int:
    """Return the number of periods in which a rank falls to 0.

    >>> periods(32), periods(3), periods(1)
    (6, 2, 1)
    """
    return rank.bit_length()


def ranks(rank: int) -> list[int]:
    """Return the rank at the start of each period, and 0 at the end.

    >>> ranks(32), ranks(3)
    ([32, 16, 8, 4, 2, 1, 0], [3, 1, 0])
    """
    return [rank >> period for period in range(periods(rank) + 1)]


@torch.no_grad()
def decay_(gain: Tensor, up: Tensor, down: Tensor, step: int, total: int) -> None:
    """Set the gains of a branch after a step. Steps must be made one after another, from 1 on.

    The gains hold the whole state: components that fall in this period have equal gains below 1, and those that will
    stay have gain 1. So a run that resumes from a checkpoint with the gains goes on as before.

    Args:
        gain: (r,) the gains, changed in place.
        up: (N, r).
        down: (r, K).
        step: steps made, from 1.
        total: number of steps in which the rank falls to 0.
    """
    if step >= total:
        gain.zero_()
        return
    rank = len(gain)
    length = total / periods(rank)
    period = int(step / length)
    share = step / length - period
    left = rank >> (period + 1)
    strength = up.float().norm(dim=0) * down.float().norm(dim=1)
    # Components at gain 1 come first, then those that fall, then those that are off; among equals the strongest.
    order = strength.argsort(descending=True, stable=True)
    order = order[torch.sign(gain - 1).add(torch.sign(gain))[order].argsort(descending=True, stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(rank, device=gain.device)
    falling = 0.5 * (1 + math.cos(math.pi * share))
    gain.copy_(torch.where(place < left, 1.0, torch.where(place < rank >> period, falling, 0.0)))
