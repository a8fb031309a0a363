"""Norm, gain, SiLU and padding in one pass over a tensor in `channels_last_3d`, and their gradients in another pass.

A program holds a few positions with all their channels. The programs sum the gradient of the gain in a fixed order,
without atomics, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.norm_silu.naive import EPSILON

_PROGRAMS = 1056
"""The number of programs of the backward pass: 8 for each of the 132 multiprocessors of an H100 or H200. The number is
fixed, so that the results are the same on every device."""
_NUMBERS = 8192
"""How many numbers a program holds at once."""


@triton.jit
def _forward(
    x, gamma, out, places, frames, height, width, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = place % (width + 2) - 1
    row = place // (width + 2) % (height + 2) - 1
    frame = place // ((width + 2) * (height + 2)) % (frames + 2) - 2
    sample = place // ((width + 2) * (height + 2) * (frames + 2))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (frame >= 0) & (place < places)
    c = tl.arange(0, BLOCK_C)[None, :]
    known = c < CHANNELS
    source = ((sample * frames + frame) * height + row) * width + column
    v = tl.load(x + source[:, None] * CHANNELS + c, mask=inside[:, None] & known, other=0.0).to(tl.float32)
    gain = tl.load(gamma + c, mask=known, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / CHANNELS + eps)
    u = v * scale[:, None] * gain
    y = u * tl.sigmoid(u)
    tl.store(out + place[:, None] * CHANNELS + c, y.to(out.dtype.element_ty), mask=(place < places)[:, None] & known)


@triton.jit
def _backward(
    gradient, x, gamma, of_x, partial, places, frames, height, width, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)[None, :]
    known = c < CHANNELS
    gain = tl.load(gamma + c, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    block = program
    for _ in range(0, tl.cdiv(tl.cdiv(places, BLOCK) - program, programs)):
        place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        column = place % width + 1
        row = place // width % height + 1
        frame = place // (width * height) % frames + 2
        sample = place // (width * height * frames)
        padded = ((sample * (frames + 2) + frame) * (height + 2) + row) * (width + 2) + column
        mask = (place < places)[:, None] & known
        v = tl.load(x + place[:, None] * CHANNELS + c, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gradient + padded[:, None] * CHANNELS + c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(v * v, axis=1) / CHANNELS + eps)[:, None]
        n = v * scale
        u = n * gain
        sigmoid = tl.sigmoid(u)
        of_u = g * sigmoid * (1 + u * (1 - sigmoid))
        of_n = of_u * gain
        d = scale * (of_n - n * (tl.sum(of_n * n, axis=1) / CHANNELS)[:, None])
        tl.store(of_x + place[:, None] * CHANNELS + c, d.to(of_x.dtype.element_ty), mask=mask)
        total += tl.sum(of_u * n, axis=0)
        block += programs
    tl.store(partial + program * CHANNELS + tl.arange(0, BLOCK_C), total, mask=tl.arange(0, BLOCK_C) < CHANNELS)


def norm_silu_pad(x: Tensor, gamma: Tensor) -> Tensor:
    """Compute `naive.norm_silu_pad`; `ops.py` has checked the shapes.

    The result is in `channels_last_3d`. An x in another memory format is copied first.
    """
    x, gamma = _channels_last(x), gamma.contiguous()
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames + 2, height + 2, width + 2)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    places = out.numel() // channels
    block_c, block = blocks(channels)
    with launching_on(x):
        _forward[(triton.cdiv(places, block),)](
            x, gamma, out, places, frames, height, width, EPSILON,
            CHANNELS=channels, BLOCK_C=block_c, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def norm_silu_pad_backward(gradient: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `naive.norm_silu_pad_backward`; memory formats as in `norm_silu_pad`."""
    gradient, x, gain = _channels_last(gradient), _channels_last(x), gamma.contiguous()
    _, channels, frames, height, width = x.shape
    of_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
    places = x.numel() // channels
    block_c, block = blocks(channels)
    programs = min(_PROGRAMS, triton.cdiv(places, block))
    partial = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    with launching_on(x):
        _backward[(programs,)](
            gradient, x, gain, of_x, partial, places, frames, height, width, EPSILON,
            CHANNELS=channels, BLOCK_C=block_c, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return of_x, partial.sum(0).to(gamma.dtype)


def blocks(channels: int) -> tuple[int, int]:
    """Return how many channels (rounded up to a power of 2) and positions a program holds."""
    size = max(16, triton.next_power_of_2(channels))
    return size, max(1, _NUMBERS // size)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
