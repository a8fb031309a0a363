"""Norm and rotation of queries and keys before attention: the reference.

RMSNorm (arXiv:1910.07467, eq. 4) or LayerNorm, then RoPE (arXiv:2104.09864, eq. 34).

Shapes: x is (B, N, H, D). The tables cos and sin are (1 or B, R, 1 or H, D / 2), with one angle for each pair of
channels. The R tokens from `first_token` on are rotated. A pair is (2i, 2i + 1), or (i, i + D / 2) with `half`. Weight
and bias are (D,), or (H * D,) for the norm across heads. Everything is computed in float32 (float64 for float64) and
rounded once to the dtype of x.
"""

import torch
from torch import Tensor

NORMS = ("none", "rms_norm", "rms_norm_across_heads", "layer_norm")
"""The norms, by their names in diffusers. `rms_norm_across_heads` normalises all heads of a token together, the others
normalise each head."""


def norm_rope(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "rms_norm",
    half: bool = False,
    first_token: int = 0,
) -> Tensor:
    """Return rotate(norm(x) * weight + bias) - shift, with shift (1 or B, H, D); an argument of None is left out."""
    return _exact_norm_rope(x, cos, sin, weight, bias, shift, eps, norm, half, first_token).to(x.dtype)


def norm_rope_int8(
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: str = "rms_norm",
    half: bool = False,
    first_token: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return `norm_rope` in int8, (B, N, H, D), and its float32 scales, (B, N, H); the product is `norm_rope`.

    A scale is the largest magnitude of its row divided by 127. Halves are rounded away from 0. The scale of a row of
    zeros is 0.
    """
    exact = _exact_norm_rope(x, cos, sin, weight, bias, shift, eps, norm, half, first_token)
    scale = exact.abs().amax(-1) / 127
    steps = exact / torch.where(scale > 0, scale, 1).unsqueeze(-1)
    return (steps + 0.5 * steps.sign()).trunc().to(torch.int8), scale.float()


def norm_rope_backward(
    gradient: Tensor,
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    norm: str,
    half: bool,
    first_token: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, given the gradient of `norm_rope`'s result.

    The inverse of a rotation is its transpose. With n the normalised x, r the reciprocal of its standard deviation and
    dn the gradient of n: dx = r * (dn - n * mean(dn * n)) for RMSNorm, and dx = r * (dn - mean(dn) - n * mean(dn * n))
    for LayerNorm.
    """
    shape = x.shape
    gradient = _exact(gradient)
    if cos is not None and sin is not None:
        gradient = _rotated(gradient, cos, -sin, half, first_token)
    if norm == "none":
        return gradient.to(x.dtype), None, None
    row, gradient = _rows(_exact(x), norm), _rows(gradient, norm)
    normed, reciprocal = _normalised(row, eps, norm)
    leading = tuple(range(gradient.dim() - 1))
    of_weight = None if weight is None else (gradient * normed).sum(leading).to(weight.dtype)
    of_bias = None if bias is None else gradient.sum(leading).to(bias.dtype)
    if weight is not None:
        gradient = gradient * _exact(weight)
    of_x = gradient - normed * (gradient * normed).mean(-1, keepdim=True)
    if norm == "layer_norm":
        of_x = of_x - gradient.mean(-1, keepdim=True)
    return (reciprocal * of_x).reshape(shape).to(x.dtype), of_weight, of_bias


def _exact_norm_rope(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    norm: str,
    half: bool,
    first_token: int,
) -> Tensor:
    out = _exact(x)
    if norm != "none":
        normed, _ = _normalised(_rows(out, norm), eps, norm)
        if weight is not None:
            normed = normed * _exact(weight)
        if bias is not None:
            normed = normed + _exact(bias)
        out = normed.reshape(x.shape)
    if cos is not None and sin is not None:
        out = _rotated(out, cos, sin, half, first_token)
    return out if shift is None else out - _exact(shift).unsqueeze(1)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, norm: str) -> Tensor:
    """Return a view of x in which the numbers that are normalised together form the last axis."""
    return x.flatten(2) if norm == "rms_norm_across_heads" else x


def _normalised(row: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    if norm == "layer_norm":
        row = row - row.mean(-1, keepdim=True)
    reciprocal = (row.square().mean(-1, keepdim=True) + eps).rsqrt()
    return row * reciprocal, reciprocal


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, half: bool, first_token: int) -> Tensor:
    """Rotate every pair (a, b) by its angle: (a cos - b sin, a sin + b cos)."""
    last_token = first_token + cos.shape[1]
    pairs = x[:, first_token:last_token].unflatten(-1, (2, -1) if half else (-1, 2))
    axis = -2 if half else -1
    a, b = pairs.unbind(axis)
    cos, sin = _exact(cos), _exact(sin)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], axis).flatten(-2)
    return torch.cat([x[:, :first_token], turned, x[:, last_token:]], dim=1)
