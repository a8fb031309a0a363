"""Row-wise quantisation to int8 and INT8 linear layers as torch custom operations.

On a GPU, Triton kernels quantise the rows and multiply with exact int32 sums. The scales, the bias and the rounding
are part of the product's kernel, so the int32 sums never reach memory. Elsewhere plain torch computes the same
numbers, which is slow. Shapes as in `naive.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import uses_triton
from postgen.kernels.eight_bit import by_rows, check_product, check_rows, straight_through
from postgen.kernels.int8_rows import naive

MAX_CHANNELS = 32768
"""The longest row that one program of the quantising kernel can hold in registers."""
MOST_TERMS = 131072
"""The most products of two codes whose sum int32 can hold."""


@library.custom_op("postgen::int8_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x to int8; the operation has no gradient.

    Args:
        x: (..., K), any floating-point dtype.

    Returns:
        Codes (..., K) in int8, -127 ... 127, and scales (..., 1) in float32.

    Raises:
        ValueError: x is a scalar, its rows are empty, or its dtype is not floating-point.
    """
    check_rows(x)
    if x.numel() and uses_triton("int8_rows", x, obstacle=_obstacle(x.shape[-1], MAX_CHANNELS)):
        from postgen.kernels.int8_rows import triton

        return triton.quantize_rows(x)
    return naive.quantize_rows(x)


@library.custom_op("postgen::int8_rows_matmul", mutates_args=())
def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute the product of quantised rows and weights, plus the bias.

    Args:
        codes: the rows, (..., K), int8.
        scale: the scales of the rows, (..., 1), float32.
        weight: (N, K), int8.
        weight_scale: (N, 1), float32.
        bias: (N,), any dtype, or None.
        dtype: the dtype of the result; the sums are exact, and the result is rounded once.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    _check(codes, scale, weight, weight_scale, bias)
    obstacle = _obstacle(codes.shape[-1], MOST_TERMS)
    if codes.numel() and weight.numel() and uses_triton("int8_rows_matmul", scale, obstacle=obstacle):
        from postgen.kernels.int8_rows import triton

        return triton.rows_matmul(codes, scale, weight, weight_scale, bias, dtype)
    return naive.rows_matmul(codes, scale, weight, weight_scale, bias, dtype)


@library.custom_op("postgen::int8_rows_linear", mutates_args=())
def rows_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    original: Tensor | None,
) -> Tensor:
    """Compute `rows_matmul` with straight-through gradients, which ignore the rounding.

    Args:
        x: (..., K), the tensor that was quantised to `codes` and `scale`. The result has its dtype.
        codes: (..., K), int8.
        scale: the scales of the rows, (..., 1), float32.
        weight: (N, K), int8.
        weight_scale: (N, 1), float32.
        bias: (N,), or None; it can get a gradient.
        original: the weight (N, K) before its quantisation, which gets the gradient of the weights, or None.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    out: Tensor = rows_matmul(codes, scale, weight, weight_scale, bias, x.dtype)
    return out


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@rows_matmul.register_fake
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias)
    return torch.empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype, device=codes.device)


@rows_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    original: Tensor | None,
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias)
    return torch.empty((*codes.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


straight_through(rows_linear, naive.weight_of)


def _obstacle(channels: int, most: int) -> str | None:
    return f"rows have {channels} numbers, at most {most} fit" if channels > most else None


def _check(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    check_product("int8_rows_matmul", torch.int8, codes, scale, weight, weight_scale, bias, by_rows)
