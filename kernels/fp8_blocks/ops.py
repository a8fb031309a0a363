"""Linear layers in E4M3 with scales of 128 numbers and of 128 x 128 blocks, as torch custom operations.

On Hopper a Triton kernel quantises, and cuBLAS multiplies through torch's scaled matrix product (CUDA 12.9 or later).
Elsewhere plain torch computes the same numbers, which is slow. Shapes as in `naive.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, library
from torch.nn import functional

from postgen.kernels.dispatch import uses_triton
from postgen.kernels.eight_bit import Shape, check_product, check_rows, straight_through
from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_blocks import naive
from postgen.kernels.fp8_blocks.naive import PART
from postgen.kernels.fp8_rows.ops import MULTIPLE, why_not_fp8

_ALIGNED = 4
"""cuBLAS reads columns of scales whose length is a multiple of this (16 bytes)."""


@functools.cache
def why_not_blocks(device: torch.device) -> str | None:
    """Return why a device has no product with scales of blocks, or None if it has one."""
    reason = why_not_fp8(device)
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"{torch.cuda.get_device_name(device)} has no product with scales of 128 x 128 blocks, only Hopper has"
    if tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2]) < (12, 9):
        return f"scales of 128 x 128 blocks need CUDA 12.9 or later, this torch has {torch.version.cuda}"
    return None


@library.custom_op("postgen::fp8_parts", mutates_args=())
def quantize_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise parts of 128 numbers of x to E4M3; the operation has no gradient.

    Args:
        x: (..., K), any floating-point dtype; K is a multiple of 128.

    Returns:
        Codes (..., K) in E4M3 and scales (K / 128, M) in float32, where M is the number of tokens.

    Raises:
        ValueError: x is a scalar, its rows are empty or not a multiple of 128 long, or its dtype is not
            floating-point.
    """
    _check_parts(x)
    if x.numel() and why_not_fp8(x.device) is None and uses_triton("fp8_parts", x):
        from postgen.kernels.fp8_blocks import triton

        return triton.quantize_parts(x)
    return naive.quantize_parts(x)


@library.custom_op("postgen::fp8_blocks_matmul", mutates_args=())
def blocks_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute the product of quantised tokens and weights, plus the bias.

    Args:
        codes: the tokens, (..., K), E4M3.
        scale: the scales of their parts, (K / 128, M), float32.
        weight: (N, K), E4M3.
        weight_scale: the scales of its blocks, (ceil(N / 128), K / 128), float32.
        bias: (N,), any dtype, or None.
        dtype: the dtype of the result. On Hopper the sums are rounded to bfloat16 before they are cast to it.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    _check(codes, scale, weight, weight_scale, bias)
    if codes.numel() and why_not_blocks(codes.device) is None and weight.shape[0] % MULTIPLE == 0:
        return _scaled(codes, scale, weight, weight_scale, bias, dtype)
    return naive.blocks_matmul(codes, scale, weight, weight_scale, bias, dtype)


@library.custom_op("postgen::fp8_blocks_linear", mutates_args=())
def blocks_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    original: Tensor | None,
) -> Tensor:
    """Compute `blocks_matmul` with straight-through gradients, which ignore the rounding.

    Args:
        x: (..., K), the tensor that was quantised to `codes` and `scale`. The result has its dtype.
        codes: (..., K), E4M3.
        scale: (K / 128, M), float32.
        weight: (N, K), E4M3.
        weight_scale: (ceil(N / 128), K / 128), float32.
        bias: (N,), or None; it can get a gradient.
        original: the weight (N, K) before its quantisation, which gets the gradient of the weights, or None.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    out: Tensor = blocks_matmul(codes, scale, weight, weight_scale, bias, x.dtype)
    return out


@quantize_parts.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_parts(x)
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    shape = x.shape[-1] // PART, x.numel() // x.shape[-1]
    return codes, torch.empty(shape, dtype=torch.float32, device=x.device)


@blocks_matmul.register_fake
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    _check(codes, scale, weight, weight_scale, bias)
    return torch.empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype, device=codes.device)


@blocks_linear.register_fake
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


straight_through(blocks_linear, naive.weight_of)


def _scaled(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, tokens = codes.reshape(-1, codes.shape[-1]), scale.shape[1]
    if tokens % _ALIGNED:
        more = -tokens % _ALIGNED
        rows = functional.pad(rows.view(torch.uint8), (0, 0, 0, more)).view(E4M3)
        scale = functional.pad(scale, (0, more), value=1.0)
    # Rows of fewer blocks than a multiple of four would be read at the wrong places, without an error.
    blocks = functional.pad(weight_scale, (0, -weight_scale.shape[1] % _ALIGNED), value=1.0)
    out = functional.scaled_mm(
        rows, weight.t(), scale.t(), functional.ScalingType.BlockWise1x128,
        blocks.t(), functional.ScalingType.BlockWise128x128, output_dtype=torch.bfloat16,
    )[:tokens]  # fmt: skip
    if bias is not None:
        out = out.add_(bias) if dtype == out.dtype == bias.dtype else out.float() + bias.float()
    return out.to(dtype).view(*codes.shape[:-1], weight.shape[0])


def _check_parts(x: Tensor) -> None:
    check_rows(x)
    if x.shape[-1] % PART:
        raise ValueError(f"the rows of x must be a multiple of {PART} long, got {tuple(x.shape)}")


def _check(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    check_product("fp8_blocks_matmul", E4M3, codes, scale, weight, weight_scale, bias, _by_blocks)


def _by_blocks(codes: Shape, weight: Shape) -> tuple[Shape, Shape]:
    parts, tokens = -(-codes[-1] // PART), 1
    for size in codes[:-1]:
        tokens *= size
    return (parts, tokens), (-(-weight[0] // PART), parts)
