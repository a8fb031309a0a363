"""Attention whose probabilities are powers of two (SULQ, arXiv:2311.10126): plain torch, a model of a kernel.

SULQ quantises a probability p evenly on the scale log2(p + eta) and reads it back with a whole exponent, so that a
shift can multiply by it. A fused kernel has no normalised probabilities: it has u = (logit - maximum) / ln 2 <= 0, and
2^u is a probability up to a factor of its row. So rounding u to a whole number before the exponential gives SULQ with
eta = 0 and steps of 1; the divisor is the sum of the rounded numbers. Powers of two are exact in E4M3 down to 2^-9 and
in E5M2 down to 2^-16, so a product with the values in FP8 has no further error. With eta > 0 the output is

    (sum_j 2^round(log2(2^u_j + eta)) v_j - eta sum_j v_j) / (sum_j 2^round(log2(2^u_j + eta)) - eta M)

for M keys. With many keys eta must be a power of two, or 0: otherwise every key far below the maximum keeps the
probability 2^round(log2 eta) - eta, and all of them together outweigh the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from postgen.kernels.attention.naive import in_chunks

LEAST = {torch.float8_e4m3fn: -9, torch.float8_e5m2: -16}
"""Dtype of the probabilities in a product -> exponent of its smallest power of two."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eta: float = 0.0,
    least: int = LEAST[torch.float8_e4m3fn],
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention with probabilities whose exponents are rounded, (B, N, H, D), and the LSE, (B, H, N).

    Args:
        query: (B, N, H, D).
        key: (B, M, Hk, D), where H is a multiple of Hk.
        value: (B, M, Hk, D).
        eta: the shift, 0 or greater.
        least: the smallest exponent; with eta = 0 smaller probabilities become 0. With eta > 0 the smallest exponent
            is that of eta, and this is not used.
        scale: factor of the logits; None is D^-0.5.
        key_lengths: (B,): sample b attends to its first `key_lengths[b]` keys only.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = q @ k.transpose(-1, -2)
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        largest = logits.amax(-1, keepdim=True)
        # Without any key all logits are -inf: the difference must stay -inf and not become NaN.
        p = powers((logits - largest.masked_fill(largest == float("-inf"), 0.0)) / math.log(2), eta, least)
        if hidden is not None:
            p = p.masked_fill(hidden, 0.0)
        total = p.sum(-1, keepdim=True)
        out = (p @ v) / torch.where(total == 0, torch.ones_like(total), total)
        return out, largest + total.log()

    return in_chunks(attend, query, key, value, scale=scale, key_lengths=key_lengths)


def powers(u: Tensor, eta: float, least: int) -> Tensor:
    """Return the rounded 2^u: 2^round(u) down to 2^least and 0 below, or 2^round(log2(2^u + eta)) - eta.

    Args:
        u: exponents, at most 0.
        eta: the shift, 0 or greater.
        least: the smallest exponent without a shift.
    """
    if eta > 0:
        return torch.exp2(torch.log2(torch.exp2(u) + eta).round()) - eta
    exponent = u.round()
    return torch.where(exponent >= least, torch.exp2(exponent), 0.0)
