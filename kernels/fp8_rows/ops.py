"""Rows in E4M3 and linear layers of them as torch custom operations.

Quantisation is a Triton kernel on a GPU with FP8 (compute capability 8.9 and more), the product is torch's own scaled
one there, with sums in float32. Elsewhere both are the same rounding in plain torch: exact, and slow.
Shapes as in `naive.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional

from postgen.kernels.dispatch import check_devices, uses_triton
from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_rows import naive

MULTIPLE = 16
"""The scaled product takes input and output channels that this divides."""
FAST_ACCUMULATION = False
"""Whether Hopper's tensor cores keep the whole sum, with few bits. Where products do not cancel, as in a token that is
like a row of the weights, 7 % of it is lost over 5,120 channels and 16 % over 13,824 (H200)."""
MAX_CHANNELS = 32768
"""The longest row that a program of the kernel holds in registers."""


@functools.cache
def why_not_fp8(device: torch.device) -> str | None:
    """Return why a device has no FP8 matrix product, or None where it has one."""
    if device.type != "cuda":
        return f"{device.type} has no FP8 matrix product"
    if torch.version.hip is not None:
        return "AMD's GPUs have another E4M3, which is not supported"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}, and FP8 begins at 8.9"
    return None


@library.custom_op("postgen::fp8_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of x in E4M3, and their scales (..., 1) in float32. It has no gradient.

    Args:
        x: (..., K), any floating-point dtype.

    Raises:
        ValueError: no rows of floating-point numbers.
    """
    _check_rows(x)
    if x.numel() and why_not_fp8(x.device) is None and uses_triton("fp8_rows", x, obstacle=_obstacle(x)):
        from postgen.kernels.fp8_rows import triton

        return triton.quantize_rows(x)
    return naive.quantize_rows(x)


@library.custom_op("postgen::fp8_rows_matmul", mutates_args=())
def rows_matmul(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return rows times weights, plus the bias.

    Args:
        codes: (..., K), E4M3.
        scale: (..., 1), float32.
        weight: (N, K), E4M3.
        weight_scale: (N, 1), float32.
        bias: (N,), any dtype.
        dtype: of the result. Sums of the scaled product are rounded to bfloat16 first.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
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
    """`rows_matmul` with gradients that pass the rounding by: of x by the rounded weights, of the weights by x itself.

    Args:
        x: (..., K), what `codes` and `scale` were made of; the result has its dtype.
        codes: as in `rows_matmul`, like the four that follow.
        scale: of the rows.
        weight: in E4M3.
        weight_scale: of its rows.
        bias: may have a gradient.
        original: what `weight` was made of, which gets its gradient; None has none, and x is not kept for it then.
    """
    out: Tensor = rows_matmul(codes, scale, weight, weight_scale, bias, x.dtype)
    return out


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_rows(x)
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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, _, weight, weight_scale, bias, original = inputs
    ctx.save_for_backward(weight, weight_scale, *(() if original is None else (x,)))
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.original_dtype = None if original is None else original.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale, *kept = ctx.saved_tensors
    of_x = of_bias = of_weight = None
    if ctx.needs_input_grad[0]:
        of_x = gradient @ naive.weight_of(weight, weight_scale, gradient.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        of_bias = gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    if kept and ctx.needs_input_grad[6]:
        of_weight = (gradient.flatten(0, -2).mT @ kept[0].flatten(0, -2)).to(ctx.original_dtype)
    return of_x, None, None, None, None, of_bias, of_weight


rows_linear.register_autograd(_backward, setup_context=_keep)


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
    return f"rows of {x.shape[-1]}, at most {MAX_CHANNELS} fit" if x.shape[-1] > MAX_CHANNELS else None


def _check_rows(x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., K) of floating-point numbers, got {tuple(x.shape)} of {x.dtype}")


def _check_matmul(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    check_devices("fp8_rows_matmul", codes, scale, weight, weight_scale, bias)
    if codes.dtype != E4M3 or weight.dtype != E4M3:
        raise ValueError(f"codes and weight must be {E4M3}, got {codes.dtype} and {weight.dtype}")
    if weight.dim() != 2 or codes.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"codes (..., K) and weight (N, K) do not fit: {tuple(codes.shape)} and {tuple(weight.shape)}"
        )
    scales = (scale, (*codes.shape[:-1], 1)), (weight_scale, (weight.shape[0], 1))
    for each, shape in scales:
        if each.dtype != torch.float32 or each.shape != shape:
            raise ValueError(f"a scale must be float32 {shape}, got {each.dtype} {tuple(each.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
