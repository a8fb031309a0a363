"""`grid_convolution` as a custom operation with gradients: a Triton kernel on a GPU, plain torch elsewhere.

See `naive.py` for formulas and shapes. The plain torch path switches autocast off, which would convolve in half
precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, for_triton, uses_triton
from postgen.kernels.grid_convolution import naive

MAX_CHANNELS = 256
"""Largest number of channels per head that the kernel supports."""


def grid_convolution(
    x: Tensor, space: Tensor | None, time: Tensor | None, grid: Sequence[int], *, added: bool = False
) -> Tensor:
    """Return the sum of the depth-wise convolutions of tokens within frames and along time, contiguous.

    At least one of `space` and `time` is required.

    Args:
        x: tokens, (B, T h w, H, D), any strides.
        space: weights within a frame, (H * D, s, s), s odd, any dtype; None for none.
        time: weights along time, (H * D, t), t odd, any dtype; None for none.
        grid: T, h and w.
        added: whether to add x, which takes no extra time.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    out: Tensor = _grid_convolution(x, space, time, list(grid), added)
    return out


@library.custom_op("postgen::grid_convolution", mutates_args=())
def _grid_convolution(x: Tensor, space: Tensor | None, time: Tensor | None, grid: list[int], added: bool) -> Tensor:
    _check(x, space, time, grid)
    triple = (grid[0], grid[1], grid[2])
    if _on_kernel(x):
        from postgen.kernels.grid_convolution import triton

        return triton.grid_convolution(x, space, time, triple, added)
    with torch.autocast(x.device.type, enabled=False):
        return naive.grid_convolution(x, space, time, triple, added).contiguous()


@library.custom_op("postgen::grid_convolution_backward", mutates_args=())
def grid_convolution_backward(
    gradient: Tensor, x: Tensor, space: Tensor | None, time: Tensor | None, grid: list[int], added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, `space` and `time`; the gradient of a weight that is None is an empty tensor.

    Args:
        gradient: gradient of the result, (B, T h w, H, D).
        x: see `grid_convolution`, as all other arguments.
        space: weights within a frame, or None.
        time: weights along time, or None.
        grid: T, h and w.
        added: whether x was added.
    """
    triple, gradient = (grid[0], grid[1], grid[2]), gradient.to(x.dtype)
    if _on_kernel(x):
        from postgen.kernels.grid_convolution import triton

        found = triton.grid_convolution_backward(gradient, x, space, time, triple, added)
    else:
        with torch.autocast(x.device.type, enabled=False):
            found = naive.grid_convolution_backward(gradient, x, space, time, triple, added)
    of_x, *of_weights = found
    of_space, of_time = (x.new_empty(0) if each is None else each.contiguous() for each in of_weights)
    return of_x.contiguous(), of_space, of_time


def takes(x: Tensor) -> bool:
    """Whether the kernel can convolve this tensor. This check never warns."""
    return for_triton(x) and _obstacle(x) is None


@_grid_convolution.register_fake
def _(x: Tensor, space: Tensor | None, time: Tensor | None, grid: list[int], added: bool) -> Tensor:
    _check(x, space, time, grid)
    return x.new_empty(x.shape)


@grid_convolution_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, space: Tensor | None, time: Tensor | None, grid: list[int], added: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_space, of_time = (x.new_empty(0) if each is None else each.new_empty(each.shape) for each in (space, time))
    return x.new_empty(x.shape), of_space, of_time


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, space, time, ctx.grid, ctx.added = inputs
    ctx.save_for_backward(x, space, time)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, space, time = ctx.saved_tensors
    of_x, of_space, of_time = grid_convolution_backward(gradient, x, space, time, ctx.grid, ctx.added)
    return of_x, None if space is None else of_space, None if time is None else of_time, None, None


_grid_convolution.register_autograd(_backward, setup_context=_keep)


def _obstacle(x: Tensor) -> str | None:
    channels = x.shape[-1]
    odd = channels > MAX_CHANNELS or channels % 2
    return f"heads have {channels} channels, even numbers up to {MAX_CHANNELS} are supported" if odd else None


def _on_kernel(x: Tensor) -> bool:
    return uses_triton("grid_convolution", x, obstacle=_obstacle(x))


def _check(x: Tensor, space: Tensor | None, time: Tensor | None, grid: Sequence[int]) -> None:
    check_devices("grid_convolution", x, space, time)
    if x.dim() != 4 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point, (B, N, H, D) and not empty, got {tuple(x.shape)} of {x.dtype}")
    if len(grid) != 3 or min(grid) < 1 or math.prod(grid) != x.shape[1]:
        raise ValueError(
            f"grid must be frames, rows and columns whose product is the number of tokens, {x.shape[1]}, got"
            f" {tuple(grid)}"
        )
    if space is None and time is None:
        raise ValueError("both space and time are None: pass the weights of at least one convolution")
    width = x.shape[2] * x.shape[3]
    for name, weight, sides in (("space", space, 2), ("time", time, 1)):
        if weight is None:
            continue
        if not weight.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {weight.dtype}")
        side = weight.shape[-1] if weight.dim() else 0
        if tuple(weight.shape) != (width, *[side] * sides) or side % 2 == 0:
            form = ", ".join([str(width), *["an odd side"] * sides])
            raise ValueError(f"{name} must be ({form}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
