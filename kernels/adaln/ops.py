"""`norm_modulate`, `gate_residual_norm_modulate` and `gate_residual` as torch custom operations: one GPU kernel each.

`naive.py` has the shapes. The backward pass computes the formulas of `naive.py` in plain torch, which torch.compile
can fuse.
"""

from typing import Any

from torch import Tensor, library

from postgen.kernels.adaln import naive
from postgen.kernels.dispatch import check_devices, uses_triton

MAX_CHANNELS = 16384
"""The largest number of channels of a token that one program of the kernel can hold in registers."""


@library.custom_op("postgen::norm_modulate", mutates_args=())
def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    """Return (LayerNorm(x) * weight + bias) * (1 + scale) + shift; an argument of None is left out.

    Args:
        x: (B, N, C), any strides.
        scale: (1 or B, 1 or N, C), any dtype.
        shift: (1 or B, 1 or N, C), any dtype.
        weight: (C,), any dtype.
        bias: (C,), any dtype.
        eps: added to the variance.
        rms: whether to use RMSNorm, which does not subtract the mean, instead of LayerNorm.

    Returns:
        (B, N, C), contiguous, in the dtype of x.

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    check_devices("norm_modulate", x, scale, shift, weight, bias)
    _check(x, scale=scale, shift=shift)
    _check_channels(x, weight=weight, bias=bias)
    if _on_kernel("norm_modulate", x, scale, shift, weight, bias):
        from postgen.kernels.adaln import triton

        return triton.norm_modulate(x, scale, shift, weight, bias, eps=eps, rms=rms)
    return naive.norm_modulate(x, scale, shift, weight, bias, eps=eps, rms=rms).contiguous()


@library.custom_op("postgen::gate_residual_norm_modulate", mutates_args=())
def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return x + y * gate, and `norm_modulate` of that sum.

    Args:
        x: the residual stream, (B, N, C), any strides.
        y: the output of a layer, (B, N, C), any strides.
        gate: (1 or B, 1 or N, C), any dtype; None is 1.
        scale: (1 or B, 1 or N, C), any dtype.
        shift: (1 or B, 1 or N, C), any dtype.
        weight: (C,), any dtype.
        bias: (C,), any dtype.
        eps: added to the variance.
        rms: whether to use RMSNorm instead of LayerNorm.

    Returns:
        The sum and its norm, both (B, N, C), contiguous, in the dtype of x.

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    check_devices("gate_residual_norm_modulate", x, y, gate, scale, shift, weight, bias)
    _check(x, gate=gate, scale=scale, shift=shift)
    _check_channels(x, weight=weight, bias=bias)
    _check_answer(x, y)
    if _on_kernel("gate_residual_norm_modulate", x, y, gate, scale, shift, weight, bias):
        from postgen.kernels.adaln import triton

        return triton.gate_residual_norm_modulate(x, y, gate, scale, shift, weight, bias, eps=eps, rms=rms)
    total, out = naive.gate_residual_norm_modulate(x, y, gate, scale, shift, weight, bias, eps=eps, rms=rms)
    return total.contiguous(), out.contiguous()


@library.custom_op("postgen::gate_residual", mutates_args=())
def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return x + y * gate, for layers that no norm follows.

    Args:
        x: the residual stream, (B, N, C), any strides.
        y: the output of a layer, (B, N, C), any strides.
        gate: (1 or B, 1 or N, C), any dtype; None is 1.

    Returns:
        (B, N, C), contiguous, in the dtype of x.

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    check_devices("gate_residual", x, y, gate)
    _check(x, gate=gate)
    _check_answer(x, y)
    if _on_kernel("gate_residual", x, y, gate):
        from postgen.kernels.adaln import triton

        return triton.gate_residual(x, y, gate)
    return naive.gate_residual(x, y, gate).contiguous()


@norm_modulate.register_fake
def _(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    check_devices("norm_modulate", x, scale, shift, weight, bias)
    return x.new_empty(x.shape)


@gate_residual_norm_modulate.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    check_devices("gate_residual_norm_modulate", x, y, gate, scale, shift, weight, bias)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@gate_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    check_devices("gate_residual", x, y, gate)
    return x.new_empty(x.shape)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.rms = inputs
    ctx.save_for_backward(*tensors)


def _norm_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *naive.norm_modulate_backward(gradient, *ctx.saved_tensors, eps=ctx.eps, rms=ctx.rms), None, None


def _keep_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, *modulation, ctx.eps, ctx.rms = inputs
    ctx.save_for_backward(y, gate, output[0], *modulation)


def _residual_backward(ctx: Any, of_total: Tensor, of_normed: Tensor) -> tuple[Tensor | None, ...]:
    y, gate, total, *modulation = ctx.saved_tensors
    through_norm, *of_modulation = naive.norm_modulate_backward(
        of_normed, total, *modulation, eps=ctx.eps, rms=ctx.rms
    )
    of_x = of_total + through_norm
    return of_x, *naive.gate_residual_backward(of_x, y, gate), *of_modulation, None, None


def _keep_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gate_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    y, gate = ctx.saved_tensors
    return gradient, *naive.gate_residual_backward(gradient, y, gate)


norm_modulate.register_autograd(_norm_backward, setup_context=_keep_norm)
gate_residual_norm_modulate.register_autograd(_residual_backward, setup_context=_keep_residual)
gate_residual.register_autograd(_gate_backward, setup_context=_keep_gate)


def _on_kernel(operation: str, x: Tensor, *others: Tensor | None) -> bool:
    channels = x.shape[-1]
    obstacle = f"x has {channels} channels, at most {MAX_CHANNELS} fit" if channels > MAX_CHANNELS else None
    return uses_triton(operation, x, *(each for each in others if each is not None), obstacle=obstacle)


def _check(x: Tensor, **modulation: Tensor | None) -> None:
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"x must be (B, N, C) and not empty, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, got {x.dtype}")
    batch, tokens, channels = x.shape
    for name, tensor in modulation.items():
        if tensor is None:
            continue
        shape = tuple(tensor.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, tokens) or shape[2] != channels:
            raise ValueError(f"{name} must be (1 or B, 1 or N, C) for x of shape {tuple(x.shape)}, got {shape}")


def _check_answer(x: Tensor, y: Tensor) -> None:
    if y.shape != x.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")


def _check_channels(x: Tensor, **affine: Tensor | None) -> None:
    for name, tensor in affine.items():
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be (C,) for x of shape {tuple(x.shape)}, got {tuple(tensor.shape)}")
