"""Norm, rotation and layout of queries and keys in one kernel with one program per token.

A program loads its token once and stores it once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on

_TILE = 1024
"""How many numbers a program processes at a time: a few heads of one token."""


@triton.jit
def _pairs(pointer, step, head, inside, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Load heads as float32; return the first and the second channels of the pairs, each (heads, BLOCK_D / 2)."""
    if HALF:
        d = tl.arange(0, BLOCK_D // 2)[None, :]
        place = pointer + head[:, None] * step + d
        mask = inside[:, None] & (d < CHANNELS // 2)
        a = tl.load(place, mask=mask, other=0.0)
        b = tl.load(place + CHANNELS // 2, mask=mask, other=0.0)
    else:
        # The two channels of a pair lie in one thread, so the split moves no data between threads.
        d = tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(pointer + head[:, None] * step + d, mask=inside[:, None] & (d < CHANNELS), other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_D // 2, 2)))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _put(a, b, pointer, step, head, inside, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Store pairs in the order in which `_pairs` loads them; the caller has rounded them."""
    if HALF:
        d = tl.arange(0, BLOCK_D // 2)[None, :]
        place = pointer + head[:, None] * step + d
        mask = inside[:, None] & (d < CHANNELS // 2)
        tl.store(place, a, mask=mask)
        tl.store(place + CHANNELS // 2, b, mask=mask)
    else:
        d = tl.arange(0, BLOCK_D)[None, :]
        x = tl.reshape(tl.join(a, b), (a.shape[0], BLOCK_D))
        tl.store(pointer + head[:, None] * step + d, x, mask=inside[:, None] & (d < CHANNELS))


@triton.jit
def _row_mean_square(
    x, step, HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return the mean square of all heads of a token. The numbers stay in the L1 cache until they are read again."""
    d = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        value = tl.load(x + head * step + d, mask=(head < HEADS) & (d < CHANNELS), other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(tl.sum(total, axis=1), axis=0) / (HEADS * CHANNELS)


@triton.jit
def _normalised(a, b, eps, CHANNELS: tl.constexpr, CENTRED: tl.constexpr):
    """Normalise every head: LayerNorm if CENTRED, else RMSNorm."""
    if CENTRED:
        there = tl.arange(0, a.shape[1])[None, :] < CHANNELS // 2
        mean = (tl.sum(a + b, axis=1) / CHANNELS)[:, None]
        a = tl.where(there, a - mean, 0.0)
        b = tl.where(there, b - mean, 0.0)
    reciprocal = (1.0 / tl.sqrt(tl.sum(a * a + b * b, axis=1) / CHANNELS + eps))[:, None]
    return a * reciprocal, b * reciprocal


@triton.jit
def _quantised(a, b, scale, head, inside):
    """Store the scales and return the pairs as int8. The conversion truncates, so 0.5 is added to the magnitudes."""
    largest = tl.maximum(tl.max(tl.abs(a), axis=1), tl.max(tl.abs(b), axis=1)) / 127.0
    tl.store(scale + head, largest, mask=inside)
    steps = tl.where(largest > 0, largest, 1.0)[:, None]
    a /= steps
    b /= steps
    return (a + tl.where(a < 0, -0.5, 0.5)).to(tl.int8), (b + tl.where(b < 0, -0.5, 0.5)).to(tl.int8)


@triton.jit
def _norm_rope(
    x, x_h, weight, bias, shift, shift_h, out, out_h, scale, cos, sin, table_h, table_d, rotates, eps,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, HALF: tl.constexpr, TABLE_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Process all heads of one token; the pointers point to that token."""
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    # A number instead of `rotates & ...`: the interpreter of Triton 3.9 turns a broadcast boolean into integers.
    table = pair < tl.where(rotates, CHANNELS // 2, 0)
    if cos is not None and not TABLE_PER_HEAD:
        c = tl.load(cos + pair * table_d, mask=table, other=1.0).to(tl.float32)
        s = tl.load(sin + pair * table_d, mask=table, other=0.0).to(tl.float32)
    if NORM == "rms_norm_across_heads":
        of_row = 1.0 / tl.sqrt(_row_mean_square(x, x_h, HEADS, CHANNELS, BLOCK_H, BLOCK_D) + eps)
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        inside = head < HEADS
        a, b = _pairs(x, x_h, head, inside, CHANNELS, BLOCK_D, HALF)
        if NORM == "rms_norm_across_heads":
            a *= of_row
            b *= of_row
        elif NORM != "none":
            a, b = _normalised(a, b, eps, CHANNELS, NORM == "layer_norm")
        # All heads share the weight and bias (step 0), or each head has its own (norm across heads).
        own = CHANNELS if NORM == "rms_norm_across_heads" else 0
        if weight is not None:
            weight_a, weight_b = _pairs(weight, own, head, inside, CHANNELS, BLOCK_D, HALF)
            a *= weight_a
            b *= weight_b
        if bias is not None:
            bias_a, bias_b = _pairs(bias, own, head, inside, CHANNELS, BLOCK_D, HALF)
            a += bias_a
            b += bias_b
        if cos is not None:
            if TABLE_PER_HEAD:
                place = head[:, None] * table_h + pair * table_d
                c = tl.load(cos + place, mask=table & inside[:, None], other=1.0).to(tl.float32)
                s = tl.load(sin + place, mask=table & inside[:, None], other=0.0).to(tl.float32)
            turned_a = a * c - b * s
            b = a * s + b * c
            a = turned_a
        if shift is not None:
            shift_a, shift_b = _pairs(shift, shift_h, head, inside, CHANNELS, BLOCK_D, HALF)
            a -= shift_a
            b -= shift_b
        if scale is not None:
            rounded_a, rounded_b = _quantised(a, b, scale, head, inside)
        else:
            rounded_a, rounded_b = a.to(out.dtype.element_ty), b.to(out.dtype.element_ty)
        _put(rounded_a, rounded_b, out, out_h, head, inside, CHANNELS, BLOCK_D, HALF)


@triton.jit
def _qk_norm_rope(
    q, k, v, q_weight, k_weight, q_bias, k_bias, k_shift, cos, sin, q_out, k_out, v_out, q_scale, k_scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, shift_b, shift_h, table_b, table_n, table_h, table_d,
    qo_b, qo_n, qo_h, ko_b, ko_n, ko_h, first_token, rotated, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, TABLE_PER_HEAD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    row = sample * tl.num_programs(0) + token
    turn = token - first_token
    rotates = (turn >= 0) & (turn < rotated)
    if cos is not None:
        cos += sample * table_b + turn * table_n
        sin += sample * table_b + turn * table_n
    if q_scale is not None:
        q_scale += row * HEADS
        k_scale += row * KEY_HEADS
    if k_shift is not None:
        k_shift += sample * shift_b
    _norm_rope(
        q + sample * q_b + token * q_n, q_h, q_weight, q_bias, None, 0, q_out + sample * qo_b + token * qo_n, qo_h,
        q_scale, cos, sin, table_h, table_d, rotates, eps,
        HEADS, CHANNELS, BLOCK_H, BLOCK_D, NORM, HALF, TABLE_PER_HEAD,
    )  # fmt: skip
    _norm_rope(
        k + sample * k_b + token * k_n, k_h, k_weight, k_bias, k_shift, shift_h,
        k_out + sample * ko_b + token * ko_n, ko_h, k_scale, cos, sin, table_h, table_d, rotates, eps,
        KEY_HEADS, CHANNELS, BLOCK_H, BLOCK_D, NORM, HALF, TABLE_PER_HEAD,
    )  # fmt: skip
    if v is not None:
        # Values have the shape of the keys, and their results have the strides of the results of the keys.
        v += sample * v_b + token * v_n
        v_out += sample * ko_b + token * ko_n
        d = tl.arange(0, BLOCK_D)[None, :]
        for first in tl.static_range(0, KEY_HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)[:, None]
            mask = (head < KEY_HEADS) & (d < CHANNELS)
            tl.store(v_out + head * ko_h + d, tl.load(v + head * v_h + d, mask=mask, other=0.0), mask=mask)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    k_shift: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor | None],
    scales: tuple[Tensor, Tensor] | tuple[None, None],
    *,
    eps: float,
    norm: str,
    half: bool,
    first_token: int,
) -> None:
    """Compute `naive.norm_rope` of q and k into `out`, in int8 if `scales` are given, and copy v.

    `ops.py` has checked the shapes. The tensors, also those of `out`, are (B, N, H, D) with any strides; an input is
    copied only if its channels are not adjacent in memory. `affine` holds the weight of q, the weight of k, the bias
    of q and the bias of k.
    """
    batch, tokens, heads, channels = q.shape
    q, k = _neighbours(q), _neighbours(k)
    v = None if v is None else _neighbours(v)
    k_shift = None if k_shift is None else _neighbours(k_shift).expand(batch, -1, -1)
    affine_rows = [None if each is None else each.contiguous() for each in affine]
    table_strides: tuple[int, ...] = (0, 0, 0, 0)
    rotated, per_head = 0, False
    if cos is not None and sin is not None:
        per_head, rotated = cos.shape[2] > 1, cos.shape[1]
        cos, sin = (table.expand(batch, -1, -1, -1) for table in (cos, sin))
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        table_strides = cos.stride()
    q_out, k_out, v_out = out
    block_h, block_d, warps = blocks(heads, channels)
    with launching_on(q):
        _qk_norm_rope[(tokens, batch)](
            q, k, v, *affine_rows, k_shift, cos, sin, q_out, k_out, v_out, *scales,
            *q.stride()[:3], *k.stride()[:3], *((0, 0, 0) if v is None else v.stride()[:3]),
            *((0, 0) if k_shift is None else k_shift.stride()[:2]), *table_strides,
            *q_out.stride()[:3], *k_out.stride()[:3], first_token, rotated, eps,
            HEADS=heads, KEY_HEADS=k.shape[2], CHANNELS=channels, BLOCK_H=block_h, BLOCK_D=block_d, NORM=norm,
            HALF=half, TABLE_PER_HEAD=per_head, num_warps=warps,
        )  # fmt: skip


def blocks(heads: int, channels: int) -> tuple[int, int, int]:
    """Return the heads and channels of a tile (powers of 2) and the warps, with 16 bytes of bfloat16 per thread."""
    block_d: Any = max(16, triton.next_power_of_2(channels))
    sizes = [1 << power for power in range(11) if (1 << power) * block_d <= max(_TILE, block_d)]
    # An iteration of the loop costs about as much as one more head in every iteration.
    block_h = min(sizes, key=lambda size: -(-heads // size) * (size + 1))
    return block_h, block_d, max(1, min(8, block_h * block_d // 256))


def _neighbours(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
