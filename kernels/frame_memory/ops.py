"""Custom operations of the frame-wise linear memory: Triton kernels on a GPU, plain torch elsewhere, no gradients.

See `naive.py` for formulas and shapes. The plain torch path switches autocast off, which would compute the products in
half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, for_triton, uses_triton
from postgen.kernels.frame_memory import naive

MAX_CHANNELS = 128
"""Largest number of channels per head for which a program can hold both sums in registers."""


def frame_sums(
    key: Tensor, value: Tensor, strength: Tensor, frames: int, *, gram: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Return A = sum b k~ k~^T and B = sum b v~ k~^T of every frame, (B, F, H, D, D) in float32 (float64 for float64).

    Args:
        key: (B, F S, H, D), any strides; k~ is silu(key), scaled to unit length.
        value: (B, F S, H, D), any strides and dtype; v~ is silu(value). In B the value channels come first.
        strength: (B, F S, H), any dtype; b is its sigmoid.
        frames: F.
        gram: whether to compute A; if False, the first result is None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: backward was called; the operation has no gradient.
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
    """Return the memory that each frame reads, (B, F, H, D, D): the frames outside its window, decayed over the
    window.

    All tensors are float32, or all are float64.

    Args:
        inverse: (I + A)^-1 of every frame, (B, F, H, D, D); None without A.
        content: B of every frame, (B, F, H, D, D).
        log_decay: logarithm of the decay of every frame, (B, F, H, D).
        chunk: frames per chunk, at least 1; the frames of a chunk share one window.
        radius: chunks before and after a chunk that belong to its window, at least 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: backward was called; the operation has no gradient.
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
    """Return sigmoid(gate) weight RMSNorm(M q~) of every token, (B, F S, H, D), in the dtype of the queries.

    Args:
        query: (B, F S, H, D), any strides; q~ is silu(query), scaled to unit length.
        memory: M, (B, F, H, D, D); the value channels come first.
        weight: weight of the RMSNorm over the channels of a head, (D,).
        gate: (B, F S, H, D), before the sigmoid, any strides and dtype.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: backward was called; the operation has no gradient.
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
        far: (B, N, H, D), any strides and dtype.
        gate: (B, N, H), before the sigmoid, any strides and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        RuntimeError: backward was called; the operation has no gradient.
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
    """Whether the kernels can compute these tensors, (B, N, H, D), and gradients are off. This check never warns."""
    return not torch.is_grad_enabled() and for_triton(*tensors) and _obstacle(tensors[0]) is None


def _obstacle(x: Tensor) -> str | None:
    channels = x.shape[-1]
    return f"heads have {channels} channels, at most {MAX_CHANNELS} are supported" if channels > MAX_CHANNELS else None


def _neighbours(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_floating(**tensors: Tensor) -> None:
    if not all(x.is_floating_point() for x in tensors.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise ValueError(f"all tensors must be floating-point, got {dtypes}")


def _check_sums(key: Tensor, value: Tensor, strength: Tensor, frames: int) -> None:
    check_devices("frame_sums", key, value, strength)
    if key.dim() != 4 or key.numel() == 0 or value.shape != key.shape or strength.shape != key.shape[:3]:
        shapes = ", ".join(f"{tuple(x.shape)}" for x in (key, value, strength))
        raise ValueError(f"key and value must be (B, N, H, D) and not empty, strength (B, N, H), got {shapes}")
    if frames < 1 or key.shape[1] % frames:
        raise ValueError(f"the number of tokens, {key.shape[1]}, must be a multiple of frames, {frames}")
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
        raise ValueError(
            f"memory must be (B, F, H, D, D), with F frames that divide the tokens of query {tuple(query.shape)}, got"
            f" {there}"
        )
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
        raise ValueError(f"all tensors must be float32, or all float64, got {', '.join(str(x.dtype) for x in given)}")
    if chunk < 1 or radius < 0:
        raise ValueError(f"chunk must be at least 1 and radius at least 0, got {chunk} and {radius}")
