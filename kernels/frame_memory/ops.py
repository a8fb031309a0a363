"""Sums, scans and reads of a frame-wise linear memory as torch custom operations: kernels on a GPU, no gradient.

Shapes as in `naive.py`. In plain torch autocast is off: it would do the products in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, for_triton, uses_triton
from postgen.kernels.frame_memory import naive

MAX_CHANNELS = 128
"""The widest head whose two sums live in the registers of a program."""


def frame_sums(
    key: Tensor, value: Tensor, strength: Tensor, frames: int, *, gram: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Return A = sum b k~ k~^T and B = sum b v~ k~^T of every frame, (B, F, H, D, D) in float32 (float64 for float64).

    Args:
        key: (B, F S, H, D), any strides; k~ is its silu, of length 1.
        value: as `key`, any dtype; v~ is its silu, the first channels of B.
        strength: (B, F S, H), any dtype; b is its sigmoid.
        frames: F.
        gram: whether A is wanted; None otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
        RuntimeError: a gradient is asked for.
    """
    grams, contents = _frame_sums(key, value, strength, frames, gram)
    return (grams if gram else None), contents


@library.custom_op("postgen::frame_sums", mutates_args=())
def _frame_sums(key: Tensor, value: Tensor, strength: Tensor, frames: int, gram: bool) -> tuple[Tensor, Tensor]:
    _check_sums(key, value, strength, frames)
    if uses_triton("frame_sums", key, value, strength, obstacle=_obstacle(key)):
        from postgen.kernels.frame_memory import triton

        grams, contents = triton.frame_sums(_neighbours(key), _neighbours(value), strength, frames, gram)
    else:
        with torch.autocast(key.device.type, enabled=False):
            grams, contents = naive.frame_sums(key, value, strength, frames)
    return (grams if gram and grams is not None else contents.new_empty(0)), contents


@_frame_sums.register_fake
def _(key: Tensor, value: Tensor, strength: Tensor, frames: int, gram: bool) -> tuple[Tensor, Tensor]:
    _check_sums(key, value, strength, frames)
    batch, _, heads, channels = key.shape
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    contents = key.new_empty(batch, frames, heads, channels, channels, dtype=dtype)
    return (contents.new_empty(contents.shape) if gram else contents.new_empty(0)), contents


@library.custom_op("postgen::frame_memories", mutates_args=())
def frame_memories(inverse: Tensor | None, content: Tensor, log_decay: Tensor, chunk: int, radius: int) -> Tensor:
    """Return the memory that each frame reads: of the frames before its window and after it, faded over the window.

    Args:
        inverse: (I + A)^-1 of every frame, (B, F, H, D, D), float32 or float64 as all; None: there is no A.
        content: B of every frame, (B, F, H, D, D).
        log_decay: logarithms of what is kept over a frame, (B, F, H, D).
        chunk: frames that share a window, from 1 on.
        radius: chunks before and after the own one that are in it, from 0 on.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
        RuntimeError: a gradient is asked for.
    """
    _check_memories(inverse, content, log_decay, chunk, radius)
    if uses_triton("frame_memories", content, obstacle=_obstacle(content)):
        from postgen.kernels.frame_memory import triton

        given = None if inverse is None else inverse.contiguous()
        return triton.frame_memories(given, content.contiguous(), log_decay.contiguous(), chunk, radius)
    with torch.autocast(content.device.type, enabled=False):
        return naive.frame_memories(inverse, content, log_decay, chunk, radius)


@frame_memories.register_fake
def _(inverse: Tensor | None, content: Tensor, log_decay: Tensor, chunk: int, radius: int) -> Tensor:
    _check_memories(inverse, content, log_decay, chunk, radius)
    return content.new_empty(content.shape)


@library.custom_op("postgen::frame_reads", mutates_args=())
def frame_reads(query: Tensor, memory: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return sigmoid(gate) weight RMSNorm(M q~) of every token, (B, F S, H, D) in the dtype of the queries.

    Args:
        query: (B, F S, H, D), any strides; q~ is its silu, of length 1.
        memory: M, (B, F, H, D, D), of the values' channels first.
        weight: (D,), of the norm over the channels of a head.
        gate: (B, F S, H, D), any strides and dtype.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
        RuntimeError: a gradient is asked for.
    """
    _check_reads(query, memory, weight, gate)
    if uses_triton("frame_reads", query, memory, weight, gate, obstacle=_obstacle(query)):
        from postgen.kernels.frame_memory import triton

        return triton.frame_reads(_neighbours(query), memory.contiguous(), weight.contiguous(), _neighbours(gate), eps)
    with torch.autocast(query.device.type, enabled=False):
        return naive.frame_reads(query, memory, weight, gate, eps).contiguous()


@frame_reads.register_fake
def _(query: Tensor, memory: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    _check_reads(query, memory, weight, gate)
    return query.new_empty(query.shape)


@library.custom_op("postgen::gated_sum", mutates_args=())
def gated_sum(near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
    """Return 2 sigmoid(gate) near + far in the dtype of `near`, contiguous.

    Args:
        near: (B, N, H, D), any strides.
        far: as `near`, any dtype.
        gate: (B, N, H), any strides and dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
        RuntimeError: a gradient is asked for.
    """
    _check_sum(near, far, gate)
    if uses_triton("gated_sum", near, far, gate, obstacle=_obstacle(near)):
        from postgen.kernels.frame_memory import triton

        return triton.gated_sum(_neighbours(near), _neighbours(far), gate)
    return naive.gated_sum(near, far, gate).contiguous()


@gated_sum.register_fake
def _(near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
    _check_sum(near, far, gate)
    return near.new_empty(near.shape)


def takes(*tensors: Tensor) -> bool:
    """Say whether the kernels take such tokens (B, N, H, D), and no gradient is asked for; there is no warning."""
    return not torch.is_grad_enabled() and for_triton(*tensors) and _obstacle(tensors[0]) is None


def _obstacle(x: Tensor) -> str | None:
    channels = x.shape[-1]
    return f"heads of {channels} channels, at most {MAX_CHANNELS} fit" if channels > MAX_CHANNELS else None


def _neighbours(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_floating(**tensors: Tensor) -> None:
    if not all(x.is_floating_point() for x in tensors.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise ValueError(f"all must be floating-point, got {dtypes}")


def _check_sums(key: Tensor, value: Tensor, strength: Tensor, frames: int) -> None:
    check_devices("frame_sums", key, value, strength)
    if key.dim() != 4 or key.numel() == 0 or value.shape != key.shape or strength.shape != key.shape[:3]:
        shapes = ", ".join(f"{tuple(x.shape)}" for x in (key, value, strength))
        raise ValueError(f"key and value must be (B, N, H, D) and not empty, strength (B, N, H), got {shapes}")
    if frames < 1 or key.shape[1] % frames:
        raise ValueError(f"{key.shape[1]} tokens are not {frames} frames")
    _check_floating(key=key, value=value, strength=strength)


def _check_reads(query: Tensor, memory: Tensor, weight: Tensor, gate: Tensor) -> None:
    check_devices("frame_reads", query, memory, weight, gate)
    if query.dim() != 4 or query.numel() == 0 or gate.shape != query.shape:
        raise ValueError(
            f"query and gate must be (B, N, H, D) and not empty, got {tuple(query.shape)} and {tuple(gate.shape)}"
        )
    batch, tokens, heads, channels = query.shape
    there = tuple(memory.shape)
    fits = len(there) == 5 and there == (batch, there[1], heads, channels, channels)
    if not fits or there[1] == 0 or tokens % there[1]:
        raise ValueError(f"memory must be (B, F, H, D, D) of the frames of query {tuple(query.shape)}, got {there}")
    if tuple(weight.shape) != (channels,):
        raise ValueError(f"weight must be ({channels},), got {tuple(weight.shape)}")
    _check_floating(query=query, memory=memory, weight=weight, gate=gate)


def _check_sum(near: Tensor, far: Tensor, gate: Tensor) -> None:
    check_devices("gated_sum", near, far, gate)
    if near.dim() != 4 or near.numel() == 0 or far.shape != near.shape or gate.shape != near.shape[:3]:
        shapes = ", ".join(f"{tuple(x.shape)}" for x in (near, far, gate))
        raise ValueError(f"near and far must be (B, N, H, D) and not empty, gate (B, N, H), got {shapes}")
    _check_floating(near=near, far=far, gate=gate)


def _check_memories(inverse: Tensor | None, content: Tensor, log_decay: Tensor, chunk: int, radius: int) -> None:
    check_devices("frame_memories", content, inverse, log_decay)
    given = [content, log_decay, *([] if inverse is None else [inverse])]
    shapes = ", ".join(f"{tuple(x.shape)}" for x in given)
    square = content.dim() == 5 and content.shape[3] == content.shape[4] and content.numel() > 0
    fits = inverse is None or inverse.shape == content.shape
    if not (square and fits) or log_decay.shape != content.shape[:4]:
        raise ValueError(
            f"content and inverse must be (B, F, H, D, D) and not empty, log_decay (B, F, H, D), got {shapes}"
        )
    if {x.dtype for x in given} not in ({torch.float32}, {torch.float64}):
        raise ValueError(f"all must be float32, or float64, got {', '.join(str(x.dtype) for x in given)}")
    if chunk < 1 or radius < 0:
        raise ValueError(f"chunk counts from 1 on and radius from 0 on, got {chunk} and {radius}")
