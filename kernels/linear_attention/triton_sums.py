"""Host side of the sums over tokens: buffers for the sums of each program, their total, and helpers of all passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms
from postgen.kernels.linear_attention.triton_forward import join_splits, token_rstd
from postgen.kernels.linear_attention.triton_launch import block_d

_JOINED = 2048
"""Numbers that one program of `join_splits` holds."""


class Sums(NamedTuple):
    """Sums over tokens: of outer products (matrix) and of vectors."""

    matrix: Tensor
    """Sum of outer products, (B, H, D, D)."""
    vector: Tensor
    """Sum of vectors, (B, H, D)."""
    terms: Tensor | None = None
    """The matrix in the form for products with queries, see `join_splits`."""


def head_stride(weight: Tensor | None, channels: int) -> int:
    """Return the stride between the weights of two heads; 0 if all heads share the weights."""
    return 0 if weight is None or weight.shape[-1] == channels else channels


def rstd(x: Tensor, terms: Terms) -> Tensor | None:
    """Return 1 / RMS of every token over all heads, (B, N), for `rms_norm_across_heads`; None for other norms."""
    if terms.qk_norm != "rms_norm_across_heads":
        return None
    batch, tokens, heads, channels = x.shape
    found = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    token_rstd[(tokens, batch)](
        x,
        found,
        *x.stride(),
        terms.norm_eps,
        HEADS=heads,
        CHANNELS=channels,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_D=block_d(channels),
        num_warps=4,
    )
    return found


def join(parts: Sums, *given: Tensor | None, dot: tl.dtype | None = None) -> Sums:
    """Add up the sums of the splits, (B, H, splits, ...), in float32.

    Args:
        parts: sums of the splits.
        given: initial matrix and vector, each None for 0.
        dot: operand dtype of products; if given, the result also has `terms`.
    """
    batch, heads, splits, channels = parts.vector.shape
    width = block_d(channels)
    terms = None
    if dot is not None:
        dtype, count = (torch.bfloat16, 2) if dot == tl.bfloat16 else (torch.float32, 1)
        terms = parts.matrix.new_empty(batch, heads, count, width, width, dtype=dtype)
    joined = Sums(
        parts.matrix.new_empty(batch, heads, channels, channels), parts.vector.new_empty(batch, heads, channels), terms
    )
    block_s = triton.next_power_of_2(splits)
    block_r = max(1, _JOINED // (block_s * width))
    # `terms` is padded to `width` rows of zeros, so with `terms` the programs cover these rows too.
    join_splits[(triton.cdiv(channels if terms is None else width, block_r), batch * heads)](
        parts.matrix,
        parts.vector,
        *(contiguous(each) for each in given or (None, None)),
        *joined,
        splits,
        CHANNELS=channels,
        BLOCK_S=block_s,
        BLOCK_R=block_r,
        BLOCK_D=width,
        DOT=tl.float32 if dot is None else dot,
        num_warps=4,
    )
    return joined


def partial_sums(x: Tensor, parts: int) -> Sums:
    """Return empty tensors for the sums of every split."""
    batch, _, heads, channels = x.shape
    matrices = torch.empty(batch, heads, parts, channels, channels, dtype=torch.float32, device=x.device)
    return Sums(matrices, matrices.new_empty(batch, heads, parts, channels))


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return a (small) tensor as contiguous, or None for None."""
    return None if x is None else x.contiguous()
