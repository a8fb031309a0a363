"""Triton kernels for the statistics of channels and for the transformations with the cast to E4M3 and back.

Each tensor is read twice and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.attention_fp8.preparation import Change, Channels, row_length, signs
from postgen.kernels.dispatch import launching_on
from postgen.kernels.fp8 import E4M3

_TOKENS = 64
"""Tokens of a tile of the transformation kernel."""
_SUMMED = 16
"""Tokens of a tile of the statistics kernel."""
_TILES = 8
"""Tiles that one program of the transformation kernel processes in a row, so that it loads matrix and factors once."""
_WARPS = 4
"""Warps of a program of the transformation kernel. Of 24 combinations of `_WARPS`, `_TOKENS` and `_TILES` this one was
the fastest on an H200."""
_PROGRAMS = 1056
"""Programs of the statistics kernel: eight for each multiprocessor of an H100 or H200."""


@triton.jit
def _channel_sums(
    x, out, tokens, heads, splits, share, x_b, x_n, x_h, x_d,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute sum, sum of squares, minimum and maximum of each channel over a range of tokens of one head."""
    # Heads are the first grid axis, because they are neighbours in memory: concurrent programs read contiguous memory.
    row, split = tl.program_id(0), tl.program_id(1)
    sample, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    start = split * share
    end = tl.minimum(start + share, tokens)
    base = x + sample * x_b + head * x_h + d[None, :] * x_d
    # Accumulate for each position of the tile, and reduce across threads only once, at the end.
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    low = tl.full((BLOCK_N, BLOCK_D), float("inf"), tl.float32)
    high = tl.full((BLOCK_N, BLOCK_D), float("-inf"), tl.float32)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        there = (n < end) & (d[None, :] < CHANNELS)
        # 64-bit offsets: two samples of a long clip's projection have more than 2^31 numbers.
        tile = tl.load(base + n.to(tl.int64) * x_n, mask=there, other=0.0).to(tl.float32)
        total += tile
        square += tile * tile
        low = tl.minimum(low, tl.where(there, tile, float("inf")))
        high = tl.maximum(high, tl.where(there, tile, float("-inf")))
    inside = d < CHANNELS
    place = out + (row.to(tl.int64) * splits + split) * 4 * CHANNELS + d
    tl.store(place, tl.sum(total, axis=0), mask=inside)
    tl.store(place + CHANNELS, tl.sum(square, axis=0), mask=inside)
    tl.store(place + 2 * CHANNELS, tl.min(low, axis=0), mask=inside)
    tl.store(place + 3 * CHANNELS, tl.max(high, axis=0), mask=inside)


@triton.jit
def _change(
    x, minus, times, plus, matrix, out, tokens, heads, x_b, x_n, x_h, x_d, length,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Compute ((x - minus) * times + plus) @ matrix, limited to +-BOUND (0: no limit), for tiles of one head."""
    row = tl.program_id(0)
    sample, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < CHANNELS
    of_head = row.to(tl.int64) * CHANNELS + d
    factor = tl.load(times + of_head, mask=inside, other=0.0)[None, :]
    if minus is not None:
        less = tl.load(minus + of_head, mask=inside, other=0.0)[None, :]
    if plus is not None:
        more = tl.load(plus + of_head, mask=inside, other=0.0)[None, :]
    if matrix is not None:
        other = (d[:, None] < CHANNELS) & inside[None, :]
        turn = tl.load(matrix + d[:, None] * CHANNELS + d[None, :], mask=other, other=0.0)
    start = tl.program_id(1) * BLOCK_N * TILES
    base = x + sample * x_b + head * x_h + d[None, :] * x_d
    for first in range(start, tl.minimum(start + BLOCK_N * TILES, tokens), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)[:, None]
        there = (n < tokens) & inside[None, :]
        tile = tl.load(base + n.to(tl.int64) * x_n, mask=there, other=0.0).to(tl.float32)
        if minus is not None:
            tile -= less
        tile *= factor
        if plus is not None:
            tile += more
        if matrix is not None:
            tile = tl.dot(tile.to(turn.dtype), turn) / length
        if BOUND > 0:
            # NaN stays NaN.
            tile = tl.clamp(tile, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)
        result = out + ((sample * tokens + n.to(tl.int64)) * heads + head) * CHANNELS + d[None, :]
        tl.store(result, tile.to(out.dtype.element_ty), mask=there)


def channels_of(x: Tensor) -> Channels:
    """Compute `Channels.of` for a tensor (B, N, H, D) with any strides, in one pass over its memory."""
    batch, tokens, heads, channels = x.shape
    rows = batch * heads
    splits = max(1, min(-(-_PROGRAMS // rows), -(-tokens // _SUMMED)))
    share = -(-tokens // splits)
    # Each program gets whole tiles, so that only the last one has a partial tile.
    share = -(-share // _SUMMED) * _SUMMED
    splits = -(-tokens // share)
    sums = x.new_empty(batch, heads, splits, 4, channels, dtype=torch.float32)
    with launching_on(x):
        _channel_sums[rows, splits](
            x, sums, tokens, heads, splits, share, *x.stride(),
            CHANNELS=channels, BLOCK_N=_SUMMED, BLOCK_D=triton.next_power_of_2(channels),
        )  # fmt: skip
    added = sums[..., :2, :].sum(2) / tokens
    low, high = sums[..., 2, :].amin(2), sums[..., 3, :].amax(2)
    return Channels(*(each.unsqueeze(1) for each in (added[..., 0, :], added[..., 1, :], low, high)))


def changed(
    x: Tensor, change: Change, *, rotates: bool = False, plus: Tensor | None = None, dtype: torch.dtype = E4M3
) -> Tensor:
    """Apply a `Change` to a tensor and cast the result.

    Args:
        x: (B, N, H, D), any floating-point dtype and strides.
        change: the transformation; its tensors are (B, 1, H, D), float32.
        rotates: whether the channels are then multiplied with the orthogonal matrix of `preparation.rotation`.
        plus: (B, 1, H, D), float32, added after the change and before the rotation; None adds nothing.
        dtype: the dtype of the result; for E4M3 the values are limited to +-448.

    Returns:
        (B, N, H, D), contiguous.
    """
    batch, tokens, heads, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    matrix = _signs(channels, x.device) if rotates else None
    small = [None if each is None else each.expand(batch, 1, heads, channels).contiguous() for each in (*change, plus)]
    with launching_on(x):
        _change[batch * heads, triton.cdiv(tokens, _TOKENS * _TILES)](
            x, *small, matrix, out, tokens, heads, *x.stride(), row_length(channels),
            CHANNELS=channels, BLOCK_N=_TOKENS, BLOCK_D=max(16, triton.next_power_of_2(channels)),
            TILES=_TILES, BOUND=448 if dtype == E4M3 else 0, num_warps=_WARPS,
        )  # fmt: skip
    return out


_SIGNS: dict[tuple[int, torch.device], Tensor] = {}


def _signs(channels: int, device: torch.device) -> Tensor:
    # In a dtype of the tensor cores; Triton's interpreter cannot multiply bfloat16. The matrix is kept on the device,
    # because a copy from the CPU waits and cannot be recorded in a CUDA graph.
    if (channels, device) not in _SIGNS:
        term = torch.float16 if triton.knobs.runtime.interpret else torch.bfloat16
        _SIGNS[channels, device] = signs(channels).to(device, term)
    return _SIGNS[channels, device]
