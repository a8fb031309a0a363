"""The norms around the layers of a diffusion transformer (DiT, arXiv:2212.09748, section 3.2): the reference.

The input of a layer is LayerNorm(x) * (1 + scale) + shift, and the output of the layer times a gate is added to x.
With `rms` the norm is RMSNorm (arXiv:1910.07467, eq. 4), which does not subtract the mean.

Shapes: x is (B, N, C); scale, shift and gate are (B, 1, C) for one value per sample or (B, N, C) for one value per
token; weight and bias are (C,). Everything is computed in float32 (float64 for float64) and rounded once to the dtype
of x.
"""

import torch
from torch import Tensor


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> Tensor:
    """Return (LayerNorm(x) * weight + bias) * (1 + scale) + shift; an argument of None is left out."""
    normed = _affine(_normalised(_exact(x), eps, rms)[0], weight, bias)
    if scale is not None:
        normed = normed * (1 + _exact(scale))
    if shift is not None:
        normed = normed + _exact(shift)
    return normed.to(x.dtype)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the result of `gate_residual` and `norm_modulate` of that result."""
    total = gate_residual(x, y, gate)
    return total, norm_modulate(total, scale, shift, weight, bias, eps=eps, rms=rms)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return x + y * gate, rounded to the dtype of x."""
    branch = _exact(y) if gate is None else _exact(y) * _exact(gate)
    return (_exact(x) + branch).to(x.dtype)


def norm_modulate_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, scale, shift, weight and bias, given the gradient of `norm_modulate`'s result.

    With n the normalised x and r the reciprocal of its standard deviation:
    dx = r * (dn - mean(dn) - n * mean(dn * n)). For RMSNorm the term mean(dn) is absent.
    """
    gradient = _exact(gradient)
    normed, reciprocal = _normalised(_exact(x), eps, rms)
    of_scale = _summed(gradient * _affine(normed, weight, bias), scale) if scale is not None else None
    of_shift = _summed(gradient, shift)
    if scale is not None:
        gradient = gradient * (1 + _exact(scale))
    of_weight, of_bias = _summed(gradient * normed, weight), _summed(gradient, bias)
    if weight is not None:
        gradient = gradient * _exact(weight)
    of_x = gradient - normed * (gradient * normed).mean(-1, keepdim=True)
    if not rms:
        of_x = of_x - gradient.mean(-1, keepdim=True)
    of_x = reciprocal * of_x
    return of_x.to(x.dtype), of_scale, of_shift, of_weight, of_bias


def gate_residual_backward(gradient: Tensor, y: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of y and gate, given the gradient of x + y * gate."""
    gradient = _exact(gradient)
    of_y = gradient if gate is None else gradient * _exact(gate)
    return of_y.to(y.dtype), _summed(gradient * _exact(y), gate)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalised(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    centred = x if rms else x - x.mean(-1, keepdim=True)
    reciprocal = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * reciprocal, reciprocal


def _affine(normed: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normed = normed * _exact(weight)
    return normed if bias is None else normed + _exact(bias)


def _summed(gradient: Tensor, like: Tensor | None) -> Tensor | None:
    """Sum the gradient over the axes along which `like` was broadcast; None if `like` is None."""
    return None if like is None else gradient.sum_to_size(like.shape).to(like.dtype)
