"""What the linear layers in 8 bits share: the checks of their arguments and their straight-through gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgen.kernels.dispatch import check_devices

Shape = tuple[int, ...]
Shapes = Callable[[Shape, Shape], tuple[Shape, Shape]]
"""(shape of the codes, shape of the weight) -> shapes of their scales."""


def check_rows(x: Tensor) -> None:
    """Check that a tensor has rows that can be quantised.

    Raises:
        ValueError: x is a scalar, its rows are empty, or its dtype is not floating-point.
    """
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., K) with K > 0, in a floating-point dtype, got {tuple(x.shape)} {x.dtype}")


def check_product(
    operation: str,
    dtype: torch.dtype,
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    shapes: Shapes,
) -> None:
    """Check the arguments of a product of quantised rows and weights.

    Args:
        operation: the name of the operation, for the message.
        dtype: the dtype that the codes must have.
        codes: (..., K).
        scale: the scales of the codes.
        weight: (N, K).
        weight_scale: the scales of the weight.
        bias: (N,) or None.
        shapes: returns the shapes that the scales must have.

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    check_devices(operation, codes, scale, weight, weight_scale, bias)
    if codes.dtype != dtype or weight.dtype != dtype:
        raise ValueError(f"codes and weight must be {dtype}, got {codes.dtype} and {weight.dtype}")
    if codes.dim() == 0 or weight.dim() != 2 or codes.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"codes must be (..., K) and weight (N, K) with the same K, got {tuple(codes.shape)} and"
            f" {tuple(weight.shape)}"
        )
    wanted = shapes(tuple(codes.shape), tuple(weight.shape))
    for each, shape in zip((scale, weight_scale), wanted, strict=True):
        if each.dtype != torch.float32 or each.shape != shape:
            raise ValueError(f"this scale must be float32 of shape {shape}, got {each.dtype} {tuple(each.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def by_rows(codes: Shape, weight: Shape) -> tuple[Shape, Shape]:
    """Return the shapes of scales with one number per row of the codes and of the weight (a `Shapes`)."""
    return (*codes[:-1], 1), (weight[0], 1)


def straight_through(operation: Any, weight_of: Callable[[Tensor, Tensor, torch.dtype], Tensor]) -> None:
    """Give a linear operation gradients that ignore the rounding.

    Args:
        operation: a custom operation with the arguments (x, codes, scale, weight, weight_scale, bias, original), of
            which `original` is the weight before its quantisation, or None. The gradient of x uses the rounded weight,
            and the gradient of `original` uses the unrounded x; without `original` x is not kept.
        weight_of: returns the numbers (N, K) that the weight and its scales represent, in a dtype.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, weight, weight_scale, bias, original = inputs
        ctx.save_for_backward(weight, weight_scale, *(() if original is None else (x,)))
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.original_dtype = None if original is None else original.dtype

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, weight_scale, *kept = ctx.saved_tensors
        of_x = of_bias = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight_of(weight, weight_scale, gradient.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
            of_bias = gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        if kept and ctx.needs_input_grad[6]:
            of_weight = (gradient.flatten(0, -2).mT @ kept[0].flatten(0, -2)).to(ctx.original_dtype)
        return of_x, None, None, None, None, of_bias, of_weight

    operation.register_autograd(backward, setup_context=keep)
