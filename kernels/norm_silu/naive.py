"""RMSNorm over channels, gain, SiLU and the zero padding of a causal 3x3x3 convolution: the reference.

Wan's autoencoder (diffusers' `AutoencoderKLWan`) computes these before every 3x3x3 convolution: u = x r gamma with
r = (mean of x^2 over channels + eps)^(-1/2), then y = u sigmoid(u). The padding is two frames of zeros before the
first frame and one pixel of zeros on each side of every frame.

Shapes: x (B, C, T, H, W), gamma (C,); y (B, C, T + 2, H + 2, W + 2).
"""

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-24
"""Added to the mean square. diffusers divides by the L2 norm, clamped to at least 1e-12."""
PADDING = (1, 1, 1, 1, 2, 0)


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Return SiLU(RMSNorm(x) * gamma) in the shape and dtype of x, computed in float32 (float64 for float64)."""
    wide = _wide(x)
    scale = (wide.square().mean(1, keepdim=True) + EPSILON).rsqrt()
    return functional.silu(wide * scale * gamma.to(wide.dtype).view(-1, 1, 1, 1)).to(x.dtype)


def norm_silu_pad(x: Tensor, gamma: Tensor) -> Tensor:
    """Return `norm_silu` with the zero padding around it."""
    return functional.pad(norm_silu(x, gamma), PADDING)


def norm_silu_pad_backward(gradient: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and gamma in their dtypes, given the gradient of the padded result.

    With n = x r and d = gamma dL/du: dL/dgamma is the sum of n dL/du over all positions, and
    dL/dx = r (d - n mean(d n)).
    """
    wide, gain = _wide(x), _wide(gamma).view(-1, 1, 1, 1)
    inner = gradient[:, :, 2:, 1:-1, 1:-1].to(wide.dtype)
    scale = (wide.square().mean(1, keepdim=True) + EPSILON).rsqrt()
    n = wide * scale
    u = n * gain
    sigmoid = u.sigmoid()
    of_u = inner * sigmoid * (1 + u * (1 - sigmoid))
    of_n = of_u * gain
    of_x = scale * (of_n - n * (of_n * n).mean(1, keepdim=True))
    return of_x.to(x.dtype), (of_u * n).sum((0, 2, 3, 4)).to(gamma.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
