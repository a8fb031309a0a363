"""Row-wise quantisation to E4M3 and FP8 linear layers as torch custom operations.

On a GPU with FP8 (compute capability 8.9 or later) a Triton kernel quantises, and torch's scaled matrix product
multiplies with float32 sums. Elsewhere plain torch computes with the same rounding, which is slow. Shapes as in
`naive.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, library
from torch.nn import functional

from postgen.kernels.dispatch import uses_triton
from postgen.kernels.eight_bit import by_rows, check_product, check_rows, straight_through
from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_rows import naive

MULTIPLE = 16
"""torch's scaled product needs numbers of input and output channels that are multiples of this."""
FAST_ACCUMULATION = False
"""Whether Hopper's tensor cores accumulate the whole sum, which has few bits. Where products do not cancel, as for a
token that resembles a row of the weights, the sum loses 7 % over 5,120 channels and 16 % over 13,824 (H200)."""
MAX_CHANNELS = 32768
"""The longest row that one program of the Triton kernel can hold in registers."""


@functools.cache
def why_not_fp8(device: torch.device) -> str | None:
    """Return why a device has no FP8 matrix product, or None if it has one."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 matrix product"
    if torch.version.hip is not None:
        return "AMD GPUs use another E4M3 format, which is not supported"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, and FP8 needs 8.9 or later"
    return None


@library.custom_op("postgen::fp8_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x to E4M3; the operation has no gradient.

    Args:
        x: (..., K), any floating-point dtype.

    Returns:
        Codes (..., K) in E4M3 and scales (..., 1) in float32.

    Raises:
        ValueError: x is a scalar, its rows are empty, or its dtype is not floating-point.
    """
    check_rows(x)
    if x.numel() and why_not_fp8(x.device) is None and uses_triton("fp8_rows", x, obstacle=_obstacle(x)):
        from postgen.kernels.fp8_rows import triton

        return triton.quantize_rows(x)
    return naive.quantize_rows(x)


@library.custom_op("postgen::fp8_rows_matmul", mutates_args=())
def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute the product of quantised rows and weights, plus the bias.

    Args:
        codes: the rows, (..., K), E4M3.
        scale: the scales of the rows, (..., 1), float32.
        weight: (N, K), E4M3.
        weight_scale: (N, 1), float32.
        bias: (N,), any dtype, or None.
        dtype: the dtype of the result. On a GPU with FP8 the sums are rounded to bfloat16 before they are cast to it.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    _check_matmul(codes, scale, weight, weight_scale, bias)
    if codes.numel() and why_not_fp8(codes.device) is None and not any(n % MULTIPLE for n in weight.shape):
        return _scaled(codes, scale, weight, weight_scale, bias, dtype)
    return naive.rows_matmul(codes, scale, weight, weight_scale, bias, dtype)


@library.custom_op("postgen::fp8_rows_linear", mutates_args=())
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

    The gradient of x uses the rounded weights, and the gradient of the weights uses the unrounded x.

    Args:
        x: (..., K), the tensor that was quantised to `codes` and `scale`. The result has its dtype.
        codes: (..., K), E4M3.
        scale: the scales of the rows, (..., 1), float32.
        weight: (N, K), E4M3.
        weight_scale: (N, 1), float32.
        bias: (N,), or None; it can get a gradient.
        original: the weight (N, K) before its quantisation, which gets the gradient of the weights. With None no
            gradient is computed for the weights, and x is not kept for the backward pass.

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
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


@rows_matmul.register_fake
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check_matmul(codes, scale, weight, weight_scale, bias)
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
    _check_matmul(codes, scale, weight, weight_scale, bias)
    return torch.empty((*codes.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


straight_through(rows_linear, naive.weight_of)


def _scaled(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    row = functional.ScalingType.RowWise
    inside = bias if dtype == torch.bfloat16 and bias is not None and bias.dtype == dtype else None
    rows = codes.reshape(-1, codes.shape[-1])
    out = functional.scaled_mm(
        rows, weight.t(), scale.reshape(-1, 1), row, weight_scale.reshape(1, -1), row,
        bias=inside, output_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION,
    )  # fmt: skip
    out = out.view(*codes.shape[:-1], weight.shape[0])
    if bias is not None and inside is None:
        out = out.float() + bias.float()
    return out.to(dtype)


def _obstacle(x: Tensor) -> str | None:
    return f"rows have {x.shape[-1]} numbers, at most {MAX_CHANNELS} fit" if x.shape[-1] > MAX_CHANNELS else None


def _check_matmul(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    check_product("fp8_rows_matmul", E4M3, codes, scale, weight, weight_scale, bias, by_rows)
