"""Attention with queries, keys, softmax and values in E4M3, in plain torch: the reference of the kernel.

What is rounded: prepared queries, keys and values, each with one scale for the tensor; the exponentials
exp(logits - the row's largest), times 256; the output. Sums, the divisor and everything else stay in float32 (float64
for float64). A kernel that takes the largest logit met so far instead of the row's rounds at other places, no more
often.

Shapes as in `postgen.kernels.attention.naive`. Formats: arXiv:2209.05433; FP8 attention: arXiv:2407.08608.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.attention.naive import key_mask
from postgen.kernels.attention_fp8.preparation import Channels, Plan, Preparation, planned, rotation
from postgen.kernels.fp8 import E4M3, E4M3_MAX

SOFTMAX_SCALE = 256.0
"""What a row's exponentials, of which the largest is 1, are multiplied by: a power of two that E4M3 holds."""
_BUDGET = 2**26
"""Logits that one chunk of queries may take."""
_SMALLEST = 2.0**-9
"""The smallest number of E4M3 above 0."""


def planned_for(query: Tensor, key: Tensor, value: Tensor, preparation: Preparation) -> Plan:
    """Return what is done to these tensors."""
    return planned(Channels.of(query), Channels.of(key), Channels.of(value), preparation)


def changed(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors within +-448 that are rounded to E4M3, in float32 (float64 for float64)."""
    matrix = rotation(query.shape[-1], plan.query.times) if plan.rotates else None
    return plan.query(query, matrix), plan.key(key, matrix), plan.value(value, None)


def output_scale(value_scale: Tensor, keys: int) -> Tensor:
    """Return a scale of the output that cannot overflow, whatever the queries and keys are.

    A row of softmax is not negative and sums to 1, so the output of a channel lies between its smallest and its
    largest value: |o| <= max |v| <= 448 * value_scale, so the scale of the values would do. Rounded exponentials may
    sum to more than the divisor that was summed before: by 1/16, half a step of E4M3, and by half its smallest number
    a key. What a wide scale costs is small: an output is rounded to 3 bits down to 2^-15 of the largest value, and
    errs by 2^-19 of it below.
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
    """Return attention as the kernel computes it, (B, N, H, D), and its LSE, (B, H, N).

    Args:
        query: (B, N, H, D).
        key: (B, M, H, D).
        value: (B, M, H, D).
        scale: factor of the logits; None is D ** -0.5.
        preparation: the exact changes before rounding; None is the usual one.
        key_lengths: (B,): of sample b only the first `key_lengths[b]` keys count; all are looked at for scales.
        rows: indices of queries, (R,): only theirs is computed, with the scales of all; N is R then.
        rounds_output: whether the output is rounded to E4M3 before what was prepared is undone.
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
    """Round to E4M3 and return it in the format that it had."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend with rounded exponentials; q holds all scales of the logits."""
    logits = q @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    share = (logits - largest).exp()
    divisor = share.sum(-1, keepdim=True)
    return rounded(share * SOFTMAX_SCALE) / SOFTMAX_SCALE @ v / divisor, largest + divisor.log()
