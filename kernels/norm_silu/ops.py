"""`norm_silu_pad` as a torch custom operation: one kernel per direction on a GPU, plain torch elsewhere.

`naive.py` has the shapes.
"""

from typing import Any

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, uses_triton
from postgen.kernels.norm_silu import naive

MAX_CHANNELS = 4096
"""The largest number of channels that one program of the kernel can hold in registers."""


@library.custom_op("postgen::norm_silu_pad", mutates_args=())
def norm_silu_pad(x: Tensor, gamma: Tensor) -> Tensor:
    """Return SiLU(RMSNorm(x) * gamma) with zero padding around it.

    Args:
        x: (B, C, T, H, W), any strides. In the memory format `channels_last_3d` x is not copied.
        gamma: the gain, (C,), any dtype.

    Returns:
        (B, C, T + 2, H + 2, W + 2) in the dtype of x and the memory format `channels_last_3d`.

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    _check(x, gamma)
    if _on_kernel(x, gamma):
        from postgen.kernels.norm_silu import triton

        return triton.norm_silu_pad(x, gamma)
    return naive.norm_silu_pad(x, gamma).contiguous(memory_format=torch.channels_last_3d)


@library.custom_op("postgen::norm_silu_pad_backward", mutates_args=())
def norm_silu_pad_backward(gradient: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (`channels_last_3d`) and gamma, given the gradient of the padded result."""
    if _on_kernel(x, gamma, gradient):
        from postgen.kernels.norm_silu import triton

        return triton.norm_silu_pad_backward(gradient, x, gamma)
    of_x, of_gamma = naive.norm_silu_pad_backward(gradient, x, gamma)
    return of_x.contiguous(memory_format=torch.channels_last_3d), of_gamma


@norm_silu_pad.register_fake
def _(x: Tensor, gamma: Tensor) -> Tensor:
    _check(x, gamma)
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, frames + 2, height + 2, width + 2)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


@norm_silu_pad_backward.register_fake
def _(gradient: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    return of_x, torch.empty_like(gamma)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = norm_silu_pad_backward(gradient, *ctx.saved_tensors)
    return result


norm_silu_pad.register_autograd(_backward, setup_context=_keep)


def _on_kernel(x: Tensor, *others: Tensor) -> bool:
    channels = x.shape[1]
    obstacle = f"x has {channels} channels, at most {MAX_CHANNELS} fit" if channels > MAX_CHANNELS else None
    return uses_triton("norm_silu_pad", x, *others, obstacle=obstacle)


def _check(x: Tensor, gamma: Tensor) -> None:
    check_devices("norm_silu_pad", x, gamma)
    if x.dim() != 5 or x.numel() == 0:
        raise ValueError(f"x must be (B, C, T, H, W) and not empty, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
    if gamma.shape != x.shape[1:2]:
        raise ValueError(f"gamma must be (C,) for x of shape {tuple(x.shape)}, got {tuple(gamma.shape)}")
