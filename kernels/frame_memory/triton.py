"""Triton kernels of the frame-wise memory. Each kernel loads its tokens once and activates them in registers.

Matrix products split each float32 number into the sum of two 16-bit numbers. The eight bits of a single bfloat16
number are not precise enough for the solve that follows the sums, nor for the small differences between the reads of
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.dispatch import launching_on

SPLITS = 4
"""Programs that share the reads of a frame. It is fixed, so that results do not depend on the device."""
_NUMBERS = 2048
"""Numbers of each tensor that one program of `gated_sum` processes."""


class Launch(NamedTuple):
    """The launch parameters of a kernel."""

    tokens: int
    """Tokens per tile (rows of the memory for scans); a power of 2, at least 16."""
    warps: int
    """Warps per program."""
    stages: int
    """Pipeline stages: tiles that are in flight at the same time."""


LAUNCHES = {"sums": Launch(64, 8, 2), "reads": Launch(32, 8, 2), "scans": Launch(32, 8, 2)}
"""Launch parameters by kernel. Benchmarks may replace them."""


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _unit(x):
    """Return silu(x) scaled to unit length along the channels, with the lower bound of torch's `normalize`."""
    x = _silu(x.to(tl.float32))
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)[:, None]


@triton.jit
def _sum_frames(
    key, value, strength, grams, contents,
    key_b, key_n, key_h, value_b, value_n, value_h, strength_b, strength_n, strength_h, places,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """Write B of one frame and head, and A unless `grams` is None."""
    head, frame, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = frame * places
    key += sample * key_b + first * key_n + head * key_h
    value += sample * value_b + first * value_n + head * value_h
    strength += sample * strength_b + first * strength_n + head * strength_h
    d = tl.arange(0, BLOCK_D)
    gram = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    content = tl.zeros((BLOCK_D, BLOCK_D), dtype=tl.float32)
    for start in range(0, places, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = (row < places)[:, None] & (d < CHANNELS)[None, :]
        k = tl.load(key + row[:, None] * key_n + d[None, :], mask=inside, other=0.0)
        v = tl.load(value + row[:, None] * value_n + d[None, :], mask=inside, other=0.0)
        b = tl.load(strength + row * strength_n, mask=row < places, other=0.0).to(tl.float32)
        # sqrt(b) goes into both factors, so that the same 16-bit terms of the keys serve both sums.
        root = tl.sqrt(1.0 / (1.0 + tl.exp(-b)))[:, None]
        u = _unit(k) * root
        p = _silu(v.to(tl.float32)) * root
        u_high = u.to(TERM)
        u_low = (u - u_high.to(tl.float32)).to(TERM)
        p_high = p.to(TERM)
        p_low = (p - p_high.to(tl.float32)).to(TERM)
        if grams is not None:
            # This sums half of A; below, the transpose adds the other half. A is then exactly symmetric for the solve.
            turned = tl.trans(u_high)
            gram = tl.dot(turned, (u_high.to(tl.float32) * 0.5).to(TERM), gram)
            gram = tl.dot(turned, u_low, gram)
        turned = tl.trans(p_high)
        content = tl.dot(turned, u_high, content)
        content = tl.dot(turned, u_low, content)
        content = tl.dot(tl.trans(p_low), u_high, content)
    which = (sample * tl.num_programs(1) + frame) * HEADS + head
    place = which * CHANNELS * CHANNELS + d[:, None] * CHANNELS + d[None, :]
    inside = (d < CHANNELS)[:, None] & (d < CHANNELS)[None, :]
    if grams is not None:
        tl.store(grams + place, gram + tl.trans(gram), mask=inside)
    tl.store(contents + place, content, mask=inside)


@triton.jit
def _read_frames(
    query, memory, weight, gate, out,
    query_b, query_n, query_h, gate_b, gate_n, gate_h, places, tiles, eps,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TERM: tl.constexpr,
):  # fmt: skip
    """Write the reads of some tokens of one frame in one head."""
    head, sample = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    frame, split = (tl.program_id(1) // SPLITS).to(tl.int64), tl.program_id(1) % SPLITS
    frames = tl.num_programs(1) // SPLITS
    query += sample * query_b + frame * places * query_n + head * query_h
    gate += sample * gate_b + frame * places * gate_n + head * gate_h
    out += ((sample * frames + frame) * places * HEADS + head) * CHANNELS
    d = tl.arange(0, BLOCK_D)
    known = d < CHANNELS
    place = ((sample * frames + frame) * HEADS + head) * CHANNELS * CHANNELS + d[:, None] * CHANNELS + d[None, :]
    m = tl.load(memory + place, mask=known[:, None] & known[None, :], other=0.0)
    high = m.to(TERM)
    low = (m - high.to(tl.float32)).to(TERM)
    gain = tl.load(weight + d, mask=known, other=0.0).to(tl.float32)[None, :]
    for tile in range(0, tiles):
        row = (split * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = (row < places)[:, None] & known[None, :]
        q = tl.load(query + row[:, None] * query_n + d[None, :], mask=inside, other=0.0)
        g = tl.load(gate + row[:, None] * gate_n + d[None, :], mask=inside, other=0.0).to(tl.float32)
        u = _unit(q).to(TERM)
        y = tl.dot(u, tl.trans(high))
        y = tl.dot(u, tl.trans(low), y)
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / CHANNELS + eps)[:, None] * gain / (1.0 + tl.exp(-g))
        tl.store(out + row[:, None] * (HEADS * CHANNELS) + d[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scan_frames(
    inverse, content, log_decay, states, frames,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TERM: tl.constexpr,
):  # fmt: skip
    """Write some rows of the memory before each frame and after the last one; scans with odd numbers run backward."""
    head, scan = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    sample, back = scan // 2, scan % 2
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    known = d < CHANNELS
    inside = (r < CHANNELS)[:, None] & known[None, :]
    place = r[:, None] * CHANNELS + d[None, :]
    SIZE: tl.constexpr = CHANNELS * CHANNELS
    states += (scan * (frames + 1) * HEADS + head) * SIZE
    state = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for step in range(0, frames):
        tl.store(states + (step + back * (frames - 2 * step)) * HEADS * SIZE + place, state, mask=inside)
        which = (sample * frames + step + back * (frames - 1 - 2 * step)) * HEADS + head
        fade = tl.exp(tl.load(log_decay + which * CHANNELS + d, mask=known, other=0.0))
        state = state * fade[None, :] + tl.load(content + which * SIZE + place, mask=inside, other=0.0)
        if inverse is not None:
            square = inverse + which * SIZE + d[:, None] * CHANNELS + d[None, :]
            m = tl.load(square, mask=known[:, None] & known[None, :], other=0.0)
            m_high = m.to(TERM)
            m_low = (m - m_high.to(tl.float32)).to(TERM)
            high = state.to(TERM)
            low = (state - high.to(tl.float32)).to(TERM)
            state = tl.dot(high, m_high)
            state = tl.dot(high, m_low, state)
            state = tl.dot(low, m_high, state)
    tl.store(states + (1 - back) * frames * HEADS * SIZE + place, state, mask=inside)


@triton.jit
def _gather_frames(
    states, log_decay, out, frames, chunk, radius,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write some rows of the memory that one frame reads."""
    PARTS: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    head, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    heads = tl.num_programs(0) // PARTS
    frame, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    # 64-bit integers, because the states of many frames can hold more than 2^31 numbers.
    low = tl.maximum(0, (frame // chunk - radius) * chunk).to(tl.int64)
    high = tl.minimum(frames, (frame // chunk + radius + 1) * chunk).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    known = d < CHANNELS
    decays = log_decay + (sample * frames * heads + head) * CHANNELS + d
    before = tl.zeros((BLOCK_D,), dtype=tl.float32)
    after = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for other in range(low, frame + 1):
        before += tl.load(decays + other * heads * CHANNELS, mask=known, other=0.0)
    for other in range(frame, high):
        after += tl.load(decays + other * heads * CHANNELS, mask=known, other=0.0)
    r = part * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (r < CHANNELS)[:, None] & known[None, :]
    place = r[:, None] * CHANNELS + d[None, :]
    SIZE: tl.constexpr = CHANNELS * CHANNELS
    scans = states + (sample * 2 * (frames + 1) * heads + head) * SIZE + place
    found = tl.load(scans + low * heads * SIZE, mask=inside, other=0.0) * tl.exp(before)[None, :]
    found += tl.load(scans + (frames + 1 + high) * heads * SIZE, mask=inside, other=0.0) * tl.exp(after)[None, :]
    tl.store(out + ((sample * frames + frame) * heads + head) * SIZE + place, found, mask=inside)


@triton.jit
def _gated_sum(
    near, far, gate, out, near_b, near_n, near_h, far_b, far_n, far_h, gate_b, gate_n, gate_h, rows, tokens,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write some rows of 2 sigmoid(gate) near + far. A row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    head, token, sample = row % HEADS, row // HEADS % tokens, row // HEADS // tokens
    there = row < rows
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = there[:, None] & (d < CHANNELS)
    g = tl.load(gate + sample * gate_b + token * gate_n + head * gate_h, mask=there, other=0.0).to(tl.float32)
    place = sample * near_b + token * near_n + head * near_h
    x = tl.load(near + place[:, None] + d, mask=inside, other=0.0).to(tl.float32)
    place = sample * far_b + token * far_n + head * far_h
    y = tl.load(far + place[:, None] + d, mask=inside, other=0.0).to(tl.float32)
    z = x * (2.0 / (1.0 + tl.exp(-g)))[:, None] + y
    tl.store(out + row[:, None] * CHANNELS + d, z.to(out.dtype.element_ty), mask=inside)


def frame_sums(key: Tensor, value: Tensor, strength: Tensor, frames: int, gram: bool) -> tuple[Tensor | None, Tensor]:
    """Compute `naive.frame_sums`; `ops.py` has checked the shapes. Tokens may have any strides and are not copied."""
    batch, tokens, heads, channels = key.shape
    contents = torch.empty(batch, frames, heads, channels, channels, dtype=torch.float32, device=key.device)
    grams = torch.empty_like(contents) if gram else None
    with launching_on(key):
        _sum_frames[(heads, frames, batch)](
            key, value, strength, grams, contents, *key.stride()[:3], *value.stride()[:3], *strength.stride(),
            tokens // frames, HEADS=heads, **constants("sums", channels),
        )  # fmt: skip
    return grams, contents


def frame_reads(query: Tensor, memory: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Compute `naive.frame_reads`. Queries and gates may have any strides."""
    batch, tokens, heads, channels = query.shape
    frames = memory.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shared = constants("reads", channels)
    tiles = triton.cdiv(tokens // frames, shared["BLOCK_N"] * SPLITS)
    with launching_on(query):
        _read_frames[(heads, frames * SPLITS, batch)](
            query, memory, weight, gate, out, *query.stride()[:3], *gate.stride()[:3], tokens // frames, tiles, eps,
            HEADS=heads, SPLITS=SPLITS, **shared,
        )  # fmt: skip
    return out


def frame_memories(inverse: Tensor | None, content: Tensor, log_decay: Tensor, chunk: int, radius: int) -> Tensor:
    """Compute `naive.frame_memories` for contiguous float32 tensors."""
    batch, frames, heads, channels = log_decay.shape
    states = content.new_empty(batch, 2, frames + 1, heads, channels, channels)
    out = torch.empty_like(content)
    shared = constants("scans", channels)
    parts = triton.cdiv(channels, shared["BLOCK_N"])
    with launching_on(content):
        _scan_frames[(parts, heads, 2 * batch)](inverse, content, log_decay, states, frames, HEADS=heads, **shared)
        del shared["TERM"]
        _gather_frames[(heads * parts, frames, batch)](states, log_decay, out, frames, chunk, radius, **shared)
    return out


def gated_sum(near: Tensor, far: Tensor, gate: Tensor) -> Tensor:
    """Compute `naive.gated_sum`. Tensors may have any strides."""
    batch, tokens, heads, channels = near.shape
    out = torch.empty(near.shape, dtype=near.dtype, device=near.device)
    block_d = int(triton.next_power_of_2(channels))
    block_n = max(1, _NUMBERS // block_d)
    rows = batch * tokens * heads
    with launching_on(near):
        _gated_sum[(triton.cdiv(rows, block_n),)](
            near, far, gate, out, *near.stride()[:3], *far.stride()[:3], *gate.stride(), rows, tokens,
            HEADS=heads, CHANNELS=channels, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def constants(name: str, channels: int) -> dict[str, Any]:
    """Return the compile-time constants and launch parameters of a kernel."""
    # Triton's interpreter has no products of bfloat16.
    term = tl.float16 if triton.knobs.runtime.interpret else tl.bfloat16
    block_d = max(16, int(triton.next_power_of_2(channels)))
    how = LAUNCHES[name]
    return {
        "CHANNELS": channels,
        "BLOCK_N": how.tokens,
        "BLOCK_D": block_d,
        "TERM": term,
        "num_warps": how.warps,
        "num_stages": how.stages,
    }
