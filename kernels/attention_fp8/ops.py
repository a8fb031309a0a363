"""`attention_fp8`: softmax attention in E4M3 by cuDNN, after exact changes that lower its error.

Shapes as in `naive.py`, which is the reference. Never chosen by the router of `postgen.kernels.attention` itself: its
numbers are not those of the inputs' format.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, library

from postgen.kernels.attention.backends import Call
from postgen.kernels.attention.ops import as_autocast, attention, check_lengths, check_range, router
from postgen.kernels.attention_fp8 import graphs, naive
from postgen.kernels.attention_fp8.preparation import Change, Channels, Plan, Preparation, planned, rotation
from postgen.kernels.dispatch import DTYPES, THERE, warn_once
from postgen.kernels.fp8 import E4M3, to_fp8

NAME = "cudnn_fp8"
"""What `attention(backend=)` and diffusers' `set_attention_backend` call it."""

_guarded = {"not_finite": 0}


@overload
def attention_fp8(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, preparation: Preparation | None = None,
    key_lengths: Tensor | None = None, return_lse: Literal[False] = False, simulate: bool = False, guard: bool = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention_fp8(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, preparation: Preparation | None = None,
    key_lengths: Tensor | None = None, return_lse: Literal[True], simulate: bool = False, guard: bool = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    preparation: Preparation | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    simulate: bool = False,
    guard: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(scale * query @ key^T) @ value, (B, N, H, D), computed in E4M3.

    It has the dtype of the query, or that of autocast, which is heeded as by torch's own attention.

    Where cuDNN cannot compute it, exact attention does, with one warning that says why. There is no gradient: inputs
    that ask for one get exact attention, with one warning too.

    Args:
        query: (B, N, H, D), any strides.
        key: (B, M, H, D).
        value: (B, M, H, D).
        scale: factor of the logits; None is D ** -0.5.
        preparation: the exact changes before rounding; None is the usual one.
        key_lengths: (B,) integers from 1 to M: of sample b only the first `key_lengths[b]` keys count.
        return_lse: also return log(sum(exp(logits))), (B, H, N), float32 (float64 for float64).
        simulate: compute the reference in plain torch, on any device: slow, for tests and calibration.
        guard: look whether the output is finite, which waits for the GPU; one that is not is computed exactly, counted
            (`not_finite`) and warned of once.

    Raises:
        ValueError: shapes that do not belong together, lengths on the CPU out of range.
    """
    query, key, value = as_autocast(query, key, value)
    _check(query, key, value)
    if key_lengths is not None:
        check_lengths(key_lengths, query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    text = str(Preparation() if preparation is None else preparation)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        if not torch.compiler.is_compiling():
            warn_once("FP8 attention has no gradient: exact attention computes where one is asked for")
        if return_lse:
            return attention(query, key, value, scale=scale, key_lengths=key_lengths, return_lse=True)
        return attention(query, key, value, scale=scale, key_lengths=key_lengths)
    out, lse = _attention_fp8(query, key, value, scale, key_lengths, text, return_lse, simulate, guard)
    return (out, lse) if return_lse else out


def not_finite() -> int:
    """Return how many outputs were not finite and were computed again, in this process, by calls with `guard`."""
    return _guarded["not_finite"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    key_lengths: Tensor | None = None,
    lse: bool = False,
    preparation: Preparation | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute on the GPU by cuDNN; it raises where there is no graph. Arguments as those of `attention_fp8`."""
    plan, tensors = quantised(query, key, value, Preparation() if preparation is None else preparation)
    dtype = graphs.output_dtype(query.device)
    scales = plan.query_scale, plan.key_scale, plan.value_scale
    out, limit, found = graphs.attend(*tensors, scales, scale=scale, dtype=dtype, key_lengths=key_lengths, lse=lse)
    undo = plan.corrected(_channels_of(tensors[2]).mean)
    factor = torch.ones_like(plan.value.times) if undo.factor is None else undo.factor
    undone = _changed(out, Change(None, factor * limit), plus=undo.value_mean, dtype=query.dtype)
    return undone, None if found is None else undo.lse(found, query, scale)


def quantised(
    query: Tensor, key: Tensor, value: Tensor, preparation: Preparation
) -> tuple[Plan, tuple[Tensor, Tensor, Tensor]]:
    """Return what was done to queries, keys and values, and the three in E4M3, (B, N, H, D) without gaps."""
    plan = planned(_channels_of(query), _channels_of(key), _channels_of(value), preparation)
    q = _changed(query, plan.query, rotates=plan.rotates)
    k = _changed(key, plan.key, rotates=plan.rotates)
    return plan, (q, k, _changed(value, plan.value))


def _channels_of(x: Tensor) -> Channels:
    if not (THERE and x.is_cuda):
        return Channels.of(x)
    from postgen.kernels.attention_fp8 import triton

    return triton.channels_of(x)


def _changed(
    x: Tensor, change: Change, *, rotates: bool = False, plus: Tensor | None = None, dtype: torch.dtype = E4M3
) -> Tensor:
    """Return `triton.changed`, as plain torch where there is no Triton."""
    if THERE and x.is_cuda:
        from postgen.kernels.attention_fp8 import triton

        return triton.changed(x, change, rotates=rotates, plus=plus, dtype=dtype)
    found = change(x, rotation(x.shape[-1], change.times) if rotates else None)
    found = found if plus is None else found + plus
    found = to_fp8(found, torch.ones_like(found[:1, :1, :1, :1])) if dtype == E4M3 else found.to(dtype)
    return found.contiguous()


@library.custom_op("postgen::attention_fp8", mutates_args=())
def _attention_fp8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_lengths: Tensor | None,
    preparation: str,
    return_lse: bool,
    simulate: bool,
    guard: bool,
) -> tuple[Tensor, Tensor]:
    if key_lengths is not None and key_lengths.device.type == "cpu":
        check_range(key_lengths.tolist(), key.shape[1])
    # Autocast would round to sixteen bits what is computed in float32 here.
    with torch.autocast(query.device.type, enabled=False):
        call = Call(query, key, value, scale, key_lengths, return_lse, preparation)
        out, lse = _simulated(call) if simulate else _routed(call)
        if guard and not _recording(query) and not bool(out.isfinite().all()):
            _guarded["not_finite"] += 1
            warn_once("FP8 attention gave numbers that are not finite: exact attention computes such calls again")
            out, lse = _exact(call)
    return out.contiguous(), query.new_empty(0) if lse is None or not return_lse else lse.contiguous()


def _simulated(call: Call) -> tuple[Tensor, Tensor | None]:
    given = None if call.preparation is None else Preparation.parsed(call.preparation)
    return naive.attention_fp8(*call[:3], scale=call.scale, preparation=given, key_lengths=call.key_lengths)


def _routed(call: Call) -> tuple[Tensor, Tensor | None]:
    lengths = call.key_lengths
    lengths = None if lengths is None else lengths.to(call.query.device, torch.int32).contiguous()
    # It tries a kernel before it trusts it, and says why exact attention computes where it does not.
    return router().run(call._replace(key_lengths=lengths), NAME)


def _exact(call: Call) -> tuple[Tensor, Tensor | None]:
    if call.lse:
        return attention(*call[:3], scale=call.scale, key_lengths=call.key_lengths, return_lse=True)
    return attention(*call[:3], scale=call.scale, key_lengths=call.key_lengths), None


@_attention_fp8.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_lengths: Tensor | None,
    preparation: str,
    return_lse: bool,
    simulate: bool,
    guard: bool,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(batch, heads, tokens, dtype=dtype) if return_lse else query.new_empty(0)
    return query.new_empty(query.shape), lse


def _recording(query: Tensor) -> bool:
    return query.is_cuda and torch.cuda.is_current_stream_capturing()


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)) or key.shape != value.shape:
        raise ValueError(f"query must be (B, N, H, D), key and value (B, M, H, D), got {shapes}")
    same = [(x.shape[0], x.shape[2], x.shape[3]) for x in (query, key)]
    if same[0] != same[1] or query.numel() == 0 or key.numel() == 0:
        raise ValueError(f"FP8 attention takes as many heads of keys as of queries, and some tokens, got {shapes}")
    if len({(x.dtype, x.device) for x in (query, key, value)}) > 1:
        raise ValueError("query, key and value must have one dtype and one device")
    if query.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"FP8 attention takes bfloat16, float16, float32 and float64, not {query.dtype}")
