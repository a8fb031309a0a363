"""The measurement of Enhance-A-Video as one GPU kernel that reads the queries and keys once, in token order.

A tile is one location and head: its T queries and T keys, rows of D numbers that lie S tokens apart in memory. A
program keeps the (T, T) map of a tile in registers, walks over tiles and sums their diagonals in a fixed order. A
second kernel adds the sums of the programs. There are no atomics, so equal inputs give equal bits on every device and
in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on

_PROGRAMS = 1056
"""The number of programs per sample: 8 for each of the 132 multiprocessors of an H100 or H200. The number is fixed, so
that the results do not depend on the device or the batch size."""
_LOG2_E = 1.4426950408889634


@triton.jit
def _diagonal_share(
    query, key, partial, query_b, query_t, query_s, query_h, query_d, key_b, key_t, key_s, key_h, key_d, tiles,
    logit_scale, inverse_count,
    HEADS: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
    CAUSAL_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    # Offsets need 64 bits: neighbouring frames of a large video lie 10^8 numbers apart.
    t = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    inside = (t < FRAMES) & (d < CHANNELS)
    query_rows = query + sample * query_b + t * query_t + d * query_d
    key_rows = key + sample * key_b + t * key_t + d * key_d

    i = tl.arange(0, BLOCK_T)[:, None]
    j = tl.arange(0, BLOCK_T)[None, :]
    seen = (i < FRAMES) & (j < FRAMES)
    if CAUSAL_BLOCK > 0:
        seen = seen & (j // CAUSAL_BLOCK <= i // CAUSAL_BLOCK)
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    tile = program
    for _ in range(0, tl.cdiv(tiles - program, programs)):
        place = (tile // HEADS).to(tl.int64)
        head = (tile % HEADS).to(tl.int64)
        q = tl.load(query_rows + place * query_s + head * query_h, mask=inside, other=0.0)
        k = tl.load(key_rows + place * key_s + head // GROUP * key_h, mask=inside, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale
        # Rows beyond T have no valid logits; a finite number, unlike -inf, keeps NaN out of their softmax.
        logits = tl.where(seen, logits, -1e30)
        weight = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
        own = tl.sum(tl.where(i == j, weight, 0.0), axis=1)
        total += own / tl.sum(weight, axis=1)
        tile += programs
    total = tl.where(tl.arange(0, BLOCK_T) < FRAMES, total, 0.0)
    tl.store(partial + sample * programs + program, tl.sum(total, axis=0) * inverse_count)


@triton.jit
def _add_up(partial, total, programs, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    shares = tl.load(partial + sample * programs + index, mask=index < programs, other=0.0)
    tl.store(total + sample, tl.sum(shares, axis=0))


def blocks(frames: int, channels: int) -> tuple[int, int]:
    """Return the rows and columns of a tile: powers of 2, and at least 16, the minimum of a matrix product."""
    return max(16, triton.next_power_of_2(frames)), max(16, triton.next_power_of_2(channels))


def launch_options(block_t: int, block_d: int, itemsize: int) -> dict[str, int]:
    """Return the warps of a program and its pipeline stages; the larger a tile, the fewer stages fit."""
    tile_bytes = block_t * block_d * itemsize
    return {
        "num_warps": 2 if block_t == 16 else 4 if block_t <= 64 else 8,
        "num_stages": 3 if tile_bytes <= 8192 else 2 if tile_bytes <= 16384 else 1,
    }


def temporal_self_share(query: Tensor, key: Tensor, *, scale: float | None = None, causal_block: int = 0) -> Tensor:
    """Return the mean diagonal of the temporal attention maps of each sample, (B,) float32.

    Arguments and shapes are those of `naive.py`, and `ops.py` has checked them. The inputs are bfloat16, float16 or
    float32, may have any strides and are not copied. A tile of T rows must fit `ops.MAX_TILE_BYTES`.
    """
    batch, frames, places, heads, channels = query.shape
    tiles = places * heads
    programs = min(tiles, _PROGRAMS)
    partial = torch.empty(batch, programs, dtype=torch.float32, device=query.device)
    total = torch.empty(batch, dtype=torch.float32, device=query.device)
    block_t, block_d = blocks(frames, channels)
    with launching_on(query):
        _diagonal_share[(programs, batch)](
            query,
            key,
            partial,
            *query.stride(),
            *key.stride(),
            tiles,
            # The kernel computes 2 ** x instead of e ** x.
            (channels**-0.5 if scale is None else scale) * _LOG2_E,
            1.0 / (tiles * frames),
            HEADS=heads,
            GROUP=heads // key.shape[3],
            FRAMES=frames,
            CHANNELS=channels,
            CAUSAL_BLOCK=causal_block,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            **launch_options(block_t, block_d, query.element_size()),
        )
        _add_up[(batch,)](partial, total, programs, BLOCK=triton.next_power_of_2(programs), num_warps=4)
    return total
