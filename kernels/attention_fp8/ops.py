"""`attention_fp8`: softmax attention in FP8 (E4M3) with cuDNN, after exact transformations that lower its error.

Shapes as in `naive.py`, which is the reference. The router of `postgen.kernels.attention` never chooses this kernel
by itself, because it computes with fewer bits than its inputs have.
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
"""The name of the kernel for `attention(backend=)` and for diffusers' `set_attention_backend`."""

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
    """Compute softmax attention, softmax(scale * query @ key^T) @ value, in FP8 (E4M3).

    Where cuDNN cannot compute a call, exact attention runs, with one warning that names the reason. The FP8 kernel has
    no gradient: for inputs that require a gradient exact attention runs, with one warning.

    Args:
        query: (B, N, H, D), any strides.
        key: (B, M, H, D).
        value: (B, M, H, D).
        scale: factor of the logits; None is D ** -0.5.
        preparation: the exact transformations before the rounding; None is the default.
        key_lengths: (B,) integers from 1 to M: sample b attends to its first `key_lengths[b]` keys only.
        return_lse: also return the LSE.
        simulate: compute the reference in plain torch, on any device. This is slow and meant for tests and
            calibration.
        guard: check whether the output is finite, which waits for the GPU. An output with NaN or infinity is computed
            again exactly, counted (`not_finite`), and reported by one warning.

    Returns:
        (B, N, H, D), in the dtype of the query or the autocast dtype. With `return_lse` also log(sum(exp(logits))),
        (B, H, N), float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not match, the preparation is no `Preparation`, or a length on the CPU is out of
            range.
    """
    query, key, value = as_autocast(query, key, value)
    _check(query, key, value, preparation)
    if key_lengths is not None:
        check_lengths(key_lengths, query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    text = str(Preparation() if preparation is None else preparation)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        if not torch.compiler.is_compiling():
            warn_once("FP8 attention has no gradient: exact attention runs for inputs that require one")
        if return_lse:
            return attention(query, key, value, scale=scale, key_lengths=key_lengths, return_lse=True)
        return attention(query, key, value, scale=scale, key_lengths=key_lengths)
    out, lse = _attention_fp8(query, key, value, scale, key_lengths, text, return_lse, simulate, guard)
    return (out, lse) if return_lse else out


def not_finite() -> int:
    """Return how many outputs of calls with `guard` were not finite and computed again in this process."""
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
    """Compute FP8 attention with cuDNN and without a fallback; arguments as in `attention_fp8`.

    Args:
        query: (B, N, H, D), on a GPU.
        key: (B, M, H, D).
        value: (B, M, H, D).
        scale: factor of the logits.
        key_lengths: (B,), int32, on the GPU, or None.
        lse: whether to return the LSE too.
        preparation: the exact transformations before the rounding; None is the default.

    Returns:
        (B, N, H, D) in the dtype of the query, and the LSE (B, H, N) in float32 or None.

    Raises:
        Exception: the front end of cuDNN cannot build the graph.
    """
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
    """Prepare queries, keys and values (B, N, H, D) and round them to E4M3.

    Returns:
        The plan, which holds the scales and undoes the preparation, and the three contiguous E4M3 tensors.
    """
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
    """Compute `triton.changed`, in plain torch on a CPU or without Triton."""
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
    # Autocast would round the float32 computations to 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        call = Call(query, key, value, scale, key_lengths, return_lse, preparation)
        out, lse = _simulated(call) if simulate else _routed(call)
        if guard and not _recording(query) and not bool(out.isfinite().all()):
            _guarded["not_finite"] += 1
            warn_once("FP8 attention returned NaN or infinity: exact attention computes such calls again")
            out, lse = _exact(call)
    return out.contiguous(), query.new_empty(0) if lse is None or not return_lse else lse.contiguous()


def _simulated(call: Call) -> tuple[Tensor, Tensor | None]:
    given = None if call.preparation is None else Preparation.parsed(call.preparation)
    return naive.attention_fp8(*call[:3], scale=call.scale, preparation=given, key_lengths=call.key_lengths)


def _routed(call: Call) -> tuple[Tensor, Tensor | None]:
    lengths = call.key_lengths
    lengths = None if lengths is None else lengths.to(call.query.device, torch.int32).contiguous()
    # The router checks the kernel on a small input first, and warns with the reason if exact attention must run.
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


def _check(query: Tensor, key: Tensor, value: Tensor, preparation: object) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)) or key.shape != value.shape:
        raise ValueError(f"query must be (B, N, H, D), key and value (B, M, H, D), got {shapes}")
    same = [(x.shape[0], x.shape[2], x.shape[3]) for x in (query, key)]
    if same[0] != same[1] or query.numel() == 0 or key.numel() == 0:
        raise ValueError(
            f"query and key must have the same batch, heads and channels, and at least one token, got {shapes}"
        )
    if len({(x.dtype, x.device) for x in (query, key, value)}) > 1:
        raise ValueError("query, key and value must have the same dtype and the same device")
    if query.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"query must be bfloat16, float16, float32 or float64, got {query.dtype}")
    if preparation is not None and not isinstance(preparation, Preparation):
        raise ValueError(
            f"preparation must be a Preparation, such as Preparation.parsed('plain'), got {preparation!r}"
        )
