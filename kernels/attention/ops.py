"""`attention`: exact softmax attention on the fastest installed kernel, with key lengths and LSE.

`router.py` chooses among the kernels of `backends.py`; `naive.py` is the reference. On a CPU, and for inputs that
require a gradient, torch's `scaled_dot_product_attention` runs.
"""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
from torch import Tensor, library

from postgen.kernels.attention.backends import ASKED_FOR, LAST_RESORTS, MATH, SDPA, TIMED, Call, Result
from postgen.kernels.attention.router import TOLERANCE, Router
from postgen.kernels.attention.store import Store, cache_file
from postgen.kernels.dispatch import warn_once

WORTH_TIMING = 1e9
"""Calls with fewer multiplications than this are not timed: their time is that of the launch with every kernel."""
WORTH_READING = 1e12
"""Calls with at least so many multiplications per sample read key lengths from the GPU. They take 4 ms and more; the
wait costs less than kernels with key lengths do: on an H200 without FlashAttention-4, a step of HunyuanVideo at 720p
takes 21.0 s with lengths that are read, and 31.8 s without."""

_BY_NAME = {backend.name: backend for backend in (*TIMED, *LAST_RESORTS, *ASKED_FOR)}


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None,
    return_lse: Literal[False] = False, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None,
    return_lse: Literal[True], backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute exact softmax attention, softmax(scale * query @ key^T) @ value, on the fastest installed kernel.

    The first call of a shape on a GPU times the kernels that work there, on the tensors of the call, and keeps the
    choice on disk (`postgen.kernels.attention.store.cache_file`). Two kinds of calls are not timed: small calls, and
    calls whose shape first occurs while a CUDA graph is recorded. The latter run on torch's choice; call the function
    once before the recording to avoid that. torch.compile does not trace into the operation, so tracing times nothing.
    For inputs that require a gradient the named backend runs, or else torch's `scaled_dot_product_attention` (plain
    torch with `return_lse`).

    Args:
        query: (B, N, H, D), any strides.
        key: (B, M, Hk, D), where H is a multiple of Hk and query head h uses key head h * Hk // H.
        value: (B, M, Hk, D).
        scale: factor of the logits; None is D ** -0.5.
        key_lengths: (B,) integers from 1 to M: sample b attends to its first `key_lengths[b]` keys only. With lengths
            on the CPU, each sample is cut to its keys before the launch and no mask is needed. Large calls
            (`WORTH_READING`) read lengths on the device of the query for this, and so wait for the GPU. Smaller calls
            do not wait. Calls that are recorded in a CUDA graph do not wait either: the graph reads the lengths again
            at every replay.
        return_lse: also return the LSE.
        backend: one of `backend_names()`; None is the fastest one. If the named backend cannot run, the fastest one
            runs, with one warning that names the reason. `cudnn_fp8` computes in 8 bits
            (`postgen.kernels.attention_fp8.ops.attention_fp8`) and runs only if it is named.

    Returns:
        (B, N, H, D), in the dtype of the query or the autocast dtype. With `return_lse` also
        log(sum(exp(scale * query @ key^T))), (B, H, N), float32 (float64 for float64 inputs).

    Raises:
        ValueError: the shapes do not match, the backend is unknown, or a length on the CPU is out of range.
    """
    query, key, value = as_autocast(query, key, value)
    _check(query, key, value, key_lengths)
    if backend is not None and backend not in _BY_NAME:
        raise ValueError(f"unknown attention backend {backend!r}. Known: {', '.join(_BY_NAME)}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, lse = _differentiable(Call(query, key, value, scale, key_lengths, return_lse), backend)
    else:
        out, lse = _attention(query, key, value, scale, key_lengths, return_lse, backend)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def backend_names() -> tuple[str, ...]:
    """Return the names that `attention` accepts as `backend`."""
    return tuple(_BY_NAME)


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the autocast dtype, if autocast is on, as it does for torch's own attention."""
    device = tensors[0].device.type
    # torch has no autocast for meta tensors.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def check_lengths(key_lengths: Tensor, query: Tensor) -> None:
    """Check the shape, dtype and device of key lengths, but not their range, which would wait for the GPU.

    Raises:
        ValueError: the shape, dtype or device is wrong.
    """
    batch = query.shape[0]
    if key_lengths.shape != (batch,) or key_lengths.dtype not in (torch.int32, torch.int64):
        given = f"{tuple(key_lengths.shape)} {key_lengths.dtype}"
        raise ValueError(f"key_lengths must be ({batch},) int32 or int64, got {given}")
    if key_lengths.device not in (torch.device("cpu"), query.device):
        raise ValueError(f"key_lengths must be on the CPU or on {query.device}, not on {key_lengths.device}")


def check_range(lengths: list[int], keys: int) -> None:
    """Check that key lengths are between 1 and the number of keys.

    Raises:
        ValueError: a length is out of range.
    """
    if not all(1 <= length <= keys for length in lengths):
        raise ValueError(f"key_lengths must be from 1 to {keys}, the number of keys, got {lengths}")


@functools.cache
def router() -> Router:
    """Return the router that chooses the kernels of `attention`; there is one per process."""
    packages = {package for backend in TIMED for package in backend.packages}
    return Router(store=Store(cache_file(), tuple(sorted(packages))))


@library.custom_op("postgen::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_lengths: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    call = Call(query, key, value, scale, key_lengths, return_lse)
    lengths = _read_lengths(call, backend)
    if lengths is None:
        out, lse = _run(call, backend)
        return out.contiguous(), query.new_empty(0) if lse is None else lse.contiguous()
    check_range(lengths, key.shape[1])
    if len(set(lengths)) == 1:
        out, lse = _run(_first_keys(call, slice(None), lengths[0]), backend)
    else:
        rows = [_run(_first_keys(call, slice(row, row + 1), length), backend) for row, length in enumerate(lengths)]
        out = torch.cat([out for out, _ in rows])
        lse = torch.cat([lse for _, lse in rows if lse is not None]) if return_lse else None
    return out.contiguous(), query.new_empty(0) if lse is None else lse.contiguous()


@_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_lengths: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(batch, heads, tokens, dtype=dtype) if return_lse else query.new_empty(0)
    return query.new_empty(query.shape), lse


def _run(call: Call, name: str | None) -> Result:
    if call.key_lengths is not None:
        call = call._replace(key_lengths=call.key_lengths.to(torch.int32).contiguous())
    if name is None and (not call.query.is_cuda or call.work < WORTH_TIMING):
        return router().last_resort(call).compute(call)
    return router().run(call, name)


def _read_lengths(call: Call, name: str | None) -> list[int] | None:
    """Return the key lengths to which the samples are cut, or None if the kernel gets the lengths as they are."""
    if call.key_lengths is None:
        return None
    if call.key_lengths.is_cuda:
        small = call.work < WORTH_READING * call.query.shape[0]
        # A named backend that takes lengths may prepare much for each new number of keys.
        named = name is not None and _BY_NAME[name].takes_lengths
        if small or named or torch.cuda.is_current_stream_capturing():
            return None
    lengths: list[int] = call.key_lengths.tolist()
    return lengths


def _first_keys(call: Call, samples: slice, keys: int) -> Call:
    """Return a call on some samples and their first keys, without key lengths."""
    return call._replace(
        query=call.query[samples], key=call.key[samples, :keys], value=call.value[samples, :keys], key_lengths=None
    )


def _differentiable(call: Call, name: str | None) -> Result:
    """Run a call that needs gradients; torch.compile can trace it."""
    tracing = torch.compiler.is_compiling()
    if call.key_lengths is not None:
        if call.key_lengths.device.type == "cpu" and not tracing:
            check_range(call.key_lengths.tolist(), call.key.shape[1])
        call = call._replace(key_lengths=call.key_lengths.to(call.query.device, torch.int32))
    if name is not None and not _BY_NAME[name].differentiable:
        if not tracing:
            warn_once(f"attention is exact, not on {name}: {name} has no gradient")
        name = None
    if name is None:
        return (MATH if call.lse else SDPA).compute(call)
    # While torch.compile traces, there are no numbers with which the router could try a backend.
    return _BY_NAME[name].run(call) if tracing else router().run(call, name)


def _check(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if any(x.dim() != 4 for x in (query, key, value)):
        raise ValueError(f"query must be (B, N, H, D), key and value (B, M, Hk, D), got {shapes}")
    batch, _, heads, channels = query.shape
    if query.numel() == 0 or key.numel() == 0:
        raise ValueError(f"attention needs at least one query and one key, got {shapes}")
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != channels or heads % key.shape[2]:
        raise ValueError(
            f"query must be (B, N, H, D), key and value (B, M, Hk, D) with H a multiple of Hk, got {shapes}"
        )
    if len({x.dtype for x in (query, key, value)}) > 1 or len({x.device for x in (query, key, value)}) > 1:
        raise ValueError("query, key and value must have the same dtype and the same device")
    if query.dtype not in TOLERANCE:
        raise ValueError(f"query must be float16, bfloat16, float32 or float64, got {query.dtype}")
    if key_lengths is not None:
        check_lengths(key_lengths, query)
