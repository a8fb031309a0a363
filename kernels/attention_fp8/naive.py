"""Attention with queries, keys, softmax and values in E4M3, in plain torch: the reference of the kernel.

Three things are rounded: the prepared queries, keys and values, with one scale per tensor; the exponentials
exp(logit - largest logit of the row), times 256; and the output. Sums, the softmax divisor and everything else are
computed in float32 (float64 for float64 inputs). An online kernel subtracts the largest logit seen so far instead of
that of the whole row: it rounds other values, but as many.

Shapes as in `postgen.kernels.attention.naive`. Number formats: arXiv:2209.05433; FP8 attention: arXiv:2407.08608.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.attention.naive import key_mask
from postgen.kernels.attention_fp8.preparation import Channels, Plan, Preparation, planned, rotation
from postgen.kernels.fp8 import E4M3, E4M3_MAX

SOFTMAX_SCALE = 256.0
"""The factor of the exponentials of a row, whose largest is 1: a power of two within the range of E4M3."""
_BUDGET = 2**26
"""The largest number of logits of one chunk of queries."""
_SMALLEST = 2.0**-9
"""The smallest positive E4M3 number."""


def planned_for(query: Tensor, key: Tensor, value: Tensor, preparation: Preparation) -> Plan:
    """Return the plan of the preparation for these queries, keys and values, each (B, N, H, D)."""
    return planned(Channels.of(query), Channels.of(key), Channels.of(value), preparation)


def changed(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the prepared tensors, within +-448 and not yet rounded, in float32 (float64 for float64 inputs)."""
    matrix = rotation(query.shape[-1], plan.query.times) if plan.rotates else None
    return plan.query(query, matrix), plan.key(key, matrix), plan.value(value, None)


def output_scale(value_scale: Tensor, keys: int) -> Tensor:
    """Return a scale of the output with which it cannot overflow, for all queries and keys.

    The weights of softmax are not negative and sum to 1. So the output of a channel lies between its smallest and its
    largest value, |o| <= max |v| <= 448 * value_scale, and the scale of the values would be enough. But the divisor is
    summed before the exponentials are rounded. The rounded exponentials may sum to more: by 1/16 of the divisor (half
    a step of E4M3), plus half of the smallest E4M3 number per key. The returned scale allows for both. A wide scale
    costs little: an output keeps 3 bits down to 2^-15 of the largest value, and smaller outputs err by 2^-19 of it.

    Args:
        value_scale: the scale of the values, one float32 number.
        keys: the number of keys.
    """
    return value_scale * (1 + 2.0**-4 + keys * _SMALLEST / 2 / SOFTMAX_SCALE)


def attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    preparation: Preparation | None = None,
    key_lengths: Tensor | None = None,
    rows: Tensor | None = None,
    rounds_output: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute attention with the rounding of the FP8 kernel.

    Args:
        query: (B, N, H, D).
        key: (B, M, H, D).
        value: (B, M, H, D).
        scale: factor of the logits; None is D ** -0.5.
        preparation: the exact transformations before the rounding; None is the default.
        key_lengths: (B,): sample b attends to its first `key_lengths[b]` keys only. The scales depend on all keys.
        rows: (R,), indices of queries. Only these queries are computed, with the scales of all queries; N is R in the
            results.
        rounds_output: whether the output is rounded to E4M3 before the preparation is undone.

    Returns:
        The output (B, N, H, D) in the dtype of the query, and the LSE (B, H, N).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plan = planned_for(query, key, value, Preparation() if preparation is None else preparation)
    given = query if rows is None else query[:, rows]
    q, k, v = (rounded(x).transpose(1, 2) for x in changed(given, key, value, plan))
    q = q * (plan.query_scale * plan.key_scale * scale)
    mask = None if key_lengths is None else key_mask(key_lengths.to(query.device), key.shape[1])
    chunk = max(1, _BUDGET // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [_attend(part, k, v, mask) for part in q.split(chunk, dim=2)]
    out, lse = (torch.cat(each, dim=2) for each in zip(*parts, strict=True))
    out = (out * plan.value_scale).transpose(1, 2)
    if rounds_output:
        limit = output_scale(plan.value_scale, key.shape[1])
        out = rounded(out / limit) * limit
    undo = plan.corrected(v.transpose(1, 2).mean(1, keepdim=True))
    return undo.output(out).to(query.dtype), undo.lse(lse.squeeze(-1), given, scale)


def rounded(x: Tensor) -> Tensor:
    """Round to E4M3, limited to +-448, and return the result in the dtype of x."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return output and LSE with rounded exponentials; q already includes all scales of the logits."""
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    share = (logits - largest).exp()
    divisor = share.sum(-1, keepdim=True)
    return rounded(share * SOFTMAX_SCALE) / SOFTMAX_SCALE @ v / divisor, largest + divisor.log()
